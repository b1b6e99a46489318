"""What a finished trial gives back, from its last state: inside a program or on the host."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks, _feasibility, norms
from playbook_optax.trials.stepper import PEAK_LOSS, STEP_LOSS, TrialState
from playbook_optax.trials.workload import Workload


class TrialResult(NamedTuple):
    """What a finished trial gives back. Under vmap every array has a leading axis of trials.

    Attributes:
      metrics: by name, float arrays (eval,), NaN after `infeasible_step`. Beside those of the
        workload, over the steps since the previous evaluation: ``step/loss`` and
        ``step/gradient_norm``, means; ``step/peak_gradient_norm``, the largest; ``step/peak_loss``,
        the largest of the loss smoothed over about ten steps, which begins at step 0 with the loss
        of the first batch.
      step: number of updates done before each evaluation, int32 (eval,).
      best_value: retrospective best of the objective, float scalar, NaN if never finite.
      best_step: its step, int32 scalar, -1 if never finite. Between equal values the loss of the
        same examples decides, then that of training, where `evaluate` gives them, then the latest.
      infeasible: bool scalar.
      infeasible_step: 0-based update whose loss or result was first bad, int32 scalar, -1 if none;
        for a high loss, the last update before the first evaluation that was high.
      infeasible_reason: int8 scalar, an index into ``pbx.INFEASIBLE_REASONS``.
      norms: `NormInfo` of the gradient before any clipping; threshold and number of clipped steps
        are those of the clipper in the optimizer's state, if there is one.
      params: the weights that `keep` asked for, or None.
      model_state: the model state that belongs to them, or None.
    """

    metrics: dict[str, chex.Array]
    step: chex.Array
    best_value: chex.Array
    best_step: chex.Array
    infeasible: chex.Array
    infeasible_step: chex.Array
    infeasible_reason: chex.Array
    norms: norms.NormInfo
    params: Any
    model_state: Any


def result(work: Workload, state: TrialState, eval_steps: np.ndarray, keep: str) -> TrialResult:
    """The result of a trial, or of many with leading axes.

    Args:
      work: the workload, for the names of its metrics.
      state: the last state; NumPy arrays are judged on the host.
      eval_steps: updates done before each evaluation, int32 (eval,).
      keep: which weights to give back.

    Returns:
      The result, of the kind of arrays that the state has.
    """
    xp: Any = np if isinstance(state.first_loss, (np.ndarray, np.generic)) else jnp
    metrics = {name: curve[..., : len(eval_steps)] for name, curve in state.metrics.items()}
    # Before any update the smoothed loss is that of the first batch, known only now.
    first = xp.where(xp.isfinite(state.first_loss), state.first_loss, xp.float32(np.nan))
    metrics[PEAK_LOSS] = _with_first(xp, metrics[PEAK_LOSS], first)
    high, first_high = _judge(xp, work, metrics, state.first_loss, eval_steps)
    broke = state.infeasible_step >= 0
    before_high = xp.asarray(eval_steps)[xp.maximum(first_high, 0)] - 1
    nonfinite = xp.where(
        xp.isfinite(state.last_loss), _feasibility.NONFINITE_PARAMS, _feasibility.NONFINITE_LOSS
    )
    best_step = state.best.best_step
    params, model_state = None, None
    if keep == "best":
        params, model_state = state.best_params
    elif keep == "final":
        params, model_state = state.params, state.model_state
    return TrialResult(
        metrics=metrics,
        step=xp.asarray(eval_steps),
        best_value=xp.where(best_step >= 0, state.best.best_value, xp.float32(np.nan)),
        best_step=best_step,
        infeasible=broke | high,
        infeasible_step=xp.where(
            broke, state.infeasible_step, xp.where(high, before_high, xp.int32(-1))
        ).astype(np.int32),
        infeasible_reason=xp.where(
            broke, nonfinite, xp.where(high, _feasibility.HIGH_LOSS, 0)
        ).astype(np.int8),
        norms=_norm_info(xp, state),
        params=params,
        model_state=model_state,
    )


def _with_first(xp: Any, curve: chex.Array, first: chex.Array) -> chex.Array:
    """A curve (..., eval) with another first value, (...)."""
    return xp.concatenate([first[..., None].astype(curve.dtype), curve[..., 1:]], axis=-1)


def _norm_info(xp: Any, state: TrialState) -> norms.NormInfo:
    """The norms of the gradient; threshold and count of the clipper in the optimizer's state."""
    # A monitor among them never clips: its threshold is infinite and its count 0.
    records = [state.norms, *norms.records_in(state.opt_state)]
    thresholds = [
        xp.where(one.clip_threshold > 0, one.clip_threshold, xp.float32(np.inf)) for one in records
    ]
    own = state.norms
    return norms.NormInfo(
        last_norm=own.last_norm,
        max_norm=own.max_norm,
        threshold=functools.reduce(xp.minimum, thresholds),
        num_steps=own.num_norms,
        num_clipped=functools.reduce(xp.maximum, [one.num_clipped for one in records]),
        num_nonfinite=own.num_nonfinite,
        counts=own.norm_counts,
        name="gradient",
    )


