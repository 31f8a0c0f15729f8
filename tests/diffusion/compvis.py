"""A tiny pipeline's weights under the names of the CompVis layout: the inverse of what loading a single file does."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPENCLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(key: str, layers: int) -> str:
    """A UNet weight's CompVis name; `layers` is layers_per_block."""
    for ours, theirs in UNET.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, index, rest = match.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    way, block, kind, index, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key).groups()
    side, offset = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(int(block) + 1) * (layers + 1) - 1}.1.{rest}"
    place = int(block) * (layers + 1) + int(index) + offset
    return f"{side}.{place}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    name, _, leaf = rest.rpartition(".")
    return f"{RESNET[name]}.{leaf}"


def vae_name(key: str, blocks: int) -> str:
    """A VAE weight's CompVis name; `blocks` is the number of resolutions."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if match := re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)", key):
        return f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def openclip_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP text model's weights as OpenCLIP names and stacks them."""
    found = {theirs: state[ours] for ours, theirs in OPENCLIP.items()}
    for layer in sorted({int(m[1]) for key in state if (m := re.match(r"encoder\.layers\.(\d+)\.", key))}):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            for name, other in OPENCLIP_BLOCK.items():
                found[f"{theirs}.{other}.{leaf}"] = state[f"{ours}.{name}.{leaf}"]
            stacked = torch.cat([state[f"{ours}.self_attn.{x}_proj.{leaf}"] for x in "qkv"])
            found[f"{theirs}.attn.in_proj_{leaf}"] = stacked
    return found


def save_single_file(parts: dict, path, metadata: dict[str, str] | None = None, second: bool = False) -> None:
    """Write unet, vae and text_encoder of `tiny.build_parts` as one file in CompVis layout."""
    unet, vae, text = (parts[name].state_dict() for name in ("unet", "vae", "text_encoder"))
    layers = parts["unet"].config.layers_per_block
    blocks = len(parts["vae"].config.block_out_channels)
    weights = {f"model.diffusion_model.{unet_name(key, layers)}": value for key, value in unet.items()}
    for key, value in vae.items():
        convolution = "mid_block.attentions" in key and value.ndim == 2
        weights[f"first_stage_model.{vae_name(key, blocks)}"] = value[:, :, None, None] if convolution else value
    if second:
        weights |= {f"cond_stage_model.model.{key}": value for key, value in openclip_weights(text).items()}
    else:
        weights |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()}
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path, metadata or {})
