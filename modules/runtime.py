"""Choice of device, dtypes and threads, each with its reason; and named random streams.

A random stream depends only on its name: `stream(seed, "image", 17)` gives the same numbers in every run and on every
machine, whatever was drawn before. No code of this project draws from torch's global generator; libraries that
initialize weights do, inside `seeded`.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import backend
from modules.config import Pipeline, Run
from modules.errors import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Image size up to which the last convolution of stride 2 sees a single pixel, in every backbone here. If the input is
# smaller than the stride, oneDNN leaves part of the gradient of 16-bit weights uninitialized (torch 2.11; see
# benchmarks/LOG.md).
ONE_PIXEL_UP_TO = 16
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "xformers",
    "bitsandbytes",
    "triton",
    "numpy",
    "pillow",
    "scikit-learn",
    "safetensors",
)


@dataclass(frozen=True)
class Choice:
    """A value chosen by the program, and the reason printed with it."""

    value: object
    reason: str


@dataclass(frozen=True)
class Runtime:
    """The device, number formats and threads that a run computes with."""

    device: Choice  # torch.device
    precision: Choice  # torch.dtype of the encoder's autocast; float32: no autocast
    pipeline_dtype: Choice  # torch.dtype of the diffusion pipeline
    threads: Choice  # CPU threads of torch


def resolve_runtime(run: Run, pipeline: Pipeline, trains_at: int | None = None) -> Runtime:
    """The runtime for the config sections `run` and `pipeline`, every choice with its reason.

    Also applies it to the process: thread count, TF32 switch, default kernels and, on a CPU, options of malloc.

    Args:
        trains_at: pixels per side of the images that an encoder is trained on; None if none is trained.

    Raises:
        ConfigError: run.device or run.kernels asks for what is not available here; on a CPU, run.precision is fp16, or
            bf16 with tiny images.
    """
    device = choose_device(run)
    on_gpu = device.value.type == "cuda"
    keep_freed_memory(device.value)
    if run.precision == "fp16" and not on_gpu:
        raise ConfigError("run.precision fp16 trains on a GPU only; use fp32 or bf16 on a CPU")
    if run.precision == "bf16" and not on_gpu and _is_tiny(trains_at):
        raise ConfigError(
            f"run.precision bf16 does not train on images of {trains_at} px on a CPU, where gradients of a convolution over "
            f"one pixel are wrong in 16 bits; use fp32 or auto, or a data.image_size above {ONE_PIXEL_UP_TO}"
        )
    if run.precision == "auto":
        precision = auto_precision(device.value, trains_at)
    else:
        precision = Choice(DTYPES[run.precision], f"run.precision{_slow(run.precision, device.value)}")
    pipeline_dtype = choose_pipeline_dtype(pipeline, device.value)
    if run.kernels == "triton" and (obstacle := backend.obstacle(device.value)):
        raise ConfigError(f"run.kernels is triton, but {obstacle}; set it to auto or torch")
    backend.set_default(run.kernels)
    torch.backends.cudnn.allow_tf32 = torch.float32 not in (precision.value, pipeline_dtype.value)  # fp32 is fp32
    if run.threads:
        torch.set_num_threads(run.threads)
    threads = Choice(
        torch.get_num_threads(), "run.threads" if run.threads else f"torch's choice, {os.cpu_count()} cores"
    )
    return Runtime(device, precision, pipeline_dtype, threads)


def choose_device(run: Run) -> Choice:
    """The device that `run.device` resolves to.

    Raises:
        ConfigError: run.device is cuda and there is no CUDA GPU.
    """
    gpu = torch.cuda.is_available()
    if run.device == "cuda" and not gpu:
        raise ConfigError(
            f"run.device is cuda, but torch {torch.__version__} sees no CUDA GPU here; install a driver that fits, "
            "or set run.device=cpu"
        )
    if run.device == "cpu" or not gpu:
        return Choice(torch.device("cpu"), "run.device is cpu" if run.device == "cpu" else "no CUDA GPU found")
    return Choice(torch.device("cuda"), torch.cuda.get_device_name())


def choose_pipeline_dtype(pipeline: Pipeline, device: torch.device) -> Choice:
    """The dtype that `pipeline.dtype` resolves to on a device."""
    if pipeline.dtype == "auto":
        return auto_pipeline_dtype(device)
    return Choice(DTYPES[pipeline.dtype], f"pipeline.dtype{_slow(pipeline.dtype, device)}")


def keep_freed_memory(device: torch.device) -> None:
    """Make this process's malloc keep the memory of freed CPU tensors for those of the next step.

    By default glibc returns a block above 32 MiB to the kernel when it is freed, and others once 64 MiB are free at the
    end of the heap. Whether that happens depends on what lies there: in three of six runs a training step returned 60
    to 70 MB and had the kernel zero as much again (see benchmarks/LOG.md). No effect on a GPU or without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # allocate every block on the heap
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes that may stay free at the end of the heap


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 instructions; on a CPU without, bf16 convolutions are ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 in tiles (Intel AMX) and the operating system lets this process do so.

    On a Xeon with AMX, matrix products of 1024 ran four to five times as fast in bf16 as in fp32; with the same CPU
    limited to its other bf16 instructions, a training step took as long as in fp32, or longer (see benchmarks/LOG.md).
    Respects the environment variables by which oneDNN is limited to an instruction set.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    heeds = limit in ("", "ALL", "DEFAULT") or "AMX" in limit
    return heeds and torch.cpu._init_amx() and has_bf16(torch.device("cpu"))


