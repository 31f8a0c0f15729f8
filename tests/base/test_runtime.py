"""Choices with their reasons, and randomness that is a function of what is drawn for."""

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules import config, runtime
from modules.errors import ConfigError
from modules.runtime import ONE_PIXEL_UP_TO, Choice, commit, environment, resolve_runtime, stream, stream_seed

ROOT = Path(__file__).parents[2]


def resolved(dtype="auto", **run):
    return resolve_runtime(
        dataclasses.replace(config.Run(), **run), dataclasses.replace(config.Pipeline(), dtype=dtype)
    )


@pytest.mark.parametrize(
    ("tiles", "dtype", "reason"),
    [
        (True, torch.bfloat16, "auto: bf16 on a CPU with AMX"),
        (False, torch.float32, "auto: fp32 on a CPU without AMX"),
    ],
)
def test_every_choice_has_a_reason(tiles, dtype, reason, monkeypatch):
    monkeypatch.setattr(runtime, "has_amx", lambda: tiles)
    found = resolved(device="cpu")
    assert found.device.value == torch.device("cpu") and found.device.reason == "run.device is cpu"
    assert found.precision == found.pipeline_dtype == Choice(dtype, reason)
    assert all(choice.reason for choice in vars(found).values())


def test_tiles_count_only_where_they_may_be_used_and_the_library_uses_them(monkeypatch):
    for permitted, bf16 in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda permitted=permitted: permitted)
        monkeypatch.setattr(runtime, "has_bf16", lambda device, bf16=bf16: bf16)
        assert runtime.has_amx() is (permitted and bf16)


@pytest.mark.parametrize(
    ("limit", "tiles"), [("AVX512_CORE_BF16", False), ("avx512_core_amx", True), ("ALL", True), ("", True)]
)
def test_a_processor_held_to_fewer_instructions_has_no_tiles(limit, tiles, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert runtime.has_amx() is tiles


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved().device.reason == "no CUDA GPU found"
    with pytest.raises(ConfigError, match="run.device is cuda, but .* or set run.device=cpu"):
        resolved(device="cuda")


def test_a_gpu_that_is_there(monkeypatch):
    monkeypatch.setattr(runtime, "has_amx", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    found = resolved()
    assert (found.device.value.type, found.device.reason) == ("cuda", "a GPU")
    assert found.precision == Choice(torch.bfloat16, "auto: bf16 on a GPU")
    assert found.pipeline_dtype == Choice(torch.float16, "auto: fp16 on a GPU")
    assert torch.backends.cudnn.allow_tf32, "16 bits: nothing asks for fp32"
    assert resolved(precision="fp32").precision.value == torch.float32
    assert not torch.backends.cudnn.allow_tf32, "fp32 that was asked for is not a product of 10 bits"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolved().precision == Choice(torch.float16, "auto: fp16 on a GPU that has no bf16")
    assert resolved(device="cpu").device.value.type == "cpu"


def test_asked_for_formats():
    assert resolved(device="cpu", precision="bf16", dtype="bf16").precision.value == torch.bfloat16
    with pytest.raises(ConfigError, match="run.kernels is triton, but .*; set it to auto or torch"):
        resolved(device="cpu", kernels="triton")
    with pytest.raises(ConfigError, match="fp16 trains on a GPU only"):
        resolved(device="cpu", precision="fp16")


def test_tiny_images_train_in_fp32_on_a_cpu(monkeypatch):
    """Gradients of 16-bit weights are wrong where a convolution sees one pixel (tests/learning/test_encoder.py)."""
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    run, pipeline = config.Run(device="cpu"), config.Pipeline()
    found = resolve_runtime(run, pipeline, ONE_PIXEL_UP_TO)
    assert found.precision == Choice(torch.float32, "auto: fp32 on a CPU for images of at most 16 px")
    assert (
        found.pipeline_dtype.value
        == resolve_runtime(run, pipeline, ONE_PIXEL_UP_TO + 1).precision.value
        == torch.bfloat16
    )
    asked = dataclasses.replace(run, precision="bf16")
    with pytest.raises(ConfigError, match="does not train on images of 16 px on a CPU, .* a data.image_size above 16"):
        resolve_runtime(asked, pipeline, 16)
    assert resolve_runtime(asked, pipeline).precision.value == torch.bfloat16, "nothing is trained"


def test_threads():
    before = torch.get_num_threads()
    try:
        assert resolved(device="cpu", threads=1).threads.value == torch.get_num_threads() == 1
        assert resolved(device="cpu").threads.value == 1
    finally:
        torch.set_num_threads(before)


def test_a_stream_depends_on_its_name_alone():
    first = torch.rand(4, generator=stream(3, "image", 17))
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(4, generator=stream(3, "image", 17)), first)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    others = [(4, "image", 17), (3, "images", 17), (3, "image", 18), (3, "image", 17, 0), (3, "image")]
    assert all(not torch.equal(torch.rand(4, generator=stream(*other)), first) for other in others)


def test_parts_of_a_name_do_not_run_together():
    seeds = {stream_seed(1, "a", 23), stream_seed(1, "a2", 3), stream_seed(1, "a", 2, 3), stream_seed(12, "a", 3)}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_is_the_same_on_every_machine():
    """Runs of years ago can be repeated only if this number never changes."""
    assert stream_seed(0, "image", 17) == 2_022_613_793_433_254_464


def test_the_environment_says_what_results_depend_on():
    found = environment()
    assert {"python", "platform", "cpu", "cores", "gpu", "cuda", "packages", "commit"} <= found.keys()
    assert torch.__version__.startswith(found["packages"]["torch"]) and found["packages"]["numpy"]
    assert found["commit"] == commit()


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("SOURCE_COMMIT", "0123456789")
    assert commit() == "0123456789"


@pytest.mark.parametrize(("available", "said"), [(True, ""), (False, "; slow, for this device has no bf16")])
def test_a_choice_that_the_device_is_slow_at_says_so(available, said, monkeypatch):
    monkeypatch.setattr(runtime, "has_bf16", lambda device: available)
    found = resolved(device="cpu", precision="bf16", dtype="bf16")
    assert (found.precision.reason, found.pipeline_dtype.reason) == (f"run.precision{said}", f"pipeline.dtype{said}")


FREEING = """
import resource, sys, torch
from modules import config
from modules.runtime import resolve_runtime

if sys.argv[1] == "kept":
    resolve_runtime(config.Run(device="cpu"), config.Pipeline())
for megabytes in (20, 48):
    faults = []
    for _ in range(10):
        held = [torch.ones(megabytes * 2**18) for _ in range(8)]
        del held
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(faults[-1] - faults[-4])  # in the last three rounds, when the heap has found its form
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_a_step_frees_is_there_for_the_next():
    def late_faults(mode):
        told = subprocess.run(
            [sys.executable, "-c", FREEING, mode], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return [int(line) for line in told.stdout.split()]

    _, given_back = late_faults("given back")  # whether the smaller are given back is luck
    assert given_back > 500, "1.1 GiB, in pages of 2 MiB at most: without this the test could not fail"
    assert all(kept < 50 for kept in late_faults("kept"))
