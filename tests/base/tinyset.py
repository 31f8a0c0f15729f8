"""A tiny image set and the settings of a run on it: the whole job in a few seconds on one core.

Four classes tell themselves apart by color and the direction of a bar, so that a run learns something; a model (the
group) has its own shade. The pipeline is tests/tiny.py's, of random weights: it proves the path, not the pictures.
"""

import atexit
import contextlib
import csv
import functools
import io
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import trainer
from modules.console import Console
from modules.settings import load_config
from tests.tiny import pipeline_folder

SIZE = 32
COLORS = {"bolt": (200, 60, 60), "gear": (60, 180, 60), "nut": (60, 80, 200), "ring": (200, 180, 50)}
NEAR_OOD = {"pin": ("val", (150, 60, 200)), "rod": ("test", (60, 200, 200))}
MODELS = {"train": 3, "val": 2, "test": 3}
NEAR_OOD_MODELS = 5  # an interval needs five groups
VIEWS = 2
SETTINGS = {
    "run.device": "cpu",
    "run.threads": 1,
    "run.log_every": 2,
    "run.checkpoint_every": 4,
    "data.image_size": SIZE,
    "inversion.images_per_class": 8,
    "inversion.batch_size": 8,
    "generation.images_per_step": 1.5,
    "generation.synthetic_fraction": 0.4,
    "generation.slots": 4,
    "generation.num_inference_steps": 4,
    "generation.strengths": "{0.5: 1.0, 0.75: 1.0}",
    "generation.ring_size": 4,
    "generation.decode_batch": 3,
    "generation.max_uses": 6,
    "encoder.width": 8,
    "encoder.head_dim": 16,
    "learning.steps": 12,
    "learning.classes_per_batch": 3,
    "learning.rows_per_class": 2,
    "learning.warmup_steps": 3,
    "probe.epochs": 5,
    "evaluation.bootstrap": 40,
    "evaluation.judge_steps": 2,
    "evaluation.knn_every": 5,
    "evaluation.tsne_points": 20,
}
ARMS = {  # arm -> what differs from SETTINGS
    "supcon": {},
    "cross_entropy": {"learning": {"method": "cross_entropy"}, "generation": {"synthetic_fraction": 0}},
    "jigsaw_roundtrip": {"near_ood": {"recipes": "{jigsaw_roundtrip: 1.0}"}},
    "everything": {  # every part that has a state of its own
        "generation": {"solver": "dpmpp_2m", "guidance_scale": 2.0},
        "near_ood": {"recipes": "{strength: 1.0, token_mix: 1.0, jigsaw: 1.0, jigsaw_roundtrip: 1.0}"},
        "gate": {"enabled": "true", "start_step": 2, "refresh_every": 3, "quantile": 0.4, "far_floor": -0.9},
        "controller": {"enabled": "true", "update_every": 2},
        "learning": {"ema_decay": 0.8, "optimizer": "adamw", "lr": 0.01},
    },
    "outliers": {  # stored smaller than generated, every recipe that changes a token, real rows through the decoder
        "data": {"image_size": 16},
        "generation": {
            "roundtrip_fraction": 0.5,
            "guidance_scale": 2.0,
            "ring_size": 8,
            "prefill": 0.5,
            "decode_batch": 5,
        },
        "near_ood": {
            "recipes": "{foreign: 1.0, token_noise: 1.0, negative_guidance: 1.0, embedding_outlier: 1.0}",
        },
        "encoder": {"separate_batchnorm": "true"},
        "learning": {"method": "cross_entropy", "outlier_exposure": 0.5, "augment": "strong"},
    },
}


