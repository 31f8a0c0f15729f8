"""A comparison as plain text for a terminal, as JSON for programs, and as long rows for benchmarks/results."""

import csv
import dataclasses
import io
import json

from modules.evaluation import figures, page
from modules.evaluation.compare import COSTS, REPRESENTATION, Comparison, Finished, Summary, Trial, fair_seconds
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES

ROW_COLUMNS = ("data", "arm", "seed", "shots", "steps", "metric", "value", "seconds", "commit", "device")
ERROR_OF_SEEDS = "Student's t over seeds (one seed: groups alone)"
LOWER_IS_BETTER = ("fpr_", "ece", "alignment", "uniformity", "artifact.", "cost.seconds", "cost.forward_passes")
COST_TITLES = ("seconds with tokens", "forward passes", "images generated", "reuse")
REPRESENTATION_TITLES = ("alignment", "uniformity", "calibration error", "decoder seen by probe", "and by OOD score")


def headline_metrics(comparison: Comparison) -> dict[str, str]:
    """Metric -> its column title in the main table: the accuracies and the AUROC of the headline score."""
    metrics = {
        "test.accuracy": "accuracy",
        "test.macro_accuracy": "macro accuracy",
        "test.knn_accuracy": "kNN accuracy",
    }
    for role in ("near_ood", "far_ood"):
        if role in comparison.groups:
            metrics[f"test.{role}.{comparison.headline}.auroc"] = f"{figures.ROLE_NAMES[role]} AUROC"
    return metrics


def conditions(comparison: Comparison) -> str:
    """One line on what the numbers are based on: seeds, groups, images, resamples."""
    seeds = sorted({one.trial.seed for one in comparison.finished})
    sizes = ", ".join(
        f"{comparison.groups[role]} groups ({comparison.images[role]} images) {figures.ROLE_NAMES[role]}"
        for role in comparison.groups
    )
    intervals = "without intervals (evaluation.bootstrap=0)"
    if comparison.resamples:
        intervals = (
            f"{100 * comparison.confidence:g} % intervals from {comparison.resamples} resamples of groups with "
            f"{ERROR_OF_SEEDS if len(seeds) > 1 else 'one seed, whose luck they do not cover'}, not widened for the number "
            "of comparisons"
        )
    return (
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); test: {sizes}; {intervals}; headline score "
        f"{comparison.headline}"
    )


def as_text(comparison: Comparison) -> str:
    """The main tables as plain text: mean, sd over seeds and interval by arm, differences to the baseline, costs."""
    metrics = headline_metrics(comparison)
    lines = [conditions(comparison), ""]
    lines += _columns(
        [["arm", "seeds", *metrics.values()]]
        + [
            [
                arm,
                str(seeds_of(comparison, arm)),
                *(_words(comparison.summaries[arm].get(metric)) for metric in metrics),
            ]
            for arm in comparison.arms
        ]
    )
    others = [arm for arm in comparison.arms if (arm, comparison.baseline) in comparison.differences]
    if others:
        mark = " (* the interval excludes 0)" if comparison.resamples else ""
        lines += ["", f"difference to {comparison.baseline}, points, paired{mark}"]
        lines += _columns(
            [["arm", "seeds", *metrics.values()]]
            + [[arm, *_difference_words(comparison, arm, tuple(metrics))] for arm in others]
        )
    for title, given, names in (
        ("representation, mean over seeds", REPRESENTATION, REPRESENTATION_TITLES),
        ("cost of a run, mean over seeds", COSTS, COST_TITLES),
    ):
        rows = [
            [arm, *(plain_number(comparison.summaries[arm].get(metric)) for metric in given)] for arm in comparison.arms
        ]
        lines += ["", title, *_columns([["arm", *names], *rows])]
    lines += [
        f"unfinished: {trial.arm} seed {trial.seed} ({reason}: {trial.path})" for trial, reason in comparison.unfinished
    ]
    return "\n".join(lines) + "\n"


def as_long_text(comparison: Comparison) -> str:
    """`as_text`, then all OOD metrics of all scores: AUROC, both AUPRs and both false-positive rates, in percent."""
    lines = []
    for role in (role for role in comparison.groups if role != "id"):
        for metric in OOD_METRICS:
            keys = {score: f"test.{role}.{score}.{metric}" for score in SCORES}
            shown = [s for s in keys if any(keys[s] in found for found in comparison.summaries.values())]
            rows = [[s, *(_words(comparison.summaries[arm].get(keys[s])) for arm in comparison.arms)] for s in shown]
            lines += ["", f"{figures.ROLE_NAMES[role]} {metric}", *_columns([["score", *comparison.arms], *rows])]
    lines += ["", *binary_notes(comparison)]
    return as_text(comparison) + "\n".join(lines) + "\n"


