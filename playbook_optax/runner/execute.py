"""Blocks of trials trained by compiled programs, sharded over the devices of a mesh."""

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import norms
from playbook_optax.records import storage, weights
from playbook_optax.runner import progress
from playbook_optax.runner.plan import Block, Columns, Points
from playbook_optax.runner.programs import (
    Numbers,
    Programs,
    chunk_sharding,
    is_key,
    num_bytes,
    warn_of_whole_batches,
)
from playbook_optax.runner.resume import Keeper, Saved
from playbook_optax.trials import host_data, judge, keys, loop
from playbook_optax.trials.stepper import Lengths, TrialState, evaluation_steps
from playbook_optax.trials.workload import Workload

# A call of the program takes at least so many steps, and a run at most so many calls, each of which
# costs some tenths of a millisecond.
MIN_CALL_STEPS, MAX_CALLS_PER_RUN = 16, 256
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
# Live trials are packed together again when that leaves out this share of the blocks.
_PACKED_SHARE = 1 / 8


class OutOfMemory(MemoryError):  # noqa: N818
    """A block is too wide for the device; the message names a width to use."""


class Unit(NamedTuple):
    """One block on each device, which one call of a program trains.

    Attributes:
      states: `TrialState` without points and keys, leading axis row, on the devices.
      inputs: points and trials of the rows, on the devices.
      rows: where in its group each row's trial stands, int (row,); -1 for none.
    """

    states: TrialState
    inputs: Any
    rows: np.ndarray


class Group(NamedTuple):
    """Blocks of one seed that are trained together.

    Attributes:
      blocks: the blocks.
      saved: the blocks of the save that they are part of, if any.
      trials: int32 (trial,), block after block.
      points: name to array (trial,).
    """

    blocks: Sequence[Block]
    saved: tuple[int, ...]
    trials: np.ndarray
    points: dict[str, np.ndarray]

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks' indices."""
        return tuple(block.index for block in self.blocks)


class Trained(NamedTuple):
    """A group when no work is left to give to the devices, which may still be at it.

    Attributes:
      units: its blocks with live trials.
      parked: what the host holds of the others.
      done: steps of which it was told that they are done.
    """

    units: list[Unit]
    parked: list[np.ndarray] | None
    done: int


