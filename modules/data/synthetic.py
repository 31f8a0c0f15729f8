"""Negatives that need no diffusion: the baseline that generated negatives have to beat.

A jigsaw keeps an image's colors, texture and patches and destroys the object's layout. The recipe `jigsaw_roundtrip`
also passes the image through encode and decode; the slots do that, as this module knows no pipeline.

Legend: G patches, H W C pixels, h w pixels of a patch.
"""

import torch

from kernels.staging import upload


def jigsaw(image_HWC: torch.Tensor, grid: int, generator: torch.Generator) -> torch.Tensor:
    """The image with its grid x grid patches permuted, never by the identity; same shape, dtype and device.

    Raises:
        ValueError: grid is below 2 or does not divide the image's size.
    """
    H, W, C = image_HWC.shape
    if grid < 2 or H % grid or W % grid:
        raise ValueError(f"grid is {grid} for an image of {H} x {W}; expected 2 or more, dividing both sides")
    order = upload(_permutation(grid * grid, generator), image_HWC.device)
    h, w = H // grid, W // grid
    patches_GhwC = image_HWC.view(grid, h, grid, w, C).transpose(1, 2).reshape(grid * grid, h, w, C)
    return patches_GhwC[order].view(grid, grid, h, w, C).transpose(1, 2).reshape(H, W, C)


def _permutation(count: int, generator: torch.Generator) -> torch.Tensor:
    """A random permutation of `count` elements that is not the identity."""
    identity = torch.arange(count)
    order = torch.randperm(count, generator=generator)
    while torch.equal(order, identity):
        order = torch.randperm(count, generator=generator)
    return order
