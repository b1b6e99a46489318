"""How many trials were infeasible, why, and what to do when all were."""

from typing import NamedTuple

import numpy as np

from playbook_optax.analysis.axes import axis, hyperparameters
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records.study import Study

SECTION = "How can optimization failures be debugged and mitigated?"
MANY = 0.5
"""From this share of infeasible trials on, most of the budget was lost and we warn."""


class FeasibilityInfo(NamedTuple):
    """Counts of infeasible trials.

    Attributes:
      num_trials: all trials.
      num_infeasible: those that were infeasible.
      num_without_value: feasible ones that never had a finite objective.
      by_reason: how many were infeasible for each reason, the most frequent first.
      share: num_infeasible / num_trials.
      objective: the metric that was looked at.
      learning_rate: the hyperparameter that most likely decides, "" if none is called so.
      low: lower end of its range, NaN if there is none.
      high: upper end.
      scale: its scale.
    """

    num_trials: int
    num_infeasible: int
    num_without_value: int
    by_reason: dict[str, int]
    share: float
    objective: str
    learning_rate: str
    low: float
    high: float
    scale: str


def feasibility_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> FeasibilityInfo:
    """Counts infeasible trials by reason.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The counts. A trial is infeasible if any of its seeds is.

    Raises:
      ValueError: no such metric.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"learning_rate": np.array([0.1, 1.0])},
      ...     {"loss": np.array([[2.0, 1.0], [2.0, np.nan]])},
      ...     np.array([0, 10]), objective="loss", infeasible=np.array([False, True]))
      >>> feasibility_info(study).share
      0.5

    Source: "How can optimization failures be debugged and mitigated?"
    """
    out = outcomes(study, objective, maximize)
    names, counts = np.unique(out.reason[out.infeasible], return_counts=True)
    by_reason = {str(names[i]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}
    num = int(out.infeasible.sum())
    rates = [n for n in hyperparameters(study) if "learning_rate" in n or n in ("lr", "peak_lr")]
    low = high = float("nan")
    scale = ""
    if rates:
        line = axis(study, rates[0])
        low, high, scale = line.low, line.high, line.scale
    return FeasibilityInfo(
        num_trials=out.num_trials,
        num_infeasible=num,
        num_without_value=int((~out.infeasible & ~out.usable).sum()),
        by_reason=by_reason,
        share=num / out.num_trials,
        objective=out.objective,
        learning_rate=rates[0] if rates else "",
        low=low,
        high=high,
        scale=scale,
    )


def _reasons(info: FeasibilityInfo) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in info.by_reason.items())


def _lower_range(info: FeasibilityInfo) -> tuple[str, dict[str, float]]:
    """Advice on a lower range: as wide as the old one, and ending where that began."""
    if not info.learning_rate:
        return "Lower the range of the hyperparameter that sets the size of the updates.", {}
    name = info.learning_rate
    low, high = info.low, info.high
    if info.scale != "log" or not low > 0:
        new_high = high / 10
        return (
            f"Lower the range of {name}: end it at {new_high:.3g} instead of {high:.3g}, and make "
            "its scale logarithmic.",
            {"proposed_high": new_high},
        )
    factor = float(np.clip(high / low, 10.0, 1000.0))
    new_low, new_high = low / factor, low
    return (
        f"Lower the range of {name}: from [{low:.3g}, {high:.3g}] to [{new_low:.3g}, "
        f"{new_high:.3g}].",
        {"proposed_low": new_low, "proposed_high": new_high},
    )


def feasibility_findings(info: FeasibilityInfo) -> list[Finding]:
    """Says whether too many trials were infeasible.

    Args:
      info: from `feasibility_info`.

    Returns:
      `all_infeasible` (error), `many_infeasible` (warning, from half of the trials on),
      `some_infeasible` (info), `no_finite_objective` (error, if no feasible trial ever had a
      finite objective), `some_without_value` (warning) or nothing.
    """
    evidence = {
        "num_trials": info.num_trials,
        "num_infeasible": info.num_infeasible,
        "share": info.share,
        "by_reason": info.by_reason,
    }
    found = []
    if info.num_infeasible == info.num_trials:
        advice, proposal = _lower_range(info)
        return [
            Finding(
                "all_infeasible",
                "error",
                f"All {info.num_trials} trials were infeasible ({_reasons(info)}).",
                {**evidence, **proposal, "name": info.learning_rate},
                SECTION,
                advice,
            )
        ]
    feasible = info.num_trials - info.num_infeasible
    if info.num_without_value == feasible:
        return [
            Finding(
                "no_finite_objective",
                "error",
                f"None of the {feasible} feasible trials ever had a finite {info.objective}.",
                {**evidence, "num_without_value": info.num_without_value},
                SECTION,
                "Check how the objective is computed, or diagnose with another metric.",
            )
        ]
    if info.num_without_value:
        found.append(
            Finding(
                "some_without_value",
                "warning",
                f"{info.num_without_value} of {feasible} feasible trials never had a finite "
                f"{info.objective}, and were left out.",
                {**evidence, "num_without_value": info.num_without_value},
                SECTION,
                "Check how the objective is computed.",
            )
        )
    if info.share >= MANY:
        found.append(
            Finding(
                "many_infeasible",
                "warning",
                f"{info.num_infeasible} of {info.num_trials} trials ({info.share:.0%}) were "
                f"infeasible ({_reasons(info)}).",
                evidence,
                SECTION,
                "Shrink the search space where trials fail, or make training more stable; each "
                "infeasible trial is budget without an answer.",
            )
        )
    elif info.num_infeasible:
        found.append(
            Finding(
                "some_infeasible",
                "info",
                f"{info.num_infeasible} of {info.num_trials} trials ({info.share:.0%}) were "
                f"infeasible ({_reasons(info)}).",
                evidence,
                SECTION,
            )
        )
    return found
