"""Checks of training arrays and the batches drawn from them, for `Workload.from_arrays`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks, _tree

_HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_ROUNDS = 6
# Folded into a batch's key for its augmentation: no epoch has this number.
_AUGMENT_STREAM = 2**31 - 1


def check_split(name: str, split: Any, *, labels: str) -> dict[str, np.ndarray]:
    """Checks one set of examples and brings it to the dtypes of the device.

    Args:
      name: the argument's name: ``train``, ``valid`` or ``test``.
      split: a pair (x, y) of arrays that share their first axis.
      labels: ``"class"`` for integer class labels, ``"target"`` for real targets, ``"any"``
        otherwise.

    Returns:
      ``{"x": (example, ...), "y": (example, ...)}`` as NumPy arrays, 64-bit numbers as 32-bit ones
      unless JAX has x64 enabled.

    Raises:
      ValueError: empty, of different lengths, not finite, or out of the 32-bit range.
    """
    if not isinstance(split, (tuple, list)) or len(split) != 2:
        raise ValueError(f"{name} must be a pair (x, y) of arrays, got {type(split).__name__}.")
    for part_name, part in zip(("x", "y"), split, strict=True):
        if np.ma.is_masked(part):
            raise ValueError(f"{name} {part_name} is masked in places; drop or impute those rows.")
    x, y = (np.asarray(part) for part in split)
    for part_name, part in (("x", x), ("y", y)):
        if part.ndim == 0 or part.dtype == object:
            raise ValueError(
                f"{name} {part_name} must be an array with a first axis of examples, got shape "
                f"{part.shape} and dtype {part.dtype}."
            )
    if len(x) != len(y):
        raise ValueError(f"{name}: x has {len(x)} examples but y has {len(y)}.")
    if len(x) == 0:
        raise ValueError(f"{name} holds no example; give at least one.")
    if labels == "class":
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"{name} y must hold integer class labels for a softmax loss, got dtype {y.dtype}."
            )
        if y.min() < 0:
            row = int(np.argmax(y.reshape(len(y), -1).min(axis=1) < 0))
            raise ValueError(
                f"{name} y holds the label {y.min()} (first in row {row}); class labels start at 0."
            )
    return {
        "x": _to_device_dtype(f"{name} x", x),
        "y": _to_device_dtype(f"{name} y", y),
    }


def _to_device_dtype(name: str, array: np.ndarray) -> np.ndarray:
    """Narrows 64-bit numbers as JAX would, but not silently when values do not fit."""
    if jnp.issubdtype(array.dtype, jnp.inexact):  # bfloat16 and its like among them.
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{name} has {int(bad.sum())} of {len(array)} rows with NaN or infinity, the first "
                f"is row {int(np.argmax(bad))}; drop or impute them."
            )
    if jax.config.read("jax_enable_x64"):
        return array
    if array.dtype in (np.int64, np.uint64, np.uint32):
        info = np.iinfo(np.int32)
        if array.size and (array.min() < info.min or array.max() > info.max):
            raise ValueError(
                f"{name} is {array.dtype} and holds values outside int32 "
                f"[{array.min()}, {array.max()}]; they would wrap around."
            )
        return array.astype(np.int32)
    return _checks.fitting(name, array)


def warn_shared_rows(train: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]) -> None:
    """Warns when examples of the training set stand in the validation set as well."""

    def rows(split: Mapping[str, np.ndarray]) -> list[bytes]:
        x = np.ascontiguousarray(split["x"])
        return [row.tobytes() for row in x.reshape(len(x), -1)]

    if train["x"].shape[1:] != valid["x"].shape[1:] or train["x"].dtype != valid["x"].dtype:
        return
    shared = set(rows(train)) & set(rows(valid))
    if shared:
        count = sum(row in shared for row in rows(valid))
        warnings.warn(
            f"{count} of {len(valid['x'])} validation examples also stand in the training set; "
            "the validation error will be too good.",
            UserWarning,
            stacklevel=3,
        )


def check_labels_below(name: str, y: np.ndarray, num_classes: int) -> None:
    """Raises when a label has no logit; JAX would clamp it to the last class silently."""
    if y.size and y.max() >= num_classes:
        row = int(np.argmax(y.reshape(len(y), -1).max(axis=1) >= num_classes))
        raise ValueError(
            f"{name} y holds the label {int(y.max())} (first bad row {row}), but the model gives "
            f"{num_classes} logits, for labels 0 to {num_classes - 1}."
        )


def check_indices(name: str, forward: Callable[[Any], Any], x: np.ndarray, batch_size: int) -> None:
    """Raises when integer inputs index past the end of an array of the model.

    JAX clamps such an index or fills with NaN, silently. The model is run once over the examples
    with its index checks on; only integer inputs need it.

    Args:
      name: what to call the examples.
      forward: examples (batch, ...) to outputs.
      x: integer examples, shape (example, ...).
      batch_size: examples at a time.

    Raises:
      ValueError: an index is out of range.
    """
    from jax.experimental import checkify  # Only integer inputs pay for this import.

    checked = jax.jit(checkify.checkify(forward, errors=checkify.index_checks))
    for start in range(0, len(x), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(x) - 1)
        error, _ = checked(x[rows])
        message = error.get()
        if message is not None:
            raise ValueError(
                f"{name} x holds an index that the model cannot look up, in rows {start} to "
                f"{min(start + batch_size, len(x)) - 1}: {message.splitlines()[0]} JAX would clamp "
                "or fill it silently."
            )


def shuffled_rows(
    key: chex.PRNGKey, step: chex.Numeric, num_examples: int, batch_size: int
) -> chex.Array:
    """The rows of one batch: epochs shuffled without replacement, the last partial batch dropped.

    A pseudo-random permutation (a Feistel network over a rectangle that just covers the rows, with
    cycle walking) is evaluated at the batch's positions only, so that a step costs the batch and
    not the data set, and needs no state.

    Args:
      key: one key for the whole run.
      step: 0-based update, int32 scalar; may be traced.
      num_examples: examples in the set.
      batch_size: examples in a batch, at most `num_examples`.

    Returns:
      int32 row numbers, shape (batch_size,), distinct within an epoch.
    """
    batches = num_examples // batch_size
    step = jnp.asarray(step, jnp.int32)
    epoch, position = step // batches, step % batches
    bits = jax.random.bits(jax.random.fold_in(key, epoch), (_ROUNDS,), jnp.uint32)
    height = int(np.ceil(np.sqrt(num_examples)))
    width = -(-num_examples // height)

    def permute(index: chex.Array) -> chex.Array:
        left, right = index // width, index % width
        for number in range(_ROUNDS):
            if number % 2 == 0:
                left = (left + _mix(right, bits[number]) % height) % height
            else:
                right = (right + _mix(left, bits[number]) % width) % width
        return left * width + right

    start = (position * batch_size).astype(jnp.uint32)
    index = start + jnp.arange(batch_size, dtype=jnp.uint32)
    outside = jnp.uint32(num_examples)
    rows = jax.lax.while_loop(
        lambda i: jnp.any(i >= outside),
        lambda i: jnp.where(i >= outside, permute(i), i),
        permute(index),
    )
    return rows.astype(jnp.int32)


def augment_key(key: chex.PRNGKey, step: chex.Numeric) -> chex.PRNGKey:
    """The key of a step's augmentation, from the one that `shuffled_rows` takes."""
    return jax.random.fold_in(jax.random.fold_in(key, _AUGMENT_STREAM), step)


