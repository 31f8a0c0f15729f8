"""Device, dtype and threads, each a value with its reason; named random streams.

Randomness is a pure function of identity: `stream(seed, "image", 17)` is the same generator in every run, on every
machine, whatever was drawn before. Nothing in this project draws from torch's global generator; libraries that
initialize weights do, inside `seeded`.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import backend
from modules.errors import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Pixels a side of which the last convolution of stride 2 sees one, in every backbone here. Of an input smaller than the
# stride oneDNN's gradient of 16-bit weights holds memory that nobody has written (torch 2.11; see benchmarks/LOG.md).
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
    """A value the program chose and the reason it prints for it."""

    value: object
    reason: str


@dataclass(frozen=True)
class Runtime:
    """Where and in which number formats a run computes."""

    device: Choice  # torch.device
    precision: Choice  # torch.dtype of the encoder's autocast; float32: no autocast
    pipeline_dtype: Choice  # torch.dtype of the diffusion pipeline
    threads: Choice  # CPU threads of torch


def resolve_runtime(run, pipeline, trains_at: int | None = None) -> Runtime:
    """The runtime of config sections `run` and `pipeline`, every choice with its reason.

    trains_at: pixels a side of the images that an encoder is trained on; None where none is.

    Raises:
        ConfigError: a GPU is demanded and there is none; on a CPU, fp16 autocast or, for tiny images, bf16 is asked for.
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


def choose_device(run) -> Choice:
    """Where `run.device` comes to.

    Raises:
        ConfigError: a GPU is demanded and there is none.
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


def choose_pipeline_dtype(pipeline, device: torch.device) -> Choice:
    """What `pipeline.dtype` comes to on a device."""
    if pipeline.dtype == "auto":
        return auto_pipeline_dtype(device)
    return Choice(DTYPES[pipeline.dtype], f"pipeline.dtype{_slow(pipeline.dtype, device)}")


def keep_freed_memory(device: torch.device) -> None:
    """Let this process's malloc keep the memory that a CPU's tensors free, for those of the next step.

    By default a tensor above 32 MiB is given back when it is freed, and others as soon as 64 MiB are free at the end of
    the heap. Whether they are hangs on what lies there: in three of six runs a training step gave back 60 to 70 MB and had
    the kernel clear as much again (see benchmarks/LOG.md). Without effect on a GPU, or where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block lies outside the heap
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes that may lie free at its end


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; a processor without them convolves in it ten times as slowly as in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_amx() -> bool:
    """Whether the processor multiplies bf16 in tiles (Intel's AMX) and the kernel lets this process do so.

    On a Xeon with it products of 1024 ran four to five times as fast in bf16 as in fp32; on the same one held to its
    other bf16 instructions a training step took as long as in fp32, or longer (see benchmarks/LOG.md). oneDNN's variable
    of the environment that holds it to fewer instructions is heeded.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    heeds = limit in ("", "ALL", "DEFAULT") or "AMX" in limit
    return heeds and torch.cpu._init_amx() and has_bf16(torch.device("cpu"))


def auto_pipeline_dtype(device: torch.device) -> Choice:
    """What the diffusion pipeline computes in where nobody says."""
    return _auto_on_cpu() if device.type == "cpu" else Choice(torch.float16, "auto: fp16 on a GPU")


def auto_precision(device: torch.device, trains_at: int | None = None) -> Choice:
    """What the encoder computes in where nobody says: 16 bits where the device is fast in them."""
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
    """float32, bfloat16: the name of a number format without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def stream(seed: int, name: str, *identity: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, name, identity) and on nothing else.

    Draws are made on the CPU and copied, so that a CPU and a GPU see the same numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(stream_seed(seed, name, *identity))
    return generator


def stream_seed(seed: int, name: str, *identity: int | str) -> int:
    """The 63-bit seed of a named stream: blake2b over the parts, joined unambiguously."""
    text = "\x1f".join(str(part) for part in (seed, name, *identity))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int, name: str, *identity: int | str):
    """Inside, torch's global CPU generator stands at the beginning of a named stream; afterwards it is as it was.

    For weights that a library initializes, which takes no generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name, *identity))
        yield


def environment() -> dict:
    """What a result depends on beside the config: versions, device, commit."""
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
    """The commit of this checkout, with "+" if it was changed; "" outside a repository.

    The environment variable SOURCE_COMMIT, where it is set, says it instead: for a copy of the files, as in a container.
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
    name = said.get("model name", platform.machine())  # virtual machines often say no more than the maker
    return f"{name} family {said['cpu family']}" if "cpu family" in said else name
