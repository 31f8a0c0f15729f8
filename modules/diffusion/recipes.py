"""What to generate: the request of every image index, as a pure function of (seed, index) and the controller's state.

Positives show the class of a train image again, at a mild strength; near-OOD negatives break something on purpose:
noise level, token, guidance, object or layout. Shares are met by counting rather than by chance, so that a short run is
as balanced as a long one: roles by exact fractions, classes and sources in shuffled rounds, strengths and recipes by a
golden-ratio sequence per class. Only templates, conditions, mixing partners and mixing weights are drawn independently.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch

from modules.config import Generation, NearOOD
from modules.diffusion.controller import Controller
from modules.diffusion.prompts import KEYWORDS
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.schedule import Grids
from modules.errors import ConfigError
from modules.rules import FREE_RECIPES
from modules.runtime import stream

POSITIVE = "positive"
GOLDEN = (math.sqrt(5) - 1) / 2
TOKEN_RECIPES = ("token_noise", "token_mix", "foreign", "embedding_outlier")  # these need learned class tokens
PAIR_RECIPES = ("token_mix", "foreign")  # these need a second class


class Recipes:
    """The sequence of all images of a run."""

    def __init__(
        self,
        generation: Generation,
        near_ood: NearOOD,
        grids: Grids,
        labels: Sequence[int],
        num_classes: int,
        *,
        seed: int,
        resolution: int,
        preset: str = "exact",
        pipeline: str = "",
        tokens: str = "",
        has_mask: Sequence[bool] | None = None,
        controller: Controller | None = None,
        keywords: Sequence[Sequence[str]] = (),
    ):
        """Recipes over the train split.

        Args:
            labels: class of each train row.
            pipeline, tokens: digests for the provenance; if `tokens` is empty, prompts show the initializer word.
            has_mask: whether each train row has an object mask that is not empty; None: there are no masks.
            keywords: words of each class, for the condition `keywords`.
            controller: adapts strengths and the weights of classes and recipes; None: they stay as configured.

        Raises:
            ConfigError: a recipe lacks the masks, tokens, second class or dividing grid that it needs, a strength takes
                no step, or a class has no usable source.
        """
        self.generation, self.near_ood, self.grids, self.seed = generation, near_ood, grids, seed
        self.labels, self.num_classes, self.controller, self.keywords = labels, num_classes, controller, keywords
        self.fixed = {"resolution": resolution, "preset": preset, "pipeline": pipeline, "tokens": tokens}
        self.near_ood_fraction = Fraction(str(generation.near_ood_fraction))  # exactly the decimal in the config
        self.strengths = {float(s): w for s, w in generation.strengths.items() if w > 0}
        self.recipes = {name: w for name, w in near_ood.recipes.items() if w > 0}
        self.rows = _rows_of(labels, num_classes, None)
        self.masked_rows = _rows_of(labels, num_classes, has_mask) if has_mask is not None else None
        self._check(resolution, tokens)

    @property
    def guided(self) -> bool:
        """Whether any request needs the unconditional side of guidance."""
        ways = [self.generation.guidance_scale] + [self.near_ood.negative_guidance] * self._uses("negative_guidance")
        return any(w != 1 for w in ways)

    @property
    def masked(self) -> bool:
        """Whether any request edits within a mask."""
        edits = self.generation.mask_edit != "none" and self.near_ood_fraction < 1
        return edits or self._uses("mask_split")

    def request(self, image_index: int) -> Request:
        """The request of an image index, with its full provenance."""
        earlier = math.floor(image_index * self.near_ood_fraction)  # near-OOD images before this one
        is_ood = math.floor((image_index + 1) * self.near_ood_fraction) > earlier
        role, ordinal = ("near_ood", earlier) if is_ood else (POSITIVE, image_index - earlier)
        draw = stream(self.seed, "recipe", image_index)
        label, turn = self._class(role, ordinal, draw)
        u = (_offset(self.seed, role, label) + turn * GOLDEN) % 1.0
        recipe = self._pick_recipe(u) if is_ood else POSITIVE
        edit = self.generation.mask_edit if recipe == POSITIVE else "object" if recipe == "mask_split" else "none"
        request = {
            "image_index": image_index,
            "source": self._source(role, label, turn, edit != "none"),
            "label": label,
            "is_ood": is_ood,
            "recipe": recipe,
            **self.fixed,
        }
        if recipe in FREE_RECIPES:
            return Request(**request, jigsaw_grid=self.near_ood.jigsaw_grid)
        base = pick(self.strengths, u) if recipe == POSITIVE else near_ood_strength(recipe, self.near_ood)
        strength = base if recipe == "mask_split" else self._strength(recipe, label, base)
        grid, start = self.grids.at(strength)
        return Request(
            **request,
            prompt=self._prompt(recipe, label, draw),
            strength=strength,
            start=start,
            t0=grid.timesteps[start],
            sqrt_abar=grid.amplitude(start),
            solver=grid.solver,
            num_inference_steps=grid.num_inference_steps,
            guided_steps=grid.guided_steps,
            guidance_scale=(
                self.near_ood.negative_guidance if recipe == "negative_guidance" else self.generation.guidance_scale
            ),
            mask_edit=edit,
            mask_dilation_px=self.generation.mask_dilation_px if edit != "none" else 0,
        )

    def _class(self, role: str, ordinal: int, draw: torch.Generator) -> tuple[int, int]:
        """The class of the ordinal-th image of a role, and its turn: the number of rounds before it.

        Each round is a shuffled sequence of all classes. With class weights from the controller, a class keeps its
        place with probability min(1, weight); places given up go to classes with a weight above 1.
        """
        turn, place = divmod(ordinal, self.num_classes)
        label = _shuffled(self.seed, f"{role} classes", turn, self.num_classes)[place]
        weights = self.controller.class_weights() if self.controller else None
        if weights is not None and torch.rand((), generator=draw).item() >= weights[label]:
            excess = {other: weight - 1 for other, weight in enumerate(weights) if weight > 1}
            if excess:  # with a random turn: in this turn it would repeat the class's own source and strength
                label = pick(excess, torch.rand((), generator=draw).item())
                turn = torch.randint(1 << 30, (), generator=draw).item()
        return label, turn

    def _pick_recipe(self, u: float) -> str:
        weights = self.recipes
        if self.controller:
            weights = {name: weight * self.controller.recipe_weight(name) for name, weight in weights.items()}
        return pick(weights, u)

    def _source(self, role: str, label: int, turn: int, masked: bool) -> int:
        """The train row an image starts from: the class's rows in shuffled rounds."""
        rows = (self.masked_rows if masked else self.rows)[label]
        again, place = divmod(turn, len(rows))
        return rows[_shuffled(self.seed, f"{role} sources {label}", again, len(rows))[place]]

    def _strength(self, recipe: str, label: int, base: float) -> float:
        if self.controller is None:
            return base
        return min(1.0, max(self.grids.lowest_strength, self.controller.strength(recipe, label, base)))

    def _prompt(self, recipe: str, label: int, draw: torch.Generator) -> Prompt:
        """The prompt of a recipe; template, condition, mixing partner and weight come from the image's own stream."""
        u_template, u_condition, u_partner, u_weight = torch.rand(4, generator=draw).tolist()
        if recipe == "mask_split":  # the empty prompt, to paint what the background suggests and not the object
            return Prompt()
        template = self.generation.templates[int(u_template * len(self.generation.templates))]
        condition = pick(self.generation.conditions, u_condition)
        if condition == KEYWORDS:  # one of the class's own words, or no condition if it has none
            words = self.keywords[label]
            condition = words[torch.randint(len(words), (), generator=draw).item()] if words else ""
        own = Prompt(template, condition, (label,), (1.0,)) if self.fixed["tokens"] else Prompt(template, condition)
        other = (label + 1 + int(u_partner * (self.num_classes - 1))) % self.num_classes
        if recipe == "foreign":
            return Prompt(template, condition, (other,), (1.0,))
        if recipe == "token_mix":
            low, high = self.near_ood.mix
            weight = low + (high - low) * u_weight
            return Prompt(template, condition, (label, other), (1 - weight, weight))
        if recipe == "token_noise":
            return Prompt(template, condition, (label,), (1.0,), noise=self.near_ood.noise)
        if recipe == "embedding_outlier":
            return Prompt(template, condition, (label,), (1.0,), outlier_quantile=self.near_ood.outlier_quantile)
        return own

    def _uses(self, recipe: str) -> bool:
        return self.near_ood_fraction > 0 and recipe in self.recipes

    def _check(self, resolution: int, tokens: str) -> None:
        used = [name for name in self.recipes if self.near_ood_fraction > 0]
        for strength in self.strengths if self.near_ood_fraction < 1 else ():
            self.grids.at(strength)
        if any(name not in FREE_RECIPES for name in used):
            self.grids.at(self.near_ood.strength)
        for name in used:
            if name in TOKEN_RECIPES and not tokens:
                raise ConfigError(
                    f"near_ood.recipes has {name}, which changes class tokens, but inversion.class_agnostic learns none"
                )
            if name in PAIR_RECIPES and self.num_classes < 2:
                raise ConfigError(f"near_ood.recipes has {name}, which needs a second class; the data has one")
            if name in FREE_RECIPES and resolution % self.near_ood.jigsaw_grid:
                raise ConfigError(
                    f"near_ood.jigsaw_grid {self.near_ood.jigsaw_grid} does not divide the {resolution} px generated at"
                )
        if self.generation.conditions.get(KEYWORDS, 0) > 0 and not any(self.keywords):
            raise ConfigError(
                f"generation.conditions holds {KEYWORDS!r}, but no class has keywords; name condition words instead"
            )
        if self.masked:
            self._check_masks()

    def _check_masks(self) -> None:
        asked = (
            "near_ood.recipes has mask_split"
            if self.generation.mask_edit == "none"
            else (f"generation.mask_edit is {self.generation.mask_edit}")
        )
        if self.masked_rows is None:
            raise ConfigError(f"{asked}, but the data has no object masks; give a mask column or drop the setting")
        empty = [label for label, rows in enumerate(self.masked_rows) if not rows]
        if empty:
            raise ConfigError(f"{asked}, but no train image of class {empty[0]} has a mask that is not empty")


