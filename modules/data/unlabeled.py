"""Reads images to be judged, not learned from: all images below a root; splits, roles and labels are not required."""

from pathlib import Path

from modules.data.files import Files
from modules.data.index import read_raw
from modules.data.items import Index, Item
from modules.data.mvip import is_mvip
from modules.data.sources import EXTENSIONS, PACK_INDEX, resolve_root, walk
from modules.errors import DataError


def read_images(root: str, classes: tuple[str, ...]) -> Index:
    """Every image below `root`: a folder with or without subfolders, or a set that `read_raw` reads.

    In a folder, an image's label is the innermost folder on its path that is named like one of `classes`, else the
    topmost folder, else "".

    Raises:
        ConfigError, DataError: as `read_raw`, or a folder has no images, or a link leads out of the root.
    """
    path = resolve_root(root)
    if not path.is_dir() or (path / PACK_INDEX).is_file():
        return read_raw(root)
    with Files(path) as files:
        if is_mvip(files):
            return read_raw(root)
        found = [path for _, path in walk(files, "") if path.lower().endswith(EXTENSIONS)]
        for name in found:
            if reason := files.obstacle(name):
                raise DataError(f"{path}: {name} {reason}; copy the file into the folder")
    if not found:
        raise DataError(f"{path}: holds no image; the endings read are {', '.join(EXTENSIONS)}")
    items = tuple(Item(path=name, label=_label(name, classes)) for name in sorted(found))
    return Index(str(path), "folder", items, tuple(sorted({item.label for item in items} - {""})))


def _label(path: str, classes: tuple[str, ...]) -> str:
    folders = Path(path).parts[:-1]
    return next((name for name in reversed(folders) if name in classes), folders[0] if folders else "")
