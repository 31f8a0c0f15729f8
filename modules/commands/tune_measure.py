"""The measurements of tune: real steps at each ratio, started from copies of one state, in several rounds.

Ratios and the step without generation alternate, and the fastest of several windows counts: on a machine that also does
other work, the least disturbed window is closest to the truth. The spread of equal windows is reported.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from modules.commands.preparation import load_generation, variant
from modules.commands.tune_choice import Row
from modules.config import Config, Generation
from modules.errors import ConfigError, DataError, NonFinite, OutOfMemory
from modules.evaluation.features import embed_images, knn_accuracy
from modules.evaluation.metrics import ood_metrics
from modules.evaluation.ood import SCORES, Fitting
from modules.memory import named_memory
from modules.phases import BESIDE
from modules.rules import generated_rows
from modules.settings import with_settings
from modules.training import stages
from modules.training.job import Job, State
from modules.training.machine import choose_overlap
from modules.training.timing import Timing, copied, time_steps, window

ROUNDS = 3
REFUSALS = (ConfigError, DataError, OutOfMemory, NonFinite)  # end one ratio or preset; a signal or full disk ends all
QUALITY_WARMUP = 2  # steps of a short run that are not timed


@dataclass
class Candidate:
    """A ratio under a preset: a state, the copy that every window starts from, and the settings of the window."""

    job: Job
    state: State
    start: dict
    config: Config

    def window(self, step: Callable[[State], None], least: int, quality: int) -> Timing:
        """Time a window of steps from the start state, or, if `quality` > 0, a whole short run of that many steps."""
        self.state.load_state_dict(copied(self.start))
        self.state.config = self.config
        if self.state.generator is not None:
            self.state.generator.config = self.config
        if quality:
            return time_steps(self.state, step, quality - QUALITY_WARMUP, QUALITY_WARMUP)
        return time_steps(self.state, step, window(self.state, least))


def measure(
    job: Job, step: Callable[[State], None], presets: list[str], quality: int, progress: Callable[..., None]
) -> list[Row]:
    """A row for the step without generation, then one for each preset and ratio of tune.grid."""
    grid = sorted({rate for rate in job.config.tune.grid if rate > 0})
    rounds = 1 if quality else ROUNDS
    total, done = len(presets) * len(grid) * rounds, 0
    plain = _plain(job, quality)
    baselines = [plain.window(step, job.config.tune.steps, quality)]
    figures = _val_figures(plain) if quality else None
    rows: list[Row] = []
    for preset in presets:
        candidates, refused = _candidates(job, step, preset, grid, quality)
        windows: dict[float, list[Timing]] = {rate: [] for rate in candidates}
        judged: dict[float, dict | None] = {}
        done += rounds * (len(grid) - len(candidates))
        for _ in range(rounds):
            for rate, candidate in candidates.items():
                if rate not in refused:
                    try:
                        with named_memory("tune", candidate.config):
                            windows[rate].append(candidate.window(step, job.config.tune.steps, quality))
                            judged[rate] = _val_figures(candidate) if quality else None
                    except REFUSALS as error:  # becomes a row with its reason and does not end the measurement
                        refused[rate] = str(error)
                done += 1
                progress(done, total, f"{preset}, {rate:g} images a step")
            baselines.append(plain.window(step, job.config.tune.steps, 0))
        for rate in grid:
            if rate in refused:
                rows.append(Row(rate, preset, reason=refused[rate]))
            else:
                rows.append(_row(job, preset, rate, fastest(windows[rate]), judged[rate]))
        candidates, candidate = {}, None
        gc.collect()  # engine and tick form a reference cycle; the next preset's slots are fitted to the free memory
        torch.cuda.empty_cache()  # does nothing if CUDA was never used
    baseline = _row(job, "", 0.0, fastest(baselines), figures)
    spread = max(timing.step_ms for timing in baselines) / baseline.step_ms - 1
    rows = [row if row.reason else replace(row, slowdown=row.step_ms / baseline.step_ms) for row in rows]
    return [replace(baseline, slowdown=1.0, spread=spread), *rows]


def fastest(windows: list[Timing]) -> Timing:
    """The window with the shortest step: the least disturbed of equal windows."""
    return min(windows, key=lambda timing: timing.step_ms)


def mean_age(generation: Generation, rate: float, num_classes: int) -> float:
    """Mean age in steps of the stored images once rings are full; 0 without generation.

    A ring of one role receives rate x share / C images per step, so an image is replaced after ring_size C / (rate x
    share) steps, or is no longer used after max_age steps; its mean age is half of that.
    """
    shares = [s for s in (1 - generation.near_ood_fraction, generation.near_ood_fraction) if s > 0]
    if not rate:
        return 0.0
    lives = [generation.ring_size * num_classes / (rate * share) for share in shares]
    if generation.max_age:
        lives = [min(life, generation.max_age) for life in lives]
    return sum(lives) / len(lives) / 2


def _plain(job: Job, quality: int) -> Candidate:
    """The candidate without generation: as many rows per batch, all of them real."""
    extra = job.config.learning.extra_real_rows + round(generated_rows(job.config))
    real = {
        "generation.synthetic_fraction": 0.0,
        "generation.roundtrip_fraction": 0.0,
        "learning.extra_real_rows": extra,
    }
    own = variant(job, real | _short(job.config, quality))
    own.pipeline = None
    state = stages.build(own, _silent)
    return Candidate(own, state, copied(state.state_dict()), own.config)


def _candidates(
    job: Job, step: Callable[[State], None], preset: str, grid: list[float], quality: int
) -> tuple[dict[float, Candidate], dict[float, str]]:
    """({ratio: candidate}, {ratio: reason}): a preset's ratios that can be run, all on one state, and the others."""
    configs: dict[float, Config] = {}
    refused: dict[float, str] = {}
    for rate in grid:
        try:
            configs[rate] = with_settings(job.config, {"generation.images_per_step": rate})
        except ConfigError as error:
            refused[rate] = str(error)
    if not configs:
        return {}, refused
    changes = {"pipeline.preset": preset, "generation.images_per_step": min(configs)} | _short(job.config, quality)
    if not quality:
        changes["generation.prefill"] = 0.0  # time does not depend on what the rings hold
    try:
        own = variant(job, changes)
        if preset != job.config.pipeline.preset:
            if stages.generation_size(own.config) != own.sets.generation_size:
                stages.load_data(own, _silent)
            with named_memory("tokens", own.config):
                load_generation(own, _silent, learn=quality > 0)
        job.console.line(f"  preset {preset}: {'; '.join(own.plan.reasons)}")
        with named_memory("tune", own.config):
            state = stages.build(own, _silent)
            if not quality and state.generator is not None:
                state.generator.warm_up()
            choose_overlap(own, state, step)  # as a run of this config would
        mode = own.choices["mode"]
        job.console.line(f"  generation and training: {mode.value} ({mode.reason})")
    except REFUSALS as error:
        return {}, refused | dict.fromkeys(configs, str(error))
    start = copied(state.state_dict())
    return {
        rate: Candidate(own, state, start, with_settings(own.config, {"generation.images_per_step": rate}))
        for rate in configs
    }, refused


