"""The playbook's chapter on training that breaks, from the sweep to a remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex

from playbook_optax import _checks, _shown
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.procedures import clipping, controls
from playbook_optax.procedures.clipping import LEARNING_RATE, choose_clip_threshold
from playbook_optax.procedures.instability import (
    find_unstable_learning_rate,
    probe_early_instability,
)
from playbook_optax.procedures.learning_rate import sweep_learning_rate
from playbook_optax.procedures.remedies import RemedyComparison, compare_remedies
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.procedures.warmup import default_warmup_steps, tune_warmup
from playbook_optax.records.study import Study
from playbook_optax.runner import progress
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.workload import WorkloadLike

SECTION = "How can optimization failures be debugged and mitigated?"
SWEEP, PROBE, LIMIT = "sweep", "probe", "limit"
WARMUP, CLIPPING, REMEDIES = "warmup", "clipping", "remedies"


@_shown.short
class Stabilization(NamedTuple):
    """What the chapter comes to.

    Attributes:
      recommended: name of the remedy, as in `RemedyComparison`; None where nothing was unstable or
        nothing helped.
      learning_rate: the best one with it (without any, where none is recommended).
      warmup_steps: of the remedy; 0 without warm-up.
      max_norm: its clip threshold; None without one.
      best_value: the objective with it, at the best evaluation.
      baseline_value: the objective without any remedy, at its own best learning rate.
      comparison: the table of remedies; None if it did not come to that.
      steps: the verdict of each step of the chapter, by name, in the order in which they were
        taken: "sweep", "limit", "probe", "warmup", "clipping", "remedies".
    """

    recommended: str | None
    learning_rate: float
    warmup_steps: int
    max_norm: float | None
    best_value: float
    baseline_value: float
    comparison: RemedyComparison | None
    steps: dict[str, Verdict]


@takes_trainer
def stabilize(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    num_trials: int = 12,
    num_seeds: int = 1,
    eval_every: int | None = None,
    optimizers: Mapping[str, Any] | None = None,
    workloads: Mapping[str, WorkloadLike] | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Runs the chapter on instability: identifies it, tries each remedy, and recommends one.

    In the playbook's order: a learning-rate sweep finds lr* (`sweep_learning_rate`); the smallest
    unstable rate is found (`find_unstable_learning_rate`); the first 500 steps are looked at, at
    twice lr* (`probe_early_instability`); a warm-up is tuned (`tune_warmup`) and a clip threshold
    chosen (`choose_clip_threshold`); and all remedies are compared, each at learning rates of its
    own (`compare_remedies`). Where no learning rate of the sweep is unstable, it ends there.

    Args:
      trainer: as in `run_study`.
      space_or_study: a space with the one dimension ``learning_rate`` (1e-5 to 10 on a log scale if
        None); or a finished study of the same workload and optimizer, instead of the sweep.
      key: the only source of randomness.
      num_steps: updates of each trial, as long as the run that is to be made stable.
      num_trials: learning rates of a sweep.
      num_seeds: repetitions of each trial.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None.
      optimizers: as in `compare_remedies`.
      workloads: as in `compare_remedies`.
      directory: where to store the studies, each step in a folder of its own.

    Returns:
      A `Verdict` whose answer is a `Stabilization`, or None where every trial of the sweep is
      infeasible; the studies are named ``<step>/<study>``.

    Raises:
      ValueError: as `run_study`, or a space or study without ``learning_rate``.

    Example:
      On a quadratic nothing but a smaller learning rate helps:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"train/loss": (p["w"] ** 2).sum()}, objective="train/loss")
      >>> verdict = pbx.procedures.stabilize(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]),
      ...     pbx.SearchSpace({"learning_rate": pbx.Float(0.03, 30.0, scale="log")}),
      ...     key=jax.random.key(0), num_trials=7, num_steps=40, optimizers={})
      >>> verdict.answer.recommended, list(verdict.answer.steps)
      (None, ['sweep', 'limit', 'probe', 'warmup', 'clipping', 'remedies'])

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    num_steps = _checks.check_count("num_steps", num_steps, at_least=2)
    # Warm-ups of all lengths that may be asked for; one program serves all steps of the chapter.
    longest = (0, *default_warmup_steps(num_steps), max(1, num_steps // 10))
    trainer = controls.controlled(trainer, None, tuple(sorted(set(longest))))
    common: dict[str, Any] = {"key": key, "num_seeds": num_seeds, "eval_every": eval_every}
    steps: dict[str, Verdict] = {}

    def take(name: str, procedure: Any, given: Any, **arguments: Any) -> Verdict:
        folder = clipping.subdirectory(directory, name)
        progress.say(f"stabilize: {name}")
        steps[name] = procedure(trainer, given, directory=folder, **arguments)
        progress.say(f"decided {name}: {_first(steps[name])}")
        return steps[name]

    sweep = take(
        SWEEP,
        sweep_learning_rate,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        **common,
    )
    (study,) = sweep.studies.values()
    infeasible_only = any(finding.code == "all_infeasible" for finding in sweep.findings)
    if infeasible_only:
        return _verdict(None, steps, [])
    best = study.best()
    rate = float(best.point[LEARNING_RATE])
    found = take(LIMIT, find_unstable_learning_rate, study, num_steps=num_steps, **common)
    if found.answer is None:
        answer = Stabilization(None, rate, 0, None, best.value, best.value, None, steps)
        return _verdict(answer, steps, [_nothing_to_do(found)])
    probe_steps = min(500, num_steps)
    probe = {**common, "eval_every": 1}
    take(PROBE, probe_early_instability, study, learning_rate=rate, num_steps=probe_steps, **probe)
    warm = take(
        WARMUP,
        tune_warmup,
        study,
        num_steps=num_steps,
        unstable_learning_rate=found.answer,
        **common,
    )
    clip = take(CLIPPING, choose_clip_threshold, study, num_steps=num_steps, **common)
    compared = take(
        REMEDIES,
        compare_remedies,
        study,
        num_steps=num_steps,
        num_trials=num_trials,
        warmup_steps=None if warm.answer is None else warm.answer.warmup_steps,
        max_norm=clip.answer,
        optimizers=optimizers,
        workloads=workloads,
        **common,
    )
    comparison: RemedyComparison = compared.answer
    chosen = comparison.row(comparison.recommended or "none")
    baseline = comparison.row("none")
    clipped = "clipping" in chosen.remedy and "adaptive" not in chosen.remedy
    answer = Stabilization(
        recommended=comparison.recommended,
        learning_rate=chosen.best_learning_rate,
        warmup_steps=comparison.warmup_steps if "warmup" in chosen.remedy else 0,
        max_norm=comparison.max_norm if clipped else None,
        best_value=chosen.best_value,
        baseline_value=baseline.best_value,
        comparison=comparison,
        steps=steps,
    )
    return _verdict(answer, steps, compared.findings)


def _verdict(answer: Stabilization | None, steps: Mapping[str, Verdict], findings: Any) -> Verdict:
    """All steps together; their own findings follow those of the last one."""
    every = [*findings, *(f for step in steps.values() for f in step.findings if f not in findings)]
    studies = {
        f"{name}/{own}": study
        for name, step in steps.items()
        for own, study in step.studies.items()
    }
    cost = sum(step.cost for step in steps.values())
    return Verdict(answer, tuple(by_severity(every)), studies, cost)


def _first(verdict: Verdict) -> str:
    """The gravest thing that a step found."""
    return verdict.findings[0].message if verdict.findings else "nothing stands against it."


def _nothing_to_do(found: Verdict) -> Finding:
    return Finding(
        code="nothing_to_stabilize",
        severity="info",
        message="No unstable learning rate was found, so there is nothing for a remedy to cure: "
        + found.findings[0].message,
        evidence={"search": found.findings[0].code},
        section=SECTION,
        suggestion="Instability is not what limits this workload; tune the learning rate.",
    )
