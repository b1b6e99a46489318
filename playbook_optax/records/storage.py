"""Files of a study: strict JSON and a plain array container, both with a SHA-256 of their content.

A study directory holds ``study.json`` and ``blocks/block-00000000.pbx``, ``block-00000001.pbx``, …,
one immutable file per finished block of trials. A file appears under its name only once it is
complete: it is written to a temporary name beside it, synced and renamed. Files are named by index
only, nothing stored is ever unpickled, and no size that a file declares is believed before it has
been compared with the size that the file has.

Every file names the study that it is of, by the digest of the spec (`study_identity`), inside its
own digest: a block or a save of another study is refused. ``study.json`` is written once. A longer
study adds ``trials-00000012.json``, which says how many trials there are now, and where points come
from a table the longer table; the largest counts, so that of two processes that extend a study at
once the shorter extension takes nothing away.

An array file is, in this order:

====================  ==========================================================================
bytes                 content
====================  ==========================================================================
8                     the magic ``PBXARRAY``
8                     length of the header in bytes, unsigned, little-endian
header length         strict JSON: ``format``, ``study`` (see `study_identity`), ``index``,
                      ``arrays`` (``name``, ``dtype``, ``shape``, ``offset``, ``nbytes`` of each),
                      padded with spaces
as declared           the arrays, little-endian, C order, each at a multiple of 64 bytes
32                    SHA-256 of everything before it
====================  ==========================================================================
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from playbook_optax._text import PARAGRAPH, printable

_P = ParamSpec("_P")
_R = TypeVar("_R")

SCHEMA_VERSION = 2
BLOCK_FORMAT = 2
# The first that bound a file to its study; what is older is read without a proof of it.
_BOUND_SCHEMA, _BOUND_FORMAT = 2, 2

SPEC_NAME = "study.json"
_BLOCKS_NAME = "blocks"
_BLOCK_PATTERN = re.compile(r"block-([0-9]{8})\.pbx")
_EXTENSION_PATTERN = re.compile(r"trials-([0-9]{8,10})\.json")
_TEMPORARY_PATTERN = re.compile(r"\.tmp-([0-9]{1,10})-[0-9a-f]{16}")
_MAX_BLOCKS = 10**8
# How far a study has come, not which study it is: each extension changes these.
_PROGRESS = ("num_trials", "planned_trials", "points", "schema_version")

# The digest stands at a fixed place, so that it covers every byte after it, white space included.
_SPEC_PREFIX = b'{\n "sha256": "'
_MAGIC = b"PBXARRAY"
_PRELUDE = struct.Struct("<8sQ")
_DIGEST_BYTES = 32
_ALIGNMENT = 64
# A drive's letter is no scheme.
_ADDRESS_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

# Looked at before anything is parsed. A document of many points has some MB. Parsed, numbers take 5
# times their size, text of a letter or two 20 times, and empty lists so much that their number is
# limited as well.
_MAX_JSON_BYTES = 32 * 2**20
_MAX_JSON_CONTAINERS = 10**6
_MAX_JSON_DEPTH = 64
# Some 100 bytes describe an array: this is room for 40,000 of them in one block.
_MAX_HEADER_BYTES = 4 * 2**20
_MAX_DIMENSIONS = 32
_STALE_SECONDS = 3600.0
_COMMIT_ATTEMPTS = 3

# What opening a socket, a device without a driver, or a link to itself gives.
_NO_FILE = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP, errno.ELOOP)

_ENTRY_FIELDS = {"name", "dtype", "shape", "offset", "nbytes"}
# A string, or what is left of the text after its beginning, or a bracket. Nothing is tried twice:
# the repetitions are possessive and a string needs no end.
_JSON_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)

_DTYPES = {
    np.dtype(name).name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz),
        *(ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz),
        *(ml_dtypes.int4, ml_dtypes.uint4),
    )
}


# An array that a file declares: name, dtype, shape.
Declared = tuple[str, np.dtype, tuple[int, ...]]
CheckLayout = Callable[[Sequence[Declared]], None]


def stored_dtype(name: str) -> np.dtype:
    """The dtype of this name; `ValueError` unless it is one that is stored."""
    if name not in _DTYPES:
        raise ValueError(f"the dtype {name!r} is not stored")
    return _DTYPES[name]


class StorageError(Exception):
    """Something about a study directory that the caller has to know; the base of all below."""

    def __str__(self) -> str:
        # It tells what a file holds, which may be anything.
        return printable(super().__str__(), PARAGRAPH)


class NoStudy(StorageError, FileNotFoundError):  # noqa: N818
    """The directory, its ``study.json`` or the block asked for does not exist."""


class NotWritable(StorageError, OSError):  # noqa: N818
    """A file of the study could not be written; what was finished before is untouched."""


class NotReadable(StorageError, OSError):  # noqa: N818
    """The system refused to read a file of the study; what is on the disk is untouched."""


class CorruptSpec(StorageError):  # noqa: N818
    """``study.json`` is not what was once written."""


class CorruptBlock(StorageError):  # noqa: N818
    """A block's file is not what was once written: run that block again."""


