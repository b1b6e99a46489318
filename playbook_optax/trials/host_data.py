"""Where an iterator of host batches stands, and how to continue it there.

An iterator that knows (``get_state`` and ``set_state``, as Grain's have) is put back exactly where
it was. Any other is made anew by ``host_batches(start_step)``, whose part it is to skip.
"""

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


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
        return host_batches(step)
    iterator: Any = host_batches(0)
    if not has_state(iterator):
        raise ValueError(
            "host_batches gave an iterator with get_state and set_state when the study was saved, "
            f"and now gives {type(iterator).__name__} without them; begin in another directory."
        )
    iterator.set_state(_decode(saved["state"]))
    return iterator
