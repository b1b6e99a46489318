"""A schedule driven by the validation error: automated, recorded, and replayed as a plain one."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax

from playbook_optax import _checks, _shown, schedules
from playbook_optax.analysis import diagnose
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import metric_names, outcomes
from playbook_optax.learning_rate import reduce_on_plateau
from playbook_optax.procedures.clipping import LEARNING_RATE, check_point, subdirectory
from playbook_optax.procedures.given import at_constant_rates, constant
from playbook_optax.procedures.scale import scatter
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.run import run_study
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.keys import check_key, trial_key
from playbook_optax.trials.train import make_trial
from playbook_optax.trials.workload import resolve

SECTION = "Why do some papers have complicated learning rate schedules?"
NUM_EVALUATIONS = 50
CERTAIN = 2.0
"""Deviations beyond which a gain is no luck."""
SCATTER = 20
"""Evaluations before the first reduction that tell how far they scatter."""


@_shown.short
class PlateauAnswer(NamedTuple):
    """A schedule that followed the validation error, as a plain function of the step.

    Attributes:
      values: the learning rates, in order: those that were used, to the bit.
      boundaries: the updates from which the second, third, … of them holds.
      point: the other hyperparameters of the run.
      num_steps: length of the run.
      best_value: the objective at its best evaluation.
      best_step: updates before it.
    """

    values: tuple[float, ...]
    boundaries: tuple[int, ...]
    point: dict[str, Any]
    num_steps: int
    best_value: float
    best_step: int

    @property
    def schedule(self) -> schedules.Schedule:
        """The schedule, ``count -> learning rate``."""
        return schedules.piecewise_constant(self.values, self.boundaries)

    def make_schedule(self, point: Any, num_steps: int) -> schedules.Schedule:
        """The same schedule for `run_study`, whatever the point and the length.

        Args:
          point: not used.
          num_steps: not used.

        Returns:
          The schedule.
        """
        del point, num_steps
        return self.schedule


@takes_trainer
def plateau_schedule(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    eval_every: int | None = None,
    point: Mapping[str, Any] | None = None,
    factor: float = 0.1,
    patience: int = 5,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
    min_scale: float = 0.0,
    max_reductions: int = 32,
    num_trials: int = 12,
    replay: bool = True,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Trains one trial whose learning rate falls when the validation objective stops improving.

    Training stops at each evaluation, and the rule of `reduce_on_plateau` judges the workload's
    objective there, its direction included. Every decision is recorded, so that the answer is a
    plain schedule; and it is trained once more with that schedule, by `run_study`, to show that it
    gives the same curves. To copy what was found to another workload, copy the procedure and not
    the schedule, which is sensitive to all other hyperparameters.

    Args:
      trainer: as in `run_study`, its workload fed from its data. ``point["learning_rate"]`` is a
        schedule in the run, and in the search too if it has a `make_schedule`, which is not called.
      space_or_study: a finished study whose best point is taken; or a space, of which `num_trials`
        points are trained at constant learning rates for that; not used with `point`.
      key: the only source of randomness.
      num_steps: updates of the run.
      eval_every: updates between evaluations, which are the decisions; a fiftieth of `num_steps` if
        None.
      point: all hyperparameters, name to number, ``learning_rate`` among them, the first one.
      factor: what the learning rate is multiplied by at a plateau, in (0, 1).
      patience: evaluations in a row without improvement before that.
      rtol: an improvement is one by more than this share of the best value's size,
      atol: and by more than this; not both 0.
      cooldown: evaluations after a reduction that do not count as a plateau.
      min_scale: the learning rate never falls below this share of the first.
      max_reductions: at most so many reductions.
      num_trials: trials of the search, with a space.
      replay: whether to train the run again with the plain schedule, and compare.
      directory: where to store the studies of the search and the replay.

    Returns:
      A `Verdict`: `answer` is a `PlateauAnswer`, or None where the run is infeasible, or every
      trial that its point could come from. The study ``driven`` is the run, ``replay`` the same
      with the plain schedule.

    Raises:
      ValueError: a bad argument; no point, space or study; a point without ``learning_rate``; or a
        workload fed from the host.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="edge", init=lambda key: ({"w": jnp.full(1, 0.95)}, {}),
      ...     loss=lambda p, s, b, k: (jnp.abs(p["w"]).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": jnp.abs(p["w"]).sum()},
      ...     objective="valid/loss")
      >>> verdict = pbx.procedures.plateau_schedule(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     point={"learning_rate": 0.2}, num_steps=40, eval_every=2, patience=3)
      >>> verdict.answer.boundaries, [round(v, 6) for v in verdict.answer.values]
      ((10, 24, 34), [0.2, 0.02, 0.002, 0.0002])
      >>> verdict.findings[0].code, verdict.cost
      ('replay_agrees', 80)

    Source: playbook, "Why do some papers have complicated learning rate schedules?"
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    if eval_every is None:
        eval_every = max(1, num_steps // NUM_EVALUATIONS)
    studies: dict[str, Study] = {}
    findings: list[Finding] = []
    cost = 0
    if point is None:
        study, cost = _searched(
            at_constant_rates(trainer),
            space_or_study,
            key=key,
            num_trials=num_trials,
            num_steps=num_steps,
            eval_every=eval_every,
            directory=directory,
        )
        studies["search"] = study
        if outcomes(study).best < 0:
            return Verdict(None, tuple(diagnose.diagnose(study)), studies, cost)
        point = study.best().point
    given = check_point(point, ())
    if LEARNING_RATE not in given:
        raise ValueError(
            f"point must have {LEARNING_RATE!r}, the first learning rate, got {sorted(given)}."
        )
    watch = reduce_on_plateau(
        factor,
        patience,
        rtol,
        atol,
        cooldown,
        1,
        min_scale,
        maximize=resolve(trainer.workload, {**trainer.fixed, **given}).maximize,
        max_reductions=max_reductions,
    )
    driven, values, boundaries = _drive(trainer, given, watch, key, num_steps, eval_every)
    studies["driven"] = driven
    cost += num_steps
    rest = {name: value for name, value in given.items() if name != LEARNING_RATE}
    out = outcomes(driven)
    if out.best < 0:
        findings.append(_infeasible(driven, given))
        return Verdict(None, tuple(by_severity(findings)), studies, cost)
    answer = PlateauAnswer(
        values, boundaries, rest, num_steps, float(out.value[0]), int(out.checkpoint_step[0])
    )
    if replay:
        table = {name: values[:1] for name, values in driven.points.items()}
        studies["replay"] = run_study(
            trainer.replace(make_schedule=answer.make_schedule, trials_per_block=1),
            table,
            num_steps=num_steps,
            eval_every=eval_every,
            key=key,
            directory=subdirectory(directory, "replay"),
        )
        cost += num_steps
        findings.append(_replayed(driven, studies["replay"]))
    findings += judge_decisions(answer, driven, patience, eval_every)
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


def judge_decisions(
    answer: PlateauAnswer, driven: Study, patience: int, eval_every: int
) -> list[Finding]:
    """What the reductions were and whether they gained anything; trains nothing.

    Args:
      answer: the schedule of the run.
      driven: the run.
      patience: evaluations without improvement before a reduction.
      eval_every: updates between evaluations.

    Returns:
      The findings.
    """
    findings = [_decided(answer, driven, eval_every)]
    if not answer.boundaries:
        findings.append(_no_plateau(answer, patience, eval_every))
        return findings
    gain, noise = _gain(answer, driven, patience)
    if gain <= noise:
        findings.append(_gained_nothing(answer, driven, gain, noise))
    return findings


def _gain(answer: PlateauAnswer, driven: Study, patience: int) -> tuple[float, float]:
    """What the objective gained after the first reduction, and how much of that may be luck.

    The last evaluations before the reduction, whose lack of improvement was its reason, tell the
    level that a constant rate has, and how far evaluations scatter around it; the middle of those
    after it tells what came of the reductions.
    """
    out = outcomes(driven)
    loss, step = (-out.curve[0] if out.maximize else out.curve[0]), out.step
    seen = np.isfinite(loss)
    earlier = loss[seen & (step > 0) & (step <= answer.boundaries[0])]
    before, after = earlier[-patience:], loss[seen & (step > answer.boundaries[0])]
    if not len(before) or not len(after):
        return 0.0, 0.0
    parts = ((before, scatter(earlier[-SCATTER:])), (after, scatter(after)))
    # Of a median the variance is pi / 2 that of a mean.
    deviation = math.sqrt(math.pi / 2 * sum(off**2 / len(part) for part, off in parts))
    return float(np.median(before) - np.median(after)), CERTAIN * deviation


def _searched(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None,
    *,
    directory: str | os.PathLike[str] | None,
    num_trials: int,
    num_steps: int,
    **arguments: Any,
) -> tuple[Study, int]:
    """The study whose best point is trained, and its cost."""
    if isinstance(space_or_study, Study):
        return space_or_study, 0
    if space_or_study is None:
        raise ValueError(
            "give point=, a space or a finished study: the run needs its first learning rate."
        )
    study = run_study(
        trainer,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        directory=subdirectory(directory, "search"),
        **arguments,
    )
    return study, num_trials * num_steps


def _drive(
    trainer: Trainer,
    given: Mapping[str, Any],
    watch: optax.GradientTransformationExtraArgs,
    key: chex.PRNGKey,
    num_steps: int,
    eval_every: int,
) -> tuple[Study, tuple[float, ...], tuple[int, ...]]:
    """Trains from one evaluation to the next: the run, its learning rates and when they began."""
    # A schedule, as in the replay, so that make_optimizer builds the same transformation.
    trial = make_trial(
        trainer.workload, trainer.make_optimizer, num_steps, eval_every, make_schedule=constant
    )
    start = {
        name: np.asarray(value, np.int32 if np.asarray(value).dtype.kind in "iu" else np.float32)
        for name, value in {**trainer.fixed, **given}.items()
    }
    work = resolve(trainer.workload, start)
    advance = jax.jit(trial.advance)
    judge = jax.jit(lambda state, value: watch.update({}, state, value=value)[1])
    state = jax.jit(trial.init)(start, trial_key(key), work.data)
    judged = watch.init({})
    first = np.float32(start[LEARNING_RATE])
    values, boundaries = [first], []
    evaluated = 0
    for begin, end in itertools.pairwise(trial.eval_steps.tolist()):
        state = advance(state, work.data, begin, end)
        # The evaluation before the first update comes with the first segment, and after the last
        # there is nothing to decide.
        curve = state.metrics[work.objective]
        last = evaluated + 1 + (begin == 0) - (end == num_steps)
        while evaluated < last:
            judged = judge(judged, curve[evaluated])
            evaluated += 1
        rate = np.float32(first * np.float32(judged.scale))
        if rate != values[-1]:
            values.append(rate)
            boundaries.append(end)
            state = state._replace(point={**state.point, LEARNING_RATE: jax.numpy.asarray(rate)})
    result = jax.device_get(jax.jit(trial.result)(state))
    study = Study.from_arrays(
        {name: start[name][None] for name in given},
        {name: curve[None] for name, curve in result.metrics.items()},
        result.step,
        objective=work.objective,
        maximize=work.maximize,
        infeasible=np.asarray(result.infeasible)[None],
        name=work.name,
    )
    return study, tuple(float(v) for v in values), tuple(boundaries)


def _replayed(driven: Study, replay: Study) -> Finding:
    """Whether the plain schedule gives the same curves, to the last bit."""
    apart = {}
    for name in metric_names(driven):
        one, two = (study.data[name].values for study in (driven, replay))
        if not np.array_equal(one, two, equal_nan=True):
            with np.errstate(invalid="ignore"):
                apart[name] = float(np.nanmax(np.abs(one.astype(np.float64) - two)))
    if not apart:
        return Finding(
            code="replay_agrees",
            severity="info",
            message="Trained again with the plain schedule, every metric came out the same, to the "
            "last bit: the run is reproducible without watching its validation error.",
            evidence={"metrics": metric_names(driven)},
            section=SECTION,
        )
    worst = max(apart, key=apart.__getitem__)
    return Finding(
        code="replay_differs",
        severity="warning",
        message=(
            "Trained again with the plain schedule, the run is not the same to the last bit: the "
            f"largest difference is {apart[worst]:.3g}, in {worst!r}."
        ),
        evidence={"largest_differences": apart},
        section=SECTION,
        suggestion="Report the replay, whose schedule is known, rather than the run it came from.",
    )


def _decided(answer: PlateauAnswer, driven: Study, eval_every: int) -> Finding:
    changes = ", ".join(
        f"{rate:.4g} from step {step}"
        for step, rate in zip(answer.boundaries, answer.values[1:], strict=True)
    )
    return Finding(
        code="plateau_decisions",
        severity="info",
        message=(
            f"The learning rate began at {answer.values[0]:.4g}"
            + (f" and became {changes}" if changes else " and stayed there")
            + f"; {driven.objective} is {answer.best_value:.4g} at step {answer.best_step}."
        ),
        evidence={
            "values": answer.values,
            "boundaries": answer.boundaries,
            "eval_every": eval_every,
            "objective": driven.objective,
            "best_value": answer.best_value,
            "best_step": answer.best_step,
        },
        section=SECTION,
        suggestion=(
            f"As code: schedules.piecewise_constant({list(answer.values)}, "
            f"{list(answer.boundaries)}). On another workload run the procedure again: the "
            "schedule is sensitive to every other hyperparameter."
        ),
    )


def _no_plateau(answer: PlateauAnswer, patience: int, eval_every: int) -> Finding:
    return Finding(
        code="no_plateau",
        severity="warning",
        message=(
            f"The objective never went {patience} evaluations ({patience * eval_every} steps) "
            "without an improvement, so the learning rate is constant."
        ),
        evidence={"patience": patience, "eval_every": eval_every, "num_steps": answer.num_steps},
        section="What is the best learning rate decay schedule family?",
        suggestion="Some schedule that is not constant should always be used: lower the patience, "
        "train longer, or use a linear or cosine decay.",
    )


def _gained_nothing(answer: PlateauAnswer, driven: Study, gain: float, noise: float) -> Finding:
    return Finding(
        code="reductions_gained_nothing",
        severity="warning",
        message=(
            f"After the first reduction, at step {answer.boundaries[0]}, {driven.objective} is no "
            "better, beyond noise, than in the evaluations before it: a constant learning rate "
            "does as well."
        ),
        evidence={
            "best_step": answer.best_step,
            "boundaries": answer.boundaries,
            "gain": gain,
            "noise": noise,
        },
        section=SECTION,
        suggestion="Reduce sooner (a smaller patience), or use a linear or cosine decay.",
    )


def _infeasible(driven: Study, given: Mapping[str, Any]) -> Finding:
    reason = str(driven.data["infeasible_reason"].values[0])
    return Finding(
        code="all_infeasible",
        severity="error",
        message=f"The run is infeasible ({reason}), so there is no schedule.",
        evidence={"reason": reason, "point": {n: np.asarray(v).item() for n, v in given.items()}},
        section="How can optimization failures be debugged and mitigated?",
        suggestion="Start with a lower learning rate.",
    )
