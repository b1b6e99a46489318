"""What the tests of crashes share."""

import pathlib
import tempfile

import pytest


@pytest.fixture
def memory():
    """A folder in memory, where nothing waits for a disk."""
    shared = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        yield pathlib.Path(place)
