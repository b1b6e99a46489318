"""Trials from elsewhere: arrays of the user's own loop, and other tools' tables."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from records.helpers import SPACE

from playbook_optax import _feasibility
from playbook_optax.records import Study
from playbook_optax.search_space import Categorical, Float, SearchSpace

NAN, INF = float("nan"), float("inf")
POINTS = {"lr": np.array([0.1, 0.2], np.float32)}
METRICS = {"train/loss": np.ones((2, 3)), "valid/error": np.ones((2, 3))}
STEP = np.array([0, 5, 10])


def from_arrays(points=POINTS, metrics=METRICS, step=STEP, objective="valid/error", **more):
    return Study.from_arrays(points, metrics, step, objective=objective, **more)


def infeasible(study):
    """Reason and step of every trial."""
    data = study.data
    assert np.array_equal(data["infeasible"], data["infeasible_step"] >= 0)
    assert np.array_equal(data["infeasible"], data["infeasible_reason"] != "")
    return list(
        zip(
            data["infeasible_reason"].values.ravel().tolist(),
            data["infeasible_step"].values.ravel().tolist(),
            strict=True,
        )
    )


# Arrays -------------------------------------------------------------------------------------------


def test_values_and_dtypes_are_kept():
    study = from_arrays(
        {"lr": jnp.array([0.5, 2.0], jnp.bfloat16), "n": [3, 4], "b": [True, False]},
        {"loss": jnp.ones((2, 3), jnp.float16), "count": np.arange(6).reshape(2, 3)},
        objective="loss",
        maximize=True,
        name="mine",
    )
    assert study.point(1)["lr"].dtype == ml_dtypes.bfloat16
    assert study.point(1) == {"lr": 2.0, "n": 4, "b": False}
    assert study.data["loss"].dtype == np.float16
    assert study.data["count"].values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert study.spec["name"] == "mine"
    assert study.maximize
    assert (study.spec["num_steps"], study.spec["eval_every"]) == (10, 5)
    assert study.spec["source"] == "from_arrays"


def test_best_value_and_step_are_computed():
    curves = [[3.0, 1.0, 1.0], [NAN, NAN, NAN], [3.0, -INF, 2.0]]
    study = from_arrays({"lr": [1.0, 2.0, 3.0]}, {"valid/error": curves})
    assert study.data["best_step"].values.tolist() == [10, -1, 10]
    assert np.array_equal(study.data["best_value"], [1.0, NAN, 2.0], equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_has_diverged(bad):
    curves = np.ones((4, 3))
    curves[1, 2] = curves[2, 1] = curves[2, 2] = bad
    losses = np.ones((4, 3))
    losses[3, 1:] = bad
    other = np.full((4, 3), bad)  # Not a loss: it decides nothing.
    study = from_arrays(
        {"lr": [1.0, 2.0, 3.0, 4.0]},
        {"valid/error": curves, "step/loss": losses, "lossless/ratio": other},
    )
    assert infeasible(study) == [
        ("", -1),
        ("nonfinite_loss", 10),
        ("nonfinite_loss", 5),
        ("nonfinite_loss", 5),
    ]
    assert study.spec["unchecked"]["high_loss"] == 'there is no metric "train/loss"'


def test_high_loss_is_judged_where_it_can_be():
    losses = np.array([[2.0, 1.0, 0.5], [2.0, 9.0, 3.0], [2.0, 1.0, 2.5], [2.0, 9.0, NAN]])
    metrics = {"train/loss": losses, "valid/error": np.ones((4, 3))}
    study = from_arrays({"lr": [1.0, 2.0, 3.0, 4.0]}, metrics)
    high, index = _feasibility.high_loss(losses[:3])
    assert high.tolist() == [False, True, True]
    assert infeasible(study) == [
        ("", -1),
        ("high_loss", STEP[index[1]]),
        ("high_loss", STEP[index[2]]),
        ("nonfinite_loss", 10),
    ]
    assert study.spec["unchecked"] == {"boundary": "there is no search space"}
    late = from_arrays({"lr": [1.0, 2.0, 3.0, 4.0]}, metrics, step=STEP + 1)
    assert infeasible(late)[:3] == [("", -1)] * 3
    assert "begins at step 1" in late.spec["unchecked"]["high_loss"]


@given(
    curves=npst.arrays(
        np.float64,
        (3, 4),
        elements=st.floats(-1e300, 1e300) | st.sampled_from([NAN, INF, -INF]),
    )
)
def test_any_curve_is_judged_without_a_warning(curves):
    study = from_arrays({"lr": [1.0, 2.0, 3.0]}, {"train/loss": curves}, range(4), "train/loss")
    for trial, curve in enumerate(curves):
        reason, step = infeasible(study)[trial]
        bad = ~np.isfinite(curve)
        bad[0] = False  # Before the first update.
        assert (reason == "nonfinite_loss") == bad.any()
        if bad.any():
            assert step == bad.argmax()


def test_infeasible_may_be_given():
    curves = {"valid/error": np.array([[1.0, NAN, NAN], [1.0, 1.0, 1.0]])}
    given_ = from_arrays(metrics=curves, infeasible=np.array([False, True]))
    assert given_.data["infeasible"].values.tolist() == [False, True]
    assert given_.data["infeasible_reason"].values.tolist() == ["", ""]
    agreed = from_arrays(metrics=curves, infeasible=np.array([True, False]))
    assert infeasible(agreed) == [("nonfinite_loss", 5), ("", -1)]
    assert agreed.spec["unchecked"]["high_loss"] == "infeasible was given"


def test_seeds_from_arrays():
    curves = np.ones((2, 3, 3))
    curves[1, 2, 1:] = NAN
    study = from_arrays(metrics={"valid/error": curves})
    assert study.num_seeds == 3
    assert study.data["infeasible"].values.tolist() == [[False] * 3, [False, False, True]]
    assert np.array_equal(study.data["valid/error"].values, curves, equal_nan=True)
    by_trial = from_arrays(metrics={"valid/error": curves}, infeasible=np.array([True, False]))
    assert by_trial.data["infeasible"].values.tolist() == [[True] * 3, [False] * 3]


def test_a_space_is_kept():
    points = {"learning_rate": [0.1, 0.2], "decay": [0, 1], "fixed": [1.0, 1.0]}
    study = from_arrays(points, space=SPACE)
    assert study.space == SPACE
    assert study.spec["unchecked"] == {}
    assert study.to_dataframe()["decay"].tolist() == ["cosine", "linear"]
    with pytest.raises(ValueError, match="points lacks decay"):
        from_arrays({"learning_rate": [0.1, 0.2]}, space=SPACE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": {}}, "points must be a non-empty mapping"),
        ({"points": [1.0]}, "points must be a non-empty mapping"),
        ({"metrics": {}}, "metrics must be a non-empty mapping"),
        ({"points": {"": [1.0, 2.0]}}, "points has the name ''"),
        ({"points": {1: [1.0, 2.0]}}, "points has the name 1"),
        ({"points": {"lr": [[1.0], [2.0]]}}, r"points\['lr'\] must have shape \(trial,\)"),
        ({"points": {"lr": []}}, "at least one trial"),
        ({"points": {"lr": ["a", "b"]}}, r"points\['lr'\] must be an array of numbers"),
        ({"points": {"lr": [1.0, NAN]}}, "not finite in 1 trials, the first 1"),
        ({"points": {"a": [1.0, 2.0], "b": [1.0]}}, r"'b'\] has 1 trials but points\['a'\] has 2"),
        ({"points": {"lr": [1.0, 2.0, 3.0]}}, r"\(trial, eval\) = \(3, 3\).*got \(2, 3\)"),
        ({"step": [0, 5]}, r"= \(2, 2\).*got \(2, 3\)"),
        ({"step": [0, 5, 5]}, "step must rise"),
        ({"step": [-1, 5, 6]}, "step must rise"),
        ({"step": [0, 5, 2**31]}, "step must rise"),
        ({"step": [0.0, 5.0, 10.0]}, "rising integers"),
        ({"step": []}, "rising integers"),
        ({"step": [[0, 5, 10]]}, "rising integers"),
        ({"objective": "valid/eror"}, "did you mean 'valid/error'"),
        ({"metrics": {"valid/error": np.ones(2)}}, r"got \(2,\)"),
        ({"metrics": {"valid/error": np.ones((2, 0, 3))}}, "has no seed"),
        ({"metrics": {"valid/error": np.ones((2, 3), complex)}}, "numbers, got dtype complex"),
        ({"metrics": METRICS | {"x": np.ones((2, 4, 3))}}, "has 4 seeds"),
        ({"infeasible": np.zeros(2)}, "infeasible must be booleans"),
        ({"infeasible": np.zeros(3, bool)}, "infeasible must be booleans"),
    ],
)
def test_bad_arrays(change, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**change)


def test_a_misspelled_argument_is_named():
    with pytest.raises(TypeError, match="did you mean 'objective'"):
        Study.from_arrays(POINTS, METRICS, STEP, objectiv="valid/error")
    with pytest.raises(TypeError, match="did you mean 'parameters'"):
        Study.from_dataframe(pandas.DataFrame(), objective="a", parameter=["b"])


# Tables -------------------------------------------------------------------------------------------


def optuna_table():
    """What Optuna's `study.trials_dataframe()` looks like."""
    return pandas.DataFrame(
        {
            "number": [0, 1, 2, 3, 4],
            "value": [0.5, 0.25, NAN, 0.75, NAN],
            "duration": pandas.to_timedelta([1, 2, 3, 4, None], unit="s"),
            "params_lr": [0.1, 0.01, 10.0, 0.5, 0.2],
            "params_kind": ["adam", "sgd", "adam", "adam", "sgd"],
            "state": ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "RUNNING"],
        }
    )


