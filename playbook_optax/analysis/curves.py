"""Training curves of the best trials: still improving at the end, or settled early."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import mean_curve, metric_names, outcomes
from playbook_optax.records.study import Study

SECTION = "Deciding how long to train when training is not compute-bound"
BOUND_SECTION = "Determining the number of steps for each training run"
EARLY = 0.1
"""Share of training in which a best step is early."""
LATE = 0.75
"""Share of training after which a best step is late."""
AGREE = 0.8
"""Share of the good trials that must agree, the "almost all" of the playbook."""
MIN_EVALS = 8
"""Evaluations after the first update that a curve needs before its shape is judged."""
MIN_GAIN = 0.005
"""Smallest part of a curve's `scale` that an improvement in the last quarter is told of."""
MIN_DOUBLING = 0.02
"""Smallest part of a curve's `scale` that twice the steps must gain to be worth them."""
FAR = 0.01
"""Part of the whole improvement below which nothing counts, however near to perfect a curve is."""
HIGH = 0.5
"""A learning rate is high while it is at least this share of its peak."""
STEADY = 0.99
"""A learning rate that stays above this share of its peak is constant."""
HALFWAY = 0.5
"""Share of training up to which a learning rate that nobody knows is taken to be high: the usual
decays, linear and cosine, have half of their peak there."""
RATES = ("learning_rate", "lr")
"""Last parts of the names of metrics that are read as the course of the learning rate."""


class CurveRow(NamedTuple):
    """The objective's curve of one good trial.

    Attributes:
      trial: its index.
      value: its best value.
      best_step: step of that value.
      best_fraction: best_step as a share of training.
      settled_step: first evaluated step within noise of the best value: within
        1 + sqrt(2 log n) deviations, because the best of n noisy values lies sqrt(2 log n) below
        their mean; n counts the evaluations of all trials, among which the good ones were chosen.
      settled_fraction: settled_step as a share of training.
      noise: standard deviation of one evaluation around the curve, over the second half.
      last_gain: improvement over the last quarter by a straight line through it; negative if it
        got worse.
      last_gain_error: standard error of that.
      rest_gain: the same after the first tenth of training.
      rest_gain_error: standard error of that.
      total_gain: improvement from the first evaluation to the best value.
      scale: what its gains are compared with: what was still to be gained at the end, which is
        the distance of its best value from 0, or from 1 for an accuracy; no more than the total
        improvement, and no less than a hundredth of that. The fall from the first loss alone
        would dwarf all that comes later.
      worth: what twice the steps must gain to be worth them: a fiftieth of the scale, half of the
        typical noise of one evaluation, or the resolution of the objective, the largest of them.
      high_until: share of training up to which the learning rate was high, 1 for a constant one.
      high_gain: improvement for each doubling of the steps by a line, in the logarithm of the
        step, through the second half of the part of training in which the rate was high. Where
        the course of a rate that varies is known: by a line from there to the end, beside what
        goes with the rate, so that a floor of noise that falls with it is no progress.
      high_gain_error: standard error of that; infinite with fewer than four evaluations.
      flat_gain: improvement for each doubling by a line from there to the end, whatever it is from.
      flat_gain_error: standard error of that.
      improving: whether the best step is in the last quarter, the line improves by more than two
        standard errors, and by at least 0.5% of the scale.
      early: whether the curve settled within the first tenth of training, and improved by no more
        than two standard errors, or by less than 0.5% of the scale, after that.
    """

    trial: int
    value: float
    best_step: int
    best_fraction: float
    settled_step: int
    settled_fraction: float
    noise: float
    last_gain: float
    last_gain_error: float
    rest_gain: float
    rest_gain_error: float
    total_gain: float
    scale: float
    worth: float
    high_until: float
    high_gain: float
    high_gain_error: float
    flat_gain: float
    flat_gain_error: float
    improving: bool
    early: bool

    @property
    def falling(self) -> bool:
        """Whether it surely improved while the rate was high, and enough to be worth the steps."""
        return self.high_gain > 2 * self.high_gain_error and self.high_gain >= self.worth


