"""`trainer.py tune CONFIG`: which ratio of generation to training this machine, this pipeline and this run can afford.

Every ratio (images_per_step) takes real steps from the same copy of the state, against the same step without generation,
in which further real rows stand where generated ones would. Printed are a table, a recommendation with its rule, and the
line of YAML to paste; tune.json and tune.png stand in the run's directory under tune/.

    --quality[=STEPS]      train STEPS steps per ratio from the same start and judge them on val: accuracy against cost
    --presets[=a,b]        also measure other presets of the generator
"""

import dataclasses

from modules.commands import run as stages
from modules.commands.flags import number, split_flags, words
from modules.commands.job import Job
from modules.commands.preparation import load_generation, opened, print_card, variant
from modules.commands.timing import Timing, copied, time_steps, window
from modules.commands.tune_choice import RULE, Row, recommend, within
from modules.config import Config
from modules.diffusion.presets import plan
from modules.errors import ConfigError, UserError
from modules.evaluation.features import embed_images, knn_accuracy
from modules.evaluation.metrics import ood_metrics
from modules.evaluation.ood import SCORES, Fitting
from modules.rules import CHOICES, generated_rows, generates
from modules.runtime import environment
from modules.settings import load_config, with_settings
from modules.state import write_atomic

FLAGS = {
    "quality": "train this many steps per ratio (60) and judge them on val",
    "presets": "also measure these presets (all)",
}
QUALITY_STEPS = 60
HEADER = ["img/step", "steps/s", "img/s", "gen %", "slower", "reuse", "age", "hours", "GiB"]
FIGURES = {"val_knn_accuracy": "val kNN", "val_near_ood_auroc": "AUROC"}
NOISY = 0.15  # difference of equal measurements above which a user is told


def command(path: str, overrides: list[str], console, run, step) -> dict:
    """Measure, recommend, write; returns what tune.json holds.

    Raises:
        ConfigError: nothing is generated, an unknown flag or preset.
    """
    flags, overrides = split_flags(overrides, FLAGS)
    config, origins = load_config(path, overrides)
    if not generates(config):
        raise ConfigError("tune: generation.synthetic_fraction is 0, so nothing is generated; set it above 0")
    presets = _presets(flags, config)
    quality = number(flags, "quality", QUALITY_STEPS, low=10) if "quality" in flags else 0
    with opened(config, origins, console, "tune") as job:
        with console.stage("data") as progress:
            stages.load_data(job, progress)
        with console.stage("tokens") as progress:
            console.line(f"  class tokens: {load_generation(job, progress, learn=quality > 0)}")
        print_card(job)
        with console.stage("tune") as progress:
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


def measure(job: Job, step, presets: list[str], quality: int, progress) -> list[Row]:
    """A row for no generation (first and again last, for the drift of the machine) and one for each preset and ratio."""
    grid = sorted({rate for rate in job.config.tune.grid if rate > 0})
    total, rows = 2 + len(presets) * len(grid), []

    def add(row: Row) -> Row:
        rows.append(row)
        progress(len(rows), total, f"{row.preset or 'no generation'} {row.images_per_step:g} images a step")
        return row

    baseline = add(_baseline(job, step, quality))
    for preset in presets:
        for row in _ratios(job, step, preset, grid, quality, baseline.step_ms):
            add(row)
    again = add(_baseline(job, step, 0))
    drift = again.step_ms / baseline.step_ms - 1
    rows[0] = dataclasses.replace(baseline, drift=drift)
    return rows[:-1]


def _baseline(job: Job, step, quality: int) -> Row:
    """The step without generation: as many rows, all of them real."""
    extra = job.config.learning.extra_real_rows + round(generated_rows(job.config))
    real = {
        "generation.synthetic_fraction": 0.0,
        "generation.roundtrip_fraction": 0.0,
        "learning.extra_real_rows": extra,
    }
    plain = variant(job, real | _short(job.config, quality))
    plain.pipeline = None
    state = stages.build(plain, _silent)
    count = quality - 2 if quality else job.config.tune.steps
    timing = time_steps(state, step, count)
    return _row(job, "", 0.0, timing, timing.step_ms, _judge(plain, state) if quality else None)


def _ratios(job: Job, step, preset: str, grid: list[float], quality: int, baseline_ms: float):
    """A row for every ratio of one preset, each from the same copy of the state."""
    feasible = {rate: _settings(job.config, rate) for rate in grid}
    runnable = [rate for rate, found in feasible.items() if isinstance(found, Config)]
    state = start = None
    for rate in grid:
        config = feasible[rate]
        if rate not in runnable:
            yield Row(rate, preset, reason=str(config))
            continue
        try:
            if state is None:
                own = _preset_job(job, preset, rate, quality)
                state = stages.build(own, _silent)
                start = copied(state.state_dict())
            state.load_state_dict(copied(start))
            state.config = state.generator.config = with_settings(own.config, {"generation.images_per_step": rate})
            count = quality - 2 if quality else window(state, job.config.tune.steps)
            timing = time_steps(state, step, count)
        except UserError as error:  # one ratio or preset that cannot be run is a row with its reason, not the end
            yield Row(rate, preset, reason=str(error))
            continue
        figures = _judge(own, state) if quality else None
        yield _row(own, preset, rate, timing, baseline_ms, figures)


