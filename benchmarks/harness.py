"""How this project measures: ratios side by side in one process, quantiles, ceilings of the same run, appended rows.

A figure alone says nothing on a machine that is shared, throttled or simply another one. So candidates run in
alternating blocks (A B C A A B C A ...), the first one twice a round, so that the spread of equal code is printed
beside every ratio; matrix product and copy are measured in the same run as ceilings; and each row carries commit, date,
device, versions, switches, peak memory and what quality the timed code had. Rows are appended, never edited (ledger.py).
"""

import ctypes
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modules.runtime import environment

RESULTS = Path(__file__).resolve().parent / "results"
CONDITIONS = ("date", "commit", "device", "torch", "triton", "diffusers", "xformers", "threads", "load")


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one candidate, one mean per block."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def quantile_ms(self, q: float) -> float:
        """The q-quantile over blocks by linear interpolation."""
        return 1e3 * torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item()

    def row(self) -> dict[str, float | int]:
        """median_ms, p10_ms, p90_ms and blocks, as columns."""
        return {
            "median_ms": round(self.median_ms, 5),
            "p10_ms": round(self.quantile_ms(0.1), 5),
            "p90_ms": round(self.quantile_ms(0.9), 5),
            "blocks": len(self.seconds),
        }


@dataclass(frozen=True)
class Comparison:
    """Timings of candidates that ran in alternating blocks; the first is the baseline."""

    timings: dict[str, Timing]
    spread_pct: float  # how far two sets of blocks of the baseline itself lie apart, in percent of its median
    failures: dict[str, str] = field(default_factory=dict)  # candidates that could not run, and why
    held_mib: dict[str, float] = field(default_factory=dict)  # of those that ran out of memory: what they had got

    @property
    def baseline(self) -> str:
        """The candidate that ratios are relative to: the first that ran."""
        return next(iter(self.timings))

    def speedup(self, name: str) -> float:
        """Time of the baseline over time of `name`: > 1 is faster."""
        return self.timings[self.baseline].median_ms / self.timings[name].median_ms


class Budget:
    """A bound on the wall time of a benchmark, asked between measurements."""

    def __init__(self, seconds: float):
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds left; negative when it is spent. 0 as the bound means no bound."""
        return self.seconds - (time.perf_counter() - self._start) if self.seconds else float("inf")


def compare(
    candidates: dict[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    blocks: int = 5,
    block_seconds: float = 0.05,
    max_seconds: float = float("inf"),
    enough: Callable[[float], bool] = lambda round_seconds: False,
    clock: str = "wall",
    before: Callable[[], object] | None = None,
) -> Comparison:
    """Time candidates in alternating blocks after a warm-up call each, two where blocks repeat it.

    Every block repeats its candidate until it lasts `block_seconds`, as its warm-up predicted (0: once); at least one
    round is run, and a new one only while `max_seconds` lasts and `enough`, told how long a round takes, says no. A candidate that cannot run its warm-up (no memory, not installed)
    is reported in `failures` with the reason; if that is the first, the next one is the baseline. Raises ValueError if
    none is left. `clock`, `before`: see `block`.
    """
    repeats, failures, held_mib = {}, {}, {}
    apart = 0.0  # seconds of what precedes a call: no part of its time, but of how long a block lasts
    if before is not None:
        before()
        apart = block(before, 1, device, clock)
    for name, function in candidates.items():
        if torch.device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        try:
            block(function, 1, device, clock)  # compiles, allocates, fills caches
            repeats[name] = 1
            if block_seconds:
                seconds_a_call = apart + block(function, 1, device, clock, before)
                repeats[name] = max(1, round(block_seconds / max(seconds_a_call, 1e-9)))
        except Exception as error:  # a peer that is not installed, a kernel that does not compile, no memory
            failures[name] = described(error)
            repeats.pop(name, None)
            if isinstance(error, torch.OutOfMemoryError) and torch.device(device).type == "cuda":
                held_mib[name] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 2)
                failures[name] += f"; {held_mib[name]:.0f} MiB were held when it stopped"
        if name in failures and torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    if not repeats:
        raise ValueError(f"no candidate of {', '.join(candidates)} could run: {failures}")
    baseline = next(iter(repeats))
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    again: list[float] = []
    start = time.perf_counter()
    for done in range(blocks):
        took = time.perf_counter() - start
        if done and (took > max_seconds or enough(took / done)):
            break
        for name, count in repeats.items():
            seconds[name].append(block(candidates[name], count, device, clock, before))
        again.append(block(candidates[baseline], repeats[baseline], device, clock, before))
    timings = {name: Timing(name, tuple(values)) for name, values in seconds.items()}
    spread = abs(statistics.median(again) / statistics.median(seconds[baseline]) - 1)
    return Comparison(timings, round(100 * spread, 2), failures, held_mib)


def block(
    function: Callable[[], object],
    count: int,
    device: torch.device | str,
    clock: str = "wall",
    before: Callable[[], object] | None = None,
) -> float:
    """Mean seconds a call of `count` calls: device events on a GPU; on a CPU the wall clock, or with clock "process"
    the processor time of all our threads, which others on the machine disturb less (compare one thread with one).

    before: what is called before each call, outside of its time.
    """
    on_gpu = torch.device(device).type == "cuda"
    if before is not None:
        calls = _calls_apart_on_gpu if on_gpu else _calls_apart
        return calls(function, count, before, time.process_time if clock == "process" else time.perf_counter) / count
    if on_gpu:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count
    now = time.process_time if clock == "process" else time.perf_counter
    start = now()
    for _ in range(count):
        function()
    return (now() - start) / count


def _calls_apart(function, count: int, before, now: Callable[[], float]) -> float:
    """Seconds of `count` calls without those of what precedes each."""
    seconds = 0.0
    for _ in range(count):
        before()
        start = now()
        function()
        seconds += now() - start
    return seconds


def _calls_apart_on_gpu(function, count: int, before, _now) -> float:
    """The same by a pair of events a call; the host never waits between calls, so launches stay hidden."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for begin, end in events:
        before()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / 1e3


