"""What benchmarks/kernels.py times and judges, and that nothing which fails in it takes other results along."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, kernels
from benchmarks.kernel_case import Case
from benchmarks.kernel_cases import SWEEPS, Sweep
from benchmarks.kernel_views import MEAN, STD, dense_views
from kernels import backend
from kernels.views import UNIFORMS, draw_view_parameters, views


def case(op: str, candidates: dict, **fields) -> Case:
    x = torch.arange(1.0, 5.0)
    return Case(op, "N=4", "float32", candidates, 32, lambda: (x.double(),), **fields)


def good(device, compiled, *size) -> Case:
    return case("good", {"eager": lambda: (torch.arange(1.0, 5.0),)})


def absent(device, compiled, *size) -> Case:
    def peer():
        raise ModuleNotFoundError("No module named 'kornia'")

    return case("absent", {"eager": lambda: (torch.arange(1.0, 5.0),), "kornia": peer})


def broken(device, compiled, *size) -> Case:
    raise RuntimeError("no such size\nand a trace")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(sweeps, *arguments): the document and the rows of the CSV file."""
    ceilings = harness.Ceilings(1.0, 1.0, "")
    monkeypatch.setattr(harness, "measure_ceilings", lambda *args, **kwargs: ceilings)

    def call(sweeps: dict, *arguments: str):
        monkeypatch.setattr(kernels, "SWEEPS", sweeps)
        out = tmp_path / "rows.csv"
        kernels.main(["--device", "cpu", "--blocks", "1", "--out", str(out), *arguments])
        return json.loads(capsys.readouterr().out.splitlines()[-1]), list(csv.DictReader(out.open()))

    return call


def sweep(build, *sizes) -> Sweep:
    return Sweep(build, sizes or ((4,),), ())


def test_every_op_has_a_sweep_of_sizes_for_both_devices():
    assert set(SWEEPS) == set(backend.OPS)
    assert all(found.reduced and found.full for found in SWEEPS.values())


def test_what_fails_is_a_row_and_the_others_are_measured(run):
    document, rows = run({"broken": sweep(broken), "absent": sweep(absent), "good": sweep(good)})
    assert [(row["op"], row["implementation"], row["quality"][:15]) for row in rows] == [
        ("broken", "", "failed: Runtime"),
        ("absent", "eager", "relative error "),
        ("absent", "kornia", "failed: ModuleN"),
        ("good", "eager", "relative error "),
    ]
    assert rows[0]["quality"].endswith("no such size") and rows[0]["shape"] == "4"
    assert [row["op"] for row in document["rows"]] == [row["op"] for row in rows]


def test_what_does_not_fit_the_budget_is_a_row(run, monkeypatch):
    monkeypatch.setattr(harness.Budget, "left", property(lambda budget: -1.0))
    document, rows = run({"good": sweep(good, (4,), (8,))}, "--budget-seconds", "1")
    assert [row["quality"] for row in rows] == ["skipped: budget"] * 2 == [r["quality"] for r in document["rows"]]


def test_sizes_take_turns_so_that_a_budget_ends_all_ops_alike(monkeypatch):
    monkeypatch.setattr(kernels, "SWEEPS", {"a": sweep(good, (1,), (2,), (3,)), "b": sweep(good, (1,))})
    options = SimpleNamespace(ops=["a", "b"], reduced=True)
    assert list(kernels.in_turns(options)) == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]


def test_after_a_lost_device_the_other_ops_go_on_in_a_new_process(run, monkeypatch):
    monkeypatch.setattr(harness, "is_lost", lambda device: True)
    started, plain = [], kernels.subprocess.run

    def process(command, **options):
        if "benchmarks.kernels" not in command:
            return plain(command, **options)
        started.append(command)
        return SimpleNamespace(stdout='a table\n{"rows": [{"op": "b", "implementation": "x", "median_ms": ""}]}\n')

    monkeypatch.setattr(kernels.subprocess, "run", process)
    document, rows = run({"a": sweep(good), "b": sweep(good), "c": sweep(good)})
    (command,) = started
    assert command[command.index("--ops") + 1] == "b,c"
    assert [row["op"] for row in document["rows"]] == ["good", "b"] and len(rows) == 1


