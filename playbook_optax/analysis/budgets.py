"""How many trials are enough: the best of n trials, had the study been smaller."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study

SECTION = "How many trials are needed to get good results with quasi-random search?"
PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)
"""The percentiles of a row, in its order: whiskers, box and median of the plot."""
SMALL_GAIN = 0.05
"""Part of the way from the median trial to the best one that doubling a budget should bring."""
_MAX_DRAWS = 2**24
_UNITS = (1, 2, 3, 4, 5, 6, 8)
_TENS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)


class BudgetRow(NamedTuple):
    """The best of a number of trials.

    Attributes:
      budget: number of trials drawn.
      p5: the objective that the luckiest 5% of such studies reach or exceed; NaN where that many
        find no feasible trial at all.
      p25: the same for a quarter of the studies.
      p50: for half of them: the median.
      p75: for three quarters.
      p95: for all but the unluckiest 5%.
      nothing: share of such studies without a feasible trial.
    """

    budget: int
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    nothing: float

    @property
    def interquartile(self) -> float:
        """Width of the middle half; infinite where a quarter of the studies find nothing."""
        return abs(self.p75 - self.p25) if math.isfinite(self.p75) else math.inf


@_shown.short
class BudgetInfo(NamedTuple):
    """What smaller studies would have found.

    Attributes:
      objective: the metric.
      maximize: whether larger is better.
      num_trials: trials of the study.
      num_infeasible: those of them that give nothing.
      rows: one per budget, ascending.
      doubled: (budget,) median of twice each budget; NaN beyond the study's own size.
      best_value: of the study; NaN if there is none.
      median_value: of its trials that have a value; NaN if there is none.
      spread: standard deviation over seeds of the best trial at its best step; NaN for one seed.
      num_bootstrap: resampled studies per budget; 0 where the distribution is the exact one.
    """

    objective: str
    maximize: bool
    num_trials: int
    num_infeasible: int
    rows: tuple[BudgetRow, ...]
    doubled: tuple[float, ...]
    best_value: float
    median_value: float
    spread: float
    num_bootstrap: int

    def gain(self, row: int) -> float:
        """What the median of the given row gains from twice the budget.

        Args:
          row: index into `rows`.

        Returns:
          The gain, never negative where the distribution is exact; infinite where the median
          study finds nothing, NaN where twice the budget is more than the study has.
        """
        if not math.isfinite(self.doubled[row]):
            beyond = 2 * self.rows[row].budget > self.num_trials
            return math.nan if beyond else math.inf
        now = self.rows[row].p50
        if not math.isfinite(now):
            return math.inf
        return self.doubled[row] - now if self.maximize else now - self.doubled[row]


def default_budgets(num_trials: int) -> tuple[int, ...]:
    """Budgets a fifth to a third apart from 1 on, and the study's own.

    Args:
      num_trials: trials of the study.

    Returns:
      The budgets, ascending.

    Example:
      >>> default_budgets(25)
      (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25)
    """
    larger = (base * 10**decade for decade in range(8) for base in _TENS)
    return tuple(sorted({*(n for n in (*_UNITS, *larger) if n < num_trials), num_trials}))


def rank_reached(num_trials: int, budget: int, share: float, replace: bool = True) -> int:
    """The rank that the best of a draw reaches with some probability, exactly.

    Of m trials in order, the best of n draws with replacement is among the first k with
    probability 1 - ((m - k) / m)**n; without replacement 1 - C(m - k, n) / C(m, n).

    Args:
      num_trials: m.
      budget: n.
      share: the probability, in (0, 1).
      replace: whether a trial may be drawn twice.

    Returns:
      The smallest k, counted from 1, that is reached with at least that probability.

    Example:
      >>> rank_reached(4, 1, 0.5), rank_reached(4, 4, 0.5), rank_reached(4, 4, 0.99, replace=False)
      (2, 1, 1)
    """
    k = np.arange(1, num_trials + 1)
    if replace:
        missed: np.ndarray = (1 - k / num_trials) ** budget
    else:
        # C(m - k, n) / C(m, n), one factor (m - k + 1 - n) / (m - k + 1) for each k.
        missed = np.cumprod(np.maximum(num_trials - k + 1 - budget, 0) / (num_trials - k + 1))
    # A share such as 0.75 may be met exactly, give or take a rounding.
    return int(np.argmax(1 - missed >= share - 1e-12)) + 1


def _exact(loss: np.ndarray, budget: int) -> np.ndarray:
    """Percentiles of the best of `budget` draws from sorted losses."""
    ranks = [rank_reached(len(loss), budget, q / 100) for q in PERCENTILES]
    return np.asarray([loss[k - 1] for k in ranks])


def _resampled(
    loss: np.ndarray, budget: int, num_bootstrap: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Percentiles of the best of `budget` draws, and the share of draws that give nothing."""
    best = np.full(num_bootstrap, len(loss) - 1)
    rows = max(_MAX_DRAWS // budget, 1)
    for start in range(0, num_bootstrap, rows):
        drawn = rng.integers(len(loss), size=(min(rows, num_bootstrap - start), budget))
        best[start : start + rows] = drawn.min(axis=1)
    best = np.sort(best)
    ranks = [max(math.ceil(q / 100 * num_bootstrap - 1e-9), 1) - 1 for q in PERCENTILES]
    return loss[best[ranks]], float(np.mean(~np.isfinite(loss[best])))


@_checks.named_arguments
def budget_info(
    study: Study,
    budgets: Sequence[int] | None = None,
    num_bootstrap: int | None = None,
    key: chex.PRNGKey | None = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> BudgetInfo:
    """What studies of fewer trials would have found, from one that is finished.

    The playbook's figure resamples a study of 100 trials: n of them are drawn with replacement,
    and the best is noted, again and again. That distribution is known exactly (`rank_reached`), and
    the exact one is the default; `num_bootstrap` draws it instead, as the figure does. Infeasible
    trials are drawn as often as any and give nothing.

    The best trial of a resampled study is never better than the best of the real one, so that what
    comes beyond the study's own size is not known; twice a budget is looked at up to that only.

    Args:
      study: the study; its points should be alike, as those of a quasi-random search are, and not
        chosen by what earlier trials found.
      budgets: numbers of trials, ascending; from 1 to the study's own if None.
      num_bootstrap: how many studies to draw for each budget; the exact distribution if None.
      key: where the draws come from; needed with `num_bootstrap`.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The BudgetInfo.

    Raises:
      ValueError: no trials, a bad budget, no key to draw from, or no such metric.

    Example:
      >>> study = Study.from_arrays(
      ...     {"x": [0.0, 1.0, 2.0, 3.0]}, {"loss": [[3.0], [1.0], [2.0], [4.0]]}, [10],
      ...     objective="loss")
      >>> [(row.budget, row.p50) for row in budget_info(study).rows]
      [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]

    Source: playbook, "How many trials are needed to get good results with quasi-random search?"
    (figure 3).
    """
    num = study.num_trials
    if not num:
        raise ValueError("study has no trials; resume it, or run some.")
    out = outcomes(study, objective, maximize)
    chosen = _check_budgets(budgets, num)
    rng = None
    if num_bootstrap is not None:
        num_bootstrap = _checks.check_count("num_bootstrap", num_bootstrap)
        if key is None:
            raise ValueError("key must be given with num_bootstrap; or leave out both.")
        words = np.asarray(jax.random.key_data(key)).ravel()
        rng = np.random.default_rng([int(word) for word in words])
    loss = np.sort(np.where(out.usable, out.loss, np.inf))
    missing = float(1 - len(out.order) / num)
    sign = -1.0 if out.maximize else 1.0

    def row(budget: int) -> BudgetRow:
        values: np.ndarray
        if rng is None:
            values, nothing = _exact(loss, budget), missing**budget
        else:
            assert num_bootstrap is not None
            values, nothing = _resampled(loss, budget, num_bootstrap, rng)
        values = np.where(np.isfinite(values), sign * values, np.nan)
        p5, p25, p50, p75, p95 = (float(v) for v in values)
        return BudgetRow(budget, p5, p25, p50, p75, p95, float(nothing))

    rows = tuple(row(budget) for budget in chosen)
    known = {r.budget: r.p50 for r in rows}
    doubled = []
    for budget in chosen:
        twice = 2 * budget
        if twice > num:
            doubled.append(math.nan)
        else:
            doubled.append(known[twice] if twice in known else row(twice).p50)
    values = out.value[out.order]
    return BudgetInfo(
        objective=out.objective,
        maximize=out.maximize,
        num_trials=num,
        num_infeasible=num - len(out.order),
        rows=rows,
        doubled=tuple(doubled),
        best_value=float(values[0]) if len(values) else math.nan,
        median_value=float(sign * np.median(sign * values)) if len(values) else math.nan,
        spread=_spread(study, out),
        num_bootstrap=num_bootstrap or 0,
    )


def _spread(study: Study, out: Outcomes) -> float:
    """Deviation over seeds of the best trial at its best step."""
    if study.num_seeds < 2 or out.best < 0:
        return math.nan
    index = int(np.flatnonzero(out.step == out.best_step[out.best])[0])
    values = study.data[out.objective].transpose("trial", "seed", "eval").values
    return float(values[out.best, :, index].astype(np.float64).std(ddof=1))


def _check_budgets(budgets: Sequence[int] | None, num_trials: int) -> tuple[int, ...]:
    if budgets is None:
        return default_budgets(num_trials)
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, (Sequence, np.ndarray)):
        raise _checks.ArgumentTypeError(
            f"budgets must be a list of numbers of trials, got {budgets!r}."
        )
    if not len(budgets):
        raise ValueError("budgets is empty; give numbers of trials, or None for the usual ones.")
    chosen = [_checks.check_count("budgets", budget) for budget in budgets]
    for budget in chosen:
        if budget > num_trials:
            raise ValueError(
                f"budgets = {budget} is more than the study's {num_trials} trials; leave it out, "
                "or extend the study."
            )
    return tuple(sorted(set(chosen)))


def default_min_gain(info: BudgetInfo) -> tuple[float, str]:
    """The gain that is too small to pay for twice the trials, and where it comes from.

    Args:
      info: from `budget_info`.

    Returns:
      The deviation over seeds of the best trial if it is known, because a smaller gain is luck;
      otherwise a twentieth of the way from the median trial to the best. And a phrase that says so.
    """
    if math.isfinite(info.spread):
        return info.spread, "the deviation of the best trial over seeds"
    way = abs(info.best_value - info.median_value)
    return SMALL_GAIN * way, f"{SMALL_GAIN:.0%} of the way from the median trial to the best"


def enough(info: BudgetInfo, min_gain: float) -> int | None:
    """The smallest budget from which on doubling brings no more than `min_gain`, twice at least.

    A single doubling may gain little by luck: at the end of a study it is the distance between its
    two or three best trials.

    Args:
      info: from `budget_info`.
      min_gain: in units of the objective, not below 0.

    Returns:
      The budget, or None where even the largest one that can be doubled within the study still
      gains, where none can, or where doubling it once more is more than the study has.
    """
    answer, last = None, 0
    for i, row in enumerate(info.rows):
        gain = info.gain(i)
        if math.isnan(gain):
            break
        last = row.budget
        if gain <= min_gain:
            answer = row.budget if answer is None else answer
        else:
            answer = None
    return answer if answer is not None and 2 * answer <= last else None


def budget_findings(info: BudgetInfo, min_gain: float, why: str = "as asked") -> list[Finding]:
    """Says whether the study had enough trials.

    Args:
      info: from `budget_info`.
      min_gain: as for `enough`.
      why: where `min_gain` comes from.

    Returns:
      `enough_trials` (info) or `more_trials_help` (warning), or `budget_cannot_tell` (warning)
      where no trial has a value, no budget can be doubled, or only the last doublings gained
      little.
    """
    evidence = {
        "objective": info.objective,
        "num_trials": info.num_trials,
        "num_infeasible": info.num_infeasible,
        "budgets": [r.budget for r in info.rows],
        "medians": [r.p50 for r in info.rows],
        "interquartiles": [r.interquartile for r in info.rows],
        "doubling_gains": [info.gain(i) for i in range(len(info.rows))],
        "min_gain": min_gain,
    }
    told = [i for i in range(len(info.rows)) if not math.isnan(info.gain(i))]
    answer = enough(info, min_gain)
    known = math.isfinite(info.best_value) and bool(told)
    if not known or (answer is None and info.gain(told[-1]) <= min_gain):
        reason = "no trial has a value of the objective"
        if known:
            reason = (
                f"only the last doublings within the study's {info.num_trials} trials gained no "
                f"more than {min_gain:.2g} ({why}), which may be luck"
            )
        elif math.isfinite(info.best_value):
            reason = f"no budget can be doubled within the study's {info.num_trials} trials"
        return [
            Finding(
                "budget_cannot_tell",
                "warning",
                f"How many trials are enough cannot be told: {reason}.",
                evidence,
                SECTION,
                "Run more trials, or lower the range of the learning rate if they fail.",
            )
        ]
    if answer is not None:
        row = next(r for r in info.rows if r.budget == answer)
        return [
            Finding(
                "enough_trials",
                "info",
                f"{answer} trials would have been enough: their median best {info.objective} is "
                f"{row.p50:.4g}, with half of such studies within {row.interquartile:.2g} of each "
                f"other, and doubling that or any larger budget gains no more than {min_gain:.2g} "
                f"({why}).",
                {**evidence, "answer": answer},
                SECTION,
                f"Spend about {answer} trials on the next study of this space; better or other "
                "dimensions pay more than more trials.",
            )
        ]
    last = told[-1]
    row = info.rows[last]
    gain = info.gain(last)
    much = f"gains {gain:.2g}" if math.isfinite(gain) else "finds a feasible trial at all"
    return [
        Finding(
            "more_trials_help",
            "warning",
            f"The study is too small for its space: doubling {row.budget} trials still {much} at "
            f"the median, against a smallest worthwhile gain of {min_gain:.2g} ({why}).",
            evidence,
            SECTION,
            f"Extend the study, say to {2 * info.num_trials} trials, or narrow the space.",
        )
    ]
