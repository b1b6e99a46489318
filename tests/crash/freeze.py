"""An executor one worker of which freezes inside a task; importable by spawned workers."""

import concurrent.futures
import os
import signal


def freeze_once(marker, function, *args):
    """Calls a function; the first process that finds the marker leaves its number and stops."""
    try:
        os.rename(marker, f"{marker}.taken")
    except FileNotFoundError:
        return function(*args)
    marker.with_suffix(".pid").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args)


class Freezing(concurrent.futures.Executor):
    """Sends tasks to another executor.

    Args:
      executor: with processes.
      marker: a path; while there is a file, the next task stops its worker and takes it away.
    """

    def __init__(self, executor, marker):
        self._executor, self._marker = executor, marker

    def submit(self, function, *args):
        return self._executor.submit(freeze_once, self._marker, function, *args)

    def thaw(self):
        """Lets the frozen worker go on."""
        os.kill(int(self._marker.with_suffix(".pid").read_text()), signal.SIGCONT)
