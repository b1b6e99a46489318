"""One small picture of a study or several, for the page of a notebook."""

import io
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from playbook_optax import _checks
from playbook_optax._text import printable

# Of `records.study`, which imports this.
Study: TypeAlias = Any

_SIZE, _DPI = (6.0, 2.6), 80
_BEST, _OTHERS = "#0072B2", "#777777"
_MOST_CURVES, _MOST_STUDIES = 100, 40
# Numbers beyond are drawn there: axes with their margins have to fit a float.
_SMALLEST, _LARGEST = 1e-100, 1e100


def picture_of(studies: Mapping[str, Study]) -> tuple[bytes, str] | None:
    """The curves of a study's trials, or of several studies the best values of all trials.

    Args:
      studies: name to study, those of at least one trial.

    Returns:
      Bytes of a PNG without any name in it, and what it shows; None without matplotlib or where
      there is nothing finite to draw.
    """
    drawn = {name: study for name, study in studies.items() if study.num_trials}
    if not drawn:
        return None
    try:
        matplotlib = _checks.require("matplotlib", "plots", "A picture")
        figures = _checks.require("matplotlib.figure", "plots", "A picture")
    except ImportError:
        return None
    # No names, and no figure that pyplot would show a second time.
    with matplotlib.rc_context({"text.usetex": False, "figure.autolayout": False}):
        figure = figures.Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw = _curves if len(drawn) == 1 else _strips
        told = draw(axes, drawn)
        if told is None:
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue(), told


def _curves(axes: Any, studies: Mapping[str, Study]) -> str | None:
    """The objective over the steps, the best trial in colour."""
    (study,) = studies.values()
    values = _means(study, study.objective)
    step = study.data["step"].values
    order = np.argsort(_losses(study), kind="stable")
    shown = [trial for trial in order[:_MOST_CURVES] if np.isfinite(values[trial]).any()]
    if not shown:
        return None
    marker = "o" if len(step) < 3 else None
    for trial in reversed(shown):
        best = trial == shown[0]
        axes.plot(
            step,
            values[trial],
            color=_BEST if best else _OTHERS,
            linewidth=1.6 if best else 0.6,
            alpha=1.0 if best else 0.5,
            marker=marker,
            markersize=3,
        )
    _scale(axes, values[shown])
    axes.set_xlabel("step")
    return f"{_name(study.objective)} of {len(shown)} trials over the steps; blue: the best"


def _strips(axes: Any, studies: Mapping[str, Study]) -> str | None:
    """The best value of each trial, a column for each study, the best of each in colour."""
    columns = [(study, _losses(study)) for study in list(studies.values())[:_MOST_STUDIES]]
    every = []
    for place, (study, losses) in enumerate(columns):
        values = (-losses if study.maximize else losses)[np.isfinite(losses)]
        if len(values):
            every.append(values)
            axes.plot(np.full(len(values), place + 1), values, "o", color=_OTHERS, markersize=3)
            best = values.max() if study.maximize else values.min()
            axes.plot([place + 1], [best], "o", color=_BEST, markersize=6)
    if not every:
        return None
    axes.set_xlim(0.5, len(columns) + 0.5)
    axes.set_xticks(range(1, len(columns) + 1) if len(columns) <= 12 else [1, len(columns)])
    _scale(axes, np.concatenate(every))
    axes.set_xlabel("study, in the order of the table")
    objective = _name(columns[0][0].objective)
    return f"best {objective} of each trial, by study; blue: the best of a study"


def _name(objective: str) -> str:
    return printable(objective)


def _means(study: Study, name: str) -> np.ndarray:
    """A metric as float64 (trial, eval), the mean over seeds, inside of what can be laid out."""
    values = np.asarray(study.data[name].values, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        values = values.mean(axis=1) if study.num_seeds > 1 else values
    return _drawable(values)


def _drawable(values: np.ndarray) -> np.ndarray:
    within = np.sign(values) * np.clip(np.abs(values), _SMALLEST, _LARGEST)
    return np.where(np.isfinite(values), np.where(values == 0, 0.0, within), math.nan)


def _losses(study: Study) -> np.ndarray:
    """What is minimized, float64 (trial,): infinite where a trial has no value."""
    values = _means(study, study.objective)
    losses = np.where(np.isfinite(values), -values if study.maximize else values, np.inf)
    infeasible = study.data["infeasible"].values
    infeasible = infeasible.any(axis=1) if study.num_seeds > 1 else infeasible
    return np.where(infeasible, np.inf, losses.min(axis=1, initial=np.inf))


def _scale(axes: Any, values: np.ndarray) -> None:
    """A log scale where values are positive and span decades."""
    seen = values[np.isfinite(values)]
    if seen.min() > 0 and seen.max() >= 10 * seen.min():
        axes.set_yscale("log")
