"""Memory that ran out, named: which part of which stage asked for more than there is, and what makes it smaller.

Anything on a device may be the allocation that fails, so the handler stands around whole stages, once, and reads from
the traceback which part it was: the innermost function of PARTS that was under way.
"""

import traceback
from contextlib import contextmanager

import torch

from modules.errors import OutOfMemory, first_line
from modules.runtime import choose_device, choose_pipeline_dtype
from modules.settings import flatten

ALLOCATION_FAILED = (  # what libraries below torch's own allocator say; torch hands it on as a plain RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "can't allocate memory",
)
GENERATOR = ("generation.slots", "generation.decode_batch", "pipeline.resolution")
LEARNER = ("learning.classes_per_batch", "learning.rows_per_class", "data.image_size")
HALF, PIPELINE = "pipeline.dtype=", "modules.diffusion.pipeline"  # HALF is followed by a format where that is smaller
PARTS = {  # function -> what it does, and the settings that make it smaller: a name to lower, or name=value to set
    f"{PIPELINE}.load_pipeline": ("loading the pipeline", (HALF,)),
    f"{PIPELINE}.StableDiffusion.encode_moments": ("encoding images by the VAE", ("pipeline.resolution", HALF)),
    f"{PIPELINE}.StableDiffusion.decode": (
        "decoding images by the VAE",
        ("generation.decode_batch", "pipeline.resolution", HALF),
    ),
    "modules.diffusion.inversion.Inversion.step": (
        "a step of textual inversion",
        ("inversion.batch_size", "pipeline.resolution", HALF),
    ),
    "modules.diffusion.token_report.token_report": ("the report of the class tokens", ("pipeline.resolution", HALF)),
    "modules.learning.judge.load_judge": ("the judge", ("data.image_size", "evaluation.judge_steps=0")),
    "modules.training.stages.roundtrip_images": (
        "decoding the train images (generation.roundtrip_fraction)",
        ("generation.decode_batch", "pipeline.resolution", "generation.roundtrip_fraction=0"),
    ),
    "modules.training.machine._learner_bytes": ("a training step of the encoder", LEARNER),
    "modules.diffusion.generator.Generator.prefill": ("filling the reservoir", GENERATOR),
    "modules.diffusion.generator.Generator.warm_up": ("filling the slots", GENERATOR),
    "modules.training.loop.train": ("a step", (*GENERATOR, *LEARNER)),
    "modules.training.timing.time_steps": ("a step", (*GENERATOR, *LEARNER)),
    "modules.evaluation.features.embed_images": ("embedding images", ("evaluation.batch_size", "data.image_size")),
}
STAGES = {  # settings that make a stage smaller, where none of its parts is known to have asked
    "data": ("data.image_size", "data.shots_per_class"),
    "tokens": ("pipeline.resolution", "data.shots_per_class", HALF),
    "load": ("run.device=cpu",),
    "probe": ("evaluation.batch_size",),
    "evaluate": ("evaluation.batch_size",),
    "judge": ("evaluation.batch_size",),
    "pipeline": ("training.vae_batch", "training.unet_batch", "shape.resolution"),
}
WHOLE_RUN = (*GENERATOR, *LEARNER, "generation.ring_size", "data.shots_per_class")


@contextmanager
def named_memory(stage: str, config):
    """Inside, memory that runs out becomes an error that names stage, part and settings with their values.

    Raises:
        OutOfMemory: in place of what torch or a library below it raised; every other exception passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(_explained(error, stage, config)) from error


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception says that memory ran out, or was raised while such a one was on its way.

    A graph's capture that is left in the middle fails in words of its own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explained(error: BaseException, stage: str, config) -> str:
    values = flatten(config)
    what, knobs = _part(error, values) or ("", STAGES.get(stage, WHOLE_RUN))
    where = f"stage {stage}: {what}" if what else f"stage {stage}"
    if HALF in knobs:
        knobs = [_half(config) if knob == HALF else knob for knob in knobs]
    lower = [f"{name} ({values[name]})" if values.get(name) else name for name in knobs if name and "=" not in name]
    ways = [f"lower {', '.join(lower)}"] * bool(lower) + [f"set {knob}" for knob in knobs if "=" in knob]
    return "; ".join(
        [
            f"{where} does not fit ({first_line(error)})",
            *[", or ".join(ways)] * bool(ways),
            "`check` lists what a run holds",
        ]
    )


def _half(config) -> str:
    """The setting under which the pipeline takes half the memory; "" where it computes in 16 bits already."""
    device = choose_device(config.run).value
    computes = choose_pipeline_dtype(config.pipeline, device).value
    return "" if computes.itemsize < 4 else HALF + ("fp16" if device.type == "cuda" else "bf16")


def _part(error: BaseException, values: dict) -> tuple[str, tuple[str, ...]] | None:
    """The entry of the innermost function of PARTS that an exception came through and whose settings there are."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        entry = PARTS.get(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")
        if entry is not None and all(knob.partition("=")[0] in values for knob in entry[1]):
            found = entry
    return found
