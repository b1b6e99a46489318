"""Blocks trained by an executor's workers: what a task is, on both sides.

A block is a pure function of the study's spec and its index, so any worker may train it, again if
need be. A task names the study by a digest and brings the points of its blocks; the arrays come
back through the executor and the driver stores them, so that workers need no file system in common.

What a worker needs to train (the workload, its data, the functions) goes to it once: a task whose
worker has not got it comes back at once, and is sent again with it. Threads of this process find
the driver's own. A worker keeps what it has built and compiled for the tasks to come.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pickle
import queue
import secrets
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks
from playbook_optax.runner import agreement, finished
from playbook_optax.runner.plan import Block, Points

# A task that its executor lost (a worker was killed) is sent this often before giving up.
ATTEMPTS = 3
# Tasks in flight: some for workers not seen yet, and two for each that has answered.
SPARE_TASKS = 32
TASKS_PER_WORKER = 2
# Studies that a worker keeps ready, their data on its devices.
KEPT_STUDIES = 2

_CHECK_SECONDS = 1.0
_IMPORTED_BY = os.getpid()


# Trains blocks on the devices of the process that calls it.
TrainBlocks = Callable[[Sequence[Block], Points], Iterator[finished.Finished]]


class ExecutorFailed(RuntimeError):  # noqa: N818
    """The executor lost its workers, or the same task several times."""


# In the worker ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """Some blocks of a study.

    Attributes:
      study: the digest of the study's spec.
      blocks: what to train.
      points: name to array (block, trial), the points of the blocks.
      ticket: makes every submission another one, for executors that remember results by arguments.
    """

    study: str
    blocks: tuple[Block, ...]
    points: dict[str, np.ndarray]
    ticket: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a task came to.

    Attributes:
      worker: host and process.
      machine: see `agreement.machine`; None unless blocks were trained.
      num_devices: the worker's devices; 0 unless blocks were trained.
      blocks: finished blocks; None if the worker has not got the study, or failed.
      error: what the user's code or ours raised.
      trace: the traceback of `error`.
    """

    worker: str
    machine: dict[str, Any] | None = None
    num_devices: int = 0
    blocks: finished.Finished | None = None
    error: Exception | None = None
    trace: str = ""


@dataclasses.dataclass(frozen=True)
class _SentPoints(Points):
    """The points that came with a task, by the bytes of a block's trials."""

    sent: Mapping[bytes, dict[str, np.ndarray]]

    def rows(self, trials: np.ndarray) -> dict[str, np.ndarray]:
        return self.sent[trials.tobytes()]


# One program at a time in a process: it has all devices, and their memory, to itself.
_lock = threading.Lock()
_trainers: dict[str, TrainBlocks] = {}


def run_task(task: Task, payload: bytes | None) -> Answer:
    """Trains the blocks of a task; what workers call.

    Args:
      task: the task.
      payload: what `pack` made, for a worker that has not got the study.

    Returns:
      The blocks, or what went wrong in training them. What goes wrong between the processes is
      the executor's to raise.
    """
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        if os.getpid() != _IMPORTED_BY:
            raise ExecutorFailed(
                "the executor's workers are forks of a process that uses JAX, which would hang "
                "them: give concurrent.futures.ProcessPoolExecutor("
                "mp_context=multiprocessing.get_context('spawn'))."
            )
        with _lock:
            if task.study not in _trainers:
                if payload is None:
                    return Answer(worker)
                _keep(task.study, _unpack(payload))
            rows = {
                block.trials.tobytes(): {name: values[i] for name, values in task.points.items()}
                for i, block in enumerate(task.blocks)
            }
            points = _SentPoints(None, None, None, rows)
            batches = _trainers[task.study](task.blocks, points)
            blocks = [block for batch in batches for block in batch]
        return Answer(worker, agreement.machine(), jax.local_device_count(), blocks)
    except Exception as error:
        return Answer(worker, error=_portable(error), trace=traceback.format_exc())


