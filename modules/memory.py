"""Out-of-memory errors that name the stage and part that ran out of memory, and the settings that make it smaller.

Any allocation on a device may be the one that fails, so one handler wraps each whole stage and finds the part from the
traceback: the innermost function listed in PARTS.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modules.config import Config, PipelineConfig
from modules.errors import OutOfMemory, first_line
from modules.runtime import choose_device, choose_pipeline_dtype
from modules.settings import flatten

ALLOCATION_FAILED = (  # messages of libraries that bypass torch's allocator, which torch raises as RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "can't allocate memory",
)
GENERATOR = ("generation.slots", "generation.decode_batch", "pipeline.resolution")
LEARNER = ("learning.classes_per_batch", "learning.rows_per_class", "data.image_size")
HALF, PIPELINE = "pipeline.dtype=", "modules.diffusion.pipeline"  # `_half` completes HALF with a 16-bit dtype
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
    "modules.learning.encoder.build_encoder": ("the encoder", ("encoder.width",)),
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
STAGES = {  # settings that make a stage smaller, if the failing part is not in PARTS
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
def named_memory(stage: str, config: Config | PipelineConfig) -> Iterator[None]:
    """Context that turns running out of memory into an error naming stage, part, and settings with their values.

    Raises:
        OutOfMemory: instead of the exception of torch or of a library it calls; all other exceptions pass unchanged.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(_explained(error, stage, config)) from error


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception, or one in its chain of causes and contexts, reports that memory ran out.

    The chain matters because a graph capture that is interrupted raises an exception of its own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explained(error: BaseException, stage: str, config: Config | PipelineConfig) -> str:
    values = flatten(config)
    what, knobs = _part(error, values) or ("", STAGES.get(stage, WHOLE_RUN))
    where = f"stage {stage}: {what}" if what else f"stage {stage}"
    knobs = [_half(config) if knob == HALF else knob for knob in knobs]
    lower = [f"{name} ({values[name]})" if values.get(name) else name for name in knobs if name and "=" not in name]
    ways = [f"lower {', '.join(lower)}"] * bool(lower) + [f"set {knob}" for knob in knobs if "=" in knob]
    told = [f"{where} does not fit ({first_line(error)})", ", or ".join(ways), "`check` lists what a run holds"]
    return "; ".join(filter(None, told))


def _half(config: Config | PipelineConfig) -> str:
    """The setting that halves the memory of the pipeline; "" if it computes in 16 bits already."""
    device = choose_device(config.run).value
    computes = choose_pipeline_dtype(config.pipeline, device).value
    return "" if computes.itemsize < 4 else HALF + ("fp16" if device.type == "cuda" else "bf16")


def _part(error: BaseException, values: dict) -> tuple[str, tuple[str, ...]] | None:
    """The entry in PARTS of the innermost function on the traceback whose settings all exist in this config."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        entry = PARTS.get(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")
        if entry is not None and all(knob.partition("=")[0] in values for knob in entry[1]):
            found = entry
    return found
