"""The next, longer round of tuning: what to search again, what to keep, and on which schedule."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import numpy as np
import optax

from playbook_optax import _checks, _shown, schedules
from playbook_optax.analysis import boundaries, diagnose
from playbook_optax.analysis.axes import Axis, axis, from_scale, hyperparameters, to_scale
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.analysis.schedule_shape import (
    SECTION,
    longer_schedule_findings,
    schedule_info,
)
from playbook_optax.procedures import controls
from playbook_optax.procedures.clipping import LEARNING_RATE, subdirectory
from playbook_optax.procedures.given import given_or_trained, trains_if_needed
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Categorical, Float, Integer, Parameter, SearchSpace
from playbook_optax.trials.stepper import MakeSchedule
from playbook_optax.trials.workload import with_fixed

GROWTH = 10.0
"""How much longer the trials of the next round are: the first has 10% of production length."""
MOST_ROUNDS = 3
MARGIN = 0.1
"""Room left on either side of the good trials, as a share of the old range on its scale."""
MIN_WIDTH = 0.25
"""A range never gets narrower than this share of the old one, on its scale."""
FEWEST_TRIALS = 4

CONFIDENCES = ("very likely", "likely", "might", "unlikely")
"""How surely a choice made on short runs holds on longer ones."""
KINDS: Mapping[str, tuple[str, str]] = {
    "warmup": ("very likely", "Kept at the best trial's value."),
    "initialization": ("very likely", "Kept at the best trial's value."),
    "architecture": ("likely", "A clear improvement tends to hold: searched near the good trials."),
    "learning_rate": ("might", "The base rate is kept as a centre: searched near the good trials."),
    "optimizer": ("might", "Holds loosely: searched near the good trials."),
    "augmentation": ("might", "Searched near the good trials."),
    "regularization": (
        "might",
        "Searched near the good trials; less sure where the training set is not fitted perfectly.",
    ),
    "unknown": (
        "might",
        "Searched near the good trials; say what it is with kinds= of plan_next_round.",
    ),
    "schedule": (
        "unlikely",
        "Searched over its whole range again; the schedule itself follows the rule of its family.",
    ),
}
"""Kinds of hyperparameters: the confidence that they transfer, and what is done about it."""
NAME_PATTERNS: Mapping[str, str] = {
    "warmup": "*warmup* *warm_up*",
    "initialization": "init init_* initial* *_init *_init_scale",
    "regularization": (
        "*weight_decay* dropout* *_dropout* label_smoothing* l1* l2* *regulariz* stochastic_depth*"
    ),
    "augmentation": "augment* mixup* cutmix* cutout* crop* flip*",
    "learning_rate": "learning_rate base_learning_rate peak_learning_rate lr",
    "optimizer": (
        "b1 b2 b3 beta* eps epsilon *momentum* nesterov decay max_norm percentile clip* optimizer*"
    ),
    "schedule": "*schedule* decay_* *_decay* hold_* end_value power",
    "architecture": (
        "width* depth* num_layers* num_heads* hidden* activation* normaliz* residual* architecture*"
    ),
}
"""Names of hyperparameters by kind, as shell patterns; the first that fits decides. ``decay`` alone
is the averaging constant of `rmsprop`; every other decay but that of weights is a schedule's."""


class TransferRow(NamedTuple):
    """How surely one hyperparameter's value holds on longer runs.

    Attributes:
      name: the hyperparameter.
      kind: what it is, a key of `KINDS`.
      confidence: "very likely", "likely", "might" or "unlikely".
      advice: what the next round does about it.
    """

    name: str
    kind: str
    confidence: str
    advice: str


