"""Decoded images to the uint8 pixels that the encoder learns from: clamp, antialiased resize and round in one pass.

A VAE decodes at 512 px while the reservoir keeps 64 or 224 px. Eager code makes four passes through device memory:
clamp, resize, round and permute. Legend: N images, H W decoded size, h w kept size.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_number, check_tensor, describe


def pixels(decoded_N3HW: torch.Tensor, size: int, *, implementation: str = "auto") -> torch.Tensor:
    """(N, size, size, 3) uint8 of images in [-1, 1], resized by the antialiased triangle filter.

        out = floor(127.5 resize(clamp(x, -1, 1)) + 128), at most 255

    which is 255 (x+1)/2 rounded half up. NaN is treated as -1. decoded_N3HW: fp16, bf16 or fp32, contiguous or
    channels_last; arithmetic is fp32. Raises ValueError for a wrong shape or dtype, an empty image, or a size that is
    not an int >= 1.
    """
    check_tensor(
        "decoded_N3HW", decoded_N3HW, shape=(None, 3, None, None), dtypes=(torch.float32, torch.float16, torch.bfloat16)
    )
    if 0 in decoded_N3HW.shape[2:]:
        raise ValueError(f"decoded_N3HW is {describe(decoded_N3HW)}; expected images of at least one pixel")
    if not isinstance(size, int):
        raise ValueError(f"size is {describe(size)}; expected an int >= 1")
    check_number("size", size, 1)
    if backend.choose("pixels", implementation, decoded_N3HW.device).name == "triton":
        return pixels_triton(decoded_N3HW, size)
    return pixels_reference(decoded_N3HW, size)


def pixels_reference(decoded_N3HW: torch.Tensor, size: int) -> torch.Tensor:
    """`pixels` in plain torch."""
    x = decoded_N3HW.float().nan_to_num(nan=-1.0).clamp(-1, 1)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.permute(0, 2, 3, 1).mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8).contiguous()


def pixels_triton(decoded_N3HW: torch.Tensor, size: int) -> torch.Tensor:
    """`pixels` by the kernel, which reads the decoded image in place and stores nothing but the result.

    A channels_last image is treated as one plane with rows of 3W values, any other as three planes with rows of W
    values.
    """
    N, _, H, W = decoded_N3HW.shape
    out_Nhw3 = torch.empty(N, size, size, 3, dtype=torch.uint8, device=decoded_N3HW.device)
    stride_n, stride_c, stride_h, stride_w = decoded_N3HW.stride()
    channels = 3 if (stride_c, stride_w) == (1, 3) else 1
    blocks = _blocks(H, size, channels)
    launch(
        _pixels_kernel,
        (-(-size * channels // blocks["BLOCK_Q"]), -(-size // blocks["BLOCK_R"]), N * 3 // channels),
        decoded_N3HW,
        out_Nhw3,
        H,
        W,
        size,
        0.5 / max(H, size),
        0.5 / max(W, size),
        stride_n,
        stride_c,
        stride_h,
        1 if channels == 3 else stride_w,
        CHANNELS=channels,
        TAPS_Y=_taps(H, size),
        TAPS_X=_taps(W, size),
        NAN_STAYS=backend.interpreted(),
        **blocks,
    )
    return out_Nhw3


def _blocks(H: int, size: int, channels: int) -> dict[str, int]:
    """Launch settings: a program makes BLOCK_R output rows x BLOCK_Q values, BLOCK_J source values of a row at a time.

    UNROLL: how many source rows of an output row are loaded before the first is used.
    """
    if backend.interpreted():
        return {"BLOCK_R": 16, "BLOCK_Q": 16, "BLOCK_J": 32, "UNROLL": 2}
    few = 4 * size < H  # few output pixels for the pixels read: it takes smaller programs to fill a GPU
    return {
        "BLOCK_R": 16 if few or channels == 1 else 32,
        "BLOCK_Q": 32,
        "BLOCK_J": 32,
        "UNROLL": min(_taps(H, size), 8),
        "num_warps": 2,
        "num_stages": 1,  # more stages would fetch source rows around the cache in which the next tap finds them
    }


def _taps(n: int, m: int) -> int:
    """The most source pixels with a weight that an output pixel has, when n pixels become m: ceil(2 max(n/m, 1))."""
    return -(-2 * max(n, m) // m)


@jit
def _first(i, n, m):
    """The first source pixel with a weight in output pixel i, n pixels becoming m: the least j >= 0 of distance < 1."""
    before = (2 * i + 1) * n - m - 2 * tl.maximum(n, m)
    return tl.where(before < 0, 0, before // (2 * m) + 1)


@jit
def _weight(numerator, half_inverse):
    """The triangle filter before it is divided by its sum: max(0, 1 - |numerator| half_inverse)."""
    return tl.maximum(1.0 - tl.abs(numerator.to(tl.float32)) * half_inverse, 0.0)


@jit
def _total(i, n, m, half_inverse, TAPS: tl.constexpr):
    """The sum of the weights of output pixel i over its source pixels, n pixels becoming m."""
    first = _first(i, n, m)
    total = first.to(tl.float32) * 0.0
    for tap in range(TAPS):
        weight = _weight((2 * (first + tap) + 1) * m - (2 * i + 1) * n, half_inverse)
        total += tl.where(first + tap < n, weight, 0.0)
    return total


@jit
def _clamped(x, NAN_STAYS: tl.constexpr):
    """x clamped to [-1, 1], NaN to -1. NAN_STAYS: max(NaN, -1) is NaN, as in the interpreter but on no GPU."""
    if NAN_STAYS:
        x = tl.where(x == x, x, -1.0)
    return tl.minimum(tl.maximum(x, -1.0), 1.0).to(x.dtype)


@jit
def _halves(x):
    """x (at most 1) as the sum of two fp16 numbers, exact to 3e-8: enough for uint8 levels, and fast in a product."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit
