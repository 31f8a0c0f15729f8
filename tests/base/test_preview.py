"""preview draws what a run would make, and makes an image again from its provenance."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from modules.commands import preview
from modules.console import Console
from modules.errors import ConfigError, DataError
from tests.base.tinyset import write_config
from tests.data.trees import csv_set, declared_rows

SIDE, LABEL = 128, 14  # of an image and its row's label on a sheet


def draw(path, *flags: str):
    stream = io.StringIO()
    files = preview.command(path, list(flags), Console(stream), None, None)
    return files, stream.getvalue()


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top = row * (SIDE + LABEL) + LABEL
    return sheet[top : top + SIDE, column * SIDE : (column + 1) * SIDE]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(files, provenance, config path) of sheets of two classes: sources, two strengths, three recipes."""
    path = write_config(tmp_path_factory.mktemp("preview"), generation={"templates": '["a photo of a {}"]'})
    flags = ("--classes=gear,bolt", "--images", "3", "--strengths=.25,.75", "--recipes=token_mix,strength,jigsaw")
    files, _ = draw(path, *flags)
    return files, json.loads((files[0].parent / "provenance.json").read_text()), path


def test_a_sheet_a_class_with_a_row_a_variant(drawn):
    files, provenance, _ = drawn
    assert [file.name for file in files] == ["001-gear.png", "000-bolt.png"]
    for file in files:
        assert Image.open(file).size == (3 * SIDE, 6 * (SIDE + LABEL))
    assert len(provenance) == 2 * 5 * 3
    assert [request["recipe"] for request in provenance[:15:3]] == [
        "positive",
        "positive",
        "token_mix",
        "strength",
        "jigsaw",
    ]
    assert {request["strength"] for request in provenance if request["recipe"] == "positive"} == {0.25, 0.75}


def test_a_column_shares_source_and_noise(drawn):
    _, provenance, _ = drawn
    for column in range(3):
        shown = provenance[column:15:3]
        assert len({request["source"] for request in shown}) == 1
        assert {request["image_index"] for request in shown} == {column}
        assert {request["label"] for request in shown} == {1}


def test_rows_differ_and_higher_strength_goes_further(drawn):
    sheet = np.asarray(Image.open(drawn[0][0])).astype(int)
    source, mild, strong = (tile(sheet, row, 0) for row in (0, 1, 2))
    assert 0 < np.abs(mild - source).mean() < np.abs(strong - source).mean()


def test_made_again_from_provenance(drawn, tmp_path):
    files, provenance, path = drawn
    one = tmp_path / "one.json"
    one.write_text(json.dumps(provenance[7]))  # token_mix, column 1
    again, _ = draw(path, f"--again={one}")
    assert [file.name for file in again] == ["again-1.png"]
    made, sheet = (np.asarray(Image.open(file)).astype(int) for file in (again[0], files[0]))
    assert np.array_equal(tile(made, 0, 0), tile(sheet, 0, 1))
    assert np.abs(tile(made, 0, 1) - tile(sheet, 3, 1)).max() <= 1


def test_images_of_one_index_are_made_again_into_files_of_their_own(drawn, tmp_path):
    _, provenance, path = drawn
    several = tmp_path / "several.json"
    several.write_text(json.dumps([provenance[1], provenance[7], provenance[0], provenance[10]]))  # columns 1, 1, 0, 1
    again, _ = draw(path, f"--again={several}")
    assert [file.name for file in again] == ["again-1.png", "again-1-2.png", "again-0.png", "again-1-3.png"]
    assert len({file.read_bytes() for file in again}) == 4


def test_a_strength_without_a_step_is_refused_before_tokens_are_learned(tmp_path):
    path, stream = write_config(tmp_path), io.StringIO()
    with pytest.raises(ConfigError, match="= 0 denoising steps"):
        preview.command(path, ["--strengths=.1"], Console(stream), None, None)
    assert not stream.getvalue(), "nothing was read"


def test_a_recipe_that_cannot_be_made_is_refused_before_tokens_are_learned(tmp_path):
    stream = io.StringIO()
    path = write_config(tmp_path, near_ood={"recipes": "{strength: 1}", "jigsaw_grid": 3})
    with pytest.raises(ConfigError, match="jigsaw_grid` is 3, which does not divide"):
        preview.command(path, ["--recipes=jigsaw"], Console(stream), None, None)
    assert not stream.getvalue(), "nothing was read"


