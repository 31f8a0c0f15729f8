"""The benchmarks: what they count, what they compare with, and that each ends in rows and one JSON document.

Figures are not judged here; a tiny pipeline of random weights proves the paths.
"""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import correctness, generator, harness, inputs, quality, step, stepper, suite
from benchmarks.inputs import Setting
from benchmarks.session import session
from benchmarks.stepper import Stepper
from tests.base.tinyset import write_config
from tests.tiny import pipeline_folder

SETTING = Setting(images=4, num_inference_steps=6)


@pytest.fixture(scope="module")
def pipeline():
    return inputs.load(str(pipeline_folder()), torch.device("cpu"))


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_the_published_setting_takes_25_guided_calls_as_diffusers_counts():
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    assert Setting().calls(scheduler) == (25, 25)
    assert Setting(guidance_scale=1.0).calls(scheduler) == (25, 0)
    assert Setting(solver="dpmpp_2m", num_inference_steps=20, guided_steps=17).calls(scheduler) == (10, 7)


def test_work_is_counted_on_the_modules_with_attention_in_it(pipeline):
    work = inputs.count_work(pipeline)
    convolution = pipeline.unet.conv_in
    size = pipeline.latent_size
    assert work.unet > 2 * convolution.weight.numel() * size * size and work.decode > work.unet / 100
    own, peer = (work.of_image(SETTING, pipeline.scheduler, peer=peer) for peer in (False, True))
    assert own == 6 * work.unet + work.decode and peer - own == work.encode + 2 * work.text
    tokens, width = 64, 8
    q = torch.randn(1, 1, tokens, width)
    with inputs.FlopCounterMode(display=False) as counter, inputs.sdpa_kernel(inputs.SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * tokens * tokens * width


def test_an_own_copy_shares_no_weight_with_its_pipeline(pipeline):
    own = inputs.own_copy(pipeline, channels_last=True)
    own.unet.conv_in.weight.data.add_(1)
    assert not torch.equal(own.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert own.text_encoder is pipeline.text_encoder


def test_a_straight_line_is_told_from_a_bend():
    grid = (0.0, 1.0, 2.0, 4.0)
    line = step.straight_line(grid, [10.0, 13.0, 16.0, 22.0])
    assert line["ms_an_image"] == pytest.approx(3) and line["ms_without_generation"] == pytest.approx(10)
    assert line["r2"] == 1 and line["largest_deviation_pct"] == pytest.approx(0, abs=1e-6)
    assert step.straight_line(grid, [10.0, 11.0, 14.0, 26.0])["r2"] < 0.97


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("benchmark"))


def test_the_step_is_measured_at_every_ratio(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "session", lambda settings: session(settings, tiny))
    case = step.Case("tiny 32 px", {"run.device": "cpu"}, (0.0, 1.0, 2.0), 1.0, least_s=1.0)
    monkeypatch.setattr(step, "cases", lambda options: [case])
    monkeypatch.setattr(step, "FEW_SHOTS", 3)
    step.main(["--device", "cpu", "--blocks", "1", "--steps", "2", "--out", str(tmp_path / "step.csv")])
    document = last_line(capsys)
    assert [row["images_per_step"] for row in document["rows"]] == [0.0, 1.0, 2.0]
    for row in document["rows"]:
        assert row["bytes_written"] == 0 and row["host_syncs"] == "" and "nan" not in row["quality"]
        assert 0 < row["overhead_pct"] < 100 and row["overlap_bound"] >= 1
        assert row["bookkeeping_ms"] <= row["generate_ms"] and 0 <= row["generation_share_pct"] <= 100
    assert document["rows"][2]["generate_alone_ms"] > document["rows"][0]["generate_alone_ms"] == 0
    assert document["bytes_written"] == 0 and document["host_syncs"] is None
    assert document["constant_in_train_images"]["step_ms"].keys() == {"12", "24"}
    written = rows_of(tmp_path / "step.csv")
    assert len(written) == 5 and [row["train_images"] for row in written[3:]] == ["12", "24"]
    assert all(float(row["step_ms"]) > 0 and row["images_per_step"] == "1.0" for row in written[3:])
    assert tuple(rows_of(tmp_path / "step.csv")[0])[len(harness.CONDITIONS) :] == step.COLUMNS


def test_rows_are_written_as_they_come_and_no_round_begins_that_leaves_no_time_for_them(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "session", lambda settings: session(settings, tiny))
    case = step.Case("tiny 32 px", {"run.device": "cpu"}, (0.0, 1.0), 1.0, least_s=0.001)
    monkeypatch.setattr(step, "cases", lambda options: [case])
    row_of = step._row

    def killed_at_the_second(case, images, stepper, found):
        if images:
            raise KeyboardInterrupt
        return row_of(case, images, stepper, found)

    monkeypatch.setattr(step, "_row", killed_at_the_second)
    arguments = ["--device", "cpu", "--steps", "2", "--no-train-images", "--out", str(tmp_path / "step.csv")]
    with pytest.raises(KeyboardInterrupt):
        step.main([*arguments, "--budget-s", "0.1"])
    (row,) = rows_of(tmp_path / "step.csv")
    assert row["blocks"] == "1" and row["images_per_step"] == "0.0"


def test_modes_are_compared_step_by_step():
    row = {"case": "a", "images_per_step": 2.0}
    rows = [row | {"mode": "sequential", "step_ms": 12.0}, row | {"mode": "stream", "step_ms": 10.0}]
    assert step.stream_over_sequential(rows) == {"a, 2": 1.2}
    assert step.stream_over_sequential(rows[:1]) == {}


def test_a_case_that_fails_or_has_no_time_left_is_a_row(monkeypatch, tmp_path, capsys):
    def measure(case, options, seconds):
        raise RuntimeError("no room")

    monkeypatch.setattr(step, "measure", measure)
    step.main(["--device", "cpu", "--no-train-images", "--out", str(tmp_path / "step.csv")])
    document = last_line(capsys)
    assert list(document["skipped"].values()) == ["failed: RuntimeError: no room"]
    assert document["constant_in_train_images"] is None
    monkeypatch.setattr(harness.Budget, "left", property(lambda budget: -1.0))
    step.main(["--device", "cpu", "--budget-s", "1", "--out", str(tmp_path / "step.csv")])
    document = last_line(capsys)
    assert list(document["skipped"].values()) == ["budget"]
    assert document["constant_in_train_images"] == {"skipped": "budget"}
    failed, late = rows_of(tmp_path / "step.csv")
    assert failed["quality"] == "skipped: failed: RuntimeError: no room" and late["quality"] == "skipped: budget"


class Side:
    """An overlap that runs what is pending when it is launched, without a device."""

    def __init__(self, mode, device, timed=None):
        self.calls = []

    def generate(self, advance):
        self.calls.append("generate")
        self.pending = advance

    def launch(self):
        self.calls.append("launch")
        self.pending()

    def join(self):
        self.calls.append("join")


def test_in_stream_mode_generation_starts_once_the_batch_is_mixed(tiny, monkeypatch):
    overlaps = []
    monkeypatch.setattr(stepper, "Overlap", lambda *given: overlaps.append(Side(*given)) or overlaps[-1])
    with session(step.COMMON, tiny) as (_job, state):
        own = Stepper(state, 1, "stream")
        before = state.generator.slots.counts["ticks"]
        own.at(2.0)()
        assert overlaps[0].calls == [*["generate", "launch"] * own.steps(2.0), "join"], (
            "nothing is left beside the block"
        )
        assert state.generator.slots.counts["ticks"] > before


def test_bytes_written_are_seen(tiny, tmp_path):
    with session(step.COMMON, tiny) as (_job, state):
        own = Stepper(state, 1)
        assert own.watched(1.0).bytes_written == 0
        advance = state.generator.advance

        def writing(number):
            (tmp_path / "image.png").write_bytes(b"0" * 5000)
            advance(number)

        state.generator.advance = writing
        assert own.watched(1.0).bytes_written >= 5000


def test_quality_reads_val_only_and_judges_each_choice(tiny, monkeypatch, tmp_path, capsys):
    choices = {"exact": {}, "max_uses 4": {"generation.max_uses": 4, "generation.images_per_step": 3.0}}
    monkeypatch.setattr(quality, "CHOICES", choices)
    arguments = ["--device", "cpu", "--config", str(tiny), "--choices", "exact,max_uses 4", "--steps", "3"]
    quality.main([*arguments, "--out", str(tmp_path / "quality.csv")])
    document = last_line(capsys)
    assert document["within_tolerance"].keys() == {"max_uses 4"}
    for row in document["rows"]:
        assert 0 <= row["agreement"] <= 1 and 0 <= row["val_accuracy"] <= 1 and 0 <= row["near_ood_auroc"] <= 1
        assert row["val_images"] == 16 and row["images_judged"] > 0
    assert document["rows"][1]["unet_rows_a_step"] > document["rows"][0]["unet_rows_a_step"]
    assert tuple(document["rows"][0]) == quality.COLUMNS


def test_a_choice_that_fails_is_a_row_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    def fails(settings, config):
        raise RuntimeError("no TAESD")

    monkeypatch.setattr(quality, "session", fails)
    quality.main(["--device", "cpu", "--choices", "exact,max_uses 6", "--out", str(tmp_path / "quality.csv")])
    document = last_line(capsys)
    assert document["rows"] == [] and document["within_tolerance"] == {}
    assert [row["score"] for row in rows_of(tmp_path / "quality.csv")] == [
        "skipped: failed: RuntimeError: no TAESD"
    ] * 2


def test_the_quality_gate_fails_on_any_loss():
    exact = {"agreement": 0.9, "val_accuracy": 0.8, "near_ood_auroc": 0.7}
    assert quality._passes(exact | {"agreement": 0.88}, exact)
    for name in exact:
        assert not quality._passes(exact | {name: exact[name] - 0.05}, exact)


def test_correctness_fails_where_a_kernel_is_wrong(monkeypatch):
    def build(device, compiled, size):
        if size == 32:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access")
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        candidates = {"eager": lambda: (x,), "triton": lambda: (x * 1.01,)}
        return correctness.Case("views", "64", "float32", candidates, 1, lambda: (x.double(),))

    monkeypatch.setattr(correctness, "SWEEPS", {"views": SimpleNamespace(build=build, reduced=((32,), (64,)))})
    crashed, definition, kernel = correctness.kernel_checks(torch.device("cpu"))
    assert definition.passed and not kernel.passed and "1.00e-02" in kernel.found and kernel.of == "views"
    assert not crashed.passed and "illegal memory access" in crashed.found
    assert correctness._relative((torch.tensor([float("nan")]),), [torch.ones(1).double()]) == float("inf")


def test_correctness_covers_every_kernel_and_the_engine(pipeline, capsys):
    document = correctness.main(["--device", "cpu", "--pipeline", str(pipeline_folder())])
    assert document["passed"] and last_line(capsys)["passed"] and document["wrong"] == []
    for name in (*correctness.SWEEPS, "slots ddim", "slots dpmpp_2m"):
        assert any(check["name"].startswith(name) for check in document["checks"])


class TestSuite:
    @pytest.fixture(autouse=True)
    def results_in(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OUT", str(tmp_path))
        self.folder = tmp_path

    def replace_parts(self, monkeypatch, codes: dict[str, str]):
        """Parts that run a line of Python."""
        parts = tuple(suite.Part(name, 1.0, None, lambda document: document["text"]) for name in codes)
        monkeypatch.setattr(suite, "PARTS", parts)
        monkeypatch.setattr(
            suite, "command_of", lambda part, options, seconds: [sys.executable, "-c", codes[part.name]]
        )

    def test_parts_run_in_order_and_one_that_fails_costs_no_other(self, monkeypatch, capsys):
        done = 'print("a table"); print(\'{"text": "fine"}\')'
        self.replace_parts(monkeypatch, {"correctness": done, "generator": "raise SystemExit(3)", "kernels": done})
        assert suite.main(["--device", "cpu", "--only", "correctness,generator,kernels"])["passed"] is False
        document = last_line(capsys)
        assert [part["status"] for part in document["parts"].values()] == ["done", "failed: exit code 3", "done"]
        assert document["parts"]["kernels"]["summary"] == "fine"
        assert [row["part"] for row in rows_of(self.folder / "suite_cpu.csv")] == [
            "correctness",
            "generator",
            "kernels",
        ]
        assert json.loads((self.folder / "suite_cpu.json").read_text())["documents"]["kernels"] == {"text": "fine"}

    def test_nothing_that_runs_the_engine_is_timed_where_it_is_wrong(self, monkeypatch, capsys):
        wrong = 'print(\'{"text": "1 check", "wrong": ["engine", "views"]}\'); raise SystemExit(1)'
        self.replace_parts(monkeypatch, {"correctness": wrong, "step": "raise SystemExit(9)"})
        suite.main(["--device", "cpu"])
        assert last_line(capsys)["parts"]["step"]["status"] == "skipped: correctness failed for the engine"

    def test_a_wrong_op_is_left_out_of_the_kernels(self):
        options = suite._parse(["--device", "cpu"])
        options.wrong = ["views", "pixels"]
        arguments = suite._kernels(options, 60.0)
        assert arguments[arguments.index("--ops") + 1] == "supcon,guided_step,group_norm"

    def test_a_part_that_dies_or_says_too_little_loses_nothing_else(self, monkeypatch, capsys):
        codes = {"correctness": "import os; os.abort()", "kernels": "print('{\"rows\": 3')", "step": "print('{}')"}
        self.replace_parts(monkeypatch, codes)
        suite.main(["--device", "cpu"])
        parts = last_line(capsys)["parts"]
        assert parts["correctness"]["status"] == "failed: exit code -6"
        assert parts["kernels"]["status"] == "failed: exit code 0"
        assert parts["step"]["status"] == "done" and "no summary: KeyError" in parts["step"]["summary"]

    def test_what_does_not_fit_is_skipped_and_what_overstays_is_stopped(self, monkeypatch, capsys):
        monkeypatch.setattr(suite, "LEAST_S", 0.5)
        self.replace_parts(monkeypatch, {"generator": "import time; time.sleep(60)", "step": "pass"})
        suite.main(["--device", "cpu", "--budget-s", "1"])
        parts = last_line(capsys)["parts"]
        assert parts["generator"]["status"] == "failed: stopped, its share was spent"
        assert parts["step"]["status"] == "skipped: budget"

    def test_a_part_that_overstays_its_share_leaves_the_others_theirs(self, monkeypatch, capsys):
        monkeypatch.setattr(suite, "LEAST_S", 0.1)
        monkeypatch.setattr(suite, "CLOSING_S", 0.0)
        monkeypatch.setattr(suite, "OVERSTAY", 0.2)
        self.replace_parts(monkeypatch, {"generator": "import time; time.sleep(60)", "quality": "print('{}')"})
        suite.main(["--device", "cpu", "--only", "generator,quality", "--budget-s", "10"])
        parts = last_line(capsys)["parts"]
        assert parts["generator"]["status"] == "failed: stopped, its share was spent"
        assert 2 <= parts["generator"]["seconds"] < 8 and parts["quality"]["status"] == "done"

    def test_the_last_part_is_told_all_that_is_left(self, monkeypatch):
        told = {}
        monkeypatch.setattr(
            suite,
            "command_of",
            lambda part, _, seconds: told.update({part.name: seconds}) or [sys.executable, "-c", ""],
        )
        suite.main(["--device", "cpu", "--only", "generator,step", "--budget-s", "400"])
        assert 200 < told["generator"] <= 0.55 * 400 and 380 < told["step"] <= 390

    def test_every_part_has_a_script_that_takes_its_arguments(self):
        options = suite._parse(["--device", "cpu", "--pipeline", "/some/folder"])
        parsers = {"generator": generator._parse, "step": step._parse, "quality": quality._parse}
        for part in suite.PARTS:
            arguments = part.arguments(options, 60.0)
            assert part.name != "generator" or "16" in arguments  # reduced on a CPU
            if part.name in parsers:
                assert parsers[part.name](arguments).pipeline == "/some/folder"


def test_results_go_below_out_where_it_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    assert harness.results_file("step", "cpu") == harness.RESULTS / "step_cpu.csv"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert harness.results_file("step", "cuda") == tmp_path / "step_gpu.csv"
    assert harness.rows_file("", "step", "cpu") == tmp_path / "step_cpu.csv"
    assert harness.rows_file("none", "step", "cpu") is None
    assert harness.rows_file("mine.csv", "step", "cpu") == Path("mine.csv")
    assert harness.rows_file(str(tmp_path / ".."), "step", "cpu") == tmp_path / ".." / "step_cpu.csv", "into a folder"
