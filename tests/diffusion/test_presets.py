"""Presets: each changes what it says, refuses without its weights, and its images are those of its own grid."""

import dataclasses

import pytest

from modules import config
from modules.diffusion.presets import plan
from modules.diffusion.schedule import time_grid
from modules.errors import ConfigError
from tests.diffusion.engine import Engine, tiny_pipeline
from tests.tiny import SCHEDULER

SD15 = dataclasses.replace(config.Generation(), solver="ddim", num_inference_steps=50, guidance_scale=7.5)
TURBO = (("scheduler", (("_class_name", "EulerDiscreteScheduler"), ("timestep_spacing", "trailing"))),)
LCM = (("time_cond_proj_dim", 64), ("scheduler", (("_class_name", "LCMScheduler"),)))


def test_exact_leaves_everything_as_it_is():
    made = plan("exact", SD15, tiny_pipeline())
    assert (made.solver, made.num_inference_steps, made.guidance_scale) == ("ddim", 50, 7.5)
    grid, start = made.grids(tiny_pipeline().scheduler).at(0.5)
    assert (grid.solver, grid.num_inference_steps, grid.guided_steps, start) == ("ddim", 50, 50, 25)
    assert made.resolution == 32


def test_fast_takes_ten_calls_with_guidance_on_seven_where_exact_takes_twenty_five():
    scheduler = tiny_pipeline().scheduler
    taken = {name: plan(name, SD15, tiny_pipeline()).grids(scheduler).at(0.5) for name in ("exact", "fast")}
    assert {name: grid.num_inference_steps - start for name, (grid, start) in taken.items()} == {
        "exact": 25,
        "fast": 10,
    }
    grid, start = taken["fast"]
    assert grid.solver == "dpmpp_2m" and grid.guided_steps - start == 7


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(("solver", "count"), [("ddim", 25), ("euler", 12)])
def test_fast_begins_where_exact_does_at_every_strength(solver, count, spacing):
    scheduler = SCHEDULER | {"timestep_spacing": spacing}
    settings = dataclasses.replace(SD15, solver=solver, num_inference_steps=count)
    exact, fast = (plan(name, settings, tiny_pipeline()).grids(scheduler) for name in ("exact", "fast"))
    finer = [time_grid(scheduler, "dpmpp_2m", steps).timesteps for steps in range(1, 2 * count + 1)]
    for steps in range(1, count + 1):
        (full, begin), (grid, start) = (grids.at((steps + 0.5) / count) for grids in (exact, fast))
        fewer = grid.num_inference_steps - start
        assert fewer == min(steps, max(2, round(0.4 * steps)))
        assert max(0, grid.guided_steps - start) >= 0.7 * fewer, "most steps are guided, however low the noise"
        others = [timesteps[-fewer] for timesteps in finer if len(timesteps) >= fewer]
        away = abs(grid.timesteps[start] - full.timesteps[begin])
        assert away == min(abs(t - full.timesteps[begin]) for t in others), "no other grid begins nearer"
        assert grid.key in {one.key for one in fast.every}
    assert exact.every == [exact.full]


def test_fast_says_what_becomes_of_each_strength():
    settings = dataclasses.replace(SD15, num_inference_steps=25, strengths={0.75: 1.0, 0.16: 3.0, 0.5: 0.0})
    made = plan("fast", settings, tiny_pipeline())
    assert made.sampler == "dpmpp_2m for ddim, 25 steps"
    assert made.reasons == (
        "strength 0.16 in 2 steps of dpmpp_2m for 4 of ddim, all guided",
        "strength 0.75 in 7 steps of dpmpp_2m for 18 of ddim, the last 2 without guidance",
    )


def test_faster_needs_a_tiny_decoder_and_makes_smaller_images():
    with pytest.raises(ConfigError, match="faster decodes with an AutoencoderTiny"):
        plan("faster", SD15, tiny_pipeline())
    pipeline = tiny_pipeline((("tiny_vae", True), ("resolution", 512)))
    made = plan("faster", SD15, pipeline)
    assert made.resolution == 384 and any("384 px for 512" in reason for reason in made.reasons)
    assert plan("faster", SD15, pipeline, resolution_is_set=True).resolution == 512
    assert plan("faster", SD15, tiny_pipeline((("tiny_vae", True),))).resolution == 32


def test_turbo_needs_weights_distilled_for_it():
    with pytest.raises(ConfigError, match="turbo needs weights distilled .* is sd1"):
        plan("turbo", SD15, tiny_pipeline())
    made = plan("turbo", SD15, tiny_pipeline(TURBO))
    assert (made.solver, made.num_inference_steps, made.guidance_scale) == ("euler", 4, 1.0)
    made = plan("turbo", SD15, tiny_pipeline(LCM))
    assert (made.solver, made.num_inference_steps, made.guidance_scale) == ("lcm", 4, 7.5)


@pytest.mark.parametrize(
    ("steps", "strength", "advice"),
    [
        (50, 0.2, "at least 0.25 or set pipeline.preset to exact, as this preset takes at most 4 steps"),
        (2, 0.2, "at least 0.5 or set pipeline.preset to exact, as this preset takes at most 4 steps"),
        (2, 0.3, "at least 0.5 or raise generation.num_inference_steps$"),
    ],
)
def test_advice_on_a_strength_that_takes_no_step_of_turbo_is_one_that_helps(steps, strength, advice):
    pipeline = tiny_pipeline(TURBO)
    settings = dataclasses.replace(SD15, num_inference_steps=steps)
    with pytest.raises(ConfigError, match=advice):
        plan("turbo", settings, pipeline).grids(pipeline.scheduler).at(strength)
    with pytest.raises(ConfigError, match="or raise generation.num_inference_steps$"):
        plan("fast", SD15, pipeline).grids(pipeline.scheduler).at(0.01)
    helped = ("turbo", 4) if "raise" in advice else ("exact", 50)
    settings = dataclasses.replace(SD15, solver="euler", num_inference_steps=helped[1])
    assert plan(helped[0], settings, pipeline).grids(pipeline.scheduler).at(strength)[1] < helped[1]


def test_a_consistency_model_is_not_sampled_as_if_it_were_none():
    with pytest.raises(ConfigError, match="latent consistency model; set generation.solver to lcm"):
        plan("exact", SD15, tiny_pipeline(LCM))
    with pytest.raises(
        ConfigError, match="pipeline.preset fast is dpmpp_2m, .*latent consistency model; set it to turbo"
    ):
        plan("fast", dataclasses.replace(SD15, solver="lcm"), tiny_pipeline(LCM))
    assert plan("exact", dataclasses.replace(SD15, solver="lcm"), tiny_pipeline(LCM)).solver == "lcm"


def test_every_reason_is_a_phrase_for_the_run_card():
    for name in ("exact", "fast"):
        reasons = plan(name, SD15, tiny_pipeline()).reasons
        assert reasons and all(reason == reason.strip() and reason for reason in reasons)


def test_guidance_off_at_low_noise_stays_close_to_guidance_throughout():
    pipeline = tiny_pipeline()
    grid, _ = plan("fast", SD15, pipeline).grids(pipeline.scheduler).at(0.5)
    images = []
    for guided in (grid.num_inference_steps, grid.guided_steps, 0):
        engine = Engine("dpmpp_2m", grid.num_inference_steps, strengths=(0.5,), guided_steps=guided, slots=2)
        engine.make(2)
        images.append(engine.finished[0])
    assert 0 < (images[1] - images[0]).abs().mean() < 0.3 * (images[2] - images[0]).abs().mean()