@_shown.short
class NextRound(NamedTuple):
    """A plan for the next round of tuning.

    Attributes:
      num_steps: updates of each of its trials.
      num_trials: how many trials.
      space: what is searched.
      fixed: values carried over as they are, name to NumPy scalar: the points of the next study do
        not have them; give them to `Trainer.with_fixed`, or see `with_fixed`.
      make_schedule: ``make_schedule(point, num_steps)`` for the longer run, of the new points and
        without `with_fixed`; None where the round before had no schedule.
      transfers: one row per hyperparameter.
    """

    num_steps: int
    num_trials: int
    space: SearchSpace
    fixed: dict[str, Any]
    make_schedule: MakeSchedule | None
    transfers: tuple[TransferRow, ...]

    def with_fixed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the point, such as `make_optimizer`, for points without what is fixed.

        Args:
          function: takes a point first.

        Returns:
          A function that adds the fixed values to the point.
        """
        return with_fixed(function, self.fixed)


@_checks.named_arguments
def round_lengths(
    production_steps: int, num_rounds: int = 2, first_fraction: float = 0.1
) -> list[int]:
    """Lengths of the trials of each round, growing by one factor up to production length.

    Args:
      production_steps: updates of the run that is to be launched.
      num_rounds: 1 to 3; more are seldom worth their analysis.
      first_fraction: length of the first of several rounds as a share of the last, in (0, 1).

    Returns:
      As many rising lengths; fewer where `production_steps` is too small to tell them apart.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> round_lengths(100_000), round_lengths(100_000, num_rounds=3)
      ([10000, 100000], [10000, 31623, 100000])

    Source: playbook, "Deciding how long to train when training is compute-bound".
    """
    production_steps = _checks.check_count("production_steps", production_steps)
    num_rounds = _checks.check_count("num_rounds", num_rounds)
    if num_rounds > MOST_ROUNDS:
        raise ValueError(
            f"num_rounds must be 1 to {MOST_ROUNDS}, got {num_rounds}: one to three rounds are the "
            "most practical."
        )
    _checks.check_number("first_fraction", first_fraction, above=0.0, below=1.0)
    if num_rounds == 1:
        return [production_steps]
    shares = float(first_fraction) ** np.linspace(1.0, 0.0, num_rounds)
    return sorted({max(1, round(share * production_steps)) for share in shares})


@_checks.named_arguments
def transfer_kind(name: str, kinds: Mapping[str, str] | None = None) -> TransferRow:
    """How surely a hyperparameter's value holds on longer runs, by the playbook's table.

    Args:
      name: the hyperparameter. Its kind follows from `NAME_PATTERNS`, or is "unknown".
      kinds: name to kind, where the name does not tell.

    Returns:
      The TransferRow.

    Raises:
      ValueError: `kinds` has an unknown kind.

    Example:
      >>> transfer_kind("warmup_steps").confidence, transfer_kind("weight_decay").kind
      ('very likely', 'regularization')
      >>> transfer_kind("alpha", {"alpha": "schedule"}).confidence
      'unlikely'

    Source: playbook, "Deciding how long to train when training is compute-bound" (Round 1).
    """
    kind = (kinds or {}).get(name)
    if kind is None:
        low = name.lower()
        fitting = (
            kind
            for kind, patterns in NAME_PATTERNS.items()
            if any(fnmatch.fnmatch(low, pattern) for pattern in patterns.split())
        )
        kind = next(fitting, "unknown")
    _checks.check_choice(f"kinds[{name!r}]", kind, KINDS)
    confidence, advice = KINDS[kind]
    return TransferRow(name, kind, confidence, advice)


@trains_if_needed
def plan_next_round(
    trainer: Trainer,
    space_or_study: SearchSpace | Study,
    *,
    key: chex.PRNGKey,
    num_steps: int | None = None,
    growth: float = GROWTH,
    production_steps: int | None = None,
    longer_schedule: MakeSchedule | None = None,
    num_trials: int | None = None,
    num_best: int | None = None,
    min_width: float = MIN_WIDTH,
    kinds: Mapping[str, str] | None = None,
    first_trials: int = 24,
    eval_every: int | None = None,
    num_seeds: int = 1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Plans the next round of longer trials from a finished round.

    Each hyperparameter is treated by how surely it transfers (`transfer_kind`): warm-up and
    initialization are fixed at the best trial's value, those of the schedule keep their whole
    range, and of the others the range is narrowed, on its own scale, to the good trials (best
    tenth, at least three, at most ten) and a tenth of the old range on either side, but never to
    less than `min_width` of it. Where the best trials crowd an edge (`best_near_boundary`), the
    range grows beyond it instead. Choices that are numbers are narrowed to those of the good trials
    and the best other one; other choices stay, because points hold their index.

    The schedule is carried over by `schedules.extend_for_longer_run`: a linear decay keeps its
    length and has the constant part before it extended; a cosine decay keeps its base learning rate
    and is stretched; a warm-up stays. A longer schedule of your own is checked for the common
    pitfall, extra steps at too small a learning rate.

    Args:
      trainer: as in `run_study`, or ``None, None`` with a study; `make_schedule` is the round's.
      space_or_study: the finished round; or a space, of which a first round is run, `growth` times
        shorter than the next.
      key: the only source of randomness.
      num_steps: updates of a trial of the next round; `growth` times those of the finished one, but
        at most `production_steps`, if None.
      growth: how many times longer the next round is, above 1.
      production_steps: updates of the run that is to be launched, if it is known.
      longer_schedule: your own for the next round, instead of the playbook's extension.
      num_trials: trials of the next round; so many that it costs what the finished one did, but
        at least four and no more than that had, if None.
      num_best: how many of the best trials count as good, instead of the default.
      min_width: narrowest new range as a share of the old one, in (0, 1].
      kinds: name to kind (see `KINDS`), for hyperparameters whose name does not tell.
      first_trials: trials of the first round, with a space.
      eval_every: its updates between evaluations; a twentieth of its steps if None.
      num_seeds: its repetitions of each trial.
      directory: where to store it.

    Returns:
      A `Verdict`: `answer` is a `NextRound`, or None where no trial is feasible, the finished round
      has production length already, or its schedule has no rule by which to become longer.

    Raises:
      ValueError: a bad argument; a next round that is not longer; or a space and neither
        `num_steps` nor `production_steps`.

    Example:
      >>> import jax, numpy as np
      >>> import playbook_optax as pbx
      >>> rate = np.geomspace(1e-3, 1.0, 13)
      >>> loss = 1 + np.log10(rate / 0.03) ** 2
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": rate}, {"valid/loss": np.stack([0 * loss + 4, loss], 1)}, [0, 100],
      ...     objective="valid/loss",
      ...     space=pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")}))
      >>> verdict = pbx.procedures.plan_next_round(
      ...     None, None, study, key=jax.random.key(0), production_steps=400,
      ...     make_schedule=lambda point, n: pbx.schedules.linear_decay(point["learning_rate"], n))
      >>> plan = verdict.answer
      >>> plan.num_steps, plan.num_trials, plan.space["learning_rate"]
      (400, 4, Float(low=0.0089, high=0.11, scale='log'))
      >>> schedule = plan.make_schedule({"learning_rate": 0.5}, 400)
      >>> [float(schedule(count)) for count in (0, 300, 350, 400)]
      [0.5, 0.5, 0.25, 0.0]

    Source: playbook, "Deciding how long to train when training is compute-bound" (Round 1 and
    Round 2).
    """
    _checks.check_number("growth", growth, above=1.0, fix="10 is the playbook's.")
    _checks.check_number("min_width", min_width, above=0.0, at_most=1.0)
    for name, count in (
        ("num_steps", num_steps),
        ("production_steps", production_steps),
        ("num_trials", num_trials),
        ("num_best", num_best),
    ):
        if count is not None:
            _checks.check_count(name, count)
    if isinstance(space_or_study, Study):
        study, cost = space_or_study, 0
    else:
        target = num_steps if num_steps is not None else production_steps
        if target is None:
            raise ValueError(
                "num_steps or production_steps must be given with a space: the first round is "
                f"growth = {growth:g} times shorter."
            )
        first_steps = max(1, round(target / growth))
        first_trials = _checks.check_count("first_trials", first_trials)
        study, cost = given_or_trained(
            trainer,
            space_or_study,
            num_trials=first_trials,
            num_steps=first_steps,
            eval_every=eval_every,
            key=key,
            num_seeds=num_seeds,
            directory=subdirectory(directory, "round"),
        )
    studies = {"round": study}
    for name in kinds or {}:
        if name not in study.points:
            raise ValueError(
                f"kinds has {name!r}, which is no hyperparameter of the round: "
                f"{_checks.nearest(name, study.points)}"
            )

    def refuse(*findings: Finding) -> Verdict:
        return Verdict(None, tuple(by_severity(findings)), studies, cost)

    out = outcomes(study)
    if out.best < 0:
        return refuse(*diagnose.diagnose(study))
    present = int(study.data["step"].values.max())
    if production_steps is not None and present >= production_steps and num_steps is None:
        return refuse(_last_round(present, production_steps))
    wanted = num_steps
    if wanted is None:
        wanted = max(present + 1, round(present * growth))
        wanted = wanted if production_steps is None else min(wanted, production_steps)
    if wanted <= present:
        raise ValueError(
            f"num_steps = {wanted} must be > {present}, the steps of the finished round: the next "
            "one is longer."
        )
    if num_trials is None:
        same_cost = math.ceil(out.num_trials * present / wanted)
        num_trials = min(out.num_trials, max(FEWEST_TRIALS, same_cost))

    good = out.good() if num_best is None else out.order[:num_best]
    edges = boundaries.boundary_info(study)
    edge_findings = boundaries.boundary_findings(edges)
    crowded = {
        finding.evidence["name"]
        for finding in edge_findings
        if finding.code == "best_near_boundary"
    }
    wider = {row.name: row for row in edges.rows if row.name in crowded and row.proposal}
    transfers, space, fixed = [], {}, {}
    for name in hyperparameters(study):
        row = transfer_kind(name, kinds)
        transfers.append(row)
        if row.confidence == "very likely":
            fixed[name] = study.point(out.best)[name]
            continue
        parameter = declared_parameter(study, name)
        if parameter is None:
            fixed[name] = study.point(out.best)[name]
        elif row.kind == "schedule":
            space[name] = wider[name].proposal if name in wider else parameter
        else:
            space[name] = _narrowed(
                axis(study, name), parameter, out, good, min_width, wider.get(name)
            )
    if not space:
        # A study searches something: with nothing else to search even a sure choice is.
        spare = [(name, declared_parameter(study, name)) for name in fixed]
        spare = [(name, parameter) for name, parameter in spare if parameter is not None]
        if not spare:
            return refuse(_nothing_to_search(fixed))
        name, parameter = spare[0]
        assert parameter is not None
        del fixed[name]
        space[name] = _narrowed(axis(study, name), parameter, out, good, min_width, wider.get(name))

    schedule, schedule_findings = _carried(
        trainer.make_schedule,
        longer_schedule,
        fixed,
        {**trainer.fixed, **study.point(out.best)},
        present,
        wanted,
        # A controlled trainer carries the schedule itself, and whoever made it extends it.
        controls.controls_of(trainer) is not None,
    )
    if any(finding.code == "schedule_has_no_rule" for finding in schedule_findings):
        return refuse(*schedule_findings)
    plan = NextRound(wanted, num_trials, SearchSpace(space), fixed, schedule, tuple(transfers))
    findings = [*schedule_findings, *edge_findings, _planned(plan, study, good, present)]
    return Verdict(plan, tuple(by_severity(findings)), studies, cost)


