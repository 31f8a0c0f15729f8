"""The index: any set, split, checked, with a clear word for everything that cannot be learned from."""

import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from modules.config import Data
from modules.data.index import read_far_ood, read_index, read_raw
from modules.errors import ConfigError, DataError
from tests.data.trees import class_folders, csv_set, declared_rows, pack, put, rows_text

PACKS = Path(os.environ.get("TRAINER_PACKS", "packs"))


def data(root, **settings) -> Data:
    return replace(Data(), root=str(root), **settings)


def refused(match: str, root, error=DataError, **settings) -> None:
    with pytest.raises(error, match=match):
        read_index(data(root, **settings), seed=0)


def refused_rows(tmp_path, rows, match: str) -> None:
    csv_set(tmp_path, rows)
    refused(match, tmp_path)


def edited(rows: list[dict], where, **values) -> list[dict]:
    return [{**row, **values} if where(row) else row for row in rows]


def test_a_declared_set_is_taken_as_it_is(tmp_path):
    rows = declared_rows()
    index = read_index(data(csv_set(tmp_path, rows)), seed=0)
    assert index.classes == ("bolt", "nut")
    assert {(i.path, i.label, i.role, i.split, i.group) for i in index.items} == {
        (r["path"], r["label"], r["role"], r["split"], r["group"]) for r in rows
    }
    assert [i.path for i in index.items] == sorted(i.path for i in index.items)
    assert len(index.select("id", "train")) == 8 and len(index.select("near_ood", "test")) == 2
    assert index.label_ids(index.select("id", "val")) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (
        "id: 2 classes; train 8 images of 4 groups, val 8 images of 4 groups, test 8 images of 4 groups" in index.notes
    )


def test_select_refuses_an_unknown_role_or_split(tmp_path):
    index = read_index(data(csv_set(tmp_path, declared_rows())), seed=0)
    with pytest.raises(ValueError, match="'outlier'"):
        index.select("outlier", "test")


def test_class_folders_become_a_whole_index(tmp_path):
    class_folders(tmp_path, {"bolt": 10, "nut": 10, "pin": 4, "rod": 4})
    index = read_index(data(tmp_path, near_ood_classes=("rod", "pin")), seed=0)
    assert index.classes == ("bolt", "nut")
    counts = Counter((i.role, i.split) for i in index.items)
    assert counts == {
        ("id", "train"): 12,
        ("id", "val"): 4,
        ("id", "test"): 4,
        ("near_ood", "val"): 4,
        ("near_ood", "test"): 4,
    }
    assert any("test split: none was declared" in note for note in index.notes)


def test_shuffling_rows_or_files_never_changes_the_image_label_map(tmp_path):
    rows = declared_rows()
    csv_set(tmp_path, rows)
    first = read_index(data(tmp_path, shots_per_class=3), seed=0)
    put(tmp_path / "index.csv", rows_text(rows[::-1]))
    assert read_index(data(tmp_path, shots_per_class=3), seed=0) == first
    label_of = {row["path"]: row["label"] for row in rows}
    assert all(item.label == label_of[item.path] for item in first.items)


def test_few_shot_is_shared_by_a_seed_and_reaches_train_only(tmp_path):
    csv_set(tmp_path, declared_rows(groups=4))
    whole = read_index(data(tmp_path), seed=0)
    few = read_index(data(tmp_path, shots_per_class=2), seed=0)
    train = few.select("id", "train")
    assert Counter(i.label for i in train) == {"bolt": 2, "nut": 2}
    assert all(len({i.group for i in train if i.label == label}) == 2 for label in few.classes)
    assert set(train) < set(whole.select("id", "train"))
    for role, split in (("id", "val"), ("id", "test"), ("near_ood", "val"), ("near_ood", "test")):
        assert few.select(role, split) == whole.select(role, split)
    assert few == read_index(data(tmp_path, shots_per_class=2), seed=0)
    draws = {read_index(data(tmp_path, shots_per_class=2), seed=s).select("id", "train") for s in range(6)}
    assert len(draws) > 1


