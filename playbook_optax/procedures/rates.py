"""Several learning rates that are searched apart and follow one schedule together."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax

from playbook_optax import _checks
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.search_space import Categorical, Float, Integer, Parameter, SearchSpace
from playbook_optax.trials.stepper import MakeOptimizer

_LIKE_RATES = ("*learning_rate*", "lr", "lr_*", "*_lr", "*_lr_*")


def look_like_rates(names: Iterable[str]) -> tuple[str, ...]:
    """Hyperparameters that people would call learning rates.

    Args:
      names: of a search space.

    Returns:
      Those with a name such as ``lr_head`` or ``body_learning_rate``.
    """
    found = []
    for name in names:
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _LIKE_RATES):
            found.append(name)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class ScaledRates:
    """An optimizer of a point with several learning rates, each times one factor or schedule.

    Attributes:
      make_optimizer: the user's, of a point without ``learning_rate``.
      names: the learning rates.
    """

    make_optimizer: MakeOptimizer
    names: tuple[str, ...]

    def __call__(self, point: Mapping[str, Any]) -> optax.GradientTransformation:
        """The transformation at a point whose ``learning_rate`` is the factor or its schedule."""
        factor = point[LEARNING_RATE]
        own = {name: value for name, value in point.items() if name != LEARNING_RATE}
        return self.make_optimizer({**own, **{n: _scaled(own[n], factor) for n in self.names}})


def _scaled(rate: Any, factor: Any) -> Any:
    if callable(factor):
        return lambda count: rate * factor(count)
    return rate * factor


def check_rates(learning_rates: Sequence[str] | None, space: SearchSpace) -> tuple[str, ...]:
    """The learning rates that a user names.

    Args:
      learning_rates: names of hyperparameters, or None.
      space: the search space.

    Returns:
      The names; none where ``learning_rate`` is the only one.

    Raises:
      ValueError: a name that is not in the space, ``learning_rate`` beside others, or a range that
        reaches 0.
      ArgumentTypeError: no sequence of names, or a rate that is no `Float`.
    """
    if learning_rates is None:
        return ()
    names = tuple(learning_rates)
    if isinstance(learning_rates, str) or not all(isinstance(name, str) for name in names):
        raise _checks.ArgumentTypeError(
            f"learning_rates must be names of hyperparameters, such as ('lr_head', 'lr_body'), got "
            f"{learning_rates!r}."
        )
    if not names:
        raise ValueError("learning_rates must name at least one hyperparameter.")
    if names == (LEARNING_RATE,):
        return ()
    if LEARNING_RATE in space:
        raise ValueError(
            f"the space has {LEARNING_RATE!r} beside learning_rates = {names!r}, for all of "
            f"which {LEARNING_RATE!r} is the common factor: give it another name."
        )
    for name in names:
        if name not in space:
            raise ValueError(
                f"learning_rates has {name!r}, which is not in the space: "
                f"{_checks.nearest(name, list(space))}"
            )
        parameter = space[name]
        if not isinstance(parameter, Float):
            raise _checks.ArgumentTypeError(f"space[{name!r}] must be a pbx.Float, got {parameter}")
        if parameter.low <= 0:
            raise ValueError(
                f"space[{name!r}] must lie above 0 to be scaled with the other learning rates, got "
                f"low = {parameter.low:g}."
            )
    return names


def factors(space: SearchSpace, names: Sequence[str], middle: Mapping[str, Any]) -> Float | None:
    """Factors by which all learning rates may be scaled and stay in their ranges.

    Args:
      space: the search space.
      names: the learning rates.
      middle: the middle of each range, name to number.

    Returns:
      The range of the factor, on a log scale; None where it is a single one.
    """
    lows, highs = [], []
    for name in names:
        line = space[name]
        assert isinstance(line, Float)
        lows.append(float(line.low / middle[name]))
        highs.append(float(line.high / middle[name]))
    return Float(max(lows), min(highs), scale="log") if max(lows) < min(highs) else None


def around(line: Float, centre: float, factor: float) -> Float:
    """A range around a rate, inside the range that the user gave.

    Args:
      line: the range of the user.
      centre: the rate.
      factor: how far it may be left, up and down.

    Returns:
      The range, on a log scale.
    """
    low = max(float(line.low), centre / factor)
    high = min(float(line.high), centre * factor)
    if not low < high:
        low, high = float(line.low), float(line.high)
    return Float(low, high, scale="log")


def within(space: SearchSpace, bound: SearchSpace | None) -> SearchSpace:
    """A space whose ranges do not leave those of another.

    Args:
      space: what a procedure proposes.
      bound: what the user gave; None bounds nothing.

    Returns:
      The space; a range that lies outside altogether becomes that of the user.
    """
    if bound is None:
        return space
    return SearchSpace({name: _within(line, bound.get(name)) for name, line in space.items()})


def _within(parameter: Parameter, bound: Parameter | None) -> Parameter:
    if not isinstance(bound, (Float, Integer)) or isinstance(parameter, Categorical):
        return parameter
    ends: dict[str, Any] = {
        "low": max(parameter.low, bound.low),
        "high": min(parameter.high, bound.high),
    }
    if not ends["low"] < ends["high"]:
        return bound
    if (parameter.low, parameter.high) == tuple(ends.values()):
        return parameter
    return dataclasses.replace(parameter, **ends)