def from_optuna(frame, **more):
    arguments = {
        "objective": "value",
        "parameters": ["lr", "kind"],
        "trial": "number",
        "state": "state",
    }
    return Study.from_dataframe(frame, **arguments | more)


def test_an_optuna_table_is_read():
    study = from_optuna(optuna_table())
    assert study.num_trials == 4
    assert study.spec["trial_ids"] == [0, 1, 2, 3]
    assert study.points["lr"].tolist() == [0.1, 0.01, 10.0, 0.5]
    assert study.points["kind"].tolist() == ["adam", "sgd", "adam", "adam"]
    assert study.data["infeasible"].values.tolist() == [False, False, True, False]
    best = study.best()
    assert (best.trial, best.value, best.point["kind"]) == (1, 0.25, "sgd")
    assert set(study.spec["unchecked"]) == {"curves", "high_loss", "boundary"}
    assert from_optuna(optuna_table(), maximize=True).best().trial == 3


def test_states_may_be_enum_members():
    frame = optuna_table()
    frame["state"] = [f"TrialState.{state}" for state in frame["state"]]
    assert from_optuna(frame).num_trials == 4


def test_a_failed_trial_with_a_value_is_infeasible_without_a_reason():
    frame = optuna_table()
    frame.loc[2, "value"] = 0.0
    study = from_optuna(frame)
    assert study.data["infeasible"].values.tolist() == [False, False, True, False]
    assert study.data["infeasible_reason"].values[2] == ""
    assert study.best().trial == 1


