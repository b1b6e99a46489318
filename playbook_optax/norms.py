"""Gradient clipping by the global norm, and the record of unclipped norms that it rests on."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _histogram
from playbook_optax._checks import check_number, named_arguments
from playbook_optax._tree import (
    check_matching,
    check_params,
    scaled_global_norm,
    unscaled_norm,
)


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
        clip_threshold=jnp.asarray(threshold, jnp.float32),
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
    norm = jnp.asarray(norm)
    finite = jnp.isfinite(norm)
    # A float64 norm beyond float32 is still a finite one.
    largest = np.finfo(np.float32).max
    norm = jnp.where(finite, jnp.minimum(norm, largest), norm).astype(jnp.float32)
    limit = jnp.zeros((), jnp.float32) if threshold is None else threshold
    clipped = False if threshold is None else finite & (norm > jnp.asarray(limit, jnp.float32))
    return NormRecordState(
        norm_name=record.norm_name,
        last_norm=norm,
        max_norm=jnp.where(finite, jnp.maximum(record.max_norm, norm), record.max_norm),
        clip_threshold=jnp.asarray(limit, jnp.float32),
        num_norms=record.num_norms + 1,
        num_clipped=record.num_clipped + jnp.asarray(clipped, jnp.int32),
        num_nonfinite=record.num_nonfinite + (~finite).astype(jnp.int32),
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


def _is_record(node: Any) -> bool:
    return isinstance(node, NormRecordState)


@named_arguments
def norm_info(opt_state: chex.ArrayTree, name: str | None = None) -> NormInfo:
    """The record of gradient norms in an optimizer state.

    Works on any chained, masked, wrapped (`optax.MultiSteps`, `optax.apply_if_finite`) or vmapped
    state, also under `jax.jit`; the leading axes of a vmapped state are kept.

    Source: "Gradient clipping": log the unclipped norm at every step, then clip at its 90th
    percentile; if more than half of the updates are clipped, reduce the learning rate instead.

    Args:
      opt_state: a state that holds the record of `clip_by_global_norm` or `monitor_norms`.
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
    records = [r for r in jax.tree.leaves(opt_state, is_leaf=_is_record) if _is_record(r)]
    if not records:
        raise ValueError(
            "opt_state holds no record of gradient norms. Put monitor_norms() first in the "
            "optax.chain (or clip_by_global_norm(max_norm), which keeps one as well)."
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
    state records the unclipped norms.

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
        scaled, scale = scaled_global_norm(updates)
        norm = unscaled_norm(scaled, scale)
        clip = jnp.isfinite(norm) & (norm > jnp.asarray(max_norm, norm.dtype))
        # Scaled first and divided after: max_norm / norm alone may be too small for float32.
        first = jnp.where(clip, scale, 1)
        second = jnp.where(clip, jnp.asarray(max_norm, norm.dtype) / scaled, 1)

        def leaf(update: chex.Array) -> chex.Array:
            wide = jnp.asarray(update, norm.dtype)
            return (wide * first * second).astype(jnp.result_type(update))

        return jax.tree.map(leaf, updates), update_record(state, norm, max_norm)

    return optax.GradientTransformationExtraArgs(init, update)
