"""Rows of benchmarks/results: appended, never edited."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path


def append_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Append rows to a CSV file; a new file gets their keys as its header. Existing values are never changed.

    Columns that only the new rows have (such as a condition recorded since) are added to the file, empty in its old
    rows. Raises ValueError if rows lack one of the file's columns; such rows belong in another file.
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
    """As `append_rows`, without rows that the file already has up to their date: rows of a finished run occur once."""
    held = set()
    if path.exists():
        with path.open(newline="") as file:
            held = {_undated(row) for row in csv.DictReader(file)}
    append_rows(path, [row for row in rows if _undated(row) not in held])


def _undated(row: dict[str, object]) -> frozenset[tuple[str, str]]:
    return frozenset((name, str(value)) for name, value in row.items() if name != "date" and str(value))


def _add_columns(path: Path, columns: list[str]) -> None:
    """Rewrite a CSV file with `columns`, which include all of its own; new ones are empty in its rows."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = path.with_suffix(".tmp")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    written.replace(path)


def write_partial(out: Path, document: dict[str, object]) -> None:
    """Write the results so far to <out>.partial.json, which only a benchmark that was stopped leaves behind."""
    path = _partial(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(document, default=str) + "\n")
    path.with_suffix(".tmp").replace(path)


def drop_partial(out: Path) -> None:
    """Delete the partial results of a benchmark whose rows are written."""
    _partial(out).unlink(missing_ok=True)


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial.json")
