"""Makes a tick one launch: compiles its UNet with torch.compile, then captures the whole tick as a CUDA graph.

A tick consists of many small kernels and is bound by the host that launches them. Its shape never changes and its
buffers never move, so it can be captured once and replayed for every mixture of images. It is captured while all slots
are idle: idle slots do not change, so warming up has no effect on them. The decoder with its fixed batch is captured
likewise.

Both graphs share one memory pool, which is therefore only as large as the larger of the two needs. This is safe because
they are replayed one after the other, and the decoder's output is read before the next tick overwrites it.

What was done, and why, is returned for the run card; nothing falls back silently.
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
    """Move the UNet, and on a GPU also the VAE, to channels_last if they will be compiled.

    To be called before anything is timed or fitted into memory, so that this happens in the final layout.
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

    The UNet also moves to channels_last. On a GPU so does the VAE, and self-attention computes its three projections as
    one. These pay only when compiled. To be called on a new engine, before a checkpoint is loaded into it.

    Args:
        compile_setting: auto | off | on. auto means on for a GPU and off for a CPU; on a CPU `on` compiles the UNet
            and captures no graph.
        say: called with a message before the slow part begins.

    Raises:
        ValueError: slots are in flight; a warm-up would advance them.
        ConfigError: `on`, but compiling fails here. Under auto the engine stays eager and says why.
        torch.OutOfMemoryError: the device has too little memory left; the engine is eager again, in channels_last.
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
        termination.obey()  # if a signal interrupts the compiler, it raises it as an error of its own
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
    """Compile an engine's UNet, on a GPU capture its tick and decoder as graphs too, and run each once."""
    tick = slots.in_flight
    if on_gpu:
        install(slots.pipeline.unet, fuse=True)
    lay_out(slots.pipeline, "on")
    tick.unet = torch.compile(slots.pipeline.unet, dynamic=False)
    if not on_gpu:  # the decoder stays eager: on a CPU it was a fifth slower when compiled (benchmarks/LOG.md)
        tick.step()
        return Choice("compiled", "pipeline.compile is on; a CPU has no graphs")
    tick.step = graph(tick.step)
    latents = torch.zeros_like(slots.ready_Q4hw[: slots.decode_batch])
    slots.decode = graph(torch.compile(slots.decode, dynamic=False), latents, pool=tick.step.pool)
    slots.pool_bytes = tick.step.pool_bytes + slots.decode.pool_bytes
    return Choice("compiled, captured", "one launch a tick and one a decode; the shapes never change")


class Replay:
    """A captured function of tensors: copies arguments into `inputs`; any replay in its pool overwrites the outputs."""

    def __init__(
        self, captured: torch.cuda.CUDAGraph, inputs: tuple[torch.Tensor, ...], outputs: object, pool_bytes: int
    ):
        self.captured, self.inputs, self.outputs = captured, inputs, outputs
        self.pool = captured.pool()
        self.pool_bytes = pool_bytes  # device memory that the capture reserved, not counting its outputs

    def __call__(self, *values: torch.Tensor):
        for static, value in zip(self.inputs, values, strict=True):
            static.copy_(value)
        self.captured.replay()
        return self.outputs


def graph(function: Callable, *inputs: torch.Tensor, pool=None) -> Replay:
    """Capture `function` of tensors on a CUDA device, in a new memory pool or in that of another graph.

    Graphs that share a pool may not be replayed at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    torch.cuda.empty_cache()  # a capture begins with both; done here, they do not distort the measurement
    before = _beside_tensors()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=pool), torch.no_grad():
        outputs = function(*inputs)
    return Replay(captured, inputs, outputs, _beside_tensors() - before)


def _beside_tensors() -> int:
    """Bytes of device memory that torch has reserved but not allocated to tensors."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
