"""Reducers: a whole curve in a few numbers, inside the program that trains.

Stacking every scalar of every step costs memory in proportion to the steps; a reducer carries a
few numbers instead. Each is four pure functions:

* ``init() -> state``: nothing seen yet; a NamedTuple of fixed dtypes, so a legal scan carry.
* ``update(state, value, step) -> state``: one more value, seen at `step` (int32).
* ``merge(a, b) -> state``: what `a` saw, then what `b` saw; associative, and ``init()`` changes
  nothing. `update` is `merge` with a state that saw one value.
* ``compute(state) -> result``.

Values are kept in float32. Under `jax.vmap` a state has the leading axes of the trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _histogram
from playbook_optax._checks import check_number, named_arguments, nearest

__all__ = [
    "Best",
    "BestState",
    "FirstStepState",
    "LastState",
    "LogHistogram",
    "LogHistogramState",
    "MaximumRiseState",
    "MaximumState",
    "MeanState",
    "Reducer",
    "best",
    "combine",
    "first_nonfinite_step",
    "last",
    "log_histogram",
    "maximum",
    "maximum_rise",
    "mean",
    "steps_to_target",
]


def __dir__() -> list[str]:
    return sorted(__all__)


class Reducer(NamedTuple):
    """Four pure functions; see the module's text for what they promise."""

    init: Callable[[], Any]
    update: Callable[[Any, Any, Any], Any]
    merge: Callable[[Any, Any], Any]
    compute: Callable[[Any], Any]


class BestState(NamedTuple):
    """State of `best`."""

    best_value: chex.Array  # float32, shape ().
    best_step: chex.Array  # int32, shape (): -1 = no finite value seen.


class Best(NamedTuple):
    """Result of `best`: the value and the first step that reached it."""

    value: chex.Array
    step: chex.Array


class LastState(NamedTuple):
    """State of `last`."""

    last_value: chex.Array  # float32, shape ().
    last_step: chex.Array  # int32, shape (): -1 = nothing seen.


class MeanState(NamedTuple):
    """State of `mean`."""

    mean_count: chex.Array  # int32, shape ().
    mean_total: chex.Array  # float32, shape ().
    mean_lost: chex.Array  # float32, shape (): what rounding took from the total.


class MaximumState(NamedTuple):
    """State of `maximum`."""

    maximum_value: chex.Array  # float32, shape ().
    maximum_count: chex.Array  # int32, shape (): finite values seen.


class MaximumRiseState(NamedTuple):
    """State of `maximum_rise`."""

    rise_lowest: chex.Array  # float32, shape ().
    rise_highest: chex.Array  # float32, shape ().
    rise_largest: chex.Array  # float32, shape ().
    rise_count: chex.Array  # int32, shape (): finite values seen.


class FirstStepState(NamedTuple):
    """State of `first_nonfinite_step` and of `steps_to_target`."""

    first_step: chex.Array  # int32, shape (): -1 = it has not happened.


class LogHistogramState(NamedTuple):
    """State of `log_histogram`."""

    bin_counts: chex.Array  # int32, shape (256,).
    nonfinite_count: chex.Array  # int32, shape ().