def declared_parameter(study: Study, name: str) -> Parameter | None:
    """What could be searched of a hyperparameter of a study.

    Args:
      study: the study.
      name: the hyperparameter.

    Returns:
      The parameter of the search space; without one, a range that covers the trials; None if it is
      constant there, or not a number.
    """
    if study.space is not None and name in study.space:
        return study.space[name]
    line = axis(study, name)
    raw = study.points[name]
    if line.kind == "categorical":
        # Labels of another tool's table: no study of ours can search them.
        return None
    if not line.high > line.low:
        return None
    if raw.dtype.kind in "iu":
        scale = line.scale if line.low >= 1 and line.scale == "log" else "linear"
        return Integer(int(line.low), int(line.high), scale=scale)
    return Float(line.low, line.high, scale=line.scale)


def _narrowed(
    line: Axis,
    parameter: Parameter,
    out: Outcomes,
    good: np.ndarray,
    min_width: float,
    wider: boundaries.BoundaryRow | None,
) -> Parameter:
    """The range around the good trials, moved outwards where they crowd an edge."""
    if isinstance(parameter, Categorical):
        return _fewer_choices(line, parameter, out, good)
    unit = line.unit[good]
    low, high = float(unit.min()) - MARGIN, float(unit.max()) + MARGIN
    if high - low < min_width:
        middle = (low + high) / 2
        low, high = middle - min_width / 2, middle + min_width / 2
    # An interval that sticks out is moved inside, so that it keeps its width.
    low, high = low - max(high - 1, 0.0), high - min(low, 0.0)
    low, high = max(low, 0.0), min(high, 1.0)
    ends = to_scale([line.start, float(parameter.high)], line.scale)
    new_low, new_high = (
        float(from_scale(ends[0] + at * (ends[1] - ends[0]), line.scale)) for at in (low, high)
    )
    slack = MARGIN / 4 * float(ends[1] - ends[0])
    new_low = parameter.low if low <= 0 else _rounded(new_low, line.scale, slack)
    new_high = parameter.high if high >= 1 else _rounded(new_high, line.scale, slack)
    changes: dict[str, Any] = {}
    if isinstance(parameter, Integer):
        if parameter.include_zero and new_low > parameter.low:
            changes["include_zero"] = False
        new_low, new_high = math.floor(new_low), math.ceil(new_high)
    # Rounding must not leave the old range.
    new_low, new_high = max(new_low, parameter.low), min(new_high, parameter.high)
    if wider is not None and wider.edge == "low":
        new_low = wider.proposal.low
        changes.pop("include_zero", None)
    if wider is not None and wider.edge == "high":
        new_high = wider.proposal.high
    if not new_low < new_high:
        return parameter
    changes |= {"low": new_low, "high": new_high}
    return dataclasses.replace(parameter, **changes)


