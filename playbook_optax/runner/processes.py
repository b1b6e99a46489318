"""Studies in every process of a `jax.distributed` job: each trains its share, each gets all.

Trials need no communication while they train, so a process trains its blocks on its own devices.
What the processes exchange, through JAX's coordination service, is the width, the spec (compared
before anything is compiled), which blocks are missing, that a process has failed or finished, and,
without a directory that all see, the finished blocks.

A process that dies or freezes is noticed by JAX itself: within the heartbeat that
`jax.distributed.initialize` was given, every other process is ended by JAX (SIGABRT, with the
reason on standard error). What is here adds the rest: a process that *raises* tells the others,
so that they raise as well and nobody waits for it.
"""

import contextlib
import itertools
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from playbook_optax.records import storage
from playbook_optax.runner import agreement, finished
from playbook_optax.runner.execute import Engine
from playbook_optax.runner.plan import Block, Points
from playbook_optax.runner.resume import Keeper

# A process that has not begun the call when others are this far ahead will never come.
ARRIVAL_SECONDS = 600.0
_PROBE_SECONDS = 10.0
# How long a file that one host wrote may stay invisible to another (attribute caches of NFS).
VISIBLE_SECONDS = 90.0
_POLL_SECONDS = 1.0
# The coordination service sends 64 MiB in 0.8 s, and 300 MiB not in 5.
_PART_BYTES = 16 * 2**20


class ProcessFailed(RuntimeError):  # noqa: N818
    """Another process of the job failed, so that this one cannot finish either."""


