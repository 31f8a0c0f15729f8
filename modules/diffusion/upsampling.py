"""Upsampling layers of a frozen UNet or VAE without the upsampled image (kernels/upsample.py), in the form that is fastest.

On a CPU in float32 the form is fixed, so that a run gives the same bits again; on a GPU a start-up tuner times all of
them at every shape that the layers really meet. Parameters and names stay as they were.
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
        """Compute it in this form from here on; ValueError for one that is unknown."""
        folded = fold(self.conv.weight.detach(), form)
        self.form = form
        self.register_buffer("folded", None if form == OWN else folded, persistent=False)

    def reset_form(self) -> None:
        """The form that is taken without timing: transposed in float32 on a CPU, else diffusers' own."""
        weight = self.conv.weight
        self.set_form("transposed" if weight.device.type == "cpu" and weight.dtype == torch.float32 else OWN)

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """[N, I, h, w] to [N, O, 2h, 2w], or to `output_size` where the UNet's grid is no multiple of its own factor."""
        h, w = hidden_states.shape[2:]
        if self.form == OWN or (output_size is not None and tuple(output_size) != (2 * h, 2 * w)):
            return super().forward(hidden_states, output_size)
        return upsample_conv(hidden_states, self.folded, self.conv.bias, form=self.form)


def freeze_upsampling(model: torch.nn.Module) -> int:
    """Make every plain upsampling layer of a frozen model a FoldedUpsample, in place; returns how many it has now."""
    for layer in model.modules():
        if type(layer) is Upsample2D and _is_plain(layer):
            layer.__class__ = FoldedUpsample
            layer.reset_form()
    return len(_layers([model]))


def set_forms(form: str, *models: torch.nn.Module) -> None:
    """Every FoldedUpsample in one form."""
    for layer in _layers(models):
        layer.set_form(form)


def reset_forms(*models: torch.nn.Module) -> None:
    """Every FoldedUpsample as it is before a tuner has seen it."""
    for layer in _layers(models):
        layer.reset_form()


@torch.no_grad()
def tune(
    models: list[torch.nn.Module],
    call: Callable[[], object],
    timer: Callable[[Callable[[], object]], float],
    kept: dict[str, str] | None = None,
) -> tuple[dict[str, str], list[Timing]]:
    """Time the forms of every FoldedUpsample on the inputs that `call` gives it, and set the best at each shape.

    They are timed in the layout of the weights.

    Args:
        timer: milliseconds of a function.
        kept: form by shape as returned before; it is taken again, untimed.

    Returns the form of each shape, and what was timed.
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
    """Of the summed weights that a tuner may still add, 16 sums for 9 weights: those of layers in diffusers' own form."""
    return sum(layer.conv.weight.nbytes * 16 // 9 for layer in _layers([model]) if layer.form == OWN)


def describe(timings: list[Timing]) -> list[str]:
    """A line for each shape: every form with its time, or why it refused, the fastest first."""
    return [
        f"upsampling, {rows} images of {channels} x {h} x {w} to {made} channels: {told(found)}"
        for (rows, channels, h, w, made), found in by_shape(timings).items()
    ]


def summary(*models: torch.nn.Module) -> str:
    """How many layers are in which form: transposed in 5 layers, torch in 1 layers."""
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
    except RuntimeError as error:  # no algorithm, no memory for its workspace
        return Timing(shape, form, None, first_line(error))
