"""Images a second, one row a technique, against its peers in the same process: `python -m benchmarks.generator`.

A waterfall: DA-Fusion's loop as published, diffusers' image-to-image pipeline (default attention, xformers, compiled,
each at its own best batch), the slot engine as it is and compiled. All do the same work: strength .5 of 50 DDIM steps
at guidance 7.5, with the same weights, sources, prompts, dtype, threads and output size, in alternating blocks. Each
row has the share of the fastest matrix product measured in this run (MFU), the share of the floor, and the PSNR of its
images against diffusers' from the same latents and noise. The floor is the time that the UNet calls and the decoding
would take at that rate, with operations counted as diffusers computes them; an engine that upsamples in another form
needs fewer. One UNet call of the fastest engine is timed separately, at its own rows and at 64.

The column `peak_mib` is the memory that making one batch needs beyond what is held before it: on a GPU what torch
counts as allocated plus the pools of captured graphs, on a CPU by the high-water mark of the process
(`harness.peak_mib`).

Rows are appended to benchmarks/results/generator_gpu.csv or generator_cpu.csv; the last line printed is one JSON
document, with `ratios` of the fastest exact engine row to each peer.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks import harness, inputs, ledger, peers, unet_call
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.precompile import precompile
from benchmarks.techniques import (
    BLOCKS_SHARE,
    COMPILED,
    DA_FUSION,
    DIFFUSERS,
    SLOTS,
    SLOTS_FAST,
    TECHNIQUES,
    XFORMERS,
    Bench,
    Candidate,
)
from kernels.linear import frozen_linear
from modules.runtime import DTYPES, keep_freed_memory

RATIOS = {
    "da_fusion_loop": DA_FUSION,
    "diffusers_best_batch": DIFFUSERS,
    "diffusers_xformers": XFORMERS,
    "diffusers_compiled": COMPILED,
}


def main(argv: list[str] | None = None) -> dict:
    """Measure, append rows, print a table and the JSON document; returns that document."""
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = options.timed_convolutions
    budget = harness.Budget(options.budget_s)
    bench = Bench(options, budget)
    keep_freed_memory(bench.device)  # as a run does, for all techniques alike
    if options.compile_only:
        return {name: maker().batch for name, maker in bench.makers().items()}
    ahead_s = precompile(bench)
    dtype = bench.pipeline.dtype
    conditions, ceilings = harness.conditions(bench.device), measure_ceilings(bench.device, dtype)
    peak = matrix_peak(bench.device, dtype, ceilings)

    def keep_ready(found: list[Candidate]) -> None:
        if options.out:  # before the first round, in case preparing the others takes all the time left
            document = {"benchmark": "generator", **conditions, "ready": [_first_batch(c, bench.batch) for c in found]}
            ledger.write_partial(options.out, document | {"skipped": bench.skipped})

    candidates = ready(bench, budget, keep_ready)
    if not candidates:
        raise SystemExit(f"no technique could run: {bench.skipped}")
    images = images_a_block(candidates, bench.setting.images, bench.batch, options.blocks, budget.left)
    floor = peak * 1e12 / bench.work.of_image(bench.setting, bench.pipeline.scheduler, peer=False)

    def document_of(comparison: harness.Comparison) -> dict:
        measured = [candidate for candidate in candidates if candidate.name in comparison.timings]
        rows = [_row(bench, candidate, images, comparison, peak, floor) for candidate in measured]
        rows.sort(key=lambda row: row["images_per_s"])
        return _document(bench, conditions, ceilings, peak, floor, comparison, images, rows)

    def keep(comparison: harness.Comparison) -> None:
        if options.out:  # after every round, in case this process is stopped
            ledger.write_partial(options.out, document_of(comparison))

    comparison = alternate(candidates, images, bench.device, options.blocks, budget.left, keep)
    bench.skipped |= {name: f"failed: {reason}" for name, reason in comparison.failures.items()}
    document = document_of(comparison)
    if options.out and document["rows"]:
        left_out = [_left_out(document["rows"][0], name, reason) for name, reason in bench.skipped.items()]
        ledger.append_rows(options.out, [conditions | row for row in (*document["rows"], *left_out)])
        ledger.drop_partial(options.out)
    document["compiled_ahead_s"] = round(ahead_s, 1)
    for part, call in unet_calls(bench, peak, document["ratios_of"], candidates, budget):
        document[part] = call
        if options.out and document["rows"]:  # before the next starts, which may compile for a minute or two
            row = unet_call.as_row(list(document["rows"][0]), call, bench)
            ledger.append_rows(options.out, [conditions | row])
    _print_table(document)
    harness.finish(document)
    return document


@torch.no_grad()
def matrix_peak(device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """TFLOP/s of the matrix product that MFU and floor refer to: torch's, or oneDNN's if faster for float32 on a CPU.

    On a CPU torch's 16-bit product is oneDNN's.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return ceilings.matmul_tflop_per_s
    n = 1024
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    found = harness.compare({"onednn": lambda: frozen_linear(a, b)}, device)
    return max(ceilings.matmul_tflop_per_s, 2 * n**3 / found.timings["onednn"].median_ms / 1e9)


