"""The rings: oldest out, least used first, bounds on staleness, exact state."""

import pytest
import torch

from modules.data.reservoir import Entry, Reservoir
from modules.runtime import stream

CPU = torch.device("cpu")


def make(num_classes=2, ring_size=3, size=2, max_uses=4, max_age=0) -> Reservoir:
    return Reservoir(num_classes, ring_size, size, CPU, max_uses, max_age)


def put(reservoir, image_index, label=0, is_ood=False, born=0):
    """An image whose every pixel is its image_index, so that pixels tell who they are."""
    pixels_NHWC = torch.full((1, 2, 2, 3), image_index, dtype=torch.uint8)
    reservoir.put_batch(pixels_NHWC, [Entry(label, is_ood, 7, "strength", born, image_index)])


def identities(reservoir, rows):
    """The image_index of each row by its entry, after checking that its pixels say the same."""
    by_entry = [reservoir.entry(row).image_index for row in rows]
    assert reservoir.gather(rows)[:, 0, 0, 0].tolist() == by_entry
    return by_entry


def everything(reservoir, label=0, is_ood=False):
    rows = reservoir.take((label,), is_ood, 0, 100, stream(0, "all"), worn=True)
    return sorted(identities(reservoir, rows))


def test_a_full_ring_evicts_its_oldest_image():
    reservoir = make()
    for image_index in range(5):
        put(reservoir, image_index)
    assert everything(reservoir) == [2, 3, 4]


def test_rings_of_classes_and_roles_are_separate():
    reservoir = make()
    for image_index in range(4):
        put(reservoir, image_index, label=0)
    put(reservoir, 10, label=1)
    put(reservoir, 20, label=0, is_ood=True)
    assert everything(reservoir, 0) == [1, 2, 3]
    assert everything(reservoir, 1) == [10]
    assert everything(reservoir, 0, True) == [20]
    assert reservoir.fill(0, False) == 3 and reservoir.fill(1, True) == 0
    assert sorted(identities(reservoir, reservoir.held(0, False))) == [1, 2, 3]


def test_a_batch_that_overruns_its_ring_keeps_its_last_images():
    reservoir = make(ring_size=3)
    pixels_NHWC = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 2, 2, 3).contiguous()
    reservoir.put_batch(pixels_NHWC, [Entry(0, False, 7, "strength", 0, index) for index in range(5)])
    assert everything(reservoir) == [2, 3, 4]


def test_fewest_uses_come_first_so_uses_stay_within_one():
    reservoir = make(ring_size=3, max_uses=100)
    for image_index in range(3):
        put(reservoir, image_index)
    counts = dict.fromkeys(range(3), 0)
    for step in range(10):
        for image_index in identities(reservoir, reservoir.take((0,), False, step, 2, stream(0, "take", step))):
            counts[image_index] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


def test_ties_are_broken_by_the_generator():
    def first(seed):
        reservoir = make(ring_size=8)
        for image_index in range(8):
            put(reservoir, image_index)
        return identities(reservoir, reservoir.take((0,), False, 0, 8, stream(seed, "take")))

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert sorted(first(0)) == list(range(8))


def test_max_uses_bounds_use_and_a_shortfall_is_a_shorter_list():
    reservoir = make(max_uses=2)
    put(reservoir, 0)
    taken = [len(reservoir.take((0,), False, step, 1, stream(0, "take", step))) for step in range(4)]
    assert taken == [1, 1, 0, 0]
    assert len(reservoir.take((0,), False, 4, 1, stream(0, "take", 4), worn=True)) == 1


def test_max_age_bounds_age_even_for_worn_rows():
    reservoir = make(max_uses=1, max_age=5)
    put(reservoir, 0, born=10)
    assert len(reservoir.take((0,), False, 15, 1, stream(0, "a"))) == 1
    assert len(reservoir.take((0,), False, 15, 1, stream(0, "b"), worn=True)) == 1
    assert reservoir.take((0,), False, 16, 1, stream(0, "c"), worn=True) == []


def test_any_class_is_served_evenly():
    reservoir = make(num_classes=3, ring_size=4)
    for label in range(3):
        for i in range(4):
            put(reservoir, 10 * label + i, label=label, is_ood=True)
    rows = reservoir.take(None, True, 0, 7, stream(0, "take"))
    per_class = [sum(reservoir.entry(row).label == label for row in rows) for label in range(3)]
    assert sorted(per_class) == [2, 2, 3]
    assert len(set(rows)) == 7


def test_the_class_of_the_least_used_image_comes_first():
    reservoir = make(ring_size=2)
    put(reservoir, 0, label=0)
    put(reservoir, 10, label=1)
    put(reservoir, 11, label=1)
    for label in (0, 0, 1, 1):  # 0 twice, 10 and 11 once
        reservoir.take((label,), False, 0, 1, stream(0, "take"))
    put(reservoir, 1, label=0)
    assert identities(reservoir, reservoir.take((0, 1), False, 0, 1, stream(0, "take"))) == [1]


def test_a_class_that_ran_dry_is_replaced_by_the_others():
    reservoir = make(num_classes=2, ring_size=4)
    for i in range(4):
        put(reservoir, i, label=1)
    assert len(reservoir.take((0, 1), False, 0, 3, stream(0, "take"))) == 3


