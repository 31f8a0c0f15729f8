"""guided_step, pixels and views: what the kernel writes is as near to float64 as what the definition writes."""

import itertools

import pytest
import torch

from kernels import backend
from kernels import guided_step as guided_step_module
from kernels.guided_step import guided_step
from kernels.pixels import pixels
from kernels.views import UNIFORMS, draw_view_parameters, views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def truth_of_a_step(
    conditional, unconditional, z, x0_prev, table, row, guidance, prediction="epsilon", unconditional_row_S=None,
    noise_SNchw=None, noise_step_S=None, mask_S1hw=None, source_Schw=None, eps_Schw=None,
):  # fmt: skip
    """One step in float64, slot by slot."""
    after, clean = torch.empty_like(z, dtype=torch.float64), torch.empty_like(z, dtype=torch.float64)
    for s in range(len(z)):
        alpha, sigma, a, b, c, d, alpha_next, sigma_next = table[row[s]].double()
        e, w = conditional[s].double(), guidance[s].double()
        u_row = s if unconditional_row_S is None else int(unconditional_row_S[s])
        if unconditional is not None and w != 1 and u_row >= 0:
            u = unconditional[u_row].double()
            e = u + w * (e - u)
        now = z[s].double()
        clean[s] = (now - sigma * e) / alpha if prediction == "epsilon" else alpha * now - sigma * e
        after[s] = a * now + b * clean[s] + c * x0_prev[s].double()
        if noise_SNchw is not None:
            after[s] += d * noise_SNchw[s, noise_step_S[s]].double()
        if mask_S1hw is not None:
            m = mask_S1hw[s].double()
            kept = alpha_next * source_Schw[s].double() + sigma_next * eps_Schw[s].double()
            after[s] = m * after[s] + (1 - m) * kept
    return after, clean


@pytest.mark.parametrize("prediction, parts", list(itertools.product(("epsilon", "v_prediction"), range(4))))
def test_guided_step(prediction, parts, device, as_good_as_eager):
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
    truth = truth_of_a_step(
        conditional, unconditional, z, x0_prev, table, row, guidance, prediction=prediction, **settings
    )
    as_good_as_eager(*outcomes, truth, torch.float32, f"{prediction} {parts}")
    for kernel, before in zip(outcomes[0], (z, x0_prev), strict=True):
        assert (kernel != before).any(dim=(1, 2, 3)).all()


def test_a_guided_step_is_one_launch(device, monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = guided_step_module._guided_step_kernel
    monkeypatch.setattr(guided_step_module, "_guided_step_kernel", Counted())
    c, u, z, x0 = torch.randn(4, 2, 4, 3, 3, device=device).unbind()
    row, guidance = torch.tensor([0, 1], device=device), torch.tensor([7.5, 1.0], device=device)
    guided_step(c, u, z, x0, torch.rand(2, 8, device=device) + 0.1, row, guidance, implementation="triton")
    assert len(launches) == 1


@pytest.mark.parametrize("wrong", ["row", "unconditional_row", "noise_step"])
def test_a_row_that_does_not_exist_is_not_read_but_makes_nan_of_its_slot(wrong, device, monkeypatch):
    """A GPU is not waited for to look at the rows; what the kernel would find beyond a table is not a latent."""
    monkeypatch.setattr(guided_step_module, "_check_rows", lambda *_: None)
    c, u, z, x0 = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    at = {name: torch.tensor([0, 1], device=device) for name in ("row", "unconditional_row", "noise_step")}
    at[wrong][1] = 10**9
    guided_step(
        c, u, z, x0, torch.rand(2, 8, device=device) + 0.1, at["row"], torch.tensor([7.5, 7.5], device=device),
        unconditional_row_S=at["unconditional_row"], noise_step_S=at["noise_step"],
        noise_SNchw=torch.randn(2, 2, 4, 3, 3, device=device), implementation="triton",
    )  # fmt: skip
    assert z[0].isfinite().all() and z[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 3, 5, 7), (1, 4, 1, 1)], ids=["even", "ragged", "single_slot"])
