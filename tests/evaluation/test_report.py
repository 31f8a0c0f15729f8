"""The report: one self-contained page, escaped, complete, and without the sections nobody handed in."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from modules import config
from modules.errors import StorageError
from modules.evaluation import figures, page
from modules.evaluation.evaluate import evaluate
from modules.evaluation.report import EmbeddingMap, Report, SheetRow, render_report, write_report
from modules.evaluation.report_recipes import RecipeSheet, Shot
from tests.evaluation.examples import sets

VOID = {"meta", "img", "br", "link", "input", "path", "use", "rect", "circle", "line"}


class Balance(HTMLParser):
    """Collects what a page refers to and complains of tags that do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(html):
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def report():
    given = sets()
    outcome = evaluate(
        **given,
        classes=("bolt", "gear", "nut & <b>cap</b>", "washer"),
        probe=config.Probe(lrs=(0.1,), epochs=5),
        evaluation=config.Evaluation(bootstrap=20),
        seed=0,
    )
    shot = Shot(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8), "strength .4", "image_index 17, source a.jpg")
    return Report(
        title="demo <run>",
        outcome=outcome,
        lead="four classes",
        notes=("rendered, not photographed",),
        card=(("device", "cpu", "no GPU found"),),
        sheet=(SheetRow("bolt", (shot,), (shot, shot), (shot,)),),
        metric_rows=[{"step": step, "loss": 5 - step / 10, "reference_level": 5.1} for step in range(0, 40, 10)],
        embedding=EmbeddingMap(
            torch.cat([given["test"].features_DF, given["near_ood_test"].features_DF]),
            torch.cat([given["test"].labels_D, given["near_ood_test"].labels_D]),
            points=50,
        ),
        inversion_rows=[{"class": "bolt", "norm": 0.4, "loss_with_token": 0.11, "loss_with_initializer": 0.13}],
        recipe_sheets=[
            RecipeSheet("positive", False, (shot,), (shot,)),
            RecipeSheet("token_mix", True, (shot, shot), (shot, shot)),
            RecipeSheet("jigsaw", True),
        ],
        recipe_rows=[
            {"recipe": "token_mix", "class": "gear", "images": 12, "agreement": 0.25, "distance_share": None},
            {"recipe": "token_mix", "class": "all", "images": 12, "agreement": 0.257, "distance_share": 0.811},
        ],
        gate_rows=[
            {"recipe": "token_mix", "class": "all", "images": 4321, "accepted": 4300, "too_close": 21},
            {"recipe": "token_mix", "class": "gear", "images": 4321, "accepted": 4300, "too_close": 21},
        ],
        gate_enabled=True,
        seconds={"stage.contrastive": 130.0, "stage.evaluate": 10.0, "generate": 60.0, "encode": 30.0},
        images={"generate": 600},
        config_text="run:\n  seed: 0  # command line\n",
        environment={"python": "3.11"},
    )


@pytest.fixture(scope="module")
def html(report):
    return render_report(report)


def test_refers_to_nothing_outside_itself(html):
    parsed = parse(html)
    assert parsed.sources and all(source.startswith(("data:image/png;base64,", "#")) for source in parsed.sources)
    assert "<script" not in html and "@import" not in html and not re.search(r"url\((?!#)", html)
    targets = {source[1:] for source in parsed.sources if source.startswith("#")}
    assert targets <= set(parsed.ids)


def test_shows_every_part_and_escapes_what_users_named(report, html):
    text = " ".join(parse(html).text)
    for expected in ("demo <run>", "rendered, not photographed", "nut & <b>cap</b>", "no GPU found", "strength .4"):
        assert expected in text
    for expected in ("relative_mahalanobis", "OOD accepted at 95 % ID", "token_mix", "10.0 images/s", "2 min 20 s"):
        assert expected in text
    for expected in ("25.7", "81.1", "no image of it was held at the end", "too close", "4 321", "drawn again"):
        assert expected in text
    found = report.outcome.results
    assert f"{100 * found['test.near_ood.knn.auroc']:.1f}" in text
    assert f"{100 * found['test.accuracy_low']:.1f}–{100 * found['test.accuracy_high']:.1f}" in text
    assert html.count("<img ") == 4 + 6


