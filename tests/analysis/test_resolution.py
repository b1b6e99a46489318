"""What the objective of a study can tell: ties, flat sweeps, a best before training."""

import numpy as np
import pytest
import scipy.stats

from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.analysis.resolution import resolution_findings, resolution_info
from playbook_optax.records.study import Study

NAN = float("nan")


def study(errors, losses=None, resolution=1 / 34, objective="valid/error_rate", **arguments):
    errors = np.asarray(errors, np.float32)
    metrics = {objective: errors}
    if losses is not None:
        metrics["valid/loss"] = np.asarray(losses, np.float32)
    points = {"learning_rate": np.geomspace(1e-3, 1.0, len(errors)).astype(np.float32)}
    step = 10 * np.arange(errors.shape[-1])
    return Study.from_arrays(
        points, metrics, step, objective=objective, resolution=resolution, **arguments
    )


def codes(record):
    return [finding.code for finding in resolution_findings(resolution_info(record))]


def test_one_example_is_a_tie_and_two_are_none():
    one = np.float32(1 / 34)
    info = resolution_info(study([[0.6, 3 * one], [0.6, 2 * one], [0.6, 4 * one], [0.6, 3 * one]]))
    assert info.tied.tolist() == [1, 0, 3]  # Nothing else is recorded: the middle of equals.
    assert info.best == 1
    losses = [[1.0, 0.6], [1.0, 0.8], [1.0, 0.0], [1.0, 0.5]]
    told = study([[0.6, 3 * one], [0.6, 2 * one], [0.6, 4 * one], [0.6, 3 * one]], losses)
    info = resolution_info(told)
    assert info.tied.tolist() == [3, 0, 1]
    (finding,) = resolution_findings(info)
    assert finding.code == "validation_cannot_separate"
    assert "one example of 34 is 0.0294" in finding.message
    assert "trial 3 comes first by its valid/loss" in finding.message
    # A loss of less than one undecided example, log(2) / 34, is a tie as well.
    alike = [[1.0, 0.51], [1.0, 0.8], [1.0, 0.0], [1.0, 0.5]]
    record = study([[0.6, 3 * one], [0.6, 2 * one], [0.6, 4 * one], [0.6, 3 * one]], alike)
    assert resolution_info(record).tied.tolist() == [3, 0, 1]
    sixth = study([[0.6, one]] * 5, [[1.0, loss] for loss in (0.4, 0.011, 0.01, 0.005, 0.0)])
    assert resolution_info(sixth).tied[0] == 3  # Of the two in the middle of 1 to 4 the surer.
    # What the study calls its best does not change: the lowest value itself.
    assert told.best().trial == outcomes(told).best == 1


def test_without_a_resolution_nothing_is_said_of_ties():
    assert codes(study([[0.6, 0.0], [0.6, 0.0], [0.6, 0.1]], resolution=None)) == []


@pytest.mark.parametrize(
    ("errors", "flat"),
    [
        ([[0.667, 0.667], [0.667, 0.667]], True),
        ([[0.667, 0.638], [0.667, 0.667]], True),  # one example
        ([[0.667, 0.608], [0.667, 0.667]], False),  # two
        ([[0.667, 0.0], [0.667, 0.0]], False),  # a tie far below the start
        ([[0.667, 0.667]], False),  # one trial is no sweep
    ],
)
def test_a_sweep_without_a_slope(errors, flat):
    found = resolution_findings(resolution_info(study(errors)))
    assert ("no_slope" in [f.code for f in found]) == flat
    if flat:
        assert found[0].severity == "error"
        assert diagnose(study(errors))[0].code == "no_slope"


def test_a_loss_is_flat_only_up_to_rounding():
    losses = [[2.302585, 2.302585, 2.302584], [2.302585, 2.302586, 2.302585]]
    assert codes(study(losses, resolution=None, objective="valid/loss")) == ["no_slope"]
    losses = [[2.302585, 2.3025, 2.3024], [2.302585, 2.3025, 2.3023]]
    assert codes(study(losses, resolution=None, objective="valid/loss")) == []


def test_without_an_evaluation_before_training_no_start_is_known():
    record = Study.from_arrays(
        {"learning_rate": [0.1, 1.0]}, {"loss": [[1.0, 1.0], [1.0, 1.0]]}, [5, 10], objective="loss"
    )
    assert codes(record) == []


def test_a_best_before_training_is_an_error():
    worse = study([[0.5, 0.7, 0.9], [0.5, 0.8, 0.7], [0.5, NAN, NAN]])
    (finding,) = resolution_findings(resolution_info(worse))
    assert (finding.code, finding.severity) == ("best_at_start", "error")
    assert codes(study([[0.5, 0.9, 0.5 - 1 / 34], [0.5, 0.8, 0.9]])) == ["best_at_start"]
    assert codes(study([[0.5, 0.9, 0.5 - 2 / 34], [0.5, 0.8, 0.9]])) == []
    assert codes(study([[0.5, 0.5]])) == ["best_at_start"]


@pytest.mark.parametrize("maximize", [False, True])
def test_the_bound_is_that_of_clopper_and_pearson(maximize):
    errors = np.array([[0.6, 2 / 34], [0.6, 0.5]])
    values = 1 - errors if maximize else errors
    info = resolution_info(study(values, objective="valid/hits", maximize=maximize))
    expected = scipy.stats.binomtest(2, 34, alternative="less").proportion_ci(0.95).high
    np.testing.assert_allclose(1 - info.upper if maximize else info.upper, expected, rtol=1e-6)


def test_a_study_without_a_feasible_trial_says_nothing():
    record = study([[0.5, 0.4], [0.5, 0.4]], infeasible=np.array([True, True]))
    info = resolution_info(record)
    assert (info.best, info.step) == (-1, -1)
    assert resolution_findings(info) == []


@pytest.mark.parametrize("resolution", [5e-324, 1e-300, 2.0, 1e300])
def test_a_resolution_that_no_example_has_is_told_and_bounds_nothing(resolution):
    # A file may claim it.
    info = resolution_info(study([[0.5, 0.0], [0.5, 0.0]], resolution=resolution))
    assert np.isnan(info.upper)
    for finding in resolution_findings(info):
        assert "one example is " in finding.message
