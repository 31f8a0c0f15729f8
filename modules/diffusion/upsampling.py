"""Upsampling layers of a frozen UNet or VAE, computed without the upsampled image (kernels/upsample.py) where faster.

On a CPU in float32 the form is fixed, so that a run can be reproduced bit for bit. On a GPU a start-up tuner times all
forms on every shape that the layers really have. Parameters and their names do not change.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from diffusers.models.upsampling import Upsample2D

from kernels.upsample import FORMS, fold, upsample_conv
from modules.diffusion.timings import Timing, by_shape, chosen, name_of, told
from modules.errors import first_line

OWN = "torch"  # what diffusers computes


class FoldedUpsample(Upsample2D):
    """Nearest-neighbour upsampling by 2 and its 3 x 3 convolution, in one of FORMS."""

    form = OWN

    def set_form(self, form: str) -> None:
        """Use this form from now on; raises ValueError for an unknown one."""
        folded = fold(self.conv.weight.detach(), form)
        self.form = form
        self.register_buffer("folded", None if form == OWN else folded, persistent=False)

    def reset_form(self) -> None:
        """Use the form that is the default without timing: transposed in float32 on a CPU, else diffusers' own."""
        weight = self.conv.weight
        self.set_form("transposed" if weight.device.type == "cpu" and weight.dtype == torch.float32 else OWN)

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """[N, I, h, w] -> [N, O, 2h, 2w], or to `output_size` if the grid is no multiple of the UNet's total factor."""
        h, w = hidden_states.shape[2:]
        if self.form == OWN or (output_size is not None and tuple(output_size) != (2 * h, 2 * w)):
            return super().forward(hidden_states, output_size)
        return upsample_conv(hidden_states, self.folded, self.conv.bias, form=self.form)


def freeze_upsampling(model: torch.nn.Module) -> int:
    """Turn every plain upsampling layer of a frozen model into a FoldedUpsample, in place; returns how many it has."""
    for layer in model.modules():
        if type(layer) is Upsample2D and _is_plain(layer):
            layer.__class__ = FoldedUpsample
            layer.reset_form()
    return len(_layers([model]))


def set_forms(form: str, *models: torch.nn.Module) -> None:
    """Set every FoldedUpsample to one form."""
    for layer in _layers(models):
        layer.set_form(form)


def reset_forms(*models: torch.nn.Module) -> None:
    """Set every FoldedUpsample to its default form, as before tuning."""
    for layer in _layers(models):
        layer.reset_form()


@torch.no_grad()
def tune(
    models: list[torch.nn.Module],
    call: Callable[[], object],
    timer: Callable[[Callable[[], object]], float],
    kept: dict[str, str] | None = None,
) -> tuple[dict[str, str], list[Timing]]:
    """Time the forms of every FoldedUpsample on the inputs that it gets in `call`, and set the best one per shape.

    They are timed in the memory layout of the weights.

    Args:
        timer: returns the milliseconds that a function takes.
        kept: the form by shape as returned earlier; it is used again without timing.

    Returns the form of each shape, and the timings.
    """
    inputs: dict[tuple[int, ...], tuple[FoldedUpsample, torch.Tensor]] = {}
    shapes: dict[FoldedUpsample, tuple[int, ...]] = {}

    def note(layer: FoldedUpsample, arguments: tuple) -> None:
        shapes[layer] = (*arguments[0].shape, layer.out_channels)
        inputs.setdefault(shapes[layer], (layer, arguments[0]))

    hooks = [layer.register_forward_pre_hook(note) for layer in _layers(models)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    timings = []
    for shape, (layer, x) in inputs.items():
        if name_of(shape) not in (kept or {}):
            timings += [_time(shape, form, layer, x, timer) for form in FORMS]
    forms = chosen(timings, OWN) | (kept or {})
    for layer, shape in shapes.items():
        layer.set_form(forms.get(name_of(shape), OWN))
    return forms, timings


def folded_bytes(model: torch.nn.Module) -> int:
    """Bytes of folded weights that a tuner may still add, for layers in diffusers' own form: 16 sums per 9 weights."""
    return sum(layer.conv.weight.nbytes * 16 // 9 for layer in _layers([model]) if layer.form == OWN)


def describe(timings: list[Timing]) -> list[str]:
    """One line per shape: every form with its time or its reason for refusing, fastest first."""
    return [
        f"upsampling, {rows} images of {channels} x {h} x {w} to {made} channels: {told(found)}"
        for (rows, channels, h, w, made), found in by_shape(timings).items()
    ]


def summary(*models: torch.nn.Module) -> str:
    """How many layers use which form, such as "transposed in 5 layers, torch in 1 layers"."""
    taken = Counter(layer.form for layer in _layers(models))
    return ", ".join(f"{form} in {count} layers" for form, count in taken.most_common()) or "no layer of its kind"


def _layers(models: Iterable[torch.nn.Module]) -> list[FoldedUpsample]:
    return [layer for model in models for layer in model.modules() if isinstance(layer, FoldedUpsample)]


def _is_plain(layer: Upsample2D) -> bool:
    convolves = layer.use_conv and not layer.use_conv_transpose and layer.name == "conv" and layer.interpolate
    return convolves and layer.norm is None and layer.conv.kernel_size == (3, 3) and layer.conv.padding == (1, 1)


def _time(
    shape: tuple[int, ...],
    form: str,
    layer: FoldedUpsample,
    x: torch.Tensor,
    timer: Callable[[Callable[[], object]], float],
) -> Timing:
    weight, bias = layer.conv.weight, layer.conv.bias
    layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    try:
        x, folded = (t.contiguous(memory_format=layout) for t in (x, fold(weight, form)))
        if not upsample_conv(x, folded, bias, form=form).isfinite().all():
            return Timing(shape, form, None, "its output is not finite")
        return Timing(shape, form, timer(lambda: upsample_conv(x, folded, bias, form=form)))
    except RuntimeError as error:  # no algorithm, or no memory for its workspace
        return Timing(shape, form, None, first_line(error))
