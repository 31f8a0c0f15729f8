"""An exponential moving average of the encoder, used by the gate and for evaluation if enabled.

torch's AveragedModel holds the copy and its state. Its own update reads the update count from the device, which would
make every step wait, so the update of an exponential average is written here.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class AverageModel(AveragedModel):
    """The exponential moving average of a module's parameters and floating-point buffers.

    W_0 = module, W_t+1 = decay W_t + (1 - decay) module. Integer buffers (counts of batches) are copied.
    """

    def __init__(self, module: nn.Module, decay: float):
        """A copy of `module`, in evaluation mode; decay in [0, 1)."""
        super().__init__(module, use_buffers=True)
        self.decay = decay
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average one step towards `model`, without waiting for the device."""
        averaged = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        pairs = list(zip(averaged, current, strict=True))
        floating = [(a, c) for a, c in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [c.detach() for _, c in floating], 1 - self.decay)
        for a, c in pairs:
            if not a.is_floating_point():
                a.copy_(c)
        self.n_averaged += 1


def build_average(module: nn.Module, decay: float) -> AverageModel | None:
    """The averaged copy of `module`; None where `decay` is 0, which switches averaging off."""
    return AverageModel(module, decay) if decay > 0 else None
