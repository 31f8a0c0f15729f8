"""Applies a finished run to new images: its exported encoder and detector judge images they have never seen."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

from modules.config import Config
from modules.console import Console
from modules.data.images import Images, load_images
from modules.data.sources import identity
from modules.data.unlabeled import read_images
from modules.errors import ConfigError
from modules.evaluation.features import Embed, embed_images
from modules.evaluation.stored import Decision, Detector
from modules.memory import named_memory
from modules.state import write_atomic


def judge_folder(folder: Path, config: Config, detector: Detector, embed: Embed, console: Console) -> Path:
    """Write class, probability, scores and decision of every image below data.root to <run>/evaluated/<root>-<hash>.

    Raises:
        ConfigError: the encoder was trained on images cropped or masked by object masks, and these images have none.
    """
    with console.stage("data") as progress:
        index = read_images(config.data.root, detector.classes)
        if (config.data.crop_to_mask or config.data.background != "keep") and not any(x.mask for x in index.items):
            raise ConfigError(
                f"{folder}: its encoder learned from images cut to their object masks (data.crop_to_mask or "
                f"data.background), and {index.root} has none; give a CSV file or zip with a `mask` column, or an MVIP tree"
            )
        size = config.data.image_size
        images = load_images(index, index.items, size, config.data, progress, masks=False, learning=False)
    for note in images.notes:
        console.line(f"  {note}")
    with named_memory("judge", config), console.stage("judge") as progress:
        features_DF = embed_images(embed, images.pixels_DHWC, config.evaluation.batch_size, progress)
        decision = detector.decide(features_DF)
    summary = summarize(images, decision, detector) | {"root": config.data.root, "skipped": len(images.skipped)}
    root = identity(config.data.root)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", root.stem) + "-" + hashlib.sha256(str(root).encode()).hexdigest()[:8]
    out = folder / "evaluated" / name
    write_atomic(out / "predictions.csv", as_csv(images, decision, detector))
    write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    _show_summary(summary, detector, console)
    console.line(f"written: {out / 'predictions.csv'}, {out / 'summary.json'}")
    return out


def summarize(images: Images, decision: Decision, detector: Detector) -> dict:
    """Counts of accepted images by predicted class, and, if there are labels, how often the decisions are right.

    `known` are images labeled with a class of the encoder (accuracy of all, share accepted), `other` those with another
    label (share accepted, which should be small); images without a label count in neither.
    """
    labels = [item.label for item in images.items]
    predicted = [detector.classes[row] for row in decision.labels_D.tolist()]
    accepted = decision.accepted_D.tolist()
    by_class = Counter(name for name, kept in zip(predicted, accepted, strict=True) if kept)
    known = [row for row, label in enumerate(labels) if label in detector.classes]
    other = [row for row, label in enumerate(labels) if label and label not in detector.classes]
    summary = {
        "images": len(labels),
        "accepted": sum(accepted),
        "score": detector.headline,
        "threshold": detector.thresholds[detector.headline],
        "accepted_by_class": {name: by_class[name] for name in detector.classes},
    }
    for name, rows in (("known", known), ("other", other)):
        if rows:
            summary[f"{name}.images"] = len(rows)
            summary[f"{name}.accepted"] = sum(accepted[row] for row in rows) / len(rows)
    if known:
        summary["known.accuracy"] = sum(predicted[row] == labels[row] for row in known) / len(known)
    return summary


def as_csv(images: Images, decision: Decision, detector: Detector) -> str:
    """CSV with one line per image: path, label, predicted, probability, accepted (1 or 0), then every score."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "label", "predicted", "probability", "accepted", *decision.scores])
    for row, item in enumerate(images.items):
        writer.writerow(
            [
                item.path,
                item.label,
                detector.classes[decision.labels_D[row]],
                f"{decision.confidence_D[row].item():.6g}",
                int(decision.accepted_D[row]),
                *(f"{values_D[row].item():.6g}" for values_D in decision.scores.values()),
            ]
        )
    return buffer.getvalue()


def _show_summary(summary: dict, detector: Detector, console: Console) -> None:
    rows = [[name, str(count)] for name, count in summary["accepted_by_class"].items() if count]
    rows.append(["rejected", str(summary["images"] - summary["accepted"])])
    title = f"{summary['root']}: {summary['images']} images, accepted where {summary['score']} >= {summary['threshold']:.4g}"
    console.table(title, ["predicted", "images"], rows)
    if "known.images" in summary:
        console.line(
            f"labeled with a known class: {summary['known.images']}, accuracy {100 * summary['known.accuracy']:.1f} %, "
            f"accepted {100 * summary['known.accepted']:.1f} % (the threshold accepted 95 % of the run's val images)"
        )
    if "other.images" in summary:
        console.line(
            f"labeled otherwise: {summary['other.images']}, accepted {100 * summary['other.accepted']:.1f} % "
            "(each of them an error, if the label is no known class)"
        )