@_shown.short
class CurveInfo(NamedTuple):
    """The curves of the good trials.

    Attributes:
      objective: the metric.
      rows: one per good trial, best first; empty if the check was skipped.
      num_steps: steps of training.
      num_early: rows that settled early.
      num_improving: rows still improving at the end.
      can_be_early: whether any evaluation falls within the first tenth of training.
      knows_rates: whether the course of the learning rate is known.
      skipped: why nothing was judged; "" if something was.
    """

    objective: str
    rows: tuple[CurveRow, ...]
    num_steps: int
    num_early: int
    num_improving: int
    can_be_early: bool
    knows_rates: bool
    skipped: str


def _noise(y: np.ndarray) -> float:
    """Deviation of single evaluations: from how far each lies off the middle of its neighbours."""
    off = y[1:-1] - (y[:-2] + y[2:]) / 2
    return float(np.sqrt(np.mean(off**2) / 1.5)) if len(off) else 0.0


def _typical_noise(y: np.ndarray) -> float:
    """The same by the median, so that a single spike does not pass for noise."""
    off = y[1:-1] - (y[:-2] + y[2:]) / 2
    return float(1.4826 * np.median(np.abs(off)) / math.sqrt(1.5)) if len(off) else 0.0


def _gain(time: np.ndarray, loss: np.ndarray, after: float, noise: float) -> tuple[float, float]:
    """How much a straight line through the end of a curve falls, and the standard error."""
    late = time >= after
    x, y = time[late], loss[late]
    spread = float(np.sum((x - x.mean()) ** 2)) if len(x) else 0.0
    if not spread:
        return 0.0, math.inf
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread)
    return -slope * (1 - after), noise / math.sqrt(spread) * (1 - after)


def _doubling_gain(
    time: np.ndarray,
    loss: np.ndarray,
    first: float,
    last: float,
    rates: np.ndarray | None = None,
) -> tuple[float, float]:
    """How much a curve falls for each doubling of the steps, and the standard error.

    A curve falls ever more slowly: between the steps n and 2n at least as much as between 2n and
    4n, where it is a power of the step. So this is what the next doubling gains at most. With
    rates, what goes with them, as the noise of training does, is fitted beside it.
    """
    inside = (time >= first * (1 - 1e-9)) & (time <= last * (1 + 1e-9)) & (time > 0)
    x, y = np.log2(time[inside]), loss[inside]
    columns = [np.ones(len(x)), x - x.mean()]
    if rates is not None:
        columns.append(rates[inside] - rates[inside].mean())
    if len(x) < len(columns) + 2:
        return 0.0, math.inf
    terms = np.stack(columns, axis=1)
    inverse = np.linalg.pinv(terms.T @ terms)
    fit = inverse @ (terms.T @ (y - y.mean()))
    rest = y - y.mean() - terms @ fit
    # Neighbours that wander together leave more beside the line than beside each other.
    noise = max(_noise(y), float(np.sqrt(np.sum(rest**2) / (len(x) - len(columns)))))
    return -float(fit[1]), noise * math.sqrt(inverse[1, 1])


class _Frame(NamedTuple):
    """What the curves of a study have in common."""

    sign: float
    num_steps: int
    perfect: float
    resolution: float
    num_trials: int


