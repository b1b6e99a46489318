"""What is on the disk when: syncs and renames in their order, and no file that changes in place."""

import errno
import hashlib
import json
import os
import pathlib
import struct

import numpy as np
import pytest
from records.helpers import same

from playbook_optax.records import checkpoints, storage

BLOCK = {"x": np.arange(3, dtype=np.float32)}
OTHER = {"x": np.zeros(3, dtype=np.float32)}
SPEC = {"name": "toy", "num_trials": 1}


def kind(path):
    """A name as a person would say it: temporary names are random."""
    name = pathlib.Path(path).name
    return "temporary" if name.startswith(".tmp-") else name


@pytest.fixture
def events(monkeypatch):
    """Syncs and places in the order in which the system is asked for them."""
    told = []

    def watched(name, describe):
        real = getattr(os, name)

        def call(*args, **named):
            told.append(describe(*args))
            return real(*args, **named)

        monkeypatch.setattr(os, name, call)

    def path_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    watched("fsync", lambda descriptor: ("sync", path_of(descriptor)))
    for name in ("link", "replace", "rename"):
        watched(name, lambda source, target: ("place", str(target)))
    return told


def in_order(events):
    return [(what, kind(path)) for what, path in events]


def test_a_block_is_synced_then_named_then_its_name_is_synced(tmp_path, events):  # 57
    (tmp_path / "blocks").mkdir()
    storage.write_block(tmp_path, 0, BLOCK)
    named = ("place", "block-00000000.pbx")
    assert in_order(events) == [("sync", "temporary"), named, ("sync", "blocks")]


@pytest.mark.parametrize("replace", [False, True])
def test_a_spec_is_synced_then_named_then_its_name_is_synced(tmp_path, events, replace):  # 57
    storage.write_spec(tmp_path, SPEC, replace=replace)
    named = ("place", "study.json")
    assert in_order(events) == [("sync", "temporary"), named, ("sync", tmp_path.name)]


def test_every_file_of_a_save_is_synced_before_it_has_its_name(tmp_path, events):  # 57
    saves = checkpoints.Checkpoints(tmp_path, "blocks-1")
    saves.write(10, [np.arange(5, dtype=np.float32)], {"blocks": [1]})
    save = tmp_path / "checkpoints" / "blocks-1" / "step-00000010"
    (placed,) = (i for i, event in enumerate(events) if event == ("place", str(save)))
    # The save had another name when they were synced.
    synced = {pathlib.Path(path).name for what, path in events[:placed] if what == "sync"}
    files = {path.name for path in save.rglob("*") if path.name != "manifest.json"}
    assert files <= synced
    assert any(kind(path) == "manifest.json" for what, path in events[:placed] if what == "place")
    assert events[placed + 1] == ("sync", str(save.parent))


@pytest.mark.parametrize("write", ["spec", "block", "without links"])
def test_nothing_is_written_in_place(tmp_path, monkeypatch, write):  # 57, 74
    path = tmp_path / "study.json"
    if write == "spec":
        storage.write_spec(tmp_path, SPEC)
    else:
        path = tmp_path / "blocks" / "block-00000000.pbx"
        path.parent.mkdir()
        path.write_bytes(b"damaged")
    held = tmp_path / "held"
    os.link(path, held)
    before = held.read_bytes()
    if write == "without links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    if write == "spec":
        storage.write_document(path, {**SPEC, "num_trials": 2})
        assert storage.read_spec(tmp_path)["num_trials"] == 2
    else:
        assert storage.write_block(tmp_path, 0, BLOCK)
    # Whoever reads the old file reads it whole.
    assert held.read_bytes() == before
    assert path.stat().st_ino != held.stat().st_ino


def test_whoever_comes_second_between_the_look_and_the_link_stays_second(tmp_path, monkeypatch):
    # 72: another process stores the block just after this one has looked.
    assert storage.write_block(tmp_path, 0, BLOCK)
    monkeypatch.setattr(pathlib.Path, "exists", lambda self, **_: False)
    assert not storage.write_block(tmp_path, 0, OTHER)
    assert same(storage.read_block(tmp_path, 0), BLOCK)


