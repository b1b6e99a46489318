"""The truth table: cases, the targets that their rates must meet, and the page that prints them."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable

import numpy as np

MAX_FALSE_ALARMS, MIN_HITS = 0.05, 0.80
BEGIN, END = "<!-- rates: python -m tests.truth --write -->", "<!-- end of rates -->"
"""Between these lines of its page the table stands."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A world with a known answer, and the question whether a verdict is given in it.

    Attributes:
      says: the verdict: a Finding's code, or a procedure and its answer.
      world: what the draws are like, in a few words.
      holds: whether the verdict is true of this world.
      draw: `rng -> bool`, whether it was given in one draw.
    """

    says: str
    world: str
    holds: bool
    draw: Callable[[np.random.Generator], bool]

    @property
    def name(self) -> str:
        """What tests call it."""
        return f"{self.says}: {self.world}"

    @property
    def target(self) -> float:
        """The least rate where the verdict holds, the largest where it does not."""
        return MIN_HITS if self.holds else MAX_FALSE_ALARMS


def rate(case: Case, num_draws: int) -> float:
    """The part of draws in which the verdict was given.

    Args:
      case: the world; its draws are the same at each call.
      num_draws: how many.
    """
    seed = zlib.crc32(case.name.encode())
    given = [case.draw(np.random.default_rng((seed, draw))) for draw in range(num_draws)]
    return float(np.mean(given))


def meets(case: Case, found: float, num_draws: int, sigmas: float = 0.0) -> bool:
    """Whether a rate meets the target of its case.

    Args:
      case: the world.
      found: its rate.
      num_draws: draws that it is from.
      sigmas: standard deviations of such a rate at the target that it may miss it by.
    """
    slack = sigmas * math.sqrt(case.target * (1 - case.target) / num_draws)
    return found >= case.target - slack if case.holds else found <= case.target + slack


def page(rates: Iterable[tuple[Case, float]], num_draws: int) -> str:
    """A table in Markdown.

    Args:
      rates: cases with their rates.
      num_draws: draws that each is from.
    """
    lines = [
        "| verdict | world | given | wanted |",
        "| --- | --- | ---: | --- |",
    ]
    for case, found in sorted(rates, key=lambda pair: (pair[0].says, not pair[0].holds)):
        wanted = f"≥ {MIN_HITS:.0%}" if case.holds else f"≤ {MAX_FALSE_ALARMS:.0%}"
        lines.append(f"| `{case.says}` | {case.world} | {found:.1%} | {wanted} |")
    return "\n".join([*lines, "", f"Draws of each world: {num_draws:,}.", ""])


def between(text: str, told: str) -> str:
    """A page with another table between its markers.

    Args:
      text: the page.
      told: the table.

    Raises:
      ValueError: a marker is not there.
    """
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n\n{told}\n{text[after:]}"
