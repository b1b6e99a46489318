"""Blocks of trials as one compiled program, sharded over the devices of a mesh."""

import concurrent.futures
import functools
import itertools
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax.records import weights
from playbook_optax.runner.devices import DATA_AXIS, TRIALS_AXIS
from playbook_optax.runner.plan import Block, Points
from playbook_optax.runner.resume import Keeper, Saved
from playbook_optax.trials import host_data, train

# After so many steps the live trials are packed together again: 1/32 of a run, so that a trial that
# broke costs 1/64 of a run more than it must, but often enough to be worth the move.
SWEEPS_PER_RUN = 32
MIN_SWEEP_STEPS, MAX_SWEEP_STEPS = 16, 256
# Batches of a sweep are gathered once for all trials, if they take no more than this.
MAX_GATHERED_BYTES = 16 * 2**20
# Host batches that travel to the device together, and chunks that wait ready.
MAX_CHUNK_STEPS = 64
MAX_CHUNK_BYTES = 64 * 2**20
PREFETCHED_CHUNKS = 2
# How long the device works before the host looks after signals, saves and progress.
SECONDS_PER_CALL = 1.0
# Trials that one device holds at a time: more pack better when some have broken, but blocks are
# finished, and their memory freed, later.
TRIALS_PER_DEVICE = 128
BLOCKS_PER_DEVICE = 32

P = jax.sharding.PartitionSpec


class OutOfMemory(MemoryError):  # noqa: N818
    """A block is too wide for the device; the message names a width to use."""


class States(NamedTuple):
    """The trials of a call between two calls of the program, live ones first.

    Attributes:
      trials: `TrialState` without keys, leading axis row.
      place: int32 (row,): where in the call the trial of each row stands.
    """

    trials: train.TrialState
    place: chex.Array


class _Programs(NamedTuple):
    """The three programs of an engine, compiled."""

    init: Any
    advance: Any
    result: Any


class _Call(NamedTuple):
    """Blocks that are trained together, and the save they are part of, if any."""

    blocks: Sequence[Block]
    group: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks' indices."""
        return tuple(block.index for block in self.blocks)


