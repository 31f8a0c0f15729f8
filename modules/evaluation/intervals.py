"""Intervals from a bootstrap over groups, and over seeds where there are several.

Photographs of one object, or renders of one model, are not independent: resampling images would give intervals that
are too narrow by the square root of the images a group holds. So whole groups are drawn with replacement, and in a
comparison seeds are drawn jointly with them. Two arms are compared on the same draws (paired), which removes what the
test groups have in common from the difference. Both numbers, groups and seeds, belong beside every interval.

Shapes: Q resamples, D images, K seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.errors import DataError
from modules.runtime import stream

MIN_GROUPS = 5  # fewer give at most 35 different resamples: no percentile of those is an interval


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval and what it rests on."""

    value: float
    low: float
    high: float
    groups: int  # smallest number of groups among the sets that enter
    seeds: int

    def excludes(self, reference: float) -> bool:
        """Whether `reference` lies outside [low, high]."""
        return not self.low <= reference <= self.high


def check_groups(groups: Mapping[str, Sequence[str]], resamples: int) -> None:
    """Raises DataError naming every set (name -> group of each image) too small for an interval.

    To be asked before training, not after: an evaluation that ends in an error has cost the run. No set is too small
    where `resamples` is 0.
    """
    few = {name: len(set(members)) for name, members in groups.items() if len(set(members)) < MIN_GROUPS}
    if few and resamples > 0:
        named = ", ".join(f"{name} has {count}" for name, count in few.items())
        raise DataError(
            f"too few groups for an interval: {named}, at least {MIN_GROUPS} are needed; add groups (objects, samples), "
            "leave the group column empty if the images are independent, or set evaluation.bootstrap=0 for no intervals"
        )


def group_weights(groups: Sequence[str], resamples: int, *, seed: int, name: str) -> Tensor:
    """How often each image stands in each resample: weights_QD, float32 counts.

    Each resample draws as many groups as there are, with replacement, from stream(seed, "bootstrap", name); an
    image's weight is the number of times its group was drawn. Groups are numbered in sorted order, so that the weights
    do not depend on the order of the images.
    """
    names = sorted(set(groups))
    number = {group: index for index, group in enumerate(names)}
    drawn_QG = torch.randint(len(names), (resamples, len(names)), generator=stream(seed, "bootstrap", name))
    counts_QG = torch.zeros(resamples, len(names)).scatter_add_(1, drawn_QG, torch.ones(resamples, len(names)))
    return counts_QG[:, torch.tensor([number[group] for group in groups])]


def seed_draws(seeds: int, resamples: int, *, seed: int) -> Tensor:
    """Positions of the seeds drawn in each resample, with replacement: int64 [Q, K]; all 0 for one seed."""
    return torch.randint(seeds, (resamples, seeds), generator=stream(seed, "bootstrap", "seeds"))


def over_seeds(replicates_KQ: Tensor, draws_QK: Tensor) -> Tensor:
    """Mean over the drawn seeds of the metric's replicates, [Q]: groups and seeds are resampled jointly."""
    return replicates_KQ.T.gather(1, draws_QK).mean(dim=1)


def percentile_interval(
    value: float, replicates_Q: Tensor, confidence: float, *, groups: int, seeds: int = 1
) -> Interval:
    """The central `confidence` share of replicates_Q about `value`: quantiles (1 -+ confidence) / 2.

    `confidence` in (0, 1). The interval need not be symmetric; `value` is the metric on the images as they are.
    """
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(replicates_Q.double(), bounds).tolist()
    return Interval(value, low, high, groups, seeds)
