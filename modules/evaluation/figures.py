"""Figures as inline SVG in the page's colors.

matplotlib draws with stand-in colors. In the finished SVG they are replaced by the CSS variables of page.html, so that
one figure serves light and dark mode. Text stays text. pyplot's global state is not used.

Shapes: D images, C classes, F feature width.
"""

import io
import re
from collections.abc import Sequence
from colorsys import hls_to_rgb

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn.functional import normalize

from modules.runtime import stream, stream_seed

# stand-in color (one that no figure needs otherwise) -> the CSS variable that replaces it
STAND_INS = {
    "#010203": "var(--ink)",
    "#020304": "var(--muted)",
    "#030405": "var(--line)",
    "#040506": "var(--surface)",
    "#050607": "var(--id)",
    "#060708": "var(--near)",
    "#070809": "var(--far)",
    "#08090a": "var(--positive)",
}
# the page's light colors, for figures outside a page
PAPER = {
    "var(--ink)": "#1b2330",
    "var(--muted)": "#667085",
    "var(--line)": "#e2e6ec",
    "var(--surface)": "#ffffff",
    "var(--id)": "#2f6bd8",
    "var(--near)": "#d9701e",
    "var(--far)": "#8257c6",
    "var(--positive)": "#16876f",
}
INK, MUTED, LINE, SURFACE, ID, NEAR, FAR, POSITIVE = STAND_INS
ROLE_COLORS = {"id": ID, "near_ood": NEAR, "far_ood": FAR}
ROLE_NAMES = {"id": "in-distribution", "near_ood": "near-OOD", "far_ood": "far-OOD"}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class name may contain two dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def to_svg(drawing: Figure, name: str, colors: dict[str, str] | None = None) -> str:
    """The figure as an SVG element in the page's colors; `name` keeps its ids distinct from those of other figures.

    `colors` maps CSS variables to fixed colors, for a figure in a file of its own (see PAPER).
    """
    buffer = io.StringIO()
    if colors is not None:
        drawing.set_facecolor(SURFACE)
    with rc_context(STYLE | {"svg.hashsalt": name}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    # ids such as "text_1" and "axes_1" repeat in every figure; only ids that are referred to must stay
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|PathCollection|legend)[._0-9a-z]*"', "", svg
    )
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable if colors is None else colors[variable])
    return svg