def test_near_ood_rows_without_a_split_are_divided_by_class(tmp_path):
    rows = edited(declared_rows(near=("pin", "rod", "cap")), lambda r: r["role"] == "near_ood", split="")
    index = read_index(data(csv_set(tmp_path, rows)), seed=0)
    of_class = defaultdict(set)
    for item in index.items:
        if item.role == "near_ood":
            of_class[item.label].add(item.split)
    assert sorted(split for found in of_class.values() for split in found) == ["test", "test", "val"]


def test_the_pretrain_role_is_selectable_and_no_id_class(tmp_path):
    rows = declared_rows()
    rows += [
        {**rows[0], "path": f"cap/{i}.png", "label": "cap", "role": "pretrain", "split": "", "group": ""}
        for i in (0, 1)
    ]
    index = read_index(data(csv_set(tmp_path, rows)), seed=0)
    assert len(index.select("pretrain", "train")) == 2 and "cap" not in index.classes


def test_a_captioned_pack_is_read_raw(tmp_path):
    rows = [{"path": "a.png", "caption": "a photo of a red cap", "noun": "cap", "model": "cap_1"}]
    index = read_raw(str(pack(tmp_path / "set.zip", rows)))
    item = index.items[0]
    assert (item.caption, item.noun, item.group) == ("a photo of a red cap", "cap", "cap_1")
    assert (item.role, item.split, item.label, index.classes) == ("", "", "", ())


def test_far_ood_takes_the_test_images_of_another_set(tmp_path):
    csv_set(tmp_path / "near", declared_rows())
    csv_set(tmp_path / "far", declared_rows(("cat", "dog"), ("fox", "cow")))
    far = read_far_ood(data(tmp_path / "near", far_ood_root=str(tmp_path / "far")))
    assert {(i.label, i.role, i.split) for i in far.items} == {("cat", "far_ood", "test"), ("dog", "far_ood", "test")}
    assert len(far.items) == 8 and far.root == str(tmp_path / "far") and far.select("far_ood", "test") == far.items
    assert read_far_ood(data(tmp_path / "near")) is None
    class_folders(tmp_path / "plain", {"cat": 3})
    assert len(read_far_ood(data(tmp_path / "near", far_ood_root=str(tmp_path / "plain"))).items) == 3
    with pytest.raises(ConfigError, match="data.far_ood_root. is .data.root. itself"):
        read_far_ood(data(tmp_path / "near", far_ood_root=str(tmp_path / "near" / "index.csv")))
    csv_set(tmp_path / "near", declared_rows(("cat", "dog"), ("fox", "cow")), name="far.csv")
    beside = read_far_ood(data(tmp_path / "near", far_ood_root=str(tmp_path / "near" / "far.csv")))
    assert {item.label for item in beside.items} == {"cat", "dog"}  # two sets may lie in one folder
    for root, error in ((str(tmp_path / "nowhere"), DataError), ("embedded:nothing", ConfigError)):
        with pytest.raises(error, match="^`data.far_ood_root` "):
            read_far_ood(data(tmp_path / "near", far_ood_root=root))


def test_missing_and_empty_root(tmp_path):
    refused("does not exist", tmp_path / "nowhere")
    refused("holds no image", tmp_path)


def test_a_class_with_one_image(tmp_path):
    class_folders(tmp_path, {"bolt": 9, "nut": 1})
    refused(r"class 'nut' has one image \(nut/00.png\)", tmp_path)


def test_a_class_with_one_train_image(tmp_path):
    rows = [r for r in declared_rows() if r["label"] != "nut" or r["split"] != "train" or r["path"].endswith("0-0.png")]
    refused_rows(tmp_path, rows, "class 'nut' has one train image")


def test_a_class_in_test_only(tmp_path):
    rows = [r for r in declared_rows() if r["label"] != "nut" or r["split"] == "test"]
    refused_rows(tmp_path, rows, "class 'nut' is in test only; add train images")


