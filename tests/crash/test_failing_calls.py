"""Any system call fails: an error by name, and everything that was finished is still there."""

import errno
import itertools
import pathlib

import pytest

from playbook_optax.records import load_study, storage
from tests.crash import stories, syscalls
from tests.records import helpers

CODES = (errno.EIO, errno.ENOSPC, errno.EINTR)
pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/fd").is_dir(), reason="needs the /proc of Linux"
)


def each_call_fails(place, act, check, codes, prepare=lambda directory: None, every=1):
    """Lets the first call of an action fail, then the second alone, and so on.

    Args:
      place: an empty folder.
      act: ``act(directory)`` is done in a new directory each time.
      check: ``check(directory, failed)`` afterwards.
      codes: what each call fails with, one after another.
      prepare: ``prepare(directory)`` before, when nothing fails.
      every: 3 for every third call.

    Returns:
      The names of calls that failed with an error by name, and of those whose failure is no matter.
    """
    named, harmless = set(), set()
    for number in itertools.count(step=every):
        for code in codes(number):
            directory = place / f"{number}-{code}" / "study"
            directory.parent.mkdir()
            prepare(directory)
            calls = syscalls.OneFails(directory.parent, number, code)
            told = str(directory)
            where = f"{errno.errorcode[code]} in call {number}"
            try:
                with calls:
                    act(directory)
                harmless |= {calls.failed and calls.failed[0]}
            except storage.StorageError as error:
                named.add(calls.failed[0])
                told = str(error)
            except Exception as error:
                raise AssertionError(
                    f"{where}, {calls.failed}: {type(error).__name__}: {error}"
                ) from error
            assert str(directory) in told, f"{where}, {calls.failed}: {told}"
            try:
                check(directory, calls.failed)
            except Exception as error:
                raise AssertionError(f"after {where}, {calls.failed}: {error}") from error
        if calls.failed is None:
            return named, harmless


def in_turn(number):
    return [CODES[number % len(CODES)]]


def all_codes(number):
    return CODES


def storing_fails(place, kind, codes, every=1):
    told = []

    def act(directory):
        told.clear()
        kind(directory).tell(told.append)

    def check(directory, failed):
        story = kind(directory)
        story.check(told)
        story.tell()
        story.check_whole()
        # What could not be removed stays until this process has ended.
        left = [path for path in directory.rglob(".tmp*") if failed != ("os.unlink", path)]
        assert not left

    return each_call_fails(place, act, check, codes, every=every)


@pytest.mark.parametrize("codes", [in_turn, pytest.param(all_codes, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [stories.Run, stories.Saving])
def test_storing(memory, kind, codes):
    named, _ = storing_fails(memory, kind, codes)
    assert {"open", "write", "os.fsync", "os.mkdir", "os.listdir"} <= named


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_saving_inside_a_block(memory, every):
    named, harmless = storing_fails(memory, stories.Saves, in_turn, every)
    assert len(named | harmless) > 2


@pytest.mark.parametrize("codes", [in_turn, pytest.param(all_codes, marks=pytest.mark.slow)])
def test_loading(memory, codes):
    found = []

    def act(directory):
        found.clear()
        found.append(load_study(directory))

    def check(directory, failed):
        story = stories.Run(directory)
        story.check_whole()
        for study in found:
            assert helpers.same(
                helpers.variables(study), helpers.variables(load_study(directory))
            ), "something else was read"

    def prepare(directory):
        stories.Run(directory).tell()

    named, _ = each_call_fails(memory, act, check, codes, prepare)
    assert {"open", "os.open", "read", "os.listdir"} <= named | {"open"}
