"""A step never makes the host wait for the GPU, whatever it draws, mixes and generates."""

from contextlib import contextmanager

import pytest
import torch

import trainer
from benchmarks.session import session
from modules.diffusion.overlap import Overlap

SETTINGS = {
    "run.log_every": 10**6,  # logging reads values back, every run.log_every steps
    "learning.steps": 10**6,
    "learning.classes_per_batch": 8,
    "data.shots_per_class": 4,
    "inversion.images_per_class": 1,
    "generation.prefill": 0.0,
    "generation.synthetic_fraction": 0.2,
    "generation.max_uses": 10**6,
    "near_ood.recipes": {"strength": 1.0, "token_mix": 1.0, "token_noise": 1.0, "foreign": 1.0},
    "evaluation.judge_steps": 0,
}

OFF_BY_DEFAULT = {
    "gate.enabled": True,
    "gate.start_step": 2,
    "gate.refresh_every": 3,
    "controller.enabled": True,
    "controller.update_every": 3,
    "near_ood.recipes": {"negative_guidance": 1.0, "embedding_outlier": 1.0, "jigsaw_roundtrip": 1.0, "jigsaw": 1.0},
    "encoder.separate_batchnorm": True,
    "learning.optimizer": "adamw",
    "learning.max_grad_norm": 1.0,
    "learning.ema_decay": 0.9,
    "learning.ood_columns": "own_class",
    "learning.ood_variant": "prototype_push",
    "learning.hardness": 0.5,
    "learning.augment": "strong",
}


@contextmanager
def syncs_are_errors(device: torch.device):
    """Inside, torch raises where it would make the host wait for a CUDA device; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("device", "mode", "settings"),
    [
        pytest.param("cpu", "sequential", {}, marks=pytest.mark.slow, id="cpu"),
        pytest.param("cpu", "sequential", OFF_BY_DEFAULT, marks=pytest.mark.slow, id="cpu, off by default"),
        pytest.param("cuda", "sequential", {}, marks=pytest.mark.gpu, id="sequential"),
        pytest.param("cuda", "stream", {}, marks=pytest.mark.gpu, id="stream"),
        pytest.param("cuda", "sequential", OFF_BY_DEFAULT, marks=pytest.mark.gpu, id="off by default"),
    ],
)
def test_whole_steps_with_sync_errors_on(device, mode, settings):
    with session(SETTINGS | settings | {"run.device": device}) as (job, state):
        state.overlap = Overlap(mode, job.device)
        for _ in range(3):  # what is set up once may wait
            trainer.step(state)
        admitted = state.generator.slots.counts["admitted"]
        with syncs_are_errors(job.device):
            for _ in range(8):
                trainer.step(state)
        state.overlap.join()
        counts = state.generator.slots.counts
        assert counts["admitted"] >= admitted + 8 and counts["finished"] > 0
        assert state.mixer.statistics()["realized_fraction"] > 0
