"""How a run generates on this machine: number of slots, attention, compilation, and beside the learner or before it.

Each choice is made once, on idle slots or on copies of the state, and written to `machine.json` with its reason. A run
that is resumed on the same device reads its choices from there, so that it continues with the same engine. The settings
and files that a choice was made for are stored with it: choices made for others (by a run stopped before its first
checkpoint, or by an earlier profile) are ignored.
"""

import copy
import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from kernels import backend
from kernels.attention import products_pay
from kernels.group_norm import swap_group_norm
from modules.data.reservoir import Reservoir
from modules.data.views import two_views
from modules.diffusion import attention, upsampling
from modules.diffusion.capture import accelerate, lay_out
from modules.diffusion.generator import Generator
from modules.diffusion.overlap import Overlap, choose_mode
from modules.diffusion.slots import Slots
from modules.diffusion.tick import Tick
from modules.errors import OutOfMemory
from modules.memory import ran_out
from modules.meter import Meter, timer
from modules.records import read_record
from modules.rules import batch_rows, screened
from modules.runtime import Choice
from modules.settings import flatten, with_settings
from modules.training import costs
from modules.training.job import Job, State
from modules.training.timing import copied, time_steps, window

FILE = "machine.json"
DEPENDS_ON = (  # sections and settings that choices depend on, including all that affect memory and time on the device
    "pipeline.",
    "generation.",
    "near_ood.",
    "gate.",
    "controller.",
    "encoder.",
    "learning.",
    "data.",
    "run.precision",
)
CALIBRATION_STEPS = 8  # least number of joint steps timed in each overlap mode
TUNER_REPEATS = 5  # timed calls, of which the median counts


def build_generator(job: Job, state: State, train_DHWC: torch.Tensor, reservoir: Reservoir) -> Generator:
    """The generator of a job with empty slots, sized to memory, tuned and accelerated; sets `job.choices`.

    Raises:
        OutOfMemory: not even one slot fits beside the learner, or fewer fit than the run had when it was stopped, or
            pipeline.compile is on and the compiled engine does not fit.
        ConfigError: a recipe or an attention backend that cannot be used here.
    """
    kept = _read(job)
    _swap_layers(job)
    lay_out(job.pipeline, job.config.pipeline.compile)
    asked = {name: kept[name][0] for name in ("slots", "decode_batch") if name in kept}
    made: dict[str, Choice] = {}
    models = job.pipeline.unet, job.pipeline.vae

    def faster(slots: Slots) -> None:
        made.clear()
        upsampling.reset_forms(*models)  # an earlier attempt, which did not fit, may have set them
        made["attention"] = _tune_attention(job, slots.in_flight, kept.get("backends", {}))
        made["upsampling"] = _tune_upsampling(job, slots, kept)
        made["tick"] = accelerate(slots, job.config.pipeline.compile, lambda text: job.console.line(f"  {text}"))

    with _room_for_learner(job, state, train_DHWC):
        generator = Generator(
            with_settings(job.config, {f"generation.{name}": value for name, value in asked.items()}),
            job.pipeline,
            job.tokens,
            job.recipes(),
            job.sources,
            train_DHWC,
            reservoir,
            embed=state.embed,
            accelerate=faster,
        )
    sizes = dict(zip(("slots", "decode_batch"), generator.sizes, strict=True))
    for name, value in asked.items():
        if sizes[name].value != value:
            raise OutOfMemory(
                f"this run was begun with generation.{name} {value}, and now only {sizes[name].value} fit beside what "
                "else the device holds; free its memory and start the same command again"
            )
        sizes[name] = Choice(*kept[name])
    job.choices = sizes | (made if "tick" in made else _as_it_is(job, generator.slots))
    _write(job, **{name: [choice.value, choice.reason] for name, choice in job.choices.items()})
    return generator


