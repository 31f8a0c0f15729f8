"""The collapse alarm: patient, deaf during warm-up, and silent again once the embeddings spread."""

import pytest

from modules.learning.geometry import CollapseAlarm

FINE, ONE_POINT, ONE_LINE = (0.3, 0.9), (0.99, 0.5), (0.5, 0.05)


def speaks(alarm, figures, first_step=100):
    return [bool(alarm.update(first_step + i, *pair)) for i, pair in enumerate(figures)]


@pytest.mark.parametrize("collapsed", [ONE_POINT, ONE_LINE])
def test_it_speaks_at_the_third_log_in_a_row(collapsed):
    assert speaks(CollapseAlarm(20), [collapsed] * 4) == [False, False, True, True]


def test_a_recovery_starts_the_count_again():
    figures = [ONE_POINT, ONE_POINT, FINE, ONE_POINT, ONE_LINE, ONE_POINT, FINE]
    assert speaks(CollapseAlarm(20), figures) == [False] * 5 + [True, False]


def test_figures_on_the_limits_are_fine():
    assert not any(speaks(CollapseAlarm(20), [(0.98, 0.1)] * 5))


def test_warm_up_does_not_count():
    alarm = CollapseAlarm(20)
    assert not any(speaks(alarm, [ONE_POINT] * 10, first_step=10))
    assert speaks(alarm, [ONE_POINT] * 3, first_step=20) == [False, False, True]


def test_figures_that_are_not_numbers_are_the_guards_matter():
    assert not any(speaks(CollapseAlarm(0), [(float("nan"), float("nan"))] * 5))


def test_the_message_names_figures_and_remedies():
    message = CollapseAlarm(0, patience=1).update(0, 0.991, 0.042)
    assert all(part in message for part in ("0.991", "0.98", "0.042", "0.1", "learning.lr", "learning.temperature"))


def test_state_continues():
    first, second = CollapseAlarm(0), CollapseAlarm(0)
    speaks(first, [ONE_POINT] * 2)
    second.load_state_dict(first.state_dict())
    assert speaks(second, [ONE_POINT]) == [True]
