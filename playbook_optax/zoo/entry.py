"""The zoo's register: each workload with the optimizer, search space and budget to tune it by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax

from playbook_optax import _checks, optimizers
from playbook_optax.search_space import Float, SearchSpace
from playbook_optax.trials.workload import Workload
from playbook_optax.zoo import digits, tabular, text


@dataclasses.dataclass(frozen=True)
class Entry:
    """One workload of the zoo, ready to be tuned.

    Attributes:
      name: its name.
      summary: one line for people.
      optimizer: name of the optimizer in `playbook_optax.optimizers`.
      space: its hyperparameters: learning rate on a log scale, and momentum on a reverse_log one,
        which searches 1 - momentum by orders of magnitude.
      num_trials: trials of a study that finishes in about a minute on two cores.
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
    """

    name: str
    summary: str
    _build: Callable[[], Workload] = dataclasses.field(repr=False)
    optimizer: str
    space: SearchSpace
    num_trials: int
    num_steps: int
    eval_every: int

    @property
    def workload(self) -> Workload:
        """The workload, built when asked for.

        Raises:
          ImportError: scikit-learn is not installed (the extra ``data``).
        """
        return self._build()

    def make_optimizer(self, point: Mapping[str, Any]) -> optax.GradientTransformation:
        """The optimizer at a point.

        Args:
          point: a value for each hyperparameter of `space`; numbers or traced scalars.

        Returns:
          The transformation.
        """
        transform: optax.GradientTransformation = getattr(optimizers, self.optimizer)(**point)
        return transform


def _momentum_space(largest_rate: float) -> SearchSpace:
    return SearchSpace(
        {
            "learning_rate": Float(1e-4, largest_rate, scale="log"),
            "momentum": Float(0.5, 0.99, scale="reverse_log"),
        }
    )


_SMALL_BUDGET = (32, 400, 20)


@functools.cache
def _entries() -> dict[str, Entry]:
    resmlp = digits.digits_resmlp
    found: tuple[tuple[str, str, Callable[[], Workload], float, tuple[int, int, int]], ...] = (
        ("digits_mlp", "plain MLP, 1 hidden layer of 128", digits.digits_mlp, 10.0, _SMALL_BUDGET),
        (
            "digits_resmlp",
            "12-block residual MLP, Norm(x + f(x)): unstable",
            resmlp,
            1.0,
            _SMALL_BUDGET,
        ),
        (
            "digits_resmlp_pre",
            "12-block residual MLP, x + f(Norm(x))",
            functools.partial(resmlp, "pre"),
            1.0,
            _SMALL_BUDGET,
        ),
        (
            "digits_resmlp_none",
            "12-block residual MLP, x + f(x): the most unstable",
            functools.partial(resmlp, "none"),
            1.0,
            _SMALL_BUDGET,
        ),
        (
            "digits_resmlp_none_rezero",
            "12-block residual MLP, x + s f(x), s from 0 (ReZero)",
            functools.partial(resmlp, "none", True),
            1.0,
            _SMALL_BUDGET,
        ),
        (
            "digits_recurrent",
            "recurrent net, a pixel at a time: spikes in mid-training",
            digits.digits_recurrent,
            0.3,
            _SMALL_BUDGET,
        ),
        (
            "digits_cnn",
            "CNN, two 3 x 3 convolutions: ten times the MLP's work",
            digits.digits_cnn,
            3.0,
            (16, 200, 20),
        ),
        (
            "breast_cancer",
            "MLP on 569 tumours, 30 columns, 2 classes",
            tabular.breast_cancer,
            10.0,
            _SMALL_BUDGET,
        ),
        ("wine", "MLP on 178 wines, 13 columns, 3 classes", tabular.wine, 10.0, _SMALL_BUDGET),
        (
            "diabetes",
            "MLP on 442 patients, 10 columns: regression",
            tabular.diabetes,
            10.0,
            _SMALL_BUDGET,
        ),
        (
            "bytes_transformer",
            "4-layer byte transformer, Norm(x + f(x)): unstable",
            text.bytes_transformer,
            3.0,
            (16, 256, 32),
        ),
    )
    return {
        name: Entry(name, summary, build, "momentum", _momentum_space(largest), *budget)
        for name, summary, build, largest, budget in found
    }


def names() -> tuple[str, ...]:
    """The names that `load` knows.

    Returns:
      The names.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.names()[:2]
      ('digits_mlp', 'digits_resmlp')

    Source: playbook, "Choosing the model architecture".
    """
    return tuple(_entries())


@_checks.named_arguments
def load(name: str) -> Entry:
    """A workload of the zoo with what is needed to tune it.

    Args:
      name: one of `names`.

    Returns:
      The entry; its ``workload`` is built when asked for.

    Raises:
      ValueError: there is no such name; the nearest is named.

    Example:
      >>> from playbook_optax import zoo
      >>> entry = zoo.load("digits_resmlp")
      >>> entry.optimizer, list(entry.space)
      ('momentum', ['learning_rate', 'momentum'])

    Source: playbook, "Choosing the initial configuration".
    """
    entries = _entries()
    if name not in entries:
        raise ValueError(f"workload {name!r} is unknown: {_checks.nearest(name, entries)}")
    return entries[name]
