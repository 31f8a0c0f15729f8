"""The gated linear unit against a * F.gelu(b) in fp64: value and gradient, and a feed-forward layer that trains."""

import copy

import pytest
import torch

from kernels.geglu import geglu, swap_geglu

# rows and 2 D: even, ragged, one row, tokens of several images, narrower than a vector
SHAPES = {"even": (8, 64), "ragged": (7, 38), "single_row": (1, 40), "tokens": (2, 5, 24), "narrow": (3, 2)}


def run(x, dy, dtype, implementation):
    x = x.to(dtype, copy=True).requires_grad_()
    y = geglu(x, implementation=implementation)
    y.backward(dy.to(dtype))
    return y.detach(), x.grad


def compare(check, device, dtype, x):
    x = x.to(device, dtype)
    g = torch.Generator().manual_seed(3)
    dy = torch.randn(*x.shape[:-1], x.shape[-1] // 2, generator=g).to(device, dtype)
    kinds = (dtype, "triton"), (dtype, "torch"), (torch.float64, "torch")
    check(*(run(x, dy, *kind) for kind in kinds), dtype, f"{list(x.shape)} {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape, dtype, device, as_good_as_eager):
    compare(as_good_as_eager, device, dtype, torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(2)))


def test_gates_far_out_on_either_side(device, as_good_as_eager):
    """gelu(b) is b above and 0 below, and no product of a huge and a vanishing number makes NaN of it."""
    gate = torch.tensor([-1e4, -40.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 1e4])
    x = torch.cat([torch.full_like(gate, 3.0), gate])[None]
    compare(as_good_as_eager, device, torch.float32, x)
    y = geglu(x.to(device), implementation="triton")
    torch.testing.assert_close(y[0, [0, 4, 7]].cpu(), torch.tensor([0.0, 0.0, 3e4]))


def test_strided_rows_are_copied(device):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(4)).to(device)
    for strided in (x[::2], x.t().contiguous().t(), x.expand(2, 6, 16)):
        ours, eager = (geglu(strided, implementation=name) for name in ("triton", "torch"))
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_a_feed_forward_layer_trains_the_same_with_the_kernel(device):
    FeedForward = pytest.importorskip("diffusers.models.attention").FeedForward
    torch.manual_seed(0)
    layers = {"torch": FeedForward(8, mult=2).to(device)}
    layers["triton"] = copy.deepcopy(layers["torch"])
    assert swap_geglu(layers["triton"], implementation="triton") == 1
    g = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, 4, 8, generator=g).to(device) for _ in range(2))
    traces = {}
    for name, layer in layers.items():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        traces[name] = []
        for _ in range(5):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            traces[name].append(loss.item())
    assert traces["torch"][-1] < 0.95 * traces["torch"][0]
    torch.testing.assert_close(torch.tensor(traces["triton"]), torch.tensor(traces["torch"]), rtol=1e-4, atol=1e-5)
