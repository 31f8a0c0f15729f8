"""Reservoir, mixer, views, encoder, objective and optimizer together: learning, fair arms, and resume to the bit."""

import dataclasses

import pytest
import torch

from modules.config import Encoder, Generation, Learning
from modules.data.mixer import Mixer
from modules.data.reservoir import Entry, Reservoir
from modules.data.views import two_views
from modules.ema import build_average
from modules.learning.encoder import build_encoder
from modules.learning.objectives import build_objective
from modules.optim import Optimizer
from modules.runtime import stream

SIZE, CLASSES = 32, 4
LEARNING = Learning(
    classes_per_batch=3,
    rows_per_class=2,
    steps=8,
    warmup_steps=2,
    lr=0.4,
    ema_decay=0.9,
    outlier_exposure=0.5,
    jitter_p=0.0,  # the classes below differ in brightness
)
GENERATION = Generation(synthetic_fraction=0.35, near_ood_fraction=0.4, ring_size=3)


class Training:
    """What trainer.build holds, less the generator: a step puts one drawn image into the reservoir instead."""

    def __init__(self, learning, generation=GENERATION, encoder=None):
        labels_D = torch.arange(20) % CLASSES
        noise_DHWC = torch.randint(0, 60, (20, SIZE, SIZE, 3), generator=stream(0, "pixels"), dtype=torch.uint8)
        pixels_DHWC = noise_DHWC + (labels_D * 40)[:, None, None, None].to(torch.uint8)
        self.learning, self.pixels_DHWC = learning, pixels_DHWC
        encoder = encoder or Encoder(width=8, head_dim=16, separate_batchnorm=True)
        self.encoder = build_encoder(encoder, SIZE, CLASSES, seed=0)
        self.reservoir = Reservoir(CLASSES, generation.ring_size, SIZE, torch.device("cpu"), max_uses=4)
        self.mixer = Mixer(pixels_DHWC, labels_D, self.reservoir, generation, learning, seed=0)
        self.objective = build_objective(learning)
        self.optimizer = Optimizer(self.encoder, learning, 9)
        self.average = build_average(self.encoder, learning.ema_decay)

    def train(self, steps):
        """The figures of each step, as numbers."""
        history = []
        for step in steps:
            entry = Entry(step % CLASSES, step % 2 == 1, step % CLASSES, "strength", step, step)
            self.reservoir.put_batch(self.pixels_DHWC[step : step + 1], [entry])
            batch = self.mixer.batch(step)
            views = two_views(batch.images_BHWC, seed=0, step=step, learning=self.learning)
            outputs = self.encoder(views, self.objective.output, [entry >= 0 for entry in batch.entries])
            loss, logs = self.objective(outputs, batch.labels_B, batch.is_ood_B)
            self.optimizer.backward(loss)
            self.optimizer.step(step, loss, {"images": batch.images_BHWC})
            self.average.update_parameters(self.encoder)
            history.append({name: value.item() for name, value in logs.items()})
        return history

    PARTS = ("encoder", "reservoir", "mixer", "optimizer", "average")

    def state(self):
        return contiguous({part: getattr(self, part).state_dict() for part in self.PARTS})

    def load(self, state):
        for part in self.PARTS:
            getattr(self, part).load_state_dict(state[part])


def contiguous(tree):
    """Copies in plain layout, as a checkpoint gives them back."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(tree, dict):
        return {key: contiguous(value) for key, value in tree.items()}
    return [contiguous(value) for value in tree] if isinstance(tree, list | tuple) else tree


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("method", ["supcon", "simclr", "cross_entropy"])
def test_resume_equals_never_having_stopped(method):
    learning = dataclasses.replace(LEARNING, method=method)
    whole = Training(learning)
    expected = whole.train(range(8))
    first, second = Training(learning), Training(learning)
    history = first.train(range(5))
    second.load(first.state())
    assert history + second.train(range(5, 8)) == expected
    assert equal(second.state(), whole.state())


def test_training_goes_below_chance_and_draws_classes_together():
    training = Training(dataclasses.replace(LEARNING, steps=15, classes_per_batch=4, lr=2.0))
    history = training.train(range(15))
    assert history[-1]["loss"] < history[-1]["reference_level"] - 0.5
    assert history[-1]["alignment"] < 0.5 * history[0]["alignment"]


def test_arms_see_the_same_real_views():
    def first_views(generation, learning):
        training = Training(learning, generation)
        training.train(range(4))
        batch = training.mixer.batch(4)
        return two_views(batch.images_BHWC, seed=0, step=4, learning=learning).unflatten(0, (2, -1))[:, :6]

    generated = first_views(GENERATION, LEARNING)
    plain = first_views(dataclasses.replace(GENERATION, synthetic_fraction=0.0), LEARNING)
    baseline = first_views(GENERATION, dataclasses.replace(LEARNING, method="cross_entropy", extra_real_rows=3))
    torch.testing.assert_close(generated, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(generated, baseline, rtol=0, atol=1e-6)
