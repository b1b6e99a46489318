"""Whether the best trial sits right at the edge of the infeasible region."""

from typing import NamedTuple

import numpy as np

from playbook_optax.analysis.axes import axis, from_scale, hyperparameters, to_scale
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records.study import Study

SECTION = "How can optimization failures be debugged and mitigated?"
NEAR = 0.1
"""The best trial is at the edge when within this share of the range of it, or past it."""
NEAR_GOOD = 0.25
"""The median of the good trials must be within this share: one lucky trial is not a pattern."""
LEVEL = 0.05
"""Chance, over all hyperparameters, with which unordered failures may look ordered."""


class StabilityRow(NamedTuple):
    """One hyperparameter along which trials become infeasible.

    Attributes:
      name: the hyperparameter.
      direction: "high" if trials fail above the edge, "low" if below it.
      edge: the value that parts feasible from infeasible trials with the fewest mistakes.
      best_trial: index of the best trial.
      best_value: its value of the hyperparameter.
      distance: from the best trial to the edge, as a share of the range on its scale; negative if
        the best trial lies past it.
      good_distance: median of that distance over the good trials.
      infeasible_beyond: infeasible trials past the edge.
      trials_beyond: all trials past the edge.
      p_value: one-sided Mann-Whitney test that infeasible trials lie further that way.
      limit: largest p_value that counts as evidence: 5%, shared by all hyperparameters and both
        directions.
      at_edge: whether the failures are ordered (p_value <= limit), the best trial is within a
        tenth of the range of the edge, and the median of the good ones within a quarter.
    """

    name: str
    direction: str
    edge: float
    best_trial: int
    best_value: float
    distance: float
    good_distance: float
    infeasible_beyond: int
    trials_beyond: int
    p_value: float
    limit: float
    at_edge: bool


def _split(unit: np.ndarray, infeasible: np.ndarray) -> tuple[float, int, int]:
    """The threshold above which trials fail, with the fewest mistakes.

    Returns its place, halfway between two trials, and the infeasible and all trials above it.
    """
    order = np.argsort(unit, kind="stable")
    u, bad = unit[order], infeasible[order].astype(int)
    below = np.concatenate([[0], np.cumsum(bad)])
    above = np.concatenate([np.cumsum((1 - bad)[::-1])[::-1], [0]])
    mistakes = (below + above).astype(float)
    mistakes[1:-1][u[1:] == u[:-1]] = np.inf
    mistakes[0] = mistakes[-1] = np.inf
    # Ties go to the lowest threshold: the cautious reading of where failures begin.
    cut = int(np.argmin(mistakes))
    return float((u[cut - 1] + u[cut]) / 2), int(bad[cut:].sum()), len(u) - cut


def stability_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> tuple[StabilityRow, ...]:
    """Finds the edge of the infeasible region along each hyperparameter.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      One row per numeric hyperparameter that varies, in the direction in which trials fail;
      empty unless some trials have a value and some are infeasible.

    Raises:
      ValueError: no such metric.

    Source: "How can optimization failures be debugged and mitigated?" (figure 7a).
    """
    from scipy import stats  # slow to import, and few sessions diagnose

    out = outcomes(study, objective, maximize)
    if out.best < 0 or not out.infeasible.any():
        return ()
    lines = [axis(study, name) for name in hyperparameters(study)]
    lines = [a for a in lines if a.kind != "categorical" and len(np.unique(a.unit)) > 1]
    rows = []
    for line in lines:
        bad, good = line.unit[out.infeasible], line.unit[~out.infeasible]
        mean_rank = stats.mannwhitneyu(bad, good).statistic / (len(bad) * len(good))
        direction = "high" if mean_rank >= 0.5 else "low"
        sign = 1.0 if direction == "high" else -1.0
        p_value = float(stats.mannwhitneyu(sign * bad, sign * good, alternative="greater").pvalue)
        place, num_bad, num_beyond = _split(sign * line.unit, out.infeasible)
        distance = place - sign * line.unit[out.best]
        good_distance = float(np.median(place - sign * line.unit[out.good()]))
        ends = to_scale([line.start, line.high], line.scale)
        share = sign * place
        with np.errstate(over="ignore"):
            width = ends[1] - ends[0]
        # A width that no float holds is not needed.
        at = ends[0] + share * width if width < np.inf else (1 - share) * ends[0] + share * ends[1]
        edge = float(from_scale(at, line.scale))
        limit = LEVEL / (2 * len(lines))
        rows.append(
            StabilityRow(
                name=line.name,
                direction=direction,
                edge=edge,
                best_trial=out.best,
                best_value=float(line.values[out.best]),
                distance=float(distance),
                good_distance=good_distance,
                infeasible_beyond=num_bad,
                trials_beyond=num_beyond,
                p_value=p_value,
                limit=limit,
                at_edge=bool(p_value <= limit and distance <= NEAR and good_distance <= NEAR_GOOD),
            )
        )
    return tuple(rows)


def stability_findings(info: tuple[StabilityRow, ...]) -> list[Finding]:
    """Says where the best trial sits at the edge of the infeasible region.

    The rule: infeasible trials lie significantly to one side along the hyperparameter, the best
    trial is within a tenth of the range of the value at which trials begin to fail, and the median
    of the good ones within a quarter.

    Args:
      info: from `stability_info`.

    Returns:
      `best_at_edge_of_infeasible` (warning) for each such hyperparameter.
    """
    found = []
    for row in info:
        if not row.at_edge:
            continue
        side = "above" if row.direction == "high" else "below"
        advice = (
            "Training is probably unstable, and making it stable will help: look at the training "
            f"loss of a trial somewhat {side} the best value for rises, then try warm-up and "
            "gradient clipping before another search."
        )
        if row.direction == "high" and "learning_rate" in row.name:
            advice += (
                f" Double-check at {row.name} = {5 * row.best_value:.3g} and "
                f"{10 * row.best_value:.3g}, 5 and 10 times the best one: a sudden rise after a "
                "steady decline confirms it."
            )
        found.append(
            Finding(
                "best_at_edge_of_infeasible",
                "warning",
                f"The best trial has {row.name} = {row.best_value:.4g}, at the edge of the "
                f"infeasible region: {row.infeasible_beyond} of the {row.trials_beyond} trials "
                f"{side} {row.edge:.4g} were infeasible (p = {row.p_value:.2g}).",
                row._asdict(),
                SECTION,
                advice,
            )
        )
    return found
