"""Class tokens: vectors learned by textual inversion, their files, and a bank of the prompt embeddings made with them.

The most common fault with tokens elsewhere is that one was not loaded, or was learned on another model, and nobody
noticed. Here a missing file and a different base model are errors. The files have the format that diffusers'
`load_textual_inversion` reads, so that a run's tokens can be used in other tools.

Shapes: C classes, K vectors a token, E embedding width, N prompts, T tokens of a prompt.
"""

import hashlib
import re
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kernels.staging import in_use
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.prompts import KEYWORDS, fill, initializer_id, placeholder, refuse_untrained, trained_words
from modules.errors import ConfigError, DataError, StorageError
from modules.state import safetensors_bytes, write_atomic

FILE = "learned_embeds.safetensors"


@dataclass(frozen=True)
class Tokens:
    """The vectors of every class, in the order of `classes`, and what they were made from."""

    classes: tuple[str, ...]
    vectors_CKE: torch.Tensor  # float32
    base_model: str  # digest of the pipeline they were learned on
    initializer: str
    images_seen: int  # training images per class, repetitions included
    seed: int
    initializers: tuple[str, ...] = ()  # the word of each class if they differ; (): all have `initializer`

    def initializer_of(self, label: int) -> str:
        """The word that a class's vectors started from."""
        return self.initializers[label] if self.initializers else self.initializer

    @property
    def placeholders(self) -> tuple[str, ...]:
        return tuple(placeholder(label) for label in self.classes)


def safe_name(label: str) -> str:
    """A directory name for a class label: slug plus hash, the same on every file system and never itself a path."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40]
    return f"{slug or 'class'}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def save_tokens(tokens: Tokens, directory: str | Path) -> list[Path]:
    """Write `<directory>/<class>/learned_embeds.safetensors` for each class, each file atomically; returns the paths.

    A file holds exactly one tensor, float32 [K, E], under the placeholder as key, and as metadata the base model's
    digest, the class, the initializer, the images seen and the seed.
    """
    paths = []
    for row, (label, name, vectors_KE) in enumerate(
        zip(tokens.classes, tokens.placeholders, tokens.vectors_CKE, strict=True)
    ):
        path = Path(directory) / safe_name(label) / FILE
        metadata = {
            "base_model": tokens.base_model,
            "class": label,
            "initializer": tokens.initializer_of(row),
            "images_seen": str(tokens.images_seen),
            "seed": str(tokens.seed),
        }
        write_atomic(path, safetensors_bytes({name: vectors_KE.float()}, metadata))
        paths.append(path)
    return paths


def replace_tokens(tokens: Tokens, directory: str | Path) -> None:
    """Replace the tokens at `directory`; if the process is killed, the directory is complete or does not exist.

    Raises: StorageError if the files cannot be written or moved into place.
    """
    directory = Path(directory)
    partial, former = (directory.with_name(f"{directory.name}.{word}") for word in ("partial", "former"))
    try:
        for left in (partial, former):  # from a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        save_tokens(tokens, partial)
        if directory.exists():
            directory.rename(former)
        partial.rename(directory)
    except OSError as error:
        raise StorageError(
            f"{directory}: the class tokens could not be put there ({error}); set run.dir to a folder in which files "
            "can be written and renamed"
        ) from error
    finally:
        for left in (partial, former):
            shutil.rmtree(left, ignore_errors=True)


def load_tokens(
    directory: str | Path,
    classes: tuple[str, ...],
    base_model: str,
    remedy: str = "learn the tokens of this run again",
) -> Tokens:
    """Load the tokens of `classes` that `save_tokens` wrote.

    Raises: DataError for a class without a file, for a file that is broken or of another class, for vectors whose shape
    differs between classes, and for a token learned on another base model (naming both digests). The messages end with
    `remedy`.
    """
    vectors, words, metadata = [], [], {}
    for label in classes:
        path = Path(directory) / safe_name(label) / FILE
        if not path.is_file():
            raise DataError(f"no token of class {label!r}: {path} is missing; {remedy}")
        vectors_KE, metadata = _read(path, label, remedy)
        if metadata["base_model"] != base_model:
            raise DataError(
                f"{path}: the token of {label!r} was learned on base model {metadata['base_model'][:16]}, "
                f"this pipeline is {base_model[:16]}; point pipeline.path to the former or {remedy}"
            )
        if vectors and vectors_KE.shape != vectors[0].shape:
            raise DataError(
                f"{path}: shape {tuple(vectors_KE.shape)} where other classes have {tuple(vectors[0].shape)}; {remedy}"
            )
        vectors.append(vectors_KE)
        words.append(metadata["initializer"])
    if not vectors:
        raise DataError(f"{directory}: asked for the tokens of no class at all")
    return Tokens(
        classes=tuple(classes),
        vectors_CKE=torch.stack(vectors),
        base_model=base_model,
        initializer=metadata["initializer"],
        images_seen=int(metadata["images_seen"]),
        seed=int(metadata["seed"]),
        initializers=tuple(words) if len(set(words)) > 1 else (),
    )


def _read(path: Path, label: str, remedy: str) -> tuple[torch.Tensor, dict[str, str]]:
    """The vectors [K, E] and the metadata of one file.

    Raises: DataError for a file that `save_tokens` would not have written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            vectors_KE = file.get_tensor(keys[0]) if len(keys) == 1 else None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); {remedy}") from error
    missing = {"base_model", "class", "initializer", "images_seen", "seed"} - metadata.keys()
    if missing:
        raise DataError(f"{path}: metadata lacks {', '.join(sorted(missing))}; {remedy}")
    if keys != [placeholder(label)] or metadata["class"] != label:
        raise DataError(
            f"{path}: holds {keys} of class {metadata['class']!r}, expected {[placeholder(label)]}; {remedy}"
        )
    if vectors_KE.ndim != 2 or vectors_KE.dtype != torch.float32 or not vectors_KE.isfinite().all():
        raise DataError(
            f"{path}: {tuple(vectors_KE.shape)} {vectors_KE.dtype}, expected finite float32 vectors [number, width]; "
            f"{remedy}"
        )
    return vectors_KE, metadata


