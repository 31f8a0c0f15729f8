"""Ceilings: the best rates that libraries reach on the device; and emptying the cache, as calls find it in a real step.

A share of a ceiling is meaningful only if both were measured alike. A copy of a gigabyte goes to memory, so a kernel
whose tensors would otherwise stay in the cache between repetitions must find them in memory too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness

COLD = 4  # reading this many times the cache's size evicts everything older


@dataclass(frozen=True)
class Ceilings:
    """The best rates that libraries reach on the device, measured in this run."""

    matmul_tflop_per_s: float
    copy_gib_per_s: float  # bytes read plus bytes written
    note: str
    float32_tflop_per_s: float | None = None  # None: the product above is in float32 already

    def tflop_per_s(self, dtype: str) -> float:
        """The ceiling of matrix products that are as exact as `dtype` allows."""
        own = self.float32_tflop_per_s if dtype == "float32" else None
        return own or self.matmul_tflop_per_s


def measure_ceilings(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, clock: str = "wall"
) -> Ceilings:
    """The rates of a large matrix product and a large copy of random numbers.

    On a GPU these are fp16 of 8192 x 8192 and 1 GiB, on a CPU fp32 of 1024 x 1024 and 64 MiB. On a GPU, float32
    products have their own ceiling: the rate of the library's float32 product, or a third of that of its tf32 product
    if that is higher, since three tf32 products (tf32x3) are as exact.
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
    """Milliseconds of the library's float32 product: exact, and in tf32."""
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
    """The size of a GPU's L2 cache; 0 on a CPU, whose caches are not emptied."""
    return torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else 0


def cold_cache(device: torch.device | str, moved: int) -> Callable[[], object] | None:
    """A call that evicts a candidate's tensors from the L2 cache; None if its `moved` bytes already do so.

    Otherwise a repeated call whose tensors fit the cache would be compared with a copy that goes to memory. A candidate
    that moves at least COLD times the cache evicts itself. The call only reads: written lines would have to be written
    back during the next call.
    """
    cache = cache_bytes(device)
    if moved >= COLD * cache:
        return None
    filler = torch.zeros(COLD * cache // 4, device=device)
    return filler.sum
