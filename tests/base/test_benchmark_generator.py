"""The generator's benchmark: techniques side by side, each peer at its own best batch, one UNet call apart."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import batches, generator, harness, inputs, peers, precompile
from benchmarks.inputs import Setting
from benchmarks.techniques import Bench
from tests.tiny import pipeline_folder

SETTING = Setting(images=4, num_inference_steps=6)


@pytest.fixture(scope="module")
def pipeline():
    return inputs.load(str(pipeline_folder()), torch.device("cpu"))


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def only_peers(self, name: str) -> None:
    if name != "diffusers, compiled + channels_last":
        raise peers.Unavailable(name, "no compiler")


@pytest.fixture
def clock(monkeypatch):
    """A clock of one number that stands still but for what a test adds."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def test_da_fusions_loop_writes_one_png_an_image(pipeline, tmp_path):
    sources = [Image.fromarray(row.numpy()) for row in inputs.smooth_images(3, 48)]
    peers.da_fusion(pipeline, sources, inputs.prompts(3), SETTING, tmp_path)(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aug-0.png", "aug-1.png"]
    assert Image.open(tmp_path / "aug-1.png").size == (32, 32)


def test_batches_make_as_many_images_as_asked(pipeline):
    images = inputs.smooth_images(4, 32).permute(0, 3, 1, 2).div(255)
    call = peers.batched(peers.image_to_image(pipeline, SETTING), images, inputs.prompts(4), 2, SETTING)
    assert call(2).shape == (2, 32, 32, 3) and call(4).dtype == torch.uint8


def test_without_a_gpu_xformers_is_a_technique_with_a_reason(pipeline):
    own = inputs.own_copy(pipeline)
    with pytest.raises(peers.Unavailable) as caught:
        peers.with_xformers(peers.image_to_image(own, SETTING), "diffusers, xformers")
    assert caught.value.technique == "diffusers, xformers" and caught.value.reason


def test_generator_ends_in_rows_and_ratios(tmp_path, capsys):
    out = tmp_path / "generator.csv"
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "4", "--batch", "2"]
    arguments += ["--dtype", "fp32"]
    arguments += ["--blocks", "2", "--no-compile", "--da-fusion-images", "1", "--out", str(out)]
    arguments += ["--unet-rows", "6"]
    generator.main(arguments)
    document = last_line(capsys)
    assert document["ratios"].keys() == {"da_fusion_loop", "diffusers_best_batch"}
    peers_left_out = {"diffusers, xformers", "diffusers, compiled + channels_last"}
    own_left_out = {"slots, attention tuned", "slots, compiled", "slots, compiled, Triton kernels"}
    own_left_out |= {"slots, compiled, preset fast"}
    assert document["skipped"].keys() == peers_left_out | own_left_out
    assert document["tick"]["rows"] == 4
    rows = {row["technique"]: row for row in rows_of(out)}
    calls = {"one UNet call, 4 rows, guided, slots", "one UNet call, 6 rows, slots"}
    assert rows.keys() == {"DA-Fusion's loop", "diffusers", "slots"} | document["skipped"].keys() | calls
    for name in calls:
        row = rows[name]
        assert float(row["mfu_pct"]) > 0 and float(row["unet_evaluations_per_s"]) > 0 and not row["images_per_s"]
    assert document["unet_call"]["rows"] == 6 and "batch 2 as asked" in rows["diffusers"]["switches"]
    assert all(row["quality"].startswith("skipped: ") for name, row in rows.items() if name in document["skipped"])
    assert not list(tmp_path.glob("*.partial.json"))
    slots, loop = rows["slots"], rows["DA-Fusion's loop"]
    assert float(slots["unet_evaluations_per_s"]) == pytest.approx(50 * float(slots["images_per_s"]), rel=1e-3)
    assert float(slots["floor_pct"]) == pytest.approx(float(slots["mfu_pct"]), rel=0.02)
    assert float(slots["quality"].split()[1]) > 80 and slots["blocks"] == "2"
    ratio = float(slots["images_per_s"]) / float(loop["images_per_s"])
    assert document["ratios"]["da_fusion_loop"] == pytest.approx(ratio, rel=1e-2)


