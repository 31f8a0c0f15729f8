"""Times one UNet call with its solver step separately, as a share of the rate of a matrix product.

It is measured at the rows at which an engine runs (slots and their unconditional rows) and at ROWS, a number at which
others publish results. The latter has no unconditional rows: those share the first layers with their slots, so that a
row would not always be a full row of work.
"""

import dataclasses

import torch

from benchmarks import harness, inputs
from benchmarks.engine import SlotEngine
from benchmarks.techniques import Bench

ROWS = 64
COMPILE_S = 110.0  # at other rows than those that were compiled ahead, on a GPU (83 s and its tuning on an H200)
QUALITY = "the time of one call; the row of its technique judges the images"


def tick(bench: Bench, peak: float, name: str) -> dict[str, object]:
    """Rows, milliseconds and share of the matrix product for a tick of an engine that the benchmark ran."""
    if name not in bench.engines:
        return left_out(name, 0, "the engine made no images")
    engine = bench.engines[name]
    engine.make(len(engine.slots.occupants))  # latents as after real work, since zeros would run faster
    return _measured(bench, engine, name, peak)


@torch.no_grad()
def at_rows(bench: Bench, peak: float, name: str, rows: int, ready_s: float, left: float) -> dict[str, object]:
    """The same for that engine built with `rows` slots and without guidance.

    Args:
        ready_s: seconds that preparing the engine of this name took, including compilation.
        left: seconds that may be spent.
    """
    if name not in bench.how:
        return left_out(name, rows, "the engine made no images")
    compiles = bench.device.type == "cuda" and bench.how[name].get("compile_setting") == "on"
    if left < (max(ready_s, COMPILE_S) if compiles else ready_s):
        return left_out(name, rows, "budget")
    try:
        setting = dataclasses.replace(bench.setting, guidance_scale=1.0)
        own = inputs.own_copy(bench.pipeline)
        engine = SlotEngine(own, setting, bench.moments, bench.texts, slots=rows, **bench.how[name])
        engine.slots.tick()  # real latents
        return _measured(bench, engine, name, peak)
    except Exception as error:  # a call that does not fit costs no row that was measured before
        return left_out(name, rows, f"failed: {harness.described(error)}")


def left_out(name: str, rows: int, reason: str) -> dict[str, object]:
    """The entry for a call that was not measured."""
    return {"technique": name, "rows": rows, "guided": False, "ms": None, "mfu_pct": None, "skipped": reason}


def as_row(columns: list[str], call: dict[str, object], bench: Bench) -> dict[str, object]:
    """A call as a row with the columns of the techniques' rows; columns that do not apply are empty."""
    row = dict.fromkeys(columns, "") | {
        "technique": f"one UNet call, {call['rows']} rows{', guided' * call['guided']}, {call['technique']}",
        "batch": call["rows"],
        "px": bench.pipeline.resolution,
        "dtype": str(bench.pipeline.dtype).removeprefix("torch."),
        "pipeline": bench.pipeline.digest[:16],
    }
    if call["ms"] is None:
        return row | {"quality": f"skipped: {call['skipped']}"}
    per_s = round(1e3 * call["rows"] / call["ms"], 2)
    known = {name: call[name] for name in ("mfu_pct", "blocks", "spread_pct")}
    return row | known | {"unet_evaluations_per_s": per_s, "quality": QUALITY}


@torch.no_grad()
def _measured(bench: Bench, engine: SlotEngine, name: str, peak: float) -> dict[str, object]:
    found = harness.compare({"tick": engine.slots.in_flight.step}, bench.device)
    rows, timing = len(engine.slots.occupants) + engine.slots.unconditional_rows, found.timings["tick"]
    mfu_pct = round(100 * rows * bench.work.unet / timing.median_ms / 1e9 / peak, 2)
    guided = engine.slots.unconditional_rows > 0
    told = {"technique": name, "rows": rows, "guided": guided, "ms": round(timing.median_ms, 3), "mfu_pct": mfu_pct}
    return told | {"blocks": len(timing.seconds), "spread_pct": found.spread_pct}
