"""Replaces linear layers (kernels/linear.py) and upsampling layers (kernels/upsample.py) of a frozen model by faster
equivalents."""

import torch

from kernels.linear import frozen_linear


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight and bias get no gradients."""

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x_NI, self.weight, self.bias)


def freeze_layers(model: torch.nn.Module) -> int:
    """Turn every nn.Linear of a frozen model into a FrozenLinear, and diffusers' upsampling layers into FoldedUpsample.

    This happens in place and keeps parameters and their names. Subclasses of nn.Linear are left alone, because they
    have their own forward. Returns the number of layers of both kinds that the model now has.

    Raises ValueError if a parameter requires a gradient.
    """
    from modules.diffusion.upsampling import freeze_upsampling  # imports diffusers, seconds that --help must not cost

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"model.{name} requires a gradient; expected a frozen model")
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = FrozenLinear
    return sum(isinstance(layer, FrozenLinear) for layer in model.modules()) + freeze_upsampling(model)