class LogHistogram(NamedTuple):
    """Result of `log_histogram`."""

    counts: chex.Array  # int32, shape (..., 256).
    num_nonfinite: chex.Array  # int32, shape (...): values in no bin.

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins: NumPy float32, shape (257,)."""
        return _histogram.edges()

    def percentile(self, q: chex.Numeric) -> Any:
        """The q-th percentile, 0 to 100 (may be traced), of what was counted; NaN if nothing was.

        Raises:
          ValueError: a concrete `q` is outside [0, 100].
        """
        return _histogram.percentile(self.counts, q)


def _reducer(
    init: Callable[[], Any],
    lift: Callable[[chex.Array, chex.Array], Any],
    merge: Callable[[Any, Any], Any],
    compute: Callable[[Any], Any],
) -> Reducer:
    """A reducer from the state of one value and the merge of two states."""

    def update(state: Any, value: Any, step: Any) -> Any:
        for name, given in (("value", value), ("step", step)):
            if jnp.shape(given) != ():
                raise ValueError(
                    f"{name} of a reducer's update must be a scalar, got shape "
                    f"{jnp.shape(given)}. Use jax.vmap over init and update, or reduce it first."
                )
        return merge(state, lift(jnp.asarray(value, jnp.float32), jnp.asarray(step, jnp.int32)))

    return Reducer(init, update, merge, compute)


def _zero() -> chex.Array:
    return jnp.zeros((), jnp.float32)


def _count(count: int) -> chex.Array:
    return jnp.asarray(count, jnp.int32)


def _or_nan(seen: chex.Array, value: chex.Array) -> chex.Array:
    # Empty states hold 0, not NaN, so that a state is finite from the start; results say NaN.
    with jax.debug_nans(False):
        return jnp.where(seen, value, jnp.nan)


@named_arguments
def best(maximize: bool = False) -> Reducer:
    """The best finite value and the first step that reached it: retrospective selection.

    NaN and infinities of either sign are never selected, wherever they occur; ties go to the
    earliest step.

    Source: "Determining the number of steps for each training run" (retrospective checkpoint
    selection).

    Args:
      maximize: whether larger is better.

    Returns:
      A `Reducer`; `compute` gives `Best(value, step)`, NaN and -1 when no finite value was seen.

    Example:
      In a scan of one's own, vmapped over trials:

      >>> import jax, jax.numpy as jnp
      >>> from playbook_optax import reducers
      >>> lowest = reducers.best()
      >>> def run(curve):
      ...     def body(state, at):
      ...         return lowest.update(state, curve[at], at), None
      ...     state, _ = jax.lax.scan(body, lowest.init(), jnp.arange(4))
      ...     return lowest.compute(state)
      >>> curves = jnp.array([[jnp.nan, 3.0, 1.0, 1.0], [2.0, -jnp.inf, 4.0, 5.0]])
      >>> result = jax.vmap(run)(curves)
      >>> result.value.tolist(), result.step.tolist()
      ([1.0, 2.0], [2, 0])
    """

    def lift(value: chex.Array, step: chex.Array) -> BestState:
        finite = jnp.isfinite(value)
        return BestState(jnp.where(finite, value, 0.0), jnp.where(finite, step, -1))

    def merge(a: BestState, b: BestState) -> BestState:
        better = b.best_value > a.best_value if maximize else b.best_value < a.best_value
        take = (b.best_step >= 0) & ((a.best_step < 0) | better)
        return BestState(*(jnp.where(take, y, x) for x, y in zip(a, b, strict=True)))

    return _reducer(
        lambda: BestState(_zero(), _count(-1)),
        lift,
        merge,
        lambda state: Best(_or_nan(state.best_step >= 0, state.best_value), state.best_step),
    )


def last() -> Reducer:
    """The last value, whatever it is; NaN when nothing was seen.

    Example:
      >>> from playbook_optax import reducers
      >>> final = reducers.last()
      >>> float(final.compute(final.update(final.init(), 0.5, 0)))
      0.5
    """

    def merge(a: LastState, b: LastState) -> LastState:
        return LastState(*(jnp.where(b.last_step >= 0, y, x) for x, y in zip(a, b, strict=True)))

    return _reducer(
        lambda: LastState(_zero(), _count(-1)),
        LastState,
        merge,
        lambda state: _or_nan(state.last_step >= 0, state.last_value),
    )


def mean() -> Reducer:
    """The mean of all values; NaN when nothing was seen.

    The sum carries its own rounding errors (Knuth's two-sum), so that a million values are averaged
    as well as two. A value that is not finite makes the mean not finite.

    Example:
      >>> from playbook_optax import reducers
      >>> average = reducers.mean()
      >>> state = average.update(average.update(average.init(), 1.0, 0), 2.0, 1)
      >>> float(average.compute(state))
      1.5
    """

    def merge(a: MeanState, b: MeanState) -> MeanState:
        total = a.mean_total + b.mean_total
        from_b = total - a.mean_total
        lost = (a.mean_total - (total - from_b)) + (b.mean_total - from_b)
        return MeanState(a.mean_count + b.mean_count, total, lost + (a.mean_lost + b.mean_lost))

    def compute(state: MeanState) -> chex.Array:
        total = state.mean_total
        exact = jnp.where(jnp.isfinite(total), total + state.mean_lost, total)
        return _or_nan(
            state.mean_count > 0, exact / jnp.maximum(state.mean_count, 1).astype(exact.dtype)
        )

    return _reducer(
        lambda: MeanState(_count(0), _zero(), _zero()),
        lambda value, step: MeanState(_count(1), value, _zero()),
        merge,
        compute,
    )


def maximum() -> Reducer:
    """The largest finite value; NaN when no finite value was seen.

    Example:
      >>> from playbook_optax import reducers
      >>> highest = reducers.maximum()
      >>> state = highest.update(highest.update(highest.init(), -3.0, 0), float("inf"), 1)
      >>> float(highest.compute(state))
      -3.0
    """

    def lift(value: chex.Array, step: chex.Array) -> MaximumState:
        finite = jnp.isfinite(value)
        return MaximumState(jnp.where(finite, value, 0.0), finite.astype(jnp.int32))

    def merge(a: MaximumState, b: MaximumState) -> MaximumState:
        return MaximumState(
            _pick(jnp.maximum, a.maximum_value, a.maximum_count, b.maximum_value, b.maximum_count),
            a.maximum_count + b.maximum_count,
        )

    return _reducer(
        lambda: MaximumState(_zero(), _count(0)),
        lift,
        merge,
        lambda state: _or_nan(state.maximum_count > 0, state.maximum_value),
    )


def _pick(
    choose: Callable[..., chex.Array], a: chex.Array, num_a: Any, b: chex.Array, num_b: Any
) -> chex.Array:
    """`choose(a, b)`, or the one of the two that has seen something."""
    return jnp.where(num_b == 0, a, jnp.where(num_a == 0, b, choose(a, b)))


def maximum_rise() -> Reducer:
    """The largest rise of the value above the lowest one before it; NaN if no finite value came.

    0 for a curve that never rises; values that are not finite are left out. For a training loss
    this is the size of its worst instability.

    Source: "How can optimization failures be debugged and mitigated?".

    Example:
      >>> from playbook_optax import reducers
      >>> rise = reducers.maximum_rise()
      >>> state = rise.init()
      >>> for step, loss in enumerate([2.0, 1.0, 4.0, 0.5, 1.5]):
      ...     state = rise.update(state, loss, step)
      >>> float(rise.compute(state))
      3.0
    """

    def lift(value: chex.Array, step: chex.Array) -> MaximumRiseState:
        finite = jnp.isfinite(value)
        value = jnp.where(finite, value, 0.0)
        return MaximumRiseState(value, value, _zero(), finite.astype(jnp.int32))

    def merge(a: MaximumRiseState, b: MaximumRiseState) -> MaximumRiseState:
        both = (a.rise_count > 0) & (b.rise_count > 0)
        across = jnp.where(both, b.rise_highest - a.rise_lowest, 0.0)
        return MaximumRiseState(
            _pick(jnp.minimum, a.rise_lowest, a.rise_count, b.rise_lowest, b.rise_count),
            _pick(jnp.maximum, a.rise_highest, a.rise_count, b.rise_highest, b.rise_count),
            jnp.maximum(jnp.maximum(a.rise_largest, b.rise_largest), across),
            a.rise_count + b.rise_count,
        )

    return _reducer(
        lambda: MaximumRiseState(_zero(), _zero(), _zero(), _count(0)),
        lift,
        merge,
        lambda state: _or_nan(state.rise_count > 0, state.rise_largest),
    )


def _first_step(happens: Callable[[chex.Array], chex.Array]) -> Reducer:
    return _reducer(
        lambda: FirstStepState(_count(-1)),
        lambda value, step: FirstStepState(jnp.where(happens(value), step, -1)),
        lambda a, b: FirstStepState(jnp.where(a.first_step >= 0, a.first_step, b.first_step)),
        lambda state: state.first_step,
    )


def first_nonfinite_step() -> Reducer:
    """The first step whose value was NaN or infinite (int32); -1 if there was none.

    Example:
      >>> from playbook_optax import reducers
      >>> bad = reducers.first_nonfinite_step()
      >>> int(bad.compute(bad.update(bad.init(), float("nan"), 7)))
      7
    """
    return _first_step(lambda value: ~jnp.isfinite(value))


@named_arguments
def steps_to_target(target: chex.Numeric, maximize: bool = False) -> Reducer:
    """The first step whose value is as good as the target (int32); -1 if there was none.

    Values that are not finite never reach it.

    Args:
      target: a number or a traced scalar; reached by values <= it (>= it when maximizing).
      maximize: whether larger is better.

    Returns:
      A `Reducer`; `compute` gives the step.

    Raises:
      ValueError: a concrete target is not a finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from playbook_optax import reducers
      >>> def steps(target):
      ...     reached = reducers.steps_to_target(target)
      ...     state = reached.init()
      ...     for step, error in enumerate([0.9, 0.4, 0.2]):
      ...         state = reached.update(state, error, 100 * step)
      ...     return reached.compute(state)
      >>> jax.vmap(steps)(jnp.array([0.5, 0.2, 0.1])).tolist()
      [100, 200, -1]
    """
    check_number("target", target)
    goal = jnp.asarray(target, jnp.float32)

    def reached(value: chex.Array) -> chex.Array:
        return jnp.isfinite(value) & (value >= goal if maximize else value <= goal)

    return _first_step(reached)


def log_histogram() -> Reducer:
    """The distribution of the values on 256 logarithmic bins, four to an octave.

    The bins reach from 2**-40 to 2**24; smaller and negative values go to the first, larger ones to
    the last, values that are not finite are counted apart.

    Source: "Gradient clipping" (the histogram of gradient norms over all steps).

    Returns:
      A `Reducer`; `compute` gives a `LogHistogram` with `counts`, `num_nonfinite`, `edges` and
      `percentile(q)`.

    Example:
      >>> from playbook_optax import reducers
      >>> histogram = reducers.log_histogram()
      >>> state = histogram.init()
      >>> for step, norm in enumerate([1.0, 1.1, 64.0, float("nan")]):
      ...     state = histogram.update(state, norm, step)
      >>> result = histogram.compute(state)
      >>> int(result.counts.sum()), int(result.num_nonfinite), 64 < result.percentile(90) < 77
      (3, 1, Array(True, dtype=bool))
    """

    def empty() -> LogHistogramState:
        return LogHistogramState(jnp.zeros((_histogram.NUM_BINS,), jnp.int32), _count(0))

    def lift(value: chex.Array, step: chex.Array) -> LogHistogramState:
        return LogHistogramState(
            _histogram.add(empty().bin_counts, value), (~jnp.isfinite(value)).astype(jnp.int32)
        )

    return _reducer(
        empty,
        lift,
        lambda a, b: LogHistogramState(*(x + y for x, y in zip(a, b, strict=True))),
        lambda state: LogHistogram(state.bin_counts, state.nonfinite_count),
    )


def combine(reducers: Mapping[str, Reducer]) -> Reducer:
    """One reducer over a dict of metrics, from one reducer for each name.

    Args:
      reducers: name of a metric to its reducer. `update` takes a dict of scalars that has at least
        these names; state and result are dicts with exactly these.

    Returns:
      A `Reducer`.

    Raises:
      ValueError: a metric is missing in `update`; the nearest name is given.

    Example:
      >>> from playbook_optax import reducers
      >>> both = reducers.combine({"loss": reducers.mean(), "error": reducers.best()})
      >>> state = both.update(both.init(), {"loss": 2.0, "error": 0.25}, 0)
      >>> float(both.compute(state)["error"].value)
      0.25
    """
    reducers = dict(reducers)

    def update(state: Any, value: Mapping[str, Any], step: Any) -> dict[str, Any]:
        for name in reducers:
            if name not in value:
                raise ValueError(f"The values have no metric {name!r}: {nearest(name, value)}")
        return {n: r.update(state[n], value[n], step) for n, r in reducers.items()}

    return Reducer(
        init=lambda: {n: r.init() for n, r in reducers.items()},
        update=update,
        merge=lambda a, b: {n: r.merge(a[n], b[n]) for n, r in reducers.items()},
        compute=lambda state: {n: r.compute(state[n]) for n, r in reducers.items()},
    )
