"""The techniques that benchmarks/generator.py compares: what each is, and the inputs they share.

A technique is a call that makes as many images as asked, in whole batches. Whatever one changes (attention, memory
layout, compilation) it changes on a UNet and a VAE of its own.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmarks import harness, inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
from modules.config import Generation
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.presets import plan

DA_FUSION, DIFFUSERS = "DA-Fusion's loop", "diffusers"
XFORMERS, COMPILED = "diffusers, xformers", "diffusers, compiled + channels_last"
SLOTS, SLOTS_TUNED, SLOTS_COMPILED = "slots", "slots, attention tuned", "slots, compiled"
SLOTS_KERNELS, SLOTS_FAST = "slots, compiled, Triton kernels", "slots, compiled, preset fast"
BATCHES = {"cuda": (8, 16, 32, 64), "cpu": (4, 8, 16, 32)}
BATCH_TOLERANCE = 0.02  # a smaller batch that costs at most this much more an image is as good, and blocks are shorter
QUALITY_IMAGES = 4


@dataclass
class Candidate:
    """One technique."""

    name: str
    call: Callable[[int], object]  # makes that many images, a multiple of the batch
    batch: int  # images in one UNet call
    peer: bool
    switches: str
    quality: str
    setting: Setting | None = None  # where it is not that of all others
    at_most: int = 1 << 30  # images a call makes at most: enough for a rate where one image at a time is made
    ready_s: float = 0.0  # compilation, where there is any, and the first batch
    batch_s: float = 0.0  # the second batch
    peak_mib: float | None = None


class Bench:
    """The inputs of all techniques, and the techniques."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.pipeline = inputs.load(options.pipeline, self.device, options.resolution)
        self.setting = Setting(images=options.images)
        self.work = inputs.count_work(self.pipeline)
        self.pixels_NHWC = inputs.smooth_images(options.images, self.pipeline.resolution)
        self.texts = inputs.prompts(options.images)
        self.moments = self.pipeline.encode_moments(self.pixels_NHWC.to(self.device))
        self.batch = options.batch or best_batch(self.pipeline, self.setting, options.images)
        self.skipped: dict[str, str] = {}
        self.engines: dict[str, SlotEngine] = {}
        self._reference = None
        self._folder = tempfile.TemporaryDirectory(prefix="da-fusion-")

    def makers(self) -> dict[str, Callable[[], Candidate]]:
        """One a technique, in the order in which a short budget should reach them.

        The engine as it is comes first: blocks are compared with themselves on it, and its images are the reference's.
        """
        return {
            SLOTS: self.slots,
            DIFFUSERS: self.diffusers,
            DA_FUSION: self.da_fusion,
            XFORMERS: self.xformers,
            COMPILED: self.diffusers_compiled,
            SLOTS_COMPILED: self.slots_compiled,
            SLOTS_FAST: self.slots_fast,
            SLOTS_KERNELS: self.slots_kernels,
            SLOTS_TUNED: self.slots_tuned,
        }

    def slots(self) -> Candidate:
        """The engine, no compiler, torch's own choice of attention."""
        return self._engine(SLOTS)

    def slots_tuned(self) -> Candidate:
        """The engine with the attention backend that is fastest at each of the UNet's shapes."""
        if self.device.type != "cuda":
            raise peers.Unavailable(SLOTS_TUNED, "a CPU has one attention backend")
        return self._engine(SLOTS_TUNED, tune_attention=True)

    def slots_compiled(self) -> Candidate:
        """The engine as it runs with pipeline.compile on: tuned attention, compiled, on a GPU captured as graphs."""
        self._need_compiler(SLOTS_COMPILED)
        on_gpu = self.device.type == "cuda"
        return self._engine(SLOTS_COMPILED, compile_setting="on", tune_attention=on_gpu)

    def slots_fast(self) -> Candidate:
        """The compiled engine under preset fast: fewer steps of another solver; benchmarks/quality.py judges its images."""
        self._need_compiler(SLOTS_FAST)
        exact, on_gpu = self.setting, self.device.type == "cuda"
        asked = Generation(
            num_inference_steps=exact.num_inference_steps, guidance_scale=exact.guidance_scale, solver=exact.solver
        )
        fast = plan("fast", asked, self.pipeline)
        setting = dataclasses.replace(
            exact, solver=fast.solver, num_inference_steps=fast.num_inference_steps, guided_steps=fast.guided_steps
        )
        return self._engine(SLOTS_FAST, setting, compile_setting="on", tune_attention=on_gpu)

    def slots_kernels(self) -> Candidate:
        """The compiled engine with run.kernels=triton: what they gain over the compiler's own fusions."""
        self._need_compiler(SLOTS_KERNELS)
        if self.device.type != "cuda":
            raise peers.Unavailable(SLOTS_KERNELS, "Triton kernels need a CUDA GPU")
        return self._engine(SLOTS_KERNELS, compile_setting="on", tune_attention=True, kernels="triton")

    def diffusers(self) -> Candidate:
        """diffusers at its best batch, attention as it comes."""
        return self._batched(DIFFUSERS, peers.image_to_image(self.pipeline, self.setting), "as it comes")

    def xformers(self) -> Candidate:
        """The same with xformers' attention."""
        own = inputs.own_copy(self.pipeline)
        peer = peers.with_xformers(peers.image_to_image(own, self.setting), XFORMERS)
        return self._batched(XFORMERS, peer, "enable_xformers_memory_efficient_attention")

    def diffusers_compiled(self) -> Candidate:
        """The same compiled as diffusers' guide says."""
        self._need_compiler(COMPILED)
        peer = peers.compiled(peers.image_to_image(inputs.own_copy(self.pipeline), self.setting))
        return self._batched(COMPILED, peer, "UNet and decoder compiled, channels_last")

    def da_fusion(self) -> Candidate:
        """The loop as published; it makes one image at a time, so fewer images measure the same rate."""
        count = min(self.options.da_fusion_images, self.setting.images)
        sources = [Image.fromarray(row.numpy()) for row in self.pixels_NHWC[:count]]
        call = peers.da_fusion(self.pipeline, sources, self.texts[:count], self.setting, Path(self._folder.name))
        switches = "one PIL image a call, PNG written; nothing cached"
        return Candidate(DA_FUSION, call, 1, True, switches, "draws its own noise", at_most=count)

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _engine(self, name: str, setting: Setting | None = None, **how) -> Candidate:
        own = inputs.own_copy(self.pipeline)
        engine = SlotEngine(own, setting or self.setting, self.moments, self.texts, slots=self.batch, **how)
        made, z0, eps = first_images(engine)
        switches = (
            f"{engine.compiled.value}; attention {engine.attention}; kernels {engine.kernels}; moments, prompts and their keys and values cached; "
            f"decoding {engine.decode_batch} at once"
        )
        if setting is not None:
            quality = f"another sampler, {setting.solver} in {setting.num_inference_steps}: see benchmarks.quality"
            return Candidate(name, engine.make, self.batch, False, switches, quality, setting)
        if self._reference is None:
            peer = peers.image_to_image(self.pipeline, self.setting)
            first = slice(0, min(QUALITY_IMAGES, self.batch))
            reference = peers.from_noise(peer, z0[first], eps[first], self.texts[first], self.setting)
            self._reference = reference, z0, eps
        self.engines[name] = engine
        return Candidate(name, engine.make, self.batch, False, switches, self._psnr(made))

    def _batched(self, name: str, peer, switches: str) -> Candidate:
        images = self.pixels_NHWC.to(self.device).permute(0, 3, 1, 2).to(self.pipeline.dtype).div(255)
        call = peers.batched(peer, images, self.texts, self.batch, self.setting)
        quality = "not compared: the engine made no images"
        if self._reference is not None:
            _, z0, eps = self._reference
            texts = [self.texts[i] for i in range(self.batch)]
            quality = self._psnr(peers.from_noise(peer, z0, eps, texts, self.setting))  # in the shape it is timed in
        return Candidate(name, call, self.batch, True, f"{switches}; tensors in and out", quality)

    def _psnr(self, made: torch.Tensor) -> str:
        reference, _, _ = self._reference
        return f"PSNR {psnr_db(made[: len(reference)], reference):.1f} dB to diffusers"

    def _need_compiler(self, technique: str) -> None:
        if not self.options.compile:
            raise peers.Unavailable(technique, "--no-compile")


