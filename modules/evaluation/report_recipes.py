"""The part of a report on what was generated, by recipe: examples, suitability, verdicts, the decoder's trace.

Rows are passed as plain dictionaries; a part without rows has no section.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from modules.evaluation import page
from modules.evaluation.artifact import artifact_doubt

ALL = "all"  # the class of a row over all classes, as in suitability rows
FIGURES = {  # key of a suitability row -> column title
    "agreement": "label agreement",
    "agreement_share": "of that of their sources",
    "diversity_share": "diversity, of the real one",
    "distance_share": "distance to source, of the real spread",
}


@dataclass(frozen=True)
class Shot:
    """One image of a contact sheet."""

    pixels_HWC: Tensor  # uint8
    caption: str = ""  # a word or two shown under it: recipe, strength
    provenance: str = ""  # shown on hover


@dataclass(frozen=True)
class RecipeSheet:
    """Example images of one recipe, each beside the image it was made from."""

    recipe: str
    is_ood: bool
    sources: tuple[Shot, ...] = ()
    generated: tuple[Shot, ...] = ()


def shot_markup(shot: Shot) -> str:
    """An image with its caption."""
    caption = f"<figcaption>{escape(shot.caption)}</figcaption>" if shot.caption else ""
    return f"<figure>{page.image(shot.pixels_HWC, shot.provenance or shot.caption)}{caption}</figure>"


def recipes_section(sheets: Sequence[RecipeSheet], rows: Sequence[dict]) -> str:
    """One row of example images per recipe, with its suitability over all classes; rows by class, folded, below."""
    if not sheets and not rows:
        return ""
    whole = {row["recipe"]: row for row in rows if row.get("class") == ALL}
    parts = []
    if sheets:
        lines = []
        for sheet in sheets:
            found = whole.get(sheet.recipe, {})
            kind = "near" if sheet.is_ood else "positive"
            lines.append(
                [
                    page.Cell(escape(sheet.recipe), kind="class"),
                    page.Cell(f'<div class="shots source">{"".join(map(shot_markup, sheet.sources))}</div>'),
                    page.Cell(
                        f'<div class="shots {kind}">{"".join(map(shot_markup, sheet.generated))}</div>'
                        if sheet.generated
                        else "no image of it was held at the end"
                    ),
                    page.plain(found.get("images")),
                    *(page.share(found.get(figure)) for figure in FIGURES),
                ]
            )
        titles = ["recipe", "made from", "generated", "images", *(f"{title}, %" for title in FIGURES.values())]
        parts.append(page.table(titles, lines, kind="sheet"))
    by_class = [row for row in rows if row.get("class") != ALL] if sheets else list(rows)
    if by_class:
        table = page.table_of(by_class)
        parts.append(f"<details><summary>By class</summary>{table}</details>" if sheets else table)
    about = (
        "Suitability of the images held at the end of the run, judged by a classifier fixed before training: a positive "
        "should keep its label without copying its source, a near-OOD image should keep neither. A distance of 0 is a "
        "copy, of 100 as far as another real image of the class."
    )
    return page.section("recipes", "Recipes", about, *parts)


def gate_section(rows: Sequence[dict], enabled: bool) -> str:
    """Counts of verdicts by recipe and, below, by class; `rows` have recipe, class, images and a count per reason."""
    if not rows:
        return ""
    rejects = "Rejected images were drawn again and then given up"
    about = (
        f"What became of every finished image. {rejects}, whatever the reason."
        if enabled
        else f"What became of every finished image. {rejects} where they were broken; the learner's own verdicts, if there "
        "are any, were counted only (gate.enabled=false)."
    )
    whole = page.table_of([row for row in rows if row["class"] == ALL])
    by_class = page.table_of([row for row in rows if row["class"] != ALL])
    return page.section(
        "gate", "Gate", about, whole, f"<details><summary>By recipe and class</summary>{by_class}</details>"
    )


def artifact_section(found: dict) -> str:
    """The artifact light: how well frozen features tell real images from the same images after encode and decode."""
    if "artifact.probe_auroc" not in found:
        return ""
    rows = [
        ["a linear probe on the features, AUROC", page.share(found["artifact.probe_auroc"])],
        [f"the headline score ({found['headline.score']}), AUROC", page.share(found["artifact.score_auroc"])],
        ["val images", page.plain(found["artifact.images"])],
        ["their groups", page.plain(found["artifact.groups"])],
    ]
    about = (
        "Generated rows carry the decoder's traces. If these features tell a real val image from the same image after "
        "encode and decode, 'decoded' may have been learned as 'OOD'; if the OOD score does as well, it has been. Percent; "
        "50 is blind, and good."
    )
    if doubt := artifact_doubt(found):
        about += f" Here {doubt}."
    return page.section("artifact", "Decoder's trace", about, page.table(["told apart by", ""], rows))
