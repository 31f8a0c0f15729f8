"""A whole run in one process, on a tiny set: what it leaves, what it writes on the way, and what it is handed."""

import io
import json
import math
import re
from unittest import mock

import pytest
import torch

import trainer
from modules.console import Console
from modules.data.decode import decode_image
from modules.data.index import read_index
from modules.diffusion.roundtrip import decode_means
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES
from modules.evaluation.stored import load_predictions
from modules.settings import load_config
from modules.training import stages
from tests.base.tinyset import (
    ARMS,
    COLORS,
    NEAR_OOD_MODELS,
    SETTINGS,
    VIEWS,
    contents,
    finished_run,
    shared_folder,
    write_config,
)

ALWAYS = {"config.yaml", "environment.json", "inputs.json", "data.json", "metrics.jsonl", "results.json", "report.html"}
ALWAYS |= {"predictions.safetensors", "export/encoder.safetensors", "export/ood.safetensors"}
ALWAYS |= {"export/classes.json", "export/preprocess.json"}
STEPS, BALANCED = SETTINGS["learning.steps"], 6
GENERATED_A_STEP = 4  # 6 real rows are 60 % of a batch
TRAIN, TEST, NEAR_TEST = 24, 24, NEAR_OOD_MODELS * VIEWS


@pytest.mark.parametrize("arm", ["supcon", "cross_entropy", "jigsaw_roundtrip"])
def test_a_run_directory_holds_what_is_promised_and_nothing_else(arm):
    run = finished_run(arm)
    files = set(contents(run.path))
    tokens = {path for path in files if path.startswith("tokens/")}
    if arm == "cross_entropy":
        assert not tokens
        assert files == ALWAYS
        return
    folders = {path.split("/")[1].rsplit("-", 1)[0] for path in tokens if path.endswith("learned_embeds.safetensors")}
    assert folders == set(COLORS)
    assert len(tokens) == len(COLORS) + 1 and "tokens/report.json" in tokens
    assert files - tokens == ALWAYS | {"recipes.json", "gate.json", "machine.json"}


