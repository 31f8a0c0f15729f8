"""Antialiased resampling as a matrix: one axis of a crop, resized with the triangle filter.

A resize is linear and separable, so crop, flip and resize of one image amount to two small matrices, one per axis. For
a whole batch in which each row has its own crop, they are two batched matrix products. Legend: R rows, n source pixels
and m output pixels along an axis.
"""

import torch


def crop_centers(
    start_R: torch.Tensor, length_R: torch.Tensor, m: int, flip_R: torch.Tensor | None = None
) -> torch.Tensor:
    """Source coordinates_Rm (fp32) at which each of the m output pixels of the crop [start, start + length) samples.

    Pixel i samples at start + (i + 1/2) length/m - 1/2, where whole numbers are pixel centers; flip_R (bool) mirrors i.
    Coordinates are clamped to the crop, so that bilinear interpolation gives the border pixel all the weight that would
    fall outside.
    """
    start_R1, length_R1 = start_R.float()[:, None], length_R.float()[:, None]
    center_Rm = _centers(start_R1, length_R1, m, flip_R)
    return torch.minimum(center_Rm.maximum(start_R1), start_R1 + length_R1 - 1)


def resample_matrix(
    start_R: torch.Tensor, length_R: torch.Tensor, n: int, m: int, flip_R: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights_Rmn (fp32) that turn n source pixels into the m output pixels of each row's crop [start, start + length).

    With c the center of pixel i (as in `crop_centers`, before clamping) and f = max(length/m, 1) the filter's half
    width:

        weight_ij = max(0, 1 - |j - c| / f) for start <= j < start + length, each i summing to 1

    which is bilinear interpolation when enlarging and the antialiased triangle filter when shrinking, as Pillow and
    torchvision define them; pixels outside the crop have no weight. flip_R (bool) mirrors the output axis.
    """
    start_R1, length_R1 = start_R.float()[:, None], length_R.float()[:, None]
    j_n = torch.arange(n, device=start_R.device, dtype=torch.float32)
    distance_Rmn = (j_n - _centers(start_R1, length_R1, m, flip_R)[:, :, None]).abs_()
    weight_Rmn = distance_Rmn.div_(-(length_R1 / m).clamp(min=1)[:, :, None]).add_(1).clamp_(min=0)
    weight_Rmn *= ((j_n >= start_R1) & (j_n < start_R1 + length_R1))[:, None]
    return weight_Rmn.div_(weight_Rmn.sum(2, keepdim=True))


def _centers(start_R1: torch.Tensor, length_R1: torch.Tensor, m: int, flip_R: torch.Tensor | None) -> torch.Tensor:
    i_m = torch.arange(m, device=start_R1.device, dtype=torch.float32)
    if flip_R is not None:
        i_m = torch.where(flip_R[:, None], m - 1 - i_m, i_m)
    return (i_m + 0.5) * (length_R1 / m) + (start_R1 - 0.5)
