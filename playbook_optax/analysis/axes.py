"""One hyperparameter as an axis: its values, its scale, its range and each trial's place on it."""

from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study
from playbook_optax.search_space import Integer


@_shown.short
class Axis(NamedTuple):
    """One hyperparameter of a study.

    Attributes:
      name: its name.
      kind: "float", "integer" or "categorical".
      scale: "linear", "log" or "reverse_log" (logarithmic in 1 - x); "linear" for a categorical.
      values: (trial,) each trial's value; the index of its choice for a categorical.
      unit: (trial,) its place in the range, 0 at `low` and 1 at `high`, on the scale.
      low: lower end of the search space, or the smallest value seen without one; 0 for a log
        range that includes it.
      high: upper end.
      start: where the scale starts: `low`, or where 0 is placed on a log scale, at half of the
        smallest value above it.
      declared: whether range and scale come from a search space, or were read off the trials.
      labels: the choices of a categorical, as text; empty otherwise.
    """

    name: str
    kind: str
    scale: str
    values: np.ndarray
    unit: np.ndarray
    low: float
    high: float
    start: float
    declared: bool
    labels: tuple[str, ...]


def to_scale(x: Any, scale: str) -> np.ndarray:
    """The coordinate in which the scale is linear and increasing.

    Args:
      x: values.
      scale: "linear", "log" or "reverse_log".

    Returns:
      x, log x or -log(1 - x), float64.
    """
    x = np.asarray(x, np.float64)
    if scale == "log":
        return np.log(x)
    if scale == "reverse_log":
        return -np.log1p(-x)
    return x


def from_scale(y: Any, scale: str) -> np.ndarray:
    """The inverse of `to_scale`.

    Args:
      y: coordinates.
      scale: "linear", "log" or "reverse_log".

    Returns:
      The values, float64.
    """
    y = np.asarray(y, np.float64)
    if scale == "log":
        return np.exp(y)
    if scale == "reverse_log":
        return -np.expm1(-y)
    return y


def drawn_at(values: np.ndarray, start: float, scale: str) -> np.ndarray:
    """The values, with the 0 of a log range moved to where the scale starts.

    Args:
      values: values.
      start: where the scale starts.
      scale: "linear", "log" or "reverse_log".

    Returns:
      An array of the same shape.
    """
    return np.where(values == 0, start, values) if scale == "log" else values


def hyperparameters(study: Study) -> list[str]:
    """Names of the hyperparameters of a study.

    Args:
      study: the study.

    Returns:
      The names, in the order of the search space, or of the record without one.
    """
    names = list(study.points)
    if study.space is None:
        return names
    first = [n for n in study.space if n in names]
    return first + [n for n in names if n not in first]


def _guess_scale(values: np.ndarray) -> str:
    """A scale for trials from elsewhere: logarithmic when they span more than a decade."""
    with np.errstate(over="ignore"):
        decade = 10 * values.min()
    if values.min() > 0 and values.max() > decade:
        return "log"
    if values.min() >= 0.5 and values.max() < 1:
        gaps = 1 - values
        if gaps.max() > 10 * gaps.min():
            return "reverse_log"
    return "linear"


