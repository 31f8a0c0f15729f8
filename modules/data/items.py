"""The form of an image set, whatever it was read from: an `Item` for each image and an `Index` for the set.

An item's path is its identity: relative to the root, unique, and the only link between pixels and label. The order of
files or rows is never used for that.
"""

from dataclasses import dataclass

ROLES = ("id", "near_ood", "far_ood", "pretrain")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image: where it is and what is known about it."""

    path: str  # relative to the root, "/" between parts
    label: str  # class name as written; never used as a path
    role: str = ""  # one of ROLES; "" only in an index made by read_raw
    split: str = ""  # one of SPLITS; "" only in an index made by read_raw
    group: str = ""  # model or sample: all images of a group are in the same split
    mask: str = ""  # path of the object mask, relative to the root; "": none
    caption: str = ""
    keywords: tuple[str, ...] = ()  # words that describe the class (MVIP)
    noun: str = ""  # the word of the caption that names the object

    @property
    def group_id(self) -> str:
        """The unit of splits and of the bootstrap: the group, or the image itself if it has none."""
        return self.group or self.path


@dataclass(frozen=True)
class Index:
    """An image set, read and checked; a function of file names, declarations, settings and the seed only."""

    root: str  # folder or zip file that item paths are relative to
    kind: str  # folder | csv | zip | mvip
    items: tuple[Item, ...]  # sorted by path
    classes: tuple[str, ...]  # ID classes, sorted; a label id is a position in this tuple
    notes: tuple[str, ...] = ()  # what was decided: splits made, few-shot draw, counts

    def select(self, role: str, split: str) -> tuple[Item, ...]:
        """The items of one role and split, in path order.

        Raises:
            ValueError: no such role or split.
        """
        if role not in ROLES or split not in SPLITS:
            raise ValueError(f"role {role!r} and split {split!r}: choose from {ROLES} and {SPLITS}")
        return tuple(item for item in self.items if item.role == role and item.split == split)

    def keywords(self) -> tuple[tuple[str, ...], ...]:
        """The words that describe each class, in the order of `classes`; () for a class without any."""
        found = {item.label: item.keywords for item in reversed(self.items)}
        return tuple(found.get(label, ()) for label in self.classes)

    def label_ids(self, items: tuple[Item, ...]) -> list[int]:
        """Position in `classes` of each item's label.

        Raises:
            KeyError: an item's label is not an ID class.
        """
        position = {label: i for i, label in enumerate(self.classes)}
        return [position[item.label] for item in items]
