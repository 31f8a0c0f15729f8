"""MVIP trees of exactly the published layout."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest

from modules.config import Data
from modules.data.files import Files
from modules.data.images import load_images
from modules.data.index import read_index
from modules.data.mvip import ClassMeta, choose_roles, is_mvip, read_meta
from modules.data.sets import load_sets
from modules.data.sources import read_source
from modules.errors import ConfigError, DataError
from tests.data.trees import class_folders, disc, mvip_tree, picture, put

CAR = {f"Car{i}": "CarComponent" for i in range(6)}
CLASSES = {**CAR, "Drill": "Tool", "Saw": "Tool"}
SETTINGS = {"super_class": "CarComponent", "num_classes": 3}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return mvip_tree(tmp_path_factory.mktemp("mvip"), CLASSES)


def data(root, **settings) -> Data:
    return replace(Data(), root=str(root), **{**SETTINGS, **settings})


def test_the_layout_is_recognized_and_class_folders_are_not(tree, tmp_path):
    class_folders(tmp_path, {"train/bolt": 1, "test/bolt": 1})
    with Files(tree) as mvip, Files(tmp_path) as folders:
        assert is_mvip(mvip) and not is_mvip(folders)


def test_paths_splits_groups_masks_and_keywords(tree):
    source = read_source(str(tree))
    assert source.kind == "mvip" and len(source.items) == 8 * (6 + 2 + 3) * 2
    item = next(i for i in source.items if i.path == "Car0/train_data/1/30/cam_01/01_rgb.png")
    assert item.mask == "Car0/train_data/1/30/cam_01/01_rgb_mask_gen.png"
    assert (item.label, item.split, item.group) == ("Car0", "train", "Car0/train_data/1/30")
    assert item.keywords == ("metal", "car0")
    assert read_index(data(tree, num_classes=0, near_ood_classes=("Car4", "Car5")), 0).keywords() == tuple(
        ("metal", f"car{i}") for i in range(4)
    )
    sample = next(i for i in source.items if i.path == "Car0/valid_data/s1/cam_00/00_rgb.png")
    assert (sample.split, sample.group) == ("val", "Car0/valid_data/s1")


def test_roles_follow_super_class_count_and_seed(tree):
    index = read_index(data(tree), seed=0)
    assert len(index.classes) == 3 and set(index.classes) < set(CAR)
    counts = Counter((i.role, i.split) for i in index.items)
    near = set(CAR) - set(index.classes)
    assert {i.label for i in index.items if i.role == "near_ood"} == near
    assert {i.label for i in index.items if i.role == "far_ood"} == {"Drill", "Saw"}
    assert counts == {
        ("id", "train"): 3 * 6 * 2,
        ("id", "val"): 3 * 2 * 2,
        ("id", "test"): 3 * 3 * 2,
        ("near_ood", "val"): 1 * 2 * 2,  # the valid samples of one class, the test samples of two others
        ("near_ood", "test"): 2 * 3 * 2,
        ("far_ood", "test"): 2 * 3 * 2,
    }
    assert any("3 ID classes of super class CarComponent (class_seed 0)" in note for note in index.notes)


def test_classes_of_other_super_classes_are_read_as_far_ood(tree, tmp_path):
    settings = data(tree, image_size=16)
    sets = load_sets(settings, 0, masks=False)
    assert {item.label for item in sets.images["far_ood_test"].items} == {"Drill", "Saw"}
    assert len(sets.images["far_ood_test"].items) == 2 * 3 * 2
    path = "Drill/test_data/s0/cam_00/00_rgb.png"
    assert sets.summary()["files"][path]["set"] == "far_ood_test"
    other = class_folders(tmp_path / "other", {"cat": 2, "dog": 2})
    sets = load_sets(replace(settings, far_ood_root=str(other)), 0, masks=False)
    assert {item.label for item in sets.images["far_ood_test"].items} == {"cat", "dog"}
    assert any("12 images of the set itself are left out" in note for note in sets.summary()["notes"])


def test_the_class_draw_depends_on_class_seed_and_not_on_the_run_seed(tree):
    draws = {read_index(data(tree, class_seed=s), seed=0).classes for s in range(5)}
    assert len(draws) > 1
    assert read_index(data(tree), seed=0).classes == read_index(data(tree), seed=1).classes


def test_the_class_draw_is_a_function_of_names_sorted_first():
    metas = {label: ClassMeta((family,), ()) for label, family in CLASSES.items()}
    backwards = dict(reversed(metas.items()))
    settings = replace(Data(), **SETTINGS)
    assert choose_roles(metas, settings) == choose_roles(backwards, settings)


def test_named_near_ood_classes_are_held_out_before_the_draw():
    metas = {label: ClassMeta((family,), ()) for label, family in CLASSES.items()}
    roles = choose_roles(metas, replace(Data(), super_class="CarComponent", near_ood_classes=("Car0", "Saw")))
    assert roles["Car0"] == roles["Saw"] == "near_ood"
    assert Counter(roles.values()) == {"id": 5, "near_ood": 2, "far_ood": 1}


def test_a_class_of_two_super_classes_is_near_to_both():
    metas = {"A": ClassMeta(("Car",), ()), "B": ClassMeta(("Car",), ()), "AB": ClassMeta(("Tool", "Car"), ())}
    roles = choose_roles(metas | {"T": ClassMeta(("Tool",), ())}, replace(Data(), super_class="Car", num_classes=2))
    assert Counter(roles.values()) == {"id": 2, "near_ood": 1, "far_ood": 1} and roles["T"] == "far_ood"


def test_groups_never_straddle_splits_and_few_shot_takes_rotations_first(tree):
    index = read_index(data(tree, shots_per_class=6), seed=0)
    for label in index.classes:
        drawn = [i for i in index.select("id", "train") if i.label == label]
        assert len(drawn) == 6 and len({i.group for i in drawn}) == 6


def test_a_missing_valid_split_is_made_by_rotation(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    for label in CLASSES:
        (tmp_path / label / "valid_data").rename(tmp_path / label / "unused")
    index = read_index(data(tmp_path), seed=0)
    val, train = index.select("id", "val"), index.select("id", "train")
    assert val and {i.group for i in val}.isdisjoint(i.group for i in train)
    assert all("/train_data/" in i.path for i in index.select("near_ood", "val"))
    assert "MVIP: 6 classes without valid_data" in index.notes


def test_the_background_position_is_left_out_and_counted(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    for label in CAR:
        put(tmp_path / label / "train_data/background/0/cam_00/00_rgb.png", picture())
        put(tmp_path / label / "train_data/background/0/cam_00/00_rgb_mask_gen.png", disc(radius=0))
    index = read_index(data(tmp_path), seed=0)
    assert not any("background" in item.path for item in index.items)
    # counted where train_data is listed: the 3 ID and the 3 near-OOD classes
    assert any("6 images of the position `background` left out" in note for note in index.notes)


def test_empty_masks_are_left_out_and_counted_where_the_object_is_needed(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    empty = "Car0/train_data/0/0/cam_00/00_rgb_mask_gen.png"
    put(tmp_path / empty, disc(radius=0))
    settings = data(tmp_path, num_classes=0, near_ood_classes=("Car4", "Car5"), crop_to_mask=True)
    index = read_index(settings, seed=0)
    items = index.select("id", "train")
    images = load_images(index, items, 8, settings)
    assert len(images.items) == len(items) - 1
    assert images.skipped == (("Car0/train_data/0/0/cam_00/00_rgb.png", f"its mask {empty} is empty"),)
    assert f"1 of {len(items)} images left out" in images.notes[0]
    whole = load_images(index, items, 8, replace(settings, crop_to_mask=False))
    assert len(whole.items) == len(items) and whole.masks_DHW[0].sum() == 0


def test_classes_without_a_role_or_an_image_are_told(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    shutil.rmtree(tmp_path / "Saw/test_data")  # far-OOD classes give their test samples only
    index = read_index(data(tmp_path, near_ood_classes=("Car4", "Car5")), seed=0)
    idle = sorted(set(CAR) - {"Car4", "Car5"} - set(index.classes))
    assert len(idle) == 1
    assert f"MVIP: 1 classes have no role, neither drawn nor held out: {idle[0]}" in index.notes
    assert "2 near-OOD classes of the same, 1 far-OOD classes of others" in index.notes[0]


def test_a_class_that_nobody_chose_and_that_lacks_a_split_is_left_out(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    near = [item for item in read_index(data(tmp_path), seed=0).items if item.role == "near_ood"]
    tested = sorted({item.label for item in near if item.split == "test"})
    shutil.rmtree(tmp_path / tested[0] / "test_data")
    index = read_index(data(tmp_path), seed=0)
    left = {item.label for item in index.items if item.role == "near_ood"}
    assert left == {item.label for item in near} - {tested[0]}
    assert any(f"without '{tested[0]}', which has no image in the test split" in note for note in index.notes)
    with pytest.raises(DataError, match=f"near-OOD class '{tested[0]}' has no image in the test split"):
        read_index(data(tmp_path, num_classes=0, near_ood_classes=tuple(item.label for item in near)), seed=0)


def test_one_class_left_of_a_super_class_names_the_knob(tree):
    with pytest.raises(DataError, match="or lower `data.num_classes`"):
        read_index(data(tree, num_classes=5), seed=0)


def test_a_missing_image_or_mask_file_is_counted(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    (tmp_path / "Car0/train_data/0/0/cam_00/00_rgb.png").unlink()
    (tmp_path / "Car0/train_data/0/0/cam_01/01_rgb_mask_gen.png").unlink()
    settings = data(tmp_path, num_classes=0, near_ood_classes=("Car4", "Car5"))
    index = read_index(settings, seed=0)
    assert "MVIP: 1 camera folders left out because the _rgb.png is missing" in index.notes
    assert "MVIP: 1 images without a mask, because its file is missing" in index.notes
    items = index.select("id", "train")
    assert len(load_images(index, items, 8, replace(settings, crop_to_mask=True)).items) == len(items) - 1
    kept = load_images(index, items, 8, settings, masks=True)
    assert len(kept.items) == len(items) and kept.masks_DHW.flatten(1).any(1).sum() == len(items) - 1


def test_a_class_without_meta_json(tmp_path):
    mvip_tree(tmp_path, CLASSES)
    (tmp_path / "Saw" / "meta.json").unlink()
    with pytest.raises(DataError, match="Saw: this MVIP class has no meta.json; bring it"):
        read_index(data(tmp_path), seed=0)


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "`super_class` is None"),
        ('{"super_class": ""}', "names no `super_class`"),
        ('{"super_class": 3}', "`super_class` is 3"),
        ('{"super_class": "Car", "description": {"a": 1}}', "`description` is"),
    ],
)
def test_a_meta_json_of_another_form(tmp_path, text, match):
    put(tmp_path / "meta.json", text)
    with pytest.raises(DataError, match=match):
        read_meta(tmp_path)


def test_meta_json_takes_texts_and_lists(tmp_path):
    put(tmp_path / "meta.json", '{"super_class": ["CarComponent", "Metal"], "description": "round, black; \\nsteel"}')
    assert read_meta(tmp_path) == ClassMeta(("CarComponent", "Metal"), ("round", "black", "steel"))


def test_unknown_super_class_class_and_too_many_classes(tree):
    for match, settings in (
        ("'Cars'; this tree has CarComponent, Tool", {"super_class": "Cars"}),
        ("num_classes. is 7.*has 6 classes", {"num_classes": 7}),
        ("names Car9; this tree", {"near_ood_classes": ("Car9",)}),
    ):
        with pytest.raises(ConfigError, match=match):
            read_index(data(tree, **settings), seed=0)


def test_all_classes_as_id_leaves_no_near_ood_and_says_so(tree):
    index = read_index(data(tree, num_classes=0), seed=0)
    assert len(index.classes) == 6 and not any(i.role == "near_ood" for i in index.items)
    assert any(note.startswith("near-OOD: none, because every class") for note in index.notes)
