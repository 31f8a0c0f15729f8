"""`evaluate`: a saved run judged again, or put to work on other images; what it wrote before stays as it is."""

import csv
import dataclasses
import io
import json
import shutil
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import trainer
from modules import runtime
from modules.commands.evaluate import command, load_embed, runtime_of
from modules.console import Console
from modules.errors import ConfigError, DataError
from modules.evaluation.stored import load_detector, load_predictions
from modules.settings import load_config
from tests.base.tinyset import COLORS, NEAR_OOD, contents, finished_run, image, rows, write_config, write_pack

CLASSES = tuple(sorted(COLORS))
RUNS = ("supcon", "cross_entropy", "everything")


@pytest.fixture
def saved(tmp_path):
    """A copy of a finished SupCon run with generated rows."""
    return shutil.copytree(finished_run("supcon").path, tmp_path / "supcon")


def call(path, *overrides: str) -> tuple:
    """(folder written, all that was printed)."""
    text = io.StringIO()
    return command(str(path), list(overrides), Console(text), None, None), text.getvalue()


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arm", RUNS)
def test_a_run_judged_again_says_the_same_and_stays_as_it_is(arm, tmp_path):
    run = finished_run(arm)
    path = shutil.copytree(run.path, tmp_path / arm)
    before = contents(path)
    out, text = call(path)
    assert out == path / "evaluated/again"
    now = json.loads((out / "results.json").read_text())
    assert {name for name in contents(path) if not name.startswith("evaluated/")} == set(before)
    assert all(contents(path)[name] == content for name, content in before.items())
    without_head = [name for name in now if "binary" not in name]  # generated images are not kept, the head is another
    assert {
        name: now[name] for name in without_head if name.startswith(("test.", "val.", "threshold."))
    } == pytest.approx(
        {name: run.results[name] for name in without_head if name.startswith(("test.", "val.", "threshold."))}, abs=1e-5
    )
    first, second = (load_predictions(folder / "predictions.safetensors") for folder in (path, out))
    assert first.paths == second.paths and torch.allclose(first.logits_DC, second.logits_DC, atol=1e-4)
    assert "the run" in text and "near-OOD AUROC, knn" in text
    changed = run.results["binary_head.trained_on"] != now["binary_head.trained_on"]
    assert ("generated images are not kept" in text) == changed


def test_other_settings_of_evaluation_are_taken_and_written_down(saved, tmp_path):
    far = tmp_path / "far"
    for i in range(6):
        (far / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image((20, 20, 20), 0.3, i)).save(far / f"class{i % 2}/{i}.png")
    config_before = (saved / "config.yaml").read_bytes()
    out, text = call(
        saved, "evaluation.bootstrap=40", "evaluation.score=energy", "probe.epochs=2", f"data.far_ood_root={far}"
    )
    results = json.loads((out / "results.json").read_text())
    assert results["bootstrap.resamples"] == 40 and results["headline.score"] == "energy"
    assert results["test.far_ood.images"] == 6 and "far-OOD AUROC, energy" in text
    assert (saved / "config.yaml").read_bytes() == config_before, "the run's own config says what the run was"
    assert "epochs: 2  # command line" in (out / "config.yaml").read_text()


def test_a_run_that_leaves_test_unread_is_read_once_later(tmp_path, capsys):
    config = write_config(tmp_path)
    assert trainer.main(["run", str(config), "evaluation.test=false"]) == 0
    (path,) = (found.parent for found in tmp_path.rglob("results.json"))
    results = json.loads((path / "results.json").read_text())
    assert not [name for name in results if name.startswith("test.")] and "val.accuracy" in results
    assert not (path / "predictions.safetensors").exists() and (path / "report.html").exists()
    assert "val accuracy" in capsys.readouterr().out
    page = (path / "report.html").read_text()
    assert "test was not read" in page and "test was read once" not in page and "without intervals" in page
    unread, _ = call(path)
    assert "test.accuracy" not in json.loads((unread / "results.json").read_text())
    out, text = call(path, "evaluation.test=true")
    now = json.loads((out / "results.json").read_text())
    assert "test.accuracy" in now and (out / "predictions.safetensors").exists() and "test" in text
    assert now["val.accuracy"] == pytest.approx(results["val.accuracy"], abs=1e-5)
    assert trainer.main(["compare", str(config), "--arms", "supcon", "evaluation.test=false"]) == 2


