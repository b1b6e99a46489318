"""Flax modules as the pair (init, apply) that `Workload.from_arrays` takes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from playbook_optax import _checks

# How modules call the switch between training and evaluation, and its value in training.
SWITCHES = dict.fromkeys(
    ("train", "training", "is_train", "is_training", "train_mode", "training_mode", "in_training"),
    True,
) | dict.fromkeys(
    (
        *("deterministic", "use_running_average"),
        *("eval", "is_eval", "eval_mode", "evaluate", "evaluation", "evaluating"),
        *("inference", "is_inference", "inference_mode", "test", "is_test", "testing", "test_mode"),
    ),
    False,
)


def functions(
    module: Any, train: Any, train_switch: str | Mapping[str, bool] | None
) -> tuple[str, Callable[..., Any], Callable[..., Any]]:
    """The name of a Flax module and its ``init(key)`` and ``apply(params, state, x, key, train)``.

    Args:
      module: a linen module, an nnx module class or factory, or an nnx module.
      train: (x, y), whose first example gives linen its shapes.
      train_switch: see `Workload.from_flax`.

    Returns:
      (name, init, apply), pure functions.

    Raises:
      ValueError: `module` is none of these, or it is not known how it is told that it trains.
    """
    if isinstance(module, linen.Module):
        example = np.asarray(train[0])[:1]
        return type(module).__name__, *_linen(module, example, train_switch)
    if isinstance(module, nnx.Module):
        return type(module).__name__, *_nnx(module, None, train_switch)
    if inspect.isclass(module) and issubclass(module, linen.Module):
        raise ValueError(
            f"module is the linen class {module.__name__}; give an instance, such as "
            f"{module.__name__}(...)."
        )
    if callable(module):
        template = nnx.eval_shape(lambda: _make(module, jax.random.key(0)))
        if isinstance(template, nnx.Module):
            return type(template).__name__, *_nnx(template, module, train_switch)
    raise ValueError(
        "module must be a flax.linen module, an nnx module, or a function rngs -> nnx.Module, got "
        f"{module!r}."
    )


def _make(factory: Callable[..., Any], key: chex.PRNGKey) -> Any:
    rngs = nnx.Rngs(key)
    # Classes name their argument `rngs` by custom, often as keyword only.
    takes_rngs = "rngs" in inspect.signature(factory).parameters
    return factory(rngs=rngs) if takes_rngs else factory(rngs)


@dataclasses.dataclass(frozen=True)
class _Switch:
    """How a module is told whether it trains; frozen, so that it is known what it is made of.

    Attributes:
      of_call: arguments of its call, name to value in training.
      of_module: attributes, likewise.
      known: whether there is a switch, or the user says that there is none.
    """

    of_call: dict[str, bool]
    of_module: dict[str, bool]
    known: bool

    def arguments(self, train: bool) -> dict[str, bool]:
        """What the call is given."""
        return {name: value is train for name, value in self.of_call.items()}

    def on(self, module: linen.Module, train: bool) -> linen.Module:
        """A linen module with its attributes set."""
        if not self.of_module:
            return module
        return module.clone(**{name: value is train for name, value in self.of_module.items()})


def _switch_of(module: Any, given: str | Mapping[str, bool] | None) -> _Switch:
    """The switch of a module.

    Args:
      module: the module.
      given: what the user says of it; None to look for known names.

    Returns:
      The switch.

    Raises:
      ValueError: a name that the module does not have.
    """
    parameters = inspect.signature(type(module).__call__).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    fields = set(getattr(type(module), "__dataclass_fields__", ())) - {"parent", "name"}
    if given is None:
        # Of the same name, but no switch, is what holds anything else.
        now = {name: p.default for name, p in parameters.items()}
        now |= {name: getattr(module, name, inspect.Parameter.empty) for name in fields}
        usual = (True, False, None, inspect.Parameter.empty)
        wanted = {
            name: value
            for name, value in SWITCHES.items()
            if name in now and any(now[name] is one for one in usual)
        }
    elif isinstance(given, str):
        wanted = {given: SWITCHES.get(given, True)}
    else:
        wanted = dict(given)
    for name, value in wanted.items():
        if not (name in parameters or name in fields or takes_any):
            known = [*list(parameters)[1:], *sorted(fields)]
            raise ValueError(
                f"train_switch names {name!r}, which is no argument of "
                f"{type(module).__name__}.__call__ and no attribute: {_checks.nearest(name, known)}"
            )
        _checks.check_flag(f"train_switch[{name!r}]", value)
    of_call = {k: v for k, v in wanted.items() if k in parameters or k not in fields}
    of_module = {k: v for k, v in wanted.items() if k not in of_call}
    return _Switch(of_call, of_module, given is not None or bool(wanted))


def _linen(
    module: linen.Module, example: np.ndarray, train_switch: str | Mapping[str, bool] | None
) -> tuple[Callable, Callable]:
    switch = _switch_of(module, train_switch)

    def init(key: chex.PRNGKey) -> tuple[Any, Any]:
        x = jnp.zeros(example.shape, jax.dtypes.canonicalize_dtype(example.dtype))
        rngs = {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}
        evaluated = switch.on(module, False)
        variables = dict(evaluated.init(rngs, x, **switch.arguments(False)))
        params = variables.pop("params", {})
        return params, variables

    def apply(params: Any, state: Any, x: chex.Array, key: Any, train: bool) -> tuple[Any, Any]:
        variables = {"params": params, **state}
        switched, arguments = switch.on(module, train), switch.arguments(train)
        if not train:
            return switched.apply(variables, x, **arguments), state
        outputs, new_state = switched.apply(
            variables, x, rngs={"dropout": key}, mutable=list(state), **arguments
        )
        return outputs, dict(new_state)

    if not switch.known:
        _check_needs_no_switch(module, init)
    return init, apply


def _check_needs_no_switch(module: linen.Module, init: Callable[..., Any]) -> None:
    """Raises if layers differ in training and nothing tells the module that it trains."""
    found: dict[str, str] = {}

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, linen.BatchNorm):
            found["batch statistics"] = "would stay as they were initialized"
        if getattr(layer, "rate", 0) and isinstance(layer, linen.Dropout):
            found["dropout"] = "would be off"
        if getattr(layer, "dropout_rate", 0):
            found["dropout"] = "would be off"
        return call(*args, **kwargs)

    with linen.intercept_methods(look):
        _, state = jax.eval_shape(init, jax.random.key(0))
    if "batch_stats" in state:
        found["batch statistics"] = "would stay as they were initialized"
    if found:
        name = type(module).__name__
        raise ValueError(
            f"{name} has {' and '.join(found)}, and nothing is known that tells it that it trains: "
            f"in training {', '.join(f'{k} {v}' for k, v in found.items())}. Name the argument of "
            f"{name}.__call__, or the attribute, that is True in training, train_switch='train'; "
            "or give its value in training, train_switch={'frozen': False}. Where the module is "
            "the same in training and evaluation, train_switch={}."
        )


def _nnx(
    module: nnx.Module,
    factory: Callable[..., Any] | None,
    train_switch: str | Mapping[str, bool] | None,
) -> tuple[Callable, Callable]:
    switch = _switch_of(module, train_switch)
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
        outputs = model(x, **switch.arguments(train))
        _, _, _, new_state = nnx.split(model, nnx.Param, nnx.RngState, ...)
        return outputs, new_state if train else state

    return init, apply
