"""Which settings of generation and training pay, read on val alone: `python -m benchmarks.sweep configs/parts.yaml`.

A sweep changes one thing of a config at a time, under the arms it concerns. A trial is one unmodified `trainer.py run`
in a separate process with one thread, so that as many can run in parallel as there are cores. Finished trials are read,
not repeated. Test images are not scored (evaluation.test). Rows are appended to benchmarks/results/sweep.csv.

    python -m benchmarks.sweep configs/parts.yaml --sweeps strength,fraction --seeds 0,1 --jobs 2
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from benchmarks.ledger import append_once
from modules.commands.trials import Planned, plan, refuse_other_settings, run_trial
from modules.errors import ConfigError, UserError

SWEEPS: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {  # name -> arms, {variant: overrides}
    "steps": (  # the same number of images for any schedule: in a longer one each is used more often
        ("ce", "supcon", "positives"),
        {
            f"{steps} steps": [
                f"learning.steps={steps}",
                f"generation.images_per_step={450 / steps:g}",
                f"generation.max_uses={24 * steps // 300}",
            ]
            for steps in (300, 900, 1800)
        },
    ),
    "long_strength": (  # a schedule so long that real images start to run out
        ("positives",),
        {
            f"900 steps, strength {name}": [
                "learning.steps=900", "generation.images_per_step=0.5", "generation.max_uses=72", f"generation.strengths={mix}"
            ]
            for name, mix in ((".35", "{0.35: 1.0}"), (".5", "{0.5: 1.0}"), (".16 .35 .5", "{0.16: 1.0, 0.35: 1.0, 0.5: 1.0}"))
        },
    ),
    "ceiling": (  # the value of further real images: an upper bound for as many generated ones
        ("supcon",),
        {
            f"{shots or 'all'} shots, {steps} steps": [f"data.shots_per_class={shots}", f"learning.steps={steps}"]
            for shots, steps in ((8, 300), (16, 300), (0, 300), (16, 900), (0, 900))
        },
    ),
    "shots": (
        ("supcon", "positives"),
        {f"{shots} shots": [f"data.shots_per_class={shots}"] for shots in (4, 8)},
    ),
    "views": (
        ("supcon",),
        {
            "as configured": [],
            "no gray, no hue": ["learning.grayscale_p=0.0", "learning.jitter=[0.4, 0.4, 0.4, 0.0]"],
            "weak color": ["learning.grayscale_p=0.0", "learning.jitter=[0.2, 0.2, 0.2, 0.0]"],
            "crop from .15": ["learning.crop_scale=[0.15, 1.0]"],
            "crop from .6": ["learning.crop_scale=[0.6, 1.0]"],
            "strong": ["learning.augment=strong"],
        },
    ),
    "strength": (
        ("positives",),
        {f"strength {s}": [f"generation.strengths={{{s}: 1.0}}"] for s in (0.16, 0.35, 0.5, 0.75)}
        | {"strengths .2 .5 .75": ["generation.strengths={0.2: 1.0, 0.5: 1.0, 0.75: 1.0}"]},
    ),
    "fraction": (
        ("positives",),
        {f"fraction {f}": [f"generation.synthetic_fraction={f}", "generation.max_uses=72"] for f in (0.2, 0.4, 0.6)},
    ),
    "reuse": (
        ("positives",),
        {
            f"{images} images a step": [f"generation.images_per_step={images}", f"generation.max_uses={uses}"]
            for images, uses in ((0.75, 48), (1.5, 24), (3.0, 12), (6.0, 6))
        },
    ),
    "artifact": (
        ("positives_ood", "roundtrip_rows", "separate_batchnorm"),
        {"as configured": []},
    ),
    "weighting": (  # other ways to make negatives count: the gate, their weight, hard weighting
        ("positives_ood",),
        {
            "gated": ["gate.enabled=true"],
            "lambda .25": ["learning.ood_weight=0.25"],
            "lambda 4": ["learning.ood_weight=4.0"],
            "hardness 1": ["learning.hardness=1.0"],
        },
    ),
    "near_ood": (
        ("positives_ood",),
        {
            recipe: [f"near_ood.recipes={{{recipe}: 1.0}}"]
            for recipe in ("strength", "token_mix", "foreign", "mask_split", "jigsaw")
        },
    ),
}  # fmt: skip
OWN = ("run.dir", "run.name", "run.seed", "evaluation.test")  # where trials are stored and what they may read
METRICS = (
    "val.accuracy", "val.macro_accuracy", "val.knn_accuracy", "val.ece", "val.near_ood.knn.auroc", "val.near_ood.msp.auroc",
    "val.near_ood.mahalanobis.auroc", "artifact.probe_auroc", "artifact.score_auroc", "cost.images_generated", "cost.reuse",
)  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """Run the trials that are not finished, append the rows, print a table and one JSON line; returns its content."""
    options = _parse(argv)
    stem, trials = Path(options.config).stem, {}
    for sweep in options.sweeps:
        arms, variants = SWEEPS[sweep]
        for variant, settings in variants.items():
            slug = variant.replace(" ", "_").replace(",", "")
            overrides = [f"run.dir={options.runs}", f"run.name={stem}/{sweep}-{slug}", "evaluation.test=false"]
            overrides += [*settings, *options.overrides]
            if options.jobs > 1:
                overrides.append("run.threads=1")
            for trial in plan(options.config, options.arms or arms, options.seeds, overrides):
                trials[sweep, variant, trial.arm, trial.seed] = trial
    try:
        refuse_other_settings(list(trials.values()))
    except ConfigError as error:
        raise ConfigError(f"{error}; of a sweep it is --runs that names another place") from error
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = dict(zip(trials, pool.map(_bring_to_end, trials.values()), strict=True))
    rows = [row for key, trial in trials.items() if codes[key] == 0 for row in rows_of(key, trial)]
    append_once(Path(options.out) / "sweep.csv", rows)
    print(_table(rows))
    failed = [f"{trials[key].name} (exit code {code}, {_log(trials[key])})" for key, code in codes.items() if code]
    document = {"config": options.config, "trials": len(trials), "failed": failed}
    print(json.dumps(document))
    return document


def _parse(argv: list[str] | None):
    comma = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value of every trial")
    parser.add_argument("--sweeps", type=comma, default=list(SWEEPS), help=f"some of {', '.join(SWEEPS)}")
    parser.add_argument("--arms", type=comma, default=[], help="other arms than those a sweep concerns")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in comma(text)], default=[0, 1])
    parser.add_argument(
        "--jobs", type=int, default=1, help="trials beside each other, one thread each if more than one"
    )
    parser.add_argument("--runs", default="runs/sweep", help="where the trials stand or are made")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args(argv)
    if unknown := set(options.sweeps) - set(SWEEPS):
        parser.error(f"--sweeps names {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    for override in options.overrides:
        name = override.partition("=")[0].strip()
        if name in OWN or name in _varied(options.sweeps):
            parser.error(
                f"{name} is what this sweep sets in each of its trials, so that {override} would make variants of other names "
                "alike; leave it out, or change the config"
            )
    return options


def _varied(sweeps: list[str]) -> set[str]:
    """The settings that some variant of these sweeps changes."""
    variants = [settings for sweep in sweeps for settings in SWEEPS[sweep][1].values()]
    return {override.partition("=")[0] for settings in variants for override in settings}


def _log(trial: Planned) -> Path:
    return trial.path.parent / "logs" / f"{trial.name}.log"


def _bring_to_end(trial: Planned) -> int:
    """Run a trial and return its exit code; 0 at once if it is finished."""
    if (trial.path / "results.json").exists():
        return 0
    code = run_trial(trial, _log(trial))
    print(f"{trial.path}: exit code {code}", file=sys.stderr, flush=True)
    return code


def rows_of(key: tuple, trial: Planned) -> list[dict]:
    """One row per val metric of a finished trial, with its conditions."""
    sweep, variant, arm, seed = key
    results = json.loads((trial.path / "results.json").read_text())
    made = json.loads((trial.path / "environment.json").read_text())
    conditions = {
        "seconds": round(results["cost.seconds"], 1),
        "threads": trial.config.run.threads,
        "commit": made["commit"],
        "device": made["gpu"] or made["cpu"],
        "torch": made["packages"]["torch"],
        "date": date.today().isoformat(),
    }
    data, shots, steps = trial.config.data.root, trial.config.data.shots_per_class, results["learning.steps"]
    what = {"sweep": sweep, "variant": variant, "arm": arm, "data": data, "seed": seed, "shots": shots, "steps": steps}
    return [
        what | {"metric": metric, "value": round(results[metric], 4)} | conditions
        for metric in METRICS
        if metric in results
    ]


def _table(rows: list[dict]) -> str:
    """The mean over seeds of three val metrics, one line per variant and arm."""
    shown = ("val.accuracy", "val.knn_accuracy", "val.near_ood.knn.auroc")
    lines = [
        f"{'variant':<28}{'arm':<20}{'seeds':>6}" + "".join(f"{metric.removeprefix('val.'):>20}" for metric in shown)
    ]
    for variant, arm in dict.fromkeys((row["variant"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["arm"]) == (variant, arm)]
        line = f"{variant:<28}{arm:<20}{len({row['seed'] for row in mine}):>6}"
        for metric in shown:
            values = [row["value"] for row in mine if row["metric"] == metric]
            line += f"{100 * sum(values) / len(values):>18.1f} %" if values else f"{'-':>20}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(refusal.code)
