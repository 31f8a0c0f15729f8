"""The benchmark harness: what it times, what it writes, and that it never rewrites."""

import csv
import json
import time

import pytest
import torch

from benchmarks import harness, ledger


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that stands still but for `clock.sleep`, so that no other process can disturb these tests."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock.now)
    return clock


def test_candidates_alternate_and_the_baseline_runs_twice_a_round(clock):
    calls = []

    def named(name, seconds):
        def call():
            calls.append(name)
            clock.sleep(seconds)

        return call

    outcome = harness.compare({"a": named("a", 0.004), "b": named("b", 0.002)}, blocks=3, block_seconds=0.0)
    assert calls == ["a", "b"] + ["a", "b", "a"] * 3
    assert outcome.speedup("a") == 1 and outcome.speedup("b") == pytest.approx(2)
    assert len(outcome.timings["b"].seconds) == 3 and outcome.spread_pct == 0


def test_the_spread_of_the_baseline_with_itself_is_told(clock):
    durations = iter([1, 1, 1, 1.0, 1.5])  # a warm-up call, then a block and its repetition, twice

    outcome = harness.compare({"a": lambda: clock.sleep(next(durations))}, blocks=2, block_seconds=0.0)
    assert outcome.spread_pct == pytest.approx(25)


def test_a_block_repeats_a_fast_candidate_until_it_lasts(clock):
    calls = []
    harness.compare({"fast": lambda: (calls.append(1), clock.sleep(0.001))}, blocks=2, block_seconds=0.02)
    assert len(calls) == 2 + 2 * (20 + 20)


def test_rounds_end_with_the_budget_but_one_is_always_run(clock):
    for allowed, rounds in ((0.0, 1), (0.05, 3), (9.0, 5)):
        outcome = harness.compare({"slow": lambda: clock.sleep(0.01)}, block_seconds=0, max_seconds=allowed)
        assert len(outcome.timings["slow"].seconds) == rounds
    budget = harness.Budget(0.01)
    clock.sleep(0.02)
    assert budget.left < 0 and harness.Budget(0).left == float("inf")


def test_rounds_end_where_the_caller_has_enough_of_them(clock):
    rounds, calls = [], []
    call = lambda: (calls.append(1), clock.sleep(0.01))  # noqa: E731 - one use
    outcome = harness.compare({"a": call}, block_seconds=0, enough=lambda s: rounds.append(s) or len(rounds) == 2)
    assert len(outcome.timings["a"].seconds) == 2 and rounds == [pytest.approx(0.02)] * 2
    assert len(calls) == 1 + 2 * 2, "one warm-up where a block is one call; the baseline runs twice a round"


def test_what_precedes_a_call_is_no_part_of_its_time_but_of_how_long_a_block_lasts(clock):
    events = []

    def before():
        events.append("before")
        clock.sleep(0.009)

    def call():
        events.append("call")
        clock.sleep(0.001)

    outcome = harness.compare({"a": call}, blocks=2, block_seconds=0.05, before=before)
    assert outcome.timings["a"].median_ms == pytest.approx(1.0)
    assert events[-10:] == ["before", "call"] * 5 and events.count("call") == 2 + 4 * 5


def test_the_process_clock_does_not_count_waiting():
    waited = harness.block(lambda: time.sleep(0.02), 1, "cpu", clock="process")
    assert waited < 0.01


def test_out_of_memory_is_an_outcome_of_its_candidate():
    def exhausts():
        raise torch.OutOfMemoryError("no room for 17 GiB\nand a trace")

    outcome = harness.compare({"big": exhausts, "small": lambda: None}, blocks=1, block_seconds=0)
    assert outcome.failures == {"big": "no room for 17 GiB"} and set(outcome.timings) == {"small"}
    assert outcome.baseline == "small", "what ratios are relative to is the first that ran"
    with pytest.raises(ValueError, match="no candidate of big could run"):
        harness.compare({"big": exhausts})


def test_quantiles_over_blocks():
    row = harness.Timing("x", tuple(i / 1e3 for i in range(1, 12))).row()
    assert row == {"median_ms": 6.0, "p10_ms": 2.0, "p90_ms": 10.0, "blocks": 11}


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    torch.ones(2**20).sum()
    needed = harness.peak_mib(lambda: torch.ones(16 * 2**20).sum())
    if needed is None:
        pytest.skip("the system does not tell the high-water mark of a process")
    assert 60 < needed < 90


def test_what_a_graph_replays_can_be_launched_to_see_what_it_holds():
    def work():
        return 1

    assert harness.launched(harness.replayed(work)) is work and harness.launched(work) is work


def test_rows_are_appended_and_a_changed_header_is_refused(tmp_path):
    path = tmp_path / "sub" / "rows.csv"
    ledger.append_rows(path, [{"a": 1, "b": "x, y"}])
    before = path.read_text()
    ledger.append_rows(path, [{"a": 2, "b": "z"}])
    assert path.read_text().startswith(before)
    assert list(csv.DictReader(path.open())) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z"}]
    with pytest.raises(ValueError, match="write to another file"):
        ledger.append_rows(path, [{"a": 3, "c": 1}])
    assert len(path.read_text().splitlines()) == 3


def test_a_column_that_is_new_is_empty_in_the_rows_before(tmp_path):
    path = tmp_path / "rows.csv"
    ledger.append_rows(path, [{"a": 1, "b": "x, y"}])
    ledger.append_rows(path, [{"a": 2, "new": "z", "b": ""}])
    rows = list(csv.DictReader(path.open()))
    assert rows == [{"a": "1", "new": "", "b": "x, y"}, {"a": "2", "new": "z", "b": ""}]
    with pytest.raises(ValueError, match="write to another file"):
        ledger.append_rows(path, [{"a": 3, "b": "without what the file has"}])
    assert list(csv.DictReader(path.open())) == rows and [one.name for one in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("name", ["generator_cpu", "step_cpu", "suite_cpu", "kernels_cpu"])
def test_committed_results_take_rows_under_the_conditions_of_today(name, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text((harness.RESULTS / f"{name}.csv").read_text())
    before = list(csv.DictReader(path.open()))
    own = [column for column in before[0] if column not in harness.CONDITIONS]
    ledger.append_rows(path, [dict.fromkeys((*harness.CONDITIONS, *own), "x")])
    *old, new = csv.DictReader(path.open())
    assert [{column: row[column] for column in before[0]} for row in old] == before and set(new.values()) == {"x"}


def test_peak_memory_of_a_gpu_adds_the_pools_of_graphs_that_a_call_replays(monkeypatch):
    counted = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 2**20,
        "max_memory_allocated": 3 * 2**20,
    }
    for function, value in counted.items():
        monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
    assert harness.peak_mib(lambda: None, "cuda") == 2
    assert harness.peak_mib(lambda: None, "cuda", pool_bytes=5 * 2**20) == 7


def test_conditions_name_commit_device_and_versions():
    row = harness.conditions("cpu")
    assert tuple(row) == harness.CONDITIONS
    assert row["diffusers"] and isinstance(row["xformers"], str)
    assert row["torch"].startswith("2.") and "cores" in row["device"] and len(row["date"]) == 16


def test_the_last_line_is_one_json_document(capsys):
    harness.finish({"img_per_s": 1.5, "where": harness.RESULTS})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["img_per_s"] == 1.5
