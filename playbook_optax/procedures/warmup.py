"""How long a warm-up: the shortest that trains stably far above the unstable learning rate."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from playbook_optax import _checks, _feasibility
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.instability import instability_info
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.analysis.spreads import best_by_seed
from playbook_optax.procedures import clipping, controls
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.procedures.instability import find_unstable_learning_rate, inherited_point
from playbook_optax.procedures.scale import scale_of, wobble
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.keys import check_key
from playbook_optax.trials.stepper import STEP_LOSS
from playbook_optax.trials.workload import resolve

WARMUP_STEPS, BASE_LEARNING_RATE = "warmup_steps", "base_learning_rate"
SECTION = "How can optimization failures be debugged and mitigated? (learning rate warmup)"
LARGEST_SHARE = 0.1
"""The longest warm-up tried, as a share of num_steps."""
LARGE_SHARE = 0.05
"""From more than this share of num_steps on, the run may have to be longer still."""
POST_WARMUP = 2
"""post_warmup_steps, in units of warmup_steps."""
LOWER_FACTORS = (2.0, 5.0)
"""Tried beside the factors that are asked for, to tell how far a warm-up helps if not so far."""
SHORTEST_CURVE = 10
"""Evaluations of the shortest trial of the sweep: rises are looked for in eight or more."""
MARGIN = 0.05
"""Smallest improvement that counts, as a share of what is improved on."""
BASELINE_RANGE = 100.0
"""The baseline's learning rates reach from the unstable one down to this fraction of it."""


class WarmupAnswer(NamedTuple):
    """A warm-up that trains stably at a much larger learning rate, and better than none.

    Attributes:
      warmup_steps: its length, to be prepended to the schedule.
      base_learning_rate: the first value of the schedule, which the warm-up rises to.
      num_steps: length of the whole run, the warm-up included.
      unstable_base_learning_rate: the smallest rate at which training without it is unstable.
      best_value: the objective with it, at the best evaluation.
      baseline_value: the objective without it, at that run's best learning rate and evaluation.
    """

    warmup_steps: int
    base_learning_rate: float
    num_steps: int
    unstable_base_learning_rate: float
    best_value: float
    baseline_value: float


class WarmupRow(NamedTuple):
    """One trial of the sweep.

    Attributes:
      warmup_steps: length of the warm-up.
      factor: base learning rate in units of the unstable one.
      base_learning_rate: the rate that it rises to.
      unstable: whether training was, in the warm-up or the constant part of twice its length.
      kind: of the instability, "" if none.
    """

    warmup_steps: int
    factor: float
    base_learning_rate: float
    unstable: bool
    kind: str


