"""The stages of a run, each a function that `trainer.run` calls in its order.

What a stage makes for the next ones stands in `Job` (data, pipeline, tokens); what a step reads stands in `State`.
"""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from modules import state as checkpoints
from modules.config import Config
from modules.data.duplicates import describe_duplicates, near_duplicates
from modules.data.mixer import Mixer
from modules.data.reservoir import Reservoir
from modules.data.sets import ImageSets, load_sets, load_sources
from modules.data.views import plain_view
from modules.diffusion import tokens as token_files
from modules.diffusion.generator import Generator
from modules.diffusion.inversion import Inversion, token_cache_key
from modules.diffusion.pipeline import StableDiffusion, load_pipeline
from modules.diffusion.prompts import check_prompts, trained_words
from modules.diffusion.slots import Sources
from modules.diffusion.token_report import token_report
from modules.ema import build_average
from modules.errors import StorageError, Terminated
from modules.evaluation.evaluate import FeatureSet, Outcome, evaluate, feature_set
from modules.evaluation.features import embed_images, knn_accuracy
from modules.evaluation.intervals import check_groups
from modules.evaluation.probe import Probe
from modules.learning.encoder import build_encoder, choose_arch
from modules.learning.geometry import CollapseAlarm
from modules.learning.judge import load_judge
from modules.learning.objectives import build_objective
from modules.meter import Meter
from modules.optim import Optimizer
from modules.rules import generated_rows, generates
from modules.runtime import environment, resolve_runtime
from modules.settings import load_config
from modules.termination import termination
from modules.workdir import Workdir

TOKEN_CHECKPOINT_STEPS = 200  # steps of textual inversion between checkpoints


def command(path: str, overrides: list[str], console, run, step) -> None:
    """`trainer.py run CONFIG [section.key=value ...]`."""
    config, origins = load_config(path, overrides)
    run(config, origins, console)


@dataclass
class Job:
    """A run under way: its settings, its directory, and what the stages have made so far."""

    config: Config
    workdir: Workdir
    console: object
    sets: ImageSets | None = None
    pipeline: StableDiffusion | None = None
    tokens: object = None
    sources: Sources | None = None
    judge: object = None
    inversion_rows: list[dict] = field(default_factory=list)
    card: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.runtime = resolve_runtime(self.config.run, self.config.pipeline)
        self.device = self.runtime.device.value
        self.meter = Meter(self.device)
        self.workdir.write_json("environment.json", environment())

    @property
    def cache_dir(self) -> Path:
        """Where tokens and judge are kept, shared by runs."""
        return Path(self.config.run.cache_dir or Path(self.config.run.dir) / "cache")

    @contextmanager
    def stage(self, name: str):
        """A timed stage with its progress display."""
        with self.meter.stage(name), self.console.stage(name) as progress:
            yield progress


