"""Suitability: figures by hand, copies and collapsed recipes show, only pairs that occur have a row."""

import pytest
import torch

from modules.diffusion.suitability import Judged, judge_images, suitability
from modules.runtime import stream

CLASSES = ("bolt", "gear")
REAL = torch.tensor([[0.0, 0], [3, 4], [6, 8], [0, 0], [0, 2]])  # pairs of bolt: 5, 10, 5; of gear: 2
REAL_LABELS = [0, 0, 0, 1, 1]


def judged(features, predicted):
    return Judged(torch.as_tensor(features).float(), torch.as_tensor(predicted))


def table_of(features, predicted, labels, recipes, sources):
    real = judged(REAL, [0, 0, 1, 1, 1])
    rows = suitability(judged(features, predicted), labels, recipes, sources, real, REAL_LABELS, CLASSES)
    return {(row["recipe"], row["class"]): row for row in rows}


def test_every_figure_by_hand():
    table = table_of(
        features=[[0, 1], [3, 4], [3, 8], [0, 3], [1, 0]],
        predicted=[0, 0, 1, 1, 0],
        labels=[0, 0, 0, 1, 1],
        recipes=["positive"] * 4 + ["token_mix"],
        sources=[0, 1, 1, 4, 3],
    )
    assert list(table) == [
        ("positive", "bolt"),
        ("positive", "gear"),
        ("token_mix", "gear"),
        ("positive", "all"),
        ("token_mix", "all"),
    ]
    bolt = table["positive", "bolt"]
    assert bolt["images"] == 3
    assert bolt["agreement"] == pytest.approx(2 / 3) and bolt["real_agreement"] == pytest.approx(2 / 3)
    assert bolt["agreement_share"] == pytest.approx(1)
    pairs = sorted([18**0.5, 58**0.5, 4])  # (0,1)-(3,4), (0,1)-(3,8), (3,4)-(3,8)
    assert bolt["diversity"] == pytest.approx(pairs[1]) and bolt["real_diversity"] == pytest.approx(5)
    assert bolt["diversity_share"] == pytest.approx(pairs[1] / 5)
    assert bolt["distance"] == pytest.approx(1) and bolt["distance_share"] == pytest.approx(1 / 5)  # 1, 0, 4

    gear = table["positive", "gear"]
    assert gear["images"] == 1 and gear["diversity"] is None and gear["diversity_share"] is None
    assert gear["distance_share"] == pytest.approx(1 / 2)

    everything = table["positive", "all"]
    assert everything["images"] == 4
    assert everything["agreement"] == pytest.approx(3 / 4) and everything["real_agreement"] == pytest.approx(4 / 5)
    assert everything["diversity"] == pytest.approx(pairs[1])  # only pairs within a class
    assert everything["distance"] == pytest.approx(1)  # 1, 0, 4, 1
    assert everything["distance_share"] == pytest.approx((0.2 + 0.5) / 2)  # .2, 0, .8, .5
    assert table["token_mix", "all"]["real_agreement"] == 1  # of gear alone, the class that occurs


def test_copies_have_no_distance_and_a_collapsed_recipe_no_diversity():
    copies = table_of(REAL[:3], [0, 0, 0], [0, 0, 0], ["positive"] * 3, [0, 1, 2])["positive", "all"]
    assert copies["distance"] == copies["distance_share"] == 0 and copies["diversity_share"] == pytest.approx(1)
    same = table_of(torch.ones(3, 2), [0, 0, 0], [0, 0, 0], ["strength"] * 3, [0, 1, 2])["strength", "all"]
    assert same["diversity"] == same["diversity_share"] == 0 and same["distance"] > 0


def test_a_class_whose_real_images_coincide_has_no_shares():
    real = judged(torch.zeros(2, 2), [1, 1])
    (row, total) = suitability(judged([[1.0, 0]], [0]), [0], ["positive"], [1], real, [0, 0], ["bolt"])
    assert row["distance"] == 1 and row["distance_share"] is None and row["diversity_share"] is None
    assert row["agreement"] == 1 and row["agreement_share"] is None
    assert total["class"] == "all"


def test_an_image_whose_label_is_not_its_sources_is_refused():
    with pytest.raises(ValueError, match="sources_N"):
        table_of([[0, 0]], [0], [0], ["positive"], [4])


def test_lengths_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"lengths \(1, 1, 2, 1\)"):
        table_of([[0, 0]], [0], [0], ["positive"] * 2, [0])


def test_the_judge_sees_every_image_once_in_batches():
    images = torch.randint(0, 256, (7, 4, 4, 3), dtype=torch.uint8, generator=stream(0, "judge"))
    sizes = []

    def judge(rows):
        sizes.append(len(rows))
        flat = rows.flatten(1).double()
        return flat, flat.sum(1).long() % 5

    found = judge_images(judge, images, batch_size=3)
    assert sizes == [3, 3, 1] and len(found) == 7
    assert torch.equal(found.features_NF, images.flatten(1).float())
    assert torch.equal(found.predicted_N, images.flatten(1).long().sum(1) % 5)


def test_wrong_images_and_a_judge_that_drops_rows_are_refused():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images_NHWC: \(2, 3, 4, 4\)"):
        judge_images(None, images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="float32"):
        judge_images(None, images.float())
    with pytest.raises(ValueError, match="expected one row each"):
        judge_images(lambda rows: (torch.zeros(1, 2), torch.zeros(1)), images)
