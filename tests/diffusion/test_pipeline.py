"""Loading a folder, the four conversions, and every fault of a folder in one clear message."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file, save_file

from benchmarks import inputs
from modules import config
from modules.diffusion import pipeline as pipelines
from modules.diffusion.checkpoints import EMBEDDED
from modules.errors import ConfigError, DataError
from tests.tiny import pipeline_folder

CFG = config.Pipeline()


def load(folder, **changes):
    return pipelines.load_pipeline(dataclasses.replace(CFG, path=str(folder), **changes))


@pytest.fixture(scope="module")
def tiny():
    return load(pipeline_folder())


@pytest.fixture(scope="module")
def reference():
    return StableDiffusionImg2ImgPipeline.from_pretrained(pipeline_folder(), safety_checker=None)


@pytest.fixture
def broken(tmp_path):
    return shutil.copytree(pipeline_folder(), tmp_path / "broken")


def test_sizes_come_from_the_files(tiny):
    assert (tiny.resolution, tiny.vae_factor, tiny.latent_size, tiny.num_tokens, tiny.text_width) == (32, 4, 8, 77, 32)
    assert tiny.prediction_type == "epsilon" and len(tiny.digest) == 64
    assert not any(p.requires_grad for part in (tiny.unet, tiny.vae, tiny.text_encoder) for p in part.parameters())


def test_the_shipped_pipeline_is_small_enough_for_a_cpu():
    """Operations are 2 x multiply-adds of one row: a UNet call and a decode of 64 px."""
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert len(files) > 5 and sum(path.stat().st_size for path in files) <= 16 * 2**20
    work = inputs.count_work(load("embedded"))
    assert 0 < work.unet <= 0.4e9 and 0 < work.decode <= 1e9


def test_digest_names_the_weights(tiny):
    assert load(pipeline_folder()).digest == tiny.digest != load(pipeline_folder(seed=1)).digest


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "beta_end", 0.013),
        ("vae/config.json", "scaling_factor", 0.2),
        ("tokenizer/tokenizer_config.json", "pad_token", "!"),
        ("tokenizer/tokenizer_config.json", "bos_token", "<|endoftext|>"),
        ("tokenizer/tokenizer_config.json", "eos_token", "<|startoftext|>"),
    ],
)
def test_digest_names_schedule_scale_and_padding_as_well(tiny, file, key, value, tmp_path):
    folder = shutil.copytree(pipeline_folder(), tmp_path / "pipeline")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: value}))
    assert load(folder).digest != tiny.digest


def test_moments_agree_with_the_vae_and_sample_as_diffusers_does(tiny):
    pixels = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    calls = []
    moments = tiny.encode_moments(pixels, batch=2, progress=lambda *row: calls.append(row))
    assert moments.shape == (5, 8, 8, 8) and moments.dtype == torch.float16
    assert calls[-1][:2] == (5, 5)
    with torch.no_grad():
        dist = tiny.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments.float(), dist.parameters, atol=2e-3, rtol=1e-3)
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = (dist.mean + dist.std * noise) * 0.18215
    torch.testing.assert_close(tiny.sample_latents(dist.parameters, noise), expected)


def test_decode_equals_the_vae(tiny):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(z), tiny.vae.decode(z / 0.18215).sample)


def test_an_encoder_without_variance_gives_its_latents_exactly():
    tiny = load(pipeline_folder(tiny_vae=True))
    moments = tiny.encode_moments(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    latents = tiny.sample_latents(moments, torch.randn(1, 4, 8, 8))
    assert torch.equal(latents, moments[:, :4].float())
    assert tiny.decode(latents).shape == (1, 3, 32, 32)


def test_prompts_embed_as_diffusers_embeds_them(tiny, reference):
    prompts = ["a photo of a rusty screw", "", "the dark xqz7-gear, on a table"]
    expected, _ = reference.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(tiny.embed(prompts), expected)


def test_vectors_in_the_slot_equal_new_vocabulary_entries():
    tiny = load(pipeline_folder())
    vectors = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(4))
    prompts = ["a photo of a *, on a table", "rusty * in a bottle"]
    ours = tiny.embed_vectors(prompts, vectors)
    names = [[f"<gear>_{i}" for i in range(3)], [f"<nut>_{i}" for i in range(3)]]
    tiny.tokenizer.add_tokens(sum(names, []))
    tiny.text_encoder.resize_token_embeddings(len(tiny.tokenizer), mean_resizing=False)
    with torch.no_grad():
        tiny.text_encoder.get_input_embeddings().weight[-6:] = vectors.flatten(0, 1)
    texts = [p.replace("*", " ".join(n)) for p, n in zip(prompts, names, strict=True)]
    assert torch.equal(tiny.prompt_ids(texts)[0, 1:5], tiny.prompt_ids(["a photo of a"])[0, 1:5])
    torch.testing.assert_close(ours, tiny.embed(texts), atol=0, rtol=0)
    torch.testing.assert_close(ours, tiny.embed(texts))


def test_gradients_reach_the_vectors_and_the_encoder_is_left_alone(tiny):
    before = tiny.embed(["a photo of a screw"])
    vectors = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    tiny.embed_vectors(["a photo of a *"], vectors).square().sum().backward()
    assert vectors.grad.abs().sum() > 0
    assert torch.equal(tiny.embed(["a photo of a screw"]), before)


def test_a_vocabulary_row_in_the_slot_is_the_word_itself(tiny):
    row = tiny.text_encoder.get_input_embeddings().weight[tiny.tokenizer("screw")["input_ids"][1]]
    ours = tiny.embed_vectors(["a photo of a rusty *"], row[None, None])
    assert torch.equal(ours, tiny.embed(["a photo of a rusty screw"]))


@pytest.mark.parametrize("text", ["a photo", "a * of *"])
def test_a_prompt_needs_one_slot(tiny, text):
    with pytest.raises(ConfigError, match="exactly one"):
        tiny.embed_vectors([text], torch.zeros(1, 1, 32))


def test_a_prompt_is_never_cut_silently(tiny):
    with pytest.raises(ConfigError, match="takes 76 tokens"):
        tiny.embed(["a " * 76])
    tiny.embed(["a " * 75])


def test_lengths_are_checked_as_prompts_are_embedded(tiny):
    """What is let through is embedded, and one token more is refused by both."""
    fits, vectors = "a " * 71 + "*", torch.zeros(1, 4, 32)
    tiny.check_lengths([fits, "a *"], 4)
    tiny.embed_vectors([fits], vectors)
    for text in ("a " * 72 + "*", "a " * 71 + "*,"):
        refused = f"prompt {re.escape(repr(text))} takes 76 tokens, the text encoder reads 75; shorten .*num_vectors"
        with pytest.raises(ConfigError, match=refused):
            tiny.check_lengths(["a *", text, fits], 4)
        with pytest.raises(ConfigError, match=refused):
            tiny.embed_vectors([text], vectors)
    tiny.check_lengths(["a " * 75, "* *"])
    tiny.check_lengths([])
    with pytest.raises(ConfigError, match="takes 77 tokens"):
        tiny.check_lengths(["a " * 76, "a " * 77])
    with pytest.raises(ConfigError, match=r"'a M8\*20 \*' must hold exactly one"):
        tiny.check_lengths(["a *", "a M8*20 *"], 1)


def test_resolution_overrides_the_unets_own(tiny):
    assert load(pipeline_folder(), resolution=48).latent_size == 12
    with pytest.raises(ConfigError, match="multiple of 4"):
        load(pipeline_folder(), resolution=47)


def test_prediction_type_is_read_and_may_not_be_contradicted():
    folder = pipeline_folder(prediction_type="v_prediction")
    assert load(folder).prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="says v_prediction"):
        load(folder, prediction_type="epsilon")


@pytest.mark.parametrize("said", [None, [8, 6]])
def test_a_unet_without_a_size_of_its_own_asks_for_the_setting(broken, said):
    path = broken / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": said}))
    for read in (load, lambda folder: pipelines.own_resolution(dataclasses.replace(CFG, path=str(folder)))):
        with pytest.raises(ConfigError, match=r"says sample_size (None|\[8, 6\]); set pipeline.resolution"):
            read(broken)
    assert load(broken, resolution=32).resolution == 32


def test_a_half_precision_folder_loads_in_any_dtype():
    tiny = load(pipeline_folder(half=True))
    assert tiny.unet.dtype == torch.float32
    assert tiny.embed(["a photo"]).dtype == torch.float32


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_missing_part_is_named(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(DataError, match=f"lacks the part {part}"):
        load(broken)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(broken, file):
    (broken / file).unlink()
    with pytest.raises(DataError, match=f"{file.rpartition('/')[2]}.* is missing|config.json"):
        load(broken)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json"]
)
def test_a_cut_file_is_named(broken, file):
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=file.partition("/")[0]):
        load(broken)


@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
def test_a_list_where_settings_belong_is_named(broken, file):
    (broken / file).write_text("[]")
    with pytest.raises(DataError, match=f"{file.partition('/')[0]}.*fetch the part again"):
        load(broken)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("text_encoder/model.safetensors", "token_embedding.weight"),
    ],
)
def test_a_weight_of_another_shape_is_named_with_both(broken, file, key):
    weights = load_file(broken / file)
    (name,) = (k for k in weights if k.endswith(key))
    weights[name] = weights[name][:, :2].contiguous()
    save_file(weights, broken / file, {"format": "pt"})
    with pytest.raises(DataError, match=rf"{key}.*\b2\b.*expected|{key} expected .*but got .*\b2\b"):
        load(broken)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_out.weight"),
        ("text_encoder/model.safetensors", "final_layer_norm.bias"),
    ],
)
def test_weights_that_lack_are_never_drawn_at_random(broken, file, key):
    weights = load_file(broken / file)
    gone = [k for k in weights if k.endswith(key)]
    save_file({k: v for k, v in weights.items() if k not in gone}, broken / file, {"format": "pt"})
    with pytest.raises(DataError, match=key.partition(".")[0]):
        load(broken)


def test_pickled_weights_are_refused_with_the_way_to_convert(broken):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    (broken / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Bomb()}, broken / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="save_pretrained.*safe_serialization"):
        load(broken)


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("vae", "vae.safetensors", "is a file; give the folder"),
        ("vae", "vae.pt", "is a file; give the folder .*pickled weights"),
        ("vae", "", "is a whole pipeline; name its part: .*vae"),
        ("lora", "", "is a folder; name the .safetensors file in it"),
        ("lora", "none.safetensors", "none.safetensors does not exist"),
    ],
)
def test_what_stands_where_something_else_belongs_is_said(broken, setting, name, said):
    for file in ("vae.safetensors", "vae.pt"):
        (broken / file).write_bytes(b"")
    with pytest.raises(DataError, match=f"pipeline.{setting}: .*{said}"):
        load(pipeline_folder(), **{setting: str(broken / name)})


def test_parts_of_different_models_are_refused(broken):
    path = broken / "text_encoder" / "config.json"
    other = shutil.copytree(broken, broken.parent / "other")
    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel(
        CLIPTextConfig(vocab_size=643, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(other / "text_encoder")
    assert path.exists()
    with pytest.raises(DataError, match="16 wide, the UNet attends to 32"):
        load(other)