def test_a_table_saves_and_loads(tmp_path):
    from playbook_optax.records import load_study

    study = from_optuna(optuna_table())
    study.save(tmp_path)
    assert load_study(tmp_path).data.identical(study.data)


def test_a_space_maps_labels_to_its_own_indices():
    space = SearchSpace(
        {"lr": Float(1e-3, 10.0, scale="log"), "kind": Categorical(["sgd", "adam"])}
    )
    study = from_optuna(optuna_table(), parameters=None, space=space)
    assert study.points["kind"].tolist() == [1, 0, 1, 1]
    assert study.points["kind"].dtype == np.int32
    assert study.to_dataframe()["kind"].tolist() == ["adam", "sgd", "adam", "adam"]
    assert "boundary" not in study.spec["unchecked"]
    narrow = SearchSpace({"kind": Categorical(["sgd", "adagrad"])})
    with pytest.raises(ValueError, match="'kind' is 'adam' in frame, which space has not"):
        from_optuna(optuna_table(), parameters=None, space=narrow)


def long_table():
    return pandas.DataFrame(
        {
            "run": ["b", "b", "b", "a", "a", "a", "c", "c"],
            "at": [0, 10, 20, 0, 10, 20, 0, 10],
            "lr": [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3],
            "train/loss": [2.0, 1.0, 0.5, 2.0, 9.0, 9.0, 2.0, 1.0],
            "error": [0.9, 0.5, 0.6, 0.9, 0.1, 0.1, 0.9, 0.4],
        }
    )


