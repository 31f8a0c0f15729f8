"""The judge of generated images: a small classifier of real train images, fixed before the learner starts.

A learner that judges its own food approves what it already believes. The judge sees real images only, once, and is
cached by what it was made from, so that every arm of a comparison is judged by the same one.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from modules import config
from modules.data.cache import cached_tensors, digest_tensor
from modules.data.views import plain_view, two_views
from modules.learning.encoder import build_encoder
from modules.optim import learning_rate
from modules.runtime import stream

BATCH, WIDTH, PEAK_LR = 64, 32, 2e-3
ALGORITHM = 1  # part of the cache key; raised when the same settings would train another judge


def load_judge(
    pixels_DHWC: torch.Tensor,
    labels_D: torch.Tensor,
    num_classes: int,
    steps: int,
    seed: int,
    cache_dir,
    say,
    progress=None,
    learning: config.Learning | None = None,
):
    """judge(images_BHWC uint8) -> (features_BF, predicted_B), trained on the given images or read from the cache.

    Args:
        steps: AdamW steps of 64 images with random views.
        learning: whose crop, jitter and gray its views have, so that it sees what the set's learner sees; None: the
            defaults.
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
    model,
    pixels_DHWC: torch.Tensor,
    labels_D: torch.Tensor,
    steps: int,
    seed: int,
    learning: config.Learning,
    progress,
) -> None:
    """Fit an encoder's classifier to real images by cross-entropy over both random views; AdamW, warm-up, cosine."""
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