class Engine:
    """Trains the blocks of a study with programs that know nothing of its length or size.

    A group holds up to `blocks_per_call` blocks of one seed. Its trials advance some steps at a
    time, one block on each device in a call of the program; blocks are made up anew when enough
    trials have broken, so that those stop costing. Who else is in a block, and how a run is cut
    into calls, changes no bit of a trial.

    Args:
      programs: compiled when first needed.
      work: the workload at one point.
      key: the study's key.
      lengths: how long a run is.
      keep: which weights are kept.
      blocks_per_device: blocks that one device holds at a time.
      columns: makes what the programs take of a study's points.
    """

    def __init__(
        self,
        programs: Programs,
        work: Workload,
        key: chex.PRNGKey,
        lengths: Lengths,
        keep: str,
        blocks_per_device: int,
        columns: Columns,
    ) -> None:
        self.programs, self.columns = programs, columns
        self._work, self._keep, self._lengths = work, keep, lengths
        self._eval_steps = evaluation_steps(*lengths)
        self._num_steps = int(lengths.num_steps)
        self._width = programs.shapes.width
        self._per_device = blocks_per_device
        self._num_devices = programs.num_devices
        self._key = key
        self._data = jax.device_put(work.data, programs.replicated)
        self._host_batches = work.host_batches
        if work.host_batches is not None:
            warn_of_whole_batches(programs.shapes.mesh, programs.shapes.chunk)

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
        """How many blocks are trained together."""
        return self._num_devices * self._per_device

    @property
    def memory(self) -> int:
        """Bytes that one device needs, data included."""
        training, waiting = self.programs.memory
        return training + (self._per_device - 1) * waiting

    # Whole studies -----------------------------------------------------------------------------

    def run(
        self, blocks: Sequence[Block], points: Points, keeper: Keeper | None = None
    ) -> Iterator[list[tuple[int, dict[str, np.ndarray]]]]:
        """Trains blocks and yields them as they finish, a group's worth at a time.

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
        pending: tuple[Group, Trained] | None = None
        for group in self._groups(blocks, points, keeper):
            work = self._train(group, keeper)
            states = next(work)
            # This group is on its way while the last one's results are fetched and stored.
            if pending is not None:
                yield self._finished(*pending)
                keeper.drop(pending[0].indices)
            for states in work:  # noqa: B007 - only the last is not None.
                pass
            pending = (group, states)
            if keeper.asked_to_stop:
                break
        if pending is not None:
            yield self._finished(*pending)
            keeper.drop(pending[0].indices)
        keeper.check()

    def _groups(self, blocks: Sequence[Block], points: Points, keeper: Keeper) -> Iterator[Group]:
        """Blocks of one seed: first what was saved in training, then the others."""
        left = {block.index: block for block in blocks}
        for saved in keeper.groups(left.values()):
            together = [left.pop(index) for index in saved]
            for part in _parts(together, self.blocks_per_call):
                yield _group(part, points, saved)
        for seed in sorted({block.seed for block in left.values()}):
            same = [block for block in left.values() if block.seed == seed]
            for part in _parts(same, self.blocks_per_call):
                yield _group(part, points)

    def _train(self, group: Group, keeper: Keeper) -> Iterator[Any]:
        """Trains a group; yields None when the device has work, and at last its states."""
        seed = group.blocks[0].seed
        saved = None
        if group.saved:
            like = self._saved_shapes(len(group.saved))
            saved = keeper.load(group.saved, like, self._num_steps)
        parked: list[np.ndarray] | None = None
        begin: tuple[int, Any] = (0, None)
        if saved is None:
            units = self._begin(group)
        else:
            parked = self._restored(group, saved)
            units = self._packed(group, parked)
            begin = (saved.step, saved.position)
            progress.resumed(len(group.trials) * saved.step)
        done = begin[0]
        for start, stop, chunk, position in self._segments(*begin, seed, len(units)):
            if not units:  # All have broken, perhaps before they were saved.
                break
            units = self._advance(units, start, stop, chunk)
            if stop < self._num_steps:
                yield None
                jax.block_until_ready([unit.states.step for unit in units])
                done = stop
                progress.moved(len(group.trials) * (stop - start))
                now = functools.partial(self._arrays_of, group, units, parked)
                keeper.between_calls(group.blocks, stop, now, position)
                units, parked = self._without_broken(group, units, parked)
        yield Trained(units, parked, done)

    def _segments(
        self, start: int, position: Any, seed: int, num_units: int
    ) -> Iterator[tuple[int, int, Any, Any]]:
        """Each call of the program: start, stop, batches, and where their iterator stands."""
        if self._host_batches is not None:
            length = chunk_length_of(self.programs.shapes.chunk)
            batches = host_data.batches_from(self._host_batches, start, position)
            like = self.programs.shapes.chunk
            for chunk, at in prefetch(batches, self._num_steps - start, length, start, like):
                stop = min(start + length, self._num_steps)
                yield start, stop, self._put_chunk(chunk), at
                start = stop
            return
        shortest = max(MIN_CALL_STEPS, -(-self._num_steps * num_units // MAX_CALLS_PER_RUN))
        length = shortest
        together = loop.steps_per_chunk()
        while start < self._num_steps:
            length = min(max(length, together), self.programs.gathered_steps or shortest)
            length = length // together * together
            stop = min(start + length, self._num_steps)
            began = time.monotonic()
            yield start, stop, self._gathered(seed, start, stop), None
            seconds = max(time.monotonic() - began, 1e-3)
            start = stop
            # At most four times as long as the last, which may have been quick by chance.
            length = max(shortest, int(length * min(4.0, SECONDS_PER_CALL / seconds)))

    # The programs ------------------------------------------------------------------------------

    def _numbers(self, start: int = 0, stop: int = 0) -> Any:
        told = Numbers(start, stop, self._num_steps, int(self._lengths.eval_every))
        return jax.device_put(np.asarray(told, np.int32), self.programs.replicated)

    def _gathered(self, seed: int, start: int, stop: int) -> Any:
        """The batches of some steps where all trials of a seed share them, or None."""
        gather = self.programs.program("gather")
        if gather is None:
            return None
        key = keys.batch_key(keys.trial_key(self._key, seed))
        key = jax.device_put(key, self.programs.replicated)
        return gather(self._data, key, self._numbers(start, stop))

    def _put_chunk(self, chunk: Any) -> Any:
        """Host batches on the devices."""
        mesh = self.programs.shapes.mesh
        return jax.device_put(chunk, jax.tree.map(lambda leaf: chunk_sharding(mesh, leaf), chunk))

    def _advance(self, units: Sequence[Unit], start: int, stop: int, chunk: Any) -> list[Unit]:
        program = self.programs.program("advance")
        numbers = self._numbers(start, stop)
        return [
            unit._replace(states=program(unit.states, unit.inputs, self._data, numbers, chunk))
            for unit in units
        ]

    def _inputs(self, group: Group, rows: np.ndarray) -> Any:
        """Points and keys of a unit's rows; those without a trial repeat the first."""
        filled = np.maximum(rows, 0)
        inputs = {
            "points": {
                name: values[filled]
                for name, values in self.columns.of_program(group.points).items()
            },
            "live": rows >= 0,
            "key": self._trial_keys(group.blocks[0].seed, group.trials[filled]),
        }
        return jax.device_put(inputs, self._inputs_sharding(inputs))

    def _inputs_sharding(self, inputs: Any) -> Any:
        by_name = self.programs.inputs_sharding
        return {
            name: jax.tree.map(lambda _, to=by_name[name]: to, value)
            for name, value in inputs.items()
        }

    def _trial_keys(self, seed: int, trials: np.ndarray) -> chex.PRNGKey:
        """One key for each trial, or the one that all share."""
        if not self.programs.shapes.independent:
            return keys.trial_key(self._key, seed)
        return jax.vmap(keys.trial_key, (None, None, 0))(self._key, seed, jnp.asarray(trials))

    def _begin(self, group: Group) -> list[Unit]:
        """The units of a group before the first update."""
        numbers = self._numbers()
        weights, shared = self.programs.program("weights"), None
        if weights is not None:
            key = keys.init_key(keys.trial_key(self._key, group.blocks[0].seed))
            shared = jax.device_put(weights(key), self.programs.replicated)
        begin = self.programs.program("begin")
        units = []
        for rows in self._spread(np.arange(len(group.trials))):
            inputs = self._inputs(group, rows)
            units.append(Unit(begin(inputs, numbers, shared), inputs, rows))
        return units

    def _spread(self, trials: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of each unit: block after block, so that few are spread over all devices."""
        per_unit = self._num_devices * self._width
        for first in range(0, len(trials), per_unit):
            part = trials[first : first + per_unit]
            yield np.concatenate([part, np.full(per_unit - len(part), -1, part.dtype)])

    # Trials that broke ---------------------------------------------------------------------------

    def _without_broken(
        self, group: Group, units: list[Unit], parked: list[np.ndarray] | None
    ) -> tuple[list[Unit], list[np.ndarray] | None]:
        """Live trials packed together, if that leaves out enough blocks; the others on the host."""
        broken = np.concatenate([np.asarray(unit.states.infeasible_step) >= 0 for unit in units])
        num_needed = -(-int(np.sum(~broken)) // (self._num_devices * self._width))
        if len(units) - num_needed < max(1, _PACKED_SHARE * len(units)):
            return units, parked
        parked = self._arrays_of(group, units, parked)
        return self._packed(group, parked), parked

    def _packed(self, group: Group, parked: list[np.ndarray]) -> list[Unit]:
        """Units of the live trials among the host's."""
        structure = jax.tree.structure(self._data_shapes())
        states = jax.tree.unflatten(structure, parked)
        live = np.flatnonzero(states.infeasible_step < 0)
        units = []
        for rows in self._spread(live):
            filled = np.maximum(rows, 0)
            part = jax.tree.map(lambda leaf, filled=filled: leaf[filled], states)
            broken = np.where(rows >= 0, part.infeasible_step, 0).astype(np.int32)
            placed = jax.device_put(part._replace(infeasible_step=broken), self.programs.sharded)
            placed = _from_data(placed, self.programs.state_shapes)
            units.append(Unit(placed, self._inputs(group, rows), rows))
        return units

    def _arrays_of(
        self, group: Group, units: Sequence[Unit], parked: list[np.ndarray] | None
    ) -> list[np.ndarray]:
        """The leaves of all states on the host, rows in the order of the group's trials."""
        data = [jax.tree.leaves(_as_data(unit.states)) for unit in units]
        return _collected(len(group.trials), data, units, parked)

    # Saves: leaves of the states, rows in the order of the group's blocks.

    def _data_shapes(self) -> TrialState:
        return _data_shapes(self.programs)

    def _saved_shapes(self, num_blocks: int) -> list[Any]:
        """Dtypes and shapes of what is saved of so many blocks."""
        rows = num_blocks * self._width
        return [
            jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
            for leaf in jax.tree.leaves(self._data_shapes())
        ]

    def _restored(self, group: Group, saved: Saved) -> list[np.ndarray]:
        """The host's arrays of a group, as they were saved perhaps on other devices."""
        places = np.array([saved.blocks.index(index) for index in group.indices]) * self._width
        source = (places[:, None] + np.arange(self._width)).reshape(-1)
        return [leaf[source] for leaf in saved.arrays]

    # Results -------------------------------------------------------------------------------------

    def _finished(self, group: Group, trained: Trained) -> list[tuple[int, dict[str, np.ndarray]]]:
        """A group's blocks as arrays, judged on the host."""
        units, parked, done = trained
        shapes = self._data_shapes()
        numbered = jax.tree.unflatten(
            jax.tree.structure(shapes), range(len(jax.tree.leaves(shapes)))
        )
        needed = _of_result(numbered, self._keep)
        places = jax.tree.leaves(needed)
        data = []
        for unit in units:
            leaves = jax.tree.leaves(_as_data(unit.states))
            data.append([leaves[i] for i in places])
        kept = None if parked is None else [parked[i] for i in places]
        arrays = _collected(len(group.trials), data, units, kept)
        progress.moved(len(group.trials) * (self._num_steps - done))
        host = jax.tree.unflatten(jax.tree.structure(needed), arrays)
        result = judge.result(self._work, host, self._eval_steps, self._keep)
        found = []
        for number, block in enumerate(group.blocks):
            rows = slice(number * self._width, (number + 1) * self._width)
            own = jax.tree.map(lambda leaf, rows=rows: leaf[rows], result._replace(step=None))
            points = {name: values[rows] for name, values in group.points.items()}
            found.append((block.index, block_arrays(block, points, own)))
        return sorted(found, key=lambda item: item[0])

    # Rehearsals --------------------------------------------------------------------------------

    def rehearse(
        self, blocks: Sequence[Block], points: Points, seconds: float
    ) -> tuple[float, float]:
        """Trains the first steps of a group, for its time alone.

        Args:
          blocks: at most `blocks_per_call`, of one seed.
          points: where their points come from.
          seconds: how long to go on, about; once at least.

        Returns:
          Seconds that the first evaluation took, and that a step took, of all trials.
        """
        group = _group(blocks, points)
        chunk = next(self.feed(1))
        # Within a chunk, and the time before the second evaluation.
        last = min(MIN_CALL_STEPS, int(self._eval_steps[1]) - 1)
        if self._host_batches is not None:
            last = min(last, chunk_length_of(chunk))

        def timed(units: list[Unit], start: int, stop: int) -> tuple[list[Unit], float]:
            batches = chunk if self._host_batches else self._gathered(0, start, stop)
            began = time.monotonic()
            units = self._advance(units, start, stop, batches)
            jax.block_until_ready([unit.states for unit in units])
            return units, time.monotonic() - began

        spent = 0.0
        while True:
            units = self._begin(group)
            jax.block_until_ready([unit.states for unit in units])
            units, evaluation = timed(units, 0, 1)
            if last <= 1:  # Evaluated after each step: the two cannot be told apart.
                return 0.0, evaluation
            units, took = timed(units, 1, last)
            spent, per_step = spent + took + evaluation, took / (last - 1)
            if spent >= seconds:
                return max(evaluation - per_step, 0.0), per_step

    # One block, step by step ---------------------------------------------------------------------

    def begin_block(self, block: Block, points: Points) -> Unit:
        """One block before the first update, in the first rows of a unit.

        Args:
          block: the block.
          points: where its points come from.

        Returns:
          The unit.
        """
        (unit,) = self._begin(_group([block], points))
        return unit

    def advance_block(self, unit: Unit, block: Block, start: int, stop: int, chunk: Any) -> Unit:
        """The unit after the updates start, ..., stop - 1, with the very program of `run`.

        Args:
          unit: from `begin_block`; donated.
          block: the block.
          start: the first update.
          stop: the update before which to stop.
          chunk: host batches that begin with that of `start`, or None.

        Returns:
          The unit.
        """
        most = self.programs.gathered_steps or stop
        for first in range(start, stop, most) if chunk is None else (start,):
            last = min(first + most, stop)
            batches = self._gathered(block.seed, first, last) if chunk is None else chunk
            (unit,) = self._advance([unit], first, last, batches)
        return unit

    def trial_key(self, block: Block, trial: int) -> chex.PRNGKey:
        """The key of one trial of a block."""
        own = trial if self.programs.shapes.independent else None
        return keys.trial_key(self._key, block.seed, own)

    def result(self, state: TrialState) -> judge.TrialResult:
        """The result of one trial's state so far, on the host."""
        host = jax.device_get(_of_result(state._replace(point=None, key=None), self._keep))
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None], host)
        result = judge.result(self._work, rows, self._eval_steps, self._keep)
        return jax.tree.map(lambda leaf: leaf[0], result._replace(step=None))

    def feed(self, num_steps: int) -> Iterator[Any]:
        """What to give to `advance_block` for each step in turn.

        Args:
          num_steps: how many steps.

        Yields:
          A chunk whose first batch is that of the step, of the length that `run` uses; None where
          batches are made on the device.
        """
        if self._host_batches is None:
            yield from itertools.repeat(None, num_steps)
            return
        length = chunk_length_of(self.programs.shapes.chunk)
        for batch in itertools.islice(host_data.made(self._host_batches, 0), num_steps):
            yield self._put_chunk(_stack([batch] * length))