def _rounded(value: float, scale: str, slack: float) -> float:
    """The value with few digits (of 1 - x on a reverse scale), moved by at most `slack`."""
    for digits in range(2, 8):
        if scale == "reverse_log":
            gap = float(f"{1 - value:.{digits - 1}e}")
            short = float(f"{1 - gap:.12g}")
        else:
            short = float(f"{value:.{digits - 1}e}")
        if abs(float(to_scale(short, scale) - to_scale(value, scale))) <= slack:
            return short
    return value


def _fewer_choices(
    line: Axis, parameter: Categorical, out: Outcomes, good: np.ndarray
) -> Categorical:
    """The choices of the good trials and the best other one; all of them if they are not numbers.

    Points hold numbers themselves, but of anything else the index, whose meaning may not change.
    """
    if not parameter.numeric:
        return parameter
    ranked = dict.fromkeys(int(line.values[t]) for t in (*good, *out.order))
    num_good = len({int(line.values[t]) for t in good})
    kept = sorted(list(ranked)[: num_good + 1])
    values = [parameter.values[i] for i in kept]
    if any(isinstance(v, float) for v in parameter.values):
        values = [float(v) for v in values]  # their dtype must not change
    return Categorical(values)


def _carried(
    make_schedule: MakeSchedule | None,
    longer_schedule: MakeSchedule | None,
    fixed: Mapping[str, Any],
    best: Mapping[str, Any],
    present: int,
    wanted: int,
    extended_elsewhere: bool,
) -> tuple[MakeSchedule | None, list[Finding]]:
    """The schedule of the longer run and what is to be said about it."""
    if make_schedule is None and longer_schedule is None:
        return None, [] if extended_elsewhere else [_no_schedule()]

    def old(point: Any) -> Any:
        assert make_schedule is not None
        return make_schedule({**fixed, **point}, present)

    def extended(point: Any, num_steps: int) -> optax.Schedule:
        return schedules.extend_for_longer_run(old(point), num_steps - present)

    def own(point: Any, num_steps: int) -> optax.Schedule:
        assert longer_schedule is not None
        return longer_schedule({**fixed, **point}, num_steps)

    longer: MakeSchedule = extended
    if longer_schedule is not None:
        longer = own
    else:
        short = old(best)
        if not isinstance(short, schedules.Schedule) or short.lengthen is None:
            return None, [_no_rule(short)]
    if make_schedule is None:
        return longer, []
    found = longer_schedule_findings(old(best), present, longer(best, wanted), wanted)
    if schedule_info(longer(best, wanted), wanted).mean_share > 0.999:
        found.append(_constant(best))
    return longer, found


