"""Loads the pipeline that config section `pipeline` names, frozen: a diffusers folder, a single file or random weights,
with a VAE and a LoRA of choice.

Local files come first, and nothing is downloaded unless allowed. Parts that do not fit together and a family other than
declared are errors before anything is generated.
"""

import hashlib
import inspect
import json
import os
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from modules.config import Pipeline
from modules.diffusion.files import (
    CONVERT,
    PICKLED,
    digest,
    read_json,
    read_model,
    read_tokenizer,
    weight_files,
)
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.shapes import FEW_STEPS, random_parts, shapes_of
from modules.errors import ConfigError, DataError, first_line

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded" / "pipeline"
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
NAMES = {  # how a scheduler config declares weights distilled to a few steps
    "lcm": '"_class_name": "LCMScheduler"',
    "turbo": '"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"',
}
WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def load(cfg: Pipeline, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The pipeline of config section `pipeline`; see `pipeline.load_pipeline`."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if cfg.weights == "random":
        for name in ("vae", "lora"):
            if getattr(cfg, name):
                raise ConfigError(
                    f"pipeline.{name} is set, but pipeline.weights is random, which has its own: leave one out"
                )
        family = "sd2" if cfg.family == "sd2" else "sd1"
        parts = random_parts(family, device, dtype) | {"digest": f"random-{family}"}
        return assemble(parts, cfg, device, dtype, f"random weights of the {family} shape")
    source = locate(cfg)
    if source.is_dir():
        parts = read_folder(source, dtype)
    else:
        from modules.diffusion.single_file import read_single_file

        parts = read_single_file(source, dtype, cfg)
    if cfg.vae:
        parts["vae"], vae_digest = read_vae(Path(os.path.expanduser(cfg.vae)), dtype)
        parts["digest"] = f"{parts['digest'][:32]}{vae_digest[:32]}"
    if cfg.lora:
        from modules.diffusion.lora import fuse_lora

        lora = Path(os.path.expanduser(cfg.lora))
        fuse_lora(parts, lora)
        parts["digest"] = f"{parts['digest'][:48]}{digest([lora], lora.parent)[:16]}"
        # no file says that the LoRA makes this an LCM or a Turbo, only pipeline.family does
        parts["scheduler"] = dict(parts["scheduler"]) | FEW_STEPS.get(cfg.family, {})
    return assemble(parts, cfg, device, dtype, str(source))


def own_resolution(cfg: Pipeline) -> int:
    """The resolution, in pixels a side, of the pipeline of config section `pipeline`, without reading its weights.

    Raises:
        DataError, ConfigError: as `load`, for faults that show in the configurations or the header of a single file.
    """
    if cfg.resolution:
        return cfg.resolution
    if cfg.weights == "random":
        unet, vae = map(shapes_of("sd2" if cfg.family == "sd2" else "sd1").get, ("unet", "vae"))
    else:
        unet, vae = _configurations(locate(cfg), cfg)
        vae = vae_config(Path(os.path.expanduser(cfg.vae))) if cfg.vae else vae
    widths = "block_out_channels" if vae.get("_class_name") != "AutoencoderTiny" else "decoder_block_out_channels"
    kind = AutoencoderKL if widths == "block_out_channels" else AutoencoderTiny
    return _own_size(_setting(UNet2DConditionModel, unet, "sample_size")) * 2 ** (len(_setting(kind, vae, widths)) - 1)


def _own_size(sample_size: object) -> int:
    """The side of the latent grid in cells, from `sample_size` of a UNet's config.

    Raises:
        ConfigError: it is not a whole number, or its sides differ.
    """
    sides = {*sample_size} if isinstance(sample_size, list | tuple) else {sample_size}
    side = sides.pop()
    if sides or not isinstance(side, int):
        raise ConfigError(
            f"pipeline.resolution is 0, which is the UNet's own, but its config.json says sample_size {sample_size}; set "
            "pipeline.resolution"
        )
    return side


def _configurations(source: Path, cfg: Pipeline) -> tuple[dict, dict]:
    """The UNet's and the VAE's configuration, from a folder or for a single file."""
    if source.is_dir():
        _check_parts(source)
        return read_json(source / "unet" / "config.json"), vae_config(source / "vae")
    from modules.diffusion.single_file import configurations

    return configurations(source, cfg)


def _setting(kind: type, config: dict, name: str) -> object:
    """A setting of a diffusers model's config, or the default of the class if the config leaves it out."""
    return config.get(name, inspect.signature(kind.__init__).parameters[name].default)


def locate(cfg: Pipeline) -> Path:
    """The folder or .safetensors file of `pipeline.path`, downloaded only if that is allowed.

    Raises:
        DataError: it does not exist, cannot be downloaded, or is neither.
    """
    source = EMBEDDED if cfg.path == "embedded" else Path(os.path.expanduser(cfg.path))
    if not source.exists() and cfg.allow_download:
        return fetch(cfg.path)
    if not source.exists():
        raise DataError(
            f"pipeline.path: {source} does not exist; give a diffusers folder, a single .safetensors file, embedded, or "
            "set pipeline.allow_download=true to fetch a name of the Hugging Face Hub"
        )
    if source.is_file() and source.suffix in PICKLED:
        raise DataError(f"pipeline.path: {source}: {CONVERT}")
    if source.is_file() and source.suffix != ".safetensors":
        raise DataError(f"pipeline.path: {source} is neither a folder nor a .safetensors file")
    return source


def fetch(name: str) -> Path:
    """Download a diffusers folder from the Hugging Face Hub, only safetensors, JSON and vocabularies; its path."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors")]
    try:
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *wanted]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"pipeline.path: {name} is not on disk and could not be fetched ({first_line(error)})"
        ) from error


def assemble(parts: dict, cfg: Pipeline, device: torch.device, dtype: torch.dtype, source: str) -> StableDiffusion:
    """Check that the parts fit together and make them a pipeline, frozen, on the device.

    Raises:
        DataError: widths, channels or vocabulary of the parts do not match, the UNet needs other inputs than texts, or
            the scheduler asks for thresholding or predicts neither epsilon nor v.
        ConfigError: family, prediction type or resolution contradict the files.
    """
    unet, text_encoder, vae, scheduler = parts["unet"], parts["text_encoder"], parts["vae"], dict(parts["scheduler"])
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise DataError(
            f"{source}: the text encoder is {text_encoder.config.hidden_size} wide, the UNet attends to "
            f"{unet.config.cross_attention_dim}; the parts are of different models"
        )
    words, rows = len(parts["tokenizer"]), text_encoder.get_input_embeddings().num_embeddings
    if words > rows:
        raise DataError(
            f"{source}: the tokenizer has {words} entries, the text encoder {rows} rows; they do not belong together"
        )
    if not unet.config.in_channels == unet.config.out_channels == vae.config.latent_channels == 4:
        raise DataError(
            f"{source}: the UNet takes {unet.config.in_channels} channels and the VAE makes {vae.config.latent_channels}; "
            "both must be 4 (inpainting and depth models cannot be used)"
        )
    for name in ("class_embed_type", "num_class_embeds"):
        if unet.config[name] is not None:
            raise DataError(
                f"{source}: the UNet takes an input beside texts ({name} is {unet.config[name]}), as those of unCLIP and of "
                "upscalers do, and there is none to give it; use a model that paints from texts alone"
            )
    if scheduler.get("thresholding"):
        raise DataError(
            f"{source}: scheduler asks for dynamic thresholding, which is for pixel models; set it to false"
        )
    scheduler["prediction_type"] = _prediction_type(scheduler, cfg, source)
    for name in ("unet", "vae", "text_encoder"):
        parts[name].requires_grad_(False).eval().to(device)
    pipeline = StableDiffusion(
        tokenizer=parts["tokenizer"],
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        device=device,
        dtype=dtype,
        resolution=0,
        digest=_digest_of_all(parts, scheduler),
        source=source,
        family=_family(unet, text_encoder, scheduler, cfg, source),
    )
    pipeline.resolution = cfg.resolution or _own_size(unet.config.sample_size) * pipeline.vae_factor
    if pipeline.resolution % pipeline.vae_factor:
        raise ConfigError(
            f"pipeline.resolution {pipeline.resolution} is no multiple of {pipeline.vae_factor}, the pixels a latent cell "
            "spans"
        )
    return pipeline


def _digest_of_all(parts: dict, scheduler: dict) -> str:
    """sha256 of all that an image depends on: weights, schedule, scaling of latents, vocabulary, padding."""
    tokenizer = parts["tokenizer"]
    known = {
        "weights": parts["digest"],
        "scheduler": scheduler,
        "scaling_factor": parts["vae"].config.scaling_factor,
        "vocabulary": tokenizer.get_vocab(),
        "start_end_padding": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "longest_prompt": tokenizer.model_max_length,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _prediction_type(scheduler: dict, cfg: Pipeline, source: str) -> str:
    """What the UNet predicts, from the scheduler config; epsilon if it says nothing, as in diffusers."""
    found = scheduler.get("prediction_type", "epsilon")
    if found not in ("epsilon", "v_prediction"):
        raise DataError(f"{source}: scheduler's prediction_type is {found!r}; epsilon and v_prediction are known")
    if cfg.prediction_type and cfg.prediction_type != found:
        raise ConfigError(
            f"pipeline.prediction_type is {cfg.prediction_type}, but {source} says {found}; leave the setting empty"
        )
    return found


def _family(unet: torch.nn.Module, text_encoder: torch.nn.Module, scheduler: dict, cfg: Pipeline, source: str) -> str:
    """The pipeline's family, checked against `pipeline.family`.

    lcm: the UNet takes its guidance as an input, or the scheduler is LCM's; turbo: an Euler scheduler with trailing
    timesteps; sd2: the text encoder is OpenCLIP's (activation gelu); else sd1.
    """
    kind, spacing = scheduler.get("_class_name", ""), scheduler.get("timestep_spacing")
    if unet.config.time_cond_proj_dim or kind == "LCMScheduler":
        found = "lcm"
    elif kind.startswith("Euler") and spacing == "trailing":
        found = "turbo"
    else:
        found = "sd2" if text_encoder.config.hidden_act == "gelu" else "sd1"
    if cfg.family in ("auto", found):
        return found
    way = f"set it to auto or {found}"
    if cfg.family in ("lcm", "turbo") and found in ("sd1", "sd2"):  # perhaps distilled weights in their base's folder
        way += (
            f"; if its weights were distilled to a few steps, its scheduler/scheduler_config.json must say so "
            f"({NAMES[cfg.family]}), or pipeline.lora must name the LoRA that makes them so"
        )
    raise ConfigError(f"pipeline.family is {cfg.family}, but {source} is {found}; {way}")


def read_folder(folder: Path, dtype: torch.dtype) -> dict:
    """Read a folder in diffusers' layout: tokenizer, text_encoder, unet, vae, scheduler (dict) and digest, by name.

    Raises:
        DataError: a part is missing, pickled, broken or lacks weights.
    """
    _check_parts(folder)
    files = {name: weight_files(folder / name, stem) for name, stem in WEIGHTS.items()}
    return {
        "tokenizer": read_tokenizer(folder / "tokenizer"),
        "text_encoder": read_model(CLIPTextModel, folder / "text_encoder", files["text_encoder"], dtype),
        "unet": read_model(UNet2DConditionModel, folder / "unet", files["unet"], dtype),
        "vae": read_vae(folder / "vae", dtype)[0],
        "scheduler": read_json(folder / "scheduler" / "scheduler_config.json"),
        "digest": digest([path for paths in files.values() for path in paths], folder),
    }


def _check_parts(folder: Path) -> None:
    for name in PARTS:
        if not (folder / name).is_dir():
            raise DataError(f"pipeline.path: {folder} lacks the part {name}/; a diffusers folder holds all five parts")


def read_vae(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, str]:
    """An AutoencoderKL or AutoencoderTiny (TAESD) from its folder, and its digest."""
    kind = AutoencoderTiny if vae_config(folder)["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    files = weight_files(folder, WEIGHTS["vae"])
    return read_model(kind, folder, files, dtype), digest(files, folder)


def vae_config(folder: Path) -> dict:
    """The config.json of an AutoencoderKL or AutoencoderTiny.

    Raises:
        DataError: the folder or the file is missing, or names another class.
    """
    if folder.is_file():
        convert = CONVERT if folder.suffix in PICKLED else "a file alone does not say what it is"
        raise DataError(
            f"pipeline.vae: {folder} is a file; give the folder of an AutoencoderKL or AutoencoderTiny, with its "
            f"config.json ({convert})"
        )
    if not folder.is_dir():
        raise DataError(
            f"pipeline.vae: {folder} does not exist; give the folder of an AutoencoderKL or AutoencoderTiny"
        )
    if (folder / "model_index.json").is_file():
        raise DataError(f"pipeline.vae: {folder} is a whole pipeline; name its part: {folder / 'vae'}")
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise DataError(f"{folder}: its config names {kind}; an AutoencoderKL or AutoencoderTiny is needed")
    return config
