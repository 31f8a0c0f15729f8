"""`train-pipeline` from a folder without captions: exact resume, a pipeline that runs, curves and sheets."""

import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import trainer
from modules import state
from modules.commands import train_pipeline
from modules.commands.train_pipeline import chosen_items, command, wordings
from modules.console import Console
from modules.data.index import read_raw
from modules.diffusion import train_pipeline as training
from modules.errors import ConfigError, DataError, NonFinite, StorageError
from modules.termination import termination

SETTINGS = [
    "shape.resolution=16", "shape.vae_channels=[16, 16]", "shape.unet_channels=[16, 16]", "shape.text_width=16",
    "shape.text_layers=1", "shape.text_heads=2", "shape.vocabulary=900", "training.vae_steps=4", "training.vae_batch=4",
    "training.unet_steps=4", "training.unet_batch=4", "training.warmup_steps=2", "run.log_every=2",
    "run.checkpoint_every=2", "run.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_sigterm_is_left_over():
    before = signal.getsignal(signal.SIGTERM)
    yield
    termination.listen()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("things")
    generator = np.random.default_rng(0)
    for label in ("Bolt", "Ring"):
        (root / label).mkdir()
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


def written_config(root, folder):
    config = folder / "tiny.yaml"
    config.write_text(f"data: {{root: {root}}}\nrun: {{dir: {folder}}}\n")
    return config


def train(root, folder, *settings):
    command(str(written_config(root, folder)), [*SETTINGS, *settings], Console(io.StringIO()), None, None)
    return folder / "tiny"


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The directory of a training that never stopped."""
    return train(root, tmp_path_factory.mktemp("whole"))


def stopping(monkeypatch, step: int, interrupt):
    """Within this context the UNet stage calls `interrupt` in the middle of its update number `step`."""
    update = training.Stage.update

    def stop(stage, loss):
        if "unet" in stage.modules and stage.step == step:
            interrupt()
        update(stage, loss)

    monkeypatch.setattr(training.Stage, "update", stop)


def press_ctrl_c():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_folder_without_captions_becomes_a_pipeline(whole):
    facts = json.loads((whole / "pipeline" / "training.json").read_text())
    assert {"bolt", "ring", "object", "photo"} <= set(facts["trained_words"])
    assert facts["images"] == 6
    for name in ("curves", "reconstructions", "samples"):
        assert Image.open(whole / f"{name}.png").size[0] > 100
    assert not (whole / "checkpoints").exists()
    results = json.loads((whole / "results.json").read_text())
    assert results["train.vae_psnr_db"] > 0


@pytest.mark.parametrize(("interrupt", "code", "checkpoint"), [(press_ctrl_c, 130, 2), (terminate, 143, 4)])
def test_a_stopped_training_goes_on_as_if_it_never_had(
    interrupt, code, checkpoint, root, whole, tmp_path, monkeypatch, capsys
):
    """In the middle of the fourth UNet step; a checkpoint stands at the second."""
    call = ["train-pipeline", str(written_config(root, tmp_path)), *SETTINGS]
    with monkeypatch.context() as patch:
        stopping(patch, 3, interrupt)
        assert trainer.main(call) == code
    termination.listen()
    assert "the same command" in capsys.readouterr().err
    assert state.load_newest(tmp_path / "tiny" / "checkpoints" / "unet")[0] == checkpoint
    again = train(root, tmp_path)
    for name in ("vae", "unet", "text_encoder"):
        files = [next((folder / "pipeline" / name).glob("*.safetensors")) for folder in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert (whole / "results.json").read_text() == (again / "results.json").read_text()


@pytest.mark.gpu
def test_a_pipeline_is_made_resumed_and_trained_on_on_a_gpu(root, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 3, press_ctrl_c)
        train(root, tmp_path, "run.device=cuda")
    made = train(root, tmp_path, "run.device=cuda")
    figures = [json.loads((folder / "results.json").read_text()) for folder in (whole, made)]
    for name in ("train.unet_loss", "train.vae_psnr_db"):  # the draws are those of the CPU
        assert figures[1][name] == pytest.approx(figures[0][name], rel=0.02)
    settings = [f"training.start={made / 'pipeline'}", "training.further_vae_steps=2", "run.name=further"]
    train(root, tmp_path, "run.device=cuda", *settings)
    for name in ("curves", "reconstructions", "samples"):
        assert Image.open(tmp_path / "further" / f"{name}.png").size[0] > 100


def test_it_does_not_go_on_with_other_images(root, tmp_path, monkeypatch):
    shutil.copytree(root, tmp_path / "things")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 0, press_ctrl_c)
        train(tmp_path / "things", tmp_path)
    shutil.copy(root / "Bolt" / "0.png", tmp_path / "things" / "Bolt" / "1.png")
    with pytest.raises(DataError, match="not those that this training began with; restore them, or set run.name"):
        train(tmp_path / "things", tmp_path)


def test_weights_that_are_not_finite_are_never_saved(root, tmp_path):
    with pytest.raises(NonFinite, match="stage vae, step 2 or shortly before.*training.vae_lr"):
        train(root, tmp_path, "training.vae_lr=1e30")
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_disk_too_full_for_the_pipeline_costs_no_training(root, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left.*training is done and kept"):
        patch.setattr(train_pipeline, "export", full)
        train(root, tmp_path)
    assert state.load_newest(tmp_path / "tiny" / "checkpoints" / "unet")[0] == 4
    assert not (tmp_path / "tiny" / "results.json").exists()


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_finished_pipeline_that_is_gone_or_changed_is_not_called_finished(harm, root, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tiny")
    train(root, tmp_path)
    pipeline = tmp_path / "tiny" / "pipeline"
    if harm == "gone":
        shutil.rmtree(pipeline)
    else:
        (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"of another training")
    with pytest.raises(
        DataError, match=r"pipeline: is no longer the pipeline .*; restore it, or delete .*tiny to train"
    ):
        train(root, tmp_path)


def test_two_trainings_into_one_folder_are_not_both_called_finished(root, tmp_path, monkeypatch):
    """The other one exports while this one draws its sheets: the folder holds parts of both, or the other's."""
    out = f"training.out={tmp_path / 'out'}"
    draw = train_pipeline.sheets

    def other_meanwhile(*arguments):
        monkeypatch.setattr(train_pipeline, "sheets", draw)
        train(root, tmp_path, out, "run.name=other", "run.seed=1")
        return draw(*arguments)

    monkeypatch.setattr(train_pipeline, "sheets", other_meanwhile)
    with pytest.raises(StorageError, match="out: another process has written to it meanwhile; set training.out"):
        train(root, tmp_path, out)
    assert not (tmp_path / "tiny" / "results.json").exists() and (tmp_path / "other" / "results.json").exists()
    train(root, tmp_path, out)
    with pytest.raises(DataError, match="is no longer the pipeline"):
        train(root, tmp_path, out, "run.name=other", "run.seed=1")


def test_a_finished_pipeline_is_trained_on_with_its_vae_as_it_was(root, whole, tmp_path):
    first = whole / "pipeline"
    further = train(root, tmp_path, f"training.start={first}", "training.unet_steps=2") / "pipeline"
    vae, unet = ("vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    assert (first / vae).read_bytes() == (further / vae).read_bytes()
    assert (first / unet).read_bytes() != (further / unet).read_bytes()
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (first, further)]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    before, after = (json.loads((folder / "training.json").read_text()) for folder in (first, further))
    assert after["started_from"]["sha256"] == before["sha256"]
    assert not [path for path in further.glob("*/*.json") if str(first) in path.read_text()], "no place of where it was"
    assert set(before["trained_words"]) <= set(after["trained_words"])


def test_a_damaged_record_of_its_making_is_refused_before_it_is_trained_on(root, whole, tmp_path, monkeypatch):
    first = tmp_path / "first"
    shutil.copytree(whole / "pipeline", first)
    (first / "training.json").write_text('{"trained_words": [')
    monkeypatch.setattr(train_pipeline, "_vae", lambda *_: pytest.fail("training began"))
    with pytest.raises(DataError, match="training.json: not a JSON object .*; restore the file or remove it"):
        train(root, tmp_path, f"training.start={first}", "training.unet_steps=2")


def test_a_vae_is_trained_on_where_that_is_asked_for(root, whole, tmp_path):
    first = whole / "pipeline"
    further = train(root, tmp_path, f"training.start={first}", "training.unet_steps=2", "training.further_vae_steps=2")
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / vae) for folder in (first, further / "pipeline"))
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < change < 0.1, "it begins where the other one ended"
    assert len(json.loads((further / "results.json").read_text())) == 3  # with the PSNR of its VAE
    with pytest.raises(ConfigError, match="training.start is empty"):
        train(root, tmp_path, "run.name=scratch", "training.further_vae_steps=2")


