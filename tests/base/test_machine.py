"""How a run generates on this machine: every choice is made once, written down with its reason, and taken again."""

import contextlib
import dataclasses
import io
import json
import shutil

import pytest
import torch

import trainer
from kernels import backend
from modules import runtime
from modules import state as checkpoints
from modules.console import Console
from modules.diffusion.overlap import Overlap
from modules.errors import ConfigError, DataError, OutOfMemory
from modules.runtime import Choice
from modules.training import job as job_module
from modules.training import machine, stages
from modules.training.job import Job
from modules.workdir import Workdir
from tests.base.tinyset import tiny_config

CPU = torch.device("cpu")


@contextlib.contextmanager
def built(folder, **sections):
    """(job, state) of the tiny run before step 0, and all that was printed."""
    config, origins = tiny_config(folder, **sections)
    workdir, text = Workdir(config, origins), io.StringIO()
    try:
        job = Job(config, workdir, Console(text))
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        with job.stage("tokens") as progress:
            stages.learn_tokens(job, progress)
        with job.stage("contrastive") as progress:
            yield job, stages.build(job, progress), text
    finally:
        workdir.close()


@contextlib.contextmanager
def held(folder, *files, last="as it was", **sections):
    """(job, all that was printed) of a run that has compared `files`, and leaves a checkpoint."""
    config, origins = tiny_config(folder, **sections)
    text = io.StringIO()
    with contextlib.closing(Workdir(config, origins)) as workdir:
        job = Job(config, workdir, Console(text))
        for setting in files:
            job.hold_to(setting, "here", last if setting == files[-1] else "as it was")
        yield job, text
        checkpoints.save_checkpoint(workdir.checkpoints / "contrastive", 0, {})


def equal(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_choices_stand_in_the_card_and_in_a_file_with_their_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "has_amx", lambda: False)
    monkeypatch.setattr(backend, "is_intel", lambda: False)
    with built(tmp_path) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        card = {name: (value, reason) for name, value, reason in job.card}
        kept = json.loads((job.workdir.path / machine.FILE).read_text())
    assert card["slots"] == ("4", "generation.slots") and card["decode batch"] == ("3", "generation.decode_batch")
    assert card["attention"] == ("products where tokens are few, else sdpa", "auto: by shape on a CPU")
    assert card["upsampling"] == ("transposed in 3 layers", "fp32 on a CPU: the form is fixed")
    assert card["tick"] == ("eager", "auto: compiling pays on a GPU only")
    assert card["preset"] == ("exact", "as configured")
    assert kept["device"] == "cpu" and kept["slots"] == [4, "generation.slots"]
    assert kept["mode"] == ["sequential", "auto: a CPU has no streams"] and state.overlap.mode == "sequential"


def test_what_was_chosen_before_is_taken_again_and_said(tmp_path, monkeypatch):
    with built(tmp_path) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        path = job.workdir.path / machine.FILE
    kept = json.loads(path.read_text())
    path.write_text(
        json.dumps(kept | {"slots": [2, "generation.slots 4 ran out of memory"], "mode": ["sequential", "x"]})
    )
    with built(tmp_path) as (job, state, text):
        assert len(state.generator.slots.occupants) == 2
        monkeypatch.setattr(machine, "choose_mode", lambda *_: pytest.fail("the mode was measured again"))
        machine.choose_overlap(job, state, trainer.step)
        assert job.choices["slots"].reason == "generation.slots 4 ran out of memory"
        assert "sequential (x)" in text.getvalue()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another card"}))
    with built(tmp_path) as (_, state, _):
        assert len(state.generator.slots.occupants) == 4, "choices of another device say nothing about this one"


@pytest.mark.parametrize("name", ["tiny", "tiny/profile"])
def test_choices_made_for_other_settings_are_not_taken_again(tmp_path, name):
    """Settings may change until the first checkpoint, and from one profile to the next."""
    run = {"name": name}
    with built(tmp_path, run=run) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        path = job.workdir.path / machine.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mode": ["sequential", "as it was"]}))
    with built(tmp_path, run=run, generation={"slots": 2, "decode_batch": 1}) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        assert len(state.generator.slots.occupants) == 2
        assert job.choices["slots"] == Choice(2, "generation.slots")
        assert job.choices["decode_batch"] == Choice(1, "generation.decode_batch")
        assert job.choices["mode"].reason == "auto: a CPU has no streams"
    kept = json.loads(path.read_text())
    assert kept["asked"]["generation.slots"] == 2 and kept["slots"] == [2, "generation.slots"]
    assert kept["files"].keys() == {"data.root", "pipeline.path"}


