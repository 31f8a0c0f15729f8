"""OOD scores: each against an independent definition, their common direction, and the float64 promise."""

import numpy as np
import pytest
import torch
from pytorch_ood.detector import KNN, RMD, EnergyBased, Mahalanobis, MaxLogit, MaxSoftmax
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from torch.nn.functional import normalize

from modules import config
from modules.errors import ConfigError, DataError
from modules.evaluation import metrics
from modules.evaluation.ood import (
    SCORES,
    Fitting,
    acceptance_threshold,
    apply_scores,
    check_score_name,
    fit_scores,
    head_source,
    neighbor_count,
)
from modules.evaluation.probe import train_binary_head, train_probe
from modules.ranges import CHOICES
from tests.evaluation.examples import clusters, sets


@pytest.fixture(scope="module")
def fitted():
    given = sets(spread=0.7)
    train, val = given["train"], given["val"]
    settings = config.Probe(lrs=(0.1,), epochs=10)
    probe = train_probe(
        train.features_DF, train.labels_D, val.features_DF, val.labels_D, num_classes=4, settings=settings, seed=0
    )
    near = given["near_ood_val"].features_DF
    head = train_binary_head(train.features_DF, near, val.features_DF, near, settings=settings, seed=0)
    states = fit_scores(Fitting(train.features_DF, train.labels_D, head))
    queries = torch.cat([given["test"].features_DF, given["near_ood_test"].features_DF])
    return given, states, queries, probe.logits(queries), apply_scores(states, queries, probe.logits(queries))


def scored_like_training(given, states):
    return SCORES["binary"].score(states["binary"], given["near_ood_val"].features_DF, torch.zeros(0))


def test_all_point_the_same_way_and_are_float64(fitted):
    given, states, _, _, scores = fitted
    assert set(scores) == set(SCORES)
    for name, values in scores.items():
        assert values.dtype == torch.float64, name
        # the binary head knows only the OOD classes it was trained on; the others need not have seen any
        others = values[len(given["test"]) :] if name != "binary" else scored_like_training(given, states)
        assert metrics.ood_metrics(values[: len(given["test"])], others)["auroc"] > 0.8, name


def test_agree_with_pytorch_ood_where_it_has_the_score(fitted):
    given, _, queries, logits, scores = fitted
    train = given["train"]
    unit, unit_queries = normalize(train.features_DF, dim=1), normalize(queries, dim=1)
    k = neighbor_count(train.labels_D)
    assert k == 2
    distance = KNN(None, k=k, normalize=True).fit_features(unit, train.labels_D).predict_features(unit_queries)
    for name, theirs in {
        "msp": MaxSoftmax.score(logits),
        "max_logit": MaxLogit.score(logits),
        "energy": EnergyBased.score(logits),
        "knn": distance.square() / 2 - 1,
    }.items():
        torch.testing.assert_close(scores[name], -theirs.double(), atol=1e-5, rtol=1e-5, msg=name)


def test_mahalanobis_is_that_of_scipy_with_scikit_learns_covariance(fitted):
    given, _, queries, _, scores = fitted
    train = given["train"]
    unit = normalize(train.features_DF.double(), dim=1).numpy()
    labels = train.labels_D.numpy()
    means = np.stack([unit[labels == label].mean(0) for label in range(4)])
    shared = np.linalg.inv(LedoitWolf(assume_centered=True).fit(unit - means[labels]).covariance_)
    center = unit.mean(0)
    background = np.linalg.inv(LedoitWolf().fit(unit).covariance_)
    for row in (0, 20, 60):
        z = normalize(queries[row].double(), dim=0).numpy()
        nearest = min(mahalanobis(z, mean, shared) ** 2 for mean in means)
        assert float(scores["mahalanobis"][row]) == pytest.approx(-nearest, rel=1e-6)
        relative = nearest - mahalanobis(z, center, background) ** 2
        assert float(scores["relative_mahalanobis"][row]) == pytest.approx(-relative, rel=1e-6, abs=1e-6)


