"""How many trials: what the study would have found with fewer."""

from __future__ import annotations

import os
from collections.abc import Sequence

import chex

from playbook_optax import _checks
from playbook_optax.analysis.budgets import (
    budget_findings,
    budget_info,
    default_min_gain,
    enough,
)
from playbook_optax.analysis.findings import by_severity
from playbook_optax.procedures.given import given_or_trained, trains_if_needed
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.keys import check_key


@trains_if_needed
def best_of_budget(
    trainer: Trainer,
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
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Answers how many trials of a study would have been enough.

    The playbook's box plot per budget (`pbx.plots.plot_budget` draws it): the best of n trials
    drawn from the study with replacement. Its distribution is computed exactly unless
    `num_bootstrap` asks for draws. Infeasible trials are draws that give nothing.

    Args:
      trainer: as in `run_study`, or ``None, None`` with a study.
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
      directory: where to store the study.

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
    if not isinstance(space_or_study, Study):
        if not isinstance(space_or_study, SearchSpace):
            raise _checks.ArgumentTypeError(
                f"space_or_study must be a pbx.SearchSpace or a pbx.Study, got {space_or_study!r}."
            )
        num_trials = _checks.check_count("num_trials", num_trials, at_least=2)
        num_steps = _checks.check_count("num_steps", num_steps)
    study, cost = given_or_trained(
        trainer,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        eval_every=eval_every,
        key=key,
        num_seeds=num_seeds,
        directory=directory,
    )
    drawn = None if num_bootstrap is None else key
    info = budget_info(study, budgets, num_bootstrap, drawn, objective, maximize)
    smallest, why = default_min_gain(info)
    if min_gain is not None:
        smallest, why = float(min_gain), "as asked"
    findings = budget_findings(info, smallest, why)
    answer = enough(info, smallest)
    return Verdict(answer, tuple(by_severity(findings)), {"budget": study}, cost)
