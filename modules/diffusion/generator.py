"""The generator: pipeline, tokens, recipes, slots, gate, controller and reservoir behind one call, `advance(step)`.

It reads the VAE moments of the train images and writes uint8 rows of the reservoir, without files, PIL or numpy.
"""

import math
from collections.abc import Callable

import torch

from kernels.pixels import pixels
from modules.config import Config, Generation
from modules.data.reservoir import Entry, Reservoir
from modules.diffusion.conditioning import Conditioning
from modules.diffusion.controller import Controller
from modules.diffusion.fit import fit_slots
from modules.diffusion.gate import Gate
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.recipes import POSITIVE, Recipes
from modules.diffusion.requests import Request
from modules.diffusion.slots import Slots, Sources
from modules.diffusion.tokens import PromptBank, Tokens
from modules.errors import ConfigError
from modules.rules import screened, used_strengths

EMBED_ROWS = 256  # train images embedded at once when class statistics are refreshed
PREFILL_PATIENCE = 40  # prefill gives up after this many images made per image wanted
SHARE_IMAGES = 200  # the share of guided steps is counted over this many first images of a run


def prefill_target(generation: Generation, is_ood: bool) -> int:
    """The number of images that a ring must hold before step 0.

    It is the share `prefill` of the ring size for the more frequent role, and for the rarer one less in proportion to
    its frequency: images come in the ratio of the roles, so filling both equally would waste many of the frequent one.
    """
    share = generation.near_ood_fraction if is_ood else 1 - generation.near_ood_fraction
    return round(generation.prefill * generation.ring_size * share / max(share, 1 - share))


