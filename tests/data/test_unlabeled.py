"""Images to be judged: any folder, labels only where folders or columns say them."""

import pytest

from modules.data.unlabeled import read_images
from modules.errors import ConfigError, DataError
from tests.data.trees import class_folders, csv_set, declared_rows, mvip_tree, pack, picture, put


def labels(root, classes=("bolt", "nut")) -> dict[str, str]:
    return {item.path: item.label for item in read_images(str(root), classes).items}


def test_a_folder_needs_no_class_folders_and_a_class_name_anywhere_on_the_path_is_the_label(tmp_path):
    for name in ("b.png", "a.PNG", "bolt/1.png", "inbox/nut/2.png", "inbox/3.png", "bolt/worn/4.png"):
        put(tmp_path / name, picture(1))
    put(tmp_path / "notes.txt", "no image")
    put(tmp_path / ".hidden.png", picture(1))
    put(tmp_path / ".cache/5.png", picture(1))
    expected = {"a.PNG": "", "b.png": "", "bolt/1.png": "bolt", "bolt/worn/4.png": "bolt"}
    assert labels(tmp_path) == expected | {"inbox/3.png": "inbox", "inbox/nut/2.png": "nut"}
    index = read_images(str(tmp_path), ("bolt", "nut"))
    assert [item.path for item in index.items] == sorted(item.path for item in index.items)
    assert index.classes == ("bolt", "inbox", "nut")


def test_sets_with_an_index_keep_their_labels(tmp_path):
    rows = declared_rows()
    expected = {row["path"]: row["label"] for row in rows}
    assert labels(pack(tmp_path / "pack.zip", rows)) == expected
    assert labels(csv_set(tmp_path / "set", rows)) == expected
    assert labels(tmp_path / "set") == expected
    tree = mvip_tree(tmp_path / "mvip", {"bolt": "CarComponent"}, cameras=1)
    assert set(labels(tree).values()) == {"bolt"}


def test_a_set_with_one_class_or_one_image_will_do(tmp_path):
    assert set(labels(class_folders(tmp_path, {"bolt": 1})).values()) == {"bolt"}


def test_roots_that_hold_nothing_to_judge(tmp_path):
    with pytest.raises(DataError, match="holds no image; the endings read are .jpg"):
        read_images(str(tmp_path), ())
    with pytest.raises(DataError, match="does not exist"):
        read_images(str(tmp_path / "none"), ())
    with pytest.raises(ConfigError, match="`data.root` is empty"):
        read_images("", ())
    put(tmp_path / "elsewhere.png", picture(1))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/link.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match="link.png is a symbolic link that leads out of"):
        read_images(str(tmp_path / "inside"), ())
