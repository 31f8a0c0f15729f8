"""The warning light: on where features or scores see the decoder, off where they do not."""

import pytest
import torch

from modules import config
from modules.evaluation.artifact import (
    LEAST_GROUPS,
    PROBE_LIGHT,
    artifact_doubt,
    artifact_light,
    artifact_warning,
    chance_auroc,
)
from modules.evaluation.evaluate import evaluate
from modules.evaluation.report_recipes import artifact_section
from tests.evaluation.examples import sets


@pytest.fixture(scope="module")
def detector():
    given = sets(spread=0.3)
    probe = config.Probe(lrs=(0.1,), epochs=5)
    outcome = evaluate(
        **given,
        classes=("bolt", "gear", "nut", "washer"),
        probe=probe,
        evaluation=config.Evaluation(bootstrap=0),
        seed=0,
    )
    return outcome.detector


@pytest.fixture(scope="module")
def real():
    return sets(spread=0.3)["val"]


def noise(features_DF, seed):
    return torch.randn(features_DF.shape, generator=torch.Generator().manual_seed(seed))


def test_a_trace_in_one_direction_turns_the_light_on(detector, real):
    """The trace is small beside the features' own spread, and twins differ by nothing else."""
    trace = torch.zeros(real.features_DF.shape[1])
    trace[-1] = 3 * real.features_DF[:, -1].std()
    found = artifact_light(real.features_DF, real.features_DF + trace, real.groups, detector, 0)
    assert found["artifact.probe_auroc"] > 0.9 and found["artifact.images"] == len(real)
    assert "artifact shortcut" in artifact_warning(found) or "decoder's trace" in artifact_warning(found)


def test_features_that_see_nothing_leave_it_off(detector, real):
    jitter = 1e-3 * real.features_DF.std()
    found = artifact_light(
        real.features_DF + jitter * noise(real.features_DF, 1),
        real.features_DF + jitter * noise(real.features_DF, 2),
        real.groups,
        detector,
        0,
    )
    assert found["artifact.probe_auroc"] == pytest.approx(0.5, abs=0.15)
    assert found["artifact.score_auroc"] == pytest.approx(0.5, abs=0.1)
    assert artifact_warning(found) == "" == artifact_doubt(found)


def test_decoded_images_that_score_lower_are_the_shortcut(detector, real):
    """Noise moves the twins away from every class, which is what 'decoded = OOD' would do."""
    away = 6 * real.features_DF.std() * noise(real.features_DF, 3)
    found = artifact_light(real.features_DF, real.features_DF + away, real.groups, detector, 0)
    assert found["artifact.score_auroc"] > 0.9
    assert "'decoded' counts as OOD" in artifact_warning(found)
    mirrored = artifact_light(real.features_DF + away, real.features_DF, real.groups, detector, 0)
    assert mirrored["artifact.score_auroc"] == pytest.approx(1 - found["artifact.score_auroc"])


def test_twins_and_images_of_one_group_never_stand_on_both_sides_of_the_probe(detector, real):
    """Each group's trace lies in a direction of its own: a probe that had seen the group would be right every time."""
    names = sorted(set(real.groups))
    direction = torch.eye(len(names))[[names.index(group) for group in real.groups]]
    found = artifact_light(direction, -direction, real.groups, detector, 0)
    assert found["artifact.probe_auroc"] == 0.5


def test_one_group_is_too_few_and_rows_must_match(detector, real):
    assert artifact_light(real.features_DF, real.features_DF, ["a"] * len(real), detector, 0) == {}
    assert artifact_warning({}) == "" == artifact_doubt({}) == artifact_section({})
    with pytest.raises(ValueError, match="expected a row each of every image"):
        artifact_light(real.features_DF, real.features_DF[1:], real.groups, detector, 0)


def test_the_interval_of_blind_features_is_that_of_drawn_ones():
    """The share of blind AUROCs above the interval is 2.5 %; at the least number it ends just below the light."""
    draw = torch.Generator().manual_seed(0)
    for groups in (LEAST_GROUPS, 40):
        real, decoded = torch.randn(2, 4000, groups, generator=draw)
        aurocs = (real[:, :, None] > decoded[:, None, :]).double().mean(dim=(1, 2))
        assert 0.015 < float((aurocs > chance_auroc(groups)).double().mean()) < 0.035
    assert chance_auroc(LEAST_GROUPS) < PROBE_LIGHT <= chance_auroc(LEAST_GROUPS - 1)


def figures(probe: float, score: float, groups: int) -> dict:
    values = {"probe_auroc": probe, "score_auroc": score, "images": 2 * groups, "groups": groups}
    return {f"artifact.{name}": value for name, value in values.items()} | {"headline.score": "knn"}


@pytest.mark.parametrize(
    ("probe", "score", "groups", "warning", "doubt"),
    [
        (1.0, 1.0, 4, "", "told from val images of 4 groups: with so few, chance alone takes an AUROC to 0.92"),
        (0.5, 0.5, 4, "", "cannot be told"),  # dark, but that is no news either
        (1.0, 1.0, 2, "", "takes an AUROC to 1.00"),
        (0.6, 0.62, 20, "", "of 20 groups: with so few, chance alone takes an AUROC to 0.68"),
        (0.6, 0.62, 80, "'decoded' counts as OOD", ""),
        (0.6, 0.95, 20, "'decoded' counts as OOD", ""),
        (0.9, 0.5, 20, "though the OOD score does not follow it (0.50)", ""),
        (0.9, 0.62, 20, "whether the OOD score follows it (0.62) cannot be told from 20 groups", ""),
        (0.6, 0.5, 20, "", ""),
    ],
)
def test_the_light_is_on_only_where_chance_does_not_reach_it(probe, score, groups, warning, doubt):
    found = figures(probe, score, groups)
    for text, wanted in ((artifact_warning(found), warning), (artifact_doubt(found), doubt)):
        assert wanted in text and bool(text) == bool(wanted), text
    assert ("cannot be told from val images" in artifact_section(found)) == bool(doubt)
