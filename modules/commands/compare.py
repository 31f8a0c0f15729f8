"""`trainer.py compare CONFIG --arms A,B --seeds 0,1,2`: runs every arm at every seed, then compares them.

A trial is one unmodified `run` command in its own process, so any scheduler can run the grid: `--print-trials` prints
the commands, a batch system runs them in any place and order, and `compare` called again finds the finished trials,
runs the others, and compares. Trials need no coordination: run directories follow from arm and seed and are locked
while in use, and tokens are cached under a hash of what they were made from.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modules.commands.arms import CLASSIC, DEFAULT_ARMS, GENERATING
from modules.commands.flags import FLAGS, number, split_flags, words
from modules.commands.trials import CRASHED, Planned, is_setting, plan, refuse_other_settings, run_trials
from modules.console import Console
from modules.errors import ConfigError, UserError

DEFAULT_SEEDS = ("0", "1", "2")
BASELINE = "supcon"
EXAMPLES = {  # for flags that take a value
    "arms": "--arms=supcon,positives",
    "seeds": "--seeds=0,1,2",
    "baseline": "--baseline=supcon",
    "long-steps": "--long-steps=900",
}
RENDERED = (
    "parts64 is rendered, not photographed: figures on it say how arms compare, not how well parts are told apart."
)


class TrialsFailed(UserError):
    """Some trials did not finish; `code` is the worst of their exit codes: CRASHED (a bug), else the highest."""

    def __init__(self, message: str, codes: list[int]):
        super().__init__(message)
        self.code = max(codes, key=lambda code: (code == CRASHED, code))


@dataclass(frozen=True)
class Asked:
    """The parsed command line."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    long_steps: int
    print_trials: bool
    overrides: list[str]


