"""Object masks: the crop and background they define, how they grow, and what they mean on the latent grid.

Shapes: N images, H W pixels, h w latent grid. Masks are 0/1; 1 is the object.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from modules.data.decode import GRAY


class Square(NamedTuple):
    """A square region of an image, in pixels; it may stand over the border."""

    left: int
    top: int
    side: int


def object_square(mask_HW: np.ndarray, margin: float) -> Square:
    """The square round the object with a margin of `margin` x its longer side, moved into the image where it fits.

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
    """The 0/1 mask at `size` of a square mask, given its antialiased resize (uint8, 255 is full cover).

    A pixel is object where at least half of it is covered; of an object so thin that this leaves none, every pixel it
    touches. So an object never vanishes.
    """
    small = resized_HW >= 128
    if not small.any():
        rows, columns = np.nonzero(mask_HW)
        small[rows * size // len(mask_HW), columns * size // len(mask_HW)] = True
    return small.astype(np.uint8)


def dilate(masks_NHW: torch.Tensor, radius_px: int) -> torch.Tensor:
    """Masks grown by a maximum filter with a window of 2 r + 1 pixels a side; same shape and dtype.

    Source: DA-Fusion (2302.07944), which takes a window of 16 at 512 px.
    """
    if radius_px == 0:
        return masks_NHW
    window = 2 * radius_px + 1
    grown = F.max_pool2d(masks_NHW[:, None].float(), window, stride=1, padding=radius_px)
    return grown[:, 0].to(masks_NHW.dtype)


def latent_edit_mask(masks_NHW: torch.Tensor, edit: str, dilation_px: int, latent_size: int) -> torch.Tensor:
    """m [N, h, w] float32: 1 where a cell of the latent grid may change, 0 where it keeps its source.

    With M the object mask dilated by `dilation_px`: for `object` the editable pixels are M and a cell is editable where
    it touches one of them; for `background` they are 1 - M and a cell is editable where all of its pixels are. So the
    two complement each other, and the object is never cut: what borders on it goes with it.

    Raises:
        ValueError: an unknown `edit`, or a latent grid that does not divide the mask.
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
    """Where a span of `side` round [start, end) begins: centered, inside [0, length) where it fits, else over both."""
    first = (start + end - side) // 2
    if side > length:
        return (length - side) // 2
    return min(max(first, 0), length - side)
