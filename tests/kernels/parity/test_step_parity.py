"""guided_step, pixels and views: what the kernel writes is what the definition writes."""

import itertools

import pytest
import torch

from kernels.guided_step import guided_step
from kernels.pixels import pixels
from kernels.views import UNIFORMS, draw_view_parameters, views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("prediction, parts", list(itertools.product(("epsilon", "v_prediction"), range(4))))
def test_guided_step(prediction, parts, device):
    g = torch.Generator().manual_seed(parts)
    S, shape = 4, (4, 5, 7)

    def normal(*leading, dtype=torch.float32):
        return torch.randn(*leading, *shape, generator=g).to(device, dtype)

    settings = {}
    unconditional = None if parts == 0 else normal(S, dtype=torch.float16)
    if parts == 2:
        unconditional = normal(2, dtype=torch.float16).to(memory_format=torch.channels_last)
        settings["unconditional_row_S"] = torch.tensor([1, -1, 0, -1], device=device)
    if parts == 3:
        settings |= dict(noise_SNchw=normal(S, 3), noise_step_S=torch.tensor([0, 2, 1, 0], device=device))
        settings |= dict(source_Schw=normal(S), eps_Schw=normal(S, dtype=torch.bfloat16))
        settings["mask_S1hw"] = (torch.rand(S, 1, 5, 7, generator=g) > 0.5).float().to(device)
    table = (torch.rand(6, 8, generator=g) + 0.1).to(device)
    row, guidance = torch.tensor([5, 0, 3, 3], device=device), torch.tensor([7.5, 3.0, 1.0, -1.0], device=device)
    conditional, z, x0_prev = normal(S, dtype=torch.float16), normal(S), normal(S)
    outcomes = []
    for implementation in ("triton", "torch"):
        state = z.clone(), x0_prev.clone()
        guided_step(
            conditional, unconditional, *state, table, row, guidance,
            prediction_type=prediction, implementation=implementation, **settings,
        )  # fmt: skip
        outcomes.append(state)
    for kernel, eager, before in zip(*outcomes, (z, x0_prev), strict=True):
        torch.testing.assert_close(kernel, eager, rtol=1e-5, atol=1e-5)
        assert (kernel != before).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, size", [((2, 24, 24), 16), ((1, 8, 8), 8), ((1, 12, 21), 18), ((1, 25, 15), 3)])
def test_pixels(shape, size, dtype, device):
    N, H, W = shape
    x = torch.randn(N, 3, H, W, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x[0, 0, 0, 0], x[0, 1, -1, -1], x[0, 2, 0, -1] = torch.nan, torch.inf, -torch.inf
    if N > 1:
        x = x.to(memory_format=torch.channels_last)
    kernel, eager = (pixels(x, size, implementation=name) for name in ("triton", "torch"))
    difference = (kernel.int() - eager.int()).abs()
    assert difference.max() <= 1  # a value on the edge of two levels may fall either way
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize(
    "height, width, size, dtype",
    [
        (8, 8, None, torch.float32),
        (9, 7, (12, 7), torch.float16),
        (6, 10, None, torch.bfloat16),
        (9, 12, 5, torch.float32),
        (1, 1, 2, torch.float32),
    ],
)
def test_views(height, width, size, dtype, device, as_good_as_eager):
    g = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (3, height, width, 3), generator=g, dtype=torch.uint8).to(device)
    uniforms = torch.rand(3, 2, UNIFORMS, generator=g, dtype=torch.float64)
    parameters = draw_view_parameters(uniforms, height, width, crop_scale=(0.2, 1.0))
    truth = views(images, parameters, MEAN, STD, torch.float32, size=size, implementation="torch")
    kernel, eager = (
        views(images, parameters, MEAN, STD, dtype, size=size, implementation=i) for i in ("triton", "torch")
    )
    as_good_as_eager([kernel], [eager], [truth], dtype)
    assert kernel.dtype == dtype and kernel.stride() == eager.stride()
