"""The rule on curves whose truth is known: closed forms, noise without rises, rises in noise."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.instability import (
    MIN_POINTS,
    STRETCH,
    _peaks_between,
    _without_lone_batches,
    find_rises,
    instability_curves,
    instability_findings,
    instability_info,
)
from playbook_optax.records.study import Study

NUM_STEPS, NUM_TRIALS = 400, 200


def codes(found):
    return [finding.code for finding in found]


def least_squares(seed, learning_rate, batch_size, momentum=0.0, start=3.0):
    """Batch losses (trial, step) and expected losses (trial, step + 1) of a stable problem.

    Five features of variance 1 and noise of variance 1: gradient descent is stable below 2.
    """
    rng = np.random.default_rng(seed)
    weights = np.full((NUM_TRIALS, 5), start)
    velocity, losses, expected = np.zeros_like(weights), [], []
    for _ in range(NUM_STEPS):
        expected.append(0.5 * ((weights**2).sum(1) + 1))
        x = rng.normal(size=(NUM_TRIALS, batch_size, 5))
        residual = np.einsum("nbd,nd->nb", x, weights) - rng.normal(size=(NUM_TRIALS, batch_size))
        losses.append(0.5 * (residual**2).mean(1))
        gradient = np.einsum("nb,nbd->nd", residual, x) / batch_size
        velocity = momentum * velocity + gradient
        weights = weights - learning_rate * velocity
    expected.append(0.5 * ((weights**2).sum(1) + 1))
    return np.stack(losses, 1), np.stack(expected, 1)


def as_study(losses, expected, every):
    """What `run_study` records of such runs, evaluated every so many steps."""
    smooth = np.empty_like(losses)
    smooth[:, 0] = losses[:, 0]
    for i in range(1, losses.shape[1]):
        smooth[:, i] = 0.9 * smooth[:, i - 1] + 0.1 * losses[:, i]
    shape = (len(losses), -1, every)
    none = np.full((len(losses), 1), np.nan)
    metrics = {
        "step/loss": np.concatenate([none, losses.reshape(shape).mean(2)], 1),
        "step/peak_loss": np.concatenate([losses[:, :1], smooth.reshape(shape).max(2)], 1),
        "train/loss": expected[:, ::every],
    }
    study = Study.from_arrays(
        {"learning_rate": np.linspace(0.1, 0.2, len(losses))},
        metrics,
        np.arange(0, losses.shape[1] + 1, every),
        objective="train/loss",
    )
    # No mean before the first update is no failure of `run_study`.
    feasible = study.data.assign(infeasible=("trial", np.zeros(len(losses), bool)))
    return dataclasses.replace(study, data=feasible)


# Of 2 x 28 such sets of 200 trials (batches of 1, 2, 4 and 16; 1, 5, 20 and 50 steps between
# evaluations; with and without them) the rule called 2 trials unstable, both with batches of one.
@pytest.mark.parametrize("every", [1, 5, 20, 50])
@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 0.1, "batch_size": 16},
        {"learning_rate": 0.003, "batch_size": 16},
        {"learning_rate": 0.1, "batch_size": 16, "start": 0.0},
        {"learning_rate": 0.03, "batch_size": 16, "momentum": 0.9},
        {"learning_rate": 0.01, "batch_size": 4, "momentum": 0.9},
        {"learning_rate": 0.02, "batch_size": 2},
    ],
    ids=["sgd", "slow", "at_optimum", "momentum", "noisy_momentum", "batch_of_two"],
)
def test_no_alarm_in_200_noisy_stable_trials(arguments, every):
    study = as_study(*least_squares(0, **arguments), every)
    info = instability_info(study)
    assert [row.trial for row in info.rows if row.unstable] == []
    assert codes(instability_findings(info)) == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_alarm_on_single_steps_alone(momentum):
    losses, _ = least_squares(3, 0.03, 4, momentum)
    step = np.arange(NUM_STEPS)
    assert sum(bool(find_rises(step, loss)) for loss in losses) == 0


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0, 1.9, 1.99])
def test_stable_and_merely_slow_quadratics(rate):
    """Gradient descent on w**2 / 2 from 1: the loss is (1 - rate)**(2 step) / 2."""
    step = np.arange(100)
    assert find_rises(step, 0.5 * (1 - rate) ** (2.0 * step)) == ()


def test_momentum_swings_that_die_away_are_no_rise():
    position, velocity, losses = 1.0, 0.0, []
    for _ in range(300):
        losses.append(0.5 * position**2)
        velocity = 0.9 * velocity + position
        position -= 1.0 * velocity
    assert find_rises(np.arange(300), np.array(losses)) == ()


@pytest.mark.parametrize("rate", [2.05, 2.2, 3.0])
def test_quadratic_past_its_limit_rises_from_the_start_and_never_recovers(rate):
    step = np.arange(100)
    loss = 0.5 * (1 - rate) ** (2.0 * step)
    (rise,) = find_rises(step, loss, initial=0.5)
    assert (rise.kind, rise.start_step, rise.top_step) == ("early", 0, 99)
    assert (rise.recovered_step, rise.slow_recovery) == (-1, True)


def decline(num=200, noise=0.02, seed=0):
    time = np.arange(num) / num
    return 2.3 * np.exp(-6 * time) + noise * np.random.default_rng(seed).normal(size=num)


@pytest.mark.parametrize("height", [0.6, 1.0, 3.0, 100.0])
def test_a_sudden_rise_after_a_decline(height):
    for seed in range(20):
        loss = decline(seed=seed)
        loss[100:110] += height
        (rise,) = find_rises(np.arange(1, 201) * 10, loss)
        assert rise.kind == "mid"
        assert 700 <= rise.start_step <= 1010
        assert 1010 <= rise.top_step <= 1100
        assert 1110 <= rise.recovered_step <= 1130
        assert rise.top == pytest.approx(height + 0.11, abs=0.15)
        assert rise.before < rise.level < rise.top


def test_what_is_within_noise_or_small_is_no_rise():
    for seed in range(20):
        quiet, noisy = decline(seed=seed), decline(noise=0.3, seed=seed)
        quiet[100:110] += 0.1  # beyond the noise, but 4% of the decline
        noisy[100:103] += 0.6  # a quarter of it, but two deviations
        assert find_rises(np.arange(200), quiet) == ()
        assert find_rises(np.arange(200), noisy) == ()


def test_one_unlucky_batch_is_no_stretch():
    loss = decline(noise=0.001)
    loss[100] += 1.0
    assert find_rises(np.arange(200), loss) == ()


def test_the_peak_tells_what_sparse_evaluation_misses():
    step = np.arange(0, 1000, 50)
    loss = 2.3 * np.exp(-step / 200.0)
    peak = loss + 0.01
    assert find_rises(step, loss, peak) == ()
    peak[10] = 3.0
    (rise,) = find_rises(step, loss, peak)
    assert (rise.kind, rise.top_step, rise.top) == ("mid", 500, 3.0)
    assert find_rises(step, loss) == ()


def test_slow_recovery_is_told_from_a_quick_one():
    step = np.arange(400)
    for length, slow in [(10, False), (60, True)]:
        loss = 2.0 - step / 400.0
        loss[200 : 200 + length] += 5.0
        (rise,) = find_rises(step, loss)
        assert rise.slow_recovery == slow
        assert rise.recovered_step - rise.start_step == pytest.approx(length, abs=3)


def test_a_diverging_curve_is_read_up_to_its_end():
    loss = decline(100)
    loss[60:64] = [1.0, 5.0, 50.0, 1e30]
    loss[64:] = [np.nan, *[-np.inf] * 35]
    (rise,) = find_rises(np.arange(100) * 10, loss)
    assert (rise.kind, rise.top, rise.recovered_step) == ("mid", 1e30, -1)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_nothing_finite_is_nothing_to_find(bad):
    assert find_rises(np.arange(50), np.full(50, bad)) == ()


def test_too_few_points_and_no_points():
    assert find_rises(np.arange(MIN_POINTS - 1), np.arange(MIN_POINTS - 1.0)) == ()
    assert find_rises(np.zeros(0, int), np.zeros(0)) == ()
    with pytest.raises(ValueError, match="one shape"):
        find_rises(np.arange(3), np.zeros(4))


def recorded(losses, every):
    """Means and smoothed peaks of batch losses (step,) since the previous evaluation."""
    smooth = np.empty_like(losses)
    smooth[0] = losses[0]
    for i in range(1, len(losses)):
        smooth[i] = 0.9 * smooth[i - 1] + 0.1 * losses[i]
    parts = (losses.reshape(-1, every).mean(1), smooth.reshape(-1, every).max(1))
    return np.append(np.nan, parts[0]), np.append(losses[0], parts[1])


@pytest.mark.parametrize("num_high", [1, 4, STRETCH - 1, STRETCH + 1, 15, 30])
def test_between_evaluations_a_peak_counts_if_it_lasts(num_high):
    every, level = 50, 0.5
    losses = np.full(1000, level)
    losses[510 : 510 + num_high] += 40.0
    mean, peak = recorded(losses, every)
    step, loss = np.arange(0, 1001, every), np.full(21, level)
    highest = _peaks_between(step, loss, mean, peak)
    # The smoothed loss reaches 1 - 0.9**n of a rise of n steps; what is left of it after the next
    # interval is as much as peaks may be above the loss.
    assert peak[11] == pytest.approx(level + 40.0 * (1 - 0.9**num_high))
    wanted = level * peak[11] / peak[13] if num_high >= STRETCH else level
    assert highest[11] == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_array_equal(np.delete(highest, 11), np.delete(loss, 11))


def test_peaks_between_evaluations_are_in_the_units_of_the_evaluated_loss():
    """A batch in each interval is a hundred times as large, and the batches' loss has an offset."""
    losses = np.full(1000, 0.5)
    losses[7::50] = 50.0
    losses[510:530] += 400.0
    mean, peak = recorded(losses, 50)
    step, loss = np.arange(0, 1001, 50), np.full(21, 0.1)
    highest = _peaks_between(step, loss, mean, peak)
    # Lone batches make peaks of 0.5 + 0.1 * 49.5, or a little less.
    assert highest[11] == pytest.approx(0.1 * peak[11] / peak[13:].max(), rel=0.01)
    assert (np.delete(highest, 11) == 0.1).all()
    shifted = _peaks_between(step, loss - 1.0, mean - 1.0, peak - 1.0)
    assert shifted[11] > 50
    assert (np.delete(shifted, 11) == -0.9).all()


