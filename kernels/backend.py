"""Chooses which implementation of an op runs, and gives the reason.

Every op in `OPS` has a definition in plain torch and a Triton kernel. `auto` selects the kernel only if it has beaten
the compiled definition on a GPU, that is, if `JUDGED` names the benchmark row that shows it; otherwise it selects the
definition. A setting forces either. Only this module of kernels/ asks what hardware and libraries are present. The
other modules import Triton from here, so that the definitions also run where Triton cannot be installed.
"""

import contextlib
import importlib.util
import os
import platform
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

if importlib.util.find_spec("triton") is None:  # torch's wheels for macOS and Windows bring no Triton
    triton = None
    tl = types.SimpleNamespace(constexpr=int)  # enough for the kernels' annotations; the kernels never run then
else:
    import triton

    tl = triton.language

IMPLEMENTATIONS = ("auto", "torch", "triton")
OPS = ("views", "supcon", "guided_step", "group_norm", "pixels")

# op -> the GPU row of benchmarks/results/kernels_gpu.csv that justifies its kernel (rule: >= 1.05x torch.compile in
# time, or >= 2x better in memory at equal time). All rows were measured on an H200.
JUDGED: dict[str, str] = {
    "views": "4.9x torch.compile on an H200, faster since: kernels_gpu.csv of 2026-11-27",
    "supcon": "2.7x torch.compile at R = 8192 on an H200, a 27th of its memory: kernels_gpu.csv of 2026-11-27",
    "pixels": "1.2x torch.compile on an H200, a 25th of its memory, faster since: kernels_gpu.csv of 2026-11-27",
}

SHARED_BYTES = 227 * 1024  # shared memory available to a block on the GPU that the rows were measured on

_default = "auto"
_launched = 0  # kernel launches by this process, not counting those in compiled graphs


class Choice(NamedTuple):
    """The implementation that runs ("torch" or "triton") and the reason to print for it."""

    name: str
    reason: str


def set_default(implementation: str) -> None:
    """Set what `implementation="auto"` means from now on (the setting run.kernels).

    Raises ValueError if `implementation` is not one of auto, torch, triton.
    """
    global _default
    _check(implementation)
    _default = implementation


@contextlib.contextmanager
def using(implementation: str) -> Iterator[None]:
    """Context manager in which `implementation="auto"` means this one, to measure implementations side by side.

    Raises ValueError if `implementation` is not one of auto, torch, triton.
    """
    before = _default
    set_default(implementation)
    try:
        yield
    finally:
        set_default(before)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1 when kernels/ was imported)."""
    return triton is not None and _INTERPRET


def has_onednn() -> bool:
    """Whether torch was built with oneDNN."""
    return _ONEDNN


def is_intel() -> bool:
    """Whether this is an Intel processor; only there does MKL, used by torch for products, run at full vector width."""
    return _INTEL


def choose(op: str, implementation: str = "auto", device: torch.device | str = "cpu", *, unable: str = "") -> Choice:
    """The implementation of `op` on `device`, with the reason.

    unable: why the kernel cannot take these particular arguments; "" if it can.

    Raises ValueError for an unknown op or implementation, and if Triton is requested but cannot run.
    """
    _check(implementation)
    if op not in OPS:
        raise ValueError(f"op={op!r} is unknown; expected one of {', '.join(OPS)}")
    asked = implementation if implementation != "auto" else _default
    by = "asked for" if implementation != "auto" else "set by run.kernels"
    kind = torch.device(device).type
    if asked == "torch":
        return Choice("torch", by)
    obstacle = _obstacle(kind) or unable
    if asked == "triton" and unable and implementation == "auto":  # run.kernels is about all ops, not this input
        return Choice("torch", unable)
    if asked == "triton":
        if obstacle:
            raise ValueError(f"implementation='triton' of {op}: {obstacle}; use 'auto' or 'torch'")
        return Choice("triton", by)
    if kind == "cpu":
        return Choice("torch", "the definition in plain torch is the CPU path")
    if obstacle:
        return Choice("torch", obstacle)
    if op in JUDGED and (other := _unlike_judged(device)):
        return Choice("torch", other)
    if op in JUDGED:
        return Choice("triton", JUDGED[op])
    return Choice("torch", "no row of kernels_gpu.csv says that the kernel pays, so it is off")


def _unlike_judged(device: torch.device | str) -> str:
    """Why a result measured on an H200 need not hold on this GPU; "" if the GPU is of that kind or newer.

    The kernels' blocks are as large as an H200's shared memory allows, so on most other GPUs a kernel would not start.
    """
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) >= (9, 0) and found.shared_memory_per_block_optin >= SHARED_BYTES:
        return ""
    shared = found.shared_memory_per_block_optin // 1024
    return (
        f"the kernel was judged on an H200; {found.name} (sm_{found.major}{found.minor}, {shared} KiB of shared memory a "
        "block) is of another kind; run.kernels=triton tries it"
    )


def explain(device: torch.device | str, implementation: str = "auto") -> dict[str, Choice]:
    """op -> its choice on `device`, for the run card."""
    return {op: choose(op, implementation, device) for op in OPS}


def jit(function=None, *, unspecialized: tuple[str, ...] = ()):
    """`triton.jit`, or `function` itself if Triton is not installed. Used as @jit or @jit(unspecialized=...).

    unspecialized: integer arguments whose value never triggers a recompilation. By default Triton compiles a new
    variant when an integer starts or stops being 1 or a multiple of 16; for a size that changes during a run (rows of a
    batch), that would happen in the middle of a step. Do not list strides and widths: knowing their alignment makes
    loads wide.
    """
    if function is None:
        return lambda function: jit(function, unspecialized=unspecialized)
    return function if triton is None else triton.jit(function, do_not_specialize=unspecialized)


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of the first argument, a tensor, and that device's stream.

    Triton launches on the current device; with tensors of another device it would dereference that device's addresses.
    """
    global _launched
    if torch.compiler.is_compiling():  # a compiled graph guards the device itself
        kernel[grid](*arguments, **constants)
        return
    _launched += 1
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def launches_of(call: Callable[[], object]) -> int:
    """How many kernels `call` launches through `launch`, including those of backward passes."""
    before = _launched
    call()
    return _launched - before


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, as Triton's block shapes must be."""
    return 1 << max(n - 1, 0).bit_length()


def _processor_is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


_ONEDNN = torch.backends.mkldnn.is_available()  # evaluated once: torch.compile cannot trace this call
_INTEL = _processor_is_intel()
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def too_wide(name: str, tensor: torch.Tensor, columns: int = 0) -> str:
    """Why a kernel cannot take a tensor: it is float64 or wider than `columns` (0: no limit); "" if it can."""
    if tensor.dtype == torch.float64 or (columns and tensor.shape[-1] > columns):
        bound = f"[any, <= {columns}]" if columns else ""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{name} is {dtype}{list(tensor.shape)}; the kernel takes float32, float16 or bfloat16{bound}"
    return ""


def obstacle(device: torch.device | str) -> str:
    """Why Triton cannot run on a device; "" if it can."""
    return _obstacle(torch.device(device).type)


def _obstacle(kind: str) -> str:
    if triton is None:
        return "Triton is not installed"
    if interpreted():
        return "" if kind == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    if kind != "cuda":
        return f"Triton kernels need a CUDA GPU, the tensors are on {kind!r} (TRITON_INTERPRET=1 at start interprets)"
    return ""


def _check(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; expected one of {', '.join(IMPLEMENTATIONS)}")
