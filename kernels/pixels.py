"""Decoded images to the uint8 pixels that the encoder learns from: clamp, antialiased downscale, round, in one pass.

A VAE decodes 512 px and the reservoir keeps 64 or 224: eager code clamps, resizes, rounds and permutes the large image
in device memory four times. Legend: N images, H W decoded, h w kept.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_number, check_tensor, describe


def pixels(decoded_N3HW: torch.Tensor, size: int, *, implementation: str = "auto") -> torch.Tensor:
    """(N, size, size, 3) uint8 of images in [-1, 1], resized by the antialiased triangle filter.

        out = floor(127.5 resize(clamp(x, -1, 1)) + 128), at most 255

    that is 255 (x+1)/2 rounded half up. Not a number counts as -1. decoded_N3HW: fp16, bf16 or fp32, contiguous or
    channels_last; arithmetic is fp32. Raises ValueError for a wrong shape or dtype, an empty image or a size that is no
    whole number >= 1.
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
    """The pixels of `pixels` in plain torch."""
    x = decoded_N3HW.float().nan_to_num(nan=-1.0).clamp(-1, 1)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.permute(0, 2, 3, 1).mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8).contiguous()


def pixels_triton(decoded_N3HW: torch.Tensor, size: int) -> torch.Tensor:
    """The pixels of `pixels` by the kernel: the decoded image is read where it lies, nothing else is stored.

    An image in channels_last is one plane of rows of 3W values, any other three planes of rows of W values.
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
    """BLOCK_R output rows and BLOCK_Q values of each are a program's, BLOCK_J source values of a row at a time.

    UNROLL: source rows of an output row that are asked for before the first is waited for.
    """
    if backend.interpreted():
        return {"BLOCK_R": 16, "BLOCK_Q": 16, "BLOCK_J": 32, "UNROLL": 2}
    few = 4 * size < H  # output pixels for the pixels read: smaller programs fill a GPU
    return {
        "BLOCK_R": 16 if few or channels == 1 else 32,
        "BLOCK_Q": 32,
        "BLOCK_J": 32,
        "UNROLL": min(_taps(H, size), 8),
        "num_warps": 2,
        "num_stages": 1,  # more would fetch source rows past the cache that the next tap finds them in
    }


def _taps(n: int, m: int) -> int:
    """How many of n source pixels an output pixel of m has a weight for, at most: 2 max(n/m, 1), rounded up."""
    return -(-2 * max(n, m) // m)


@jit
def _first(i, n, m):
    """The first of n source pixels that output pixel i of m has a weight for: the least j >= 0 of distance < 1."""
    before = (2 * i + 1) * n - m - 2 * tl.maximum(n, m)
    return tl.where(before < 0, 0, before // (2 * m) + 1)


@jit
def _weight(numerator, half_inverse):
    """The triangle filter, not divided by its sum yet: max(0, 1 - |numerator| half_inverse)."""
    return tl.maximum(1.0 - tl.abs(numerator.to(tl.float32)) * half_inverse, 0.0)


@jit
def _total(i, n, m, half_inverse, TAPS: tl.constexpr):
    """The sum of the weights of output pixel i of m over its n source pixels."""
    first = _first(i, n, m)
    total = first.to(tl.float32) * 0.0
    for tap in range(TAPS):
        weight = _weight((2 * (first + tap) + 1) * m - (2 * i + 1) * n, half_inverse)
        total += tl.where(first + tap < n, weight, 0.0)
    return total


@jit
def _clamped(x, NAN_STAYS: tl.constexpr):
    """x in [-1, 1], not a number as -1. NAN_STAYS: the maximum of NaN and -1 is NaN, as no GPU has it."""
    if NAN_STAYS:
        x = tl.where(x == x, x, -1.0)
    return tl.minimum(tl.maximum(x, -1.0), 1.0).to(x.dtype)


@jit
def _halves(x):
    """x of at most 1 as a sum of two fp16 numbers, right to 3e-8: exact enough for levels, fast in a product."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit
def _pixels_kernel(
    x_ptr, out_ptr, H, W, size, inverse_y, inverse_x, stride_n, stride_c, stride_h, stride_j,
    CHANNELS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, NAN_STAYS: tl.constexpr,
):  # fmt: skip
    """BLOCK_R output rows x BLOCK_Q output values of a plane: a sum over each row's source rows, then a product across.

        out_rq = sum_j (sum_y v_ry x_yj / sum_y v_ry) h_qj / sum_j h_qj

    A plane's rows have W source pixels of CHANNELS values each: value j is channel j mod CHANNELS of its pixel, and h is
    zero between different channels. With n source and m output pixels the weight of source pixel j in output pixel i is

        1 - |(2j+1) m - (2i+1) n| / (2 max(n, m)), where positive

    of which the numerator is a whole number, so that weights cost no table and lose nothing far from the origin. The
    products take sum and weights as two fp16 halves each. For images of up to 2^14 pixels a side.
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
    origin = (2 * left + 1) * size  # numerators from here are small whole numbers, which fp32 and its differences hold
    apart: tl.constexpr = 4194304.0  # 2^22, so far are different channels from each other: no filter reaches there
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
