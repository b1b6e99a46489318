"""Ctrl-C and SIGTERM while a study trains: the first stops at a safe moment, the second at once."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM ended, as shells give it."""


class StudyTerminated(SystemExit):
    """SIGTERM, taken at a safe moment; ends the process with status 143 unless it is caught."""


class StopRequest:
    """Whether a signal asked to stop.

    Args:
      where: what becomes of what is finished, the end of a message.

    Attributes:
      requested: the signal, or None.
    """

    def __init__(self, where: str) -> None:
        self.requested: signal.Signals | None = None
        self._where = where

    def check(self) -> None:
        """Raises if a signal asked to stop; called at moments when that loses nothing.

        Raises:
          KeyboardInterrupt: after SIGINT.
          StudyTerminated: after SIGTERM.
        """
        if self.requested == signal.SIGINT:
            # No class of our own: Python ends with the status of Ctrl-C for this very class alone.
            raise KeyboardInterrupt(f"Interrupted. {self._where}")
        if self.requested == signal.SIGTERM:
            _tell(f"Terminated. {self._where}")
            raise StudyTerminated(TERMINATED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested is None:
            self.requested = signal.Signals(number)
            _tell(f"{self.requested.name}: stops at the next safe moment. Again to stop at once.")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise StudyTerminated(TERMINATED)


def _tell(message: str) -> None:
    # A handler may interrupt a write to the same stream, which refuses then; and a terminal that
    # was hung up takes nothing.
    with suppress(RuntimeError, ValueError, OSError):
        print(message, file=sys.stderr)


@contextmanager
def stop_requests(where: str) -> Iterator[StopRequest]:
    """Takes SIGINT and SIGTERM over while a study trains.

    Signals reach Python in the main thread only; in another one, or where somebody else has a
    handler of his own for a signal, that signal is left to him.

    Args:
      where: what becomes of what is finished, the end of a message.

    Yields:
      What to ask at safe moments.

    Raises:
      KeyboardInterrupt: at the end, after a SIGINT that nobody has asked about.
      StudyTerminated: likewise after a SIGTERM.
    """
    request = StopRequest(where)
    ours: dict[signal.Signals, Any] = {}
    usual: dict[signal.Signals, Callable[..., Any] | int] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    if threading.current_thread() is threading.main_thread():
        for number, handler in usual.items():
            if signal.getsignal(number) == handler:
                ours[number] = signal.signal(number, request._handle)
    try:
        yield request
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    request.check()


# Threads that nobody waits for, and what ended the work that they were part of.
_left_behind: list[tuple[threading.Thread, BaseException]] = []


def leave_behind(threads: Sequence[threading.Thread], error: BaseException) -> None:
    """Lets the interpreter end though threads are inside of what nothing can interrupt.

    At its end, before JAX takes apart what such a thread is using, the process is ended with the
    status of the error if one is still at work.

    Args:
      threads: daemon threads.
      error: what is being raised, such as `KeyboardInterrupt`.
    """
    if not _left_behind:
        atexit.register(_end_process)
    _left_behind.extend((thread, error) for thread in threads)


def _end_process() -> None:
    errors = [error for thread, error in _left_behind if thread.is_alive()]
    if not errors:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError, ValueError, OSError, AttributeError):
            stream.flush()
    code = getattr(errors[-1], "code", None)
    if isinstance(code, int):
        os._exit(code)
    # As Python itself ends after Ctrl-C: the parent sees which signal it was.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    os._exit(128 + signal.SIGINT)
