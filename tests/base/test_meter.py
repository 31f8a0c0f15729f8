"""Time by phase and stage, against a clock that the test turns by hand."""

import pytest
import torch

from modules import meter as room
from modules.meter import Meter, timer


@pytest.fixture
def clock(monkeypatch):
    """A list of one number: the seconds that perf_counter shows."""
    now = [100.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    return now


def spend(meter: Meter, clock, **seconds):
    for name, value in seconds.items():
        with meter.phase(name):
            clock[0] += value


def test_phases_add_up_over_the_run_and_over_an_interval(clock):
    meter = Meter()
    for _ in range(2):
        spend(meter, clock, mix=0.01, loss=0.03)
        clock[0] += 0.01  # between phases
    row = meter.interval(2)
    assert row == pytest.approx({"mix_ms": 10, "loss_ms": 30, "step_ms": 50})
    spend(meter, clock, mix=0.5)
    assert meter.interval(1) == pytest.approx({"mix_ms": 500, "step_ms": 500})
    assert dict(meter.seconds) == pytest.approx({"mix": 0.52, "loss": 0.06})
    assert dict(meter.counts) == {"mix": 3, "loss": 2}


def test_a_restarted_interval_forgets_what_belongs_to_no_step(clock):
    meter = Meter()
    spend(meter, clock, mix=1.0)
    clock[0] += 5
    meter.restart_interval()
    spend(meter, clock, loss=0.2)
    assert meter.interval(1) == pytest.approx({"loss_ms": 200, "step_ms": 200})


def test_a_run_in_two_processes_took_the_time_of_both(clock):
    """A state taken inside a stage holds what the stage took so far; the next process adds its own."""
    first = Meter()
    with first.stage("data"):
        clock[0] += 2
    with first.stage("contrastive"):
        spend(first, clock, mix=3.0)
        state = first.state_dict()
    second = Meter()
    with second.stage("data"):
        clock[0] += 1
    with second.stage("contrastive"):
        second.load_state_dict(state)
        spend(second, clock, mix=4.0)
    assert dict(second.seconds) == pytest.approx({"stage.data": 3, "stage.contrastive": 7, "mix": 7})
    assert second.counts["mix"] == 2


def test_timer_gives_the_median_without_the_warm_up(clock):
    durations = iter([9.0, 9.0, 0.001, 0.005, 0.003])

    def work():
        clock[0] += next(durations)

    assert timer("cpu")(work, repeats=3, warmup=2) == pytest.approx(3.0)


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 0.05 < Meter().peak_memory_gib() < 64


def test_peak_memory_of_a_gpu_adds_the_pools_of_graphs_and_survives_a_restart(monkeypatch):
    """torch sees a graph's memory while it is captured and never again."""
    counted = [3 * 2**30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counted[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: counted.__setitem__(0, 2**30))
    meter = Meter("cuda")
    meter.restart_peak()
    assert meter.peak_memory_gib() == 3 and meter.peak_memory_gib(since_restart=True) == 1
    assert meter.peak_memory_gib(2**29, since_restart=True) == 1.5
    meter.restart_peak(4 * 2**30)
    assert meter.peak_memory_gib(2**29) == 5


@pytest.mark.gpu
def test_a_phase_never_waits_for_the_gpu():
    meter = Meter("cuda")
    x = torch.ones(2000, 2000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            with meter.phase("mix"):
                x = x @ x * 1e-4
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    meter.interval(20)
    assert meter.counts["mix"] == 20 and meter.seconds["mix"] > 0
