"""Which remedy against unstable training: each with a learning-rate sweep of its own, compared."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import numpy as np
import optax

from playbook_optax import _checks, _shown, optimizers
from playbook_optax.analysis.feasibility import feasibility_findings, feasibility_info
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.instability import instability_info
from playbook_optax.analysis.norms import NO_CLIPPING, norm_histogram
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.analysis.spreads import best_by_seed
from playbook_optax.procedures import clipping, controls
from playbook_optax.procedures.clipping import LEARNING_RATE, MAX_NORM
from playbook_optax.procedures.scale import Scale, scale_of, wobble
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner import progress
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.keys import check_key
from playbook_optax.trials.stepper import MakeOptimizer
from playbook_optax.trials.workload import Workload, WorkloadLike, resolve

WARMUP_STEPS, CLIP_STEPS, PERCENTILE = "warmup_steps", "clip_steps", "percentile"
SECTION = "How can optimization failures be debugged and mitigated?"
BASELINE, LOWER = "none", "lower_learning_rate"
WARMUP, CLIPPING, ADAPTIVE = "warmup", "clipping", "adaptive_clipping"
BOTH, DURING_WARMUP = "warmup_and_clipping", "clipping_during_warmup"
BOTH_ADAPTIVE = "warmup_and_adaptive_clipping"
_ORDER = (WARMUP, CLIPPING, ADAPTIVE, BOTH, DURING_WARMUP, BOTH_ADAPTIVE)
_FIXED = "warmup_and_fixed_clipping"
_RESERVED = (MAX_NORM, WARMUP_STEPS, CLIP_STEPS, PERCENTILE)
_DTYPES = {WARMUP_STEPS: np.int32, CLIP_STEPS: np.int32}
_NAMES = {**controls.NAMES, PERCENTILE: controls.PERCENTILE}
_ALWAYS = _checks.MAX_STEPS
_MIN_NORMS = 100
"""Norms that the adaptive clipper sees before it clips, in a run that is long enough."""
_ADAM_FACTOR = 0.1
"""Adam's updates have about the size of the learning rate, whatever the gradient's; its best rates
are lower than momentum's, so its sweep lies a decade lower."""


class RemedyRow(NamedTuple):
    """What one remedy did in its own sweep of the learning rate.

    Attributes:
      remedy: its name.
      largest_stable_learning_rate: the largest below which every rate of the sweep was stable,
        itself included; NaN if the smallest was unstable.
      stable_to_end: whether all were stable, so that the limit lies beyond the sweep.
      largest_useful_learning_rate: the largest stable rate with a value no worse, beyond noise,
        than the best without any remedy; NaN if there is none.
      best_value: the objective of the best feasible trial at its best evaluation, NaN if none;
        with seeds their mean.
      best_step: the step of that evaluation, -1 if none.
      best_learning_rate: the trial's learning rate, NaN if none.
      clipped_fraction: share of that trial's updates that were clipped.
      extra_steps: by how much a run must grow that keeps its schedule whole: the warm-up.
      spread: standard deviation of the best value over seeds; NaN with one seed.
      learning_rates: the sweep, ascending.
      values: the objective of each at its best evaluation, NaN where infeasible.
      unstable: whether each was unstable.
      study: name of its study in the verdict.
      best_trial: index of the best trial there, -1 if none.
      seed_values: the objective of each seed of that trial at its own best evaluation.
      wobble: deviation of that trial's evaluations from their trend, around the best one; NaN
        where there are too few.
    """

    remedy: str
    largest_stable_learning_rate: float
    stable_to_end: bool
    largest_useful_learning_rate: float
    best_value: float
    best_step: int
    best_learning_rate: float
    clipped_fraction: float
    extra_steps: int
    spread: float
    learning_rates: tuple[float, ...]
    values: tuple[float, ...]
    unstable: tuple[bool, ...]
    study: str = ""
    best_trial: int = -1
    seed_values: tuple[float, ...] = ()
    wobble: float = math.nan


