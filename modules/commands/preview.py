"""`trainer.py preview CONFIG`: shows what a run would generate, before its encoder is trained.

Draws one contact sheet per class: the sources, then a row for each strength of the positives and for each near-OOD
recipe. All images of a column start from the source at its top with the same noise, so that rows differ by the recipe
alone. Sheets and the provenance of their images are written to preview/ in the run's directory.

    --classes=a,b          classes to show (the first six; all: every one)
    --strengths=.2,.4      strengths of the positives (those of generation.strengths)
    --recipes=a,b          near-OOD recipes (those of near_ood.recipes; none: no near-OOD)
    --images=N             images a row (6)
    --again=FILE           only regenerate images, from a JSON file of their provenance
"""

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.pixels import pixels
from kernels.staging import upload
from modules.commands.flags import FLAGS, SWITCH, number, split_flags, words
from modules.commands.preparation import load_generation, opened
from modules.config import Config
from modules.console import Console
from modules.diffusion.conditioning import Conditioning
from modules.diffusion.pipeline import to_vae_range
from modules.diffusion.recipes import POSITIVE, near_ood_strength
from modules.diffusion.remake import make
from modules.diffusion.requests import Request
from modules.diffusion.tokens import PromptBank
from modules.errors import ConfigError, DataError
from modules.evaluation.sheets import sheet_png
from modules.rules import DIFFUSION_RECIPES, FREE_RECIPES, generates, needs_masks, used_strengths
from modules.settings import load_config, with_settings
from modules.state import write_atomic
from modules.training import stages
from modules.training.job import Job

CLASSES, IMAGES = 6, 6
SHOWN_PX = 128  # approximate side of an image on a sheet; larger images are shrunk to at most twice that


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a sheet below the sources."""

    recipe: str  # positive, or a near-OOD recipe
    strength: float

    @property
    def label(self) -> str:
        return self.recipe if self.recipe in FREE_RECIPES else f"{self.recipe} {self.strength:g}"


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> list[Path]:
    """Draw the sheets; returns their files.

    Raises:
        ConfigError: nothing is generated, an unknown flag, class or recipe, a strength that takes no denoising step.
        DataError: --again names no readable provenance, or one of another pipeline or of masks that are not read.
    """
    flags, overrides = split_flags(overrides, FLAGS["preview"])
    config, origins = load_config(path, overrides)
    if not generates(config):
        raise ConfigError("preview: generation.synthetic_fraction is 0, so nothing is generated; set it above 0")
    variants = _variants(flags, config)
    columns = number(flags, "images", IMAGES)
    if flags.get("again") == SWITCH:
        raise ConfigError("command line: --again names no file; give one, such as --again=preview/provenance.json")
    asked = read_provenance(Path(flags["again"])) if "again" in flags else []
    shown = {v.recipe: 1.0 for v in variants if v.recipe != POSITIVE and not config.near_ood.recipes.get(v.recipe)}
    if shown:  # check what a recipe needs (masks, a grid that divides the image) before tokens are learned
        config = with_settings(config, {"near_ood.recipes": config.near_ood.recipes | shown})
    if _masked(config, variants) and not needs_masks(config):  # needed by a role that the run itself does not generate
        config = with_settings(config, {"generation.near_ood_fraction": 0.5, **_exposed(config)})
    for variant in variants:
        _alone(config, variant)  # refuses a strength that takes no step now, not after tokens were learned
    with opened(config, origins, console, "preview") as job:
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        _check_sources(job, asked)
        labels = _classes(flags, job.sets.index.classes)
        with job.stage("tokens") as progress:
            console.line(f"  class tokens: {load_generation(job, progress, learn=True)}")
        if asked:
            files = _make_again(job, asked)
        else:
            with job.stage("preview") as progress:
                files = _draw(job, labels, variants, columns, progress)
        if len(labels) < len(job.sets.index.classes) and not asked:
            console.line(f"{len(labels)} of {len(job.sets.index.classes)} classes; --classes=all shows every one")
        for file in files:
            console.line(f"written: {file}")
        if not asked:
            console.line(f"an image again: --again=FILE with its entry of {job.workdir.path / 'provenance.json'}")
    return files


def requests_of(job: Job, variant: Variant, sources: dict[int, list[int]]) -> dict[int, list[Request]]:
    """Class -> a request for each of its sources (train rows), as in a run that generates only this variant.

    The k-th request of a class has image index k in every variant, and therefore the same noise.
    """
    own = dataclasses.replace(job, config=_alone(job.config, variant))
    recipes, index = own.recipes(), 0
    found: dict[int, list[Request]] = {label: [] for label in sources}
    while any(len(found[label]) < len(rows) for label, rows in sources.items()):
        request = recipes.request(index)
        index += 1
        column = len(found.get(request.label, ()))
        if column < len(sources.get(request.label, ())):
            source = sources[request.label][column]
            found[request.label].append(dataclasses.replace(request, image_index=column, source=source))
    return found


def _alone(config: Config, variant: Variant) -> Config:
    """The config of a run that generates only this variant; ConfigError if such a run is invalid."""
    settings: dict[str, object] = {"generation.near_ood_fraction": float(variant.recipe != POSITIVE)}
    if variant.recipe == POSITIVE:
        settings["generation.strengths"] = {variant.strength: 1.0}
    else:
        settings |= {"near_ood.recipes": {variant.recipe: 1.0}, "near_ood.strength": variant.strength}
    return with_settings(config, settings | _exposed(config))


def read_provenance(file: Path) -> list[Request]:
    """The requests in a JSON file, which holds one or a list of them, as written by reports and previews.

    Raises:
        DataError: the file is not readable, not JSON, empty, or not the provenance of images.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: not a readable JSON file ({error}); --again takes the provenance of images"
        ) from error
    if found == []:
        raise DataError(f"{file}: holds no image; --again takes the provenance of one or more")
    try:
        return [Request.from_dict(values) for values in (found if isinstance(found, list) else [found])]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{file}: not the provenance of an image ({error}); copy it from a report's contact sheet or from "
            "preview/provenance.json"
        ) from error


