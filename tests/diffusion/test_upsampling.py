"""Upsampling layers of UNet and VAE: the same model in every form, the fastest of them chosen by measured time."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from kernels.upsample import FORMS
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.timings import Timing
from modules.diffusion.upsampling import (
    FoldedUpsample,
    describe,
    folded_bytes,
    freeze_upsampling,
    reset_forms,
    set_forms,
    summary,
    tune,
)
from tests.diffusion.engine import tiny_pipeline


def models():
    """A UNet and a VAE of their own: engines freeze the ones that tests share."""
    pipeline = tiny_pipeline.__wrapped__()
    return pipeline, copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.vae)


def layers_of(*parts):
    return [layer for part in parts for layer in part.modules() if isinstance(layer, Upsample2D)]


def latents(size, rows=2):
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(pipeline, unet, size=8):
    return unet(latents(size), torch.tensor([10.0, 700.0]), pipeline.embed(["a gear", ""])).sample


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", (8, 9))
def test_the_unet_computes_the_same_on_any_grid(form, size):
    """On a grid of 9 cells the UNet asks for an output of a size of its own, which is not twice the input."""
    pipeline, unet, _ = models()
    frozen = copy.deepcopy(unet)
    assert freeze_upsampling(frozen) == len(layers_of(unet)) > 0
    set_forms(form, frozen)
    torch.testing.assert_close(run(pipeline, frozen, size), run(pipeline, unet, size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_decoder_computes_the_same(form):
    _, _, vae = models()
    frozen = copy.deepcopy(vae)
    assert freeze_upsampling(frozen) == len(layers_of(vae)) > 0
    set_forms(form, frozen)
    with torch.no_grad():
        plain = vae.decode(latents(8)).sample
        torch.testing.assert_close(frozen.decode(latents(8)).sample, plain, rtol=1e-4, atol=1e-5)


def test_a_frozen_model_keeps_its_names_and_its_copies_are_frozen_too():
    _, unet, _ = models()
    frozen = copy.deepcopy(unet)
    freeze_layers(frozen)
    assert frozen.state_dict().keys() == unet.state_dict().keys()
    assert {layer.form for layer in layers_of(copy.deepcopy(frozen))} == {"transposed"}, "fp32 on a CPU"
    freeze_layers(frozen)  # once is enough, twice changes nothing
    assert {type(layer) for layer in layers_of(frozen)} == {FoldedUpsample}


def test_other_types_and_other_layers_stay_as_they_are():
    _, unet, _ = models()
    half = unet.to(torch.bfloat16)
    freeze_upsampling(half)
    assert {layer.form for layer in layers_of(half)} == {"torch"}
    assert all(layer.folded is None for layer in layers_of(half)), "weights are not kept twice"
    odd = torch.nn.ModuleList(
        [Upsample2D(4), Upsample2D(4, use_conv=True, kernel_size=1, padding=0), Upsample2D(4, use_conv_transpose=True)]
    )
    assert freeze_upsampling(odd.requires_grad_(False)) == 0 and {type(layer) for layer in odd} == {Upsample2D}


class Timer:
    """A timer that knows which form it times, and its time."""

    def __init__(self, monkeypatch, speed):
        from modules.diffusion import upsampling

        self.speed, self.timed, self.given, real = speed, [], [], upsampling.upsample_conv

        def note(x, folded, bias, *, form):
            if self.speed[form] is None:
                raise RuntimeError(f"no algorithm for {form}\nlong trace")
            self.timed.append(form)
            self.given += [x, folded]
            return real(x, folded, bias, form=form)

        monkeypatch.setattr(upsampling, "upsample_conv", note)

    def __call__(self, function):
        function()
        return self.speed[self.timed[-1]]


@pytest.mark.parametrize(
    ("speed", "taken"),
    [
        ({"torch": 2.0, "transposed": 1.5, "phases": 1.0}, "phases"),
        ({"torch": 1.0, "transposed": 1.5, "phases": 0.97}, "torch"),
        ({"torch": 2.0, "transposed": 1.0, "phases": None}, "transposed"),
        ({"torch": None, "transposed": None, "phases": None}, "torch"),
    ],
)
def test_the_tuner_sets_the_fastest_form_everywhere(speed, taken, monkeypatch):
    pipeline, unet, vae = models()
    for part in (unet, vae):
        freeze_layers(part)
    plain = run(pipeline, unet)
    timer = Timer(monkeypatch, dict.fromkeys(FORMS, 0.0))

    def call():
        run(pipeline, unet)
        vae.decode(latents(8))

    timer.speed = speed
    set_forms("torch", unet, vae)  # as on a GPU, where a form that refuses must not be met before it is tried
    forms, found = tune([unet, vae], call, timer)
    assert {layer.form for layer in layers_of(unet, vae)} == {taken}
    assert summary(unet, vae) == f"{taken} in {len(layers_of(unet, vae))} layers"
    assert all(t.reason == f"no algorithm for {t.way}" for t in found if speed[t.way] is None)
    assert set(forms.values()) <= {taken}
    timer.speed = dict.fromkeys(FORMS, 0.0)
    torch.testing.assert_close(run(pipeline, unet), plain, rtol=1e-4, atol=1e-5)


def test_what_was_chosen_is_taken_again_without_looking_at_the_others(monkeypatch):
    pipeline, unet, _ = models()
    freeze_layers(unet)
    timer = Timer(monkeypatch, {"torch": 2.0, "transposed": 1.0, "phases": 3.0})
    kept = dict.fromkeys(tune([unet], lambda: run(pipeline, unet), timer)[0], "phases")
    reset_forms(unet)
    timer.timed.clear()
    forms, timings = tune([unet], lambda: None if timer.timed else run(pipeline, unet), timer, kept)
    assert forms == kept and not timings
    assert {layer.form for layer in layers_of(unet)} == {"phases"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forms_are_timed_in_the_layout_of_the_weights(layout, monkeypatch):
    """Which is fastest depends on it, and activations met eagerly may come in another than will run compiled."""
    pipeline, unet, _ = models()
    unet.to(memory_format=layout)
    freeze_layers(unet)
    timer = Timer(monkeypatch, {"torch": 2.0, "transposed": 1.0, "phases": 3.0})
    tune([unet], lambda: [run(pipeline, unet), timer.given.clear()], timer)
    assert timer.given and all(given.is_contiguous(memory_format=layout) for given in timer.given)


def test_summed_weights_held_and_to_come_are_the_same_in_every_form():
    _, unet, vae = models()
    for part in (unet, vae):
        freeze_layers(part)
        whole = sum(layer.conv.weight.nbytes * 16 // 9 for layer in layers_of(part))
        for form in FORMS:
            set_forms(form, part)
            held = sum(layer.folded.nbytes for layer in layers_of(part) if layer.folded is not None)
            assert held + folded_bytes(part) == whole > 0 and (held == 0) == (form == "torch")


def test_timings_are_told_a_line_a_shape():
    shape = (4, 64, 8, 8, 32)
    assert describe([Timing(shape, "torch", 2.0), Timing(shape, "phases", 1.0)]) == [
        "upsampling, 4 images of 64 x 8 x 8 to 32 channels: phases 1.000 ms, torch 2.000 ms"
    ]