@_shown.short
class RemedyComparison(NamedTuple):
    """The table of remedies.

    Attributes:
      recommended: name of the remedy, or None where nothing was unstable or nothing helped.
      rows: one for each remedy, in the playbook's order, the baseline ("none") first.
      objective: what values are compared by.
      maximize: whether larger is better.
      num_steps: updates of each trial.
      num_seeds: repetitions of each trial.
      warmup_steps: length of the warm-up that was tried.
      max_norm: the fixed clip threshold that was tried, NaN if none was.
    """

    recommended: str | None
    rows: tuple[RemedyRow, ...]
    objective: str
    maximize: bool
    num_steps: int
    num_seeds: int
    warmup_steps: int
    max_norm: float

    def row(self, remedy: str) -> RemedyRow:
        """The row of one remedy.

        Args:
          remedy: its name.

        Returns:
          The row.

        Raises:
          ValueError: there is none of that name; the nearest is named.
        """
        named = {row.remedy: row for row in self.rows}
        _checks.check_choice("remedy", remedy, named)
        return named[remedy]


@takes_trainer
def compare_remedies(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    num_trials: int = 10,
    num_seeds: int = 1,
    eval_every: int | None = None,
    warmup_steps: int | None = None,
    max_norm: float | None = None,
    percentile: float = 90.0,
    optimizers: Mapping[str, Any] | None = None,
    workloads: Mapping[str, WorkloadLike] | None = None,
    point: Mapping[str, Any] | None = None,
    margin: float = 0.1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Tries the playbook's remedies against instability and recommends one, or none.

    Each remedy is swept over the learning rate by itself, with the same number of trials, steps and
    seeds, the same initializations and batches, and (but for other optimizers, which may have a
    range of their own) the same learning rates:

    - ``none``: the baseline;
    - ``warmup``: a linear warm-up over the first `warmup_steps` of the `num_steps` updates;
    - ``clipping``: at a fixed threshold, always;
    - ``adaptive_clipping``: at a running percentile of the unclipped norms, from the end of the
      warm-up on, or of what would be one, at most 100 steps;
    - ``warmup_and_clipping``, ``clipping_during_warmup``, which clips until the warm-up ends, and
      ``warmup_and_adaptive_clipping``;
    - ``optimizer/<name>``: another optimizer;
    - ``workload/<name>``: another architecture, such as pre-norm or ReZero;
    - ``lower_learning_rate``: no run of its own, but the baseline at its largest stable rate.

    What is data (warm-up, fixed clipping) shares one compiled program; adaptive clipping and each
    other optimizer and architecture have one of their own.

    The recommendation goes through them in this order, the playbook's. It starts from the baseline
    at its best learning rate, and passes on to a later remedy only if that is better than the one
    held by more than the noise: by `margin` of the value held, by more than one example of the
    validation set, and by more than chance would give any remedy that does nothing once in forty
    comparisons, judged by the spread over seeds. One seed tells nothing of that: then two
    deviations of the remedy's evaluations around its best one count. Values that span a decade are
    compared by their quotients, and with one seed must become 1.5 times smaller; others by their
    differences; of an accuracy, what it lacks to 1. Where no trial of the baseline is unstable, no
    remedy is tried.

    Args:
      trainer: as in `run_study`.
      space_or_study: a space with the one dimension ``learning_rate`` (1e-5 to 10 on a log scale
        if None), or a study, whose range of learning rates and best other hyperparameters are
        used.
      key: the only source of randomness.
      num_steps: updates of each trial, the warm-up included.
      num_trials: learning rates of each remedy.
      num_seeds: repetitions of each trial; it is unstable if one of them is.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None. With fewer than
        eight evaluations a rise of the loss is not seen, and only infeasible trials are unstable.
      warmup_steps: length of the warm-up; a tenth of `num_steps` if None.
      max_norm: the fixed clip threshold; if None, the `percentile` of the unclipped norms of the
        baseline's best trial (of the smallest learning rate, if all were infeasible).
      percentile: for that, and for the adaptive clipper; between 0 and 100.
      optimizers: name to ``make_optimizer``, or to a pair of it and the space of its learning rate.
        Adam, a decade lower than the others, if None; ``{}`` for none.
      workloads: name to workload, with the objective of the first.
      point: further hyperparameters, name to number.
      margin: smallest improvement that counts, as a share of the value improved on.
      directory: where to store the studies, each in a folder of its own.

    Returns:
      A `Verdict` whose answer is a `RemedyComparison`, also in the evidence of the Finding
      ``remedies_compared``. Its ``recommended`` is None where a Finding says that nothing was
      unstable (``nothing_unstable``) or nothing helped (``no_remedy_helps``).

    Raises:
      ValueError: a bad argument, as `run_study`; another objective in `workloads`; a point with
        ``max_norm``, ``warmup_steps``, ``clip_steps`` or ``percentile``.

    Example:
      On a quadratic the limit is 2 / curvature, and no remedy does better than a good rate:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> from playbook_optax.procedures.remedies import compare_remedies
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"train/loss": (p["w"] ** 2).sum()}, objective="train/loss")
      >>> verdict = compare_remedies(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     space_or_study=pbx.SearchSpace({"learning_rate": pbx.Float(0.03, 30.0, scale="log")}),
      ...     num_trials=7, num_steps=40, optimizers={})
      >>> verdict.answer.recommended, [f.code for f in verdict.findings][-1]
      (None, 'no_remedy_helps')

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps, at_least=2)
    num_trials = _checks.check_count("num_trials", num_trials, at_least=2)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    if warmup_steps is None:
        warmup_steps = max(1, num_steps // 10)
    warmup_steps = _checks.check_count("warmup_steps", warmup_steps)
    if warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps = {warmup_steps} must be below num_steps = {num_steps}; the playbook "
            "tries at most a tenth of it."
        )
    if max_norm is not None:
        _checks.check_number("max_norm", max_norm, above=0.0, fix="Leave it out to choose one.")
    _checks.check_number(
        "percentile", percentile, above=0.0, below=100.0, fix="The playbook begins with 90."
    )
    _checks.check_number("margin", margin, at_least=0.0, fix="0.1 asks for a tenth.")
    fixed = clipping.check_point(point, _RESERVED)
    fixed.pop(LEARNING_RATE, None)
    rates, fixed = _rates(space_or_study, num_trials, fixed)
    eval_every = max(1, num_steps // 20) if eval_every is None else eval_every
    others = _other_optimizers(optimizers, rates, num_trials)
    example = {LEARNING_RATE: float(rates[0]), **fixed}
    users = controls.users_workload(trainer)
    _check_objectives(resolve(users, example), workloads or {}, example)
    trainer = controls.controlled(trainer, fixed, (0, warmup_steps))
    studies: dict[str, Study] = {}

    def table(rates: np.ndarray, *settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        parts = [
            clipping.points_table(fixed, {LEARNING_RATE: rates, **one}, _DTYPES) for one in settings
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def runner(trained: Trainer, like: Mapping[str, Any]) -> StudyRunner:
        return StudyRunner(
            trained,
            table(rates[:1], like),
            num_steps=num_steps,
            eval_every=eval_every,
            key=key,
            num_seeds=num_seeds,
            names=_NAMES,
        )

    def run(program: StudyRunner, name: str, points: Mapping[str, np.ndarray]) -> Study:
        folder = name if "/" not in name else f"other_{len(studies)}"
        progress.say(f"compare_remedies: {name}, {len(points[LEARNING_RATE])} trials")
        studies[name] = program.run(points, directory=clipping.subdirectory(directory, folder))
        return studies[name]

    def verdict(answer: RemedyComparison, findings: Sequence[Finding]) -> Verdict:
        trials = sum(study.num_trials for study in studies.values())
        cost = trials * num_seeds * num_steps
        return Verdict(answer, tuple(by_severity(findings)), studies, cost)

    nothing = {MAX_NORM: NO_CLIPPING, CLIP_STEPS: _ALWAYS, WARMUP_STEPS: 0}
    program = runner(trainer, nothing)
    study = run(program, BASELINE, table(rates, nothing))
    (baseline,) = remedy_rows(study, BASELINE, {BASELINE: 0}).values()
    _, (baseline,) = judge_remedies(study, [baseline], margin)
    comparison = RemedyComparison(
        recommended=None,
        rows=(baseline,),
        objective=study.objective,
        maximize=study.maximize,
        num_steps=num_steps,
        num_seeds=num_seeds,
        warmup_steps=warmup_steps,
        max_norm=math.nan,
    )
    if not any(baseline.unstable):
        return verdict(comparison, [_nothing_unstable(baseline)])
    findings = []
    if math.isnan(baseline.best_value):
        findings += feasibility_findings(feasibility_info(study))
    threshold = _threshold(study, percentile) if max_norm is None else float(max_norm)
    settings = {WARMUP: {**nothing, WARMUP_STEPS: warmup_steps}}
    if threshold > 0:
        clip = {**nothing, MAX_NORM: threshold}
        settings |= {
            CLIPPING: clip,
            BOTH: {**clip, WARMUP_STEPS: warmup_steps},
            DURING_WARMUP: {**clip, WARMUP_STEPS: warmup_steps, CLIP_STEPS: warmup_steps},
        }
    else:
        findings.append(_no_threshold())
    run(program, _FIXED, table(rates, *settings.values()))
    rows: dict[str, RemedyRow] = {}
    lengths = {name: int(setting[WARMUP_STEPS]) for name, setting in settings.items()}
    rows |= remedy_rows(studies[_FIXED], _FIXED, lengths)
    adaptive = [{PERCENTILE: percentile, WARMUP_STEPS: steps} for steps in (0, warmup_steps)]
    by_percentile = controls.variant(trainer, adaptive_from=min(_MIN_NORMS, warmup_steps))
    run(runner(by_percentile, adaptive[0]), ADAPTIVE, table(rates, *adaptive))
    lengths = {ADAPTIVE: 0, BOTH_ADAPTIVE: warmup_steps}
    rows |= remedy_rows(studies[ADAPTIVE], ADAPTIVE, lengths)
    order = [name for name in _ORDER if name in rows]
    for name, (make, own_rates) in others.items():
        other = controls.variant(trainer, make_optimizer=make)
        run(runner(other, nothing), name, table(own_rates, nothing))
        rows |= remedy_rows(studies[name], name, {name: 0})
        order.append(name)
    for short, work in (workloads or {}).items():
        name = f"workload/{short}"
        other = controls.variant(trainer, workload=work)
        run(runner(other, nothing), name, table(rates, nothing))
        rows |= remedy_rows(studies[name], name, {name: 0})
        order.append(name)
    every = [baseline, *(rows[name] for name in order)]
    recommended, (baseline, *tried) = judge_remedies(study, every, margin)
    lower = _lower(baseline)
    comparison = comparison._replace(
        recommended=None if recommended is None else recommended.remedy,
        rows=(baseline, *tried, *lower),
        max_norm=threshold if threshold > 0 else math.nan,
    )
    findings.append(_compared(comparison))
    at_end = [row for row in (baseline, *tried) if _at_end(row)]
    if at_end:
        findings.append(_best_at_end(at_end))
    if recommended is None:
        findings.append(_no_remedy_helps(baseline, lower, tried, num_seeds))
    else:
        findings.append(_recommended(recommended, baseline, comparison))
        if recommended.clipped_fraction > clipping.AGGRESSIVE:
            rate = baseline.largest_stable_learning_rate
            findings.append(
                clipping.lower_instead(
                    recommended.clipped_fraction,
                    recommended.best_learning_rate,
                    None if math.isnan(rate) else rate,
                )
            )
    return verdict(comparison, findings)


def _rates(
    given: SearchSpace | Study | None, num_trials: int, fixed: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The learning rates to sweep, and the other hyperparameters."""
    if not isinstance(given, Study):
        return clipping.learning_rate_grid(given, num_trials), fixed
    points = given.points
    if LEARNING_RATE not in points:
        raise ValueError(
            f"the study has no hyperparameter {LEARNING_RATE!r}: "
            f"{_checks.nearest(LEARNING_RATE, points)}"
        )
    rates = points[LEARNING_RATE].astype(np.float64)
    low, high = float(rates.min()), float(rates.max())
    if not 0 < low < high:
        raise ValueError(
            f"the study's learning rates, {low:g} to {high:g}, are no range to sweep; give a space."
        )
    best = outcomes(given).best
    inherited = clipping.check_point(given.point(best) if best >= 0 else {}, _RESERVED)
    inherited.pop(LEARNING_RATE, None)
    return np.geomspace(low, high, num_trials).astype(np.float32), {**inherited, **fixed}


def _other_optimizers(
    given: Mapping[str, Any] | None, rates: np.ndarray, num_trials: int
) -> dict[str, tuple[MakeOptimizer, np.ndarray]]:
    """Each other optimizer with the learning rates of its sweep, by the name of its row."""
    if given is None:

        def adam(point: Any) -> optax.GradientTransformation:
            return optimizers.adam(point[LEARNING_RATE])

        return {"optimizer/adam": (adam, (_ADAM_FACTOR * rates).astype(np.float32))}
    found = {}
    for name, value in given.items():
        make, space = value if isinstance(value, tuple) else (value, None)
        if not callable(make):
            raise _checks.ArgumentTypeError(
                f"optimizers[{name!r}] must be a function of the point, or a pair of it and a "
                f"space, got {value!r}."
            )
        own = rates if space is None else clipping.learning_rate_grid(space, num_trials)
        found[f"optimizer/{name}"] = (make, own)
    return found


def _check_objectives(
    first: Workload, workloads: Mapping[str, WorkloadLike], point: Mapping[str, Any]
) -> None:
    """Raises unless all workloads are judged by the same metric in the same direction."""
    for name, work in workloads.items():
        other = resolve(work, point)
        if (other.objective, other.maximize) != (first.objective, first.maximize):
            raise ValueError(
                f"workloads[{name!r}] has the objective {other.objective!r} (maximize="
                f"{other.maximize}), but they are compared by {first.objective!r} (maximize="
                f"{first.maximize})."
            )


def _threshold(study: Study, percentile: float) -> float:
    """The percentile of the norms at the baseline's best rate, as `choose_clip_threshold` does."""
    best = outcomes(study).best
    value = norm_histogram(study, [max(best, 0)]).percentile(percentile)
    return value if math.isfinite(value) else 0.0


def remedy_rows(study: Study, name: str, extra_steps: Mapping[str, int]) -> dict[str, RemedyRow]:
    """The rows of the remedies that one study swept; trains nothing.

    Args:
      study: as many trials of each remedy, one remedy after the other, each in the order of its
        learning rates.
      name: that of the study.
      extra_steps: by how much a run must grow for each remedy, by its name.

    Returns:
      The rows, by remedy.
    """
    seen = (outcomes(study), instability_info(study).unstable, clipping.clipped_fractions(study))
    parts = np.split(np.arange(study.num_trials), len(extra_steps))
    return {
        remedy: _row(remedy, study, name, part, steps, *seen)
        for (remedy, steps), part in zip(extra_steps.items(), parts, strict=True)
    }


def _row(
    remedy: str,
    study: Study,
    name: str,
    trials: np.ndarray,
    extra_steps: int,
    out: Outcomes,
    unstable: np.ndarray,
    fractions: np.ndarray,
) -> RemedyRow:
    """The row of some trials, which are in the order of their learning rates."""
    rates = study.points[LEARNING_RATE].astype(np.float64)[trials]
    stays = ~unstable[trials]
    num_stable = len(rates) if stays.all() else int(np.argmin(stays))
    row = RemedyRow(
        remedy=remedy,
        largest_stable_learning_rate=float(rates[num_stable - 1]) if num_stable else math.nan,
        stable_to_end=num_stable == len(rates),
        largest_useful_learning_rate=math.nan,
        best_value=math.nan,
        best_step=-1,
        best_learning_rate=math.nan,
        clipped_fraction=math.nan,
        extra_steps=extra_steps,
        spread=math.nan,
        learning_rates=tuple(rates.tolist()),
        values=tuple(out.value[trials].tolist()),
        unstable=tuple(unstable[trials].tolist()),
        study=name,
    )
    loss = np.where(out.usable, out.loss, np.inf)[trials]
    best = int(trials[np.argmin(loss)])
    if not out.usable[best]:
        return row
    return row._replace(
        best_value=float(out.value[best]),
        best_step=int(out.checkpoint_step[best]),
        best_learning_rate=float(study.points[LEARNING_RATE][best]),
        clipped_fraction=float(fractions[best]),
        spread=_spread(study, best, int(out.checkpoint_step[best])),
        best_trial=best,
        seed_values=tuple(best_by_seed(study, best).tolist()),
        wobble=wobble(out, best),
    )


def _spread(study: Study, trial: int, step: int) -> float:
    """Standard deviation of a trial's objective at a step over seeds; NaN with one seed."""
    curves = study.data[study.objective]
    if "seed" not in curves.dims:
        return math.nan
    at = int(np.flatnonzero(study.data["step"].values == step)[0])
    seeds = curves.transpose("trial", "seed", "eval").values[trial, :, at]
    return float(seeds.astype(np.float64).std(ddof=1))


class _Judge(NamedTuple):
    """The rule by which one remedy is recommended.

    Attributes:
      rows: the baseline, then the remedies in the playbook's order.
      scale: on which they are compared.
    """

    rows: tuple[RemedyRow, ...]
    scale: Scale

    def recommended(self) -> RemedyRow | None:
        """The remedy held at the end of the rows, or None if none beats the baseline."""
        baseline, *tried = self.rows
        held = baseline
        for row in tried:
            if self.scale.better(row, held):
                held = row
        return None if held is baseline else held

    def with_useful_rate(self, row: RemedyRow) -> RemedyRow:
        """The row with its largest stable rate that does as well as the baseline at its best."""
        goal = self.rows[0]
        values, stays = np.asarray(row.values), ~np.asarray(row.unstable)
        useful = stays & np.isfinite(values)
        if not math.isnan(goal.best_value):
            with np.errstate(invalid="ignore"):
                behind = self.scale.scaled(values) - self.scale.scaled(goal.best_value)
                useful &= behind <= self.scale.noise(goal, goal)
        rates = np.asarray(row.learning_rates)[useful]
        return row._replace(largest_useful_learning_rate=max(rates.tolist(), default=math.nan))


def judge_remedies(
    study: Study, rows: Sequence[RemedyRow], margin: float
) -> tuple[RemedyRow | None, tuple[RemedyRow, ...]]:
    """Which remedy is recommended; trains nothing.

    Args:
      study: the baseline's, whose objective all are compared by.
      rows: the baseline, then the remedies in the playbook's order.
      margin: smallest improvement that counts, as a share of the value improved on.

    Returns:
      The recommended row or None, and all rows with their largest useful learning rates.
    """
    judge = _Judge(tuple(rows), scale_of(rows, study, margin))
    judge = judge._replace(rows=tuple(judge.with_useful_rate(row) for row in judge.rows))
    return judge.recommended(), judge.rows


def _lower(baseline: RemedyRow) -> list[RemedyRow]:
    """The last resort, the baseline at its largest stable rate; nothing if it has none."""
    rate = baseline.largest_stable_learning_rate
    if math.isnan(rate):
        return []
    trial = baseline.learning_rates.index(rate)
    value = baseline.values[trial]
    return [
        baseline._replace(
            remedy=LOWER,
            best_value=value,
            best_step=baseline.best_step if rate == baseline.best_learning_rate else -1,
            best_learning_rate=rate,
            learning_rates=(rate,),
            values=(value,),
            unstable=(False,),
            best_trial=trial,
            seed_values=(),
            wobble=math.nan,
        )
    ]


def _at_end(row: RemedyRow) -> bool:
    ends = (row.learning_rates[0], row.learning_rates[-1])
    return row.best_learning_rate in ends


def _best_at_end(rows: Sequence[RemedyRow]) -> Finding:
    named = ", ".join(f"{row.remedy} ({row.best_learning_rate:.3g})" for row in rows)
    return Finding(
        code="best_at_end_of_sweep",
        severity="warning",
        message=f"The best learning rate is an end of the sweep for {named}: a better one may lie "
        "beyond.",
        evidence={row.remedy: row.best_learning_rate for row in rows},
        section=SECTION,
        suggestion="Compare again over a wider range of learning rates.",
    )


def _nothing_unstable(baseline: RemedyRow) -> Finding:
    low, high = baseline.learning_rates[0], baseline.learning_rates[-1]
    return Finding(
        code="nothing_unstable",
        severity="info",
        message=(
            f"No learning rate from {low:.4g} to {high:.4g} was unstable, so there is nothing to "
            "remedy, and no remedy was tried."
        ),
        evidence={"low": low, "high": high, "best_value": baseline.best_value},
        section=SECTION,
        suggestion=f"Train as it is; sweep beyond {high:.4g} if the best rate, "
        f"{baseline.best_learning_rate:.4g}, is the highest.",
    )


def _no_threshold() -> Finding:
    return Finding(
        code="no_norms_recorded",
        severity="warning",
        message="No gradient norm above 0 was recorded in the baseline, so there is no threshold "
        "to clip at, and fixed clipping was not tried.",
        evidence={},
        section=SECTION,
        suggestion="Give compare_remedies a max_norm=.",
    )


def _limit(row: RemedyRow) -> str:
    if math.isnan(row.largest_stable_learning_rate):
        return f"none from {row.learning_rates[0]:.3g} on"
    return f"{'at least ' * row.stable_to_end}{row.largest_stable_learning_rate:.3g}"


def _compared(comparison: RemedyComparison) -> Finding:
    rows = [row for row in comparison.rows if row.remedy != LOWER]
    limits = "; ".join(f"{row.remedy}: {_limit(row)}, best {row.best_value:.4g}" for row in rows)
    return Finding(
        code="remedies_compared",
        severity="info",
        message=(
            f"Largest stable learning rate and best {comparison.objective} of each remedy: "
            f"{limits}."
        ),
        evidence={**comparison._asdict(), "rows": [row._asdict() for row in comparison.rows]},
        section=SECTION,
    )


def _recommended(row: RemedyRow, baseline: RemedyRow, comparison: RemedyComparison) -> Finding:
    extra = f", for {row.extra_steps} more steps" if row.extra_steps else ""
    warm = f"Prepend a warm-up of {comparison.warmup_steps} steps"
    clip = f"clip the gradient at {comparison.max_norm:.4g}"
    advice = {
        WARMUP: f"{warm}.",
        CLIPPING: f"C{clip[1:]}.",
        ADAPTIVE: "Clip the gradient with clip_by_percentile.",
        BOTH: f"{warm}, and {clip}.",
        DURING_WARMUP: f"{warm}, and {clip} until it ends.",
        BOTH_ADAPTIVE: f"{warm}, and clip the gradient with clip_by_percentile.",
    }
    return Finding(
        code="remedy_recommended",
        severity="info",
        message=(
            f"{row.remedy} is recommended: best {comparison.objective} {row.best_value:.4g} at "
            f"learning rate {row.best_learning_rate:.4g}{extra}, without a remedy "
            f"{baseline.best_value:.4g} at {baseline.best_learning_rate:.4g}. Largest stable "
            f"learning rate: {_limit(row)}, without a remedy {_limit(baseline)}."
        ),
        evidence={"remedy": row._asdict(), "baseline": baseline._asdict()},
        section=SECTION,
        suggestion=advice.get(row.remedy, f"Train with {row.remedy}.")
        + f" Sweep the learning rate around {row.best_learning_rate:.4g}.",
    )


def _no_remedy_helps(
    baseline: RemedyRow, lower: Sequence[RemedyRow], tried: Sequence[RemedyRow], num_seeds: int
) -> Finding:
    limit, useful = baseline.largest_stable_learning_rate, baseline.largest_useful_learning_rate
    wider = [row for row in tried if row.largest_useful_learning_rate > useful]
    named = ", ".join(f"{row.remedy} ({row.largest_useful_learning_rate:.3g})" for row in wider)
    moved = (
        f" As good a result is reached up to learning rate {useful:.3g} without a remedy, and up "
        f"to a higher one with {named}."
        if wider
        else ""
    )
    if math.isnan(baseline.best_value):
        advice = "Lower the range of the learning rate."
    elif lower:
        advice = (
            f"Train without one at learning rate {min(baseline.best_learning_rate, limit):.4g}; "
            f"the largest stable one is {limit:.4g}."
        )
    else:
        advice = f"Lower the learning rate below {baseline.learning_rates[0]:.4g}."
    if wider and num_seeds == 1:
        advice += (
            " Repeat compare_remedies with num_seeds= to tell smaller differences from chance."
        )
    return Finding(
        code="no_remedy_helps",
        severity="info",
        message=(
            "No remedy is better than the best learning rate without one by more than the noise: "
            f"the instability at higher learning rates costs nothing that they win back.{moved}"
        ),
        evidence={
            "best_value": baseline.best_value,
            "best_learning_rate": baseline.best_learning_rate,
            "largest_stable_learning_rate": limit,
        },
        section=SECTION,
        suggestion=advice,
    )
