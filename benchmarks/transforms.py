"""Our transformations beside Optax's namesakes, as updates alone in a jitted vmap of a scan.

Run: python -m benchmarks.transforms [--quick]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from playbook_optax import learning_rate, norms, optimizers

NUM_LAYERS, WIDTH = 10, 64
PAIRS = {
    "sgd": (optimizers.sgd, optax.sgd),
    "momentum": (optimizers.momentum, lambda rate: optax.sgd(rate, momentum=0.9)),
    "nesterov": (optimizers.nesterov, lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)),
    "rmsprop": (
        lambda rate: optimizers.rmsprop(rate, momentum=0.9),
        lambda rate: optax.rmsprop(rate, initial_scale=1.0, momentum=0.9),
    ),
    "adam": (optimizers.adam, optax.adam),
    "nadam": (optimizers.nadam, optax.nadam),
    "adamw": (optimizers.adamw, optax.adamw),
    "nadamw": (optimizers.nadamw, optax.nadamw),
    "scale_by_learning_rate": (learning_rate.scale_by_learning_rate, optax.scale_by_learning_rate),
    "clip_by_global_norm": (norms.clip_by_global_norm, optax.clip_by_global_norm),
}
"""Name to ours and Optax's, functions of one traced number; our clipper also records norms."""


def _program(factory: Callable[..., Any], num_steps: int) -> Callable[..., Any]:
    """A block of trials on a quadratic, whose gradient costs one product per weight."""

    def train(learning_rate: jax.Array, params: Any) -> Any:
        tx = factory(learning_rate)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            gradient = jax.tree.map(lambda p: 0.5 * p, params)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        # The state is returned too, or what only it holds would not be computed.
        return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[0]

    return jax.jit(jax.vmap(train, in_axes=(0, None)))


def _seconds(program: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - begin


def run(quick: bool = False) -> dict[str, Any]:
    """Measures ours and Optax's in turns, so that a busy machine slows both.

    Args:
      quick: fewer steps and repeats.

    Returns:
      JSON-able: sizes, and for each rule the microseconds per trial-step of both (medians) and the
      paired ratios ours / Optax's: median and quartiles.
    """
    num_trials, num_steps, repeats = (8, 20, 3) if quick else (8, 200, 15)
    params = {
        f"layer_{number}": {
            "kernel": jax.random.normal(
                jax.random.fold_in(jax.random.key(0), number), (WIDTH, WIDTH)
            ),
            "bias": jnp.zeros(WIDTH),
        }
        for number in range(NUM_LAYERS)
    }
    rates = jnp.logspace(-4, -2, num_trials)
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "num_trials": num_trials,
        "num_steps": num_steps,
        "num_weights": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "num_pairs": repeats,
    }
    for name, factories in PAIRS.items():
        ours, theirs = (_program(factory, num_steps) for factory in factories)
        _seconds(ours, rates, params), _seconds(theirs, rates, params)  # compiles both
        pairs = []
        for repeat in range(repeats):
            # Who goes first alternates: the second of a pair finds other caches.
            order = (ours, theirs) if repeat % 2 == 0 else (theirs, ours)
            times = [_seconds(program, rates, params) for program in order]
            pairs.append(tuple(times if repeat % 2 == 0 else reversed(times)))
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        scale = 1e6 / (num_trials * num_steps)
        result[name] = {
            "microseconds": round(scale * statistics.median(a for a, _ in pairs), 3),
            "optax_microseconds": round(scale * statistics.median(b for _, b in pairs), 3),
            "ratio": round(middle, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    print(json.dumps(run(quick=parser.parse_args().quick), indent=2))


if __name__ == "__main__":
    main()