def _row(
    trial: int, step: np.ndarray, loss: np.ndarray, frame: _Frame, rates: np.ndarray | None
) -> CurveRow:
    """Judges one curve whose smaller values are better, with its rates as shares of their peak."""
    num_steps, time = frame.num_steps, step / frame.num_steps
    best = int(loss.argmin())
    noise = _noise(loss[step >= num_steps / 2])
    tolerance = noise * (1 + math.sqrt(2 * math.log(len(loss) * frame.num_trials)))
    settled = int(np.argmax(loss <= loss[best] + tolerance))
    gain, error = _gain(time, loss, LATE, noise)
    rest, rest_error = _gain(time, loss, EARLY, noise)
    total = float(loss[0] - loss[best])
    value = float(frame.sign * loss[best])
    scale = max(min(total, abs(value - frame.perfect)), FAR * total)
    high_until = HALFWAY if rates is None else float(time[np.flatnonzero(rates >= HIGH)[-1]])
    if rates is None or rates[time >= high_until / 2].min() >= STEADY:
        high_gain, high_error = _doubling_gain(time, loss, high_until / 2, high_until)
    else:
        high_gain, high_error = _doubling_gain(time, loss, high_until / 2, 1.0, rates)
    flat_gain, flat_error = _doubling_gain(time, loss, high_until / 2, 1.0)
    typical = _typical_noise(loss[time >= high_until / 2])
    improving = bool(
        step[best] > LATE * num_steps and gain > 2 * error and gain >= MIN_GAIN * scale > 0
    )
    return CurveRow(
        trial=trial,
        value=value,
        best_step=int(step[best]),
        best_fraction=float(step[best] / num_steps),
        settled_step=int(step[settled]),
        settled_fraction=float(step[settled] / num_steps),
        noise=noise,
        last_gain=gain,
        last_gain_error=error,
        rest_gain=rest,
        rest_gain_error=rest_error,
        total_gain=total,
        scale=scale,
        worth=max(MIN_DOUBLING * scale, typical / 2, frame.resolution),
        high_until=high_until,
        high_gain=high_gain,
        high_gain_error=high_error,
        flat_gain=flat_gain,
        flat_gain_error=flat_error,
        improving=improving,
        early=bool(
            step[settled] <= EARLY * num_steps
            and (rest <= 2 * rest_error or rest < MIN_GAIN * scale)
        ),
    )


def learning_rates(study: Study) -> np.ndarray | None:
    """The course of the learning rate, where a study recorded it.

    Args:
      study: the study.

    Returns:
      (trial, eval) the first metric whose name ends in ``learning_rate`` or ``lr``; None without.
    """
    named = [name for name in metric_names(study) if name.rpartition("/")[2].lower() in RATES]
    return mean_curve(study, named[0]) if named else None


def _shares(rates: np.ndarray) -> np.ndarray | None:
    """One trial's rates as shares of their peak; None where they are not known.

    What is recorded between evaluations, as means, is not known before the first update.
    """
    known = np.isfinite(rates)
    if not known[1:].all() or not rates[known].max(initial=0.0) > 0:
        return None
    filled = np.where(known, rates, rates[1])
    return np.asarray(filled / filled.max())


@np.errstate(over="ignore", invalid="ignore")  # Differences that no float holds.
def curve_info(
    study: Study,
    objective: str | None = None,
    maximize: bool | None = None,
    rates: np.ndarray | None = None,
) -> CurveInfo:
    """Measures the shape of the good trials' curves.

    The step of the best value says little by itself: on a noisy plateau it is anywhere. So the
    noise of single evaluations is estimated from the second half of each curve (how far each lies
    off the middle of its neighbours), an improvement counts beyond two of its standard errors,
    and a curve has settled where it first comes within noise of its best.

    At the end of a decay every curve is flat, since the rate is 0: so the slope at a rate that is
    still high is measured too. Where nobody knows the rates, they are taken to be high during
    the first half of training.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.
      rates: the learning rate at each evaluation, shape (trial, eval) or (eval,), in any unit;
        by default what the study recorded as ``learning_rate``.

    Returns:
      The CurveInfo over the good trials (best tenth, at least three, at most ten).

    Raises:
      ValueError: no such metric, or rates of another shape.

    Source: "Determining the number of steps for each training run".
    """
    out = outcomes(study, objective, maximize)
    num_steps = int(out.step.max()) if len(out.step) else 0
    rates = learning_rates(study) if rates is None else np.asarray(rates, np.float64)
    if rates is not None and rates.shape not in (out.curve.shape, out.curve.shape[1:]):
        raise ValueError(
            f"rates must have shape (trial, eval) = {out.curve.shape} or (eval,), got "
            f"{rates.shape}."
        )
    table = None if rates is None else np.broadcast_to(rates, out.curve.shape)
    num_after = int((out.step > 0).sum())
    can_be_early = bool(((out.step > 0) & (out.step <= EARLY * num_steps)).any())
    skipped = ""
    if out.best < 0:
        skipped = "no trial has a value"
    elif num_after < MIN_EVALS:
        skipped = (
            f"{num_after} evaluations after the first update are too few to tell a trend from "
            f"noise; {MIN_EVALS} are needed"
        )
    rows: list[CurveRow] = []
    known: list[bool] = []
    if not skipped:
        sign = -1.0 if out.maximize else 1.0
        frame = _Frame(
            sign,
            num_steps,
            perfect(out.objective),
            study.resolution(out.objective),
            len(out.order),
        )
        for trial in out.good():
            curve = sign * out.curve[trial]
            seen = np.isfinite(curve)
            # One that was stopped says nothing about the end of training.
            if seen[-1] and (seen & (out.step > 0)).sum() >= MIN_EVALS:
                course = None if table is None else _shares(table[trial][seen])
                known.append(course is not None)
                rows.append(_row(int(trial), out.step[seen], curve[seen], frame, course))
        if not rows:
            skipped = (
                f"the good trials have fewer than {MIN_EVALS} finite evaluations, or none at the "
                "end"
            )
    return CurveInfo(
        objective=out.objective,
        rows=tuple(rows),
        num_steps=num_steps,
        num_early=sum(r.early for r in rows),
        num_improving=sum(r.improving for r in rows),
        can_be_early=can_be_early,
        knows_rates=bool(rows) and all(known),
        skipped=skipped,
    )


