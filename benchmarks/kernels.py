"""Each kernel against eager torch, torch.compile and its named peer: `python -m benchmarks.kernels`.

On a GPU the full sizes and the Triton kernels; on a CPU a reduced form that times the definitions against the peers.
Rows are appended to benchmarks/results/kernels_gpu.csv or kernels_cpu.csv; at the end, benchmarks/verdicts.py decides
whether each kernel stays. The last line printed is one JSON document.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import harness, ledger
from benchmarks.ceilings import Ceilings, cold_cache, measure_ceilings
from benchmarks.kernel_case import Case
from benchmarks.kernel_cases import SWEEPS
from benchmarks.verdicts import verdicts
from kernels import backend
from modules.runtime import keep_freed_memory

COLUMNS = (  # of a row, after its conditions
    "op", "implementation", "shape", "dtype", "median_ms", "p10_ms", "p90_ms", "blocks", "spread_pct", "speedup",
    "gib_per_s", "tflop_per_s", "ceiling_pct", "peak_mib", "quality", "switches",
    "launches",  # Triton launches in one call, counted on the host; empty for candidates that launch none themselves
    "baseline",  # the candidate that `speedup` is relative to
)  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """Run the chosen ops, append their rows, print a table and the JSON document; returns that document."""
    options = _parse(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and graphs belong to the current device
    keep_freed_memory(device)  # as a run does, for every implementation alike
    budget = harness.Budget(options.budget_seconds)
    conditions, ceilings = harness.conditions(device), measure_ceilings(device, clock=options.clock)
    print(f"{conditions['device']}, torch {conditions['torch']}, triton {conditions['triton']}, "
          f"{conditions['threads']} threads, load {conditions['load']}")  # fmt: skip
    print(f"ceilings: {ceilings.matmul_tflop_per_s:.2f} TFLOP/s, {ceilings.copy_gib_per_s:.1f} GiB/s ({ceilings.note})")
    rows, broken = [], []
    for op, number in in_turns(options):
        if op in broken:
            continue
        found = rows_of(op, number, device, ceilings, options, budget)
        rows += found
        if options.out:  # as they come: what ends this process takes no finished row with it
            ledger.append_rows(options.out, [conditions | row for row in found])
        if harness.is_lost(device):
            others, broken = [name for name in options.ops if name != op], options.ops
            print(f"the device is lost to this process after {op}; the other ops go on in a new one", flush=True)
            rows += _in_new_process(others, options, budget)
    document = {
        "benchmark": "kernels",
        **conditions,
        "ceilings": vars(ceilings),
        "rows": rows,
        "verdicts": verdicts(rows),
        "written": str(options.out or ""),
    }
    for op, verdict in document["verdicts"].items():
        print(f"{op}: {verdict}")
    harness.finish(document)
    return document


def in_turns(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(op, index of its size): the first size of every op before the second of any, so a budget cuts all ops alike."""
    sizes = {op: len(SWEEPS[op].reduced if options.reduced else SWEEPS[op].full) for op in options.ops}
    for number in range(max(sizes.values(), default=0)):
        yield from ((op, number) for op in options.ops if number < sizes[op])


def rows_of(
    op: str, number: int, device: torch.device, ceilings: Ceilings, options: argparse.Namespace, budget
) -> list[dict[str, object]]:
    """The rows of one op at one size; a single row with the reason if it is left out or cannot be measured."""
    sweep = SWEEPS[op]
    size = (sweep.reduced if options.reduced else sweep.full)[number]
    switches = f"compile={options.compile} clock={options.clock}"
    left_out = dict.fromkeys(COLUMNS, "") | {"op": op, "shape": " ".join(str(extent) for extent in size), "blocks": 0}
    if budget.left <= 0:
        print(f"skipped: budget  {op} {left_out['shape']}", flush=True)
        return [left_out | {"quality": "skipped: budget", "switches": switches}]
    try:
        case = sweep.build(device, options.compile, *size)
        rows = measure(case, device, ceilings, options, budget.left)
        return [row | {"switches": switches + row["switches"]} for row in rows]
    except Exception as error:  # an op that cannot be measured is a row, not the end of the others
        reason = f"failed: {harness.described(error)}"
        print(f"{op} {left_out['shape']} {reason}", flush=True)
        return [left_out | {"quality": reason, "switches": switches}]


