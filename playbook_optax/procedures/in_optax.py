"""Schedules and optimizers of ours as source text: as calls of ours, or of their equals in Optax.

What has no equal in Optax is refused by its name. Text that is not of this file gets in as a number
of `_text.numeral` only, or was made by the caller.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from playbook_optax import schedules
from playbook_optax._text import numeral
from playbook_optax._tree import moment_dtype

_CHOICE = "Use style='playbook_optax'."
# Beside gradients that are as small as this, no network learns.
_SMALL_EPS = 1e-7


def no_equal(piece: str, why: str) -> ValueError:
    """The error that says which piece of a recipe Optax has no equal of.

    Args:
      piece: its name.
      why: what differs, as the end of a sentence.

    Returns:
      The error, to be raised.
    """
    return ValueError(f"{piece} has no equal in Optax: {why}. {_CHOICE}")


def check_dtypes(params: Any) -> None:
    """Raises where moments of Optax would be less precise than ours.

    Args:
      params: the weights, or their shapes.

    Raises:
      ValueError: a leaf has less than float32.
    """
    for leaf in jax.tree.leaves(params):
        dtype = np.dtype(leaf.dtype)
        if moment_dtype(dtype) != dtype:
            why = "our moments of them are float32, and Optax's have their dtype"
            raise no_equal(f"an optimizer of {dtype.name} parameters", why)


# Schedules ----------------------------------------------------------------------------------------


def our_schedule(made: Any, own: Callable[[], str]) -> str:
    """A schedule as a call of ours.

    Args:
      made: the schedule.
      own: gives the text of one that none of our functions made.

    Returns:
      An expression.
    """
    if not isinstance(made, schedules.Schedule) or made.made_by is None:
        return own()
    name, arguments = made.made_by
    parameters = inspect.signature(getattr(schedules, name)).parameters
    texts = []
    for argument, value in arguments.items():
        default = parameters[argument].default
        required = default is inspect.Parameter.empty
        if not required and _is_default(value, default):
            continue
        if callable(value):
            text = our_schedule(value, own)
        elif isinstance(value, Sequence):
            text = f"[{', '.join(map(numeral, value))}]"
        else:
            text = numeral(value)
        texts.append(text if required else f"{argument}={text}")
    return f"pbx.schedules.{name}({', '.join(texts)})"


def _is_default(value: Any, default: float) -> bool:
    return bool(np.asarray(value) == default)


def optax_schedule(made: Any, own: Callable[[], str]) -> str:
    """A schedule as a call of Optax; arguments as `our_schedule`.

    Args:
      made: the schedule.
      own: as in `our_schedule`.

    Returns:
      An expression.

    Raises:
      ValueError: Optax has no equal of it.
    """
    if not isinstance(made, schedules.Schedule) or made.made_by is None:
        return own()
    name, arguments = made.made_by
    if name == "constant":
        return _constant(arguments["value"])
    if name == "piecewise_constant":
        levels = [_constant(value) for value in arguments["values"]]
        return _joined(levels, [_whole(edge) for edge in arguments["boundaries"]])
    if name == "prepend_warmup":
        inner, steps = arguments["schedule"], _whole(arguments["warmup_steps"])
        after = optax_schedule(inner, own)
        if steps == 0:
            return after
        peak = numeral(np.asarray(inner(0)))
        return _joined([f"optax.linear_schedule(0.0, {peak}, {steps})", after], [steps])
    return _decay(name, **arguments)


def _decay(
    name: str,
    init_value: Any,
    decay_steps: Any,
    hold_steps: Any,
    end_value: Any,
    power: Any = 1.0,
    decay_rate: Any = 1.0,
) -> str:
    """A family that decays after a hold."""
    if name == "inverse_sqrt_decay":
        raise no_equal("inverse_sqrt_decay", "it has no schedule of that family")
    first, last = numeral(init_value), numeral(end_value)
    length, hold = _whole(decay_steps), _whole(hold_steps)
    begin = f", transition_begin={hold}" if hold else ""
    if length == 0:
        # A drop one step after the hold.
        return _joined([_constant(init_value), _constant(end_value)], [hold + 1])
    if name == "linear_decay":
        return f"optax.linear_schedule({first}, {last}, {length}{begin})"
    if name == "polynomial_decay":
        return f"optax.polynomial_schedule({first}, {last}, {numeral(power)}, {length}{begin})"
    if name == "exponential_decay":
        if float(decay_rate) == 1.0:
            return _constant(init_value)
        floor = f", end_value={last}" if float(end_value) else ""
        rate = numeral(decay_rate)
        return f"optax.exponential_decay({first}, {length}, {rate}{begin}{floor})"
    rises = float(init_value) == 0.0 and float(end_value) > 0.0
    if name != "cosine_decay" or rises:
        raise no_equal(name, "it has no schedule of that kind")
    alpha = f", alpha={numeral(float(end_value) / float(init_value))}" if float(end_value) else ""
    made = f"optax.cosine_decay_schedule({first}, {length}{alpha})"
    return _joined([_constant(init_value), made], [hold]) if hold else made


def _constant(value: Any) -> str:
    return f"optax.constant_schedule({numeral(value)})"


def _joined(parts: Sequence[str], boundaries: Sequence[int]) -> str:
    if not boundaries:
        return parts[0]
    return f"optax.join_schedules([{', '.join(parts)}], {list(boundaries)})"


def _whole(steps: Any) -> int:
    """A number of steps, rounded as schedules of ours round it."""
    return int(schedules.as_steps(steps))


# Optimizers ---------------------------------------------------------------------------------------


def optax_optimizer(
    name: str, rate: str, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """One of our optimizers as Optax has it.

    Args:
      name: its name, as in ``pbx.<name>``.
      rate: text of its learning rate, a number or the name of a schedule.
      given: its other hyperparameters, as far as they are given.
      defaults: what our optimizer takes where they are not, which Optax's does likewise.

    Returns:
      An expression, and the sentences that say how far it is the same.

    Raises:
      ValueError: Optax has no equal of it.
    """
    numbers = {argument: float({**defaults, **given}[argument]) for argument in defaults}
    texts = {argument: f"{argument}={numeral(value)}" for argument, value in given.items()}
    if name == "sgd":
        return f"optax.sgd({rate})", []
    if name in ("momentum", "nesterov"):
        # Without momentum is what it is by default there.
        momentum = numeral({**defaults, **given}["momentum"])
        more = ", nesterov=True" if name == "nesterov" else ""
        return f"optax.sgd({rate}, momentum={momentum}{more})", []
    if name == "rmsprop":
        return _rmsprop(rate, numbers, texts)
    if name in ("adam", "adamw"):
        return _adam(name, rate, numbers, texts)
    why = (
        "here one factor corrects the bias of both terms, and there each has an exponent of its "
        "own, which is 22% of the first update at b1 = 0.9"
    )
    raise no_equal(name, why)


def _rmsprop(
    rate: str, numbers: Mapping[str, float], texts: dict[str, str]
) -> tuple[str, list[str]]:
    texts.pop("momentum", None)
    scaled = [*texts.values(), "initial_scale=1.0"]
    said = "The mean square starts at 1, as in the playbook; by itself Optax starts it at 0."
    if numbers["momentum"] == 0.0:
        return f"optax.rmsprop({', '.join([rate, *scaled])})", [said]
    order = (
        "The momentum adds up updates that have their learning rates already; optax.rmsprop would "
        "multiply by the rate after it."
    )
    parts = [
        f"optax.scale_by_rms({', '.join(scaled)})",
        f"optax.scale_by_learning_rate({rate})",
        f"optax.trace(decay={numeral(numbers['momentum'])})",
    ]
    return f"optax.chain({', '.join(parts)})", [said, order]


def _adam(
    name: str, rate: str, numbers: Mapping[str, float], texts: dict[str, str]
) -> tuple[str, list[str]]:
    if numbers["eps"] <= _SMALL_EPS:
        first = numbers["eps"] / math.sqrt(1 - numbers["b2"])
        said = (
            "Optax adds eps after the bias correction and the recipe adds it before: at update "
            f"t = 1, 2, ... that is as if eps were eps / sqrt(1 - b2**t), {first:.2g} at first. "
            "Beside gradients that are much larger there is no difference."
        )
        return f"optax.{name}({', '.join([rate, *texts.values()])})", [said]
    said = (
        "Optax adds eps after the bias correction and the recipe adds it before, which matters "
        "where eps is as large as here. Divided by sqrt(1 - b2**t) it is the same."
    )
    eps, decay = numeral(numbers["eps"]), numeral(numbers["b2"])
    texts["eps"] = f"eps=lambda count: {eps} / (1 - {decay} ** (count + 1)) ** 0.5"
    # Decays that are not injected are not rounded before they are subtracted from 1.
    made = f"optax.inject_hyperparams(optax.{name}, static_args=('b1', 'b2'))"
    return f"{made}({', '.join([rate, *texts.values()])})", [said]
