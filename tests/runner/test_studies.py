"""A study per scientific value: roles, conditional hyperparameters, storage and resumption."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.analysis.isolation import isolation_info
from playbook_optax.records import storage
from playbook_optax.records.study_set import INDEX, StudySet

KEY = jax.random.key(0)
RATE = pbx.Float(1e-3, 1.0, scale="log")
COMMON = {
    "workload": tiny_workloads.quadratic(),
    "num_trials": 5,
    "num_steps": 6,
    "eval_every": 3,
    "key": KEY,
    "scientific": "optimizer",
}
VARIANTS = {
    "sgd": {
        "make_optimizer": tiny_workloads.sgd,
        "space": pbx.SearchSpace({"learning_rate": RATE}),
    },
    "momentum": {
        "make_optimizer": lambda point: pbx.momentum(point["learning_rate"], point["momentum"]),
        "space": pbx.SearchSpace(
            {"learning_rate": RATE, "momentum": pbx.Float(0.5, 0.99, scale="reverse_log")}
        ),
    },
}


@pytest.fixture(scope="module")
def studies():
    return pbx.run_studies(VARIANTS, **COMMON)


def test_each_study_is_what_run_study_gives(studies):
    assert list(studies) == ["sgd", "momentum"]
    alone = pbx.run_study(
        COMMON["workload"],
        tiny_workloads.sgd,
        VARIANTS["sgd"]["space"],
        num_trials=5,
        num_steps=6,
        eval_every=3,
        key=KEY,
    )
    assert tiny_workloads.digest(alone) == tiny_workloads.digest(studies["sgd"])
    assert studies.cost == 2 * 5 * 6


def test_points_and_starts_are_common(studies):
    one, two = studies.values()
    np.testing.assert_array_equal(one.points["learning_rate"], two.points["learning_rate"])
    np.testing.assert_array_equal(
        one.data["valid/loss"].values[:, 0], two.data["valid/loss"].values[:, 0]
    )


def test_roles(studies):
    assert studies.scientific == "optimizer"
    assert studies.nuisance == ("learning_rate",)
    assert studies.conditional == {"momentum": ("momentum",)}
    label, best = studies.best()
    values = {name: study.best().value for name, study in studies.items()}
    assert best.value == values[label] == min(values.values())
    info = isolation_info(studies)
    assert info.scientific == "optimizer"
    assert info.rows[info.best].label == label
    frame = studies.to_dataframe()
    assert frame["optimizer"].tolist() == ["sgd"] * 5 + ["momentum"] * 5
    assert frame["momentum"].isna().tolist() == [True] * 5 + [False] * 5


def test_what_is_fixed_leaves_the_space_and_reaches_the_functions():
    fixed = pbx.run_studies(VARIANTS, fixed={"momentum": 0.9}, **COMMON)
    assert fixed.conditional == {}
    assert list(fixed["momentum"].space) == ["learning_rate"]
    assert fixed.fixed == {"sgd": {}, "momentum": {"momentum": np.float32(0.9)}}
    by_hand = pbx.run_study(
        COMMON["workload"],
        tiny_workloads.momentum,
        VARIANTS["sgd"]["space"],
        num_trials=5,
        num_steps=6,
        eval_every=3,
        key=KEY,
    )
    np.testing.assert_allclose(
        fixed["momentum"].data["valid/loss"].values, by_hand.data["valid/loss"].values, rtol=1e-5
    )
    point = fixed.point("momentum", 2)
    assert point == {"momentum": np.float32(0.9), **by_hand.point(2)}


def test_a_choice_is_fixed_by_itself():
    dtypes = {}

    def optimizer(point):
        dtypes.update({name: value.dtype for name, value in point.items()})
        return pbx.sgd(jnp.where(point["kind"] == 1, 1.0, 0.5) * point["learning_rate"])

    space = pbx.SearchSpace(
        {
            "learning_rate": RATE,
            "kind": pbx.Categorical(["half", "whole"]),
            "steps": pbx.Integer(1, 9),
        }
    )
    common = {**COMMON, "make_optimizer": optimizer, "space": space}
    made = pbx.run_studies({"one": {}}, fixed={"kind": "whole", "steps": 3}, **common)
    assert made.fixed["one"] == {"kind": 1, "steps": 3}
    assert dtypes["kind"] == dtypes["steps"] == np.int32
    half = pbx.run_studies({"one": {}}, fixed={"kind": "half", "steps": 3}, **common)
    assert not half["one"].data["valid/loss"].equals(made["one"].data["valid/loss"])
    for fixed, message in (
        ({"kind": "third"}, "none of its choices"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": "three"}, "must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            pbx.run_studies({"one": {}}, fixed=fixed, **common)


def test_a_study_of_another_place_in_the_set_is_refused(tmp_path, studies):
    studies.save(tmp_path)
    one, other = tmp_path / "study-0000", tmp_path / "study-0001"
    one.rename(tmp_path / "kept")
    other.rename(one)
    with pytest.raises(storage.CorruptSpec, match=r"study-0000.*another study than"):
        pbx.load_study_set(tmp_path)
    one.rename(other)
    (tmp_path / "kept").rename(one)
    assert list(pbx.load_study_set(tmp_path)) == list(studies)


def test_a_set_is_stored_loaded_continued_and_appended_to(tmp_path, studies):
    first = {"sgd": VARIANTS["sgd"]}
    pbx.run_studies(first, directory=tmp_path, **COMMON)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["studies.json", "study-0000"]
    whole = pbx.run_studies(VARIANTS, directory=tmp_path, **COMMON)
    stored = pbx.load_study_set(tmp_path)
    assert list(stored) == ["sgd", "momentum"]
    for label in studies:
        assert stored[label].data.identical(whole[label].data)
        assert tiny_workloads.digest(stored[label]) == tiny_workloads.digest(studies[label])
    json.loads((tmp_path / INDEX).read_text(), parse_constant=pytest.fail)
    blocks = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.pbx"))
    pbx.run_studies(VARIANTS, directory=tmp_path, **COMMON)
    assert blocks == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.pbx"))
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert list(pbx.load_study_set(moved)) == ["sgd", "momentum"]
    for changed, message in (
        ({"variants": dict(reversed(VARIANTS.items()))}, "labels"),
        ({"fixed": {"momentum": 0.9}}, "fixed"),
        ({"scientific": "rule"}, "scientific"),
        ({"variants": first}, "labels"),
    ):
        arguments = {**COMMON, "variants": VARIANTS, **changed}
        with pytest.raises(storage.StorageError, match=f"another set of studies: {message}"):
            pbx.run_studies(directory=moved, **arguments)


def record(num=3, **arguments):
    return pbx.Study.from_arrays(
        {"x": np.arange(num)}, {"loss": np.arange(num)[:, None] + 1.0}, [10], objective="loss",
        **arguments,
    )  # fmt: skip


def test_records_are_saved_under_numbers_whatever_they_are_called(tmp_path):
    name = "../../etc/<b>passwd"
    made = StudySet({name: record(), "b": record(4)}, "what", {"b": {"y": 0.5}})
    for _ in range(2):
        made.save(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    stored = pbx.load_study_set(tmp_path / "set")
    assert list(stored) == ["b", name]
    assert stored.fixed["b"] == {"y": 0.5}
    assert stored.point("b", 3) == {"y": 0.5, "x": 3}
    assert stored[name].num_trials == 3


def test_nothing_is_written_through_a_link(tmp_path):
    StudySet({"a": record()}).save(tmp_path / "set")
    (tmp_path / "set" / "study-0001").symlink_to(tmp_path)
    with pytest.raises(storage.NotWritable, match="symbolic link"):
        StudySet({"a": record(), "b": record()}).save(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_directory_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(storage.NotWritable):
        pbx.run_studies(VARIANTS, directory=tmp_path / "file", **COMMON)


def test_a_study_that_has_not_begun_is_missing(tmp_path):
    made = StudySet({"a": record(), "b": record()})
    made.save(tmp_path)
    (tmp_path / "study-0000").rename(tmp_path / "elsewhere")
    stored = pbx.load_study_set(tmp_path)
    assert (list(stored), stored.missing) == (["b"], ("a",))
    stored.save(tmp_path)
    assert list(pbx.load_study_set(tmp_path)) == ["b"]


@pytest.mark.parametrize(
    "content",
    [
        {"scientific": "x", "labels": ["a", "a"], "fixed": [{}, {}]},
        {"scientific": "x", "labels": ["a"], "fixed": []},
        {"scientific": "x", "labels": [""], "fixed": [{}]},
        {"scientific": "x", "labels": ["a" * 201], "fixed": [{}]},
        {"scientific": "x", "labels": ["a"], "fixed": [{"y": "z"}]},
        {"scientific": 3, "labels": ["a"], "fixed": [{}]},
        {"labels": ["a"], "fixed": [{}]},
    ],
)
def test_a_forged_index_is_refused(tmp_path, content):
    storage.write_document(tmp_path / INDEX, content)
    with pytest.raises(storage.CorruptSpec, match="not the index"):
        pbx.load_study_set(tmp_path)


def test_a_damaged_index_is_refused(tmp_path):
    StudySet({"a": record()}).save(tmp_path)
    raw = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(raw.replace(b'"a"', b'"b"'))
    with pytest.raises(storage.CorruptSpec):
        pbx.load_study_set(tmp_path)
    with pytest.raises(storage.NoStudy):
        pbx.load_study_set(tmp_path / "nowhere")


def test_the_best_of_a_set():
    bad = record(infeasible=np.ones(3, bool))
    assert StudySet({"bad": bad, "good": record()}).best()[0] == "good"
    assert StudySet({"one": record(), "two": record()}).best()[0] == "one"
    with pytest.raises(pbx.NoFeasibleTrial, match="No study of bad"):
        StudySet({"bad": bad}).best()
    with pytest.raises(ValueError, match="objective differs"):
        StudySet({"one": record(), "two": record(maximize=True)}).best()
    with pytest.raises(ValueError, match="belongs to no study"):
        StudySet({"one": record()}, fixed={"tow": {}})


def other_objective():
    return pbx.Workload(**{**vars(COMMON["workload"]), "objective": "other"})


@pytest.mark.parametrize(
    ("variants", "changes", "message"),
    [
        ({}, {}, "non-empty dict"),
        ({3: VARIANTS["sgd"]}, {}, "labelled by strings, got 3; write '3'"),
        ({"": VARIANTS["sgd"]}, {}, "1 to 200 characters"),
        ({"a": 3}, {}, r"variants\['a'\] must be a dict"),
        ({"a": {"optimizer": 3}}, {}, "did you mean 'make_optimizer'"),
        ({"a": {"space": VARIANTS["sgd"]["space"]}}, {}, "has no make_optimizer"),
        ({"a": {**VARIANTS["sgd"], "space": {"x": 1}}}, {}, "must be a pbx.SearchSpace"),
        ({"a": {**VARIANTS["sgd"], "num_trials": 0}}, {}, "num_trials must be >= 1"),
        (VARIANTS, {"fixed": {"momentun": 0.9}}, "did you mean 'momentum'"),
        (VARIANTS, {"fixed": {"learning_rate": 0.1}}, "without a hyperparameter to search"),
        (VARIANTS, {"scientific": "momentum"}, "a dimension of a space as well"),
        (VARIANTS, {"num_trial": 3}, "did you mean 'num_trials'"),
    ],
)
def test_bad_arguments_cost_nothing(tmp_path, variants, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pbx.run_studies(variants, directory=tmp_path / "set", **{**COMMON, **changes})
    assert not (tmp_path / "set").exists()


def test_objectives_must_agree():
    variants = {**VARIANTS, "other": {**VARIANTS["sgd"], "workload": other_objective()}}
    with pytest.raises(ValueError, match="different objectives"):
        pbx.run_studies(variants, **COMMON)
