"""A study of learning rates against the loop people write: one jitted step per trial and step.

Both train the same trials of the MLP 64-128-10, batch 128, on random data, in turns; a ratio is
(time of the loop / time of the study) in one round, compile time apart.
Run: python -m benchmarks.studies
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import playbook_optax as pbx


def workload():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1400, 64)).astype(np.float32)
    y = rng.integers(0, 10, 1400)

    def init(key):
        one, two = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        return {
            "hidden": jax.random.normal(one, (64, 128)) / 8,
            "out": jax.random.normal(two, (128, 10)) / 11,
        }

    return pbx.Workload.from_arrays(
        init,
        lambda p, x: jax.nn.relu(x @ p["hidden"]) @ p["out"],
        (x[:1200], y[:1200]),
        (x[1200:], y[1200:]),
        batch_size=128,
    )


def run(quick=False):
    num_trials, num_steps, rounds = (8, 100, 2) if quick else (32, 400, 5)
    work = workload()
    rates = np.geomspace(1e-3, 1.0, num_trials).astype(np.float32)
    key = jax.random.key(0)
    data = jax.device_put(work.data)

    @jax.jit
    def step(params, opt_state, rate, i):
        batch = work.batch(data, key, i)
        grads = jax.grad(lambda p: work.loss(p, {}, batch, key)[0])(params)
        updates, opt_state = optax.sgd(rate, momentum=0.9).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def loop():
        for rate in rates:
            params, _ = work.init(key)
            opt_state = optax.sgd(0.1, momentum=0.9).init(params)
            for i in range(num_steps):
                params, opt_state = step(params, opt_state, jnp.float32(rate), i)
            jax.block_until_ready(params)

    # A study that is compiled already is extended by as many trials as the loop trains.
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")})
    studies = {
        width: pbx.run_study(
            work,
            lambda p: pbx.momentum(p["learning_rate"], 0.9),
            space,
            num_trials=num_trials,
            num_steps=num_steps,
            eval_every=num_steps // 4,
            key=key,
            trials_per_block=width,
            progress=False,
        )
        for width in (1, 8)
    }
    loop()
    ratios = {width: [] for width in studies}
    for _ in range(rounds):
        start = time.perf_counter()
        loop()
        reference = time.perf_counter() - start
        for width, study in studies.items():
            start = time.perf_counter()
            studies[width] = study.extend(num_trials)
            ratios[width].append(reference / (time.perf_counter() - start))
    result = {
        f"loop / study, width {width}": {
            "median": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for width, values in ratios.items()
    }
    result["devices"] = jax.local_device_count()
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    pbx.use_cpu_cores()
    run()
