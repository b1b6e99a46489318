"""What the norm, the clipper and the norm record cost in a vmapped training step.

Variants of one training program run in turns, so that a busy machine slows all of them alike; a
ratio is the median over rounds of (time of the variant / time of the reference in that round).
Run: python benchmarks/norms.py [--quick]. For figures without the noise of XLA's own threads:
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 1 python benchmarks/norms.py
"""

import itertools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

from playbook_optax._tree import global_norm
from playbook_optax.norms import (
    clip_by_global_norm,
    clip_by_percentile,
    init_record,
    monitor_norms,
    update_record,
)

MODELS = {
    "tiny 64-16-10, batch 16": ([64, 16, 10], 16),
    "mlp 64-128-10, batch 128": ([64, 128, 10], 128),
    "deep 64x13-10, batch 64": ([64] * 13 + [10], 64),
}
STEPS = 50


def _norm_only(norm):
    """Multiplies by a factor that depends on the norm, so that it cannot be optimized away."""

    def init(params):
        del params
        return ()

    def update(updates, state, params=None):
        del params
        factor = 1 + 1e-30 * norm(updates)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(init, update)


def _record_only():
    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        state = update_record(state, norm)
        return jax.tree.map(lambda g: g * (1 + 1e-30 * norm), updates), state

    return optax.GradientTransformation(lambda params: init_record("bench"), update)


VARIANTS = {
    "nothing": optax.identity,
    "optax.tree.norm": lambda: _norm_only(optax.tree.norm),
    "global_norm": lambda: _norm_only(global_norm),
    "optax.tree.norm + record": _record_only,
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.5),
    "clip_by_global_norm": lambda: clip_by_global_norm(0.5),
    "clip_by_percentile": lambda: clip_by_percentile(min_steps=10),
    "monitor_norms": monitor_norms,
}
RATIOS = [
    ("optax.tree.norm", "nothing"),
    ("global_norm", "optax.tree.norm"),
    ("optax.tree.norm + record", "optax.tree.norm"),
    ("clip_by_global_norm", "optax.clip_by_global_norm"),
    ("clip_by_percentile", "optax.clip_by_global_norm"),
    ("monitor_norms", "nothing"),
]


def _program(sizes, batch, make):
    key = jax.random.key(0)
    params = {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weights = jax.random.normal(jax.random.fold_in(key, i), (a, b)) / a**0.5
        params[f"w{i}"], params[f"b{i}"] = weights, jnp.zeros((1, b))
    x = jax.random.normal(jax.random.fold_in(key, 99), (batch, sizes[0]))
    labels = jnp.arange(batch) % sizes[-1]
    last = len(sizes) - 2

    def loss(params, x):
        for i in range(last):
            x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
        logits = x @ params[f"w{last}"] + params[f"b{last}"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(learning_rate, x):
        tx = optax.chain(make(), optax.sgd(learning_rate))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)[0]

    return jax.jit(jax.vmap(train, in_axes=(0, None))), x


def run(quick: bool = False) -> dict:
    """Times all variants; microseconds per trial-step and ratios, keyed by model and trials."""
    rounds = 5 if quick else 21
    models = dict(list(MODELS.items())[:1]) if quick else MODELS
    result = {}
    for model, (sizes, batch) in models.items():
        for num_trials in (1, 16):
            rates = jnp.geomspace(1e-3, 1e-2, num_trials)
            programs = {n: _program(sizes, batch, make) for n, make in VARIANTS.items()}
            times = {name: [] for name in programs}
            for index in range(rounds + 1):
                for name, (program, x) in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(program(rates, x))
                    if index:  # The first round compiles.
                        times[name].append(time.perf_counter() - start)
            scale = 1e6 / STEPS / num_trials
            result[f"{model}, {num_trials} trials"] = {
                "microseconds": {n: min(t) * scale for n, t in times.items()},
                "ratios": {
                    f"{name} / {reference}": statistics.median(
                        a / b for a, b in zip(times[name], times[reference], strict=True)
                    )
                    for name, reference in RATIOS
                },
            }
    return result


def main() -> None:
    for title, entry in run("--quick" in sys.argv).items():
        print(title, json.dumps({n: round(t, 2) for n, t in entry["microseconds"].items()}))
        for pair, ratio in entry["ratios"].items():
            print(f"  {ratio:6.3f}  {pair}", flush=True)


if __name__ == "__main__":
    main()
