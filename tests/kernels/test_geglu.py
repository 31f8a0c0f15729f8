"""The gated linear unit by its formula, and its swap into diffusers' own modules."""

import copy
import math

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from kernels.geglu import FusedGEGLU, geglu, swap_geglu


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 8), (1, 2)])
def test_value_is_the_formula(shape):
    x = normal(*shape)
    a, b = x[..., : shape[-1] // 2], x[..., shape[-1] // 2 :]
    expected = a * b * 0.5 * (1 + torch.erf(b / math.sqrt(2)))
    torch.testing.assert_close(geglu(x), expected)


def test_gradient_is_that_of_the_docstring():
    x, dy = normal(4, 12).requires_grad_(), normal(4, 6, seed=1)
    geglu(x).backward(dy)
    a, b = x.detach().chunk(2, dim=1)
    below = 0.5 * (1 + torch.erf(b / math.sqrt(2)))
    density = torch.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(x.grad, torch.cat([dy * b * below, dy * a * (below + b * density)], dim=1))


def test_a_swapped_transformer_block_computes_the_same_and_keeps_its_state_dict():
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, activation_fn="geglu").eval()
    swapped = copy.deepcopy(block)
    assert swap_geglu(swapped) == 1 and swap_geglu(swapped) == 0
    assert isinstance(swapped.ff.net[0], FusedGEGLU) and list(swapped.state_dict()) == list(block.state_dict())
    swapped.load_state_dict(block.state_dict())
    x = normal(2, 5, 16).float()
    assert torch.equal(swapped(x), block(x))


def test_only_diffusers_exact_unit_is_swapped():
    class GEGLUOfSomeoneElse(nn.Module):
        proj = nn.Linear(2, 2)

    other = BasicTransformerBlock(16, 2, 8, activation_fn="geglu-approximate")
    assert swap_geglu(other) == 0 and swap_geglu(GEGLUOfSomeoneElse()) == 0
    assert swap_geglu(nn.Sequential(GEGLU(4, 6))) == 1


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 5), r"x_N2D is float32\[2, 5\] on cpu; expected \[\.\.\., 2 D\]"),
        (torch.zeros(0, 4), r"x_N2D is float32\[0, 4\] on cpu; expected .*not empty"),
        (torch.tensor(1.0), r"x_N2D is float32\[\] on cpu; expected"),
        (torch.zeros(2, 4, dtype=torch.int32), r"x_N2D is int32\[2, 4\] on cpu; expected float32 or float16"),
    ],
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        geglu(x)
