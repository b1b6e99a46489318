"""A disk that really is full: the study stops with an error, and continues once there is space."""

import contextlib
import subprocess

import jax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import execute, resume
from playbook_optax.runner.run import StudyRunner
from tests.crash import kills

NUM_TRIALS, WIDTH = 16, 2


class Disk:
    """A file system in memory that holds so much and no more.

    Args:
      place: an empty folder, where it is mounted.
      size: as `mount` takes it.
    """

    def __init__(self, place, size):
        self.place = place
        self._filler = place / "filler"
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"there is no mount command: {error}")
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def fill(self, leave):
        """Leaves so many bytes."""
        with open(self._filler, "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(max(file.tell() - leave, 0))

    def free(self):
        self._filler.unlink()

    def remove(self):
        subprocess.run(["umount", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    small = Disk(place, "4m")
    yield small
    small.remove()


@pytest.fixture(scope="module")
def runner():
    """Compiled once; what `run_study` makes at every call."""
    trainer = pbx.Trainer(tiny.quadratic(), tiny.momentum, trials_per_block=WIDTH, progress=False)
    return StudyRunner(
        trainer, tiny.SPACE, num_steps=64, eval_every=8, key=jax.random.key(0), keep="best"
    )


@pytest.fixture(scope="module")
def digest(runner):
    """Of the study where there is space enough."""
    return tiny.digest(runner.run(tiny.SPACE, num_trials=NUM_TRIALS))


def test_blocks_that_do_not_fit(disk, runner, digest, monkeypatch):  # 59
    monkeypatch.setattr(runner, "_trainer", runner._trainer.replace(checkpoint_seconds=1e9))
    directory = disk.place / "study"
    disk.fill(leave=48 * 1024)  # Enough for the spec and some of the eight blocks.
    with pytest.raises(storage.NotWritable, match=r"disk is full.*Finished blocks"):
        runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    before = kills.Stored(directory)
    assert 0 < len(before.blocks) < NUM_TRIALS // WIDTH
    assert not before.unfinished
    assert pbx.load_study(directory).num_trials == WIDTH * len(before.blocks)
    disk.free()
    study = runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    assert tiny.digest(study) == digest
    after = kills.Stored(directory)
    before.check_kept_by(after)
    assert len(after.blocks) == NUM_TRIALS // WIDTH


def test_saves_that_do_not_fit(disk, runner, digest, monkeypatch):
    monkeypatch.setattr(runner, "_trainer", runner._trainer.replace(checkpoint_seconds=0.0))
    # A save after every 16 steps.
    monkeypatch.setattr(execute, "SECONDS_PER_CALL", 0.0)
    directory = disk.place / "study"
    between_calls = resume.Keeper.between_calls

    def fills_up(self, *args):
        between_calls(self, *args)
        disk.fill(leave=16 * 1024)

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "between_calls", fills_up)
        with pytest.raises(storage.NotWritable, match="disk is full"):
            runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    before = kills.Stored(directory)
    assert [step for step, _ in before.saves.values()] == [16]
    assert not before.unfinished
    disk.free()
    study = runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    assert tiny.digest(study) == digest
    assert checkpoints.groups(directory) == []