def test_a_run_that_ended_between_two_evaluations_keeps_its_peak():
    step, loss = np.array([0, 10, 20]), np.array([1.0, 0.5, np.nan])
    peak = np.array([1.0, 0.6, np.inf])
    highest = _peaks_between(step, loss, np.array([np.nan, 0.5, np.inf]), peak)
    np.testing.assert_array_equal(highest, [1.0, 0.5, np.inf])


def test_what_one_huge_batch_did_is_left_out_of_the_batches_losses():
    losses = 0.5 + 0.01 * np.sin(np.arange(1000.0))
    lone, lasting = losses.copy(), losses.copy()
    lone[620] += 500.0
    lasting[620:640] += 500.0
    step = np.arange(0, 1001, 50)
    for curve, kept in ((losses, True), (lone, False), (lasting, True)):
        mean, peak = recorded(curve, 50)
        means, peaks = _without_lone_batches(step, mean, peak)
        assert (means[13] == mean[13]) == kept
        assert kept or 0.49 < means[13] <= peaks[13] < 0.51
        # What is left of its smoothing in the next interval goes as well.
        assert kept or peaks[14] < 0.51
        np.testing.assert_allclose(np.delete(means, 13), np.delete(mean, 13), rtol=0.01)


def test_an_evaluated_loss_above_twice_the_first_is_a_rise_however_often_it_swings():
    step = np.arange(0, 1001, 50)
    loss = np.where(np.arange(21) % 2 == 1, 40.0, 0.2)
    loss[0] = 1.0
    assert find_rises(step, loss, initial=1.0) == ()
    rises = find_rises(step, loss, initial=1.0, evaluated=True)
    assert len(rises) >= 5
    assert (rises[0].start_step, rises[0].top_step, rises[0].recovered_step) == (0, 50, 100)
    # Below that, swings of its own are its noise.
    assert find_rises(step, np.where(loss > 1, 0.9, loss), initial=1.0, evaluated=True) == ()