@pytest.mark.parametrize("files", [("data.root", "pipeline.path"), ("data.root",)])
def test_environment_is_that_of_the_newest_command_that_was_not_refused(tmp_path, monkeypatch, files):
    def begin(commit: str, last: str = "as it was") -> dict:
        monkeypatch.setattr(job_module, "environment", lambda: {"commit": commit})
        generation = {"synthetic_fraction": 0.4 * (len(files) - 1)}
        with contextlib.suppress(DataError), held(tmp_path, *files, last=last, generation=generation):
            pass
        return json.loads((tmp_path / "runs" / "tiny" / "environment.json").read_text())

    assert begin("first") == {"commit": "first"}
    assert begin("second", last="another") == {"commit": "first"}, "refused"
    assert begin("third") == {"commit": "third"}


@pytest.mark.parametrize("files", [("data.root", "pipeline.path"), ("data.root",)])
def test_a_run_that_goes_on_with_other_rounding_says_so_once(tmp_path, monkeypatch, files):
    """What `auto` and 0 come to is written down, and compared when the run goes on from a checkpoint."""
    monkeypatch.setattr(runtime, "has_amx", lambda: False)
    generation = {"synthetic_fraction": 0.4 * (len(files) - 1)}
    dtype = {"pipeline dtype": "float32"} if "pipeline.path" in files else {}
    known = {"device": "cpu", "precision": "float32"} | dtype | {"threads": 1, "kernels": "torch"}

    def recorded() -> list[dict]:
        return json.loads((tmp_path / "runs" / "tiny" / "inputs.json").read_text())["runtime"]

    def printed(**run) -> str:
        with held(tmp_path, *files, generation=generation, run=run) as (_, text):
            pass
        return text.getvalue()

    for threads in (2, 1):  # the first of these left no checkpoint: nothing goes on
        assert "warning" not in printed(threads=threads)
        assert recorded() == [known | {"threads": threads}]
        if threads == 2:
            shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    assert "warning" not in printed(threads=1)
    text = printed(threads=2)
    assert "threads was 1, now 2)" in text and text.count("warning") == 1 and "may differ in the last digits" in text
    assert recorded() == [known, known | {"threads": 2}]
    assert "warning" not in printed(threads=2)

    gpu = Choice(torch.device("cuda"), "a card")
    resolve = job_module.resolve_runtime
    elsewhere = {"device": gpu, "precision": Choice(torch.bfloat16, "auto")}
    monkeypatch.setattr(job_module, "resolve_runtime", lambda *_: dataclasses.replace(resolve(*_), **elsewhere))
    monkeypatch.setattr(job_module, "Meter", lambda device: None)
    monkeypatch.setattr(backend, "explain", lambda device: {"pixels": backend.Choice("triton", "as a test")})
    text = printed(threads=2)
    assert (
        "device was cpu, now a card; precision was float32, now bfloat16; kernels was torch, now triton for pixels"
        in text
    )
    assert text.count("warning") == 1 and len(recorded()) == 3
    monkeypatch.undo()
    assert "device was a card, now cpu" in printed(threads=1)


def test_fewer_slots_than_a_stopped_run_had_are_an_error_not_another_engine(tmp_path, monkeypatch):
    with built(tmp_path):
        pass
    from modules.diffusion import generator

    fit = generator.fit_slots

    def smaller(build, slots, decode, accelerate):
        return (fit(build, 2, decode)[0], Choice(2, "ran out"), Choice(decode, "as asked"))

    monkeypatch.setattr(generator, "fit_slots", smaller)
    with pytest.raises(OutOfMemory, match="begun with generation.slots 4.*only 2 fit"), built(tmp_path):
        pass


@pytest.mark.parametrize("room", [2, 0])
def test_slots_back_off_for_an_engine_that_only_compiled_does_not_fit(room, tmp_path, monkeypatch):
    def accelerate(slots, setting, say):
        say(f"compiling for {len(slots.occupants)} slots")
        if len(slots.occupants) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Choice("compiled", "as a test")

    monkeypatch.setattr(machine, "accelerate", accelerate)
    with built(tmp_path) as (job, state, text):
        card = {name: (value, reason) for name, value, reason in job.card}
        if room:
            assert card["slots"] == ("2", "generation.slots 4 ran out of memory")
            assert card["tick"] == ("compiled", "as a test") and len(state.generator.slots.occupants) == 2
        else:
            assert card["slots"] == ("4", "generation.slots") and card["tick"][0] == "eager"
            assert "does not fit, not even with a quarter" in card["tick"][1]
        said = [line.strip() for line in text.getvalue().splitlines() if "compiling" in line]
        assert said == [f"compiling for {count} slots" for count in ((4, 2) if room else (4, 2, 1))]
        trainer.step(state)


