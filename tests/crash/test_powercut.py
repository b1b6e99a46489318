"""The power is cut after every change on the disk: nothing finished is lost, or read wrong."""

import pathlib

import pytest

from tests.crash import powercut, stories

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/fd").is_dir(), reason="needs the /proc of Linux"
)


def replayed(kind, place, thorough):
    """Records a story, and opens what is left of it after every power cut."""
    (place / "here").mkdir()
    (place / "there").mkdir()
    with powercut.Recorder(place / "here") as recorder:
        kind(place / "here" / "study").tell(recorder.done)

    def check(directory, done):
        story = kind(directory / "study")
        story.check(done)
        # And the same call continues.
        story.tell()
        story.check_whole()

    return powercut.check_after_every_cut(recorder.events, place / "there", check, thorough)


KINDS = [stories.Run, stories.Crowd, stories.Saving, stories.Saves]


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_anywhere(memory, kind):
    events, disks = replayed(kind, memory, thorough=False)
    assert events > 20
    assert disks > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_anywhere_in_any_order(memory, kind):
    assert replayed(kind, memory, thorough=True)[1] > 30
