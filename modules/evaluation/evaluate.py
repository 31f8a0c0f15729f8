"""Evaluates a run: takes frozen features of all image sets and returns every number of its results.

The protocol is an order: the readout and all thresholds are fixed on train and val, then test is read once. Near-OOD
sets are images of held-out classes, the far-OOD set is another image set; neither contains images of the generator that
made the training negatives.

Shapes: D images, C classes, F feature width, Q bootstrap resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules import config
from modules.data.sets import ImageSets
from modules.errors import DataError
from modules.evaluation import metrics
from modules.evaluation.features import Embed, Progress, alignment, embed_images, knn_predict, uniformity
from modules.evaluation.intervals import bootstrap_intervals, check_groups
from modules.evaluation.ood import (
    Fitting,
    acceptance_threshold,
    apply_scores,
    check_score_name,
    fit_scores,
    head_source,
)
from modules.evaluation.probe import Probe, train_binary_head, train_probe
from modules.evaluation.stored import ROLES, Detector, Predictions
from modules.runtime import stream


@dataclass(frozen=True)
class FeatureSet:
    """Frozen features of one set of images, with their labels, paths and groups."""

    features_DF: Tensor  # float32, CPU, raw
    labels_D: Tensor  # int64; class id, -1 for OOD images
    paths: tuple[str, ...]
    groups: tuple[str, ...]  # model or sample; the path if an image has none

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Outcome:
    """Everything an evaluation found."""

    results: dict[str, float | int | str]  # flat keys for results.json
    detector: Detector  # for export/
    predictions: Predictions | None  # for predictions.safetensors; None if no test set was given
    class_rows: list[dict]  # metrics.class_table of test, or of val without test
    confusion_CC: np.ndarray  # counts of the same set


def feature_set(items: Sequence, features_DF: Tensor, classes: tuple[str, ...]) -> FeatureSet:
    """FeatureSet of index items (path, label, group) in the order of their features; label -1 if not one of `classes`.

    Raises ValueError if items and features differ in number.
    """
    if len(items) != len(features_DF):
        raise ValueError(f"items: {len(items)} for features of shape {tuple(features_DF.shape)}, expected one a row")
    number = {name: index for index, name in enumerate(classes)}
    labels_D = torch.tensor([number.get(item.label, -1) for item in items], dtype=torch.int64)
    return FeatureSet(
        features_DF, labels_D, tuple(item.path for item in items), tuple(item.group or item.path for item in items)
    )


def embed_sets(
    sets: ImageSets, embed: Embed, evaluation: config.Evaluation, progress: Progress
) -> dict[str, FeatureSet]:
    """Image set name -> its frozen features; test sets are included only if evaluation.test is set."""
    features, chosen = {}, sets.scored(evaluation.test)
    total, done = sum(len(images.items) for images in chosen.values()), 0
    for name, images in chosen.items():
        found = embed_images(embed, images.pixels_DHWC, evaluation.batch_size)
        known = sets.index.classes if name in ("train", "val", "test") else ()
        features[name] = feature_set(images.items, found, known)
        done += len(images.items)
        progress(done, total, name)
    return features


def evaluate(
    *,
    train: FeatureSet,
    val: FeatureSet,
    test: FeatureSet | None,
    near_ood_val: FeatureSet | None = None,
    near_ood_test: FeatureSet | None = None,
    far_ood_test: FeatureSet | None = None,
    generated_near_ood_DF: Tensor | None = None,
    generated_id_DF: Tensor | None = None,
    classes: tuple[str, ...],
    probe: config.Probe,
    evaluation: config.Evaluation,
    seed: int,
    classifier: Probe | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """The outcome of the whole protocol; without `test`, only val is evaluated (sweeps).

    The readout is a linear probe trained on train and chosen on val, or `classifier` (an affine map the encoder already
    has). The binary head is trained on `generated_near_ood_DF`, features of generated negatives, with those of
    generated positives in `generated_id_DF` on its ID side; without generated negatives, on half of the near-OOD val
    groups.

    Keys of results: `val.` and `test.` + accuracy, macro_accuracy, ece, mean_max_softmax_id, knn_accuracy, alignment,
    uniformity, images, groups; `<split>.near_ood.` and `test.far_ood.` + images, groups, mean_max_softmax (test only)
    and `<score>.<metric>` for metrics.OOD_METRICS; `threshold.<score>`; probe.lr, readout, headline.score. If
    evaluation.bootstrap > 0, accuracies, mean_max_softmax and OOD metrics of test also have `_low` and `_high`.

    Raises DataError (empty val, too few groups, class without train image), ConfigError (score), NonFinite (probe).
    """
    if len(val) == 0:
        raise DataError(
            "the val split holds no image: settings are chosen on it; give val images or raise data.val_fraction"
        )
    report = progress or (lambda done, total, note: None)
    ood_tests = {"near_ood": near_ood_test, "far_ood": far_ood_test}
    ood_tests = {name: given for name, given in ood_tests.items() if test is not None and given}
    tests = ({"test": test} if test is not None else {}) | {f"test {name}": given for name, given in ood_tests.items()}
    check_groups({name: given.groups for name, given in tests.items()}, evaluation.bootstrap)
    near_ood_val = near_ood_val or None  # an empty set counts as none
    source = head_source(
        0 if generated_near_ood_DF is None else len(generated_near_ood_DF),
        () if near_ood_val is None else near_ood_val.groups,
    )
    check_score_name(evaluation.score, source != "none")

    report(0, 4, "probe")
    readout = classifier or train_probe(
        train.features_DF,
        train.labels_D,
        val.features_DF,
        val.labels_D,
        num_classes=len(classes),
        settings=probe,
        seed=seed,
    )
    results: dict[str, float | int | str] = {
        "readout": "probe" if classifier is None else "classifier",
        "headline.score": evaluation.score,
        "classes": len(classes),
        "bootstrap.resamples": evaluation.bootstrap,
        "bootstrap.confidence": evaluation.confidence,
    }
    if classifier is None:
        results["probe.lr"] = readout.lr
        results |= {f"probe.val_accuracy.lr_{lr:g}": accuracy for lr, accuracy in readout.val_accuracy.items()}

    report(1, 4, "OOD scores")
    head = _binary_head(source, train, val, near_ood_val, generated_near_ood_DF, generated_id_DF, probe, seed)
    results["binary_head.trained_on"] = source
    states = fit_scores(Fitting(train.features_DF, train.labels_D, head))
    reader = _Reader(train, readout, states, len(classes))
    val_logits_DC, val_scores = reader.read(val)
    thresholds = {name: acceptance_threshold(values_D) for name, values_D in val_scores.items()}
    results |= {f"threshold.{name}": value for name, value in thresholds.items()}
    results |= _prefixed("val.", reader.classification(val, val_logits_DC))
    if near_ood_val is not None:
        near_scores = reader.read(near_ood_val)[1]
        # half of these images trained the head, so its metrics on them would be too good
        flattered = {"binary"} if source == "near_ood_val" else set()
        results |= _ood_results("val.near_ood.", val_scores, near_scores, flattered)
        results |= {"val.near_ood.images": len(near_ood_val), "val.near_ood.groups": len(set(near_ood_val.groups))}
    detector = Detector(classes, readout, states, thresholds, evaluation.score)
    if test is None:
        return _outcome(results, detector, None, val, val_logits_DC)

    report(2, 4, "test")
    found, parts = _read_tests(reader, test, ood_tests)
    results |= found
    predictions = _predictions(classes, parts, reader)

    report(3, 4, "intervals")
    if evaluation.bootstrap > 0:
        results |= bootstrap_intervals(predictions, evaluation, seed)
    for end in ("", "_low", "_high"):
        if f"test.near_ood.mean_max_softmax{end}" in results:
            results[f"test.mean_max_softmax_ood{end}"] = results[f"test.near_ood.mean_max_softmax{end}"]
    report(4, 4, "done")
    return _outcome(results, detector, predictions, test, parts[0][1])


@dataclass(frozen=True)
class _Reader:
    """Applies the fixed readout and scores to a set of features."""

    train: FeatureSet
    readout: Probe
    states: dict
    num_classes: int

    def read(self, given: FeatureSet) -> tuple[Tensor, dict[str, Tensor]]:
        logits_DC = self.readout.logits(given.features_DF)
        return logits_DC, apply_scores(self.states, given.features_DF, logits_DC)

    def neighbors(self, given: FeatureSet) -> Tensor:
        return knn_predict(self.train.features_DF, self.train.labels_D, given.features_DF, self.num_classes)

    def classification(self, given: FeatureSet, logits_DC: Tensor) -> dict[str, float | int]:
        found = metrics.classification_metrics(logits_DC, given.labels_D)
        found["mean_max_softmax_id"] = found.pop("mean_max_softmax")
        return found | {
            "knn_accuracy": float((self.neighbors(given) == given.labels_D).double().mean()),
            "alignment": alignment(given.features_DF, given.labels_D),
            "uniformity": uniformity(given.features_DF),
            "images": len(given),
            "groups": len(set(given.groups)),
        }


def _read_tests(reader: _Reader, test: FeatureSet, ood_tests: dict[str, FeatureSet]) -> tuple[dict, list[tuple]]:
    """The results of the test sets, and (set, logits, scores, role) for each of them, the ID set first."""
    logits_DC, scores = reader.read(test)
    found = _prefixed("test.", reader.classification(test, logits_DC))
    parts = [(test, logits_DC, scores, "id")]
    for name, given in ood_tests.items():
        ood_logits_DC, ood_scores = reader.read(given)
        parts.append((given, ood_logits_DC, ood_scores, name))
        found |= _ood_results(f"test.{name}.", scores, ood_scores, set())
        found |= {
            f"test.{name}.images": len(given),
            f"test.{name}.groups": len(set(given.groups)),
            f"test.{name}.mean_max_softmax": metrics.mean_max_softmax(ood_logits_DC),
        }
    return found, parts


def _outcome(
    results: dict, detector: Detector, predictions: Predictions | None, shown: FeatureSet, logits_DC: Tensor
) -> Outcome:
    """The outcome, with the class table and the confusion matrix of one set: test, or val without test."""
    predicted_D = logits_DC.argmax(dim=1)
    rows = metrics.class_table(shown.labels_D, predicted_D, shown.groups, detector.classes)
    confusion_CC = metrics.confusion(shown.labels_D, predicted_D, len(detector.classes))
    return Outcome(_plain(results), detector, predictions, rows, confusion_CC)


def _binary_head(
    source: str,
    train: FeatureSet,
    val: FeatureSet,
    near_ood_val: FeatureSet | None,
    generated_near_ood_DF: Tensor | None,
    generated_id_DF: Tensor | None,
    settings: config.Probe,
    seed: int,
) -> Probe | None:
    """The ID/OOD head, chosen on ID val images and OOD rows that it was not trained on; None without OOD rows."""
    if source == "none":
        return None
    id_DF = train.features_DF
    if source == "generated":
        if generated_id_DF is not None:
            id_DF = torch.cat([id_DF, generated_id_DF])
        if near_ood_val is not None:
            fit_DF, choose_DF = generated_near_ood_DF, near_ood_val.features_DF
        else:
            fit_DF, choose_DF = _halves(generated_near_ood_DF, range(len(generated_near_ood_DF)), seed)
    else:
        fit_DF, choose_DF = _halves(near_ood_val.features_DF, near_ood_val.groups, seed)
    return train_binary_head(id_DF, fit_DF, val.features_DF, choose_DF, settings=settings, seed=seed)


def _halves(features_DF: Tensor, groups: Sequence, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of a random half of the groups, and the other rows; there must be at least two groups."""
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=stream(seed, "binary head", "halves")).tolist()
    first = {names[position] for position in order[: math.ceil(len(names) / 2)]}
    in_first_D = torch.tensor([group in first for group in groups])
    return features_DF[in_first_D], features_DF[~in_first_D]