def _judge(
    xp: Any,
    work: Workload,
    metrics: dict[str, chex.Array],
    first_loss: chex.Array,
    eval_steps: np.ndarray,
) -> tuple[chex.Array, chex.Array]:
    """Whether the trial's own loss is uncharacteristically high, and from which evaluation on."""
    name = work.training_loss or ("train/loss" if "train/loss" in metrics else STEP_LOSS)
    if name not in metrics:
        raise ValueError(
            f"training_loss {name!r} is not among the metrics: {_checks.nearest(name, metrics)}"
        )
    curve = metrics[name]
    window_means = metrics[STEP_LOSS]
    # The first loss of a batch, and the peaks which begin with it, are as noisy as batches are.
    deviation = _batch_deviation(xp, window_means[..., 1:], eval_steps)
    relative_noise = xp.float32(_feasibility.BATCH_DEVIATIONS) * deviation
    # Of the size of the first losses: a single one may be small by chance, but not by any factor; a
    # loss that exploded before the second evaluation is no measure of noise.
    first = xp.abs(first_loss)
    largest = xp.float32(_feasibility.LARGEST_LUCK) * first
    with np.errstate(all="ignore"):
        batch_noise = relative_noise * xp.fmax(
            first, xp.fmin(xp.abs(window_means[..., 1]), largest)
        )
        margin, noise = _feasibility.EVALUATION_MARGIN, xp.zeros_like(batch_noise)
        if name == STEP_LOSS:
            curve = _with_first(xp, curve, first_loss)
            margin, noise = _feasibility.BATCH_MARGIN, batch_noise
        # Peaks are in units of the training loss, the curve perhaps in others (a sum, a penalty).
        # Where they decide, the trial ended about where it began, so its last mean loss converts
        # them.
        indices = xp.arange(window_means.shape[-1], dtype=np.int32)
        last = xp.max(xp.where(xp.isfinite(window_means), indices, 0), axis=-1, keepdims=True)
        reference = xp.take_along_axis(window_means, last, axis=-1)
        unit = xp.maximum(xp.abs(reference), np.finfo(np.float32).tiny)
        # At step 0 nothing has risen yet.
        nothing = xp.full(first_loss.shape, np.nan, np.float32)
        rise = (_with_first(xp, metrics[PEAK_LOSS], nothing) - reference) / unit
        scale = xp.abs(curve[..., :1])
        peaks = curve[..., :1] + rise.astype(curve.dtype) * scale
        in_units = (batch_noise[..., None] / unit).astype(curve.dtype) * scale
        peak_noise = xp.maximum(noise[..., None], in_units)
        return _feasibility.high_loss(
            curve, peaks, margin=margin, noise=noise[..., None], peak_noise=peak_noise
        )


def _batch_deviation(xp: Any, means: chex.Array, eval_steps: np.ndarray) -> chex.Array:
    """The relative standard deviation of a batch's loss, from how means of many jump to and fro.

    It is relative because a loss that explodes would be taken for noise of its own size.
    """
    if means.shape[-1] < 3:
        return xp.zeros(means.shape[:-1], np.float32)
    left, middle, right = means[..., :-2], means[..., 1:-1], means[..., 2:]
    with np.errstate(all="ignore"):
        jumps = xp.abs(right - 2 * middle + left)
        sizes = (xp.abs(right) + xp.abs(middle) + xp.abs(left)) / 3
        relative = jumps / xp.maximum(sizes, np.finfo(np.float32).tiny)
        # 0.6745: median of a normal's absolute value; 6: variance of the weights 1, -2, 1.
        factor = float(np.diff(eval_steps).max()) ** 0.5 / (0.6745 * 6**0.5)
        deviation = _median(xp, relative) * xp.float32(factor)
        return xp.where(xp.isfinite(deviation), deviation, xp.float32(0)).astype(np.float32)


def _median(xp: Any, values: chex.Array) -> chex.Array:
    """The median over the last axis of what is not NaN; NaN where all is."""
    ordered = xp.sort(values, axis=-1)  # NaN comes last.
    count = xp.sum(~xp.isnan(values), axis=-1, keepdims=True)
    low = xp.take_along_axis(ordered, xp.maximum((count - 1) // 2, 0), axis=-1)
    high = xp.take_along_axis(ordered, xp.maximum(count // 2, 0), axis=-1)
    return ((low + high) / 2)[..., 0]
