"""What a study will compute, fixed before anything runs: points, blocks, width, identity."""

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import playbook_optax
from playbook_optax import _checks, _histogram
from playbook_optax._ties import check_resolution
from playbook_optax.records import storage, weights
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import keys
from playbook_optax.trials.stepper import Lengths, Stepper
from playbook_optax.trials.workload import Workload, resolve

# On a CPU vmap wins for small steps and loses above about 1 MFLOP (products with strided operands
# overflow the cache): models.md, "Speed of many trials". `make bench` measures both.
CPU_FLOPS_PER_STEP = 1e6
CPU_WIDTH = 8
# On an accelerator a step of one trial leaves most of it idle: models.md reckons that time doubles
# near 330 trials for steps of 5 MFLOP, near 35 for 755. `make bench` there prints the time of 512.
ACCELERATOR_WIDTHS = ((1e7, 512), (1e8, 128), (float("inf"), 64))
# The widest block that is timed where all trials side by side are tried.
MAX_TIMED_WIDTH = 512

# What must agree for a stored study to be continued, and what is only warned of.
_IDENTITY = (
    "name",
    "objective",
    "maximize",
    "num_steps",
    "eval_every",
    "num_seeds",
    "independent",
    "keep",
    "key",
    "space",
    "fixed",
    "data",
    "version",
    "x64",
    "dtypes",
    "arrays",
    "member",
)
_ENVIRONMENT = ("versions", "device_kind")
_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of a study: a space that goes on for ever, or a table that ends.

    Attributes:
      space: the search space, or None for a table.
      table: name to array (trial,), or None for a space.
      key: the key that the space is sampled with.
    """

    space: SearchSpace | None
    table: dict[str, np.ndarray] | None
    key: chex.PRNGKey

    def rows(self, trials: np.ndarray) -> dict[str, np.ndarray]:
        """The points of consecutive trials, name to array (trial,).

        Beyond the end of a table its last row is repeated: padding, which nobody sees.
        """
        if self.space is not None:
            sampled = self.space.sample(self.key, len(trials), start=int(trials[0]))
            return {name: np.asarray(values) for name, values in sampled.items()}
        assert self.table is not None
        return {
            name: values[np.minimum(trials, len(values) - 1)] for name, values in self.table.items()
        }

    def are_real(self, trials: np.ndarray) -> np.ndarray:
        """Which trials have points of their own, and are no padding: bool (trial,)."""
        if self.table is None:
            return np.ones(len(trials), bool)
        return np.asarray(trials < len(next(iter(self.table.values()))))


def make_points(
    points: SearchSpace | Mapping[str, Any], num_trials: int | None, key: chex.PRNGKey
) -> tuple[Points, int]:
    """Checks what was given as points.

    Args:
      points: a search space, or name to array (trial,).
      num_trials: how many trials to sample from a space; None for a table.
      key: the study's key.

    Returns:
      The points and their number.

    Raises:
      ValueError: no trials, arrays of different lengths, or values that are not finite numbers.
    """
    sample_key = keys.points_key(key)
    if isinstance(points, SearchSpace):
        if num_trials is None:
            raise ValueError("num_trials must be given with a SearchSpace.")
        return Points(points, None, sample_key), _checks.check_count("num_trials", num_trials)
    if not isinstance(points, Mapping) or not points:
        raise _checks.ArgumentTypeError(
            "points must be a pbx.SearchSpace or a non-empty dict of arrays (trial,), got "
            f"{type(points).__name__}."
        )
    table = {}
    for name, values in points.items():
        array = np.asarray(values)
        if array.ndim != 1 or len(array) == 0:
            raise ValueError(
                f"points[{name!r}] must have shape (trial,) with at least one trial, got "
                f"{array.shape}."
            )
        if not (
            jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        ):
            raise _checks.ArgumentTypeError(
                f"points[{name!r}] must hold numbers, got dtype {array.dtype}; use pbx.Categorical "
                "for choices."
            )
        bad = ~np.isfinite(array.astype(np.float64))
        if bad.any():
            raise ValueError(
                f"points[{name!r}] is not finite in trial {int(np.argmax(bad))}: "
                f"{array[np.argmax(bad)]}."
            )
        table[str(name)] = _checks.fitting(f"points[{name!r}]", values)
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"points have different numbers of trials: {lengths}.")
    count = next(iter(lengths.values()))
    if num_trials is not None and num_trials != count:
        raise ValueError(
            f"num_trials = {num_trials} but points hold {count} trials; leave num_trials out."
        )
    return Points(None, table, sample_key), count


class Columns:
    """The hyperparameters that a program takes, from those of a study and the fixed ones.

    Args:
      names: names in the study, and in the program where they differ.
      like: points of the study, name to array.
      fixed: name in the program to number, for what is no column of the study.
    """

    def __init__(
        self, names: Mapping[str, str], like: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> None:
        self._names = names
        taken = {names.get(name, name) for name in like}
        self.fixed = {
            name: _as_column(name, value) for name, value in fixed.items() if name not in taken
        }

    def of_program(self, points: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the program takes, name to array (trial,)."""
        own = {self._names.get(name, name): values for name, values in points.items()}
        num_rows = len(next(iter(own.values())))
        return own | {
            name: np.full(num_rows, value, value.dtype) for name, value in self.fixed.items()
        }


