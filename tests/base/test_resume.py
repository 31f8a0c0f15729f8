"""Stopping costs nothing: a run that was stopped and started again equals, to the bit, one that never was.

Every part that has a state of its own is switched on (arm "everything"). Interruptions come where they hurt: in the
middle of a step, with slots in flight and the reservoir half full.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import trainer
from modules import state as checkpoints
from modules.diffusion import tokens as token_files
from modules.diffusion.inversion import Inversion
from modules.runtime import has_amx
from modules.training import job, stages
from modules.training import results as run_results
from tests.base.tinyset import SETTINGS, Finished, contents, finished_run, shared_folder
from tests.tiny import build_parts, pipeline_folder, save_parts

ARM, STOP = "everything", 6  # the step in whose middle the run is stopped: between the checkpoints of 4 and 8
TIMES = ("_ms", "images_per_s", "views_per_s")  # endings of columns that measure time
COSTS = ("seconds.", "cost.seconds", "run.peak_memory")


@pytest.fixture(autouse=True)
def reference():
    """The run that never stopped, made before anything is patched."""
    before = signal.getsignal(signal.SIGTERM)
    yield finished_run(ARM)
    signal.signal(signal.SIGTERM, before)


def go(name: str, *overrides: str) -> int:
    """`trainer.py run everything.yaml run.name=<name> ...` in this process; the exit code."""
    return trainer.main(["run", str(finished_run(ARM).config_path), f"run.name={name}", *overrides])


def directory(name: str) -> Path:
    return shared_folder() / "runs" / name


def in_the_middle_of(step: int, interrupt):
    """trainer.step that calls `interrupt` after the generation of `step`, before its batch is learned from."""
    one_step = trainer.step

    def interrupted(state):
        if state.step != step:
            one_step(state)
            return
        batch = state.mixer.batch

        def stop_first(number):
            interrupt()
            return batch(number)

        with mock.patch.object(state.mixer, "batch", stop_first):
            one_step(state)

    return mock.patch.object(trainer, "step", interrupted)


def press_ctrl_c():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def newest(name: str) -> tuple[int, dict]:
    step, tree, _ = checkpoints.load_newest(directory(name) / "checkpoints" / "contrastive")
    return step, tree


def rows(path: Path) -> list[dict]:
    """Metric rows without the columns that measure time."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in found]


def assert_equal_to_never_having_stopped(name: str, reference: Finished):
    made, expected = contents(directory(name)), contents(reference.path)
    assert rows(directory(name)) == rows(reference.path)
    for file in ("export/encoder.safetensors", "export/ood.safetensors", "predictions.safetensors", "recipes.json"):
        assert made[file] == expected[file], file
    results = json.loads(made["results.json"])
    assert {key: value for key, value in results.items() if not key.startswith(COSTS)} == {
        key: value for key, value in reference.results.items() if not key.startswith(COSTS)
    }
    assert made.keys() == expected.keys()


def test_everything_has_a_state_that_matters():
    """The reference generates, rejects, moves strengths and averages: a resume that lost any of it would show."""
    last = rows(finished_run(ARM).path)[-1]
    verdicts = {name.split(".")[-1] for name in last if name.startswith("gate.")}
    assert verdicts & {"other_class", "unlike_class", "too_close", "too_far"} and "accepted" in verdicts
    assert last["images_finished"] > 16 and last["reuse"] > 1


def test_interrupted_in_the_middle_of_a_step(capsys):
    with in_the_middle_of(STOP, press_ctrl_c):
        assert go("interrupted") == 130
    assert "the same command" in capsys.readouterr().err
    step, tree = newest("interrupted")
    generator = tree["generator"]
    assert step == 4
    assert any(occupant is not None for occupant in generator["slots"]["occupants"]), "slots are in flight"
    places = 2 * 4 * SETTINGS["generation.ring_size"]
    assert 0 < len(generator["reservoir"]["rows"]) < places, "the reservoir is neither empty nor full"
    assert rows(directory("interrupted"))[-1]["step"] == 6, "a row beyond the checkpoint, to be cut"

    assert go("interrupted", "run.checkpoint_every=3", "run.keep_checkpoints=1") == 0
    assert "resumed at step 4" in capsys.readouterr().out
    assert_equal_to_never_having_stopped("interrupted", finished_run(ARM))


