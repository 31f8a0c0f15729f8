"""The joint step, generation and training together: `python -m benchmarks.step`.

The grid is the ratio (images_per_step) x the overlap mode, with a small ResNet at 64 px on the embedded set and, on a
GPU, ResNet-50 at 224 px beside a generator of SD 1.5's shape at 512 px. Measured are the step and its phases, the share
of generation, how much of it overlap hides, the cost of mixing, augmenting and bookkeeping, and host syncs and bytes
written during a step. A line is fitted to the step's cost over images_per_step, and the cost is compared at two numbers
of train images.

Overlap efficiency = (T_generate + T_train) / T_joint, where T_generate and T_train are measured alone; it cannot exceed
(T_generate + T_train) / max(T_generate, T_train).

Rows are appended to benchmarks/results/step_gpu.csv or step_cpu.csv; the last line printed is one JSON document.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness, inputs, ledger
from benchmarks.session import session
from benchmarks.stepper import Stepper
from modules.phases import STEP_PHASES

COMMON = {  # settings of every case: nothing to learn beforehand, rings that never run dry
    "inversion.class_agnostic": True,
    "near_ood.recipes": {"strength": 1.0},
    "evaluation.judge_steps": 0,
    "evaluation.bootstrap": 0,
    "generation.max_uses": 10**6,
    "generation.ring_size": 4,
    "generation.prefill": 0.25,
    "learning.steps": 10**6,
    "run.log_every": 10**6,
    "generation.mode": "sequential",  # the benchmark sets the mode of each block
}
COLUMNS = (  # of a row, after its conditions
    "case", "mode", "images_per_step", "step_ms", "p10_ms", "p90_ms", "blocks", "steps_a_block", "spread_pct", "train_images",
    "generate_alone_ms", "generation_share_pct", "overlap_efficiency", "overlap_bound",
    *(f"{name}_ms" for name in (*STEP_PHASES, "bookkeeping")),
    "overhead_pct", "host_syncs", "bytes_written",
    "peak_mib",  # that a block needs beyond what is held before it, graphs' pools included: see harness.peak_mib
    "switches", "quality",
)  # fmt: skip
BESIDE = 2.5  # the blocks beside the timed ones take at most as long as this many rounds
OVER_IMAGES_S = 40.0  # for two sessions and a round of blocks in `over_train_images`
FEW_SHOTS = 4  # train images per class on the small side of `over_train_images`


@dataclass(frozen=True)
class Case:
    """One encoder beside one generator."""

    name: str
    settings: dict[str, object]
    grid: tuple[float, ...]  # images_per_step; 0 comes first and is training alone
    usual: float  # the ratio of the config, for results given at one ratio only
    image_folder: tuple[int, int, int] | None = None  # classes, images per class, pixels a side, if no set is shipped
    modes: tuple[str, ...] = ("sequential",)
    least_s: float = 0.0  # for loading, compiling, a round of blocks and the rows


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases this device gets."""
    on_gpu = torch.device(options.device).type == "cuda"
    modes = ("sequential", "stream") if on_gpu else ("sequential",)
    common = {"run.device": options.device, "run.precision": options.dtype, "pipeline.dtype": options.dtype}
    small = common | {"pipeline.path": options.pipeline}
    grid = options.ratios or (0.0, 1.0, 1.5, 2.0, 4.0, 8.0)
    found = [Case("small_resnet 64 px", small, grid, 1.5, modes=modes, least_s=60.0 if on_gpu else 90.0)]
    if on_gpu:
        large = common | {
            "pipeline.weights": "random",
            "data.image_size": 224,
            "encoder.arch": "resnet50",
            "generation.num_inference_steps": 50,
            "generation.strengths": {0.5: 1.0},
            "near_ood.strength": 0.5,
            "generation.guidance_scale": 7.5,
            "generation.slots": 8,
        }
        found.append(
            Case("resnet50 224 px", large, (0.0, 0.1, 0.25, 0.5, 1.0), 0.25, (20, 12, 512), modes, least_s=250.0)
        )
    return [case for case in found if not options.cases or case.name.split()[0] in options.cases]


def measure(case: Case, options: argparse.Namespace, seconds: float) -> Iterator[dict[str, object]]:
    """The rows of one case in all its modes, measured in alternating blocks.

    A new round starts only if the seconds left suffice for it and for the two further blocks of each row: one whose
    phases are timed, and one that is watched.
    """
    budget = harness.Budget(seconds if math.isfinite(seconds) else 0.0)
    with tempfile.TemporaryDirectory(prefix="benchmark-images-") as folder:
        settings = COMMON | case.settings | {"generation.images_per_step": case.usual}
        if case.image_folder:
            settings["data.root"] = str(inputs.write_images(Path(folder), *case.image_folder))
        with session(settings) as (_job, state):
            steppers = [Stepper(state, options.steps, mode) for mode in case.modes]
            calls = {f"{s.mode} {x:g}": s.at(x) for s in steppers for x in case.grid}
            calls |= {f"generate {x:g}": steppers[0].generating(x) for x in case.grid[1:]}
            enough = lambda round_s: budget.left < (1 + BESIDE) * round_s  # noqa: E731 - one use, one line
            found = harness.compare(calls, options.device, blocks=options.blocks, block_seconds=0.0, enough=enough)
            for stepper in steppers:
                yield from (_row(case, x, stepper, found) for x in case.grid)


