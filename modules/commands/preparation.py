"""Shared setup of tune, profile, preview and check: data, pipeline and tokens, prepared as in a run.

These verbs read what `run` reads, but write to `<run>/<verb>` and keep no trained encoder. So the run itself can be
started or resumed before and after, and a verb can be repeated with any settings.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from modules.config import Config
from modules.console import Console
from modules.diffusion import tokens as token_files
from modules.rules import generates, screened
from modules.settings import with_settings
from modules.training import stages
from modules.training.card import run_card
from modules.training.job import Job, State
from modules.workdir import Workdir


@contextmanager
def opened(config: Config, origins: dict[str, str], console: Console, verb: str) -> Iterator[Job]:
    """Context with a Job in the directory `<run.dir>/<run.name>/<verb>`; results of an earlier call are replaced."""
    looks = {"run.name": f"{config.run.name}/{verb}", "evaluation.judge_steps": 0}
    if verb != "check":  # check must fail where a run would; the others compute no intervals and accept few test groups
        looks["evaluation.bootstrap"] = 0
    config = with_settings(config, looks)
    workdir = Workdir(config, origins, replacing=True)
    try:
        yield Job(config, workdir, console)
    finally:
        workdir.close()


def load_generation(job: Job, progress: Callable[..., None], *, learn: bool) -> str:
    """Do stage tokens: pipeline, VAE moments of the train images, class tokens; returns where the tokens come from.

    Args:
        learn: learn tokens that are not in the cache. If False these keep their initial values, which suffices for
            measuring time and memory, because neither depends on the values.

    Raises: as the stage itself.
    """
    config = job.config
    if not generates(config):
        return "none, because nothing is generated"
    stages.learn_tokens(job, progress, learn=learn)
    if config.inversion.class_agnostic:
        return "the initializer word"
    if learn:
        return "learned, or read from the cache"
    found = cached_tokens(job)
    job.tokens = found or initial_tokens(job)
    return "read from the cache" if found else "not learned yet; at their initializer, which time does not depend on"


def cached_tokens(job: Job) -> token_files.Tokens | None:
    """The tokens that a run with this configuration would read from the cache, or None."""
    key = stages.token_key(job)
    return token_files.cached_tokens(job.cache_dir, key, job.sets.index.classes, job.pipeline.digest)


def initial_tokens(job: Job) -> token_files.Tokens:
    """Class tokens as textual inversion starts from them: every vector is the embedding of its initializer word."""
    pipeline, settings, classes = job.pipeline, job.config.inversion, job.sets.index.classes
    own = stages.initializers(job)
    rows_CE = token_files.initializer_rows(pipeline, own or (settings.initializer,) * len(classes)).cpu()
    return token_files.Tokens(
        classes=classes,
        vectors_CKE=rows_CE[:, None].repeat(1, settings.num_vectors, 1),
        base_model=pipeline.digest,
        initializer=settings.initializer,
        images_seen=0,
        seed=job.config.run.seed,
        initializers=own,
    )


def print_card(job: Job) -> None:
    """The run card of a job, as `run` prints it: every choice with its reason."""
    job.console.card(str(job.workdir.path), run_card(job))


def thrown_away(job: Job, progress: Callable[..., None]) -> State:
    """A throwaway state for timing: slots as busy as in a run, but rings not filled, since no time depends on them."""
    state = stages.build(variant(job, {"generation.prefill": 0.0}), progress)
    if state.generator is not None:
        state.generator.warm_up()
        if job.device.type == "cuda" and job.config.generation.mode != "sequential" and not screened(job.config):
            job.console.line(
                "  generation and training are timed one after the other; a run may take them side by side"
            )
    return state


def variant(job: Job, settings: dict[str, object]) -> Job:
    """A copy of a job with changed settings and a silent console, because its run card has already been shown."""
    return replace(job, config=with_settings(job.config, settings), console=Console(io.StringIO()))
