"""Predictions of shape (B, 1) against targets of shape (B,), which broadcast to (B, B) in silence.

The mean over all pairs trains every prediction towards the mean of the targets. Recognized, in the
jaxpr of a loss, is one operation of the user's code that itself promotes an array of shape (B,) to
(1, B), because the other one has shape (B, 1), where one of the two depends on the parameters, the
other on the batch alone, and B is the number of examples. Pairs that are meant are written
otherwise: ``y[None, :]`` is an operation of its own, attention and contrastive losses compare what
depends on the parameters on both sides, and a product of matrices broadcasts nothing.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from playbook_optax import _tree

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "checkpoint", "remat")
_MADE_BY = ("broadcast_in_dim", "reshape", "convert_element_type")


def warn_of_pairs(name: str, jaxpr: Any, params: Any, model_state: Any, batch: Any) -> None:
    """Warns of a loss that compares each prediction with each target.

    Args:
      name: of the workload.
      jaxpr: of its loss; the first inputs are the leaves of the next three.
      params: model weights.
      model_state: model state.
      batch: a batch.
    """
    leaves = jax.tree.leaves(batch)
    lengths = {leaf.shape[0] for leaf in leaves if getattr(leaf, "ndim", 0)} - {1}
    num_params = len(jax.tree.leaves(params))
    first = num_params + len(jax.tree.leaves(model_state))
    inputs = jaxpr.invars
    learned, given = set(inputs[:num_params]), set(inputs[first : first + len(leaves)])
    for operation, size in _pairs(jaxpr, learned, given):
        if size in lengths:
            warnings.warn(
                f"the loss of workload {name!r} broadcasts an array of shape ({size}, 1) against "
                f"one of shape ({size},) to ({size}, {size}), in {operation!r}: each prediction is "
                "compared with the target of every example. Take the last axis of the predictions "
                "away, predictions[:, 0], or write targets[None, :] if all pairs are meant.",
                UserWarning,
                stacklevel=4,
            )
            return


def _pairs(jaxpr: Any, learned: set[Any], given: set[Any]) -> Iterator[tuple[str, int]]:
    """The operations that broadcast so, and to which size."""
    learned = _tree.reached(jaxpr, learned)
    given = _tree.reached(jaxpr, given)
    made_by = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    for equation in jaxpr.eqns:
        inner = _called(equation)
        if inner is not None and equation.params.get("name") != "_where":
            outside = list(zip(inner.invars, equation.invars, strict=True))
            # A literal has no identity, and depends on nothing.
            outside = [(one, var) for one, var in outside if not hasattr(var, "val")]
            yield from _pairs(
                inner,
                {one for one, var in outside if var in learned},
                {one for one, var in outside if var in given},
            )
            continue
        shape: tuple[int, ...] = equation.outvars[0].aval.shape if equation.outvars else ()
        if len(shape) != 2 or shape[0] != shape[1] or equation.primitive.name in _MADE_BY:
            continue
        sources = [
            _as_given(var, equation, made_by) for var in equation.invars if not hasattr(var, "val")
        ]
        size = shape[0]
        columns = [var for var in sources if var.aval.shape == (size, 1)]
        rows = [var for var in sources if var.aval.shape == (size,)]
        if any(_are_apart(column, row, learned, given) for column in columns for row in rows):
            yield equation.params.get("name", equation.primitive.name).strip("_"), size


def _called(equation: Any) -> Any:
    """The jaxpr of a call whose inputs are the operation's, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    matches = inner is not None and len(inner.invars) == len(equation.invars)
    return inner if matches else None


def _as_given(var: Any, equation: Any, made_by: dict[Any, Any]) -> Any:
    """An input before the operation itself, at the same place in the user's code, reshaped it."""
    place = _place(equation)
    while (before := made_by.get(var)) is not None:
        single = len(before.invars) == 1 and not hasattr(before.invars[0], "val")
        same = place is not None and before.primitive.name in _MADE_BY and _place(before) == place
        if not (single and same):
            break
        var = before.invars[0]
    return var


def _place(equation: Any) -> Sequence[tuple[Any, ...]] | None:
    """Where in the code an operation stands; None where JAX does not tell."""
    frames = getattr(equation.source_info.traceback, "frames", None)
    if not frames:
        return None
    return [(frame.file_name, frame.function_name, frame.line_num) for frame in frames]


def _are_apart(one: Any, other: Any, learned: set[Any], given: set[Any]) -> bool:
    """Whether one of two arrays is a prediction and the other comes with the batch."""
    return (one in learned) != (other in learned) and (
        (one if other in learned else other) in given
    )
