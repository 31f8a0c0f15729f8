"""The image sets of a run, decoded once: train, val, test, and the OOD sets for choosing settings and for testing.

Training, inversion and generation get only `train`; val serves to choose settings; test is read once, at the end.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from modules.config import Data
from modules.data.cache import digest_of
from modules.data.images import Images, load_at_sizes
from modules.data.index import read_far_ood, read_index
from modules.data.items import Index, Item
from modules.errors import DataError, first_of

SETS = (  # (name, role, split)
    ("train", "id", "train"),
    ("val", "id", "val"),
    ("test", "id", "test"),
    ("near_ood_val", "near_ood", "val"),
    ("near_ood_test", "near_ood", "test"),
    ("far_ood_test", "far_ood", "test"),  # the set's own, such as the other super classes of an MVIP tree
)

JUDGED_IMAGES = 256  # about as many val images are kept at generation size, for the token report and the warning light
JUDGED_PER_CLASS = 8  # but at least this many per class, as far as it has them


@dataclass(frozen=True)
class ImageSets:
    """Decoded images by name: those of train, val, test, near_ood_val, near_ood_test and far_ood_test that exist.

    `at_generation` holds the train images, in the same rows, and some val images of each class at the size of
    generation. If that is the stored size, it holds the same objects as `images`.
    """

    index: Index
    far_index: Index | None
    images: dict[str, Images]
    labels_D: torch.Tensor  # int64, class of each train image
    generation_size: int | None = None  # pixels a side; None: nothing is generated
    at_generation: dict[str, Images] = field(default_factory=dict)  # train and val, if something is generated

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

    def scored(self, test: bool) -> dict[str, Images]:
        """The sets to score, by name; without `test` only those on which settings may be chosen."""
        return {name: found for name, found in self.images.items() if test or not name.endswith("test")}

    def labels(self, name: str) -> torch.Tensor:
        """Class ids (int64) of an ID set."""
        return torch.tensor(self.index.label_ids(self.images[name].items))

    def sources(self) -> Images:
        """The train images at the size of generation.

        Raises:
            DataError: one of them is smaller and would have to be enlarged.
        """
        train, size = self.at_generation["train"], self.generation_size
        small = [(side, item.path) for side, item in zip(train.sides, train.items, strict=True) if side < size]
        if small:
            named = first_of([f"{path} ({side} px)" for side, path in sorted(small)])
            raise DataError(
                f"{self.index.root}: {len(small)} of {len(train.items)} train images are smaller than the {size} px at "
                f"which the pipeline generates: {named}; remove them (data.on_bad_image=skip leaves out broken files "
                "only), or set pipeline.resolution or pipeline.path to a smaller one"
            )
        return train

    def val_at_generation(self) -> tuple[Images, list[int]]:
        """The val images at the size of generation, and the rows of those that were not enlarged to it."""
        val = self.at_generation["val"]
        return val, [row for row, side in enumerate(val.sides) if side >= self.generation_size]

    def changes(self, before: dict) -> str:
        """Which files differ from an earlier `summary` in content, label, set or group, in words; "" if none does."""
        now, then = self.summary()["files"], before.get("files", {})
        found = {
            "new": sorted(now.keys() - then.keys()),
            "gone": sorted(then.keys() - now.keys()),
            "changed": sorted(path for path in now.keys() & then.keys() if now[path] != then[path]),
        }
        return "; ".join(f"{what}: {first_of(paths)}" for what, paths in found.items() if paths)

    def summary(self) -> dict:
        """The content of data.json: every file with its hash and split, what was skipped and why, what was decided."""
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


def load_sets(
    data: Data,
    seed: int,
    *,
    masks: bool,
    generation_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ImageSets:
    """Load all images of a run at `data.image_size`, uint8. Far-OOD is `data.far_ood_root` if set, else the set's own.

    Args:
        masks: read the object masks of the train images.
        generation_size: pixels a side at which images are generated; None: none are.

    Raises:
        ConfigError, DataError: as `read_index` and `load_images`, or an ID split has no images.
    """
    index = read_index(data, seed)
    far_index = read_far_ood(data)
    chosen = {name: index.select(role, split) for name, role, split in SETS}
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
    kept = {}  # name -> positions of the images that are also kept at the size of generation
    if generation_size is not None and generation_size != data.image_size:
        kept = {"train": range(len(chosen["train"])), "val": _some_of_each_class(chosen["val"], len(index.classes))}
    total, before, images, at_generation = sum(len(items) for _, _, items in sources), 0, {}, {}
    for name, source, items in sources:
        sizes = {data.image_size: range(len(items))}
        if name in kept:
            sizes[generation_size] = kept[name]
        images[name], *larger = load_at_sizes(
            source, items, sizes, data, _offset(progress, before, total, name),
            masks=(name == "train") if masks else False,
        )  # fmt: skip
        if generation_size is not None and name in ("train", "val"):
            at_generation[name] = larger[0] if larger else images[name]
        before += len(items)
    labels_D = torch.tensor(index.label_ids(images["train"].items))
    return ImageSets(index, far_index, images, labels_D, generation_size, at_generation)


def _some_of_each_class(items: tuple[Item, ...], num_classes: int) -> list[int]:
    """Positions of the first images of each class, about JUDGED_IMAGES in total."""
    most, seen, positions = max(JUDGED_PER_CLASS, -(-JUDGED_IMAGES // num_classes)), Counter(), []
    for position, item in enumerate(items):
        seen[item.label] += 1
        if seen[item.label] <= most:
            positions.append(position)
    return positions


def _offset(
    progress: Callable[[int, int, str], None] | None, before: int, total: int, name: str
) -> Callable[[int, int, str], None] | None:
    if progress is None:
        return None
    return lambda done, _total, note="": progress(before + done, total, note or name)
