"""Whether, when and how training became unstable: a loss that rises when it should fall.

The rule, on one curve of the training loss (means between evaluations, or single steps):

- The *level* is the highest loss within a tenth of training before the lowest point so far, so that
  the swings of momentum that die away, and the noise around a plateau, are part of it.
- A *rise* begins at that lowest point if the loss later exceeds the level by more than six
  deviations of its noise and by more than a tenth of the decline so far (of the whole decline, if
  there was none yet). A curve of single steps is first filtered by a running median of three, so
  that one unlucky batch is no stretch; between evaluations the peak of the loss smoothed over about
  ten steps is watched as well, which is what sparse evaluation misses.
- A rise that is less high also counts if it lasts: if for a whole tenth of training the loss stays
  above the lowest point by more than the noise and by more than a quarter of the decline so far.
- The noise is the deviation around a straight line in each quarter of training, robustly, and the
  second smallest of the four: a plateau's noise at every time scale up to a quarter, whatever a
  spike or the first steep decline add elsewhere.
"""

from typing import NamedTuple

import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.axes import axis, hyperparameters
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import metric_names, outcomes
from playbook_optax.records.study import Study

SECTION = "Identifying unstable workloads"
REMEDY_SECTION = "How can optimization failures be debugged and mitigated?"
LEVEL_WINDOW = 0.1
"""Share of training before the lowest point over which the level is the highest loss."""
NUM_DEVIATIONS = 6.0
"""Deviations of the noise by which a rise exceeds the level."""
MIN_SHARE = 0.1
"""Share of the decline so far by which a rise exceeds the level."""
LASTING_SHARE = 0.25
"""Share of the decline so far by which a rise that lasts exceeds the lowest loss before it."""
EARLY_SHARE = 0.5
"""Share of the whole decline by which a rise in the first tenth of training exceeds the initial
loss."""
EARLY = 0.05
"""Share of training within which a rise is early."""
NEAR_LOWEST = 3.0
"""Deviations of the noise up to which the loss has not left its lowest point."""
SLOW = 0.05
"""Share of training beyond which a recovery is slow."""
OUTLIER = 5.0
"""A gradient norm is an outlier from this multiple of its median in the window before it on."""
HUGE = 1e150
"""A loss from here on is as good as infinite: differences of larger ones overflow."""
MIN_POINTS = 8
"""Points that a curve needs before rises are looked for."""
JUST_ABOVE = 3.0
"""Learning rates up to this multiple of the best one are just above it."""
CHECKS = (5.0, 10.0)
"""Multiples of the best learning rate at which the playbook double-checks."""
LEARNING_RATES = ("learning_rate", "base_learning_rate")


class Rise(NamedTuple):
    """A stretch in which the loss rose.

    Attributes:
      start_step: step of the lowest loss before it.
      top_step: step of its highest loss.
      recovered_step: first step at which the loss was back at the level, -1 if never.
      before: lowest loss before it.
      level: highest loss in the tenth of training before that, which the rise exceeds.
      top: its highest finite loss.
      height: top - level.
      noise: deviation of the loss from its trend.
      kind: ``"early"``: it began within the first 5% of training, or before any decline beyond the
        noise; ``"mid"``: after a decline.
      slow_recovery: whether it took more than 5% of training from where the loss left the lowest
        point until it had recovered, or never did.
    """

    start_step: int
    top_step: int
    recovered_step: int
    before: float
    level: float
    top: float
    height: float
    noise: float
    kind: str
    slow_recovery: bool


