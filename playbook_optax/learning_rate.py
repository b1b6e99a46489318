"""The learning rate as the last link of a chain, and warm-up as a transformation of its own."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from playbook_optax._checks import check_number, check_steps, named_arguments
from playbook_optax._tree import check_matching, check_params, moment_dtype
from playbook_optax.schedules import as_steps, as_value


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    step: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.
    learning_rate: chex.Array  # float32, shape (): used by the last update (before it: the first).


class ScaleByWarmupState(NamedTuple):
    """State of `scale_by_warmup`; the name keeps it apart from `step` in the same chain."""

    warmup_step: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.


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
        return ScaleByLearningRateState(step, rate_at(step).astype(jnp.float32))

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
            optax.safe_increment(state.step), rate.astype(jnp.float32)
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
