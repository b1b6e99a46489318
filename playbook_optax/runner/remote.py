"""Blocks trained by an executor's workers: what a task is, on both sides.

A block is a pure function of the study's spec and its index, so any worker may train it, again if
need be. A task names the study by a digest and brings the points of its blocks; the arrays come
back through the executor and the driver stores them, so that workers need no file system in common.

What a worker needs to train (the workload, its data, the functions) goes to it once: a task whose
worker has not got it comes back at once, and is sent again with it. Threads of this process find
the driver's own. A worker keeps what it has built and compiled for the tasks to come.

Nothing that comes back is believed: an answer is compared with what was asked for before it is
passed on, a task is sent a bounded number of times, and silence has a limit.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pickle
import queue
import secrets
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from playbook_optax import _checks, _portable
from playbook_optax.runner import agreement, finished
from playbook_optax.runner.plan import Block, Points

# A task that came to nothing (its worker was killed, or says nothing) is sent this often.
ATTEMPTS = 3
# Silence is put up with for so many times the longest task so far, and for so long at least.
PATIENCE_TASKS = 10
PATIENCE_SECONDS = 600.0
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
    """The executor lost its workers or the same task several times, or did what was not asked."""


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
      seconds: how long the task took in the worker, compiling included.
    """

    worker: str
    machine: dict[str, Any] | None = None
    num_devices: int = 0
    blocks: finished.Finished | None = None
    error: Exception | None = None
    trace: str = ""
    seconds: float = 0.0


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
            began = time.monotonic()
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
            seconds = time.monotonic() - began
        machine, num_devices = agreement.machine(), jax.local_device_count()
        return Answer(worker, machine, num_devices, blocks, seconds=seconds)
    except Exception as error:
        return Answer(worker, error=_sendable(error), trace=traceback.format_exc())


def _keep(study: str, trainer: TrainBlocks) -> None:
    while len(_trainers) >= KEPT_STUDIES:
        del _trainers[next(iter(_trainers))]
    _trainers[study] = trainer


def _sendable(error: Exception) -> Exception:
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
    train_blocks, ours = build(**arguments, key=_portable.receive_key(key))
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
        return dumps((build, dict(arguments), _portable.send_key(key), dict(spec)))
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


# What every array of a block is promised to be, name to (dtype, shape).
Promised = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class _Batch:
    """Blocks on their way, and how often they came to nothing.

    Attributes:
      blocks: the blocks.
      points: name to array (block, trial), their points.
      failures: how often they came to nothing.
      with_payload: whether they are sent together with the study.
      done: whether they have come back.
    """

    def __init__(self, blocks: Sequence[Block], points: Points) -> None:
        rows = [points.rows(block.trials) for block in blocks]
        self.blocks = tuple(blocks)
        self.points = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        self.failures = 0
        self.with_payload = False
        self.done = False

    @property
    def indices(self) -> list[int]:
        return [block.index for block in self.blocks]

    def failed(self, why: str, where: str) -> None:
        """Counts what came to nothing; raises when that was often enough."""
        self.failures += 1
        if self.failures >= ATTEMPTS:
            raise ExecutorFailed(
                f"the executor lost the blocks {self.indices} {ATTEMPTS} times: {why}. {where}"
            )


