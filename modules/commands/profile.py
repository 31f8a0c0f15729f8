"""`trainer.py profile CONFIG`: shows where the time of a step goes, and what would shorten it.

Real steps are timed without a profiler; a few more run under one for the list of operations and a Chrome trace. A
matrix product and a copy are measured in the same run, so that utilization is relative to the best this machine reaches
and not to a data sheet. profile.json and trace.json are written to profile/ in the run's directory.

    --steps=N      steps to time (12)
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from kernels import backend
from modules.commands.advice import LAUNCH_BOUND, Advice, Facts, advise
from modules.commands.flags import FLAGS, number, split_flags
from modules.commands.preparation import load_generation, opened, print_card, thrown_away
from modules.commands.profile_trace import Trace, find_syncs, trace_steps
from modules.console import Console
from modules.data.views import VIEWS
from modules.learning.encoder import choose_arch
from modules.phases import STEP_PHASES
from modules.rules import batch_rows, generated_rows
from modules.runtime import DTYPES, auto_pipeline_dtype, auto_precision, environment
from modules.settings import load_config
from modules.training import costs, stages
from modules.training.job import Job, State
from modules.training.memory_plan import MemoryPlan, memory_plan
from modules.training.timing import Ceilings, Timing, measure_ceilings, time_steps, window

TOP = 12  # operations listed
OPTIMIZER_PASSES = {"sgd": 5, "adamw": 7}  # fp32 reads and writes per parameter: weight, gradient, moments


@dataclasses.dataclass(frozen=True)
class PartRow:
    """One part of a step: its time, its rate, and that rate as a share of the ceiling."""

    name: str
    ms: float  # per step
    rate: float  # TFLOP/s or GiB/s
    of_ceiling: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """All measurements of a step, and the advice drawn from them."""

    timing: Timing
    trace: Trace
    parts: list[PartRow]  # parts that compute
    bandwidth: list[PartRow]  # phases that move bytes
    ceilings: dict[str, Ceilings]  # by "learner" and "generator"
    plan: MemoryPlan
    facts: Facts
    syncs: list[str] | None  # None on a CPU
    advices: list[Advice]


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[[State], None]
) -> dict:
    """Time, trace, compare with ceilings, advise; returns the content of profile.json."""
    flags, overrides = split_flags(overrides, FLAGS["profile"])
    config, origins = load_config(path, overrides)
    least = number(flags, "steps", 12, low=2)
    with opened(config, origins, console, "profile") as job:
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        with job.stage("tokens") as progress:
            console.line(f"  class tokens: {load_generation(job, progress, learn=False)}")
        print_card(job)
        with job.stage("profile") as progress:
            found = _measure(job, thrown_away(job, progress), step, least, progress)
        _print(console, found)
        report = _report(found)
        job.workdir.write_json("profile.json", report)
        console.line(f"written: {job.workdir.path / 'profile.json'}")
        console.line(f"         {job.workdir.path / 'trace.json'} (open in ui.perfetto.dev or chrome://tracing)")
    return report


def _measure(
    job: Job, state: State, step: Callable[[State], None], least: int, progress: Callable[..., None]
) -> Profile:
    timing = time_steps(state, step, window(state, least))
    progress(1, 4, "timed")
    trace = trace_steps(state, step, _traced_steps(state), job.workdir.path / "trace.json")
    progress(2, 4, "traced")
    syncs = find_syncs(state, step, _traced_steps(state))
    ceilings = _ceilings(job)
    progress(3, 4, "ceilings measured")
    parts, bandwidth = _part_rows(job, state, timing, ceilings), _bandwidth_rows(job, state, timing, ceilings)
    plan = memory_plan(job)
    progress(4, 4, "memory counted")
    facts = _facts(job, state, timing, trace, parts, syncs)
    return Profile(timing, trace, parts, bandwidth, ceilings, plan, facts, syncs, advise(facts))


def _report(found: Profile) -> dict:
    """The content of profile.json."""
    plan = found.plan
    return {
        "timing": dataclasses.asdict(found.timing),
        "parts": [dataclasses.asdict(row) for row in found.parts],
        "bandwidth": [dataclasses.asdict(row) for row in found.bandwidth],
        "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in found.ceilings.items()},
        "operations": [dataclasses.asdict(operation) for operation in found.trace.operations[:50]],
        "launches_per_step": found.trace.launches,
        "device_busy_share": found.facts.busy if found.facts.on_gpu else None,
        "syncs": found.syncs,
        "memory": [dataclasses.asdict(part) for part in plan.parts] + [{"name": "peak", "bytes": plan.peak}],
        "advice": [dataclasses.asdict(advice) for advice in found.advices],
        "environment": environment(),
    }


def _traced_steps(state: State) -> int:
    """Number of steps to trace: three, or more if needed to include a tick."""
    if state.generator is None or not state.config.generation.images_per_step:
        return 3
    generation = state.config.generation
    cost = sum(state.generator.recipes.request(i).cost for i in range(32)) / 32
    if not cost:  # jigsaws only, which take no tick
        return 3
    return max(3, math.ceil(generation.slots / (generation.images_per_step * cost)) + 1)


def _ceilings(job: Job) -> dict[str, Ceilings]:
    """Ceilings of "learner" and, if there is a pipeline, "generator", each measured in the dtype it computes in."""
    dtypes = {"learner": job.runtime.precision.value}
    if job.pipeline is not None:
        dtypes["generator"] = job.pipeline.dtype
    measured = {dtype: measure_ceilings(job.device, dtype) for dtype in set(dtypes.values())}
    return {name: measured[dtype] for name, dtype in dtypes.items()}


def _part_rows(job: Job, state: State, timing: Timing, ceilings: dict[str, Ceilings]) -> list[PartRow]:
    """UNet, VAE decode and encoder: ms per step, TFLOP/s, share of the matrix ceiling; other generation: ms alone."""
    rows = []

    def add(name: str, ms: float, flop: float, kind: str) -> None:
        rate = flop / ms / 1e9 if ms else 0.0
        rows.append(PartRow(name, ms, rate, rate / ceilings[kind].tflop_per_s))

    if state.generator is not None:
        slots, decode_batch = state.generator.slots, job.config.generation.decode_batch
        tick_rows = len(slots.occupants) + slots.unconditional_rows
        add(f"UNet, {tick_rows} rows a call", timing.part_ms["unet"],
            timing.ticks * costs.unet_cost(job.pipeline, tick_rows).flop, "generator")  # fmt: skip
        add(f"VAE decode, {decode_batch} a call", timing.part_ms["vae"],
            timing.images * costs.decode_cost(job.pipeline, decode_batch).flop / decode_batch, "generator")  # fmt: skip
        text_ms = timing.part_ms["text"]
        rest = timing.phase_ms["generate"] - sum(timing.part_ms.values())
        rows.append(PartRow("text encoder", text_ms, 0.0, 0.0))
        rows.append(PartRow("generation, the rest", max(0.0, rest), 0.0, 0.0))
    size, precision = job.config.data.image_size, job.runtime.precision.value
    views = VIEWS * round(batch_rows(job.config))
    forward = costs.encoder_cost(state.encoder, views, size, precision, training=False).flop
    both = costs.encoder_cost(state.encoder, views, size, precision, training=True).flop
    add(f"encoder forward, {views} views", timing.phase_ms["encode"], forward, "learner")
    add("encoder backward", timing.phase_ms["backward"], both - forward, "learner")
    return rows


def _bandwidth_rows(job: Job, state: State, timing: Timing, ceilings: dict[str, Ceilings]) -> list[PartRow]:
    """Phases limited by memory traffic: GiB/s, counting the bytes they must move, and share of the copy ceiling."""
    pixels = round(batch_rows(job.config)) * job.config.data.image_size**2 * 3
    numbers = sum(p.numel() for p in state.encoder.parameters())
    passes = OPTIMIZER_PASSES.get(job.config.learning.optimizer.removesuffix("8bit"), 5)
    moved = {
        "mix": 2 * pixels,
        "augment": pixels + 2 * pixels * job.runtime.precision.value.itemsize,
        "optimize": passes * 4 * numbers,
    }
    rows = []
    for name, count in moved.items():
        ms = timing.phase_ms.get(name, 0.0)
        rate = count / 2**30 / ms * 1e3 if ms else 0.0
        rows.append(PartRow(name, ms, rate, rate / ceilings["learner"].gib_per_s))
    return rows


def _facts(
    job: Job, state: State, timing: Timing, trace: Trace, parts: list[PartRow], syncs: list[str] | None
) -> Facts:
    slots = None if state.generator is None else state.generator.slots
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Facts(
        config=job.config,
        on_gpu=state.meter.on_gpu,
        step_ms=timing.step_ms,
        phase_ms=timing.phase_ms,
        part_ms=timing.part_ms,
        needed=generated_rows(job.config),
        unconditional_rows=0 if slots is None else slots.unconditional_rows,
        arch=choose_arch(job.config.encoder.arch, job.config.data.image_size).value,
        precision=names[job.runtime.precision.value],
        pipeline_dtype=names[job.runtime.pipeline_dtype.value],
        auto_precision=names[auto_precision(job.device, job.config.data.image_size).value],
        auto_pipeline_dtype=names[auto_pipeline_dtype(job.device).value],
        views=backend.choose("views", device=job.device).name,
        kl_decoder=job.pipeline is not None and type(job.pipeline.vae).__name__ == "AutoencoderKL",
        family="" if job.pipeline is None else job.pipeline.family,
        busy=min(1.0, trace.busy_ms / timing.step_ms) if state.meter.on_gpu else 1.0,
        unet_utilization=parts[0].of_ceiling if slots is not None else 1.0,
        syncs=tuple(syncs or ()),
        threads=torch.get_num_threads(),
        cores=environment()["cores"] or 1,
    )


def _print(console: Console, found: Profile) -> None:
    timing, trace, facts = found.timing, found.trace, found.facts

    def share(ms: float) -> str:
        return f"{100 * ms / timing.step_ms:.0f} %"

    phases = [(name, timing.phase_ms[name]) for name in STEP_PHASES if name in timing.phase_ms]
    title = f"step: {timing.step_ms:.1f} ms over {timing.steps} steps, {timing.images:.2f} images a step"
    console.table(title, ["phase", "ms", "share"], [[name, f"{ms:.1f}", share(ms)] for name, ms in phases])
    rows = [
        [row.name, f"{row.ms:.1f}", share(row.ms)]
        + ([f"{row.rate:.3g}", f"{100 * row.of_ceiling:.0f} %"] if row.rate else ["", ""])
        for row in found.parts
    ]
    console.table("parts that compute", ["part", "ms", "share", "TFLOP/s", "of ceiling"], rows)
    rows = [[row.name, f"{row.ms:.1f}", f"{row.rate:.3g}", f"{100 * row.of_ceiling:.0f} %"] for row in found.bandwidth]
    console.table("parts that move bytes", ["phase", "ms", "GiB/s", "of ceiling"], rows)
    for name, best in found.ceilings.items():
        console.line(
            f"  ceilings, {name}: {best.tflop_per_s:.3g} TFLOP/s, {best.gib_per_s:.3g} GiB/s ({best.what}, this run)"
        )
    kind = "kernels" if facts.on_gpu else "operators"
    rows = [[op.name, f"{op.ms:.2f}", f"{100 * op.ms / trace.busy_ms:.0f} %", f"{op.calls:.0f}"]
            for op in trace.operations[:TOP]]  # fmt: skip
    console.table(f"top {kind} under the profiler ({trace.launches:.0f} a step)", [kind, "ms", "share", "calls"], rows)
    rows = [[part.name, part.kind, _mib(part.bytes)] for part in found.plan.parts]
    console.table("memory by part", ["part", "", "MiB"], [*rows, ["needed at once", "", _mib(found.plan.peak)]])
    console.line(
        f"  measured peak: {timing.peak_gib:.2f} GiB of {'tensors and captured graphs' if facts.on_gpu else 'the whole process'}"
    )
    console.line(f"  launch-bound: {_launch_line(facts, trace)}")
    waits = "does not apply: a CPU has nothing to wait for" if found.syncs is None else ", ".join(found.syncs) or "none"
    console.line(f"  waits for the device in a step: {waits}")
    console.line("the changes most likely to help:")
    for place, advice in enumerate(found.advices, 1):
        saves = f"about {advice.saves_ms:.0f} ms ({share(advice.saves_ms)}) a step"
        console.line(f"  {place}. {advice.change}: {saves}; {advice.reason}")


def _launch_line(facts: Facts, trace: Trace) -> str:
    if not facts.on_gpu:
        return "does not apply: operators run as they are called"
    idle = f"the GPU has work in {100 * facts.busy:.0f} % of a step, {trace.launches:.0f} kernels of "
    idle += f"{1e3 * trace.busy_ms / max(1.0, trace.launches):.0f} us on average"
    return f"{'yes' if facts.busy < LAUNCH_BOUND else 'no'}, {idle}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