def perfect(objective: str) -> float:
    """The value beyond which an objective cannot get better, as far as its name tells.

    Args:
      objective: name of the metric.

    Returns:
      1 for an accuracy, else 0.
    """
    return float("accuracy" in objective.rpartition("/")[2].lower())


def curve_findings(info: CurveInfo) -> list[Finding]:
    """Says whether max_train_steps looks too small or far too large.

    Args:
      info: from `curve_info`.

    Returns:
      `still_improving` or `saturated_early` (warnings) when at least 80% of the good trials agree,
      `curve_check_skipped` (info) when the curves could not be judged, or nothing.
    """
    if info.skipped:
        advice = ""
        every = info.num_steps // MIN_EVALS
        if "too few" in info.skipped and every:
            advice = f"Evaluate at least every {every} steps."
        return [
            Finding(
                "curve_check_skipped",
                "info",
                f"Whether training was long enough was not checked: {info.skipped}.",
                {"reason": info.skipped, "num_steps": info.num_steps},
                SECTION,
                advice,
            )
        ]
    num = len(info.rows)
    evidence = {
        "objective": info.objective,
        "num_steps": info.num_steps,
        "trials": [r.trial for r in info.rows],
        "best_steps": [r.best_step for r in info.rows],
        "settled_steps": [r.settled_step for r in info.rows],
        "last_gains": [r.last_gain for r in info.rows],
        "last_gain_errors": [r.last_gain_error for r in info.rows],
    }
    if info.num_improving >= AGREE * num:
        gain = float(np.median([r.last_gain for r in info.rows]))
        error = float(np.median([r.last_gain_error for r in info.rows]))
        return [
            Finding(
                "still_improving",
                "warning",
                f"{info.num_improving} of the {num} best trials were still improving at the end: "
                f"{info.objective} gained {gain:.3g} (error {error:.1g}) in the last quarter of "
                f"{info.num_steps} steps, and their best steps are all in it."
                if info.num_improving == num
                else f"{info.num_improving} of the {num} best trials were still improving at the "
                f"end: {info.objective} gained {gain:.3g} (error {error:.1g}) in the last quarter "
                f"of {info.num_steps} steps.",
                evidence,
                BOUND_SECTION,
                "Training is compute-bound at this length: if you can afford it, train longer and "
                "tune the learning rate decay again."
                if sum(row.falling for row in info.rows) >= AGREE * num
                else "While the learning rate was high that was not so, and a decay improves the "
                "end of any run: compare with a run of another length before you train longer.",
            )
        ]
    if info.can_be_early and info.num_early >= AGREE * num:
        last = max(r.settled_step for r in info.rows if r.early)
        return [
            Finding(
                "saturated_early",
                "warning",
                f"{info.num_early} of the {num} best trials were within noise of their best "
                f"{info.objective} by step {last}, in the first tenth of {info.num_steps} steps.",
                evidence,
                SECTION,
                f"Training is far too long: about {min(5 * max(last, 1), info.num_steps)} steps, "
                "five times that, leave room to spare, and the rest buys more trials.",
            )
        ]
    return []


