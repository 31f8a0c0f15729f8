"""The whole protocol on small feature sets: keys, no peeking, intervals, and what is stored."""

import dataclasses
import json

import pytest
import torch

from modules import config
from modules.errors import ConfigError, DataError
from modules.evaluation.evaluate import FeatureSet, evaluate, feature_set
from modules.evaluation.intervals import metric_replicates
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES
from modules.evaluation.probe import Probe
from modules.evaluation.stored import ROLES, load_detector, load_predictions, save_detector, save_predictions
from tests.evaluation.examples import clusters, sets

CLASSES = ("bolt", "gear", "nut", "washer")
PROBE = config.Probe(lrs=(0.03, 0.3), epochs=8, batch_size=64)


def run(given, **options):
    settings = {"probe": PROBE, "evaluation": config.Evaluation(bootstrap=60), "seed": 0, "classes": CLASSES}
    return evaluate(**given, **(settings | options))


@pytest.fixture(scope="module")
def outcome():
    return run(sets())


def test_every_promised_key_is_there(outcome):
    found = outcome.results
    for split in ("val", "test"):
        for key in ("accuracy", "macro_accuracy", "ece", "mean_max_softmax_id", "knn_accuracy", "alignment", "images"):
            assert f"{split}.{key}" in found
    for score in SCORES:
        for metric in OOD_METRICS:
            for role in ("near_ood", "far_ood"):
                key = f"test.{role}.{score}.{metric}"
                assert found[f"{key}_low"] - 1e-9 <= found[key] <= found[f"{key}_high"] + 1e-9, key
        assert f"threshold.{score}" in found
    assert found["test.accuracy_low"] <= found["test.accuracy"] <= found["test.accuracy_high"]
    assert found["probe.lr"] in PROBE.lrs and found["readout"] == "probe" and found["headline.score"] == "knn"
    assert found["test.images"] == 48 and found["test.groups"] == 16 and found["test.near_ood.images"] == 36
    assert found["test.mean_max_softmax_ood"] == found["test.near_ood.mean_max_softmax"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_resample_of_every_image_once_gives_the_results(outcome):
    once = {role: torch.ones(1, len(outcome.predictions.rows(role))) for role in ROLES}
    for key, value in metric_replicates(outcome.predictions, once).items():
        assert float(value) == pytest.approx(outcome.results[key], abs=1e-6), key


def test_a_pure_function_of_the_seed(outcome):
    assert run(sets()).results == outcome.results


def test_test_sets_change_nothing_that_was_chosen(outcome):
    """No peeking: other test images leave probe, thresholds and all val figures as they were, to the bit."""
    given = sets()
    for name in ("test", "near_ood_test", "far_ood_test"):
        part = given[name]
        given[name] = dataclasses.replace(part, features_DF=part.features_DF.flip(0) * 3 + 1)
    other = run(given)
    chosen = [key for key in outcome.results if not key.startswith("test.")]
    assert {key: other.results[key] for key in chosen} == {key: outcome.results[key] for key in chosen}
    assert torch.equal(other.detector.readout.weight_FC, outcome.detector.readout.weight_FC)
    assert other.results["test.accuracy"] != outcome.results["test.accuracy"]


def test_without_a_test_set_only_val_is_read(outcome):
    given = sets() | {"test": None}
    found = run(given)
    assert not [key for key in found.results if key.startswith("test.")] and found.predictions is None
    assert found.results["val.near_ood.knn.auroc"] == outcome.results["val.near_ood.knn.auroc"]
    assert sum(row["images"] for row in found.class_rows) == 48


def test_the_binary_head_does_not_report_on_images_it_was_trained_on(outcome):
    assert outcome.results["binary_head.trained_on"] == "near_ood_val"
    assert "val.near_ood.binary.auroc" not in outcome.results
    given = sets() | {"generated_near_ood_DF": clusters("made", range(20, 25)).features_DF}
    found = run(given).results
    assert found["binary_head.trained_on"] == "generated" and found["val.near_ood.binary.auroc"] > 0.6
    assert found["test.near_ood.binary.auroc"] > 0.6
    alone = run(given | {"near_ood_val": None, "generated_id_DF": clusters("positives", range(4)).features_DF})
    assert alone.results["test.near_ood.binary.auroc"] > 0.6
    one_group = dataclasses.replace(given["near_ood_val"], groups=("one",) * 24)
    without = run(sets() | {"near_ood_val": one_group, "generated_near_ood_DF": torch.zeros(0, 16)})
    assert without.results["binary_head.trained_on"] == "none" and "binary" not in without.detector.states


def test_without_any_ood_images_there_is_accuracy_and_no_binary_head():
    given = {name: part for name, part in sets().items() if name in ("train", "val", "test")}
    found = run(given)
    assert "binary" not in found.detector.states and found.results["binary_head.trained_on"] == "none"
    assert not [key for key in found.results if "ood" in key]
    with pytest.raises(ConfigError, match="evaluation.score=binary"):
        run(given, evaluation=config.Evaluation(score="binary", bootstrap=0))


def test_a_classifier_takes_the_place_of_the_probe(outcome):
    readout = outcome.detector.readout
    swapped = Probe(readout.weight_FC.roll(1, 1), readout.bias_C.roll(1), float("nan"), {})
    found = run(sets(), classifier=swapped)
    assert found.results["readout"] == "classifier" and "probe.lr" not in found.results
    assert found.results["test.accuracy"] < 0.1 < outcome.results["test.accuracy"]
    assert found.results["test.near_ood.knn.auroc"] == outcome.results["test.near_ood.knn.auroc"]


def test_intervals_are_optional_and_refused_for_few_groups():
    given = sets()
    assert not [key for key in run(given, evaluation=config.Evaluation(bootstrap=0)).results if key.endswith("_low")]
    few = dataclasses.replace(given["test"], groups=("one", "two") * 24)
    with pytest.raises(DataError, match="test has 2"):
        run(given | {"test": few})


def test_an_empty_val_split_and_a_mismatch_are_refused():
    given = sets()
    empty = FeatureSet(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), (), ())
    with pytest.raises(DataError, match="val split holds no image.*data.val_fraction"):
        run(given | {"val": empty})
    with pytest.raises(ValueError, match="items: 0 for features of shape"):
        feature_set([], torch.zeros(2, 3), CLASSES)


