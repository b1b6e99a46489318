"""All rules over one study: what it says, the gravest first."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.boundaries import boundary_findings, boundary_info
from playbook_optax.analysis.curves import curve_findings, curve_info
from playbook_optax.analysis.feasibility import feasibility_findings, feasibility_info
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.generalization import (
    late_variance_findings,
    late_variance_info,
    overfitting_findings,
    overfitting_info,
)
from playbook_optax.analysis.importance import importance_findings, importance_info
from playbook_optax.analysis.instability import instability_findings, instability_info
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.analysis.resolution import resolution_findings, resolution_info
from playbook_optax.analysis.stability import stability_findings, stability_info
from playbook_optax.records.study import Study


class Rule(NamedTuple):
    """One rule in its two halves, so that plots and reports read what the findings read.

    Attributes:
      name: what it looks at.
      inform: `(study, objective, maximize) -> info`, the numbers.
      conclude: `info -> findings`, the words.
    """

    name: str
    inform: Callable[..., Any]
    conclude: Callable[[Any], list[Finding]]


RULES = (
    Rule("feasibility", feasibility_info, feasibility_findings),
    Rule("resolution", resolution_info, resolution_findings),
    Rule("stability", stability_info, stability_findings),
    Rule("instability", instability_info, instability_findings),
    Rule("boundaries", boundary_info, boundary_findings),
    Rule("curves", curve_info, curve_findings),
    Rule("overfitting", overfitting_info, overfitting_findings),
    Rule("late_variance", late_variance_info, late_variance_findings),
    Rule("importance", importance_info, importance_findings),
)
"""The rules of `diagnose`, in the order in which equally grave findings are told."""


def _healthy(out: Outcomes, skipped: list[str]) -> Finding:
    best = out.best
    share = float(out.infeasible.mean())
    checks = "No check found a problem"
    if skipped:
        checks = f"No check that could run found a problem (not checked: {', '.join(skipped)})"
    return Finding(
        "healthy",
        "info",
        f"{checks}: the best of {out.num_trials} trials is trial {best}, with {out.objective} = "
        f"{out.value[best]:.4g} at step {int(out.checkpoint_step[best])}, and {share:.0%} of the "
        "trials were infeasible.",
        {
            "best_trial": best,
            "best_value": float(out.value[best]),
            "best_step": int(out.checkpoint_step[best]),
            "num_trials": out.num_trials,
            "infeasible_share": share,
            "skipped": skipped,
        },
        "Extracting insight from experimental results",
        "Retrain the best point with other seeds before adopting it.",
    )


# What a rule finds out and says by itself.
_OWN_SKIPS = ("boundary", "curves")


def _unchecked(study: Study) -> list[Finding]:
    """What the record itself says could not be judged when it was made."""
    return [
        Finding(
            f"{name}_check_skipped",
            "info",
            f"The check {name!r} was not made when the trials were recorded: {reason}.",
            {"check": name, "reason": reason},
            "How can optimization failures be debugged and mitigated?",
        )
        for name, reason in study.spec.get("unchecked", {}).items()
        if name not in _OWN_SKIPS
    ]


@_checks.named_arguments
def diagnose(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> list[Finding]:
    """Says what a finished study shows, and what to do next.

    Every rule reads the objective's best value over training, and with seeds the mean over them.
    Another recorded metric may be the objective after the fact: nothing has to run again.

    Args:
      study: the study, whoever produced it.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better. By default the study's own direction for its own
        objective, and smaller is better for any other, unless its name says that it should rise.

    Returns:
      The Findings, the gravest first; never empty. A study without a problem yields `healthy`.

    Raises:
      ValueError: no such metric, or its direction has to be said.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"learning_rate": np.array([1.0, 10.0])}, {"loss": np.full((2, 3), np.nan)},
      ...     np.array([0, 10, 20]), objective="loss", infeasible=np.array([True, True]))
      >>> diagnose(study)[0].code
      'all_infeasible'

    Source: "Extracting insight from experimental results" and "Determining the number of steps
      for each training run".
    """
    if not study.num_trials:
        return [
            Finding(
                "no_trials",
                "error",
                "The study holds no complete trial.",
                {"num_trials": 0, "planned_trials": study.spec.get("planned_trials")},
                "How many trials are needed to get good results with quasi-random search?",
                "Run some trials first, or resume the study.",
            )
        ]
    out = outcomes(study, objective, maximize)
    # Without a single value only the first rule has anything to say.
    rules = RULES if out.best >= 0 else RULES[:1]
    found = []
    # Sums of numbers near the largest float are infinite, and compared as such.
    with np.errstate(over="ignore", invalid="ignore"):
        for rule in rules:
            found += rule.conclude(rule.inform(study, objective, maximize))
    found += _unchecked(study)
    if all(f.severity == "info" for f in found):
        skipped = [f.code.removesuffix("_check_skipped") for f in found if "_skipped" in f.code]
        found.insert(0, _healthy(out, skipped))
    return by_severity(found)
