"""From an untuned workload to a recipe: the playbook's procedures, one after another."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import os
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import numpy as np
import optax

from playbook_optax import _checks, _portable, _shown, norms, optimizers, schedules, search_spaces
from playbook_optax._ties import settled_first
from playbook_optax.analysis import diagnose
from playbook_optax.analysis.boundaries import wider_range
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import metric_names, outcomes
from playbook_optax.analysis.resolution import (
    ResolutionInfo,
    resolution_findings,
    resolution_info,
    told_resolution,
)
from playbook_optax.analysis.spreads import best_by_seed, best_seed
from playbook_optax.analysis.training_length import (
    training_length_findings,
    training_length_info,
)
from playbook_optax.procedures import controls, rates, shown
from playbook_optax.procedures.clipping import LEARNING_RATE, subdirectory
from playbook_optax.procedures.learning_rate import best_rate, sweep_learning_rate
from playbook_optax.procedures.num_steps import pick_num_steps, refine_num_steps
from playbook_optax.procedures.program import program
from playbook_optax.procedures.rounds import NextRound, plan_next_round
from playbook_optax.procedures.stability import stabilize
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.procedures.warmup import default_warmup_steps
from playbook_optax.records import storage
from playbook_optax.records.study import NoFeasibleTrial, Study
from playbook_optax.runner import progress
from playbook_optax.runner.run import StudyRunner, run_study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Categorical, Float, Parameter, SearchSpace
from playbook_optax.trials import keys
from playbook_optax.trials.stepper import MakeOptimizer, MakeSchedule
from playbook_optax.trials.workload import (
    Workload,
    WorkloadLike,
    resolve,
)

LEARNING_RATE_CHAPTER, NUM_STEPS_CHAPTER, STABILITY = "learning_rate", "num_steps", "stability"
ROUND_1, ROUND_2, RETRAIN = "round_1", "round_2", "retrain"
CHAPTERS = (LEARNING_RATE_CHAPTER, NUM_STEPS_CHAPTER, STABILITY, ROUND_1, ROUND_2, RETRAIN)
OVERRIDES = (
    "learning_rate_range",
    "num_steps",
    "warmup_steps",
    "max_norm",
    "space",
    "next_space",
    "point",
)
DEFAULT_OPTIMIZER = "adam"
INDEX = "tune.json"

_SECTIONS = {
    LEARNING_RATE_CHAPTER: "Algorithm for picking an initial candidate for max_train_steps using a "
    "learning rate sweep",
    NUM_STEPS_CHAPTER: "Deciding how long to train when training is not compute-bound",
    STABILITY: "How can optimization failures be debugged and mitigated?",
    ROUND_1: "Choosing the goal for the next round of experiments",
    ROUND_2: "Deciding how long to train when training is compute-bound",
    RETRAIN: "Determining whether to adopt a training pipeline change or hyperparameter "
    "configuration",
}
# Sweeps are a quarter as long as the final run, round 1 half as long: the short trials tell the
# order of magnitude of the learning rate, the longer ones the rest.
_SWEEP_PART, _FIRST_PART, _SHORTEST_PART = 4, 2, 8
_SWEEP_TRIALS = (5, 16)
_MAX_WIDENINGS = 2
# What widened sweeps and the chapter on instability may take of the budget at most.
_SWEEPS_SHARE, _STABILITY_SHARE = 0.25, 0.3
# Trials that `stabilize` takes, all told, for each learning rate of its sweeps, and beside them.
_STABILITY_TRIALS, _STABILITY_PER_TRIAL, _STABILITY_FIXED = 5, 8, 20
_UNSTABLE = ("unstable_best", "unstable_above_best", "best_at_edge_of_infeasible")
# Round 1 gets this share of what is left when retraining is paid for.
_FIRST_SHARE = 0.4
# Around the best learning rate of the sweep, on a log scale; a schedule that decays stands a larger
# one than the constant rate of the sweep, and short trials ask for a larger one than long ones.
_RATE_FACTOR = 10.0
# One in so many trials of round 2 is one of the best of round 1, up to three.
_KEPT_PART, _KEPT_CANDIDATES = 5, 3
# From so many new trials of round 2 on, the second half is searched around the best of the first.
_REFINED_FROM, _REFINED_AROUND, _REFINED_WIDTH = 6, 3, 0.15
# Trials of the budget, at least, to (candidates, seeds) that are retrained at the end.
_RETRAINED = ((45, (5, 3)), (24, (2, 3)), (10, (1, 3)), (6, (1, 2)))
_EVALS = 20
# What procedures say to who calls them, and `tune` does by itself or has decided already.
_NOT_TOLD = ("evaluations_too_sparse", "healthy")
# What nobody asks of the few candidates that are trained again.
_NOT_ASKED = ("boundary_check_skipped", "importance_cannot_tell")
# What each chapter folds into the key.
_SWEEP_STREAM, _STABILITY_STREAM, _FIRST_STREAM, _SECOND_STREAM = 0, 2, 3, 4
_POINTS_STREAM, _RETRAIN_STREAM = 5, 6


@dataclasses.dataclass(frozen=True)
class Chapter:
    """One decision on the way to a recipe.

    Attributes:
      name: one of `CHAPTERS`.
      decision: what was decided and on which evidence, as a Finding; its evidence names the
        override that reverses it.
      verdict: answer, findings, studies and cost.
    """

    name: str
    decision: Finding
    verdict: Verdict

    def __repr__(self) -> str:
        return shown.chapter_repr(self)

    def __str__(self) -> str:
        return _shown.as_text(*shown.chapter_summary(self))

    def _repr_html_(self) -> str:
        return shown.chapter_html(self)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a point becomes an optimizer: the user's, behind a clipper and a warm-up if need be.

    Attributes:
      make_optimizer: ``make_optimizer(point)``.
      make_schedule: ``make_schedule(point, num_steps)``, or None where the optimizer makes its own.
      warmup_steps: steps of warm-up, which come out of the run's.
      max_norm: clip threshold, or None.
      extended_from: the steps for which the schedule was made that longer runs extend by the
        playbook's rule for its family; None where it is made anew for each length.
      learning_rates: the hyperparameters that the schedule multiplies, where there are several
        learning rates; none where it is that of ``learning_rate``.
    """

    make_optimizer: MakeOptimizer
    make_schedule: MakeSchedule | None
    warmup_steps: int = 0
    max_norm: float | None = None
    extended_from: int | None = None
    learning_rates: tuple[str, ...] = ()

    @property
    def users_optimizer(self) -> MakeOptimizer:
        """The user's function, which takes schedules for `learning_rates`."""
        made = self.make_optimizer
        return made.make_optimizer if isinstance(made, rates.ScaledRates) else made

    def optimizer(self, point: Any) -> optax.GradientTransformation:
        """The transformation at a point whose learning rate may be a schedule."""
        made = self.make_optimizer(point)
        if self.max_norm is None:
            return made
        return optax.chain(norms.clip_by_global_norm(self.max_norm), made)

    def schedule(self, point: Any, num_steps: int) -> Any:
        """The schedule of a run of so many steps, warm-up included."""
        assert self.make_schedule is not None
        if self.learning_rates:
            point = {**point, LEARNING_RATE: np.float32(1)}
        steps = num_steps - self.warmup_steps
        if self.extended_from is None or steps <= self.extended_from:
            made = self.make_schedule(point, steps)
        else:
            made = schedules.extend_for_longer_run(
                self.make_schedule(point, self.extended_from), steps - self.extended_from
            )
        return schedules.prepend_warmup(made, self.warmup_steps) if self.warmup_steps else made