def test_a_start_of_another_resolution_or_without_a_part_is_refused(root, whole, tmp_path):
    first = shutil.copytree(whole / "pipeline", tmp_path / "first")
    with pytest.raises(ConfigError, match="shape.resolution=16"):
        train(root, tmp_path, f"training.start={first}", "shape.resolution=8")
    (first / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "second").mkdir()
    with pytest.raises(DataError, match="unet"):
        train(root, tmp_path / "second", f"training.start={first}")


def test_images_smaller_than_the_pipeline_are_refused(root, tmp_path):
    with pytest.raises(DataError, match="16"):
        train(root, tmp_path, "shape.resolution=32")


def test_images_of_ood_roles_are_never_trained_on(root, tmp_path):
    roles = {"0.png": "id", "1.png": "near_ood", "2.png": "far_ood"}
    rows = [f"{label}/{name},{label},{role}" for label in ("Bolt", "Ring") for name, role in roles.items()]
    index = shutil.copytree(root, tmp_path / "things") / "index.csv"
    index.write_text("\n".join(["path,label,role", *rows]).replace("Ring,id", "Ring,pretrain"))
    assert [item.path for item in chosen_items(read_raw(str(index)), "it")] == ["Bolt/0.png", "Ring/0.png"]
    index.write_text("\n".join(["path,label,role", *rows[1:3]]))
    with pytest.raises(DataError, match="things: holds no image to train on.*role id, pretrain or no role"):
        train(index.parent, tmp_path)