def test_what_is_ready_is_kept_before_the_first_block(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "alternate", stopped)
    out = tmp_path / "generator.csv"
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "2", "--batch", "2"]
    with pytest.raises(KeyboardInterrupt):
        generator.main([*arguments, "--no-compile", "--only", "slots", "--only", "diffusers", "--out", str(out)])
    kept = json.loads((tmp_path / "generator.partial.json").read_text())
    assert [row["technique"] for row in kept["ready"]] == ["slots", "diffusers"] and kept["commit"]
    assert all(row["images_per_s"] > 0 and row["batch"] == 2 for row in kept["ready"])


def test_only_the_techniques_asked_for_are_measured(capsys):
    arguments = [
        "--device",
        "cpu",
        "--pipeline",
        str(pipeline_folder()),
        "--images",
        "2",
        "--batch",
        "2",
        "--blocks",
        "1",
    ]
    document = generator.main(
        [*arguments, "--unet-rows", "0", "--out", "none", "--only", "slots", "--only", "diffusers"]
    )
    assert {row["technique"] for row in document["rows"]} == {"slots", "diffusers"} and not document["skipped"]
    with pytest.raises(SystemExit):
        generator.main([*arguments, "--only", "slot"])
    assert "known are slots; diffusers;" in capsys.readouterr().err


def test_compiled_techniques_are_compiled_ahead_at_the_batches_they_will_run():
    options = generator._parse(["--device", "cuda", "--pipeline", "random", "--images", "32"])
    names = dict.fromkeys(("slots", "slots, compiled", "diffusers, compiled + channels_last"))
    bench = SimpleNamespace(
        makers=lambda: names, device=torch.device("cuda"), options=options, rows=8, batches_to_compile=lambda: (16, 32)
    )
    bench.tune = lambda: setattr(bench, "found", {"16x64x64x8x40": "sdpa_cudnn"})
    found = precompile.commands(bench)
    assert list(found) == [("slots, compiled", 8), *(("diffusers, compiled + channels_last", b) for b in (16, 32))]
    for (name, batch), line in found.items():
        again = generator._parse(line[3:])
        assert (again.only, again.batch) == ([name], batch)
        assert again.compile_only and again.out is None and (again.images, again.pipeline) == (32, "random")
        assert json.loads(again.found) == bench.found, "timed beside each other they would take others"
    bench.device = torch.device("cpu")
    assert not precompile.commands(bench), "a CPU has no cores left for it"


def test_what_cannot_be_compiled_ahead_is_told_and_costs_nothing_else(monkeypatch, capsys):
    lines = {("ab", code): [sys.executable, "-c", f"raise SystemExit({code})"] for code in (0, 3)}
    monkeypatch.setattr(precompile, "commands", lambda bench: lines)
    bench = SimpleNamespace(budget=harness.Budget(0), too_late=set())
    assert precompile.precompile(bench) > 0 and not bench.too_late
    assert "compiling ab, 3 ahead failed with exit code 3" in capsys.readouterr().out


class Shrinking:
    """A budget of ten seconds, 0.7 s shorter at every look."""

    seconds, last = 10.0, 10.0

    @property
    def left(self) -> float:
        self.last -= 0.7
        return self.last


