"""Warm-up, clipping and decay as numbers, so that all studies of one optimizer share a program.

A controlled trainer chains a clipper before the user's optimizer and a warm-up before its schedule.
No warm-up is one of 0 steps, no clipping a threshold that no norm reaches, and a constant rate a
schedule whose decay is switched off.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks, norms, schedules
from playbook_optax.analysis.norms import NO_CLIPPING
from playbook_optax.runner.trainer import Trainer
from playbook_optax.trials.stepper import MakeOptimizer, MakeSchedule
from playbook_optax.trials.workload import Workload

LEARNING_RATE = "learning_rate"
# What programs call the controls: no hyperparameter of the user's is called so.
_PREFIX = "control/"
WARMUP_STEPS = f"{_PREFIX}warmup_steps"
MAX_NORM = f"{_PREFIX}max_norm"
CLIP_STEPS = f"{_PREFIX}clip_steps"
PERCENTILE = f"{_PREFIX}percentile"
DECAYS = f"{_PREFIX}decays"
EXTENDED_FROM = f"{_PREFIX}extended_from"
NAMES = {"warmup_steps": WARMUP_STEPS, "max_norm": MAX_NORM, "clip_steps": CLIP_STEPS}
"""What studies call those that they vary, and what programs call them."""

ALWAYS = _checks.MAX_STEPS
CONSTANT, DECAYING = {DECAYS: np.int32(0)}, {DECAYS: np.int32(1)}


def warmed_and_clipped(warmup_steps: int, max_norm: float | None) -> dict[str, Any]:
    """The controls of a warm-up and a clip threshold, or of none.

    Args:
      warmup_steps: length of the warm-up, which comes out of the run's.
      max_norm: the threshold, or None.

    Returns:
      Fixed hyperparameters for `Trainer.with_fixed`.
    """
    threshold = NO_CLIPPING if max_norm is None else max_norm
    return {WARMUP_STEPS: np.int32(warmup_steps), MAX_NORM: np.float32(threshold)}


@dataclasses.dataclass(frozen=True)
class _Controls:
    """The user's functions behind the controls.

    Attributes:
      make_optimizer: the user's.
      make_schedule: the user's, or None for a linear decay.
      workload: the user's.
      extends: whether the schedule is one that the playbook knows how to extend.
      lengths: lengths of warm-up, for a schedule that needs the number of steps itself; None where
        it takes a traced one.
      adaptive_from: steps before a percentile is clipped at; None clips at a fixed threshold.
      has_rate: whether the learning rate is a hyperparameter, which then follows a schedule.
    """

    make_optimizer: MakeOptimizer
    make_schedule: MakeSchedule | None
    workload: Any
    extends: bool
    lengths: tuple[int, ...] | None
    adaptive_from: int | None
    has_rate: bool

    def optimizer(self, point: Any) -> optax.GradientTransformation:
        """The clipper and the user's transformation."""
        if self.adaptive_from is None:
            clipper = norms.clip_until(point[MAX_NORM], point[CLIP_STEPS])
        else:
            clipper = norms.clip_by_percentile(point[PERCENTILE], min_steps=self.adaptive_from)
        return optax.chain(clipper, self.make_optimizer(_users(point)))

    def schedule(self, point: Any, num_steps: Any) -> Any:
        """The schedule of a run of so many steps, warm-up included."""
        length, lengths = point[WARMUP_STEPS], self.lengths
        if lengths is None or not isinstance(num_steps, int):
            return schedules.prepend_warmup(self._made(point, num_steps - length), length)
        of_length = [
            schedules.prepend_warmup(self._made(point, num_steps - known), known)
            for known in lengths
        ]

        def chosen(count: chex.Numeric) -> chex.Array:
            values = [one(count) for one in of_length]
            value = values[0]
            for known, other in zip(lengths[1:], values[1:], strict=True):
                value = jnp.where(length == known, other, value)
            return value

        return chosen

    def _made(self, point: Any, steps: Any) -> Callable[[chex.Numeric], chex.Array]:
        """The schedule after the warm-up, of a run with so many steps after it."""
        own = _users(point)
        rate = own[LEARNING_RATE]
        if self.make_schedule is None:
            decaying: Any = schedules.linear_decay(rate, steps)
        elif self.extends:
            since = jnp.asarray(point[EXTENDED_FROM], jnp.int32)
            made_for = jnp.where(since > 0, jnp.minimum(steps, since), steps)
            decaying = schedules.extend_for_longer_run(
                self.make_schedule(own, made_for), steps - made_for
            )
        else:
            decaying = self.make_schedule(own, steps)
        return lambda count: jnp.where(
            point[DECAYS] > 0, decaying(count), jnp.asarray(rate, jnp.float32)
        )


