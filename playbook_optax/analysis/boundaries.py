"""Whether the best points crowd an edge of the search space, and the wider range to try next."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _shown
from playbook_optax.analysis.axes import Axis, axis, from_scale, hyperparameters, to_scale
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records.study import Study

SECTION = "Identifying bad search space boundaries"
NEAR = 0.1
"""A trial is near an edge within this share of the range, measured on the dimension's scale."""
OUTERMOST = 0.25
"""The outermost trial is near an edge within this share: nothing was tried beyond it."""
LEVEL = 0.05
"""Chance with which trials that ignore the hyperparameter may look like a crowd at one edge."""
NUM_DRAWS = 4000


class BoundaryRow(NamedTuple):
    """One hyperparameter's best trials against its nearer edge.

    Attributes:
      name: the hyperparameter.
      edge: "low" or "high": the edge that the best trial is nearer to.
      best_trial: index of the best trial.
      best_value: its value of the hyperparameter.
      distance: its distance to the edge as a share of the range, on the scale.
      outermost: whether no trial with a value lies nearer to that edge.
      good_trials: the trials looked at, best first.
      good_values: their values.
      p_value: the chance that as many feasible trials, drawn at random, lie as near to the edge
        on average as the good ones do.
      infeasible_share: share of infeasible trials in the quarter of the range at the edge.
      low: lower end of the range.
      high: upper end.
      scale: its scale.
      proposed_low: lower end of the wider range; equal to `low` if that edge stays.
      proposed_high: upper end.
      proposal: the wider parameter, of the same type and scale; None if the edge is a natural
        limit (0 for a range that is never negative) and cannot move.
    """

    name: str
    edge: str
    best_trial: int
    best_value: float
    distance: float
    outermost: bool
    good_trials: tuple[int, ...]
    good_values: tuple[float, ...]
    p_value: float
    infeasible_share: float
    low: float
    high: float
    scale: str
    proposed_low: float
    proposed_high: float
    proposal: Any


@_shown.short
class BoundaryInfo(NamedTuple):
    """All hyperparameters against their edges.

    Attributes:
      rows: one per ordered hyperparameter of the search space; empty without trials.
      skipped: why nothing was looked at; "" if something was.
      num_usable: trials with a value.
    """

    rows: tuple[BoundaryRow, ...]
    skipped: str
    num_usable: int


def _rounded(x: float, digits: int) -> float:
    return float(f"{x:.{digits - 1}e}")


def wider_range(low: float, high: float, scale: str, edge: str) -> tuple[float, float]:
    """The range moved outwards at one edge by half of its width, on its scale.

    On a log scale the edge moves by a factor (the square root of high / low, at least 2); on a
    reverse_log scale the same happens to 1 - x, so that the high edge nears 1 and the low edge
    stays at 0 or above. On a linear scale it moves by half of the width. A range that is never
    negative stays so, and one inside [0, 1) stays below 1.

    Args:
      low: lower end.
      high: upper end.
      scale: "linear", "log" or "reverse_log".
      edge: "low" or "high".

    Returns:
      The new (low, high); unchanged where the edge is already at its natural limit.

    Example:
      >>> wider_range(1e-4, 1e-2, "log", "high")
      (0.0001, 0.1)
      >>> wider_range(0.0, 0.5, "linear", "low")
      (0.0, 0.5)

    Source: "Identifying bad search space boundaries".
    """
    ends = to_scale([low, high], scale)
    move = 0.5 * (ends[1] - ends[0])
    if scale != "linear":
        move = max(move, math.log(2.0))
    moved = ends[1] + move if edge == "high" else ends[0] - move
    end = float(from_scale(moved, scale))
    if edge == "low" and low >= 0:
        end = max(end, 0.0)
    if scale == "reverse_log":
        gap = max(_rounded(1 - end, 1), 0.0)
        rounded = 1 - gap
        end = float(f"{rounded:.12g}")
    elif scale == "linear":
        if edge == "high" and low >= 0 and high < 1 <= end:
            end = (1 + high) / 2
        end = _rounded(end, 3)
    else:
        end = _rounded(end, 1)
    if edge == "high":
        return low, max(end, high)
    return min(end, low), high


def _propose(parameter: Any, line: Axis, edge: str) -> tuple[float, float, Any]:
    """The wider range and parameter; the old range and None where the edge cannot move."""
    low, high = float(parameter.low), float(parameter.high)
    at_zero = edge == "low" and line.start != line.low  # a log range that already includes 0
    new_low, new_high = (low, high) if at_zero else wider_range(low, high, line.scale, edge)
    if line.kind == "integer":
        new_low, new_high = math.floor(new_low), math.ceil(new_high)
        if edge == "low" and low >= 1:
            new_low = max(new_low, 1)
        new_high = min(new_high, 2**31 - 1)
    if (new_low, new_high) == (low, high):
        return line.low, line.high, None
    ends = {"low": new_low} if edge == "low" else {"high": new_high}
    try:
        wider = dataclasses.replace(parameter, **ends)
    except ValueError:  # beyond what float32 or int32 can hold
        return line.low, line.high, None
    return (line.low if edge == "high" else new_low), new_high, wider


