"""What every procedure returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from playbook_optax import _shown
from playbook_optax.analysis.findings import Finding
from playbook_optax.records.picture import picture_of
from playbook_optax.records.study import Study, best_text, size_text

# Of a printed verdict, so that answer, findings and studies have room on one screen.
_MOST_FINDINGS, _MOST_STUDIES = 8, 6


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

    def __repr__(self) -> str:
        told = {
            **_shown.fields_of(self, ("findings", "studies")),
            "findings": _shown.brief([finding.code for finding in self.findings]),
            "studies": _shown.brief({name: size_text(s) for name, s in self.studies.items()}),
        }
        return _shown.record("Verdict", {name: told[name] for name in self.__annotations__})

    def __str__(self) -> str:
        return _shown.as_text(*self._summary())

    def _repr_html_(self) -> str:
        return _shown.as_html(*self._summary(), picture_of(self.studies))

    def _summary(self) -> tuple[str, _shown.Rows]:
        """The answer as a title, and what it rests on, a row each."""
        answer = "no answer" if self.answer is None else _shown.brief(self.answer, 150)
        return f"Verdict: {answer}", [
            *finding_rows(self.findings),
            *study_rows(self.studies),
            ("cost", f"{self.cost:,} trial-steps"),
        ]


def finding_rows(findings: Sequence[Finding], most: int = _MOST_FINDINGS) -> list[tuple[str, str]]:
    """What was seen, a row each.

    Args:
      findings: most severe first.
      most: rows at most, and one that says how many more there are.

    Returns:
      Pairs of a severity and a text.
    """
    shown = [(f.severity, f"{f.message} [{f.code}]") for f in findings[:most]]
    more = len(findings) - len(shown)
    return [*shown, *([("…", f"{more} more findings")] if more else [])]


def study_rows(studies: Mapping[str, Study]) -> list[tuple[str, str]]:
    """Studies, a row each.

    Args:
      studies: name to study.

    Returns:
      Pairs of a name and a text.
    """
    first = list(studies.items())[:_MOST_STUDIES]
    shown = [(name, f"{size_text(study)}; best {best_text(study)}") for name, study in first]
    more = len(studies) - len(shown)
    return [*shown, *([("…", f"{more} more studies")] if more else [])]
