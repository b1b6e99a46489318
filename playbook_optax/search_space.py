"""Search spaces: what is searched, on which scale, and the way from the unit cube to points.

A `SearchSpace` maps names to `Float`, `Integer` and `Categorical` parameters. Its points are a
dictionary of arrays, one per name with shape (trial,): data, to be vmapped over.

The way from a unit position to a value uses integer arithmetic, exact products and tables where
`exp` or a multiply-add would do, because the last bit of those depends on the length of the array
and on what the compiler fuses; a point must not. So NumPy gives the same bits: it computes what is
known already, and JAX what is traced or on a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import samplers
from playbook_optax._checks import (
    ArgumentTypeError,
    check_choice,
    check_count,
    check_number,
    is_traced,
    named_arguments,
    nearest,
)

_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)
_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
_FLOAT_SCALES = ("linear", "log", "reverse_log")
_INTEGER_SCALES = ("linear", "log")
# Positions below this count as 0: with smaller ones the results would depend on whether a device
# flushes subnormal numbers to 0. Samplers give none.
_UNIT_TINY = np.float32(2**-48)
# Up to so many known coordinates become values in NumPy.
_HOST_VALUES = 2**20


def _static_number(name: str, value: Any, fix: str) -> None:
    """Checks a bound, which is part of the study and not of a point, so it is never traced."""
    if is_traced(value):
        raise ArgumentTypeError(f"{name} must be a concrete number, got the tracer {value}. {fix}")
    check_number(name, value, fix=fix)


@dataclasses.dataclass(frozen=True, init=False)
class Float:
    """A real hyperparameter in [low, high]; its values are float32.

    No value leaves [low, high], also after rounding to float32. Scales: ``"linear"``; ``"log"``,
    uniform in log x; ``"reverse_log"``, uniform in log(1 - x), for what lives near 1, such as
    momentum or b2.

    Source: "Why use quasi-random search instead of more sophisticated black box optimization
    algorithms during the exploration phase of tuning?".

    Example:
      >>> from playbook_optax.search_space import Float
      >>> Float(1e-4, 1e-1, scale="log")
      Float(low=0.0001, high=0.1, scale='log')

    Args:
      low: smallest value.
      high: largest value; below 1 for ``"reverse_log"``.
      scale: ``"linear"``, ``"log"`` or ``"reverse_log"``.

    Raises:
      ValueError: a bound is not a finite number, low >= high, the scale is unknown or the range
        does not suit it, or no float32 lies in the range.
    """

    low: float
    high: float
    scale: str

    @named_arguments
    def __init__(self, low: float, high: float, scale: str = "linear") -> None:
        check_choice("scale", scale, _FLOAT_SCALES)
        for name, bound in (("low", low), ("high", high)):
            _static_number(name, bound, "Give the bounds of the range as numbers.")
        low, high = float(low), float(high)
        _check_order(low, high)
        if scale == "log":
            check_number(
                "low",
                low,
                at_least=_FLOAT_TINY,
                fix="A log range starts above 0; use scale='linear', or a small positive low.",
            )
        if scale == "reverse_log":
            check_number(
                "high",
                high,
                below=1.0,
                fix="A reverse_log range ends below 1; give, say, high=0.999.",
            )
        if max(-low, high, high - low) > _FLOAT_MAX:
            raise ValueError(
                f"low = {low!r} and high = {high!r} span more than float32 can hold, "
                f"{_FLOAT_MAX:.3g}. Narrow the range."
            )
        first, last = _float32_inside(low, high)
        if first > last:
            raise ValueError(
                f"low = {low!r} and high = {high!r} have no float32 between them. Widen the range."
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "scale", scale)

    def from_unit(self, unit: chex.Array) -> chex.Array:
        """Values at positions in [0, 1]: float32, the shape of `unit`, rising with `unit`."""
        return _values(self, unit)

    def _values(self, unit: Any, xp: ModuleType) -> Any:
        if self.scale == "linear":
            # In units of a power of two, where no product of parts is too small for float32.
            size = self._size()
            low = self.low / size if abs(self.low / size) >= _FLOAT_TINY else 0.0
            unit = xp.where(unit < _UNIT_TINY, np.float32(0), unit)
            value = np.float32(low) + _product(unit, (self.high - self.low) / size)
            flushed = abs(value) < np.float32(_FLOAT_TINY / size)
            value = xp.where(flushed, np.float32(0), value) * np.float32(size)
        elif self.scale == "log":
            value = _exp2_between(unit, math.log2(self.low), math.log2(self.high), xp)
        else:
            ends = math.log2(1 - self.low), math.log2(1 - self.high)
            value = 1 - _exp2_between(unit, *ends, xp)
        return xp.clip(value, *_float32_inside(self.low, self.high))

    def to_unit(self, value: chex.Array) -> chex.Array:
        """Positions in [0, 1] of values: float32, the shape of `value`; inverse of `from_unit`."""
        value = jnp.asarray(value, jnp.float32)
        if self.scale == "linear":
            size = self._size()
            value = value * np.float32(1 / size) - np.float32(self.low / size)
            unit = value / np.float32((self.high - self.low) / size)
        else:
            ends = (self.low, self.high)
            if self.scale == "reverse_log":
                value, ends = 1 - value, (1 - self.low, 1 - self.high)
            unit = _log_position(value, *ends)
        return jnp.clip(unit, 0, 1)

    def _size(self) -> float:
        # 2**-126 to 2**126, because its inverse must be a float32 as well.
        exponent = math.frexp(max(abs(self.low), abs(self.high)))[1] - 1
        return 2.0 ** min(max(exponent, -126), 126)

    def grid(self, num: int) -> np.ndarray:
        """`num` values evenly spaced on the scale, both ends included (one value: the middle)."""
        num = check_count("num_per_dimension", num)
        unit = np.linspace(0.0, 1.0, num) if num > 1 else np.array([0.5])
        if self.scale == "linear":
            value = self.low + unit * (self.high - self.low)
        elif self.scale == "log":
            value = np.exp(math.log(self.low) * (1 - unit) + math.log(self.high) * unit)
        else:
            value = 1 - np.exp(math.log(1 - self.low) * (1 - unit) + math.log(1 - self.high) * unit)
        return np.clip(value.astype(np.float32), *_float32_inside(self.low, self.high))

    def to_dict(self) -> dict[str, Any]:
        """The parameter as JSON-able data."""
        return {"kind": "float", "low": self.low, "high": self.high, "scale": self.scale}


@dataclasses.dataclass(frozen=True, init=False)
class Integer:
    """A whole-number hyperparameter in [low, high], both included; its values are int32.

    With ``scale="linear"`` every value has the same share. With ``"log"`` a value v has the share
    of [v - 1/2, v + 1/2] in log space; the arithmetic is float32, so above 2**24 only values that
    float32 holds occur. ``include_zero=True`` puts 0 in front of a log range, with the share of
    the doubling below `low`: warm-up steps of 0, 10 … 10,000, for example.

    Source: "How to apply learning rate warmup" sweeps such a range in orders of magnitude.

    Example:
      >>> from playbook_optax.search_space import Integer
      >>> Integer(10, 1000, scale="log", include_zero=True).grid(4).tolist()
      [0, 10, 100, 1000]

    Args:
      low: smallest value (but for 0, if included).
      high: largest value, included.
      scale: ``"linear"`` or ``"log"``.
      include_zero: whether 0 goes in front of a log range.

    Raises:
      ValueError: a bound is not an int32, low >= high, or the scale is unknown or does not suit.
    """

    low: int
    high: int
    scale: str
    include_zero: bool

    @named_arguments
    def __init__(
        self, low: int, high: int, scale: str = "linear", include_zero: bool = False
    ) -> None:
        check_choice("scale", scale, _INTEGER_SCALES)
        for name, bound in (("low", low), ("high", high)):
            fix = "Give the bounds of the range as integers, or use Float."
            _static_number(name, bound, fix)
            if not float(bound).is_integer():
                raise ValueError(f"{name} must be a whole number, got {bound!r}. {fix}")
            if not _INT_MIN <= int(bound) <= _INT_MAX:
                raise ValueError(f"{name} must fit into int32, got {bound!r}. Narrow the range.")
        low, high = int(low), int(high)
        _check_order(low, high)
        if high - low + 1 > 2**32 - 1:
            raise ValueError(
                f"low = {low} and high = {high} span all of int32, one value too many. Narrow the "
                "range."
            )
        if scale == "log" and low < 1:
            raise ValueError(
                f"low must be >= 1, got {low}. A log range starts above 0; use low=1 with "
                "include_zero=True, or scale='linear'."
            )
        if not isinstance(include_zero, (bool, np.bool_)):
            raise ArgumentTypeError(f"include_zero must be True or False, got {include_zero!r}.")
        if include_zero and scale != "log":
            raise ValueError(
                f"include_zero = True needs scale='log', got scale = {scale!r}. Use low=0 in a "
                "linear range."
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "include_zero", bool(include_zero))

    def from_unit(self, unit: chex.Array) -> chex.Array:
        """Values at positions in [0, 1]: int32, the shape of `unit`, rising with `unit`."""
        return _values(self, unit)

    def _values(self, unit: Any, xp: ModuleType) -> Any:
        if self.scale == "linear":
            # Modulo 2**32, so that a wide range with a negative low comes out right as well.
            share = _share(unit, self.high - self.low + 1, xp)
            return (share + np.uint32(self.low % 2**32)).astype(np.int32)
        real = _exp2_between(unit, *self._log_ends(), xp)
        nearest_value = xp.clip(xp.floor(real + 0.5), *_float32_inside(self.low, self.high))
        whole = nearest_value.astype(np.int32)
        if self.include_zero:
            whole = xp.where(real < np.float32(self.low - 0.5), np.int32(0), whole)
        return whole

    def to_unit(self, value: chex.Array) -> chex.Array:
        """Positions in [0, 1] of values, inside each value's share: float32, shape of `value`."""
        value = jnp.asarray(value, jnp.int32)
        if self.scale == "linear":
            # The difference is exact modulo 2**32; only then is it rounded.
            rank = value.astype(jnp.uint32) - np.uint32(self.low % 2**32)
            unit = (rank.astype(jnp.float32) + 0.5) / np.float32(self.high - self.low + 1)
        else:
            low, high = (2.0**end for end in self._log_ends())
            real = value.astype(jnp.float32)
            if self.include_zero:
                middle_of_zero = (self.low - 0.5) / math.sqrt(2)
                real = jnp.where(value == 0, np.float32(middle_of_zero), real)
            unit = _log_position(real, low, high)
        return jnp.clip(unit, 0, 1)

    def _log_ends(self) -> tuple[float, float]:
        low = math.log2(self.low - 0.5) - (1.0 if self.include_zero else 0.0)
        return low, math.log2(self.high + 0.5)

    def grid(self, num: int) -> np.ndarray:
        """Up to `num` distinct values evenly spaced on the scale, both ends (and 0) included."""
        num = check_count("num_per_dimension", num)
        zero = [0] if self.include_zero else []
        inner = num - len(zero)
        if inner <= 0:
            return np.array(zero, np.int32)
        unit = np.linspace(0.0, 1.0, inner) if inner > 1 else np.array([0.5])
        if self.scale == "linear":
            real = self.low + unit * (self.high - self.low)
        else:
            real = np.exp(math.log(self.low) * (1 - unit) + math.log(self.high) * unit)
        whole = np.clip(np.floor(real + 0.5), self.low, self.high).astype(np.int64)
        return np.unique(np.concatenate([np.array(zero, np.int64), whole])).astype(np.int32)

    def to_dict(self) -> dict[str, Any]:
        """The parameter as JSON-able data."""
        return {
            "kind": "integer",
            "low": self.low,
            "high": self.high,
            "scale": self.scale,
            "include_zero": self.include_zero,
        }


