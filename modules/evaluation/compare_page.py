"""A comparison as one self-contained HTML page and one figure; `write_comparison` writes all its forms.

Numbers are shown with what they are based on; differences are colored if their interval excludes zero.
"""

from html import escape
from pathlib import Path

from modules.evaluation import figures, page
from modules.evaluation.compare import COSTS, REPRESENTATION, Comparison, Summary
from modules.evaluation.compare_text import (
    COST_TITLES,
    REPRESENTATION_TITLES,
    as_csv,
    as_json,
    as_long_text,
    binary_notes,
    commit_of,
    conditions,
    device_of,
    headline_metrics,
    plain_number,
    seeds_of,
    verdict,
)
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES
from modules.evaluation.report import OOD_TITLES, ROLE_TITLES
from modules.state import write_atomic


def write_comparison(folder: Path, comparison: Comparison, *, title: str, notes: tuple[str, ...] = ()) -> list[Path]:
    """Write compare.txt, .json, .csv, .html and .svg into `folder`, each atomically; returns their paths.

    Raises StorageError if one cannot be written.
    """
    contents = {
        "compare.txt": as_long_text(comparison),
        "compare.json": as_json(comparison),
        "compare.csv": as_csv(comparison),
        "compare.html": as_html(comparison, title=title, notes=notes),
        "compare.svg": as_figure(comparison, figures.PAPER),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def as_figure(comparison: Comparison, colors: dict[str, str] | None = None) -> str:
    """Accuracy and AUROC by arm with intervals and seeds, as SVG; with fixed `colors` for a file of its own."""
    titles = headline_metrics(comparison)
    chosen = [metric for metric in titles if metric == "test.accuracy" or metric.endswith(".auroc")]
    panels = []
    for metric in chosen:
        entries = []
        for arm in comparison.arms:
            found = comparison.summaries[arm].get(metric)
            values = [
                one.results[metric] for one in comparison.finished if one.trial.arm == arm and metric in one.results
            ]
            entries.append(None if found is None else (found.mean, found.low, found.high, values))
        panels.append((f"{titles[metric]}, percent", entries))
    return figures.arms_plot(comparison.arms, panels, comparison.baseline, colors)


def as_html(comparison: Comparison, *, title: str, notes: tuple[str, ...] = ()) -> str:
    """One self-contained page: figure, main table, differences, every OOD score, costs, arms, seeds."""
    notes = [*notes, *binary_notes(comparison)]
    notes += [
        f"Unfinished and left out: {trial.arm}, seed {trial.seed} ({reason})."
        for trial, reason in comparison.unfinished
    ]
    for name, of in (("commits", commit_of), ("devices", device_of)):
        found = sorted({of(one) for one in comparison.finished})
        if len(found) > 1:
            notes.append(f"The trials ran on different {name}: {', '.join(found)}.")
    head = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(conditions(comparison))}</p>']
    head += [f'<p class="note">{escape(note)}</p>' for note in notes]
    sections = [
        ("arms", "Arms", _arms_section(comparison)),
        ("differences", "Differences", _differences_section(comparison)),
        ("ood", "OOD", _ood_section(comparison)),
        ("cost", "Cost", _cost_section(comparison)),
        ("settings", "Settings", _settings_section(comparison)),
        ("seeds", "Seeds", _seeds_section(comparison)),
    ]
    return page.page(title, head, sections)


def _arms_section(comparison: Comparison) -> str:
    metrics = headline_metrics(comparison)
    rows = [
        [arm, seeds_of(comparison, arm), *(_cell(comparison.summaries[arm].get(metric)) for metric in metrics)]
        for arm in comparison.arms
    ]
    table = page.table(["arm", "seeds", *metrics.values()], rows, comparison.arms.index(comparison.baseline))
    interval, bars = (", interval", "bars are intervals, ") if comparison.resamples else ("", "")
    about = (
        f"Percent: mean over seeds, ± sd over seeds{interval}. In the figure, {bars}rings are seeds, and the dashed line is "
        f"{comparison.baseline}."
    )
    return page.section("arms", "Arms", about, page.figure(as_figure(comparison)), table)


