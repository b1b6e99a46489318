"""Saves from whoever: checksums made to match, sizes that are lies, and no pickle anywhere."""

import hashlib
import io
import json
import pickle

import numpy as np
import pytest

from playbook_optax.records import checkpoints, storage

ARRAYS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(2, np.int32)]


def forged(directory, change):
    """A save whose Orbax files were changed by ``change(folder)``, with the digests that fit."""
    saves = checkpoints.Checkpoints(directory, "blocks-1")
    saves.write(10, ARRAYS, {"blocks": [1], "position": None})
    save = directory / "checkpoints" / "blocks-1" / "step-00000010"
    manifest = storage.read_document(save / "manifest.json")
    change(save)
    files = [path for path in save.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest["files_sha256"] = {
        path.relative_to(save).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    del manifest["schema_version"]
    storage.write_document(save / "manifest.json", manifest)
    assert saves.meta() is not None
    return saves


def zarray(**changes):
    def change(save):
        path = save / "arrays" / "joined" / ".zarray"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def test_an_honest_save_is_read(tmp_path):
    step, found, _ = forged(tmp_path, lambda save: None).read_newest(ARRAYS)
    assert step == 10
    np.testing.assert_array_equal(found[0], ARRAYS[0])


@pytest.mark.parametrize(
    "change",
    [
        zarray(shape=[2**40]),
        zarray(chunks=[2**40]),
        zarray(dtype="|O"),
        zarray(dtype="<f8"),
        zarray(compressor={"id": "pickle"}),
        zarray(filters=[{"id": "pickle"}]),
        lambda save: (save / "arrays" / "joined" / "0").write_bytes(b"\x80\x04N."),
        lambda save: (save / "arrays" / "_METADATA").write_text("[" * 10**5),
        lambda save: (save / "arrays.pbx").write_bytes(pickle.dumps(ARRAYS)),
    ],
    ids=["shape", "chunks", "objects", "dtype", "codec", "filter", "chunk", "nested", "pickle"],
)
# Where one array cannot be read, the others of the same save come too late for Orbax.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_forged_save_is_passed_over(tmp_path, change):
    assert forged(tmp_path, change).read_newest(ARRAYS) is None


def test_nothing_stored_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **named):
        raise AssertionError("something was unpickled")

    saves = forged(tmp_path, lambda save: None)
    storage.write_block(tmp_path, 0, {"x": ARRAYS[0]})
    storage.write_spec(tmp_path, {"num_trials": 1})
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert saves.read_newest(ARRAYS) is not None
    assert storage.read_spec(tmp_path)["num_trials"] == 1
    np.testing.assert_array_equal(storage.read_block(tmp_path, 0)["x"], ARRAYS[0])
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.load(io.BytesIO())
