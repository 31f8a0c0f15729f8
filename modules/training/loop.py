"""Stage contrastive of a run: the training loop with metric rows and checkpoints; a stop loses no finished step."""

from collections.abc import Callable
from functools import partial

from modules import state as checkpoints
from modules.console import Console
from modules.errors import StorageError, Terminated
from modules.evaluation.features import embed_images, knn_accuracy
from modules.termination import termination
from modules.training.job import Job, State
from modules.training.machine import choose_overlap
from modules.training.timing import synchronize
from modules.workdir import Workdir


def train(job: Job, state: State, step: Callable[[State], None], progress: Callable[..., None]) -> None:
    """Stage contrastive: train to the last step, writing metric rows and checkpoints of the whole state.

    Raises:
        Terminated: a signal came; the state was checkpointed first.
        StorageError: a signal came, and the state could not be written.
        NonFinite: an update was skipped; its batch was written for replay.
    """
    config, workdir, console = job.config, job.workdir, job.console
    total = config.learning.steps
    choose_overlap(job, state, step)
    state.meter.restart_interval()
    begun = _progress_of(state)
    try:
        while state.step < total:
            with termination.whole():
                step(state)
                if state.step == total and state.generator is not None:
                    state.overlap.join()
                    state.generator.finish()
                logs = state.step % config.run.log_every == 0 or state.step == total
                saves = state.step % config.run.checkpoint_every == 0 or state.step == total
                if logs or saves:
                    state.optimizer.raise_if_nonfinite(partial(_write_capture, workdir))
                if logs:
                    row = _metric_row(job, state, begun)
                    _or_warn(console, workdir.log, row)
                    console.step_row(row, total)
                progress(state.step, total)
                if saves:
                    _or_warn(console, _save, job, state)
                if logs or saves:
                    state.meter.restart_interval()
                    begun = _progress_of(state)
    except Terminated as stop:
        state.optimizer.raise_if_nonfinite(partial(_write_capture, workdir))
        _save(job, state)
        text = f"checkpointed at step {state.step} of {total}; the same command goes on"
        raise Terminated(text, stop.signum) from None


def _progress_of(state: State) -> tuple[int, int, int]:
    """Optimizer steps, views passed through the encoder, and images generated so far."""
    generated = 0 if state.generator is None else state.generator.slots.counts["finished"]
    return state.step, state.forward_rows, generated


def _save(job: Job, state: State) -> None:
    folder = job.workdir.checkpoints / "contrastive"
    checkpoints.save_checkpoint(folder, state.step, state.state_dict(), job.config.run.keep_checkpoints)


def _or_warn(console: Console, write: Callable[..., None], *what: object) -> None:
    """Call write(*what), but only warn if storage fails: the run goes on, and the older checkpoint stays."""
    try:
        write(*what)
    except StorageError as error:
        console.warn(str(error))


def _metric_row(job: Job, state: State, begun: tuple[int, int, int]) -> dict:
    """One row of metrics.jsonl: losses, geometry, mixture, reservoir, times.

    Args:
        begun: `_progress_of` the state at the start of the timed interval.
    """
    row = {"step": state.step} | {name: float(value) for name, value in state.logs.items()}
    row["lr"] = state.optimizer.inner.param_groups[0]["lr"]
    steps, views, images = (now - before for now, before in zip(_progress_of(state), begun, strict=True))
    synchronize(state)  # a side stream may still be generating; times are read in order, so its events block others
    times = state.meter.interval(steps)
    times["views_per_s"] = views / max(1e-9, times["step_ms"] * steps / 1e3)
    if state.generator is not None:
        row |= state.mixer.statistics() | state.generator.statistics()
        times["images_per_s"] = images / max(1e-9, times["step_ms"] * steps / 1e3)
        for alarm in state.generator.gate.alarms():
            job.warn_once(alarm)
    every, last_row = job.config.evaluation.knn_every, (state.step - 1) // job.config.run.log_every
    if every and state.step // every > last_row * job.config.run.log_every // every:
        row["val.knn_accuracy"] = _knn_accuracy(job, state)
    if "id_cosine" in row and (text := state.alarm.update(state.step, row["id_cosine"], row["id_spread"])):
        job.console.warn(text)
    return row | times


def _knn_accuracy(job: Job, state: State) -> float:
    sets, size = job.sets, job.config.evaluation.batch_size
    train, val = (embed_images(state.embed, sets.images[name].pixels_DHWC, size) for name in ("train", "val"))
    return knn_accuracy(train, sets.labels_D, val, sets.labels("val"), len(sets.index.classes))


def _write_capture(workdir: Workdir, failure: dict) -> str:
    """Store batch, loss and gradient norm of a skipped update for replay; returns the path."""
    path = workdir.path / "nonfinite.safetensors"
    facts = {name: str(failure[name]) for name in ("step", "loss", "gradient_norm")}
    checkpoints.write_atomic(path, checkpoints.safetensors_bytes(failure["tensors"], facts))
    return str(path)
