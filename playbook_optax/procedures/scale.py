"""Whether one result is better than another beyond noise, on the scale of the objective's end."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study

DECADE = 10.0
"""From this quotient of the first and the best value on, values are compared by their quotients."""
ONE_SEED = 1.5
"""One run tells nothing of its noise: what is left to gain must become smaller by this factor."""
LEVEL = 0.025
"""Probability with which something that does nothing may be called better, over all compared."""
ACCURACIES = ("accuracy", "acc")
"""Last parts of the names of objectives that cannot exceed 1."""
_NEGLIGIBLE = 1e-6
"""Share of what was gained since step 0 below which values are the same to float32."""


class Result(Protocol):
    """What is compared."""

    @property
    def best_value(self) -> float:
        """The objective at the best evaluation, NaN if there is none; with seeds their mean."""

    @property
    def seed_values(self) -> tuple[float, ...]:
        """The objective of each seed at its own best evaluation."""

    @property
    def wobble(self) -> float:
        """The deviation of the evaluations around the best one, from `wobble`."""


def wobble(out: Outcomes, trial: int) -> float:
    """Deviation of a trial's evaluations near its best from a straight line, robustly.

    Args:
      out: how the trials of a study ended.
      trial: one that has a best evaluation.

    Returns:
      The deviation, in units of the objective; NaN where there are too few evaluations.
    """
    curve = out.curve[trial]
    at = int(np.flatnonzero(out.step == out.checkpoint_step[trial])[0])
    reach = max(5, len(curve) // 8)
    near = curve[max(1, at - reach) : at + reach + 1]
    near = near[np.isfinite(near)]
    return scatter(near) if len(near) >= 5 else math.nan


def scatter(values: np.ndarray) -> float:
    """Deviation of values in a row from a line through their neighbours, robustly.

    Args:
      values: finite numbers (value,).

    Returns:
      The deviation, that of normal values around a smooth curve; 0 of fewer than three.
    """
    if len(values) < 3:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6.0))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The rule by which one of several results is better than another, beyond noise.

    Attributes:
      rows: the results that are compared, what they are compared with first.
      start: the objective before the first update, NaN if it is not known.
      margin: smallest improvement, as a share of the value improved on.
      maximize: whether larger is better.
      bound: the best value that there can be, from which values are measured; 0 of most.
      resolution: what one example of the validation set makes; 0 if that is not known.
    """

    rows: tuple[Result, ...]
    start: float
    margin: float
    maximize: bool
    bound: float
    resolution: float

    def left(self, value: Any) -> np.ndarray:
        """What is left to gain, or what stands for it: smaller is better.

        Args:
          value: values of the objective.
        """
        values = np.asarray(value, np.float64)
        return self.bound - values if self.maximize else values - self.bound

    @functools.cached_property
    def gain(self) -> float:
        """What was gained since step 0 by the best of all; 0 if that is not known."""
        gains = self.left(self.start) - self.left([row.best_value for row in self.rows])
        return float(np.max(gains[np.isfinite(gains)], initial=0.0))

    @functools.cached_property
    def by_quotient(self) -> bool:
        """Whether values are positive and span a decade, so that their logarithms are compared."""
        best = self.left([row.best_value for row in self.rows])
        best = best[np.isfinite(best)]
        if not len(best) or not best.min() >= 0 or (self.maximize and not self.bound):
            return False
        start = float(self.left(self.start))
        highest = max(start, float(best.max())) if math.isfinite(start) else float(best.max())
        return bool(highest >= DECADE * max(float(best.min()), _NEGLIGIBLE * self.gain))

    def scaled(self, value: Any) -> np.ndarray:
        """Values on the scale on which they are compared: smaller is better.

        Args:
          value: values of the objective.
        """
        left = self.left(value)
        if not self.by_quotient:
            return left
        tiny = float(np.finfo(np.float64).tiny)
        return np.log(np.maximum(left, max(_NEGLIGIBLE * self.gain, tiny)))

    @functools.cached_property
    def pooled(self) -> tuple[float, int]:
        """The deviation of a single run on the scale over all rows, and its degrees of freedom."""
        return self._deviation(*self.rows)

    def _deviation(self, *rows: Result) -> tuple[float, int]:
        squares, freedom = 0.0, 0
        for row in rows:
            values = self.scaled(row.seed_values)
            values = values[np.isfinite(values)]
            if len(values) > 1:
                squares += float(((values - values.mean()) ** 2).sum())
                freedom += len(values) - 1
        return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)

    def noise(self, one: Result, other: Result) -> float:
        """By how much `one` must be better than `other`, on the scale.

        Args:
          one: the newcomer.
          other: the result held.
        """
        from scipy import stats  # slow to import

        held, quotients = abs(float(self.left(other.best_value))), self.by_quotient
        least = self.margin * held
        if quotients:
            least = -math.log1p(-min(self.margin, 0.999))
        number = min(len(one.seed_values), len(other.seed_values))
        if number > 1:
            pooled, freedom = self.pooled
            deviation = max(pooled, self._deviation(one, other)[0])
            compared = max(len(self.rows) - 1, 1)
            far = float(stats.t.isf(LEVEL / compared, max(freedom, 1)))
            return max(least, far * deviation * math.sqrt(2.0 / number))
        # That the value held is a lucky evaluation makes the gain no smaller.
        wobble = 0.0 if math.isnan(one.wobble) else one.wobble
        if quotients:
            wobble /= float(np.exp(self.scaled(one.best_value)))
            least = max(least, math.log(ONE_SEED))
        return max(least, 2 * wobble)

    def better(self, one: Result, other: Result) -> bool:
        """Whether `one` is better than `other` by more than the noise.

        Args:
          one: the newcomer.
          other: the result held.
        """
        if math.isnan(one.best_value) or math.isnan(other.best_value):
            return not math.isnan(one.best_value)
        gained = self.left(other.best_value) - self.left(one.best_value)
        # A little more, because rates are rounded to float32.
        if gained <= max(1.001 * self.resolution, _NEGLIGIBLE * self.gain):
            return False
        gained = self.scaled(other.best_value) - self.scaled(one.best_value)
        return bool(gained > self.noise(one, other))


def scale_of(rows: Sequence[Result], study: Study, margin: float) -> Scale:
    """The scale on which results are compared.

    Args:
      rows: the results, what they are compared with first.
      study: a study of the first, for the objective and its value before training.
      margin: smallest improvement, as a share of the value improved on.

    Returns:
      The Scale.
    """
    out = outcomes(study)
    first = out.curve[:, out.step == 0]
    known = [float(start) for start in first.ravel() if math.isfinite(start)]
    accuracy = study.maximize and study.objective.rpartition("/")[2].lower() in ACCURACIES
    return Scale(
        rows=tuple(rows),
        start=known[0] if known else math.nan,
        margin=margin,
        maximize=study.maximize,
        bound=1.0 if accuracy else 0.0,
        resolution=study.resolution(),
    )
