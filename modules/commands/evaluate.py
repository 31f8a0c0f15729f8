"""`trainer.py evaluate RUN [data.root=...]`: evaluates a finished run's encoder again, or applies it to new images.

Without data.root the run's own image sets are read again, and probe, scores and intervals are computed anew, under
other `probe` or `evaluation` settings or with another far-OOD set. With data.root the exported encoder and detector
judge every image below it: class, probability, and whether the exported threshold accepts it. Both read what the run
exported, never its checkpoints, and do not change what it wrote.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modules.commands.evaluate_folder import judge_folder
from modules.commands.flags import check_finished, check_run
from modules.config import Config
from modules.console import Console
from modules.data.sets import ImageSets, load_sets
from modules.data.views import plain_view
from modules.errors import ConfigError, DataError
from modules.evaluation.evaluate import Outcome, embed_sets, evaluate
from modules.evaluation.features import Embed
from modules.evaluation.stored import Detector, load_detector, save_detector, save_predictions
from modules.learning.encoder import build_encoder
from modules.memory import named_memory
from modules.records import read_record
from modules.rules import needs_masks
from modules.runtime import Choice, Runtime, resolve_runtime
from modules.settings import load_config, to_yaml
from modules.state import write_atomic

ANYWHERE = {"data.on_bad_image", "data.max_pixels", "evaluation.batch_size"}
ANYWHERE |= {f"run.{key}" for key in ("device", "precision", "threads", "kernels")}


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> Path:
    """Evaluate the run in `path` again, or judge the images of data.root; returns the folder written to.

    Raises:
        DataError: `path` is not the directory of a finished run, its export is broken, or there are no images.
        ConfigError: a setting that belongs to the training of the encoder or is not used here.
    """
    folder = Path(path)
    check_run(folder)
    check_finished(folder)
    config, origins = load_config(folder / "config.yaml", overrides)
    given = {name for name, origin in origins.items() if origin == "command line"}
    check_overrides(given)
    detector = load_detector(folder / "export/ood.safetensors")
    runtime = runtime_of(folder, config)
    for what, choice in (("device", runtime.device), ("precision", runtime.precision)):
        console.line(f"  {what}: {str(choice.value).removeprefix('torch.')}  ({choice.reason})")
    with named_memory("load", config):
        embed = load_embed(folder / "export/encoder.safetensors", config, len(detector.classes), runtime)
    if "data.root" in given:
        return judge_folder(folder, config, detector, embed, console)
    return evaluate_again(folder, config, origins, detector, embed, console)


def check_overrides(given: set[str]) -> None:
    """Raise ConfigError for a command-line setting that evaluation does not use or that the encoder depends on."""
    for name in sorted(given - ANYWHERE - {"data.root"}):
        if "data.root" in given:
            raise ConfigError(
                f"`{name}` has no use while the exported encoder judges data.root; settings that have: "
                f"{', '.join(sorted(ANYWHERE))}"
            )
        if not name.startswith(("probe.", "evaluation.")) and name != "data.far_ood_root":
            raise ConfigError(
                f"`{name}` belongs to what this run was trained with; evaluate takes probe.*, evaluation.*, data.root, "
                f"data.far_ood_root, {', '.join(sorted(ANYWHERE))}"
            )


def runtime_of(folder: Path, config: Config) -> Runtime:
    """The runtime for the run's encoder; under precision auto, fp32 if it was trained in it, so that thresholds fit."""
    runtime = resolve_runtime(config.run, config.pipeline)
    if config.run.precision == "auto" and _trained_in_fp32(folder):
        return dataclasses.replace(runtime, precision=Choice(torch.float32, "auto: it was trained in fp32"))
    return runtime


