"""Images: decoded safely and rightly, cropped, resized once; bad files named."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from modules.config import Data
from modules.data.decode import TURNS, BadImage, decode_image, decode_mask
from modules.data.images import load_at_sizes, load_images
from modules.data.items import Index, Item
from modules.errors import ConfigError, DataError
from tests.data.trees import disc, encoded, pack, picture, put

LIMIT = 10_000


def one_set(tmp_path, contents: dict[str, bytes | Image.Image], masks: dict | None = None, kind="folder"):
    """An index of files of class "a", split train; `masks` are stored beside them as <name>.mask."""
    masks = masks or {}
    for name, content in contents.items():
        put(tmp_path / name, content)
        if name in masks:
            put(tmp_path / f"{name}.mask", masks[name])
    items = tuple(
        Item(name, "a", "id", "train", mask=f"{name}.mask" if name in masks else "") for name in sorted(contents)
    )
    return Index(str(tmp_path), kind, items, ("a",))


def loaded(index: Index, size=8, *, masks=None, min_size=0, **settings):
    return load_images(index, index.items, size, replace(Data(), **settings), masks=masks, min_size=min_size)


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises width x height pixels and whose data would fill them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Decoding


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_decode_to_their_pixels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    image, orientation = decode_image(encoded(picture(1), form, **options), LIMIT)
    assert (np.asarray(image) == np.asarray(picture(1))).all() and orientation == 1 and image.mode == "RGB"


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(form):
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


def test_transparency_lies_over_grey_and_uncovers_nothing():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 255  # red under every pixel
    rgba[0, :, 3] = (0, 255, 128)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(rgba)), LIMIT)[0])[0]
    assert pixels[0].tolist() == [128, 128, 128] and pixels[1].tolist() == [255, 0, 0]
    assert abs(int(pixels[2, 0]) - 192) <= 1 and abs(int(pixels[2, 1]) - 64) <= 1


def test_transparency_of_palettes_and_grey():
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(encoded(palette, "PNG", transparency=0), LIMIT)[0])[0]
    assert pixels.tolist() == [[128, 128, 128], [0, 255, 0]]
    grey = Image.new("LA", (1, 1), (200, 0))
    assert np.asarray(decode_image(encoded(grey), LIMIT)[0]).tolist() == [[[128, 128, 128]]]


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


def test_a_mask_drawn_on_the_stored_image_is_turned_with_it():
    upright = np.zeros((6, 4), dtype=bool)
    upright[0, :3] = True
    stored = Image.fromarray(upright.astype(np.uint8) * 255).transpose(Image.Transpose.ROTATE_90)
    assert TURNS[6] is Image.Transpose.ROTATE_270
    assert (decode_mask(encoded(stored), LIMIT, (4, 6), orientation=6) == upright).all()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(BadImage, match="the mask is 32 x 32 pixels, the image 32 x 16"):
        decode_mask(encoded(disc()), LIMIT, (32, 16))


# Loading


def test_pixels_of_the_stored_size_are_untouched_and_in_the_order_of_the_items(tmp_path):
    index = one_set(tmp_path, {f"{i}.png": picture(i) for i in range(20)})
    images = loaded(index, 32)
    assert images.items == index.items and images.pixels_DHWC.dtype == torch.uint8
    for i in range(20):
        assert (images.pixels_DHWC[i].numpy() == _array(index, i)).all()
    assert images.masks_DHW is None and images.skipped == () and images.notes == ()
    backwards = load_images(index, index.items[::-1], 32, Data())
    assert torch.equal(backwards.pixels_DHWC, images.pixels_DHWC.flip(0))
    assert backwards.digests == images.digests[::-1] and len(set(images.digests)) == 20


def _array(index: Index, i: int) -> np.ndarray:
    return np.asarray(Image.open(f"{index.root}/{index.items[i].path}"))


def test_the_resize_is_torchs_antialiased_bilinear(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(5, 96, 96)})
    for size in (64, 40, 17):
        pixels = loaded(index, size).pixels_DHWC.float()
        source = torch.from_numpy(_array(index, 0).copy()).permute(2, 0, 1)[None].float()
        wanted = F.interpolate(source, size=(size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        assert (pixels - wanted).abs().max() <= 1.01  # Pillow rounds after each of its two passes


def test_several_sizes_come_from_one_decode_each_resized_once(tmp_path, monkeypatch):
    index = one_set(tmp_path, {f"{i}.png": picture(i, 50, 50) for i in range(3)})
    calls = []
    monkeypatch.setattr("modules.data.images.decode_image", lambda *args: calls.append(args) or decode_image(*args))
    small, large = load_at_sizes(index, index.items, {16: range(3), 32: [0, 2]}, Data())
    assert len(calls) == 3
    assert torch.equal(small.pixels_DHWC, loaded(index, 16).pixels_DHWC)
    assert torch.equal(large.pixels_DHWC, loaded(index, 32).pixels_DHWC[[0, 2]])
    assert [item.path for item in large.items] == ["0.png", "2.png"] and len(large.digests) == len(large.sides) == 2


def test_an_image_left_out_is_left_out_at_every_size(tmp_path):
    index = one_set(tmp_path, {f"{i}.png": picture(i, 50, 50) for i in range(4)})
    (tmp_path / "1.png").write_bytes(b"no image")
    sizes = {16: range(4), 32: [1, 3]}
    small, large = load_at_sizes(index, index.items, sizes, replace(Data(), on_bad_image="skip"))
    assert [item.path for item in small.items] == ["0.png", "2.png", "3.png"]
    assert [item.path for item in large.items] == ["3.png"]
    assert torch.equal(large.pixels_DHWC, loaded(index, 32, on_bad_image="skip").pixels_DHWC[2:])


def test_a_zip_pack_loads_as_its_folder(tmp_path):
    rows = [{"path": f"{i}.png", "label": "a"} for i in range(4)]
    folder = one_set(tmp_path / "f", {row["path"]: picture(i) for i, row in enumerate(rows)})
    archive = pack(tmp_path / "set.zip", rows)
    from_zip = loaded(replace(folder, root=str(archive), kind="zip"))
    assert torch.equal(from_zip.pixels_DHWC, loaded(folder).pixels_DHWC)
    assert from_zip.digests == loaded(folder).digests


def test_an_image_that_is_not_square_gives_its_central_square_and_is_counted(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(6, 40, 20)})
    images = loaded(index, 20)
    assert (images.pixels_DHWC[0].numpy() == _array(index, 0)[:, 10:30]).all()
    assert images.notes == ("1 images are not square; their central square is used",)


def test_small_images_are_counted_or_refused(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(7, 16, 16), "b.png": picture(8, 64, 64)})
    assert loaded(index, 32).notes == ("1 images are smaller than 32 px and were enlarged, the smallest 16",)
    with pytest.raises(DataError, match="a.png: is 16 px a side after cropping, less than the 32 px wanted"):
        loaded(index, 32, min_size=32)
    assert loaded(index, 16, min_size=16).notes == ()


def test_crop_to_mask_takes_image_and_mask_through_the_same_square(tmp_path):
    pixels = np.full((40, 60, 3), 10, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:20, 30:50], mask[10:20, 30:50] = 200, 255
    contents, masks = {"a.png": Image.fromarray(pixels)}, {"a.png": Image.fromarray(mask)}
    images = loaded(one_set(tmp_path, contents, masks), 20, crop_to_mask=True, crop_margin=0.0)
    assert torch.equal(images.pixels_DHWC[0, :, :, 0] == 200, images.masks_DHW[0] == 1)
    assert images.masks_DHW.dtype == torch.uint8 and images.masks_DHW[0, 5:15].all() and images.masks_DHW.sum() == 200


def test_masks_follow_their_image_through_every_resize(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(9, 64, 64)}, {"a.png": disc(64, 64, 20)})
    sizes = {size: [0] for size in (64, 32, 16)}
    for size, images in zip(sizes, load_at_sizes(index, index.items, sizes, Data()), strict=True):
        wanted = np.asarray(disc(size, size, 20 * size / 64)) > 0
        assert images.masks_DHW.shape == (1, size, size)
        assert (images.masks_DHW[0].numpy().astype(bool) != wanted).mean() < 0.02


def test_a_crop_over_the_border_is_filled_with_grey(tmp_path):
    contents, masks = {"a.png": picture(10, 40, 20)}, {"a.png": Image.new("L", (40, 20), 255)}
    images = loaded(one_set(tmp_path, contents, masks), 40, crop_to_mask=True, crop_margin=0.0)
    assert (images.pixels_DHWC[0, :10] == 128).all() and (images.pixels_DHWC[0, 30:] == 128).all()
    assert images.masks_DHW[0, :10].sum() == 0 and images.masks_DHW[0, 10:30].all()


def test_grey_background(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(11)}, {"a.png": disc()})
    images = loaded(index, 32, background="grey")
    inside = images.masks_DHW[0].bool()
    assert (images.pixels_DHWC[0][~inside] == 128).all()
    assert (images.pixels_DHWC[0][inside].numpy() == _array(index, 0)[inside.numpy()]).all()


def test_progress_counts_every_file(tmp_path):
    index, seen = one_set(tmp_path, {f"{i}.png": picture(i) for i in range(3)}), []
    load_images(index, index.items, 8, Data(), lambda done, total, note="": seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Bad files


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    half = encoded(picture(12, 64, 64), "JPEG")
    contents = {"a.png": picture(0), "half.jpg": half[: len(half) // 2], "text.png": b"hello", "z.png": picture(1)}
    index = one_set(tmp_path, contents)
    with pytest.raises(DataError) as caught:
        loaded(index)
    message = str(caught.value)
    assert "2 of 4 images cannot be used" in message and "half.jpg: cannot be decoded" in message
    assert "truncated" in message and "text.png: is no image" in message and "data.on_bad_image=skip" in message
    images = loaded(index, on_bad_image="skip")
    assert [i.path for i in images.items] == ["a.png", "z.png"]
    assert [path for path, _ in images.skipped] == ["half.jpg", "text.png"]
    assert torch.equal(images.pixels_DHWC[1], loaded(one_set(tmp_path / "b", {"z.png": picture(1)})).pixels_DHWC[0])
    assert "2 of 4 images left out, the first half.jpg" in images.notes[0]


def test_many_bad_files_make_a_message_of_bounded_length(tmp_path):
    index = one_set(tmp_path, {f"{i:02d}.png": b"x" for i in range(25)})
    with pytest.raises(DataError, match="25 of 25 .*; and 15 more"):
        loaded(index)


def test_a_file_that_vanished_after_the_index_was_read(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)})
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="b.png is missing"):
        loaded(index)


def test_a_bomb_among_the_files_is_named(tmp_path):
    index = one_set(tmp_path, {"bomb.png": bomb(9000, 9000)})
    with pytest.raises(DataError, match="bomb.png: its header says 9000 x 9000"):
        loaded(index)


def test_skipping_may_not_empty_a_class_or_a_split(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": b"x"})
    items = (index.items[0], replace(index.items[1], split="val"))
    with pytest.raises(DataError, match="no usable image is left of class 'a' in val; the first bad one is b.png"):
        load_images(index, items, 8, Data(on_bad_image="skip"))


def test_no_items(tmp_path):
    with pytest.raises(DataError, match="no image to load"):
        load_images(one_set(tmp_path, {"a.png": picture()}), (), 8, Data())


@pytest.mark.parametrize(
    "settings, masks, match",
    [
        ({"crop_to_mask": True}, None, "data.crop_to_mask. needs object masks"),
        ({"background": "grey"}, None, "data.background grey. needs object masks"),
        ({}, True, "masked recipes need object masks"),
    ],
)
def test_masks_wanted_and_absent(tmp_path, settings, masks, match):
    with pytest.raises(ConfigError, match=match):
        loaded(one_set(tmp_path, {"a.png": picture()}), masks=masks, **settings)


def test_a_mask_that_some_images_lack_is_a_bad_file(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc()})
    assert loaded(index).masks_DHW is None
    with pytest.raises(DataError, match="b.png: has no mask"):
        loaded(index, masks=True)
    kept = loaded(index, masks=True, on_bad_image="skip")  # for recipes alone: what is learned from stays the same
    assert kept.masks_DHW.flatten(1).any(1).tolist() == [True, False]
    assert kept.notes == ("1 images have no object in their mask: learned from, not edited within",)
    assert loaded(index, crop_to_mask=True, on_bad_image="skip").masks_DHW.shape == (1, 8, 8)


def test_a_mask_of_the_wrong_size(tmp_path):
    index = one_set(tmp_path, {"a.png": picture()}, {"a.png": disc(16, 16, 4)})
    with pytest.raises(DataError, match="its mask a.png.mask: the mask is 16 x 16 pixels, the image 32 x 32"):
        loaded(index)
    assert loaded(index, masks=False).masks_DHW is None


def test_an_empty_mask_is_an_error_where_the_object_is_needed(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc(), "b.png": disc(radius=0)})
    for settings in ({"crop_to_mask": True}, {"background": "grey"}, {"masks": True}):
        with pytest.raises(DataError, match="b.png: its mask b.png.mask is empty"):
            loaded(index, **settings)
    assert loaded(index).masks_DHW.flatten(1).sum(dim=1).tolist()[1] == 0


def test_a_broken_mask_that_only_recipes_need_takes_no_image_from_learning(tmp_path):
    """Or an arm with masked recipes would learn from other images than the arms without."""
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc(), "b.png": disc(16, 16, 4)})
    kept = loaded(index, masks=True, on_bad_image="skip")
    assert kept.masks_DHW.flatten(1).any(1).tolist() == [True, False] and not kept.skipped
    assert kept.notes == ("1 images have no object in their mask: learned from, not edited within",)
    assert torch.equal(kept.pixels_DHWC, loaded(index, masks=False, on_bad_image="skip").pixels_DHWC)
    assert len(loaded(index, crop_to_mask=True, on_bad_image="skip").items) == 1


def test_a_broken_mask(tmp_path):
    index = one_set(tmp_path, {"a.png": picture()}, {"a.png": b"hello"})
    with pytest.raises(DataError, match="its mask a.png.mask: is no image"):
        loaded(index)
