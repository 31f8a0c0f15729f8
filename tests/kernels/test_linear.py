"""Frozen linear layers: equal to torch's in values and gradients, whatever product they run on."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.linear import frozen_linear

SHAPES = [((2, 64, 80), 640), ((7, 3), 5), ((1, 1, 1), 1), ((512, 128), 1024), ((4, 0, 8), 6)]


def operands(shape, outputs, bias=True):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=generator), torch.randn(outputs, shape[-1], generator=generator)
    return x, w, torch.randn(outputs, generator=generator) if bias else None


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_values_and_gradient_equal_float64(shape, outputs, bias):
    x, w, b = operands(shape, outputs, bias)
    x.requires_grad_()
    y = frozen_linear(x, w, b)
    y.square().sum().backward()
    exact = x.detach().double().requires_grad_()
    true = F.linear(exact, w.double(), None if b is None else b.double())
    true.square().sum().backward()
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-2)


def test_inputs_of_any_layout():
    x, w, b = operands((6, 10, 8), 4)
    torch.testing.assert_close(frozen_linear(x.transpose(0, 1), w, b), F.linear(x.transpose(0, 1), w, b))
    torch.testing.assert_close(frozen_linear(x[:, ::2], w, b), F.linear(x[:, ::2], w, b))


def test_other_dtypes_take_torchs_product():
    x, w, b = operands((6, 8), 4)
    assert frozen_linear(x.double(), w.double(), b.double()).dtype == torch.float64
    assert frozen_linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


def test_without_onednn_torchs_product_runs_and_a_demand_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "has_onednn", lambda: False)
    x, w, b = operands((6, 8), 4)
    assert torch.equal(frozen_linear(x, w, b), F.linear(x, w, b))
    with pytest.raises(ValueError, match="onednn"):
        frozen_linear(x, w, b, implementation="onednn")


def test_a_layer_in_training_is_refused():
    x, w, b = operands((6, 8), 4)
    with pytest.raises(ValueError, match="frozen"):
        frozen_linear(x, w.requires_grad_(), b)
