"""The playbook's update rules, exactly, as Optax transformations whose every number may be traced.

Accuracy. The moving averages of Adam, NAdam and RMSProp are kept in float32 or better, and are
moved by ``1 - b`` times the distance to the new value, with ``1 - b`` computed once, in float64 for
a Python number. Rounding b itself to float32 and subtracting would change ``1 - 0.99999`` by 0.3%.
The bias corrections ``1 - b**t`` come from the same ``1 - b`` by `expm1` and `log1p`.

Dtypes. Moments of bfloat16 and float16 leaves are float32; updates have the dtype of the gradients.
The sum ``params + update`` is rounded by its own dtype, though: a bfloat16 weight of 1.0 does not
move at all for an update smaller than 0.002. Keep float32 parameters and cast inside the
model, or keep the rate large enough.

Leaves. Every leaf must be floating-point: mask the others with `optax.masked`. The learning rate
state that `scale_by_learning_rate` keeps shows the `step` and the `learning_rate` last used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from playbook_optax._checks import check_eps, check_number, named_arguments
from playbook_optax._tree import cast_like, check_matching, check_params, moment_dtype
from playbook_optax.learning_rate import scale_by_learning_rate

Mask = Any | Callable[[Any], Any]


class MomentumState(NamedTuple):
    """State of `scale_by_momentum` and `scale_by_nesterov`."""

    trace: chex.ArrayTree  # v: shapes of the parameters, float32 or better; starts at 0.


class RmspropState(NamedTuple):
    """State of `scale_by_rmsprop`."""

    mean_square: chex.ArrayTree  # v: shapes of the parameters, float32 or better; starts at 1.


class AdamState(NamedTuple):
    """State of `scale_by_adam` and `scale_by_nadam`."""

    count: chex.Array  # int32, shape (): updates done so far; stops at 2**31 - 1.
    mu: chex.ArrayTree  # m: shapes of the parameters, float32 or better; starts at 0.
    nu: chex.ArrayTree  # v: shapes of the parameters, float32 or better; starts at 0.


def _in_moment_dtypes(
    *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Chains `transforms` in float32 or better, so that a low precision rounds only the result."""
    inner = optax.chain(*transforms) if len(transforms) > 1 else transforms[0]

    def init(params: chex.ArrayTree) -> Any:
        check_params(params)
        return inner.init(params)

    def update(
        updates: chex.ArrayTree, state: Any, params: chex.ArrayTree | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        check_params(updates, what="gradients")
        if params is not None:
            check_matching(updates, params, what="params")
        wide = jax.tree.map(lambda u: jnp.asarray(u, moment_dtype(jnp.result_type(u))), updates)
        wide, state = inner.update(wide, state, params)
        return cast_like(wide, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _full_like(params: chex.ArrayTree, value: float) -> Any:
    return jax.tree.map(
        lambda p: jnp.full_like(p, value, dtype=moment_dtype(jnp.result_type(p))), params
    )


def _check_fraction(name: str, value: Any) -> None:
    check_number(name, value, at_least=0.0, below=1.0, fix="1 would never forget the first value.")


def _check_eps_for(eps: Any, params: chex.ArrayTree) -> None:
    for dtype in {moment_dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)}:
        check_eps("eps", eps, dtype)


def _as_scalar(value: Any, dtype: Any) -> chex.Array:
    """A hyperparameter in the dtype of the moments."""
    return jnp.asarray(value, dtype)


def _complement(decay: Any, dtype: Any) -> chex.Array:
    """1 - decay: from float64 for a Python number, exact for an array >= 0.5 in float32."""
    if isinstance(decay, jax.Array):
        decay = decay.astype(moment_dtype(decay.dtype))
    return jnp.asarray(1.0 - decay, dtype)


def _average(old: chex.Array, new: chex.Array, decay: Any) -> chex.Array:
    """The mean of `old` and `new` with weights decay and 1 - decay, in the dtype of `old`."""
    new = new.astype(old.dtype)
    kept, rate = _as_scalar(decay, old.dtype), _complement(decay, old.dtype)
    # Stepping towards `new` would absorb a small `new` into the rounding of a large `old` when
    # most of `old` is to be forgotten; the plain sum would accumulate errors when little is.
    return jnp.where(kept < 0.5, kept * old + rate * new, old + rate * (new - old))


def _one_minus_power(decay: Any, count: chex.Array, dtype: Any) -> chex.Array:
    """1 - decay**count without cancellation; count >= 1."""
    return -jnp.expm1(count.astype(dtype) * jnp.log1p(-_complement(decay, dtype)))


def _scale_by_trace(momentum: Any, *, look_ahead: bool) -> optax.GradientTransformationExtraArgs:
    _check_fraction("momentum", momentum)

    def init(params: chex.ArrayTree) -> MomentumState:
        return MomentumState(_full_like(params, 0.0))

    def update(
        updates: chex.ArrayTree, state: MomentumState, params: chex.ArrayTree | None = None
    ) -> tuple[Any, MomentumState]:
        del params
        check_matching(updates, state.trace, what="the optimizer state")

        def accumulate(u: chex.Array, v: chex.Array) -> chex.Array:
            return u.astype(v.dtype) + _as_scalar(momentum, v.dtype) * v

        trace = jax.tree.map(accumulate, updates, state.trace)
        out = jax.tree.map(accumulate, updates, trace) if look_ahead else trace
        return out, MomentumState(trace)

    return _in_moment_dtypes(optax.GradientTransformation(init, update))


def _scale_by_adam(
    b1: Any, b2: Any, eps: Any, *, look_ahead: bool
) -> optax.GradientTransformationExtraArgs:
    _check_fraction("b1", b1)
    _check_fraction("b2", b2)
    check_eps("eps", eps, jnp.float64)

    def init(params: chex.ArrayTree) -> AdamState:
        _check_eps_for(eps, params)
        return AdamState(jnp.zeros((), jnp.int32), _full_like(params, 0.0), _full_like(params, 0.0))

    def update(
        updates: chex.ArrayTree, state: AdamState, params: chex.ArrayTree | None = None
    ) -> tuple[Any, AdamState]:
        del params
        check_matching(updates, state.mu, what="the optimizer state")
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: _average(m, g, b1), updates, state.mu)
        nu = jax.tree.map(lambda g, v: _average(v, jnp.square(g), b2), updates, state.nu)
        # One factor for all leaves of a dtype: traced once, so that many leaves stay cheap.
        factors = {
            dtype: jnp.sqrt(_one_minus_power(b2, count, dtype)) / _one_minus_power(b1, count, dtype)
            for dtype in {leaf.dtype for leaf in jax.tree.leaves(nu)}
        }

        def direction(g: chex.Array, m: chex.Array, v: chex.Array) -> chex.Array:
            first = _average(m, g, b1) if look_ahead else m
            return first / (jnp.sqrt(v) + _as_scalar(eps, v.dtype)) * factors[v.dtype]

        return jax.tree.map(direction, updates, mu, nu), AdamState(count, mu, nu)

    return _in_moment_dtypes(optax.GradientTransformation(init, update))


