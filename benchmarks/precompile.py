"""Compiled techniques compiled beside each other, before they are measured one after the other.

Compiling a UNet of Stable Diffusion's size and its decoder takes a minute or more, on one core for the most part, and a
benchmark has several. Processes of their own fill the compiler's cache on disk at the same time; this one then finds
there what it would have compiled. They are told which attention backends and forms of upsampling were found fastest:
timed beside each other they would take others, and compile another graph than the one that is asked for. Done on a GPU
alone: on a CPU compiling takes all cores.
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
    """Fill the compiler's cache for the techniques that will be measured; returns the seconds that took.

    A process that fails says so and costs nothing else: its technique is compiled when its turn comes. What is not done
    when the rest of the budget is needed is stopped and left to `bench.too_late`: begun again it would take as long.
    """
    begin, waiting, running = time.perf_counter(), commands(bench), {}
    least = (BLOCKS_SHARE + READY_SHARE) * bench.budget.seconds
    if len(waiting) < 2:
        return 0.0  # nothing to do beside each other
    if bench.budget.left < least + LEAST_S:
        # The first alone will be compiled when its turn comes: more would take the blocks' time.
        bench.too_late |= set(list(waiting)[1:])
        return 0.0
    gc.collect()  # the searches for the best batches leave caches: the processes need that memory
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
    """(technique, batch) -> the command line of its process, what the ratios need first."""
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
