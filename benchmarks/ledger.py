"""Rows of benchmarks/results: appended, never edited."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path


def append_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Append rows to a CSV file, made with their keys as its header if it is new; no value in it is ever changed.

    Rows that tell more than the file did (a condition that is written down since) add their columns to it, empty in what
    stood there. Raises ValueError if rows lack one of its columns: then the file keeps its meaning and the rows want
    another one.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    before = columns
    if path.exists():
        with path.open(newline="") as file:
            before = next(csv.reader(file))
    for row in rows:
        if list(row) != columns or [name for name in columns if name in before] != before:
            raise ValueError(f"{path} has columns {before}, a row has {list(row)}; write to another file")
    if before != columns:
        _add_columns(path, columns)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def append_once(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """As `append_rows`, without those rows that the file holds already but for their date: a finished run has one row."""
    held = set()
    if path.exists():
        with path.open(newline="") as file:
            held = {_undated(row) for row in csv.DictReader(file)}
    append_rows(path, [row for row in rows if _undated(row) not in held])


def _undated(row: dict[str, object]) -> frozenset[tuple[str, str]]:
    return frozenset((name, str(value)) for name, value in row.items() if name != "date" and str(value))


def _add_columns(path: Path, columns: list[str]) -> None:
    """Give a CSV file these columns in place of some of them; what it does not know stays empty."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = path.with_suffix(".tmp")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    written.replace(path)


def write_partial(out: Path, document: dict[str, object]) -> None:
    """What is known so far, in <out>.partial.json: left behind only by a benchmark that was stopped."""
    path = _partial(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(document, default=str) + "\n")
    path.with_suffix(".tmp").replace(path)


def drop_partial(out: Path) -> None:
    """Forget the partial results of a benchmark whose rows are written."""
    _partial(out).unlink(missing_ok=True)


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial.json")
