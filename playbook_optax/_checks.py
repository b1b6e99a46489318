"""Errors for concrete bad values, raised before anything is compiled.

A hyperparameter may be a Python number, a NumPy scalar, a concrete JAX scalar or a tracer. Only
the first three can be judged here; a tracer flows through, because its value is data.
"""

import difflib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from playbook_optax._text import printable

P = ParamSpec("P")
R = TypeVar("R")

MAX_STEPS = 2**31 - 1


class ArgumentTypeError(TypeError, ValueError):
    """A value of the wrong type: a `TypeError` to Python, a `ValueError` to law 1."""


def is_traced(value: Any) -> bool:
    """Whether `value` is a tracer, whose number is not known yet."""
    return isinstance(value, jax.core.Tracer)


def nearest(name: object, known: Iterable[object]) -> str:
    """The tail of an error message about an unknown name: the closest known one, and all of them.

    Args:
      name: the name that was not found.
      known: the names that exist.

    Returns:
      A sentence such as ``did you mean 'b1'? Known names: b1, b2``.
    """
    names = [printable(k) for k in known]
    close = difflib.get_close_matches(printable(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known names: {', '.join(names) or 'none'}"


class _AsWritten(str):
    """An annotation that help shows without quotation marks, as later versions of Python do."""

    def __repr__(self) -> str:
        return str(self)


def readable(signature: inspect.Signature) -> inspect.Signature:
    """A signature whose annotations are shown as they are written in the source.

    Args:
      signature: of a function whose module has ``from __future__ import annotations``.

    Returns:
      The same for everything but for how it is shown.
    """

    def shown(annotation: Any) -> Any:
        return _AsWritten(annotation) if isinstance(annotation, str) else annotation

    return signature.replace(
        parameters=[
            parameter.replace(annotation=shown(parameter.annotation))
            for parameter in signature.parameters.values()
        ],
        return_annotation=shown(signature.return_annotation),
    )


def named_arguments(function: Callable[P, R], more: Iterable[str] = ()) -> Callable[P, R]:
    """Makes an unknown keyword argument raise a `TypeError` that names the nearest known one.

    Args:
      function: a function or an `__init__`.
      more: names that its ``**kwargs`` takes.

    Returns:
      The function, its signature unchanged.
    """
    signature = inspect.signature(function)
    named = [p.name for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [*(name for name in named if name != "self"), *more]
    known = frozenset(parameters)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{function.__qualname__.removesuffix('.__init__')}() has no argument "
                    f"{name!r}: {nearest(name, parameters)}"
                )
        return function(*args, **kwargs)

    wrapper.__signature__ = readable(signature)  # type: ignore[attr-defined]
    return wrapper


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    fix: str = "",
) -> None:
    """Checks a numeric hyperparameter as far as its value is known.

    Args:
      name: the argument's name.
      value: a number, a 0-d array or a tracer.
      at_least: smallest legal value.
      above: legal values are larger than this.
      at_most: largest legal value.
      below: legal values are smaller than this.
      fix: one sentence on what to do instead.

    Raises:
      ValueError: the value is not a finite scalar number inside the bounds.
    """
    tail = f" {fix}" if fix else ""
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise ArgumentTypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}.{tail}"
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. Use jax.vmap over the "
            f"factory to sweep it.{tail}"
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not jax.numpy.issubdtype(dtype, np.number):
        raise ArgumentTypeError(f"{name} must be a number, got dtype {dtype}.{tail}")
    if dtype is not None and jax.numpy.issubdtype(dtype, np.complexfloating):
        raise ArgumentTypeError(f"{name} must be a real number, got dtype {dtype}.{tail}")
    if is_traced(value):
        return
    number = value if isinstance(value, int) else float(value)
    # Not math.isfinite: it raises on a Python integer that no float can hold.
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {number}.{tail}")
    bounds = []
    good = True
    if at_least is not None:
        bounds.append(f">= {at_least:g}")
        good &= number >= at_least
    if above is not None:
        bounds.append(f"> {above:g}")
        good &= number > above
    if at_most is not None:
        bounds.append(f"<= {at_most:g}")
        good &= number <= at_most
    if below is not None:
        bounds.append(f"< {below:g}")
        good &= number < below
    if not good:
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {number!r}.{tail}")


