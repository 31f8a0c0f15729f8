"""Splits: by group, held-out classes, few-shot draws; pure functions of seed and names."""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.data.items import Item
from modules.data.splits import complete_splits, draw_groups, few_shot, hold_out
from modules.errors import DataError


def images(label: str, groups: int, views: int = 3, split: str = "") -> list[Item]:
    return [
        Item(f"{label}/{split}{g}-{v}.png", label, "id", split, f"{label}-{split}{g}")
        for g in range(groups)
        for v in range(views)
    ]


def splits_of(items) -> dict[str, str]:
    return {item.path: item.split for item in items}


def test_missing_splits_are_made_by_group():
    items, notes = complete_splits(images("bolt", 10) + images("nut", 5), seed=0, val_fraction=0.2)
    of_group = defaultdict(set)
    for item in items:
        of_group[item.group].add(item.split)
    assert all(len(found) == 1 for found in of_group.values())
    groups = Counter((group.split("-")[0], next(iter(found))) for group, found in of_group.items())
    # 2 of 10 groups for test, then round(.2 * 8) = 2 of the other 8 for val; 1 of 5, then 1 of 4
    assert groups == {
        ("bolt", "test"): 2,
        ("bolt", "val"): 2,
        ("bolt", "train"): 6,
        ("nut", "test"): 1,
        ("nut", "val"): 1,
        ("nut", "train"): 3,
    }
    assert len(notes) == 2 and "test split: none was declared" in notes[0] and "seed 0" in notes[1]


def test_a_declared_split_is_kept_and_only_the_missing_one_made():
    declared = images("bolt", 6, split="train") + images("bolt", 2, split="test")
    items, notes = complete_splits(declared, seed=0, val_fraction=0.2)
    assert {i.path for i in items if i.split == "test"} == {i.path for i in declared if i.split == "test"}
    assert len({i.group for i in items if i.split == "val"}) == 1
    assert len(notes) == 1 and notes[0].startswith("val split")
    whole = declared + images("bolt", 1, split="val")
    assert complete_splits(whole, seed=0, val_fraction=0.2) == (whole, [])


def test_the_test_split_is_the_same_for_every_seed_and_the_val_split_is_not():
    items = images("bolt", 30) + images("nut", 30)
    made = [complete_splits(items, seed, 0.2)[0] for seed in (0, 1)]
    tests = [{i.path for i in run if i.split == "test"} for run in made]
    vals = [{i.path for i in run if i.split == "val"} for run in made]
    assert tests[0] == tests[1] and vals[0] != vals[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order_of_items(seed, shuffler):
    items = images("bolt", 7) + images("nut", 9, views=2) + images("pin", 4)
    shuffled = items.copy()
    shuffler.shuffle(shuffled)
    assert splits_of(complete_splits(items, seed, 0.3)[0]) == splits_of(complete_splits(shuffled, seed, 0.3)[0])
    train, mixed = [[Item(**{**vars(i), "split": "train"}) for i in order] for order in (items, shuffled)]
    assert {i.path for i in few_shot(train, 5, seed)[0]} == {i.path for i in few_shot(mixed, 5, seed)[0]}


def test_another_class_does_not_change_the_splits_of_a_class():
    alone = splits_of(complete_splits(images("bolt", 9), 0, 0.3)[0])
    beside = splits_of(complete_splits(images("bolt", 9) + images("nut", 9), 0, 0.3)[0])
    assert alone.items() <= beside.items()


def test_a_group_of_several_classes_is_decided_once():
    shared = [Item(f"{label}/{g}.png", label, "id", "", f"scene-{g}") for label in ("a", "b") for g in range(8)]
    of_group = defaultdict(set)
    for item in complete_splits(shared, 0, 0.25)[0]:
        of_group[item.group].add(item.split)
    assert all(len(found) == 1 for found in of_group.values())
    assert Counter(next(iter(s)) for s in of_group.values()) == {"train": 4, "test": 2, "val": 2}


def test_images_without_a_group_are_their_own():
    items = [Item(f"{i}.png", "bolt") for i in range(10)]
    assert len(draw_groups(items, "val-split", 0, 0.2, keep=1)) == 2


def test_a_class_with_too_few_groups_is_named():
    how = r"\(a folder inside a class folder, or its `group` or `model` column\)"
    wanted = (
        rf"class 'nut' has 6 images in 2 groups {how}; .*needs 3 groups and 4 images or more.*images of other objects"
    )
    with pytest.raises(DataError, match=wanted):
        complete_splits(images("bolt", 5) + images("nut", 2), 0, 0.2)
    with pytest.raises(
        DataError, match=r"has 3 images in 3 groups .*needs 3 groups and 4 images or more.*add images, "
    ):
        complete_splits(images("bolt", 3, views=1), 0, 0.2)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("declared", "least", "splits"), [("", 4, "test and val splits"), ("train", 3, "val split")], ids=["none", "train"]
)
def test_the_least_number_of_images_is_said_at_once_and_suffices(declared, least, splits, fraction):
    tested = [Item("test/0.png", "bolt", "id", "test")] if declared else []
    for count in range(1, least + 3):
        items = [Item(f"{i}.png", "bolt", "id", declared) for i in range(count)]
        if count < least:
            found = r"one image \(0.png\)" if count == 1 else f"{count} images"
            wanted = f"class 'bolt' has {found}; making the {splits} from it needs {least} images or more"
            with pytest.raises(DataError, match=wanted):
                complete_splits(items + tested, 0, fraction)
        else:
            found = Counter(item.split for item in complete_splits(items + tested, 0, fraction)[0])
            assert found["train"] >= 2 and found["val"] >= 1 and found["test"] >= 1


