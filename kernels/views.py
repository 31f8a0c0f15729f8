"""Random views of a batch of images: crop, flip, jitter, gray and normalize, each row with its own parameters.

torchvision draws one set of parameters for a whole batch; called row by row, it takes a hundred small calls per image.
Here the geometry of all rows is two batched matrix products, and the colors are a few passes over planes. The Triton
kernel (views_kernel.py) does both in one pass, or in two if contrast needs a mean first. Legend: B images, V views,
R = V*B rows view-major, H W source size, S output side.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.checks import check_number, check_tensor
from kernels.resample import crop_centers, resample_matrix
from kernels.staging import upload
from kernels.view_parameters import CONTRAST, HUE, SATURATION, UNIFORMS, ViewParameters, draw_view_parameters
from kernels.views_kernel import device_tables, launch_views

__all__ = ["UNIFORMS", "ViewParameters", "draw_view_parameters", "views", "views_reference"]

GRAY_3 = (0.2989, 0.587, 0.114)
UNCHANGED = 4  # stands for the place of hue in a row's order if none of the row's jitters changes anything
# Floats per block of rows on a CPU: 4 MB; half and twice as much were slower within a step (benchmarks/LOG.md).
CACHE_FLOATS = 1_000_000


def views(
    images_BHWC: torch.Tensor,
    parameters: ViewParameters,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out_dtype: torch.dtype = torch.float32,
    *,
    size: int | tuple[int, int] | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """(V*B, 3, S, S) views, view-major and channels_last, of the uint8 images (B, H, W, 3).

    Per row, on values in [0, 1], as torchvision.transforms.v2.functional does for float images:
    resized_crop(antialias=True) to `size` (None: H x W), horizontal flip, the four jitters in the row's order

        brightness x <- clamp(f x)          contrast x <- clamp(f x + (1 - f) mean(gray(x)))
        saturation x <- clamp(f x + (1 - f) gray(x))    hue: H of HSV <- H + f mod 1

    with gray(x) = .2989 r + .587 g + .114 b, then x <- gray(x) on gray rows, then (x - mean) / std.

    images_BHWC: uint8, contiguous, on any device. parameters: on the CPU, entries [B, V]. out_dtype: fp32, fp16 or
    bf16; arithmetic is fp32. Raises ValueError for a wrong shape, dtype, layout or setting, or a crop that leaves its
    image.
    """
    _check(images_BHWC, parameters, mean, std, out_dtype)
    H, W = images_BHWC.shape[1:3]
    out_size = (H, W) if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if len(out_size) != 2 or not all(isinstance(side, int) and side >= 1 for side in out_size):
        raise ValueError(f"size is {size!r}; expected a whole number of pixels >= 1, or a pair of them")
    if backend.choose("views", implementation, images_BHWC.device).name == "triton":
        return views_triton(images_BHWC, parameters, mean, std, out_dtype, out_size)
    return views_reference(images_BHWC, parameters, mean, std, out_dtype, out_size)


def views_reference(
    images_BHWC: torch.Tensor,
    parameters: ViewParameters,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out_dtype: torch.dtype,
    size: tuple[int, int],
) -> torch.Tensor:
    """`views` in plain torch: a block of rows that fits the cache at a time on a CPU, all rows at once on a GPU.

    Within a block, rows are sorted by the place of hue among their jitters; rows without jitter come last. The blends
    before hue, hue itself and the blends after it then each concern one contiguous slice of rows. Values stay in [0,
    255] until they are normalized, which of all these operations only the clamps have to take into account.
    """
    B, H, W, _ = images_BHWC.shape
    V, device = parameters.top_BV.shape[1], images_BHWC.device
    geometry_R6, op_R4, factor_R4 = parameters.rows()
    place_R, turn_R, blend_R33 = _jitter_tables(op_R4, factor_R4)
    block = V * B if device.type != "cpu" else max(1, CACHE_FLOATS // (3 * max(H * W, size[0] * size[1])))
    row_R = np.lexsort((place_R, np.arange(V * B) // block))  # views in the order they are made
    place_R, geometry_R6, turn_R, blend_R33 = place_R[row_R], geometry_R6[row_R], turn_R[row_R], blend_R33[row_R]
    gray_R, turns_R = geometry_R6[:, 5] != 0, turn_R != 0
    normalize_23 = np.stack([1 / (255 * np.float32(std)), -np.float32(mean) / np.float32(std)])
    scale_311, shift_311 = upload(normalize_23[:, :, None, None], device).unbind()
    turn_R = upload(turn_R, device)
    blend_33R111 = upload(blend_R33.transpose(1, 2, 0)[..., None, None, None], device)
    sample = _sampler(upload(geometry_R6, device), (H, W), size)
    images_BX = images_BHWC.flatten(1)
    out_RHWC = torch.empty(V * B, *size, 3, dtype=out_dtype, device=device)
    for start in range(0, V * B, block):
        b = slice(start, min(start + block, V * B))
        source_bHWC = images_BX.index_select(0, upload(row_R[b] % B, device)).unflatten(1, (H, W, 3))
        x_b3HW = sample(source_bHWC.permute(0, 3, 1, 2).float(), b)
        ends = np.bincount(place_R[b], minlength=UNCHANGED + 1).cumsum().tolist()
        _jitter(x_b3HW, turn_R[b], blend_33R111[:, :, b], ends, turns_R[b].any())
        gray = upload(gray_R[b].nonzero()[0], device)
        if len(gray):
            x_b3HW.index_copy_(0, gray, _gray(x_b3HW.index_select(0, gray)).expand(-1, 3, -1, -1))
        x_b3HW = x_b3HW.mul_(scale_311).add_(shift_311).index_select(0, upload(row_R[b].argsort(), device))
        out_RHWC[b] = x_b3HW.permute(0, 2, 3, 1)
    return out_RHWC.permute(0, 3, 1, 2)


def _jitter_tables(op_R4: np.ndarray, factor_R4: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """place_R of hue in each row's order (UNCHANGED: no jitter changes anything), hue's turn_R, the others' blend_R33.

    blend: coefficients (f, a, b) of x <- clamp(f x + a mean(gray(x)) + b gray(x)), which covers every jitter but hue:
    (f, 0, 0) is brightness, (f, 1-f, 0) contrast, (f, 0, 1-f) saturation.
    """
    hue_R4 = op_R4 == HUE
    op_R3, f_R3 = op_R4[~hue_R4].reshape(-1, 3), factor_R4[~hue_R4].reshape(-1, 3)
    blend_R33 = np.stack([f_R3, (1 - f_R3) * (op_R3 == CONTRAST), (1 - f_R3) * (op_R3 == SATURATION)], axis=2)
    changed_R = (factor_R4 != ~hue_R4).any(1)  # a factor of 1 changes nothing, nor does a turn of 0
    return np.where(changed_R, hue_R4.argmax(1), UNCHANGED), factor_R4[hue_R4], blend_R33


def _jitter(x_b3HW, turn_b, blend_33b111, ends: list[int], turns: bool) -> None:
    """Jitter rows sorted by the place of hue, in place; in the first `ends[p]` rows hue is at place p or before."""
    jittered = ends[UNCHANGED - 1]
    for j in range(3):
        if ends[j] < jittered:
            _blend(x_b3HW[ends[j] : jittered], blend_33b111[j, :, ends[j] : jittered])
    if turns and jittered:
        _turn_hue(x_b3HW[:jittered], turn_b[:jittered])
    for j in range(3):
        if ends[j]:
            _blend(x_b3HW[: ends[j]], blend_33b111[j, :, : ends[j]])


def _sampler(geometry_R6, source_size, size) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """A function that crops, flips and resizes (antialiased) pixels (b, 3, *source_size) of a given slice of rows.

    In general it is two batched matrix products; if neither axis shrinks, the filter has two taps and sampling is
    cheaper.
    """
    H, W = source_size
    top_R, left_R, height_R, width_R, flip_R, _ = geometry_R6.unbind(1)
    if size[0] >= H and size[1] >= W:
        y_Rh = crop_centers(top_R, height_R, size[0]).mul_(2).add_(1).div_(H).sub_(1)
        x_Rw = crop_centers(left_R, width_R, size[1], flip_R != 0).mul_(2).add_(1).div_(W).sub_(1)
        # pairs (x, y) as complex numbers: a single vectorized sum makes the grid
        x_R1w, y_Rh1 = (
            torch.complex(x_Rw, torch.zeros_like(x_Rw))[:, None],
            torch.complex(torch.zeros_like(y_Rh), y_Rh)[..., None],
        )

        def sample(source_b3HW: torch.Tensor, b: slice) -> torch.Tensor:
            grid_bhw2 = torch.view_as_real(x_R1w[b] + y_Rh1[b])
            return F.grid_sample(source_b3HW, grid_bhw2, mode="bilinear", padding_mode="border", align_corners=False)

        return sample

    def resample(source_b3HW: torch.Tensor, b: slice) -> torch.Tensor:
        vertical_bhH = resample_matrix(top_R[b], height_R[b], H, size[0])
        horizontal_bwW = resample_matrix(left_R[b], width_R[b], W, size[1], flip_R[b] != 0)
        x_b3Hw = torch.bmm(source_b3HW.flatten(1, 2), horizontal_bwW.transpose(1, 2)).unflatten(1, (3, H))
        return torch.matmul(vertical_bhH[:, None], x_b3Hw)

    return resample


def _blend(x_b3HW, blend_3b111) -> None:
    factor_b111, mean_b111, gray_b111 = blend_3b111.unbind()
    gray_b1HW = _gray(x_b3HW)
    mean_b111 = gray_b1HW.mean(dim=(2, 3), keepdim=True) * mean_b111
    torch.addcmul(gray_b1HW.mul_(gray_b111).add_(mean_b111), x_b3HW, factor_b111, out=x_b3HW).clamp_(0, 255)


def _gray(x_b3HW) -> torch.Tensor:
    r, g, b = x_b3HW.split(1, dim=1)
    return (r * GRAY_3[0]).add_(g, alpha=GRAY_3[1]).add_(b, alpha=GRAY_3[2])


def _turn_hue(x_b3HW, turn_b) -> None:
    """RGB -> HSV, add `turn` (a fraction of the circle) to the hue, -> RGB, in place.

    With hue h in sixths of the circle, chroma c = max - min and clamps to [0, 1], red is min + c clamp(|h-3|-1), green
    min + c clamp(2-|h-2|) and blue min + c clamp(2-|h-4|).
    """
    r, g, b = x_b3HW.unbind(1)
    high, low = x_b3HW.amax(1), x_b3HW.amin(1)
    chroma, is_high = high - low, torch.empty_like(high)
    # On a CPU, a comparison with float output followed by a lerp is vectorized; `where` is not.
    hue = torch.sub(r, g).add_(chroma, alpha=4)
    hue.lerp_(torch.sub(b, r).add_(chroma, alpha=2), torch.eq(g, high, out=is_high))
    hue.lerp_(torch.sub(g, b), torch.eq(r, high, out=is_high))
    # A whole circle is added so that frac never sees a negative number; a gray pixel's hue is 0 / 1e-12.
    torch.addcdiv(1 + turn_b[:, None, None], hue, chroma.clamp_(min=1e-12), value=1 / 6, out=hue).frac_().mul_(6)
    torch.sub(hue[:, None], upload([3.0, 2.0, 4.0], hue.device)[:, None, None], out=x_b3HW).abs_()
    x_b3HW[:, :1].sub_(1)
    torch.sub(upload(2.0, hue.device), x_b3HW[:, 1:], out=x_b3HW[:, 1:])
    torch.addcmul(low[:, None], x_b3HW.clamp_(0, 1), chroma[:, None], out=x_b3HW)


def views_triton(
    images_BHWC: torch.Tensor,
    parameters: ViewParameters,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out_dtype: torch.dtype,
    size: tuple[int, int],
) -> torch.Tensor:
    """`views` by the kernel: one launch, or two if any view has contrast."""
    return launch_views(images_BHWC, device_tables(parameters, images_BHWC.device), mean, std, out_dtype, size)


def _check(images_BHWC, parameters, mean, std, out_dtype):
    check_tensor("images_BHWC", images_BHWC, shape=(None, None, None, 3), dtypes=(torch.uint8,))
    if not images_BHWC.is_contiguous():
        raise ValueError(
            f"images_BHWC {list(images_BHWC.shape)} has strides {images_BHWC.stride()}; expected contiguous"
        )
    if out_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"out_dtype is {out_dtype}; expected float32, float16 or bfloat16")
    B, H, W, _ = images_BHWC.shape
    cpu = torch.device("cpu")
    V = parameters.top_BV.shape[1] if parameters.top_BV.ndim == 2 else None
    for name in ("top_BV", "left_BV", "height_BV", "width_BV"):
        check_tensor(f"parameters.{name}", getattr(parameters, name), shape=(B, V), dtypes=(torch.int64,), device=cpu)
    for name in ("flip_BV", "gray_BV"):
        check_tensor(f"parameters.{name}", getattr(parameters, name), shape=(B, V), dtypes=(torch.bool,), device=cpu)
    check_tensor("parameters.factor_BV4", parameters.factor_BV4, shape=(B, V, 4), dtypes=(torch.float32,), device=cpu)
    check_tensor("parameters.order_BV4", parameters.order_BV4, shape=(B, V, 4), dtypes=(torch.int64,), device=cpu)
    order_BV4, factor_BV4 = parameters.order_BV4.numpy(), parameters.factor_BV4.numpy()
    if (np.exp2(order_BV4).sum(2) != 15).any():  # four powers of two sum to 15 only as 1 + 2 + 4 + 8
        raise ValueError("parameters.order_BV4 holds a row that is no order of 0, 1, 2, 3")
    if not np.isfinite(factor_BV4).all():
        raise ValueError("parameters.factor_BV4 holds a value that is not finite")
    top_BV, left_BV, height_BV, width_BV = (table.numpy() for table in parameters.geometry()[:4])
    for axis, extent, start_BV, length_BV in (
        ("top + height", H, top_BV, height_BV),
        ("left + width", W, left_BV, width_BV),
    ):
        if start_BV.min() < 0 or length_BV.min() < 1 or (start_BV + length_BV).max() > extent:
            raise ValueError(f"parameters has a crop whose {axis} leaves images_BHWC {list(images_BHWC.shape)}")
    for c in range(3):
        check_number(f"mean[{c}]", mean[c], 0, 1)
        check_number(f"std[{c}]", std[c], 0, open_low=True)
