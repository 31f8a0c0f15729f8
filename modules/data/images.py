"""Decodes items to pixels of one or more sizes, once, before anything else starts.

Every file is decoded in full, so a bad one is named before the GPU is touched. Real and generated images must go
through the same pixel processing, or the encoder learns the difference: each image is cropped to a square and then
resized once, directly to each stored size, by the antialiased triangle filter that `kernels.pixels` uses for generated
images.

Shapes: D images, H W C pixels.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from modules.config import Data
from modules.data.decode import GRAY, BadImage, NoObject, decode_image, decode_mask
from modules.data.files import Files
from modules.data.items import Index, Item
from modules.data.masks import Square, center_square, gray_background, object_square, shrink
from modules.errors import ConfigError, DataError, first_of

THREADS = 4  # Pillow decodes and resizes without the interpreter lock


@dataclass(frozen=True)
class Images:
    """Decoded images in the order of `items`."""

    items: tuple[Item, ...]
    pixels_DHWC: torch.Tensor  # uint8
    masks_DHW: torch.Tensor | None  # uint8, 1 on the object; None if they were not read
    skipped: tuple[tuple[str, str], ...]  # (path, reason) of files left out
    digests: tuple[str, ...]  # sha256 of the bytes of each image file
    notes: tuple[str, ...] = ()  # counts worth reporting: enlarged, cut to a square, left out
    sides: tuple[int, ...] = ()  # side in pixels of each image's square before it was resized
    forgiven: tuple[tuple[str, str], ...] = ()  # (path, reason) of kept files that on_bad_image=fail would have refused


def load_images(
    index: Index,
    items: tuple[Item, ...] | list[Item],
    size: int,
    data: Data,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    masks: bool | None = None,
    min_size: int = 0,
    learning: bool = True,
) -> Images:
    """The pixels of `items` at `size`, uint8 [D, size, size, 3].

    A file that cannot be used is an error or is left out, as data.on_bad_image says. What happens to an image whose
    mask is missing, empty or broken depends on what needs the mask:

    - cropping or data.background: the image counts as a file that cannot be used. In an MVIP tree, where images without
      an object are known to occur, such an image is always left out and never an error.
    - recipes only: the image is kept, with an empty mask, unless on_bad_image=fail makes it an error (in an MVIP tree
      only a broken mask is one). Which images an arm learns from must not depend on its recipes.

    Args:
        masks: True reads the object masks (for masked recipes); False reads them only if cropping or background need
            them; None reads them if every item has one.
        min_size: a cropped image with a smaller side, in pixels, is refused, because it would have to be enlarged for
            the pipeline; 0 accepts any size. Enlarged images are counted in `notes`.
        learning: every class must keep an image; False if images are only judged.

    Raises:
        ConfigError: cropping, background or `masks` ask for masks and the set has none.
        DataError: there are no items, files are bad under on_bad_image=fail, or no image of a class or set is left.
    """
    sizes = {size: range(len(items))}
    return load_at_sizes(index, items, sizes, data, progress, masks=masks, min_size=min_size, learning=learning)[0]


def load_at_sizes(
    index: Index,
    items: tuple[Item, ...] | list[Item],
    sizes: dict[int, Sequence[int]],
    data: Data,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    masks: bool | None = None,
    min_size: int = 0,
    learning: bool = True,
) -> tuple[Images, ...]:
    """Decode `items` once and return one Images for each size, in the order of `sizes`.

    `sizes` maps a size to the positions in `items` that are kept at it. Notes refer to the first size. For everything
    else see `load_images`.
    """
    if not items:
        raise DataError(f"{index.root}: no image to load, because this role and split are empty; add images to it")
    needs_masks = data.crop_to_mask or data.background != "keep" or masks is True
    _check_masks(items, needs_masks, data, index.root)
    reads_masks = needs_masks or (masks is None and all(item.mask for item in items))
    with Files(index.root) as files:
        stored = [_Stored(size, positions, reads_masks) for size, positions in sizes.items()]
        decoder = _Decoder(files, index.kind, data, stored, reads_masks, needs_masks, min_size)
        with ThreadPoolExecutor(THREADS) as pool:
            results = []
            for result in pool.map(decoder.load, range(len(items)), items):
                results.append(result)
                if progress is not None:
                    progress(len(results), len(items), "")
    kept, skipped = _sort_out(index, items, results, data, learning)
    notes = _notes(results, kept, skipped, next(iter(sizes)))
    found = []
    for at in stored:
        here = [i for i in kept if i in at.row_of]
        whole = len(here) == len(at.row_of)
        rows = slice(None) if whole else torch.tensor([at.row_of[i] for i in here], dtype=torch.int64)
        found.append(
            Images(
                items=tuple(items[i] for i in here),
                pixels_DHWC=at.pixels_DHWC[rows],
                masks_DHW=at.masks_DHW[rows] if reads_masks else None,
                skipped=skipped,
                forgiven=tuple((items[i].path, results[i].forgiven) for i in kept if results[i].forgiven),
                digests=tuple(results[i].digest for i in here),
                notes=notes,
                sides=tuple(results[i].side for i in here),
            )
        )
    return tuple(found)


@dataclass
class _Result:
    """The outcome of decoding one file."""

    digest: str = ""
    reason: str = ""  # why it cannot be used; "" if it can
    may_skip: bool = False  # to be left out even under on_bad_image=fail
    side: int = 0  # of the square that was resized, in pixels
    was_cut: bool = False  # parts outside the central square were cut off
    no_object: bool = False  # its mask shows no object; it is kept, but cannot be edited within the mask
    forgiven: str = ""  # why on_bad_image=fail would have refused it, although it is kept


class _Stored:
    """Preallocated pixels and masks at one size for the items at the given positions."""

    def __init__(self, size: int, positions: Sequence[int], with_masks: bool):
        self.size = size
        self.row_of = {position: row for row, position in enumerate(positions)}
        count = len(self.row_of)
        self.pixels_DHWC = torch.empty(count, size, size, 3, dtype=torch.uint8)
        self.masks_DHW = torch.empty(count if with_masks else 0, size, size, dtype=torch.uint8)


@dataclass
class _Decoder:
    """Decodes items into the rows of every size that keeps them. Threads share it; each item has its own rows."""

    files: Files
    kind: str
    data: Data
    stored: list[_Stored]
    reads_masks: bool
    needs_masks: bool
    min_size: int

    def load(self, position: int, item: Item) -> _Result:
        result = _Result()
        try:
            self._load(position, item, result)
        except (BadImage, DataError) as error:
            result.reason = str(error)
            result.may_skip = isinstance(error, NoObject) and self.kind == "mvip"
        return result

    def _load(self, position: int, item: Item, result: _Result) -> None:
        max_bytes = 8 * self.data.max_pixels + 2**20  # four channels of 16 bits, uncompressed
        content = self.files.read(item.path, max_bytes)
        result.digest = hashlib.sha256(content).hexdigest()
        image, orientation = decode_image(content, self.data.max_pixels)
        mask_HW = self._mask(item, image, orientation, max_bytes, result) if self.reads_masks else None
        if self.data.background == "gray":
            image = Image.fromarray(gray_background(np.asarray(image), mask_HW))
        if self.data.crop_to_mask:
            square = object_square(mask_HW, self.data.crop_margin)
        else:
            square = center_square(*image.size)
            result.was_cut = image.width != image.height
        result.side = square.side
        if square.side < self.min_size:
            raise BadImage(f"is {square.side} px a side after cropping, less than the {self.min_size} px wanted")
        image = cut(image, square, (GRAY, GRAY, GRAY))
        mask = None if mask_HW is None else cut(Image.fromarray(mask_HW.astype(np.uint8) * 255), square, 0)
        for at in self.stored:
            if (row := at.row_of.get(position)) is None:
                continue
            at.pixels_DHWC[row] = torch.from_numpy(resize(image, at.size))
            if mask is not None:
                at.masks_DHW[row] = torch.from_numpy(shrink(np.asarray(mask), at.size, resize(mask, at.size)))

    def _mask(self, item: Item, image: Image.Image, orientation: int, max_bytes: int, result: _Result) -> np.ndarray:
        mask_HW = np.zeros((image.height, image.width), dtype=bool)
        cuts = self.data.crop_to_mask or self.data.background != "keep"
        if item.mask:
            content = self.files.read(item.mask, max_bytes)
            try:
                mask_HW = decode_mask(content, self.data.max_pixels, image.size, orientation)
            except BadImage as error:
                if cuts or self.data.on_bad_image == "fail":
                    raise BadImage(f"its mask {item.mask}: {error}") from error
                result.forgiven = f"its mask {item.mask}: {error}"
                result.no_object = True
        if not mask_HW.any() and self.needs_masks:
            reason = f"its mask {item.mask} is empty" if item.mask else "has no mask"
            if cuts or not (self.kind == "mvip" or self.data.on_bad_image == "skip"):
                raise NoObject(reason)
            if self.kind != "mvip":
                result.forgiven = result.forgiven or reason
            result.no_object = True
        return mask_HW


def cut(image: Image.Image, square: Square, fill: int | tuple[int, int, int]) -> Image.Image:
    """The square region of an image; parts beyond the image's border are `fill`."""
    left, top, side = square
    if left >= 0 and top >= 0 and left + side <= image.width and top + side <= image.height:
        return image.crop((left, top, left + side, top + side))
    canvas = Image.new(image.mode, (side, side), fill)
    canvas.paste(image, (-left, -top))
    return canvas


