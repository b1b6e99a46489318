"""`tune`: an untuned workload goes in, a tuned recipe comes out, with a page of its evidence."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import numpy as np

from playbook_optax import _checks, chapters, plots, report
from playbook_optax.analysis.spreads import best_by_seed
from playbook_optax.analysis.training_length import best_step_info
from playbook_optax.procedures import tune as parts
from playbook_optax.procedures import tuned
from playbook_optax.procedures.program import against
from playbook_optax.procedures.tune import Chapter, Recipe, find_recipe
from playbook_optax.records import storage
from playbook_optax.records.study import Study
from playbook_optax.report import Decision, Figure, Pictures, Table, shown_number, shown_point
from playbook_optax.runner.trainer import HOW, Trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials.stepper import MakeOptimizer, MakeSchedule
from playbook_optax.trials.workload import WorkloadLike, resolve

PROGRAM = "recipe.py"
_TITLES = {
    parts.LEARNING_RATE_CHAPTER: ("Learning rate", "Around which learning rate is the best one?"),
    parts.NUM_STEPS_CHAPTER: ("Length of training", "How many steps should trials have?"),
    parts.STABILITY: ("Stability", "Does training break, and what helps?"),
    parts.ROUND_1: ("Round 1", "Which region of the search space is good?"),
    parts.ROUND_2: ("Round 2", "Which point is best when training is longer?"),
    parts.RETRAIN: ("Retraining", "Does the best point hold with other seeds?"),
}


@functools.partial(_checks.named_arguments, more=HOW)
def tune(
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
    """Tunes a workload by the playbook, from the first learning rate to a program to keep.

    The budget is num_trials x num_steps trial-steps, and no more is spent. In order: a sweep of
    the constant learning rate, moved as long as the best lies at its end (`sweep_learning_rate`);
    how long to train (`pick_num_steps`); the chapter on instability where the sweep shows one
    (`stabilize`); round 1, quasi-random, short, over the hyperparameters that the budget allows;
    round 2, longer, around the good trials of round 1 (`plan_next_round`), its second half around
    the best of its first; and the best candidates trained again with seeds that they were not tuned
    on. What the budget is too small for is left out, and a Finding says so.

    With a `directory` everything is stored and the same call continues after a kill at any point.
    The same key and versions give the same recipe bit for bit.

    Args:
      workload: a `Workload`, or a function of the point that gives one; or a `Trainer`, which says
        optimizer and schedule as well. Test data, if it has any, are not touched;
        `Recipe.final_evaluate` reads them.
      make_optimizer: name of one of our optimizers (``"adam"`` if None), or
        ``make_optimizer(point)`` for any Optax transformation, with a `space`.
      space: the search space, a bound that nothing leaves: where the best lies at its edge, a
        Finding proposes a wider one. That of `optimizer_search_space` for an optimizer by name if
        None, whose ranges move with what is found.
      make_schedule: ``make_schedule(point, num_steps)``; a cosine decay from
        ``point["learning_rate"]`` to 0 if None and the space has a learning rate.
      num_trials: size of the budget, in trials of `num_steps`.
      num_steps: updates of the final run.
      key: the only source of randomness.
      directory: where to store the studies, the page ``report.html``, the program ``recipe.py``
        and, for the command line to tell it again, the decisions as ``recipe.json``.
      overrides: decisions that you take yourself, by name: ``learning_rate_range`` (a pair),
        ``num_steps``, ``warmup_steps``, ``max_norm``, ``space`` (of round 1), ``next_space`` (of
        round 2), ``point`` (nothing is searched, only trained).
      learning_rates: names of the hyperparameters that are learning rates, where there are several
        or the one is not called ``learning_rate``. They are swept by a common factor, searched
        apart, and follow one schedule: `make_schedule` gets the factor as ``learning_rate``, and
        `make_optimizer` each of them as a schedule.
      **how: any other attribute of `Trainer`, such as ``trials_per_block`` or ``progress``.

    Returns:
      The `Recipe`. Its point is None where every trial was infeasible or training made nothing
      better; a Finding says what to do.

    Raises:
      ValueError: a bad argument, an unknown override, or as `run_study`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> recipe = pbx.tune(workload, "sgd", num_trials=12, num_steps=40, key=jax.random.key(0))
      >>> recipe.value < 1e-6, sum(recipe.cost.values()) <= 12 * 40
      (True, True)

    Source: playbook, "A scientific approach to improving model performance".
    """
    recipe = find_recipe(
        workload,
        make_optimizer,
        space,
        make_schedule,
        num_trials=num_trials,
        num_steps=num_steps,
        key=key,
        directory=directory,
        overrides=overrides,
        learning_rates=learning_rates,
        **how,
    )
    if directory is None:
        return recipe
    try:
        tuned.store(recipe, directory)
        page = write_recipe_report(recipe, directory)
    except Exception as error:
        # What was paid for with training is not lost for want of a drawing.
        warnings.warn(f"no report is written: {error!r}", UserWarning, stacklevel=2)
        return recipe
    return dataclasses.replace(recipe, report=page)


@_checks.named_arguments
def write_recipe_report(
    recipe: Recipe, directory: str | os.PathLike[str], workload: str | None = None
) -> Path:
    """Writes a recipe and its evidence as ``report.html``, and the program as ``recipe.py``.

    Args:
      recipe: what `tune` returned.
      directory: where to write; made when missing.
      workload: the workload as ``module:attribute`` or a name of the zoo, for the program.

    Returns:
      The path of the page.

    Raises:
      ImportError: jinja2 or matplotlib is not installed (the extra ``report``).
      NotWritable: the directory or a file in it cannot be written.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> recipe = pbx.tune(workload, "sgd", num_trials=2, num_steps=20, key=jax.random.key(0),
      ...                   overrides={"point": {"learning_rate": 0.4}})
      >>> pbx.write_recipe_report(recipe, tempfile.mkdtemp()).name
      'report.html'

    Source: playbook, "Extracting insight from experimental results".
    """
    folder = report.check_folder(directory)
    source = None
    if recipe.point is not None:
        source = recipe.to_python(workload)
        storage.write_file(folder / PROGRAM, source.encode())
    return write_recipe_page(recipe, folder, source)


def write_recipe_page(recipe: Recipe, folder: Path, source: str | None) -> Path:
    """The page of `write_recipe_report` alone.

    Args:
      recipe: what `tune` returned, or what `tuned.read` reads.
      folder: where to write.
      source: the program, shown as it is; None if there is none.

    Returns:
      The path of the page.
    """
    pictures = Pictures()
    decisions = [made for chapter in recipe.chapters for made in _decisions(chapter, pictures)]
    headline, trust = recipe_headline(recipe)
    grave = against(recipe)
    return report.write_recipe(
        name=_name(recipe),
        headline=headline,
        trust=trust,
        recipe=source,
        facts=_facts(recipe),
        decisions=decisions,
        studies=[(_study_title(name), study) for name, study in recipe.studies.items()],
        directory=folder,
        budget=[(_TITLES[name][0], cost) for name, cost in recipe.cost.items()],
        pictures=pictures,
        severity=grave[0].severity if grave else "info",
    )


def recipe_headline(recipe: Recipe) -> tuple[str, str]:
    """The verdict and how far to trust it, a sentence each; an error about the answer comes first.

    Args:
      recipe: what `tune` returned.

    Returns:
      The two sentences.
    """
    if recipe.point is None:
        last = recipe.chapters[-1].decision
        return last.message, last.suggestion
    spent = sum(recipe.cost.values())
    cost = f"It took {spent:,} of {recipe.total_budget:,} trial-steps."
    reached = f"{recipe.objective} = {shown_number(recipe.value)}"
    trust = "Trained with one seed: its spread is unknown."
    if len(recipe.values) > 1:
        low, high = shown_number(recipe.values.min()), shown_number(recipe.values.max())
        reached += f" on average over {len(recipe.values)} seeds"
        trust = (
            f"Seeds that it was not tuned on gave {low} to {high}, standard deviation "
            f"{recipe.spread:.2g}."
        )
    trust = f"{trust} {recipe.told_limit()}".strip()
    grave = against(recipe)
    if not grave:
        return f"Tuned: {reached}.", f"{trust} {cost}"
    first = grave[0]
    if first.severity == "error":
        told = f"{first.suggestion} What was trained reached {reached}. {trust} {cost}"
        return f"Not tuned: {first.message}", told.strip()
    return f"Tuned: {reached}.", f"{trust} Before you trust it: {first.message} {cost}"


def _study_title(name: str) -> str:
    """``learning_rate/sweep_0`` as people say it."""
    chapter, _, own = name.partition("/")
    return f"{_TITLES[chapter][0]}: {own.replace('_', ' ').replace('/', ', ')}"


def _name(recipe: Recipe) -> str:
    if recipe.point is not None:
        return resolve(recipe.workload, recipe.point).name
    return getattr(recipe.workload, "name", "workload")


def _facts(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe in pairs of text."""
    facts = [("Optimizer", recipe.optimizer_name or "your own")]
    if recipe.point is not None:
        facts += list(_shown_point(recipe).items())
    facts.append(("num_steps", str(recipe.num_steps)))
    if recipe.pipeline.warmup_steps:
        facts.append(("warmup_steps", str(recipe.pipeline.warmup_steps)))
    if recipe.pipeline.max_norm is not None:
        facts.append(("max_norm", shown_number(recipe.pipeline.max_norm)))
    facts.append((recipe.objective, shown_number(recipe.value)))
    if len(recipe.values) > 1:
        facts.append(("standard deviation over seeds", f"{recipe.spread:.3g}"))
    return facts