class ForeignBlock(CorruptBlock):
    """A block's file is sound, and of another study."""


class NewerFormat(StorageError):  # noqa: N818
    """The files were written by a newer version of this package."""


def file_error(path: Path, action: str, error: OSError) -> NotWritable:
    """What the system's refusal means for the study."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "the disk is full; free some space and run the same command again"
    else:
        why = f"{error.strerror or error}; choose a directory that can be written"
    return NotWritable(f"cannot {action} {str(path)!r}: {why}. Finished blocks are untouched.")


def _names_refusals(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that reads, with a name of ours for what the system refuses."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except StorageError:
            raise
        except MemoryError as error:
            raise NotReadable(
                f"cannot read {str(args[0])!r}: it does not fit into memory."
            ) from error
        except OSError as error:
            raise _refusal(args[0], error) from error

    return wrapper


def _refusal(path: Any, error: OSError) -> "NotReadable":
    """What the system's refusal to read means."""
    named = isinstance(error.filename, (str, bytes))
    where = os.fsdecode(error.filename) if named else str(path)
    return NotReadable(f"cannot read {where!r}: {error.strerror or error}. It was not changed.")


# Strict JSON ------------------------------------------------------------------------------------


def _encode(value: Any, path: str) -> Any:
    """`value` with only what strict JSON can hold; ``{"$float": "nan"}`` for non-finite floats."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        encoded = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {key!r}: keys must be strings to be stored.")
            encoded[key] = _encode(item, f"{path}[{key!r}]")
        # A mapping of the caller's that looks like one of our encodings is wrapped once more.
        if len(encoded) == 1 and next(iter(encoded)).startswith("$"):
            return {"$mapping": encoded}
        return encoded
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{path} = {value!r} of type {type(value).__name__} cannot be stored as JSON. Use numbers, "
        "strings, booleans, None, lists and string-keyed mappings of them."
    )


def as_stored(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec as a round trip through ``study.json`` would return it.

    Args:
      spec: see `write_spec`.

    Returns:
      A deep copy with lists for tuples and numbers for NumPy scalars.
    """
    return {name: _decode(_encode(item, f"spec[{name!r}]")) for name, item in spec.items()}


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """What a block's arrays are, for the spec: name to [dtype, shape of one run].

    Args:
      arrays: name to array with a leading axis of runs.

    Returns:
      A mapping that JSON can hold.
    """
    return {name: [array.dtype.name, list(array.shape[1:])] for name, array in arrays.items()}


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays' names, dtypes, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(
            f"{name!r}{array.dtype.name}{array.shape}".encode("utf-8", "backslashreplace")
        )
        digest.update(_little_endian(array))
    return digest.hexdigest()


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key == "$float":
            if item not in ("nan", "inf", "-inf"):
                raise ValueError(f"{{'$float': {item!r}}} is none of nan, inf, -inf")
            return float(item)
        if key == "$mapping":
            if not isinstance(item, dict):
                raise ValueError("'$mapping' does not hold a mapping")
            return {name: _decode(inner) for name, inner in item.items()}
    return {name: _decode(item) for name, item in value.items()}


def _check_depth(text: str) -> None:
    """Raises where parsing would go too deep or make too many lists and objects."""
    depth = containers = 0
    for token in _JSON_TOKEN.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            containers += 1
            if depth > _MAX_JSON_DEPTH:
                raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH} levels")
            if containers > _MAX_JSON_CONTAINERS:
                raise ValueError(f"more than {_MAX_JSON_CONTAINERS} lists and objects")
        elif first in "]}":
            depth -= 1


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"the token {token} is not JSON")


def _finite_float(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError(f"the number {token} does not fit a float")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return mapping


def _parse_json(raw: bytes) -> dict[str, Any]:
    """The object that `raw` holds; `ValueError` for anything that is not strict JSON."""
    if len(raw) > _MAX_JSON_BYTES:
        raise ValueError(f"{len(raw)} bytes of JSON are too many")
    text = raw.decode("utf-8")
    _check_depth(text)
    document = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite_float,
        object_pairs_hook=_unique_keys,
    )
    if not isinstance(document, dict):
        raise ValueError("the document is not an object")
    return document


# Reading and writing whole files ----------------------------------------------------------------


