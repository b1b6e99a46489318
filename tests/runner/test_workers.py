"""How workers that share a directory divide a study, and what they leave to each other."""

import itertools
import shutil

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import execute, plan, resume, workers

BLOCKS = plan.blocks_of(40, 1, 1)


def indices(done, worker, limit=16, num_devices=1):
    blocks = workers.next_blocks(BLOCKS, set(done), worker, limit, num_devices)
    return [block.index for block in blocks]


def test_every_block_is_somebodys_and_comes_once_while_all_live():
    trained = []
    for index in range(3):
        done = set()
        while own := [i for i in indices(done, (index, 3)) if i % 3 == index]:
            trained += own
            done |= set(own)
    assert sorted(trained) == list(range(40))


def test_an_own_share_takes_some_calls_and_every_device_has_work():
    assert indices((), (1, 2)) == [1, 3, 5, 7, 9]
    assert indices((), (1, 2), limit=3) == [1, 3, 5]
    assert indices({1, 5}, (1, 2), num_devices=8) == [3, 7, 9, 11, 13, 15, 17, 19]


def test_helpers_take_few_blocks_from_the_end_and_each_others():
    done = set(range(12)) | set(range(0, 40, 4)) | set(range(2, 40, 4))
    left = list(range(39, 11, -2))
    one, other = (indices(done, (worker, 4)) for worker in (0, 2))
    assert one == left[:4]
    assert other == left[7:11]
    assert indices(done, (0, 4), num_devices=6) == left[:6]
    assert indices(range(40), (0, 5)) == []


def study_of(directory, **arguments):
    return pbx.run_study(
        tiny.noisy_quadratic(),
        tiny.momentum,
        tiny.SPACE,
        num_trials=4,
        num_steps=64,
        eval_every=32,
        key=jax.random.key(0),
        trials_per_block=2,
        progress=False,
        directory=directory,
        **arguments,
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("theirs")
    return directory, study_of(directory)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_others_have_stored_is_not_trained_to_its_end(tmp_path, monkeypatch, theirs, damaged):
    monkeypatch.setattr(execute, "SECONDS_PER_CALL", 0.0)
    monkeypatch.setattr(resume, "LOOK_SECONDS", 0.0)
    place = tmp_path / "study"
    directory, whole = theirs
    calls, original = itertools.count(1), resume.Keeper.between_calls
    steps = []

    def others_are_faster(self, blocks, step, *rest):
        steps.append(step)
        if next(calls) == 2:
            shutil.copytree(directory / "blocks", place / "blocks", dirs_exist_ok=True)
            if damaged:
                path = place / "blocks" / "block-00000001.pbx"
                path.write_bytes(path.read_bytes()[:-1])
        original(self, blocks, step, *rest)

    monkeypatch.setattr(resume.Keeper, "between_calls", others_are_faster)
    found = study_of(place, worker=(0, 1), checkpoint_seconds=0.0)
    for name in whole.data.data_vars:
        np.testing.assert_array_equal(found.data[name].values, whole.data[name].values)
    assert storage.finished_blocks(place) == [0, 1]
    assert checkpoints.groups(place) == []
    # Block 0 is given up at once; block 1 too, unless what is stored of it is of no use.
    assert steps == [16, 32] + [16, 32, 48] * damaged