def _shown_point(recipe: Recipe) -> dict[str, str]:
    """The point as text, with the labels of choices where a study knows them."""
    assert recipe.point is not None
    numbers = {name: shown_number(value) for name, value in recipe.point.items()}
    for study in reversed(recipe.studies.values()):
        values = study.points
        if not set(values) <= set(recipe.point):
            continue
        same = np.all([v == np.asarray(recipe.point[n], v.dtype) for n, v in values.items()], 0)
        if same.any():
            return numbers | shown_point(study, int(np.argmax(same)))
    return numbers


def _decisions(chapter: Chapter, pictures: Pictures) -> list[Decision]:
    """A chapter as decisions of the page: its own, and those of the chapter on instability."""
    title, asked = _TITLES[chapter.name]
    own = Decision(
        title,
        asked,
        chapter.decision.message,
        chapter.decision.section,
        [chapter.decision, *chapter.verdict.findings],
        _figures(chapter, pictures),
        _table(chapter),
        next=chapter.decision.suggestion,
        cost=f"{chapter.verdict.cost:,} trial-steps",
    )
    if chapter.name != parts.STABILITY or chapter.verdict.answer is None:
        return [own]
    inner = [
        dataclasses.replace(decision, title=f"Stability: {decision.title}")
        for decision in chapters.stability_decisions(chapter.verdict, pictures)
    ]
    # Their findings stand with the steps that made them.
    return [dataclasses.replace(own, findings=[chapter.decision]), *inner]


