"""The best of n trials: the exact distribution, draws from it, and what is concluded."""

import itertools
import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from playbook_optax.analysis.budgets import (
    PERCENTILES,
    BudgetInfo,
    BudgetRow,
    budget_findings,
    budget_info,
    default_budgets,
    default_min_gain,
    enough,
    rank_reached,
)
from playbook_optax.records.study import Study, study_from_blocks

KEY = jax.random.key(5)


def study(values, infeasible=None, maximize=False):
    values = np.asarray(values, np.float64)
    return Study.from_arrays(
        {"x": np.arange(len(values))},
        {"loss": values[:, None]},
        [10],
        objective="loss",
        maximize=maximize,
        infeasible=np.zeros(len(values), bool) if infeasible is None else infeasible,
    )


@pytest.mark.parametrize("replace", [True, False])
def test_ranks_against_every_draw(replace):
    """All draws of n from m, counted one by one."""
    for num, budget in ((1, 1), (4, 1), (4, 3), (5, 4), (6, 5)):
        if replace:
            every = itertools.product(range(num), repeat=budget)
        else:
            every = itertools.permutations(range(num), budget)
        best = np.sort([min(draw) for draw in every])
        for percent in (1, 5, 25, 50, 75, 95, 99):
            count = math.ceil(percent / 100 * len(best) - 1e-9)
            expected = best[count - 1] + 1
            assert rank_reached(num, budget, percent / 100, replace) == expected


def test_one_trial_has_the_percentiles_of_the_trials():
    info = budget_info(study(np.random.default_rng(0).permutation(100)))
    row = info.rows[0]
    assert row.budget == 1
    assert row[1:6] == (4.0, 24.0, 49.0, 74.0, 94.0)
    assert row.interquartile == 50
    assert (info.best_value, info.median_value) == (0.0, 49.5)


def test_a_closed_form_for_evenly_spread_trials():
    """The best of n uniform numbers has the median 1 - 2**(-1/n)."""
    info = budget_info(study((np.arange(4000) + 0.5) / 4000), budgets=[1, 2, 5, 20])
    for row in info.rows:
        for percent, value in zip(PERCENTILES, row[1:6], strict=True):
            exact = 1 - (1 - percent / 100) ** (1 / row.budget)
            assert value == pytest.approx(exact, abs=1 / 3000)


def test_the_figure_of_the_playbook():
    """At 6 trials the middle half is several times as wide as at 20."""
    rng = np.random.default_rng(0)
    values = rng.exponential(size=1000)
    six, twenty = budget_info(study(values), budgets=[6, 20]).rows
    assert six.interquartile > 2.5 * twenty.interquartile


@hypothesis.given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.integers(0, 2**12), st.booleans()
)
def test_any_study(values, mask, maximize):
    bad = np.asarray([bool(mask >> i & 1) for i in range(len(values))])
    info = budget_info(study(values, bad, maximize), budgets=range(1, len(values) + 1))
    sign = -1 if maximize else 1
    good = sign * np.asarray(values)[~bad]
    for i, row in enumerate(info.rows):
        assert row.nothing == pytest.approx(bad.mean() ** row.budget)
        reached = sign * np.asarray(row[1:6])
        known = reached[np.isfinite(reached)]
        assert (np.diff(known) >= 0).all()
        assert np.isin(known, good).all()
        # What is not reached comes last, and is as frequent as it should be.
        assert (np.isnan(reached) == (np.asarray(PERCENTILES) / 100 > 1 - row.nothing)).all()
        if i:
            before = sign * np.asarray(info.rows[i - 1][1:6])
            assert (np.where(np.isnan(before), np.inf, before) >= np.nan_to_num(reached, 1e9)).all()
        assert not info.gain(i) < 0
    if len(good):
        assert sign * info.best_value == good.min()
    else:
        assert math.isnan(info.best_value)


