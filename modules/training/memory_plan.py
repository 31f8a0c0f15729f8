"""The device memory that a run needs, part by part, with the settings that change it, and the size of a checkpoint.

Everything is computed from shapes before anything is allocated, so the plan also works for a run that does not fit.
Working memory (what a call holds while it runs) is counted on the meta device. On a CPU phases take turns, so only the
largest counts. On a GPU generation may run beside a training step, and captured graphs keep their working memory, so
the slots are fitted beside such a step (`machine`): the largest of generation is added to the largest of training.
"""

from dataclasses import dataclass

from modules.data.views import VIEWS
from modules.diffusion.attention import layers_of
from modules.diffusion.upsampling import folded_bytes
from modules.learning.encoder import build_encoder
from modules.rules import batch_rows
from modules.training import costs
from modules.training.job import Job

PROVENANCE_BYTES = 900  # size of one request as JSON, measured
HELD, WORKING = "held", "working"


@dataclass(frozen=True)
class Part:
    """One line of the plan."""

    name: str
    bytes: int
    knobs: str  # settings that make it smaller; empty: none
    kind: str = HELD  # HELD for the whole run, or WORKING memory of a call
    saved: bool = False  # part of a checkpoint
    loaded: bool = False  # already allocated once data and pipeline are loaded


