"""The programs that train blocks of trials: compiled once for a model and an optimizer.

How long a run is, how often it is evaluated, how many trials, seeds and blocks there are, and where
a run stands are numbers that the programs take. Compiled programs outlive the call that made them:
they are found again by the text that was lowered, so that functions which trace alike share them
and a changed one never gets another's; and, before anything is traced, by what the functions are
made of.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax.runner import dependence, devices, identity, progress, signals
from playbook_optax.runner.devices import DATA_AXIS, TRIALS_AXIS
from playbook_optax.trials import loop
from playbook_optax.trials.stepper import (
    Lengths,
    Stepper,
    TrialState,
    depends_on_point,
    shared_batches,
)
from playbook_optax.trials.workload import Workload

# Batches of so many steps are gathered once for all trials, if they take no more than this.
GATHERED_STEPS = 256
MAX_GATHERED_BYTES = 16 * 2**20
# Room for evaluations: a few sizes, so that studies of other lengths share a program.
_EVALUATIONS = (32, 128, 512, 2048)
# Weights of the best evaluation are kept whether they are asked for or not where they take no more
# than this, so that studies that keep them and others share a program.
_KEPT_BYTES = 256 * 2**10
# How many compiled programs, and how many sets of them with what they were traced from, are kept.
MAX_COMPILED = 128
MAX_SETS = 32

P = jax.sharding.PartitionSpec
_T = TypeVar("_T")
_R = TypeVar("_R")
# How soon a signal is seen that came just before this thread began to wait.
_CHECK_SECONDS = 0.2

_compiled: collections.OrderedDict[str, Any] = collections.OrderedDict()
_sets: collections.OrderedDict[Hashable, "Programs"] = collections.OrderedDict()
_outlines: collections.OrderedDict[Hashable, "Outline"] = collections.OrderedDict()
_lock = threading.RLock()


class Numbers(NamedTuple):
    """What differs from call to call; they travel as one int32 array."""

    start: Any
    stop: Any
    num_steps: Any
    eval_every: Any


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a program is compiled for, beside the functions.

    Attributes:
      mesh: mesh over ``trials``, and perhaps ``data``.
      width: trials that are trained side by side on a device.
      num_evals: room for evaluations.
      independent: whether trials have randomness of their own.
      point: one point, name to array (1,).
      key: a trial's key.
      data: the workload's data.
      chunk: host batches with a leading axis of steps, or None.
      num_steps: updates of the run where the user's schedule needs the number itself, else None.
    """

    mesh: jax.sharding.Mesh
    width: int
    num_evals: int
    independent: bool
    point: Any
    key: Any
    data: Any
    chunk: Any
    num_steps: int | None


def room_for(num_evals: int) -> int:
    """How many evaluations a program has room for that is to hold so many."""
    fitting = [size for size in _EVALUATIONS if size >= num_evals]
    return fitting[0] if fitting else 1 << (num_evals - 1).bit_length()


def keeps_best(keep: str, weights: Any) -> bool:
    """Whether a program keeps the weights of the best evaluation; `weights` are shapes."""
    return keep == "best" or num_bytes(weights) <= _KEPT_BYTES


