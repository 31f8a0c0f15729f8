"""The image sets of a run: which images each room is handed, what data.json says of them."""

import dataclasses

import pytest
import torch

from modules.config import Data
from modules.data.sets import JUDGED_PER_CLASS, load_sets
from modules.errors import DataError
from tests.base.tinyset import COLORS, NEAR_OOD_MODELS, SIZE, VIEWS, write_pack
from tests.data.trees import class_folders, csv_set, declared_rows, picture, put


def settings(root, **changes) -> Data:
    return dataclasses.replace(Data(), root=str(root), image_size=SIZE, **changes)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("sets") / "tiny.zip")


@pytest.fixture(scope="module")
def sets(pack):
    return load_sets(settings(pack), 0, masks=False)


def test_every_image_is_in_one_set_under_its_own_label(sets):
    counts = {name: len(images.items) for name, images in sets.images.items()}
    near = NEAR_OOD_MODELS * VIEWS
    assert counts == {"train": 24, "val": 16, "test": 24, "near_ood_val": near, "near_ood_test": near}
    paths = [item.path for images in sets.images.values() for item in images.items]
    assert len(paths) == len(set(paths))
    assert sets.index.classes == tuple(COLORS)
    assert sets.labels_D.dtype == torch.int64 and torch.equal(sets.labels_D, sets.labels("train"))
    for item, label in zip(sets.train.items, sets.labels_D.tolist(), strict=True):
        assert item.split == "train" and item.path.startswith(sets.index.classes[label] + "/")


def test_data_json_accounts_for_every_file(sets):
    summary = sets.summary()
    assert len(summary["files"]) == sum(len(images.items) for images in sets.images.values())
    for name, images in sets.images.items():
        for item, digest in zip(images.items, images.digests, strict=True):
            expected = {"label": item.label, "set": name, "group": item.group, "sha256": digest}
            assert summary["files"][item.path] == expected
    assert summary["classes"] == list(COLORS) and summary["kind"] == "zip" and summary["skipped"] == []
    assert summary["digest"] == sets.digest


def test_the_digest_is_that_of_the_content(tmp_path, sets, pack):
    first = load_sets(settings(write_pack(tmp_path / "again.zip")), 0, masks=False)
    assert first.digest == sets.digest, "another place, the same images"
    root = tmp_path / "set"
    csv_set(root, declared_rows())
    before = load_sets(settings(root), 0, masks=False).digest
    put(root / "bolt" / "bolt-test-0-0.png", picture(999))
    after = load_sets(settings(root), 0, masks=False).digest
    assert after != before
    train = [row for row in declared_rows() if row["role"] == "id" and row["split"] == "train"]
    swapped = {train[0]["path"]: train[-1]["label"], train[-1]["path"]: train[0]["label"]}
    csv_set(root, [row | {"label": swapped.get(row["path"], row["label"])} for row in declared_rows()])
    put(root / "bolt" / "bolt-test-0-0.png", picture(999))
    assert load_sets(settings(root), 0, masks=False).digest != after, "the same files under other labels"


def test_far_ood_may_use_the_same_paths(tmp_path, pack):
    far = write_pack(tmp_path / "far.zip")
    sets = load_sets(settings(pack, far_ood_root=str(far)), 0, masks=False)
    files = sets.summary()["files"]
    assert len(files) == sum(len(images.items) for images in sets.images.values())
    path = sets.images["test"].items[0].path
    assert files[path]["set"] == "test" and files[f"{sets.far_index.root}/{path}"]["set"] == "far_ood_test"


def test_progress_runs_over_all_sets(pack):
    calls = []
    load_sets(settings(pack), 0, masks=False, progress=lambda done, total, note="": calls.append((done, total, note)))
    assert [done for done, _, _ in calls] == list(range(1, 85)) and {total for _, total, _ in calls} == {84}
    assert list(dict.fromkeys(note for _, _, note in calls)) == [
        "train",
        "val",
        "test",
        "near_ood_val",
        "near_ood_test",
    ]


def test_a_missing_test_split_is_made_of_groups_that_train_does_not_hold(tmp_path):
    csv_set(tmp_path, [row for row in declared_rows() if row["split"] != "test"])
    sets = load_sets(settings(tmp_path), 0, masks=False)
    groups = {name: {item.group_id for item in images.items} for name, images in sets.images.items()}
    assert groups["test"] and not groups["test"] & (groups["train"] | groups["val"])
    assert any(note.startswith("test split: none was declared; made from") for note in sets.summary()["notes"])


def test_no_train_split_is_an_error(tmp_path):
    csv_set(tmp_path, [row for row in declared_rows() if row["split"] != "train"])
    with pytest.raises(DataError, match="no image is in the train split"):
        load_sets(settings(tmp_path), 0, masks=False)


def test_generation_starts_from_the_train_images_row_for_row(sets, pack):
    assert sets.at_generation == {} and sets.generation_size is None
    same = load_sets(settings(pack), 0, masks=False, generation_size=SIZE)
    assert same.sources() is same.train and same.val_at_generation()[0] is same.images["val"]
    smaller = load_sets(settings(pack), 0, masks=False, generation_size=16)
    assert torch.equal(smaller.train.pixels_DHWC, sets.train.pixels_DHWC) and smaller.digest == sets.digest
    assert smaller.sources().items == sets.train.items and smaller.sources().pixels_DHWC.shape == (24, 16, 16, 3)


def test_some_val_images_of_each_class_are_kept_at_the_size_of_generation(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.data.sets.JUDGED_IMAGES", 1)
    class_folders(tmp_path, {"bolt": 80, "nut": 80})
    sets = load_sets(settings(tmp_path, val_fraction=0.2), 0, masks=False, generation_size=8)
    val, rows = sets.val_at_generation()
    labels = [item.label for item in val.items]
    assert min(len(sets.images["val"].items) // 2, JUDGED_PER_CLASS) == JUDGED_PER_CLASS
    assert labels.count("bolt") == labels.count("nut") == JUDGED_PER_CLASS and len(rows) == len(labels)
    assert val.pixels_DHWC.shape == (len(labels), 8, 8, 3)


@pytest.mark.parametrize("size", [16, 32])
def test_images_smaller_than_the_pipeline_are_refused_whatever_is_stored(size, tmp_path):
    """Even under on_bad_image=skip: a row left out here would shift every later one against its label."""
    class_folders(tmp_path, {"bolt": 20, "nut": 20})
    index = load_sets(settings(tmp_path), 0, masks=False).train
    put(tmp_path / index.items[3].path, picture(5, 20, 20))
    given = dataclasses.replace(settings(tmp_path, on_bad_image="skip"), image_size=size)
    sets = load_sets(given, 0, masks=False, generation_size=32)
    assert len(sets.train.items) == len(index.items), "it is large enough to be stored"
    with pytest.raises(
        DataError, match=r"1 of \d+ train images are smaller than the 32 px .*: bolt/05.png \(20 px\); remove"
    ):
        sets.sources()