@dataclass(frozen=True)
class MemoryPlan:
    """All parts, held ones first."""

    parts: tuple[Part, ...]
    overlapped: bool  # generation and training need working memory at the same time, so that they add up

    @property
    def held(self) -> int:
        return sum(part.bytes for part in self.parts if part.kind == HELD)

    @property
    def working(self) -> int:
        """The largest working memory; if `overlapped`, the largest of generation plus the largest of training."""
        largest = {"training": 0, "generation": 0}
        for part in self.parts:
            if part.kind == WORKING:
                side = "training" if part.name.startswith("encoder") else "generation"
                largest[side] = max(largest[side], part.bytes)
        return sum(largest.values()) if self.overlapped else max(largest.values())

    @property
    def peak(self) -> int:
        """Bytes the run needs at once."""
        return self.held + self.working

    @property
    def to_come(self) -> int:
        """Bytes of the peak that are still to be allocated after data and pipeline are loaded."""
        return self.peak - sum(part.bytes for part in self.parts if part.loaded)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint once every ring is full."""
        return sum(part.bytes for part in self.parts if part.saved)

    def largest(self, count: int = 3) -> list[Part]:
        """The `count` largest parts that settings can make smaller, the largest first."""
        return sorted((p for p in self.parts if p.knobs), key=lambda p: -p.bytes)[:count]


def memory_plan(job: Job) -> MemoryPlan:
    """The plan of a job whose data are loaded, and, if it generates, its pipeline and sources."""
    parts = [*_learner_parts(job)]
    if job.pipeline is not None:
        parts += _generation_parts(job)
    overlapped = job.pipeline is not None and job.device.type == "cuda"
    return MemoryPlan(tuple(sorted(parts, key=lambda part: (part.kind != HELD, -part.bytes))), overlapped)


def _learner_parts(job: Job) -> list[Part]:
    config, sets = job.config, job.sets
    learning, size = config.learning, config.data.image_size
    encoder = build_encoder(config.encoder, size, len(sets.index.classes), config.run.seed)
    numbers = sum(p.numel() for p in encoder.parameters())
    weights = costs.weight_bytes(encoder)
    rows = VIEWS * round(batch_rows(config))
    precision = job.runtime.precision.value
    batch = rows * 3 * size * size * precision.itemsize
    training = costs.encoder_cost(encoder, rows, size, precision, training=True).peak_bytes
    if precision.itemsize < 4:  # autocast keeps copies of the weights, and gradients stay as wide as the weights
        training += 4 * numbers
    on_cpu = job.device.type == "cpu"
    parts = [
        Part("encoder weights", weights, "encoder.arch, encoder.width", saved=True),
        Part("encoder optimizer state", costs.optimizer_bytes(encoder, learning), "learning.optimizer", saved=True),
        Part(
            "train images", _pixels(len(sets.train.items), size), "data.image_size, data.shots_per_class", loaded=on_cpu
        ),
        Part(
            "encoder training step",
            training + batch,
            "learning.classes_per_batch, learning.rows_per_class, run.precision, encoder.arch",
            WORKING,
        ),
    ]
    if learning.ema_decay > 0:
        parts.append(Part("averaged encoder", weights, "learning.ema_decay", saved=True))
    return parts


def _generation_parts(job: Job) -> list[Part]:
    config, sets, pipeline = job.config, job.sets, job.pipeline
    generation, size, count = config.generation, config.data.image_size, len(sets.train.items)
    latent = 4 * pipeline.latent_size**2
    rings = len(sets.index.classes) * 2 * generation.ring_size
    recipes = job.recipes()
    stochastic = max(grid.num_inference_steps * grid.stochastic for grid in recipes.grids.every)
    rows = generation.slots * (1 + (recipes.guided and not pipeline.guidance_embedding_width))
    planes = 2 + stochastic + 3 * recipes.masked  # z, x0_prev; noise of every step; mask, z0 and eps of masked edits
    slots = (generation.slots * planes + generation.slots + generation.decode_batch) * latent * 4
    prompt = costs.prompt_bytes(pipeline)
    cached = costs.prompt_cache_bytes(generation, len(sets.index.classes), pipeline)
    parts = [
        Part("UNet weights", costs.weight_bytes(pipeline.unet), "pipeline.dtype", loaded=True),
        Part("VAE weights", costs.weight_bytes(pipeline.vae), "pipeline.dtype, pipeline.vae", loaded=True),
        Part("text encoder weights", costs.weight_bytes(pipeline.text_encoder), "pipeline.dtype", loaded=True),
        Part("VAE moments of the train images", count * 2 * latent * 2,
             "pipeline.resolution, data.shots_per_class", loaded=True),
        Part("reservoir", _pixels(rings, size), "generation.ring_size, data.image_size", saved=True),
        Part("provenance (host)", rings * PROVENANCE_BYTES, "generation.ring_size", saved=True),
        Part("slots in flight", slots, "generation.slots", saved=True),
        Part("keys and values of prompts in flight", rows * prompt, "generation.slots"),
        Part("keys and values of other prompts", cached, "generation.kv_cache_gib, generation.templates"),
        Part("UNet call", costs.unet_cost(pipeline, rows).peak_bytes,
             "generation.slots, pipeline.resolution, pipeline.dtype", WORKING),
        Part("VAE decode", costs.decode_cost(pipeline, generation.decode_batch).peak_bytes,
             "generation.decode_batch, pipeline.resolution, pipeline.vae", WORKING),
    ]  # fmt: skip
    if job.device.type == "cpu":  # with a GPU they stay on the host
        knobs = "pipeline.resolution, data.shots_per_class"
        parts.append(Part("source images", _pixels(count, pipeline.resolution), knobs, loaded=True))
    if job.sources.masks_DHW is not None:
        parts.append(Part("object masks", job.sources.masks_DHW.nbytes, "pipeline.resolution", loaded=True))
    if generation.roundtrip_fraction > 0:
        parts.append(Part("train images encoded and decoded", _pixels(count, size), "generation.roundtrip_fraction=0"))
    if job.device.type == "cuda" and config.pipeline.compile != "off":
        layers = [layer for layer in layers_of(pipeline.unet) if not layer.is_cross_attention]
        fused = sum(p.nbytes for layer in layers for x in (layer.to_q, layer.to_k, layer.to_v) for p in x.parameters())
        parts.append(Part("fused projections of self-attention", fused, "pipeline.compile"))
        summed = sum(folded_bytes(model) for model in (pipeline.unet, pipeline.vae))
        parts.append(Part("summed weights of upsampling, at most", summed, "pipeline.compile"))
    if job.device.type == "cpu" and pipeline.resolution != size:
        val = len(sets.at_generation["val"].items)
        parts.append(
            Part("val images to be judged", _pixels(val, pipeline.resolution), "pipeline.resolution", loaded=True)
        )
    return parts


def _pixels(count: int, size: int) -> int:
    return count * size * size * 3
