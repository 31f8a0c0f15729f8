"""check plans what a run really holds and writes, and finds what would stop it."""

import copy
import io
import json
import zipfile

import pytest
import torch

import trainer
from modules import state as checkpoints
from modules.commands import check
from modules.console import Console
from modules.diffusion.attention import layers_of
from modules.errors import ConfigError, DataError, OutOfMemory, StorageError
from modules.settings import with_settings
from modules.training import stages
from modules.training.job import Job
from modules.training.memory_plan import HELD, MemoryPlan, Part, memory_plan
from modules.workdir import Workdir
from tests.base.tinyset import tiny_config, write_config


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(report, text, folder) of a check of the tiny set, in which one file is broken."""
    folder = tmp_path_factory.mktemp("check")
    path = write_config(folder)
    with zipfile.ZipFile(folder / "tiny.zip") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["bolt/train-0-0.png"] = content["bolt/train-0-0.png"][:60]
    with zipfile.ZipFile(folder / "tiny.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    stream = io.StringIO()
    with pytest.raises(DataError, match="check: a run would stop at 1 bad files"):
        check.command(path, [], Console(stream), None, trainer.step)
    report = json.loads((folder / "runs" / "tiny" / "check" / "check.json").read_text())
    return report, stream.getvalue(), folder / "runs" / "tiny"


def test_data_found(checked):
    report, text, _ = checked
    assert report["sets"] == {"train": 23, "val": 16, "test": 24, "near_ood_val": 10, "near_ood_test": 10}
    assert report["classes"]["bolt"] == {"train": 5, "val": 4, "test": 6}
    assert [path for path, _ in report["bad_files"]] == ["bolt/train-0-0.png"]
    assert "1 files cannot be used; a run stops at them" in text and "bolt/train-0-0.png: " in text
    assert "written: " in text and "nothing found" not in text


def test_time_and_files(checked):
    report, text, folder = checked
    seconds = report["seconds"]
    assert seconds["contrastive"] == pytest.approx(12 * seconds["step_ms"] / 1e3)
    assert seconds["total"] == pytest.approx(sum(seconds[k] for k in ("tokens", "prefill", "contrastive", "features")))
    assert seconds["tokens"] > 0 and seconds["prefill"] > 0
    assert not (folder / "config.yaml").exists() and not (folder / "results.json").exists()
    assert "time, from" in text and "checkpoint: " in text and "of disk" in text


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with data, pipeline and tokens loaded, and its state with every ring full."""
    config, origins = tiny_config(
        tmp_path_factory.mktemp("plan"), generation={"prefill": 1.0, "ring_size": 24}, learning={"ema_decay": 0.9}
    )
    workdir = Workdir(config, origins)
    job = Job(config, workdir, Console(io.StringIO()))
    stages.load_data(job, lambda *_: None)
    stages.learn_tokens(job, lambda *_: None)
    state = stages.build(job, lambda *_: None)
    for _ in range(3):
        trainer.step(state)
    yield job, state
    workdir.close()


def test_plan_is_what_is_held(job):
    job, state = job
    plan = {part.name: part.bytes for part in memory_plan(job).parts}
    slots, pipeline = state.generator.slots, job.pipeline
    assert plan["reservoir"] == state.generator.reservoir.pixels_SHWC.nbytes
    assert plan["train images"] == job.sets.train.pixels_DHWC.nbytes
    assert plan["VAE moments of the train images"] == job.sources.moments_D8hw.nbytes
    assert plan["keys and values of prompts in flight"] == slots.in_flight.kv_RTX.nbytes
    assert plan["slots in flight"] == pytest.approx(
        sum(tensor.nbytes for tensor in slots.in_flight.state_dict().values()) + slots.ready_Q4hw.nbytes, rel=0.05
    )
    assert plan["UNet weights"] == sum(t.nbytes for t in (*pipeline.unet.parameters(), *pipeline.unet.buffers()))
    assert plan["encoder weights"] == sum(t.nbytes for t in state.encoder.state_dict().values())
    moments = state.optimizer.inner.state.values()
    assert plan["encoder optimizer state"] == sum(m["momentum_buffer"].nbytes for m in moments)


def test_checkpoint_weighs_what_was_said(job, tmp_path):
    job, state = job
    path = checkpoints.save_checkpoint(tmp_path, 1, state.state_dict())
    written = sum(file.stat().st_size for file in path.iterdir())
    assert memory_plan(job).checkpoint == pytest.approx(written, rel=0.1)


