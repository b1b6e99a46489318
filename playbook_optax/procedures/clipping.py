"""Which clip threshold: a percentile of the recorded norms, and whether it cures instability."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.feasibility import feasibility_findings, feasibility_info
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.instability import instability_info
from playbook_optax.analysis.norms import NO_CLIPPING, norm_histogram
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures import controls
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records import storage
from playbook_optax.records.study import NoFeasibleTrial, Study
from playbook_optax.runner.run import StudyRunner
from playbook_optax.runner.trainer import Trainer, takes_trainer
from playbook_optax.search_space import Float, SearchSpace
from playbook_optax.trials.keys import check_key

LEARNING_RATE = "learning_rate"
MAX_NORM = "max_norm"
SECTION = "How can optimization failures be debugged and mitigated? (gradient clipping)"
HARDER = (75.0, 50.0, 25.0, 10.0, 5.0)
"""The percentiles tried after the first choice, as far as they are below it."""
AGGRESSIVE = 0.5
"""From more than this share of clipped updates on, the learning rate should be lowered instead."""


class ThresholdRow(NamedTuple):
    """One threshold that was tried.

    Attributes:
      percentile: the percentile of the unclipped norms that it is; 100 stands for no clipping.
      max_norm: the threshold; infinite for none.
      unstable: whether training was unstable with it.
      clipped_fraction: share of the updates that were clipped.
      best_value: the objective at its best evaluation, NaN if infeasible.
    """

    percentile: float
    max_norm: float
    unstable: bool
    clipped_fraction: float
    best_value: float


@takes_trainer
def choose_clip_threshold(
    trainer: Trainer,
    space_or_study: SearchSpace | Study | None = None,
    *,
    key: chex.PRNGKey,
    num_steps: int = 1000,
    learning_rate: float | None = None,
    point: Mapping[str, Any] | None = None,
    percentile: float = 90.0,
    num_trials: int = 12,
    eval_every: int | None = None,
    num_seeds: int = 1,
    directory: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Picks the threshold of gradient clipping from the norms that were recorded, and verifies it.

    The threshold is the 90th percentile of the unclipped gradient norms of the best trial, at the
    learning rate lr*. It is then tried at the higher learning rate that is wanted, beside the 75th,
    50th, 25th, 10th and 5th percentile and no clipping at all, in one program. The answer is the
    largest threshold from which on down training is stable. Where it clips more than half of the
    updates, the playbook calls it extremely aggressive, and a Finding says to lower the learning
    rate instead.

    Where `evaluate` returns ``train/loss``, that decides what is stable; without it the losses of
    the batches do, which tell less where single batches are many times as large as others.

    Args:
      trainer: as in `run_study`.
      space_or_study: a finished study whose norms were recorded; or a space with the one dimension
        ``learning_rate`` to sweep first (1e-5 to 10 on a log scale if None). Without one but with
        `learning_rate`, the norms are those of a run at that rate, and nothing is swept.
      key: the only source of randomness.
      num_steps: updates of each trial.
      learning_rate: the wanted one; if None, the smallest unstable one above lr*.
      point: further hyperparameters, name to number; those of the study's best trial by default.
      percentile: the first choice, between 0 and 100.
      num_trials: learning rates in the sweep, where there is one.
      eval_every: updates between evaluations; a twentieth of `num_steps` if None. With fewer than
        eight evaluations a rise of the loss is not seen, and only infeasible trials are unstable.
        Between two of them the peaks of the batch loss are looked at (`instability_info`).
      num_seeds: repetitions of each trial; it is unstable if one of them is.
      directory: where to store the studies, each in a folder of its own name.

    Returns:
      A `Verdict`: `answer` is the threshold, float, or None where no norms were recorded, every
      trial was infeasible, there is no instability to clip for, or no threshold stops it. The
      Finding ``clip_thresholds`` holds a `ThresholdRow` for each threshold, the chosen one, and the
      histogram's percentiles.

    Raises:
      ValueError: a bad argument, as `run_study`; a space without ``learning_rate`` or with anything
        else; or a point that has a ``max_norm`` already.

    Example:
      One batch in twenty has an outlier, whose gradient is thousands of times as large:

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> from playbook_optax.procedures.clipping import choose_clip_threshold
      >>> def loss(params, state, size, key):
      ...     return 0.5 * size * (params["w"] ** 2).sum(), (state, {})
      >>> workload = pbx.Workload(
      ...     name="outliers", init=lambda key: ({"w": jnp.ones(2)}, {}), loss=loss,
      ...     batch=lambda data, key, step: jnp.where(step % 20 == 19, 1000.0, 1.0),
      ...     evaluate=lambda p, s, d: {"train/loss": 0.5 * (p["w"] ** 2).sum()},
      ...     objective="train/loss")
      >>> verdict = choose_clip_threshold(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), key=jax.random.key(0),
      ...     learning_rate=0.1, num_steps=100, eval_every=10)
      >>> row = verdict.findings[0].evidence["chosen"]
      >>> verdict.answer == row["max_norm"], row["clipped_fraction"] < 0.5
      (True, True)

    Source: playbook, "How can optimization failures be debugged and mitigated?" (gradient
    clipping).
    """
    check_key("key", key)
    num_steps = _checks.check_count("num_steps", num_steps)
    num_seeds = _checks.check_count("num_seeds", num_seeds)
    _checks.check_number(
        "percentile", percentile, above=0.0, below=100.0, fix="The playbook begins with 90."
    )
    fixed = check_point(point, (MAX_NORM,))
    if learning_rate is None and LEARNING_RATE in fixed:
        learning_rate = fixed[LEARNING_RATE]
    fixed.pop(LEARNING_RATE, None)
    if learning_rate is not None:
        _checks.check_number(
            "learning_rate", learning_rate, above=0.0, fix="Give the one that you want to train at."
        )
    given = space_or_study if isinstance(space_or_study, Study) else None
    swept = None
    if given is not None:
        refusal = _cannot_read(given)
        if refusal:
            return Verdict(None, tuple(by_severity(refusal)), {"given": given}, 0)
        best_point = given.best().point
        if LEARNING_RATE not in best_point:
            raise ValueError(
                f"the study has no hyperparameter {LEARNING_RATE!r}: "
                f"{_checks.nearest(LEARNING_RATE, best_point)}"
            )
        inherited = check_point(best_point, (MAX_NORM,))
        fixed = {**{k: v for k, v in inherited.items() if k != LEARNING_RATE}, **fixed}
    elif not isinstance(space_or_study, Study) and (space_or_study or learning_rate is None):
        swept = learning_rate_grid(space_or_study, num_trials)

    def table(rates: Any, max_norms: Any) -> dict[str, np.ndarray]:
        return points_table(fixed, {LEARNING_RATE: rates, MAX_NORM: max_norms})

    runner = StudyRunner(
        controls.controlled(trainer, fixed),
        table([1.0], [1.0]),
        num_steps=num_steps,
        eval_every=max(1, num_steps // 20) if eval_every is None else eval_every,
        key=key,
        num_seeds=num_seeds,
        names=controls.NAMES,
    )
    studies: dict[str, Study] = {} if given is None else {"given": given}

    def run(name: str, points: Mapping[str, np.ndarray]) -> Study:
        studies[name] = runner.run(points, directory=subdirectory(directory, name))
        return studies[name]

    def verdict(answer: float | None, findings: Iterable[Finding]) -> Verdict:
        trials = sum(s.num_trials for name, s in studies.items() if name != "given")
        return Verdict(
            answer, tuple(by_severity(findings)), studies, trials * num_seeds * num_steps
        )

    study = given
    if swept is not None:
        study = run("learning_rate_sweep", table(swept, NO_CLIPPING))
        refusal = _cannot_read(study)
        if refusal:
            return verdict(None, refusal)
    stable_rate = stable_value = None
    if study is None:
        assert learning_rate is not None  # Otherwise there was a sweep.
        study, source = run("unclipped", table([learning_rate], [NO_CLIPPING])), 0
        if not study.data["norms/counts"].values.sum():
            return verdict(None, [_no_norms("No gradient norm of the run was finite.")])
        if not instability_info(study).unstable[0]:
            return verdict(None, [_nothing_to_clip_for(study, learning_rate)])
    else:
        best = study.best()
        source, stable_rate, stable_value = best.trial, float(best.point[LEARNING_RATE]), best.value
        if learning_rate is None:
            rates = study.points[LEARNING_RATE].astype(np.float64)
            above = rates[instability_info(study).unstable & (rates > stable_rate)]
            if not len(above):
                return verdict(None, [_nothing_above(stable_rate, float(rates.max()))])
            learning_rate = float(above.min())

    histogram = norm_histogram(study, [source])
    percentiles = [float(percentile), *(q for q in HARDER if q < percentile)]
    thresholds: dict[float, float] = {}  # The largest percentile of each threshold.
    for q in percentiles:
        thresholds.setdefault(float(np.float32(histogram.percentile(q))), q)
    max_norms = [NO_CLIPPING, *(t for t in thresholds if t > 0)]
    trial = run("clip_thresholds", table(learning_rate, max_norms))
    evidence = {
        "learning_rate": learning_rate,
        "stable_learning_rate": stable_rate,
        "stable_best_value": stable_value,
        "norms_of_trial": source,
        "norm_percentiles": {f"{q:g}": histogram.percentile(q) for q in (50.0, 90.0, 99.0)},
        "num_steps": num_steps,
        "num_seeds": num_seeds,
    }
    tried = [100.0, *(q for t, q in thresholds.items() if t > 0)]
    return verdict(*judge_thresholds(trial, tried, evidence))


def judge_thresholds(
    study: Study, percentiles: Sequence[float], evidence: Mapping[str, Any]
) -> tuple[float | None, list[Finding]]:
    """Which threshold makes training stable; trains nothing.

    It is the largest one that does so and below which every other does: of two that differ by
    little, a larger one may look stable by luck.

    Args:
      study: one trial for each threshold, ``max_norm``, the first without clipping, then falling.
      percentiles: which percentile of the unclipped norms each is, 100 for none.
      evidence: what else is known: ``learning_rate``, ``stable_learning_rate`` and
        ``stable_best_value`` (None where there are none), and what findings should hold.

    Returns:
      The threshold or None, and the findings.
    """
    rows = _rows(study, percentiles)
    evidence = {**evidence, "thresholds": [row._asdict() for row in rows]}
    learning_rate = evidence["learning_rate"]
    if not rows[0].unstable:
        return None, [_nothing_to_clip_for(study, learning_rate)]
    first = max(i for i, row in enumerate(rows) if row.unstable) + 1
    if first == len(rows):
        return None, [_not_enough(rows, evidence)]
    chosen = rows[first]
    findings = [_chosen(chosen, rows[0], evidence)]
    if chosen.clipped_fraction > AGGRESSIVE:
        rate = evidence["stable_learning_rate"]
        findings.append(lower_instead(chosen.clipped_fraction, learning_rate, rate))
    return chosen.max_norm, findings


def check_point(point: Mapping[str, Any] | None, reserved: Iterable[str]) -> dict[str, Any]:
    """The fixed hyperparameters of a procedure, none of which may be its own.

    Args:
      point: name to number, or None.
      reserved: the names that the procedure gives values to.

    Returns:
      A copy.

    Raises:
      ValueError: a reserved name, or a value that is not a number.
    """
    fixed = dict(point or {})
    for name in reserved:
        if name in fixed:
            raise ValueError(
                f"the point has {name!r} already, which this procedure decides: take it out of the "
                "point, and whatever uses it out of make_optimizer."
            )
    for name, value in fixed.items():
        _checks.check_number(f"point[{name!r}]", value)
    return fixed


def learning_rate_grid(space: SearchSpace | None, num_trials: int) -> np.ndarray:
    """The learning rates of a sweep, ascending, float32 (trial,).

    Args:
      space: a space with the one dimension ``learning_rate``; 1e-5 to 10 on a log scale if None.
      num_trials: how many.

    Raises:
      ValueError: another space, or fewer than two trials.
    """
    space = space or SearchSpace({LEARNING_RATE: Float(1e-5, 10.0, scale="log")})
    if not isinstance(space, SearchSpace) or list(space) != [LEARNING_RATE]:
        raise ValueError(
            f"space_or_study must be a pbx.SearchSpace with the one dimension {LEARNING_RATE!r} or "
            f"a study, got {space!r}; give other hyperparameters by point=."
        )
    count = _checks.check_count("num_trials", num_trials, at_least=2)
    return np.sort(np.asarray(space.grid(count)[LEARNING_RATE], np.float32))


def points_table(
    fixed: Mapping[str, Any], columns: Mapping[str, Any], dtypes: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """A table of points, name to array (trial,).

    Args:
      fixed: hyperparameters that are the same in all trials.
      columns: arrays (trial,), or numbers for all trials.
      dtypes: of the columns; float32 otherwise.
    """
    dtypes = dtypes or {}
    arrays = {
        name: np.atleast_1d(np.asarray(values, dtypes.get(name, np.float32)))
        for name, values in columns.items()
    }
    count = max(len(values) for values in arrays.values())
    table = {name: np.broadcast_to(values, (count,)) for name, values in arrays.items()}
    table |= {name: np.full((count,), value) for name, value in as_columns(fixed).items()}
    return table


def as_columns(fixed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Fixed hyperparameters in the dtypes that they have in a table, name to array ()."""
    kinds = {name: np.asarray(value).dtype.kind for name, value in fixed.items()}
    return {
        name: np.asarray(value, np.int32 if kinds[name] in "iu" else np.float32)
        for name, value in fixed.items()
    }


def subdirectory(directory: str | os.PathLike[str] | None, name: str) -> pathlib.Path | None:
    """The folder of one of a procedure's studies, or None if nothing is stored.

    Raises:
      NotWritable: it is a symbolic link, or in one.
    """
    if directory is None:
        return None
    folder = storage.root(directory)
    for part in pathlib.PurePath(name).parts:
        folder /= part
        if folder.is_symlink():
            raise storage.NotWritable(
                f"{str(folder)!r} is a symbolic link: nothing is written outside the directory of "
                "the procedure. Replace it by a real directory."
            )
    return folder


def clipped_fractions(study: Study) -> np.ndarray:
    """Share of the updates that each trial clipped, over all seeds: float64 (trial,), 0 if none."""
    clipped, steps = (
        study.data[name].values.reshape(study.num_trials, -1).sum(axis=1).astype(np.float64)
        for name in ("norms/num_clipped", "norms/num_steps")
    )
    return clipped / np.maximum(steps, 1.0)


def lower_instead(
    clipped_fraction: float, learning_rate: float, stable_rate: float | None
) -> Finding:
    """The Finding for clipping so hard that a lower learning rate does the same.

    Args:
      clipped_fraction: share of the updates clipped, above `AGGRESSIVE`.
      learning_rate: where that was.
      stable_rate: a learning rate that needs no clipping, if one is known.
    """
    advice = (
        f"Lower the learning rate from {learning_rate:.4g} towards {stable_rate:.4g} instead: "
        "training is stable there without clipping."
        if stable_rate is not None
        else f"Lower the learning rate from {learning_rate:.4g} instead."
    )
    return Finding(
        code="lower_the_learning_rate",
        severity="warning",
        message=(
            f"{clipped_fraction:.0%} of the updates are clipped at learning rate "
            f"{learning_rate:.4g}, more than {AGGRESSIVE:.0%}: extremely aggressive clipping, "
            "which acts like a lower learning rate."
        ),
        evidence={
            "clipped_fraction": clipped_fraction,
            "limit": AGGRESSIVE,
            "learning_rate": learning_rate,
            "proposed_learning_rate": stable_rate,
        },
        section=SECTION,
        suggestion=advice,
    )


def _cannot_read(study: Study) -> list[Finding]:
    """Why no threshold can be read off a study: nothing was feasible, or no norm recorded."""
    try:
        best = study.best()
    except NoFeasibleTrial:
        return feasibility_findings(feasibility_info(study))
    if "norms/counts" not in study.data:
        return [_no_norms("The study has no 'norms/counts'.")]
    if not study.data["norms/counts"].values[best.trial].sum():
        return [_no_norms(f"The best trial, {best.trial}, has no finite gradient norm on record.")]
    return []


def _no_norms(why: str) -> Finding:
    return Finding(
        code="no_norms_recorded",
        severity="error",
        message=f"{why} Without a record of the unclipped norms there is no percentile to clip at.",
        evidence={},
        section=SECTION,
        suggestion="Train it with run_study or make_train, which always record them; or give "
        "choose_clip_threshold a learning_rate= and no study, and a run of its own records them.",
    )


def _nothing_above(stable_rate: float, highest: float) -> Finding:
    return Finding(
        code="no_instability",
        severity="info",
        message=(
            f"No learning rate above the best one, {stable_rate:.4g}, up to {highest:.4g} was "
            "unstable: there is nothing to clip for."
        ),
        evidence={"stable_learning_rate": stable_rate, "highest_learning_rate": highest},
        section=SECTION,
        suggestion="Train without clipping; or sweep to higher learning rates if the best one is "
        "the highest.",
    )


def _rows(study: Study, percentiles: Sequence[float]) -> list[ThresholdRow]:
    unstable, fractions = instability_info(study).unstable, clipped_fractions(study)
    values, max_norms = outcomes(study).value, study.points[MAX_NORM].astype(np.float64)
    return [
        ThresholdRow(
            percentile=percentiles[i],
            max_norm=float(max_norms[i]) if max_norms[i] < NO_CLIPPING else math.inf,
            unstable=bool(unstable[i]),
            clipped_fraction=float(fractions[i]),
            best_value=float(values[i]),
        )
        for i in range(study.num_trials)
    ]


def _nothing_to_clip_for(study: Study, learning_rate: float) -> Finding:
    """Says that the first trial, the unclipped one, is stable."""
    value = float(outcomes(study).value[0])
    return Finding(
        code="no_instability",
        severity="info",
        message=(
            f"Training at learning rate {learning_rate:.4g} is stable without clipping (best value "
            f"{value:.4g}): there is nothing to clip for."
        ),
        evidence={"learning_rate": learning_rate, "best_value": value},
        section=SECTION,
        suggestion="Train without clipping, or give a higher learning_rate.",
    )


def _not_enough(rows: list[ThresholdRow], evidence: Mapping[str, Any]) -> Finding:
    hardest = rows[-1]
    return Finding(
        code="clipping_is_not_enough",
        severity="warning",
        message=(
            f"Training at learning rate {evidence['learning_rate']:.4g} is unstable with every "
            f"threshold tried, down to {hardest.max_norm:.4g} (percentile "
            f"{hardest.percentile:g}), which clips {hardest.clipped_fraction:.0%} of the updates."
        ),
        evidence=evidence,
        section=SECTION,
        suggestion="Try warm-up, another optimizer or a better placement of normalization "
        "(compare_remedies), or lower the learning rate.",
    )


def _chosen(chosen: ThresholdRow, unclipped: ThresholdRow, evidence: Mapping[str, Any]) -> Finding:
    harder = sum(row["max_norm"] > chosen.max_norm for row in evidence["thresholds"][1:])
    how = f" The {harder} larger thresholds were not enough." if harder else ""
    stable = evidence["stable_learning_rate"]
    lower = (
        f"; at the best learning rate without clipping, {stable:.4g}, it is "
        f"{evidence['stable_best_value']:.4g}"
        if stable is not None
        else ""
    )
    return Finding(
        code="clip_thresholds",
        severity="info",
        message=(
            f"Clipping at {chosen.max_norm:.4g}, the {chosen.percentile:g}th percentile of the "
            f"unclipped norms, makes training at learning rate {evidence['learning_rate']:.4g} "
            f"stable, and clips {chosen.clipped_fraction:.0%} of the updates.{how} Best value "
            f"{chosen.best_value:.4g}, without clipping {unclipped.best_value:.4g}{lower}."
        ),
        evidence={**evidence, "chosen": chosen._asdict()},
        section=SECTION,
        suggestion="Clip at it if that is the better value, and sweep the learning rate again.",
    )
