"""Helpers on pytrees: checks that name a leaf's path, selection, finiteness, a safe norm."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as people write it: ``layers/0/kernel``; ``(root)`` for a bare leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def check_params(params: chex.ArrayTree, *, what: str = "params") -> None:
    """Checks that every leaf is a floating-point array, so that a gradient step makes sense.

    `None` leaves and zero-size leaves are legal.

    Args:
      params: a pytree.
      what: its name, for the message.

    Raises:
      ValueError: a leaf is not an array, or has an integer, boolean or complex dtype.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, jax.ShapeDtypeStruct)):
            raise ValueError(
                f"{what} leaf {path_name(path)!r} is not an array but {leaf!r} of type "
                f"{type(leaf).__name__}. Keep only arrays in {what}; close over the rest."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what} leaf {path_name(path)!r} has dtype {dtype}, which has no gradient. Mask "
                f"it (optax.masked), or keep it outside {what}, in the model state."
            )


def check_matching(updates: chex.ArrayTree, reference: chex.ArrayTree, *, what: str) -> None:
    """Checks that the gradients have the structure and shapes that the state was made for.

    Args:
      updates: the gradients.
      reference: parameters or moments, shape for shape.
      what: what `reference` is, for the message.

    Raises:
      ValueError: structure or a leaf's shape differs; the path is named.
    """
    got = jax.tree_util.tree_leaves_with_path(updates)
    want = jax.tree_util.tree_leaves_with_path(reference)
    if len(got) != len(want):
        mine, theirs = {path_name(p) for p, _ in got}, {path_name(p) for p, _ in want}
        raise ValueError(
            f"The gradients do not have the structure of {what}: only in the gradients "
            f"{sorted(mine - theirs)}, only in {what} {sorted(theirs - mine)}."
        )
    for (path, leaf), (_, ref) in zip(got, want, strict=True):
        if jnp.shape(leaf) != jnp.shape(ref):
            raise ValueError(
                f"Gradient leaf {path_name(path)!r} has shape {jnp.shape(leaf)} but {what} has "
                f"{jnp.shape(ref)} there; JAX would broadcast it silently."
            )


def select(predicate: chex.Array, on_true: chex.ArrayTree, on_false: chex.ArrayTree) -> Any:
    """`jnp.where` leaf by leaf; unlike a product with 0 it keeps NaN of the other side out.

    Args:
      predicate: boolean scalar, shape ().
      on_true: pytree of arrays.
      on_false: pytree of the same structure, shapes and dtypes.

    Returns:
      A pytree like `on_true`.
    """
    return jax.tree.map(lambda a, b: jax.lax.select(_spread(predicate, a), a, b), on_true, on_false)


def _spread(predicate: chex.Array, like: chex.Array) -> chex.Array:
    return jnp.broadcast_to(predicate, jnp.shape(like))


def reached(jaxpr: Any, sources: set[Any], ends: tuple[str, ...] = ()) -> set[Any]:
    """The variables of a jaxpr that depend on the `sources` among its inputs, with them.

    Args:
      jaxpr: a jaxpr.
      sources: some of its input variables.
      ends: names of primitives whose results count as independent.

    Returns:
      The variables; an operation with inner jaxprs counts as one that mixes all its inputs.
    """
    found = set(sources)
    for equation in jaxpr.eqns:
        # A literal has a value and no identity.
        inputs = [v for v in equation.invars if not hasattr(v, "val")]
        if equation.primitive.name not in ends and any(v in found for v in inputs):
            found.update(equation.outvars)
    return found


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> Any:
    """Each leaf in the dtype of the leaf of `like` in the same place."""
    return jax.tree.map(lambda leaf, ref: leaf.astype(jnp.result_type(ref)), tree, like)


def moment_dtype(dtype: Any) -> Any:
    """The dtype for moments and norms of leaves of `dtype`: float32 or better (law 5).

    Said outright, because JAX promotes neither 8-bit floats nor, if it is strict, anything.
    """
    dtype = jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def widest_moment_dtype(*leaves: Any) -> Any:
    """The dtype that holds the moments of all leaves; float32 of none."""
    dtypes = [moment_dtype(jnp.result_type(leaf)) for leaf in leaves]
    return np.result_type(np.float32, *dtypes)


def owned(value: Any, dtype: Any) -> chex.Array:
    """A number for a state: an array of its own, which may be donated when the caller's may not."""
    return jnp.array(value, dtype, copy=True)


# A sum is cut into this many rows that are added element by element (vectorized, and pairwise, so
# more accurate), and a product with ones adds up the rest; XLA's own reduction of a scaled square
# on a CPU is one scalar addition after another. Small leaves are not worth the extra operations.
_FOLDS = 8
_FOLD_FROM_SIZE = 128
# In a model of many leaves those up to this size are joined first: it would otherwise spend more
# time in compiling these sums than in compiling its own layers. Copies of more, or of few leaves,
# are not worth it: clipping ten layers of 64 x 64 takes twice the time if they are joined
# (`python -m benchmarks.transforms`), and a step of a small MLP a tenth more.
_JOIN_TO_SIZE = 512
_JOIN_FROM_LEAVES = 16


