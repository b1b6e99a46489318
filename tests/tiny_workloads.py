"""Workloads so small that a test compiles and trains one in a second or two."""

import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import playbook_optax as pbx


def quadratic(curvature=(1.0, 0.1)):
    """Half the curvature times the square, without noise: stable below 2 / max(curvature)."""

    def value(params, data):
        return 0.5 * jnp.sum(data * params["w"] ** 2)

    return pbx.Workload(
        name="quadratic",
        init=lambda key: ({"w": jax.random.normal(key, (len(curvature),)) + 3.0}, {}),
        loss=lambda params, state, batch, key: (value(params, batch), (state, {})),
        batch=lambda data, key, step: data,
        evaluate=lambda params, state, data: {"valid/loss": value(params, data)},
        objective="valid/loss",
        data=np.asarray(curvature, np.float32),
    )


def noisy_quadratic():
    """The quadratic with random batches, so that keys and steps matter: compiles fastest."""

    def batch(data, key, step):
        noise = jax.random.normal(jax.random.fold_in(key, step), data.shape)
        return data * (1.0 + 0.1 * noise)

    return pbx.Workload(**{**vars(quadratic()), "name": "noisy", "batch": batch})


def blobs(num_examples=96, num_valid=32, seed=0):
    """Two noisy Gaussian blobs in four dimensions: (train, valid)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, num_examples + num_valid)
    x = rng.normal(size=(len(y), 4)) + 1.5 * (2 * y[:, None] - 1) * np.array([1.0, 0, 0, 0])
    x = x.astype(np.float32)
    return (x[:num_examples], y[:num_examples]), (x[num_examples:], y[num_examples:])


def mlp_init(key):
    one, two = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    return {
        "hidden": 0.5 * jax.random.normal(one, (4, 8)),
        "bias": jnp.zeros((8,)),
        "out": 0.3 * jax.random.normal(two, (8, 2)),
    }


def mlp_apply(params, x):
    hidden = jax.nn.relu(x @ params["hidden"] + params["bias"][None])
    return hidden @ params["out"]


def mlp(**arguments):
    train, valid = blobs()
    return pbx.Workload.from_arrays(
        mlp_init, mlp_apply, train, valid, **{"batch_size": 16, "name": "tiny", **arguments}
    )


def sgd(point):
    return pbx.sgd(point["learning_rate"])


def bounded_sgd(point):
    """Gradient descent for which no learning rate is too large."""
    rate = point["learning_rate"]
    return pbx.sgd(lambda count: jnp.minimum(rate(count) if callable(rate) else rate, 0.1))


def momentum(point):
    return pbx.momentum(point["learning_rate"], 0.9)


LEARNING_RATES = {"learning_rate": np.array([0.03, 0.3, 3000.0, 0.1], np.float32)}
SPACE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1e4, scale="log")})


def host_fed():
    """The quadratic, its batches from a Python iterator."""
    device = quadratic()

    def batches(start):
        return (np.float32(1.0 + 0.1 * (step % 7)) * device.data for step in itertools.count(start))

    return pbx.Workload(
        **{**vars(device), "batch": None, "host_batches": batches, "version": "one"}
    )


def digest(study):
    """SHA-256 of every number that a study holds, kept weights included."""
    told = hashlib.sha256()
    for name, array in sorted(study.data.variables.items()):
        if array.dtype.kind not in "UO":
            told.update(f"{name}{array.dtype}{array.shape}".encode())
            told.update(np.ascontiguousarray(array.values).tobytes())
    if study.spec["keep"] != "none":
        seeds = range(study.num_seeds) if study.num_seeds > 1 else [None]
        for trial, seed in itertools.product(range(study.num_trials), seeds):
            for leaf in jax.tree.leaves(study.params(trial, seed)):
                told.update(np.asarray(leaf).tobytes())
    return told.hexdigest()