@pytest.mark.parametrize("text", ["path\nBolt/1.png\n", "path,caption,label\nRing/0.png,a ring,\nBolt/1.png, , \n"])
def test_an_image_without_any_wording_is_refused(root, tmp_path, text):
    index = shutil.copytree(root, tmp_path / "things") / "index.csv"
    index.write_text(text)
    with pytest.raises(DataError, match=r"things: Bolt/1\.png has neither.*fill its `caption` column"):
        train(index.parent, tmp_path)
    index.write_text("path,noun\nBolt/1.png,bolt\nRing/0.png,ring\n")
    assert wordings(chosen_items(read_raw(str(index)), "it"))[0] == ["a photo of a bolt", "a photo of a ring"]


@pytest.mark.parametrize("available", [True, False])
def test_bf16_is_used_where_the_device_has_it_and_it_is_said_where_not(available, root, tmp_path, monkeypatch):
    seen, step = [], training.vae_step
    monkeypatch.setattr(train_pipeline, "has_bf16", lambda device: available)
    monkeypatch.setattr(training, "vae_step", lambda stage, *rest: seen.append(stage.recipe.bf16) or step(stage, *rest))
    said = io.StringIO()
    command(str(written_config(root, tmp_path)), [*SETTINGS, "training.unet_steps=1"], Console(said), None, None)
    assert set(seen) == {available}
    assert ("this device has no bf16" in said.getvalue()) is not available