def _as_it_is(job: Job, slots: Slots) -> dict[str, Choice]:
    """The choices of an engine that only fits unaccelerated: eager, with default attention and upsampling.

    Raises:
        OutOfMemory: pipeline.compile is on.
    """
    if job.config.pipeline.compile == "on":
        raise OutOfMemory(
            f"pipeline.compile is on, and compiled and captured the generator does not fit beside the learner, not even "
            f"with a quarter of {len(slots.occupants)} slots; lower generation.slots, generation.decode_batch or "
            "pipeline.resolution, or set pipeline.compile=auto"
        )
    asked = job.config.pipeline.attention
    backend_name = "sdpa" if asked == "auto" else asked
    for layer in attention.layers_of(job.pipeline.unet):
        layer.processor.backend = backend_name
    upsampling.reset_forms(job.pipeline.unet, job.pipeline.vae)
    return {
        "attention": Choice(
            backend_name, "auto: there is no room to time others" if asked == "auto" else "pipeline.attention"
        ),
        "upsampling": _upsampling_as_it_is(job, "auto: there is no room to time others"),
        "tick": Choice("eager", "auto: compiled and captured it does not fit, not even with a quarter of the slots"),
    }


def choose_overlap(job: Job, state: State, step: Callable[[State], None]) -> None:
    """Set the overlap mode of a state: the one this run chose before, else the one measured now on copies of the state.

    Raises:
        ConfigError: generation.mode asks for a mode that cannot run here.
    """
    if state.generator is None:
        return
    kept = _read(job).get("mode")
    choice = Choice(*kept) if kept else None
    if choice is None:

        def measure(mode: str) -> float:
            try:
                with unchanged(state, Overlap(mode, job.device)) as trial:
                    return time_steps(trial, step, window(trial, CALIBRATION_STEPS)).step_ms
            except (RuntimeError, MemoryError) as error:  # no room for a copy of the state or a second stream
                if mode == "sequential" or not ran_out(error):
                    raise
            gc.collect()
            torch.cuda.empty_cache()
            return math.inf

        choice = choose_mode(job.config.generation.mode, job.device, measure, screened(job.config))
        _write(job, mode=[choice.value, choice.reason])
    state.overlap = Overlap(choice.value, job.device, state.meter.phase)
    job.choices["mode"] = choice
    job.console.line(f"  generation and training: {choice.value} ({choice.reason})")


@contextmanager
def unchanged(state: State, overlap: Overlap) -> Iterator[State]:
    """A trial state that shares its parts with `state` but has its own meter; its changes are undone on exit."""
    trial = replace(state, meter=Meter(next(state.encoder.parameters()).device), overlap=overlap)
    state.meter.restart_peak(state.pool_bytes)  # the trial counts its own
    before = copied(trial.state_dict())
    try:
        yield trial
    finally:
        overlap.wait()  # also needed after a step that failed
        trial.load_state_dict(before)


def _swap_layers(job: Job) -> None:
    """Replace the norms of UNet and VAE by layers that call the Triton kernel, if that is used on this device."""
    if backend.choose("group_norm", device=job.device).name == "triton":
        swap_group_norm(job.pipeline.unet)
        swap_group_norm(job.pipeline.vae)


@contextmanager
def _room_for_learner(job: Job, state: State, train_DHWC: torch.Tensor) -> Iterator[None]:
    """Reserve, while the slots are fitted, the device memory that training will need later.

    That is the memory of a step of the encoder, of the state that its optimizer allocates at the first step, and of the
    prompts cached over time. On a CPU nothing is reserved: there the system's memory is not a fixed bound.
    """
    if job.device.type != "cuda":
        yield
        return
    config, classes = job.config, len(job.sets.index.classes)
    later = costs.optimizer_bytes(state.encoder, config.learning)
    later += costs.prompt_cache_bytes(config.generation, classes, job.pipeline)
    held = torch.empty(_learner_bytes(state, train_DHWC) + later, dtype=torch.uint8, device=job.device)
    try:
        yield
    finally:
        del held


def _learner_bytes(state: State, train_DHWC: torch.Tensor) -> int:
    """Peak device memory that a training step adds to what is held before it, measured on a copy of the encoder."""
    config, learning = state.config, state.config.learning
    rows = math.ceil(batch_rows(config))
    encoder = copy.deepcopy(state.encoder).train()
    images = train_DHWC[:1].expand(rows, -1, -1, -1).contiguous()
    before = torch.cuda.memory_allocated()
    state.meter.restart_peak()
    views = two_views(images, seed=config.run.seed, step=0, learning=learning, out_dtype=state.precision)
    with state.autocast():
        outputs = encoder(views, state.objective.output, [False] * rows)
    outputs.float().square().mean().backward()
    return torch.cuda.max_memory_allocated() - before


