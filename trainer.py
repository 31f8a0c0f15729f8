"""The entry point, and the story of a run: from images to a trained, probed and OOD-evaluated encoder.

    python trainer.py run configs/demo.yaml learning.steps=400

One process trains an image encoder with SupCon while a Stable Diffusion image-to-image engine in the same process
generates the encoder's positives and near-OOD negatives in memory. A step has seven phases; a run has six stages:
data -> tokens -> contrastive -> probe -> evaluate -> report.
"""

import importlib
import sys
from contextlib import suppress
from functools import partial

VERBS = {  # verb -> (module below modules.commands, one line of help)
    "run": ("run", "CONFIG [section.key=value ...]   train, probe, evaluate, report; again: go on, or show the result"),
    "compare": ("compare", "CONFIG [--arms A,B] [--seeds 0,1] [...]   every arm at every seed, then one comparison"),
    "evaluate": ("evaluate", "RUN [data.root=...]   probe and score a saved run again, or judge other images by it"),
    "tune": ("tune", "CONFIG [--quality] [--presets] [...]   the ratio of generation to training that pays, measured"),
    "profile": ("profile", "CONFIG [...]   where the milliseconds of a step go, and three changes likely to help"),
    "preview": ("preview", "CONFIG [--classes=a,b] [--strengths=.2,.5] [...]   see what a run would generate"),
    "check": ("check", "CONFIG [...]   data found, memory, checkpoint and time of a run, before it is started"),
    "doctor": ("doctor", "[--device=cpu]   what this machine has and what of it really works; needs no CONFIG"),
    "train-pipeline": ("train_pipeline", "CONFIG [...]   make a small Stable Diffusion pipeline from captioned images"),
}
USAGE = "usage: python trainer.py VERB CONFIG [section.key=value ...]\n\n" + "\n".join(
    f"  {verb:<16}{help_line}" for verb, (_, help_line) in VERBS.items()
)


def step(state) -> None:
    """One optimizer step in seven phases."""
    from modules.data.views import two_views

    phase, config = state.meter.phase, state.config
    log = (state.step + 1) % config.run.log_every == 0 or state.step + 1 == config.learning.steps
    with phase("generate"):
        if state.generator is not None:
            state.overlap.generate(partial(state.generator.advance, state.step))
    with phase("mix"):
        batch = state.mixer.batch(state.step)
        state.overlap.launch()  # in stream mode generation starts here, in parallel with the rest of the step
    with phase("augment"):
        draws = {"seed": config.run.seed, "step": state.step, "learning": config.learning}
        views = two_views(batch.images_BHWC, **draws, out_dtype=state.precision)
    with phase("encode"), state.autocast():
        outputs = state.encoder(views, state.objective.output, [entry >= 0 for entry in batch.entries])
    with phase("loss"):
        loss, state.logs = state.objective(outputs, batch.labels_B, batch.is_ood_B, log=log)
    with phase("backward"):
        state.optimizer.backward(loss)
    with phase("optimize"):
        captured = {"images": batch.images_BHWC, "labels": batch.labels_B, "is_ood": batch.is_ood_B}
        state.optimizer.step(state.step, loss, captured)
        if state.average is not None:
            state.average.update_parameters(state.encoder)
    state.forward_rows += len(views)
    state.step += 1


def run(config, origins: dict[str, str], console) -> dict:
    """Do a whole run, or resume or show the one its directory holds; returns its results."""
    from modules.evaluation.evaluate import embed_sets
    from modules.training import stages
    from modules.training.loop import train
    from modules.training.results import evaluate_features, show, write_results
    from modules.workdir import Workdir

    workdir = Workdir(config, origins)
    try:
        if (results := workdir.results()) is not None:
            show(results, workdir, console, "finished before; this is its result")
            return results
        job = stages.Job(config, workdir, console)
        with job.stage("data") as progress:
            stages.load_data(job, progress)
        with job.stage("tokens") as progress:
            stages.learn_tokens(job, progress)
        with job.stage("contrastive") as progress:
            state = stages.build(job, progress)
            train(job, state, step, progress)
        with job.stage("probe") as progress:
            features = embed_sets(job.sets, state.embed, config.evaluation, progress)
        with job.stage("evaluate") as progress:
            outcome = evaluate_features(job, state, features, progress)
        with job.stage("report") as progress:
            results = write_results(job, state, features, outcome)
        show(results, workdir, console)
        return results
    finally:
        workdir.close()


def main(arguments: list[str]) -> int:
    """Run a verb; returns the exit code of the process (see modules/errors.py)."""
    from modules.errors import UserError
    from modules.termination import behind, termination

    if not arguments or arguments[0] == "help" or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS or not (rest or VERBS[verb][1].startswith("[")):
        print(
            f"trainer.py: {f'unknown verb {verb!r}' if verb not in VERBS else f'{verb} needs a CONFIG'}\n\n{USAGE}",
            file=sys.stderr,
        )
        return 2

    termination.listen()
    try:
        from modules.commands.flags import check_arguments
        from modules.console import Console

        path, *overrides = rest or [""]
        check_arguments(verb, path, overrides)  # before the verb imports torch, so that mistakes are reported at once
        importlib.import_module(f"modules.commands.{VERBS[verb][0]}").command(path, overrides, Console(), run, step)
    except Exception as error:
        found = behind(error) or error
        if not isinstance(found, UserError):
            raise
        _tell(f"error: {found}")
        return found.code
    except KeyboardInterrupt:
        _tell("interrupted; start the same command again to go on from what is kept")
        return 130
    return 0


def _tell(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the exit code tells the same
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
