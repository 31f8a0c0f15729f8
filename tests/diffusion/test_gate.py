"""The gate: statistics and verdicts by hand, retries and their end, one step of delay, alarms, state."""

import dataclasses

import pytest
import torch

from kernels.pixels import pixels
from modules import config
from modules.diffusion.gate import (
    ALARM_WINDOW,
    LEAST_TYPICAL,
    REASONS,
    ClassStatistics,
    Gate,
    broken_codes,
    class_statistics,
    verdicts,
)
from modules.diffusion.requests import Request
from modules.state import load_newest, save_checkpoint

SOURCES = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def store(pixels_N3HW: torch.Tensor) -> torch.Tensor:
    return pixels(pixels_N3HW, 8)


def request(index: int, is_ood=False, label=0, **changes) -> Request:
    return Request(index, index % 4, label, is_ood, "strength" if is_ood else "positive", **changes)


def image(seed: int) -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(100 + seed)) * 2 - 1


def axes(
    classes: int, thresholds: list[float], typical: float = 1.0, ood: list[float] | None = None
) -> ClassStatistics:
    """Class means at the first axes of three dimensions, the center at the origin."""
    ends = torch.tensor([thresholds, ood or thresholds])
    return ClassStatistics(torch.zeros(3), torch.eye(3)[:classes], *ends, torch.full((classes,), typical))


class Loop:
    """A gate whose images carry their features in their first three pixel values."""

    def __init__(self, **cfg):
        self.accepted, self.retried, self.observed = [], [], []
        self.gate = Gate(
            dataclasses.replace(config.Gate(), **cfg),
            store=store,
            sources_DHWC=SOURCES,
            accept=lambda stored, requests: self.accepted.extend(zip(stored, requests, strict=True)),
            retry=self.retried.append,
            embed=lambda images_NHWC: images_NHWC[:, 0, 0].float() / 127.5 - 1,
            observe=lambda *row: self.observed.append(row),
        )

    def know(self):
        """Classes 0 and 1 at the x and y axes about the origin, each with a threshold of .9."""
        features = torch.tensor([[1.0, 0.1, 0], [1, -0.1, 0], [0.1, 1, 0], [-0.1, 1, 0]])
        self.gate.refresh(features, [0, 0, 1, 1], 2)
        self.gate.known = axes(2, [0.9, 0.9])

    def finish(self, *rows):
        pixels = torch.stack([image(i) for i in range(len(rows))])
        for pixel, (features, _) in zip(pixels, rows, strict=True):
            pixel[:, 0, 0] = torch.tensor(features, dtype=torch.float32)
        self.gate.finish(pixels, [r for _, r in rows])


def test_class_statistics_by_hand():
    features = torch.randn(11, 5, generator=torch.Generator().manual_seed(2))
    labels = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2]
    known = class_statistics(features, labels, 3, 0.25, 0.75)
    unit = [f / f.norm() for f in features]
    center = sum(unit) / 11
    z = [(f - center) / (f - center).norm() for f in unit]
    torch.testing.assert_close(known.center_E, center)
    for label in (0, 1):
        members = [i for i in range(11) if labels[i] == label]
        mean = sum(z[i] for i in members)
        torch.testing.assert_close(known.means_CE[label], mean / mean.norm())
        similarities = []
        for i in members:
            rest = sum(z[j] for j in members if j != i)
            similarities.append(z[i] @ rest / rest.norm())
        torch.testing.assert_close(known.thresholds_C[label], torch.stack(similarities).quantile(0.25))
        torch.testing.assert_close(known.ood_thresholds_C[label], torch.stack(similarities).quantile(0.75))
        torch.testing.assert_close(known.typical_C[label], torch.stack(similarities).mean())
    torch.testing.assert_close(known.means_CE[2], z[10])
    assert known.thresholds_C[2] == known.thresholds_C[:2].median()
    assert known.typical_C[2] == known.typical_C[:2].median()
    alone = class_statistics(features[:1], [0], 1, 0.05, 0.5)
    assert alone.thresholds_C.tolist() == alone.typical_C.tolist() == [1.0]


