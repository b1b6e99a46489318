"""What a person sees while a study runs; silent unless standard error is a terminal."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from typing import Any

from playbook_optax import _checks
from playbook_optax._text import printable

# Whose programs are being made, where a person wants to know.
_told_of: contextvars.ContextVar[str | None] = contextvars.ContextVar("_told_of", default=None)


@contextlib.contextmanager
def telling(show: bool, name: str) -> Iterator[None]:
    """Inside it `stage` tells a terminal what is going on.

    Args:
      show: whether to, given a terminal.
      name: what is being run.
    """
    token = _told_of.set(name if show and sys.stderr.isatty() else None)
    try:
        yield
    finally:
        _told_of.reset(token)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Names what goes on before anything trains, as it begins, and then how long it took.

    Args:
      what: such as ``"compiling"``.
    """
    name = _told_of.get()
    if name is None:
        yield
        return
    sys.stderr.write(f"{printable(name)}: {what} … ")
    sys.stderr.flush()
    began = time.monotonic()
    try:
        yield
    finally:
        sys.stderr.write(f"{time.monotonic() - began:.1f} s\n")


class Progress:
    """Blocks, steps per second, time left and infeasible trials so far.

    Args:
      show: whether to show anything, given a terminal and `rich`.
      name: what is being run.
      num_blocks: blocks to train.
      steps_per_block: trial-steps in a block.
    """

    def __init__(self, show: bool, name: str, num_blocks: int, steps_per_block: int) -> None:
        self._bar: Any = None
        self._steps = steps_per_block
        self._infeasible = 0
        self._trials = 0
        if not show or not sys.stderr.isatty():
            return
        try:
            console = _checks.require("rich.console", "cli", "The progress display")
            bars = _checks.require("rich.progress", "cli", "The progress display")
        except ImportError:
            return  # A study must not depend on its display.
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.TextColumn("{task.completed:.0f}/{task.total:.0f} blocks"),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[infeasible]}"),
            console=console.Console(stderr=True),
        )
        self._task = self._bar.add_task(printable(name), total=num_blocks, rate="", infeasible="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, num_blocks: int, num_trials: int, num_infeasible: int) -> None:
        """Reports finished blocks.

        Args:
          num_blocks: how many finished now.
          num_trials: trials in them that belong to the study.
          num_infeasible: those that are infeasible.
        """
        self._trials += num_trials
        self._infeasible += num_infeasible
        if self._bar is None:
            return
        self._bar.advance(self._task, num_blocks)
        speed = self._bar.tasks[0].speed or 0.0
        self._bar.update(
            self._task,
            rate=f"{speed * self._steps:,.0f} steps/s",
            infeasible=f"{self._infeasible} of {self._trials} infeasible",
        )
