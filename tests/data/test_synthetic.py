"""Jigsaw negatives: the same patches elsewhere, a function of the image's own stream."""

import pytest
import torch

from modules.data.synthetic import jigsaw
from modules.runtime import stream


def image(size=8):
    return torch.randint(0, 256, (size, size, 3), generator=stream(0, "images"), dtype=torch.uint8)


def patches_of(image_HWC, grid):
    side = image_HWC.shape[0] // grid
    return [
        image_HWC[y * side : (y + 1) * side, x * side : (x + 1) * side].flatten().tolist()
        for y in range(grid)
        for x in range(grid)
    ]


@pytest.mark.parametrize("grid", [2, 4])
def test_patches_are_kept_and_moved(grid):
    before = image()
    after = jigsaw(before, grid, stream(0, "image", 0))
    assert after.dtype == torch.uint8 and after.shape == before.shape
    old, new = patches_of(before, grid), patches_of(after, grid)
    assert sorted(old) == sorted(new) and old != new


def test_never_the_identity():
    numbered = torch.arange(4, dtype=torch.uint8).view(2, 2, 1).expand(2, 2, 3).contiguous()
    after = [jigsaw(numbered, 2, stream(0, "image", index)) for index in range(200)]
    assert all((image != numbered).any() for image in after)
    assert len({tuple(image.flatten().tolist()) for image in after}) == 23, "all other orders of four patches occur"


@pytest.mark.parametrize("grid", [1, 3])
def test_what_cannot_be_cut_is_refused(grid):
    with pytest.raises(ValueError, match="expected"):
        jigsaw(image(), grid, stream(0, "image", 0))