def binary_notes(comparison: Comparison) -> list[str]:
    """A note on the OOD examples that the score `binary` was trained on, if they differ between arms; else nothing."""
    sources: dict[str, list[str]] = {}
    for one in comparison.finished:
        arms = sources.setdefault(one.results.get("binary_head.trained_on", "none"), [])
        arms += [one.trial.arm] * (one.trial.arm not in arms)
    if len(sources) < 2:
        return []
    said = "; ".join(f"{source.replace('_', ' ')} in {', '.join(arms)}" for source, arms in sources.items())
    return [f"The score binary does not compare across these arms, its head saw different OOD examples: {said}."]


def as_json(comparison: Comparison) -> str:
    """Everything, machine-readable: summaries by arm, differences by pair ("arm - other"), settings, trials."""
    plain = {
        "conditions": conditions(comparison),
        "headline_score": comparison.headline,
        "baseline": comparison.baseline,
        "confidence": comparison.confidence,
        "resamples": comparison.resamples,
        "groups": comparison.groups,
        "images": comparison.images,
        "arms": {arm: _plain_summaries(comparison.summaries[arm]) for arm in comparison.arms},
        "differences": {
            f"{arm} - {other}": _plain_summaries(found)
            for (arm, other), found in comparison.differences.items()
            if comparison.arms.index(arm) > comparison.arms.index(other)  # the mirrored pair says the same
        },
        "arm_settings": comparison.arm_settings,
        "notes": binary_notes(comparison),
        "finished": [
            _trial(one.trial) | {"commit": commit_of(one), "device": device_of(one)} for one in comparison.finished
        ],
        "unfinished": [_trial(trial) | {"reason": reason} for trial, reason in comparison.unfinished],
    }
    return json.dumps(plain, indent=1, allow_nan=False, default=str) + "\n"


def as_rows(comparison: Comparison) -> list[dict]:
    """Long rows with ROW_COLUMNS for benchmarks/results, one per finished trial and metric."""
    rows = []
    for one in comparison.finished:
        condition = {
            "data": one.settings.get("data.root", ""),
            "arm": one.trial.arm,
            "seed": one.trial.seed,
            "shots": one.settings.get("data.shots_per_class", ""),
            "steps": one.settings.get("learning.steps", ""),
        }
        place = {"seconds": one.results.get("cost.seconds", ""), "commit": commit_of(one), "device": device_of(one)}
        for metric in comparison.summaries[one.trial.arm]:
            if metric in one.results:
                rows.append(condition | {"metric": metric, "value": one.results[metric]} | place)
        with_tokens = {"metric": "cost.seconds_with_tokens", "value": fair_seconds(one, comparison.finished)}
        rows.append(condition | with_tokens | place)
    return rows


def as_csv(comparison: Comparison) -> str:
    """as_rows as CSV with a header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ROW_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_rows(comparison))
    return buffer.getvalue()


def seeds_of(comparison: Comparison, arm: str) -> int:
    """The number of finished seeds of an arm."""
    return sum(one.trial.arm == arm for one in comparison.finished)


def verdict(found: Summary, metric: str) -> str:
    """The word better or worse if the interval excludes 0, else an empty string."""
    if found.low is None or found.low <= 0 <= found.high:
        return ""
    lower = any(part in metric for part in LOWER_IS_BETTER)
    return "better" if (found.mean > 0) != lower else "worse"


def _words(found: Summary | None) -> str:
    if found is None:
        return "-"
    spread = "" if found.sd is None else f" ±{100 * found.sd:.1f}"
    interval = "" if found.low is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.mean:.1f}{spread}{interval}"


def _difference_words(comparison: Comparison, arm: str, metrics: tuple[str, ...]) -> list[str]:
    found = comparison.differences[arm, comparison.baseline]
    words = [str(next(iter(found.values())).seeds)]
    for metric in metrics:
        given = found.get(metric)
        if given is None:
            words.append("-")
            continue
        interval = "" if given.low is None else f" [{100 * given.low:+.1f}, {100 * given.high:+.1f}]"
        words.append(f"{100 * given.mean:+.1f}{interval}{'*' if verdict(given, metric) else ''}")
    return words


def plain_number(found: Summary | None) -> str:
    """A mean to three significant digits, or a dash."""
    return "–" if found is None else page.number(found.mean)


def _columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _plain_summaries(summaries: dict[str, Summary]) -> dict[str, dict]:
    return {metric: dataclasses.asdict(found) for metric, found in summaries.items()}


def _trial(trial: Trial) -> dict:
    return {"arm": trial.arm, "seed": trial.seed, "path": str(trial.path)}


def commit_of(one: Finished) -> str:
    """The commit that the trial ran at."""
    return one.environment.get("commit") or "unknown"


def device_of(one: Finished) -> str:
    """The GPU that the trial ran on, or the CPU if there was none."""
    return one.environment.get("gpu") or one.environment.get("cpu") or "unknown"
