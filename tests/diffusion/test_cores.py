"""Calls in parts, side by side on a CPU's cores: the same images, each part with its share of torch's threads."""

import threading

import pytest
import torch

from modules.diffusion.cores import count_parts, in_parts, map_parts
from modules.state import load_newest, save_checkpoint
from tests.diffusion.engine import Engine

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Sets the number of torch's threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("count", "rows", "parts"),
    [(2, 16, 2), (2, 15, 1), (2, 6, 1), (1, 16, 1), (4, 32, 4), (6, 32, 2), (6, 12, 3), (16, 16, 4), (3, 32, 1)],
)
def test_parts_divide_threads_and_rows_and_are_not_too_small(count, rows, parts, threads):
    threads(count)
    assert count_parts(CPU, rows) == parts
    assert count_parts(torch.device("cuda"), rows) == 1


def test_each_part_has_a_thread_of_its_own_and_its_share_of_torchs(threads):
    threads(4)
    meet = threading.Barrier(2, timeout=60)

    def seen(number):
        meet.wait()  # both are under way at once
        return number, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    for _ in range(2):  # the workers stay
        (first, one, *rest), (second, other, *others) = map_parts(seen, [(1,), (2,)])
        assert (first, second) == (1, 2) and len({one, other, threading.get_ident()}) == 3
        assert rest == others == [2, False]
        assert torch.get_num_threads() == 4
    threads(2)
    assert [made[2] for made in map_parts(seen, [(1,), (2,)])] == [1, 1]


def test_in_turn_they_run_here_and_a_single_part_does_too(threads):
    threads(2)
    here = threading.get_ident()
    seen = map_parts(lambda x: (x, threading.get_ident(), torch.get_num_threads()), [(1,), (2,)], in_turn=True)
    assert seen == [(1, here, 1), (2, here, 1)]
    assert map_parts(lambda x: (x, threading.get_ident(), torch.get_num_threads()), [(1,)]) == [(1, here, 2)]


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_failure_is_raised_when_no_part_runs_any_more(in_turn, threads):
    threads(2)
    ended = []

    def call(fails):
        if fails:
            raise ValueError("this part")
        threading.Event().wait(0.2)
        ended.append(True)

    with pytest.raises(ValueError, match="this part"):
        map_parts(call, [(False,), (True,)], in_turn)
    assert ended == [True] and torch.get_num_threads() == 2


def test_rows_come_back_in_their_order(threads):
    threads(2)
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(in_parts(lambda y: y * 2, 3)(x), x * 2)
    double = x.__mul__
    assert in_parts(double, 1) is double


@pytest.mark.parametrize(
    ("solver", "changes"),
    [("ddim", {}), ("ddim", {"empty_TE": None}), ("lcm", {"masked": True}), ("ddim", {"guided_steps": 3})],
    ids=["guided", "unguided", "stochastic, masked", "guidance that ends"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_images_made_in_parts_are_those_of_whole_calls(solver, changes, shared, threads):
    made = {}
    for count in (1, 2):
        threads(count)
        engine = Engine(solver, slots=8, decode_batch=8, **changes)
        tick = engine.slots.in_flight
        if not shared:
            tick.shared = None
        assert tick.parts == count
        engine.make(20)
        made[count] = engine.finished
    assert all((made[1][i] - made[2][i]).abs().max() <= 1e-4 for i in range(20))


def test_resuming_parts_in_flight_equals_never_having_stopped(threads, tmp_path):
    threads(2)
    whole, first, second = (Engine(slots=8) for _ in range(3))
    for engine in (whole, first):
        for _ in range(9):
            engine.slots.tick()
    save_checkpoint(tmp_path, 9, first.slots.state_dict(), keep=1)
    second.slots.load_state_dict(load_newest(tmp_path)[1])
    assert torch.equal(second.slots.in_flight.kv_RTX, whole.slots.in_flight.kv_RTX)
    for engine in (whole, second):
        engine.slots.drain()
    assert second.finished and all(torch.equal(whole.finished[i], pixels) for i, pixels in second.finished.items())


@pytest.mark.slow
def test_a_tick_compiled_for_parts_makes_the_same_images(threads):
    from modules.diffusion.capture import accelerate

    threads(2)
    eager, compiled = Engine(slots=8), Engine(slots=8)
    assert accelerate(compiled.slots, "on").value == "compiled"
    for engine in (eager, compiled):
        engine.make(10)
    assert all((eager.finished[i] - compiled.finished[i]).abs().max() <= 1e-4 for i in range(10))
