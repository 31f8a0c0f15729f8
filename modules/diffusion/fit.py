"""Finds a number of slots that fits in memory. Generation gives way and says so; the training batch is never reduced.

The first tick and the first decode need as much memory as any later one, so an engine that passes them fits.
Acceleration needs extra memory (timing attention, compiling, the pool of captured graphs), so it has to fit as well:
fewer accelerated slots are preferred to more plain ones, up to ACCELERATED_HALVINGS halvings.
"""

import gc
from collections.abc import Callable

import torch

from modules.diffusion.slots import Slots
from modules.errors import OutOfMemory
from modules.memory import ran_out
from modules.runtime import Choice

ACCELERATED_HALVINGS = 2  # below a quarter of the rows per call, a GPU loses more than compiling gains
ACCELERATED = "accelerated"


def fit_slots(
    build: Callable[[int, int], Slots],
    slots: int,
    decode_batch: int,
    accelerate: Callable[[Slots], None] | None = None,
) -> tuple[Slots, Choice, Choice]:
    """Build an engine with `build(slots, decode_batch)`, halving whichever number runs out of memory until it fits.

    Args:
        accelerate: makes an engine faster in place. If it runs out of memory, slots are halved too, and after
            ACCELERATED_HALVINGS the engine that fitted without acceleration is built and left plain.

    Returns the engine and both numbers with their reasons.

    Raises:
        OutOfMemory: one slot, or the decode of one image, does not fit.
    """
    asked = {"slots": slots, "decode_batch": decode_batch}
    numbers, plain = dict(asked), None
    while True:
        engine, part = _try(build, accelerate, **numbers)
        if engine is not None:
            return engine, *(_choice(name, asked[name], numbers[name]) for name in asked)
        gc.collect()  # an engine and the replacement of its tick refer to each other
        torch.cuda.empty_cache()  # does nothing if CUDA was never used
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
    """The engine and "", or None and the number to lower. Returning frees what a failed attempt held."""
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
