"""The optimizer, its learning-rate schedule as a pure function of the step, and a guard that keeps weights finite.

Loss and gradient norm are checked on the device before the update. A non-finite update is skipped and recorded on the
device, and the host reads the record only when it logs, so no step waits. The record includes the batch, so that the
failure can be replayed. Non-finite weights are therefore never created or saved.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from modules.config import Learning
from modules.errors import ConfigError, NonFinite, first_line

REFERENCE_ROWS = 256  # batch size that learning.lr refers to
SCALE_START, SCALE_GROWTH_STEPS = 2.0**14, 500  # fp16 loss scaling: initial scale, finite steps until it doubles


def learning_rate(step: int, peak: float, warmup_steps: int, steps: int) -> float:
    """The learning rate of update `step` (from 0): linear warm-up to `peak` at the last warm-up step, then cosine to 0.

    peak (step+1)/warmup_steps while step < warmup_steps, then peak (1 + cos(pi t))/2 with
    t = (step - warmup_steps) / (steps - warmup_steps). Source: Loshchilov & Hutter 2017 (1608.03983) eq. 5, no restart.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_torch_optimizer(module: nn.Module, learning: Learning) -> torch.optim.Optimizer:
    """The optimizer named by `learning.optimizer`, with weight decay on weights but not on norms and biases.

    The 8-bit optimizers keep the state of parameters with at least 4,096 elements in 8 bits and the rest in 32; on a
    GPU bitsandbytes waits for the device at each parameter.

    Raises:
        ConfigError: an 8-bit optimizer is set, but bitsandbytes does not work on the module's device.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": learning.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if learning.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=learning.lr, momentum=learning.momentum, fused=True)
        if learning.momentum > 0:  # torch leaves the buffers uninitialized if its very first update is skipped
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if learning.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning.lr, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit, SGD8bit

        trial = nn.Parameter(torch.zeros(4096, device=parameters[0].device))  # a broken native library fails here
        trial.grad = torch.zeros_like(trial)
        AdamW8bit([trial], lr=0.0).step()
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ConfigError(
            f"learning.optimizer is {learning.optimizer!r}, but bitsandbytes does not work here "
            f"({first_line(error)}); install a build for this machine, or use sgd or adamw"
        ) from error
    for parameter in parameters:  # bitsandbytes would do so in its first step; done now, a resumed run rounds the same
        parameter.data = parameter.data.contiguous()
    if learning.optimizer == "sgd8bit":
        return SGD8bit(groups, lr=learning.lr, momentum=learning.momentum)
    return AdamW8bit(groups, lr=learning.lr)


class Optimizer:
    """Updates the weights once per step: learning-rate schedule, finite guard, gradient clipping, update."""

    def __init__(self, module: nn.Module, learning: Learning, batch_rows: float, *, loss_scaling: bool = False):
        """Optimize `module`, which must already be on its device.

        Args:
            batch_rows: mean rows per batch; the peak learning rate is learning.lr x batch_rows / 256.
            loss_scaling: scale losses so that fp16 gradients do not underflow; for fp16 autocast only.
        """
        self.learning = learning
        self.peak_lr = learning.lr * batch_rows / REFERENCE_ROWS
        self.inner = build_torch_optimizer(module, learning)
        self._parameters = [p for group in self.inner.param_groups for p in group["params"]]
        self.device = self._parameters[0].device
        self._skips_by_itself = all(group.get("fused") for group in self.inner.param_groups)
        self.guard = FiniteGuard(self.device)
        self._scale = torch.tensor(SCALE_START, device=self.device) if loss_scaling else None
        self._good_steps = torch.zeros((), device=self.device)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate `loss`, scaled under fp16."""
        (loss if self._scale is None else loss * self._scale).backward()

    def step(self, step: int, loss: torch.Tensor, capture: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Update the weights from their gradients, then free the gradients; returns the gradient norm before clipping.

        If loss or norm is not finite, nothing is updated (an 8-bit optimizer cannot skip, so it steps with gradients of
        zero), and the first such failure is recorded with copies of the tensors in `capture`. The returned norm, like
        all of this, stays on the device.
        """
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(step, self.peak_lr, self.learning.warmup_steps, self.learning.steps)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scale is not None:
            torch._foreach_mul_(gradients, 1 / self._scale)
        norm = nn.utils.get_total_norm(gradients)
        bad_loss, bad = ~loss.detach().isfinite(), ~(loss.detach().isfinite() & norm.isfinite())
        self.guard.note(step, loss.detach(), norm, self._adapt_scale(bad_loss, bad), capture or {})
        if self.learning.max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self.learning.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if self._skips_by_itself:
            self.inner.found_inf = bad.float()
        else:  # zero gradients keep weights and moments finite, though momentum and weight decay still apply
            for gradient in gradients:
                gradient.masked_fill_(bad, 0.0)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        return norm

    def raise_if_nonfinite(self, write_capture: Callable[[dict], str]) -> None:
        """Wait for the device and raise if any update since the start failed.

        Args:
            write_capture: stores {"step", "loss", "gradient_norm", "tensors"} of the first failure; returns its path.

        Raises:
            NonFinite: with the step, its loss and gradient norm, and the path of the capture.
        """
        failure = self.guard.failure()
        if failure is None:
            return
        raise NonFinite(
            f"step {failure['step']}: loss {failure['loss']:g}, gradient norm {failure['gradient_norm']:g}; its "
            f"update was left out; its batch is in {write_capture(failure)}, or lower learning.lr, lengthen "
            "learning.warmup_steps, set learning.max_grad_norm or run.precision=fp32"
        )

    def state_dict(self) -> dict:
        """Moments, loss scale and the guard's record; the schedule is a function of the step and needs no state."""
        state = {"inner": self.inner.state_dict(), "guard": self.guard.state_dict(), "good_steps": self._good_steps}
        return state if self._scale is None else {**state, "scale": self._scale}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict` exactly."""
        self.inner.load_state_dict(state["inner"])
        for parameter, values in self.inner.state.items():
            for name, value in values.items():  # fused updates need moments in the memory layout of their weight
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.guard.load_state_dict(state["guard"])
        self._good_steps.copy_(state["good_steps"])
        if self._scale is not None:
            self._scale.copy_(state["scale"])

    def _adapt_scale(self, bad_loss: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        """Halve the loss scale after a bad step, double it after many good ones; returns whether the step failed.

        A gradient that overflowed only because of the scale is not a failure: the next step uses a smaller scale.
        """
        if self._scale is None:
            return bad
        self._good_steps = torch.where(bad, 0.0, self._good_steps + 1)
        grow = self._good_steps >= SCALE_GROWTH_STEPS
        failure = bad_loss | (bad & (self._scale <= 1))
        self._scale *= torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self._good_steps = torch.where(grow, 0.0, self._good_steps)
        return failure


class FiniteGuard:
    """Records on the device the first step that was not finite, with its batch."""

    def __init__(self, device: torch.device):
        self._first = torch.tensor(-1, device=device)
        self._figures = torch.zeros(2, device=device)  # loss and gradient norm of that step
        self._captured: dict[str, torch.Tensor] = {}

    def note(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, failed: torch.Tensor, capture: dict[str, torch.Tensor]
    ) -> None:
        """Record this step and copies of `capture` if it is the first with `failed` (bool scalar on the device)."""
        first = failed & (self._first < 0)
        self._first = torch.where(first, step, self._first)
        self._figures = torch.where(first, torch.stack([loss.float(), norm.float()]), self._figures)
        for name, tensor in capture.items():
            kept = self._captured.get(name)
            if kept is None or len(kept) < len(tensor):  # batches may differ by a row: make room for the largest
                larger = torch.zeros_like(tensor)
                if kept is not None:
                    larger[: len(kept)] = kept
                self._captured[name] = kept = larger
            kept[: len(tensor)] = torch.where(first, tensor, kept[: len(tensor)])

    def failure(self) -> dict | None:
        """{"step", "loss", "gradient_norm", "tensors"} of the first failure, read from the device; None without one."""
        step = int(self._first)
        if step < 0:
            return None
        loss, norm = self._figures.tolist()
        return {"step": step, "loss": loss, "gradient_norm": norm, "tensors": self._captured}

    def state_dict(self) -> dict:
        """The first failed step (-1 for none) and its figures; captured batches are not saved."""
        return {"first": self._first, "figures": self._figures}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        self._first.copy_(state["first"])
        self._figures.copy_(state["figures"])