def curves(panels: Sequence[tuple[str, Sequence[float], Sequence[float], float | None]], name: str = "curves") -> str:
    """Small multiples over optimizer steps; a panel is (title, steps, values, level of a dashed line or None)."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        drawing = Figure(figsize=(10.6, 2.3 * rows), layout="constrained")
        grid = drawing.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            title, steps, values, level = panel
            axes.plot(steps, values, color=ID)
            if level is not None:
                axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(title)
            axes.margins(x=0.01)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        return to_svg(drawing, name)


def score_histogram(scores: dict[str, Tensor], threshold: float, score: str) -> str:
    """Histograms of one OOD score by role (id, near_ood, far_ood), with the threshold chosen on val."""
    values = {role: scores_D.double().numpy() for role, scores_D in scores.items()}
    everything = np.concatenate(list(values.values()))
    low, high = np.quantile(everything, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, 31)
    with rc_context(STYLE):
        drawing = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = drawing.subplots()
        for role, given in values.items():
            clipped = np.clip(given, edges[0], edges[-1])
            weights = np.full(len(clipped), 1 / len(clipped))
            axes.hist(clipped, edges, weights=weights, color=ROLE_COLORS[role], alpha=0.22, histtype="stepfilled")
            axes.hist(
                clipped,
                edges,
                weights=weights,
                color=ROLE_COLORS[role],
                histtype="step",
                linewidth=1.5,
                label=ROLE_NAMES[role],
            )
        axes.axvline(threshold, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label="threshold from val")
        axes.set_xlabel(f"{score}  (higher = more in-distribution)")
        axes.set_ylabel("share of images")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=8, labelcolor=INK)
        return to_svg(drawing, f"histogram {score}")


def intervals_plot(
    rows: Sequence[tuple[str, Sequence[tuple[float, float | None, float | None, str]]]],
    label: str,
    reference: float | None,
    name: str,
) -> str:
    """Points with intervals on one line per row, in percent; a row is (name, points of (value, low, high, color))."""
    with rc_context(STYLE):
        drawing = Figure(figsize=(5.4, 0.75 + 0.31 * len(rows)), layout="constrained")
        axes = drawing.subplots()
        for position, (_, points) in enumerate(rows):
            for order, (value, low, high, color) in enumerate(points):
                y = position + 0.22 * (order - (len(points) - 1) / 2)
                if low is not None and high is not None:
                    axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2.4, alpha=0.4)
                axes.plot([100 * value], [y], "o", color=color, markersize=5.5, markeredgecolor=SURFACE)
        if reference is not None:
            axes.axvline(100 * reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [row for row, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        return to_svg(drawing, name)


def arms_plot(
    arms: Sequence[str],
    panels: Sequence[tuple[str, Sequence[tuple[float, float | None, float | None, Sequence[float]] | None]]],
    baseline: str,
    colors: dict[str, str] | None,
) -> str:
    """One panel per metric, one line per arm: mean, interval as a bar, a ring per seed; the baseline's mean is dashed.

    A panel is (title, entries), with one entry per arm: (mean, low, high, values by seed) in [0, 1], or None. `colors`
    as in to_svg.
    """
    with rc_context(STYLE):
        drawing = Figure(figsize=(10.6, 0.95 + 0.36 * len(arms)), layout="constrained")
        for axes, (title, entries) in zip(
            drawing.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels, strict=True
        ):
            for position, (arm, entry) in enumerate(zip(arms, entries, strict=True)):
                if entry is None:
                    continue
                mean, low, high, values = entry
                color = MUTED if arm == baseline else ID
                if low is not None and high is not None:
                    axes.plot([100 * low, 100 * high], [position, position], color=color, linewidth=5, alpha=0.3)
                seeds = [100 * value for value in values]
                axes.plot(seeds, [position] * len(seeds), "o", color=color, markersize=4, markerfacecolor="none")
                axes.plot([100 * mean], [position], "o", color=color, markersize=7, markeredgecolor=SURFACE)
                if arm == baseline:
                    axes.axvline(100 * mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(title)
            axes.set_yticks(range(len(arms)), arms)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
        return to_svg(drawing, "arms", colors)


def confusion_figure(confusion_CC: np.ndarray, classes: Sequence[str]) -> str:
    """The row-normalized confusion matrix: true classes down, predicted ones across, shares as opacity."""
    share_CC = confusion_CC / np.maximum(1, confusion_CC.sum(axis=1, keepdims=True))
    count = len(classes)
    size = float(np.clip(0.15 * count + 1.9, 3.4, 9))
    fontsize = float(np.clip(9 - 0.08 * count, 4.5, 8))
    with rc_context(STYLE):
        drawing = Figure(figsize=(size + 0.5, size), layout="constrained")
        axes = drawing.subplots()
        for row, column in np.argwhere(share_CC > 0):
            color = ID if row == column else NEAR
            depth = float(share_CC[row, column] ** 0.6)  # so that a few percent are still visible
            axes.add_patch(
                Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=color, alpha=depth, linewidth=0)
            )
        axes.set_xlim(-0.6, count - 0.4)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xticks(range(count), classes, rotation=90, fontsize=fontsize)
        axes.set_yticks(range(count), classes, fontsize=fontsize)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        return to_svg(drawing, "confusion")


def class_color(index: int) -> tuple[float, float, float]:
    """The color of a class: hues by the golden angle, three lightnesses, readable on light and dark backgrounds."""
    return hls_to_rgb((0.6 + index * 0.381966) % 1, (0.48, 0.58, 0.66)[index % 3], 0.55)


def embedding_points(features_DF: Tensor, points: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """(rows, xy): at most `points` rows drawn at random from the features, and their t-SNE coordinates [n, 2].

    Features are scaled to unit length, so distances are those of cosines. t-SNE starts from PCA and is seeded, so the
    same features give the same map.
    """
    rows = torch.randperm(len(features_DF), generator=stream(seed, "embedding map"))[:points].sort().values
    unit = normalize(features_DF[rows].float(), dim=1).numpy()
    perplexity = float(np.clip((len(rows) - 1) / 3, 1, 30))
    random_state = stream_seed(seed, "embedding map", "t-SNE") % 2**32
    start = "pca" if (unit != unit[0]).any() else "random"  # identical points have no principal axis
    projector = TSNE(perplexity=perplexity, init=start, max_iter=500, random_state=random_state)
    return rows, projector.fit_transform(unit)


def embedding_figure(xy: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> str:
    """A map of embedded images: dots colored by class, named where it is densest; label -1 as orange crosses."""
    labels = np.asarray(labels)
    with rc_context(STYLE):
        drawing = Figure(figsize=(10.6, 6.6), layout="constrained")
        axes = drawing.subplots()
        for index in range(len(classes)):
            members = xy[labels == index]
            if len(members):
                axes.scatter(*members.T, s=15, color=class_color(index), alpha=0.75, linewidths=0)
        outside = xy[labels < 0]
        if len(outside):
            axes.scatter(*outside.T, s=19, marker="x", color=NEAR, linewidths=1.1, alpha=0.85)
        for index, name in enumerate(classes):
            members = xy[labels == index]
            if len(members):
                # page.html gives texts with this id a halo in the surface color, so that dots do not obscure them
                axes.annotate(
                    name, _densest(members), ha="center", va="center", fontsize=8.5, color=INK, gid=f"halo-{index}"
                )
        axes.set_axis_off()
        return to_svg(drawing, "embedding")


def _densest(points: np.ndarray) -> np.ndarray:
    """The point whose fifth-nearest neighbor among `points` [n, 2] is nearest: where a class is densest."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    return points[np.sort(distance, axis=1)[:, min(5, len(points) - 1)].argmin()]
