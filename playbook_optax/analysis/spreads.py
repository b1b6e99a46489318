"""The spread of one point over seeds, and whether a change is larger than it."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks
from playbook_optax._ties import best_evaluation, best_first, tie_breakers
from playbook_optax.analysis.outcomes import metric_names, outcomes
from playbook_optax.records.study import Study

CONFIDENCE = 0.95
"""Probability with which a further run lands between `low` and `high` of a Spread."""
MAX_EXACT = 20_000
"""Up to so many relabellings a permutation test goes through all of them; otherwise it draws so
many."""
_ROUNDING = 1e-9


class Spread(NamedTuple):
    """One point trained with several seeds.

    Attributes:
      value: mean over seeds at `best_step`, as `Study.best` gives it.
      values: the best checkpoint of each seed's own run; NaN for an infeasible one.
      mean: of `values` that are not NaN.
      std: standard deviation of these (n - 1 in the denominator): the trial variance's root. NaN
        for fewer than two.
      low: lower end of the interval in which one more run lands with 95% probability, if runs are
        about normal. NaN for fewer than two runs.
      high: upper end of it.
      best_step: the common step at which the mean over seeds is best.
      point: the hyperparameters.
      objective: the metric.
      maximize: whether larger is better.
      num_steps: steps of each run.
      num_evals: evaluations of each run, among which the best is chosen.
    """

    value: float
    values: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float
    best_step: int
    point: dict[str, Any]
    objective: str
    maximize: bool
    num_steps: int
    num_evals: int

    @property
    def num_infeasible(self) -> int:
        """Runs that broke."""
        return sum(math.isnan(value) for value in self.values)

    @property
    def losses(self) -> np.ndarray:
        """(seed,) smaller is better; infinite for an infeasible run."""
        values = np.asarray(self.values, np.float64)
        return np.where(np.isnan(values), np.inf, -values if self.maximize else values)


@_checks.named_arguments
def spread_info(
    study: Study,
    trial: int | None = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Spread | None:
    """The spread over seeds of one trial of a study.

    Args:
      study: a study with several seeds.
      trial: which trial; the best if None, or the only one.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The Spread, or None where every seed is infeasible.

    Raises:
      ValueError: one seed only, no such metric, or no trial that is feasible with all seeds.
      IndexError: there is no such trial.

    Example:
      >>> study = Study.from_arrays(
      ...     {"x": [1.0]}, {"loss": [[[3.0, 1.0], [3.0, 2.0]]]}, [0, 10], objective="loss")
      >>> spread = spread_info(study)
      >>> spread.values, spread.mean, spread.best_step
      ((1.0, 2.0), 1.5, 10)

    Source: playbook, "Determining whether to adopt a training pipeline change or hyperparameter
    configuration".
    """
    if study.num_seeds < 2:
        raise ValueError(
            "study has one seed, which has no spread; run it with num_seeds=5, or retrain its best."
        )
    out = outcomes(study, objective, maximize)
    if trial is None:
        trial = 0 if out.num_trials == 1 else study.best(objective, maximize).trial
    point = study.point(trial)
    loss = _loss_by_seed(study, trial, out.objective, out.maximize)
    values = _as_values(loss.min(axis=1), out.maximize)
    seen = ~np.isnan(values)
    if not seen.any():
        return None
    common = loss[seen].mean(axis=0)
    index = int(common.argmin())
    known = values[seen]
    std = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    mean = float(known.mean())
    reach = prediction_reach(len(known)) * std
    return Spread(
        value=float(_as_values(common[index], out.maximize)),
        values=tuple(values.tolist()),
        mean=mean,
        std=std,
        low=mean - reach,
        high=mean + reach,
        best_step=int(out.step[index]),
        point=point,
        objective=out.objective,
        maximize=out.maximize,
        num_steps=int(out.step[-1]),
        num_evals=len(out.step),
    )


def best_by_seed(
    study: Study, trial: int, objective: str | None = None, maximize: bool | None = None
) -> np.ndarray:
    """The best checkpoint of each seed of a trial.

    Args:
      study: a study, of one seed or several.
      trial: which trial.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      float64 (seed,), NaN for an infeasible one.

    Raises:
      ValueError: there is no such metric.

    Example:
      >>> study = Study.from_arrays(
      ...     {"x": [1.0]}, {"loss": [[[3.0, 1.0], [3.0, 2.0]]]}, [0, 10], objective="loss")
      >>> best_by_seed(study, 0).tolist()
      [1.0, 2.0]
    """
    out = outcomes(study, objective, maximize)
    loss = _loss_by_seed(study, trial, out.objective, out.maximize)
    return _as_values(loss.min(axis=1), out.maximize)


def best_seed(
    study: Study, trial: int, objective: str | None = None, maximize: bool | None = None
) -> int:
    """The seed of a trial with the best checkpoint; ties go as those of trials do.

    Args:
      study: a study, of one seed or several.
      trial: which trial, with a feasible seed.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      Its index.

    Raises:
      ValueError: there is no such metric.

    Example:
      >>> study = Study.from_arrays(
      ...     {"x": [1.0]}, {"loss": [[[3.0, 1.0], [3.0, 0.5]]]}, [0, 10], objective="loss")
      >>> best_seed(study, 0)
      1
    """
    out = outcomes(study, objective, maximize)
    loss = _loss_by_seed(study, trial, out.objective, out.maximize)
    others = [
        _loss_by_seed(study, trial, name, False)
        for name in tie_breakers(out.objective, metric_names(study))
    ]
    rows, best = np.arange(len(loss)), best_evaluation(loss, others)
    return int(best_first(loss[rows, best], [other[rows, best] for other in others])[0])


def _loss_by_seed(study: Study, trial: int, objective: str, maximize: bool) -> np.ndarray:
    """(seed, eval) smaller is better; infinite where there is no number or the seed broke."""
    data = study.data if "seed" in study.data.dims else study.data.expand_dims("seed")
    values = data[objective].transpose("trial", "seed", "eval").values[trial].astype(np.float64)
    broke = data["infeasible"].transpose("trial", "seed").values[trial].astype(bool)
    return np.where(np.isfinite(values) & ~broke[:, None], -values if maximize else values, np.inf)


def _as_values(loss: np.ndarray, maximize: bool) -> np.ndarray:
    """Losses as values of the objective, NaN for an infinite one; any shape."""
    return np.where(np.isfinite(loss), -loss if maximize else loss, np.nan)


def prediction_reach(num: int) -> float:
    """How many deviations a further run may lie from the mean of `num` runs, with 95% probability.

    Args:
      num: number of runs.

    Returns:
      The factor, infinite for fewer than two.

    Example:
      >>> round(prediction_reach(5), 3)
      3.041
    """
    from scipy import stats

    if num < 2:
        return math.inf
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1))
    return quantile * math.sqrt(1 + 1 / num)


class SpreadComparison(NamedTuple):
    """A candidate against a baseline.

    Attributes:
      gain: by how much the candidate's mean is better, in units of the objective; negative if
        worse, infinite if only the candidate has a feasible run.
      std: standard deviation of a single run, pooled over both; NaN if neither has two.
      p_value: probability that labels handed out at random favour the candidate as much.
      smallest_p: the smallest that so many seeds allow.
      by_rank: whether ranks were compared, because a run is infeasible, instead of means.
      num_drawn: relabellings drawn; 0 if all were gone through.
    """

    gain: float
    std: float
    p_value: float
    smallest_p: float
    by_rank: bool
    num_drawn: int


def compare_spreads(baseline: Spread, candidate: Spread) -> SpreadComparison:
    """Tests whether the candidate is better than the baseline, by permutation.

    If the change did nothing, every way to call some of the runs the candidate's is as likely as
    another, whatever their distribution. The p value is the share of the ways in which the
    candidate's mean is as much better as seen, or more. With an infeasible run, which is worse than
    any feasible one, ranks take the place of values. Runs that share seeds are not paired up, which
    errs to the safe side where they rise and fall together.

    Args:
      baseline: a Spread.
      candidate: a Spread of the same objective.

    Returns:
      The SpreadComparison.

    Raises:
      ValueError: the objectives or their directions differ.

    Example:
      >>> study = Study.from_arrays(
      ...     {"x": [0.0, 1.0]}, {"loss": [[[3.0], [4.0]], [[1.0], [2.0]]]}, [10],
      ...     objective="loss")
      >>> test = compare_spreads(spread_info(study, 0), spread_info(study, 1))
      >>> test.gain, round(test.p_value, 4)
      (2.0, 0.1667)

    Source: playbook, "Determining whether to adopt a training pipeline change or hyperparameter
    configuration" (trial variance).
    """
    ours = (baseline.objective, baseline.maximize)
    theirs = (candidate.objective, candidate.maximize)
    if ours != theirs:
        raise ValueError(
            f"candidate has the objective {theirs[0]!r} (maximize={theirs[1]}), the baseline "
            f"{ours[0]!r} (maximize={ours[1]}); give objective= when the spreads are made."
        )
    before, after = baseline.losses, candidate.losses
    together = np.concatenate([after, before])
    by_rank = not np.isfinite(together).all()
    scores = _ranks(together) if by_rank else together
    num, total = len(after), len(together)
    ways = math.comb(total, num)
    drawn = 0
    if ways <= MAX_EXACT:
        chosen = np.asarray(list(itertools.combinations(range(total), num)))
        sums = scores[chosen].sum(axis=1)
    else:
        drawn = MAX_EXACT
        order = np.argsort(np.random.default_rng(0).random((drawn, total)), axis=1)
        sums = scores[order[:, :num]].sum(axis=1)
    seen = scores[:num].sum()
    as_good = int((sums <= seen + _ROUNDING * max(abs(seen), float(np.abs(scores).max()))).sum())
    p_value = (as_good + 1) / (drawn + 1) if drawn else as_good / ways
    finite = [loss[np.isfinite(loss)] for loss in (before, after)]
    if all(len(loss) for loss in finite):
        gain = float(finite[0].mean() - finite[1].mean())
    else:
        gain = math.inf if len(finite[1]) else -math.inf
    freedom = sum(max(len(loss) - 1, 0) for loss in finite)
    squares = sum(float(((loss - loss.mean()) ** 2).sum()) for loss in finite if len(loss) > 1)
    return SpreadComparison(
        gain=gain,
        std=math.sqrt(squares / freedom) if freedom else math.nan,
        p_value=p_value,
        smallest_p=1 / (drawn + 1) if drawn else 1 / ways,
        by_rank=by_rank,
        num_drawn=drawn,
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, ties sharing the mean of theirs; infinite values are tied."""
    below = (values[:, None] > values[None]).sum(axis=1)
    same = (values[:, None] == values[None]).sum(axis=1)
    return below + (same + 1) / 2
