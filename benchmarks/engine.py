"""The slot engine as the generation benchmarks run it: the trainer's own `Slots` with fixed sources and prompts.

It works as in training: moments of the sources and embeddings of the prompts are computed beforehand, and finished
images are decoded in batches and stored as uint8 on the device. All slots start together, so making N images takes
exactly N times the UNet rows of one, and every call is full if N is a multiple of the slots.

Shapes: N images, P prompts, T tokens, E text width, H W pixels, h w latent grid.
"""

import math
from collections import Counter

import torch

from benchmarks.inputs import Setting
from kernels import backend
from kernels.group_norm import swap_group_norm
from kernels.pixels import pixels
from kernels.staging import upload
from modules.diffusion import attention, upsampling
from modules.diffusion.capture import accelerate, lay_out
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.schedule import time_grid
from modules.diffusion.slots import Slots, Sources
from modules.meter import timer
from modules.runtime import stream

DECODE_BATCH = 8  # latents decoded at once


class SlotEngine:
    """Slots over given sources; `stored_NHWC` is what the reservoir would hold."""

    def __init__(
        self,
        pipeline: StableDiffusion,
        setting: Setting,
        moments_N8hw: torch.Tensor,
        texts: list[str],
        *,
        slots: int,
        compile_setting: str = "off",
        tune: bool = False,
        accelerated: bool = True,
        found: dict[str, str] | None = None,
        kernels: str = "auto",
    ) -> None:
        """An engine with idle slots.

        Args:
            moments_N8hw: moments of the sources; image i uses source and prompt i modulo N.
            pipeline: its UNet and VAE are modified, so peers need another copy.
            compile_setting: as `pipeline.compile`.
            tune: time attention backends and forms of upsampling on the models' shapes and use the fastest of each.
            accelerated: False compiles nothing: the engine is only laid out and tuned, for the choices in `found`.
            found: the choices of an earlier tuning, by shape, to be used again.
            kernels: as `run.kernels`; triton also swaps the group norms of UNet and VAE.
        """
        self.pipeline, self.setting, self.texts, self.kernels = pipeline, setting, texts, kernels
        for model in (pipeline.unet, pipeline.vae):
            freeze_layers(model)
        if kernels == "triton":
            for model in (pipeline.unet, pipeline.vae):
                swap_group_norm(model, kernels)
        self.decode_batch = min(slots, DECODE_BATCH)
        self.kept: dict[int, torch.Tensor] = {}  # pixels of the first round, for judging
        distinct = sorted(set(texts))
        embedded_PTE = pipeline.embed([*distinct, ""]).detach()
        self.context = dict(zip([*distinct, ""], embedded_PTE, strict=True))
        self.grid = time_grid(pipeline.scheduler, setting.solver, setting.num_inference_steps, setting.guided_steps)
        self.start = self.grid.start(setting.strength)
        self.sources = Sources(moments_N8hw)
        side = pipeline.resolution
        self.stored_NHWC = torch.zeros(len(texts), side, side, 3, dtype=torch.uint8, device=pipeline.device)
        calls, guided = setting.calls(pipeline.scheduler)
        self.slots = Slots(
            pipeline,
            self.sources,
            [self.grid],
            self.request,
            lambda request: self.context[request.prompt.template],
            self._finish,
            seed=setting.seed,
            slots=slots,
            decode_batch=self.decode_batch,
            empty_TE=self.context[""] if guided else None,
            unconditional_rows=None if guided in (0, calls) else min(slots, math.ceil(slots * guided / calls) + 1),
        )
        self.found: dict[str, str] = {}
        lay_out(pipeline, compile_setting)
        self.attention = self._tune(found, compile_setting != "off") if tune else "auto"
        self.upsampling = upsampling.summary(pipeline.unet, pipeline.vae)
        with backend.using(kernels):
            self.compiled = accelerate(self.slots, compile_setting if accelerated else "off")

    def request(self, index: int) -> Request:
        setting, source = self.setting, index % len(self.texts)
        return Request(
            image_index=index,
            source=source,
            label=0,
            is_ood=False,
            recipe="positive",
            prompt=Prompt(template=self.texts[source]),
            strength=setting.strength,
            start=self.start,
            solver=setting.solver,
            num_inference_steps=setting.num_inference_steps,
            guided_steps=self.grid.guided_steps,
            guidance_scale=setting.guidance_scale,
        )

    @torch.no_grad()
    def make(self, count: int) -> torch.Tensor:
        """Run until `count` more images are finished; returns the store."""
        target = self.slots.counts["finished"] + count
        with backend.using(self.kernels):
            while self.slots.counts["finished"] < target:
                self.slots.tick()
        return self.stored_NHWC

    def start_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The source latent z0 and the noise eps [4, h, w] that image `index` starts from, float32 on the device."""
        shape = (4, self.pipeline.latent_size, self.pipeline.latent_size)
        sample, eps = torch.randn(2, *shape, generator=stream(self.setting.seed, "image", index)).to(
            self.pipeline.device
        )
        moments_18hw = self.sources.moments_D8hw[index % len(self.texts)][None]
        return self.pipeline.sample_latents(moments_18hw, sample[None])[0], eps

    def _finish(self, decoded_N3HW: torch.Tensor, requests: list[Request]) -> None:
        rows = upload([request.source for request in requests], decoded_N3HW.device)
        self.stored_NHWC.index_copy_(0, rows, pixels(decoded_N3HW, self.pipeline.resolution))
        for request, image in zip(requests, decoded_N3HW, strict=True):
            if request.image_index < len(self.slots.occupants):
                self.kept[request.image_index] = image.clone()

    def _tune(self, known: dict[str, str] | None, compiles: bool) -> str:
        """How many layers use which attention backend; sets `found`: backends and forms of upsampling by shape."""
        measure, slots, models = timer(self.pipeline.device), self.slots, (self.pipeline.unet, self.pipeline.vae)

        def median(work) -> float:
            return measure(work, 5)

        timings = attention.tune(self.pipeline.unet, slots.in_flight.step, median, kept=known)
        self.found = attention.chosen(timings)
        if compiles:  # which form is fastest depends on the memory layout
            self.found |= upsampling.tune(models, slots.rehearse, median, known)[0]
        taken = Counter(layer.processor.backend for layer in attention.layers_of(self.pipeline.unet))
        return " ".join(f"{backend} x{count}" for backend, count in taken.items())


@torch.no_grad()
def first_images(engine: SlotEngine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An engine's first images, one per slot, and what diffusers needs to make the same ones.

    Returns:
        pixels [S, 3, H, W] in [0, 1], latents z0 and noise eps [S, 4, h, w].
    """
    count = len(engine.slots.occupants)
    engine.make(max(0, count - engine.slots.counts["finished"]))
    z0, eps = (torch.stack(rows) for rows in zip(*(engine.start_of(i) for i in range(count)), strict=True))
    made = torch.stack([engine.kept[i] for i in range(count)])
    return made.float().div(2).add(0.5).clamp(0, 1), z0, eps


def psnr_db(made: torch.Tensor, reference: torch.Tensor) -> float:
    """10 log10(1 / mean squared error) of pixels in [0, 1], over all images; 200 if they are equal."""
    error = (made.float() - reference.float()).square().mean().item()
    return -10 * torch.tensor(max(error, 1e-20), dtype=torch.float64).log10().item()
