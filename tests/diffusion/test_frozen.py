"""Frozen layers of the UNet: the same model, and one that still lets gradients through to its text."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from modules.diffusion.frozen import FrozenLinear, freeze_layers
from tests.diffusion.engine import tiny_pipeline


def call(unet, context):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    return unet(z, torch.tensor([10.0, 700.0]), context).sample


def test_outputs_and_the_gradient_of_the_text_stay():
    pipeline = tiny_pipeline.__wrapped__()  # of its own: engines freeze the one that tests share
    plain, frozen = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.unet)
    layers = sum(type(layer) in (torch.nn.Linear, Upsample2D) for layer in plain.modules())
    assert freeze_layers(frozen) == layers > 10
    assert freeze_layers(frozen) == layers  # once is enough, twice changes nothing
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    contexts = [pipeline.embed(["a photo of a gear", ""]).detach().requires_grad_() for _ in range(2)]
    outputs = [call(unet, context) for unet, context in zip((plain, frozen), contexts, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    assert contexts[0].grad.abs().sum() > 0
    torch.testing.assert_close(contexts[0].grad, contexts[1].grad, rtol=1e-3, atol=1e-5)


def test_a_copy_is_frozen_too():
    own = copy.deepcopy(tiny_pipeline().unet)
    freeze_layers(own)
    assert any(isinstance(layer, FrozenLinear) for layer in copy.deepcopy(own).modules())


def test_a_model_in_training_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="model.0.weight requires a gradient"):
        freeze_layers(model)
    assert type(model[0]) is torch.nn.Linear
