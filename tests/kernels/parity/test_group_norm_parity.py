"""Group norm with SiLU against F.group_norm in fp64: values and all three gradients."""

import pytest
import torch

from kernels.group_norm import group_norm_silu

# [N, C, H, W], groups: even, ragged channels and pixels, one pixel, several chunks, tokens instead of a plane
SHAPES = {
    "even": ((2, 32, 4, 8), 8),
    "ragged": ((2, 20, 5, 7), 4),
    "one_pixel": ((3, 12, 1, 1), 2),
    "chunks": ((1, 6, 5, 11), 1),
    "one_channel_a_group": ((1, 4, 3, 3), 4),
    "tokens": ((2, 16, 10), 4),
}


def run(tensors, groups, dtype, implementation, silu, dy):
    x, weight, bias = (
        t.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    )
    y = group_norm_silu(x, groups, weight, bias, silu=silu, implementation=implementation)
    y.backward(dy.to(dtype))
    return y.detach(), x.grad, weight.grad, bias.grad


def compare(check, device, dtype, shape, groups, silu=True, mean=0.5, spread=1.0, channels_last=True):
    g = torch.Generator().manual_seed(7)
    x = (torch.randn(shape, generator=g) * spread + mean).to(device, dtype)
    if channels_last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=g).to(device, dtype) for _ in range(2))
    dy = torch.randn(shape, generator=g).to(device, dtype)
    outcomes = [
        run((x, weight, bias), groups, kind, implementation, silu, dy)
        for kind, implementation in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch"))
    ]
    check(*outcomes, dtype, f"{shape} {dtype}")
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape, dtype, device, as_good_as_eager):
    if shape != "one_channel_a_group" or dtype == torch.float32:
        compare(as_good_as_eager, device, dtype, *SHAPES[shape])


def test_without_silu(device, as_good_as_eager):
    compare(as_good_as_eager, device, torch.float32, *SHAPES["even"], silu=False)


def test_a_large_mean_does_not_cancel(device, as_good_as_eager):
    """Sums of squares would lose all digits of a variance 1e-6 of the squared mean."""
    compare(as_good_as_eager, device, torch.float32, *SHAPES["chunks"], mean=1000.0)


def test_saturated_activations_stay_finite(device):
    x = torch.zeros(1, 4, 2, 2, device=device)
    bias = torch.tensor([-200.0, 200.0, -1e4, 1e4], device=device).requires_grad_()
    y = group_norm_silu(x, 2, torch.ones(4, device=device), bias, implementation="triton")
    y.sum().backward()
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([0.0, 200.0, 0.0, 1e4], device=device))
    torch.testing.assert_close(bias.grad, torch.tensor([0.0, 4.0, 0.0, 4.0], device=device))


def test_answers_in_channels_last_whatever_it_was_given(device, as_good_as_eager):
    kernel = compare(as_good_as_eager, device, torch.float32, *SHAPES["even"], channels_last=False)[0]
    assert kernel[0].is_contiguous(memory_format=torch.channels_last)
