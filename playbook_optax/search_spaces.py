"""Search spaces of our optimizers: which hyperparameters a number of trials can pay for.

The names are the arguments of the optimizers, so that ``pbx.adam(**point)`` is the optimizer of a
point whatever the budget; what is not searched keeps its default. The dimensions join in a fixed
order, so that the space of a small budget is the beginning of that of a larger one.

The ranges are wide enough for small and large networks alike and hold the usual defaults inside.
They are where a search begins: `pbx.diagnose` says when the best trials lie at an edge, and which
wider range to try.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from playbook_optax import _checks
from playbook_optax.search_space import Float, SearchSpace

FEW_TRIALS = 10
"""With fewer trials than this only the learning rate is searched."""
SOME_TRIALS = 25
"""From this many trials on three dimensions are searched, as the playbook's "25+" has it."""
MANY_TRIALS = 50
"""What "substantially more than 25" is taken to mean, unless the caller says otherwise."""


class Dimension(NamedTuple):
    """One hyperparameter of an optimizer.

    Attributes:
      tier: 0 searched always; 1 from 10 trials on; 2 from 25 on; 3 from `many_trials` on.
      parameter: its range and scale.
    """

    tier: int
    parameter: Float


# Adam's steps are about as long as the learning rate, whatever the gradients: 1e-3, the usual
# default, and the half decade above it, where small networks train best, lie well inside.
_ADAPTIVE_RATE = Float(1e-4, 1e-1, scale="log")
# Averages over 2 to 100 gradients, for Adam and for momentum alike.
_MOMENTUM = Float(0.5, 0.99, scale="reverse_log")
# Averages over 10 to 10,000 squared gradients: the default of 1000 is longer than a short run.
_SECOND_MOMENT = Float(0.9, 0.9999, scale="reverse_log")
# From hardly noticeable up to where eps outweighs most gradients and the steps become those of
# momentum. Above that it rescales the learning rate, whose range would have to move along.
_EPS = Float(1e-9, 1e-3, scale="log")
# Multiplied by the learning rate: 1e-4 does nothing in a short run, 1 forgets in 1/rate steps.
_WEIGHT_DECAY = Float(1e-4, 1.0, scale="log")

_ADAM = {
    "learning_rate": Dimension(0, _ADAPTIVE_RATE),
    "b1": Dimension(1, _MOMENTUM),
    "eps": Dimension(2, _EPS),
    "b2": Dimension(3, _SECOND_MOMENT),
}
_ADAMW = {
    "learning_rate": Dimension(0, _ADAPTIVE_RATE),
    "b1": Dimension(1, _MOMENTUM),
    "weight_decay": Dimension(1, _WEIGHT_DECAY),
    "eps": Dimension(2, _EPS),
    "b2": Dimension(3, _SECOND_MOMENT),
}
_WITH_MOMENTUM = {
    # Momentum m multiplies the length of steps by up to 1 / (1 - m), a hundred here, so that good
    # rates lie up to two decades below those of plain SGD.
    "learning_rate": Dimension(0, Float(1e-4, 1.0, scale="log")),
    "momentum": Dimension(1, _MOMENTUM),
}

TABLE: Mapping[str, Mapping[str, Dimension]] = {
    # The limit of stability is 2 / curvature: around 1 for normalized inputs, less when deep.
    "sgd": {"learning_rate": Dimension(0, Float(1e-3, 10.0, scale="log"))},
    "momentum": _WITH_MOMENTUM,
    "nesterov": _WITH_MOMENTUM,
    "rmsprop": {
        "learning_rate": Dimension(0, Float(1e-5, 1e-1, scale="log")),
        # Its default, none, is the low end; on this scale half of the trials have 0.9 or more.
        "momentum": Dimension(1, Float(0.0, 0.99, scale="reverse_log")),
        # Inside the root, so that it compares with squares: gradients of 1e-7 to 1e-3.
        "eps": Dimension(2, Float(1e-14, 1e-6, scale="log")),
        "decay": Dimension(3, Float(0.9, 0.999, scale="reverse_log")),
    },
    "adam": _ADAM,
    "nadam": _ADAM,
    "adamw": _ADAMW,
    "nadamw": _ADAMW,
}
"""Optimizer to its hyperparameters, in the order in which they join the search."""