def test_a_class_both_id_and_near_ood(tmp_path):
    rows = declared_rows()
    rows = edited(rows, lambda r: r["path"] == "nut/nut-test-0-0.png", role="near_ood")
    refused_rows(tmp_path, rows, "class 'nut' has the roles id and near_ood")


def test_a_near_ood_class_in_val_and_test(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "pin/1.png", split="test", group="")
    refused_rows(tmp_path, rows, "OOD class 'pin' is in val and test")


def test_near_ood_in_the_train_split(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "pin/1.png", split="train", group="")
    refused_rows(tmp_path, rows, "pin/1.png: near_ood in the train split")


def test_near_ood_with_and_without_split(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "pin/1.png", split="")
    refused_rows(tmp_path, rows, "pin/1.png: near-OOD without a split")


def test_a_group_in_two_splits(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "bolt/bolt-test-0-0.png", group="bolt-train-1")
    refused_rows(tmp_path, rows, "group 'bolt-train-1' is in (train|test) .* and in (train|test)")
    refused_rows(tmp_path, rows, r"a group is what .* column says, or a folder inside a class folder\)$")


def test_a_group_shared_by_a_train_class_and_a_near_ood_class(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "pin/1.png", group="bolt-train-1")
    refused_rows(tmp_path, rows, "group 'bolt-train-1' is in train")


def scenes(tmp_path, labels, scenes_of) -> Path:
    """One image of each label in each of its scenes, the scene its group; no split is declared."""
    rows = [{"path": f"{x}/{g}.png", "label": x, "group": f"s{g:02d}"} for x in labels for g in scenes_of(x)]
    return csv_set(tmp_path, rows)


def test_held_out_classes_of_shared_groups_keep_the_images_of_their_own_split(tmp_path):
    """Scenes 0 to 11 show every class, scenes 12 to 15 the held-out ones alone."""
    path = scenes(tmp_path, ("bolt", "nut", "pin", "rod"), lambda x: range(16 if x in ("pin", "rod") else 12))
    tests = set()
    for seed in range(4):
        index = read_index(data(path, near_ood_classes=("pin", "rod")), seed)
        splits_of = defaultdict(set)
        for item in index.items:
            splits_of[item.group].add(item.split)
        assert all(len(found) == 1 for found in splits_of.values()), "no group lies in two splits"
        id_split = {item.group: item.split for item in index.items if item.role == "id"}
        near = [item for item in index.items if item.role == "near_ood"]
        assert all(id_split.get(item.group, item.split) == item.split for item in near)
        assert Counter(item.split for item in near) == {"val": 2 + 2, "test": 2 + 2}  # of shared scenes, of their own
        assert any("near-OOD: 24 of 32 images left out, because images of their group" in note for note in index.notes)
        tests.add(index.select("near_ood", "test"))
    assert len(tests) == 1, "every seed is tested on the same images"


def test_a_held_out_class_without_an_image_in_its_own_split_is_told_or_refused(tmp_path):
    """Of the scenes that show ID classes only 2 and 3, both in train, show held-out ones."""
    names = ("bolt", "nut", "pin", "rod", "cap")
    lone = {"pin": (2, 3), "rod": range(12, 16), "cap": range(12, 16)}
    path = scenes(tmp_path / "told", names, lambda x: lone.get(x, range(12)))
    index = read_index(data(path, near_ood_classes=("pin", "rod", "cap")), seed=0)
    assert {item.label for item in index.items if item.role == "near_ood"} == {"rod", "cap"}
    assert any(note.endswith("nothing is left of pin") for note in index.notes)
    path = scenes(tmp_path / "refused", names[:4], lambda x: (2, 3) if x in ("pin", "rod") else range(12))
    refused("near-OOD has no image left for val: every group of rod ", path, near_ood_classes=("pin", "rod"))


def test_an_empty_label(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "bolt/bolt-val-0-0.png", label=" ")
    refused_rows(tmp_path, rows, "bolt/bolt-val-0-0.png has an empty label")


def test_a_pack_without_labels(tmp_path):
    refused_rows(tmp_path, [{"path": "a.png", "caption": "a photo"}], "a.png has an empty label")