@_shown.short
class BestCurves(NamedTuple):
    """The curves to draw for the best trials.

    Attributes:
      step: (eval,) optimizer updates before each evaluation.
      trials: indices of the trials, best first.
      values: their best values.
      best_steps: the steps of these.
      points: their hyperparameters.
      objective: name of the objective.
      maximize: whether larger is better.
      metrics: name to (num_trials, eval) curves: the objective first, then the training loss.
    """

    step: np.ndarray
    trials: tuple[int, ...]
    values: tuple[float, ...]
    best_steps: tuple[int, ...]
    points: tuple[dict[str, Any], ...]
    objective: str
    maximize: bool
    metrics: dict[str, np.ndarray]


@_checks.named_arguments
def best_curves(
    study: Study,
    num_trials: int = 5,
    objective: str | None = None,
    maximize: bool | None = None,
) -> BestCurves:
    """The objective and the training loss of the best trials, means over seeds.

    Args:
      study: the study.
      num_trials: how many trials, at most.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The BestCurves. The training loss is `train/loss`, or else `step/loss`, if recorded.

    Raises:
      ValueError: no such metric, or num_trials is not a positive integer.

    Source: "Examining the training curves".
    """
    num_trials = _checks.check_count("num_trials", num_trials)
    out = outcomes(study, objective, maximize)
    top = out.order[:num_trials]
    names = [out.objective]
    known = metric_names(study)
    losses = [n for n in ("train/loss", "step/loss") if n in known and n != out.objective]
    names += losses[:1]
    points = tuple({n: v.item() for n, v in study.point(t).items()} for t in top)
    return BestCurves(
        step=out.step,
        trials=tuple(int(t) for t in top),
        values=tuple(float(v) for v in out.value[top]),
        best_steps=tuple(int(s) for s in out.best_step[top]),
        points=points,
        objective=out.objective,
        maximize=out.maximize,
        metrics={n: mean_curve(study, n)[top] for n in names},
    )


@_shown.short
class ComparedCurves(NamedTuple):
    """Curves of runs from several studies, one metric.

    Attributes:
      metric: its name.
      maximize: whether larger is better.
      labels: what each run is called.
      steps: (eval,) of each, optimizer updates.
      curves: (eval,) of each, means over seeds.
    """

    metric: str
    maximize: bool
    labels: tuple[str, ...]
    steps: tuple[np.ndarray, ...]
    curves: tuple[np.ndarray, ...]


@_checks.named_arguments
def compared_curves(
    runs: Mapping[str, tuple[Study, int]], metric: str | None = None
) -> ComparedCurves:
    """One metric of runs from several studies, such as those of a baseline and of a remedy.

    Args:
      runs: label to (study, trial).
      metric: a metric that all of them recorded; by default ``step/loss``, else ``train/loss``,
        else the objective of the first.

    Returns:
      The ComparedCurves.

    Raises:
      ValueError: no runs, a metric that a study did not record, or no such trial.

    Source: "Examining the training curves".
    """
    if not runs:
        raise ValueError("runs is empty. Give a dict of label to (study, trial).")
    studies = [study for study, _ in runs.values()]
    if metric is None:
        common = set.intersection(*(set(metric_names(study)) for study in studies))
        known = [name for name in ("step/loss", "train/loss") if name in common]
        metric = known[0] if known else studies[0].objective
    curves = []
    for label, (study, trial) in runs.items():
        if not 0 <= trial < study.num_trials:
            raise ValueError(
                f"runs[{label!r}] = trial {trial} must lie in [0, {study.num_trials}), the trials "
                "of its study."
            )
        curves.append(mean_curve(study, metric)[trial])
    return ComparedCurves(
        metric=metric,
        maximize=metric == studies[0].objective and studies[0].maximize,
        labels=tuple(runs),
        steps=tuple(np.asarray(study.data["step"].values) for study in studies),
        curves=tuple(curves),
    )
