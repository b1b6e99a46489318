"""What a new batch size asks for: a study to be run again, and never a comparison without one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks, _tree
from playbook_optax.analysis import diagnose
from playbook_optax.analysis.boundaries import wider_range
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures.clipping import LEARNING_RATE, subdirectory
from playbook_optax.procedures.given import given_or_trained, trains_if_needed
from playbook_optax.procedures.rounds import declared_parameter, transfer_kind
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Categorical, Float, Integer, Parameter, SearchSpace
from playbook_optax.trials.keys import check_key
from playbook_optax.trials.workload import resolve

SECTION = "Why shouldn't the batch size be tuned to directly improve validation set performance?"
RULES: Mapping[str, float] = {"linear": 1.0, "sqrt": 0.5}
"""Starting points for the learning rate by rule: it grows with this power of the batch size."""
ROOM = 4.0
"""The new range of learning rates reaches this factor beyond the old best and the scaled one."""
PROBE_NORMS = (0.04, 0.08)
"""Norms of the gradients that tell how an optimizer scales: below most clip thresholds, and with a
hundred million weights still far above most eps."""
PROBE_WORK = 2**33
"""Weights times updates that the probe takes at most: about ten seconds of one processor."""
FEWEST_PROBE_STEPS = 3
"""More than one, because a warm-up begins with an update of zero."""


class BatchSizePlan(NamedTuple):
    """The study that a new batch size asks for.

    Attributes:
      space: what to search. Ranges, not answers: the best learning rate is found in them, not
        computed.
      num_steps: updates of each trial, the longer end of the range in which the need lies.
      num_steps_range: (shortest, longest): as many epochs as before, and as many steps.
      num_trials: as many as the study at the old batch size had.
      retune: the hyperparameters that interact most strongly with the batch size, and are searched
        again.
      reasons: name to a sentence on what was done about it and why; ``num_steps`` among them.
      batch_size: the new one.
    """

    space: SearchSpace
    num_steps: int
    num_steps_range: tuple[int, int]
    num_trials: int
    retune: tuple[str, ...]
    reasons: dict[str, str]
    batch_size: int


@trains_if_needed
def change_batch_size(
    trainer: Trainer,
    space_or_study: SearchSpace | Study,
    *,
    key: chex.PRNGKey,
    batch_size: int,
    new_batch_size: int,
    rule: str | None = None,
    room: float = ROOM,
    kinds: Mapping[str, str] | None = None,
    num_steps: int = 1000,
    num_trials: int = 24,
    eval_every: int | None = None,
    num_seeds: int = 1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Proposes the study that a new batch size asks for.

    The batch size decides the speed of training and is not tuned for validation error: tuned anew,
    one batch size reaches what another does. What has to be tuned anew is the optimizer (learning
    rate, momentum) and the regularization, and perhaps the number of steps.

    The new range of the learning rate is laid around the old best one and the one that a heuristic
    gives: proportional to the batch size where the size of an update follows that of the gradient
    (SGD), to its square root where it does not (Adam). Which holds is measured, by giving the
    optimizer a gradient and twice that gradient for as many updates as the study's trials had, and
    comparing the last ones: an average such as that of `rmsprop` begins at 1 and takes hundreds of
    updates to forget it. The heuristics are starting points, known to fail: the range holds both
    ends, and `room` beyond.

    Args:
      trainer: as in `run_study`, its workload at the old batch size.
      space_or_study: the finished study at the old batch size, or a space of which one is run.
      key: the only source of randomness.
      batch_size: the old one, examples in a batch.
      new_batch_size: the new one.
      rule: ``"linear"`` or ``"sqrt"``, instead of the measurement.
      room: factor by which the new range of learning rates reaches beyond both ends, above 1.
      kinds: name to kind as in `plan_next_round`, for hyperparameters whose name does not tell.
      num_steps: updates of a trial of the study at the old batch size, with a space.
      num_trials: its trials.
      eval_every: its updates between evaluations; a twentieth of its steps if None.
      num_seeds: its repetitions of each trial.
      directory: where to store it.

    Returns:
      A `Verdict`: `answer` is a `BatchSizePlan`, or None where no trial is feasible.

    Raises:
      ValueError: a bad argument, equal batch sizes, or a study without ``learning_rate``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": [0.01, 0.1, 1.0]}, {"valid/loss": [[2, 1], [2, 0.2], [2, 2]]},
      ...     [0, 1000], objective="valid/loss")
      >>> verdict = pbx.procedures.change_batch_size(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), study,
      ...     key=jax.random.key(0), batch_size=64, new_batch_size=16)
      >>> verdict.answer.space["learning_rate"], verdict.answer.num_steps_range
      (Float(low=0.00625, high=0.4, scale='log'), (1000, 4000))
      >>> print(verdict.answer.reasons["num_steps"])
      A smaller batch needs at least as many steps, and at most as many epochs: 1000 to 4000 steps.

    Source: playbook, "Why shouldn't the batch size be tuned to directly improve validation set
    performance?"
    """
    check_key("key", key)
    batch_size = _checks.check_count("batch_size", batch_size)
    new_batch_size = _checks.check_count("new_batch_size", new_batch_size)
    if batch_size == new_batch_size:
        raise ValueError(
            f"new_batch_size = {new_batch_size} is the old one: there is nothing to tune again."
        )
    if rule is not None:
        _checks.check_choice("rule", rule, RULES)
    _checks.check_number("room", room, above=1.0)
    if not isinstance(space_or_study, Study):
        num_steps = _checks.check_count("num_steps", num_steps)
    study, cost = given_or_trained(
        trainer,
        space_or_study,
        num_trials=num_trials,
        num_steps=num_steps,
        eval_every=eval_every,
        key=key,
        num_seeds=num_seeds,
        directory=subdirectory(directory, "old_batch_size"),
    )
    studies = {"old_batch_size": study}
    if LEARNING_RATE not in study.points:
        raise ValueError(
            f"the study has no hyperparameter {LEARNING_RATE!r}, the first to tune again: "
            f"{_checks.nearest(LEARNING_RATE, study.points)}"
        )
    out = outcomes(study)
    if out.best < 0:
        return Verdict(None, tuple(diagnose.diagnose(study)), studies, cost)
    best = study.point(out.best)
    steps = int(study.data["step"].values.max())
    if rule is None:
        power = _gradient_power(trainer, best, steps, key)
    else:
        power = RULES[rule]
    ratio = new_batch_size / batch_size
    space: dict[str, Parameter] = {}
    retune: list[str] = []
    reasons: dict[str, str] = {}
    for name in study.points:
        kind = transfer_kind(name, kinds).kind
        parameter = declared_parameter(study, name)
        if name == LEARNING_RATE:
            space[name], reasons[name] = _rates(float(best[name]), ratio, power, room)
        elif parameter is None:
            reasons[name] = "Constant in the study, so not searched; think about whether it may be."
            continue
        elif kind == "optimizer":
            space[name] = _widened(_widened(parameter, "low"), "high")
            reasons[name] = "Part of the optimizer: the whole old range and half of it beyond."
        elif kind == "regularization":
            edge = "high" if ratio > 1 else "low"
            space[name] = _widened(parameter, edge)
            reasons[name] = (
                "Less noise in a larger batch can mean more overfitting: stronger values as well."
                if ratio > 1
                else "The noise of a smaller batch regularizes by itself: weaker values as well."
            )
        else:
            space[name] = parameter
            reasons[name] = "The whole old range: interactions with the batch size are weaker here."
        if name == LEARNING_RATE or kind in ("optimizer", "regularization"):
            retune.append(name)
    order = [name for name in (study.space or {}) if name in space]
    order += [name for name in space if name not in order]
    short, long = sorted((steps, max(1, math.ceil(steps / ratio))))
    reasons["num_steps"] = (
        f"A larger batch needs at least as many epochs, and at most as many steps: {short} to "
        f"{long} steps."
        if ratio > 1
        else f"A smaller batch needs at least as many steps, and at most as many epochs: {short} "
        f"to {long} steps."
    )
    plan = BatchSizePlan(
        SearchSpace({name: space[name] for name in order}),
        long,
        (short, long),
        study.num_trials,
        tuple(name for name in order if name in retune),
        reasons,
        new_batch_size,
    )
    findings = [_not_for_validation(plan, batch_size), _proposed(plan, batch_size, power, best)]
    missing = _missing(plan, study, kinds)
    if missing is not None:
        findings.append(missing)
    return Verdict(plan, tuple(by_severity(findings)), studies, cost)