def _keep(study: str, trainer: TrainBlocks) -> None:
    while len(_trainers) >= KEPT_STUDIES:
        del _trainers[next(iter(_trainers))]
    _trainers[study] = trainer


def _portable(error: Exception) -> Exception:
    """The error, or its text where another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _unpack(payload: bytes) -> TrainBlocks:
    """Builds the study again, and compares it with the driver's before anything is compiled."""
    try:
        build, arguments, key, theirs = pickle.loads(payload)
    except (ImportError, AttributeError) as error:
        raise ExecutorFailed(
            f"a worker cannot load the workload or the optimizer: {error}. The module that "
            "defines them must be importable there."
        ) from error
    train_blocks, ours = build(**arguments, key=key_from(key))
    environment = ("versions", "device_kind")
    same = all(theirs[name] == ours[name] for name in environment)
    # Another version or device traces another program: warned of by the driver, not compared.
    progress = ("num_trials", "points", "space", "code")
    ignore = (*progress, *environment, *(() if same else ("program",)))
    found = agreement.differences(
        theirs, ours, there="in the driver", here="in the worker", ignore=ignore
    )
    if found:
        raise ValueError(
            f"a worker would train another study: {'; '.join(found)}. Driver and workers need the "
            "same code, data and jax.config (JAX_* environment variables reach them all)."
        )
    return train_blocks


# In the driver ----------------------------------------------------------------------------------


def check_executor(executor: Any) -> None:
    """Raises unless this is a PEP 3148 executor."""
    if isinstance(executor, concurrent.futures.Executor):
        return
    hint = ""
    if hasattr(executor, "get_executor"):
        hint = " Give client.get_executor() of a Dask client."
    raise _checks.ArgumentTypeError(
        "executor must be a concurrent.futures.Executor (PEP 3148), got "
        f"{type(executor).__name__}.{hint}"
    )


def key_to(key: jax.Array) -> tuple[str | None, np.ndarray]:
    """A random key as what can be sent: its implementation (None of a raw key) and its data."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return None, np.asarray(key)
    return str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key))


def key_from(sent: tuple[str | None, Any]) -> jax.Array:
    """The key that `key_to` took apart."""
    impl, data = sent
    raw = jnp.asarray(np.asarray(data, np.uint32))
    return raw if impl is None else jax.random.wrap_key_data(raw, impl=impl)


Build = Callable[..., tuple[TrainBlocks, Mapping[str, Any]]]


def pack(build: Build, arguments: Mapping[str, Any], key: Any, spec: Mapping[str, Any]) -> bytes:
    """Everything that a worker needs to train a study, as bytes.

    Args:
      build: a function of a module that takes the arguments and the key, and returns what trains
        blocks and its spec.
      arguments: what `build` takes, without the key.
      key: the study's key.
      spec: the driver's spec, with fingerprints, to compare with.

    Returns:
      The bytes. cloudpickle makes them where it is installed, because it takes lambdas and local
      functions as well.

    Raises:
      ValueError: something cannot be sent; it is named.
    """
    try:
        import cloudpickle
    except ImportError:
        dumps = pickle.dumps
    else:
        dumps = cloudpickle.dumps
    try:
        return dumps((build, dict(arguments), key_to(key), dict(spec)))
    except Exception:
        for name, value in arguments.items():
            try:
                dumps(value)
            except Exception as error:
                advice = "Give a function of a module, which workers import by its name"
                if dumps is pickle.dumps:
                    advice += (
                        "; or install cloudpickle, which sends lambdas and local functions too: "
                        "pip install 'playbook-optax[dask]'"
                    )
                raise ValueError(
                    f"{name} = {value!r:.200} cannot be sent to the executor's workers: {error}. "
                    f"{advice}."
                ) from error
        raise


def digest(spec: Mapping[str, Any]) -> str:
    """A name for what is computed, whatever the points."""
    kept = {k: v for k, v in spec.items() if k not in ("num_trials", "points", "space", "code")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class _Batch:
    """Blocks on their way, and how often they were lost."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.losses = 0
        self.with_payload = False


