"""Files: round trips, and every way in which a file may be damaged, foreign or not writable."""

import errno
import hashlib
import json
import os
import pathlib
import stat
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from records.helpers import same, strict_json

from playbook_optax.records import checkpoints, storage

BLOCK = {"x": np.arange(3, dtype=np.float32), "ok": np.array([True, False, True])}
SPEC = {"name": "toy", "num_trials": 4, "lowest": float("-inf"), "ü": [1.5, None, True, "\ud83d"]}

finite_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(["$float", "$mapping"]), inner, max_size=4)
    ),
    max_leaves=12,
)
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
dtypes = st.sampled_from(list(storage._DTYPES.values()))


def block_file(directory, index=0):
    return directory / "blocks" / f"block-{index:08d}.pbx"


def equal(one, other):
    """Equality that holds for NaN and tells True from 1 and 1 from 1.0."""
    return repr(one) == repr(other)


def raw_block(header, data=b"", header_length=None):
    """A block file with any header and a right checksum."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    length = len(raw) if header_length is None else header_length
    content = b"PBXARRAY" + struct.pack("<Q", length) + raw + data
    return content + hashlib.sha256(content).digest()


def entry(**changes):
    return {"name": "x", "dtype": "int8", "shape": [2], "offset": 0, "nbytes": 2} | changes


# Round trips --------------------------------------------------------------------------------------


@given(spec=st.dictionaries(st.text(), finite_json, max_size=5))
def test_spec_round_trip(tmp_path_factory, spec):
    directory = tmp_path_factory.mktemp("spec")
    spec = {k: v for k, v in spec.items() if k not in ("schema_version", "sha256")}
    storage.write_spec(directory, spec)
    strict_json((directory / "study.json").read_text("utf-8"))
    assert equal(storage.read_spec(directory), {"schema_version": 2, **spec})


@given(
    arrays=st.dictionaries(
        st.text(max_size=8),
        st.tuples(dtypes, shapes, st.integers(0, 2**32 - 1)),
        max_size=4,
    )
)
def test_block_round_trip_is_bit_identical(tmp_path_factory, arrays):
    directory = tmp_path_factory.mktemp("block")
    made = {}
    for name, (dtype, shape, seed) in arrays.items():
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        raw = raw % 2 if dtype.kind == "b" else raw
        made[name] = raw.view(dtype).reshape(shape)
    assert storage.write_block(directory, 7, made)
    assert same(storage.read_block(directory, 7), made)


def test_nan_payloads_negative_zero_and_big_endian_survive(tmp_path):
    nan = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    arrays = {"nan": nan, "zero": np.array(-0.0), "big": np.arange(3, dtype=">f8")[::-1]}
    storage.write_block(tmp_path, 0, arrays)
    back = storage.read_block(tmp_path, 0)
    assert back["nan"].tobytes() == nan.tobytes()
    assert np.signbit(back["zero"])
    assert back["zero"].shape == ()
    assert back["big"].dtype == np.dtype("float64")
    assert back["big"].tolist() == [2.0, 1.0, 0.0]


def test_arrays_come_back_read_only(tmp_path):
    storage.write_block(tmp_path, 0, BLOCK | {"empty": np.zeros((0, 3))})
    for array in storage.read_block(tmp_path, 0).values():
        assert not array.flags.writeable


def test_jax_arrays_are_stored(tmp_path):
    import jax.numpy as jnp

    storage.write_block(tmp_path, 0, {"w": jnp.ones((2, 2), jnp.bfloat16)})
    back = storage.read_block(tmp_path, 0)["w"]
    assert back.dtype == ml_dtypes.bfloat16
    assert back.astype(np.float32).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_spec_encodes_what_json_cannot_hold(tmp_path):
    spec = {"a": float("nan"), "b": (np.float32(0.5), np.int64(3)), "c": {"$float": "nan"}}
    storage.write_spec(tmp_path, spec)
    document = strict_json((tmp_path / "study.json").read_text())
    assert document["a"] == {"$float": "nan"}
    assert document["c"] == {"$mapping": {"$float": "nan"}}
    back = storage.read_spec(tmp_path)
    assert np.isnan(back["a"])
    assert back["b"] == [0.5, 3]
    assert back["c"] == {"$float": "nan"}
    as_stored = storage.as_stored(spec)
    assert equal({"schema_version": 2, **as_stored}, back)


def test_spec_keeps_the_order_of_keys(tmp_path):
    storage.write_spec(tmp_path, {"z": 1, "a": {"y": 1, "b": 2}})
    assert list(storage.read_spec(tmp_path)) == ["schema_version", "z", "a"]
    assert list(storage.read_spec(tmp_path)["a"]) == ["y", "b"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"a": {"b": [object()]}}, r"spec\['a'\]\['b'\]\[0\].*object"),
        ({"a": {1: 2}}, r"spec\['a'\] has the key 1"),
        ({"a": np.zeros(2)}, "cannot be stored as JSON"),
        ({"sha256": "0"}, "sha256"),
        ({"schema_version": 3}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
    ],
)
def test_bad_specs_are_refused_and_nothing_is_written(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        storage.write_spec(tmp_path / "new", spec)
    assert not (tmp_path / "new").exists()


def test_a_spec_that_could_not_be_read_back_is_refused(tmp_path, monkeypatch):
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="nested deeper"):
        storage.write_spec(tmp_path, deep)
    monkeypatch.setattr(storage, "_MAX_JSON_BYTES", 1000)
    with pytest.raises(ValueError, match="too much"):
        storage.write_spec(tmp_path, {"a": "x" * 1000})
    monkeypatch.setattr(storage, "_MAX_HEADER_BYTES", 500)
    with pytest.raises(ValueError, match="too large"):
        storage.write_block(tmp_path, 0, {f"array {i}": np.zeros(1) for i in range(10)})
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.array(["text"]), np.array(["2020-01-01"], "datetime64[D]")],
)
def test_dtypes_that_are_no_numbers_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match="'label' has dtype"):
        storage.write_block(tmp_path / "new", 0, {"label": array})
    assert not (tmp_path / "new").exists()


def test_other_bad_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a string"):
        storage.write_block(tmp_path, 0, {1: np.zeros(1)})
    with pytest.raises(ValueError, match="33 dimensions"):
        storage.write_block(tmp_path, 0, {"x": np.zeros((1,) * 33)})


@pytest.mark.parametrize("index", [-1, 10**8, 1.0, True, "1"])
def test_bad_indices_are_refused(tmp_path, index):
    for function in (storage.read_block, lambda d, i: storage.write_block(d, i, BLOCK)):
        with pytest.raises(ValueError, match="index must be"):
            function(tmp_path, index)


# Damage -------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_block_is_detected(tmp_path):
    storage.write_block(tmp_path, 0, BLOCK)
    path = block_file(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(storage.CorruptBlock, match="damaged"):
            storage.read_block(tmp_path, 0)


def test_a_flipped_bit_anywhere_in_the_spec_is_detected(tmp_path):
    storage.write_spec(tmp_path, SPEC)
    path = tmp_path / "study.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            # A flipped version number reads as a newer one; the message tells of the doubt.
            with pytest.raises((storage.CorruptSpec, storage.NewerFormat), match=r"checksum|valid"):
                storage.read_spec(tmp_path)


def test_truncation_and_appending_are_detected(tmp_path):
    storage.write_block(tmp_path, 0, BLOCK)
    storage.write_spec(tmp_path, SPEC)
    files = (
        (block_file(tmp_path), lambda: storage.read_block(tmp_path, 0)),
        (tmp_path / "study.json", lambda: storage.read_spec(tmp_path)),
    )
    for path, read in files:
        whole = path.read_bytes()
        for damaged in [*(whole[:n] for n in range(len(whole))), whole + b"\0", whole + b" "]:
            path.write_bytes(damaged)
            with pytest.raises((storage.CorruptBlock, storage.CorruptSpec)):
                read()


def test_a_block_under_another_index_is_detected(tmp_path):
    storage.write_block(tmp_path, 0, BLOCK)
    os.rename(block_file(tmp_path, 0), block_file(tmp_path, 1))
    with pytest.raises(storage.CorruptBlock, match="says that it is block 0"):
        storage.read_block(tmp_path, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_block({"format": 1, "index": 0, "arrays": []}, header_length=2**63), "does not fit"),
        (raw_block({"format": 1, "index": 0}), "known fields"),
        (raw_block({"format": 1, "index": 0, "arrays": [1]}), "known fields"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(more=1)]}), "known fields"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(name=1)]}, b"ab"), "name"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(dtype="object")]}, b"ab"), "dtype"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(dtype=["i"])]}, b"ab"), "dtype"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(shape=[-2])]}, b"ab"), "shape"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(shape=[2.0])]}, b"ab"), "shape"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(shape=[1] * 40)]}, b"a"), "shape"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(shape=[3])]}, b"ab"), "not lie"),
        (raw_block({"format": 1, "index": 0, "arrays": [entry(offset=-1)]}, b"ab"), "not lie"),
        (
            raw_block(
                {"format": 1, "index": 0, "arrays": [entry(shape=[2**40], nbytes=2**40)]}, b"ab"
            ),
            "declares",
        ),
        (raw_block({"format": 0, "index": 0, "arrays": []}), "format is 0"),
        (raw_block({"format": True, "index": 0, "arrays": []}), "format is True"),
        (raw_block(b'{"format": 1, "format": 1}'), "twice"),
        (raw_block(b"[]"), "not an object"),
        (raw_block(b"\xff"), "utf-8"),
        (raw_block(b'{"format": NaN}'), "NaN"),
        (raw_block(b'{"format": 1e999}'), "1e999"),
        (raw_block(b'{"a":' * 1000 + b"1" + b"}" * 1000), "nested deeper"),
        (raw_block(b"[" * 100_000), "nested deeper"),
        (b"PK\x03\x04" + b"\0" * 100, "does not begin"),
        (b"", "only 0 bytes"),
    ],
)
def test_forged_blocks_are_refused(tmp_path, content, message):
    (tmp_path / "blocks").mkdir()
    block_file(tmp_path).write_bytes(content)
    with pytest.raises(storage.CorruptBlock, match=message):
        storage.read_block(tmp_path, 0)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    arrays = [entry(), entry(offset=64)]
    (tmp_path / "blocks").mkdir()
    content = raw_block({"format": 1, "index": 0, "arrays": arrays}, b"ab" + b"\0" * 62 + b"ab")
    block_file(tmp_path).write_bytes(content)
    with pytest.raises(storage.CorruptBlock, match="occurs twice"):
        storage.read_block(tmp_path, 0)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ('",\n "schema_version": 1,\n "a": NaN}', "NaN"),
        ('",\n "schema_version": 1,\n "a": -Infinity}', "Infinity"),
        ('",\n "schema_version": 1,\n "a": {"$float": "1"}}', "none of nan"),
        ('",\n "schema_version": 1,\n "a": {"$mapping": 1}}', "does not hold a mapping"),
        ('",\n "schema_version": 1,\n "a": 1, "a": 1}', "twice"),
        ('",\n "schema_version": 1,\n "a": ' + "[" * 70 + "]" * 70 + "}", "nested deeper"),
        ('",\n "schema_version": "1"}', "schema version '1'"),
        ('"}', "schema version None"),
    ],
)
def test_forged_specs_are_refused(tmp_path, rest, message):
    digest = hashlib.sha256(rest.encode()).hexdigest()
    (tmp_path / "study.json").write_text('{\n "sha256": "' + digest + rest)
    with pytest.raises(storage.CorruptSpec, match=message):
        storage.read_spec(tmp_path)


def test_a_huge_spec_is_refused_unread(tmp_path):
    for size in (storage._MAX_JSON_BYTES + 1, 2**42):  # The second takes no disk, and no memory.
        with open(tmp_path / "study.json", "wb") as file:
            file.truncate(size)
        with pytest.raises(storage.CorruptSpec, match=f"{size} bytes, too many"):
            storage.read_spec(tmp_path)


def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "study.json")
    with pytest.raises(storage.CorruptSpec, match="not a regular file"):
        storage.read_spec(tmp_path)
    (tmp_path / "blocks").mkdir()
    os.mkfifo(block_file(tmp_path))
    with pytest.raises(storage.CorruptBlock, match="not a regular file"):
        storage.read_block(tmp_path, 0)
    assert storage.write_block(tmp_path, 0, BLOCK)
    assert same(storage.read_block(tmp_path, 0), BLOCK)


# Versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum_matches", [True, False])
def test_a_newer_spec_says_upgrade(tmp_path, checksum_matches):
    rest = b'",\n "schema_version": 3,\n "shape": {"$tensor": 1}\n}\n'
    digest = hashlib.sha256(rest if checksum_matches else b"").hexdigest().encode()
    (tmp_path / "study.json").write_bytes(b'{\n "sha256": "' + digest + rest)
    with pytest.raises(storage.NewerFormat, match="upgrade playbook-optax") as error:
        storage.read_spec(tmp_path)
    assert ("checksum" in str(error.value)) is not checksum_matches


def test_a_newer_block_says_upgrade_and_stays(tmp_path):
    (tmp_path / "blocks").mkdir()
    content = raw_block({"format": 3, "index": 0, "layout": "columns"}, b"anything")
    block_file(tmp_path).write_bytes(content)
    with pytest.raises(storage.NewerFormat, match="upgrade playbook-optax"):
        storage.read_block(tmp_path, 0)
    with pytest.raises(storage.NewerFormat):
        storage.write_block(tmp_path, 0, BLOCK)
    assert block_file(tmp_path).read_bytes() == content
    block_file(tmp_path).write_bytes(content[:-1] + b"\0")
    with pytest.raises(storage.CorruptBlock, match="checksum"):
        storage.read_block(tmp_path, 0)


# Missing, temporary and foreign files -------------------------------------------------------------


def test_what_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert storage.finished_blocks(directory) == []
        assert storage.remove_temporary_files(directory) == 0
        with pytest.raises(storage.NoStudy, match="holds no study"):
            storage.read_spec(directory)
        with pytest.raises(FileNotFoundError, match="block 3 is not there"):
            storage.read_block(directory, 3)


def test_only_finished_blocks_are_listed(tmp_path):
    for index in (10, 2, 0):
        storage.write_block(tmp_path, index, BLOCK)
    names = (
        ".tmp-1-0123456789abcdef",
        "block-1.pbx",
        "block-00000001.pbx.part",
        "block-٠٠٠٠٠٠٠١.pbx",
    )
    for name in names:
        (tmp_path / "blocks" / name).touch()
    assert storage.finished_blocks(tmp_path) == [0, 2, 10]


def test_writing_leaves_no_temporary_file(tmp_path):
    storage.check_writable(tmp_path)
    storage.write_spec(tmp_path, SPEC)
    storage.write_block(tmp_path, 0, BLOCK)
    storage.write_block(tmp_path, 0, BLOCK)
    storage.write_spec(tmp_path, SPEC)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["blocks", "blocks/block-00000000.pbx", "study.json"]


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_our_left_overs_are_removed(tmp_path):
    (tmp_path / "blocks").mkdir()
    dead, ours = dead_pid(), os.getpid()
    gone = [tmp_path / f".tmp-{dead}-{'0' * 16}", tmp_path / "blocks" / f".tmp-{dead}-{'a' * 16}"]
    stale = tmp_path / f".tmp-{ours}-{'1' * 16}"
    stay = [
        tmp_path / f".tmp-{ours}-{'2' * 16}",
        tmp_path / f".tmp-{dead}-short",
        tmp_path / ".tmp-notes",
        tmp_path / "notes.txt",
    ]
    for path in (*gone, stale, *stay):
        path.touch()
    os.utime(stale, (0, 0))
    folder = tmp_path / f".tmp-{dead}-{'3' * 16}"
    folder.mkdir()
    assert storage.remove_temporary_files(tmp_path) == 3
    assert sorted(tmp_path.rglob("*")) == sorted([*stay, folder, tmp_path / "blocks"])


# Writers ------------------------------------------------------------------------------------------


def test_the_first_block_stays_and_a_corrupt_one_is_replaced(tmp_path):
    other = {"x": np.zeros(3, np.float32), "ok": np.zeros(3, bool)}
    assert storage.write_block(tmp_path, 0, BLOCK)
    assert not storage.write_block(tmp_path, 0, other)
    assert same(storage.read_block(tmp_path, 0), BLOCK)
    path = block_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert storage.write_block(tmp_path, 0, other)
    assert same(storage.read_block(tmp_path, 0), other)


def test_the_first_spec_stays_unless_replaced(tmp_path):
    assert storage.write_spec(tmp_path, {"a": 1})
    assert not storage.write_spec(tmp_path, {"a": 2})
    assert storage.read_spec(tmp_path)["a"] == 1
    assert storage.write_spec(tmp_path, {"a": 2}, replace=True)
    assert storage.read_spec(tmp_path)["a"] == 2


def test_no_directory_and_no_address_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = (
        lambda directory: storage.check_writable(directory),
        lambda directory: storage.write_spec(directory, SPEC),
        lambda directory: storage.read_spec(directory),
        lambda directory: storage.write_block(directory, 0, BLOCK),
        lambda directory: checkpoints.Checkpoints(directory, "blocks-1"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"directory is empty; write '\.'"):
            call("")
        for address in ("gs://bucket/runs", "s3:/bucket/runs", pathlib.Path("hdfs://host/runs")):
            with pytest.raises(ValueError, match="is an address, not a directory"):
                call(address)
    assert not list(tmp_path.iterdir())


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_spec("~/runs/a", SPEC)
    storage.write_block(pathlib.Path("~/runs/a"), 0, BLOCK)
    assert storage.read_spec(tmp_path / "runs" / "a")["name"] == "toy"
    assert storage.finished_blocks(tmp_path / "runs" / "a") == [0]


def test_every_name_is_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "sync_directory", lambda folder: synced.append(folder))
    directory = tmp_path / "runs" / "a"
    storage.write_block(directory, 0, BLOCK)
    # Every folder that was made has a name in the one above it.
    assert {tmp_path, tmp_path / "runs", directory} <= set(synced)
    # A file is synced itself, then its name.
    assert synced[-1] == directory / "blocks"


def test_files_have_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o077)
    try:
        storage.write_spec(tmp_path / "a", SPEC)
        storage.write_block(tmp_path / "a", 0, BLOCK)
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_equal_content_gives_equal_files(tmp_path):
    for name in ("one", "two"):
        storage.write_spec(tmp_path / name, SPEC)
        storage.write_block(tmp_path / name, 0, BLOCK)
    for path in ("study.json", "blocks/block-00000000.pbx"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_without_hard_links_the_first_block_stays_too(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.write_block(tmp_path, 0, BLOCK)
    assert not storage.write_block(tmp_path, 0, BLOCK | {"x": np.zeros(3, np.float32)})
    assert not storage._commit(block_file(tmp_path), lambda: [b"late"], replace=False)
    assert same(storage.read_block(tmp_path, 0), BLOCK)


def test_a_stolen_temporary_file_is_written_again(tmp_path, monkeypatch):
    real, stolen = os.link, []

    def link(source, target):
        if len(stolen) < 2:
            stolen.append(source)
            os.unlink(source)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert storage.write_block(tmp_path, 0, BLOCK)
    assert len(stolen) == 2
    assert same(storage.read_block(tmp_path, 0), BLOCK)
    stolen.clear()
    monkeypatch.setattr(storage, "_COMMIT_ATTEMPTS", 2)
    with pytest.raises(storage.NotWritable):
        storage.write_block(tmp_path, 1, BLOCK)


def test_a_full_disk_leaves_the_study_readable(tmp_path, monkeypatch):
    storage.write_block(tmp_path, 0, BLOCK)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(storage.NotWritable, match=r"disk is full.*Finished blocks"):
            storage.write_block(tmp_path, 1, BLOCK)
    assert storage.finished_blocks(tmp_path) == [0]
    assert os.listdir(tmp_path / "blocks") == ["block-00000000.pbx"]
    assert same(storage.read_block(tmp_path, 0), BLOCK)
    assert storage.write_block(tmp_path, 1, BLOCK)


def test_a_read_only_directory_is_an_error_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(storage.NotWritable, match="choose a directory"):
        storage.check_writable(tmp_path / "file")
    with pytest.raises(OSError, match="choose a directory"):
        storage.check_writable(tmp_path / "file" / "below")
    # The tests may run as root, whom no permission stops; so the system call refuses instead.
    real = open

    def refuse(name, mode="r", *more, **named):
        if "x" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, mode, *more, **named)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(storage.NotWritable, match="Permission denied"):
        storage.check_writable(tmp_path / "study")


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    left_over = outside / f".tmp-{dead_pid()}-{'0' * 16}"
    left_over.touch()
    study = tmp_path / "study"
    study.mkdir()
    (study / "blocks").symlink_to(outside)
    with pytest.raises(storage.NotWritable, match="symbolic link"):
        storage.check_writable(study)
    with pytest.raises(storage.NotWritable, match="symbolic link"):
        storage.write_block(study, 0, BLOCK)
    assert storage.remove_temporary_files(study) == 0
    assert list(outside.iterdir()) == [left_over]
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (study / "study.json").symlink_to(secret)
    storage.write_spec(study, SPEC)
    assert secret.read_text() == "kept"


def test_errors_share_one_base():
    for error in (
        storage.CorruptBlock,
        storage.CorruptSpec,
        storage.NewerFormat,
        storage.NoStudy,
        storage.NotWritable,
    ):
        assert issubclass(error, storage.StorageError)