def _joined(leaves: list[chex.Array]) -> list[chex.Array]:
    """Many leaves with small ones of one dtype as one flat array; sharded ones stay as they are."""
    if len(leaves) < _JOIN_FROM_LEAVES:
        return leaves
    alone, small = [], collections.defaultdict(list)
    for leaf in leaves:
        if leaf.size > _JOIN_TO_SIZE or any(jax.typeof(leaf).sharding.spec):
            alone.append(leaf)
        else:
            small[leaf.dtype].append(leaf.reshape(-1))
    return alone + [jnp.concatenate(group) for group in small.values()]


def _folded(leaf: chex.Array, function: Callable[[chex.Array], chex.Array]) -> list[chex.Array]:
    """Flat arrays whose elements add up to the sum of an elementwise function of a leaf."""
    if leaf.size < _FOLD_FROM_SIZE:
        return [function(leaf).reshape(-1)]
    # Each row is cut out before the function is applied: its values would be stored otherwise.
    flat = leaf.reshape(-1)
    width = flat.size // _FOLDS
    rows = [function(flat[i * width : (i + 1) * width]) for i in range(_FOLDS)]
    while len(rows) > 1:
        rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    rest = flat[_FOLDS * width :]
    return [rows[0], function(rest)] if rest.size else rows


def _sums(
    leaves: list[chex.Array], *functions: Callable[[chex.Array], chex.Array]
) -> list[chex.Array]:
    """Sums of elementwise functions over all elements of all leaves: scalars, shape ()."""
    sharded = any(any(jax.typeof(leaf).sharding.spec) for leaf in leaves)
    if jax.default_backend() != "cpu" or sharded:
        # On an accelerator a reduction is fast, and fuses with what makes its input.
        return [
            functools.reduce(jnp.add, [jnp.sum(function(leaf)) for leaf in leaves])
            for function in functions
        ]
    columns = []
    for leaf in leaves:
        parts = [_folded(leaf, function) for function in functions]
        columns += [jnp.stack(same) for same in zip(*parts, strict=True)]
    # One product for all, because each costs more to compile than it takes in a step. Without the
    # barriers XLA would compute the parts element by element in their concatenation, and take the
    # product apart again.
    columns = list(jax.lax.optimization_barrier(tuple(columns)))
    whole = jax.lax.optimization_barrier(jnp.concatenate(columns, axis=1))
    return list(jnp.dot(whole, jnp.ones((whole.shape[1],), whole.dtype)))


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether every element of every floating-point leaf is finite: boolean scalar, shape ()."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    leaves = _joined([leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)])
    if not leaves:
        return jnp.asarray(True)
    # 0 * x is 0 if x is finite and NaN if not, and a sum is quicker than a conjunction.
    wide = widest_moment_dtype(*leaves)
    (total,) = _sums(leaves, lambda part: (part * 0).astype(wide))
    return jnp.isfinite(total)


def scaled_global_norm(tree: chex.ArrayTree) -> tuple[chex.Array, chex.Array]:
    """The Euclidean norm over all leaves as a pair (norm * scale, scale) that cannot overflow.

    Squares are summed at two powers of two at once, which costs one pass over the leaves and not
    two that wait for each other. The first scale is exact for norms from about 1e-17 to 1e13
    (float32), the second above that; elements below about 1e-25 count as zero.

    Args:
      tree: pytree of floating-point arrays with fewer than 2**30 elements.

    Returns:
      Two scalars, shape (), float32 or better. The first is finite exactly if every leaf is.
    """
    leaves = _joined([jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.size(leaf)])
    if not leaves:
        return jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    dtype = widest_moment_dtype(*leaves)
    info = jnp.finfo(dtype)
    half = info.maxexp // 2
    # 16 bits of room above for the number of elements; below, enough for all digits of the sum.
    exponents = (half - 32 - (info.nmant + 2) // 2, -half - 16)
    # Behind a barrier, because XLA turns (x * c) * (x * c) for a constant c into (x * x) * (c * c),
    # which is inf * 0 for just the gradients that this is for.
    small, large = jax.lax.optimization_barrier(
        tuple(jnp.asarray(2.0**exponent, dtype) for exponent in exponents)
    )
    at_small, at_large = (
        jnp.sqrt(total)
        for total in _sums(
            leaves,
            lambda part: jnp.square(part.astype(dtype) * small),
            lambda part: jnp.square(part.astype(dtype) * large),
        )
    )
    overflows = jnp.isinf(at_small)
    return jnp.where(overflows, at_large, at_small), jnp.where(overflows, large, small)


def global_norm(tree: chex.ArrayTree) -> chex.Array:
    """The Euclidean norm over all leaves, in float32 or better, safe from over- and underflow.

    A finite tree has a finite norm (the dtype's largest number if the norm itself exceeds it); a
    leaf that is not finite gives a norm that is not.

    Args:
      tree: pytree of floating-point arrays.

    Returns:
      Scalar, shape (), 0 for an empty tree.
    """
    return unscaled_norm(*scaled_global_norm(tree))


def unscaled_norm(norm: chex.Array, scale: chex.Array) -> chex.Array:
    """The norm itself from `scaled_global_norm`'s pair, at most the dtype's largest number."""
    largest = jnp.asarray(jnp.finfo(norm.dtype).max, norm.dtype)
    return jnp.where(jnp.isfinite(norm), jnp.minimum(norm / scale, largest), norm)
