"""Decoding: safely and rightly, image and mask alike."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from modules.data.decode import BadImage, decode_image, decode_mask
from tests.data.trees import bomb, disc, encoded, picture

LIMIT = 10_000


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_decode_to_their_pixels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    image, orientation = decode_image(encoded(picture(1), form, **options), LIMIT)
    assert (np.asarray(image) == np.asarray(picture(1))).all() and orientation == 1 and image.mode == "RGB"


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(form):
    levels = np.array([[0, 128, 257, 4096], [32768, 65000, 65406, 65535]], dtype=np.uint16)
    image, _ = decode_image(encoded(Image.fromarray(levels), form), LIMIT)
    wanted = np.round(levels / 257).astype(np.uint8)
    assert (np.asarray(image) == wanted[:, :, None]).all()
    assert np.asarray(image).std() > 50  # Pillow's convert("RGB") makes all but the first pixels white


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_fixed_range_are_refused(dtype):
    content = encoded(Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF")
    with pytest.raises(BadImage, match=f"{np.dtype(dtype)}, which has no fixed range"):
        decode_image(content, LIMIT)


def test_transparency_lies_over_gray_and_uncovers_nothing():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 255  # red under every pixel
    rgba[0, :, 3] = (0, 255, 128)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(rgba)), LIMIT)[0])[0]
    assert pixels[0].tolist() == [128, 128, 128] and pixels[1].tolist() == [255, 0, 0]
    assert abs(int(pixels[2, 0]) - 192) <= 1 and abs(int(pixels[2, 1]) - 64) <= 1


def test_transparency_of_palettes_and_gray():
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(encoded(palette, "PNG", transparency=0), LIMIT)[0])[0]
    assert pixels.tolist() == [[128, 128, 128], [0, 255, 0]]
    gray = Image.new("LA", (1, 1), (200, 0))
    assert np.asarray(decode_image(encoded(gray), LIMIT)[0]).tolist() == [[[128, 128, 128]]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    source = picture(2).convert(mode)
    image, _ = decode_image(encoded(source, "TIFF"), LIMIT)
    assert image.mode == "RGB" and (np.asarray(image) == np.asarray(source.convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_as_pillow_would(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(3, 6, 4), "PNG", exif=exif)
    image, found = decode_image(content, LIMIT)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert found == orientation and image.size == wanted.size
    assert (np.asarray(image) == np.asarray(wanted)).all()


def test_the_header_is_checked_before_a_pixel_is_decoded(monkeypatch):
    content = bomb(9000, 9000)
    assert len(content) < 200_000

    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(BadImage, match=r"9000 x 9000 pixels, more than data.max_pixels 50,000,000"):
        decode_image(content, 50_000_000)
    with pytest.raises(BadImage, match=r"20000 x 20000 pixels, more than data.max_pixels 50,000,000"):
        decode_image(bomb(20_000, 20_000), 50_000_000)
    with pytest.raises(BadImage, match="pixels were decoded"):  # of 400 million, where so many are asked for
        decode_image(bomb(20_000, 20_000), 500_000_000)


def test_formats_outside_the_list_are_refused_whatever_their_name():
    for content in (encoded(picture(), "GIF"), b"<svg/>", b"%!PS-Adobe-3.0 EPSF", b"", encoded(picture(), "PDF")):
        with pytest.raises(BadImage, match="no image of a known format"):
            decode_image(content, LIMIT)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_truncated_file_is_found_by_decoding_it_whole(form):
    whole = encoded(picture(4, 64, 64), form)
    with pytest.raises(BadImage, match="cannot be decoded|header cannot be read|no image of a known format"):
        decode_image(whole[: len(whole) * 2 // 3], LIMIT)


def test_a_mask_in_any_usual_form():
    wanted = np.asarray(disc()) > 0
    rgb = disc().convert("RGB")
    ones = Image.fromarray(wanted.astype(np.uint8))
    palette = ones.convert("P")
    palette.putpalette([0, 0, 0] * 256)  # only the entries differ
    sixteen = Image.fromarray(wanted.astype(np.uint16) * 65535)
    for image in (disc(), disc().convert("1"), rgb, ones, palette, sixteen):
        assert (decode_mask(encoded(image), LIMIT, (32, 32)) == wanted).all()
    smooth = decode_mask(encoded(disc(), "JPEG", quality=80), LIMIT, (32, 32))
    assert (smooth != wanted).mean() < 0.02


def stored(image: Image.Image, orientation: int, form: str, **options) -> bytes:
    """A file whose pixels are `image` and whose EXIF block says how they were stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, form, exif=exif, **options)


@pytest.mark.parametrize("size", [(6, 4), (5, 5)], ids=["oblong", "square"])
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_turned_alike(orientation, form, options, size):
    """The mask marks the dark pixels of the image as they lie in its file, with or without a tag of its own."""
    pixels = np.full((size[1], size[0]), 255, dtype=np.uint8)
    pixels[0, :4] = pixels[1, 0] = 0
    image, found = decode_image(stored(Image.fromarray(pixels).convert("RGB"), orientation, form, **options), LIMIT)
    dark = np.asarray(image)[:, :, 0] < 128
    mask = Image.fromarray(255 - pixels)
    assert found == orientation
    assert (decode_mask(encoded(mask), LIMIT, image.size, found) == dark).all()
    assert (decode_mask(stored(mask, orientation, "TIFF"), LIMIT, image.size, found) == dark).all()
    assert (decode_mask(stored(mask, orientation, "PNG"), LIMIT, image.size, found) == dark).all()


def test_a_mask_in_the_size_of_the_upright_image_alone_is_not_turned():
    upright = np.zeros((6, 4), dtype=bool)
    upright[0, :3] = True
    content = encoded(Image.fromarray(upright.astype(np.uint8) * 255))
    assert (decode_mask(content, LIMIT, (4, 6), orientation=6) == upright).all()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(BadImage, match="the mask is 32 x 32 pixels, the image 32 x 16"):
        decode_mask(encoded(disc()), LIMIT, (32, 16))
