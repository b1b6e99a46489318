"""A disk that really is full, or read-only: an error, and the study continues once it is not."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import execute, resume
from playbook_optax.runner.run import StudyRunner
from tests.crash import kills, stories

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

    def allow(self, writing):
        how = "rw" if writing else "ro"
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.place)], check=True)

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


@pytest.mark.parametrize(
    ("kind", "most"), [(stories.Run, 64), (stories.Saving, 32), (stories.Saves, 128)]
)
def test_any_write_may_be_the_one_that_does_not_fit(disk, kind, most):  # 59
    refused = 0
    for number, leave in enumerate(range(0, most * 1024, most * 64)):
        directory = disk.place / f"study-{number}"
        disk.fill(leave)
        told = []
        try:
            kind(directory).tell(told.append)
        except storage.NotWritable as error:
            refused += "disk is full" in str(error)
        kind(directory).check(told)
        disk.free()
        kind(directory).tell()
        kind(directory).check_whole()
        shutil.rmtree(directory)
    assert refused > 1


def test_a_disk_that_becomes_read_only(disk, runner, digest, monkeypatch):  # 63
    monkeypatch.setattr(runner, "_trainer", runner._trainer.replace(checkpoint_seconds=1e9))
    directory, write_block = disk.place / "study", storage.write_block
    written = []

    def then_read_only(*args, **kwargs):
        if len(written) == 3:
            disk.allow(writing=False)
        written.append(write_block(*args, **kwargs))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_block", then_read_only)
        with pytest.raises(storage.NotWritable, match=r"cannot write .*Read-only file system"):
            runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    # It is read where nothing can be written, and refused before the first step.
    assert pbx.load_study(directory).num_trials == 3 * WIDTH
    with pytest.raises(storage.NotWritable, match="Read-only file system"):
        runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    disk.allow(writing=True)
    study = runner.run(tiny.SPACE, num_trials=NUM_TRIALS, directory=directory)
    assert tiny.digest(study) == digest


LITTLE_MEMORY = """
import resource, sys
import numpy as np
from playbook_optax.records import storage, weights
from tests.crash import stories

HARD = resource.getrlimit(resource.RLIMIT_AS)[1]

def limit(mebibytes):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, HARD))

class Large(stories.Run):
    trees = {"params": weights.describe_tree({"w": 0.0})}

    def __init__(self, directory):
        super().__init__(directory)
        for number, block in enumerate(self.blocks):
            block["params/w"] = np.full((stories.WIDTH, 2**21), np.float32(number))

story = Large(sys.argv[1])
what, refusal = (story.check_whole, "read") if sys.argv[2] == "read" else (story.tell, "write")
if refusal == "read":
    story.tell()
limit(12)
try:
    what()
except storage.StorageError as error:
    assert f"cannot {refusal}" in str(error) and "does not fit into memory" in str(error), error
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (HARD, HARD))
story.tell()
story.check_whole()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits of Linux")
@pytest.mark.parametrize(("action", "error"), [("read", "NotReadable"), ("write", "NotWritable")])
def test_too_little_memory_for_a_block(tmp_path, action, error):
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "study"), action],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [error]


@pytest.mark.slow
def test_runs_that_get_too_little_memory(tmp_path):
    """Whatever ends such a run, what it has stored is sound, and the same call continues."""
    cache, limits = jax.config.jax_compilation_cache_dir, range(600, 2400, 300)
    with kills.Worker("small", tmp_path / "whole", cache) as whole:
        assert whole.end() == 0, whole.errors
    statuses, before = [], None
    for mebibytes in (*limits, None):
        with kills.Worker("small", tmp_path / "study", cache, mebibytes) as worker:
            statuses.append(worker.end())
        after = kills.Stored(tmp_path / "study")
        if before is not None:
            before.check_kept_by(after)
        before = after
        if worker.hash is not None:
            break
    assert worker.hash == whole.hash
    assert statuses[0] != 0
