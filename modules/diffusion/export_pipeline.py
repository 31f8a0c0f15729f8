"""Saves a trained pipeline as a diffusers folder: fp16 safetensors, configurations, and what it was made from."""

import copy
import hashlib
import json
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from modules.diffusion.files import read_json
from modules.diffusion.shapes import SCHEDULER

PLACES = ("_name_or_path", "is_local", "local_files_only")  # keys that say where a part was loaded from; dropped


def export(
    folder: Path,
    vae: torch.nn.Module,
    text: torch.nn.Module,
    unet: torch.nn.Module,
    tokenizer: CLIPTokenizer,
    scaling: float,
    facts: dict,
) -> dict[str, str]:
    """Write a diffusers folder in fp16 safetensors, and `training.json` with `facts` and the weight files' hashes.

    The parts may be on any device.

    Returns:
        relative path of each weight file -> its sha256.
    """
    folder = Path(folder)
    vae.register_to_config(scaling_factor=scaling)
    for name, part in (("vae", vae), ("text_encoder", text), ("unet", unet)):
        copy.deepcopy(part).to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(
            folder / name, safe_serialization=True
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vae/config.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        kept = {key: value for key, value in read_json(folder / name).items() if key not in PLACES}
        (folder / name).write_text(json.dumps(kept, indent=2) + "\n")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    digests = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "training.json").write_text(json.dumps({**facts, "sha256": digests}, indent=1) + "\n")
    return digests