def _open_for_reading(path: Path, corrupt: type[StorageError]) -> tuple[int, int]:
    """A descriptor and the real size of a regular file; a pipe or a device is refused unread."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise corrupt(f"{str(path)!r} cannot be read: {error.strerror}.") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise corrupt(f"{str(path)!r} is not a regular file.")
    return descriptor, status.st_size


def read_file(path: Path, most_bytes: int) -> bytes:
    """Reads a small file beside a study, whatever lies in its place.

    Args:
      path: the file.
      most_bytes: a larger one is refused unread.

    Returns:
      All of it.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      StorageError: it is not a regular file, or too large.
      NotReadable: the system refused.
    """
    try:
        descriptor, size = _open_for_reading(path, StorageError)
        with open(descriptor, "rb") as file:
            if size <= most_bytes:
                return file.read(most_bytes)
    except (FileNotFoundError, NotADirectoryError, StorageError):
        raise
    except OSError as error:
        raise _refusal(path, error) from error
    raise StorageError(f"{str(path)!r} has {size} bytes; at most {most_bytes} are read.")


def write_file(path: Path, content: bytes) -> Path:
    """Replaces a file as a whole; a link in its place is replaced, not followed out of there.

    Args:
      path: the file, in an existing directory.
      content: all of it.

    Returns:
      `path`.

    Raises:
      NotWritable: the system refused; what was there stays.
    """
    _commit(path, lambda: (content,), replace=True)
    return path


def sync_directory(directory: Path) -> None:
    """Brings the names in a directory to the disk."""
    if os.name != "posix":  # Other systems cannot open a directory; their rename is enough.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, and brings their names to the disk.

    Raises:
      OSError: the system refused.
    """
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        missing.append(one)
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        with contextlib.suppress(PermissionError):  # One may write in a folder and not read it.
            sync_directory(one.parent)


def _write_temporary(folder: Path, chunks: Iterable[bytes]) -> Path:
    temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _commit(path: Path, chunks: Callable[[], Iterable[bytes]], *, replace: bool) -> bool:
    """Writes `path` so that it is there whole or not at all.

    Args:
      path: the final name.
      chunks: makes the content, again for every attempt.
      replace: whether a file of that name gives way; otherwise the first writer wins.

    Returns:
      Whether the content was put in place; False only without `replace`.

    Raises:
      NotWritable: the system refused.
    """
    try:
        for attempt in range(_COMMIT_ATTEMPTS):
            temporary = _write_temporary(path.parent, chunks())
            try:
                placed = _place(temporary, path, replace=replace)
            except FileNotFoundError:
                # Another machine took our temporary file for a left-over and removed it.
                if attempt + 1 == _COMMIT_ATTEMPTS:
                    raise
                continue
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(path.parent)
            return placed
    except OSError as error:
        raise file_error(path, "write", error) from error
    except MemoryError as error:
        raise NotWritable(f"cannot write {str(path)!r}: it does not fit into memory.") from error
    raise AssertionError("unreachable")


def _place(temporary: Path, path: Path, *, replace: bool) -> bool:
    if not replace:
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise
        except OSError:
            # A file system without hard links: the check and the rename are two steps there.
            if path.exists():
                return False
    os.replace(temporary, path)
    return True


def root(directory: str | os.PathLike[str]) -> Path:
    """A directory as it was meant: ``~`` is the home directory.

    Args:
      directory: what a user gave.

    Returns:
      The path.

    Raises:
      ValueError: it is empty, which would be wherever one stands, or an address such as
        ``gs://bucket/runs``, where a rename does not put a file in place whole.
    """
    text = os.fsdecode(directory)
    if not text:
        raise ValueError("directory is empty; write '.' for the current directory.")
    if _ADDRESS_PATTERN.match(text):
        raise ValueError(
            f"directory = {text!r} is an address, not a directory: studies are stored in file "
            "systems only. Mount it, or write to a local directory and copy it there."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"directory = {text!r} cannot be expanded: {error}") from error


def _blocks_folder(directory: str | os.PathLike[str]) -> Path:
    return root(directory) / _BLOCKS_NAME


