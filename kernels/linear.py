"""A linear layer with frozen weights; on a CPU it runs through oneDNN instead of torch's default matrix product.

For float32 products on a CPU torch calls MKL, which uses only half the vector width on non-Intel processors: on one
core of an AMD EPYC (Zen 5), 2048 x 80 by 80 x 640 ran at 112 GFLOP/s with MKL and at 247 with oneDNN
(benchmarks/LOG.md). torch itself uses oneDNN for convolutions only. Legend: N rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.checks import check_choice

IMPLEMENTATIONS = ("auto", "torch", "onednn")


def frozen_linear(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, implementation: str = "auto"
) -> torch.Tensor:
    """y = x W^T + b, [..., I] to [..., O]. Gradients flow to x only, so weight and bias must not require any.

    `auto` selects oneDNN for float32 on a CPU if torch was built with oneDNN and autocast is off; otherwise, and always
    under torch.compile, where no difference could be measured (benchmarks/LOG.md), it selects torch's product.

    Raises ValueError if weights require a gradient, or if oneDNN is requested but cannot run.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        raise ValueError("weight_OI and bias_O must be frozen: this op has no gradient for them")
    able = x_NI.device.type == "cpu" and x_NI.dtype == weight_OI.dtype == torch.float32 and backend.has_onednn()
    able = able and not torch.is_autocast_enabled("cpu")  # under autocast the output would have its dtype
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
    """`frozen_linear` in plain torch."""
    return F.linear(x_NI, weight_OI, bias_O)


class _OneDNNLinear(torch.autograd.Function):
    """oneDNN's product forward; backward dx = dy W by the same product."""

    @staticmethod
    def forward(ctx, x_NI, weight_OI, bias_O):
        ctx.weight_OI = weight_OI  # frozen, so unchanged until the backward pass
        return _product(x_NI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NO):
        return _product(dy_NO.contiguous(), ctx.weight_OI.t().contiguous(), None), None, None


def _product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x_NI, weight_OI, bias_O, "none", [], "")
