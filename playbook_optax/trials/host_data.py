"""Where an iterator of host batches stands, and how to continue it there.

An iterator that knows (``get_state`` and ``set_state``, as Grain's have) is put back exactly where
it was. Any other is made anew by ``host_batches(start_step)``, whose part it is to skip.
"""

import base64
from collections.abc import Callable, Iterator
from typing import Any


def has_state(iterator: Any) -> bool:
    """Whether an iterator can be asked where it stands."""
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def position(iterator: Any) -> Any:
    """Where an iterator stands, as what JSON can hold; None if it does not know."""
    if not has_state(iterator):
        return None
    state = iterator.get_state()
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode("ascii")}
    return {"state": state}


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
    encoded = saved.get("base64")
    iterator.set_state(saved["state"] if encoded is None else base64.b64decode(encoded))
    return iterator
