"""Decides which images are for learning, for choosing settings and for testing: splits by group, held-out classes,
few-shot draws.

Images of one group (a model, a sample) show the same thing, so a split never divides a group. There are two kinds of
draws. The test split and the division of near-OOD classes depend on names only, so every seed of a comparison is tested
on the same images. The validation split and the few-shot draw depend on names and the seed only, so all arms with the
same seed learn from the same images.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

import torch

from modules.data.items import Item
from modules.errors import DataError
from modules.runtime import stream

SAME_FOR_EVERY_SEED = 0


def hold_out(
    items: list[Item], val_fraction: float, declared: set[str], named: Collection[str] | None = None
) -> tuple[list[Item], str]:
    """Divide near-OOD classes into val classes and test classes; returns their items, and a line that says how.

    A val class contributes its images of the val split, and a test class those of the test split, if ID images have
    that split (`declared`). If that split will be made from the train split, the class contributes its images of the
    train split or without a split: images that are scored against ID images must have been taken like them.

    named: classes that the user chose as near-OOD (None: all). Any other class without an image in the split that it
    needs is left out, which the line says, and the remaining classes are divided again.

    Raises:
        DataError: there are fewer than two classes, or a named one has no image in the split that it needs.
    """
    labels = sorted({item.label for item in items})
    if len(labels) < 2:
        raise DataError(
            f"near-OOD has the one class {', '.join(labels)}; it needs two or more, because the classes that settings "
            "are chosen on must not be those of the test: add a class to `data.near_ood_classes`, or lower "
            "`data.num_classes` where they are what that leaves"
        )
    count = min(max(1, round(val_fraction * len(labels))), len(labels) - 1)
    order = torch.randperm(len(labels), generator=stream(SAME_FOR_EVERY_SEED, "near-ood-classes")).tolist()
    val_labels = {labels[i] for i in order[:count]}
    kept = []
    for label in labels:
        split = "val" if label in val_labels else "test"
        wanted = {split} if split in declared else {"", "train"}
        chosen = [replace(item, split=split) for item in items if item.label == label and item.split in wanted]
        if not chosen and named is not None and label not in named:
            rest, line = hold_out([item for item in items if item.label != label], val_fraction, declared, named)
            return rest, f"{line}; without {label!r}, which has no image in the {split} split"
        if not chosen:
            raise DataError(
                f"the near-OOD class {label!r} has no image in the {split} split, which its images must come from; "
                "add some or choose another class"
            )
        kept += chosen
    return kept, f"near-OOD classes: {count} for val, {len(labels) - count} others for test; the same for every seed"


def without_shared_groups(
    near: list[Item], id_items: list[Item], declared: dict[str, str]
) -> tuple[list[Item], list[str]]:
    """The near-OOD items whose group is in no other split, and a line about those left out, if any.

    A scene that shows several classes is one group, and holding out one of its classes divides it. So an image whose
    split was chosen by `hold_out` is kept only if the ID images of its group are in the same split, or there are none.
    If a group has only near-OOD images and is in both val and test, it keeps those of one split, alternating between
    groups. Items with the split that the set itself declares are always kept.

    Args:
        id_items: the ID items, each with its split.
        declared: path -> split ("": none) as the set declares it.

    Raises:
        DataError: val or test has no near-OOD image left.
    """
    split_of = {item.group_id: item.split for item in id_items}
    chosen = [item for item in near if item.split != declared[item.path]]
    groups = {split: {item.group_id for item in chosen if item.split == split} for split in ("val", "test")}
    divided = sorted((groups["val"] & groups["test"]) - split_of.keys())
    split_of |= {group: ("test", "val")[i % 2] for i, group in enumerate(divided)}
    left_out = {item.path: item for item in chosen if split_of.get(item.group_id, item.split) != item.split}
    if not left_out:
        return near, []
    kept = [item for item in near if item.path not in left_out]
    example = next(iter(left_out.values())).group_id
    for split in ("val", "test"):
        if not any(item.split == split for item in kept):
            labels = sorted({item.label for item in near if item.split == split})
            raise DataError(
                f"near-OOD has no image left for {split}: every group of {', '.join(labels)} (such as {example!r}) has "
                "images of other classes in another split; hold out other classes, or add images of other scenes"
            )
    line = (
        f"near-OOD: {len(left_out)} of {len(near)} images left out, because images of their group (such as {example!r}) "
        "are in another split"
    )
    if gone := sorted({item.label for item in near} - {item.label for item in kept}):
        line += f"; nothing is left of {', '.join(gone)}"
    return kept, [line]


def complete_splits(items: list[Item], seed: int, val_fraction: float) -> tuple[list[Item], list[str]]:
    """The ID items, each with a split, and a line for each split that had to be made.

    A missing test split is made first, the same for every seed, then a missing val split, drawn from `seed`. Each takes
    `val_fraction` of the train groups of every class, and at least one.

    Raises:
        DataError: there are no items, some have a split and others none, there is no train split, or as `draw_groups`.
    """
    declared = {item.split for item in items}
    if not items:
        raise DataError("there is no ID class: every one is held out or has another role; leave two or more to learn")
    if "" in declared and len(declared) > 1:
        first = next(item.path for item in items if not item.split)
        raise DataError(f"{first}: has no split while others have one; fill the `split` column everywhere or nowhere")
    if "" not in declared and "train" not in declared:
        raise DataError(f"no image is in the train split, only in {', '.join(sorted(declared))}; add train images")
    items = [replace(item, split=item.split or "train") for item in items]
    notes = []
    missing = [split for split in ("test", "val") if split not in declared]
    for i, split in enumerate(missing):
        split_seed = SAME_FOR_EVERY_SEED if split == "test" else seed
        train = [item for item in items if item.split == "train"]
        moved = draw_groups(train, f"{split}-split", split_seed, val_fraction, keep=len(missing) - i)
        moving = {item.path for item in train if item.group_id in moved}
        items = [replace(item, split=split) if item.path in moving else item for item in items]
        why = "the same for every seed" if split == "test" else f"drawn from seed {seed}"
        notes.append(
            f"{split} split: none was declared; made from {val_fraction:.0%} of the groups of every class "
            f"({len(moved)} groups, {len(moving)} images), {why}"
        )
    return items, notes


def draw_groups(items: list[Item], name: str, seed: int, fraction: float, keep: int) -> set[str]:
    """Draw groups so that each class gives up `fraction` of its groups, and at least one.

    Each class keeps at least `keep` groups, and one more if every image is its own group: two images must be left to
    learn from after the splits still to be made have taken their groups. A group that holds several classes counts for
    each of them; whether it is drawn is decided once, for the first of them in sorted order.

    Raises:
        DataError: a class has too few groups or images for that.
    """
    groups_of, images_of = defaultdict(set), defaultdict(list)
    for item in items:
        groups_of[item.label].add(item.group_id)
        images_of[item.label].append(item)
    drawn: set[str] = set()
    settled: set[str] = set()
    for label, group_ids in sorted(groups_of.items()):
        images = images_of[label]
        if len(group_ids) <= keep or len(images) < keep + 2:
            raise DataError(_too_few(label, images, len(group_ids), name.removesuffix("-split"), keep))
        kept = keep + (len(images) == len(group_ids))
        wanted = min(max(1, round(fraction * len(group_ids))), len(group_ids) - kept)
        free = sorted(group_ids - settled)
        order = torch.randperm(len(free), generator=stream(seed, name, label)).tolist()
        missing = max(0, wanted - len(group_ids & drawn))
        drawn |= {free[i] for i in order[:missing]}
        settled |= group_ids
    return drawn


def _too_few(label: str, images: list[Item], groups: int, split: str, keep: int) -> str:
    splits = "test and val splits" if keep == 2 else f"{split} split"
    found = f"one image ({images[0].path})" if len(images) == 1 else f"{len(images)} images"
    needs, of = f"{keep + 2} images or more", ""
    if any(item.group for item in images):
        found += (
            f" in {groups} group{'s' * (groups > 1)} (a folder inside a class folder, or its `group` or `model` column)"
        )
        needs, of = f"{keep + 1} groups and {needs}", " of other objects" if groups <= keep else ""
    return (
        f"class {label!r} has {found}; making the {splits} from it needs {needs}, two of them left to learn from: add "
        f"images{of}, leave the class out, or declare the splits in folders or a `split` column"
    )


def few_shot(items: list[Item], shots: int, seed: int) -> tuple[list[Item], str]:
    """Draw `shots` train items per class, spread over its groups; returns the items and a line that says so.

    Other splits are not changed. The groups are put in a random order, and each gives one image, then each a second
    one, until there are enough. So with the same seed, fewer shots are a subset of more. A class with fewer images
    gives all that it has, and the line lists such classes.
    """
    train, rest = [i for i in items if i.split == "train"], [i for i in items if i.split != "train"]
    by_class = defaultdict(lambda: defaultdict(list))
    for item in sorted(train, key=lambda item: item.path):
        by_class[item.label][item.group_id].append(item)
    drawn, short = [], []
    for label, groups in sorted(by_class.items()):
        generator = stream(seed, "few-shot", label)
        names = sorted(groups)
        ranked = []
        for rank, g in enumerate(torch.randperm(len(names), generator=generator).tolist()):
            members = groups[names[g]]
            for turn, m in enumerate(torch.randperm(len(members), generator=generator).tolist()):
                ranked.append((turn, rank, members[m]))
        ranked.sort(key=lambda entry: entry[:2])
        drawn += [item for _, _, item in ranked[:shots]]
        if len(ranked) < shots:
            short.append(f"{label} ({len(ranked)})")
    line = f"few-shot: {shots} train images a class, over groups first, seed {seed}: {len(drawn)} of {len(train)}"
    if short:
        line += f"; fewer exist of {', '.join(short)}"
    return drawn + rest, line
