"""What the user's functions take from the host while they are traced.

A program holds for ever what was drawn or read then: noise of `np.random` is the same for every
trial, seed and step. Draws from a generator that is there before, a global one or one that the
function refers to, show in its state. A clock, and a generator made inside without a seed, show
only in the code, which is read and not run.
"""

import contextlib
import datetime
import dis
import functools
import os
import random
import sysconfig
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

_KINDS = (np.random.Generator, np.random.RandomState, random.Random)
# Whose methods the functions of the two modules are.
_GLOBAL: tuple[Any, ...] = tuple(
    getattr(function, "__self__")  # noqa: B009 - no type checker knows of it.
    for function in (random.getstate, np.random.get_state)
)
# The last take a seed, and give other numbers at every run only without one.
_SOURCES = {
    "time.time": time.time,
    "time.time_ns": time.time_ns,
    "datetime.now": datetime.datetime.now,
    "os.urandom": os.urandom,
}
_UNSEEDED = {
    "np.random.default_rng": np.random.default_rng,
    "np.random.RandomState": np.random.RandomState,
    "random.Random": random.Random,
}
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
# Functions that are read at most: what refers to more is no loss.
_MAX_FUNCTIONS = 200


@contextlib.contextmanager
def watched(what: str, function: Any) -> Iterator[None]:
    """Warns where a function takes from the host what it should take from its arguments.

    A thread that draws meanwhile would be blamed on the function; studies read ahead in threads
    only while they train.

    Args:
      what: the function's name.
      function: called inside, while tracing.
    """
    generators, sources = _look(function)
    before = [_state(one) for one in generators]
    yield
    drawn = [one for one, old in zip(generators, before, strict=True) if _state(one) != old]
    sources = list(dict.fromkeys([*map(_name, drawn), *sources]))
    if sources:
        warnings.warn(
            f"{what} takes numbers from {', '.join(sources)}. It is traced once, so the compiled "
            "program holds these very numbers for every trial, seed and step. Use jax.random with "
            "the key that init, batch and loss are given.",
            UserWarning,
            stacklevel=4,
        )


def _state(generator: Any) -> list[Any]:
    """A generator's state, comparable."""
    state: Any
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    elif isinstance(generator, random.Random):
        state = generator.getstate()
    else:
        state = generator.get_state(legacy=False)
    leaves = jax.tree.leaves(state)
    return [leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]


def _name(generator: Any) -> str:
    module = "random" if isinstance(generator, random.Random) else "np.random"
    return module if generator in _GLOBAL else f"{module}.{type(generator).__name__}"


def _look(function: Any) -> tuple[list[Any], list[str]]:
    """Generators that a function may draw from, and what it reads that has no state.

    Args:
      function: the function; those that it refers to are looked into as well.

    Returns:
      The generators, the two global ones first; and the names of clocks and of generators made
      without a seed.
    """
    generators = list(_GLOBAL)
    left: list[Any] = [function]
    seen: set[int] = set()
    found: list[str] = []
    while left and len(seen) < _MAX_FUNCTIONS:
        one = left.pop()
        while isinstance(one, functools.partial | types.MethodType):
            one = one.func if isinstance(one, functools.partial) else one.__func__
        if not isinstance(one, types.FunctionType) or id(one) in seen:
            continue
        seen.add(id(one))
        cells = dict(zip(one.__code__.co_freevars, one.__closure__ or (), strict=True))
        known: dict[str, Any] = {}
        if not one.__code__.co_filename.startswith(_LIBRARIES):
            known = dict(one.__globals__)
            for name, cell in cells.items():
                with contextlib.suppress(ValueError):  # Not filled yet.
                    known[name] = cell.cell_contents
            for code in _codes(one.__code__):
                for value, num_arguments in _calls(code, known):
                    left.append(value)
                    if isinstance(value, random.SystemRandom):  # It has no state.
                        found.append("random.SystemRandom")
                    elif isinstance(value, _KINDS) and value not in generators:
                        generators.append(value)
                    ways = _SOURCES | (_UNSEEDED if num_arguments == 0 else {})
                    found += [name for name, way in ways.items() if _is_same(value, way)]
        # What the functions of a library were given may be the user's all the same.
        for cell in cells.values():
            with contextlib.suppress(ValueError):
                left.append(cell.cell_contents)
    return generators, found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _calls(code: types.CodeType, known: dict[str, Any]) -> Iterator[tuple[Any, int | None]]:
    """What code refers to by name, and with how many arguments where it calls it at once."""
    value: Any = None
    for step in dis.get_instructions(code):
        name = step.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            if value is not None:
                yield value, None
            value = known.get(step.argval)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            if isinstance(value, types.ModuleType):
                # What a module would load only when asked for it is left alone.
                value = vars(value).get(step.argval)
            elif isinstance(value, type):
                value = getattr(value, step.argval, None)
            elif value is not None:
                yield value, None
                value = None
        elif name not in ("PRECALL", "CACHE", "PUSH_NULL"):
            if value is not None:
                yield value, step.arg if name == "CALL" else None
            value = None


def _is_same(one: Any, other: Any) -> bool:
    # Bound methods of built-in classes are equal and not the same.
    return one is other or (isinstance(one, types.BuiltinFunctionType) and bool(one == other))
