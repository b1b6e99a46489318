"""Blocks of trials as one compiled program, sharded over the devices of a mesh."""

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax.records import weights
from playbook_optax.runner.devices import TRIALS_AXIS
from playbook_optax.runner.plan import Block, Points
from playbook_optax.trials import train

# One trial after another: several to a call, so that a call is not all overhead.
CALL_LENGTH = 4
# Steps of host batches that travel to the device together, and chunks that wait ready.
CHUNK_STEPS = 64
PREFETCHED_CHUNKS = 2

P = jax.sharding.PartitionSpec


class Engine:
    """Trains blocks; one compiled program serves every call, whatever the points and their number.

    Args:
      trial: the stepper.
      key: the study's key.
      data: the workload's data.
      mesh: one-dimensional mesh over ``trials``.
      width: trials per block.
      independent: whether trials have randomness of their own.
      host_batches: ``host_batches(start_step) -> Iterator`` of batches, or None.
      shapes: the result of one trial as `jax.ShapeDtypeStruct`s.
    """

    def __init__(
        self,
        trial: train.Trial,
        key: chex.PRNGKey,
        data: Any,
        mesh: jax.sharding.Mesh,
        width: int,
        independent: bool,
        host_batches: Callable[[int], Iterator[Any]] | None,
        shapes: train.TrialResult,
    ) -> None:
        self._trial = trial
        self._shapes = shapes
        self._width = width
        self._independent = independent
        self._host_batches = host_batches
        self._num_devices = mesh.size
        self._sharded = jax.sharding.NamedSharding(mesh, P(TRIALS_AXIS))
        self._replicated = jax.sharding.NamedSharding(mesh, P())
        self._key = jax.device_put(key, self._replicated)
        self._data = jax.device_put(data, self._replicated)
        self._calls = CALL_LENGTH if width == 1 and host_batches is None else 1
        if host_batches is None:
            self._program = jax.jit(
                jax.shard_map(
                    self._train_local,
                    mesh=mesh,
                    in_specs=(P(TRIALS_AXIS), P(), P()),
                    out_specs=P(TRIALS_AXIS),
                    check_vma=False,
                )
            )
        else:
            self._init, self._advance, self._result = (
                jax.jit(
                    jax.shard_map(
                        function,
                        mesh=mesh,
                        in_specs=specs,
                        out_specs=P(TRIALS_AXIS),
                        check_vma=False,
                    )
                )
                for function, specs in (
                    (self._init_local, (P(TRIALS_AXIS), P(), P(), P())),
                    (self._advance_local, (P(TRIALS_AXIS), P(), P(), P(), P())),
                    (self._result_local, (P(TRIALS_AXIS),)),
                )
            )

        self._step_block: tuple[Any, Any] | None = None

    @property
    def data(self) -> Any:
        """The workload's data, on the devices."""
        return self._data

    @property
    def blocks_per_call(self) -> int:
        """How many blocks one call of the program can train."""
        return self._num_devices * self._calls

    def run(
        self, blocks: Sequence[Block], points: Points
    ) -> Iterator[list[tuple[int, dict[str, np.ndarray]]]]:
        """Trains blocks and yields them as they finish, a call's worth at a time.

        Args:
          blocks: the blocks to train, in order.
          points: where their points come from.

        Yields:
          Pairs of a block's index and its arrays, as `records.study_from_blocks` takes them.
        """
        calls = [
            blocks[first : first + self.blocks_per_call]
            for first in range(0, len(blocks), self.blocks_per_call)
        ]
        pending: tuple[Sequence[Block], Any] | None = None
        for call in calls:
            # The next call is on its way while this one's results are fetched and stored.
            started = (call, self._start(call, points))
            if pending is not None:
                yield self._fetch(*pending, points)
            pending = started
        if pending is not None:
            yield self._fetch(*pending, points)

    def _inputs(self, blocks: Sequence[Block], points: Points) -> dict[str, Any]:
        """Points, trials and seeds of one call, leading axis (device * block), sharded.

        Block i of a call goes to device i modulo the number of devices, so that the last call of a
        study is spread over all of them; unused places repeat the last block and are not trained.
        """
        slots = self.blocks_per_call
        order = [
            device + position * self._num_devices
            for device in range(self._num_devices)
            for position in range(self._calls)
        ]
        filled = [blocks[min(i, len(blocks) - 1)] for i in order]
        rows = [points.rows(block.trials) for block in filled]
        used = np.array([i < len(blocks) for i in order]).reshape(self._num_devices, self._calls)
        inputs = {
            "points": {name: np.stack([row[name] for row in rows]) for name in rows[0]},
            "trial": np.stack([block.trials for block in filled]),
            "seed": np.array([block.seed for block in filled], np.int32),
            "num_used": used.sum(axis=1).astype(np.int32),
        }
        assert len(filled) == slots
        return jax.device_put(inputs, self._sharded)

    def _start(self, blocks: Sequence[Block], points: Points) -> Any:
        inputs = self._inputs(blocks, points)
        if self._host_batches is None:
            return self._program(inputs, self._key, self._data)
        return self._train_from_host(inputs)

    def _fetch(
        self, blocks: Sequence[Block], results: Any, points: Points
    ) -> list[tuple[int, dict[str, np.ndarray]]]:
        host = jax.device_get(results)
        out = []
        for number, block in enumerate(blocks):
            device, position = number % self._num_devices, number // self._num_devices
            place = device * self._calls + position
            result = jax.tree.map(lambda leaf, place=place: leaf[place], host)
            arrays = block_arrays(block, points.rows(block.trials), result)
            out.append((block.index, arrays))
        return out

    def _over_trials(
        self, function: Callable[..., Any], first_axes: Any = 0, out_axes: Any = 0
    ) -> Callable[..., Any]:
        """A function of one point and one trial number over a block's, leading axis (width,).

        The axes are `jax.vmap`'s, of the first argument and of the result.
        """

        def mapped(points: Any, trials: chex.Array, *shared: Any) -> Any:
            if self._width == 1:
                # No vmap at all: a batch of one is not the same program.
                one = function(jax.tree.map(lambda leaf: leaf[0], points), trials[0], *shared)
                return jax.tree.map(lambda leaf: leaf[None], one)
            in_axes = (first_axes, 0, *(None for _ in shared))
            return jax.vmap(function, in_axes, out_axes)(points, trials, *shared)

        return mapped

    def _start_trial(
        self,
        point: Any,
        number: chex.Array,
        seed: chex.Array,
        key: chex.PRNGKey,
        data: Any,
        batches: Any,
    ) -> train.TrialState:
        own = number if self._independent else None
        return self._trial.init(point, train.trial_key(key, seed, own), data, batches)

    def _train_local(self, inputs: Any, key: chex.PRNGKey, data: Any) -> train.TrialResult:
        def train_one(point: Any, number: chex.Array, seed: Any, key: Any, data: Any) -> Any:
            state = self._start_trial(point, number, seed, key, data, None)
            state = self._trial.advance(state, data, 0, self._trial.num_steps)
            return self._trial.result(state)

        def train_block(position: chex.Numeric) -> Any:
            block = jax.tree.map(
                lambda leaf: leaf[position], (inputs["points"], inputs["trial"], inputs["seed"])
            )
            return self._over_trials(train_one)(*block, key, data)

        shapes = jax.eval_shape(train_block, jnp.int32(0))
        empty = jax.tree.map(lambda leaf: jnp.zeros((self._calls, *leaf.shape), leaf.dtype), shapes)

        def body(position: chex.Array, results: Any) -> Any:
            return jax.tree.map(
                lambda buffer, value: buffer.at[position].set(value), results, train_block(position)
            )

        # A loop even over one block: the same program trains any number of them.
        return jax.lax.fori_loop(0, inputs["num_used"][0], body, empty)

    def _init_local(self, inputs: Any, key: chex.PRNGKey, data: Any, batches: Any) -> Any:
        block = jax.tree.map(
            lambda leaf: leaf[0], (inputs["points"], inputs["trial"], inputs["seed"])
        )
        states = self._over_trials(self._start_trial)(*block, key, data, batches)
        return jax.tree.map(lambda leaf: leaf[None], states)

    def _advance_local(self, states: Any, data: Any, start: Any, stop: Any, batches: Any) -> Any:
        local = jax.tree.map(lambda leaf: leaf[0], states)
        advanced = self._advance_states(local, data, start, stop, batches, axes=0)
        return jax.tree.map(lambda leaf: leaf[None], advanced)

    def _advance_states(
        self, states: Any, data: Any, start: Any, stop: Any, batches: Any, axes: Any
    ) -> Any:
        def one(state: Any, number: chex.Array, *shared: Any) -> Any:
            del number
            return self._trial.advance(state, *shared)

        unused = jnp.zeros((self._width,), jnp.int32)
        over = self._over_trials(one, axes, axes)
        return over(states, unused, data, start, stop, batches)

    def init_block(self, block: Block, points: Points, chunk: Any) -> Any:
        """The states of a block's trials before the first update, leading axis (width,).

        Args:
          block: the block.
          points: where its points come from.
          chunk: the first of `feed`.
        """
        init, _ = self._stepper()
        rows, trials = points.rows(block.trials), jnp.asarray(block.trials)
        return init(rows, trials, jnp.int32(block.seed), self._key, self._data, chunk)

    def advance_block(self, states: Any, start: int, stop: int, chunk: Any) -> Any:
        """The states after the updates start, ..., stop - 1: the bits that `run` computes.

        Args:
          states: from `init_block`.
          start: the first update.
          stop: the update before which to stop.
          chunk: host batches that begin with that of `start`, or None.
        """
        _, advance = self._stepper()
        return advance(states, self._data, jnp.int32(start), jnp.int32(stop), chunk)

    def _stepper(self) -> tuple[Any, Any]:
        if self._step_block is None:
            axes = self.state_axes
            start = self._over_trials(self._start_trial, out_axes=axes)
            advance = functools.partial(self._advance_states, axes=axes)
            self._step_block = (jax.jit(start), jax.jit(advance))
        return self._step_block

    @property
    def state_axes(self) -> Any:
        """The axis of trials in `init_block`'s states, a prefix of their tree.

        None where the trials of `run` share a value, because what is shared is computed once, by
        another program than for each.
        """
        shared = self._host_batches is None and self._width > 1
        fields: dict[str, Any] = dict.fromkeys(train.TrialState._fields, 0)
        if shared:
            fields["step"] = None
            fields["key"] = 0 if self._independent else None
        return train.TrialState(**fields)

    def feed(self, num_steps: int) -> Iterator[Any]:
        """What to give to `init_block`, and then to `advance_block` for each step in turn.

        Args:
          num_steps: how many steps.

        Yields:
          A chunk whose first batch is that of the step, of the length that `run` uses; None where
          batches are made on the device.
        """
        if self._host_batches is None:
            yield from itertools.repeat(None, num_steps + 1)
            return
        length = _chunk_length(self._trial.num_steps)
        for step, batch in enumerate(itertools.islice(self._host_batches(0), num_steps)):
            chunk = jax.device_put(_stack([batch] * length), self._replicated)
            if step == 0:
                yield chunk
            yield chunk

    def _result_local(self, states: Any) -> Any:
        local = jax.tree.map(lambda leaf: leaf[0], states)
        unused = jnp.zeros((self._width,), jnp.int32)
        results = self._over_trials(lambda state, number: self._trial.result(state))(local, unused)
        return jax.tree.map(lambda leaf: leaf[None], results)

    def _train_from_host(self, inputs: Any) -> Any:
        assert self._host_batches is not None
        num_steps = self._trial.num_steps
        states, start = None, 0
        for chunk in _prefetch(self._host_batches(0), num_steps):
            chunk = jax.device_put(chunk, self._replicated)
            if states is None:
                states = self._init(inputs, self._key, self._data, chunk)
            stop = min(start + _chunk_length(num_steps), num_steps)
            states = self._advance(states, self._data, jnp.int32(start), jnp.int32(stop), chunk)
            start = stop
        return self._result(states)


