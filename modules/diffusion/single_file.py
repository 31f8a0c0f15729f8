"""Reads a checkpoint in one .safetensors file (CompVis layout) into parts, without asking any server for its settings.

The file holds only weights. The configurations come from a folder beside it in diffusers' layout (named as the file
without its suffix, or the file's own folder), or else from the shapes of its family. The vocabulary comes from a
`tokenizer/` folder beside the file or from the local Hugging Face cache; it is downloaded only if that is allowed.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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

from modules.config import Pipeline
from modules.diffusion import shapes
from modules.diffusion.files import digest, read_json, read_tokenizer
from modules.errors import ConfigError, DataError, first_line

CLIP = "openai/clip-vit-large-patch14"  # has the vocabulary of every Stable Diffusion 1.x and 2.x
PADDING = {"sd1": "<|endoftext|>", "sd2": "!"}  # padding token of prompts; the vocabulary is the same
CROSS_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CLASSES = "model.diffusion_model.label_emb."  # in a UNet that takes a class, an image or a noise level as an input
GUIDANCE = tuple(  # in a UNet that takes its guidance as an input (LCM), by the names that converters write
    f"model.diffusion_model.{name}.cond_proj.weight" for name in ("time_embed", "time_embedding")
)
WIDTHS = {768: "sd1", 1024: "sd2"}
MAKE_CONFIGS = (
    "with the unet/, vae/, text_encoder/ and scheduler/ configurations (*.json) of a diffusers folder of the same model, "
    "or of that which diffusers' StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) writes"
)
DECLARED = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def read_single_file(path: Path, dtype: torch.dtype, cfg: Pipeline) -> dict:
    """Read a single file: tokenizer, text_encoder, unet, vae, scheduler (dict) and digest, by name.

    Raises:
        DataError: not safetensors, not a Stable Diffusion 1.x or 2.x, or weights or the vocabulary are missing.
        ConfigError: neither a Stable Diffusion 2 file nor pipeline.prediction_type says what the UNet predicts, or they
            contradict each other.
    """
    header = _header(path)
    beside = _configs_beside(path)
    with tempfile.TemporaryDirectory() as scratch:
        configs = beside or shapes.write_configs(_shapes(path, header, cfg), Path(scratch) / "configs")
        weights = load_file(path)
        parts = {
            "unet": _read(
                "unet",
                path,
                lambda: _converted(UNet2DConditionModel, _convert_unet, weights, configs / "unet"),
            ),
            "vae": _read(
                "vae", path, lambda: _converted(AutoencoderKL, convert_ldm_vae_checkpoint, weights, configs / "vae")
            ),
            "text_encoder": _read("text_encoder", path, lambda: _text_encoder(weights, configs)),
            "scheduler": read_json(configs / "scheduler" / "scheduler_config.json"),
        }
    for name in ("unet", "vae", "text_encoder"):
        parts[name].to(dtype)
    parts["tokenizer"] = _tokenizer(path, beside, cfg.allow_download)
    # whichever vocabulary was found: they are all the same, but differ in the padding that they declare
    parts["tokenizer"].pad_token = PADDING["sd2" if parts["text_encoder"].config.hidden_act == "gelu" else "sd1"]
    return parts | {"digest": digest([path], path.parent)}


def configurations(path: Path, cfg: Pipeline) -> tuple[dict, dict]:
    """The configurations of unet and vae for a single file, of which only the header is read.

    Raises:
        DataError, ConfigError: as `read_single_file`, for faults that show in the header.
    """
    header = _header(path)
    if (beside := _configs_beside(path)) is not None:
        return read_json(beside / "unet" / "config.json"), read_json(beside / "vae" / "config.json")
    found = _shapes(path, header, cfg)
    return found["unet"], found["vae"]


@dataclass(frozen=True)
class Header:
    """What is known of a file without reading its weights."""

    metadata: dict[str, str]
    text_width: int  # width of the text embeddings that its UNet attends to
    guidance_width: int  # width of the guidance embedding that its UNet takes; 0: none


def _header(path: Path) -> Header:
    try:
        with safe_open(path, "pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            width, *guidance = (
                file.get_slice(name).get_shape()[-1] if name in keys else 0 for name in (CROSS_ATTENTION, *GUIDANCE)
            )
    except (SafetensorError, OSError) as error:
        raise DataError(f"pipeline.path: {path} is not a readable safetensors file ({first_line(error)})") from error
    if not width or any(key.startswith("conditioner.") for key in keys):
        raise DataError(
            f"pipeline.path: {path} is no Stable Diffusion 1.x or 2.x checkpoint in CompVis layout (no {CROSS_ATTENTION}); "
            "a model of another kind cannot be used"
        )
    if any(key.startswith(CLASSES) for key in keys):
        raise DataError(
            f"pipeline.path: {path} has a UNet that takes an input beside texts ({CLASSES}), as those of unCLIP and of "
            "upscalers do, and there is none to give it; use a model that paints from texts alone"
        )
    return Header(metadata, width, max(guidance))


def _shapes(path: Path, header: Header, cfg: Pipeline) -> dict[str, dict]:
    """The configurations of a file's family, for a file without any beside it.

    The weights of Turbo and LCM have the same names and shapes as those of their base model, so pipeline.family has to
    say what they are. The exception is a UNet that takes its guidance as an input: that is an LCM.
    """
    width, base = header.text_width, WIDTHS.get(header.text_width)
    if base is None:
        raise DataError(
            f"pipeline.path: {path} attends to texts {width} wide, neither 768 (1.x) nor 1024 (2.x); put a folder "
            f"{path.with_suffix('')}/ beside it {MAKE_CONFIGS}"
        )
    few_steps = "lcm" if header.guidance_width else cfg.family if cfg.family in shapes.FEW_STEPS else None
    found = shapes.shapes_of(base, _declared(header.metadata, cfg, path, base, few_steps))
    if header.guidance_width:
        found["unet"] = found["unet"] | {"time_cond_proj_dim": header.guidance_width}
    if few_steps:
        found["scheduler"] = found["scheduler"] | shapes.FEW_STEPS[few_steps]
    return found


def _configs_beside(path: Path) -> Path | None:
    """The folder of configurations beside a file, or None."""
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "unet" / "config.json").is_file():
            return folder
    return None


def _declared(metadata: dict, cfg: Pipeline, path: Path, family: str, few_steps: str | None) -> str:
    """What the UNet predicts: from the file's metadata, else from the setting, else epsilon for 1.x and SD Turbo."""
    said = DECLARED.get(metadata.get("modelspec.prediction_type", ""))
    if said and cfg.prediction_type and said != cfg.prediction_type:
        raise ConfigError(f"pipeline.prediction_type is {cfg.prediction_type}, but {path} says {said}; leave it empty")
    if not said and not cfg.prediction_type and family == "sd2" and few_steps != "turbo":
        raise ConfigError(
            f"pipeline.path: {path} is a Stable Diffusion 2 and does not say what its UNet predicts; set "
            "pipeline.prediction_type to v_prediction (768 px models) or epsilon (512 px base models)"
        )
    return said or cfg.prediction_type or "epsilon"