def test_training_that_starts_at_the_optimum_may_settle_above_it():
    step = np.arange(0, 1001, 50)
    loss = 1 + 0.08 * (1 - np.exp(-step / 100))
    assert find_rises(step, loss, initial=1.0, evaluated=True) == ()
    assert find_rises(step, 1 + 2 * (loss - 1), initial=1.0, evaluated=True) != ()


@settings(max_examples=40, deadline=None)
@given(
    shift=st.floats(-100, 100),
    power=st.integers(-20, 20),
    height=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    seed=st.integers(0, 5),
    with_initial=st.booleans(),
)
def test_units_do_not_change_the_verdict(shift, power, height, seed, with_initial):
    loss = decline(80, seed=seed)
    loss[40:46] += height
    initial = 2.4 if with_initial else None
    step = np.arange(1, 81) * 10
    plain = find_rises(step, loss, initial=initial)
    scale = 2.0**power
    other = find_rises(
        step, scale * (loss + shift), initial=None if initial is None else scale * (initial + shift)
    )
    keys = ("start_step", "top_step", "recovered_step", "kind", "slow_recovery")
    for field in keys:
        assert [getattr(r, field) for r in plain] == [getattr(r, field) for r in other]
    np.testing.assert_allclose(
        [scale * r.height for r in plain], [r.height for r in other], rtol=1e-6, atol=1e-9 * scale
    )


