"""The directory of one run: its settings, environment, hashes of its input files, metrics, checkpoints and results.

Its path follows from the config (`run.dir`/`run.name`), and it is locked while in use. The same command can be started
again: an unfinished run resumes from its newest checkpoint, a finished one shows its result.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from modules import state
from modules.config import Config
from modules.errors import ConfigError, DataError, StorageError
from modules.records import read_record
from modules.settings import flatten, to_yaml

MAY_CHANGE = {  # settings that do not change results, or only by rounding (run.threads and run.kernels: with a warning)
    "run.dir",
    "run.name",
    "run.threads",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.cache_dir",
    "run.kernels",
    "evaluation.batch_size",
    "evaluation.tsne_points",
}
MAY_CHANGE_SECTIONS = ("tune.",)


class Workdir:
    """The directory of one run; holds its lock until closed.

    In a directory without work config.yaml is written at once, else together with the first file that this command
    writes: a command that is refused because of its input files leaves the config of the one before it.

    Raises:
        StorageError: not writable, or locked by another process.
        ConfigError: the directory holds a run of other settings.
        DataError: as `changed_settings`, or inputs.json is damaged.
    """

    def __init__(self, config: Config, origins: dict[str, str], *, replacing: bool = False):
        """replacing: discard a run of other settings found there instead of refusing, once the lock is held."""
        self.path = Path(config.run.dir) / config.run.name
        self._lock_file = None
        self._waiting: list[str] = []  # metric rows not yet written because the disk was full
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.path / ".lock", "ab+", buffering=0)  # noqa: SIM115 - held as long as the run
        except OSError as error:
            raise StorageError(
                f"{self.path}: the run directory cannot be written ({error.strerror}); set run.dir to a place that can"
            ) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.seek(0)
            owner = self._lock_file.read().decode().strip() or "unknown"
            self._lock_file.close()
            raise StorageError(
                f"{self.path}: in use by process {owner}; wait for it, or set run.name to start another run beside it"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without it, and a finished run can be shown
            self._lock_file.truncate(0)
            self._lock_file.write(str(os.getpid()).encode())
        if replacing and _holds_other(self.path, config):
            # half-learned tokens; config.yaml stays, so that what a kill leaves of them is still known as another's
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._refuse_other_settings(config)
        self._remove_leftovers()
        self.goes_on = _holds_work(self.path)  # whether this command continues earlier work
        self._begun = self._read_inputs() if self.goes_on else {}
        self._inputs = dict(self._begun)  # the content of inputs.json from here on
        self._config_yaml = to_yaml(config, origins)  # None once written
        if not self.goes_on:
            self._write_config()

    def close(self) -> None:
        """Release the lock."""
        if not self._lock_file.closed:
            self._lock_file.truncate(0)
            self._lock_file.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def results(self) -> dict | None:
        """The results of a finished run, or None."""
        path = self.path / "results.json"
        return read_record(path) if path.exists() else None

    def write_json(self, name: str, value: object) -> None:
        self._write_config()
        state.write_atomic(self.path / name, json.dumps(value, indent=1) + "\n")

    def hold_to(self, setting: str, value: str, digest: str, changes: Callable[[], str] | None = None) -> None:
        """Record in inputs.json the sha256 `digest` of the files that `setting` refers to.

        Args:
            changes: describes which files differ from those before, or returns "" if that is not known.

        Raises:
            DataError: the directory holds work that began with other files; nothing in it was changed.
        """
        if self._begun.get(setting, digest) != digest:
            which = f" ({told})" if changes is not None and (told := changes()) else ""
            raise DataError(
                f"{setting} {value}: these files are not those that this run began with{which}; restore them, or set "
                "run.name to begin another run"
            )
        self._inputs[setting] = digest
        self.write_json("inputs.json", self._inputs)

    def computes_with(self, runtime: dict[str, object]) -> dict[str, tuple]:
        """Record in inputs.json, under `runtime`, what this command computes with: one entry for each change.

        Returns:
            name -> (before, now) of what differs from the previous entry; None where an entry does not have it.
        """
        history = self._inputs.setdefault("runtime", [])
        last = history[-1] if history else runtime
        if history[-1:] != [runtime]:
            history.append(runtime)
            self.write_json("inputs.json", self._inputs)
        names = [*last, *(runtime.keys() - last.keys())]
        return {name: (last.get(name), runtime.get(name)) for name in names if last.get(name) != runtime.get(name)}

    def log(self, row: dict) -> None:
        """Append one metric row, preceded by any that could not be written before.

        Raises:
            StorageError: the file cannot be written, as on a full disk; it stays as it was, and the row is kept for the
                next call.
        """
        path = self.path / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        self._waiting.append(json.dumps(row) + "\n")
        try:
            with open(path, "a") as file:
                file.writelines(self._waiting)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); free some disk space: {len(self._waiting)} metric rows wait"
            ) from error
        self._waiting.clear()

    def rows(self) -> list[dict]:
        """All metric rows so far; an incomplete last line (power loss) is dropped.

        Raises:
            DataError: a line before it is damaged.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise ValueError("it has no step")
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is no metric row ({error}); delete that line, and the same command goes on: "
                    "only the learning curves lack what it held"
                ) from error
            rows.append(row)
        return rows

    def cut_rows(self, step: int) -> None:
        """Drop metric rows after `step`, because those steps will be taken again."""
        rows = [row for row in self.rows() if row["step"] <= step]
        state.write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _write_config(self) -> None:
        if self._config_yaml is not None:
            state.write_atomic(self.path / "config.yaml", self._config_yaml)
        self._config_yaml = None

    def _read_inputs(self) -> dict:
        path = self.path / "inputs.json"
        return read_record(path) if path.exists() else {}

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a killed process and, if the run is finished, its remaining checkpoints."""
        for folder in ("", "export", "tokens"):
            for path in (self.path / folder).glob(".*.[0-9]*"):
                with contextlib.suppress(OSError):
                    path.unlink()
        if (self.path / "results.json").exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _refuse_other_settings(self, config: Config) -> None:
        try:
            if changed := changed_settings(self.path, config):
                raise ConfigError(
                    f"{self.path}: holds a run of other settings ({'; '.join(changed)}); set run.name to start another "
                    "run, or restore the settings to go on with this one"
                )
        except (ConfigError, DataError):
            self.close()
            raise


def changed_settings(path: Path, config: Config) -> list[str]:
    """The settings that keep `config` from resuming the run in `path`, each as "<setting> was <old>, now <new>".

    Empty if there is no work to resume yet (so that a command which failed at a mistyped path can be corrected), or if
    only settings differ that do not change results.

    Raises:
        DataError: there is work, but config.yaml is missing or damaged.
    """
    if not _holds_work(path):
        return []
    old, changed = _read_settings(path / "config.yaml"), []
    for name, value in flatten(config).items():
        section, key = name.split(".")
        before = old.get(section, {}).get(key)
        value = list(value) if isinstance(value, tuple) else value
        if before != value and name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_SECTIONS):
            changed.append(f"{name} was {before!r}, now {value!r}")
    return changed


def _read_settings(path: Path) -> dict[str, dict]:
    """{section: {key: value}} of the config.yaml of a run.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
            raise ValueError("it holds no sections")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({' '.join(str(error).split())}), so the settings that this run began with are not "
            "known; restore it, or set run.name to begin another run"
        ) from error
    return found


def _holds_other(path: Path, config: Config) -> bool:
    """Whether `path` holds work of other settings, or of settings that are not known."""
    try:
        return bool(changed_settings(path, config))
    except DataError:
        return True


def _holds_work(path: Path) -> bool:
    return (path / "results.json").exists() or any((path / "checkpoints").rglob("manifest.json"))
