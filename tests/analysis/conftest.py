"""Synthetic studies with a known truth."""

import numpy as np
import pytest

from playbook_optax.records.study import Study
from playbook_optax.search_space import Float, SearchSpace

SPACE = SearchSpace(
    {
        "learning_rate": Float(1e-3, 1.0, scale="log"),
        "b1": Float(0.9, 0.99, scale="reverse_log"),
    }
)


def _make(
    seed=0,
    num_trials=32,
    optimum=0.5,
    curvature=0.9,
    b1_effect=0.0,
    noise=0.02,
    evaluation_noise=0.01,
    fails_above=None,
    drift=0.0,
    settle=0.15,
    num_evals=21,
    space=SPACE,
):
    """A bowl in log learning_rate with its optimum at a unit position; 1000 steps of training.

    drift: improvement over training at a steady pace. settle: time constant of the first decline.
    fails_above: unit position of learning_rate above which trials are NaN.
    """
    rng = np.random.default_rng(seed)
    unit = rng.random((num_trials, 2))
    points = {
        "learning_rate": 10 ** (-3 + 3 * unit[:, 0]),
        "b1": 1 - 10 ** (-1 - unit[:, 1]),
    }
    final = 0.2 + curvature * (unit[:, 0] - optimum) ** 2 + b1_effect * (unit[:, 1] - 0.5) ** 2
    final = final + noise * rng.normal(size=num_trials)
    time = np.linspace(0, 1, num_evals)
    curve = final[:, None] + 2 * np.exp(-time / settle) + drift * (1 - time)
    curve = curve + evaluation_noise * rng.normal(size=curve.shape)
    train = 2.3 - time + 0 * curve
    if fails_above is not None:
        bad = unit[:, 0] > fails_above
        curve[bad, 1:] = np.nan
        train[bad, 1:] = np.nan
    metrics = {"valid/loss": curve, "train/loss": train, "valid/accuracy": 1 - curve / 4}
    step = np.round(1000 * time).astype(int)
    return Study.from_arrays(points, metrics, step, objective="valid/loss", space=space)


@pytest.fixture(scope="session")
def make_study():
    return _make