def lines_of(case: Case, rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """The straight line fitted to the rows of each mode of a case."""
    of_mode = {mode: [row["step_ms"] for row in rows if row["mode"] == mode] for mode in case.modes}
    return {f"{case.name}, {mode}": straight_line(case.grid, times) for mode, times in of_mode.items()}


def _row(case: Case, images: float, stepper: Stepper, found: harness.Comparison) -> dict[str, object]:
    mode, alone = stepper.mode, f"{case.modes[0]} 0"
    joint = found.timings[f"{mode} {images:g}"]
    train_ms = found.timings[alone].median_ms / stepper.steps(0.0)
    generate = found.timings.get(f"generate {images:g}")
    count = stepper.steps(images)
    generate_ms = generate.median_ms / count if generate else 0.0
    joint_ms = joint.median_ms / count
    phases = stepper.phases(images)
    overhead = phases["mix"] + phases["augment"] + phases["bookkeeping"]
    watched, mixed = stepper.watched(images), stepper.state.mixer.statistics()
    for message in stepper.syncs[:3]:
        print(f"  sync: {message.splitlines()[0]}", flush=True)
    run, pipeline = stepper.config.run, stepper.state.generator.slots.pipeline
    return {
        "case": case.name,
        "mode": mode,
        "images_per_step": images,
        **_times(joint, count),
        "spread_pct": found.spread_pct,
        "train_images": stepper.train_images,
        "generate_alone_ms": round(generate_ms, 3),
        "generation_share_pct": round(100 * generate_ms / (train_ms + generate_ms), 2),
        "overlap_efficiency": round((train_ms + generate_ms) / joint_ms, 4),
        "overlap_bound": round((train_ms + generate_ms) / max(train_ms, generate_ms), 4),
        **{f"{name}_ms": round(phases[name], 3) for name in (*STEP_PHASES, "bookkeeping")},
        # phases that run side by side do not add up to a step
        "overhead_pct": _or_blank(round(100 * overhead / phases["step"], 2) if mode == "sequential" else None),
        **{name: _or_blank(value) for name, value in vars(watched).items()},
        "switches": f"precision={_name(stepper.state.precision)} pipeline={_name(pipeline.dtype)} kernels={run.kernels} "
        f"tick={_tick(stepper)}",
        "quality": f"loss {float(stepper.state.logs['loss']):.3f}, generated rows {mixed['realized_fraction']:.3f} "
        f"of {stepper.config.generation.synthetic_fraction:g}",
    }


def stream_over_sequential(rows: list[dict]) -> dict[str, float]:
    """The speedup of a step by generation on a side stream, by case and images_per_step."""
    step_ms = {(row["case"], row["images_per_step"], row["mode"]): row["step_ms"] for row in rows}
    return {
        f"{case}, {images:g}": round(step_ms[case, images, "sequential"] / ms, 4)
        for (case, images, mode), ms in step_ms.items()
        if mode == "stream"
    }


def left_out(case: Case, reason: str) -> list[dict[str, object]]:
    """The rows of a case that was not measured, one per mode."""
    empty = dict.fromkeys(COLUMNS, "") | {"case": case.name, "quality": f"skipped: {reason}"}
    return [empty | {"mode": mode} for mode in case.modes]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tick(stepper: Stepper) -> str:
    compiled = isinstance(stepper.state.generator.slots.in_flight.unet, torch._dynamo.OptimizedModule)
    return "compiled" if compiled else "eager"


def straight_line(x: tuple[float, ...], y: list[float]) -> dict[str, float]:
    """Least-squares line y = base + slope x, its R^2, and the largest distance of a point from it in percent of y."""
    design = torch.stack([torch.ones(len(x), dtype=torch.float64), torch.tensor(x, dtype=torch.float64)], 1)
    values = torch.tensor(y, dtype=torch.float64)
    base, slope = torch.linalg.lstsq(design, values[:, None]).solution[:, 0].tolist()
    residual = values - base - slope * design[:, 1]
    spread = (values - values.mean()).square().sum().item()
    return {
        "ms_without_generation": round(base, 3),
        "ms_an_image": round(slope, 3),
        "r2": round(1 - residual.square().sum().item() / spread, 5) if spread else 1.0,
        "largest_deviation_pct": round(100 * (residual / values).abs().max().item(), 2),
    }


def over_train_images(case: Case, options: argparse.Namespace, seconds: float) -> tuple[list[dict], dict[str, object]]:
    """The same step with few and with all train images of the embedded set, in alternating blocks: rows and ratio."""
    few, every = ({"data.shots_per_class": shots} for shots in (FEW_SHOTS, 0))
    settings = COMMON | case.settings | {"generation.images_per_step": case.usual}
    with session(settings | few) as (_, small), session(settings | every) as (_, large):
        steppers = [Stepper(state, options.steps) for state in (small, large)]
        calls = {str(stepper.train_images): stepper.at(case.usual) for stepper in steppers}
        found = harness.compare(calls, options.device, blocks=options.blocks, max_seconds=seconds)
        count = steppers[0].steps(case.usual)
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"case": f"{case.name}, over train images", "mode": "sequential", "images_per_step": case.usual}
        | _times(found.timings[str(stepper.train_images)], count)
        | {"spread_pct": found.spread_pct, "train_images": stepper.train_images, "quality": "the same step, other sets"}
        for stepper in steppers
    ]
    return rows, {
        "step_ms": {str(row["train_images"]): row["step_ms"] for row in rows},
        "ratio": round(1 / found.speedup(list(calls)[-1]), 4),
        "spread_pct": found.spread_pct,
    }


