"""Random keys: which fold of the study's key serves what."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from playbook_optax import _checks, _portable

# Folds of the study's key: training and points never share a stream.
_TRAINING_STREAM, _POINT_STREAM = 0, 1
# Folds of a trial's key.
_INIT_STREAM, _BATCH_STREAM, _LOSS_STREAM, EVALUATION_STREAM = 0, 1, 2, 3


@_checks.named_arguments
def trial_key(key: chex.PRNGKey, seed: chex.Numeric = 0, trial: Any = None) -> chex.PRNGKey:
    """The key that `run_study` trains with.

    By default all trials of a seed share initialization and batches (common random numbers), which
    makes their comparison fairer and needs one gather of data for all.

    Args:
      key: the study's key.
      seed: which repetition, int scalar.
      trial: the trial's index for independent randomness, or None to share it.

    Returns:
      A key.

    Raises:
      ValueError: `key` is not a single random key.

    Example:
      >>> import jax
      >>> import playbook_optax as pbx
      >>> key = jax.random.key(0)
      >>> bool(pbx.trial_key(key) == pbx.trial_key(key, seed=1))
      False

    Source: playbook, "Where can I find an implementation of quasi-random search?" (a study is
    reproducible from its key).
    """
    check_key("key", key)
    folded = jax.random.fold_in(jax.random.fold_in(key, _TRAINING_STREAM), seed)
    return folded if trial is None else jax.random.fold_in(folded, trial)


def points_key(key: chex.PRNGKey) -> chex.PRNGKey:
    """The key that a study samples its points with: another fold than training."""
    check_key("key", key)
    return jax.random.fold_in(key, _POINT_STREAM)


def describe_key(key: chex.PRNGKey) -> dict[str, Any]:
    """A key as JSON holds it.

    Args:
      key: a random key, typed or raw.

    Returns:
      ``impl``, None of a raw key, and ``data``, its numbers.
    """
    sent = _portable.send_key(key)
    return {"impl": sent.impl, "data": sent.data.tolist()}


def check_key(name: str, key: Any) -> None:
    """Raises unless `key` is one random key, typed or a raw uint32 pair."""
    is_array = isinstance(key, jax.Array)
    typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = is_array and key.dtype == jnp.uint32 and key.ndim == 1
    if not (typed and key.ndim == 0) and not raw:
        raise _checks.ArgumentTypeError(
            f"{name} must be one random key such as jax.random.key(0), got {key!r}."
        )


def init_key(trial_key: chex.PRNGKey) -> chex.PRNGKey:
    """The key that a trial is initialized with."""
    return jax.random.fold_in(trial_key, _INIT_STREAM)


def batch_key(trial_key: chex.PRNGKey) -> chex.PRNGKey:
    """The key that a trial's batches are made with, together with the step."""
    return jax.random.fold_in(trial_key, _BATCH_STREAM)


def loss_key(trial_key: chex.PRNGKey, step: chex.Numeric) -> chex.PRNGKey:
    """The key of a step's loss."""
    return jax.random.fold_in(jax.random.fold_in(trial_key, _LOSS_STREAM), step)


def evaluation_key(trial_key: chex.PRNGKey) -> chex.PRNGKey:
    """The key of all evaluations of a trial, which are on the same draws."""
    return jax.random.fold_in(trial_key, EVALUATION_STREAM)
