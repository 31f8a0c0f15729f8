"""Checkpoints of trees of tensors and plain values; a process killed at any moment leaves the earlier ones intact.

A checkpoint is a directory such as `step-00000120` with `tensors.safetensors`, `tree.json` and, written last,
`manifest.json` with the hashes of both. It is built under a temporary name, fsynced and renamed; the newest directory
that matches its manifest is loaded. A valid checkpoint is never replaced: runs are deterministic, so it already holds
the state of its step. Nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from modules.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PREFIX = "step-"


def save_checkpoint(folder: Path, step: int, tree: dict, keep: int = 2) -> Path:
    """Write `tree` (nested dicts and lists of tensors and plain values) as the checkpoint of `step`; purge old ones.

    An existing valid checkpoint of this step is kept as it is (after a stop during a step that ended with a save).

    Raises:
        StorageError: the disk is full or not writable; older checkpoints are untouched.
    """
    folder = Path(folder)
    final = folder / f"{PREFIX}{step:08d}"
    if final.exists() and _read(final)[0] is not None:
        purge(folder, step, keep)
        return final
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        structure = _pack(tree, tensors)
        save_file(tensors, temporary / "tensors.safetensors")
        (temporary / "tree.json").write_text(json.dumps(structure))
        manifest = {"step": step, "files": {p.name: _digest(p) for p in sorted(temporary.iterdir())}}
        for path in temporary.iterdir():
            _fsync(path)
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        _fsync(temporary / "manifest.json")
        _fsync(temporary)
        if final.exists():  # invalid, so nothing is lost
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own exception on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        older = bool(_checkpoints(folder))
        then = "goes on from the checkpoint before" if older else "begins this stage anew, as there is none before it"
        raise StorageError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); free some disk space or set "
            f"run.dir to another disk, then start the same command again: it {then}"
        ) from error
    purge(folder, step, keep)
    return final


def load_newest(folder: Path) -> tuple[int, dict, list[str]] | None:
    """The newest valid checkpoint in `folder` as (step, tree, complaints about newer invalid ones); None if empty.

    Raises:
        StorageError: there are checkpoints, but none is valid.
    """
    invalid = []
    for path in reversed(_checkpoints(folder)):
        tree, reason = _read(path)
        if tree is not None:
            complaints = [f"{found}; an older checkpoint is used" for found in invalid]
            return int(path.name.removeprefix(PREFIX)), tree, complaints
        invalid.append(f"{path}: {reason}")
    if invalid:
        raise StorageError(
            f"{'; '.join(invalid)}; no valid checkpoint is left: delete the checkpoints folder to start from the beginning"
        )
    return None


def purge(folder: Path, step: int, keep: int) -> None:
    """Delete temporary directories of dead writers, checkpoints after `step`, and all but the newest `keep` up to it.

    `step` has just been saved. A checkpoint after it was invalid when the run resumed from an older one; it would be in
    the way when its step is taken again, and would count among the newest although it is useless.
    """
    folder = Path(folder)
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    paths, newest = _checkpoints(folder), f"{PREFIX}{step:08d}"
    kept = [path for path in paths if path.name <= newest][-keep:]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted now (NFS) is no reason to end a run


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file atomically, as a whole or not at all: temporary name, fsync, rename.

    Raises:
        StorageError: it could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        remedy = "free some disk space or set run.dir to another disk" if error.errno in FULL else "mend its folder"
        raise StorageError(f"{path}: could not be written ({error}); {remedy}") from error


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file, which depend on its content alone and so have a reproducible hash.

    The library writes metadata in a different order each time; here its keys are sorted. Tensors may be on any device,
    in any memory layout, and may share memory.
    """
    content = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, metadata=metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _pack(node: object, tensors: dict[str, torch.Tensor]) -> object:
    """A tree as JSON values; its tensors are put into `tensors` under consecutive names (t0, t1, ...)."""
    if isinstance(node, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):  # as pairs, because keys may be integers (optimizer states)
        return {"dict": [[key, _pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [_pack(value, tensors) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint holds tensors, dicts, lists and plain values, not {type(node).__name__}")


def _unpack(node: object, tensors: dict[str, torch.Tensor]) -> object:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "dict" in node:
        return {key: _unpack(value, tensors) for key, value in node["dict"]}
    return [_unpack(value, tensors) for value in node["list"]]


def _checkpoints(folder: Path) -> list[Path]:
    """What has the name of a checkpoint in `folder`, by step; other names, such as a copy's, are the user's."""
    return sorted(path for path in Path(folder).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())


def _read(path: Path) -> tuple[dict | None, str]:
    """(tree, "") of a checkpoint directory, or (None, the reason why it cannot be used)."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest["files"].items():
            if _digest(path / name) != digest:
                return None, f"{name} does not match its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"no valid manifest ({error})"
    try:  # files may match their manifest and still not hold a state
        tensors = load_file(path / "tensors.safetensors")
        return _unpack(json.loads((path / "tree.json").read_text()), tensors), ""
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        return None, f"cannot be read ({error})"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