def _mix(value: chex.Array, key: chex.Array) -> chex.Array:
    """A 32-bit integer hash of `value` under `key`; uint32 arithmetic wraps around."""
    value = value + key
    for multiplier in _HASH_MULTIPLIERS:
        value = (value ^ (value >> 16)) * jnp.uint32(multiplier)
    return value ^ (value >> 16)


def evaluate_in_batches(
    fn: Callable[[Any], chex.ArrayTree], data: chex.ArrayTree, batch_size: int
) -> Any:
    """Averages per-example values over a set that is too large for one batch.

    The last batch is padded with copies of the last example, and what it gives for them is left
    out, not multiplied by zero: a NaN there does not spread.

    Args:
      fn: maps a batch (leaves of shape (batch_size, ...)) to a pytree of per-example values, each
        of shape (batch_size,).
      data: pytree of arrays, shape (example, ...).
      batch_size: examples at a time.

    Returns:
      The means over all examples: a pytree like the output of `fn`, float scalars.

    Raises:
      ValueError: `data` is empty, its leaves differ in length, or `fn` does not return one value
        per example.

    Example:
      >>> import jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> data = {"x": jnp.arange(5.0)}
      >>> means = pbx.evaluate_in_batches(lambda b: {"square": b["x"] ** 2}, data, batch_size=2)
      >>> float(means["square"])
      6.0

    Source: playbook, "Deciding how long to train when training is not compute-bound".
    """
    batch_size = _checks.check_count("batch_size", batch_size)
    leaves = jax.tree.leaves(data)
    lengths = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(lengths) != 1 or lengths == {()} or lengths == {(0,)}:
        raise ValueError(
            "data must hold arrays that share a non-empty first axis of examples, got shapes "
            f"{[jnp.shape(leaf) for leaf in leaves]}."
        )
    (num_examples,) = lengths.pop()
    batch_size = min(batch_size, num_examples)
    num_batches = -(-num_examples // batch_size)

    def values(number: chex.Numeric) -> Any:
        index = number * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        rows = jnp.minimum(index, num_examples - 1)
        # One batch that holds the whole set needs no gather.
        whole = batch_size == num_examples
        batch = data if whole else jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)
        per_example = fn(batch)

        def total(path: Any, value: Any) -> chex.Array:
            if jnp.shape(value) != (batch_size,):
                raise ValueError(
                    f"fn must return one value per example, shape ({batch_size},), got "
                    f"{jnp.shape(value)} at {jax.tree_util.keystr(path) or 'its output'}."
                )
            value = value.astype(_tree.moment_dtype(value.dtype))
            return jnp.sum(jnp.where(index < num_examples, value, jnp.zeros_like(value)))

        return jax.tree_util.tree_map_with_path(total, per_example)

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(values, jnp.int32(0))
    )
    totals = jax.lax.fori_loop(
        0,
        num_batches,
        lambda number, sums: jax.tree.map(jnp.add, sums, values(number)),
        zeros,
    )
    return jax.tree.map(lambda total: total / num_examples, totals)
