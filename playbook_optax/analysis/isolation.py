"""A scientific hyperparameter by itself: the best trial of each of its values."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.axes import axis, from_scale, hyperparameters, to_scale
from playbook_optax.analysis.budgets import rank_reached
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study
from playbook_optax.records.study_set import SCIENTIFIC, StudySet

SECTION = "Extracting insight from experimental results (isolation plots)"
LEVEL = 0.05
"""A value is called best if luck would make some value as far ahead in at most 5% of cases."""
UNEQUAL = 1.5
"""From this ratio of the numbers of trials on, the best of more trials needs a warning."""


class IsolationRow(NamedTuple):
    """One value, or one bucket of values, of the scientific hyperparameter.

    Attributes:
      label: the value, or its range, as text.
      low: lower end of the bucket; NaN for a single value.
      high: upper end of the bucket; NaN for a single value.
      num_trials: trials with it, infeasible ones included.
      num_infeasible: those of them that have no value of the objective.
      best_trial: index of the best in its study; -1 if none has a value.
      best_value: its objective; NaN if none.
      best_step: step of that; -1 if none.
      matched_value: what the best of as many trials as the smallest row has would be, at the
        median over which of the trials those are; NaN if nothing.
      spread: standard deviation over seeds of the best trial at its best step; NaN for one seed.
      num_tied: other trials of the row with exactly the best value.
      point: the other hyperparameters of the best trial.
    """

    label: str
    low: float
    high: float
    num_trials: int
    num_infeasible: int
    best_trial: int
    best_value: float
    best_step: int
    matched_value: float
    spread: float
    num_tied: int
    point: dict[str, Any]

    @property
    def infeasible_share(self) -> float:
        """Share of the trials that have no value."""
        return self.num_infeasible / self.num_trials if self.num_trials else 0.0


@_shown.short
class IsolationInfo(NamedTuple):
    """The isolation table of a scientific hyperparameter.

    Attributes:
      scientific: its name, or "study".
      objective: the metric.
      maximize: whether larger is better.
      rows: one per value or bucket that has trials, in their order.
      best: index of the best row; -1 if none has a value.
      runner_up: index of the second best; -1 if there is none.
      difference: by how much the best row is better than the second; NaN without one.
      num_ahead: trials of the best row that are better than every trial of the others.
      p_value: probability that so many of the best trials fall into one row by luck, if the rows
        had been handed out at random.
      noise: standard error over seeds of the difference; NaN for one seed.
    """

    scientific: str
    objective: str
    maximize: bool
    rows: tuple[IsolationRow, ...]
    best: int
    runner_up: int
    difference: float
    num_ahead: int
    p_value: float
    noise: float

    @property
    def told_apart(self) -> bool:
        """Whether the best row is better than luck and, where it is known, than the seeds' noise.

        The noise counts double, as two standard errors.
        """
        certain = self.runner_up >= 0 and self.p_value <= LEVEL
        return certain and not self.difference <= 2 * self.noise


class _Group(NamedTuple):
    """The trials of one row, before they are compared."""

    label: str
    low: float
    high: float
    study: Study
    out: Outcomes
    trials: np.ndarray
    num_seeds: int


@_checks.named_arguments
def isolation_info(
    studies: Study | Mapping[str, Study],
    scientific: str | None = None,
    num_buckets: int = 5,
    objective: str | None = None,
    maximize: bool | None = None,
) -> IsolationInfo:
    """The best trial for each value of a scientific hyperparameter, the others optimized over.

    What is asked of a scientific hyperparameter is how good each of its values is at its own best
    nuisance hyperparameters. So each value is given its best trial, and the rest serve to say
    whether the difference is luck: if the value did not matter, the best trials of all would be
    spread over the values at random, each as often as it has trials. `p_value` is the probability
    that the trials in front of all others, as many as there are, have a value in common. It takes
    unequal numbers of trials into account.

    Args:
      studies: one study; or label to study, one for each value, such as a `StudySet`.
      scientific: the hyperparameter, in one study; what to call the labels, with several, which
        a `StudySet` knows.
      num_buckets: a hyperparameter with more different values than this is cut into so many
        ranges of equal length on its scale.
      objective: a recorded metric; the studies' own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The IsolationInfo.

    Raises:
      ValueError: no hyperparameter is named for one study, no such one, no studies or trials, or
        studies with different objectives.

    Example:
      >>> study = Study.from_arrays(
      ...     {"width": [16, 16, 64, 64], "learning_rate": [0.1, 0.2, 0.1, 0.2]},
      ...     {"loss": [[3.0], [2.0], [1.5], [4.0]]}, [10], objective="loss")
      >>> info = isolation_info(study, "width")
      >>> [(row.label, row.best_value, row.point["learning_rate"]) for row in info.rows]
      [('16', 2.0, 0.2), ('64', 1.5, 0.1)]
      >>> info.told_apart
      False

    Source: playbook, "Extracting insight from experimental results" (isolation plots) and
    "Identifying scientific, nuisance, and fixed hyperparameters".
    """
    num_buckets = _checks.check_count("num_buckets", num_buckets, at_least=2)
    if isinstance(studies, Study):
        if scientific is None:
            raise ValueError(
                "scientific must name a hyperparameter of the study: "
                + ", ".join(hyperparameters(studies))
            )
        groups = _groups_within(studies, scientific, num_buckets, objective, maximize)
    else:
        groups = _groups_between(studies, objective, maximize)
        if scientific is None:
            scientific = studies.scientific if isinstance(studies, StudySet) else SCIENTIFIC
    out = groups[0].out
    fewest = min(len(group.trials) for group in groups)
    rows = tuple(_row(group, fewest, scientific) for group in groups)
    sign = -1.0 if out.maximize else 1.0
    losses = [np.sort(np.where(g.out.usable, g.out.loss, np.inf)[g.trials]) for g in groups]
    order = sorted(
        (i for i in range(len(rows)) if math.isfinite(losses[i][0])), key=lambda i: losses[i][0]
    )
    best = order[0] if order else -1
    second = order[1] if len(order) > 1 else -1
    ahead, p_value = 0, 1.0
    if best >= 0 and len(groups) > 1:
        rivals = min(losses[i][0] for i in range(len(rows)) if i != best)
        ahead = int((losses[best] < rivals).sum())
        p_value = _probability_of_run([len(loss) for loss in losses], ahead)
    difference, noise = math.nan, math.nan
    if second >= 0:
        difference = sign * (rows[second].best_value - rows[best].best_value)
        errors = [rows[i].spread / math.sqrt(groups[i].num_seeds) for i in (best, second)]
        noise = math.hypot(*errors)
    return IsolationInfo(
        scientific=scientific,
        objective=out.objective,
        maximize=out.maximize,
        rows=rows,
        best=best,
        runner_up=second,
        difference=difference,
        num_ahead=ahead,
        p_value=p_value,
        noise=noise,
    )


def _groups_between(
    studies: Mapping[str, Study], objective: str | None, maximize: bool | None
) -> list[_Group]:
    """One group per study."""
    if not isinstance(studies, Mapping) or not studies:
        raise _checks.ArgumentTypeError(
            f"studies must be a pbx.Study or a non-empty dict of label to study, got {studies!r}."
        )
    groups: list[_Group] = []
    for label, study in studies.items():
        if not isinstance(study, Study):
            raise _checks.ArgumentTypeError(f"studies[{label!r}] must be a study, got {study!r}.")
        if not study.num_trials:
            raise ValueError(f"studies[{label!r}] has no trials; resume it, or leave it out.")
        out = outcomes(study, objective, maximize)
        first = groups[0].out if groups else out
        if (out.objective, out.maximize) != (first.objective, first.maximize):
            raise ValueError(
                f"studies[{label!r}] has the objective {out.objective!r} (maximize="
                f"{out.maximize}), others {first.objective!r} (maximize={first.maximize}); give "
                "objective= and maximize=."
            )
        every = np.arange(out.num_trials)
        groups.append(_Group(str(label), math.nan, math.nan, study, out, every, study.num_seeds))
    return groups


def _groups_within(
    study: Study, name: str, num_buckets: int, objective: str | None, maximize: bool | None
) -> list[_Group]:
    """One group per value or bucket of one study's hyperparameter."""
    if not study.num_trials:
        raise ValueError("the study has no trials; resume it, or run some.")
    out = outcomes(study, objective, maximize)
    line = axis(study, name)
    distinct = np.unique(line.values)
    groups = []

    def add(label: str, low: float, high: float, inside: np.ndarray) -> None:
        if inside.any():
            chosen = np.flatnonzero(inside)
            groups.append(_Group(label, low, high, study, out, chosen, study.num_seeds))

    if line.kind == "categorical" or len(distinct) <= num_buckets:
        for value in distinct:
            label = line.labels[int(value)] if line.labels else f"{value:.6g}"
            add(label, math.nan, math.nan, line.values == value)
        return groups
    bucket = np.clip((line.unit * num_buckets).astype(int), 0, num_buckets - 1)
    ends = to_scale([line.start, line.high], line.scale)
    edges = from_scale(np.linspace(ends[0], ends[1], num_buckets + 1), line.scale)
    edges[0], edges[-1] = line.low, line.high
    for i in range(num_buckets):
        low, high = float(edges[i]), float(edges[i + 1])
        add(f"{low:.3g} to {high:.3g}", low, high, bucket == i)
    return groups