def from_long(frame, **more):
    arguments = {
        "objective": "error",
        "parameters": {"learning_rate": "lr"},
        "metrics": ["train/loss"],
        "trial": "run",
        "step": "at",
    }
    return Study.from_dataframe(frame, **arguments | more)


def test_a_long_table_is_read():
    study = from_long(long_table())
    assert study.spec["trial_ids"] == ["b", "a", "c"]
    assert study.points["learning_rate"].tolist() == [0.1, 0.2, 0.3]
    assert study.data["step"].values.tolist() == [0, 10, 20]
    curves = study.data["error"].values
    assert np.array_equal(curves, [[0.9, 0.5, 0.6], [0.9, 0.1, 0.1], [0.9, 0.4, NAN]], True)
    # Trial a rose and stayed up; c stopped early, which is no divergence.
    assert infeasible(study) == [("", -1), ("high_loss", 10), ("", -1)]
    assert study.best().trial == 2
    assert set(study.spec["unchecked"]) == {"boundary"}


def test_the_order_of_rows_in_a_trial_does_not_matter():
    shuffled = long_table().iloc[[2, 5, 0, 7, 1, 4, 3, 6]]
    one, other = from_long(long_table()), from_long(shuffled)
    assert np.array_equal(one.data["error"], other.data["error"], equal_nan=True)
    assert infeasible(one) == infeasible(other)


def test_an_empty_value_in_a_row_is_divergence():
    frame = long_table()
    frame.loc[1, "error"] = NAN
    assert infeasible(from_long(frame))[0] == ("nonfinite_loss", 10)


def test_a_column_of_infeasible_trials():
    frame = long_table().assign(bad=[False, True, *[False] * 6])
    study = from_long(frame, metrics=[], infeasible="bad")
    assert study.data["infeasible"].values.tolist() == [True, False, False]