def ready(bench: Bench, budget: harness.Budget, after_each=lambda found: None) -> list[Candidate]:
    """The techniques that can run here, each warmed up with one batch; bench.skipped says which cannot, and why.

    After the first, none is started in the part of the budget that is reserved for the alternating blocks.
    """
    found, took = [], []
    for name, maker in bench.makers().items():
        begin = time.perf_counter()
        try:
            if found and budget.left < BLOCKS_SHARE * budget.seconds:
                raise peers.Unavailable(name, "budget")
            candidate = maker()
            count = max(bench.batch, candidate.batch)
            call = lambda c=candidate, count=count: took.append(  # noqa: E731 - bound to this technique
                harness.block(lambda: c.call(count), 1, bench.device)
            )
            candidate.peak_mib = harness.peak_mib(call, bench.device, pool_bytes=candidate.pool_bytes)
            candidate.ready_s = time.perf_counter() - begin
            candidate.batch_s = took[-1] * bench.batch / count
        except peers.Unavailable as error:
            bench.skipped[name] = error.reason
        except Exception as error:  # a technique that fails does not end the others
            bench.skipped[name] = f"failed: {harness.described(error)}"
        if name in bench.skipped:
            print(f"skipped {name}: {bench.skipped[name]}", flush=True)
            continue
        print(f"{candidate.name}: ready after {candidate.ready_s:.1f} s, a batch {candidate.batch_s:.2f} s  "
              f"{candidate.quality}", flush=True)  # fmt: skip
        found.append(candidate)
        after_each(found)
    return found


def _first_batch(candidate: Candidate, batch: int) -> dict[str, object]:
    """What is known about a technique before its first block, from one batch timed once."""
    known = {name: getattr(candidate, name) for name in ("batch", "ready_s", "peak_mib", "switches", "quality")}
    return {"technique": candidate.name, "images_per_s": round(batch / candidate.batch_s, 4)} | known


