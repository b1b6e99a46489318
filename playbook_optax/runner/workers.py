"""Plain processes that share a study's directory: worker i of n, as in a SLURM array.

Nobody talks to anybody: a block's file is there whole or not at all, and whoever writes it writes
the same bytes. So a worker that dies leaves nothing to clean up, and the others do its blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from playbook_optax import _checks
from playbook_optax.runner import finished
from playbook_optax.runner.execute import Engine
from playbook_optax.runner.plan import Block, Points
from playbook_optax.runner.resume import DoneByOthers, Keeper

# In how many calls a worker trains its own share. More leave less to wait for at the end
# (`python -m benchmarks.scaling` simulates it); fewer pack live trials better.
CALLS_PER_SHARE = 4


def check_worker(worker: Any) -> tuple[int, int]:
    """Checks ``(i, n)``.

    Args:
      worker: which worker this is and how many there are.

    Returns:
      Both as integers.

    Raises:
      ValueError: not a pair of integers with 0 <= i < n.
    """
    if not isinstance(worker, (tuple, list)) or len(worker) != 2:
        raise _checks.ArgumentTypeError(
            f"worker must be a pair (i, n): this is worker i = 0, …, n - 1 of n; got {worker!r}."
        )
    number = _checks.check_count("worker[1]", worker[1])
    index = _checks.check_count("worker[0]", worker[0], at_least=0)
    if index >= number:
        raise ValueError(
            f"worker = {(index, number)} must be (i, n) with i < n: workers count from 0."
        )
    return index, number


def next_blocks(
    missing: Sequence[Block],
    done: set[int],
    worker: tuple[int, int],
    limit: int,
    num_devices: int = 1,
) -> list[Block]:
    """What a worker trains next: its own share in order, then what others have not done.

    Own blocks are every n-th, some at a time, so that others find what a slow worker has not begun.
    Others' are taken from the end, where their owners come last, each helper from a place of its
    own, so that two seldom train the same block; and no more than an n-th of them, because the
    blocks of a call finish together: fewer are there sooner.

    Args:
      missing: the blocks that nobody had finished at the start.
      done: indices of those finished since.
      worker: which worker of how many.
      limit: how many blocks at most.
      num_devices: blocks that take no longer than one.

    Returns:
      The blocks, none when all are done.
    """
    index, number = worker
    share = missing[index::number]
    own = [block for block in share if block.index not in done]
    if own:
        return own[: min(limit, max(num_devices, -(-len(share) // CALLS_PER_SHARE)))]
    left = [block for block in reversed(missing) if block.index not in done]
    first = index * len(left) // number
    return (left[first:] + left[:first])[: min(limit, max(num_devices, -(-len(left) // number)))]


def train(
    engine: Engine,
    missing: Sequence[Block],
    points: Points,
    store: finished.Store,
    worker: tuple[int, int],
    keeper: Keeper,
) -> Iterator[finished.Finished]:
    """Trains blocks until all of them are stored, by whomever, and yields them all.

    Args:
      engine: trains blocks.
      missing: the blocks that were not there at the start.
      points: where their points come from.
      store: where all workers store theirs.
      worker: which worker of how many.
      keeper: as for `Engine.run`.

    Yields:
      Finished blocks as `Engine.run` does, stored already.
    """
    trained: set[int] = set()
    limit = engine.blocks_per_call
    while True:
        done = trained | store.stored()
        chunk = next_blocks(missing, done, worker, limit, limit // engine.blocks_per_device)
        if not chunk:
            break
        with contextlib.suppress(DoneByOthers):
            for batch in store.write(engine.run(chunk, points, keeper)):
                trained |= {index for index, _ in batch}
                yield batch
    # All are there: what others did is read once, and what is damaged is trained again.
    others = {block.index: block for block in missing if block.index not in trained}
    while others:
        found = store.read(others.values())
        yield list(found.items())
        damaged = [block for index, block in others.items() if index not in found]
        others = {block.index: block for block in damaged}
        with contextlib.suppress(DoneByOthers):
            for batch in store.write(engine.run(damaged, points, keeper)):
                yield batch
                for index, _ in batch:
                    del others[index]