class InstabilityRow(NamedTuple):
    """How stable one trial was; with seeds its worst run.

    Attributes:
      trial: its index.
      seed: which run is told of.
      unstable: whether it was infeasible, or its loss rose beyond noise.
      kind: ``""`` if stable; ``"early"`` or ``"mid"`` by its first rise; ``"diverged"`` or
        ``"high_loss"`` where it was infeasible and no rise tells when it began.
      infeasible: whether the run was infeasible.
      start_step: where its first rise began, or the update at which it became infeasible; -1.
      top_step: where its first rise was highest; -1 without one.
      recovered_step: where that was over; -1 if never.
      slow_recovery: whether any rise recovered slowly or never.
      norm_outlier: whether a gradient norm stood out before or at the beginning of the rise; None
        if no norms were recorded or there is no rise.
      rises: all of its rises.
    """

    trial: int
    seed: int
    unstable: bool
    kind: str
    infeasible: bool
    start_step: int
    top_step: int
    recovered_step: int
    slow_recovery: bool
    norm_outlier: bool | None
    rises: tuple[Rise, ...]


class InstabilityInfo(NamedTuple):
    """How stable the trials of a study were.

    Attributes:
      rows: one per trial.
      loss: the metric that was read; "" if none could be.
      learning_rate: name of the hyperparameter by which trials are compared; "" without one.
      best_trial: the trial of lr*, the best one; -1 without one.
      best_learning_rate: lr*; NaN without one.
      above: trials just above lr* (up to 3 times), ascending in their learning rate.
      checks: the trials nearest 5 and 10 times lr*, where there are any within a factor of two.
      first_unstable: the smallest learning rate above lr* of an unstable trial; NaN without one.
      unstable_share_above: share of unstable trials among `above`; NaN if it is empty.
      alone: whether the learning rate is the only hyperparameter that varies.
      num_steps: steps of training.
      skipped: why no loss was judged; "" if one was. Infeasible trials count all the same.
    """

    rows: tuple[InstabilityRow, ...]
    loss: str
    learning_rate: str
    best_trial: int
    best_learning_rate: float
    above: tuple[int, ...]
    checks: tuple[int, ...]
    first_unstable: float
    unstable_share_above: float
    alone: bool
    num_steps: int
    skipped: str

    @property
    def unstable(self) -> np.ndarray:
        """Whether each trial was unstable: bool (trial,)."""
        return np.array([row.unstable for row in self.rows], bool)


def _running_median(loss: np.ndarray, half: int) -> np.ndarray:
    """The median of 2 * half + 1 points around each."""
    from scipy import ndimage

    # Continued by its own slope, so that a steep beginning is no noise.
    padded = np.pad(loss, half, mode="reflect", reflect_type="odd")
    return np.asarray(ndimage.median_filter(padded, 2 * half + 1)[half:-half])


