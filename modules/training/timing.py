"""Times real steps on a throwaway state: how long they take, in which parts, and what this machine could do at best.

A window of steps covers whole turnovers of the slots and whole decoded batches, so that exactly as many images finish
and are decoded in it as the ratio requires. Times are wall-clock, with the device synchronized at both ends.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import torch

from kernels import backend
from kernels.linear import frozen_linear
from modules.meter import Meter, timer
from modules.runtime import dtype_name, stream
from modules.training.job import State

WARMUP_STEPS = 2
PARTS = {"unet": "UNet", "vae": "VAE decode", "text": "text encoder"}


@dataclass(frozen=True)
class Timing:
    """The timing of a window of steps; all figures but `steps` and `peak_gib` are means per step."""

    steps: int
    step_ms: float
    phase_ms: dict[str, float]
    part_ms: dict[str, float]  # of the generate phase, by PARTS
    images: float  # generated
    ticks: float
    peak_gib: float  # of the window: tensors at their peak plus the pools of captured graphs; on a CPU, of the process

    def share(self, phase: str) -> float:
        """Fraction of the step's time that a phase takes."""
        return self.phase_ms.get(phase, 0.0) / self.step_ms


@dataclass(frozen=True)
class Ceilings:
    """The rates this device reached in this run on a large matrix product and a large copy."""

    tflop_per_s: float
    gib_per_s: float  # read plus written
    what: str


def window(state: State, least: int) -> int:
    """Steps of a window: at least `least`, generating whole turnovers of the slots and whole decoded batches."""
    if state.generator is None or not (rate := state.config.generation.images_per_step):
        return least
    slots = state.generator.slots
    turnover = math.ceil(math.lcm(len(slots.occupants), slots.decode_batch) / rate)
    return turnover * math.ceil(least / turnover)


def time_steps(state: State, step: Callable[[State], None], count: int, warmup: int = WARMUP_STEPS) -> Timing:
    """Take `warmup` untimed steps, then time `count` steps."""
    meter = state.meter
    with parts_timed(state):
        for _ in range(warmup):
            step(state)
        synchronize(state)
        meter.restart_peak(state.pool_bytes)
        meter.restart_interval()  # also reads the events of the warm-up, which must not count
        before, seconds = _counts(state), {name: meter.seconds[f"part.{name}"] for name in PARTS}
        for _ in range(count):
            step(state)
        synchronize(state)
        times = meter.interval(count)
    images, ticks = (now - then for now, then in zip(_counts(state), before, strict=True))
    return Timing(
        steps=count,
        step_ms=times.pop("step_ms"),
        phase_ms={name.removesuffix("_ms"): value for name, value in times.items()},
        part_ms={name: 1e3 * (meter.seconds[f"part.{name}"] - seconds[name]) / count for name in PARTS},
        images=images / count,
        ticks=ticks / count,
        peak_gib=meter.peak_memory_gib(state.pool_bytes, since_restart=True),
    )


def synchronize(state: State) -> None:
    """Wait for the device, outside of any step."""
    if state.meter.on_gpu:
        torch.cuda.synchronize()


@contextmanager
def parts_timed(state: State) -> Iterator[None]:
    """Context in which the meter also times UNet, VAE decode and text encoder, as "part.<name>"."""
    if state.generator is None:
        yield
        return
    slots = state.generator.slots
    targets = [(slots.in_flight, "step", "unet"), (slots, "decode", "vae"), (slots.pipeline, "embed_ids", "text")]
    replaced = [(owner, name, vars(owner).get(name)) for owner, name, _ in targets]
    for owner, name, part in targets:
        setattr(owner, name, _measured(getattr(owner, name), state.meter, f"part.{part}"))
    try:
        yield
    finally:
        for owner, name, own in replaced:
            if own is None:
                delattr(owner, name)  # uncovers the method of the class
            else:
                setattr(owner, name, own)


@torch.no_grad()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rate of a matrix product, 2 n^3 FLOPs, and of a copy, each from the median time of its calls.

    n = 8192 and 1 GiB on a GPU; n = 1024 and 32 MiB on a CPU, where in fp32 the faster of torch's and oneDNN's counts.
    """
    on_gpu = device.type == "cuda"
    n, mib = (8192, 1024) if on_gpu else (1024, 32)
    draw = stream(0, "ceilings")
    a, b = (torch.randn(n, n, generator=draw).to(device, dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(256, (2**20,), generator=draw, dtype=torch.uint8).repeat(mib).to(device)
    target, measure = torch.empty_like(source), timer(device)
    products = {"": lambda: torch.mm(a, b, out=product)}
    if device.type == "cpu" and dtype == torch.float32 and backend.has_onednn():
        products["oneDNN's "] = lambda: frozen_linear(a, b)  # used by frozen layers, and often the faster one
    times = {whose: measure(work, repeats=5) for whose, work in products.items()}
    whose, matmul_ms = min(times.items(), key=lambda item: item[1])
    copy_ms = measure(lambda: target.copy_(source), repeats=5)
    return Ceilings(
        2 * n**3 / matmul_ms / 1e9,
        2 * mib / 1024 / copy_ms * 1e3,
        f"{whose}{dtype_name(dtype)} product of {n}, copy of {mib} MiB",
    )


def copied(tree):
    """A deep copy of a tree of tensors and plain values; tensors are detached, tuples become lists."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copied(value) for value in tree]
    return tree


def _counts(state: State) -> tuple[int, int]:
    if state.generator is None:
        return 0, 0
    counts = state.generator.slots.counts
    return counts["finished"], counts["ticks"]


def _measured(method: Callable, meter: Meter, name: str) -> Callable:
    @wraps(method)
    def timed(*args, **kwargs):
        with meter.phase(name):
            return method(*args, **kwargs)

    return timed
