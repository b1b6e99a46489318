"""How many steps each trial needed to reach a target: what a faster way to train makes fewer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.outcomes import mean_curve, outcomes
from playbook_optax.records.study import Study

SECTION = "Determining the number of steps for each training run"


@_shown.short
class StepsToTarget(NamedTuple):
    """When each trial first reached a target.

    Attributes:
      metric: the metric that had to reach it.
      target: the target.
      maximize: whether the metric reaches it from below.
      step: (eval,) optimizer updates made before each evaluation.
      steps: (trial,) step of the first evaluation at which the metric, the mean over seeds, was as
        good as the target, int64; -1 if it never was.
      seed_steps: (trial, seed) the same of each seed by itself.
      after: (trial,) step of the evaluation before that one, at which it was not yet as good: the
        target was reached somewhere in (after, steps]; -1 where there is none.
      infeasible: (trial,) whether any seed was infeasible.
      points: hyperparameters, name to (trial,).
    """

    metric: str
    target: float
    maximize: bool
    step: np.ndarray
    steps: np.ndarray
    seed_steps: np.ndarray
    after: np.ndarray
    infeasible: np.ndarray
    points: dict[str, np.ndarray]

    @property
    def order(self) -> np.ndarray:
        """(reached,) indices of the feasible trials that reached it, the fastest first."""
        reached = np.flatnonzero((self.steps >= 0) & ~self.infeasible)
        return reached[np.argsort(self.steps[reached], kind="stable")]

    @property
    def fastest(self) -> int:
        """Index of the fastest feasible trial, the lowest if tied; -1 if none reached it."""
        order = self.order
        return int(order[0]) if len(order) else -1


@_checks.named_arguments
def steps_to_target(
    study: Study, target: float, metric: str | None = None, maximize: bool | None = None
) -> StepsToTarget:
    """The number of steps in which each trial first reached a target.

    Only evaluations count: nothing is interpolated, so that a step is late by up to the distance
    between two evaluations. Values that are not finite never reach a target. Numbers are compared
    in float32, as `reducers.steps_to_target` does inside a program, and the two agree.

    Args:
      study: the study.
      target: reached by values <= it, or >= it when maximizing.
      metric: a recorded metric; the objective by default.
      maximize: whether larger is better. By default the study's own direction for its own
        objective, and smaller is better for any other, unless its name says that it should rise.

    Returns:
      The StepsToTarget.

    Raises:
      ValueError: no such metric, its direction has to be said, or the target is not a finite
        number.

    Example:
      >>> import numpy as np
      >>> import playbook_optax as pbx
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": np.array([0.01, 0.1, 1.0])},
      ...     {"valid/error_rate": np.array([[0.9, 0.6, 0.4], [0.9, 0.3, 0.2], [0.9, 0.9, 0.9]])},
      ...     np.array([0, 100, 200]), objective="valid/error_rate")
      >>> info = pbx.steps_to_target(study, 0.4)
      >>> info.steps.tolist(), info.fastest
      ([200, 100, -1], 1)

    Source: "Determining the number of steps for each training run" (the number of training steps
      required to reach a particular validation loss).
    """
    _checks.check_number("target", target)
    goal = np.float32(target)
    out = outcomes(study, metric, maximize)
    known = study.data[out.objective]
    seeds = known.transpose("trial", ..., "eval").values
    seeds = seeds if "seed" in known.dims else seeds[:, None]

    def first(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float32)
            good = np.isfinite(values) & (values >= goal if out.maximize else values <= goal)
        return np.where(good.any(axis=-1), good.argmax(axis=-1), -1)

    index = first(mean_curve(study, out.objective))
    each = first(seeds)
    step = np.asarray(out.step, np.int64)
    return StepsToTarget(
        metric=out.objective,
        target=float(target),
        maximize=out.maximize,
        step=step,
        steps=np.where(index >= 0, step[index], -1),
        seed_steps=np.where(each >= 0, step[each], -1),
        after=np.where(index > 0, step[index - 1], -1),
        infeasible=out.infeasible,
        points=dict(study.points),
    )
