"""Weights distilled to a few steps whose files do not say so: single files and LoRAs, sampled as they are declared."""

import dataclasses
import json
import shutil

import pytest
import torch

from modules import config
from modules.config import Generation
from modules.diffusion import shapes, single_file
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.presets import plan
from modules.errors import ConfigError, DataError
from tests.diffusion.compvis import save_single_file
from tests.diffusion.engine import Engine
from tests.diffusion.test_checkpoints import LCM, TURBO, lora_file
from tests.tiny import build_parts, pipeline_folder, save_parts

SETTINGS = Generation(num_inference_steps=20, guidance_scale=7.5)
SAMPLED = {"lcm": ("lcm", LCM), "turbo": ("euler", TURBO)}


def load(path, **changes):
    return load_pipeline(dataclasses.replace(config.Pipeline(), path=str(path), **changes))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Writes a tiny single file with a vocabulary and no configurations beside it, of a family that is known by width 32."""

    def write(second=False, **options):
        parts = build_parts(second=second, **options)
        monkeypatch.setattr(single_file, "WIDTHS", {32: "sd2" if second else "sd1"})
        plain = build_parts(second=second)  # the shapes of a family know nothing of what was distilled

        def shapes_of(family, prediction_type="epsilon"):
            return {
                "unet": dict(plain["unet"].config),
                "vae": dict(plain["vae"].config),
                "text_encoder": plain["text_encoder"].config.to_diff_dict(),
                "scheduler": shapes.SCHEDULER | {"prediction_type": prediction_type},
            }

        monkeypatch.setattr(shapes, "shapes_of", shapes_of)
        shutil.copytree(save_parts(parts, tmp_path / "words") / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
        save_single_file(parts, tmp_path / "model.safetensors", second=second)
        return tmp_path / "model.safetensors", parts

    return write


def assert_sampled_as(pipeline, folder) -> None:
    """Preset turbo takes the steps that it takes on a diffusers folder whose scheduler config says what it is."""
    told = load(folder)
    ours, theirs = (plan("turbo", SETTINGS, one) for one in (pipeline, told))
    assert (ours.solver, ours.num_inference_steps) == (theirs.solver, theirs.num_inference_steps)
    grids = ours.grids(pipeline.scheduler).full, theirs.grids(told.scheduler).full
    assert grids[0].timesteps == grids[1].timesteps and torch.equal(grids[0].steps_N8, grids[1].steps_N8)
    assert pipeline.family == told.family and pipeline.prediction_type == told.prediction_type


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("family", SAMPLED)
def test_a_single_file_is_sampled_as_declared(family, second, alone):
    path, parts = alone(second=second)
    solver, scheduler = SAMPLED[family]
    given = {"prediction_type": "epsilon"} if second and family == "lcm" else {}  # SD Turbo predicts noise; others say
    pipeline = load(path, family=family, **given)
    assert plan("turbo", SETTINGS, pipeline).solver == solver
    assert plan("turbo", SETTINGS, pipeline).guidance_scale == 1.0
    assert_sampled_as(pipeline, pipeline_folder(second=second, scheduler=scheduler))
    assert torch.equal(pipeline.unet.conv_in.weight, parts["unet"].conv_in.weight)
    if not second:
        assert load(path).family == "sd1", "undeclared it is what it looks like"
        with pytest.raises(ConfigError, match="turbo needs weights distilled .*pipeline.family says what a"):
            plan("turbo", SETTINGS, load(path))


@pytest.mark.parametrize("name", ["time_embed", "time_embedding"])
def test_a_unet_that_takes_its_guidance_as_an_input_needs_no_declaration(name, alone, monkeypatch):
    monkeypatch.setitem(save_single_file.__globals__["UNET"], "time_embedding.cond_proj", f"{name}.cond_proj")
    path, parts = alone(time_cond_proj_dim=64)
    pipeline = load(path)
    assert pipeline.family == "lcm" and pipeline.guidance_embedding_width == 64
    ours, theirs = pipeline.unet.state_dict(), parts["unet"].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert_sampled_as(pipeline, pipeline_folder(time_cond_proj_dim=64, scheduler=LCM))
    with pytest.raises(ConfigError, match="pipeline.family is turbo, but .* is lcm"):
        load(path, family="turbo")


@pytest.mark.parametrize("family", SAMPLED)
def test_a_lora_makes_of_its_base_model_what_is_declared(family, tmp_path, monkeypatch):
    lora = str(lora_file(tmp_path))
    pipeline = load(pipeline_folder(), lora=lora, family=family)
    assert_sampled_as(pipeline, pipeline_folder(scheduler=SAMPLED[family][1]))
    plain = load(pipeline_folder(), lora=lora)
    assert plain.family == "sd1" and plain.digest != pipeline.digest, "other images, so other tokens"
    own = plan("turbo", SETTINGS, pipeline)
    monkeypatch.setattr("tests.diffusion.engine.tiny_pipeline", lambda *_: pipeline)
    engine = Engine(own.solver, own.num_inference_steps, guidance=1.0, strengths=(0.5, 1.0), slots=2)
    engine.make(2)
    for i in range(2):
        assert (engine.finished[i] - engine.by_diffusers(engine.request(i), monkeypatch)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", SAMPLED)
def test_a_folder_says_itself_what_it_is_and_how_it_would_is_told(family, tmp_path):
    with pytest.raises(
        ConfigError, match="is sd1; set it to auto or sd1; .*scheduler_config.json must say so"
    ) as caught:
        load(pipeline_folder(), family=family)
    folder = shutil.copytree(pipeline_folder(), tmp_path / "told")
    path = folder / "scheduler" / "scheduler_config.json"
    said = str(caught.value).split("must say so (")[1].split(")")[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(f"{{{said}}}")))
    assert load(folder, family=family).family == family


def test_a_file_of_unknown_shape_says_how_to_make_its_configurations(alone, monkeypatch):
    path, _ = alone()
    monkeypatch.setattr(single_file, "WIDTHS", {})
    with pytest.raises(DataError, match=r"put a folder .*model/ beside it with the unet/.*from_single_file"):
        load(path, family="turbo")
