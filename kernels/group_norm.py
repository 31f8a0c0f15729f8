"""Group normalization fused with SiLU for channels_last activations, forward and backward, and its swap into diffusers.

CUDA's GroupNorm returns NCHW whatever the layout of its input, so an eager channels_last UNet transposes at 61 norms
and writes the activation once more for SiLU. The kernels read the input twice and write it once: the first computes
statistics of each channel over a chunk of pixels, a tiny one reduces them to a scale and a shift per channel, and the
third normalizes. It starts with the pixels that the first read last, part of which are still in the cache. Legend: N
images, C channels, G groups, P = H*W pixels, K chunks of pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PROGRAMS = 2048  # at least this many if there are enough pixels: about fifteen per multiprocessor of a large GPU
MAX_CHUNKS = 256  # of an image's pixels; one program merges their partial sums


def group_norm_silu(
    x_NCHW: torch.Tensor,
    groups: int,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    implementation: str = "auto",
) -> torch.Tensor:
    """silu(u), or u without `silu`, in the shape and dtype of x, with u = weight (x - mean) / sqrt(var + eps) + bias.

    mean and (biased) var are taken over each group of C / groups adjacent channels of an image. Differentiable in x,
    weight and bias. With w = weight, r = 1 / sqrt(var + eps), x^ = (x - mean) r, g = dL/dy silu'(u) and means over the
    group:

        dL/dx = r (w g - mean(w g) - x^ mean(w g x^)),  dL/dw_c = sum g x^,  dL/db_c = sum g

    x_NCHW: [N, C, ...] fp32, fp16, bf16 (fp64 in torch only); statistics are fp32. The Triton path returns
    channels_last and copies an input of another layout. Raises ValueError for a wrong shape, dtype, device or number of
    groups. Source: Wu and He 2018 (1803.08494) eq. 1; Elfwing et al. 2017 (1702.03118).
    """
    check_tensor("x_NCHW", x_NCHW, dtypes=FLOATS)
    if x_NCHW.ndim < 3 or groups < 1 or x_NCHW.shape[1] % groups or x_NCHW.numel() == 0:
        raise ValueError(
            f"x_NCHW is {list(x_NCHW.shape)}; expected [N, C, ...], not empty, C a multiple of {groups} groups"
        )
    C = x_NCHW.shape[1]
    check_tensor("weight_C", weight_C, shape=(C,), dtypes=FLOATS, device=x_NCHW.device)
    check_tensor("bias_C", bias_C, shape=(C,), dtypes=FLOATS, device=x_NCHW.device)
    unable = backend.too_wide("x_NCHW", x_NCHW)
    if backend.choose("group_norm", implementation, x_NCHW.device, unable=unable).name == "triton":
        return group_norm_silu_triton(x_NCHW, groups, weight_C, bias_C, eps, silu)
    return group_norm_silu_reference(x_NCHW, groups, weight_C, bias_C, eps, silu)


def group_norm_silu_reference(
    x_NCHW: torch.Tensor, groups: int, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float, silu: bool
) -> torch.Tensor:
    """`group_norm_silu` in plain torch."""
    u = F.group_norm(x_NCHW, groups, weight_C, bias_C, eps)
    return F.silu(u) if silu else u


class GroupNormSiLU(nn.GroupNorm):
    """A GroupNorm that runs `group_norm_silu`; if `silu` is set, it includes the activation that followed it."""

    silu = True
    implementation = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, implementation=self.implementation
        )


def swap_group_norm(module: nn.Module, implementation: str = "auto") -> int:
    """Make every affine GroupNorm of a diffusers UNet or VAE run `group_norm_silu`; return how many were changed.

    If SiLU follows the norm (norm1 and norm2 of a resnet, conv_norm_out), it is fused into it and the activation module
    becomes an identity; a resnet's time embedding, which shares that activation, gets its own. Parameters and their
    names stay the same, so state dicts load as before. Norms that are already swapped are left alone.
    """
    norms = [norm for norm in module.modules() if _is_plain(norm)]
    fused: set[nn.Module] = set()
    for block in module.modules():
        if _is_resnet(block):
            if block.time_emb_proj is not None and not block.skip_time_act:
                block.time_emb_proj.register_forward_pre_hook(_silu_before)
            block.nonlinearity = nn.Identity()
            fused |= {block.norm1, block.norm2}
        elif _is_plain(getattr(block, "conv_norm_out", None)) and isinstance(block.conv_act, nn.SiLU):
            block.conv_act = nn.Identity()
            fused.add(block.conv_norm_out)
    for norm in norms:
        norm.__class__ = GroupNormSiLU  # the same module with the same parameters, hooks and name
        norm.silu = norm in fused
        norm.implementation = implementation
    return len(norms)


def _is_plain(norm: object) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine


def _is_resnet(block: nn.Module) -> bool:
    """Whether `block` computes conv(SiLU(norm(x))) twice, with nothing between norm and activation."""
    norms = _is_plain(getattr(block, "norm1", None)) and _is_plain(getattr(block, "norm2", None))
    return norms and getattr(block, "time_embedding_norm", "") == "default" and isinstance(block.nonlinearity, nn.SiLU)


def _silu_before(_module: nn.Module, arguments: tuple) -> tuple:
    return (F.silu(arguments[0]), *arguments[1:])


def group_norm_silu_triton(
    x_NCHW: torch.Tensor, groups: int, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float, silu: bool
) -> torch.Tensor:
    """`group_norm_silu` by the kernels."""
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_NCHW, weight_C, bias_C)):
        return _GroupNormSiLU.apply(x_NCHW, groups, weight_C, bias_C, eps, silu)
    return _forward(x_NCHW, groups, weight_C, bias_C, eps, silu)[0]


def _forward(x_NCHW, groups, weight_C, bias_C, eps, silu) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y_NCHW, and what the backward pass needs: x_NPC, and the mean and 1/sd of every group."""
    x_NPC = _to_pixels(x_NCHW)
    N, P, C = x_NPC.shape
    blocks, K, size = _plan(N, P, C)
    partial_2NKC = torch.empty(2, N, K, C, dtype=torch.float32, device=x_NPC.device)
    statistics_2NG = torch.empty(2, N, groups, dtype=torch.float32, device=x_NPC.device)
    affine_2NC = torch.empty(2, N, C, dtype=torch.float32, device=x_NPC.device)
    y_NCHW = _empty_pixels(x_NPC, x_NCHW.shape)
    grid = (-(-C // blocks["BLOCK_C"]), K, N)
    launch(_statistics_kernel, grid, x_NPC, *partial_2NKC, P, C, K, size, **blocks)
    sums = (*partial_2NKC, weight_C, bias_C, *statistics_2NG, *affine_2NC)
    launch(_affine_kernel, (groups, N), *sums, P, C, K, size, eps, C // groups, groups, **_tile(C // groups, K))
    launch(_normalize_kernel, grid, x_NPC, *affine_2NC, y_NCHW, P, C, size, SILU=silu, **blocks)
    return y_NCHW, x_NPC, statistics_2NG


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NCHW, groups, weight_C, bias_C, eps, silu):
        y_NCHW, x_NPC, statistics_2NG = _forward(x_NCHW, groups, weight_C, bias_C, eps, silu)
        ctx.save_for_backward(x_NPC, weight_C, bias_C, statistics_2NG)
        ctx.silu, ctx.shape = silu, x_NCHW.shape
        return y_NCHW

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NCHW):
        x_NPC, weight_C, bias_C, statistics_2NG = ctx.saved_tensors
        (N, P, C), G = x_NPC.shape, statistics_2NG.shape[2]
        (blocks, K, size), dy_NPC, width = _plan(N, P, C), _to_pixels(dy_NCHW), C // G
        partial_2NKC = torch.empty(2, N, K, C, dtype=torch.float32, device=x_NPC.device)
        sum_2NC = torch.empty(2, N, C, dtype=torch.float32, device=x_NPC.device)  # of g and of g x^
        group_2NG = torch.empty_like(statistics_2NG)  # means of w g and w g x^
        dx_NCHW = _empty_pixels(x_NPC, ctx.shape)
        grid = (-(-C // blocks["BLOCK_C"]), K, N)
        shared = (x_NPC, dy_NPC, weight_C, bias_C, *statistics_2NG)
        launch(_backward_sums_kernel, grid, *shared, *partial_2NKC, P, C, K, size, width, G, SILU=ctx.silu, **blocks)
        sums = (*partial_2NKC, weight_C, *sum_2NC, *group_2NG)
        launch(_backward_groups_kernel, (G, N), *sums, P, C, K, width, G, **_tile(width, K))
        launch(_backward_kernel, grid, *shared, *group_2NG, dx_NCHW, P, C, size, width, G, SILU=ctx.silu, **blocks)
        dbias_C, dweight_C = sum_2NC.sum(1)
        return dx_NCHW, None, dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype), None, None


def _to_pixels(x_NCHW: torch.Tensor) -> torch.Tensor:
    """x as contiguous [N, P, C]: a view of a channels_last tensor, a copy of any other."""
    return x_NCHW.flatten(2).transpose(1, 2).contiguous()


def _empty_pixels(x_NPC: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """An empty [N, C, ...] tensor of x's dtype, laid out in memory as a contiguous [N, P, C].

    It is not made as a view of one, since autograd forbids in-place changes to views that a Function returns.
    """
    N, P, C = x_NPC.shape
    strides, below = [], C
    for extent in reversed(shape[2:]):
        strides.insert(0, below)
        below *= extent
    return torch.empty_strided(shape, (P * C, 1, *strides), dtype=x_NPC.dtype, device=x_NPC.device)


def _plan(N: int, P: int, C: int) -> tuple[dict, int, int]:
    """A program's tile, the number of chunks per image, and the pixels per chunk, a multiple of the tile's.

    A tile is 64 channels wide (128 bytes of fp16; all of SD's widths are multiples of it) and has enough pixels to keep
    many loads in flight.
    """
    if backend.interpreted():
        blocks, programs = {"BLOCK_C": min(16, backend.next_power_of_2(C)), "BLOCK_P": 8}, 8
    else:
        blocks, programs = {"BLOCK_C": min(64, backend.next_power_of_2(C)), "BLOCK_P": 32, "num_warps": 4}, PROGRAMS
    wanted = -(-programs // (N * -(-C // blocks["BLOCK_C"])))
    tiles = -(-P // blocks["BLOCK_P"])
    size = -(-tiles // max(1, min(wanted, MAX_CHUNKS, tiles))) * blocks["BLOCK_P"]
    return blocks, -(-P // size), size


def _tile(width: int, K: int) -> dict:
    """Launch settings of the kernels in which one program merges the chunks of one group."""
    block_c, block_k = backend.next_power_of_2(width), backend.next_power_of_2(K)
    return {"BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": 1 if block_c * block_k <= 1024 else 4}


@jit
def _statistics_kernel(
    x_ptr, mean_ptr, m2_ptr, P, C, K, size, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over one chunk.

    Each lane of a tile keeps running statistics of its own pixels (Welford 1962); they are merged across lanes only
    once, at the end (Chan et al. 1979).
    """
    n, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = tl.minimum(size, P - k * size)
    x_ptr += (n * P + k * size) * C
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    seen = 0.0
    for start in range(0, pixels, BLOCK_P):
        p = start + lane
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + p[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        away = tl.where(inside, x - mean, 0.0)
        mean += away * (1.0 / seen)
        m2 += away * (x - mean)
    count = ((pixels - lane + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # pixels of each lane
    total = pixels * 1.0
    chunk_mean = tl.sum(count * mean, 0) / total
    away = mean - chunk_mean[None, :]
    chunk_m2 = tl.sum(m2 + count * away * away, 0)
    at = (n * K + k) * C + c
    tl.store(mean_ptr + at, chunk_mean, mask=c < C)
    tl.store(m2_ptr + at, chunk_m2, mask=c < C)


@jit
def _affine_kernel(
    chunk_mean_ptr, chunk_m2_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, scale_ptr, shift_ptr,
    P, C, K, size, eps, width, groups, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A group's mean and 1/sd, merged from its channels and chunks, and the scale and shift of each of its channels."""
    g, n = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    offset = tl.arange(0, BLOCK_C)
    c = g * width + offset
    inside = (k < K)[:, None] & (offset < width)[None, :]
    at = (n * K + k[:, None]) * C + c[None, :]
    chunk_mean = tl.load(chunk_mean_ptr + at, mask=inside, other=0.0)
    chunk_m2 = tl.load(chunk_m2_ptr + at, mask=inside, other=0.0)
    pixels = tl.minimum(size, P - k * size) * 1.0
    count = tl.where(inside, pixels[:, None], 0.0)
    total = P * width * 1.0
    mean = tl.sum(tl.sum(count * chunk_mean, 1), 0) / total
    away = chunk_mean - mean
    variance = tl.sum(tl.sum(tl.where(inside, chunk_m2 + count * away * away, 0.0), 1), 0) / total
    rstd = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight_ptr + c, mask=offset < width, other=0.0).to(tl.float32) * rstd
    shift = tl.load(bias_ptr + c, mask=offset < width, other=0.0).to(tl.float32) - mean * scale
    tl.store(mean_ptr + n * groups + g, mean)
    tl.store(rstd_ptr + n * groups + g, rstd)
    tl.store(scale_ptr + n * C + c, scale, mask=offset < width)
    tl.store(shift_ptr + n * C + c, shift, mask=offset < width)


@jit
def _normalize_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, P, C, size, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """y = x scale + shift, then SiLU if set, over one chunk; the last image first, as its pixels are still cached."""
    n, k = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr + n * C + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + n * C + c, mask=c < C, other=0.0)
    pixels = tl.minimum(size, P - k * size)
    first = (n * P + k * size) * C
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        u = tl.load(x_ptr + first + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        tl.store(y_ptr + first + at, u.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _of_channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, c, group, C):
    """weight and bias of channels c, and mean and 1/sd of their groups."""
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return (
        weight,
        bias,
        tl.load(mean_ptr + group, mask=c < C, other=0.0),
        tl.load(rstd_ptr + group, mask=c < C, other=0.0),
    )


@jit
def _gradient(x, dy, weight, bias, mean, rstd, SILU: tl.constexpr):
    """x^ and g = dL/dy silu'(u) of a tile."""
    x_hat = (x - mean[None, :]) * rstd[None, :]
    g = dy
    if SILU:
        u = x_hat * weight[None, :] + bias[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        g = dy * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return x_hat, g


@jit
def _backward_sums_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_g_ptr, sum_gx_ptr, P, C, K, size, width, groups,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x^ of each channel over one chunk, accumulated per lane until the end."""
    n, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = n * groups + c // width
    weight, bias, mean, rstd = _of_channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, c, group, C)
    pixels = tl.minimum(size, P - k * size)
    first = (n * P + k * size) * C
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        x = tl.load(x_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        x_hat, g = _gradient(x, dy, weight, bias, mean, rstd, SILU)
        sum_g += g
        sum_gx += g * x_hat
    at = (n * K + k) * C + c
    tl.store(sum_g_ptr + at, tl.sum(sum_g, 0), mask=c < C)
    tl.store(sum_gx_ptr + at, tl.sum(sum_gx, 0), mask=c < C)


@jit
def _backward_groups_kernel(
    chunk_g_ptr, chunk_gx_ptr, weight_ptr, sum_g_ptr, sum_gx_ptr, mean_wg_ptr, mean_wgx_ptr,
    P, C, K, width, groups, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x^ of each channel of a group over an image, and the group's means of w g and w g x^."""
    g, n = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    offset = tl.arange(0, BLOCK_C)
    c = g * width + offset
    inside = (k < K)[:, None] & (offset < width)[None, :]
    at = (n * K + k[:, None]) * C + c[None, :]
    sum_g = tl.sum(tl.load(chunk_g_ptr + at, mask=inside, other=0.0), 0)
    sum_gx = tl.sum(tl.load(chunk_gx_ptr + at, mask=inside, other=0.0), 0)
    weight = tl.load(weight_ptr + c, mask=offset < width, other=0.0).to(tl.float32)
    total = P * width * 1.0
    tl.store(sum_g_ptr + n * C + c, sum_g, mask=offset < width)
    tl.store(sum_gx_ptr + n * C + c, sum_gx, mask=offset < width)
    tl.store(mean_wg_ptr + n * groups + g, tl.sum(weight * sum_g, 0) / total)
    tl.store(mean_wgx_ptr + n * groups + g, tl.sum(weight * sum_gx, 0) / total)


@jit
def _backward_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, mean_wg_ptr, mean_wgx_ptr, dx_ptr, P, C, size, width, groups,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx of one chunk from the group means of w g and w g x^; the last image first, as in the forward pass."""
    n, k = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = n * groups + c // width
    weight, bias, mean, rstd = _of_channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, c, group, C)
    mean_wg = tl.load(mean_wg_ptr + group, mask=c < C, other=0.0)
    mean_wgx = tl.load(mean_wgx_ptr + group, mask=c < C, other=0.0)
    pixels = tl.minimum(size, P - k * size)
    first = (n * P + k * size) * C
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        x = tl.load(x_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        x_hat, g = _gradient(x, dy, weight, bias, mean, rstd, SILU)
        dx = rstd[None, :] * (g * weight[None, :] - mean_wg[None, :] - x_hat * mean_wgx[None, :])
        tl.store(dx_ptr + first + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
