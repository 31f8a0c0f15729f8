"""`trainer.py train-pipeline CONFIG`: make a small Stable Diffusion pipeline from a captioned image set.

Stages: read the pack, train the VAE, encode every image once, train text encoder and UNet, export, draw sheets. Each
training stage resumes exactly from its newest checkpoint; the finished pipeline stands in `<run>/pipeline`.
"""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch

from modules import state
from modules.config import Pipeline, PipelineConfig
from modules.data.images import load_images
from modules.data.index import Index, read_raw
from modules.diffusion import train_pipeline as training
from modules.diffusion.pipeline import StableDiffusion, load_pipeline
from modules.diffusion.prompts import OBJECT_TEMPLATES, fill, phrase_of
from modules.errors import ConfigError, DataError
from modules.evaluation.sheets import curves_png, sheet_png
from modules.runtime import environment, resolve_runtime, stream
from modules.settings import load_config
from modules.workdir import Workdir

SHEET_ROWS, SHEET_COLUMNS = 6, 8


def command(path: str, overrides: list[str], console, run, step) -> Path:
    """Train, export and picture a pipeline; returns its folder.

    Raises:
        DataError: no image set, or images smaller than the pipeline's resolution.
    """
    config, origins = load_config(path, overrides, schema=PipelineConfig)
    workdir = Workdir(config, origins)
    folder = Path(config.training.out or workdir.path / "pipeline")
    if (workdir.path / "results.json").exists():
        console.line(f"{folder}: finished; delete {workdir.path} to train it again")
        return folder
    workdir.write_json("environment.json", environment())
    runtime = resolve_runtime(config.run, _Dtype())
    with console.stage("data") as progress:
        index = read_raw(config.data.root)
        items = [item for item in index.items if item.split in ("", "train")]
        if not items:
            raise DataError(f"{config.data.root}: holds no image to train on (split train, or no split column)")
        images = load_images(index, items, config.shape.resolution, config.data, progress,
                             masks=False, min_size=config.shape.resolution)  # fmt: skip
    captions, nouns, objects = wordings(images.items)
    console.line(f"{len(captions)} images, {len(set(objects))} objects, device {runtime.device.value}")
    device = runtime.device.value
    pixels = images.pixels_DHWC.to(device)

    start = started_from(config, runtime.device.value)
    if start is None:
        stage = training.vae_stage(config.shape, config.training, config.run.seed)
        vae_curve = _train(stage, lambda: training.vae_step(stage, pixels), "vae", workdir, console, config)
        vae, tokenizer = stage.averages["vae"].eval(), training.build_tokenizer(captions, config.shape)
        moments, scaling = training.latent_statistics(vae, pixels)
        text, unet = training.build_text_and_unet(config.shape, tokenizer, config.run.seed)
    else:
        vae, vae_curve, tokenizer, scaling = start.vae, [], start.tokenizer, start.scaling_factor
        moments, _ = training.latent_statistics(vae, pixels)
        text, unet = training.copy_text_and_unet(start)

    wording = training.Captions(captions, nouns, objects, tokenizer, config.training)
    second = training.unet_stage(text, unet, config.training, wording.num_objects, config.run.seed)
    alphas = training.alphas_cumprod(training.SCHEDULER)
    unet_curve = _train(
        second, lambda: training.unet_step(second, moments, scaling, wording, alphas), "unet", workdir, console, config
    )

    facts = training_facts(config, path, overrides, index, captions, images, tokenizer, start)
    parts = (vae, second.averages["text_encoder"].eval(), second.averages["unet"].eval())
    digests = training.export(folder, *parts, tokenizer, scaling, facts)
    curves = {"VAE reconstruction error (mean square)": vae_curve} if vae_curve else {}
    curves["UNet loss (min-SNR)"] = unet_curve
    state.write_atomic(workdir.path / "curves.png", curves_png(curves))
    for name, (rows, labels) in sheets(folder, pixels, captions, config.run.seed).items():
        state.write_atomic(workdir.path / f"{name}.png", sheet_png(rows, labels))
    results = {"train.unet_loss": unet_curve[-1][1], "sha256": digests}
    shown = [("folder", str(folder))]
    if vae_curve:
        results["train.vae_psnr_db"] = 10 * math.log10(4 / vae_curve[-1][1])
        shown.append(("VAE PSNR on training images, last interval", f"{results['train.vae_psnr_db']:.2f} dB"))
    workdir.write_json("results.json", results)
    shutil.rmtree(workdir.checkpoints, ignore_errors=True)
    workdir.close()
    console.result("pipeline", shown)
    return folder


