"""Every benchmark in one call, within a budget: `python -m benchmarks.suite [--only ...] [--budget-s 540]`.

Correctness runs first, and what is found wrong is not timed: a wrong op is left out of the kernels, and if the engine
is wrong, the parts that run it are skipped. Then come generator, kernels, step and quality, each with a share of the
time left, the last one with all of it. Each part is a separate process, so that a crash or a full memory in one does
not affect the others, and is stopped if it takes more than half as long again as its share. At Stable Diffusion's size
the compiled techniques and the large step do not fit into 540 s with the others: `--only generator`, then `--only
step`, give them the whole budget. On a CPU every part runs in a reduced form. Rows go to $OUT if it is set, else to
benchmarks/results. A short table is printed last, and one JSON document as the last line.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness, ledger
from kernels import backend

ROOT = Path(__file__).resolve().parents[1]
LEAST_S = 20.0  # a part is skipped if less time than this is left
OVERSTAY = 1.5  # a part is stopped after this many times its share, plus CLOSING_S
CLOSING_S = 10.0  # the part of a share that is kept for starting, peak memory and writing


@dataclass(frozen=True)
class Part:
    """One benchmark of the suite."""

    name: str
    share: float  # of the time left when its turn comes
    arguments: Callable[[argparse.Namespace, float], list[str]]  # (options, seconds) -> its command line
    summary: Callable[[dict], str]  # one line of its document
    runs_engine: bool = True


@dataclass
class Outcome:
    """How a part ended."""

    part: str
    status: str  # done | failed: ... | skipped: ...
    seconds: float = 0.0
    summary: str = ""
    document: dict | None = None


def _device(options: argparse.Namespace) -> list[str]:
    return ["--device", options.device]


def _pipeline(options: argparse.Namespace) -> list[str]:
    return ["--pipeline", options.pipeline] if options.pipeline else []


def _correctness(options, seconds: float) -> list[str]:
    return _device(options) + _pipeline(options)


def _generator(options, seconds: float) -> list[str]:
    reduced = [] if options.gpu else ["--images", "16", "--da-fusion-images", "4"]
    return _device(options) + _pipeline(options) + reduced + ["--budget-s", f"{seconds:.0f}"]


def _kernels(options, seconds: float) -> list[str]:
    right = [op for op in backend.OPS if op not in options.wrong]
    return _device(options) + ["--budget-seconds", f"{seconds:.0f}", "--ops", ",".join(right)]


def _step(options, seconds: float) -> list[str]:
    small = _pipeline(options) if options.pipeline not in ("", "random") else []
    reduced = [] if options.gpu else ["--steps", "6", "--ratios", "0,2,8"]
    return _device(options) + small + reduced + ["--budget-s", f"{seconds:.0f}"]


def _quality(options, seconds: float) -> list[str]:
    small = _pipeline(options) if options.pipeline not in ("", "random") else []
    reduced = [] if options.gpu else ["--steps", "40"]
    return _device(options) + small + reduced + ["--budget-s", f"{seconds:.0f}"]


def _of_generator(document: dict) -> str:
    ratios = ", ".join(f"{name} {value}x" for name, value in document["ratios"].items())
    fastest = document["rows"][-1]
    return f"{fastest['technique']} {fastest['images_per_s']} images/s; {ratios}"


def _of_kernels(document: dict) -> str:
    return "; ".join(f"{op} {verdict}" for op, verdict in document["verdicts"].items()) or (
        f"{len(document['rows'])} rows"
    )


def _of_step(document: dict) -> str:
    lines = "; ".join(
        f"{name}: {line['ms_an_image']} ms an image, R2 {line['r2']}"
        for name, line in document["linear_in_images_per_step"].items()
    )
    return f"{lines}; syncs {document['host_syncs']}, bytes written {document['bytes_written']}"


def _of_quality(document: dict) -> str:
    return "; ".join(f"{name} {'within' if good else 'beyond'}" for name, good in document["within_tolerance"].items())


PARTS = (
    Part("correctness", 0.5, _correctness, lambda document: f"{len(document['checks'])} checks"),
    Part("generator", 0.55, _generator, _of_generator),
    Part("kernels", 0.35, _kernels, _of_kernels, runs_engine=False),
    Part("step", 0.6, _step, _of_step),
    Part("quality", 1.0, _quality, _of_quality),
)


def command_of(part: Part, options: argparse.Namespace, seconds: float) -> list[str]:
    """The command line of a part that should take `seconds`."""
    return [sys.executable, "-u", "-m", f"benchmarks.{part.name}", *part.arguments(options, seconds)]


def run_part(part: Part, options: argparse.Namespace, left: float, last: bool = False) -> Outcome:
    """Run a part in a separate process and pass its output on.

    The part is given its share of the `left` seconds (all of them if it is the `last`) and stopped if it far exceeds
    that.
    """
    share = left if last else part.share * left
    command = command_of(part, options, max(LEAST_S / 2, share - CLOSING_S))
    print(f"\n== {part.name}: {' '.join(command[2:])}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    overstayed = threading.Event()
    stop = threading.Timer(min(left, OVERSTAY * share + CLOSING_S), lambda: (overstayed.set(), _end(process)))
    stop.start()
    final = ""
    try:
        for line in process.stdout:
            final = line.strip() or final
            if not final.startswith("{"):
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        stop.cancel()
        _end(process)
    took = round(time.perf_counter() - begin, 1)
    try:
        document = json.loads(final) if final.startswith("{") else None
    except ValueError:  # cut off in the middle
        document = None
    if document is None:
        status = "failed: stopped, its share was spent" if overstayed.is_set() else f"failed: exit code {code}"
        return Outcome(part.name, status, took)
    status = "done" if code == 0 else f"failed: exit code {code}"
    try:
        summary = part.summary(document)
    except (KeyError, IndexError, TypeError, ValueError) as error:  # a document of less than usual is still kept
        summary = f"no summary: {harness.described(error)}"
    return Outcome(part.name, status, took, summary, document)


def _end(process: subprocess.Popen) -> None:
    """End a part together with the processes it started (compiler workers); does nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(argv: list[str] | None = None) -> dict:
    """Run the parts, print the table and the JSON document; returns that document."""
    options = _parse(argv)
    budget = harness.Budget(options.budget_s)
    conditions, out = harness.conditions(options.device), harness.results_file("suite", options.device)
    outcomes: list[Outcome] = []
    chosen = [part.name for part in PARTS if part.name in options.only]
    for part in PARTS:
        if part.name not in options.only:
            continue
        if part.runs_engine and "engine" in options.wrong:
            outcomes.append(Outcome(part.name, "skipped: correctness failed for the engine"))
        elif budget.left < LEAST_S:
            outcomes.append(Outcome(part.name, "skipped: budget"))
        else:
            outcomes.append(run_part(part, options, budget.left, last=part.name == chosen[-1]))
        if part.name == "correctness" and not options.keep_going:  # without its document nothing is known to be wrong
            options.wrong = (outcomes[-1].document or {}).get("wrong", [])
        if os.environ.get("OUT"):  # the documents of the parts whole, where files are carried away, as they come
            whole = {outcome.part: outcome.document for outcome in outcomes}
            ledger.write_partial(out, conditions | {"documents": whole})
    rows = [{"part": o.part, "status": o.status, "seconds": o.seconds, "summary": o.summary} for o in outcomes]
    document = {
        "benchmark": "suite",
        **conditions,
        "budget_s": options.budget_s,
        "passed": all(not row["status"].startswith("failed") for row in rows),
        "parts": {row["part"]: row for row in rows},
    }
    ledger.append_rows(out, [conditions | row for row in rows])
    if os.environ.get("OUT"):
        ledger.drop_partial(out)
        whole = {outcome.part: outcome.document for outcome in outcomes}
        out.with_suffix(".json").write_text(json.dumps(document | {"documents": whole}, default=str) + "\n")
    print(
        f"\n{document['device']}, torch {document['torch']}, triton {document['triton']}, commit {document['commit']}"
    )
    for row in rows:
        print(f"{row['part']:12s} {row['seconds']:7.1f} s  {row['status']}  {row['summary']}")
    harness.finish(document)
    return document


def _parse(argv: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(names), help="comma-separated: " + ", ".join(names))
    parser.add_argument("--budget-s", type=float, default=540.0, help="wall time of the whole suite")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pipeline", default="", help="another pipeline than each part's own: a path")
    parser.add_argument("--keep-going", action="store_true", help="measure although correctness failed")
    options = parser.parse_args(argv)
    options.only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"--only has {', '.join(unknown)}; known are {', '.join(names)}")
    options.gpu = torch.device(options.device).type == "cuda"
    options.wrong = []  # what correctness finds: ops, engine
    return options


if __name__ == "__main__":
    sys.exit(0 if main()["passed"] else 1)
