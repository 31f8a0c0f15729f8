"""LoRA files of every kind that diffusers converts are fused whole; what would be dropped in silence is refused."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from modules import config
from modules.diffusion.pipeline import load_pipeline
from modules.errors import DataError
from tests.tiny import build_parts, pipeline_folder

RANK, ALPHA = 2, 1.0
UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def load(path):
    return load_pipeline(dataclasses.replace(config.Pipeline(), path=str(pipeline_folder()), lora=str(path)))


def factors(model, suffixes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random (down, up) of rank 2 for each linear layer or convolution of a model whose name ends so."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(suffixes):
            rows, columns, *kernel = layer.weight.shape
            down = torch.randn(RANK, columns, *kernel, generator=generator)
            found[name] = (0.3 * down, 0.3 * torch.randn(rows, RANK, *[1] * len(kernel), generator=generator))
    return found


def keyed(pairs: dict, name_of, down: str, up: str) -> dict[str, torch.Tensor]:
    return {name_of(name) + end: t for name, pair in pairs.items() for end, t in zip((down, up), pair, strict=True)}


def as_kohya(unet: dict, text: dict) -> dict[str, torch.Tensor]:
    weights = {}
    for prefix, pairs in (("lora_unet_", unet), ("lora_te_text_model_", text)):
        names = {name: prefix + name.replace(".", "_") for name in pairs}
        weights |= keyed(pairs, names.get, ".lora_down.weight", ".lora_up.weight")
        weights |= {f"{name}.alpha": torch.tensor(ALPHA) for name in names.values()}
    return weights


def as_peft(unet: dict, text: dict) -> dict[str, torch.Tensor]:
    weights = keyed(unet, lambda name: f"unet.{name}", ".lora_A.weight", ".lora_B.weight")
    return weights | keyed(text, lambda name: f"text_encoder.text_model.{name}", ".lora_A.weight", ".lora_B.weight")


def as_old_diffusers(unet: dict, text: dict) -> dict[str, torch.Tensor]:
    def unet_name(name):
        block, _, layer = name.removesuffix(".0").rpartition(".")
        return f"unet.{block}.processor.{layer}_lora"

    def text_name(name):
        block, _, layer = name.rpartition(".")
        return f"text_encoder.text_model.{block}.{TEXT[layer]}"

    return keyed(unet, unet_name, ".down.weight", ".up.weight") | keyed(text, text_name, ".down.weight", ".up.weight")


KINDS = {  # name -> (file's keys, layers of the UNet, layers of the text encoder, alpha over rank)
    "kohya": (as_kohya, ("",), ("",), ALPHA / RANK),
    "peft": (as_peft, UNET, ("q_proj", "v_proj"), 1.0),
    "text encoder alone": (as_peft, (), tuple(TEXT), 1.0),
    "old diffusers": (as_old_diffusers, UNET, tuple(TEXT), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_a_file_is_in_the_weights(kind, tmp_path):
    write, in_unet, in_text, scale = KINDS[kind]
    parts = build_parts()
    pairs = {"unet": factors(parts["unet"], in_unet), "text_encoder": factors(parts["text_encoder"], in_text)}
    save_file(write(pairs["unet"], pairs["text_encoder"]), tmp_path / "lora.safetensors")
    ours = load(tmp_path / "lora.safetensors")
    assert pairs["text_encoder"]
    for part, own in pairs.items():
        fused = getattr(ours, part).state_dict()
        for name, weight in parts[part].state_dict().items():
            if (layer := name.removesuffix(".weight")) in own and name != layer:
                down, up = own[layer]
                weight = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
            torch.testing.assert_close(fused[name], weight, atol=1e-5, rtol=1e-5)


def with_prefix(prefix: str):
    pairs = factors(build_parts()["unet"], UNET)
    return keyed(pairs, lambda name: prefix + name, ".lora_A.weight", ".lora_B.weight")


def one_more(key: str) -> dict[str, torch.Tensor]:
    """A LoRA that fits, and a pair of factors that does not, named by its first key."""
    both = {key: torch.zeros(2, 32), key.replace("_A", "_B").replace("down.w", "up.w"): torch.zeros(32, 2)}
    kohya = key.startswith("lora_")
    return (as_kohya(factors(build_parts()["unet"], UNET), {}) if kohya else with_prefix("unet.")) | both


def with_magnitudes() -> dict[str, torch.Tensor]:
    weights = as_kohya({QUERY: factors(build_parts()["unet"], UNET)[QUERY]}, {})
    return weights | {f"lora_unet_{QUERY.replace('.', '_')}.dora_scale": torch.ones(16)}


BLOCK_9 = "lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight"
SECOND_TEXT = "text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight"
REFUSED = {  # name -> (file, message)
    "adapter_model of PEFT": (lambda: with_prefix("base_model.model."), "64 of its 64 keys .* first is base_model"),
    "transformer": (lambda: with_prefix("transformer."), "64 of its 64 keys .* the first is transformer.down"),
    "blocks that are not there": (lambda: one_more(BLOCK_9), f"2 of its 98 keys .* the first is {BLOCK_9}"),
    "a second text encoder": (lambda: one_more(SECOND_TEXT), f"2 of its 66 keys .* the first is {SECOND_TEXT}"),
    "magnitudes (DoRA)": (with_magnitudes, "1 of its 4 keys .* the first is lora_unet_.*.dora_scale"),
    "half of a pair": (
        lambda: {k: v for k, v in with_prefix("unet.").items() if k != f"unet.{QUERY}.lora_B.weight"},
        f"lacks 1 weights, the first is unet.{QUERY}.lora_B.weight",
    ),
    "nothing": (dict, "it holds no weights"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_keys_that_would_be_dropped_in_silence_are_named(kind, tmp_path):
    write, message = REFUSED[kind]
    save_file(write(), tmp_path / "lora.safetensors")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "lora.safetensors")


def test_an_adapter_saved_from_the_unet_alone_is_refused_for_its_names(tmp_path):
    unet = build_parts()["unet"]
    unet.add_adapter(LoraConfig(r=RANK, target_modules=list(UNET)))
    unet.save_lora_adapter(tmp_path)
    with pytest.raises(DataError, match="64 of its 64 keys fit neither .* as diffusers' save_lora_weights"):
        load(tmp_path / "pytorch_lora_weights.safetensors")
