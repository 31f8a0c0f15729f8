"""Times each phase of a step without synchronizing with the device; the only module that reads clocks.

On a CPU a phase is timed by the wall clock. On a GPU it is bracketed by a pair of CUDA events, which are polled and
read once they have completed, so a step never waits for its own measurement.
"""

import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modules.phases import BESIDE, STEP_PHASES


class Meter:
    """Accumulates seconds by phase, over the whole run and over the current interval; also tracks peak memory.

    State: `seconds` and `counts` by phase over the whole run; private, the seconds since the last `interval()`.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._interval: dict[str, float] = defaultdict(float)
        self._interval_start = time.perf_counter()
        self._pending: deque = deque()
        self._stage: tuple[str, float] | None = None  # the current stage and when it began
        self._earlier_peak = 0  # bytes, peak before the last `restart_peak`

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose time is added to the phase `name`."""
        with torch.profiler.record_function(name):
            if self.on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._pending.append((name, start, end))
                self._poll()
            else:
                start = time.perf_counter()
                yield
                self._add(name, time.perf_counter() - start)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context whose wall time, including the host's, is added to "stage.<name>"."""
        self._stage = (f"stage.{name}", time.perf_counter())
        yield
        self._add(self._stage[0], time.perf_counter() - self._stage[1])
        self._stage = None

    def interval(self, steps: int) -> dict[str, float]:
        """Mean ms per step since the last call, of each phase and of the step (wall time); starts a new interval."""
        self._poll()
        now = time.perf_counter()
        names = [name for name in (*STEP_PHASES, BESIDE) if name in self._interval]
        row = {f"{name}_ms": 1e3 * self._interval[name] / max(1, steps) for name in names}
        row["step_ms"] = 1e3 * (now - self._interval_start) / max(1, steps)
        self._interval.clear()
        self._interval_start = now
        return row

    def restart_interval(self) -> None:
        """Start a new interval here and discard the time since the last one, which belongs to no step."""
        self._poll()
        self._interval.clear()
        self._interval_start = time.perf_counter()

    def peak_memory_gib(self, pool_bytes: int = 0, *, since_restart: bool = False) -> float:
        """Peak memory so far: on a GPU, of its tensors plus the pools of captured graphs; on a CPU, of the process.

        torch counts a graph's memory as allocated only during its capture, although the pool is kept and used by every
        replay, so pools are added to what torch counts.

        Args:
            pool_bytes: size of the pools of graphs replayed since the last `restart_peak` (see `Slots.pool_bytes`).
            since_restart: on a GPU, leave out the peak before the last `restart_peak`.
        """
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() + pool_bytes
            return (peak if since_restart else max(peak, self._earlier_peak)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def restart_peak(self, pool_bytes: int = 0) -> None:
        """Restart the peak measurement, after a capture or at the start of a measurement; the old peak is kept."""
        if self.on_gpu:
            self._earlier_peak = max(self._earlier_peak, torch.cuda.max_memory_allocated() + pool_bytes)
            torch.cuda.reset_peak_memory_stats()

    def state_dict(self) -> dict:
        """Seconds and counts of the run so far, including the current stage."""
        self._poll()
        seconds = dict(self.seconds)
        if self._stage is not None:
            name, start = self._stage
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return {"seconds": seconds, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Add the time spent by earlier processes of this run; a stage that was resumed counts the time of all."""
        for total, before in ((self.seconds, state["seconds"]), (self.counts, state["counts"])):
            for name, value in before.items():
                total[name] += value

    def _poll(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._add(name, start.elapsed_time(end) / 1e3)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self.counts[name] += 1
        self._interval[name] += seconds


def timer(device: torch.device | str) -> Callable[..., float]:
    """A function f(work, repeats, warmup) -> median ms of work(), for tuners, which must not read clocks themselves."""

    def measure(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
        on_gpu = torch.device(device).type == "cuda"
        for _ in range(warmup):
            work()
        times = []
        for _ in range(repeats):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[len(times) // 2]

    return measure
