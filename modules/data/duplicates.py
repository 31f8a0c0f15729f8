"""Finds near-duplicates across splits: a leak that splitting by names and groups cannot prevent.

If the same photograph is in train and, saved again, scaled or brightened, in test, the test is easier than it seems.
Such pairs are reported and not removed, because only the user knows which of the two is right.

Shapes: D images, E width of a descriptor, H W C pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from modules.data.images import Images
from modules.data.items import Item

GRID = 16
# Measured on parts64 and grocery96: the cosine of an image to itself with noise, scaled by half or darker is .989-1
# (5 % quantile), to the nearest image of another split at most .981 over 7,586 images
THRESHOLD = 0.985
LEAST_CONTRAST = 1 / 255  # an image of lower standard deviation is too plain to be distinguished from others
CHUNK = 4096  # rows of the similarity matrix at a time
NAMED_PAIRS = 3  # number of pairs listed in a message


class Pair(NamedTuple):
    """Two images of different splits (or of ID and OOD) that look the same."""

    first: Item
    second: Item
    similarity: float  # cosine of the descriptors; 1 for equal files


def near_duplicates(*sets: Images, threshold: float = THRESHOLD) -> tuple[Pair, ...]:
    """Pairs across (role, split) whose files are equal or whose descriptors have a cosine of `threshold` or more.

    The descriptor is the gray image averaged to 16 x 16, minus its mean, normalized to unit length. It is invariant to
    brightness and contrast and hardly affected by noise and scaling. Each pair is listed once, in path order.

    Raises:
        ValueError: no sets.
    """
    if not sets:
        raise ValueError("near_duplicates needs at least one set of images")
    items = [item for images in sets for item in images.items]
    digests = [digest for images in sets for digest in images.digests]
    described = [_descriptors(images.pixels_DHWC) for images in sets]
    descriptors_DE = torch.cat([d for d, _ in described])
    plain_D = torch.cat([p for _, p in described])
    descriptors_DE[plain_D] = 0
    parts = {part: i for i, part in enumerate(sorted({(item.role, item.split) for item in items}))}
    part_D = torch.tensor([parts[item.role, item.split] for item in items])
    files = {digest: i for i, digest in enumerate(dict.fromkeys(digests))}
    file_D = torch.tensor([files[digest] for digest in digests])
    pairs = []
    for start in range(0, len(items), CHUNK):
        rows = slice(start, start + CHUNK)
        cosine = descriptors_DE[rows] @ descriptors_DE.T
        cosine[file_D[rows, None] == file_D] = 1
        alike = (cosine >= threshold) & (part_D[rows, None] != part_D)
        for i, j in alike.nonzero().tolist():
            first, second = sorted((items[start + i], items[j]), key=lambda item: item.path)
            if start + i < j:
                pairs.append(Pair(first, second, min(1.0, float(cosine[i, j]))))
    return tuple(sorted(pairs, key=lambda pair: (pair.first.path, pair.second.path)))


def describe_duplicates(pairs: tuple[Pair, ...]) -> str:
    """One line that says how many pairs were found and names the first few."""
    listed = "; ".join(
        f"{a.path} ({a.role} {a.split}) and {b.path} ({b.role} {b.split}), {similarity:.3f}"
        for a, b, similarity in pairs[:NAMED_PAIRS]
    )
    return f"near-duplicates across splits: {len(pairs)} pairs, such as {listed}"


def _descriptors(pixels_DHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(unit descriptors [D, E] float32, bool [D] that is True for images too plain to have one)."""
    rows = []
    for pixels_bHWC in pixels_DHWC.split(CHUNK // 4):
        gray_b1HW = pixels_bHWC.float().mean(dim=3)[:, None] / 255
        rows.append(F.adaptive_avg_pool2d(gray_b1HW, GRID).flatten(1))
    grid_DE = torch.cat(rows).cpu()
    grid_DE = grid_DE - grid_DE.mean(dim=1, keepdim=True)
    return F.normalize(grid_DE, dim=1), grid_DE.std(dim=1) < LEAST_CONTRAST
