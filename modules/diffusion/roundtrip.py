"""Real images as the decoder would show them: encoded and decoded, nothing else changed.

They tell the decoder's trace from what a recipe did: shown as real rows they hide it (`generation.roundtrip_fraction`),
shown to frozen features they tell whether it is seen (the warning light of a report).
"""

import torch

from kernels.pixels import pixels
from modules.diffusion.pipeline import StableDiffusion


@torch.no_grad()
def decode_means(pipeline: StableDiffusion, moments_N8hw: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 images [N, size, size, 3] of VAE moments at their mean, stored by the resize of generated images."""
    mean_N4hw = pipeline.sample_latents(moments_N8hw, torch.zeros_like(moments_N8hw[:, :4]))
    return pixels(pipeline.decode(mean_N4hw), size)


def roundtrip(pipeline: StableDiffusion, pixels_DHWC: torch.Tensor, size: int, batch: int) -> torch.Tensor:
    """uint8 images [D, H, W, 3] at the pipeline's resolution -> the same after encode (mean) and decode, at `size`.

    They are stored at `size` by the resize of generated images. The result is on the CPU.
    """
    parts = pixels_DHWC.split(batch)
    return torch.cat([decode_means(pipeline, pipeline.encode_moments(part), size).cpu() for part in parts])
