"""`trainer.py check CONFIG`: checks the data of a run and predicts its memory, disk use and time before it is started.

The data are read and decoded as in the run, every bad file is listed, memory is planned part by part, the size of a
checkpoint is computed, and a few real steps on a throwaway state predict how long the run will take. The result is
written to check/check.json in the run's directory.

    --untimed      skip the timed steps
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable

import torch

from modules.commands.flags import FLAGS, split_flags
from modules.commands.preparation import cached_tokens, load_generation, opened, print_card, thrown_away
from modules.console import Console, duration
from modules.data.views import VIEWS
from modules.diffusion.generator import prefill_target
from modules.diffusion.inversion import Inversion
from modules.errors import DataError, OutOfMemory, StorageError
from modules.memory import named_memory
from modules.meter import timer
from modules.probes import available_memory
from modules.rules import batch_rows, generates
from modules.settings import load_config
from modules.training import stages
from modules.training.job import Job, State
from modules.training.memory_plan import HELD, MemoryPlan, memory_plan
from modules.training.timing import Timing, time_steps, window

TIMED_STEPS = 4
LISTED_FILES, LISTED_CLASSES = 20, 40
ENCODER_FORWARD_SHARE = 1 / 3  # of the encoder's time in a training step: backward costs about twice the forward pass


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[[State], None]
) -> dict:
    """Check everything a run depends on; returns the content of check.json.

    Raises: as the stages of a run, for errors that prevent further checks; and at the end, after everything was
    reported, for what would stop a run: StorageError for a cache folder that cannot be written, DataError for bad
    files, OutOfMemory if the plan does not fit.
    """
    flags, overrides = split_flags(overrides, FLAGS["check"])
    asked, origins = load_config(path, overrides)
    skips = dataclasses.replace(asked, data=dataclasses.replace(asked.data, on_bad_image="skip"))  # to list them all
    with opened(skips, origins, console, "check") as job:
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        bad = _print_data(job, asked.data.on_bad_image, console)
        if generates(asked):
            with job.stage("tokens") as progress:
                console.line(f"  class tokens: {load_generation(job, progress, learn=False)}")
        print_card(job)
        with named_memory("plan", asked):
            plan = memory_plan(job)
        room = available_memory(job.device)
        fits = _print_memory(console, plan, room)
        report = {
            "sets": {name: len(images.items) for name, images in job.sets.images.items()},
            "classes": _class_counts(job),
            "bad_files": bad,
            "memory": [dataclasses.asdict(part) for part in plan.parts],
            "memory_peak_bytes": plan.peak,
            "memory_free_bytes": None if room is None else room[0],
            "checkpoint_bytes": plan.checkpoint,
        }
        keep = asked.run.keep_checkpoints
        console.line(
            f"checkpoint: {_size(plan.checkpoint)} once every ring is full; {keep} are kept and one more is written "
            f"beside them, so {_size((keep + 1) * plan.checkpoint)} of disk; removed when the run ends"
        )
        if "untimed" in flags:
            console.line("time: not measured (--untimed)")
        elif not fits:
            console.line("time: not measured, because the plan does not fit")
        else:
            report["seconds"] = _print_time(job, step, console)
        job.workdir.write_json("check.json", report)
        console.line(f"written: {job.workdir.path / 'check.json'}")
        _check_cache(job)
        _verdict(console, bad, asked.data.on_bad_image, fits)
    return report


def _print_data(job: Job, on_bad_image: str, console: Console) -> list[list[str]]:
    """Print tables of sets and classes and the list of bad files; returns that list as [path, reason]."""
    sets = job.sets
    rows = []
    for name, images in sets.images.items():
        counts = Counter(item.label for item in images.items)
        groups = len({item.group_id for item in images.items})
        extremes = f"{min(counts.values())} to {max(counts.values())}"
        rows.append([name, str(len(images.items)), str(len(counts)), extremes, str(groups)])
    console.table(
        f"data: {sets.index.root} ({sets.index.kind})", ["set", "images", "classes", "a class", "groups"], rows
    )
    counts = _class_counts(job)
    rows = [
        [label, *(str(found.get(split, 0)) for split in ("train", "val", "test"))] for label, found in counts.items()
    ]
    console.table("ID classes", ["class", "train", "val", "test"], rows[:LISTED_CLASSES])
    if len(rows) > LISTED_CLASSES:
        console.line(f"  and {len(rows) - LISTED_CLASSES} more in check.json")
    bad = [[path, reason] for images in sets.images.values() for path, reason in images.skipped]
    if on_bad_image == "fail":
        bad += [[path, reason] for images in sets.images.values() for path, reason in images.forgiven]
    if bad:
        fate = "a run stops at them (data.on_bad_image is fail)" if on_bad_image == "fail" else "a run leaves them out"
        console.warn(f"{len(bad)} files cannot be used; {fate}:")
        for path, reason in bad[:LISTED_FILES]:
            console.line(f"  {path}: {reason}")
        if len(bad) > LISTED_FILES:
            console.line(f"  and {len(bad) - LISTED_FILES} more in check.json")
    else:
        console.line("  every image was decoded; no bad file")
    return bad


def _class_counts(job: Job) -> dict[str, dict[str, int]]:
    """ID class -> split -> number of images."""
    sets = job.sets
    counts: dict[str, dict[str, int]] = {label: {} for label in sets.index.classes}
    for split in ("train", "val", "test"):
        for item in sets.images[split].items:
            counts[item.label][split] = counts[item.label].get(split, 0) + 1
    return counts


def _print_memory(console: Console, plan: MemoryPlan, room: tuple[int, int] | None) -> bool:
    """Print the plan as a table; returns whether it fits (True if the system does not report free memory)."""
    rows = [[part.name, "" if part.kind == HELD else part.kind, _size(part.bytes), part.knobs] for part in plan.parts]
    how = "largest of training + largest of generation" if plan.overlapped else "the largest"
    rows += [["held", "", _size(plan.held), ""], [f"working ({how})", "", _size(plan.working), ""]]
    console.table(
        "memory plan", ["part", "", "size", "smaller by"], [*rows, ["needed at once", "", _size(plan.peak), ""]]
    )
    if room is None:
        console.line("  this system does not tell how much memory is free")
        return True
    free, total = room
    fits = plan.to_come < free
    console.line(
        f"  free now, with data and pipeline loaded: {_size(free)} of {_size(total)}: {'fits' if fits else 'does not fit'}"
    )
    if not fits:
        for part in plan.largest():
            console.warn(f"{part.name} takes {_size(part.bytes)}; lower {part.knobs}")
    return fits


def _print_time(job: Job, step: Callable[[State], None], console: Console) -> dict[str, float]:
    """Seconds of each stage, predicted from a few real steps; {} if these do not fit into memory."""
    try:
        with job.stage("time") as progress:
            state = thrown_away(job, progress)
            timing = time_steps(state, step, window(state, TIMED_STEPS))
            seconds = {"tokens": _token_seconds(job), "prefill": _prefill_seconds(job, state, timing)}
    except OutOfMemory as error:
        console.warn(str(error))
        return {}
    seconds["contrastive"] = job.config.learning.steps * timing.step_ms / 1e3
    seconds["features"] = _feature_seconds(job, timing)
    labels = {
        "tokens": "class tokens" if seconds["tokens"] else "class tokens: in the cache, or none to learn",
        "prefill": "filling the rings",
        "contrastive": f"{job.config.learning.steps} steps of {timing.step_ms:.0f} ms",
        "features": "features of every image",
    }
    rows = [[labels[name], duration(value)] for name, value in seconds.items()]
    total = sum(seconds.values())
    console.table(
        f"time, from {timing.steps} timed steps on this machine as it is now",
        ["stage", "time"],
        [*rows, ["in all, without judge, intervals and report", duration(total)]],
    )
    return seconds | {"step_ms": timing.step_ms, "total": total}


def _token_seconds(job: Job) -> float:
    """Predicted seconds of textual inversion: its steps times the time of one, measured on throwaway vectors."""
    config = job.config
    if job.pipeline is None or config.inversion.class_agnostic or cached_tokens(job) is not None:
        return 0.0
    moments = job.sources.moments_D8hw
    planes = torch.stack([moments] * (1 + (config.inversion.flip > 0)))  # mirror images take the same time
    inversion = Inversion(
        job.pipeline, planes, job.sets.labels_D, job.sets.index.classes, config.inversion, config.run.seed
    )
    repeats, warmup = (2, 1) if inversion.steps > 2 else (1, 0)  # inversion cannot take more steps than it has
    return inversion.steps * timer(job.device)(inversion.step, repeats=repeats, warmup=warmup) / 1e3


def _prefill_seconds(job: Job, state: State, timing: Timing) -> float:
    """Predicted seconds of filling the rings, at the rate at which the timed steps generated images."""
    generation = job.config.generation
    if state.generator is None or not timing.images:
        return 0.0
    images = len(job.sets.index.classes) * sum(prefill_target(generation, is_ood) for is_ood in (False, True))
    return images * timing.phase_ms["generate"] / timing.images / 1e3


def _feature_seconds(job: Job, timing: Timing) -> float:
    """Predicted seconds of the forward passes of all images, from the encoder's time in a training step."""
    images = sum(len(images.items) for images in job.sets.images.values())
    views = VIEWS * batch_rows(job.config)
    both_ms = timing.phase_ms.get("encode", 0.0) + timing.phase_ms.get("backward", 0.0)
    return images * both_ms * ENCODER_FORWARD_SHARE / views / 1e3


def _verdict(console: Console, bad: list, on_bad_image: str, fits: bool) -> None:
    memory = "" if fits else "memory (see the plan)"
    if bad and on_bad_image == "fail":
        files = f"{len(bad)} bad files (mend them, or set data.on_bad_image=skip)"
        raise DataError("check: a run would stop at " + "; ".join(filter(None, (files, memory))))
    if memory:
        raise OutOfMemory(f"check: a run would stop at {memory}")
    console.line("nothing found that would stop a run")


def _check_cache(job: Job) -> None:
    """Raise StorageError if the folder for class tokens and judge, of a run that generates, cannot be written."""
    if not generates(job.config):
        return
    found = next(folder for folder in (job.cache_dir, *job.cache_dir.parents) if os.path.exists(folder))
    if not (found.is_dir() and os.access(found, os.W_OK | os.X_OK)):
        raise StorageError(
            f"{job.cache_dir}: class tokens could not be kept there, as {found} is no folder that can be written; set "
            "run.cache_dir to another"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