def _pixels_kernel(
    x_ptr, out_ptr, H, W, size, inverse_y, inverse_x, stride_n, stride_c, stride_h, stride_j,
    CHANNELS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, NAN_STAYS: tl.constexpr,
):  # fmt: skip
    """BLOCK_R output rows x BLOCK_Q output values of a plane: a vertical sum of source rows, then a horizontal product.

        out_rq = sum_j (sum_y v_ry x_yj / sum_y v_ry) h_qj / sum_j h_qj

    A row of a plane has W source pixels of CHANNELS values each: value j is channel j mod CHANNELS of its pixel, and h
    is zero between different channels. With n source and m output pixels, the weight of source pixel j in output pixel
    i is

        1 - |(2j+1) m - (2i+1) n| / (2 max(n, m)), where positive

    The numerator is an integer, so the weights need no table and lose no precision far from the origin. The matrix
    products split the vertical sums and the weights into two fp16 halves each. For images of up to 2^14 pixels a side.
    """
    planes: tl.constexpr = 3 // CHANNELS
    n, c = tl.program_id(2) // planes, tl.program_id(2) % planes
    x_ptr += n.to(tl.int64) * stride_n + c * stride_c
    row_R = tl.minimum(tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), size - 1)
    first_R = _first(row_R, H, size)
    q = tl.program_id(0) * BLOCK_Q
    value_Q = q + tl.arange(0, BLOCK_Q)
    column_Q = tl.minimum(value_Q // CHANNELS, size - 1)
    left = _first(q // CHANNELS, W, size)
    right = _first(tl.minimum((q + BLOCK_Q - 1) // CHANNELS, size - 1), W, size) + TAPS_X
    origin = (2 * left + 1) * size  # relative to it numerators are small integers, exact in fp32 with their differences
    apart: tl.constexpr = 4194304.0  # 2^22: channels are placed this far apart, beyond the reach of any filter
    center_Q = ((2 * column_Q + 1) * W - origin).to(tl.float32) + (value_Q % CHANNELS) * apart

    total_Q = _total(column_Q, W, size, inverse_x, TAPS_X)
    total_R = _total(row_R, H, size, inverse_y, TAPS_Y)
    out_RQ = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    start = left * CHANNELS // 16 * 16  # aligned, for wide loads
    stop = tl.minimum(right, W) * CHANNELS
    for chunk in range(start, stop, BLOCK_J):
        j_J = tl.multiple_of(chunk, 16) + tl.arange(0, BLOCK_J)
        inside_J = j_J < W * CHANNELS
        sum_RJ = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
        for taps in range(0, TAPS_Y, UNROLL):
            for tap in tl.static_range(UNROLL):
                y_R = first_R + taps + tap
                weight_R = _weight((2 * y_R + 1) * size - (2 * row_R + 1) * H, inverse_y)
                weight_R = tl.where(y_R < H, weight_R, 0.0)
                x_RJ = tl.load(
                    x_ptr + tl.minimum(y_R, H - 1)[:, None] * stride_h + j_J[None, :] * stride_j,
                    mask=inside_J[None, :],
                    other=0.0,
                )
                sum_RJ += weight_R[:, None] * _clamped(x_RJ.to(tl.float32), NAN_STAYS)
        place_J = ((2 * (j_J // CHANNELS) + 1) * size - origin).to(tl.float32) + (j_J % CHANNELS) * apart
        place_J = tl.where(inside_J, place_J, -apart)
        across_JQ = _weight(place_J[:, None] - center_Q[None, :], inverse_x)
        high_RJ, low_RJ = _halves(sum_RJ * (1.0 / total_R)[:, None])
        high_JQ, low_JQ = _halves(across_JQ)
        out_RQ = tl.dot(low_RJ, high_JQ, out_RQ)
        out_RQ = tl.dot(high_RJ, low_JQ, out_RQ)
        out_RQ = tl.dot(high_RJ, high_JQ, out_RQ)
    level_RQ = out_RQ * (127.5 / total_Q)[None, :] + 128.0
    level_RQ = tl.minimum(tl.maximum(level_RQ, 0.0), 255.0).to(tl.uint8)
    row_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    out_ptr += n.to(tl.int64) * (size * size * 3) + c
    at_RQ = row_R[:, None] * (size * 3) + value_Q[None, :] * planes
    tl.store(out_ptr + at_RQ, level_RQ, mask=(row_R < size)[:, None] & (value_Q < size * CHANNELS)[None, :])