def command(
    path: str, arguments: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> None:
    """Start or resume every trial, one after another, and compare the finished ones; or print their commands.

    Raises:
        ConfigError: an unknown arm or flag, contradicting settings of an arm, trials already run under other settings.
        TrialsFailed: some trials did not finish; the comparison of the finished ones was written first.
    """
    asked = parse(arguments)
    trials = plan(path, asked.arms, asked.seeds, asked.overrides, asked.long_steps)
    if not trials[0].config.evaluation.test:
        raise ConfigError(
            "evaluation.test is false, but a comparison is of test images; set it to true, or choose settings with "
            "`python -m benchmarks.sweep`"
        )
    if asked.print_trials:
        for trial in trials:
            console.line(shlex.join(trial.command))
        return
    refuse_other_settings(trials)
    folder = trials[0].path.parent
    failures = run_trials(trials, folder / "logs", console)
    compare_finished(trials, asked, folder, console)
    if failures:
        named = "; ".join(f"{name} (exit code {code}: {reason})" for name, (code, reason) in failures.items())
        raise TrialsFailed(
            f"{len(failures)} of {len(trials)} trials did not finish: {named}. The comparison holds the others; the same "
            "command starts or resumes these alone",
            [code for code, _ in failures.values()],
        )


def parse(arguments: list[str]) -> Asked:
    """Parse the flags and settings after CONFIG.

    Raises:
        ConfigError: an unknown flag, an invalid seed, an arm or seed named twice, a baseline that is not among the
            arms, or run.seed, which the comparison sets itself.
    """
    flags, overrides = split_flags(arguments, FLAGS["compare"])
    for name, example in EXAMPLES.items():
        if name in flags and not words(flags[name]):
            raise ConfigError(f"command line: --{name} names nothing; write {example}, without spaces")
    arms = _once("arms", words(flags.get("arms", "")) or list(DEFAULT_ARMS))
    seeds = _once("seeds", words(flags.get("seeds", "")) or list(DEFAULT_SEEDS))
    if bad := [seed for seed in seeds if not re.fullmatch("0|[1-9][0-9]*", seed)]:
        raise ConfigError(f"command line: --seeds holds {bad[0]!r}; write whole numbers >= 0, by comma: --seeds 0,1,2")
    baseline = flags.get("baseline", "")
    if baseline and baseline not in arms:
        raise ConfigError(f"command line: --baseline is {baseline!r}, which is not among the arms {', '.join(arms)}")
    if any(is_setting(override, "run.seed") for override in overrides):
        raise ConfigError("command line: run.seed is given, but the seeds of a comparison are those of --seeds")
    long_steps = number(flags, "long-steps", 0, low=0)
    return Asked(arms, tuple(map(int, seeds)), baseline, long_steps, "print-trials" in flags, overrides)


def compare_finished(trials: list[Planned], asked: Asked, folder: Path, console: Console) -> None:
    """Write and print the comparison of the finished trials among `trials`; warn instead if none is finished."""
    from modules.evaluation.compare import Trial, compare, find_trials, read_trials
    from modules.evaluation.compare_page import write_comparison
    from modules.evaluation.compare_text import as_text

    finished, unfinished = read_trials([Trial(trial.arm, trial.seed, trial.path) for trial in trials])
    if not finished:
        console.warn("no trial is finished: there is nothing to compare yet")
        return
    present = {one.trial.arm for one in finished}
    baseline = asked.baseline or (BASELINE if BASELINE in present else "")
    if baseline and baseline not in present:
        console.warn(f"the baseline {baseline} has no finished trial yet: differences are left to the next call")
        baseline = ""
    evaluation = trials[0].config.evaluation
    comparison = compare(
        finished,
        unfinished,
        arms=asked.arms,
        baseline=baseline,
        resamples=evaluation.bootstrap,
        confidence=evaluation.confidence,
    )
    notes = (RENDERED,) if "parts64" in trials[0].config.data.root else ()
    paths = write_comparison(folder, comparison, title=folder.name, notes=notes)
    console.line("\n" + as_text(comparison))
    left_out = {trial.path for trial in find_trials(folder)} - {trial.path for trial in trials}
    hints = equal_time_steps([(one.trial.arm, one.trial.seed, one.results) for one in finished])
    for line in (
        *notes,
        *(f"{arm}_long --long-steps {steps} would take the wall time of {other}" for arm, other, steps in hints),
        *([f"not asked for, so left out: {', '.join(sorted(path.name for path in left_out))}"] if left_out else []),
        "written: " + ", ".join(map(str, paths)),
    ):
        console.line(line)


def equal_time_steps(finished: list[tuple[str, int, dict]]) -> list[tuple[str, str, int]]:
    """(classic arm, arm with generated rows, optimizer steps at which the former takes as many seconds as the latter).

    steps x (T_generating - T_classic + C_classic) / C_classic, with T the seconds of a run and C those of its training
    stage, both means over the seeds of `finished` (arm, seed, results). The first trial of a seed learns the class
    tokens and the others read them from the cache; here every trial that uses them is charged for learning them. The
    arm with generated rows is `positives_ood` if finished, else the last one.
    """
    from modules.evaluation.compare import seconds_with_tokens

    generating = [arm for arm, _, _ in finished if arm in GENERATING]
    if not generating:
        return []
    other = "positives_ood" if "positives_ood" in generating else generating[-1]
    beside = {seed: [results for _, other_seed, results in finished if other_seed == seed] for _, seed, _ in finished}
    whole = [seconds_with_tokens(results, beside[seed]) for arm, seed, results in finished if arm == other]
    rows = []
    for arm in dict.fromkeys(arm for arm, _, _ in finished if arm in CLASSIC):
        mine = [results for name, _, results in finished if name == arm]
        training = sum(results["seconds.stage.contrastive"] for results in mine) / len(mine)
        spare = sum(whole) / len(whole) - sum(results["cost.seconds"] for results in mine) / len(mine)
        if spare > 0:
            rows.append((arm, other, round(mine[0]["learning.steps"] * (1 + spare / training))))
    return rows


def _once(flag: str, values: list[str]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ConfigError(f"command line: --{flag} is {','.join(values)}; name each once")
    return tuple(values)
