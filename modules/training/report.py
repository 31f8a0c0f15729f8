"""The outputs of a finished run for people and other programs: report.html, predictions, export/."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

import torch

from modules import state as checkpoints
from modules.data.views import MEAN, STD
from modules.diffusion.gate import REASONS
from modules.diffusion.recipes import POSITIVE
from modules.diffusion.requests import Request
from modules.diffusion.suitability import judge_images, suitability
from modules.evaluation.artifact import artifact_warning
from modules.evaluation.evaluate import FeatureSet, Outcome
from modules.evaluation.report import EmbeddingMap, Report, SheetRow, write_report
from modules.evaluation.report_recipes import ALL, RecipeSheet, Shot
from modules.evaluation.stored import save_detector, save_predictions
from modules.learning.encoder import choose_arch
from modules.phases import BESIDE
from modules.runtime import environment
from modules.training.job import Job, State

SHOTS = 3  # images of each kind per class on the contact sheet
RECIPE_SHOTS = 3  # example images of a recipe


def export(job: Job, state: State, outcome: Outcome) -> None:
    """Write predictions.safetensors and export/{encoder.safetensors,classes.json,preprocess.json,ood.safetensors}."""
    folder = job.workdir.path / "export"
    arch = choose_arch(job.config.encoder.arch, job.config.data.image_size).value
    facts = {"arch": arch, "width": str(job.config.encoder.width)}
    weights = checkpoints.safetensors_bytes(state.evaluated_encoder.backbone_state(), facts)
    checkpoints.write_atomic(folder / "encoder.safetensors", weights)
    job.workdir.write_json("export/classes.json", list(job.sets.index.classes))
    preprocess = {"size": job.config.data.image_size, "mean": MEAN, "std": STD, "channels": "RGB",
                  "resize": "bilinear, antialiased", "crop_to_mask": job.config.data.crop_to_mask}  # fmt: skip
    job.workdir.write_json("export/preprocess.json", preprocess)
    save_detector(folder / "ood.safetensors", outcome.detector)
    if outcome.predictions is not None:
        save_predictions(job.workdir.path / "predictions.safetensors", outcome.predictions)


def write_run_report(job: Job, state: State, features: dict[str, FeatureSet], outcome: Outcome, results: dict) -> None:
    """Write report.html of a run; also suitability to recipes.json and the gate's counts to gate.json."""
    config, sets = job.config, job.sets
    examples = state.generator.examples() if state.generator is not None else []
    recipe_rows = _suitability(job, examples)
    if recipe_rows:
        job.workdir.write_json("recipes.json", recipe_rows)
    verdicts = {} if state.generator is None else state.generator.gate.counts
    gate_rows = verdict_rows(verdicts, sets.index.classes)
    if gate_rows:
        job.workdir.write_json("gate.json", gate_rows)
    split = "test" if "test" in features else "val"
    shown = [features[name] for name in (split, f"near_ood_{split}") if name in features]
    points = torch.cat([given.features_DF for given in shown])
    labels = torch.cat([given.labels_D for given in shown])
    images = f"{len(sets.train.items)} train images of {len(sets.index.classes)} classes"
    report = Report(
        title=job.workdir.path.name,
        outcome=outcome,
        lead=f"{images}; {config.learning.method}, {state.step} steps; seed {config.run.seed}.",
        notes=_notes(job, results),
        card=tuple(job.card),
        sheet=_sheet(job, examples),
        metric_rows=job.workdir.rows(),
        embedding=EmbeddingMap(points, labels, config.evaluation.tsne_points, config.run.seed),
        inversion_rows=job.inversion_rows,
        recipe_sheets=_recipe_sheets(job, examples) if state.generator is not None else (),
        recipe_rows=recipe_rows,
        gate_rows=gate_rows,
        gate_enabled=config.gate.enabled,
        seconds=dict(job.meter.seconds),
        images=_throughput(state),
        config_text=(job.workdir.path / "config.yaml").read_text(),
        environment=environment(),
    )
    write_report(job.workdir.path / "report.html", report)


def _notes(job: Job, results: dict) -> tuple[str, ...]:
    notes = []
    if "parts64" in job.sets.index.root:
        notes.append(
            "parts64 is rendered, not photographed: figures on it say how methods compare, not how parts look."
        )
    if warning := artifact_warning(results):
        notes.append(warning)
    return tuple(notes)