def _times(timing: harness.Timing, steps: int) -> dict[str, object]:
    """The columns on the time of one step, from blocks of `steps` steps."""
    return {
        "step_ms": round(timing.median_ms / steps, 3),
        "p10_ms": round(timing.quantile_ms(0.1) / steps, 3),
        "p90_ms": round(timing.quantile_ms(0.9) / steps, 3),
        "blocks": len(timing.seconds),
        "steps_a_block": steps,
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, append rows, print a table and the JSON document; returns that document."""
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget, conditions = harness.Budget(options.budget_s), harness.conditions(options.device)
    rows, lines, skipped = [], {}, {}
    chosen = cases(options)

    def keep(row: dict[str, object]) -> None:
        if options.out:  # as they come: what ends this process takes no finished row with it
            ledger.append_rows(options.out, [conditions | row])

    for number, case in enumerate(chosen):
        later = [OVER_IMAGES_S] * options.train_images + [other.least_s for other in chosen[number + 1 :]]
        others = sum(least_s for least_s in later if case.least_s + least_s < budget.left)  # what will have its turn
        share = budget.left * case.least_s / max(case.least_s + others, 1e-9)
        found: list[dict[str, object]] = []
        try:
            if options.budget_s and budget.left <= case.least_s:
                raise TimeoutError("budget")
            for row in measure(case, options, share):
                found.append(row)
                keep(row)
                _print_row(row)
            lines |= lines_of(case, found)
        except Exception as error:  # a case that is left out or cannot be measured is a row, not the end of the others
            skipped[case.name] = "budget" if isinstance(error, TimeoutError) else f"failed: {harness.described(error)}"
            print(f"{case.name} skipped: {skipped[case.name]}", flush=True)
            for row in left_out(case, skipped[case.name]):
                keep(row)
        rows += found
    constant = None
    if options.train_images and chosen and options.budget_s and budget.left < OVER_IMAGES_S:
        constant = {"skipped": "budget"}
    elif options.train_images and chosen:
        try:
            found, constant = over_train_images(chosen[0], options, budget.left)
            if options.out:
                ledger.append_rows(options.out, [conditions | row for row in found])
        except Exception as error:
            constant = {"failed": harness.described(error)}
    document = {
        "benchmark": "step",
        **conditions,
        "rows": rows,
        "linear_in_images_per_step": lines,
        "constant_in_train_images": constant,
        "stream_over_sequential": stream_over_sequential(rows),
        "host_syncs": _total(rows, "host_syncs"),
        "bytes_written": _total(rows, "bytes_written"),
        "skipped": skipped,
        "written": str(options.out or ""),
    }
    print(f"straight lines: {lines}\ntrain images: {constant}", flush=True)
    harness.finish(document)
    return document


def _total(rows: list[dict], name: str) -> int | None:
    known = [row[name] for row in rows if row[name] != ""]
    return sum(known) if known else None


def _or_blank(value):
    return "" if value is None else value


def _print_row(row: dict) -> None:
    print(f"{row['case']:20s} {row['mode']:11s} {row['images_per_step']:5g} images/step  {row['step_ms']:9.2f} ms  "
          f"generation {row['generation_share_pct']:5.1f} %  overlap {row['overlap_efficiency']:.3f} "
          f"(bound {row['overlap_bound']:.3f})  overhead {row['overhead_pct']} %  "
          f"syncs {row['host_syncs']}  bytes {row['bytes_written']}", flush=True)  # fmt: skip


def _parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--pipeline", default="embedded", help="generator of the small case: embedded or a path")
    parser.add_argument(
        "--cases", default="", help="comma-separated: small_resnet, resnet50; default: what fits the device"
    )
    parser.add_argument(
        "--ratios", default="", help="images_per_step of the small case; default: 0 to 8, 0 comes first"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of encoder and generator")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a block, at least")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--train-images", action=argparse.BooleanOptionalAction, default=True, help="few against all")
    parser.add_argument("--budget-s", type=float, default=0.0, help="begin nothing after this; 0: no bound")
    parser.add_argument("--out", default="", help="CSV to append to, or its folder; 'none' writes nothing")
    options = parser.parse_args(argv)
    options.ratios = tuple(float(ratio) for ratio in options.ratios.split(",") if ratio)
    options.cases = [name for name in options.cases.split(",") if name]
    options.out = harness.rows_file(options.out, "step", options.device)
    return options


if __name__ == "__main__":
    main()
