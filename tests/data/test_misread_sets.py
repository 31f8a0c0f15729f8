"""Sets that would be read as something else than was meant: they are refused, or a note says so."""

import os

import pytest

from modules.config import Data
from modules.data.index import read_index
from modules.data.sources import read_source
from modules.errors import ConfigError, DataError
from tests.data.trees import class_folders, csv_set, picture, put


def refused(match: str, root) -> None:
    with pytest.raises(DataError, match=match):
        read_source(str(root))


def test_formats_that_are_not_read_are_told_apart_from_what_is_no_image(tmp_path):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    for name in ("a.HEIC", "b.heic", "c.gif", "d.txt"):
        put(tmp_path / "bolt" / name, "no matter")
    assert read_source(str(tmp_path)).notes == (
        "files ignored because they are no images: 1 .txt",
        "files ignored because no such format is read; convert them to PNG or JPEG: 1 .gif, 2 .heic",
    )


@pytest.mark.parametrize("names", [("training", "testing"), ("train", "extra"), ("Test-Set", "other")])
def test_folders_named_nearly_as_splits_are_not_taken_for_classes(names, tmp_path):
    class_folders(tmp_path, {f"{name}/{label}": 1 for name in names for label in ("bolt", "nut")})
    refused("is named like a split.*name the split folders train, val and test", tmp_path)


def test_a_class_may_be_called_train_if_it_holds_images(tmp_path):
    class_folders(tmp_path, {"train": 2, "car": 2})
    assert {item.label for item in read_source(str(tmp_path)).items} == {"train", "car"}


@pytest.mark.parametrize("inner", ["", "bolt", "bolt/s1"])
def test_a_folder_that_cannot_be_read_is_named(inner, tmp_path, monkeypatch):
    class_folders(tmp_path, {"bolt/s1": 1, "nut": 1})
    scandir = os.scandir

    def denied(path):
        if os.fspath(path) == os.fspath(tmp_path / inner):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(rf"{tmp_path / inner}: the folder cannot be read \(Permission denied\)", tmp_path)


def test_a_class_name_that_yaml_reads_as_a_number_is_to_be_quoted(tmp_path):
    class_folders(tmp_path, {"001": 3, "002": 3, "bolt": 3})
    with pytest.raises(
        ConfigError, match=r"names '1', which is no ID class; .* what 001 says: quote it, as in \['001'\]"
    ):
        read_index(Data(root=str(tmp_path), near_ood_classes=("1",)), seed=0)


def test_a_class_named_like_a_date_that_is_none_is_a_class_like_others(tmp_path):
    class_folders(tmp_path, {"4711-23-99": 3, "nut": 3, "bolt": 3})
    with pytest.raises(ConfigError, match=r"names 'washer', which is no ID class; classes are 4711-23-99, bolt, nut"):
        read_index(Data(root=str(tmp_path), near_ood_classes=("washer",)), seed=0)


def test_a_column_that_is_nearly_a_known_one_is_told_and_one_named_twice_refused(tmp_path):
    rows = [{"path": f"{i}.png", "label": "ab"[i], "splitt": "train", "weight": "1"} for i in range(2)]
    notes = read_source(str(csv_set(tmp_path / "near", rows))).notes
    assert len(notes) == 1 and "the column `splitt` is not read; did you mean `split`?" in notes[0]
    put(tmp_path / "twice" / "1.png", picture())
    put(tmp_path / "twice" / "index.csv", "path,label,label\n1.png,a,b\n")
    refused("names the column `label` twice", tmp_path / "twice")