def load_embed(path: Path, config: Config, num_classes: int, runtime: Runtime) -> Embed:
    """The function embed(images_BHWC uint8) -> features_BF fp32 of an exported encoder, on the device of `runtime`.

    Raises:
        DataError: the file is broken or does not hold the encoder that config.yaml describes.
    """
    device, precision = runtime.device.value, runtime.precision.value
    # the export holds only the BatchNorm statistics of real rows, and evaluation needs no others
    settings = dataclasses.replace(config.encoder, separate_batchnorm=False)
    encoder = build_encoder(settings, config.data.image_size, num_classes, config.run.seed)
    try:
        encoder.backbone.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: other names or shapes of weights
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: is not the encoder that config.yaml describes ({reason}); run it again") from error
    encoder.to(device).eval()

    @torch.no_grad()
    def embed(images_BHWC: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return encoder(plain_view(images_BHWC.to(device))).float()

    return embed


def _trained_in_fp32(folder: Path) -> bool:
    """Whether the last command of the run trained in float32; False if that is not recorded."""
    record = folder / "inputs.json"
    computed = read_record(record).get("runtime") if record.exists() else None
    return bool(computed) and computed[-1].get("precision") == "float32"


def evaluate_again(
    folder: Path, config: Config, origins: dict, detector: Detector, embed: Embed, console: Console
) -> Path:
    """Write probe, scores and intervals of the run's sets to <run>/evaluated/again; prints them beside the run's own.

    Generated images are not kept, so the binary ID/OOD head is trained on near-OOD val images, if there are any.
    """
    out = folder / "evaluated" / "again"
    with console.stage("data") as progress:
        sets = load_sets(config.data, config.run.seed, masks=needs_masks(config), progress=progress)
    _warn_of_other_images(folder, sets, console)
    with named_memory("probe", config), console.stage("probe") as progress:
        features = embed_sets(sets, embed, config.evaluation, progress)
    with named_memory("evaluate", config), console.stage("evaluate") as progress:
        outcome = evaluate(
            **{"test": None} | features,
            classes=sets.index.classes,
            probe=config.probe,
            evaluation=config.evaluation,
            seed=config.run.seed,
            classifier=detector.readout if config.learning.method == "cross_entropy" else None,
            progress=progress,
        )
    write_atomic(out / "config.yaml", to_yaml(config, origins))
    write_atomic(out / "results.json", json.dumps(outcome.results, indent=1) + "\n")
    if outcome.predictions is not None:
        save_predictions(out / "predictions.safetensors", outcome.predictions)
    save_detector(out / "ood.safetensors", outcome.detector)
    _show_again(read_record(folder / "results.json"), outcome, folder, console)
    console.line(f"written: {out}")
    return out


def _warn_of_other_images(folder: Path, sets: ImageSets, console: Console) -> None:
    """Warn if images are not those that the run read; far-OOD images are exempt, because changing them is supported."""
    before = read_record(folder / "data.json").get("files", {})
    now = {name: images for name, images in sets.images.items() if name != "far_ood_test"}
    read = {
        item.path: {"set": name, "sha256": digest}
        for name, images in now.items()
        for item, digest in zip(images.items, images.digests, strict=True)
    }
    other = [path for path, file in read.items() if before.get(path, {}) | file != before.get(path)]
    missing = [path for path, file in before.items() if file["set"] != "far_ood_test" and path not in read]
    if other or missing:
        console.warn(
            f"{len(other)} of {len(read)} images are not what the run read and {len(missing)} are gone (first: "
            f"{(other + missing)[0]}): figures below are those of another image set than the run's"
        )


def _show_again(before: dict, outcome: Outcome, folder: Path, console: Console) -> None:
    now = outcome.results
    split = "test" if "test.accuracy" in now else "val"
    names = {f"{split}.{key}": key.replace("_", " ") for key in ("accuracy", "macro_accuracy", "knn_accuracy", "ece")}
    for role, title in (("near_ood", "near-OOD"), ("far_ood", "far-OOD")):
        names |= {f"{split}.{role}.{score}.auroc": f"{title} AUROC, {score}" for score in outcome.detector.states}
    rows = []
    for key, title in names.items():
        if key in now:
            interval = f"[{100 * now[key + '_low']:.1f}, {100 * now[key + '_high']:.1f}]" if key + "_low" in now else ""
            saved = f"{100 * before[key]:.1f}" if key in before else "-"
            rows.append([title, saved, f"{100 * now[key]:.1f}", interval])
    console.table(f"{folder}, percent", [split, "the run", "now", "interval"], rows)
    if now["binary_head.trained_on"] != before["binary_head.trained_on"]:
        console.line(
            f"the binary head was trained on OOD rows of: {before['binary_head.trained_on']}; "
            f"now of: {now['binary_head.trained_on']} (generated images are not kept)"
        )
