"""What memory does not suffice for: a way of overlapping, and slots beside what a run will hold later."""

from types import SimpleNamespace

import pytest
import torch

import trainer
from modules.diffusion.overlap import Overlap, choose_mode
from modules.runtime import Choice
from modules.training import costs, machine
from tests.base.test_machine import built


class Stand(Overlap):
    """An overlap that may be named stream on a CPU; tells whether it was waited for."""

    waited = 0

    def __init__(self, mode, device, timed=None):
        super().__init__("sequential", device)
        self.mode = mode

    def wait(self):
        Stand.waited += 1


@pytest.mark.parametrize("failing", ["stream", "sequential"])
def test_a_trial_of_a_mode_that_memory_does_not_suffice_for(failing, tmp_path, monkeypatch):
    """The state is as before; only sequential, which a run cannot do without, ends it."""
    Stand.waited = 0
    monkeypatch.setattr(machine, "Overlap", Stand)

    def timed(trial, step, count):
        if trial.overlap.mode == failing:
            trial.generator.slots.in_flight.z_S4hw.fill_(7.0)  # the step was under way
            raise torch.OutOfMemoryError("no room for both")
        return SimpleNamespace(step_ms=5.0)

    monkeypatch.setattr(machine, "time_steps", timed)
    monkeypatch.setattr(
        machine,
        "choose_mode",
        lambda asked, device, measure, judged: choose_mode("auto", torch.device("cuda"), measure),
    )
    with built(tmp_path) as (job, state, _):
        before = state.generator.slots.in_flight.z_S4hw.clone()
        if failing == "sequential":
            with pytest.raises(torch.OutOfMemoryError):
                machine.choose_overlap(job, state, trainer.step)
        else:
            machine.choose_overlap(job, state, trainer.step)
            assert job.choices["mode"] == Choice("sequential", "auto: sequential 5.0 ms a step, stream does not fit")
        assert torch.equal(state.generator.slots.in_flight.z_S4hw, before) and Stand.waited


def test_slots_are_fitted_beside_what_comes_later_too(tmp_path, monkeypatch):
    """On a device whose memory is a fixed bound: the step, the optimizer's state, the prompts that will be cached."""
    held = []
    with built(tmp_path, generation={"kv_cache_gib": 1.0}) as (job, state, _):
        monkeypatch.setattr(machine, "_learner_bytes", lambda *_: 1000)
        allocate = SimpleNamespace(empty=lambda size, **_: held.append(size), uint8=torch.uint8)
        monkeypatch.setattr(machine, "torch", allocate)
        job.device = torch.device("cuda")
        with machine._room_for_learner(job, state, None):
            pass
        numbers = sum(p.numel() for p in state.encoder.parameters())
        prompts = costs.prompt_cache_bytes(job.config.generation, len(job.sets.index.classes), job.pipeline)
    assert prompts > 0 and held == [1000 + 4 * numbers + prompts], "SGD keeps one number in fp32 for each"
