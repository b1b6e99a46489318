import numpy as np
import pytest

from playbook_optax.analysis.boundaries import boundary_findings, boundary_info, wider_range
from playbook_optax.analysis.stability import stability_findings, stability_info
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace


def sweep(values, losses, parameter, infeasible=None, name="x"):
    losses = np.asarray(losses, np.float64)
    return Study.from_arrays(
        {name: np.asarray(values)},
        {"loss": np.stack([losses + 1, losses], axis=1)},
        [0, 10],
        objective="loss",
        space=SearchSpace({name: parameter}),
        infeasible=infeasible,
    )


def test_table_of_a_sweep_that_ends_too_low():
    values = np.logspace(-4, -1, 9)
    info = boundary_info(sweep(values, np.arange(9)[::-1], Float(1e-4, 1e-1, scale="log")))
    (row,) = info.rows
    assert (row.edge, row.best_trial, row.good_trials) == ("high", 8, (8, 7, 6))
    assert row.distance == pytest.approx(0, abs=1e-6)
    assert row.p_value == pytest.approx(1 / 84)  # one of the 84 triples lies as far up
    assert row.proposal == Float(1e-4, 3.0, scale="log")
    (finding,) = boundary_findings(info)
    assert (finding.code, finding.severity) == ("best_near_boundary", "warning")
    assert finding.evidence["proposed_high"] == 3.0
    assert "x from 0.0001 to 3 (log scale)" in finding.suggestion


def test_five_trials_are_too_few_to_be_sure():
    info = boundary_info(sweep(np.linspace(0, 1, 5), np.arange(5), Float(0.0, 1.0)))
    assert info.rows[0].p_value == pytest.approx(0.1)
    (finding,) = boundary_findings(info)
    assert (finding.code, finding.severity) == ("best_maybe_near_boundary", "info")
    assert "natural limit" in finding.suggestion


@pytest.mark.parametrize(
    ("args", "wider"),
    [
        ((1e-3, 1e-1, "log", "high"), (1e-3, 1.0)),
        ((1e-3, 1e-1, "log", "low"), (1e-4, 1e-1)),
        ((0.1, 0.12, "log", "high"), (0.1, 0.2)),
        ((0.9, 0.99, "reverse_log", "high"), (0.9, 0.997)),
        ((0.9, 0.99, "reverse_log", "low"), (0.7, 0.99)),
        ((0.2, 0.99, "reverse_log", "low"), (0.0, 0.99)),
        ((0.0, 0.5, "linear", "high"), (0.0, 0.75)),
        ((0.0, 0.8, "linear", "high"), (0.0, 0.9)),
        ((0.0, 0.5, "linear", "low"), (0.0, 0.5)),
        ((-1.0, 1.0, "linear", "low"), (-2.0, 1.0)),
        ((2.0, 6.0, "linear", "high"), (2.0, 8.0)),
    ],
)
def test_wider_range(args, wider):
    assert wider_range(*args) == pytest.approx(wider)


@pytest.mark.parametrize(
    ("parameter", "values", "proposal"),
    [
        (Integer(1, 8), [8, 7, 6, 5, 4, 3, 2, 1], Integer(1, 12)),
        (Integer(1, 8), [1, 2, 3, 4, 5, 6, 7, 8], None),
        (Integer(4, 8), [4, 5, 5, 6, 6, 7, 8, 8], Integer(2, 8)),
        (Integer(10, 1000, "log", True), [0, 10, 20, 50, 100, 200, 500, 1000], None),
        (
            Integer(10, 1000, "log", True),
            [1000, 900, 800, 50, 100, 20, 10, 0],
            Integer(10, 10000, "log", True),
        ),
    ],
)
def test_integers_widen_to_integers(parameter, values, proposal):
    info = boundary_info(sweep(np.array(values), np.arange(8), parameter))
    assert info.rows[0].proposal == proposal
    assert boundary_findings(info)


def test_a_range_that_float32_ends_cannot_widen():
    values = np.logspace(30, 38, 8)
    info = boundary_info(sweep(values, np.arange(8)[::-1], Float(1.0, 3e38, scale="log")))
    assert info.rows[0].proposal is None
    assert "cannot grow there" in boundary_findings(info)[0].suggestion


