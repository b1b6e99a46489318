"""Verdicts are given where they are true and not where they are false."""

import pytest

from tests.truth import cases, table

FEW = 60


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_few_draws_do_not_contradict_the_target(case):
    found = table.rate(case, FEW)
    assert table.meets(case, found, FEW, sigmas=2.5), found


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_thousand_draws_meet_the_target(case):
    found = table.rate(case, 1000)
    assert table.meets(case, found, 1000), found
