"""A feedback controller that adapts generation to the learner: strengths, and the shares of classes and recipes.

Only an online generator can do this. Positives should be recognized, but not trivially; near-OOD images should come
close to a class without belonging to it. So for each class and recipe the strength is adjusted to keep the mean
likeness to the source's class (gate.verdicts; real images have 1) within a band. Classes whose positives are mistaken
for other classes get more images; recipes whose negatives the learner already rejects get fewer.

It is a plain integrating controller with a dead band, slow and bounded rather than clever, because images reach the
learner some steps after they were requested. Its whole state is a few dicts and is part of the checkpoint.
"""

from modules.config import Controller as ControllerConfig
from modules.diffusion.requests import Request
from modules.rules import FREE_RECIPES

MAX_OFFSET = 0.4  # largest change of a strength in either direction
MEMORY = 0.9  # weight of the old value in the moving averages of confusion and rejection
PRIOR_IMAGES = 8.0  # weight, in images, of the mean over all classes against a class's own few images
LEAST_WEIGHT = 0.25  # factor on a recipe whose negatives are all rejected
FAR = ("accepted", "too_far")  # verdicts on a near-OOD image that say that the learner takes it for no class


class Controller:
    """Offsets of strengths, updated every `update_every` steps, and weights of classes and recipes."""

    def __init__(self, cfg: ControllerConfig, num_classes: int, bases: dict[str, tuple[float, ...]] | None = None):
        """A controller that has seen nothing.

        Args:
            bases: recipe -> its configured strengths, which its offset moves. An offset is bounded so that at least one
                of them stays within [0, 1] and follows at once when the offset turns back.
        """
        self.cfg, self.bases = cfg, bases or {}
        self.offsets: dict[tuple[str, int], float] = {}  # (recipe, class) -> change of strength
        self.sums: dict[tuple[str, int], list[float]] = {}  # (recipe, class) -> [likenesses, images] since the update
        self.confusion = [0.0] * num_classes  # share of positives whose nearest class is another
        self.rejection: dict[str, float] = {}  # recipe -> share of negatives that the learner already rejects

    def strength(self, recipe: str, label: int, base: float) -> float:
        """The strength of a recipe for a class: base + offset."""
        return base + self.offsets.get((recipe, label), 0.0)

    def class_weights(self) -> list[float]:
        """The relative share of each class, 1 on average: (1 + confusion_c) divided by its mean over classes."""
        raw = [1 + share for share in self.confusion]
        return [weight * len(raw) / sum(raw) for weight in raw]

    def recipe_weight(self, recipe: str) -> float:
        """The factor on a near-OOD recipe's configured weight: 1 - (1 - LEAST_WEIGHT) x rejected share."""
        return 1 - (1 - LEAST_WEIGHT) * self.rejection.get(recipe, 0.0)

    def observe(self, request: Request, reason: str, likeness: float, is_nearest: bool) -> None:
        """Take in the learner's verdict on one image (see `gate.Gate`)."""
        total = self.sums.setdefault((request.recipe, request.label), [0.0, 0.0])
        total[0] += likeness
        total[1] += 1
        if request.is_ood:
            old = self.rejection.get(request.recipe, 0.0)
            self.rejection[request.recipe] = MEMORY * old + (1 - MEMORY) * (reason in FAR)
        else:
            old = self.confusion[request.label]
            self.confusion[request.label] = MEMORY * old + (1 - MEMORY) * (not is_nearest)

    def update(self, step: int) -> None:
        """At every `update_every`-th step, move each strength whose mean likeness left its band by `gain`.

        The band is [target_low, target_high] for positives, and for near-OOD images the band of equal width below it,
        [2 target_low - target_high, target_low]. Above the band the strength rises, below it falls. A class has few
        images between two updates, so its mean is shrunk towards the mean of all classes, which counts as PRIOR_IMAGES
        images.
        """
        if step == 0 or step % self.cfg.update_every:
            return
        low, high = self.cfg.target_low, self.cfg.target_high
        pooled: dict[str, list[float]] = {}
        for (recipe, _), (likeness, images) in self.sums.items():
            total = pooled.setdefault(recipe, [0.0, 0.0])
            total[0], total[1] = total[0] + likeness, total[1] + images
        for (recipe, label), (likeness, images) in self.sums.items():
            if recipe in FREE_RECIPES:
                continue
            bottom, top = (low, high) if recipe == "positive" else (2 * low - high, low)
            of_all = pooled[recipe][0] / pooled[recipe][1]
            mean = (likeness + PRIOR_IMAGES * of_all) / (images + PRIOR_IMAGES)
            move = self.cfg.gain * ((mean > top) - (mean < bottom))
            offset = self.offsets.get((recipe, label), 0.0) + move
            bases = self.bases.get(recipe, (0.0, 1.0))
            lowest, highest = max(-MAX_OFFSET, -max(bases)), min(MAX_OFFSET, 1 - min(bases))
            self.offsets[recipe, label] = min(highest, max(lowest, offset))
        self.sums.clear()

    def statistics(self) -> dict[str, float]:
        """Mean offset of each recipe, mean confusion and the rejected share of each recipe."""
        rows = {"controller.confusion": sum(self.confusion) / len(self.confusion)}
        for recipe in dict.fromkeys(recipe for recipe, _ in self.offsets):
            moved = [offset for (name, _), offset in self.offsets.items() if name == recipe]
            rows[f"controller.{recipe}.offset"] = sum(moved) / len(moved)
        return rows | {f"controller.{recipe}.rejected": share for recipe, share in self.rejection.items()}

    def state_dict(self) -> dict:
        """Plain values."""
        return {
            "offsets": [[recipe, label, offset] for (recipe, label), offset in self.offsets.items()],
            "sums": [[recipe, label, *total] for (recipe, label), total in self.sums.items()],
            "confusion": list(self.confusion),
            "rejection": dict(self.rejection),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        self.offsets = {(recipe, label): offset for recipe, label, offset in state["offsets"]}
        self.sums = {(recipe, label): list(total) for recipe, label, *total in state["sums"]}
        self.confusion, self.rejection = list(state["confusion"]), dict(state["rejection"])
