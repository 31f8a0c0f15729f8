"""The parameters of random views: crop, flip, color jitter and grayscale, as pure functions of uniform random numbers.

They are kept apart from the kernel that applies them: the owner of the random streams (modules/data/views.py) decides
which numbers a row gets, and the kernel never draws any. Legend: B images, V views, K uniform numbers per view.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kernels.checks import check_number, check_tensor

CROP_ATTEMPTS = 10
UNIFORMS = 2 * CROP_ATTEMPTS + 13  # K: area and aspect per attempt, position 2, flip, jitter, factors 4, order 4, gray
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the entries of `order_BV4`
NOTHING_4 = np.array([1.0, 1.0, 1.0, 0.0])  # the factors that change nothing


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of V views of B images; on the CPU, so that the host can group rows without waiting for the device."""

    top_BV: torch.Tensor  # int64, source pixels
    left_BV: torch.Tensor
    height_BV: torch.Tensor  # of the crop, >= 1
    width_BV: torch.Tensor
    flip_BV: torch.Tensor  # bool, horizontal
    factor_BV4: torch.Tensor  # fp32: brightness, contrast, saturation factors >= 0 (1 does nothing); hue in [-.5, .5]
    order_BV4: torch.Tensor  # int64, which of the four jitters is applied first, second, ...
    gray_BV: torch.Tensor  # bool, grayscale after the jitter

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """View-major host tables geometry_R6, op_R4, factor_R4 (row v*B + b is view v of image b).

        geometry_R6 (fp32): top, left, height, width, flip, gray. op_R4 (int64): the jitters in the order they are
        applied. factor_R4 (fp32): the factor of each jitter in that order.
        """
        geometry_BV6 = np.stack(
            [table.numpy() for table in self.geometry()], axis=2, dtype=np.float32, casting="unsafe"
        )
        order_BV4 = self.order_BV4.numpy()
        factor_BV4 = np.take_along_axis(self.factor_BV4.numpy(), order_BV4, axis=2)
        return tuple(t.swapaxes(0, 1).reshape(-1, t.shape[2]) for t in (geometry_BV6, order_BV4, factor_BV4))

    def geometry(self) -> tuple[torch.Tensor, ...]:
        """The parameters other than the jitter's: top, left, height, width, flip, gray, each [B, V]."""
        return self.top_BV, self.left_BV, self.height_BV, self.width_BV, self.flip_BV, self.gray_BV


def draw_view_parameters(
    uniforms_BVK: torch.Tensor,
    height: int,
    width: int,
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    grayscale_p: float = 0.2,
    flip_p: float = 0.5,
) -> ViewParameters:
    """The parameters of each view from K = UNIFORMS uniform numbers per view, distributed as torchvision draws them.

    Crop: area share uniform in `crop_scale`, log aspect uniform in log `ratio`; the first of ten attempts that fits is
    used, at a uniform position. If none fits, the largest central crop of an allowed aspect. Jitter: with probability
    `jitter_p`, four parts in uniformly random order, factors uniform in [max(0, 1-j), 1+j], hue in [-j, j].

    uniforms_BVK: fp64 in [0, 1) on the CPU. Raises ValueError for a wrong shape or dtype, or a setting out of range.
    Source: torchvision.transforms.v2 RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale.
    """
    cpu = torch.device("cpu")
    check_tensor("uniforms_BVK", uniforms_BVK, shape=(None, None, UNIFORMS), dtypes=(torch.float64,), device=cpu)
    for name, probability in (("jitter_p", jitter_p), ("grayscale_p", grayscale_p), ("flip_p", flip_p)):
        check_number(name, probability, 0, 1)
    check_number("crop_scale[0]", crop_scale[0], 0, crop_scale[1], open_low=True)
    check_number("ratio[0]", ratio[0], 0, ratio[1], open_low=True)
    for name, strength in zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True):
        check_number(f"jitter {name}", strength, 0, 0.5 if name == "hue" else math.inf)

    # numpy: for a hundred operations on a few hundred numbers each, its overhead per call is a fraction of torch's
    crop_BVK, rest_BVK = np.split(uniforms_BVK.numpy(), [2 * CROP_ATTEMPTS], axis=2)
    height_BV, width_BV, fits_BV = _crop_size(crop_BVK, height, width, crop_scale, ratio)
    y_BV, x_BV, flip_BV, jitter_BV = np.moveaxis(rest_BVK[..., :4], 2, 0)
    factor_BV4, order_BV4, gray_BV = rest_BVK[..., 4:8], rest_BVK[..., 8:12], rest_BVK[..., 12]
    strength_4 = np.array(jitter)
    low_4, high_4 = NOTHING_4 - strength_4, NOTHING_4 + strength_4
    low_4[:HUE] = low_4[:HUE].clip(min=0)
    factor_BV4 = low_4 + factor_BV4 * (high_4 - low_4)
    tables = {
        "top_BV": np.where(fits_BV, (y_BV * (height - height_BV + 1)).astype(np.int64), (height - height_BV) // 2),
        "left_BV": np.where(fits_BV, (x_BV * (width - width_BV + 1)).astype(np.int64), (width - width_BV) // 2),
        "height_BV": height_BV,
        "width_BV": width_BV,
        "flip_BV": flip_BV < flip_p,
        "factor_BV4": np.where((jitter_BV < jitter_p)[..., None], factor_BV4, NOTHING_4).astype(np.float32),
        "order_BV4": order_BV4.argsort(axis=2, kind="stable"),
        "gray_BV": gray_BV < grayscale_p,
    }
    return ViewParameters(**{name: torch.from_numpy(table) for name, table in tables.items()})


def _crop_size(crop_BVK, height: int, width: int, crop_scale, ratio) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height and width (int64) of the first attempt that fits, else of the largest allowed crop; whether one fits."""
    area_BVA, aspect_BVA = np.split(crop_BVK, 2, axis=2)
    area_BVA = height * width * (crop_scale[0] + area_BVA * (crop_scale[1] - crop_scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect_BVA = np.exp(low + aspect_BVA * (high - low))
    width_BVA = np.rint(np.sqrt(area_BVA * aspect_BVA)).astype(np.int64)
    height_BVA = np.rint(np.sqrt(area_BVA / aspect_BVA)).astype(np.int64)
    fits_BVA = (width_BVA > 0) & (width_BVA <= width) & (height_BVA > 0) & (height_BVA <= height)
    first_BV1 = fits_BVA.argmax(2)[..., None]

    widest, tallest = width, height
    if width / height < ratio[0]:
        tallest = round(width / ratio[0])
    elif width / height > ratio[1]:
        widest = round(height * ratio[1])
    fits_BV = fits_BVA.any(2)
    height_BV = np.where(fits_BV, np.take_along_axis(height_BVA, first_BV1, 2)[..., 0], tallest)
    width_BV = np.where(fits_BV, np.take_along_axis(width_BVA, first_BV1, 2)[..., 0], widest)
    return height_BV, width_BV, fits_BV