def test_compiling_ahead_ends_where_the_blocks_need_the_rest_of_the_budget(monkeypatch, capsys):
    begun, names = [], ("slots, compiled", "diffusers, compiled + channels_last")
    lines = {(name, 8): [sys.executable, "-c", "import time; time.sleep(60)"] for name in names}
    lines |= {(name, 16): lines[name, 8] for name in names}
    real = precompile.subprocess.Popen
    monkeypatch.setattr(precompile.subprocess, "Popen", lambda *a, **k: begun.append(real(*a, **k)) or begun[-1])
    monkeypatch.setattr(precompile, "commands", lambda bench: dict(lines))
    monkeypatch.setattr(precompile, "AT_ONCE", 2)
    monkeypatch.setattr(precompile, "LEAST_S", 0.0)
    bench = SimpleNamespace(budget=Shrinking(), too_late=set())
    precompile.precompile(bench)
    assert 4.9 < bench.budget.last < 6.3, "the blocks' 33 % and 30 % for what comes before them"
    assert bench.too_late == lines.keys()
    assert len(begun) == 2 and all(process.poll() is not None for process in begun), "nothing runs beside the blocks"
    assert "no time left to compile" in capsys.readouterr().out
    monkeypatch.setattr(precompile, "LEAST_S", 9.0)
    bench = SimpleNamespace(budget=harness.Budget(20.0), too_late=set())
    assert precompile.precompile(bench) == 0 and len(begun) == 2, "not even begun"
    assert bench.too_late == set(list(lines)[1:]), "the first when its turn comes"


def test_one_technique_alone_is_not_compiled_ahead(monkeypatch):
    monkeypatch.setattr(precompile, "commands", lambda bench: {("slots, compiled", 8): ["no such program"]})
    assert precompile.precompile(SimpleNamespace(budget=harness.Budget(0), too_late=set())) == 0


class Passing:
    """A clock that sleeping alone moves, the budget of a benchmark on it, and processes that take a time of it."""

    def __init__(self, seconds, each):
        self.now, self.seconds, self.each = 0.0, seconds, each

    @property
    def left(self):
        return self.seconds - self.now

    def sleep(self, seconds):
        self.now += seconds

    def begin(self, *_, **__):
        ends = self.now + self.each
        return SimpleNamespace(poll=lambda: 0 if self.now >= ends else None, kill=lambda: None, wait=lambda: None)


@pytest.mark.parametrize(("seconds", "late"), [(20.0, {("b", 8)}), (30.0, set()), (10.0, {("b", 8)})])
def test_no_process_is_begun_that_would_have_to_be_stopped(seconds, late, monkeypatch):
    """Of 20 s some 7 are there beside the blocks' share and the rest: one process of 1.5 s, no second that may take 6."""
    passing = Passing(seconds, each=1.5)
    monkeypatch.setattr(precompile, "commands", lambda bench: {("a", 8): ["a"], ("b", 8): ["b"]})
    monkeypatch.setattr(precompile, "AT_ONCE", 1)
    monkeypatch.setattr(precompile, "LEAST_S", 6.0)
    monkeypatch.setattr(precompile.subprocess, "Popen", passing.begin)
    monkeypatch.setattr(precompile.time, "sleep", passing.sleep)
    monkeypatch.setattr(precompile.time, "perf_counter", lambda: passing.now)
    bench = SimpleNamespace(budget=passing, too_late=set())
    took = precompile.precompile(bench)
    begun = 0 if seconds == 10 else 2 - len(late)  # of 10 s none: the first is compiled when its turn comes
    assert bench.too_late == late and 1.5 * begun <= took <= 1.8 * begun


def test_what_there_was_no_time_to_compile_ahead_is_not_compiled_later():
    options = SimpleNamespace(compile=True, batch=0, images=64)
    bench = SimpleNamespace(options=options, device=torch.device("cuda"), batch=16, rows=8)
    bench.batches_to_compile = lambda: Bench.batches_to_compile(bench)
    bench.too_late = {("diffusers, compiled + channels_last", 32), ("slots, compiled", 8)}
    assert Bench.batches_to_compile(bench) == (16,)
    Bench._need_compiler(bench, "diffusers, compiled + channels_last")
    with pytest.raises(peers.Unavailable, match="slots, compiled: budget"):
        Bench._need_compiler(bench, "slots, compiled")
    bench.too_late = {("diffusers, compiled + channels_last", batch) for batch in (16, 32)}
    with pytest.raises(peers.Unavailable, match="channels_last: budget"):
        Bench._need_compiler(bench, "diffusers, compiled + channels_last")


