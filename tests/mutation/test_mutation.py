"""The tests notice small faults in records, runner and command line."""

import pytest

from tests.mutation import run
from tests.mutation.mutations import MUTATIONS


def test_every_mutation_can_be_made():
    run.check(MUTATIONS)
    assert len(MUTATIONS) >= 60
    found = {one.file.partition("/")[0] for one in MUTATIONS}
    assert found == {"records", "runner", "procedures", "cli.py"}


@pytest.mark.slow
def test_mutations_are_killed(tmp_path):
    outcomes = run.run_all(tmp_path, MUTATIONS)
    killed = sum(one.killed for one in outcomes)
    assert killed >= 0.9 * len(outcomes)
    unexplained = [
        one.mutation.name for one in outcomes if not one.killed and not one.mutation.survives
    ]
    assert unexplained == []
    explained = [one.mutation.name for one in outcomes if one.killed and one.mutation.survives]
    assert explained == []
