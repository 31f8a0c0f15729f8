"""How generation and training share one GPU: one after the other, or generation on a side stream.

A training step of a small encoder leaves most of a GPU idle, a UNet call of few rows does too; side by side both finish
sooner, unless each fills the GPU alone. Which holds is measured: a short calibration times a step in either mode on
copies of the state and keeps the faster.

In stream mode the generation of a step is launched once its batch is mixed and is waited for before the next batch is, so
reading and writing of the reservoir never meet. The images are those of sequential mode; each comes one step later.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from modules.errors import ConfigError
from modules.phases import BESIDE
from modules.runtime import Choice

MODES = ("sequential", "stream")


class Overlap:
    """Runs the generation of each step where its mode says."""

    def __init__(
        self,
        mode: str,
        device: torch.device,
        timed: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        """mode: sequential, or stream on a CUDA device (see `choose_mode`). timed: attributes what a side stream does."""
        self.mode, self.timed = mode, timed
        self.pending: Callable[[], None] | None = None
        self.side = self.done = None
        if mode == "stream":
            self.side = torch.cuda.Stream(device)  # of the default priority, which is the lowest there is
            self.done = torch.cuda.Event()

    def generate(self, advance: Callable[[], None]) -> None:
        """The generation of this step: now, or, in stream mode, at `launch`; what was launched before is waited for."""
        self.join()
        if self.side is None:
            advance()
        else:
            self.pending = advance

    def launch(self) -> None:
        """Start what `generate` left pending, beside whatever follows; called once the batch is mixed."""
        if self.pending is None:
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            with self.timed(BESIDE):
                self.pending()
            self.done.record()
        self.pending = None

    def join(self) -> None:
        """Let the current stream wait for what was launched: before a mix, a checkpoint or an evaluation."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def wait(self) -> None:
        """Let the current stream wait for whatever the side stream was handed, of a launch that failed as well."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)


def choose_mode(asked: str, device: torch.device, measure: Callable[[str], float], judged: bool = False) -> Choice:
    """The mode to run in, and why.

    Args:
        asked: generation.mode: auto | sequential | stream.
        measure: milliseconds of a step in a mode, on copies of the state, infinite where memory runs out; called for auto
            on a GPU only.
        judged: whether gate or controller look at images with the encoder that is being trained; it must not change
            under them, so generation then stays sequential.

    Raises:
        ConfigError: stream is asked for where it cannot run.
    """
    if asked == "stream" and device.type != "cuda":
        raise ConfigError("generation.mode is stream, which needs a CUDA GPU; set it to auto or sequential")
    if asked == "stream" and judged:
        raise ConfigError(
            "generation.mode is stream, but gate or controller judge images by the encoder that is being trained; set "
            "generation.mode to auto, or gate.enabled and controller.enabled to false"
        )
    if asked != "auto":
        return Choice(asked, "generation.mode")
    if device.type != "cuda":
        return Choice("sequential", "auto: a CPU has no streams")
    if judged:
        return Choice("sequential", "auto: gate or controller read the encoder while images are made")
    times = {mode: measure(mode) for mode in MODES}
    best = min(times, key=times.get)
    told = [f"{mode} {ms:.1f} ms a step" if math.isfinite(ms) else f"{mode} does not fit" for mode, ms in times.items()]
    return Choice(best, f"auto: {', '.join(told)}")
