"""The warning light: on where features or scores see the decoder, off where they do not."""

import pytest
import torch

from modules import config
from modules.evaluation.artifact import artifact_light, artifact_warning
from modules.evaluation.evaluate import evaluate
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
    assert artifact_warning(found) == ""


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
    assert artifact_warning({}) == ""
    with pytest.raises(ValueError, match="expected a row each of every image"):
        artifact_light(real.features_DF, real.features_DF[1:], real.groups, detector, 0)