def _draw(
    job: Job, labels: list[int], variants: list[Variant], columns: int, progress: Callable[..., None]
) -> list[Path]:
    """Draw a sheet for each class; all images of a class are generated together to keep the slots busy."""
    sources = _sources(job, labels, variants, columns)
    wanted = {variant: requests_of(job, variant, sources) for variant in variants}
    files, provenance = [], []
    for done, label in enumerate(labels, 1):
        requests = [request for variant in variants for request in wanted[variant][label]]
        images = iter(_images(job, requests))
        rows = [[_shown_source(job, row) for row in sources[label]]]
        rows += [[next(images) for _ in sources[label]] for _ in variants]
        name = job.sets.index.classes[label]
        files.append(job.workdir.path / f"{_file_name(name, label)}.png")
        captions = [f"{name}: source", *(variant.label for variant in variants)]
        write_atomic(files[-1], sheet_png(rows, captions, scale=_scale(rows)))
        provenance += [request.as_dict() for request in requests]
        progress(done, len(labels), name)
    job.workdir.write_json("provenance.json", provenance)
    return files


def _make_again(job: Job, asked: list[Request]) -> list[Path]:
    """Draw a sheet for each provenance, with its source and the regenerated image.

    Image indices repeat across the rows and sheets of a preview, so files of the same index are numbered.
    """
    files: list[Path] = []
    earlier: Counter[int] = Counter()
    for request in asked:
        earlier[request.image_index] += 1
        number = f"-{earlier[request.image_index]}" if earlier[request.image_index] > 1 else ""
        rows = [[_shown_source(job, request.source), _images(job, [request])[0]]]
        source = job.sets.train.items[request.source].path
        caption = f"{request.image_index}: {request.recipe} {request.strength:g} of {source}"
        files.append(job.workdir.path / f"again-{request.image_index}{number}.png")
        write_atomic(files[-1], sheet_png(rows, [caption], scale=_scale(rows)))
    return files


def _check_sources(job: Job, asked: list[Request]) -> None:
    """Refuse requests whose source, or the mask that they edit within, is not in the train split that was read.

    Raises:
        DataError: it is not.
    """
    train = job.sets.train
    for request in asked:
        if not 0 <= request.source < len(train.items):
            raise DataError(
                f"image {request.image_index}: its source is row {request.source}, the train split has "
                f"{len(train.items)} images; use the data, seed and shots of its run"
            )
        if request.mask_edit != "none" and train.masks_DHW is None:
            raise DataError(
                f"image {request.image_index}: it was edited within an object mask ({request.recipe}, mask_edit "
                f"{request.mask_edit}), and this config reads none; use the config of its run, or set "
                f"generation.mask_edit={request.mask_edit}"
            )


