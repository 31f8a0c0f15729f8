"""Turns a profile into the changes most likely to help, each with its reason and the time it would save.

Every rule looks at one measured quantity and proposes one change. Savings are estimates. The reason also states what a
change costs apart from time (staler images, other images), and a saving that changes what is learned is ranked lower.
"""

from dataclasses import dataclass

from modules.config import Config
from modules.diffusion.presets import unet_rows
from modules.diffusion.recipes import near_ood_strength
from modules.rules import FREE_RECIPES, rounded_up

LAUNCH_BOUND = 0.85  # share of a step with work for the GPU below which it counts as waiting for the host
LOW_UTILIZATION = 0.35  # share of the matrix ceiling below which more rows per call are likely to help
TAESD_SHARE = 0.06  # FLOPs of a TAESD decode relative to Stable Diffusion's (141 of 2,515 GFLOP at 512 px)


@dataclass(frozen=True)
class Facts:
    """The settings and measurements that the rules look at."""

    config: Config
    on_gpu: bool
    step_ms: float
    phase_ms: dict[str, float]
    part_ms: dict[str, float]
    needed: float  # generated rows a step
    unconditional_rows: int
    arch: str  # of the encoder
    precision: str  # of the encoder: fp32 | bf16 | fp16
    pipeline_dtype: str
    auto_precision: str  # what `auto` resolves to on this device: fp32 if it is slow in 16 bits
    auto_pipeline_dtype: str
    kl_decoder: bool  # the VAE is an AutoencoderKL
    family: str = ""  # of the pipeline; "": nothing is generated
    views: str = "torch"  # implementation of the augmentations: torch | triton
    busy: float = 1.0  # share of a step in which the GPU has work
    unet_utilization: float = 1.0  # share of the matrix ceiling
    syncs: tuple[str, ...] = ()
    threads: int = 1
    cores: int = 1


@dataclass(frozen=True)
class Advice:
    """One proposed change."""

    change: str
    reason: str
    saves_ms: float  # per step, estimated
    likely: float  # 0..1: how likely the change is wanted, apart from its saving


def advise(facts: Facts, count: int = 3) -> list[Advice]:
    """The `count` changes with the largest expected saving (saves_ms x likely), in falling order."""
    rules = (_ratio, _preset, _guidance, _decoder, _launches, _slots, _overlap, _waits, _precision, _pipeline_dtype,
             _channels_last, _augmentation, _optimizer, _threads, _smaller_encoder, _smaller_images)  # fmt: skip
    found = [advice for rule in rules if (advice := rule(facts)) is not None and advice.saves_ms > 0]
    return sorted(found, key=lambda advice: -advice.saves_ms * advice.likely)[:count]


def _ratio(facts: Facts) -> Advice | None:
    generation, generate_ms = facts.config.generation, facts.phase_ms.get("generate", 0.0)
    rate = generation.images_per_step
    if not rate or generate_ms < 0.2 * facts.step_ms:
        return None
    lower = max(rate / 2, facts.needed / generation.max_uses)
    if lower > 0.95 * rate:
        return None
    return Advice(
        f"generation.images_per_step {rate:g} -> {rounded_up(lower):g}",  # rounded down, a batch might lack images
        f"generation takes {_percent(generate_ms, facts)} of a step; an image would serve in {facts.needed / lower:.1f} "
        f"batches instead of {facts.needed / rate:.1f} (max_uses {generation.max_uses}); tune measures the choice",
        generate_ms * (1 - lower / rate),
        1.0,
    )


def _preset(facts: Facts) -> Advice | None:
    config, unet_ms = facts.config, facts.part_ms.get("unet", 0.0)
    if config.pipeline.preset != "exact" or facts.family not in ("sd1", "sd2") or not unet_ms:
        return None
    exact, fast = (_rows_an_image(config, preset) for preset in ("exact", "fast"))
    return Advice(
        "pipeline.preset fast",
        f"the UNet takes {_percent(unet_ms, facts)} of a step; another solver needs about {100 * fast / exact:.0f} % of "
        "its rows, and the images differ slightly: compare with preview",
        unet_ms * (1 - fast / exact),
        0.7,
    )