# What of a pipeline is code.
FUNCTIONS = ("make_optimizer", "make_schedule")


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A tuned training recipe with the evidence for each decision.

    Attributes:
      workload: what was tuned.
      pipeline: how a point becomes an optimizer.
      optimizer_name: name of the optimizer among ours, or None for the user's own.
      point: hyperparameters, name to number; None where every trial was infeasible.
      num_steps: updates of the run.
      eval_every: updates between evaluations.
      objective: name of the metric that was tuned for.
      maximize: whether larger is better.
      values: retrospective best of the recipe retrained with each seed, float64 (seed,); that of
        the one trial where the budget left no room to retrain.
      chapters: the decisions, in order.
      total_budget: trial-steps that were allowed.
      params: weights of the best seed at its best evaluation, a pytree of NumPy arrays; None where
        the budget left no room to retrain.
      model_state: the model state that belongs to them.
      key: the key of the study that `values` are from.
      report: path of the report, or None where none was written.
    """

    workload: WorkloadLike = dataclasses.field(repr=False)
    pipeline: Pipeline = dataclasses.field(repr=False)
    optimizer_name: str | None
    point: dict[str, Any] | None
    num_steps: int
    eval_every: int
    objective: str
    maximize: bool
    values: np.ndarray
    chapters: tuple[Chapter, ...] = dataclasses.field(repr=False)
    total_budget: int
    params: Any = dataclasses.field(repr=False)
    model_state: Any = dataclasses.field(repr=False)
    key: chex.PRNGKey = dataclasses.field(repr=False)
    report: pathlib.Path | None = None

    def __repr__(self) -> str:
        return shown.recipe_repr(self)

    def __str__(self) -> str:
        return _shown.as_text(*shown.recipe_summary(self))

    def _repr_html_(self) -> str:
        return shown.recipe_html(self)

    def __getstate__(self) -> dict[str, Any]:
        made = {name: getattr(self.pipeline, name) for name in FUNCTIONS}
        sent: dict[str, Any] = {n: _portable.send_functions(f) for n, f in made.items()}
        return {
            **vars(self),
            "workload": _portable.send_functions(self.workload),
            "pipeline": dataclasses.replace(self.pipeline, **sent),
            "key": _portable.send_key(self.key),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        sent = {name: getattr(state["pipeline"], name) for name in FUNCTIONS}
        made: dict[str, Any] = {n: _portable.receive_functions(f) for n, f in sent.items()}
        state["pipeline"] = dataclasses.replace(state["pipeline"], **made)
        state["workload"] = _portable.receive_functions(state["workload"])
        state["key"] = _portable.receive_key(state["key"])
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        parts = ("point", "values", "chapters", "params", "model_state")
        copied = {name: copy.deepcopy(getattr(self, name), memo) for name in parts}
        return dataclasses.replace(self, **copied)

    @property
    def value(self) -> float:
        """The mean of `values`; NaN where there is none."""
        return float(np.mean(self.values)) if len(self.values) else math.nan

    @property
    def spread(self) -> float:
        """Their standard deviation; NaN for fewer than two seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def resolution(self) -> float:
        """What one validation example changes the objective by; 0 where that is not known."""
        return next((study.resolution() for study in self.studies.values()), 0.0)

    def told_limit(self) -> str:
        """What validation can tell at most, in a sentence; empty where that is not known."""
        studies = list(self.studies.values())
        return _told_limit(resolution_info(studies[-1])).strip() if studies else ""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that was decided and seen, most severe first, each once."""
        every = [f for c in self.chapters for f in (c.decision, *c.verdict.findings)]
        unique = [finding for i, finding in enumerate(every) if finding not in every[:i]]
        return tuple(by_severity(unique))

    @property
    def cost(self) -> dict[str, int]:
        """Trial-steps that each chapter took."""
        return {chapter.name: chapter.verdict.cost for chapter in self.chapters}

    @property
    def studies(self) -> dict[str, Study]:
        """The studies of all chapters, ``<chapter>/<study>``."""
        return {
            f"{chapter.name}/{name}": study
            for chapter in self.chapters
            for name, study in chapter.verdict.studies.items()
        }

    def schedule(self) -> Any:
        """The learning-rate schedule, or the number itself where the optimizer makes its own.

        Of several learning rates it is the factor that multiplies each.

        Raises:
          NoFeasibleTrial: every trial was infeasible.
        """
        point = self._feasible()
        if self.pipeline.make_schedule is None:
            return point.get(LEARNING_RATE)
        return self.pipeline.schedule(point, self.num_steps)

    def optimizer(self) -> optax.GradientTransformation:
        """The tuned optimizer, schedule, warm-up and clipping included.

        Raises:
          NoFeasibleTrial: every trial was infeasible.
        """
        point = self._feasible()
        if self.pipeline.make_schedule is not None:
            point = {**point, LEARNING_RATE: self.schedule()}
        return self.pipeline.optimizer(point)

    def to_python(
        self,
        workload: str | None = None,
        make_optimizer: str | None = None,
        *,
        style: str = "playbook_optax",
    ) -> str:
        """A short program that trains the recipe with each of its seeds.

        It runs as it is where the workload, and the optimizer if it is your own function, can be
        imported: from a module that holds them, or from the zoo. Otherwise two lines are left to
        fill in, and the program says so when it runs without them. What your script or notebook
        holds cannot be imported, which would run it again.

        Args:
          workload: the workload as ``module:attribute`` or a name of the zoo; found by itself if
            None where a module holds it. A function of the point is called with the recipe's.
          make_optimizer: ``module:attribute`` likewise, where the optimizer is your own function.
          style: ``"playbook_optax"`` for our transforms, ``"optax"`` for their equals in Optax. The
            program says where these differ, and by how much; a workload of the zoo is ours in both.

        Returns:
          Python source. It prints the best value of the objective for each seed of `values`, their
          mean and standard deviation, and leaves the weights of the best in ``best_params``.

        Raises:
          NoFeasibleTrial: every trial was infeasible.
          ValueError: an unknown style, a place that is none, or a piece without an equal in Optax
            (``nadam``, ``nadamw``, ``inverse_sqrt_decay``, parameters of less than float32).

        Example:
          >>> import jax, jax.numpy as jnp
          >>> import playbook_optax as pbx
          >>> workload = pbx.Workload(
          ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
          ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
          ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()},
          ...     objective="valid/loss")
          >>> recipe = pbx.tune(workload, "sgd", num_trials=2, num_steps=20, key=jax.random.key(0),
          ...                   overrides={"point": {"learning_rate": 0.4}})
          >>> source = recipe.to_python("models:square", style="optax")
          >>> "optimizer = optax.sgd(schedule)" in source, "playbook_optax" in source
          (True, False)
        """
        return program(self, self._feasible(), workload, make_optimizer, style)

    def final_evaluate(self) -> dict[str, float]:
        """Evaluates `params` on the workload's test data, which nothing has touched before.

        Returns:
          Metrics by name.

        Raises:
          ValueError: the workload has no test data, or there are no weights.
          NoFeasibleTrial: every trial was infeasible.
        """
        work = resolve(self.workload, self._feasible())
        if self.params is None:
            raise ValueError(
                "the recipe has no weights: the budget left no room to train it again. Run the "
                "program of recipe.to_python(), or tune with a larger num_trials."
            )
        return work.final_evaluate(self.params, self.model_state)

    def _feasible(self) -> dict[str, Any]:
        if self.point is None:
            raise NoFeasibleTrial(
                f"{self.chapters[-1].decision.message} Tune again with smaller learning rates or "
                "more trials; recipe.findings says more."
            )
        return dict(self.point)


def find_recipe(
    workload: WorkloadLike | Trainer,
    make_optimizer: MakeOptimizer | str | None = None,
    space: SearchSpace | None = None,
    make_schedule: MakeSchedule | None = None,
    *,
    num_trials: int,
    num_steps: int,
    key: chex.PRNGKey,
    directory: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    learning_rates: Sequence[str] | None = None,
    **how: Any,
) -> Recipe:
    """`pbx.tune` without its report; arguments, result and errors are the same."""
    if isinstance(workload, Trainer):
        if how or make_optimizer is not None or make_schedule is not None:
            raise TypeError(
                "tune() got a Trainer, which says already what and how to train, and more of it "
                "beside; use trainer.replace(...)."
            )
        given, how = workload, workload.how()
        make_optimizer, make_schedule = given.make_optimizer, given.make_schedule
        workload = given.workload
    tuner = _Tuner(
        workload,
        make_optimizer,
        space,
        make_schedule,
        _checks.check_count("num_trials", num_trials),
        _checks.check_count("num_steps", num_steps),
        key,
        directory,
        _check_overrides(overrides),
        learning_rates,
        how,
    )
    return tuner.tell_and_run()


def cosine(point: Mapping[str, Any], num_steps: int) -> schedules.Schedule:
    """The default schedule: a cosine decay from the point's learning rate to 0."""
    return schedules.cosine_decay(point[LEARNING_RATE], num_steps)


