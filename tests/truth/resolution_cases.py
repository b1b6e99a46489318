"""Worlds for what a validation set of few examples can tell."""

import numpy as np

from playbook_optax.analysis.resolution import resolution_findings, resolution_info
from playbook_optax.records.study import Study
from tests.truth.table import Case

_NUM_TRIALS, _NUM_EVALS = 12, 6


def counted(rng: np.random.Generator, rates: np.ndarray, num_examples: int) -> Study:
    """Error rates (trial, eval) as they are counted on so many examples, the same in all trials.

    An example is wrong where its difficulty, which no trial changes, is below the error rate.
    """
    difficulty = np.sort(rng.random(num_examples))
    errors = np.searchsorted(difficulty, rates) / num_examples
    return Study.from_arrays(
        {"x": np.arange(len(rates))},
        {"valid/error_rate": errors.astype(np.float32)},
        100 * np.arange(rates.shape[1]),
        objective="valid/error_rate",
        resolution=1 / num_examples,
    )


def falling(rng: np.random.Generator, ends: np.ndarray, num_examples: int) -> Study:
    """Errors that fall from 0.67 to those at the end."""
    time = np.linspace(0, 1, _NUM_EVALS) ** 0.5
    return counted(rng, 0.67 + time * (ends[:, None] - 0.67), num_examples)


def spread(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Errors at the end, evenly apart, in any order."""
    return rng.permutation(np.linspace(low, high, _NUM_TRIALS))


def still(rng: np.random.Generator, noise: float) -> np.ndarray:
    """Errors that stay where they are but for a little."""
    return 0.67 + noise * rng.random((_NUM_TRIALS, _NUM_EVALS))


def rising(rng: np.random.Generator) -> np.ndarray:
    """Errors that only rise, each trial's by its own amount."""
    more = rng.uniform(0.1, 0.3, (_NUM_TRIALS, 1))
    return 0.5 + more * np.linspace(0, 1, _NUM_EVALS)


def _case(code: str, world: str, holds: bool, draw) -> Case:
    def given(rng: np.random.Generator) -> bool:
        found = resolution_findings(resolution_info(draw(rng)))
        return code in [finding.code for finding in found]

    return Case(code, world, holds, given)


CASES: tuple[Case, ...] = (
    _case("no_slope", "errors stay at 0.67 of 34", True, lambda r: counted(r, still(r, 0.0), 34)),
    _case("no_slope", "they waver by a 200th", True, lambda r: counted(r, still(r, 0.005), 34)),
    _case(
        "no_slope",
        "one trial of 12 gets to 0.4",
        False,
        lambda r: falling(r, np.r_[0.4, np.full(11, 0.67)], 34),
    ),
    _case("no_slope", "all get to 0.1", False, lambda r: falling(r, spread(r, 0.1, 0.1), 34)),
    _case("best_at_start", "errors rise from 0.5", True, lambda r: counted(r, rising(r), 200)),
    _case(
        "best_at_start", "they fall to 0.4", False, lambda r: falling(r, spread(r, 0.4, 0.6), 200)
    ),
    _case(
        "validation_cannot_separate",
        "errors of 0 to 0.06, 34 examples",
        True,
        lambda r: falling(r, spread(r, 0.0, 0.06), 34),
    ),
    _case(
        "validation_cannot_separate",
        "errors of 0 to 0.5, 1,000 examples",
        False,
        lambda r: falling(r, spread(r, 0.0, 0.5), 1000),
    ),
)