def test_some_items_without_a_split():
    with pytest.raises(DataError, match="has no split while others have one"):
        complete_splits(images("bolt", 3, split="train") + images("nut", 3), 0, 0.2)


def test_no_id_class_is_left():
    with pytest.raises(DataError, match="there is no ID class: every one is held out"):
        complete_splits([], 0, 0.2)


def test_no_train_split():
    with pytest.raises(DataError, match="no image is in the train split, only in test, val"):
        complete_splits(images("bolt", 3, split="test") + images("bolt", 3, split="val"), 0, 0.2)


def test_held_out_classes_for_val_and_test_are_disjoint_and_the_same_for_every_seed():
    items = [item for label in "abcdefgh" for item in images(label, 2)]
    near, line = hold_out(items, val_fraction=0.34, declared=set())
    of_class = defaultdict(set)
    for item in near:
        of_class[item.label].add(item.split)
    assert all(len(found) == 1 for found in of_class.values())
    assert Counter(next(iter(s)) for s in of_class.values()) == {"val": 3, "test": 5}
    assert "3 for val, 5 others for test" in line
    random.Random(0).shuffle(items)
    assert splits_of(hold_out(items, 0.34, set())[0]) == splits_of(near)


def test_held_out_classes_give_the_images_of_the_split_they_are_scored_in():
    items = [i for label in "ab" for split in ("train", "val", "test") for i in images(label, 2, split=split)]
    near, _ = hold_out(items, 0.34, declared={"train", "val", "test"})
    assert {(i.split, i.path.split("/")[1][: len(i.split)]) for i in near} == {("val", "val"), ("test", "test")}
    without_val, _ = hold_out([i for i in items if i.split != "val"], 0.34, declared={"train", "test"})
    assert {i.path.split("/")[1][:5] for i in without_val if i.split == "val"} == {"train"}


@pytest.mark.parametrize("val_fraction", [0.01, 0.99])
def test_val_and_test_get_a_held_out_class_each_whatever_the_fraction(val_fraction):
    near, _ = hold_out(images("a", 2) + images("b", 2), val_fraction, set())
    assert {item.split for item in near} == {"val", "test"}


def test_one_held_out_class_is_too_few():
    with pytest.raises(DataError, match="one class a; it needs two or more"):
        hold_out(images("a", 3), 0.34, set())


def test_a_held_out_class_without_images_in_its_split():
    items = images("a", 2, split="train") + images("b", 2, split="train")
    with pytest.raises(DataError, match="has no image in the val split|has no image in the test split"):
        hold_out(items, 0.34, declared={"train", "val", "test"})


@settings(max_examples=40, deadline=None)
@given(shots=st.integers(1, 14), seed=st.integers(0, 4))
def test_few_shot_takes_groups_first(shots, seed):
    items = images("bolt", 4, views=3, split="train")
    drawn, _ = few_shot(items, shots, seed)
    assert len(drawn) == min(shots, 12)
    per_group = Counter(item.group for item in drawn)
    counts = [per_group[f"bolt-train{g}"] for g in range(4)]
    assert max(counts) - min(counts) <= 1


def test_few_shot_draws_of_one_seed_are_nested_and_seeds_differ():
    items = images("bolt", 8, split="train") + images("nut", 8, split="train")
    drawn = {n: {i.path for i in few_shot(items, n, 0)[0]} for n in (1, 4, 16)}
    assert drawn[1] < drawn[4] < drawn[16]
    assert drawn[4] != {i.path for i in few_shot(items, 4, 1)[0]}


def test_few_shot_leaves_val_and_test_whole_and_counts_short_classes():
    held = images("bolt", 2, split="val") + images("bolt", 2, split="test")
    items = images("bolt", 8, split="train") + images("nut", 1, views=2, split="train") + held
    drawn, line = few_shot(items, 4, 0)
    assert [i for i in drawn if i.split != "train"] == held
    assert Counter(i.label for i in drawn if i.split == "train") == {"bolt": 4, "nut": 2}
    assert "6 of 26" in line and "fewer exist of nut (2)" in line