def _row(group: _Group, fewest: int, scientific: str) -> IsolationRow:
    out, trials = group.out, group.trials
    loss = np.where(out.usable, out.loss, np.inf)[trials]
    ranked = np.sort(loss)
    usable = np.isfinite(loss)
    common: dict[str, Any] = {
        "label": group.label,
        "low": group.low,
        "high": group.high,
        "num_trials": len(trials),
        "num_infeasible": int((~usable).sum()),
    }
    if not usable.any():
        return IsolationRow(
            **common,
            best_trial=-1,
            best_value=math.nan,
            best_step=-1,
            matched_value=math.nan,
            spread=math.nan,
            num_tied=0,
            point={},
        )
    best = int(trials[int(loss.argmin())])
    sign = -1.0 if out.maximize else 1.0
    matched = float(ranked[rank_reached(len(trials), fewest, 0.5, replace=False) - 1])
    point = {n: v.item() for n, v in group.study.point(best).items() if n != scientific}
    return IsolationRow(
        **common,
        best_trial=best,
        best_value=float(out.value[best]),
        best_step=int(out.best_step[best]),
        matched_value=sign * matched if math.isfinite(matched) else math.nan,
        spread=_spread(group, best),
        num_tied=int((loss == ranked[0]).sum()) - 1,
        point=point,
    )


