"""How many trials: what the study would have found with fewer."""

import os
from collections.abc import Sequence
from typing import Any

import chex

from playbook_optax import _checks
from playbook_optax.analysis.budgets import (
    budget_findings,
    budget_info,
    default_min_gain,
    enough,
)
from playbook_optax.analysis.findings import by_severity
from playbook_optax.procedures.given import given_or_trained
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.train import MakeOptimizer, MakeSchedule, check_key
from playbook_optax.trials.workload import WorkloadLike


@_checks.named_arguments
def best_of_budget(
    workload: WorkloadLike | None,
    make_optimizer: MakeOptimizer | None,
    space_or_study: SearchSpace | Study,
    *,
    key: chex.PRNGKey,
    budgets: Sequence[int] | None = None,
    min_gain: float | None = None,
    num_bootstrap: int | None = None,
    objective: str | None = None,
    maximize: bool | None = None,
    num_trials: int = 100,
    num_steps: int = 1000,
    eval_every: int | None = None,
    num_seeds: int = 1,
    make_schedule: MakeSchedule | None = None,
    trials_per_block: int | str | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Verdict:
    """Answers how many trials of a study would have been enough.

    The playbook's box plot per budget (`pbx.plots.plot_budget` draws it): the best of n trials
    drawn from the study with replacement. Its distribution is computed exactly unless
    `num_bootstrap` asks for draws. Infeasible trials are draws that give nothing.

    Args:
      workload: a `Workload`, or a function of the point that gives one; None with a study.
      make_optimizer: ``make_optimizer(point)``; None with a study.
      space_or_study: a finished study, which is judged at no cost; or a space to run one in.
      key: the only source of randomness.
      budgets: numbers of trials to look at, up to the study's; the usual ones if None.
      min_gain: the gain of the median best, in units of the objective, that is too small to pay
        for twice the trials. By default the deviation over seeds of the best trial where the study
        has seeds, otherwise 5% of the way from its median trial to its best.
      num_bootstrap: how many studies to draw for each budget; exact if None.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `Study.best`.
      num_trials: trials of the study that is run in a space; the playbook's figure has 100.
      num_steps: updates of each.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None.
      num_seeds: repetitions of each.
      make_schedule: ``make_schedule(point, num_steps)``, if the rate is to follow a schedule.
      trials_per_block: as in `run_study`.
      directory: where to store the study.
      progress: show a progress bar on a terminal.

    Returns:
      A `Verdict`: `answer` is the smallest budget, int, such that doubling it or any larger one
      gains no more than `min_gain` at the median; or None where doubling still gains, or where it
      cannot be told. The table is `analysis.budgets.budget_info`'s.

    Raises:
      ValueError: a bad argument, as `budget_info` and `run_study`.

    Example:
      >>> import jax, numpy as np
      >>> import playbook_optax as pbx
      >>> study = pbx.Study.from_arrays(
      ...     {"x": np.arange(64.0)}, {"loss": (np.arange(64.0)[:, None] % 32 - 8) ** 2}, [10],
      ...     objective="loss")
      >>> pbx.procedures.best_of_budget(None, None, study, key=jax.random.key(0)).answer
      5

    Source: playbook, "How many trials are needed to get good results with quasi-random search?"
    """
    check_key("key", key)
    if min_gain is not None:
        _checks.check_number("min_gain", min_gain, above=0.0, fix="Leave it out for the default.")
    cost = 0
    if isinstance(space_or_study, Study):
        study = space_or_study
    else:
        study, cost = _run(
            workload,
            make_optimizer,
            space_or_study,
            key=key,
            num_trials=num_trials,
            num_steps=num_steps,
            eval_every=eval_every,
            num_seeds=num_seeds,
            make_schedule=make_schedule,
            trials_per_block=trials_per_block,
            directory=directory,
            progress=progress,
        )
    drawn = None if num_bootstrap is None else key
    info = budget_info(study, budgets, num_bootstrap, drawn, objective, maximize)
    smallest, why = default_min_gain(info)
    if min_gain is not None:
        smallest, why = float(min_gain), "as asked"
    findings = budget_findings(info, smallest, why)
    answer = enough(info, smallest)
    return Verdict(answer, tuple(by_severity(findings)), {"budget": study}, cost)


def _run(
    workload: WorkloadLike | None,
    make_optimizer: MakeOptimizer | None,
    space: SearchSpace,
    *,
    num_trials: int,
    num_steps: int,
    **arguments: Any,
) -> tuple[Study, int]:
    """The study of a space, and what it cost."""
    if workload is None or make_optimizer is None:
        missing = "workload" if workload is None else "make_optimizer"
        raise ValueError(f"{missing} is None, but a space has to be trained; give it, or a study.")
    if not isinstance(space, SearchSpace):
        raise _checks.ArgumentTypeError(
            f"space_or_study must be a pbx.SearchSpace or a pbx.Study, got {space!r}."
        )
    return given_or_trained(
        workload,
        make_optimizer,
        space,
        num_trials=_checks.check_count("num_trials", num_trials, at_least=2),
        num_steps=_checks.check_count("num_steps", num_steps),
        **arguments,
    )
