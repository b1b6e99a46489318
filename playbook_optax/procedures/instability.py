"""Where training becomes unstable, and whether a rate somewhat above the best one is already."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.instability import InstabilityRow, instability_info
from playbook_optax.procedures import clipping
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.procedures.learning_rate import sweep_learning_rate
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import NoFeasibleTrial, Study
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import Float, SearchSpace
from playbook_optax.trials.keys import check_key

SECTION = "How can optimization failures be debugged and mitigated? (identifying instability)"
GIVEN = "given"
LOWEST, HIGHEST = 1e-37, 1e37
"""Learning rates are not searched beyond these, where float32 ends."""


@_shown.short
class Limit(NamedTuple):
    """What is known of the learning rates tried so far, ascending.

    Attributes:
      rates: learning rates, float64 (trial,).
      unstable: whether each was unstable, bool (trial,).
    """

    rates: np.ndarray
    unstable: np.ndarray

    def add(self, rates: np.ndarray, unstable: np.ndarray) -> Limit:
        """With more trials; of two at the same rate an unstable one decides."""
        every = np.concatenate([self.rates, np.asarray(rates, np.float64)])
        flags = np.concatenate([self.unstable, unstable])
        distinct, index = np.unique(every, return_inverse=True)
        return Limit(distinct, np.bincount(index, weights=flags) > 0)

    def of(self, study: Study) -> Limit:
        """With the trials of a study, as its curves say.

        Args:
          study: trials at learning rates.
        """
        return self.add(study.points[LEARNING_RATE], instability_info(study).unstable)

    def within(self, ratio: float) -> bool:
        """Whether the search is over: the ends of the bracket are known and near.

        Args:
          ratio: their largest quotient.
        """
        low, high = self.low, self.high
        return low is not None and high is not None and high / low <= ratio

    @property
    def high(self) -> float | None:
        """The smallest unstable rate."""
        return float(self.rates[self.unstable][0]) if self.unstable.any() else None

    @property
    def low(self) -> float | None:
        """The largest stable rate below every unstable one."""
        first = int(self.unstable.argmax()) if self.unstable.any() else len(self.rates)
        return float(self.rates[first - 1]) if first else None

    @property
    def stable_above(self) -> list[float]:
        """Stable rates above an unstable one."""
        above = self.rates > (math.inf if self.high is None else self.high)
        return [float(rate) for rate in self.rates[above & ~self.unstable]]


@takes_trainer
def find_unstable_learning_rate(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 500,
    ratio: float = 1.1,
    num_trials: int = 16,
    num_seeds: int = 1,
    max_rounds: int = 12,
    point: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Finds the smallest learning rate at which training is unstable, to a stated ratio.

    A sweep over a wide range brackets it: the smallest unstable rate and the largest stable one
    below. Where all rates are stable, or all unstable, the range is widened, up to the limits of
    float32. Further rounds divide the bracket until its ends are within `ratio`, each a study of
    the same compiled program. A trial is unstable where `instability_info` says so: it is
    infeasible, or its loss rises beyond its noise. Slow training is stable.

    The rate is constant unless `make_schedule` is given. The search is cautious: a stable rate
    above an unstable one does not raise the answer, but is reported.

    Args:
      trainer: as in `run_study`.
      space_or_study: a space with the one dimension ``learning_rate`` (1e-6 to 1e6 on a log scale
        if None) where the search begins; or a finished study, whose trials are the first bracket
        at no cost, as far as they have the hyperparameters of `point`. It must be one of the same
        workload, optimizer and schedule.
      key: the only source of randomness.
      num_steps: updates of each trial; an instability that comes later is not seen.
      ratio: largest quotient of the smallest unstable and the largest stable rate, at least 1.001.
      num_trials: learning rates in a round, at most.
      num_seeds: repetitions of each; a rate is unstable if one of them is.
      max_rounds: rounds after which the search gives up.
      point: further hyperparameters, name to number; those of the study's best trial by default.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None.
      directory: where to store the studies, one folder for each round.

    Returns:
      A `Verdict`: `answer` is the smallest unstable learning rate found, float, the playbook's
      unstable_base_learning_rate; the Finding ``unstable_learning_rate`` holds the largest stable
      one below it and the rounds. None where no rate was unstable, every rate was, or the bracket
      is still too wide after `max_rounds`.

    Raises:
      ValueError: a bad argument, as `run_study`, or a space or study without ``learning_rate``.

    Example:
      Gradient descent on half the square becomes unstable at 2:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> from playbook_optax.procedures.instability import find_unstable_learning_rate
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: (0.5 * (p["w"] ** 2).sum(), (s, {})),
      ...     batch=lambda d, k, i: (), objective="train/loss",
      ...     evaluate=lambda p, s, d: {"train/loss": 0.5 * (p["w"] ** 2).sum()})
      >>> verdict = find_unstable_learning_rate(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     num_steps=100)
      >>> 2.0 / 1.1 < verdict.answer < 2.0 * 1.1, verdict.findings[0].code
      (True, 'unstable_learning_rate')

    Source: playbook, "Learning rate warmup" (unstable_base_learning_rate) and "How can optimization
    failures be debugged and mitigated?"
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    num_trials = _checks.check_count("num_trials", num_trials)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    max_rounds = _checks.check_count("max_rounds", max_rounds)
    _checks.check_number(
        "ratio", ratio, at_least=1.001, fix="It is a quotient of learning rates, such as 1.1."
    )
    fixed = clipping.check_point(point, (LEARNING_RATE,))
    studies: dict[str, Study] = {}
    evidence = Limit(np.empty(0), np.empty(0, bool))
    low, high = 1e-6, 1e6
    if isinstance(space_or_study, Study):
        studies[GIVEN] = space_or_study
        fixed = {**inherited_point(space_or_study), **fixed}
        evidence = evidence.add(*_rates_at(space_or_study, fixed))
    elif space_or_study is not None:
        clipping.learning_rate_grid(space_or_study, 2)
        low, high = _range_of(space_or_study)
    runner = StudyRunner(
        trainer,
        clipping.points_table(fixed, {LEARNING_RATE: [1.0]}),
        num_steps=num_steps,
        eval_every=max(1, num_steps // 20) if eval_every is None else eval_every,
        key=key,
        num_seeds=num_seeds,
    )
    cost, rounds, decades = 0, 0, max(1.0, math.log10(high / low))
    refusal = None
    while not evidence.within(ratio):
        if not len(evidence.rates):
            rates = np.geomspace(low, high, num_trials) if num_trials > 1 else np.array([low])
        elif evidence.high is None:
            rates = _beyond(float(evidence.rates[-1]), decades, num_trials)
            decades *= 2
        elif evidence.low is None:
            rates = _beyond(float(evidence.rates[0]), -decades, num_trials)
            decades *= 2
        else:
            rates = _between(evidence.low, evidence.high, ratio, num_trials)
        if not len(rates):
            refusal = _at_the_limit(evidence, num_steps)
            break
        if rounds == max_rounds:
            refusal = _gave_up(evidence, ratio, max_rounds)
            break
        name = f"round_{rounds}"
        table = clipping.points_table(fixed, {LEARNING_RATE: rates})
        study = runner.run(table, directory=clipping.subdirectory(directory, name))
        studies[name] = study
        evidence = evidence.of(study)
        rounds += 1
        cost += len(rates) * num_seeds * num_steps
    findings = [refusal] if refusal else [_found(evidence, ratio, rounds, num_steps)]
    if evidence.stable_above:
        findings.append(_not_monotone(evidence))
    answer = None if refusal else evidence.high
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


@takes_trainer
def probe_early_instability(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    learning_rate: float | None = None,
    factor: float = 2.0,
    num_steps: int = 500,
    num_trials: int = 24,
    num_seeds: int = 1,
    point: Mapping[str, Any] | None = None,
    eval_every: int = 1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Whether the loss rises early in training at a rate somewhat above the best one, lr*.

    Two trials are trained, at lr* and at `factor` times lr*, and evaluated after each step: some
    models become unstable very early and recover, and then train slowly; evaluations at intervals
    do not show it. Each of the ``num_steps + 1`` evaluations of a trial costs what the workload's
    `evaluate` costs, which may be much more than a step: with a large evaluation set give the
    workload a smaller one (``num_train_eval``), or a larger `eval_every`; the peaks of the training
    loss are recorded at each step anyway.

    Args:
      trainer: as in `run_study`.
      space_or_study: a finished study, whose best trial has lr*; or the space that
        `sweep_learning_rate` sweeps first to find it.
      key: the only source of randomness.
      learning_rate: lr*, if it is known: nothing is swept then.
      factor: what lr* is multiplied by, above 1.
      num_steps: updates of each trial: the early part of training.
      num_trials: learning rates of the sweep, where there is one.
      num_seeds: repetitions of each trial.
      point: further hyperparameters, name to number; those of the study's best trial by default.
      eval_every: updates between evaluations.
      directory: where to store the studies, each in a folder of its own name.

    Returns:
      A `Verdict`: `answer` is True if the loss rises beyond its noise, or diverges, at `factor`
      times lr*, and False if not; a Finding says at which steps. None where no lr* is known,
      because every trial was infeasible or the best is at an end of the sweep.

    Raises:
      ValueError: a bad argument, as `run_study`, or a space or study without ``learning_rate``.

    Example:
      Gradient descent on half the square is stable below 2:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> from playbook_optax.procedures.instability import probe_early_instability
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: (0.5 * (p["w"] ** 2).sum(), (s, {})),
      ...     batch=lambda d, k, i: (), objective="train/loss",
      ...     evaluate=lambda p, s, d: {"train/loss": 0.5 * (p["w"] ** 2).sum()})
      >>> verdict = probe_early_instability(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     learning_rate=1.2, num_steps=20)
      >>> verdict.answer, verdict.cost
      (True, 40)

    Source: playbook, "How can optimization failures be debugged and mitigated?" (identifying
    unstable workloads).
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    _checks.check_number("factor", factor, above=1.0, fix="The playbook takes 2.")
    fixed = clipping.check_point(point, (LEARNING_RATE,))
    studies: dict[str, Study] = {}
    if isinstance(space_or_study, Study):
        fixed = {**inherited_point(space_or_study), **fixed}
    cost = 0
    if learning_rate is not None:
        _checks.check_number("learning_rate", learning_rate, above=0.0, fix="Give lr*, the best.")
    else:
        sweep = sweep_learning_rate(
            trainer.with_fixed(clipping.as_columns(fixed)),
            space_or_study,
            key=key,
            num_trials=num_trials,
            num_steps=num_steps,
            num_seeds=num_seeds,
            directory=clipping.subdirectory(directory, "learning_rate_sweep"),
        )
        studies |= sweep.studies
        cost += sweep.cost
        if sweep.answer is None:
            return Verdict(None, sweep.findings, studies, cost)
        learning_rate = sweep.answer
    rates = np.float32(learning_rate) * np.asarray([1.0, factor], np.float32)
    table = clipping.points_table(fixed, {LEARNING_RATE: rates})
    runner = StudyRunner(
        trainer,
        table,
        num_steps=num_steps,
        eval_every=eval_every,
        key=key,
        num_seeds=num_seeds,
    )
    study = runner.run(table, directory=clipping.subdirectory(directory, "probe"))
    studies["probe"] = study
    cost += 2 * num_seeds * num_steps
    answer, findings = judge_probe(study, factor)
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


def judge_probe(study: Study, factor: float) -> tuple[bool, list[Finding]]:
    """Whether the loss rises early at the higher of two learning rates; trains nothing.

    Args:
      study: a trial at lr* and one at `factor` times that.
      factor: see there.

    Returns:
      The answer and the findings.
    """
    control, probed = instability_info(study).rows
    findings = [_probed(study, control, probed, factor)]
    if control.unstable:
        findings.append(_unstable_at_best(study, control))
    return bool(probed.unstable), findings


def inherited_point(study: Study) -> dict[str, Any]:
    """The hyperparameters of a study's best trial but for its learning rate.

    Where every trial is infeasible those of the first, which are as good as any.

    Raises:
      ValueError: the study has no learning rate, or a hyperparameter that is not a number.
    """
    if LEARNING_RATE not in study.points:
        raise ValueError(
            f"the study has no hyperparameter {LEARNING_RATE!r}: "
            f"{_checks.nearest(LEARNING_RATE, study.points)}"
        )
    try:
        found = study.best().point
    except NoFeasibleTrial:
        found = study.point(0)
    return clipping.check_point({k: v for k, v in found.items() if k != LEARNING_RATE}, ())


def _rates_at(study: Study, fixed: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The learning rates of the trials with these hyperparameters, and which were unstable."""
    points = study.points
    same = points[LEARNING_RATE] > 0
    for name in points.keys() - {LEARNING_RATE}:
        same &= points[name] == np.asarray(fixed[name], points[name].dtype)
    return points[LEARNING_RATE][same], instability_info(study).unstable[same]


