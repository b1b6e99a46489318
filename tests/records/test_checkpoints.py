"""Saves inside blocks: what is read is what was written, or the save before, or nothing."""

import errno
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from playbook_optax.records import checkpoints, storage


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(3, 50)).astype(np.float32),
        np.asarray(seed, np.int32),
        np.zeros((0, 4), np.int8),
        rng.normal(size=7).astype(ml_dtypes.bfloat16),
        np.array([True, False, True]),
        rng.integers(0, 2**32, 5, dtype=np.uint32),
        rng.normal(size=(2, 3)).T.astype(np.float16),
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


def saved(directory, *steps):
    saves = checkpoints.Checkpoints(directory, "blocks-1")
    for step in steps:
        saves.write(step, arrays(step), {"blocks": [1], "position": {"state": {"next": step}}})
    return saves


def folders(directory):
    return sorted(os.listdir(directory / "checkpoints" / "blocks-1"))


def test_the_two_newest_are_kept_and_the_newest_is_read(tmp_path):
    saves = saved(tmp_path, 10, 200, 30)
    # By step, not by the order of writing.
    assert folders(tmp_path) == ["step-00000030", "step-00000200"]
    step, found, meta = saves.read_newest(arrays())
    assert step == 200
    assert meta == saves.meta() == {"blocks": [1], "position": {"state": {"next": 200}}}
    assert_same(found, arrays(200))
    assert checkpoints.groups(tmp_path) == ["blocks-1"]
    saves.remove()
    assert saves.read_newest(arrays()) is None
    assert saves.meta() is None
    assert checkpoints.groups(tmp_path) == []
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_is_there_stays(tmp_path):
    saves = saved(tmp_path, 10, 10)
    assert folders(tmp_path) == ["step-00000010"]
    assert_same(saves.read_newest(arrays())[1], arrays(10))


def test_small_arrays_share_files_and_large_ones_have_their_own(tmp_path, monkeypatch):
    def num_files(directory):
        return sum(path.is_file() for path in directory.rglob("*"))

    saved(tmp_path / "joined", 10)
    monkeypatch.setattr(checkpoints, "_JOIN_BELOW_BYTES", 20)
    saves = saved(tmp_path / "apart", 10)
    assert_same(saves.read_newest(arrays())[1], arrays(10))
    assert num_files(tmp_path / "joined") < 10
    # Of 600 bytes and of 20; the others have 14 or fewer.
    assert {path.parent.name for path in tmp_path.glob("apart/**/.zarray")} == {
        "leaf-00000",
        "leaf-00005",
        "joined",
    }


def test_what_has_no_contents_can_be_saved(tmp_path):
    saves = checkpoints.Checkpoints(tmp_path, "empty")
    saves.write(1, [np.zeros((0,), np.float32)], {})
    assert_same(saves.read_newest([np.zeros((0,), np.float32)])[1], [np.zeros((0,), np.float32)])


@pytest.mark.parametrize(
    "change", [lambda a: a[:-1], lambda a: [*a[:-1], a[-1].astype(np.float32)]]
)
def test_saves_of_another_program_are_not_read(tmp_path, change):
    assert saved(tmp_path, 10).read_newest(change(arrays())) is None


def test_every_flipped_bit_is_seen_or_harmless(tmp_path):  # 60
    saves = saved(tmp_path, 10, 20)
    newest = tmp_path / "checkpoints" / "blocks-1" / "step-00000020"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    fell_back = 0
    for number in range(150):
        path = files[number % len(files)]
        content = path.read_bytes()
        if not content:
            continue
        position = int(rng.integers(len(content)))
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        step, found, _ = saves.read_newest(arrays())
        assert_same(found, arrays(step))
        fell_back += step == 10
        path.write_bytes(content)
    assert saves.read_newest(arrays())[0] == 20
    assert fell_back > 50


def test_what_is_cut_short_or_missing_falls_back(tmp_path):  # 61, 62
    saves = saved(tmp_path, 10, 20)
    newest = tmp_path / "checkpoints" / "blocks-1" / "step-00000020"
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert_same(saves.read_newest(arrays())[1], arrays(saves.read_newest(arrays())[0]))
        path.unlink()
        assert_same(saves.read_newest(arrays())[1], arrays(saves.read_newest(arrays())[0]))
        path.write_bytes(content)
    (newest / "manifest.json").write_text("{}")
    assert saves.read_newest(arrays())[0] == 10
    assert saves.meta()["position"] == {"state": {"next": 10}}
    for manifest in tmp_path.rglob("manifest.json"):
        manifest.unlink()
    assert saves.read_newest(arrays()) is None


def test_a_full_disk_leaves_the_older_save(tmp_path, monkeypatch):  # 59
    saves = saved(tmp_path, 10)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(storage.NotWritable, match="the disk is full"):
            saves.write(20, arrays(20), {"blocks": [1]})
    assert folders(tmp_path) == ["step-00000010"]
    assert_same(saves.read_newest(arrays())[1], arrays(10))


def test_left_overs_of_a_dead_process_are_removed(tmp_path, monkeypatch):  # 58, 71
    saved(tmp_path, 10)
    folder = tmp_path / "checkpoints" / "blocks-1"
    for pid in (1, 2**22 + 1):
        (folder / f".tmp-{pid}-0123456789abcdef").mkdir()
    (folder / "somebody's").mkdir()
    monkeypatch.setattr(storage, "process_exists", lambda pid: pid == 1)
    assert checkpoints.remove_temporary_folders(tmp_path) == 1
    assert folders(tmp_path) == [".tmp-1-0123456789abcdef", "somebody's", "step-00000010"]
    assert checkpoints.remove_temporary_folders(tmp_path / "none") == 0


def test_links_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "checkpoints").symlink_to(outside)
    with pytest.raises(storage.NotWritable, match="symbolic link"):
        saved(tmp_path / "study", 1)
    assert list(outside.iterdir()) == []
    real = saved(tmp_path / "real", 10)
    folder = tmp_path / "real" / "checkpoints" / "blocks-1"
    pathlib.Path(folder / "step-00000010").rename(outside / "save")
    (folder / "step-00000010").symlink_to(outside / "save")
    assert real.read_newest(arrays()) is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "x" * 65])
def test_bad_names(tmp_path, name):
    with pytest.raises(ValueError, match="lower-case"):
        checkpoints.Checkpoints(tmp_path, name)
