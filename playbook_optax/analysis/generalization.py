"""Curves of the best trials late in training: overfitting, and luck in the step that is best."""

import math
from typing import NamedTuple

import numpy as np

from playbook_optax import _shown
from playbook_optax.analysis.curves import AGREE, MIN_EVALS, _noise, perfect
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import Outcomes, mean_curve, metric_names, outcomes
from playbook_optax.records.study import Study

SECTION = "Examining the training curves"
WINDOW = 0.2
"""Share of the evaluations over which a curve is averaged before two parts of it are compared."""
ERRORS = 4.0
"""A rise counts beyond so many standard errors. The best of several windows is lower by luck, and
neighbouring evaluations of a slow model share theirs, so that two would not do."""
PROBLEMATIC = 0.05
"""Part of a curve's whole improvement that a rise has to undo before it is a problem."""
UNIMPROVED = 0.2
"""Part of its best value by which an objective that never improved has to rise to be a problem."""
MIN_WANDER = 8
"""Evaluations from the best stretch on that it takes to see a curve wander."""
VISIBLE = 0.01
"""Part of a curve's whole improvement below which noise cannot be seen in it."""
RANKING = 0.5
"""Part of the way from best trial to median trial that noise may be before ranks are luck."""


class OverfittingRow(NamedTuple):
    """One good trial.

    Attributes:
      trial: its index.
      best_step: the step in the middle of the best stretch of its objective.
      rise: by how much the objective is worse in the last stretch than in the best one.
      rise_error: standard error of that.
      undone: the rise as a share of the whole improvement before it; 1 where there was none beyond
        noise.
      training_gain: by how much the training loss improved meanwhile.
      overfitting: whether the objective got worse by more than four errors and a twentieth of its
        improvement (by a fifth of its best value where it had not improved beyond noise), while
        the training loss improved beyond its own noise.
    """

    trial: int
    best_step: int
    rise: float
    rise_error: float
    undone: float
    training_gain: float
    overfitting: bool


@_shown.short
class OverfittingInfo(NamedTuple):
    """Whether the good trials overfit.

    Attributes:
      objective: the metric.
      training: the training loss that it is compared with.
      rows: one per good trial, best first; empty if nothing was judged.
      num_steps: steps of training.
      skipped: why nothing was judged; "" if something was.
    """

    objective: str
    training: str
    rows: tuple[OverfittingRow, ...]
    num_steps: int
    skipped: str

    @property
    def num_overfitting(self) -> int:
        """How many of the rows overfit."""
        return sum(row.overfitting for row in self.rows)


def _stretches(curve: np.ndarray) -> tuple[np.ndarray, int]:
    """Means over every stretch of a fifth of the evaluations, and the length of one."""
    width = max(2, round(WINDOW * len(curve)))
    return np.convolve(curve, np.full(width, 1 / width), mode="valid"), width


def _wander(curve: np.ndarray) -> float:
    """Standard deviation of a curve around its trend, times what neighbours that go together add.

    The mean of `n` evaluations is off by this over the square root of `n`, if they are many more
    than the length over which the curve wanders.
    """
    time = np.linspace(-1, 1, len(curve))
    rest = curve - np.polynomial.Polynomial.fit(time, curve, 2)(time)
    power = float(np.sum(rest**2))
    if len(curve) < MIN_WANDER or not power:
        return 0.0
    together = float(np.clip(np.sum(rest[1:] * rest[:-1]) / power, 0.0, 0.9))
    return math.sqrt(power / (len(curve) - 3) * (1 + together) / (1 - together))


