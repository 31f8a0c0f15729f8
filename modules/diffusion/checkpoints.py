"""Files to parts: what stands on disk becomes a frozen pipeline, or one clear message.

Only safetensors and JSON are read: a pickled checkpoint can run code, so it is refused with the way to convert it.
Nothing is fetched. Weights that a part needs and a file lacks are an error: the libraries would draw them at random.
"""

import hashlib
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from modules.diffusion.pipeline import StableDiffusion
from modules.errors import ConfigError, DataError

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded" / "pipeline"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
CONVERT = (
    "pickled weights can run code and are not read; convert them where you trust them: "
    "StableDiffusionPipeline.from_pretrained(PATH).save_pretrained(NEW, safe_serialization=True)"
)


def load(cfg, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The pipeline of config section `pipeline`; see `pipeline.load_pipeline`."""
    source = EMBEDDED if cfg.path == "embedded" else Path(cfg.path).expanduser()
    if not source.exists():
        raise DataError(
            f"pipeline.path: {source} does not exist; give a diffusers folder, a single .safetensors file, or embedded"
        )
    parts = read_folder(source, dtype)
    return assemble(parts, cfg, device, dtype, str(source))


def assemble(parts: dict, cfg, device: torch.device, dtype: torch.dtype, source: str) -> StableDiffusion:
    """Parts that fit together, frozen on the device.

    Raises:
        DataError: the text encoder's width is not the one the UNet attends to, or the schedule is not a linear solver's.
        ConfigError: the declared prediction type or resolution contradicts the files.
    """
    unet, text_encoder, scheduler = parts["unet"], parts["text_encoder"], dict(parts["scheduler"])
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise DataError(
            f"{source}: the text encoder is {text_encoder.config.hidden_size} wide, the UNet attends to "
            f"{unet.config.cross_attention_dim}; the parts are of different models"
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
        vae=parts["vae"],
        unet=unet,
        scheduler=scheduler,
        device=device,
        dtype=dtype,
        resolution=0,
        digest=parts["digest"],
        source=source,
    )
    pipeline.resolution = cfg.resolution or unet.config.sample_size * pipeline.vae_factor
    if pipeline.resolution % pipeline.vae_factor:
        raise ConfigError(
            f"pipeline.resolution {pipeline.resolution} is no multiple of {pipeline.vae_factor}, the pixels a latent cell spans"
        )
    return pipeline


def _prediction_type(scheduler: dict, cfg, source: str) -> str:
    """What the UNet predicts, from the scheduler config; diffusers' default is epsilon."""
    found = scheduler.get("prediction_type", "epsilon")
    if found not in ("epsilon", "v_prediction"):
        raise DataError(f"{source}: scheduler's prediction_type is {found!r}; epsilon and v_prediction are known")
    if cfg.prediction_type and cfg.prediction_type != found:
        raise ConfigError(
            f"pipeline.prediction_type is {cfg.prediction_type}, but {source} says {found}; leave the setting empty"
        )
    return found


def read_folder(folder: Path, dtype: torch.dtype) -> dict:
    """tokenizer, text_encoder, unet, vae, scheduler (dict) and digest of a folder in diffusers' layout.

    Raises:
        DataError: a part is missing, pickled, broken or lacks weights.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if not folder.is_dir():
        raise DataError(f"pipeline.path: {folder} is neither a folder nor a .safetensors file")
    for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler"):
        if not (folder / name).is_dir():
            raise DataError(f"pipeline.path: {folder} lacks the part {name}/; a diffusers folder holds all five parts")
    files = {name: weight_files(folder / name, stem) for name, stem in WEIGHTS.items()}
    vae_config = read_json(folder / "vae" / "config.json")
    vae = AutoencoderTiny if vae_config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    return {
        "tokenizer": read_tokenizer(folder / "tokenizer"),
        "text_encoder": read_model(CLIPTextModel, folder / "text_encoder", files["text_encoder"], dtype),
        "unet": read_model(UNet2DConditionModel, folder / "unet", files["unet"], dtype),
        "vae": read_model(vae, folder / "vae", files["vae"], dtype),
        "scheduler": read_json(folder / "scheduler" / "scheduler_config.json"),
        "digest": digest([path for paths in files.values() for path in paths], folder),
    }


def weight_files(part: Path, stem: str) -> list[Path]:
    """The safetensors files of one part, whole or sharded, of full precision or else fp16.

    Raises:
        DataError: there are none; if there are pickled ones, the message says how to convert.
    """
    for variant in ("", ".fp16"):
        found = sorted(part.glob(f"{stem}{variant}.safetensors")) or sorted(
            part.glob(f"{stem}{variant}-?????-of-?????.safetensors")
        )
        if found:
            return found
    pickled = sorted(path.name for path in part.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise DataError(f"{part}: only {', '.join(pickled)}; {CONVERT}")
    raise DataError(f"{part}: {stem}.safetensors is missing")


def read_model(kind, part: Path, files: list[Path], dtype: torch.dtype) -> torch.nn.Module:
    """A model of one part, every weight from its files."""
    variant = "fp16" if ".fp16" in files[0].name else None
    read_json(part / "config.json")
    try:
        model, info = kind.from_pretrained(
            part,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if kind is CLIPTextModel else "torch_dtype": dtype},
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{part}: cannot be read as {kind.__name__} ({first_line(error)}); fetch the part again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise DataError(f"{part}: lacks {len(missing)} weights, the first is {missing[0]}; fetch the part again")
    return model


def read_tokenizer(part: Path) -> CLIPTokenizer:
    """The tokenizer of one part."""
    if not (part / "tokenizer.json").is_file() and not (part / "vocab.json").is_file():
        raise DataError(f"{part}: tokenizer.json, or vocab.json with merges.txt, is missing")
    try:
        return CLIPTokenizer.from_pretrained(part, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{part}: cannot be read as CLIPTokenizer ({first_line(error)}); fetch the part again"
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    if not path.is_file():
        raise DataError(f"{path} is missing; fetch the part again")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({first_line(error)}); fetch the part again") from error


def digest(files: list[Path], root: Path) -> str:
    """sha256 over names (below root) and contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root)} {content}\n".encode())
    return total.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
