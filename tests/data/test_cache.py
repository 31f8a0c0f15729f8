"""The cache: named by all it was made from, whole or absent, shared by processes."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modules.data.cache import cached_tensors, digest_of, digest_tensor
from modules.errors import StorageError

KEY = {"pixels": "abc", "size": 64, "margin": 0.1, "dtype": None, "sizes": (1, 2)}
TENSORS = {"x": torch.arange(6).reshape(2, 3), "y": torch.tensor([0.5], dtype=torch.float16)}


class Maker:
    def __init__(self, tensors=TENSORS):
        self.tensors, self.calls, self.said = tensors, 0, []

    def __call__(self):
        self.calls += 1
        return self.tensors

    def get(self, folder, key=KEY):
        return cached_tensors(folder, "moments", key, self, self.said.append)


def test_made_once_then_read(tmp_path):
    maker = Maker()
    first, second = maker.get(tmp_path / "new"), maker.get(tmp_path / "new")
    assert maker.calls == 1 and "made and kept" in maker.said[0] and "read from" in maker.said[1]
    for found in (first, second):
        assert set(found) == {"x", "y"} and all(torch.equal(found[k], TENSORS[k]) for k in found)
        assert found["y"].dtype == torch.float16


@pytest.mark.parametrize("change", [{"size": 65}, {"margin": 0.2}, {"dtype": "fp16"}, {"more": 1}, {"size": 64.0}])
def test_another_key_is_another_file(tmp_path, change):
    maker = Maker()
    maker.get(tmp_path)
    maker.get(tmp_path, {**KEY, **change})
    assert maker.calls == 2 and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_key_has_one_digest_however_it_is_written():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": (1, 2), "a": 1})
    assert digest_of({"a": "1"}) != digest_of({"a": 1}) != digest_of({"a": True})


@pytest.mark.parametrize("value", [torch.zeros(1), object(), {1: 2}, {"b"}])
def test_a_key_of_something_else_is_refused(value):
    with pytest.raises(TypeError, match="a cache key"):
        digest_of({"a": value})


def test_a_tensors_digest_sees_values_shape_and_type_and_not_the_layout():
    x = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    assert digest_tensor(x) == digest_tensor(x.clone()) == digest_tensor(x.transpose(0, 2).contiguous().transpose(0, 2))
    different = [x + 1, x.reshape(4, 6), x.to(torch.int8), x[:0]]
    assert len({digest_tensor(t) for t in [x, *different]}) == 5
    assert digest_tensor(torch.ones(3, dtype=torch.bfloat16)) != digest_tensor(torch.zeros(3, dtype=torch.bfloat16))
    assert digest_tensor(torch.tensor(1.0)) != digest_tensor(torch.tensor(2.0))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda content: content[: len(content) // 2], "is damaged"),
        (lambda content: b"", "is damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "does not match its own hash"),
        (lambda content: content.replace(b"abc", b"abd", 1), "was made from another key"),
    ],
)
def test_a_damaged_file_is_made_again_and_said_so(tmp_path, damage, said):
    maker = Maker()
    maker.get(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    again = maker.get(tmp_path)
    assert maker.calls == 2 and said in maker.said[1] and "made again" in maker.said[1]
    assert torch.equal(again["x"], TENSORS["x"])
    maker.get(tmp_path)
    assert maker.calls == 2


def test_a_maker_that_fails_leaves_nothing_behind(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_tensors(tmp_path, "moments", KEY, fail, print)
    assert not list(tmp_path.glob("*.safetensors"))
    assert Maker().get(tmp_path)["x"].shape == (2, 3)


def test_a_pickle_in_place_of_a_cache_file_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    maker = Maker()
    maker.get(tmp_path)
    torch.save(Bomb(), next(tmp_path.glob("*.safetensors")))
    maker.get(tmp_path)
    assert maker.calls == 2 and not (tmp_path / "exploded").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Maker().get(tmp_path / "file" / "cache")


def _ask(folder, barrier, answers):
    def make():
        time.sleep(0.2)
        return {"made_by": torch.tensor([multiprocessing.current_process().pid])}

    barrier.wait()
    answers.put(int(cached_tensors(folder, "moments", KEY, make, lambda text: None)["made_by"]))


def test_several_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_ask, args=(tmp_path, barrier, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    makers = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(makers) == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from modules.data.cache import digest_of, locked\n"
        f"with locked(Path({str(tmp_path)!r}) / 'moments-{digest_of(KEY)[:32]}.safetensors', print):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60).returncode == -9
    assert Maker().get(tmp_path)["x"].shape == (2, 3)