def _overfitting_row(
    trial: int, step: np.ndarray, loss: np.ndarray, training: np.ndarray, perfect: float
) -> OverfittingRow:
    """Judges a curve whose smaller values are better, and which none is better than `perfect`."""
    late = step >= step[-1] / 2
    noise, own = _noise(loss[late]), _noise(training[late])
    means, width = _stretches(loss)
    theirs, _ = _stretches(training)
    # Stretches that overlap the last one share its noise.
    earlier = means[: len(means) - width]
    best = int(earlier.argmin())
    rise = float(means[-1] - earlier[best])
    error = max(noise, _wander(loss[best:])) * math.sqrt(2 / width)
    improvement = float(loss[0] - earlier[best])
    improved = improvement > ERRORS * error
    undone = rise / improvement if improved else 1.0
    level = abs(float(earlier[best]) - perfect)
    gain = float(theirs[best] - theirs[-1])
    return OverfittingRow(
        trial=trial,
        best_step=int(step[best + (width - 1) // 2]),
        rise=rise,
        rise_error=error,
        undone=undone,
        training_gain=gain,
        overfitting=bool(
            rise > ERRORS * error
            and undone >= PROBLEMATIC
            and (improved or rise >= UNIMPROVED * level)
            and gain > 2 * own * math.sqrt(2 / width)
            and gain > 0
        ),
    )


def _training_loss(study: Study, objective: str) -> str:
    """The training loss to compare with; "" if there is none, or the objective is of training."""
    if objective.startswith(("train/", "step/")):
        return ""
    known = metric_names(study)
    suffix = objective.rpartition("/")[2]
    names = ["train/loss", "step/loss"] + ([f"train/{suffix}"] if "loss" in suffix else [])
    return next((name for name in names if name in known), "")


@np.errstate(over="ignore", invalid="ignore")  # Differences that no float holds.
def overfitting_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> OverfittingInfo:
    """Looks for the objective getting worse while the training loss still falls.

    Each curve is averaged over stretches of a fifth of its evaluations; the last stretch is
    compared with the best one that does not overlap it.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The OverfittingInfo over the good trials (best tenth, at least three, at most ten). The
      training loss is ``train/loss``, or else ``step/loss``.

    Raises:
      ValueError: no such metric.

    Source: "Examining the training curves" (problematic overfitting).
    """
    out = outcomes(study, objective, maximize)
    num_steps = int(out.step.max()) if len(out.step) else 0
    training = _training_loss(study, out.objective)
    skipped = ""
    if out.best < 0:
        skipped = "no trial has a value"
    elif not training:
        skipped = "there is no training loss beside the objective"
    rows = []
    if not skipped:
        sign = -1.0 if out.maximize else 1.0
        fit = mean_curve(study, training)
        for trial in out.good():
            loss = sign * out.curve[trial]
            seen = np.isfinite(loss) & np.isfinite(fit[trial])
            if (seen & (out.step > 0)).sum() >= MIN_EVALS:
                curves = out.step[seen], loss[seen], fit[trial][seen]
                rows.append(_overfitting_row(int(trial), *curves, sign * perfect(out.objective)))
        if not rows:
            skipped = f"the good trials have fewer than {MIN_EVALS} finite evaluations"
    return OverfittingInfo(out.objective, training, tuple(rows), num_steps, skipped)


def _undone(row: OverfittingRow) -> str:
    if row.undone >= 1:
        return "which is all that it had improved, or more"
    return f"{row.undone:.0%} of what it had improved"


def overfitting_findings(info: OverfittingInfo) -> list[Finding]:
    """Says whether the best trials overfit so much that it is a problem.

    Args:
      info: from `overfitting_info`.

    Returns:
      `overfitting` (warning) if the best trial and at least half of the good ones do, or 80% of the
      good ones; or nothing. One curve alone may have wandered.
    """
    num, total = info.num_overfitting, len(info.rows)
    best = bool(total) and info.rows[0].overfitting
    if not num or not ((best and num >= total / 2) or num >= AGREE * total):
        return []
    row = next(r for r in info.rows if r.overfitting)
    evidence = {
        "objective": info.objective,
        "training": info.training,
        "trials": [r.trial for r in info.rows],
        "best_steps": [r.best_step for r in info.rows],
        "rises": [r.rise for r in info.rows],
        "rise_errors": [r.rise_error for r in info.rows],
        "undone": [r.undone for r in info.rows],
        "overfitting": [r.overfitting for r in info.rows],
    }
    return [
        Finding(
            "overfitting",
            "warning",
            f"{num} of the {len(info.rows)} best trials overfit: in trial {row.trial} "
            f"{info.objective} is best around step {row.best_step} and worse by {row.rise:.3g} "
            f"(error {row.rise_error:.1g}) at the end, {_undone(row)}, "
            f"while {info.training} fell by another {row.training_gain:.3g}.",
            evidence,
            SECTION,
            "Tune regularization (weight decay, dropout, label smoothing, augmentation) before "
            "comparing these trials with others, and keep the best checkpoint rather than the "
            "last.",
        )
    ]


class LateVarianceRow(NamedTuple):
    """One good trial.

    Attributes:
      trial: its index.
      noise: standard deviation of one evaluation around the curve, over the second half.
      improvement: from the first evaluation to the best value.
    """

    trial: int
    noise: float
    improvement: float


@_shown.short
class LateVarianceInfo(NamedTuple):
    """How much one evaluation late in training differs from the next.

    Attributes:
      objective: the metric.
      rows: one per good trial, best first; empty if nothing was judged.
      noise: median of the rows' noise.
      improvement: median of the rows' improvement.
      gap: from the best trial's value to that of the median trial; NaN with fewer than three.
      gain: by how much the best of the late evaluations is expected to beat their mean by luck.
      skipped: why nothing was judged; "" if something was.
    """

    objective: str
    rows: tuple[LateVarianceRow, ...]
    noise: float
    improvement: float
    gap: float
    gain: float
    skipped: str

    @property
    def high(self) -> bool:
        """Whether it can be seen, and is large beside the differences between trials."""
        if not self.rows or self.noise < VISIBLE * self.improvement:
            return False
        if math.isnan(self.gap):
            return self.noise >= PROBLEMATIC * self.improvement
        return self.noise > RANKING * self.gap


@np.errstate(over="ignore", invalid="ignore")  # Differences that no float holds.
def late_variance_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> LateVarianceInfo:
    """Measures the step-to-step variance of the good trials' objective late in training.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The LateVarianceInfo over the good trials (best tenth, at least three, at most ten).

    Raises:
      ValueError: no such metric.

    Source: "Examining the training curves" (high step-to-step variance late in training).
    """
    out = outcomes(study, objective, maximize)
    skipped = "" if out.best >= 0 else "no trial has a value"
    rows: list[LateVarianceRow] = []
    num_late = 0
    if not skipped:
        sign = -1.0 if out.maximize else 1.0
        late = out.step >= out.step.max() / 2
        num_late = int(late.sum())
        for trial in out.good():
            loss = sign * out.curve[trial]
            seen = np.isfinite(loss)
            # Of one that was stopped early there may be nothing late.
            if (seen & (out.step > 0)).sum() >= MIN_EVALS and (seen & late).sum() >= 3:
                noise = _noise(loss[seen & late])
                rows.append(
                    LateVarianceRow(int(trial), noise, float(loss[seen][0] - loss[seen].min()))
                )
        if not rows:
            skipped = (
                f"the good trials have fewer than {MIN_EVALS} finite evaluations, or none late"
            )
    noise = float(np.median([r.noise for r in rows])) if rows else math.nan
    return LateVarianceInfo(
        objective=out.objective,
        rows=tuple(rows),
        noise=noise,
        improvement=float(np.median([r.improvement for r in rows])) if rows else math.nan,
        gap=_gap(out),
        gain=noise * math.sqrt(2 * math.log(max(num_late, 1))),
        skipped=skipped,
    )


def _gap(out: Outcomes) -> float:
    """From the best value to the median one of the trials that have a value."""
    known = out.loss[out.order]
    return float(np.median(known) - known[0]) if len(known) >= 3 else math.nan


def late_variance_findings(info: LateVarianceInfo) -> list[Finding]:
    """Says whether the best evaluation of a trial is a matter of luck.

    Args:
      info: from `late_variance_info`.

    Returns:
      `late_variance` (warning) if one evaluation late in training varies by more than a hundredth
      of what training improves, and by more than half of the way from the best trial to the median
      one (with fewer than three trials: by more than a twentieth of the improvement); or nothing.
    """
    if not info.high:
        return []
    beside = "."
    if not math.isnan(info.gap):
        beside = f", while the best trial is only {info.gap:.3g} better than the median one."
    return [
        Finding(
            "late_variance",
            "warning",
            f"Late in training {info.objective} varies by {info.noise:.3g} from one evaluation to "
            f"the next{beside} Picking the best evaluation gains about {info.gain:.2g} by luck, "
            "so that the ranks of the trials say little.",
            {
                "objective": info.objective,
                "noise": info.noise,
                "improvement": info.improvement,
                "gap": info.gap,
                "gain": info.gain,
                "trials": [r.trial for r in info.rows],
                "noises": [r.noise for r in info.rows],
            },
            SECTION,
            "Decay the learning rate to zero, raise the batch size, evaluate on more data or "
            "average the weights; or compare means over seeds.",
        )
    ]
