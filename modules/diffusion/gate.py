"""The gate between the slots and the reservoir: decides which generated images may be learned from, and counts why not.

Broken images (non-finite, constant, black, a copy of the source) are always rejected. If the gate is enabled, the
learner judges the others against statistics of the real train images: a positive must look like its class, a near-OOD
image like no class. The learner is passed in as a function that returns features; this module knows no encoder. A
rejected image is generated again a few times, then given up; the mixer fills its row by other means and counts the
shortfall.

Features of a backbone that ends in ReLU and mean pooling are never negative, so their cosines lie between .7 and 1
whatever the image shows (measured: .84 between a held-out image and its own class, .87 between near-OOD images and
their nearest class). Subtracting the mean of the train features first lets cosines use their whole range.

Verdicts are computed on the device and always read exactly one step later, so that which images are accepted does not
depend on timing. The host waits for a verdict only if it is more than a step ahead of the device.

Shapes: N images, D train images, C classes, E feature width, H W pixels.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.staging import in_use, upload
from modules.config import Gate as GateConfig
from modules.diffusion.requests import Request

ACCEPTED = "accepted"
BROKEN = ("non_finite", "black", "constant", "copy")
JUDGED = ("other_class", "unlike_class", "too_close", "too_far")
UNJUDGED = "unjudged"  # finished while no learner judged: before `start_step`, or gate and controller are off
REASONS = (ACCEPTED, *BROKEN, *JUDGED, UNJUDGED)
BLACK_LEVEL = 8  # of 255: an image without a brighter value is black
CONSTANT_SPREAD = 1.0  # of 255: standard deviation below which an image shows nothing
COPY_DISTANCE = 1.0  # of 255: mean difference to the source below which nothing was made
LEAST_TYPICAL = 0.1  # if real images of a class are less similar than this on average, the learner does not know it yet
ALARM_WINDOW = 200  # an alarm looks at this many latest verdicts of a role
ALARM_RATES = (0.05, 0.98)
TOO_FEW = {  # by role (is_ood): what may help if almost no image passes
    False: "a milder strength may do",
    True: "against too_close a higher near_ood.strength or gate.near_ood_quantile, against too_far a lower strength",
}
TOO_MANY = {False: "raise gate.quantile", True: "lower gate.near_ood_quantile"}


@dataclass(frozen=True)
class ClassStatistics:
    """What the real train images of each class look like to the learner."""

    center_E: torch.Tensor  # mean of the unit features of all train images
    means_CE: torch.Tensor  # class means of the centered features, unit length
    thresholds_C: torch.Tensor  # quantile of the similarities of each class's own images: the minimum for a positive
    ood_thresholds_C: torch.Tensor  # a higher quantile of the same: from here on a near-OOD image is too close
    typical_C: torch.Tensor  # mean similarity of each class's own images


STATISTICS = tuple(field.name for field in dataclasses.fields(ClassStatistics))


def class_statistics(
    features_DE: torch.Tensor, labels: list[int], num_classes: int, quantile: float, near_ood_quantile: float
) -> ClassStatistics:
    """Class means, and for each class two quantiles and the mean of cos(z_i, class mean without i) over its images i.

    z are the unit-length features minus their mean over all images, normalized again. The leave-one-out similarity is
    undefined for a class of one image; such a class gets the median over the other classes (1 if there are none).
    """
    unit_DE = torch.nn.functional.normalize(features_DE.float(), dim=1)
    center_E = unit_DE.mean(0)
    z_DE = torch.nn.functional.normalize(unit_DE - center_E, dim=1)
    rows: list[list[int]] = [[] for _ in range(num_classes)]
    for row, label in enumerate(labels):
        rows[label].append(row)
    means, figures = [], []
    for members in rows:
        z_NE = z_DE[upload(members, z_DE.device)]
        total_E = z_NE.sum(0)
        means.append(torch.nn.functional.normalize(total_E, dim=0))
        if len(members) > 1:
            others_NE = torch.nn.functional.normalize(total_E - z_NE, dim=1)
            own_N = (z_NE * others_NE).sum(1)
            ends = (torch.quantile(own_N, q) for q in (quantile, near_ood_quantile))
            figures.append(torch.stack([*ends, own_N.mean()]))
    known_C3 = torch.stack(figures) if figures else torch.ones(1, 3, device=z_DE.device)
    found, typical_3 = iter(figures), known_C3.median(0).values
    filled_C3 = torch.stack([next(found) if len(members) > 1 else typical_3 for members in rows])
    return ClassStatistics(center_E, torch.stack(means), *filled_C3.unbind(1))


def broken_codes(pixels_N3HW: torch.Tensor, stored_NHWC: torch.Tensor, sources_NHWC: torch.Tensor) -> torch.Tensor:
    """Codes [N] int64, indices into REASONS: the first fault of BROKEN that an image has, 0 if it has none.

    Args:
        pixels_N3HW: as decoded, before clamping.
        stored_NHWC, sources_NHWC: uint8 images and their sources, of the same size.
    """
    levels_NX = stored_NHWC.flatten(1).float()
    faults = (
        ~pixels_N3HW.flatten(1).isfinite().all(1),
        levels_NX.amax(1) < BLACK_LEVEL,
        levels_NX.std(1) < CONSTANT_SPREAD,
        (levels_NX - sources_NHWC.flatten(1).float()).abs().mean(1) < COPY_DISTANCE,
    )
    code_N = torch.zeros(len(stored_NHWC), dtype=torch.int64, device=stored_NHWC.device)
    for name, fault_N in reversed(list(zip(BROKEN, faults, strict=True))):
        code_N = torch.where(fault_N, REASONS.index(name), code_N)
    return code_N


def verdicts(
    features_NE: torch.Tensor, labels_N: torch.Tensor, is_ood_N: torch.Tensor, known: ClassStatistics, far_floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N] into REASONS, likeness to the source's class [N], and whether that class is the nearest [N].

    Likeness is the cosine to the mean of the source's class, divided by the average cosine of that class's real images
    (at least LEAST_TYPICAL): 1 is as typical as a real image, however far the learner has been trained.

    A positive passes if the nearest class mean is that of its own class and its cosine to it is at least the class's
    threshold. A near-OOD image passes if its cosine to every class is below that class's near-OOD threshold and the
    largest of these cosines is above `far_floor`.
    """
    unit_NE = torch.nn.functional.normalize(features_NE.float(), dim=1)
    similarity_NC = torch.nn.functional.normalize(unit_NE - known.center_E, dim=1) @ known.means_CE.T
    own_N = similarity_NC.gather(1, labels_N[:, None])[:, 0]
    is_nearest_N = similarity_NC.argmax(1) == labels_N
    code = REASONS.index
    positive_N = torch.where(own_N < known.thresholds_C[labels_N], code("unlike_class"), 0)
    positive_N = torch.where(is_nearest_N, positive_N, code("other_class"))
    negative_N = torch.where(similarity_NC.amax(1) <= far_floor, code("too_far"), 0)
    negative_N = torch.where((similarity_NC >= known.ood_thresholds_C).any(1), code("too_close"), negative_N)
    likeness_N = own_N / known.typical_C[labels_N].clamp(min=LEAST_TYPICAL)
    return torch.where(is_ood_N, negative_N, positive_N), likeness_N, is_nearest_N


