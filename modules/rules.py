"""Rules that settings must satisfy, alone and in combination, checked before any device is used.

The message of each rule names the setting, its value, and what would be accepted.
"""

import math
from pathlib import Path

from modules.config import Config, Controller, Generation, PipelineConfig, PipelineShape, Run
from modules.errors import ConfigError
from modules.ranges import CHOICES, RANGES

NORM_GROUPS = {"vae_channels": 16, "unet_channels": 8}  # of a pipeline made from scratch: channels are multiples

DIFFUSION_RECIPES = (
    "strength",
    "token_noise",
    "token_mix",
    "foreign",
    "negative_guidance",
    "mask_split",
    "embedding_outlier",
)
FREE_RECIPES = ("jigsaw", "jigsaw_roundtrip")  # no UNet call


def check_rules(config: Config | PipelineConfig) -> None:
    """Raise ConfigError for the first setting that is invalid, alone or in combination with others."""
    sections = vars(config)
    for name, known in CHOICES.items():
        if name.split(".")[0] in sections and (value := _get(config, name)) not in known:
            raise ConfigError(f"`{name}` is {value!r}; choose one of {', '.join(k or chr(39) * 2 for k in known)}")
    for name, (low, high, ends) in RANGES.items():
        if name.split(".")[0] in sections:
            _check_range(name, _get(config, name), low, high, ends)
    _check_place(config.run)
    if "shape" in sections:
        _check_shape(config.shape)
        if config.training.further_vae_steps and not config.training.start:
            raise ConfigError(
                "training.further_vae_steps trains the VAE of training.start on, and training.start is empty; name a "
                "pipeline there, or set training.vae_steps for a VAE from scratch"
            )
        return
    _check_recipes(config)
    _check_band(config.controller)
    _check_probe_rates(config.probe.lrs)
    if generates(config):
        _check_strengths(config)
        _check_feeding(config)
    _check_learning(config)
    resamples, beyond = config.evaluation.bootstrap, (1 - config.evaluation.confidence) / 2
    if 0 < resamples * beyond < 1 - 1e-9:
        least = math.ceil(1 / beyond - 1e-9)
        raise ConfigError(
            f"`evaluation.bootstrap` is {resamples}: too few for the ends of a {config.evaluation.confidence:.12g} interval; "
            f"set it to {least} or more, as {max(1000, 10 * least)}, or to 0 for no intervals"
        )


def generates(config: Config) -> bool:
    """Whether this run mixes generated rows into its batches."""
    return config.generation.synthetic_fraction > 0


def idle_settings(config: Config) -> tuple[str, ...]:
    """Names ("section.key") of changed settings that have no effect because nothing is generated."""
    if generates(config):
        return ()
    names = []
    for section in ("near_ood", "gate", "controller"):
        given = getattr(config, section)
        defaults = vars(type(given)())
        names += [f"{section}.{key}" for key, value in vars(given).items() if value != defaults[key]]
    return tuple(names)


def needs_masks(config: Config) -> bool:
    """Whether generation needs object masks of the train images."""
    negatives = config.generation.near_ood_fraction
    edits = config.generation.mask_edit != "none" and negatives < 1
    return generates(config) and (edits or (negatives > 0 and config.near_ood.recipes.get("mask_split", 0) > 0))


def screened(config: Config) -> bool:
    """Whether gate or controller judge generated images with the encoder that is being trained."""
    return config.gate.enabled or config.controller.enabled


def used_strengths(generation: Generation) -> list[float]:
    """Strengths of the positives whose weight is above 0."""
    return [float(strength) for strength, weight in generation.strengths.items() if weight > 0]


def real_rows(config: Config) -> int:
    """Real rows per batch: P x K rows balanced over classes, plus learning.extra_real_rows."""
    learning = config.learning
    return learning.classes_per_batch * learning.rows_per_class + learning.extra_real_rows


def batch_rows(config: Config) -> float:
    """Mean rows per batch, real and generated; the encoder sees two views of each."""
    return real_rows(config) + generated_rows(config)


def generated_rows(config: Config) -> float:
    """Mean generated rows per batch: f P K / (1 - f), with f the synthetic_fraction and P K the balanced real rows."""
    fraction = config.generation.synthetic_fraction
    return config.learning.classes_per_batch * config.learning.rows_per_class * fraction / (1 - fraction)


def steps_taken(num_inference_steps: int, strength: float) -> int:
    """The steps n = min(int(T_n s), T_n) that an image of strength s takes on a grid of T_n steps, as in diffusers."""
    return min(int(num_inference_steps * strength), num_inference_steps)


def lowest_strength(steps: int) -> float:
    """The lowest strength that takes at least one of `steps` denoising steps: 1 / steps, rounded up to three digits."""
    return float(f"{rounded_up(1 / steps):.3g}")


