"""The Study record: layout, choice of the best, assembly from blocks, and its files."""

import collections
import copy
import dataclasses
import html
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pandas
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from records.helpers import (
    SPACE,
    STEP,
    a_spec,
    a_tree,
    kept_trees,
    same,
    some_blocks,
    strict_json,
    variables,
)

from playbook_optax.records import (
    NoFeasibleTrial,
    StorageError,
    Study,
    load_study,
    storage,
    study_from_blocks,
    summary,
    weights,
)
from playbook_optax.records.study import escape_cell
from playbook_optax.records.study_set import StudySet
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

FIXTURE = Path(__file__).parent / "fixtures" / "study_v1"
NOW = Path(__file__).parent / "fixtures" / "study_v2"
NAN, INF = float("nan"), float("inf")


def a_study(num_trials=5, num_seeds=1, width=3, kept=False, **more):
    trees = kept_trees() if kept else None
    spec = a_spec(num_trials, num_seeds, trees)
    return study_from_blocks(spec, some_blocks(num_trials, num_seeds, width, kept), **more)


def imported(curves, step=None, **more):
    """A study of one metric, loss, with as many trials as curves."""
    curves = np.asarray(curves)
    points = {"learning_rate": np.arange(1, len(curves) + 1, dtype=np.float32)}
    step = np.arange(curves.shape[-1]) * 10 if step is None else step
    return Study.from_arrays(points, {"loss": curves}, step, **{"objective": "loss"} | more)


# Layout -------------------------------------------------------------------------------------------


def test_layout_with_one_seed():
    data = a_study().data
    assert dict(data.sizes) == {"trial": 5, "eval": 3, "norm_bin": 3}
    assert list(data.data_vars) == [
        "train/loss",
        "valid/loss",
        "infeasible",
        "infeasible_step",
        "infeasible_reason",
        "best_value",
        "best_step",
        "norms/last",
        "norms/max",
        "norms/counts",
    ]
    assert data["valid/loss"].dims == ("trial", "eval")
    assert data["valid/loss"].dtype == np.float32
    assert data["valid/loss"].values[:, 1].tolist() == [1, 2, 3, 4, 5]
    assert data["norms/counts"].dims == ("trial", "norm_bin")
    assert data["norm_low"].values.tolist() == [0, 1, 2]
    assert data["norm_high"].values.tolist() == [1, 2, 4]
    assert data["step"].dims == ("eval",)
    assert data["step"].values.tolist() == STEP
    assert data["learning_rate"].dims == ("trial",)
    assert data["infeasible"].dtype == bool
    assert data["infeasible_reason"].values.tolist() == [""] * 5


def test_layout_with_seeds():
    study = a_study(num_trials=4, num_seeds=2, width=3)
    assert study.num_seeds == 2
    assert study.data["valid/loss"].dims == ("trial", "seed", "eval")
    assert study.data["infeasible"].dims == ("trial", "seed")
    assert study.data["norms/counts"].dims == ("trial", "seed", "norm_bin")
    assert study.data["learning_rate"].dims == ("trial",)
    assert study.data["valid/loss"].values[3].tolist() == [[9, 4, 4.5], [9, 4.125, 4.5]]
    assert study.point(3)["learning_rate"] == np.float32(0.5**4)


def test_properties_and_points():
    study = a_study()
    assert (study.num_trials, study.objective, study.maximize) == (5, "valid/loss", False)
    assert study.space == SPACE
    assert list(study.points) == ["learning_rate", "decay"]
    point = study.point(1)
    assert point == {"learning_rate": np.float32(0.25), "decay": 1}
    assert point["learning_rate"].dtype == np.float32
    assert point["decay"].dtype == np.int32
    assert study.spec["extra"] == {"jax": "0.10.2", "lowest": -INF}


def test_a_study_is_read_only():
    study = a_study()
    with pytest.raises(dataclasses.FrozenInstanceError):
        study.data = None
    with pytest.raises(TypeError):
        study.spec["objective"] = "other"
    with pytest.raises(ValueError, match="read-only"):
        study.data["valid/loss"].values[0, 0] = 0
    with pytest.raises(ValueError, match="read-only"):
        study.points["learning_rate"][0] = 0


def test_the_spec_is_a_copy():
    spec = a_spec(5)
    study = study_from_blocks(spec, some_blocks(5))
    spec["extra"]["jax"] = "changed"
    assert study.spec["extra"]["jax"] == "0.10.2"


@pytest.mark.parametrize("trial", [5, -1, 1.0, True, "0"])
def test_a_trial_that_is_not_there(trial):
    study = a_study(kept=True)
    for function in (study.point, study.params):
        with pytest.raises(IndexError, match="trial"):
            function(trial)


def test_a_printed_study_says_what_ran_and_what_it_came_to(monkeypatch):
    monkeypatch.chdir(FIXTURE.parent)
    assert str(load_study("study_v1")) == (
        "Study toy: 4 trials x 20 steps x 2 seeds\n"
        "  objective   valid/loss, lower is better\n"
        "  search      learning_rate 0.001 to 1 (log); decay cosine | linear\n"
        "  best        1.0625 ± 0.088 at step 10, trial 0: learning_rate=0.5, decay=cosine\n"
        "  infeasible  none\n"
        "  stored in   study_v1"
    )