def _read(part: str, path: Path, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model that `build` returns.

    Raises:
        DataError: the part does not fit the file's family, or lacks weights; the message names it.
    """
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
    """A diffusers model with converted CompVis weights; weights that the file lacks stay on the meta device."""
    settings = kind.load_config(config)
    with torch.device("meta"):
        model = kind.from_config(settings)
    model.load_state_dict(convert(weights, settings), strict=False, assign=True)
    return model


def _convert_unet(weights: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """A UNet's weights by diffusers' names, including the guidance weight that diffusers' own conversion omits."""
    found = convert_ldm_unet_checkpoint(weights, settings)
    for name in GUIDANCE:
        if name in weights:
            found["time_embedding.cond_proj.weight"] = weights[name]
    return found


def _text_encoder(weights: dict[str, torch.Tensor], configs: Path) -> CLIPTextModel:
    own = {key: value for key, value in weights.items() if key.startswith("cond_stage_model.")}
    return create_diffusers_clip_model_from_ldm(CLIPTextModel, own, "text_encoder", str(configs), local_files_only=True)


def _tokenizer(path: Path, beside: Path | None, allow_download: bool) -> CLIPTokenizer:
    """The vocabulary: from beside the file, else from the local cache, else downloaded if that is allowed.

    Raises:
        DataError: it was not found.
    """
    for folder in (beside, path.parent):
        if folder is not None and (folder / "tokenizer").is_dir():
            return read_tokenizer(folder / "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(CLIP, local_files_only=not allow_download)
    except OSError:
        tokenizer = None
    if tokenizer is None or len(tokenizer) < shapes.TEXT["vocab_size"]:  # offline, transformers returns an empty one
        raise DataError(
            f"pipeline.path: {path} brings no vocabulary; put the tokenizer/ folder of any Stable Diffusion beside it "
            f"({path.parent / 'tokenizer'}), or set pipeline.allow_download=true to fetch {CLIP}'s"
        )
    return tokenizer