def _rows_an_image(config: Config, preset: str) -> float:
    """The UNet rows that an image takes under preset exact or fast, the mean over recipes and strengths."""
    generation, recipes = config.generation, config.near_ood.recipes
    positives = {float(strength): weight for strength, weight in generation.strengths.items()}
    negatives = [
        (w, near_ood_strength(name, config.near_ood)) for name, w in recipes.items() if name not in FREE_RECIPES
    ]
    of_positive = sum(w * unet_rows(preset, generation, s) for s, w in positives.items()) / sum(positives.values())
    of_negative = sum(w * unet_rows(preset, generation, s) for w, s in negatives) / sum(recipes.values())
    return of_positive + generation.near_ood_fraction * (of_negative - of_positive)


def _guidance(facts: Facts) -> Advice | None:
    unet_ms = facts.part_ms.get("unet", 0.0)
    generation, near_ood = facts.config.generation, facts.config.near_ood
    against = generation.near_ood_fraction > 0 and near_ood.recipes.get("negative_guidance", 0) > 0
    if not facts.unconditional_rows or not unet_ms or against:  # negative guidance needs these rows at any scale
        return None
    slots = generation.slots
    return Advice(
        "generation.guidance_scale 1",
        f"the UNet takes {_percent(unet_ms, facts)} of a step, and {facts.unconditional_rows} of the "
        f"{slots + facts.unconditional_rows} rows of its calls serve guidance alone; without it images follow their class "
        "less: look with preview",
        unet_ms * facts.unconditional_rows / (slots + facts.unconditional_rows),
        0.4,
    )


def _decoder(facts: Facts) -> Advice | None:
    vae_ms = facts.part_ms.get("vae", 0.0)
    if not facts.kl_decoder or vae_ms < 0.05 * facts.step_ms:
        return None
    return Advice(
        "pipeline.vae: a folder with a TAESD of this model",
        f"decoding takes {_percent(vae_ms, facts)} of a step; a tiny decoder does it with a twentieth of the operations "
        "and slightly softer images",
        vae_ms * (1 - TAESD_SHARE),
        0.6,
    )


def _launches(facts: Facts) -> Advice | None:
    if not facts.on_gpu or facts.busy >= LAUNCH_BOUND:
        return None
    idle = f"the GPU has work in {100 * facts.busy:.0f} % of a step and waits for the host in the rest"
    gap_ms = (1 - facts.busy) * facts.step_ms
    if facts.config.pipeline.compile == "off":
        return Advice("pipeline.compile on", f"{idle}; a captured tick is one launch", 0.8 * gap_ms, 1.0)
    return Advice(
        f"generation.slots {facts.config.generation.slots} -> {2 * facts.config.generation.slots}",
        f"{idle}; more rows a call are fewer launches an image",
        0.5 * gap_ms,
        0.9,
    )


def _slots(facts: Facts) -> Advice | None:
    unet_ms, slots = facts.part_ms.get("unet", 0.0), facts.config.generation.slots
    if not facts.on_gpu or not unet_ms or facts.busy < LAUNCH_BOUND or facts.unet_utilization >= LOW_UTILIZATION:
        return None
    return Advice(
        f"generation.slots {slots} -> {2 * slots}",
        f"the UNet reaches {100 * facts.unet_utilization:.0f} % of the matrix ceiling with "
        f"{slots + facts.unconditional_rows} rows a call; larger calls fill the GPU better",
        0.25 * unet_ms,
        0.9,
    )


def _overlap(facts: Facts) -> Advice | None:
    share = facts.phase_ms.get("generate", 0.0) / facts.step_ms
    if not facts.on_gpu or facts.config.generation.mode != "sequential" or not 0.3 <= share <= 0.9:
        return None
    return Advice(
        "generation.mode auto",
        f"generation takes {100 * share:.0f} % of a step, one after the other; where both fit on the GPU at once they "
        "share it, which a calibration measures at start",
        0.1 * facts.step_ms,
        0.8,
    )


def _waits(facts: Facts) -> Advice | None:
    if not facts.syncs or facts.config.learning.optimizer.endswith("8bit"):  # an 8-bit optimizer has a rule of its own
        return None
    return Advice(
        f"remove the waits at {', '.join(facts.syncs[:3])}",
        f"a step waits for the GPU at {len(facts.syncs)} lines of code, and the host cannot run ahead of it",
        0.1 * facts.step_ms,
        0.9,
    )


