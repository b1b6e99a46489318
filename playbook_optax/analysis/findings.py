"""A Finding: one thing that a study says, with the numbers that say it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from playbook_optax import _checks
from playbook_optax._text import PARAGRAPH, printable

SEVERITIES = ("error", "warning", "info")
"""The severities of a Finding, the gravest first."""


def _plain(value: Any, path: str) -> Any:
    """`value` as strict JSON can hold it; numbers that are not finite become their names."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}[{k!r}]") for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), path)
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
    raise _checks.ArgumentTypeError(
        f"{path} = {value!r} of type {type(value).__name__} cannot be stored as JSON. Give "
        "numbers, strings, or lists and dicts of them."
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Finding:
    """One thing that a study says.

    Attributes:
      code: short name of the kind of finding, such as `best_near_boundary`; stable, for programs.
        This text and those below are fit for a terminal: what commands one is an escape.
      severity: `"error"` (the study answers nothing), `"warning"` (act before trusting it) or
        `"info"`.
      message: what was found, in complete sentences with the numbers.
      evidence: the numbers, as strict JSON holds them (NaN and infinities become strings).
      section: heading of the playbook's section that asks for the check.
      suggestion: what to do next, in complete sentences; empty if there is nothing to do.

    Raises:
      ValueError: an unknown severity, or evidence that JSON cannot hold.

    Example:
      >>> finding = Finding("few_trials", "info", "Only 3 trials ran.", {"num_trials": 3},
      ...                   "How many trials are needed?", "Run 20.")
      >>> print(finding)
      info: Only 3 trials ran. Run 20. [few_trials; How many trials are needed?]
    """

    code: str
    severity: str
    message: str
    evidence: Mapping[str, Any]
    section: str
    suggestion: str = ""

    def __post_init__(self) -> None:
        _checks.check_choice("severity", self.severity, SEVERITIES)
        # They tell names of a study, which may be anybody's.
        for name in ("code", "message", "section", "suggestion"):
            object.__setattr__(self, name, printable(getattr(self, name), PARAGRAPH))
        object.__setattr__(self, "evidence", _plain(dict(self.evidence), "evidence"))

    def __repr__(self) -> str:
        told = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return printable(f"Finding({', '.join(told)})", PARAGRAPH)

    def __str__(self) -> str:
        advice = f" {self.suggestion}" if self.suggestion else ""
        return f"{self.severity}: {self.message}{advice} [{self.code}; {self.section}]"

    def to_dict(self) -> dict[str, Any]:
        """The finding as a dict that `json.dumps(..., allow_nan=False)` accepts.

        Returns:
          A new dict with the six attributes.
        """
        return dataclasses.asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts findings, the gravest first; equally grave ones keep their order.

    Args:
      findings: any findings.

    Returns:
      A new list.
    """
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
