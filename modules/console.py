"""All output to the terminal or a log.

On a terminal: a run card, a progress bar per stage, and a live table of phases while training. Otherwise (a log file, a
batch system): the same information as plain lines, one per interval, nothing redrawn.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from modules.phases import BESIDE, STEP_PHASES

LINE_SHARE = 0.25  # off a terminal a stage prints its progress after each quarter of its work
ACCURACY = "val.knn_accuracy"
FILE_WIDTH = 160  # columns of a table off a terminal
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the terminal is gone; the disk of the log is full
OF_VIEWS = ("augment", "encode", "loss", "backward")  # phases that process every view of a batch


class _Outliving(RichConsole):
    """A console that drops its output, instead of failing, if the reader is gone (`| head`, a closed terminal) or the
    disk of the log is full."""

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except OSError as error:
            if error.errno not in LOST:  # rich itself handles only a broken pipe
                raise
            self._buffer.clear()
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.file = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if sys.stdout is not None:  # so that the interpreter's flush at exit does not fail
            os.dup2(self.file.fileno(), sys.stdout.fileno())


class Console:
    """Prints the progress and results of a run; holds the live display of the current stage."""

    def __init__(self, stream: TextIO | None = None):
        if stream is None and hasattr(sys.stdout, "reconfigure"):  # for class names that an ASCII terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        self.rich = _Outliving(file=stream, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal
        if not self.live:  # tables in a file need not fit a narrow terminal
            self.rich.width = FILE_WIDTH
        self._display: Live | None = None
        self._progress: Progress | None = None
        self._task = None
        self._last_share = 0.0
        self._table = None
        self._row: dict = {}  # the newest metric row of the stage

    def line(self, text: str, style: str = "") -> None:
        """Print one plain line."""
        self.rich.print(Text(text, style=style))

    def warn(self, text: str) -> None:
        """Print a warning: something the user should know of, but not fatal."""
        self.line(f"warning: {text}", "yellow")

    def card(self, title: str, rows: list[tuple[str, str, str]]) -> None:
        """Print a run card of (what, value, reason) rows."""
        if not self.live:
            self.line(title)
            for what, value, reason in rows:
                self.line(f"  {what}: {value}" + (f"  ({reason})" if reason else ""))
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column()
        grid.add_column(style="dim")
        for row in rows:
            grid.add_row(*row)
        self.rich.print(Panel(grid, title=title, title_align="left", box=box.ROUNDED, expand=False))

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Context that displays a stage of the run; yields progress(done, total, note="")."""
        self._last_share = 0.0
        if not self.live:
            self.line(f"[{name}]")
            yield self._plain_progress(name)
            return
        self._progress = Progress(
            TextColumn(f"{name:<12}", style="bold", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.rich,
        )
        self._task = self._progress.add_task(name, total=None, note="")
        self._table, self._row = None, {}
        with Live(self._renderable(), console=self.rich, refresh_per_second=4) as self._display:
            yield self._live_progress
            self._display.update(self._renderable(), refresh=True)
        self._display = None

    def step_row(self, row: dict, total: int) -> None:
        """Show a metric row of the contrastive stage: as live table of phases, or as one plain line."""
        if self.live and self._display is not None:
            self._row |= row  # keep showing values that only some rows have
            self._table = _phase_table(self._row)
            self._display.update(self._renderable())
            return
        parts = [f"step {row['step']}/{total}", f"loss {row['loss']:.3f} (reference {row['reference_level']:.3f})"]
        if "images_per_s" in row:
            parts.append(f"{row['images_per_s']:.1f} generated images/s")
        if ACCURACY in row:
            parts.append(f"val kNN {100 * row[ACCURACY]:.1f} %")
        parts.append(f"{row['step_ms']:.0f} ms/step")
        shares = [
            f"{name} {100 * row[f'{name}_ms'] / row['step_ms']:.0f}%" for name in STEP_PHASES if f"{name}_ms" in row
        ]
        if f"{BESIDE}_ms" in row:
            shares.append(f"(generation beside {100 * row[f'{BESIDE}_ms'] / row['step_ms']:.0f}%)")
        self.line("  " + " | ".join(parts + [" ".join(shares)]))

    def result(self, title: str, rows: list[tuple[str, str]], footer: str = "") -> None:
        """Print the closing table of a verb."""
        style = box.SIMPLE_HEAD if self.live else None
        table = Table(title=Text(title, style="table.title"), title_justify="left", box=style, show_header=False)
        for row in rows:
            table.add_row(*map(Text, row))
        self.rich.print(table)
        if footer:
            self.line(footer)

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """Print a table with a header; columns of numbers, except the first, are right-aligned, others left-aligned."""
        table = Table(title=Text(title, style="table.title"), title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(header):
            justify = "right" if i and _numeric([row[i] for row in rows]) else "left"
            table.add_column(Text(name), justify=justify, overflow="fold")  # a setting's name is never cut short
        for row in rows:
            table.add_row(*map(Text, row))
        self.rich.print(table)

    def _plain_progress(self, name: str) -> Callable[..., None]:
        def progress(done: int, total: int, note: str = "") -> None:
            share = done / max(1, total)
            if share < self._last_share:  # the next part of the same stage
                self._last_share = 0.0
            if share - self._last_share >= LINE_SHARE or done == total:
                self._last_share = share
                self.line(f"  {name} {done}/{total} {note}".rstrip())

        return progress

    def _live_progress(self, done: int, total: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=note)

    def _renderable(self):
        return Group(self._progress, self._table) if self._table is not None else self._progress


def duration(seconds: float) -> str:
    """A time as text in a readable unit: 28 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _numeric(cells: list[str]) -> bool:
    """Whether most non-empty cells of a column look like numbers, judged by their first character."""
    filled = [cell for cell in cells if cell]
    return 2 * sum(cell[0] in "-+.0123456789" or cell in ("nan", "inf") for cell in filled) > len(filled)


def _phase_table(row: dict) -> Table:
    """Ms, share and images per second of each phase: generated images where it generates, views where it sees views."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=_headline(row))
    table.add_column("phase")
    for name in ("ms", "share", "images/s"):
        table.add_column(name, justify="right")
    generates = BESIDE if f"{BESIDE}_ms" in row else "generate"
    for name in (*STEP_PHASES, BESIDE):
        if f"{name}_ms" in row:
            ms = row[f"{name}_ms"]
            through = "images_per_s" if name == generates else "views_per_s" if name in OF_VIEWS else ""
            rate = f"{row[through] * row['step_ms'] / ms:.0f}" if through in row and ms > 0 else ""
            table.add_row(name.replace("_", ", "), f"{ms:.1f}", f"{100 * ms / row['step_ms']:.0f} %", rate)
    table.add_row("step", f"{row['step_ms']:.1f}", "100 %", f"{row['views_per_s']:.0f}", style="bold")
    return table


def _headline(row: dict) -> str:
    text = f"loss {row['loss']:.3f} (reference {row['reference_level']:.3f})"
    if "images_per_s" in row:
        text += (
            f" · {row['images_per_s']:.1f} generated images/s · reuse {row['reuse']:.2f} · age {row['age_mean']:.0f}"
        )
    if ACCURACY in row:
        text += f" · val kNN {100 * row[ACCURACY]:.1f} %"
    return text
