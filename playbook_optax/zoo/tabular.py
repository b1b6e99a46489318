"""Workloads on three small tables of scikit-learn: two of classes, one of a number to predict.

Three fifths of the rows are to train, a fifth to validate and a fifth to test, by `split_seed`.
Columns are standardized by mean and deviation of the training part, as is the number to predict.
"""

from __future__ import annotations

import functools

import numpy as np

from playbook_optax import _checks
from playbook_optax.trials.workload import Workload
from playbook_optax.zoo import blocks, splits


@functools.cache
def _table(name: str, split_seed: int) -> tuple[splits.Split, splits.Split, splits.Split]:
    """The three parts."""
    datasets = _checks.require("sklearn.datasets", "data", f"The table {name!r}")
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = splits.order(len(x), split_seed)
    x, y = x[order], y[order]
    num_train = 3 * len(x) // 5
    seen = x[:num_train]
    x = ((x - seen.mean(axis=0)) / seen.std(axis=0)).astype(np.float32)
    if np.issubdtype(y.dtype, np.integer):
        y = y.astype(np.int32)
    else:
        known = y[:num_train]
        y = ((y - known.mean()) / known.std()).astype(np.float32)
    return splits.cut(x, y, num_train, 4 * len(x) // 5 - num_train)


def _workload(
    name: str, num_outputs: int, width: int, batch_size: int, split_seed: int
) -> Workload:
    train, valid, test = _table(name, _checks.check_count("split_seed", split_seed, at_least=0))
    return Workload.from_flax(
        blocks.MLP((_checks.check_count("width", width),), num_outputs),
        train=train,
        valid=valid,
        test=test,
        batch_size=_checks.check_count("batch_size", batch_size),
        loss="softmax" if num_outputs > 1 else "mse",
        name=name,
    )


@_checks.named_arguments
def breast_cancer(*, width: int = 32, batch_size: int = 32, split_seed: int = 0) -> Workload:
    """An MLP on 569 tumours of two classes, 30 columns each.

    The objective is ``valid/error_rate``; test rows reach nothing but `Workload.final_evaluate`.

    Args:
      width: units of the hidden layer.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 30), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: a count that is not a positive integer, a negative seed, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.breast_cancer().data["train"]["x"].shape
      (341, 30)

    Source: playbook, "Choosing the model architecture" (start from a simple, known model).
    """
    return _workload("breast_cancer", 2, width, batch_size, split_seed)


@_checks.named_arguments
def wine(*, width: int = 32, batch_size: int = 32, split_seed: int = 0) -> Workload:
    """An MLP on 178 wines of three classes, 13 columns each; otherwise as `breast_cancer`.

    Args:
      width: units of the hidden layer.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 13), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: a count that is not a positive integer, a negative seed, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.wine().data["train"]["x"].shape
      (106, 13)

    Source: playbook, "Choosing the model architecture" (start from a simple, known model).
    """
    return _workload("wine", 3, width, batch_size, split_seed)


@_checks.named_arguments
def diabetes(*, width: int = 32, batch_size: int = 32, split_seed: int = 0) -> Workload:
    """An MLP that predicts a disease's progress for 442 patients, 10 columns each.

    The objective is ``valid/loss``, the mean squared error in units of the training targets'
    variance: 1 is what predicting their mean gives. Otherwise as `breast_cancer`.

    Args:
      width: units of the hidden layer.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 10), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: a count that is not a positive integer, a negative seed, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.diabetes().objective
      'valid/loss'

    Source: playbook, "Choosing the model architecture" (start from a simple, known model).
    """
    return _workload("diabetes", 1, width, batch_size, split_seed)
