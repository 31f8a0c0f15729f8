"""Errors that a user can fix: one exception per exit code, each carrying one clear message.

The message says what is wrong, where (setting or file), what the value was, and what would work. `trainer.main` prints
it and exits with `code`; any other exception is a bug and shows its traceback.
"""

import signal
from collections.abc import Sequence

NAMED = 10  # most files, folders or classes that a message lists


class UserError(Exception):
    """Base class of errors that a user can fix; `code` is the exit code of the process."""

    code = 2


class ConfigError(UserError):
    """A setting is unknown, mistyped, out of range, or contradicts another one (exit code 2)."""

    code = 2


class DataError(UserError):
    """A file of the image set, pipeline or token cache is missing, broken or inconsistent (exit code 3)."""

    code = 3


class OutOfMemory(UserError):
    """Some part does not fit into memory; the message names it and the settings to change (exit code 4)."""

    code = 4


class NonFinite(UserError):
    """Loss, gradient or pixels are not finite; a capture for replay was written (exit code 5)."""

    code = 5


class StorageError(UserError):
    """The run directory cannot be written, is locked, or the last checkpoint could not be saved (exit code 6)."""

    code = 6


class Terminated(UserError):
    """A signal arrived; state that can be checkpointed was saved first (exit code 128 + its number)."""

    def __init__(self, text: str, signum: int = signal.SIGTERM):
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(f"{name}: {text}")
        self.signum, self.code = signum, 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and how many more there are: "a, b", or "a, ..., j and 3 more"."""
    beyond = len(names) - NAMED
    return separator.join(names[:NAMED]) + (f" and {beyond} more" if beyond > 0 else "")