@dataclass
class Waiting:
    """Images whose verdicts are being copied to the host."""

    turn: int  # number of `settle` calls before these images were finished
    stored_NHWC: torch.Tensor
    requests: list[Request]
    verdict_N3: torch.Tensor  # code, likeness to the source's class, 1 if that class is nearest; in host memory
    arrived: object = None  # CUDA event recorded after the copy; None: it is already there


class Gate:
    """Takes finished images, passes the good ones on and sends the others back to be generated again."""

    def __init__(
        self,
        cfg: GateConfig,
        *,
        store: Callable[[torch.Tensor], torch.Tensor],
        sources_DHWC: torch.Tensor,
        accept: Callable[[torch.Tensor, list[Request]], None],
        retry: Callable[[Request], None],
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        observe: Callable[[Request, str, float, bool], None] | None = None,
    ):
        """A gate without class statistics: until `refresh` it only looks for broken images.

        Args:
            store: converts decoded pixels [N, 3, H, W] to uint8 [N, size, size, 3], NaN to black.
            sources_DHWC: the train images as stored, uint8.
            accept: takes stored images and their requests.
            retry: takes a request to be generated again.
            embed: the learner's features [N, E] of stored images; needed if the gate or a controller is enabled.
            observe: called for each judged image with (request, reason, likeness to the source's class, whether that
                class is the nearest).
        """
        self.cfg, self.store, self.sources_DHWC = cfg, store, sources_DHWC
        self.accept, self.retry, self.embed, self.observe = accept, retry, embed, observe
        self.known: ClassStatistics | None = None
        self.rejects = False  # whether the learner's verdicts take effect
        self.waiting: deque[Waiting] = deque()
        self.turn = 0
        self.counts: dict[str, dict[int, dict[str, int]]] = {}  # recipe -> class -> reason -> images
        self.given_up = 0
        self.recent = {False: deque(maxlen=ALARM_WINDOW), True: deque(maxlen=ALARM_WINDOW)}  # by is_ood; 1 = accepted

    def due(self, step: int) -> bool:
        """Whether class statistics have to be recomputed at this optimizer step.

        Never before `start_step`, which holds for the controller as well: an untrained learner cannot judge images.
        """
        if self.embed is None or step < self.cfg.start_step:
            return False
        return self.known is None or step % self.cfg.refresh_every == 0

    def refresh(self, features_DE: torch.Tensor, labels: list[int], num_classes: int) -> None:
        """Recompute class statistics from the learner's features; if the gate is enabled, its verdicts now count."""
        quantiles = self.cfg.quantile, self.cfg.near_ood_quantile
        self.known = class_statistics(features_DE, labels, num_classes, *quantiles)
        self.rejects = self.cfg.enabled

    @torch.no_grad()
    def finish(self, pixels_N3HW: torch.Tensor, requests: list[Request]) -> None:
        """Judge finished images on the device; `settle` acts on the verdicts."""
        stored_NHWC = self.store(pixels_N3HW)
        device = stored_NHWC.device
        sources_N = upload([r.source for r in requests], device)
        code_N = broken_codes(pixels_N3HW, stored_NHWC, self.sources_DHWC[sources_N])
        likeness_N, is_nearest_N = torch.zeros(2, len(requests), device=device)
        if self.known is not None:
            labels_N = upload([r.label for r in requests], device)
            is_ood_N = upload([r.is_ood for r in requests], device)
            features_NE = self.embed(stored_NHWC)
            judged_N, likeness_N, is_nearest_N = verdicts(
                features_NE, labels_N, is_ood_N, self.known, self.cfg.far_floor
            )
        else:
            judged_N = torch.full_like(code_N, REASONS.index(UNJUDGED))
        code_N = torch.where(code_N > 0, code_N, judged_N)
        verdict_N3 = torch.stack([code_N.float(), likeness_N, is_nearest_N.float()], 1)
        self.waiting.append(Waiting(self.turn, stored_NHWC, list(requests), *to_host(verdict_N3)))

    def settle(self, everything: bool = False) -> None:
        """Act on the verdicts of images finished before the previous call, or on all. To be called once per step."""
        while self.waiting and (everything or self.waiting[0].turn < self.turn):
            self._act(self.waiting.popleft())
        self.turn += 1

    def _act(self, item: Waiting) -> None:
        if item.arrived is not None:
            item.arrived.synchronize()
        in_use(item.stored_NHWC)
        kept = []
        for row, (request, (code, likeness, is_nearest)) in enumerate(
            zip(item.requests, item.verdict_N3.tolist(), strict=True)
        ):
            reason = REASONS[int(code)]
            of_class = self.counts.setdefault(request.recipe, {}).setdefault(request.label, {})
            of_class[reason] = of_class.get(reason, 0) + 1
            if self.observe is not None and reason not in (*BROKEN, UNJUDGED):
                self.observe(request, reason, likeness, bool(is_nearest))
            passes = reason in (ACCEPTED, UNJUDGED) or (reason in JUDGED and not self.rejects)
            if reason != UNJUDGED or self.embed is None:  # includes verdicts that have no effect
                self.recent[request.is_ood].append(int(reason in (ACCEPTED, UNJUDGED)))
            if passes:
                kept.append(row)
            elif request.attempt < self.cfg.retries:
                self.retry(dataclasses.replace(request, attempt=request.attempt + 1))
            else:
                self.given_up += 1
        if len(kept) == len(item.requests):
            self.accept(item.stored_NHWC, item.requests)
        elif kept:
            rows = upload(kept, item.stored_NHWC.device)
            self.accept(item.stored_NHWC[rows], [item.requests[row] for row in kept])

    def statistics(self) -> dict[str, float]:
        """Share of each verdict by recipe, acceptance rate by role over the last verdicts, and images given up.

        Shares are of the judged images, except that of the unjudged, which is of all finished images.
        """
        rows = {"gate.given_up": self.given_up}
        for recipe, classes in self.counts.items():
            totals = {reason: sum(c.get(reason, 0) for c in classes.values()) for reason in REASONS}
            finished, unjudged = sum(totals.values()), totals[UNJUDGED]
            for reason, count in totals.items():
                if count:
                    of = finished if reason == UNJUDGED else finished - unjudged
                    rows[f"gate.{recipe}.{reason}"] = count / of
        for is_ood, verdicts in self.recent.items():
            if verdicts:
                rows[f"gate.{'near_ood' if is_ood else 'positive'}.passed"] = sum(verdicts) / len(verdicts)
        return rows

    def alarms(self) -> list[str]:
        """A message per role if nearly all or nearly none of its last ALARM_WINDOW images were accepted."""
        found = []
        for is_ood, verdicts in self.recent.items():
            if len(verdicts) < ALARM_WINDOW:
                continue
            rate = sum(verdicts) / len(verdicts)
            verb = "passes" if self.rejects or self.embed is None else "would pass"
            told = f"the gate {verb} {rate:.0%} of {'near-OOD images' if is_ood else 'positives'}"
            if rate <= ALARM_RATES[0]:
                found.append(f"{told}: see the reasons by recipe; {TOO_FEW[is_ood]}")
            elif rate >= ALARM_RATES[1] and self.rejects:
                found.append(f"{told}: it decides nothing; {TOO_MANY[is_ood]} or drop it")
        return found

    def state_dict(self) -> dict:
        """Everything that later verdicts depend on, as tensors and plain values."""
        for item in self.waiting:
            if item.arrived is not None:
                item.arrived.synchronize()
        return {
            "known": None if self.known is None else [getattr(self.known, field) for field in STATISTICS],
            "rejects": self.rejects,
            "turn": self.turn,
            "waiting": [
                [item.turn, item.stored_NHWC, [r.as_dict() for r in item.requests], item.verdict_N3]
                for item in self.waiting
            ],
            "counts": self.counts,
            "given_up": self.given_up,
            "recent": [list(self.recent[False]), list(self.recent[True])],
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        device = self.sources_DHWC.device
        self.known = state["known"] and ClassStatistics(*(tensor.to(device) for tensor in state["known"]))
        self.rejects, self.turn, self.given_up = state["rejects"], state["turn"], state["given_up"]
        self.waiting = deque(
            Waiting(turn, stored.to(device), [Request.from_dict(values) for values in requests], verdict)
            for turn, stored, requests, verdict in state["waiting"]
        )
        self.counts = {
            recipe: {label: dict(c) for label, c in classes.items()} for recipe, classes in state["counts"].items()
        }
        self.recent = {role: deque(state["recent"][role], maxlen=ALARM_WINDOW) for role in (False, True)}


def to_host(values: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Start copying to host memory; returns the copy and the CUDA event that marks its arrival (None: it is there)."""
    if not values.is_cuda:
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
