"""Metrics: by hand, against scikit-learn and pytorch-ood, and the bootstrap's fast versions against repeated rows."""

import numpy as np
import pytest
import torch
from pytorch_ood.metrics import OODMetrics
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score

from modules.evaluation.metrics import (
    OOD_METRICS,
    class_table,
    classification_metrics,
    confusion,
    expected_calibration_error,
    macro_accuracy,
    mean_max_softmax,
    ood_metrics,
)
from modules.evaluation.replicates import macro_accuracy_replicates, mean_replicates, ood_replicates


def draw(seed, count, shift=0.0, ties=False):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    return values.mul(2).round() / 2 if ties else values


def test_false_positive_rates_by_hand():
    # 20 ID scores 1..20: 95 % of them are at or above 2, where 3 of the 4 OOD scores are accepted.
    id_scores, ood_scores = torch.arange(1, 21).double(), torch.tensor([0.5, 2.0, 2.5, 30.0])
    found = ood_metrics(id_scores, ood_scores)
    assert found["fpr_ood_at_id_tpr95"] == 0.75
    # 95 % of 4 OOD images is all of them: only a threshold above 30 detects the last, and rejects all ID
    assert found["fpr_id_at_ood_tpr95"] == 1.0
    # pairs won by ID: over .5 all 20, over 2 18.5, over 2.5 18, over 30 none
    assert found["auroc"] == pytest.approx((20 + 18.5 + 18 + 0) / 80)
    # every score is that of one ID and one OOD image: 19 of 20 ID are accepted together with 19 of 20 OOD
    assert ood_metrics(id_scores, id_scores)["fpr_ood_at_id_tpr95"] == 0.95


@pytest.mark.parametrize("ties", [False, True])
def test_ood_metrics_agree_with_pytorch_ood(ties):
    id_scores, ood_scores = draw(0, 230, 1.0, ties), draw(1, 170, 0.0, ties)
    found = ood_metrics(id_scores, ood_scores)
    theirs = OODMetrics()
    # pytorch-ood has outlier scores and -1 for OOD
    theirs.update(-torch.cat([id_scores, ood_scores]), torch.cat([torch.zeros(230), -torch.ones(170)]).long())
    theirs = theirs.compute()
    assert found["auroc"] == pytest.approx(theirs["AUROC"], abs=1e-6)
    assert found["aupr_in"] == pytest.approx(theirs["AUPR-IN"], abs=1e-6)
    assert found["aupr_out"] == pytest.approx(theirs["AUPR-OUT"], abs=1e-6)
    assert found["fpr_id_at_ood_tpr95"] == pytest.approx(theirs["FPR95TPR"], abs=1e-6)
    mirrored = ood_metrics(-ood_scores, -id_scores)
    assert found["fpr_ood_at_id_tpr95"] == mirrored["fpr_id_at_ood_tpr95"]
    assert tuple(found) == OOD_METRICS


