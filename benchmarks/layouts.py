"""What `trials/layouts.py` is worth: gradients in a loop, as JAX writes them and rewritten.

On one core of a CPU, because a study gives each trial one. A ratio is (time as JAX writes it / time
rewritten) in one round. Run: taskset -c 0 python -m benchmarks.layouts
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax.trials import layouts

# Name, contraction length, columns of the left side (the gradient's) and of the right one.
PRODUCTS = (
    ("dense 128 -> 10, batch 128", 128, 10, 128),
    ("dense 64 -> 128, batch 128", 128, 128, 64),
    ("dense 128 -> 32, 1024 rows", 1024, 32, 128),
    ("dense 32 -> 128, 1024 rows", 1024, 128, 32),
    ("dense 64 -> 64, batch 64", 64, 64, 64),
    ("dense 256 -> 256, batch 256", 256, 256, 256),
)


def _normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def _looped(function, num_steps):
    """A program that calls the function again and again, each time on something new."""

    def program(*args):
        def body(i, carry):
            args, total = carry
            out = function(*args)
            first = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(out))
            return jax.tree.map(lambda leaf: leaf + 0 * first, args), total + first

        return jax.lax.fori_loop(0, num_steps, body, (args, jnp.float32(0)))[1]

    return jax.jit(program)


def _ratio(function, args, num_steps, rounds):
    programs = [_looped(one, num_steps) for one in (function, layouts.fast_layouts(function))]
    for program in programs:
        program(*args).block_until_ready()
    ratios = []
    for _ in range(rounds):
        seconds = []
        for program in programs:
            start = time.perf_counter()
            program(*args).block_until_ready()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]}


def run(quick=False):
    rounds, scale = (3, 1) if quick else (11, 10)
    result = {}
    for name, length, left, right in PRODUCTS:

        def product(a, b):
            # A dense layer's weight gradient, as differentiation writes it.
            return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ()))).T

        args = (_normal(length, left), _normal(length, right))
        result[name] = _ratio(product, args, 20 * scale, rounds)

    def attention(weights, values):
        return jax.lax.dot_general(weights, values, (((1,), (1,)), ((0,), (0,))))

    args = (_normal(32, 64, 64), _normal(32, 64, 16))
    result["attention, 32 heads of 64 x 16"] = _ratio(attention, args, 10 * scale, rounds)

    def convolution(x, kernel):
        out = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(out**2)

    args = (_normal(32, 8, 8, 16), _normal(3, 3, 16, 32))
    gradient = jax.grad(convolution, (0, 1))
    result["convolution 16 -> 32, 32 images of 8 x 8"] = _ratio(gradient, args, scale, rounds)

    # The first layer: nobody asks for the gradient of the images.
    args = (_normal(32, 8, 8, 1), _normal(3, 3, 1, 16))
    gradient = jax.grad(convolution, 1)
    result["convolution 1 -> 16, 32 images of 8 x 8"] = _ratio(gradient, args, scale, rounds)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    run()