def train(
    executor: concurrent.futures.Executor,
    blocks: Sequence[Block],
    points: Points,
    *,
    spec: Mapping[str, Any],
    train_blocks: TrainBlocks,
    make_payload: Callable[[], bytes],
    check: Callable[[], None],
    where: str,
) -> Iterator[finished.Finished]:
    """Trains blocks on an executor's workers and yields them as they finish, in any order.

    Args:
      executor: any PEP 3148 executor.
      blocks: what to train.
      points: where their points come from; evaluated here, so that all workers get the same bits.
      spec: the study's spec, with fingerprints.
      train_blocks: this process's own, for executors whose workers are threads of it.
      make_payload: makes what `run_task` unpacks; called once, and only if some worker asks.
      check: called every second while nothing finishes; may raise.
      where: the end of an error message: what becomes of what is finished.

    Yields:
      Finished blocks as `Engine.run` does.

    Raises:
      ExecutorFailed: the executor broke, or lost the same task several times.
    """
    study, mine = digest(spec), agreement.machine()
    waiting = list(reversed(blocks))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    flying: dict[Any, _Batch] = {}
    workers: set[str] = set()
    told: set[str] = set()
    payload: list[bytes] = []
    size = 1

    def submit(batch: _Batch) -> None:
        rows = [points.rows(block.trials) for block in batch.blocks]
        sent = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        task = Task(study, batch.blocks, sent, secrets.token_hex(8))
        if batch.with_payload and not payload:
            payload.append(make_payload())
        try:
            future = executor.submit(run_task, task, payload[0] if batch.with_payload else None)
        except (RuntimeError, concurrent.futures.BrokenExecutor) as error:
            raise ExecutorFailed(f"the executor takes no more tasks: {error}. {where}") from error
        flying[future] = batch
        future.add_done_callback(answers.put)

    outside = _trainers.get(study)
    _trainers[study] = train_blocks
    try:
        while waiting or flying:
            while waiting and len(flying) < SPARE_TASKS + TASKS_PER_WORKER * len(workers):
                submit(_Batch([waiting.pop() for _ in range(min(size, len(waiting)))]))
            try:
                future = answers.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                check()
                continue
            batch = flying.pop(future)
            answer = _result(future, batch, where)
            if answer is None:
                submit(batch)
                continue
            if answer.error is not None:
                answer.error.add_note(f"In the executor's worker {answer.worker}:\n{answer.trace}")
                raise answer.error
            workers.add(answer.worker)
            if answer.blocks is None:
                batch.with_payload = True
                submit(batch)
                continue
            size = max(size, answer.num_devices)
            _warn_of_other_bits(mine, answer, told)
            yield answer.blocks
    finally:
        for future in flying:
            future.cancel()
        if outside is None:
            _trainers.pop(study, None)
        else:
            _trainers[study] = outside


def _result(future: Any, batch: _Batch, where: str) -> Answer | None:
    """The answer; None to send the task again."""
    try:
        answer: Answer = future.result()
        return answer
    except concurrent.futures.BrokenExecutor as error:
        raise ExecutorFailed(f"the executor is broken, a worker died: {error} {where}") from error
    except (Exception, concurrent.futures.CancelledError) as error:
        # What training raises comes as an answer: this is the executor's, which lost the task.
        batch.losses += 1
        if batch.losses < ATTEMPTS:
            return None
        raise ExecutorFailed(
            f"the executor lost the blocks {[block.index for block in batch.blocks]} "
            f"{ATTEMPTS} times: {type(error).__name__}: {error} {where}"
        ) from error


def _warn_of_other_bits(mine: Mapping[str, Any], answer: Answer, told: set[str]) -> None:
    assert answer.machine is not None
    found = agreement.differences(mine, answer.machine, there="here", here="there", ignore=())
    if found and str(found) not in told:
        told.add(str(found))
        warnings.warn(
            f"the executor's worker {answer.worker} computes other bits than this process: "
            f"{'; '.join(found)}. Its blocks are close to, not bit-exact with, local ones.",
            UserWarning,
            stacklevel=5,
        )
