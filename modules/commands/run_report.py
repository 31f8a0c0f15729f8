"""What a finished run leaves for people and for other programs: report.html, predictions, export/."""

import json
from collections import defaultdict
from dataclasses import asdict

import torch

from modules import state as checkpoints
from modules.data.views import MEAN, STD
from modules.diffusion.suitability import judge_images, suitability
from modules.evaluation.report import EmbeddingMap, Report, SheetRow, Shot, write_report
from modules.evaluation.stored import save_detector, save_predictions
from modules.runtime import environment

SHOTS = 3  # images of each kind a class on the contact sheet


def export(job, state, outcome) -> None:
    """export/: encoder.safetensors, classes.json, preprocess.json, ood.safetensors; and predictions.safetensors."""
    folder = job.workdir.path / "export"
    encoder = state.encoder if state.average is None else state.average.module
    facts = {"arch": job.config.encoder.arch, "width": str(job.config.encoder.width)}
    weights = checkpoints.safetensors_bytes(encoder.backbone_state(), facts)
    checkpoints.write_atomic(folder / "encoder.safetensors", weights)
    job.workdir.write_json("export/classes.json", list(job.sets.index.classes))
    preprocess = {"size": job.config.data.image_size, "mean": MEAN, "std": STD, "channels": "RGB",
                  "resize": "bilinear, antialiased", "crop_to_mask": job.config.data.crop_to_mask}  # fmt: skip
    job.workdir.write_json("export/preprocess.json", preprocess)
    save_detector(folder / "ood.safetensors", outcome.detector)
    if outcome.predictions is not None:
        save_predictions(job.workdir.path / "predictions.safetensors", outcome.predictions)


def write_run_report(job, state, features, outcome, results: dict) -> None:
    """report.html of a run; the suitability rows also go to recipes.json."""
    config, sets = job.config, job.sets
    examples = state.generator.examples() if state.generator is not None else []
    recipe_rows = _suitability(job, examples)
    if recipe_rows:
        job.workdir.write_json("recipes.json", recipe_rows)
    test, near = features["test"], features.get("near_ood_test")
    points = torch.cat([test.features_DF] + ([near.features_DF] if near else []))
    labels = torch.cat([test.labels_D] + ([near.labels_D] if near else []))
    counts = f"{len(sets.train.items)} train images of {len(sets.index.classes)} classes"
    report = Report(
        title=job.workdir.path.name,
        outcome=outcome,
        lead=f"{counts}; {config.learning.method}, {state.step} steps; seed {config.run.seed}.",
        notes=_notes(job),
        card=tuple(job.card),
        sheet=_sheet(job, examples),
        metric_rows=job.workdir.rows(),
        embedding=EmbeddingMap(points, labels, config.evaluation.tsne_points, config.run.seed),
        inversion_rows=job.inversion_rows,
        recipe_rows=recipe_rows,
        seconds=dict(job.meter.seconds),
        images=_throughput(state),
        config_text=(job.workdir.path / "config.yaml").read_text(),
        environment=environment(),
    )
    write_report(job.workdir.path / "report.html", report)


def _notes(job) -> tuple[str, ...]:
    if "parts64" in job.sets.index.root:
        return ("parts64 is rendered, not photographed: figures on it say how methods compare, not how parts look.",)
    return ()


def _sheet(job, examples) -> tuple[SheetRow, ...]:
    """Source, positives and near-OOD images of each class: the sources are those of the images beside them."""
    by_class = defaultdict(lambda: ([], []))
    for pixels, request in examples:
        by_class[request.label][request.is_ood].append((pixels, request))
    rows = []
    for label, (positives, negatives) in sorted(by_class.items()):
        chosen = positives[:SHOTS] or negatives[:SHOTS]
        sources = [Shot(job.sets.train.pixels_DHWC[request.source], "source") for _, request in chosen]
        shots = [
            [_shot(pixels, request) for pixels, request in found[:SHOTS]] for found in (positives, _spread(negatives))
        ]
        rows.append(SheetRow(job.sets.index.classes[label], tuple(sources), tuple(shots[0]), tuple(shots[1])))
    return tuple(rows)


def _spread(found: list) -> list:
    """The same images, recipes taking turns, so that the first few show every recipe."""
    queues = defaultdict(list)
    for pixels, request in found:
        queues[request.recipe].append((pixels, request))
    depth = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(depth) for queue in queues.values() if i < len(queue)]


def _shot(pixels, request) -> Shot:
    caption = request.recipe if not request.denoises else f"{request.recipe} {request.strength:g}"
    return Shot(pixels.cpu(), caption, json.dumps(asdict(request)))


def _suitability(job, examples) -> list[dict]:
    """Label agreement, diversity and distance to source by recipe and class, by the judge."""
    if job.judge is None or not examples:
        return []
    sets = job.sets
    real = judge_images(job.judge, torch.cat([sets.train.pixels_DHWC, sets.images["val"].pixels_DHWC]))
    labels = torch.cat([sets.labels_D, sets.labels("val")]).tolist()
    generated = judge_images(job.judge, torch.stack([pixels.cpu() for pixels, _ in examples]))
    requests = [request for _, request in examples]
    return suitability(
        generated,
        [r.label for r in requests],
        [r.recipe for r in requests],
        [r.source for r in requests],
        real,
        labels,
        sets.index.classes,
    )


def _throughput(state) -> dict[str, int]:
    """Images that went through each phase, for images per second."""
    images = {"augment": state.forward_rows, "encode": state.forward_rows, "backward": state.forward_rows}
    images["mix"] = state.forward_rows // 2
    if state.generator is not None:
        images["generate"] = state.generator.slots.counts["finished"]
    return images
