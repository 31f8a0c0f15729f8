"""Checkpoints: exact, atomic, newest valid one; a kill at any moment loses nothing."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from modules import state
from modules.errors import StorageError

TREE = {
    "weights": {"a.b": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.float16)},
    "optimizer": {0: {"exp_avg": torch.zeros(3)}, 1: None},
    "list": [1, 2.5, "x", True, [torch.tensor(7, dtype=torch.int64)]],
    "tiny": 0.1 + 0.2,
}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def test_a_tree_comes_back_exactly(tmp_path):
    state.save_checkpoint(tmp_path, 12, TREE)
    step, tree, complaints = state.load_newest(tmp_path)
    assert (step, complaints) == (12, [])
    assert equal(TREE, tree)
    assert state.save_checkpoint(tmp_path, 12, TREE) == tmp_path / "step-00000012", "it stands already"


def test_old_checkpoints_go_only_after_the_new_one_stands(tmp_path):
    for step in (1, 2, 3):
        state.save_checkpoint(tmp_path, step, TREE, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_beyond_the_resumed_step_do_not_count_among_those_kept(tmp_path, keep):
    """Step 8 was damaged, the run went on from 4 and saves 6: that is what a kill before 8 must find."""
    state.save_checkpoint(tmp_path, 4, TREE)
    (state.save_checkpoint(tmp_path, 8, TREE) / "tree.json").write_text("{}")
    assert state.load_newest(tmp_path)[0] == 4
    state.save_checkpoint(tmp_path, 6, TREE, keep=keep)
    step, _, complaints = state.load_newest(tmp_path)
    assert (step, complaints) == (6, [])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"][-keep:]


def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(tmp_path):
    shutil.copytree(state.save_checkpoint(tmp_path, 4, TREE), tmp_path / "step-00000004.bak")
    (tmp_path / "step-notes").write_text("mine")
    assert state.load_newest(tmp_path)[0] == 4
    for step in (6, 8):
        state.save_checkpoint(tmp_path, step, TREE, keep=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004.bak", "step-00000008", "step-notes"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path):
    (tmp_path / "step-00000002").write_text("a file in its place, for which rmtree fails as it may on NFS")
    for step in (4, 6):
        state.save_checkpoint(tmp_path, step, TREE, keep=1)
    assert state.load_newest(tmp_path)[0] == 6 and (tmp_path / "step-00000002").is_file()


@pytest.mark.parametrize("damage", ["truncate", "no manifest", "garbage manifest"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tmp_path, damage):
    state.save_checkpoint(tmp_path, 1, TREE)
    newest = state.save_checkpoint(tmp_path, 2, TREE)
    if damage == "truncate":
        (newest / "tensors.safetensors").write_bytes(b"\x00" * 10)
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("[]")
    step, _, complaints = state.load_newest(tmp_path)
    assert step == 1
    assert len(complaints) == 1
    assert "step-00000002" in complaints[0]
    assert "an older checkpoint is used" in complaints[0]


def test_no_valid_checkpoint_left_is_an_error_not_a_restart(tmp_path):
    path = state.save_checkpoint(tmp_path, 1, TREE)
    (path / "tree.json").write_text("{}")
    with pytest.raises(StorageError, match="no valid checkpoint is left"):
        state.load_newest(tmp_path)
    assert state.load_newest(tmp_path / "empty") is None


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    state.save_checkpoint(tmp_path, 1, TREE)

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        state.save_checkpoint(tmp_path, 2, TREE)
    assert state.load_newest(tmp_path)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/checkpoints: the checkpoint of step 1 could not be written"):
        state.save_checkpoint(tmp_path / "file" / "checkpoints", 1, TREE)


def test_every_part_is_on_the_disk_before_the_checkpoint_counts(tmp_path, monkeypatch):
    synced, opened = [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    state.save_checkpoint(tmp_path, 1, TREE)
    building = f".step-00000001.{os.getpid()}"
    assert synced[-3:] == ["manifest.json", building, tmp_path.name]
    assert sorted(synced[:-3]) == ["tensors.safetensors", "tree.json"]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_is_whole_or_the_one_before(tmp_path, monkeypatch):
    state.write_atomic(tmp_path / "new" / "a.json", "{}")

    def full(self, data, write=Path.write_bytes):
        write(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="a.json: could not be written .*; free some disk space"):
        state.write_atomic(tmp_path / "new" / "a.json", b"other")
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.json", "{}")]


def test_what_is_no_plain_value_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="plain values"):
        state.save_checkpoint(tmp_path, 2, {"object": object()})


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the writer may catch it or clean up after it."""