def test_features_that_are_never_negative_still_tell_classes_apart():
    """A ReLU backbone: every cosine is near 1 before the center is taken off, and uses its range after."""
    draw = torch.Generator().manual_seed(3)
    classes = torch.eye(4).repeat_interleave(8, 0)
    features = 5 + classes + 0.1 * torch.rand(32, 4, generator=draw)
    labels = [row // 8 for row in range(32)]
    raw = torch.nn.functional.normalize(features, dim=1)
    assert (raw @ raw.T).min() > 0.97
    known = class_statistics(features, labels, 4, 0.05, 0.5)
    everyone = torch.arange(32) < 0
    codes, likeness, nearest = verdicts(features, torch.tensor(labels), everyone, known, -0.2)
    assert nearest.all() and (codes == 0).float().mean() > 0.9
    torch.testing.assert_close(likeness.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    _, foreign, _ = verdicts(features.roll(8, 0), torch.tensor(labels), everyone, known, -0.2)
    assert foreign.max() < 0, "an image of another class is less like this one than the mean of all images is"


def test_broken_images_are_named():
    good = image(0)
    faulty = {
        "accepted": good,
        "non_finite": good.clone().index_fill_(0, torch.tensor(1), float("nan")),
        "black": torch.full((3, 8, 8), -1.0),
        "constant": torch.full((3, 8, 8), 0.3),
        "copy": SOURCES[0].permute(2, 0, 1) / 127.5 - 1,
    }
    images = torch.stack(list(faulty.values()))
    codes = broken_codes(images, store(images), SOURCES[[0] * 5])
    assert [REASONS[code] for code in codes] == list(faulty)


def test_verdicts_by_hand():
    known = axes(2, [0.9, 0.8], typical=0.5)
    cases = [
        ([1.0, 0.1, 0.0], 0, False, "accepted"),
        ([0.5, 0.6, 0.0], 0, False, "other_class"),
        ([0.6, 0.1, 0.6], 0, False, "unlike_class"),
        ([0.6, 0.0, 0.8], 0, True, "accepted"),
        ([0.5, 0.9, 0.0], 0, True, "too_close"),  # above the threshold of a class that is not its own
        ([1.0, 0.1, 0.0], 1, True, "too_close"),
        ([-0.5, -0.5, 0.5], 0, True, "too_far"),
    ]
    features, labels, is_ood, expected = zip(*cases, strict=True)
    codes, likeness, nearest = verdicts(torch.tensor(features), torch.tensor(labels), torch.tensor(is_ood), known, -0.2)
    assert [REASONS[code] for code in codes] == list(expected)
    assert likeness[0] == pytest.approx(1 / 1.01**0.5 / 0.5) and nearest.tolist()[:3] == [True, False, True]
    looser = axes(2, [0.2, 0.2], ood=[0.9, 0.95])
    codes = verdicts(torch.tensor(features), torch.tensor(labels), torch.tensor(is_ood), looser, -0.2)[0]
    assert [REASONS[code] for code in codes[3:6]] == ["accepted", "accepted", "too_close"], "a quantile of their own"
    unlearned = axes(2, [0.9, 0.8], typical=-0.01)
    likeness = verdicts(torch.tensor(features), torch.tensor(labels), torch.tensor(is_ood), unlearned, -0.2)[1]
    assert likeness[0] == pytest.approx(1 / 1.01**0.5 / LEAST_TYPICAL), "no division by what has not been learned"


def test_verdicts_take_effect_one_step_later():
    loop = Loop()
    loop.finish(([0, 0, 0], request(0)))
    loop.gate.settle()
    assert not loop.accepted
    loop.finish(([0, 0, 0], request(1)))
    loop.gate.settle()
    assert [r.image_index for _, r in loop.accepted] == [0]
    loop.gate.settle(everything=True)
    assert [r.image_index for _, r in loop.accepted] == [0, 1]
    assert torch.equal(loop.accepted[0][0][1:], store(image(0)[None])[0][1:])


def test_rejected_images_are_drawn_again_and_then_given_up():
    loop = Loop(enabled=True, retries=2)
    loop.know()
    loop.finish(([1, 0, 0], request(0)), ([0, 1, 0], request(1)), ([0, 1, 0], request(2, True)))
    loop.gate.settle(everything=True)
    assert [r.image_index for _, r in loop.accepted] == [0]
    assert [(r.image_index, r.attempt) for r in loop.retried] == [(1, 1), (2, 1)]
    for attempt in (1, 2):
        loop.finish(([0, 1, 0], request(1, attempt=attempt)))
    loop.gate.settle(everything=True)
    assert loop.retried[-1].attempt == 2 and loop.gate.given_up == 1
    rows = loop.gate.statistics()
    assert rows["gate.positive.other_class"] == 3 / 4 and rows["gate.strength.too_close"] == 1.0
    assert loop.gate.counts["positive"][0] == {"accepted": 1, "other_class": 3}


def test_a_gate_that_is_off_counts_and_passes_but_never_broken_images():
    loop = Loop(enabled=False)
    loop.know()
    loop.finish(([0, 1, 0], request(0)))
    loop.gate.finish(torch.full((1, 3, 8, 8), float("nan")), [request(1)])
    loop.gate.settle(everything=True)
    assert [r.image_index for _, r in loop.accepted] == [0] and [r.image_index for r in loop.retried] == [1]
    assert loop.gate.statistics()["gate.positive.other_class"] == 0.5
    assert [(r.image_index, reason) for r, reason, _, _ in loop.observed] == [(0, "other_class")]


def test_statistics_are_due_from_the_start_step_on():
    gate = Loop(enabled=True, start_step=20, refresh_every=10).gate
    assert [step for step in range(45) if gate.due(step)] == list(range(20, 45))
    gate.refresh(torch.eye(3), [0, 1, 2], 3)
    assert [step for step in range(45) if gate.due(step)] == [20, 30, 40]
    gate.embed = None
    assert not gate.due(30)
    followed = Loop(enabled=False, start_step=20).gate  # by a controller, which starts with the same step
    assert not followed.due(19) and followed.due(20)


def test_alarms_stand_at_both_ends():
    loop = Loop(enabled=True, retries=0)
    loop.know()
    for _ in range(ALARM_WINDOW):
        loop.finish(([0, 1, 0], request(0)), ([0.6, 0, 0.8], request(1, True)))
    assert not loop.gate.alarms()
    loop.gate.settle(everything=True)
    low, high = loop.gate.alarms()
    assert "0% of positives" in low and "milder strength" in low
    assert "100% of near-OOD" in high and "lower gate.near_ood_quantile" in high


def test_negatives_that_come_too_close_ring_with_the_way_out():
    loop = Loop(enabled=True, retries=0)
    loop.know()
    for _ in range(ALARM_WINDOW):
        loop.finish(([1.0, 0.1, 0.0], request(0, True)))
    loop.gate.settle(everything=True)
    (alarm,) = loop.gate.alarms()
    assert "0% of near-OOD" in alarm and "a higher near_ood.strength or gate.near_ood_quantile" in alarm


def test_verdicts_that_do_not_count_are_still_told():
    """Under a controller alone every image passes; what the learner makes of it is what the rate says."""
    loop = Loop(enabled=False, retries=0)
    loop.know()
    for _ in range(ALARM_WINDOW):
        loop.finish(([1.0, 0.1, 0.0], request(0, True)))
    loop.gate.settle(everything=True)
    assert len(loop.accepted) == ALARM_WINDOW and loop.gate.statistics()["gate.near_ood.passed"] == 0.0
    assert "would pass 0% of near-OOD" in loop.gate.alarms()[0]


def test_a_gate_without_a_learner_rings_for_broken_images_only():
    loop = Loop(enabled=False, retries=0)
    loop.gate.embed = None
    for _ in range(ALARM_WINDOW):
        loop.finish(([0, 1, 0], request(0)))
    loop.gate.settle(everything=True)
    assert loop.gate.statistics()["gate.positive.passed"] == 1.0 and not loop.gate.alarms()
    for _ in range(ALARM_WINDOW):
        loop.gate.finish(torch.full((1, 3, 8, 8), float("nan")), [request(1)])
    loop.gate.settle(everything=True)
    assert "passes 0% of positives" in loop.gate.alarms()[0]


def test_images_that_no_learner_judged_are_counted_apart_and_ring_no_alarm():
    loop = Loop(enabled=True, retries=0)
    for _ in range(ALARM_WINDOW):
        loop.finish(([0, 1, 0], request(0)))
    loop.gate.settle(everything=True)
    loop.know()
    assert len(loop.accepted) == ALARM_WINDOW and not loop.gate.alarms() and not loop.observed
    assert loop.gate.statistics()["gate.positive.unjudged"] == 1.0
    for _ in range(ALARM_WINDOW):
        loop.finish(([0, 1, 0], request(0)))
    loop.gate.settle(everything=True)
    rows = loop.gate.statistics()
    assert rows["gate.positive.unjudged"] == 0.5 and rows["gate.positive.other_class"] == 1.0
    assert rows["gate.positive.passed"] == 0.0 and "0% of positives" in loop.gate.alarms()[0]


def test_state_goes_through_a_checkpoint(tmp_path):
    first, second = Loop(enabled=True), Loop(enabled=True)
    first.know()
    first.finish(([0, 1, 0], request(0)), ([0.6, 0, 0.8], request(1, True)))
    first.gate.settle(everything=True)
    first.finish(([0, 1, 0], request(2)), ([1, 0, 0], request(3)))
    save_checkpoint(tmp_path, 1, first.gate.state_dict())
    second.gate.load_state_dict(load_newest(tmp_path)[1])
    first.accepted.clear(), first.retried.clear()
    for loop in (first, second):
        loop.gate.settle(everything=True)
        loop.finish(([0, 1, 0], request(4)), ([0.6, 0, 0.8], request(5, True)))
        loop.gate.settle(everything=True)
    assert first.retried == second.retried and len(first.retried) == 2
    assert torch.equal(first.accepted[0][0], second.accepted[0][0])
    assert first.gate.statistics() == second.gate.statistics()


@pytest.mark.gpu
def test_the_gate_never_waits_for_the_gpu():
    seen = []
    gate = Gate(
        config.Gate(enabled=True),
        store=store,
        sources_DHWC=SOURCES.cuda(),
        accept=lambda stored, requests: seen.extend(requests),
        retry=seen.append,
        embed=lambda images: images.flatten(1).float(),
    )
    features = torch.randn(4, 192, device="cuda")
    pixels = torch.rand(3, 3, 8, 8, device="cuda") * 2 - 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            gate.refresh(features, [0, 0, 1, 1], 2)
            gate.finish(pixels, [request(0), request(1), request(2, True)])
            gate.settle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 6
