"""What the device gives a library at its best, and a cache in the state in which a call finds it in a real step.

A share of a ceiling says something only if both were measured alike: a copy of a gigabyte goes to memory, so a kernel
whose tensors would stay in the cache from one repetition to the next has to find them in memory too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness

COLD = 4  # times the cache that must pass through it until nothing older is left


@dataclass(frozen=True)
class Ceilings:
    """What the device gives a library at its best, in this run."""

    matmul_tflop_per_s: float
    copy_gib_per_s: float  # bytes read plus bytes written
    note: str
    float32_tflop_per_s: float | None = None  # None: the product above is one of float32

    def tflop_per_s(self, dtype: str) -> float:
        """The ceiling of matrix products that are as exact as their dtype."""
        own = self.float32_tflop_per_s if dtype == "float32" else None
        return own or self.matmul_tflop_per_s


def measure_ceilings(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, clock: str = "wall"
) -> Ceilings:
    """A large matrix product and a large copy of random numbers: fp16 of 8192 and 1 GiB on a GPU, fp32 of 1024 and
    64 MiB on a CPU.

    On a GPU a product of float32 has a ceiling of its own: the library's own, or a third of its tf32 product if that is
    more, since three of those (tf32x3) are as exact.
    """
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or (torch.float16 if on_gpu else torch.float32)
    n, mib = (8192, 1024) if on_gpu else (1024, 64)
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(0, 256, (mib * 2**20,), generator=generator, device=device, dtype=torch.uint8)
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    timings = harness.compare(calls, device, clock=clock).timings
    note, float32 = f"{str(dtype).removeprefix('torch.')} product of {n}, copy of {mib} MiB", None
    if on_gpu and dtype != torch.float32:
        del target, source
        exact, tf32 = (2 * n**3 / ms / 1e9 for ms in _float32_ms(a.float(), b.float(), device))
        float32 = max(exact, tf32 / 3)
        note += f"; float32 product {exact:.1f}, tf32 {tf32:.1f} TFLOP/s"
    return Ceilings(
        matmul_tflop_per_s=2 * n**3 / timings["matmul"].median_ms / 1e9,
        copy_gib_per_s=2 * mib / 2**10 / timings["copy"].median_ms * 1e3,
        note=note,
        float32_tflop_per_s=float32,
    )


def _float32_ms(a: torch.Tensor, b: torch.Tensor, device: torch.device | str) -> tuple[float, float]:
    """Milliseconds of a float32 product by the library, exact and in tf32."""
    product, precision = torch.empty_like(a), torch.get_float32_matmul_precision()
    found = []
    try:
        for how in ("highest", "high"):
            torch.set_float32_matmul_precision(how)
            found.append(harness.compare({how: lambda: torch.mm(a, b, out=product)}, device).timings[how].median_ms)
    finally:
        torch.set_float32_matmul_precision(precision)
    return found[0], found[1]


def cache_bytes(device: torch.device | str) -> int:
    """Size of a GPU's L2 cache; 0 on a CPU, whose caches are left as they are."""
    return torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else 0


def cold_cache(device: torch.device | str, moved: int) -> Callable[[], object] | None:
    """A call after which the L2 cache holds nothing of a candidate that moves `moved` bytes; None where it need not.

    A call that repeats on tensors which fit the cache would be measured against a copy that goes to memory. What moves
    four times the cache puts itself out. The cache is filled by reading: lines that were written would have to be
    written back within the time of the next call.
    """
    cache = cache_bytes(device)
    if moved >= COLD * cache:
        return None
    filler = torch.zeros(COLD * cache // 4, device=device)
    return filler.sum