@torch.no_grad()
def best_batch(pipeline: StableDiffusion, setting: Setting, images: int) -> int:
    """The batch at which diffusers' pipeline makes most images a second, by the time of its parts.

    Timed are one guided UNet call, one encoding and one decoding at each batch; an image costs
    (calls x UNet + encode + decode) / batch. A batch that does not fit into memory is out; of those within
    BATCH_TOLERANCE of the best the smallest is taken.
    """
    device, dtype, size, side = pipeline.device, pipeline.dtype, pipeline.latent_size, pipeline.resolution
    calls, guided = setting.calls(pipeline.scheduler)
    costs = {}
    for batch in [b for b in BATCHES[device.type] if images % b == 0] or [images]:
        rows = batch * (2 if guided else 1)
        z = torch.randn(rows, 4, size, size, device=device, dtype=dtype)
        context = torch.randn(rows, pipeline.num_tokens, pipeline.text_width, device=device, dtype=dtype)
        x = torch.rand(batch, 3, side, side, device=device, dtype=dtype)
        t = torch.tensor(400, device=device)
        parts = {
            "unet": lambda z=z, t=t, context=context: pipeline.unet(z, t, context),
            "encode": lambda x=x: pipeline.vae.encode(x),
            "decode": lambda z=z, batch=batch: pipeline.vae.decode(z[:batch]),
        }
        found = harness.compare(parts, device, blocks=3, block_seconds=0.0)
        if found.failures:
            print(f"batch {batch}: {found.failures}", flush=True)
            continue
        unet, encode, decode = (found.timings[name].median_ms for name in parts)
        costs[batch] = (calls * unet + encode + decode) / batch
    print("diffusers, ms an image by batch:", {batch: round(cost, 2) for batch, cost in costs.items()}, flush=True)
    return min(batch for batch, cost in costs.items() if cost <= (1 + BATCH_TOLERANCE) * min(costs.values()))
