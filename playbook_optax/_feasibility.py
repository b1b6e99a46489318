"""When a trial counts as infeasible: one rule for our engine, the user's loop and foreign tables.

A trial is infeasible when its loss or parameters stop being finite, or when its loss is
uncharacteristically high *for itself*: measured on digits, learning rates above 3 ended at losses
of 2.4 to 161 without a single NaN. Trials are never compared with each other here.

Source: playbook, "How can optimization failures be debugged and mitigated?"
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

#: What the int8 `infeasible_reason` of a compiled trial stands for.
REASONS = ("", "nonfinite_loss", "nonfinite_params", "high_loss")
NONFINITE_LOSS, NONFINITE_PARAMS, HIGH_LOSS = 1, 2, 3

# A trial "ended above" its first loss by more than this share of it: enough for the noise of an
# evaluation on a fixed set. Losses of single batches are noisier, hence the second margin.
EVALUATION_MARGIN = 0.01
BATCH_MARGIN = 0.25
# What the loss of the first batch may be off by, in standard deviations of a batch.
BATCH_DEVIATIONS = 8.0
# No first batch's loss is by chance this many times smaller than the mean of those after it.
LARGEST_LUCK = 1e4
# "Rose well above": by more than the first loss itself. "Clearly below": by a tenth of it.
RISE = 1.0
RECOVERY = 0.1


def high_loss(
    curve: chex.Array,
    peak: chex.Array | None = None,
    *,
    margin: float = EVALUATION_MARGIN,
    noise: chex.Numeric = 0.0,
    peak_noise: chex.Numeric = 0.0,
) -> tuple[Any, Any]:
    """Whether a finite loss curve is uncharacteristically high, judged by its own first value.

    It is when the curve ends above its first value, or when it rose well above it and never came
    back clearly below. A trial that merely makes no progress is not. A non-finite value decides
    nothing: the curve is judged by its finite part, and divergence is another reason.

    Args:
      curve: losses at the evaluations, shape (..., eval); the first is from before any update.
      peak: the largest loss seen between the previous evaluation and each one, shape (..., eval),
        where single steps were watched; the curve itself otherwise.
      margin: share of the first loss that the last one may lie above it.
      noise: what a loss of the curve may lie above the first one by chance, a number or shape
        (..., 1).
      peak_noise: the same of a peak.

    Returns:
      Two arrays of shape (...): whether the trial is high, and the index of the first evaluation
      that was (-1 if it is not). NumPy arrays for NumPy input, JAX arrays otherwise.
    """
    xp: Any = jnp if isinstance(curve, jax.Array) or isinstance(peak, jax.Array) else np
    curve = xp.asarray(curve)
    # A sum beyond the largest number is infinite, and compares as it should.
    with np.errstate(over="ignore", invalid="ignore"):
        return _high_loss(curve, peak, margin, noise, peak_noise, xp)


def _high_loss(
    curve: Any, peak: Any, margin: float, noise: Any, peak_noise: Any, xp: Any
) -> tuple[Any, Any]:
    finite = xp.isfinite(curve)
    first = curve[..., :1]
    scale = xp.abs(first)
    highest = curve if peak is None else xp.fmax(curve, peak)
    risen = highest - first > xp.maximum(RISE * scale, peak_noise)
    rose = risen & (highest > first) & ~xp.isnan(highest)
    above = finite & (curve > first + xp.maximum(margin * scale, noise))
    num_evals = curve.shape[-1]
    index = xp.arange(num_evals)
    index = xp.reshape(index, (1,) * (curve.ndim - 1) + (num_evals,))
    index = xp.broadcast_to(index, curve.shape)
    last = xp.max(xp.where(finite, index, -1), axis=-1, keepdims=True)
    ended_above = xp.any(above & (index == last), axis=-1)
    first_rise = xp.min(xp.where(rose, index, num_evals), axis=-1, keepdims=True)
    # The evaluation that closes the interval of the rise may itself be back below.
    below = finite & (curve < first - RECOVERY * scale) & (index >= first_rise)
    stayed_up = xp.any(rose, axis=-1) & ~xp.any(below, axis=-1)
    judged = xp.isfinite(first[..., 0])
    high = judged & (ended_above | stayed_up)
    first_high = xp.min(xp.where(rose | above, index, num_evals), axis=-1)
    return high, xp.where(high, first_high, -1)
