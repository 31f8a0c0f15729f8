"""The techniques that benchmarks/generator.py compares, and the inputs they share.

A technique is a call that makes a given number of images, in whole batches. Whatever it changes (attention, memory
layout, compilation), it changes on its own copies of UNet and VAE.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmarks import batches, harness, inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
from modules.config import Generation
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.presets import plan
from modules.runtime import DTYPES, auto_pipeline_dtype

DA_FUSION, DIFFUSERS = "DA-Fusion's loop", "diffusers"
XFORMERS, COMPILED = "diffusers, xformers", "diffusers, compiled + channels_last"
SLOTS, SLOTS_TUNED, SLOTS_COMPILED = "slots", "slots, attention tuned", "slots, compiled"
SLOTS_KERNELS, SLOTS_FAST = "slots, compiled, Triton kernels", "slots, compiled, preset fast"
TECHNIQUES = (  # in the order in which a short budget should reach them
    SLOTS, DIFFUSERS, DA_FUSION, XFORMERS, SLOTS_COMPILED, COMPILED, SLOTS_FAST, SLOTS_KERNELS, SLOTS_TUNED,
)  # fmt: skip
QUALITY_IMAGES = 4
BLOCKS_SHARE = 0.33  # of the budget, reserved for the alternating blocks however long preparing techniques takes


@dataclass
class Candidate:
    """One technique."""

    name: str
    call: Callable[[int], object]  # makes that many images, a multiple of the batch
    batch: int  # images in one UNet call
    peer: bool
    switches: str
    quality: str
    setting: Setting | None = None  # if it differs from that of the others
    at_most: int = 1 << 30  # images per call at most; a few give a rate if images are made one at a time
    ready_s: float = 0.0  # seconds for compilation, if any, and the first batch
    batch_s: float = 0.0  # seconds for as many images as the batch common to all
    peak_mib: float | None = None
    pool_bytes: int = 0  # of the graphs it replays, part of peak_mib


class Bench:
    """The inputs of all techniques, and the techniques."""

    def __init__(self, options: argparse.Namespace, budget: harness.Budget):
        self.budget = budget
        self.options, self.device = options, torch.device(options.device)
        dtype = DTYPES.get(options.dtype) or auto_pipeline_dtype(self.device).value
        self.pipeline = inputs.load(options.pipeline, self.device, options.resolution, dtype)
        self.setting = Setting(images=options.images)
        self.work = inputs.count_work(self.pipeline)
        self.pixels_NHWC = inputs.smooth_images(options.images, self.pipeline.resolution)
        self.texts = inputs.prompts(options.images)
        self.moments = self.pipeline.encode_moments(self.pixels_NHWC.to(self.device))
        self.batch, self.tried = self._best_batch(self.pipeline, DIFFUSERS)
        self.rows, self.rows_tried = self._best_slots()
        self.skipped: dict[str, str] = {}
        self.engines: dict[str, SlotEngine] = {}
        self.how: dict[str, dict] = {}  # settings of an engine, to build it again for other rows
        self.found: dict[str, str] = json.loads(options.found)  # attention and upsampling, by shape, found once
        self.too_late: set[tuple[str, int]] = set()  # (technique, batch) that there was no time to compile ahead
        self._reference = None
        self._folder = tempfile.TemporaryDirectory(prefix="da-fusion-")

    def makers(self) -> dict[str, Callable[[], Candidate]]:
        """One maker per requested technique, in the order of TECHNIQUES.

        The engine as it is comes first: its blocks give the spread of equal code, and its images are the reference's.
        """
        known = {
            SLOTS: self.slots,
            DIFFUSERS: self.diffusers,
            DA_FUSION: self.da_fusion,
            XFORMERS: self.xformers,
            SLOTS_COMPILED: self.slots_compiled,
            COMPILED: self.diffusers_compiled,
            SLOTS_FAST: self.slots_fast,
            SLOTS_KERNELS: self.slots_kernels,
            SLOTS_TUNED: self.slots_tuned,
        }
        return {name: known[name] for name in TECHNIQUES if name in (self.options.only or TECHNIQUES)}

    def slots(self) -> Candidate:
        """The engine, uncompiled, with torch's own choice of attention."""
        return self._engine(SLOTS)

    def slots_tuned(self) -> Candidate:
        """The engine with the attention backend that is fastest at each of the UNet's shapes."""
        if self.device.type != "cuda":
            raise peers.Unavailable(SLOTS_TUNED, "on a CPU the shape decides, nothing is timed")
        return self._engine(SLOTS_TUNED, tune=True)

    def slots_compiled(self) -> Candidate:
        """The engine as it runs with pipeline.compile on: tuned attention, compiled, on a GPU captured as graphs."""
        self._need_compiler(SLOTS_COMPILED)
        on_gpu = self.device.type == "cuda"
        return self._engine(SLOTS_COMPILED, compile_setting="on", tune=on_gpu)

    def slots_fast(self) -> Candidate:
        """The compiled engine under preset fast: fewer steps of another solver; benchmarks/quality.py judges its images."""
        self._need_compiler(SLOTS_FAST)
        on_gpu = self.device.type == "cuda"
        return self._engine(SLOTS_FAST, self._fast(), compile_setting="on", tune=on_gpu)

    def _fast(self) -> Setting:
        """The setting under preset fast: its grid, and a strength that takes as many of its steps as fast does."""
        exact = self.setting
        asked = Generation(
            num_inference_steps=exact.num_inference_steps, guidance_scale=exact.guidance_scale, solver=exact.solver
        )
        grid, start = plan("fast", asked, self.pipeline).grids(self.pipeline.scheduler).at(exact.strength)
        steps = grid.num_inference_steps
        return dataclasses.replace(
            exact, solver=grid.solver, num_inference_steps=steps, guided_steps=grid.guided_steps,
            strength=min(1.0, (steps - start + 0.5) / steps),
        )  # fmt: skip

    def slots_kernels(self) -> Candidate:
        """The compiled engine with run.kernels=triton: what the kernels gain over the compiler's own fusions."""
        self._need_compiler(SLOTS_KERNELS)
        if self.device.type != "cuda":
            raise peers.Unavailable(SLOTS_KERNELS, "Triton kernels need a CUDA GPU")
        return self._engine(SLOTS_KERNELS, compile_setting="on", tune=True, kernels="triton")

    def diffusers(self) -> Candidate:
        """diffusers at its best batch, with default attention."""
        peer = peers.image_to_image(self.pipeline, self.setting)
        return self._batched(DIFFUSERS, peer, f"as it comes; {self.tried}", self.batch)

    def xformers(self) -> Candidate:
        """The same with xformers' attention, at its own best batch."""
        own = inputs.own_copy(self.pipeline)
        peer = peers.with_xformers(peers.image_to_image(own, self.setting), XFORMERS)
        batch, tried = self._best_batch(own, XFORMERS)
        return self._batched(XFORMERS, peer, f"enable_xformers_memory_efficient_attention; {tried}", batch)

    def diffusers_compiled(self) -> Candidate:
        """The same compiled as in diffusers' guide, at the best of the batches that there is time to compile for."""
        self._need_compiler(COMPILED)
        if self.options.compile_only:  # one step is compiled as all of them are
            self.setting = dataclasses.replace(self.setting, num_inference_steps=2)
        peer = peers.compiled(peers.image_to_image(inputs.own_copy(self.pipeline), self.setting))
        rates = batches.compiled_rates(
            lambda batch: self._call(peer, batch),
            self.batches_to_compile(),
            self.device,
            lambda: self.budget.left - BLOCKS_SHARE * self.budget.seconds,
        )
        batch, tried = batches.fastest(rates)
        return self._batched(COMPILED, peer, f"UNet and decoder compiled, channels_last; {tried}", batch)

    def da_fusion(self) -> Candidate:
        """DA-Fusion's loop as published; it makes one image at a time, so fewer images suffice to measure its rate."""
        count = min(self.options.da_fusion_images, self.setting.images)
        sources = [Image.fromarray(row.numpy()) for row in self.pixels_NHWC[:count]]
        call = peers.da_fusion(self.pipeline, sources, self.texts[:count], self.setting, Path(self._folder.name))
        switches = "one PIL image a call, PNG written; nothing cached"
        return Candidate(DA_FUSION, call, 1, True, switches, "draws its own noise", at_most=count)

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _engine(self, name: str, setting: Setting | None = None, **how) -> Candidate:
        engine = self._built(setting or self.setting, **how)
        if self.options.compile_only:
            return Candidate(name, engine.make, self.rows, False, "", "not made")
        made, z0, eps = first_images(engine)
        pool_bytes = engine.slots.pool_bytes
        switches = (
            f"{engine.compiled.value}; attention {engine.attention}; upsampling {engine.upsampling}; kernels {engine.kernels}; moments, prompts and their keys and values cached; "
            f"decoding {engine.decode_batch} at once; {self.rows_tried}"
        )
        if setting is not None:
            quality = f"another sampler, {setting.solver} in {setting.num_inference_steps}: see benchmarks.quality"
            return Candidate(name, engine.make, self.rows, False, switches, quality, setting, pool_bytes=pool_bytes)
        if self._reference is None:
            peer = peers.image_to_image(self.pipeline, self.setting)
            first = slice(0, min(QUALITY_IMAGES, self.rows))
            reference = peers.from_noise(peer, z0[first], eps[first], self.texts[first], self.setting)
            self._reference = reference, z0, eps
        self.engines[name], self.how[name] = engine, how
        return Candidate(name, engine.make, self.rows, False, switches, self._psnr(made), pool_bytes=pool_bytes)

    def _built(self, setting: Setting, **how) -> SlotEngine:
        own = inputs.own_copy(self.pipeline)
        engine = SlotEngine(own, setting, self.moments, self.texts, slots=self.rows, found=self.found, **how)
        self.found |= engine.found
        return engine

    def tune(self) -> None:
        """Time the choices that the compiled engines will use, before anything else is on the device."""
        for setting in (self.setting, self._fast()):
            self._built(setting, compile_setting="on", tune=True, accelerated=False)

    def _batched(self, name: str, peer, switches: str, batch: int) -> Candidate:
        quality = "not compared: the engine made no images"
        if self._reference is not None:
            _, z0, eps = self._reference
            rows = [i % len(z0) for i in range(batch)]  # in the shape it is timed in
            made = peers.from_noise(peer, z0[rows], eps[rows], [self.texts[row] for row in rows], self.setting)
            quality = self._psnr(made)
        return Candidate(name, self._call(peer, batch), batch, True, f"{switches}; tensors in and out", quality)

    def _call(self, peer, batch: int) -> Callable[[int], torch.Tensor]:
        images = self.pixels_NHWC.to(self.device).permute(0, 3, 1, 2).to(self.pipeline.dtype).div(255)
        return peers.batched(peer, images, self.texts, batch, self.setting)

    def _best_batch(self, pipeline: StableDiffusion, name: str) -> tuple[int, str]:
        """The batch at which diffusers' pipeline is fastest, and what was tried."""
        if self.options.batch:
            return self.options.batch, f"batch {self.options.batch} as asked"
        return batches.best_batch(pipeline, self.setting, self.options.images, name, self.budget.left)

    def _best_slots(self) -> tuple[int, str]:
        """The number of slots at which the uncompiled engine is fastest, and what was tried."""
        if self.options.batch:
            return self.options.batch, f"{self.options.batch} slots as asked"
        own = inputs.own_copy(self.pipeline)
        build = lambda slots: SlotEngine(own, self.setting, self.moments, self.texts, slots=slots)  # noqa: E731
        return batches.best_slots(build, self.options.images, self.device, SLOTS, self.budget.left)

    def batches_to_compile(self) -> tuple[int, ...]:
        """The best batch of the uncompiled pipeline and the one next to it; each needs its own compilation."""
        if self.options.batch:
            return (self.batch,)
        tried = (self.batch, *batches.next_to(self.batch, self.options.images, self.device))
        return tuple(batch for batch in tried if (COMPILED, batch) not in self.too_late)

    def _psnr(self, made: torch.Tensor) -> str:
        reference, _, _ = self._reference
        count = min(len(made), len(reference))
        return f"PSNR {psnr_db(made[:count], reference[:count]):.1f} dB to diffusers"

    def _need_compiler(self, technique: str) -> None:
        if not self.options.compile:
            raise peers.Unavailable(technique, "--no-compile")
        batches_of = self.batches_to_compile() if technique == COMPILED else (self.rows,)
        if not {(technique, batch) for batch in batches_of} - self.too_late:
            raise peers.Unavailable(technique, "budget")
