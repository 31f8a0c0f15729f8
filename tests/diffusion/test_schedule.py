"""The step table against diffusers' schedulers, driven by made-up model outputs: every solver, spacing and start."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.diffusion.schedule import COLUMNS, SOLVERS, StepTable, alphas_cumprod, build_scheduler, time_grid
from modules.errors import ConfigError
from modules.rules import lowest_strength
from tests.tiny import SCHEDULER

V = SCHEDULER | {"prediction_type": "v_prediction"}
TURBO = SCHEDULER | {"timestep_spacing": "trailing"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SIGMA_MIN = SCHEDULER | {"final_sigmas_type": "sigma_min"}


def model_output(i: int, shape=(1, 4, 3, 3)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).float()


def by_diffusers(config, solver, count, start, z0, eps):
    """What StableDiffusionImg2ImgPipeline's loop makes of made-up outputs; Euler's latents in its own scale."""
    scheduler = build_scheduler(config, solver)
    scheduler.set_timesteps(count)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    z = scheduler.add_noise(z0, eps, timesteps[:1])
    for i, t in enumerate(timesteps):
        scheduler.scale_model_input(z, t)
        extra = {"generator": torch.Generator().manual_seed(100 + i)} if solver == "lcm" else {}
        z = scheduler.step(model_output(i), t, z, **extra, return_dict=False)[0]
    return timesteps, z


def by_table(config, solver, count, start, z0, eps):
    grid = time_grid(config, solver, count)
    table = StepTable([grid])
    row, x0_prev, timesteps = table.start_row(grid.key, start), torch.zeros_like(z0), []
    z = table.table_R8[row, 0] * z0 + table.table_R8[row, 1] * eps
    i = 0
    while row:
        alpha, sigma, a, b, c, d, _, _ = table.table_R8[row]
        m = model_output(i)
        x0 = (z - sigma * m) / alpha if config.get("prediction_type") != "v_prediction" else alpha * z - sigma * m
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(100 + i))
        z, x0_prev = a * z + b * x0 + c * x0_prev + d * noise, x0
        timesteps.append(table.timestep_R[row].item())
        row, i = table.successor_R[row].item(), i + 1
    return torch.tensor(timesteps), z


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 4, 10, 20, 25])
@pytest.mark.parametrize("config", [SCHEDULER, V, TURBO], ids=["leading", "v", "trailing"])
def test_every_start_equals_diffusers(solver, count, config):
    generator = torch.Generator().manual_seed(7)
    z0, eps = torch.randn(2, 1, 4, 3, 3, generator=generator)
    for start in {0, count // 2, count - 1}:
        expected_timesteps, expected = by_diffusers(config, solver, count, start, z0, eps)
        timesteps, ours = by_table(config, solver, count, start, z0, eps)
        assert torch.equal(timesteps, expected_timesteps.float())
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("solver", "count", "config"),
    [
        ("dpmpp_2m", 10, SIGMA_MIN),
        ("dpmpp_2m", 14, SIGMA_MIN),  # the last count that ends in first order
        ("dpmpp_2m", 15, SIGMA_MIN),
        ("dpmpp_2m", 20, SIGMA_MIN),
        ("dpmpp_2m", 20, SCHEDULER | {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", 12, SCHEDULER | {"use_karras_sigmas": True}),
        ("euler", 10, SIGMA_MIN),
        ("euler", 10, SCHEDULER | {"use_karras_sigmas": True}),
        ("euler", 10, SCHEDULER | {"timestep_spacing": "linspace"}),
        ("ddim", 10, SCHEDULER | {"set_alpha_to_one": True}),
        ("ddim", 10, ZERO_SNR),
        ("ddim", 10, SCHEDULER | {"timestep_spacing": "linspace", "beta_schedule": "linear"}),
    ],
)
def test_endings_spacings_and_schedules_equal_diffusers(solver, count, config):
    generator = torch.Generator().manual_seed(8)
    z0, eps = torch.randn(2, 1, 4, 3, 3, generator=generator)
    for start in (0, 3):
        _, expected = by_diffusers(config, solver, count, start, z0, eps)
        _, ours = by_table(config, solver, count, start, z0, eps)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_starts_of_stable_diffusion_are_the_known_ones():
    grid = time_grid(SCHEDULER, "ddim", 50)
    assert grid.timesteps[grid.start(0.5)] == 481
    assert time_grid(SCHEDULER, "ddim", 25).timesteps[25 - 12] == 441
    assert grid.amplitude(0) == pytest.approx(0.076, abs=1e-3)
    assert time_grid(SCHEDULER, "ddim", 25).amplitude(0) == pytest.approx(0.085, abs=1e-3)


@given(st.integers(1, 100), st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_start_counts_as_diffusers_or_refuses(count, strength):
    grid = time_grid(SCHEDULER, "ddim", 2)
    grid = type(grid)("ddim", count, (0.0,) * count, grid.steps_N8, grid.starts_N8, count)
    steps = min(int(count * strength), count)
    if steps == 0:
        with pytest.raises(ConfigError, match="returns the source"):
            grid.start(strength)
    else:
        assert grid.start(strength) == count - steps


def test_the_strength_advised_takes_a_step():
    for steps in range(1, 1001):
        lowest = lowest_strength(steps)
        assert int(steps * lowest) == 1 and lowest < 1.02 / steps, steps
    grid = time_grid(SCHEDULER, "ddim", 3)
    with pytest.raises(ConfigError) as refused:
        grid.start(0.333)
    assert grid.start(float(re.search("at least ([.0-9]+)", str(refused.value))[1])) == 2


def test_only_lcm_is_stochastic_and_never_in_its_last_step():
    noise = COLUMNS.index("d")
    for solver in SOLVERS:
        grid = time_grid(SCHEDULER, solver, 4)
        assert grid.stochastic == (solver == "lcm")
        assert grid.steps_N8[-1, noise] == 0


def test_grids_share_a_table_and_keep_their_rows():
    grids = [time_grid(SCHEDULER, "ddim", 5, guided_steps=3), time_grid(SCHEDULER, "lcm", 4)]
    table = StepTable(grids)
    assert len(table.table_R8) == 1 + 2 * 5 + 2 * 4
    assert table.guidance_ends and not StepTable(grids[1:]).guidance_ends
    for grid in grids:
        row = table.start_row(grid.key, 1)
        assert torch.equal(table.table_R8[row], grid.starts_N8[1])
        following = table.successor_R[row]
        assert torch.equal(table.table_R8[following], grid.steps_N8[2])
        noises = [table.noise_R[row].item(), table.noise_R[following].item()]
        assert noises == ([1, 2] if grid.stochastic else [0, 0])
    guided = [table.guided_R[table.start_row(grids[0].key, i)].item() for i in range(5)]
    assert guided == [True, True, True, False, False]


def test_an_idle_slot_stays_as_it_is():
    alpha, sigma, a, b, c, d, alpha_next, sigma_next = StepTable([]).table_R8[0]
    assert (a, b, c, d, alpha_next, sigma_next) == (1, 0, 0, 0, 1, 0) and alpha == 1 and sigma == 0


def test_abar_is_diffusers():
    torch.testing.assert_close(
        alphas_cumprod(SCHEDULER)[[0, 999]], torch.tensor([0.99915, 0.00466]), atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("solver", "count", "message"),
    [("heun", 10, "choose one of"), ("ddim", 0, "1 to 1000"), ("ddim", 1001, "1 to 1000"), ("ddim", 1000, "t = 1000")],
)
def test_grids_that_do_not_exist_are_refused(solver, count, message):
    with pytest.raises(ConfigError, match=message):
        time_grid(SCHEDULER, solver, count)


def test_lcm_has_no_more_steps_than_its_distillation():
    with pytest.raises(ConfigError, match="distilled on 50"):
        time_grid(SCHEDULER, "lcm", 51)
