"""What an image set is, whatever it was read from: one `Item` an image, one `Index` a set.

An item's path is its identity: it is relative to the root, unique, and the only thing that ties pixels to a label. No
order of files or rows is ever used for that.
"""

from dataclasses import dataclass

ROLES = ("id", "near_ood", "far_ood", "pretrain")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image: where it is and what is known of it."""

    path: str  # relative to the root, "/" between parts
    label: str  # class name as written; never used as a path
    role: str = ""  # one of ROLES; "" only in an index made by read_raw
    split: str = ""  # one of SPLITS; "" only in an index made by read_raw
    group: str = ""  # model or sample: images of one group never straddle splits
    mask: str = ""  # path of the object mask, relative to the root; "": none
    caption: str = ""
    keywords: tuple[str, ...] = ()  # words that describe the class (MVIP)
    noun: str = ""  # the word of the caption that names the object

    @property
    def group_id(self) -> str:
        """What splits and the bootstrap treat as one: the group, or the image itself where there is none."""
        return self.group or self.path


@dataclass(frozen=True)
class Index:
    """An image set, read and checked; a pure function of the files' names and the seed."""

    root: str  # folder or zip file that item paths are relative to
    kind: str  # folder | csv | zip | mvip
    items: tuple[Item, ...]  # sorted by path
    classes: tuple[str, ...]  # ID classes, sorted; a label id is a position in it
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
        """The words that describe each class, in the order of `classes`; () where the set has none."""
        found = {item.label: item.keywords for item in reversed(self.items)}
        return tuple(found.get(label, ()) for label in self.classes)

    def label_ids(self, items: tuple[Item, ...]) -> list[int]:
        """Position in `classes` of each item's label.

        Raises:
            KeyError: an item is of no ID class.
        """
        position = {label: i for i, label in enumerate(self.classes)}
        return [position[item.label] for item in items]
