"""The readers: what is on disk, as it is named, and nothing from outside the root."""

import contextlib
import os
import shutil
import zipfile

import pytest

from modules.data.files import Files
from modules.data.sources import read_source, resolve_root
from modules.data.unlabeled import read_images
from modules.errors import ConfigError, DataError
from tests.data.trees import class_folders, csv_set, declared_rows, encoded, pack, picture, put, rows_text

ROWS = [
    {
        "path": "a/1.png",
        "label": "bolt",
        "mask": "m/1.png",
        "model": "M3",
        "caption": "a photo of a bolt",
        "extra": "x",
    },
    {"path": "b/2.png", "label": "nut", "mask": "", "model": "M4", "caption": "", "extra": ""},
]


def refused(match: str, root) -> None:
    with pytest.raises(DataError, match=match):
        read_source(str(root))


def test_csv_columns_become_fields_and_unknown_ones_are_ignored(tmp_path):
    source = read_source(str(csv_set(tmp_path, ROWS)))
    first, second = source.items
    assert source.kind == "csv" and source.root == str(tmp_path)
    assert (first.path, first.label, first.mask, first.group) == ("a/1.png", "bolt", "m/1.png", "M3")
    assert first.caption == "a photo of a bolt" and second.mask == ""
    assert (first.role, first.split) == ("", "")


def test_a_folder_with_an_index_csv_reads_as_the_csv_file(tmp_path):
    csv_path = csv_set(tmp_path, ROWS)
    assert read_source(str(tmp_path)).items == read_source(str(csv_path)).items


def test_group_column_wins_over_model_and_splits_have_their_usual_names(tmp_path):
    rows = [{"path": "a.png", "label": "a", "group": "g", "model": "m", "split": "Valid", "role": "near-ood"}]
    item = read_source(str(csv_set(tmp_path, rows))).items[0]
    assert (item.group, item.split, item.role) == ("g", "val", "near_ood")


def test_keywords_and_noun_are_read(tmp_path):
    rows = [{"path": "a.png", "label": "", "noun": "buzzer", "keywords": "round; black ;"}]
    item = read_source(str(csv_set(tmp_path, rows))).items[0]
    assert item.noun == "buzzer" and item.keywords == ("round", "black")


def test_a_zip_is_read_in_place_and_equals_the_folder_it_was_packed_from(tmp_path):
    rows = declared_rows()
    archive = pack(tmp_path / "set.zip", rows)
    folder = tmp_path / "unpacked"
    csv_set(folder, rows)
    before = sorted(tmp_path.iterdir())
    source = read_source(str(archive))
    assert source.kind == "zip" and source.items == read_source(str(folder)).items
    assert sorted(tmp_path.iterdir()) == before


def test_class_folders_name_labels_and_inner_folders_group(tmp_path):
    class_folders(tmp_path, {"bolt": 2, "nut/s1": 2, "nut/s2": 1})
    source = read_source(str(tmp_path))
    assert source.kind == "folder"
    assert {(i.path, i.label, i.group) for i in source.items} == {
        ("bolt/00.png", "bolt", ""),
        ("bolt/01.png", "bolt", ""),
        ("nut/s1/00.png", "nut", "nut/s1"),
        ("nut/s1/01.png", "nut", "nut/s1"),
        ("nut/s2/00.png", "nut", "nut/s2"),
    }


def test_split_folders_above_class_folders_are_splits(tmp_path):
    class_folders(tmp_path, {"train/bolt": 2, "valid/bolt": 1, "test/bolt": 1})
    assert [(i.label, i.split) for i in read_source(str(tmp_path)).items] == [
        ("bolt", "test"),
        ("bolt", "train"),
        ("bolt", "train"),
        ("bolt", "val"),
    ]


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, {"train": 2, "bus": 2})
    assert {i.label for i in read_source(str(tmp_path)).items} == {"train", "bus"}


def test_order_and_time_of_writing_never_reach_the_items(tmp_path):
    names = [(label, i) for label in ("bolt", "nut", "pin") for i in range(4)]
    for order, root in ((names, tmp_path / "a"), (names[::-1], tmp_path / "b")):
        for label, i in order:
            put(root / label / f"{i}.png", picture(i))
    assert read_source(str(tmp_path / "a")).items == read_source(str(tmp_path / "b")).items
    rows = [{"path": f"{label}/{i}.png", "label": label} for label, i in names]
    put(tmp_path / "a" / "index.csv", rows_text(rows))
    put(tmp_path / "b" / "index.csv", rows_text(rows[::-1]))
    assert read_source(str(tmp_path / "a")).items == read_source(str(tmp_path / "b")).items


