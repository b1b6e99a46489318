"""Best steps, compute-bound or not, and checkpoints that are dense enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from playbook_optax.analysis.training_length import (
    best_step_info,
    checkpoint_findings,
    checkpoint_info,
    compare_lengths,
    length_findings,
    training_length_findings,
    training_length_info,
)
from playbook_optax.records.study import Study


def study(curves, step=None, **kwargs):
    curves = np.asarray(curves, np.float64)
    step = np.linspace(0, 1000, curves.shape[-1]).astype(int) if step is None else step
    return Study.from_arrays(
        {"x": np.arange(len(curves))}, {"loss": curves}, step, objective="loss", **kwargs
    )


def dip(at, num_evals=21, depth=1.0):
    """A curve at 2 with its best at one evaluation."""
    curve = np.full(num_evals, 2.0)
    curve[at] -= depth
    return curve


def test_bins_hold_their_upper_edge_and_every_usable_trial_once():
    curves = [dip(i, depth=1 + i / 100) for i in range(21)]
    curves[20] = np.full(21, np.nan)
    info = best_step_info(study(curves))
    # Best steps 0, 50, 100, ..., 950: the first two share a bin.
    assert info.counts.tolist() == [2, *[1] * 18, 0]
    np.testing.assert_allclose(info.edges[[2, 15]], [0.1, 0.75])
    assert info.trials.tolist() == [19, 18, 17]
    assert info.best_steps.tolist() == [950, 900, 850]
    assert info.good_counts.sum() == 3
    assert (info.num_first_tenth, info.num_last_quarter) == (0, 3)
    assert len(info.all_fractions) == 20
    assert info.largest_gap == pytest.approx(0.05)


def test_the_first_tenth_includes_its_end_and_the_last_quarter_not_its_start():
    info = best_step_info(study([dip(2), dip(15), dip(16)]))
    assert (info.num_first_tenth, info.num_last_quarter) == (1, 1)


def test_no_usable_trial():
    info = best_step_info(study(np.full((2, 9), np.nan)))
    assert len(info.trials) == 0
    assert info.counts.sum() == 0
    length = training_length_info(study(np.full((2, 9), np.nan)))
    assert (length.compute_bound, length.reason) == (None, "no trial has a value")
    assert training_length_findings(length)[0].code == "compute_bound_unknown"


def test_compute_bound_or_not_of_known_curves():
    time = np.linspace(0, 1, 41)
    cases = [
        (2 - time, True),
        (2 - np.sqrt(time), True),
        (1 + np.exp(-time / 0.05), False),  # saturated, though its best step is the last
        (1 + (time - 0.3) ** 2, False),  # overfits
        (1 + 0 * time, False),
    ]
    for curve, bound in cases:
        info = training_length_info(study(np.tile(curve, (3, 1))))
        assert info.compute_bound is bound
        (finding,) = training_length_findings(info)
        assert finding.code == ("compute_bound" if bound else "not_compute_bound")
        assert finding.severity == "info"


def test_trials_that_disagree_and_too_few_evaluations_cannot_be_told():
    time = np.linspace(0, 1, 41)
    mixed = [2 - time, 2 - 0.9 * time, np.where(time < 0.2, 2.0, 1.15)]
    info = training_length_info(study(mixed))
    assert info.compute_bound is None
    assert (info.num_improving, info.num_early) == (2, 0)
    assert "2 of the 3 best trials" in info.reason
    assert training_length_info(study(np.tile(2 - time[::10], (3, 1)))).compute_bound is None


def test_noise_is_no_evidence_of_saturation():
    """Where the error of the gain is as large as the whole improvement nothing was shown."""
    told = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        curves = 2 - 0.3 * np.linspace(0, 1, 13) + 0.3 * rng.normal(size=(3, 13))
        told.append(training_length_info(study(curves)).compute_bound)
    assert told.count(None) >= 25


def test_true_verdicts_over_many_noisy_studies(make_study):
    flat = [
        training_length_info(make_study(s, settle=0.03, num_evals=41)).compute_bound
        for s in range(20)
    ]
    trend = [training_length_info(make_study(s, drift=0.5)).compute_bound for s in range(20)]
    assert (flat.count(True), trend.count(False)) == (0, 0)
    assert flat.count(False) >= 15
    assert trend.count(True) >= 15


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=9, max_size=9))
def test_the_retrospective_best_never_gets_worse_with_longer_training(values):
    for maximize in (False, True):
        record = study([values], maximize=maximize, infeasible=np.array([False]))
        best = checkpoint_info(record).best_so_far[0]
        seen = best[np.isfinite(best)]
        assert np.all(np.diff(seen) >= 0) if maximize else np.all(np.diff(seen) <= 0)
        assert np.isfinite(best).sum() == 0 or np.isfinite(best[-1])
        curve = record.data["loss"].values[0]
        if np.isfinite(curve).any():
            assert best[-1] == (np.nanmax(curve) if maximize else np.nanmin(curve))


def test_a_best_that_stands_alone_is_too_sparse():
    (finding,) = checkpoint_findings(checkpoint_info(study(np.tile(dip(5), (3, 1)))))
    assert finding.code == "checkpoints_too_sparse"
    assert "3 of the 3 best trials" in finding.message
    # A parabola through 2, 1, 2 has its second difference 2, an eighth of which can be missed.
    np.testing.assert_allclose(finding.evidence["missed"], 0.25)
    (few,) = checkpoint_findings(checkpoint_info(study(np.tile(dip(2, 5), (3, 1)))))
    assert "only 4" in few.message


def test_a_plateau_a_decline_and_noise_are_dense_enough():
    time = np.linspace(0, 1, 21)
    rng = np.random.default_rng(0)
    smooth = [np.where(time == 0, 2.0, 1.0), 2 - time, 1 + (time - 0.5) ** 2 / 4]
    for curve in smooth:
        assert checkpoint_findings(checkpoint_info(study(np.tile(curve, (3, 1))))) == []
    for _ in range(30):
        noisy = study(1 + 0.1 * rng.normal(size=(4, 21)))
        assert checkpoint_findings(checkpoint_info(noisy)) == []


def test_longer_and_worse():
    time = np.linspace(0, 1, 21)
    short = study(np.tile(2 - time, (3, 1)))
    long = study(np.tile(2 - 0.5 * time, (3, 1)), step=(2000 * time).astype(int))
    info = compare_lengths(short, long)
    assert (info.values, info.num_steps, info.worse) == ((1.0, 1.5), (1000, 2000), True)
    (finding,) = length_findings(info)
    assert finding.code == "longer_was_worse"
    better = study(np.tile(2 - 1.5 * time, (3, 1)), step=(2000 * time).astype(int))
    assert length_findings(compare_lengths(short, better)) == []
    nothing = study(np.full((3, 21), np.nan), step=(2000 * time).astype(int))
    assert not compare_lengths(short, nothing).worse
    with pytest.raises(ValueError, match="longer has 1000 steps"):
        compare_lengths(long, short)


def test_a_difference_within_the_spread_over_seeds_is_none():
    time = np.linspace(0, 1, 11)
    curves = np.stack([2 - time, 2.2 - time])[None]
    short = study(curves)
    long = study(curves + 0.1, step=(2000 * time).astype(int))
    info = compare_lengths(short, long)
    assert info.error == pytest.approx(np.sqrt(2) * np.std([0, 0.2], ddof=1) / np.sqrt(2))
    assert not info.worse


TIME = np.linspace(0, 1, 41)
COSINE = 0.5 + 0.5 * np.cos(np.pi * TIME)
FLOOR = 0.2 + 0.3 * COSINE + 2 * np.exp(-TIME / 0.02)


def bound(curve, **arguments):
    return training_length_info(study(np.tile(curve, (3, 1))), **arguments).compute_bound


def test_the_fall_from_the_first_loss_does_not_dwarf_what_comes_later():
    later = 0.4 * 2.0**-TIME  # 0.2 at the end, 0.1 after twice the steps.
    assert [bound(later + first * (TIME == 0)) for first in (0, 2, 200)] == [True] * 3
    # Of an accuracy it is what is missing to 1 that counts.
    curve = np.tile(1 - later / 10, (3, 1))
    record = Study.from_arrays(
        {"x": np.arange(3)},
        {"accuracy": curve - 0.9 * (TIME == 0)},
        np.arange(41),
        objective="accuracy",
        maximize=True,
    )
    info = training_length_info(record)
    assert info.compute_bound is True
    assert info.worth == pytest.approx(0.02 * 0.02)


def test_a_floor_of_noise_that_falls_with_the_rate_is_no_progress():
    assert bound(FLOOR, rates=COSINE) is None
    progress = FLOOR + 0.1 * (TIME + 0.01) ** -0.3
    assert bound(progress, rates=COSINE) is True
    record = study(np.tile(FLOOR, (3, 1)))
    with pytest.raises(ValueError, match=r"rates must have shape \(trial, eval\) = \(3, 41\)"):
        training_length_info(record, rates=np.ones(40))


def test_a_recorded_rate_is_read_and_one_that_is_unknown_is_taken_to_decay():
    curve = 0.2 + 2 * np.exp(-TIME / 0.07)

    def info(**metrics):
        record = Study.from_arrays(
            {"x": np.arange(3)},
            {"loss": np.tile(curve, (3, 1)), **metrics},
            np.arange(41),
            objective="loss",
        )
        return training_length_info(record)

    assert (info().compute_bound, info().knows_rates) == (None, False)
    steady = info(learning_rate=np.full((3, 41), 0.1))
    assert (steady.compute_bound, steady.knows_rates) == (False, True)
    # Means between evaluations begin with none.
    late = np.full((3, 41), 0.1)
    late[:, 0] = np.nan
    assert info(**{"step/lr": late}).knows_rates
    late[:, 9] = np.nan
    assert not info(**{"step/lr": late}).knows_rates


def test_a_gain_that_one_example_makes_is_not_worth_twice_the_steps():
    curve = np.where(TIME == 0, 0.9, np.where(TIME < 0.6, 0.05, 0.04))
    metrics = {"error_rate": np.tile(curve, (3, 1))}

    def info(**resolution):
        record = Study.from_arrays(
            {"x": np.arange(3)}, metrics, np.arange(41), objective="error_rate", **resolution
        )
        return training_length_info(record)

    assert info().compute_bound is None
    assert info(resolution=0.02).compute_bound is False
    assert info(resolution=0.02).worth == 0.02


def pair(gains):
    """A study of 1000 steps and one of 2000 whose points end so much lower."""
    ends = 0.2 + 0.01 * np.arange(len(gains))
    curves = ends[:, None] + FLOOR - FLOOR[-1]
    short = study(curves)
    long = study(curves - np.asarray(gains)[:, None], step=(2000 * TIME).astype(int))
    return short, long


def test_two_lengths_decide_where_the_curves_cannot():
    short, long = pair([0.1, 0.11, 0.09, 0.1])
    info = training_length_info(long, shorter=short, rates=COSINE)
    assert (info.compute_bound, info.basis) == (True, "lengths")
    assert info.doubling_gain == pytest.approx(0.1)
    (finding,) = training_length_findings(info)
    assert "twice the steps gained 0.1" in finding.message
    # Half of a 95% interval of the mean of four: t(3) = 3.182.
    deviation = np.std([0.1, 0.11, 0.09, 0.1], ddof=1) / 2
    assert info.doubling_gain_error == pytest.approx(deviation * 3.1824 / 2, rel=1e-4)
    short, long = pair([0.0, 0.0005, -0.0005, 0.0])
    info = training_length_info(long, shorter=short, rates=COSINE)
    assert (info.compute_bound, info.basis) == (False, "lengths")
    short, long = pair([0.1, -0.1, 0.05, -0.05])
    assert training_length_info(long, shorter=short, rates=COSINE).compute_bound is None


def test_lengths_are_compared_at_the_points_that_they_share():
    short, long = pair([0.1, 0.1, 0.1])
    shared = compare_lengths(short, long)
    assert sorted(shared.pairs.tolist()) == [[0, 0], [1, 1], [2, 2]]
    assert shared.gain == pytest.approx(0.1)
    other = Study.from_arrays(
        {"x": np.arange(5.0, 8.0)},
        {"loss": long.data["loss"].values},
        long.data["step"].values,
        objective="loss",
    )
    apart = compare_lengths(short, other)
    assert (len(apart.pairs), apart.gain_error) == (0, np.inf)
    assert apart.gain == pytest.approx(0.1)
    info = training_length_info(other, shorter=short, rates=COSINE)
    assert (info.compute_bound, info.basis) == (None, "curves")


def test_what_cannot_be_followed_is_not_asked_for():
    curve = np.array([[2.0, 1.0, 1.5, 0.5, 1.5]])
    assert checkpoint_findings(checkpoint_info(study(curve, step=np.arange(5)))) == []
    assert checkpoint_findings(checkpoint_info(study(curve, step=2 * np.arange(5)))) != []
