"""What steps owe: evenly spread, and over a run exactly what the images cost."""

import itertools

import pytest

from modules.diffusion.pace import Pace


def costs_of(*cycle):
    """The costs of images in index order, over and over."""
    return itertools.cycle(cycle).__next__


@pytest.mark.parametrize("images", [0.25, 1.0, 1.5, 7.0])
def test_equal_costs_are_owed_as_they_are_released(images):
    pace = Pace(4)
    for step in range(1, 9):
        pace.release(images, costs_of(5))
        assert pace.credit == pytest.approx(5 * images * step)


def test_one_expensive_image_among_cheap_ones_makes_no_step_long():
    pace, costs = Pace(4), costs_of(*[1] * 19, 50)
    owed, before = [], 0.0
    for _ in range(100):
        pace.release(1.0, costs)
        owed.append(pace.credit - before)
        before = pace.credit
    window = 2 * 4 + 1
    assert max(owed) == pytest.approx((50 + window - 1) / window)
    assert pace.credit == pytest.approx(100 / 20 * (19 + 50), rel=0.1), "all of them, but for those of the window"


def test_each_cost_is_asked_for_once_and_in_order():
    pace, asked = Pace(2), []

    def next_cost():
        asked.append(len(asked))
        return 3

    for _ in range(10):
        pace.release(1.5, next_cost)
    assert len(asked) == 13 + 2 * 2 + 2, "13 were released before the last step, which looked at 2 S + 2 more"


def test_a_tick_is_due_when_all_slots_are_owed_one():
    pace = Pace(4)
    pace.release(0.75, costs_of(5))
    assert pace.credit == 3.75 and not pace.tick_is_due
    pace.credit += 0.25
    assert pace.tick_is_due
    pace.settle()
    assert pace.credit == 0 and not pace.tick_is_due


def test_a_stopped_pace_goes_on_as_if_never_stopped():
    costs, again = costs_of(1, 7, 3), Pace(3)
    pace = Pace(3)
    for _ in range(5):
        pace.release(0.7, costs)
    again.load_state_dict(pace.state_dict())
    following = [next_cost() for next_cost in [costs] * 9]
    for one in (pace, again):
        rest = iter(following)
        for _ in range(5):
            one.release(0.7, rest.__next__)
    assert again.state_dict() == pace.state_dict() and again.credit > 0
