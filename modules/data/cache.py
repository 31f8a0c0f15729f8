"""A cache of tensors in files, each named by a hash of everything that its tensors were made from.

The key holds everything that the result depends on, so a file is either right or not found: nothing ever has to be
invalidated. Files are written atomically and verified when read. If several processes ask for the same file at once,
the first makes it, and the others wait and read it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from modules.errors import StorageError
from modules.state import write_atomic


def digest_tensor(tensor: torch.Tensor) -> str:
    """Hex sha256 of a tensor's dtype, shape and values; independent of device and memory layout."""
    hasher = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return hasher.hexdigest()


def digest_of(key: dict) -> str:
    """Hex sha256 of a key of plain values (str, int, float, bool, None, lists, tuples, dicts with str keys).

    Raises:
        TypeError: the key holds something else, whose text form might be the same for different values.
    """
    return hashlib.sha256(_canonical(key).encode()).hexdigest()


def cached_tensors(
    folder: str | Path,
    name: str,
    key: dict,
    make: Callable[[], dict[str, torch.Tensor]],
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """The tensors that `key` describes: read from `folder` if they are cached there, else made by `make` and stored.

    The file is <name>-<hash of the key>.safetensors and also holds the key and a hash of the tensors. `say` is called
    with where the tensors came from, and if a damaged file is made again.

    Returns:
        the tensors on the CPU, whether read or made.

    Raises:
        StorageError: the folder cannot be written.
        TypeError: as `digest_of`.
    """
    path = Path(folder) / f"{name}-{digest_of(key)[:32]}.safetensors"
    with locked(path, say):
        tensors, reason = _read(path, key)
        if tensors is not None:
            say(f"{name}: read from {path}")
            return tensors
        if reason:
            say(f"{name}: {path} {reason}; it is made again")
        tensors = {k: v.detach().cpu().contiguous() for k, v in make().items()}
        metadata = {"key": _canonical(key), "content": _content_digest(tensors)}
        write_atomic(path, save(tensors, metadata=metadata))
        say(f"{name}: made and kept in {path}")
    return tensors


def _read(path: Path, key: dict) -> tuple[dict[str, torch.Tensor] | None, str]:
    """(tensors, "") for a valid file, (None, reason) for a damaged one, (None, "") if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cannot be read ({error})"
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["key"] != _canonical(key):
            return None, "was made from another key"
        if metadata["content"] != _content_digest(tensors):
            return None, "does not match its own hash"
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        return None, f"is damaged ({type(error).__name__}: {error})"
    return tensors, ""


def _content_digest(tensors: dict[str, torch.Tensor]) -> str:
    return digest_of({name: digest_tensor(tensor) for name, tensor in tensors.items()})


def _canonical(key: dict) -> str:
    return json.dumps(_plain(key), sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"a cache key has str keys only, not {sorted(value, key=str)}")
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a cache key holds plain values, not {type(value).__name__}")


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock on a file beside `path`; the system releases it if the holder dies. `say` is called before waiting.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise StorageError(
            f"{path.parent}: cannot be written ({error}); set run.cache_dir to another folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{path.name}: another process is making it; waiting")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