def _tier(num_trials: int, many_trials: int) -> int:
    """How much a budget pays for: 0 to 3."""
    num_trials = _checks.check_count("num_trials", num_trials, fix="Ask for at least one trial.")
    many_trials = _checks.check_count(
        "many_trials",
        many_trials,
        at_least=SOME_TRIALS + 1,
        fix='It stands for "substantially more than 25".',
    )
    return (num_trials >= FEW_TRIALS) + (num_trials >= SOME_TRIALS) + (num_trials >= many_trials)


@_checks.named_arguments
def adam_search_space(num_trials: int, many_trials: int = MANY_TRIALS) -> SearchSpace:
    """The hyperparameters of Adam that are worth searching with so many trials.

    ====================== =====================================
    trials                 searched, jointly
    ====================== =====================================
    1 to 9                 learning_rate
    10 to 24               learning_rate, b1
    25 to many_trials - 1  learning_rate, b1, eps
    many_trials or more    learning_rate, b1, eps, b2
    ====================== =====================================

    The playbook's rows meet at 25, which is taken for the first of "25+". Ranges: learning_rate
    1e-4 to 1e-1 (log), b1 0.5 to 0.99 (log in 1 - b1: averages over 2 to 100 gradients), eps 1e-9
    to 1e-3 (log; above that it rescales the learning rate), b2 0.9 to 0.9999 (log in 1 - b2).

    Args:
      num_trials: trials of the study.
      many_trials: what "substantially more than 25" means, at least 26.

    Returns:
      The `SearchSpace`; its names are arguments of `pbx.adam` (and of `optax.adam`).

    Raises:
      ValueError: `num_trials` is not a positive integer, or `many_trials` is not above 25.

    Example:
      >>> import playbook_optax as pbx
      >>> [list(pbx.adam_search_space(n)) for n in (9, 10, 25)]
      [['learning_rate'], ['learning_rate', 'b1'], ['learning_rate', 'b1', 'eps']]
      >>> list(pbx.adam_search_space(50))
      ['learning_rate', 'b1', 'eps', 'b2']

    Source: playbook, "How should Adam's hyperparameters be tuned?"
    """
    return optimizer_search_space("adam", num_trials, many_trials)


@_checks.named_arguments
def optimizer_search_space(
    optimizer: str, num_trials: int, many_trials: int = MANY_TRIALS
) -> SearchSpace:
    """The hyperparameters of one of our optimizers that are worth searching with so many trials.

    The playbook has a table for Adam (`adam_search_space`), which holds for ``nadam`` as it is.
    For the others its steps are used in the same spirit, which is our judgement:

    - ``sgd``: learning_rate, whatever the budget.
    - ``momentum``, ``nesterov``: learning_rate; from 10 trials on also momentum.
    - ``rmsprop``: learning_rate; from 10 on momentum; from 25 on eps; from `many_trials` on decay.
    - ``adamw``, ``nadamw``: as Adam, with weight_decay beside b1 from 10 trials on.

    Args:
      optimizer: its name, as in ``pbx.<optimizer>``.
      num_trials: trials of the study.
      many_trials: what "substantially more than 25" means, at least 26.

    Returns:
      The `SearchSpace`; its names are arguments of the optimizer, so that ``pbx.<optimizer>(
      **point)`` is the optimizer of a point.

    Raises:
      ValueError: the optimizer is unknown, `num_trials` is not a positive integer, or `many_trials`
        is not above 25.

    Example:
      >>> import playbook_optax as pbx
      >>> space = pbx.optimizer_search_space("nesterov", 20)
      >>> space["momentum"]
      Float(low=0.5, high=0.99, scale='reverse_log')

    Source: playbook, "How should Adam's hyperparameters be tuned?"
    """
    if not isinstance(optimizer, str):
        raise _checks.ArgumentTypeError(
            f"optimizer must be one of {', '.join(TABLE)}, got {optimizer!r}; for one of your own "
            "write the pbx.SearchSpace."
        )
    _checks.check_choice("optimizer", optimizer, TABLE)
    tier = _tier(num_trials, many_trials)
    return SearchSpace(
        {name: row.parameter for name, row in TABLE[optimizer].items() if row.tier <= tier}
    )
