"""Cutting a data set into the parts to train, to validate and to test."""

import itertools

import numpy as np

Split = tuple[np.ndarray, np.ndarray]
"""x and y, arrays whose first axis is the example."""


def order(num_examples: int, split_seed: int) -> np.ndarray:
    """A random order of the examples, int (example,): the only thing that a split depends on.

    Args:
      num_examples: how many.
      split_seed: which order; not negative.

    Returns:
      A permutation.
    """
    return np.random.default_rng(split_seed).permutation(num_examples)


def cut(x: np.ndarray, y: np.ndarray, num_train: int, num_valid: int) -> tuple[Split, Split, Split]:
    """The three parts, in order; read-only, because every workload shares them.

    Args:
      x: shape (example, ...), made read-only.
      y: shape (example,), made read-only.
      num_train: examples of the first part.
      num_valid: examples of the second; the rest are the third.

    Returns:
      (x, y) of each part, views of the whole.
    """
    x.setflags(write=False)
    y.setflags(write=False)
    ends = (0, num_train, num_train + num_valid, len(x))
    train, valid, test = ((x[a:b], y[a:b]) for a, b in itertools.pairwise(ends))
    return train, valid, test
