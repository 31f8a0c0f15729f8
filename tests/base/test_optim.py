"""The schedule by hand, updates that equal torch's, a guard that lets nothing bad through, exact resume."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from modules import optim
from modules.config import Learning
from modules.errors import ConfigError, NonFinite
from modules.optim import Optimizer, build_torch_optimizer, learning_rate
from modules.runtime import stream

SGD = Learning(optimizer="sgd", lr=0.4, warmup_steps=3, steps=20, weight_decay=0.01)
NAMES = ("sgd", "adamw", "sgd8bit", "adamw8bit")


def make_module(layout=torch.channels_last) -> nn.Module:
    """A convolution with 4-D weights (whose layout resume must keep), a norm and a large linear layer."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 32))
    generator = stream(0, "weights")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.to(memory_format=layout)


def loss_of(module, step):
    x = torch.randn(4, 3, 8, 8, generator=stream(0, "x", step))
    return module(x).square().mean()


def train(module, optimizer, steps):
    norms = []
    for step in steps:
        loss = loss_of(module, step)
        optimizer.backward(loss)
        norms.append(optimizer.step(step, loss))
    return norms


def weights(module):
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


def test_schedule_by_hand():
    rates = [learning_rate(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half of the cosine's way
    assert rates[6] == pytest.approx(1 + math.cos(math.pi / 4))
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False)) and 0 < rates[11] < 0.1
    assert learning_rate(0, 2.0, 0, 1) == 2.0
    assert learning_rate(12, 2.0, 4, 12) == 0.0


def test_lr_follows_the_batch():
    assert Optimizer(make_module(), SGD, 512).peak_lr == 0.8
    assert Optimizer(make_module(), SGD, 80).peak_lr == pytest.approx(0.4 * 80 / 256)


def test_a_name_gives_its_optimizer():
    made = [build_torch_optimizer(make_module(), dataclasses.replace(SGD, optimizer=name)) for name in NAMES]
    assert [type(optimizer).__name__ for optimizer in made] == ["SGD", "AdamW", "SGD8bit", "AdamW8bit"]


def test_an_8_bit_library_that_fails_at_a_step_is_named_before_any_is_taken(monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    def fail(self):
        raise RuntimeError("no kernel for this GPU\ntrace")

    monkeypatch.setattr(AdamW8bit, "step", fail)
    with pytest.raises(ConfigError, match=r"'sgd8bit', but bitsandbytes .* \(no kernel for this GPU\)"):
        build_torch_optimizer(make_module(), dataclasses.replace(SGD, optimizer="sgd8bit"))


def test_norms_and_biases_are_not_decayed():
    module = make_module()
    optimizer = build_torch_optimizer(module, SGD)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in module.named_parameters()}
    assert by_name == {"0.weight": 0.01, "1.weight": 0, "1.bias": 0, "3.weight": 0.01, "3.bias": 0}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_updates_are_torchs(name):
    learning = dataclasses.replace(SGD, optimizer=name, lr=0.05)
    ours, plain = make_module(), make_module()
    train(ours, Optimizer(ours, learning, 256), range(6))
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    torchs = torch.optim.SGD(groups, lr=1, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups, lr=1)
    for step in range(6):
        for group in torchs.param_groups:
            group["lr"] = learning_rate(step, 0.05, 3, 20)
        torchs.zero_grad()
        loss_of(plain, step).backward()
        torchs.step()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update_and_the_norm_is_the_one_before():
    def update(max_grad_norm):
        module = make_module()
        learning = Learning(
            lr=1.0, momentum=0.0, weight_decay=0.0, warmup_steps=0, steps=1, max_grad_norm=max_grad_norm
        )
        before = [p.detach().clone() for p in module.parameters()]
        norms = train(module, Optimizer(module, learning, 256), range(1))
        change = torch.cat([(b - p).flatten() for b, p in zip(before, module.parameters(), strict=True)])
        return change.norm().item(), norms[0].item()

    free, norm = update(0.0)
    clipped, norm_before = update(norm / 10)
    assert free == pytest.approx(norm, rel=1e-4)
    assert clipped == pytest.approx(norm / 10, rel=1e-4)
    assert norm_before == norm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_bad_step_is_noted_and_leaves_finite_weights(name, place):
    module = make_module()
    learning = dataclasses.replace(SGD, optimizer=name)
    optimizer = Optimizer(module, learning, 256)
    train(module, optimizer, range(3))
    captured = []
    images = torch.full((4, 3), 7, dtype=torch.uint8)
    for step in (3, 4):
        if place == "loss":
            loss = loss_of(module, step) * torch.nan
            optimizer.backward(loss)
        else:
            loss = loss_of(module, step)
            optimizer.backward(loss)
            module[0].weight.grad[0, 0, 0, 0] = torch.inf
        optimizer.step(step, loss, {"images": images if step == 3 else images[:2] * 0})
    assert weights(module).isfinite().all()
    reference = make_module()
    still = Optimizer(reference, learning, 256)
    train(reference, still, range(3))
    for step in (
        (3, 4) if name.endswith("8bit") else ()
    ):  # steps with gradients of zero; the others are skipped entirely
        loss = loss_of(reference, step)
        (loss * 0).backward()
        still.step(step, loss)
    expected = dict(reference.named_parameters())
    assert all(torch.equal(p, expected[key]) for key, p in module.named_parameters())
    with pytest.raises(NonFinite, match=r"^step 3: .*capture-here") as error:
        optimizer.raise_if_nonfinite(lambda failure: captured.append(failure) or "capture-here")
    assert error.value.code == 5
    assert captured[0]["step"] == 3 and torch.equal(captured[0]["tensors"]["images"], images)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_bad_first_step_leaves_no_trace_in_the_moments(name):
    learning = dataclasses.replace(SGD, optimizer=name)
    module, reference = make_module(), make_module()
    optimizer = Optimizer(module, learning, 256)
    loss = loss_of(module, 0) * torch.nan
    optimizer.backward(loss)
    optimizer.step(0, loss)
    train(module, optimizer, range(1, 4))
    train(reference, Optimizer(reference, learning, 256), range(1, 4))
    expected = dict(reference.named_parameters())
    assert all(torch.equal(p, expected[key]) for key, p in module.named_parameters())


