"""What is printed: plain lines off a terminal, a live display on one, the same facts in both."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modules.console import Console
from modules.phases import STEP_PHASES

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "step": 10,
    "loss": 1.25,
    "reference_level": 2.5,
    "step_ms": 200.0,
    "images_per_s": 3.5,
    "views_per_s": 800.0,
    "reuse": 1.5,
}
ROW |= {"age_mean": 7.0} | {f"{name}_ms": 20.0 for name in STEP_PHASES}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def plain():
    return Console(io.StringIO())


@pytest.fixture
def live(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    return Console(Terminal())


def text(console) -> str:
    return console.rich.file.getvalue()


def test_off_a_terminal_a_stage_prints_at_each_quarter(plain):
    with plain.stage("data") as progress:
        for done in range(1, 101):
            progress(done, 100, "images")
    assert text(plain).splitlines() == ["[data]", *(f"  data {n}/100 images" for n in (25, 50, 75, 100))]
    assert "\x1b" not in text(plain), "nothing is redrawn or colored"


def test_every_stage_starts_its_quarters_anew(plain):
    for _ in range(2):
        with plain.stage("data") as progress:
            progress(3, 4)
    assert text(plain).splitlines() == ["[data]", "  data 3/4"] * 2


def test_every_part_of_a_stage_starts_its_quarters_anew(plain):
    """Stage tokens: moments of every image, then the class tokens, which take minutes."""
    with plain.stage("tokens") as progress:
        progress(1, 1, "moments")
        for done in (25, 50, 75, 100):
            progress(done, 100, "class tokens")
    assert len(text(plain).splitlines()) == 2 + 4


def test_the_newest_accuracy_stays_in_sight(plain, live):
    measured = ROW | {"val.knn_accuracy": 0.4567}
    plain.step_row(measured, 40)
    assert "val kNN 45.7 %" in text(plain)
    with live.stage("contrastive"):
        live.step_row(measured, 40)
        live.step_row(ROW | {"loss": 1.125}, 40)
    shown = text(live)
    assert "val kNN 45.7 %" in shown[shown.rindex("loss 1.125") :]


def test_a_metric_row_is_one_line(plain):
    plain.step_row(ROW, 40)
    (line,) = text(plain).splitlines()
    for fact in ("step 10/40", "loss 1.250 (reference 2.500)", "3.5 generated images/s", "200 ms/step"):
        assert fact in line
    assert all(f"{name} 10%" in line for name in STEP_PHASES)


def test_a_row_without_generation_speaks_of_none(plain):
    row = {name: value for name, value in ROW.items() if name not in ("images_per_s", "generate_ms")}
    plain.step_row(row, 40)
    assert "generate" not in text(plain)


def test_generation_on_a_side_stream_has_a_row_of_its_own_and_its_rate(plain, live):
    """Then the phase generate is the wait for it, and images a second of a wait would mean nothing."""
    plain.step_row(ROW | {"generate_beside_ms": 150.0}, 40)
    assert "generate 10%" in text(plain) and "(generation beside 75%)" in text(plain)
    with live.stage("contrastive"):
        live.step_row(ROW | {"generate_beside_ms": 150.0}, 40)
    rows = {line.split()[0]: line.split() for line in text(live).splitlines() if "generate" in line}
    assert rows["generate,"][-1] == "5" and "%" in rows["generate"][-1], "3.5 images/s x 200 ms / 150 ms"


def test_brackets_are_no_markup(plain):
    """A path or class name may look like one of rich's style tags."""
    plain.line("[bold]parts[/bold]")
    plain.warn("class '[red]' is small")
    assert text(plain).splitlines() == ["[bold]parts[/bold]", "warning: class '[red]' is small"]
    plain.table("in[/b]ox", ["[b]", "images"], [["bolt[red]", "3"], ["bolt[blue]", "4"]])
    plain.result("run[/b]", [("class [red]", "[/x]")])
    for name in ("in[/b]ox", "[b]", "bolt[red]", "bolt[blue]", "run[/b]", "class [red]", "[/x]"):
        assert name in text(plain)


