"""Worlds for the answers of the procedures."""

from tests.truth.table import Case

CASES: tuple[Case, ...] = ()
