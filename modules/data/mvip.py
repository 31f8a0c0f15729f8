"""Reads an MVIP / EIBA tree (Fraunhofer IPK, doi 10.24406/fordatis/300, arXiv 2502.15448) in its published layout.

    <root>/<class>/meta.json                                            super_class, description
    <root>/<class>/train_data/<position>/<rotation>/cam_XX/XX_rgb.png   one sample, rotated on a table
    <root>/<class>/valid_data/<sample>/cam_XX/XX_rgb.png                other samples
    <root>/<class>/test_data/<sample>/cam_XX/XX_rgb.png
    beside each image: XX_rgb_mask_gen.png, XX_depth.png, XX_meta.json

The cameras of one rotation (or sample) show the same thing at the same time, so their images form a group. The ID
classes are drawn from a super class; its other classes are near-OOD, and the classes of other super classes far-OOD.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from modules.config import Data
from modules.data.files import Files
from modules.data.items import Index, Item
from modules.errors import ConfigError, DataError
from modules.runtime import stream

SPLIT_FOLDERS = {"train_data": "train", "valid_data": "val", "test_data": "test"}
BACKGROUND = "background"  # the position that shows the empty scene
LISTED = {"far_ood": ("test_data",)}  # role -> folders that are read; all of them for other roles


@dataclass(frozen=True)
class ClassMeta:
    """What meta.json says about a class."""

    super_classes: tuple[str, ...]
    keywords: tuple[str, ...]


def is_mvip(files: Files) -> bool:
    """Whether a folder below the root holds train_data, valid_data or test_data."""
    return any(SPLIT_FOLDERS.keys() & files.folders(name) for name in files.folders())


def read_mvip(files: Files, data: Data | None) -> Index:
    """The items of an MVIP tree. With `data` (config.Data) each has a role; without it all classes are read, role "".

    Far-OOD classes contribute only their test samples, and of a near-OOD class `splits.hold_out` takes the valid or the
    test samples: images that are scored against ID test samples must have been photographed like them.

    Raises:
        ConfigError: an unknown super class, or more classes wanted than there are.
        DataError: the meta.json of a class is missing or cannot be read.
    """
    metas = {name: read_meta(files.root / name) for name in files.folders()}
    roles = dict.fromkeys(metas, "") if data is None else choose_roles(metas, data)
    counts: Counter = Counter()
    items = []
    for label, role in sorted(roles.items()):
        for folder in LISTED.get(role, tuple(SPLIT_FOLDERS)):
            items += _split_items(files, label, folder, role, metas[label].keywords, counts)
    notes = []
    if data is not None:
        census = Counter(role for _, role in {(item.label, item.role) for item in items})  # classes that have images
        notes.append(
            f"MVIP: {census['id']} ID classes of super class {data.super_class or 'any'} (class_seed {data.class_seed}), "
            f"{census['near_ood']} near-OOD classes of the same, {census['far_ood']} far-OOD classes of others"
        )
        if idle := sorted(set(metas) - set(roles)):
            notes.append(f"MVIP: {len(idle)} classes have no role, neither drawn nor held out: {', '.join(idle)}")
    notes += [f"MVIP: {count} {what}" for what, count in sorted(counts.items())]
    return Index(str(files.root), "mvip", tuple(sorted(items, key=lambda item: item.path)), (), tuple(notes))


def read_meta(folder: Path) -> ClassMeta:
    """Super classes and keywords of a class; `super_class` and `description` are a text or a list of texts.

    Raises:
        DataError: meta.json is missing or not of that form.
    """
    path = folder / "meta.json"
    form = '{"super_class": "CarComponent", "description": "metal, round"}'
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: this MVIP class has no meta.json; bring it, of the form {form}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it must be JSON of the form {form}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: is no JSON object; it must be of the form {form}")
    super_classes = _texts(meta.get("super_class"), path, "super_class")
    if not super_classes:
        raise DataError(f"{path}: names no `super_class`; it must be of the form {form}")
    return ClassMeta(super_classes, _texts(meta.get("description", ""), path, "description"))


def choose_roles(metas: dict[str, ClassMeta], data: Data) -> dict[str, str]:
    """The role of each class, a pure function of the class names, their super classes and the settings.

    `near_ood_classes` are held out first. Of the remaining classes of `super_class`, sorted by name, `num_classes` are
    drawn with `class_seed` as ID. Without `near_ood_classes`, those not drawn are near-OOD. Classes outside of
    `super_class` (if it is empty: that share no super class with an ID class) are far-OOD. Others have no role and are
    left out.

    Raises:
        ConfigError: an unknown super class or class, or more classes wanted than there are.
    """
    known = sorted({name for meta in metas.values() for name in meta.super_classes})
    if data.super_class and data.super_class not in known:
        raise ConfigError(f"`data.super_class` is {data.super_class!r}; this tree has {', '.join(known)}")
    if unknown := sorted(set(data.near_ood_classes) - set(metas)):
        raise ConfigError(f"`data.near_ood_classes` names {', '.join(unknown)}; this tree has no such class")
    family = [
        label for label in sorted(metas) if not data.super_class or data.super_class in metas[label].super_classes
    ]
    candidates = [label for label in family if label not in data.near_ood_classes]
    wanted = data.num_classes or len(candidates)
    if wanted > len(candidates):
        raise ConfigError(
            f"`data.num_classes` is {wanted}, but super class {data.super_class or 'any'} has {len(candidates)} classes "
            "that are not held out; lower it"
        )
    order = torch.randperm(len(candidates), generator=stream(data.class_seed, "mvip-classes")).tolist()
    chosen = {candidates[i] for i in order[:wanted]} if data.num_classes else set(candidates)
    near = set(data.near_ood_classes) or set(candidates) - chosen
    families = {data.super_class} if data.super_class else {s for label in chosen for s in metas[label].super_classes}
    roles = {}
    for label, meta in metas.items():
        if label in chosen:
            roles[label] = "id"
        elif label in near and (data.near_ood_classes or families & set(meta.super_classes)):
            roles[label] = "near_ood"
        elif not families & set(meta.super_classes):
            roles[label] = "far_ood"
    return roles


def _split_items(
    files: Files, label: str, folder: str, role: str, keywords: tuple[str, ...], counts: Counter
) -> list[Item]:
    if folder not in files.folders(label):
        counts[f"classes without {folder}"] += 1
        return []
    top, items = f"{label}/{folder}", []
    for name in files.folders(top):
        if folder == "train_data":
            scenes = [f"{top}/{name}/{rotation}" for rotation in files.folders(f"{top}/{name}")]
        else:
            scenes = [f"{top}/{name}"]
        for scene in scenes:
            found = _scene_items(files, scene, counts)
            if folder == "train_data" and name == BACKGROUND:
                counts["images of the position `background` left out: they show the empty scene"] += len(found)
                continue
            items += [
                Item(path, label, role, SPLIT_FOLDERS[folder], group=scene, mask=mask, keywords=keywords)
                for path, mask in found
            ]
    return items


def _scene_items(files: Files, scene: str, counts: Counter) -> list[tuple[str, str]]:
    """(image, mask) paths of a scene's cameras; the mask is "" if there is none."""
    found = []
    for camera in files.folders(scene):
        stem = f"{scene}/{camera}/{re.sub('^cam_?', '', camera)}"
        image, mask = f"{stem}_rgb.png", f"{stem}_rgb_mask_gen.png"
        if reason := files.obstacle(image):
            counts[f"camera folders left out because the _rgb.png {reason}"] += 1
        elif reason := files.obstacle(mask):
            counts[f"images without a mask, because its file {reason}"] += 1
            found.append((image, ""))
        else:
            found.append((image, mask))
    return found


def _texts(value: object, path: Path, key: str) -> tuple[str, ...]:
    """The non-empty parts of a text or of a list of texts, divided at "," ";" or line ends."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: `{key}` is {value!r}; it must be a text or a list of texts")
    return tuple(word.strip() for text in texts for word in re.split(r"[,;\n]", text) if word.strip())
