"""Slots that fit: where memory runs out, generation makes do with fewer rows and says so; the learner never does.

The first tick and the first decode are the largest the engine will ever take, so an engine that passes them fits. What
makes an engine faster needs memory of its own (timing attention, compiling, the pool of captured graphs), so it is part
of what has to fit: rather fewer slots that are fast than more that are not, within ACCELERATED_HALVINGS.
"""

import gc
from collections.abc import Callable

import torch

from modules.diffusion.slots import Slots
from modules.errors import OutOfMemory
from modules.memory import ran_out
from modules.runtime import Choice

ACCELERATED_HALVINGS = 2  # with less than a quarter of the rows in a call, a GPU loses more than compiling gains
ACCELERATED = "accelerated"


def fit_slots(
    build: Callable[[int, int], Slots],
    slots: int,
    decode_batch: int,
    accelerate: Callable[[Slots], None] | None = None,
) -> tuple[Slots, Choice, Choice]:
    """The engine of `build(slots, decode_batch)` that fits in memory, halving either number until it does.

    Args:
        accelerate: makes an engine faster in place, or runs out of memory; then slots are halved too, and in the end the
            engine that fitted without it is returned as it is.

    Returns the engine and both numbers with their reasons.

    Raises:
        OutOfMemory: not even one slot, or a decode of one image, fits.
    """
    asked = {"slots": slots, "decode_batch": decode_batch}
    numbers, plain = dict(asked), None
    while True:
        engine, part = _try(build, accelerate, **numbers)
        if engine is not None:
            return engine, *(_choice(name, asked[name], numbers[name]) for name in asked)
        gc.collect()  # an engine and its tick, which was replaced in it, hold each other
        torch.cuda.empty_cache()  # does nothing where CUDA was never used
        if part == ACCELERATED:
            plain = plain or dict(numbers)
            if numbers["slots"] == 1 or numbers["slots"] << ACCELERATED_HALVINGS <= plain["slots"]:
                numbers, accelerate = plain, None
                continue
            part = "slots"
        if numbers[part] == 1:
            what = "one UNet call of a single slot" if part == "slots" else "the decode of a single image"
            raise OutOfMemory(
                f"the diffusion pipeline does not fit: {what} runs out of memory; lower pipeline.resolution, set "
                "pipeline.dtype to 16 bits if it is fp32, or pipeline.vae to a tiny autoencoder, or give the learner less "
                "(learning.classes_per_batch, learning.rows_per_class)"
            )
        numbers[part] //= 2


def _try(
    build: Callable[[int, int], Slots], accelerate: Callable[[Slots], None] | None, slots: int, decode_batch: int
) -> tuple[Slots | None, str]:
    """The engine, or None and what to lower; returning first frees what the failed attempt held."""
    part = "slots"
    try:
        engine = build(slots, decode_batch)
        engine.in_flight.step()  # idle slots stay as they are
        part = "decode_batch"
        engine.decode(engine.ready_Q4hw[:decode_batch])
        part = ACCELERATED
        if accelerate is not None:
            accelerate(engine)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return None, part
    return engine, ""


def _choice(name: str, asked: int, taken: int) -> Choice:
    if taken == asked:
        return Choice(taken, f"generation.{name}")
    return Choice(taken, f"generation.{name} {asked} ran out of memory")
