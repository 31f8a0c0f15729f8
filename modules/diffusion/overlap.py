"""How generation and training share one GPU: one after the other, or with generation on a side stream.

A training step of a small encoder leaves most of a GPU idle, and so does a UNet call of few rows. Side by side both
finish sooner, unless either fills the GPU alone. This is measured: a short calibration times a step in each mode, on
copies of the state, and keeps the faster mode.

In stream mode the generation of a step is launched once the step's batch is mixed, and the next batch is mixed only
after it has finished, so the reservoir is never read and written at the same time. The images are the same as in
sequential mode, but each arrives one step later.
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
    """Runs the generation of each step on the current stream or on a side stream, depending on the mode."""

    def __init__(
        self,
        mode: str,
        device: torch.device,
        timed: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        """mode: sequential, or stream on a CUDA device (see `choose_mode`). timed: times work on the side stream."""
        self.mode, self.timed = mode, timed
        self.pending: Callable[[], None] | None = None
        self.side = self.done = None
        if mode == "stream":
            self.side = torch.cuda.Stream(device)  # the default priority is the lowest
            self.done = torch.cuda.Event()

    def generate(self, advance: Callable[[], None]) -> None:
        """Wait for the previous launch, then run `advance` at once or, in stream mode, keep it for `launch`."""
        self.join()
        if self.side is None:
            advance()
        else:
            self.pending = advance

    def launch(self) -> None:
        """Start what `generate` kept, beside the work that follows; called once the batch is mixed."""
        if self.pending is None:
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            with self.timed(BESIDE):
                self.pending()
            self.done.record()
        self.pending = None

    def join(self) -> None:
        """Make the current stream wait for the last launch: before mixing a batch, a checkpoint or an evaluation."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def wait(self) -> None:
        """Make the current stream wait for all work on the side stream, including that of a launch that failed."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)


def choose_mode(asked: str, device: torch.device, measure: Callable[[str], float], screened: bool = False) -> Choice:
    """The mode to run in, and why.

    Args:
        asked: generation.mode: auto | sequential | stream.
        measure: returns the milliseconds of a step in a mode, on copies of the state, or infinity if memory runs out;
            called only for auto on a GPU.
        screened: whether gate or controller judge images with the encoder that is being trained. It must not change while
            they do, so generation then stays sequential.

    Raises:
        ConfigError: stream is asked for but cannot be used.
    """
    if asked == "stream" and device.type != "cuda":
        raise ConfigError("generation.mode is stream, which needs a CUDA GPU; set it to auto or sequential")
    if asked == "stream" and screened:
        raise ConfigError(
            "generation.mode is stream, but gate or controller judge images by the encoder that is being trained; set "
            "generation.mode to auto, or gate.enabled and controller.enabled to false"
        )
    if asked != "auto":
        return Choice(asked, "generation.mode")
    if device.type != "cuda":
        return Choice("sequential", "auto: a CPU has no streams")
    if screened:
        return Choice("sequential", "auto: gate or controller read the encoder while images are made")
    times = {mode: measure(mode) for mode in MODES}
    best = min(times, key=times.get)
    told = [f"{mode} {ms:.1f} ms a step" if math.isfinite(ms) else f"{mode} does not fit" for mode, ms in times.items()]
    return Choice(best, f"auto: {', '.join(told)}")