def block_arrays(
    block: Block, points: Mapping[str, np.ndarray], result: train.TrialResult
) -> dict[str, np.ndarray]:
    """A finished block as flat named arrays with a leading axis of runs.

    Args:
      block: the block.
      points: name to array (run,).
      result: host arrays, leading axis run.

    Returns:
      The arrays that `records.study_from_blocks` documents.
    """
    arrays = {
        "trial": block.trials,
        "seed": np.full_like(block.trials, block.seed),
        **{f"point/{name}": values for name, values in points.items()},
        **{f"metrics/{name}": values for name, values in result.metrics.items()},
        "infeasible": result.infeasible,
        "infeasible_step": result.infeasible_step,
        "infeasible_reason": result.infeasible_reason,
        "best_value": result.best_value,
        "best_step": result.best_step,
        "norms/last": result.norms.last_norm,
        "norms/num_steps": result.norms.num_steps,
        "norms/num_clipped": result.norms.num_clipped,
        "norms/threshold": result.norms.threshold,
        "norms/max": result.norms.max_norm,
        "norms/counts": result.norms.counts,
    }
    for kind in ("params", "model_state"):
        tree = getattr(result, kind)
        if tree is not None:
            arrays |= {f"{kind}/{k}": v for k, v in weights.flatten_tree(tree).items()}
    return {name: np.asarray(array) for name, array in arrays.items()}


