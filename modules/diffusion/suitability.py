"""Measures whether generated images are useful: do they show their class, are they diverse, are they more than copies?

A learner that judged its own training data would confirm what it already believes, so the judge is passed in: a
callable classifier that was fitted to the real train images before training and then fixed. Distances are Euclidean
distances of its features. Since features have no natural unit, they are also given as a share of the spread of the real
images: 0 means a copy of the source, 1 means as far away as another real image of the class.

Shapes: N generated images, D real images, F features, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images_BHWC uint8 -> features_BF, predicted_B
ALL = "all"  # stands for every class in a row


@dataclass(frozen=True)
class Judged:
    """A judge's features and predictions for a set of images."""

    features_NF: torch.Tensor  # float32, CPU
    predicted_N: torch.Tensor  # int64, CPU

    def __len__(self) -> int:
        return len(self.predicted_N)


@torch.no_grad()
def judge_images(judge: Judge, images_NHWC: torch.Tensor, batch_size: int = 256) -> Judged:
    """The judge's features and predicted classes of uint8 images, on the CPU.

    Raises: ValueError for images that are not uint8 [N, H, W, 3], and for a judge that does not return a row per image.
    """
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(
            f"images_NHWC: {tuple(images_NHWC.shape)} {images_NHWC.dtype}, expected uint8 images [N, H, W, 3]"
        )
    features, predicted = [], []
    for rows in images_NHWC.split(batch_size):
        features_BF, predicted_B = judge(rows)
        if features_BF.shape[:1] != predicted_B.shape or len(predicted_B) != len(rows):
            raise ValueError(
                f"judge: features {tuple(features_BF.shape)} and classes {tuple(predicted_B.shape)} for {len(rows)} "
                "images, expected one row each"
            )
        features.append(features_BF.float().cpu())
        predicted.append(predicted_B.long().cpu())
    return Judged(torch.cat(features), torch.cat(predicted))


def suitability(
    generated: Judged,
    labels_N: Sequence[int],
    recipes_N: Sequence[str],
    sources_N: Sequence[int],
    real: Judged,
    real_labels_D: Sequence[int],
    classes: Sequence[str],
) -> list[dict]:
    """One row per (recipe, class) that occurs, then one row per recipe with class "all".

    recipe, class, images
    agreement           share of images whose predicted class is that of their source
    real_agreement      the same for the given real images
    agreement_share     agreement / real_agreement
    diversity           median distance of two generated images of a class and recipe
    real_diversity      median distance of two real images of the class
    diversity_share     diversity / real_diversity
    distance            median distance of a generated image to its source
    distance_share      median of that distance / real_diversity of its class

    In the row of class "all", diversity is the median over all pairs within a class, and real_diversity and
    real_agreement are over the real images of the classes that occur. Diversity of fewer than two images is None, and
    so is a share whose denominator is zero. For near-OOD recipes a low agreement means that the class was left behind.

    Args:
        labels_N, recipes_N, sources_N: for each image the class of its source, its recipe, and its source's row in
            `real`.

    Raises:
        ValueError: the lengths do not match, or a label is not the class of the image's source.
    """
    labels, sources = torch.as_tensor(labels_N).long(), torch.as_tensor(sources_N).long()
    real_labels = torch.as_tensor(real_labels_D).long()
    lengths = (len(generated), len(labels), len(recipes_N), len(sources))
    if len(set(lengths)) > 1 or len(real) != len(real_labels):
        raise ValueError(
            f"generated, labels_N, recipes_N, sources_N: lengths {lengths}; real: {len(real)}, {len(real_labels)}"
        )
    if not torch.equal(real_labels[sources], labels):
        raise ValueError("sources_N: an image's label is not that of its source; labels_N carries the source's class")
    distance = (generated.features_NF - real.features_NF[sources]).norm(dim=1)
    real_pairs = [_pairs(real.features_NF[real_labels == c]) for c in range(len(classes))]
    spread = torch.tensor([_median(pairs) or float("nan") for pairs in real_pairs])
    table = []
    for recipe in sorted(set(recipes_N)):
        of_recipe = torch.tensor([other == recipe for other in recipes_N])
        present = sorted(set(labels[of_recipe].tolist()))
        for members in [[c] for c in present] + [present]:
            rows = of_recipe & torch.isin(labels, torch.tensor(members))
            real_rows = torch.isin(real_labels, torch.tensor(members))
            pairs = torch.cat([_pairs(generated.features_NF[of_recipe & (labels == c)]) for c in members])
            row = {"recipe": recipe, "class": classes[members[0]], "images": int(rows.sum())}
            table.append(
                row
                | _agreement(
                    generated.predicted_N[rows], labels[rows], real.predicted_N[real_rows], real_labels[real_rows]
                )
                | _spread(pairs, torch.cat([real_pairs[c] for c in members]), distance[rows], spread[labels[rows]])
            )
        table[-1]["class"] = ALL
    return sorted(table, key=lambda row: row["class"] == ALL)


def _agreement(
    predicted: torch.Tensor, labels: torch.Tensor, real_predicted: torch.Tensor, real_labels: torch.Tensor
) -> dict:
    agreement = (predicted == labels).float().mean().item()
    real_agreement = (real_predicted == real_labels).float().mean().item()
    return {
        "agreement": agreement,
        "real_agreement": real_agreement,
        "agreement_share": agreement / real_agreement if real_agreement else None,
    }


def _spread(
    pairs: torch.Tensor, real_pairs: torch.Tensor, distance: torch.Tensor, spread_of_class: torch.Tensor
) -> dict:
    diversity, real_diversity = _median(pairs), _median(real_pairs)
    shares = (distance / spread_of_class)[spread_of_class > 0]
    return {
        "diversity": diversity,
        "real_diversity": real_diversity,
        "diversity_share": None if diversity is None or not real_diversity else diversity / real_diversity,
        "distance": _median(distance),
        "distance_share": _median(shares),
    }


def _pairs(features_NF: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs of rows, [N (N-1) / 2]."""
    return torch.nn.functional.pdist(features_NF)


def _median(values: torch.Tensor) -> float | None:
    """The median (for an even number the mean of the middle two); None if there are no values."""
    return float(np.median(values.numpy())) if len(values) else None  # torch.quantile is limited to 16M values
