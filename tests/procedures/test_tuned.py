"""What `tune` stores to be told again: it comes back whole, and nothing in it is believed."""

import copy
import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import chapters, report, tuning
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import tune, tuned
from playbook_optax.records import storage

KEY = jax.random.key(0)
RATE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")})
OTHER = pbx.SearchSpace({"rate": RATE["learning_rate"]})
NAMED = pbx.SearchSpace({"learning_rate": pbx.Categorical(["small", "large"])})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A tuning with every chapter; its sweep says that it saw an instability."""
    seen = Finding("unstable_best", "warning", "It rises.", {}, "Identifying unstable workloads")
    original = tune.sweep_learning_rate

    def sweep(*args, **arguments):
        verdict = original(*args, **arguments)
        return dataclasses.replace(verdict, findings=(*verdict.findings, seen))

    directory = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "sweep_learning_rate", sweep)
        asked = {"num_trials": 120, "num_steps": 16, "key": KEY, "progress": False}
        recipe = tune.find_recipe(tiny.quadratic(), "sgd", RATE, **asked, directory=directory)
    assert all(recipe.cost[name] for name in tune.CHAPTERS if name != "num_steps")
    tuned.store(recipe, directory)
    return recipe, directory


def shown(recipe):
    """What a page says, without its pictures."""
    told = [tuning.recipe_headline(recipe), tuning._facts(recipe), recipe.cost]
    for chapter in recipe.chapters:
        told += [chapter.decision, chapter.verdict.findings, tuning._table(chapter)]
        if chapter.name == "stability":
            told += [
                (one.title, one.decided, one.findings, one.table, one.section)
                for one in chapters.stability_decisions(chapter.verdict, lambda *a, **k: a[0])
            ]
    return told


def test_a_tuning_comes_back_whole(stored):
    recipe, directory = stored
    again, zoo = tuned.read(directory)
    assert zoo is None
    for name in ("point", "num_steps", "eval_every", "objective", "maximize", "optimizer_name"):
        assert getattr(again, name) == getattr(recipe, name)
    np.testing.assert_array_equal(again.values, recipe.values)
    np.testing.assert_array_equal(jax.random.key_data(again.key), jax.random.key_data(recipe.key))
    assert again.findings == recipe.findings
    assert repr(shown(again)) == repr(shown(recipe))
    assert [tiny.digest(s) for s in again.studies.values()] == [
        tiny.digest(s) for s in recipe.studies.values()
    ]
    spaces = [{n: s.spec["space"] for n, s in one.studies.items()} for one in (again, recipe)]
    assert spaces[0] == storage.as_stored(spaces[1])
    # A study that two chapters rest on is one, so that a page draws it once.
    assert len({id(s) for s in again.studies.values()}) == len(
        {id(s) for s in recipe.studies.values()}
    )
    assert "pbx.schedules.cosine_decay" in again.to_python()
    with pytest.raises(ValueError, match="evaluate is code, which is not stored"):
        again.workload.evaluate(None, None, None)


@pytest.mark.slow
def test_its_page_is_the_same(stored, tmp_path):
    recipe, directory = stored
    pages = [
        tuning.write_recipe_page(one, tmp_path, "source").read_text()
        for one in (recipe, tuned.read(directory)[0])
    ]
    assert pages[0] == pages[1]


def change(*path, to):
    """A change of the document at a path; a function is given what stands there."""

    def changed(document):
        held = document
        for part in path[:-1]:
            held = held[part]
        held[path[-1]] = to(held[path[-1]]) if callable(to) else to

    return changed


def remedies(document):
    return document["chapters"][2]["steps"][-1]["answer"]


def of_remedies(*path, to):
    return lambda document: change(*path, to=to)(remedies(document))


def without(name):
    return lambda document: document.pop(name)


CHANGES = [
    (without("point"), "has not the fields"),
    (change("more", to=1), "has not the fields"),
    (change("point", to=[1]), "point is no mapping"),
    (change("point", to={"learning_rate": "0.1"}), "point is no int"),
    (change("point", to={"learning_rate": 0.5}), "its point and its values are none"),
    (change("point", to={"learning_rate": float("nan")}), "its point and its values are none"),
    (change("point", to={}), "lacks 'learning_rate'"),
    (change("values", to=[]), "it has a point and no value"),
    (change("values", 0, to=1e300), "its point and its values are none"),
    (change("optimizer", to="__import__"), "optimizer = '__import__' is unknown"),
    (change("schedule", to="os.system"), "schedule = 'os.system' is unknown"),
    (change("num_steps", to=0), "num_steps must be >= 1"),
    (change("num_steps", to=2**40), "num_steps must be >= 1"),
    (change("pipeline", to={}), "its pipeline has not the fields warmup_steps"),
    (change("pipeline", "warmup_steps", to=True), "warmup_steps is no int"),
    (change("pipeline", "max_norm", to=-1.0), "max_norm must be > 0"),
    (change("pipeline", "extended_from", to=0), "extended_from must be >= 1"),
    (change("objective", to="valid/accuracy"), "its point and its values are none"),
    (change("total_budget", to=7), None),
    (change("objective", to=""), "objective must name a metric"),
    (change("key", to={"impl": "x", "data": [1]}), "its key is none"),
    (change("key", to={"impl": None, "data": [2**40]}), "its key is none"),
    (change("chapters", to=lambda old: old[::-1]), "its chapters are"),
    (change("chapters", to=[]), "its chapters are"),
    (change("chapters", 0, "name", to="sweeping"), "a chapter = 'sweeping' is unknown"),
    (change("chapters", 0, "cost", to=-1), "a cost must be >= 0"),
    (change("chapters", 0, "answer", to={}), "has an answer"),
    (change("chapters", 0, "decision", "severity", to="fatal"), "severity = 'fatal'"),
    (change("chapters", 0, "findings", to={}), "findings is no list"),
    (change("chapters", 0, "studies", to=lambda old: old * 65), "more than 64 studies"),
    (change("chapters", 3, "studies", 0, "folder", to="../other"), "is none inside it"),
    (change("chapters", 3, "studies", 0, "folder", to="/etc"), "is none inside it"),
    (change("chapters", 3, "studies", 0, "folder", to="round_1/../x"), "is none inside it"),
    (change("chapters", 3, "studies", 0, "folder", to="retrain"), "is not the one"),
    (change("chapters", 3, "studies", 0, "space", to={"a": 1}), "unknown key 'a'"),
    (change("chapters", 3, "studies", 0, "space", to=OTHER.to_dict()), "has other names"),
    (change("chapters", 3, "studies", 0, "space", to=RATE.to_dict()), None),
    (change("chapters", 3, "studies", 0, "space", to=NAMED.to_dict()), "indices of choices"),
    (change("chapters", 2, "steps", to=None), "has an answer"),
    (change("chapters", 2, "steps", 0, "name", to="remedy"), "a step = 'remedy' is unknown"),
    (change("chapters", 2, "steps", to=lambda old: old[::-1]), "the steps of 'stability' are"),
    (change("chapters", 2, "steps", 0, "studies", to=[]), "the sweep has not one study"),
    (change("chapters", 2, "steps", 1, "studies", to=["a"]), "lacks its study 'a'"),
    (change("chapters", 2, "steps", 1, "answer", to="1"), "the answer of 'limit' is no float"),
    (change("chapters", 2, "steps", -1, "answer", to=None), "comparison of remedies is missing"),
    (of_remedies("rows", 0, "study", to="a"), "lacks its study 'a'"),
    (of_remedies("rows", 0, "best_trial", to=10**6), "has the best trial 1000000"),
    (of_remedies("rows", 0, "best_trial", to=-2), "has the best trial -2"),
    (of_remedies("rows", 0, "values", to=[1.0]), "columns of two lengths"),
    (of_remedies("rows", 0, "remedy", to="no"), "no remedy|unknown|none"),
    (of_remedies("rows", to=[]), "no remedy|unknown|none"),
    (of_remedies("recommended", to="prayer"), "prayer"),
]


@pytest.mark.parametrize(("changed", "message"), CHANGES)
def test_what_is_forged_is_refused_by_name(stored, tmp_path, changed, message):
    _, directory = stored
    place = tmp_path / "copy"
    shutil.copytree(directory, place)
    document = copy.deepcopy(storage.read_document(place / tuned.DOCUMENT))
    changed(document)
    storage.write_document(place / tuned.DOCUMENT, document)
    if message is None:  # A claim like any other.
        tuned.read(place)
        return
    with pytest.raises(storage.CorruptSpec, match=f"does not describe a tuning.*({message})"):
        tuned.read(place)


def test_a_damaged_document_or_study_is_told(stored, tmp_path):
    _, directory = stored
    place = tmp_path / "copy"
    shutil.copytree(directory, place)
    path = place / tuned.DOCUMENT
    text = path.read_text()
    path.write_text(text.replace('"num_steps": 16', '"num_steps": 17', 1))
    with pytest.raises(storage.CorruptSpec, match="checksum"):
        tuned.read(place)
    path.write_text(text)
    shutil.rmtree(place / "round_1")
    with pytest.raises(storage.NoStudy, match="round_1"):
        tuned.read(place)
    path.unlink()
    with pytest.raises(storage.NoStudy):
        tuned.read(place)


def test_functions_of_ones_own_are_told_of_and_not_stored(tmp_path):
    def make_optimizer(point):
        return pbx.sgd(point["learning_rate"])

    asked = {"num_trials": 4, "num_steps": 8, "key": KEY, "progress": False}
    recipe = tune.find_recipe(
        tiny.host_fed(),
        make_optimizer,
        RATE,
        lambda point, num_steps: pbx.schedules.linear_decay(point["learning_rate"], num_steps),
        **asked,
        directory=tmp_path,
        overrides={"point": {"learning_rate": 0.25}, "max_norm": 10.0},
    )
    tuned.store(recipe, tmp_path, "digits_mlp")
    again, zoo = tuned.read(tmp_path)
    assert zoo == "digits_mlp"
    assert again.pipeline.max_norm == 10.0
    assert again.workload.batch is None
    assert "make_optimizer({" in again.to_python()
    assert "schedule = make_schedule({'learning_rate': 0.25}, 8)" in again.to_python()
    with pytest.raises(ValueError, match="has no equal in Optax"):
        again.to_python(style="optax")
    for function in (again.pipeline.make_optimizer, again.pipeline.make_schedule):
        with pytest.raises(ValueError, match="is code, which is not stored"):
            function({})
    assert report.shown_number(again.value) in tuning.recipe_headline(again)[0]
