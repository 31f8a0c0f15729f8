"""Compiles the compiled techniques in parallel, before they are measured one after the other.

Compiling a UNet of Stable Diffusion's size and its decoder takes a minute or more, mostly on one core, and a benchmark
has several of them. Separate processes fill the compiler's cache on disk at the same time; this process then finds its
graphs there. They are told which attention backends and forms of upsampling were found fastest: timing these in
parallel could choose others, and so compile a different graph from the one that is needed. Only on a GPU: on a CPU one
compilation already takes all cores.
"""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.techniques import BLOCKS_SHARE, COMPILED, SLOTS_COMPILED, SLOTS_FAST, SLOTS_KERNELS, Bench

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 5  # each holds a pipeline and the activations of its batch
LEAST_S = 60.0  # nothing of Stable Diffusion's size was compiled sooner (78 and 83 s on an H200)
READY_SHARE = 0.3  # of the budget: kept beside that of the blocks for making techniques ready after this


def precompile(bench: Bench) -> float:
    """Fill the compiler's cache for the techniques that will be measured; returns the seconds it took.

    A failing process is reported and has no other effect: its technique is compiled when its turn comes. Processes that
    are not done when the rest of the budget is needed are stopped and added to `bench.too_late`: a new start would take
    as long.
    """
    begin, waiting, running = time.perf_counter(), commands(bench), {}
    least = (BLOCKS_SHARE + READY_SHARE) * bench.budget.seconds
    if len(waiting) < 2:
        return 0.0  # nothing to do in parallel
    if bench.budget.left < least + LEAST_S:
        # Only the first will be compiled, when its turn comes: more would take time from the blocks.
        bench.too_late |= set(list(waiting)[1:])
        return 0.0
    gc.collect()  # the searches for the best batches leave cached memory, which the processes need
    torch.cuda.empty_cache()
    try:
        while True:
            may_begin = bench.budget.left >= least + LEAST_S
            while waiting and len(running) < AT_ONCE and may_begin:
                key = next(iter(waiting))
                running[key] = subprocess.Popen(waiting.pop(key), cwd=ROOT, stdout=subprocess.DEVNULL)
            for (name, batch), process in running.items():
                if process.poll() not in (None, 0):
                    print(f"compiling {name}, {batch} ahead failed with exit code {process.returncode}", flush=True)
            running = {key: process for key, process in running.items() if process.poll() is None}
            if bench.budget.left < least or not (running or (waiting and may_begin)):
                break
            time.sleep(0.2)
        bench.too_late |= {*waiting, *running}
        if bench.too_late:
            names = "; ".join(f"{name}, {batch}" for name, batch in bench.too_late)
            print(f"no time left to compile {names}", flush=True)
    finally:
        for process in running.values():  # the compiler's own workers end with it
            process.kill()
            process.wait()
    return time.perf_counter() - begin


def commands(bench: Bench) -> dict[tuple[str, int], list[str]]:
    """(technique, batch) -> the command line of its process; those that the ratios need come first."""
    chosen, options = bench.makers(), bench.options
    if bench.device.type != "cuda" or not options.compile:
        return {}
    batches = {SLOTS_COMPILED: (bench.rows,), COMPILED: bench.batches_to_compile()}
    batches |= dict.fromkeys((SLOTS_FAST, SLOTS_KERNELS), (bench.rows,))
    batches = {name: tried for name, tried in batches.items() if name in chosen}
    if batches.keys() - {COMPILED}:
        bench.tune()
    common = [sys.executable, "-m", "benchmarks.generator", "--compile-only", "--out", "none"]
    common += ["--device", options.device, "--pipeline", options.pipeline, "--resolution", str(options.resolution)]
    common += ["--dtype", options.dtype, "--images", str(options.images), "--found", json.dumps(bench.found)]
    return {
        (name, batch): [*common, "--only", name, "--batch", str(batch)]
        for name, tried in batches.items()
        for batch in tried
    }
