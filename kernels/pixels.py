"""Decoded images to the uint8 pixels that the encoder learns from: clamp, antialiased downscale, round, in one pass.

A VAE decodes 512 px and the reservoir keeps 64 or 224: eager code clamps, resizes, rounds and permutes the large image
in device memory four times. Legend: N images, H W decoded, h w kept.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_number, check_tensor, describe
from kernels.resample import full_matrix


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
    """The pixels of `pixels` by the kernel: each decoded pixel is read where it is needed, nothing else is stored."""
    N, _, H, W = decoded_N3HW.shape
    out_Nhw3 = torch.empty(N, size, size, 3, dtype=torch.uint8, device=decoded_N3HW.device)
    block = 16
    grid = (-(-size // block), -(-size // block), N * 3)
    launch(
        _pixels_kernel,
        grid,
        decoded_N3HW,
        full_matrix(H, size, decoded_N3HW.device),
        full_matrix(W, size, decoded_N3HW.device),
        out_Nhw3,
        H,
        W,
        size,
        H / size,
        W / size,
        *decoded_N3HW.stride(),
        TAPS=int(2 * max(H / size, 1)) + 3,
        BLOCK=block,
        BLOCK_W=16 if backend.interpreted() else 64,
    )
    return out_Nhw3


@jit
def _pixels_kernel(
    x_ptr, vertical_ptr, horizontal_ptr, out_ptr, H, W, size, scale_y, scale_x, stride_n, stride_c, stride_h, stride_w,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK x BLOCK output pixels of one channel: a sum over each output row's own source rows, then a product across.

    Weights are zero outside the filter, so a window only has to cover it: from its lower end, TAPS pixels on.
    """
    n, c = tl.program_id(2) // 3, tl.program_id(2) % 3
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += n.to(tl.int64) * stride_n + c * stride_c
    lowest = tl.floor((row + 0.5) * scale_y - 0.5 - tl.maximum(scale_y, 1.0)).to(tl.int32)
    reach_x = tl.maximum(scale_x, 1.0)
    left = (tl.program_id(0) * BLOCK + 0.5) * scale_x - 0.5 - reach_x
    right = (tl.program_id(0) * BLOCK + BLOCK - 0.5) * scale_x - 0.5 + reach_x
    start = tl.maximum(left.to(tl.int32), 0) // 16 * 16  # aligned, for wide loads
    stop = tl.minimum(right.to(tl.int32) + 2, W)
    out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for chunk in range(start, stop, BLOCK_W):
        x = chunk + tl.arange(0, BLOCK_W)
        rows = tl.zeros([BLOCK, BLOCK_W], tl.float32)
        for tap in range(TAPS):
            y = lowest + tap
            inside = (y >= 0) & (y < H) & (row < size)
            weight = tl.load(vertical_ptr + row * H + y, mask=inside, other=0.0)
            value = tl.load(
                x_ptr + y[:, None] * stride_h + x[None, :] * stride_w,
                mask=inside[:, None] & (x < W)[None, :],
                other=0.0,
            ).to(tl.float32)
            value = tl.where(value == value, value, -1.0)
            rows += weight[:, None] * tl.minimum(tl.maximum(value, -1.0), 1.0)
        across = tl.load(
            horizontal_ptr + column[None, :] * W + x[:, None],
            mask=(column < size)[None, :] & (x < W)[:, None],
            other=0.0,
        )
        out += tl.dot(rows, across, input_precision="tf32x3")
    level = tl.minimum(tl.maximum(out * 127.5 + 128.0, 0.0), 255.0).to(tl.uint8)
    at = ((n.to(tl.int64) * size + row[:, None]) * size + column[None, :]) * 3 + c
    tl.store(out_ptr + at, level, mask=(row < size)[:, None] & (column < size)[None, :])
