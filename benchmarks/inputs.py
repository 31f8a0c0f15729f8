"""The inputs of the generation benchmarks: one setting for all, a pipeline, images, prompts, and the cost of the work.

The setting is DA-Fusion's: strength .5 of 50 steps at guidance 7.5, i.e. 25 guided UNet calls per image; DDIM for all.
Without Stable Diffusion weights, random weights in the exact shape serve as well: the time does not depend on the
values, as long as they are not zero.

Shapes: N images, T tokens, E text width, H W pixels, h w latent grid.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modules import config
from modules.diffusion.pipeline import StableDiffusion, load_pipeline
from modules.diffusion.schedule import time_grid
from modules.runtime import stream

NOUNS = ("bolt", "gear", "nut", "ring", "screw", "bearing", "flange", "washer")


@dataclass(frozen=True)
class Setting:
    """The generation setting that all candidates share."""

    images: int = 64
    strength: float = 0.5
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    solver: str = "ddim"
    guided_steps: int | None = None  # guidance acts on this many calls, from the noisy end; None: all
    seed: int = 0

    def calls(self, scheduler: dict) -> tuple[int, int]:
        """The UNet calls per image, and how many of them are guided and so evaluate two rows."""
        grid = time_grid(scheduler, self.solver, self.num_inference_steps, self.guided_steps)
        start = grid.start(self.strength)
        guided = max(0, grid.guided_steps - start) if self.guidance_scale != 1 else 0
        return self.num_inference_steps - start, guided


def load(source: str, device: torch.device, resolution: int = 0, dtype: torch.dtype | None = None) -> StableDiffusion:
    """The pipeline that `source` names: `random` (the exact SD 1.5 shape), `embedded`, or a path.

    dtype: None is fp16 on a GPU, fp32 on a CPU.
    """
    settings = {"weights": "random"} if source == "random" else {"path": source}
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    return load_pipeline(config.Pipeline(resolution=resolution, **settings), device, dtype)


def default_pipeline(device: torch.device) -> str:
    """`random` (the SD 1.5 shape with random weights) on a GPU, `embedded` on a CPU."""
    return "random" if device.type == "cuda" else "embedded"


def own_copy(pipeline: StableDiffusion, *, channels_last: bool = False) -> StableDiffusion:
    """The same pipeline with its own copies of UNet and VAE, so that a candidate's changes do not affect others."""
    unet, vae = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.vae)
    if channels_last:
        unet, vae = (part.to(memory_format=torch.channels_last) for part in (unet, vae))
    return dataclasses.replace(pipeline, unet=unet, vae=vae)


def smooth_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """uint8 [N, H, W, 3] of random smooth color: neither constant nor noise, which a JPEG or a VAE would not keep."""
    coarse = torch.rand(count, 3, 8, 8, generator=stream(seed, "benchmark images"))
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    return smooth.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def prompts(count: int) -> list[str]:
    """One prompt per image, from a few nouns."""
    return [f"a photo of a {NOUNS[i % len(NOUNS)]}" for i in range(count)]


def write_images(folder: Path, classes: int, images: int, side: int) -> Path:
    """Write class folders of PNG files into a folder, for benchmarks that start from disk; returns the folder."""
    from PIL import Image

    rows = smooth_images(classes * images, side)
    for i, row in enumerate(rows):
        path = folder / f"class_{i // images:02d}" / f"{i % images:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.numpy()).save(path, compress_level=1)
    return folder


@dataclass(frozen=True)
class Work:
    """Floating-point operations of each part per row: 2 x multiply-adds of matrix products and convolutions."""

    unet: int
    decode: int
    encode: int
    text: int

    def of_image(self, setting: Setting, scheduler: dict, *, peer: bool) -> int:
        """Operations per image: UNet calls and decoding; a peer also encodes its source and both prompts."""
        calls, guided = setting.calls(scheduler)
        least = self.unet * (calls + guided) + self.decode
        return least + (self.encode + 2 * self.text if peer else 0)


@torch.no_grad()
def count_work(pipeline: StableDiffusion) -> Work:
    """The operations of each part, counted on the real modules with one row."""
    side, size, device, dtype = pipeline.resolution, pipeline.latent_size, pipeline.device, pipeline.dtype
    z = torch.randn(1, 4, size, size, device=device, dtype=dtype)
    context = torch.randn(1, pipeline.num_tokens, pipeline.text_width, device=device, dtype=dtype)
    pixels = torch.randn(1, 3, side, side, device=device, dtype=dtype)
    width = pipeline.guidance_embedding_width
    guidance = torch.randn(1, width, device=device, dtype=dtype) if width else None
    ids = torch.zeros(1, pipeline.num_tokens, dtype=torch.int64, device=device)

    def operations(call) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
            call()
        return counter.get_total_flops()

    return Work(
        unet=operations(lambda: pipeline.unet(z, torch.ones(1, device=device), context, timestep_cond=guidance)),
        decode=operations(lambda: pipeline.vae.decode(z)),
        encode=operations(lambda: pipeline.vae.encode(pixels)),
        text=operations(lambda: pipeline.embed_ids(ids)),
    )