def _add_decayed_weights(weight_decay: Any, mask: Mask | None) -> optax.GradientTransformation:
    check_number("weight_decay", weight_decay, at_least=0.0, fix="Use 0 for none.")

    def update(
        updates: chex.ArrayTree, state: optax.EmptyState, params: chex.ArrayTree | None = None
    ) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "Weight decay needs the parameters: call update(gradients, state, params)."
            )
        decayed = jax.tree.map(
            lambda u, p: u + _as_scalar(weight_decay, u.dtype) * jnp.asarray(p, u.dtype),
            updates,
            params,
        )
        return decayed, state

    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return plain if mask is None else optax.masked(plain, mask)


@named_arguments
def scale_by_momentum(momentum: Any = 0.9) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients g by their accumulation v, where v <- momentum * v + g.

    Equals `optax.trace(decay=momentum)`, except that the accumulator of low-precision leaves is
    float32.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      momentum: in [0, 1); may be traced.

    Returns:
      A transformation without a learning rate: chain `scale_by_learning_rate` after it.

    Raises:
      ValueError: `momentum` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import scale_by_momentum
      >>> tx = scale_by_momentum(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> _, state = tx.update(jnp.ones(()), state)
      >>> update, state = tx.update(jnp.ones(()), state)
      >>> float(update)
      1.5
    """
    return _scale_by_trace(momentum, look_ahead=False)


@named_arguments
def scale_by_nesterov(momentum: Any = 0.9) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients g by momentum * v + g, where v <- momentum * v + g came first.

    Equals `optax.trace(decay=momentum, nesterov=True)`, except that the accumulator of
    low-precision leaves is float32.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      momentum: in [0, 1); may be traced.

    Returns:
      A transformation without a learning rate: chain `scale_by_learning_rate` after it.

    Raises:
      ValueError: `momentum` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import scale_by_nesterov
      >>> tx = scale_by_nesterov(0.5)
      >>> update, state = tx.update(jnp.ones(()), tx.init(jnp.zeros(())))
      >>> float(update)
      1.5
    """
    return _scale_by_trace(momentum, look_ahead=True)


@named_arguments
def scale_by_rmsprop(decay: Any = 0.9, eps: Any = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divides gradients g by sqrt(v + eps), where v <- decay * v + (1 - decay) * g**2 from v = 1.

    RMSProp multiplies by the learning rate before its momentum accumulates. A form without the
    learning rate therefore ends before both, and `rmsprop` is this, then `scale_by_learning_rate`,
    then `scale_by_momentum`, in that order.

    Differs from `optax.scale_by_rms` in the initial v = 1, which is `initial_scale=1.` there.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      decay: in [0, 1).
      eps: added inside the root, > 0. Both may be traced.

    Returns:
      A transformation without a learning rate.

    Raises:
      ValueError: `decay` is outside [0, 1), or `eps` is not positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import scale_by_rmsprop
      >>> tx = scale_by_rmsprop(decay=0.75)
      >>> update, state = tx.update(jnp.full((), 7.0), tx.init(jnp.zeros(())))
      >>> float(state.mean_square), round(float(update), 4)
      (13.0, 1.9415)
    """
    _check_fraction("decay", decay)
    check_eps("eps", eps, jnp.float64)

    def init(params: chex.ArrayTree) -> RmspropState:
        _check_eps_for(eps, params)
        return RmspropState(_full_like(params, 1.0))

    def update(
        updates: chex.ArrayTree, state: RmspropState, params: chex.ArrayTree | None = None
    ) -> tuple[Any, RmspropState]:
        del params
        check_matching(updates, state.mean_square, what="the optimizer state")
        mean_square = jax.tree.map(
            lambda g, v: _average(v, jnp.square(g), decay), updates, state.mean_square
        )
        out = jax.tree.map(
            lambda g, v: g / jnp.sqrt(v + _as_scalar(eps, v.dtype)), updates, mean_square
        )
        return out, RmspropState(mean_square)

    return _in_moment_dtypes(optax.GradientTransformation(init, update))


@named_arguments
def scale_by_adam(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, without the learning rate.

    With g the gradient of update number t = 0, 1, ...::

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g**2
        direction = m / (sqrt(v) + eps) * sqrt(1 - b2**(t+1)) / (1 - b1**(t+1))

    Differs from `optax.scale_by_adam` in where eps stands: here it is added before the bias
    correction, there after it. They agree as eps -> 0; for a gradient that is small beside eps the
    first step here is smaller by up to sqrt(1 - b2), about 30 times at b2 = 0.999.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0. All may be traced.

    Returns:
      A transformation without a learning rate: chain `scale_by_learning_rate` after it.

    Raises:
      ValueError: `b1` or `b2` is outside [0, 1), or `eps` is not positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import scale_by_adam
      >>> tx = scale_by_adam()
      >>> update, state = tx.update(jnp.full((), -3.0), tx.init(jnp.zeros(())))
      >>> round(float(update), 5), int(state.count)
      (-1.0, 1)
    """
    return _scale_by_adam(b1, b2, eps, look_ahead=False)


@named_arguments
def scale_by_nadam(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """NAdam's direction, without the learning rate.

    As `scale_by_adam`, with ``b1 m + (1 - b1) g`` (m after its update) in place of m.

    Differs from `optax.scale_by_adam(nesterov=True)` in where eps stands and in the bias
    correction: here one factor corrects both terms, there each has its own exponent, which is 22%
    of the first update at b1 = 0.9.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0. All may be traced.

    Returns:
      A transformation without a learning rate: chain `scale_by_learning_rate` after it.

    Raises:
      ValueError: `b1` or `b2` is outside [0, 1), or `eps` is not positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import scale_by_nadam
      >>> tx = scale_by_nadam(b1=0.5)
      >>> update, state = tx.update(jnp.full((), -3.0), tx.init(jnp.zeros(())))
      >>> round(float(update), 5)
      -1.5
    """
    return _scale_by_adam(b1, b2, eps, look_ahead=True)


@named_arguments
def sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent: params <- params - learning_rate * g.

    Equals `optax.sgd(learning_rate)`.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.

    Returns:
      A transformation whose state is that of `scale_by_learning_rate`.

    Raises:
      ValueError: the learning rate is negative; a leaf is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import sgd
      >>> tx = sgd(0.5)
      >>> update, state = tx.update(jnp.full((), 3.0), tx.init(jnp.zeros(())))
      >>> float(update)
      -1.5
    """
    return _in_moment_dtypes(scale_by_learning_rate(learning_rate))


@named_arguments
def momentum(
    learning_rate: optax.ScalarOrSchedule, momentum: Any = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum: v <- momentum * v + g; params <- params - learning_rate * v.

    Equals `optax.sgd(learning_rate, momentum)`.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      momentum: in [0, 1); may be traced.

    Returns:
      A transformation.

    Raises:
      ValueError: the learning rate is negative, or `momentum` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> import playbook_optax.optimizers as optimizers
      >>> tx = optimizers.momentum(1.0, momentum=0.5)
      >>> _, state = tx.update(jnp.ones(()), tx.init(jnp.zeros(())))
      >>> update, state = tx.update(jnp.ones(()), state)
      >>> float(update)
      -1.5
    """
    return _in_moment_dtypes(scale_by_momentum(momentum), scale_by_learning_rate(learning_rate))


@named_arguments
def nesterov(
    learning_rate: optax.ScalarOrSchedule, momentum: Any = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum: v <- momentum * v + g; params <- params - learning_rate (momentum v + g).

    Equals `optax.sgd(learning_rate, momentum, nesterov=True)`.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      momentum: in [0, 1); may be traced.

    Returns:
      A transformation.

    Raises:
      ValueError: the learning rate is negative, or `momentum` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import nesterov
      >>> tx = nesterov(1.0, momentum=0.5)
      >>> update, state = tx.update(jnp.ones(()), tx.init(jnp.zeros(())))
      >>> float(update)
      -1.5
    """
    return _in_moment_dtypes(scale_by_nesterov(momentum), scale_by_learning_rate(learning_rate))


@named_arguments
def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: Any = 0.9,
    momentum: Any = 0.0,
    eps: Any = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp, with v from 1, eps inside the root and the learning rate inside the momentum.

    With g the gradient::

        v <- decay v + (1 - decay) g**2
        m <- momentum m + learning_rate / sqrt(v + eps) * g
        params <- params - m

    Under a schedule each step's contribution keeps, inside m, the rate it was made with.

    Equals `optax.rmsprop(learning_rate, decay, eps, initial_scale=1., momentum=momentum)` only for
    a constant learning rate. Optax starts v at 0 by default, and applies a schedule outside the
    momentum.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      decay: of the mean square, in [0, 1).
      momentum: in [0, 1).
      eps: > 0. All may be traced.

    Returns:
      A transformation.

    Raises:
      ValueError: the learning rate is negative, `decay` or `momentum` is outside [0, 1), or `eps`
        is not positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import rmsprop
      >>> tx = rmsprop(0.1, decay=0.75)
      >>> update, state = tx.update(jnp.full((), 7.0), tx.init(jnp.zeros(())))
      >>> round(float(update), 5)
      -0.19415
    """
    return _in_moment_dtypes(
        scale_by_rmsprop(decay, eps),
        scale_by_learning_rate(learning_rate),
        scale_by_momentum(momentum),
    )


@named_arguments
def adam(
    learning_rate: optax.ScalarOrSchedule, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam, with eps before the bias correction.

    With g the gradient of update number t = 0, 1, ...::

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g**2
        params <- params - learning_rate * m / (sqrt(v) + eps)
                           * sqrt(1 - b2**(t+1)) / (1 - b1**(t+1))

    Differs from `optax.adam` in where eps stands: here it is added before the bias correction,
    there after it. They agree as eps -> 0. At eps = 1e-3 the first step of a coordinate with a
    small gradient differs 30 times.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0. All may be traced.

    Returns:
      A transformation.

    Raises:
      ValueError: the learning rate is negative, `b1` or `b2` is outside [0, 1), or `eps` is not
        positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import adam
      >>> tx = adam(0.1)
      >>> update, state = tx.update(jnp.full((), -3.0), tx.init(jnp.zeros(())))
      >>> round(float(update), 5)
      0.1
    """
    return _in_moment_dtypes(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


@named_arguments
def nadam(
    learning_rate: optax.ScalarOrSchedule, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """NAdam: Adam with b1 m + (1 - b1) g (m after its update) in place of m.

    Differs from `optax.nadam` in where eps stands (before the bias correction) and in the bias
    correction: one factor corrects both terms, where Optax gives each its own exponent. The first
    updates differ by 22% at b1 = 0.9 even for eps = 0.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0. All may be traced.

    Returns:
      A transformation.

    Raises:
      ValueError: the learning rate is negative, `b1` or `b2` is outside [0, 1), or `eps` is not
        positive in the moments' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import nadam
      >>> tx = nadam(0.1, b1=0.5)
      >>> update, state = tx.update(jnp.full((), -3.0), tx.init(jnp.zeros(())))
      >>> round(float(update), 5)
      0.15
    """
    return _in_moment_dtypes(scale_by_nadam(b1, b2, eps), scale_by_learning_rate(learning_rate))


@named_arguments
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay: params shrink by learning_rate * weight_decay per step.

    The gradient of the decay does not enter the moments. Differs from `optax.adamw` as `adam`
    differs from `optax.adam`; the decay is the same.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"; the decay as in Loshchilov and Hutter, arXiv 1711.05101.

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0.
      weight_decay: >= 0, multiplied by the learning rate. All these may be traced.
      mask: which leaves decay: a pytree of booleans (a prefix of the parameters' tree), or a
        function from parameters to one, as for `optax.masked`; None decays all.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: an argument is out of range as in `adam`, or `weight_decay` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import adamw
      >>> tx, params = adamw(0.1, weight_decay=0.5), jnp.full((), 2.0)
      >>> update, state = tx.update(jnp.zeros(()), tx.init(params), params)
      >>> round(float(update), 5)
      -0.1
    """
    return _in_moment_dtypes(
        scale_by_adam(b1, b2, eps),
        _add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@named_arguments
def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NAdam with decoupled weight decay: params shrink by learning_rate * weight_decay per step.

    Differs from `optax.nadamw` as `nadam` differs from `optax.nadam`; the decay is the same.

    Source: Deep Learning Tuning Playbook, "What are the update rules for all the popular
    optimization algorithms?"; the decay as in Loshchilov and Hutter, arXiv 1711.05101.

    Args:
      learning_rate: a number >= 0, a traced scalar or a schedule ``count -> value``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0.
      weight_decay: >= 0, multiplied by the learning rate. All these may be traced.
      mask: which leaves decay: a pytree of booleans (a prefix of the parameters' tree), or a
        function from parameters to one, as for `optax.masked`; None decays all.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: an argument is out of range as in `nadam`, or `weight_decay` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from playbook_optax.optimizers import nadamw
      >>> tx, params = nadamw(0.1, weight_decay=0.5), jnp.full((), 2.0)
      >>> update, state = tx.update(jnp.zeros(()), tx.init(params), params)
      >>> round(float(update), 5)
      -0.1
    """
    return _in_moment_dtypes(
        scale_by_nadam(b1, b2, eps),
        _add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