@pytest.mark.parametrize("arm", ["supcon", "cross_entropy", "jigsaw_roundtrip"])
def test_results_name_what_was_measured(arm):
    run = finished_run(arm)
    text = (run.path / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in results.json"))
    assert results == run.results
    uneven = [name.removesuffix("_low") for name in results if name.endswith("_low")]
    assert uneven, "where every image is right, there is no interval"
    for name in uneven:
        low, value, high = (results[f"{name}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= high <= 1 and 0 <= value <= 1
    for score in SCORES:
        assert {f"test.near_ood.{score}.{metric}" for metric in OOD_METRICS} <= results.keys()
    expected = {"test.macro_accuracy", "test.knn_accuracy", "test.ece", "test.alignment", "test.uniformity"}
    expected |= {"val.accuracy", "headline.score", "run.peak_memory_gib", "cost.seconds", "cost.forward_passes"}
    expected |= {f"seconds.stage.{name}" for name in ("data", "tokens", "contrastive", "probe", "evaluate")}
    assert expected <= results.keys()
    inputs = {"sha256.data.root"} | (set() if arm == "cross_entropy" else {"sha256.pipeline.path"})
    assert {name for name in results if name.startswith("sha256.")} == inputs
    assert results["learning.steps"] == STEPS and results["test.images"] == TEST
    assert results["test.near_ood.images"] == NEAR_TEST and results["classes"] == len(COLORS)
    assert all(math.isfinite(value) for value in results.values() if isinstance(value, float))
    assert results["test.accuracy"] > 0.5, "four colors are told apart after twelve steps"


@pytest.mark.parametrize("arm", ["supcon", "jigsaw_roundtrip"])
def test_realized_fractions_are_exact(arm):
    results = finished_run(arm).results
    assert results["mix.requested_fraction"] == results["mix.realized_fraction"] == pytest.approx(0.4, abs=1e-12)
    assert results["mix.realized_near_ood"] == 0.5 and results["mix.shortfall"] == 0
    assert results["cost.forward_passes"] == 2 * STEPS * (BALANCED + GENERATED_A_STEP)


def test_generation_costs_and_reuses_what_was_asked():
    run = finished_run("supcon")
    generation, prefilled = run.config.generation, run.results["generation.images_prefilled"]
    wanted = 2 * len(COLORS) * round(generation.prefill * generation.ring_size)
    assert wanted <= prefilled < wanted + generation.decode_batch + generation.slots
    made = run.results["generation.images_finished"] - prefilled
    in_flight = generation.slots + generation.decode_batch
    assert abs(made - STEPS * generation.images_per_step) <= in_flight
    stored = run.results["generation.images_put"] - prefilled
    assert stored == made, "none was rejected and none awaits its verdict"
    assert run.results["cost.reuse"] == STEPS * GENERATED_A_STEP / stored, "of images made since the prefill"


def test_real_rows_only_where_nothing_is_generated():
    run = finished_run("cross_entropy")
    assert run.results["cost.forward_passes"] == 2 * STEPS * BALANCED
    assert not [name for name in run.results if name.startswith(("generation.", "mix."))]
    assert run.results["readout"] == "classifier"
    assert "generate" not in {row for row in run.results if row.startswith("seconds.")}


def test_metric_rows_are_of_every_interval():
    run = finished_run("supcon")
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    for row in rows:
        assert {
            "loss",
            "reference_level",
            "lr",
            "realized_fraction",
            "reuse",
            "age_mean",
            "step_ms",
            "images_per_s",
            "views_per_s",
        } <= set(row)
        assert all(f"{phase}_ms" in row for phase in ("generate", "mix", "augment", "encode", "loss", "backward"))
    assert [row["step"] for row in rows if "val.knn_accuracy" in row] == [6, 10], "the rows after steps 5 and 10"


def test_tokens_are_reported_where_images_are_stored_smaller_than_generated():
    for arm in ("supcon", "outliers"):
        run = finished_run(arm)
        report = {row["class"]: row for row in json.loads((run.path / "tokens" / "report.json").read_text())}
        assert report.keys() == set(COLORS) and all(row["images"] and row["loss_token"] > 0 for row in report.values())


def test_real_rows_shown_through_the_decoder_are_those_of_their_own_image():
    """Row i of what `roundtrip_fraction` draws from is train image i: a shifted one would carry another's label."""
    config, origins = load_config(finished_run("outliers").config_path, ["run.name=roundtrip"])
    stop = mock.patch.object(trainer, "step", side_effect=KeyboardInterrupt)
    with stop, mock.patch.object(stages, "build", wraps=stages.build) as build, pytest.raises(KeyboardInterrupt):
        trainer.run(config, origins, Console(io.StringIO()))
    job = build.call_args.args[0]
    moments, images = job.sources.moments_D8hw, stages.roundtrip_images(job)
    assert len(images) == len(moments) == TRAIN and TRAIN % config.generation.decode_batch
    for row in (0, 1, TRAIN - 1):
        expected = decode_means(job.pipeline, moments[row : row + 1], config.data.image_size)[0]
        assert (images[row].int() - expected.int()).abs().max() <= 1


def test_predictions_agree_with_the_results():
    run = finished_run("supcon")
    stored = load_predictions(run.path / "predictions.safetensors")
    rows = stored.rows("id")
    assert (len(rows), len(stored.rows("near_ood"))) == (TEST, NEAR_TEST)
    index = read_index(run.config.data, 0)
    expected = {
        item.path: (item.label, item.group) for item in (*index.select("id", "test"), *index.select("near_ood", "test"))
    }
    assert dict(zip(stored.paths, stored.groups, strict=True)) == {path: group for path, (_, group) in expected.items()}
    for row in rows.tolist():
        assert stored.classes[stored.labels_D[row]] == expected[stored.paths[row]][0]
    hits = stored.logits_DC[rows].argmax(1) == stored.labels_D[rows]
    assert hits.float().mean().item() == pytest.approx(run.results["test.accuracy"])
    assert set(stored.scores) <= set(SCORES) and all(values.isfinite().all() for values in stored.scores.values())


def test_the_report_needs_no_other_file():
    html = (finished_run("supcon").path / "report.html").read_text()
    targets = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']([^"']*)""", html)
    targets += re.findall(r"""url\(\s*["']?([^"')]*)""", html)
    assert targets, "it shows images"
    assert not [target[:80] for target in targets if not target.startswith(("data:", "#"))]
    assert not re.search(r"@import|<link|<iframe|<object|<script[^>]*src|fetch\(|XMLHttpRequest", html)
    for word in ("bolt", "positive", "near-OOD", "test accuracy"):
        assert word.lower() in html.lower()


@pytest.mark.parametrize("arm", ["supcon", "jigsaw_roundtrip", "everything", "outliers"])
def test_every_recipe_has_examples_figures_and_counted_verdicts(arm):
    run = finished_run(arm)
    recipes = {"positive", *run.config.near_ood.recipes}
    verdicts = json.loads((run.path / "gate.json").read_text())
    whole = {row["recipe"]: row for row in verdicts if row["class"] == "all"}
    assert set(whole) == recipes
    for recipe, row in whole.items():
        of_class = [other for other in verdicts if other["recipe"] == recipe and other["class"] != "all"]
        assert {other["class"] for other in of_class} <= set(COLORS)
        reasons = row.keys() - {"recipe", "class", "images"}
        assert all(row[reason] == sum(other[reason] for other in of_class) for reason in reasons)
        assert row["images"] == sum(row[reason] for reason in reasons)
        rates = {reason: run.results.get(f"gate.{recipe}.{reason}", 0) for reason in reasons}
        assert rates.pop("unjudged") == pytest.approx(row["unjudged"] / row["images"])
        assert sum(rates.values()) == pytest.approx(1 if row["images"] > row["unjudged"] else 0)
    if arm == "supcon":  # images without diffusion are judged too, but not counted among the finished
        unsettled = run.results["generation.images_finished"] - sum(row["images"] for row in whole.values())
        assert 0 <= unsettled <= run.config.generation.decode_batch + run.config.generation.slots
    if arm == "outliers":
        assert "of each number of a vector; near_ood.noise is 1 of its length" in (run.path / "report.html").read_text()
    if arm == "everything":
        judged = {"other_class", "unlike_class", "too_close", "too_far"}
        assert judged & {reason for row in verdicts for reason in row if row[reason]}, "the learner judged"
    table = [row for row in json.loads((run.path / "recipes.json").read_text()) if row["class"] == "all"]
    suitable = {row["recipe"] for row in table}
    assert suitable == recipes
    for row in table:
        figures = {name: row[name] for name in ("agreement", "real_agreement", "diversity_share", "distance_share")}
        if row["images"] < 2 * len(COLORS):  # diversity is among images of a class, and needs two of one
            figures.pop("diversity_share")
        assert all(isinstance(figure, float) and figure >= 0 for figure in figures.values()), row
    html = (run.path / "report.html").read_text()
    section = html.split('id="recipes"')[1].split("</section>")[0]
    for recipe in suitable:
        row = section.split(f'<td class="class">{recipe}</td>')[1].split("</tr>")[0]
        assert row.count("<img ") >= 2 and row.count("<img ") % 2 == 0, "each image beside its source"
    assert 'id="gate"' in html and 'id="artifact"' in html


def test_the_warning_light_is_read_from_val_and_only_where_there_is_a_decoder():
    results = finished_run("supcon").results
    assert 0 <= results["artifact.probe_auroc"] <= 1 and 0 <= results["artifact.score_auroc"] <= 1
    assert results["artifact.images"] == results["val.images"]
    assert results["artifact.groups"] == results["val.groups"] == 8
    said = " ".join(finished_run("supcon").text.split())
    assert "decoder's trace is seen cannot be told from val images of 8 groups" in said
    assert not [name for name in finished_run("cross_entropy").results if name.startswith("artifact.")]


def test_while_training_nothing_is_written_but_metrics_and_checkpoints():
    """No generated image and no tensor reaches the disk, however many are made."""
    run = finished_run("supcon")
    before, *after = run.files
    assert len(after) == STEPS
    new = set().union(*after) - before
    checkpoint = re.compile(
        r"supcon/checkpoints/contrastive/step-\d{8}/(tensors\.safetensors|tree\.json|manifest\.json)"
    )
    assert {path for path in new if not checkpoint.fullmatch(path)} <= {"supcon/metrics.jsonl"}
    assert max(sum(path.endswith("tensors.safetensors") for path in files - before) for files in after) <= 2
    assert not [path for path in contents(run.path) if "checkpoint" in path], "checkpoints go when the run ends"


def test_nothing_is_written_outside_the_run_and_its_cache():
    run = finished_run("supcon")
    home = str(shared_folder() / "runs")
    outside = {path for path in run.opened if not path.startswith((home, "/dev/", "/proc/"))}
    assert not {path for path in outside if "__pycache__" not in path and "matplotlib" not in path}


@pytest.mark.parametrize("arm", ["supcon", "outliers"])
def test_every_file_is_decoded_once_also_where_generation_is_of_another_size(arm, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "modules.data.images.decode_image", lambda *args: decoded.append(args[0]) or decode_image(*args)
    )
    sections = ARMS[arm] | {"learning": ARMS[arm].get("learning", {}) | {"steps": 1, "warmup_steps": 0}}
    results = trainer.run(*load_config(write_config(tmp_path, **sections)), Console(io.StringIO()))
    files = json.loads((tmp_path / "runs/tiny/data.json").read_text())["files"]
    assert len(decoded) == len(files)
    assert json.loads((tmp_path / "runs/tiny/tokens/report.json").read_text())[0]["images"] > 0
    assert results["artifact.probe_auroc"] >= 0, "val images were generated from at that size too"


def test_a_finished_run_shows_its_result_and_changes_nothing(capsys):
    run = finished_run("supcon")
    before = contents(run.path)
    assert trainer.main(["run", str(run.config_path)]) == 0
    assert "finished before" in capsys.readouterr().out
    assert contents(run.path) == before


def test_training_inversion_and_generation_are_handed_the_train_split_only():
    path = write_config(shared_folder(), "spied", learning={"steps": 1, "warmup_steps": 0})
    config, origins = load_config(path, [f"run.cache_dir={shared_folder() / 'cache-of-spied'}"])
    names = ("Mixer", "Inversion", "build_generator", "Sources", "load_judge")
    spies = {name: mock.Mock(wraps=getattr(stages, name)) for name in names}
    with mock.patch.multiple(stages, **spies):
        trainer.run(config, origins, Console(io.StringIO()))
    train = stages.load_sets(config.data, 0, masks=False).train
    assert len(train.items) == TRAIN and {item.split for item in train.items} == {"train"}
    assert [spies[name].call_count for name in names] == [1] * len(names)
    mixer, inversion, generator, sources, judge = (spies[name].call_args.args for name in names)
    for pixels in (mixer[0], generator[2], sources[1], judge[0]):
        assert torch.equal(pixels, train.pixels_DHWC)
    assert inversion[1].shape[1] == len(sources[0]) == TRAIN
    assert torch.equal(inversion[1][0], sources[0])
