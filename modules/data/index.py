"""Reads, splits and checks an image set of any supported kind: the only way from `data.root` to an `Index`.

Everything that later steps rely on is checked here, by names only, before an image is decoded or a GPU is touched:
labels are distinct, no class is both ID and near-OOD, no group is divided among splits, every class can be learned.
Every decision (splits made, classes held out, images drawn) becomes a line of `notes`.
"""

import difflib
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace

import yaml

from modules.config import Data
from modules.data import splits
from modules.data.items import ROLES, SPLITS, Index, Item
from modules.data.sources import identity, read_source
from modules.errors import ConfigError, DataError


def read_raw(root: str) -> Index:
    """The image set below `root` as it is declared: role, split and label may be ""; for captioned packs.

    Raises:
        ConfigError, DataError: as `sources.read_source`.
    """
    source = read_source(str(root))
    return replace(source, classes=tuple(sorted({item.label for item in source.items if item.label.strip()})))


def read_index(data: Data, seed: int) -> Index:
    """The image set that `data` describes; every item has a role and a split, and `classes` are the ID classes.

    Raises:
        ConfigError: a setting does not fit this set.
        DataError: the set is missing, empty or inconsistent; the message names the file, class or group.
    """
    source = read_source(data.root, data)
    _check_settings(data, source)
    _check_labels(source.items, source.root)
    items = [replace(item, role=item.role or "id") for item in source.items]
    _check_one_role(items)
    items, held_out_notes = _with_near_ood(items, data, source.kind)
    id_items, split_notes = splits.complete_splits([i for i in items if i.role == "id"], seed, data.val_fraction)
    declared = {item.path: item.split for item in source.items}
    near, shared_notes = splits.without_shared_groups([i for i in items if i.role == "near_ood"], id_items, declared)
    others = [_with_default_split(item) for item in items if item.role not in ("id", "near_ood")] + near
    _check_id_classes(id_items)
    _check_ood_classes(others)
    _check_groups([*id_items, *others])
    notes = [*source.notes, *held_out_notes, *split_notes, *shared_notes, *_unjudged_classes(id_items)]
    if data.shots_per_class:
        id_items, line = splits.few_shot(id_items, data.shots_per_class, seed)
        notes.append(line)
    items = tuple(sorted([*id_items, *others], key=lambda item: item.path))
    classes = tuple(sorted({item.label for item in id_items}))
    return Index(source.root, source.kind, items, classes, (*notes, *_census(items)))


def read_far_ood(data: Data) -> Index | None:
    """The ID test images of `data.far_ood_root`, or all its ID images if it has no test split, as far-OOD test images.

    None if no `data.far_ood_root` is set.

    Raises:
        ConfigError: it is the same as `data.root`.
        DataError: the set is missing, empty or unreadable, or has no ID image.
    """
    if not data.far_ood_root:
        return None
    if identity(data.far_ood_root, "data.far_ood_root") == identity(data.root):
        raise ConfigError(f"`data.far_ood_root` is `data.root` itself ({data.root}); name another image set")
    source = read_source(data.far_ood_root, setting="data.far_ood_root")
    items = [item for item in source.items if item.role in ("", "id")]
    tested = [item for item in items if item.split == "test"]
    which = "test images" if tested else "images (it declares no test split)"
    items = tuple(replace(item, role="far_ood", split="test") for item in tested or items)
    if not items:
        raise DataError(f"{source.root}: holds no ID image that could be far-OOD; name another `data.far_ood_root`")
    note = f"far-OOD: {len(items)} {which} of {source.root}"
    return Index(source.root, source.kind, items, (), (*source.notes, note))


def _as_yaml_reads(word: str) -> str:
    """The text of a setting into which `word` was written without quotes: YAML changes numbers and truth values."""
    try:
        return str(yaml.safe_load(word)) if re.fullmatch(r"[\w.+-]+", word) else word
    except (ValueError, yaml.YAMLError):  # such as 4711-23-99, which looks like a date but is not one
        return word


def _with_near_ood(items: list[Item], data: Data, kind: str) -> tuple[list[Item], list[str]]:
    """The items, with held-out classes made near-OOD and divided into val and test classes, and notes."""
    declared_near = [item for item in items if item.role == "near_ood"]
    if data.near_ood_classes and kind != "mvip":
        if declared_near:
            raise ConfigError("`data.near_ood_classes` is set, but this set declares near-OOD classes itself; empty it")
        id_labels = sorted({item.label for item in items if item.role == "id"})
        for name in data.near_ood_classes:
            if name not in id_labels:
                close = difflib.get_close_matches(name, id_labels, 1)
                read = [label for label in id_labels if _as_yaml_reads(label) == name]
                hint = f"did you mean {close[0]!r}?" if close else f"classes are {', '.join(id_labels[:20])}"
                hint = f"to YAML that is what {read[0]} says: quote it, as in ['{read[0]}']" if read else hint
                raise ConfigError(f"`data.near_ood_classes` names {name!r}, which is no ID class; {hint}")
        held = set(data.near_ood_classes)
        items = [replace(item, role="near_ood") if item.label in held else item for item in items]
        declared_near = [item for item in items if item.role == "near_ood"]
    elif kind != "mvip" and all(item.split for item in declared_near):
        return items, [] if declared_near else ["near-OOD: none, because no class is held out (data.near_ood_classes)"]
    elif kind != "mvip" and any(item.split for item in declared_near):
        first = next(item.path for item in declared_near if not item.split)
        raise DataError(f"{first}: near-OOD without a split while others have one; fill the `split` column or leave it")
    if not declared_near:
        return items, ["near-OOD: none, because every class of the super class is an ID class; lower data.num_classes"]
    id_items = [item for item in items if item.role == "id"]
    declared = {item.split for item in id_items} - {""}
    if not any(item.split for item in declared_near):
        declared = set()
    named = data.near_ood_classes if kind == "mvip" else None  # in an MVIP tree the other classes were left by the draw
    near, line = splits.hold_out(declared_near, data.near_ood_val_fraction, declared, named)
    return [item for item in items if item.role != "near_ood"] + near, [line]