def test_to_compile_alone_measures_nothing():
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "2", "--batch", "2"]
    assert generator.main([*arguments, "--out", "none", "--only", "slots", "--compile-only"]) == {"slots": 2}


def test_each_peer_runs_at_its_own_best_batch_and_its_row_says_what_was_tried(tmp_path, monkeypatch, capsys):
    best = {"diffusers": 2, "diffusers, xformers": 4}
    monkeypatch.setattr(batches, "best_batch", lambda *a: (best[a[3]], f"batches tried: 2, 4 for {a[3]}"))
    monkeypatch.setattr(peers, "with_xformers", lambda peer, technique: peer)  # a stand-in that runs on a CPU
    monkeypatch.setattr(peers, "compiled", lambda peer: peer)
    monkeypatch.setattr(Bench, "_need_compiler", only_peers)
    monkeypatch.setattr(Bench, "batches_to_compile", lambda self: (2, 4))
    rates = {2: 0.5, 4: 9.0}
    monkeypatch.setattr(batches, "compiled_rates", lambda call_at, tried, *_: {b: rates[b] for b in tried})
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "4", "--blocks", "1"]
    out = tmp_path / "generator.csv"
    generator.main([*arguments, "--da-fusion-images", "1", "--unet-rows", "0", "--out", str(out)])
    rows = {row["technique"]: row for row in rows_of(out)}
    assert {name: rows[name]["batch"] for name in best} == {"diffusers": "2", "diffusers, xformers": "4"}
    for name in best:
        assert f"batches tried: 2, 4 for {name}" in rows[name]["switches"]
        assert float(rows[name]["quality"].split()[1]) > 80, "the same images, at whatever batch"
    compiled = rows["diffusers, compiled + channels_last"]
    assert compiled["batch"] == "4" and "batches tried: 2 0.5 images/s, 4 9 images/s" in compiled["switches"]
    assert all(rows[name]["images_a_block"] == "4" for name in ("slots", *best)), "whole batches of every candidate"
    assert last_line(capsys)["ratios"].keys() >= {"diffusers_xformers", "diffusers_compiled"}


def test_a_compiled_pipeline_is_tried_at_as_many_batches_as_there_is_time_for(clock):
    def call_at(batch):
        first = [True]

        def call(count):
            assert count == batch
            if batch == 64:
                raise torch.OutOfMemoryError("no room")
            clock[0] += 100.0 * first.pop() if first else batch / (batch + 8)

        return call

    device = torch.device("cpu")
    found = batches.compiled_rates(call_at, (16, 32), device, lambda: float("inf"))
    assert found == {16: pytest.approx(24), 32: pytest.approx(40)}
    assert batches.fastest(found) == (32, "batches tried: 16 24 images/s, 32 40 images/s")
    short = batches.compiled_rates(call_at, (16, 32), device, lambda: 199.0)  # the engine has to compile after it
    assert short == {16: pytest.approx(24), 32: "no time"} and batches.fastest(short)[0] == 16
    large = batches.compiled_rates(call_at, (32, 64), device, lambda: float("inf"))
    assert batches.fastest(large) == (32, "batches tried: 32 40 images/s, 64 does not fit")
    with pytest.raises(torch.OutOfMemoryError):
        batches.compiled_rates(call_at, (64,), device, lambda: float("inf"))


def test_a_compiled_pipelines_other_batch_is_the_next_one():
    gpu = torch.device("cuda")
    assert batches.next_to(16, 64, gpu) == (32,) and batches.next_to(64, 64, gpu) == (32,)
    assert batches.next_to(8, 8, gpu) == () and batches.next_to(3, 3, gpu) == ()
    bench = SimpleNamespace(options=SimpleNamespace(batch=0, images=64), device=gpu, batch=32, too_late=set())
    assert Bench.batches_to_compile(bench) == (32, 64)
    bench.device = torch.device("cpu")
    assert Bench.batches_to_compile(bench) == (32, 16), "the next smaller where there is no larger"
    bench.device, bench.options.batch = gpu, 32
    assert Bench.batches_to_compile(bench) == (32,), "asked for"