def first_batches(host_batches: Callable[[int], Iterator[Any]]) -> Any:
    """A chunk that holds the first host batch, for shapes."""
    return _stack(list(itertools.islice(host_batches(0), 1)))


def _chunk_length(num_steps: int) -> int:
    return min(CHUNK_STEPS, num_steps)


def _stack(batches: list[Any]) -> Any:
    """Batches as one chunk, leaves (step, ...)."""
    if not batches:
        raise ValueError("host_batches gave no batch.")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *batches)


def _prefetch(batches: Iterator[Any], num_steps: int) -> Iterator[Any]:
    """Chunks of host batches, read ahead in a thread; the last one is padded to the same shape."""
    length = _chunk_length(num_steps)
    ready: queue.Queue[Any] = queue.Queue(PREFETCHED_CHUNKS)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for start in range(0, num_steps, length):
                wanted = min(length, num_steps - start)
                chunk = list(itertools.islice(batches, wanted))
                if len(chunk) < wanted:
                    raise ValueError(
                        f"host_batches ended after {start + len(chunk)} batches; the run needs "
                        f"num_steps = {num_steps}. Repeat the data inside the iterator."
                    )
                if not put(_stack(chunk + [chunk[-1]] * (length - wanted))):
                    return
            put(None)
        except BaseException as error:  # Raised again in the thread that trains.
            put(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        reader.join()
