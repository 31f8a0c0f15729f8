"""Slots that fit: where memory runs out, generation makes do with fewer rows and says so; the learner never does.

The first tick and the first decode are the largest the engine will ever take, so an engine that passes them fits.
"""

from collections.abc import Callable

import torch

from modules.diffusion.slots import Slots
from modules.errors import OutOfMemory
from modules.runtime import Choice


def fit_slots(build: Callable[[int, int], Slots], slots: int, decode_batch: int) -> tuple[Slots, Choice, Choice]:
    """The engine of `build(slots, decode_batch)` that fits in memory, halving either number until it does.

    Returns the engine and both numbers with their reasons.

    Raises:
        OutOfMemory: not even one slot, or a decode of one image, fits.
    """
    asked = {"slots": slots, "decode_batch": decode_batch}
    numbers = dict(asked)
    while True:
        engine, part = _try(build, **numbers)
        if engine is not None:
            return engine, *(_choice(name, asked[name], numbers[name]) for name in asked)
        if numbers[part] == 1:
            what = "one UNet call of a single slot" if part == "slots" else "the decode of a single image"
            raise OutOfMemory(
                f"the diffusion pipeline does not fit: {what} runs out of memory; lower pipeline.resolution, set "
                "pipeline.dtype to fp16 or pipeline.vae to a tiny autoencoder, or give the learner less "
                "(learning.classes_per_batch, learning.rows_per_class)"
            )
        numbers[part] //= 2
        torch.cuda.empty_cache()  # does nothing where CUDA was never used


def _try(build: Callable[[int, int], Slots], slots: int, decode_batch: int) -> tuple[Slots | None, str]:
    """The engine, or None and the number to lower; returning first frees what the failed attempt held."""
    part = "slots"
    try:
        engine = build(slots, decode_batch)
        engine.in_flight.step()  # idle slots stay as they are
        part = "decode_batch"
        engine.decode(engine.ready_Q4hw[:decode_batch])
    except torch.OutOfMemoryError:
        return None, part
    return engine, ""


def _choice(name: str, asked: int, taken: int) -> Choice:
    if taken == asked:
        return Choice(taken, f"generation.{name}")
    return Choice(taken, f"generation.{name} {asked} ran out of memory")
