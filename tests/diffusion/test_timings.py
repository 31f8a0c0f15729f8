"""What a tuner takes: the fastest way that works, torch's own where no other is clearly faster."""

import pytest

from modules.diffusion.timings import Timing, best, by_shape, chosen, told

SHAPE = (2, 8)


def timings(**ms):
    return [Timing(SHAPE, way, value, "" if value else "refused") for way, value in ms.items()]


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ({"own": 2.0, "other": 1.0}, "other"),
        ({"own": 1.04, "other": 1.0}, "own"),
        ({"own": 1.06, "other": 1.0}, "other"),
        ({"own": None, "other": 3.0, "third": 2.0}, "third"),
        ({"own": 3.0, "other": None}, "own"),
    ],
)
def test_the_fastest_that_works_is_taken_but_a_tie_is_torchs(found, taken):
    assert best(timings(**found), "own").way == taken
    assert chosen(timings(**found), "own") == {"2x8": taken}


def test_where_all_refuse_nothing_is_chosen():
    assert best(timings(own=None, other=None), "own") is None
    assert chosen(timings(own=None) + [Timing((1,), "own", 1.0)], "own") == {"1": "own"}


def test_a_shape_is_told_in_a_line_the_fastest_first():
    assert told(timings(own=2.0, other=None, third=1.0)) == "third 1.000 ms, own 2.000 ms, other no (refused)"


def test_timings_are_parted_by_shape():
    more = Timing((1,), "own", 1.0)
    assert by_shape([*timings(own=1.0), more]) == {SHAPE: timings(own=1.0), (1,): [more]}
