"""Flips single bits of stored files: `python -m tests.crash.flips --flips 100000`.

The bits are drawn uniformly from all bytes of all files of two study directories, a finished one
and one that was stopped inside a block. Each is flipped alone and read through the functions that
a study reads with. That must be refused, or give what was written. A save is read with no other
beside it, so that its damage cannot hide behind the other; one flip in a hundred is read with both
in place as well, and then the older must be what is read.
"""

import argparse
import bisect
import collections
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile

import numpy as np

from playbook_optax.records import checkpoints, load_study, storage
from tests.crash import kills

ONE_IN = 100
REFUSALS = (storage.CorruptSpec, storage.CorruptBlock, storage.NewerFormat)
NOTHING = "None"


def comparable(value):
    """What tells any two values apart that differ in a bit, NaN and dtypes included."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return repr(value)


def refuses(read):
    """Whether the reader says that what is stored is damaged."""
    try:
        read()
    except REFUSALS:
        return True
    return False


class StudyFile:
    """``study.json``: it is read before anything else is believed."""

    kind = "study.json"

    def __init__(self, directory):
        self.file = directory / "study.json"
        self._directory = directory
        self._content = comparable(storage.read_spec(directory))

    def sees_damage(self, thorough):
        """Whether the damage is seen; AssertionError if it is read wrong."""
        try:
            assert comparable(storage.read_spec(self._directory)) == self._content
        except REFUSALS:
            assert not thorough or refuses(lambda: load_study(self._directory))
            return True
        return False


class BlockFile:
    """A finished block: one that is not sound counts as missing."""

    kind = "block"

    def __init__(self, directory, index):
        self.file = directory / "blocks" / f"block-{index:08d}.pbx"
        self._directory, self._index = directory, index
        self._owner = storage.owner_of(storage.read_spec(directory))
        self._content = comparable(storage.read_block(directory, index, self._owner))

    def sees_damage(self, thorough):
        """Whether the damage is seen; AssertionError if it is read wrong."""
        try:
            found = storage.read_block(self._directory, self._index, self._owner)
        except REFUSALS:
            found = None
        if found is not None:
            assert comparable(found) == self._content
            return False
        assert not thorough or refuses(lambda: load_study(self._directory))
        return True


class SaveFile:
    """A file of a save inside a block.

    Args:
      file: the file.
      saves: the group of saves, with this one alone.
      like: dtypes and shapes of what is saved.
      content: what the save holds.
      beside: for a file of the newer save, the file where both saves are, their group, and what
        the older one holds.
    """

    def __init__(self, file, saves, like, content, beside=None):
        self.file = file
        orbax = "arrays" in file.parts
        self.kind = "save: arrays and metadata by Orbax" if orbax else "save: manifest"
        self._saves, self._like = saves, like
        self._content, self._beside = content, beside

    def sees_damage(self, thorough):
        """Whether the damage is seen; AssertionError if it is read wrong."""
        found = comparable(self._saves.read_newest(self._like))
        assert found in (NOTHING, self._content)
        if thorough and self._beside is not None:
            file, saves, older = self._beside
            whole = file.read_bytes()
            file.write_bytes(self.file.read_bytes())
            newest = comparable(saves.read_newest(self._like))
            file.write_bytes(whole)
            assert newest == (older if found == NOTHING else found)
        return found == NOTHING


def files_of_finished(directory):
    """All files of a finished study."""
    blocks = [BlockFile(directory, index) for index in storage.finished_blocks(directory)]
    return [StudyFile(directory), *blocks]


def files_of_stopped(directory, place):
    """All files of a study that was stopped inside a block; `place` takes copies of its saves."""
    (group,) = checkpoints.groups(directory)
    like = kills.shapes_of_save(directory, group)
    owner = storage.owner_of(storage.read_spec(directory))
    both, older = checkpoints.Checkpoints(directory, group, owner), None
    found = [StudyFile(directory)]
    for save in sorted((directory / "checkpoints" / group).iterdir()):
        copy = place / save.name
        shutil.copytree(save, copy / save.relative_to(directory))
        alone = checkpoints.Checkpoints(copy, group, owner)
        content = comparable(alone.read_newest(like))
        assert content != NOTHING
        for file in sorted(path for path in copy.rglob("*") if path.is_file()):
            beside = older and (directory / file.relative_to(copy), both, older)
            found.append(SaveFile(file, alone, like, content, beside))
        older = content
    return found


def flip(files, num_flips, seed=0):
    """Flips bits one after the other.

    Args:
      files: what is damaged.
      num_flips: how many bits.
      seed: of their places.

    Returns:
      Kind of file to the number of flips that were ``seen`` or ``harmless``.

    Raises:
      AssertionError: something was read that was not written.
    """
    draw = random.Random(seed)
    contents = [one.file.read_bytes() for one in files]
    ends = list(itertools.accumulate(map(len, contents)))
    counts = collections.defaultdict(collections.Counter)
    for number in range(num_flips):
        place = draw.randrange(ends[-1])
        which = bisect.bisect_right(ends, place)
        one, content = files[which], contents[which]
        byte, bit = place - (ends[which] - len(content)), draw.randrange(8)
        with open(one.file, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([content[byte] ^ (1 << bit)]), byte)
            try:
                seen = one.sees_damage(thorough=number % ONE_IN == 0)
            except AssertionError as error:
                raise AssertionError(
                    f"bit {bit} of byte {byte} of {one.file}: read wrong"
                ) from error
            os.pwrite(file.fileno(), content[byte : byte + 1], byte)
        counts[one.kind]["seen" if seen else "harmless"] += 1
    assert contents == [one.file.read_bytes() for one in files]
    return {kind: dict(count) for kind, count in counts.items()}


def train(kind, directory, cache, stop_inside):
    """A study of the worker's, whole or stopped once it has two saves inside a block."""
    with kills.Worker(kind, directory, cache) as worker:
        if stop_inside:
            saves = directory / "checkpoints"
            assert worker.wait_until(lambda: len(list(saves.glob("*/step-*"))) >= 2), worker.errors
            worker.send(signal.SIGTERM)
        assert worker.end() == (128 + signal.SIGTERM if stop_inside else 0), worker.errors


def trained_files(place, cache):
    """The files of a finished study and of a stopped one, which two workers train at `place`."""
    train("blocks", place / "finished", cache, stop_inside=False)
    train("long", place / "stopped", cache, stop_inside=True)
    finished = files_of_finished(place / "finished")
    return finished + files_of_stopped(place / "stopped", place / "copies")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # In memory where the system has such a place: nothing here is about the disk.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="flips-", dir=memory) as place:
        place = pathlib.Path(place)
        files = trained_files(place, place / "cache")
        size = sum(one.file.stat().st_size for one in files)
        print(f"{arguments.flips} flips over {size} bytes of {len(files)} files")
        print(json.dumps(flip(files, arguments.flips, arguments.seed), indent=1))
    print("Nothing was read silently wrong.")


if __name__ == "__main__":
    main()
