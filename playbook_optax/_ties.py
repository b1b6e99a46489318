"""Which of equals is best: what else was recorded decides, before their order does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from playbook_optax import _checks

_LOSS = "loss"
_TRAINING_LOSS = f"train/{_LOSS}"


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


def best_evaluation(loss: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """The evaluation at which a loss is least; of equals the least of the others, then the latest.

    Args:
      loss: (..., eval), infinite where it does not count.
      others: curves of the tie breakers, each (..., eval); NaN is worse than any number.

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
