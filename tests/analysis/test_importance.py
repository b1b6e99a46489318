import numpy as np
import pytest

from playbook_optax.analysis.importance import importance_findings, importance_info
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, SearchSpace


def verdicts(study):
    return {r.name: r.verdict for r in importance_info(study).rows}


def test_share_of_a_perfect_and_an_orthogonal_hyperparameter():
    x, y = (a.ravel() for a in np.meshgrid(np.arange(7.0), np.arange(5.0)))
    study = Study.from_arrays(
        {"x": x, "y": y, "z": np.ones(35)},
        {"loss": (x + 0 * y)[:, None]},
        [0],
        objective="loss",
    )
    rows = {r.name: r for r in importance_info(study).rows}
    assert rows["x"].share == pytest.approx(1)
    assert rows["x"].verdict == "sensitive"
    assert (rows["x"].num_terms, rows["y"].num_terms, rows["z"].num_terms) == (2, 2, 0)
    assert rows["z"].verdict == "not varied"


def test_infeasible_trials_rank_last():
    rng = np.random.default_rng(0)
    x, loss = rng.random(40), rng.random((40, 1))
    study = Study.from_arrays({"x": x}, {"loss": loss}, [0], objective="loss", infeasible=x > 0.5)
    assert verdicts(study) == {"x": "sensitive"}


def test_categorical_has_one_term_per_further_choice():
    rng = np.random.default_rng(1)
    act = np.arange(60) % 3
    study = Study.from_arrays(
        {"act": act},
        {"loss": (act == 1)[:, None] + 0.1 * rng.random((60, 1))},
        [0],
        objective="loss",
        space=SearchSpace({"act": Categorical(["relu", "gelu", "tanh"])}),
    )
    (row,) = importance_info(study).rows
    assert (row.num_terms, row.verdict) == (2, "sensitive")


@pytest.mark.parametrize("scale", [1e308, 5e-324, 1e-300])
@pytest.mark.parametrize("maximize", [False, True])
def test_numbers_of_any_size_are_judged(scale, maximize):
    rng = np.random.default_rng(2)
    wide = np.where(np.arange(40) % 2, scale, -scale)
    points = {"x": rng.random(40), "wide": wide, "steep": scale * rng.random(40)}
    study = Study.from_arrays(
        points, {"loss": (wide * points["x"])[:, None]}, [0], objective="loss", maximize=maximize
    )
    for row in importance_info(study).rows:
        assert 0 <= row.share <= row.upper <= 1
        assert row.verdict in ("sensitive", "insensitive", "cannot tell", "not varied")


def test_a_place_far_beyond_the_range_cannot_be_compared():
    rng = np.random.default_rng(3)
    space = SearchSpace({"x": Float(0.0, 1e-6), "y": Float(0.0, 1.0)})
    points = {"x": 1e30 * rng.random(40), "y": rng.random(40)}
    loss = {"loss": points["y"][:, None]}
    study = Study.from_arrays(points, loss, [0], objective="loss", space=space)
    assert verdicts(study) == {"x": "cannot tell", "y": "sensitive"}


def test_few_trials_cannot_tell(make_study):
    info = importance_info(make_study(num_trials=8))
    assert {r.verdict for r in info.rows} == {"cannot tell"}
    (finding,) = importance_findings(info)
    assert finding.code == "importance_cannot_tell"
    assert finding.evidence["names"] == ["learning_rate", "b1"]
    assert 16 < info.num_needed < 64
    assert f"About {info.num_needed} trials" in finding.suggestion


def test_rates_over_random_studies(make_study):
    """A hyperparameter that matters is never called insensitive; one that does not, usually."""
    wrong, right, small = 0, 0, 0
    for seed in range(40):
        both = verdicts(make_study(seed, num_trials=64, b1_effect=0.5))
        one = verdicts(make_study(seed, num_trials=64))
        wrong += "insensitive" in both.values() or one["learning_rate"] != "sensitive"
        right += one["b1"] == "insensitive"
        small += "insensitive" in verdicts(make_study(seed, num_trials=16)).values()
    assert wrong == 0
    assert right >= 32
    assert small == 0


def test_insensitive_finding_says_what_to_do(make_study):
    found = importance_findings(importance_info(make_study(1, num_trials=96)))
    (finding,) = [f for f in found if f.code == "insensitive_hyperparameter"]
    assert finding.evidence["name"] == "b1"
    assert finding.suggestion.startswith("Fix b1")


