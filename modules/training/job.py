"""`Job`, what the stages of a run pass on to each other, and `State`, everything a training step reads."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kernels import backend
from modules.config import Config
from modules.console import Console
from modules.data.mixer import Mixer
from modules.data.sets import ImageSets
from modules.data.views import plain_view
from modules.diffusion.conditioning import tokens_digest
from modules.diffusion.generator import Generator
from modules.diffusion.overlap import Overlap
from modules.diffusion.pipeline import StableDiffusion
from modules.diffusion.presets import Plan
from modules.diffusion.recipes import Recipes
from modules.diffusion.slots import Sources
from modules.diffusion.suitability import Judge
from modules.diffusion.tokens import Tokens
from modules.ema import AverageModel
from modules.learning.encoder import Encoder
from modules.learning.geometry import CollapseAlarm
from modules.learning.objectives import Contrastive, CrossEntropy
from modules.memory import named_memory
from modules.meter import Meter
from modules.optim import Optimizer
from modules.rules import generates
from modules.runtime import Choice, dtype_name, environment, resolve_runtime
from modules.termination import termination
from modules.workdir import Workdir


@dataclass
class Job:
    """A run in progress: its settings, its directory, and what its stages have produced so far."""

    config: Config
    workdir: Workdir
    console: Console
    inputs: dict[str, str] = field(default_factory=dict)  # setting -> sha256 of the files it refers to
    sets: ImageSets | None = None
    pipeline: StableDiffusion | None = None
    plan: Plan | None = None  # the generation settings after the preset was applied
    tokens: Tokens | None = None
    sources: Sources | None = None
    judge: Judge | None = None
    inversion_rows: list[dict] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)  # warnings that `warn_once` has printed, without their digits
    choices: dict[str, Choice] = field(default_factory=dict)  # how images are generated on this machine, see `machine`
    card: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = resolve_runtime(self.config.run, self.config.pipeline, self.config.data.image_size)
        self.device = self.runtime.device.value
        self.meter = Meter(self.device)
        if not self.workdir.goes_on:
            self._write_environment()

    @property
    def device_name(self) -> str:
        """The name of the GPU, or "cpu"."""
        return self.runtime.device.reason if self.device.type == "cuda" else "cpu"  # on a GPU the reason is its name

    @property
    def cache_dir(self) -> Path:
        """The directory in which runs share class tokens and judges."""
        return Path(self.config.run.cache_dir or Path(self.config.run.dir) / "cache")

    def hold_to(self, setting: str, value: str, digest: str, changes: Callable[[], str] | None = None) -> None:
        """Record the sha256 of the files that `setting` refers to; DataError if the run was begun with other files.

        A resumed run rewrites environment.json only once all of its input files have been checked, so a command that is
        refused leaves the record of the commands that did the work. After that check it also warns if the earlier work
        was done on another device, in another precision, or with other threads or kernels.
        """
        self.workdir.hold_to(setting, value, digest, changes)
        waiting = not self._inputs_agree()
        self.inputs[setting] = digest
        if not waiting or not self._inputs_agree():
            return
        if self.workdir.goes_on:
            self._write_environment()
        if otherwise := self.workdir.computes_with(self._computes_with()):
            told = "; ".join(f"{name} was {before}, now {now}" for name, (before, now) in otherwise.items())
            self.console.warn(
                f"this run goes on with other rounding than before ({told}): its results may differ in the last digits, "
                "under another precision by more, from those of a run left as it was; to avoid that, go on with it on a "
                "machine like the one before, under the same run.threads and run.kernels"
            )

    def _inputs_agree(self) -> bool:
        read = {"data.root", "pipeline.path"} if generates(self.config) else {"data.root"}
        return read <= self.inputs.keys()

    def _computes_with(self) -> dict[str, object]:
        """What rounding depends on, with `auto` and 0 resolved for this machine."""
        names = {"precision": self.runtime.precision}
        if generates(self.config):
            names["pipeline dtype"] = self.runtime.pipeline_dtype
        dtypes = {name: dtype_name(choice.value) for name, choice in names.items()}
        triton = [op for op, choice in backend.explain(self.device).items() if choice.name == "triton"]
        kernels = f"triton for {', '.join(triton)}" if triton else "torch"
        return {"device": self.device_name} | dtypes | {"threads": self.runtime.threads.value, "kernels": kernels}

    def _write_environment(self) -> None:
        self.workdir.write_json("environment.json", environment())

    def recipes(self) -> Recipes:
        """The sequence of images that a run with this job's settings generates.

        Raises:
            ConfigError: as `Recipes`.
        """
        pipeline, tokens = self.pipeline, ""
        if not self.config.inversion.class_agnostic:
            tokens = "to be learned" if self.tokens is None else tokens_digest(self.tokens.vectors_CKE.float())
        return Recipes(
            replace(self.config.generation, guidance_scale=self.plan.guidance_scale),
            self.config.near_ood,
            self.plan.grids(pipeline.scheduler),
            self.sets.labels_D.tolist(),
            len(self.sets.index.classes),
            seed=self.config.run.seed,
            resolution=pipeline.resolution,
            preset=self.plan.preset,
            pipeline=pipeline.digest,
            tokens=tokens,
            has_mask=self.sources.has_mask(),
            keywords=self.sets.index.keywords(),
        )

    def warn_once(self, text: str) -> None:
        """Print a warning the first time only; texts that differ only in their numbers are the same warning."""
        if (kind := re.sub(r"[\d.]+", "", text)) not in self.warned:
            self.warned.add(kind)
            self.console.warn(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Run a stage: time it, show its progress, and name it in the error if memory runs out.

        Raises:
            OutOfMemory: see `modules.memory`.
            Terminated: a signal asked to stop, and a library swallowed the exception and went on.
        """
        with named_memory(name, self.config), self.meter.stage(name), self.console.stage(name) as progress:
            yield progress
        termination.obey()


@dataclass
class State:
    """Everything that a training step reads and that carries over to later steps."""

    config: Config
    meter: Meter
    precision: torch.dtype  # of the views and of the encoder's autocast; float32: no autocast
    generator: Generator | None  # None in arms without generated rows
    mixer: Mixer
    encoder: Encoder
    objective: Contrastive | CrossEntropy
    optimizer: Optimizer
    average: AverageModel | None  # the averaged encoder
    alarm: CollapseAlarm
    overlap: Overlap  # where the generation of a step runs
    step: int = 0
    forward_rows: int = 0  # views passed through the encoder so far
    logs: dict = field(default_factory=dict)  # device tensors of the last step

    def autocast(self) -> torch.autocast:
        """The autocast context in which the encoder runs."""
        device = next(self.encoder.parameters()).device.type
        return torch.autocast(device, self.precision, enabled=self.precision != torch.float32)

    @property
    def pool_bytes(self) -> int:
        """Device memory of captured graphs, which torch does not count as allocated."""
        return 0 if self.generator is None else self.generator.slots.pool_bytes

    @property
    def evaluated_encoder(self) -> Encoder:
        """The encoder used for embedding, evaluation and export: the averaged one if there is one."""
        return self.encoder if self.average is None else self.average.module

    def embed(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Features [B, F], float32, of stored images, from the evaluated encoder in evaluation mode."""
        encoder = self.evaluated_encoder
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
        self.overlap.join()
        own = {"step": self.step, "forward_rows": self.forward_rows}
        return own | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, tree: dict) -> None:
        """Restore a `state_dict`."""
        self.overlap.join()
        self.step, self.forward_rows = tree["step"], tree["forward_rows"]
        for name, part in self._parts().items():
            part.load_state_dict(tree[name])