def near_ood_strength(recipe: str, near_ood: NearOOD) -> float:
    """The strength in (0, 1] of a near-OOD recipe that calls the UNet, before a controller changes it."""
    return 1.0 if recipe == "mask_split" else near_ood.strength  # mask_split always destroys the object completely


def pick(weights: dict, u: float):
    """The key whose interval holds u, where the keys divide [0, 1) in proportion to their weights."""
    target = u * sum(weights.values())
    for key, weight in weights.items():
        target -= weight
        if target < 0:
            return key
    return next(key for key in reversed(weights) if weights[key] > 0)  # reached if u x total was rounded up to total


def _rows_of(labels: Sequence[int], num_classes: int, keep: Sequence[bool] | None) -> list[list[int]]:
    """The train rows of each class; with `keep`, only the rows for which it is true."""
    rows = [[] for _ in range(num_classes)]
    for row, label in enumerate(labels):
        if keep is None or keep[row]:
            rows[label].append(row)
    return rows


@lru_cache(maxsize=4096)
def _shuffled(seed: int, name: str, turn: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=stream(seed, name, turn)).tolist())


@lru_cache(maxsize=4096)
def _offset(seed: int, role: str, label: int) -> float:
    """The start of a class's golden-ratio sequence, in [0, 1)."""
    return torch.rand((), generator=stream(seed, "recipe offset", role, label)).item()