def _planned(plan: NextRound, study: Study, good: np.ndarray, present: int) -> Finding:
    kept = ", ".join(f"{name} = {value:.4g}" for name, value in plan.fixed.items())
    return Finding(
        code="next_round",
        severity="info",
        message=(
            f"The next round: {plan.num_trials} trials of {plan.num_steps} steps after "
            f"{study.num_trials} of {present}, over {', '.join(plan.space)}, around the best "
            f"{len(good)} trials" + (f"; {kept} kept." if kept else ".")
        ),
        evidence={
            "num_steps": plan.num_steps,
            "num_trials": plan.num_trials,
            "present_steps": present,
            "good_trials": good.tolist(),
            "space": plan.space.to_dict(),
            "fixed": {name: np.asarray(value).item() for name, value in plan.fixed.items()},
            "transfers": [list(row) for row in plan.transfers],
        },
        section=SECTION,
        suggestion="Check on the longer runs what the shorter ones decided.",
    )


def _last_round(present: int, production_steps: int) -> Finding:
    return Finding(
        code="last_round",
        severity="info",
        message=(
            f"The round has {present} steps already, the production length of {production_steps} "
            "or more: there is no longer round to plan."
        ),
        evidence={"num_steps": present, "production_steps": production_steps},
        section=SECTION,
        suggestion="Launch its best trial, or retrain it with several seeds first.",
    )