def cached_tokens(cache_dir: str | Path, key: str, classes: tuple[str, ...], base_model: str) -> Tokens | None:
    """The tokens stored under a `token_cache_key`, or None.

    Raises: DataError for an entry that is broken or holds other tokens; it names the folder to delete.
    """
    entry = Path(cache_dir) / "tokens" / key
    if not entry.is_dir():
        return None
    return load_tokens(entry, classes, base_model, f"delete {entry} and start the same command again")


def store_tokens(cache_dir: str | Path, key: str, tokens: Tokens) -> Path:
    """Store tokens under their key, atomically; if two processes store the same entry, that of the first is kept.

    Raises: StorageError if the entry cannot be written and does not exist.
    """
    entry = Path(cache_dir) / "tokens" / key
    partial = entry.with_name(f"{key[:16]}.{uuid.uuid4().hex}.partial")
    try:
        save_tokens(tokens, partial)
        partial.rename(entry)
    except (OSError, StorageError) as error:
        if not entry.is_dir():
            raise StorageError(
                f"{entry}: the class tokens could not be stored ({error.__cause__ or error}); free some disk space or set "
                "run.cache_dir to a folder that can be written"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry


def vocabulary_norms(pipeline: StableDiffusion, trained: frozenset[str] | None = None) -> torch.Tensor:
    """||row|| of the token embedding, float32, of the words in `trained` that have a row; None: of the vocabulary."""
    rows = pipeline.text_encoder.get_input_embeddings().weight.detach()
    if trained is not None:
        entries = pipeline.tokenizer.get_vocab()
        rows = rows[[entries[f"{word}</w>"] for word in sorted(trained) if f"{word}</w>" in entries]]
    return rows.float().norm(dim=1)


def initializer_rows(pipeline: StableDiffusion, words: Sequence[str]) -> torch.Tensor:
    """The rows [C, E] of the token embedding, float32, that class vectors start from: one row per word.

    Raises: ConfigError as `initializer_id`.
    """
    trained = trained_words(pipeline.source)
    rows = [initializer_id(word, pipeline.tokenizer, trained) for word in words]
    return pipeline.text_encoder.get_input_embeddings().weight[rows].detach().float()


INITIALIZER = -1  # in place of a class label: the initializer word


class PromptBank:
    """Prompt embeddings on the device; those of fixed prompts are kept in a least-recently-used cache.

    A fixed prompt is (template, condition, class). Its embedding takes T x E x 2 bytes in fp16 (118 kB in SD 1.5), so
    that 27 templates x 20 classes x 7 conditions stay under .5 GB. The number of entries is limited; an entry that was
    dropped is encoded again. Mixed and noised tokens are encoded on request and not kept.

    With `tokens` None every prompt shows the initializer word (class-agnostic prompts, the control of Real Guidance).
    """

    def __init__(
        self, pipeline: StableDiffusion, tokens: Tokens | None, initializer: str = "object", capacity: int = 1024
    ):
        if tokens is not None and tokens.base_model != pipeline.digest:
            raise DataError(
                f"class tokens of base model {tokens.base_model[:16]} in a pipeline that is {pipeline.digest[:16]}; "
                "learn the tokens again"
            )
        if tokens is None:
            if initializer == KEYWORDS:
                raise ConfigError(
                    f"inversion.class_agnostic shows one word for every class, but inversion.initializer is {KEYWORDS!r}; "
                    "name a word such as 'object'"
                )
            refuse_untrained(initializer, trained_words(pipeline.source), "inversion.initializer")
        self.pipeline, self.tokens, self.initializer, self.capacity = pipeline, tokens, initializer, capacity
        self.vectors_CKE = None if tokens is None else tokens.vectors_CKE.to(pipeline.device, torch.float32)
        self.kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self.encoded = 0  # prompts that went through the text encoder so far

    def fixed(self, template: str, condition: str, label: int) -> torch.Tensor:
        """The embedding [T, E] of a template with a condition and the class's token, or else the initializer word."""
        return self._keep((template, condition, label if self.tokens else INITIALIZER))

    def empty(self) -> torch.Tensor:
        """The embedding [T, E] of the empty prompt, used for the unconditional rows of guidance."""
        return self._keep(("", "", INITIALIZER))

    def mixed(self, template: str, condition: str, vectors_KE: torch.Tensor) -> torch.Tensor:
        """The embedding [T, E] of a template with a condition and arbitrary vectors as the token; not kept."""
        self.encoded += 1
        with torch.no_grad():
            return self.pipeline.embed_vectors([fill(template, "*", condition)], vectors_KE[None])[0]

    @torch.no_grad()
    def _keep(self, key: tuple[str, str, int]) -> torch.Tensor:
        if key in self.kept:
            self.kept.move_to_end(key)
            return in_use(self.kept[key])
        template, condition, label = key
        if label >= 0:
            context_TE = self.mixed(template, condition, self.vectors_CKE[label])
        else:
            self.encoded += 1
            context_TE = self.pipeline.embed([fill(template, self.initializer, condition)] if template else [""])[0]
        self.kept[key] = context_TE
        if len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return context_TE
