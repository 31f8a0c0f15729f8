"""Signals that stop a process, obeyed between steps: SIGTERM, a lost terminal, Ctrl-C.

A batch system that wants its machine back sends SIGTERM and waits a little before it kills. In the middle of a step the
state is neither that before it nor that after it, and a checkpoint of it would go on differently from a run that never
stopped. So a step runs inside `whole()`, at whose end the signal is raised; everywhere else it is raised at once. Ctrl-C
is raised at once as KeyboardInterrupt, but within a step it waits for its end as SIGTERM does; a second one does not wait.

Raised at once it may land anywhere, also inside a library that turns every exception into one of its own (an import on
demand does): `behind` finds it again.
"""

import signal
from contextlib import contextmanager

from modules.errors import Terminated


class Termination:
    """What is known of such signals in this process."""

    def __init__(self):
        self._asked = 0  # number of the signal that came first
        self._whole = False

    def listen(self) -> None:
        """Turn the signals into `Terminated` from here on; those that the caller had ignored (nohup) stay ignored."""
        self._asked, self._whole = 0, False
        signal.signal(signal.SIGTERM, self._arrive)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._arrive)

    @contextmanager
    def whole(self):
        """What runs inside is brought to its end; then a signal that came meanwhile is raised.

        Raises:
            Terminated: a signal came inside.
        """
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        if self._asked:
            raise self._terminated()

    def obey(self) -> None:
        """Raise Terminated if a signal came while listening: for whoever goes on after an exception of a library."""
        if self._asked and signal.getsignal(signal.SIGTERM) == self._arrive:
            raise self._terminated()

    def _arrive(self, signum, frame) -> None:
        if signum == signal.SIGINT and (self._asked or not self._whole):
            raise KeyboardInterrupt
        if self._asked:  # it is being obeyed: a second one must not cut the checkpoint short
            return
        self._asked = signum
        if not self._whole:
            raise self._terminated()

    def _terminated(self) -> Terminated:
        return Terminated("stopped; start the same command again to go on from what is kept", self._asked)


def behind(error: BaseException) -> Terminated | None:
    """The signal that an exception was made from (`raise ... from`), however often it was wrapped; None: another cause.

    What fails while a signal is being obeyed, such as the last checkpoint, is no such wrapping and keeps its own name.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Terminated):
        cause = cause.__cause__
    return cause


termination = Termination()
