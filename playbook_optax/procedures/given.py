"""What most procedures begin with: a finished study, or a space that has to be trained first."""

from typing import Any

from playbook_optax.records.study import Study
from playbook_optax.runner.run import run_study
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.train import MakeOptimizer
from playbook_optax.trials.workload import WorkloadLike


def given_or_trained(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    space_or_study: SearchSpace | Study,
    *,
    num_trials: int,
    num_steps: int,
    eval_every: int | None,
    num_seeds: int,
    num_evals: int = 20,
    **arguments: Any,
) -> tuple[Study, int]:
    """The study that was given, or that of the space.

    Args:
      workload: as in `run_study`, and so are `make_optimizer`, `num_trials`, `num_steps`,
        `num_seeds` and whatever else is given; a finished study needs none of them.
      make_optimizer: see `workload`.
      space_or_study: a finished study, or the space to train.
      num_trials: see `workload`.
      num_steps: see `workload`.
      eval_every: updates between evaluations; one in `num_evals` of a trial if None.
      num_seeds: see `workload`.
      num_evals: evaluations of a trial, if `eval_every` is None.
      **arguments: see `workload`.

    Returns:
      The study and the trial-steps that it cost, 0 if it was given.

    Raises:
      ValueError: as `run_study`.
    """
    if isinstance(space_or_study, Study):
        return space_or_study, 0
    study = run_study(
        workload,
        make_optimizer,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        eval_every=max(1, num_steps // num_evals) if eval_every is None else eval_every,
        num_seeds=num_seeds,
        **arguments,
    )
    return study, num_trials * num_seeds * num_steps