def controlled(
    trainer: Trainer,
    point: Mapping[str, Any] | None = None,
    lengths: tuple[int, ...] = (0,),
    has_rate: bool = True,
) -> Trainer:
    """A trainer whose warm-up, clipping and decay are numbers; itself if they are already.

    Args:
      trainer: the user's.
      point: hyperparameters, to see what the user's schedule is like.
      lengths: all lengths of warm-up that will be asked for, which a schedule that needs the number
        of steps itself must know beforehand.
      has_rate: whether the learning rate is among the hyperparameters.

    Returns:
      A trainer with no warm-up and no clipping. Its rate is constant if the user gave no schedule.
    """
    if controls_of(trainer) is not None:
        return trainer
    make_schedule = trainer.make_schedule
    needs_number = make_schedule is not None and not _traces(make_schedule, point)
    extends = make_schedule is not None and not needs_number and _extends(make_schedule, point)
    controls = _Controls(
        trainer.make_optimizer,
        make_schedule,
        trainer.workload,
        extends,
        tuple(lengths) if needs_number else None,
        None,
        has_rate,
    )
    off = {
        **warmed_and_clipped(0, None),
        CLIP_STEPS: np.int32(ALWAYS),
        **(CONSTANT if make_schedule is None else DECAYING),
    }
    if extends:
        off[EXTENDED_FROM] = np.int32(0)
    return _with_controls(trainer, controls).with_fixed(off)


def controls_of(trainer: Trainer) -> Any:
    """The controls of a controlled trainer, or None."""
    make = trainer.make_optimizer
    owner = make.__self__ if isinstance(make, types.MethodType) else None
    return owner if isinstance(owner, _Controls) else None


def variant(
    trainer: Trainer,
    *,
    make_optimizer: MakeOptimizer | None = None,
    workload: Any = None,
    adaptive_from: int | None = None,
) -> Trainer:
    """A controlled trainer of another optimizer or workload, or that clips at a percentile.

    Args:
      trainer: a controlled trainer.
      make_optimizer: another of the user's, or None.
      workload: another of the user's, or None.
      adaptive_from: steps before the clipper clips at a percentile.

    Returns:
      The trainer.
    """
    changes = {"make_optimizer": make_optimizer, "workload": workload}
    given = {name: value for name, value in changes.items() if value is not None}
    controls = dataclasses.replace(controls_of(trainer), adaptive_from=adaptive_from, **given)
    changed = _with_controls(trainer, controls)
    if adaptive_from is None:
        return changed
    gone = (MAX_NORM, CLIP_STEPS)
    return changed.replace(fixed={n: v for n, v in trainer.fixed.items() if n not in gone})


def extends(trainer: Trainer) -> bool:
    """Whether a controlled trainer's schedule is one that the playbook knows how to extend."""
    return bool(controls_of(trainer).extends)


def users_workload(trainer: Trainer) -> Any:
    """The workload as the user gave it."""
    controls = controls_of(trainer)
    return trainer.workload if controls is None else controls.workload


def _with_controls(trainer: Trainer, controls: _Controls) -> Trainer:
    work = controls.workload
    return trainer.replace(
        make_optimizer=controls.optimizer,
        make_schedule=controls.schedule if controls.has_rate else None,
        workload=work if isinstance(work, Workload) else functools.partial(_of_users, work),
    )


def _of_users(function: Callable[..., Any], point: Any, *rest: Any) -> Any:
    return function(_users(point), *rest)


def _users(point: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that the user knows."""
    return {name: value for name, value in point.items() if not name.startswith(_PREFIX)}


def _like(point: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: np.float32(1.0) for name in (LEARNING_RATE, *(point or {}))} | {
        name: np.asarray(value, np.int32 if np.asarray(value).dtype.kind in "iu" else np.float32)
        for name, value in (point or {}).items()
    }


def _traces(make_schedule: MakeSchedule, point: Mapping[str, Any] | None) -> bool:
    """Whether a schedule can be made for a number of steps that is data."""

    def value(point: Any, num_steps: chex.Array) -> Any:
        return make_schedule(point, num_steps)(jnp.int32(0))

    try:
        jax.eval_shape(value, _like(point), jnp.int32(8))
    except Exception:
        return False
    return True


def _extends(make_schedule: MakeSchedule, point: Mapping[str, Any] | None) -> bool:
    """Whether the playbook has a rule for longer runs with such a schedule."""

    def value(point: Any, num_steps: chex.Array) -> Any:
        made = make_schedule(point, num_steps)
        return schedules.extend_for_longer_run(made, jnp.int32(1))(jnp.int32(0))

    try:
        jax.eval_shape(value, _like(point), jnp.int32(8))
    except Exception:
        return False
    return True