def test_provenance_of_another_pipeline_or_no_provenance(drawn, tmp_path):
    _, provenance, path = drawn
    file = tmp_path / "x.json"
    for content, message in (
        (provenance[0] | {"pipeline": "0" * 64}, "was made by pipeline 0000"),
        (provenance[0] | {"tokens": "1" * 64}, "class tokens 1111"),
        (provenance[0] | {"source": 999}, "its source is row 999, the train split has 24 images"),
        ({"image": 3}, "not the provenance of an image"),
        ([], "holds no image"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            draw(path, f"--again={file}")
    file.write_text("{")
    with pytest.raises(DataError, match="not a readable JSON file"):
        draw(path, f"--again={file}")


def test_an_edit_within_masks_that_are_not_read_is_refused_before_any_image_is_made(drawn, tmp_path):
    files, provenance, path = drawn
    file, stream = tmp_path / "x.json", io.StringIO()
    mine = [provenance[0] | {"image_index": 70}, provenance[1] | {"image_index": 71, "mask_edit": "background"}]
    file.write_text(json.dumps(mine))
    with pytest.raises(DataError, match="image 71: it was edited within an object mask .*mask_edit=background$"):
        preview.command(path, [f"--again={file}"], Console(stream), None, None)
    assert not (files[0].parent / "again-70.png").exists()
    assert "class tokens" not in stream.getvalue(), "known before tokens are learned"


@pytest.mark.parametrize(
    ("share", "edit", "flags"), [(0.0, "none", ["--recipes=mask_split"]), (1.0, "object", ["--strengths=.5"])]
)
def test_masks_are_read_for_a_role_that_the_run_leaves_out(share, edit, flags, drawn):
    _, _, path = drawn
    settings = [f"generation.near_ood_fraction={share}", f"generation.mask_edit={edit}"]
    with pytest.raises((ConfigError, DataError), match="mask"):  # this set has none, and that is what is said
        draw(path, *settings, *flags)


def test_a_caption_says_the_strength_of_the_images_beside_it(tmp_path, monkeypatch):
    rows = [row | {"mask": f"{row['path']}.mask.png"} for row in declared_rows(groups=5) if row["role"] == "id"]
    root = csv_set(tmp_path / "data", rows)
    path, told = write_config(tmp_path, learning={"classes_per_batch": 2}, data={"root": root}), []
    monkeypatch.setattr(preview, "sheet_png", lambda rows, captions, **_: told.extend(captions) or b"")
    flags = (
        "--classes=bolt",
        "--images=1",
        "--strengths=.5",
        "--recipes=mask_split,strength",
        "inversion.images_per_class=1",
    )
    files, _ = draw(path, *flags, "evaluation.bootstrap=0")
    provenance = json.loads((files[0].parent / "provenance.json").read_text())
    assert told == ["bolt: source", *(f"{made['recipe']} {made['strength']:g}" for made in provenance)]
    assert told[2:] == ["mask_split 1", "strength 0.75"]


def test_defaults_are_the_runs_own(drawn):
    files, text = draw(drawn[2], "--images=2", "--recipes=none")
    provenance = json.loads((files[0].parent / "provenance.json").read_text())
    assert len(files) == 4 and {request["strength"] for request in provenance} == {0.5, 0.75}
    assert "written: " in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=geer"], "--classes names 'geer', which is no ID class; did you mean 'gear'"),
        (["--recipes=strenght"], "--recipes names 'strenght'; choose from strength"),
        (["--strengths=half"], "--strengths is 'half'; give numbers"),
        (["--strengths=1.5"], "--strengths is '1.5'; a strength lies in"),
        (["--strengths=.1"], "= 0 denoising steps"),
        (["--strengths="], "--strengths is ''; a strength lies in"),
        (["--recipes=,"], "--recipes names nothing"),
        (["--images=0"], "--images is '0'; it must be a whole number of at least 1"),
        (["--again"], "--again names no file"),
        (["generation.synthetic_fraction=0"], "preview: generation.synthetic_fraction is 0"),
    ],
)
def test_bad_input(drawn, flags, message):
    with pytest.raises(ConfigError, match=message):
        draw(drawn[2], *flags)
