"""Whether to adopt a change: the best point retrained over seeds, and two of them compared."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.analysis.spreads import (
    Spread,
    SpreadComparison,
    compare_spreads,
    prediction_reach,
    spread_info,
)
from playbook_optax.procedures import clipping
from playbook_optax.procedures.given import can_train, trains_if_needed
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.run import run_study
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.trials.keys import check_key

SECTION = "Determining whether to adopt a training pipeline change or hyperparameter configuration"
LEVEL = 0.05
"""Probability with which a change that does nothing may be adopted, at most."""
_RETRAIN_STREAM = 0x5EED5
"""What the key is folded with, so that no seed of the tuning is trained again."""


def retrain_key(key: chex.PRNGKey) -> chex.PRNGKey:
    """The key that `retrain` gives to `run_study`: another fold than anything in tuning.

    Args:
      key: the caller's key.

    Returns:
      A key.
    """
    check_key("key", key)
    return jax.random.fold_in(key, _RETRAIN_STREAM)


@takes_trainer
def retrain(
    trainer: Trainer,
    study_or_point: Study | Mapping[str, Any],
    *,
    key: chex.PRNGKey,
    num_seeds: int = 5,
    num_steps: int | None = None,
    eval_every: int | None = None,
    keep: str = "none",
    directory: str | os.PathLike[str] | None = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Verdict:
    """Trains the best point of a study again with several seeds, and answers with its spread.

    The best of many trials was chosen because it looked good, and part of that is luck. Runs with
    other initializations and batches, which no trial of the study had, say how good it is and how
    far one run differs from another. The seeds are trained side by side in one program.

    Args:
      trainer: as in `run_study`.
      study_or_point: a finished study, whose best point is retrained; or a point, name to number.
      key: the only source of randomness. It may be the study's: it is folded first.
      num_seeds: runs, at least 2.
      num_steps: updates of each; those of the study if None. Needed with a point.
      eval_every: updates between evaluations; those of the study if None, or a twentieth of
        `num_steps` with a point.
      keep: weights to keep of each run: ``"none"``, ``"best"`` or ``"final"``.
      directory: where to store the runs.
      objective: a recorded metric; the study's own, or the workload's, by default.
      maximize: whether larger is better; see `Study.best`.

    Returns:
      A `Verdict`: `answer` is a `Spread`, or None where every run is infeasible. The study is named
      ``retrained``: one trial, `num_seeds` seeds.

    Raises:
      ValueError: a bad argument, as `run_study`; a point without `num_steps`.
      NoFeasibleTrial: the study has no best trial.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jax.random.normal(key, (2,)) + 3}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> verdict = pbx.procedures.retrain(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), {"learning_rate": 0.1},
      ...     key=jax.random.key(0), num_steps=10)
      >>> len(verdict.answer.values), verdict.cost
      (5, 50)

    Source: playbook, "Determining whether to adopt a training pipeline change or hyperparameter
    configuration".
    """
    folded = retrain_key(key)
    num_seeds = _checks.check_count(
        "num_seeds", num_seeds, at_least=2, fix="A single run has no spread."
    )
    given = study_or_point if isinstance(study_or_point, Study) else None
    tuned = None
    if given is not None:
        tuned = given.best(objective, maximize)
        point = dict(tuned.point)
        if num_steps is None:
            num_steps = int(given.data["step"].values[-1])
        if eval_every is None:
            eval_every = _eval_every(given, num_steps)
    else:
        if not isinstance(study_or_point, Mapping) or not study_or_point:
            raise _checks.ArgumentTypeError(
                "study_or_point must be a pbx.Study or a point, name to number, got "
                f"{study_or_point!r}."
            )
        point = clipping.check_point(study_or_point, ())
        if num_steps is None:
            raise ValueError("num_steps must be given with a point; a study would know its own.")
    num_steps = _checks.check_count("num_steps", num_steps)
    study = run_study(
        trainer,
        {name: _column(value) for name, value in point.items()},
        num_steps=num_steps,
        eval_every=max(1, num_steps // 20) if eval_every is None else eval_every,
        key=folded,
        num_seeds=num_seeds,
        keep=keep,
        directory=directory,
    )
    # What the study was judged by, the retrained runs are judged by as well.
    if tuned is not None:
        objective, maximize = tuned.objective, tuned.maximize
    spread = spread_info(study, 0, objective, maximize)
    findings = [_told(spread)] if spread is not None else []
    broken = int(study.data["infeasible"].values.sum())
    if broken:
        findings.append(_broken(broken, num_seeds))
    if spread is not None and given is not None and tuned is not None:
        longer = num_steps != int(given.data["step"].values[-1])
        if not longer and math.isfinite(spread.std):
            findings += judge_choice(given, spread, tuned.value)
    cost = num_seeds * num_steps
    return Verdict(spread, tuple(by_severity(findings)), {"retrained": study}, cost)


def _eval_every(study: Study, num_steps: int) -> int:
    """Updates between evaluations of a study, whoever recorded it."""
    gaps = np.diff(study.data["step"].values)
    return int(gaps.max()) if len(gaps) else max(1, num_steps // 20)


def _column(value: Any) -> np.ndarray:
    """One value as a column of points, in the dtype in which it was trained."""
    array = np.atleast_1d(np.asarray(value))
    if isinstance(value, np.generic):
        return array
    return array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)


def _told(spread: Spread) -> Finding:
    known = [value for value in spread.values if not math.isnan(value)]
    further = ""
    if math.isfinite(spread.std):
        further = (
            f" One more run would land between {spread.low:.4g} and {spread.high:.4g} with 95% "
            "probability."
        )
    return Finding(
        "retrained_spread",
        "info",
        f"{len(known)} runs of the point with other seeds reach {spread.objective} = "
        f"{spread.mean:.4g} on average at their best checkpoints, {min(known):.4g} to "
        f"{max(known):.4g}, with a standard deviation of {spread.std:.2g}.{further}",
        {
            "objective": spread.objective,
            "values": spread.values,
            "mean": spread.mean,
            "std": spread.std,
            "low": spread.low,
            "high": spread.high,
            "best_step": spread.best_step,
        },
        SECTION,
        "Adopt a change only if it improves by more than this spread.",
    )


def _broken(broken: int, num_seeds: int) -> Finding:
    every = broken == num_seeds
    return Finding(
        "retraining_infeasible",
        "error" if every else "warning",
        f"{broken} of {num_seeds} runs of the point are infeasible with other seeds.",
        {"num_infeasible": broken, "num_seeds": num_seeds},
        SECTION,
        "The point lies at the edge of what trains: lower its learning rate, or add warm-up or "
        "clipping.",
    )


def judge_choice(study: Study, spread: Spread, tuned: float) -> list[Finding]:
    """What the spread says about the study that the point was chosen from; trains nothing.

    Args:
      study: the study, whose trials are as long as the retrained runs.
      spread: that of its best point with other seeds.
      tuned: its best value.

    Returns:
      ``best_was_lucky`` and ``best_is_a_tie``, where they are so.
    """
    found = []
    sign = -1.0 if spread.maximize else 1.0
    edge = spread.high if spread.maximize else spread.low
    if sign * tuned < sign * edge:
        found.append(
            Finding(
                "best_was_lucky",
                "warning",
                f"The study's best, {spread.objective} = {tuned:.4g}, is better than other seeds "
                f"are expected to get: they reach {spread.mean:.4g} on average, and one more would "
                f"land between {spread.low:.4g} and {spread.high:.4g}.",
                {"tuned": tuned, "mean": spread.mean, "low": spread.low, "high": spread.high},
                SECTION,
                "Report the retrained mean, not the study's best; retrain the runners-up as well.",
            )
        )
    out = outcomes(study, spread.objective, spread.maximize)
    # Two runs of one point differ by so much, which a difference of points has to exceed.
    known = len(spread.values) - spread.num_infeasible
    reach = prediction_reach(known) / math.sqrt(1 + 1 / known) * math.sqrt(2) * spread.std
    near = [int(t) for t in out.order if out.loss[t] <= out.loss[out.best] + reach]
    if len(near) > 1:
        found.append(
            Finding(
                "best_is_a_tie",
                "info",
                f"{len(near) - 1} other trials of the study are within {reach:.2g} of its best, "
                "which is as far as two runs of one point lie apart: which of them came out first "
                "is luck.",
                {"trials": near, "reach": reach, "std": spread.std},
                SECTION,
                "Prefer the simplest of them, or retrain each.",
            )
        )
    return found


@trains_if_needed
def adopt(
    trainer: Trainer,
    baseline: Spread | Verdict | Study | Mapping[str, Any],
    candidate: Spread | Verdict | Study | Mapping[str, Any],
    *,
    key: chex.PRNGKey | None = None,
    min_gain: float | None = None,
    level: float = LEVEL,
    num_seeds: int = 5,
    num_steps: int | None = None,
    eval_every: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Verdict:
    """Decides whether a change is adopted: only if it improves by more than the trial variance.

    Two things are asked. Whether the candidate is better at all, by a permutation test of the mean
    over seeds (`compare_spreads`); and whether the gain is worth it, by default larger than one
    standard deviation of a single run. A change that makes runs infeasible is not adopted.

    Args:
      trainer: as in `run_study`; ``None, None`` will do where nothing has to be retrained.
      baseline: what is in use: a `Spread`, the verdict of `retrain`, a study with several seeds
        (its best trial), or a study with one seed or a point, which is retrained.
      candidate: the change, likewise. Another optimizer or workload is retrained by its own call
        of `retrain`.
      key: the only source of randomness; needed to retrain. Both get the same seeds.
      min_gain: what the mean has to gain, in units of the objective. One standard deviation of a
        single run, pooled over both, if None; 0 adopts whatever is better, 5 seeds permitting.
      level: probability with which a change that does nothing may be adopted, at most.
      num_seeds: runs of each that is retrained.
      num_steps: as in `retrain`.
      eval_every: as in `retrain`.
      directory: where to store what is retrained, in folders ``baseline`` and ``candidate``.
      objective: a recorded metric, for studies and points.
      maximize: whether larger is better; see `Study.best`.

    Returns:
      A `Verdict`: `answer` is True to adopt the candidate, False to keep the baseline, None where
      the seeds are too few to tell or every run of the baseline is infeasible.

    Raises:
      ValueError: a bad argument, something to retrain but no key, or different objectives.

    Example:
      >>> import numpy as np
      >>> import playbook_optax as pbx
      >>> noise = np.random.default_rng(0).normal(size=(2, 5, 1))
      >>> study = pbx.Study.from_arrays(
      ...     {"x": [0.0, 1.0]}, {"loss": noise + np.array([9.0, 5.0])[:, None, None]}, [10],
      ...     objective="loss")
      >>> from playbook_optax.analysis.spreads import spread_info
      >>> old, new = spread_info(study, 0), spread_info(study, 1)
      >>> [pbx.procedures.adopt(None, None, *pair).answer for pair in ((old, new), (new, old))]
      [True, False]

    Source: playbook, "Determining whether to adopt a training pipeline change or hyperparameter
    configuration".
    """
    _checks.check_number("level", level, above=0.0, below=1.0)
    if min_gain is not None:
        _checks.check_number("min_gain", min_gain, at_least=0.0)
    studies: dict[str, Study] = {}
    findings: list[Finding] = []
    cost = 0
    spreads: dict[str, Spread | None] = {}
    for name, given in (("baseline", baseline), ("candidate", candidate)):
        if isinstance(given, Spread):
            spreads[name] = given
            continue
        if isinstance(given, Study) and given.num_seeds > 1:
            spreads[name] = spread_info(given, None, objective, maximize)
            studies[name] = given
            continue
        if isinstance(given, Verdict):
            verdict = given
            if verdict.answer is not None and not isinstance(verdict.answer, Spread):
                raise _checks.ArgumentTypeError(
                    f"{name} is a verdict whose answer is no Spread: {verdict.answer!r}; give that "
                    "of pbx.procedures.retrain."
                )
        else:
            if key is None or not can_train(trainer):
                raise ValueError(
                    f"{name} has to be retrained, for which workload, make_optimizer and key must "
                    "be given; or give a Spread or a study with several seeds."
                )
            verdict = retrain(
                trainer,
                given,
                key=key,
                num_seeds=num_seeds,
                num_steps=num_steps,
                eval_every=eval_every,
                directory=clipping.subdirectory(directory, name),
                objective=objective,
                maximize=maximize,
            )
            cost += verdict.cost
            findings += [f for f in verdict.findings if f.code != "retrained_spread"]
        spreads[name] = verdict.answer
        for study in verdict.studies.values():
            studies[name] = study
    old, new = spreads["baseline"], spreads["candidate"]
    if old is None or new is None:
        findings.append(_nothing_to_compare(old, new))
        answer = None if old is None else False
        return Verdict(answer, tuple(by_severity(findings)), studies, cost)
    test = compare_spreads(old, new)
    answer, finding = _decide(old, new, test, min_gain, level)
    findings.append(finding)
    if (old.num_steps, old.num_evals) != (new.num_steps, new.num_evals):
        findings.append(_unequal(old, new))
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


def _nothing_to_compare(old: Spread | None, new: Spread | None) -> Finding:
    which = "candidate" if new is None else "baseline"
    both = "Neither the baseline nor the candidate has a feasible run."
    return Finding(
        "nothing_to_compare",
        "error",
        both if old is None and new is None else f"Every run of the {which} is infeasible.",
        {"baseline": old is not None, "candidate": new is not None},
        SECTION,
        "Lower the learning rate of what fails, or look at pbx.procedures.stabilize.",
    )


def _decide(
    old: Spread, new: Spread, test: SpreadComparison, min_gain: float | None, level: float
) -> tuple[bool | None, Finding]:
    """The answer and its reason."""
    needed = min_gain
    if needed is None:
        needed = test.std if math.isfinite(test.std) else 0.0
    seeds = f"{len(old.values)} and {len(new.values)} seeds"
    evidence = {
        **test._asdict(),
        "objective": old.objective,
        "baseline": old.values,
        "candidate": new.values,
        "baseline_mean": old.mean,
        "candidate_mean": new.mean,
        "needed_gain": needed,
        "level": level,
    }
    seen = (
        f"{old.objective} goes from {old.mean:.4g} to {new.mean:.4g} on average over {seeds} "
        f"(p = {test.p_value:.2g})"
    )
    one_run = f"a single run varies by {test.std:.2g}"

    def finding(code: str, severity: str, message: str, suggestion: str) -> Finding:
        return Finding(code, severity, message, evidence, SECTION, suggestion)

    if new.num_infeasible > old.num_infeasible:
        return False, finding(
            "candidate_less_stable",
            "warning",
            f"The candidate has {new.num_infeasible} infeasible runs of {len(new.values)}, the "
            f"baseline {old.num_infeasible} of {len(old.values)}: it is not adopted.",
            "Cure the instability first; then compare again.",
        )
    if test.gain <= 0:
        return False, finding(
            "candidate_not_better",
            "info",
            f"The candidate is not better: {seen}.",
            "Keep the baseline.",
        )
    if test.smallest_p > level:
        return None, finding(
            "too_few_seeds",
            "warning",
            f"{seeds} cannot tell: even a perfect separation would have p = "
            f"{test.smallest_p:.2g}, above {level:.2g}.",
            "Retrain both with 5 seeds.",
        )
    if test.p_value > level:
        return False, finding(
            "gain_within_trial_variance",
            "info",
            f"The gain is within the trial variance: {seen}, and {one_run}.",
            "Keep the baseline, or retrain both with more seeds if the gain would be worth it.",
        )
    if test.gain <= needed:
        return False, finding(
            "gain_too_small",
            "info",
            f"The candidate is better, but by less than {needed:.2g}, which was needed: {seen}, "
            f"and {one_run}.",
            "Keep the baseline, unless the change costs nothing (min_gain=0).",
        )
    return True, finding(
        "adopt_candidate",
        "info",
        f"The gain exceeds the trial variance: {seen}, and {one_run}.",
        "Adopt the candidate, if the gain is worth the complexity that it adds.",
    )


def _unequal(old: Spread, new: Spread) -> Finding:
    return Finding(
        "compared_at_different_lengths",
        "warning",
        f"The baseline trained {old.num_steps} steps with {old.num_evals} evaluations, the "
        f"candidate {new.num_steps} with {new.num_evals}: the best checkpoint of more is better by "
        "itself.",
        {
            "num_steps": [old.num_steps, new.num_steps],
            "num_evals": [old.num_evals, new.num_evals],
        },
        SECTION,
        "Retrain both with the same num_steps and eval_every.",
    )
