"""Reads class folders, a CSV file or a zip pack into items.

A reader reports what names and columns say and decides nothing: role and split stay "" if the set does not declare
them. Every listing is sorted, so that the order in which a file system lists names never affects a label.
"""

import csv
import difflib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from modules.config import Data
from modules.data.files import Files
from modules.data.items import ROLES, SPLITS, Index, Item
from modules.data.mvip import is_mvip, read_mvip
from modules.errors import ConfigError, DataError, first_of

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_LIKE = re.compile(r"(train|test|val|valid|validation|eval|dev)(ing|ation)?([ _-]?(set|data|images|split))?")
UNREAD = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")
PACK_INDEX = "index.csv"
KNOWN = ("path", "label", "role", "split", "mask", "group", "model", "caption", "noun", "keywords")
COLUMNS = "path,label[,role][,split][,mask][,group|model][,caption][,noun][,keywords]"


def resolve_root(root: str, setting: str = "data.root") -> Path:
    """The folder or file that `root` names; "embedded:parts64" is the pack shipped with the program.

    Raises:
        ConfigError: `root` is empty or names an unknown embedded pack; the message names `setting`.
        DataError: `root` does not exist.
    """
    if not root.strip():
        raise ConfigError(f"`{setting}` is empty; name a folder of class folders, a .csv, a .zip or embedded:parts64")
    if root.startswith("embedded:"):
        known = sorted(path.stem for path in EMBEDDED.glob("*.zip"))
        name = root.removeprefix("embedded:")
        if name not in known:
            raise ConfigError(f"`{setting}` is {root!r}; the embedded packs are {', '.join(known) or 'none'}")
        return EMBEDDED / f"{name}.zip"
    path = Path(os.path.expanduser(root))  # leaves ~nosuchuser unchanged, where pathlib would raise
    if not path.exists():
        raise DataError(f"`{setting}` {root!r} does not exist; name a folder of class folders, a .csv or a .zip")
    return path


def identity(root: str, setting: str = "data.root") -> Path:
    """The absolute path that identifies an image set; a folder and the index.csv in it are the same set.

    Raises:
        ConfigError, DataError: as `resolve_root`.
    """
    path = resolve_root(root, setting).resolve()
    return path.parent if path.name == PACK_INDEX and path.is_file() else path


def read_source(root: str, data: Data | None = None, setting: str = "data.root") -> Index:
    """All items below `root` as its names and columns declare them; `classes` is empty, roles and splits may be "".

    `data` (config.Data) chooses among the classes of an MVIP tree; without it all classes are read. `setting` is the
    setting that holds `root`, for messages.

    Raises:
        ConfigError: as `resolve_root`, or the settings in `data` do not fit an MVIP tree.
        DataError: the root is missing, empty or unreadable, or a row, name or link is wrong.
    """
    path = resolve_root(root, setting)
    if path.suffix.lower() == ".csv" and path.is_file():
        with Files(path.parent) as files:
            source = read_csv(files, path.name, "csv")
    elif path.is_file():
        with Files(path) as files:
            if files.obstacle(PACK_INDEX):
                raise DataError(f"{path}: holds no {PACK_INDEX} at its root; add one with the columns {COLUMNS}")
            source = read_csv(files, PACK_INDEX, "zip")
    elif (path / PACK_INDEX).is_file():
        with Files(path) as files:
            source = read_csv(files, PACK_INDEX, "csv")
    else:
        with Files(path) as files:
            source = read_mvip(files, data) if is_mvip(files) else read_folder(files)
    if not source.items:
        raise DataError(f"{path}: holds no image; expected class folders, or a .csv or .zip with the columns {COLUMNS}")
    return source


