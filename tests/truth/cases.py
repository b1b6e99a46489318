"""All cases of the truth table."""

from tests.truth import analysis_cases, procedure_cases
from tests.truth.table import Case

CASES: tuple[Case, ...] = (*analysis_cases.CASES, *procedure_cases.CASES)
