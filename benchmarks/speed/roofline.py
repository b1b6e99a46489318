"""What the device can do: the rates of a large product and of a copy, and what a step asks for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import workloads
from benchmarks.speed.contenders import initial_state, plain_step, seconds
from playbook_optax.runner import plan

REPEATS = 7


def mlp_flops(batch: int, sizes: tuple[int, ...]) -> int:
    """Floating point operations of the matrix products of one training step of an MLP.

    Each layer has three products of one size, forward, gradient of the weights and gradient of
    the inputs, but the first layer's inputs need no gradient.

    Args:
      batch: examples.
      sizes: units of the input and of each layer.
    """
    products = [2 * batch * a * b for a, b in itertools.pairwise(sizes)]
    return 3 * sum(products) - products[0]


def device_rates() -> dict[str, float]:
    """Flops and copied bytes (read and written) per second, over all local devices together.

    The product is of square float32 matrices in JAX's default precision, which on recent GPUs is
    not all of float32.
    """
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    size, copied = (2048, 2**25) if on_cpu else (8192, 2**28)
    mesh = jax.sharding.Mesh(np.asarray(devices), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))

    def on_each(function, *shape):
        mapped = jax.jit(
            jax.shard_map(
                function,
                mesh=mesh,
                in_specs=jax.sharding.PartitionSpec("device"),
                out_specs=jax.sharding.PartitionSpec("device"),
            )
        )
        # Not ones: a chip may run faster on what is all the same.
        x = jax.device_put(jax.random.normal(jax.random.key(0), (len(devices), *shape)), sharding)
        jax.block_until_ready(mapped(x))
        return min(seconds(lambda: jax.block_until_ready(mapped(x))) for _ in range(REPEATS))

    product = on_each(lambda x: jnp.matmul(x[0], x[0])[None], size, size)
    copy = on_each(lambda x: x + 1.0, copied)
    return {
        "flops_per_second": 2 * size**3 * len(devices) / product,
        "bytes_per_second": 2 * 4 * copied * len(devices) / copy,
    }


def step_costs(name: str) -> dict[str, float]:
    """Flops of the products of one plain step of one trial, and the bytes that it must move."""
    work = workloads.CASES[name].build()
    key = jax.random.key(0)
    state = jax.eval_shape(lambda key: initial_state(work, key), key)
    closed = jax.make_jaxpr(
        lambda state, rate, key, data: plain_step(work, rate, state, key, data)
    )(state, jnp.float32(0.1), key, work.data)
    # Every weight and its momentum are read and written, whatever else stays in a cache.
    weights = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    return {"flops": plan.product_flops(closed.jaxpr), "least_bytes": 4.0 * 4 * weights}
