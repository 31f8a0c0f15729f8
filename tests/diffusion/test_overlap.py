"""Sharing a GPU: the mode that was asked for or measured, and the same images in either."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from modules.diffusion.overlap import Overlap, choose_mode
from modules.errors import ConfigError
from modules.runtime import Choice
from tests.diffusion.engine import Engine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def never(mode):
    raise AssertionError("nothing was to be measured")


def test_sequential_generates_at_once():
    done = []
    overlap = Overlap("sequential", CPU)
    overlap.generate(lambda: done.append(1))
    assert done == [1]
    overlap.launch()
    overlap.join()
    assert done == [1]


class Stream:
    """A stand-in for CUDA's streams and events: everything is done at once."""

    def __init__(self, *device):
        self.waits = 0

    def wait_stream(self, other):
        self.waits += 1

    wait_event = record = wait_stream


def test_a_side_stream_is_timed_under_a_name_of_its_own(monkeypatch):
    main, told = Stream(), []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: told.append("recorded")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())

    @contextlib.contextmanager
    def timed(name):
        told.append(name)
        yield
        told.append("timed")

    overlap = Overlap("stream", GPU, timed)
    overlap.generate(lambda: told.append("made"))
    assert told == [] and main.waits == 1, "what was launched before is waited for"
    overlap.launch()
    assert told == ["generate_beside", "made", "timed", "recorded"] and overlap.pending is None


def test_modes_and_their_reasons():
    assert choose_mode("auto", CPU, never).reason == "auto: a CPU has no streams"
    assert choose_mode("sequential", GPU, never) == choose_mode("sequential", CPU, never)
    assert choose_mode("stream", GPU, never).value == "stream"
    assert choose_mode("auto", GPU, never, screened=True).value == "sequential"
    measured = choose_mode("auto", GPU, {"sequential": 61.24, "stream": 55.0}.get)
    assert measured.value == "stream" and measured.reason == "auto: sequential 61.2 ms a step, stream 55.0 ms a step"
    assert choose_mode("auto", GPU, {"sequential": 50.0, "stream": 55.0}.get).value == "sequential"
    crowded = choose_mode("auto", GPU, {"sequential": 50.0, "stream": math.inf}.get)
    assert crowded == Choice("sequential", "auto: sequential 50.0 ms a step, stream does not fit")


def test_streams_that_cannot_run_are_refused():
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        choose_mode("stream", CPU, never)
    with pytest.raises(ConfigError, match="by the encoder that is being trained"):
        choose_mode("stream", GPU, never, screened=True)


@pytest.mark.gpu
def test_either_mode_makes_the_same_images():
    engines = []
    for mode in ("sequential", "stream"):
        engine, overlap = Engine(device="cuda", slots=4), Overlap(mode, GPU)
        work = torch.randn(512, 512, device="cuda")
        for _ in range(12):
            overlap.generate(lambda engine=engine: engine.slots.step(2.0))
            overlap.launch()
            work = (work @ work).tanh()
        overlap.join()
        torch.cuda.synchronize()
        engines.append(engine)
    sequential, stream = engines
    assert stream.order == sequential.order and len(stream.order) > 8
    for request in stream.order:
        images = [engine.finished[request.image_index] for engine in engines]
        assert (images[0] - images[1]).abs().max() <= 1e-4
