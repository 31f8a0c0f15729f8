"""Intervals from a bootstrap over groups, combined with the error of the mean over seeds if there are several.

Photographs of one object, or renders of one model, are not independent: resampling images would give intervals that are
too narrow by up to the square root of the group size. So whole groups are drawn with replacement, and in a comparison
the error of the mean over a few seeds, by Student's t, is added to every resample. Two arms are compared on the same
draws (paired), which removes the variation of the test groups that the arms share. Both counts, of groups and of seeds,
should be given with every interval.

Shapes: Q resamples, D images, K seeds.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from modules import config
from modules.errors import DataError
from modules.evaluation.replicates import macro_accuracy_replicates, mean_replicates, ood_replicates
from modules.evaluation.stored import ROLES, Predictions
from modules.runtime import stream

STRATUM = 256  # draws of t per value that is kept
MIN_GROUPS = 5  # fewer give at most 35 different resamples, too few for percentiles


def check_groups(groups: Mapping[str, Sequence[str]], resamples: int) -> None:
    """Raise DataError naming every set (name -> group of each image) that has too few groups for an interval.

    Call it before training: an error during evaluation would come after the run has been paid for. With `resamples` 0
    no set is too small.
    """
    few = {name: len(set(members)) for name, members in groups.items() if len(set(members)) < MIN_GROUPS}
    if few and resamples > 0:
        named = ", ".join(f"{name} has {count}" for name, count in few.items())
        raise DataError(
            f"too few groups for an interval: {named}, at least {MIN_GROUPS} are needed; add groups (objects, samples), "
            "leave the group column empty if the images are independent, or set evaluation.bootstrap=0 for no intervals"
        )


def group_weights(groups: Sequence[str], resamples: int, *, seed: int, name: str) -> Tensor:
    """weights_QD (float32 counts): how often each image occurs in each resample.

    Each resample draws as many groups as there are, with replacement, from stream(seed, "bootstrap", name); an image's
    weight is the number of times its group was drawn. Groups are numbered in sorted order, so that the weights do not
    depend on the order of the images.
    """
    names = sorted(set(groups))
    number = {group: index for index, group in enumerate(names)}
    drawn_QG = torch.randint(len(names), (resamples, len(names)), generator=stream(seed, "bootstrap", name))
    counts_QG = torch.zeros(resamples, len(names)).scatter_add_(1, drawn_QG, torch.ones(resamples, len(names)))
    return counts_QG[:, torch.tensor([number[group] for group in groups])]


@cache
def student_draws(seeds: int, resamples: int, *, seed: int) -> Tensor:
    """float64 [Q]: Q = `resamples` equally likely values of Student's t with `seeds` - 1 degrees of freedom, shuffled.

    The values are the middles of Q strata, made symmetric about 0. With independent draws, the heavy tails would move
    the ends of an interval by a tenth of its width. All values are 0 for one seed, which shows no spread.
    """
    if seeds < 2:
        return torch.zeros(resamples, dtype=torch.float64)
    source = stream(seed, "bootstrap", "seeds")
    normal_NK = torch.randn(resamples * STRATUM, seeds, generator=source, dtype=torch.float64)
    t_N = normal_NK[:, 0] / normal_NK[:, 1:].square().mean(dim=1).sqrt()
    t_Q = t_N.sort().values[STRATUM // 2 :: STRATUM]
    return ((t_Q - t_Q.flip(0)) / 2)[torch.randperm(resamples, generator=source)]


def over_seeds(replicates_KQ: Tensor, value_K: Tensor, t_Q: Tensor) -> Tensor:
    """Replicates [Q] of a metric's mean over seeds: its mean under each resample of groups, plus t sd(value) / sqrt(K).

    Resampling the seeds as well could not leave the range of the K values at hand: if seeds differ more than groups, 95
    % intervals from 3 seeds would cover the truth in 75 % of cases. With Student's t they cover it in 95 %.
    """
    if len(value_K) < 2:
        return replicates_KQ[0].double()
    return replicates_KQ.double().mean(dim=0) + value_K.double().std() / len(value_K) ** 0.5 * t_Q


def percentile_interval(replicates_Q: Tensor, confidence: float) -> tuple[float, float]:
    """(low, high): the quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of replicates_Q, 0 < confidence < 1."""
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(replicates_Q.double(), bounds).tolist()
    return low, high


def role_weights(predictions: Predictions, resamples: int, *, seed: int) -> dict[str, Tensor]:
    """role -> group_weights of its images, for the roles that occur: ID and OOD groups are resampled independently."""
    rows = {role: predictions.rows(role).tolist() for role in ROLES}
    return {
        role: group_weights([predictions.groups[row] for row in members], resamples, seed=seed, name=role)
        for role, members in rows.items()
        if members
    }


def metric_replicates(predictions: Predictions, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """results key -> float64 [Q]: every test metric that is a function of per-image rows, under each resample.

    `weights` are those of role_weights for the same images in the same order; each resample is used for all metrics.
    """
    id_D = predictions.rows("id")
    logits_DC, labels_D = predictions.logits_DC.double(), predictions.labels_D[id_D]
    confidence_D, predicted_D = logits_DC.softmax(dim=1).max(dim=1)
    correct_D = predicted_D[id_D] == labels_D
    found = {
        "test.accuracy": mean_replicates(correct_D, weights["id"]),
        "test.macro_accuracy": macro_accuracy_replicates(correct_D, labels_D, logits_DC.shape[1], weights["id"]),
        "test.knn_accuracy": mean_replicates(predictions.knn_D[id_D] == labels_D, weights["id"]),
        "test.mean_max_softmax_id": mean_replicates(confidence_D[id_D], weights["id"]),
    }
    for role in weights:
        if role == "id":
            continue
        rows_D = predictions.rows(role)
        found[f"test.{role}.mean_max_softmax"] = mean_replicates(confidence_D[rows_D], weights[role])
        for name, values_D in predictions.scores.items():
            replicates = ood_replicates(values_D[id_D], values_D[rows_D], weights["id"], weights[role])
            found |= {f"test.{role}.{name}.{metric}": values_Q for metric, values_Q in replicates.items()}
    return found


def bootstrap_intervals(predictions: Predictions, evaluation: config.Evaluation, seed: int) -> dict[str, float]:
    """`<key>_low` and `<key>_high` for the keys of metric_replicates, at evaluation.confidence.

    A key has no interval if all its resamples are equal (every image right): they then say nothing about further
    groups.
    """
    found: dict[str, float] = {}
    weights = role_weights(predictions, evaluation.bootstrap, seed=seed)
    for key, replicates_Q in metric_replicates(predictions, weights).items():
        if len(replicates_Q) and bool((replicates_Q != replicates_Q[0]).any()):
            found[f"{key}_low"], found[f"{key}_high"] = percentile_interval(replicates_Q, evaluation.confidence)
    return found