def image(color: tuple[int, int, int], direction: float, seed: int) -> np.ndarray:
    """A bar of a color on a gray ground with a little noise: uint8 [SIZE, SIZE, 3], a function of its arguments."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
    bar = np.abs(x * np.sin(direction) - y * np.cos(direction)) < 5 + draw.integers(3)
    pixels = np.where(bar[..., None], np.array(color) + draw.integers(-30, 30, 3), 110)
    return (pixels + draw.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def rows() -> list[dict]:
    """What index.csv says: path, label, role, split, model."""
    found = []
    for label in COLORS:
        for split, models in MODELS.items():
            found += _rows(label, "id", split, models)
    for label, (split, _) in NEAR_OOD.items():
        found += _rows(label, "near_ood", split, NEAR_OOD_MODELS)
    return found


def write_pack(path: Path) -> Path:
    """A zip pack of the set; returns its path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "label", "role", "split", "model"])
    writer.writeheader()
    writer.writerows(rows())
    colors = COLORS | {label: color for label, (_, color) in NEAR_OOD.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.csv", text.getvalue())
        for seed, row in enumerate(rows()):
            content = io.BytesIO()
            direction = list(colors).index(row["label"]) * np.pi / len(colors)
            Image.fromarray(image(colors[row["label"]], direction, seed)).save(content, "PNG")
            archive.writestr(row["path"], content.getvalue())
    return path


def write_config(folder: Path, name: str = "tiny", **sections: dict) -> Path:
    """<folder>/<name>.yaml, a run on <folder>/tiny.zip below <folder>/runs; `sections` replace settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tiny.zip").exists():
        write_pack(folder / "tiny.zip")
    values = SETTINGS | {
        "run.dir": folder / "runs",
        "data.root": folder / "tiny.zip",
        "pipeline.path": pipeline_folder(),
    }
    values |= {f"{section}.{key}": value for section, content in sections.items() for key, value in content.items()}
    tree: dict[str, list[str]] = {}
    for setting, value in values.items():
        section, key = setting.split(".")
        tree.setdefault(section, []).append(f"  {key}: {value}")
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{section}:\n" + "\n".join(lines) + "\n" for section, lines in tree.items()))
    return path


def tiny_config(folder: Path, name: str = "tiny", **sections: dict):
    """(config, origins) of `write_config`."""
    return load_config(write_config(folder, name, **sections))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path, locks left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Finished:
    """A whole run in this process, and what was seen on the way."""

    config_path: Path
    config: object
    path: Path  # the run's directory
    results: dict
    text: str  # all that was printed
    files: list[set[str]]  # below run.dir: before the first step, and after each
    opened: set[str]  # absolute paths opened for writing through Python while it ran
    connections: set[str]  # addresses asked for or connected to


@functools.cache
def finished_run(arm: str) -> Finished:
    """The run of an arm of `ARMS`, made once a process; tests that change its files copy them first."""
    path = write_config(shared_folder(), arm, **ARMS[arm])
    config, origins = load_config(path)
    text, files = io.StringIO(), []

    def watched_step(state):
        if not files:
            files.append(_files_below(Path(config.run.dir)))
        one_step(state)
        files.append(_files_below(Path(config.run.dir)))

    one_step = trainer.step
    with mock.patch.object(trainer, "step", watched_step), opened_for_writing() as opened, connections() as reached:
        results = trainer.run(config, origins, Console(text))
    folder = Path(config.run.dir) / arm
    return Finished(path, config, folder, results, text.getvalue(), files, set(opened), set(reached))


@functools.cache
def shared_folder() -> Path:
    """A folder for this process's runs, with one cache of tokens and judge; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def opened_for_writing():
    """Yields a set that holds, at the end, every path that Python opened for writing meanwhile."""
    with _listening() as events:
        paths: set[str] = set()
        yield paths
    for path, _, flags in (arguments for event, arguments in events if event == "open"):
        if isinstance(path, str | bytes | Path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths.add(os.path.abspath(os.fsdecode(path)))


@contextlib.contextmanager
def connections():
    """Yields a set that holds, at the end, every address that was looked up or connected to through Python meanwhile."""
    with _listening() as events:
        addresses: set[str] = set()
        yield addresses
    addresses |= {f"{event} {arguments[:2]}" for event, arguments in events if event.startswith("socket.")}


_EVENTS: list[list[tuple[str, tuple]]] = []
_HEARD = ("open", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


@contextlib.contextmanager
def _listening():
    _hook()
    _EVENTS.append([])
    try:
        yield _EVENTS[-1]
    finally:
        _EVENTS.pop()


@functools.cache
def _hook() -> None:
    """Audit hooks cannot be removed: one, for the whole process, that does nothing unless somebody listens."""

    def listen(event: str, arguments: tuple) -> None:
        if _EVENTS and event in _HEARD:
            for events in _EVENTS:
                events.append((event, arguments))

    sys.addaudithook(listen)


def _files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _rows(label: str, role: str, split: str, models: int) -> list[dict]:
    return [
        {
            "path": f"{label}/{split}-{model}-{view}.png",
            "label": label,
            "role": role,
            "split": split,
            "model": f"{label}-{split}-{model}",
        }
        for model in range(models)
        for view in range(VIEWS)
    ]
