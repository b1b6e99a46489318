"""The learning rate as the last link of a chain; warm-up and reduction on a plateau beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from playbook_optax import schedules
from playbook_optax._checks import (
    MAX_STEPS,
    ArgumentTypeError,
    check_count,
    check_flag,
    check_number,
    check_steps,
    is_traced,
    named_arguments,
)
from playbook_optax._tree import (
    check_matching,
    check_params,
    moment_dtype,
    owned,
    widest_moment_dtype,
)
from playbook_optax.schedules import as_steps, as_value


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    step: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.
    learning_rate: chex.Array  # float32, shape (): used by the last update (before it: the first).


class ScaleByWarmupState(NamedTuple):
    """State of `scale_by_warmup`; the name keeps it apart from `step` in the same chain."""

    warmup_step: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.


class ReduceOnPlateauState(NamedTuple):
    """State of `reduce_on_plateau`; read it with `plateau_info`.

    Numbers are float32, or float64 where a parameter is.
    """

    plateau_step: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.
    scale: chex.Array  # shape (): factor of the last update, 1 before any reduction
    best_value: chex.Array  # shape (): best judged value; 0 before the first finite one
    num_judged: chex.Array  # int32, shape (): finite values judged so far
    plateau_count: chex.Array  # int32, shape (): judged values since the last improvement
    cooldown_count: chex.Array  # int32, shape (): judged values until plateaus count again
    avg_value: chex.Array  # shape (): mean of the values not judged yet
    num_averaged: chex.Array  # int32, shape (): how many they are
    num_reductions: chex.Array  # int32, shape (): decisions recorded below
    reduction_steps: chex.Array  # int32, (max_reductions,): first update at each; 2**31 - 1 unused
    reduction_scales: chex.Array  # (max_reductions,): the scale from there on


class PlateauInfo(NamedTuple):
    """What `reduce_on_plateau` decided so far. Leading axes of a vmapped state are kept.

    Attributes:
      step: updates done, int32.
      scale: factor of the last update.
      best_value: best value so far; NaN before the first finite one.
      num_judged: finite values judged so far, int32.
      plateau_count: judged values since the last improvement, int32.
      num_reductions: how many reductions were made, int32.
      steps: (max_reductions,) the 0-based update from which each holds, int32; 2**31 - 1 for those
        that were not made.
      scales: (max_reductions,) the scale from there on.
    """

    step: chex.Array
    scale: chex.Array
    best_value: chex.Array
    num_judged: chex.Array
    plateau_count: chex.Array
    num_reductions: chex.Array
    steps: chex.Array
    scales: chex.Array

    def schedule(self, init_value: Any = 1.0) -> schedules.Schedule:
        """The decisions as a plain function of the step: `init_value` times the scale.

        With 1 it replays the run bit for bit in the place of the transformation:
        ``optax.scale_by_schedule(info.schedule())``. With the learning rate it is the learning
        rate's schedule; where that is the last factor of the update, as in SGD and Adam, it gives
        the same run up to rounding (the same bits if `factor` is a power of two).

        Args:
          init_value: value before the first reduction, >= 0.

        Returns:
          A `schedules.piecewise_constant`, with the reductions that were made.

        Raises:
          ValueError: the state was vmapped: take one trial of it.
        """
        if jnp.ndim(self.steps) != 1:
            raise ValueError(
                f"the state holds trials of shape {jnp.shape(self.num_reductions)}, and each has a "
                "schedule of its own: index the state first, "
                "jax.tree.map(lambda leaf: leaf[i], opt_state)."
            )
        steps, scales = self.steps, self.scales
        if not is_traced(self.num_reductions):
            count = int(self.num_reductions)
            steps, scales = steps[:count], scales[:count]
        return schedules.from_reductions(init_value, steps, scales)


def _check_updates(updates: chex.ArrayTree, params: chex.ArrayTree | None) -> None:
    check_params(updates, what="gradients")
    if params is not None:
        check_matching(updates, params, what="params")


def _scale(updates: chex.ArrayTree, factor: chex.Array) -> Any:
    """Multiplies in float32 or better and returns to the dtype of each leaf (law 5)."""

    def leaf(update: chex.Array) -> chex.Array:
        dtype = jnp.result_type(update)
        wide = moment_dtype(dtype)
        return (jnp.asarray(update, wide) * factor.astype(wide)).astype(dtype)

    return jax.tree.map(leaf, updates)


@named_arguments
def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate, so that adding them descends.

    Differs from `optax.scale_by_learning_rate` in two ways: the state has the same structure for
    a number and for a schedule and shows the step and the rate that was used, and a traced float32
    rate keeps bfloat16 or float16 updates in their dtype.

    Source: Deep Learning Tuning Playbook, "Choosing the initial configuration".

    Args:
      learning_rate: a number, a traced scalar, or a schedule ``count -> value`` that is called with
        0 for the first update.

    Returns:
      A transformation whose state shows `step` and `learning_rate`.

    Raises:
      ValueError: the learning rate is negative or not a finite number; a leaf is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.learning_rate import scale_by_learning_rate
      >>> tx = scale_by_learning_rate(lambda count: 0.5 / (1 + count))
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.ones(2), state)
      >>> updates, state = tx.update(jnp.ones(2), state)
      >>> updates.tolist(), int(state.step), float(state.learning_rate)
      ([-0.25, -0.25], 2, 0.25)
    """
    if not callable(learning_rate):
        check_number(
            "learning_rate",
            learning_rate,
            at_least=0.0,
            fix="The sign is added for you: pass a rate >= 0 or a schedule.",
        )

    def rate_at(step: chex.Array) -> chex.Array:
        return as_value(learning_rate(step) if callable(learning_rate) else learning_rate)

    def init(params: chex.ArrayTree) -> ScaleByLearningRateState:
        check_params(params)
        step = jnp.zeros((), jnp.int32)
        return ScaleByLearningRateState(step, owned(rate_at(step), jnp.float32))

    def update(
        updates: chex.ArrayTree,
        state: ScaleByLearningRateState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByLearningRateState]:
        del extra_args
        _check_updates(updates, params)
        rate = rate_at(state.step)
        return _scale(updates, -rate), ScaleByLearningRateState(
            optax.safe_increment(state.step), owned(rate, jnp.float32)
        )

    return optax.GradientTransformationExtraArgs(init, update)


