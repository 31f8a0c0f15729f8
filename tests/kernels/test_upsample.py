"""Upsampling and its convolution as one: every form equals the definition in values and gradient, on odd inputs too."""

import pytest
import torch

from kernels.upsample import FORMS, fold, upsample_conv, upsample_conv_reference

SHAPES = [(2, 5, 6, 4, 7), (1, 1, 1, 1, 1), (3, 4, 2, 1, 5), (0, 3, 2, 4, 4), (64, 8, 16, 8, 8)]


def operands(N, I, O, h, w, bias=True):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, I, h, w, generator=generator), torch.randn(O, I, 3, 3, generator=generator)
    return x, weight, torch.randn(O, generator=generator) if bias else None


def definition(x, weight, bias):
    return upsample_conv_reference(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradient_equal_float64(form, shape, bias):
    x, weight, b = operands(*shape, bias=bias)
    N, _, O, h, w = shape  # noqa: E741
    x.requires_grad_()
    y = upsample_conv(x, fold(weight, form), b, form=form)
    y.square().sum().backward()
    exact = x.detach().requires_grad_()
    true = definition(exact, weight, b)
    true.square().sum().backward()
    assert y.shape == (N, O, 2 * h, 2 * w)
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_any_layout(form):
    x, weight, b = operands(2, 5, 6, 4, 7)
    for layout in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        y = upsample_conv(layout, fold(weight, form), b, form=form)
        torch.testing.assert_close(y.double(), definition(layout, weight, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("form", FORMS)
def test_half_types_round_the_summed_weights_once(form, dtype):
    """Summed weights have no exact half: beside the rounding of the output, which both have, there is theirs."""
    x, weight, b = (tensor.to(dtype) for tensor in operands(2, 32, 16, 6, 6))
    true = definition(x, weight, b)
    eager = (upsample_conv_reference(x, weight, b).double() - true).abs().mean()
    error = (upsample_conv(x, fold(weight, form), b, form=form).double() - true).abs().mean()
    assert 0 < error < 3 * eager


def test_an_output_reads_the_pixels_it_should():
    """One pixel of ones under weights 1 to 9: what each output gets can be added up by hand."""
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    for form in FORMS:
        made = upsample_conv(torch.ones(1, 1, 1, 1), fold(weight, form), None, form=form)
        assert made.flatten().tolist() == [5 + 6 + 8 + 9, 4 + 5 + 7 + 8, 2 + 3 + 5 + 6, 1 + 2 + 4 + 5]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, w: fold(w, "winograd"), "form is 'winograd'"),
        (lambda x, w: fold(w[..., :2], "phases"), r"weight_OI33 is float32\[6, 5, 3, 2\]"),
        (lambda x, w: upsample_conv(x, fold(w, "phases"), form="transposed"), r"folded is float32\[24, 5, 2, 2\]"),
        (lambda x, w: upsample_conv(x.double(), fold(w, "phases"), form="phases"), "expected float64"),
        (lambda x, w: upsample_conv(x, w, form="nearest"), "form is 'nearest'"),
    ],
)
def test_bad_arguments_are_named(call, named):
    x, weight, _ = operands(2, 5, 6, 4, 7)
    with pytest.raises(ValueError, match=named):
        call(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize("form", FORMS)
def test_forms_on_a_gpu(form, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # ten bits of a product would hide in no tolerance
    x, weight, b = (tensor.cuda().to(dtype) for tensor in operands(4, 320, 320, 16, 16))
    x, folded = (t.contiguous(memory_format=torch.channels_last) for t in (x, fold(weight, form)))
    true = definition(x, weight, b)
    eager = (upsample_conv_reference(x, weight, b).double() - true).abs().mean()
    error = (upsample_conv(x, folded, b, form=form).double() - true).abs().mean()
    assert error < 3 * eager + 1e-6