def test_interrupted_in_the_number_format_that_auto_does_not_take_here(capsys):
    """bf16 on a processor without AMX, fp32 on one with it: both are gone on with, wherever the tests run."""
    other, said = ("fp32", "float32") if has_amx() else ("bf16", "bfloat16")
    formats = (f"run.precision={other}", f"pipeline.dtype={other}")
    assert go("whole", *formats) == 0
    assert f"precision: {said}" in capsys.readouterr().out
    with in_the_middle_of(STOP, press_ctrl_c):
        assert go("halves", *formats) == 130
    assert go("halves", *formats) == 0
    results = json.loads((directory("whole") / "results.json").read_text())
    assert_equal_to_never_having_stopped("halves", replace(finished_run(ARM), path=directory("whole"), results=results))


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGHUP, 129, "SIGHUP")])
def test_ctrl_c_and_a_lost_terminal_bring_the_step_to_its_end_too(signum, code, name, capsys):
    with in_the_middle_of(STOP, lambda: os.kill(os.getpid(), signum)):
        assert go(f"signal-{code}") == code
    assert f"error: {name}: checkpointed at step {STOP + 1} of" in capsys.readouterr().err
    assert newest(f"signal-{code}")[0] == STOP + 1


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with in_the_middle_of(STOP, press_twice):
        assert go("pressed-twice") == 130
    assert newest("pressed-twice")[0] == 4, "the last checkpoint before it"


def test_terminated_in_the_middle_of_a_step_it_is_brought_to_its_end(capsys):
    with in_the_middle_of(STOP, terminate):
        assert go("terminated") == 143
    assert f"SIGTERM: checkpointed at step {STOP + 1} of" in capsys.readouterr().err
    assert newest("terminated")[0] == STOP + 1

    assert go("terminated", "learning.lr=0.5") == 2
    assert "learning.lr was 0.01, now 0.5" in capsys.readouterr().err

    assert go("terminated") == 0
    assert_equal_to_never_having_stopped("terminated", finished_run(ARM))


def test_a_corrupt_checkpoint_gives_way_to_the_older_one(capsys):
    with in_the_middle_of(10, press_ctrl_c):
        assert go("corrupt") == 130
    folder = directory("corrupt") / "checkpoints" / "contrastive"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000008"]
    tensors = folder / "step-00000008" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)

    assert go("corrupt") == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "warning" in out and "step-00000008" in out and "an older checkpoint is used" in out
    assert "resumed at step 4" in out
    assert_equal_to_never_having_stopped("corrupt", finished_run(ARM))


def test_stopped_after_training_no_step_is_taken_again(capsys):
    with mock.patch.object(trainer, "step", wraps=trainer.step) as steps:
        with mock.patch.object(run_results, "evaluate", side_effect=KeyboardInterrupt):
            assert go("trained") == 130
        assert steps.call_count == SETTINGS["learning.steps"]
        assert go("trained") == 0
        assert steps.call_count == SETTINGS["learning.steps"]
    assert_equal_to_never_having_stopped("trained", finished_run(ARM))


def test_it_goes_on_with_its_own_tokens_whatever_became_of_the_cache(capsys, monkeypatch):
    """Learned again elsewhere they would differ in rounding, and no image in flight would be one of them."""
    with in_the_middle_of(STOP, terminate):
        assert go("own-tokens") == 143
    monkeypatch.delattr(stages, "_learn")
    capsys.readouterr()
    assert go("own-tokens", f"run.cache_dir={shared_folder() / 'empty-cache'}") == 0
    assert "class tokens: those that this run began with" in capsys.readouterr().out
    assert_equal_to_never_having_stopped("own-tokens", finished_run(ARM))