def test_timing_attention_is_announced_before_it_begins(tmp_path, monkeypatch):
    with built(tmp_path) as (job, state, text):

        def tune(*_, **__):
            assert text.getvalue().splitlines()[-1].startswith("  timing the attention backends")
            return []

        monkeypatch.setattr(machine.attention, "tune", tune)
        monkeypatch.setattr(machine, "timer", lambda device: None)
        monkeypatch.setattr(job, "device", torch.device("cuda"))
        machine._tune_attention(job, state.generator.slots.in_flight, {})


def test_forms_of_upsampling_are_timed_on_tick_and_decoder_told_and_taken_again(tmp_path, monkeypatch):
    with built(tmp_path, pipeline={"dtype": "fp32"}) as (job, state, text):
        monkeypatch.setattr(machine, "timer", lambda device: lambda work, repeats: float(work() is None))
        monkeypatch.setattr(job, "device", torch.device("cuda"))
        slots = state.generator.slots
        choice = machine._tune_upsampling(job, slots, {"tick": ["eager", "of a run that was begun before"]})
        assert choice == Choice("transposed in 3 layers", "as this run began"), "its rounding stays what it was"
        choice = machine._tune_upsampling(job, slots, {})
        assert choice == Choice("torch in 3 layers", "timed at each shape; diffusers' own in a tie")
        told = [line for line in text.getvalue().splitlines() if line.startswith("  upsampling, ")]
        assert len(told) == 3 and all("transposed 0.000 ms" in line for line in told)
        kept = machine._read(job)["upsampling_forms"]
        assert len(kept) == 3 and "8x32x4x4x32" in kept and set(kept.values()) == {"torch"}
        kept = {"tick": ["eager", ""], "upsampling_forms": dict.fromkeys(kept, "phases")}
        assert machine._tune_upsampling(job, slots, kept) == Choice("phases in 3 layers", "as this run chose before")
        assert machine._as_it_is(job, slots)["upsampling"].value == "transposed in 3 layers", "untimed"


def test_compile_on_that_does_not_fit_is_an_error_with_the_knobs(tmp_path, monkeypatch):
    def accelerate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machine, "accelerate", accelerate)
    named = "compile is on, .* lower generation.slots.* or set pipeline.compile=auto"
    with pytest.raises(OutOfMemory, match=named), built(tmp_path, pipeline={"compile": '"on"'}):
        pass


def test_a_trial_leaves_everything_as_it_was(tmp_path):
    """The calibration of the overlap mode steps on the run's own parts: nothing of it may stay."""
    with built(tmp_path, learning={"ema_decay": 0.8}, run={"checkpoint_every": 100}) as (_, state, _):
        for _ in range(3):
            trainer.step(state)
        state.meter.restart_interval()
        before = machine.copied(state.state_dict())
        with machine.unchanged(state, Overlap("sequential", CPU)) as trial:
            for _ in range(3):
                trainer.step(trial)
            assert trial.step == state.step + 3
            assert not equal(trial.state_dict()["encoder"], before["encoder"])
            assert not equal(trial.state_dict()["generator"], before["generator"])
        after = state.state_dict()
        del before["meter"]["seconds"], after["meter"]["seconds"]  # the stage goes on
        assert equal(after, before)
        trainer.step(state)
        assert state.step == 4


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"preset": "faster"}, "AutoencoderTiny"),
        ({"preset": "turbo"}, "distilled to a few steps"),
        ({"attention": "xformers"}, "pipeline.attention is xformers, which does not run here"),
    ],
)
def test_what_these_weights_or_this_machine_lack_is_refused_before_a_step(tmp_path, pipeline, message):
    with pytest.raises(ConfigError, match=message), built(tmp_path, pipeline=pipeline):
        pass


def test_stream_mode_on_a_cpu_is_refused(tmp_path):
    with built(tmp_path, generation={"mode": "stream"}) as (job, state, _), pytest.raises(ConfigError, match="CUDA"):
        machine.choose_overlap(job, state, trainer.step)


