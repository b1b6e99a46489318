"""Products and convolutions in the layouts for which XLA's CPU backend has fast code.

Three kinds of operations, all of which differentiation makes of ordinary layers, miss the fast
paths of jax 0.10 on a CPU, and one transposed copy puts each of them back on it. Measured on one
core, inside a loop (`python -m benchmarks.layouts` prints the ratios again):

- The gradient of a dense layer's weights contracts the first axis of both sides. Where the left
  side has the longer free axis, XLA's code reaches a quarter of the machine's rate and less.
- The same inside a batch of products, as the gradient of attention has them.
- Inside a loop, convolutions are not brought to the one layout that is fast, as they are outside
  (jax #12868). The gradients of a convolution are up to thirty times slower for it.

A convolution of one or a few channels, as the first layer of a network of images is, has no fast
code in any layout; it becomes a product.

On other backends nothing is changed: their libraries take any layout.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# A convolution of at most so many channels becomes a product, if its kernel has no more elements
# than this, each of which costs a slice, and its patches take no more than this.
FEW_CHANNELS = 4
MAX_KERNEL = 64
MAX_PATCH_BYTES = 16 * 2**20
# Products whose narrower side has this many columns or more are fast as they are, unless the wider
# side comes first.
NARROW = 64

# Call-like primitives that are inlined, and loops and branches whose bodies are rewritten.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}


def fast_layouts(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its products and convolutions in layouts that are fast on a CPU.

    Results are the same up to rounding. Differentiate first: what is slow is mostly made by
    differentiation.

    Args:
      function: a traceable function.

    Returns:
      The function; on any other backend than CPU, `function` itself.
    """
    if jax.default_backend() != "cpu":
        return function

    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = jax.tree.leaves(args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, flat))

    return rewritten


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    """Evaluates a jaxpr operation by operation, with replacements."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    jaxpr = closed.jaxpr
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _apply(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, dict(equation.params)
    if name == "dot_general":
        return [_dot(*inputs, **params)]
    if name == "conv_general_dilated":
        return [_convolution(*inputs, **params)]
    if name in _CALLS:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(inner, core.ClosedJaxpr):
            return _evaluate(inner, inputs)
    if name == "scan":
        params["jaxpr"] = _rewrite(params["jaxpr"])
    elif name == "while":
        params["body_jaxpr"] = _rewrite(params["body_jaxpr"])
    elif name == "cond":
        params["branches"] = tuple(_rewrite(branch) for branch in params["branches"])
    bound = equation.primitive.get_bind_params(params)
    # Before jax 0.8 functions among the parameters came apart from the others.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _rewrite(closed: Any) -> Any:
    avals = [var.aval for var in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate(closed, list(args)))(*avals)


def _stored(array: Any, permutation: tuple[int, ...]) -> Any:
    """The transposed array as a copy; without the barrier XLA would fold the transpose back."""
    return jax.lax.optimization_barrier(jax.lax.transpose(array, permutation))


def _dot(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """A product; where both contract their first free axis, the narrower side is transposed."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    num_batch = len(lhs_batch)
    batch = tuple(range(num_batch))
    first = (num_batch,)
    slow = (
        jnp.ndim(lhs) == jnp.ndim(rhs) == num_batch + 2
        and tuple(lhs_batch) == tuple(rhs_batch) == batch
        and tuple(lhs_contract) == tuple(rhs_contract) == first
    )
    if slow and not num_batch:
        # JAX writes the gradient of x @ w as (gradient, x), and XLA turns that round.
        left, right = lhs.shape[-1], rhs.shape[-1]
        slow = right > left or min(left, right) < NARROW
    if not slow:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **params)
    swap = (*batch, num_batch + 1, num_batch)
    numbers = (((num_batch + 1,), first), (batch, batch))
    swapped = rhs.shape[-1] < lhs.shape[-1]
    narrow, wide = (rhs, lhs) if swapped else (lhs, rhs)
    product = jax.lax.dot_general(_stored(narrow, swap), wide, numbers, **params)
    # A transpose that follows, ours or the caller's, would otherwise be folded into the product.
    product = jax.lax.optimization_barrier(product)
    return jax.lax.transpose(product, swap) if swapped else product


def _convolution(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """A convolution with examples and kernel laid out as (batch, space, feature) and HWIO."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    spatial = tuple(range(1, jnp.ndim(lhs) - 1))
    last = jnp.ndim(lhs) - 1
    numbers = jax.lax.ConvDimensionNumbers(
        (0, last, *spatial), (last, last - 1, *(i - 1 for i in spatial)), (0, last, *spatial)
    )
    # A spec lists where batch, feature and space stand; each becomes an order of axes.
    lhs = _ordered(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    rhs = _ordered(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    if _is_small(lhs, rhs, params):
        out = _patch_product(lhs, rhs, params)
    else:
        out = jax.lax.conv_general_dilated_p.bind(lhs, rhs, dimension_numbers=numbers, **params)
    order = (out_spec[0], *out_spec[2:], out_spec[1])
    inverse = tuple(int(axis) for axis in np.argsort(order))
    return (
        out
        if inverse == tuple(range(len(order)))
        else jax.lax.transpose(jax.lax.optimization_barrier(out), inverse)
    )


def _is_small(lhs: Any, rhs: Any, params: dict[str, Any]) -> bool:
    """Whether a convolution, laid out already, is quicker as a product."""
    groups = params["feature_group_count"] * params["batch_group_count"]
    undilated = all(step == 1 for step in params["lhs_dilation"])
    num_taps = int(np.prod(rhs.shape[:-2]))
    num_bytes = lhs.size * lhs.dtype.itemsize * num_taps
    return (
        lhs.shape[-1] <= FEW_CHANNELS
        and groups == 1
        and undilated
        and num_taps <= MAX_KERNEL
        and num_bytes <= MAX_PATCH_BYTES
    )


def _patch_product(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """A convolution as one product: each place's patch of examples with the kernel."""
    *kernel, _, num_out = rhs.shape
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    padded = jax.lax.pad(
        lhs,
        jnp.zeros((), lhs.dtype),
        [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)],
    )
    reach = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    places = [
        (size - far - 1) // stride + 1
        for size, far, stride in zip(padded.shape[1:-1], reach, strides, strict=True)
    ]

    def patch(offset: tuple[int, ...]) -> Any:
        """What one element of the kernel sees, shape (batch, place..., channel)."""
        first = [at * step for at, step in zip(offset, dilation, strict=True)]
        last = [
            start + (count - 1) * stride + 1
            for start, count, stride in zip(first, places, strides, strict=True)
        ]
        begin, end = (0, *first, 0), (lhs.shape[0], *last, lhs.shape[-1])
        return jax.lax.slice(padded, begin, end, (1, *strides, 1))

    patches = jnp.concatenate([patch(offset) for offset in np.ndindex(*kernel)], axis=-1)
    return jax.lax.dot_general(
        patches,
        rhs.reshape(-1, num_out),
        (((patches.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _ordered(array: Any, order: tuple[int, ...]) -> Any:
    return array if order == tuple(range(len(order))) else _stored(array, order)