def test_files_that_are_no_images_are_ignored_and_counted(tmp_path):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    put(tmp_path / "bolt" / "notes.txt", "hello")
    put(tmp_path / "bolt" / ".hidden.png", picture())
    put(tmp_path / ".git" / "0.png", picture())
    source = read_source(str(tmp_path))
    assert len(source.items) == 2 and "1 .txt" in source.notes[0]


def test_images_outside_class_folders_and_empty_ones_are_counted(tmp_path):
    class_folders(tmp_path / "plain", {"bolt": 1, "nut/s1": 1})
    for name in ("x.JPG", "y.png", ".hidden.png", "readme.txt"):
        put(tmp_path / "plain" / name, picture())
    for name in ("washer", "spring/s1", ".cache"):
        (tmp_path / "plain" / name).mkdir(parents=True)
    put(tmp_path / "plain" / "spring" / "notes.txt", "none yet")
    source = read_source(str(tmp_path / "plain"))
    assert len(source.items) == 2 and source.notes == (
        "files ignored because they are no images: 1 .txt",
        "2 images left out because they lie in no class folder, such as x.JPG; put each into the folder of its class",
        "2 class folders left out because they hold no image: spring, washer",
    )
    class_folders(tmp_path / "split", {"train/bolt": 1, "test/bolt": 1})
    put(tmp_path / "split" / "train" / "x.png", picture())
    (tmp_path / "split" / "test" / "nut").mkdir()
    notes = read_source(str(tmp_path / "split")).notes
    assert "1 images left out" in notes[0] and "such as train/x.png" in notes[0] and "test/nut" in notes[1]
    for i in range(12):
        (tmp_path / "split" / "test" / f"e{i:02d}").mkdir()
    assert read_source(str(tmp_path / "split")).notes[1].endswith("test/e08, test/e09 and 3 more")


def test_missing_root(tmp_path):
    refused("does not exist", tmp_path / "nowhere")


def test_empty_setting_and_unknown_embedded_pack():
    with pytest.raises(ConfigError, match="data.root. is empty"):
        resolve_root(" ")
    with pytest.raises(ConfigError, match="embedded packs are .*parts64"):
        resolve_root("embedded:parts65")


def test_empty_root(tmp_path):
    refused("holds no image", tmp_path)


def test_images_without_class_folders(tmp_path):
    put(tmp_path / "1.png", picture())
    refused("no class folders", tmp_path)


def test_an_empty_split_folder(tmp_path):
    class_folders(tmp_path, {"train/bolt": 2, "test/bolt": 1})
    (tmp_path / "val").mkdir()
    refused("the val split is empty", tmp_path)


def test_split_folders_beside_class_folders(tmp_path):
    class_folders(tmp_path, {"train/bolt": 2, "test/bolt": 1, "nut": 1})
    refused("split folders test, train beside nut", tmp_path)


def test_two_split_folders_are_no_classes_whatever_stands_beside_them(tmp_path):
    class_folders(tmp_path, {"train/bolt": 2, "train/nut": 2, "Val/bolt": 1, "Val/nut": 1})
    put(tmp_path / "annotations" / "1.xml", b"<a/>")
    refused("split folders Val, train beside annotations; move", tmp_path)


def test_one_class_may_be_called_as_a_split_is(tmp_path):
    class_folders(tmp_path, {"train": 2, "bus": 2})
    assert {item.label for item in read_source(str(tmp_path)).items} == {"train", "bus"}


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..", ""])
def test_csv_path_outside_its_root(tmp_path, path):
    put(tmp_path / "secret.png", picture())
    put(tmp_path / "set" / "index.csv", rows_text([{"path": path, "label": "a"}]))
    refused(r"index.csv line 2: the path .* (lies outside|names no file)", tmp_path / "set")


def test_an_absolute_path_says_what_to_write_instead(tmp_path):
    put(tmp_path / "set" / "a" / "1.png", picture())
    os.symlink(tmp_path / "set", tmp_path / "link")
    inside = f"{tmp_path}/set/a/1.png"
    for root in ("set", "link"):
        put(tmp_path / root / "index.csv", rows_text([{"path": inside, "label": "a"}]))
        refused(rf"line 2: the path '{inside}' is absolute; write it relative to .*{root}: 'a/1.png'", tmp_path / root)
    put(tmp_path / "set" / "index.csv", rows_text([{"path": f"{tmp_path}/setting/1.png", "label": "a"}]))
    refused("setting/1.png' lies outside .*; bring the file below it", tmp_path / "set")


