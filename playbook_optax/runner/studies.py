"""`run_studies`: one study for each value of a scientific hyperparameter."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.records import study_set
from playbook_optax.records.study_set import StudySet
from playbook_optax.runner.progress import say, telling
from playbook_optax.runner.run import train_study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Categorical, Integer, SearchSpace
from playbook_optax.trials import keys, stepper
from playbook_optax.trials.workload import Workload, WorkloadLike

NEEDED = ("workload", "make_optimizer", "space", "num_trials", "num_steps", "eval_every")
KEYS = (*NEEDED, "make_schedule")


class _Variant(NamedTuple):
    """One study of the set, ready to run."""

    label: str
    space: SearchSpace
    fixed: dict[str, Any]
    arguments: dict[str, Any]


@_checks.named_arguments
def run_studies(
    variants: Mapping[str, Mapping[str, Any]],
    *,
    key: chex.PRNGKey,
    num_trials: int | None = None,
    num_steps: int | None = None,
    eval_every: int | None = None,
    workload: WorkloadLike | None = None,
    make_optimizer: stepper.MakeOptimizer | None = None,
    space: SearchSpace | None = None,
    make_schedule: stepper.MakeSchedule | None = None,
    fixed: Mapping[str, Any] | None = None,
    scientific: str = study_set.SCIENTIFIC,
    num_seeds: int = 1,
    independent: bool = False,
    keep: str = "none",
    trials_per_block: int | str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    executor: concurrent.futures.Executor | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> StudySet:
    """Runs a study for each value of a scientific hyperparameter, and keeps them together.

    The playbook gives hyperparameters roles. The *scientific* one, whose effect is asked for, is
    the label here: an optimizer, a width, a batch size, whatever changes the program. *Nuisance*
    ones are optimized over for each value: they are the dimensions of the space. *Fixed* ones are
    taken out of it. A *conditional* one exists with some values only: it is in their space alone.

    All studies have one key, so that trial i of each has the same place in the dimensions that
    they share (those at the front of the spaces), and the same batches; and, where the shapes
    agree, the same initialization.

    Args:
      variants: label to what is special about that study: a dict with any of ``workload``,
        ``make_optimizer``, ``space``, ``make_schedule``, ``num_trials``, ``num_steps`` and
        ``eval_every``. What it lacks is taken from the arguments below.
      key: the only source of randomness.
      num_trials: trials of each study; give each value as many, or its best is better by luck.
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
      workload: a `Workload`, or a function of the point that gives one.
      make_optimizer: ``make_optimizer(point)`` returns any Optax transformation.
      space: the nuisance hyperparameters.
      make_schedule: as in `run_study`.
      fixed: name to value of the hyperparameters that are not searched after all. They are taken
        out of every space that has them, and `make_optimizer`, `make_schedule` and a workload that
        is a function of the point get them with the point. A choice of a `Categorical` may be given
        itself.
      scientific: what the labels are values of, such as ``"optimizer"``.
      num_seeds: as in `run_study`, as are all below.
      independent: give each trial its own initialization and batches.
      keep: weights to keep of each trial.
      trials_per_block: width of a block.
      mesh: a mesh to shard trials over.
      executor: whose workers train.
      directory: where to store the set, each study in a numbered folder. Studies that are there
        already are continued; new variants may be appended.
      progress: say on standard error what is done; see `Trainer`.

    Returns:
      The `StudySet`, a mapping of label to study; `load_study_set` reads a stored one.

    Raises:
      ValueError: a bad argument, something missing or unknown in a variant, a fixed name that no
        space has, or studies with different objectives; before anything is trained.
      StorageError: the directory holds another set.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> def variant(name):
      ...     make = getattr(pbx, name)
      ...     return {"make_optimizer": lambda point: make(**point),
      ...             "space": pbx.optimizer_search_space(name, 10)}
      >>> studies = pbx.run_studies(
      ...     {name: variant(name) for name in ("sgd", "momentum")}, scientific="optimizer",
      ...     workload=workload, num_trials=10, num_steps=10, eval_every=5, key=jax.random.key(0))
      >>> studies.nuisance, studies.conditional
      (('learning_rate',), {'momentum': ('momentum',)})

    Source: playbook, "Identifying scientific, nuisance, and fixed hyperparameters" and "Creating a
    set of studies".
    """
    keys.check_key("key", key)
    study_set.check_label("scientific", scientific)
    common = {
        "workload": workload,
        "make_optimizer": make_optimizer,
        "space": space,
        "make_schedule": make_schedule,
        "num_trials": num_trials,
        "num_steps": num_steps,
        "eval_every": eval_every,
    }
    ready = _ready(variants, common, dict(fixed or {}), scientific)
    if directory is not None:
        labels = [variant.label for variant in ready]
        study_set.write_index(directory, scientific, labels, {v.label: v.fixed for v in ready})
    studies = {}
    for i, variant in enumerate(ready):
        question = dict(variant.arguments)
        trainer = Trainer(
            *(question.pop(name) for name in ("workload", "make_optimizer", "make_schedule")),
            fixed=variant.fixed,
            trials_per_block=trials_per_block,
            mesh=mesh,
            executor=executor,
            progress=progress,
        )
        with telling(progress, scientific):
            say(f"{variant.label}, {i + 1} of {len(ready)}")
            studies[variant.label] = train_study(
                trainer,
                variant.space,
                question.pop("num_trials"),
                None if directory is None else study_set.folder(directory, i),
                key=key,
                num_seeds=num_seeds,
                independent=independent,
                keep=keep,
                member=study_set.member(scientific, variant.label, i),
                **question,
            )
    return StudySet(studies, scientific, {v.label: v.fixed for v in ready})


def _ready(
    variants: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
    fixed: dict[str, Any],
    scientific: str,
) -> list[_Variant]:
    """All variants, checked before the first of them is trained."""
    if not isinstance(variants, Mapping) or not variants:
        raise _checks.ArgumentTypeError(
            "variants must be a non-empty dict of label to what is special about that study, got "
            f"{variants!r}."
        )
    if len(variants) > study_set.MAX_LABELS:
        raise ValueError(f"variants has {len(variants)} labels; {study_set.MAX_LABELS} fit.")
    made = [_variant(label, special, common) for label, special in variants.items()]
    known = sorted({name for _, arguments in made for name in arguments["space"]})
    for name in fixed:
        if name not in known:
            raise ValueError(
                f"fixed[{name!r}] is in the space of no variant: {_checks.nearest(name, known)}"
            )
    if scientific in known:
        raise ValueError(
            f"scientific = {scientific!r} is a dimension of a space as well; take it out, because "
            "each of its values is a study."
        )
    objectives = {
        label: (work.objective, work.maximize)
        for label, arguments in made
        if isinstance(work := arguments["workload"], Workload)
    }
    if len(set(objectives.values())) > 1:
        raise ValueError(
            f"variants have different objectives, {objectives}, which cannot be compared; give "
            "all workloads the same."
        )
    return [_reduced(label, arguments, fixed) for label, arguments in made]


def _variant(
    label: str, special: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    study_set.check_label("variants", label)
    if not isinstance(special, Mapping):
        raise _checks.ArgumentTypeError(
            f"variants[{label!r}] must be a dict with any of {', '.join(KEYS)}, got {special!r}."
        )
    for name in special:
        if name not in KEYS:
            raise ValueError(
                f"variants[{label!r}] has the unknown key {name!r}: {_checks.nearest(name, KEYS)}"
            )
    arguments = {**common, **special}
    for name in NEEDED:
        if arguments[name] is None:
            raise ValueError(
                f"variants[{label!r}] has no {name}: give it there, or as {name}= for all."
            )
    if not isinstance(arguments["space"], SearchSpace):
        raise _checks.ArgumentTypeError(
            f"variants[{label!r}]: space must be a pbx.SearchSpace, got {arguments['space']!r}."
        )
    for name in ("num_trials", "num_steps", "eval_every"):
        _checks.check_count(name, arguments[name])
    return label, arguments


def _reduced(label: str, arguments: dict[str, Any], fixed: Mapping[str, Any]) -> _Variant:
    """A variant whose space has lost what is fixed."""
    space = arguments.pop("space")
    own = {name: _value(name, fixed[name], space[name]) for name in fixed if name in space}
    left = {name: parameter for name, parameter in space.items() if name not in own}
    if not left:
        raise ValueError(
            f"fixed leaves variants[{label!r}] without a hyperparameter to search; train a point "
            "with pbx.procedures.retrain."
        )
    return _Variant(label, SearchSpace(left), own, arguments)


def _value(name: str, value: Any, parameter: Any) -> Any:
    """A fixed value in the dtype in which the space would have drawn it."""
    if isinstance(parameter, Categorical) and not parameter.numeric:
        for index, choice in enumerate(parameter.values):
            if choice is value or (type(choice) is type(value) and choice == value):
                return np.int32(parameter.codes[index])
        raise ValueError(
            f"fixed[{name!r}] = {value!r} is none of its choices: "
            f"{_checks.nearest(value, parameter.values)}"
        )
    _checks.check_number(f"fixed[{name!r}]", value)
    whole = isinstance(parameter, Integer) or (
        isinstance(parameter, Categorical) and all(isinstance(v, int) for v in parameter.values)
    )
    if whole and float(value) != int(value):
        raise ValueError(f"fixed[{name!r}] must be a whole number, got {value!r}.")
    return np.int32(value) if whole else np.float32(value)
