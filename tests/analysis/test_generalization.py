"""Overfitting and late variance: exact curves, and how often noise raises a false alarm."""

import math

import numpy as np
import pytest

from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.generalization import (
    late_variance_findings,
    late_variance_info,
    overfitting_findings,
    overfitting_info,
)
from playbook_optax.records.study import Study


def study(valid, train=None, **arguments):
    valid = np.asarray(valid, np.float64)
    metrics = {"valid/loss": valid}
    if train is not None:
        metrics["train/loss"] = np.broadcast_to(train, valid.shape)
    step = np.linspace(0, 1000, valid.shape[-1]).astype(int)
    return Study.from_arrays(
        {"x": np.arange(len(valid))}, metrics, step, objective="valid/loss", **arguments
    )


TIME = np.linspace(0, 1, 21)
FALLING = 2 - TIME
VALLEY = np.where(TIME < 0.5, 2 - 2 * TIME, 1 + 0.8 * (TIME - 0.5))


def found(record, **arguments):
    return overfitting_findings(overfitting_info(record, **arguments))


def test_a_valley_exactly():
    info = overfitting_info(study(np.tile(VALLEY, (3, 1)), FALLING))
    row = info.rows[0]
    # Stretches of four evaluations: the best one is 0.4 to 0.55, the last one 0.85 to 1.
    last, best = VALLEY[-4:].mean(), min(VALLEY[i : i + 4].mean() for i in range(14))
    assert row.rise == pytest.approx(last - best)
    assert row.undone == pytest.approx((last - best) / (2 - best))
    assert row.best_step == 500
    assert row.training_gain == pytest.approx(0.4, abs=0.01)
    assert (info.training, info.num_overfitting, info.skipped) == ("train/loss", 3, "")
    (finding,) = found(study(np.tile(VALLEY, (3, 1)), FALLING))
    assert (finding.code, finding.severity) == ("overfitting", "warning")
    assert "around step 500" in finding.message


def test_what_is_no_overfitting():
    tile = np.tile(VALLEY, (3, 1))
    assert found(study(tile, 2 + 0 * TIME)) == []  # the training loss does not fall
    assert found(study(tile, VALLEY)) == []  # it rises as well: the training broke
    assert found(study(tile)) == []  # there is none
    assert overfitting_info(study(tile)).skipped == "there is no training loss beside the objective"
    assert found(study(np.tile(FALLING, (3, 1)), FALLING)) == []
    small = 2 - TIME + 0.03 * np.maximum(TIME - 0.5, 0)
    assert found(study(np.tile(small, (3, 1)), FALLING)) == []
    short = study(np.tile(VALLEY, (3, 1))[:, ::4], FALLING[::4])
    assert "fewer than 8" in overfitting_info(short).skipped
    by_training = overfitting_info(study(tile, FALLING), objective="train/loss")
    assert by_training.skipped


def test_overfitting_is_seen_where_it_is_worst():
    """Best within the first fifth, above its first value for ever after: 1.09 to 3.04."""
    worst = 1.09 - 0.15 * (1 - np.exp(-TIME / 0.02)) + 2.1 * TIME
    for curve in (worst, 1.0 + 2.0 * TIME, np.where(TIME == 0.05, 0.5, 1.0 + 2.0 * TIME)):
        (finding,) = found(study(np.tile(curve, (3, 1)), FALLING))
        assert "which is all that it had improved, or more" in finding.message
    # Without any improvement a rise has to be a fifth of the value itself.
    assert found(study(np.tile(1.0 + 0.1 * TIME, (3, 1)), FALLING)) == []
    assert found(study(np.tile(1.0 + 0.3 * TIME, (3, 1)), FALLING)) != []


def test_a_rising_objective_overfits_when_it_falls():
    record = Study.from_arrays(
        {"x": np.arange(3)},
        {"valid/accuracy": np.tile(1 - VALLEY / 4, (3, 1)), "train/loss": np.tile(FALLING, (3, 1))},
        np.linspace(0, 1000, 21).astype(int),
        objective="valid/accuracy",
        maximize=True,
    )
    assert [f.code for f in found(record)] == ["overfitting"]