def test_working_memory_takes_turns_unless_overlapped():
    parts = (
        Part("reservoir", 10, "a"),
        Part("encoder training step", 50, "b", "working"),
        Part("UNet call", 70, "c", "working"),
        Part("VAE decode", 90, "d", "working"),
    )
    alone, beside = MemoryPlan(parts, False), MemoryPlan(parts, True)
    assert (alone.held, alone.working, alone.peak) == (10, 90, 100)
    assert beside.working == 50 + 90
    assert [part.name for part in alone.largest(2)] == ["VAE decode", "UNet call"]
    assert parts[0].kind == HELD


def test_on_a_gpu_the_plan_is_what_slots_are_fitted_to(job):
    """Generation's largest call beside a training step, as the fit holds it, and what compiling adds."""
    job, _ = job
    own = copy.copy(job)
    own.device = torch.device("cuda")
    plan, parts = memory_plan(own), {part.name: part.bytes for part in memory_plan(own).parts}
    generation = max(parts["UNet call"], parts["VAE decode"])
    assert plan.overlapped and plan.working == parts["encoder training step"] + generation
    layers = [layer for layer in layers_of(job.pipeline.unet) if not layer.is_cross_attention]
    weights = sum(p.nbytes for layer in layers for x in (layer.to_q, layer.to_k, layer.to_v) for p in x.parameters())
    assert parts["fused projections of self-attention"] == weights > 0
    own.config = with_settings(own.config, {"pipeline.compile": "off"})
    assert "fused projections of self-attention" not in {part.name for part in memory_plan(own).parts}
    assert not memory_plan(job).overlapped


def test_what_does_not_fit_names_parts_and_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "available_memory", lambda device: (1000, 2000))
    stream = io.StringIO()
    with pytest.raises(OutOfMemory, match=r"check: a run would stop at memory \(see the plan\)"):
        check.command(write_config(tmp_path), [], Console(stream), None, trainer.step)
    report = json.loads((tmp_path / "runs" / "tiny" / "check" / "check.json").read_text())
    text = stream.getvalue()
    assert "does not fit" in text and "lower " in text and "; lower learning.classes_per_batch" in text
    assert "seconds" not in report and "time: not measured, because the plan does not fit" in text


def test_out_of_memory_in_the_timed_steps_is_a_line(tmp_path):
    def step(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    stream = io.StringIO()
    report = check.command(write_config(tmp_path), [], Console(stream), None, step)
    assert report["seconds"] == {}
    assert "a step does not fit (CUDA out of memory. Tried to allocate 20.00 GiB); lower generation.slots (4)" in (
        stream.getvalue()
    )


def test_out_of_memory_in_the_plan_is_a_line_too(tmp_path, capsys):
    """An encoder that not even the plan can hold; `run`, `tune` and `profile` end with the same code."""
    path = write_config(tmp_path, encoder={"width": 1_000_000}, generation={"synthetic_fraction": 0})
    assert trainer.main(["check", str(path), "--untimed"]) == OutOfMemory.code
    found = capsys.readouterr().err
    assert "error: stage plan: the encoder does not fit" in found and "lower encoder.width (1000000)" in found


def test_a_cache_folder_that_cannot_be_written_is_found_before_a_run_stops_at_it(tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = write_config(tmp_path, run={"cache_dir": str(tmp_path / "file" / "cache")})
    with pytest.raises(StorageError, match=r"file/cache: class tokens could not be kept there, .*set run.cache_dir"):
        check.command(path, ["--untimed"], Console(io.StringIO()), None, trainer.step)
    check.command(path, ["--untimed", "generation.synthetic_fraction=0"], Console(io.StringIO()), None, trainer.step)


def test_settings_of_what_is_not_generated_are_said_to_do_nothing(tmp_path):
    path, said = write_config(tmp_path, near_ood={"strength": 0.75, "noise": 2.0}, gate={"enabled": "true"}), []
    for fraction in ("0", "0.4"):
        stream = io.StringIO()
        arguments = ["--untimed", f"generation.synthetic_fraction={fraction}", "gate.start_step=2"]
        check.command(path, arguments, Console(stream), None, trainer.step)
        said.append(stream.getvalue())
    text = " ".join(said[0].split())
    assert (
        "generation.synthetic_fraction is 0 and nothing is generated: near_ood.noise, gate.enabled, gate.start_step; set"
        in text
    )
    assert "without effect" not in said[1]


def test_without_generation_and_untimed(tmp_path):
    stream = io.StringIO()
    path = write_config(tmp_path, generation={"synthetic_fraction": 0})
    report = check.command(path, ["--untimed"], Console(stream), None, trainer.step)
    assert "seconds" not in report and not any("UNet" in part["name"] for part in report["memory"])
    assert "nothing found that would stop a run" in stream.getvalue() and "without effect" not in stream.getvalue()
    with pytest.raises(ConfigError, match="unknown flag --fast; this verb takes --untimed"):
        check.command(path, ["--fast"], Console(stream), None, trainer.step)