def test_draws_agree_with_the_exact_distribution_and_repeat():
    values = np.random.default_rng(1).normal(size=40)
    bad = np.arange(40) < 10
    exact = budget_info(study(values, bad))
    drawn = budget_info(study(values, bad), num_bootstrap=4000, key=KEY)
    assert repr(tuple(drawn)) == repr(
        tuple(budget_info(study(values, bad), num_bootstrap=4000, key=KEY))
    )
    other = budget_info(study(values, bad), num_bootstrap=4000, key=jax.random.key(6))
    assert repr(tuple(drawn)) != repr(tuple(other))
    assert (exact.num_bootstrap, drawn.num_bootstrap) == (0, 4000)
    rank = {v: i for i, v in enumerate(np.sort(values[~bad]))}
    for one, two in zip(exact.rows, drawn.rows, strict=True):
        assert two.nothing == pytest.approx(one.nothing, abs=0.03)
        for a, b in zip(one[1:6], two[1:6], strict=True):
            if math.isfinite(a) and math.isfinite(b):
                # Five deviations of the share drawn, and a rank for its steps.
                missed = (1 - (rank[a] + 1) / 40) ** one.budget
                slope = one.budget / 40 * max(missed, 0.02)
                assert abs(rank[a] - rank[b]) <= 1 + 5 * 0.5 / math.sqrt(4000) / slope


def test_the_smallest_budget_that_is_enough():
    def info(medians, doubled):
        rows = tuple(BudgetRow(2**i, m, m, m, m, m, 0.0) for i, m in enumerate(medians))
        return BudgetInfo("loss", False, 16, 0, rows, doubled, 0.0, 1.0, math.nan, 0)

    nan = math.nan
    settled = info([1.0, 0.6, 0.58, 0.57, 0.57], (0.6, 0.58, 0.57, 0.57, nan))
    assert enough(settled, 0.1) == 2
    assert enough(settled, 1.0) == 1
    # The last doubling alone gained that little, which may be luck.
    assert enough(settled, 0.001) is None
    (finding,) = budget_findings(settled, 0.001)
    assert finding.code == "budget_cannot_tell"
    assert "only the last doublings within the study's 16 trials" in finding.message
    # A pause is no end: what gains later on was not enough before.
    paused = info([1.0, 0.99, 0.5, 0.49, 0.49], (0.99, 0.5, 0.49, 0.49, nan))
    assert enough(paused, 0.1) == 4
    growing = info([1.0, 0.8, 0.6, 0.4, 0.2], (0.8, 0.6, 0.4, 0.2, nan))
    assert enough(growing, 0.1) is None
    (finding,) = budget_findings(settled, 0.1)
    assert (finding.code, finding.evidence["answer"]) == ("enough_trials", 2)
    (finding,) = budget_findings(growing, 0.1)
    assert (finding.code, finding.severity) == ("more_trials_help", "warning")
    assert "doubling 8 trials still gains 0.2" in finding.message


def test_the_smallest_gain_is_the_noise_where_it_is_known():
    values = np.arange(8.0)
    one = budget_info(study(values))
    assert default_min_gain(one)[0] == pytest.approx(0.05 * 3.5)
    seeds = np.stack([values - 0.3, values + 0.3], axis=1)[..., None]
    two = Study.from_arrays({"x": values}, {"loss": seeds}, [10], objective="loss")
    assert default_min_gain(budget_info(two))[0] == pytest.approx(0.3 * math.sqrt(2))


def test_nothing_to_tell():
    nothing = budget_info(study(np.ones(8), np.ones(8, bool)))
    assert all(row.nothing == 1 for row in nothing.rows)
    (finding,) = budget_findings(nothing, 0.1)
    assert finding.code == "budget_cannot_tell"
    assert enough(nothing, 0.1) is None
    (finding,) = budget_findings(budget_info(study([1.0])), 0.1)
    assert "no budget can be doubled" in finding.message
    spec = {"num_trials": 4, "num_seeds": 1, "step": [0], "objective": "x", "maximize": False}
    empty = study_from_blocks(spec, [])
    with pytest.raises(ValueError, match="no trials"):
        budget_info(empty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": "12"}, "list of numbers of trials"),
        ({"budgets": [0]}, "budgets must be >= 1"),
        ({"budgets": [9]}, "more than the study's 8 trials"),
        ({"num_bootstrap": 0, "key": KEY}, "num_bootstrap must be >= 1"),
        ({"num_bootstrap": 5}, "key must be given"),
        ({"budget": [1]}, "did you mean 'budgets'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        budget_info(study(np.arange(8.0)), **arguments)


def test_default_budgets_rise_to_the_study():
    assert default_budgets(1) == (1,)
    assert default_budgets(100)[-4:] == (50, 60, 80, 100)
    assert default_budgets(101)[-2:] == (100, 101)
