"""Negatives that need no diffusion: what any claim for generated ones has to beat.

A jigsaw keeps an image's colors, texture and patches and loses the object's layout. `jigsaw_roundtrip` is the same
image passed through encode and decode, which the recipe asks of the pipeline: this file knows no pipeline.

Legend: N images, G patches a side, H W C pixels, h w pixels of a patch.
"""

import torch

from kernels.staging import upload


def jigsaw(images_NHWC: torch.Tensor, grid: int, generators: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """The images with their grid x grid patches permuted, never left as they were: same shape, dtype and device.

    generators: one an image, so that an image depends on its own identity only, or one for all in order.

    Raises:
        ValueError: grid below 2, a size that it does not divide, or another number of generators than images.
    """
    N, H, W, C = images_NHWC.shape
    if grid < 2 or H % grid or W % grid:
        raise ValueError(f"grid is {grid} for images of {H} x {W}; expected 2 or more, dividing both sides")
    if isinstance(generators, torch.Generator):
        generators = [generators] * N
    if len(generators) != N:
        raise ValueError(f"generators holds {len(generators)}; expected one an image, {N}")
    patches = grid * grid
    orders = [_permutation(patches, generator) + image * patches for image, generator in enumerate(generators)]
    if not orders:
        return images_NHWC.clone()
    order = upload(torch.cat(orders), images_NHWC.device)
    h, w = H // grid, W // grid
    patches_GhwC = images_NHWC.view(N, grid, h, grid, w, C).transpose(2, 3).reshape(N * patches, h, w, C)
    return patches_GhwC[order].view(N, grid, grid, h, w, C).transpose(2, 3).reshape(N, H, W, C)


def _permutation(count: int, generator: torch.Generator) -> torch.Tensor:
    """A random order of `count` things, drawn again while it is the identity."""
    identity = torch.arange(count)
    order = torch.randperm(count, generator=generator)
    while torch.equal(order, identity):
        order = torch.randperm(count, generator=generator)
    return order
