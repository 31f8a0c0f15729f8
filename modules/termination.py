"""Handles the signals that stop a process, deferring them to the end of a step: SIGTERM, a lost terminal, Ctrl-C.

A batch system that wants its machine back sends SIGTERM and waits a little before it kills the process. In the middle
of a step the state is inconsistent, and a run resumed from it would differ from one that was never stopped. So a step
runs inside `whole()`, at the end of which a pending signal is raised as an exception; elsewhere it is raised at once.
Ctrl-C raises KeyboardInterrupt at once, but in a step it waits for its end like SIGTERM; a second one does not wait.

An exception raised at once may land anywhere, even inside a library that converts every exception into one of its own
(as lazy imports do): `behind` recovers it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from modules.errors import Terminated


class Termination:
    """The state of stop signals in this process, and their handler."""

    def __init__(self):
        self._asked = 0  # number of the first signal received; 0: none
        self._whole = False

    def listen(self) -> None:
        """Install the handlers; SIGHUP and SIGINT stay ignored if they already were (nohup)."""
        self._asked, self._whole = 0, False
        signal.signal(signal.SIGTERM, self._arrive)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._arrive)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Context whose body is not interrupted; a signal received meanwhile is raised when it ends.

        Raises:
            Terminated: a signal was received inside.
        """
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        if self._asked:
            raise self._terminated()

    def obey(self) -> None:
        """Raise Terminated if a signal was received while listening, in case a library has swallowed the exception."""
        if self._asked and signal.getsignal(signal.SIGTERM) == self._arrive:
            raise self._terminated()

    def _arrive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and (self._asked or not self._whole):
            raise KeyboardInterrupt
        if self._asked:  # already stopping: a second signal must not cut the checkpoint short
            return
        self._asked = signum
        if not self._whole:
            raise self._terminated()

    def _terminated(self) -> Terminated:
        return Terminated("stopped; start the same command again to go on from what is kept", self._asked)


def behind(error: BaseException) -> Terminated | None:
    """The `Terminated` in an exception's chain of causes (`raise ... from`), itself included; None if there is none.

    An error while handling a signal, such as a failed last checkpoint, has no such cause and is reported as itself.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Terminated):
        cause = cause.__cause__
    return cause


termination = Termination()