def started_from(config: PipelineConfig, device: torch.device) -> StableDiffusion | None:
    """The pipeline that `training.start` names, in fp32; None: training starts from scratch.

    Raises:
        ConfigError: the pipeline is of another resolution than `shape.resolution`, or predicts something but noise.
        DataError: the folder or a part of it is missing or broken.
    """
    if not config.training.start:
        return None
    start = load_pipeline(Pipeline(path=config.training.start), device)
    if start.resolution != config.shape.resolution:
        raise ConfigError(
            f"training.start: {start.source} is a pipeline of {start.resolution} px, shape.resolution is "
            f"{config.shape.resolution}; set shape.resolution={start.resolution}"
        )
    if start.prediction_type != training.SCHEDULER["prediction_type"]:
        raise ConfigError(
            f"training.start: {start.source} predicts {start.prediction_type}; only epsilon is trained on"
        )
    return start


class _Dtype:
    """A pipeline trained from scratch is trained in fp32."""

    dtype = "fp32"


def wordings(items) -> tuple[list[str], list[str], list[str]]:
    """Caption, noun and object of each image; an image without a caption is "<template> <label>"."""
    captions, nouns, objects = [], [], []
    for item in items:
        noun = item.noun or item.label.replace("_", " ").replace("-", " ").lower()
        captions.append(item.caption or fill(OBJECT_TEMPLATES[0], noun))
        nouns.append(noun)
        objects.append(item.group or item.path)
    return captions, nouns, objects


def training_facts(config, path, overrides, index: Index, captions, images, tokenizer, start) -> dict:
    """What `training.json` says of the pipeline's making; of one that was trained on, of its first making as well."""
    words = {word for caption in captions for word in phrase_of(caption).lower().split()}
    words |= {word for template in OBJECT_TEMPLATES for word in fill(template, "object").lower().split()}
    data_hash = hashlib.sha256("".join(images.digests).encode()).hexdigest()
    before = {}
    if start is not None:
        record = Path(start.source) / "training.json"
        earlier = json.loads(record.read_text()) if record.is_file() else {"source": start.source}
        words |= set(earlier.get("trained_words", ()))
        before = {"started_from": {k: v for k, v in earlier.items() if not k.endswith("_words")}}
    whole = {word for word in words if len(tokenizer.tokenize(word)) == 1}
    return before | {
        "command": "python trainer.py train-pipeline " + " ".join([str(path), *overrides]),
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


def _train(stage, step, name: str, workdir: Workdir, console, config) -> list[tuple[int, float]]:
    """Run a stage to its end from its newest checkpoint; returns its curve (step, mean loss of the interval)."""
    folder = workdir.path / "checkpoints" / name
    found = state.load_newest(folder)
    curve: list[tuple[int, float]] = []
    if found:
        _, tree, complaints = found
        for complaint in complaints:
            console.warn(complaint)
        stage.load_state_dict(tree["stage"])
        curve = [tuple(point) for point in tree["curve"]]
    with console.stage(name) as progress:
        total, count = 0.0, 0
        while stage.step < stage.steps:
            total, count = total + step(), count + 1
            last = stage.step == stage.steps
            if stage.step % config.run.log_every == 0 or last:
                curve.append((stage.step, total / count))
                total, count = 0.0, 0
                progress(stage.step, stage.steps, f"loss {curve[-1][1]:.5f}")
            if stage.step % config.run.checkpoint_every == 0 or last:
                tree = {"stage": stage.state_dict(), "curve": [list(point) for point in curve]}
                state.save_checkpoint(folder, stage.step, tree, config.run.keep_checkpoints)
    return curve


@torch.no_grad()
def sheets(folder: Path, pixels_NHWC, captions: list[str], seed: int) -> dict[str, tuple[list, list[str]]]:
    """Rows of images (uint8 HWC) with labels: reconstructions, and samples for captions; made by diffusers itself."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.randperm(len(pixels_NHWC), generator=stream(seed, "sheets"))[: SHEET_ROWS * SHEET_COLUMNS]
    chosen = pixels_NHWC[draw].cpu()
    x = training.to_unit_range(chosen)
    decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    reconstruction = [list(rows) for pair in zip(chosen.split(8), decoded.split(8), strict=True) for rows in pair]
    labels, samples = [], []
    for row in draw[:SHEET_ROWS].tolist():
        generator = stream(seed, "samples", row)
        made = pipe([captions[row]] * SHEET_COLUMNS, num_inference_steps=25, guidance_scale=3.0, generator=generator,
                    output_type="pt").images  # fmt: skip
        samples.append(list((made * 255).round().to(torch.uint8).permute(0, 2, 3, 1)))
        labels.append(captions[row])
    names = ["source", "decoded"] * (len(reconstruction) // 2)
    return {"reconstructions": (reconstruction, names), "samples": (samples, labels)}