@pytest.mark.parametrize(
    ("path", "hint"),
    [(r"a\1.png", "folders: 'a/1.png'$"), (r"a\2.png", "folders$"), (r"..\x\1.png", "folders$")]
    + [(path, "folders$") for path in (r"C:\set\a\1.png", "C:/set/a/1.png", r"\\server\set\1.png")],
)
def test_a_path_as_windows_writes_it_is_named_with_its_line(tmp_path, path, hint):
    put(tmp_path / "a" / "1.png", picture())
    put(tmp_path / "index.csv", rows_text([{"path": path, "label": "a"}]))
    refused(f"index.csv line 2: the path .* is written as on Windows; write it relative .*{hint}", tmp_path)


def test_a_file_may_have_a_backslash_in_its_name(tmp_path):
    put(tmp_path / r"a\1.png", picture())
    put(tmp_path / "index.csv", rows_text([{"path": r"a\1.png", "label": "a"}]))
    assert read_source(str(tmp_path)).items[0].path == r"a\1.png"


def test_csv_mask_outside_its_root(tmp_path):
    put(tmp_path / "set" / "a.png", picture())
    put(tmp_path / "set" / "index.csv", rows_text([{"path": "a.png", "label": "a", "mask": "../m.png"}]))
    refused("lies outside", tmp_path / "set")


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_root_is_refused_by_every_reader(tmp_path, linked):
    put(tmp_path / "outside" / "1.png", picture())
    class_folders(tmp_path / "set", {"bolt": 1, "nut": 1})
    if linked == "file":
        os.symlink(tmp_path / "outside" / "1.png", tmp_path / "set" / "bolt" / "1.png")
    else:
        os.symlink(tmp_path / "outside", tmp_path / "set" / "bolt" / "more")
    refused("symbolic link", tmp_path / "set")
    path = "bolt/1.png" if linked == "file" else "bolt/more/1.png"
    put(tmp_path / "set" / "index.csv", rows_text([{"path": path, "label": "a"}]))
    refused("symbolic link that leads out", tmp_path / "set")


def test_a_link_in_a_circle_is_refused(tmp_path):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    os.symlink(tmp_path, tmp_path / "bolt" / "loop")
    refused("symbolic link to a folder", tmp_path)


@pytest.mark.parametrize("target", ["itself.png", "nowhere.png"])
def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path, target):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    os.symlink(target, tmp_path / "bolt" / "itself.png")
    refused(r"bolt/itself.png is missing", tmp_path)


def test_a_link_inside_the_root_is_an_image_like_others(tmp_path):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    os.symlink(tmp_path / "bolt" / "00.png", tmp_path / "bolt" / "copy.png")
    assert len(read_source(str(tmp_path)).items) == 3


def test_csv_file_missing(tmp_path):
    put(tmp_path / "index.csv", rows_text([{"path": f"{i}.png", "label": "a"} for i in range(12)]))
    refused(r"0.png is missing; 1.png is missing; .*; 9.png is missing and 2 more; correct", tmp_path)


def test_csv_path_twice_even_if_spelled_otherwise(tmp_path):
    put(tmp_path / "a.png", picture())
    put(tmp_path / "index.csv", rows_text([{"path": "a.png", "label": "a"}, {"path": "./a.png", "label": "b"}]))
    refused("line 3: a.png was already on line 2", tmp_path)


@pytest.mark.parametrize(
    "text, match",
    [
        ("image,label\na.png,a\n", "no `path` column"),
        ("path;label\na.png;a\n", "line 1: its columns are separated by ';'; save the file with commas"),
        ('"Path"; "label"\n"a.png";"a"\n', "separated by ';'"),
        ("path\tlabel\na.png\ta\n", "line 1: its columns are separated by tabs; save"),
        ("", "no `path` column"),
        ("path,label\na.png,b,c\n", "line 2: has 3 fields"),
        ("path,label,role\na.png,a,outlier\n", "role 'outlier' is unknown"),
        ("path,label,split\na.png,a,dev\n", "split 'dev' is unknown"),
        (b"path,label\n\xff\xfe.png,a\n", "not UTF-8"),
        ("path,label\n", "holds no image"),
    ],
)
def test_csv_that_cannot_be_right(tmp_path, text, match):
    put(tmp_path / "a.png", picture())
    put(tmp_path / "index.csv", text)
    refused(match, tmp_path)


