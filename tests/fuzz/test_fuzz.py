"""Edited records from anywhere: a right result or our own error, in bounded time and memory."""

import pytest

from tests.fuzz import cases


def test_a_thousand_edited_records(tmp_path):
    assert cases.run(tmp_path, 1000, seed=13) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_edited_records(tmp_path, part):
    assert cases.run(tmp_path, 10_000, seed=1, first=10_000 * part) == []
