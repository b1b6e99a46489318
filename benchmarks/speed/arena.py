"""Where contenders wait for their turn, inside a worker."""

import importlib
import sys
import time
from typing import Any, Protocol


class Contender(Protocol):
    """Something that trains trials and can be timed, compiled already.

    Attributes:
      trial_steps: steps that one call of `train` takes, over all its trials.
      facts: what the result says about it, JSON-able.
    """

    trial_steps: int
    facts: dict[str, Any]

    def train(self) -> None:
        """Trains `trial_steps` steps and waits for them."""


_waiting: dict[str, Contender] = {}


def load(path: str) -> Any:
    """What ``module:name`` names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def prepare(label: str, maker: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compiles a contender and keeps it under a label.

    Args:
      label: what `measure` calls it.
      maker: ``module:name`` of what makes it.
      arguments: what the maker takes.

    Returns:
      Its facts, and the trial-steps of a round.
    """
    made = _waiting[label] = load(maker)(**arguments)
    return {"trial_steps": made.trial_steps, **made.facts}


def measure(label: str) -> float:
    """Microseconds per trial-step of one round."""
    made = _waiting[label]
    start = time.perf_counter()
    made.train()
    return 1e6 * (time.perf_counter() - start) / made.trial_steps


def forget() -> None:
    """Frees all contenders and what was compiled for them."""
    _waiting.clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