class Group:
    """The processes of a job during one call that all of them make.

    Args:
      client: of JAX's coordination service.
      index: which process this is.
      size: how many there are.
      call: the number of the call, the same in every process.
    """

    def __init__(self, client: Any, index: int, size: int, call: int) -> None:
        self._client, self.index, self.size = client, index, size
        self._call = f"playbook_optax/{call}"
        self._exchanges = itertools.count()
        self._looked = time.monotonic()
        self._check_stop: Callable[[], None] = lambda: None

    # Messages.

    def _put(self, name: str, value: bytes) -> None:
        self._client.key_value_set_bytes(f"{self._call}/{name}", value)

    def _get(self, name: str, process: int, seconds: float | None = None) -> bytes:
        """Waits for a message, unless somebody fails meanwhile."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                value: bytes = self._client.blocking_key_value_get_bytes(
                    f"{self._call}/{name}", int(1000 * _POLL_SECONDS)
                )
                return value
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            self.check()
            self._check_stop()
            if end is not None and time.monotonic() > end:
                raise ProcessFailed(
                    f"process {process} of {self.size} did not come to this call within "
                    f"{seconds:.0f} s: every process must make the same calls in the same order."
                )

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process cannot go on."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # The job is over already.
            text = f"{type(error).__name__}: {error}"
            self._put(f"failed/{self.index}", text.encode()[:4000])

    def check(self) -> None:
        """Raises what another process told by `fail`."""
        self._looked = time.monotonic()
        for name, text in self._client.key_value_dir_get_bytes(f"{self._call}/failed/"):
            process = int(name.rpartition("/")[2])
            if process != self.index:
                raise ProcessFailed(
                    f"process {process} of {self.size} failed: {text.decode(errors='replace')}. "
                    "What was finished with directory= is stored, and the same command resumes it."
                )

    def check_now_and_then(self) -> None:
        """`check`, unless the last one was a moment ago."""
        if time.monotonic() - self._looked > _POLL_SECONDS:
            self.check()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of processes; what JSON can hold."""
        number = next(self._exchanges)
        self._put(f"{number}/{self.index}", json.dumps(value).encode())
        return [
            json.loads(self._get(f"{number}/{process}", process, ARRIVAL_SECONDS))
            for process in range(self.size)
        ]

    def share(self, value: Any) -> Any:
        """Process 0's value, in every process; what others give is ignored."""
        number = next(self._exchanges)
        if self.index == 0:
            self._put(f"{number}", json.dumps(value).encode())
        return json.loads(self._get(f"{number}", 0, ARRIVAL_SECONDS))

    def arrive(self) -> None:
        """Waits until every process is here, however long they train."""
        number = next(self._exchanges)
        self._put(f"{number}/{self.index}", b"")
        for process in range(self.size):
            self._get(f"{number}/{process}", process)

    # What is agreed on before anything is compiled.

    def agree(self, spec: Mapping[str, Any]) -> None:
        """Compares the spec with that of every other process.

        Args:
          spec: with fingerprints.

        Raises:
          ValueError: they differ; every process says which and in what.
        """
        threads = agreement.machine()["threads_per_device"]
        every = self.gather({"spec": storage.as_stored(spec), "threads": threads})
        found = [
            "; ".join(differences)
            for process in range(1, self.size)
            if (
                differences := agreement.differences(
                    every[0]["spec"],
                    every[process]["spec"],
                    there="in process 0",
                    here=f"in process {process}",
                    ignore=(),
                )
            )
        ]
        if found:
            raise ValueError(
                f"the processes do not run the same study: {'; '.join(found)}. Every process must "
                "make the same call, with the same code, data and versions."
            )
        threads = [one["threads"] for one in every]
        if len(set(threads)) > 1:
            warnings.warn(
                f"the processes have {threads} threads per device: results are close to, not "
                "bit-exact with, what one of them would give.",
                UserWarning,
                stacklevel=4,
            )

    def check_shared(self, directory: str | os.PathLike[str]) -> None:
        """Checks that every process sees what process 0 writes in the directory.

        Args:
          directory: the study directory, made already.

        Raises:
          ValueError: some process does not see it.
        """
        token = self.share(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
        path = Path(directory) / token
        try:
            if self.index == 0:
                path.write_bytes(b"")
            self.arrive()
            seen = self.gather(_appears(path))
        finally:
            if self.index == 0:
                path.unlink(missing_ok=True)
        blind = [process for process in range(self.size) if not seen[process]]
        if blind:
            raise ValueError(
                f"directory = {str(directory)!r} is not shared: process {blind} of {self.size} "
                "does not see what process 0 writes there. Give a directory on a file system that "
                "every host has mounted, or none."
            )

    # Training.

    def train(
        self,
        engine: Engine,
        missing: Sequence[Block],
        points: Points,
        store: finished.Store,
        keeper: Keeper,
    ) -> Iterator[finished.Finished]:
        """Trains this process's share and yields all blocks, also those of others.

        Args:
          engine: trains blocks on this process's devices.
          missing: the blocks that this process has not got.
          points: where their points come from.
          store: where all processes store blocks, if there is such a place.
          keeper: as for `Engine.run`.

        Yields:
          Finished blocks as `Engine.run` does, stored already.
        """
        self._check_stop = keeper.check
        # A file may have come between two looks: process 0's look decides who trains what.
        agreed = self.share([block.index for block in missing])
        blocks = {block.index: block for block in missing}
        owner = {index: number % self.size for number, index in enumerate(agreed)}
        mine = [block for index, block in blocks.items() if owner.get(index) == self.index]
        for batch in store.write(engine.run(mine, points, keeper)):
            if store.directory is None:
                for index, arrays in batch:
                    self._send(index, arrays)
            yield batch
            self.check_now_and_then()
        others = [index for index in blocks if owner.get(index) != self.index]
        if store.directory is not None:
            self.arrive()
            for index in others:
                yield [(index, _read_soon(store, blocks[index]))]
        else:
            for index in others:
                yield [(index, self._receive(index, owner[index]))]
            self.arrive()
            self._forget()

    def _send(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        raw = storage.block_to_bytes(index, arrays)
        starts = range(0, len(raw), _PART_BYTES)
        for part, start in enumerate(starts):
            self._put(f"block/{index}/{part}", raw[start : start + _PART_BYTES])
        self._put(f"block/{index}/parts", str(len(starts)).encode())

    def _receive(self, index: int, process: int) -> dict[str, np.ndarray]:
        parts = int(self._get(f"block/{index}/parts", process))
        raw = b"".join(self._get(f"block/{index}/{part}", process) for part in range(parts))
        return storage.block_from_bytes(raw, index)

    def _forget(self) -> None:
        """Frees the coordinator's memory, once everybody has everything."""
        if self.index == 0:
            self._client.key_value_delete(f"{self._call}/block/")


def _appears(path: Path) -> bool:
    """Whether a file appears within the time that a network file system may take."""
    end = time.monotonic() + _PROBE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        os.listdir(path.parent)  # Makes NFS look again.
        time.sleep(0.05)
    return True


def _read_soon(store: finished.Store, block: Block) -> dict[str, np.ndarray]:
    """Reads a block that another process has stored, as soon as it can be seen here."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not (found := store.read([block])):  # Looking makes NFS look again.
        if time.monotonic() > end:
            raise ProcessFailed(
                f"block {block.index}, which another process has stored in "
                f"{str(store.directory)!r}, is not there or damaged. The same call trains it again."
            )
        time.sleep(0.2)
    return found[block.index]


_calls = itertools.count()
_active: Group | None = None


def current() -> Group | None:
    """The group of the call that is being made; None outside `together` or in a job of one."""
    return _active


@contextlib.contextmanager
def together() -> Iterator[Group | None]:
    """A call that every process of the job makes; what is raised inside reaches all of them.

    Yields:
      The group; None where `jax.distributed` was not initialized or has one process.
    """
    global _active
    if _active is not None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield _active
        return
    _active = Group(_client(), jax.process_index(), jax.process_count(), next(_calls))
    try:
        yield _active
    except BaseException as error:
        _active.fail(error)
        raise
    finally:
        _active = None


def _client() -> Any:
    # JAX has no public name for it; Orbax and Flax take it from here as well.
    from jax._src import distributed

    return distributed.global_state.client


def local_part(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The part of a mesh that is on this process's devices.

    Args:
      mesh: a mesh, perhaps over several processes.

    Returns:
      The mesh of this process's devices.

    Raises:
      ValueError: none of its devices is this process's.
    """
    if all(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError(
            f"mesh has no device of this process, {jax.process_index()}; leave it out to use all."
        )
    return mesh.local_mesh
