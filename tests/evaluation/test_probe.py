"""The linear probe: gradient against autograd, choice on val, determinism, weights."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from modules import config
from modules.errors import DataError, NonFinite
from modules.evaluation.probe import train_binary_head, train_probe
from modules.runtime import stream
from tests.evaluation.examples import sets

SETTINGS = config.Probe(lrs=(0.01, 0.1), epochs=10, batch_size=32)


def fit(given, settings=SETTINGS, **options):
    train, val = given["train"], given["val"]
    return train_probe(
        train.features_DF,
        train.labels_D,
        val.features_DF,
        val.labels_D,
        num_classes=4,
        settings=settings,
        seed=3,
        **options,
    )


def test_equals_autograd_and_torch_sgd():
    given = sets(spread=0.7)
    x, y = given["train"].features_DF, given["train"].labels_D
    settings = config.Probe(lrs=(0.05,), epochs=4, batch_size=40, weight_decay=0.01)
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(0)) + 0.5
    found = fit(given, settings, weights_D=weights)

    mean, sd = x.mean(0), x.std(0, correction=0)
    weight, bias = torch.zeros(16, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}], lr=0.05, momentum=0.9)
    steps, step = settings.epochs * math.ceil(len(x) / 40), 0
    for epoch in range(settings.epochs):
        for rows in torch.randperm(len(x), generator=stream(3, "probe", epoch)).split(40):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
            losses = cross_entropy((x[rows] - mean) / sd @ weight + bias, y[rows], reduction="none")
            loss = (losses * weights[rows] / weights.mean()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    expected = (given["val"].features_DF - mean) / sd @ weight + bias
    torch.testing.assert_close(found.logits(given["val"].features_DF), expected.detach(), atol=2e-5, rtol=1e-5)


def test_a_pure_function_of_the_seed_that_leaves_torch_alone():
    given = sets(spread=0.7)
    before = torch.random.get_rng_state()
    first, second = fit(given), fit(given)
    assert torch.equal(first.weight_FC, second.weight_FC) and torch.equal(first.bias_C, second.bias_C)
    assert torch.equal(before, torch.random.get_rng_state())


def test_rates_trained_together_equal_rates_trained_alone():
    given = sets(spread=0.7)
    together = fit(given, config.Probe(lrs=(0.01, 0.3), epochs=5, batch_size=32))
    alone = fit(given, config.Probe(lrs=(together.lr,), epochs=5, batch_size=32))
    torch.testing.assert_close(together.weight_FC, alone.weight_FC, atol=1e-5, rtol=1e-5)


def test_the_rate_is_chosen_on_val_and_a_diverged_one_loses():
    found = fit(sets(spread=0.7), config.Probe(lrs=(1e38, 0.1), epochs=5, batch_size=32))
    assert found.lr == 0.1 and set(found.val_accuracy) == {1e38, 0.1}
    assert found.val_accuracy[0.1] == max(found.val_accuracy.values()) > 0.9
    with pytest.raises(NonFinite, match="every learning rate"):
        fit(sets(spread=0.7), config.Probe(lrs=(1e38,), epochs=5, batch_size=32))


def test_a_constant_feature_and_any_scale_are_harmless():
    given = sets(spread=0.7)
    scaled = {
        name: type(part)(
            torch.cat([part.features_DF * 1e4, torch.full((len(part), 1), 5.0)], dim=1),
            part.labels_D,
            part.paths,
            part.groups,
        )
        for name, part in given.items()
    }
    plain, other = fit(given), fit(scaled)
    assert plain.val_accuracy == pytest.approx(other.val_accuracy, abs=0.03)


def test_binary_head_weighs_both_sides_equally():
    generator = torch.Generator().manual_seed(0)
    # the same cloud on both sides, ten times as many ID rows: balanced log-odds stay near zero
    id_rows, ood_rows = torch.randn(2000, 2, generator=generator), torch.randn(200, 2, generator=generator)
    head = train_binary_head(id_rows, ood_rows, id_rows, ood_rows, settings=SETTINGS, seed=0)
    odds = head.logits(torch.zeros(1, 2))
    assert abs(float(odds[0, 1] - odds[0, 0])) < 0.3
    shifted = train_binary_head(id_rows + 4, ood_rows, id_rows + 4, ood_rows, settings=SETTINGS, seed=0)
    assert max(shifted.val_accuracy.values()) > 0.99
    assert float(shifted.logits(torch.full((1, 2), 4.0)).argmax()) == 1


def test_empty_sets_are_refused():
    given = sets(spread=0.7)
    train = given["train"]
    with pytest.raises(DataError, match="val split holds no image"):
        train_probe(
            train.features_DF,
            train.labels_D,
            train.features_DF[:0],
            train.labels_D[:0],
            num_classes=4,
            settings=SETTINGS,
            seed=0,
        )
    with pytest.raises(DataError, match="rows of both kinds, got 96 ID and 0 OOD"):
        x = train.features_DF
        train_binary_head(x, x[:0], x, x, settings=SETTINGS, seed=0)