@dataclasses.dataclass(frozen=True, init=False, eq=False)
class Categorical:
    """A choice among values that change numbers, not the structure of the program.

    If all values are numbers, points hold the numbers themselves: int32 when all are integers,
    float32 otherwise. Booleans are numbers as well, True 1 and False 0, in int32. Anything else
    (strings, None, a mixture) reaches the trial as its int32 index into `values`. `label` says what
    a number means. A choice that changes the structure of the program (an optimizer, a width)
    belongs in a study of its own.

    Source: "Why use quasi-random search instead of more sophisticated black box optimization
    algorithms during the exploration phase of tuning?".

    Example:
      >>> from playbook_optax.search_space import Categorical
      >>> Categorical([16, 64, 256]).label(64)
      '64'
      >>> Categorical(["cosine", "linear"]).label(1)
      'linear'

    Args:
      values: the choices, at least one, all different.

    Raises:
      ValueError: there is no value, one is there twice, or a number does not fit.
    """

    values: tuple[Any, ...]

    @named_arguments
    def __init__(self, values: Iterable[Any]) -> None:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise ArgumentTypeError(
                f"values must be a list of choices, got {values!r}. Write Categorical([...])."
            )
        choices = tuple(v.item() if isinstance(v, np.generic) else v for v in values)
        if not choices:
            raise ValueError("values must hold at least one choice, got none.")
        object.__setattr__(self, "values", choices)
        dtype = self._dtype
        if self.numeric:
            for value in choices:
                check_number("values", value, fix="Give finite numbers, or strings as labels.")
                inside = _INT_MIN <= value <= _INT_MAX or dtype is np.float32
                if not inside or abs(value) > _FLOAT_MAX:
                    raise ValueError(
                        f"values must fit into {dtype.__name__}, got {value!r}. Use smaller "
                        "numbers, or strings as labels."
                    )
        seen: set[Any] = set()
        for label, code in zip(self.labels, self.codes.tolist(), strict=True):
            mark = code if self.numeric else label
            if mark in seen:
                raise ValueError(
                    f"values must be different, got {label} twice (as float32 or label). Drop one."
                )
            seen.add(mark)

    @property
    def numeric(self) -> bool:
        """Whether the values are numbers, which have an order and a distance."""
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)

    @property
    def labels(self) -> tuple[str, ...]:
        """What to call each value in front of people."""
        return tuple(_label(v) for v in self.values)

    @property
    def boolean(self) -> bool:
        """Whether every value is True or False."""
        return all(isinstance(v, bool) for v in self.values)

    @property
    def codes(self) -> np.ndarray:
        """What points hold for each value: numbers themselves, otherwise indices."""
        if not (self.numeric or self.boolean):
            return np.arange(len(self.values), dtype=np.int32)
        return np.array(self.values, self._dtype)

    @property
    def _dtype(self) -> type[np.int32] | type[np.float32]:
        numbers = self.numeric and not all(isinstance(v, int) for v in self.values)
        return np.float32 if numbers else np.int32

    def __eq__(self, other: object) -> bool:
        # Labels tell True from 1 and 1.0, which Python's == does not.
        if not isinstance(other, Categorical):
            return NotImplemented
        return self.labels == other.labels and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.labels)

    def label(self, value: Any) -> str:
        """The label of what a point holds: a number, or the index of the choice.

        Args:
          value: a concrete scalar out of a point.

        Returns:
          The label.

        Raises:
          ValueError: it is none of the choices.
        """
        (found,) = np.nonzero(self.codes == np.asarray(value))
        if not found.size:
            raise ValueError(f"value = {value!r} is not a choice of {self}.")
        return self.labels[int(found[0])]

    def from_unit(self, unit: chex.Array) -> chex.Array:
        """Numbers or indices at positions in [0, 1]: equal shares, the shape of `unit`."""
        return _values(self, unit)

    def _values(self, unit: Any, xp: ModuleType) -> Any:
        index = _share(unit, len(self.values), xp).astype(np.int32)
        return xp.asarray(self.codes)[index]

    def to_unit(self, value: chex.Array) -> chex.Array:
        """The centre of the share of the choice nearest to each value: float32."""
        codes = self.codes
        value = jnp.asarray(value, codes.dtype)
        order = np.argsort(codes, kind="stable")
        # Half-way points between neighbours, in sorted order, name the nearest choice.
        middles = (codes[order][1:].astype(np.float64) + codes[order][:-1]) / 2
        position = jnp.searchsorted(middles.astype(np.float32), value.astype(jnp.float32))
        index = jnp.asarray(order.astype(np.int32))[position]
        return (index.astype(jnp.float32) + 0.5) / np.float32(len(codes))

    def grid(self, num: int | None = None) -> np.ndarray:
        """All choices, in the order given; `num`, if given, must say how many there are."""
        if num is not None and check_count("num_per_dimension", num) != len(self.values):
            raise ValueError(
                f"num_per_dimension = {num} for a choice among {len(self.values)}: a grid takes "
                "all choices. Leave it out."
            )
        return self.codes

    def to_dict(self) -> dict[str, Any]:
        """The parameter as JSON-able data; a value that JSON cannot hold becomes its label."""
        plain = [v if _is_plain(v) else _label(v) for v in self.values]
        return {"kind": "boolean" if self.boolean else "categorical", "values": plain}