@dataclass
class State:
    """Everything a step reads that a later step could miss."""

    config: Config
    meter: Meter
    autocast: object  # () -> context manager
    generator: Generator | None  # None in arms without generated rows
    mixer: Mixer
    encoder: torch.nn.Module
    objective: object
    optimizer: Optimizer
    average: object  # averaged encoder, or None
    alarm: CollapseAlarm
    step: int = 0
    forward_rows: int = 0  # views that went through the encoder
    logs: dict = field(default_factory=dict)  # device tensors of the last step

    def embed(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Features [B, F] of stored images by the averaged encoder where there is one, in evaluation mode."""
        encoder = self.encoder if self.average is None else self.average.module
        training = encoder.training
        encoder.eval()
        with torch.no_grad(), self.autocast():
            features_BF = encoder(plain_view(images_BHWC.to(next(encoder.parameters()).device))).float()
        encoder.train(training)
        return features_BF

    def _parts(self) -> dict:
        parts = ("generator", "mixer", "encoder", "optimizer", "average", "alarm", "meter")
        return {name: getattr(self, name) for name in parts if getattr(self, name) is not None}

    def state_dict(self) -> dict:
        own = {"step": self.step, "forward_rows": self.forward_rows}
        return own | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, tree: dict) -> None:
        self.step, self.forward_rows = tree["step"], tree["forward_rows"]
        for name, part in self._parts().items():
            part.load_state_dict(tree[name])


def load_data(job: Job, progress) -> None:
    """Stage data: every image decoded once and checked; data.json."""
    config = job.config
    masks = generates(config) and (config.generation.mask_edit != "none" or "mask_split" in config.near_ood.recipes)
    job.sets = load_sets(config.data, config.run.seed, masks=masks, progress=progress)
    job.workdir.write_json("data.json", job.sets.summary())
    for note in (*job.sets.index.notes, *job.sets.train.notes):
        job.console.line(f"  {note}")
    tests = {name: images.items for name, images in job.sets.images.items() if name.endswith("test")}
    groups = {name: tuple(item.group_id for item in items) for name, items in tests.items()}
    check_groups(groups, config.evaluation.bootstrap)
    tested = [job.sets.images[name] for name in ("train", "val", "test")]
    if pairs := near_duplicates(*tested):
        job.console.warn(describe_duplicates(pairs))


def learn_tokens(job: Job, progress) -> None:
    """Stage tokens: the pipeline, VAE moments of every train image, a token for each class, the judge."""
    config, sets = job.config, job.sets
    if not generates(config):
        job.console.line("  no generated rows: nothing to learn")
        return
    job.pipeline = pipeline = load_pipeline(config.pipeline, job.device, job.runtime.pipeline_dtype.value)
    words = trained_words(pipeline.source)
    check_prompts(config.generation.templates, config.generation.conditions, words)
    stored = load_sources(sets, config.data, pipeline.resolution, masks=sets.train.masks_DHW is not None)
    pixels = stored.pixels_DHWC.to(job.device)
    moments = pipeline.encode_moments(pixels, progress=_noted(progress, "VAE moments"))
    masks = None if stored.masks_DHW is None else stored.masks_DHW.to(job.device)
    job.sources = Sources(moments, pixels, masks)
    if not config.inversion.class_agnostic:
        job.tokens = _tokens(job, pixels, moments, progress)
        token_files.save_tokens(job.tokens, job.workdir.path / "tokens")
        val = sets.images["val"] if pipeline.resolution == config.data.image_size else None
        if val is not None:
            val_moments = pipeline.encode_moments(val.pixels_DHWC.to(job.device))
            job.inversion_rows = token_report(pipeline, job.tokens, val_moments, sets.labels("val"))
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
        )


def _tokens(job: Job, pixels, moments, progress):
    """Class tokens from the cache, or learned now and kept there; resumable."""
    config, sets, pipeline = job.config, job.sets, job.pipeline
    settings, seed, classes = config.inversion, config.run.seed, sets.index.classes
    names = [sets.train.items[row].label for row in range(len(sets.train.items))]
    key = token_cache_key(pipeline, sets.train.digests, names, settings, seed)
    found = token_files.cached_tokens(job.cache_dir, key, classes, pipeline.digest)
    if found is not None:
        job.console.line(f"  class tokens: read from the cache ({key[:16]})")
        return found
    planes = [moments] if settings.flip == 0 else [moments, pipeline.encode_moments(pixels.flip(2))]
    inversion = Inversion(pipeline, torch.stack(planes), sets.labels_D, classes, settings, seed)
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
    except Terminated:
        checkpoints.save_checkpoint(folder, inversion.done, inversion.state_dict(), 1)
        raise Terminated(f"SIGTERM in stage tokens: checkpointed at step {inversion.done}") from None
    learned = inversion.tokens()
    token_files.store_tokens(job.cache_dir, key, learned)
    return learned


def build(job: Job, progress) -> State:
    """Everything a step reads, as it is before step 0 or as the newest checkpoint left it; prints the run card."""
    config, sets, device = job.config, job.sets, job.device
    num_classes = len(sets.index.classes)
    generation, learning = config.generation, config.learning
    precision = job.runtime.precision.value
    encoder = build_encoder(config.encoder, config.data.image_size, num_classes, config.run.seed).to(device)
    rows = learning.classes_per_batch * learning.rows_per_class + learning.extra_real_rows + generated_rows(config)
    train = sets.train.pixels_DHWC.to(device)
    reservoir = Reservoir(
        num_classes, generation.ring_size, config.data.image_size, device, generation.max_uses, generation.max_age
    )
    roundtrip = None
    if generation.roundtrip_fraction and job.pipeline is not None:
        roundtrip = _roundtrip(job)
    state = State(
        config=config,
        meter=job.meter,
        autocast=partial(torch.autocast, device.type, precision, enabled=precision != torch.float32),
        generator=None,
        mixer=Mixer(train, sets.labels_D, reservoir, generation, learning, config.run.seed, roundtrip),
        encoder=encoder,
        objective=build_objective(learning),
        optimizer=Optimizer(encoder, learning, rows, loss_scaling=precision == torch.float16),
        average=build_average(encoder, learning.ema_decay),
        alarm=CollapseAlarm(learning.warmup_steps),
    )
    for warning in state.mixer.warnings:
        job.console.warn(warning)
    if job.pipeline is not None:
        masks = job.sources.masks_DHW
        state.generator = Generator(
            config, job.pipeline, job.tokens, job.sources, train, sets.labels_D.tolist(), num_classes, reservoir,
            embed=state.embed, has_mask=None if masks is None else masks.flatten(1).any(1).tolist(),
        )  # fmt: skip
    job.card = run_card(job, rows)
    job.console.card(f"run {job.workdir.path}", job.card)
    encoder.train()
    if not _load(job.workdir.checkpoints / "contrastive", state, job.console) and state.generator is not None:
        state.generator.prefill(progress)
    job.workdir.cut_rows(state.step)
    return state


def _roundtrip(job: Job) -> torch.Tensor:
    """The train images after encode and decode, stored like generated ones."""
    from kernels.pixels import pixels

    means = job.sources.moments_D8hw.split(job.config.generation.decode_batch)
    with torch.no_grad():
        decoded = [
            pixels(
                job.pipeline.decode(job.pipeline.sample_latents(m, torch.zeros_like(m[:, :4]))),
                job.config.data.image_size,
            )
            for m in means
        ]
    return torch.cat(decoded)


def run_card(job: Job, rows: float) -> list[tuple[str, str, str]]:
    """(what, value, reason) of each choice."""
    config, runtime = job.config, job.runtime
    generation, learning = config.generation, config.learning
    counts = {name: len(images.items) for name, images in job.sets.images.items()}
    arch = choose_arch(config.encoder.arch, config.data.image_size)
    card = [
        ("data", config.data.root, ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("device", str(runtime.device.value), runtime.device.reason),
        ("precision", str(runtime.precision.value).removeprefix("torch."), runtime.precision.reason),
        ("threads", str(runtime.threads.value), runtime.threads.reason),
        ("encoder", str(arch.value), arch.reason),
        ("method", learning.method, f"{learning.steps} steps, {rows:.4g} rows a batch, two views each"),
    ]
    if job.pipeline is None:
        return [*card, ("generation", "off", "generation.synthetic_fraction is 0")]
    needed = generated_rows(config)
    reuse = needed / generation.images_per_step if generation.images_per_step else 0
    dtype = str(runtime.pipeline_dtype.value).removeprefix("torch.")
    return [
        *card,
        ("pipeline", config.pipeline.path, f"{job.pipeline.resolution} px, {dtype}: {runtime.pipeline_dtype.reason}"),
        ("generation", f"{generation.images_per_step:g} images a step",
         f"{100 * generation.synthetic_fraction:.0f} % of a batch, so each serves {reuse:.1f} times"),
        ("solver", f"{generation.solver}, {generation.num_inference_steps} steps",
         f"guidance {generation.guidance_scale:g}, {generation.slots} slots"),
        ("positives", str(generation.strengths), "strength: weight"),
        ("near-OOD", str(config.near_ood.recipes), f"{100 * generation.near_ood_fraction:.0f} % of generated images"),
    ]  # fmt: skip


def train(job: Job, state: State, step, progress) -> None:
    """Stage contrastive: steps to the end, with metric rows and whole-state checkpoints.

    Raises:
        Terminated: SIGTERM came; the state was checkpointed first.
        NonFinite: an update was refused; a capture was written.
    """
    config, workdir, console = job.config, job.workdir, job.console
    folder, total = workdir.checkpoints / "contrastive", config.learning.steps
    state.meter.restart_interval()
    begun = _progress_of(state)
    try:
        while state.step < total:
            with termination.whole():
                step(state)
                logs = state.step % config.run.log_every == 0 or state.step == total
                saves = state.step % config.run.checkpoint_every == 0 or state.step == total
                if logs or saves:
                    state.optimizer.raise_if_nonfinite(partial(_write_capture, workdir))
                if logs:
                    row = _metric_row(job, state, begun)
                    workdir.log(row)
                    console.step_row(row, total)
                progress(state.step, total)
                if saves:
                    _save_or_warn(job, state)
                if logs or saves:
                    state.meter.restart_interval()
                    begun = _progress_of(state)
    except Terminated:
        state.optimizer.raise_if_nonfinite(partial(_write_capture, workdir))
        checkpoints.save_checkpoint(folder, state.step, state.state_dict(), config.run.keep_checkpoints)
        raise Terminated(f"SIGTERM at step {state.step} of {total}: checkpointed; the same command goes on") from None


def _progress_of(state: State) -> tuple[int, int]:
    """Optimizer steps taken and images generated so far."""
    return state.step, 0 if state.generator is None else state.generator.slots.counts["finished"]


def _save_or_warn(job: Job, state: State) -> None:
    """A checkpoint in passing: a full disk costs this one, not the run, and the older one stays."""
    run = job.config.run
    try:
        checkpoints.save_checkpoint(
            job.workdir.checkpoints / "contrastive", state.step, state.state_dict(), run.keep_checkpoints
        )
    except StorageError as error:
        job.console.warn(str(error))


def _metric_row(job: Job, state: State, begun: tuple[int, int]) -> dict:
    """One row of metrics.jsonl: losses, geometry, mixture, reservoir, times.

    Args:
        begun: `_progress_of` the state where the interval of the times began.
    """
    row = {"step": state.step} | {name: float(value) for name, value in state.logs.items()}
    row["lr"] = state.optimizer.inner.param_groups[0]["lr"]
    steps, images = (now - before for now, before in zip(_progress_of(state), begun, strict=True))
    times = state.meter.interval(steps)
    if state.generator is not None:
        row |= state.mixer.statistics() | state.generator.statistics()
        times["images_per_s"] = images / max(1e-9, times["step_ms"] * steps / 1e3)
        for alarm in state.generator.gate.alarms():
            job.console.warn(alarm)
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


def embed_sets(job: Job, state: State, progress) -> dict[str, FeatureSet]:
    """Stage probe, first half: frozen features of every image set, and of generated images under "generated"."""
    features, classes = {}, job.sets.index.classes
    total, done = sum(len(images.items) for images in job.sets.images.values()), 0
    for name, images in job.sets.images.items():
        found = embed_images(state.embed, images.pixels_DHWC, job.config.evaluation.batch_size)
        known = classes if name in ("train", "val", "test") else ()
        features[name] = feature_set(images.items, found, known)
        done += len(images.items)
        progress(done, total, name)
    return features


def evaluate_features(job: Job, state: State, features: dict[str, FeatureSet], progress) -> Outcome:
    """Stages probe and evaluate: readout and thresholds on train and val, then test, once."""
    config = job.config
    generated = {}
    if state.generator is not None:
        for name, is_ood in (("generated_id_DF", False), ("generated_near_ood_DF", True)):
            images = [pixels for pixels, request in state.generator.examples() if request.is_ood == is_ood]
            if images:
                generated[name] = embed_images(state.embed, torch.stack(images), config.evaluation.batch_size)
    classifier = None
    if config.learning.method == "cross_entropy":
        encoder = state.encoder if state.average is None else state.average.module
        linear = encoder.linear
        classifier = Probe(
            linear.weight.detach().float().cpu().T.contiguous(), linear.bias.detach().float().cpu(), float("nan"), {}
        )
    return evaluate(
        train=features["train"],
        val=features["val"],
        test=features["test"],
        near_ood_val=features.get("near_ood_val"),
        near_ood_test=features.get("near_ood_test"),
        far_ood_test=features.get("far_ood_test"),
        **generated,
        classes=job.sets.index.classes,
        probe=config.probe,
        evaluation=config.evaluation,
        seed=config.run.seed,
        classifier=classifier,
        progress=progress,
    )


def write_results(job: Job, state: State, features: dict[str, FeatureSet], outcome: Outcome) -> dict:
    """Stage report: predictions, export, report.html, results.json; results last, because they say "finished"."""
    from modules.commands.run_report import export, write_run_report

    results = dict(outcome.results)
    if state.generator is not None:
        counts = state.generator.statistics()
        results |= {f"generation.{name}": value for name, value in counts.items() if not name.startswith("gate.")}
        results |= {f"mix.{name}": value for name, value in state.mixer.statistics().items()}
    results |= {
        "learning.steps": state.step,
        "cost.seconds": sum(value for name, value in job.meter.seconds.items() if name.startswith("stage.")),
        "cost.forward_passes": state.forward_rows,
        "cost.images_generated": results.get("generation.images_finished", 0),
        "cost.reuse": results.get("generation.reuse", 0.0),
        "run.peak_memory_gib": job.meter.peak_memory_gib(),
    }
    results |= {f"seconds.{name}": round(value, 3) for name, value in sorted(job.meter.seconds.items())}
    export(job, state, outcome)
    write_run_report(job, state, features, outcome, results)
    job.workdir.write_json("results.json", results)
    shutil.rmtree(job.workdir.checkpoints, ignore_errors=True)
    return results


def show(results: dict, workdir: Workdir, console, note: str = "") -> None:
    """The closing table."""

    def interval(key: str, scale: float = 100.0, unit: str = " %") -> str:
        if key not in results:
            return "-"
        ends = ""
        if f"{key}_low" in results:
            ends = f"  [{scale * results[f'{key}_low']:.1f}, {scale * results[f'{key}_high']:.1f}]"
        return f"{scale * results[key]:.1f}{unit}{ends}"

    score = results["headline.score"]
    rows = [
        ("test accuracy", interval("test.accuracy")),
        ("test kNN accuracy", interval("test.knn_accuracy")),
        (f"near-OOD AUROC ({score})", interval(f"test.near_ood.{score}.auroc")),
        (f"far-OOD AUROC ({score})", interval(f"test.far_ood.{score}.auroc")),
        ("images generated", f"{results['cost.images_generated']:.0f}"),
        ("time", f"{results['cost.seconds']:.0f} s, peak memory {results['run.peak_memory_gib']:.2f} GiB"),
    ]
    title = f"{workdir.path}" + (f" ({note})" if note else "")
    console.result(title, [row for row in rows if row[1] != "-"], f"report: {workdir.path / 'report.html'}")


def _write_capture(workdir: Workdir, failure: dict) -> str:
    """Store the batch and figures of a refused update for replay; says where."""
    from safetensors.torch import save

    path = workdir.path / "nonfinite.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in failure["tensors"].items()}
    facts = {name: str(failure[name]) for name in ("step", "loss", "gradient_norm")}
    checkpoints.write_atomic(path, save(tensors, metadata=facts))
    return str(path)


def _load(folder: Path, part, console) -> bool:
    """Bring `part` to the newest valid checkpoint below `folder`; whether there was one."""
    found = checkpoints.load_newest(folder)
    if found is None:
        return False
    step, tree, complaints = found
    for complaint in complaints:
        console.warn(complaint)
    part.load_state_dict(tree)
    console.line(f"  resumed at step {step} of {folder.name}")
    return True


def _noted(progress, note: str):
    return lambda done, total, *_: progress(done, total, note)