def measure(
    case: Case, device: torch.device, ceilings: Ceilings, options: argparse.Namespace, seconds: float
) -> list[dict[str, object]]:
    """One row per candidate: time, ratio to the baseline, share of the ceiling, peak memory and error."""
    case.prepare()
    timed, switches, matmul = case.candidates, "", ceilings.tflop_per_s(case.dtype)
    if case.captured and device.type == "cuda":  # launched one by one, small kernels would measure the host
        timed = {name: harness.replayed(function) for name, function in timed.items()}
        switches += " graph replay"
    if before := cold_cache(device, case.bytes_moved):
        switches += " L2 flushed before each call"
    if case.operations and matmul != ceilings.matmul_tflop_per_s:
        switches += f" ceiling={case.dtype}"
    outcome = harness.compare(
        timed, device, blocks=options.blocks, max_seconds=seconds, clock=options.clock, before=before
    )
    print(f"{case.op} {case.shape} {case.dtype}  (A/A spread {outcome.spread_pct:.1f} %)")
    rows = []
    for name in case.candidates:
        timing = outcome.timings.get(name)
        times = timing.row() if timing else {"median_ms": "", "p10_ms": "", "p90_ms": "", "blocks": 0}
        seconds_a_call = timing.median_ms / 1e3 if timing else float("inf")
        gib_per_s = case.bytes_moved / 2**30 / seconds_a_call
        tflop_per_s = case.operations / 1e12 / seconds_a_call
        share = tflop_per_s / matmul if case.operations else gib_per_s / ceilings.copy_gib_per_s
        held = outcome.held_mib.get(name, "")  # where memory ended, the peak is at least that
        failed = "" if timing else f"failed: {outcome.failures[name]}" + "; peak_mib is a lower bound" * (held != "")
        row = {
            "op": case.op,
            "implementation": name,
            "shape": case.shape,
            "dtype": case.dtype,
            **times,
            "spread_pct": outcome.spread_pct,
            "speedup": round(outcome.speedup(name), 3) if timing else "",
            "gib_per_s": round(gib_per_s, 3),
            "tflop_per_s": round(tflop_per_s, 4),
            "ceiling_pct": round(100 * share, 2),
            "peak_mib": harness.peak_mib(harness.launched(case.candidates[name]), device) if timing else held,
            "quality": failed or _quality(case, name),
            "switches": switches,
            "launches": backend.launches_of(case.candidates[name]) or "" if timing and name == "triton" else "",
            "baseline": outcome.baseline if timing else "",
        }
        rows.append(row)
        print(f"  {name:26s} {row['median_ms'] or 'failed':>10} ms  x{row['speedup']}  {row['ceiling_pct']} % of ceiling  "
              f"{row['peak_mib']} MiB  {row['quality']}", flush=True)  # fmt: skip
    return rows


def _quality(case: Case, name: str) -> str:
    try:
        return case.error(name)
    except Exception as error:  # the time is measured; what could not be judged says so
        return f"not judged: {harness.described(error)}"


def _in_new_process(ops: list[str], options: argparse.Namespace, budget: harness.Budget) -> list[dict]:
    """The rows of the ops, measured from the start by a new process in which the device works."""
    if not ops or budget.left <= 0:
        return []
    command = [sys.executable, "-u", "-m", "benchmarks.kernels", "--ops", ",".join(ops), "--device", options.device]
    command += ["--blocks", str(options.blocks), "--out", str(options.out or "none")]
    command += ["--compile" if options.compile else "--no-compile"]
    command += ["--reduced" if options.reduced else "--no-reduced"]
    if options.budget_seconds:
        command += ["--budget-seconds", f"{budget.left:.0f}"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True)
    *text, last = done.stdout.strip().splitlines() or [""]
    print("\n".join(text), flush=True)
    return json.loads(last)["rows"] if last.startswith("{") else []


def _parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--ops", default=",".join(SWEEPS), help="comma-separated: " + ", ".join(SWEEPS))
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each candidate, >= 5 for quantiles")
    parser.add_argument(
        "--budget-seconds", type=float, default=0.0, help="stop beginning cases after this; 0: no bound"
    )
    parser.add_argument(
        "--clock", choices=("wall", "process"), default="wall", help="on a CPU; process: processor time, if others run"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="time torch.compile too"
    )
    parser.add_argument(
        "--reduced", action=argparse.BooleanOptionalAction, default=None, help="small sizes; default on a CPU"
    )
    parser.add_argument("--out", default="", help="CSV to append to, or its folder; 'none' writes nothing")
    options = parser.parse_args(argv)
    options.ops = [op.strip() for op in options.ops.split(",") if op.strip()]
    if unknown := [op for op in options.ops if op not in SWEEPS]:
        parser.error(f"--ops has {', '.join(unknown)}; known are {', '.join(SWEEPS)}")
    kind = torch.device(options.device).type
    options.reduced = kind == "cpu" if options.reduced is None else options.reduced
    options.out = harness.rows_file(options.out, "kernels", options.device)
    return options


if __name__ == "__main__":
    main()