def _nothing_to_search(fixed: Mapping[str, Any]) -> Finding:
    return Finding(
        code="nothing_to_search",
        severity="warning",
        message=(
            f"None of the round's hyperparameters, {', '.join(fixed)}, has a range that could be "
            "searched again."
        ),
        evidence={"names": list(fixed)},
        section=SECTION,
        suggestion="Run the best trial for longer, or give the study its search space.",
    )


def _no_schedule() -> Finding:
    return Finding(
        code="no_schedule_to_carry",
        severity="info",
        message=(
            "No make_schedule was given, so no schedule is carried over to the longer round; a "
            "schedule inside make_optimizer stays as it is, also where it has reached its end."
        ),
        evidence={},
        section=SECTION,
        suggestion=(
            "Give the round's make_schedule. A linear or a cosine decay is the default; some "
            "schedule that is not constant should always be used."
        ),
    )


def _constant(point: Mapping[str, Any]) -> Finding:
    rate = point.get(LEARNING_RATE)
    return Finding(
        code="constant_schedule",
        severity="info",
        message="The learning rate of the next round is constant after its warm-up.",
        evidence={} if rate is None else {LEARNING_RATE: float(rate)},
        section="What is the best learning rate decay schedule family?",
        suggestion="Use some schedule that is not constant: a linear or a cosine decay.",
    )


def _no_rule(schedule: Any) -> Finding:
    return Finding(
        code="schedule_has_no_rule",
        severity="warning",
        message=(
            "How the schedule changes is the biggest question from one round to the next, and for "
            f"this one the playbook has no rule: {type(schedule).__name__} is not a constant, "
            "linear, polynomial or cosine decay of pbx.schedules."
        ),
        evidence={"type": type(schedule).__name__},
        section=SECTION,
        suggestion=(
            "Give longer_schedule=, your own for the longer run, which is checked for extra steps "
            "at too small a learning rate; or use schedules.linear_decay or cosine_decay."
        ),
    )