@pytest.mark.parametrize("arm", RUNS)
def test_the_export_judges_the_runs_own_test_images_as_the_run_did(arm, tmp_path):
    """The oracle of the whole export: encoder, preprocessing, readout, scores and threshold from files alone."""
    run = finished_run(arm)
    path = shutil.copytree(run.path, tmp_path / arm)
    pack = write_pack(tmp_path / "elsewhere.zip")
    out, _ = call(path, f"data.root={pack}")
    judged = {row["path"]: row for row in table(out / "predictions.csv")}
    assert set(judged) == {row["path"] for row in rows()}
    stored, detector = (
        load_predictions(path / "predictions.safetensors"),
        load_detector(path / "export/ood.safetensors"),
    )
    probability, predicted = stored.logits_DC.softmax(1).max(1)
    for row, name in enumerate(stored.paths):
        found = judged[name]
        assert found["predicted"] == CLASSES[predicted[row]], name
        assert float(found["probability"]) == pytest.approx(probability[row].item(), abs=1e-4)
        for score, values in stored.scores.items():
            assert float(found[score]) == pytest.approx(values[row].item(), rel=1e-3, abs=1e-3), score
        accepted = float(found["knn"]) >= float(f"{detector.thresholds['knn']:.6g}") - 1e-6
        assert found["accepted"] == str(int(accepted)) or abs(float(found["knn"]) - detector.thresholds["knn"]) < 1e-5


def test_a_summary_counts_what_the_rows_say(saved, tmp_path):
    out, text = call(saved, f"data.root={write_pack(tmp_path / 'elsewhere.zip')}")
    found, summary = table(out / "predictions.csv"), json.loads((out / "summary.json").read_text())
    known = [row for row in found if row["label"] in CLASSES]
    other = [row for row in found if row["label"] in NEAR_OOD]
    assert summary["images"] == len(found) == len(known) + len(other)
    assert (
        summary["accepted"]
        == sum(row["accepted"] == "1" for row in found)
        == sum(summary["accepted_by_class"].values())
    )
    assert summary["known.accuracy"] == pytest.approx(sum(r["label"] == r["predicted"] for r in known) / len(known))
    assert summary["known.accepted"] == pytest.approx(sum(r["accepted"] == "1" for r in known) / len(known))
    assert summary["other.accepted"] == pytest.approx(sum(r["accepted"] == "1" for r in other) / len(other))
    assert f"labeled otherwise: {len(other)}" in text and "rejected" in text


def test_a_plain_folder_of_images_will_do_and_two_folders_of_one_name_do_not_meet(saved, tmp_path):
    outs = []
    for place in ("monday", "tuesday"):
        inbox = tmp_path / place / "in box"
        (inbox / "gear").mkdir(parents=True)
        Image.fromarray(image(COLORS["gear"], 0.8, 1)).save(inbox / "gear/1.png")
        Image.fromarray(image(COLORS["nut"], 1.6, 2)).resize((50, 40)).save(inbox / "new.png")
        out, text = call(saved, f"data.root={inbox}")
        assert [(row["path"], row["label"]) for row in table(out / "predictions.csv")] == [
            ("gear/1.png", "gear"),
            ("new.png", ""),
        ]
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["images"], summary["known.images"], "other.images" in summary) == (2, 1, False)
        assert "not square" in text
        outs.append(out)
    assert len(set(outs)) == 2 and all(out.name.startswith("in-box-") for out in outs)


def test_two_lists_in_one_folder_are_judged_beside_each_other(saved, tmp_path):
    Image.fromarray(image(COLORS["gear"], 0.8, 1)).save(tmp_path / "1.png")
    outs = []
    for day in ("monday", "tuesday"):
        (tmp_path / f"{day}.csv").write_text("path,label\n1.png,gear\n")
        outs.append(call(saved, f"data.root={tmp_path / day}.csv")[0])
    assert [out.name.split("-")[0] for out in outs] == ["monday", "tuesday"]