def test_a_printed_study_without_a_space_tells_from_where_to_where_its_points_went():
    study = Study.from_arrays(
        {"lr": np.array([0.1, 0.3, 0.2]), "opt": np.array([7, 7, 7])},
        {"valid/accuracy": np.array([[0.5, 0.6], [NAN, NAN], [0.5, 0.75]])},
        np.array([0, 40]),
        objective="valid/accuracy",
        maximize=True,
        name="mine",
    )
    spec = {**study.spec, "device_kind": "TPU v4", "versions": {"jax": "0.10.2", "optax": "0.2.8"}}
    assert repr(dataclasses.replace(study, spec=spec)) == (
        "Study mine: 3 trials x 40 steps\n"
        "  objective   valid/accuracy, higher is better\n"
        "  search      lr 0.1 to 0.3; opt 7\n"
        "  best        0.75 at step 40, trial 2: lr=0.2, opt=7\n"
        "  infeasible  1 of 3 trials: 1 nonfinite_loss\n"
        "  ran on      TPU v4, jax 0.10.2, optax 0.2.8"
    )
    assert "infeasible  2 of 10 runs: 2 " in repr(seeds_that_broke())
    assert "  best        no feasible trial\n" in repr(imported([[NAN, NAN]]))


def test_ranges_are_told_as_the_space_has_them():
    space = SearchSpace(
        {
            "warmup": Integer(10, 90, scale="log", include_zero=True),
            "b1": Float(0.5, 0.99, scale="reverse_log"),
            "rate": Float(0.0, 0.5),
            "kind": Categorical(["a", True]),
        }
    )
    values = {"warmup": [0], "b1": [0.9], "rate": [0.25], "kind": [1], "text": ["sgd"]}
    points = {name: np.array(value) for name, value in values.items()}
    assert summary.ranges_text(points, space) == (
        "warmup 0, and 10 to 90 (log); b1 0.5 to 0.99 (reverse_log); rate 0 to 0.5; kind a | True; "
        "text sgd"
    )
    first = {name: value[0] for name, value in points.items()}
    assert summary.point_text(first, space) == "warmup=0, b1=0.9, rate=0.25, kind=True, text=sgd"


def seeds_that_broke():
    """Five trials with two seeds; both seeds of one trial end in NaN."""
    curves = np.ones((5, 2, 2))
    curves[3, :, 1] = NAN
    return Study.from_arrays(
        {"x": np.arange(5)}, {"loss": curves}, np.array([0, 9]), objective="loss"
    )


def test_a_printed_study_of_many_long_names_stays_short():
    points = {f"hyperparameter_{i}": np.array([0.1, 0.25]) for i in range(40)}
    points["x" * 500] = np.array([1, 2])
    study = Study.from_arrays(points, {"loss": np.ones((2, 1))}, [9], objective="loss")
    lines = repr(study).splitlines()
    assert len(lines) < 16
    assert max(map(len, lines)) <= 96
    assert "29 more" in repr(study)
    assert "x" * 60 not in repr(study)


HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J\u202e\ud800\n'\"&"


def hostile_study():
    study = Study.from_arrays(
        {HOSTILE: np.array([1.0, 2.0])},
        {HOSTILE + "loss": np.array([[2.0, 1.0], [2.0, NAN]])},
        np.array([0, 10]),
        objective=HOSTILE + "loss",
        name=HOSTILE,
    )
    spec = {**study.spec, "device_kind": HOSTILE, "versions": {HOSTILE: HOSTILE, "b": [HOSTILE]}}
    return dataclasses.replace(study, spec=spec, _directory=HOSTILE)


def test_a_printed_study_commands_no_terminal():
    for told in (repr(hostile_study()), repr(StudySet({HOSTILE: hostile_study()}, HOSTILE))):
        assert all(line.isprintable() for line in told.split("\n"))
        assert "\\x1b[2J" in told
    assert len(repr(hostile_study()).split("\n")) < 12


def test_a_study_in_a_notebook_is_text_and_never_markup(monkeypatch):
    monkeypatch.chdir(FIXTURE.parent)
    stored = load_study("study_v1")
    shown = stored._repr_html_()
    assert text_of(shown) == [
        "Study toy: 4 trials x 20 steps x 2 seeds",
        *("objective", "valid/loss, lower is better"),
        *("search", "learning_rate 0.001 to 1 (log); decay cosine | linear"),
        *("best", "1.0625 ± 0.088 at step 10, trial 0: learning_rate=0.5, decay=cosine"),
        *("infeasible", "none"),
        *("stored in", "study_v1"),
        "valid/loss of 4 trials over the steps; blue: the best",
    ]
    hostile = hostile_study()._repr_html_() + StudySet({HOSTILE: stored}, HOSTILE)._repr_html_()
    assert tags(hostile) == tags(shown)
    assert "&lt;img src=x onerror=alert(1)&gt;" in hostile
    assert "\x1b" not in hostile