def test_the_best_batch_is_searched_within_its_share_of_the_time(pipeline, clock, monkeypatch):
    costs = iter([8.0, 4.0, 3.99])  # an image at 2, 4 and 8; the last is no better than the one before by 2 %

    def compare(parts, device, **_):
        clock[0] += 10.0
        cost = next(costs)
        batch = {8.0: 2, 4.0: 4, 3.99: 8}[cost]
        calls = SETTING.calls(pipeline.scheduler)[0]
        ms = {"unet": cost * batch / calls, "encode": 0.0, "decode": 0.0}
        timings = {name: SimpleNamespace(median_ms=value) for name, value in ms.items()}
        return SimpleNamespace(failures={}, timings=timings)

    monkeypatch.setattr(batches, "BATCHES", {"cpu": (2, 4, 8)})
    monkeypatch.setattr(harness, "compare", compare)
    batch, tried = batches.best_batch(pipeline, SETTING, 8, "diffusers", float("inf"))
    assert batch == 4 and tried == "batches tried: 2 8 ms an image, 4 4 ms an image, 8 3.99 ms an image"
    costs = iter([8.0])
    assert batches.best_batch(pipeline, SETTING, 8, "diffusers", 40.0) == (
        2, "batches tried: 2 8 ms an image, 4 no time, 8 no time",
    )  # fmt: skip


def test_a_budget_takes_images_from_the_blocks_not_blocks():
    candidates = [generator.Candidate(name, None, 8, False, "", "", batch_s=1.0) for name in "ab"]
    assert generator.images_a_block(candidates, 64, 8, 5, float("inf")) == 64
    assert generator.images_a_block(candidates, 64, 8, 5, 45.0) == 24  # 5 rounds x 3 blocks x 3 batches of 1 s
    assert generator.images_a_block(candidates, 64, 8, 5, 0.0) == 8
    candidates[1].batch = 32
    assert generator.images_a_block(candidates, 64, 8, 5, 45.0) == 32, "whole batches of every candidate"


def test_the_first_candidate_is_compared_with_itself():
    calls = []
    candidates = [
        generator.Candidate(name, lambda count, name=name: calls.append((name, count)), 2, False, "", "")
        for name in "ab"
    ]
    found = generator.alternate(candidates, 6, "cpu", 2, 60.0)
    assert calls == [("a", 6), ("b", 6), ("a", 6)] * 2 and len(found.timings["b"].seconds) == 2


def test_a_technique_that_fails_costs_no_other():
    def fails(count):
        if count > 2:
            raise torch.OutOfMemoryError("no room")

    calls = {"a": lambda count: None, "b": fails}
    candidates = [generator.Candidate(name, call, 2, False, "", "") for name, call in calls.items()]
    rounds = []
    found = generator.alternate(candidates, 6, "cpu", 2, 60.0, rounds.append)
    assert found.timings.keys() == {"a"} and found.failures == {"b": "no room"} and len(rounds) == 2

    def unavailable():
        raise peers.Unavailable("c", "not installed")

    def wrong():
        raise RuntimeError("does not compile\nand a trace")

    makers = {"a": lambda: candidates[0], "c": unavailable, "d": wrong}
    bench = SimpleNamespace(makers=lambda: makers, skipped={}, batch=2, device=torch.device("cpu"), wait=lambda: None)
    assert generator.ready(bench, harness.Budget(0)) == [candidates[0]]
    assert bench.skipped == {"c": "not installed", "d": "failed: RuntimeError: does not compile"}
    bench.skipped.clear()
    spent = SimpleNamespace(seconds=100.0, left=30.0)  # what is left is for the blocks; one is always made ready
    assert generator.ready(bench, spent) == [candidates[0]] and set(bench.skipped.values()) == {"budget"}
