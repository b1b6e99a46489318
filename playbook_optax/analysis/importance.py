"""Which hyperparameters matter, which do not, and when the trials cannot tell."""

import functools
from typing import NamedTuple

import numpy as np

from playbook_optax import _shown
from playbook_optax.analysis.axes import Axis, axis, hyperparameters
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records.study import Study

SECTION = "Extracting insight from experimental results"
LEVEL = 0.05
SMALL = 0.2
"""A hyperparameter that surely explains less than this share does not matter."""
# Farther than this outside its range a trial says nothing about the range, and its square, summed
# over trials, leaves no digit for the others.
_MAX_UNIT = 1e3
MIN_FREEDOM = 8
"""Residual degrees of freedom that the fit needs before it is believed."""
MIN_OWN = 0.1
"""Part of a hyperparameter's variation that the others must leave before it is said to do nothing:
of two that vary together either may do what the other seems to."""
MIN_SWEEP = 5
"""Trials of a sweep of one hyperparameter before an order among them can be more than chance."""
NUM_DRAWS = 1999
# What rounding leaves of a fit that is exact.
_ROUNDING = 1e-10


class ImportanceRow(NamedTuple):
    """How much one hyperparameter matters.

    Attributes:
      name: the hyperparameter.
      share: share of the variance of the trials' ranks that it explains, out of what the other
        hyperparameters leave, in the sample; 0 to 1.
      upper: upper 95% confidence limit of that share.
      p_value: chance of such a share if it did nothing (F test). In a sweep of nothing else twice
        the smaller one of that and of the chance that neighbours would be as alike in rank.
      num_terms: terms that it has in the fit.
      verdict: "sensitive", "insensitive", "cannot tell" or "not varied".
    """

    name: str
    share: float
    upper: float
    p_value: float
    num_terms: int
    verdict: str


@_shown.short
class ImportanceInfo(NamedTuple):
    """How much each hyperparameter matters.

    Attributes:
      objective: the metric.
      rows: one per hyperparameter.
      num_trials: trials in the fit, infeasible ones included.
      num_needed: trials from which on a hyperparameter that does nothing would usually be called
        insensitive; 0 if nothing varies.
    """

    objective: str
    rows: tuple[ImportanceRow, ...]
    num_trials: int
    num_needed: int


def _terms(line: Axis) -> np.ndarray:
    """(trial, num_terms) regressors: linear and quadratic, or one indicator per further choice.

    There is none where the values lie in no places that could be compared.
    """
    if line.kind == "categorical":
        seen = np.unique(line.values)
        return (line.values[:, None] == seen[None, 1:]).astype(np.float64)
    levels = len(np.unique(line.unit))
    if levels < 2 or not np.all(np.abs(line.unit) <= _MAX_UNIT):
        return np.empty((len(line.unit), 0))
    x = line.unit - line.unit.mean()
    return np.stack([x, x**2], axis=1)[:, : min(levels - 1, 2)]


def _residual(terms: list[np.ndarray], y: np.ndarray) -> float:
    """Sum of squares that a fit with an intercept leaves."""
    x = np.concatenate([np.ones((len(y), 1)), *terms], axis=1)
    coef, *_ = np.linalg.lstsq(x, y, rcond=None)
    return float(np.sum((y - x @ coef) ** 2))


def _upper_share(f: float, num: int, freedom: int) -> float:
    """Upper 95% limit of the explained share, by inverting the noncentral F distribution.

    1 where SciPy cannot tell.
    """
    from scipy import optimize, stats

    def excess(noncentrality: float) -> float:
        return float(stats.ncf.cdf(f, num, freedom, noncentrality)) - LEVEL

    if stats.f.cdf(f, num, freedom) <= LEVEL:
        return 0.0
    low, high = 1e-9, 10.0
    while excess(high) > 0:
        high *= 2
    if not excess(low) > 0 >= excess(high):
        return 1.0
    effect = optimize.brentq(excess, low, high) / (num + freedom + 1)
    return float(effect / (1 + effect))


def _own_part(terms: np.ndarray, others: list[np.ndarray]) -> float:
    """The part of a hyperparameter's variation that the others leave."""
    whole = sum(_residual([], column) for column in terms.T)
    return sum(_residual(others, column) for column in terms.T) / whole if whole else 0.0


def _neighbours_alike(values: np.ndarray, ranks: np.ndarray) -> float:
    """Chance that neighbours along a hyperparameter are as alike in rank as they are.

    In a sweep an optimum, a cliff and a plateau all make neighbours alike, whatever their shape.
    Trials of one value stand in an order of their own, the same for all.
    """
    order = np.argsort(values, kind="stable")
    seen = ranks[order]
    if len(seen) < MIN_SWEEP or np.ptp(seen) == 0:
        return 1.0
    rng = np.random.default_rng(0)
    drawn = seen[rng.random((NUM_DRAWS, len(seen))).argsort(axis=1)]
    alike = np.abs(np.diff(drawn, axis=1)).sum(axis=1) <= np.abs(np.diff(seen)).sum()
    return float((1 + alike.sum()) / (1 + NUM_DRAWS))


@functools.lru_cache(maxsize=64)
def _num_needed(num: int, others: int) -> int:
    """Fewest trials at which an effect of nothing, at its median F, has an upper limit < SMALL."""
    from scipy import stats

    trials = num + others + 1 + MIN_FREEDOM
    while True:
        freedom = trials - num - others - 1
        if _upper_share(float(stats.f.median(num, freedom)), num, freedom) < SMALL:
            return trials
        trials += 4


