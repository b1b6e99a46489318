"""Which saves are continued, which are removed: a keeper alone, without a program."""

import numpy as np

from playbook_optax.records import checkpoints
from playbook_optax.runner import resume

ARRAYS = [np.arange(6, dtype=np.float32)]


def saved(directory, *groups):
    """A keeper that has saved groups of blocks at update 16."""
    keeper = resume.Keeper(None, directory, seconds=0.0)
    for blocks in groups:
        keeper._saved_at -= 1.0
        keeper.between_calls(blocks, 16, lambda: ARRAYS, None)
    return keeper


def test_groups_of_which_every_block_is_wanted_are_continued(tmp_path):
    keeper = saved(tmp_path, (0, 1), (2, 3), (4,))
    assert keeper.groups({0, 1, 2, 4}) == [(0, 1), (4,)]
    found = keeper.load((0, 1), ARRAYS)
    assert (found.blocks, found.step, found.position) == ((0, 1), 16, None)
    np.testing.assert_array_equal(found.arrays[0], ARRAYS[0])


def test_a_block_is_continued_once(tmp_path):
    # As two workers leave them that took the same block.
    keeper = saved(tmp_path, (0, 1), (1, 2), (2,))
    groups = keeper.groups({0, 1, 2})
    together = [block for group in groups for block in group]
    assert sorted(together) == sorted(set(together))


def test_groups_that_begin_with_the_same_block_have_saves_of_their_own(tmp_path):
    keeper = saved(tmp_path, (0, 1), (0, 2))
    assert len(checkpoints.groups(tmp_path)) == 2
    assert keeper.load((0, 1), ARRAYS).blocks == (0, 1)
    assert keeper.load((0, 2), ARRAYS).blocks == (0, 2)


def test_saves_of_stored_blocks_are_swept_and_others_stay(tmp_path):
    keeper = saved(tmp_path, (0, 1), (2, 3))
    keeper.sweep({0, 2, 3})
    assert keeper.groups(range(4)) == [(0, 1)]
    keeper.drop((0, 1))
    assert checkpoints.groups(tmp_path) == []


def test_nothing_is_saved_before_it_is_time(tmp_path):
    keeper = resume.Keeper(None, tmp_path, seconds=1000.0)
    keeper.between_calls((0,), 16, lambda: ARRAYS, None)
    assert checkpoints.groups(tmp_path) == []
    keeper._saved_at -= 1001.0
    keeper.between_calls((0,), 16, lambda: ARRAYS, None)
    assert len(checkpoints.groups(tmp_path)) == 1
