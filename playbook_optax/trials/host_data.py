"""Where an iterator of host batches stands, and how to continue it there.

An iterator that knows (``get_state`` and ``set_state``, as Grain's have) is put back exactly where
it was. Any other is made anew by ``host_batches(start_step)``, whose part it is to skip.
"""

import base64
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from playbook_optax import _checks


def check_host_batches(host_batches: Any, version: Any) -> None:
    """Raises where a workload's host batches are no function, or nothing names their data.

    Args:
      host_batches: what was given for ``host_batches(start_step) -> Iterator``.
      version: what names the data.

    Raises:
      ValueError: they are not; says what to give instead.
    """
    instead = (
        "Give a function that makes a new iterator from a step on, such as "
        "`def host_batches(start_step): return itertools.islice(make_batches(), start_step, None)`."
    )
    if isinstance(host_batches, Iterator):
        raise _checks.ArgumentTypeError(
            f"host_batches is an iterator itself ({type(host_batches).__name__}), which can be "
            "read once only, while each block of trials reads from the first batch, and a study "
            f"that is continued from where it stood. {instead}"
        )
    if not callable(host_batches):
        raise _checks.ArgumentTypeError(
            "host_batches must be a function host_batches(start_step) -> Iterator, got "
            f"{type(host_batches).__name__}. {instead}"
        )
    try:
        inspect.signature(host_batches).bind(0)
    except TypeError:
        raise _checks.ArgumentTypeError(
            "host_batches must take one argument, the step of the first batch wanted, got a "
            f"function of {inspect.signature(host_batches)}. {instead}"
        ) from None
    except ValueError:
        pass  # Of a function in C nothing is known.
    if version is None:
        raise ValueError(
            "version must be given with host_batches: it names the host data, which cannot be "
            "fingerprinted, in the study's identity. Give version='1', and another text whenever "
            "the data or their order change."
        )


def made(host_batches: Callable[[int], Any], step: int) -> Iterator[Any]:
    """A new iterator of host batches from a step on.

    Raises:
      ValueError: what was made is no iterator.
    """
    iterator: Any = host_batches(step)
    if not isinstance(iterator, Iterator):
        fix = "return iter(...) of it" if hasattr(iterator, "__iter__") else "yield batches"
        raise _checks.ArgumentTypeError(
            f"host_batches({step}) must return an iterator, got {type(iterator).__name__}: {fix}."
        )
    return iterator


def has_state(iterator: Any) -> bool:
    """Whether an iterator can be asked where it stands."""
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def position(iterator: Any) -> Any:
    """Where an iterator stands, as what JSON can hold; None if it does not know.

    Raises:
      ValueError: its state holds what cannot be stored.
    """
    if not has_state(iterator):
        return None
    return {"state": _encode(iterator.get_state(), type(iterator).__name__)}


def _encode(state: Any, name: str) -> Any:
    """A state with bytes and tuples, which JSON does not know, under their names."""
    if isinstance(state, np.generic):
        state = state.item()
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode("ascii")}
    if type(state) is tuple:
        return {"tuple": [_encode(item, name) for item in state]}
    if isinstance(state, list):
        return [_encode(item, name) for item in state]
    if isinstance(state, Mapping) and all(isinstance(key, str) for key in state):
        # One level down, so that no key of theirs is taken for one of ours.
        return {"mapping": {key: _encode(item, name) for key, item in state.items()}}
    raise ValueError(
        f"host_batches: {name}.get_state() holds {state!r} of type {type(state).__name__}, which "
        "cannot be stored. Return numbers, strings, bytes, None, lists, tuples and string-keyed "
        "dicts of them; or leave get_state out, and skip to the start_step that host_batches is "
        "given."
    )


def _decode(state: Any) -> Any:
    if isinstance(state, list):
        return [_decode(item) for item in state]
    if not isinstance(state, dict):
        return state
    ((kind, content),) = state.items()
    if kind == "base64":
        return base64.b64decode(content)
    if kind == "tuple":
        return tuple(_decode(item) for item in content)
    return {key: _decode(item) for key, item in content.items()}


def batches_from(
    host_batches: Callable[[int], Iterator[Any]], step: int, saved: Any
) -> Iterator[Any]:
    """The host batches from a step on.

    Args:
      host_batches: ``host_batches(start_step) -> Iterator``.
      step: the first batch wanted.
      saved: the `position` of an iterator that has given all batches before it, or None.

    Returns:
      An iterator whose next batch is that of `step`.

    Raises:
      ValueError: `saved` is a position, but the iterator has lost the methods to take it.
    """
    if saved is None:
        return made(host_batches, step)
    iterator: Any = made(host_batches, 0)
    if not has_state(iterator):
        raise ValueError(
            "host_batches gave an iterator with get_state and set_state when the study was saved, "
            f"and now gives {type(iterator).__name__} without them; begin in another directory."
        )
    iterator.set_state(_decode(saved["state"]))
    return iterator
