"""Strong classic augmentation for the `ce_strong` arm: TrivialAugmentWide and RandomErasing, drawn for each row.

torchvision draws one operation for a whole batch. Here every row has its own; rows with the same operation are
processed together, each with its own magnitude. The host knows which rows these are, so nothing waits for the device.

Legend: R rows, N rows of one operation, K uniforms of a row, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as vision

from kernels.staging import upload

BINS = 31  # magnitudes of each operation
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
OPERATIONS = ("identity", *GEOMETRIC, *BLENDS, "posterize", "solarize", "autocontrast", "equalize")
LARGEST = {"shear_x": 0.99, "shear_y": 0.99, "translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0} | dict.fromkeys(
    BLENDS, 0.99
)
ERASE_P, ERASE_SCALE, ERASE_RATIO, ERASE_ATTEMPTS = 0.1, (0.02, 0.33), (0.3, 3.3), 10
UNIFORMS = 3 + 3 + 2 * ERASE_ATTEMPTS  # K: operation, bin, sign, erase or not, y, x, attempts


def strong_augment(x_R3HW: torch.Tensor, uniforms_RK: torch.Tensor) -> torch.Tensor:
    """TrivialAugmentWide on rows in [0, 1] (fp32, any device); `erase` is separate because it follows normalization.

    uniforms_RK: float64 in [0, 1) on the CPU, K = `UNIFORMS`.
    Source: Müller & Hutter 2021 (2103.10158), "wide" space, as in torchvision.transforms.v2.TrivialAugmentWide.
    """
    operation_R = (uniforms_RK[:, 0] * len(OPERATIONS)).long()
    bin_R = (uniforms_RK[:, 1] * BINS).long()
    sign_R = torch.where(uniforms_RK[:, 2] < 0.5, -1.0, 1.0)
    x_R3HW = x_R3HW.clone()
    for index, name in enumerate(OPERATIONS[1:], start=1):
        rows = (operation_R == index).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        share_N = bin_R[rows] / (BINS - 1)
        if name in LARGEST:
            magnitude_N = sign_R[rows] * share_N * LARGEST[name]
        elif name == "posterize":
            magnitude_N = (8 - 6 * share_N).round()
        else:
            magnitude_N = 1 - share_N
        rows = upload(rows, x_R3HW.device)
        x_R3HW.index_copy_(0, rows, apply(name, x_R3HW.index_select(0, rows), magnitude_N))
    return x_R3HW


def apply(name: str, x_N3HW: torch.Tensor, magnitude_N: torch.Tensor) -> torch.Tensor:
    """Apply one of `OPERATIONS` to rows in [0, 1], each with its own magnitude (CPU), as torchvision does on floats."""
    if name in GEOMETRIC:
        return _warp(x_N3HW, upload(_inverse_affine(name, magnitude_N, *x_N3HW.shape[2:]), x_N3HW.device))
    if name == "autocontrast":
        return vision.autocontrast(x_N3HW)
    if name == "equalize":
        return vision.equalize(x_N3HW)
    magnitude_N111 = upload(magnitude_N.float(), x_N3HW.device)[:, None, None, None]
    if name == "posterize":
        levels_N111 = torch.exp2(magnitude_N111)
        return (x_N3HW * levels_N111).floor().minimum(levels_N111 - 1) / levels_N111
    if name == "solarize":
        return torch.where(x_N3HW >= magnitude_N111, 1 - x_N3HW, x_N3HW)
    if name in BLENDS:
        faded_N3HW = _faded(name, x_N3HW)
        return (faded_N3HW + (1 + magnitude_N111) * (x_N3HW - faded_N3HW)).clamp(0, 1)
    return x_N3HW


def erase(x_R3HW: torch.Tensor, uniforms_RK: torch.Tensor) -> torch.Tensor:
    """Normalized rows, in which a random box is set to 0 (the mean color) with probability `ERASE_P`.

    The box has an area share uniform in `ERASE_SCALE` and a log aspect uniform in log `ERASE_RATIO`; the first of ten
    attempts that is smaller than the image is taken, at a uniform position, and none if no attempt fits.
    Source: Zhong et al. 2017 (1708.04896), as in torchvision.transforms.v2.RandomErasing.
    """
    H, W = x_R3HW.shape[2:]
    chosen_R, y_R, x_R = uniforms_RK[:, 3] < ERASE_P, uniforms_RK[:, 4], uniforms_RK[:, 5]
    area_RA, aspect_RA = uniforms_RK[:, 6:].chunk(2, dim=1)
    area_RA = H * W * (ERASE_SCALE[0] + area_RA * (ERASE_SCALE[1] - ERASE_SCALE[0]))
    low, high = math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])
    aspect_RA = torch.exp(low + aspect_RA * (high - low))
    height_RA, width_RA = (area_RA * aspect_RA).sqrt().round(), (area_RA / aspect_RA).sqrt().round()
    fits_RA = (height_RA < H) & (width_RA < W)
    first_R1 = fits_RA.int().argmax(1, keepdim=True)
    height_R, width_R = height_RA.gather(1, first_R1).squeeze(1), width_RA.gather(1, first_R1).squeeze(1)
    top_R, left_R = (y_R * (H - height_R + 1)).floor(), (x_R * (W - width_R + 1)).floor()
    height_R = torch.where(chosen_R & fits_RA.any(1), height_R, 0.0)
    box_R4 = upload(torch.stack([top_R, top_R + height_R, left_R, left_R + width_R], dim=1), x_R3HW.device)
    top_R1, bottom_R1, left_R1, right_R1 = box_R4.split(1, dim=1)
    row_H, column_W = (torch.arange(side, device=x_R3HW.device) for side in (H, W))
    tall_RH = (row_H >= top_R1) & (row_H < bottom_R1)
    wide_RW = (column_W >= left_R1) & (column_W < right_R1)
    return x_R3HW.masked_fill((tall_RH[:, :, None] & wide_RW[:, None, :])[:, None], 0.0)


def _faded(name: str, x_N3HW: torch.Tensor) -> torch.Tensor:
    """The image that a blend moves away from or towards: black, gray, the mean gray, or the smoothed image."""
    if name == "brightness":
        return torch.zeros_like(x_N3HW)
    if name == "sharpness":
        smooth_N3HW = (9 * F.avg_pool2d(x_N3HW, 3, stride=1) + 4 * x_N3HW[:, :, 1:-1, 1:-1]) / 13
        faded_N3HW = x_N3HW.clone()
        faded_N3HW[:, :, 1:-1, 1:-1] = smooth_N3HW
        return faded_N3HW
    gray_N1HW = vision.rgb_to_grayscale(x_N3HW)
    return gray_N1HW if name == "color" else gray_N1HW.mean(dim=(1, 2, 3), keepdim=True)


def _inverse_affine(name: str, magnitude_N: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Matrices [N, 2, 3] (fp32) that map an output pixel to its input pixel, in pixels from the image's center."""
    matrix_N23 = torch.zeros(len(magnitude_N), 2, 3)
    matrix_N23[:, 0, 0] = matrix_N23[:, 1, 1] = 1
    magnitude_N = magnitude_N.float()
    if name == "shear_x":  # about the upper left corner: x + m (y + H/2)
        matrix_N23[:, 0, 1], matrix_N23[:, 0, 2] = magnitude_N, magnitude_N * H / 2
    elif name == "shear_y":
        matrix_N23[:, 1, 0], matrix_N23[:, 1, 2] = magnitude_N, magnitude_N * W / 2
    elif name == "translate_x":
        matrix_N23[:, 0, 2] = -magnitude_N.trunc()
    elif name == "translate_y":
        matrix_N23[:, 1, 2] = -magnitude_N.trunc()
    else:
        cosine_N, sine_N = magnitude_N.deg2rad().cos(), magnitude_N.deg2rad().sin()
        matrix_N23[:, 0, 0], matrix_N23[:, 0, 1] = cosine_N, -sine_N
        matrix_N23[:, 1, 0], matrix_N23[:, 1, 1] = sine_N, cosine_N
    return matrix_N23


def _warp(x_N3HW: torch.Tensor, matrix_N23: torch.Tensor) -> torch.Tensor:
    """Rows warped by `matrix_N23`: the nearest input pixel, black outside the image."""
    H, W = x_N3HW.shape[2:]
    half_2 = torch.stack([matrix_N23.new_full((), W / 2), matrix_N23.new_full((), H / 2)])
    y_H = torch.arange(H, device=x_N3HW.device) + 0.5 - H / 2
    x_W = torch.arange(W, device=x_N3HW.device) + 0.5 - W / 2
    point_HW3 = torch.stack([x_W.expand(H, W), y_H[:, None].expand(H, W), torch.ones_like(x_W).expand(H, W)], dim=-1)
    grid_NHW2 = torch.einsum("hwk,njk->nhwj", point_HW3, matrix_N23) / half_2
    return F.grid_sample(x_N3HW, grid_NHW2, mode="nearest", padding_mode="zeros", align_corners=False)