def described(error: BaseException) -> str:
    """An exception as one line: its class, unless that says the same, and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return text if isinstance(error, torch.OutOfMemoryError) else f"{kind}: {text}"[:300]


def is_lost(device: torch.device | str) -> bool:
    """Whether a GPU answers this process no more: after an illegal access every later call of the process fails."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"device: {described(error)}", flush=True)
        return True
    return False


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """`function` on a CUDA device as replays of a graph, captured at its first call; its outputs are static.

    A replay allocates nothing: what a call holds is to be measured on `launched` of it.
    """
    replay: list[Callable[[], object]] = []

    def call():
        if not replay:
            replay.append(_capture(function))
        return replay[0]()

    call.launched = function
    return call


def launched(function: Callable[[], object]) -> Callable[[], object]:
    """What `function` replays, launched one by one; itself if it is no `replayed`."""
    return getattr(function, "launched", function)


def _capture(function: Callable[[], object], warm_up: int = 3) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy initialization are no part of a capture
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay


def peak_mib(
    function: Callable[[], object], device: torch.device | str = "cpu", *, pool_bytes: int = 0
) -> float | None:
    """Memory that one call needs beyond what is held before it, MiB; None where the system does not tell.

    On a GPU what torch's allocator counts, and the pools of captured graphs that the call replays: their memory is held
    all the time and a replay works in it, which the allocator does not count. On a Linux CPU by the high-water mark of
    the process, which sees whole pages only.

    Args:
        pool_bytes: of those graphs, as measured when they were captured (see `modules.diffusion.capture`).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before + pool_bytes) / 2**20, 2)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def kib(field_name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field_name))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that were freed but kept would hide what the call needs
        reset.write_text("5")
    except OSError:  # a container may forbid it
        return None
    before = kib("VmRSS")
    function()
    return round(max(0, kib("VmHWM") - before) / 2**10, 2)


def conditions(device: torch.device | str = "cpu") -> dict[str, object]:
    """The columns every row begins with: CONDITIONS."""
    found = environment()
    packages = found["packages"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": found["commit"],
        "device": found["gpu"] if torch.device(device).type == "cuda" else f"{found['cpu']}, {found['cores']} cores",
        "torch": packages.get("torch") or torch.__version__,
        **{name: packages.get(name) or "" for name in ("triton", "diffusers", "xformers")},  # empty: not installed
        "threads": torch.get_num_threads(),
        "load": _load(),
    }


def results_file(name: str, device: torch.device | str) -> Path:
    """Where rows of a benchmark go: <name>_gpu.csv or <name>_cpu.csv below $OUT where it is set, else results/."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / f"{name}_{'gpu' if torch.device(device).type == 'cuda' else 'cpu'}.csv"


def rows_file(asked: str, name: str, device: torch.device | str) -> Path | None:
    """Where the rows of --out go: "none" nowhere, "" to `results_file`, into a folder under that file's name."""
    if asked == "none":
        return None
    usual = results_file(name, device)
    return usual if not asked else Path(asked) / usual.name if Path(asked).is_dir() else Path(asked)


def finish(document: dict[str, object]) -> None:
    """Print the benchmark's outcome as one line of JSON, the last line of its output."""
    print(json.dumps(document, default=str), flush=True)


def _load() -> float:
    """Processes that wanted a core in the last minute, ours among them: above `cores`, times are upper bounds."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return float("nan")
