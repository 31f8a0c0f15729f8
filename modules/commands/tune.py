"""`trainer.py tune CONFIG`: finds the ratio of generation to training that a run can afford on this machine.

For every ratio (images_per_step) real steps are timed from the same copy of the state, and compared with a step without
generation, in which further real rows replace the generated ones. Prints a table, a recommendation with its rule, and
the line of YAML to paste; tune.json and tune.png are written to tune/ in the run's directory.

    --quality[=STEPS]      train STEPS steps per ratio from the same start and judge them on val: accuracy against cost
    --presets[=a,b]        also measure other presets of the generator
"""

import dataclasses
from collections.abc import Callable

from modules.commands.flags import FLAGS, number, split_flags, words
from modules.commands.preparation import load_generation, opened, print_card
from modules.commands.tune_choice import RULE, Row, recommend, within
from modules.commands.tune_measure import measure
from modules.config import Config
from modules.console import Console, duration
from modules.errors import ConfigError
from modules.ranges import CHOICES
from modules.rules import generates
from modules.runtime import environment
from modules.settings import load_config
from modules.state import write_atomic
from modules.training import stages
from modules.training.job import State

QUALITY_STEPS = 60
HEADER = ["img/step", "steps/s", "img/s", "gen %", "slower", "reuse", "age", "run", "GiB"]
FIGURES = {"val_knn_accuracy": "val kNN", "val_near_ood_auroc": "AUROC"}
NOISY = 0.15  # relative difference of equal measurements above which the user is warned


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[[State], None]
) -> dict:
    """Measure, recommend, write; returns the content of tune.json.

    Raises:
        ConfigError: nothing is generated, an unknown flag or preset.
    """
    flags, overrides = split_flags(overrides, FLAGS["tune"])
    config, origins = load_config(path, overrides)
    if not generates(config):
        raise ConfigError("tune: generation.synthetic_fraction is 0, so nothing is generated; set it above 0")
    presets = _presets(flags, config)
    quality = number(flags, "quality", QUALITY_STEPS, low=10) if "quality" in flags else 0
    with opened(config, origins, console, "tune") as job:
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        with job.stage("tokens") as progress:
            console.line(f"  class tokens: {load_generation(job, progress, learn=quality > 0)}")
        print_card(job)
        with job.stage("tune") as progress:
            rows = measure(job, step, presets, quality, progress)
        report = _report(config, rows, quality)
        for preset in presets:
            _print_table(console, [row for row in rows if row.preset in (preset, "")], preset, quality)
        for line in report["recommendation"]:
            console.line(line)
        job.workdir.write_json("tune.json", report)
        from modules.commands.tune_plot import tune_png  # matplotlib takes a second to import

        write_atomic(job.workdir.path / "tune.png", tune_png(rows, config.tune, quality))
        console.line(f"written: {job.workdir.path / 'tune.json'}, {job.workdir.path / 'tune.png'}")
    return report


def _presets(flags: dict[str, str], config: Config) -> list[str]:
    """The config's own preset, then the others asked for."""
    own, known = config.pipeline.preset, CHOICES["pipeline.preset"]
    if "presets" not in flags:
        return [own]
    asked = words(flags["presets"]) or list(known)
    for name in asked:
        if name not in known:
            raise ConfigError(f"command line: --presets names {name!r}; choose from {', '.join(known)}")
    return [own, *(name for name in asked if name != own)]


def _report(config: Config, rows: list[Row], quality: int) -> dict:
    return {
        "rule": RULE,
        "bounds": dataclasses.asdict(config.tune),
        "quality_steps": quality,
        "rows": [dataclasses.asdict(row) | {"outside": within(row, config.tune)} for row in rows],
        "recommendation": recommend(rows, config.tune, config.pipeline.preset),
        "environment": environment(),
    }


def _print_table(console: Console, rows: list[Row], preset: str, quality: int) -> None:
    figures = list(next((row.quality for row in rows if row.quality), {}) or {})
    header = HEADER + [FIGURES[name] for name in figures]
    lines = []
    for row in rows:
        if row.reason:
            lines.append([f"{row.images_per_step:g}", "infeasible"] + [""] * (len(header) - 2))
            continue
        lines.append(
            [f"{row.images_per_step:g}" if row.images_per_step else "none", f"{1e3 / row.step_ms:.3g}"]
            + [f"{row.made_per_s:.3g}", f"{100 * row.generation_share:.0f}", f"{row.slowdown:.2f}x"]
            + [f"{row.reuse:.1f}", f"{row.age:.0f}", duration(3600 * row.hours), f"{row.peak_gib:.2f}"]
            + [f"{(row.quality or {}).get(name, float('nan')):.3f}" for name in figures]
        )
    judged = f"; kNN accuracy and near-OOD AUROC on val after {quality} steps, one seed" if quality else ""
    console.table(f"preset {preset}{judged}", header, lines)
    for row in rows:
        if row.reason:
            console.line(f"  {row.images_per_step:g}: {row.reason}")
    spread = next(row.spread for row in rows if not row.preset)
    console.line(
        f"  the fastest of equal windows counts; those without generation lay up to {100 * spread:.0f} % apart"
    )
    if spread > NOISY:
        console.warn("the machine was busy with something else; measure again when it is idle")
    console.line("  reuse and age (in steps) of full rings; run: learning.steps steps, without tokens and evaluation")
    console.line("  GiB: peak of a window, on a GPU its tensors and the pools of captured graphs, on a CPU the process")
