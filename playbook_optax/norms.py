"""Gradient clipping by the global norm, and the record of unclipped norms that it rests on.

`clip_by_global_norm` clips at a fixed norm, `clip_by_percentile` at a percentile of the recent
norms; `monitor_norms` only records. `norm_info` reads the record of any of them, and `merge` adds
up the records of several streams of gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _histogram, _shown
from playbook_optax._checks import check_number, check_steps, named_arguments
from playbook_optax._tree import (
    check_matching,
    check_params,
    owned,
    scaled_global_norm,
    unscaled_norm,
)
from playbook_optax.schedules import as_steps


class NormRecordState(NamedTuple):
    """The running record of unclipped norms; `norm_info` finds it in any optimizer state.

    The name is the key of a dict without arrays: part of the structure, not of the data, so it
    passes through scan, vmap, cond and every checkpoint format.
    """

    norm_name: dict[str, tuple[()]]
    last_norm: chex.Array  # float32, shape (): of the last step, non-finite ones included.
    max_norm: chex.Array  # float32, shape (): largest finite norm so far.
    clip_threshold: chex.Array  # float32, shape (): used last; 0 = none.
    num_norms: chex.Array  # int32, shape (): steps recorded.
    num_clipped: chex.Array  # int32, shape (): steps whose norm was finite and above the threshold.
    num_nonfinite: chex.Array  # int32, shape (): steps whose norm was NaN or infinite.
    norm_counts: chex.Array  # int32, shape (256,): log-histogram of the finite norms.


# The window of `clip_by_percentile`: the row in progress and the 7 before it, 120 norms each.
_NUM_ROWS = 8
_ROW_LENGTH = 120
_MIN_STEPS = 100


class PercentileClipState(NamedTuple):
    """The record of `clip_by_percentile` and its window of the last 841 to 960 positive norms.

    The window is the difference of two cumulative histograms: of all norms, and of those before the
    oldest row. So a step touches no row but every 120th, when the oldest is written over. The
    counts wrap around after 2**32 norms, which leaves differences right.
    """

    norm_record: NormRecordState
    next_threshold: chex.Array  # float32, shape (): for the next step; 0 = do not clip yet.
    counts_below: chex.Array  # int32, (256,): positive norms in each bin or below, of all time.
    row_starts: chex.Array  # int32, shape (8, 256): `counts_below` when each row was begun.
    row_index: chex.Array  # int32, shape (): the row in progress; the next one is the oldest.
    row_length: chex.Array  # int32, shape (): norms in the row in progress, 0 to 120.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormInfo:
    """What is known of the unclipped gradient norms of a run; leading axes are those of the state.

    Attributes:
      last_norm: float32 (...), norm at the last step; NaN or inf if that gradient was.
      max_norm: float32 (...), largest finite norm.
      threshold: float32 (...), clip threshold used last; inf where nothing is ever clipped.
      num_steps: int32 (...), steps recorded.
      num_clipped: int32 (...), steps clipped.
      num_nonfinite: int32 (...), steps whose norm was not finite; these are in no bin.
      counts: int32 (..., 256), histogram of the finite norms between `edges`.
      name: the name of the record.
    """

    last_norm: chex.Array
    max_norm: chex.Array
    threshold: chex.Array
    num_steps: chex.Array
    num_clipped: chex.Array
    num_nonfinite: chex.Array
    counts: chex.Array
    name: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return _shown.record("NormInfo", _shown.fields_of(self))

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins of `counts`: NumPy float32, shape (257,)."""
        return _histogram.edges()

    @property
    def clipped_fraction(self) -> chex.Array:
        """Share of steps that were clipped, float32 (...); 0 before the first step."""
        return self.num_clipped / jnp.maximum(self.num_steps, 1).astype(jnp.float32)

    def percentile(self, q: chex.Numeric) -> Any:
        """The q-th percentile of the finite norms, float32 (...); NaN where there were none.

        Args:
          q: scalar from 0 to 100, may be traced.

        Raises:
          ValueError: a concrete `q` is outside [0, 100].
        """
        return _histogram.percentile(self.counts, q)


