"""The judge of generated images: a small classifier trained on real train images and fixed before the learner starts.

A learner that judged the images it trains on would approve what it already believes. The judge is trained once, on real
images only, and cached under a key of everything it was made from, so that all arms of a comparison share one judge.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from modules import config
from modules.data.cache import cached_tensors, digest_tensor
from modules.data.views import plain_view, two_views
from modules.learning.encoder import Encoder, build_encoder
from modules.optim import learning_rate
from modules.runtime import stream

BATCH, WIDTH, PEAK_LR = 64, 32, 2e-3
ALGORITHM = 1  # part of the cache key; raised when the same settings would train a different judge


def load_judge(
    pixels_DHWC: torch.Tensor,
    labels_D: torch.Tensor,
    num_classes: int,
    steps: int,
    seed: int,
    cache_dir: str | Path,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None] | None = None,
    learning: config.Learning | None = None,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """judge(images_BHWC uint8) -> (unit features_BF, predicted_B), trained on the given images or read from the cache.

    Args:
        steps: AdamW steps of 64 images with random views.
        learning: its crop, jitter and gray settings are those of the judge's views, so that the judge sees what the
            learner sees; None: the defaults.
    """
    device = pixels_DHWC.device
    settings = config.Encoder(arch="small_resnet", width=WIDTH)
    learning = learning or config.Learning()
    views = {name: getattr(learning, name) for name in ("crop_scale", "jitter", "jitter_p", "grayscale_p")}
    model = build_encoder(settings, pixels_DHWC.shape[1], num_classes, seed).to(device)
    key = {
        "algorithm": ALGORITHM,
        "pixels": digest_tensor(pixels_DHWC),
        "labels": digest_tensor(labels_D),
        "steps": steps,
        "seed": seed,
        "settings": repr(settings),
        "views": repr(views),
    }

    def make() -> dict[str, torch.Tensor]:
        train_judge(model, pixels_DHWC, labels_D, steps, seed, replace(config.Learning(), **views), progress)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    model.load_state_dict(cached_tensors(cache_dir, "judge", key, make, say))
    model.eval()

    @torch.no_grad()
    def judge(images_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BF = model.features(plain_view(images_BHWC.to(device)))
        return F.normalize(features_BF.float(), dim=1), model.classifier(features_BF).argmax(1)

    return judge


def train_judge(
    model: Encoder,
    pixels_DHWC: torch.Tensor,
    labels_D: torch.Tensor,
    steps: int,
    seed: int,
    learning: config.Learning,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Fit an encoder and its classifier to real images: cross-entropy over two random views; AdamW, warm-up, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    labels_D = labels_D.to(pixels_DHWC.device)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, PEAK_LR, steps // 10 + 1, steps)
        rows = torch.randint(len(labels_D), (BATCH,), generator=stream(seed, "judge", step)).to(labels_D.device)
        views = two_views(pixels_DHWC[rows], seed=seed, step=step, learning=learning)
        loss = F.cross_entropy(model(views, "logits"), labels_D[rows].repeat(2), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, "judge of generated images")