def _range_of(space: SearchSpace) -> tuple[float, float]:
    """The range of a space of learning rates; a linear one may begin at 0, which is no rate."""
    rate = space[LEARNING_RATE]
    if not isinstance(rate, Float):
        raise _checks.ArgumentTypeError(
            f"{LEARNING_RATE!r} must be a pbx.Float to be searched, got {rate!r}."
        )
    high = min(rate.high, HIGHEST)
    low = max(rate.low, LOWEST) if rate.low > 0 else high * 1e-6
    return low, high


def _between(low: float, high: float, ratio: float, num_trials: int) -> np.ndarray:
    """Rates that divide a bracket into equal ratios: as many as are needed, or as there may be."""
    # A little finer than asked for, because rates are rounded to float32.
    parts = math.ceil(math.log(high / low) / math.log(ratio) * (1 + 1e-4))
    return np.geomspace(low, high, min(max(parts, 2), num_trials + 1) + 1)[1:-1]


def _beyond(end: float, decades: float, num_trials: int) -> np.ndarray:
    """Rates from beyond `end`, `decades` further up (down if negative); none at the limit."""
    room = math.log10((HIGHEST if decades > 0 else LOWEST) / end)
    if abs(room) < 1e-3 or room * decades < 0:
        return np.empty(0)
    reach = min(decades, room) if decades > 0 else max(decades, room)
    return np.sort(end * 10.0 ** np.linspace(0.0, reach, num_trials + 1)[1:])