def init_record(name: str, threshold: chex.Numeric = 0.0) -> NormRecordState:
    """An empty record of norms.

    Args:
      name: tells records apart in `norm_info`.
      threshold: the clip threshold from the start; 0 = none.

    Returns:
      The record, a legal scan carry.

    Raises:
      ValueError: the name is not a non-empty string.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string, got {name!r}.")

    def zero(dtype: Any) -> chex.Array:
        return jnp.zeros((), dtype)

    return NormRecordState(
        norm_name={name: ()},
        last_norm=zero(jnp.float32),
        max_norm=zero(jnp.float32),
        clip_threshold=owned(threshold, jnp.float32),
        num_norms=zero(jnp.int32),
        num_clipped=zero(jnp.int32),
        num_nonfinite=zero(jnp.int32),
        norm_counts=jnp.zeros((_histogram.NUM_BINS,), jnp.int32),
    )


def update_record(
    record: NormRecordState, norm: chex.Numeric, threshold: chex.Numeric | None = None
) -> NormRecordState:
    """Records the unclipped norm of one more step.

    Args:
      record: the record so far.
      norm: scalar, shape (), as `optax.tree.norm` or our own clipper computes it.
      threshold: what larger norms were clipped to at this step; None = nothing was clipped.

    Returns:
      The record with this step in it.

    Example:
      In a training loop of one's own:

      >>> from playbook_optax.norms import init_record, record_info, update_record
      >>> record = update_record(init_record("mine"), 3.0)
      >>> float(record_info(record).max_norm)
      3.0
    """
    if threshold is None:
        return _record_step(record, norm, 0.0, False)
    norm = jnp.asarray(norm)
    clipped = jnp.isfinite(norm) & (norm > jnp.asarray(threshold, norm.dtype))
    return _record_step(record, norm, threshold, clipped)


def _record_step(
    record: NormRecordState, norm: chex.Numeric, threshold: chex.Numeric, clipped: chex.Numeric
) -> NormRecordState:
    norm = jnp.asarray(norm)
    finite = jnp.isfinite(norm)
    # A float64 norm beyond float32 is still a finite one.
    largest = np.finfo(np.float32).max
    norm = jnp.where(finite, jnp.minimum(norm, largest), norm).astype(jnp.float32)
    return NormRecordState(
        norm_name=record.norm_name,
        last_norm=norm,
        max_norm=jnp.where(finite, jnp.maximum(record.max_norm, norm), record.max_norm),
        clip_threshold=owned(threshold, jnp.float32),
        num_norms=_histogram.saturating_add(record.num_norms, 1),
        num_clipped=_histogram.saturating_add(record.num_clipped, clipped),
        num_nonfinite=_histogram.saturating_add(record.num_nonfinite, ~finite),
        norm_counts=_histogram.add(record.norm_counts, norm),
    )


def record_info(record: NormRecordState) -> NormInfo:
    """What one record knows; leading axes are kept."""
    threshold = record.clip_threshold
    return NormInfo(
        last_norm=record.last_norm,
        max_norm=record.max_norm,
        threshold=jnp.where(threshold > 0, threshold, jnp.inf),
        num_steps=record.num_norms,
        num_clipped=record.num_clipped,
        num_nonfinite=record.num_nonfinite,
        counts=record.norm_counts,
        name=_name(record),
    )


def _name(record: NormRecordState) -> str:
    return next(iter(record.norm_name))


def records_in(tree: chex.ArrayTree) -> list[NormRecordState]:
    """The records of gradient norms in an optimizer state, in its order."""

    def is_record(node: Any) -> bool:
        return isinstance(node, NormRecordState)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_record) if is_record(node)]


@named_arguments
def norm_info(opt_state: chex.ArrayTree, name: str | None = None) -> NormInfo:
    """The record of gradient norms in an optimizer state.

    Works on any chained, masked, wrapped (`optax.MultiSteps`, `optax.apply_if_finite`) or vmapped
    state, also under `jax.jit`; the leading axes of a vmapped state are kept.

    Source: "Gradient clipping": log the unclipped norm at every step, then clip at its 90th
    percentile; if more than half of the updates are clipped, reduce the learning rate instead.

    Args:
      opt_state: a state that holds the record of `clip_by_global_norm`, `clip_by_percentile` or
        `monitor_norms`.
      name: which record, when there is more than one.

    Returns:
      A `NormInfo`.

    Raises:
      ValueError: there is no record; or there are several and `name` does not single one out.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from playbook_optax.norms import clip_by_global_norm, norm_info
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> info = norm_info(state)
      >>> float(info.last_norm), float(info.clipped_fraction), float(info.threshold)
      (5.0, 1.0, 1.0)
    """
    records = records_in(opt_state)
    if not records:
        raise ValueError(
            "opt_state holds no record of gradient norms. Put monitor_norms() first in the "
            "optax.chain (or clip_by_global_norm or clip_by_percentile, which keep one as well)."
        )
    names = [_name(record) for record in records]
    listed = ", ".join(repr(n) for n in names)
    if name is None and len(records) > 1:
        raise ValueError(
            f"opt_state holds {len(records)} records of gradient norms: {listed}. Pass name= with "
            "one of them (and give name= to the transformations if two are the same)."
        )
    found = [r for r, n in zip(records, names, strict=True) if name in (None, n)]
    if len(found) != 1:
        raise ValueError(
            f"name = {name!r} is the name of {len(found)} records of gradient norms in opt_state; "
            f"they are: {listed}. Give each transformation its own name=."
        )
    return record_info(found[0])


def _check_updates(updates: chex.ArrayTree, params: chex.ArrayTree | None) -> None:
    check_params(updates, what="gradients")
    if params is not None:
        check_matching(updates, params, what="params")


@named_arguments
def monitor_norms(name: str = "monitor_norms") -> optax.GradientTransformationExtraArgs:
    """Passes updates through unchanged and records their global norm.

    Put it first in a chain to see the gradients as they come. The record is a legal scan carry from
    the start, unlike that of `optax.monitor`.

    Source: "Gradient clipping".

    Args:
      name: tells this record from others in the same state.

    Returns:
      A transformation whose state is a norm record; read it with `norm_info`.

    Raises:
      ValueError: the name is not a non-empty string; a leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.norms import monitor_norms, norm_info
      >>> tx = monitor_norms()
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist(), float(norm_info(state).last_norm)
      ([3.0, 4.0], 5.0)
    """
    init_record(name)

    def init(params: chex.ArrayTree) -> NormRecordState:
        check_params(params)
        return init_record(name)

    def update(
        updates: chex.ArrayTree,
        state: NormRecordState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[Any, NormRecordState]:
        del extra_args
        _check_updates(updates, params)
        return updates, update_record(state, unscaled_norm(*scaled_global_norm(updates)))

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(
    updates: chex.ArrayTree, threshold: chex.Numeric, active: chex.Numeric = True
) -> tuple[Any, chex.Array, chex.Array]:
    """The clipped updates, their unclipped norm, and whether it was finite and too large."""
    scaled, scale = scaled_global_norm(updates)
    norm = unscaled_norm(scaled, scale)
    threshold = jnp.asarray(threshold, norm.dtype)
    clip = active & jnp.isfinite(norm) & (norm > threshold)
    # Scaled first and divided after: threshold / norm alone may be too small for float32.
    first = jnp.where(clip, scale, 1)
    second = jnp.where(clip, threshold / scaled, 1)

    def leaf(update: chex.Array) -> chex.Array:
        wide = jnp.asarray(update, norm.dtype)
        return (wide * first * second).astype(jnp.result_type(update))

    return jax.tree.map(leaf, updates), norm, clip


@named_arguments
def clip_by_global_norm(
    max_norm: chex.Numeric, name: str = "clip_by_global_norm"
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the whole gradient down to norm `max_norm` when it is larger.

    If :math:`\|g\| > \lambda` then :math:`g' = \lambda \, g / \|g\|`, else :math:`g' = g`, with the
    norm over all leaves together. A gradient that is not finite passes unchanged, so that it can be
    seen, and is counted in the record.

    Differs from `optax.clip_by_global_norm`: the norm is computed in float32 or better and cannot
    overflow (a finite gradient of 1e30 is clipped there to zero, here to `max_norm`); bfloat16 and
    float16 gradients keep their dtype when `max_norm` is traced; ``max_norm <= 0`` is an error; the
    state records the unclipped norms. `clip_by_percentile` finds the threshold by itself.

    Source: "Gradient clipping".

    Args:
      max_norm: the threshold, a positive number or a traced scalar.
      name: tells this record from others in the same state.

    Returns:
      A transformation whose state is a norm record; read it with `norm_info`.

    Raises:
      ValueError: a concrete `max_norm` is not a positive finite number; the name is not a non-empty
        string; a leaf is not a floating-point array, or a gradient's shape is not its parameter's.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.norms import clip_by_global_norm
      >>> tx = clip_by_global_norm(1.0)
      >>> updates, state = tx.update(jnp.array([0.0, 1e30]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [0.0, 1.0]
    """
    return _clipper(max_norm, name, lambda step: True)