class Engine:
    """Trains blocks; the same programs serve every call, whatever the points and their number.

    A call holds up to `blocks_per_call` blocks of one seed. Its trials advance a few steps at a
    time, live trials first: blocks are made up anew each time, so that those that broke stop
    costing. Who else is in a block, and how a run is cut into calls, changes no bit of a trial.

    Args:
      trial: the stepper.
      key: the study's key.
      data: the workload's data.
      mesh: mesh over ``trials``, and perhaps ``data``.
      width: trials per block.
      blocks_per_device: blocks that one device holds at a time.
      independent: whether trials have randomness of their own.
      make_batch: ``make_batch(data, key, step) -> batch`` where all trials of a seed share their
        batches; None where they depend on the trial, or come from the host.
      host_batches: ``host_batches(start_step) -> Iterator`` of batches, or None.
      point: one point, for shapes.
    """

    def __init__(
        self,
        trial: train.Trial,
        key: chex.PRNGKey,
        data: Any,
        mesh: jax.sharding.Mesh,
        width: int,
        blocks_per_device: int,
        independent: bool,
        make_batch: Callable[[Any, chex.PRNGKey, chex.Array], Any] | None,
        host_batches: Callable[[int], Iterator[Any]] | None,
        point: Mapping[str, np.ndarray],
    ) -> None:
        self._trial = trial
        self._width = width
        self._per_device = blocks_per_device
        self._independent = independent
        self._host_batches = host_batches
        self._mesh = mesh
        self._num_devices = mesh.shape[TRIALS_AXIS]
        self._sharded = jax.sharding.NamedSharding(mesh, P(TRIALS_AXIS))
        self._replicated = jax.sharding.NamedSharding(mesh, P())
        self._key = jax.device_put(key, self._replicated)
        self._data = jax.device_put(data, self._replicated)
        self._point = point
        self._chunk_shapes = None
        if host_batches is not None:
            first = first_batches(host_batches)
            self._chunk_length = chunk_length(first, trial.num_steps)
            self._chunk_shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    (self._chunk_length, *leaf.shape[1:]),
                    leaf.dtype,
                    sharding=self._chunk_sharding(leaf),
                ),
                first,
            )
            self._warn_of_whole_batches(self._chunk_shapes)
        sweep = max(MIN_SWEEP_STEPS, min(MAX_SWEEP_STEPS, trial.num_steps // SWEEPS_PER_RUN))
        length = train.steps_per_chunk()
        self._sweep_steps = min(-(-sweep // length) * length, trial.num_steps)
        self._make_batch = make_batch
        if make_batch is not None:
            shapes = jax.eval_shape(make_batch, data, key, jnp.int32(0))
            if _num_bytes(shapes) * self._sweep_steps > MAX_GATHERED_BYTES:
                self._make_batch = None
            self._warn_of_whole_batches(
                jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shapes
                )
            )
        self._compiled: _Programs | None = None
        self._state_shapes: Any = None

    @property
    def data(self) -> Any:
        """The workload's data, on the devices."""
        return self._data

    @property
    def blocks_per_device(self) -> int:
        """How many blocks one device holds at a time."""
        return self._per_device

    @property
    def blocks_per_call(self) -> int:
        """How many blocks one call can train."""
        return self._num_devices * self._per_device

    def _is_cut(self, leaf: Any) -> bool:
        """Whether a leaf of batches, with a leading axis of steps, is cut over the data axis."""
        has_examples = leaf.ndim > 1 and not _is_key(leaf)
        size = self._mesh.shape.get(DATA_AXIS, 1)
        return size > 1 and has_examples and leaf.shape[1] % size == 0

    def _chunk_sharding(self, leaf: Any) -> jax.sharding.NamedSharding:
        """Of a leaf of batches, with a leading axis of steps."""
        spec = P(None, DATA_AXIS) if self._is_cut(leaf) else P()
        return jax.sharding.NamedSharding(self._mesh, spec)

    def _put_chunk(self, chunk: Any) -> Any:
        """Host batches on the devices."""
        return jax.device_put(chunk, jax.tree.map(self._chunk_sharding, chunk))

    def _warn_of_whole_batches(self, chunk: Any) -> None:
        size = self._mesh.shape.get(DATA_AXIS, 1)
        leaves = jax.tree.leaves(chunk)
        if size > 1 and not any(self._is_cut(leaf) for leaf in leaves):
            lengths = sorted({leaf.shape[1] for leaf in leaves if leaf.ndim > 1})
            warnings.warn(
                f"batches of {lengths} examples are not cut over the {size} devices of the mesh's "
                "second axis, which do not divide them: each computes them whole. Choose another "
                "batch size or mesh.",
                UserWarning,
                stacklevel=5,
            )

    # The programs ------------------------------------------------------------------------------

    def compile(self) -> _Programs:
        """The compiled programs, in parallel the first time."""
        if self._compiled is None:
            blocks = [Block(0, np.arange(self._width, dtype=np.int32), 0)]
            points = {name: np.repeat(value, self._width) for name, value in self._point.items()}
            inputs = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharded),
                self._place(blocks, [points]),
            )
            common = (inputs, self._key, self._data)
            chunk = self._chunk_shapes
            init = self._sharded_jit(self._init_local, (True, False, False, False))
            states = self._state_shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharded),
                jax.eval_shape(init, *common, chunk),
            )
            step = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
            advance = self._sharded_jit(
                self._advance_local, (True, True, False, False, False, False, False), donate=True
            )
            result = self._sharded_jit(self._result_local, (True, True))
            lowered = (
                init.lower(*common, chunk),
                advance.lower(states, *common, step, step, chunk),
                result.lower(states, inputs),
            )
            with concurrent.futures.ThreadPoolExecutor(len(lowered)) as threads:
                self._compiled = _Programs(*threads.map(lambda one: one.compile(), lowered))
        return self._compiled

    @functools.cached_property
    def memory(self) -> int:
        """Bytes that one device needs, data included: the most that any of the programs takes."""

        def need(program: Any) -> int:
            sizes = program.memory_analysis()
            return int(
                sizes.argument_size_in_bytes
                + sizes.output_size_in_bytes
                + sizes.temp_size_in_bytes
                - sizes.alias_size_in_bytes
            )

        return max(need(program) for program in self.compile())

    def _sharded_jit(
        self, function: Callable[..., Any], sharded: tuple[bool, ...], donate: bool = False
    ) -> Any:
        """A function of local parts as a program over the mesh; the result is sharded by trial."""
        return jax.jit(
            jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=tuple(P(TRIALS_AXIS) if one else P() for one in sharded),
                out_specs=P(TRIALS_AXIS),
                axis_names={TRIALS_AXIS},
                check_vma=False,
            ),
            donate_argnums=(0,) if donate else (),
        )

    def _over_trials(self, function: Callable[..., Any], num_batched: int) -> Callable[..., Any]:
        """A function of one trial over a block's; `num_batched` arguments are by trial."""

        def mapped(*args: Any) -> Any:
            if self._width == 1:
                # No vmap at all: a batch of one is not the same program.
                one = jax.tree.map(lambda leaf: leaf[0], args[:num_batched])
                out = function(*one, *args[num_batched:])
                return jax.tree.map(lambda leaf: leaf[None], out)
            axes = (*(0 for _ in range(num_batched)), *(None for _ in args[num_batched:]))
            return jax.vmap(function, axes)(*args)

        return mapped

    def _trial_key(self, key: chex.PRNGKey, seed: chex.Array, number: chex.Array) -> chex.PRNGKey:
        return train.trial_key(key, seed, number if self._independent else None)

    def _each_block(self, count: Any, block: Callable[[Any, Any], Any], like: Any) -> Any:
        """Puts ``block(rows, first)`` of each block of rows in the place of these rows."""

        def body(i: chex.Array, results: Any) -> Any:
            first = i * self._width
            done = block(self._rows(results, first), first)
            return jax.tree.map(
                lambda all_rows, new: jax.lax.dynamic_update_slice_in_dim(all_rows, new, first, 0),
                results,
                done,
            )

        # A loop even over one block: the same program trains any number of them.
        return jax.lax.fori_loop(0, count, body, like)

    def _rows(self, tree: Any, first: chex.Array) -> Any:
        """The rows of one block."""
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, self._width), tree
        )

    def _empty(self, num_rows: int, block: Callable[[Any], Any]) -> Any:
        """Zeros in the shapes of ``block(first)``, with all rows of a device."""
        shapes = jax.eval_shape(block, jnp.int32(0))
        return jax.tree.map(lambda leaf: _zeros((num_rows, *leaf.shape[1:]), leaf.dtype), shapes)

    def _init_local(self, inputs: Any, key: chex.PRNGKey, data: Any, batches: Any) -> States:
        seed = inputs["seed"][0]

        def init_one(point: Any, number: chex.Array) -> train.TrialState:
            state = self._trial.init(point, self._trial_key(key, seed, number), data, batches)
            # The key follows from the trial's number; what is shared must stay so under vmap.
            return state._replace(key=None)

        def block(first: chex.Array) -> Any:
            return self._over_trials(init_one, 2)(
                *self._rows((inputs["points"], inputs["trial"]), first)
            )

        num_rows = inputs["trial"].shape[0]
        empty = self._empty(num_rows, block)
        # Rows that hold no trial count as broken: nothing is spent on them.
        empty = empty._replace(infeasible_step=jnp.zeros_like(empty.infeasible_step))
        states = self._each_block(inputs["num_used"][0], lambda _, first: block(first), empty)
        return States(states, jnp.arange(num_rows, dtype=jnp.int32))

    def _advance_local(
        self,
        states: States,
        inputs: Any,
        key: chex.PRNGKey,
        data: Any,
        start: chex.Array,
        stop: chex.Array,
        batches: Any,
    ) -> States:
        seed = inputs["seed"][0]
        # All trials of a call share a seed, and by default their key and batches.
        shared_key = self._trial_key(key, seed, jnp.int32(0))

        def advance_one(
            state: Any, number: chex.Array, data: Any, step: Any, until: Any, chunk: Any, first: Any
        ) -> Any:
            own = self._trial_key(key, seed, number) if self._independent else shared_key
            state = state._replace(key=own)
            state = self._trial.advance(state, data, step, until, chunk, first)
            return state._replace(key=None)

        def sweep(carry: tuple[chex.Array, States]) -> tuple[chex.Array, States]:
            step, states = carry
            until = jnp.minimum(step + self._sweep_steps, stop)
            chunk, first_step = batches, start
            if self._make_batch is not None:
                chunk, first_step = self._gather(data, shared_key, step, until), step
            states = _live_first(states)
            num_live = jnp.sum(states.trials.infeasible_step < 0, dtype=jnp.int32)
            num_blocks = (num_live + self._width - 1) // self._width

            def block(trials: Any, first: chex.Array) -> Any:
                numbers = inputs["trial"][self._rows(states.place, first)]
                over = self._over_trials(advance_one, 2)
                return over(trials, numbers, data, step, until, chunk, first_step)

            return until, states._replace(trials=self._each_block(num_blocks, block, states.trials))

        return jax.lax.while_loop(lambda carry: carry[0] < stop, sweep, (start, states))[1]

    def _gather(self, data: Any, key: chex.PRNGKey, step: chex.Array, until: chex.Array) -> Any:
        """The batches of a sweep, leading axis of steps, once for all trials."""
        assert self._make_batch is not None
        make = self._make_batch
        if jax.default_backend() != "cpu":
            # A loop would ask the host before each step; there all are cheaper than one.
            steps = step + jnp.arange(self._sweep_steps, dtype=jnp.int32)
            return self._over_data(jax.vmap(make, (None, None, 0))(data, key, steps))
        shapes = jax.eval_shape(make, data, key, step)
        empty = jax.tree.map(
            lambda leaf: _zeros((self._sweep_steps, *leaf.shape), leaf.dtype), shapes
        )

        def put(i: chex.Array, chunk: Any) -> Any:
            batch = make(data, key, step + i)
            return jax.tree.map(lambda batches, one: batches.at[i].set(one), chunk, batch)

        return self._over_data(jax.lax.fori_loop(0, until - step, put, empty))

    def _over_data(self, chunk: Any) -> Any:
        """Batches with a leading axis of steps, sharded over the mesh's second axis, if any."""
        return jax.tree.map(
            lambda leaf: (
                jax.lax.with_sharding_constraint(leaf, P(None, DATA_AXIS))
                if self._is_cut(leaf)
                else leaf
            ),
            chunk,
        )

    def _result_local(self, states: States, inputs: Any) -> Any:
        in_order = jnp.argsort(states.place)
        trials = jax.tree.map(lambda leaf: leaf[in_order], states.trials)

        def block(first: chex.Array) -> Any:
            return self._over_trials(self._trial.result, 1)(self._rows(trials, first))

        empty = self._empty(inputs["trial"].shape[0], block)
        return self._each_block(inputs["num_used"][0], lambda _, first: block(first), empty)

    # Whole studies -----------------------------------------------------------------------------

    def run(
        self, blocks: Sequence[Block], points: Points, keeper: Keeper | None = None
    ) -> Iterator[list[tuple[int, dict[str, np.ndarray]]]]:
        """Trains blocks and yields them as they finish, a call's worth at a time.

        Args:
          blocks: the blocks to train, in order.
          points: where their points come from.
          keeper: saves blocks in training, brings back what was saved, and stops when asked to.

        Yields:
          Pairs of a block's index and its arrays, as `records.study_from_blocks` takes them; when
          the next ones are asked for, these must be stored.

        Raises:
          OutOfMemory: the device has too little memory.
        """
        try:
            yield from self._run(blocks, points, keeper or Keeper())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemory(too_wide(self._width, max(1, self._width // 2))) from error

    def _run(
        self, blocks: Sequence[Block], points: Points, keeper: Keeper
    ) -> Iterator[list[tuple[int, dict[str, np.ndarray]]]]:
        pending: tuple[_Call, Any] | None = None
        for call in self._calls(blocks, keeper):
            work = self._train(call, points, keeper)
            results = next(work)
            # This call is on its way while the last one's results are fetched and stored.
            if pending is not None:
                yield self._fetch(*pending, points)
                keeper.drop(pending[0].indices)
            for results in work:  # noqa: B007 - only the last is not None.
                pass
            pending = (call, results)
            if keeper.asked_to_stop:
                break
        if pending is not None:
            yield self._fetch(*pending, points)
            keeper.drop(pending[0].indices)
        keeper.check()

    def _calls(self, blocks: Sequence[Block], keeper: Keeper) -> Iterator[_Call]:
        """Groups of blocks of one seed: first what was saved in training, then the others."""
        left = {block.index: block for block in blocks}
        for group in keeper.groups(left):
            together = [left.pop(index) for index in group]
            for part in _parts(together, self.blocks_per_call):
                yield _Call(part, group)
        for seed in sorted({block.seed for block in left.values()}):
            same = [block for block in left.values() if block.seed == seed]
            for part in _parts(same, self.blocks_per_call):
                yield _Call(part, ())

    def _place(
        self, blocks: Sequence[Block], rows: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Points, trials and seed of one call: leading axis (device * block * trial).

        Block i of a call goes to device i modulo the number of devices, so that a small call is
        spread over all of them; unused places repeat the last block and are not trained.
        """
        order = [self._slot_block(slot, len(blocks)) for slot in range(self.blocks_per_call)]
        filled = [min(i, len(blocks) - 1) for i in order]
        used = np.array([i < len(blocks) for i in order]).reshape(self._num_devices, -1)
        points = {
            name: np.concatenate([np.asarray(rows[i][name]) for i in filled]) for name in rows[0]
        }
        return {
            "points": points,
            "trial": np.concatenate([blocks[i].trials for i in filled]),
            "seed": np.full(self._num_devices, blocks[0].seed, np.int32),
            "num_used": used.sum(axis=1).astype(np.int32),
        }

    def _slot_block(self, slot: int, num_blocks: int) -> int:
        device, position = divmod(slot, self._per_device)
        return device + position * self._num_devices

    def _train(self, call: _Call, points: Points, keeper: Keeper) -> Iterator[Any]:
        """Trains one call; yields None when the device has work, and at last the results."""
        programs = self.compile()
        rows = [points.rows(block.trials) for block in call.blocks]
        inputs = jax.device_put(self._place(call.blocks, rows), self._sharded)
        saved = keeper.load(call.group, self._saved_shapes(len(call.group))) if call.group else None
        states = None if saved is None else self._restore(call, saved)
        begin = (0, None) if saved is None else (saved.step, saved.position)
        for start, stop, chunk, position in self._segments(*begin):
            if states is None:
                states = programs.init(inputs, self._key, self._data, chunk)
            states = self._advance(states, inputs, start, stop, chunk)
            if stop < self._trial.num_steps:
                yield None
                jax.block_until_ready(states.place)
                rows_now = functools.partial(self._rows_of, call.blocks, states)
                keeper.between_calls(call.indices, stop, rows_now, position)
        yield programs.result(states, inputs)

    def _segments(self, start: int, position: Any) -> Iterator[tuple[int, int, Any, Any]]:
        """Each call of the program: start, stop, host batches, and where their iterator stands."""
        num_steps = self._trial.num_steps
        if self._host_batches is not None:
            batches = host_data.batches_from(self._host_batches, start, position)
            for chunk, at in prefetch(batches, num_steps - start, self._chunk_length, start):
                stop = min(start + self._chunk_length, num_steps)
                yield start, stop, self._put_chunk(chunk), at
                start = stop
            return
        length = self._sweep_steps
        while start < num_steps:
            stop = min(start + length, num_steps)
            began = time.monotonic()
            yield start, stop, None, None
            seconds = max(time.monotonic() - began, 1e-3)
            start = stop
            # At most four times as long as the last, which may have been quick by chance.
            growth = min(4.0, SECONDS_PER_CALL / seconds)
            length = max(self._sweep_steps, int(length * growth))

    # Saves: leaves of the states, rows in the order of the call's blocks.

    def _saved_shapes(self, num_blocks: int) -> list[Any]:
        """Dtypes and shapes of what is saved of so many blocks."""
        self.compile()
        return [
            jax.ShapeDtypeStruct((num_blocks * self._width, *leaf.shape[1:]), leaf.dtype)
            for leaf in jax.tree.leaves(jax.eval_shape(_as_data, self._state_shapes.trials))
        ]

    def _slot_rows(self, num_blocks: int) -> np.ndarray:
        """The first row of each block of a call, shape (block,), live or not."""
        slots = [self._slot_block(slot, num_blocks) for slot in range(self.blocks_per_call)]
        return np.array([slots.index(number) for number in range(num_blocks)]) * self._width

    def _rows_of(self, blocks: Sequence[Block], states: States) -> list[np.ndarray]:
        """What is saved, on the host."""
        host = jax.device_get(_as_data(states.trials))
        place = np.asarray(states.place).reshape(self._num_devices, -1)
        # Live trials have been moved to the front: find where each place's trial is now.
        rows_per_device = place.shape[1]
        first = np.arange(self._num_devices)[:, None] * rows_per_device
        now = (np.argsort(place, axis=1) + first).reshape(-1)
        starts = self._slot_rows(len(blocks))
        rows = now[(starts[:, None] + np.arange(self._width)).reshape(-1)]
        return [leaf[rows] for leaf in jax.tree.leaves(host)]

    def _restore(self, call: _Call, saved: Saved) -> States:
        """The states of a call's blocks, as they were saved perhaps on other devices."""
        shapes = self._state_shapes.trials
        num_rows = self.blocks_per_call * self._width
        starts = self._slot_rows(len(call.blocks))
        rows = (starts[:, None] + np.arange(self._width)).reshape(-1)
        places = np.array([saved.blocks.index(index) for index in call.indices]) * self._width
        source = (places[:, None] + np.arange(self._width)).reshape(-1)

        def spread(leaf: np.ndarray) -> np.ndarray:
            # Rows that hold no trial count as broken at step 0, as zeros say.
            whole = np.zeros((num_rows, *leaf.shape[1:]), leaf.dtype)
            whole[rows] = leaf[source]
            return whole

        data_shapes = jax.eval_shape(_as_data, shapes)
        trials = jax.tree.unflatten(
            jax.tree.structure(data_shapes), [spread(leaf) for leaf in saved.arrays]
        )
        place = np.tile(np.arange(num_rows // self._num_devices, dtype=np.int32), self._num_devices)
        placed = jax.device_put((trials, place), self._sharded)
        return States(_from_data(placed[0], shapes), placed[1])

    def _fetch(
        self, call: _Call, results: Any, points: Points
    ) -> list[tuple[int, dict[str, np.ndarray]]]:
        blocks = call.blocks
        host = jax.device_get(results)
        out = []
        for slot in range(self.blocks_per_call):
            number = self._slot_block(slot, len(blocks))
            if number >= len(blocks):
                continue
            rows = slice(slot * self._width, (slot + 1) * self._width)
            result = jax.tree.map(lambda leaf, rows=rows: leaf[rows], host)
            block = blocks[number]
            arrays = block_arrays(block, points.rows(block.trials), result)
            out.append((block.index, arrays))
        return sorted(out, key=lambda item: item[0])

    def _advance(self, states: States, inputs: Any, start: int, stop: int, chunk: Any) -> States:
        limits = jax.device_put((np.int32(start), np.int32(stop)), self._replicated)
        advanced: States = self.compile().advance(
            states, inputs, self._key, self._data, *limits, chunk
        )
        return advanced

    def rehearse(
        self, blocks: Sequence[Block], points: Points, seconds: float
    ) -> tuple[float, float]:
        """Trains the first steps of a call, for its time alone.

        Args:
          blocks: at most `blocks_per_call`, of one seed.
          points: where their points come from.
          seconds: how long to go on, about.

        Returns:
          Seconds that the first evaluation took, and that a step took, of all trials.
        """
        programs = self.compile()
        inputs = self._place(blocks, [points.rows(block.trials) for block in blocks])
        inputs = jax.device_put(inputs, self._sharded)
        chunk = next(self.feed(1))
        # Within a sweep, a chunk, and the time before the second evaluation.
        last = min(self._sweep_steps, int(self._trial.eval_steps[1]) - 1)
        if self._host_batches is not None:
            last = min(last, self._chunk_length)

        def timed(states: States, start: int, stop: int) -> tuple[States, float]:
            began = time.monotonic()
            states = self._advance(states, inputs, start, stop, chunk)
            jax.block_until_ready(states)
            return states, time.monotonic() - began

        spent, evaluation, per_step = 0.0, 0.0, 0.0
        while spent < seconds:
            states = programs.init(inputs, self._key, self._data, chunk)
            jax.block_until_ready(states)
            states, evaluation = timed(states, 0, 1)
            if last <= 1:  # Evaluated after each step: the two cannot be told apart.
                return 0.0, evaluation
            states, took = timed(states, 1, last)
            spent, per_step = spent + took + evaluation, took / (last - 1)
        return max(evaluation - per_step, 0.0), per_step

    # One block, step by step ---------------------------------------------------------------------

    def begin_block(self, block: Block, points: Points, chunk: Any) -> tuple[States, Any]:
        """The states of one block before the first update, and what `advance_block` needs.

        Args:
          block: the block.
          points: where its points come from.
          chunk: the first of `feed`.

        Returns:
          (states, inputs); the block stands in the first places.
        """
        inputs = self._place([block], [points.rows(block.trials)])
        inputs = jax.device_put(inputs, self._sharded)
        return self.compile().init(inputs, self._key, self._data, chunk), inputs

    def advance_block(
        self, states: States, inputs: Any, start: int, stop: int, chunk: Any
    ) -> States:
        """The states after the updates start, ..., stop - 1, with the very program of `run`.

        Args:
          states: from `begin_block`; donated.
          inputs: from `begin_block`.
          start: the first update.
          stop: the update before which to stop.
          chunk: host batches that begin with that of `start`, or None.

        Returns:
          The states.
        """
        return self._advance(states, inputs, start, stop, chunk)

    def trial_key(self, block: Block, trial: int) -> chex.PRNGKey:
        """The key of one trial of a block."""
        return self._trial_key(self._key, jnp.int32(block.seed), jnp.int32(trial))

    def result(self, state: train.TrialState) -> train.TrialResult:
        """The result of one trial's state so far."""
        return self._trial.result(state)

    def feed(self, num_steps: int) -> Iterator[Any]:
        """What to give to `begin_block`, and then to `advance_block` for each step in turn.

        Args:
          num_steps: how many steps.

        Yields:
          A chunk whose first batch is that of the step, of the length that `run` uses; None where
          batches are made on the device.
        """
        if self._host_batches is None:
            yield from itertools.repeat(None, num_steps + 1)
            return
        for step, batch in enumerate(itertools.islice(self._host_batches(0), num_steps)):
            chunk = self._put_chunk(_stack([batch] * self._chunk_length))
            if step == 0:
                yield chunk
            yield chunk


def too_wide(width: int, fitting: int | None) -> str:
    """What to tell when a block does not fit."""
    if width == 1:
        return (
            "one trial alone does not fit into the device's memory: make the model, the batches or "
            "the evaluation's batches smaller, or shard each trial over several devices with a "
            "second axis of mesh=."
        )
    return (
        f"blocks of {width} trials do not fit into the device's memory; use "
        f"trials_per_block={fitting}. The width decides bits: a study that is stored already "
        "cannot change it, so begin in another directory."
    )


def blocks_per_device(width: int, num_blocks: int, num_devices: int) -> int:
    """How many blocks of this width one device holds at a time, for a study of so many blocks."""
    most = max(1, min(BLOCKS_PER_DEVICE, TRIALS_PER_DEVICE // width))
    each = -(-max(num_blocks, 1) // num_devices)
    num_calls = -(-each // most)
    return max(1, -(-each // num_calls))


def _live_first(states: States) -> States:
    """Brings live trials before broken ones, keeping the order among them."""

    def broken(states: States) -> chex.Array:
        return states.trials.infeasible_step >= 0

    def out_of_order(states: States) -> chex.Array:
        dead = broken(states)
        return jnp.any(dead[:-1] & ~dead[1:])

    def sort(states: States) -> States:
        order = jnp.argsort(broken(states), stable=True)
        return jax.tree.map(lambda leaf: leaf[order], states)

    # A loop of no or one pass: a branch would copy the states even where nothing moves.
    return jax.lax.while_loop(out_of_order, sort, states)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Zeros, also of random keys that a model or an optimizer carries."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        like = jax.eval_shape(lambda: jax.random.key_data(jnp.empty((), dtype)))
        impl = jax.random.key_impl(jnp.empty((), dtype))
        return jax.random.wrap_key_data(jnp.zeros((*shape, *like.shape), like.dtype), impl=impl)
    return jnp.zeros(shape, dtype)


def _parts(blocks: Sequence[Block], most: int) -> Iterator[Sequence[Block]]:
    """Blocks in as few parts of about equal size as hold at most so many."""
    num_parts = -(-len(blocks) // most)
    for part in np.array_split(np.arange(len(blocks)), max(num_parts, 1)):
        yield [blocks[i] for i in part]


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _as_data(tree: Any) -> Any:
    """A tree with random keys as the numbers they are."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _from_data(tree: Any, like: Any) -> Any:
    """What `_as_data` was given, of the dtypes of `like`."""

    def restore(shape: Any, leaf: Any) -> Any:
        if not _is_key(shape):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=str(jax.random.key_impl(shape)))

    return jax.tree.map(restore, like, tree)


def _num_bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


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


def chunk_length(first: Any, num_steps: int) -> int:
    """How many batches travel together: as many as `MAX_CHUNK_BYTES` hold, within limits."""
    fitting = MAX_CHUNK_BYTES // max(_num_bytes(first), 1)
    return max(1, min(MAX_CHUNK_STEPS, num_steps, fitting))


def _stack(batches: list[Any]) -> Any:
    """Batches as one chunk, leaves (step, ...)."""
    if not batches:
        raise ValueError("host_batches gave no batch.")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *batches)


def prefetch(
    batches: Iterator[Any], num_steps: int, length: int, first: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Chunks of host batches, read ahead in a thread; the last one is padded to the same shape.

    Args:
      batches: the batches.
      num_steps: how many of them.
      length: batches in a chunk.
      first: the step of the first batch.

    Yields:
      Chunks, leaves (step, ...), and where the iterator stands after each.

    Raises:
      ValueError: the batches ended before.
    """
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
                        f"host_batches ended after {first + start + len(chunk)} batches; the run "
                        f"needs num_steps = {first + num_steps}. Repeat the data inside the "
                        "iterator."
                    )
                stacked = _stack(chunk + [chunk[-1]] * (length - wanted))
                if not put((stacked, host_data.position(batches))):
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
