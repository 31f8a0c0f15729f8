"""The figure of tune: the cost of each ratio and, with --quality, its accuracy."""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modules.commands.tune_choice import Row, within
from modules.config import Tune
from modules.evaluation.figures import PAPER, STAND_INS, STYLE

INK, MUTED, GENERATE, TRAIN, OUTSIDE = (PAPER[f"var(--{name})"] for name in ("ink", "muted", "id", "positive", "near"))
PAPER_STYLE = {key: PAPER[STAND_INS[value]] if value in STAND_INS else value for key, value in STYLE.items()}
PAPER_STYLE |= {"axes.facecolor": "white", "figure.facecolor": "white"}


def tune_png(rows: list[Row], bounds: Tune, quality_steps: int) -> bytes:
    """A PNG with step time by ratio, split into generation and training; reuse by run time; val figures by run time."""
    measured = [row for row in rows if not row.reason]
    presets = list(dict.fromkeys(row.preset for row in measured if row.preset)) or [""]
    judged = [row for row in measured if row.quality]
    panels = len(presets) + 1 + bool(judged)
    with rc_context(PAPER_STYLE):
        drawing = Figure(figsize=(4.2 * panels, 3.1), layout="constrained")
        axes = drawing.subplots(1, panels, squeeze=False)[0]
        for panel, preset in zip(axes, presets, strict=False):
            _step_times(panel, [row for row in measured if row.preset in ("", preset)], preset, bounds)
        _reuse(axes[len(presets)], measured, presets, bounds)
        if judged:
            _accuracy(axes[-1], judged, quality_steps)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _step_times(axes: Axes, rows: list[Row], preset: str, bounds: Tune) -> None:
    places = range(len(rows))
    generation = [row.step_ms * row.generation_share for row in rows]
    training = [row.step_ms - g for row, g in zip(rows, generation, strict=True)]
    axes.bar(places, training, color=TRAIN, width=0.66, label="training")
    axes.bar(places, generation, bottom=training, color=GENERATE, width=0.66, label="generation")
    limit = bounds.max_slowdown * rows[0].step_ms if bounds.max_slowdown else None
    if limit is not None and limit < 1.15 * max(row.step_ms for row in rows):
        axes.axhline(limit, color=OUTSIDE, linestyle=(0, (4, 3)), label=f"max_slowdown {bounds.max_slowdown:g}x")
    for place, row in zip(places, rows, strict=True):
        outside = bool(row.preset) and bool(within(row, bounds))
        axes.text(place, row.step_ms, f"{row.slowdown:.2f}x", ha="center", va="bottom", fontsize=8,
                  color=OUTSIDE if outside else INK,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    axes.set_ylim(top=1.4 * max(row.step_ms for row in rows))  # room for the legend
    axes.set_xticks(list(places), [f"{row.images_per_step:g}" if row.preset else "none" for row in rows])
    axes.set_xlabel("images_per_step")
    axes.set_ylabel("ms a step")
    axes.set_title(f"Step time, preset {preset}")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, loc="upper left")


def _reuse(axes: Axes, rows: list[Row], presets: list[str], bounds: Tune) -> None:
    """Plot how often an image is used over the time of the run: the two sides of the choice."""
    unit, scale = _time_unit(rows)
    for preset, color in zip(presets, (GENERATE, TRAIN, OUTSIDE, MUTED), strict=False):
        own = [row for row in rows if row.preset == preset]
        times = [scale * row.hours for row in own]
        axes.plot(times, [row.reuse for row in own], "o-", color=color, label=preset, markersize=5)
        for time, row in zip(times, own, strict=True):
            _name(axes, row, time, row.reuse)
    if bounds.max_reuse:
        axes.axhline(bounds.max_reuse, color=OUTSIDE, linestyle=(0, (4, 3)), label=f"max_reuse {bounds.max_reuse:g}")
    if bounds.max_hours:
        axes.axvline(
            scale * bounds.max_hours, color=OUTSIDE, linestyle=(0, (1, 2)), label=f"max_hours {bounds.max_hours:g}"
        )
    axes.margins(0.14)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"{unit} of the run")
    axes.set_ylabel("batches an image serves in")
    axes.set_title("Reuse against time, by images_per_step")
    if len(presets) > 1 or bounds.max_reuse or bounds.max_hours:
        axes.legend(fontsize=8)


def _accuracy(axes: Axes, rows: list[Row], steps: int) -> None:
    unit, scale = _time_unit(rows)
    names = {"val_knn_accuracy": ("kNN accuracy", TRAIN), "val_near_ood_auroc": ("near-OOD AUROC", GENERATE)}
    for name, (label, color) in names.items():
        own = [row for row in rows if name in row.quality]
        times, values = [scale * row.hours for row in own], [100 * row.quality[name] for row in own]
        axes.plot(times, values, "o", color=color, label=label)
        for time, value, row in zip(times, values, own, strict=True):
            _name(axes, row, time, value)
    axes.margins(0.16)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"{unit} of the run")
    axes.set_ylabel("percent, on val")
    axes.set_title(f"After {steps} steps, one seed")
    axes.legend(fontsize=8)


def _name(axes: Axes, row: Row, x: float, y: float) -> None:
    text = f"{row.images_per_step:g}" if row.preset else "none"
    axes.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)


def _time_unit(rows: list[Row]) -> tuple[str, float]:
    """(unit, units per hour) in which the longest run is a readable number."""
    longest = max(row.hours for row in rows)
    return ("hours", 1.0) if longest >= 1.5 else ("minutes", 60.0) if longest >= 1.5 / 60 else ("seconds", 3600.0)
