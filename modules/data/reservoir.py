"""Ring buffers of generated images on the device, one for each (class, role); new images replace the oldest.

Generation is the most expensive part of a step, so an image is used in several batches. Two limits keep images from
becoming stale: `max_uses` batches and `max_age` optimizer steps. All bookkeeping is plain Python on the host, so no
decision waits for the device; only the pixels are there.

Legend: S rows of all rings, N images, H W C pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from kernels.staging import upload


@dataclass(frozen=True)
class Entry:
    """What is known about one generated image: enough to label it, and its identity for the provenance record."""

    label: int  # class of the source, >= 0 for a near-OOD image too
    is_ood: bool
    source: int  # row of the source image in the train set
    recipe: str
    born: int  # optimizer step at which it was put in
    image_index: int  # selects the random stream it was made with


class Reservoir:
    """Generated images for batches: `put_batch` stores them, `take` picks the least used, `gather` reads pixels."""

    def __init__(
        self, num_classes: int, ring_size: int, size: int, device: torch.device, max_uses: int, max_age: int = 0
    ):
        """Empty rings for `num_classes` x {ID, near-OOD} x `ring_size` images of `size` pixels a side.

        max_uses: batches an image may be used in, >= 1; max_age: its lifetime in optimizer steps, 0: no limit.
        """
        self.num_classes, self.ring_size = num_classes, ring_size
        self.max_uses, self.max_age = max_uses, max_age
        rows = num_classes * 2 * ring_size
        self.pixels_SHWC = torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=device)
        self.device = self.pixels_SHWC.device
        self._entries: list[Entry | None] = [None] * rows
        self._uses = [0] * rows
        self._next = [0] * (num_classes * 2)  # position of each ring that is written next; when full, the oldest
        self._step = 0  # newest step seen, for ages in statistics
        self._totals = {"put": 0, "prefilled": 0, "taken": 0, "evicted_unused": 0}

    def put_batch(self, pixels_NHWC: torch.Tensor, entries: list[Entry]) -> None:
        """Store N uint8 images with one entry each, in order, replacing the oldest of their rings.

        Raises:
            ValueError: pixels have the wrong dtype, size or count, or a label is outside [0, num_classes).
        """
        expected = (len(entries), *self.pixels_SHWC.shape[1:])
        if pixels_NHWC.dtype != torch.uint8 or tuple(pixels_NHWC.shape) != expected:
            raise ValueError(
                f"pixels_NHWC is {pixels_NHWC.dtype} {tuple(pixels_NHWC.shape)}; expected torch.uint8 {expected}"
            )
        written: dict[int, int] = {}  # row -> position of the last image of this call that was written there
        for position, entry in enumerate(entries):
            if not 0 <= entry.label < self.num_classes:
                raise ValueError(f"entry.label is {entry.label}; expected 0 to {self.num_classes - 1}")
            ring = self._ring(entry.label, entry.is_ood)
            row = ring * self.ring_size + self._next[ring]
            self._next[ring] = (self._next[ring] + 1) % self.ring_size
            if self._entries[row] is not None and self._uses[row] == 0:
                self._totals["evicted_unused"] += 1
            self._entries[row], self._uses[row] = entry, 0
            self._step = max(self._step, entry.born)
            self._totals["put"] += 1
            written[row] = position
        if not written:
            return
        positions = list(written.values())
        if positions != list(range(len(entries))):
            pixels_NHWC = pixels_NHWC.index_select(0, upload(positions, pixels_NHWC.device))
        self.pixels_SHWC.index_copy_(0, upload(list(written), self.device), pixels_NHWC)

    def end_prefill(self) -> None:
        """Mark all images put in so far as the prefill; the statistic `reuse` divides by those that follow."""
        self._totals["prefilled"] = self._totals["put"]

    def take(
        self,
        labels: Sequence[int] | None,
        is_ood: bool,
        step: int,
        count: int,
        generator: torch.Generator,
        *,
        worn: bool = False,
        excluding: Sequence[int] = (),
    ) -> list[int]:
        """Take up to `count` distinct rows of the classes `labels` (None: all) and one role; their uses grow by 1.

        Classes take turns, one image each, so that they stay balanced. The least used rows come first, with ties broken
        by `generator`. Rows used `max_uses` times are left out unless `worn` is set; rows older than `max_age` and rows
        in `excluding` always are. It is up to the caller to count a shortfall if fewer rows are returned.
        """
        self._step = max(self._step, step)
        if not count:
            return []
        tie = torch.rand(len(self._entries), generator=generator, dtype=torch.float64).tolist()
        queues = []
        for label in range(self.num_classes) if labels is None else labels:
            rows = [row for row in self._usable(label, is_ood, step, worn) if row not in excluding]
            if rows:
                queues.append(sorted(rows, key=lambda row: (self._uses[row], tie[row]), reverse=True))
        chosen: list[int] = []
        while queues and len(chosen) < count:
            queues.sort(key=lambda queue: (self._uses[queue[-1]], tie[queue[-1]]))
            for queue in queues[: count - len(chosen)]:
                chosen.append(queue.pop())
            queues = [queue for queue in queues if queue]
        for row in chosen:
            self._uses[row] += 1
        self._totals["taken"] += len(chosen)
        return chosen

    def gather(self, rows: list[int]) -> torch.Tensor:
        """The uint8 pixels [N, H, W, 3] of `rows`, on the device."""
        return self.pixels_SHWC.index_select(0, upload(rows, self.device, torch.int64))

    def entry(self, row: int) -> Entry:
        """The entry of the image now in `row`; KeyError if the row is empty."""
        entry = self._entries[row]
        if entry is None:
            raise KeyError(f"row {row} of the reservoir is empty")
        return entry

    def filled(self) -> list[int]:
        """The filled rows of all rings, class by class, each with its ID images before its near-OOD ones."""
        return [row for row, entry in enumerate(self._entries) if entry is not None]

    def held(self, label: int, is_ood: bool) -> list[int]:
        """The filled rows of the ring of (label, role)."""
        return [row for row in self._rows(label, is_ood) if self._entries[row] is not None]

    def fill(self, label: int, is_ood: bool) -> int:
        """How many images the ring of (label, role) holds."""
        return len(self.held(label, is_ood))

    def statistics(self) -> dict[str, float]:
        """Fill level, ages (in steps) and uses of the images now held, and counts so far.

        reuse = uses / images put in since the prefill; if no image is rejected, over a run this is the number of
        generated rows per batch / images_per_step. uses_per_image = uses / all images put in.
        """
        held = self.filled()
        ages = [self._step - self._entries[row].born for row in held]
        return {
            "fill": len(held) / len(self._entries),
            "images": len(held),
            "images_put": self._totals["put"],
            "images_prefilled": self._totals["prefilled"],
            "age_mean": sum(ages) / max(len(held), 1),
            "age_max": max(ages, default=0),
            "uses_mean": sum(self._uses[row] for row in held) / max(len(held), 1),
            "reuse": self._totals["taken"] / max(self._totals["put"] - self._totals["prefilled"], 1),
            "uses_per_image": self._totals["taken"] / max(self._totals["put"], 1),
            "evicted_unused": self._totals["evicted_unused"],
        }

    def state_dict(self) -> dict:
        """The full state: the pixels of filled rows as one tensor, the rest as JSON-ready lists and numbers."""
        held = self.filled()
        return {
            "pixels_NHWC": self.gather(held),
            "rows": held,
            "entries": [asdict(self._entries[row]) for row in held],
            "uses": [self._uses[row] for row in held],
            "next": list(self._next),
            "step": self._step,
            "totals": dict(self._totals),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`.

        Raises:
            ValueError: the state has another number or size of rings.
        """
        pixels_NHWC = state["pixels_NHWC"]
        rows = state["rows"]
        entries = [Entry(**entry) for entry in state["entries"]]
        own = all(row in self._rows(entry.label, entry.is_ood) for row, entry in zip(rows, entries, strict=True))
        if len(state["next"]) != len(self._next) or not own:
            raise ValueError(
                f"state holds {len(state['next'])} rings; expected {len(self._next)} of {self.ring_size} images"
            )
        self._entries, self._uses = [None] * len(self._entries), [0] * len(self._entries)
        for row, entry, uses in zip(rows, entries, state["uses"], strict=True):
            self._entries[row], self._uses[row] = entry, uses
        self._next = list(state["next"])
        self._step, self._totals = state["step"], self._totals | state["totals"]
        if rows:
            self.pixels_SHWC.index_copy_(0, upload(rows, self.device), pixels_NHWC.to(self.device))

    def _ring(self, label: int, is_ood: bool) -> int:
        return label * 2 + int(is_ood)

    def _rows(self, label: int, is_ood: bool) -> range:
        first = self._ring(label, is_ood) * self.ring_size
        return range(first, first + self.ring_size)

    def _usable(self, label: int, is_ood: bool, step: int, worn: bool) -> list[int]:
        rows = self.held(label, is_ood)
        if self.max_age:
            rows = [row for row in rows if step - self._entries[row].born <= self.max_age]
        return rows if worn else [row for row in rows if self._uses[row] < self.max_uses]