def test_excluded_rows_are_not_taken_again():
    reservoir = make(ring_size=2)
    put(reservoir, 0)
    put(reservoir, 1)
    first = reservoir.take((0,), False, 0, 1, stream(0, "a"))
    second = reservoir.take((0,), False, 0, 2, stream(0, "b"), worn=True, excluding=first)
    assert len(second) == 1 and second != first


def test_statistics_by_hand():
    reservoir = make(num_classes=1, ring_size=2)  # 4 rows in all
    put(reservoir, 0, born=2)
    put(reservoir, 1, born=6)
    reservoir.take((0,), False, 10, 2, stream(0, "a"))
    reservoir.take((0,), False, 10, 1, stream(0, "b"))
    put(reservoir, 2, born=10)  # evicts image 0
    statistics = reservoir.statistics()
    assert statistics["fill"] == 0.5
    assert statistics["images_put"] == 3
    assert statistics["age_mean"] == (4 + 0) / 2 and statistics["age_max"] == 4
    assert statistics["reuse"] == statistics["uses_per_image"] == 3 / 3
    assert statistics["evicted_unused"] == 0


def test_ages_count_to_the_newest_step_of_an_image_or_a_batch():
    reservoir = make()
    put(reservoir, 0)
    assert reservoir.statistics()["age_max"] == 0
    put(reservoir, 1, born=6)
    assert reservoir.statistics()["age_max"] == 6
    reservoir.take((0,), False, 10, 0, stream(0, "a"))
    assert reservoir.statistics()["age_max"] == 10


def test_reuse_is_of_the_images_made_after_the_prefill_and_survives_a_checkpoint():
    reservoir = make(num_classes=1, ring_size=2)
    put(reservoir, 0)
    put(reservoir, 1)
    reservoir.end_prefill()
    reservoir.take((0,), False, 0, 2, stream(0, "a"))
    put(reservoir, 2)
    again = make(num_classes=1, ring_size=2)
    again.load_state_dict(reservoir.state_dict())
    for statistics in (reservoir.statistics(), again.statistics()):
        assert statistics["images_put"] == 3 and statistics["images_prefilled"] == 2
        assert statistics["reuse"] == 2 / 1 and statistics["uses_per_image"] == 2 / 3


def test_an_image_nobody_used_is_counted_when_it_leaves():
    reservoir = make(num_classes=1, ring_size=1)
    put(reservoir, 0)
    put(reservoir, 1)
    assert reservoir.statistics()["evicted_unused"] == 1


def test_state_continues_exactly():
    def feed(reservoir, steps):
        history = []
        for step in steps:
            put(reservoir, step, label=step % 2, is_ood=step % 3 == 0, born=step)
            for is_ood in (False, True):
                rows = reservoir.take(None, is_ood, step, 2, stream(0, "take", step, int(is_ood)))
                history.append((rows, identities(reservoir, rows), reservoir.statistics()))
        return history

    whole = make(max_age=7)
    expected = feed(whole, range(30))
    first, second = make(max_age=7), make(max_age=7)
    history = feed(first, range(13))
    second.load_state_dict(first.state_dict())
    assert history + feed(second, range(13, 30)) == expected
    assert torch.equal(second.state_dict()["pixels_NHWC"], whole.state_dict()["pixels_NHWC"])


def test_an_empty_reservoir_has_a_state_and_statistics_too():
    reservoir = make()
    assert set(reservoir.statistics().values()) == {0}
    reservoir.load_state_dict(make().state_dict())
    assert reservoir.take(None, False, 0, 3, stream(0, "a")) == []


@pytest.mark.parametrize(
    ("pixels", "entry", "message"),
    [
        (torch.zeros(1, 2, 2, 3), Entry(0, False, 0, "", 0, 0), "uint8"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), Entry(0, False, 0, "", 0, 0), r"\(1, 4, 4, 3\)"),
        (torch.zeros(1, 2, 2, 3, dtype=torch.uint8), Entry(2, False, 0, "", 0, 0), "label is 2"),
        (torch.zeros(1, 2, 2, 3, dtype=torch.uint8), Entry(-1, True, 0, "", 0, 0), "label is -1"),
    ],
)
def test_bad_images_are_refused(pixels, entry, message):
    with pytest.raises(ValueError, match=message):
        make().put_batch(pixels, [entry])


def test_a_state_of_other_rings_is_refused():
    with pytest.raises(ValueError, match="rings"):
        make(num_classes=2).load_state_dict(make(num_classes=3).state_dict())
    larger = make(num_classes=1, ring_size=2)
    put(larger, 0, is_ood=True)
    with pytest.raises(ValueError, match="rings"):
        make(num_classes=1, ring_size=1).load_state_dict(larger.state_dict())
    with pytest.raises(ValueError, match="rings"):  # its row lies in the ring of positives here
        make(num_classes=1, ring_size=3).load_state_dict(larger.state_dict())


def test_an_empty_row_is_named():
    with pytest.raises(KeyError, match="row 3 of the reservoir is empty"):
        make().entry(3)
