"""Finds the batch size at which a technique is fastest, since a ratio of techniques is only fair at each one's best.

An uncompiled pipeline is timed by its parts at every batch size, the slot engine by its tick. A compiled pipeline has
to be compiled anew for every batch size, which takes a minute or two, so only a few are tried; its row says which.
"""

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks import harness
from benchmarks.engine import SlotEngine
from benchmarks.inputs import Setting
from modules.diffusion.pipeline import StableDiffusion

BATCHES = {"cuda": (8, 16, 32, 64), "cpu": (4, 8, 16, 32)}
TOLERANCE = 0.02  # batches whose cost per image is at most this much above the least count as equally good
SEARCH_SHARE = 0.2  # the share of the time left that a search by parts may take


@torch.no_grad()
def best_batch(
    pipeline: StableDiffusion, setting: Setting, images: int, name: str, seconds: float = float("inf")
) -> tuple[int, str]:
    """The batch at which diffusers' pipeline is fastest per image, by the time of its parts; and what was tried.

    One guided UNet call, one encoding and one decoding are timed at each batch; an image then costs (calls x UNet +
    encode + decode) / batch. Batches that do not fit into memory are dropped; of those within TOLERANCE of the best,
    the smallest is taken.

    Args:
        seconds: time left of the budget, see `cheapest`.
    """
    calls = setting.calls(pipeline.scheduler)[0]

    def image_ms(batch: int) -> float:
        unet, encode, decode = _medians(_parts(pipeline, setting, batch), pipeline.device)
        return (calls * unet + encode + decode) / batch

    return cheapest(image_ms, possible(images, pipeline.device), name, seconds)


@torch.no_grad()
def best_slots(
    build: Callable[[int], SlotEngine], images: int, device: torch.device, name: str, seconds: float = float("inf")
) -> tuple[int, str]:
    """The number of slots at which an engine's ticks cost least per image, and what was tried.

    Of those within TOLERANCE of the best, the largest is taken: under compilation, which is not tried here, more slots
    gain more.

    Args:
        build: makes the engine with a given number of slots.
    """

    def image_ms(slots: int) -> float:
        engine = build(slots)
        engine.slots.tick()  # so that the latents are real ones
        return engine.request(0).cost * _medians({"tick": engine.slots.in_flight.step}, device)[0] / slots

    return cheapest(image_ms, possible(images, device), name, seconds, pick=max)


def cheapest(
    cost_ms: Callable[[int], float],
    batches: list[int],
    name: str,
    seconds: float,
    pick: Callable[[Iterable[int]], int] = min,
) -> tuple[int, str]:
    """The smallest batch whose cost is within TOLERANCE of the least, and the costs of all batches in words.

    Args:
        cost_ms: milliseconds per image at a batch; a batch that raises RuntimeError (memory) or ValueError is dropped.
        seconds: time left, of which SEARCH_SHARE may be spent; the first batch is always tried.
        pick: min; or max, to take the largest such batch.

    Raises:
        ValueError: no batch can be run.
    """
    begin, costs, out = time.perf_counter(), {}, []
    for batch in batches:
        if costs and time.perf_counter() - begin > SEARCH_SHARE * seconds:
            out.append(f"{batch} no time")
            continue
        try:
            costs[batch] = cost_ms(batch)
        except (RuntimeError, ValueError) as error:
            out.append(f"{batch} does not run")
            print(f"{name}, batch {batch}: {harness.described(error)}", flush=True)
    if not costs:
        raise ValueError(f"{name}: no batch of {batches} runs")
    tried = [f"{batch} {cost:.4g} ms an image" for batch, cost in costs.items()]
    text = f"batches tried: {', '.join([*tried, *out])}"
    print(f"{name}, {text}", flush=True)
    return pick(batch for batch, cost in costs.items() if cost <= (1 + TOLERANCE) * min(costs.values())), text


def possible(images: int, device: torch.device) -> list[int]:
    """The batches that divide a number of images; that number itself if none does."""
    return [batch for batch in BATCHES[device.type] if images % batch == 0] or [images]


def next_to(batch: int, images: int, device: torch.device) -> tuple[int, ...]:
    """The next larger batch that divides a number of images, else the next smaller, else none."""
    known = possible(images, device)
    larger, smaller = [b for b in known if b > batch], [b for b in known if b < batch]
    return tuple(larger[:1] or smaller[-1:])


def compiled_rates(
    call_at: Callable[[int], Callable[[int], object]],
    batches: tuple[int, ...],
    device: torch.device,
    left: Callable[[], float],
) -> dict[int, float | str]:
    """Images per second of a compiled pipeline at each batch, timed on its second call; or why there is no rate.

    Args:
        call_at: returns a call of the pipeline at a batch size, which compiles when it is first called.
        left: seconds that may still be spent; a batch after the first is started only if there is time for it and for
        the
            engine's own compilation after it, assuming that each takes as long as the slowest so far.
    """
    rates: dict[int, float | str] = {}
    longest = 0.0
    for batch in batches:
        if rates and left() < 2 * longest:
            rates[batch] = "no time"
            continue
        begin = time.perf_counter()
        try:
            call = call_at(batch)
            harness.block(lambda call=call, batch=batch: call(batch), 1, device)
            rates[batch] = batch / harness.block(lambda call=call, batch=batch: call(batch), 1, device)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            rates[batch] = "does not fit"
        longest = max(longest, time.perf_counter() - begin)
    return rates


def fastest(rates: dict[int, float | str]) -> tuple[int, str]:
    """The batch with the highest rate, and in words all that were tried."""
    known = {batch: rate for batch, rate in rates.items() if not isinstance(rate, str)}
    told = [f"{b} {rate if isinstance(rate, str) else f'{rate:.4g} images/s'}" for b, rate in rates.items()]
    return max(known, key=known.get), f"batches tried: {', '.join(told)}"


def _medians(calls: dict[str, Callable[[], object]], device: torch.device) -> list[float]:
    """The median milliseconds of each call; raises ValueError if one fails."""
    found = harness.compare(calls, device, blocks=3, block_seconds=0.0)
    if found.failures:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in found.failures.items()))
    return [found.timings[name].median_ms for name in calls]


def _parts(pipeline: StableDiffusion, setting: Setting, batch: int) -> dict[str, Callable[[], object]]:
    """One UNet call, one encoding and one decoding of a batch, on random inputs."""
    device, dtype, size, side = pipeline.device, pipeline.dtype, pipeline.latent_size, pipeline.resolution
    rows = batch * (2 if setting.calls(pipeline.scheduler)[1] else 1)
    z = torch.randn(rows, 4, size, size, device=device, dtype=dtype)
    context = torch.randn(rows, pipeline.num_tokens, pipeline.text_width, device=device, dtype=dtype)
    x = torch.rand(batch, 3, side, side, device=device, dtype=dtype)
    t = torch.tensor(400, device=device)
    return {
        "unet": lambda: pipeline.unet(z, t, context),
        "encode": lambda: pipeline.vae.encode(x),
        "decode": lambda: pipeline.vae.decode(z[:batch]),
    }
