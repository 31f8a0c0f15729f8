"""Makes images from given requests: an earlier image again from its provenance, or the few of a contact sheet.

Shapes: N images, T tokens of a prompt, E text width, H W pixels.
"""

from collections.abc import Callable

import torch

from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.requests import Request
from modules.diffusion.schedule import time_grid
from modules.diffusion.slots import Slots, Sources
from modules.errors import DataError


def make(
    requests: list[Request],
    pipeline: StableDiffusion,
    sources: Sources,
    context: Callable[[Request], torch.Tensor],
    empty_TE: torch.Tensor,
    seed: int,
    *,
    slots: int = 8,
    decode_batch: int = 8,
) -> torch.Tensor:
    """The images of requests, in their order: pixels [N, 3, H, W], nominally in [-1, 1].

    An image made again from its provenance has other neighbors in its UNet calls than the first time, so it agrees up
    to rounding (1e-4 in fp32) and not bit for bit.

    Raises:
        DataError: an image was made by another pipeline, or at another resolution.
    """
    for request in requests:
        if (request.pipeline, request.resolution) != (pipeline.digest, pipeline.resolution):
            raise DataError(
                f"image {request.image_index} was made by pipeline {request.pipeline[:16]} at {request.resolution} px, this "
                f"is {pipeline.digest[:16]} at {pipeline.resolution} px; set pipeline.path and pipeline.resolution as "
                "they were"
            )
    grids = [time_grid(pipeline.scheduler, *key) for key in sorted({r.grid for r in requests if r.denoises})]
    made: dict[Request, torch.Tensor] = {}

    def keep(pixels_N3HW: torch.Tensor, finished: list[Request]) -> None:
        made.update(zip(finished, pixels_N3HW.clone(), strict=True))

    engine = Slots(
        pipeline,
        sources,
        grids,
        lambda index: requests[index],
        context,
        keep,
        seed=seed,
        slots=min(slots, len(requests)),
        decode_batch=min(decode_batch, len(requests)),
        empty_TE=empty_TE if any(r.guidance_scale != 1 for r in requests) else None,
        masked=any(r.mask_edit != "none" for r in requests),
    )
    for request in requests:
        engine.retry(request)
    engine.drain()
    return torch.stack([made[request] for request in requests])