def _of_result(states: TrialState, keep: str) -> TrialState:
    """What of the states is judged or kept; the rest need not be fetched."""
    final = keep == "final"
    return states._replace(
        opt_state=norms.records_in(states.opt_state),
        params=states.params if final else None,
        model_state=states.model_state if final else None,
        best_params=states.best_params if keep == "best" else None,
    )


def describe_block(
    programs: Programs,
    work: Workload,
    eval_steps: np.ndarray,
    keep: str,
    points: Mapping[str, np.ndarray],
) -> dict[str, list[Any]]:
    """What a finished block will hold, before anything is trained.

    Args:
      programs: the study's.
      work: the workload at one point.
      eval_steps: updates done before each evaluation.
      keep: which weights are kept.
      points: one point, name to array (1,).

    Returns:
      See `storage.describe_arrays`.
    """
    one_run = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), (1, *leaf.shape[1:])),
        _data_shapes(programs),
    )
    result = judge.result(work, _of_result(one_run, keep), eval_steps, keep)
    block = Block(0, np.zeros(1, np.int32), 0)
    return storage.describe_arrays(block_arrays(block, points, result._replace(step=None)))


def _group(blocks: Sequence[Block], points: Points, saved: tuple[int, ...] = ()) -> Group:
    rows = [points.rows(block.trials) for block in blocks]
    table = {name: np.concatenate([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    return Group(blocks, saved, np.concatenate([block.trials for block in blocks]), table)


def _collected(
    num_rows: int,
    data: Sequence[Sequence[Any]],
    units: Sequence[Unit],
    parked: Sequence[np.ndarray] | None,
) -> list[np.ndarray]:
    """Leaves of the units on the host in their trials' order, beside what is there already."""
    host = jax.device_get(data)
    if parked is None:
        like = host[0]
        whole = [np.zeros((num_rows, *leaf.shape[1:]), leaf.dtype) for leaf in like]
    else:
        whole = [leaf.copy() for leaf in parked]
    for unit, leaves in zip(units, host, strict=True):
        used = unit.rows >= 0
        for into, leaf in zip(whole, leaves, strict=True):
            into[unit.rows[used]] = leaf[used]
    return whole


def chunk_length_of(chunk: Any) -> int:
    """How many steps a chunk of batches holds."""
    return int(jax.tree.leaves(chunk)[0].shape[0])


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


def _parts(blocks: Sequence[Block], most: int) -> Iterator[Sequence[Block]]:
    """Blocks in as few parts of about equal size as hold at most so many."""
    num_parts = -(-len(blocks) // most)
    for part in np.array_split(np.arange(len(blocks)), max(num_parts, 1)):
        yield [blocks[i] for i in part]


def _as_data(tree: Any) -> Any:
    """A tree with random keys as the numbers they are."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def _from_data(tree: Any, like: Any) -> Any:
    """What `_as_data` was given, of the dtypes of `like`."""

    def restore(shape: Any, leaf: Any) -> Any:
        if not is_key(shape):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=_key_impl(shape.dtype))

    return jax.tree.map(restore, like, tree)


def _key_impl(dtype: Any) -> str:
    """The implementation of random keys of a dtype."""
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(functools.partial(jax.random.key, 0, impl=impl)).dtype == dtype:
            return impl
    raise ValueError(f"random keys of dtype {dtype} in a state are of no implementation of JAX's.")


def _data_shapes(programs: Programs) -> TrialState:
    """Of the states of a block on each device, random keys as numbers."""
    shapes: TrialState = jax.eval_shape(_as_data, programs.state_shapes)
    return shapes


def block_arrays(
    block: Block, points: Mapping[str, np.ndarray], result: judge.TrialResult
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
    return _stack(list(itertools.islice(host_data.made(host_batches, 0), 1)))


def chunk_length(first: Any) -> int:
    """How many batches travel together: as many as `MAX_CHUNK_BYTES` hold, within limits."""
    fitting = MAX_CHUNK_BYTES // max(num_bytes(first), 1)
    return max(1, min(MAX_CHUNK_STEPS, fitting))


def _stack(batches: list[Any]) -> Any:
    """Batches as one chunk, leaves (step, ...)."""
    if not batches:
        raise ValueError("host_batches gave no batch.")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *batches)


def _check_batch(batch: Any, like: Any, number: int) -> None:
    """Raises if a batch is not of the structure, shapes and dtypes of the first one."""
    found, wanted = (str(jax.tree.structure(tree)) for tree in (batch, like))
    if found != wanted:
        raise ValueError(
            f"host_batches: batch {number} has the structure {found}, the first one {wanted}."
        )
    for (path, leaf), steps in zip(
        jax.tree_util.tree_leaves_with_path(batch), jax.tree.leaves(like), strict=True
    ):
        array = np.asarray(leaf)
        shape, dtype = tuple(steps.shape[1:]), np.dtype(steps.dtype)
        if array.shape != shape or jax.dtypes.canonicalize_dtype(array.dtype) != dtype:
            where = jax.tree_util.keystr(path) or "the array"
            raise ValueError(
                f"host_batches: {where} of batch {number} has shape {array.shape} and dtype "
                f"{array.dtype}, that of the first batch {shape} and {dtype}. All batches of a "
                "study are alike: drop the last batch of an epoch where it is short (the drop_last "
                "or drop_remainder of most loaders), or fill it up."
            )


def prefetch(
    batches: Iterator[Any], num_steps: int, length: int, first: int = 0, like: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Chunks of host batches, read ahead in a thread; the last one is padded to the same shape.

    Args:
      batches: the batches.
      num_steps: how many of them.
      length: batches in a chunk.
      first: the step of the first batch.
      like: a chunk's shapes and dtypes, which every batch must fit; None takes any.

    Yields:
      Chunks, leaves (step, ...), and where the iterator stands after each.

    Raises:
      ValueError: the batches ended before, or one is not like the others.
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
                chunk = []
                for number, batch in enumerate(itertools.islice(batches, wanted), first + start):
                    if like is not None:
                        _check_batch(batch, like, number)
                    chunk.append(batch)
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