def importance_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> ImportanceInfo:
    """Measures how much of the trials' ranking each hyperparameter explains.

    Trials are ranked by the objective, all infeasible ones tied for last, and the ranks are fitted
    by a linear and a quadratic term per hyperparameter on its scale (one level each for a
    categorical). A hyperparameter's share is what its terms take off the residual of all others.
    It is sensitive if an F test at 5%, shared by all hyperparameters, says so; insensitive only
    if the upper 95% confidence limit of its share is below 0.2 and there are enough trials for
    that to be usual, not luck; otherwise the trials cannot tell.
    Where only one hyperparameter varies it is also sensitive if neighbours along it are more alike
    in rank than chance makes them, whatever the shape of its effect; five trials can show that.
    One that varies together with others is never called insensitive.
    Effects that show only in combination, or that go up and down repeatedly, escape the fit.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The ImportanceInfo.

    Raises:
      ValueError: no such metric.

    Source: "Extracting insight from experimental results".
    """
    from scipy import stats

    out = outcomes(study, objective, maximize)
    used = out.usable | out.infeasible
    ranks = stats.rankdata(np.where(out.infeasible, np.inf, out.loss)[used])
    lines = [axis(study, name) for name in hyperparameters(study)]
    names = [line.name for line in lines]
    lines = [line._replace(values=line.values[used], unit=line.unit[used]) for line in lines]
    varied = {a.name: _terms(a) for a in lines if len(np.unique(a.values)) > 1}
    widths = {n: t.shape[1] for n, t in varied.items()}
    freedom = len(ranks) - 1 - sum(widths.values())
    whole = _residual(list(varied.values()), ranks) if freedom > 0 and varied else 0.0
    needs = {n: _num_needed(w, sum(widths.values()) - w) for n, w in widths.items() if w}
    spread = float(np.sum((ranks - ranks.mean()) ** 2)) if len(ranks) else 0.0
    # Along the only hyperparameter that varies the order of the trials says more than a fit.
    sweep = 1.0
    if len(varied) == 1:
        (line,) = [line for line in lines if line.name in varied]
        sweep = 1.0 if line.kind == "categorical" else _neighbours_alike(line.values, ranks)
    rows = []
    for name in names:
        if name not in varied:
            rows.append(ImportanceRow(name, 0.0, 1.0, 1.0, 0, "not varied"))
            continue
        num, own = widths[name], varied[name]
        if num == 0 or freedom < MIN_FREEDOM or spread == 0:
            verdict = "sensitive" if num and sweep <= LEVEL else "cannot tell"
            rows.append(ImportanceRow(name, 0.0, 1.0, min(sweep, 1.0), num, verdict))
            continue
        others = [t for n, t in varied.items() if n != name]
        rest = _residual(others, ranks)
        # Where the others explain everything, rounding is all that is left.
        gain = max(rest - whole, 0.0) if rest > _ROUNDING * spread else 0.0
        share = gain / rest if gain else 0.0
        f = (gain / num) / (whole / freedom) if whole > 1e-12 * rest else np.inf
        f = f if gain else 0.0
        p_value = min(float(stats.f.sf(f, num, freedom)), 1.0)
        if len(varied) == 1:
            p_value = min(2 * min(p_value, sweep), 1.0)
        upper = _upper_share(float(f), num, freedom) if np.isfinite(f) else 1.0
        if p_value <= LEVEL / len(varied):
            verdict = "sensitive"
        elif upper < SMALL and len(ranks) >= needs[name] and _own_part(own, others) >= MIN_OWN:
            verdict = "insensitive"
        else:
            verdict = "cannot tell"
        rows.append(ImportanceRow(name, share, upper, p_value, num, verdict))
    return ImportanceInfo(out.objective, tuple(rows), len(ranks), max(needs.values(), default=0))


def importance_findings(info: ImportanceInfo) -> list[Finding]:
    """Says which hyperparameters do not matter, and for which the trials cannot tell.

    Args:
      info: from `importance_info`.

    Returns:
      `insensitive_hyperparameter` (info) for each insensitive one, and one
      `importance_cannot_tell` (info) that names those that more trials would settle.
    """
    found = []
    for row in info.rows:
        if row.verdict != "insensitive":
            continue
        found.append(
            Finding(
                "insensitive_hyperparameter",
                "info",
                f"{row.name} hardly matters in this range: it explains {row.share:.0%} of the "
                f"variance of the ranks of {info.num_trials} trials (at most {row.upper:.0%} with "
                f"95% confidence, p = {row.p_value:.2g}).",
                {**row._asdict(), "num_trials": info.num_trials, "objective": info.objective},
                SECTION,
                f"Fix {row.name} at the best trial's value and spend the trials on the others.",
            )
        )
    open_rows = [r for r in info.rows if r.verdict == "cannot tell"]
    if open_rows:
        names = ", ".join(r.name for r in open_rows)
        more = info.num_trials < info.num_needed
        found.append(
            Finding(
                "importance_cannot_tell",
                "info",
                f"{info.num_trials} trials cannot tell whether {names} "
                f"{'matters' if len(open_rows) == 1 else 'matter'}.",
                {
                    "names": [r.name for r in open_rows],
                    "num_trials": info.num_trials,
                    "num_needed": info.num_needed,
                    "uppers": [r.upper for r in open_rows],
                    "p_values": [r.p_value for r in open_rows],
                },
                SECTION,
                f"About {info.num_needed} trials would usually settle it." if more else "",
            )
        )
    return found
