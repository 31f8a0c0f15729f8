"""A checkpoint in one .safetensors file (CompVis layout) to parts, without asking anybody else's server.

The file holds weights only. What it leaves unsaid comes from a folder of configurations beside it (the file's stem, or
its own folder, in diffusers' layout) or from the shapes of its family. The vocabulary is in neither: it comes from a
`tokenizer/` folder beside the file or from the local Hugging Face cache.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_diffusers_clip_model_from_ldm,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from modules.diffusion import shapes
from modules.diffusion.files import digest, first_line, read_json, read_tokenizer
from modules.errors import ConfigError, DataError

CLIP = "openai/clip-vit-large-patch14"  # the vocabulary of every Stable Diffusion 1.x and 2.x
CROSS_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
WIDTHS = {768: "sd1", 1024: "sd2"}
DECLARED = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def read_single_file(path: Path, dtype: torch.dtype, cfg) -> dict:
    """tokenizer, text_encoder, unet, vae, scheduler (dict) and digest of a single file.

    Raises:
        DataError: not safetensors, not a Stable Diffusion 1.x or 2.x, or weights are missing.
        ConfigError: a Stable Diffusion 2 file that does not say what its UNet predicts, undeclared.
    """
    metadata, width = _header(path)
    beside = _configs_beside(path)
    with tempfile.TemporaryDirectory() as scratch:
        configs = beside or shapes.write_configs(_shapes(path, metadata, width, cfg), Path(scratch) / "configs")
        weights = load_file(path)
        parts = {
            "unet": _read(
                "unet",
                path,
                lambda: _converted(UNet2DConditionModel, convert_ldm_unet_checkpoint, weights, configs / "unet"),
            ),
            "vae": _read(
                "vae", path, lambda: _converted(AutoencoderKL, convert_ldm_vae_checkpoint, weights, configs / "vae")
            ),
            "text_encoder": _read("text_encoder", path, lambda: _text_encoder(weights, configs)),
            "scheduler": read_json(configs / "scheduler" / "scheduler_config.json"),
        }
    for name in ("unet", "vae", "text_encoder"):
        parts[name].to(dtype)
    second = parts["text_encoder"].config.hidden_act == "gelu"
    parts["tokenizer"] = _tokenizer(path, beside, "!" if second else None, cfg.allow_download)
    return parts | {"digest": digest([path], path.parent)}


def configurations(path: Path, cfg) -> tuple[dict, dict]:
    """The settings of unet and vae of a single file, of which the header alone is read.

    Raises:
        DataError, ConfigError: as `read_single_file`, for what the header shows.
    """
    metadata, width = _header(path)
    if (beside := _configs_beside(path)) is not None:
        return read_json(beside / "unet" / "config.json"), read_json(beside / "vae" / "config.json")
    found = _shapes(path, metadata, width, cfg)
    return found["unet"], found["vae"]


def _header(path: Path) -> tuple[dict[str, str], int]:
    """A file's metadata, and the width of the texts that its UNet attends to."""
    try:
        with safe_open(path, "pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            width = file.get_slice(CROSS_ATTENTION).get_shape()[-1] if CROSS_ATTENTION in keys else 0
    except (SafetensorError, OSError) as error:
        raise DataError(f"pipeline.path: {path} is not a readable safetensors file ({first_line(error)})") from error
    if not width or any(key.startswith("conditioner.") for key in keys):
        raise DataError(
            f"pipeline.path: {path} is no Stable Diffusion 1.x or 2.x checkpoint in CompVis layout (no {CROSS_ATTENTION}); "
            "a model of another kind cannot be used"
        )
    return metadata, width


def _shapes(path: Path, metadata: dict, width: int, cfg) -> dict[str, dict]:
    """The configurations of the family to which a file without any belongs."""
    family = WIDTHS.get(width)
    if family is None:
        raise DataError(
            f"pipeline.path: {path} attends to texts {width} wide, neither 768 (1.x) nor 1024 (2.x); put a folder "
            f"{path.with_suffix('')}/ with its diffusers configurations beside it"
        )
    return shapes.shapes_of(family, _declared(metadata, cfg, path, family))


def _configs_beside(path: Path) -> Path | None:
    """The folder of configurations that stands beside a file, if there is one."""
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "unet" / "config.json").is_file():
            return folder
    return None


def _declared(metadata: dict, cfg, path: Path, family: str) -> str:
    """What the UNet predicts: what the file's metadata says, or the setting, or epsilon for 1.x."""
    said = DECLARED.get(metadata.get("modelspec.prediction_type", ""))
    if said and cfg.prediction_type and said != cfg.prediction_type:
        raise ConfigError(f"pipeline.prediction_type is {cfg.prediction_type}, but {path} says {said}; leave it empty")
    if not said and not cfg.prediction_type and family == "sd2":
        raise ConfigError(
            f"pipeline.path: {path} is a Stable Diffusion 2 and does not say what its UNet predicts; set "
            "pipeline.prediction_type to v_prediction (768 px models) or epsilon (512 px base models)"
        )
    return said or cfg.prediction_type or "epsilon"


def _read(part: str, path: Path, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A part from its builder; a part that does not fit the file's family, or lacks weights, is named."""
    try:
        model = build()
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise DataError(
            f"{path}: its {part} does not fit its family ({first_line(error)}); is the file whole?"
        ) from error
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise DataError(
            f"{path}: its {part} lacks {len(missing)} weights, the first is {missing[0]}; is the file whole?"
        )
    return model


def _converted(kind, convert, weights: dict[str, torch.Tensor], config: Path) -> torch.nn.Module:
    """A diffusers model from CompVis weights; weights that the file lacks stay on the meta device."""
    settings = kind.load_config(config)
    with torch.device("meta"):
        model = kind.from_config(settings)
    model.load_state_dict(convert(weights, settings), strict=False, assign=True)
    return model


def _text_encoder(weights: dict[str, torch.Tensor], configs: Path) -> CLIPTextModel:
    own = {key: value for key, value in weights.items() if key.startswith("cond_stage_model.")}
    return create_diffusers_clip_model_from_ldm(CLIPTextModel, own, "text_encoder", str(configs), local_files_only=True)


def _tokenizer(path: Path, beside: Path | None, pad: str | None, allow_download: bool) -> CLIPTokenizer:
    """The vocabulary: beside the file, else in the local cache, else fetched if that is allowed."""
    for folder in (beside, path.parent):
        if folder is not None and (folder / "tokenizer").is_dir():
            return read_tokenizer(folder / "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(CLIP, local_files_only=not allow_download)
    except OSError:
        tokenizer = None
    if tokenizer is None or len(tokenizer) < shapes.TEXT["vocab_size"]:  # offline, transformers makes one without words
        raise DataError(
            f"pipeline.path: {path} brings no vocabulary; put the tokenizer/ folder of any Stable Diffusion beside it "
            f"({path.parent / 'tokenizer'}), or set pipeline.allow_download=true to fetch {CLIP}'s"
        )
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer
