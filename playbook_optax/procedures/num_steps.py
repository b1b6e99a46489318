"""How many steps to train: a first candidate, and whether a study's length was right."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks, _tree
from playbook_optax._direction import direction
from playbook_optax.analysis.boundaries import boundary_findings, boundary_info
from playbook_optax.analysis.curves import BOUND_SECTION, SECTION, curve_findings
from playbook_optax.analysis.feasibility import feasibility_findings, feasibility_info
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import Outcomes, metric_names, outcomes
from playbook_optax.analysis.targets import StepsToTarget, steps_to_target
from playbook_optax.analysis.training_length import (
    BestStepInfo,
    TrainingLengthInfo,
    best_step_info,
    checkpoint_findings,
    checkpoint_info,
    compare_lengths,
    length_findings,
    training_length_findings,
    training_length_info,
)
from playbook_optax.procedures import clipping
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.procedures.given import (
    at_constant_rates,
    given_or_trained,
    trains_if_needed,
)
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Float, SearchSpace
from playbook_optax.trials.keys import check_key
from playbook_optax.trials.stepper import STEP_LOSS
from playbook_optax.trials.workload import Workload, resolve

PICK_SECTION = (
    "Algorithm for picking an initial candidate for max_train_steps using a learning rate sweep"
)
PERFECT = {"error_rate": 0.0, "error": 0.0, "accuracy": 1.0}
"""What a metric of the training set shows when it is fitted perfectly, by the last part of its
name; the losses have no such value."""
COARSE = 0.1
"""Largest part of an answer that the distance between evaluations may be."""
REGULARIZERS = ("weight_decay", "dropout", "label_smoothing", "l1", "l2", "mixup", "augment")
"""Parts of the names of hyperparameters that must be 0 in a sweep for a perfect fit."""
ROOM = 5
"""A run that settled early is cut to so many times the step at which it settled."""


class _Fit(NamedTuple):
    """What a perfect fit is: the metric, its value, and whether it rises to it."""

    metric: str
    value: float
    maximize: bool


@trains_if_needed
def pick_num_steps(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    num_trials: int = 12,
    eval_every: int | None = None,
    fit_metric: str | None = None,
    fit_value: float | None = None,
    maximize: bool | None = None,
    max_doublings: int = 0,
    num_seeds: int = 1,
    point: Mapping[str, Any] | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Picks a first candidate for max_train_steps: what the fastest trial needs to fit perfectly.

    In the playbook's order: learning rates on a grid, each constant over `num_steps`; the steps in
    which the fastest of these trials first fits the training set perfectly are the answer. The
    workload must be one without data augmentation and without regularization, which cannot all be
    seen from here: what can be, hyperparameters such as ``weight_decay`` above 0 and a loss that
    uses its random key, becomes a Finding. Where `train/error_rate` is evaluated on some of the
    training examples only, the fit is perfect on these.

    It does not conclude where the fastest learning rate, or one as fast, is at an end of the sweep:
    a better one may lie beyond it, and then the answer would be too long. Of a given study the
    ends are the smallest and the largest rate that was tried. Nor is a longer sweep tried where
    none fits and the rate that comes nearest is at an end.

    Args:
      trainer: as in `run_study`, or ``None, None`` with a study. If it has a `make_schedule`,
        constant schedules take its place.
      space_or_study: a space with the one dimension ``learning_rate`` (1e-5 to 10 on a log scale
        if None), or a finished study at constant learning rates to judge instead of a new sweep.
      key: the only source of randomness.
      num_steps: updates of each trial, the playbook's N: enough for a perfect fit by some of them.
      num_trials: learning rates in the sweep.
      eval_every: updates between evaluations; a fiftieth of `num_steps` if None. The answer is no
        finer than that.
      fit_metric: a metric of the training set in which a perfect fit can be seen;
        ``train/error_rate``, or else ``train/accuracy``, if None.
      fit_value: its value at a perfect fit: 0 for an error rate and 1 for an accuracy if None.
      maximize: whether the metric rises to that value; by its name if None.
      max_doublings: how often to double `num_steps` and sweep again where no trial fits.
      num_seeds: repetitions of each trial; all of them must fit.
      point: further hyperparameters, name to number.
      directory: where to store the studies, each in a folder of its own name.

    Returns:
      A `Verdict`: `answer` is a number of steps, int, to begin with; or None where no trial fits
      perfectly (then `num_steps` must grow), the fastest learning rate is at an end of the sweep,
      or there is no metric in which a perfect fit can be seen, which costs nothing. The studies
      are named ``sweep_<num_steps>``, or ``given``.

    Raises:
      ValueError: a bad argument, as `run_study`; a space with anything but ``learning_rate``; a
        study without it, or without `fit_metric`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: (0.5 * (p["w"] ** 2).sum(), (s, {})),
      ...     batch=lambda d, k, i: (), objective="train/error_rate",
      ...     evaluate=lambda p, s, d: {"train/error_rate": jnp.mean(abs(p["w"]) > 0.01)})
      >>> space = pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 9.0, scale="log")})
      >>> verdict = pbx.procedures.pick_num_steps(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), space,
      ...     key=jax.random.key(0), num_steps=50, eval_every=1, num_trials=5)
      >>> verdict.answer, verdict.cost  # At the rate 1.64: 0.64 ** 11 < 0.01.
      (11, 250)

    Source: playbook, "Algorithm for picking an initial candidate for max_train_steps using a
    learning rate sweep".
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    num_trials = _checks.check_count("num_trials", num_trials, at_least=3, fix=_THREE)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    max_doublings = _checks.check_count("max_doublings", max_doublings, at_least=0)
    _checks.check_steps("num_steps * 2**max_doublings", num_steps * 2**max_doublings)
    if eval_every is not None:
        eval_every = _checks.check_count("eval_every", eval_every)
    if fit_value is not None:
        _checks.check_number("fit_value", fit_value)
    fixed = clipping.check_point(point, (LEARNING_RATE,))
    if isinstance(space_or_study, Study):
        study = space_or_study
        if LEARNING_RATE not in study.points:
            raise ValueError(
                f"the study has no hyperparameter {LEARNING_RATE!r}: "
                f"{_checks.nearest(LEARNING_RATE, study.points)}"
            )
        known = metric_names(study)
        fit = _perfect_fit(known, fit_metric, fit_value, maximize)
        if fit is None:
            return Verdict(None, (_unseen(known, fit_metric),), {"given": study}, 0)
        answer, _, findings = _judge_fit(study, fit)
        return Verdict(answer, tuple(by_severity(findings)), {"given": study}, 0)

    space = space_or_study or SearchSpace({LEARNING_RATE: Float(1e-5, 10.0, scale="log")})
    rates = clipping.learning_rate_grid(space, num_trials)
    table = clipping.points_table(fixed, {LEARNING_RATE: rates})
    studies: dict[str, Study] = {}
    cost = 0
    for doubling in range(max_doublings + 1):
        steps = num_steps * 2**doubling
        runner = StudyRunner(
            at_constant_rates(trainer),
            table,
            num_steps=steps,
            eval_every=max(1, steps // 50) if eval_every is None else eval_every,
            key=key,
            num_seeds=num_seeds,
        )
        known = list(runner.metric_names)  # Traced, so that a refusal costs no training.
        fit = _perfect_fit(known, fit_metric, fit_value, maximize)
        if fit is None:
            return Verdict(None, (_unseen(known, fit_metric),), {}, 0)
        name = f"sweep_{steps}"
        study = runner.run(table, directory=clipping.subdirectory(directory, name))
        study = dataclasses.replace(study, spec={**study.spec, "space": space.to_dict()})
        studies[name] = study
        cost += num_trials * num_seeds * steps
        answer, longer, findings = _judge_fit(study, fit)
        if not longer:
            break
    first = {name: values[0] for name, values in table.items()}
    work = resolve(trainer.workload, {**trainer.fixed, **first})
    noisy = [_random_loss(work)] if _uses_key(work) else []
    return Verdict(answer, tuple(by_severity(noisy + findings)), studies, cost)


_THREE = "The best learning rate must have a neighbour on either side."


def _perfect_fit(
    known: list[str], metric: str | None, value: float | None, maximize: bool | None
) -> _Fit | None:
    """What a perfect fit is, or None where that cannot be said."""
    if metric is None:
        found = [name for name in ("train/error_rate", "train/accuracy") if name in known]
        if not found:
            return None
        metric = found[0]
    elif metric not in known:
        raise ValueError(
            f"fit_metric = {metric!r} was not recorded: {_checks.nearest(metric, known)}"
        )
    last = metric.rpartition("/")[2].lower()
    if value is None:
        if last not in PERFECT:
            return None
        value = PERFECT[last]
    if maximize is None and last in PERFECT:
        maximize = PERFECT[last] > 0
    return _Fit(metric, float(value), direction("fit_metric", metric, maximize))


def _uses_key(work: Workload) -> bool:
    """Whether the loss depends on its random key, as dropout and augmentation inside it do."""
    if work.batch is None:
        return False
    key = jax.random.key(0)
    make_batch = work.batch

    def loss(loss_key: chex.PRNGKey, key: chex.PRNGKey, data: Any) -> Any:
        params, state = work.init(key)
        return work.loss(params, state, make_batch(data, key, jnp.int32(0)), loss_key)[0]

    closed = jax.make_jaxpr(loss)(key, key, work.data)
    reached = _tree.reached(closed.jaxpr, {closed.jaxpr.invars[0]})
    return any(var in reached for var in closed.jaxpr.outvars if not hasattr(var, "val"))


def _judge_fit(study: Study, fit: _Fit) -> tuple[int | None, bool, list[Finding]]:
    """The answer of one sweep, whether a longer one may have another, and what was seen."""
    info = steps_to_target(study, fit.value, fit.metric, fit.maximize)
    findings = _regularized(study)
    rates = study.points[LEARNING_RATE].astype(np.float64)
    low, high = float(rates.min()), float(rates.max())
    if info.infeasible.all():
        return None, False, findings + feasibility_findings(feasibility_info(study))
    length = int(info.step[-1])
    if info.fastest < 0:
        out = outcomes(study, fit.metric, fit.maximize)
        if out.best < 0:
            return None, False, [*findings, _no_value(fit, length)]
        near = _nearest(study, out)
        at_end = rates[near] in (low, high)
        if at_end:
            findings.append(_at_end(float(rates[near]), low, high, fit, None))
        findings.append(_no_fit(float(out.value[near]), float(rates[near]), fit, length))
        return None, not at_end, findings
    steps = int(info.steps[info.fastest])
    if steps == 0:
        return None, False, [*findings, _fits_untrained(fit)]
    fastest = [t for t in info.order if info.steps[t] == steps]
    ends = [t for t in fastest if rates[t] in (low, high)]
    findings += _unresolved(info, steps)
    if ends:
        findings.append(_at_end(float(rates[ends[0]]), low, high, fit, steps))
        return None, False, findings
    findings.append(_candidate(info, steps, fit, rates))
    return steps, False, findings


def _nearest(study: Study, out: Outcomes) -> int:
    """The trial nearest to a perfect fit; of several the one with the smallest training loss.

    Where no trial has learned to fit anything yet, the loss still tells which learned fastest.
    """
    tied = np.flatnonzero(out.usable & (out.value == out.value[out.best]))
    known = metric_names(study)
    losses = [name for name in ("train/loss", STEP_LOSS) if name in known]
    loss = outcomes(study, losses[0], False) if losses else outcomes(study)
    return int(min(tied, key=lambda trial: np.nan_to_num(loss.loss[trial], nan=np.inf)))


def _fitted(fit: _Fit) -> str:
    """What a trial did that got there: only a metric of the training set shows that it is fitted.

    Of a policy's return, or of the losses of an endless stream, there is no set to fit.
    """
    if fit.metric.startswith("train/"):
        return "fit the training set perfectly"
    return "reached the value that was called a perfect fit"


def _told(fit: _Fit) -> str:
    return f"{fit.metric} {'>=' if fit.maximize else '<='} {fit.value:g}"


def _candidate(info: StepsToTarget, steps: int, fit: _Fit, rates: np.ndarray) -> Finding:
    fastest = info.fastest
    return Finding(
        "num_steps_candidate",
        "info",
        f"The fastest of {len(rates)} trials, at the learning rate {rates[fastest]:.4g}, first "
        f"{_fitted(fit)} ({_told(fit)}) at the evaluation of step {steps}; "
        f"{len(info.order)} trials did so within {int(info.step[-1])} steps.",
        {
            "num_steps": steps,
            "after": int(info.after[fastest]),
            "learning_rate": float(rates[fastest]),
            "trial": fastest,
            "fit_metric": fit.metric,
            "fit_value": fit.value,
            "learning_rates": rates,
            "steps": info.steps,
        },
        PICK_SECTION,
        f"Begin with num_steps={steps}; this holds without data augmentation and regularization, "
        "and more gradient noise (these two, or smaller batches) may need more. When in doubt, "
        "train longer, and refine it from the best steps of the study (refine_num_steps).",
    )


def _unresolved(info: StepsToTarget, steps: int) -> list[Finding]:
    after = int(info.after[info.fastest])
    if steps - after <= max(COARSE * steps, 1):
        return []
    return [
        Finding(
            "evaluations_too_sparse",
            "warning",
            f"The fastest perfect fit came somewhere in steps {after + 1} to {steps}, between two "
            f"evaluations: {steps} is too large by up to {(steps - after) / steps:.0%} of it.",
            {"after": after, "num_steps": steps},
            PICK_SECTION,
            f"Evaluate at least every {max(1, int(COARSE * steps))} steps.",
        )
    ]


def _at_end(rate: float, low: float, high: float, fit: _Fit, steps: int | None) -> Finding:
    edge = "smallest" if rate == low else "largest"
    wider = rate / 10 if rate == low else rate * 10
    what = f"is nearest to a perfect fit ({_told(fit)})"
    if steps is not None:
        what = f"fits perfectly as fast as any, in {steps} steps"
    return Finding(
        "best_at_end_of_sweep",
        "warning",
        f"The learning rate that {what}, {rate:.4g}, is the {edge} of the sweep: a better one may "
        "lie beyond it, and its number of steps would be too large. The sweep does not conclude.",
        {"learning_rate": rate, "low": low, "high": high, "num_steps": steps},
        PICK_SECTION,
        f"Sweep again with the range extended to {wider:.4g}.",
    )


def _no_fit(value: float, rate: float, fit: _Fit, num_steps: int) -> Finding:
    return Finding(
        "no_perfect_fit",
        "warning",
        f"No trial {_fitted(fit)} ({_told(fit)}) in {num_steps} steps: the best "
        f"{fit.metric} was {value:.4g}, at the learning rate {rate:.4g}.",
        {
            "num_steps": num_steps,
            "fit_metric": fit.metric,
            "fit_value": fit.value,
            "best_value": value,
            "learning_rate": rate,
        },
        PICK_SECTION,
        f"Raise num_steps, to {2 * num_steps} for example (max_doublings does so), and see that "
        "data augmentation and regularization are off. If no length is enough, training is "
        "compute-bound: train in rounds of growing length.",
    )


def _no_value(fit: _Fit, num_steps: int) -> Finding:
    return Finding(
        "no_perfect_fit",
        "error",
        f"No feasible trial has a finite {fit.metric}, so that no fit can be seen.",
        {"num_steps": num_steps, "fit_metric": fit.metric},
        PICK_SECTION,
        "Evaluate it in every trial, or name another fit_metric.",
    )


def _fits_untrained(fit: _Fit) -> Finding:
    return Finding(
        "fits_untrained",
        "warning",
        f"A trial {_fitted(fit)} ({_told(fit)}) before its first update, so that this says nothing "
        "about training.",
        {"fit_metric": fit.metric, "fit_value": fit.value, "maximize": fit.maximize},
        PICK_SECTION,
        "Give a stricter fit_value, or another fit_metric or maximize.",
    )


def _unseen(known: list[str], metric: str | None) -> Finding:
    what = (
        f"what value of {metric!r} is a perfect fit"
        if metric is not None
        else "in which metric a perfect fit of the training set can be seen"
    )
    losses = [name for name in known if name.startswith("train/")] or ["train/loss"]
    return Finding(
        "no_perfect_fit_metric",
        "warning",
        f"Nothing says {what}: a loss of regression or of a language model has no such value by "
        f"itself (metrics: {', '.join(known)}).",
        {"metrics": known, "fit_metric": metric},
        PICK_SECTION,
        f"Give fit_metric={(metric or losses[0])!r} and as fit_value the training loss that you "
        "would call a perfect fit. If training loss keeps improving however long you train, the "
        "workload is compute-bound and has no such length.",
    )


def _regularized(study: Study) -> list[Finding]:
    on = [
        name
        for name, values in {**study.spec.get("fixed", {}), **study.points}.items()
        if any(word in name.lower() for word in REGULARIZERS)
        and np.asarray(values).dtype.kind in "iuf"
        and np.any(np.asarray(values) > 0)
    ]
    if not on:
        return []
    return [
        Finding(
            "regularization_on",
            "warning",
            f"Trials have {' and '.join(on)} above 0, and regularization slows the fit.",
            {"hyperparameters": on},
            PICK_SECTION,
            "Set it to 0 for this sweep.",
        )
    ]


def _random_loss(work: Workload) -> Finding:
    return Finding(
        "loss_is_random",
        "warning",
        f"The loss of {work.name!r} uses its random key, as dropout and data augmentation do. The "
        "sweep for a perfect fit is meant to be without them.",
        {"workload": work.name},
        PICK_SECTION,
        "Give a workload with them turned off; the steps found with them on are those of the "
        "harder problem.",
    )


@trains_if_needed
def refine_num_steps(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    num_trials: int = 24,
    eval_every: int | None = None,
    num_seeds: int = 1,
    objective: str | None = None,
    maximize: bool | None = None,
    growth: float = 2.0,
    shorter: Study | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Refines max_train_steps from where the good trials of a study had their best checkpoint.

    If (almost) all of them settled in the first tenth of training, it was far too long: the answer
    is five times the step at which the last of them settled. If they consistently were best in the
    last quarter, and still improving there beyond noise, longer training may be better, and the
    learning rate decay has to be tuned again: the answer is `growth` times as long. Otherwise the
    length stays. On a noisy plateau the best step can be anywhere and asks for nothing;
    `curve_info` judges that. The length itself is never a hyperparameter of a study.

    Under a decay every curve is flat at its end and falls while the rate does, whatever more steps
    would bring. So the schedules of the trainer are read, if it has a `make_schedule`, or the
    metric ``learning_rate`` of the study; and a shorter study, if there is one, decides.

    Args:
      trainer: as in `run_study`, or ``None, None`` with a study.
      space_or_study: a finished study, judged at no cost; or the space of one to run (the learning
        rate from 1e-5 to 10 on a log scale if None).
      key: the only source of randomness.
      num_steps: updates of each trial; a study has its own.
      num_trials: trials of a new study.
      eval_every: updates between evaluations; a fortieth of `num_steps` if None.
      num_seeds: repetitions of each trial.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.
      growth: how much longer to train, above 1.
      shorter: a finished study of the same workload with fewer steps; see `training_length_info`.
      directory: where to store the study.

    Returns:
      A `Verdict`: `answer` is a number of steps, int; or None where the curves cannot be judged,
      for want of evaluations or of feasible trials, and there is no shorter study. The Finding
      ``best_steps`` holds the distribution of best steps (`best_step_info`).

    Raises:
      ValueError: a bad argument, as `run_study`.

    Example:
      >>> import jax, numpy as np
      >>> import playbook_optax as pbx
      >>> step = np.arange(0, 1001, 50)
      >>> curves = np.stack([2 - step / 1000, 2.1 - step / 1000, 2.2 - step / 1000])
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": np.array([0.1, 0.2, 0.3])}, {"valid/loss": curves}, step,
      ...     objective="valid/loss")
      >>> verdict = pbx.procedures.refine_num_steps(None, None, study, key=jax.random.key(0))
      >>> verdict.answer, verdict.findings[0].code
      (2000, 'still_improving')

    Source: playbook, "Deciding how long to train when training is not compute-bound".
    """
    check_key("key", key)
    _checks.check_number("growth", growth, above=1.0, fix="2 doubles the length.")
    if isinstance(space_or_study, Study):
        study, cost = space_or_study, 0
    else:
        num_steps = _checks.check_count("num_steps", num_steps)
        num_trials = _checks.check_count("num_trials", num_trials)
        study, cost = given_or_trained(
            trainer,
            space_or_study or SearchSpace({LEARNING_RATE: Float(1e-5, 10.0, scale="log")}),
            num_trials=num_trials,
            num_steps=num_steps,
            eval_every=eval_every,
            num_evals=40,
            key=key,
            num_seeds=num_seeds,
            directory=directory,
        )
    info = best_step_info(study, objective, maximize)
    findings = feasibility_findings(feasibility_info(study, objective, maximize))
    judged = curve_findings(info.curves)
    findings += judged
    length = None
    if len(info.trials):
        rates = _scheduled(trainer, study, info.trials)
        length = training_length_info(study, objective, maximize, rates=rates, shorter=shorter)
        findings += boundary_findings(boundary_info(study, objective, maximize))
        findings += training_length_findings(length)
        findings += checkpoint_findings(checkpoint_info(study, objective, maximize))
        if shorter is not None:
            findings += length_findings(compare_lengths(shorter, study, objective, maximize))
    findings.append(_best_steps(info))
    answer = None
    if length is not None and (not info.curves.skipped or length.compute_bound is not None):
        answer = _refined(info, length, {finding.code for finding in judged}, growth)
        if answer == info.num_steps >= 10 and not info.curves.can_be_early:
            findings.append(_early_unseen(info))
    # What decides comes first among equally grave findings.
    first = sorted(findings, key=lambda finding: finding not in judged)
    return Verdict(answer, tuple(by_severity(first)), {"study": study}, cost)


def _scheduled(trainer: Trainer, study: Study, trials: np.ndarray) -> np.ndarray | None:
    """The learning rates that a trainer's schedules give some trials at their evaluations.

    Returns (trial, eval), NaN for the other trials; None without schedules.
    """
    if trainer.make_schedule is None or LEARNING_RATE not in study.points:
        return None
    steps = np.asarray(study.data["step"].values)
    rates = np.full((study.num_trials, len(steps)), np.nan)
    for trial in trials:
        point = {**trainer.fixed, **study.point(int(trial))}
        schedule = trainer.make_schedule(point, int(steps[-1]))
        rates[trial] = [float(schedule(jnp.int32(step))) for step in steps]
    return rates


def _refined(info: BestStepInfo, length: TrainingLengthInfo, codes: set[str], growth: float) -> int:
    """The length that the curves ask for, or a shorter study."""
    longer = length.compute_bound
    if longer is None and "still_improving" in codes and not length.knows_rates:
        longer = True  # By the playbook's rule of the last quarter; nothing contradicts it.
    if longer:
        return max(info.num_steps + 1, round(growth * info.num_steps))
    if "saturated_early" in codes:
        last = max(row.settled_step for row in info.curves.rows if row.early)
        return min(ROOM * max(last, 1), info.num_steps)
    return info.num_steps


def _best_steps(info: BestStepInfo) -> Finding:
    num = len(info.trials)
    message = "No trial has a best step."
    if num:
        message = (
            f"The best steps of the {num} best trials lie between {info.best_steps.min()} and "
            f"{info.best_steps.max()} of {info.num_steps}: {info.num_first_tenth} in the first "
            f"tenth, {info.num_last_quarter} in the last quarter."
        )
        if info.num_last_quarter > num / 2 and not info.curves.num_improving:
            message += " The late ones gained no more than noise there."
    return Finding(
        "best_steps",
        "info",
        message,
        {
            "num_steps": info.num_steps,
            "trials": info.trials,
            "best_steps": info.best_steps,
            "all_fractions": info.all_fractions,
            "edges": info.edges,
            "counts": info.counts,
            "good_counts": info.good_counts,
        },
        SECTION,
    )


def _early_unseen(info: BestStepInfo) -> Finding:
    return Finding(
        "early_saturation_unseen",
        "info",
        f"No evaluation falls into the first tenth of {info.num_steps} steps, so that it was not "
        "checked whether training is far too long.",
        {"num_steps": info.num_steps, "largest_gap": info.largest_gap},
        BOUND_SECTION,
        f"Evaluate at least every {info.num_steps // 10} steps.",
    )
