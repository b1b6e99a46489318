"""What a person is told while something trains, on standard error: lines everywhere, and a bar.

Each stage, study and decision is one line, in scripts and pipes too. Where somebody looks at a
terminal or a notebook and `rich` is there, a bar below the lines moves as training goes on.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import io
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from playbook_optax._text import PARAGRAPH, printable

# Without a bar: between two lines that say how far a study is, and when a stage counts as long.
LINE_SECONDS, LONG_STAGE_SECONDS = 20.0, 10.0
# Between two pictures of a bar, which cost some milliseconds each; in a notebook each is a message
# to the browser. Between two changes of what is drawn.
TERMINAL_SECONDS, NOTEBOOK_SECONDS, BAR_SECONDS = 0.25, 0.5, 0.1
_BAR_WIDTH, _BAR_NAME, _NOTEBOOK_WIDTH = 20, 30, 120
# Lines are text, whatever they look like.
_AS_IT_IS: dict[str, Any] = {
    "markup": False,
    "emoji": False,
    "highlight": False,
    "soft_wrap": True,
}


@dataclasses.dataclass
class Budget:
    """What a procedure may spend in all its studies together.

    Attributes:
      name: of the procedure.
      total: trial-steps.
      spent: trial-steps of the studies so far, those that were stored already included.
      trained: trial-steps of them that were trained in this call.
      seconds: how long that took, without tracing and compiling.
    """

    name: str
    total: float
    spent: float = 0.0
    trained: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class _Teller:
    """Who speaks inside `telling`.

    Attributes:
      name: what is being run.
      budget: of the procedure that runs it, if any.
      staged: seconds that tracing and compiling took so far.
      progress: of the study that is trained now, if any.
      bar: the bar that is shown now, if any.
    """

    name: str
    budget: Budget | None
    staged: float = 0.0
    progress: "Progress | None" = None
    bar: "_Bar | None" = None


_teller: contextvars.ContextVar[_Teller | None] = contextvars.ContextVar("_teller", default=None)


@contextlib.contextmanager
def telling(show: bool, name: str, budget: Budget | None = None) -> Iterator[None]:
    """Inside it `say`, `stage` and `Progress` speak, in the first process of a job alone.

    Args:
      show: whether to; if not, everything inside is silent.
      name: what is being run.
      budget: of all that is run inside; that of the `telling` outside of this one if None.
    """
    outer = _teller.get()
    if budget is None and outer is not None:
        budget = outer.budget
    if show and jax.distributed.is_initialized():
        show = jax.process_index() == 0
    token = _teller.set(_Teller(name, budget) if show else None)
    try:
        yield
    finally:
        _teller.reset(token)


def say(message: str) -> None:
    """Tells something that was decided, or that begins, in one line.

    Args:
      message: of any origin; silent outside of `telling`.
    """
    teller = _teller.get()
    if teller is not None:
        _print(teller, message)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Names what goes on before anything trains, and how long it took.

    On a terminal the line begins when the stage does; else it is written whole at its end, and
    another one first where the end is long in coming.

    Args:
      what: such as ``"compiling"``.
    """
    teller = _teller.get()
    if teller is None:
        yield
        return
    timer = None
    is_open = teller.bar is None and _is_terminal()
    if is_open:
        _write(f"{printable(teller.name)}: {what} … ")
    else:
        if teller.bar is not None:
            teller.bar.move(None, what)
        timer = threading.Timer(LONG_STAGE_SECONDS, _print, (teller, f"{what} goes on …"))
        timer.daemon = True
        timer.start()
    began, failed = time.monotonic(), True
    try:
        yield
        failed = False
    finally:
        seconds = time.monotonic() - began
        teller.staged += seconds
        if timer is not None:
            timer.cancel()
        if is_open:
            _write(f"{seconds:.1f} s\n")
        elif not failed:  # The error says what there is to say.
            _print(teller, f"{what} took {seconds:.1f} s")


