"""What the user's functions do in silence: numbers of the host, and pairs nobody asked for.

Nothing is compiled: a trial's `init` is traced, which is where a study looks at the functions.
"""

import dataclasses
import datetime
import functools
import os
import random
import time
import warnings
from time import time as now

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx

KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
ENTROPY = random.SystemRandom()


def traced(workload, make_optimizer=tiny.sgd, point=None):
    """Traces a trial's beginning, as every study does; returns what it warned of."""
    trial = pbx.make_trial(workload, make_optimizer, 4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(trial.init, point or {"learning_rate": 0.1}, KEY, workload.data)
    return [str(one.message) for one in caught]


# Numbers of the host ------------------------------------------------------------------------------


def helper():
    return np.random.default_rng().normal()


def closed_over():
    mine = random.Random(0)
    return lambda: mine.random()


class Model:
    def noise(self):
        return os.urandom(1)[0]


TAKING = {
    "np.random": lambda: np.random.normal(),
    "random": lambda: random.random(),
    "np.random.Generator": lambda: GENERATOR.normal(),
    "random.Random": closed_over(),
    "random.SystemRandom": lambda: ENTROPY.random(),
    "time.time": lambda: now() % 1,
    "time.time_ns": lambda: time.time_ns() % 7,
    "datetime.now": lambda: datetime.datetime.now().microsecond,
    "np.random.default_rng": lambda: helper(),
    "np.random.RandomState": functools.partial(lambda low: np.random.RandomState().rand() + low, 1),
    "os.urandom": Model().noise,
}


@pytest.mark.parametrize("source", TAKING)
def test_numbers_of_the_host_in_a_loss_are_warned_of_once(source):  # 21
    take, quadratic = TAKING[source], tiny.quadratic()

    def loss(params, state, batch, key):
        value, rest = quadratic.loss(params, state, batch, key)
        return value * (1.0 + take()), rest

    (told,) = traced(dataclasses.replace(quadratic, loss=loss))
    assert told.startswith(f"loss takes numbers from {source}. It is traced once")
    assert "jax.random with the key" in told


@pytest.mark.parametrize("name", ["init", "batch", "evaluate", "make_optimizer"])
def test_every_function_of_the_users_is_watched(name):  # 21
    quadratic = tiny.quadratic()

    def drawing(function):
        def drawn(*args):
            np.random.normal()
            return function(*args)

        return drawn

    if name == "make_optimizer":
        found = traced(quadratic, drawing(tiny.sgd))
    else:
        found = traced(dataclasses.replace(quadratic, **{name: drawing(getattr(quadratic, name))}))
    (told,) = set(found)
    assert told.startswith(f"{name} takes numbers from np.random.")


def test_what_is_the_same_at_every_run_is_no_draw():
    weights = np.random.default_rng(0).normal(size=2)

    def init(key):
        fixed = np.random.RandomState(7).rand(2) + np.random.default_rng(3).normal(size=2)
        began = time.perf_counter()
        params = {"w": jax.random.normal(key, (2,)) + fixed + weights + random.Random(1).random()}
        assert time.perf_counter() >= began
        return params, {}

    assert traced(dataclasses.replace(tiny.quadratic(), init=init)) == []


# Pairs nobody asked for ---------------------------------------------------------------------------

BATCH = 8


def regression(loss, y_shape=(BATCH,)):
    """A linear model whose predictions have shape (BATCH, 1), with any loss(predictions, y)."""
    data = {"x": np.ones((BATCH, 3), np.float32), "y": np.ones(y_shape, np.float32)}

    def value(params, batch):
        return loss(batch["x"] @ params["w"] + params["b"][None], batch["y"], params)

    return pbx.Workload(
        name="regression",
        init=lambda key: ({"w": jnp.ones((3, 1)), "b": jnp.zeros(1), "t": jnp.ones(BATCH)}, {}),
        loss=lambda params, state, batch, key: (value(params, batch), (state, {})),
        batch=lambda data, key, step: data,
        evaluate=lambda params, state, data: {"valid/loss": jnp.sum(params["w"])},
        objective="valid/loss",
        data=data,
    )


def cross_entropy(p, y):
    return jnp.maximum(p, 0) - p * y + jnp.log1p(jnp.exp(-jnp.abs(p)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, y, _: jnp.mean((p - y) ** 2),
        lambda p, y, _: jnp.mean(jnp.abs(y - p)),
        lambda p, y, _: jnp.square(y - p).sum(-1).mean(),
        lambda p, y, _: jnp.mean(cross_entropy(p, y)),
        lambda p, y, _: jnp.mean(jnp.where(y > 0, p, 0.0)),
        lambda p, y, _: jax.jit(lambda a, b: jnp.mean((a - b) ** 2))(p, y),
        lambda p, y, _: jnp.mean(jax.checkpoint(lambda a, b: (a - b) ** 2)(p, y)),
        lambda p, y, _: jnp.mean((p.astype(jnp.bfloat16) - y.astype(jnp.bfloat16)) ** 2),
    ],
    ids=["mse", "mae", "summed", "bce", "where", "jit", "checkpoint", "cast"],
)
def test_predictions_in_a_column_against_targets_in_a_row_are_warned_of(loss):  # 23
    with jax.numpy_rank_promotion("allow"):
        (told,) = traced(regression(loss))
    assert "(8, 1) against one of shape (8,) to (8, 8)" in told
    assert "predictions[:, 0]" in told


def test_the_other_way_round_is_warned_of_and_a_workload_of_the_point():  # 23
    made = regression(lambda p, y, _: jnp.mean((p[:, 0] - y) ** 2), (BATCH, 1))
    with jax.numpy_rank_promotion("allow"):
        (told,) = traced(made)
        assert "(8, 8), in 'sub'" in told
        trial = pbx.make_trial(lambda point: made, tiny.sgd, 4, 2)
        with pytest.warns(UserWarning, match="every example"):
            jax.eval_shape(trial.init, {"learning_rate": 0.1}, KEY, made.data)


def attention(p, y, params):
    """Of the batch's examples to each other, as many as features."""
    scores = jax.nn.softmax(p * params["t"][None] + jnp.where(jnp.tri(BATCH) > 0, 0.0, -1e9))
    return jnp.mean((scores @ y) ** 2)


def contrastive(p, y, params):
    distances = (p**2).sum(-1, keepdims=True) + (y**2)[None, :] - 2 * p @ y[None, :]
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(-distances)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, y, _: jnp.mean((p[:, 0] - y) ** 2),
        lambda p, y, _: jnp.mean((p - y[:, None]) ** 2),
        lambda p, y, _: jnp.mean(jnp.exp(-((p - y[None, :]) ** 2))),
        lambda p, y, _: jnp.mean(jax.nn.relu(1 - (p - p.T) * (y[:, None] - y[None, :]))),
        lambda p, y, _: jnp.mean((p - p[:, 0]) ** 2 + y),
        lambda p, y, params: jnp.mean((p - params["t"]) ** 2 + y),
        lambda p, y, _: jnp.mean((p - np.linspace(0, 1, BATCH, dtype=np.float32)) ** 2 + y),
        lambda p, y, _: jnp.mean(jax.vmap(lambda a: (a - y) ** 2)(p[:, 0])),
        lambda p, y, _: jnp.mean((p - jnp.ones(5)) ** 2 + y[:, None]),
        attention,
        contrastive,
    ],
    ids=[
        "flat",
        "columns",
        "kernel",
        "ranking",
        "own",
        "thresholds",
        "constants",
        "vmap",
        "quantiles",
        "attention",
        "contrastive",
    ],
)
def test_pairs_that_are_meant_are_not_warned_of(loss):  # 23
    with jax.numpy_rank_promotion("allow"):
        assert traced(regression(loss)) == []
