"""Which saves are continued, which are removed: a keeper alone, without a program."""

import jax
import numpy as np

from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import finished, plan, resume

ARRAYS = [np.arange(6, dtype=np.float32)]
BLOCKS = plan.blocks_of(10, 1, 2)


def keeper_of(directory, seconds, study="this", rate=1.0):
    points = plan.Points(None, {"rate": np.full(10, rate, np.float32)}, jax.random.key(0))
    store = finished.Store(directory, storage.Owner(study), points)
    return resume.Keeper(None, store, seconds)


def save(keeper, *indices):
    keeper.between_calls([BLOCKS[index] for index in indices], 16, lambda: ARRAYS, None)


def saved(directory, *groups, study="this"):
    """A keeper that has saved groups of blocks at update 16."""
    keeper = keeper_of(directory, 0.0, study)
    for indices in groups:
        keeper._saved_at -= 1.0
        save(keeper, *indices)
    return keeper


def test_groups_of_which_every_block_is_wanted_are_continued(tmp_path):
    keeper = saved(tmp_path, (0, 1), (2, 3), (4,))
    assert keeper.groups(BLOCKS[index] for index in (0, 1, 2, 4)) == [(0, 1), (4,)]
    found = keeper.load((0, 1), ARRAYS, 64)
    assert (found.blocks, found.step, found.position) == ((0, 1), 16, None)
    np.testing.assert_array_equal(found.arrays[0], ARRAYS[0])


def test_a_block_is_continued_once(tmp_path):
    # As two workers leave them that took the same block.
    keeper = saved(tmp_path, (0, 1), (1, 2), (2,))
    groups = keeper.groups(BLOCKS[:3])
    together = [block for group in groups for block in group]
    assert sorted(together) == sorted(set(together))


def test_groups_that_begin_with_the_same_block_have_saves_of_their_own(tmp_path):
    keeper = saved(tmp_path, (0, 1), (0, 2))
    assert len(checkpoints.groups(tmp_path)) == 2
    assert keeper.load((0, 1), ARRAYS, 64).blocks == (0, 1)
    assert keeper.load((0, 2), ARRAYS, 64).blocks == (0, 2)


def test_saves_of_stored_blocks_are_swept_and_others_stay(tmp_path):
    keeper = saved(tmp_path, (0, 1), (2, 3))
    keeper.sweep({0, 2, 3})
    assert keeper.groups(BLOCKS[:4]) == [(0, 1)]
    keeper.drop((0, 1))
    assert checkpoints.groups(tmp_path) == []


def test_saves_of_another_study_are_not_continued_and_swept(tmp_path):  # 62
    saved(tmp_path, (0, 1), study="another")
    keeper = keeper_of(tmp_path, 0.0)
    assert keeper.groups(BLOCKS[:4]) == []
    assert keeper.load((0, 1), ARRAYS, 64) is None
    keeper.sweep(set())
    assert checkpoints.groups(tmp_path) == []


def test_a_save_of_a_whole_run_is_none(tmp_path):
    assert saved(tmp_path, (0, 1)).load((0, 1), ARRAYS, 16) is None


def test_nothing_is_saved_before_it_is_time(tmp_path):
    keeper = keeper_of(tmp_path, 1000.0)
    save(keeper, 0)
    assert checkpoints.groups(tmp_path) == []
    keeper._saved_at -= 1001.0
    save(keeper, 0)
    assert len(checkpoints.groups(tmp_path)) == 1


def test_saves_at_other_points_are_not_continued(tmp_path):  # 62
    saved(tmp_path, (0, 1))
    assert keeper_of(tmp_path, 0.0, rate=2.0).groups(BLOCKS[:4]) == []
    assert keeper_of(tmp_path, 0.0).groups(BLOCKS[:4]) == [(0, 1)]