def terminated_while_saving_tokens(name: str) -> int:
    """`go` with a SIGTERM when the files of two of the four classes are written; the exit code."""
    write = token_files.write_atomic

    def terminate_at_the_third(path, data):
        if len(list(Path(path).parents[1].rglob(token_files.FILE))) == 2:
            terminate()
        write(path, data)

    with mock.patch.object(token_files, "write_atomic", terminate_at_the_third):
        return go(name)


def test_tokens_that_steps_were_taken_with_are_never_in_pieces(capsys):
    """A resume does not write the run's own again; where they are gone, others come whole or not at all."""
    name, own = "whole-tokens", directory("whole-tokens") / "tokens"
    with in_the_middle_of(STOP, terminate):
        assert go(name) == 143
    saved = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in own.rglob(token_files.FILE)}
    with in_the_middle_of(STOP + 2, terminate):
        assert terminated_while_saving_tokens(name) == 143
    assert newest(name)[0] == STOP + 3, "it was stopped in a step, not while it saved tokens"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in own.rglob(token_files.FILE)} == saved

    shutil.rmtree(own)
    assert terminated_while_saving_tokens(name) == 143
    assert newest(name)[0] == STOP + 3 and not own.exists()
    assert go(name) == 0
    assert_equal_to_never_having_stopped(name, finished_run(ARM))


@pytest.mark.parametrize(("interrupt", "code", "checkpoint"), [(press_ctrl_c, 130, 2), (terminate, 143, 4)])
def test_stopped_while_learning_tokens(interrupt, code, checkpoint, capsys, monkeypatch):
    """In the middle of the fourth of four steps; the cache of the reference is out of reach."""
    name = f"tokens-{code}"
    own = [f"run.cache_dir={shared_folder() / name}", "learning.steps=1", "learning.warmup_steps=0"]
    own.append("gate.start_step=0")
    monkeypatch.setattr(stages, "TOKEN_CHECKPOINT_STEPS", 2)
    update = Inversion._update

    def stop_at_the_last(self, *arguments):
        if self.done == 3:
            interrupt()
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "_update", stop_at_the_last)
        assert go(name, *own) == code
    assert checkpoints.load_newest(directory(name) / "checkpoints" / "tokens")[0] == checkpoint
    assert not (directory(name) / "tokens").exists()
    capsys.readouterr()
    assert go(name, *own) == 0
    assert f"resumed at step {checkpoint} of tokens" in capsys.readouterr().out
    made, expected = contents(directory(name) / "tokens"), contents(finished_run(ARM).path / "tokens")
    assert made == expected


def other_images(data: Path, pipeline: Path) -> None:
    with zipfile.ZipFile(data) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["bolt/train-0-0.png"] = members["bolt/train-0-1.png"]
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def another_pipeline(data: Path, pipeline: Path) -> None:
    shutil.rmtree(pipeline)
    save_parts(build_parts(seed=1), pipeline)


@pytest.mark.parametrize(("change", "setting"), [(other_images, "data.root"), (another_pipeline, "pipeline.path")])
def test_other_files_behind_the_same_settings_are_not_gone_on_with(change, setting, capsys, tmp_path):
    data, pipeline = tmp_path / "tiny.zip", tmp_path / "pipeline"
    shutil.copy(shared_folder() / "tiny.zip", data)
    shutil.copytree(pipeline_folder(), pipeline)
    cache = shared_folder() / "runs" / "cache"
    own = [f"data.root={data}", f"pipeline.path={pipeline}", f"run.dir={tmp_path}", f"run.cache_dir={cache}"]
    with in_the_middle_of(STOP, press_ctrl_c):
        assert go("changed", *own) == 130
    change(data, pipeline)
    before = contents(tmp_path / "changed")
    capsys.readouterr()
    with mock.patch.object(job, "environment", return_value={"commit": "another"}):
        assert go("changed", *own) == 3
    assert contents(tmp_path / "changed") == before, "a refused resume changes nothing"
    message = capsys.readouterr().err
    assert message.startswith(f"error: {setting} {tmp_path}") and "not those that this run began with" in message
    assert setting != "data.root" or "(changed: bolt/train-0-0.png)" in message


