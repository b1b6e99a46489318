"""What every rule starts from: how each trial ended, as host arrays in float64.

With seeds, a trial's curve is the mean over its seeds, and a trial with an infeasible seed is
infeasible. Numbers that are not finite are never selected. Ties go to the lower loss, see
`_ties.tie_breakers`, and then to the lowest trial.
"""

from typing import NamedTuple

import numpy as np

from playbook_optax import _checks
from playbook_optax._direction import direction
from playbook_optax._ties import best_evaluation, best_first, settled_first, tie_breakers
from playbook_optax.records.study import Study


class Outcomes(NamedTuple):
    """How the trials of a study ended, for one objective.

    Attributes:
      objective: name of the metric.
      maximize: whether larger is better.
      step: (eval,) optimizer updates made before each evaluation.
      curve: (trial, eval) the objective, mean over seeds; NaN where not finite or not evaluated.
      value: (trial,) best over training; NaN for an infeasible trial, or without a finite value.
      best_step: (trial,) step of that value, of several the one with the lowest loss (see
        `_ties.tie_breakers`), then the earliest: what was needed; -1 where there is none.
      checkpoint_step: (trial,) likewise but then the latest: what to keep.
      infeasible: (trial,) whether any seed was infeasible.
      reason: (trial,) why, of its first infeasible seed; "" if feasible.
      order: (usable,) indices of the trials that have a value, best first.
      settled: (usable,) likewise, but what lies within the resolution of the best is a tie, see
        `_ties.settled_first`.
      ties: (tie breaker, trial) the metrics that decide between equals, at the checkpoint.
      resolution: what one example changes the objective by; 0 where that is not known.
    """

    objective: str
    maximize: bool
    step: np.ndarray
    curve: np.ndarray
    value: np.ndarray
    best_step: np.ndarray
    checkpoint_step: np.ndarray
    infeasible: np.ndarray
    reason: np.ndarray
    order: np.ndarray
    settled: np.ndarray
    ties: np.ndarray
    resolution: float

    @property
    def num_trials(self) -> int:
        """Number of trials, infeasible ones included."""
        return len(self.value)

    @property
    def best(self) -> int:
        """Index of the best trial, or -1 if no trial has a value."""
        return int(self.order[0]) if len(self.order) else -1

    @property
    def usable(self) -> np.ndarray:
        """(trial,) whether the trial has a value."""
        return np.isfinite(self.value)

    @property
    def loss(self) -> np.ndarray:
        """(trial,) the value with its sign such that smaller is better."""
        return -self.value if self.maximize else self.value

    def good(self) -> np.ndarray:
        """The good trials: the best tenth of the usable ones, at least three, at most ten.

        Returns:
          Their indices, best first; all of them if there are fewer than three.
        """
        num = len(self.settled)
        return self.settled[: min(num, 10, max(3, -(-num // 10)))]


def mean_curve(study: Study, name: str) -> np.ndarray:
    """One metric as a float64 array (trial, eval), the mean over seeds, NaN where not finite.

    Args:
      study: the study.
      name: a recorded metric.

    Returns:
      The curves, infeasible trials included.

    Raises:
      ValueError: there is no such metric.
    """
    known = metric_names(study)
    if name not in known:
        raise ValueError(f"objective = {name!r} was not recorded: {_checks.nearest(name, known)}")
    array = study.data[name]
    curve = array.transpose("trial", ..., "eval").values.astype(np.float64)
    curve = np.where(np.isfinite(curve), curve, np.nan)
    if "seed" not in array.dims:
        return curve
    with np.errstate(over="ignore", invalid="ignore"):  # A sum that no float holds.
        mean = curve.mean(axis=1)
    return np.where(np.isfinite(mean), mean, np.nan)


def metric_names(study: Study) -> list[str]:
    """Names of the recorded metrics.

    Args:
      study: the study.

    Returns:
      The names, in the order in which they were recorded.
    """
    return [str(n) for n, v in study.data.data_vars.items() if {"trial", "eval"} <= set(v.dims)]


def outcomes(study: Study, objective: str | None = None, maximize: bool | None = None) -> Outcomes:
    """Summarizes how each trial of a study ended.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better. By default the study's own direction for its own
        objective, and smaller is better for any other, unless its name says that it should rise.

    Returns:
      The Outcomes.

    Raises:
      ValueError: no such metric, or its direction has to be said.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"learning_rate": np.array([0.1, 1.0])},
      ...     {"valid/loss": np.array([[2.0, 1.0, 1.5], [2.0, 0.5, 0.5]])},
      ...     np.array([0, 10, 20]), objective="valid/loss")
      >>> outcomes(study).value.tolist(), outcomes(study).best_step.tolist()
      ([1.0, 0.5], [10, 10])

    Source: "Deciding how long to train when training is not compute-bound" (retrospective
      checkpoint selection) and "Why use quasi-random search ..." (post-hoc objectives).
    """
    if objective is None:
        objective = study.objective
    if maximize is None:
        own = study.maximize if objective == study.objective else None
        maximize = direction("objective", objective, own)
    data = study.data
    curve = mean_curve(study, objective)
    step = np.asarray(data["step"].values)
    infeasible = data["infeasible"].values.astype(bool)
    reason = data["infeasible_reason"].values.astype(str)
    if "seed" in data["infeasible"].dims:
        infeasible = data["infeasible"].transpose("trial", "seed").values.astype(bool)
        reason = data["infeasible_reason"].transpose("trial", "seed").values.astype(str)
        first = infeasible.argmax(axis=1)
        reason = reason[np.arange(len(reason)), first]
        infeasible = infeasible.any(axis=1)
    reason = np.where(infeasible, np.where(reason == "", "unknown", reason), "")
    loss = np.where(np.isfinite(curve), -curve if maximize else curve, np.inf)
    loss[infeasible] = np.inf
    others = [mean_curve(study, n) for n in tie_breakers(objective, metric_names(study))]
    index = best_evaluation(loss, others, earliest=True)
    checkpoint = best_evaluation(loss, others)
    best = loss[np.arange(len(loss)), index]
    usable = np.isfinite(best)
    value = np.where(usable, -best if maximize else best, np.nan)
    best_step = np.where(usable, step[index], -1)
    settled = [other[np.arange(len(loss)), checkpoint] for other in others]
    order = best_first(best, settled)[: usable.sum()]
    resolution = study.resolution(objective)
    points = list(study.points.values())
    return Outcomes(
        objective,
        bool(maximize),
        step,
        curve,
        value,
        best_step,
        np.where(usable, step[checkpoint], -1),
        infeasible,
        reason,
        order,
        settled_first(best, settled, resolution, points)[: usable.sum()],
        np.asarray(settled, np.float64).reshape(len(others), len(loss)),
        resolution,
    )
