"""What benchmarks/kernels.py times and judges, and that nothing which fails in it takes other results along."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import ceilings as ceilings_module
from benchmarks import harness, kernels
from benchmarks.ceilings import Ceilings, cold_cache
from benchmarks.kernel_case import Case
from benchmarks.kernel_cases import SWEEPS, Sweep, supcontrast
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
    ceilings = Ceilings(1.0, 1.0, "")
    monkeypatch.setattr(kernels, "measure_ceilings", lambda *args, **kwargs: ceilings)

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


def test_rows_name_their_baseline_and_what_a_kernel_launches(run):
    def kernel():
        for _ in range(3):
            backend.launch({(1,): lambda *_: None}, (1,), torch.zeros(1))
        return (torch.arange(1.0, 5.0),)

    def build(device, compiled):
        def missing():
            raise RuntimeError("does not compile")

        return case("own", {"eager": missing, "torch.compile": lambda: (torch.arange(1.0, 5.0),), "triton": kernel})

    _, rows = run({"own": sweep(build, ())})
    assert [(row["implementation"], row["launches"], row["baseline"]) for row in rows] == [
        ("eager", "", ""),
        ("torch.compile", "", "torch.compile"),
        ("triton", "3", "torch.compile"),
    ]


def test_what_ran_out_of_memory_says_how_much_it_had_got(run, monkeypatch):
    compare = harness.compare

    def exhausted(candidates, *args, **settings):
        outcome = compare({"small": candidates["small"]}, *args, **settings)
        return harness.Comparison(outcome.timings, 0.0, {"eager": "no room"}, {"eager": 70000.5})

    answer = lambda: (torch.arange(1.0, 5.0),)  # noqa: E731
    monkeypatch.setattr(harness, "compare", exhausted)
    _, (eager, small) = run({"own": sweep(lambda *_: case("own", {"eager": answer, "small": answer}))})
    assert eager["peak_mib"] == "70000.5" and eager["quality"] == "failed: no room; peak_mib is a lower bound"
    assert eager["median_ms"] == "" and "lower bound" not in small["quality"]


def test_shares_of_float32_products_are_of_a_float32_ceiling(run, monkeypatch):
    ceilings = Ceilings(8.0, 1.0, "", float32_tflop_per_s=2.0)
    assert [ceilings.tflop_per_s(dtype) for dtype in ("float32", "float16")] == [2.0, 8.0]
    assert Ceilings(8.0, 1.0, "").tflop_per_s("float32") == 8.0

    def build(device, compiled):
        return case("own", {"eager": lambda: (torch.arange(1.0, 5.0),)}, operations=10**9)

    _, (plain,) = run({"own": sweep(build, ())})
    monkeypatch.setattr(kernels, "measure_ceilings", lambda *args, **kwargs: ceilings)
    (row,) = run({"own": sweep(build, ())})[1][1:]
    assert row["switches"].endswith("ceiling=float32") and "ceiling" not in plain["switches"]
    assert float(row["ceiling_pct"]) == pytest.approx(100 * float(row["tflop_per_s"]) / 2, rel=1e-2)


def test_the_cache_is_emptied_before_each_call_of_what_would_fit(run, monkeypatch):
    assert cold_cache("cpu", 0) is None, "a CPU's caches are left as they are"
    read = []
    monkeypatch.setattr(ceilings_module, "cache_bytes", lambda device: 256)
    monkeypatch.setattr(torch, "zeros", lambda n, **_: SimpleNamespace(sum=lambda: read.append(4 * n)))
    assert cold_cache("cuda", 4 * 256) is None
    cold_cache("cuda", 100)()
    assert read.pop() == 4 * 256
    _, (row,) = run({"good": sweep(good)})
    assert row["switches"].endswith(" L2 flushed before each call") and len(read) > 2


def test_both_kinds_of_float32_product_are_timed_and_the_setting_is_put_back():
    before = torch.get_float32_matmul_precision()
    exact, tf32 = ceilings_module._float32_ms(torch.ones(8, 8), torch.ones(8, 8), "cpu")
    assert exact > 0 and tf32 > 0 and torch.get_float32_matmul_precision() == before


def test_rows_fit_the_files_that_are_there(run):
    _, rows = run({"good": sweep(good), "broken": sweep(broken)})
    for path in harness.RESULTS.glob("kernels_*.csv"):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
            assert [name for name in rows[0] if name in header] == header, (
                f"{path.name}: a run could not be appended to it"
            )
            assert all(None not in row and None not in row.values() for row in csv.DictReader(file, header))


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


def test_the_published_formula_never_waits_for_the_device():
    """Its authors' code does not; a shape that depends on values would put a wait into the peer's time."""
    with FakeTensorMode():
        assert supcontrast(torch.ones(6, 4), torch.zeros(6, dtype=torch.int64), 0.1).shape == ()


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
    small = {"views": (16, 8), "supcon": (16,), "guided_step": (2, 4), "pixels": (2, 8, 4)}
    small |= {"group_norm": (2, 32, 4, False), "guided_step production": (2, 4, True)}
    own = SWEEPS[op.split()[0]].build(torch.device("cpu"), True, *small[op])
    errors = own.error("torch.compile").removeprefix("relative error ").split()
    assert all(float(error) < (2e-2 if op == "pixels" else 1e-4) for error in errors)