@contextlib.contextmanager
def full_disk(most_bytes: int):
    """No file can grow beyond `most_bytes`: real writes fail, those of the safetensors library too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_too_full_for_checkpoints_costs_a_warning_each(capsys):
    """There is room for the rows, and from the second checkpoint on for nothing larger; at the end there is again."""
    never_evaluated = mock.patch.object(run_results, "evaluate", side_effect=KeyboardInterrupt)
    with contextlib.ExitStack() as stack, never_evaluated:
        stack.enter_context(in_the_middle_of(STOP, lambda: stack.enter_context(full_disk(60_000))))
        assert go("full") == 130
    out = capsys.readouterr().out.replace("\n", "")
    assert out.count("warning: ") >= 2
    for step in (8, 12):
        assert f"the checkpoint of step {step} could not be written" in out and "free some disk space" in out
    assert newest("full")[0] == 4
    assert [path.name for path in (directory("full") / "checkpoints" / "contrastive").iterdir()] == ["step-00000004"]
    assert go("full") == 0
    assert_equal_to_never_having_stopped("full", finished_run(ARM))


def test_a_disk_that_takes_nothing_ends_the_run_with_its_code_and_the_old_checkpoint(capsys):
    with contextlib.ExitStack() as stack, in_the_middle_of(STOP, lambda: stack.enter_context(full_disk(0))):
        assert go("fuller") == 6
    printed = capsys.readouterr()
    assert "metrics.jsonl: cannot be written" in printed.out and "metric rows wait" in printed.out
    assert "error: " in printed.err and "free some disk space" in printed.err and "Traceback" not in printed.err
    assert [row["step"] for row in rows(directory("fuller"))] == [2, 4, 6]
    assert newest("fuller")[0] == 4 and not (directory("fuller") / "results.json").exists()
    assert go("fuller") == 0
    assert_equal_to_never_having_stopped("fuller", finished_run(ARM))


def test_a_step_that_does_not_fit_ends_with_its_code(capsys):
    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice")

    with in_the_middle_of(STOP, exhaust):
        assert go("memory") == 4
    err = capsys.readouterr().err
    assert "Tried to allocate 20.00 GiB" in err and "learning.classes_per_batch" in err and len(err.splitlines()) == 1


def test_sigterm_on_a_full_disk_says_that_the_last_save_failed(capsys):
    def terminate_on_a_full_disk():
        stack.enter_context(full_disk(0))
        terminate()

    with contextlib.ExitStack() as stack, in_the_middle_of(STOP, terminate_on_a_full_disk):
        assert go("full-at-the-end") == 6
    assert f"the checkpoint of step {STOP + 1} could not be written" in capsys.readouterr().err
    assert newest("full-at-the-end")[0] == 4


def test_sigterm_to_a_process_checkpoints_and_the_same_command_goes_on(tmp_path, reference):
    """A real process, a real signal in the middle of a step, its exit code; then going on, here."""
    ready = tmp_path / "ready"
    arguments = ["run", str(reference.config_path), "run.name=process"]
    script = textwrap.dedent(f"""
        import pathlib, sys, time
        from modules.termination import termination
        import trainer
        from tests.base.test_resume import in_the_middle_of
        def wait():
            pathlib.Path({str(ready)!r}).touch()
            while not termination._asked:
                time.sleep(0.01)
        with in_the_middle_of({STOP}, wait):
            sys.exit(trainer.main({arguments!r}))
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=-3, stderr=-1, text=True)
    try:
        deadline = time.monotonic() + 240
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert f"error: SIGTERM: checkpointed at step {STOP + 1} of {SETTINGS['learning.steps']}" in err
    assert "Traceback" not in err
    assert go("process") == 0
    assert_equal_to_never_having_stopped("process", reference)
