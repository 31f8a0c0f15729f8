"""At which batch a technique is at its best: at somebody else's best batch its ratio to another would mean nothing.

A pipeline that runs as it is is timed by its parts at every batch, the slot engine by its tick. One that is compiled is
compiled anew for every batch, which takes a minute or two, so few are tried, and its row says which.
"""

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks import harness
from benchmarks.engine import SlotEngine
from benchmarks.inputs import Setting
from modules.diffusion.pipeline import StableDiffusion

BATCHES = {"cuda": (8, 16, 32, 64), "cpu": (4, 8, 16, 32)}
TOLERANCE = 0.02  # batches that cost at most this much more an image are as good
SEARCH_SHARE = 0.2  # of the time left that a search by parts may take


@torch.no_grad()
def best_batch(
    pipeline: StableDiffusion, setting: Setting, images: int, name: str, seconds: float = float("inf")
) -> tuple[int, str]:
    """The batch at which diffusers' pipeline makes most images a second, by the time of its parts, and what was tried.

    Timed are one guided UNet call, one encoding and one decoding at each batch; an image costs
    (calls x UNet + encode + decode) / batch. A batch that does not fit into memory is out; of those within TOLERANCE of
    the best the smallest is taken.

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
    """The number of slots at which an engine's ticks cost least an image, and what was tried.

    Of those as good as the best the largest is taken: compiled, which is not tried here, more slots gain more.

    Args:
        build: the engine with that many slots.
    """

    def image_ms(slots: int) -> float:
        engine = build(slots)
        engine.slots.tick()  # real latents
        return engine.request(0).cost * _medians({"tick": engine.slots.in_flight.step}, device)[0] / slots

    return cheapest(image_ms, possible(images, device), name, seconds, pick=max)


def cheapest(
    cost_ms: Callable[[int], float],
    batches: list[int],
    name: str,
    seconds: float,
    pick: Callable[[Iterable[int]], int] = min,
) -> tuple[int, str]:
    """The smallest of the batches whose cost is within TOLERANCE of the least, and the costs of all in words.

    Args:
        pick: max takes the largest of them instead.
        cost_ms: milliseconds an image takes at a batch; one that raises RuntimeError (memory) or ValueError is out.
        seconds: time left, of which SEARCH_SHARE may be spent; the first batch is always tried.

    Raises:
        ValueError: not one batch can be run.
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
    """Batches that divide a number of images; that number itself where none does."""
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
    """Images a second of a compiled pipeline at each batch, by its second call; or why one was not tried.

    Args:
        call_at: a call of the pipeline in batches of a size, which compiles when it is first called.
        left: seconds that may still be spent; after the first, a batch is begun only if there is time for it and for the
            engine's own compilation after it, should each be as slow as the first.
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
    """The batch with the highest rate, and all that were tried in words."""
    known = {batch: rate for batch, rate in rates.items() if not isinstance(rate, str)}
    told = [f"{b} {rate if isinstance(rate, str) else f'{rate:.4g} images/s'}" for b, rate in rates.items()]
    return max(known, key=known.get), f"batches tried: {', '.join(told)}"


def _medians(calls: dict[str, Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds of each call; ValueError if one fails."""
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
