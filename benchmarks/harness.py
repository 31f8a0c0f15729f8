"""How this project measures: ratios side by side in one process, quantiles, ceilings of the same run, appended rows.

A time alone says little on a machine that is shared, throttled or simply a different one. So candidates run in
alternating blocks (A B C A A B C A ...). The first one runs twice per round, so that every ratio can be printed with
the spread between runs of equal code. Matrix product and copy are measured in the same run as ceilings. Each row
carries commit, date, device, versions, switches, peak memory and the quality of the timed code. Rows are appended,
never edited (ledger.py).
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
    """Seconds per call of one candidate: one mean per block."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def quantile_ms(self, q: float) -> float:
        """The q-quantile over blocks, in milliseconds, by linear interpolation."""
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
    spread_pct: float  # difference between the medians of two sets of blocks of the baseline itself, in percent
    failures: dict[str, str] = field(default_factory=dict)  # candidates that could not run, and why
    held_mib: dict[str, float] = field(default_factory=dict)  # what candidates that ran out of memory held by then

    @property
    def baseline(self) -> str:
        """The candidate that ratios are relative to: the first that ran."""
        return next(iter(self.timings))

    def speedup(self, name: str) -> float:
        """Time of the baseline over time of `name`: > 1 is faster."""
        return self.timings[self.baseline].median_ms / self.timings[name].median_ms


class Budget:
    """A limit on the wall time of a benchmark, checked between measurements."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds left; negative once it is spent. A limit of 0 means no limit."""
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
    """Time candidates in alternating blocks, after one warm-up call each (two if blocks repeat their candidate).

    A block repeats its candidate as often as fits `block_seconds`, predicted from the warm-up (0: once). At least one
    round is run; another starts only while `max_seconds` is not exceeded and `enough`, given the seconds per round,
    returns False. A candidate whose warm-up fails (no memory, not installed) is reported in `failures` with the reason;
    if it is the first, the next one becomes the baseline. `clock`, `before`: see `block`.

    Raises ValueError if no candidate can run.
    """
    repeats, failures, held_mib = {}, {}, {}
    apart = 0.0  # seconds of `before`: not part of a call's time, but of a block's duration
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
    """Mean seconds per call over `count` calls.

    On a GPU by device events. On a CPU by the wall clock or, with clock "process", the processor time of all threads of
    this process, which other work on the machine disturbs less (only compare single-threaded with single-threaded).

    before: is called before each call and not timed.
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
    """Seconds of `count` calls, not counting the calls of `before`."""
    seconds = 0.0
    for _ in range(count):
        before()
        start = now()
        function()
        seconds += now() - start
    return seconds


def _calls_apart_on_gpu(function, count: int, before, _now) -> float:
    """The same with a pair of events per call; the host does not wait between calls, so launch times stay hidden."""
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
    """An exception as one line: its class (not for out-of-memory errors) and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return text if isinstance(error, torch.OutOfMemoryError) else f"{kind}: {text}"[:300]


def is_lost(device: torch.device | str) -> bool:
    """Whether the GPU is unusable for this process: after an illegal access every later call of the process fails."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"device: {described(error)}", flush=True)
        return True
    return False


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """`function` on a CUDA device as replays of a graph, captured on the first call; its outputs are static.

    A replay allocates nothing, so the memory of a call has to be measured on `launched` of it.
    """
    replay: list[Callable[[], object]] = []

    def call():
        if not replay:
            replay.append(_capture(function))
        return replay[0]()

    call.launched = function
    return call


def launched(function: Callable[[], object]) -> Callable[[], object]:
    """The function that `function` replays, whose kernels are launched one by one; itself if it is not `replayed`."""
    return getattr(function, "launched", function)


def _capture(function: Callable[[], object], warm_up: int = 3) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy initialization must not be captured
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
    """The memory in MiB that one call needs beyond what is held before it; None if the system does not report it.

    On a GPU: what torch's allocator counts, plus the pools of captured graphs that the call replays. Pool memory is
    held all the time, so that the allocator does not count it during a replay. On a Linux CPU: the high-water mark of
    the process, which counts whole pages only.

    Args:
        pool_bytes: size of these pools, as measured when the graphs were captured (see `modules.diffusion.capture`).
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
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that the process keeps would hide what the call needs
        reset.write_text("5")
    except OSError:  # a container may forbid it
        return None
    before = kib("VmRSS")
    function()
    return round(max(0, kib("VmHWM") - before) / 2**10, 2)


def conditions(device: torch.device | str = "cpu") -> dict[str, object]:
    """The columns that every row starts with: CONDITIONS."""
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
    """The file for the rows of a benchmark: <name>_gpu.csv or <name>_cpu.csv in $OUT if it is set, else in results/."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / f"{name}_{'gpu' if torch.device(device).type == 'cuda' else 'cpu'}.csv"


def rows_file(asked: str, name: str, device: torch.device | str) -> Path | None:
    """The file that --out names: None for "none", `results_file` for "", a file of that name in it for a folder."""
    if asked == "none":
        return None
    usual = results_file(name, device)
    return usual if not asked else Path(asked) / usual.name if Path(asked).is_dir() else Path(asked)


def finish(document: dict[str, object]) -> None:
    """Print the benchmark's results as one line of JSON, the last line of its output."""
    print(json.dumps(document, default=str), flush=True)


def _load() -> float:
    """Processes that wanted a core in the last minute, including ours: above `cores`, times are upper bounds."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return float("nan")
