"""The building blocks of a self-contained HTML page: tables, tiles, images and figures; all text is escaped.

A report may be read months later, on another computer or from an e-mail, so the file refers to no script, font or image
outside itself. Figures are inline SVG in the page's CSS variables, so that they follow its light or dark mode.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image
from torch import Tensor

TEMPLATE = Path(__file__).with_name("page.html")
THUMBNAIL = 168  # pixels: twice the width at which a sheet shows an image, for dense screens


@dataclass(frozen=True)
class Cell:
    """A table cell: markup that is already escaped, and how it is formatted."""

    markup: str
    number: bool = False
    kind: str = ""  # further CSS class


def page(title: str, head: Iterable[str], sections: Iterable[tuple[str, str, str]]) -> str:
    """A whole HTML document: `head`, links to the sections, and the sections themselves.

    Args:
        sections: (anchor, short title, markup) of each; sections with empty markup are left out.
    """
    shown = [entry for entry in sections if entry[2]]
    links = "".join(f'<a href="#{anchor}">{escape(short)}</a>' for anchor, short, _ in shown)
    body = [*head, f"<nav>{links}</nav>", *(markup for _, _, markup in shown)]
    return Template(TEMPLATE.read_text()).substitute(title=escape(title), body="\n".join(body))


def section(anchor: str, title: str, about: str, *parts: str) -> str:
    """A titled card; `about` is one plain sentence on how to read it."""
    lead = f'<p class="about">{escape(about)}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{"".join(parts)}</section>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Tiles with large numbers, from (name, value, text under it)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
            f'<div class="under">{escape(under)}</div></div>'
            for name, value, under in entries
        )
        + "</div>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], chosen: int | None = None, kind: str = "") -> str:
    """A table that scrolls sideways if it is too wide; row `chosen` is highlighted.

    The header of a column is aligned as for numbers if its first cell is one. Entries are Cells or plain values.
    """
    cells = [[entry if isinstance(entry, Cell) else plain(entry) for entry in row] for row in rows]
    numeric = [bool(cells) and cells[0][index].number for index in range(len(columns))]
    head = "".join(
        f"<th{' class=number' if number else ''}>{escape(name)}</th>"
        for name, number in zip(columns, numeric, strict=True)
    )
    lines = []
    for index, row in enumerate(cells):
        mark = ' class="chosen"' if index == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(_td(cell) for cell in row) + "</tr>")
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def table_of(rows: Sequence[dict]) -> str:
    """A table of dictionaries: columns are their keys, in order of first occurrence, with spaces for underscores."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table([column.replace("_", " ") for column in columns], [[row.get(key) for key in columns] for row in rows])


def plain(value: object) -> Cell:
    """A cell for any value: numbers to three significant digits, None as a dash, text escaped."""
    if value is None:
        return Cell("–", number=True)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        return Cell(number(value), number=True)
    return Cell(escape(str(value)))


def number(value: float) -> str:
    """A number formatted for reading: integers with spaces between thousands, others to three significant digits."""
    if isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}".replace(",", " ")
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float) -> str:
    """A share in [0, 1] as percent with one decimal."""
    return f"{100 * value:.1f} %"


def share(value: float | None, low: float | None = None, high: float | None = None, meter: bool = False) -> Cell:
    """A cell with a share in [0, 1] as percent, its interval beside it and, with `meter`, a small bar."""
    if value is None:
        return Cell("–", number=True)
    markup = f"{100 * value:.1f}"
    if low is not None and high is not None:
        markup += f'<span class="range">{100 * low:.1f}–{100 * high:.1f}</span>'
    if meter:
        markup += f'<span class="meter"><i style="width:{100 * value:.1f}%"></i></span>'
    return Cell(markup, number=True)


def image(pixels_HWC: Tensor, title: str = "") -> str:
    """An <img> with uint8 pixels embedded as PNG, shrunk to THUMBNAIL if larger; `title` is shown on hover."""
    picture = Image.fromarray(pixels_HWC.cpu().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(title)}" title="{escape(title)}" loading="lazy">'


def figure(svg: str) -> str:
    """An inline SVG as a figure that fills its column."""
    return f'<div class="figure">{svg}</div>'


def shares_bar(seconds: dict[str, float]) -> str:
    """One bar divided by share of the time; hovering over a part shows its share."""
    total = sum(seconds.values())
    parts = []
    for index, (name, value) in enumerate(seconds.items()):
        fraction = value / total if total else 0.0
        parts.append(
            f'<i style="flex:{fraction:.5f};background:{band(index, len(seconds))}" '
            f'title="{escape(name)}: {value:.1f} s, {percent(fraction)}"></i>'
        )
    return f'<div class="bar">{"".join(parts)}</div>'


def band(index: int, count: int) -> str:
    """Color `index` of `count` around the hue circle, of medium lightness: readable on light and dark backgrounds."""
    return f"hsl({(215 + 360 * index / max(1, count)) % 360:.0f} 44% {52 if index % 2 == 0 else 63}%)"


def _td(cell: Cell) -> str:
    names = " ".join(name for name in ("number" if cell.number else "", cell.kind) if name)
    return f'<td class="{names}">{cell.markup}</td>' if names else f"<td>{cell.markup}</td>"