def _differences_section(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    metrics = headline_metrics(comparison)
    parts = []
    for metric, title in metrics.items():
        if metric != "test.accuracy" and not metric.endswith(".auroc"):
            continue
        rows = [
            [arm, *(_difference_cell(comparison, arm, other, metric) for other in comparison.arms)]
            for arm in comparison.arms
        ]
        parts.append(f"<h3>{escape(title)}: row minus column</h3>")
        parts.append(page.table(["", *comparison.arms], rows))
    colored = "; colored where the interval excludes 0" if comparison.resamples else ""
    about = f"Points, paired over test groups and common seeds{colored}."
    return page.section("differences", "Differences between arms", about, *parts)


def _ood_section(comparison: Comparison) -> str:
    parts = []
    for role, title in ROLE_TITLES.items():
        if role not in comparison.groups:
            continue
        for metric, name in zip(OOD_METRICS, OOD_TITLES, strict=True):
            names = [
                score
                for score in SCORES
                if any(f"test.{role}.{score}.{metric}" in found for found in comparison.summaries.values())
            ]
            rows = [
                [
                    score,
                    *(_cell(comparison.summaries[arm].get(f"test.{role}.{score}.{metric}")) for arm in comparison.arms),
                ]
                for score in names
            ]
            chosen = names.index(comparison.headline) if comparison.headline in names else None
            table = page.table(["score", *comparison.arms], rows, chosen)
            if metric == "auroc":
                parts.append(f"<h3>{escape(title)}</h3><h3>{name}</h3>{table}")
            else:
                parts.append(f"<details><summary>{escape(name)}</summary>{table}</details>")
    about = "Every score, not only the headline one, which was fixed before the runs."
    return page.section("ood", "Out-of-distribution detection", about, *parts) if parts else ""


def _cost_section(comparison: Comparison) -> str:
    columns = dict(zip(REPRESENTATION + COSTS, REPRESENTATION_TITLES + COST_TITLES, strict=True))
    rows = []
    for arm in comparison.arms:
        found = [comparison.summaries[arm].get(metric) for metric in columns]
        rows.append([arm, *(page.Cell(plain_number(given), number=True) for given in found)])
    about = (
        "Mean over seeds. Arms are fair in optimizer steps and real rows, not in cost: that is shown here. Class tokens are "
        "learned once a seed and read from the cache by its other trials; the seconds count them for each arm that uses them."
    )
    return page.section("cost", "Representation and cost", about, page.table(["arm", *columns.values()], rows))


def _settings_section(comparison: Comparison) -> str:
    names = list(next(iter(comparison.arm_settings.values())))
    if not names:
        return ""
    rows = [[name, *(str(comparison.arm_settings[arm][name]) for arm in comparison.arms)] for name in names]
    about = "Every setting in which the arms differ; all others are equal."
    return page.section("settings", "What makes an arm", about, page.table(["setting", *comparison.arms], rows))


def _seeds_section(comparison: Comparison) -> str:
    metrics = headline_metrics(comparison)
    rows = [
        [
            one.trial.arm,
            str(one.trial.seed),
            *(page.share(one.results.get(metric)) for metric in metrics),
            commit_of(one),
        ]
        for one in comparison.finished
    ]
    table = page.table(["arm", "seed", *metrics.values(), "commit"], rows)
    return page.section("seeds", "Seed by seed", "Each finished trial as it came out.", table)


def _cell(found: Summary | None) -> page.Cell:
    if found is None:
        return page.Cell("–", number=True)
    spread = "" if found.sd is None else f" ± {100 * found.sd:.1f}"
    interval = "" if found.low is None else f'<span class="range">{100 * found.low:.1f}–{100 * found.high:.1f}</span>'
    return page.Cell(f"{100 * found.mean:.1f}{spread}{interval}", number=True)


def _difference_cell(comparison: Comparison, arm: str, other: str, metric: str) -> page.Cell:
    found = comparison.differences.get((arm, other), {}).get(metric)
    if found is None:
        return page.Cell("", number=True)
    interval = "" if found.low is None else f'<span class="range">{100 * found.low:+.1f} {100 * found.high:+.1f}</span>'
    return page.Cell(f"{100 * found.mean:+.1f}{interval}", number=True, kind=verdict(found, metric))