def tags(fragment):
    """Its kinds of tags; of a picture neither what it holds nor what it shows counts."""
    found = re.findall("<[^>]*>", fragment)
    return {
        re.sub(' alt="[^"]*" src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", t) for t in found
    }


def text_of(fragment):
    return [html.unescape(part) for part in re.split("(?:<[^>]*>)+", fragment) if part]


def test_a_printed_set_has_a_row_for_each_study():
    study = imported([[2.0, 1.0], [2.0, NAN]])
    studies = StudySet({"adam": study, "sgd": imported([[NAN, NAN]])}, "optimizer", None, ("lamb",))
    assert text_of(studies._repr_html_()) == [
        "StudySet by optimizer: 2 studies",
        "adam",
        "2 trials x 10 steps; best loss: 1 at step 10, trial 0: learning_rate=1; infeasible: 1 of "
        "2 trials: 1 nonfinite_loss",
        "sgd",
        "1 trials x 10 steps; best loss: no feasible trial; infeasible: 1 of 1 trials: 1 "
        "nonfinite_loss",
        "lamb",
        "not there yet",
        "best loss of each trial, by study; blue: the best of a study",
    ]
    assert str(StudySet({"a": study})) == (
        "StudySet by study: 1 study\n"
        "  a  2 trials x 10 steps; best loss: 1 at step 10, trial 0: learning_rate=1; infeasible: "
        "1 of 2\n"
        "     trials: 1 nonfinite_loss"
    )


# Assembly -----------------------------------------------------------------------------------------


@given(
    num_trials=st.integers(1, 6),
    num_seeds=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_the_width_of_blocks_does_not_show(num_trials, num_seeds, widths):
    one, other = (a_study(num_trials, num_seeds, width) for width in widths)
    assert same(variables(one), variables(other))
    assert one.num_trials == num_trials


@given(num_seeds=st.integers(1, 3), missing=st.sets(st.integers(0, 5)), width=st.integers(1, 4))
def test_missing_blocks_leave_the_complete_prefix(num_seeds, missing, width):
    num_trials = 6
    blocks = some_blocks(num_trials, num_seeds, width)
    there = [b for i, b in enumerate(blocks) if i not in missing]
    runs = {(t, s) for b in there for t, s in zip(b["trial"], b["seed"], strict=True)}
    complete = 0
    while complete < num_trials and all((complete, s) in runs for s in range(num_seeds)):
        complete += 1
    study = study_from_blocks(a_spec(num_trials, num_seeds), there)
    assert study.num_trials == study.spec["num_trials"] == complete
    assert study.spec.get("planned_trials") == (None if complete == num_trials else num_trials)
    if complete:
        whole = a_study(num_trials, num_seeds, width)
        assert np.array_equal(
            study.data["valid/loss"].values, whole.data["valid/loss"].values[:complete]
        )


def test_no_finished_block_is_a_study_without_trials():
    study = study_from_blocks(a_spec(4), [])
    assert study.num_trials == 0
    assert study.spec["planned_trials"] == 4
    assert "0 of 4 trials" in repr(study)
    with pytest.raises(NoFeasibleTrial, match="no complete trial"):
        study.best()


def test_of_two_copies_of_a_run_the_first_counts():
    first, second = some_blocks(2, width=2)[0], some_blocks(2, width=2)[0]
    second["metrics/valid/loss"] = second["metrics/valid/loss"] + 9
    study = study_from_blocks(a_spec(2), [first, second])
    assert study.data["valid/loss"].values[0, 1] == 1


def changed(name, array):
    blocks = some_blocks(5)
    if array is None:
        del blocks[1][name]
    else:
        blocks[1][name] = array
    return blocks


@pytest.mark.parametrize(
    ("spec", "blocks", "message"),
    [
        ({}, changed("trial", None), "lacks the array 'trial'"),
        ({}, changed("norms/max", None), "other arrays than block 0: .*norms/max"),
        ({}, changed("norms/max", np.zeros(2)), "norms/max.*shape"),
        ({}, changed("norms/max", np.zeros(3)), "float64.*float32"),
        ({}, changed("metrics/valid/loss", np.zeros((3, 4), np.float32)), r"\[4\].*\[3\]"),
        ({}, changed("infeasible_reason", np.full(3, 9, np.int8)), "unknown codes"),
        ({"step": [0, 10]}, some_blocks(5), "2 evaluation steps"),
        ({"objective": "valid/los"}, some_blocks(5), "did you mean 'valid/loss'"),
        ({"norm_edges": None}, some_blocks(5), "0 edges, but 3 bins have 4"),
        ({"num_trials": -1}, some_blocks(5), "num_trials"),
        ({"num_seeds": 0}, some_blocks(5), "num_seeds"),
    ],
)
def test_blocks_that_do_not_fit(spec, blocks, message):
    with pytest.raises(ValueError, match=message):
        study_from_blocks(a_spec(5) | spec, blocks)


def test_a_spec_without_what_is_needed():
    with pytest.raises(ValueError, match="spec lacks step, objective"):
        study_from_blocks({"num_trials": 1, "num_seeds": 1, "maximize": False}, [])


@pytest.mark.parametrize(
    ("points", "metrics", "message"),
    [
        ({"loss": [1.0]}, {"loss": [[1.0]]}, "'loss' is both a metric and a hyperparameter"),
        ({"step": [1.0]}, {"loss": [[1.0]]}, "hyperparameter name 'step' is used by the record"),
        ({"a": [1.0]}, {"loss": [[1.0]], "best_value": [[1.0]]}, "metric name 'best_value'"),
    ],
)
def test_name_collisions(points, metrics, message):
    with pytest.raises(ValueError, match=message):
        Study.from_arrays(points, metrics, [0], objective="loss")


# The best trial -----------------------------------------------------------------------------------


def test_best_is_retrospective():
    best = imported([[3.0, 1.0, 2.0], [3.0, 2.5, 0.5]]).best()
    assert (best.trial, best.value, best.step) == (1, 0.5, 20)
    assert best.point == {"learning_rate": np.float32(2)}
    assert (best.objective, best.maximize, best.spread, best.num_seeds) == ("loss", False, None, 1)
    assert imported([[3.0, 1.0, 2.0], [3.0, 2.5, 0.5]]).best(maximize=True).value == 3.0


def test_ties_go_to_the_lowest_trial_and_the_latest_step():
    best = imported([[3.0, 2.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).best()
    assert (best.trial, best.step) == (0, 20)
    best = imported([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]).best()
    assert (best.trial, best.step) == (0, 10)
    best = imported([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).best()
    assert (best.trial, best.step) == (0, 20)


def test_ties_go_to_the_lower_loss_first():
    errors = [[0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.5, 0.1, 0.1, 0.1]]
    valid = [[1.0, 0.3, 0.2, 0.3], [1.0, 0.3, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]]
    train = [[1.0, 0.1, 0.1, 0.0], [1.0, 0.1, 0.05, 0.1], [1.0, 0.0, 0.0, 0.0]]
    metrics = {"valid/error_rate": errors, "train/loss": train, "valid/loss": valid}
    told = {"objective": "valid/error_rate", "resolution": 0.1}
    study = Study.from_arrays({"lr": [1.0, 2.0, 3.0]}, metrics, [0, 5, 10, 15], **told)
    assert (study.best().trial, study.best().step) == (1, 10)
    assert study.data["best_step"].values.tolist() == [10, 10, 15]
    del metrics["train/loss"]
    study = Study.from_arrays({"lr": [1.0, 2.0, 3.0]}, metrics, [0, 5, 10, 15], **told)
    assert (study.best().trial, study.best().step) == (1, 15)
    assert study.resolution() == 0.1
    assert study.resolution("valid/loss") == 0.0


@pytest.mark.parametrize("resolution", [0.0, -1.0, NAN, INF, {"valid/error_rate": 0}])
def test_a_resolution_is_a_number_above_0(resolution):
    with pytest.raises(ValueError, match="resolution"):
        Study.from_arrays(
            {"lr": [1.0]},
            {"valid/error_rate": [[0.5]]},
            [0],
            objective="valid/error_rate",
            resolution=resolution,
        )


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("maximize", [False, True])
def test_values_that_are_not_finite_are_never_selected(bad, maximize):
    # Told to be feasible: even then the value itself is passed over.
    curves = [[bad, bad], [bad, 2.0], [3.0, 3.0]]
    study = imported(curves, infeasible=np.zeros(3, bool), maximize=maximize)
    assert study.best().value == (3.0 if maximize else 2.0)


def test_infeasible_trials_are_never_selected():
    curves = np.array([[1.0, 0.1, NAN], [1.0, 0.9, 0.8]])
    assert imported(curves).best().trial == 1
    assert imported(curves, infeasible=np.array([False, True])).best().value == 0.1


@pytest.mark.parametrize(
    ("curves", "reason"), [([[NAN], [INF]], "2 for nonfinite_loss"), ([[-INF], [NAN]], "2 of 2")]
)
def test_no_feasible_trial(curves, reason):
    with pytest.raises(NoFeasibleTrial, match=reason):
        imported(curves).best()


def test_with_seeds_the_mean_at_a_common_step_counts():
    # Trial 0 has the best single value, and the best mean of per-seed bests.
    curves = np.array([[[9.0, 0.0, 4.0], [9.0, 4.0, 0.0]], [[9.0, 1.0, 3.0], [9.0, 2.0, 3.0]]])
    best = imported(curves, infeasible=np.zeros(2, bool)).best()
    assert (best.trial, best.value, best.step, best.num_seeds) == (1, 1.5, 10, 2)
    assert best.spread == pytest.approx(math.sqrt(0.5), rel=1e-15)


def test_with_seeds_one_infeasible_seed_rules_a_trial_out():
    curves = np.array([[[1.0, 0.0], [1.0, NAN]], [[1.0, 0.9], [1.0, 0.9]]])
    assert imported(curves).best().trial == 1
    # Told to be feasible: the mean of inf and -inf is not a value either.
    curves = np.array([[[INF], [-INF]], [[1.0], [1.0]]])
    assert imported(curves, infeasible=np.zeros(2, bool)).best().trial == 1
    # Known to have broken, whatever was recorded of it.
    curves = np.array([[[0.1], [0.1]], [[1.0], [1.0]]])
    assert imported(curves, infeasible=np.array([[True, False], [False] * 2])).best().trial == 1


def test_post_hoc_objectives():
    study = Study.from_arrays(
        {"lr": [1.0, 2.0]},
        {"valid/loss": [[1.0], [2.0]], "valid/accuracy": [[0.5], [0.9]], "train/x": [[2.0], [1.0]]},
        [0],
        objective="valid/loss",
    )
    assert study.best().trial == 0
    assert study.best("train/x").trial == 1
    assert study.best("valid/accuracy", maximize=True).trial == 1
    assert study.best("valid/accuracy", maximize=False).trial == 0
    with pytest.raises(ValueError, match="maximize must be given"):
        study.best("valid/accuracy")
    with pytest.raises(ValueError, match="did you mean 'valid/accuracy'"):
        study.best("valid/acuracy")
    with pytest.raises(ValueError, match="was not recorded"):
        study.best("lr")
    with pytest.raises(TypeError, match="did you mean 'maximize'"):
        study.best(maximise=True)


@given(
    curves=npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)),
        elements=st.floats(-100, 100, width=32) | st.sampled_from([NAN, INF, -INF]),
    ),
    maximize=st.booleans(),
)
def test_best_against_a_loop(curves, maximize):
    study = imported(curves, maximize=maximize, infeasible=np.zeros(len(curves), bool))
    found = None
    for trial, runs in enumerate(curves.astype(np.float64)):
        for index in range(curves.shape[-1]):
            if np.isfinite(runs[:, index]).all():
                value = runs[:, index].mean()
                better = found is None or (value > found[0] if maximize else value < found[0])
                # Of equal evaluations of a trial the latest.
                better |= found is not None and found[:2] == (value, trial)
                found = (value, trial, 10 * index) if better else found
    if found is None:
        with pytest.raises(NoFeasibleTrial):
            study.best()
    else:
        best = study.best()
        assert (best.value, best.trial, best.step) == found


# Weights ------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "a b")


def equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def test_kept_weights_come_back():
    study = a_study(kept=True)
    for trial in range(5):
        equal_trees(study.params(trial), a_tree(trial))
    assert study.model_state(0) == {}


def test_kept_weights_of_seeds():
    study = a_study(3, 2, kept=True)
    equal_trees(study.params(2, seed=1), a_tree(5))
    with pytest.raises(ValueError, match="seed must be given, 0 to 1"):
        study.params(2)
    with pytest.raises(ValueError, match="seed must be < 2"):
        study.params(2, seed=2)
    with pytest.raises(ValueError, match="seed"):
        study.params(2, seed=-1)


def test_weights_that_were_not_kept():
    for function in (a_study().params, a_study().model_state):
        with pytest.raises(ValueError, match='keep="best"'):
            function(0)


def test_weights_like_restores_the_types():
    tree = Pair(np.ones(2, np.float32), collections.OrderedDict(z=np.zeros(1), y=np.ones(1)))
    flat = weights.flatten_tree(tree)
    trees = {"params": weights.describe_tree(tree), "model_state": weights.describe_tree(())}
    block = some_blocks(1, width=1)[0] | {f"params/{k}": v[None] for k, v in flat.items()}
    spec = a_spec(1, trees=trees)
    plain = study_from_blocks(spec, [block]).params(0)
    equal_trees(plain, {"a": np.ones(2, np.float32), "b": {"z": np.zeros(1), "y": np.ones(1)}})
    like = {"params": jax.eval_shape(lambda: tree), "model_state": ()}
    study = study_from_blocks(spec, [block], weights_like=like)
    equal_trees(study.params(0), tree)
    assert study.model_state(0) == ()
    wrong = study_from_blocks(spec, [block], weights_like={"params": {"a": 0}, "model_state": ()})
    with pytest.raises(ValueError, match=r"only stored \['b/y', 'b/z'\]"):
        wrong.params(0)


tree_leaves = st.integers(0, 9).map(lambda n: np.full((n % 3,), n, np.float32))
trees = st.recursive(
    tree_leaves | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("a/~0", max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(0, 3), inner, max_size=2)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
    ),
    max_leaves=8,
)


@given(tree=trees)
def test_any_tree_round_trips(tree, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tree")
    flat = weights.flatten_tree(tree)
    assert len(flat) == len(jax.tree.leaves(tree))
    storage.write_spec(directory, {"tree": weights.describe_tree(tree)})
    storage.write_block(directory, 0, flat)
    arrays = storage.read_block(directory, 0)
    description = storage.read_spec(directory)["tree"]

    def plain(node):
        if isinstance(node, Pair):
            return {"a": plain(node.a), "b": plain(node.b)}
        if isinstance(node, dict):
            return {key: plain(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(plain(child) for child in node)
        return node

    equal_trees(weights.rebuild_tree(description, arrays), plain(tree))
    equal_trees(weights.restore_like(tree, arrays), tree)


def test_no_two_leaves_share_a_path():
    inner = {"b": 1, "~1b": 2}
    tree = {"": {"a": {"b": 0}}, "a": inner, "a/b": 3, "a~1b": 4, "~2": {"a": {"b": 5}}}
    assert sorted(weights.flatten_tree(tree).values()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([], "ends early"),
        ([["tuple", [0]]], "ends early"),
        ([["leaf", []], ["leaf", []]], "goes on"),
        ([["tree", []]], "unknown kind 'tree'"),
        ([["dict", ["b"]], ["leaf", []]], "'b' of the weights is missing"),
        ([1], "ends early"),
    ],
)
def test_a_malformed_description(description, message):
    with pytest.raises(ValueError, match=message):
        weights.rebuild_tree(description, {"": np.zeros(1)})


# Extend -------------------------------------------------------------------------------------------


def test_extend_calls_the_runner():
    calls = []
    study = a_study(extend=lambda n: calls.append(n) or a_study(n))
    assert study.extend(3).num_trials == 8
    assert calls == [8]
    for bad in (0, -1, 7.0, True):
        with pytest.raises(ValueError, match="num_trials must be"):
            study.extend(bad)
    assert calls == [8]


def test_a_record_cannot_extend_itself():
    with pytest.raises(ValueError, match=r"run_study with directory=.*num_trials=9"):
        a_study().extend(num_trials=4)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_save_and_load_are_bit_identical(tmp_path, num_seeds, kept):
    study = a_study(5, num_seeds, kept=kept)
    study.save(tmp_path / "one")
    moved = tmp_path / "elsewhere" / "two"
    shutil.move(tmp_path / "one", moved)
    back = load_study(moved)
    assert same(variables(back), variables(study))
    assert list(back.data.data_vars) == list(study.data.data_vars)
    assert dict(back.spec) == dict(study.spec)
    assert back.data.identical(study.data)
    if kept:
        seed = num_seeds - 1
        equal_trees(back.params(4, seed), study.params(4, seed))
    strict_json((moved / "study.json").read_text())
    names = sorted(os.listdir(moved / "blocks"))
    assert names == [f"block-{i:08d}.pbx" for i in range(len(names))]


@given(
    curves=npst.arrays(
        st.sampled_from([np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]),
        st.tuples(st.integers(1, 4), st.integers(1, 3)),
    )
)
def test_any_curves_round_trip(curves, tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    study = imported(curves)
    study.save(directory)
    assert same(variables(load_study(directory)), variables(study))


def test_saving_again_is_legal_and_another_study_is_refused(tmp_path):
    a_study().save(tmp_path)
    a_study().save(tmp_path)
    study = load_study(tmp_path)
    study.save(tmp_path)
    with pytest.raises(StorageError, match="another study"):
        imported([[1.0]]).save(tmp_path)
    # The same spec, other numbers.
    imported([[1.0]]).save(tmp_path / "two")
    with pytest.raises(StorageError, match="another study"):
        imported([[2.0]]).save(tmp_path / "two")
    assert load_study(tmp_path / "two").best().value == 1.0
    # The same study, as it says of itself, whose blocks hold other bits.
    first = dict(study._blocks[0])
    first["metrics/valid/loss"] = first["metrics/valid/loss"] + np.float32(1)
    with pytest.raises(StorageError, match="another study"):
        dataclasses.replace(study, _blocks=(first, *study._blocks[1:])).save(tmp_path)
    # The same numbers, of which something else is said.
    said = (tmp_path / "two" / "study.json").read_bytes()
    other = imported([[1.0]])
    with pytest.raises(StorageError, match="another study"):
        dataclasses.replace(other, spec={**other.spec, "name": "other"}).save(tmp_path / "two")
    assert (tmp_path / "two" / "study.json").read_bytes() == said
    assert same(variables(load_study(tmp_path)), variables(study))


def test_a_longer_study_goes_over_a_shorter_one_but_not_back(tmp_path):
    short, long = a_study(3), a_study(6)
    short.save(tmp_path)
    long.save(tmp_path)
    assert load_study(tmp_path).num_trials == 6
    with pytest.raises(StorageError, match="another study"):
        short.save(tmp_path)


def test_a_study_in_the_making_is_read_and_saved(tmp_path):
    storage.write_spec(tmp_path, a_spec(9))
    owner = storage.owner_of(a_spec(9))
    for index in (0, 2):
        storage.write_block(tmp_path, index, some_blocks(9)[index], owner)
    (tmp_path / "blocks" / ".tmp-1-0123456789abcdef").write_bytes(b"half")
    study = load_study(tmp_path)
    assert study.num_trials == 3
    assert "3 of 9 trials" in repr(study)
    study.save(tmp_path / "copy")
    copy = load_study(tmp_path / "copy")
    assert same(variables(copy), variables(study))
    assert copy.spec["num_trials"] == 3
    storage.write_block(tmp_path, 1, some_blocks(9)[1], owner)
    assert same(variables(load_study(tmp_path)), variables(a_study(9)))


def test_damage_is_reported_and_a_rerun_block_heals(tmp_path):
    a_study().save(tmp_path)
    path = tmp_path / "blocks" / "block-00000001.pbx"
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(storage.CorruptBlock, match=r"block-00000001.*runs this block again"):
        load_study(tmp_path)
    owner = storage.owner_of(storage.read_spec(tmp_path))
    storage.write_block(tmp_path, 1, some_blocks(5)[1], owner)
    assert same(variables(load_study(tmp_path)), variables(a_study()))


def test_a_directory_that_is_not_consistent(tmp_path):
    storage.write_spec(tmp_path, a_spec(3))
    storage.write_block(tmp_path, 0, {"x": np.zeros(3)}, storage.owner_of(a_spec(3)))
    with pytest.raises(StorageError, match=r"block-00000000.*the array 'trial' is missing"):
        load_study(tmp_path)
    storage.write_spec(tmp_path / "many", {"num_trials": "many"})
    with pytest.raises(StorageError, match=r"study\.json.*lacks 'objective'"):
        load_study(tmp_path / "many")


def test_names_cannot_leave_the_directory(tmp_path):
    study = Study.from_arrays(
        {"../../lr": [1.0]}, {"../../../etc/loss\0": [[1.0]]}, [0], objective="../../../etc/loss\0"
    )
    study.save(tmp_path / "study")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert found == [
        "study",
        "study/blocks",
        "study/blocks/block-00000000.pbx",
        "study/study.json",
    ]
    assert load_study(tmp_path / "study").best().value == 1.0


# Schema version 1, for ever -----------------------------------------------------------------------


def test_the_study_of_schema_version_1_is_read():
    """Never regenerate this fixture: it was written by version 0.1.0 and is read for ever."""
    study = load_study(FIXTURE)
    assert same(variables(study), variables(a_study(4, 2, kept=True)))
    arrays = storage.describe_arrays(some_blocks(4, 2, kept=True)[0])
    spec = {**a_spec(4, 2, kept_trees()), "schema_version": 1, "arrays": arrays}
    assert dict(study.spec) == storage.as_stored(spec)
    for trial in range(4):
        for seed in range(2):
            equal_trees(study.params(trial, seed), a_tree(2 * trial + seed))
    best = study.best()
    assert (best.trial, best.value, best.step) == (0, 1.0625, 10)
    assert study.params(0, 0)["low"].dtype == ml_dtypes.bfloat16


def test_a_study_of_schema_version_1_stays_what_it_is(tmp_path):
    for place in ("one", "other"):
        shutil.copytree(FIXTURE, tmp_path / place)
    load_study(tmp_path / "one").save(tmp_path / "one")
    for path in FIXTURE.rglob("*.*"):
        assert (tmp_path / "one" / path.relative_to(FIXTURE)).read_bytes() == path.read_bytes()
    load_study(FIXTURE).save(tmp_path / "new")
    assert load_study(tmp_path / "new").data.identical(load_study(FIXTURE).data)


def test_version_2_is_written_as_it_was(tmp_path):
    """While the schema is version 2, its bytes stay; a change of bytes is a new version."""
    a_study(4, 2, kept=True).save(tmp_path)
    files = sorted(p.relative_to(NOW) for p in NOW.rglob("*.*"))
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    for path in files:
        assert (tmp_path / path).read_bytes() == (NOW / path).read_bytes()


# Whose a file is ----------------------------------------------------------------------------------


def test_another_studys_block_is_refused(tmp_path):
    a_study(5).save(tmp_path / "mine")
    other = study_from_blocks({**a_spec(5), "name": "other"}, some_blocks(5))
    other.save(tmp_path / "theirs")
    block = "blocks/block-00000001.pbx"
    shutil.copy(tmp_path / "theirs" / block, tmp_path / "mine" / block)
    with pytest.raises(storage.ForeignBlock, match=r"block-00000001.*another study"):
        load_study(tmp_path / "mine")
    # Saving again puts the study's own in its place.
    a_study(5).save(tmp_path / "mine")
    assert same(variables(load_study(tmp_path / "mine")), variables(a_study(5)))


def test_another_studys_spec_is_refused(tmp_path):
    a_study(5).save(tmp_path / "mine")
    study_from_blocks({**a_spec(5), "objective": "train/loss"}, some_blocks(5)).save(
        tmp_path / "theirs"
    )
    shutil.copy(tmp_path / "theirs" / "study.json", tmp_path / "mine" / "study.json")
    with pytest.raises(storage.ForeignBlock, match="another study"):
        load_study(tmp_path / "mine")


def test_imported_tables_of_equal_shapes_are_told_apart(tmp_path):
    for name, loss in (("one", 1.0), ("other", 2.0)):
        table = {"valid/loss": np.full((2, 1), loss)}
        Study.from_arrays({"lr": [0.1, 0.2]}, table, [1], objective="valid/loss").save(
            tmp_path / name
        )
    block = "blocks/block-00000000.pbx"
    shutil.copy(tmp_path / "one" / block, tmp_path / "other" / block)
    with pytest.raises(storage.ForeignBlock):
        load_study(tmp_path / "other")


# Tables -------------------------------------------------------------------------------------------


def test_to_dataframe_is_tidy():
    frame = a_study(3).to_dataframe()
    assert list(frame.columns) == [
        "trial",
        "learning_rate",
        "decay",
        "infeasible",
        "infeasible_step",
        "infeasible_reason",
        "best_value",
        "best_step",
        "final/train/loss",
        "final/valid/loss",
    ]
    assert frame["decay"].tolist() == ["cosine", "linear", "cosine"]
    assert frame["best_value"].tolist() == [1, 2, 3]
    assert frame["final/valid/loss"].tolist() == [1.5, 2.5, 3.5]
    frame = a_study(3, 2).to_dataframe()
    assert frame["trial"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["seed"].tolist() == [0, 1] * 3
    assert frame["best_value"].tolist() == [1, 1.125, 2, 2.125, 3, 3.125]


def test_csv_has_no_formulas(tmp_path):
    table = pandas.DataFrame({"=cmd()": ["=1+1", "-x", "@y"], "value": [-1.0, 2.0, 3.0]})
    study = Study.from_dataframe(table, objective="value", parameters=["=cmd()"])
    assert study.point(0) == {"=cmd()": "=1+1"}
    study.to_csv(tmp_path / "study.csv")
    back = pandas.read_csv(tmp_path / "study.csv")
    assert back["'=cmd()"].tolist() == ["'=1+1", "'-x", "'@y"]
    assert back["final/value"].tolist() == [-1.0, 2.0, 3.0]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_escaped_cells(start):
    assert escape_cell(f"{start}A1") == f"'{start}A1"
    assert escape_cell(f"A{start}") == f"A{start}"
    assert escape_cell(-1.0) == -1.0


# Copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda study: pickle.loads(pickle.dumps(study))]
)
def test_a_study_is_copied_and_pickled(copied):
    study = a_study(4, 2, kept=True)
    other = copied(study)
    assert other.data.identical(study.data)
    assert dict(other.spec) == dict(study.spec)
    equal_trees(other.params(1, 1), study.params(1, 1))
    with pytest.raises(TypeError):
        other.spec["name"] = "changed"


def test_what_trains_stays_in_its_process():
    calls = []
    study = study_from_blocks(a_spec(5), some_blocks(5), extend=calls.append)
    pickle.loads(pickle.dumps(study)).best()
    with pytest.raises(ValueError, match="is a record and cannot train"):
        pickle.loads(pickle.dumps(study)).extend(1)
    copy.deepcopy(study).extend(1)
    assert calls == [6]


def test_a_set_is_copied_and_pickled():
    studies = StudySet({"one": a_study(3), "other": a_study(4)}, "kind")
    for other in (copy.deepcopy(studies), pickle.loads(pickle.dumps(studies))):
        assert other.scientific == "kind"
        assert [study.num_trials for study in other.values()] == [3, 4]


# netCDF -------------------------------------------------------------------------------------------


def test_netcdf_there_and_back(tmp_path):
    study = a_study(4, 2)
    study.to_netcdf(tmp_path / "study.nc")
    with xarray.open_dataset(tmp_path / "study.nc") as plain:
        assert all(re.fullmatch(r"[A-Za-z_]\w*", str(name)) for name in plain.variables)
    back = Study.read_netcdf(tmp_path / "study.nc")
    xarray.testing.assert_equal(back, study.data)
    assert set(back.coords) == set(study.data.coords)
    assert back.attrs["objective"] == "valid/loss"
    assert [path.name for path in tmp_path.iterdir()] == ["study.nc"]


def test_netcdf_of_names_that_collide_and_small_floats(tmp_path):
    table = np.array([[1.0, 2.0]], ml_dtypes.bfloat16)
    metrics = {"a/b": table, "a_b": table + 1, "a b": table + 2, "9/é": table + 3}
    study = Study.from_arrays({"l/r": [0.1]}, metrics, [1, 2], objective="a/b")
    study.to_netcdf(tmp_path / "study.nc")
    back = Study.read_netcdf(tmp_path / "study.nc")
    for name, values in metrics.items():
        np.testing.assert_array_equal(back[name].values, values.astype(np.float32))
    assert back["l/r"].values.tolist() == [0.1]


def test_what_is_no_netcdf_is_an_error_by_name(tmp_path):
    (tmp_path / "study.nc").write_text("nothing")
    with pytest.raises(StorageError, match=r"study\.nc.*no netCDF"):
        Study.read_netcdf(tmp_path / "study.nc")
    with pytest.raises(StorageError, match="no netCDF"):
        Study.read_netcdf(tmp_path / "missing.nc")
    with pytest.raises(storage.NotWritable):
        a_study().to_netcdf(tmp_path / "missing" / "study.nc")
