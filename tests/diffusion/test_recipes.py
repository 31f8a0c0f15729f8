"""The sequence of requests: pure, exact in its shares, whole in its provenance, and each image made again from it."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from modules import config
from modules.diffusion.conditioning import Conditioning, outlying_vectors, token_vectors
from modules.diffusion.prompts import check_keywords, check_prompts, drawn_prompts, fill
from modules.diffusion.recipes import Recipes, pick
from modules.diffusion.remake import make
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.schedule import Grids, time_grid
from modules.diffusion.slots import Slots, Sources
from modules.diffusion.tokens import PromptBank, Tokens
from modules.errors import ConfigError, DataError
from modules.rules import DIFFUSION_RECIPES, FREE_RECIPES, needs_masks
from tests.diffusion.engine import tiny_pipeline
from tests.tiny import SCHEDULER

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
GRID = time_grid(SCHEDULER, "ddim", 20)
ALL = dict.fromkeys(DIFFUSION_RECIPES + FREE_RECIPES, 1.0)


def recipes(generation=(), near_ood=(), grid=GRID, labels=LABELS, num_classes=3, **other) -> Recipes:
    return Recipes(
        dataclasses.replace(config.Generation(), **dict(generation)),
        dataclasses.replace(config.NearOOD(), **dict(near_ood)),
        Grids(grid),
        labels,
        num_classes,
        **({"seed": 3, "resolution": 32, "tokens": "t"} | other),
    )


def test_a_request_is_a_function_of_seed_and_index():
    forward = [recipes().request(i) for i in range(60)]
    one = recipes()
    assert [one.request(i) for i in reversed(range(60))] == forward[::-1]
    assert [recipes(seed=4).request(i) for i in range(60)] != forward


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_roles_are_counted_not_drawn(fraction):
    sequence = recipes({"near_ood_fraction": fraction})
    made = 0
    for i in range(200):
        made += sequence.request(i).is_ood
        assert made == int(round((i + 1) * fraction * 10) // 10)


def test_classes_and_sources_come_in_even_rounds():
    sequence = recipes(near_ood={"recipes": {"strength": 1.0}})
    for is_ood in (False, True):
        requests = [r for r in map(sequence.request, range(240)) if r.is_ood == is_ood]
        assert set(Counter(r.label for r in requests).values()) == {40}
        for label in range(3):
            uses = Counter(r.source for r in requests if r.label == label)
            assert set(uses) == {row for row, other in enumerate(LABELS) if other == label}
            assert max(uses.values()) - min(uses.values()) <= 1
    order = [r.label for r in map(sequence.request, range(0, 240, 2))]
    assert len({tuple(order[i : i + 3]) for i in range(0, 120, 3)}) == 6  # rounds are shuffled


def test_every_source_shows_its_own_class():
    assert all(LABELS[r.source] == r.label for r in map(recipes().request, range(300)))


def test_strengths_and_recipes_meet_their_weights_within_each_class():
    sequence = recipes(
        {"strengths": {0.25: 1.0, 0.5: 2.0, 0.75: 1.0}}, {"recipes": {"strength": 3.0, "jigsaw": 1.0, "foreign": 0.0}}
    )
    requests = [sequence.request(i) for i in range(480)]
    for label in range(3):
        positives = Counter(r.strength for r in requests if r.label == label and not r.is_ood)
        assert all(abs(positives[s] - 80 * share) <= 3 for s, share in ((0.25, 0.25), (0.5, 0.5), (0.75, 0.25)))
        negatives = Counter(r.recipe for r in requests if r.label == label and r.is_ood)
        assert abs(negatives["strength"] - 60) <= 3 and abs(negatives["jigsaw"] - 20) <= 3 and len(negatives) == 2


def test_conditions_and_templates_are_drawn_by_weight():
    sequence = recipes(
        {"conditions": {"": 1.0, "rusty": 3.0}, "templates": ("a {}", "the {}"), "near_ood_fraction": 0.0}
    )
    prompts = [sequence.request(i).prompt for i in range(400)]
    assert 250 < sum(p.condition == "rusty" for p in prompts) < 350
    assert 150 < sum(p.template == "a {}" for p in prompts) < 250


def test_class_keywords_serve_as_conditions():
    settings = {"conditions": {"keywords": 3.0, "old": 1.0}, "near_ood_fraction": 0.0}
    words = (("metal", "round"), (), ("rusty",))
    requests = [recipes(settings, keywords=words).request(i) for i in range(600)]
    found = {label: {r.prompt.condition for r in requests if r.label == label} for label in range(3)}
    assert found == {0: {"metal", "round", "old"}, 1: {"", "old"}, 2: {"rusty", "old"}}
    metal, of_class = (
        sum(r.label == 0 and test(r) for r in requests) for test in (lambda r: r.prompt.condition == "metal", bool)
    )
    assert metal / of_class == pytest.approx(0.375, abs=0.1)
    plain = [recipes({"conditions": {"worn": 3.0, "old": 1.0}, "near_ood_fraction": 0.0}).request(i) for i in range(60)]
    assert [(r.source, r.strength) for r in plain] == [(r.source, r.strength) for r in requests[:60]]
    with pytest.raises(ConfigError, match="no class has keywords"):
        recipes(settings)
    check_prompts(("a {}",), ("keywords",), frozenset({"a"}))
    check_keywords(words, frozenset({"metal", "round", "rusty"}))
    with pytest.raises(ConfigError, match="'round' in 'round' was never seen"):
        check_keywords(words, frozenset({"metal", "rusty"}))
    with pytest.raises(ConfigError, match="no class of this set has keywords"):
        check_keywords(((), ()), None)


def test_the_prompts_that_are_checked_are_those_that_are_drawn():
    settings = {"conditions": {"keywords": 3.0, "old": 1.0, "new": 0.0}, "templates": ("a {}", "{} on a table")}
    words, recipes_used = (("metal", "round"), (), ("rusty",)), {"foreign": 1.0, "token_mix": 1.0}
    sequence = recipes(settings, {"recipes": recipes_used}, keywords=words)
    prompts = [sequence.request(i).prompt for i in range(800)]
    drawn = {fill(prompt.template, "*", prompt.condition) for prompt in prompts}
    expected = drawn_prompts(settings["templates"], settings["conditions"], words, "*")
    assert drawn == set(expected) and len(expected) == 2 * 5
    assert "metal round" not in " ".join(expected) and "a new *" not in expected and "rusty * on a table" in expected


def test_each_recipe_breaks_what_it_says():
    sequence = recipes({"near_ood_fraction": 1.0, "guidance_scale": 3.0}, {"recipes": ALL}, has_mask=[True] * 13)
    by_recipe = {}
    for request in map(sequence.request, range(400)):
        by_recipe.setdefault(request.recipe, []).append(request)
    assert by_recipe.keys() == ALL.keys()
    for name, requests in by_recipe.items():
        for r in requests:
            assert r.is_ood
            if name in FREE_RECIPES:
                assert r.cost == 0 and r.jigsaw_grid == 4
                continue
            if name == "mask_split":  # whatever the strength of the others, next to nothing of the object is left
                assert (r.strength, r.start, r.cost) == (1.0, 0, 20) and r.sqrt_abar < 0.1
            else:
                assert (r.strength, r.start, r.t0, r.cost) == (0.75, 5, 701.0, 15)
            assert r.guidance_scale == (-1.0 if name == "negative_guidance" else 3.0)
            assert r.mask_edit == ("object" if name == "mask_split" else "none")
            assert r.prompt.noise == (1.0 if name == "token_noise" else 0.0)
            assert r.prompt.outlier_quantile == (0.02 if name == "embedding_outlier" else 0.0)
    for r in by_recipe["foreign"]:
        assert r.prompt.classes != (r.label,) and r.prompt.weights == (1.0,)
    assert {r.prompt.classes for r in by_recipe["foreign"]} == {(0,), (1,), (2,)}
    for r in by_recipe["token_mix"]:
        own, partner = r.prompt.weights
        assert r.prompt.classes[0] == r.label != r.prompt.classes[1] and 0.35 <= partner <= 0.65
        assert own + partner == pytest.approx(1.0)
    assert by_recipe["mask_split"][0].prompt == Prompt()


def test_provenance_reports_strength_t0_and_amplitude():
    request = recipes({"strengths": {0.5: 1.0}, "near_ood_fraction": 0.0}).request(0)
    assert (request.strength, request.t0, request.start) == (0.5, 451.0, 10)
    assert request.sqrt_abar == pytest.approx(GRID.amplitude(10))
    assert (request.solver, request.num_inference_steps, request.guidance_scale) == ("ddim", 20, 3.0)


def test_provenance_survives_json():
    sequence = recipes({"near_ood_fraction": 1.0}, {"recipes": ALL}, has_mask=[True] * 13)
    for i in range(40):
        request = sequence.request(i)
        assert Request.from_dict(json.loads(json.dumps(request.as_dict()))) == request


def test_masked_positives_start_from_rows_with_masks():
    has_mask = [row >= 6 for row in range(13)]
    sequence = recipes({"mask_edit": "background", "mask_dilation_px": 2}, has_mask=has_mask)
    positives = [r for r in map(sequence.request, range(100)) if not r.is_ood]
    assert {r.source for r in positives} == set(range(6, 13))
    assert all((r.mask_edit, r.mask_dilation_px) == ("background", 2) for r in positives)
    assert {r.source for r in map(sequence.request, range(100)) if r.is_ood} == set(range(13))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generation": {"strengths": {0.04: 1.0}}}, "0.04 on a grid of 20 .* = 0 steps"),
        ({"near_ood": {"strength": 0.01}}, "0.01 on a grid of 20"),
        ({"tokens": ""}, "token_mix, which changes class tokens"),
        ({"labels": [0, 0], "num_classes": 1}, "needs a second class"),
        ({"near_ood": {"recipes": {"jigsaw": 1.0}, "jigsaw_grid": 5}}, "5 does not divide the 32 px"),
        ({"generation": {"mask_edit": "object"}}, "mask_edit is object, but the data has no object masks"),
        ({"near_ood": {"recipes": {"mask_split": 1.0}}}, "mask_split, but the data has no object masks"),
        ({"generation": {"mask_edit": "object"}, "has_mask": [i % 3 != 1 for i in range(13)]}, "class 1 has a mask"),
    ],
)
def test_recipes_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        recipes(**arguments)


def test_settings_of_recipes_that_are_not_used_do_no_harm():
    recipes({"near_ood_fraction": 0.0}, {"recipes": {"mask_split": 1.0}, "strength": 0.01}, tokens="")
    recipes(near_ood={"recipes": {"jigsaw": 1.0, "foreign": 0.0}}, tokens="")


def test_pick_covers_its_weights():
    weights = {"a": 1.0, "b": 0.0, "c": 3.0}
    assert [pick(weights, u) for u in (0.0, 0.24, 0.26, 0.999, 1.0)] == ["a", "a", "c", "c", "c"]


def test_token_arithmetic_by_hand():
    vectors = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    mixed = token_vectors(Prompt("{}", "", (0, 2), (0.3, 0.7)), vectors, draw)
    torch.testing.assert_close(mixed, 0.3 * vectors[0] + 0.7 * vectors[2])
    noised = torch.stack(
        [token_vectors(Prompt("{}", "", (1,), (1.0,), noise=0.5), vectors, draw) - vectors[1] for _ in range(400)]
    )
    torch.testing.assert_close(noised.square().mean(0).sum(-1).sqrt(), 0.5 * vectors[1].norm(dim=-1), rtol=0.05, atol=0)


def test_outlying_vectors_lie_where_tokens_are_rare():
    vectors = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(3))
    own = vectors[2]
    radius = (vectors.flatten(1) - own).norm(dim=1).sort()[0][1]
    draw = torch.Generator().manual_seed(4)
    ring = own + radius * torch.nn.functional.normalize(torch.randn(4000, 4, generator=draw), dim=1)
    density = lambda x: (-0.5 * (torch.cdist(x, vectors.flatten(1)) / radius) ** 2).exp().sum(1)  # noqa: E731
    rare = density(ring).quantile(0.15)
    found = [outlying_vectors(own, vectors, 0.02, torch.Generator().manual_seed(i)) for i in range(20)]
    for outlier in found:
        assert (outlier - own).norm() == pytest.approx(radius.item(), rel=1e-4)
        assert density(outlier) <= rare
    assert (found[0] - found[1]).abs().max() > 1e-3


class Factory:
    """Engine, recipes and conditioning over the tiny pipeline, with learned-looking tokens and every recipe."""

    def __init__(self, solver="ddim"):
        self.pipeline = tiny_pipeline()
        draw = torch.Generator().manual_seed(5)
        vectors = torch.randn(3, 2, 32, generator=draw)
        tokens = Tokens(("gear", "nut", "screw"), vectors, self.pipeline.digest, "object", 0, 0)
        self.conditioning = Conditioning(PromptBank(self.pipeline, tokens), seed=3)
        pixels = torch.randint(0, 256, (13, 32, 32, 3), dtype=torch.uint8, generator=draw)
        masks = torch.zeros(13, 32, 32, dtype=torch.uint8)
        masks[:, 4:20, 8:24] = 1
        self.sources = Sources(self.pipeline.encode_moments(pixels), pixels, masks)
        grid = time_grid(self.pipeline.scheduler, solver, 5, guided_steps=4)
        self.recipes = recipes(
            {"mask_edit": "object", "strengths": {0.4: 1.0, 0.8: 1.0}},
            {"recipes": ALL},
            grid,
            has_mask=[True] * 13,
            tokens=self.conditioning.tokens,
            pipeline=self.pipeline.digest,
        )
        self.made: dict[int, tuple[Request, torch.Tensor]] = {}
        self.slots = Slots(
            self.pipeline,
            self.sources,
            [grid],
            self.recipes.request,
            self.conditioning,
            self.keep,
            seed=3,
            slots=4,
            decode_batch=3,
            empty_TE=self.conditioning.empty(),
            masked=self.recipes.masked,
        )

    def keep(self, pixels_N3HW, requests):
        for pixels, request in zip(pixels_N3HW, requests, strict=True):
            self.made[request.image_index] = request, pixels.clone()

    def make(self, requests: list[Request]) -> torch.Tensor:
        return make(requests, self.pipeline, self.sources, self.conditioning, self.conditioning.empty(), 3)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "lcm"])
def test_every_recipe_is_made_again_from_its_provenance(solver):
    factory = Factory(solver)
    while {r.recipe for r, _ in factory.made.values()} < {"positive", *ALL}:
        factory.slots.step(3.0)
    requests = [request for request, _ in factory.made.values()]
    written = [Request.from_dict(json.loads(json.dumps(request.as_dict()))) for request in requests]
    expected = torch.stack([pixels for _, pixels in factory.made.values()])
    assert (factory.make(written) - expected).abs().max() / 2 <= 1e-4
    assert (factory.make(written[3:4]) - expected[3:4]).abs().max() / 2 <= 1e-4


def test_another_pipeline_resolution_or_token_is_refused():
    factory = Factory()
    request = next(r for r in map(factory.recipes.request, range(9)) if r.recipe == "positive")
    for changes, message in (
        ({"pipeline": "f" * 64}, "made by pipeline ffff"),
        ({"resolution": 64}, "at 64 px"),
        ({"tokens": "e" * 64}, "class tokens eeee"),
    ):
        with pytest.raises(DataError, match=message):
            factory.make([dataclasses.replace(request, **changes)])


def test_fixed_prompts_are_embedded_once_and_changed_tokens_each_time():
    factory = Factory()
    bank, sequence = factory.conditioning.bank, factory.recipes
    kinds = {r.recipe: r for r in map(sequence.request, range(60))}
    factory.conditioning(kinds["positive"])
    for name, embeds in (("positive", 0), ("strength", 0), ("token_mix", 1), ("token_noise", 1)):
        request = dataclasses.replace(kinds[name], label=kinds["positive"].label)
        if not embeds:
            request = dataclasses.replace(request, prompt=kinds["positive"].prompt)
        before = bank.encoded
        first, second = factory.conditioning(request), factory.conditioning(request)
        assert bank.encoded == before + 2 * embeds and torch.equal(first, second)


@pytest.mark.parametrize("steps", [20, 25, 49, 50, 98, 103, 161])
def test_however_low_a_controller_goes_a_step_is_taken(steps):
    class Lowest:
        def class_weights(self):
            return [1.0] * 3

        def recipe_weight(self, recipe):
            return 1.0

        def strength(self, recipe, label, base):
            return 0.0

    grid = time_grid(SCHEDULER, "ddim", steps)
    made = [recipes(grid=grid, controller=Lowest()).request(i) for i in range(6)]
    assert all(grid.num_inference_steps - request.start == 1 for request in made if request.recipe not in FREE_RECIPES)


def test_masks_are_asked_for_by_what_is_used_alone():
    masks = {"recipes": {"mask_split": 1.0, "strength": 0.0}}
    cases = [
        ({}, {}, False),
        ({}, masks, True),
        ({"near_ood_fraction": 0.0}, masks, False),
        ({}, {"recipes": {"mask_split": 0.0, "strength": 1.0}}, False),
        ({"mask_edit": "object"}, {}, True),
        ({"mask_edit": "object", "near_ood_fraction": 1.0}, {}, False),
        ({"mask_edit": "object", "synthetic_fraction": 0.0}, {}, False),
    ]
    for generation, near_ood, expected in cases:
        settings = config.Config(
            generation=dataclasses.replace(config.Generation(), **generation),
            near_ood=dataclasses.replace(config.NearOOD(), **near_ood),
        )
        assert needs_masks(settings) is expected, (generation, near_ood)
