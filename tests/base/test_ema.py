"""The average by its formula, its buffers, its state."""

import copy

import pytest
import torch
from torch import nn

from modules.ema import build_average


def make_module(value: float) -> nn.Module:
    module = nn.BatchNorm1d(2)
    with torch.no_grad():
        for tensor in (*module.parameters(), module.running_mean, module.running_var):
            tensor.fill_(value)
    module.num_batches_tracked.fill_(int(value))
    return module


def test_average_by_hand():
    average = build_average(make_module(1.0), 0.9)
    for value in (2.0, 4.0):
        average.update_parameters(make_module(value))
    expected = 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4
    for name in ("weight", "bias", "running_mean", "running_var"):
        torch.testing.assert_close(getattr(average.module, name), torch.full((2,), expected))
    assert average.module.num_batches_tracked == 4 and average.n_averaged == 2


def test_zero_decay_switches_it_off():
    assert build_average(make_module(1.0), 0.0) is None


def test_the_module_itself_stays_as_it_was_and_the_copy_only_evaluates():
    module = make_module(1.0)
    before = copy.deepcopy(module.state_dict())
    average = build_average(module, 0.5)
    average.update_parameters(make_module(3.0))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training and module.weight.requires_grad
    assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_state_continues_exactly():
    values = (2.0, 5.0, 3.0, 7.0)
    whole = build_average(make_module(1.0), 0.99)
    for value in values:
        whole.update_parameters(make_module(value))
    first, second = build_average(make_module(1.0), 0.99), build_average(make_module(0.0), 0.99)
    for value in values[:2]:
        first.update_parameters(make_module(value))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for value in values[2:]:
        second.update_parameters(make_module(value))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.gpu
def test_an_update_on_a_gpu_waits_for_nothing():
    module = make_module(2.0).cuda()
    average = build_average(module, 0.5)
    average.update_parameters(module)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update_parameters(module)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.n_averaged == 2
