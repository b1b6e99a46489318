"""Gradient norms over training: their distribution, pooled over trials, and their course."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.outcomes import metric_names, outcomes
from playbook_optax.records.study import Study

if TYPE_CHECKING:
    import xarray

PERCENTILES = (50.0, 90.0, 99.0)
FEW = 3
"""Up to so many trials, the course of the norms is shown of all."""
NO_CLIPPING = float(np.finfo(np.float32).max)
"""The threshold that stands for none, in a table of points: no norm on record lies above it."""


@_shown.short
class NormHistogram(NamedTuple):
    """A histogram of gradient norms on logarithmic bins.

    Attributes:
      counts: (norm_bin,) updates whose gradient norm fell into each bin.
      low: (norm_bin,) lower edges.
      high: (norm_bin,) upper edges.
      percentiles: 50, 90 and 99 to the norm below which that share of the updates lies, exact to
        a bin; NaN if nothing was counted.
      trials: the trials that were pooled.
      threshold: the recorded threshold of their clippers, the median if they differ; NaN if none
        clipped, or none was recorded.
      share_clipped: share of the updates that were clipped, among the trials that have a clipper
        with a threshold; NaN likewise.
    """

    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    percentiles: dict[float, float]
    trials: tuple[int, ...]
    threshold: float = float("nan")
    share_clipped: float = float("nan")

    def percentile(self, q: float) -> float:
        """The norm below which `q` percent of the updates lie; NaN if nothing was counted.

        Args:
          q: from 0 to 100.

        Returns:
          The norm, exact to a bin.

        Raises:
          ValueError: `q` is outside [0, 100].
        """
        _checks.check_number("q", q, at_least=0.0, at_most=100.0, fix="Percentiles are 0 to 100.")
        return _percentile(q, self.counts, self.low, self.high)


def _percentile(q: float, counts: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Interpolates inside the bin, geometrically where both edges are positive and finite."""
    total = counts.sum()
    if not total:
        return float("nan")
    target = q / 100 * total
    below = np.concatenate([[0], np.cumsum(counts)])
    i = int(np.searchsorted(below[1:], target, side="left"))
    i = min(i, len(counts) - 1)
    part = (target - below[i]) / counts[i] if counts[i] else 0.0
    if not np.isfinite(high[i]):
        return float(low[i])
    if low[i] <= 0:
        return float(high[i])
    return float(low[i] * (high[i] / low[i]) ** part)


@_checks.named_arguments
def norm_histogram(study: Study, trials: Sequence[int] | None = None) -> NormHistogram:
    """Pools the gradient norms of trials, over all steps and seeds.

    Args:
      study: a study whose gradient norms were recorded.
      trials: indices of the trials to pool; all feasible ones by default.

    Returns:
      The NormHistogram.

    Raises:
      ValueError: no norms were recorded, or a trial does not exist.

    Source: "How can optimization failures be debugged and mitigated?" (gradient clipping).
    """
    data = study.data
    if "norms/counts" not in data:
        raise ValueError(
            "study has no 'norms/counts': its gradient norms were not recorded. Train it with "
            "run_study or make_train, which always record them."
        )
    counts = data["norms/counts"]
    if "seed" in counts.dims:
        counts = counts.sum("seed")
    table = counts.transpose("trial", "norm_bin").values
    chosen = np.flatnonzero(~outcomes(study).infeasible)
    if trials is not None:
        chosen = _chosen(trials, len(table))
    pooled = table[chosen.astype(int)].sum(axis=0)
    low = np.asarray(data["norm_low"].values, np.float64)
    high = np.asarray(data["norm_high"].values, np.float64)
    thresholds = _thresholds(study, chosen)
    clips = np.isfinite(thresholds)
    share = float("nan")
    if clips.any() and "norms/num_clipped" in data:
        num_clipped, num_steps = (
            int(data[name].isel(trial=chosen[clips.any(axis=1)].astype(int)).sum())
            for name in ("norms/num_clipped", "norms/num_steps")
        )
        share = num_clipped / num_steps if num_steps else share
    return NormHistogram(
        counts=pooled,
        low=low,
        high=high,
        percentiles={q: _percentile(q, pooled, low, high) for q in PERCENTILES},
        trials=tuple(int(t) for t in chosen),
        threshold=_median(thresholds),
        share_clipped=share,
    )


def _chosen(trials: Sequence[int], num_trials: int) -> np.ndarray:
    """Checked indices of trials."""
    chosen = np.asarray(trials, int).reshape(-1)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < num_trials):
        raise ValueError(
            f"trials = {list(trials)} must lie in [0, {num_trials}), the trials of the study."
        )
    return chosen


