"""How many ticks an optimizer step takes: spread evenly, although images differ in cost.

An image costs as many UNet rows as it takes steps; a tick pays for one row per working slot. The images that a step
releases are charged at the mean cost of the images that come next, so that a few expensive ones do not make one step
long. Over many steps this equals the sum of the images' own costs.
"""

import math
from collections import deque
from collections.abc import Callable


class Pace:
    """Keeps account of the UNet rows owed for the images that steps have released."""

    def __init__(self, slots: int):
        self.slots = slots
        self.costs: deque[int] = deque()  # costs of the next images in index order that are not yet released
        self.pending = 0.0  # fraction of an image that is charged but not yet released
        self.credit = 0.0  # UNet rows owed

    def release(self, images: float, next_cost: Callable[[], int]) -> None:
        """Charge `images` more images at the mean cost of the next 2 S + ceil(images) ones.

        Args:
            next_cost: returns the cost of the next image in order, one further with each call.
        """
        window = 2 * self.slots + math.ceil(images)
        while len(self.costs) < window:
            self.costs.append(next_cost())
        self.credit += images * sum(list(self.costs)[:window]) / window
        self.pending += images
        for _ in range(int(self.pending)):
            self.pending -= 1
            self.costs.popleft()

    def settle(self) -> None:
        """Owe nothing, after ticks that were taken as needed and not paced."""
        self.credit = 0.0

    @property
    def tick_is_due(self) -> bool:
        """Whether the rows owed make up a tick of all slots."""
        return self.credit >= self.slots

    def state_dict(self) -> dict:
        return {"costs": list(self.costs), "pending": self.pending, "credit": self.credit}

    def load_state_dict(self, state: dict) -> None:
        self.costs = deque(state["costs"])
        self.pending, self.credit = state["pending"], state["credit"]