def _check_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    if overrides is not None and not isinstance(overrides, Mapping):
        raise _checks.ArgumentTypeError(
            f"overrides must be a dict of decisions by name, got {overrides!r}."
        )
    given = dict(overrides or {})
    for name in given:
        if name not in OVERRIDES:
            raise ValueError(f"overrides[{name!r}] is unknown: {_checks.nearest(name, OVERRIDES)}")
    if "num_steps" in given:
        given["num_steps"] = _checks.check_count("overrides['num_steps']", given["num_steps"])
    if "warmup_steps" in given:
        given["warmup_steps"] = _checks.check_count(
            "overrides['warmup_steps']", given["warmup_steps"], at_least=0
        )
    if given.get("max_norm") is not None:
        _checks.check_number("overrides['max_norm']", given["max_norm"], above=0.0)
    for name in ("space", "next_space"):
        if name in given and not isinstance(given[name], SearchSpace):
            raise _checks.ArgumentTypeError(
                f"overrides[{name!r}] must be a SearchSpace, got {given[name]!r}."
            )
    if "learning_rate_range" in given:
        pair = given["learning_rate_range"]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise _checks.ArgumentTypeError(
                f"overrides['learning_rate_range'] must be a pair (low, high), got {pair!r}."
            )
        try:
            line = Float(pair[0], pair[1], scale="log")
        except ValueError as error:
            raise ValueError(f"overrides['learning_rate_range']: {error}") from None
        given["learning_rate_range"] = (line.low, line.high)
    if "point" in given and not isinstance(given["point"], Mapping):
        raise _checks.ArgumentTypeError(
            f"overrides['point'] must be a dict of hyperparameters, got {given['point']!r}."
        )
    for name, value in given.get("point", {}).items():
        fix = "Of a choice that is no number, give the index."
        _checks.check_number(f"overrides['point'][{name!r}]", value, fix=fix)
    return given


def _middle(space: SearchSpace) -> dict[str, Any]:
    """The middle of each range on its own scale."""
    points = space.from_unit(np.full((1, len(space)), 0.5, np.float32))
    return {name: np.asarray(values)[0] for name, values in points.items()}


def _rates(space: SearchSpace, name: str = LEARNING_RATE) -> Float:
    """The range of a learning rate."""
    line = space[name]
    assert isinstance(line, Float)
    return line


def optimizer_arguments(name: str) -> dict[str, Any]:
    """The hyperparameters that one of our optimizers takes, with their defaults, or None."""
    parameters = inspect.signature(getattr(optimizers, name)).parameters
    own = {n: None if p.default is p.empty else p.default for n, p in parameters.items()}
    return {n: v for n, v in own.items() if n == LEARNING_RATE or isinstance(v, (int, float))}


def _by_name(name: str, point: Mapping[str, Any]) -> optax.GradientTransformation:
    # What else there is in a point is the workload's.
    taken = {n: point[n] for n in optimizer_arguments(name) if n in point}
    made: optax.GradientTransformation = getattr(optimizers, name)(**taken)
    return made