def _gradient_power(
    trainer: Trainer, point: Mapping[str, Any], num_steps: int, key: chex.PRNGKey
) -> float:
    """The power of the batch size by which the learning rate may grow, from 1/2 to 1.

    An update that doubles with the gradient is linear in it; one that stays the same is normalized.
    The last update of a run of `num_steps` decides, by when the optimizer has forgotten how its
    averages began, if it ever does.
    """
    given = {**trainer.fixed, **point}
    params, _ = jax.eval_shape(resolve(trainer.workload, given).init, key)
    if trainer.make_schedule is not None:
        given[LEARNING_RATE] = trainer.make_schedule(given, num_steps)
    # At weights of zero weight decay adds nothing.
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    num_weights = max(1, sum(leaf.size for leaf in jax.tree.leaves(weights)))
    probe_steps = min(num_steps, max(FEWEST_PROBE_STEPS, PROBE_WORK // num_weights))

    def size_of_update(norm: chex.Array) -> chex.Array:
        transform = optax.with_extra_args_support(trainer.make_optimizer(given))
        gradient = jax.tree.map(
            lambda leaf: jnp.full_like(leaf, norm / math.sqrt(num_weights)), weights
        )

        def update(_: Any, carry: tuple[Any, chex.Array]) -> tuple[Any, chex.Array]:
            state, last = carry
            updates, state = transform.update(
                gradient, state, weights, value=jnp.float32(1), grad=gradient
            )
            size = _tree.global_norm(updates)
            # A schedule may end at zero, and an optimizer may skip updates.
            return state, jnp.where(size > 0, size, last)

        state = jax.tree.map(jnp.asarray, transform.init(weights))
        zero = jnp.zeros_like(_tree.global_norm(weights))
        return jax.lax.fori_loop(0, probe_steps, update, (state, zero))[1]

    one, two = (float(size) for size in jax.jit(jax.vmap(size_of_update))(jnp.asarray(PROBE_NORMS)))
    if not (0 < one < math.inf and 0 < two < math.inf):
        return RULES["linear"]
    return round(0.5 + 0.5 * min(max(math.log2(two / one), 0.0), 1.0), 2)


def _rates(best: float, ratio: float, power: float, room: float) -> tuple[Float, str]:
    """The range of learning rates around the old best one and the scaled one, and why."""
    scaled = best * ratio**power
    low, high = min(best, scaled) / room, max(best, scaled) * room
    rule = {1.0: "in proportion to the batch size", 0.5: "with its square root"}.get(
        power, f"with its power {power:.2g}"
    )
    reason = (
        f"The old best was {best:.3g}. If it changed {rule}, it would be {scaled:.3g}, which is a "
        f"place to start and not an answer: the range holds both, and a factor of {room:g} beyond."
    )
    low, high = (float(f"{end:.3g}") for end in (low, high))
    return Float(low, high, scale="log"), reason


def _widened(parameter: Parameter, edge: str) -> Parameter:
    """The parameter with one edge moved outwards, as far as it can be."""
    if isinstance(parameter, Categorical):
        return parameter
    low, high = wider_range(float(parameter.low), float(parameter.high), parameter.scale, edge)
    ends: dict[str, Any] = {"low": low, "high": high}
    if isinstance(parameter, Integer):
        smallest = 1 if parameter.low >= 1 else min(parameter.low, 0)
        ends = {"low": max(math.floor(low), smallest), "high": min(math.ceil(high), 2**31 - 1)}
    return dataclasses.replace(parameter, **ends)


def _not_for_validation(plan: BatchSizePlan, batch_size: int) -> Finding:
    return Finding(
        code="batch_size_not_for_validation",
        severity="warning",
        message=(
            f"The batch size of {plan.batch_size} cannot be compared with {batch_size} before the "
            "study is run again: a difference in validation error at the old hyperparameters "
            "typically goes away when each batch size is tuned. Choose it for speed of training."
        ),
        evidence={"batch_size": batch_size, "new_batch_size": plan.batch_size},
        section=SECTION,
        suggestion="Tune both with the same number of trials, and compare their best.",
    )


def _proposed(
    plan: BatchSizePlan, batch_size: int, power: float, best: Mapping[str, Any]
) -> Finding:
    return Finding(
        code="rerun_study",
        severity="info",
        message=(
            f"Run {plan.num_trials} trials of {plan.num_steps} steps at batch size "
            f"{plan.batch_size} over {', '.join(plan.space)}."
        ),
        evidence={
            "batch_size": batch_size,
            "new_batch_size": plan.batch_size,
            "space": plan.space.to_dict(),
            "retune": list(plan.retune),
            "num_steps_range": list(plan.num_steps_range),
            "old_best": {name: np.asarray(value).item() for name, value in best.items()},
            "power": power,
            "reasons": plan.reasons,
        },
        section=SECTION,
        suggestion=(
            "Too many steps do no harm to the best checkpoint; refine_num_steps shortens them."
        ),
    )


def _missing(plan: BatchSizePlan, study: Study, kinds: Mapping[str, str] | None) -> Finding | None:
    """What should be tuned again and is not in the study."""
    seen = {transfer_kind(name, kinds).kind for name in plan.space}
    missing = [
        what
        for kind, what in (("optimizer", "momentum (or b1, b2)"), ("regularization",) * 2)
        if kind not in seen
    ]
    if not missing:
        return None
    return Finding(
        code="not_searched_again",
        severity="info",
        message=(
            f"Not searched in the study: {'; '.join(missing)}. With the learning rate, these "
            "interact most strongly with the batch size."
        ),
        evidence={"missing": missing, "searched": list(study.points)},
        section=SECTION,
        suggestion="Add them to the space if the budget allows.",
    )
