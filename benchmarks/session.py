"""Prepares a run up to its first step, in a temporary directory, for the step and quality benchmarks.

It goes through the trainer's own stages, so that the benchmarks time what users run. Everything it writes (config, data
list, tokens) is written before the first step and deleted afterwards.
"""

import dataclasses
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from modules.console import Console
from modules.settings import load_config
from modules.training import stages
from modules.training.job import Job, State
from modules.workdir import Workdir

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


@contextmanager
def session(settings: dict[str, object], path: Path = DEMO) -> Iterator[tuple[Job, State]]:
    """A job and its state before step 0, under the config at `path` overridden by `settings` ("section.key": value).

    The run directory is temporary unless settings name a `run.dir`.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-run-") as folder:
        settings = {"run.dir": folder} | settings
        config, origins = load_config(path, [f"{name}={as_yaml(value)}" for name, value in settings.items()])
        workdir = Workdir(config, origins)
        try:
            job = Job(config, workdir, Console(io.StringIO()))
            with job.stage("data") as progress:
                stages.load_data(job, progress)
            with job.stage("tokens") as progress:
                stages.learn_tokens(job, progress)
            with job.stage("contrastive") as progress:
                state = stages.build(job, progress)
            yield job, state
        finally:
            workdir.close()


def with_images_per_step(config, images: float):
    """The config with another `generation.images_per_step`; it may be given to a running generator at any step."""
    return dataclasses.replace(config, generation=dataclasses.replace(config.generation, images_per_step=images))


def as_yaml(value) -> str:
    """A value as the right-hand side of `section.key=value`."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