def test_false_alarm_rate_of_sensitive_under_no_effect():
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(200):
        study = Study.from_arrays(
            {"x": rng.random(24)}, {"loss": rng.random((24, 1))}, [0], objective="loss"
        )
        alarms += importance_info(study).rows[0].verdict == "sensitive"
    assert alarms <= 18  # 10 are expected at 5%; 18 is 2.6 deviations above


def test_an_effect_at_the_limit_is_seldom_called_insensitive():
    """The confidence limit keeps its word: 5% at most for a true share of 0.2."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(300):
        x = rng.random(40)
        effect = (x - 0.5) * np.sqrt(12 * 0.25)  # variance 1/4 beside a noise of 1: share 1/5
        loss = effect + rng.normal(size=40)
        study = Study.from_arrays({"x": x}, {"loss": loss[:, None]}, [0], objective="loss")
        info = importance_info(study)
        assert info.num_trials >= info.num_needed
        found.append(info.rows[0].verdict)
    assert found.count("insensitive") <= 22  # 15 are expected; 22 is 1.9 deviations above
    assert {"sensitive", "cannot tell"} <= set(found)


def sweep(values):
    values = np.asarray(values, np.float64)
    rates = np.geomspace(1e-5, 10, len(values))
    study = Study.from_arrays(
        {"learning_rate": rates, "b1": np.full(len(values), 0.9)},
        {"loss": values[:, None]},
        [0],
        objective="loss",
        infeasible=np.isnan(values),
    )
    return verdicts(study)["learning_rate"]


def test_a_sweep_of_one_hyperparameter_is_judged_by_how_alike_neighbours_are():
    # Chance at low rates, an optimum, a cliff: no parabola.
    cliff = [2.3, 2.31, 2.29, 2.2, 1.6, 0.7, 0.4, 0.35, np.nan, np.nan]
    assert sweep(cliff) == "sensitive"
    assert sweep([8, 6, 4, 2, 1, 3, 5, 7]) == "sensitive"
    assert sweep([1, 2, 3, 4]) == "cannot tell"
    assert sweep(np.ones(10)) == "cannot tell"
    rng = np.random.default_rng(5)
    for num in (6, 10, 24):
        alarms = sum(sweep(rng.random(num)) == "sensitive" for _ in range(100))
        assert alarms <= 11  # 5 are expected at 5%; 11 is 2.8 deviations above


def test_of_two_that_vary_together_neither_is_said_to_do_nothing():
    rng = np.random.default_rng(6)
    x = rng.random(60)
    together = {"x": x, "y": x + 0.01 * rng.normal(size=60), "z": rng.random(60)}
    study = Study.from_arrays(together, {"loss": x[:, None]}, [0], objective="loss")
    found = verdicts(study)
    assert found["y"] != "insensitive"
    assert found["z"] == "insensitive"
    same = {"x": x, "y": x}
    study = Study.from_arrays(same, {"loss": x[:, None]}, [0], objective="loss")
    assert set(verdicts(study).values()) == {"cannot tell"}


def test_what_rounding_leaves_of_an_exact_fit_is_no_effect():
    rng = np.random.default_rng(7)
    points = {"x": np.arange(60.0), "y": rng.random(60)}
    study = Study.from_arrays(points, {"loss": np.arange(60.0)[:, None]}, [0], objective="loss")
    rows = {row.name: row for row in importance_info(study).rows}
    assert (rows["y"].share, rows["y"].p_value) == (0.0, 1.0)
    assert rows["x"].verdict == "sensitive"


@pytest.mark.parametrize("seed", range(20))
def test_objectives_of_extreme_range_are_judged(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 40))
    curves = 10.0 ** rng.uniform(-300, 300, (size, 3)) * rng.choice([-1.0, 1.0], (size, 3))
    curves[rng.random((size, 3)) < 0.1] = rng.choice([np.nan, np.inf, 1.7e308, 5e-324])
    points = {"x": rng.random(size), "wide": 10.0 ** rng.uniform(-37, 38, size)}
    study = Study.from_arrays(points, {"loss": curves}, [0, 1, 2], objective="loss")
    for row in importance_info(study).rows:
        assert 0 <= min(row.share, row.upper) <= max(row.share, row.upper) <= 1
        assert 0 <= row.p_value <= 1