class Progress:
    """How far a study is: a bar that moves within blocks, or a line now and then; a line at last.

    Silent outside of `telling`.

    Args:
      what: the study in words.
      num_blocks: its blocks.
      num_missing: those of them that are to be trained.
      steps_per_block: trial-steps in a block.
      cost: trial-steps of the study; less than those of its blocks where the last has room left.
    """

    def __init__(
        self, what: str, num_blocks: int, num_missing: int, steps_per_block: int, cost: int
    ) -> None:
        self._what, self._steps = what, steps_per_block
        self._num_missing = num_missing
        self._total = num_missing * steps_per_block
        self._unit = cost / max(num_blocks * steps_per_block, 1)
        self._stored = (num_blocks - num_missing) * steps_per_block
        self._finished = self._within = self._resumed = self._blocks = 0
        self._infeasible = self._trials = 0
        self._teller = _teller.get()
        self._budget = None if self._teller is None else self._teller.budget
        self._entry: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._began = self._staged = self._spoke = 0.0

    def __enter__(self) -> "Progress":
        teller = self._teller
        if teller is None:
            return self
        teller.progress = self
        if self._budget is not None:
            self._entry = (self._budget.spent, self._budget.trained, self._budget.seconds)
        self._began = self._spoke = time.monotonic()
        self._staged = teller.staged
        if self._num_missing:
            teller.bar = _bar(teller.name)
        self._count()
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        teller = self._teller
        if teller is None:
            return
        teller.progress = None
        if kind is None:
            self._finished, self._within = self._total, 0
        self._count()
        if teller.bar is not None:
            teller.bar.stop()
            teller.bar = None
        took, speed = f"{_duration(self._seconds)}", self._told_speed()
        if not self._num_missing:
            _print(teller, f"{self._what} are stored already")
        elif kind is None:
            told = [f"training {self._what} took {took}{speed}", self._told_trials()]
            _print(teller, "; ".join([*filter(None, told), *self._told_budget()]))
        elif self._done > self._resumed:
            _print(teller, f"training {self._what} stopped after {took}, {self._share:.0%} done")

    def moved(self, num_steps: int) -> None:
        """Reports trial-steps of blocks that are not finished.

        Args:
          num_steps: how many were trained now.
        """
        self._within += num_steps
        self._tell()

    def resumed(self, num_steps: int) -> None:
        """Reports trial-steps of blocks that are not finished, which a save holds.

        Args:
          num_steps: how many need no training.
        """
        self._within += num_steps
        self._resumed += num_steps

    def update(self, num_blocks: int, num_trials: int, num_infeasible: int) -> None:
        """Reports finished blocks.

        Args:
          num_blocks: how many finished now.
          num_trials: trials in them that belong to the study.
          num_infeasible: those that are infeasible.
        """
        steps = num_blocks * self._steps
        self._within -= min(self._within, steps)
        self._finished += steps
        self._blocks += num_blocks
        self._trials += num_trials
        self._infeasible += num_infeasible
        self._tell()

    # Numbers -----------------------------------------------------------------------------------

    @property
    def _done(self) -> int:
        return min(self._finished + self._within, self._total)

    @property
    def _share(self) -> float:
        return self._done / self._total if self._total else 1.0

    @property
    def _seconds(self) -> float:
        """How long it has trained, tracing and compiling left out."""
        assert self._teller is not None
        return time.monotonic() - self._began - (self._teller.staged - self._staged)

    def _count(self) -> None:
        """Carries this study over to the budget."""
        if self._budget is not None:
            spent, trained, seconds = self._entry
            self._budget.spent = spent + self._unit * (self._stored + self._done)
            self._budget.trained = trained + self._unit * max(self._done - self._resumed, 0)
            self._budget.seconds = seconds + self._seconds

    # Words -------------------------------------------------------------------------------------

    def _tell(self) -> None:
        teller = self._teller
        if teller is None:
            return
        self._count()
        now = time.monotonic()
        if teller.bar is not None:
            if now - self._spoke < BAR_SECONDS:
                return
            self._spoke = now
            blocks = f"{self._blocks}/{self._num_missing} blocks"
            told = [blocks + self._told_speed(), *self._told_left(), *self._told_budget()]
            teller.bar.move(self._share, ", ".join([*told, *filter(None, [self._told_trials()])]))
        elif now - self._spoke > LINE_SECONDS:
            self._spoke = now
            share = f"trained {self._share:.0%} of {self._what} in {_duration(self._seconds)}"
            told = [share + self._told_speed(), *self._told_left(), *self._told_budget()]
            _print(teller, "; ".join([*told, *filter(None, [self._told_trials()])]))

    def _told_speed(self) -> str:
        trained = self._unit * max(self._done - self._resumed, 0)
        return f" ({trained / max(self._seconds, 1e-3):,.0f} steps/s)" if trained else ""

    def _told_left(self) -> list[str]:
        trained = max(self._done - self._resumed, 0)
        if not trained:
            return []
        return [f"{_duration((self._total - self._done) / trained * self._seconds)} left"]

    def _told_budget(self) -> list[str]:
        budget = self._budget
        if budget is None or not budget.trained:
            return []
        left = max(budget.total - budget.spent, 0.0) / budget.trained * budget.seconds
        return [f"{budget.name}: at most about {_duration(left)} left"]

    def _told_trials(self) -> str:
        return f"{self._infeasible} of {self._trials} infeasible" if self._infeasible else ""