def axis(study: Study, name: str) -> Axis:
    """Reads one hyperparameter of a study as an axis.

    Without a search space, or for a hyperparameter outside it, the range is that of the trials
    and the scale is guessed: logarithmic for positive values that span more than a decade,
    logarithmic in 1 - x for values in [0.5, 1) whose 1 - x does, otherwise linear.

    Args:
      study: the study.
      name: a hyperparameter.

    Returns:
      The Axis.

    Raises:
      ValueError: there is no such hyperparameter.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"learning_rate": np.array([0.01, 0.1, 1.0])}, {"loss": np.ones((3, 1))},
      ...     np.array([0]), objective="loss")
      >>> axis(study, "learning_rate").scale, axis(study, "learning_rate").unit
      ('log', array([0. , 0.5, 1. ]))

    Source: "How can optimization failures be debugged and mitigated?" (axis plots).
    """
    names = hyperparameters(study)
    if name not in names:
        raise ValueError(
            f"hyperparameter = {name!r} is not in the study: {_checks.nearest(name, names)}"
        )
    raw = study.data.coords[name].values
    if "float" in raw.dtype.name:  # bfloat16 and its like are of no kind that NumPy knows.
        raw = raw.astype(np.float64)
    space: Any = study.space
    parameter = space[name] if space is not None and name in space else None
    choices = getattr(parameter, "values", None)
    if choices is not None or raw.dtype.kind not in "iuf":
        return _categorical(name, raw, choices)
    values = raw.astype(np.float64)
    if parameter is not None:
        scale, low, high = parameter.scale, float(parameter.low), float(parameter.high)
    else:
        scale, low, high = _guess_scale(values), float(values.min()), float(values.max())
    start = low
    if getattr(parameter, "include_zero", False):
        start, low = low / 2, 0.0
    ends = to_scale([start, high], scale)
    place = to_scale(drawn_at(values, start, scale), scale)
    if abs(ends).max() > np.finfo(np.float64).max / 4:  # A width that no float holds.
        ends, place = ends / 4, place / 4
    width = ends[1] - ends[0]
    unit = (place - ends[0]) / width if width > 0 else np.full(len(values), 0.5)
    whole = raw.dtype.kind in "iu" if parameter is None else isinstance(parameter, Integer)
    kind = "integer" if whole else "float"
    return Axis(name, kind, scale, values, unit, low, high, start, parameter is not None, ())


def _categorical(name: str, raw: np.ndarray, choices: Any) -> Axis:
    """A hyperparameter without an order, placed by the index of its choice."""
    if choices is None:
        choices = sorted({str(v) for v in raw})
        index = np.asarray([choices.index(str(v)) for v in raw], np.float64)
    elif raw.dtype.kind in "iuf" and _are_numbers(choices):
        numbers = np.asarray(choices, np.float64)
        index = np.abs(raw.astype(np.float64)[:, None] - numbers[None, :]).argmin(axis=1)
        index = index.astype(np.float64)
    elif raw.dtype.kind in "iu":
        index = raw.astype(np.float64)
    else:
        labels = [str(c) for c in choices]
        index = np.asarray([labels.index(str(v)) for v in raw], np.float64)
    last = len(choices) - 1
    unit = index / max(last, 1)
    return Axis(
        name,
        "categorical",
        "linear",
        index,
        unit,
        0.0,
        float(last),
        0.0,
        True,
        tuple(map(str, choices)),
    )


def _are_numbers(choices: Any) -> bool:
    """Whether points hold the choices themselves, not their indices."""
    booleans = [isinstance(c, bool) for c in choices]
    return all(isinstance(c, (int, float)) for c in choices) and len(set(booleans)) == 1


@_shown.short
class AxisPlot(NamedTuple):
    """What an axis plot draws.

    Attributes:
      axis: the hyperparameter.
      outcomes: how the trials ended.
      x: (trial,) where each trial is drawn: the value, 1 - value on a reverse_log scale, or the
        index of a choice.
      infeasible_share: share of infeasible trials.
    """

    axis: Axis
    outcomes: Outcomes
    x: np.ndarray
    infeasible_share: float


def axis_plot_info(
    study: Study, name: str, objective: str | None = None, maximize: bool | None = None
) -> AxisPlot:
    """The table behind `plot_axis`.

    Args:
      study: the study.
      name: a hyperparameter.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The AxisPlot.

    Raises:
      ValueError: no such hyperparameter or metric.

    Source: "Identifying bad search space boundaries" (axis plots).
    """
    line = axis(study, name)
    out = outcomes(study, objective, maximize)
    x = drawn_at(line.values, line.start, line.scale)
    if line.scale == "reverse_log":
        x = 1 - x
    share = float(out.infeasible.mean()) if out.num_trials else 0.0
    return AxisPlot(line, out, x, share)