def _images(job: Job, requests: list[Request]) -> list[torch.Tensor]:
    """The images of requests in the given order, each uint8 [H, W, 3] at the size shown on a sheet."""
    bank = PromptBank(job.pipeline, job.tokens, job.config.inversion.initializer)
    conditioning, generation = Conditioning(bank, job.config.run.seed), job.config.generation
    decoded_N3HW = make(
        requests,
        job.pipeline,
        job.sources,
        conditioning,
        conditioning.empty(),
        job.config.run.seed,
        slots=generation.slots,
        decode_batch=generation.decode_batch,
    )
    return list(pixels(decoded_N3HW, _shown(job.pipeline.resolution)).cpu())


def _sources(job: Job, labels: list[int], variants: list[Variant], columns: int) -> dict[int, list[int]]:
    """The first `columns` train rows of each class (or all), only those with an object mask if a variant needs one."""
    usable_D = job.sources.has_mask() if _masked(job.config, variants) else [True] * len(job.sets.train.items)
    of_class: dict[int, list[int]] = {label: [] for label in labels}
    for row, (label, usable) in enumerate(zip(job.sets.labels_D.tolist(), usable_D, strict=True)):
        if usable and len(of_class.get(label, range(columns))) < columns:
            of_class[label].append(row)
    return of_class


def _masked(config: Config, variants: list[Variant]) -> bool:
    """Whether a variant edits within object masks."""
    return config.generation.mask_edit != "none" or any(variant.recipe == "mask_split" for variant in variants)


def _exposed(config: Config) -> dict[str, object]:
    """The setting that near-OOD rows require under cross-entropy, to satisfy a rule that only concerns training."""
    return {"learning.outlier_exposure": 0.5} if config.learning.method == "cross_entropy" else {}


def _shown_source(job: Job, row: int) -> torch.Tensor:
    """A source image at the size shown on a sheet, resized in the same way as generated images."""
    x_13HW = to_vae_range(upload(job.sources.pixels_DHWC[row][None], job.device))
    return pixels(x_13HW, _shown(job.pipeline.resolution))[0].cpu()


def _shown(resolution: int) -> int:
    return min(resolution, 2 * SHOWN_PX)


def _scale(rows: list[list[torch.Tensor]]) -> int:
    return max(1, SHOWN_PX // len(rows[0][0]))


def _file_name(name: str, label: int) -> str:
    """A file name for a class: its number, then its name with all but letters and digits replaced, so never a path."""
    return f"{label:03d}-" + "".join(c if c.isalnum() else "-" for c in name)[:40]


def _variants(flags: dict[str, str], config: Config) -> list[Variant]:
    strengths = words(flags["strengths"]) if "strengths" in flags else used_strengths(config.generation)
    try:
        chosen = [float(strength) for strength in strengths]
    except ValueError:
        raise ConfigError(
            f"command line: --strengths is {flags['strengths']!r}; give numbers in (0, 1], such as --strengths=.2,.4"
        ) from None
    if not chosen or any(not 0 < strength <= 1 for strength in chosen):
        raise ConfigError(f"command line: --strengths is {flags['strengths']!r}; a strength lies in (0, 1]")
    used = [name for name, weight in config.near_ood.recipes.items() if weight > 0]
    names = words(flags["recipes"]) if "recipes" in flags else used
    if "recipes" in flags and not names:
        raise ConfigError("command line: --recipes names nothing; name recipes with commas between them, or none")
    names = [] if names == ["none"] else names
    known = DIFFUSION_RECIPES + FREE_RECIPES
    for name in names:
        if name not in known:
            raise ConfigError(f"command line: --recipes names {name!r}; choose from {', '.join(known)}, or none")
    found = [Variant(POSITIVE, strength) for strength in sorted(chosen)]
    return found + [Variant(name, near_ood_strength(name, config.near_ood)) for name in names]


def _classes(flags: dict[str, str], classes: tuple[str, ...]) -> list[int]:
    asked = words(flags.get("classes", ""))
    if asked == ["all"]:
        return list(range(len(classes)))
    for name in asked:
        if name not in classes:
            inside = [known for known in classes if name.lower() in known.lower()]  # "gear" suggests SpurGear
            close = inside or difflib.get_close_matches(name, classes, n=1)
            hint = (
                f"did you mean {' or '.join(repr(known) for known in close[:3])}?"
                if close
                else f"classes are {', '.join(classes[:20])}"
            )
            raise ConfigError(f"command line: --classes names {name!r}, which is no ID class; {hint}")
    return [classes.index(name) for name in asked] if asked else list(range(min(CLASSES, len(classes))))
