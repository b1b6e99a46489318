"""Helpers on pytrees: checks that name a leaf's path, selection, finiteness, a safe norm."""

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


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether every element of every floating-point leaf is finite: boolean scalar, shape ()."""
    finite = jnp.asarray(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> Any:
    """Each leaf in the dtype of the leaf of `like` in the same place."""
    return jax.tree.map(lambda leaf, ref: leaf.astype(jnp.result_type(ref)), tree, like)


def moment_dtype(dtype: Any) -> Any:
    """The dtype for moments and norms of leaves of `dtype`: float32 or better (law 5)."""
    return jnp.promote_types(dtype, jnp.float32)


def global_norm(tree: chex.ArrayTree) -> chex.Array:
    """The Euclidean norm over all leaves, in float32 or better, safe from over- and underflow.

    The leaves are scaled by their largest magnitude first, so that a finite tree has a finite norm
    unless the norm itself exceeds the dtype. A non-finite leaf gives a non-finite norm.

    Args:
      tree: pytree of floating-point arrays.

    Returns:
      Scalar, shape (), 0 for an empty tree.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    if not leaves:
        return jnp.zeros((), jnp.float32)
    dtype = moment_dtype(jnp.result_type(*leaves))
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in leaves]))
    # A zero tree divides by 1; an infinite one would give inf/inf, so it keeps scale 1 as well.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones((), dtype))
    total = sum(jnp.sum(jnp.square(leaf.astype(dtype) / scale)) for leaf in leaves)
    return jnp.sqrt(total) * scale