def train(
    executor: concurrent.futures.Executor,
    blocks: Sequence[Block],
    points: Points,
    *,
    spec: Mapping[str, Any],
    promised: Promised,
    train_blocks: TrainBlocks,
    make_payload: Callable[[], bytes],
    check: Callable[[], None],
    where: str,
    timeout_seconds: float | None = None,
) -> Iterator[finished.Finished]:
    """Trains blocks on an executor's workers and yields them as they finish, in any order.

    Args:
      executor: any PEP 3148 executor.
      blocks: what to train.
      points: where their points come from; evaluated here, so that all workers get the same bits.
      spec: the study's spec, with fingerprints.
      promised: what each array of a block is, in the order in which they are stored.
      train_blocks: this process's own, for executors whose workers are threads of it.
      make_payload: makes what `run_task` unpacks; called once, and only if some worker asks.
      check: called before every task that is sent or taken, and every second; may raise.
      where: the end of an error message: what becomes of what is finished.
      timeout_seconds: see `Trainer.executor_timeout_seconds`.

    Yields:
      Finished blocks as `Engine.run` does.

    Raises:
      ExecutorFailed: the executor broke, the same task came to nothing several times, or a worker
        sent what it was not asked for.
    """
    study, mine = digest(spec), agreement.machine()
    waiting = list(reversed(blocks))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A batch may be on its way more than once.
    flying: dict[Any, tuple[_Batch, bool]] = {}
    workers: set[str] = set()
    told: set[str] = set()
    payload: list[bytes] = []
    silence = _Silence(timeout_seconds)
    size = 1

    def submit(batch: _Batch) -> None:
        check()
        task = Task(study, batch.blocks, batch.points, secrets.token_hex(8))
        if batch.with_payload and not payload:
            payload.append(make_payload())
        try:
            future = executor.submit(run_task, task, payload[0] if batch.with_payload else None)
        except (RuntimeError, concurrent.futures.BrokenExecutor) as error:
            raise ExecutorFailed(f"the executor takes no more tasks: {error}. {where}") from error
        flying[future] = (batch, batch.with_payload)
        future.add_done_callback(answers.put)

    def send_again_after_silence() -> None:
        overdue = list(dict.fromkeys(batch for batch, _ in flying.values()))
        silence.tell([index for batch in overdue for index in batch.indices])
        if silence.bounded:
            for batch in overdue:
                batch.failed(f"no worker has answered for {silence.limit:.0f} s", where)
                submit(batch)

    outside = _trainers.get(study)
    _trainers[study] = train_blocks
    try:
        while waiting or flying:
            while waiting and len(flying) < SPARE_TASKS + TASKS_PER_WORKER * len(workers):
                some = [waiting.pop() for _ in range(min(size, len(waiting)))]
                submit(_Batch(some, points))
            check()
            try:
                future = answers.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                if silence.too_long(_CHECK_SECONDS):
                    send_again_after_silence()
                continue
            silence.broken()
            batch, had_payload = flying.pop(future, (None, False))
            if batch is None or batch.done:
                continue
            answer = _result(future, batch, where)
            if answer is None:
                submit(batch)
                continue
            worker = f"the executor's worker {answer.worker!r:.200}"
            if answer.error is not None:
                answer.error.add_note(f"In {worker}:\n{answer.trace}")
                raise answer.error
            workers.add(answer.worker)
            if answer.blocks is None:
                if had_payload:
                    batch.failed(f"{worker} has not got the study, with which they came", where)
                batch.with_payload = True
                submit(batch)
                continue
            found = _checked(answer, batch, promised, f"{worker} sent", where)
            batch.done = True
            for other in [one for one, (same, _) in flying.items() if same is batch]:
                del flying[other]
                other.cancel()
            size = max(size, answer.num_devices)
            silence.learn(answer.seconds, found)
            _warn_of_other_bits(mine, answer, told)
            yield found
    finally:
        for future in flying:
            future.cancel()
        if outside is None:
            _trainers.pop(study, None)
        else:
            _trainers[study] = outside


class _Silence:
    """How long no worker has answered, and how long that may last.

    Time in which this process itself was stopped does not count.

    Args:
      seconds: the limit, or None to go by how long tasks take.
    """

    def __init__(self, seconds: float | None) -> None:
        self._given = seconds
        self._longest: float | None = None
        self._lasted = 0.0
        self._warned = 0

    @property
    def bounded(self) -> bool:
        """Whether there is a limit: before the first block nobody knows how long one takes."""
        return self._given is not None or self._longest is not None

    @property
    def limit(self) -> float:
        """Seconds after which something must be done."""
        if self._given is not None:
            return self._given
        if self._longest is None:
            return PATIENCE_SECONDS * 2**self._warned
        return max(PATIENCE_SECONDS, PATIENCE_TASKS * self._longest)

    def too_long(self, seconds: float) -> bool:
        """Counts some more seconds; whether the limit is reached."""
        self._lasted += seconds
        return self._lasted >= self.limit

    def broken(self) -> None:
        """Somebody has answered."""
        self._lasted = 0.0

    def learn(self, seconds: float, blocks: finished.Finished) -> None:
        """Takes note of how long a task took, if a trial of it went on to the end."""
        if any((~arrays["infeasible"]).any() for _, arrays in blocks):
            self._longest = max(self._longest or 0.0, seconds)

    def tell(self, indices: Sequence[int]) -> None:
        """Warns of it, and begins to count anew where there is a limit."""
        shown = f"{indices[:8]}{' and others' if len(indices) > 8 else ''}"
        then = (
            "They are sent again; a worker that is frozen should be ended."
            if self.bounded
            else "None has finished a block so far, so that nobody knows how long one takes: "
            "executor_timeout_seconds= sets a limit."
        )
        warnings.warn(
            f"no worker of the executor has answered for {self._lasted:.0f} s; waiting for the "
            f"blocks {shown}. {then}",
            UserWarning,
            stacklevel=6,
        )
        self._warned += 1
        if self.bounded:
            self._lasted = 0.0


