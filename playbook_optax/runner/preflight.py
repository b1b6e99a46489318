"""`preflight`: what a study will take and whether it can run, before anything is spent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax

from playbook_optax import _checks, _shown
from playbook_optax.analysis.findings import Finding
from playbook_optax.records.study import ReservedName
from playbook_optax.runner import devices, execute, plan
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import keys
from playbook_optax.trials.stepper import evaluation_steps

_SECTION = "Deciding how long to train when training is compute-bound"
# How long one width is timed at most.
_TIMED_SECONDS = 1.0
# What may be spent on timing, and on other widths, as a share of the training that is foretold.
SHARE = 0.1
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Timing:
    """One width of a block, compiled and timed.

    Attributes:
      trials_per_block: the width.
      seconds_per_step: seconds for one step of one trial, all devices at work; evaluations left
        out.
      seconds_per_evaluation: seconds for one evaluation of one trial, likewise.
      compile_seconds: tracing and compiling, as long as it took here: about 0 where the program was
        there already.
      bytes_per_device: memory that the programs take, data and all trials of a call included.
      seconds: estimate for the whole study at this width, compiling included, if no trial breaks.
    """

    trials_per_block: int
    seconds_per_step: float
    seconds_per_evaluation: float
    compile_seconds: float
    bytes_per_device: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What `preflight` found.

    Attributes:
      trials_per_block: the width of the smallest `Timing.seconds`; None if the study cannot run.
      default_trials_per_block: the width that `run_study` takes unless another is given, likewise.
      timings: one for each width that was tried, that of `run_study` first.
      num_devices: devices that train.
      bytes_available: memory of each device, None if it is not known.
      num_trials: trials of the study.
      num_steps: updates of each.
      seconds: estimate for the whole study at `trials_per_block`, compiling included, if no trial
        breaks; None if it cannot run.
      findings: what stands in the way, and what would be better.
    """

    trials_per_block: int | None
    default_trials_per_block: int | None
    timings: tuple[Timing, ...]
    num_devices: int
    bytes_available: int | None
    num_trials: int
    num_steps: int
    seconds: float | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the study can run."""
        return self.seconds is not None

    def __repr__(self) -> str:
        told = {**_shown.fields_of(self), "findings": _shown.brief([f.code for f in self.findings])}
        return _shown.record("Preflight", told)

    def __str__(self) -> str:
        return _shown.as_text(*self._summary())

    def _repr_html_(self) -> str:
        return _shown.as_html(*self._summary())

    def _summary(self) -> tuple[str, _shown.Rows]:
        """Whether it can run and how long it takes, and what was found, a row each."""
        found = [(f.severity, f"{f.message} {f.suggestion}".strip()) for f in self.findings]
        if self.seconds is None:
            return "The study cannot run.", found
        own = _fastest(self.timings)
        free = "" if self.bytes_available is None else f" of {self.bytes_available / _GIB:.1f}"
        told = (
            f"{self.num_trials} trials of {self.num_steps} steps take about {own.seconds:,.0f} s "
            f"on {self.num_devices} device(s), of which {own.compile_seconds:.0f} s to compile."
        )
        memory = f"each device needs {own.bytes_per_device / _GIB:.2f}{free} GiB"
        others = [
            (
                "slower",
                f"{one.trials_per_block} trial(s) to a block: about {one.seconds:,.0f} s, of which "
                f"{one.compile_seconds:.0f} s to compile",
            )
            for one in self.timings
            if one is not own
        ]
        width = ("width", f"{own.trials_per_block} trial(s) to a block; {memory}")
        return told, [width, *others, *found]


@takes_trainer
def preflight(
    trainer: Trainer,
    points: SearchSpace | Mapping[str, Any],
    *,
    num_steps: int = 1000,
    eval_every: int | None = None,
    num_trials: int | None = None,
    num_seeds: int = 1,
    independent: bool = False,
    keep: str = "none",
    key: chex.PRNGKey | None = None,
) -> Preflight:
    """Says what fits, how long it will take, and what cannot be traced, before it is spent.

    The study's programs are compiled and run for a second at most at the width that `run_study`
    would choose, which finds them compiled then. Another width is tried beside it only where that
    likely costs less than it can gain: no width is begun once a tenth of the training that is
    foretold is spent, or would be with a compilation as long as the first one. `run_study` itself
    chooses by timing only where it is told to (``trials_per_block="timed"``), and else by backend
    and size: the width decides bits, and a study's bits should not hang on what else the machine
    was doing. Where the other width is faster here, a finding says so.

    Args:
      trainer: as in `run_study`, as are all others.
      points: a `SearchSpace`, or name to array (trial,).
      num_steps: updates of each trial.
      eval_every: updates between evaluations; a twentieth of the steps if None.
      num_trials: trials; 64 if None, with a `SearchSpace`.
      num_seeds: repetitions of each trial.
      independent: give each trial randomness of its own.
      keep: weights to keep.
      key: the key; ``jax.random.key(0)`` if None.

    Returns:
      The report; print it. What cannot be traced is a finding in it, not an exception.

    Raises:
      ValueError: an argument that has nothing to do with tracing is bad.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 10.0, scale="log")})
      >>> report = pbx.preflight(workload, lambda p: pbx.sgd(p["learning_rate"]), space)
      >>> report.ok, report.default_trials_per_block
      (True, 8)
      >>> bad = pbx.preflight(workload, lambda p: pbx.sgd(float(p["learning_rate"])), space)
      >>> bad.ok, bad.findings[0].code
      (False, 'cannot_trace')

    Source: playbook, "Deciding how long to train when training is compute-bound".
    """
    key = jax.random.key(0) if key is None else key
    keys.check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    eval_every = max(1, num_steps // 20) if eval_every is None else eval_every
    eval_every = _checks.check_count("eval_every", eval_every)
    if num_trials is None and isinstance(points, SearchSpace):
        num_trials = 64
    rows, per_seed = plan.make_points(points, num_trials, key)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    count = per_seed * num_seeds
    local = devices.trial_mesh(trainer.mesh)
    num_devices, free = local.shape[devices.TRIALS_AXIS], devices.free_memory(local)
    num_evals = len(evaluation_steps(num_steps, eval_every))

    def runner(width: int | str | None) -> StudyRunner:
        return StudyRunner(
            trainer.replace(trials_per_block=width, progress=False),
            points,
            num_steps=num_steps,
            eval_every=eval_every,
            key=key,
            num_seeds=num_seeds,
            independent=independent,
            keep=keep,
        )

    def refused(code: str, error: BaseException, suggestion: str) -> Preflight:
        finding = Finding(code, "error", str(error), {}, _SECTION, suggestion)
        return Preflight(None, None, (), num_devices, free, count, num_steps, None, (finding,))

    def training_seconds(width: int, evaluation: float, step: float) -> float:
        # The last block and the last round of the devices are filled up.
        blocks = -(-per_seed // width) * num_seeds
        num_rows = -(-blocks // num_devices) * num_devices * width
        return num_rows * (num_steps * step + num_evals * evaluation)

    def timed(runner: StudyRunner, width: int, began: float) -> Timing:
        engine = runner.engine(width, -(-count // width))
        engine.programs.program("advance")
        compiled = time.monotonic()
        evaluation, step = runner.rehearse(width, count, rows, 0.0)
        room = min(_TIMED_SECONDS, SHARE * training_seconds(width, evaluation, step))
        if time.monotonic() - compiled < room:
            evaluation, step = runner.rehearse(width, count, rows, room)
        whole = compiled - began + training_seconds(width, evaluation, step)
        return Timing(width, step, evaluation, compiled - began, engine.memory, whole)

    def other(width: int) -> Timing | None:
        began = time.monotonic()
        made = runner(width)
        try:
            return timed(made, made.fitting_width(count), began)
        except execute.OutOfMemory:
            return None

    began = time.monotonic()
    try:
        own = runner(trainer.trials_per_block)
        width = own.fitting_width(count)
    except execute.OutOfMemory as error:
        return refused("does_not_fit", error, "")
    except ReservedName as error:
        return refused("reserved_name", error, "")
    except Exception as error:
        cause = type(error).__name__
        suggestion = (
            "Values of a point, parameters and data are traced: use jnp and jax.lax on them, "
            "and give what decides shapes or structure to a study of its own."
        )
        told = error if str(error) else ValueError(cause)
        return refused("cannot_trace", told, suggestion)
    first = timed(own, width, began)
    likely = own.engine(width, -(-count // width)).programs.making_seconds
    widths = [plan.CPU_WIDTH if width == 1 else 1]
    may_choose = trainer.trials_per_block is None and jax.default_backend() == "cpu"
    timings = [
        first,
        *worth_trying(first, [w for w in widths if may_choose and w <= per_seed], likely, other),
    ]
    findings = [] if own.takes_lengths else [_own_length()]
    findings += _compared(timings)
    if num_devices == 1 and jax.default_backend() == "cpu":
        findings += _idle_cores()
    best = _fastest(timings)
    return Preflight(
        best.trials_per_block,
        width,
        tuple(timings),
        num_devices,
        free,
        count,
        num_steps,
        best.seconds,
        tuple(findings),
    )


def worth_trying(
    first: Timing,
    widths: Sequence[int],
    likely_seconds: float,
    measure: Callable[[int], Timing | None],
) -> list[Timing]:
    """Measures further widths, as long as that likely costs less than it can gain.

    Args:
      first: the width that was measured already.
      widths: the others, in the order in which to try them.
      likely_seconds: what it likely takes to compile for one of them.
      measure: measures a width; None where it does not fit into memory.

    Returns:
      Those that were measured. None is begun once `SHARE` of the fastest training so far is spent,
      or would be with `likely_seconds` more: what is spent is at most that share and one width.
    """
    found: list[Timing] = []
    began = time.monotonic()
    for width in widths:
        training = min(one.seconds - one.compile_seconds for one in (first, *found))
        if time.monotonic() - began + likely_seconds > SHARE * training:
            break
        timing = measure(width)
        found += [] if timing is None else [timing]
    return found


def _fastest(timings: Sequence[Timing]) -> Timing:
    """The one whose study is done first; the first of equals."""
    return min(timings, key=lambda one: one.seconds)


def _compared(timings: Sequence[Timing]) -> list[Finding]:
    first, best = timings[0], _fastest(timings)
    if best is first:
        return []
    ratio = first.seconds / best.seconds
    return [
        Finding(
            "other_width_faster",
            "info",
            f"In blocks of {best.trials_per_block} trial(s) the study takes {1 / ratio:.2f} times "
            f"as long as in those of {first.trials_per_block}, which are the default.",
            {"ratio": ratio, "trials_per_block": best.trials_per_block},
            _SECTION,
            f"Give trials_per_block={best.trials_per_block}.",
        )
    ]


def _own_length() -> Finding:
    return Finding(
        "schedule_needs_a_number",
        "info",
        "make_schedule needs the number of steps itself, so that each length of training compiles "
        "a program of its own.",
        {},
        _SECTION,
        "Write it for a traced num_steps, with jnp in the place of Python's if, int and range, as "
        "the functions of pbx.schedules are.",
    )


def _idle_cores() -> list[Finding]:
    cores = devices.num_cores()
    if cores < 2:
        return []
    return [
        Finding(
            "idle_cores",
            "warning",
            f"One CPU device trains, and the machine has {cores} cores.",
            {"cores": cores},
            _SECTION,
            "Call pbx.use_cpu_cores() before any array is made.",
        )
    ]
