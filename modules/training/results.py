"""Stages evaluate and report of a run: readout and scores, the files written from them, and the table shown."""

import dataclasses
import shutil
from collections.abc import Callable

import torch

from modules.console import Console
from modules.diffusion.roundtrip import roundtrip
from modules.evaluation.artifact import artifact_doubt, artifact_light, artifact_warning
from modules.evaluation.evaluate import FeatureSet, Outcome, evaluate
from modules.evaluation.features import embed_images
from modules.evaluation.probe import Probe
from modules.training.job import Job, State
from modules.training.report import export, write_run_report
from modules.workdir import Workdir

LIGHT_IMAGES = 256  # most val images used to check for the shortcut through decoder artifacts


def evaluate_features(
    job: Job, state: State, features: dict[str, FeatureSet], progress: Callable[..., None]
) -> Outcome:
    """Stage evaluate: fit readout and thresholds on train and val, then score test once."""
    config = job.config
    generated = {}
    if state.generator is not None:
        for name, is_ood in (("generated_id_DF", False), ("generated_near_ood_DF", True)):
            images = [pixels for pixels, request in state.generator.examples() if request.is_ood == is_ood]
            if images:
                generated[name] = embed_images(state.embed, torch.stack(images), config.evaluation.batch_size)
    classifier = None
    if config.learning.method == "cross_entropy":
        linear = state.evaluated_encoder.linear
        classifier = Probe(
            linear.weight.detach().float().cpu().T.contiguous(), linear.bias.detach().float().cpu(), float("nan"), {}
        )
    outcome = evaluate(
        **{"test": None} | features | generated,
        classes=job.sets.index.classes,
        probe=config.probe,
        evaluation=config.evaluation,
        seed=config.run.seed,
        classifier=classifier,
        progress=progress,
    )
    if job.pipeline is not None:
        light = _artifact_light(job, state, features["val"], outcome)
        outcome = dataclasses.replace(outcome, results=outcome.results | light)
    return outcome


def _artifact_light(job: Job, state: State, val: FeatureSet, outcome: Outcome) -> dict:
    """How well the features separate val images from their VAE reconstructions (see evaluation/artifact.py)."""
    stored, large = job.sets.val_at_generation()
    large = large[:: -(-len(large) // LIGHT_IMAGES)] if large else []
    if not large:
        return {}
    size = job.config.data.image_size
    decoded_DHWC = roundtrip(job.pipeline, stored.pixels_DHWC[large], size, job.config.generation.decode_batch)
    decoded_DF = embed_images(state.embed, decoded_DHWC, job.config.evaluation.batch_size)
    row_of = {item.path: row for row, item in enumerate(job.sets.images["val"].items)}
    rows = [row_of[stored.items[row].path] for row in large]
    groups = [val.groups[row] for row in rows]
    return artifact_light(val.features_DF[rows], decoded_DF, groups, outcome.detector, job.config.run.seed)


def write_results(job: Job, state: State, features: dict[str, FeatureSet], outcome: Outcome) -> dict:
    """Stage report: write predictions, export, report.html, and last results.json, which marks the run as finished."""
    results = dict(outcome.results)
    if state.generator is not None:
        counts = state.generator.statistics()
        results |= {name if name.startswith("gate.") else f"generation.{name}": value for name, value in counts.items()}
        results |= {f"mix.{name}": value for name, value in state.mixer.statistics().items()}
    results |= {
        "learning.steps": state.step,
        "cost.seconds": sum(value for name, value in job.meter.seconds.items() if name.startswith("stage.")),
        "cost.forward_passes": state.forward_rows,
        "cost.images_generated": results.get("generation.images_finished", 0),
        "cost.reuse": results.get("generation.reuse", 0.0),
        "run.peak_memory_gib": job.meter.peak_memory_gib(state.pool_bytes),
    }
    results |= {f"sha256.{name}": digest for name, digest in job.inputs.items()}
    results |= {f"seconds.{name}": round(value, 3) for name, value in sorted(job.meter.seconds.items())}
    if warning := artifact_warning(results):
        job.console.warn(warning)
    elif doubt := artifact_doubt(results):
        job.console.line(f"  {doubt}")
    export(job, state, outcome)
    write_run_report(job, state, features, outcome, results)
    job.workdir.write_json("results.json", results)
    shutil.rmtree(job.workdir.checkpoints, ignore_errors=True)
    return results


def show(results: dict, workdir: Workdir, console: Console, note: str = "") -> None:
    """Print the closing table."""

    def percent(key: str) -> str:
        if key not in results:
            return "-"
        ends = ""
        if f"{key}_low" in results:
            ends = f"  [{100 * results[f'{key}_low']:.1f}, {100 * results[f'{key}_high']:.1f}]"
        return f"{100 * results[key]:.1f} %{ends}"

    score, split = results["headline.score"], "test" if "test.accuracy" in results else "val"
    rows = [
        (f"{split} accuracy", percent(f"{split}.accuracy")),
        (f"{split} kNN accuracy", percent(f"{split}.knn_accuracy")),
        (f"near-OOD AUROC ({score})", percent(f"{split}.near_ood.{score}.auroc")),
        (f"far-OOD AUROC ({score})", percent(f"{split}.far_ood.{score}.auroc")),
        ("images generated", f"{results['cost.images_generated']:.0f}"),
        ("time", f"{results['cost.seconds']:.0f} s, peak memory {results['run.peak_memory_gib']:.2f} GiB"),
    ]
    title = f"{workdir.path}" + (f" ({note})" if note else "")
    console.result(title, [row for row in rows if row[1] != "-"], f"report: {workdir.path / 'report.html'}")
