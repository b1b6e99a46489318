"""Saves inside long blocks: the state of unfinished trials, so that a kill costs seconds.

A study directory's ``checkpoints`` holds one folder for each group of blocks that is being trained,
and in it the two newest saves, ``step-00000400`` and so on. A save is a folder with Orbax's files
of the arrays in ``arrays`` and a ``manifest.json`` that says what they are. It is made under a
temporary name and renamed, so that one with the right name is whole. Orbax reads most single-bit
flips silently wrong; so the manifest has a SHA-256 of every file, which is compared before Orbax
reads them, and one of the arrays, which is compared with what it has read. Where they differ the
save before is used.

In a job of several processes each saves blocks of its own, and Orbax writes NumPy arrays in the
first process only. The others store theirs in ``arrays.pbx``, in the format of finished blocks.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.records import storage

_T = TypeVar("_T")

NUM_KEPT = 2

_FOLDER = "checkpoints"
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_SAVE = re.compile(r"step-([0-9]{8,10})")
_TEMPORARY = re.compile(r"\.tmp-([0-9]{1,10})-[0-9a-f]{16}")
_REMOVALS, _SECONDS_PER_REMOVAL = 10, 0.1
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_OWN_ARRAYS = "arrays.pbx"
_FIELDS = {
    "step": int,
    "meta": dict,
    "arrays": list,
    "arrays_sha256": str,
    "files_sha256": dict,
}
# Orbax makes three files or more of each array, each of which is brought to the disk. Arrays below
# this size are stored as the bytes of one: one file system had 3.6 s to do for 1 MB in 372 files.
_JOIN_BELOW_BYTES = 2**20
_JOINED = "joined"
# Of small files, which take a whole block of the disk each.
_FILES_PER_ARRAY, _BYTES_PER_FILE, _BYTES_PER_SAVE = 3, 4096, 65536
_OS_ERROR = re.compile(r"os_error_code='([0-9]{1,4})'")


class Checkpoints:
    """The saves of one group of blocks.

    Args:
      directory: the study directory.
      name: names the group: lower-case letters, digits and hyphens, at most 64.
      owner: the study; a save of another one is as good as none.

    Raises:
      ValueError: another name.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        owner: storage.Owner = storage.NOBODY,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name = {name!r} must be of lower-case letters, digits and hyphens.")
        self._folder = storage.root(directory) / _FOLDER / name
        self._owner = owner

    def write(self, step: int, arrays: Sequence[np.ndarray], meta: Mapping[str, Any]) -> None:
        """Saves arrays, and removes all but the newest `NUM_KEPT` saves.

        Args:
          step: updates done; a save of the same step that is there already stays.
          arrays: host arrays of any shapes and dtypes but random keys.
          meta: what strict JSON can hold.

        Raises:
          NotWritable: the system refused; older saves are untouched.
          ImportError: Orbax is not installed.
        """
        arrays = [np.ascontiguousarray(array).reshape(np.shape(array)) for array in arrays]
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        made = False
        try:
            _real_folder(self._folder.parent)
            _real_folder(self._folder)
            temporary.mkdir(parents=True)
            made = True
            _write_arrays(temporary, arrays)
            manifest = {
                "study": self._owner.study,
                "step": step,
                "meta": dict(meta),
                "arrays": [[str(array.dtype), list(array.shape)] for array in arrays],
                "arrays_sha256": _digest(arrays),
                "files_sha256": _sync_and_digest(temporary),
            }
            storage.write_document(temporary / _MANIFEST, manifest)
            self._place(temporary, final)
            storage.sync_directory(self._folder)
        except storage.NotWritable:
            raise
        except OSError as error:
            # Another worker has finished these blocks and removed their saves, this one included.
            if made and not temporary.exists():
                return
            raise storage.file_error(final, "write", error) from error
        finally:
            _remove(temporary)
        # What is newer was passed over when this work began, unless another worker is ahead.
        kept = [save for save in self._saves() if _step(save) <= step or self._is_sound(save)]
        for save in self._saves():
            if save not in kept[:NUM_KEPT]:
                shutil.rmtree(save, ignore_errors=True)

    def _place(self, temporary: Path, final: Path) -> None:
        """Gives a save its name; a sound one of that step stays, being the same."""
        try:
            _rename(temporary, final)
        except FileExistsError:
            if not self._is_sound(final):
                # Whoever else replaces it has written the same.
                shutil.rmtree(final, ignore_errors=True)
                with contextlib.suppress(FileExistsError):
                    _rename(temporary, final)

    def meta(self) -> dict[str, Any] | None:
        """The meta of the newest save whose manifest is sound; None if there is none."""
        for save in self._saves():
            manifest = self._manifest(save)
            if manifest is not None:
                return dict(manifest["meta"])
        return None

    def foreign(self) -> bool:
        """Whether there are saves, and all that can be read are another study's."""
        manifests = [found for save in self._saves() if (found := _manifest(save)) is not None]
        return bool(manifests) and not any(self._owns(manifest) for manifest in manifests)

    def read_newest(
        self, like: Sequence[Any], last: int = _checks.MAX_STEPS
    ) -> tuple[int, list[np.ndarray], dict[str, Any]] | None:
        """The newest save that is what was written, and of these dtypes and shapes.

        Args:
          like: what has ``dtype`` and ``shape``, one for each array.
          last: saves of later steps are passed over.

        Returns:
          (step, arrays, meta); None if there is no sound save.
        """
        wanted = [[str(np.dtype(one.dtype)), list(one.shape)] for one in like]
        for save in self._saves():
            manifest = self._manifest(save)
            if manifest is None or manifest["step"] > last or manifest["arrays"] != wanted:
                continue
            if not _intact(save, manifest["files_sha256"]):
                continue
            arrays = _read_arrays(save, wanted)
            if arrays is not None and _digest(arrays) == manifest["arrays_sha256"]:
                return manifest["step"], arrays, dict(manifest["meta"])
        return None

    def remove(self) -> None:
        """Removes all saves of the group, once its blocks are finished."""
        if not self._folder.is_symlink():
            shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # Other groups have saves there.
            self._folder.parent.rmdir()

    def _owns(self, manifest: Mapping[str, Any]) -> bool:
        if "study" not in manifest:
            return not self._owner.bound
        return bool(manifest["study"] == self._owner.study)

    def _manifest(self, save: Path) -> dict[str, Any] | None:
        """A save's manifest; None if it is not what was written, or another study's."""
        manifest = _manifest(save)
        return manifest if manifest is not None and self._owns(manifest) else None

    def _is_sound(self, save: Path) -> bool:
        """Whether a save is of this study, its files those that were written."""
        manifest = self._manifest(save)
        return manifest is not None and _intact(save, manifest["files_sha256"])

    def _saves(self) -> list[Path]:
        """Folders of finished saves, newest first."""
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        saves = [self._folder / name for name in names if _SAVE.fullmatch(name)]
        return sorted(saves, key=_step, reverse=True)