class _Tuner:
    """One call of `tune`: what is left of the budget, and the chapters so far."""

    def __init__(
        self,
        workload: WorkloadLike,
        make_optimizer: MakeOptimizer | str | None,
        space: SearchSpace | None,
        make_schedule: MakeSchedule | None,
        num_trials: int,
        num_steps: int,
        key: chex.PRNGKey,
        directory: str | os.PathLike[str] | None,
        overrides: dict[str, Any],
        learning_rates: Sequence[str] | None,
        how: dict[str, Any],
    ) -> None:
        keys.check_key("key", key)
        self._own_fixed = dict(how.get("fixed") or {})
        if space is not None and not isinstance(space, SearchSpace):
            raise _checks.ArgumentTypeError(f"space must be a pbx.SearchSpace, got {space!r}.")
        for what, given in (("make_optimizer", make_optimizer), ("make_schedule", make_schedule)):
            if given is not None and not isinstance(given, str) and not callable(given):
                raise _checks.ArgumentTypeError(
                    f"{what} must be a function of the point, got {given!r}."
                )
        self._name = None
        if make_optimizer is None or isinstance(make_optimizer, str):
            self._name = DEFAULT_OPTIMIZER if make_optimizer is None else make_optimizer
            _checks.check_choice("make_optimizer", self._name, search_spaces.TABLE)
            make_optimizer = functools.partial(_by_name, self._name)
            # The table of budgets decides again when round 1 knows how many trials it has.
            self._given_space = space
            space = space or search_spaces.optimizer_search_space(self._name, num_trials)
            if learning_rates is not None and tuple(learning_rates) != (LEARNING_RATE,):
                raise ValueError(
                    f"learning_rates = {learning_rates!r} is for an optimizer of your own: "
                    f"{self._name} has the one {LEARNING_RATE!r}."
                )
            known = optimizer_arguments(self._name)
            for name in space if isinstance(workload, Workload) else ():
                if name not in known:
                    raise ValueError(
                        f"space has {name!r}, which {self._name} does not take: "
                        f"{_checks.nearest(name, known)}"
                    )
            if LEARNING_RATE not in space:
                raise ValueError(
                    f"space has no {LEARNING_RATE!r}, which {self._name} needs: add "
                    "pbx.Float(1e-4, 1.0, scale='log')."
                )
        elif space is None:
            raise ValueError(
                "space is missing: an optimizer of your own needs the SearchSpace of its "
                f"hyperparameters, such as pbx.SearchSpace({{{LEARNING_RATE!r}: "
                "pbx.Float(1e-4, 1.0, scale='log')})."
            )
        else:
            self._given_space = space
        # Searched apart, scaled together by a factor that is called as the learning rate is.
        self._rates = rates.check_rates(learning_rates, space)
        if self._rates:
            make_optimizer = rates.ScaledRates(make_optimizer, self._rates)
        self._has_rate = LEARNING_RATE in space or bool(self._rates)
        if make_schedule is None and self._has_rate:
            make_schedule = cosine
        if LEARNING_RATE in space and not isinstance(space[LEARNING_RATE], Float):
            raise _checks.ArgumentTypeError(
                f"space[{LEARNING_RATE!r}] must be a pbx.Float, got {space[LEARNING_RATE]!r}."
            )
        if make_schedule is not None and not self._has_rate:
            raise ValueError(
                f"make_schedule needs the hyperparameter {LEARNING_RATE!r} in the space, which has "
                f"{list(space)}; or learning_rates=, the names of those that it multiplies."
            )
        self._work = resolve(workload, _middle(space))
        self._workload, self._space = workload, space
        self._pipeline = Pipeline(make_optimizer, make_schedule, learning_rates=self._rates)
        # What a user says of ranges holds in all rounds.
        self._bound: SearchSpace | None = overrides.get("space", self._given_space)
        self._num_trials, self._num_steps = num_trials, num_steps
        self._total = num_trials * num_steps
        self._key, self._directory = key, directory
        self._overrides = overrides
        self._chapters: list[Chapter] = []
        self._is_indexed = False
        # One step shows no instability.
        self._sweep_steps = max(2, num_steps // _SWEEP_PART)
        # The rate, or the factor of several, around which round 1 searches.
        self._rate: float | None = None
        # What the next decision has to say of the length of the final run.
        self._shortened = ""
        self._first_steps = max(1, num_steps // _FIRST_PART)
        self._final_steps = overrides.get("num_steps", num_steps)
        if "num_steps" in overrides:
            self._first_steps = max(1, self._final_steps // _FIRST_PART)
        self._check_decisions()
        lengths = {0, overrides.get("warmup_steps", 0), *default_warmup_steps(self._sweep_steps)}
        trainer = controls.controlled(
            Trainer(workload, make_optimizer, make_schedule, **how),
            self._as_columns(_middle(space)),
            tuple(sorted({*lengths, max(1, self._sweep_steps // 10)})),
            self._has_rate,
        )
        # What a study does not vary is data of its program: all chapters share one.
        columns = self._as_columns(self._defaults())
        if self._rates:
            columns[LEARNING_RATE] = np.float32(1)
        self._trainer = trainer.with_fixed(columns)
        # A hyperparameter that nothing uses is refused now, not when a round first varies it.
        StudyRunner(
            self._trainer,
            space,
            num_steps=self._sweep_steps,
            eval_every=self._every(self._sweep_steps),
            key=key,
        )
        self._check_index()

    def _check_decisions(self) -> None:
        """Raises where the user's own decisions do not fit the space or the budget."""
        given = self._overrides
        if self._final_steps > self._total:
            raise ValueError(
                f"overrides['num_steps'] = {self._final_steps} is more than the whole budget of "
                f"{self._total:,} trial-steps (num_trials x num_steps)."
            )
        if given.get("warmup_steps", 0) >= self._final_steps:
            raise ValueError(
                f"overrides['warmup_steps'] must be < {self._final_steps}, the steps of the run, "
                f"got {given['warmup_steps']}."
            )
        if self._rates and "learning_rate_range" in given:
            raise ValueError(
                "overrides['learning_rate_range'] is for one learning rate; of several give the "
                "ranges in the space."
            )
        if self._pipeline.make_schedule is None:
            for name in ("learning_rate_range", "warmup_steps"):
                if given.get(name):
                    raise ValueError(
                        f"overrides[{name!r}] needs the hyperparameter {LEARNING_RATE!r} in the "
                        f"space, which has {list(self._space)}."
                    )
        needed, known = set(self._space), set(self._space)
        if self._name is not None:
            arguments = optimizer_arguments(self._name)
            known |= set(arguments)
            needed -= set(arguments) - {LEARNING_RATE}
        for what in ("space", "next_space", "point"):
            for name in given.get(what, ()):
                if name not in known:
                    raise ValueError(
                        f"overrides[{what!r}] has {name!r}, which is no hyperparameter here: "
                        f"{_checks.nearest(name, sorted(known))}"
                    )
            missing = sorted(needed - set(given.get(what, needed)))
            if missing and what != "next_space":
                raise ValueError(f"overrides[{what!r}] lacks {missing[0]!r}.")
        first, second = given.get("space", self._space), given.get("next_space", {})
        for name in second:
            if name in first and not _alike(first[name], second[name]):
                raise ValueError(
                    f"overrides['next_space'][{name!r}] must be of the kind that round 1 has, "
                    f"{first[name]!r}, got {second[name]!r}."
                )

    def _index(self) -> dict[str, Any]:
        """What was asked for, but for what each study remembers by itself."""
        overrides = {
            name: value.to_dict() if isinstance(value, SearchSpace) else value
            for name, value in self._overrides.items()
        }
        content = {
            "num_trials": self._num_trials,
            "num_steps": self._num_steps,
            "key": keys.describe_key(self._key),
            "overrides": dict(sorted(overrides.items())),
            "optimizer": self._name,
            "space": self._space.to_dict(),
            **({"learning_rates": list(self._rates)} if self._rates else {}),
        }
        return storage.as_stored(content)

    def _check_index(self) -> None:
        """Raises where the directory holds the tuning of another call."""
        if self._directory is None:
            return
        try:
            stored = storage.read_document(storage.root(self._directory) / INDEX)
        except (storage.NoStudy, storage.CorruptSpec):
            return  # A damaged one is written anew; the studies check themselves.
        for name, now in self._index().items():
            before = stored.get(name)
            if before != now:
                raise storage.StorageError(
                    f"{os.fspath(self._directory)!r} holds another tuning: {name} is "
                    f"{reprlib.repr(before)} there and {now!r} here. Choose an empty directory. "
                    "Copy into it the folders of the chapters before the one that changes, and "
                    "they are not trained again."
                )

    # Chapters -----------------------------------------------------------------------------------

    def tell_and_run(self) -> Recipe:
        """`run`, with a person told of every decision as it is taken."""
        budget = progress.Budget("tune", self._total)
        with progress.telling(self._trainer.progress, self._work.name, budget):
            return self.run()

    def run(self) -> Recipe:
        """All chapters, and what comes of them."""
        if "point" not in self._overrides:
            sweep = self._sweep() if self._has_rate else self._no_rate()
            self._decide_num_steps(sweep)
            self._stability(sweep)
            first = self._round_1()
            second = self._round_2(first)
        else:
            first, second = None, []
            self._take(self._overridden_pipeline())
        return self._retrain(first, second)

    def _no_rate(self) -> Study | None:
        """Says what is left out where no hyperparameter is the learning rate."""
        alike = rates.look_like_rates(self._space)
        advice = "Name the learning rates with learning_rates=, if there are any."
        if alike:
            advice = f"If {' and '.join(alike)} are learning rates, say learning_rates={alike!r}."
        self._decide(
            LEARNING_RATE_CHAPTER,
            f"No hyperparameter is called {LEARNING_RATE!r}, so there is no sweep, no chapter on "
            "instability, and no decay but the optimizer's own.",
            {"hyperparameters": list(self._space), "alike": list(alike)},
            "space",
            advice,
            severity="warning" if alike else "info",
        )
        return None

    def _sweep(self) -> Study | None:
        """The learning rate at constant schedule, all else in the middle of its range."""
        given = self._overrides.get("learning_rate_range")
        if given is not None:
            self._rate = float(np.sqrt(given[0] * given[1]))
            self._decide(
                LEARNING_RATE_CHAPTER,
                f"The learning rate is searched from {given[0]:.4g} to {given[1]:.4g}, as you say.",
                {"low": given[0], "high": given[1]},
                "learning_rate_range",
            )
            return None
        num = min(max(self._num_trials // 4, _SWEEP_TRIALS[0]), _SWEEP_TRIALS[1])
        cost = num * self._sweep_steps
        line = self._swept_range()
        if line is None:
            self._decide(
                LEARNING_RATE_CHAPTER,
                f"No sweep: the ranges of {', '.join(self._rates)} leave no common factor.",
                {"hyperparameters": list(self._rates)},
                "space",
                "Give each of them a range, not a point.",
            )
            return None
        if cost > self._total * _SWEEPS_SHARE * 1.5:
            self._decide(
                LEARNING_RATE_CHAPTER,
                f"No sweep: {num} trials of {self._sweep_steps} steps are too much of the budget "
                f"of {self._total:,} trial-steps. The whole range is searched instead.",
                {"low": float(line.low), "high": float(line.high), "budget": self._total},
                "learning_rate_range",
                "Give more trials.",
            )
            return None
        studies: dict[str, Study] = {}
        findings: list[Finding] = []
        spent = 0
        flat: Float | None = None
        for number in range(_MAX_WIDENINGS + 1):
            self._say(LEARNING_RATE_CHAPTER, f"{num} trials of {self._sweep_steps} steps")
            verdict = sweep_learning_rate(
                self._trainer.with_fixed(controls.CONSTANT),
                SearchSpace({LEARNING_RATE: line}),
                key=jax.random.fold_in(self._key, _SWEEP_STREAM),
                num_trials=num,
                num_steps=self._sweep_steps,
                eval_every=self._every(self._sweep_steps),
                directory=self._folder(LEARNING_RATE_CHAPTER, f"sweep_{number}"),
            )
            (study,) = verdict.studies.values()
            studies[f"sweep_{number}"] = study
            spent += verdict.cost
            findings = list(verdict.findings)
            codes = {finding.code for finding in findings}
            wider = None
            flat = line if "no_slope" in codes else flat
            if self._given_space is not None:
                break  # The user's range is what is searched.
            if "all_infeasible" in codes:
                # Below is what moved nothing, if that is where it came from.
                wider = _moved(line.low / 1e3, line.low) if flat is None else None
            elif "no_slope" in codes:
                wider = _moved(line.high / 3, line.high * 100)  # Too small to move anything.
            elif verdict.answer is None and "best_at_end_of_sweep" in codes:
                wider = _extended(line, study, best_rate(study))
            if wider is None or spent + cost > self._total * _SWEEPS_SHARE:
                break
            line = wider
        low, high = float(line.low), float(line.high)
        what = "learning rate"
        if self._rates:
            what = f"factor of {', '.join(self._rates)}"
        severity = "info"
        best = best_rate(study)
        if flat is not None and codes & {"no_slope", "all_infeasible"}:
            decided = (
                f"No constant {what} from {flat.low:.4g} to {flat.high:.4g} moves the objective"
            )
            above = f", and every one from {low:.4g} to {high:.4g} is infeasible"
            decided += f"{above if 'all_infeasible' in codes else ''}."
            severity = "warning"
        elif best is None:
            decided = f"Every {what} from {low:.4g} to {high:.4g} is infeasible."
        else:
            # A linear range may begin at 0, around which there is nothing to search on a log scale.
            self._rate = best if best > 0 else None
            decided = (
                f"The best constant {what} is {best:.4g} after {self._sweep_steps} "
                f"steps, of {len(study.points[LEARNING_RATE])} from {low:.4g} to {high:.4g}."
            )
            if len(studies) > 1:
                decided += f" The range was moved {len(studies) - 1} time(s)."
        space = self._first_space(self._num_trials)
        lines = {name: _rates(space, name) for name in self._rates or (LEARNING_RATE,)}
        ranges = {name: [float(one.low), float(one.high)] for name, one in lines.items()}
        if "space" in self._overrides:
            decided += " Round 1 searches the space that you give."
        elif self._rates:
            told = [f"{name} from {a:.4g} to {b:.4g}" for name, (a, b) in ranges.items()]
            decided += f" Round 1 searches {', '.join(told)}."
        else:
            (ends,) = ranges.values()
            decided += f" Round 1 searches from {ends[0]:.4g} to {ends[1]:.4g}."
        if self._given_space is not None:
            findings = [self._of_given_space(finding) for finding in findings]
        self._decide(
            LEARNING_RATE_CHAPTER,
            decided,
            {"learning_rate": self._rate or math.nan, "ranges": ranges},
            "space" if self._rates else "learning_rate_range",
            verdict=Verdict(self._rate, tuple(findings), studies, spent),
            severity=severity,
        )
        return study if len(outcomes(study).order) and severity == "info" else None

    def _swept_range(self) -> Float | None:
        """The range of the sweep: of the learning rate, or of the factor of several."""
        if self._rates:
            return rates.factors(self._space, self._rates, _middle(self._space))
        return _rates(self._space)

    def _of_given_space(self, finding: Finding) -> Finding:
        """A finding whose advice is about the argument that the user gave."""
        if finding.code != "best_at_end_of_sweep":
            return finding
        line = _rates(self._space) if not self._rates else None
        at_top = finding.evidence["learning_rate"] == finding.evidence["high"]
        if line is None:
            ends = "upper" if at_top else "lower"
            advice = f"Move the {ends} ends of {', '.join(self._rates)} in the space outwards."
        else:
            edge = "high" if at_top else "low"
            low, high = wider_range(line.low, line.high, line.scale, edge)
            advice = (
                f"The space that you gave is a bound. Give {LEARNING_RATE}=pbx.Float({low:.3g}, "
                f"{high:.3g}, scale={line.scale!r}) to look beyond it."
            )
        return dataclasses.replace(finding, suggestion=advice)

    def _decide_num_steps(self, sweep: Study | None) -> None:
        """How long round 1 and the final run are."""
        final = self._final_steps
        verdict = Verdict(final, (), {}, 0)
        if "num_steps" in self._overrides:
            said = f"The final run has {final} steps, as you say"
        elif sweep is None:
            said = f"Nothing says how long to train: the final run has at most all {final} steps"
        elif not any(name.startswith("train/") for name in metric_names(sweep)):
            said = (
                "Nothing is recorded of the training data in which a perfect fit could be seen: "
                f"the final run has at most all {final} steps"
            )
        else:
            verdict = pick_num_steps(
                self._judged_by, sweep, key=self._key, num_steps=self._sweep_steps
            )
            if verdict.answer is None:
                said = (
                    f"No trial of the sweep fits the training data perfectly in "
                    f"{self._sweep_steps} steps: the final run has at most all {final} steps"
                )
            else:
                self._first_steps = min(
                    max(2 * verdict.answer, self._num_steps // _SHORTEST_PART, 1),
                    self._first_steps,
                )
                said = (
                    f"The fastest trial of the sweep fits the training data perfectly in "
                    f"{verdict.answer} steps; the final run has at most {final} steps, which can "
                    "do no harm when the best checkpoint is taken"
                )
        self._decide(
            NUM_STEPS_CHAPTER,
            f"{said}, and trials of round 1 have {self._first_steps}.",
            {"num_steps": final, "first_round_steps": self._first_steps},
            "num_steps",
            verdict=Verdict(verdict.answer, verdict.findings, {}, 0),
        )

    def _stability(self, sweep: Study | None) -> None:
        """The chapter on instability, where the sweep shows any."""
        if {"warmup_steps", "max_norm"} & set(self._overrides):
            self._take(self._overridden_pipeline())
            self._decide(
                STABILITY,
                f"Warm-up and clipping as you say: {self._remedies()}.{self._longer_first()}",
                {"warmup_steps": self._pipeline.warmup_steps, "max_norm": self._pipeline.max_norm},
                "warmup_steps",
            )
            return
        if sweep is None:
            return
        seen = [f for f in self._chapters[0].verdict.findings if f.code in _UNSTABLE]
        if not seen:
            self._decide(
                STABILITY,
                "The sweep shows no instability, so there is no warm-up and no clipping.",
                {"warmup_steps": 0, "max_norm": None},
                "warmup_steps",
            )
            return
        num = min(_STABILITY_TRIALS + self._num_trials // 32, 12)
        estimate = (_STABILITY_FIXED + _STABILITY_PER_TRIAL * num) * self._sweep_steps
        if estimate > _STABILITY_SHARE * self._total:
            self._decide(
                STABILITY,
                f"The sweep shows an instability ({seen[0].code}), but looking into it takes about "
                f"{estimate:,} trial-steps, more than {_STABILITY_SHARE:.0%} of the budget.",
                {"warmup_steps": 0, "max_norm": None, "estimate": estimate},
                "warmup_steps",
                f"Give at least {math.ceil(estimate / _STABILITY_SHARE / self._num_steps)} trials, "
                "or run pbx.procedures.stabilize.",
                severity="warning",
            )
            return
        self._say(STABILITY, f"about {estimate:,} trial-steps")
        verdict = stabilize(
            self._trainer.with_fixed(controls.CONSTANT),
            sweep,
            key=jax.random.fold_in(self._key, _STABILITY_STREAM),
            num_steps=self._sweep_steps,
            num_trials=num,
            eval_every=self._every(self._sweep_steps),
            optimizers={},
            directory=self._folder(STABILITY),
        )
        answer = verdict.answer
        said = "Nothing helps against the instability but a lower learning rate"
        if answer is not None and answer.recommended is not None:
            clip = answer.max_norm
            if clip is None and "clipping" in answer.recommended:
                clip = answer.comparison.max_norm
            self._take(
                dataclasses.replace(
                    self._pipeline, warmup_steps=int(answer.warmup_steps), max_norm=clip
                )
            )
            self._rate = self._bounded(answer.learning_rate)
            said = (
                f"Of the remedies, {answer.recommended} does most: {answer.best_value:.4g} against "
                f"{answer.baseline_value:.4g} without. From here on: {self._remedies()}"
            )
        self._decide(
            STABILITY,
            f"{said}.{self._longer_first()}",
            {
                "warmup_steps": self._pipeline.warmup_steps,
                "max_norm": self._pipeline.max_norm,
                "recommended": None if answer is None else answer.recommended,
            },
            "warmup_steps",
            verdict=verdict,
        )

    def _round_1(self) -> Study | None:
        """Quasi-random search over what the budget allows."""
        steps = self._first_steps
        left = self._left_for_rounds()
        # One trial at least, where there is room for one.
        num = max(int(left * _FIRST_SHARE // steps), min(left // steps, 1))
        if num < 1:
            return None
        space = self._first_space(num)
        self._say(ROUND_1, f"{num} trials of {steps} steps")
        study = run_study(
            self._trainer,
            space,
            num_trials=num,
            num_steps=steps,
            eval_every=self._every(steps),
            key=jax.random.fold_in(self._key, _FIRST_STREAM),
            directory=self._folder(ROUND_1),
        )
        findings = diagnose.diagnose(study)
        evidence: dict[str, Any] = {"num_trials": num, "num_steps": steps, "space": space.to_dict()}
        said = f"{num} quasi-random trials of {steps} steps over {', '.join(space)}"
        ranked = _ranked([study])
        if ranked:
            value, step = _checkpoint(*ranked[0])
            said += f": the best reaches {value:.4g} at step {step}."
            evidence["value"] = value
        else:
            said += ": every one is infeasible."
        if self._rates and "space" not in self._overrides:
            said += " All learning rates follow one schedule."
        self._decide(
            ROUND_1,
            said,
            evidence,
            "space",
            verdict=Verdict(None, tuple(findings), {"search": study}, num * steps),
        )
        return study

    def _round_2(self, first: Study | None) -> list[Study]:
        """Longer trials around the good ones of round 1, then around the best of themselves."""
        if first is None or not len(outcomes(first).order):
            return []
        findings: list[Finding] = []
        # Of a round that moved nothing there is nothing to learn but to train longer.
        moved = _useless(resolution_info(first)) is None
        if moved and "num_steps" not in self._overrides:
            refined = refine_num_steps(self._trainer, first, key=self._key)
            findings += refined.findings
            if refined.answer is not None and refined.answer < self._first_steps:
                enough = max(int(refined.answer), 2 * self._pipeline.warmup_steps, 1)
                if enough < self._final_steps:
                    self._shortened = (
                        f"Good trials of round 1 needed no more than {enough} steps, so the final "
                        f"run has {enough} and not {self._final_steps}; overrides={{'num_steps': "
                        "...} keeps them. "
                    )
                    self._final_steps = enough
        self._extend_schedule()
        steps = self._final_steps
        num = int(self._left_for_rounds() // steps)
        if num < 1:
            return []
        plan = plan_next_round(
            self._judged_by,
            first,
            key=self._key,
            num_steps=max(steps, self._first_steps + 1),
            num_trials=num,
        )
        findings += plan.findings
        space = self._overrides.get("next_space")
        if space is None:
            known = moved and plan.answer is not None
            space = plan.answer.space if known else self._first_space(num)
            space = rates.within(space, self._bound)
        num_kept = min(max(1, num // _KEPT_PART), _KEPT_CANDIDATES)
        top = np.array([trial for _, trial in _ranked([first])[:num_kept]])
        kept = {name: values[top] for name, values in first.points.items()}
        fresh = num - len(top)
        # Who gives the space of this round gets it.
        own = "next_space" in self._overrides
        num_refined = 0 if own or fresh < _REFINED_FROM else fresh // 2
        fixed = {} if plan.answer is None else dict(plan.answer.fixed)
        points = self._beside(kept, space, fresh - num_refined, 0, fixed)
        self._say(ROUND_2, f"{num} trials of {steps} steps")
        runner = StudyRunner(
            self._trainer,
            points,
            num_steps=steps,
            eval_every=self._every(steps),
            key=jax.random.fold_in(self._key, _SECOND_STREAM),
        )
        studies = {"search": runner.run(points, directory=self._folder(ROUND_2))}
        studies["search"] = _covered(studies["search"], space, first)
        said = (
            f"{self._told_length()}{num} trials of {steps} steps: the best {len(top)} of round 1, "
            f"{fresh - num_refined} around the good ones"
        )
        closer = self._closer(studies["search"], num_refined)
        if closer is not None:
            none = {name: values[:0] for name, values in points.items()}
            near = rates.within(closer.space, self._bound)
            points = self._beside(none, near, num_refined, fresh - num_refined, closer.fixed)
            study = runner.run(points, directory=self._folder(f"{ROUND_2}_refined"))
            studies["refined"] = _covered(study, near, first)
            said += f", and {num_refined} around the best {_REFINED_AROUND} of these"
        for study in studies.values():
            findings += diagnose.diagnose(study)
        findings += _longer_helped(first, studies["search"])
        evidence: dict[str, Any] = {"num_trials": num, "num_steps": steps, "space": space.to_dict()}
        ranked = _ranked(list(studies.values()))
        if ranked:
            value, step = _checkpoint(*ranked[0])
            said += f". The best reaches {value:.4g} at step {step}."
            evidence["value"] = value
        else:
            said += ". Every one is infeasible at this length."
        cost = steps * sum(study.num_trials for study in studies.values())
        self._decide(
            ROUND_2,
            said,
            evidence,
            "next_space",
            verdict=Verdict(plan.answer, tuple(findings), studies, cost),
        )
        return list(studies.values())

    def _beside(
        self,
        kept: Mapping[str, np.ndarray],
        space: SearchSpace,
        fresh: int,
        start: int,
        fixed: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Points of an earlier round and new ones of a space after them."""
        key = jax.random.fold_in(self._key, _POINTS_STREAM)
        sampled = space.sample(key, fresh, start=start) if fresh and len(space) else {}
        num = len(next(iter(kept.values())))
        points = {}
        for name in dict.fromkeys((*kept, *sampled)):
            # Round 1 left at its default what it did not search.
            values = kept.get(name)
            if values is None:
                values = np.full(num, self._defaults()[name], sampled[name].dtype)
            new = sampled.get(name)
            if new is None:
                new = np.full(fresh, fixed[name] if name in fixed else values[0], values.dtype)
            points[name] = np.concatenate([values, np.asarray(new, values.dtype)])
        return points

    def _closer(self, study: Study, num: int) -> NextRound | None:
        """So many more trials around the best of a round; None where there are none."""
        if not num or not len(outcomes(study).order):
            return None
        plan = plan_next_round(
            self._judged_by,
            study,
            key=self._key,
            # As long as these, but a next round is one of longer trials.
            num_steps=int(study.spec["num_steps"]) + 1,
            num_trials=num,
            num_best=_REFINED_AROUND,
            min_width=_REFINED_WIDTH,
        )
        answer: NextRound | None = plan.answer
        return answer

    def _retrain(self, first: Study | None, second: list[Study]) -> Recipe:
        """The best candidates with several seeds; the best of them is the recipe."""
        ranked = _ranked(second) or _ranked([] if first is None else [first])
        source = ranked[0][0] if ranked else None
        useless = None if source is None else _useless(resolution_info(source))
        if useless and "point" not in self._overrides:
            return self._refuse(useless)
        given = self._overrides.get("point")
        instead = ""
        if source is None and given is None and self._rate and self._left() >= self._final_steps:
            # Rounds of a trial or two may have met only rates at which training breaks.
            given = {n: v for n, v in self._defaults().items() if n in self._space}
            given |= self._scaled(self._rate)
            instead = "The rounds have no feasible trial, so this is the best of the sweep. "
        key = jax.random.fold_in(self._key, _RETRAIN_STREAM)
        empty = np.array([], np.float64)
        if source is None and given is None:
            said, advice = "every trial was infeasible", "Lower the range of learning rates."
            if first is None:
                said, advice = "the budget left no trial for round 1", "Give more trials."
            self._decide(
                RETRAIN, f"There is no recipe: {said}.", {}, "point", advice, severity="error"
            )
            return self._recipe(None, empty, None, None, key)
        candidates, seeds = self._retrained()
        steps = self._final_steps
        if given is not None:
            points = {name: self._as_searched(name, value) for name, value in given.items()}
            seeds = min(3, self._left() // steps)
        else:
            assert source is not None
            room = self._left() // (steps * max(seeds, 1))
            candidates = min(candidates, len(ranked), room)
            if candidates < 1:
                trial = ranked[0][1]
                value, step = _checkpoint(source, trial)
                point = {name: given.item() for name, given in source.point(trial).items()}
                self._final_steps = int(source.spec["num_steps"])
                stream = _FIRST_STREAM if source is first else _SECOND_STREAM
                key = jax.random.fold_in(self._key, stream)
                self._decide(
                    RETRAIN,
                    f"The recipe is the best trial, {value:.4g} at step {step}; the budget leaves "
                    f"no room to train it again, so its spread is unknown."
                    f"{_told_limit(resolution_info(source))}",
                    {"point": point, "value": value},
                    "point",
                    "Give at least 6 trials.",
                    severity="warning",
                )
                return self._recipe(point, np.array([value]), None, None, key)
            points = {
                name: np.stack([study.points[name][t] for study, t in ranked[:candidates]])
                for name in source.points
            }
        self._say(RETRAIN, f"{len(next(iter(points.values())))} candidates, {seeds} seeds")
        study = run_study(
            self._trainer,
            points,
            num_steps=steps,
            eval_every=self._every(steps),
            key=key,
            num_seeds=seeds,
            keep="best",
            directory=self._folder(RETRAIN),
        )
        cost = study.num_trials * seeds * steps
        info = resolution_info(study)
        findings = diagnose.diagnose(study) if study.num_trials > 1 else resolution_findings(info)
        findings = [finding for finding in findings if finding.code not in _NOT_ASKED]
        if source is not None and first is not None:
            # The space says what the indices of choices mean.
            study = _covered(study, SearchSpace.from_dict(source.spec["space"]), first)
        nothing = Verdict(None, tuple(findings), {"retrain": study}, cost)
        if info.best < 0:
            self._decide(
                RETRAIN,
                "Every candidate is infeasible with some other seed.",
                {},
                "point",
                "Lower the learning rate, or look at pbx.procedures.stabilize.",
                verdict=nothing,
                severity="error",
            )
            return self._recipe(None, empty, None, None, key)
        useless = _useless(info)
        if useless:
            return self._refuse(useless, nothing)
        trial = info.best
        values = best_by_seed(study, trial)
        point = {name: value.item() for name, value in study.point(trial).items()}
        spread = f", standard deviation {np.std(values, ddof=1):.3g}" if seeds > 1 else ""
        self._decide(
            RETRAIN,
            f"{self._told_length()}{instead}Of {study.num_trials} candidate(s), each trained with "
            f"{seeds} seed(s) which it was not tuned on, trial {trial} is best: "
            f"{study.objective} = {np.mean(values):.4g} on average{spread}.{_told_limit(info)}",
            {"point": point, "values": [float(value) for value in values]},
            "point",
            verdict=Verdict(point, tuple(findings), {"retrain": study}, cost),
        )
        chosen = (trial, best_seed(study, trial) if seeds > 1 else None)
        return self._recipe(point, values, study.params(*chosen), study.model_state(*chosen), key)

    # Pieces -------------------------------------------------------------------------------------

    def _refuse(self, useless: Finding, verdict: Verdict | None = None) -> Recipe:
        """No recipe, since training did nothing that the objective can tell."""
        self._decide(
            RETRAIN,
            f"There is no recipe. {useless.message}",
            useless.evidence,
            "space",
            useless.suggestion,
            verdict=verdict or Verdict(None, (useless,), {}, 0),
            severity="error",
        )
        return self._recipe(None, np.array([], np.float64), None, None, self._key)

    def _told_length(self) -> str:
        """What there is to say of the length of the final run, once."""
        told, self._shortened = self._shortened, ""
        return told

    @property
    def _judged_by(self) -> Trainer:
        """The trainer as procedures take it that train nothing here: without its schedule."""
        return self._trainer.replace(make_schedule=None)

    def _take(self, pipeline: Pipeline) -> None:
        """From here on warm-up and clipping are those of a pipeline."""
        self._pipeline = pipeline
        self._trainer = self._trainer.with_fixed(
            controls.warmed_and_clipped(pipeline.warmup_steps, pipeline.max_norm)
        )

    def _as_columns(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters in the dtypes that searching them gives."""
        return {
            name: self._as_searched(name, value)[0]
            for name, value in point.items()
            if name != LEARNING_RATE
        }

    def _recipe(
        self, point: Any, values: np.ndarray, params: Any, model_state: Any, key: chex.PRNGKey
    ) -> Recipe:
        if point is not None:
            point = {**self._own_fixed, **point}
        return Recipe(
            workload=self._workload,
            pipeline=self._pipeline,
            optimizer_name=self._name,
            point=point,
            num_steps=self._final_steps,
            eval_every=self._every(self._final_steps),
            objective=self._work.objective,
            maximize=self._work.maximize,
            values=np.asarray(values, np.float64),
            chapters=tuple(self._chapters),
            total_budget=self._total,
            params=params,
            model_state=model_state,
            key=key,
        )

    def _extend_schedule(self) -> None:
        """Carries the user's schedule over to longer runs by the playbook's rule, if it has one."""
        make_schedule = self._pipeline.make_schedule
        if make_schedule is None or make_schedule is cosine:
            return  # A cosine decay made for the longer run is the stretched one.
        if not controls.extends(self._trainer):
            return
        steps = self._first_steps - self._pipeline.warmup_steps
        self._pipeline = dataclasses.replace(self._pipeline, extended_from=steps)
        self._trainer = self._trainer.with_fixed({controls.EXTENDED_FROM: np.int32(steps)})

    def _decide(
        self,
        name: str,
        message: str,
        evidence: Mapping[str, Any],
        override: str,
        suggestion: str = "",
        *,
        verdict: Verdict | None = None,
        severity: str = "info",
    ) -> None:
        decision = Finding(
            code=f"decided_{name}",
            severity=severity,
            message=message,
            evidence={**evidence, "override": override},
            section=_SECTIONS[name],
            suggestion=suggestion or f"To decide otherwise, give overrides={{{override!r}: ...}}.",
        )
        verdict = verdict or Verdict(None, (), {}, 0)
        told = tuple(_told_here(f) for f in verdict.findings if f.code not in _NOT_TOLD)
        verdict = dataclasses.replace(verdict, findings=told)
        self._chapters.append(Chapter(name, decision, verdict))
        progress.say(f"decided {name}: {decision.message}")
        if self._directory is not None and self._spent() and not self._is_indexed:
            # Not before the first study, which may yet be refused.
            storage.write_document(storage.root(self._directory) / INDEX, self._index())
            self._is_indexed = True

    def _spent(self) -> int:
        return sum(chapter.verdict.cost for chapter in self._chapters)

    def _left(self) -> int:
        return self._total - self._spent()

    def _retrained(self) -> tuple[int, int]:
        """Candidates and seeds that the budget is to retrain."""
        # A longer final run than the budget was counted in leaves room for fewer.
        trials = min(self._num_trials, self._total // self._final_steps)
        return next((what for least, what in _RETRAINED if trials >= least), (0, 0))

    def _left_for_rounds(self) -> int:
        candidates, seeds = self._retrained()
        return self._left() - candidates * seeds * self._final_steps

    def _every(self, steps: int) -> int:
        return max(1, steps // _EVALS)

    def _folder(self, *names: str) -> pathlib.Path | None:
        if self._directory is None:
            return None
        return subdirectory(self._directory, "/".join(names))

    def _say(self, name: str, what: str) -> None:
        """Tells a person which chapter begins, and what is spent."""
        number = CHAPTERS.index(name) + 1
        share = self._spent() / self._total
        progress.say(
            f"tune, {number} of {len(CHAPTERS)}: {name}, {what} ({share:.0%} of the budget spent)"
        )

    def _defaults(self) -> dict[str, Any]:
        """What a sweep does not vary: the optimizer's own values, or the middle of the range."""
        middle = _middle(self._space)
        if self._name is None:
            return middle
        own = optimizer_arguments(self._name)
        del own[LEARNING_RATE]
        return {**own, **{n: value for n, value in middle.items() if n not in own}}

    def _rate_range(self) -> tuple[float, float]:
        """The learning rates that round 1 searches."""
        if "learning_rate_range" in self._overrides:
            low, high = self._overrides["learning_rate_range"]
            return float(low), float(high)
        line = _rates(self._space)
        if self._rate is None:
            return float(line.low), float(line.high)
        low, high = self._rate / _RATE_FACTOR, self._rate * _RATE_FACTOR
        if self._given_space is None:
            return low, high
        near = rates.around(line, self._rate, _RATE_FACTOR)
        return near.low, near.high

    def _bounded(self, rate: float) -> float:
        """A rate, or factor, moved into the range that the user gave."""
        line = self._swept_range()
        if self._given_space is None or line is None:
            return rate
        return min(max(rate, float(line.low)), float(line.high))

    def _scaled(self, factor: float) -> dict[str, float]:
        """The learning rate or rates, by name."""
        if not self._rates:
            return {LEARNING_RATE: factor}
        middle = _middle(self._space)
        return {name: float(middle[name]) * factor for name in self._rates}

    def _first_space(self, num_trials: int) -> SearchSpace:
        """The space of round 1: dimensions that its trials can afford, rates around the best."""
        own = self._overrides.get("space")
        space = own or self._space
        if own is None and self._given_space is None:
            assert self._name is not None
            space = search_spaces.optimizer_search_space(self._name, num_trials)
        known = own is None and self._rate is not None
        if LEARNING_RATE in space and (known or "learning_rate_range" in self._overrides):
            space = SearchSpace({**space, LEARNING_RATE: Float(*self._rate_range(), scale="log")})
        if known and self._rates:
            assert self._rate is not None
            near = {
                name: rates.around(_rates(space, name), rate, _RATE_FACTOR)
                for name, rate in self._scaled(self._rate).items()
            }
            space = SearchSpace({**space, **near})
        return space

    def _longer_first(self) -> str:
        """Makes trials of round 1 so long that training goes on after the warm-up, and says so."""
        enough = min(2 * self._pipeline.warmup_steps, self._final_steps)
        if enough <= self._first_steps:
            return ""
        self._first_steps = enough
        return f" Trials of round 1 have {enough} steps, so that training goes on after it."

    def _as_searched(self, name: str, value: Any) -> np.ndarray:
        """One trial's value of a hyperparameter, in the dtype that its search would have."""
        like = _middle(self._space).get(name, np.float32(0))
        array = np.asarray([value])
        if np.issubdtype(like.dtype, np.integer) and int(value) != value:
            raise ValueError(f"overrides['point'][{name!r}] must be a whole number, got {value!r}.")
        return array.astype(like.dtype)

    def _overridden_pipeline(self) -> Pipeline:
        return dataclasses.replace(
            self._pipeline,
            warmup_steps=self._overrides.get("warmup_steps", 0),
            max_norm=self._overrides.get("max_norm"),
        )

    def _remedies(self) -> str:
        """Warm-up and clipping in words."""
        said = []
        if self._pipeline.warmup_steps:
            said.append(f"{self._pipeline.warmup_steps} steps of warm-up")
        if self._pipeline.max_norm is not None:
            said.append(f"gradients clipped at a norm of {self._pipeline.max_norm:.4g}")
        return " and ".join(said) or "neither"


def _extended(line: Float, study: Study, best: float | None) -> Float | None:
    """A range two decades beyond the end at which the best learning rate lies."""
    swept = study.points[LEARNING_RATE]
    if best is not None and best <= float(swept.min()):
        # Below a linear range that begins at 0 there is what its grid left out.
        low = line.low or float(swept[swept > 0].min())
        return _moved(low / 100, low * 3)
    return _moved(line.high / 3, line.high * 100)


def _moved(low: float, high: float) -> Float | None:
    """A range of learning rates on a log scale; None where there is none, as below 0."""
    try:
        return Float(low, high, scale="log")
    except ValueError:
        return None


def _alike(one: Parameter, other: Parameter) -> bool:
    """Whether values of the one mean the same as those of the other."""
    if isinstance(one, Categorical) and not one.numeric:
        return one == other
    named = isinstance(other, Categorical) and not other.numeric
    return not named and one.from_unit(0.5).dtype == other.from_unit(0.5).dtype


def _ranked(studies: list[Study]) -> list[tuple[Study, int]]:
    """The trials of studies of equal length that have a value, best first.

    What validation cannot separate from the best is sorted as `_ties.settled_first` does.
    """
    outs = [outcomes(study) for study in studies]
    found = [(i, int(trial)) for i, out in enumerate(outs) for trial in np.sort(out.order)]
    if not found:
        return []
    loss = np.array([outs[i].loss[trial] for i, trial in found])
    ties = np.array([outs[i].ties[:, trial] for i, trial in found]).T
    points = [
        np.array([studies[i].points[name][trial] for i, trial in found])
        for name in studies[0].points
        if all(name in study.points for study in studies)
    ]
    order = settled_first(loss, list(ties), outs[0].resolution, points)
    return [(studies[found[row][0]], found[row][1]) for row in order]


def _checkpoint(study: Study, trial: int) -> tuple[float, int]:
    """A trial's best value and its step."""
    out = outcomes(study)
    return float(out.value[trial]), int(out.checkpoint_step[trial])


def _useless(info: ResolutionInfo) -> Finding | None:
    """Why nothing of a study can be a recipe, if training did nothing that the objective tells."""
    found = resolution_findings(info)
    return next((finding for finding in found if finding.severity == "error"), None)


def _told_here(finding: Finding) -> Finding:
    """A procedure's finding, with advice that a caller of `tune` can follow."""
    if finding.code != "no_perfect_fit":
        return finding
    advice = "Give a larger num_steps, and see that data augmentation and regularization are off."
    return dataclasses.replace(finding, severity="info", suggestion=advice)


def _told_limit(info: ResolutionInfo) -> str:
    """What validation can tell at all, in a sentence."""
    if not info.resolution:
        return ""
    may = ""
    if math.isfinite(info.upper):
        may = f", and on as many other examples it may be {info.upper:.3g} (95% confidence)"
    return (
        " Validation cannot separate what lies closer: "
        f"{told_resolution(info.objective, info.resolution)}{may}."
    )


def _covered(study: Study, space: SearchSpace, first: Study) -> Study:
    """A study with points from elsewhere, with a space that is wide enough to hold them all."""
    found: dict[str, Any] = {}
    known = SearchSpace.from_dict(first.spec["space"]) if first.spec.get("space") else space
    for name, values in study.points.items():
        found[name] = _wide_enough(space[name] if name in space else known[name], values)
    return dataclasses.replace(study, spec={**study.spec, "space": SearchSpace(found).to_dict()})


def _longer_helped(shorter: Study, longer: Study) -> list[Finding]:
    """Whether the best points of round 1 gained from the length of round 2.

    They were chosen for their results in round 1, which luck had a part in: so that they gained is
    believed, and that they did not is not.
    """
    if int(longer.data["step"].values[-1]) <= int(shorter.data["step"].values[-1]):
        return []
    info = training_length_info(longer, shorter=shorter)
    gained = info.basis == "lengths" and info.compute_bound
    return training_length_findings(info) if gained else []


def _wide_enough(parameter: Parameter, values: np.ndarray) -> Parameter:
    """A parameter whose range, or choices, hold all the values."""
    if isinstance(parameter, Categorical):
        # Values of choices that are no numbers are indices, which are the same in every round.
        more = np.setdiff1d(values, parameter.grid()).tolist() if parameter.numeric else []
        return Categorical([*parameter.values, *more]) if more else parameter
    if isinstance(parameter, Float):
        low, high = min(parameter.low, float(values.min())), max(parameter.high, values.max())
        return Float(low, float(high), scale=parameter.scale)
    log = parameter.scale == "log"
    inside = values[values > 0] if log else values
    return dataclasses.replace(
        parameter,
        low=min(parameter.low, *inside.tolist()),
        high=max(parameter.high, *inside.tolist()),
        include_zero=parameter.include_zero or (log and len(inside) < len(values)),
    )
