"""How much generation an optimizer step pays for: ticks spread evenly although images cost differently.

An image costs its number of UNet calls, a tick pays one for each slot that works. What a step releases is paid at the mean
cost of the images that come next, so that a few expensive ones do not make one step long; each image's own cost is
counted exactly once, so that over many steps both are the same.
"""

import math
from collections import deque
from collections.abc import Callable


class Pace:
    """Rows of UNet calls owed to the images that steps have released."""

    def __init__(self, slots: int):
        self.slots = slots
        self.costs: deque[int] = deque()  # of the images that come next in index order, not released yet
        self.pending = 0.0  # share of an image that is not released yet
        self.credit = 0.0  # rows owed

    def release(self, images: float, next_cost: Callable[[], int]) -> None:
        """Owe what `images` more images cost, at the mean of the coming 2 S and some.

        Args:
            next_cost: the cost of the image after the last whose cost was asked for.
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
        """Owe nothing: what was made until here was made as needed."""
        self.credit = 0.0

    @property
    def tick_is_due(self) -> bool:
        """Whether a tick of all slots is owed."""
        return self.credit >= self.slots

    def state_dict(self) -> dict:
        return {"costs": list(self.costs), "pending": self.pending, "credit": self.credit}

    def load_state_dict(self, state: dict) -> None:
        self.costs = deque(state["costs"])
        self.pending, self.credit = state["pending"], state["credit"]
