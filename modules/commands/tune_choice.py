"""Recommends one of the measured ratios, by a rule that is printed with the recommendation."""

from dataclasses import dataclass, replace
from statistics import linear_regression

from modules.config import Tune
from modules.console import duration

RULE = (
    "the largest measured images_per_step whose run stays within tune.max_hours, whose step stays within "
    "tune.max_slowdown times the step without generation, and whose images serve at most tune.max_reuse times (0: no bound)"
)

ROUNDING = 1e-9  # relative rounding error allowed in a reuse, so that one of exactly 4 satisfies a bound of 4


@dataclass(frozen=True)
class Row:
    """The measurements of one ratio, or the reason why it cannot be run."""

    images_per_step: float
    preset: str  # "" for the step without generation
    step_ms: float = 0.0
    made_per_s: float = 0.0  # images finished per second
    generation_share: float = 0.0  # generation's share of the step
    slowdown: float = 0.0  # step time relative to the step without generation
    reuse: float = 0.0  # mean number of batches an image is used in
    age: float = 0.0  # mean age in steps of the stored images, once rings are full
    hours: float = 0.0  # duration of learning.steps steps
    peak_gib: float = 0.0  # on a CPU: of the process so far
    steps_timed: int = 0
    reason: str = ""  # why it cannot be run; empty if it was measured
    quality: dict | None = None  # figures on val after a short run
    spread: float = 0.0  # only without generation: slowest / fastest of equal windows - 1


def within(row: Row, bounds: Tune) -> list[str]:
    """The bounds that a row exceeds, each with its figures; empty if it keeps them all."""
    if row.reason:
        return ["cannot be run"]
    broken = []
    if bounds.max_hours and row.hours > bounds.max_hours:
        broken.append(f"{row.hours:.3g} hours are more than tune.max_hours {bounds.max_hours:g}")
    if bounds.max_slowdown and row.slowdown > bounds.max_slowdown:
        broken.append(f"{row.slowdown:.2f}x is slower than tune.max_slowdown {bounds.max_slowdown:g}")
    if bounds.max_reuse and row.reuse > bounds.max_reuse * (1 + ROUNDING):
        broken.append(f"a reuse of {row.reuse:.1f} is more than tune.max_reuse {bounds.max_reuse:g}")
    return broken


def recommend(rows: list[Row], bounds: Tune, preset: str) -> list[str]:
    """Lines of text: the rule, the recommendation for the config's preset with YAML to paste, then other presets."""
    measured = [row for row in rows if row.preset and not row.reason]
    own = [row for row in measured if row.preset == preset]
    lines = [f"rule: {RULE}"]
    allowed = [row for row in own if not within(row, bounds)]
    if allowed:
        best = max(allowed, key=lambda row: row.images_per_step)
        beyond = [row for row in own if row.images_per_step > best.images_per_step]
        why = f"; {beyond[0].images_per_step:g}: {', '.join(within(beyond[0], bounds))}" if beyond else ""
        lines.append(f"recommended: {_figures(best)}{why}")
        lines.append("paste below `generation:` of the config:")
        lines.append(f"  images_per_step: {best.images_per_step:.12g}")  # exactly the ratio measured, not rounded
        if judged := [row for row in allowed if row.quality]:
            lines.append(_accuracy_line(judged, best))
    elif own:
        lines.append(_none_line(own, bounds))
    else:
        lines.append(
            "recommended: none, because no ratio of tune.grid can be run (see the reasons); "
            "lower generation.synthetic_fraction or raise generation.max_uses"
        )
    if len(own) > 1:
        lines.append(_cost_line(own, rows))
    for other in dict.fromkeys(row.preset for row in measured if row.preset != preset):
        allowed = [row for row in measured if row.preset == other and not within(row, bounds)]
        best = max(allowed, key=lambda row: row.images_per_step, default=None)
        lines.append(f"preset {other}: " + (f"allows {_figures(best)}" if best else "keeps the bounds at no ratio"))
    return lines


def cost_of_an_image(rows: list[Row]) -> tuple[float, float]:
    """(ms of a step without images, ms added per image per step), by least squares through the rows of one preset."""
    slope, base = linear_regression([row.images_per_step for row in rows], [row.step_ms for row in rows])
    return base, slope


def _figures(row: Row) -> str:
    return (
        f"images_per_step {row.images_per_step:g} ({1e3 / row.step_ms:.3g} steps/s, {row.slowdown:.2f}x the step without "
        f"generation, {100 * row.generation_share:.0f} % of it generation, reuse {row.reuse:.1f}, "
        f"{duration(3600 * row.hours)} in all)"
    )


def _none_line(own: list[Row], bounds: Tune) -> str:
    """Why no ratio is recommended, and which is nearest: bounds on time favor less generation, one on reuse more."""
    in_time = [row for row in own if not within(row, replace(bounds, max_reuse=0.0))]
    if not in_time:
        nearest, ways = (
            min(own, key=lambda row: row.step_ms),
            "add a smaller ratio to tune.grid, or take a faster preset",
        )
    elif len(in_time) == len(own):
        nearest, ways = min(own, key=lambda row: row.reuse), "or add a larger ratio to tune.grid"
    else:
        nearest, ways = min(in_time, key=lambda row: row.reuse), "or take a faster preset"
    return (
        f"recommended: none, because no measured ratio keeps every bound; the nearest is {_figures(nearest)}: "
        f"{', '.join(within(nearest, bounds))}; raise that bound, {ways}"
    )


def _accuracy_line(judged: list[Row], best: Row) -> str:
    name = "val_knn_accuracy"
    top = max(judged, key=lambda row: row.quality[name])
    return (
        f"on val after the short runs: {best.quality[name]:.3f} at the recommended ratio, highest {top.quality[name]:.3f} "
        f"at {top.images_per_step:g}; one seed each, so a few points are chance"
    )


def _cost_line(own: list[Row], rows: list[Row]) -> str:
    base, slope = cost_of_an_image([row for row in rows if not row.preset] + own)
    return f"a step takes about {base:.3g} ms and {slope:.3g} ms more for each image_per_step"
