"""What happens between two calls of the program: looking after signals, and saving."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import finished
from playbook_optax.runner.signals import StopRequest

# How often a worker looks whether others have stored the blocks that it is training.
LOOK_SECONDS = 10.0


class DoneByOthers(Exception):  # noqa: N818
    """Other workers have stored all blocks that are being trained here."""


class Saved(NamedTuple):
    """A save of blocks that were in training together.

    Attributes:
      blocks: their indices, in the order of the arrays' rows.
      step: updates done.
      arrays: the leaves of their states, leading axis (block * trial).
      position: of the iterator of host batches, or None.
    """

    blocks: tuple[int, ...]
    step: int
    arrays: list[np.ndarray]
    position: Any


class Keeper:
    """Saves blocks in training and stops when asked to; the engine calls it between its calls.

    Args:
      stop: the request to stop, or None.
      directory: the study directory, or None to save nothing.
      seconds: how long to train between two saves.
      shared: whether other workers train blocks of the same study.
    """

    def __init__(
        self,
        stop: StopRequest | None = None,
        directory: str | os.PathLike[str] | None = None,
        seconds: float = float("inf"),
        shared: bool = False,
    ) -> None:
        self._stop, self._directory, self._seconds = stop, directory, seconds
        self._shared = shared
        self._saved_at = self._looked_at = time.monotonic()

    @property
    def asked_to_stop(self) -> bool:
        """Whether `check` would raise."""
        return self._stop is not None and self._stop.requested is not None

    def check(self) -> None:
        """Raises if it was asked to stop."""
        if self._stop is not None:
            self._stop.check()

    def between_calls(
        self,
        blocks: Sequence[int],
        step: int,
        arrays: Callable[[], list[np.ndarray]],
        position: Any,
    ) -> None:
        """Saves if it is time to, or if the work stops here.

        Args:
          blocks: the blocks in training.
          step: updates done.
          arrays: brings the arrays of a `Saved` to the host.
          position: that of a `Saved`.

        Raises:
          DoneByOthers: other workers have stored them all.
          NotWritable: the system refused to store them.
          KeyboardInterrupt: Ctrl-C.
          StudyTerminated: SIGTERM.
        """
        if self._stored_by_others(blocks):
            self.drop(blocks)
            raise DoneByOthers
        due = time.monotonic() - self._saved_at > self._seconds
        if self._directory is not None and (due or self.asked_to_stop):
            meta = {"blocks": list(blocks), "position": position}
            checkpoints.Checkpoints(self._directory, _name(blocks)).write(step, arrays(), meta)
            self._saved_at = time.monotonic()
        self.check()

    def _stored_by_others(self, blocks: Sequence[int]) -> bool:
        """Whether all these blocks are stored and sound, as far as the last look shows."""
        if not self._shared or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return False
        assert self._directory is not None
        self._looked_at = time.monotonic()
        wanted = set(blocks)
        if not wanted.issubset(storage.finished_blocks(self._directory)):
            return False
        return wanted == set(finished.read(self._directory, wanted))

    def groups(self, missing: Iterable[int]) -> list[tuple[int, ...]]:
        """Blocks that were in training together when they were last saved.

        Args:
          missing: the blocks that are wanted; other saves are of no use and removed.

        Returns:
          Groups of wanted blocks that do not overlap.
        """
        if self._directory is None:
            return []
        left, found = set(missing), []
        for name in checkpoints.groups(self._directory):
            saves = checkpoints.Checkpoints(self._directory, name)
            blocks = _blocks(saves.meta())
            if blocks and left.issuperset(blocks):
                left.difference_update(blocks)
                found.append(blocks)
        return found

    def load(self, blocks: Sequence[int], like: Sequence[Any], num_steps: int) -> Saved | None:
        """The newest sound save of a group, or None.

        Args:
          blocks: one of `groups`.
          like: dtype and shape of each array.
          num_steps: updates of a run, all of which no save has behind it.
        """
        if self._directory is None:
            return None
        saves = checkpoints.Checkpoints(self._directory, _name(blocks))
        found = saves.read_newest(like, num_steps - 1)
        if found is None or _blocks(found[2]) != tuple(blocks):
            return None
        step, arrays, meta = found
        return Saved(tuple(blocks), step, arrays, meta.get("position"))

    def sweep(self, finished: set[int]) -> None:
        """Removes saves of which nothing is needed: all their blocks are stored."""
        if self._directory is None:
            return
        for name in checkpoints.groups(self._directory):
            saves = checkpoints.Checkpoints(self._directory, name)
            meta = saves.meta()
            if meta is not None and finished.issuperset(_blocks(meta)):
                saves.remove()

    def drop(self, blocks: Sequence[int]) -> None:
        """Removes the saves of blocks that are stored by now."""
        if self._directory is not None:
            checkpoints.Checkpoints(self._directory, _name(blocks)).remove()


def _blocks(meta: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The blocks that a save says it is of; none where it says nothing that makes sense."""
    blocks = (meta or {}).get("blocks")
    if type(blocks) is not list or not all(type(index) is int for index in blocks):
        return ()
    return tuple(blocks) if len(set(blocks)) == len(blocks) else ()


def _name(blocks: Sequence[int]) -> str:
    """The name of a group; long groups differ in their digest."""
    digest = hashlib.sha256(",".join(map(str, blocks)).encode()).hexdigest()[:16]
    return f"blocks-{min(blocks):08d}-{digest}"
