"""Whether two processes train the same study, and whether they compute the same bits."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from playbook_optax.runner import plan

# How far a study has come, not which study it is; a table of points is compared by its digest.
_PROGRESS = ("num_trials", "points")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def machine() -> dict[str, Any]:
    """Versions, device kind and threads per device of this process: what bits depend on."""
    return {**plan.environment(), "threads_per_device": _threads_per_device()}


def _threads_per_device() -> int | None:
    """Threads that XLA gives each CPU device; None on an accelerator, where it does not matter."""
    if jax.default_backend() != "cpu":
        return None
    reserved = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or ""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    if reserved.isdigit() and int(reserved):
        cores = int(reserved)
    return max(1, cores // jax.local_device_count())


def differences(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    there: str,
    here: str = "here",
    ignore: Sequence[str] = _PROGRESS,
) -> list[str]:
    """What differs between two specs or machines, as parts of a sentence.

    Args:
      theirs: one of them.
      ours: the other.
      there: who has `theirs`, such as "in process 0".
      here: who has `ours`.
      ignore: names that may differ.

    Returns:
      One entry for each name that differs, in `ours`' order.
    """
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in ignore]
    show = _short.repr
    return [
        f"{name} is {show(theirs.get(name))} {there} and {show(ours.get(name))} {here}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