def test_other_kinds_of_columns():
    frame = pandas.DataFrame(
        {
            "flag": [True, False],
            "n": pandas.array([1, 2], "Int64"),
            "value": pandas.array([0.5, None], "Float64"),
            "day": pandas.to_datetime(["2020-01-01", "2020-01-02"]),
        }
    )
    study = Study.from_dataframe(
        frame, objective="value", parameters=["flag", "n"], trial="day", num_steps=100
    )
    assert study.points["flag"].tolist() == ["False", "True"][::-1]
    assert study.points["n"].tolist() == [1, 2]
    assert study.data["step"].values.tolist() == [100]
    assert infeasible(study) == [("", -1), ("nonfinite_loss", 100)]
    assert all(isinstance(name, str) for name in study.spec["trial_ids"])


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (from_optuna, {"objective": "valu"}, "objective = 'valu'.*did you mean 'value'"),
        (from_optuna, {"parameters": ["lrr"]}, "parameters = 'lrr'"),
        (from_optuna, {"parameters": None}, "parameters must name"),
        (from_optuna, {"parameters": []}, "parameters is empty"),
        (from_optuna, {"parameters": "lr"}, "parameters must be a list"),
        (from_optuna, {"metrics": ["duratio"]}, "metrics = 'duratio'"),
        (from_optuna, {"metrics": ["duration"]}, "column 'duration' must be an array of numbers"),
        (from_optuna, {"state": "params_kind"}, "holds .'ADAM', 'SGD'."),
        (from_optuna, {"infeasible": "value"}, "infeasible = 'value' must be a column of booleans"),
        (from_optuna, {"trial": "params_kind"}, "same trial in several rows"),
        (from_optuna, {"num_steps": 0}, "num_steps must be"),
        (from_long, {"trial": None}, "trial must name"),
        (from_long, {"num_steps": 20}, "leave one of them out"),
        (from_long, {"step": "lr"}, "whole numbers"),
        (from_long, {"trial": "at", "parameters": ["at"]}, "two rows for one trial and step"),
        (from_long, {"trial": "at"}, "changes within trial 0"),
        (from_optuna, {"objective": ["value"]}, "objective must be the name of a column"),
        (from_optuna, {"objective": None}, "objective = None is not a column"),
        (from_optuna, {"parameters": 3}, "parameters must be a list"),
        (from_optuna, {"parameters": [3]}, "parameters must be text"),
        (from_optuna, {"metrics": "duration"}, "metrics must be a list"),
        (from_optuna, {"metrics": 3}, "metrics must be a list"),
    ],
)
def test_bad_tables(call, change, message):
    frame = optuna_table() if call is from_optuna else long_table()
    if change.get("parameters") == ["at"]:
        change = change | {"step": "at"}
        frame = frame.assign(at=0)
    with pytest.raises(ValueError, match=message):
        call(frame, **change)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("params_lr", [1.0], r"holds \[1.0\] in row 1; a hyperparameter is a number"),
        ("params_lr", 10**400, "is not finite in 1 trials"),
        ("number", NAN, "trial = 'number' tells nothing in row 1"),
        ("number", [1], "trial = 'number' tells nothing in row 1"),
        ("value", [1.0, 2.0], "the column 'value' must be an array of numbers"),
    ],
)
def test_cells_that_hold_no_number(column, cell, message):
    frame = optuna_table().astype({column: object})
    frame.at[1, column] = cell
    with pytest.raises(ValueError, match=message):
        from_optuna(frame)


def test_a_column_that_is_there_twice_is_refused():
    frame = optuna_table().rename(columns={"duration": "value"})
    with pytest.raises(ValueError, match="'value' is 2 columns of frame"):
        from_optuna(frame)


def test_a_step_that_no_run_has_is_refused():
    for step in (1e30, -1, 0.5, NAN):
        with pytest.raises(ValueError, match="whole numbers from 0 to"):
            from_long(long_table().assign(at=step))


def test_hyperparameters_that_only_some_trials_have():
    frame = optuna_table()
    frame.loc[1, "params_lr"] = NAN
    with pytest.raises(ValueError, match="makes two studies"):
        from_optuna(frame)
    frame = optuna_table()
    frame.loc[1, "params_kind"] = None
    with pytest.raises(ValueError, match="'params_kind' is empty for some trials"):
        from_optuna(frame)
    space = SearchSpace({"kind": Categorical(["adam", "sgd", None])})
    study = from_optuna(frame, parameters=None, space=space)
    assert study.points["kind"].tolist() == [0, 2, 0, 0]


def test_a_table_without_finished_trials():
    frame = optuna_table().assign(state="WAITING")
    with pytest.raises(ValueError, match="no finished trial"):
        from_optuna(frame)


# Cells --------------------------------------------------------------------------------------------


def trials(column, **more):
    return pandas.DataFrame(
        {"n": range(len(column)), "v": np.arange(len(column)) * 1.0, "lr": column, **more}
    )


RATES = [0.1, 0.02, 0.003]
LOG = SearchSpace({"lr": Float(1e-4, 1, "log")})


@pytest.mark.parametrize("space", [None, LOG])
@pytest.mark.parametrize(
    "column",
    [
        RATES,
        pandas.Series(RATES, dtype=object),
        pandas.Series([np.float64(r) for r in RATES], dtype=object),
        [str(r) for r in RATES],
        ["1e-1", " 0.02", "+3.0E-3"],
        pandas.Series([0.1, "0.02", np.float64(0.003)], dtype=object),
    ],
)
def test_numbers_in_any_cell_are_numbers(column, space):
    named = {"space": space} if space is not None else {"parameters": ["lr"]}
    study = Study.from_dataframe(trials(column), objective="v", trial="n", **named)
    np.testing.assert_array_equal(study.points["lr"], RATES)
    assert study.points["lr"].dtype == np.float64


