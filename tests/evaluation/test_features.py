"""Frozen features: batching, the neighbors' vote, alignment and uniformity against all pairs."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize, pdist

from modules.errors import NonFinite
from modules.evaluation.features import (
    KNN_TEMPERATURE,
    alignment,
    embed_images,
    knn_accuracy,
    knn_predict,
    uniformity,
)


def test_batches_keep_the_order_and_the_remainder():
    images = torch.arange(7 * 2 * 2 * 3, dtype=torch.uint8).view(7, 2, 2, 3)
    seen, steps = [], []

    def embed(batch):
        seen.append(len(batch))
        return batch.flatten(1).double().requires_grad_()

    features = embed_images(embed, images, batch_size=3, progress=lambda done, total, note: steps.append((done, total)))
    assert seen == [3, 3, 1] and steps == [(3, 7), (6, 7), (7, 7)]
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, images.flatten(1).float())


def test_a_diverged_encoder_is_named():
    with pytest.raises(NonFinite, match="1 of 3 images are not finite .first: image 1"):
        embed_images(lambda images: torch.tensor([[0.0], [float("nan")], [1.0]]), torch.zeros(3, 1, 1, 3))
    with pytest.raises(ValueError, match="holds no image"):
        embed_images(lambda images: images, torch.zeros(0, 1, 1, 3))


def test_neighbors_vote_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(60, 8, generator=generator), torch.arange(60) % 4
    queries = torch.randn(50, 8, generator=generator)
    oracle = KNeighborsClassifier(
        15, algorithm="brute", metric="cosine", weights=lambda distance: __import__("numpy").exp((1 - distance) / 0.07)
    ).fit(train.numpy(), labels.numpy())
    assert KNN_TEMPERATURE == 0.07
    assert knn_predict(train, labels, queries, 4).tolist() == oracle.predict(queries.numpy()).tolist()


def test_a_rare_class_is_not_outvoted():
    # one image of class 1 lies on the query; twenty of class 0 lie opposite
    train = torch.cat([-torch.ones(20, 3), torch.ones(1, 3)])
    labels = torch.tensor([0] * 20 + [1])
    assert knn_accuracy(train, labels, torch.ones(2, 3), torch.tensor([1, 0]), 2) == 0.5


def test_alignment_is_the_mean_over_all_pairs_of_a_class():
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 1])
    unit = normalize(features.double(), dim=1)
    pairs = [
        float((unit[i] - unit[j]).square().sum())
        for i in range(9)
        for j in range(9)
        if i != j and labels[i] == labels[j]
    ]
    assert alignment(features, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert alignment(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)) == pytest.approx(0, abs=1e-12)
    assert alignment(features[:2], torch.tensor([0, 1])) != alignment(features[:2], torch.tensor([0, 1]))  # nan


def test_uniformity_is_the_log_mean_potential_of_all_pairs():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    oracle = pdist(normalize(features.double(), dim=1)).square().mul(-2).exp().mean().log()
    assert uniformity(features) == pytest.approx(float(oracle), abs=1e-10)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)


def test_features_without_a_direction_have_neither_alignment_nor_uniformity():
    features = torch.nn.functional.pad(torch.zeros(1, 3), (0, 0, 0, 4), value=1.0)
    assert math.isnan(uniformity(features)) and math.isnan(alignment(features, torch.zeros(5)))
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8, abs=1e-9)
