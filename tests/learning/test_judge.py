"""The judge: it learns what tells classes apart, from the images it is handed, once, and is the same for every arm."""

import pytest
import torch

from modules import config
from modules.learning.judge import load_judge

STEPS = 30


def colored(count: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images (uint8 [D, 16, 16, 3]) of three classes, each brighter in its own channel."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(40, 90, (count, 16, 16, 3), generator=draw)
    pixels[torch.arange(count), :, :, labels] += 120
    return pixels.to(torch.uint8), labels


def made(folder, pixels=None, labels=None, steps=STEPS, seed=0):
    """(judge, what it said while it was made)."""
    said: list[str] = []
    given = colored()
    pixels, labels = given[0] if pixels is None else pixels, given[1] if labels is None else labels
    return load_judge(pixels, labels, 3, steps, seed, folder, said.append), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    made(path)
    return path


def test_it_tells_unseen_images_apart(folder):
    judge, _ = made(folder)
    pixels, labels = colored(30, seed=7)
    features, predicted = judge(pixels)
    assert (predicted == labels).float().mean() >= 0.9
    assert features.shape[0] == 30 and features.dtype == torch.float32 and not features.requires_grad
    assert torch.allclose(features.norm(dim=1), torch.ones(30), atol=1e-5)


def test_a_verdict_does_not_depend_on_the_neighbors(folder):
    judge, _ = made(folder)
    pixels, _ = colored(12, seed=8)
    together, alone = judge(pixels)[0], torch.cat([judge(image[None])[0] for image in pixels])
    assert torch.allclose(together, alone, atol=1e-5)


def test_every_arm_gets_the_same_judge(folder, tmp_path):
    pixels, _ = colored(12, seed=9)
    cached, said = made(folder)
    assert "read from" in said[0]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, said = made(tmp_path)
    assert "made and kept" in said[0]
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    assert torch.equal(cached(pixels)[0], again(pixels)[0])


def test_its_steps_are_told_as_they_are_taken(tmp_path):
    told = []
    load_judge(*colored(), 3, 2, 0, tmp_path, lambda line: None, lambda *progress: told.append(progress[:2]))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("change", ["pixels", "labels", "steps", "seed"])
def test_another_set_budget_or_seed_makes_another_judge(folder, change):
    pixels, labels = colored()
    if change == "pixels":
        pixels[0, 0, 0, 0] += 1
    changes = {"pixels": {"pixels": pixels}, "labels": {"labels": labels.roll(1)}, "steps": {"steps": 2}}
    changes["seed"] = {"seed": 1}
    _, said = made(folder, **({"steps": 3} | changes[change]))
    assert "made and kept" in said[0]


def test_a_judge_sees_the_views_of_the_set(tmp_path):
    """Where color is what tells classes apart, a judge under gray views would not."""
    pixels = torch.zeros(12, 16, 16, 3, dtype=torch.uint8)
    labels = torch.arange(12) % 3
    pixels[torch.arange(12), :, :, labels] = 200
    own = config.Learning(jitter=(0.0, 0.0, 0.0, 0.0), grayscale_p=0.0)
    gray = config.Learning(jitter=(0.0, 0.0, 0.0, 0.0), grayscale_p=1.0)
    said = []
    agreement = {}
    for name, learning in (("own", own), ("gray", gray)):
        judge = load_judge(pixels, labels, 3, 30, 0, tmp_path, said.append, learning=learning)
        agreement[name] = (judge(pixels)[1] == labels).float().mean().item()
    assert agreement["own"] == 1.0 and sum("made and kept" in line for line in said) == 2, "each has its own entry"
