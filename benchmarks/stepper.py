"""A state that steps at any ratio, and what a block of its steps costs: used by benchmarks/step.py."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

import trainer
from benchmarks.session import with_images_per_step
from modules.commands.job import State
from modules.commands.timing import time_steps, window
from modules.diffusion.overlap import Overlap
from modules.phases import STEP_PHASES

SYNC = "called a synchronizing CUDA operation"  # torch's words for each; switching the mode on warns in other words


class Stepper:
    """Blocks of joint steps, of training alone (ratio 0) and of generation alone.

    A block is a whole number of turnovers of the slots, so that the bursts of arriving images fall into it as often as
    the ratio owes them.
    """

    def __init__(self, state: State, least: int, mode: str = "sequential"):
        """least: steps of a block at least; mode: how generation shares the device."""
        self.state, self.least, self.config = state, least, state.config
        self.device = next(state.encoder.parameters()).device
        self.advance = state.generator.advance
        self.mode, self.overlap = mode, Overlap(mode, self.device)

    @property
    def train_images(self) -> int:
        return len(self.state.generator.labels)

    def steps(self, images: float) -> int:
        """Steps of a block at a ratio."""
        self._set(images)
        return window(self.state, self.least)

    def at(self, images: float) -> Callable[[], None]:
        """A call that takes a block of joint steps at a ratio."""
        count = self.steps(images)

        def call() -> None:
            self._set(images)
            for _ in range(count):
                trainer.step(self.state)
            self.overlap.join()  # what the last step launched belongs to the block

        return call

    def generating(self, images: float) -> Callable[[], None]:
        """A call that does the generation of such a block alone."""
        count = self.steps(images)

        def call() -> None:
            self._set(images)
            for _ in range(count):
                self.advance(self.state.step)

        return call

    def phases(self, images: float) -> dict[str, float]:
        """Milliseconds a step over one block: `step`, each phase, and `bookkeeping`.

        Bookkeeping is what the generate phase takes beside UNet calls with their solver steps, decoding and text
        encoder: admission, noise, uploads, storing.
        """
        count = self.steps(images)
        found = time_steps(self.state, trainer.step, count)
        phases = {name: found.phase_ms.get(name, 0.0) for name in STEP_PHASES}
        bookkeeping = max(0.0, phases["generate"] - sum(found.part_ms.values()))
        return phases | {"step": found.step_ms, "bookkeeping": bookkeeping}

    def bytes_written(self, images: float) -> int | None:
        """Bytes this process hands to the system for writing during a block; None where the system does not count."""
        call, before = self.at(images), _written()
        call()
        after = _written()
        return None if before is None else after - before

    def host_syncs(self, images: float) -> int | None:
        """Times the host waits for the device during a block; None without a device to wait for."""
        if self.device.type != "cuda":
            return None
        call = self.at(images)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught, _syncs_reported():
            warnings.simplefilter("always")
            call()
        found = [str(warning.message) for warning in caught if SYNC in str(warning.message)]
        for message in sorted(set(found))[:3]:
            print(f"  sync: {message.splitlines()[0]}", flush=True)
        return len(found)

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