@pytest.mark.parametrize("twin", ["Bolt", "bolt ", "bo lt", "ｂｏｌｔ"])
def test_labels_that_differ_only_in_case_or_spaces(tmp_path, twin):
    rows = edited(declared_rows(), lambda r: r["path"] == "bolt/bolt-val-0-0.png", label=twin)
    refused_rows(tmp_path, rows, "differ only in case or spaces")


def test_a_path_twice(tmp_path):
    rows = declared_rows()
    refused_rows(tmp_path, [*rows, rows[0]], "was already on line 2")


def test_one_id_class(tmp_path):
    refused_rows(tmp_path, declared_rows(classes=("bolt",)), r"there are 1 ID classes \(bolt\)")


def test_an_id_split_that_is_filled_only_in_part(tmp_path):
    rows = edited(declared_rows(), lambda r: r["path"] == "bolt/bolt-val-0-0.png", split="")
    refused_rows(tmp_path, rows, "bolt/bolt-val-0-0.png: has no split")


def test_a_set_without_val_split_gets_one(tmp_path):
    rows = [r for r in declared_rows(groups=4) if r["role"] != "id" or r["split"] != "val"]
    index = read_index(data(csv_set(tmp_path, rows)), seed=0)
    assert {i.group for i in index.select("id", "val")}.isdisjoint(i.group for i in index.select("id", "train"))
    assert len(index.select("id", "val")) == 4 and any("val split: none was declared" in n for n in index.notes)


def test_an_unknown_held_out_class_gets_a_suggestion(tmp_path):
    class_folders(tmp_path, {"bolt": 5, "nut": 5, "washer": 5})
    refused(
        "'wascher', which is no ID class; did you mean 'washer'", tmp_path, ConfigError, near_ood_classes=("wascher",)
    )


def test_held_out_classes_beside_declared_ones(tmp_path):
    csv_set(tmp_path, declared_rows())
    refused("declares near-OOD classes itself", tmp_path, ConfigError, near_ood_classes=("nut",))


def test_a_held_out_class_may_have_one_image(tmp_path):
    class_folders(tmp_path, {"bolt": 5, "nut": 5, "pin": 1, "rod": 1})
    index = read_index(data(tmp_path, near_ood_classes=("pin", "rod")), seed=0)
    assert len(index.select("near_ood", "val")) == len(index.select("near_ood", "test")) == 1


def test_one_held_out_class(tmp_path):
    class_folders(tmp_path, {"bolt": 5, "nut": 5, "pin": 5})
    refused("it needs two or more", tmp_path, near_ood_classes=("pin",))


def test_mvip_settings_on_another_set(tmp_path):
    class_folders(tmp_path, {"bolt": 5, "nut": 5})
    refused("data.super_class.*read as folder", tmp_path, ConfigError, super_class="CarComponent")
    refused("data.num_classes", tmp_path, ConfigError, num_classes=1)


def test_the_embedded_pack_has_the_counts_of_its_readme():
    index = read_index(Data(), seed=0)
    assert len(index.classes) == 20
    counts = Counter((i.role, i.split) for i in index.items)
    assert counts["id", "train"] == 1235 and counts["id", "val"] == 461 and counts["id", "test"] == 1524
    assert counts["near_ood", "val"] == 316 and counts["near_ood", "test"] == 625
    assert len({i.group for i in index.select("id", "test")}) == 367


@pytest.mark.skipif(not PACKS.exists(), reason="TRAINER_PACKS names no folder with the grocery and pretrain packs")
def test_the_other_packs_have_the_counts_of_their_readme():
    grocery = read_index(data(PACKS / "grocery96.zip", shots_per_class=16), seed=0)
    assert len(grocery.classes) == 20 and len(grocery.select("id", "train")) == 320
    assert (
        len(grocery.select("id", "test")) == 680 and len({i.label for i in grocery.select("pretrain", "train")}) == 41
    )
    captioned = read_raw(str(PACKS / "pretrain64.zip"))
    assert len(captioned.items) == 22460 and all(i.caption and i.noun and i.group for i in captioned.items)