def test_categoricals_have_no_edge_and_a_missing_space_is_said():
    record = sweep(np.array([1, 2]), [0, 1], Categorical([1, 2]))
    assert boundary_info(record).skipped == "the search space has no dimension with two ends"
    bare = Study.from_arrays({"x": [1.0]}, {"loss": [[1.0]]}, [0], objective="loss")
    (finding,) = boundary_findings(boundary_info(bare))
    assert (finding.code, finding.severity) == ("boundary_check_skipped", "info")
    assert "no search space" in finding.message


def test_an_edge_of_stability_is_not_an_edge_of_the_space():
    values = np.linspace(0, 1, 20)
    bad = (values > 0.7) & (values < 1)  # one lucky trial at the very edge of the space
    info = boundary_info(sweep(values, 1 - values, Float(0.0, 1.0), infeasible=bad))
    (row,) = info.rows
    assert (row.best_value, row.distance, row.infeasible_share) == (1.0, 0.0, 0.8)
    assert boundary_findings(info) == []
    calm = boundary_info(sweep(values, 1 - values, Float(0.0, 1.0)))
    assert len(boundary_findings(calm)) == 1


def codes(found):
    return [(f.code, f.evidence.get("name")) for f in found]


def test_rates_over_random_studies(make_study):
    """An interior optimum raises no alarm, one outside raises it, chance seldom does."""
    inside, outside, useless, widened = 0, 0, 0, 0
    for seed in range(60):
        inner = codes(boundary_findings(boundary_info(make_study(seed))))
        outer = boundary_info(make_study(seed, optimum=1.3))
        found = codes(boundary_findings(outer))
        inside += ("best_near_boundary", "learning_rate") in inner
        outside += ("best_near_boundary", "learning_rate") in found
        useless += ("best_near_boundary", "b1") in inner
        widened += outer.rows[0].proposed_high > 1.0
    assert inside == 0
    assert outside >= 50
    assert useless <= 6
    assert widened == 60


def test_same_study_same_table(make_study):
    assert boundary_info(make_study(5)) == boundary_info(make_study(5))


def test_edge_of_the_infeasible_region_exactly():
    values = np.logspace(-3, 0, 13)
    bad = values > 0.11
    record = sweep(values, -values, Float(1e-3, 1.0, "log"), bad, name="learning_rate")
    (row,) = stability_info(record)
    assert (row.direction, row.best_trial) == ("high", 8)
    assert row.edge == pytest.approx(np.sqrt(values[8] * values[9]))
    assert row.distance == pytest.approx(1 / 24)
    assert (row.infeasible_beyond, row.trials_beyond) == (4, 4)
    assert row.p_value <= row.limit == 0.025
    (finding,) = stability_findings((row,))
    assert (finding.code, finding.severity) == ("best_at_edge_of_infeasible", "warning")
    assert "learning_rate = 0.5 and 1" in finding.suggestion


def test_edge_below_and_edge_far_away():
    values = np.linspace(0, 1, 20)
    below = sweep(values, values, Float(0.0, 1.0), values < 0.3)
    (row,) = stability_info(below)
    assert (row.direction, row.at_edge) == ("low", True)
    assert row.edge == pytest.approx(values[5:7].mean())
    far = sweep(values, 1 - values, Float(0.0, 1.0), values < 0.3)
    assert stability_findings(stability_info(far)) == []


def test_failures_without_order_are_no_edge(make_study):
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(60):
        values = rng.random(24)
        record = sweep(values, rng.random(24), Float(0.0, 1.0), rng.random(24) < 0.3)
        alarms += bool(stability_findings(stability_info(record)))
    assert alarms <= 3


def test_rates_of_the_edge_over_random_studies(make_study):
    at_edge, far = 0, 0
    for seed in range(40):
        edge = make_study(seed, optimum=1.0, fails_above=0.6)
        calm = make_study(seed, optimum=0.3, fails_above=0.8)
        at_edge += bool(stability_findings(stability_info(edge)))
        far += bool(stability_findings(stability_info(calm)))
    assert at_edge >= 32
    assert far == 0


def test_no_infeasible_trials_no_table(make_study):
    assert stability_info(make_study()) == ()
