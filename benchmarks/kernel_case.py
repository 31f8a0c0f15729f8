"""One op at one size, as benchmarks/kernels.py times it and benchmarks/correctness.py judges it.

A case holds candidates that compute the same thing from the same random inputs, the bytes and operations the op cannot
do without, and how the error of a candidate's answer is judged. The first candidate is the baseline of the ratios.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Outputs = tuple[torch.Tensor, ...]


def everything(outputs: Outputs) -> Outputs:
    """All outputs of an op, where each is compared with its truth."""
    return outputs


def nothing() -> None:
    """What there is to prepare where candidates leave their inputs alone."""


@dataclass
class Case:
    """One op at one size: what is compared and what the hardware must at least do for it."""

    op: str
    shape: str
    dtype: str
    candidates: dict[str, Callable[[], Outputs]]  # name -> call that returns its outputs
    bytes_moved: int  # each input read once, each output written once
    truth: Callable[[], Outputs]  # of `judged` outputs, in float64 or by an independent library
    operations: int = 0  # 2 x multiply-adds of its matrix products; 0 where bytes are all that counts
    judged: Callable[[Outputs], Outputs] = everything  # the part of the outputs that is compared
    unjudged: dict[str, str] = field(default_factory=dict)  # candidates that answer another question, and which
    prepare: Callable[[], None] = nothing  # puts back inputs that candidates change in place
    captured: bool = False  # runs inside a captured tick, so that on a GPU replays of a graph are timed

    def outputs(self, name: str) -> Outputs:
        """What a candidate answers to the inputs as they were given."""
        self.prepare()
        return self.candidates[name]()

    def error(self, name: str) -> str:
        """|out - truth| / |truth| of each output: the quality column."""
        if name in self.unjudged:
            return self.unjudged[name]
        pairs = zip(self.judged(self.outputs(name)), self.truth(), strict=True)
        errors = [((out.double() - true.double()).norm() / true.double().norm()).item() for out, true in pairs]
        return "relative error " + " ".join(f"{error:.1e}" for error in errors)


def implementations(
    call: Callable[[str], Outputs], device: torch.device, compiled: bool, eager: Callable[[], Outputs] | None = None
) -> dict[str, Callable[[], Outputs]]:
    """The op's own candidates: eager definition, the same compiled, and the kernel where there is a GPU.

    eager: what is compiled instead of the definition, where a compiler cannot trace that as it stands.
    """
    found = {"eager": lambda: call("torch")}
    if compiled:
        # Dynamo counts its recompilations by code object, which all cases share here, and falls back to eager beyond
        # eight: what earlier cases compiled is forgotten first.
        torch._dynamo.reset()
        found["torch.compile"] = torch.compile(eager or (lambda: call("torch")), dynamic=False)
    if device.type == "cuda":
        found["triton"] = lambda: call("triton")
    return found
