"""A kernel stays by the rule only, and what `auto` trusts is what a run on a GPU has shown."""

import csv

import pytest

from benchmarks.harness import CONDITIONS, RESULTS
from benchmarks.kernels import COLUMNS
from benchmarks.verdicts import unbacked, verdicts
from kernels import backend

COMPILED = {"op": "x", "shape": "1", "implementation": "torch.compile", "median_ms": 1.0, "peak_mib": 4.0}
EAGER = COMPILED | {"implementation": "eager", "median_ms": 9.0, "peak_mib": 9.0}
LEFT_OUT = COMPILED | {"implementation": "", "median_ms": "", "peak_mib": ""}


def verdict(ms: float, mib: float | str, peers=(EAGER, COMPILED, LEFT_OUT)) -> str:
    return verdicts([*peers, COMPILED | {"implementation": "triton", "median_ms": ms, "peak_mib": mib}])["x"]


def test_a_kernel_stays_by_the_rule_only():
    assert verdict(0.9, 4.0).startswith("stays: 1.11x torch.compile in time, 1.0x in memory")
    assert verdict(1.0, 2.0).startswith("stays")
    assert verdict(1.0, 4.0).startswith("goes")
    assert verdict(1.3, 1.0).startswith("goes")
    assert verdicts([EAGER, COMPILED]) == {}


def test_without_a_compiled_peer_nothing_is_judged():
    assert verdict(0.1, 1.0, peers=(EAGER,)) == "not judged: no torch.compile row at any of 1 sizes"
    failed = COMPILED | {"median_ms": "", "peak_mib": 70000.0}
    assert verdict(0.1, 1.0, peers=(EAGER, failed)).startswith("not judged")


def test_in_place_buys_no_time():
    """It allocates nothing, so any peer is infinitely many times larger."""
    assert verdict(1.04, 0.0) == "goes: 0.96x torch.compile in time, in place against 4.0 MiB, median of 1 sizes"
    assert verdict(1.0, 0.0).startswith("stays")
    assert verdict(1.0, 0.0, peers=(COMPILED | {"peak_mib": 0.0},)).startswith("goes")
    assert verdict(1.0, "").startswith("goes: 1.00x torch.compile in time, memory unknown")


def test_every_judged_kernel_is_backed_by_its_last_run():
    assert not unbacked(backend.JUDGED, RESULTS), "backend.JUDGED names kernels that no row of a GPU lets stay"


@pytest.fixture
def folder(tmp_path):
    def write(date: str, op: str, ms: float, device: str = "a GPU") -> None:
        path = tmp_path / "kernels_gpu.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, (*CONDITIONS, *COLUMNS))
            if new:
                writer.writeheader()
            for row in (COMPILED, COMPILED | {"implementation": "triton", "median_ms": ms}):
                writer.writerow(row | {"date": date, "commit": "c", "device": device, "op": op})

    write("2026-01-01 10:00", "supcon", 0.5)
    write("2026-01-02 10:00", "group_norm", 1.5)
    write("2026-01-01 10:00", "pixels", 0.5)
    write("2026-01-03 10:00", "pixels", 2.0)
    return tmp_path


def test_what_no_row_backs_is_found(folder, tmp_path):
    judged = dict.fromkeys(("supcon", "group_norm", "pixels", "views"), "a reason")
    assert unbacked(judged, folder) == ["group_norm", "pixels", "views"]
    assert unbacked({}, folder) == [] and unbacked(judged, tmp_path / "nothing") == list(judged)
