"""A linear layer of frozen weights: on a CPU through oneDNN instead of torch's own matrix product.

torch gives float32 products on a CPU to MKL, which uses half the vector width on processors that are not Intel's: on one
core of an AMD EPYC (Zen 5) 2048 x 80 by 80 x 640 ran at 112 GFLOP/s, oneDNN's product at 247 (benchmarks/LOG.md). torch
itself goes to oneDNN for convolutions only. Legend: N rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.checks import check_choice

IMPLEMENTATIONS = ("auto", "torch", "onednn")


def frozen_linear(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, implementation: str = "auto"
) -> torch.Tensor:
    """y = x W^T + b, [..., I] to [..., O]; gradients flow to x only, so weight and bias must not require any.

    auto is oneDNN for float32 on a CPU where torch was built with it, else torch's product; torch's too under
    torch.compile, where no difference could be measured (benchmarks/LOG.md).

    Raises ValueError for weights that require a gradient, and where oneDNN is demanded but cannot run.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        raise ValueError("weight_OI and bias_O must be frozen: this op has no gradient for them")
    able = x_NI.device.type == "cpu" and x_NI.dtype == weight_OI.dtype == torch.float32 and backend.has_onednn()
    able = able and not torch.is_autocast_enabled("cpu")  # autocast would have answered in its own dtype
    if implementation == "onednn" and not able:
        raise ValueError(
            f"implementation='onednn' needs float32 on a CPU and a torch with oneDNN; x_NI is {x_NI.dtype} on "
            f"{x_NI.device.type}"
        )
    if implementation == "torch" or not able or torch.compiler.is_compiling():
        return frozen_linear_reference(x_NI, weight_OI, bias_O)
    if torch.is_grad_enabled() and x_NI.requires_grad:
        return _OneDNNLinear.apply(x_NI, weight_OI, bias_O)
    return _product(x_NI, weight_OI, bias_O)


def frozen_linear_reference(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """The layer of `frozen_linear` in plain torch."""
    return F.linear(x_NI, weight_OI, bias_O)


class _OneDNNLinear(torch.autograd.Function):
    """dx = dy W, by the same product."""

    @staticmethod
    def forward(ctx, x_NI, weight_OI, bias_O):
        ctx.weight_OI = weight_OI  # frozen, so it is the same when the gradient comes
        return _product(x_NI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NO):
        return _product(dy_NO.contiguous(), ctx.weight_OI.t().contiguous(), None), None, None


def _product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x_NI, weight_OI, bias_O, "none", [], "")
