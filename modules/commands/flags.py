"""The verbs' flags, that is, arguments beginning with "--", as distinct from section.key=value settings.

They are defined here and not with the verbs, so that a mistake in flags or settings is reported before importing torch.
"""

import difflib
from pathlib import Path

from modules.config import Config, PipelineConfig
from modules.errors import ConfigError, DataError
from modules.settings import load_config

FLAGS = {  # verb -> flag without dashes -> what it does
    "compare": {
        "arms": "words of modules/commands/arms.py, by comma",
        "seeds": "whole numbers, by comma",
        "baseline": "arm the others are set against; supcon where it is among them",
        "long-steps": "optimizer steps of the <arm>_long arms",
        "print-trials": "print the command of every trial, run nothing",
    },
    "tune": {
        "quality": "train this many steps per ratio (60) and judge them on val",
        "presets": "also measure these presets (all)",
    },
    "profile": {"steps": "steps to time (12)"},
    "preview": {
        "classes": "classes to show, or all",
        "strengths": "strengths of the positives",
        "recipes": "near-OOD recipes, or none",
        "images": "images a row",
        "again": "a JSON file of provenance",
    },
    "check": {"untimed": "skip the timed steps"},
    "doctor": {"device": "cpu or cuda"},
}
EXPORTED = ("export/encoder.safetensors", "export/ood.safetensors", "data.json")  # what `evaluate` reads of a run
SWITCH = ""  # the value of a flag given without one


def check_arguments(verb: str, path: str, arguments: list[str]) -> None:
    """Check the arguments after `verb` as far as possible without reading images or importing torch.

    Raises:
        ConfigError: an unknown flag or setting, or a value out of range.
        DataError: `evaluate` is not given a finished run.
    """
    if verb == "doctor":
        split_flags([path, *arguments], FLAGS[verb])
        return
    _, overrides = split_flags(arguments, FLAGS.get(verb, {}))
    if verb == "compare":
        return  # only its trials import torch, and a config may lack what an arm sets
    if verb == "evaluate":  # its CONFIG is a run directory, which holds the settings
        check_run(Path(path))
        load_config(Path(path) / "config.yaml", overrides)
        check_finished(Path(path))
        return
    load_config(path, overrides, schema=PipelineConfig if verb == "train-pipeline" else Config)


def check_run(folder: Path) -> None:
    """Raise DataError if `folder` is not the directory of a run; names the runs in it, if there are any."""
    if not (folder / "config.yaml").is_file():
        trials = sorted(found.parent.name for found in folder.glob("*/config.yaml"))
        hint = f"; it holds the runs {', '.join(trials)}: name one of them" if trials else "; name one, as runs/demo"
        raise DataError(f"{folder}: is no run directory, because it has no config.yaml{hint}")


def check_finished(folder: Path) -> None:
    """Raise DataError if the run in `folder` is not finished, or if an exported file is missing."""
    if not (folder / "results.json").is_file():
        raise DataError(
            f"{folder}: this run is not finished; start its `trainer.py run` command again to go on with it"
        )
    for name in EXPORTED:
        if not (folder / name).is_file():
            raise DataError(
                f"{folder}: has no {name}; only what `trainer.py run` wrote can be evaluated, and a run whose export was "
                "removed must be made again"
            )


def split_flags(arguments: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Split arguments into ({flag: its value, or "" without one}, the other arguments).

    The value follows "=" or is the next word, if that is neither a flag nor a setting: `--classes=a,b` or
    `--classes a,b`.

    Args:
        known: flag of this verb, without dashes -> its description, for the message.

    Raises:
        ConfigError: an unknown flag, one given twice, or a value that ends with a comma.
    """
    flags: dict[str, str] = {}
    rest: list[str] = []
    waiting = ""  # the flag whose value may come next
    for word in arguments:
        if not word.startswith("--"):
            if waiting and "=" not in word:
                flags[waiting] = word
                if word.endswith(","):
                    raise ConfigError(f"command line: --{waiting} ends with a comma; write its values without spaces")
            else:
                rest.append(word)
            waiting = ""
            continue
        name, equals, value = word[2:].partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else _list(known)
            hint = f"settings have no dashes: {word[2:]}" if "." in name else hint
            raise ConfigError(f"command line: unknown flag --{name}; {hint}")
        if name in flags:
            raise ConfigError(f"command line: --{name} is given twice; give it once, several values with commas")
        flags[name] = value if equals else SWITCH
        waiting = "" if equals else name
    return flags, rest


def words(value: str) -> list[str]:
    """The non-empty parts of a comma-separated list."""
    return [part.strip() for part in value.split(",") if part.strip()]


def number(flags: dict[str, str], name: str, default: int, low: int = 1) -> int:
    """The whole number given by a flag; `default` if the flag is absent or has no value.

    Raises:
        ConfigError: it is not a whole number, or is below `low`.
    """
    text = flags.get(name, SWITCH) or str(default)
    if not text.isdecimal() or int(text) < low:
        raise ConfigError(f"command line: --{name} is {text!r}; it must be a whole number of at least {low}")
    return int(text)


def _list(known: dict[str, str]) -> str:
    if not known:
        return "this verb takes no flags"
    return "this verb takes " + ", ".join(f"--{name} ({what})" for name, what in known.items())