@named_arguments
def clip_until(
    max_norm: chex.Numeric, num_steps: chex.Numeric, name: str = "clip_until"
) -> optax.GradientTransformationExtraArgs:
    """Clips the first `num_steps` updates as `clip_by_global_norm` does, and none after that.

    Clipping during warm-up is this with ``num_steps=warmup_steps``. The norms of all steps are
    recorded.

    Source: "Gradient clipping" (an open question of the playbook: clipping during warm-up).

    Args:
      max_norm: the threshold, a positive number or a traced scalar.
      num_steps: how many updates to clip, a number or a traced scalar.
      name: tells this record from others in the same state.

    Returns:
      A transformation whose state is a norm record; read it with `norm_info`.

    Raises:
      ValueError: a concrete `max_norm` that is not positive and finite, or `num_steps` that is no
        number of steps; the name is not a non-empty string; a leaf is not a floating-point array,
        or a gradient's shape is not its parameter's.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.norms import clip_until
      >>> tx = clip_until(1.0, 1)
      >>> state = tx.init(jnp.zeros(1))
      >>> first, state = tx.update(jnp.array([5.0]), state)
      >>> second, state = tx.update(jnp.array([5.0]), state)
      >>> first.tolist(), second.tolist(), int(state.num_clipped)
      ([1.0], [5.0], 1)
    """
    check_steps("num_steps", num_steps)
    return _clipper(max_norm, name, lambda step: step < as_steps(num_steps))