def _found(evidence: Limit, ratio: float, rounds: int, num_steps: int) -> Finding:
    low, high = evidence.low, evidence.high
    assert low is not None  # The search ended.
    assert high is not None
    return Finding(
        code="unstable_learning_rate",
        severity="info",
        message=(
            f"Training becomes unstable between the learning rates {low:.4g} (stable) and "
            f"{high:.4g} (unstable), judged over {num_steps} steps."
        ),
        evidence={
            "unstable_base_learning_rate": high,
            "largest_stable_learning_rate": low,
            "ratio": high / low,
            "asked_ratio": ratio,
            "rounds": rounds,
            "num_steps": num_steps,
            "learning_rates": evidence.rates,
            "unstable": evidence.unstable,
        },
        section=SECTION,
        suggestion="If the best learning rate is near it, warm-up or clipping may allow larger "
        "ones.",
    )


def _at_the_limit(evidence: Limit, num_steps: int) -> Finding:
    """The refusal where no rate that float32 can hold is unstable, or none is stable."""
    low, high = float(evidence.rates[0]), float(evidence.rates[-1])
    numbers = {"low": low, "high": high, "num_trials": len(evidence.rates), "num_steps": num_steps}
    if evidence.high is None:
        return Finding(
            code="none_unstable",
            severity="warning",
            message=(
                f"None of {len(evidence.rates)} learning rates from {low:.3g} to {high:.3g} was "
                f"unstable within {num_steps} steps."
            ),
            evidence=numbers,
            section=SECTION,
            suggestion="Check that make_optimizer uses point['learning_rate'] and that the loss "
            "depends on the params; or train for more steps.",
        )
    return Finding(
        code="all_unstable",
        severity="error",
        message=(
            f"All {len(evidence.rates)} learning rates from {low:.3g} to {high:.3g} were unstable: "
            "lowering the range further does not help, so the learning rate is not the cause."
        ),
        evidence=numbers,
        section=SECTION,
        suggestion="Look for a loss that is not finite at initialization or in some batch, and "
        "check that make_optimizer uses point['learning_rate'].",
    )


