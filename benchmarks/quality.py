"""What cheaper generation costs in quality: `python -m benchmarks.quality`.

Short runs on the embedded default, each with one choice changed: strength, solver and steps, or how often an image is
used (fewer images per step, each in more batches). Every row has label agreement and diversity of the generated images,
by a judge fixed before training, and the encoder's probe accuracy and near-OOD AUROC. Only val is read, as these rows
are for choosing settings. The probe's learning rate is chosen on the same val images, so its accuracy is too high in
all rows alike. A lossy choice passes the gate if it loses at most `TOLERANCE` in agreement, accuracy and AUROC.

Rows are appended to benchmarks/results/quality_gpu.csv or quality_cpu.csv; the last line printed is one JSON document.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import trainer
from benchmarks import harness, ledger
from benchmarks.session import DEMO, session
from modules.diffusion.suitability import ALL, judge_images, suitability
from modules.evaluation.evaluate import evaluate, feature_set
from modules.evaluation.features import embed_images
from modules.training.job import Job, State

TOLERANCE = 0.03  # the most that a lossy choice may lose in agreement, accuracy and AUROC
COLUMNS = (  # of a row, after its conditions
    "choice", "strengths", "solver", "images_per_step", "max_uses", "steps", "seed", "ms_a_step", "unet_rows_a_step",
    "reuse", "age_mean", "images_judged", "agreement", "real_agreement", "diversity_share", "distance_share",
    "near_ood_agreement", "val_accuracy", "val_knn_accuracy", "near_ood_auroc", "score", "val_images",
    "near_ood_val_images",
)  # fmt: skip
JUDGED = ("agreement", "val_accuracy", "near_ood_auroc")
EXACT = "exact"  # the demo as it is, which the others are compared with
CHOICES: dict[str, dict[str, object]] = {
    EXACT: {},
    "preset fast": {"pipeline.preset": "fast"},  # faster and turbo need weights that the embedded pipeline has not
    "dpmpp_2m 13 steps": {"generation.solver": "dpmpp_2m", "generation.num_inference_steps": 13},
    "max_uses 6": {"generation.max_uses": 6, "generation.images_per_step": 6.0},
    "max_uses 12": {"generation.max_uses": 12, "generation.images_per_step": 3.0},
    "max_uses 48": {"generation.max_uses": 48, "generation.images_per_step": 0.75},
    "strength 0.35": {"generation.strengths": {0.35: 1.0}},
    "strength 0.5": {"generation.strengths": {0.5: 1.0}},
}


def main(argv: list[str] | None = None) -> dict:
    """Run the choices, append their rows, print a table and the JSON document; returns that document."""
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget, conditions = harness.Budget(options.budget_s), harness.conditions(options.device)
    rows, skipped, longest = [], {}, 0.0
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
        for name in options.choices:
            begin = time.perf_counter()
            settings = _settings(options, cache) | CHOICES[name]
            try:
                if budget.left < longest:
                    raise TimeoutError("budget")
                with session(settings, options.config) as (job, state):
                    row = measure(name, job, state, options.steps)
            except Exception as error:  # a choice that is left out or cannot be run is a row, not the end of the others
                skipped[name] = "budget" if isinstance(error, TimeoutError) else f"failed: {harness.described(error)}"
                print(f"{name} skipped: {skipped[name]}", flush=True)
                row = dict.fromkeys(COLUMNS, "") | {"choice": name, "score": f"skipped: {skipped[name]}"}
            else:
                rows.append(row)
                _print_row(row)
            longest = max(longest, time.perf_counter() - begin)
            if options.out:
                ledger.append_rows(options.out, [conditions | row])
    first = options.choices[0]
    exact = next((row for row in rows if row["choice"] == first), None)
    gate = {row["choice"]: _passes(row, exact) for row in rows if exact is not None and row is not exact}
    document = {
        "benchmark": "quality",
        **conditions,
        "rows": rows,
        "within_tolerance": gate,
        "tolerance": TOLERANCE,
        "skipped": skipped,
        "written": str(options.out or ""),
    }
    harness.finish(document)
    return document


def measure(name: str, job: Job, state: State, steps: int) -> dict[str, object]:
    """The row of a choice: train for `steps` steps, then judge the generated images and evaluate on val."""
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.step(state)
    state.optimizer.raise_if_nonfinite(lambda failure: "the benchmark's own run")
    seconds = time.perf_counter() - begin
    config, counts = job.config, state.generator.statistics()
    return {
        "choice": name,
        "strengths": " ".join(f"{s:g}" for s in config.generation.strengths),
        "solver": f"{config.generation.solver} {config.generation.num_inference_steps}",
        "images_per_step": config.generation.images_per_step,
        "max_uses": config.generation.max_uses,
        "steps": steps,
        "seed": config.run.seed,
        "ms_a_step": round(1e3 * seconds / steps, 1),
        "unet_rows_a_step": round(counts["unet_rows"] / steps, 2),
        "reuse": round(counts["reuse"], 2),
        "age_mean": round(counts["age_mean"], 2),
        **_suitability(job, state),
        **_val(job, state),
    }


def _suitability(job: Job, state: State) -> dict[str, float]:
    """Agreement and diversity of the positives in the reservoir, and agreement of its near-OOD images."""
    shown = state.generator.examples()
    judged = judge_images(job.judge, torch.stack([image for image, _ in shown]))
    requests = [request for _, request in shown]
    real = judge_images(job.judge, job.sets.train.pixels_DHWC.to(job.device))
    table = suitability(
        judged,
        [request.label for request in requests],
        ["near_ood" if request.is_ood else "positive" for request in requests],
        [request.source for request in requests],
        real,
        job.sets.labels_D.tolist(),
        job.sets.index.classes,
    )
    rows = {row["recipe"]: row for row in table if row["class"] == ALL}
    positive, near_ood = rows["positive"], rows["near_ood"]
    return {
        "images_judged": len(shown),
        "agreement": _rounded(positive["agreement"]),
        "real_agreement": _rounded(positive["real_agreement"]),
        "diversity_share": _rounded(positive["diversity_share"]),
        "distance_share": _rounded(positive["distance_share"]),
        "near_ood_agreement": _rounded(near_ood["agreement"]),
    }


def _val(job: Job, state: State) -> dict[str, float]:
    """Accuracy and near-OOD AUROC on val; no test image is embedded."""
    config, classes = job.config, job.sets.index.classes
    features = {}
    for name in ("train", "val", "near_ood_val"):
        images = job.sets.images[name]
        found = embed_images(state.embed, images.pixels_DHWC, config.evaluation.batch_size)
        features[name] = feature_set(images.items, found, classes if name != "near_ood_val" else ())
    outcome = evaluate(
        **features, test=None, classes=classes, probe=config.probe, evaluation=config.evaluation, seed=config.run.seed
    )
    results, score = outcome.results, config.evaluation.score
    return {
        "val_accuracy": _rounded(results["val.accuracy"]),
        "val_knn_accuracy": _rounded(results["val.knn_accuracy"]),
        "near_ood_auroc": _rounded(results[f"val.near_ood.{score}.auroc"]),
        "score": score,
        "val_images": results["val.images"],
        "near_ood_val_images": results["val.near_ood.images"],
    }


def _passes(row: dict, exact: dict) -> bool:
    return all(row[name] >= exact[name] - TOLERANCE for name in JUDGED)


def _settings(options: argparse.Namespace, cache: str) -> dict[str, object]:
    settings = {
        "run.cache_dir": cache,
        "run.seed": options.seed,
        "run.device": options.device,
        "learning.steps": options.steps,
        "learning.warmup_steps": max(1, options.steps // 10),
        "evaluation.bootstrap": 0,
        "evaluation.knn_every": 0,
        "pipeline.compile": "off",  # compiling a tick for each choice would take longer than its run
    }
    return settings | ({"pipeline.path": options.pipeline} if options.pipeline else {})


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


def _print_row(row: dict) -> None:
    print(f"{row['choice']:20s} {row['ms_a_step']:8.1f} ms/step  {row['unet_rows_a_step']:6.2f} UNet rows  "
          f"agreement {row['agreement']} (real {row['real_agreement']})  diversity {row['diversity_share']}  "
          f"val accuracy {row['val_accuracy']}  near-OOD AUROC {row['near_ood_auroc']}", flush=True)  # fmt: skip


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--pipeline", default="", help="path of another pipeline than the config's")
    parser.add_argument("--choices", default=",".join(CHOICES), help="comma-separated; the first is compared with")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--budget-s", type=float, default=0.0, help="begin no run that may end after this; 0: no bound")
    parser.add_argument("--out", default="", help="CSV to append to, or its folder; 'none' writes nothing")
    options = parser.parse_args(argv)
    options.choices = [name.strip() for name in options.choices.split(",") if name.strip()]
    if unknown := [name for name in options.choices if name not in CHOICES]:
        parser.error(f"--choices has {', '.join(unknown)}; known are {'; '.join(CHOICES)}")
    options.out = harness.rows_file(options.out, "quality", options.device)
    return options


if __name__ == "__main__":
    main()