def test_inputs_that_a_candidate_changes_are_put_back_before_it_is_judged():
    x = torch.arange(1.0, 5.0)
    own = case("step", {"eager": lambda: (x.add_(1),)}, prepare=lambda: x.copy_(torch.arange(0.0, 4.0)))
    assert own.error("eager") == own.error("eager") == "relative error 0.0e+00"


def test_a_kernel_stays_by_the_rule_only():
    def rows(ms: float, mib: float) -> list[dict]:
        common = {"op": "x", "shape": "1"}
        return [
            common | {"implementation": "eager", "median_ms": 9.0, "peak_mib": 9.0},
            common | {"implementation": "torch.compile", "median_ms": 1.0, "peak_mib": 4.0},
            common | {"implementation": "triton", "median_ms": ms, "peak_mib": mib},
            common | {"implementation": "", "median_ms": "", "peak_mib": ""},
        ]

    assert kernels.verdicts(rows(0.9, 4.0))["x"].startswith("stays: 1.11x torch.compile in time, 1.0x in memory")
    assert kernels.verdicts(rows(1.0, 2.0))["x"].startswith("stays")
    assert kernels.verdicts(rows(1.0, 4.0))["x"].startswith("goes")
    assert kernels.verdicts(rows(1.3, 1.0))["x"].startswith("goes")
    assert kernels.verdicts(rows(1.0, 2.0)[:2]) == {}


def test_the_form_for_compilers_is_the_definition():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 12, 9, 3), generator=g, dtype=torch.uint8)
    parameters = draw_view_parameters(torch.rand(5, 2, UNIFORMS, generator=g, dtype=torch.float64), 12, 9)
    (dense,) = dense_views(images, parameters, torch.float32)()
    definition = views(images, parameters, MEAN, STD)
    torch.testing.assert_close(dense, definition, rtol=0, atol=2e-5)
    assert dense.stride() == definition.stride()


@pytest.mark.parametrize(
    "op, small",
    [
        ("guided_step", (2, 4)),
        ("guided_step", (4, 4, True)),
        ("geglu", (6, 5)),
        ("group_norm", (2, 32, 4, True)),
        ("pixels", (2, 8, 4)),
        ("pixels", (2, 8, 4, True)),
    ],
)
def test_candidates_of_small_cases_answer_what_their_truth_is(op, small):
    own = SWEEPS[op].build(torch.device("cpu"), False, *small)
    for _ in range(2):
        errors = own.error("eager").removeprefix("relative error ").split()
        assert all(float(error) < (2e-2 if op == "pixels" else 1e-5) for error in errors)


def test_layouts_and_parts_that_run_are_timed_and_named():
    """On a GPU the decoder and the UNet answer in channels_last, and a step may have noise and a mask."""
    for op, small in (("pixels", (2, 8, 4)), ("guided_step", (4, 4))):
        assert any(size[-1] is True for size in SWEEPS[op].full) and any(s[-1] is True for s in SWEEPS[op].reduced)
        plain, real = (SWEEPS[op].build(torch.device("cpu"), False, *small, flag) for flag in (False, True))
        assert real.shape.startswith(plain.shape + " channels_last")
    assert real.bytes_moved > plain.bytes_moved


@pytest.mark.parametrize("op", [*SWEEPS, "guided_step production"])
def test_a_compiler_traces_every_definition_whole(op, monkeypatch):
    """Traced without Inductor, which takes minutes: a break in the graph would be timed as what the compiler can do."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: plain(call, backend="eager", fullgraph=True, dynamic=False))
    small = {"views": (16, 8), "supcon": (16,), "guided_step": (2, 4), "geglu": (6, 5), "pixels": (2, 8, 4)}
    small |= {"group_norm": (2, 32, 4, False), "guided_step production": (2, 4, True)}
    own = SWEEPS[op.split()[0]].build(torch.device("cpu"), True, *small[op])
    errors = own.error("torch.compile").removeprefix("relative error ").split()
    assert all(float(error) < (2e-2 if op == "pixels" else 1e-4) for error in errors)