def _prepare(folder: Path) -> Path:
    """Makes `folder`; a ``blocks`` that is a link could lead writes out of the directory."""
    try:
        make_folder(folder)
    except OSError as error:
        raise file_error(folder, "create the directory", error) from error
    if folder.name == _BLOCKS_NAME and folder.is_symlink():
        raise NotWritable(
            f"{str(folder)!r} is a symbolic link: nothing is written outside the study directory. "
            "Replace it by a real directory."
        )
    return folder


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Makes the study directory where it is missing and writes a probe, before the first step.

    Args:
      directory: the study directory.

    Raises:
      NotWritable: the directory cannot be made, or nothing can be written in it.
    """
    for folder in (root(directory), _blocks_folder(directory)):
        check_folder(folder)


def check_folder(folder: Path) -> Path:
    """Makes one folder where it is missing and writes a probe: `check_writable` of any folder."""
    _prepare(folder)
    try:
        _write_temporary(folder, (b"probe",)).unlink(missing_ok=True)
    except OSError as error:
        raise file_error(folder, "write in", error) from error
    return folder


def process_exists(pid: int) -> bool:
    """Whether a process with this number runs on this machine; True where that is not known."""
    if os.name != "posix":  # Elsewhere os.kill would end the process.
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_temporary_files(directory: str | os.PathLike[str]) -> int:
    """Removes temporary files that a killed process of ours left behind, and nothing else.

    A file whose process still runs on this machine stays for an hour. A writer on another machine
    that shares the directory notices when its file is taken, and writes it again.

    Args:
      directory: the study directory.

    Returns:
      How many files were removed.
    """
    removed = 0
    blocks = _blocks_folder(directory)
    for folder in (root(directory), blocks):
        if not folder.is_dir() or (folder == blocks and folder.is_symlink()):
            continue
        try:
            paths = list(folder.iterdir())
        except OSError:
            continue
        for path in paths:
            match = _TEMPORARY_PATTERN.fullmatch(path.name)
            if match is None:
                continue
            try:
                status = path.lstat()
                fresh = time.time() - status.st_mtime < _STALE_SECONDS
                if not stat.S_ISREG(status.st_mode):
                    continue
                if fresh and process_exists(int(match.group(1))):
                    continue
                path.unlink()
                removed += 1
            except OSError:
                continue  # Somebody else's to remove, or gone already: a left-over does no harm.
    return removed


# The spec ---------------------------------------------------------------------------------------


def _document_bytes(spec: Mapping[str, Any]) -> bytes:
    content = dict(spec)
    version = content.pop("schema_version", SCHEMA_VERSION)
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"spec['schema_version'] = {version!r} cannot be written: this version of "
            f"playbook_optax writes {SCHEMA_VERSION}."
        )
    if "sha256" in content:
        raise ValueError("spec has the key 'sha256', which study.json uses for its own digest.")
    document = _encode({"schema_version": SCHEMA_VERSION, **content}, "spec")
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=True)
    _check_depth(text)
    rest = b'",' + text.removeprefix("{").encode("ascii") + b"\n"
    whole = _SPEC_PREFIX + hashlib.sha256(rest).hexdigest().encode("ascii") + rest
    if len(whole) > _MAX_JSON_BYTES:
        raise ValueError(
            f"spec needs {len(whole)} bytes of JSON, which is too much for study.json: "
            f"{_MAX_JSON_BYTES} are read."
        )
    return whole


class Owner(NamedTuple):
    """The study that a file must be of.

    Attributes:
      study: `study_identity` of its spec.
      bound: False for a study that was begun before files named theirs: its own old ones pass.
    """

    study: str
    bound: bool = True


# What travels between processes, which have agreed on the study, names none.
NOBODY = Owner("")


def study_identity(spec: Mapping[str, Any]) -> str:
    """Which study a spec is of, whatever its number of trials.

    Args:
      spec: as given to `write_spec`, or as read.

    Returns:
      SHA-256 of all of it but how far it has come, in hexadecimal.

    Example:
      >>> spec = {"objective": "loss", "num_trials": 6}
      >>> study_identity(spec) == study_identity({**spec, "num_trials": 12})
      True
    """
    kept = {name: value for name, value in spec.items() if name not in _PROGRESS}
    text = json.dumps(_encode(kept, "spec"), sort_keys=True, allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def owner_of(spec: Mapping[str, Any]) -> Owner:
    """What the files of a study must name."""
    version = spec.get("schema_version", SCHEMA_VERSION)
    return Owner(study_identity(spec), version >= _BOUND_SCHEMA)


def write_spec(
    directory: str | os.PathLike[str], spec: Mapping[str, Any], *, replace: bool = False
) -> bool:
    """Writes ``study.json``, whole or not at all.

    Args:
      directory: the study directory, made when missing.
      spec: string-keyed mapping of numbers, strings, booleans, None, lists and such mappings.
        Tuples are stored as lists and NumPy scalars as numbers. The order of keys is kept.
        ``schema_version`` is added.
      replace: whether a study that is there gives way, its extensions with it; otherwise the
        first writer wins.

    Returns:
      Whether this call's spec is the one now stored; False only without `replace`.

    Raises:
      ValueError: `spec` holds something that JSON cannot, or another schema version.
      NotWritable: the system refused.
    """
    path = root(directory) / SPEC_NAME
    if replace:
        # First, so that whoever reads meanwhile sees the old study, perhaps a shorter one.
        for extension in _extensions(path.parent):
            _remove_file(extension)
    return write_document(path, spec, replace=replace)


def extend_spec(directory: str | os.PathLike[str], spec: Mapping[str, Any]) -> None:
    """Says that a stored study has more trials; fewer change nothing.

    Args:
      directory: the study directory.
      spec: the stored spec with the new ``num_trials``, and with the longer ``points`` if points
        come from a table.

    Raises:
      StorageError: another process extends the study by other points.
      NotWritable: the system refused.
    """
    count = spec["num_trials"]
    content = {
        "study": study_identity(spec),
        "num_trials": count,
        "points": as_stored({"points": spec.get("points")})["points"],
    }
    path = root(directory) / f"trials-{count:08d}.json"
    written = write_document(path, content, replace=False)
    theirs = read_spec(directory)
    if not agree_so_far(theirs.get("points"), content["points"]):
        if written:
            _remove_file(path)
        raise StorageError(
            f"{str(directory)!r} is being extended by another process, with other points. Let one "
            "of the two finish, or choose another directory."
        )


def agree_so_far(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether of two tables of points, name to list, one begins with the other; None is none."""
    if one is None or other is None:
        return one is None and other is None
    if set(one) != set(other):
        return False
    return all(
        values[: len(other[name])] == other[name][: len(values)] for name, values in one.items()
    )


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise file_error(path, "remove", error) from error