def _crowding(distance: np.ndarray, usable: np.ndarray, good: np.ndarray) -> float:
    """One-sided permutation p-value of the good trials' mean distance to the edge."""
    pool = distance[usable]
    seen = distance[good].mean()
    total = math.comb(len(pool), len(good))
    if total <= NUM_DRAWS:
        chosen = np.asarray(list(itertools.combinations(range(len(pool)), len(good))))
        return float(np.mean(pool[chosen].mean(axis=1) <= seen + 1e-12))
    rng = np.random.default_rng(0)
    picks = rng.random((NUM_DRAWS, len(pool))).argpartition(len(good), axis=1)[:, : len(good)]
    means = pool[picks].mean(axis=1)
    return float((1 + np.sum(means <= seen + 1e-12)) / (1 + NUM_DRAWS))


def boundary_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> BoundaryInfo:
    """Measures how near the best trials lie to the edges of the search space.

    The best trial alone lies within a tenth of the range of some edge one time in five even where
    the hyperparameter does nothing. So the row also holds the chance that random feasible trials
    crowd that edge as much as the good ones (best tenth, at least three, at most ten) do.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The BoundaryInfo. The p-values draw with a fixed seed: the same study gives the same info.

    Raises:
      ValueError: no such metric.

    Source: "Identifying bad search space boundaries".
    """
    out = outcomes(study, objective, maximize)
    num = len(out.order)
    if study.space is None:
        return BoundaryInfo((), "the study has no search space", num)
    if not num:
        return BoundaryInfo((), "no trial has a value", num)
    rows = []
    good = out.good()
    for name in hyperparameters(study):
        line = axis(study, name)
        if not line.declared or line.kind == "categorical" or not line.high > line.low:
            continue
        edge = "high" if line.unit[out.best] > 0.5 else "low"
        distance = 1 - line.unit if edge == "high" else line.unit
        at_edge = distance <= 0.25
        low, high, proposal = _propose(study.space[name], line, edge)
        rows.append(
            BoundaryRow(
                name=name,
                edge=edge,
                best_trial=out.best,
                best_value=float(line.values[out.best]),
                distance=float(max(distance[out.best], 0.0)),
                outermost=bool(distance[out.best] <= distance[out.order].min()),
                good_trials=tuple(int(t) for t in good),
                good_values=tuple(float(v) for v in line.values[good]),
                p_value=_crowding(distance, out.usable, good),
                infeasible_share=float(out.infeasible[at_edge].mean()) if at_edge.any() else 0.0,
                low=line.low,
                high=line.high,
                scale=line.scale,
                proposed_low=low,
                proposed_high=high,
                proposal=proposal,
            )
        )
    skipped = "" if rows else "the search space has no dimension with two ends"
    return BoundaryInfo(tuple(rows), skipped, num)


def boundary_findings(info: BoundaryInfo) -> list[Finding]:
    """Says which edges the best trials crowd.

    The rule: the best trial lies within a tenth of the range of an edge, or within a quarter with
    no trial between, where the good trials crowd it. If random trials would
    crowd that edge as much as the good ones do with a chance of at most 5%, it is a warning,
    `best_near_boundary`; otherwise noise can explain it and it is an info,
    `best_maybe_near_boundary`. Where at least half of the trials in the quarter of the range at
    that edge are infeasible, it is the edge of stability that holds the trials back, not the edge
    of the space, and nothing is said here.

    Args:
      info: from `boundary_info`.

    Returns:
      Findings, in the order of the search space.
    """
    if info.skipped:
        return [
            Finding(
                "boundary_check_skipped",
                "info",
                f"The boundaries of the search space were not checked: {info.skipped}.",
                {"reason": info.skipped},
                SECTION,
                "Give the study its search space to have them checked."
                if "has no search space" in info.skipped
                else "",
            )
        ]
    found = []
    for row in info.rows:
        sure = row.p_value <= LEVEL
        near = OUTERMOST if sure and row.outermost else NEAR
        if row.distance > near or row.infeasible_share >= 0.5:
            continue
        num = len(row.good_trials)
        where = (
            f"The best trial has {row.name} = {row.best_value:.4g}, {row.distance:.0%} of the "
            f"range away from the {row.edge} edge of [{row.low:.4g}, {row.high:.4g}]"
        )
        if sure:
            message = f"{where}, and the best {num} trials crowd that edge (p = {row.p_value:.2g})."
        else:
            message = (
                f"{where}, but the best {num} of {info.num_usable} trials do not crowd that edge "
                f"more than chance allows (p = {row.p_value:.2g})."
            )
        if row.proposal is None:
            advice = (
                f"The range cannot grow there: {row.low if row.edge == 'low' else row.high:.4g} "
                "is its natural limit."
            )
        else:
            old, new = (
                (row.low, row.proposed_low) if row.edge == "low" else (row.high, row.proposed_high)
            )
            lead = "Search again with" if sure else "Run more trials; if it stays there, search"
            tail = "" if sure else " with"
            advice = (
                f"{lead}{tail} {row.name} from {row.proposed_low:.6g} to {row.proposed_high:.6g} "
                f"({row.scale} scale): the {row.edge} edge moves from {old:.6g} to {new:.6g}."
            )
        found.append(
            Finding(
                "best_near_boundary" if sure else "best_maybe_near_boundary",
                "warning" if sure else "info",
                message,
                {**row._asdict(), "proposal": None if row.proposal is None else str(row.proposal)},
                SECTION,
                advice,
            )
        )
    return found
