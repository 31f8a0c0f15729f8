"""Presets trade the exact sampler for speed; the resulting plan says what was changed and why.

exact uses the settings as they are. fast takes fewer steps of a second-order solver and drops guidance at low noise,
where it matters least. faster adds a tiny decoder and a smaller image. turbo is for weights distilled to a few steps.
The lossy presets have to pass a quality gate (benchmarks/quality.py) before any of their figures is quoted.
"""

from dataclasses import dataclass, replace

from modules.config import Generation
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.schedule import Grid, time_grid
from modules.errors import ConfigError

FAST_SHARE = 0.4  # steps of fast per step of exact: 10 calls instead of 25
UNGUIDED_SHARE = 0.15  # share of the whole grid, at its low-noise end: 3 of the 10 calls at strength .5
FASTER_SHARE = 0.75  # of the UNet's own resolution: 384 px instead of 512
TURBO_STEPS = 4


@dataclass(frozen=True)
class Plan:
    """The settings of generation as a preset changes them."""

    preset: str
    solver: str
    num_inference_steps: int
    guided_steps: int  # number of steps, from the noisy end, that are guided
    guidance_scale: float
    resolution: int
    reasons: tuple[str, ...]

    def grid(self, scheduler: dict) -> Grid:
        """The plan's time grid on a pipeline's scheduler config."""
        grid = time_grid(scheduler, self.solver, self.num_inference_steps, self.guided_steps)
        return replace(grid, most_steps=TURBO_STEPS if self.preset == "turbo" else None)

    def settings(self, generation: Generation) -> Generation:
        """Config section `generation` with the plan's changes."""
        return replace(
            generation,
            solver=self.solver,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )


def plan(preset: str, generation: Generation, pipeline: StableDiffusion, resolution_is_set: bool = False) -> Plan:
    """The plan of a preset for config section `generation` on a pipeline.

    Args:
        resolution_is_set: the user chose pipeline.resolution; then no preset changes it.

    Raises:
        ConfigError: the preset needs weights that the pipeline lacks, or the solver does not suit the weights.
    """
    steps, scale, own = generation.num_inference_steps, generation.guidance_scale, pipeline.resolution
    if pipeline.family == "lcm" and preset != "turbo" and generation.solver != "lcm":
        raise ConfigError(
            f"generation.solver is {generation.solver}, but {pipeline.source} is a latent consistency model; set "
            "generation.solver to lcm or pipeline.preset to turbo"
        )
    if preset == "exact":
        return Plan(preset, generation.solver, steps, steps, scale, own, ("as configured",))
    if preset == "turbo":
        return _turbo(generation, pipeline)
    count = max(2, round(FAST_SHARE * steps))
    guided = count - round(UNGUIDED_SHARE * count)
    reasons = [
        f"dpmpp_2m in {count} steps for {generation.solver} in {steps}",
        f"guidance on the first {guided} of {count} steps",
    ]
    resolution = preset_resolution(preset, own, resolution_is_set)
    if preset == "faster":
        if type(pipeline.vae).__name__ != "AutoencoderTiny":
            raise ConfigError(
                "pipeline.preset faster decodes with an AutoencoderTiny (TAESD), and this pipeline has none; set "
                "pipeline.vae to its folder or pipeline.preset to fast"
            )
        if not resolution_is_set:
            reasons.append(f"{resolution} px for {own}" if resolution != own else f"{own} px, small enough")
        reasons.append("AutoencoderTiny")
    return Plan(preset, "dpmpp_2m", count, guided, scale, resolution, tuple(reasons))


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
    return Plan("turbo", solver, steps, steps, scale, pipeline.resolution, (f"{solver} in {steps} steps", told))
