"""Flags of a verb: the words beginning with "--" among its arguments, apart from section.key=value settings."""

import difflib

from modules.errors import ConfigError

SWITCH = ""  # the value of a flag that stands alone


def split_flags(arguments: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """({flag: its value, "" where it stands alone}, the other arguments).

    A value follows after "=" or as the next word, if that is neither a flag nor a setting: `--classes=a,b` or
    `--classes a,b`.

    Args:
        known: flags of this verb without dashes -> what they do, for the message.

    Raises:
        ConfigError: an unknown flag, or one given twice.
    """
    flags: dict[str, str] = {}
    rest: list[str] = []
    waiting = ""  # the flag whose value may come next
    for word in arguments:
        if not word.startswith("--"):
            if waiting and "=" not in word:
                flags[waiting] = word
            else:
                rest.append(word)
            waiting = ""
            continue
        name, equals, value = word[2:].partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else _list(known)
            raise ConfigError(f"command line: unknown flag --{name}; {hint}")
        if name in flags:
            raise ConfigError(f"command line: --{name} is given twice; give it once, several values with commas")
        flags[name] = value if equals else SWITCH
        waiting = "" if equals else name
    return flags, rest


def words(value: str) -> list[str]:
    """The parts of a list with commas, without empty ones."""
    return [part.strip() for part in value.split(",") if part.strip()]


def number(flags: dict[str, str], name: str, default: int, low: int = 1) -> int:
    """The whole number of a flag; `default` where it is absent or stands alone.

    Raises:
        ConfigError: it is no whole number, or below `low`.
    """
    text = flags.get(name, SWITCH) or str(default)
    if not text.isdecimal() or int(text) < low:
        raise ConfigError(f"command line: --{name} is {text!r}; it must be a whole number of at least {low}")
    return int(text)


def _list(known: dict[str, str]) -> str:
    if not known:
        return "this verb takes no flags"
    return "this verb takes " + ", ".join(f"--{name} ({what})" for name, what in known.items())
