"""The best trial per value, and whether the difference is more than luck."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from playbook_optax import plots
from playbook_optax.analysis.isolation import (
    _probability_of_run,
    isolation_findings,
    isolation_info,
)
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, SearchSpace


def study(points, values, infeasible=None, **arguments):
    values = np.asarray(values, np.float64)
    return Study.from_arrays(
        points,
        {"loss": values if values.ndim > 1 else values[:, None]},
        [10],
        objective="loss",
        infeasible=np.zeros(len(values), bool) if infeasible is None else infeasible,
        **arguments,
    )


def alone(values, infeasible=None, **arguments):
    return study({"x": np.arange(len(values))}, values, infeasible, **arguments)


def codes(info):
    return [finding.code for finding in isolation_findings(info)]


def test_probability_of_a_run_against_every_order():
    for sizes in ([2, 2], [3, 1], [2, 1, 2]):
        group = [g for g, size in enumerate(sizes) for _ in range(size)]
        orders = list(itertools.permutations(group))
        for run in range(1, max(sizes) + 1):
            share = np.mean([len(set(order[:run])) == 1 for order in orders])
            assert _probability_of_run(sizes, run) == pytest.approx(share)
    assert _probability_of_run([5, 5], 0) == 1.0


def test_a_table_by_hand():
    record = study(
        {"width": np.array([16, 64, 16, 64, 16, 32]), "lr": np.arange(6) / 10},
        [3.0, 1.5, 2.0, 9.0, 2.0, 7.0],
        np.array([False, False, False, False, False, True]),
    )
    info = isolation_info(record, "width")
    assert [r.label for r in info.rows] == ["16", "32", "64"]
    assert [r.num_trials for r in info.rows] == [3, 1, 2]
    assert [r.num_infeasible for r in info.rows] == [0, 1, 0]
    assert [r.best_trial for r in info.rows] == [2, -1, 1]
    assert [r.num_tied for r in info.rows] == [1, 0, 0]
    assert info.rows[2].point == {"lr": pytest.approx(0.1)}
    assert (info.best, info.runner_up, info.num_ahead) == (2, 0, 1)
    assert info.difference == pytest.approx(0.5)
    assert info.p_value == 1.0  # one trial is always ahead
    # The smallest row has one trial: a single one of three, at the median.
    assert (info.rows[0].matched_value, info.rows[2].matched_value) == (2.0, 1.5)
    assert codes(info) == [
        "isolation_unequal",
        "isolation_value_infeasible",
        "isolation_cannot_tell",
    ]


def test_buckets_of_a_real_hyperparameter_are_equal_on_its_scale():
    rates = np.geomspace(1.01e-3, 1.0, 40)
    record = study(
        {"lr": rates, "b": np.arange(40.0)},
        (np.log10(rates) + 1.6) ** 2,
        space=SearchSpace({"lr": Float(1e-4, 1.0, scale="log"), "b": Float(0.0, 40.0)}),
    )
    info = isolation_info(record, "lr", num_buckets=4)
    np.testing.assert_allclose([r.low for r in info.rows], [1e-3, 1e-2, 0.1], rtol=1e-6)
    assert [r.label for r in info.rows] == ["0.001 to 0.01", "0.01 to 0.1", "0.1 to 1"]
    assert sum(r.num_trials for r in info.rows) == 40
    assert info.best == 1
    assert info.told_apart
    assert codes(info) == ["isolation_best"]
    same = isolation_info(record, "b")
    assert sum(r.num_trials for r in same.rows) == 40
    assert len(same.rows) == 5


def test_choices_keep_their_labels():
    record = study(
        {"decay": np.array([0, 1, 0, 1])},
        [1.0, 2.0, 3.0, 4.0],
        space=SearchSpace({"decay": Categorical(["cosine", "linear"])}),
    )
    assert [r.label for r in isolation_info(record, "decay").rows] == ["cosine", "linear"]


def test_studies_are_values_and_the_direction_holds():
    adam, sgd = alone(np.arange(8.0)), alone(np.arange(8.0) + 20)
    info = isolation_info({"adam": adam, "sgd": sgd}, "optimizer")
    assert (info.scientific, info.best, info.num_ahead) == ("optimizer", 0, 8)
    assert info.p_value == pytest.approx(2 / math.comb(16, 8))
    (finding,) = isolation_findings(info)
    assert finding.code == "isolation_best"
    assert "optimizer = adam" in finding.message
    rising = {n: alone(-s.data["loss"].values[:, 0], maximize=True) for n, s in
              (("adam", adam), ("sgd", sgd))}  # fmt: skip
    other = isolation_info(rising)
    assert (other.scientific, other.best, other.p_value) == ("study", 0, info.p_value)
    assert other.difference == info.difference == 20


def test_more_trials_are_no_merit():
    """The same distribution, ten times as many trials: better by luck alone, and said so."""
    rng = np.random.default_rng(0)
    few, many = alone(rng.random(6) + 0.5), alone(rng.random(60) + 0.5)
    info = isolation_info({"few": few, "many": many})
    assert info.rows[info.best].label == "many"
    matched = info.rows[1].matched_value
    draws = [np.sort(rng.permutation(many.data["loss"].values[:, 0])[:6])[0] for _ in range(999)]
    assert matched == pytest.approx(np.median(draws), abs=0.03)
    assert "isolation_unequal" in codes(info)
    assert "isolation_best" not in codes(info)


def test_seeds_noise_is_not_outrun():
    base = np.arange(8.0)[:, None, None]
    noise = np.array([-30.0, 30.0])[None, :, None]
    values = {"one": alone(base + noise), "two": alone(base + 20 + noise)}
    info = isolation_info(values)
    assert info.rows[0].spread == pytest.approx(30 * math.sqrt(2))
    assert info.noise == pytest.approx(30 * math.sqrt(2))
    assert info.p_value < 0.01
    (finding,) = isolation_findings(info)
    assert finding.code == "isolation_cannot_tell"
    assert "the seeds alone" in finding.message


@pytest.mark.parametrize("num_values", [2, 3])
def test_rates_over_random_studies(num_values):
    """A value that does not matter is seldom called best; one that matters much, mostly."""
    rng = np.random.default_rng(num_values)
    false, true = 0, 0
    for _ in range(120):
        values = rng.random(20 * num_values)
        group = rng.permutation(np.arange(20 * num_values) % num_values)
        false += isolation_info(study({"v": group}, values), "v").told_apart
        better = values - 0.3 * (group == 0)
        true += isolation_info(study({"v": group}, better), "v").told_apart
    assert false <= 11  # 6 are allowed
    assert true >= 100


def test_nothing_and_only_one():
    bad = np.ones(3, bool)
    nothing = isolation_info({"a": alone([1.0, 2, 3], bad), "b": alone([1.0, 2, 3], bad)})
    assert (nothing.best, nothing.told_apart) == (-1, False)
    assert codes(nothing) == ["isolation_nothing"]
    one = isolation_info({"a": alone([1.0, 2, 3])})
    assert (one.best, one.runner_up, one.told_apart) == (0, -1, False)
    assert codes(one) == ["isolation_cannot_tell"]
    rival = isolation_info({"a": alone([1.0, 2, 3]), "b": alone([1.0, 2, 3], bad)})
    assert codes(rival) == ["isolation_value_infeasible", "isolation_cannot_tell"]
    tie = isolation_info({"a": alone([1.0, 2, 3]), "b": alone([1.0, 2, 3])})
    assert (tie.best, tie.num_ahead, tie.p_value) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: isolation_info(alone([1.0, 2.0])), "scientific must name a hyperparameter"),
        (lambda: isolation_info(alone([1.0, 2.0]), "y"), "'y' is not in the study"),
        (lambda: isolation_info({}), "non-empty dict"),
        (lambda: isolation_info({"a": 3}), r"studies\['a'\] must be a study"),
        (lambda: isolation_info(alone([1.0]), "x", num_buckets=1), "num_buckets must be >= 2"),
        (
            lambda: isolation_info({"a": alone([1.0]), "b": alone([1.0], maximize=True)}),
            r"studies\['b'\] has the objective",
        ),
        (lambda: isolation_info(alone([1.0]), science="x"), "did you mean 'scientific'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_plot_marks_every_value_once():
    base = np.arange(4.0)[:, None, None] + np.array([-0.5, 0.5])[None, :, None]
    values = {
        "adam": alone(base),
        "sgd": alone(np.concatenate([base, base]) + 2),
        "none": alone(base, np.ones((4, 2), bool)),
    }
    info = isolation_info(values, "optimizer")
    ax = plots.plot_isolation(info)
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "adam\n4 trials",
        "sgd\n8 trials",
        "none\n4 trials, 100% failed",
    ]
    marks = [line.get_marker() for line in ax.lines]
    assert (marks.count("*"), marks.count("o"), marks.count("x")) == (1, 1, 1)
    assert ax.get_xlabel() == "optimizer"
    assert ax.get_legend().get_texts()[0].get_text() == "best of 4, at the median"
    plt.close("all")
