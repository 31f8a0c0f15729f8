"""The closed loop: it finds its band, stays bounded, moves shares the right way, and is whole in a checkpoint."""

from collections import Counter

import pytest

from modules import config
from modules.diffusion.controller import LEAST_WEIGHT, MAX_OFFSET, Controller
from modules.diffusion.requests import Request
from modules.state import load_newest, save_checkpoint
from tests.diffusion.test_recipes import recipes

CFG = config.Controller(enabled=True, target_low=0.55, target_high=0.85, gain=0.05, update_every=10)


def show(controller, similarity, label=0, is_ood=False, recipe="positive", reason="accepted", nearest=True):
    controller.observe(Request(0, 0, label, is_ood, recipe), reason, similarity, nearest)


@pytest.mark.parametrize(
    ("is_ood", "recipe", "band"), [(False, "positive", (0.55, 0.85)), (True, "strength", (0.25, 0.55))]
)
@pytest.mark.parametrize("base", [0.1, 0.5, 0.7])
def test_the_strength_finds_the_band_of_a_learner_that_sees_less_with_more_noise(is_ood, recipe, band, base):
    controller = Controller(CFG, 2)
    for step in range(1, 400):
        strength = controller.strength(recipe, 1, base)
        show(controller, 1.05 - strength, label=1, is_ood=is_ood, recipe=recipe)
        controller.update(step)
    final = 1.05 - controller.strength(recipe, 1, base)
    reachable = (1.05 - base - MAX_OFFSET, 1.05 - base + MAX_OFFSET)
    assert max(band[0], reachable[0]) - 0.05 <= final <= min(band[1], reachable[1]) + 0.05
    assert controller.strength(recipe, 0, base) == base  # the other class was never seen


def test_offsets_are_bounded_and_still_inside_the_band():
    controller = Controller(CFG, 1)
    for step in range(1, 300):
        show(controller, 0.99)
        controller.update(step)
    assert controller.strength("positive", 0, 0.5) == pytest.approx(0.5 + MAX_OFFSET)
    still = Controller(CFG, 1)
    for step in range(1, 100):
        show(still, 0.7)
        still.update(step)
    assert still.strength("positive", 0, 0.5) == 0.5


@pytest.mark.parametrize(("likeness", "move"), [(0.54, -0.05), (0.56, 0.0), (0.84, 0.0), (0.86, 0.05)])
def test_a_single_image_counts_by_its_own_likeness(likeness, move):
    controller = Controller(CFG, 1)
    show(controller, likeness)
    controller.update(10)
    assert controller.offsets == {("positive", 0): move}


def test_one_image_of_a_class_moves_nothing_that_the_other_classes_do_not_show():
    """Some twenty positives reach twenty classes between two updates: one each, scattered about the band's middle."""
    controller = Controller(CFG, 20)
    for label in range(20):
        show(controller, 0.7 + (0.3 if label % 2 else -0.3), label=label)
    controller.update(10)
    assert not any(controller.offsets.values())
    for label in range(20):
        show(controller, 0.99, label=label)
    controller.update(20)
    assert set(controller.offsets.values()) == {0.05}


def test_it_moves_at_its_own_steps_only():
    controller = Controller(CFG, 1)
    show(controller, 0.99)
    for step in range(10):
        controller.update(step)
    assert controller.offsets == {}
    controller.update(10)
    assert controller.offsets == {("positive", 0): 0.05}
    controller.update(20)  # nothing new was seen
    assert controller.offsets == {("positive", 0): 0.05}


def test_confused_classes_get_more_images_and_easy_recipes_fewer():
    controller = Controller(CFG, 3)
    for _ in range(60):
        show(controller, 0.6, label=1, nearest=False)
        show(controller, 0.1, is_ood=True, recipe="strength", reason="accepted")
        show(controller, 0.8, is_ood=True, recipe="token_mix", reason="too_close")
    weights = controller.class_weights()
    assert sum(weights) == pytest.approx(3) and weights[1] == pytest.approx(1.5, abs=0.01)
    assert controller.recipe_weight("strength") == pytest.approx(LEAST_WEIGHT, abs=0.01)
    assert controller.recipe_weight("token_mix") == 1.0
    sequence = recipes(controller=controller)
    requests = [sequence.request(i) for i in range(1200)]
    classes = Counter(r.label for r in requests)
    assert classes[1] == pytest.approx(600, abs=60) and classes[0] == pytest.approx(300, abs=50)
    kinds = Counter(r.recipe for r in requests if r.is_ood)
    assert kinds["strength"] / kinds["token_mix"] == pytest.approx(0.25, abs=0.05)


def test_statistics_by_hand():
    controller = Controller(CFG, 2)
    controller.offsets = {("positive", 0): 0.1, ("positive", 1): -0.3, ("strength", 0): 0.2}
    controller.confusion, controller.rejection = [0.2, 0.4], {"strength": 0.5}
    assert controller.statistics() == pytest.approx(
        {
            "controller.confusion": 0.3,
            "controller.positive.offset": -0.1,
            "controller.strength.offset": 0.2,
            "controller.strength.rejected": 0.5,
        }
    )


def test_recipes_follow_the_offsets_and_stay_on_the_grid():
    controller = Controller(CFG, 3)
    controller.offsets = {("positive", 0): 0.2, ("positive", 1): -0.4, ("strength", 2): 0.4}
    sequence = recipes({"strengths": {0.4: 1.0}}, {"recipes": {"strength": 1.0}}, controller=controller)
    found = {(r.recipe, r.label): r for r in map(sequence.request, range(60))}
    assert found["positive", 0].strength == pytest.approx(0.6) and found["positive", 0].start == 8
    assert found["positive", 1].cost == 1 and found["positive", 2].strength == 0.4
    assert found["strength", 2].strength == 1.0 and found["strength", 2].start == 0


def test_state_goes_through_a_checkpoint(tmp_path):
    first, second = Controller(CFG, 2), Controller(CFG, 2)
    for step in range(1, 15):
        show(first, 0.9, label=1, nearest=False)
        show(first, 0.9, is_ood=True, recipe="strength", reason="too_close")
        first.update(step)
    save_checkpoint(tmp_path, 1, first.state_dict())
    second.load_state_dict(load_newest(tmp_path)[1])
    assert second.state_dict() == first.state_dict()
    for controller in (first, second):
        controller.update(20)
    assert second.offsets == first.offsets == {("positive", 1): 0.1, ("strength", 0): 0.1}
    assert second.statistics() == first.statistics()


def test_the_loop_is_open_unless_it_is_asked_for():
    assert config.Config().controller.enabled is False


@pytest.mark.parametrize("recipe, base, likeness", [("positive", 0.16, 0.1), ("strength", 0.75, 2.0)])
def test_an_offset_goes_no_further_than_its_strength_and_turns_back_at_once(recipe, base, likeness):
    controller = Controller(CFG, 1, {recipe: (base,)})

    def push(value):
        for _ in range(20):
            show(controller, value, is_ood=recipe != "positive", recipe=recipe)
        controller.update(10)
        return controller.strength(recipe, 0, base)

    for _ in range(12):
        end = push(likeness)
    assert end == pytest.approx(0.0 if likeness < 1 else 1.0)
    back = push(2.0 if likeness < 1 else -1.0)
    assert abs(back - end) == pytest.approx(CFG.gain)
