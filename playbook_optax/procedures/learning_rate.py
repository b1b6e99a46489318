"""Which learning rate: a sweep, its best, and whether the sweep can be trusted."""

import dataclasses
import os

import chex
import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis import diagnose
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.resolution import resolution_info
from playbook_optax.procedures.given import trains_if_needed
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.run import run_study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Float, SearchSpace

LEARNING_RATE = "learning_rate"


@trains_if_needed
def sweep_learning_rate(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_trials: int = 24,
    num_steps: int = 1000,
    eval_every: int | None = None,
    num_seeds: int = 1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Sweeps the learning rate on a grid and answers with the best, unless it cannot be trusted.

    Args:
      trainer: as in `run_study`.
      space_or_study: a space with the one dimension ``learning_rate``
        (1e-5 to 10 on a log scale if None), or a finished study to judge instead of a new one.
      key: the only source of randomness.
      num_trials: learning rates in the sweep.
      num_steps: updates of each.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None.
      num_seeds: repetitions of each.
      directory: where to store the study.

    Returns:
      A `Verdict`: `answer` is the best learning rate, float, or None where every trial is
      infeasible or the best is the smallest or largest of the sweep.

    Raises:
      ValueError: as `run_study`, or a space without ``learning_rate`` or with anything else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> verdict = pbx.procedures.sweep_learning_rate(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     num_trials=16, num_steps=10, eval_every=5)
      >>> 0.1 < verdict.answer < 1.0, verdict.cost
      (True, 160)

    Source: playbook, "Algorithm for picking an initial candidate for max_train_steps using a
    learning rate sweep" and "How can optimization failures be debugged and mitigated?"
    """
    if isinstance(space_or_study, Study):
        study, cost = space_or_study, 0
    else:
        space = space_or_study or SearchSpace({LEARNING_RATE: Float(1e-5, 10.0, scale="log")})
        if list(space) != [LEARNING_RATE]:
            raise ValueError(
                f"the space of a sweep must have the one dimension {LEARNING_RATE!r}, got "
                f"{list(space)}; use pbx.run_study for more."
            )
        num_steps = _checks.check_count("num_steps", num_steps)
        grid = space.grid(_checks.check_count("num_trials", num_trials, at_least=2))
        study = run_study(
            trainer,
            grid,
            num_steps=num_steps,
            eval_every=max(1, num_steps // 20) if eval_every is None else eval_every,
            key=key,
            num_seeds=num_seeds,
            directory=directory,
        )
        # A grid is a table to the runner; the analysis wants to know the range it covers.
        study = dataclasses.replace(study, spec={**study.spec, "space": space.to_dict()})
        cost = num_trials * num_seeds * num_steps
    findings = diagnose.diagnose(study)
    answer = None
    rate = best_rate(study)
    # Without one every trial is infeasible, and without a slope any rate is as good: diagnosed.
    if rate is not None and not any(finding.code == "no_slope" for finding in findings):
        rates = study.points[LEARNING_RATE]
        if rates.min() < rate < rates.max():
            answer = rate
        else:
            findings.append(_at_end(rate, rates))
    studies = {"learning_rate_sweep": study}
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


def best_rate(study: Study) -> float | None:
    """The learning rate of the best trial of a sweep.

    Of trials that validation cannot separate it is one with a low loss, and of those that are alike
    in that, too, the middle one. A rate at an end of the sweep is taken only where validation says
    that it is better than all between the ends.

    Args:
      study: trials that differ in ``learning_rate``.

    Returns:
      The rate, or None where every trial is infeasible.
    """
    rates = study.points[LEARNING_RATE]
    tied = resolution_info(study).tied
    inside = [trial for trial in tied if rates.min() < rates[trial] < rates.max()]
    return float(rates[[*inside, *tied][0]]) if len(tied) else None


def _at_end(rate: float, rates: np.ndarray) -> Finding:
    """The refusal: the best learning rate has no neighbour on one side, so it bounds nothing."""
    edge = "smallest" if rate == rates.min() else "largest"
    wider = rate / 10 if edge == "smallest" else rate * 10
    return Finding(
        code="best_at_end_of_sweep",
        severity="warning",
        message=(
            f"The best learning rate, {rate:.4g}, is the {edge} of the sweep: the best one may lie "
            "beyond it, so the sweep does not conclude."
        ),
        evidence={
            "learning_rate": rate,
            "low": float(rates.min()),
            "high": float(rates.max()),
        },
        section="Algorithm for picking an initial candidate for max_train_steps using a learning "
        "rate sweep",
        suggestion=f"Sweep again with the range extended to {wider:.4g}.",
    )