def read_csv(files: Files, name: str, kind: str) -> Index:
    """The rows of the CSV file `name` below the root of `files` (UTF-8, comma-separated, with a header line).

    Columns: path, label, role, split, mask, group or model, caption, noun, keywords (separated by ";"); others are
    ignored. Only `path` is required here.

    Raises:
        DataError: the file is not UTF-8, has another separator or no `path` column, or a row has the wrong number of
            fields, an unknown role or split, or a path that occurs twice, is outside the root or is missing.
    """
    where = f"{files.root}/{name}"
    try:
        text = files.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text ({error}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        if "path" not in header:
            raise DataError(f"{where} line 1: {_header_fault(text, header)}")
        if twice := [name for name in KNOWN if header.count(name) > 1]:
            raise DataError(f"{where} line 1: names the column `{twice[0]}` twice; leave one of them")
        items, first_line = [], {}
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            line = f"{where} line {reader.line_num}"
            if len(row) != len(header):
                raise DataError(
                    f"{line}: has {len(row)} fields, the header has {len(header)}; quote fields with commas"
                )
            item = _item(files, dict(zip(header, row, strict=True)), line)
            if item.path in first_line:
                raise DataError(f"{line}: {item.path} was already on line {first_line[item.path]}; name a file once")
            first_line[item.path] = reader.line_num
            items.append(item)
    except csv.Error as error:
        raise DataError(f"{where} line {reader.line_num}: is no valid CSV ({error})") from error
    _refuse_missing(files, items, where)
    notes = [
        f"{where}: the column `{name}` is not read; did you mean `{close[0]}`?"
        for name in header
        if name not in KNOWN and (close := difflib.get_close_matches(name, set(KNOWN) - set(header), 1, 0.75))
    ]
    return Index(str(files.root), kind, tuple(sorted(items, key=lambda item: item.path)), (), tuple(notes))


def read_folder(files: Files) -> Index:
    """The images of `<class>/**` or of `<split>/<class>/**`; a folder inside a class folder is a group.

    Notes count what is left out: files that are not images, images outside class folders, class folders without images.

    Raises:
        DataError: images without class folders, split folders beside class folders, an empty split folder, or a link
            out of the root.
    """
    root = files.root
    folders = files.folders()
    splits = [name for name in folders if name.lower() in SPLIT_NAMES]
    if len({SPLIT_NAMES[name.lower()] for name in splits}) > 1 and len(splits) < len(folders):
        others = ", ".join(name for name in folders if name not in splits)
        raise DataError(f"{root}: has the split folders {', '.join(splits)} beside {others}; move the latter elsewhere")
    by_split = bool(splits) and len(splits) == len(folders)
    if not by_split:
        _refuse_split_like(files, folders)
    items, ignored, empty = [], Counter(), []
    stray = _images_in(files, "")
    for top in folders:
        split = SPLIT_NAMES[top.lower()] if by_split else ""
        labels = files.folders(top) if by_split else [top]
        of_class = {label: _class_items(files, top, label, split, ignored) for label in labels}
        found = sum(of_class.values(), [])
        if by_split and not found:
            raise DataError(
                f"{root}/{top}: the {split} split is empty; put class folders with images into it or delete it"
            )
        items += found
        empty += [f"{top}/{label}" if by_split else label for label in labels if not of_class[label]]
        stray += _images_in(files, top) if by_split else []
    if not items and stray:
        raise DataError(f"{root}: holds images but no class folders; put the images of each class into its own folder")
    notes = []
    for why, known in (("they are no images", False), ("no such format is read; convert them to PNG or JPEG", True)):
        counts = sorted((extension, n) for extension, n in ignored.items() if (extension in UNREAD) == known)
        if counts:
            listed = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in counts)
            notes.append(f"files ignored because {why}: {listed}")
    if stray:
        notes.append(
            f"{len(stray)} images left out because they lie in no class folder, such as {stray[0]}; put each into the "
            "folder of its class"
        )
    if empty:
        notes.append(f"{len(empty)} class folders left out because they hold no image: {first_of(empty)}")
    return Index(str(root), "folder", tuple(sorted(items, key=lambda item: item.path)), (), tuple(notes))


def _refuse_split_like(files: Files, folders: list[str]) -> None:
    """Refuse folders named much like a split that hold only folders: they would silently be taken for classes."""
    for name in folders:
        if SPLIT_LIKE.fullmatch(name.lower()) and len(files.folders(name)) > 1 and not _images_in(files, name):
            raise DataError(
                f"{files.root}/{name}: is named like a split, and {', '.join(f for f in folders if f != name)} beside it are "
                "not; name the split folders train, val and test and move others elsewhere, or, if it is a class, rename it"
            )


def _header_fault(text: str, header: list[str]) -> str:
    """Why a first line without a `path` column cannot be used, and what to do."""
    first = text.splitlines()[:1]
    for separator, name in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        columns = next(csv.reader(first, delimiter=separator, skipinitialspace=True), [])
        if "path" in [column.strip().lower() for column in columns]:
            return f"its columns are separated by {name}; save the file with commas between them"
    return f"has no `path` column but {header}; it must name {COLUMNS}"


def _item(files: Files, row: dict[str, str], line: str) -> Item:
    role = row.get("role", "").strip().lower().replace("-", "_")
    if role and role not in ROLES:
        raise DataError(f"{line}: the role {row['role']!r} is unknown; choose one of {', '.join(ROLES)}")
    split = row.get("split", "").strip().lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{line}: the split {row['split']!r} is unknown; choose one of {', '.join(SPLITS)}")
    mask = row.get("mask", "").strip()
    return Item(
        path=files.normalize(row["path"], line),
        label=row.get("label", ""),
        role=role,
        split=SPLIT_NAMES.get(split, ""),
        group=(row.get("group") or row.get("model") or "").strip(),
        mask=files.normalize(mask, line) if mask else "",
        caption=row.get("caption", "").strip(),
        keywords=tuple(word.strip() for word in row.get("keywords", "").split(";") if word.strip()),
        noun=row.get("noun", "").strip(),
    )


def _refuse_missing(files: Files, items: list[Item], where: str) -> None:
    paths = [path for item in items for path in (item.path, item.mask) if path]
    bad = [f"{path} {reason}" for path in paths if (reason := files.obstacle(path))]
    if bad:
        raise DataError(f"{where}: {first_of(bad, '; ')}; correct the rows or bring the files")


def _class_items(files: Files, top: str, label: str, split: str, ignored: Counter) -> list[Item]:
    start = f"{top}/{label}" if split else top
    items = []
    for folder, path in walk(files, start):
        extension = os.path.splitext(path)[1].lower()
        if extension not in EXTENSIONS:
            ignored[extension] += 1
            continue
        if reason := files.obstacle(path):
            raise DataError(f"{files.root}: {path} {reason}; copy the file into the folder")
        group = "/".join(folder.split("/")[: start.count("/") + 2]) if folder != start else ""
        items.append(Item(path=path, label=label, split=split, group=group))
    return items


def _images_in(files: Files, folder: str) -> list[str]:
    """Sorted paths of the visible images directly in the folder."""
    inside = f"{folder}/" if folder else ""
    return [inside + name for name in files.names(folder) if name.lower().endswith(EXTENSIONS)]


def walk(files: Files, folder: str) -> Iterator[tuple[str, str]]:
    """(folder, path) of every visible file below `folder` ("": the root), in a fixed order: files before subfolders."""
    inside = f"{folder}/" if folder else ""
    for name in files.names(folder):
        yield folder, inside + name
    for name in files.folders(folder):
        yield from walk(files, inside + name)
