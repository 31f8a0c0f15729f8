"""Plans the trials of a comparison, checks that they may start, and runs them one after another.

A trial is one unmodified `run` command in its own process, in a directory that follows from arm and seed. A trial that
another process is running (a scheduler's job, a second `compare`, or one that outlived a killed `compare`) is not
started a second time: the others are run first, then it is waited for.
"""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.commands.arms import arm_settings
from modules.config import Config
from modules.console import Console
from modules.errors import ConfigError, StorageError, Terminated
from modules.records import read_record
from modules.settings import as_yaml, load_config

TRAINER = Path(__file__).resolve().parents[2] / "trainer.py"
CRASHED = 1  # exit code of a traceback
KILLED = 128 + signal.SIGKILL
IN_USE = StorageError.code  # exit code of a trial whose directory is locked, but also of other storage errors


@dataclass(frozen=True)
class Planned:
    """One arm at one seed: its settings, its run directory and the command that runs it."""

    arm: str
    seed: int
    config: Config
    path: Path
    command: list[str]

    @property
    def name(self) -> str:
        return f"{self.arm}-s{self.seed}"


def plan(
    path: str, arms: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], long_steps: int = 0
) -> list[Planned]:
    """All trials, with all arms of a seed before the next seed; the settings of each are checked before any is started.

    Args:
        overrides: "section.key=value" for every trial; an arm's own settings come after them and take precedence.
        long_steps: optimizer steps of the `_long` arms.

    Raises:
        ConfigError: as `arm_settings`, or the settings of an arm contradict those of the config.
    """
    base, _ = load_config(path, overrides)
    shared = [override for override in overrides if not is_setting(override, "run.name")]
    trials = []
    for seed in seeds:
        for arm in arms:
            settings = {"run.name": f"{base.run.name}/{arm}-s{seed}", "run.seed": seed}
            settings |= arm_settings(arm, base, long_steps)
            own = shared + [f"{name}={as_yaml(value)}" for name, value in settings.items()]
            try:
                config, _ = load_config(path, own)
            except ConfigError as error:
                raise ConfigError(f"arm {arm}: {error}") from error
            trainer = TRAINER.name if Path.cwd() == TRAINER.parent else str(TRAINER)
            words = [sys.executable, trainer, "run", str(path), *own]
            trials.append(Planned(arm, seed, config, Path(config.run.dir) / config.run.name, words))
    return trials


def refuse_other_settings(trials: list[Planned]) -> None:
    """Look at every run directory before anything is started or written.

    Raises:
        ConfigError: one holds a run of other settings.
        DataError: as `changed_settings`.
        StorageError: one may not be read, as another user's.
    """
    from modules.workdir import changed_settings

    others = {}
    for trial in trials:
        try:
            holder(trial)
            if changed := changed_settings(trial.path, trial.config):
                others[trial.path] = changed
        except OSError as error:
            raise StorageError(
                f"{trial.path}: cannot be read ({error.strerror}); nothing was started. Give yourself the right to, or set "
                "run.name or run.dir to begin another comparison"
            ) from error
    if others:
        path, changed = next(iter(others.items()))
        more = f", and so do {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{path}: holds a trial of other settings ({'; '.join(changed)}){more}; nothing was started. Set run.name to "
            "begin another comparison, or restore the settings to go on with this one"
        )


def run_trials(trials: list[Planned], logs: Path, console: Console) -> dict[str, tuple[int, str]]:
    """Run every trial to its end, one after another; returns {name: (exit code, last line)} of those that failed.

    Raises:
        Terminated, KeyboardInterrupt: after the current trial has checkpointed.
        StorageError: the logs cannot be written.
    """
    from modules.meter import Meter

    meter, failures, finished = Meter(), {}, 0
    with console.stage("trials") as progress:
        busy = []
        for trial in trials:
            progress(finished, len(trials), trial.name)
            if owner := holder(trial):
                console.line(f"{trial.name:<24} in use by process {owner}: the others first")
                busy.append(trial)
            else:
                finished += _finish(trial, logs / f"{trial.name}.log", meter, failures, console)
        for trial in busy:
            progress(finished, len(trials), f"waiting for {trial.name}")
            wait_for(trial)
            finished += _finish(trial, logs / f"{trial.name}.log", meter, failures, console)
        progress(len(trials), len(trials), f"{finished} finished")
    return failures