def _deviations(loss: np.ndarray) -> np.ndarray:
    """How far each point lies off the running median of a tenth of the curve."""
    return np.abs(loss - _running_median(loss, max(2, len(loss) // 20)))


def _deviation(off: np.ndarray) -> float:
    """The standard deviation that these would have if normal: by their median, and their tail.

    The tail counts what is heavier than normal; with few points it is the largest of them.
    """
    return float(max(1.4826 * np.median(off), np.quantile(off, 0.975) / 2.24))


def _quiet_noise(off: np.ndarray) -> float:
    """The noise of the second quietest quarter, of longer parts where the curve is short."""
    parts = np.array_split(off, int(np.clip(len(off) // 10, 1, 4)))
    return sorted(_deviation(part) for part in parts)[(len(parts) - 1) // 2]


def _first_noise(loss: np.ndarray, window: int, initial: float) -> float:
    """The noise of the first batches, from how they jump to and fro, whatever their trend.

    In the units of the initial loss: the losses of an example differ the more, the larger they are.
    """
    num = max(window, MIN_POINTS)
    jumps = np.abs(np.diff(loss, 2)[:num]) / np.sqrt(6.0)
    lowest = loss.min()
    left = np.median(loss[:num]) - lowest
    growth = (initial - lowest) / left if left > 0 else np.inf
    return float(1.4826 * np.median(jumps) * np.clip(growth, 1.0, 10.0))


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Single losses smoothed as our trials smooth them: one batch alone is not a stretch."""
    from scipy import signal

    weight = 0.9
    start = np.array([weight * loss[0]])
    return np.asarray(signal.lfilter([1 - weight], [1, -weight], loss, zi=start)[0])


@_checks.named_arguments
def find_rises(
    step: np.ndarray,
    loss: np.ndarray,
    peak: np.ndarray | None = None,
    *,
    num_steps: int | None = None,
    initial: float | None = None,
) -> tuple[Rise, ...]:
    """Finds where a loss curve rises for a stretch when it should fall, beyond its noise.

    Args:
      step: rising steps, shape (point,).
      loss: the training loss there, shape (point,): of single steps, or means since the previous
        point. It is read up to its first value that is not finite.
      peak: the highest smoothed loss since the previous point, where single steps were watched.
      num_steps: steps of training; the last step if None.
      initial: the expected loss before any update, as an evaluation tells it. A rise in the first
        tenth of training, before which there is no curve to learn the noise from, counts if it
        exceeds that by half of the whole decline. Without it, the first tenth itself is taken for
        noise, which finds few early rises.

    Returns:
      The rises, in order; none if there are fewer than eight finite points.

    Raises:
      ValueError: arrays of different shapes.

    False alarms and misses, measured on least squares in five dimensions with noisy labels (400
    steps, SGD and heavy-ball momentum, single steps and means of 5, 20 and 50, 200 runs each): none
    from batches of 4 on where training started well above the noise, at most 2 of 200 where it
    started at the optimum. With a batch of one and `initial` there are more: of single steps
    1 in 200 with SGD and 3 with momentum, of means of 5 steps 19 and 45 (10% and 22%), of longer
    means none; without `initial` none. On a decline of 2.3 with noise, a spike of 0.6 over a
    twentieth of training was found in all of 50 runs with 40 points or more, in 2 with 20; one of
    1.0 in all from 20 points on. Momentum close below its limit of stability really climbs above
    the initial loss before it settles: with `initial` that counts, as an early rise.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.analysis.instability import find_rises
      >>> step = np.arange(100)
      >>> loss = np.exp(-step / 20.0)
      >>> find_rises(step, loss)
      ()
      >>> loss[60:70] += 2.0
      >>> (rise,) = find_rises(step, loss)
      >>> rise.kind, rise.start_step, rise.recovered_step, rise.slow_recovery
      ('mid', 59, 70, True)

    Source: playbook, "Identifying unstable workloads".
    """
    step, curve = np.asarray(step), np.asarray(loss, np.float64)
    peaks = curve if peak is None else np.asarray(peak, np.float64)
    if step.ndim != 1 or curve.shape != step.shape or peaks.shape != step.shape:
        raise ValueError(
            f"step, loss and peak must have one shape (point,), got {step.shape}, {curve.shape} "
            f"and {peaks.shape}."
        )
    total = int(step[-1] if num_steps is None else num_steps) if len(step) else 0
    bad = ~((np.abs(curve) < HUGE) & (np.abs(peaks) < HUGE))
    end = int(np.argmax(bad)) if bad.any() else len(curve)
    curve, peaks, step = curve[:end], peaks[:end], step[:end]
    if len(curve) < MIN_POINTS:
        return ()
    off = _deviations(curve)
    if peak is not None:
        off = np.fmax(off, _deviations(peaks))
    quiet = _quiet_noise(off)
    window = max(4, int(np.ceil(LEVEL_WINDOW * len(curve))))
    first_noise = 0.0 if initial is None else _first_noise(curve, window, initial)
    ended = curve
    if np.median(np.diff(step)) <= 1:
        # Smoothing delays the end of a rise; a median of five does not.
        ended = _running_median(curve, 2)
        curve = _smooth(curve)
    # The mean of an interval shorter than the smoothing is noisier than the smoothed loss.
    high = curve if peak is None else peaks
    lowest_after = np.full(len(curve), -np.inf)
    if len(curve) > window:
        stretches = np.lib.stride_tricks.sliding_window_view(curve, window)
        lowest_after[: len(stretches)] = stretches.min(axis=1)
    descent = curve[0] - curve.min()
    # A noise that is itself estimated from few points is known less well.
    deviations = NUM_DEVIATIONS * (1 + 15 / len(curve))
    found = []
    low, at, until = 0, 1, len(curve)
    while at < until:
        known = low >= window
        last = low if known or initial is not None else max(low, window)
        level = high[max(0, low - window) : last + 1].max()
        decline = curve[0] - curve[low]
        share = MIN_SHARE * (decline if decline > 0 else descent)
        noise = quiet
        if not known and initial is not None:
            # What the noise of the first batches is nobody knows; the loss before them is known.
            level, share = max(level, initial), EARLY_SHARE * (initial - curve.min())
        # The last term keeps the rounding of a converged curve out.
        floor = 1e-6 * abs(curve[0])
        for final in (False, True):
            margin = max(deviations * noise, floor)
            sudden = high[at] > level + max(margin, share)
            lasting = known and (
                lowest_after[at] > curve[low] + max(margin, LASTING_SHARE / MIN_SHARE * share)
            )
            if final or not (sudden or lasting):
                break
            if known or initial is None:
                near = off[max(0, low - 2 * window) : max(low, window) + 1]
            else:
                near = off[window : 3 * window]
            noise = max(quiet, _deviation(near))
            if not known and initial is not None:
                noise = max(noise, first_noise)
        if not (sudden or lasting):
            # Only now: a peak may hide in an interval whose mean is the lowest so far.
            low = at if curve[at] < curve[low] else low
            at += 1
            continue
        if not sudden:
            level = curve[low] + max(margin, share)
        back = np.flatnonzero(ended[at:] <= level)
        # A peak inside an interval may be over by its end.
        recovered = at + int(back[0]) if len(back) else -1
        stop = recovered if recovered >= 0 else until
        top = at + int(np.argmax(high[at : max(stop, at + 1)]))
        start, over = int(step[low]), int(step[recovered]) if recovered >= 0 else -1
        # The lowest point may be luck, long before the loss left it.
        near = np.flatnonzero(curve[low:at] <= curve[low] + NEAR_LOWEST * noise)
        begin = int(step[low + near[-1]]) if len(near) else start
        early = start <= EARLY * total or decline <= deviations * noise
        found.append(
            Rise(
                start_step=start,
                top_step=int(step[top]),
                recovered_step=over,
                before=float(curve[low]),
                level=float(level),
                top=float(high[top]),
                height=float(high[top] - level),
                noise=noise,
                kind="early" if early else "mid",
                slow_recovery=recovered < 0 or over - begin > SLOW * total,
            )
        )
        if recovered < 0:
            break
        low, at = recovered, max(recovered, at) + 1
    return tuple(found)


def _loss_metric(study: Study) -> tuple[str, str]:
    """Name of the metric to read, and of its peaks ("" if there are none)."""
    known = metric_names(study)
    if "step/loss" in known:
        return "step/loss", "step/peak_loss" if "step/peak_loss" in known else ""
    if "train/loss" in known:
        return "train/loss", ""
    losses = [name for name in known if "loss" in name.lower() and "valid" not in name.lower()]
    return (losses[0] if losses else ""), ""


def _runs(study: Study, name: str) -> np.ndarray:
    """A variable as (trial, seed, ...), also where there is one seed."""
    array = study.data[name]
    if "seed" not in array.dims:
        return np.asarray(array.transpose("trial", ...).values)[:, None]
    return np.asarray(array.transpose("trial", "seed", ...).values)


def _judged(study: Study) -> dict[str, np.ndarray]:
    """What a verdict is made of, each (trial, seed, eval): losses, peaks and gradient norms."""
    known = metric_names(study)
    wanted = dict(zip(("loss", "peak"), _loss_metric(study), strict=True))
    if "train/loss" in known and len(study.data["step"]) and study.data["step"][0] == 0:
        wanted["initial"] = "train/loss"
    if "step/gradient_norm" in known and "step/peak_gradient_norm" in known:
        wanted |= {"norm": "step/gradient_norm", "norm_peak": "step/peak_gradient_norm"}
    return {key: _runs(study, name).astype(float) for key, name in wanted.items() if name}


@_checks.named_arguments
def loss_curve(
    study: Study, trial: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The training loss by which `instability_info` judges one run.

    Args:
      study: the study.
      trial: its index.
      seed: which run of it; ``InstabilityRow.seed`` is the worst.

    Returns:
      Steps, losses and their peaks since the step before (None where none were recorded), each of
      shape (point,), from the first loss on; NaN where a run had ended. Empty without a loss.

    Raises:
      ValueError: there is no such trial or seed.

    Source: playbook, "Identifying unstable workloads".
    """
    curves = _judged(study)
    runs = _runs(study, "infeasible").shape
    for name, index, count in (("trial", trial, runs[0]), ("seed", seed, runs[1])):
        if not 0 <= index < count:
            raise ValueError(f"{name} = {index} must lie in [0, {count}), those of the study.")
    if "loss" not in curves:
        return np.zeros(0, int), np.zeros(0), None
    of_run = {key: values[trial, seed] for key, values in curves.items()}
    step, kept, _ = _from_first(np.asarray(study.data["step"].values), of_run)
    return step, kept["loss"], kept.get("peak")


def _norm_outlier(
    step: np.ndarray, norms: np.ndarray | None, peaks: np.ndarray | None, rise: Rise, gap: int
) -> bool | None:
    """Whether a norm stood out up to the top of a rise from those in the tenth before it began."""
    if norms is None or peaks is None:
        return None
    begin = np.flatnonzero(step >= rise.start_step)[0]
    window = max(4, int(np.ceil(LEVEL_WINDOW * len(step))))
    before = norms[max(0, begin - window) : begin + 1]
    before = before[np.isfinite(before)]
    near = peaks[(step >= rise.start_step - gap) & (step <= rise.top_step)]
    near = near[~np.isnan(near)]
    if not len(before) or not len(near):
        return None
    return bool(near.max() > OUTLIER * np.median(before))


def _from_first(
    step: np.ndarray, curves: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray], float | None]:
    """One run from its first loss on: its steps, its curves, and the loss before any update."""
    loss, peak, anchor = (curves.get(key) for key in ("loss", "peak", "initial"))
    assert loss is not None
    initial = None if anchor is None or not np.isfinite(anchor[0]) else float(anchor[0])
    if peak is not None and not np.isfinite(loss[0]) and initial is not None:
        # No mean yet at step 0, but an evaluation, and the first batch, which may be lucky.
        first_point = np.fmax(peak[:1], initial)
        loss = np.concatenate([first_point, loss[1:]])
        peak = np.concatenate([first_point, peak[1:]])
        curves = curves | {"loss": loss, "peak": peak}
    seen = np.isfinite(loss)
    first = int(np.argmax(seen)) if seen.any() else 0
    kept = {name: values[first:] for name, values in curves.items() if name != "initial"}
    return step[first:], kept, initial


def _row(
    trial: int,
    seed: int,
    step: np.ndarray,
    curves: dict[str, np.ndarray],
    outcome: tuple[bool, str, int],
    num_steps: int,
) -> InstabilityRow:
    """Judges one run."""
    infeasible, reason, bad_step = outcome
    rises: tuple[Rise, ...] = ()
    norm_outlier = None
    if "loss" in curves:
        times, curves, initial = _from_first(step, curves)
        rises = find_rises(
            times, curves["loss"], curves.get("peak"), num_steps=num_steps, initial=initial
        )
        if rises:
            gap = int(np.median(np.diff(times)))
            norm_outlier = _norm_outlier(
                times, curves.get("norm"), curves.get("norm_peak"), rises[0], gap
            )
    kind = rises[0].kind if rises else ""
    if infeasible and not rises:
        kind = "high_loss" if reason == "high_loss" else "diverged"
    start = rises[0].start_step if rises else (bad_step if infeasible else -1)
    return InstabilityRow(
        trial=trial,
        seed=seed,
        unstable=bool(infeasible or rises),
        kind=kind,
        infeasible=bool(infeasible),
        start_step=int(start),
        top_step=rises[0].top_step if rises else -1,
        recovered_step=rises[0].recovered_step if rises else -1,
        slow_recovery=any(rise.slow_recovery for rise in rises),
        norm_outlier=norm_outlier,
        rises=rises,
    )


def _worst(rows: list[InstabilityRow]) -> InstabilityRow:
    """The infeasible run, else the one with the highest rise; the lowest seed if tied."""

    def badness(row: InstabilityRow) -> tuple[bool, bool, float]:
        tops = [rise.height for rise in row.rises if not np.isnan(rise.height)]
        return row.infeasible, row.unstable, max(tops, default=0.0)

    return max(rows, key=badness)


def instability_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> InstabilityInfo:
    """Judges every trial of a study by its training loss, and the trials above lr*.

    A trial is unstable if it is infeasible, or if its loss rose beyond noise (`find_rises`). The
    mean batch loss between evaluations and its peak are read where they are recorded
    (``step/loss``, ``step/peak_loss``), else ``train/loss``, else another loss that is not of the
    validation set.

    Args:
      study: the study, whoever produced it.
      objective: the metric by which lr* is the best; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The InstabilityInfo.

    Raises:
      ValueError: no such metric.

    Source: playbook, "Identifying unstable workloads".
    """
    out = outcomes(study, objective, maximize)
    name, _ = _loss_metric(study)
    step = np.asarray(study.data["step"].values)
    num_steps = int(step.max()) if len(step) else 0
    num_after = int((step > 0).sum())
    skipped = ""
    if not name:
        skipped = "no training loss was recorded"
    elif num_after < MIN_POINTS:
        skipped = (
            f"{num_after} evaluations after the first update are too few; {MIN_POINTS} are needed"
        )
    curves = {} if skipped else _judged(study)
    infeasible = _runs(study, "infeasible").astype(bool)
    reason = _runs(study, "infeasible_reason").astype(str)
    bad_step = _runs(study, "infeasible_step")
    rows = []
    for trial in range(out.num_trials):
        runs = []
        for seed in range(infeasible.shape[1]):
            of_run = {key: values[trial, seed] for key, values in curves.items()}
            outcome = (infeasible[trial, seed], reason[trial, seed], bad_step[trial, seed])
            runs.append(_row(trial, seed, step, of_run, outcome, num_steps))
        rows.append(_worst(runs))
    return _compared(study, rows, name, out.best, num_steps, skipped)


def _compared(
    study: Study,
    rows: list[InstabilityRow],
    loss: str,
    best: int,
    num_steps: int,
    skipped: str,
) -> InstabilityInfo:
    """Adds what a comparison by learning rate says."""
    varied = [n for n in hyperparameters(study) if len(np.unique(axis(study, n).values)) > 1]
    # A column of text may have any name.
    names = [n for n in LEARNING_RATES if n in varied and study.points[n].dtype.kind in "iuf"]
    rate_name = names[0] if names else ""
    above: tuple[int, ...] = ()
    checks: list[int] = []
    best_rate = first = share = float("nan")
    if rate_name and best >= 0:
        rates = study.points[rate_name].astype(np.float64)
        best_rate = float(rates[best])
        unstable = np.array([row.unstable for row in rows])
        order = np.argsort(rates, kind="stable")
        above = tuple(int(t) for t in order if best_rate < rates[t] <= JUST_ABOVE * best_rate)
        if above:
            share = float(unstable[list(above)].mean())
        for factor in CHECKS:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                off = np.nan_to_num(np.abs(np.log(rates / (factor * best_rate))), nan=np.inf)
            nearest = int(np.argmin(off))
            if off[nearest] <= np.log(2.0) and nearest not in (*checks, best):
                checks.append(nearest)
        bad = rates[unstable & (rates > best_rate)]
        first = float(bad.min()) if len(bad) else float("nan")
    return InstabilityInfo(
        rows=tuple(rows),
        loss=loss,
        learning_rate=rate_name,
        best_trial=best,
        best_learning_rate=best_rate,
        above=above,
        checks=tuple(checks),
        first_unstable=first,
        unstable_share_above=share,
        alone=varied == [rate_name],
        num_steps=num_steps,
        skipped=skipped,
    )


class InstabilityCurves(NamedTuple):
    """The training-loss curves that tell whether training breaks above lr*.

    Attributes:
      step: (eval,) optimizer updates before each evaluation.
      trials: lr*, the trials just above it and those nearest 5 and 10 times it, ascending; without
        a learning rate to compare by, the best trial and the unstable ones.
      rows: how stable each was; `rows[i].seed` is the run that is drawn.
      rates: the learning rate of each; NaN without one.
      multiples: each as a multiple of lr*.
      loss: (trial, eval) the training loss.
      peak: (trial, eval) its smoothed peaks since the previous evaluation; None if not recorded.
      info: the whole InstabilityInfo.
    """

    step: np.ndarray
    trials: tuple[int, ...]
    rows: tuple[InstabilityRow, ...]
    rates: np.ndarray
    multiples: np.ndarray
    loss: np.ndarray
    peak: np.ndarray | None
    info: InstabilityInfo


@_checks.named_arguments
def instability_curves(
    study: Study,
    num_trials: int = 6,
    objective: str | None = None,
    maximize: bool | None = None,
) -> InstabilityCurves:
    """The curves by which the playbook identifies an unstable workload.

    Args:
      study: the study.
      num_trials: how many trials, at most; lr* and the ones nearest 5 and 10 times it first.
      objective: the metric by which lr* is the best; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The InstabilityCurves.

    Raises:
      ValueError: no such metric, no training loss was recorded, or num_trials is not a positive
        integer.

    Source: playbook, "Identifying unstable workloads".
    """
    num_trials = _checks.check_count("num_trials", num_trials)
    info = instability_info(study, objective, maximize)
    if not info.loss:
        raise ValueError(
            f"The curves cannot be drawn: {info.skipped}. Record the training loss as 'train/loss'."
        )
    wanted = [info.best_trial] if info.best_trial >= 0 else []
    wanted += info.checks
    wanted += info.above
    if not info.learning_rate:
        wanted += [row.trial for row in info.rows if row.unstable]
    chosen = list(dict.fromkeys(wanted))[:num_trials]
    rates = np.full(len(chosen), np.nan)
    if info.learning_rate:
        rates = study.points[info.learning_rate].astype(np.float64)[chosen]
        order = np.argsort(rates, kind="stable")
        chosen, rates = [chosen[i] for i in order], rates[order]
    rows = tuple(info.rows[trial] for trial in chosen)
    seeds = [row.seed for row in rows]
    name, peak_name = _loss_metric(study)
    loss = _runs(study, name)[chosen, seeds].astype(np.float64)
    peak = _runs(study, peak_name)[chosen, seeds].astype(np.float64) if peak_name else None
    return InstabilityCurves(
        step=np.asarray(study.data["step"].values),
        trials=tuple(chosen),
        rows=rows,
        rates=rates,
        multiples=rates / info.best_learning_rate,
        loss=loss,
        peak=peak,
        info=info,
    )


def _is_mid(row: InstabilityRow, num_steps: int) -> bool:
    """Whether training broke after it had gone well."""
    if row.kind in ("early", "mid"):
        return row.kind == "mid"
    # Infeasible before there were enough points to see it rise.
    return row.start_step > LEVEL_WINDOW * num_steps


def _unstable_above(info: InstabilityInfo, trials: list[int]) -> Finding:
    """Says that training breaks just above lr*, and what the kind of it asks for."""
    rows = [info.rows[trial] for trial in trials]
    kinds = [row.kind for row in rows]
    mid = sum(_is_mid(row, info.num_steps) for row in rows)
    early = len(rows) - mid
    outliers = [row.norm_outlier for row in rows if row.norm_outlier is not None]
    warm, clip = "learning rate warm-up (tune_warmup)", "gradient clipping (choose_clip_threshold)"
    kind, advice = "early", f"Try {warm} first, then {clip}."
    if mid > early:
        kind, advice = "mid-training", f"Try {clip} first: warm-up cures early instability."
    message = (
        f"Training is unstable just above the best learning rate: of the {len(info.above)} trials "
        f"with {info.learning_rate} up to {JUST_ABOVE:g} times lr* = {info.best_learning_rate:.4g},"
        f" {len(trials)} are, from {info.first_unstable:.4g} on, {early} early in training "
        f"and {mid} later, after a steady decline."
    )
    if outliers:
        message += (
            f" In {sum(outliers)} of {len(outliers)} of those whose norms were recorded the "
            "gradient norm stood out before the loss was highest."
        )
    if not info.alone:
        message += " Other hyperparameters vary too, so it may be theirs."
    return Finding(
        "unstable_above_best",
        "warning",
        message,
        {
            "learning_rate": info.best_learning_rate,
            "first_unstable": info.first_unstable,
            "unstable_share_above": info.unstable_share_above,
            "kind": kind,
            "trials": trials,
            "kinds": kinds,
            "start_steps": [row.start_step for row in rows],
            "recovered_steps": [row.recovered_step for row in rows],
            "norm_outliers": [row.norm_outlier for row in rows],
            "loss": info.loss,
        },
        SECTION,
        f"Making the {kind} instability go away will probably allow larger learning rates and "
        f"train better. {advice}",
    )


def instability_findings(info: InstabilityInfo) -> list[Finding]:
    """Says whether training breaks just above the best learning rate, and whether it healed slowly.

    Args:
      info: from `instability_info`.

    Returns:
      ``unstable_above_best`` (warning) where at least half of the trials just above lr* are
      unstable, ``unstable_best`` (warning) where the best trial itself is, ``slow_recovery``
      (info) for feasible trials that rose and came back slowly, ``instability_check_skipped``
      (info) where no loss could be judged; nothing where all is well.

    Source: playbook, "Identifying unstable workloads".
    """
    found = []
    if info.skipped:
        found.append(
            Finding(
                "instability_check_skipped",
                "info",
                f"Whether the loss rose when it should fall was not checked: {info.skipped}.",
                {"reason": info.skipped},
                SECTION,
                "Record the training loss at least eight times in a run."
                if info.num_steps >= MIN_POINTS
                else "",
            )
        )
    unstable = [trial for trial in info.above if info.rows[trial].unstable]
    if unstable and info.unstable_share_above >= 0.5:
        found.append(_unstable_above(info, unstable))
    if info.best_trial >= 0 and info.rows[info.best_trial].unstable:
        row = info.rows[info.best_trial]
        found.append(
            Finding(
                "unstable_best",
                "warning",
                f"The best trial, {info.best_trial}, was itself unstable: its {info.loss} rose "
                f"from step {row.start_step} on"
                + (
                    f" and was back at step {row.recovered_step}."
                    if row.recovered_step >= 0
                    else " and did not come back."
                ),
                row._asdict(),
                SECTION,
                "It trained well in spite of it: warm-up or clipping will probably help.",
            )
        )
    slow = [
        (row.trial, rise)
        for row in info.rows
        if not row.infeasible
        for rise in row.rises
        if rise.slow_recovery and rise.recovered_step >= 0
    ]
    if slow:
        trials = list(dict.fromkeys(trial for trial, _ in slow))
        found.append(
            Finding(
                "slow_recovery",
                "info",
                f"{len(trials)} feasible trials became unstable and took more than {SLOW:.0%} of "
                "training to recover, which sparse evaluation would have missed: trials "
                f"{', '.join(map(str, trials[:8]))}" + (", …." if len(trials) > 8 else "."),
                {
                    "trials": [trial for trial, _ in slow],
                    "start_steps": [rise.start_step for _, rise in slow],
                    "recovered_steps": [rise.recovered_step for _, rise in slow],
                },
                REMEDY_SECTION,
                "Look at the moment itself: study.replay(trial, from_step) records every step.",
            )
        )
    return found