def test_zip_without_index(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture()))
    refused("holds no index.csv", tmp_path / "set.zip")


def test_zip_member_missing_and_outside(tmp_path):
    refused("b.png is missing from the zip", pack(tmp_path / "1.zip", [{"path": "b.png", "label": "a"}], {}))
    rows = [{"path": "../b.png", "label": "a"}]
    refused("lies outside", pack(tmp_path / "2.zip", rows, {"../b.png": encoded(picture())}))


def test_zip_member_that_is_a_link(tmp_path):
    link = zipfile.ZipInfo("a.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("index.csv", rows_text([{"path": "a.png", "label": "a"}]))
        archive.writestr(link, "/etc/passwd")
    refused("a.png is a symbolic link", tmp_path / "set.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_member_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("index.csv", rows_text([{"path": "a.png", "label": "a"}]))
        archive.writestr("a.png", encoded(picture(0)))
        archive.writestr("a.png", encoded(picture(1)))
    refused("a.png is twice", tmp_path / "set.zip")


def test_a_file_that_is_no_zip_and_a_zip_cut_in_half(tmp_path):
    refused("neither a folder nor a readable zip", put(tmp_path / "set.zip", "hello"))
    whole = pack(tmp_path / "whole.zip", declared_rows()).read_bytes()
    refused("neither a folder nor a readable zip", put(tmp_path / "half.zip", whole[: len(whole) // 2]))


def test_a_damaged_zip_member_is_named(tmp_path):
    path = pack(tmp_path / "set.zip", [{"path": "a.png", "label": "a"}], {"a.png": b"x" * 5000})
    path.write_bytes(path.read_bytes().replace(b"x" * 5000, b"x" * 4999 + b"y"))
    with Files(path) as files, pytest.raises(DataError, match="a.png cannot be read .*CRC"):
        files.read("a.png")


@pytest.mark.parametrize("method", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA"])
def test_whatever_byte_of_a_zip_is_wrong_it_is_told_and_never_a_traceback(tmp_path, method):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", getattr(zipfile, method)) as archive:
        archive.writestr("a.png", b"abc" * 20)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(DataError), Files(path) as files:
            files.read("a.png")


def test_reading_is_bounded_and_stays_inside(tmp_path):
    put(tmp_path / "set" / "a.png", b"x" * 100)
    put(tmp_path / "secret", "s")
    with Files(tmp_path / "set") as files:
        assert files.read("a.png") == b"x" * 100
        with pytest.raises(DataError, match="holds 100 bytes, more than the 99"):
            files.read("a.png", max_bytes=99)
        with pytest.raises(DataError, match="leads out of"):
            files.read("../secret")
        os.symlink(tmp_path / "secret", tmp_path / "set" / "late")
        with pytest.raises(DataError, match="leads out of"):
            files.read("late")


def test_moving_a_set_changes_nothing_but_its_root(tmp_path):
    class_folders(tmp_path / "a", {"bolt": 2, "nut": 2})
    shutil.move(tmp_path / "a", tmp_path / "b")
    class_folders(tmp_path / "a", {"bolt": 2, "nut": 2})
    a, b = read_source(str(tmp_path / "a")), read_source(str(tmp_path / "b"))
    assert a.items == b.items and a.root != b.root


@pytest.mark.parametrize("name, count", [("parts64", 4161)])
def test_embedded_pack(name, count):
    source = read_source(f"embedded:{name}")
    assert len(source.items) == count and source.kind == "zip"
    assert all(item.mask and item.group for item in source.items)


@pytest.mark.parametrize("name", [b"bolt/caf\xe9.png", b"\xe9crou/1.png"])
def test_a_name_that_is_not_utf8_is_refused_by_every_reader(name, tmp_path):
    class_folders(tmp_path, {"bolt": 1, "nut": 1})
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(encoded(picture()))
    for read in (read_source, lambda root: read_images(root, ("bolt",))):
        with pytest.raises(DataError, match=r"the name '[a-z]*\\udce9[a-z.]*' is not UTF-8.*rename it") as refusal:
            read(str(tmp_path))
        str(refusal.value).encode()