def _finish(trial: Planned, log: Path, meter, failures: dict[str, tuple[int, str]], console: Console) -> bool:
    """Run one trial to its end; returns whether it finished, else adds it to `failures`."""
    if results := _results(trial):
        console.line(f"{trial.name:<24} finished before  {headline(results)}")
        return True
    with meter.stage(trial.name):
        begin, code = _size(log), run_trial(trial, log)
        while code == IN_USE and not _results(trial) and (owner := holder(trial)):  # another process was faster
            console.line(f"{trial.name:<24} in use by process {owner}: waiting for it")
            wait_for(trial)
            if not _results(trial):
                begin, code = _size(log), run_trial(trial, log)
    seconds = f"{meter.seconds[f'stage.{trial.name}']:>7.0f} s"
    results = _results(trial)
    if code in (0, IN_USE) and results:
        console.line(f"{trial.name:<24} {seconds}  {headline(results)}")
        return True
    last = _last_line(log, begin)
    if code == KILLED:
        last = f"killed, as by a system that is short of memory; its last line was: {last}"
    failures[trial.name] = (code or CRASHED, last)
    console.warn(f"{trial.name:<15} {seconds}  exit code {code}: {last} ({log})")
    return False


def holder(trial: Planned) -> str:
    """The id of the process that is running a trial now; "" if there is none.

    The lock is tried only if a process has written its id to it; otherwise a run just starting could find it taken.
    """
    path = trial.path / ".lock"
    owner = path.read_text().strip() if path.exists() else ""
    if not owner:
        return ""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner
    return ""  # the process was killed before it could remove its id


def wait_for(trial: Planned) -> None:
    """Wait until no process holds the lock of the trial's directory; a signal ends the wait."""
    with open(trial.path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def run_trial(trial: Planned, log: Path) -> int:
    """Run a trial's command with its output appended to `log`; returns its exit code, 128 + number for a signal.

    The command runs detached from the terminal, so that Ctrl-C reaches it only through this function, as a SIGTERM,
    which it answers with a checkpoint.

    Raises:
        StorageError: the log cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = open(log, "ab")  # noqa: SIM115 - closed below; its failure must not be confused with the command's
    except OSError as error:
        raise StorageError(f"{log}: cannot be written ({error.strerror}); set run.dir to a place that can") from error
    with output:
        process = subprocess.Popen(trial.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except (Terminated, KeyboardInterrupt):
            process.terminate()
            process.wait()
            raise
    return code if code >= 0 else 128 - code


def is_setting(override: str, name: str) -> bool:
    """Whether the command-line override "section.key=value" sets `name`."""
    return override.partition("=")[0].strip() == name


def headline(results: dict) -> str:
    """Accuracy and near-OOD AUROC of a run as short text."""
    split = "test" if "test.accuracy" in results else "val"
    text = f"{split} accuracy {100 * results[f'{split}.accuracy']:5.1f} %"
    score = results["headline.score"]
    if (key := f"{split}.near_ood.{score}.auroc") in results:
        text += f"  near-OOD AUROC {100 * results[key]:5.1f} % ({score})"
    return text


def _results(trial: Planned) -> dict | None:
    path = trial.path / "results.json"
    return read_record(path) if path.exists() else None


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _last_line(log: Path, begin: int) -> str:
    """The last non-empty line after byte `begin`: the message of a UserError, or the last line of a traceback."""
    with open(log, "rb") as file:
        file.seek(max(begin, os.path.getsize(log) - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip().removeprefix("error: ") for line in reversed(lines) if line.strip()), "no output")