def test_sections_nobody_handed_in_are_left_out(report):
    bare = render_report(Report("bare", report.outcome))
    parsed = parse(bare)
    assert {"accuracy", "ood", "classes"} <= set(parsed.ids)
    assert not {"generated", "learning", "map", "tokens", "recipes", "gate", "artifact", "time", "run"} & set(
        parsed.ids
    )


def test_a_run_judged_on_val_alone_has_a_page(report):
    found = {key: value for key, value in report.outcome.results.items() if not key.startswith("test.")}
    outcome = dataclasses.replace(report.outcome, results=found, predictions=None)
    text = " ".join(parse(render_report(Report("sweep", outcome))).text)
    assert "val accuracy" in text and "test accuracy" not in text


def test_is_the_same_page_for_the_same_report(report, html):
    assert render_report(report) == html


def test_written_whole_or_refused(report, tmp_path):
    write_report(tmp_path / "report.html", Report("bare", report.outcome))
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    with pytest.raises(StorageError, match="report.html: could not be written"):
        write_report(tmp_path / "taken" / "report.html", Report("bare", report.outcome))
    assert [child.name for child in (tmp_path / "taken").iterdir()] == ["report.html"]


def test_figures_wear_the_colors_of_the_page():
    svg = figures.curves([("loss", [0, 1, 2], [3.0, 2.0, 1.0], 2.5)])
    assert svg.startswith("<svg") and "var(--id)" in svg and "var(--muted)" in svg
    assert not [stand_in for stand_in in figures.STAND_INS if stand_in in svg]
    assert "#ffffff" not in svg and "<metadata" not in svg


def test_two_figures_share_no_id():
    first, second = (figures.curves([("a", [0, 1], [0, 1], None)], name) for name in ("one", "two"))
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])


def test_the_map_takes_at_most_its_points_and_is_repeatable():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rows, xy = figures.embedding_points(features, 30, seed=1)
    again, same = figures.embedding_points(features, 30, seed=1)
    assert len(rows) == 30 == len(xy) and torch.equal(rows, again) and np.array_equal(xy, same)
    assert len(figures.embedding_points(features[:3], 30, seed=1)[1]) == 3
    assert figures.embedding_points(torch.ones(40, 8), 30, seed=1)[1].shape == (30, 2)  # an encoder that has collapsed


def test_an_image_keeps_its_pixels_and_is_shrunk_where_large():
    pixels = torch.randint(0, 256, (64, 48, 3), dtype=torch.uint8)
    data = re.search(r"base64,([^\"]+)", page.image(pixels, 'a "quoted" title')).group(1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels.numpy())
    assert "a &quot;quoted&quot; title" in page.image(pixels, 'a "quoted" title')
    data = re.search(r"base64,([^\"]+)", page.image(torch.zeros(512, 256, 3, dtype=torch.uint8))).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (84, 168)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (12345, "12 345"), (0.5, "0.500"), (3.14159, "3.14"), (42.0, "42.0"), (123.4, "123"),
     (2.5e-5, "2.50e-05"), (1234.0, "1 234"), (float("nan"), "–"), (None, "–"), (True, "yes"), ("<a>", "&lt;a&gt;")],
)  # fmt: skip
def test_values_are_written_as_one_reads_them(value, text):
    assert page.plain(value).markup == text


@pytest.mark.parametrize(("classes", "images"), [(1, 3), (2, 40), (60, 1)])
def test_confusion_of_any_size(classes, images):
    svg = figures.confusion_figure(np.eye(classes, dtype=int) * images, [f"class {index}" for index in range(classes)])
    assert svg.count("var(--id)") == classes and "class 0" in svg


@pytest.mark.parametrize(("points", "shown"), [(0, False), (2, False), (3, True)])
def test_a_map_needs_three_points(report, points, shown):
    html = render_report(dataclasses.replace(report, embedding=dataclasses.replace(report.embedding, points=points)))
    assert ('id="map"' in html) is shown and ('href="#map"' in html) is shown


@pytest.mark.parametrize("name", ["cost_$5_$x", "a$x$b", r"\frac{1}", "$"])
def test_a_class_is_named_as_it_is_whatever_typesetters_read_in_it(name):
    both = figures.confusion_figure(np.eye(2, dtype=int), [name, "bolt"])
    both += figures.embedding_figure(np.zeros((4, 2)) + np.arange(4)[:, None], [0, 0, 1, 1], [name, "bolt"])
    assert both.count(f">{name}</text>") == 3, "both axes and the map"