def test_a_vae_that_overflows_is_refused_before_anything_is_learned_from_it(tmp_path, monkeypatch):
    load = stages.load_pipeline

    def overflowing(*arguments):
        pipeline = load(*arguments)
        pipeline.vae.decoder.conv_out.bias.data.fill_(float("inf"))
        return pipeline

    monkeypatch.setattr(stages, "load_pipeline", overflowing)
    with pytest.raises(DataError, match="non-finite.*pipeline.vae to another VAE"), built(tmp_path):
        pass


def test_tokens_read_from_the_cache_are_reported_as_those_that_were_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "is_intel", lambda: False)  # attention then differs where its processors do
    reports = []
    for name in ("learned", "read"):
        with built(tmp_path, run={"name": name}, pipeline={"dtype": "fp32"}) as (job, _, _):
            reports.append((job.workdir.path / "tokens/report.json").read_bytes())
    assert reports[0] == reports[1]


def test_a_fast_run_takes_fewer_guided_rows_and_its_images_say_how_they_were_made(tmp_path):
    settings = {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "images_per_step": 3.0,
        "slots": 12,
        "kv_cache_gib": 1e-9,
    }
    with built(tmp_path, pipeline={"preset": "fast"}, generation=settings) as (job, state, _):
        grids = job.plan.grids(job.pipeline.scheduler)
        strengths = *job.config.generation.strengths, job.config.near_ood.strength
        keys = {grids.at(float(strength))[0].key for strength in strengths}
        assert any(guided < count for _, count, guided in keys) and {solver for solver, *_ in keys} == {"dpmpp_2m"}
        slots = state.generator.slots
        assert 0 < slots.unconditional_rows < len(slots.occupants)
        for _ in range(6):
            trainer.step(state)
        made = [request for _, request in state.generator.examples() if request.denoises]
        assert {r.grid for r in made} == keys and {r.preset for r in made} == {"fast"}
        assert slots.key_values.hits == 0, "a cache of one byte holds no prompt"


def test_in_stream_mode_generation_starts_once_the_batch_is_mixed(tmp_path):
    """The order of stream mode on a CPU, the side stream left out."""
    with built(tmp_path) as (_, state, _):
        order = []
        overlap = Overlap("sequential", CPU)
        overlap.side, overlap.launch = object(), lambda: order.append(("launch", len(order)))
        advance, batch = state.generator.advance, state.mixer.batch
        state.generator.advance = lambda step: order.append("generate") or advance(step)
        state.mixer.batch = lambda step: order.append("mix") or batch(step)
        trial = dataclasses.replace(state, overlap=overlap)
        trainer.step(trial)
        assert order == ["mix", ("launch", 1)] and overlap.pending is not None
        overlap.pending()
        assert order[-1] == "generate"


def test_norms_are_swapped_for_the_kernel_where_it_runs(tmp_path, monkeypatch):
    choose, swapped = backend.choose, []
    monkeypatch.setattr(machine, "swap_group_norm", swapped.append)
    with built(tmp_path):
        assert not swapped, "on a CPU the definitions run, as diffusers has them"

    def forced(op, *how, **named):
        return choose(op)._replace(name="triton") if op == "group_norm" else choose(op, *how, **named)

    monkeypatch.setattr(backend, "choose", forced)
    with built(tmp_path) as (job, _, _):
        assert swapped == [job.pipeline.unet, job.pipeline.vae]


def test_a_warning_whose_figure_changes_is_printed_once(tmp_path):
    with built(tmp_path) as (job, _, text):
        for rate in ("3%", "4%"):
            job.warn_once(f"the gate passes {rate} of positives: see the reasons")
        job.warn_once("the gate passes 97% of near-OOD images: it decides nothing")
        assert text.getvalue().count("the gate passes 3%") == 1 and "4%" not in text.getvalue()
        assert "97%" in text.getvalue()


@pytest.mark.gpu
def test_a_gpu_run_compiles_captures_tunes_and_calibrates_and_goes_on_with_what_it_chose(tmp_path):
    with built(tmp_path, run={"device": "cuda"}) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        first = {name: choice.value for name, choice in job.choices.items()}
        assert first["tick"] == "compiled, captured" and first["mode"] in ("sequential", "stream")
        before = state.generator.slots.counts["finished"]
        for _ in range(6):
            trainer.step(state)
        state.overlap.join()
        assert state.generator.slots.counts["finished"] > before
        assert all(pixels.float().std() > 0 for pixels, _ in state.generator.examples())
    with built(tmp_path, run={"device": "cuda"}) as (job, state, _):
        machine.choose_overlap(job, state, trainer.step)
        assert {name: choice.value for name, choice in job.choices.items()} == first
