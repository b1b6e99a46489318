"""What most procedures begin with: a finished study, or a space that has to be trained first."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from playbook_optax import schedules
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.records.study import Study
from playbook_optax.runner.run import run_study
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace

R = TypeVar("R")


class _NotGiven:
    """Stands in a trainer for what was None."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any) -> Any:
        raise ValueError(
            f"{self._name} is None, which does for judging a finished study; to train, give it."
        )


_NOT_GIVEN = {name: _NotGiven(name) for name in ("workload", "make_optimizer")}


def trains_if_needed(function: Callable[..., R]) -> Callable[..., R]:
    """`takes_trainer` for a procedure that trains nothing where it is given finished studies.

    Args:
      function: takes a trainer first.

    Returns:
      A function as `takes_trainer` makes it, that also takes None for ``workload`` and
      ``make_optimizer``.
    """
    trained = takes_trainer(function)

    @functools.wraps(trained)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        def given(name: str, value: Any) -> Any:
            return _NOT_GIVEN.get(name) if value is None else value

        named = {name: given(name, value) for name, value in kwargs.items()}
        if args and isinstance(args[0], Trainer):
            return trained(*args, **named)
        first = [given(name, value) for name, value in zip(_NOT_GIVEN, args, strict=False)]
        return trained(*first, *args[2:], **named)

    return wrapper


def can_train(trainer: Trainer) -> bool:
    """Whether a trainer has a workload and an optimizer.

    Args:
      trainer: of a procedure that `trains_if_needed`.
    """
    return not any(isinstance(f, _NotGiven) for f in (trainer.workload, trainer.make_optimizer))


def at_constant_rates(trainer: Trainer) -> Trainer:
    """The trainer with constant learning rates: a number, or a schedule where it had schedules.

    Args:
      trainer: what is trained and how.
    """
    return trainer if trainer.make_schedule is None else trainer.replace(make_schedule=constant)


def constant(point: Any, _: Any) -> schedules.Schedule:
    """The `make_schedule` of constant learning rates.

    Args:
      point: has a ``learning_rate``.
    """
    return schedules.constant(point[LEARNING_RATE])


def given_or_trained(
    trainer: Trainer,
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
      trainer: as in `run_study`, as are the others; a finished study needs none of them.
      space_or_study: a finished study, or the space to train.
      num_trials: see `trainer`.
      num_steps: see `trainer`.
      eval_every: updates between evaluations; one in `num_evals` of a trial if None.
      num_seeds: see `trainer`.
      num_evals: evaluations of a trial, if `eval_every` is None.
      **arguments: see `trainer`.

    Returns:
      The study and the trial-steps that it cost, 0 if it was given.

    Raises:
      ValueError: as `run_study`.
    """
    if isinstance(space_or_study, Study):
        return space_or_study, 0
    study = run_study(
        trainer,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        eval_every=max(1, num_steps // num_evals) if eval_every is None else eval_every,
        num_seeds=num_seeds,
        **arguments,
    )
    return study, num_trials * num_seeds * num_steps
