"""Object masks: cropping and background by mask, dilation, and masks on the latent grid.

Shapes: N images, H W pixels, h w latent grid. Masks are 0/1; 1 is the object.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from modules.data.decode import GRAY


class Square(NamedTuple):
    """A square region of an image, in pixels; it may extend beyond the border."""

    left: int
    top: int
    side: int


def object_square(mask_HW: np.ndarray, margin: float) -> Square:
    """The square around the object with a margin of `margin` x its longer side, shifted into the image if it fits.

    Raises:
        ValueError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        raise ValueError("an empty mask has no object to crop to")
    height, width = mask_HW.shape
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = round(max(bottom - top, right - left) * (1 + 2 * margin))
    return Square(_place(left, right, side, width), _place(top, bottom, side, height), side)


def center_square(width: int, height: int) -> Square:
    """The largest centered square of an image."""
    side = min(width, height)
    return Square((width - side) // 2, (height - side) // 2, side)


def gray_background(pixels_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The pixels with everything outside the object replaced by mid gray; uint8 [H, W, 3]."""
    return np.where(mask_HW[:, :, None], pixels_HWC, np.uint8(GRAY))


def shrink(mask_HW: np.ndarray, size: int, resized_HW: np.ndarray) -> np.ndarray:
    """The 0/1 mask at `size` of a square mask, given its antialiased resize (uint8; 255: fully covered).

    A pixel is object if at least half of it is covered. If the object is so thin that there is no such pixel, every
    pixel that it touches is object, so an object never vanishes.
    """
    small = resized_HW >= 128
    if not small.any():
        rows, columns = np.nonzero(mask_HW)
        small[rows * size // len(mask_HW), columns * size // len(mask_HW)] = True
    return small.astype(np.uint8)


def dilate(masks_NHW: torch.Tensor, radius_px: int) -> torch.Tensor:
    """Masks dilated by a maximum filter with a window of 2 r + 1 pixels a side; same shape and dtype.

    Source: DA-Fusion (2302.07944), which uses a window of 16 at 512 px.
    """
    if radius_px == 0:
        return masks_NHW
    window = 2 * radius_px + 1
    grown = F.max_pool2d(masks_NHW[:, None].float(), window, stride=1, padding=radius_px)
    return grown[:, 0].to(masks_NHW.dtype)


def latent_edit_mask(masks_NHW: torch.Tensor, edit: str, dilation_px: int, latent_size: int) -> torch.Tensor:
    """m [N, h, w] float32: 1 where a cell of the latent grid may change, 0 where it keeps its source.

    Let M be the object mask dilated by `dilation_px`. For `object` a cell is editable if it touches a pixel of M; for
    `background` it is editable if all its pixels are outside M. So the two are complements, and cells on the border
    always belong to the object, which is never cut.

    Raises:
        ValueError: `edit` is unknown, or the latent grid does not divide the mask.
    """
    if edit not in ("object", "background"):
        raise ValueError(f"edit is {edit!r}; it is object or background")
    height, width = masks_NHW.shape[1:]
    if height % latent_size or width % latent_size:
        raise ValueError(f"masks of {height} x {width} pixels do not divide into a latent grid of {latent_size}")
    cell = (height // latent_size, width // latent_size)
    touched = F.max_pool2d(dilate(masks_NHW, dilation_px)[:, None].float(), cell)[:, 0]
    return touched if edit == "object" else 1 - touched


def _place(start: int, end: int, side: int, length: int) -> int:
    """Start of a span of `side` around [start, end): centered, but inside [0, length), or over both ends if longer."""
    first = (start + end - side) // 2
    if side > length:
        return (length - side) // 2
    return min(max(first, 0), length - side)
