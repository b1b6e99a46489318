"""What happens between two calls of the program: looking after signals, and saving."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from playbook_optax.records import checkpoints
from playbook_optax.runner import finished
from playbook_optax.runner.plan import Block
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
      store: where the study's finished blocks are, and its saves beside them; None saves nothing.
      seconds: how long to train between two saves.
      shared: whether other workers train blocks of the same study.
    """

    def __init__(
        self,
        stop: StopRequest | None = None,
        store: finished.Store | None = None,
        seconds: float = float("inf"),
        shared: bool = False,
    ) -> None:
        self._stop, self._seconds = stop, seconds
        self._store = store if store is not None and store.directory is not None else None
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
        blocks: Sequence[Block],
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
        indices = [block.index for block in blocks]
        if self._stored_by_others(blocks):
            self.drop(indices)
            raise DoneByOthers
        due = time.monotonic() - self._saved_at > self._seconds
        if self._store is not None and (due or self.asked_to_stop):
            meta = {"blocks": indices, "points": self._points_of(blocks), "position": position}
            self._saves(_name(indices)).write(step, arrays(), meta)
            self._saved_at = time.monotonic()
        self.check()

    def _saves(self, name: str) -> checkpoints.Checkpoints:
        assert self._store is not None
        assert self._store.directory is not None
        return checkpoints.Checkpoints(self._store.directory, name, self._store.owner)

    def _points_of(self, blocks: Iterable[Block]) -> str:
        """A digest of the points of blocks, which a table may have changed since."""
        assert self._store is not None
        digest = hashlib.sha256()
        for block in blocks:
            for name, values in sorted(self._store.points.rows(block.trials).items()):
                digest.update(f"{name!r}{values.dtype}".encode() + np.asarray(values).tobytes())
        return digest.hexdigest()

    def _groups(self) -> list[str]:
        """The names of all groups of blocks that have saves."""
        if self._store is None or self._store.directory is None:
            return []
        return checkpoints.groups(self._store.directory)

    def _stored_by_others(self, blocks: Sequence[Block]) -> bool:
        """Whether all these blocks are stored and sound, as far as the last look shows."""
        if not self._shared or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return False
        assert self._store is not None
        self._looked_at = time.monotonic()
        wanted = {block.index for block in blocks}
        return wanted <= self._store.stored() and wanted == set(self._store.read(blocks))

    def groups(self, missing: Iterable[Block]) -> list[tuple[int, ...]]:
        """Blocks that were in training together when they were last saved.

        Args:
          missing: the blocks that are wanted; other saves are of no use and removed.

        Returns:
          Indices of groups of wanted blocks that do not overlap, saved at the points of today.
        """
        left, found = {block.index: block for block in missing}, []
        for name in self._groups():
            meta = self._saves(name).meta() or {}
            blocks = _blocks(meta)
            if not blocks or not left.keys() >= set(blocks):
                continue
            if meta.get("points") == self._points_of(left[index] for index in blocks):
                found.append(blocks)
                for index in blocks:
                    del left[index]
        return found

    def load(self, blocks: Sequence[int], like: Sequence[Any], num_steps: int) -> Saved | None:
        """The newest sound save of a group, or None.

        Args:
          blocks: one of `groups`.
          like: dtype and shape of each array.
          num_steps: updates of a run, all of which no save has behind it.
        """
        if self._store is None:
            return None
        found = self._saves(_name(blocks)).read_newest(like, num_steps - 1)
        if found is None or _blocks(found[2]) != tuple(blocks):
            return None
        step, arrays, meta = found
        return Saved(tuple(blocks), step, arrays, meta.get("position"))

    def sweep(self, finished: set[int]) -> None:
        """Removes saves of which nothing is needed: their blocks are stored, or another study's."""
        for name in self._groups():
            saves = self._saves(name)
            meta = saves.meta()
            if saves.foreign() or _is_needless(meta, finished):
                saves.remove()

    def drop(self, blocks: Sequence[int]) -> None:
        """Removes the saves of blocks that are stored by now."""
        if self._store is not None:
            self._saves(_name(blocks)).remove()


def _is_needless(meta: Mapping[str, Any] | None, finished: set[int]) -> bool:
    return meta is not None and finished.issuperset(_blocks(meta))


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
