"""The files an evaluation writes: the predictions of a run, and the detector of an export.

`predictions.safetensors` has what a comparison reads per test image: path, group, logits and every score, so that
intervals can be paired over test groups without loading an encoder. `ood.safetensors` holds what turns features of an
exported encoder into a class and an accept/reject decision. Both are safetensors, so nothing is unpickled. Paths and
groups are stored as JSON bytes in uint8 tensors, as they could exceed the size limit of the header.

Shapes: D test images (ID first, then near-OOD, then far-OOD), C classes, F feature width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.errors import DataError
from modules.evaluation.ood import SCORES, State, apply_scores
from modules.evaluation.probe import Probe
from modules.state import safetensors_bytes, write_atomic

ROLES = ("id", "near_ood", "far_ood")


@dataclass(frozen=True)
class Predictions:
    """Predictions and scores of the test images, one row per image."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    groups: tuple[str, ...]
    roles_D: Tensor  # uint8, position in ROLES
    labels_D: Tensor  # int64, class id; -1 for OOD images
    logits_DC: Tensor  # float32
    knn_D: Tensor  # int64, class predicted by the nearest neighbors
    scores: dict[str, Tensor]  # score -> float64 [D], higher = more in-distribution

    def rows(self, role: str) -> Tensor:
        """The row numbers (int64) of the images of a role."""
        return (self.roles_D == ROLES.index(role)).nonzero()[:, 0]


@dataclass(frozen=True)
class Decision:
    """A detector's output for a set of images."""

    labels_D: Tensor  # int64, most probable class
    confidence_D: Tensor  # float32, its probability
    scores: dict[str, Tensor]  # float64 [D]
    accepted_D: Tensor  # bool: headline score >= its threshold


@dataclass(frozen=True)
class Detector:
    """Readout, OOD states and thresholds, which turn features into a class and an accept/reject decision."""

    classes: tuple[str, ...]
    readout: Probe
    states: dict[str, State]
    thresholds: dict[str, float]  # score -> threshold that accepts 95 % of ID val images
    headline: str

    def decide(self, features_DF: Tensor) -> Decision:
        """Class, its probability, every score and the decision, for raw features (float32)."""
        logits_DC = self.readout.logits(features_DF)
        confidence_D, labels_D = logits_DC.softmax(dim=1).max(dim=1)
        scores = apply_scores(self.states, features_DF, logits_DC)
        return Decision(labels_D, confidence_D, scores, scores[self.headline] >= self.thresholds[self.headline])


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions.safetensors, atomically."""
    tensors = {
        "paths": _json_tensor(predictions.paths),
        "groups": _json_tensor(predictions.groups),
        "roles": predictions.roles_D,
        "labels": predictions.labels_D,
        "logits": predictions.logits_DC,
        "knn": predictions.knn_D,
    }
    tensors |= {f"score.{name}": values_D for name, values_D in predictions.scores.items()}
    _save(path, tensors, {"classes": json.dumps(predictions.classes), "roles": json.dumps(ROLES)})


def load_predictions(path: Path) -> Predictions:
    """Read predictions.safetensors; raise DataError if it is missing, broken or incomplete."""
    tensors, metadata = _load(path, ("paths", "groups", "roles", "labels", "logits", "knn"), ("classes",))
    return Predictions(
        classes=tuple(json.loads(metadata["classes"])),
        paths=_strings(tensors["paths"]),
        groups=_strings(tensors["groups"]),
        roles_D=tensors["roles"],
        labels_D=tensors["labels"],
        logits_DC=tensors["logits"],
        knn_D=tensors["knn"],
        scores={name.removeprefix("score."): value for name, value in tensors.items() if name.startswith("score.")},
    )


def save_detector(path: Path, detector: Detector) -> None:
    """Write the detector atomically, with classes, thresholds, headline score and learning rate in the header."""
    tensors = {"readout.weight_FC": detector.readout.weight_FC, "readout.bias_C": detector.readout.bias_C}
    for name, state in detector.states.items():
        tensors |= {f"{name}.{part}": value for part, value in state.items()}
    metadata = {
        "classes": json.dumps(detector.classes),
        "scores": json.dumps(list(detector.states)),
        "thresholds": json.dumps(detector.thresholds),
        "headline": detector.headline,
        "lr": repr(detector.readout.lr),
        "convention": "accepted as in-distribution where score >= threshold; thresholds accept 95 % of ID val images",
    }
    _save(path, tensors, metadata)


def load_detector(path: Path) -> Detector:
    """Read a saved detector; raise DataError if it is missing, broken, incomplete or has a score this version lacks."""
    header = ("classes", "scores", "thresholds", "headline", "lr")
    tensors, metadata = _load(path, ("readout.weight_FC", "readout.bias_C"), header)
    names = json.loads(metadata["scores"])
    unknown = [name for name in names if name not in SCORES]
    if unknown:
        raise DataError(
            f"{path}: holds the score {unknown[0]!r}, known are {', '.join(SCORES)}; restore it, or move the run away and "
            "make it again"
        )
    states = {name: {} for name in names}
    for key, value in tensors.items():
        name, _, part = key.partition(".")
        if name in states:
            states[name][part] = value
    return Detector(
        classes=tuple(json.loads(metadata["classes"])),
        readout=Probe(tensors["readout.weight_FC"], tensors["readout.bias_C"], float(metadata["lr"]), {}),
        states=states,
        thresholds=json.loads(metadata["thresholds"]),
        headline=metadata["headline"],
    )


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_atomic(path, safetensors_bytes(tensors, metadata))


def _load(path: Path, names: tuple[str, ...], header: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read as safetensors ({error}); restore it, or move the run away and make it again"
        ) from error
    lacking = [name for name in names if name not in tensors] + [name for name in header if name not in metadata]
    if lacking:
        raise DataError(f"{path}: lacks {', '.join(lacking)}; restore it, or move the run away and make it again")
    return tensors, metadata


def _json_tensor(strings: tuple[str, ...]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(strings).encode()), dtype=torch.uint8)


def _strings(bytes_N: Tensor) -> tuple[str, ...]:
    return tuple(json.loads(bytes_N.numpy().tobytes()))
