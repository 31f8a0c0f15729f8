"""Every kind of checkpoint: loaded as diffusers loads it, painting as diffusers paints, refused with a clear message."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from modules import config
from modules.diffusion import checkpoints, shapes
from modules.diffusion.pipeline import load_pipeline
from modules.errors import ConfigError, DataError
from tests.diffusion.compvis import save_single_file
from tests.diffusion.engine import Engine
from tests.tiny import build_parts, pipeline_folder, save_parts

TURBO = (("_class_name", "EulerDiscreteScheduler"), ("timestep_spacing", "trailing"))
LCM = (("_class_name", "LCMScheduler"),)
FAMILIES = {  # name -> (options of the tiny pipeline, solver, steps, guidance)
    "sd2": ({"second": True, "prediction_type": "v_prediction"}, "ddim", 6, 7.5),
    "turbo": ({"second": True, "scheduler": TURBO}, "euler", 4, 1.0),
    "lcm": ({"time_cond_proj_dim": 64, "scheduler": LCM}, "lcm", 4, 8.5),
    "taesd": ({"tiny_vae": True}, "dpmpp_2m", 6, 7.5),
    "other resolution": ({"resolution": 40}, "ddim", 6, 7.5),
}


def load(path, **changes):
    return load_pipeline(dataclasses.replace(config.Pipeline(), path=str(path), **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_diffusers(family, monkeypatch):
    options, solver, count, guidance = FAMILIES[family]
    engine = Engine(solver, count, guidance=guidance, options=options.items(), strengths=(0.5, 1.0), slots=3)
    assert engine.pipeline.family == (family if family in ("sd2", "turbo", "lcm") else "sd1")
    engine.make(4)
    for i in range(4):
        expected = engine.by_diffusers(engine.request(i), monkeypatch)
        assert (engine.finished[i] - expected).abs().max() <= 1e-4
        assert expected.std() > 0.01
    if family == "lcm":
        assert len(engine.slots.in_flight.kv_RTX) == 3  # the UNet is told its guidance: no second half


def test_a_unet_takes_any_resolution(monkeypatch):
    engine = Engine("ddim", 4, strengths=(0.5, 1.0), slots=2, resolution=48)
    engine.make(2)
    for i in range(2):
        assert engine.finished[i].shape == (3, 48, 48)
        assert (engine.finished[i] - engine.by_diffusers(engine.request(i), monkeypatch)).abs().max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_half_precision_on_a_gpu_stays_close_to_diffusers(solver, monkeypatch):
    engine = Engine(solver, 8, device="cuda", dtype=torch.float16)
    engine.make(4)
    for i in range(4):
        expected = engine.by_diffusers(engine.request(i), monkeypatch).float()
        error = (engine.finished[i].float() - expected).square().mean()
        assert -10 * error.log10() >= 40


@pytest.fixture
def single(tmp_path):
    """Writes a tiny single file with its configurations and vocabulary beside it; returns (file, parts)."""

    def write(name="model", metadata=None, configs=True, second=False, **options):
        parts = build_parts(second=second, **options)
        folder = save_parts(parts, tmp_path / name)
        for part in ("unet", "vae", "text_encoder"):
            for weights in (folder / part).glob("*.safetensors"):
                weights.unlink()
        if not configs:
            shutil.rmtree(folder)
        path = tmp_path / f"{name}.safetensors"
        save_single_file(parts, path, metadata, second)
        return path, parts

    return write


@pytest.mark.parametrize("second", [False, True])
def test_a_single_file_gives_the_same_parts_as_the_folder(single, second):
    path, parts = single(second=second, prediction_type="v_prediction" if second else "epsilon")
    tiny = load(path)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(tiny, name).state_dict(), parts[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert tiny.family == ("sd2" if second else "sd1")
    assert tiny.prediction_type == ("v_prediction" if second else "epsilon")
    prompt = ["a photo of a rusty screw"]
    ids = parts["tokenizer"](prompt, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tiny.prompt_ids(prompt), ids)
    with torch.no_grad():
        assert torch.equal(tiny.embed(prompt), parts["text_encoder"](ids).last_hidden_state)


@pytest.mark.parametrize("second", [False, True])
def test_a_single_file_pads_as_its_family_whosever_vocabulary_stands_beside_it(single, second):
    path, parts = single(second=second)
    words = path.with_suffix("") / "tokenizer"
    shutil.rmtree(words)
    shutil.copytree(pipeline_folder(second=not second) / "tokenizer", words)
    ids = parts["tokenizer"](["a rusty screw"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(load(path).prompt_ids(["a rusty screw"]), ids)


def test_built_in_shapes_are_stable_diffusions(tmp_path):
    with torch.device("meta"):
        unet = {name: shapes.UNet2DConditionModel(**shapes.shapes_of(name)["unet"]) for name in ("sd1", "sd2")}
        vae = shapes.AutoencoderKL(**shapes.VAE)
        text = shapes.CLIPTextModel(shapes.CLIPTextConfig(**shapes.TEXT))
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in unet.items()}
    assert count == {"sd1": 859_520_964, "sd2": 865_910_724}
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == 123_060_480
    assert shapes.shapes_of("sd2", "v_prediction")["unet"]["sample_size"] == 96
    folder = shapes.write_configs(shapes.shapes_of("sd1"), tmp_path / "configs")
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"


def test_random_weights_have_finite_outputs_that_depend_on_everything(monkeypatch):
    small = {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    small |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "cross_attention_dim": 32}
    monkeypatch.setattr(shapes, "UNET", shapes.UNET | small)
    vae = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2}
    monkeypatch.setattr(shapes, "VAE", shapes.VAE | vae | {"up_block_types": ["UpDecoderBlock2D"] * 2})
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(shapes, "TEXT", shapes.TEXT | text)
    pipeline = load("ignored", weights="random", resolution=16)
    context = pipeline.embed(["a photo of a thing", ""])
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        t = torch.tensor([300, 300])
        first, second = (pipeline.unet(x, t, c).sample for x, c in ((z, context), (z, context.flip(0))))
    for value in (context, first, pipeline.decode(z)):
        assert value.isfinite().all() and value.std() > 1e-3
    assert (first - second).abs().max() > 1e-4
    again = load("ignored", weights="random", resolution=16)
    assert torch.equal(again.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_a_second_generation_file_must_say_what_it_predicts(single, monkeypatch):
    monkeypatch.setattr(checkpoints, "read_folder", None)
    from modules.diffusion import single_file

    monkeypatch.setattr(single_file, "WIDTHS", {32: "sd2"})
    path, _ = single(configs=False, second=True)
    with pytest.raises(ConfigError, match="does not say what its UNet predicts"):
        load(path)
    told, _ = single("told", configs=False, second=True, metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(ConfigError, match="says v_prediction"):
        load(told, prediction_type="epsilon")
    small = {
        "sd2": lambda family, predicts: {
            "unet": dict(build_parts(second=True)["unet"].config),
            "vae": dict(build_parts()["vae"].config),
            "text_encoder": build_parts(second=True)["text_encoder"].config.to_diff_dict(),
            "scheduler": shapes.SCHEDULER | {"prediction_type": predicts},
        }
    }
    monkeypatch.setattr(shapes, "shapes_of", small["sd2"])
    save_parts(build_parts(), told.parent / "words")
    shutil.copytree(told.parent / "words" / "tokenizer", told.parent / "tokenizer")
    assert load(told).prediction_type == "v_prediction"
    assert load(path, prediction_type="epsilon").prediction_type == "epsilon"


def test_a_single_file_needs_a_vocabulary(single, monkeypatch):
    path, _ = single()
    shutil.rmtree(path.with_suffix("") / "tokenizer")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="brings no vocabulary; put the tokenizer/ folder"):
        load(path)


def test_single_files_of_other_kinds_are_refused(single, tmp_path):
    path, _ = single(configs=False)
    with pytest.raises(DataError, match="texts 32 wide, neither 768"):
        load(path)
    save_file({"conditioner.embedders.0.weight": torch.zeros(2)}, tmp_path / "xl.safetensors")
    with pytest.raises(DataError, match="no Stable Diffusion 1.x or 2.x"):
        load(tmp_path / "xl.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="not a readable safetensors"):
        load(tmp_path / "cut.safetensors")
    for name in ("model.ckpt", "model.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="pickled weights can run code"):
        load(tmp_path / "model.ckpt")
    with pytest.raises(DataError, match="neither a folder nor"):
        load(tmp_path / "model.gguf")


def test_a_single_file_that_lacks_weights_is_refused(single):
    path, _ = single()
    weights = load_file(path)
    for gone in ("model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.bias"):
        save_file({k: v for k, v in weights.items() if k != gone}, path)
        with pytest.raises(DataError, match="lacks 1 weights, the first is"):
            load(path)


def lora_file(tmp_path, width=32, seed=0):
    """A LoRA of rank 2 for the attention of a tiny UNet, with products that are not zero, as diffusers saves it."""
    parts = build_parts()
    unet = parts["unet"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    if width != 32:
        layers = {k: v[:, :width].clone() if v.shape[1] == 32 else v for k, v in layers.items()}
    StableDiffusionImg2ImgPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    return tmp_path / "pytorch_lora_weights.safetensors"


def test_a_lora_changes_the_unet_as_diffusers_applies_it(tmp_path):
    path = lora_file(tmp_path)
    ours, plain = load(pipeline_folder(), lora=str(path)), load(pipeline_folder())
    reference = StableDiffusionImg2ImgPipeline.from_pretrained(pipeline_folder(), safety_checker=None)
    reference.load_lora_weights(str(tmp_path))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = (z, torch.tensor([400]), ours.embed(["a photo of a gear"]))
    with torch.no_grad():
        expected = reference.unet(*call).sample
        torch.testing.assert_close(ours.unet(*call).sample, expected, atol=1e-5, rtol=1e-4)
        assert (plain.unet(*call).sample - expected).abs().max() > 0.01
    assert ours.digest != plain.digest and ours.unet.state_dict().keys() == plain.unet.state_dict().keys()


def test_loras_that_do_not_fit_are_refused(tmp_path):
    for path, message in (
        (tmp_path / "none.safetensors", "does not exist"),
        (lora_file(tmp_path, width=16), "does not fit this pipeline"),
    ):
        with pytest.raises(DataError, match=message):
            load(pipeline_folder(), lora=str(path))
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="not a .safetensors file"):
        load(pipeline_folder(), lora=str(tmp_path / "lora.bin"))


def test_another_vae_takes_the_place_of_the_folders_own(tmp_path):
    taesd = pipeline_folder(tiny_vae=True) / "vae"
    tiny = load(pipeline_folder(), vae=str(taesd))
    assert type(tiny.vae).__name__ == "AutoencoderTiny" and tiny.scaling_factor == 1.0
    assert tiny.digest != load(pipeline_folder()).digest
    with pytest.raises(DataError, match="pipeline.vae: .* does not exist"):
        load(pipeline_folder(), vae=str(tmp_path / "none"))
    with pytest.raises(DataError, match="AutoencoderKL or AutoencoderTiny is needed"):
        load(pipeline_folder(), vae=str(pipeline_folder() / "unet"))


def test_a_declared_family_must_be_the_files(tmp_path):
    assert load(pipeline_folder(), family="sd1").family == "sd1"
    for declared in ("sd2", "turbo", "lcm"):
        with pytest.raises(ConfigError, match=f"pipeline.family is {declared}, but .* is sd1"):
            load(pipeline_folder(), family=declared)


def test_an_inpainting_unet_is_refused(tmp_path):
    folder = shutil.copytree(pipeline_folder(), tmp_path / "inpaint")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="takes 9 channels"):
        load(folder)


@pytest.mark.parametrize(
    "asks", [{"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, {"num_class_embeds": 10}]
)
def test_a_unet_that_asks_for_more_than_texts_is_refused(asks, single, tmp_path):
    folder = shutil.copytree(pipeline_folder(), tmp_path / "unclip")
    settings = {key: value for key, value in build_parts()["unet"].config.items() if not key.startswith("_")}
    UNet2DConditionModel(**settings | asks).save_pretrained(folder / "unet")
    name, value = next(iter(asks.items()))
    with pytest.raises(DataError, match=rf"takes an input beside texts \({name} is {value}\)"):
        load(folder)
    path, _ = single()
    save_file(load_file(path) | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(64, 8)}, path)
    with pytest.raises(DataError, match=r"takes an input beside texts \(model.diffusion_model.label_emb.\)"):
        load(path)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.bfloat16, "pipeline.dtype to fp32, or pipeline.vae"), (torch.float32, "pipeline.vae")]
)
def test_a_vae_that_overflows_is_named(dtype, remedy):
    tiny = load_pipeline(dataclasses.replace(config.Pipeline(), path=str(pipeline_folder())), dtype=dtype)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    tiny.check_vae(pixels)
    tiny.vae.decoder.conv_in.weight.data.fill_(float("inf"))
    with pytest.raises(DataError, match=f"non-finite values in {str(dtype)[6:]}; set {remedy} to another VAE"):
        tiny.check_vae(pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vae_that_overflows_on_some_images_is_named_with_the_first(value):
    tiny, files = load(pipeline_folder()), [f"bolt/{i}.png" for i in range(5)]
    moments = tiny.encode_moments(torch.zeros(5, 32, 32, 3, dtype=torch.uint8))
    tiny.check_moments(moments, files)
    moments[3, 7, 7, 7] = value
    with pytest.raises(DataError, match=r"values for bolt/3\.png in float32; set pipeline\.vae"):
        tiny.check_moments(moments, files)
    moments[4, 0, 0, 0] = value
    with pytest.raises(DataError, match=r"for bolt/3\.png and 1 more of 5 images in float32"):
        tiny.check_moments(moments, files)


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(pipeline_folder())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(DataError, match="does not exist; .*allow_download=true"):
        load("somebody/some-model")
    assert not asked
    assert load("somebody/some-model", allow_download=True).family == "sd1"
    ((name, patterns),) = asked
    assert name == "somebody/some-model" and not any(p.endswith((".bin", ".ckpt", "*")) for p in patterns)
