"""Which of equals is best: what else was recorded decides, before their order does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from playbook_optax import _checks

_LOSS = "loss"
_TRAINING_LOSS = f"train/{_LOSS}"
_UNDECIDED = float(np.log(2))


def tie_breakers(objective: str, names: Iterable[str]) -> tuple[str, ...]:
    """Metrics that decide between equal values of an objective, the first one first.

    An error rate over few examples is often the same for many checkpoints and trials; the loss of
    the same examples, and then that of training, still tells them apart.

    Args:
      objective: such as ``"valid/error_rate"``.
      names: the metrics that are recorded.

    Returns:
      Their names; smaller is better for all of them.

    Example:
      >>> tie_breakers("valid/error_rate", ["valid/error_rate", "train/loss", "valid/loss"])
      ('valid/loss', 'train/loss')
    """
    split, slash, _ = objective.rpartition("/")
    known = set(names) - {objective}
    wanted = dict.fromkeys((f"{split}{slash}{_LOSS}", _TRAINING_LOSS))
    return tuple(name for name in wanted if name in known)


def check_resolution(resolution: Any, objective: str) -> dict[str, float]:
    """What one example changes each metric by, as a dict.

    Args:
      resolution: metric to number, a number for the objective, or None.
      objective: name of the objective.

    Returns:
      Metric to number; empty where nothing is known.

    Raises:
      ValueError: a number that is not finite and above 0.
      ArgumentTypeError: neither a number nor a dict of them.
    """
    if resolution is None:
        return {}
    told = resolution if isinstance(resolution, Mapping) else {objective: resolution}
    for name, value in told.items():
        _checks.check_number(f"resolution[{name!r}]", value, above=0.0)
    return {str(name): float(value) for name, value in told.items()}


def best_evaluation(
    loss: np.ndarray, others: Sequence[np.ndarray], earliest: bool = False
) -> np.ndarray:
    """The evaluation at which a loss is least; of equals the least of the others, then the latest.

    Args:
      loss: (..., eval), infinite where it does not count.
      others: curves of the tie breakers, each (..., eval); NaN is worse than any number.
      earliest: whether what they leave equal goes to the earliest instead.

    Returns:
      Its index, (...), of any evaluation where none counts.

    Example:
      >>> int(best_evaluation(np.array([3.0, 1, 1, 1]), [np.array([9.0, 5, 4, 4])]))
      3
    """
    tied = loss == loss.min(axis=-1, keepdims=True)
    for other in others:
        worth = np.where(tied & ~np.isnan(other), other, np.inf)
        tied &= worth == worth.min(axis=-1, keepdims=True)
    if earliest:
        first: np.ndarray = tied.argmax(axis=-1)
        return first
    last: np.ndarray = loss.shape[-1] - 1 - tied[..., ::-1].argmax(axis=-1)
    return last


def best_first(loss: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Indices that sort trials by their loss; of equals by the others, then by their number.

    Args:
      loss: (trial,), infinite where there is none.
      others: the tie breakers of each trial, (trial,).

    Returns:
      The indices, int (trial,).

    Example:
      >>> best_first(np.array([1.0, 0.0, 0.0]), [np.array([0.1, 0.3, 0.2])])
      array([2, 1, 0])
    """
    worths = [np.where(np.isnan(other), np.inf, other) for other in others]
    return np.lexsort([*reversed(worths), loss])


def settled_first(
    loss: np.ndarray,
    others: Sequence[np.ndarray],
    resolution: float,
    points: Sequence[np.ndarray],
) -> np.ndarray:
    """Indices that sort trials by what can be told apart; the middle of what cannot comes first.

    What lies within the resolution of the best is a tie. Among these, the same holds for each of
    the others in turn, with the loss that one undecided example of two classes makes: a loss far
    below it says how sure a model is and no more. Trials that are equal in all of this are sorted
    by their distance from the middle of their range, in ranks of their hyperparameters.

    Args:
      loss: (trial,), infinite where there is none.
      others: the tie breakers of each trial, losses of shape (trial,).
      resolution: what one example changes the loss by; with 0 it is `best_first`.
      points: the hyperparameters, each (trial,).

    Returns:
      The indices, int (trial,).

    Example:
      >>> rates = np.array([0.001, 0.01, 0.1, 1.0])
      >>> settled_first(np.array([0.2, 0.0, 0.03, 0.0]), [], 0.03, [rates])
      array([2, 1, 3, 0])
    """
    tied = tied_with_best(loss, resolution)
    order = best_first(np.where(tied, loss.min(initial=np.inf), loss), others)
    if not resolution:
        return order
    equal = tied
    for other in others:
        worth = np.where(equal & ~np.isnan(other), other, np.inf)
        if np.isfinite(worth.min(initial=np.inf)):
            equal = tied_with_best(worth, _UNDECIDED * resolution)
    place = np.select([equal, tied], [0, 1], 2)
    distance = np.zeros(len(loss))
    for values in points:
        rank = _ranks(values)
        distance[equal] += (rank[equal] - np.median(rank[equal])) ** 2 if equal.any() else 0.0
    # lexsort is stable: what is left equal stays in the order of `best_first`.
    return order[np.lexsort([distance[order], place[order]])]


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0 to 1; equal values have one rank."""
    known, rank = np.unique(values, return_inverse=True)
    return rank / max(len(known) - 1, 1)


def tied_with_best(loss: np.ndarray, resolution: float) -> np.ndarray:
    """Which losses lie within the resolution of the least.

    Args:
      loss: any shape.
      resolution: what one example changes it by; 0 leaves exact equality.

    Returns:
      Booleans of its shape.
    """
    # Error rates are means in float32: one example is one up to their rounding.
    tied: np.ndarray = loss <= loss.min(initial=np.inf) + 1.001 * resolution
    return tied & np.isfinite(loss)