def _as_column(name: str, value: Any) -> np.ndarray:
    """A number in the dtype that a column of such numbers has."""
    array = _checks.fitting(f"fixed[{name!r}]", value)
    return array.astype(np.float32) if isinstance(value, float) else array


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: `trials_per_block` consecutive trials with one seed.

    Attributes:
      index: its number, which names its file.
      trials: int32 (trials_per_block,).
      seed: which repetition.
    """

    index: int
    trials: np.ndarray
    seed: int


def blocks_of(num_trials: int, num_seeds: int, width: int) -> list[Block]:
    """The blocks that cover a study; a longer study has these and more."""
    groups = -(-num_trials // width)
    return [
        Block(
            group * num_seeds + seed,
            np.arange(group * width, (group + 1) * width, dtype=np.int32),
            seed,
        )
        for group in range(groups)
        for seed in range(num_seeds)
    ]


def choose_width(
    stepper: Stepper, point: Mapping[str, Any], key: chex.PRNGKey, data: Any, batches: Any
) -> int:
    """Trials that one program trains side by side, by backend and size of a step.

    It depends on neither the number of trials nor the number of devices, because the width
    decides bits: a longer study keeps its first trials.

    Args:
      stepper: what happens to a trial.
      point: one point.
      key: a trial's key.
      data: the workload's data.
      batches: a chunk of host batches, or None.

    Returns:
      The width, 1 for one trial after another.
    """

    def gradient(point: Any, key: chex.PRNGKey, data: Any, batches: Any) -> Any:
        params, model_state = stepper.weights(point, key)
        work = resolve(stepper.workload, point)
        batch = stepper.batch(point, data, key, jnp.int32(0), batches, 0)

        def loss(params: Any) -> Any:
            return stepper.loss(work, params, model_state, batch, key)[0]

        return jax.grad(loss)(params)

    flops = product_flops(jax.make_jaxpr(gradient)(point, key, data, batches).jaxpr)
    if jax.default_backend() != "cpu":
        return next(width for most, width in ACCELERATOR_WIDTHS if flops < most)
    return CPU_WIDTH if flops < CPU_FLOPS_PER_STEP else 1


def product_flops(jaxpr: Any) -> float:
    """Floating-point operations of the products and convolutions of a jaxpr.

    XLA's own count is to be had before compiling on a CPU only.

    Args:
      jaxpr: the jaxpr; of a branch the dearest way counts, of a while loop one round.

    Returns:
      Their number, a multiplication and an addition as two.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        outputs = float(np.prod(equation.outvars[0].aval.shape)) if equation.outvars else 0.0
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * outputs * float(np.prod([shape[axis] for axis in contracted]))
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * outputs * float(np.prod(kernel)) / features
        else:
            inner = [
                [getattr(one, "jaxpr", one) for one in (value if is_many else [value])]
                for value in params.values()
                for is_many in [isinstance(value, (tuple, list))]
            ]
            costs = [
                max((product_flops(one) for one in ways if hasattr(one, "eqns")), default=0.0)
                for ways in inner
            ]
            total += params.get("length", 1) * sum(costs)
    return total


