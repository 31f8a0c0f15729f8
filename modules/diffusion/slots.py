"""The slot engine: continuous batching for denoising.

S slots are in flight at once, each with its own image, prompt, guidance and time grid. A tick is one UNet call, in
which every slot takes its next step. A slot that has finished puts its latent into a queue and is refilled before the
next tick; the queue is decoded in batches of fixed size and passed to `finish`. So every mixture of recipes runs in one
shape, without padding and without bursts, and the cost of generation can be spread evenly over optimizer steps.

Images enter in the order of their index and draw all noise from (seed, "image", index): the slot, the tick and the
neighbors of an image affect its rounding, never its content. All bookkeeping is on the host, which counts the steps
that the device takes and so never has to wait for it.

Shapes: S slots, N images, D train images, T tokens, E text width, h w latent grid, H W pixels.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.staging import upload
from modules.data.masks import latent_edit_mask
from modules.data.synthetic import jigsaw
from modules.diffusion.attention import KeyValueCache
from modules.diffusion.pace import Pace
from modules.diffusion.pipeline import StableDiffusion, to_vae_range
from modules.diffusion.requests import Request
from modules.diffusion.schedule import Grid, StepTable
from modules.diffusion.tick import Tick
from modules.errors import DataError
from modules.runtime import stream


@dataclass(frozen=True)
class Sources:
    """The train images that generation starts from; moments and masks are on the device.

    pixels_DHWC: uint8 at the pipeline's resolution, on any device, for recipes that do not denoise.
    """

    moments_D8hw: torch.Tensor  # fp16 VAE moments
    pixels_DHWC: torch.Tensor | None = None
    masks_DHW: torch.Tensor | None = None  # uint8 0/1 object masks at the pipeline's resolution, for masked edits

    def has_mask(self) -> list[bool] | None:
        """Whether each image has an object in its mask; None without masks."""
        return None if self.masks_DHW is None else self.masks_DHW.flatten(1).any(1).tolist()


class Slots:
    """Makes images: `request` says what they are, `finish` receives them, and the slots decide when and how."""

    def __init__(
        self,
        pipeline: StableDiffusion,
        sources: Sources,
        grids: list[Grid],
        request: Callable[[int], Request],
        context: Callable[[Request], torch.Tensor],
        finish: Callable[[torch.Tensor, list[Request]], None],
        *,
        seed: int,
        slots: int,
        decode_batch: int,
        empty_TE: torch.Tensor | None = None,
        unconditional_rows: int | None = None,
        masked: bool = False,
        kv_cache_gib: float = 2.0,
        staggered: bool = False,
    ):
        """An engine with all slots idle.

        Args:
            grids: every time grid that requests name.
            request: returns the request of an image index.
            context: returns a request's prompt embedding [T, E] on the device.
            finish: takes pixels [N, 3, H, W], nominally in [-1, 1], and their N requests; the next tick or batch
                overwrites the pixels.
            empty_TE: embedding of the empty prompt; None if no request is guided.
            unconditional_rows: rows of a UNet call reserved for guidance, at most S; None: as many as slots if
                `empty_TE` is given and the UNet takes no guidance embedding, else 0.
            masked: whether requests may edit within masks.
            kv_cache_gib: size limit of the cache of prompts' keys and values.
            staggered: fill the slots gradually over one time grid instead of all at once. For an endless sequence of
                images this makes them finish evenly and not in bursts of S; the first ones come half a grid later.
        """
        self.pipeline, self.sources, self.seed = pipeline, sources, seed
        self.request, self.context, self.finish = request, context, finish
        if unconditional_rows is None:
            unconditional_rows = 0 if empty_TE is None or pipeline.guidance_embedding_width else slots
        self.table = StepTable(grids, pipeline.device)
        self.in_flight = Tick(
            pipeline, self.table, slots, unconditional_rows=unconditional_rows, empty_TE=empty_TE, masked=masked
        )
        self.key_values = KeyValueCache(pipeline.unet, kv_cache_gib)
        self.decode = pipeline.decode  # replaced by its compiled form, see `capture`
        self.pool_bytes = 0  # of CUDA graphs captured later, which torch does not count as allocated
        self.decode_batch, self.unconditional_rows, self.staggered = decode_batch, unconditional_rows, staggered
        self.occupants: list[Request | None] = [None] * slots
        self.remaining = [0] * slots  # steps each slot still has to take
        self.ready: deque[tuple[int, Request]] = deque()  # (row of the queue, request) of latents to decode
        size = pipeline.latent_size
        self.ready_Q4hw = torch.zeros(slots + decode_batch, 4, size, size, device=pipeline.device)
        self.retries: deque[Request] = deque()
        self.drawn: deque[Request] = deque()  # requests known but not yet in a slot, in index order
        self.next_index = 0  # of the next request to draw
        self.queue_row = 0  # of the next latent that arrives
        self.pace = Pace(slots)
        self.counts = {"ticks": 0, "admitted": 0, "finished": 0, "busy_rows": 0}

    @property
    def busy(self) -> int:
        """Slots in flight."""
        return sum(occupant is not None for occupant in self.occupants)

    def step(self, images: float) -> int:
        """Take as many ticks as `images` more images cost, evenly over calls (see `Pace`); returns the ticks taken.

        Recipes without denoising cost nothing. After n calls n x `images` images have been made, less those in flight.
        """
        self.pace.release(images, self._draw_ahead)
        self._admit(ahead=False)
        before = self.counts["ticks"]
        while self.pace.tick_is_due and (worked := self.tick(ahead=False)):
            self.pace.credit -= worked
        return self.counts["ticks"] - before

    def tick(self, ahead: bool = True) -> int:
        """Fill idle slots, take one step in all of them and pass finished latents on; returns the number that worked.

        Args:
            ahead: draw further requests whenever slots are idle, as when filling rings before the first step.
        """
        self._admit(ahead)
        working = [slot for slot, occupant in enumerate(self.occupants) if occupant is not None]
        if not working:
            return 0
        self.in_flight.step()
        self.counts["ticks"] += 1
        self.counts["busy_rows"] += len(working)
        for slot in working:
            self.remaining[slot] -= 1
        self._collect([slot for slot in working if self.remaining[slot] == 0])
        return len(working)

    def rehearse(self) -> None:
        """One UNet call and one decode with all slots idle, which stay so: the models run once in their real shapes."""
        self.in_flight.step()
        self.decode(self.ready_Q4hw[: self.decode_batch])

    def drain(self) -> None:
        """Finish every image already begun and all retries, admit no new one, and decode a last, partly empty batch."""
        held, self.drawn = self.drawn, deque()
        while self.busy or self.retries or self.ready:
            if not self.tick(ahead=False):
                self._decode(partial=True)
        self.drawn = held

    def retry(self, request: Request) -> None:
        """Make a rejected image again, before any new one; its cost is added to the pace."""
        self.retries.append(request)
        self.pace.credit += request.cost

    def _draw(self) -> Request:
        request = self.request(self.next_index)
        self.next_index += 1
        return request

    def _draw_ahead(self) -> int:
        """Draw the next request and append it to those waiting for a slot; returns its cost."""
        self.drawn.append(self._draw())
        return self.drawn[-1].cost

    def _peek(self, ahead: bool) -> Request | None:
        """The request that enters next, or None if there is none."""
        if self.retries:
            return self.retries[0]
        if not self.drawn and ahead:
            self._draw_ahead()
        return self.drawn[0] if self.drawn else None

    def _admit(self, ahead: bool) -> None:
        """Move requests into idle slots in order; recipes without denoising pass through at once.

        A request that needs more unconditional rows than a call has left waits, and so do all requests after it. While
        staggered slots are filling, the work that enters is limited to what the ticks so far and the next one could do
        with all slots busy, so that images enter at the pace at which they will finish.
        """
        idle = [slot for slot, occupant in enumerate(self.occupants) if occupant is None]
        entering: list[tuple[int, Request]] = []
        last = self.next_index + 2 * len(self.occupants)  # ends the loop if no request ever takes a slot
        guided = sum(self._guided_now(slot) for slot in range(len(self.occupants)))
        rows = self.counts["busy_rows"] + sum(self.remaining)  # of every image that has entered
        filling = self.staggered and self.counts["ticks"] < self.table.longest
        due = len(self.occupants) * (self.counts["ticks"] + 1) if filling else math.inf
        while (request := self._peek(ahead and self.next_index < last)) is not None:
            if request.denoises:
                needs = self._is_guided(request, request.start)
                if not idle or guided + needs > self.unconditional_rows or rows >= due:
                    break
                guided, rows = guided + needs, rows + request.cost
                entering.append((idle.pop(0), request))
            (self.retries if self.retries else self.drawn).popleft()
            self.counts["admitted"] += 1
            if not request.denoises:
                self._pass_through(request)
        if entering:
            self._enter(entering)

    def _is_guided(self, request: Request, step: int) -> int:
        """Whether a request takes an unconditional row at a step of its grid (0 or 1)."""
        return int(bool(self.unconditional_rows) and request.guidance_scale != 1 and step < request.guided_steps)

    def _guided_now(self, slot: int) -> int:
        occupant = self.occupants[slot]
        if occupant is None:
            return 0
        return self._is_guided(occupant, occupant.num_inference_steps - self.remaining[slot])

    def _enter(self, entering: list[tuple[int, Request]]) -> None:
        """Draw each image's latent and noise and write it into its slot."""
        requests = [request for _, request in entering]
        noises = [self._noise(request) for request in requests]
        device = self.pipeline.device
        sample_N4hw, eps_N4hw = (upload(torch.stack([n[i] for n in noises]), device) for i in (0, 1))
        steps_NK4hw = None
        if self.in_flight.stochastic_steps:
            steps_NK4hw = upload(torch.stack([torch.stack(n[2:]) for n in noises]), device)
        self.in_flight.write(
            [slot for slot, _ in entering],
            [self.table.start_row(r.grid, r.start) for r in requests],
            [r.guidance_scale for r in requests],
            self._latents([r.source for r in requests], sample_N4hw),
            eps_N4hw,
            torch.stack([self._key_values(r) for r in requests]),
            self._masks(requests),
            steps_NK4hw,
        )
        for slot, request in entering:
            self.occupants[slot], self.remaining[slot] = request, request.cost

    def _key_values(self, request: Request) -> torch.Tensor:
        """Text keys and values [T, X] of a request's prompt."""
        key = request.prompt if request.prompt.fixed else None
        return self.key_values.get(key, lambda: self.context(request))

    def _noise(self, request: Request) -> list[torch.Tensor]:
        """Standard normal noises [4, h, w] of an image: for its latent, for its start, and per stochastic step."""
        shape = (4, self.pipeline.latent_size, self.pipeline.latent_size)
        generator = stream(self.seed, "image", *request.identity)
        return [torch.randn(shape, generator=generator) for _ in range(2 + self.in_flight.stochastic_steps)]

    def _latents(self, rows: list[int], noise_N4hw: torch.Tensor) -> torch.Tensor:
        moments = self.sources.moments_D8hw
        picked = moments[upload(rows, moments.device)].to(self.pipeline.device, non_blocking=True)
        return self.pipeline.sample_latents(picked, noise_N4hw)

    def _masks(self, requests: list[Request]) -> torch.Tensor | None:
        """Latent masks [N, 1, h, w], 1 where a cell may change; None if nothing is masked."""
        if not self.in_flight.masked:
            return None
        size, masks_DHW = self.pipeline.latent_size, self.sources.masks_DHW
        masks = []
        for r in requests:
            if r.mask_edit == "none":
                masks.append(torch.ones(1, size, size, device=self.pipeline.device))
            else:
                masks.append(latent_edit_mask(masks_DHW[r.source][None], r.mask_edit, r.mask_dilation_px, size))
        return torch.stack(masks)

    def _pass_through(self, request: Request) -> None:
        """Make an image without denoising: its patches permuted, with or without a pass through encode and decode."""
        generator = stream(self.seed, "jigsaw", *request.identity)
        shuffled_HWC = jigsaw(self.sources.pixels_DHWC[request.source], request.jigsaw_grid, generator)
        pixels_1HWC = upload(shuffled_HWC[None], self.pipeline.device)
        if request.recipe == "jigsaw":
            self.counts["finished"] += 1
            self.finish(to_vae_range(pixels_1HWC).to(self.pipeline.dtype), [request])
            return
        noise = upload(self._noise(request)[0][None], self.pipeline.device)
        self._queue(self.pipeline.sample_latents(self.pipeline.encode_moments(pixels_1HWC), noise), [request])

    def _collect(self, slots: list[int]) -> None:
        """Free finished slots and queue their latents in index order, regardless of the slots they were in."""
        if not slots:
            return
        slots.sort(key=lambda slot: self.occupants[slot].identity)
        requests = [self.occupants[slot] for slot in slots]
        for slot in slots:
            self.occupants[slot] = None
        self._queue(self.in_flight.z_S4hw[upload(slots, self.pipeline.device)], requests)

    def _queue(self, z_N4hw: torch.Tensor, requests: list[Request]) -> None:
        rows = [(self.queue_row + i) % len(self.ready_Q4hw) for i in range(len(requests))]
        self.queue_row = (self.queue_row + len(requests)) % len(self.ready_Q4hw)
        self.ready_Q4hw.index_copy_(0, upload(rows, self.pipeline.device), z_N4hw)
        self.ready.extend(zip(rows, requests, strict=True))
        self._decode()

    def _decode(self, partial: bool = False) -> None:
        """Decode full batches of the queue, and with `partial` the rest too, padded to the same shape."""
        while len(self.ready) >= self.decode_batch or (partial and self.ready):
            batch = [self.ready.popleft() for _ in range(min(self.decode_batch, len(self.ready)))]
            rows = [row for row, _ in batch]
            rows += rows[:1] * (self.decode_batch - len(rows))
            pixels_N3HW = self.decode(self.ready_Q4hw[upload(rows, self.pipeline.device)])
            self.counts["finished"] += len(batch)
            self.finish(pixels_N3HW[: len(batch)], [request for _, request in batch])

    def _grids(self) -> list[list]:
        """The grids in the order of their rows in the table, which the state of slots in flight counts in."""
        return [list(key) for key in self.table.grids]

    def state_dict(self) -> dict:
        """Everything that later ticks read, as tensors and plain values."""
        return {
            "grids": self._grids(),
            "in_flight": self.in_flight.state_dict(),
            "ready_Q4hw": self.ready_Q4hw,
            "ready": [[row, request.as_dict()] for row, request in self.ready],
            "occupants": [occupant and occupant.as_dict() for occupant in self.occupants],
            "remaining": list(self.remaining),
            "retries": [request.as_dict() for request in self.retries],
            "drawn": [request.as_dict() for request in self.drawn],
            "next_index": self.next_index,
            "queue_row": self.queue_row,
            "counts": dict(self.counts),
        } | self.pace.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`; on a CPU the engine then continues bit for bit.

        Raises:
            DataError: the state is of other time grids, as those of another version of this program may be.
        """
        grids = self._grids()
        if state.get("grids", grids if len(grids) == 1 else None) != grids:  # older states of one grid do not name it
            raise DataError(
                "the images in flight in this run's checkpoint are on other time grids than this version of the program "
                "uses; go on with the version that began the run, or set run.name to begin another"
            )
        self.in_flight.load_state_dict(state["in_flight"])
        self.ready_Q4hw.copy_(state["ready_Q4hw"])
        self.ready = deque((row, Request.from_dict(values)) for row, values in state["ready"])
        self.occupants = [values and Request.from_dict(values) for values in state["occupants"]]
        for slot, request in enumerate(self.occupants):
            if request is not None:
                self.in_flight.kv_RTX[slot] = self._key_values(request)
        self.retries = deque(map(Request.from_dict, state["retries"]))
        self.drawn = deque(map(Request.from_dict, state["drawn"]))
        self.remaining = list(state["remaining"])
        self.next_index, self.queue_row = state["next_index"], state["queue_row"]
        self.pace.load_state_dict(state)
        self.counts = dict(state["counts"])