def test_integers_stay_integers():
    column = pandas.Series([1, np.int64(2), "3"], dtype=object)
    study = Study.from_dataframe(trials(column), objective="v", trial="n", parameters=["lr"])
    assert study.points["lr"].tolist() == [1, 2, 3]
    assert study.points["lr"].dtype == np.int64


@pytest.mark.parametrize("cell", ["auto", "1_0", "", True])
def test_what_is_no_number_is_refused_under_a_range(cell):
    column = pandas.Series([0.1, cell, 0.3], dtype=object)
    with pytest.raises(ValueError, match=rf"column 'lr' holds {cell!r} in row 1.* number in space"):
        Study.from_dataframe(trials(column), objective="v", trial="n", space=LOG)


def test_text_and_numbers_together_are_labels_without_a_range():
    column = pandas.Series([0.5, "sqrt", 0.5], dtype=object)
    study = Study.from_dataframe(trials(column), objective="v", trial="n", parameters=["lr"])
    assert study.points["lr"].tolist() == ["0.5", "sqrt", "0.5"]


@pytest.mark.parametrize("choices", [[True, False], [False, True]])
@pytest.mark.parametrize("column", [[True, False, True], ["True", "False", "True"]])
def test_booleans_are_told_from_indices(choices, column):
    space = SearchSpace({"lr": Categorical(choices)})
    study = Study.from_dataframe(trials(column), objective="v", trial="n", space=space)
    assert study.to_dataframe()["lr"].tolist() == ["True", "False", "True"]
    assert study.point(0)["lr"] == 1


def test_cells_that_hold_nothing_or_a_list_are_told_by_column_and_row():
    some = pandas.DataFrame(
        {"n": list("aabb"), "s": [0, 1, 0, 1], "v": [1.0] * 4, "lr": [0.1, pandas.NA, 0.2, 0.2]}
    )
    with pytest.raises(ValueError, match="column 'lr' changes within trial 'a'"):
        Study.from_dataframe(some, objective="v", parameters=["lr"], trial="n", step="s")
    with pytest.raises(ValueError, match=r"column 'lr' holds \[8, 8\] in row 0"):
        Study.from_dataframe(
            trials([[8, 8], [4], [2]]), objective="v", parameters=["lr"], trial="n"
        )
    twice = pandas.DataFrame([[0, 0.1, 1.0, 2.0]], columns=["n", "v", "lr", "lr"])
    with pytest.raises(ValueError, match="'lr' is 2 columns of frame"):
        Study.from_dataframe(twice, objective="v", parameters=["lr"], trial="n")


# Before the first update --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_metric_that_is_not_finite_before_the_first_update_only(bad):
    curves = np.array([[bad, 2.0, 1.0], [bad, np.nan, np.nan], [3.0, 2.0, bad]])
    study = Study.from_arrays(
        {"lr": RATES}, {"perplexity": curves}, [0, 5, 10], objective="perplexity"
    )
    assert study.data["infeasible"].values.tolist() == [False, True, True]
    assert study.data["infeasible_step"].values.tolist() == [-1, 5, 10]
    assert (study.best().trial, study.best().value) == (0, 1.0)
    # Where nothing was trained before the first evaluation, or it is the only one, it counts.
    late = Study.from_arrays(
        {"lr": RATES}, {"perplexity": curves}, [1, 5, 10], objective="perplexity"
    )
    assert late.data["infeasible"].values.tolist() == [True, True, True]
    once = Study.from_arrays(
        {"lr": RATES}, {"perplexity": curves[:, :1]}, [0], objective="perplexity"
    )
    assert once.data["infeasible"].values.tolist() == [True, True, False]


def test_means_over_steps_are_none_at_the_first_evaluation_whatever_its_step():
    curves = np.array([[3.0, 2.0, 1.0]] * 3)
    mean = np.where(np.arange(3) == 0, NAN, curves)
    for step in ([0, 5, 10], [1, 5, 10]):
        study = Study.from_arrays(
            {"lr": RATES},
            {"valid/loss": curves, "step/loss": mean},
            step,
            objective="valid/loss",
        )
        assert not study.data["infeasible"].values.any()