def num_bytes(shapes: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


class Programs:
    """The programs of one stepper and one set of shapes, over the devices of a mesh.

    `weights` initializes what all trials of a seed share, and is None where they share nothing;
    `gather` makes the batches that they share, likewise; `begin` makes the states of a block on
    each device, and `advance` trains them.

    Args:
      stepper: what happens to a trial.
      shapes: what to compile for.

    Attributes:
      unused_names: hyperparameters that no program depends on.
      making_seconds: what it took to trace and compile, so far.
    """

    unused_names: frozenset[str]

    def __init__(self, stepper: Stepper, shapes: Shapes) -> None:
        self.stepper, self.shapes = stepper, shapes
        mesh = shapes.mesh
        self.num_devices = mesh.shape[TRIALS_AXIS]
        self.sharded = jax.sharding.NamedSharding(mesh, P(TRIALS_AXIS))
        self.replicated = jax.sharding.NamedSharding(mesh, P())
        first = {name: values[0] for name, values in shapes.point.items()}
        self._shared_batch = self._shared_batches(first)
        self._shares_weights = not shapes.independent and not depends_on_point(
            self.stepper.weights, first, shapes.key
        )
        began = time.monotonic()
        with progress.stage("tracing"):
            self._traced: dict[str, Any] = self._trace()
        self.making_seconds = time.monotonic() - began
        self._programs: dict[str, Any] | None = None

    # Tracing and compiling ---------------------------------------------------------------------

    @property
    def state_shapes(self) -> TrialState:
        """Of the states of a block on each device, row by row."""
        shapes: TrialState = self._state_shapes
        return shapes

    @property
    def gathered_steps(self) -> int | None:
        """How many steps' batches are gathered at once; None where trials make their own."""
        return self._gathered_steps

    def program(self, name: str) -> Any:
        """One of the programs, compiled with the others if need be; None if there is none."""
        with _lock:
            if self._programs is None:
                began = time.monotonic()
                self._programs = _compile(self._traced, self.shapes.mesh)
                self.making_seconds += time.monotonic() - began
                self._traced.clear()
        found = self._programs.get(name)
        if found is None or name not in ("begin", "advance") or not self._has_empty_leaves:
            return found
        return functools.partial(self._with_empty_leaves, found)

    @functools.cached_property
    def _has_empty_leaves(self) -> bool:
        """Whether the compiler forgets on which of several devices some of the states are."""
        leaves = jax.tree.leaves(self._state_shapes)
        return self.shapes.mesh.size > 1 and any(0 in leaf.shape for leaf in leaves)

    def _with_empty_leaves(self, program: Any, *args: Any) -> Any:
        """The states that a program gives, those without a number where the next one wants them."""
        return jax.tree.map(
            lambda leaf: leaf if leaf.size else jax.device_put(leaf, self.sharded), program(*args)
        )

    @functools.cached_property
    def memory(self) -> tuple[int, int]:
        """Bytes that one device needs: for a block in training, and for each that waits."""
        self.program("advance")

        def need(program: Any) -> int:
            sizes = program.memory_analysis()
            return int(
                sizes.argument_size_in_bytes
                + sizes.output_size_in_bytes
                + sizes.temp_size_in_bytes
                - sizes.alias_size_in_bytes
            )

        assert self._programs is not None
        waiting = num_bytes(self._state_shapes) // self.num_devices
        return max(need(program) for program in self._programs.values()), waiting

    def _trace(self) -> dict[str, Any]:
        shapes = self.shapes
        rows = self.num_devices * shapes.width

        def spread(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=self.sharded)

        def everywhere(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated)

        key, data = jax.tree.map(everywhere, (shapes.key, shapes.data))
        inputs = {
            "points": jax.tree.map(spread, dict(shapes.point)),
            "live": spread(np.zeros(1, bool)),
            "key": key,
        }
        if shapes.independent:
            inputs["key"] = jax.ShapeDtypeStruct(
                (rows, *key.shape), key.dtype, sharding=self.sharded
            )
        numbers = everywhere(np.zeros(len(Numbers._fields), np.int32))
        traced = {}
        weights, chunk = None, shapes.chunk
        if self._shares_weights:
            traced["weights"] = jax.jit(self._weights, keep_unused=True).trace(shapes.key)
            weights = jax.tree.map(everywhere, traced["weights"].out_info)
        if self._shared_batch is not None:
            gather = jax.jit(self._gather, out_shardings=self._chunk_sharding, keep_unused=True)
            traced["gather"] = gather.trace(data, key, numbers)
            chunk = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                traced["gather"].out_info,
                self._chunk_sharding,
            )
        self._chunk_shapes = chunk
        begin = self._over_devices(self._begin, (self._inputs_spec, P(), P()))
        to_begin = (inputs, numbers, weights)
        traced["begin"] = begin.trace(*to_begin)
        states = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharded),
            traced["begin"].out_info,
        )
        self._state_shapes = states
        advance = self._over_devices(
            self._advance, (P(TRIALS_AXIS), self._inputs_spec, P(), P(), P()), donate=True
        )
        to_advance = (states, inputs, data, numbers, chunk)
        traced["advance"] = advance.trace(*to_advance)
        unused = dependence.unused_names(traced["advance"], to_advance, shapes.point)
        if unused:
            unused = dependence.unused_names(traced["begin"], to_begin, unused)
        self.unused_names = unused
        return traced

    @property
    def _inputs_spec(self) -> dict[str, Any]:
        by_row = P(TRIALS_AXIS)
        return {
            "points": by_row,
            "live": by_row,
            "key": by_row if self.shapes.independent else P(),
        }

    @property
    def inputs_sharding(self) -> dict[str, Any]:
        """Where points, live rows and keys of a block on each device go."""
        mesh = self.shapes.mesh
        return {
            name: jax.sharding.NamedSharding(mesh, spec) for name, spec in self._inputs_spec.items()
        }

    def _over_devices(
        self, function: Callable[..., Any], in_specs: tuple[Any, ...], donate: bool = False
    ) -> Any:
        """A function of local rows as a program over the mesh; the result is sharded by trial."""
        return jax.jit(
            jax.shard_map(
                function,
                mesh=self.shapes.mesh,
                in_specs=in_specs,
                out_specs=P(TRIALS_AXIS),
                axis_names={TRIALS_AXIS},
                check_vma=False,
            ),
            donate_argnums=(0,) if donate else (),
            keep_unused=True,
        )

    # Batches that all trials of a seed share -----------------------------------------------------

    def _shared_batches(self, point: Any) -> Callable[..., Any] | None:
        """``make(data, key, step) -> batch`` with a batch key, where all trials share batches."""
        shapes = self.shapes
        self._gathered_steps: int | None = None
        if shapes.chunk is not None or shapes.independent:
            return None
        key = shapes.key
        make = shared_batches(self.stepper, point, shapes.data, key)
        if make is None:
            return None
        batch = jax.eval_shape(make, shapes.data, key, jnp.int32(0))
        fitting = MAX_GATHERED_BYTES // max(num_bytes(batch), 1)
        length = loop.steps_per_chunk()
        steps = min(GATHERED_STEPS, fitting // length * length)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), batch)
        warn_of_whole_batches(shapes.mesh, one)
        if steps < length:
            return None
        self._gathered_steps = steps
        self._chunk_sharding = jax.tree.map(lambda leaf: chunk_sharding(shapes.mesh, leaf), one)
        return make

    def _gather(self, data: Any, key: chex.PRNGKey, numbers: chex.Array) -> Any:
        """The batches of the steps from start to stop, leading axis of steps."""
        now = Numbers(*numbers)
        make, steps = self._shared_batch, self._gathered_steps
        assert make is not None
        assert steps is not None
        if jax.default_backend() != "cpu":
            # A loop would ask the host before each step; there all are cheaper than one.
            every = now.start + jnp.arange(steps, dtype=jnp.int32)
            return jax.vmap(make, (None, None, 0))(data, key, every)
        shapes = jax.eval_shape(make, data, key, now.start)
        empty = jax.tree.map(lambda leaf: zeros((steps, *leaf.shape), leaf.dtype), shapes)

        def put(i: chex.Array, chunk: Any) -> Any:
            batch = make(data, key, now.start + i)
            return jax.tree.map(lambda batches, one: batches.at[i].set(one), chunk, batch)

        return jax.lax.fori_loop(0, now.stop - now.start, put, empty)

    # What the programs do ------------------------------------------------------------------------

    def _weights(self, key: chex.PRNGKey) -> Any:
        point = {name: jnp.asarray(values[0]) for name, values in self.shapes.point.items()}
        return self.stepper.weights(point, key)

    def _lengths(self, now: Numbers) -> Lengths:
        own = self.shapes.num_steps
        return Lengths(now.num_steps if own is None else own, now.eval_every)

    def _keys(self, inputs: Any) -> tuple[chex.PRNGKey, int | None]:
        """The trials' keys and their axis of rows; None where all share one."""
        own = self.shapes.independent
        return (self._rows(inputs["key"]), 0) if own else (inputs["key"], None)

    def _over_rows(self, function: Callable[..., Any], *in_axes: int | None) -> Callable[..., Any]:
        """A function of one trial over a block's rows."""
        if self.shapes.width == 1:
            # No vmap at all: a batch of one is not the same program.
            return function
        return jax.vmap(function, in_axes)

    def _rows(self, tree: Any) -> Any:
        """The local rows; that of a block of one trial is the trial itself."""
        return jax.tree.map(lambda leaf: leaf[0], tree) if self.shapes.width == 1 else tree

    def _local(self, tree: Any) -> Any:
        """What `_rows` took apart."""
        return jax.tree.map(lambda leaf: leaf[None], tree) if self.shapes.width == 1 else tree

    def _begin(self, inputs: Any, numbers: chex.Array, weights: Any) -> TrialState:
        now, shapes = Numbers(*numbers), self.shapes
        own, by_row = self._keys(inputs)

        def one(point: Any, live: chex.Array, key: chex.PRNGKey) -> TrialState:
            state = self.stepper.begin(
                point,
                key,
                shapes.data,
                self._lengths(now),
                shapes.num_evals,
                self._chunk_shapes,
                weights,
            )
            # A row that holds no trial counts as broken: nothing is spent on it.
            broken = jnp.where(live, state.infeasible_step, 0)
            return state._replace(point=None, key=None, infeasible_step=broken)

        over = self._over_rows(one, 0, 0, by_row)
        points, live = self._rows((inputs["points"], inputs["live"]))
        states: TrialState = self._local(over(points, live, own))
        return states

    def _advance(
        self,
        states: TrialState,
        inputs: Any,
        data: Any,
        numbers: chex.Array,
        chunk: Any,
    ) -> TrialState:
        now = Numbers(*numbers)
        lengths = self._lengths(now)
        points = self._rows(inputs["points"])
        own, by_row = self._keys(inputs)

        def update_one(state: TrialState, point: Any, key: Any, step: Any, active: Any) -> Any:
            state = state._replace(point=point, key=key)
            state = self.stepper.update(state, data, lengths, step, chunk, now.start, active)
            return state._replace(point=None, key=None)

        def record_one(state: TrialState, point: Any, key: Any, index: Any) -> Any:
            state = state._replace(point=point, key=key)
            state = self.stepper.record(state, data, lengths, index)
            return state._replace(point=None, key=None)

        update = self._over_rows(update_one, 0, 0, by_row, None, None)
        record = self._over_rows(record_one, 0, 0, by_row, None)
        trained: TrialState = self._local(
            loop.advance(
                lambda state, step, active: update(state, points, own, step, active),
                lambda state, index: record(state, points, own, index),
                self._rows(states),
                lengths,
                now.start,
                now.stop,
                stops_when_dead=True,
            )
        )
        return trained


class Outline(NamedTuple):
    """What is known of functions before a program of them is traced.

    Attributes:
      weights: shapes of (params, model_state).
      width: trials that are trained side by side, by size of a step.
    """

    weights: Any
    width: int


# Found again -----------------------------------------------------------------------------------


def find(
    held: dict[Hashable, Any],
    make_stepper: Callable[[], Stepper],
    functions: tuple[Any, ...],
    keeps: bool,
    shapes: Shapes,
) -> Programs:
    """The programs of these functions and shapes, traced before or now.

    Args:
      held: programs that are kept from being forgotten, to which these are added.
      make_stepper: makes the stepper.
      functions: what it is made of: workload, make_optimizer, make_schedule.
      keeps: whether it keeps the weights of the best evaluation.
      shapes: what to compile for.

    Returns:
      The programs, not compiled yet if they are new.
    """
    found: Programs = _kept(
        _sets,
        (functions, keeps, shapes.mesh, shapes.width, shapes.num_evals, shapes.independent),
        (shapes.num_steps, shapes.point, shapes.key, shapes.data, shapes.chunk),
        lambda: Programs(make_stepper(), shapes),
        held,
    )
    return found


def outline(functions: tuple[Any, ...], arrays: Any, make: Callable[[], Outline]) -> Outline:
    """What `make` makes, or what it made of the same functions and shapes before.

    Args:
      functions: workload, make_optimizer, make_schedule.
      arrays: arguments, for their shapes.
      make: traces the functions.

    Returns:
      The outline.
    """
    found: Outline = _kept(_outlines, functions, arrays, make)
    return found


def _kept(
    cache: collections.OrderedDict[Hashable, Any],
    values: Any,
    arrays: Any,
    make: Callable[[], Any],
    held: dict[Hashable, Any] | None = None,
) -> Any:
    """What `make` makes, kept for equal values, shapes and settings if they have an identity."""
    try:
        known = (identity.identity(*values, skip=_not_traced), _told(arrays), _settings())
    except identity.NoIdentity:
        return make()
    with _lock:
        found = cache.get(known) or (held or {}).get(known)
        found = make() if found is None else found
        cache[known] = found
        if held is not None:
            held[known] = found
        cache.move_to_end(known)
        while len(cache) > MAX_SETS:
            cache.popitem(last=False)
    return found


def digest_of(functions: tuple[Any, ...]) -> str | None:
    """What the user's functions are made of, whatever the versions that trace them.

    Args:
      functions: workload, make_optimizer, make_schedule.

    Returns:
      A digest; None if something in them could change unseen.
    """
    return identity.digest(*functions, skip=_not_traced)


def forget() -> None:
    """Drops all compiled programs."""
    with _lock:
        for cache in (_sets, _outlines, _compiled):
            cache.clear()


def _not_traced(value: Any) -> tuple[str, ...]:
    """The fields of a workload that no program is traced from; of data the shapes count."""
    if isinstance(value, Workload):
        return ("data", "host_batches", "version", "evaluate_test", "test_data")
    return ()


def _told(tree: Any) -> Hashable:
    """Structure, shapes and dtypes of a pytree."""
    leaves, structure = jax.tree.flatten(tree)
    told = [(np.shape(leaf), str(getattr(leaf, "dtype", leaf))) for leaf in leaves]
    return structure, tuple(told)


def _settings() -> Hashable:
    """What else a trace depends on."""
    names = "enable_x64 default_matmul_precision disable_jit default_prng_impl"
    names += " threefry_partitionable numpy_dtype_promotion numpy_rank_promotion"
    return tuple(jax.config.values[f"jax_{name}"] for name in names.split())


def _compile(traced: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The programs, those that are not there yet compiled side by side."""
    lowered = {name: one.lower() for name, one in traced.items()}
    place = f"{mesh.devices.shape}{[device.id for device in mesh.devices.flat]}"
    # No argument is left out of the text, so that equal texts take equal arguments; how they are
    # nested it does not say.
    digests = {}
    for name, one in lowered.items():
        nested = f"{one.in_tree}\n{one.out_tree}"
        text = f"{name}\n{place}\n{nested}\n{one.as_text()}"
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    missing = [name for name in lowered if digests[name] not in _compiled]
    # The longest first, and no more at a time than there are cores.
    missing.sort(key=lambda name: ("advance", "weights", "gather", "begin").index(name))
    if missing:
        devices.use_default_cache()
        num_threads = min(len(missing), devices.num_cores())
        with progress.stage("compiling"):
            programs = side_by_side(
                lambda name: lowered[name].compile(_options(name)), missing, num_threads
            )
        _compiled.update(zip((digests[name] for name in missing), programs, strict=True))
    found = {}
    for name, digest in digests.items():
        found[name] = _compiled[digest]
        _compiled.move_to_end(digest)
    while len(_compiled) > MAX_COMPILED:
        _compiled.popitem(last=False)
    return found


def side_by_side(function: Callable[[_T], _R], items: Sequence[_T], num_threads: int) -> list[_R]:
    """A function of each item, in threads that are left to themselves when this one must go.

    Nothing ends a compilation, and the threads of an executor are waited for, if not at the end of
    its block then at that of the interpreter: Ctrl-C would take as long as the compiler does.

    Args:
      function: called in the threads, items in order.
      items: what for.
      num_threads: how many threads.

    Returns:
      The results, in the order of the items.

    Raises:
      KeyboardInterrupt, SystemExit: from a signal's handler, at once.
      Exception: the first that `function` raised, once no thread is at work any more.
    """
    results: list[concurrent.futures.Future[_R]] = [concurrent.futures.Future() for _ in items]
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        numbers.put(number)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                number = numbers.get_nowait()
            except queue.Empty:
                return
            try:
                results[number].set_result(function(items[number]))
            except BaseException as error:  # Raised again in the thread that waits.
                results[number].set_exception(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        while concurrent.futures.wait(results, _CHECK_SECONDS).not_done:
            pass
    except BaseException as error:
        stopped.set()
        signals.leave_behind(threads, error)
        raise
    return [result.result() for result in results]


def _options(name: str) -> dict[str, Any] | None:
    """What runs once for a seed or a block is optimized less, which compiles faster."""
    once = name in ("weights", "begin") and jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 1} if once else None


# Pieces ----------------------------------------------------------------------------------------


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Zeros, also of random keys that a batch may carry."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        like = jax.eval_shape(lambda: jax.random.key_data(jnp.empty((), dtype)))
        impl = jax.random.key_impl(jnp.empty((), dtype))
        return jax.random.wrap_key_data(jnp.zeros((*shape, *like.shape), like.dtype), impl=impl)
    return jnp.zeros(shape, dtype)


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed random keys."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def is_cut(mesh: jax.sharding.Mesh, leaf: Any) -> bool:
    """Whether a leaf of batches, with a leading axis of steps, is cut over the data axis."""
    has_examples = leaf.ndim > 1 and not is_key(leaf)
    size = mesh.shape.get(DATA_AXIS, 1)
    return bool(size > 1 and has_examples and leaf.shape[1] % size == 0)


def chunk_sharding(mesh: jax.sharding.Mesh, leaf: Any) -> jax.sharding.NamedSharding:
    """Of a leaf of batches, with a leading axis of steps."""
    spec = P(None, DATA_AXIS) if is_cut(mesh, leaf) else P()
    return jax.sharding.NamedSharding(mesh, spec)


def warn_of_whole_batches(mesh: jax.sharding.Mesh, chunk: Any) -> None:
    """Warns where no leaf of the batches can be cut over a mesh's second axis."""
    size = mesh.shape.get(DATA_AXIS, 1)
    leaves = jax.tree.leaves(chunk)
    if size > 1 and not any(is_cut(mesh, leaf) for leaf in leaves):
        lengths = sorted({leaf.shape[1] for leaf in leaves if leaf.ndim > 1})
        warnings.warn(
            f"batches of {lengths} examples are not cut over the {size} devices of the mesh's "
            "second axis, which do not divide them: each computes them whole. Choose another "
            "batch size or mesh.",
            UserWarning,
            stacklevel=5,
        )
