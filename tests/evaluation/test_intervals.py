"""Group bootstrap: whole groups, independent of image order, honest coverage, refusal of too few groups."""

import pytest
import torch

from modules.errors import DataError
from modules.evaluation.intervals import check_groups, group_weights, over_seeds, percentile_interval, student_draws
from modules.evaluation.replicates import mean_replicates


def test_groups_are_drawn_whole_and_as_many_as_there_are():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = group_weights(groups, 200, seed=0, name="id")
    assert weights.shape == (200, 6)
    assert torch.equal(weights[:, 0], weights[:, 2]) and torch.equal(weights[:, 1], weights[:, 4])
    assert torch.equal(weights[:, 0] + weights[:, 1] + weights[:, 3], torch.full((200,), 3.0))


def test_weights_do_not_depend_on_the_order_of_the_images():
    groups = ["a", "b", "a", "c", "d"]
    order = [3, 0, 4, 2, 1]
    plain = group_weights(groups, 50, seed=0, name="id")
    assert torch.equal(plain[:, order], group_weights([groups[row] for row in order], 50, seed=0, name="id"))
    assert not torch.equal(plain, group_weights(groups, 50, seed=1, name="id"))
    assert not torch.equal(plain, group_weights(groups, 50, seed=0, name="near_ood"))


def test_the_standard_error_is_that_of_group_means():
    """With all images of a group alike, the interval must be as wide as for one image a group, not sqrt(10) narrower."""
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(100, generator=generator) < 0.6).double()
    groups = [f"g{index}" for index in range(100) for _ in range(10)]
    replicates = mean_replicates(hits.repeat_interleave(10), group_weights(groups, 2000, seed=0, name="id"))
    p = float(hits.mean())
    expected = (p * (1 - p) / 100) ** 0.5
    assert float(replicates.std()) == pytest.approx(expected, rel=0.1)
    low, high = percentile_interval(replicates, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.12)
    assert low < p < high


def test_percentiles_are_central():
    low, high = percentile_interval(torch.arange(101), 0.9)
    assert (low, high) == pytest.approx((5, 95))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("group_sd", [0.0, 0.3])
def test_an_interval_over_few_seeds_holds_the_truth_as_often_as_it_says(seeds, group_sd):
    """Seeds redrawn with replacement would hold it in 61, 75 and 82 % of cases."""
    generator, resamples, held = torch.Generator().manual_seed(0), 1000, 0
    t = student_draws(seeds, resamples, seed=0)
    for _ in range(400):
        values = torch.randn(seeds, generator=generator) + group_sd * torch.randn((), generator=generator)
        replicates = values[:, None] + group_sd * torch.randn(resamples, generator=generator)
        low, high = percentile_interval(over_seeds(replicates, values, t), 0.95)
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.99


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_student_draws_have_the_tails_of_t(seeds, quantile):
    """97.5 % quantiles of t with K - 1 degrees of freedom (any table); both ends are equally far."""
    draws = student_draws(seeds, 1000, seed=0)
    low, high = percentile_interval(draws, 0.95)
    assert high == pytest.approx(quantile, rel=0.04) and low == pytest.approx(-high)
    assert torch.equal(draws, student_draws(seeds, 1000, seed=0)) and not torch.equal(draws, draws.sort().values)
    assert not torch.equal(draws, student_draws(seeds, 1000, seed=1))


def test_one_seed_has_the_interval_of_its_groups():
    replicates = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    found = over_seeds(replicates, torch.tensor([0.5]), student_draws(1, 100, seed=0))
    assert torch.equal(found, replicates[0].double())


def test_too_few_groups_are_named_before_anything_is_run():
    enough, few = [f"g{index}" for index in range(5)], ["a"] * 30 + ["b"]
    check_groups({"test": enough}, 1000)
    check_groups({"test": few}, 0)
    with pytest.raises(DataError, match="test has 2, far has 0, at least 5 are needed.*evaluation.bootstrap=0"):
        check_groups({"test": few, "near": enough, "far": []}, 1000)