def resize(image: Image.Image, size: int) -> np.ndarray:
    """A square image at `size` by the antialiased triangle filter (torch's bilinear with antialias=True); uint8."""
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def _check_masks(items: Sequence[Item], needs_masks: bool, data: Data, root: str) -> None:
    if not needs_masks or any(item.mask for item in items):
        return
    if data.crop_to_mask or data.background != "keep":
        setting = "data.crop_to_mask" if data.crop_to_mask else f"data.background {data.background}"
        raise ConfigError(f"`{setting}` needs object masks and {root} has none; add a `mask` column or switch it off")
    raise ConfigError(f"the masked recipes need object masks and {root} has none; add a `mask` column or drop them")


def _sort_out(
    index: Index, items: Sequence[Item], results: list[_Result], data: Data, learning: bool
) -> tuple[list[int], tuple[tuple[str, str], ...]]:
    """(positions kept, (path, reason) of the files left out).

    Raises:
        DataError: as `load_images`; it names the bad files.
    """
    bad = [i for i, result in enumerate(results) if result.reason]
    fatal = [i for i in bad if not results[i].may_skip] if data.on_bad_image == "fail" else []
    if fatal:
        named = first_of([f"{items[i].path}: {results[i].reason}" for i in fatal], "; ")
        raise DataError(
            f"{index.root}: {len(fatal)} of {len(items)} images cannot be used: {named}. Mend or remove them, or "
            "set data.on_bad_image=skip"
        )
    kept = [i for i, result in enumerate(results) if not result.reason]
    left = {(items[i].label, items[i].split) for i in kept}
    for i in bad:
        if not kept or (learning and (items[i].label, items[i].split) not in left):
            what = f"of class {items[i].label!r} in {items[i].split or 'the set'}" if kept else "at all"
            raise DataError(
                f"{index.root}: no usable image is left {what}; the first bad one is {items[i].path}: {results[i].reason}"
            )
    return kept, tuple((items[i].path, results[i].reason) for i in bad)


def _notes(results: list[_Result], kept: list[int], skipped: tuple[tuple[str, str], ...], size: int) -> tuple[str, ...]:
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} of {len(results)} images left out, the first {skipped[0][0]}: {skipped[0][1]}")
    if small := sum(results[i].side < size for i in kept):
        smallest = min(results[i].side for i in kept)
        notes.append(f"{small} images are smaller than {size} px and were enlarged, the smallest {smallest}")
    if cut_square := sum(results[i].was_cut for i in kept):
        notes.append(f"{cut_square} images are not square; their central square is used")
    if no_object := sum(results[i].no_object for i in kept):
        notes.append(f"{no_object} images have no object in their mask: learned from, not edited within")
    return tuple(notes)