def _short(config: Config, quality: int) -> dict[str, object]:
    """Settings for a complete learning-rate schedule of `quality` steps; {} if `quality` is 0."""
    if not quality:
        return {}
    return {"learning.steps": quality, "learning.warmup_steps": min(config.learning.warmup_steps, quality // 5)}


def _row(job: Job, preset: str, rate: float, timing: Timing, figures: dict | None) -> Row:
    """The row of a ratio, extrapolated from a window of steps to a whole run."""
    config = job.config
    return Row(
        images_per_step=rate,
        preset=preset,
        step_ms=timing.step_ms,
        made_per_s=1e3 * timing.images / timing.step_ms,
        generation_share=timing.share(BESIDE if BESIDE in timing.phase_ms else "generate"),
        reuse=generated_rows(config) / rate if rate else 0.0,
        age=mean_age(config.generation, rate, len(job.sets.index.classes)),
        hours=config.learning.steps * timing.step_ms / 3.6e6,
        peak_gib=timing.peak_gib,
        steps_timed=timing.steps,
        quality=figures,
    )


def _val_figures(candidate: Candidate) -> dict[str, float]:
    """kNN accuracy on val and, if there is near-OOD val data, near-OOD AUROC on val; never reads test."""
    sets, size = candidate.job.sets, candidate.config.evaluation.batch_size
    found = {
        name: embed_images(candidate.state.embed, sets.images[name].pixels_DHWC, size)
        for name in ("train", "val", "near_ood_val")
        if name in sets.images
    }
    count = len(sets.index.classes)
    accuracy = knn_accuracy(found["train"], sets.labels_D, found["val"], sets.labels("val"), count)
    figures = {"val_knn_accuracy": accuracy}
    if "near_ood_val" in found:
        score = SCORES["knn"]
        fitted = score.fit(Fitting(found["train"], sets.labels_D))
        id_scores, ood_scores = (score.score(fitted, found[name], None) for name in ("val", "near_ood_val"))
        figures["val_near_ood_auroc"] = ood_metrics(id_scores, ood_scores)["auroc"]
    return figures


def _silent(done: int, total: int, note: str = "") -> None:
    """A progress callback that prints nothing, for states that are built many times."""
