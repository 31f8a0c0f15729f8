"""Files that others made run no code, and a run opens no connection."""

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

import trainer
from modules import state
from modules.config import Pipeline
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.tokens import FILE, load_tokens, safe_name
from modules.errors import ConfigError, DataError, StorageError
from tests.base.tinyset import connections, finished_run
from tests.tiny import pipeline_folder

UNET = "unet/diffusion_pytorch_model"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """A function that writes a pickle bomb to a path; at the end of the test none has gone off."""

    def place(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": Bomb(tmp_path / "exploded")}, path)
        return path

    torch.load(place(tmp_path / "works.pt"), weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb would go off"
    (tmp_path / "exploded").unlink()
    yield place
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [f"{UNET}.safetensors", f"{UNET}.bin", f"{UNET}.fp16.bin"])
def test_a_bomb_as_weights(name, bomb, tmp_path):
    folder = shutil.copytree(pipeline_folder(), tmp_path / "pipeline")
    (folder / f"{UNET}.safetensors").unlink()
    bomb(folder / name)
    with pytest.raises(DataError, match="unet"):
        load_pipeline(Pipeline(path=str(folder)))


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors"])
def test_a_bomb_as_a_single_file(name, bomb, tmp_path):
    with pytest.raises(DataError, match=name):
        load_pipeline(Pipeline(path=str(bomb(tmp_path / name))))


def test_a_bomb_as_lora_or_vae(bomb, tmp_path):
    for setting in ("lora", "vae"):
        path = bomb(tmp_path / setting / "weights.safetensors")
        value = {setting: str(path if setting == "lora" else path.parent)}
        with pytest.raises((DataError, ConfigError)):
            load_pipeline(Pipeline(path=str(pipeline_folder()), **value))


def test_a_bomb_as_a_class_token(bomb, tmp_path):
    for label in ("bolt", "nut"):
        bomb(tmp_path / safe_name(label) / FILE)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_tokens(tmp_path, ("bolt", "nut"), "0" * 64)


def test_a_bomb_as_a_checkpoint_whose_manifest_vouches_for_it(bomb, tmp_path):
    folder = tmp_path / "checkpoints"
    state.save_checkpoint(folder, 1, {"a": torch.ones(2)})
    path = state.save_checkpoint(folder, 2, {"a": torch.zeros(2)})
    content = bomb(path / "tensors.safetensors").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    step, _, complaints = state.load_newest(folder)
    assert step == 1 and "step-00000002: cannot be read" in complaints[0]
    shutil.rmtree(folder / "step-00000001")
    with pytest.raises(StorageError, match="no valid checkpoint is left"):
        state.load_newest(folder)


def test_a_run_opens_no_connection():
    assert finished_run("supcon").connections == set()
    with connections() as seen:
        socket.getaddrinfo("127.0.0.1", 9)
    assert seen, "a connection would be seen"


def test_no_test_reaches_a_network():
    with pytest.raises(AssertionError, match="tried to connect"):
        socket.create_connection(("127.0.0.1", 9))


def test_a_pipeline_that_is_not_here_is_not_fetched_unless_asked(tmp_path, capsys):
    config = finished_run("supcon").config_path
    with connections() as seen:
        call = ["run", str(config), "pipeline.path=stable-diffusion-v1-5/stable-diffusion-v1-5", f"run.dir={tmp_path}"]
        assert trainer.main(call) == 3
    assert not seen
    assert "pipeline.allow_download" in capsys.readouterr().err