def test_one_trial_of_three_is_not_enough_unless_most_do():
    others = np.tile(FALLING + 0.5, (2, 1))
    assert found(study(np.r_[VALLEY[None], others], FALLING)) == []
    lower = np.tile(VALLEY - 0.1, (1, 1))
    assert found(study(np.r_[VALLEY[None], lower, FALLING[None] + 0.5], FALLING)) != []


def test_late_variance_by_hand():
    """Alternating by 0.1 around a plateau: each lies 0.2 off the middle of its neighbours."""
    curve = np.where(np.arange(21) == 0, 2.0, 1.0 + 0.1 * (-1.0) ** np.arange(21))
    info = late_variance_info(study(np.stack([curve, curve + 0.05, curve + 0.1])))
    assert info.noise == pytest.approx(0.2 / math.sqrt(1.5))
    assert info.gap == pytest.approx(0.05)
    assert info.improvement == pytest.approx(1.1)
    assert info.gain == pytest.approx(info.noise * math.sqrt(2 * math.log(11)))
    (finding,) = late_variance_findings(info)
    assert (finding.code, finding.severity) == ("late_variance", "warning")
    # The same noise is small beside trials that differ by ones.
    assert not late_variance_info(study(np.stack([curve, curve + 1, curve + 2]))).high
    # And invisible beside an improvement of hundreds.
    steep = np.where(np.arange(21) == 0, 200.0, curve)
    assert not late_variance_info(study(np.stack([steep, steep, steep]))).high
    alone = late_variance_info(study(curve[None]))
    assert math.isnan(alone.gap)
    assert alone.high
    assert "median" not in late_variance_findings(alone)[0].message
    assert "fewer than 8" in late_variance_info(study(np.ones((3, 4)))).skipped
    assert late_variance_findings(late_variance_info(study(np.ones((3, 4))))) == []


def draw(seed, overfit=0.0, noise=0.01, correlation=0.0, num_evals=41, num_trials=12):
    """Trials that settle at 0.2 to 0.4; `overfit` is the rise from 30% of training on."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, num_evals)
    wander = noise * rng.normal(size=(num_trials, num_evals))
    for i in range(1, num_evals):
        fresh = math.sqrt(1 - correlation**2) * wander[:, i]
        wander[:, i] = correlation * wander[:, i - 1] + fresh
    valid = 0.2 + 0.2 * rng.random((num_trials, 1)) + 2 * np.exp(-time / 0.08) + wander
    valid = valid + overfit * np.maximum(time - 0.3, 0) / 0.7
    train = 2.2 * np.exp(-time / 0.15) + 0.002 * rng.normal(size=valid.shape)
    return study(valid, train)


@pytest.mark.parametrize("num_evals", [9, 41])
def test_rates_over_random_studies(num_evals):
    """Of 60 studies each: how many are called overfitting or noisy."""

    def rates(**arguments):
        records = [draw(seed, num_evals=num_evals, **arguments) for seed in range(60)]
        late = sum(late_variance_info(r).high for r in records)
        return sum(bool(found(r)) for r in records), late

    assert rates() == (0, 0)
    # Noise of 2.5% of the improvement, of single evaluations or wandering, is no overfitting.
    assert rates(noise=0.05)[0] == 0
    assert max(rates(noise=0.05, correlation=0.7)) <= 4
    assert max(rates(noise=0.05, correlation=0.9)) <= 1
    # A rise by a tenth of the improvement is seen always; one as large as the noise, mostly.
    assert rates(overfit=0.2) == (60, 0)
    assert rates(overfit=0.4, noise=0.1)[0] >= 25
    # Half of the way from the best trial to the median one is about 0.05.
    assert rates(noise=0.2)[1] >= 50


def test_diagnose_tells_both_and_no_more_than_before_of_others(make_study):
    codes = [f.code for f in diagnose(draw(0, overfit=1.0))]
    assert "overfitting" in codes
    assert "healthy" not in codes
    noisy = [f.code for f in diagnose(draw(0, noise=0.2))]
    assert "late_variance" in noisy
    for seed in range(20):
        told = {f.code for f in diagnose(make_study(seed))}
        assert not told & {"overfitting", "late_variance"}
