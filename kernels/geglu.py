"""The gated linear unit of a UNet's feed-forward layers, a gelu(b) of the two halves of a row, in one pass.

Eager code reads the gate, writes its gelu, and reads both again: five passes over a tensor as wide as the row, where
three do. Only what follows the projection is computed here; the projection stays the library's matrix product. Swapped
into diffusers' own modules as group_norm is. Legend: N rows (tokens of all images), D width of the output.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_tensor, describe

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def geglu(x_N2D: torch.Tensor, *, implementation: str = "auto") -> torch.Tensor:
    """a gelu(b), [..., D], of x = [a, b], [..., 2 D]; differentiable in x.

    With Phi and phi the standard normal distribution function and density, gelu(b) = b Phi(b) (exact, no tanh), and

        dL/da = dL/dy b Phi(b),  dL/db = dL/dy a (Phi(b) + b phi(b))

    x_N2D: fp32, fp16, bf16 (fp64 in torch), channels last; the Triton path computes in fp32, rounds once and copies an
    input that is not contiguous. Raises ValueError for a wrong dtype or an odd or empty shape.
    Source: Shazeer 2020 (2002.05202) eq. 6; Hendrycks and Gimpel 2016 (1606.08415).
    """
    check_tensor("x_N2D", x_N2D, dtypes=FLOATS)
    if x_N2D.ndim < 1 or x_N2D.shape[-1] % 2 or x_N2D.numel() == 0:
        raise ValueError(f"x_N2D is {describe(x_N2D)}; expected [..., 2 D], not empty")
    unable = backend.too_wide("x_N2D", x_N2D)
    if backend.choose("geglu", implementation, x_N2D.device, unable=unable).name == "triton":
        return geglu_triton(x_N2D)
    return geglu_reference(x_N2D)


def geglu_reference(x_N2D: torch.Tensor) -> torch.Tensor:
    """The unit of `geglu` in plain torch, as diffusers' GEGLU computes it."""
    a_ND, b_ND = x_N2D.chunk(2, dim=-1)
    return a_ND * F.gelu(b_ND)


class FusedGEGLU(nn.Module):
    """A diffusers GEGLU that runs `geglu` on its projection; made by `swap_geglu` only."""

    proj: nn.Linear
    implementation = "auto"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return geglu(self.proj(hidden_states), implementation=self.implementation)


def swap_geglu(module: nn.Module, implementation: str = "auto") -> int:
    """Make every GEGLU of a diffusers model run `geglu`; returns how many it changed.

    Projections and their names stay, so a state dict loads as before. Units that are already swapped are left alone.
    """
    units = [unit for unit in module.modules() if _is_geglu(unit)]
    for unit in units:
        unit.__class__ = FusedGEGLU  # the same module with the same projection, hooks and name
        unit.implementation = implementation
    return len(units)


def _is_geglu(unit: nn.Module) -> bool:
    """Whether `unit` is diffusers' exact GEGLU; told by its name, so that diffusers need not be imported here."""
    return type(unit).__name__ == "GEGLU" and type(unit).__module__.startswith("diffusers.") and hasattr(unit, "proj")


def geglu_triton(x_N2D: torch.Tensor) -> torch.Tensor:
    """The unit of `geglu` by the kernels."""
    if torch.is_grad_enabled() and x_N2D.requires_grad:
        return _GEGLU.apply(x_N2D)
    return _forward(x_N2D.contiguous())


def _forward(x_N2D: torch.Tensor) -> torch.Tensor:
    D = x_N2D.shape[-1] // 2
    y_ND = torch.empty(*x_N2D.shape[:-1], D, dtype=x_N2D.dtype, device=x_N2D.device)
    N, tile = y_ND.numel() // D, _tile(D)
    launch(_forward_kernel, _grid(N, D, tile), x_N2D, y_ND, N, D, **tile)
    return y_ND


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_N2D):
        x_N2D = x_N2D.contiguous()
        ctx.save_for_backward(x_N2D)
        return _forward(x_N2D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ND):
        (x_N2D,) = ctx.saved_tensors
        dx_N2D, dy_ND = torch.empty_like(x_N2D), dy_ND.contiguous()
        D = dy_ND.shape[-1]
        N, tile = dy_ND.numel() // D, _tile(D)
        launch(_backward_kernel, _grid(N, D, tile), x_N2D, dy_ND, dx_N2D, N, D, **tile)
        return dx_N2D


def _tile(D: int) -> dict:
    """1,024 numbers a program, eight a thread, so that fp16 moves in 16 bytes; SD's widths are multiples of 256."""
    block = min(16 if backend.interpreted() else 256, backend.next_power_of_2(D))
    return {"BLOCK_N": 4 if backend.interpreted() else 1024 // block, "BLOCK_D": block}


def _grid(N: int, D: int, tile: dict) -> tuple[int, int]:
    """Rows on the first axis, which alone may exceed 65,535 programs."""
    return -(-N // tile["BLOCK_N"]), -(-D // tile["BLOCK_D"])


@jit
def _normal(b):
    """Phi(b) and phi(b)."""
    return 0.5 + 0.5 * tl.erf(b * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * b * b)


@jit
def _halves(x_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """a and b of BLOCK_N rows by BLOCK_D columns in fp32; where they, and the same place of y, stand; which exist."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (n < N) & (d < D)
    at = n * (2 * D) + d
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + D, mask=inside, other=0.0).to(tl.float32)
    return a, b, at, n * D + d, inside


@jit(unspecialized=("N",))  # rows change with the batch
def _forward_kernel(x_ptr, y_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N rows by BLOCK_D columns of y."""
    a, b, _, at_y, inside = _halves(x_ptr, N, D, BLOCK_N, BLOCK_D)
    below, _ = _normal(b)
    tl.store(y_ptr + at_y, (a * (b * below)).to(y_ptr.dtype.element_ty), mask=inside)


@jit(unspecialized=("N",))
def _backward_kernel(x_ptr, dy_ptr, dx_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Both halves of dx of BLOCK_N rows by BLOCK_D columns of dy."""
    a, b, at, at_y, inside = _halves(x_ptr, N, D, BLOCK_N, BLOCK_D)
    dy = tl.load(dy_ptr + at_y, mask=inside, other=0.0).to(tl.float32)
    below, density = _normal(b)
    tl.store(dx_ptr + at, (dy * (b * below)).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at + D, (dy * a * (below + b * density)).to(dx_ptr.dtype.element_ty), mask=inside)