def test_perfect_constant_and_unusable_scores():
    perfect = ood_metrics(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert perfect == {"auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr_ood_at_id_tpr95": 0, "fpr_id_at_ood_tpr95": 0}
    constant = ood_metrics(torch.ones(5), torch.ones(5))
    assert constant["auroc"] == 0.5 and constant["fpr_ood_at_id_tpr95"] == 1
    with pytest.raises(ValueError, match="ood_scores_D: 0 scores"):
        ood_metrics(torch.ones(2), torch.ones(0))
    with pytest.raises(ValueError, match="id_scores_D: 2 scores.*finite"):
        ood_metrics(torch.tensor([1.0, float("inf")]), torch.ones(2))


def test_classification_by_hand_and_by_scikit_learn():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    labels = torch.tensor([0, 1, 1, 0, 0])
    found = classification_metrics(logits, labels)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["macro_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # class 2 has no image: not in the mean
    confidence = float(torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 2))
    assert found["mean_max_softmax"] == pytest.approx(confidence) == mean_max_softmax(logits)
    assert found["ece"] == pytest.approx(abs(0.6 - confidence))  # all five share one bin
    generator = torch.Generator().manual_seed(0)
    y, predicted = torch.randint(5, (200,), generator=generator), torch.randint(5, (200,), generator=generator)
    assert macro_accuracy(y, predicted) == pytest.approx(balanced_accuracy_score(y, predicted))


def test_calibration_error_is_the_gap_of_scikit_learns_calibration_curve():
    generator = torch.Generator().manual_seed(3)
    logits, labels = 3 * torch.randn(400, 6, generator=generator), torch.randint(6, (400,), generator=generator)
    confidence, predicted = logits.double().softmax(1).max(1)
    labels = torch.where(confidence < 0.7, predicted, labels)  # too modest below, too sure above: bins matter
    share, mean = calibration_curve(predicted == labels, confidence, n_bins=15)
    counts = np.histogram(confidence, bins=15, range=(0, 1))[0]
    expected = (counts[counts > 0] * np.abs(share - mean)).sum() / 400
    assert expected > 0.05
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-9)


def test_class_table_names_the_rival():
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 2, 2, 1, 1, 1])
    rows = class_table(labels, predicted, ("a", "a", "b", "c", "d", "d"), ("bolt", "nut", "gear"))
    assert rows[0] == {
        "class": "bolt",
        "images": 4,
        "groups": 3,
        "accuracy": 0.25,
        "precision": 1.0,
        "confused_with": "gear",
        "confused_share": 0.5,
    }
    assert rows[1]["accuracy"] == 1 and rows[1]["precision"] == pytest.approx(2 / 3) and rows[1]["confused_with"] == ""
    assert rows[2]["accuracy"] is None and rows[2]["precision"] == rows[2]["confused_share"] == 0
    unseen = class_table(torch.tensor([0, 1]), torch.tensor([0, 0]), ("a", "b"), ("bolt", "nut"))[1]
    assert unseen["precision"] is None and unseen["accuracy"] == 0
    assert confusion(labels, predicted, 3).tolist() == [[1, 1, 2], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("ties", [False, True])
def test_replicates_equal_the_metrics_of_repeated_rows(ties):
    id_scores, ood_scores = draw(5, 40, 0.7, ties), draw(6, 25, 0.0, ties)
    generator = torch.Generator().manual_seed(0)
    id_weights = torch.randint(0, 4, (150, 40), generator=generator).float()
    ood_weights = torch.randint(0, 3, (150, 25), generator=generator).float()
    found = ood_replicates(id_scores, ood_scores, id_weights, ood_weights)
    assert set(found) == set(OOD_METRICS) and all(len(values) == 150 for values in found.values())
    for resample in (0, 1, 127, 128, 149):
        expected = ood_metrics(
            id_scores.repeat_interleave(id_weights[resample].long()),
            ood_scores.repeat_interleave(ood_weights[resample].long()),
        )
        for name in OOD_METRICS:
            assert float(found[name][resample]) == pytest.approx(expected[name], abs=1e-12), name


def test_accuracy_replicates_equal_the_accuracies_of_repeated_rows():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (50,), generator=generator)
    predicted = torch.where(torch.rand(50, generator=generator) < 0.6, labels, (labels + 1) % 4)
    weights = torch.randint(0, 3, (20, 50), generator=generator).float()
    weights[3, labels == 2] = 0  # a class that a resample leaves out
    correct = predicted == labels
    means = mean_replicates(correct, weights)
    macros = macro_accuracy_replicates(correct, labels, 4, weights)
    for resample, counts in enumerate(weights.long()):
        y, p = labels.repeat_interleave(counts), predicted.repeat_interleave(counts)
        assert float(means[resample]) == pytest.approx(float((y == p).double().mean()))
        assert float(macros[resample]) == pytest.approx(macro_accuracy(y, p))