@_names_refusals
def _extensions(directory: Path) -> list[Path]:
    """The files that extend a study, the longest first."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [name for name in names if _EXTENSION_PATTERN.fullmatch(name)]
    return [directory / name for name in sorted(found, key=_count_of, reverse=True)]


def _count_of(name: str) -> int:
    return int(name.removeprefix("trials-").removesuffix(".json"))


def write_document(path: Path, content: Mapping[str, Any], *, replace: bool = True) -> bool:
    """Writes strict JSON with its SHA-256, whole or not at all.

    Args:
      path: the file, by any name.
      content: as for `write_spec`.
      replace: whether a file of that name gives way; otherwise the first writer wins.

    Returns:
      Whether this call's content is what is stored now.

    Raises:
      ValueError: as `write_spec`.
      NotWritable: as `write_spec`.
    """
    document = _document_bytes(content)
    _prepare(path.parent)
    return _commit(path, lambda: (document,), replace=replace)


def read_spec(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``study.json`` and how far the study was extended.

    Args:
      directory: the study directory.

    Returns:
      The spec as it was written, ``schema_version`` included, tuples as lists.

    Raises:
      NoStudy: there is no such file, and no block either.
      CorruptSpec: it is missing though there are blocks, its content does not match its digest,
        it is not strict JSON, or an extension is damaged or of another study.
      NewerFormat: a newer version of this package wrote it.
    """
    folder = root(directory)
    try:
        return _read_extended(folder)
    except NoStudy:
        if not finished_blocks(directory):
            raise
    # The spec is written before the first block: either it came just now, or it was lost.
    try:
        return _read_extended(folder)
    except NoStudy as error:
        raise CorruptSpec(
            f"{str(directory)!r} holds blocks, but its {SPEC_NAME} is missing: nobody can say "
            "what they are of. Restore it from a copy, or start the study again in an empty "
            "directory."
        ) from error


def _read_extended(folder: Path) -> dict[str, Any]:
    """The spec of the longest extension."""
    spec = read_document(folder / SPEC_NAME)
    for path in _extensions(folder):
        try:
            extension = read_document(path)
        except NoStudy:  # Removed meanwhile, by who replaced the study.
            continue
        except CorruptSpec as error:
            raise CorruptSpec(
                f"{str(path)!r} is damaged, so that nobody can say how far the study was extended. "
                "Remove it and make the call that extended the study again: its blocks are kept."
            ) from error
        count = extension.get("num_trials")
        table = extension.get("points")
        if extension.get("study") != study_identity(spec):
            raise CorruptSpec(
                f"{str(path)!r} extends another study than {SPEC_NAME} beside it: one of the two "
                "was copied here. Restore the other, or remove this file and make the call that "
                "extended the study again."
            )
        known = type(count) is int and count == _count_of(path.name)
        if not known or not isinstance(table, (dict, type(None))):
            raise CorruptSpec(f"{str(path)!r} does not say how far the study was extended.")
        if type(spec.get("num_trials")) is int and count > spec["num_trials"]:
            return {**spec, "num_trials": count} | ({} if table is None else {"points": table})
        break
    return spec


