"""`train-pipeline` from a folder without captions: exact resume, a pipeline that runs, curves and sheets."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from modules import state
from modules.commands.train_pipeline import command
from modules.console import Console
from modules.errors import ConfigError, DataError

SETTINGS = [
    "shape.resolution=16", "shape.vae_channels=[16, 16]", "shape.unet_channels=[16, 16]", "shape.text_width=16",
    "shape.text_layers=1", "shape.text_heads=2", "shape.vocabulary=900", "training.vae_steps=4", "training.vae_batch=4",
    "training.unet_steps=4", "training.unet_batch=4", "training.warmup_steps=2", "run.log_every=2",
    "run.checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("things")
    generator = np.random.default_rng(0)
    for label in ("Bolt", "Ring"):
        (root / label).mkdir()
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


def train(root, folder, *settings):
    config = folder / "tiny.yaml"
    config.write_text(f"data: {{root: {root}}}\nrun: {{dir: {folder}}}\n")
    command(str(config), [*SETTINGS, *settings], Console(io.StringIO()), None, None)
    return folder / "tiny"


class Stop(Exception):
    """Ends a training at its first checkpoint of the second stage."""


def test_a_folder_without_captions_becomes_a_pipeline_and_resumes_exactly(root, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(root, tmp_path / "a")
    save = state.save_checkpoint

    def stop(folder, step, tree, keep):
        save(folder, step, tree, keep)
        if folder.name == "unet":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_checkpoint", stop)
        with pytest.raises(Stop):
            train(root, tmp_path / "b")
    again = train(root, tmp_path / "b")
    for name in ("vae", "unet", "text_encoder"):
        files = [next((folder / "pipeline" / name).glob("*.safetensors")) for folder in (whole, again)]
        first, second = map(load_file, files)
        assert all((first[key] == second[key]).all() for key in first), name
    facts = json.loads((whole / "pipeline" / "training.json").read_text())
    assert {"bolt", "ring", "object", "photo"} <= set(facts["trained_words"])
    assert facts["images"] == 6
    for name in ("curves", "reconstructions", "samples"):
        assert Image.open(whole / f"{name}.png").size[0] > 100
    assert not (whole / "checkpoints").exists()
    results = json.loads((whole / "results.json").read_text())
    assert results["train.vae_psnr_db"] > 0


def test_a_finished_pipeline_is_trained_on_with_its_vae_as_it_was(root, tmp_path):
    (tmp_path / "first").mkdir()
    first = train(root, tmp_path / "first") / "pipeline"
    further = train(root, tmp_path, f"training.start={first}", "training.unet_steps=2") / "pipeline"
    vae, unet = ("vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    assert (first / vae).read_bytes() == (further / vae).read_bytes()
    assert (first / unet).read_bytes() != (further / unet).read_bytes()
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (first, further)]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    before, after = (json.loads((folder / "training.json").read_text()) for folder in (first, further))
    assert after["started_from"]["sha256"] == before["sha256"]
    assert set(before["trained_words"]) <= set(after["trained_words"])


def test_a_start_of_another_resolution_or_without_a_part_is_refused(root, tmp_path):
    (tmp_path / "first").mkdir()
    first = train(root, tmp_path / "first") / "pipeline"
    with pytest.raises(ConfigError, match="shape.resolution=16"):
        train(root, tmp_path, f"training.start={first}", "shape.resolution=8")
    (first / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "second").mkdir()
    with pytest.raises(DataError, match="unet"):
        train(root, tmp_path / "second", f"training.start={first}")


def test_images_smaller_than_the_pipeline_are_refused(root, tmp_path):
    with pytest.raises(DataError, match="16"):
        train(root, tmp_path, "shape.resolution=32")
