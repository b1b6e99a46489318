"""The training of one trial: a stepper, and the pure function composed of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.trials import judge, loop
from playbook_optax.trials.judge import TrialResult
from playbook_optax.trials.stepper import (
    KEEP,
    Lengths,
    MakeOptimizer,
    MakeSchedule,
    Stepper,
    TrialState,
    evaluation_steps,
)
from playbook_optax.trials.workload import WorkloadLike, resolve


class Trial(NamedTuple):
    """A trial as a stepper of three pure functions; vmap and jit them as you like.

    Attributes:
      init: ``init(point, key, data) -> state``: initializes model and optimizer.
      advance: ``advance(state, data, start, stop) -> state``: does the updates start, ..., stop - 1
        and the evaluations among them, which for start = 0 include that before any update. Both
        are int32 scalars, traced or not; under vmap they must be shared by all trials
        (``in_axes=(0, None, None, None)``). Any cut of a run into segments gives the same bits.
      result: ``result(state) -> TrialResult``.
      num_steps: updates in the whole run.
      eval_steps: int32 NumPy array (eval,), updates done before each evaluation.
    """

    init: Callable[..., TrialState]
    advance: Callable[..., TrialState]
    result: Callable[[TrialState], TrialResult]
    num_steps: int
    eval_steps: np.ndarray


@_checks.named_arguments
def make_trial(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    num_steps: int,
    eval_every: int,
    *,
    keep: str = "none",
    make_schedule: MakeSchedule | None = None,
) -> Trial:
    """Builds the stepper of one trial.

    A trial freezes, bit for bit, at the update whose loss or result is not finite. Evaluation is
    before the first update, every `eval_every` updates, and after the last. The gradient's norm is
    recorded at each step, and metrics of the loss as their mean since the last evaluation, under
    ``step/<name>`` (the loss itself as ``step/loss``).

    Half-precision parameters lose updates below about 1/256 (bfloat16) or 1/2048 (float16) of their
    size to rounding, whatever the optimizer: a warning says so. Keep float32 parameters and cast
    inside the model.

    Args:
      workload: a `Workload`, or a function of the point that gives one; names, objective,
        structure and shapes may not depend on the point.
      make_optimizer: ``make_optimizer(point)`` returns any Optax transformation; the values of the
        point are traced scalars.
      num_steps: updates in the whole run.
      eval_every: updates between evaluations; more than `num_steps` means only first and last.
      keep: which weights the result brings back: ``"none"``, ``"best"`` (at the retrospective best
        evaluation) or ``"final"``.
      make_schedule: ``make_schedule(point, num_steps)`` returns a schedule, which then reaches
        `make_optimizer` as ``point["learning_rate"]``.

    Returns:
      The stepper.

    Raises:
      ValueError: a bad argument; and, while tracing, a loss, a model or an optimizer that breaks
        its promise.

    Example:
      >>> import jax
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jax.numpy.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> trial = pbx.make_trial(workload, lambda p: pbx.sgd(p["learning_rate"]), 10, 5)
      >>> state = trial.init({"learning_rate": 0.1}, jax.random.key(0), None)
      >>> state = trial.advance(state, None, 0, 4)
      >>> state = trial.advance(state, None, 4, 10)
      >>> [round(float(v), 4) for v in trial.result(state).metrics["valid/loss"]]
      [2.0, 0.2147, 0.0231]

    Source: playbook, "Deciding how long to train when training is not compute-bound" and "How can
    optimization failures be debugged and mitigated?"
    """
    num_steps = _checks.check_count(
        "num_steps", num_steps, fix="A trial needs at least one update."
    )
    eval_every = _checks.check_count("eval_every", eval_every)
    _checks.check_choice("keep", keep, KEEP)
    for flag in ("jax_debug_nans", "jax_debug_infs"):
        if jax.config.values[flag]:
            raise ValueError(
                f"{flag} is on, which makes an error of what a trial records as data: that it "
                "diverged, and NaN for what was never measured. Turn it off, "
                f'jax.config.update("{flag}", False); Study.replay shows the step that broke.'
            )
    lengths = Lengths(num_steps, min(eval_every, num_steps))
    eval_steps = evaluation_steps(*lengths)
    stepper = Stepper(workload, make_optimizer, make_schedule, keep == "best")

    def init(point: Any, key: chex.PRNGKey, data: Any) -> TrialState:
        return stepper.begin(point, key, data, lengths, len(eval_steps))

    def advance(
        state: TrialState, data: Any, start: chex.Numeric, stop: chex.Numeric
    ) -> TrialState:
        start = jax.numpy.asarray(start, jax.numpy.int32)
        return loop.advance(
            lambda state, step, active: stepper.update(
                state, data, lengths, step, None, start, active
            ),
            lambda state, index: stepper.record(state, data, lengths, index),
            state,
            lengths,
            start,
            stop,
        )

    def result(state: TrialState) -> TrialResult:
        return judge.result(resolve(workload, state.point), state, eval_steps, keep)

    return Trial(init, advance, result, num_steps, eval_steps)


@_checks.named_arguments
def make_train(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    num_steps: int,
    eval_every: int,
    *,
    keep: str = "none",
    make_schedule: MakeSchedule | None = None,
) -> Callable[[Any, chex.PRNGKey, Any], TrialResult]:
    """Builds ``train(point, key, data) -> TrialResult``, the whole run of one trial.

    The function is pure and never donates its arguments. A learning-rate sweep is your own line:
    ``jax.jit(jax.vmap(train, in_axes=(0, None, None)))(points, key, workload.data)``.

    Args:
      workload: as in `make_trial`.
      make_optimizer: as in `make_trial`.
      num_steps: updates in the whole run.
      eval_every: updates between evaluations.
      keep: ``"none"``, ``"best"`` or ``"final"``: which weights come back.
      make_schedule: as in `make_trial`.

    Returns:
      The function.

    Raises:
      ValueError: as `make_trial`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> train = pbx.make_train(workload, lambda p: pbx.sgd(p["learning_rate"]), 20, 10)
      >>> sweep = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
      >>> result = sweep({"learning_rate": jnp.array([0.1, 1.5])}, jax.random.key(0), None)
      >>> result.infeasible.tolist()
      [False, True]

    Source: playbook, "Deciding how long to train when training is not compute-bound".
    """
    trial = make_trial(
        workload, make_optimizer, num_steps, eval_every, keep=keep, make_schedule=make_schedule
    )

    def train(point: Any, key: chex.PRNGKey, data: Any) -> TrialResult:
        return trial.result(trial.advance(trial.init(point, key, data), data, 0, num_steps))

    return train
