"""Whether runs have the right length: best steps, compute-bound or not, checkpoints dense enough.

The curves are judged once, by `curve_info`; this module counts and words what it says.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.curves import (
    AGREE,
    BOUND_SECTION,
    EARLY,
    LATE,
    MIN_EVALS,
    MIN_GAIN,
    SECTION,
    CurveInfo,
    curve_info,
)
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study

NUM_BINS = 20
"""Bins of the distribution of best steps: 5% of training each, so that 10% and 75% are edges."""
MIN_PAIRS = 2
"""Points that two studies of different length must have in common, without seeds, before what the
longer one gained is believed."""


@_shown.short
class BestStepInfo(NamedTuple):
    """Where in training the best evaluations lie.

    Attributes:
      objective: the metric.
      num_steps: steps of training.
      trials: (good,) indices of the good trials, best first.
      best_steps: (good,) step of the best evaluation of each.
      fractions: (good,) the same as a share of training.
      all_fractions: (usable,) the same of every trial that has a value, best trial first.
      edges: (21,) edges of the bins, shares of training; a bin holds its upper edge.
      counts: (20,) every trial that has a value.
      good_counts: (20,) the good ones.
      num_first_tenth: good trials whose best step is in the first tenth.
      num_last_quarter: good trials whose best step is in the last quarter.
      largest_gap: largest distance between two evaluations, as a share of training.
      curves: what `curve_info` says of the good trials.
    """

    objective: str
    num_steps: int
    trials: np.ndarray
    best_steps: np.ndarray
    fractions: np.ndarray
    all_fractions: np.ndarray
    edges: np.ndarray
    counts: np.ndarray
    good_counts: np.ndarray
    num_first_tenth: int
    num_last_quarter: int
    largest_gap: float
    curves: CurveInfo


@_checks.named_arguments
def best_step_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> BestStepInfo:
    """The distribution of the steps that retrospective checkpoint selection finds.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The BestStepInfo. The good trials are the best tenth, at least three, at most ten.

    Raises:
      ValueError: no such metric, or its direction has to be said.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"x": np.arange(3)}, {"loss": np.tile(np.linspace(2, 1, 11), (3, 1))},
      ...     np.arange(0, 101, 10), objective="loss")
      >>> info = best_step_info(study)
      >>> info.fractions.tolist(), info.num_last_quarter
      ([1.0, 1.0, 1.0], 3)

    Source: "Deciding how long to train when training is not compute-bound".
    """
    out = outcomes(study, objective, maximize)
    step = np.asarray(out.step, np.int64)
    num_steps = max(int(step[-1]), 1) if len(step) else 1
    good = out.good()

    def counted(trials: np.ndarray) -> np.ndarray:
        # In whole numbers, so that a best step on an edge falls to the bin that it ends.
        place = -(-out.best_step[trials].astype(np.int64) * NUM_BINS // num_steps) - 1
        return np.bincount(np.maximum(place, 0), minlength=NUM_BINS)

    fractions = out.best_step[good] / num_steps
    return BestStepInfo(
        objective=out.objective,
        num_steps=num_steps,
        trials=good,
        best_steps=out.best_step[good].astype(np.int64),
        fractions=fractions,
        all_fractions=out.best_step[out.order] / num_steps,
        edges=np.arange(NUM_BINS + 1) / NUM_BINS,
        counts=counted(out.order),
        good_counts=counted(good),
        num_first_tenth=int((fractions <= EARLY).sum()),
        num_last_quarter=int((fractions > LATE).sum()),
        largest_gap=float(np.diff(step).max(initial=0) / num_steps),
        curves=curve_info(study, objective, maximize),
    )


@_shown.short
class TrainingLengthInfo(NamedTuple):
    """Whether training is compute-bound at the length of a study.

    Attributes:
      compute_bound: True where more steps would still help, False where they would not, None where
        it cannot be told.
      reason: why it cannot be told; "" if it can.
      basis: what it was told by: ``"lengths"``, two studies of different length, or ``"curves"``.
      objective: the metric.
      num_steps: steps of training.
      trials: the good trials that were judged, best first.
      num_improving: how many of them were still improving at the end.
      num_falling: how many of them were surely improving while their learning rate was high.
      num_early: how many settled within the first tenth.
      doubling_gain: what the objective gained for each doubling of the steps: by two studies, or
        by the good trials' curves from the second half of the part with a high rate on to the end,
        their mean. An upper limit of what twice the steps would gain, since gains shrink. NaN
        where nothing was judged.
      doubling_gain_error: standard error of that.
      worth: the gain that would be worth twice the steps (`CurveRow.worth`), mean over the trials.
      knows_rates: whether the course of the learning rates is known.
      settled_steps: steps at which they came within noise of their best.
    """

    compute_bound: bool | None
    reason: str
    basis: str
    objective: str
    num_steps: int
    trials: tuple[int, ...]
    num_improving: int
    num_falling: int
    num_early: int
    doubling_gain: float
    doubling_gain_error: float
    worth: float
    knows_rates: bool
    settled_steps: tuple[int, ...]


@_checks.named_arguments
def training_length_info(
    study: Study,
    objective: str | None = None,
    maximize: bool | None = None,
    *,
    rates: np.ndarray | None = None,
    shorter: Study | None = None,
) -> TrainingLengthInfo:
    """Tells whether training is compute-bound at the length of a study.

    A curve that is flat at its end is no evidence by itself: where the learning rate decays, every
    curve is, and noise may hide a gain. So training is called saturated only if the good trials
    together surely gain, two standard errors included, less for each doubling of the steps than
    would be worth it, from a time on at which the learning rate was still high; compute-bound only
    if 80% of them surely improved both while it was high and at the end. Where nobody knows the
    rates, they are taken to be high until half of the steps are done. A shorter study decides by
    itself, whatever the schedule: what twice the steps gained then has been measured.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.
      rates: the course of the learning rates; see `curve_info`.
      shorter: a study of the same workload with fewer steps, each under a whole schedule of its
        own. Where points of both agree these are compared.

    Returns:
      The TrainingLengthInfo.

    Raises:
      ValueError: no such metric, its direction has to be said, or `shorter` is not shorter.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> step = np.arange(0, 101, 5)
      >>> def bound(curve):
      ...     study = Study.from_arrays(
      ...         {"x": np.arange(3)}, {"loss": np.tile(curve, (3, 1))}, step, objective="loss")
      ...     return training_length_info(study).compute_bound
      >>> bound(2 - step / 100), bound(np.where(step < 20, 2.0, 1.0)), bound(np.ones(21))
      (True, False, False)

    Source: "Determining the number of steps for each training run".
    """
    curves = curve_info(study, objective, maximize, rates)
    rows = curves.rows
    num_falling = sum(row.falling for row in rows)
    gain = error = worth = math.nan
    if rows:
        gain = float(np.mean([row.flat_gain for row in rows]))
        error = math.sqrt(sum(row.flat_gain_error**2 for row in rows)) / len(rows)
        worth = float(np.mean([row.worth for row in rows]))
    told = _Told(None, curves.skipped, gain, error)
    if rows:
        told = _by_curves(curves, num_falling, told, worth)
    basis = "curves"
    if shorter is not None:
        comparison = compare_lengths(shorter, study, objective, maximize)
        measured = _by_lengths(comparison, worth)
        if measured.compute_bound is not None or not rows:
            told, basis = measured, "lengths"
    return TrainingLengthInfo(
        compute_bound=told.compute_bound,
        reason=told.reason,
        basis=basis,
        objective=curves.objective,
        num_steps=curves.num_steps,
        trials=tuple(row.trial for row in rows),
        num_improving=curves.num_improving,
        num_falling=num_falling,
        num_early=curves.num_early,
        doubling_gain=told.gain,
        doubling_gain_error=told.error,
        worth=worth,
        knows_rates=curves.knows_rates,
        settled_steps=tuple(row.settled_step for row in rows),
    )


class _Told(NamedTuple):
    """A verdict on the length, its reason if there is none, and the gain that it rests on."""

    compute_bound: bool | None
    reason: str
    gain: float
    error: float


def _by_curves(curves: CurveInfo, num_falling: int, seen: _Told, worth: float) -> _Told:
    """What the curves of the good trials say."""
    num = len(curves.rows)
    both = sum(row.improving and row.falling for row in curves.rows)
    if both >= AGREE * num:
        return seen._replace(compute_bound=True)
    if seen.gain + 2 * seen.error <= worth + 1e-9 * abs(curves.rows[0].value):
        return seen._replace(compute_bound=False)
    if curves.num_improving < AGREE * num <= num_falling and not curves.knows_rates:
        reason = (
            f"{num_falling} of the {num} best trials improved in the middle of training, and "
            f"{curves.num_improving} still did at the end: that is saturation if the learning rate "
            "was constant, and no more than the end of a decay otherwise"
        )
    elif num_falling < AGREE * num <= curves.num_improving:
        reason = (
            f"{curves.num_improving} of the {num} best trials were still improving at the end, but "
            f"only {num_falling} while the learning rate was high: that is what a decay does by "
            "itself"
        )
    else:
        reason = (
            f"{both} of the {num} best trials were surely still improving, of which {AGREE:.0%} "
            f"would have to be, and all together may gain {seen.gain:.2g} ± {2 * seen.error:.1g} "
            f"from twice the steps, where {worth:.2g} would be worth them"
        )
    return seen._replace(reason=reason)


def _by_lengths(info: "LengthComparison", worth: float) -> _Told:
    """What two studies of different length say."""
    doublings = math.log2(info.num_steps[1] / info.num_steps[0])
    gain, error = info.gain / doublings, info.gain_error / doublings
    told = _Told(None, "", gain, error)
    worth = max(worth, info.resolution) if math.isfinite(worth) else info.resolution
    if not math.isfinite(error):
        return told._replace(
            reason="the two studies have too few points in common, and no seeds, to tell a gain "
            "from luck"
        )
    if gain > 2 * error and gain >= worth:
        return told._replace(compute_bound=True)
    if gain + 2 * error <= worth:
        return told._replace(compute_bound=False)
    return told._replace(
        reason=f"twice the steps gained {gain:.2g} ± {2 * error:.1g}, where {worth:.2g} would be "
        "worth them"
    )


def training_length_findings(info: TrainingLengthInfo) -> list[Finding]:
    """Says whether training is compute-bound.

    Args:
      info: from `training_length_info`.

    Returns:
      One Finding of severity info: `compute_bound`, `not_compute_bound` or
      `compute_bound_unknown`.
    """
    num, at = len(info.trials), f"at {info.num_steps} steps"
    gained = f"{info.doubling_gain:.2g} ± {2 * info.doubling_gain_error:.1g}"
    if info.compute_bound is None:
        code = "compute_bound_unknown"
        message = f"Whether training is compute-bound {at} cannot be told: {info.reason}."
        advice = (
            "Train the best points for half or twice as many steps, each under its whole schedule, "
            "and compare: refine_num_steps takes both studies (shorter=)."
        )
    elif info.compute_bound:
        code = "compute_bound"
        by = (
            f"{info.num_improving} of the {num} best trials were still improving their "
            f"{info.objective} at the end"
        )
        if info.basis == "lengths":
            by = f"twice the steps gained {gained} of {info.objective}"
        message = f"Training is compute-bound {at}: {by}."
        advice = (
            "The best length is as long as you can afford. Tune in one to three rounds of growing "
            "length, the first with about a tenth of the steps."
        )
    else:
        code = "not_compute_bound"
        by = (
            f"the {num} best trials had saturated in {info.objective}, which gained {gained} for "
            "each doubling of the steps since a time when the learning rate was high, and were "
            f"within noise of their best by step {max(info.settled_steps, default=0)}"
        )
        if info.basis == "lengths":
            by = f"twice the steps gained {gained} of {info.objective}"
        message = f"Training is not compute-bound {at}: {by}."
        advice = (
            f"Twice the steps would gain less than {info.worth:.2g}: spend them on more trials."
        )
    return [Finding(code, "info", message, info._asdict(), BOUND_SECTION, advice)]


@_shown.short
class CheckpointInfo(NamedTuple):
    """Whether evaluations are frequent enough for retrospective checkpoint selection.

    Attributes:
      objective: the metric.
      num_steps: steps of training.
      num_evals: evaluations after the first update.
      trials: the good trials that were judged, best first.
      dips: (good,) how much better each trial's best evaluation is than the better one of its two
        neighbours.
      noise: (good,) standard deviation of one evaluation.
      missed: (good,) what a best between two evaluations would add at most to these: an eighth of
        the second difference around the best one, as of a parabola.
      sparse: (good,) whether the best is a dip that noise does not explain.
      best_so_far: (trial, eval) the best value up to each evaluation, which is what retrospective
        selection returns from a run that ends there: it never gets worse. NaN before the first
        finite value, and for infeasible trials.
    """

    objective: str
    num_steps: int
    num_evals: int
    trials: tuple[int, ...]
    dips: np.ndarray
    noise: np.ndarray
    missed: np.ndarray
    sparse: np.ndarray
    best_so_far: np.ndarray


@_checks.named_arguments
def checkpoint_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> CheckpointInfo:
    """Measures whether the best checkpoint may have been missed between two evaluations.

    Longer training never hurts under retrospective checkpoint selection when checkpoints are
    frequent enough. They are not where a trial's best evaluation stands alone: better than both
    of its neighbours by more than the best of n noisy values stands out by chance.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The CheckpointInfo.

    Raises:
      ValueError: no such metric, or its direction has to be said.

    Source: "Deciding how long to train when training is not compute-bound" (retrospective
      checkpoint selection).
    """
    out = outcomes(study, objective, maximize)
    sign = -1.0 if out.maximize else 1.0
    rows = curve_info(study, objective, maximize).rows
    dips, missed, sparse = [], [], []
    for row in rows:
        curve = sign * out.curve[row.trial]
        curve = curve[np.isfinite(curve)]
        best = int(curve.argmin())
        dip = second = 0.0
        if 0 < best < len(curve) - 1:
            left, right = curve[best - 1] - curve[best], curve[best + 1] - curve[best]
            dip, second = float(min(left, right)), float(left + right)
        chance = row.noise * (1 + math.sqrt(2 * math.log(len(curve))))
        dips.append(dip)
        missed.append(second / 8)
        sparse.append(dip > max(chance, MIN_GAIN * row.scale))
    loss = np.where(np.isfinite(out.curve), sign * out.curve, np.inf)
    loss[out.infeasible] = np.inf
    running = np.minimum.accumulate(loss, axis=1)
    return CheckpointInfo(
        objective=out.objective,
        num_steps=int(out.step[-1]) if len(out.step) else 0,
        num_evals=int((out.step > 0).sum()),
        trials=tuple(row.trial for row in rows),
        dips=np.asarray(dips, np.float64),
        noise=np.asarray([row.noise for row in rows], np.float64),
        missed=np.asarray(missed, np.float64),
        sparse=np.asarray(sparse, bool),
        best_so_far=np.where(np.isfinite(running), sign * running, np.nan),
    )


def checkpoint_findings(info: CheckpointInfo) -> list[Finding]:
    """Says whether evaluations are too sparse for retrospective checkpoint selection.

    Args:
      info: from `checkpoint_info`.

    Returns:
      `checkpoints_too_sparse` (warning) where there are fewer than eight evaluations, or where the
      best ones of most good trials stand alone; or nothing.
    """
    every = max(info.num_steps // max(2 * info.num_evals, MIN_EVALS), 1)
    if info.num_evals >= info.num_steps:
        return []  # Every step was evaluated.
    evidence = {
        "num_evals": info.num_evals,
        "num_steps": info.num_steps,
        "trials": info.trials,
        "dips": info.dips,
        "noise": info.noise,
        "missed": info.missed,
    }
    if info.num_evals < MIN_EVALS:
        why = f"there are only {info.num_evals}"
    elif len(info.sparse) and info.sparse.sum() > len(info.sparse) / 2:
        why = (
            f"in {info.sparse.sum()} of the {len(info.sparse)} best trials {info.objective} at the "
            f"best one is better than at both of its neighbours by {np.median(info.dips):.3g}, "
            f"more than its noise of {np.median(info.noise):.2g} explains, so that the true best "
            "may lie between two evaluations"
        )
    else:
        return []
    return [
        Finding(
            "checkpoints_too_sparse",
            "warning",
            f"Evaluations are too sparse for retrospective checkpoint selection: {why}.",
            evidence,
            SECTION,
            f"Evaluate at least every {every} steps; only then does longer training never hurt.",
        )
    ]


@_shown.short
class LengthComparison(NamedTuple):
    """The best results of a shorter and of a longer study.

    Attributes:
      objective: the metric.
      maximize: whether larger is better.
      num_steps: lengths of the two, the shorter first.
      values: best values of the two.
      error: standard error of their difference: from the spread over seeds where both have seeds,
        else from the noise of single evaluations, which is a lower bound.
      worse: whether the longer is worse by more than two errors.
      pairs: (pair, 2) trials of the two that have the same point and a value.
      gain: by how much the longer runs of these are better, their mean; of the two best trials
        where no point is common. NaN where a study has no value.
      gain_error: standard error of that, widened such that two of it hold with 95% probability
        however few the pairs are; infinite where it is not known: for fewer than two pairs without
        seeds.
      resolution: smallest difference of the objective that there can be; 0 where it is not known.
    """

    objective: str
    maximize: bool
    num_steps: tuple[int, int]
    values: tuple[float, float]
    error: float
    worse: bool
    pairs: np.ndarray
    gain: float
    gain_error: float
    resolution: float


def _pairs(outs: list[Outcomes], studies: tuple[Study, Study]) -> np.ndarray:
    """(pair, 2) trials of two studies that have the same point and a value."""
    names = sorted(set(studies[0].points) & set(studies[1].points))
    if not names or set(studies[0].points) != set(studies[1].points):
        return np.empty((0, 2), int)
    places: list[dict[tuple[Any, ...], int]] = []
    for study, out in zip(studies, outs, strict=True):
        columns = [study.points[name].tolist() for name in names]
        points = list(zip(*columns, strict=True))
        places.append({points[t]: int(t) for t in out.order[::-1]})
    both = [point for point in places[1] if point in places[0]]
    return np.asarray([[of[point] for of in places] for point in both], int).reshape(-1, 2)


def _error_of_mean(differences: np.ndarray) -> float:
    """Half of the reach of a 95% interval of the mean of a few differences."""
    from scipy import stats

    num = len(differences)
    if num < MIN_PAIRS:
        return math.inf
    deviation = float(differences.std(ddof=1)) / math.sqrt(num)
    return deviation * float(stats.t.ppf(0.975, num - 1)) / 2


@_checks.named_arguments
def compare_lengths(
    shorter: Study, longer: Study, objective: str | None = None, maximize: bool | None = None
) -> LengthComparison:
    """Compares the best results of two studies of different length.

    Args:
      shorter: the study with fewer steps.
      longer: the study with more.
      objective: a metric that both recorded; the shorter one's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The LengthComparison; its values are NaN, and nothing is worse, where a study has none.

    Raises:
      ValueError: no such metric, its direction has to be said, or `longer` is not longer.

    Source: "Deciding how long to train when training is not compute-bound" (performance should
      never degrade when training longer).
    """
    objective = shorter.objective if objective is None else objective
    if maximize is None and objective == shorter.objective:
        maximize = shorter.maximize
    values, lengths, errors, outs = [], [], [], []
    for study in (shorter, longer):
        out = outcomes(study, objective, maximize)
        outs.append(out)
        lengths.append(int(out.step[-1]))
        values.append(float(out.value[out.best]) if out.best >= 0 else math.nan)
        rows = curve_info(study, objective, maximize).rows
        errors.append(rows[0].noise if rows else 0.0)
        if study.num_seeds > 1 and out.best >= 0:
            best = study.best(objective, out.maximize)
            assert best.spread is not None
            errors[-1] = best.spread / math.sqrt(best.num_seeds)
        maximize = out.maximize
    if lengths[1] <= lengths[0]:
        raise ValueError(
            f"longer has {lengths[1]} steps, which is not more than the {lengths[0]} of shorter; "
            "give the studies in the order of their length."
        )
    lost = values[0] - values[1] if maximize else values[1] - values[0]
    error = math.hypot(*errors)
    pairs = _pairs(outs, (shorter, longer))
    gain, gain_error = -lost, math.inf
    if len(pairs):
        differences = outs[0].loss[pairs[:, 0]] - outs[1].loss[pairs[:, 1]]
        gain, gain_error = float(differences.mean()), _error_of_mean(differences)
    if shorter.num_seeds > 1 and longer.num_seeds > 1 and not math.isfinite(gain_error):
        gain, gain_error = -lost, error
    return LengthComparison(
        objective=objective,
        maximize=bool(maximize),
        num_steps=(lengths[0], lengths[1]),
        values=(values[0], values[1]),
        error=error,
        worse=bool(lost > 2 * error),  # False for NaN
        pairs=pairs,
        gain=gain,
        gain_error=gain_error,
        resolution=max(s.resolution(objective) for s in (shorter, longer)),
    )


def length_findings(info: LengthComparison) -> list[Finding]:
    """Says where longer training gave a worse result, which it should not.

    Args:
      info: from `compare_lengths`.

    Returns:
      `longer_was_worse` (warning), or nothing.
    """
    if not info.worse:
        return []
    return [
        Finding(
            "longer_was_worse",
            "warning",
            f"The best {info.objective} in {info.num_steps[1]} steps, {info.values[1]:.4g}, is "
            f"worse than in {info.num_steps[0]} steps, {info.values[0]:.4g}. Under retrospective "
            "checkpoint selection longer training should never hurt.",
            info._asdict(),
            SECTION,
            "Evaluate as often in steps as the shorter runs did, and tune the learning rate and "
            "its decay again: a stretched schedule is another one.",
        )
    ]