def images_a_block(candidates: list[Candidate], images: int, batch: int, blocks: int, seconds: float) -> int:
    """How many images per block `blocks` rounds of all candidates have time for, at most `images`.

    They are whole batches of each candidate, at least one of the largest. `batch` images take a candidate its
    `batch_s`.
    """
    once = sum(c.batch_s for c in candidates) + candidates[0].batch_s  # the first runs twice a round
    affordable = batch * seconds / max(1e-9, blocks * once)
    whole = math.lcm(batch, *(c.batch for c in candidates))
    count = whole * max(1, min(images // whole, int(min(affordable, images) // whole)))
    if count < images:
        print(f"budget: {count} images a block instead of {images}", flush=True)
    return count


def alternate(
    candidates: list[Candidate], images: int, device, blocks: int, seconds: float, after_round=lambda comparison: None
) -> harness.Comparison:
    """Time alternating blocks of all candidates, the first twice per round; rounds start only while `seconds` last.

    A candidate that fails in a block is dropped, with the reason in `failures`.
    """
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    failures: dict[str, str] = {}
    again: list[float] = []

    def found() -> harness.Comparison:
        timings = {name: harness.Timing(name, tuple(values)) for name, values in times.items() if name not in failures}
        pair = again, times[candidates[0].name]
        spread = abs(statistics.median(pair[0]) / statistics.median(pair[1]) - 1) if all(pair) else float("nan")
        return harness.Comparison(timings, round(100 * spread, 2), failures)

    begin = time.perf_counter()
    for done in range(blocks):
        if done and time.perf_counter() - begin > seconds * (blocks - 0.5) / blocks:
            break
        for candidate, kept in [*((c, times[c.name]) for c in candidates), (candidates[0], again)]:
            if candidate.name not in failures:
                try:
                    kept.append(harness.block(lambda c=candidate: c.call(images), 1, device))
                except Exception as error:
                    failures[candidate.name] = harness.described(error)
        after_round(found())
    return found()


def _row(bench: Bench, candidate: Candidate, images: int, comparison, peak: float, floor: float) -> dict[str, object]:
    timing, made = comparison.timings[candidate.name], min(images, candidate.at_most)
    rate = {q: 1e3 * made / timing.quantile_ms(1 - q) for q in (0.1, 0.5, 0.9)}
    setting = candidate.setting or bench.setting
    calls, guided = setting.calls(bench.pipeline.scheduler)
    operations = bench.work.of_image(setting, bench.pipeline.scheduler, peer=candidate.peer)
    if candidate.setting:
        floor = peak * 1e12 / bench.work.of_image(setting, bench.pipeline.scheduler, peer=False)
    return {
        "technique": candidate.name,
        "images_per_s": round(rate[0.5], 4),
        "p10": round(rate[0.1], 4),
        "p90": round(rate[0.9], 4),
        "blocks": len(timing.seconds),
        "images_a_block": made,
        "spread_pct": comparison.spread_pct,
        "unet_evaluations_per_s": round(rate[0.5] * (calls + guided), 2),
        "mfu_pct": round(100 * rate[0.5] * operations / peak / 1e12, 2),
        "floor_pct": round(100 * rate[0.5] / floor, 2),
        "peak_mib": candidate.peak_mib,
        "batch": candidate.batch,
        "px": bench.pipeline.resolution,
        "dtype": str(bench.pipeline.dtype).removeprefix("torch."),
        "pipeline": bench.pipeline.digest[:16],
        "ready_s": round(candidate.ready_s, 2),
        "switches": candidate.switches + "; convolutions timed" * torch.backends.cudnn.benchmark,
        "quality": candidate.quality,
    }


def _left_out(row: dict[str, object], technique: str, reason: str) -> dict[str, object]:
    """A row with the columns of `row` for a technique that was not measured."""
    return dict.fromkeys(row, "") | {"technique": technique, "quality": f"skipped: {reason}"}


def _document(
    bench: Bench, conditions, ceilings, peak: float, floor: float, comparison, images: int, rows: list[dict]
) -> dict:
    per_s = {row["technique"]: row["images_per_s"] for row in rows}
    own = max((name for name in bench.engines if name in per_s), key=per_s.get, default="")

    def ratios(of: str) -> dict[str, float]:
        return {key: round(per_s[of] / per_s[peer], 3) for key, peer in RATIOS.items() if {of, peer} <= per_s.keys()}

    return {
        "benchmark": "generator",
        **conditions,
        "setting": vars(bench.setting) | {"resolution": bench.pipeline.resolution, "images": images},
        "ceilings": vars(ceilings) | {"peak_tflop_per_s": round(peak, 4)},
        "gflop": {part: round(count / 1e9, 3) for part, count in vars(bench.work).items()},
        "floor_images_per_s": round(floor, 3),
        "aa_spread_pct": comparison.spread_pct,
        "rows": rows,
        "skipped": bench.skipped,
        "ratios": ratios(own),
        "ratios_of": own,
        "ratios_without_compile": ratios(SLOTS),
        "fast_over_exact": round(per_s[SLOTS_FAST] / per_s[own], 3) if own and SLOTS_FAST in per_s else None,
        "written": str(bench.options.out or ""),
    }


def unet_calls(
    bench: Bench, peak: float, name: str, candidates: list[Candidate], budget: harness.Budget
) -> Iterator[tuple[str, dict[str, object]]]:
    """One UNet call of an engine, timed at its own rows and at --unet-rows."""
    yield "tick", unet_call.tick(bench, peak, name)
    if rows := bench.options.unet_rows:
        ready_s = next((c.ready_s for c in candidates if c.name == name), 0.0)
        yield "unet_call", unet_call.at_rows(bench, peak, name, rows, ready_s, budget.left)


def _print_table(document: dict) -> None:
    """The waterfall, slowest first."""
    setting = document["setting"]
    print(f"{document['device']}, torch {document['torch']}, {document['threads']} threads; {setting['resolution']} px, "
          f"strength {setting['strength']} of {setting['num_inference_steps']}, guidance {setting['guidance_scale']}; "
          f"floor {document['floor_images_per_s']} images/s; A/A spread {document['aa_spread_pct']} %")  # fmt: skip
    for name in ("tick", "unet_call"):
        if name in document:
            print(f"one UNet call: {document[name]}")
    slowest = document["rows"][0]["images_per_s"]
    for row in document["rows"]:
        print(f"{row['technique']:36s} {row['images_per_s']:9.3f} images/s [{row['p10']}, {row['p90']}]  "
              f"x{row['images_per_s'] / slowest:<6.2f} MFU {row['mfu_pct']:5.1f} %  floor {row['floor_pct']:5.1f} %  "
              f"{row['peak_mib']} MiB  {row['quality']}")  # fmt: skip


def _parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.generator", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--pipeline", default="", help="random | embedded | path; default: random on a GPU, else embedded"
    )
    parser.add_argument("--resolution", type=int, default=0, help="pixels a side; 0: the UNet's own")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="of all techniques; auto: as a run's"
    )
    parser.add_argument("--images", type=int, default=64, help="images a block, fewer where the budget asks for it")
    parser.add_argument("--da-fusion-images", type=int, default=8, help="images a block of DA-Fusion's loop at most")
    parser.add_argument("--batch", type=int, default=0, help="batch of diffusers and slots; 0: the best is measured")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--budget-s", type=float, default=0.0, help="fit the blocks into this time; 0: no bound")
    parser.add_argument(
        "--unet-rows", type=int, default=unet_call.ROWS, help="rows of one UNet call timed apart; 0: none"
    )
    parser.add_argument("--only", action="append", help="a technique to measure, by its name in the table; repeatable")
    parser.add_argument("--compile-only", action="store_true", help="compile the techniques and measure nothing")
    parser.add_argument(
        "--found", default="{}", help="JSON: attention backends and forms of upsampling by shape, taken untimed"
    )
    parser.add_argument(
        "--timed-convolutions", action="store_true", help="cuDNN takes algorithms by trying them, of every technique"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default="", help="CSV to append to, or its folder; 'none' writes nothing")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.only or () if name not in TECHNIQUES]:
        parser.error(f"--only has {', '.join(unknown)}; known are {'; '.join(TECHNIQUES)}")
    options.pipeline = options.pipeline or inputs.default_pipeline(torch.device(options.device))
    options.out = harness.rows_file(options.out, "generator", options.device)
    return options


if __name__ == "__main__":
    main()