def test_finite_steps_raise_nothing():
    module = make_module()
    optimizer = Optimizer(module, SGD, 256)
    train(module, optimizer, range(3))
    optimizer.raise_if_nonfinite(lambda failure: pytest.fail("nothing to capture"))


@pytest.mark.parametrize(("bad", "kept"), [(0, [0, 1]), (1, [10, 11, 12, 13, 14])])
def test_captures_follow_batches_that_grow(bad, kept):
    module = make_module()
    optimizer = Optimizer(module, SGD, 256)
    for step, rows in enumerate((2, 5, 3)):
        loss = loss_of(module, step) * (torch.nan if step == bad else 1)
        optimizer.backward(loss)
        optimizer.step(step, loss, {"rows": torch.arange(rows) + 10 * step})
    assert optimizer.guard.failure()["tensors"]["rows"].tolist() == kept + [0] * (5 - len(kept))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_resume_equals_never_stopping_bit_for_bit(name, layout):
    learning = dataclasses.replace(SGD, optimizer=name, lr=0.05)
    whole = make_module(layout)
    train(whole, Optimizer(whole, learning, 256), range(8))

    first = make_module(layout)
    optimizer = Optimizer(first, learning, 256)
    train(first, optimizer, range(4))
    saved = {key: value.clone(memory_format=torch.contiguous_format) for key, value in first.state_dict().items()}
    state = contiguous(optimizer.state_dict())

    second = make_module(layout)
    second.load_state_dict(saved)
    resumed = Optimizer(second, learning, 256)
    resumed.load_state_dict(state)
    train(second, resumed, range(4, 8))
    assert torch.equal(weights(second), weights(whole))


def contiguous(tree):
    """What a checkpoint gives back: the same values in copies of its own, in plain layout."""
    if isinstance(tree, torch.Tensor):
        return tree.clone(memory_format=torch.contiguous_format)
    if isinstance(tree, dict):
        return {key: contiguous(value) for key, value in tree.items()}
    return [contiguous(value) for value in tree] if isinstance(tree, list | tuple) else tree


def test_a_noted_failure_survives_resume():
    module = make_module()
    optimizer = Optimizer(module, SGD, 256)
    loss = loss_of(module, 0) * torch.inf
    optimizer.backward(loss)
    optimizer.step(0, loss)
    other = Optimizer(make_module(), SGD, 256)
    other.load_state_dict(optimizer.state_dict())
    failure = other.guard.failure()
    assert failure["step"] == 0 and failure["loss"] == math.inf


def test_loss_scaling_changes_no_update_and_backs_off_without_failing():
    plain, scaled = make_module(), make_module()
    train(plain, Optimizer(plain, SGD, 256), range(3))
    optimizer = Optimizer(scaled, SGD, 256, loss_scaling=True)
    train(scaled, optimizer, range(3))
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-6)

    loss = loss_of(scaled, 3)
    before = {k: v.clone() for k, v in scaled.named_parameters()}
    optimizer.backward(loss)
    scaled[0].weight.grad[0, 0, 0, 0] = torch.inf  # as an fp16 overflow would leave it
    optimizer.step(3, loss)
    assert optimizer.guard.failure() is None and optimizer.state_dict()["scale"] == 2.0**13
    resumed = Optimizer(make_module(), SGD, 256, loss_scaling=True)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state_dict()["scale"] == 2.0**13
    assert all(torch.equal(v, before[k]) for k, v in scaled.named_parameters())
    loss = loss_of(scaled, 4) * torch.nan
    optimizer.backward(loss)
    optimizer.step(4, loss)
    assert optimizer.guard.failure()["step"] == 4


def test_the_loss_scale_doubles_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(optim, "SCALE_GROWTH_STEPS", 2)
    module, scales = make_module(), []
    optimizer = Optimizer(module, SGD, 256, loss_scaling=True)
    for step in range(5):
        train(module, optimizer, [step])
        scales.append(math.log2(optimizer.state_dict()["scale"]))
    assert scales == [14, 15, 15, 16, 16]


def test_a_gradient_that_overflows_at_a_loss_scale_of_one_is_a_failure():
    module = make_module()
    optimizer = Optimizer(module, SGD, 256, loss_scaling=True)
    for step in range(15):  # from 2^14 down to 1
        assert optimizer.guard.failure() is None
        loss = loss_of(module, step)
        optimizer.backward(loss)
        module[0].weight.grad[0, 0, 0, 0] = torch.inf
        optimizer.step(step, loss)
    assert optimizer.guard.failure()["step"] == 14


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_on_a_gpu_waits_for_nothing(name):
    module = make_module().cuda()
    optimizer = Optimizer(module, dataclasses.replace(SGD, optimizer=name, max_grad_norm=1.0), 256)
    x = torch.randn(4, 3, 8, 8, device="cuda")
    for step in range(3):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = module(x).square().mean()
            optimizer.backward(loss)
            optimizer.step(step, loss, {"x": x})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.guard.failure() is None
