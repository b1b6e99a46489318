"""Every procedure is asked in a world where its answer is true and in one where it is not."""

import inspect

from playbook_optax import procedures
from tests.truth import procedure_cases

NAMES = [n for n in procedures.__all__ if inspect.isfunction(getattr(procedures, n))]


def test_every_procedure_has_cases_of_both_kinds():
    known = {(case.says.partition(":")[0], case.holds) for case in procedure_cases.CASES}
    asked = [name for name in NAMES if name not in procedure_cases.NO_QUESTION]
    missing = [(n, holds) for n in asked for holds in (True, False) if (n, holds) not in known]
    assert missing == []


def test_names_of_cases_are_those_of_procedures():
    said = {case.says.partition(":")[0] for case in procedure_cases.CASES}
    assert said | set(procedure_cases.NO_QUESTION) == set(NAMES)
    assert len({case.name for case in procedure_cases.CASES}) == len(procedure_cases.CASES)