@pytest.mark.parametrize("calls", [("fsync",), ("link", "replace")], ids=["sync", "place"])
def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch, calls):  # 59, 71
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    storage.check_writable(tmp_path)
    for name in calls:
        monkeypatch.setattr(os, name, refuse)
    for write in (
        lambda: storage.write_block(tmp_path, 0, BLOCK),
        lambda: storage.write_spec(tmp_path, SPEC),
        lambda: storage.write_spec(tmp_path, SPEC, replace=False),
    ):
        with pytest.raises(storage.NotWritable, match="Input/output error"):
            write()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def forged_block(directory, data, **entry):
    """A block with one array, whatever its header says of it, and a right checksum."""
    entry = {"name": "x", "dtype": "int8", "shape": [2], "offset": 0, "nbytes": 2} | entry
    header = json.dumps({"format": 1, "index": 0, "arrays": [entry]}).encode()
    content = b"PBXARRAY" + struct.pack("<Q", len(header)) + header + data
    (directory / "blocks").mkdir()
    path = directory / "blocks" / "block-00000000.pbx"
    path.write_bytes(content + hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    ("shape", "data"),
    [([1] * 33, b"a"), ([-2, -1], b"ab"), ([0, 2**62], b""), ([True, 2], b"ab")],
    ids=["dimensions", "negative", "huge", "boolean"],
)
def test_a_shape_that_no_array_has_is_refused_by_name(tmp_path, shape, data):
    forged_block(tmp_path, data, shape=shape, nbytes=len(data))
    with pytest.raises(storage.CorruptBlock, match=r"array 'x' has the shape \["):
        storage.read_block(tmp_path, 0)


def test_bytes_that_no_array_declares_are_refused(tmp_path):
    forged_block(tmp_path, b"ab" + b"more")
    with pytest.raises(storage.CorruptBlock, match="bytes, its header declares"):
        storage.read_block(tmp_path, 0)


# Saves --------------------------------------------------------------------------------------------


def a_save(directory, *steps):
    saves = checkpoints.Checkpoints(directory, "blocks-1")
    for step in steps:
        saves.write(step, [np.full(5, step, np.float32)], {"blocks": [1]})
    return saves, directory / "checkpoints" / "blocks-1"


LIKE = [np.zeros(5, np.float32)]


def test_a_save_with_one_file_more_is_passed_over(tmp_path):
    saves, folder = a_save(tmp_path, 10, 20)
    (folder / "step-00000020" / "arrays" / "more").write_bytes(b"")
    assert saves.read_newest(LIKE)[0] == 10


def test_a_changed_file_is_passed_over_before_orbax_reads_it(tmp_path, monkeypatch):  # 60
    saves, folder = a_save(tmp_path, 10, 20)
    read, original = [], checkpoints._read_arrays

    def read_arrays(save, wanted):
        read.append(save.name)
        return original(save, wanted)

    monkeypatch.setattr(checkpoints, "_read_arrays", read_arrays)
    path = folder / "step-00000020" / "arrays" / "_METADATA"
    path.write_bytes(path.read_bytes() + b" ")
    assert saves.read_newest(LIKE)[0] == 10
    assert read == ["step-00000010"]


def test_what_orbax_reads_wrong_is_passed_over(tmp_path, monkeypatch):  # 60
    saves, _ = a_save(tmp_path, 10, 20)
    original = checkpoints._read_arrays

    def flipped(save, wanted):
        arrays = original(save, wanted)
        if save.name == "step-00000020":
            arrays[0][3] += 1
        return arrays

    monkeypatch.setattr(checkpoints, "_read_arrays", flipped)
    step, (array,), _ = saves.read_newest(LIKE)
    assert step == 10
    assert array.tolist() == [10.0] * 5


@pytest.mark.parametrize("part", ["manifest.json", "arrays", "arrays/_METADATA"])
def test_a_link_inside_a_save_is_not_followed(tmp_path, part):
    saves, folder = a_save(tmp_path, 10, 20)
    inside = folder / "step-00000020" / part
    inside.rename(tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    assert saves.read_newest(LIKE)[0] == 10


def test_a_damaged_save_of_the_same_or_a_later_step_gives_way(tmp_path):
    saves, folder = a_save(tmp_path, 10, 20, 30)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
    for name in ("step-00000020", "step-00000030"):
        (folder / name / "arrays" / "_METADATA").write_bytes(b"")
    saves.write(20, [np.full(5, 7, np.float32)], {"blocks": [1]})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020"]
    step, (array,), _ = saves.read_newest(LIKE)
    assert (step, array.tolist()) == (20, [7.0] * 5)
    # A sound one stays.
    saves.write(20, [np.full(5, 8, np.float32)], {"blocks": [1]})
    assert saves.read_newest(LIKE)[1][0].tolist() == [7.0] * 5
