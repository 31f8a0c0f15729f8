"""`trainer.py train-pipeline CONFIG`: trains a small Stable Diffusion pipeline on a captioned image set.

Stages: read the images, train the VAE, encode every image once, train text encoder and UNet, export, draw sheets. Both
training stages resume exactly from their newest checkpoints. The pipeline is written to training.out, by default
`<run>/pipeline`.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from modules import state
from modules.config import Pipeline, PipelineConfig
from modules.console import Console
from modules.data.images import Images, load_images
from modules.data.index import read_raw
from modules.data.items import Index, Item
from modules.diffusion import train_pipeline as training
from modules.diffusion.export_pipeline import export
from modules.diffusion.pipeline import StableDiffusion, load_pipeline, to_vae_range
from modules.diffusion.prompts import OBJECT_TEMPLATES, fill, phrase_of, trained_words
from modules.diffusion.schedule import alphas_cumprod
from modules.diffusion.shapes import SCHEDULER
from modules.errors import ConfigError, DataError, NonFinite, StorageError, Terminated
from modules.evaluation.sheets import curves_png, sheet_png
from modules.memory import named_memory
from modules.runtime import environment, has_bf16, resolve_runtime, stream
from modules.settings import load_config
from modules.termination import termination
from modules.workdir import Workdir

SHEET_ROWS, SHEET_COLUMNS = 6, 8


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> Path:
    """Train and export a pipeline and draw its sheets; returns its folder.

    Raises:
        DataError: no image set, an image without caption or label, images smaller than the pipeline's resolution, or
            images other than those the training began with; or the pipeline was finished before and is gone or changed.
        StorageError: the pipeline could not be written, or another process wrote to the same folder.
        NonFinite: a loss was not finite; the newest checkpoint is from before it.
        Terminated: a signal came; the current stage was checkpointed first.
    """
    config, origins = load_config(path, overrides, schema=PipelineConfig)
    workdir = Workdir(config, origins)
    try:
        folder = Path(config.training.out or workdir.path / "pipeline")
        if (before := workdir.results()) is not None:
            if not _holds(folder, before.get("sha256", {})):
                raise DataError(
                    f"{folder}: is no longer the pipeline that was trained here; restore it, or delete {workdir.path} to "
                    "train it again"
                )
            console.line(f"{folder}: finished; delete {workdir.path} to train it again")
            return folder
        with named_memory("pipeline", config):
            results = _make(config, folder, " ".join([path, *_shown(overrides)]), workdir, console)
        workdir.write_json("results.json", results)
        shutil.rmtree(workdir.checkpoints, ignore_errors=True)
    finally:
        workdir.close()
    shown = [("folder", str(folder))]
    if "train.vae_psnr_db" in results:
        shown.append(("VAE PSNR on training images, last interval", f"{results['train.vae_psnr_db']:.2f} dB"))
    console.result("pipeline", shown)
    return folder


def _shown(overrides: list[str]) -> list[str]:
    """The overrides recorded with a pipeline: all except those that name places on the machine."""
    return [override for override in overrides if not override.startswith(("run.dir=", "run.name=", "training.out="))]


def _make(config: PipelineConfig, folder: Path, arguments: str, workdir: Workdir, console: Console) -> dict:
    """Read the images, train both stages, write `folder`, curves and sheets; returns the content of results.json."""
    workdir.write_json("environment.json", environment())
    device = resolve_runtime(config.run, Pipeline(dtype="fp32")).device.value
    if config.training.bf16 and not has_bf16(device):
        console.line("training.bf16: this device has no bf16, so the VAE is trained in fp32")
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, bf16=False))
    with console.stage("data") as progress:
        index = read_raw(config.data.root)
        items = chosen_items(index, config.data.root)
        images = load_images(index, items, config.shape.resolution, config.data, progress,
                             masks=False, min_size=config.shape.resolution)  # fmt: skip
    captions, nouns, objects = wordings(images.items)
    console.line(f"{len(captions)} images, {len(set(objects))} objects, device {device}")
    pixels = images.pixels_DHWC.to(device)
    start = started_from(config, device)
    read = hashlib.sha256("".join([*images.digests, *captions, start.digest if start else ""]).encode()).hexdigest()
    trainer = _Trainer(config, workdir, console, read)

    vae, vae_curve = _vae(config, start, trainer, pixels)
    moments, scaling = training.latent_statistics(vae, pixels)
    if start is None:
        tokenizer = training.build_tokenizer(captions, config.shape)
        text, unet = training.build_text_and_unet(config.shape, tokenizer, config.run.seed)
    else:
        tokenizer = start.tokenizer
        text, unet = training.copy_text_and_unet(start)
        scaling = scaling if vae_curve else start.scaling_factor
    wording = training.Captions(captions, nouns, objects, tokenizer, config.training)
    second = training.unet_stage(text, unet, config.training, wording.num_objects, config.run.seed, device)
    alphas = alphas_cumprod(SCHEDULER).to(device)
    unet_curve = trainer.train("unet", second, lambda: training.unet_step(second, moments, scaling, wording, alphas))

    facts = training_facts(config, arguments, index, captions, images, tokenizer, start)
    parts = (vae, second.averages["text_encoder"].eval(), second.averages["unet"].eval())
    try:
        digests = export(folder, *parts, tokenizer, scaling, facts)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: the pipeline could not be written ({error}); free some disk space or mend the folder, then start "
            "the same command again: training is done and kept"
        ) from error
    curves = {"VAE reconstruction error (mean square)": vae_curve} if vae_curve else {}
    curves["UNet loss (min-SNR)"] = unet_curve
    state.write_atomic(workdir.path / "curves.png", curves_png(curves))
    for name, (rows, labels) in sheets(folder, pixels, captions, config.run.seed).items():
        state.write_atomic(workdir.path / f"{name}.png", sheet_png(rows, labels))
    if not _holds(folder, digests):
        raise StorageError(
            f"{folder}: another process has written to it meanwhile; set training.out to a folder of its own under another "
            "run.name, or end the other and start the same command again: training is done and kept"
        )
    results = {"train.unet_loss": unet_curve[-1][1], "sha256": digests}
    if vae_curve:
        results["train.vae_psnr_db"] = 10 * math.log10(4 / vae_curve[-1][1])
    return results


def _holds(folder: Path, digests: dict[str, str]) -> bool:
    """Whether the weight files of a pipeline are still those that were written: relative path -> sha256."""
    try:
        return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digests[name] for name in digests)
    except OSError:
        return False


def _vae(
    config: PipelineConfig, start: StableDiffusion | None, trainer: "_Trainer", pixels_NHWC: torch.Tensor
) -> tuple[torch.nn.Module, list[list]]:
    """(VAE, its training curve): trained from scratch, trained further, or kept as it is with an empty curve."""
    recipe, seed = config.training, config.run.seed
    if start is not None and not recipe.further_vae_steps:
        return start.vae, []
    steps = recipe.vae_steps if start is None else recipe.further_vae_steps
    vae = training.build_vae(config.shape, seed) if start is None else training.copy_vae(start)
    stage = training.vae_stage(vae, steps, recipe, seed, pixels_NHWC.device)
    curve = trainer.train("vae", stage, lambda: training.vae_step(stage, pixels_NHWC))
    return stage.averages["vae"].eval(), curve


def started_from(config: PipelineConfig, device: torch.device) -> StableDiffusion | None:
    """The pipeline named by `training.start`, in fp32 on `device`; None if training starts from scratch.

    Raises:
        ConfigError: its resolution is not `shape.resolution`, or it does not predict noise, or its VAE is to be trained
            further and is not an AutoencoderKL.
        DataError: the folder or a part of it is missing or broken.
    """
    if not config.training.start:
        return None
    start = load_pipeline(Pipeline(path=config.training.start), device)
    trained_words(start.source)  # a damaged record of its making is refused now, not once the training is done
    if start.resolution != config.shape.resolution:
        raise ConfigError(
            f"training.start: {start.source} is a pipeline of {start.resolution} px, shape.resolution is "
            f"{config.shape.resolution}; set shape.resolution={start.resolution}"
        )
    if start.prediction_type != SCHEDULER["prediction_type"]:
        raise ConfigError(
            f"training.start: {start.source} predicts {start.prediction_type}; only epsilon is trained on"
        )
    if config.training.further_vae_steps and not isinstance(start.vae, AutoencoderKL):
        raise ConfigError(
            f"training.further_vae_steps: the VAE of {start.source} is a {type(start.vae).__name__}, and only an "
            "AutoencoderKL can be trained on; set training.further_vae_steps=0 to keep it"
        )
    return start


def chosen_items(index: Index, root: str) -> list:
    """The images to train on: split train or none, role id, pretrain or none; OOD images are for evaluation only.

    Args:
        root: the name of the image set, for messages.

    Raises:
        DataError: there is none, or one has neither caption nor noun nor label.
    """
    items = [item for item in index.items if item.split in ("", "train") and item.role in ("", "id", "pretrain")]
    if not items:
        raise DataError(
            f"{root}: holds no image to train on (split train or no split, and role id, pretrain or no role)"
        )
    for item in items:
        if not (item.caption or item.noun or item.label.strip()):
            raise DataError(
                f"{root}: {item.path} has neither a caption nor a label; fill its `caption` column, or `label` for "
                f"{fill(OBJECT_TEMPLATES[0], '<label>')!r}"
            )
    return items


def wordings(items: Sequence[Item]) -> tuple[list[str], list[str], list[str]]:
    """(captions, nouns, objects) of the images; a missing caption is the first object template filled with the noun."""
    captions, nouns, objects = [], [], []
    for item in items:
        noun = item.noun or item.label.replace("_", " ").replace("-", " ").lower()
        captions.append(item.caption or fill(OBJECT_TEMPLATES[0], noun))
        nouns.append(noun)
        objects.append(item.group or item.path)
    return captions, nouns, objects


def training_facts(
    config: PipelineConfig,
    arguments: str,
    index: Index,
    captions: list[str],
    images: Images,
    tokenizer,
    start: StableDiffusion | None,
) -> dict:
    """The content of `training.json`: how the pipeline was trained, and the same of the one it was started from."""
    words = {word for caption in captions for word in phrase_of(caption).lower().split()}
    words |= {word for template in OBJECT_TEMPLATES for word in fill(template, "object").lower().split()}
    data_hash = hashlib.sha256("".join(images.digests).encode()).hexdigest()
    before = {}
    if start is not None:
        record = Path(start.source) / "training.json"
        earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"source": start.source}
        words |= set(earlier.get("trained_words", ()))
        before = {"started_from": {k: v for k, v in earlier.items() if not k.endswith("_words")}}
    whole = {word for word in words if len(tokenizer.tokenize(word)) == 1}
    return before | {
        "command": f"python trainer.py train-pipeline {arguments}",
        "images": len(images.items),
        "data": Path(index.root).name,
        "data_sha256": data_hash,
        "trained_words": sorted(words),
        "single_token_words": sorted(whole),
        "training": {**vars(config.training)},
        "shape": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config.shape).items()},
        "seed": config.run.seed,
        "versions": environment()["packages"],
        "python": sys.version.split()[0],
    }


@dataclass
class _Curve:
    """The mean loss of each interval of steps, and the running sum of the current interval."""

    points: list = field(default_factory=list)  # [step, mean loss]
    total: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        self.total, self.count = self.total + loss, self.count + 1

    def close_interval(self, step: int) -> float:
        self.points.append([step, self.total / self.count])
        self.total, self.count = 0.0, 0
        return self.points[-1][1]


@dataclass(frozen=True)
class _Trainer:
    """Runs training stages, each from its newest checkpoint to its end."""

    config: PipelineConfig
    workdir: Workdir
    console: Console
    read: str  # sha256 of images, captions and the pipeline started from

    def train(self, name: str, stage: training.Stage, step: Callable[[], float]) -> list[list]:
        """Call `step` until the stage is done; returns its curve of [step, mean loss of the interval]."""
        curve = self._resume(name, stage)
        with self.console.stage(name) as progress:
            try:
                while stage.step < stage.steps:
                    with termination.whole():
                        curve.add(step())
                        self._after_step(name, stage, curve, progress)
            except Terminated as stop:
                self._save(name, stage, curve)
                text = f"checkpointed at step {stage.step} of stage {name}; the same command goes on"
                raise Terminated(text, stop.signum) from None
        return curve.points

    def _after_step(self, name: str, stage: training.Stage, curve: _Curve, progress: Callable[..., None]) -> None:
        run, last = self.config.run, stage.step == stage.steps
        if stage.step % run.log_every == 0 or last:
            mean = curve.close_interval(stage.step)
            progress(stage.step, stage.steps, f"loss {mean:.5f}")
        if stage.step % run.checkpoint_every == 0 or last:
            self._save(name, stage, curve)

    def _resume(self, name: str, stage: training.Stage) -> _Curve:
        found = state.load_newest(self.workdir.checkpoints / name)
        if found is None:
            return _Curve()
        step, tree, complaints = found
        for complaint in complaints:
            self.console.warn(complaint)
        if tree["read"] != self.read:
            raise DataError(
                f"data.root {self.config.data.root}: its images, captions or the pipeline of training.start are not "
                "those that this training began with; restore them, or set run.name to begin another one"
            )
        stage.load_state_dict(tree["stage"])
        self.console.line(f"  resumed at step {step} of {name}")
        return _Curve(**tree["curve"])

    def _save(self, name: str, stage: training.Stage, curve: _Curve) -> None:
        """Save a checkpoint, but never a non-finite one.

        Raises:
            NonFinite: a loss of the current or the last finished interval was not finite.
        """
        last = curve.points[-1][1] if curve.points else 0.0
        if not math.isfinite(curve.total + last):
            raise NonFinite(
                f"stage {name}, step {stage.step} or shortly before: the loss is not finite, and nothing of it was saved; "
                f"lower training.{name}_lr, lengthen training.warmup_steps or set training.bf16=false, under another "
                "run.name"
            )
        tree = {"stage": stage.state_dict(), "curve": vars(curve), "read": self.read}
        state.save_checkpoint(self.workdir.checkpoints / name, stage.step, tree, self.config.run.keep_checkpoints)


@torch.no_grad()
def sheets(
    folder: Path, pixels_NHWC: torch.Tensor, captions: list[str], seed: int
) -> dict[str, tuple[list, list[str]]]:
    """{"reconstructions", "samples"} -> (rows of uint8 HWC images on the CPU, their labels).

    They are computed by diffusers' own pipeline, on the device of `pixels_NHWC`.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipe.to(pixels_NHWC.device).set_progress_bar_config(disable=True)
    draw = torch.randperm(len(pixels_NHWC), generator=stream(seed, "sheets"))[: SHEET_ROWS * SHEET_COLUMNS]
    chosen = pixels_NHWC[draw]
    x = to_vae_range(chosen)
    decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    reconstruction = [list(rows) for pair in zip(chosen.cpu().split(8), decoded.split(8), strict=True) for rows in pair]
    labels, samples = [], []
    for row in draw[:SHEET_ROWS].tolist():
        generator = stream(seed, "samples", row)
        made = pipe([captions[row]] * SHEET_COLUMNS, num_inference_steps=25, guidance_scale=3.0, generator=generator,
                    output_type="pt").images  # fmt: skip
        samples.append(list((made * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()))
        labels.append(captions[row])
    names = ["source", "decoded"] * (len(reconstruction) // 2)
    return {"reconstructions": (reconstruction, names), "samples": (samples, labels)}
