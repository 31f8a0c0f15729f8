"""Merges a LoRA into the weights of a pipeline for good: everything that its file holds, or an error.

diffusers converts the files that kohya's scripts, PEFT and its own older releases write. It only warns about keys that
it cannot place, so a LoRA for another model or from another tool would seem to work and change little or nothing.
"""

from pathlib import Path

import diffusers
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import get_peft_model_state_dict
from safetensors import safe_open

from modules.diffusion.files import CONVERT
from modules.errors import DataError, first_line

ADAPTER = "lora"


def fuse_lora(parts: dict, path: Path) -> None:
    """Add a LoRA's products to the weights of the UNet, and of the text encoder if it has any for it, at scale 1.

    Raises:
        DataError: the file is missing, not safetensors, made for another model, or has keys that fit nothing.
    """
    if path.is_dir():
        raise DataError(f"pipeline.lora: {path} is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise DataError(f"pipeline.lora: {path} does not exist")
    if path.suffix != ".safetensors":
        raise DataError(f"pipeline.lora: {path} is not a .safetensors file; {CONVERT}")
    carrier = diffusers.StableDiffusionPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    try:
        carrier.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER, local_files_only=True)
        _check_whole(carrier, path)
        carrier.fuse_lora(safe_fusing=True)
        carrier.unload_lora_weights()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"pipeline.lora: {path} does not fit this pipeline ({first_line(error)})") from error


def _check_whole(carrier: diffusers.StableDiffusionPipeline, path: Path) -> None:
    """Check that every key of a LoRA file was loaded and that every adapter weight was filled from it.

    Raises:
        DataError: a key of the file fits nothing, or a product lacks one of its factors.
    """
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    places = _places(carrier, keys)
    made = {
        f"{part}.{name}"
        for part, adapters in carrier.get_list_adapters().items()
        if ADAPTER in adapters
        for name in get_peft_model_state_dict(getattr(carrier, part), adapter_name=ADAPTER, save_embedding_layers=False)
    }
    loaded = {key for place, key in places.items() if place in made}
    lost = [key for key in keys if key not in loaded and not key.endswith(".alpha")]  # an alpha belongs to its factors
    if lost or not loaded:
        found = f"{len(lost)} of its {len(keys)} keys fit neither UNet nor text encoder of this pipeline"
        found = f"{found}, the first is {lost[0]}" if lost else "it holds no weights"
        raise DataError(
            f"pipeline.lora: {path}: {found}; give a LoRA of this pipeline's kind as diffusers' save_lora_weights (unet., "
            "text_encoder.) or kohya's scripts (lora_unet_, lora_te_) write it"
        )
    if lacking := sorted(made - places.keys()):
        raise DataError(
            f"pipeline.lora: {path} lacks {len(lacking)} weights, the first is {lacking[0]}; is the file whole?"
        )


def _places(carrier: diffusers.StableDiffusionPipeline, keys: list[str]) -> dict[str, str]:
    """The name under which diffusers loads a key, such as unet.conv_in.lora_A.weight -> that key of the LoRA file.

    Found with diffusers' own conversions. They look at names only, so numbers can take the place of the weights.
    """
    state, _ = carrier.lora_state_dict({key: torch.tensor(i) for i, key in enumerate(keys)})
    named = {name: keys[int(i)] for name, i in state.items()}
    unet, text = (
        {name.removeprefix(f"{part}."): key for name, key in named.items() if name.startswith(f"{part}.")}
        for part in ("unet", "text_encoder")
    )
    if unet and "lora_A" not in next(iter(unet)):
        unet = convert_unet_state_dict_to_peft(unet)
    if text:
        text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))
    found = {f"unet.{name}": key for name, key in unet.items()}
    return found | {f"text_encoder.{name.removeprefix('text_model.')}": key for name, key in text.items()}