def moved(num_steps: int) -> None:
    """`Progress.moved` of the study that is trained now, if any.

    Args:
      num_steps: trial-steps that were trained now.
    """
    teller = _teller.get()
    if teller is not None and teller.progress is not None:
        teller.progress.moved(num_steps)


def resumed(num_steps: int) -> None:
    """`Progress.resumed` of the study that is trained now, if any.

    Args:
      num_steps: trial-steps that a save holds.
    """
    teller = _teller.get()
    if teller is not None and teller.progress is not None:
        teller.progress.resumed(num_steps)


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# Where it is told ------------------------------------------------------------------------------


def _print(teller: _Teller, message: str) -> None:
    line = f"{printable(teller.name)}: {printable(message, PARAGRAPH)}"
    if teller.bar is not None:
        teller.bar.print(line)
    elif _is_notebook() and _has_rich():
        _rich("console").Console(force_jupyter=True).print(line, **_AS_IT_IS)
    else:
        _write(f"{line}\n")


def _write(text: str) -> None:
    """Writes to standard error, if there is one: nothing depends on what is told."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _is_terminal() -> bool:
    with contextlib.suppress(ValueError):  # It was closed.
        return sys.stderr is not None and sys.stderr.isatty()
    return False


def _is_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose output is a page."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _rich(module: str) -> Any:
    return importlib.import_module(f"rich.{module}")


def _bar(name: str) -> "_Bar | None":
    """A bar, where there is a place for one and something that draws it."""
    if not _has_rich():
        return None
    if _is_notebook():
        return _NotebookBar(name)
    if not _is_terminal() or _rich("console").Console(stderr=True).is_dumb_terminal:
        return None
    return _TerminalBar(name)


class _Bar:
    """A bar of `rich`, with words beside it."""

    def __init__(self, name: str, console: Any, **options: Any) -> None:
        bars = _rich("progress")
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(_BAR_WIDTH),
            bars.TextColumn("{task.percentage:.0f}%", markup=False),
            bars.TextColumn("{task.fields[told]}", markup=False),
            console=console,
            **options,
        )
        self._task = self._bars.add_task(printable(name, _BAR_NAME), total=1.0, told="")

    def move(self, share: float | None, told: str) -> None:
        """Moves the bar to a share of the whole, unless that is None, and changes its words."""
        self._bars.update(self._task, completed=share, told=printable(told, PARAGRAPH))

    def print(self, line: str) -> None:
        """Writes a line above the bar."""
        self._bars.console.print(line, **_AS_IT_IS)

    def stop(self) -> None:
        """Takes the bar away."""
        self._bars.stop()


class _TerminalBar(_Bar):
    """A bar in the last line of a terminal."""

    def __init__(self, name: str) -> None:
        console = _rich("console").Console(stderr=True)
        super().__init__(name, console, transient=True, refresh_per_second=1 / TERMINAL_SECONDS)
        self._bars.start()


class _NotebookBar(_Bar):
    """A bar in the output of a cell, drawn anew as it moves, without widgets."""

    def __init__(self, name: str) -> None:
        self._page = _rich("console").Console(
            file=io.StringIO(), record=True, width=_NOTEBOOK_WIDTH, force_jupyter=False
        )
        super().__init__(name, _rich("console").Console(force_jupyter=True), auto_refresh=False)
        display = importlib.import_module("IPython.display").display
        self._drawn = time.monotonic()
        self._place = display(self._picture(), raw=True, display_id=True)

    def _picture(self) -> dict[str, str]:
        self._page.print(self._bars.get_renderable())
        text = self._page.export_text(clear=False)
        markup = self._page.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        return {"text/plain": text, "text/html": markup}

    def move(self, share: float | None, told: str) -> None:
        super().move(share, told)
        if time.monotonic() - self._drawn > NOTEBOOK_SECONDS:
            self._drawn = time.monotonic()
            self._place.update(self._picture(), raw=True)

    def stop(self) -> None:
        self._place.update({"text/plain": "", "text/html": ""}, raw=True)