def _gave_up(evidence: Limit, ratio: float, max_rounds: int) -> Finding:
    low, high = evidence.low, evidence.high
    if low is None:
        advice = "Lower the range: give a space that ends below the smallest rate tried."
    elif high is None:
        advice = "Raise the range: give a space that begins above the largest rate tried."
    else:
        advice = "Give more rounds, more trials in a round or a larger ratio."
    return Finding(
        code="bracket_too_wide",
        severity="warning",
        message=(
            f"After {max_rounds} rounds the largest stable learning rate is "
            f"{'unknown' if low is None else format(low, '.4g')} and the smallest unstable one "
            f"{'unknown' if high is None else format(high, '.4g')}: not within a ratio of "
            f"{ratio:g}."
        ),
        evidence={
            "largest_stable_learning_rate": low,
            "unstable_learning_rate": high,
            "low": float(evidence.rates[0]),
            "high": float(evidence.rates[-1]),
            "asked_ratio": ratio,
            "rounds": max_rounds,
        },
        section=SECTION,
        suggestion=advice,
    )


def _not_monotone(evidence: Limit) -> Finding:
    above = evidence.stable_above
    return Finding(
        code="stability_not_monotone",
        severity="warning",
        message=(
            f"{len(above)} learning rates up to {above[-1]:.4g} were stable although a smaller "
            f"one, {evidence.high:.4g}, was not: the limit is no sharp one."
        ),
        evidence={
            "unstable_learning_rate": evidence.high,
            "stable_above": above,
            "largest_stable": above[-1],
        },
        section=SECTION,
        suggestion="The smallest unstable rate is the cautious limit. Repeat "
        "find_unstable_learning_rate with num_seeds= to see whether chance decides, or with more "
        "steps.",
    )


