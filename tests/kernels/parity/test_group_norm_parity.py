"""Group norm with SiLU against F.group_norm in fp64: values and all three gradients."""

import copy

import pytest
import torch

from kernels import backend
from kernels.group_norm import group_norm_silu, swap_group_norm

# [N, C, H, W], groups: even, ragged channels and pixels, one pixel, several chunks, tokens instead of a plane
SHAPES = {
    "even": ((2, 32, 4, 8), 8),
    "ragged": ((2, 20, 5, 7), 4),
    "one_pixel": ((3, 12, 1, 1), 2),
    "chunks": ((1, 6, 5, 11), 1),
    "one_channel_a_group": ((1, 4, 3, 3), 4),
    "tokens": ((2, 16, 10), 4),
}
if not backend.interpreted():  # compiled, several chunks of pixels and several blocks of channels
    SHAPES |= {"unet": ((2, 320, 64, 64), 32), "decoder": ((1, 128, 96, 80), 32)}


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


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 8, 5), (1, 4, 2, 3, 2)])
def test_the_answer_may_be_changed_in_place(shape, device):
    """As the definition's: a view made inside a Function would refuse it."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=g).to(device) for _ in range(2))
    gradients = []
    for name in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        y = group_norm_silu(leaf, 2, weight, bias, implementation=name)
        y.mul_(2)
        y.backward(dy)
        gradients.append((y.detach(), leaf.grad))
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_weight_and_bias_may_be_strided(device):
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    weight, bias = torch.arange(8.0, device=device)[::2], torch.tensor(0.5, device=device).expand(4)
    ours, eager = (group_norm_silu(x, 2, weight, bias, implementation=name) for name in ("triton", "torch"))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_a_diffusers_resnet_trains_the_same_with_the_kernel(device):
    """Swapped into a resnet with a time embedding: five steps of both take the same course."""
    ResnetBlock2D = pytest.importorskip("diffusers.models.resnet").ResnetBlock2D
    torch.manual_seed(0)
    blocks = {"torch": ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=6, groups=4, groups_out=4).to(device)}
    blocks["triton"] = copy.deepcopy(blocks["torch"])
    assert swap_group_norm(blocks["triton"], implementation="triton") == 2
    g = torch.Generator().manual_seed(1)
    x, temb, target = (torch.randn(s, generator=g).to(device) for s in ((2, 8, 4, 4), (2, 6), (2, 8, 4, 4)))
    traces = {}
    for name, block in blocks.items():
        optimizer = torch.optim.SGD(block.parameters(), lr=0.2)
        traces[name] = []
        for _ in range(5):
            loss = (block(x, temb) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            traces[name].append(loss.item())
    assert traces["torch"][-1] < 0.9 * traces["torch"][0]
    torch.testing.assert_close(torch.tensor(traces["triton"]), torch.tensor(traces["torch"]), rtol=1e-4, atol=1e-5)