@pytest.mark.parametrize("factor", [2, 10, 1000])
def test_units_of_time_do_not_change_the_verdict(factor):
    loss = decline(100)
    loss[50:56] += 2.0
    (one,) = find_rises(np.arange(100) * 10, loss)
    (other,) = find_rises(np.arange(100) * 10 * factor, loss)
    assert other.start_step == factor * one.start_step
    assert other.recovered_step == factor * one.recovered_step
    assert (other.kind, other.slow_recovery) == (one.kind, one.slow_recovery)


def sweep(kinds, *, num_evals=41, norms=False, infeasible=None):
    """Trials whose learning rates double from lr* = 0.1 on, each of a kind."""
    rng = np.random.default_rng(0)
    step = np.arange(num_evals) * 10
    time = step / step[-1]
    curves, peaks = [], []
    for i, kind in enumerate(kinds):
        curve = 2.3 * np.exp(-6 * time) + 0.01 * rng.normal(size=num_evals) + 0.02 * i
        norm = np.ones(num_evals)
        if kind == "mid":
            curve[20:26] += 2.0
            norm[19:21] = 50.0
        if kind == "early":
            curve[1:3] += 9.0
        if kind == "nan":
            curve[10:] = np.nan
        if kind == "-inf":
            curve[10:] = -np.inf
        curves.append(curve)
        peaks.append(norm)
    metrics = {"train/loss": np.array(curves)}
    if "nan" in kinds:  # As of our own trials, which end by diverging only.
        metrics["step/peak_gradient_norm"] = np.ones_like(curves)
    if norms:
        metrics |= {"step/gradient_norm": np.ones_like(curves), "step/peak_gradient_norm": peaks}
        metrics = {name: np.asarray(values) for name, values in metrics.items()}
    rates = 0.1 * 2.0 ** np.arange(len(kinds))
    return Study.from_arrays(
        {"learning_rate": rates}, metrics, step, objective="train/loss", infeasible=infeasible
    )


def test_a_study_tells_each_trial_and_the_limit():
    info = instability_info(sweep(["", "", "mid", "early", "nan"], norms=True))
    assert [row.kind for row in info.rows] == ["", "", "mid", "early", "diverged"]
    assert info.unstable.tolist() == [False, False, True, True, True]
    assert (info.best_trial, info.best_learning_rate, info.alone) == (0, 0.1, True)
    assert (info.above, info.first_unstable) == ((1,), 0.4)
    assert info.unstable_share_above == 0.0
    assert info.checks == (2, 3)  # 4 and 8 times lr*
    assert [row.norm_outlier for row in info.rows] == [None, None, True, False, None]
    assert instability_findings(info)[0].code == "slow_recovery"


@pytest.mark.parametrize(
    ("kind", "told", "advice"),
    [
        ("mid", "mid-training", "Try gradient clipping"),
        ("early", "early", "Try learning rate warm-up"),
        ("nan", "mid-training", "Try gradient clipping"),
    ],
)
def test_instability_just_above_the_best_is_a_warning(kind, told, advice):
    (finding,) = [f for f in diagnose(sweep(["", kind, ""])) if f.code == "unstable_above_best"]
    assert (finding.severity, finding.evidence["kind"]) == ("warning", told)
    assert finding.evidence["trials"] == [1]
    assert advice in finding.suggestion
    assert "lr* = 0.1" in finding.message
    assert "from 0.2 on" in finding.message
    json.dumps(finding.to_dict(), allow_nan=False)


