"""Linear layers of a frozen model through the product that is fastest where it runs (see kernels/linear.py)."""

import torch

from kernels.linear import frozen_linear


class FrozenLinear(torch.nn.Linear):
    """A linear layer without gradients of its own."""

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x_NI, self.weight, self.bias)


def freeze_linears(model: torch.nn.Module) -> int:
    """Make every nn.Linear of a frozen model a FrozenLinear, in place, parameters and names as they were.

    Returns how many the model has now. Subclasses of nn.Linear have a forward of their own and stay as they are.

    Raises ValueError for a layer that is being trained.
    """
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear:
            if layer.weight.requires_grad:
                raise ValueError(f"model.{name} requires a gradient; expected a frozen model")
            layer.__class__ = FrozenLinear
    return sum(isinstance(layer, FrozenLinear) for layer in model.modules())