def test_a_reader_that_leaves_costs_what_is_printed_and_not_the_work():
    """As `trainer.py run ... | head` does."""
    code = (
        "import sys; from modules.console import Console; console = Console()\n"
        "for _ in range(20000): console.line('x' * 80)\n"
        "print('the work is done', file=sys.stderr)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    writer.stdout.readline()
    writer.stdout.close()
    told = writer.stderr.read().decode()
    assert writer.wait() == 0 and told == "the work is done\n"


def test_a_log_on_a_full_disk_costs_what_is_printed_and_not_the_work():
    code = (
        "import sys; from modules.console import Console; console = Console()\n"
        "console.warn('the checkpoint could not be written'); console.table('t', ['a'], [['1']])\n"
        "print('the work is done', file=sys.stderr)"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        work = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert work.returncode == 0 and work.stderr == "the work is done\n"


def test_a_log_that_is_not_utf8_costs_letters_and_not_the_work():
    code = "from modules.console import Console; Console().line('class gro\\xdf \\u7a7a \\udce9')"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    work = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, text=True)
    assert (work.stdout, work.stderr) == ("class gro\\xdf \\u7a7a \\udce9\n", "")


def test_a_terminal_that_is_gone_costs_what_is_printed_and_not_the_work():
    """It answers every write with an input/output error, that of a live display at its end too."""
    code = (
        "import os, sys; from modules.console import Console; console = Console()\n"
        "assert console.live\n"
        "with console.stage('contrastive') as progress:\n"
        "    progress(1, 4, 'note'); os.kill(os.getpid(), 19); progress(2, 4, 'note')\n"
        "console.line('after'); print('the work is done', file=sys.stderr)"
    )
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    command = [sys.executable, "-c", code]
    work = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, cwd=ROOT, env=environment, start_new_session=True
    )
    os.close(slave)
    os.waitpid(work.pid, os.WUNTRACED)  # it has stopped itself in the middle
    os.close(master)
    os.kill(work.pid, signal.SIGCONT)
    told = work.stderr.read().decode()
    assert work.wait() == 0 and told.endswith("the work is done\n"), told


def test_the_card_gives_each_choice_with_its_reason(plain, live):
    for console in (plain, live):
        console.card("run x", [("device", "cpu", "no CUDA GPU found"), ("method", "supcon", "")])
        for word in ("run x", "device", "cpu", "no CUDA GPU found", "supcon"):
            assert word in text(console)
    assert "  method: supcon\n" in text(plain), "no empty brackets where there is no reason"


def test_on_a_terminal_progress_and_phases_are_redrawn(live):
    with live.stage("contrastive") as progress:
        progress(5, 40, "warming up")
        live.step_row(ROW, 40)
    shown = text(live)
    assert "\x1b[" in shown and "contrastive" in shown and "reference 2.500" in shown
    assert all(name in shown for name in STEP_PHASES)
    with live.stage("probe") as progress:
        progress(1, 1)
    assert "loss" not in text(live)[len(shown) :], "the table belongs to its stage"


def test_the_live_table_says_how_many_images_a_second_each_phase_handles(live):
    """3.5 generated and 800 views a second of step time, of which a phase is a tenth: ten times as many of its own."""
    with live.stage("contrastive"):
        live.step_row(ROW, 40)
    cells = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text(live).splitlines()]
    assert ["phase", "ms", "share", "images/s"] in cells
    assert ["generate", "20.0", "10", "%", "35"] in cells and ["step", "200.0", "100", "%", "800"] in cells
    assert ["encode", "20.0", "10", "%", "8000"] in cells and ["mix", "20.0", "10", "%"] in cells


def test_the_closing_table_and_its_footer(plain):
    plain.result("runs/x", [("test accuracy", "50.0 %")], "report: runs/x/report.html")
    plain.table("kernels", ["op", "ms"], [["views", "1.5"]])
    for word in ("runs/x", "test accuracy", "50.0 %", "report: runs/x/report.html", "kernels", "op", "views", "1.5"):
        assert word in text(plain)


def test_a_narrow_table_folds_a_setting_and_cuts_no_letter(live):
    live.rich.width = 40
    live.table(
        "plan", ["part", "size", "smaller by"], [["encoder training step", "31.1 MiB", "learning.classes_per_batch"]]
    )
    text = live.rich.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    column = "".join(line[-14:].strip() for line in text.splitlines())
    assert "learning.classes_per_batch" in column
