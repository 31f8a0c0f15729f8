"""Small image sets on disk, built for the tests of the readers."""

import csv
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

MVIP_SCENES = {
    "train_data": [f"{position}/{rotation}" for position in ("0", "1") for rotation in ("0", "30", "60")],
    "valid_data": ["s0", "s1"],
    "test_data": ["s0", "s1", "s2"],
}


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    """A noisy RGB image that is a function of its seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def disc(width: int = 32, height: int = 32, radius: int = 8) -> Image.Image:
    """A mask, 0 and 255, with a disc in the middle; empty for radius 0."""
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2 < radius**2
    return Image.fromarray(inside.astype(np.uint8) * 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises width x height pixels and whose data would fill them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def put(path: Path, content: bytes | Image.Image | str) -> Path:
    """Write a file, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(content) if isinstance(content, Image.Image) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    """<root>/<folder>/<i>.png: `counts` images of noise a folder, every one different."""
    seed = 0
    for folder, count in counts.items():
        for i in range(count):
            put(root / folder / f"{i:02d}.png", picture(seed := seed + 1))
    return root


def rows_text(rows: list[dict]) -> str:
    """A CSV file of rows, whose first names the columns."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def csv_set(root: Path, rows: list[dict], name: str = "index.csv") -> Path:
    """A folder with images, masks and a CSV file as the rows say; returns the CSV."""
    for i, row in enumerate(rows):
        put(root / row["path"], picture(i))
        if row.get("mask"):
            put(root / row["mask"], disc())
    return put(root / name, rows_text(rows))


def pack(path: Path, rows: list[dict], members: dict[str, bytes] | None = None) -> Path:
    """A zip pack with index.csv; `members` replaces the images that the rows name."""
    if members is None:
        members = {row["path"]: encoded(picture(i)) for i, row in enumerate(rows)}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.csv", rows_text(rows))
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def declared_rows(classes=("bolt", "nut"), near=("pin", "rod"), groups: int = 2) -> list[dict]:
    """Rows of a set that declares everything: each ID class in three splits, near-OOD classes in val and test."""
    rows = []
    for label in classes:
        for split in ("train", "val", "test"):
            for g in range(groups):
                for view in range(2):
                    name = f"{label}-{split}-{g}"
                    rows.append(_row(f"{label}/{name}-{view}.png", label, "id", split, name))
    for i, label in enumerate(near):
        for view in range(2):
            rows.append(_row(f"{label}/{view}.png", label, "near_ood", ("val", "test")[i % 2], f"{label}-0"))
    return rows


def mvip_tree(root: Path, classes: dict[str, str], cameras: int = 2) -> Path:
    """A tree of exactly the published MVIP layout: {class: super class}, three splits, image, mask, depth and meta."""
    seed = 0
    for label, super_class in classes.items():
        meta = {"super_class": super_class, "description": f"metal, {label.lower()}"}
        put(root / label / "meta.json", json.dumps(meta))
        for folder, scenes in MVIP_SCENES.items():
            for scene in scenes:
                for camera in range(cameras):
                    start = root / label / folder / scene / f"cam_{camera:02d}"
                    put(start / f"{camera:02d}_rgb.png", picture(seed := seed + 1))
                    put(start / f"{camera:02d}_rgb_mask_gen.png", disc())
                    put(start / f"{camera:02d}_depth.png", disc())
                    put(start / f"{camera:02d}_meta.json", "{}")
    return root


def _row(path: str, label: str, role: str, split: str, group: str) -> dict:
    return {"path": path, "label": label, "role": role, "split": split, "group": group}
