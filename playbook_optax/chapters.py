"""Chapters of the playbook as pages: what each step of a procedure asked, saw and decided."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from playbook_optax import _checks, plots, report
from playbook_optax.procedures import stability as chapter
from playbook_optax.procedures.remedies import RemedyComparison, RemedyRow
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.report import Decision, Pictures, Table, shown_number

TITLE = "How can optimization failures be debugged and mitigated?"
_WARMUP_SECTION = "Learning rate warmup"
_CLIPPING_SECTION = "Gradient clipping"


def _shown(value: Any) -> str:
    number = float(value)
    return "–" if math.isnan(number) else shown_number(number)


def remedy_table(comparison: RemedyComparison) -> Table:
    """The table of remedies as text.

    Args:
      comparison: the answer of `compare_remedies`.

    Returns:
      One row for each remedy.
    """
    header = (
        "remedy",
        "largest stable rate",
        "largest useful rate",
        f"best {comparison.objective}",
        "at rate",
        "at step",
        "spread",
        "clipped",
        "extra steps",
    )

    def cells(row: RemedyRow) -> list[str]:
        limit = _shown(row.largest_stable_learning_rate)
        return [
            row.remedy + (" (recommended)" if row.remedy == comparison.recommended else ""),
            f"≥ {limit}" if row.stable_to_end else limit,
            _shown(row.largest_useful_learning_rate),
            _shown(row.best_value),
            _shown(row.best_learning_rate),
            str(row.best_step) if row.best_step >= 0 else "–",
            _shown(row.spread),
            f"{row.clipped_fraction:.0%}" if not math.isnan(row.clipped_fraction) else "–",
            str(row.extra_steps),
        ]

    return Table(header, [cells(row) for row in comparison.rows])


def _rate_of(study: Study, trial: int) -> str:
    for name in ("learning_rate", "base_learning_rate"):
        if name in study.points:
            return shown_number(study.points[name][trial])
    return "–"


def _sweep(step: Verdict, picture: Pictures) -> Decision:
    (study,) = step.studies.values()
    figures = []
    decided = "Every trial is infeasible: the range of learning rates must be lowered."
    if not any(finding.code == "all_infeasible" for finding in step.findings):
        best = study.best()
        decided = (
            f"lr* = {_rate_of(study, best.trial)}: {best.objective} = {shown_number(best.value)} "
            f"at step {best.step}."
        )
        alt = f"Scatter plot: best {study.objective} against the learning rate, infeasible shaded."
        figures.append(picture("Learning rate sweep", alt, plots.plot_axis, study, "learning_rate"))
        alt = "Line plot: training loss at lr*, just above it, and near 5 and 10 times it."
        figures.append(picture("Training loss above lr*", alt, plots.plot_instability, study))
    return Decision(
        "Learning rate sweep",
        "Which learning rate is best, and what do those above it look like?",
        decided,
        "Identifying unstable workloads",
        step.findings,
        figures,
    )


def _limit(step: Verdict) -> Decision:
    decided = "No unstable learning rate was found."
    if step.answer is not None:
        decided = f"Training is unstable from a learning rate of {shown_number(step.answer)} on."
    return Decision(
        "Unstable learning rate",
        "From which learning rate on is training unstable?",
        decided,
        _WARMUP_SECTION,
        step.findings,
    )


def _probe(step: Verdict, picture: Pictures) -> Decision:
    decided = {
        None: "It could not be told.",
        True: "The loss rises early in training at twice lr*.",
        False: "The loss does not rise early in training at twice lr*.",
    }[step.answer]
    figures = []
    if "probe" in step.studies:
        alt = "Line plot: gradient norm and training loss of every step at lr* and twice lr*."
        figures.append(
            picture("The first steps", alt, plots.plot_norm_trace, step.studies["probe"])
        )
    return Decision(
        "Early instability",
        "Does the loss rise in the first steps at twice lr*, evaluated at every step?",
        decided,
        "Identifying unstable workloads",
        step.findings,
        figures,
    )


def _warmup(step: Verdict) -> Decision:
    answer = step.answer
    decided = "No warm-up helps."
    if answer is not None:
        decided = (
            f"{answer.warmup_steps} steps of warm-up up to a learning rate of "
            f"{shown_number(answer.base_learning_rate)}, {answer.num_steps} steps in all: "
            f"{shown_number(answer.best_value)}, against "
            f"{shown_number(answer.baseline_value)} without."
        )
    return Decision(
        "Learning rate warm-up",
        "Which is the shortest warm-up that trains stably at ten times the unstable rate, and is "
        "the best checkpoint better for it?",
        decided,
        _WARMUP_SECTION,
        step.findings,
    )


def _clipping(step: Verdict, picture: Pictures) -> Decision:
    decided, figures = "No threshold is chosen.", []
    if step.answer is not None:
        decided = f"Clip at a global norm of {shown_number(step.answer)}."
    source = next(
        (f.evidence["norms_of_trial"] for f in step.findings if "norms_of_trial" in f.evidence),
        None,
    )
    study = next((s for n, s in step.studies.items() if n != "clip_thresholds"), None)
    if study is not None and source is not None and "norms/counts" in study.data:
        threshold = step.answer
        alt = "Histogram of the unclipped gradient norms of all steps, with the threshold."
        figures.append(
            picture(
                "Gradient norms before clipping",
                alt,
                plots.plot_gradient_norms,
                study,
                trials=[source],
                threshold=threshold,
            )
        )
        alt = "Line plot: unclipped gradient norm against the step, with the threshold."
        figures.append(
            picture(
                "Gradient norm in training",
                alt,
                plots.plot_norm_trace,
                study,
                trials=[source],
                threshold=threshold,
                wide=True,
            )
        )
    return Decision(
        "Gradient clipping",
        "Which threshold do the recorded norms suggest, and does it stop the instability?",
        decided,
        _CLIPPING_SECTION,
        step.findings,
        figures,
    )


def _remedies(step: Verdict, picture: Pictures) -> Decision:
    comparison: RemedyComparison = step.answer
    decided = "No remedy does better than a lower learning rate."
    if comparison.recommended is not None:
        row = comparison.row(comparison.recommended)
        decided = (
            f"{comparison.recommended}: best {comparison.objective} {_shown(row.best_value)} at "
            f"learning rate {_shown(row.best_learning_rate)}, against "
            f"{_shown(comparison.row('none').best_value)} without."
        )
    alt = f"Line plot: best {comparison.objective} against the learning rate for each remedy."
    figures = [picture("Remedies", alt, plots.plot_remedies, comparison, wide=True)]
    compared = before_and_after(step)
    if compared:
        alt = "Line plot: training loss without a remedy and with the recommended one."
        figures.append(picture("Before and after", alt, plots.plot_curves_compared, compared))
    return Decision(
        "Remedies compared",
        "Which remedy helps most, each at learning rates of its own?",
        decided,
        TITLE,
        step.findings,
        figures,
        remedy_table(comparison),
    )


def before_and_after(step: Verdict) -> dict[str, tuple[Study, int]]:
    """What to draw of a comparison: runs at the best learning rate of the recommended remedy.

    Args:
      step: the verdict of `compare_remedies`.

    Returns:
      Label to (study, trial): without a remedy, and with it; empty if none is recommended.
    """
    comparison: RemedyComparison = step.answer
    if comparison.recommended is None:
        return {}
    row = comparison.row(comparison.recommended)
    base = step.studies["none"]
    rates = base.points["learning_rate"].astype(np.float64)
    same = int(np.argmin(np.abs(np.log(rates / row.best_learning_rate))))
    pairs = {f"none, lr {_rate_of(base, same)}": (base, same)}
    best = comparison.row("none").best_trial
    if best >= 0:
        pairs[f"none, lr {_rate_of(base, best)}"] = (base, best)
    study = step.studies[row.study]
    pairs[f"{row.remedy}, lr {_rate_of(study, row.best_trial)}"] = (study, row.best_trial)
    return pairs


def stability_decisions(verdict: Verdict, pictures: Pictures | None = None) -> list[Decision]:
    """The chapter on instability, step by step.

    Args:
      verdict: what `pbx.procedures.stabilize` returned.
      pictures: those of the page; what it has drawn is not drawn again.

    Returns:
      One decision for each step that was taken.

    Raises:
      ImportError: matplotlib is not installed.

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    picture = pictures or Pictures()
    steps = verdict.answer.steps if verdict.answer is not None else {}
    made = {
        chapter.SWEEP: lambda step: _sweep(step, picture),
        chapter.LIMIT: _limit,
        chapter.PROBE: lambda step: _probe(step, picture),
        chapter.WARMUP: _warmup,
        chapter.CLIPPING: lambda step: _clipping(step, picture),
        chapter.REMEDIES: lambda step: _remedies(step, picture),
    }
    return [made[name](step) for name, step in steps.items()]