def _course(row: InstabilityRow) -> str:
    """What happened to an unstable trial, in half a sentence."""
    begin = f"rises from step {row.start_step} on" if row.start_step >= 0 else "becomes too high"
    if row.recovered_step >= 0:
        how = ", slowly" if row.slow_recovery else ""
        return f"{begin} and recovers by step {row.recovered_step}{how}"
    return f"{begin} and does not recover"


def _probed(
    study: Study, control: InstabilityRow, probed: InstabilityRow, factor: float
) -> Finding:
    best, rate = (float(value) for value in study.points[LEARNING_RATE])
    num_steps = int(study.spec["num_steps"])
    evidence = {
        "learning_rate": best,
        "probed_learning_rate": rate,
        "factor": factor,
        "num_steps": num_steps,
        "at_learning_rate": control._asdict(),
        "at_probed_learning_rate": probed._asdict(),
    }
    if not probed.unstable:
        return Finding(
            code="no_early_instability",
            severity="info",
            message=(
                f"At {factor:g} times the best learning rate, {rate:.4g}, the loss does not rise "
                f"in the first {num_steps} steps."
            ),
            evidence=evidence,
            section=SECTION,
            suggestion="Warm-up cures early instability only: look for sudden rises later in "
            "training, at 5 and 10 times the best learning rate.",
        )
    return Finding(
        code="early_instability",
        severity="warning",
        message=(
            f"At {factor:g} times the best learning rate, {rate:.4g}, the training loss "
            f"{_course(probed)}, in a run of {num_steps} steps."
        ),
        evidence=evidence,
        section=SECTION,
        suggestion="Fixing the instability will probably allow larger learning rates and train "
        "better: try warm-up first (tune_warmup).",
    )


def _unstable_at_best(study: Study, control: InstabilityRow) -> Finding:
    best = float(study.points[LEARNING_RATE][0])
    return Finding(
        code="unstable_at_best_learning_rate",
        severity="warning",
        message=(
            f"Even at the best learning rate, {best:.4g}, the training loss {_course(control)}."
        ),
        evidence={"learning_rate": best, "at_learning_rate": control._asdict()},
        section=SECTION,
        suggestion="Evaluations at intervals may have missed it. Try warm-up, then clipping.",
    )
