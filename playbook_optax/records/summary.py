"""What a study is, in words: its best point, its ranges, on what it ran."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from playbook_optax._shown import number
from playbook_optax._text import printable
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

_MOST_NAMES = 12


def point_text(point: Mapping[str, Any], space: SearchSpace | None) -> str:
    """A point on one line, the choice of a categorical by its label.

    Args:
      point: name to value.
      space: the space that it came from, if it is known.

    Returns:
      ``name=value`` with commas between.
    """
    return _few([f"{printable(name)}={_value(name, point[name], space)}" for name in point], ", ")


def ranges_text(points: Mapping[str, np.ndarray], space: SearchSpace | None) -> str:
    """Where each hyperparameter was looked for, or, without a space, from where to where it went.

    Args:
      points: name to values, shape (trial,).
      space: the space that they came from, if it is known.

    Returns:
      ``name low to high`` with semicolons between.
    """
    told = [f"{printable(name)} {_range(name, points[name], space)}" for name in points]
    return _few(told, "; ")


def environment_text(spec: Mapping[str, Any]) -> str:
    """On what a study ran, as far as its spec says.

    Args:
      spec: of the study, from anywhere.

    Returns:
      Device kind and versions with commas between; empty if it says neither.
    """
    versions = spec.get("versions")
    told = [printable(spec["device_kind"])] if spec.get("device_kind") else []
    if isinstance(versions, Mapping):
        told += [f"{printable(n, 20)} {printable(v, 20)}" for n, v in versions.items()]
    return _few(told, ", ")


def _few(told: Sequence[str], between: str) -> str:
    more = len(told) - _MOST_NAMES
    return between.join([*told[:_MOST_NAMES], *([f"{more} more"] if more > 0 else [])])


def _value(name: str, value: Any, space: SearchSpace | None) -> str:
    try:
        if space is not None and name in space and not isinstance(value, str):
            value = space.label(name, value)
        return number(value)
    except ValueError:
        return printable(value, 30)


def _range(name: str, values: np.ndarray, space: SearchSpace | None) -> str:
    parameter = space[name] if space is not None and name in space else None
    if isinstance(parameter, Float | Integer):
        zero = "0, and " if isinstance(parameter, Integer) and parameter.include_zero else ""
        scale = "" if parameter.scale == "linear" else f" ({parameter.scale})"
        return f"{zero}{number(parameter.low)} to {number(parameter.high)}{scale}"
    if isinstance(parameter, Categorical):
        return _few([printable(label, 30) for label in parameter.labels], " | ")
    if not len(values):
        return "unknown"
    kinds = np.unique(values)
    if values.dtype.kind not in "iuf":
        return _few([printable(kind, 30) for kind in kinds], " | ")
    low, high = number(kinds[0]), number(kinds[-1])
    return low if low == high else f"{low} to {high}"