class Generator:
    """Keeps the reservoir filled; its state is that of the slots, the gate, the controller and the reservoir."""

    def __init__(
        self,
        config: Config,
        pipeline: StableDiffusion,
        tokens: Tokens | None,
        recipes: Recipes,
        sources: Sources,
        train_DHWC: torch.Tensor,
        reservoir: Reservoir,
        *,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        accelerate: Callable[[Slots], None] | None = None,
    ):
        """A generator with empty slots; `sizes` says how many slots and latents per decode fit, with reasons.

        Args:
            tokens: learned class tokens; None: prompts use the initializer word.
            recipes: the sequence of images to make; a controller of this generator adapts it.
            sources: the train split in the form that generation starts from.
            train_DHWC: the same images as stored for training, uint8, on the device.
            embed: returns the learner's features of stored images, for gate and controller.
            accelerate: makes an engine faster in place; see `fit_slots`.

        Raises:
            OutOfMemory: not even one slot, or the decode of one image, fits.
        """
        self.config, self.reservoir, self.embed = config, reservoir, embed
        self.pipeline, self.sources, self.recipes = pipeline, sources, recipes
        self.train_DHWC, self.num_classes = train_DHWC, recipes.num_classes
        generation, seed = config.generation, config.run.seed
        self.now = 0
        self.provenance: dict[int, Request] = {}  # image index -> request, at least of all images in the reservoir
        bank = PromptBank(pipeline, tokens, config.inversion.initializer)
        self.conditioning = Conditioning(bank, seed)
        bases = dict.fromkeys(config.near_ood.recipes, (config.near_ood.strength,))
        bases[POSITIVE] = tuple(used_strengths(generation))
        enabled = config.controller.enabled
        self.controller = Controller(config.controller, self.num_classes, bases) if enabled else None
        recipes.controller = self.controller  # which adapts strengths and weights of what is requested
        self.gate = Gate(
            config.gate,
            store=self.store,
            sources_DHWC=train_DHWC,
            accept=self._accept,
            retry=lambda request: self.slots.retry(request),
            embed=embed if screened(config) else None,
            observe=self.controller.observe if self.controller else None,
        )
        self.slots, *self.sizes = fit_slots(self._engine, generation.slots, generation.decode_batch, accelerate)

    def store(self, decoded_N3HW: torch.Tensor) -> torch.Tensor:
        """Decoded pixels in the form the reservoir keeps: uint8 [N, size, size, 3], by one antialiased resize."""
        return pixels(decoded_N3HW, self.config.data.image_size)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Do the generation of one optimizer step: act on verdicts, refresh class statistics if due, run the ticks."""
        self.now = step
        self.gate.settle()
        if self.gate.due(step):
            rows = [self.embed(part) for part in self.train_DHWC.split(EMBED_ROWS)]
            self.gate.refresh(torch.cat(rows), self.recipes.labels, self.num_classes)
        if self.controller is not None:
            self.controller.update(step)
        self.slots.step(self.config.generation.images_per_step)

    @torch.no_grad()
    def prefill(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Make images until every ring in use holds its `prefill_target`.

        Raises:
            ConfigError: the rings do not fill, because nearly every image is rejected.
        """
        wanted = self._unfilled()
        total = sum(wanted.values())
        limit = PREFILL_PATIENCE * max(total, 1) + 2 * len(self.slots.occupants)
        while wanted := self._unfilled():
            self.slots.tick()
            self.gate.settle(everything=True)
            if progress is not None:
                progress(total - sum(wanted.values()), total, "images in the reservoir")
            if self.slots.counts["finished"] > limit:
                raise ConfigError(
                    f"generation.prefill: {self.slots.counts['finished']} images were made and "
                    f"{sum(wanted.values())} of {total} places are still empty, because nearly all were rejected; "
                    f"verdicts: {self.gate.statistics()}; look with preview at what the strengths and recipes give"
                )
        self.slots.pace.settle()  # these ticks were taken as needed and paid for retries too: nothing is owed
        self.reservoir.end_prefill()
        if progress is not None and total:
            progress(total, total, "images in the reservoir")

    @torch.no_grad()
    def warm_up(self) -> None:
        """Bring the slots into the state of a run, each at its own step of its grid, to time without a prefill."""
        for _ in range(self.slots.table.longest):
            if self.slots.tick() in (0, len(self.slots.occupants)):
                break
            self.gate.settle(everything=True)
        self.slots.pace.settle()
        self.reservoir.end_prefill()

    def finish(self) -> None:
        """After the last step, act on the pending verdicts, so that every image is counted and kept or rejected."""
        self.gate.settle(everything=True)

    def examples(self) -> list[tuple[torch.Tensor, Request]]:
        """Every image now in the reservoir with its provenance, ordered by class and role."""
        rows = self.reservoir.filled()
        indices = [self.reservoir.entry(row).image_index for row in rows]
        return [(self.reservoir.gather([row])[0], self.provenance[i]) for row, i in zip(rows, indices, strict=True)]

    def statistics(self) -> dict[str, float]:
        """Counts of the slots, the reservoir, the gate and the controller, for a metrics row."""
        counts = self.slots.counts
        rows = {"images_finished": counts["finished"], "ticks": counts["ticks"], "unet_rows": counts["busy_rows"]}
        rows |= self.reservoir.statistics() | self.gate.statistics()
        return rows | (self.controller.statistics() if self.controller else {})

    def state_dict(self) -> dict:
        state = {"slots": self.slots.state_dict(), "gate": self.gate.state_dict(), "now": self.now}
        state["reservoir"] = self.reservoir.state_dict()
        state["provenance"] = [request.as_dict() for request in self._held_provenance().values()]
        return state | ({"controller": self.controller.state_dict()} if self.controller else {})

    def load_state_dict(self, state: dict) -> None:
        self.now = state["now"]
        self.provenance = {values["image_index"]: Request.from_dict(values) for values in state["provenance"]}
        for name in ("slots", "gate", "reservoir", "controller"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])

    def _engine(self, slots: int, decode_batch: int) -> Slots:
        return Slots(
            self.pipeline,
            self.sources,
            self.recipes.grids.every,
            self.recipes.request,
            self.conditioning,
            self.gate.finish,
            seed=self.config.run.seed,
            slots=slots,
            decode_batch=decode_batch,
            empty_TE=self.conditioning.empty() if self.recipes.guided else None,
            unconditional_rows=self._unconditional_rows(slots),
            masked=self.recipes.masked,
            kv_cache_gib=self.config.generation.kv_cache_gib,
            staggered=True,
        )

    def _unconditional_rows(self, slots: int) -> int | None:
        """Unconditional rows of a UNet call if guidance ends early: slots x share of guided steps, plus one.

        None: `Slots` decides and takes a row for each slot or none at all.
        """
        throughout = all(grid.guided_steps >= grid.num_inference_steps for grid in self.recipes.grids.every)
        if throughout or self.pipeline.guidance_embedding_width or not self.recipes.guided:
            return None
        requests = [self.recipes.request(index) for index in range(SHARE_IMAGES)]
        guided = sum(max(0, r.guided_steps - r.start) for r in requests if r.denoises and r.guidance_scale != 1)
        share = guided / max(1, sum(r.cost for r in requests))
        return min(slots, math.ceil(share * slots) + 1)

    def _accept(self, stored_NHWC: torch.Tensor, requests: list[Request]) -> None:
        entries = [Entry(r.label, r.is_ood, r.source, r.recipe, self.now, r.image_index) for r in requests]
        self.reservoir.put_batch(stored_NHWC, entries)
        self.provenance |= {r.image_index: r for r in requests}
        if len(self.provenance) > 2 * len(self.reservoir.pixels_SHWC):
            self.provenance = self._held_provenance()

    def _held_provenance(self) -> dict[int, Request]:
        indices = [self.reservoir.entry(row).image_index for row in self.reservoir.filled()]
        return {index: self.provenance[index] for index in indices}

    def _unfilled(self) -> dict[tuple[int, bool], int]:
        """(class, is near-OOD) -> number of images missing, for the rings that are not filled to their target."""
        targets = {is_ood: prefill_target(self.config.generation, is_ood) for is_ood in (False, True)}
        rings = {
            (label, is_ood): target - self.reservoir.fill(label, is_ood)
            for label in range(self.num_classes)
            for is_ood, target in targets.items()
        }
        return {ring: missing for ring, missing in rings.items() if missing > 0}