def _spread(group: _Group, trial: int) -> float:
    if group.num_seeds < 2:
        return math.nan
    index = int(np.flatnonzero(group.out.step == group.out.best_step[trial])[0])
    array = group.study.data[group.out.objective].transpose("trial", "seed", "eval").values
    return float(array[trial, :, index].astype(np.float64).std(ddof=1))


def _probability_of_run(sizes: list[int], run: int) -> float:
    """Probability that the first `run` trials of all, in random order, are of one group.

    It is the sum over groups of C(size, run) / C(total, run).
    """
    if run == 0:
        return 1.0
    total = sum(sizes)
    ways = sum(math.comb(size, run) for size in sizes)
    return min(ways / math.comb(total, run), 1.0)


def isolation_findings(info: IsolationInfo) -> list[Finding]:
    """Says which value is best, and how sure that is.

    Args:
      info: from `isolation_info`.

    Returns:
      `isolation_best` (info) or `isolation_cannot_tell` (info); beside it `isolation_unequal`
      (warning) where some values have far more trials than others, and
      `isolation_value_infeasible` (warning) where every trial of a value failed. Where no trial has
      a value, `isolation_nothing` (error) alone.
    """
    evidence = {
        "scientific": info.scientific,
        "objective": info.objective,
        "labels": [r.label for r in info.rows],
        "num_trials": [r.num_trials for r in info.rows],
        "infeasible_shares": [r.infeasible_share for r in info.rows],
        "best_values": [r.best_value for r in info.rows],
        "matched_values": [r.matched_value for r in info.rows],
        "difference": info.difference,
        "num_ahead": info.num_ahead,
        "p_value": info.p_value,
        "noise": info.noise,
    }

    def finding(code: str, severity: str, message: str, suggestion: str = "") -> Finding:
        return Finding(code, severity, message, evidence, SECTION, suggestion)

    if info.best < 0:
        return [
            finding(
                "isolation_nothing",
                "error",
                f"No trial has a value of {info.objective}, with any value of {info.scientific}.",
                "Lower the range of the learning rate.",
            )
        ]
    found = [_verdict(info, finding)]
    counts = [row.num_trials for row in info.rows]
    if max(counts) >= UNEQUAL * min(counts):
        matched = ", ".join(f"{row.label}: {row.matched_value:.4g}" for row in info.rows)
        found.append(
            finding(
                "isolation_unequal",
                "warning",
                f"Values of {info.scientific} have {min(counts)} to {max(counts)} trials, and the "
                f"best of more is better by itself. The best of {min(counts)} each would be, at "
                f"the median, {matched}.",
                "Compare these, or give each value as many trials.",
            )
        )
    failed = [row.label for row in info.rows if row.best_trial < 0]
    if failed:
        found.append(
            finding(
                "isolation_value_infeasible",
                "warning",
                f"Every trial with {info.scientific} = {', '.join(failed)} is infeasible, so that "
                "nothing is known of how good it could be.",
                "Give it a range of its own, with lower learning rates.",
            )
        )
    return sorted(found, key=lambda f: f.severity != "warning")


def _verdict(info: IsolationInfo, finding: Any) -> Finding:
    """The best value, or that it cannot be told."""
    row = info.rows[info.best]
    what = f"{info.scientific} = {row.label} has the best trial, {info.objective} = "
    what += f"{row.best_value:.4g}"
    if info.runner_up < 0:
        return finding(
            "isolation_cannot_tell",
            "info",
            f"{what}, but no other value has a trial to compare it with.",
            "Run trials with other values.",
        )
    other = info.rows[info.runner_up]
    what += f", {info.difference:.2g} better than the best with {other.label}"
    chance = f"luck alone would put some value as far ahead with probability {info.p_value:.2g}"
    if info.told_apart:
        return finding(
            "isolation_best",
            "info",
            f"{what}: the {info.num_ahead} best trials of all have it, and {chance}.",
            f"Take {info.scientific} = {row.label}, if the difference is worth it.",
        )
    why = chance
    if info.p_value <= LEVEL:
        why = f"the seeds alone make a difference of {2 * info.noise:.2g} likely"
    return finding(
        "isolation_cannot_tell",
        "info",
        f"{what}, but that is within the spread of the trials: {why}.",
        "Choose by other reasons, such as cost; or run more trials with each value, or more seeds.",
    )
