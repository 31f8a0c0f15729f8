"""Which implementation runs is decided in one place, with a reason, and kernels are launched in one place."""

import ast
import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import backend

FOLDER = Path(backend.__file__).parent
H200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, shared_memory_per_block_optin=232448)


@pytest.fixture(autouse=True)
def restore_default():
    yield
    backend.set_default("auto")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Properties of the GPU that is asked for, of one that is not there."""
    found = copy.copy(H200)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return found


def test_a_cpu_runs_the_definitions():
    assert backend.choose("views") == ("torch", "the definition in plain torch is the CPU path")


def test_a_gpu_runs_a_kernel_only_once_a_benchmark_row_judged_it(monkeypatch):
    monkeypatch.setattr(backend, "_obstacle", lambda kind: "")
    monkeypatch.setattr(backend, "JUDGED", {})
    name, reason = backend.choose("supcon", "auto", "cuda")
    assert name == "torch" and "no row of kernels_gpu.csv" in reason
    monkeypatch.setitem(backend.JUDGED, "supcon", "5.1x torch.compile at R = 8192, row 12")
    assert backend.choose("supcon", "auto", "cuda") == ("triton", "5.1x torch.compile at R = 8192, row 12")
    assert backend.choose("views", "auto", "cuda").name == "torch"


@pytest.mark.parametrize(
    "other",
    [{"major": 8, "minor": 6}, {"major": 12, "shared_memory_per_block_optin": 101376}],
    ids=["older", "smaller"],
)
def test_a_row_of_one_gpu_says_nothing_of_another_kind(other, gpu, monkeypatch):
    monkeypatch.setattr(backend, "_obstacle", lambda kind: "")
    monkeypatch.setitem(backend.JUDGED, "supcon", "judged")
    vars(gpu).update(other, name="some card")
    name, reason = backend.choose("supcon", "auto", "cuda")
    assert name == "torch" and "some card" in reason and "run.kernels=triton" in reason
    assert backend.choose("supcon", "triton", "cuda").name == "triton"


def test_a_setting_forces_either(monkeypatch):
    monkeypatch.setattr(backend, "_obstacle", lambda kind: "")
    monkeypatch.setitem(backend.JUDGED, "supcon", "judged")
    assert backend.choose("supcon", "torch", "cuda") == ("torch", "asked for")
    assert backend.choose("views", "triton", "cuda") == ("triton", "asked for")
    backend.set_default("torch")
    assert backend.choose("supcon", "auto", "cuda") == ("torch", "set by run.kernels")
    assert backend.choose("supcon", "triton", "cuda").name == "triton", "the call has the last word"


def test_triton_where_it_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRET", False)
    with pytest.raises(ValueError, match="of views: .*(CUDA GPU|not installed).*use 'auto' or 'torch'"):
        backend.choose("views", "triton", "cpu")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        backend.choose("views", "triton", "cuda")
    assert backend.choose("views", "auto", "cuda") == ("torch", "Triton is not installed")


def test_arguments_that_a_kernel_cannot_take_go_to_the_definition_unless_the_call_demands_it(monkeypatch):
    monkeypatch.setattr(backend, "_obstacle", lambda kind: "")
    monkeypatch.setitem(backend.JUDGED, "supcon", "judged")
    wide = backend.too_wide("z_RE", torch.zeros(2, 300), columns=256)
    assert wide == "z_RE is float32[2, 300]; the kernel takes float32, float16 or bfloat16[any, <= 256]"
    assert backend.choose("supcon", "auto", "cuda", unable=wide) == ("torch", wide)
    backend.set_default("triton")
    assert backend.choose("supcon", "auto", "cuda", unable=wide) == ("torch", wide)
    with pytest.raises(ValueError, match="of supcon: z_RE is float32"):
        backend.choose("supcon", "triton", "cuda", unable=wide)
    assert backend.too_wide("x", torch.zeros(2, dtype=torch.float64)) and not backend.too_wide("x", torch.zeros(2, 300))


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="implementation='cuda'"):
        backend.choose("views", "cuda")
    with pytest.raises(ValueError, match="op='attention'"):
        backend.choose("attention")
    with pytest.raises(ValueError, match="implementation='fast'"):
        backend.set_default("fast")


def test_every_op_is_explained():
    assert set(backend.explain(torch.device("cpu"))) == set(backend.OPS)


@pytest.mark.parametrize("n, expected", [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(n, expected):
    assert backend.next_power_of_2(n) == expected


def test_a_launch_is_on_the_device_of_its_tensor_and_is_counted(monkeypatch):
    events, x = [], torch.zeros(2)

    @contextlib.contextmanager
    def device_of(tensor):
        assert tensor is x
        events.append("enter")
        yield
        events.append("exit")

    kernel = {(3,): lambda *arguments, **constants: events.append((len(arguments), constants))}
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    backend.launch(kernel, (3,), x, 7, BLOCK=16)
    assert events == ["enter", (2, {"BLOCK": 16}), "exit"]
    assert backend.launches_of(lambda: [backend.launch(kernel, (3,), x) for _ in range(4)]) == 4
    assert backend.launches_of(lambda: None) == 0


def test_no_kernel_is_launched_past_the_guard():
    """`kernel[grid](...)` stands in backend.launch only."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted(FOLDER.glob("*.py"))
        if path.name != "backend.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert not found
