"""The tick as one launch: torch.compile of its UNet, then a graph of the whole tick that is replayed.

A tick of many small kernels is bound by the host that launches them. Its shape never changes and its buffers never
move, so it can be captured once, while all slots are idle (idle slots stay as they are, so warming up changes nothing),
and replayed for every mixture of images. The same holds for the decoder and its fixed batch.

Both graphs work in one pool of memory, which therefore is as large as the larger of them needs and not as both: they are
replayed one after the other, and what the decoder returns is read before the next tick overwrites it.

Which way is used, and why, is returned for the run card; nothing falls back silently.
"""

import gc
from collections.abc import Callable

import torch

from modules.diffusion.attention import install, unfuse
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.slots import Slots
from modules.errors import ConfigError, first_line
from modules.memory import ran_out
from modules.runtime import Choice
from modules.termination import termination

WARM_UP = 3  # runs before a capture, for lazy initialization and autotuning


def lay_out(pipeline: StableDiffusion, compile_setting: str) -> None:
    """Move the UNet, and on a GPU the VAE too, to channels_last where an engine of theirs will be compiled.

    Before anything is timed or meets memory's bound, that it is done in the layout that will run.
    """
    on_gpu = pipeline.device.type == "cuda"
    if _stays_eager(compile_setting, on_gpu):
        return
    for model in (pipeline.unet, pipeline.vae)[: 1 + on_gpu]:
        model.to(memory_format=torch.channels_last)


def _stays_eager(compile_setting: str, on_gpu: bool) -> bool:
    return compile_setting == "off" or (compile_setting == "auto" and not on_gpu)


def accelerate(slots: Slots, compile_setting: str, say: Callable[[str], None] = lambda text: None) -> Choice:
    """Compile and capture an engine's tick and decoder as `pipeline.compile` says; returns what was done and why.

    The UNet also moves to channels_last and, on a GPU, the VAE too, and self-attention computes its three projections as
    one: these pay only when compiled. To be called on a new engine, before a checkpoint is loaded into it.

    Args:
        compile_setting: auto | off | on. auto is on for a GPU; on a CPU `on` compiles (no graph).
        say: is told before what takes long begins.

    Raises:
        ValueError: slots are in flight, which a warm-up would advance.
        ConfigError: `on`, and compiling fails here; under auto the engine then stays eager and says why.
        torch.OutOfMemoryError: it does not fit beside what else the device holds; the engine is eager again, in channels_last.
    """
    on_gpu = slots.pipeline.device.type == "cuda"
    if _stays_eager(compile_setting, on_gpu):
        why = "pipeline.compile is off" if compile_setting == "off" else "auto: compiling pays on a GPU only"
        return Choice("eager", why)
    if slots.busy or slots.ready:
        raise ValueError(f"slots has {slots.busy} images in flight; expected an engine whose slots are all idle")
    say(
        f"compiling the UNet for {len(slots.occupants)} slots{' and the decoder' if on_gpu else ''}: a minute or two, "
        "less where the compiler finds them in its cache (pipeline.compile=off leaves it out)"
    )
    tick = slots.in_flight
    eager = tick.unet, tick.step, slots.decode
    try:
        return _compiled(slots, on_gpu)
    except (RuntimeError, OSError, ImportError) as error:  # no C compiler, an old GPU, a capture that is refused
        termination.obey()  # the compiler hands on a signal that met it as a failure of its own
        tick.unet, tick.step, slots.decode = eager
        slots.pool_bytes = 0
        unfuse(slots.pipeline.unet)
        if ran_out(error):
            raise
        if compile_setting == "on":
            raise ConfigError(
                f"pipeline.compile is on, but that fails here ({first_line(error)}); set it to auto or off"
            ) from error
        return Choice("eager", f"auto: compiling fails here ({first_line(error)})")


def _compiled(slots: Slots, on_gpu: bool) -> Choice:
    """Replace an engine's tick, and on a GPU its decoder, by compiled forms; each has run once."""
    tick = slots.in_flight
    if on_gpu:
        install(slots.pipeline.unet, fuse=True)
    lay_out(slots.pipeline, "on")
    tick.unet = torch.compile(slots.pipeline.unet, dynamic=False)
    if not on_gpu:  # the decoder stays as it is: compiled it was a fifth slower (benchmarks/LOG.md)
        tick.step()
        return Choice("compiled", "pipeline.compile is on; a CPU has no graphs")
    tick.step = graph(tick.step)
    latents = torch.zeros_like(slots.ready_Q4hw[: slots.decode_batch])
    slots.decode = graph(torch.compile(slots.decode, dynamic=False), latents, pool=tick.step.pool)
    slots.pool_bytes = tick.step.pool_bytes + slots.decode.pool_bytes
    return Choice("compiled, captured", "one launch a tick and one a decode; the shapes never change")


class Replay:
    """A captured function of tensors: arguments are copied into `inputs`, what it returns is overwritten by every replay
    that shares its pool."""

    def __init__(self, captured: torch.cuda.CUDAGraph, inputs: tuple[torch.Tensor, ...], outputs, pool_bytes: int):
        self.captured, self.inputs, self.outputs = captured, inputs, outputs
        self.pool = captured.pool()
        self.pool_bytes = pool_bytes  # that the capture took from the device, beside what its outputs hold

    def __call__(self, *values: torch.Tensor):
        for static, value in zip(self.inputs, values, strict=True):
            static.copy_(value)
        self.captured.replay()
        return self.outputs


def graph(function: Callable, *inputs: torch.Tensor, pool=None) -> Replay:
    """A function of tensors on a CUDA device that replays a capture of `function`, in a pool of its own or that of another.

    Graphs that share a pool may not be replayed at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    torch.cuda.empty_cache()  # a capture does both first: what it takes is measured from here
    before = _beside_tensors()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=pool), torch.no_grad():
        outputs = function(*inputs)
    return Replay(captured, inputs, outputs, _beside_tensors() - before)


def _beside_tensors() -> int:
    """Bytes that torch holds of the device without a tensor in them."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