def auto_pipeline_dtype(device: torch.device) -> Choice:
    """The dtype of the diffusion pipeline under `pipeline.dtype=auto`."""
    return _auto_on_cpu() if device.type == "cpu" else Choice(torch.float16, "auto: fp16 on a GPU")


def auto_precision(device: torch.device, trains_at: int | None = None) -> Choice:
    """The encoder's dtype under `run.precision=auto`: 16 bits where the device is fast in them."""
    if device.type == "cpu":
        if has_amx() and _is_tiny(trains_at):
            return Choice(torch.float32, f"auto: fp32 on a CPU for images of at most {ONE_PIXEL_UP_TO} px")
        return _auto_on_cpu()
    if not has_bf16(device):
        return Choice(torch.float16, "auto: fp16 on a GPU that has no bf16")
    return Choice(torch.bfloat16, "auto: bf16 on a GPU")


def _auto_on_cpu() -> Choice:
    if has_amx():
        return Choice(torch.bfloat16, "auto: bf16 on a CPU with AMX")
    return Choice(torch.float32, "auto: fp32 on a CPU without AMX")


def _is_tiny(trains_at: int | None) -> bool:
    return trains_at is not None and trains_at <= ONE_PIXEL_UP_TO


def _slow(precision: str, device: torch.device) -> str:
    return "; slow, for this device has no bf16" if precision == "bf16" and not has_bf16(device) else ""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without torch's prefix, such as float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def stream(seed: int, name: str, *identity: int | str) -> torch.Generator:
    """A CPU generator whose seed depends on (seed, name, identity) alone.

    Numbers are drawn on the CPU and then copied, so that runs on a CPU and on a GPU use the same ones.
    """
    generator = torch.Generator()
    generator.manual_seed(stream_seed(seed, name, *identity))
    return generator


def stream_seed(seed: int, name: str, *identity: int | str) -> int:
    """The 63-bit seed of a named stream: a blake2b hash of the parts, joined by a separator."""
    text = "\x1f".join(str(part) for part in (seed, name, *identity))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int, name: str, *identity: int | str) -> Iterator[None]:
    """Context in which torch's global CPU generator starts a named stream; its state is restored afterwards.

    For libraries that initialize weights and accept no generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name, *identity))
        yield


def environment() -> dict:
    """What a result depends on besides the config: versions, hardware, commit."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, with "+" if tracked files were changed; "" outside a repository.

    The environment variable SOURCE_COMMIT overrides it if set, for a copy without a repository, as in a container.
    """
    if told := os.environ.get("SOURCE_COMMIT"):
        return told
    try:
        changed = "+" if _git("status", "--porcelain", "-uno") else ""
        return _git("rev-parse", "--short=10", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = said.get("model name", platform.machine())  # on virtual machines often only the vendor, hence the family
    return f"{name} family {said['cpu family']}" if "cpu family" in said else name
