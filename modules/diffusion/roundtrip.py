"""Real images passed through the VAE's encoder and decoder, with nothing else changed.

They separate the trace that the decoder leaves from the effect of a recipe: used as real rows of a batch, they make the
trace useless as a cue (`generation.roundtrip_fraction`); given to frozen features, they show whether the trace is
visible (the warning light of a report).
"""

import torch

from kernels.pixels import pixels
from modules.diffusion.pipeline import StableDiffusion


@torch.no_grad()
def decode_means(pipeline: StableDiffusion, moments_N8hw: torch.Tensor, size: int) -> torch.Tensor:
    """Decode the means of VAE moments to uint8 images [N, size, size, 3], resized like generated images."""
    mean_N4hw = pipeline.sample_latents(moments_N8hw, torch.zeros_like(moments_N8hw[:, :4]))
    return pixels(pipeline.decode(mean_N4hw), size)


def roundtrip(pipeline: StableDiffusion, pixels_DHWC: torch.Tensor, size: int, batch: int) -> torch.Tensor:
    """uint8 images [D, H, W, 3] at the pipeline's resolution -> [D, size, size, 3] after encode (mean) and decode.

    They are resized like generated images. The result is on the CPU.
    """
    parts = pixels_DHWC.split(batch)
    return torch.cat([decode_means(pipeline, pipeline.encode_moments(part), size).cpu() for part in parts])
