"""Flax modules as the pair (init, apply) that `Workload.from_arrays` takes."""

import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

# How linen modules call the switch between training and evaluation, and its value in training.
_TRAINING_ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def functions(module: Any, train: Any) -> tuple[str, Callable[..., Any], Callable[..., Any]]:
    """The name of a Flax module and its ``init(key)`` and ``apply(params, state, x, key, train)``.

    Args:
      module: a linen module, an nnx module class or factory, or an nnx module.
      train: (x, y), whose first example gives linen its shapes.

    Returns:
      (name, init, apply), pure functions.

    Raises:
      ValueError: `module` is none of these.
    """
    if isinstance(module, linen.Module):
        return type(module).__name__, *_linen(module, np.asarray(train[0])[:1])
    if isinstance(module, nnx.Module):
        return type(module).__name__, *_nnx(module, None)
    if inspect.isclass(module) and issubclass(module, linen.Module):
        raise ValueError(
            f"module is the linen class {module.__name__}; give an instance, such as "
            f"{module.__name__}(...)."
        )
    if callable(module):
        template = nnx.eval_shape(lambda: _make(module, jax.random.key(0)))
        if isinstance(template, nnx.Module):
            return type(template).__name__, *_nnx(template, module)
    raise ValueError(
        "module must be a flax.linen module, an nnx module, or a function rngs -> nnx.Module, got "
        f"{module!r}."
    )


def _make(factory: Callable[..., Any], key: chex.PRNGKey) -> Any:
    rngs = nnx.Rngs(key)
    # Classes name their argument `rngs` by custom, often as keyword only.
    takes_rngs = "rngs" in inspect.signature(factory).parameters
    return factory(rngs=rngs) if takes_rngs else factory(rngs)


def _linen(module: linen.Module, example: np.ndarray) -> tuple[Callable, Callable]:
    arguments = inspect.signature(type(module).__call__).parameters
    switches = {k: v for k, v in _TRAINING_ARGUMENTS.items() if k in arguments}

    def switch(train: bool) -> dict[str, bool]:
        return {name: value if train else not value for name, value in switches.items()}

    def init(key: chex.PRNGKey) -> tuple[Any, Any]:
        x = jnp.zeros(example.shape, jax.dtypes.canonicalize_dtype(example.dtype))
        rngs = {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}
        variables = dict(module.init(rngs, x, **switch(False)))
        params = variables.pop("params", {})
        return params, variables

    def apply(params: Any, state: Any, x: chex.Array, key: Any, train: bool) -> tuple[Any, Any]:
        variables = {"params": params, **state}
        if not train:
            return module.apply(variables, x, **switch(False)), state
        outputs, new_state = module.apply(
            variables, x, rngs={"dropout": key}, mutable=list(state), **switch(True)
        )
        return outputs, dict(new_state)

    return init, apply


def _nnx(module: nnx.Module, factory: Callable[..., Any] | None) -> tuple[Callable, Callable]:
    # Streams of random keys are split off: each step derives them from its own key, so that a
    # trial can be repeated from any step.
    graph, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)

    def init(key: chex.PRNGKey) -> tuple[Any, Any]:
        if factory is None:
            return params, rest
        _, new_params, _, new_rest = nnx.split(_make(factory, key), nnx.Param, nnx.RngState, ...)
        return new_params, new_rest

    def reseeded(key: Any) -> Any:
        leaves, treedef = jax.tree.flatten(streams)
        base = jax.random.key(0) if key is None else key

        def fresh(number: int, leaf: Any) -> chex.Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                keys = jax.random.fold_in(base, number)
                return jnp.broadcast_to(keys, leaf.shape)
            return jnp.zeros(leaf.shape, leaf.dtype)

        return jax.tree.unflatten(treedef, [fresh(i, leaf) for i, leaf in enumerate(leaves)])

    def apply(params: Any, state: Any, x: chex.Array, key: Any, train: bool) -> tuple[Any, Any]:
        # copy=True: without it BatchNorm inside jax.grad mutates variables of an outer trace.
        model = nnx.merge(graph, params, reseeded(key), state, copy=True)
        if train:
            model.train()
        else:
            model.eval()
        outputs = model(x)
        _, _, _, new_state = nnx.split(model, nnx.Param, nnx.RngState, ...)
        return outputs, new_state if train else state

    return init, apply
