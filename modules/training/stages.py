"""Stages data and tokens of a run, and the state that training starts from; `trainer.run` calls them in order.

A stage stores what later stages need in `Job` (data, pipeline, tokens); what a training step reads is in `State`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from modules import state as checkpoints
from modules.config import Config
from modules.console import Console
from modules.data.cache import digest_tensor, locked
from modules.data.duplicates import describe_duplicates, near_duplicates
from modules.data.mixer import Mixer, check_balance
from modules.data.reservoir import Reservoir
from modules.data.sets import JUDGED_PER_CLASS, load_sets
from modules.diffusion import tokens as token_files
from modules.diffusion.attention import install
from modules.diffusion.frozen import freeze_layers
from modules.diffusion.inversion import Inversion, token_cache_key
from modules.diffusion.overlap import Overlap
from modules.diffusion.pipeline import load_pipeline, own_resolution
from modules.diffusion.presets import plan, preset_resolution
from modules.diffusion.prompts import KEYWORDS, check_generation, class_initializers, trained_words
from modules.diffusion.roundtrip import decode_means
from modules.diffusion.slots import Sources
from modules.diffusion.token_report import token_report
from modules.ema import build_average
from modules.errors import Terminated
from modules.evaluation.intervals import check_groups
from modules.evaluation.ood import check_score_name, head_source
from modules.learning.encoder import build_encoder
from modules.learning.geometry import CollapseAlarm
from modules.learning.judge import load_judge
from modules.learning.objectives import build_objective
from modules.optim import Optimizer
from modules.records import read_record
from modules.rules import batch_rows, generates, idle_settings, needs_masks
from modules.termination import termination
from modules.training.card import run_card
from modules.training.job import Job, State
from modules.training.machine import build_generator

TOKEN_CHECKPOINT_STEPS = 200  # steps of textual inversion between checkpoints
REPORTED_IMAGES = JUDGED_PER_CLASS  # most val images per class used in the token report
VAE_CHECK_IMAGES = 2  # train images that must encode and decode to finite pixels before the others are encoded


def load_data(job: Job, progress: Callable[..., None]) -> None:
    """Stage data: decode every image once, at the sizes for learning and generation, check the set, write data.json."""
    config = job.config
    if idle := idle_settings(config):
        job.console.warn(
            f"without effect, because generation.synthetic_fraction is 0 and nothing is generated: {', '.join(idle)}; set "
            "it above 0, or leave these out"
        )
    size = generation_size(config) if generates(config) else None
    job.sets = load_sets(
        config.data, config.run.seed, masks=needs_masks(config), generation_size=size, progress=progress
    )
    before = job.workdir.path / "data.json"

    def changes() -> str:
        return job.sets.changes(read_record(before)) if before.exists() else ""

    job.hold_to("data.root", config.data.root, job.sets.digest, changes)
    if job.sets.train.masks_DHW is not None:
        job.hold_to("masks of data.root", config.data.root, digest_tensor(job.sets.train.masks_DHW))
    job.workdir.write_json("data.json", job.sets.summary())
    others = [
        f"{name}: {found.notes[0]}" for name, found in job.sets.images.items() if found.skipped and name != "train"
    ]
    for note in (*job.sets.index.notes, *job.sets.train.notes, *others):
        job.console.line(f"  {note}")
    _check_evaluation(job)
    check_balance(config.learning, job.sets.labels_D.bincount(minlength=len(job.sets.index.classes)).tolist())
    own = [images for name, images in job.sets.images.items() if name != "far_ood_test"]
    if pairs := near_duplicates(*own):
        job.console.warn(describe_duplicates(pairs))


def _check_evaluation(job: Job) -> None:
    """Refuse now, before training, what the evaluation after it would refuse.

    Raises:
        DataError, ConfigError: as `check_groups` and `check_score_name`.
    """
    config, images = job.config, job.sets.images
    groups = {name: [item.group_id for item in found.items] for name, found in images.items()}
    check_groups({name: of for name, of in groups.items() if name.endswith("test")}, config.evaluation.bootstrap)
    negatives = 2 if generates(config) and config.generation.near_ood_fraction > 0 else 0  # at least, by then
    check_score_name(config.evaluation.score, head_source(negatives, groups.get("near_ood_val", ())) != "none")


def generation_size(config: Config) -> int:
    """Pixels per side at which images are generated, found without reading weights.

    Raises:
        DataError, ConfigError: as `own_resolution`.
    """
    return preset_resolution(config.pipeline.preset, own_resolution(config.pipeline), bool(config.pipeline.resolution))


def learn_tokens(job: Job, progress: Callable[..., None], *, learn: bool = True) -> None:
    """Stage tokens: load the pipeline, encode every train image, get class tokens if `learn`, and get the judge."""
    config, sets = job.config, job.sets
    if not generates(config):
        job.console.line("  no generated rows: nothing to learn")
        return
    stored = sets.sources()
    job.pipeline = pipeline = load_pipeline(config.pipeline, job.device, job.runtime.pipeline_dtype.value)
    job.hold_to("pipeline.path", config.pipeline.path, pipeline.digest)
    job.plan = plan(config.pipeline.preset, config.generation, pipeline, bool(config.pipeline.resolution))
    pipeline.resolution = job.plan.resolution
    if pipeline.resolution != sets.generation_size:
        raise RuntimeError(
            f"images were decoded at {sets.generation_size} px for a pipeline of {pipeline.resolution} px"
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        freeze_layers(part)  # done here so that rounding is the same whether tokens are learned or read from the cache
    install(pipeline.unet)  # likewise
    check_generation(pipeline, config.generation, config.inversion, sets.index.keywords())
    pipeline.check_vae(stored.pixels_DHWC[:VAE_CHECK_IMAGES])
    moments = _train_moments(job, stored.pixels_DHWC, progress)
    masks = None if stored.masks_DHW is None else stored.masks_DHW.to(job.device)
    job.sources = Sources(moments, stored.pixels_DHWC, masks)  # pixels stay on the host: 1,000 at 512 px take .8 GB
    job.recipes()  # refuses what cannot be generated now, not after hours of learning tokens
    if learn and not config.inversion.class_agnostic:
        job.tokens = _tokens(job, progress)
        job.inversion_rows = _token_report(job)
        job.workdir.write_json("tokens/report.json", job.inversion_rows)
    if config.evaluation.judge_steps:
        job.judge = load_judge(
            sets.train.pixels_DHWC.to(job.device),
            sets.labels_D,
            len(sets.index.classes),
            config.evaluation.judge_steps,
            config.run.seed,
            job.cache_dir,
            lambda text: job.console.line(f"  {text}"),
            progress,
            config.learning,
        )


def _train_moments(job: Job, pixels_DHWC: torch.Tensor, progress: Callable[..., None] | None = None) -> torch.Tensor:
    """VAE moments of `pixels_DHWC`, the train images or their mirror images; generation and inversion start from them.

    Raises:
        DataError: as `check_moments`, if any are not finite.
    """
    moments = job.pipeline.encode_moments(pixels_DHWC, progress=progress)
    root = job.sets.index.root
    job.pipeline.check_moments(moments, [f"{root}/{item.path}" for item in job.sets.train.items])
    return moments


def _token_report(job: Job) -> list[dict]:
    """Quality of each class token, measured on a few val images per class, which inversion has not seen."""
    sets, (val, large) = job.sets, job.sets.val_at_generation()
    labels_D = torch.tensor(sets.index.label_ids(val.items))
    if small := len(labels_D) - len(large):
        job.console.line(f"  token report: {small} val images under {sets.generation_size} px are left out")
    by_class = [[row for row in large if labels_D[row] == c][:REPORTED_IMAGES] for c in range(len(sets.index.classes))]
    rows = sum(by_class, [])
    moments = job.sources.moments_D8hw[:0]
    if rows:
        moments = job.pipeline.encode_moments(val.pixels_DHWC[rows].to(job.device))
    return token_report(job.pipeline, job.tokens, moments, labels_D[rows], draws=REPORTED_IMAGES)


def initializers(job: Job) -> tuple[str, ...]:
    """The initializer word of each class if inversion.initializer is "keywords", else ()."""
    if job.config.inversion.initializer != KEYWORDS:
        return ()
    return class_initializers(job.sets.index.keywords(), job.pipeline.tokenizer, trained_words(job.pipeline.source))


def token_key(job: Job) -> str:
    """The cache key of the class tokens that this job learns; `job.sources` must be set."""
    names = [item.label for item in job.sets.train.items]
    settings, seed = job.config.inversion, job.config.run.seed
    return token_cache_key(job.pipeline, job.sources.pixels_DHWC, names, settings, seed, initializers(job))


def _tokens(job: Job, progress: Callable[..., None]) -> token_files.Tokens:
    """Class tokens: the run's own copy if it has a checkpoint, else those of `_cached_or_learned`, copied into the run.

    Once steps were taken with this copy it is only read: rewriting it could destroy it if the process were killed.
    """
    own = job.workdir.path / "tokens"
    if own.is_dir() and any((job.workdir.checkpoints / "contrastive").rglob("manifest.json")):
        job.console.line("  class tokens: those that this run began with")
        classes, remedy = job.sets.index.classes, "set run.name to begin another run"
        return token_files.load_tokens(own, classes, job.pipeline.digest, remedy)
    found = _cached_or_learned(job, progress)
    token_files.replace_tokens(found, own)
    return found


def _cached_or_learned(job: Job, progress: Callable[..., None]) -> token_files.Tokens:
    """Class tokens from the cache, else learned now and stored there.

    If several processes need the same tokens, one learns them while the others wait, so that all use the same tokens.
    """
    key = token_key(job)

    def cached() -> token_files.Tokens | None:
        found = token_files.cached_tokens(job.cache_dir, key, job.sets.index.classes, job.pipeline.digest)
        if found is not None:
            job.console.line(f"  class tokens: read from the cache ({key[:16]})")
        return found

    if (found := cached()) is not None:
        return found
    with locked(Path(job.cache_dir) / "tokens" / key, lambda text: job.console.line(f"  class tokens {text}")):
        if (found := cached()) is None:
            found = _learn(job, progress)
            token_files.store_tokens(job.cache_dir, key, found)
    shutil.rmtree(job.workdir.checkpoints / "tokens", ignore_errors=True)
    return found


def _learn(job: Job, progress: Callable[..., None]) -> token_files.Tokens:
    """Class tokens learned by textual inversion, resumed from a checkpoint if there is one."""
    settings, sets = job.config.inversion, job.sets
    planes = [job.sources.moments_D8hw]
    if settings.flip > 0:
        planes.append(_train_moments(job, job.sources.pixels_DHWC.flip(2)))
    inversion = Inversion(
        job.pipeline,
        torch.stack(planes),
        sets.labels_D,
        sets.index.classes,
        settings,
        job.config.run.seed,
        initializers=initializers(job),
        say=lambda text: job.console.line(f"  class tokens: {text}"),
    )
    folder = job.workdir.checkpoints / "tokens"
    _load(folder, inversion, job.console)
    try:
        while inversion.done < inversion.steps:
            with termination.whole():
                loss = inversion.step()
                if inversion.done % 20 == 0 or inversion.done == inversion.steps:
                    inversion.check_finite()
                    progress(inversion.done, inversion.steps, f"class tokens, denoising loss {loss.item():.4f}")
                if inversion.done % TOKEN_CHECKPOINT_STEPS == 0:
                    checkpoints.save_checkpoint(folder, inversion.done, inversion.state_dict(), 1)
    except Terminated as stop:
        checkpoints.save_checkpoint(folder, inversion.done, inversion.state_dict(), 1)
        raise Terminated(f"checkpointed at step {inversion.done} of stage tokens", stop.signum) from None
    return inversion.tokens()


def build(job: Job, progress: Callable[..., None]) -> State:
    """The state that training starts from, new or restored from the newest checkpoint; also prints the run card."""
    config, sets, device = job.config, job.sets, job.device
    num_classes = len(sets.index.classes)
    generation, learning = config.generation, config.learning
    precision = job.runtime.precision.value
    encoder = build_encoder(config.encoder, config.data.image_size, num_classes, config.run.seed).to(device)
    train = sets.train.pixels_DHWC.to(device)
    reservoir = Reservoir(
        num_classes, generation.ring_size, config.data.image_size, device, generation.max_uses, generation.max_age
    )
    roundtrip = None
    if generation.roundtrip_fraction and job.pipeline is not None:
        roundtrip = roundtrip_images(job)
    state = State(
        config=config,
        meter=job.meter,
        precision=precision,
        generator=None,
        mixer=Mixer(train, sets.labels_D, reservoir, generation, learning, config.run.seed, roundtrip),
        encoder=encoder,
        objective=build_objective(learning),
        optimizer=Optimizer(encoder, learning, batch_rows(config), loss_scaling=precision == torch.float16),
        average=build_average(encoder, learning.ema_decay),
        alarm=CollapseAlarm(learning.warmup_steps),
        overlap=Overlap("sequential", device),
    )
    for warning in state.mixer.warnings:
        job.console.warn(warning)
    if job.pipeline is not None:
        state.generator = build_generator(job, state, train, reservoir)
        state.meter.restart_peak()  # capturing counted the graphs' pool as allocated; from here on it is added instead
    job.card = run_card(job)
    job.console.card(f"run {job.workdir.path}", job.card)
    encoder.train()
    if not _load(job.workdir.checkpoints / "contrastive", state, job.console) and state.generator is not None:
        state.generator.prefill(progress)
    job.workdir.cut_rows(state.step)
    return state


def roundtrip_images(job: Job) -> torch.Tensor:
    """The train images after encoding and decoding by the VAE, stored like generated images."""
    parts = job.sources.moments_D8hw.split(job.config.generation.decode_batch)
    return torch.cat([decode_means(job.pipeline, part, job.config.data.image_size) for part in parts])


def _load(folder: Path, part: State | Inversion, console: Console) -> bool:
    """Restore `part` from the newest valid checkpoint in `folder`; returns whether there was one."""
    found = checkpoints.load_newest(folder)
    if found is None:
        return False
    step, tree, complaints = found
    for complaint in complaints:
        console.warn(complaint)
    part.load_state_dict(tree)
    console.line(f"  resumed at step {step} of {folder.name}")
    return True
