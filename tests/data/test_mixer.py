"""The batch: exact fractions over a run, the same real rows in every arm, shortfalls that are counted."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.config import Generation, Learning
from modules.data.mixer import Mixer, pair_warnings
from modules.data.reservoir import Entry, Reservoir
from modules.errors import ConfigError, DataError

CPU = torch.device("cpu")
SIZE = 4
LEARNING = Learning(classes_per_batch=3, rows_per_class=2)
GENERATION = Generation(synthetic_fraction=0.4, near_ood_fraction=0.5)


def make_mixer(
    generation=GENERATION,
    learning=LEARNING,
    images_per_class=(5, 6, 7, 8),
    seed=0,
    fed=True,
    max_uses=10**6,
    max_age=0,
    **kwargs,
):
    """A mixer whose real image d is all pixels d, with well-filled rings of images 100 and up unless not `fed`."""
    labels_D = torch.tensor([label for label, count in enumerate(images_per_class) for _ in range(count)])
    pixels_DHWC = torch.arange(len(labels_D), dtype=torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3)
    reservoir = Reservoir(len(images_per_class), 8, SIZE, CPU, max_uses, max_age)
    if fed:
        feed(reservoir, labels_D.tolist(), 8)
    return Mixer(pixels_DHWC.contiguous(), labels_D, reservoir, generation, learning, seed, **kwargs)


def generated_of(batch) -> torch.Tensor:
    """Which rows of a batch are generated, bool [B]."""
    return torch.tensor(batch.entries) >= 0


def counts_of(mixer) -> dict[str, int]:
    """Rows so far by kind."""
    return mixer.state_dict()["counts"]


def feed(reservoir, labels, count, roles=(False, True), born=0):
    """`count` images a ring, image_index from 100 on, each all pixels image_index, its source the class's first."""
    image_index = 100
    for label in sorted(set(labels)):
        for is_ood in roles:
            for _ in range(count):
                pixels_HWC = torch.full((1, SIZE, SIZE, 3), image_index, dtype=torch.uint8)
                entry = Entry(label, is_ood, labels.index(label), "strength", born, image_index)
                reservoir.put_batch(pixels_HWC, [entry])
                image_index += 1


def values(batch):
    return batch.images_BHWC[:, 0, 0, 0].tolist()