@named_arguments
def scale_by_warmup(warmup_steps: Any) -> optax.GradientTransformationExtraArgs:
    """Multiplies update number c = 0, 1, ... by min(1, c / warmup_steps).

    The first update is zero, and update number `warmup_steps` is the first at full size. It goes
    last in a chain: in front of Adam it would be cancelled by Adam's normalization. Weight decay
    that is inside the chain is warmed up with the rest.

    Source: Deep Learning Tuning Playbook, "Learning rate warmup".

    Args:
      warmup_steps: length of the warm-up in updates, a whole number that may be traced (a traced
        float is rounded). 0 means no warm-up: the first update is at full size.

    Returns:
      A transformation whose state shows `warmup_step`, the updates done so far.

    Raises:
      ValueError: `warmup_steps` is negative, not whole or not below 2**31.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from playbook_optax.learning_rate import scale_by_warmup
      >>> tx = scale_by_warmup(2)
      >>> state, seen = tx.init(jnp.zeros(())), []
      >>> for _ in range(4):
      ...     update, state = tx.update(jnp.ones(()), state)
      ...     seen.append(float(update))
      >>> seen
      [0.0, 0.5, 1.0, 1.0]
    """
    check_steps("warmup_steps", warmup_steps, fix="Use 0 for no warm-up.")

    def init(params: chex.ArrayTree) -> ScaleByWarmupState:
        check_params(params)
        return ScaleByWarmupState(jnp.zeros((), jnp.int32))

    def update(
        updates: chex.ArrayTree,
        state: ScaleByWarmupState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByWarmupState]:
        del extra_args
        _check_updates(updates, params)
        length = as_steps(warmup_steps)
        # The comparison is in int32: float32 cannot tell neighbouring counts past 2**24 apart.
        ratio = state.warmup_step.astype(jnp.float32) / jnp.maximum(length, 1).astype(jnp.float32)
        factor = jnp.where(state.warmup_step < length, ratio, 1.0)
        return _scale(updates, factor), ScaleByWarmupState(optax.safe_increment(state.warmup_step))

    return optax.GradientTransformationExtraArgs(init, update)


