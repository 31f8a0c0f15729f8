"""The alarm for a collapse is heard: a run whose embeddings are one point for several logs prints the warning."""

import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modules.console import Console
from modules.learning.geometry import CollapseAlarm, describe_embeddings
from modules.meter import Meter
from modules.runtime import stream
from modules.training.loop import _metric_row

WARMUP = 10


@pytest.fixture
def job():
    config = SimpleNamespace(evaluation=SimpleNamespace(knn_every=0), run=SimpleNamespace(log_every=10))
    return SimpleNamespace(config=config, console=Console(io.StringIO()))


@pytest.fixture
def state():
    optimizer = SimpleNamespace(inner=SimpleNamespace(param_groups=[{"lr": 0.1}]))
    return SimpleNamespace(
        step=0,
        forward_rows=0,
        generator=None,
        optimizer=optimizer,
        meter=Meter(),
        alarm=CollapseAlarm(WARMUP, patience=3),
        logs={},
    )


def log(job, state, spread: float) -> str:
    """One metric row of embeddings that lie `spread` around a point, ten steps on; what the run has printed so far."""
    noise_RE = torch.randn(16, 8, generator=stream(0, "test alarm", state.step))
    z_RE = F.normalize(torch.ones(16, 8) + spread * noise_RE, dim=1)
    labels_R, none_R = torch.arange(8).repeat(2) % 4, torch.zeros(16, dtype=torch.bool)
    state.logs = describe_embeddings(
        z_RE, labels_R, none_R, num_views=2, temperature=0.1, ood_columns="none", ood_weight=1.0
    )
    begun = (state.step, state.forward_rows, 0)
    state.step, state.forward_rows = state.step + 10, state.forward_rows + 160
    row = _metric_row(job, state, begun)
    assert row["step"] == state.step and row["views_per_s"] > 0
    return job.console.rich.file.getvalue()


def test_a_run_that_collapses_is_warned_of_at_the_third_log(job, state):
    assert [bool(log(job, state, 0.001)) for _ in range(3)] == [False, False, True]
    (line,) = log(job, state, 100.0).splitlines()
    assert line.startswith("warning: collapse: at 3 logs in a row")
    for _ in range(2):
        assert len(log(job, state, 0.001).splitlines()) == 1, "it recovered in between"
    assert len(log(job, state, 0.001).splitlines()) == 2


def test_a_run_that_spreads_is_not(job, state):
    assert not any(log(job, state, 100.0) for _ in range(6))
