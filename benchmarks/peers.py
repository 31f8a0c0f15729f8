"""The peers of the slot engine, each at its best: DA-Fusion's loop and diffusers' image-to-image pipeline.

Both are implemented here from their descriptions, on diffusers' own pipeline class, with the same parts as the engine:
the same weights, dtype and setting. DA-Fusion calls the pipeline with one PIL image and one prompt at a time and writes
a PNG; the batched peer takes and returns tensors, so that it pays for nothing it does not need. Source of the loop:
Trabucco et al. 2023 (2302.07944), section 4 and its published settings.

Shapes: N images, H W pixels, h w latent grid.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from PIL import Image

from benchmarks.inputs import Setting
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.schedule import build_scheduler


class Unavailable(Exception):
    """Raised for a technique that cannot run here, with the reason."""

    def __init__(self, technique: str, reason: str):
        super().__init__(f"{technique}: {reason}")
        self.technique, self.reason = technique, reason


def image_to_image(pipeline: StableDiffusion, setting: Setting) -> StableDiffusionImg2ImgPipeline:
    """diffusers' pipeline over the parts of `pipeline`, with the setting's solver."""
    peer = StableDiffusionImg2ImgPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=build_scheduler(pipeline.scheduler, setting.solver),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    peer.set_progress_bar_config(disable=True)
    return peer


def compiled(peer: StableDiffusionImg2ImgPipeline) -> StableDiffusionImg2ImgPipeline:
    """The pipeline sped up as in diffusers' guide: channels_last, then torch.compile of UNet and decoder."""
    peer.unet.to(memory_format=torch.channels_last)
    peer.vae.to(memory_format=torch.channels_last)
    peer.unet = torch.compile(peer.unet, fullgraph=True, dynamic=False)
    peer.vae.decode = torch.compile(peer.vae.decode, fullgraph=True, dynamic=False)
    return peer


def options(setting: Setting) -> dict:
    """The setting as arguments of diffusers' pipeline."""
    return {
        "strength": setting.strength,
        "num_inference_steps": setting.num_inference_steps,
        "guidance_scale": setting.guidance_scale,
    }


def batched(
    peer: StableDiffusionImg2ImgPipeline, images_N3HW: torch.Tensor, texts: list[str], batch: int, setting: Setting
) -> Callable[[int], torch.Tensor]:
    """A call that makes the first `count` images in batches: uint8 [count, H, W, 3] on the device.

    Args:
        images_N3HW: sources in [0, 1] on the device, N a multiple of `batch`.
        texts: one prompt per image.
    """

    def call(count: int) -> torch.Tensor:
        made = []
        for first in range(0, count, batch):
            rows = slice(first, first + batch)
            found = peer(prompt=texts[rows], image=images_N3HW[rows], output_type="pt", **options(setting)).images
            made.append(found.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(made)

    return call


def da_fusion(
    pipeline: StableDiffusion, sources: list[Image.Image], texts: list[str], setting: Setting, folder: Path
) -> Callable[[int], None]:
    """A call of DA-Fusion's loop over the first `count` images: resize, generate one under autocast, write a PNG.

    As published, the text encoder stays in fp32 and autocast spans the call. On a CPU all parts have one dtype, without
    autocast.
    """
    on_gpu = pipeline.device.type == "cuda"
    if on_gpu:
        pipeline = dataclasses.replace(pipeline, text_encoder=copy.deepcopy(pipeline.text_encoder).float())
    peer = image_to_image(pipeline, setting)
    side = pipeline.resolution

    def call(count: int) -> None:
        casts = on_gpu and pipeline.dtype != torch.float32
        cast = torch.autocast("cuda", pipeline.dtype) if casts else contextlib.nullcontext()
        for i, (source, text) in enumerate(zip(sources[:count], texts[:count], strict=True)):
            canvas = source.resize((side, side), Image.Resampling.BILINEAR)
            with cast:
                made = peer(prompt=[text], image=[canvas], **options(setting)).images[0]
            made.save(folder / f"aug-{i}.png")

    return call


@torch.no_grad()
def from_noise(
    peer: StableDiffusionImg2ImgPipeline,
    z0_N4hw: torch.Tensor,
    eps_N4hw: torch.Tensor,
    texts: list[str],
    setting: Setting,
) -> torch.Tensor:
    """Pixels [N, 3, H, W] in [0, 1] of diffusers' pipeline from given latents and given noise, for the quality column."""
    noise = eps_N4hw.to(peer.unet.dtype)
    # Laid out as its VAE gives them, or what was compiled for that would be compiled again for another.
    layout = torch.channels_last if peer.unet.conv_in.weight.stride(1) == 1 else torch.contiguous_format
    latents = z0_N4hw.to(peer.unet.dtype).contiguous(memory_format=layout)
    with mock.patch.object(pipeline_stable_diffusion_img2img, "randn_tensor", lambda *args, **kwargs: noise):
        return peer(prompt=texts, image=latents, output_type="pt", **options(setting)).images


def with_xformers(peer: StableDiffusionImg2ImgPipeline, technique: str) -> StableDiffusionImg2ImgPipeline:
    """The pipeline with xformers' attention.

    Raises:
        Unavailable: not installed, no GPU, or it refuses the UNet's shapes.
    """
    try:
        peer.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
        raise Unavailable(technique, str(error).splitlines()[0]) from error
    return peer
