"""One op at one size, as timed by benchmarks/kernels.py and checked by benchmarks/correctness.py.

A case holds candidates that compute the same result from the same random inputs, the least bytes and operations that
the op needs, and how the error of a candidate is judged. The first candidate is the baseline of the ratios.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Outputs = tuple[torch.Tensor, ...]


def everything(outputs: Outputs) -> Outputs:
    """All outputs of an op, if each is compared with its truth."""
    return outputs


def nothing() -> None:
    """The `prepare` of candidates that do not change their inputs."""


@dataclass
class Case:
    """One op at one size: what is compared, and the least that the hardware must do for it."""

    op: str
    shape: str
    dtype: str
    candidates: dict[str, Callable[[], Outputs]]  # name -> call that returns its outputs
    bytes_moved: int  # each input read once, each output written once
    truth: Callable[[], Outputs]  # of `judged` outputs, in float64 or by an independent library
    operations: int = 0  # 2 x multiply-adds of its matrix products; 0 if only bytes matter
    judged: Callable[[Outputs], Outputs] = everything  # the part of the outputs that is compared
    unjudged: dict[str, str] = field(default_factory=dict)  # candidates that compute something else, and what
    prepare: Callable[[], None] = nothing  # restores inputs that candidates change in place
    captured: bool = False  # part of a captured tick, so on a GPU replays of a graph are timed

    def outputs(self, name: str) -> Outputs:
        """A candidate's outputs for the original inputs."""
        self.prepare()
        return self.candidates[name]()

    def error(self, name: str) -> str:
        """|out - truth| / |truth| of each output, for the quality column."""
        if name in self.unjudged:
            return self.unjudged[name]
        pairs = zip(self.judged(self.outputs(name)), self.truth(), strict=True)
        errors = [((out.double() - true.double()).norm() / true.double().norm()).item() for out, true in pairs]
        return "relative error " + " ".join(f"{error:.1e}" for error in errors)


def implementations(
    call: Callable[[str], Outputs], device: torch.device, compiled: bool, eager: Callable[[], Outputs] | None = None
) -> dict[str, Callable[[], Outputs]]:
    """The op's own candidates: the eager definition, the same compiled, and the kernel if there is a GPU.

    eager: compiled in place of the definition, if the compiler cannot trace that.
    """
    found = {"eager": lambda: call("torch")}
    if compiled:
        # Dynamo counts recompilations per code object and falls back to eager beyond eight. All cases share one code
        # object, so what earlier cases compiled is discarded first.
        torch._dynamo.reset()
        found["torch.compile"] = torch.compile(eager or (lambda: call("torch")), dynamic=False)
    if device.type == "cuda":
        found["triton"] = lambda: call("triton")
    return found