def _thresholds(study: Study, trials: np.ndarray) -> np.ndarray:
    """The thresholds that the clippers of trials ended with, (trial, seed); NaN for no clipping."""
    if "norms/threshold" not in study.data:
        return np.full((len(trials), 1), np.nan)
    values = study.data["norms/threshold"].isel(trial=trials.astype(int))
    dims = ("trial", "seed") if "seed" in values.dims else ("trial",)
    table = np.asarray(values.transpose(*dims).values, np.float64).reshape(len(trials), -1)
    return np.where(table < NO_CLIPPING, table, np.nan)


def _median(thresholds: np.ndarray) -> float:
    clipping = thresholds[np.isfinite(thresholds)]
    return float(np.median(clipping)) if len(clipping) else float("nan")


@_shown.short
class NormTrace(NamedTuple):
    """Gradient norms against the step.

    Attributes:
      step: (point,) optimizer updates.
      trials: the trials, one per curve.
      norms: (curve, point) mean unclipped gradient norm since the previous point, or of the one
        update; the mean over seeds.
      peaks: (curve, point) the largest of them, over seeds too; equal to `norms` if every step
        was recorded.
      loss: (curve, point) loss of the batches likewise; None if not recorded.
      every_step: whether every step was recorded.
      threshold: threshold that the clippers ended with; NaN if none clipped.
    """

    step: np.ndarray
    trials: tuple[int, ...]
    norms: np.ndarray
    peaks: np.ndarray
    loss: np.ndarray | None
    every_step: bool
    threshold: float


@_checks.named_arguments
def norm_trace(
    study: Union[Study, "xarray.Dataset"], trials: Sequence[int] | None = None
) -> NormTrace:
    """Reads the course of the gradient norm of chosen trials.

    Args:
      study: a study whose gradient norms were recorded, or what `Study.replay` returned.
      trials: indices of trials; by default all of them if there are up to three, else the best one.
        Not for a replay, which is of one.

    Returns:
      The NormTrace.

    Raises:
      ValueError: no norms were recorded, or a trial does not exist.

    Example:
      >>> import numpy as np, xarray
      >>> replay = xarray.Dataset({"gradient_norm": ("step", [1.0, 9.0])}, {"step": [40, 41]})
      >>> norm_trace(replay).peaks
      array([[1., 9.]])

    Source: "How can optimization failures be debugged and mitigated?" (gradient clipping).
    """
    if not isinstance(study, Study):
        return _replayed(study, trials)
    needed = ("step/gradient_norm", "step/peak_gradient_norm")
    if not set(needed) <= set(metric_names(study)):
        raise ValueError(
            "study has no 'step/gradient_norm' and 'step/peak_gradient_norm': its gradient norms "
            "were not recorded. Train it with run_study, which always records them."
        )
    few = range(study.num_trials) if study.num_trials <= FEW else [max(outcomes(study).best, 0)]
    chosen = _chosen(few if trials is None else trials, study.num_trials)
    names = [*needed, *(["step/loss"] if "step/loss" in study.data else [])]
    curves = []
    for name, pool in zip(names, ("mean", "max", "mean"), strict=False):
        array = study.data[name].isel(trial=chosen)
        if "seed" in array.dims:
            array = getattr(array, pool)("seed", skipna=False)
        curves.append(np.asarray(array.transpose("trial", "eval").values, np.float64))
    step = np.asarray(study.data["step"].values)
    return NormTrace(
        step=step,
        trials=tuple(int(t) for t in chosen),
        norms=curves[0],
        peaks=curves[1],
        loss=curves[2] if len(curves) > 2 else None,
        every_step=bool(len(step) > 1 and (np.diff(step) == 1).all()),
        threshold=_median(_thresholds(study, chosen)),
    )


def _replayed(replay: "xarray.Dataset", trials: Sequence[int] | None) -> NormTrace:
    if trials is not None:
        raise ValueError("trials must be None for a replay, which is of one trial. Leave it out.")
    if "gradient_norm" not in getattr(replay, "data_vars", {}):
        raise ValueError(
            "study must be a Study, or the Dataset of Study.replay with 'gradient_norm', got "
            f"{type(replay).__name__}."
        )
    norms = np.asarray(replay["gradient_norm"].values, np.float64)[None]
    trial = int(replay.attrs.get("trial", 0))
    loss = np.asarray(replay["loss"].values, np.float64)[None] if "loss" in replay else None
    return NormTrace(
        np.asarray(replay["step"].values), (trial,), norms, norms, loss, True, float("nan")
    )
