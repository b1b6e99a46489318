import numpy as np
import pytest

from playbook_optax.analysis.axes import axis, hyperparameters
from playbook_optax.analysis.outcomes import mean_curve, outcomes
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

NAN, INF = np.nan, np.inf


def study(curves, step=None, infeasible=None, **kwargs):
    curves = np.asarray(curves, np.float64)
    num = len(curves)
    return Study.from_arrays(
        {"learning_rate": np.linspace(0.1, 1, num)},
        {"loss": curves, "valid/accuracy": -curves},
        np.arange(curves.shape[-1]) * 10 if step is None else step,
        objective="loss",
        infeasible=np.zeros(num, bool) if infeasible is None else np.asarray(infeasible),
        **kwargs,
    )


def test_best_over_training_ties_and_nonfinite_values():
    out = outcomes(
        study(
            [
                [3, NAN, 2],
                [3, -INF, 1],
                [3, 1, 1],
                [NAN, NAN, NAN],
                [0, 0, 0],
            ],
            infeasible=[False, False, False, False, True],
        )
    )
    np.testing.assert_array_equal(out.value, [2, 1, 1, NAN, NAN])
    np.testing.assert_array_equal(out.best_step, [20, 20, 10, -1, -1])
    np.testing.assert_array_equal(out.order, [1, 2, 0])
    assert out.best == 1
    assert out.reason.tolist() == ["", "", "", "", "unknown"]


def test_agrees_with_study_best():
    rng = np.random.default_rng(3)
    for _ in range(20):
        curves = rng.integers(0, 5, (6, 4)).astype(float)
        curves[rng.random((6, 4)) < 0.2] = NAN
        record = study(curves, infeasible=rng.random(6) < 0.3)
        for objective, maximize in ((None, None), ("valid/accuracy", True), ("loss", True)):
            out = outcomes(record, objective, maximize)
            best = record.best(objective, maximize)
            assert (out.best, out.value[out.best], out.checkpoint_step[out.best]) == (
                best.trial,
                best.value,
                best.step,
            )


def test_seeds_are_averaged_at_a_common_step_and_one_bad_seed_makes_a_trial_infeasible():
    curves = np.array([[[4, 1, 3], [4, 3, 1]], [[4, 2, 1.5], [4, 2, 1.5]], [[4, 0, 0], [4, 0, 0]]])
    record = study(curves, infeasible=[[False, False], [False, False], [False, True]])
    out = outcomes(record)
    np.testing.assert_array_equal(mean_curve(record, "loss")[0], [4, 2, 2])
    np.testing.assert_array_equal(out.value, [2, 1.5, NAN])
    assert out.best == 1 == record.best().trial
    assert out.infeasible.tolist() == [False, False, True]


def test_maximize_by_name_has_to_be_said():
    record = study([[1, 2], [3, 0.5]])
    with pytest.raises(ValueError, match="maximize must be given"):
        outcomes(record, "valid/accuracy")
    assert outcomes(record, "valid/accuracy", True).value.tolist() == [-1, -0.5]
    with pytest.raises(ValueError, match="did you mean 'valid/accuracy'"):
        outcomes(record, "valid/acuracy")


@pytest.mark.parametrize(("num", "good"), [(1, 1), (2, 2), (3, 3), (16, 3), (31, 4), (500, 10)])
def test_number_of_good_trials(num, good):
    out = outcomes(study(np.arange(num, dtype=float)[:, None]))
    assert out.good().tolist() == list(range(good))


def test_axis_of_each_scale():
    space = SearchSpace(
        {
            "lr": Float(1e-4, 1.0, scale="log"),
            "b2": Float(0.9, 0.999, scale="reverse_log"),
            "dropout": Float(0.0, 0.5),
            "warmup": Integer(10, 1000, scale="log", include_zero=True),
            "act": Categorical(["relu", "gelu"]),
            "width": Categorical([16, 64]),
        }
    )
    record = Study.from_arrays(
        {
            "lr": [1e-4, 1e-2, 1.0],
            "b2": [0.9, 0.99, 0.999],
            "dropout": [0.0, 0.25, 0.5],
            "warmup": np.array([0, 100, 1000]),
            "act": np.array([1, 0, 1]),
            "width": np.array([16, 64, 16]),
        },
        {"loss": np.ones((3, 2))},
        [0, 1],
        objective="loss",
        space=space,
    )
    assert hyperparameters(record) == list(space)
    for name in ("lr", "b2", "dropout"):
        np.testing.assert_allclose(axis(record, name).unit, [0, 0.5, 1], atol=1e-9)
    line = axis(record, "warmup")
    assert (line.kind, line.start, line.low, line.high) == ("integer", 5, 0, 1000)
    np.testing.assert_allclose(line.unit, np.log([1, 20, 200]) / np.log(200))
    assert axis(record, "act").labels == ("relu", "gelu")
    np.testing.assert_array_equal(axis(record, "act").values, [1, 0, 1])
    np.testing.assert_array_equal(axis(record, "width").values, [0, 1, 0])
    with pytest.raises(ValueError, match="did you mean 'dropout'"):
        axis(record, "droput")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1e-3, 0.5], "log"),
        ([0.9, 0.999], "reverse_log"),
        ([0.1, 0.5], "linear"),
        ([0, 9], "linear"),
    ],
)
def test_scale_is_guessed_without_a_space(values, scale):
    record = Study.from_arrays({"x": values}, {"loss": np.ones((2, 1))}, [0], objective="loss")
    line = axis(record, "x")
    assert (line.scale, line.declared) == (scale, False)
    assert (line.low, line.high) == (min(values), max(values))