def _with_default_split(item: Item) -> Item:
    return replace(item, split=item.split or {"pretrain": "train", "far_ood": "test"}.get(item.role, ""))


def _check_settings(data: Data, source: Index) -> None:
    for name in ("super_class", "num_classes"):
        if getattr(data, name) and source.kind != "mvip":
            raise ConfigError(
                f"`data.{name}` is {getattr(data, name)!r}, but only an MVIP tree has super classes and {source.root} "
                f"is read as {source.kind}; leave it out"
            )


def _check_labels(items: tuple[Item, ...], root: str) -> None:
    for item in items:
        if not item.label.strip():
            raise DataError(f"{root}: {item.path} has an empty label; name its class in the `label` column")
    spellings = defaultdict(set)
    for item in items:
        spellings["".join(unicodedata.normalize("NFKC", item.label).split()).casefold()].add(item.label)
    for names in spellings.values():
        if len(names) > 1:
            listed = " and ".join(repr(name) for name in sorted(names))
            raise DataError(f"{root}: the labels {listed} differ only in case or spaces; write the class one way")


def _check_one_role(items: list[Item]) -> None:
    roles = defaultdict(set)
    for item in items:
        roles[item.label].add(item.role)
    for label, found in sorted(roles.items()):
        if len(found) > 1:
            raise DataError(
                f"class {label!r} has the roles {' and '.join(sorted(found))}; a class is ID or near-OOD, never both: "
                "give all its images one role"
            )


def _check_id_classes(items: list[Item]) -> None:
    counts = defaultdict(Counter)
    for item in items:
        counts[item.label][item.split] += 1
    if len(counts) < 2:
        raise DataError(f"there are {len(counts)} ID classes ({', '.join(counts)}); learning needs two or more")
    for label, by_split in sorted(counts.items()):
        if not by_split["train"]:
            held = " and ".join(split for split in SPLITS if by_split[split])
            raise DataError(f"class {label!r} is in {held} only; add train images or leave the class out")
        if by_split["train"] == 1:
            raise DataError(f"class {label!r} has one train image; two are needed for a positive pair: add images")


def _unjudged_classes(items: list[Item]) -> list[str]:
    """A note for each of val and test that lacks an ID class: its figures then say nothing about that class."""
    labels = {item.label for item in items}
    notes = []
    for split in ("val", "test"):
        if lacking := sorted(labels - {item.label for item in items if item.split == split}):
            notes.append(
                f"{len(lacking)} ID classes have no {split} image, so {split} figures are of the others: {', '.join(lacking)}"
            )
    return notes


def _check_ood_classes(items: list[Item]) -> None:
    splits_of = defaultdict(set)
    for item in items:
        if item.role in ("near_ood", "far_ood"):
            if item.split == "train":
                raise DataError(
                    f"{item.path}: {item.role} in the train split; real OOD images are only for val and test"
                )
            splits_of[item.label].add(item.split)
    for label, found in sorted(splits_of.items()):
        if len(found) > 1:
            raise DataError(
                f"the OOD class {label!r} is in val and test; classes that settings are chosen on must not be those of "
                "the test: give all its images one split, or leave the split of all near-OOD rows empty"
            )


def _check_groups(items: list[Item]) -> None:
    first: dict[str, Item] = {}
    for item in items:
        known = first.setdefault(item.group_id, item)
        if known.split != item.split:
            raise DataError(
                f"group {item.group_id!r} is in {known.split} ({known.path}) and in {item.split} ({item.path}); put it "
                "into one split, or, if groups are numbered within each class, write them as <class>/<number> (a group is "
                "what the `group` or `model` column says, or a folder inside a class folder)"
            )


def _census(items: tuple[Item, ...]) -> list[str]:
    """One line per role: the number of classes, and of images and groups in each split."""
    lines = []
    for role in ROLES:
        of_role = [item for item in items if item.role == role]
        if of_role:
            parts = []
            for split in SPLITS:
                chosen = [item for item in of_role if item.split == split]
                if chosen:
                    parts.append(f"{split} {len(chosen)} images of {len({i.group_id for i in chosen})} groups")
            lines.append(f"{role}: {len({item.label for item in of_role})} classes; {', '.join(parts)}")
    return lines