def _precision(facts: Facts) -> Advice | None:
    learner_ms, half = _learner_ms(facts), facts.auto_precision
    if facts.precision != "fp32" or half == "fp32":
        return None
    gain = 0.5 if facts.on_gpu else 0.3  # on a Xeon with AMX: see benchmarks/LOG.md
    return Advice(
        f"run.precision {half}",
        f"the encoder runs in fp32 and takes {_percent(learner_ms, facts)} of a step; autocast to {half} takes about "
        f"{100 * gain:.0f} % off that",
        gain * learner_ms,
        0.9,
    )


def _pipeline_dtype(facts: Facts) -> Advice | None:
    unet_ms, half = facts.part_ms.get("unet", 0.0), facts.auto_pipeline_dtype
    if facts.pipeline_dtype != "fp32" or half == "fp32":
        return None
    return Advice(
        f"pipeline.dtype {half}",
        f"the UNet runs in fp32 and takes {_percent(unet_ms, facts)} of a step, and this device is fast in {half}",
        0.4 * unet_ms,  # on a Xeon with AMX; more on a GPU
        0.9,
    )


def _channels_last(facts: Facts) -> Advice | None:
    if facts.config.encoder.channels_last:
        return None
    return Advice(
        "encoder.channels_last true",
        "convolutions of the encoder run in the slower memory layout",
        0.15 * _learner_ms(facts),
        1.0,
    )


def _augmentation(facts: Facts) -> Advice | None:
    augment_ms = facts.phase_ms.get("augment", 0.0)
    if not facts.on_gpu or facts.views == "triton" or augment_ms < 0.1 * facts.step_ms:
        return None
    return Advice(
        "run.kernels triton",
        f"augmentation takes {_percent(augment_ms, facts)} of a step; the kernel makes all views in two launches (not measured: compare)",
        0.7 * augment_ms,
        0.7,
    )


def _optimizer(facts: Facts) -> Advice | None:
    optimize_ms, name = facts.phase_ms.get("optimize", 0.0), facts.config.learning.optimizer
    if not name.endswith("8bit") or optimize_ms < 0.05 * facts.step_ms:
        return None
    return Advice(
        f"learning.optimizer {name.removesuffix('8bit')}",
        f"the update takes {_percent(optimize_ms, facts)} of a step: an 8-bit optimizer handles one parameter at a time; "
        "its memory is only worth that for large encoders",
        0.7 * optimize_ms,
        0.8,
    )


def _threads(facts: Facts) -> Advice | None:
    if facts.on_gpu or facts.threads >= facts.cores:
        return None
    return Advice(
        f"run.threads {facts.cores}",
        f"torch uses {facts.threads} of {facts.cores} cores",
        0.6 * facts.step_ms * (1 - facts.threads / facts.cores),
        0.9,
    )


def _smaller_encoder(facts: Facts) -> Advice | None:
    learner_ms = _learner_ms(facts)
    reason = f"the encoder's passes take {_percent(learner_ms, facts)} of a step; accuracy may fall: compare on val"
    if facts.arch == "small_resnet":
        width = facts.config.encoder.width
        smaller = max(8, round(0.75 * width / 8) * 8)
        if smaller == width:
            return None
        return Advice(f"encoder.width {width} -> {smaller}", reason, learner_ms * (1 - (smaller / width) ** 2), 0.3)
    if facts.arch == "resnet50":
        return Advice("encoder.arch resnet18", reason, 0.55 * learner_ms, 0.3)
    return None


def _smaller_images(facts: Facts) -> Advice | None:
    size = facts.config.data.image_size
    smaller = size * 3 // 4 // 16 * 16
    if smaller < 32:
        return None
    per_pixel_ms = _learner_ms(facts) + facts.phase_ms.get("augment", 0.0)
    return Advice(
        f"data.image_size {size} -> {smaller}",
        f"views and encoder take {_percent(per_pixel_ms, facts)} of a step and grow with the number of pixels; small "
        "details of the parts may be lost",
        per_pixel_ms * (1 - (smaller / size) ** 2),
        0.2,
    )


def _learner_ms(facts: Facts) -> float:
    return facts.phase_ms.get("encode", 0.0) + facts.phase_ms.get("backward", 0.0)


def _percent(ms: float, facts: Facts) -> str:
    return f"{100 * ms / facts.step_ms:.0f} %"
