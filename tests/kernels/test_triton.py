"""The Triton code itself on a machine without a GPU: right in the interpreter, and accepted by the compiler for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend

ROOT = Path(__file__).resolve().parents[2]
SHARED_OF_HOPPER = 232448  # bytes a program may have on sm_90; a launch that wants more raises
needs_triton = pytest.mark.skipif(backend.triton is None, reason="torch's wheel for this platform brings no Triton")


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the parity tests run compiled, in this process")
def test_kernels_agree_with_their_definitions_in_the_interpreter():
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "tests/kernels/parity"]
    done = run(arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_hopper_without_spilling(tmp_path):
    """The interpreter accepts what the compiler refuses (types, block shapes), so both have to pass."""
    done = run(["-m", "tests.kernels.compile_for_hopper"], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 37
    assert sum("kernels.supcon" in line for line in lines) == 20, "four kernels, five cases of width, dtype and rules"
    assert all(line.endswith("spilled 0") for line in lines), done.stdout
    shared = [int(line.split(" shared ")[1].split()[0]) for line in lines]
    assert max(shared) <= SHARED_OF_HOPPER, done.stdout
