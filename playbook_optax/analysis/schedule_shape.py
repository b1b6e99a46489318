"""How long a schedule stays high, and whether a longer run wastes its extra steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks, schedules
from playbook_optax.analysis.findings import Finding

SECTION = "Deciding how long to train when training is compute-bound"
SMALL = 0.2
"""A learning rate below this share of the peak is small."""
MAX_EXCESS = 0.05
"""Share of the extra steps that may be small beyond what the playbook's rule makes small."""
MAX_POINTS = 100_000
"""Counts at which a schedule is evaluated; a longer one is sampled evenly."""


class ScheduleInfo(NamedTuple):
    """The shape of a schedule over a run.

    Attributes:
      num_steps: length of the run.
      peak: largest learning rate.
      peak_step: first step that has it.
      last: learning rate of the last step.
      mean_share: mean learning rate from the peak on, as a share of the peak; 0 if the peak is 0.
      num_small: steps after the peak with a learning rate below `small` times the peak, so that the
        beginning of a warm-up does not count. Of a run of more than 100,000 steps an estimate from
        as many, evenly spaced.
      small_share: num_small as a share of the run.
      small: the share of the peak below which a rate is small.
    """

    num_steps: int
    peak: float
    peak_step: int
    last: float
    mean_share: float
    num_small: int
    small_share: float
    small: float


@_checks.named_arguments
def schedule_info(
    schedule: Callable[[Any], Any], num_steps: int, small: float = SMALL
) -> ScheduleInfo:
    """Measures how much of a run has a small learning rate.

    Args:
      schedule: ``count -> value``, any function that JAX can trace.
      num_steps: length of the run; the counts are 0 to num_steps − 1.
      small: share of the peak below which a rate is small, in (0, 1).

    Returns:
      The ScheduleInfo.

    Raises:
      ValueError: `num_steps` or `small` is out of range, or a value of the schedule is negative or
        not finite.

    Example:
      >>> from playbook_optax import schedules
      >>> from playbook_optax.analysis.schedule_shape import schedule_info
      >>> info = schedule_info(schedules.linear_decay(0.5, decay_steps=64), 64)
      >>> info.peak, info.num_small, round(info.mean_share, 3)
      (0.5, 12, 0.508)

    Source: "Deciding how long to train when training is compute-bound" (Round 2).
    """
    if not callable(schedule):
        raise _checks.ArgumentTypeError(
            f"schedule must be a function count -> value, got {schedule!r}. For a number use "
            "schedules.constant."
        )
    num_steps = _checks.check_count("num_steps", num_steps)
    _checks.check_number("small", small, above=0.0, below=1.0)
    counts = np.arange(num_steps)
    if num_steps > MAX_POINTS:
        counts = np.round(np.linspace(0, num_steps - 1, MAX_POINTS)).astype(np.int64)

    def at(count: Any) -> Any:
        return jnp.asarray(schedule(count)).reshape(())

    values = np.asarray(jax.vmap(at)(jnp.asarray(counts, jnp.int32)), np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        raise ValueError(
            f"schedule({counts[bad.argmax()]}) is {values[bad.argmax()]}: a learning rate must be "
            "finite and >= 0."
        )
    first = int(values.argmax())
    peak, after = float(values[first]), values[first:]
    share = float(np.mean(after < small * peak)) * len(after) / len(values)
    return ScheduleInfo(
        num_steps=num_steps,
        peak=peak,
        peak_step=int(counts[first]),
        last=float(values[-1]),
        mean_share=float(after.mean() / peak) if peak else 0.0,
        num_small=round(share * num_steps),
        small_share=share,
        small=float(small),
    )


@_checks.named_arguments
def longer_schedule_findings(
    schedule: Callable[[Any], Any],
    num_steps: int,
    longer_schedule: Callable[[Any], Any],
    longer_num_steps: int,
    *,
    small: float = SMALL,
    max_excess: float = MAX_EXCESS,
) -> list[Finding]:
    """Detects the pitfall of longer rounds: extra steps spent at too small a learning rate.

    The steps of the longer run whose rate is below `small` times the peak are compared with those
    that the playbook's rule for the family leaves (`schedules.extend_for_longer_run`: a linear
    decay keeps its length, a cosine decay is stretched). Where there is no rule, as for an inverse
    square root or a function of the user's own, as large a share of the run may be small as before.
    It is a warning if more than `max_excess` of the extra steps are small beyond that. A warm-up
    does not count.

    Args:
      schedule: that of the shorter run, ``count -> value``.
      num_steps: length of the shorter run.
      longer_schedule: that of the longer run.
      longer_num_steps: length of the longer run.
      small: share of the peak below which a rate is small, in (0, 1).
      max_excess: share of the extra steps that may be small beyond the rule.

    Returns:
      One Finding ``too_small_learning_rate``, or none.

    Raises:
      ValueError: as `schedule_info`, or the second run is not longer.

    Example:
      >>> from playbook_optax import schedules
      >>> from playbook_optax.analysis.schedule_shape import longer_schedule_findings
      >>> short = schedules.linear_decay(1.0, decay_steps=100)
      >>> right = schedules.linear_decay(1.0, decay_steps=100, hold_steps=900)
      >>> stretched = schedules.linear_decay(1.0, decay_steps=1000)
      >>> [len(longer_schedule_findings(short, 100, long, 1000)) for long in (right, stretched)]
      [0, 1]

    Source: "Deciding how long to train when training is compute-bound" (rounds: the common pitfall
    of using all the extra training steps with too small of a learning rate).
    """
    before = schedule_info(schedule, num_steps, small)
    after = schedule_info(longer_schedule, longer_num_steps, small)
    extra = after.num_steps - before.num_steps
    if extra <= 0:
        raise ValueError(
            f"longer_num_steps must be > num_steps = {before.num_steps}, got {after.num_steps}."
        )
    has_rule = isinstance(schedule, schedules.Schedule) and schedule.lengthen is not None
    if has_rule:
        reference = schedules.extend_for_longer_run(schedule, extra)
        allowed = schedule_info(reference, longer_num_steps, small).num_small
        rule = "the playbook's rule for this family leaves"
    else:
        allowed = round(before.small_share * after.num_steps)
        rule = "the same share as in the shorter run would be"
    excess = after.num_small - allowed
    if excess <= max_excess * extra:
        return []
    return [
        Finding(
            code="too_small_learning_rate",
            severity="warning",
            message=(
                f"Of the {after.num_steps} steps of the longer run {after.num_small} have a "
                f"learning rate below {small:.0%} of its peak; {rule} {allowed}. So {excess} of "
                f"the {extra} extra steps ({excess / extra:.0%}) are spent at too small a learning "
                "rate."
            ),
            evidence={
                "num_steps": before.num_steps,
                "longer_num_steps": after.num_steps,
                "num_small_before": before.num_small,
                "num_small": after.num_small,
                "num_small_allowed": allowed,
                "excess_share": excess / extra,
                "mean_share_before": before.mean_share,
                "mean_share": after.mean_share,
                "small": float(small),
                "by_rule": has_rule,
            },
            section=SECTION,
            suggestion=(
                "Use the extra steps for the high learning rate: schedules.extend_for_longer_run "
                "keeps the length of a linear decay and stretches a cosine decay."
            ),
        )
    ]
