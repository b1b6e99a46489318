"""What every procedure returns."""

import dataclasses
from typing import Any

from playbook_optax.analysis.findings import Finding
from playbook_optax.records.study import Study


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer of a procedure and its evidence.

    Attributes:
      answer: what was asked for, or None when the procedure refuses to conclude; a Finding says
        why.
      findings: what was seen, most severe first.
      studies: the studies that it rests on, by name.
      cost: trial-steps spent.
    """

    answer: Any
    findings: tuple[Finding, ...]
    studies: dict[str, Study]
    cost: int