def _table(chapter: Chapter) -> Table | None:
    """The candidates of the last chapter, seed by seed."""
    if chapter.name != parts.RETRAIN or "retrain" not in chapter.verdict.studies:
        return None
    study = chapter.verdict.studies["retrain"]
    names = list(study.points)
    header = ("trial", *names, "mean", "lowest", "highest")
    rows = []
    for trial in range(study.num_trials):
        values = best_by_seed(study, trial)
        told = shown_point(study, trial)
        point = [told[name] for name in names]
        shown = ["infeasible"] * 3
        if not np.isnan(values).any():
            shown = [shown_number(v) for v in (values.mean(), values.min(), values.max())]
        rows.append((str(trial), *point, *shown))
    return Table(header, rows)


def _figures(chapter: Chapter, pictures: Pictures) -> list[Figure]:
    studies = chapter.verdict.studies
    if chapter.name == parts.RETRAIN and studies:
        return report.curve_figures(studies["retrain"], pictures)
    of_study = {
        parts.LEARNING_RATE_CHAPTER: _of_sweep,
        parts.ROUND_1: _of_round,
        parts.ROUND_2: _of_round,
    }.get(chapter.name)
    if of_study is None:
        return []
    return [figure for name in studies for figure in of_study(studies[name], name, pictures)]


def _of_sweep(study: Study, name: str, pictures: Pictures) -> list[Figure]:
    if not study.num_trials or bool(study.data["infeasible"].values.all()):
        return []
    return report.axis_figures(study, pictures, f", {name.replace('_', ' ')}")


def _of_round(study: Study, name: str, pictures: Pictures) -> list[Figure]:
    if bool(study.data["infeasible"].values.all()):
        return []
    where = ", refined" if name == "refined" else ""
    best_steps = pictures(
        f"When trials were best{where}",
        "Histogram: the step of each good trial's best checkpoint, as a part of the run.",
        plots.plot_best_steps,
        best_step_info(study),
    )
    return [
        *report.axis_figures(study, pictures, where),
        *report.curve_figures(study, pictures, where),
        best_steps,
    ]