def widths_to_time(by_size: int, num_trials: int, num_devices: int) -> list[int]:
    """Widths worth timing: one trial, some, and all that a device gets.

    Args:
      by_size: what `choose_width` says.
      num_trials: trials of the study.
      num_devices: devices that train it.

    Returns:
      Widths of at most `num_trials`, ascending.
    """
    everything = min(-(-num_trials // num_devices), MAX_TIMED_WIDTH)
    some = max(by_size, CPU_WIDTH)
    return sorted({1, everything} | ({some} if some <= num_trials else set()))


def fingerprint_data(data: Any) -> str:
    """SHA-256 of the data's structure, dtypes, shapes and bytes."""
    digest = hashlib.sha256(str(jax.tree.structure(data)).encode())
    for leaf in jax.tree.leaves(data):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fingerprint_program(function: Any, *args: Any) -> str:
    """SHA-256 of a function's jaxpr, without memory addresses, and of the constants it holds."""
    closed = jax.make_jaxpr(function)(*args)
    digest = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for constant in closed.consts:
        digest.update(fingerprint_data(constant).encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions and device kind: what bits depend on beside the spec itself."""
    import jaxlib
    import optax

    return {
        "versions": {
            "playbook_optax": playbook_optax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
        },
        "device_kind": jax.local_devices()[0].device_kind,
    }


def make_spec(
    *,
    work: Workload,
    lengths: Lengths,
    eval_steps: np.ndarray,
    points: Points,
    num_trials: int,
    num_seeds: int,
    eval_every: int,
    independent: bool,
    keep: str,
    key: chex.PRNGKey,
    width: int,
    shapes: Any,
    arrays: Mapping[str, Any],
    member: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything about a study that can be written as JSON.

    Args:
      work: the workload at one point.
      lengths: how long a run is.
      eval_steps: updates done before each evaluation.
      points: where points come from.
      num_trials: number of trials.
      num_seeds: number of seeds of each.
      eval_every: updates between evaluations.
      independent: whether trials have randomness of their own.
      keep: which weights are kept.
      key: the study's key.
      width: trials per block.
      shapes: params and model_state of one trial as `jax.ShapeDtypeStruct`s.
      arrays: what a block stores, see `storage.describe_arrays`.
      member: which study of a set it is, see `study_set.member`; None if of none.

    Returns:
      The spec, without fingerprints.
    """
    trees = {
        kind: weights.describe_tree(getattr(shapes, kind))
        for kind in ("params", "model_state")
        if keep != "none"
    }
    table = points.table
    resolution = check_resolution(work.resolution, work.objective)
    dtypes = {name: str(value.dtype) for name, value in points.rows(np.arange(1)).items()}
    return {
        "name": work.name,
        "objective": work.objective,
        "maximize": work.maximize,
        "num_trials": num_trials,
        "num_seeds": num_seeds,
        "num_steps": int(lengths.num_steps),
        "eval_every": eval_every,
        "step": [int(step) for step in eval_steps],
        "independent": independent,
        "keep": keep,
        "trials_per_block": width,
        "key": keys.describe_key(key),
        "space": None if points.space is None else points.space.to_dict(),
        "points": None if table is None else {k: v.tolist() for k, v in table.items()},
        "dtypes": dtypes,
        "version": work.version,
        "norm_edges": [float(edge) for edge in _histogram.edges()],
        "trees": trees,
        "arrays": dict(arrays),
        "x64": bool(jax.config.read("jax_enable_x64")),
        **environment(),
        **({"resolution": resolution} if resolution else {}),
        **({} if member is None else {"member": dict(member)}),
    }


def check_resumable(
    stored: Mapping[str, Any],
    spec: Mapping[str, Any],
    directory: Any,
    accept_changed_program: bool = False,
) -> None:
    """Raises when a stored study is another one, and warns when its bits may differ.

    What a study is (workload, optimizer, space, lengths, seeds) is compared apart from what may
    change its bits (versions, device). Another version of JAX traces another program of the same
    functions; then it must be the same functions, by what they are made of.

    Args:
      stored: the spec in the directory.
      spec: the spec of this call.
      directory: where it is stored, for the message.
      accept_changed_program: whether the caller vouches for the program.

    Raises:
      ValueError: they differ; every difference is named.
    """
    ours = storage.as_stored({name: spec.get(name) for name in _IDENTITY})
    before = {name: stored.get(name) for name in _IDENTITY}
    if "arrays" not in stored:  # Begun before they were recorded.
        before["arrays"] = ours["arrays"]
    differences = [
        f"{name} is {before[name]!r} there and {ours[name]!r} here"
        for name in _IDENTITY
        if before[name] != ours[name]
    ]
    if not storage.agree_so_far(stored.get("points"), spec["points"]):
        differences.append("the points differ")
    if stored.get("trials_per_block") != spec["trials_per_block"]:
        differences.append(
            f"trials_per_block is {stored.get('trials_per_block')} there and "
            f"{spec['trials_per_block']} here, and the width decides bits (leave it out)"
        )
    changed = [name for name in _ENVIRONMENT if stored.get(name) != spec.get(name)]
    other_program = stored.get("program") != spec.get("program")
    same_code = spec.get("code") is not None and stored.get("code") == spec.get("code")
    if other_program and not accept_changed_program:
        if not changed:
            differences.append("the program differs: another model, loss, evaluation or optimizer")
        elif not same_code:
            differences.append(
                f"the program differs, and so do the {' and '.join(changed)}: another model, loss, "
                "evaluation or optimizer, or the same in other versions. If you know that it is "
                "the same, say accept_changed_program=True"
            )
    if differences:
        raise ValueError(
            f"{str(directory)!r} holds another study: {'; '.join(differences)}. Choose another "
            "directory, or make the call the same."
        )
    if changed or other_program:
        shown = [f"{name} {stored.get(name)!r}, now {spec.get(name)!r}" for name in changed]
        shown += ["another program"] * other_program
        warnings.warn(
            f"{str(directory)!r} was written with {'; '.join(shown)}: new blocks are close to, "
            "not bit-exact with, what one environment would give.",
            UserWarning,
            stacklevel=4,
        )
