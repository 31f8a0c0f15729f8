"""Makes class-balanced batches: the same real rows in every arm of an experiment, plus generated rows.

A batch is P classes x K real rows drawn from (seed, "batch", step), then further real rows if an arm asks for them,
then generated positives of the batch's classes, then near-OOD rows. Generated rows accumulate as exact fractions, so
over a run their number matches `synthetic_fraction`, and their split `near_ood_fraction`, to within one row, whatever
the batch size. The cost of generation (`images_per_step`) has no influence on the real rows drawn, so arms with
different ratios see the same real images under the same views.

Legend: D images, B rows, N rows of one kind, P classes and K rows a class in a batch, H W C pixels.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from kernels.staging import upload
from modules.config import Generation, Learning
from modules.data.reservoir import Reservoir
from modules.errors import ConfigError, DataError
from modules.runtime import stream

COUNTED = ("batches", "rows", "positives", "near_ood", "positives_short", "near_ood_overused", "near_ood_short")


@dataclass(frozen=True)
class Batch:
    """Rows in this order: P x K real, further real, generated positives, near-OOD. Real rows replace missing ones."""

    images_BHWC: torch.Tensor  # uint8, device
    labels_B: torch.Tensor  # int64, device: class of the source, >= 0 for near-OOD rows too
    is_ood_B: torch.Tensor  # bool, device
    sources: list[int]  # train-set row of each row's source image, on the host
    entries: list[int]  # image_index of generated rows, -1 for real ones, on the host


class Mixer:
    """Makes the batch of any step; apart from the reservoir's use counts, its only state is its own counters."""

    def __init__(
        self,
        pixels_DHWC: torch.Tensor,
        labels_D: torch.Tensor,
        reservoir: Reservoir,
        generation: Generation,
        learning: Learning,
        seed: int,
        roundtrip_DHWC: torch.Tensor | None = None,
    ):
        """A mixer over the train split: uint8 pixels and int64 labels in [0, reservoir.num_classes).

        roundtrip_DHWC: the same images after encode and decode, needed if `generation.roundtrip_fraction` > 0.

        Raises:
            DataError: a class has no image.
            ConfigError: a batch has more classes than there are, or roundtrip images are needed and missing.
        """
        self.reservoir, self.seed = reservoir, seed
        self._pixels_DHWC, self._roundtrip_DHWC = pixels_DHWC, roundtrip_DHWC
        self._labels = labels_D.tolist()
        self._rows_of = [[] for _ in range(reservoir.num_classes)]
        for row, label in enumerate(self._labels):
            self._rows_of[label].append(row)
        self._learning = learning
        self._fraction, self._near_ood_fraction, self._roundtrip_fraction = (
            Fraction(str(share))  # exactly the decimal in the config, so that .4 of 80 rows is 32 and not 31.999
            for share in (generation.synthetic_fraction, generation.near_ood_fraction, generation.roundtrip_fraction)
        )
        self._check()
        self.warnings = pair_warnings(learning, [len(rows) for rows in self._rows_of])
        self._counts = dict.fromkeys(COUNTED, 0)

    def requested(self, step: int) -> tuple[int, int]:
        """How many (positives, near-OOD rows) the batch of `step` asks for.

        With p positives and o near-OOD rows per step on average, the sums over steps 0 to t-1 are floor(t p) and
        ceil(t o). Each is within one row of its target, and their sum is within one row of t (p + o).
        """
        balanced = self._learning.classes_per_batch * self._learning.rows_per_class
        generated = balanced * self._fraction / (1 - self._fraction)
        near_ood = generated * self._near_ood_fraction
        positives = generated - near_ood
        return (
            math.floor((step + 1) * positives) - math.floor(step * positives),
            math.ceil((step + 1) * near_ood) - math.ceil(step * near_ood),
        )

    def batch(self, step: int) -> Batch:
        """The batch of `step`; generated rows come from the reservoir's current content, and their uses grow by one.

        If the reservoir falls short, a missing positive is replaced by a real image of the batch's classes, and a
        missing near-OOD image by one that has reached `max_uses`, or else by a real image. Both cases are counted.
        """
        classes = self._classes(step)
        queues = [self._queue(label, step) for label in classes]
        in_turn = (next(queue) for queue in itertools.cycle(queues))  # further images, one class after another
        real = [next(queue) for queue in queues for _ in range(self._learning.rows_per_class)]
        real += itertools.islice(in_turn, self._learning.extra_real_rows)

        generator = stream(self.seed, "take", step)
        want_positives, want_near_ood = self.requested(step)
        positives = self.reservoir.take(classes, False, step, want_positives, generator)
        near_ood = self.reservoir.take(None, True, step, want_near_ood, generator)
        missing = want_near_ood - len(near_ood)
        overused = self.reservoir.take(None, True, step, missing, generator, worn=True, excluding=near_ood)
        positives_short, near_ood_short = want_positives - len(positives), missing - len(overused)

        self._count(
            batches=1,
            rows=len(real) + want_positives + want_near_ood,
            positives=len(positives),
            near_ood=want_near_ood - near_ood_short,
            positives_short=positives_short,
            near_ood_overused=len(overused),
            near_ood_short=near_ood_short,
        )
        blocks = [
            (self._real(real, step), real, False),
            (self.reservoir.gather(positives), positives, True),
            self._stand_ins(in_turn, positives_short),
            (self.reservoir.gather(near_ood + overused), near_ood + overused, True),
            self._stand_ins(in_turn, near_ood_short),
        ]
        return self._assemble(blocks)

    def statistics(self) -> dict[str, float]:
        """Requested and realized shares over all batches so far; shortfalls as shares of generated rows requested."""
        counts = self._counts
        generated = counts["positives"] + counts["near_ood"]
        short = counts["positives_short"] + counts["near_ood_short"]
        return {
            "requested_fraction": (generated + short) / max(counts["rows"], 1),
            "realized_fraction": generated / max(counts["rows"], 1),
            "requested_near_ood": (counts["near_ood"] + counts["near_ood_short"]) / max(generated + short, 1),
            "realized_near_ood": counts["near_ood"] / max(generated, 1),
            "shortfall": short / max(generated + short, 1),
            "overused": counts["near_ood_overused"] / max(generated + short, 1),
        }

    def state_dict(self) -> dict:
        """The counters, JSON-ready; draws are functions of the step and need no state."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: dict) -> None:
        """Restore the counters of a `state_dict`."""
        self._counts = dict(state["counts"])

    def _check(self) -> None:
        check_balance(self._learning, [len(rows) for rows in self._rows_of])
        if self._roundtrip_fraction and self._roundtrip_DHWC is None:
            raise ConfigError(
                f"generation.roundtrip_fraction is {float(self._roundtrip_fraction)}, but there is no pipeline that "
                "could pass real images through encode and decode; set it to 0"
            )

    def _classes(self, step: int) -> list[int]:
        order = torch.randperm(len(self._rows_of), generator=stream(self.seed, "batch", step))
        return order[: self._learning.classes_per_batch].tolist()

    def _queue(self, label: int, step: int) -> Iterator[int]:
        """An endless iterator over a class's images in this step's order; none comes twice before each came once."""
        rows = self._rows_of[label]
        order = torch.randperm(len(rows), generator=stream(self.seed, "batch", step, label)).tolist()
        return itertools.cycle([rows[position] for position in order])

    def _real(self, rows: list[int], step: int) -> torch.Tensor:
        """The pixels of `rows`, of which `roundtrip_fraction` have passed through encode and decode."""
        images_NHWC = self._pixels(self._pixels_DHWC, rows)
        due = self._roundtrip_fraction * len(rows)
        count = math.floor((step + 1) * due) - math.floor(step * due)
        if count:
            chosen = torch.randperm(len(rows), generator=stream(self.seed, "roundtrip", step))[:count]
            changed_NHWC = self._pixels(self._roundtrip_DHWC, [rows[position] for position in chosen.tolist()])
            images_NHWC.index_copy_(0, upload(chosen, images_NHWC.device), changed_NHWC)
        return images_NHWC

    def _stand_ins(self, in_turn: Iterator[int], count: int) -> tuple[torch.Tensor, list[int], bool]:
        rows = list(itertools.islice(in_turn, count))
        return self._pixels(self._pixels_DHWC, rows), rows, False

    def _pixels(self, pixels_DHWC: torch.Tensor, rows: list[int]) -> torch.Tensor:
        picked_NHWC = pixels_DHWC.index_select(0, upload(rows, pixels_DHWC.device, torch.int64))
        return upload(picked_NHWC, self.reservoir.device)

    def _assemble(self, blocks: list[tuple[torch.Tensor, list[int], bool]]) -> Batch:
        """Join blocks of (pixels, rows, is generated); rows are the reservoir's if generated, else the train set's."""
        entries = [self.reservoir.entry(row) if generated else None for _, rows, generated in blocks for row in rows]
        rows = [row for _, block_rows, _ in blocks for row in block_rows]
        sources = [row if entry is None else entry.source for row, entry in zip(rows, entries, strict=True)]
        labels = [self._labels[row] if entry is None else entry.label for row, entry in zip(rows, entries, strict=True)]
        device = self.reservoir.device
        return Batch(
            images_BHWC=torch.cat([pixels_NHWC for pixels_NHWC, _, _ in blocks]),
            labels_B=upload(labels, device, torch.int64),
            is_ood_B=upload([entry is not None and entry.is_ood for entry in entries], device, torch.bool),
            sources=sources,
            entries=[-1 if entry is None else entry.image_index for entry in entries],
        )

    def _count(self, **added: int) -> None:
        for name, number in added.items():
            self._counts[name] += number


def check_balance(learning: Learning, images_per_class: list[int]) -> None:
    """Check that class-balanced batches can be drawn from these numbers of train images, before anything is learned.

    Raises:
        DataError: a class has no image.
        ConfigError: a batch has more classes than there are.
    """
    if 0 in images_per_class:
        raise DataError(
            f"class {images_per_class.index(0)} of {len(images_per_class)} has no train image; add one, or take the class "
            "out of the set"
        )
    if learning.classes_per_batch > len(images_per_class):
        raise ConfigError(
            f"learning.classes_per_batch is {learning.classes_per_batch}, but the train split has "
            f"{len(images_per_class)} classes; set it to {len(images_per_class)} or fewer"
        )


def pair_warnings(learning: Learning, images_per_class: list[int]) -> tuple[str, ...]:
    """What SupCon's positives lack with these numbers of train images, one sentence each; () if nothing."""
    if learning.method != "supcon":
        return ()
    K = learning.rows_per_class
    warnings = []
    if K < 2:
        warnings.append(
            "learning.rows_per_class is 1: the only positive of a real row is its own other view, as in SimCLR; "
            "set it to 2 or more for class-mates"
        )
    single = [label for label, count in enumerate(images_per_class) if count < 2]
    if single and K > 1:
        warnings.append(
            f"{len(single)} of {len(images_per_class)} classes have one train image (first: class {single[0]}): "
            "their class-mates are views of that image"
        )
    return tuple(warnings)
