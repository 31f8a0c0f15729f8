"""Compiled techniques compiled beside each other, before they are measured one after the other.

Compiling a UNet of Stable Diffusion's size and its decoder takes a minute or more, on one core for the most part, and a
benchmark has several. Processes of their own fill the compiler's cache on disk at the same time; this one then finds
there what it would have compiled. Done on a GPU alone: on a CPU compiling takes all cores.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.techniques import COMPILED, SLOTS_COMPILED, SLOTS_FAST, SLOTS_KERNELS, Bench

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 4  # each holds a pipeline and the activations of its batch


def precompile(bench: Bench) -> float:
    """Fill the compiler's cache for the techniques that will be measured; returns the seconds that took.

    A process that fails says so and costs nothing else: its technique is compiled when its turn comes.
    """
    begin, waiting, running = time.perf_counter(), commands(bench), []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            command = waiting.pop(0)
            running.append((command, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)))
        for command, process in running:
            if process.poll() not in (None, 0):
                print(
                    f"compiling ahead failed with exit code {process.returncode}: {' '.join(command[2:])}", flush=True
                )
        running = [(command, process) for command, process in running if process.poll() is None]
        time.sleep(0.2)
    return time.perf_counter() - begin


def commands(bench: Bench) -> list[list[str]]:
    """The command line of each process: one a technique, one a batch where several are tried."""
    chosen = bench.makers()
    if bench.device.type != "cuda" or not bench.options.compile:
        return []
    batches = {COMPILED: bench.batches_to_compile()}
    batches |= dict.fromkeys((SLOTS_COMPILED, SLOTS_FAST, SLOTS_KERNELS), (bench.rows,))
    options = bench.options
    common = [sys.executable, "-m", "benchmarks.generator", "--compile-only", "--out", "none"]
    common += ["--device", options.device, "--pipeline", options.pipeline, "--resolution", str(options.resolution)]
    common += ["--images", str(options.images)]
    return [
        [*common, "--only", name, "--batch", str(batch)]
        for name, tried in batches.items()
        if name in chosen
        for batch in tried
    ]
