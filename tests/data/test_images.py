"""Images: cropped, resized once; bad files named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modules.config import Data
from modules.data.decode import decode_image
from modules.data.images import load_at_sizes, load_images
from modules.data.items import Index, Item
from modules.errors import ConfigError, DataError
from tests.data.trees import bomb, disc, encoded, pack, picture, put


def one_set(tmp_path, contents: dict[str, bytes | Image.Image], masks: dict | None = None, kind="folder"):
    """An index of files of class "a", split train; `masks` are stored beside them as <name>.mask."""
    masks = masks or {}
    for name, content in contents.items():
        put(tmp_path / name, content)
        if name in masks:
            put(tmp_path / f"{name}.mask", masks[name])
    items = tuple(
        Item(name, "a", "id", "train", mask=f"{name}.mask" if name in masks else "") for name in sorted(contents)
    )
    return Index(str(tmp_path), kind, items, ("a",))


def loaded(index: Index, size=8, *, masks=None, min_size=0, **settings):
    return load_images(index, index.items, size, replace(Data(), **settings), masks=masks, min_size=min_size)


def test_pixels_of_the_stored_size_are_untouched_and_in_the_order_of_the_items(tmp_path):
    index = one_set(tmp_path, {f"{i}.png": picture(i) for i in range(20)})
    images = loaded(index, 32)
    assert images.items == index.items and images.pixels_DHWC.dtype == torch.uint8
    for i in range(20):
        assert (images.pixels_DHWC[i].numpy() == _array(index, i)).all()
    assert images.masks_DHW is None and images.skipped == () and images.notes == ()
    backwards = load_images(index, index.items[::-1], 32, Data())
    assert torch.equal(backwards.pixels_DHWC, images.pixels_DHWC.flip(0))
    assert backwards.digests == images.digests[::-1] and len(set(images.digests)) == 20


def _array(index: Index, i: int) -> np.ndarray:
    return np.asarray(Image.open(f"{index.root}/{index.items[i].path}"))


def test_the_resize_is_torchs_antialiased_bilinear(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(5, 96, 96)})
    for size in (64, 40, 17):
        pixels = loaded(index, size).pixels_DHWC.float()
        source = torch.from_numpy(_array(index, 0).copy()).permute(2, 0, 1)[None].float()
        wanted = F.interpolate(source, size=(size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        assert (pixels - wanted).abs().max() <= 1.01  # Pillow rounds after each of its two passes


def test_several_sizes_come_from_one_decode_each_resized_once(tmp_path, monkeypatch):
    index = one_set(tmp_path, {f"{i}.png": picture(i, 50, 50) for i in range(3)})
    calls = []
    monkeypatch.setattr("modules.data.images.decode_image", lambda *args: calls.append(args) or decode_image(*args))
    small, large = load_at_sizes(index, index.items, {16: range(3), 32: [0, 2]}, Data())
    assert len(calls) == 3
    assert torch.equal(small.pixels_DHWC, loaded(index, 16).pixels_DHWC)
    assert torch.equal(large.pixels_DHWC, loaded(index, 32).pixels_DHWC[[0, 2]])
    assert [item.path for item in large.items] == ["0.png", "2.png"] and len(large.digests) == len(large.sides) == 2


def test_an_image_left_out_is_left_out_at_every_size(tmp_path):
    index = one_set(tmp_path, {f"{i}.png": picture(i, 50, 50) for i in range(4)})
    (tmp_path / "1.png").write_bytes(b"no image")
    sizes = {16: range(4), 32: [1, 3]}
    small, large = load_at_sizes(index, index.items, sizes, replace(Data(), on_bad_image="skip"))
    assert [item.path for item in small.items] == ["0.png", "2.png", "3.png"]
    assert [item.path for item in large.items] == ["3.png"]
    assert torch.equal(large.pixels_DHWC, loaded(index, 32, on_bad_image="skip").pixels_DHWC[2:])


def test_a_zip_pack_loads_as_its_folder(tmp_path):
    rows = [{"path": f"{i}.png", "label": "a"} for i in range(4)]
    folder = one_set(tmp_path / "f", {row["path"]: picture(i) for i, row in enumerate(rows)})
    archive = pack(tmp_path / "set.zip", rows)
    from_zip = loaded(replace(folder, root=str(archive), kind="zip"))
    assert torch.equal(from_zip.pixels_DHWC, loaded(folder).pixels_DHWC)
    assert from_zip.digests == loaded(folder).digests


def test_an_image_that_is_not_square_gives_its_central_square_and_is_counted(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(6, 40, 20)})
    images = loaded(index, 20)
    assert (images.pixels_DHWC[0].numpy() == _array(index, 0)[:, 10:30]).all()
    assert images.notes == ("1 images are not square; their central square is used",)


def test_small_images_are_counted_or_refused(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(7, 16, 16), "b.png": picture(8, 64, 64)})
    assert loaded(index, 32).notes == ("1 images are smaller than 32 px and were enlarged, the smallest 16",)
    with pytest.raises(DataError, match="a.png: is 16 px a side after cropping, less than the 32 px wanted"):
        loaded(index, 32, min_size=32)
    assert loaded(index, 16, min_size=16).notes == ()


def test_crop_to_mask_takes_image_and_mask_through_the_same_square(tmp_path):
    pixels = np.full((40, 60, 3), 10, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:20, 30:50], mask[10:20, 30:50] = 200, 255
    contents, masks = {"a.png": Image.fromarray(pixels)}, {"a.png": Image.fromarray(mask)}
    images = loaded(one_set(tmp_path, contents, masks), 20, crop_to_mask=True, crop_margin=0.0)
    assert torch.equal(images.pixels_DHWC[0, :, :, 0] == 200, images.masks_DHW[0] == 1)
    assert images.masks_DHW.dtype == torch.uint8 and images.masks_DHW[0, 5:15].all() and images.masks_DHW.sum() == 200


def test_masks_follow_their_image_through_every_resize(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(9, 64, 64)}, {"a.png": disc(64, 64, 20)})
    sizes = {size: [0] for size in (64, 32, 16)}
    for size, images in zip(sizes, load_at_sizes(index, index.items, sizes, Data()), strict=True):
        wanted = np.asarray(disc(size, size, 20 * size / 64)) > 0
        assert images.masks_DHW.shape == (1, size, size)
        assert (images.masks_DHW[0].numpy().astype(bool) != wanted).mean() < 0.02


def test_a_crop_over_the_border_is_filled_with_gray(tmp_path):
    contents, masks = {"a.png": picture(10, 40, 20)}, {"a.png": Image.new("L", (40, 20), 255)}
    images = loaded(one_set(tmp_path, contents, masks), 40, crop_to_mask=True, crop_margin=0.0)
    assert (images.pixels_DHWC[0, :10] == 128).all() and (images.pixels_DHWC[0, 30:] == 128).all()
    assert images.masks_DHW[0, :10].sum() == 0 and images.masks_DHW[0, 10:30].all()


def test_gray_background(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(11)}, {"a.png": disc()})
    images = loaded(index, 32, background="gray")
    inside = images.masks_DHW[0].bool()
    assert (images.pixels_DHWC[0][~inside] == 128).all()
    assert (images.pixels_DHWC[0][inside].numpy() == _array(index, 0)[inside.numpy()]).all()


def test_progress_counts_every_file(tmp_path):
    index, seen = one_set(tmp_path, {f"{i}.png": picture(i) for i in range(3)}), []
    load_images(index, index.items, 8, Data(), lambda done, total, note="": seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Bad files


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    half = encoded(picture(12, 64, 64), "JPEG")
    contents = {"a.png": picture(0), "half.jpg": half[: len(half) // 2], "text.png": b"hello", "z.png": picture(1)}
    index = one_set(tmp_path, contents)
    with pytest.raises(DataError) as caught:
        loaded(index)
    message = str(caught.value)
    assert "2 of 4 images cannot be used" in message and "half.jpg: cannot be decoded" in message
    assert "truncated" in message and "text.png: is no image" in message and "data.on_bad_image=skip" in message
    images = loaded(index, on_bad_image="skip")
    assert [i.path for i in images.items] == ["a.png", "z.png"]
    assert [path for path, _ in images.skipped] == ["half.jpg", "text.png"]
    assert torch.equal(images.pixels_DHWC[1], loaded(one_set(tmp_path / "b", {"z.png": picture(1)})).pixels_DHWC[0])
    assert "2 of 4 images left out, the first half.jpg" in images.notes[0]


def test_many_bad_files_make_a_message_of_bounded_length(tmp_path):
    index = one_set(tmp_path, {f"{i:02d}.png": b"x" for i in range(25)})
    with pytest.raises(DataError, match="25 of 25 .* and 15 more"):
        loaded(index)


def test_a_file_that_vanished_after_the_index_was_read(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)})
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="b.png is missing"):
        loaded(index)


def test_a_bomb_among_the_files_is_named(tmp_path):
    index = one_set(tmp_path, {"bomb.png": bomb(9000, 9000)})
    with pytest.raises(DataError, match="bomb.png: its header says 9000 x 9000"):
        loaded(index)


def test_skipping_may_not_empty_a_class_or_a_split(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": b"x"})
    items = (index.items[0], replace(index.items[1], split="val"))
    with pytest.raises(DataError, match="no usable image is left of class 'a' in val; the first bad one is b.png"):
        load_images(index, items, 8, Data(on_bad_image="skip"))


def test_no_items(tmp_path):
    with pytest.raises(DataError, match="no image to load"):
        load_images(one_set(tmp_path, {"a.png": picture()}), (), 8, Data())


@pytest.mark.parametrize(
    "settings, masks, match",
    [
        ({"crop_to_mask": True}, None, "data.crop_to_mask. needs object masks"),
        ({"background": "gray"}, None, "data.background gray. needs object masks"),
        ({}, True, "masked recipes need object masks"),
    ],
)
def test_masks_wanted_and_absent(tmp_path, settings, masks, match):
    with pytest.raises(ConfigError, match=match):
        loaded(one_set(tmp_path, {"a.png": picture()}), masks=masks, **settings)


def test_a_mask_that_some_images_lack_is_a_bad_file(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc()})
    assert loaded(index).masks_DHW is None
    with pytest.raises(DataError, match="b.png: has no mask"):
        loaded(index, masks=True)
    kept = loaded(index, masks=True, on_bad_image="skip")  # for recipes alone: what is learned from stays the same
    assert kept.masks_DHW.flatten(1).any(1).tolist() == [True, False]
    assert kept.notes == ("1 images have no object in their mask: learned from, not edited within",)
    assert loaded(index, crop_to_mask=True, on_bad_image="skip").masks_DHW.shape == (1, 8, 8)


def test_a_mask_of_the_wrong_size(tmp_path):
    index = one_set(tmp_path, {"a.png": picture()}, {"a.png": disc(16, 16, 4)})
    with pytest.raises(DataError, match="its mask a.png.mask: the mask is 16 x 16 pixels, the image 32 x 32"):
        loaded(index)
    assert loaded(index, masks=False).masks_DHW is None


def test_an_empty_mask_is_an_error_where_the_object_is_needed(tmp_path):
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc(), "b.png": disc(radius=0)})
    for settings in ({"crop_to_mask": True}, {"background": "gray"}, {"masks": True}):
        with pytest.raises(DataError, match="b.png: its mask b.png.mask is empty"):
            loaded(index, **settings)
    assert loaded(index).masks_DHW.flatten(1).sum(dim=1).tolist()[1] == 0


def test_a_broken_mask_that_only_recipes_need_takes_no_image_from_learning(tmp_path):
    """Or an arm with masked recipes would learn from other images than the arms without."""
    index = one_set(tmp_path, {"a.png": picture(), "b.png": picture(1)}, {"a.png": disc(), "b.png": disc(16, 16, 4)})
    kept = loaded(index, masks=True, on_bad_image="skip")
    assert kept.masks_DHW.flatten(1).any(1).tolist() == [True, False] and not kept.skipped
    assert kept.notes == ("1 images have no object in their mask: learned from, not edited within",)
    assert torch.equal(kept.pixels_DHWC, loaded(index, masks=False, on_bad_image="skip").pixels_DHWC)
    assert len(loaded(index, crop_to_mask=True, on_bad_image="skip").items) == 1


def test_a_broken_mask(tmp_path):
    index = one_set(tmp_path, {"a.png": picture()}, {"a.png": b"hello"})
    with pytest.raises(DataError, match="its mask a.png.mask: is no image"):
        loaded(index)