def _ood_results(
    prefix: str, id_scores: dict[str, Tensor], ood_scores: dict[str, Tensor], left_out: set[str]
) -> dict[str, float]:
    return {
        f"{prefix}{name}.{metric}": value
        for name in id_scores
        if name not in left_out
        for metric, value in metrics.ood_metrics(id_scores[name], ood_scores[name]).items()
    }


def _predictions(classes: tuple[str, ...], parts: list[tuple], reader: _Reader) -> Predictions:
    return Predictions(
        classes=classes,
        paths=tuple(path for given, _, _, _ in parts for path in given.paths),
        groups=tuple(group for given, _, _, _ in parts for group in given.groups),
        roles_D=torch.cat(
            [torch.full((len(given),), ROLES.index(role), dtype=torch.uint8) for given, _, _, role in parts]
        ),
        labels_D=torch.cat(
            [given.labels_D if role == "id" else torch.full((len(given),), -1) for given, _, _, role in parts]
        ),
        logits_DC=torch.cat([logits_DC for _, logits_DC, _, _ in parts]),
        knn_D=torch.cat([reader.neighbors(given) for given, _, _, _ in parts]),
        scores={name: torch.cat([scores[name] for _, _, scores, _ in parts]) for name in parts[0][2]},
    )


def _prefixed(prefix: str, values: dict) -> dict:
    return {prefix + key: value for key, value in values.items()}


def _plain(results: dict) -> dict:
    """The results that JSON can hold: metrics that are undefined for a set (nan) are left out."""
    return {key: value for key, value in results.items() if not (isinstance(value, float) and math.isnan(value))}
