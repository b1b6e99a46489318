"""The distribution of gradient norms over training, pooled over trials."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records.study import Study

PERCENTILES = (50.0, 90.0, 99.0)


class NormHistogram(NamedTuple):
    """A histogram of gradient norms on logarithmic bins.

    Attributes:
      counts: (norm_bin,) updates whose gradient norm fell into each bin.
      low: (norm_bin,) lower edges.
      high: (norm_bin,) upper edges.
      percentiles: 50, 90 and 99 to the norm below which that share of the updates lies, exact to
        a bin; NaN if nothing was counted.
      trials: the trials that were pooled.
    """

    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    percentiles: dict[float, float]
    trials: tuple[int, ...]

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
    chosen = np.flatnonzero(~outcomes(study).infeasible) if trials is None else np.asarray(trials)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(table)):
        raise ValueError(
            f"trials = {list(trials or [])} must lie in [0, {len(table)}), the trials of the study."
        )
    pooled = table[chosen.astype(int)].sum(axis=0)
    low = np.asarray(data["norm_low"].values, np.float64)
    high = np.asarray(data["norm_high"].values, np.float64)
    return NormHistogram(
        counts=pooled,
        low=low,
        high=high,
        percentiles={q: _percentile(q, pooled, low, high) for q in PERCENTILES},
        trials=tuple(int(t) for t in chosen),
    )