def test_mahalanobis_orders_as_pytorch_ood_where_images_abound():
    """With thousands of images shrinkage vanishes, and the plain estimators of pytorch-ood order the same way."""
    train, test, near = (
        clusters(*which, spread=0.7)
        for which in (("many", range(4), 600), ("t", range(4), 40), ("o", range(20, 23), 40))
    )
    unit, queries = normalize(train.features_DF, dim=1), torch.cat([test.features_DF, near.features_DF])
    states = fit_scores(Fitting(train.features_DF, train.labels_D))
    ours = apply_scores(states, queries, torch.zeros(len(queries), 4))
    for name, detector in {"mahalanobis": Mahalanobis(None), "relative_mahalanobis": RMD(None)}.items():
        theirs = -detector.fit_features(unit, train.labels_D).predict_features(normalize(queries, dim=1))
        order = torch.corrcoef(torch.stack([ours[name].argsort().argsort(), theirs.argsort().argsort()]).double())
        assert float(order[0, 1]) > 0.98, name


def test_cosine_and_binary_by_hand(fitted):
    given, states, queries, _, scores = fitted
    train, unit = given["train"], normalize(queries.double(), dim=1)
    means = [normalize(train.features_DF[train.labels_D == c].double(), dim=1).mean(0) for c in range(4)]
    expected = torch.stack([unit @ (mean / mean.norm()) for mean in means]).max(0).values
    torch.testing.assert_close(scores["cosine"], expected)
    weight, bias = states["binary"]["weight_F2"], states["binary"]["bias_2"]
    probability = torch.softmax(queries.double() @ weight + bias, 1)
    torch.testing.assert_close(scores["binary"], (probability[:, 1] / probability[:, 0]).log())


def test_mahalanobis_stays_above_chance_with_few_images_in_many_dimensions():
    options = {"width": 256, "spread": 1.0}
    train, test = clusters("few", range(8), 4, **options), clusters("test", range(8), 20, **options)
    near = clusters("near", range(20, 28), 20, **options)
    states = fit_scores(Fitting(train.features_DF, train.labels_D))
    logits = torch.zeros(160, 8)
    for name in ("mahalanobis", "relative_mahalanobis", "knn", "cosine"):
        id_scores, ood_scores = (SCORES[name].score(states[name], x.features_DF, logits) for x in (test, near))
        assert metrics.ood_metrics(id_scores, ood_scores)["auroc"] > 0.8, name
    assert all(value.dtype == torch.float64 for value in states["mahalanobis"].values())


def test_a_collapsed_encoder_still_gets_finite_scores():
    constant = torch.ones(20, 6)
    states = fit_scores(Fitting(constant, torch.arange(20) % 4))
    scores = apply_scores(states, constant[:3], torch.zeros(3, 4))
    assert all(torch.isfinite(values).all() for values in scores.values())


@pytest.mark.parametrize(("smallest", "k"), [(1, 1), (9, 1), (16, 1), (39, 3), (500, 50), (5000, 50)])
def test_neighbor_count(smallest, k):
    assert neighbor_count(torch.cat([torch.zeros(smallest), torch.ones(smallest + 700)]).long()) == k


def test_msp_does_not_tie_where_float32_would():
    logits = torch.tensor([[40.0, 0.0], [30.0, 0.0]])
    scores = SCORES["msp"].score({}, torch.zeros(2, 1), logits)
    assert float(logits.softmax(1)[0, 0]) == float(logits.softmax(1)[1, 0]) == 1
    assert float(scores[0]) > float(scores[1])


@pytest.mark.parametrize("count", [1, 7, 19, 20, 21, 100, 461])
def test_threshold_accepts_at_least_95_percent_and_is_the_largest_to(count):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    threshold = acceptance_threshold(scores)
    accepted = float((scores >= threshold).double().mean())
    assert accepted >= 0.95
    assert float((scores > threshold).double().mean()) < 0.95


@pytest.mark.parametrize(
    ("generated", "groups", "source"),
    [
        (0, "", "none"),
        (0, "aaa", "none"),  # one group cannot both train the head and choose it
        (0, "aab", "near_ood_val"),
        (1, "", "none"),
        (1, "a", "generated"),
        (2, "", "generated"),
        (5, "ab", "generated"),
    ],
)
def test_what_the_binary_head_learns_from(generated, groups, source):
    assert head_source(generated, groups) == source


def test_unusable_scores_and_classes_are_refused():
    assert CHOICES["evaluation.score"] == tuple(SCORES), "no other is let through by the rules of settings"
    with pytest.raises(ConfigError, match="binary needs OOD rows"):
        check_score_name("binary", with_head=False)
    check_score_name("binary", with_head=True)
    with pytest.raises(DataError, match="class id 1 has no training image"):
        fit_scores(Fitting(torch.randn(4, 3), torch.tensor([0, 2, 2, 0])))