def _result(future: Any, batch: _Batch, where: str) -> Answer | None:
    """The answer; None to send the task again."""
    try:
        answer = future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise ExecutorFailed(f"the executor is broken, a worker died: {error} {where}") from error
    except (Exception, concurrent.futures.CancelledError) as error:
        # What training raises comes as an answer: this is the executor's, which lost the task.
        try:
            batch.failed(f"{type(error).__name__}: {error}", where)
        except ExecutorFailed as failure:
            raise failure from error
        return None
    if isinstance(answer, Answer) and isinstance(answer.worker, str):
        return answer
    batch.failed(f"their task came to {type(answer).__name__} in the place of an answer", where)
    return None


def _checked(
    answer: Answer, batch: _Batch, promised: Promised, sent: str, where: str
) -> finished.Finished:
    """The blocks of an answer, if they are those that were asked for.

    Args:
      answer: the answer.
      batch: what was asked for.
      promised: what each array is.
      sent: the beginning of a message.
      where: the end of a message.

    Returns:
      The blocks, their arrays in the order of `promised`.

    Raises:
      ExecutorFailed: they are others, or not what was promised.
    """

    def refuse(what: str) -> ExecutorFailed:
        return ExecutorFailed(
            f"{sent} {what}. Nothing of it is stored. Is it another version of playbook_optax, or "
            f"an executor that mixes up its tasks? {where}"
        )

    for name, kind in (("machine", dict), ("num_devices", int), ("seconds", float)):
        value = getattr(answer, name)
        if type(value) is not kind:
            raise refuse(f"{name} = {value!r:.80}, which is no {kind.__name__}")
    if answer.num_devices < 1 or not math.isfinite(answer.seconds):
        raise refuse(f"num_devices = {answer.num_devices}, seconds = {answer.seconds}")
    try:
        arrays_of = {int(index): dict(arrays) for index, arrays in answer.blocks or ()}
        indices = [index for index, _ in answer.blocks or ()]
    except (TypeError, ValueError) as error:
        raise refuse(f"blocks of which {error}") from error
    if sorted(indices) != sorted(batch.indices):
        raise refuse(f"the blocks {indices!r:.200} and was asked for {batch.indices}")
    found = []
    for number, block in enumerate(batch.blocks):
        arrays = arrays_of[block.index]
        if set(arrays) != set(promised):
            odd = sorted(map(repr, set(arrays) ^ set(promised)))
            raise refuse(f"block {block.index} with other arrays: {', '.join(odd):.200} differ")
        asked = {
            "trial": block.trials,
            "seed": np.full_like(block.trials, block.seed),
            **{f"point/{name}": rows[number] for name, rows in batch.points.items()},
        }
        for name, (dtype, shape) in promised.items():
            array = arrays[name]
            if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, shape):
                got = getattr(array, "dtype", type(array).__name__), np.shape(array)
                raise refuse(
                    f"block {block.index} with {name!r} of {got[0]} {list(got[1])}, which is to "
                    f"be {dtype} {list(shape)}"
                )
            if name in asked and array.tobytes() != asked[name].tobytes():
                raise refuse(
                    f"block {block.index} with {name!r} = {array!r:.120} and was asked for "
                    f"{asked[name]!r:.120}"
                )
        found.append((block.index, {name: arrays[name] for name in promised}))
    return found


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
