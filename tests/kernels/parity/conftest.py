"""The idiom of every parity test: a kernel may err as much as the eager op errs at that dtype, plus a little."""

import importlib
from collections import Counter
from functools import partial

import pytest
import torch

from kernels import backend

DEVICE = "cpu" if backend.interpreted() else "cuda"
# What is added to the eager op's own relative error. The interpreter stores bf16 by cutting off, which doubles its rounding.
# Compiled, a product of float32 keeps 22 bits (tf32x3), which a temperature of .05 magnifies twentyfold.
SLACK = {
    torch.float32: 2e-6 if backend.interpreted() else 1e-5,
    torch.float16: 2e-4,
    torch.bfloat16: 4e-3 if backend.interpreted() else 1e-3,
}


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """op -> calls of its kernel in this test; a test fails where the kernel was chosen and the definition ran, or not."""
    chosen, run = Counter(), Counter()
    choose = backend.choose

    def counted_choose(op, *args, **settings):
        choice = choose(op, *args, **settings)
        chosen[op] += choice.name == "triton"
        return choice

    monkeypatch.setattr(backend, "choose", counted_choose)
    for op in backend.OPS:
        module = importlib.import_module(f"kernels.{op}")
        name = "group_norm_silu_triton" if op == "group_norm" else f"{op}_triton"
        monkeypatch.setattr(module, name, partial(_counted, run, op, getattr(module, name)))
    torch.backends.cudnn.allow_tf32 = False  # both sides of a comparison convolve in full float32
    yield run
    assert run == chosen


def _counted(run, op, kernel, *args, **settings):
    run[op] += 1
    return kernel(*args, **settings)


@pytest.fixture
def as_good_as_eager():
    """check(kernel, eager, truth, dtype): relative errors |out - truth| / |truth| of tensors; NaN never passes."""

    def check(kernel, eager, truth, dtype, what=""):
        for name, k, e, t in zip(("value", "gradient", "gradient", "gradient"), kernel, eager, truth, strict=False):
            assert k.shape == t.shape
            size = t.double().norm().clamp(min=1e-6)
            error = [((out.double() - t.double()).norm() / size).item() for out in (k, e)]
            assert error[0] <= error[1] + SLACK[dtype], f"{what} {name}: kernel {error[0]:.2e}, eager {error[1]:.2e}"

    return check