def _sheet(job: Job, examples: list[tuple[torch.Tensor, Request]]) -> tuple[SheetRow, ...]:
    """Sources, positives and near-OOD images of each class; the sources are those of the positives, else negatives."""
    by_class = defaultdict(lambda: ([], []))
    for pixels, request in examples:
        by_class[request.label][request.is_ood].append((pixels, request))
    rows = []
    for label, (positives, negatives) in sorted(by_class.items()):
        chosen = positives[:SHOTS] or negatives[:SHOTS]
        sources = [Shot(job.sets.train.pixels_DHWC[request.source], "source") for _, request in chosen]
        negatives = _in_turns(negatives, lambda request: request.recipe)
        shots = [[_shot(pixels, request) for pixels, request in found[:SHOTS]] for found in (positives, negatives)]
        rows.append(SheetRow(job.sets.index.classes[label], tuple(sources), tuple(shots[0]), tuple(shots[1])))
    return tuple(rows)


def _recipe_sheets(job: Job, examples: list[tuple[torch.Tensor, Request]]) -> tuple[RecipeSheet, ...]:
    """Example images of every recipe this run uses, spread over as many classes as possible, each with its source."""
    config = job.config
    made = {POSITIVE: False} if config.generation.near_ood_fraction < 1 else {}
    if config.generation.near_ood_fraction > 0:
        made |= {recipe: True for recipe, weight in config.near_ood.recipes.items() if weight > 0}
    sheets = []
    for recipe, is_ood in made.items():
        of_recipe = [found for found in examples if found[1].recipe == recipe]
        chosen = _in_turns(of_recipe, lambda request: request.label)[:RECIPE_SHOTS]
        classes = [job.sets.index.classes[request.label] for _, request in chosen]
        sources = [
            Shot(job.sets.train.pixels_DHWC[request.source], name)
            for (_, request), name in zip(chosen, classes, strict=True)
        ]
        sheets.append(RecipeSheet(recipe, is_ood, tuple(sources), tuple(_shot(*found) for found in chosen)))
    return tuple(sheets)


def verdict_rows(counts: dict[str, dict[int, dict[str, int]]], classes: tuple[str, ...]) -> list[dict]:
    """`Gate.counts` as rows: recipe, class ("all" first), images, and a count for each reason that occurred."""
    found = {reason for of_class in counts.values() for reasons in of_class.values() for reason in reasons}
    columns = [reason for reason in REASONS if reason in found]
    rows = []
    for recipe in sorted(counts, key=lambda name: (name != POSITIVE, name)):
        by_class = {classes[label]: reasons for label, reasons in sorted(counts[recipe].items())}
        whole = {reason: sum(reasons.get(reason, 0) for reasons in by_class.values()) for reason in columns}
        for name, reasons in ({ALL: whole} | by_class).items():
            given = {reason: reasons.get(reason, 0) for reason in columns}
            rows.append({"recipe": recipe, "class": name, "images": sum(given.values())} | given)
    return rows


def _in_turns(found: list, key: Callable[[Request], object]) -> list:
    """The same images reordered so that values of key(request) alternate: the first few cover as many as possible."""
    queues = defaultdict(list)
    for pixels, request in found:
        queues[key(request)].append((pixels, request))
    depth = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(depth) for queue in queues.values() if i < len(queue)]


def _shot(pixels: torch.Tensor, request: Request) -> Shot:
    caption = request.recipe if not request.denoises else f"{request.recipe} {request.strength:g}"
    return Shot(pixels.cpu(), caption, json.dumps(asdict(request)))


def _suitability(job: Job, examples: list[tuple[torch.Tensor, Request]]) -> list[dict]:
    """Label agreement, diversity and distance to source by recipe and class, as rated by the judge.

    Generated images are compared with the train images, their sources. The judge was fitted to these; compared with
    other real images, every positive close to its source would seem to agree with its label better than real images do.
    """
    if job.judge is None or not examples:
        return []
    sets = job.sets
    real = judge_images(job.judge, sets.train.pixels_DHWC)
    generated = judge_images(job.judge, torch.stack([pixels.cpu() for pixels, _ in examples]))
    requests = [request for _, request in examples]
    return suitability(
        generated,
        [r.label for r in requests],
        [r.recipe for r in requests],
        [r.source for r in requests],
        real,
        sets.labels_D.tolist(),
        sets.index.classes,
    )


def _throughput(state: State) -> dict[str, int]:
    """Number of images that passed through each phase, from which images per second are computed."""
    images = {"augment": state.forward_rows, "encode": state.forward_rows, "backward": state.forward_rows}
    images["mix"] = state.forward_rows // 2
    if state.generator is not None:
        beside = BESIDE in state.meter.seconds
        images[BESIDE if beside else "generate"] = state.generator.slots.counts["finished"]
    return images
