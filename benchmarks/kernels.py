"""Each kernel against eager torch, torch.compile and its named peer: `python -m benchmarks.kernels`.

On a GPU the full sizes and the Triton kernels; on a CPU a reduced form that times the definitions against the peers.
Rows are appended to benchmarks/results/kernels_gpu.csv or kernels_cpu.csv; the last line printed is one JSON document.
A kernel stays if it is >= 1.05x torch.compile in time, or >= 2x better in memory at equal time (kernels/backend.py).
"""

import argparse
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.kernel_cases import SWEEPS, Case


def main(argv: list[str] | None = None) -> dict:
    """Run the chosen ops, append their rows, print a table and the JSON document; returns that document."""
    options = _parse(argv)
    device = torch.device(options.device)
    budget = harness.Budget(options.budget_seconds)
    conditions, ceilings = harness.conditions(device), harness.measure_ceilings(device, clock=options.clock)
    print(f"{conditions['device']}, torch {conditions['torch']}, triton {conditions['triton']}, "
          f"{conditions['threads']} threads, load {conditions['load']}")  # fmt: skip
    print(f"ceilings: {ceilings.matmul_tflop_per_s:.2f} TFLOP/s, {ceilings.copy_gib_per_s:.1f} GiB/s ({ceilings.note})")
    switches = f"compile={options.compile} clock={options.clock}"
    rows = []
    for op in options.ops:
        for case in SWEEPS[op].cases(device, options.compile, options.reduced):
            if budget.left <= 0:
                print(f"budget of {budget.seconds:g} s is spent; left out: {op} {case.shape} and what follows")
                break
            measured = measure(case, device, ceilings, options, budget.left)
            rows += [conditions | row | {"switches": switches} for row in measured]
    if options.out:
        harness.append_rows(options.out, rows)
    document = {
        "benchmark": "kernels",
        **conditions,
        "ceilings": vars(ceilings),
        "rows": [{k: v for k, v in row.items() if k not in conditions} for row in rows],
        "written": str(options.out or ""),
    }
    harness.finish(document)
    return document


def measure(
    case: Case, device: torch.device, ceilings: harness.Ceilings, options: argparse.Namespace, seconds: float
) -> list[dict[str, object]]:
    """One row per candidate: time, ratio to eager, share of the ceiling, peak memory and error."""
    outcome = harness.compare(case.candidates, device, blocks=options.blocks, max_seconds=seconds, clock=options.clock)
    print(f"{case.op} {case.shape} {case.dtype}  (A/A spread {outcome.spread_pct:.1f} %)")
    rows = []
    for name in case.candidates:
        timing = outcome.timings.get(name)
        timed = timing.row() if timing else {"median_ms": "", "p10_ms": "", "p90_ms": "", "blocks": 0}
        seconds_a_call = timing.median_ms / 1e3 if timing else float("inf")
        gib_per_s = case.bytes_moved / 2**30 / seconds_a_call
        tflop_per_s = case.operations / 1e12 / seconds_a_call
        share = tflop_per_s / ceilings.matmul_tflop_per_s if case.operations else gib_per_s / ceilings.copy_gib_per_s
        row = {
            "op": case.op,
            "implementation": name,
            "shape": case.shape,
            "dtype": case.dtype,
            **timed,
            "spread_pct": outcome.spread_pct,
            "speedup": round(outcome.speedup(name), 3) if timing else "",
            "gib_per_s": round(gib_per_s, 3),
            "tflop_per_s": round(tflop_per_s, 4),
            "ceiling_pct": round(100 * share, 2),
            "peak_mib": harness.peak_mib(case.candidates[name], device) if timing else "",
            "quality": case.error(name) if timing else outcome.failures[name],
        }
        rows.append(row)
        print(f"  {name:26s} {row['median_ms'] or 'failed':>10} ms  x{row['speedup']}  {row['ceiling_pct']} % of ceiling  "
              f"{row['peak_mib']} MiB  {row['quality']}")  # fmt: skip
    return rows


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
    parser.add_argument("--out", default="", help="CSV to append to; 'none' writes nothing")
    options = parser.parse_args(argv)
    options.ops = [op.strip() for op in options.ops.split(",") if op.strip()]
    if unknown := [op for op in options.ops if op not in SWEEPS]:
        parser.error(f"--ops has {', '.join(unknown)}; known are {', '.join(SWEEPS)}")
    kind = torch.device(options.device).type
    options.reduced = kind == "cpu" if options.reduced is None else options.reduced
    default = harness.RESULTS / f"kernels_{'gpu' if kind == 'cuda' else 'cpu'}.csv"
    options.out = None if options.out == "none" else Path(options.out or default)
    return options


if __name__ == "__main__":
    main()
