"""The report of a run as one self-contained HTML page: generated images, learning curves, results, and time by phase.

All content is passed in; nothing is read from a run or started. A part that is not given has no section, so the same
function serves a baseline without a generator and a run with one.

Shapes: D images, C classes, F feature width, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from torch import Tensor

from modules.evaluation import figures, page
from modules.evaluation.evaluate import Outcome
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES
from modules.evaluation.report_recipes import (
    RecipeSheet,
    Shot,
    artifact_section,
    gate_section,
    recipes_section,
    shot_markup,
)
from modules.evaluation.stored import ROLES
from modules.phases import BESIDE, STEP_PHASES
from modules.state import write_atomic

MAX_PANELS = 9
CURVES = {  # key of a metric row -> title of its panel, in the order in which panels are filled
    "loss": "loss (dashed: chance level)",
    "batch_accuracy": "accuracy on the batch",
    "val.knn_accuracy": "kNN accuracy on val",
    "alignment": "alignment (lower: classes tighter)",
    "uniformity": "uniformity (lower: more spread)",
    "ood_share": "near-OOD share of the denominator",
    "id_cosine": "mean cosine of ID rows",
    "realized_fraction": "generated share of the batch",
    "reuse": "reuse: rows taken for an image made",
    "age_mean": "age of generated images, steps",
    "id_confidence": "confidence on ID rows",
    "ood_confidence": "confidence on near-OOD rows",
    "step_ms": "step, ms",
    "lr": "learning rate",
}
OOD_TITLES = ("AUROC", "AUPR, ID positive", "AUPR, OOD positive", "OOD accepted at 95 % ID", "ID rejected at 95 % OOD")
FEW_GROUPS = 20  # at this number, 95 % percentile intervals of a share cover the truth in only 90 to 93 % of cases
ROLE_TITLES = {"near_ood": "Near-OOD: held-out classes of the same family", "far_ood": "Far-OOD: another image set"}


@dataclass(frozen=True)
class SheetRow:
    """One class of the contact sheet."""

    label: str
    source: tuple[Shot, ...]
    positives: tuple[Shot, ...] = ()
    near_ood: tuple[Shot, ...] = ()


@dataclass(frozen=True)
class EmbeddingMap:
    """Features to draw as a map; labels are class ids, -1 for near-OOD."""

    features_DF: Tensor
    labels_D: Tensor
    points: int = 800
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    title: str
    outcome: Outcome
    lead: str = ""  # one sentence: data, method, steps
    notes: tuple[str, ...] = ()  # what the reader must know, such as "rendered, not photographed"
    card: tuple[tuple[str, str, str], ...] = ()  # (setting, value, reason)
    sheet: tuple[SheetRow, ...] = ()
    metric_rows: Sequence[dict] = ()  # of metrics.jsonl, each with "step"; "reference_level" is drawn into the loss
    embedding: EmbeddingMap | None = None
    inversion_rows: Sequence[dict] = ()  # one per class
    recipe_sheets: Sequence[RecipeSheet] = ()  # example images, one per recipe
    recipe_rows: Sequence[dict] = ()  # suitability, one per recipe (and class)
    gate_rows: Sequence[dict] = ()  # counts of verdicts, one per recipe (and class)
    gate_enabled: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # Meter.seconds: "stage.<name>" and step phases
    images: dict[str, int] = field(default_factory=dict)  # phase -> images that went through it, for throughput
    config_text: str = ""
    environment: dict = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Write report.html atomically; raise StorageError if it cannot be written."""
    write_atomic(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as one string of HTML that refers to nothing outside itself."""
    sections = [
        ("generated", "Images", _sheet(report)),
        ("learning", "Learning", _curves(report)),
        ("accuracy", "Accuracy", _accuracy(report)),
        ("ood", "OOD", _ood(report)),
        ("classes", "Classes", _classes(report)),
        ("map", "Map", _map(report)),
        ("recipes", "Recipes", recipes_section(report.recipe_sheets, report.recipe_rows)),
        ("gate", "Gate", gate_section(report.gate_rows, report.gate_enabled)),
        ("artifact", "Trace", artifact_section(report.outcome.results)),
        ("tokens", "Tokens", _tokens(report)),
        ("time", "Time", _time(report)),
        ("run", "Run", _run(report)),
    ]
    head = [f"<h1>{escape(report.title)}</h1>"]
    if report.lead:
        head.append(f'<p class="lead">{escape(report.lead)}</p>')
    head += [f'<p class="note">{escape(note)}</p>' for note in report.notes]
    return page.page(report.title, [*head, _tiles(report)], sections)


def _tiles(report: Report) -> str:
    found = report.outcome.results
    split = "test" if "test.accuracy" in found else "val"
    headline = found["headline.score"]
    names = {f"{split}.accuracy": f"{split} accuracy", f"{split}.macro_accuracy": "macro accuracy"}
    names[f"{split}.knn_accuracy"] = "kNN accuracy"
    for role in ("near_ood", "far_ood"):
        names[f"{split}.{role}.{headline}.auroc"] = f"{figures.ROLE_NAMES[role]} AUROC"
    confidence = 100 * found["bootstrap.confidence"]
    tiles = []
    for key, name in names.items():
        if key not in found:
            continue
        under = headline if key.endswith("auroc") else ""
        if f"{key}_low" in found:
            interval = f"{confidence:g} %: {100 * found[f'{key}_low']:.1f}–{100 * found[f'{key}_high']:.1f}"
            under = f"{under}, {interval}" if under else interval
        tiles.append((name, page.percent(found[key]), under))
    if report.seconds:
        tiles.append(("time", _duration(sum(_stages(report.seconds).values())), "all stages"))
    return page.tiles(tiles)


def _sheet(report: Report) -> str:
    if not report.sheet:
        return ""
    columns = {"source": "source", "positive": "generated positives", "near": "generated near-OOD"}
    shots = [(row.source, row.positives, row.near_ood) for row in report.sheet]
    shown = [index for index in range(3) if any(row[index] for row in shots)]
    rows = []
    for given, row in zip(report.sheet, shots, strict=True):
        cells = [page.Cell(escape(given.label), kind="class")]
        for index in shown:
            kind = tuple(columns)[index]
            cells.append(page.Cell(f'<div class="shots {kind}">{"".join(map(shot_markup, row[index]))}</div>'))
        rows.append(cells)
    titles = ["class"] + [tuple(columns.values())[index] for index in shown]
    about = (
        "Each row is a class: real training images, positives the generator painted from them, and the near-OOD images "
        "it painted as negatives. Hover for the provenance."
    )
    return page.section("generated", "What was generated", about, page.table(titles, rows, kind="sheet"))


def _curves(report: Report) -> str:
    panels = []
    for key, title in CURVES.items():
        points = [(row["step"], row[key]) for row in report.metric_rows if isinstance(row.get(key), int | float)]
        if len(points) < 2:
            continue
        level = None
        if key == "loss":
            level = next((row["reference_level"] for row in report.metric_rows if "reference_level" in row), None)
        steps, values = zip(*points, strict=True)
        panels.append((title, steps, values, level))
    if not panels:
        return ""
    about = "Over optimizer steps. A loss at its chance level means that all embeddings coincide."
    return page.section("learning", "Learning curves", about, page.figure(figures.curves(panels[:MAX_PANELS])))


def _accuracy(report: Report) -> str:
    found = report.outcome.results
    splits = [split for split in ("val", "test") if f"{split}.accuracy" in found]
    rows = []
    for key, name in (
        ("accuracy", "accuracy"),
        ("macro_accuracy", "macro accuracy (mean over classes)"),
        ("knn_accuracy", "kNN accuracy"),
        ("mean_max_softmax_id", "mean max-softmax, ID"),
        ("mean_max_softmax_ood", "mean max-softmax, near-OOD"),
        ("ece", "expected calibration error"),
    ):
        cells = [_interval(found, f"{split}.{key}") for split in splits]
        if any(f"{split}.{key}" in found for split in splits):
            rows.append([name, *cells])
    for key in ("alignment", "uniformity", "images", "groups"):
        rows.append([key, *(found.get(f"{split}.{key}") for split in splits)])
    if found["readout"] == "probe":
        readout = f"A linear probe on frozen features, learning rate {found['probe.lr']:g} chosen on val"
    else:
        readout = "The classifier trained with the encoder"
    read = "test was read once" if "test.accuracy" in found else "test was not read (evaluation.test=false)"
    about = f"{readout}; {read}. Shares in percent, {_interval_words(found)}."
    return page.section("accuracy", "Accuracy", about, page.table(["", *splits], rows))


def _ood(report: Report) -> str:
    found, outcome = report.outcome.results, report.outcome
    headline = found["headline.score"]
    split = "test" if outcome.predictions is not None else "val"
    parts = []
    for role, title in ROLE_TITLES.items():
        prefix = f"{split}.{role}"
        names = [name for name in SCORES if f"{prefix}.{name}.auroc" in found]
        if not names:
            continue
        rows = [[name, *(_interval(found, f"{prefix}.{name}.{metric}") for metric in OOD_METRICS)] for name in names]
        size = f"{found[f'{prefix}.images']} images in {found[f'{prefix}.groups']} groups"
        chosen = names.index(headline) if headline in names else None
        parts.append(f"<h3>{escape(title)} ({size})</h3>")
        parts.append(page.table(["score", *OOD_TITLES], rows, chosen))
    if not parts:
        return ""
    if outcome.predictions is not None:
        parts.append(f'<div class="pair">{_ood_figures(report)}</div>')
    about = (
        f"The headline score, {headline}, was fixed before the run. Scores are confidence, higher is more "
        f"in-distribution; percent, {_interval_words(found)}; an AUROC of 50 is chance."
    )
    return page.section("ood", "Out-of-distribution detection", about, *parts)


def _ood_figures(report: Report) -> str:
    found, predictions = report.outcome.results, report.outcome.predictions
    headline = found["headline.score"]
    scores = {role: predictions.scores[headline][predictions.rows(role)] for role in ROLES}
    scores = {role: values_D for role, values_D in scores.items() if len(values_D)}
    rows = []
    for name in predictions.scores:
        points = []
        for role in (role for role in scores if role != "id"):
            key = f"test.{role}.{name}.auroc"
            points.append((found[key], found.get(f"{key}_low"), found.get(f"{key}_high"), figures.ROLE_COLORS[role]))
        rows.append((name, points))
    threshold = report.outcome.detector.thresholds[headline]
    return page.figure(
        figures.intervals_plot(rows, "AUROC, percent (orange near-OOD, violet far-OOD)", 0.5, "auroc by score")
    ) + page.figure(figures.score_histogram(scores, threshold, headline))


def _classes(report: Report) -> str:
    outcome = report.outcome
    rows = []
    for row in sorted(outcome.class_rows, key=lambda row: (row["accuracy"] is None, row["accuracy"])):
        rival = f"{row['confused_with']} ({100 * row['confused_share']:.0f} %)" if row["confused_with"] else ""
        accuracy, precision = page.share(row["accuracy"], meter=True), page.share(row["precision"])
        rows.append(
            [row["class"], row["images"], row["groups"], accuracy, precision, page.Cell(escape(rival), kind="left")]
        )
    columns = ["class", "images", "groups", "accuracy", "precision", "most often taken for"]
    confusion = page.figure(figures.confusion_figure(outcome.confusion_CC, outcome.detector.classes))
    split = "test" if outcome.predictions is not None else "val"
    about = f"On {split}, hardest first. In the matrix, rows are true classes; blue is right, orange is wrong."
    return page.section(
        "classes",
        "Classes",
        about,
        f'<div class="stack">{page.table(columns, rows, kind="dense")}{confusion}</div>',
    )


def _map(report: Report) -> str:
    given = report.embedding
    if given is None or min(given.points, len(given.features_DF)) < 3:
        return ""  # two points make no map
    rows, xy = figures.embedding_points(given.features_DF, given.points, given.seed)
    labels, classes = given.labels_D[rows].tolist(), report.outcome.detector.classes
    svg = figures.embedding_figure(xy, labels, classes)
    about = (
        f"t-SNE of {len(rows)} features (cosine). Dots are in-distribution images colored by class, named where "
        "they are densest; orange crosses are near-OOD images. Distances between far groups mean nothing."
    )
    return page.section("map", "Embedding map", about, page.figure(svg))


def _tokens(report: Report) -> str:
    if not report.inversion_rows:
        return ""
    about = (
        "One learned token a class. The token does something where the held-out denoising loss with it lies below the "
        "loss with its initializer word."
    )
    return page.section("tokens", "Textual inversion", about, page.table_of(report.inversion_rows))


def _time(report: Report) -> str:
    if not report.seconds:
        return ""
    stages = _stages(report.seconds)
    phases = {name: report.seconds[name] for name in STEP_PHASES if name in report.seconds}
    parts = []
    for title, given in (("Stages", stages), ("Phases of the training step", phases)):
        if not given:
            continue
        total = sum(given.values())
        rows = []
        for index, (name, seconds) in enumerate(given.items()):
            swatch = f'<span class="key"><i style="background:{page.band(index, len(given))}"></i>{escape(name)}</span>'
            images = report.images.get(name)
            rate = f"{page.number(images / seconds)} images/s" if images and seconds else ""
            cells = [page.Cell(swatch), page.Cell(f"{seconds:.1f}", True), page.share(seconds / total if total else 0)]
            rows.append([*cells, page.Cell(rate, True)])
        parts.append(f"<div><h3>{title}, {_duration(total)}</h3>{page.shares_bar(given)}")
        parts.append(page.table(["", "seconds", "percent", "throughput"], rows) + "</div>")
    about = "Wall-clock seconds over the whole run, resumed parts included."
    if beside := report.seconds.get(BESIDE):
        made = report.images.get(BESIDE, 0)
        about += (
            f" Generation ran on a side stream for {_duration(beside)} ({page.number(made / beside)} images/s), beside these "
            "phases: generate is the wait for it."
        )
    return page.section("time", "Time", about, f'<div class="pair">{"".join(parts)}</div>')


def _run(report: Report) -> str:
    parts = []
    if report.card:
        entries = "".join(
            f'<dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd><dd class="reason">{escape(reason)}</dd>'
            for name, value, reason in report.card
        )
        parts.append(f'<dl class="card">{entries}</dl>')
    if report.environment:
        text = "\n".join(f"{name}: {value}" for name, value in report.environment.items())
        parts.append(f"<details><summary>Environment</summary><pre>{escape(text)}</pre></details>")
    if report.config_text:
        parts.append(
            f"<details><summary>Configuration, with the origin of every value</summary>"
            f"<pre>{escape(report.config_text)}</pre></details>"
        )
    if not parts:
        return ""
    return page.section("run", "Run card", "Each choice with its reason.", *parts)


def _interval(found: dict, key: str) -> page.Cell:
    return page.share(found.get(key), found.get(f"{key}_low"), found.get(f"{key}_high"))


def _interval_words(found: dict) -> str:
    if not found["bootstrap.resamples"]:
        return "without intervals (evaluation.bootstrap=0)"
    if not any(key.endswith("_low") for key in found):
        return "without intervals (they are of test)"
    groups = min(count for key, count in found.items() if key.startswith("test.") and key.endswith("groups"))
    confidence = 100 * found["bootstrap.confidence"]
    narrow = f", somewhat too narrow for as few as {groups}" if groups < FEW_GROUPS else ""
    return f"small figures are {confidence:g} % intervals from {found['bootstrap.resamples']} resamples of whole groups{narrow}"


def _stages(seconds: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("stage."): value for name, value in seconds.items() if name.startswith("stage.")}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