def check_steps(name: str, value: Any, *, at_least: int = 0, fix: str = "") -> None:
    """Checks a number of steps that may be traced: an integer in [at_least, 2**31).

    Args:
      name: the argument's name.
      value: a number, a 0-d array or a tracer. A float is legal when it is a whole number.
      at_least: smallest legal value.
      fix: one sentence on what to do instead.

    Raises:
      ValueError: the value is not a whole number inside the bounds.
    """
    check_number(name, value, at_least=at_least, fix=fix)
    if is_traced(value):
        return
    if float(value) != math.floor(float(value)):
        raise ValueError(f"{name} must be a whole number of steps, got {value!r}. {fix}".rstrip())
    if float(value) > MAX_STEPS:
        raise ValueError(
            f"{name} must be below 2**31, because steps are int32, got {value!r}. {fix}".rstrip()
        )


def check_count(name: str, value: Any, *, at_least: int = 1, fix: str = "") -> int:
    """Checks a static count (trials, steps of a run, dimensions) and returns it as an `int`.

    Args:
      name: the argument's name.
      value: a Python or NumPy integer; never a tracer, because it decides a shape.
      at_least: smallest legal value.
      fix: one sentence on what to do instead.

    Returns:
      The count.

    Raises:
      ValueError: the value is not an integer in [at_least, 2**31).
    """
    tail = f" {fix}" if fix else ""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}.{tail}"
        )
    if not at_least <= value <= MAX_STEPS:
        raise ValueError(f"{name} must be >= {at_least} and < 2**31, got {value!r}.{tail}")
    return int(value)


def check_eps(name: str, eps: Any, dtype: Any) -> None:
    """Checks that a concrete `eps` is positive, in the dtype in which it will be used as well.

    Args:
      name: the argument's name.
      eps: a number, a 0-d array or a tracer.
      dtype: the dtype of the moments that it is added to.

    Raises:
      ValueError: `eps` is not positive, or rounds to zero in `dtype`.
    """
    check_number(name, eps, above=0.0, fix="Use the default, 1e-8, when in doubt.")
    if not is_traced(eps) and float(np.asarray(float(eps)).astype(dtype)) == 0.0:
        raise ValueError(
            f"{name} = {eps!r} is zero in {np.dtype(dtype).name}, the dtype of the moments; use "
            f"at least {float(jax.numpy.finfo(dtype).tiny):.2g}."
        )


def check_flag(name: str, value: Any) -> None:
    """Checks that `value` is True or False.

    Args:
      name: the argument's name.
      value: what was given.

    Raises:
      ArgumentTypeError: it is something else, 0 and 1 included.
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}.")


def fitting(name: str, values: Any) -> np.ndarray:
    """An array in the dtype that JAX gives it, where no number is lost by that.

    Args:
      name: what to call it.
      values: numbers of any shape; without x64 JAX makes 32 bits of 64.

    Returns:
      A NumPy array.

    Raises:
      ValueError: an integer would wrap around, a float become 0 or infinite, or values are masked.
    """
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.is_masked(values):
            missing = int(np.ma.count_masked(values))
            raise ValueError(
                f"{name} is masked in {missing} places; drop or impute what is missing."
            )
        values = values.data
    array = np.asarray(values)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore", under="ignore"):
        narrow = array.astype(dtype)
    if array.dtype.kind in "iu":
        lost = narrow.astype(array.dtype) != array
    else:
        lost = (np.isfinite(array) & ~np.isfinite(narrow)) | ((array != 0) & (narrow == 0))
    if lost.any():
        first = tuple(int(i) for i in np.argwhere(lost)[0])
        where = f"[{', '.join(map(str, first))}]" if first else ""
        raise ValueError(
            f"{name}{where} = {array[first]!s} does not fit {np.dtype(dtype).name}, which JAX "
            f"makes of {array.dtype.name}; there are {int(lost.sum())} such values. Rescale them, "
            "or enable x64."
        )
    return narrow


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Checks that `value` is one of a few.

    Args:
      name: the argument's name.
      value: what was given.
      choices: what is legal.

    Raises:
      ValueError: it is not among them; the nearest is named.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is unknown: {nearest(value, choices)}")


def require(module: str, extra: str, what: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it.

    Args:
      module: the module to import.
      extra: the extra of this package that installs it.
      what: what needs it, as the subject of a sentence.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module.partition('.')[0]}, which is not installed: "
            f"pip install 'playbook-optax[{extra}]'"
        ) from error