def stability_headline(verdict: Verdict) -> tuple[str, str]:
    """What the chapter comes to, in two sentences.

    Args:
      verdict: what `pbx.procedures.stabilize` returned.

    Returns:
      The recommendation, and what it cost to find.
    """
    cost = f"It took {verdict.cost:,} trial-steps."
    answer = verdict.answer
    if answer is None:
        return "Every trial is infeasible: lower the range of learning rates.", cost
    if answer.comparison is None:
        return "Nothing was unstable, so nothing needs to be stabilized.", cost
    if answer.recommended is None:
        return (
            f"No remedy helps: train at learning rate {_shown(answer.learning_rate)}, which "
            f"reaches {_shown(answer.best_value)}.",
            cost,
        )
    return (
        f"Use {answer.recommended} at learning rate {_shown(answer.learning_rate)}: it reaches "
        f"{_shown(answer.best_value)}, against {_shown(answer.baseline_value)} without.",
        cost,
    )


@_checks.named_arguments
def write_stability_report(
    verdict: Verdict,
    directory: str | os.PathLike[str],
    name: str = "workload",
    recipe: str | None = None,
) -> Path:
    """Writes the chapter on instability as ``report.html``, one self-contained page.

    Args:
      verdict: what `pbx.procedures.stabilize` returned.
      directory: where to write; made when missing.
      name: of the workload.
      recipe: Python source of the recommended optimizer, shown as it is.

    Returns:
      The path of the page.

    Raises:
      ImportError: jinja2 or matplotlib is not installed (the extra ``report``).

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    report.check_folder(directory)
    headline, cost = stability_headline(verdict)
    decisions = stability_decisions(verdict)
    if not decisions:
        decisions = [
            Decision(
                "Learning rate sweep",
                "Which learning rate is best?",
                headline,
                TITLE,
                verdict.findings,
            )
        ]
    facts = []
    for label, study in verdict.studies.items():
        spec = study.spec
        count = f"{study.num_trials} trials x {study.num_seeds} seeds x {spec['num_steps']} steps"
        facts.append((f"Study {label}", count))
    return report.write_chapter(name, TITLE, headline, cost, decisions, directory, facts, recipe)