def test_rows_labels_and_roles_belong_together():
    mixer = make_mixer()
    labels = mixer._labels
    for step in range(20):
        batch = mixer.batch(step)
        generated, is_ood = generated_of(batch).tolist(), batch.is_ood_B.tolist()
        assert batch.images_BHWC.dtype == torch.uint8 and batch.labels_B.dtype == torch.int64
        for row, value in enumerate(values(batch)):
            assert batch.labels_B[row] == labels[batch.sources[row]]
            if generated[row]:
                assert value == batch.entries[row] >= 100
                entry = (value - 100) // 8
                assert (batch.labels_B[row], is_ood[row]) == (entry // 2, bool(entry % 2))
            else:
                assert value == batch.sources[row] and batch.entries[row] == -1 and not is_ood[row]
        kinds = [(g, o) for g, o in zip(generated, is_ood, strict=True)]
        assert kinds == sorted(kinds), "real rows, then positives, then near-OOD"


def test_real_rows_are_balanced_over_distinct_classes_without_repeats():
    mixer = make_mixer()
    seen = set()
    for step in range(40):
        batch = mixer.batch(step)
        labels = batch.labels_B[:6].tolist()
        assert labels[0::2] == labels[1::2] and len(set(labels)) == 3
        assert len(set(batch.sources[:6])) == 6
        seen.update(batch.sources[:6])
    assert seen == set(range(26)), "every image takes part"


def test_positives_are_of_the_classes_of_the_batch():
    mixer = make_mixer()
    for step in range(20):
        batch = mixer.batch(step)
        positive_B = generated_of(batch) & ~batch.is_ood_B
        assert set(batch.labels_B[positive_B].tolist()) <= set(batch.labels_B[:6].tolist())


@settings(max_examples=60, deadline=None)
@given(
    fraction=st.integers(0, 99).map(lambda n: n / 100),
    near_ood=st.integers(0, 100).map(lambda n: n / 100),
    classes=st.integers(1, 4),
    rows=st.integers(1, 5),
    steps=st.integers(1, 200),
)
def test_requests_meet_their_fractions_to_less_than_a_row(fraction, near_ood, classes, rows, steps):
    learning = Learning(classes_per_batch=classes, rows_per_class=rows)
    generation = Generation(synthetic_fraction=fraction, near_ood_fraction=near_ood)
    mixer = make_mixer(generation, learning, fed=False)
    exact, share = Fraction(str(fraction)), Fraction(str(near_ood))
    generated = steps * classes * rows * exact / (1 - exact)
    requests = [mixer.requested(step) for step in range(steps)]
    positives, oods = sum(r[0] for r in requests), sum(r[1] for r in requests)
    assert all(count >= 0 for request in requests for count in request)
    assert abs(positives + oods - generated) < 1
    assert abs(positives - generated * (1 - share)) < 1
    assert abs(oods - generated * share) < 1


@pytest.mark.parametrize(("fraction", "near_ood"), [(0.4, 0.5), (0.3, 0.25), (0.55, 1.0), (0.07, 0.0)])
def test_a_fed_run_realizes_what_it_requests(fraction, near_ood):
    mixer = make_mixer(Generation(synthetic_fraction=fraction, near_ood_fraction=near_ood))
    rows = generated = ood = 0
    for step in range(60):
        batch = mixer.batch(step)
        rows += len(batch.entries)
        generated += int(generated_of(batch).sum())
        ood += int(batch.is_ood_B.sum())
    expected = 60 * 6 * fraction / (1 - fraction)
    assert abs(generated - expected) < 1 and abs(ood - expected * near_ood) < 1
    statistics = mixer.statistics()
    assert statistics["realized_fraction"] == statistics["requested_fraction"] == generated / rows
    assert statistics["realized_near_ood"] == statistics["requested_near_ood"] == ood / generated
    assert statistics["shortfall"] == statistics["overused"] == 0


def test_a_run_without_generation_has_statistics_too():
    mixer = make_mixer(Generation(synthetic_fraction=0.0))
    assert set(mixer.statistics().values()) == {0}
    mixer.batch(0)
    assert set(mixer.statistics().values()) == {0}


def test_the_decimal_that_was_written_counts_not_its_float():
    learning = Learning(classes_per_batch=4, rows_per_class=12)  # 48 x .4 / .6 is 32.00000000000001 in floats
    mixer = make_mixer(Generation(synthetic_fraction=0.4, near_ood_fraction=0.5), learning)
    assert {mixer.requested(step) for step in range(500)} == {(16, 16)}


ARMS = {
    "no generated rows": ({"synthetic_fraction": 0.0}, {}),
    "many": ({"synthetic_fraction": 0.7, "near_ood_fraction": 0.3}, {}),
    "another cost": ({"images_per_step": 40.0}, {}),
    "further real rows": ({"synthetic_fraction": 0.0}, {"extra_real_rows": 4}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_sees_the_same_real_rows(arm):
    generation_changes, learning_changes = ARMS[arm]
    generation = dataclasses.replace(GENERATION, **generation_changes)
    learning = dataclasses.replace(LEARNING, **learning_changes)
    reference, other = make_mixer(), make_mixer(generation, learning)
    for step in range(15):
        expected, batch = reference.batch(step), other.batch(step)
        assert batch.sources[:6] == expected.sources[:6]
        assert torch.equal(batch.images_BHWC[:6], expected.images_BHWC[:6])


def test_an_empty_reservoir_changes_no_real_row():
    fed, empty = make_mixer(), make_mixer(fed=False)
    for step in range(5):
        assert empty.batch(step).sources[:6] == fed.batch(step).sources[:6]


def test_the_seed_and_the_step_change_the_real_rows():
    sources = [make_mixer(seed=seed).batch(step).sources[:6] for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(s) for s in sources}) == 4


def test_further_real_rows_are_new_images_spread_over_the_classes():
    learning = dataclasses.replace(LEARNING, extra_real_rows=4)
    batch = make_mixer(dataclasses.replace(GENERATION, synthetic_fraction=0.0), learning).batch(0)
    assert len(set(batch.sources)) == len(batch.sources) == 10
    counts = [batch.labels_B.tolist().count(label) for label in set(batch.labels_B.tolist())]
    assert sorted(counts) == [3, 3, 4]


def test_a_class_with_fewer_images_than_rows_repeats_them_evenly():
    learning = Learning(classes_per_batch=2, rows_per_class=5)
    batch = make_mixer(images_per_class=(2, 9), learning=learning).batch(0)
    few = [source for source in batch.sources[:10] if source < 2]
    assert len(few) == 5 and sorted(few.count(image) for image in (0, 1)) == [2, 3]


def test_without_positives_real_images_of_the_batch_stand_in_and_are_counted():
    mixer = make_mixer(fed=False)
    feed(mixer.reservoir, mixer._labels, 8, roles=(True,))
    batch = mixer.batch(0)
    assert generated_of(batch).tolist() == [False] * 8 + [True] * 2
    assert len(set(batch.sources[:8])) == 8, "stand-ins are images the batch did not hold yet"
    assert set(batch.labels_B[6:8].tolist()) <= set(batch.labels_B[:6].tolist())
    assert counts_of(mixer)["positives_short"] == 2
    assert mixer.statistics()["shortfall"] == 0.5


def test_worn_near_ood_images_serve_again_and_are_counted():
    mixer = make_mixer(max_uses=1, fed=False)
    feed(mixer.reservoir, mixer._labels, 1)
    per_batch = [mixer.batch(step) for step in range(3)]  # 4 near-OOD images, 2 wanted a batch
    assert all(batch.is_ood_B.sum() == 2 for batch in per_batch)
    assert all(len({e for e in batch.entries if e >= 0}) == sum(e >= 0 for e in batch.entries) for batch in per_batch)
    assert counts_of(mixer)["near_ood_overused"] == 2 and counts_of(mixer)["near_ood_short"] == 0


def test_without_any_near_ood_image_real_ones_stand_in_and_are_counted():
    mixer = make_mixer(fed=False)
    batch = mixer.batch(0)
    assert len(batch.entries) == 10 and not batch.is_ood_B.any() and not generated_of(batch).any()
    assert counts_of(mixer)["near_ood_short"] == 2
    assert mixer.statistics()["requested_fraction"] == 0.4 and mixer.statistics()["realized_fraction"] == 0.0


def test_too_old_images_do_not_serve():
    mixer = make_mixer(max_age=3)
    assert generated_of(mixer.batch(3)).sum() == 4
    assert generated_of(mixer.batch(4)).sum() == 0


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_the_due_share_of_real_rows_passes_through_encode_and_decode(fraction):
    generation = dataclasses.replace(GENERATION, roundtrip_fraction=fraction)
    plain = make_mixer()
    mixer = make_mixer(generation, roundtrip_DHWC=255 - plain._pixels_DHWC)
    changed = 0
    for step in range(20):
        batch, reference = mixer.batch(step), plain.batch(step)
        assert batch.sources == reference.sources
        is_changed_B = (batch.images_BHWC != reference.images_BHWC).flatten(1).any(1)
        assert torch.equal(batch.images_BHWC[is_changed_B], 255 - reference.images_BHWC[is_changed_B])
        assert not is_changed_B[6:].any()
        changed += int(is_changed_B.sum())
    assert changed == 20 * 6 * fraction


def test_state_continues_exactly():
    whole = make_mixer(max_uses=9)
    expected = [whole.batch(step) for step in range(12)]
    first, second = make_mixer(max_uses=9), make_mixer(max_uses=9, fed=False)
    for step in range(7):
        first.batch(step)
    second.load_state_dict(first.state_dict())
    second.reservoir.load_state_dict(first.reservoir.state_dict())
    for step in range(7, 12):
        batch = second.batch(step)
        assert torch.equal(batch.images_BHWC, expected[step].images_BHWC)
        assert (batch.sources, batch.entries) == (expected[step].sources, expected[step].entries)
    assert second.statistics() == whole.statistics() and counts_of(second) == counts_of(whole)


def test_a_class_without_an_image_is_a_data_error():
    with pytest.raises(DataError, match="class 1 of 3 has no train image"):
        make_mixer(images_per_class=(3, 0, 3), fed=False)


def test_more_classes_a_batch_than_there_are_is_a_config_error():
    with pytest.raises(ConfigError, match="classes_per_batch is 3, but the train split has 2 classes"):
        make_mixer(images_per_class=(3, 3))


def test_a_roundtrip_share_without_roundtripped_images_is_a_config_error():
    with pytest.raises(ConfigError, match="roundtrip_fraction"):
        make_mixer(dataclasses.replace(GENERATION, roundtrip_fraction=0.1))


def test_pair_warnings():
    enough, alone = Learning(rows_per_class=2), Learning(rows_per_class=1)
    assert pair_warnings(enough, [5, 5]) == ()
    assert "rows_per_class is 1" in pair_warnings(alone, [5, 5])[0]
    assert pair_warnings(enough, [5, 2]) == ()
    assert "1 of 2 classes have one train image" in pair_warnings(enough, [5, 1])[0]
    assert len(pair_warnings(alone, [5, 1])) == 1, "without class-mates there are none to miss"
    assert pair_warnings(dataclasses.replace(alone, method="cross_entropy"), [5, 1]) == ()
    assert make_mixer(images_per_class=(5, 1, 5)).warnings


@pytest.mark.gpu
def test_a_batch_on_a_gpu_waits_for_nothing():
    mixer = make_mixer(fed=False)
    reservoir = Reservoir(4, 8, SIZE, torch.device("cuda"), 10**6)
    feed_cuda = [Entry(label, is_ood, 0, "strength", 0, 100) for label in range(4) for is_ood in (False, True)]
    reservoir.put_batch(torch.zeros(8, SIZE, SIZE, 3, dtype=torch.uint8, device="cuda"), feed_cuda)
    mixer.reservoir = reservoir
    mixer._pixels_DHWC = mixer._pixels_DHWC.cuda()
    mixer.batch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixer.batch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