def test_items_become_rows_in_their_order():
    @dataclasses.dataclass
    class Item:
        path: str
        label: str
        group: str

    given = feature_set([Item("b.jpg", "nut", "m1"), Item("a.jpg", "spring", "")], torch.zeros(2, 3), CLASSES)
    assert given.labels_D.tolist() == [2, -1] and given.groups == ("m1", "a.jpg") and given.paths[0] == "b.jpg"


def test_predictions_survive_the_disk(tmp_path, outcome):
    path = tmp_path / "run" / "predictions.safetensors"
    save_predictions(path, outcome.predictions)
    read = load_predictions(path)
    assert read.paths == outcome.predictions.paths and read.groups == outcome.predictions.groups
    assert read.classes == CLASSES and len(read.paths) == 48 + 36 + 36
    assert torch.equal(read.logits_DC, outcome.predictions.logits_DC)
    assert {name: values.dtype for name, values in read.scores.items()} == dict.fromkeys(SCORES, torch.float64)
    assert all(torch.equal(read.scores[name], outcome.predictions.scores[name]) for name in SCORES)
    assert [len(read.rows(role)) for role in ("id", "near_ood", "far_ood")] == [48, 36, 36]
    assert [child.name for child in path.parent.iterdir()] == ["predictions.safetensors"]
    (tmp_path / "broken").write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="broken: cannot be read"):
        load_predictions(tmp_path / "broken")


def test_an_exported_detector_judges_as_the_run_did(tmp_path, outcome):
    path = tmp_path / "ood.safetensors"
    save_detector(path, outcome.detector)
    detector = load_detector(path)
    given = sets()
    judged = detector.decide(given["test"].features_DF)
    rows = outcome.predictions.rows("id")
    for name in SCORES:
        assert torch.equal(judged.scores[name], outcome.predictions.scores[name][rows]), name
    assert float((judged.labels_D == given["test"].labels_D).double().mean()) == outcome.results["test.accuracy"]
    assert float(detector.decide(given["val"].features_DF).accepted_D.double().mean()) >= 0.95
    assert float(detector.decide(given["far_ood_test"].features_DF).accepted_D.double().mean()) < 0.6
    with pytest.raises(DataError, match="lacks"):
        load_predictions(path)