def _clipper(
    max_norm: chex.Numeric, name: str, active: Callable[[chex.Array], chex.Numeric]
) -> optax.GradientTransformationExtraArgs:
    """Clips at `max_norm` in the steps in which it is active, and records the norm of all."""
    check_number(
        "max_norm",
        max_norm,
        above=0.0,
        fix="The 90th percentile of the norms that monitor_norms() records is a good start.",
    )
    init_record(name)

    def init(params: chex.ArrayTree) -> NormRecordState:
        check_params(params)
        return init_record(name, max_norm)

    def update(
        updates: chex.ArrayTree,
        state: NormRecordState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[Any, NormRecordState]:
        del extra_args
        _check_updates(updates, params)
        clipped, norm, clip = _clip(updates, max_norm, active(state.num_norms))
        return clipped, _record_step(state, norm, max_norm, clip)

    return optax.GradientTransformationExtraArgs(init, update)


@named_arguments
def clip_by_percentile(
    percentile: chex.Numeric = 90.0,
    *,
    min_steps: chex.Numeric = _MIN_STEPS,
    name: str = "clip_by_percentile",
) -> optax.GradientTransformationExtraArgs:
    """Scales the whole gradient down to a percentile of its recent norms when it is larger.

    The playbook takes the 90th percentile of the norms of a whole run as the threshold of the next
    run; this takes that of the last 841 to 960 steps at every step, so that it follows norms that
    change, and forgets completely: a norm older than 960 recorded steps has no influence.

    A gradient of zeros, as sparse updates and frozen phases have them, says nothing of the size of
    the others: it is recorded and stays out of the window, and so does what is not finite.

    The norms are the unclipped ones. The threshold of a step comes from earlier steps alone, so a
    step is clipped exactly as by `clip_by_global_norm` with a number known before it, and a spike
    cannot raise its own threshold. What is not finite passes unchanged.

    Accuracy. On lognormal norms (sigma 0.8, 1,000 seeds) the threshold is within 15% of the true
    50th, 75th and 90th percentile in at least 99.9% of runs, and again 1,000 steps after the norms
    have grown or shrunk tenfold; its median is there after 640 to 870 steps
    (``benchmarks/percentiles.py``). The exact percentile of 128 norms would follow in 90 to 120
    steps, but is within 15% in only 77% to 92% of runs. The window is a histogram with four bins to
    an octave, log-linear inside a bin, so where all norms are nearly equal the threshold may be off
    by a bin, a factor of 2**0.25. Norms are told apart from 9e-13 to 1.7e7, and it stays inside.

    Nothing is clipped before `min_steps` norms have been seen: few norms say little of a high
    percentile, and a threshold that is too low slows training unseen. After 100 norms the 90th is
    within 15% in 77% of runs, and within a third in 97% (after 50: 61% and 89%).

    Source: "Gradient clipping" (the text leaves an adaptive strategy as an open question).

    Args:
      percentile: above 0, at most 100; may be traced.
      min_steps: how many positive finite norms must have been recorded before anything is clipped,
        at least 1; may be traced.
      name: tells this record from others in the same state.

    Returns:
      A transformation whose state is a `PercentileClipState`, 10 KB; read it with `norm_info`.

    Raises:
      ValueError: a concrete `percentile` is outside (0, 100], or `min_steps` is no whole number of
        at least 1; the name is not a non-empty string; a leaf is not a floating-point array, or a
        gradient's shape is not its parameter's.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.norms import clip_by_percentile, norm_info
      >>> tx = clip_by_percentile(50.0, min_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 1.0, 8.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> round(float(updates[0]), 3), int(norm_info(state).num_clipped)
      (1.091, 1)
    """
    check_number(
        "percentile", percentile, above=0.0, at_most=100.0, fix="90.0 is the playbook's choice."
    )
    check_steps("min_steps", min_steps, at_least=1, fix=f"{_MIN_STEPS} is the default.")
    init_record(name)

    def init(params: chex.ArrayTree) -> PercentileClipState:
        check_params(params)
        return PercentileClipState(
            norm_record=init_record(name),
            next_threshold=jnp.zeros((), jnp.float32),
            counts_below=jnp.zeros((_histogram.NUM_BINS,), jnp.int32),
            row_starts=jnp.zeros((_NUM_ROWS, _histogram.NUM_BINS), jnp.int32),
            row_index=jnp.zeros((), jnp.int32),
            row_length=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: chex.ArrayTree,
        state: PercentileClipState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[Any, PercentileClipState]:
        del extra_args
        _check_updates(updates, params)
        threshold = state.next_threshold
        clipped, norm, clip = _clip(updates, threshold, active=threshold > 0)
        record = _record_step(state.norm_record, norm, threshold, clip)
        positive = jnp.isfinite(norm) & (norm > 0)
        # The row is written before the window is read, and the threshold kept for the next step:
        # the other way round, XLA copies all rows at every step.
        begin = positive & (state.row_length == _ROW_LENGTH)
        index = jnp.where(begin, _next_row(state.row_index), state.row_index)
        starts = state.row_starts.at[jnp.where(begin, index, _NUM_ROWS)].set(
            state.counts_below, mode="drop"
        )
        below = _histogram.add_below(
            state.counts_below, jnp.where(positive, record.last_norm, jnp.inf)
        )
        window = below - starts.at[_next_row(index)].get(mode="promise_in_bounds")
        # All counts together, and once it was enough it stays so: they wrap around.
        enough = (threshold > 0) | (below[-1] >= jnp.maximum(as_steps(min_steps), 1))
        return clipped, PercentileClipState(
            norm_record=record,
            next_threshold=jnp.where(
                enough, _histogram.percentile_of_below(window, percentile), 0.0
            ),
            counts_below=below,
            row_starts=starts,
            row_index=index,
            row_length=jnp.where(begin, 0, state.row_length) + positive.astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _next_row(index: chex.Array) -> chex.Array:
    return jnp.where(index == _NUM_ROWS - 1, 0, index + 1)


def _oldest_last(state: PercentileClipState) -> chex.Array:
    """`row_starts` in the order of age, the row in progress first: int32, shape (..., 8, 256)."""
    shape = (*state.row_starts.shape[:-1], 1)
    age = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    order = (state.row_index[..., None, None] - age) % _NUM_ROWS
    return jnp.take_along_axis(state.row_starts, order, axis=-2)


@named_arguments
def merge(
    first: NormRecordState | PercentileClipState, second: NormRecordState | PercentileClipState
) -> Any:
    """One record, or percentile clipper's state, of the norms of two streams of gradients.

    For streams that ran side by side: replicas, hosts, or the trials of a vmapped state taken
    apart. Counts are added, bin by bin and row by row of equal age, so the window of the result
    holds both windows; of two last norms and thresholds the larger is kept (NaN if one is), and the
    threshold is computed anew at the next update. Associative and commutative; an empty state
    changes nothing but the order in which rows are stored. Streams with equally many finite norms
    forget exactly as one does; else the result takes the longer row in progress, and the age at
    which a norm is forgotten is off by less than a row of 120.

    Args:
      first: a state; leading axes, as of a vmapped state, are kept.
      second: a state of the same kind, name and leading axes.

    Returns:
      A state of the same kind, to be read, stored or trained on.

    Raises:
      ValueError: the states are of different kinds, or of different names.

    Example:
      >>> from playbook_optax.norms import init_record, merge, record_info, update_record
      >>> a, b = (update_record(init_record("gradient"), norm) for norm in (1.0, 3.0))
      >>> info = record_info(merge(a, b))
      >>> int(info.num_steps), float(info.max_norm)
      (2, 3.0)
    """
    if isinstance(first, NormRecordState) and isinstance(second, NormRecordState):
        return _merge_records(first, second)
    if not (isinstance(first, PercentileClipState) and isinstance(second, PercentileClipState)):
        raise ValueError(
            "merge needs two NormRecordState or two PercentileClipState, got "
            f"{type(first).__name__} and {type(second).__name__}. Take them out of the optimizer "
            "state first."
        )
    # Row k of the result, counted from its row in progress at 0, is k rows old.
    by_age = _oldest_last(first) + _oldest_last(second)
    return PercentileClipState(
        norm_record=_merge_records(first.norm_record, second.norm_record),
        next_threshold=jnp.maximum(first.next_threshold, second.next_threshold),
        counts_below=first.counts_below + second.counts_below,
        row_starts=jnp.take(by_age, -np.arange(_NUM_ROWS) % _NUM_ROWS, axis=-2),
        row_index=jnp.zeros_like(first.row_index),
        row_length=jnp.maximum(first.row_length, second.row_length),
    )


def _merge_records(first: NormRecordState, second: NormRecordState) -> NormRecordState:
    if _name(first) != _name(second):
        raise ValueError(
            f"merge needs records of one name, got {_name(first)!r} and {_name(second)!r}."
        )
    return NormRecordState(
        norm_name=first.norm_name,
        last_norm=jnp.maximum(first.last_norm, second.last_norm),
        max_norm=jnp.maximum(first.max_norm, second.max_norm),
        clip_threshold=jnp.maximum(first.clip_threshold, second.clip_threshold),
        num_norms=_histogram.saturating_add(first.num_norms, second.num_norms),
        num_clipped=_histogram.saturating_add(first.num_clipped, second.num_clipped),
        num_nonfinite=_histogram.saturating_add(first.num_nonfinite, second.num_nonfinite),
        norm_counts=_histogram.saturating_add(first.norm_counts, second.norm_counts),
    )
