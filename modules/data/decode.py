"""Decodes the bytes of an image file to pixels, safely and correctly.

Safely: the size in the header is checked before any pixel is decoded, only known formats are tried, and the whole file
is decoded, so that a truncated file is found now and not in step 900. Correctly: 16-bit gray is scaled, not clipped
(Pillow's `convert("RGB")` turns it white), transparent pixels are blended with gray instead of showing the colors under
them, and a photograph is rotated as its EXIF tag says.

Shapes: H W pixels.
"""

import io

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would apply before that of `_load`, which is the one that counts

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
GRAY = 128  # fills what is not image: under transparency, beyond the border, outside the object
ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF orientation -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """One file cannot be used, and why; `load_images` collects these into one DataError or skips the files."""


class NoObject(BadImage):
    """The image has no mask, or an empty one, but its object is needed."""


def decode_image(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The image, upright and in RGB, and the EXIF orientation it was stored in (1: upright).

    Raises:
        BadImage: the format is unknown, the header says more than `max_pixels`, the file is truncated or broken, or its
            pixels have no fixed range.
    """
    image, orientation = _load(data, max_pixels)
    return _to_rgb(image), orientation


def decode_mask(data: bytes, max_pixels: int, size: tuple[int, int], orientation: int = 1) -> np.ndarray:
    """The object mask of an upright image of `size` (width, height): bool [H, W], True on the object.

    Pixels other than 0 are object (in a JPEG those of at least 128, in a palette those that are not entry 0). A mask
    with its own EXIF orientation is rotated by that. A mask without one is taken to match the pixels stored in the
    image file and is rotated like them, by `orientation`, unless its size matches the upright image only.

    Raises:
        BadImage: as `decode_image`, or the mask is not of the image's size.
    """
    image, own = _load(data, max_pixels)
    threshold = 127 if image.format == "JPEG" else 0
    stored_size = size[::-1] if orientation in (5, 6, 7, 8) else size
    if own == 1 and orientation in TURNS and image.size == stored_size:
        image = image.transpose(TURNS[orientation])
    if image.size != size:
        raise BadImage(f"the mask is {image.width} x {image.height} pixels, the image {size[0]} x {size[1]}")
    if image.mode not in ("1", "P", "L") and not image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        values = values.max(axis=2)
    return values > threshold


def _load(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The decoded image, upright, and the EXIF orientation it was stored in."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"is no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's readers raise almost any type on a broken header
        raise BadImage(f"its header cannot be read ({type(error).__name__}: {error})") from error
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"its header says {image.width} x {image.height} pixels, more than data.max_pixels {max_pixels:,}"
        )
    form = image.format
    stored = _orientation(image) if form == "TIFF" else 1  # Pillow rotates a TIFF while loading, and drops the tag
    try:
        image.load()
    except Exception as error:  # and the same on broken pixels: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from error
    orientation = _orientation(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
        image.format = form
    return image, max(stored, orientation)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the tag is missing or holds another value.

    Raises:
        BadImage: the EXIF block cannot be read.
    """
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
        return found if found in TURNS else 1
    except Exception as error:  # a broken EXIF block: we cannot know which way is up
        raise BadImage(f"its EXIF block cannot be read ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_gray(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (GRAY, GRAY, GRAY, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """16-bit gray with the full range 0..65535 to 8 bits, as RGB: round(value / 257)."""
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise BadImage(f"its pixels are {values.dtype}, which has no fixed range; save it with 8 or 16 bits a channel")
    levels = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