@takes_trainer
def tune_warmup(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    unstable_learning_rate: float | None = None,
    factors: Sequence[float] = (10.0,),
    warmup_steps: Sequence[int] | None = None,
    search_steps: int | None = None,
    num_trials: int = 8,
    num_seeds: int = 1,
    point: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Picks the shortest stable warm-up for a learning rate ten times the unstable one.

    In the playbook's order:

    1. The unstable base learning rate is found by `find_unstable_learning_rate`, unless given.
    2. One study sweeps `warmup_steps` and base rates, which are `factors` times the unstable one:
       up from 0 in `warmup_steps`, then constant for twice as many. A trial is judged on these
       three lengths only. All trials are trained for the longest of them, because one study has
       one length: orders of magnitude apart, the short ones cost as much as the long.
       Factors of 2 and 5 are tried beside, to tell how far a warm-up helps if not as far as asked.
    3. For each factor the shortest stable warm-up is prepended to the schedule, which is shifted
       whole, so that the run becomes ``num_steps + warmup_steps`` long.
    4. The best checkpoint is compared with that of the same schedule without warm-up, in
       `num_steps` at its own best learning rate. It is better where the gain is more than 5% of
       what it improves on and more than the noise, judged as in `compare_remedies`.

    Args:
      trainer: as in `run_study`.
      space_or_study: a space with the one dimension ``learning_rate`` where that search begins; or
        a finished study at constant rates, which brackets it at no cost, and whose best rate is the
        baseline's.
      key: the only source of randomness.
      num_steps: the playbook's max_train_steps, without warm-up.
      unstable_learning_rate: the unstable base learning rate, if it is known.
      factors: base learning rates to try, in units of the unstable one, above 1.
      warmup_steps: lengths to try; 10, 100, 1000, ... and a tenth of `num_steps`, the largest, if
        None.
      search_steps: updates of a trial in the search for the unstable rate; 500, or `num_steps`
        where that is less, if None.
      num_trials: learning rates of the baseline's sweep, down to a hundredth of the unstable one;
        not used with a study.
      num_seeds: repetitions of each trial; it is unstable if one of them is.
      point: further hyperparameters, name to number; those of the study's best trial by default.
      eval_every: updates between evaluations of the runs that are compared; a twentieth of
        `num_steps` if None.
      directory: where to store the studies, each in a folder of its own name.

    Returns:
      A `Verdict`: `answer` is a `WarmupAnswer`, or None where no unstable rate was found, no
      warm-up trains stably, or none gives a better checkpoint than training without. The Finding
      ``warmup_sweep`` holds a `WarmupRow` for each trial.

    Raises:
      ValueError: a bad argument, as `run_study`; a warm-up that is not shorter than the run; or a
        point with ``warmup_steps`` or ``base_learning_rate``.

    Example:
      On a quadratic the limit is 2 / curvature at any time, and no warm-up helps:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> from playbook_optax.procedures.warmup import tune_warmup
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: (0.5 * (p["w"] ** 2).sum(), (s, {})),
      ...     batch=lambda d, k, i: (), objective="train/loss",
      ...     evaluate=lambda p, s, d: {"train/loss": 0.5 * (p["w"] ** 2).sum()})
      >>> verdict = tune_warmup(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     num_steps=200, unstable_learning_rate=2.1)
      >>> verdict.answer, verdict.findings[0].code, verdict.cost
      (None, 'no_warmup_helps', 360)

    Source: playbook, "Learning rate warmup" ("When to apply learning rate warmup" and "How to apply
    learning rate warmup").
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps, at_least=2)
    num_trials = _checks.check_count("num_trials", num_trials, at_least=2)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    factors = _check_factors(factors)
    lengths = _check_lengths(warmup_steps, num_steps)
    if eval_every is None:
        eval_every = max(1, num_steps // 20)
    fixed = clipping.check_point(point, (LEARNING_RATE, WARMUP_STEPS, BASE_LEARNING_RATE))
    given = space_or_study if isinstance(space_or_study, Study) else None
    if given is not None:
        fixed = {**inherited_point(given), **fixed}
    trainer = controls.controlled(trainer, fixed, (0, *lengths))
    studies: dict[str, Study] = {}
    findings: list[Finding] = []
    cost = 0
    if unstable_learning_rate is None:
        search_steps = min(500, num_steps) if search_steps is None else search_steps
        search = find_unstable_learning_rate(
            trainer.with_fixed(controls.CONSTANT),
            space_or_study,
            key=key,
            num_steps=search_steps,
            num_seeds=num_seeds,
            point=fixed,
            directory=clipping.subdirectory(directory, "unstable_learning_rate"),
        )
        studies |= {f"unstable_learning_rate/{name}": s for name, s in search.studies.items()}
        findings += search.findings
        cost += search.cost
        if search.answer is None:
            return Verdict(None, search.findings, studies, cost)
        unstable_learning_rate = float(search.answer)
    _checks.check_number(
        "unstable_learning_rate", unstable_learning_rate, above=0.0, fix="Leave it out to find it."
    )
    unstable_learning_rate = float(unstable_learning_rate)

    names = {**controls.NAMES, BASE_LEARNING_RATE: LEARNING_RATE}

    def run(
        name: str,
        lengths: Sequence[int],
        rates: Sequence[float] | np.ndarray,
        num_steps: int,
        eval_every: int,
        decay: Mapping[str, Any],
    ) -> Study:
        table = clipping.points_table(
            fixed, {WARMUP_STEPS: lengths, BASE_LEARNING_RATE: rates}, {WARMUP_STEPS: np.int32}
        )
        runner = StudyRunner(
            trainer.with_fixed(decay),
            table,
            num_steps=num_steps,
            eval_every=eval_every,
            key=key,
            num_seeds=num_seeds,
            names=names,
        )
        studies[name] = runner.run(table, directory=clipping.subdirectory(directory, name))
        nonlocal cost
        cost += len(rates) * num_seeds * num_steps
        return studies[name]

    every = sorted({*factors, *(f for f in LOWER_FACTORS if f < min(factors))})
    grid = [(length, factor) for factor in every for length in lengths]
    bases = [_base(unstable_learning_rate, factor) for _, factor in grid]
    sweep = run(
        "warmup_sweep",
        [length for length, _ in grid],
        bases,
        (1 + POST_WARMUP) * lengths[-1],
        max(1, (1 + POST_WARMUP) * lengths[0] // SHORTEST_CURVE),
        controls.CONSTANT,
    )
    own = {LEARNING_RATE: bases[0], **fixed}
    name = resolve(controls.users_workload(trainer), own).training_loss
    rows = judge_sweep(sweep, grid, name)
    findings.append(_swept(rows, unstable_learning_rate, num_steps))
    shortest = {
        factor: min(r.warmup_steps for r in rows if r.factor == factor and not r.unstable)
        for factor in every
        if any(r.factor == factor and not r.unstable for r in rows)
    }
    chosen = {factor: length for factor, length in shortest.items() if factor in factors}
    if not chosen:
        findings.append(_none_stable(rows, factors, shortest, unstable_learning_rate))
        return Verdict(None, tuple(by_severity(findings)), studies, cost)

    if given is not None and outcomes(given).best >= 0:
        rates = np.asarray([given.best().point[LEARNING_RATE]])
    else:
        rates = np.geomspace(
            unstable_learning_rate / BASELINE_RANGE, unstable_learning_rate, num_trials
        )
    baseline = run("baseline", [0] * len(rates), rates, num_steps, eval_every, controls.DECAYING)
    warmed = []
    for length in sorted(set(chosen.values())):
        peaks = [_base(unstable_learning_rate, f) for f, n in chosen.items() if n == length]
        study = run(
            f"with_warmup_{length}",
            [length] * len(peaks),
            peaks,
            num_steps + length,
            eval_every,
            controls.DECAYING,
        )
        warmed.append(study)
    answer, compared = judge_warmup(baseline, warmed, num_steps, unstable_learning_rate)
    return Verdict(answer, tuple(by_severity([*findings, *compared])), studies, cost)


def judge_warmup(
    baseline: Study, warmed: Sequence[Study], num_steps: int, unstable_learning_rate: float
) -> tuple[WarmupAnswer | None, list[Finding]]:
    """Whether the best run with a warm-up is better than the best without; trains nothing.

    Args:
      baseline: runs without warm-up, at ``base_learning_rate``.
      warmed: runs with it, of ``warmup_steps`` each.
      num_steps: updates of a run without it.
      unstable_learning_rate: where training without it becomes unstable.

    Returns:
      The answer, or None where it is not better beyond noise, and the findings.
    """
    base_rows = _results(baseline)
    of_study = [(row, study) for study in warmed for row in _results(study)]
    warm_rows = [row for row, _ in of_study]
    sign = -1.0 if baseline.maximize else 1.0
    plain = _best(base_rows, sign)
    warm = _best(warm_rows, sign)
    better = warm is not None
    if plain is not None and warm is not None:
        trained = next(study for row, study in of_study if row is warm)
        pair = [_noise_of(plain, baseline), _noise_of(warm, trained)]
        better = scale_of(pair, baseline, MARGIN).better(pair[1], pair[0])
    findings = [_compared(better, plain, warm, base_rows, warm_rows, baseline, num_steps)]
    if plain is not None and len(base_rows) > 1 and plain == base_rows[0]:
        findings.append(_at_low_end(plain))
    if not better:
        return None, findings
    assert warm is not None
    if warm.warmup_steps > LARGE_SHARE * num_steps:
        findings.append(_may_grow(warm.warmup_steps, num_steps))
    answer = WarmupAnswer(
        warmup_steps=warm.warmup_steps,
        base_learning_rate=warm.base_learning_rate,
        num_steps=num_steps + warm.warmup_steps,
        unstable_base_learning_rate=unstable_learning_rate,
        best_value=warm.best_value,
        baseline_value=plain.best_value if plain else float("nan"),
    )
    return answer, findings


class _Result(NamedTuple):
    """A run of the comparison: its point, its best checkpoint and what its noise shows in."""

    trial: int
    warmup_steps: int
    base_learning_rate: float
    best_value: float
    step: int
    unstable: bool
    seed_values: tuple[float, ...] = ()
    wobble: float = float("nan")


def default_warmup_steps(num_steps: int) -> list[int]:
    """Orders of magnitude from 10 on, and a tenth of the run, which is the longest.

    Args:
      num_steps: length of the run.

    Returns:
      Ascending lengths, at least one.

    Example:
      >>> default_warmup_steps(10_000), default_warmup_steps(600)
      ([10, 100, 1000], [10, 60])
    """
    longest = max(1, int(num_steps * LARGEST_SHARE))
    lengths, length = [], 10
    while length < longest:
        lengths.append(length)
        length *= 10
    return [*lengths, longest]


def _check_factors(factors: Sequence[float]) -> tuple[float, ...]:
    values = tuple(np.ravel(np.asarray(factors, object)))
    if not values:
        raise ValueError("factors is empty: give at least one, such as (10.0,).")
    for i, factor in enumerate(values):
        _checks.check_number(
            f"factors[{i}]", factor, above=1.0, fix="The playbook takes 10, perhaps 100 as well."
        )
    return tuple(sorted({float(factor) for factor in values}))


def _check_lengths(warmup_steps: Sequence[int] | None, num_steps: int) -> list[int]:
    if warmup_steps is None:
        return default_warmup_steps(num_steps)
    lengths = []
    for i, value in enumerate(np.ravel(np.asarray(warmup_steps, object))):
        length = _checks.check_count(f"warmup_steps[{i}]", value)
        if length >= num_steps:
            raise ValueError(
                f"warmup_steps[{i}] = {length} is not shorter than the run, num_steps = "
                f"{num_steps}; the playbook tries at most a tenth of it, {num_steps // 10}."
            )
        lengths.append(length)
    if not lengths:
        raise ValueError("warmup_steps is empty: leave it out for orders of magnitude from 10 on.")
    return sorted(set(lengths))


def _base(unstable_learning_rate: float, factor: float) -> float:
    """The base learning rate, as the float32 that is trained with."""
    largest = float(np.finfo(np.float32).max)
    return float(np.float32(min(unstable_learning_rate * factor, largest)))


def judge_sweep(
    study: Study, grid: Sequence[tuple[int, float]], name: str | None
) -> list[WarmupRow]:
    """How stable each trial of the sweep was in its warm-up and after it; trains nothing.

    Args:
      study: the sweep.
      grid: length of the warm-up and factor of each trial.
      name: the workload's training loss, if it has a name of its own.

    Returns:
      A row for each trial.
    """
    stops = [(1 + POST_WARMUP) * length for length, _ in grid]
    return [_judge(study, i, stops[i], name, factor) for i, (_, factor) in enumerate(grid)]


def _judge(study: Study, trial: int, stop: int, name: str | None, factor: float) -> WarmupRow:
    """Judges a trial of the sweep on its own first `stop` steps."""
    row = instability_info(_until(study, trial, stop, name)).rows[0]
    point = study.point(trial)
    return WarmupRow(
        warmup_steps=int(point[WARMUP_STEPS]),
        factor=factor,
        base_learning_rate=float(point[BASE_LEARNING_RATE]),
        unstable=bool(row.unstable),
        kind=row.kind,
    )


def _until(study: Study, trial: int, stop: int, name: str | None) -> Study:
    """One trial's record as if its run had ended at step `stop`, judged anew.

    What is a total over the whole run, such as the histogram of norms, is left out.
    """
    step = study.data["step"].values
    data = study.data.isel(trial=[trial], eval=np.flatnonzero(step <= stop))
    totals = [n for n in data.data_vars if str(n).startswith(("norms/", "best_"))]
    data = data.drop_vars(totals).drop_dims("norm_bin", errors="ignore")
    name = name or ("train/loss" if "train/loss" in data else STEP_LOSS)
    curve = data[name].transpose(..., "eval").values.astype(np.float64)
    margin = _feasibility.EVALUATION_MARGIN
    if name == STEP_LOSS:  # Not known before the first update.
        curve, margin = curve[..., 1:], _feasibility.BATCH_MARGIN
    high, first = _feasibility.high_loss(curve, margin=margin)
    reason, broken_at = (data[n].values for n in ("infeasible_reason", "infeasible_step"))
    nonfinite = [_feasibility.REASONS[i] for i in (1, 2)]
    broke = np.isin(reason, nonfinite) & (broken_at < stop)
    offset = int(name == STEP_LOSS)
    at = np.where(broke, broken_at, np.where(high, data["step"].values[first + offset] - 1, -1))
    why = np.where(broke, reason, np.where(high, _feasibility.REASONS[_feasibility.HIGH_LOSS], ""))
    dims = data["infeasible"].dims
    data = data.assign(
        infeasible=(dims, broke | high),
        infeasible_step=(dims, at.astype(np.int32)),
        infeasible_reason=(dims, why),
    )
    spec = {
        **study.spec,
        "num_trials": 1,
        "num_steps": stop,
        "step": [int(s) for s in data["step"].values],
    }
    return dataclasses.replace(
        study, data=data, spec=spec, _blocks=(), _rows=None, _extend=None, _replay=None
    )


def _results(study: Study) -> list[_Result]:
    out, unstable = outcomes(study), instability_info(study).unstable
    return [
        _Result(
            trial=i,
            warmup_steps=int(study.points[WARMUP_STEPS][i]),
            base_learning_rate=float(study.points[BASE_LEARNING_RATE][i]),
            best_value=float(out.value[i]),
            step=int(out.checkpoint_step[i]),
            unstable=bool(unstable[i]),
        )
        for i in range(study.num_trials)
    ]


def _noise_of(row: _Result, study: Study) -> _Result:
    """The row of a feasible run with what tells its noise."""
    values = best_by_seed(study, row.trial)
    return row._replace(
        seed_values=tuple(values.tolist()), wobble=wobble(outcomes(study), row.trial)
    )


def _best(rows: Iterable[_Result], sign: float) -> _Result | None:
    """The run with the best checkpoint; ties go to the first."""
    return min(
        (row for row in rows if np.isfinite(row.best_value)),
        key=lambda row: sign * row.best_value,
        default=None,
    )


def _swept(rows: list[WarmupRow], unstable_learning_rate: float, num_steps: int) -> Finding:
    stable = [row for row in rows if not row.unstable]
    return Finding(
        code="warmup_sweep",
        severity="info",
        message=(
            f"{len(stable)} of {len(rows)} pairs of warm-up and base learning rate trained stably "
            f"(unstable without warm-up from {unstable_learning_rate:.4g} on)."
        ),
        evidence={
            "unstable_base_learning_rate": unstable_learning_rate,
            "num_steps": num_steps,
            "rows": [row._asdict() for row in rows],
        },
        section=SECTION,
    )


def _none_stable(
    rows: list[WarmupRow],
    factors: Sequence[float],
    shortest: Mapping[float, int],
    unstable_learning_rate: float,
) -> Finding:
    longest = max(row.warmup_steps for row in rows)
    asked = " or ".join(f"{factor:g}" for factor in factors)
    message = (
        f"No warm-up of up to {longest} steps trains stably at {asked} times the unstable learning "
        f"rate, {unstable_learning_rate:.4g}"
    )
    if shortest:
        factor = max(shortest)
        message += (
            f"; at {factor:g} times a warm-up of {shortest[factor]} steps does, so that it helps, "
            "but less than the playbook asks for."
        )
        advice = f"Tune it there: tune_warmup with factors=({factor:g},). Clipping may allow more."
    else:
        lower = " or ".join(f"{f:g}" for f in sorted({row.factor for row in rows} - {*factors}))
        message += f", nor at {lower} times: no warm-up helps." if lower else ": none helps."
        advice = "Try clipping, another optimizer or architecture, or a lower learning rate."
    return Finding(
        code="warmup_helps_less" if shortest else "no_warmup_helps",
        severity="warning",
        message=message,
        evidence={
            "factors": factors,
            "longest_warmup_steps": longest,
            "unstable_base_learning_rate": unstable_learning_rate,
            "shortest_stable": {f"{f:g}": length for f, length in shortest.items()},
        },
        section=SECTION,
        suggestion=advice,
    )


def _compared(
    better: bool,
    plain: _Result | None,
    warm: _Result | None,
    base_rows: list[_Result],
    warm_rows: list[_Result],
    baseline: Study,
    num_steps: int,
) -> Finding:
    def told(row: _Result | None) -> str:
        if row is None:
            return "none, because every run was infeasible"
        return f"{row.best_value:.4g} (base learning rate {row.base_learning_rate:.4g})"

    length = warm.warmup_steps if warm else max(row.warmup_steps for row in warm_rows)
    verdict = "better" if better else "no better, beyond noise,"
    chance = (
        ""
        if baseline.num_seeds > 1
        else " This is one seed: repeat tune_warmup with num_seeds= to be sure."
    )
    return Finding(
        code="warmup_helps" if better else "warmup_no_better",
        severity="info" if better else "warning",
        message=(
            f"The best {baseline.objective} with {length} steps of warm-up, in "
            f"{num_steps + length} steps, is {told(warm)}; without, in {num_steps} steps, "
            f"{told(plain)}: {verdict} with warm-up."
        ),
        evidence={
            "objective": baseline.objective,
            "maximize": baseline.maximize,
            "num_seeds": baseline.num_seeds,
            "with_warmup": [row._asdict() for row in warm_rows],
            "baseline": [row._asdict() for row in base_rows],
            "num_steps": num_steps,
        },
        section=SECTION,
        suggestion=(
            f"Prepend it to the schedule and train for {num_steps + length} steps.{chance}"
            if better
            else f"Train without warm-up, or try other factors.{chance}"
        ),
    )


def _at_low_end(plain: _Result) -> Finding:
    return Finding(
        code="baseline_at_end_of_sweep",
        severity="warning",
        message=(
            f"Without warm-up the best base learning rate is the smallest tried, "
            f"{plain.base_learning_rate:.4g}: a smaller one may be better still, so the baseline "
            "may be unfairly weak."
        ),
        evidence={"base_learning_rate": plain.base_learning_rate, "best_value": plain.best_value},
        section=SECTION,
        suggestion="Give tune_warmup a finished learning-rate sweep as the study: its best rate is "
        "taken.",
    )


def _may_grow(warmup_steps: int, num_steps: int) -> Finding:
    share = warmup_steps / num_steps
    beyond = (
        f", and more than the {LARGEST_SHARE:.0%} that the playbook tries"
        if share > LARGEST_SHARE
        else ""
    )
    return Finding(
        code="max_train_steps_may_need_to_grow",
        severity="warning",
        message=(
            f"The warm-up of {warmup_steps} steps is {share:.0%} of the {num_steps} steps of the "
            f"run, more than {LARGE_SHARE:.0%}{beyond}: max_train_steps may need to grow."
        ),
        evidence={"warmup_steps": warmup_steps, "num_steps": num_steps, "share": share},
        section=SECTION,
        suggestion=f"Train for more than {num_steps + warmup_steps} steps, and see whether the "
        "best checkpoint improves.",
    )