def test_bad_files_are_named_or_left_out_as_asked(saved, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    Image.fromarray(image(COLORS["gear"], 0.8, 1)).save(inbox / "good.png")
    (inbox / "bad.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match="bad.png: .*data.on_bad_image=skip"):
        call(saved, f"data.root={inbox}")
    assert not (saved / "evaluated").exists()
    out, _ = call(saved, f"data.root={inbox}", "data.on_bad_image=skip")
    assert [row["path"] for row in table(out / "predictions.csv")] == ["good.png"]
    assert json.loads((out / "summary.json").read_text())["skipped"] == 1
    (inbox / "gear").mkdir()
    (inbox / "good.png").rename(inbox / "gear/good.png")  # the bad one is now the only image of its kind
    out, _ = call(saved, f"data.root={inbox}", "data.on_bad_image=skip")
    assert [row["path"] for row in table(out / "predictions.csv")] == ["gear/good.png"]
    (inbox / "gear/good.png").unlink()
    with pytest.raises(DataError, match="no usable image is left at all; the first bad one is bad.png"):
        call(saved, f"data.root={inbox}", "data.on_bad_image=skip")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["learning.steps=30"], ConfigError, "`learning.steps` belongs to what this run was trained with"),
        (["data.image_size=64"], ConfigError, "`data.image_size` belongs to what this run was trained with"),
        (["run.seed=1"], ConfigError, "`run.seed` belongs to what this run was trained with"),
        (["data.root=x", "probe.epochs=3"], ConfigError, "`probe.epochs` has no use while the exported encoder judges"),
        (["probe.epoch=3"], ConfigError, "did you mean `probe.epochs`"),
        (["data.root=/nowhere/at/all"], DataError, "'/nowhere/at/all' does not exist"),
        (["evaluation.score=knm"], ConfigError, "evaluation.score"),
    ],
)
def test_settings_that_do_not_belong_here(saved, overrides, error, message):
    with pytest.raises(error, match=message):
        call(saved, *overrides)
    assert not (saved / "evaluated").exists()


def test_what_is_no_finished_run(saved, tmp_path):
    with pytest.raises(DataError, match="is no run directory, because it has no config.yaml; name one, as runs/demo"):
        call(tmp_path / "nothing")
    with pytest.raises(DataError, match="it holds the runs supcon: name one of them"):
        call(saved.parent)
    (saved / "export/encoder.safetensors").rename(tmp_path / "kept")
    with pytest.raises(DataError, match="has no export/encoder.safetensors"):
        call(saved)
    (tmp_path / "kept").rename(saved / "export/encoder.safetensors")
    (saved / "results.json").unlink()
    with pytest.raises(DataError, match="is not finished; start its `trainer.py run` command again"):
        call(saved)


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_what_was_trained_in_fp32_is_read_in_fp32_where_auto_is_of_16_bits(saved, trained, monkeypatch):
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    record = json.loads((saved / "inputs.json").read_text())
    record["runtime"][-1]["precision"] = trained
    (saved / "inputs.json").write_text(json.dumps(record))
    config, _ = load_config(str(saved / "config.yaml"))
    exact = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="fp32"))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    path, chosen = saved / "export/encoder.safetensors", [runtime_of(saved, c) for c in (config, exact)]
    found, in_fp32 = (load_embed(path, config, len(COLORS), each)(images) for each in chosen)
    assert torch.equal(found, in_fp32) is (trained == "float32")
    reason = {"float32": "auto: it was trained in fp32", "bfloat16": "auto: bf16 on a CPU with AMX"}[trained]
    assert chosen[0].precision.reason == reason and chosen[1].precision.reason == "run.precision"


def test_weights_that_are_broken_or_of_another_encoder(saved):
    path = saved / "export/encoder.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not the encoder that config.yaml describes"):
        call(saved)
    path.write_bytes(whole)
    weights = load_file(path)
    name = next(name for name, value in weights.items() if value.ndim == 4)
    save_file(weights | {name: weights[name][:1].clone()}, path)
    with pytest.raises(DataError, match=f"is not the encoder that config.yaml describes .*{name}"):
        call(saved)
    (saved / "export/ood.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="ood.safetensors: cannot be read as safetensors"):
        call(saved)


def test_images_that_changed_since_the_run_are_said(saved, tmp_path):
    """The run's pack is replaced by one in which an image is another; the config is made to name it."""
    original = write_pack(tmp_path / "original.zip")
    pack = tmp_path / "tiny.zip"
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(pack, "w") as new:
        for name in old.namelist():
            content = old.read("gear/train-0-0.png" if name == "gear/train-0-1.png" else name)
            new.writestr(name, content)
    text = (saved / "config.yaml").read_text()
    (saved / "config.yaml").write_text(text.replace(finished_run("supcon").config.data.root, str(pack)))
    _, printed = call(saved)
    assert "1 of 84 images are not what the run read and 0 are gone (first: gear/train-0-1.png)" in " ".join(
        printed.split()
    )


def test_the_verb_answers_from_the_command_line(saved, tmp_path, capsys):
    assert trainer.main(["evaluate", str(saved), "run.threads=1", "probe.epochs=2"]) == 0
    assert "written:" in capsys.readouterr().out
    assert trainer.main(["evaluate", str(tmp_path / "none")]) == 3
    assert "error: " in capsys.readouterr().err
