"""The user's functions, called while tracing: errors that say what was wrong and what to do."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _checks, _tree
from playbook_optax.trials import host_state


def describe(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if hasattr(value, "shape"):
        return f"an array of shape {value.shape}"
    return f"{type(value).__name__}"


def scalar(name: str, value: Any, *, floating: bool = False) -> chex.Array:
    """A real scalar in float32 or better, or an error that names what it was."""
    if not isinstance(value, (int, float, complex, np.number, np.ndarray, jax.Array)):
        raise _checks.ArgumentTypeError(
            f"{name} must be a real scalar array, got {type(value).__name__}."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {shape}; take its mean.")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, got dtype {dtype}; take its real part or modulus.")
    if floating and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got dtype {dtype}: it has no gradient.")
    return jnp.asarray(value).astype(_tree.moment_dtype(dtype))


def check_init(params: Any) -> None:
    """Raises unless there is something to train, and warns of low precision."""
    if not jax.tree.leaves(params):
        raise ValueError(
            "init returned empty params: there is nothing to train. A Flax model has none until it "
            "is given an input."
        )
    _tree.check_params(params)
    narrow = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)} & {
        "bfloat16",
        "float16",
    }
    if narrow:
        warnings.warn(
            f"params are {', '.join(sorted(narrow))}: updates much smaller than a weight are lost "
            "to rounding. Keep float32 params and cast inside the model.",
            UserWarning,
            stacklevel=3,
        )


def check_same(what: str, old: Any, new: Any) -> None:
    """Raises when a carried state changes its structure, a shape or a dtype."""
    before, before_tree = jax.tree_util.tree_flatten_with_path(old)
    after, after_tree = jax.tree_util.tree_flatten_with_path(new)
    if str(before_tree) != str(after_tree):
        raise ValueError(
            f"{what} changed its structure, from {before_tree} to {after_tree}; it must be the "
            "same before and after a step."
        )
    for (path, one), (_, other) in zip(before, after, strict=True):
        first = (jnp.shape(one), jnp.result_type(one))
        second = (jnp.shape(other), jnp.result_type(other))
        if first != second:
            raise ValueError(
                f"{what} changed at {_tree.path_name(path)!r} from shape {first[0]} and dtype "
                f"{first[1]} to {second[0]} and {second[1]}; it must be the same before and after "
                "a step. A traced float32 hyperparameter does this to low-precision parameters in "
                "several Optax optimizers; ours keep their dtypes."
            )


@contextlib.contextmanager
def user_code(what: str, function: Any = None, point: Any = None) -> Iterator[None]:
    """Lets the user's own errors through, and explains those of tracing and of unknown names.

    Args:
      what: the function's name.
      function: the function that is called inside; warned of where it takes from the host.
      point: what it looks hyperparameters up in.
    """
    try:
        with host_state.watched(what, function):
            yield
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"{what} gives a traced value to NumPy; use jnp (jax.numpy) instead of np there."
        ) from error
    except jax.errors.TracerBoolConversionError as error:
        raise ValueError(
            f"{what} uses a Python `if`, `while` or `bool` on a traced value, which has no value "
            "yet; use jnp.where or jax.lax.cond."
        ) from error
    except TypeError as error:
        # JAX has no class of its own for a traced number in a shape.
        kinds = (jax.errors.TracerIntegerConversionError, jax.errors.ConcretizationTypeError)
        if not isinstance(error, kinds) and "sequences of concrete values" not in str(error):
            raise
        raise ValueError(
            f"{what} needs the number behind a traced value, for a shape or an `int()`. Shapes and "
            "structure may not depend on the key or the point; a structural choice is another "
            "study."
        ) from error
    except KeyError as error:
        name = error.args[0] if error.args else None
        if point is not None and isinstance(name, str) and name not in point:
            raise KeyError(
                f"the point has no hyperparameter {name!r}: {_checks.nearest(name, point)}"
            ) from error
        raise