Parameter: TypeAlias = Float | Integer | Categorical
Sampler: TypeAlias = Callable[..., chex.Array]

_KINDS: dict[str, type[Any]] = {
    "float": Float,
    "integer": Integer,
    "categorical": Categorical,
    "boolean": Categorical,
}


class SearchSpace(Mapping[str, Parameter]):
    """An ordered mapping of names to parameters; dimension j is the j-th inserted.

    Immutable and hashable, so it can be a static argument of `jax.jit`. Two spaces are equal if
    their names, parameters and order are.

    Source: "Why use quasi-random search instead of more sophisticated black box optimization
    algorithms during the exploration phase of tuning?".

    Example:
      >>> import jax
      >>> from playbook_optax.search_space import Float, Integer, SearchSpace
      >>> space = SearchSpace({
      ...     "learning_rate": Float(1e-4, 1e-1, scale="log"),
      ...     "warmup_steps": Integer(10, 1000, scale="log", include_zero=True),
      ... })
      >>> points = space.sample(jax.random.key(0), num_trials=16)
      >>> {name: (values.shape, str(values.dtype)) for name, values in points.items()}
      {'learning_rate': ((16,), 'float32'), 'warmup_steps': ((16,), 'int32')}

    Args:
      parameters: a mapping ``{name: parameter}``, or a sequence of ``(name, parameter)`` pairs.

    Raises:
      ValueError: there is no parameter, a name is not a string, empty or there twice, or a
        parameter is not a `Float`, `Integer` or `Categorical`.
    """

    __slots__ = ("_parameters",)
    _parameters: dict[str, Parameter]

    @named_arguments
    def __init__(
        self, parameters: Mapping[str, Parameter] | Sequence[tuple[str, Parameter]]
    ) -> None:
        if isinstance(parameters, Mapping):
            pairs = list(parameters.items())
        elif isinstance(parameters, Sequence) and all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in parameters
        ):
            pairs = [(name, parameter) for name, parameter in parameters]
        else:
            raise ArgumentTypeError(
                f"parameters must be a dict of name to parameter, got {parameters!r}. Write "
                "SearchSpace({'learning_rate': Float(1e-4, 1e-1, scale='log')})."
            )
        if not pairs:
            raise ValueError("parameters must hold at least one parameter, got none.")
        checked: dict[str, Parameter] = {}
        for name, parameter in pairs:
            if not isinstance(name, str) or not name:
                raise ArgumentTypeError(
                    f"parameters: a name must be a non-empty string, got {name!r}."
                )
            if name in checked:
                raise ValueError(
                    f"parameters: the name {name!r} is there twice. Rename or drop one."
                )
            if not isinstance(parameter, (Float, Integer, Categorical)):
                raise ArgumentTypeError(
                    f"parameters[{name!r}] must be a Float, Integer or Categorical, got "
                    f"{parameter!r}. A fixed value belongs in make_optimizer."
                )
            checked[name] = parameter
        object.__setattr__(self, "_parameters", checked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(
            f"A SearchSpace is immutable: cannot set {name!r}. Make a new one from dict(space)."
        )

    def __getitem__(self, name: str) -> Parameter:
        try:
            return self._parameters[name]
        except KeyError:
            raise KeyError(f"no parameter {name!r}: {nearest(name, self._parameters)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SearchSpace):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"SearchSpace({self._parameters!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return SearchSpace, (self._parameters,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the dimensions."""
        return tuple(self._parameters)

    @named_arguments
    def sample(
        self,
        key: chex.PRNGKey,
        num_trials: int,
        start: chex.Numeric = 0,
        sampler: Sampler = samplers.halton,
    ) -> dict[str, chex.Array]:
        """Points ``start, start + 1, …`` of this space.

        Point i, parameter j depends on ``(key, i, j)`` alone, bit for bit: more trials, a later
        `start`, or parameters added at the end never change it.

        Example:
          >>> import jax
          >>> from playbook_optax import samplers
          >>> from playbook_optax.search_space import Float, SearchSpace
          >>> space = SearchSpace({"learning_rate": Float(1e-4, 1e-1, scale="log")})
          >>> space.sample(jax.random.key(0), 8, sampler=samplers.uniform)["learning_rate"].shape
          (8,)

        Args:
          key: a PRNG key, shape (); used as it is.
          num_trials: number of points, static.
          start: index of the first point; may be traced.
          sampler: ``(key, num_points, num_dims, start=) -> (num_points, num_dims)`` in [0, 1).

        Returns:
          Name to array of shape (trial,): float32 or int32.

        Raises:
          ValueError: `num_trials` is not a positive integer, an index would reach 2**31, or the
            sampler is not callable, returns another shape or a known position outside [0, 1].
        """
        fix = "Ask for at least one trial."
        num_trials = check_count("num_trials", num_trials, fix=fix)
        if not callable(sampler):
            raise ArgumentTypeError(
                f"sampler must be a function such as samplers.halton, got {sampler!r}."
            )
        unit = sampler(key, num_trials, len(self), start=start)
        shape = (num_trials, len(self))
        if np.shape(unit) != shape:
            raise ValueError(
                f"sampler {sampler!r} must return shape {shape}, got {np.shape(unit)}."
            )
        if isinstance(unit, jax.Array) and not is_traced(unit) and unit.size <= _HOST_VALUES:
            unit = jax.device_get(unit)
        return self.from_unit(unit)

    @named_arguments
    def grid(self, num_per_dimension: int | Mapping[str, int]) -> dict[str, chex.Array]:
        """The full grid: every combination, the last parameter running fastest.

        A `Float` gets evenly spaced values on its scale, both ends included (the middle, if one);
        an `Integer` at most as many as it has; a `Categorical` always all of its choices. Fine in
        one or two dimensions. Unlike samples, the points depend on their number (design, law 2).

        Source: "Why use quasi-random search instead of more sophisticated black box optimization
        algorithms during the exploration phase of tuning?".

        Example:
          >>> from playbook_optax.search_space import Float, SearchSpace
          >>> space = SearchSpace({"a": Float(0.0, 1.0), "b": Float(0.0, 2.0)})
          >>> space.grid({"a": 2, "b": 3})["b"].tolist()
          [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]

        Args:
          num_per_dimension: number of values, one for all or one per name; with a mapping only
            categoricals may be left out.

        Returns:
          Name to array of shape (trial,): float32 or int32.

        Raises:
          ValueError: a number is not a positive integer, a name is unknown or missing, or the grid
            has 2**31 points or more.
        """
        axes = []
        if isinstance(num_per_dimension, Mapping):
            for name in num_per_dimension:
                if name not in self:
                    raise ValueError(
                        f"num_per_dimension: no parameter {name!r}: {nearest(name, self)}"
                    )
        else:
            check_count("num_per_dimension", num_per_dimension)
        for name, parameter in self.items():
            if isinstance(num_per_dimension, Mapping):
                num = num_per_dimension.get(name)
            else:
                num = None if isinstance(parameter, Categorical) else num_per_dimension
            if num is None and not isinstance(parameter, Categorical):
                raise ValueError(f"num_per_dimension has no entry for {name!r}. Add one.")
            axes.append(parameter.grid(num))  # type: ignore[arg-type]
        if math.prod(len(axis) for axis in axes) >= 2**31:
            raise ValueError("num_per_dimension gives a grid of 2**31 points or more. Use sample.")
        mesh = np.meshgrid(*axes, indexing="ij")
        return {name: jnp.asarray(m.reshape(-1)) for name, m in zip(self.names, mesh, strict=True)}

    def from_unit(self, unit: chex.Array) -> dict[str, chex.Array]:
        """Points at positions in the unit cube.

        Args:
          unit: shape (..., dim), dim j the j-th parameter; in [0, 1].

        Returns:
          Name to array of shape (...): float32 or int32.

        Raises:
          ValueError: the last axis is not one per parameter, or a known position is outside [0, 1].
        """
        if not np.shape(unit) or np.shape(unit)[-1] != len(self):
            raise ValueError(
                f"unit must have shape (..., {len(self)}), one column per parameter, got "
                f"{np.shape(unit)}."
            )
        if isinstance(unit, jax.Array):
            return _from_unit(self, unit)
        host = np.asarray(unit)
        bad = host[~((host >= 0) & (host <= 1))]
        if bad.size:
            raise ValueError(f"unit must lie in [0, 1], got {bad[0]!r}. Scale it first.")
        return {name: p.from_unit(host[..., j]) for j, (name, p) in enumerate(self.items())}

    def to_unit(self, points: Mapping[str, chex.Array]) -> chex.Array:
        """Positions of points in the unit cube, the inverse of `from_unit`.

        An integer or categorical value sits inside its own share of [0, 1], so mapping back gives
        the value itself.

        Args:
          points: name to array; the arrays share one shape (...).

        Returns:
          float32 array, shape (..., dim), in [0, 1].

        Raises:
          ValueError: a name is missing or unknown, or the shapes differ.
        """
        for name in points:
            if name not in self:
                raise ValueError(f"points: no parameter {name!r}: {nearest(name, self)}")
        missing = [name for name in self if name not in points]
        if missing:
            raise ValueError(f"points lacks {missing[0]!r}; it needs {', '.join(self)}.")
        shapes = {name: np.shape(points[name]) for name in self}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"points must have one shape for all parameters, got {shapes}.")
        return jnp.stack([p.to_unit(points[name]) for name, p in self.items()], axis=-1)

    def label(self, name: str, value: Any) -> str:
        """What to call a concrete value of a parameter in front of people.

        Example:
          >>> from playbook_optax.search_space import Categorical, SearchSpace
          >>> SearchSpace({"decay": Categorical(["cosine", "linear"])}).label("decay", 0)
          'cosine'

        Args:
          name: a parameter's name.
          value: a scalar out of a point.

        Returns:
          The label of a categorical choice; the number itself, to six digits, otherwise.

        Raises:
          KeyError: the name is unknown.
          ValueError: the value is not a choice.
        """
        parameter = self[name]
        if isinstance(parameter, Categorical):
            return parameter.label(value)
        return str(int(value)) if isinstance(parameter, Integer) else f"{float(value):.6g}"

    def to_dict(self) -> dict[str, Any]:
        """The space as strict JSON-able data; `from_dict` reads it back.

        Returns:
          ``{"parameters": [{"name": …, "kind": …, …}, …]}``, a list because order matters.
        """
        return {"parameters": [{"name": name, **p.to_dict()} for name, p in self.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Reads what `to_dict` wrote. Looks kinds up in a fixed table and executes nothing.

        Example:
          >>> from playbook_optax.search_space import Float, SearchSpace
          >>> space = SearchSpace({"learning_rate": Float(1e-4, 1e-1, scale="log")})
          >>> SearchSpace.from_dict(space.to_dict()) == space
          True

        Args:
          data: a mapping as `to_dict` returns it.

        Returns:
          The space.

        Raises:
          ValueError: a kind or a key is unknown (the nearest is named) or missing, or a parameter
            is not legal.
        """
        if not isinstance(data, Mapping):
            raise ArgumentTypeError(f"data must be a dict as to_dict gives it, got {data!r}.")
        _check_keys("data", data, ("parameters",))
        entries = data["parameters"]
        if not isinstance(entries, (list, tuple)):
            raise ArgumentTypeError(f"data['parameters'] must be a list, got {entries!r}.")
        pairs = []
        for i, entry in enumerate(entries):
            where = f"data['parameters'][{i}]"
            if not isinstance(entry, Mapping):
                raise ArgumentTypeError(f"{where} must be a dict, got {entry!r}.")
            if "kind" not in entry:
                raise ValueError(f"{where} lacks 'kind', one of {', '.join(_KINDS)}.")
            kind = entry["kind"]
            if not isinstance(kind, str):
                raise ArgumentTypeError(f"{where}['kind'] must be a string, got {kind!r}.")
            check_choice(f"{where}['kind']", kind, _KINDS)
            fields = [f.name for f in dataclasses.fields(_KINDS[kind])]
            _check_keys(where, entry, ("name", "kind", *fields))
            if _KINDS[kind] is Categorical:
                values = entry["values"]
                if not isinstance(values, (list, tuple)) or not all(map(_is_plain, values)):
                    raise ArgumentTypeError(
                        f"{where}['values'] must be a list of strings, numbers, booleans or null, "
                        f"got {values!r}."
                    )
                if kind == "categorical" and all(isinstance(v, bool) for v in values):
                    # Written when points held the index of a boolean.
                    entry = {**entry, "values": [_label(v) for v in values]}
            pairs.append((entry["name"], _KINDS[kind](**{f: entry[f] for f in fields})))
        return cls(pairs)


def _check_keys(where: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in data:
        if name not in known:
            raise ValueError(f"{where} has the unknown key {name!r}: {nearest(name, known)}")
    for name in known:
        if name not in data:
            raise ValueError(f"{where} lacks the key {name!r}.")


def _check_order(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(
            f"low must be < high, got low = {low!r} and high = {high!r}. Swap them, or fix the "
            "value instead of searching it."
        )


def _is_plain(value: Any) -> bool:
    """Whether strict JSON holds the value as it is."""
    return value is None or isinstance(value, (str, bool, int, float))


def _label(value: Any) -> str:
    return value if isinstance(value, str) else str(getattr(value, "__name__", value))


def _float32_inside(low: float, high: float) -> tuple[np.float32, np.float32]:
    """The first and the last float32 in [low, high] that no device flushes to 0."""
    first, last = np.float32(low), np.float32(high)
    if float(first) < low:
        first = np.nextafter(first, np.float32(np.inf))
    if float(last) > high:
        last = np.nextafter(last, np.float32(-np.inf))
    tiny = np.float32(_FLOAT_TINY)
    if 0 < abs(first) < tiny:
        first = tiny if first > 0 else np.float32(0)
    if 0 < abs(last) < tiny:
        last = -tiny if last < 0 else np.float32(0)
    # Adding 0 turns -0 into 0: which of the two a device clips to is its own affair.
    return first + np.float32(0), last + np.float32(0)


# One program per space and shape, so that a call from Python does not run operation by operation.
@functools.partial(jax.jit, static_argnums=0)
def _from_unit(space: SearchSpace, unit: chex.Array) -> dict[str, chex.Array]:
    return {name: p.from_unit(unit[..., j]) for j, (name, p) in enumerate(space.items())}


def _values(parameter: Parameter, unit: Any) -> chex.Array:
    """Values at positions: by JAX at arrays of JAX, else in NumPy, which compiles nothing."""
    if isinstance(unit, jax.Array):
        return parameter._values(unit.astype(jnp.float32), jnp)
    # A rounding above the largest float32 is clipped, and a NumPy scalar may wrap as arrays do.
    with np.errstate(over="ignore"):
        return jax.device_put(parameter._values(np.asarray(unit, np.float32), np))


def _product(unit: Any, factor: float) -> Any:
    """Multiplies, with the same bits whether or not the compiler fuses multiply and add.

    Both are cut into halves of 12 bits: products of halves are exact, so fusing changes nothing.
    """
    top = (unit.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    rest = unit - top
    factor_top = (np.float32(factor).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    factor_rest = np.float32(factor - float(factor_top))
    factor_rest = (factor_rest.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    small = rest * factor_rest + top * factor_rest + rest * factor_top
    return top * factor_top + small


def _words(unit: Any, xp: ModuleType) -> Any:
    """Positions as uint32 multiples of 2**-32, rounded down; 1 is the largest of them."""
    below = unit < 1
    inside = xp.where(below, xp.maximum(unit, np.float32(0)), np.float32(0))
    words = (inside * np.float32(2**32)).astype(np.uint32)
    return xp.where(below, words, np.uint32(0xFFFFFFFF))


def _mul(a: Any, b: Any) -> tuple[Any, Any]:
    """The high and the low word of the product of two uint32."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16), a * b


def _share(unit: Any, count: int, xp: ModuleType) -> Any:
    """Which of `count` equal shares of [0, 1] a position is in: uint32, exact."""
    return _mul(_words(unit, xp), np.uint32(count))[0]


def _exp2_between(unit: Any, low: float, high: float, xp: ModuleType) -> Any:
    """2 ** (low + unit * (high - low)) in float32, to about 1 ulp; |low|, |high| below 128.

    The exponent is a 64-bit fixed-point number, 8 bits of whole part and 56 of fraction, of which
    24 are used; the power of its fraction is a product of three table entries. Every step but the
    one rounding to float32 is exact or in integers, so no bit depends on how it is compiled.
    """
    falling = high < low
    span, offset = round(abs(high - low) * 2**24), round((low + 128) * 2**56) + 2**31
    step_high, step_low = _mul(_words(unit, xp), np.uint32(span))
    start_high, start_low = np.uint32(offset >> 32), np.uint32(offset & 0xFFFFFFFF)
    if falling:
        word = start_high - step_high - (start_low < step_low).astype(np.uint32)
    else:
        total_low = start_low + step_low
        word = start_high + step_high + (total_low < step_low).astype(np.uint32)
    tables = [np.round(2.0 ** (31 + np.arange(256) / 256**n)).astype(np.uint32) for n in (1, 2, 3)]
    parts = [
        xp.asarray(table)[(word >> shift) & 0xFF]
        for table, shift in zip(tables, (16, 8, 0), strict=True)
    ]
    # Each product drops one of the 31 bits of fraction: 2**30 stands for 1, then 2**29.
    power = _mul(_mul(parts[0], parts[1])[0], parts[2])[0].astype(np.float32)
    whole = (word >> 24).astype(np.int32) - 128
    exponent = xp.clip(whole + 127, 0, 254)
    scale = (exponent << 23).view(np.float32)
    return power * np.float32(2**-29) * scale


def _log_position(value: chex.Array, low: float, high: float) -> chex.Array:
    """Where log(value) is between log(low) and log(high): 0 at low, 1 at high."""
    # Relative to the middle, so that float32 rounds logarithms as small as they can be; moved where
    # a ratio would leave float32.
    middle = math.exp((math.log(low) + math.log(high)) / 2)
    middle = min(max(middle, high / _FLOAT_MAX), low / _FLOAT_TINY)
    middle = min(max(middle, 2.0**-126), 2.0**126)
    first, last = math.log(low / middle), math.log(high / middle)
    ratio = value * np.float32(1 / middle)
    return (jnp.log(ratio) - np.float32(first)) / np.float32(last - first)
