"""Reads the parts of a pipeline from disk; every fault becomes one message that names the file.

Only safetensors and JSON are read. A pickled checkpoint can run code, so it is refused with a hint how to convert it.
Weights that a model needs and its file lacks are an error, because the libraries would initialize them at random.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import CLIPTokenizer, PreTrainedModel

from modules.errors import DataError, first_line

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "pickled weights can run code and are not read; convert them where you trust them: "
    "StableDiffusionPipeline.from_pretrained(PATH).save_pretrained(NEW, safe_serialization=True), or from_single_file "
    "for a .ckpt"
)


def weight_files(part: Path, stem: str) -> list[Path]:
    """The safetensors files of one part, whole or sharded; full precision if present, else fp16.

    Raises:
        DataError: there are none; if there are pickled ones, the message says how to convert them.
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


def read_model(kind: type, part: Path, files: list[Path], dtype: torch.dtype) -> torch.nn.Module:
    """The model of one part, with every weight read from its files.

    Raises:
        DataError: the files cannot be read, or lack weights, or have weights of another shape.
    """
    variant = "fp16" if ".fp16" in files[0].name else None
    read_json(part / "config.json")
    # makes transformers report weights of another shape by name; diffusers does so by itself
    by_name = {"ignore_mismatched_sizes": True} if issubclass(kind, PreTrainedModel) else {}
    try:
        model, info = kind.from_pretrained(
            part,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=dtype,
            **by_name,
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{part}: cannot be read as {kind.__name__} ({first_line(error)}); fetch the part again"
        ) from error
    if wrong := sorted(info.get("mismatched_keys") or ()):
        name, found, expected = wrong[0]
        raise DataError(
            f"{part}: {len(wrong)} weights are not of the shape that its config.json says, the first is {name}: "
            f"{list(found)}, expected {list(expected)}; weights and configuration are of different models"
        )
    if missing := sorted(info["missing_keys"]):
        raise DataError(f"{part}: lacks {len(missing)} weights, the first is {missing[0]}; fetch the part again")
    return model


def read_tokenizer(part: Path) -> CLIPTokenizer:
    """The tokenizer of one part."""
    if not (part / "tokenizer.json").is_file() and not (part / "vocab.json").is_file():
        raise DataError(f"{part}: tokenizer.json, or vocab.json with merges.txt, is missing")
    try:
        return CLIPTokenizer.from_pretrained(part, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{part}: cannot be read as CLIPTokenizer ({first_line(error)}); fetch the part again"
        ) from error


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        DataError: the file is missing, is not JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; fetch the part again")
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({first_line(error)}); fetch the part again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__} where settings by name belong; fetch the part again")
    return found


def digest(files: list[Path], root: Path) -> str:
    """sha256 over the names (relative to root) and contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root)} {content}\n".encode())
    return total.hexdigest()