def damaged(folder: Path) -> None:
    """Step 2 stands, but cannot be used."""
    (state.save_checkpoint(folder, 2, TREE) / "tree.json").write_text("{}")


@pytest.mark.parametrize(
    ("step", "before", "kills_at_least"),
    [(2, None, 11), (1, None, 0), (2, damaged, 11)],
    ids=["the next step", "the same step again", "over a damaged one"],
)
def test_killed_before_or_after_every_file_operation_nothing_is_lost(
    tmp_path, monkeypatch, step, before, kills_at_least
):
    """The writer dies at each of its file operations in turn; the newest valid state is then the old or the new one."""
    new = TREE if step == 1 else {"new": torch.ones(3)}  # the state of a step is one
    moment, operations = 0, 0

    def dying(operation):
        def run(*args, **kwargs):
            nonlocal operations
            operations += 1
            if operations == 2 * moment + 1:
                raise Killed
            result = operation(*args, **kwargs)
            operations += 1
            if operations == 2 * moment + 2:
                raise Killed
            return result

        return run

    for owner, name in [(state, "save_file"), (state, "_fsync"), (Path, "write_text"), (Path, "rename")]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    monkeypatch.setattr(state.shutil, "rmtree", dying(state.shutil.rmtree))
    kills, folder, done = 0, tmp_path / "checkpoints", False
    while not done:
        operations = -(10**9)  # an undisturbed writer
        state.save_checkpoint(folder, 1, TREE, keep=1)
        if before is not None:
            before(folder)
        operations = 0
        try:
            state.save_checkpoint(folder, step, new, keep=1)
            done = True
        except Killed:
            kills += 1
        operations = -(10**9)
        assert state.load_newest(folder) is not None, moment
        found, tree, _ = state.load_newest(folder)
        assert (found == step and equal(tree, new)) or (found == 1 and equal(tree, TREE)), moment
        assert found == step or not done
        state.shutil.rmtree(folder)
        moment += 1
    assert kills >= kills_at_least


def write_until_killed(folder: Path, first: int, told: int) -> None:
    """Checkpoint after checkpoint; each one that stands is told through the pipe."""
    for step in itertools.count(first):
        state.save_checkpoint(folder, step, {"n": torch.full((2000,), step), "step": step}, keep=1)
        os.write(told, step.to_bytes(8))


def test_killed_at_fifty_random_moments_nothing_is_lost(tmp_path):
    """Fifty processes in a row get a real SIGKILL while they write; each goes on from what the one before left."""
    draw, last, torn = random.Random(0), 0, 0
    for _ in range(50):
        hear, told = os.pipe()
        writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(tmp_path, last + 1, told))
        writer.start()
        os.close(told)
        begun = os.read(hear, 8)
        assert begun, "the writer has saved something"
        last = int.from_bytes(begun)
        time.sleep(draw.uniform(0, 0.02))
        writer.kill()
        writer.join()
        while content := os.read(hear, 8):
            last = int.from_bytes(content)
        os.close(hear)
        torn += bool(list(tmp_path.glob(".step-*")))
        step, tree, complaints = state.load_newest(tmp_path)
        assert step >= last and not complaints, "what was told to be saved is there"
        assert tree["step"] == step and bool((tree["n"] == step).all())
        last = step
    assert torn > 5, "kills came while a checkpoint was being written"


def test_a_safetensors_file_is_a_function_of_its_content():
    """The library shuffles metadata: equal weights would have unequal hashes."""
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).T, "b": shared}
    facts = {f"key {i}": f"välue {i}" for i in range(12)}
    content = state.safetensors_bytes(tensors, facts)
    assert all(state.safetensors_bytes(tensors, dict(reversed(facts.items()))) == content for _ in range(5))
    assert (int.from_bytes(content[:8], "little")) % 8 == 0
    assert all(torch.equal(value, tensors[name]) for name, value in load(content).items())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == facts
    assert torch.equal(load(state.safetensors_bytes(tensors))["b"], shared), "no facts are needed"