@_names_refusals
def read_document(path: Path) -> dict[str, Any]:
    """Reads what `write_document` wrote, and raises what `read_spec` does."""
    directory = path.parent
    try:
        descriptor, size = _open_for_reading(path, CorruptSpec)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoStudy(f"{str(directory)!r} holds no study: {str(path)!r} is missing.") from error
    with open(descriptor, "rb") as file:
        if size > _MAX_JSON_BYTES:
            raise CorruptSpec(f"{str(path)!r} has {size} bytes, too many for a {path.name}.")
        try:
            raw = file.read(size)
        except OSError as error:
            raise CorruptSpec(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    advice = "Restore it from a copy, or start the study again in an empty directory."
    start = len(_SPEC_PREFIX)
    stored, rest = raw[start : start + 64], raw[start + 64 :]
    intact = (
        raw.startswith(_SPEC_PREFIX) and hashlib.sha256(rest).hexdigest().encode("ascii") == stored
    )
    try:
        document = _parse_json(raw)
        version = document.get("schema_version")
        newer = type(version) is int and version > SCHEMA_VERSION
        if not newer:
            del document["sha256"]
            spec = {name: _decode(item) for name, item in document.items()}
    except (ValueError, KeyError, RecursionError) as error:
        raise CorruptSpec(f"{str(path)!r} is not a valid {path.name}: {error}. {advice}") from error
    if newer:
        doubt = "" if intact else " Its checksum does not match, so it may be damaged instead."
        raise NewerFormat(
            f"{str(path)!r} has schema version {version}, this version of playbook_optax reads up "
            f"to {SCHEMA_VERSION}: upgrade playbook-optax.{doubt}"
        )
    if not intact:
        raise CorruptSpec(f"{str(path)!r} does not match its checksum: it was changed. {advice}")
    if type(version) is not int or version < 1:
        raise CorruptSpec(f"{str(path)!r} has schema version {version!r}. {advice}")
    return spec


# Blocks -----------------------------------------------------------------------------------------


def wrong_rows(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """Which rows of a block are not what they should be.

    Args:
      arrays: of the block.
      expected: name to array, such as trials and points.

    Returns:
      bool (row,); None where an array is missing, or of another dtype or length.
    """
    wrong = np.zeros(len(next(iter(expected.values()))), bool)
    for name, values in expected.items():
        found = arrays.get(name)
        if found is None or found.dtype != values.dtype or found.shape != values.shape:
            return None
        wrong |= found != values
    return wrong


def is_padding(wrong: np.ndarray, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether rows with wrong points repeat the row before, as beyond the end of a table.

    A table that has grown since ends further on: such a block is trained again.

    Args:
      wrong: bool (row,), some of them True.
      arrays: of the block.

    Returns:
      Whether nothing but padding is wrong.
    """
    first = int(np.argmax(wrong))
    points = [values for name, values in arrays.items() if name.startswith("point/")]
    return first > 0 and all((values[first:] == values[first - 1]).all() for values in points)


def _check_index(index: int) -> int:
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
        raise ValueError(f"index must be an integer, got {index!r}.")
    if not 0 <= index < _MAX_BLOCKS:
        raise ValueError(f"index must be >= 0 and < {_MAX_BLOCKS}, got {index!r}.")
    return int(index)


def _block_path(directory: str | os.PathLike[str], index: int) -> Path:
    return _blocks_folder(directory) / f"block-{_check_index(index):08d}.pbx"


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _little_endian(array: np.ndarray) -> bytes:
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return (array.byteswap() if sys.byteorder == "big" else array).tobytes()


def _block_header(index: int, arrays: Mapping[str, np.ndarray], study: str) -> bytes:
    entries = []
    end = 0
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise ValueError(f"array name {name!r} is not a string.")
        dtype = array.dtype.name
        if dtype not in _DTYPES:
            raise ValueError(
                f"array {name!r} has dtype {array.dtype}, which is not stored. Use numbers or "
                "booleans (jax.random.key_data for random keys)."
            )
        if array.ndim > _MAX_DIMENSIONS:
            raise ValueError(f"array {name!r} has {array.ndim} dimensions; {_MAX_DIMENSIONS} fit.")
        offset = _aligned(end)
        end = offset + array.nbytes
        entries.append(
            {
                "name": name,
                "dtype": dtype,
                "shape": list(array.shape),
                "offset": offset,
                "nbytes": array.nbytes,
            }
        )
    document = {"format": BLOCK_FORMAT, "study": study, "index": index, "arrays": entries}
    header = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    size = _PRELUDE.size + len(header)
    header += b" " * (_aligned(size) - size)
    if len(header) > _MAX_HEADER_BYTES:
        raise ValueError(f"the header of {len(entries)} arrays is too large to be stored.")
    return header


def _block_chunks(header: bytes, arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    end = 0

    def counted(chunk: bytes) -> bytes:
        digest.update(chunk)
        return chunk

    yield counted(_PRELUDE.pack(_MAGIC, len(header)) + header)
    for array in arrays.values():
        yield counted(b"\0" * (_aligned(end) - end) + _little_endian(array))
        end = _aligned(end) + array.nbytes
    yield digest.digest()


def write_block(
    directory: str | os.PathLike[str],
    index: int,
    arrays: Mapping[str, np.ndarray],
    owner: Owner = NOBODY,
    *,
    replace: bool = False,
) -> bool:
    """Stores one finished block; a sound block that is there already stays (the first writer wins).

    Args:
      directory: the study directory, made when missing.
      index: the block's index, >= 0.
      arrays: name to array; any names; numbers and booleans, bfloat16 and float16 included, any
        shape. Order is kept.
      owner: the study that they are of.
      replace: whether a sound block gives way as well.

    Returns:
      Whether this call's arrays were stored. A file that is corrupt, or another study's, is
      replaced.

    Raises:
      ValueError: an array has a dtype that is not stored (object, text, dates).
      NewerFormat: a block of a newer format is there.
      NotWritable: the system refused; finished blocks are untouched.
    """
    path = _block_path(directory, index)
    host = {name: np.asarray(array) for name, array in arrays.items()}
    header = _block_header(int(index), host, owner.study)
    _prepare(path.parent)

    def chunks() -> Iterator[bytes]:
        return _block_chunks(header, host)

    if (replace or not path.exists()) and _commit(path, chunks, replace=replace):
        return True
    try:
        read_block(directory, index, owner)
    except (CorruptBlock, NoStudy):
        return _commit(path, chunks, replace=True)
    try:
        # Whoever stored it may not have come to this, and now it counts as stored.
        sync_directory(path.parent)
    except OSError as error:
        raise file_error(path, "write", error) from error
    return False


def _layout(header: Any, index: int) -> tuple[list[Declared], int]:
    """What a header declares, checked in Python integers, and the size of all its data."""
    if type(header.get("index")) is not int or header["index"] != index:
        raise ValueError(f"the file says that it is block {header.get('index')!r}")
    fields = {"format", "index", "arrays"}
    if header["format"] >= _BOUND_FORMAT:
        fields |= {"study"}
    if set(header) != fields or not isinstance(header["arrays"], list):
        raise ValueError("the header does not have the known fields")
    layout = []
    names = set()
    end = 0
    for entry in header["arrays"]:
        if not isinstance(entry, dict) or set(entry) != _ENTRY_FIELDS:
            raise ValueError("an array's entry does not have the known fields")
        name, dtype_name, shape = entry["name"], entry["dtype"], entry["shape"]
        if not isinstance(name, str) or name in names:
            raise ValueError(f"the array name {name!r} is not a string or occurs twice")
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            raise ValueError(f"array {name!r} has the unknown dtype {dtype_name!r}")
        if (
            not isinstance(shape, list)
            or len(shape) > _MAX_DIMENSIONS
            or not all(type(n) is int and 0 <= n < 2**62 for n in shape)
        ):
            raise ValueError(f"array {name!r} has the shape {shape!r}")
        dtype = _DTYPES[dtype_name]
        nbytes = math.prod(shape) * dtype.itemsize
        offset = _aligned(end)
        if (entry["offset"], entry["nbytes"]) != (offset, nbytes):
            raise ValueError(f"array {name!r} does not lie where its shape says")
        end = offset + nbytes
        names.add(name)
        layout.append((name, dtype, tuple(shape)))
    return layout, end


def _newer_block(index: int, version: Any) -> NewerFormat:
    return NewerFormat(
        f"block {index} has format {version}, this version of playbook_optax reads up to "
        f"{BLOCK_FORMAT}: upgrade playbook-optax."
    )


def _check_owner(header: Mapping[str, Any], owner: Owner) -> None:
    """Raises unless a block is of a study."""
    if "study" not in header:
        if owner.bound:
            raise _OfAnother("it names no study, and is of an older one than this")
    elif header["study"] != owner.study:
        raise _OfAnother("it is of another study: it was copied here, or study.json was")


class _OfAnother(ValueError):  # noqa: N818
    """A sound file of another study."""


def _read_block_file(
    file: Any, size: int, index: int, owner: Owner | None, check: CheckLayout | None = None
) -> dict[str, np.ndarray]:
    if size < _PRELUDE.size + _DIGEST_BYTES:
        raise ValueError(f"it has only {size} bytes")
    prelude = file.read(_PRELUDE.size)
    magic, header_length = _PRELUDE.unpack(prelude)
    if magic != _MAGIC:
        raise ValueError("it does not begin as an array file does")
    data_start = _PRELUDE.size + header_length
    if header_length > _MAX_HEADER_BYTES or data_start + _DIGEST_BYTES > size:
        raise ValueError(f"its header of {header_length} bytes does not fit its {size} bytes")
    raw_header = file.read(header_length)
    header = _parse_json(raw_header)
    version = header.get("format")
    newer = type(version) is int and version > BLOCK_FORMAT
    if not newer:
        if type(version) is not int or version < 1:
            raise ValueError(f"its format is {version!r}")
        layout, data_bytes = _layout(header, index)
        expected = data_start + data_bytes + _DIGEST_BYTES
        if size != expected:
            raise ValueError(f"it has {size} bytes, its header declares {expected}")
        if check is not None:
            try:
                check(layout)
            except ValueError:
                if owner is not None:  # Other arrays, perhaps because it is another study's.
                    _check_owner(header, owner)
                raise
    elif size > _MAX_JSON_BYTES:
        # Nothing says how large it should be: it is not read for the sake of the message.
        raise _newer_block(index, version)
    # What is hashed is what is used: the file is read once.
    rest = memoryview(file.read(size - data_start))
    digest = hashlib.sha256(prelude + raw_header)
    digest.update(rest[:-_DIGEST_BYTES])
    if len(rest) != size - data_start or digest.digest() != rest[-_DIGEST_BYTES:]:
        raise ValueError("it does not match its checksum")
    if newer:
        raise _newer_block(index, version)
    if owner is not None:
        _check_owner(header, owner)
    arrays = {}
    end = 0
    for name, dtype, shape in layout:
        offset = _aligned(end)
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        array = np.frombuffer(rest, dtype, count, offset) if count else np.empty(0, dtype)
        array = array.byteswap() if sys.byteorder == "big" else array
        arrays[name] = array.reshape(shape)
        arrays[name].setflags(write=False)
    return arrays


@_names_refusals
def read_block(
    directory: str | os.PathLike[str],
    index: int,
    owner: Owner | None = NOBODY,
    check: CheckLayout | None = None,
) -> dict[str, np.ndarray]:
    """Reads one block back, bit for bit, or says that it is not what was written.

    The file's real size is compared with the declared sizes before anything is allocated, then
    its SHA-256; only then are arrays made.

    Args:
      directory: the study directory.
      index: the block's index, >= 0.
      owner: the study that it must be of; None takes any.
      check: raises `ValueError` where the declared arrays are not those that the study has
        (`schema.layout_of`); called before anything is read but the header.

    Returns:
      Name to read-only array, in the order in which they were written.

    Raises:
      NoStudy: there is no such block.
      ForeignBlock: it is of another study.
      CorruptBlock: the file is damaged, cut short or another block's; run the block again.
      NewerFormat: a newer version of this package wrote it.
      StorageError: it is larger than the memory.
    """
    path = _block_path(directory, index)
    try:
        descriptor, size = _open_for_reading(path, CorruptBlock)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoStudy(f"block {index} is not there: {str(path)!r} is missing.") from error
    with open(descriptor, "rb") as file:
        try:
            return _read_block_file(file, size, int(index), owner, check)
        except MemoryError as error:
            raise NotReadable(
                f"cannot read {str(path)!r}: it has {size} bytes, which does not fit into memory."
            ) from error
        except _OfAnother as error:
            raise ForeignBlock(
                f"{str(path)!r} cannot be used: {error}. Run the study again with the same "
                "directory=, which runs this block again."
            ) from error
        except (ValueError, RecursionError, OSError) as error:
            raise CorruptBlock(
                f"{str(path)!r} is damaged: {error}. Run the study again with the same directory=, "
                "which runs this block again."
            ) from error


def block_to_bytes(index: int, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A block as the bytes of its file, to be sent to another process.

    Args:
      index: the block's index, >= 0.
      arrays: as for `write_block`.

    Returns:
      What `block_from_bytes` reads.

    Raises:
      ValueError: an array has a dtype that is not stored.
    """
    host = {name: np.asarray(array) for name, array in arrays.items()}
    return b"".join(_block_chunks(_block_header(_check_index(index), host, NOBODY.study), host))


def block_from_bytes(raw: bytes, index: int) -> dict[str, np.ndarray]:
    """Reads what `block_to_bytes` wrote, checked as a file is.

    Args:
      raw: the bytes.
      index: the block's index.

    Returns:
      Name to read-only array.

    Raises:
      CorruptBlock: the bytes are not those that were written.
      NewerFormat: a newer version of this package wrote them.
    """
    try:
        return _read_block_file(io.BytesIO(raw), len(raw), _check_index(index), NOBODY)
    except (ValueError, RecursionError) as error:
        raise CorruptBlock(f"block {index} was damaged on its way: {error}.") from error


@_names_refusals
def finished_blocks(directory: str | os.PathLike[str]) -> list[int]:
    """The indices of the blocks that are stored: presence means complete.

    Args:
      directory: the study directory; may be missing.

    Returns:
      Indices in rising order; temporary and foreign files are ignored.

    Raises:
      NotReadable: the system does not list the folder.
    """
    try:
        names = os.listdir(_blocks_folder(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (_BLOCK_PATTERN.fullmatch(name) for name in names)
    return sorted(int(match.group(1)) for match in matches if match)