def groups(directory: str | os.PathLike[str]) -> list[str]:
    """The names of all groups that have a folder.

    Args:
      directory: the study directory.

    Returns:
      Names in alphabetical order.
    """
    folder = storage.root(directory) / _FOLDER
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        name
        for name in names
        if _NAME.fullmatch(name) and stat.S_ISDIR((folder / name).lstat().st_mode)
    )


def remove_temporary_folders(directory: str | os.PathLike[str]) -> int:
    """Removes what a killed process of this machine left half written.

    Args:
      directory: the study directory.

    Returns:
      How many folders were removed.
    """
    removed = 0
    for name in groups(directory):
        folder = storage.root(directory) / _FOLDER / name
        for path in _children(folder):
            match = _TEMPORARY.fullmatch(path.name)
            if match and not storage.process_exists(int(match.group(1))):
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
    return removed


def _children(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # Removed by its owner meanwhile.
        return []


def _real_folder(folder: Path) -> None:
    """Makes a folder; a link there could lead writes out of the study directory."""
    storage.make_folder(folder)
    if folder.is_symlink():
        raise storage.NotWritable(
            f"{str(folder)!r} is a symbolic link: nothing is written outside the study directory. "
            "Replace it by a real directory."
        )


def _rename(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError as error:
        if final.is_dir():
            raise FileExistsError(str(final)) from error
        raise


def _step(save: Path) -> int:
    return int(save.name.removeprefix("step-"))


def _leaf(number: int) -> str:
    return f"leaf-{number:05d}"


def _packed(arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays as they are stored: large ones by themselves, small ones as bytes one after another.

    Those without elements are known from the manifest, and Orbax refuses them.
    """
    packed = {_leaf(i): one for i, one in enumerate(arrays) if one.nbytes >= _JOIN_BELOW_BYTES}
    small = [one for one in arrays if 0 < one.nbytes < _JOIN_BELOW_BYTES]
    if small:
        packed[_JOINED] = np.concatenate([one.reshape(-1).view(np.uint8) for one in small])
    return packed


def _unpacked(found: Mapping[str, Any], wanted: Sequence[Any]) -> list[np.ndarray]:
    """What `_packed` was given, from [dtype, shape] of each array."""
    joined = np.asarray(found.get(_JOINED, np.empty(0, np.uint8)))
    start, arrays = 0, []
    for i, (name, shape) in enumerate(wanted):
        dtype = storage.stored_dtype(name)
        num_bytes = dtype.itemsize * math.prod(shape)
        if num_bytes >= _JOIN_BELOW_BYTES:
            arrays.append(np.asarray(found[_leaf(i)]))
            continue
        raw = joined[start : start + num_bytes]
        # A copy, because the bytes of a dtype must begin where the machine can read them.
        arrays.append(raw.copy().view(dtype).reshape(shape))
        start += num_bytes
    return arrays


def _packed_shapes(wanted: Sequence[Any]) -> dict[str, list[Any]]:
    """[dtype, shape] of what `_packed` makes of such arrays."""
    sizes = [storage.stored_dtype(name).itemsize * math.prod(shape) for name, shape in wanted]
    shapes = {_leaf(i): wanted[i] for i, size in enumerate(sizes) if size >= _JOIN_BELOW_BYTES}
    joined = sum(size for size in sizes if size < _JOIN_BELOW_BYTES)
    return shapes | ({_JOINED: ["uint8", [joined]]} if joined else {})


def _manifest(save: Path) -> dict[str, Any] | None:
    """A save's manifest; None if it is not what was written."""
    try:
        if save.is_symlink() or (save / _MANIFEST).is_symlink():
            return None
        manifest = storage.read_document(save / _MANIFEST)
    except (storage.StorageError, OSError):
        return None
    if not all(type(manifest.get(field)) is kind for field, kind in _FIELDS.items()):
        return None
    return manifest if manifest["step"] == _step(save) else None


def _write_arrays(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    """Stores arrays.

    Raises:
      OSError: the system refused.
    """
    filled = _packed(arrays)
    checkpointer, save_args, _ = _orbax()
    if not filled:
        return
    if jax.process_index() > 0:
        (folder / _OWN_ARRAYS).write_bytes(storage.block_to_bytes(0, filled))
        return
    _reserve(folder, filled.values())
    try:
        _run(lambda: checkpointer.save(folder.absolute() / _ARRAYS, args=save_args(filled)))
    except OSError:
        raise
    except Exception as error:
        # What the system refuses, a full disk first of all, is an error of many types in Orbax.
        number = _OS_ERROR.search(str(error))
        code = errno.EIO if number is None else int(number.group(1))
        why = str(error).partition("\n")[0] if number is None else os.strerror(code)
        raise OSError(code, why) from error


def _reserve(folder: Path, arrays: Iterable[np.ndarray]) -> None:
    """Finds out whether a save fits, before Orbax begins.

    Orbax writes all arrays at once. When one fails, it neither stops the others nor waits for them:
    their files appear in a folder that is being removed, and their threads complain afterwards.

    Raises:
      OSError: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    each = _FILES_PER_ARRAY * _BYTES_PER_FILE
    size = _BYTES_PER_SAVE + sum(array.nbytes + each for array in arrays)
    place = folder / "reserved"
    try:
        with open(place, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Not every file system can tell.
    finally:
        place.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Removes a folder, to which threads that Orbax has left behind may still be adding files."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_SECONDS_PER_REMOVAL)


def _read_arrays(save: Path, wanted: Sequence[Any]) -> list[np.ndarray] | None:
    """What is stored, in the wanted dtypes and shapes; None if it cannot be read."""
    filled = _packed_shapes(wanted)
    checkpointer, _, restore_args = _orbax()
    path = save.absolute() / _ARRAYS

    def restore() -> Mapping[str, Any]:
        # Nothing is read that declares itself larger than what is wanted.
        tree = checkpointer.metadata(path).item_metadata.tree
        for name, (dtype, shape) in filled.items():
            found = tree[name]
            chunk = found.storage.chunk_shape
            fits = all(one <= max(size, 1) for one, size in zip(chunk, shape, strict=True))
            if [str(found.dtype), list(found.shape)] != [dtype, shape] or not fits:
                raise ValueError(f"{name} is not {dtype} of shape {shape}")
        restored: Mapping[str, Any] = checkpointer.restore(path, args=restore_args(list(filled)))
        return restored

    found: Mapping[str, Any] = {}
    try:
        if (save / _OWN_ARRAYS).exists():
            found = storage.block_from_bytes((save / _OWN_ARRAYS).read_bytes(), 0)
        elif filled:
            found = _run(restore)
        shapes = {name: [str(one.dtype), list(one.shape)] for name, one in found.items()}
        if shapes != filled:
            return None
        return _unpacked(found, wanted)
    except Exception:
        # Damage shows in as many ways as Orbax and its libraries have parts.
        return None


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sync_and_digest(folder: Path) -> dict[str, str]:
    """Brings all files below a folder to the disk, which Orbax leaves to the system.

    Returns:
      Path below the folder to SHA-256.
    """
    digests = {}
    for path, _, names in os.walk(folder):
        for name in names:
            whole = Path(path) / name
            with open(whole, "rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[whole.relative_to(folder).as_posix()] = digest
        storage.sync_directory(Path(path))
    return digests


def _intact(save: Path, digests: Mapping[str, str]) -> bool:
    """Whether the files are those that were written, and no others; no link is followed."""
    try:
        files: dict[str, str] = {}
        for path, folders, names in os.walk(save):
            for name in (*folders, *names):
                whole = Path(path) / name
                mode = whole.lstat().st_mode
                if not (stat.S_ISDIR(mode) if name in folders else stat.S_ISREG(mode)):
                    return False
            files |= {(Path(path) / name).relative_to(save).as_posix(): name for name in names}
        if set(files) != {*digests, _MANIFEST}:
            return False
        for name, expected in digests.items():
            with open(save / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return False
    except OSError:
        return False
    return True


def _run(function: Callable[[], _T]) -> _T:
    """Calls Orbax, which would take this thread's event loop away, in another thread."""

    def is_fatal(record: logging.LogRecord) -> bool:
        # What fails is raised, and told once.
        return record.levelno >= logging.CRITICAL

    logger = logging.getLogger("absl")
    logger.addFilter(is_fatal)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(function).result()
    finally:
        logger.removeFilter(is_fatal)


def _orbax() -> tuple[Any, Any, Any]:
    """A checkpointer of this process alone, and what makes its arguments to save and restore."""
    ocp = _checks.require("orbax.checkpoint", "checkpoints", "Saving inside a long block")
    # Each process of a job saves blocks of its own: it must not wait for the others.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"playbook-optax-{index}",
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, multiprocessing_options=alone
    )

    def restore_args(names: Sequence[str]) -> Any:
        return ocp.args.PyTreeRestore(
            item=dict.fromkeys(names, 0),
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names},
        )

    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)
    return checkpointer, ocp.args.PyTreeSave, restore_args
