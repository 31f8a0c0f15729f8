"""Near-duplicates across splits are found, and different images are not taken for them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from modules.config import Data
from modules.data.duplicates import describe_duplicates, near_duplicates
from modules.data.images import Images, load_images
from modules.data.index import read_index
from modules.data.items import Item


def photo(seed: int) -> torch.Tensor:
    """A smooth random image, uint8 [64, 64, 3]."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0) * 255).to(torch.uint8)


def image_set(pixels: list[torch.Tensor], split: str, role: str = "id", digest: str = "") -> Images:
    items = tuple(Item(f"{role}-{split}/{i}.png", "a", role, split) for i in range(len(pixels)))
    digests = tuple(digest or f"{role}-{split}-{i}" for i in range(len(pixels)))
    return Images(items, torch.stack(pixels), None, (), digests)


def noisy(pixels: torch.Tensor) -> torch.Tensor:
    noise = 8 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + noise).clamp(0, 255).to(torch.uint8)


def rescaled(pixels: torch.Tensor) -> torch.Tensor:
    small = F.interpolate(pixels.permute(2, 0, 1)[None].float(), size=32, mode="bilinear", antialias=True)
    return F.interpolate(small, size=64, mode="bilinear")[0].permute(1, 2, 0).to(torch.uint8)


@pytest.mark.parametrize("change", [lambda p: p, noisy, rescaled, lambda p: (p * 0.8).to(torch.uint8)])
def test_a_copy_in_another_split_is_found(change):
    train = image_set([photo(i) for i in range(20)], "train")
    test = image_set([photo(100), change(photo(7))], "test")
    pairs = near_duplicates(train, test)
    assert [(p.first.path, p.second.path) for p in pairs] == [("id-test/1.png", "id-train/7.png")]
    assert 0.985 <= pairs[0].similarity <= 1
    assert "1 pairs, such as id-test/1.png (id test) and id-train/7.png (id train)" in describe_duplicates(pairs)


def test_similarity_is_one_for_equal_files_and_less_for_a_copy():
    train, copy = image_set([photo(7)], "train", digest="x"), image_set([noisy(photo(7))], "test")
    assert near_duplicates(train, copy)[0].similarity < 1
    assert near_duplicates(train, replace(copy, digests=("x",)))[0].similarity == 1


def test_copies_within_a_split_are_nobodys_leak():
    assert near_duplicates(image_set([photo(0), photo(0)], "train")) == ()


def test_an_image_in_both_id_and_near_ood_is_found():
    assert len(near_duplicates(image_set([photo(0)], "test"), image_set([photo(0)], "test", "near_ood"))) == 1


def test_plain_images_are_alike_only_if_their_files_are():
    plain = torch.full((64, 64, 3), 100, dtype=torch.uint8)
    train, test = image_set([plain, plain + 50], "train"), image_set([plain], "test")
    assert near_duplicates(train, test) == ()
    plain[:32] += 1  # half a level of contrast: any other image of that shape would be its copy
    assert near_duplicates(image_set([plain], "train"), image_set([plain], "test")) == ()
    assert len(near_duplicates(replace(train, digests=("x", "y")), replace(test, digests=("x",)))) == 1


def test_no_sets():
    with pytest.raises(ValueError, match="at least one set"):
        near_duplicates()


def test_different_renders_of_the_embedded_pack_are_no_duplicates():
    data = Data()
    index = read_index(data, seed=0)
    items = index.select("id", "train")[::4] + index.select("id", "val")[::2]
    assert near_duplicates(load_images(index, items, 64, data, masks=False)) == ()
