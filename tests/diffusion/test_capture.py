"""Compiled and captured ticks: the same images, chosen and announced as the setting says."""

import contextlib
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from modules.diffusion import capture
from modules.diffusion.capture import accelerate, graph
from modules.diffusion.upsampling import set_forms
from modules.errors import ConfigError, Terminated
from modules.termination import termination
from tests.diffusion.engine import Engine


def test_off_and_auto_on_a_cpu_stay_eager_and_say_why():
    engine = Engine()
    unet = engine.slots.in_flight.unet
    for setting, why in (("off", "is off"), ("auto", "on a GPU only")):
        choice = accelerate(engine.slots, setting)
        assert choice.value == "eager" and why in choice.reason
    assert engine.slots.in_flight.unet is unet


def test_slots_in_flight_are_never_warmed_up():
    engine = Engine()
    engine.slots.tick()
    with pytest.raises(ValueError, match="4 images in flight"):
        accelerate(engine.slots, "on")


def test_warming_up_idle_slots_changes_nothing():
    warm, cold = Engine(masked=True), Engine(masked=True)
    for _ in range(3):
        warm.slots.in_flight.step()
    for engine in (warm, cold):
        engine.make(5)
    for i in range(5):
        assert torch.equal(warm.finished[i], cold.finished[i])


def test_where_compiling_fails_the_engine_stays_as_it_was_and_the_setting_is_named(monkeypatch):
    def refuse(*_inputs, **_settings):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    engine, plain = Engine(), Engine()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda *_, **__: refuse)
        with pytest.raises(
            ConfigError, match=r"compile is on, .* \(Failed to find C compiler.\); set it to auto or off"
        ):
            accelerate(engine.slots, "on")
    for one in (engine, plain):
        one.make(3)
    assert all((engine.finished[i] - plain.finished[i]).abs().max() <= 1e-4 for i in range(3))


def test_sigterm_that_the_compiler_makes_a_failure_of_its_own_is_obeyed(monkeypatch):
    """torch.compile names whatever stops it an error of its own: taken for that, the signal would be lost for good."""

    def interrupted(*_inputs, **_settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise RuntimeError("an internal error of the compiler") from None

    monkeypatch.setattr(torch, "compile", lambda *_, **__: interrupted)
    before = signal.getsignal(signal.SIGTERM)
    termination.listen()
    try:
        with pytest.raises(Terminated):
            accelerate(Engine().slots, "on")
    finally:
        termination.listen()  # forgets the signal
        signal.signal(signal.SIGTERM, before)


def test_what_does_not_fit_is_no_reason_to_stay_eager(monkeypatch):
    """Memory that runs out goes to whoever can lower the slots; before that what takes long was announced."""

    def exhausted(*_inputs, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine, said = Engine(), []
    before = engine.slots.in_flight.unet
    monkeypatch.setattr(torch, "compile", lambda *_, **__: exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(engine.slots, "on", said.append)
    assert engine.slots.in_flight.unet is before and engine.slots.pool_bytes == 0
    assert len(said) == 1 and said[0].startswith("compiling the UNet for 4 slots: a minute or two")


class Device:
    """What a capture asks of a CUDA device, on a machine without one: each capture takes 5 MB, 2 of them for its output."""

    def __init__(self, monkeypatch):
        self.pools, self.reserved, self.allocated = [], 100, 50
        cuda = torch.cuda
        nothing = lambda *_, **__: mock.MagicMock()  # noqa: E731 - five stand-ins, one line
        for name in ("Stream", "stream", "current_stream", "empty_cache"):
            monkeypatch.setattr(cuda, name, nothing)
        monkeypatch.setattr(cuda, "CUDAGraph", self.captured)
        monkeypatch.setattr(cuda, "graph", self.capture)
        monkeypatch.setattr(cuda, "memory_reserved", lambda: self.reserved)
        monkeypatch.setattr(cuda, "memory_allocated", lambda: self.allocated)

    def captured(self):
        name = f"pool of graph {len(self.pools)}"
        return SimpleNamespace(pool=lambda: name, replay=lambda: None)

    @contextlib.contextmanager
    def capture(self, captured, pool=None):
        self.pools.append(pool)
        yield
        self.reserved, self.allocated = self.reserved + 5, self.allocated + 2


def test_tick_and_decoder_share_one_pool_and_what_it_takes_is_known(monkeypatch):
    engine = Engine(options=(("seed", 11),))  # a pipeline that no other test shares: its layout changes
    device = Device(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert capture._compiled(engine.slots, on_gpu=True).value == "compiled, captured"
    assert device.pools == [None, "pool of graph 0"]
    assert engine.slots.pool_bytes == 2 * (5 - 2), "without what the outputs hold, which torch counts"


@pytest.mark.slow
def test_a_compiled_tick_makes_the_same_images():
    eager, compiled = Engine(slots=3), Engine(slots=3)
    assert accelerate(compiled.slots, "on").value == "compiled"
    for engine in (eager, compiled):
        engine.make(5)
    for i in range(5):
        assert (eager.finished[i] - compiled.finished[i]).abs().max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("solver, form", [("ddim", "torch"), ("dpmpp_2m", "transposed"), ("lcm", "phases")])
def test_a_captured_tick_makes_the_same_images(solver, form, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # ten bits of a product would hide in no tolerance
    eager, captured = (Engine(solver, device="cuda", slots=4, masked=True) for _ in range(2))
    set_forms(form, captured.pipeline.unet, captured.pipeline.vae)
    assert accelerate(captured.slots, "on").value == "compiled, captured"
    assert captured.slots.pool_bytes > 0
    for engine in (eager, captured):
        engine.make(9)
    for i in range(9):
        assert (eager.finished[i] - captured.finished[i]).abs().max() <= 1e-3


@pytest.mark.gpu
def test_a_graph_replays_on_new_values():
    static = torch.zeros(3, device="cuda")
    doubled = graph(lambda x: x * 2, static)
    assert doubled(torch.tensor([1.0, 2.0, 3.0], device="cuda")).tolist() == [2.0, 4.0, 6.0]
    assert doubled(torch.tensor([5.0, 0.0, 1.0], device="cuda")).tolist() == [10.0, 0.0, 2.0]