def test_steps_of_a_vmapped_loop_are_those_of_each_trial():
    curves = {"loss": np.array([[3.0, 2.0], [3.0, 1.0]])}
    same = Study.from_arrays({"lr": [0.1, 1.0]}, curves, [[0, 5], [0, 5]], objective="loss")
    assert same.data["step"].values.tolist() == [0, 5]
    with pytest.raises(ValueError, match=r"step must be rising integers of shape \(eval,\)"):
        Study.from_arrays({"lr": [0.1, 1.0]}, curves, [[0, 5], [0, 6]], objective="loss")


# Runs that end early ------------------------------------------------------------------------------


def ended(*curves, objective="valid/loss", **more):
    values = np.asarray(curves)
    return Study.from_arrays(
        {"lr": np.arange(len(values), dtype=float)},
        {objective: values, **{name: np.asarray(array) for name, array in more.items()}},
        10 * np.arange(values.shape[-1]),
        objective=objective,
    )


def test_a_run_that_ends_early_was_stopped_and_one_on_its_way_up_diverged():
    study = ended(
        [3.0, 2.0, 1.5, NAN, NAN],  # Somebody stopped it.
        [3.0, 2.0, 2.9, NAN, NAN],  # Overfitting, by then.
        [3.0, 2.0, 3.1, NAN, NAN],  # Back above its first value.
        [3.0, 2.0, INF, NAN, NAN],  # Infinite before it ended.
        [3.0, 2.0, NAN, NAN, NAN],  # One evaluation since it began is none to stop by.
        [3.0, 2.0, 1.0, NAN, 1.0],  # It goes on.
        [3.0, 2.0, 1.9, 1.8, 1.7],
    )
    assert study.data["infeasible"].values.tolist() == [False, False, *[True] * 4, False]
    assert (study.best().trial, study.best().value) == (0, 1.5)
    assert study.spec["unchecked"]["divergence"].startswith("2 runs end before the last step")
    assert "divergence" not in ended([3.0, 2.0, 1.0]).spec["unchecked"]
    # A training loss is on its way up from half-way back on.
    rising = ended([3.0, 2.0, 2.6, NAN], [3.0, 2.0, 2.4, NAN], objective="train/loss")
    assert rising.data["infeasible"].values.tolist() == [True, False]
    # Our own trials end by diverging only.
    ours = ended([3.0, 2.0, 1.0, NAN], **{"step/peak_gradient_norm": [[NAN, 1.0, 1.0, NAN]]})
    assert ours.data["infeasible"].values.tolist() == [True]
    # What is still measured has not ended.
    going = ended([3.0, 2.0, 1.0, NAN], **{"valid/accuracy": [[0.1, 0.2, 0.3, 0.1]]})
    assert going.data["infeasible"].values.tolist() == [True]


def test_what_the_caller_knows_overrules_the_guess_and_a_table_has_none():
    curves = np.array([[3.0, 2.0, 1.5, NAN]])
    arguments = {"objective": "loss"}
    known = Study.from_arrays(
        {"lr": [0.1]}, {"loss": curves}, np.arange(4), infeasible=np.array([True]), **arguments
    )
    assert known.data["infeasible"].values.tolist() == [True]
    assert known.data["infeasible_step"].values.tolist() == [3]
    assert known.data["infeasible_reason"].values.tolist() == ["nonfinite_loss"]
    assert "divergence" not in known.spec["unchecked"]
    table = pandas.DataFrame(
        {"n": [0] * 4, "lr": [0.1] * 4, "step": np.arange(4), "loss": curves[0]}
    )
    arguments |= {"parameters": ["lr"], "trial": "n", "step": "step"}
    assert Study.from_dataframe(table, **arguments).data["infeasible"].values.tolist() == [True]
    stopped = Study.from_dataframe(table.iloc[:3], **arguments)
    assert stopped.data["infeasible"].values.tolist() == [False]
