"""The metrics on all bootstrap resamples at once.

A resample repeats row i of the test set w_i times, so each metric is a function of integer row weights, and a score has
to be sorted only once for all resamples. Intervals need 1,000 resamples of five metrics for each of eight scores:
40,000 calls of scikit-learn, minutes on a CPU core. Here they are cumulative sums, a few seconds in all. Each function
is tested to equal scikit-learn on rows that are physically repeated.

Shapes: Q resamples, D images, C classes, T thresholds.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from modules.evaluation.metrics import OOD_METRICS

RESAMPLE_BLOCK = 128  # resamples whose curves are held at once: 128 x 10,000 float64 are 10 MB per array


def mean_replicates(values_D: Tensor, weights_QD: Tensor) -> Tensor:
    """The weighted mean of values_D under each resample, float64 [Q]: accuracy from hits, mean confidence and so on."""
    weights_QD = weights_QD.double()
    return weights_QD @ values_D.double() / weights_QD.sum(dim=1)


def macro_accuracy_replicates(correct_D: Tensor, labels_D: Tensor, num_classes: int, weights_QD: Tensor) -> Tensor:
    """The mean accuracy over the classes that occur in each resample, float64 [Q]."""
    member_DC = one_hot(labels_D, num_classes).double()
    weights_QD = weights_QD.double()
    total_QC = weights_QD @ member_DC
    share_QC = (weights_QD @ (member_DC * correct_D.double()[:, None])) / total_QC.clamp(min=1)
    return share_QC.sum(dim=1) / (total_QC > 0).sum(dim=1)


def ood_replicates(
    id_scores_D: Tensor, ood_scores_D: Tensor, id_weights_QD: Tensor, ood_weights_QD: Tensor
) -> dict[str, Tensor]:
    """metric name -> float64 [Q]: metrics.ood_metrics under each resample.

    Scores are confidences (higher is more in-distribution); weights are non-negative counts with a positive sum in
    every row.
    """
    scores_D = torch.cat([id_scores_D, ood_scores_D]).double()
    order_D = scores_D.argsort(descending=True)
    ends_T = _tie_ends(scores_D[order_D])
    starts_T = _tie_ends(scores_D[order_D].flip(0))
    num_id = len(id_scores_D)
    blocks = []
    for id_weights_qD, ood_weights_qD in zip(
        id_weights_QD.split(RESAMPLE_BLOCK), ood_weights_QD.split(RESAMPLE_BLOCK), strict=True
    ):
        weights_qD = torch.cat([id_weights_qD, ood_weights_qD], dim=1).double()[:, order_D]
        is_id_D = order_D < num_id
        id_qD, ood_qD = weights_qD * is_id_D, weights_qD * ~is_id_D
        # ID is accepted from the highest score down; OOD is detected from the lowest score up
        id_curve = (id_qD.cumsum(dim=1)[:, ends_T], ood_qD.cumsum(dim=1)[:, ends_T])
        ood_curve = (ood_qD.flip(1).cumsum(dim=1)[:, starts_T], id_qD.flip(1).cumsum(dim=1)[:, starts_T])
        blocks.append(
            torch.stack(
                [  # in the order of OOD_METRICS
                    _area(*id_curve),
                    _precision_area(*id_curve),
                    _precision_area(*ood_curve),
                    _fpr(*id_curve),
                    _fpr(*ood_curve),
                ]
            )
        )
    return dict(zip(OOD_METRICS, torch.cat(blocks, dim=1), strict=True))


def _tie_ends(sorted_D: Tensor) -> Tensor:
    """The position of the last value of each run of equal values: thresholds can only lie there."""
    last_D = torch.ones(len(sorted_D), dtype=torch.bool)
    last_D[:-1] = sorted_D[1:] != sorted_D[:-1]
    return last_D.nonzero()[:, 0]


def _area(positives_QT: Tensor, negatives_QT: Tensor) -> Tensor:
    """The area under the ROC curve from cumulative weights, trapezoidal (ties count half)."""
    tpr_QT, fpr_QT = positives_QT / positives_QT[:, -1:], negatives_QT / negatives_QT[:, -1:]
    return _trapezoid(_prepend(fpr_QT, 0.0), _prepend(tpr_QT, 0.0))


def _precision_area(positives_QT: Tensor, negatives_QT: Tensor) -> Tensor:
    """The area under the precision-recall curve; precision is 1 until a row is accepted, as in scikit-learn."""
    accepted_QT = positives_QT + negatives_QT
    precision_QT = torch.where(accepted_QT > 0, positives_QT / accepted_QT.clamp(min=1), 1.0)
    return _trapezoid(_prepend(positives_QT / positives_QT[:, -1:], 0.0), _prepend(precision_QT, 1.0))


def _fpr(positives_QT: Tensor, negatives_QT: Tensor) -> Tensor:
    """The false-positive rate at the first threshold whose true-positive rate is at least .95."""
    reached_QT = positives_QT / positives_QT[:, -1:] >= 0.95
    first_Q1 = reached_QT.to(torch.uint8).argmax(dim=1, keepdim=True)
    return (negatives_QT / negatives_QT[:, -1:]).gather(1, first_Q1)[:, 0]


def _prepend(curve_QT: Tensor, value: float) -> Tensor:
    return torch.cat([torch.full_like(curve_QT[:, :1], value), curve_QT], dim=1)


def _trapezoid(x_QT: Tensor, y_QT: Tensor) -> Tensor:
    return torch.trapezoid(y_QT, x_QT, dim=1)
