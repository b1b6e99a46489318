import numpy as np
import pytest

from playbook_optax.analysis.curves import best_curves, curve_findings, curve_info
from playbook_optax.records.study import Study


def study(curves, step=None, **kwargs):
    curves = np.asarray(curves, np.float64)
    step = np.linspace(0, 1000, curves.shape[-1]).astype(int) if step is None else step
    return Study.from_arrays(
        {"x": np.arange(len(curves))}, {"loss": curves}, step, objective="loss", **kwargs
    )


def test_straight_line_exactly():
    info = curve_info(study(np.tile(np.linspace(2, 1, 21), (3, 1))))
    row = info.rows[0]
    assert (row.best_step, row.best_fraction, row.settled_step) == (1000, 1.0, 1000)
    assert row.noise == pytest.approx(0, abs=1e-12)
    assert row.last_gain == pytest.approx(0.25)
    assert row.total_gain == pytest.approx(1)
    assert (info.num_improving, info.num_early, info.num_steps) == (3, 0, 1000)
    (finding,) = curve_findings(info)
    assert (finding.code, finding.severity) == ("still_improving", "warning")


def test_rising_objective_is_improving_too():
    curves = np.tile(np.linspace(0, 1, 21), (3, 1))
    (finding,) = curve_findings(curve_info(study(curves, maximize=True)))
    assert finding.code == "still_improving"
    assert curve_findings(curve_info(study(curves)))[0].code == "saturated_early"


def test_step_function_settles_at_once():
    curve = np.where(np.arange(21) == 0, 2.0, 1.0)
    info = curve_info(study(np.tile(curve, (4, 1))))
    assert [r.settled_step for r in info.rows] == [50, 50, 50]
    (finding,) = curve_findings(info)
    assert finding.code == "saturated_early"
    assert "about 250 steps" in finding.suggestion


def test_noise_is_that_of_single_evaluations():
    rng = np.random.default_rng(0)
    curve = np.linspace(9, 1, 2001) + 0.3 * rng.normal(size=2001)
    assert curve_info(study(curve[None], step=np.arange(2001))).rows[0].noise == pytest.approx(
        0.3, rel=0.05
    )


def test_too_few_evaluations_are_said():
    (finding,) = curve_findings(curve_info(study(np.ones((3, 5)))))
    assert (finding.code, finding.severity) == ("curve_check_skipped", "info")
    assert finding.suggestion == "Evaluate at least every 125 steps."


def test_early_needs_an_evaluation_in_the_first_tenth():
    curves = np.tile(np.where(np.arange(9) == 0, 2.0, 1.0), (3, 1))
    info = curve_info(study(curves))
    assert not info.can_be_early
    assert curve_findings(info) == []


def test_rates_over_random_studies(make_study):
    """Noise on a plateau is no trend, whatever the step of the best value; a trend is one."""
    plateau, rising, early, slow, unsettled = 0, 0, 0, 0, 0
    for seed in range(60):
        flat = curve_findings(curve_info(make_study(seed, evaluation_noise=0.03)))
        trend = curve_findings(curve_info(make_study(seed, drift=0.4)))
        fast = curve_findings(curve_info(make_study(seed, settle=0.005, num_evals=41)))
        hidden = make_study(seed, settle=0.01, num_evals=41, drift=0.1, evaluation_noise=0.03)
        unsettled += any(f.code == "saturated_early" for f in curve_findings(curve_info(hidden)))
        plateau += any(f.code == "still_improving" for f in flat)
        slow += any(f.code == "saturated_early" for f in flat)
        rising += any(f.code == "still_improving" for f in trend)
        early += any(f.code == "saturated_early" for f in fast)
    assert plateau <= 1
    assert slow == 0
    assert unsettled <= 6
    assert rising >= 54
    assert early >= 48


def test_best_curves_table():
    curves = np.array([[3.0, 2.0, 2.5], [3.0, 1.0, 0.5], [3.0, 2.9, 2.9]])
    record = Study.from_arrays(
        {"lr": np.array([0.1, 0.2, 0.3])},
        {"valid/loss": curves, "train/loss": curves / 2},
        [0, 5, 10],
        objective="valid/loss",
    )
    info = best_curves(record, num_trials=2)
    assert info.trials == (1, 0)
    assert info.values == (0.5, 2.0)
    assert info.best_steps == (10, 5)
    assert [p["lr"] for p in info.points] == [0.2, 0.1]
    assert list(info.metrics) == ["valid/loss", "train/loss"]
    np.testing.assert_array_equal(info.metrics["train/loss"], curves[[1, 0]] / 2)
    with pytest.raises(ValueError, match="num_trials"):
        best_curves(record, num_trials=0)


def test_a_late_best_step_on_a_noisy_plateau_is_no_trend():
    """A line through noise falls half of the time; it has to fall by more than its error."""
    rng = np.random.default_rng(2)
    alarms, late = 0, 0
    for _ in range(100):
        curve = np.concatenate([[1.5], np.ones(40)]) + 0.2 * rng.normal(size=41)
        info = curve_info(study(curve[None]))
        late += info.rows[0].best_fraction > 0.75 and info.rows[0].last_gain > 0
        alarms += info.num_improving
    assert late >= 12
    assert alarms <= 5
