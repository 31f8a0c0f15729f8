"""Compares finished trials (arms x seeds) on the same test groups.

Nothing is run here. A trial is a run directory with results.json and predictions.safetensors; one that lacks them is
reported as unfinished and left out. All arms must have been evaluated on the same test images. Groups are then
resampled, every arm sees the same resamples, and the difference of two arms is the difference of paired replicates.

Shapes: Q resamples, K seeds.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
import yaml
from torch import Tensor

from modules.errors import DataError
from modules.evaluation.intervals import (
    check_groups,
    metric_replicates,
    over_seeds,
    percentile_interval,
    role_weights,
    student_draws,
)
from modules.evaluation.stored import ROLES, Predictions, load_predictions
from modules.records import read_record

TRIAL_NAME = re.compile(r"(?P<arm>.+)-s(?P<seed>\d+)")
PIPELINE = "sha256.pipeline.path"
COSTS = ("cost.seconds", "cost.forward_passes", "cost.images_generated", "cost.reuse")
REPRESENTATION = ("test.alignment", "test.uniformity", "test.ece", "artifact.probe_auroc", "artifact.score_auroc")
WITHOUT_INTERVAL = (*REPRESENTATION, *COSTS)  # not functions of single test rows


@dataclass(frozen=True)
class Trial:
    """One (arm, seed) with its run directory, finished or not."""

    arm: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """A finished trial with everything a comparison reads."""

    trial: Trial
    results: dict
    settings: dict[str, object]  # "section.key" -> value, of the resolved config
    environment: dict
    predictions: Predictions  # rows sorted by (role, path)


@dataclass(frozen=True)
class Summary:
    """A metric of an arm, or the difference of two arms, over seeds."""

    mean: float
    sd: float | None  # over seeds, with n - 1; None for one seed
    low: float | None  # bootstrap over groups, plus error over seeds; None if the metric is not a function of test rows
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """The result of comparing finished trials."""

    arms: tuple[str, ...]
    baseline: str
    headline: str  # OOD score fixed before the runs
    confidence: float
    resamples: int
    groups: dict[str, int]  # role -> test groups
    images: dict[str, int]  # role -> test images
    summaries: dict[str, dict[str, Summary]]  # arm -> metric -> Summary
    differences: dict[tuple[str, str], dict[str, Summary]]  # (arm, other) -> metric -> Summary of arm - other
    arm_settings: dict[str, dict[str, object]]  # arm -> the settings in which the arms differ
    finished: tuple[Finished, ...]
    unfinished: tuple[tuple[Trial, str], ...] = ()  # with the reason


def find_trials(folder: Path) -> list[Trial]:
    """The trials in a comparison's directory, i.e. its folders named `<arm>-s<seed>`, sorted by arm and seed.

    Raises DataError if there are none.
    """
    matches = [(TRIAL_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("*")) if path.is_dir()]
    trials = [Trial(match["arm"], int(match["seed"]), path) for match, path in matches if match]
    if not trials:
        raise DataError(f"{folder}: holds no run directory named <arm>-s<seed>; run the trials first")
    return sorted(trials, key=lambda trial: (trial.arm, trial.seed))


def read_trials(trials: Iterable[Trial]) -> tuple[list[Finished], list[tuple[Trial, str]]]:
    """(finished trials, unfinished ones with the reason), both in the order given.

    Raises DataError if a finished trial's files are missing or cannot be read, or if its config.yaml has another seed
    than its name.
    """
    finished, unfinished = [], []
    for trial in trials:
        if not (trial.path / "results.json").exists():
            unfinished.append((trial, "no results.json" if trial.path.is_dir() else "not started"))
            continue
        for name in ("predictions.safetensors", "config.yaml"):
            if not (trial.path / name).exists():
                raise DataError(f"{trial.path}: is finished but has no {name}; move it away and run the trial again")
        settings = _flat(yaml.safe_load((trial.path / "config.yaml").read_text()))
        if settings.get("run.seed") != trial.seed:
            raise DataError(
                f"{trial.path}: its config.yaml has run.seed={settings.get('run.seed')}, its name says {trial.seed}; "
                "move it away and run the trial again"
            )
        environment = trial.path / "environment.json"
        finished.append(
            Finished(
                trial,
                read_record(trial.path / "results.json"),
                settings,
                read_record(environment) if environment.exists() else {},
                _sorted_rows(load_predictions(trial.path / "predictions.safetensors")),
            )
        )
    return finished, unfinished


def compare(
    finished: Sequence[Finished],
    unfinished: Sequence[tuple[Trial, str]] = (),
    *,
    arms: Sequence[str] = (),
    baseline: str = "",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """The comparison of finished trials; `arms` gives their order, `baseline` the arm that others are compared with.

    An arm's value is the mean over its seeds; the difference of two arms is taken over the seeds that both have.
    Replicate q draws the same groups for every arm and seed. With one seed, intervals cover the choice of groups alone.

    Raises DataError if no trial is finished, trials differ in test images, headline score, the images read at one seed,
    pipeline weights or (within an arm) settings, there are too few groups, or the baseline has no finished trial.
    """
    if not finished:
        raise DataError("no trial is finished: nothing can be compared")
    _check_comparable(finished)
    order = list(dict.fromkeys([*arms, *(one.trial.arm for one in finished)]))
    seeds = {arm: sorted(one.trial.seed for one in finished if one.trial.arm == arm) for arm in order}
    seeds = {arm: given for arm, given in seeds.items() if given}
    if baseline and baseline not in seeds:
        raise DataError(f"the baseline arm {baseline!r} has no finished trial; finished are {', '.join(seeds)}")
    groups = _groups(finished[0].predictions)
    check_groups({f"test {role}": members for role, members in groups.items()}, resamples)

    weights = role_weights(finished[0].predictions, resamples, seed=seed)
    values: dict[tuple[str, int], dict[str, float]] = {}
    replicates: dict[tuple[str, int], dict[str, Tensor]] = {}
    for one in finished:
        key = (one.trial.arm, one.trial.seed)
        replicates[key] = metric_replicates(one.predictions, weights)
        compared = [*replicates[key], *WITHOUT_INTERVAL]
        values[key] = {metric: one.results[metric] for metric in compared if metric in one.results}
        values[key]["cost.seconds"] = fair_seconds(one, finished)

    summaries = {
        arm: _summarize([values[arm, s] for s in given], [replicates[arm, s] for s in given], confidence, seed, (0, 1))
        for arm, given in seeds.items()
    }
    differences = {}
    for arm, other in combinations(seeds, 2):
        common = [s for s in seeds[arm] if s in seeds[other]]
        if common:
            found = _summarize(
                [_minus(values[arm, s], values[other, s]) for s in common],
                [_minus(replicates[arm, s], replicates[other, s]) for s in common],
                confidence,
                seed,
                (-1, 1),
            )
            differences[arm, other] = found
            differences[other, arm] = {metric: _mirrored(summary) for metric, summary in found.items()}
    return Comparison(
        arms=tuple(seeds),
        baseline=baseline or next(iter(seeds)),
        headline=finished[0].results["headline.score"],
        confidence=confidence,
        resamples=resamples,
        groups={role: len(set(members)) for role, members in groups.items()},
        images={role: len(members) for role, members in groups.items()},
        summaries=summaries,
        differences=differences,
        arm_settings=_arm_settings(finished, tuple(seeds)),
        finished=tuple(finished),
        unfinished=tuple(unfinished),
    )


def _summarize(
    values: Sequence[dict[str, float]],
    replicates: Sequence[dict[str, Tensor]],
    confidence: float,
    seed: int,
    ends: tuple[float, float],
) -> dict[str, Summary]:
    """The summary of every metric that all seeds have, from its value and its replicates [Q] at each seed.

    Metrics with replicates are shares. Their intervals are clipped to `ends`, as Student's t is not bounded.
    """
    found = {}
    for metric in [key for key in values[0] if all(key in given for given in values)]:
        value_K = torch.tensor([given[metric] for given in values], dtype=torch.float64)
        low = high = None
        if all(len(given.get(metric, ())) for given in replicates):
            replicate_KQ = torch.stack([given[metric] for given in replicates])
            t_Q = student_draws(len(replicate_KQ), replicate_KQ.shape[1], seed=seed)
            low, high = percentile_interval(over_seeds(replicate_KQ, value_K, t_Q).clamp(*ends), confidence)
        sd = float(value_K.std()) if len(value_K) > 1 else None
        found[metric] = Summary(float(value_K.mean()), sd, low, high, len(value_K))
    return found


def _mirrored(found: Summary) -> Summary:
    """The same difference with its sign reversed."""
    low, high = (None if bound is None else -bound for bound in (found.high, found.low))
    return replace(found, mean=-found.mean, low=low, high=high)


def _minus(first: dict, second: dict) -> dict:
    return {key: value - second[key] for key, value in first.items() if key in second}


def fair_seconds(one: Finished, finished: Iterable[Finished]) -> float:
    """Seconds of a trial including those of the class tokens it uses, if any, even if another trial learned them."""
    if not one.results.get("cost.images_generated") or one.settings.get("inversion.class_agnostic"):
        return one.results["cost.seconds"]
    beside = [other.results for other in finished if other.trial.seed == one.trial.seed]
    return seconds_with_tokens(one.results, beside)


def seconds_with_tokens(results: dict, beside: Iterable[dict]) -> float:
    """Seconds that a trial using class tokens would have taken without any in the cache.

    The first trial of a seed that needs tokens learns them; the others read them from the cache. If only the first were
    charged for them, one arm would look more expensive by an accident of order.

    Args:
        beside: the results of all finished trials of the same seed, including its own.
    """
    longest = max(other.get("seconds.stage.tokens", 0.0) for other in beside)
    return results["cost.seconds"] - results.get("seconds.stage.tokens", 0.0) + longest


def _check_comparable(finished: Sequence[Finished]) -> None:
    """Raise DataError unless there is one test set, one headline score, the same images per seed, the same weights per
    pipeline setting, and one config per arm (except for its section `run`)."""
    first = finished[0]
    for one in finished[1:]:
        mine, others = first.predictions, one.predictions
        same = (mine.paths, mine.groups, mine.classes) == (others.paths, others.groups, others.classes)
        if not (same and torch.equal(mine.roles_D, others.roles_D) and torch.equal(mine.labels_D, others.labels_D)):
            raise DataError(
                f"{one.trial.path} was judged on other test images, labels, groups or classes than {first.trial.path}: "
                "compare runs of one data set only"
            )
        if one.results.get("headline.score") != first.results.get("headline.score"):
            raise DataError(
                f"{one.trial.path} has the headline score {one.results.get('headline.score')}, {first.trial.path} has "
                f"{first.results.get('headline.score')}: evaluation.score must be one and fixed before the runs"
            )
    first_of_arm = {one.trial.arm: one for one in reversed(finished)}
    first_of_seed = {one.trial.seed: one for one in reversed(finished)}
    pipelines: dict[tuple, Finished] = {}  # pipeline settings -> the first trial that read a pipeline under them
    for one in finished:
        twin = first_of_seed[one.trial.seed]
        if one.results.get("sha256.data.root") != twin.results.get("sha256.data.root"):
            raise DataError(
                f"{one.trial.path} read other images than {twin.trial.path}, which has the same seed: "
                "arms must share their images; data.json of both says which"
            )
        if (digest := one.results.get(PIPELINE)) is not None:
            read = tuple(sorted((k, str(v)) for k, v in one.settings.items() if k.startswith("pipeline.")))
            other = pipelines.setdefault(read, one)
            if digest != other.results[PIPELINE]:
                raise DataError(
                    f"{one.trial.path} and {other.trial.path} read pipeline.path {one.settings['pipeline.path']!r} with other "
                    "weights in it: move one of them away and run it again"
                )
        head = first_of_arm[one.trial.arm]
        for name in one.settings.keys() | head.settings.keys():
            if not name.startswith("run.") and one.settings.get(name) != head.settings.get(name):
                raise DataError(
                    f"arm {one.trial.arm}: {name} is {head.settings.get(name)!r} at seed {head.trial.seed} and "
                    f"{one.settings.get(name)!r} at seed {one.trial.seed}; seeds of an arm must share a config"
                )


def _arm_settings(finished: Sequence[Finished], arms: Sequence[str]) -> dict[str, dict[str, object]]:
    """Each arm's values of the settings that are not the same in all arms."""
    settings = {one.trial.arm: one.settings for one in finished}
    names = list(dict.fromkeys(name for arm in arms for name in settings[arm] if not name.startswith("run.")))
    differing = [name for name in names if any(settings[arm].get(name) != settings[arms[0]].get(name) for arm in arms)]
    return {arm: {name: settings[arm].get(name) for name in differing} for arm in arms}


def _sorted_rows(predictions: Predictions) -> Predictions:
    """The same predictions with rows sorted by role and path, whatever the order in which the run read its images."""
    order = sorted(
        range(len(predictions.paths)), key=lambda row: (int(predictions.roles_D[row]), predictions.paths[row])
    )
    return replace(
        predictions,
        paths=tuple(predictions.paths[row] for row in order),
        groups=tuple(predictions.groups[row] for row in order),
        roles_D=predictions.roles_D[order],
        labels_D=predictions.labels_D[order],
        logits_DC=predictions.logits_DC[order],
        knn_D=predictions.knn_D[order],
        scores={name: values_D[order] for name, values_D in predictions.scores.items()},
    )


def _groups(predictions: Predictions) -> dict[str, list[str]]:
    """role -> the group of each of its test images, for the roles that occur."""
    found = {role: [predictions.groups[row] for row in predictions.rows(role).tolist()] for role in ROLES}
    return {role: members for role, members in found.items() if members}


def _flat(tree: dict) -> dict[str, object]:
    return {f"{section}.{key}": value for section, content in tree.items() for key, value in content.items()}