def test_a_healthy_sweep_says_nothing():
    assert instability_findings(instability_info(sweep(["", "", "", ""]))) == []


# Rows of the fault catalogue: some diverge, all diverge, NaN first, -inf, and what is frozen.
def test_diverged_trials_leave_the_others_as_they_are():
    alone = instability_info(sweep(["", "mid", ""]))
    beside = instability_info(sweep(["", "mid", "", "nan", "-inf"]))
    assert beside.rows[:3] == alone.rows
    assert [row.kind for row in beside.rows[3:]] == ["diverged", "diverged"]
    assert beside.best_trial == 0
    nan_first = instability_info(sweep(["nan", "", ""]))
    assert (nan_first.best_trial, nan_first.rows[0].kind) == (1, "diverged")


def test_all_diverged_asks_for_a_lower_range():
    study = sweep(["nan", "-inf", "nan"])
    info = instability_info(study)
    assert info.unstable.all()
    assert (info.best_trial, info.above, info.checks) == (-1, (), ())
    assert np.isnan(info.first_unstable)
    assert codes(diagnose(study)) == ["all_infeasible"]
    assert instability_findings(info) == []
    assert instability_curves(study).trials == ()


def test_the_worst_seed_speaks_for_a_trial():
    calm, broken = sweep(["", ""]), sweep(["", "mid"])
    curves = np.stack([s.data["train/loss"].values for s in (calm, broken)], axis=1)
    study = Study.from_arrays(
        calm.points, {"train/loss": curves}, calm.data["step"].values, objective="train/loss"
    )
    info, single = instability_info(study), instability_info(broken)
    assert [row.seed for row in info.rows] == [0, 1]
    assert info.rows[1]._replace(seed=0) == single.rows[1]
    assert info.rows[0] == instability_info(calm).rows[0]
    np.testing.assert_array_equal(
        instability_curves(study).loss[1], broken.data["train/loss"].values[1]
    )


def test_without_a_training_loss_the_check_says_that_it_was_skipped():
    study = Study.from_arrays(
        {"learning_rate": [0.1, 0.2]},
        {"valid/loss": np.array([[2.0, 1.0], [2.0, np.nan]])},
        [0, 10],
        objective="valid/loss",
        infeasible=np.array([False, True]),
    )
    info = instability_info(study)
    assert info.loss == ""
    assert info.unstable.tolist() == [False, True]
    (finding, *_) = [f for f in instability_findings(info) if "skipped" in f.code]
    assert finding.code == "instability_check_skipped"
    assert "no training loss was recorded" in finding.message
    with pytest.raises(ValueError, match="no training loss"):
        instability_curves(study)


def test_few_evaluations_are_told_of():
    info = instability_info(sweep(["", ""], num_evals=6))
    assert "5 evaluations after the first update are too few" in info.skipped
    (finding,) = instability_findings(info)
    assert finding.suggestion == "Evaluate at least every 6 steps."
    (finding,) = instability_findings(info._replace(num_steps=7))
    assert finding.suggestion == "It takes a run of 8 steps or more."


def test_a_table_from_elsewhere():
    import pandas as pd

    study = sweep(["", "mid"])
    loss = study.data["train/loss"].values
    step = study.data["step"].values
    frame = pd.DataFrame(
        {
            "trial": np.repeat([0, 1], len(step)),
            "lr": np.repeat(study.points["learning_rate"], len(step)),
            "step": np.tile(step, 2),
            "loss": loss.ravel(),
        }
    )
    foreign = Study.from_dataframe(
        frame, objective="loss", parameters=["lr"], trial="trial", step="step"
    )
    info = instability_info(foreign)
    assert info.unstable.tolist() == [False, True]
    assert (info.loss, info.learning_rate) == ("loss", "")
    assert instability_findings(info)[0].code == "slow_recovery"
    assert instability_curves(foreign).trials == (0, 1)


def test_curves_are_those_of_the_playbook():
    study = sweep(["", "", "mid", "early", "nan"])
    info = instability_curves(study)
    assert info.trials == (0, 1, 2, 3)
    np.testing.assert_allclose(info.multiples, [1, 2, 4, 8])
    assert [row.kind for row in info.rows] == ["", "", "mid", "early"]
    assert instability_curves(study, 2).trials == (0, 2)
    with pytest.raises(ValueError, match="num_trials"):
        instability_curves(study, 0)
