"""Lists the operations of a step by running torch's profiler over a few real steps, and finds the waits in them."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from modules.phases import STEP_PHASES
from modules.training.job import State
from modules.training.timing import PARTS, parts_timed, synchronize

ANNOTATIONS = {*STEP_PHASES, *(f"part.{name}" for name in PARTS)}
NAME_WIDTH = 56


@dataclass(frozen=True)
class Operation:
    """A kernel on a GPU, an operator on a CPU."""

    name: str
    ms: float  # per step, without the operations it calls
    calls: float  # per step


@dataclass(frozen=True)
class Trace:
    """The operations of a few profiled steps; all figures are means per step."""

    operations: tuple[Operation, ...]  # the longest first, without annotations
    launches: float  # of kernels or operators
    busy_ms: float  # time in which the GPU had work, overlaps counted once; on a CPU the sum over all operators


def trace_steps(state: State, step: Callable[[State], None], count: int, path: Path) -> Trace:
    """Profile `count` steps and write them to `path` as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""
    on_gpu = state.meter.on_gpu
    if not on_gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report the missing GPU as an error
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with parts_timed(state), profile(activities=activities, acc_events=True) as recorded:
        for _ in range(count):
            step(state)
        synchronize(state)
    path.unlink(missing_ok=True)
    recorded.export_chrome_trace(str(path))
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = []
    for event in recorded.key_averages():
        if event.device_type != kind or event.is_user_annotation or event.key in ANNOTATIONS:
            continue
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append(Operation(short_name(event.key), own_us / 1e3 / count, event.count / count))
    found.sort(key=lambda operation: -operation.ms)
    busy_ms = sum(operation.ms for operation in found)
    if on_gpu:
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in recorded.events()
            if event.device_type == kind and not event.is_user_annotation
        ]
        busy_ms = covered(spans) / 1e3 / count
    return Trace(tuple(found), sum(operation.calls for operation in found), busy_ms)


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def find_syncs(state: State, step: Callable[[State], None], count: int) -> list[str] | None:
    """Lines of code ("file.py:12") where a step waits for the GPU, from torch's sync debug mode; None on a CPU."""
    if not state.meter.on_gpu:
        return None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # emits a warning about itself, which is filtered below
            for _ in range(count):
                step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})


def short_name(name: str) -> str:
    """A kernel's name without namespaces and template arguments, cut to the width of a table."""
    name = name.removeprefix("void ").split("<")[0].split("(")[0]
    for prefix in ("at::native::", "(anonymous namespace)::"):
        name = name.replace(prefix, "")
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
