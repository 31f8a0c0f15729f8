"""Memory that runs out anywhere in a stage ends in one line: the stage, the part, and what makes it smaller."""

import importlib
import io
import signal

import pytest
import torch

import trainer
from modules import memory, runtime
from modules.config import Config, Pipeline, PipelineConfig
from modules.console import Console
from modules.diffusion import checkpoints
from modules.diffusion.inversion import Inversion
from modules.diffusion.pipeline import load_pipeline
from modules.errors import OutOfMemory
from modules.evaluation.features import embed_images
from modules.learning import judge
from modules.memory import named_memory, ran_out
from modules.settings import flatten
from modules.training.job import Job
from modules.workdir import Workdir
from tests.base.test_machine import built
from tests.base.tinyset import tiny_config, write_config


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice")


@pytest.fixture(autouse=True)
def sigterm_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_every_part_is_a_function_that_there_is_and_every_setting_too():
    """A function that is renamed would no longer be found in a traceback, and nothing would say so."""
    for name in memory.PARTS:
        parts = name.split(".")
        split = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
        found = importlib.import_module(".".join(parts[:split]))
        for part in parts[split:]:
            found = getattr(found, part)
        assert getattr(found, "__wrapped__", found).__code__.co_qualname == ".".join(parts[split:])
    known = flatten(Config()) | flatten(PipelineConfig())
    knobs = [
        *memory.WHOLE_RUN,
        *sum(memory.STAGES.values(), ()),
        *sum((knobs for _, knobs in memory.PARTS.values()), ()),
    ]
    assert {knob.partition("=")[0] for knob in knobs} <= known.keys()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("modules.diffusion.checkpoints.read_folder", "stage tokens: loading the pipeline does not fit"),
        ("diffusers.AutoencoderKL.encode", "stage tokens: encoding images by the VAE does not fit"),
        ("modules.diffusion.tick.Tick.write", "stage contrastive: filling the reservoir does not fit"),
        ("modules.training.stages.Mixer", "stage contrastive does not fit"),
    ],
)
def test_a_run_ends_with_its_code_and_one_line(target, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(target, exhausted)
    monkeypatch.setattr(runtime, "has_amx", lambda: False)
    path = write_config(tmp_path, inversion={"class_agnostic": True}, near_ood={"recipes": "{strength: 1.0}"})
    capsys.readouterr()  # what writing the tiny pipeline said
    assert trainer.main(["run", str(path)]) == 4
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said} (CUDA out of memory. Tried to allocate 20.00 GiB.); ")
    assert len(err.splitlines()) == 1 and ("lower " in err or "set pipeline.dtype=bf16" in err)


def test_the_judge_and_features_are_named(monkeypatch):
    monkeypatch.setattr(judge, "build_encoder", exhausted)
    named = r"stage tokens: the judge .* or set evaluation.judge_steps=0"
    with pytest.raises(OutOfMemory, match=named), named_memory("tokens", Config()):
        judge.load_judge(torch.zeros(1, 4, 4, 3), torch.zeros(1), 1, 1, 0, "", print)
    named = r"stage probe: embedding images .* lower evaluation.batch_size \(\d+\)"
    with pytest.raises(OutOfMemory, match=named), named_memory("probe", Config()):
        embed_images(exhausted, torch.zeros(2, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("gpu", "tiles", "dtype", "ways"),
    [
        (False, False, "auto", "set pipeline.dtype=bf16; "),
        (False, True, "auto", ""),
        (False, False, "bf16", ""),
        (True, False, "fp32", "set pipeline.dtype=fp16; "),
        (True, False, "auto", ""),
    ],
)
def test_half_the_memory_is_offered_only_where_it_is_not_taken_already(gpu, tiles, dtype, ways, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(runtime, "has_amx", lambda: tiles)
    monkeypatch.setattr(checkpoints, "load", exhausted)
    config = Config(pipeline=Pipeline(dtype=dtype))
    with pytest.raises(OutOfMemory) as raised, named_memory("tokens", config):
        load_pipeline(config.pipeline)
    assert str(raised.value).endswith(f"20.00 GiB.); {ways}`check` lists what a run holds")


def test_what_other_libraries_say_counts_and_other_errors_pass():
    for text in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        with pytest.raises(OutOfMemory, match="stage data does not fit"), named_memory("data", Config()):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="a bug"), named_memory("data", Config()):
        raise RuntimeError("a bug")
    left_behind = RuntimeError("operation failed due to a previous error during capture")
    left_behind.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert ran_out(left_behind) and not ran_out(RuntimeError("operation failed"))


def test_a_stage_of_a_job_is_where_it_is_named(tmp_path):
    config, origins = tiny_config(tmp_path)
    workdir = Workdir(config, origins)
    try:
        job = Job(config, workdir, Console(io.StringIO()))
        with (
            pytest.raises(OutOfMemory, match="stage evaluate does not fit .* lower evaluation.batch_size"),
            job.stage("evaluate"),
        ):
            exhausted()
    finally:
        workdir.close()


def test_a_batch_of_inversion_taken_in_parts_is_said(tmp_path, monkeypatch):
    chunks = Inversion._chunks

    def narrow(self, z, *rest):
        return exhausted() if self.micro_batch > 5 else chunks(self, z, *rest)

    monkeypatch.setattr(Inversion, "_chunks", narrow)
    with built(tmp_path) as (_, _, text):
        said = [line for line in text.getvalue().splitlines() if "ran out of memory at once" in line]
    assert len(said) == 1 and said[0].startswith("  class tokens: "), text.getvalue()


def test_a_pipeline_that_is_trained_names_its_own_settings():
    named = "stage pipeline does not fit .* lower training.vae_batch"
    with pytest.raises(OutOfMemory, match=named), named_memory("pipeline", PipelineConfig()):
        exhausted()
