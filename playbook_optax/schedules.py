"""Learning rate schedules: functions ``count -> value``, traceable in every number.

`count` is the number of updates done so far: an integer, an int32 scalar or an array of any shape
(for a plot); a negative one counts as 0. All arithmetic on counts is int32, so neighbouring counts
past 2**24 are told apart. Values are float32, or float64 where x64 is on.

Every schedule starts at its first value: `schedule(0)` is `init_value`, whatever the other
arguments, 0 steps included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax._checks import (
    MAX_STEPS,
    ArgumentTypeError,
    check_number,
    check_steps,
    is_traced,
    named_arguments,
)
from playbook_optax._tree import moment_dtype, widest_moment_dtype

__all__ = [
    "Schedule",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "extend_for_longer_run",
    "from_reductions",
    "inverse_sqrt_decay",
    "linear_decay",
    "piecewise_constant",
    "polynomial_decay",
    "prepend_warmup",
]


def __dir__() -> list[str]:
    return sorted(__all__)


Count = Any  # int, or integer array of any shape
ScheduleFn = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A function of the count that knows how to become longer.

    Any callable ``count -> value`` serves where a schedule is asked for; only
    `extend_for_longer_run` needs one of these.

    Attributes:
      value: ``count -> value``.
      lengthen: ``extra_steps -> Schedule``, or None where the playbook gives no rule.
      made_by: the function of this module that made it and its arguments, so that a program can
        make it again; None for one made by hand.
    """

    value: ScheduleFn
    lengthen: Callable[[Any], Schedule] | None = None
    made_by: tuple[str, dict[str, Any]] | None = dataclasses.field(default=None, repr=False)

    def __call__(self, count: Count) -> jax.Array:
        """The value at `count`, of the shape of `count`."""
        return self.value(count)


def as_value(value: Any) -> jax.Array:
    """A hyperparameter as an array of float32 or better."""
    value = jnp.asarray(value)
    return value.astype(moment_dtype(value.dtype))


def as_steps(steps: Any) -> jax.Array:
    """A number of steps, or counts, as int32 in [0, 2**31): clamped, a float rounded."""
    if not isinstance(steps, jax.Array):
        # In float64 on the host: a number beyond int32 must saturate, not overflow.
        return jnp.asarray(
            np.clip(np.round(np.asarray(steps, np.float64)), 0, MAX_STEPS).astype(np.int32)
        )
    if jnp.issubdtype(steps.dtype, jnp.floating):
        steps = jnp.round(jnp.maximum(steps, 0).astype(moment_dtype(steps.dtype)))
        # 2**31 - 1 is not a float32, so the upper end is decided before the conversion.
        above = steps >= 2.0**31
        return jnp.where(above, MAX_STEPS, jnp.where(above, 0, steps).astype(jnp.int32))
    return jnp.clip(steps, 0, MAX_STEPS).astype(jnp.int32)


def _check_rate(name: str, value: Any) -> None:
    check_number(name, value, at_least=0.0, fix="A schedule's values are rates >= 0.")


def _check_decay(init_value: Any, decay_steps: Any, hold_steps: Any, end_value: Any) -> None:
    _check_rate("init_value", init_value)
    check_steps("decay_steps", decay_steps, fix="Use 0 for a drop right after hold_steps.")
    check_steps("hold_steps", hold_steps, fix="Use 0 to decay from the start.")
    _check_rate("end_value", end_value)


def _elapsed(count: Count, hold_steps: Any) -> jax.Array:
    """Steps since the end of the hold, int32 >= 0. Both terms are >= 0: no overflow."""
    return jnp.maximum(as_steps(count) - as_steps(hold_steps), 0)