def _get(config: Config | PipelineConfig, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _check_range(name: str, value: float, low: float | None, high: float | None, ends: str) -> None:
    too_low = low is not None and (value < low or (value == low and "(" in ends))
    too_high = high is not None and (value > high or (value == high and ")" in ends))
    if too_low or too_high:
        left = "(-inf" if low is None else f"{'(' if '(' in ends else '['}{low}"
        right = "inf)" if high is None else f"{high}{')' if ')' in ends else ']'}"
        raise ConfigError(f"`{name}` is {value}; it must lie in {left}, {right}")


def _check_place(run: Run) -> None:
    name = run.name
    if not run.dir.strip():
        raise ConfigError("`run.dir` is empty; name the folder that runs stand in, such as runs")
    if name.startswith("/") or ".." in name.split("/") or (name and not name.strip(" ./")):
        raise ConfigError(f"`run.name` is {name!r}; it must name a directory below run.dir: set run.dir to move that")
    place, cache = Path(run.dir, name), Path(run.cache_dir or Path(run.dir, "cache"))
    if cache in (place, *place.parents):
        raise ConfigError(
            f"`run.name` is {name!r}, but {cache} holds the class tokens that runs share; set another run.name, or "
            "run.cache_dir to another folder"
        )


def _check_shape(shape: PipelineShape) -> None:
    halvings = len(shape.vae_channels) + len(shape.unet_channels) - 2
    if halvings < 0 or shape.resolution % 2**halvings:
        raise ConfigError(
            f"`shape.resolution` is {shape.resolution}; shape.vae_channels and shape.unet_channels halve it {halvings} "
            f"times, so it must be a multiple of {2 ** max(0, halvings)}"
        )
    for name, step in (NORM_GROUPS | {"text_width": shape.text_heads}).items():
        given = getattr(shape, name)
        if any(value < 1 or value % step for value in (given if isinstance(given, tuple) else (given,))):
            raise ConfigError(f"`shape.{name}` is {given}; it takes multiples of {step}")


def _check_weights(name: str, weights: dict) -> None:
    if any(w < 0 for w in weights.values()) or not 0 < sum(weights.values()) < math.inf:
        raise ConfigError(f"`{name}` is {weights}; it needs at least one weight above 0, none below, and a finite sum")


def _is_number(key: object) -> bool:
    """Whether a key of a setting is a number; to YAML 5e-1 is a text."""
    try:
        return not isinstance(key, bool) and math.isfinite(float(key))
    except (TypeError, ValueError):
        return False


def _check_recipes(config: Config) -> None:
    _check_weights("near_ood.recipes", config.near_ood.recipes)
    _check_weights("generation.strengths", config.generation.strengths)
    _check_weights("generation.conditions", config.generation.conditions)
    for word in config.generation.conditions:
        if not isinstance(word, str):
            raise ConfigError(
                f"`generation.conditions` holds {word!r}, a {type(word).__name__} to YAML and no word; quote the word, "
                "as in {'no': 1.0}"
            )
    for strength in config.generation.strengths:
        if not _is_number(strength):
            raise ConfigError(f"`generation.strengths` holds {strength!r}; a strength is a number in (0, 1]")
    for recipe in config.near_ood.recipes:
        if recipe not in DIFFUSION_RECIPES + FREE_RECIPES:
            raise ConfigError(
                f"`near_ood.recipes` names {recipe!r}; choose from {', '.join(DIFFUSION_RECIPES + FREE_RECIPES)}"
            )
    low, high = config.near_ood.mix
    if not 0 < low <= high < 1:
        raise ConfigError(f"`near_ood.mix` is [{low}, {high}]; it must be a rising pair inside (0, 1)")
    for template in config.generation.templates:
        if template.count("{}") != 1 or any(brace in template.replace("{}", "") for brace in "{}"):
            raise ConfigError(f"`generation.templates` holds {template!r}; each template needs exactly one {{}}")
    if not config.generation.templates:
        raise ConfigError("`generation.templates` is empty; name at least one, such as 'a photo of a {}'")
    jigsaws = any(config.near_ood.recipes.get(recipe, 0) > 0 for recipe in FREE_RECIPES)
    if jigsaws and config.data.image_size % config.near_ood.jigsaw_grid:
        raise ConfigError(
            f"`near_ood.jigsaw_grid` is {config.near_ood.jigsaw_grid}, which does not divide data.image_size "
            f"{config.data.image_size}"
        )


def _check_band(controller: Controller) -> None:
    if not controller.target_low < controller.target_high:
        raise ConfigError(
            f"`controller.target_low` is {controller.target_low} and `controller.target_high` {controller.target_high}; "
            "the band must rise"
        )


def _check_probe_rates(lrs: tuple[float, ...]) -> None:
    if not lrs or min(lrs) <= 0:
        raise ConfigError(f"`probe.lrs` is {list(lrs)}; name at least one learning rate, each above 0")


def _check_strengths(config: Config) -> None:
    steps = config.generation.num_inference_steps
    strengths = [("generation.strengths", strength) for strength in used_strengths(config.generation)]
    if any(w > 0 and r in DIFFUSION_RECIPES for r, w in config.near_ood.recipes.items()):
        strengths.append(("near_ood.strength", config.near_ood.strength))
    for name, strength in strengths:
        if not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise ConfigError(f"`{name}` holds {strength!r}; a strength lies in (0, 1]")
        if steps_taken(steps, strength) == 0:
            raise ConfigError(
                f"`{name}` {strength} of generation.num_inference_steps {steps} is int({steps} x {strength}) = 0 "
                f"denoising steps, which returns the source image; use a strength of at least {lowest_strength(steps):g}"
            )


def _check_feeding(config: Config) -> None:
    needed = generated_rows(config)
    rate, uses = config.generation.images_per_step, config.generation.max_uses
    if rate * uses < needed - 1e-9:
        more_images = f"images_per_step to {rounded_up(needed / uses):g}"
        more_uses = f" or max_uses to {math.ceil(needed / rate - 1e-12)}" if rate else ""
        raise ConfigError(
            f"generation.synthetic_fraction {config.generation.synthetic_fraction} needs {needed:.3g} generated rows a "
            f"step, but generation.images_per_step {rate:g} x generation.max_uses {uses} feeds only {rate * uses:g}; "
            f"raise {more_images}{more_uses}, or lower the fraction"
        )


def rounded_up(value: float) -> float:
    """`value` > 0 rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit - 1e-12) * unit


def _check_learning(config: Config) -> None:
    learning, generation = config.learning, config.generation
    if learning.crop_scale[0] <= 0 or learning.crop_scale[0] > learning.crop_scale[1] or learning.crop_scale[1] > 1:
        raise ConfigError(f"`learning.crop_scale` is {list(learning.crop_scale)}; it must be a rising pair in (0, 1]")
    if min(learning.jitter) < 0 or learning.jitter[3] > 0.5:
        raise ConfigError(
            f"`learning.jitter` is {list(learning.jitter)}; brightness, contrast, saturation and hue are 0 or more, hue "
            "at most 0.5, half a turn"
        )
    has_ood = generates(config) and generation.near_ood_fraction > 0
    if learning.method == "cross_entropy" and has_ood and learning.outlier_exposure == 0:
        raise ConfigError(
            "learning.method cross_entropy with near-OOD rows needs learning.outlier_exposure > 0 (a uniform target "
            "on them); set it, or set generation.near_ood_fraction to 0"
        )
    if learning.method == "cross_entropy" and (learning.ood_variant != "none" or learning.hardness > 0):
        raise ConfigError(
            f"learning.ood_variant is {learning.ood_variant!r} and learning.hardness {learning.hardness}, which "
            "learning.method cross_entropy does not read; leave them at none and 0"
        )
    if learning.method != "cross_entropy" and learning.outlier_exposure > 0:
        raise ConfigError(
            f"learning.outlier_exposure is {learning.outlier_exposure}, which learning.method {learning.method} does not "
            "read; set it to 0, and learning.ood_weight for near-OOD rows in its loss"
        )
    if config.generation.roundtrip_fraction > 0 and not generates(config):
        raise ConfigError(
            f"generation.roundtrip_fraction is {generation.roundtrip_fraction}, but nothing is generated and no VAE is "
            "loaded; set it to 0, or generation.synthetic_fraction above 0"
        )
    if learning.method == "supcon" and learning.classes_per_batch * learning.rows_per_class < 2:
        raise ConfigError("learning.classes_per_batch x learning.rows_per_class is 1; SupCon needs two rows or more")
    if learning.warmup_steps >= learning.steps and learning.steps > 1:
        raise ConfigError(
            f"learning.warmup_steps {learning.warmup_steps} does not end before learning.steps {learning.steps}; "
            "lower it"
        )
    if not any(rate > 0 for rate in config.tune.grid) or min(config.tune.grid) < 0:
        raise ConfigError(
            f"`tune.grid` is {list(config.tune.grid)}; name images a step to try, 0 or more, at least one of them above 0"
        )
    for section in ("gate", "controller"):
        if generates(config) and getattr(config, section).enabled and config.gate.start_step >= learning.steps:
            raise ConfigError(
                f"{section}.enabled is true, but gate.start_step is {config.gate.start_step} of learning.steps "
                f"{learning.steps}: no image would be judged; lower gate.start_step"
            )
    if learning.method == "simclr" and learning.ood_columns in ("own_class", "foreign_class"):
        raise ConfigError(
            f"learning.ood_columns is {learning.ood_columns!r}, but learning.method simclr knows no classes; use none "
            "or global"
        )
    if learning.method == "simclr" and learning.ood_variant != "none":
        raise ConfigError("learning.ood_variant belongs to supcon; set learning.method supcon or leave it at none")
