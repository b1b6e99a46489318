"""Finished blocks of a study: stored as they come, read back, whoever trained them."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from playbook_optax.records import schema, storage
from playbook_optax.runner.plan import Block, Points

# A block's index and its arrays, as `records.study_from_blocks` takes them.
Finished = list[tuple[int, dict[str, np.ndarray]]]


class Store:
    """Where the finished blocks of one study are kept.

    Args:
      directory: the study directory; None keeps none.
      owner: the study, which every block must name.
      points: where its points come from; a block of others is not of this study.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        owner: storage.Owner,
        points: Points,
    ) -> None:
        self.directory, self.owner, self.points = directory, owner, points

    def write(self, batches: Iterable[Finished]) -> Iterator[Finished]:
        """Stores blocks as they finish, and passes them on.

        Args:
          batches: finished blocks, as `Engine.run` yields them.

        Yields:
          The same, each once it is stored.
        """
        for batch in batches:
            if self.directory is not None:
                for index, arrays in batch:
                    self._write(self.directory, index, arrays)
            yield batch

    def _write(
        self, directory: str | os.PathLike[str], index: int, arrays: Mapping[str, np.ndarray]
    ) -> None:
        if storage.write_block(directory, index, arrays, self.owner):
            return
        # Of the same bits, unless it is of other points.
        stored = storage.read_block(directory, index, self.owner)
        wrong = storage.wrong_rows(stored, {name: arrays[name] for name in _rows_of(arrays)})
        if wrong is None or (wrong & self.points.are_real(arrays["trial"])).any():
            storage.write_block(directory, index, arrays, self.owner, replace=True)

    def stored(self) -> set[int]:
        """The indices of all blocks that have a file."""
        return set() if self.directory is None else set(storage.finished_blocks(self.directory))

    def read(self, wanted: Iterable[Block]) -> dict[int, dict[str, np.ndarray]]:
        """Reads the blocks that are there, sound and of this study.

        Args:
          wanted: the blocks.

        Returns:
          Index to arrays; what is damaged is left out, to be trained again and replaced, and so is
          what is another study's, with a warning.

        Raises:
          CorruptSpec: the spec is none that this package writes.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        there = self.stored()
        if self.directory is None or not there:
            return found
        read_block = schema.block_reader(self.directory, schema.read_spec(self.directory))
        blocks = [block for block in wanted if block.index in there]
        # All at once: one by one they cost more than reading the blocks.
        first = min((int(block.trials[0]) for block in blocks), default=0)
        end = max((int(block.trials[-1]) for block in blocks), default=-1) + 1
        points = self.points.rows(np.arange(first, end, dtype=np.int32)) if blocks else {}
        for block in blocks:
            try:
                arrays = read_block(block.index)
            except storage.ForeignBlock as error:
                _warn_of_foreign(str(error))
                continue
            except (storage.CorruptBlock, storage.NoStudy):
                continue
            expected = {
                "trial": block.trials,
                "seed": np.full_like(block.trials, block.seed),
                **{
                    f"point/{name}": values[block.trials - first] for name, values in points.items()
                },
            }
            wrong = storage.wrong_rows(arrays, expected)
            if wrong is not None:
                # A study may have been longer than this call asks for.
                wrong &= self.points.are_real(block.trials)
            if wrong is not None and not wrong.any():
                found[block.index] = arrays
            elif wrong is None or not storage.is_padding(wrong, arrays):
                _warn_of_foreign(
                    f"block {block.index} in {str(self.directory)!r} has other trials or points "
                    "than this study."
                )
        return found


def _rows_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The names of what says which trials a block holds."""
    return ["trial", "seed", *(name for name in arrays if name.startswith("point/"))]


def _warn_of_foreign(message: str) -> None:
    warnings.warn(f"{message} It is trained again.", UserWarning, stacklevel=5)
