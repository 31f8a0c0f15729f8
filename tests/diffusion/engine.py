"""What tests of the slot engine share: a tiny pipeline with sources, requests on a grid, and diffusers one by one."""

import copy
import dataclasses
import functools

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from diffusers.schedulers import scheduling_lcm

from modules import config
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.schedule import build_scheduler, time_grid
from modules.diffusion.slots import Slots, Sources
from modules.runtime import stream
from tests.tiny import pipeline_folder

SEED = 5
PLACE = {"device": "cpu", "dtype": torch.float32, "resolution": 0}
PROMPTS = ("a photo of a rusty screw", "the dark gear", "a rendering of a red nut", "")


@functools.cache
def tiny_pipeline(options: tuple[tuple[str, object], ...] = (), device="cpu", dtype=torch.float32, resolution=0):
    """A loaded tiny pipeline, shared by the tests of a process: none may change it for good."""
    folder = pipeline_folder(**dict(options))
    settings = dataclasses.replace(config.Pipeline(), path=str(folder), resolution=resolution)
    return load_pipeline(settings, device, dtype)


class Engine:
    """A slot engine over a tiny pipeline; what it finishes is kept by image index, pixels in [0, 1]."""

    def __init__(self, solver="ddim", count=8, strengths=(0.25, 0.5, 0.75, 1.0), guidance=7.5, options=(), **slots):
        place = [slots.pop(name, default) for name, default in PLACE.items()]
        self.plain = tiny_pipeline(tuple(options), *place)  # what diffusers runs: an engine changes its layers
        own = {name: copy.deepcopy(getattr(self.plain, name)) for name in ("unet", "vae")}
        self.pipeline = dataclasses.replace(self.plain, **own)
        freeze_layers(self.pipeline.vae)
        self.grid = time_grid(self.pipeline.scheduler, solver, count, slots.pop("guided_steps", None))
        self.strengths, self.guidance = strengths, guidance
        generator = torch.Generator().manual_seed(1)
        side = self.pipeline.resolution
        pixels = torch.randint(0, 256, (6, side, side, 3), dtype=torch.uint8, generator=generator)
        moments = self.pipeline.encode_moments(pixels)
        masks = torch.zeros(6, side, side, dtype=torch.uint8)
        masks[:, 8:19, 10:23] = 1
        self.sources = Sources(moments, pixels.to(moments.device), masks.to(moments.device))
        self.contexts = self.pipeline.embed(list(PROMPTS))
        self.finished: dict[int, torch.Tensor] = {}
        self.order: list[Request] = []
        self.batches: list[int] = []
        self.slots = Slots(
            self.pipeline,
            self.sources,
            [self.grid],
            slots.pop("request", self.request),
            lambda request: self.contexts[int(request.prompt.template)],
            self.finish,
            seed=SEED,
            **({"slots": 4, "decode_batch": 3, "empty_TE": self.contexts[-1]} | slots),
        )

    def request(self, image_index: int, **changes) -> Request:
        strength = self.strengths[image_index % len(self.strengths)]
        start = self.grid.start(strength)
        return Request(
            image_index=image_index,
            source=image_index % 6,
            label=0,
            is_ood=False,
            recipe="positive",
            prompt=Prompt(template=str(image_index % 3)),
            strength=strength,
            start=start,
            solver=self.grid.solver,
            num_inference_steps=self.grid.num_inference_steps,
            guided_steps=self.grid.guided_steps,
            guidance_scale=self.guidance,
            **changes,
        )

    def make(self, count: int) -> None:
        """Run until the first `count` images are finished."""
        for _ in range(1000):
            if self.finished.keys() >= set(range(count)):
                return
            if self.slots.next_index < count + len(self.slots.occupants):
                self.slots.tick()
            else:
                self.slots.drain()
        raise AssertionError(f"{count} images were asked for, {sorted(self.finished)} came")

    def finish(self, pixels_N3HW: torch.Tensor, requests: list[Request]) -> None:
        self.batches.append(len(requests))
        for pixels, request in zip(pixels_N3HW, requests, strict=True):
            self.order.append(request)
            self.finished[request.image_index] = (pixels / 2 + 0.5).clamp(0, 1).clone()

    def noise(self, request: Request) -> list[torch.Tensor]:
        """Noise of the latent, of the start, and of each step, as the engine draws it."""
        shape = (4, self.pipeline.latent_size, self.pipeline.latent_size)
        generator = stream(SEED, "image", *request.identity)
        return [torch.randn(shape, generator=generator) for _ in range(2 + self.slots.in_flight.stochastic_steps)]

    def latent(self, request: Request) -> torch.Tensor:
        """The source's latent [1, 4, h, w] that an image starts from."""
        moments = self.sources.moments_D8hw[request.source][None]
        return self.pipeline.sample_latents(moments, self.noise(request)[0][None].to(moments.device))

    def by_diffusers(self, request: Request, monkeypatch) -> torch.Tensor:
        """The same image by diffusers' own pipeline, alone, pixels [3, H, W] in [0, 1]."""
        parts = self.plain
        reference = StableDiffusionImg2ImgPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            unet=parts.unet,
            scheduler=build_scheduler(parts.scheduler, request.solver),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        reference.set_progress_bar_config(disable=True)
        _, eps, *steps = (noise[None].to(parts.device, parts.dtype) for noise in self.noise(request))
        fresh = iter(steps[request.start :])
        monkeypatch.setattr(pipeline_stable_diffusion_img2img, "randn_tensor", lambda *a, **k: eps)
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, **k: next(fresh))
        return reference(
            prompt=PROMPTS[int(request.prompt.template)],
            image=self.latent(request).to(parts.dtype),
            strength=request.strength,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            output_type="pt",
        ).images[0]
