"""Layers of a frozen model in the form that is fastest where they run: linear layers (kernels/linear.py) and upsampling
(kernels/upsample.py)."""

import torch

from kernels.linear import frozen_linear


class FrozenLinear(torch.nn.Linear):
    """A linear layer without gradients of its own."""

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x_NI, self.weight, self.bias)


def freeze_layers(model: torch.nn.Module) -> int:
    """Make every nn.Linear of a frozen model a FrozenLinear and every upsampling layer of diffusers a FoldedUpsample, in
    place, parameters and names as they were.

    Returns how many of both the model has now. Subclasses of nn.Linear have a forward of their own and stay as they are.

    Raises ValueError for a layer that is being trained.
    """
    from modules.diffusion.upsampling import freeze_upsampling  # imports diffusers: seconds that --help must not pay

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"model.{name} requires a gradient; expected a frozen model")
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = FrozenLinear
    return sum(isinstance(layer, FrozenLinear) for layer in model.modules()) + freeze_upsampling(model)
