"""Tests which accelerators really work on this machine, by making a real call to each.

That a package imports, or reports itself available, proves little: xformers does so even where it refuses every tensor.
So a probe makes the call that training would make, compares the result with float64, and keeps what was measured or the
reason of the failure.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.runtime import stream

MATMUL_SIZE = 256
HEADS_SHAPE = (2, 64, 8, 40)  # rows, tokens, heads, head width: head width 40 is SD 1.5's, which some kernels refuse
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative to the largest true value
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Probe:
    """The result of testing one accelerator."""

    name: str
    works: bool
    detail: str  # what was measured, or why it does not work


class Wrong(Exception):
    """A call was refused for a known reason, or returned a wrong result."""


def accelerators(device: torch.device) -> list[Probe]:
    """Test every accelerator this project can use by a real call on `device`; compilers take some seconds."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    half = torch.float16 if device.type == "cuda" else torch.float32
    probes = [probe(f"matmul {name}", lambda dtype=dtype: _matmul(device, dtype)) for name, dtype in dtypes.items()]
    probes += [
        probe(f"attention sdpa {name}", lambda backend=backend: _sdpa(device, half, backend))
        for name, backend in ATTENTION.items()
    ]
    return probes + [
        probe("attention xformers", lambda: _xformers(device, half)),
        probe("bitsandbytes AdamW8bit", lambda: _bitsandbytes(device)),
        probe("triton kernel", lambda: _triton(device)),
        probe("torch.compile", lambda: _compile(device)),
        probe("CUDA graph", lambda: _graph(device)),
    ]


def probe(name: str, work: Callable[[], str]) -> Probe:
    """Run `work`, which returns a description of what it measured; if it raises, the detail is the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Probe(name, True, work())
    except Exception as error:  # libraries refuse with exceptions of every kind; the refusal is what was asked for
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        return Probe(name, False, lines[0] if isinstance(error, Wrong) else f"{type(error).__name__}: {lines[0]}")


def available_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of the GPU's memory, or of the machine's on a CPU; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def hardware(device: torch.device) -> list[tuple[str, str]]:
    """(what, value) rows of the device: memory, and on a GPU its capability, multiprocessors and the cuDNN version."""
    memory = available_memory(device)
    rows = [] if memory is None else [("memory", f"{memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB free")]
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        rows += [
            ("compute capability", f"{facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors"),
            ("cuDNN", str(torch.backends.cudnn.version())),
        ]
    return rows


def xformers_reasons(error: Exception) -> str:
    """The reasons why xformers' operators refused, taken from the end of its error message; "" if it gives none."""
    _, _, refusals = str(error).partition("is not supported because:")
    return "; ".join(dict.fromkeys(line.strip() for line in refusals.splitlines() if line.startswith("    ")))


def _normal(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = stream(0, "probe")
    return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]


def _compare(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> str:
    """Text with the largest error relative to the largest true value; raises Wrong beyond the tolerance of `dtype`."""
    truth = truth.double().cpu()
    error = float((found.double().cpu() - truth).abs().max() / truth.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise Wrong(f"it runs, but its largest error is {error:.1e} of the largest value (expected {TOLERANCE[dtype]})")
    return f"largest error {error:.0e} of the largest value"


def _matmul(device: torch.device, dtype: torch.dtype) -> str:
    a, b = _normal(device, dtype, (MATMUL_SIZE, MATMUL_SIZE), (MATMUL_SIZE, MATMUL_SIZE))
    return _compare(a @ b, a.double() @ b.double(), dtype)


def _attention_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, for q, k, v of shape [rows, heads, tokens, width]."""
    q, k, v = (x.double() for x in (q, k, v))
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _sdpa(device: torch.device, dtype: torch.dtype, backend: SDPBackend) -> str:
    q, k, v = (x.transpose(1, 2) for x in _normal(device, dtype, HEADS_SHAPE, HEADS_SHAPE, HEADS_SHAPE))
    try:
        with warnings.catch_warnings(record=True) as told, sdpa_kernel(backend):
            warnings.simplefilter("always")
            found = F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:  # says only that no backend is left; on a GPU the reasons are given as warnings
        reasons = "; ".join(str(warning.message).split(" (Triggered")[0] for warning in told)
        raise Wrong(reasons or f"it takes no {dtype} tensors on {device.type}") from error
    return _compare(found, _attention_truth(q, k, v), dtype)


def _xformers(device: torch.device, dtype: torch.dtype) -> str:
    from xformers.ops import memory_efficient_attention

    q, k, v = _normal(device, dtype, HEADS_SHAPE, HEADS_SHAPE, HEADS_SHAPE)
    try:
        found = memory_efficient_attention(q, k, v)
    except NotImplementedError as error:
        raise Wrong(f"no operator takes these tensors: {xformers_reasons(error) or error}") from error
    return _compare(found.transpose(1, 2), _attention_truth(*(x.transpose(1, 2) for x in (q, k, v))), dtype)


def _bitsandbytes(device: torch.device) -> str:
    from bitsandbytes.optim import AdamW8bit

    (start,) = _normal(device, torch.float32, (64, 128))  # 8,192 elements: state is kept in 8 bits from 4,096 on
    weight = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.square().sum().backward()
    optimizer.step()
    moved = float((weight.detach() - start).abs().mean())
    states = {str(value.dtype) for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)}
    if "torch.uint8" not in states:
        raise Wrong(f"its state is {', '.join(sorted(states))} and not 8 bits wide")
    if not 5e-4 < moved < 2e-3:  # Adam's first step moves every weight by lr
        raise Wrong(f"the first step moved weights by {moved:.1e} where lr is 1e-3")
    return "one step, state in 8 bits"


def _triton(device: torch.device) -> str:
    from kernels import backend
    from kernels.pixels import pixels

    if device.type != "cuda" and not backend.interpreted():
        raise Wrong("there is no CUDA GPU")
    (x_N3HW,) = _normal(device, torch.float32, (1, 3, 64, 64))
    made, truth = (pixels(x_N3HW, 32, implementation=name).float() for name in ("triton", "torch"))
    worst = float((made - truth).abs().max())
    if worst > 1:
        raise Wrong(f"kernels.pixels compiles, but differs from its definition by {worst:g} of 255")
    return "kernels.pixels compiled, equal to its definition within 1 of 255"


def _compile(device: torch.device) -> str:
    (x,) = _normal(device, torch.float32, (64, 64))

    def work(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * 2 + x.mean(0)

    return _compare(torch.compile(work)(x), work(x.double()), torch.float32)


def _graph(device: torch.device) -> str:
    if device.type != "cuda":
        raise Wrong("there is no CUDA GPU")
    x, y = _normal(device, torch.float32, (64, 64), (64, 64))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm-up: libraries must allocate their workspaces before the capture
        x @ y
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = x @ y
    x.copy_(y)
    graph.replay()
    return f"captured and replayed, {_compare(product, y.double() @ y.double(), torch.float32)}"
