"""The image sets of a run, decoded once: train, val, test, and the OOD sets kept for choosing and for testing.

Training, inversion and generation are handed `train` alone; val chooses settings; test is read once, at the end.
"""

from dataclasses import dataclass, replace

import torch

from modules.config import Data
from modules.data.cache import digest_of
from modules.data.images import Images, load_images
from modules.data.index import Index, read_far_ood, read_index
from modules.errors import DataError

SPLITS = (  # name -> (role, split)
    ("train", "id", "train"),
    ("val", "id", "val"),
    ("test", "id", "test"),
    ("near_ood_val", "near_ood", "val"),
    ("near_ood_test", "near_ood", "test"),
    ("far_ood_test", "far_ood", "test"),  # the set's own, as an MVIP tree's other super classes
)


@dataclass(frozen=True)
class ImageSets:
    """Decoded images by name: train, val, test, near_ood_val, near_ood_test, far_ood_test; those that exist."""

    index: Index
    far_index: Index | None
    images: dict[str, Images]
    labels_D: torch.Tensor  # int64, class of each train image

    @property
    def train(self) -> Images:
        return self.images["train"]

    @property
    def digest(self) -> str:
        """sha256 over every set: path, content, label, group and mask file of each image."""
        return digest_of(
            {
                name: [[[item.path, item.label, item.group, item.mask] for item in found.items], found.digests]
                for name, found in self.images.items()
            }
        )

    def labels(self, name: str) -> torch.Tensor:
        """Class ids (int64) of an ID set."""
        return torch.tensor(self.index.label_ids(self.images[name].items))

    def summary(self) -> dict:
        """What data.json says: every file with its hash and split, what was skipped and why, what was decided."""
        files = {}
        for name, images in self.images.items():
            other = name == "far_ood_test" and self.far_index is not None
            root = f"{self.far_index.root}/" if other else ""  # another set may use the same paths
            for item, digest in zip(images.items, images.digests, strict=True):
                files[root + item.path] = {"label": item.label, "set": name, "group": item.group, "sha256": digest}
        return {
            "root": self.index.root,
            "far_ood_root": self.far_index.root if self.far_index else "",
            "kind": self.index.kind,
            "classes": list(self.index.classes),
            "notes": list(self.index.notes) + [note for images in self.images.values() for note in images.notes],
            "digest": self.digest,
            "skipped": [list(entry) for images in self.images.values() for entry in images.skipped],
            "files": files,
        }


def load_sets(data: Data, seed: int, *, masks: bool, progress=None) -> ImageSets:
    """Every image of a run at `data.image_size`, uint8; far-OOD are those of `data.far_ood_root`, else the set's own.

    Args:
        masks: object masks are needed of every train image.

    Raises:
        ConfigError, DataError: as `read_index` and `load_images`; an ID split without images.
    """
    index = read_index(data, seed)
    far_index = read_far_ood(data)
    chosen = {name: index.select(role, split) for name, role, split in SPLITS}
    for name in ("train", "val", "test"):
        if not chosen[name]:
            raise DataError(
                f"{index.root}: the {name} split holds no image; give {name} images, or change data.val_fraction"
            )
    if far_index is not None and (own := chosen.pop("far_ood_test")):
        note = f"far-OOD: {len(own)} images of the set itself are left out, because data.far_ood_root names another"
        index = replace(index, notes=(*index.notes, note))
    sources = [(name, index, items) for name, items in chosen.items() if items]
    if far_index is not None:
        sources.append(("far_ood_test", far_index, far_index.items))
    total, before, images = sum(len(items) for _, _, items in sources), 0, {}
    for name, source, items in sources:
        images[name] = load_images(
            source, items, data.image_size, data, _offset(progress, before, total, name),
            masks=(name == "train") if masks else False,
        )  # fmt: skip
        before += len(items)
    return ImageSets(index, far_index, images, torch.tensor(index.label_ids(images["train"].items)))


def load_sources(sets: ImageSets, data: Data, resolution: int, *, masks: bool, progress=None) -> Images:
    """The train images at the resolution of generation; the same object where that is `data.image_size`.

    Raises:
        DataError: an image smaller than the pipeline's resolution.
    """
    train = sets.train
    small = [(side, item.path) for side, item in zip(train.sides, train.items, strict=True) if side < resolution]
    if small:
        side, path = min(small)
        raise DataError(
            f"{sets.index.root}: {len(small)} of {len(train.items)} train images are smaller than the {resolution} px at "
            f"which the pipeline generates, the smallest {path} with {side} px; remove them, or set pipeline.resolution "
            "or pipeline.path to a smaller one"
        )
    if resolution == data.image_size:
        return train
    whole = replace(data, on_bad_image="fail")  # a row left out here would shift every later one against its label
    return load_images(sets.index, train.items, resolution, whole, progress, masks=masks)


def _offset(progress, before: int, total: int, name: str):
    if progress is None:
        return None
    return lambda done, _total, note="": progress(before + done, total, note or name)
