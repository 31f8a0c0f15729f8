"""Feature sets with known structure, for the tests of this folder."""

import torch

from modules.evaluation.evaluate import FeatureSet


def clusters(
    name: str,
    classes: range,
    images: int = 12,
    *,
    groups: int = 4,
    width: int = 16,
    spread: float = 1.5,
    is_ood: bool = False,
) -> FeatureSet:
    """`images` rows a class about fixed random directions, spread over `groups` groups a class; -1 labels if is_ood."""
    directions = torch.randn(64, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    labels = torch.tensor([label for label in classes for _ in range(images)])
    features = directions[labels] + spread * torch.randn(len(labels), width, generator=generator)
    return FeatureSet(
        features_DF=features,
        labels_D=torch.full_like(labels, -1) if is_ood else labels,
        paths=tuple(f"{name}/{row}.jpg" for row in range(len(labels))),
        groups=tuple(f"{name}-{label}-{row % groups}" for row, label in enumerate(labels.tolist())),
    )


def sets(classes: int = 4, **options) -> dict[str, FeatureSet]:
    """Train, val and test of the same classes, near-OOD val and test of others, far-OOD of still others."""
    known = range(classes)
    return {
        "train": clusters("train", known, 24, **options),
        "val": clusters("val", known, **options),
        "test": clusters("test", known, **options),
        "near_ood_val": clusters("near val", range(20, 22), is_ood=True, **options),
        "near_ood_test": clusters("near test", range(22, 25), is_ood=True, **options),
        "far_ood_test": clusters("far test", range(40, 43), is_ood=True, **options),
    }
