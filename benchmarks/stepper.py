"""Runs blocks of steps at any ratio and measures what they cost; used by benchmarks/step.py."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import trainer
from benchmarks import harness
from benchmarks.session import with_images_per_step
from modules.diffusion.overlap import Overlap
from modules.phases import BESIDE, STEP_PHASES
from modules.training.job import State
from modules.training.timing import time_steps, window

SYNC = "called a synchronizing CUDA operation"  # torch's words for each; switching the mode on warns in other words


@dataclass(frozen=True)
class Watched:
    """The side effects of a block of steps: syncs, writes, memory."""

    host_syncs: int | None  # how often the host waits for the device; None without a device to wait for
    bytes_written: int | None  # that this process gave to the system for writing; None if the system does not count
    peak_mib: float | None  # needed beyond what is held before it, graphs' pools included: see `harness.peak_mib`


class Stepper:
    """Blocks of joint steps, of training alone (ratio 0) and of generation alone.

    A block is a whole number of turnovers of the slots, so that exactly as many images are finished and decoded in it
    as the ratio requires.
    """

    def __init__(self, state: State, least: int, mode: str = "sequential"):
        """least: the least number of steps in a block; mode: how generation shares the device."""
        self.state, self.least, self.config = state, least, state.config
        self.device = next(state.encoder.parameters()).device
        self.advance = state.generator.advance
        self.mode, self.overlap = mode, Overlap(mode, self.device, state.meter.phase)
        self.syncs: list[str] = []  # what torch said of those of the block watched last

    @property
    def train_images(self) -> int:
        return len(self.state.generator.recipes.labels)

    def steps(self, images: float) -> int:
        """The number of steps in a block at a ratio."""
        self._set(images)
        return window(self.state, self.least)

    def at(self, images: float) -> Callable[[], None]:
        """A call that runs a block of joint steps at a ratio."""
        count = self.steps(images)

        def call() -> None:
            self._set(images)
            for _ in range(count):
                trainer.step(self.state)
            self.overlap.join()  # what the last step launched belongs to the block

        return call

    def generating(self, images: float) -> Callable[[], None]:
        """A call that runs only the generation of such a block."""
        count = self.steps(images)

        def call() -> None:
            self._set(images)
            for _ in range(count):
                self.advance(self.state.step)

        return call

    def phases(self, images: float) -> dict[str, float]:
        """Milliseconds per step over one block: `step`, each phase, and `bookkeeping`.

        Bookkeeping is the rest of the generate phase after UNet calls with their solver steps, decoding and the text
        encoder: admission, noise, uploads, storing.
        """
        count = self.steps(images)
        found = time_steps(self.state, trainer.step, count)
        phases = {name: found.phase_ms.get(name, 0.0) for name in STEP_PHASES}
        generate_ms = found.phase_ms.get(BESIDE, phases["generate"])
        bookkeeping = max(0.0, generate_ms - sum(found.part_ms.values()))
        return phases | {"step": found.step_ms, "bookkeeping": bookkeeping}

    def watched(self, images: float) -> Watched:
        """The syncs, bytes written and peak memory of one block, which is run separately as watching costs time."""
        call, found = self.at(images), {}

        def watched_call() -> None:
            before = _written()
            found["syncs"] = self._host_syncs(call)
            after = _written()
            found["written"] = None if before is None else after - before

        peak = harness.peak_mib(watched_call, self.device, pool_bytes=self.state.pool_bytes)
        return Watched(found["syncs"], found["written"], peak)

    def _host_syncs(self, call: Callable[[], None]) -> int | None:
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught, _syncs_reported():
            warnings.simplefilter("always")
            call()
        self.syncs = sorted({str(warning.message) for warning in caught if SYNC in str(warning.message)})
        return sum(SYNC in str(warning.message) for warning in caught)

    def _set(self, images: float) -> None:
        self.state.overlap = self.overlap  # steppers of several modes share a state
        self.state.config = self.state.generator.config = with_images_per_step(self.config, images)


@contextmanager
def _syncs_reported():
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _written() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
