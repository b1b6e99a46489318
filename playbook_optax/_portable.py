"""What a result holds that another process cannot read as it is: functions, and random keys."""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


class SentFunctions(NamedTuple):
    """Functions of the user's and what they close over, as bytes.

    Attributes:
      content: what `pickle`, or cloudpickle where it is installed, made; None if neither could.
      why: why not.
    """

    content: bytes | None
    why: str = ""


def send_functions(value: Any) -> SentFunctions:
    """Packs functions for another process.

    Args:
      value: anything that may hold functions.

    Returns:
      Their bytes; lambdas and local functions need cloudpickle to be installed.
    """
    try:
        return SentFunctions(pickle.dumps(value))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    try:
        import cloudpickle
    except ImportError:
        return SentFunctions(None, why)
    try:
        return SentFunctions(cloudpickle.dumps(value))
    except Exception as error:
        return SentFunctions(None, f"{type(error).__name__}: {error}")


def receive_functions(sent: SentFunctions) -> Any:
    """What `send_functions` packed; where it could not, a function that says so when called."""
    return _left_behind(sent.why) if sent.content is None else pickle.loads(sent.content)


def _left_behind(why: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"this function did not travel with the result: {why}. Make it a function of a module, "
            "or install cloudpickle in both processes."
        )

    return missing


class SentKey(NamedTuple):
    """A random key as numbers.

    Attributes:
      impl: its implementation; None of a raw key.
      data: uint32.
    """

    impl: str | None
    data: np.ndarray


def send_key(key: jax.Array) -> SentKey:
    """A random key as what can be sent."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return SentKey(None, np.asarray(key))
    return SentKey(str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)))


def receive_key(sent: SentKey) -> jax.Array:
    """The key that `send_key` took apart."""
    raw = jnp.asarray(np.asarray(sent.data, np.uint32))
    return raw if sent.impl is None else jax.random.wrap_key_data(raw, impl=sent.impl)
