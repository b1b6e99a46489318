"""Worlds for the findings of `diagnose` and the info tables beneath it."""

from tests.truth.table import Case

CASES: tuple[Case, ...] = ()
