"""Worlds for the findings of `diagnose` and the info tables beneath it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from playbook_optax.analysis.training_length import (
    training_length_findings,
    training_length_info,
)
from playbook_optax.records.study import Study
from tests.truth.table import Case

Draw = Callable[[np.random.Generator], Any]

# Training length --------------------------------------------------------------------------------


def curves(
    rng: np.random.Generator,
    curve: np.ndarray,
    noise: float,
    num_trials: int = 20,
    num_steps: int = 1000,
    **more: Any,
) -> Study:
    """Trials that share a curve, up to where they end, each evaluation with noise."""
    offsets = 0.02 * curve[-1] * rng.random((num_trials, 1))
    values = curve + offsets + noise * rng.normal(size=(num_trials, len(curve)))
    step = np.round(num_steps * np.linspace(0, 1, len(curve))).astype(int)
    metrics = {"valid/loss": values}
    if "rate" in more:
        metrics["learning_rate"] = np.broadcast_to(more.pop("rate"), values.shape)
    return Study.from_arrays(
        {"x": np.arange(num_trials)}, metrics, step, objective="valid/loss", **more
    )


def time(num_evals: int) -> np.ndarray:
    """Shares of training at which it is evaluated."""
    return np.linspace(0, 1, num_evals + 1)


def cosine(t: np.ndarray) -> np.ndarray:
    """A cosine decay as a share of its peak."""
    return 0.5 + 0.5 * np.cos(np.pi * np.minimum(t, 1))


def regression(num_steps: int, floor: float = 0.02, num_evals: int = 40) -> np.ndarray:
    """The loss of least squares under a cosine decay, exactly: many directions, many rates."""
    curvature = np.arange(1, 65) ** -1.5
    travelled = np.concatenate([[0], np.cumsum(cosine(np.arange(num_steps) / num_steps))])
    left = np.exp(-2 * 0.5 * curvature[:, None] * travelled)
    loss = floor + np.mean(left * curvature[:, None] ** 0.2, axis=0)
    return np.asarray(loss[np.round(num_steps * time(num_evals)).astype(int)])


def told(code: str, study: Draw, **arguments: Any) -> Draw:
    """Whether the length of a study gets this verdict."""

    def draw(rng: np.random.Generator) -> bool:
        info = training_length_info(study(rng), **arguments)
        return code in [finding.code for finding in training_length_findings(info)]

    return draw


BOUND, NOT_BOUND, UNKNOWN = "compute_bound", "not_compute_bound", "compute_bound_unknown"
T = time(40)
TWO_PHASES = 1.9 * np.exp(-T / 0.02) + 0.4 * 2.0**-T
LENGTHS: tuple[tuple[str, str, Draw], ...] = (
    *(
        (
            NOT_BOUND,
            f"flat since a tenth of training, noise {noise:.1%} of the end",
            lambda rng, noise=noise: curves(rng, 0.2 + 2 * np.exp(-time(60) / 0.02), noise * 0.2),
        )
        for noise in (0.001, 0.01, 0.1)
    ),
    (
        NOT_BOUND,
        "an error rate that stays at one value, an example more or less",
        lambda rng: curves(
            rng,
            np.round(100 * (0.1 + 0.8 * np.exp(-T / 0.02))) / 100,
            0.0,
            resolution={"valid/loss": 0.01},
        ),
    ),
    (
        NOT_BOUND,
        "a recorded constant rate, and flat since a third of training",
        lambda rng: curves(rng, 0.2 + 2 * np.exp(-T / 0.05), 0.002, rate=1.0),
    ),
    *(
        (
            BOUND,
            f"two phases: 2.3, 0.2 at the end, 0.1 after twice the steps, noise {noise}",
            lambda rng, noise=noise: curves(rng, TWO_PHASES, noise),
        )
        for noise in (0.0005, 0.002, 0.005)
    ),
    *(
        (
            BOUND,
            f"a power of the step, twice the steps gain {1 - 2**-power:.0%}, noise {noise:.1%}",
            lambda rng, noise=noise, power=power: curves(rng, (T + 1e-3) ** -power, noise),
        )
        for power, noise in ((0.3, 0.01), (0.15, 0.005), (0.5, 0.02))
    ),
    *(
        (
            BOUND,
            f"least squares under a recorded cosine decay, {num_steps} steps",
            lambda rng, num_steps=num_steps: curves(
                rng,
                regression(num_steps),
                0.001 * regression(num_steps)[-1],
                num_steps=num_steps,
                rate=cosine(T),
            ),
        )
        for num_steps in (75, 150, 300)
    ),
    (
        UNKNOWN,
        "a noise floor that falls with the rate, which is recorded",
        lambda rng: curves(
            rng, 0.2 + 0.3 * cosine(T) + 2 * np.exp(-T / 0.02), 0.002, rate=cosine(T)
        ),
    ),
    (
        UNKNOWN,
        "a steady fall, and noise half as large as all of it",
        lambda rng: curves(rng, 2 - 0.3 * time(20), 0.15, num_trials=6),
    ),
)
# Of a decay that nobody recorded it can only be said that it is no saturation.
UNRECORDED = tuple(
    Case(
        NOT_BOUND,
        f"least squares under a cosine decay nobody recorded, {num_steps} steps",
        False,
        told(
            NOT_BOUND,
            lambda rng, num_steps=num_steps: curves(
                rng, regression(num_steps), 0.002 * regression(num_steps)[-1], num_steps=num_steps
            ),
        ),
    )
    for num_steps in (75, 150, 300)
)
CASES: tuple[Case, ...] = (
    *(
        Case(code, world, code == truth, told(code, study))
        for truth, world, study in LENGTHS
        for code in (BOUND, NOT_BOUND, UNKNOWN)
        if code != UNKNOWN or truth == UNKNOWN
    ),
    *UNRECORDED,
)
"""All cases of the truth table."""
