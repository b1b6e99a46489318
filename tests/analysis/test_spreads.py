"""The spread over seeds and the permutation test, against closed forms and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from playbook_optax.analysis.spreads import (
    Spread,
    best_by_seed,
    compare_spreads,
    prediction_reach,
    spread_info,
)
from playbook_optax.records.study import Study


def spread(values, maximize=False, objective="loss"):
    """A Spread of these values, one evaluation each."""
    values = np.asarray(values, np.float64)
    study = Study.from_arrays(
        {"x": [1.0]},
        {objective: np.where(np.isnan(values), 9.0, values)[None, :, None]},
        [10],
        objective=objective,
        maximize=maximize,
        infeasible=np.isnan(values)[None],
    )
    return spread_info(study)


def test_a_spread_by_hand():
    curves = np.array([[[5.0, 2.0, 3.0], [5.0, 4.0, 1.0], [5.0, 3.0, 2.5]]])
    study = Study.from_arrays(
        {"lr": np.array([0.5], np.float32)}, {"loss": curves}, [0, 10, 20], objective="loss"
    )
    made = spread_info(study)
    assert made.values == (2.0, 1.0, 2.5)
    assert made.mean == pytest.approx(5.5 / 3)
    assert made.std == pytest.approx(np.std([2.0, 1.0, 2.5], ddof=1))
    assert (made.best_step, made.value) == (20, pytest.approx(6.5 / 3))
    assert (made.value, made.best_step) == (study.best().value, study.best().step)
    assert (made.point, made.num_steps, made.num_evals) == ({"lr": np.float32(0.5)}, 20, 3)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(4 / 3) * made.std
    assert (made.low, made.high) == pytest.approx((made.mean - reach, made.mean + reach))
    rising = Study.from_arrays(
        {"lr": [0.5]}, {"loss": -curves}, [0, 10, 20], objective="loss", maximize=True
    )
    other = spread_info(rising)
    assert other.values == (-2.0, -1.0, -2.5)
    assert (other.mean, other.std, other.low) == (-made.mean, made.std, pytest.approx(-made.high))


def test_the_interval_holds_a_further_run_as_often_as_it_says():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(4000, 6))
    mean, std = runs[:, :5].mean(axis=1), runs[:, :5].std(axis=1, ddof=1)
    inside = np.abs(runs[:, 5] - mean) <= prediction_reach(5) * std
    assert inside.mean() == pytest.approx(0.95, abs=0.012)
    assert prediction_reach(1) == math.inf


@pytest.mark.parametrize("maximize", [False, True])
def test_the_best_of_each_seed_is_none_where_it_broke(maximize):  # 44
    sign = -1.0 if maximize else 1.0
    curves = sign * np.array([[[3.0, 1.0, math.nan], [3.0, 2.0, math.inf], [9.0, 8.0, 7.0]]])
    study = Study.from_arrays(
        {"x": [1.0]},
        {"loss": curves},
        [0, 10, 20],
        objective="loss",
        maximize=maximize,
        infeasible=[[True, False, False]],
    )
    np.testing.assert_array_equal(best_by_seed(study, 0), [math.nan, sign * 2.0, sign * 7.0])
    alone = Study.from_arrays(
        {"x": [1.0]}, {"loss": curves[:, 2]}, [0, 10, 20], objective="loss", maximize=maximize
    )
    assert best_by_seed(alone, 0).tolist() == [sign * 7.0]


def test_infeasible_seeds_are_kept_and_worst():
    made = spread([1.0, math.nan, 3.0])
    assert made.num_infeasible == 1
    assert (made.mean, made.std) == (2.0, pytest.approx(math.sqrt(2)))
    np.testing.assert_array_equal(made.losses, [1, math.inf, 3])
    assert spread([math.nan, math.nan]) is None
    one = spread([1.0, math.nan])
    assert math.isnan(one.std)
    assert math.isnan(one.low)


def test_the_best_trial_is_taken_among_many():
    values = np.array([[[3.0], [4.0]], [[1.0], [2.0]], [[0.0], [5.0]]])
    study = Study.from_arrays({"x": [0.0, 1.0, 2.0]}, {"loss": values}, [10], objective="loss")
    assert spread_info(study).point == {"x": 1.0}
    assert spread_info(study, 2).values == (0.0, 5.0)
    with pytest.raises(IndexError):
        spread_info(study, 3)
    single = Study.from_arrays({"x": [0.0]}, {"loss": [[1.0]]}, [10], objective="loss")
    with pytest.raises(ValueError, match="one seed"):
        spread_info(single)


def test_the_permutation_test_is_scipys():
    rng = np.random.default_rng(3)
    for num, other in ((2, 2), (5, 5), (3, 6)):
        before, after = rng.normal(size=num), rng.normal(size=other) - 0.7
        test = compare_spreads(spread(before), spread(after))
        theirs = stats.permutation_test(
            (after, before),
            lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
            alternative="less",
            n_resamples=np.inf,
            vectorized=True,
        )
        assert test.p_value == pytest.approx(theirs.pvalue)
        assert test.gain == pytest.approx(before.mean() - after.mean())
        assert test.smallest_p == 1 / math.comb(num + other, num)
        assert (test.num_drawn, test.by_rank) == (0, False)
        rising = compare_spreads(spread(-before, True), spread(-after, True))
        assert rising == test


def test_many_seeds_are_drawn_and_agree_with_welch():
    rng = np.random.default_rng(4)
    before, after = rng.normal(size=30), rng.normal(size=30) - 0.4
    test = compare_spreads(spread(before), spread(after))
    assert test.num_drawn == 20_000
    welch = stats.ttest_ind(after, before, equal_var=False, alternative="less").pvalue
    assert test.p_value == pytest.approx(welch, abs=0.01)
    assert test.std == pytest.approx(math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / 2))


def test_an_infeasible_run_makes_it_a_test_of_ranks():
    before, after = [5.0, 6.0, math.nan, math.nan], [1.0, 2.0, 3.0, 4.0]
    test = compare_spreads(spread(before), spread(after))
    assert test.by_rank
    assert test.p_value == 1 / math.comb(8, 4)
    assert test.gain == 3.0
    back = compare_spreads(spread(after), spread(before))
    assert back.p_value == 1.0
    assert back.gain == -3.0


def test_equal_runs_are_no_evidence():
    test = compare_spreads(spread([1.0, 1.0, 1.0]), spread([1.0, 1.0, 1.0]))
    assert (test.gain, test.p_value, test.std) == (0.0, 1.0, 0.0)


def test_other_objectives_are_not_compared():
    with pytest.raises(ValueError, match=r"'error'.*'loss'"):
        compare_spreads(spread([1.0, 2.0]), spread([1.0, 2.0], objective="error"))
    with pytest.raises(ValueError, match="maximize=True"):
        compare_spreads(spread([1.0, 2.0]), spread([1.0, 2.0], maximize=True))


def test_nothing_useful_is_claimed_too_often():
    """Under the null the p value is at most the level as often as it says, however skewed."""
    rng = np.random.default_rng(5)
    small = 0
    for _ in range(300):
        before, after = rng.exponential(size=(2, 5))
        made = [
            Spread(0, tuple(v), v.mean(), v.std(ddof=1), 0, 0, 0, {}, "loss", False, 1, 1)
            for v in (before, after)
        ]
        small += compare_spreads(*made).p_value <= 0.05
    assert 4 <= small <= 25  # 15 are expected