def _tune_attention(job: Job, tick: Tick, kept: dict[str, str]) -> Choice:
    """Set the attention backend of every layer and summarize which were chosen; prints the times at each shape."""
    asked, unet = job.config.pipeline.attention, job.pipeline.unet
    if asked in ("auto", "sdpa") and job.device.type != "cuda":
        for layer in attention.layers_of(unet):
            layer.processor.backend = asked
        if asked == "auto" and products_pay(job.pipeline.dtype):
            # chosen by shape, not by time, so that the same run gives the same bits
            return Choice("products where tokens are few, else sdpa", "auto: by shape on a CPU")
        where = "on processors other than Intel's" if job.pipeline.dtype == torch.float32 else "in fp32"
        why = f"auto: on a CPU products pay {where} alone"
        return Choice("sdpa", "pipeline.attention" if asked == "sdpa" else why)
    measure = timer(job.device)
    if asked == "auto":
        job.console.line("  timing the attention backends at each shape of the UNet: this can take a minute")
    timings = attention.tune(unet, tick.step, lambda work: measure(work, TUNER_REPEATS), asked, kept=kept)
    _write(job, backends=attention.chosen(timings))
    for line in attention.describe(timings):
        job.console.line(f"  {line}")
    taken = Counter(layer.processor.backend for layer in attention.layers_of(unet))
    value = ", ".join(f"{name} in {count} layers" for name, count in taken.most_common())
    if kept:
        return Choice(value, "as this run chose before")
    why = "the fastest at each shape; torch's own where that is about as fast"
    return Choice(value, why if asked == "auto" else "pipeline.attention")


def _tune_upsampling(job: Job, slots: Slots, kept: dict) -> Choice:
    """Set the form of every upsampling layer of UNet and decoder, and summarize which were chosen.

    Forms are timed only if the engine is compiled, because which is fastest depends on the memory layout it will run
    in. A run that began without this choice is resumed without it.
    """
    known = kept.get("upsampling_forms", {})
    if job.device.type != "cuda" or job.config.pipeline.compile == "off" or ("tick" in kept and not known):
        return _upsampling_as_it_is(
            job, "as this run began" if "tick" in kept else "timed where the engine is compiled"
        )
    measure, models = timer(job.device), [job.pipeline.unet, job.pipeline.vae]
    forms, timings = upsampling.tune(models, slots.rehearse, lambda work: measure(work, TUNER_REPEATS), known)
    _write(job, upsampling_forms=forms)
    for line in upsampling.describe(timings):
        job.console.line(f"  {line}")
    why = "timed at each shape; diffusers' own in a tie" if timings else "as this run chose before"
    return Choice(upsampling.summary(*models), why)


def _upsampling_as_it_is(job: Job, why: str) -> Choice:
    """The forms used without timing; `why` is the reason given for not timing on a GPU."""
    summary = upsampling.summary(job.pipeline.unet, job.pipeline.vae)
    if job.device.type == "cuda":
        return Choice(summary, why)
    fixed = job.pipeline.dtype == torch.float32
    return Choice(summary, "fp32 on a CPU: the form is fixed" if fixed else "on a CPU other forms are for fp32 alone")


def _read(job: Job) -> dict:
    """The choices this run made before on this device for the same settings and files; {} if any of these differ."""
    path = job.workdir.path / FILE
    found = read_record(path) if path.exists() else {}
    return found if all(found.get(name) == value for name, value in _key(job).items()) else {}


def _write(job: Job, **choices: object) -> None:
    job.workdir.write_json(FILE, _read(job) | _key(job) | choices)


def _key(job: Job) -> dict:
    """What choices are valid for: device, settings and files, passed through JSON so that they compare equal."""
    asked = {name: value for name, value in flatten(job.config).items() if name.startswith(DEPENDS_ON)}
    return json.loads(json.dumps({"device": job.device_name, "asked": asked, "files": job.inputs}))