@named_arguments
def reduce_on_plateau(
    factor: Any = 0.1,
    patience: Any = 10,
    rtol: Any = 1e-4,
    atol: Any = 0.0,
    cooldown: Any = 0,
    accumulation_size: Any = 1,
    min_scale: Any = 0.0,
    *,
    maximize: bool = False,
    max_reductions: int = 32,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a scale that shrinks when ``value=`` has stopped improving.

    Goes last in a chain, and its `update` needs ``value=``, which `run_study` and `make_train`
    pass on their own: it is the loss of each update's batch there. To follow the validation error
    instead, use `playbook_optax.procedures.plateau_schedule`, or pass it as `value` in a loop of
    your own, at each update the last one measured.

    A schedule driven by the course of training is only worth having if it is automated and
    reproducible. So each reduction is recorded, with the update from which it holds, and
    `plateau_info` gives the run's schedule as a plain function of the step.

    The decisions are those of `optax.contrib.reduce_on_plateau`, but for these: all numbers may be
    traced; a value below zero improves when it falls, by `rtol` of its size (Optax accepts a rise);
    a value that is not finite is never an improvement, infinities included; the scale is float32
    for half-precision parameters, not in their own dtype; and there are at most `max_reductions`.

    Source: Deep Learning Tuning Playbook, "Why do some papers have complicated learning rate
    schedules?"

    Args:
      factor: what the scale is multiplied by, in (0, 1).
      patience: judged values in a row without improvement before a reduction, >= 1.
      rtol: an improvement is a fall by more than this share of the best value's size, in [0, 1],
      atol: and by more than this, >= 0; not both 0.
      cooldown: judged values after a reduction that do not count as a plateau.
      accumulation_size: values averaged into one that is judged, >= 1.
      min_scale: no reduction goes below it, in [0, 1]. All numbers so far may be traced.
      maximize: whether a larger value is better, static.
      max_reductions: room for decisions, static; when it is used up the scale stays.

    Returns:
      A transformation whose `update` takes ``value``, a scalar.

    Raises:
      ValueError: a concrete argument is out of range; `value` is missing or not a scalar; a leaf
        is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.learning_rate import plateau_info, reduce_on_plateau
      >>> tx = reduce_on_plateau(factor=0.5, patience=2)
      >>> state, seen = tx.init(jnp.zeros(())), []
      >>> for loss in (3.0, 1.0, 1.0, 1.0, 1.0):
      ...     update, state = tx.update(jnp.ones(()), state, value=loss)
      ...     seen.append(float(update))
      >>> seen
      [1.0, 1.0, 1.0, 0.5, 0.5]
      >>> schedule = plateau_info(state).schedule(init_value=0.1)
      >>> [round(float(schedule(count)), 3) for count in (0, 2, 3, 4)]
      [0.1, 0.1, 0.05, 0.05]
    """
    check_number("factor", factor, above=0.0, below=1.0, fix="0.1 and 0.5 are usual.")
    check_steps("patience", patience, at_least=1, fix="Use 1 to reduce at the first bad value.")
    check_number("rtol", rtol, at_least=0.0, at_most=1.0)
    check_number("atol", atol, at_least=0.0)
    if not (is_traced(rtol) or is_traced(atol)) and float(rtol) == float(atol) == 0.0:
        raise ValueError(
            "rtol and atol must not both be 0: a plateau would end with any fall, however small. "
            "Use rtol=1e-4 when in doubt."
        )
    check_steps("cooldown", cooldown, fix="Use 0 for none.")
    check_steps(
        "accumulation_size", accumulation_size, at_least=1, fix="Use 1 to judge each value."
    )
    check_number("min_scale", min_scale, at_least=0.0, at_most=1.0, fix="Use 0 for no floor.")
    check_flag("maximize", maximize)
    max_reductions = check_count("max_reductions", max_reductions)

    def init(params: chex.ArrayTree) -> ReduceOnPlateauState:
        check_params(params)
        dtype = widest_moment_dtype(*jax.tree.leaves(params))

        def zero(dtype: Any = jnp.int32) -> chex.Array:
            return jnp.zeros((), dtype)

        return ReduceOnPlateauState(
            plateau_step=zero(),
            scale=jnp.ones((), dtype),
            best_value=zero(dtype),
            num_judged=zero(),
            plateau_count=zero(),
            cooldown_count=zero(),
            avg_value=zero(dtype),
            num_averaged=zero(),
            num_reductions=zero(),
            reduction_steps=jnp.full((max_reductions,), MAX_STEPS, jnp.int32),
            reduction_scales=jnp.ones((max_reductions,), dtype),
        )

    def judge(state: ReduceOnPlateauState, value: chex.Array) -> ReduceOnPlateauState:
        dtype = state.scale.dtype
        size, count = as_steps(accumulation_size), state.num_averaged
        mean = (count.astype(dtype) * state.avg_value + value) / (count + 1).astype(dtype)
        due = count + 1 >= size
        best, sign = state.best_value, -1.0 if maximize else 1.0
        margin = as_value(rtol).astype(dtype) * jnp.abs(best) + as_value(atol).astype(dtype)
        first = state.num_judged == 0
        improved = jnp.isfinite(mean) & (first | (sign * mean < sign * best - margin))
        plateau = jnp.where(improved, 0, optax.safe_increment(state.plateau_count))
        cooling = state.cooldown_count > 0
        reached = ~cooling & (plateau >= jnp.maximum(as_steps(patience), 1))
        smaller = state.scale * as_value(factor).astype(dtype)
        smaller = jnp.maximum(smaller, as_value(min_scale).astype(dtype))
        reduce = due & reached & (smaller < state.scale) & (state.num_reductions < max_reductions)
        here = reduce & (jnp.arange(max_reductions) == state.num_reductions)
        scale = jnp.where(reduce, smaller, state.scale)
        after = jnp.where(reached, as_steps(cooldown), jnp.maximum(state.cooldown_count - 1, 0))
        return ReduceOnPlateauState(
            plateau_step=optax.safe_increment(state.plateau_step),
            scale=scale,
            best_value=jnp.where(due & improved, mean, best),
            num_judged=jnp.where(
                due & jnp.isfinite(mean), optax.safe_increment(state.num_judged), state.num_judged
            ),
            plateau_count=jnp.where(
                due, jnp.where(cooling | reached, 0, plateau), state.plateau_count
            ),
            cooldown_count=jnp.where(due, after, state.cooldown_count),
            avg_value=jnp.where(due, jnp.zeros((), dtype), mean),
            num_averaged=jnp.where(due, 0, count + 1),
            num_reductions=state.num_reductions + reduce.astype(jnp.int32),
            reduction_steps=jnp.where(here, state.plateau_step, state.reduction_steps),
            reduction_scales=jnp.where(here, scale, state.reduction_scales),
        )

    def update(
        updates: chex.ArrayTree,
        state: ReduceOnPlateauState,
        params: chex.ArrayTree | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, ReduceOnPlateauState]:
        del extra_args
        _check_updates(updates, params)
        if value is None:
            raise ArgumentTypeError(
                "reduce_on_plateau needs the value that it watches: call "
                "tx.update(grads, state, params, value=loss)."
            )
        check_value = jnp.asarray(value)
        if check_value.shape != () or jnp.issubdtype(check_value.dtype, jnp.complexfloating):
            raise ValueError(
                f"value must be a real scalar, got shape {check_value.shape} and dtype "
                f"{check_value.dtype}. Pass the mean loss."
            )
        state = judge(state, check_value.astype(state.scale.dtype))
        return _scale(updates, state.scale), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, ReduceOnPlateauState)


def plateau_info(opt_state: chex.ArrayTree) -> PlateauInfo:
    """The decisions of `reduce_on_plateau` in an optimizer state.

    Works on any chained, masked, wrapped or vmapped state, also under `jax.jit`; the leading axes
    of a vmapped state are kept.

    Source: Deep Learning Tuning Playbook, "Why do some papers have complicated learning rate
    schedules?" (a schedule driven by the course of training must be reproducible).

    Args:
      opt_state: a state that holds one `reduce_on_plateau`.

    Returns:
      A `PlateauInfo`.

    Raises:
      ValueError: there is none in it, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import playbook_optax as pbx
      >>> tx = optax.chain(pbx.sgd(0.1), pbx.reduce_on_plateau(patience=1))
      >>> state = tx.init(jnp.zeros(2))
      >>> for loss in (1.0, 2.0, 2.0):
      ...     _, state = tx.update(jnp.ones(2), state, value=loss)
      >>> info = pbx.plateau_info(state)
      >>> int(info.num_reductions), info.steps[:2].tolist()
      (2, [1, 2])
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of reduce_on_plateau, and one is needed: put one "
            "reduce_on_plateau() last in the optax.chain, or pass the part of the state that has "
            "it."
        )
    (state,) = found
    with jax.debug_nans(False):  # Before the first value there is no best one.
        nothing = jnp.asarray(jnp.nan, state.best_value.dtype)
        best_value = jnp.where(state.num_judged > 0, state.best_value, nothing)
    return PlateauInfo(
        step=state.plateau_step,
        scale=state.scale,
        best_value=best_value,
        num_judged=state.num_judged,
        plateau_count=state.plateau_count,
        num_reductions=state.num_reductions,
        steps=state.reduction_steps,
        scales=state.reduction_scales,
    )
