"""Makes two random views of each row with kernels.views; this module decides which random numbers a row gets.

The parameters of row r at step t depend on (seed, t, r) only: they are row r of one stream of uniform numbers, which
does not depend on how many rows follow. Real rows come first in a batch (mixer.py), so they get the same views in every
arm of an experiment, however many generated rows are added.

Legend: B rows, V = 2 views, R = V B, K uniforms of a view, H W pixels.
"""

import torch

from kernels.staging import upload
from kernels.views import UNIFORMS, draw_view_parameters, views
from modules.config import Learning
from modules.data import strong
from modules.runtime import stream

VIEWS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's encoders expect


def two_views(
    images_BHWC: torch.Tensor, *, seed: int, step: int, learning: Learning, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalized views (2B, 3, H, W) of uint8 images, channels_last, view-major: rows 0 to B-1 are the first views.

    `learning.augment` standard: random-resized-crop, flip, color jitter, gray. strong: random-resized-crop, flip,
    TrivialAugmentWide, RandomErasing.
    """
    B, H, W, _ = images_BHWC.shape
    uniforms_BVK = _uniforms(seed, "views", step, B, UNIFORMS)
    if learning.augment != "strong":
        parameters = draw_view_parameters(
            uniforms_BVK,
            H,
            W,
            crop_scale=learning.crop_scale,
            jitter=learning.jitter,
            jitter_p=learning.jitter_p,
            grayscale_p=learning.grayscale_p,
        )
        return views(images_BHWC, parameters, MEAN, STD, out_dtype)
    parameters = draw_view_parameters(uniforms_BVK, H, W, crop_scale=learning.crop_scale, jitter_p=0.0, grayscale_p=0.0)
    strong_RK = _uniforms(seed, "strong", step, B, strong.UNIFORMS).transpose(0, 1).flatten(0, 1)
    x_R3HW = views(images_BHWC, parameters, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.float32)
    x_R3HW = strong.erase(_normalize(strong.strong_augment(x_R3HW, strong_RK)), strong_RK)
    return x_R3HW.to(out_dtype).contiguous(memory_format=torch.channels_last)


def plain_view(images_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 images as (B, 3, H, W) float32, normalized, channels_last and not augmented, for evaluation."""
    x_B3HW = images_BHWC.permute(0, 3, 1, 2).float() / 255
    return _normalize(x_B3HW).contiguous(memory_format=torch.channels_last)


def _uniforms(seed: int, name: str, step: int, B: int, K: int) -> torch.Tensor:
    """float64 [B, V, K] in [0, 1), filled row by row: the first rows do not depend on B (as a test checks)."""
    return torch.rand(B, VIEWS, K, dtype=torch.float64, generator=stream(seed, name, step))


def _normalize(x_R3HW: torch.Tensor) -> torch.Tensor:
    mean_311, std_311 = (upload(list(values), x_R3HW.device)[:, None, None] for values in (MEAN, STD))
    return (x_R3HW - mean_311) / std_311
