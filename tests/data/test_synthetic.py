"""Jigsaw negatives: the same patches elsewhere, a function of the image's own stream."""

import pytest
import torch

from modules.data.synthetic import jigsaw
from modules.runtime import stream


def images(count=3, size=8):
    return torch.randint(0, 256, (count, size, size, 3), generator=stream(0, "images"), dtype=torch.uint8)


def streams(count=3):
    return [stream(0, "image", index) for index in range(count)]


def patches_of(image_HWC, grid):
    side = image_HWC.shape[0] // grid
    return [
        image_HWC[y * side : (y + 1) * side, x * side : (x + 1) * side].flatten().tolist()
        for y in range(grid)
        for x in range(grid)
    ]


@pytest.mark.parametrize("grid", [2, 4])
def test_patches_are_kept_and_moved(grid):
    before = images()
    after = jigsaw(before, grid, streams())
    assert after.dtype == torch.uint8 and after.shape == before.shape
    for i in range(3):
        old, new = patches_of(before[i], grid), patches_of(after[i], grid)
        assert sorted(old) == sorted(new) and old != new


def test_never_the_identity():
    numbered = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1).expand(200, 2, 2, 3).contiguous()
    after = jigsaw(numbered, 2, [stream(0, "image", index) for index in range(200)])
    assert (after != numbered).flatten(1).any(1).all()
    assert len({tuple(image.flatten().tolist()) for image in after}) == 23, "all other orders of four patches occur"


def test_an_image_depends_on_its_own_stream_only():
    together = jigsaw(images(), 4, streams())
    alone = jigsaw(images()[2:], 4, [stream(0, "image", 2)])
    assert torch.equal(together[2:], alone)


def test_one_stream_for_all_gives_different_orders():
    same = images(1).expand(3, -1, -1, -1).contiguous()
    after = jigsaw(same, 4, stream(0, "jigsaw"))
    assert not torch.equal(after[0], after[1])


def test_no_images_give_no_images():
    assert jigsaw(images(0), 4, []).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(("grid", "count"), [(1, 3), (3, 3), (2, 2)])
def test_what_cannot_be_cut_is_refused(grid, count):
    with pytest.raises(ValueError, match="expected"):
        jigsaw(images(), grid, streams(count))