def _preset_job(job: Job, preset: str, rate: float, quality: int) -> Job:
    """The job under a preset; another preset than the config's loads a pipeline of its own."""
    changes = {"pipeline.preset": preset, "generation.images_per_step": rate} | _short(job.config, quality)
    if not quality:
        changes["generation.prefill"] = 0.0  # time does not depend on what the rings hold
    own = variant(job, changes)
    if preset != job.config.pipeline.preset:
        load_generation(own, _silent, learn=quality > 0)
    planned = plan(preset, own.config.generation, own.pipeline, bool(own.config.pipeline.resolution))
    job.console.line(f"  preset {preset}: {'; '.join(planned.reasons)}")
    return own


def _short(config: Config, quality: int) -> dict[str, object]:
    """Settings that make a whole schedule of `quality` steps; none for timing alone."""
    if not quality:
        return {}
    return {"learning.steps": quality, "learning.warmup_steps": min(config.learning.warmup_steps, quality // 5)}


def _settings(config: Config, rate: float) -> Config | ConfigError:
    """The configuration at a ratio, or why it cannot be run."""
    try:
        return with_settings(config, {"generation.images_per_step": rate})
    except ConfigError as error:
        return error


def _row(job: Job, preset: str, rate: float, timing: Timing, baseline_ms: float, figures: dict | None) -> Row:
    """What a window of steps says of a whole run at this ratio."""
    config = job.config
    return Row(
        images_per_step=rate,
        preset=preset,
        step_ms=timing.step_ms,
        made_per_s=1e3 * timing.images / timing.step_ms,
        generation_share=timing.share("generate"),
        slowdown=timing.step_ms / baseline_ms,
        reuse=generated_rows(config) / rate if rate else 0.0,
        age=mean_age(config.generation, rate, len(job.sets.index.classes)),
        hours=config.learning.steps * timing.step_ms / 3.6e6,
        peak_gib=timing.peak_gib,
        steps_timed=timing.steps,
        quality=figures,
    )


def mean_age(generation, rate: float, num_classes: int) -> float:
    """Mean age in steps of the images held once rings are full, 0 without generation.

    A ring of one role gets rate x share / C images a step, so an image leaves ring_size C / (rate x share) steps after
    it came, or is unused beyond max_age; on average it is half as old.
    """
    shares = [s for s in (1 - generation.near_ood_fraction, generation.near_ood_fraction) if s > 0]
    if not rate:
        return 0.0
    lives = [generation.ring_size * num_classes / (rate * share) for share in shares]
    if generation.max_age:
        lives = [min(life, generation.max_age) for life in lives]
    return sum(lives) / len(lives) / 2


def _judge(job: Job, state) -> dict[str, float]:
    """kNN accuracy on val and, where classes are kept for it, near-OOD AUROC on val; never test."""
    sets, size = job.sets, job.config.evaluation.batch_size
    found = {
        name: embed_images(state.embed, sets.images[name].pixels_DHWC, size)
        for name in ("train", "val", "near_ood_val")
        if name in sets.images
    }
    labels = sets.labels("val")
    figures = {
        "val_knn_accuracy": knn_accuracy(found["train"], sets.labels_D, found["val"], labels, len(sets.index.classes))
    }
    if "near_ood_val" in found:
        score = SCORES["knn"]
        fitted = score.fit(Fitting(found["train"], sets.labels_D))
        id_scores, ood_scores = (score.score(fitted, found[name], None) for name in ("val", "near_ood_val"))
        figures["val_near_ood_auroc"] = ood_metrics(id_scores, ood_scores)["auroc"]
    return figures


def _presets(flags: dict[str, str], config: Config) -> list[str]:
    """The config's own preset, then others that are asked for."""
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


def _print_table(console, rows: list[Row], preset: str, quality: int) -> None:
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
            + [f"{row.reuse:.1f}", f"{row.age:.0f}", f"{row.hours:.3g}", f"{row.peak_gib:.2f}"]
            + [f"{(row.quality or {}).get(name, float('nan')):.3f}" for name in figures]
        )
    judged = f"; kNN accuracy and near-OOD AUROC on val after {quality} steps, one seed" if quality else ""
    console.table(f"preset {preset}{judged}", header, lines)
    for row in rows:
        if row.reason:
            console.line(f"  {row.images_per_step:g}: {row.reason}")
    drift = next(row.drift for row in rows if not row.preset)
    console.line(f"  the step without generation, measured again at the end, was {100 * drift:+.0f} % apart")
    if abs(drift) > NOISY:
        console.warn("the machine was busy with something else; measure again when it is idle")
    console.line("  reuse and age (steps) of full rings; hours of learning.steps steps, without tokens and evaluation")


def _silent(done: int, total: int, note: str = "") -> None:
    """No progress line for what is built many times."""