def _fractions(
    count: Count, decay_steps: Any, hold_steps: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """What has passed and what remains of the decay, as fractions.

    Each is a quotient of exact integers, so that both are accurate near 0, where one minus the
    other would cancel. At `hold_steps` they are exactly 0 and 1 even if `decay_steps` is 0.
    """
    length = jnp.maximum(as_steps(decay_steps), 1)
    elapsed = jnp.minimum(_elapsed(count, hold_steps), length)
    whole = length.astype(dtype)
    return elapsed.astype(dtype) / whole, (length - elapsed).astype(dtype) / whole


def _endpoints(*values: Any) -> list[jax.Array]:
    arrays = [as_value(value) for value in values]
    dtype = widest_moment_dtype(*arrays)
    return [array.astype(dtype) for array in arrays]


def _add_steps(steps: Any, extra_steps: Any) -> Any:
    """The sum, still a Python integer where both are, saturating where one is traced."""
    if not (is_traced(steps) or is_traced(extra_steps)):
        return int(steps) + int(extra_steps)
    extra = as_steps(extra_steps)
    return jnp.minimum(as_steps(steps), MAX_STEPS - extra) + extra


@named_arguments
def constant(value: Any) -> Schedule:
    """The same value at every count.

    Source: Deep Learning Tuning Playbook, "Algorithm for picking an initial candidate for
    max_train_steps using a learning rate sweep".

    Args:
      value: the value, >= 0; may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: `value` is negative or not a finite number.

    Example:
      >>> from playbook_optax import schedules
      >>> float(schedules.constant(0.5)(1000))
      0.5
    """
    _check_rate("value", value)

    def value_at(count: Count) -> jax.Array:
        return jnp.broadcast_to(as_value(value), jnp.shape(count))

    return Schedule(value_at, lambda extra_steps: constant(value), ("constant", {"value": value}))


@named_arguments
def linear_decay(
    init_value: Any, decay_steps: Any, hold_steps: Any = 0, end_value: Any = 0.0
) -> Schedule:
    """`init_value` for `hold_steps`, then a straight line down to `end_value`.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      init_value: first value, >= 0.
      decay_steps: length of the decay in steps; 0 drops to `end_value` one step after the hold.
      hold_steps: length of the constant part before it, in steps.
      end_value: last value, >= 0, kept for ever. Every argument may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: a concrete argument is negative, not finite, or not a whole number of steps.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.linear_decay(1.0, decay_steps=4, hold_steps=2)
      >>> [float(schedule(c)) for c in (0, 2, 3, 6, 99)]
      [1.0, 1.0, 0.75, 0.0, 0.0]
    """
    _check_decay(init_value, decay_steps, hold_steps, end_value)

    def value_at(count: Count) -> jax.Array:
        first, last = _endpoints(init_value, end_value)
        passed, remaining = _fractions(count, decay_steps, hold_steps, first.dtype)
        return first * remaining + last * passed

    def lengthen(extra_steps: Any) -> Schedule:
        return linear_decay(init_value, decay_steps, _add_steps(hold_steps, extra_steps), end_value)

    arguments = {
        "init_value": init_value,
        "decay_steps": decay_steps,
        "hold_steps": hold_steps,
        "end_value": end_value,
    }
    return Schedule(value_at, lengthen, ("linear_decay", arguments))


@named_arguments
def cosine_decay(
    init_value: Any, decay_steps: Any, hold_steps: Any = 0, end_value: Any = 0.0
) -> Schedule:
    """`init_value` for `hold_steps`, then half a cosine wave down to `end_value`.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      init_value: first value, >= 0.
      decay_steps: length of the decay in steps; 0 drops to `end_value` one step after the hold.
      hold_steps: length of the constant part before it, in steps.
      end_value: last value, >= 0, kept for ever. Every argument may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: a concrete argument is negative, not finite, or not a whole number of steps.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.cosine_decay(1.0, decay_steps=4)
      >>> [round(float(schedule(c)), 3) for c in (0, 1, 2, 3, 4)]
      [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    _check_decay(init_value, decay_steps, hold_steps, end_value)

    def value_at(count: Count) -> jax.Array:
        first, last = _endpoints(init_value, end_value)
        passed, remaining = _fractions(count, decay_steps, hold_steps, first.dtype)
        # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)**2, which does not cancel near the end.
        quarter = jnp.asarray(np.pi / 2, first.dtype)
        return first * jnp.sin(quarter * remaining) ** 2 + last * jnp.sin(quarter * passed) ** 2

    def lengthen(extra_steps: Any) -> Schedule:
        return cosine_decay(init_value, _add_steps(decay_steps, extra_steps), hold_steps, end_value)

    arguments = {
        "init_value": init_value,
        "decay_steps": decay_steps,
        "hold_steps": hold_steps,
        "end_value": end_value,
    }
    return Schedule(value_at, lengthen, ("cosine_decay", arguments))


@named_arguments
def polynomial_decay(
    init_value: Any,
    decay_steps: Any,
    hold_steps: Any = 0,
    end_value: Any = 0.0,
    power: Any = 1.0,
) -> Schedule:
    """As `linear_decay`, with the remaining fraction of the decay raised to `power`.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      init_value: first value, >= 0.
      decay_steps: length of the decay in steps; 0 drops to `end_value` one step after the hold.
      hold_steps: length of the constant part before it, in steps.
      end_value: last value, >= 0, kept for ever.
      power: exponent, > 0; 1 is `linear_decay`. Every argument may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: a concrete argument is out of range, not finite, or not a whole number of steps.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.polynomial_decay(1.0, decay_steps=4, power=2.0)
      >>> [float(schedule(c)) for c in (0, 2, 4)]
      [1.0, 0.25, 0.0]
    """
    _check_decay(init_value, decay_steps, hold_steps, end_value)
    check_number("power", power, above=0.0)

    def value_at(count: Count) -> jax.Array:
        first, last, exponent = _endpoints(init_value, end_value, power)
        _, remaining = _fractions(count, decay_steps, hold_steps, first.dtype)
        weight = remaining**exponent
        return first * weight + last * (1 - weight)

    def lengthen(extra_steps: Any) -> Schedule:
        hold = _add_steps(hold_steps, extra_steps)
        return polynomial_decay(init_value, decay_steps, hold, end_value, power)

    arguments = {
        "init_value": init_value,
        "decay_steps": decay_steps,
        "hold_steps": hold_steps,
        "end_value": end_value,
        "power": power,
    }
    return Schedule(value_at, lengthen, ("polynomial_decay", arguments))


@named_arguments
def exponential_decay(
    init_value: Any,
    decay_steps: Any,
    decay_rate: Any,
    hold_steps: Any = 0,
    end_value: Any = 0.0,
) -> Schedule:
    """`init_value` for `hold_steps`, then times `decay_rate` every `decay_steps`.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      init_value: first value, >= 0.
      decay_steps: steps in which the value shrinks by `decay_rate`, continuously; 0 drops to
        `end_value` one step after the hold.
      decay_rate: factor in (0, 1].
      hold_steps: length of the constant part before it, in steps.
      end_value: floor of the decay, >= 0 and at most `init_value`. Every argument may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: a concrete argument is out of range, not finite, or not a whole number of steps.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.exponential_decay(1.0, decay_steps=10, decay_rate=0.5)
      >>> [float(schedule(c)) for c in (0, 10, 20)]
      [1.0, 0.5, 0.25]
    """
    _check_decay(init_value, decay_steps, hold_steps, end_value)
    check_number("decay_rate", decay_rate, above=0.0, at_most=1.0)

    def value_at(count: Count) -> jax.Array:
        first, last, rate = _endpoints(init_value, end_value, decay_rate)
        elapsed, length = _elapsed(count, hold_steps), as_steps(decay_steps)
        # Whole periods are counted in int32; the power of the rest has an exponent in [0, 1).
        whole, rest = jnp.divmod(elapsed, jnp.maximum(length, 1))
        rest = rest.astype(first.dtype) / jnp.maximum(length, 1).astype(first.dtype)
        decayed = first * rate ** whole.astype(first.dtype) * rate**rest
        decayed = jnp.where((length == 0) & (elapsed > 0), last, decayed)
        return _floored(first, decayed, last)

    arguments = {
        "init_value": init_value,
        "decay_steps": decay_steps,
        "decay_rate": decay_rate,
        "hold_steps": hold_steps,
        "end_value": end_value,
    }
    return Schedule(value_at, None, ("exponential_decay", arguments))


@named_arguments
def inverse_sqrt_decay(
    init_value: Any, decay_steps: Any, hold_steps: Any = 0, end_value: Any = 0.0
) -> Schedule:
    """`init_value` for `hold_steps`, then ``init_value / sqrt(1 + elapsed / decay_steps)``.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      init_value: first value, >= 0.
      decay_steps: time scale in steps: after it the value is ``init_value / sqrt(2)``; 0 drops to
        `end_value` one step after the hold.
      hold_steps: length of the constant part before it, in steps.
      end_value: floor of the decay, >= 0 and at most `init_value`. Every argument may be traced.

    Returns:
      A schedule.

    Raises:
      ValueError: a concrete argument is negative, not finite, or not a whole number of steps.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.inverse_sqrt_decay(1.0, decay_steps=10)
      >>> [float(schedule(c)) for c in (0, 30)]
      [1.0, 0.5]
    """
    _check_decay(init_value, decay_steps, hold_steps, end_value)

    def value_at(count: Count) -> jax.Array:
        first, last = _endpoints(init_value, end_value)
        elapsed = _elapsed(count, hold_steps).astype(first.dtype)
        length = as_steps(decay_steps).astype(first.dtype)
        # The guard serves decay_steps = 0 at the start, which would be 0 / 0; else sum >= 1.
        share = jnp.where(elapsed > 0, length / jnp.maximum(length + elapsed, 1), 1)
        return _floored(first, first * jnp.sqrt(share), last)

    arguments = {
        "init_value": init_value,
        "decay_steps": decay_steps,
        "hold_steps": hold_steps,
        "end_value": end_value,
    }
    return Schedule(value_at, None, ("inverse_sqrt_decay", arguments))


def _floored(first: jax.Array, decayed: jax.Array, last: jax.Array) -> jax.Array:
    """`decayed`, never below the floor; a floor above `first` (possible when traced) is capped."""
    return jnp.maximum(decayed, jnp.minimum(first, last))


@named_arguments
def piecewise_constant(values: Any, boundaries: Any) -> Schedule:
    """``values[i]`` from count ``boundaries[i - 1]`` until just before ``boundaries[i]``.

    Source: Deep Learning Tuning Playbook, "What is the best learning rate decay schedule family?"

    Args:
      values: n + 1 values >= 0, a sequence of numbers or an array of shape (n + 1,).
      boundaries: n increasing counts, a sequence of whole numbers or an array of shape (n,). The
        numbers may be traced; how many there are is static.

    Returns:
      A schedule.

    Raises:
      ValueError: the lengths do not fit, boundaries decrease, or a concrete number is bad.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.piecewise_constant([1.0, 0.5, 0.25], [10, 20])
      >>> [float(schedule(c)) for c in (0, 9, 10, 20)]
      [1.0, 1.0, 0.5, 0.25]
    """
    levels, edges = _listed("values", values), _listed("boundaries", boundaries)
    if len(levels) != len(edges) + 1:
        raise ValueError(
            f"values must be one longer than boundaries, got {len(levels)} values and "
            f"{len(edges)} boundaries."
        )
    for i, level in enumerate(levels):
        _check_rate(f"values[{i}]", level)
    for i, edge in enumerate(edges):
        check_steps(f"boundaries[{i}]", edge)
    known = [float(edge) for edge in edges if not is_traced(edge)]
    if known != sorted(known):
        raise ValueError(f"boundaries must not decrease, got {known}. Sort them.")

    def value_at(count: Count) -> jax.Array:
        count = as_steps(count)
        heights = _endpoints(*levels)
        value = jnp.broadcast_to(heights[0], count.shape)
        for edge, height in zip(edges, heights[1:], strict=True):
            value = jnp.where(count >= as_steps(edge), height, value)
        return value

    arguments = {"values": levels, "boundaries": edges}
    return Schedule(value_at, None, ("piecewise_constant", arguments))


@named_arguments
def from_reductions(init_value: Any, steps: Any, scales: Any) -> Schedule:
    """`init_value`, and from each of `steps` on `init_value` times the scale that goes with it.

    Replays what `reduce_on_plateau` decided, as a plain function of the step: the product is taken
    once, in float32 or better, and each value is then the same at every step.

    Source: Deep Learning Tuning Playbook, "Why do some papers have complicated learning rate
    schedules?"

    Args:
      init_value: value before the first of `steps`, >= 0.
      steps: counts at which the value changes, not decreasing.
      scales: as many factors >= 0, each of `init_value`, not of the value before. All may be
        traced, as arrays (reduction,).

    Returns:
      A schedule.

    Raises:
      ValueError: there are not as many scales as steps, steps decrease or are not whole, or a
        number is negative or not finite.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.from_reductions(0.5, steps=[10, 30], scales=[0.5, 0.25])
      >>> [float(schedule(c)) for c in (0, 9, 10, 29, 30)]
      [0.5, 0.5, 0.25, 0.25, 0.125]
    """
    _check_rate("init_value", init_value)
    edges, factors = _listed("steps", steps), _listed("scales", scales)
    if len(edges) != len(factors):
        raise ValueError(
            f"scales must be as many as steps, got {len(factors)} scales and {len(edges)} steps."
        )
    for i, factor in enumerate(factors):
        _check_rate(f"scales[{i}]", factor)
    for i, edge in enumerate(edges):
        check_steps(f"steps[{i}]", edge)
    first = as_value(init_value)
    values = [first, *(first * as_value(factor) for factor in factors)]
    return piecewise_constant(values, edges)


def _listed(name: str, numbers: Any) -> list[Any]:
    if isinstance(numbers, (np.ndarray, jax.Array)):
        if numbers.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got shape {numbers.shape}.")
    elif not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise ArgumentTypeError(
            f"{name} must be a sequence of numbers or a 1-d array, got {numbers!r}."
        )
    return [numbers[i] for i in range(len(numbers))]


@named_arguments
def prepend_warmup(schedule: ScheduleFn, warmup_steps: Any) -> Schedule:
    """A linear rise to the schedule's first value, and then the schedule, shifted whole.

    At count c < warmup_steps the value is ``schedule(0) * c / warmup_steps``; after that it is
    ``schedule(c - warmup_steps)``. A run becomes `warmup_steps` longer.

    Source: Deep Learning Tuning Playbook, "Learning rate warmup".

    Args:
      schedule: ``count -> value``, any callable.
      warmup_steps: length of the warm-up in steps, may be traced; 0 starts at the peak.

    Returns:
      A schedule.

    Raises:
      ValueError: `warmup_steps` is negative or not a whole number of steps, or `schedule` is not a
        function.

    Example:
      >>> from playbook_optax import schedules
      >>> schedule = schedules.prepend_warmup(schedules.linear_decay(1.0, 4), warmup_steps=2)
      >>> [float(schedule(c)) for c in (0, 1, 2, 3, 6)]
      [0.0, 0.5, 1.0, 0.75, 0.0]
    """
    _check_callable(schedule)
    check_steps("warmup_steps", warmup_steps, fix="Use 0 for no warm-up.")

    def value_at(count: Count) -> jax.Array:
        count, length = as_steps(count), as_steps(warmup_steps)
        peak = as_value(schedule(jnp.zeros((), jnp.int32)))
        share = count.astype(peak.dtype) / jnp.maximum(length, 1).astype(peak.dtype)
        after = as_value(schedule(jnp.maximum(count - length, 0)))
        return jnp.where(count < length, peak * share, after)

    def lengthen(extra_steps: Any) -> Schedule:
        return prepend_warmup(extend_for_longer_run(schedule, extra_steps), warmup_steps)

    arguments = {"schedule": schedule, "warmup_steps": warmup_steps}
    return Schedule(value_at, lengthen, ("prepend_warmup", arguments))


@named_arguments
def extend_for_longer_run(schedule: ScheduleFn, extra_steps: Any) -> Schedule:
    """The schedule for a run that is `extra_steps` longer, by the playbook's rule for each family.

    A linear (or polynomial) decay keeps its length and has the constant part before it extended. A
    cosine decay keeps the base learning rate and is stretched. A constant stays as it is, and a
    prepended warm-up keeps its length.

    Source: Deep Learning Tuning Playbook, "Multiple rounds".

    Args:
      schedule: made by this module.
      extra_steps: how many steps longer the new run is; may be traced.

    Returns:
      A schedule of the same family.

    Raises:
      ValueError: `extra_steps` is negative or not whole, or the playbook has no rule for this
        schedule (exponential, inverse square root, piecewise, or a function of your own).

    Example:
      >>> from playbook_optax import schedules
      >>> short = schedules.linear_decay(1.0, decay_steps=10)
      >>> long = schedules.extend_for_longer_run(short, extra_steps=90)
      >>> [float(long(c)) for c in (0, 90, 95, 100)]
      [1.0, 1.0, 0.5, 0.0]
    """
    _check_callable(schedule)
    check_steps("extra_steps", extra_steps, fix="It is the new num_steps minus the old.")
    if not isinstance(schedule, Schedule) or schedule.lengthen is None:
        raise ValueError(
            "extend_for_longer_run knows the playbook's rule for constant, linear_decay, "
            "polynomial_decay and cosine_decay (warmed up or not) only; make the longer schedule "
            f"yourself. Got {schedule!r}."
        )
    return schedule.lengthen(extra_steps)


def _check_callable(schedule: Any) -> None:
    if not callable(schedule):
        raise ArgumentTypeError(
            f"schedule must be a function count -> value, got {schedule!r}. For a number use "
            "schedules.constant."
        )