def test_a_masked_step_against_float64(shape, dtype, device, as_good_as_eager):
    g = torch.Generator().manual_seed(sum(shape))
    conditional, unconditional, z, x0_prev, source, eps = (torch.randn(shape, generator=g).to(device) for _ in range(6))
    conditional, unconditional, source, eps = (t.to(dtype) for t in (conditional, unconditional, source, eps))
    conditional = conditional.to(memory_format=torch.channels_last)
    S = shape[0]
    mask = (torch.rand(S, 1, *shape[2:], generator=g) > 0.5).to(device, dtype)
    table = (torch.rand(5, 8, generator=g) + 0.2).to(device)
    row = torch.randint(0, 5, (S,), generator=g).to(device)
    guidance = torch.tensor([7.5, 1.0, -2.0])[:S].to(device)
    if S > 1:
        unconditional[1] = torch.nan  # its slot has guidance 1 and must not read it
    arguments = (conditional, unconditional, z, x0_prev, table, row, guidance)
    outcomes = []
    for implementation in ("triton", "torch"):
        state = z.clone(), x0_prev.clone()
        guided_step(
            conditional, unconditional, *state, table, row, guidance, mask_S1hw=mask, source_Schw=source, eps_Schw=eps,
            implementation=implementation,
        )  # fmt: skip
        outcomes.append(state)
    truth = truth_of_a_step(*arguments, mask_S1hw=mask, source_Schw=source, eps_Schw=eps)
    as_good_as_eager(*outcomes, truth, torch.float32, f"{shape} {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, size", [((2, 24, 24), 16), ((1, 8, 8), 8), ((1, 12, 21), 18), ((1, 25, 15), 3)])
def test_pixels(shape, size, dtype, device, as_good_as_eager):
    N, H, W = shape
    x = torch.randn(N, 3, H, W, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x[0, 0, 0, 0], x[0, 1, -1, -1], x[0, 2, 0, -1] = torch.nan, torch.inf, -torch.inf
    if N > 1:
        x = x.to(memory_format=torch.channels_last)
    compare_pixels(as_good_as_eager, x, size)


@pytest.mark.parametrize("kind", ["black", "white", "middle", "overshoots", "nan"])
def test_pixels_at_the_ends_of_the_scale(kind, device, as_good_as_eager):
    level = {"black": -1.0, "white": 1.0, "middle": 0.0, "overshoots": 0.0, "nan": torch.nan}[kind]
    x = torch.full((1, 3, 10, 14), level, device=device)
    if kind == "overshoots":
        x = torch.randn(1, 3, 10, 14, generator=torch.Generator().manual_seed(2)).mul(1e4).to(device)
    compare_pixels(as_good_as_eager, x, 4)


def compare_pixels(as_good_as_eager, x, size):
    """Against the level before it is rounded, in float64: both round to whole levels, so both are as far from it."""
    kernel, eager = (pixels(x, size, implementation=name) for name in ("triton", "torch"))
    clamped = x.double().nan_to_num(nan=-1.0).clamp(-1, 1)
    resized = torch.nn.functional.interpolate(clamped, (size, size), mode="bilinear", antialias=True)
    truth = (127.5 * resized + 127.5).permute(0, 2, 3, 1)
    as_good_as_eager([kernel], [eager], [truth], torch.float32, f"{list(x.shape)} {x.dtype}")
    assert (kernel.double() - truth).abs().max() <= 0.5 + 1e-3


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
    compare_views(as_good_as_eager, g, torch.randint(0, 256, (3, height, width, 3), generator=g), size, dtype, device)


@pytest.mark.skipif(backend.interpreted(), reason="many blocks: compiled kernels only")
@pytest.mark.parametrize(
    "side, size, dtype", [(64, None, torch.float32), (224, None, torch.bfloat16), (200, 96, torch.float16)]
)
def test_views_of_the_sizes_that_are_trained_with(side, size, dtype, device, as_good_as_eager):
    g = torch.Generator().manual_seed(side)
    compare_views(as_good_as_eager, g, torch.randint(0, 256, (4, side, side, 3), generator=g), size, dtype, device)


@pytest.mark.parametrize("kind", ["black", "white", "gray", "primary"])
def test_views_of_a_single_image_without_hue_or_at_the_ends_of_the_scale(kind, device, as_good_as_eager):
    g = torch.Generator().manual_seed(5)
    image = torch.full((1, 6, 7, 3), {"black": 0, "white": 255, "gray": 128, "primary": 0}[kind])
    if kind == "primary":
        image.scatter_(3, torch.randint(0, 3, (1, 6, 7, 1), generator=g), 255)
    compare_views(as_good_as_eager, g, image, None, torch.float32, device)


def compare_views(as_good_as_eager, g, images, size, dtype, device):
    images, (B, height, width, _) = images.to(device, torch.uint8), images.shape
    uniforms = torch.rand(B, 2, UNIFORMS, generator=g, dtype=torch.float64)
    parameters = draw_view_parameters(uniforms, height, width, crop_scale=(0.2, 1.0))
    truth = views(images, parameters, MEAN, STD, torch.float32, size=size, implementation="torch")
    kernel, eager = (
        views(images, parameters, MEAN, STD, dtype, size=size, implementation=i) for i in ("triton", "torch")
    )
    as_good_as_eager([kernel], [eager], [truth], dtype)
    assert kernel.dtype == dtype and kernel.stride() == eager.stride()
