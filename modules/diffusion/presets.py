"""Presets trade the exact sampler for speed; the resulting plan says what was changed and why.

exact uses the settings as they are. fast begins an image at the same noise, takes fewer steps of a second-order solver,
and leaves guidance out in the last of them, where it matters least. faster adds a tiny decoder and a smaller image.
turbo is for weights distilled to a few steps. The lossy presets have to pass a quality gate (benchmarks/quality.py)
before any of their figures is quoted.
"""

from dataclasses import dataclass, replace

from modules.config import Generation
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.schedule import Grid, Grids, time_grid
from modules.errors import ConfigError
from modules.rules import steps_taken, used_strengths

FAST_SOLVER = "dpmpp_2m"
FAST_SHARE = 0.4  # steps of fast per step of exact: 10 instead of 25, though never fewer than LEAST_STEPS
LEAST_STEPS = 2
UNGUIDED_SHARE = 0.3  # of these steps, rounded down: the last 3 of 10, and none of 2 or 3
FASTER_SHARE = 0.75  # of the UNet's own resolution: 384 px instead of 512
TURBO_STEPS = 4
SHORTENING = ("fast", "faster")  # presets that take fewer steps than a strength counts


@dataclass(frozen=True)
class Plan:
    """The settings of generation as a preset changes them."""

    preset: str
    solver: str  # this solver's grid of num_inference_steps is the one that strengths are counted on
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    reasons: tuple[str, ...]

    def grids(self, scheduler: dict) -> Grids:
        """The plan's time grids on a pipeline's scheduler config."""
        grid = time_grid(scheduler, self.solver, self.num_inference_steps)
        full = replace(grid, most_steps=TURBO_STEPS if self.preset == "turbo" else None)
        return Grids(full, _shorter(scheduler, full) if self.preset in SHORTENING else ())

    @property
    def sampler(self) -> str:
        """Solver and steps in words."""
        whole = f"{self.solver}, {self.num_inference_steps} steps"
        return f"{FAST_SOLVER} for {whole}" if self.preset in SHORTENING else whole


def plan(preset: str, generation: Generation, pipeline: StableDiffusion, resolution_is_set: bool = False) -> Plan:
    """The plan of a preset for config section `generation` on a pipeline.

    Args:
        resolution_is_set: the user chose pipeline.resolution; then no preset changes it.

    Raises:
        ConfigError: the preset needs weights that the pipeline lacks, or the solver does not suit the weights.
    """
    solver, steps, scale = generation.solver, generation.num_inference_steps, generation.guidance_scale
    if preset == "turbo":
        return _turbo(generation, pipeline)
    sampler = solver if preset == "exact" else FAST_SOLVER
    if pipeline.family == "lcm" and sampler != "lcm":
        asked = f"generation.solver is {solver}" if preset == "exact" else f"pipeline.preset {preset} is {sampler}"
        remedy = "generation.solver to lcm or pipeline.preset to turbo" if preset == "exact" else "it to turbo"
        raise ConfigError(f"{asked}, but {pipeline.source} is a latent consistency model; set {remedy}")
    if preset == "exact":
        return Plan(preset, solver, steps, scale, pipeline.resolution, ("as configured",))
    resolution = preset_resolution(preset, pipeline.resolution, resolution_is_set)
    reasons = [_of_strength(generation, strength) for strength in sorted(used_strengths(generation))]
    if preset == "faster":
        if type(pipeline.vae).__name__ != "AutoencoderTiny":
            raise ConfigError(
                "pipeline.preset faster decodes with an AutoencoderTiny (TAESD), and this pipeline has none; set "
                "pipeline.vae to its folder or pipeline.preset to fast"
            )
        if not resolution_is_set:
            own = pipeline.resolution
            reasons.append(f"{resolution} px for {own}" if resolution != own else f"{own} px, small enough")
        reasons.append("AutoencoderTiny")
    return Plan(preset, solver, steps, scale, resolution, tuple(reasons))


def _fewer(steps: int) -> tuple[int, int]:
    """The steps that fast takes in place of n, and how many of them, the last ones, are not guided."""
    fewer = min(steps, max(LEAST_STEPS, round(FAST_SHARE * steps)))
    return fewer, int(UNGUIDED_SHARE * fewer)


def unet_rows(preset: str, generation: Generation, strength: float) -> int:
    """The UNet rows that an image of a strength takes under preset exact or fast: two for every guided step."""
    steps, unguided = steps_taken(generation.num_inference_steps, strength), 0
    if preset == "fast":
        steps, unguided = _fewer(steps)
    return steps + (steps - unguided) * (generation.guidance_scale != 1)


def _of_strength(generation: Generation, strength: float) -> str:
    """What fast makes of a strength, in words."""
    steps = steps_taken(generation.num_inference_steps, strength)
    fewer, unguided = _fewer(steps)
    guided = f"the last {unguided} without guidance" if unguided else "all guided"
    return f"strength {strength:g} in {fewer} steps of {FAST_SOLVER} for {steps} of {generation.solver}, {guided}"


def _shorter(scheduler: dict, full: Grid) -> tuple[tuple[Grid, int], ...]:
    """For n = 1, 2, ... steps of `full`: the grid that fast takes instead, and its first step (see `Grids.shorter`).

    It is the grid of diffusers' scheduler on which the fewer steps begin nearest to the noise where those of `full` do.
    With the strength counted on a coarser grid they would begin at less noise, by up to one of its steps.
    """
    most, found = full.num_inference_steps, []
    finest = min(2 * most, scheduler.get("num_train_timesteps", 1000))
    grids = {count: time_grid(scheduler, FAST_SOLVER, count) for count in range(1, finest + 1)}
    for steps in range(1, most + 1):
        fewer, unguided = _fewer(steps)
        begin = full.timesteps[most - steps]
        away = {count: abs(grids[count].timesteps[count - fewer] - begin) for count in range(fewer, finest + 1)}
        count = min(away, key=away.get)
        found.append((replace(grids[count], guided_steps=count - unguided), count - fewer))
    return tuple(found)


def preset_resolution(preset: str, own: int, resolution_is_set: bool) -> int:
    """The resolution, in pixels a side, at which a pipeline with resolution `own` generates under a preset."""
    if preset != "faster" or resolution_is_set:
        return own
    return int(own * FASTER_SHARE) // 64 * 64 or own


def _turbo(generation: Generation, pipeline: StableDiffusion) -> Plan:
    if pipeline.family not in ("lcm", "turbo"):
        raise ConfigError(
            f"pipeline.preset turbo needs weights distilled to a few steps (LCM or Turbo); {pipeline.source} is "
            f"{pipeline.family}; set pipeline.preset to fast or pipeline.path to such weights (pipeline.family says what a "
            "single file or a LoRA is, where its files do not)"
        )
    steps = min(generation.num_inference_steps, TURBO_STEPS)
    solver = "lcm" if pipeline.family == "lcm" else "euler"
    scale = generation.guidance_scale if pipeline.guidance_embedding_width else 1.0
    told = f"guidance {scale:g} told to the UNet" if pipeline.guidance_embedding_width else "no guidance"
    return Plan("turbo", solver, steps, scale, pipeline.resolution, (f"{solver} in {steps} steps", told))
