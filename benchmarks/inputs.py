"""What the generation benchmarks are fed: one setting for all, a pipeline, images, prompts, and what the work costs.

The setting is DA-Fusion's: strength .5 of 50 steps, guidance 7.5, so 25 guided calls of the UNet an image; DDIM for all.
Where there are no Stable Diffusion weights the exact shape with random weights serves as well: time does not depend on
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
    """What every candidate does."""

    images: int = 64
    strength: float = 0.5
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    solver: str = "ddim"
    guided_steps: int | None = None  # calls from the noisy end that guidance acts on; None: all
    seed: int = 0

    def calls(self, scheduler: dict) -> tuple[int, int]:
        """UNet calls an image takes, and how many of them are guided and so evaluate two rows."""
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
    """The SD 1.5 shape with random weights on a GPU, the embedded pipeline on a CPU."""
    return "random" if device.type == "cuda" else "embedded"


def own_copy(pipeline: StableDiffusion, *, channels_last: bool = False) -> StableDiffusion:
    """The same pipeline with a UNet and a VAE of its own, so that one candidate's changes reach no other."""
    unet, vae = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.vae)
    if channels_last:
        unet, vae = (part.to(memory_format=torch.channels_last) for part in (unet, vae))
    return dataclasses.replace(pipeline, unet=unet, vae=vae)


def smooth_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """uint8 [N, H, W, 3] of random smooth color: no constant image, no noise that a JPEG or a VAE would not see."""
    coarse = torch.rand(count, 3, 8, 8, generator=stream(seed, "benchmark images"))
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    return smooth.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def prompts(count: int) -> list[str]:
    """A prompt an image, of a few nouns."""
    return [f"a photo of a {NOUNS[i % len(NOUNS)]}" for i in range(count)]


def write_images(folder: Path, classes: int, images: int, side: int) -> Path:
    """A folder of class folders of PNG files, for benchmarks that begin at the disk; returns it."""
    from PIL import Image

    rows = smooth_images(classes * images, side)
    for i, row in enumerate(rows):
        path = folder / f"class_{i // images:02d}" / f"{i % images:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.numpy()).save(path, compress_level=1)
    return folder


@dataclass(frozen=True)
class Work:
    """Floating-point operations of each part for one row, 2 x multiply-adds of matrix products and convolutions."""

    unet: int
    decode: int
    encode: int
    text: int

    def of_image(self, setting: Setting, scheduler: dict, *, peer: bool) -> int:
        """Operations an image takes: UNet calls and decoding; a peer also encodes its source and both prompts."""
        calls, guided = setting.calls(scheduler)
        least = self.unet * (calls + guided) + self.decode
        return least + (self.encode + 2 * self.text if peer else 0)


@torch.no_grad()
def count_work(pipeline: StableDiffusion) -> Work:
    """Operations of each part, counted on the real modules at one row."""
    side, size, device, dtype = pipeline.resolution, pipeline.latent_size, pipeline.device, pipeline.dtype
    z = torch.randn(1, 4, size, size, device=device, dtype=dtype)
    context = torch.randn(1, pipeline.num_tokens, pipeline.text_width, device=device, dtype=dtype)
    pixels = torch.randn(1, 3, side, side, device=device, dtype=dtype)
    width = pipeline.guidance_embedding_width
    guidance = torch.randn(1, width, device=device, dtype=dtype) if width else None
    ids = torch.zeros(1, pipeline.num_tokens, dtype=torch.int64, device=device)

    def operations(call) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention goes uncounted
            call()
        return counter.get_total_flops()

    return Work(
        unet=operations(lambda: pipeline.unet(z, torch.ones(1, device=device), context, timestep_cond=guidance)),
        decode=operations(lambda: pipeline.vae.decode(z)),
        encode=operations(lambda: pipeline.vae.encode(pixels)),
        text=operations(lambda: pipeline.embed_ids(ids)),
    )
