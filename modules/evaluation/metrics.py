"""The metrics of one evaluation, by scikit-learn wherever it has the metric.

Two conventions are stated because other code differs in them. Scores are confidences: **higher is more
in-distribution**. The name of a false-positive rate says which side is positive: `fpr_ood_at_id_tpr95` is the share of
OOD images accepted at the threshold that accepts 95 % of ID; `fpr_id_at_ood_tpr95` is its mirror image (what OpenOOD
v1.5 calls FPR@95).

Shapes: D images, C classes.
"""

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    auc,
    confusion_matrix,
    precision_recall_curve,
    recall_score,
    roc_auc_score,
    roc_curve,
)
from torch import Tensor

CALIBRATION_BINS = 15
OOD_METRICS = ("auroc", "aupr_in", "aupr_out", "fpr_ood_at_id_tpr95", "fpr_id_at_ood_tpr95")


def macro_accuracy(labels_D: Tensor, predictions_D: Tensor) -> float:
    """Mean accuracy over the classes that occur, in [0, 1]."""
    present = labels_D.unique().numpy()
    return float(
        recall_score(labels_D.numpy(), predictions_D.numpy(), labels=present, average="macro", zero_division=0)
    )


def classification_metrics(logits_DC: Tensor, labels_D: Tensor) -> dict[str, float]:
    """accuracy, macro_accuracy, ece and mean_max_softmax of ID images, each in [0, 1]."""
    predictions_D = logits_DC.argmax(dim=1)
    return {
        "accuracy": float(accuracy_score(labels_D.numpy(), predictions_D.numpy())),
        "macro_accuracy": macro_accuracy(labels_D, predictions_D),
        "ece": expected_calibration_error(logits_DC, labels_D),
        "mean_max_softmax": mean_max_softmax(logits_DC),
    }


def mean_max_softmax(logits_DC: Tensor) -> float:
    """The mean over images of the largest class probability, in [1/C, 1]."""
    return float(logits_DC.double().softmax(dim=1).amax(dim=1).mean())


def expected_calibration_error(logits_DC: Tensor, labels_D: Tensor) -> float:
    """Mean gap between confidence and accuracy over 15 equal-width bins of confidence, in [0, 1].

    sum over bins b of |b|/D |accuracy(b) - mean confidence(b)|, bins (lower, upper].

    Source: Guo et al. 2017 (1706.04599), eq. 3.
    """
    confidence_D, predictions_D = logits_DC.double().softmax(dim=1).max(dim=1)
    correct_D = (predictions_D == labels_D).double()
    bin_D = (confidence_D * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_D, correct_D - confidence_D)
    return float(gap.abs().sum() / len(labels_D))


def ood_metrics(id_scores_D: Tensor, ood_scores_D: Tensor) -> dict[str, float]:
    """The five metrics of OOD_METRICS for one score, each in [0, 1]; chance is .5 for auroc.

    In aupr_in ID is the positive class, in aupr_out OOD; both by the trapezoidal rule, as in OpenOOD.

    Raises ValueError if either side is empty or a score is not finite.
    """
    for name, scores_D in (("id_scores_D", id_scores_D), ("ood_scores_D", ood_scores_D)):
        if len(scores_D) == 0 or not torch.isfinite(scores_D).all():
            raise ValueError(f"{name}: {len(scores_D)} scores, expected at least one and all of them finite")
    scores = torch.cat([id_scores_D, ood_scores_D]).double().numpy()
    is_id = np.concatenate([np.ones(len(id_scores_D), bool), np.zeros(len(ood_scores_D), bool)])
    return {
        "auroc": float(roc_auc_score(is_id, scores)),
        "aupr_in": _aupr(is_id, scores),
        "aupr_out": _aupr(~is_id, -scores),
        "fpr_ood_at_id_tpr95": _fpr_at_tpr95(is_id, scores),
        "fpr_id_at_ood_tpr95": _fpr_at_tpr95(~is_id, -scores),
    }


def class_table(
    labels_D: Tensor, predictions_D: Tensor, groups: tuple[str, ...], classes: tuple[str, ...]
) -> list[dict]:
    """One row per class: class, images, groups, accuracy, precision and the class it is most often confused with.

    accuracy is None if the class has no image, precision if it is never predicted; confused_with is "" and
    confused_share 0 if no image is predicted as another class.
    """
    confusion_CC = confusion(labels_D, predictions_D, len(classes))
    rows = []
    for index, name in enumerate(classes):
        row_C, images, predicted = (
            confusion_CC[index],
            int(confusion_CC[index].sum()),
            int(confusion_CC[:, index].sum()),
        )
        others_C = row_C.copy()
        others_C[index] = 0
        rival = int(others_C.argmax())
        rows.append(
            {
                "class": name,
                "images": images,
                "groups": len(
                    {group for group, label in zip(groups, labels_D.tolist(), strict=True) if label == index}
                ),
                "accuracy": float(row_C[index] / images) if images else None,
                "precision": float(row_C[index] / predicted) if predicted else None,
                "confused_with": classes[rival] if others_C[rival] else "",
                "confused_share": float(others_C[rival] / images) if images else 0.0,
            }
        )
    return rows


def confusion(labels_D: Tensor, predictions_D: Tensor, num_classes: int) -> np.ndarray:
    """Counts [C, C], int64: row = true class, column = predicted class."""
    return confusion_matrix(labels_D.numpy(), predictions_D.numpy(), labels=np.arange(num_classes))


def _aupr(is_positive: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(is_positive, scores)
    return float(auc(recall, precision))


def _fpr_at_tpr95(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """The false-positive rate at the strictest threshold whose true-positive rate is at least .95."""
    fpr, tpr, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])
