"""doctor says what works because it ran it, and why what does not work does not."""

import io

import pytest
import torch

from modules import probes
from modules.commands import doctor
from modules.console import Console
from modules.errors import ConfigError
from modules.probes import Probe, Wrong, probe

CPU = torch.device("cpu")


@pytest.fixture
def spoken(monkeypatch):
    """doctor with quick probes; a function of its arguments that returns what it printed."""
    found = [
        Probe("matmul fp32", True, "largest error 1e-07 of the largest value"),
        Probe("CUDA graph", False, "no GPU"),
    ]
    monkeypatch.setattr(doctor, "accelerators", lambda device: found)

    def run(*arguments: str) -> str:
        stream = io.StringIO()
        path, *rest = arguments or ("",)
        assert doctor.command(path, rest, Console(stream), None, None) == found
        return stream.getvalue()

    return run


def test_text_to_paste(spoken):
    text = spoken("--device=cpu")
    assert text.startswith("```\n") and text.endswith("```\n")
    assert "  works  matmul fp32: largest error 1e-07" in text
    assert "  no     CUDA graph: no GPU" in text
    for said in (
        "python 3.",
        "torch 2.",
        "xformers",
        "TFLOP/s",
        "run.device is cpu",
        "  views, supcon, guided_step, group_norm, pixels: torch (the definition",
    ):
        assert said in text, said


def test_needs_no_config_and_takes_none(spoken):
    assert "accelerators, each asked by a real call:" in spoken()
    with pytest.raises(ConfigError, match="doctor takes no CONFIG and no settings, found 'configs/demo.yaml'"):
        spoken("configs/demo.yaml")
    with pytest.raises(ConfigError, match="--device is 'tpu'; choose one of auto, cpu, cuda"):
        spoken("--device", "tpu")


def test_quick_probes_on_a_cpu():
    assert probe("matmul", lambda: probes._matmul(CPU, torch.float32)).works
    assert probe("matmul", lambda: probes._matmul(CPU, torch.bfloat16)).works
    graph = probe("CUDA graph", lambda: probes._graph(CPU))
    assert not graph.works and "no CUDA GPU" in graph.detail
    cudnn = probe("cudnn", lambda: probes._sdpa(CPU, torch.float32, probes.ATTENTION["cudnn"]))
    assert cudnn == Probe("cudnn", False, "it takes no torch.float32 tensors on cpu")
    triton = probe("triton", lambda: probes._triton(CPU))
    assert not triton.works and "GPU" in triton.detail


def test_eight_bit_step_is_taken_not_assumed(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional package")
    assert probe("8 bit", lambda: probes._bitsandbytes(CPU)).detail == "one step, state in 8 bits"
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    assert not probe("8 bit", lambda: probes._bitsandbytes(CPU)).works


def test_a_result_that_is_wrong_does_not_work():
    truth = torch.linspace(-1, 1, 9)
    assert probe("x", lambda: probes._compare(truth + 1e-6, truth, torch.float32)).works
    wrong = probe("x", lambda: probes._compare(truth + 0.5, truth, torch.float32))
    assert not wrong.works and wrong.detail.startswith("it runs, but its largest error is 5.0e-01")
    nan = probe("x", lambda: probes._compare(truth * torch.nan, truth, torch.float32))
    assert not nan.works


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ImportError("No module named 'x'"), "ImportError: No module named 'x'"),
        (RuntimeError("\n  first\nsecond"), "RuntimeError: first"),
        (Wrong(""), "no reason given"),
    ],
)
def test_whatever_a_library_raises_is_the_reason(error, detail):
    def work():
        raise error

    assert probe("x", work) == Probe("x", False, detail)


def test_xformers_says_why_it_refuses_a_cpu():
    pytest.importorskip("xformers", reason="xformers is an optional package")
    answer = probe("xformers", lambda: probes._xformers(CPU, torch.float32))
    assert not answer.works and "device=cpu (supported: {'cuda'})" in answer.detail


@pytest.mark.slow
def test_compiler_on_a_cpu():
    assert probe("torch.compile", lambda: probes._compile(CPU)).works


@pytest.mark.gpu
def test_every_probe_answers_on_a_gpu():
    answers = {answer.name: answer for answer in probes.accelerators(torch.device("cuda"))}
    for name in ("matmul fp16", "attention sdpa flash", "triton kernel", "torch.compile", "CUDA graph"):
        assert answers[name].works, answers[name]
