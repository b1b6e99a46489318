"""Finished blocks of a study: stored as they come, read back, whoever trained them."""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from playbook_optax.records import schema, storage

# A block's index and its arrays, as `records.study_from_blocks` takes them.
Finished = list[tuple[int, dict[str, np.ndarray]]]


def store(
    directory: str | os.PathLike[str] | None, batches: Iterable[Finished]
) -> Iterator[Finished]:
    """Stores blocks as they finish, and passes them on.

    Args:
      directory: the study directory; None stores nothing.
      batches: finished blocks, as `Engine.run` yields them.

    Yields:
      The same, each once it is stored.
    """
    for batch in batches:
        if directory is not None:
            for index, arrays in batch:
                storage.write_block(directory, index, arrays)
        yield batch


def read(
    directory: str | os.PathLike[str], wanted: Iterable[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Reads the blocks that are there and sound.

    Args:
      directory: the study directory.
      wanted: indices.

    Returns:
      Index to arrays; a damaged block is left out, to be trained again and replaced.

    Raises:
      CorruptSpec: the spec is none that this package writes.
    """
    found = {}
    read_block = schema.block_reader(directory, schema.read_spec(directory))
    for index in sorted(set(wanted) & set(storage.finished_blocks(directory))):
        try:
            found[index] = read_block(index)
        except (storage.CorruptBlock, storage.NoStudy):
            continue
    return found
