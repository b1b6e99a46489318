"""`tune` end to end: budget, decisions, program, resumption, and what goes wrong."""

import contextlib
import copy
import dataclasses
import inspect
import io
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import report, tuning
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures import stability, tune
from playbook_optax.procedures.remedies import RemedyComparison
from playbook_optax.procedures.stability import Stabilization
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records import storage
from playbook_optax.records.study import NoFeasibleTrial
from playbook_optax.runner.run import StudyRunner

KEY = jax.random.key(0)
BUDGET = {"num_trials": 24, "num_steps": 40, "key": KEY, "progress": False}
RATE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tune")
    return pbx.tune(tiny.mlp(), **BUDGET, directory=directory), directory


def same(one, other):
    assert one.point == other.point
    assert one.values.tobytes() == other.values.tobytes()
    assert one.cost == other.cost
    assert [c.decision for c in one.chapters] == [c.decision for c in other.chapters]
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)
    digests = [{n: tiny.digest(s) for n, s in r.studies.items()} for r in (one, other)]
    assert digests[0] == digests[1]


def test_a_recipe_and_its_budget(stored):
    recipe, _ = stored
    assert [chapter.name for chapter in recipe.chapters] == list(tune.CHAPTERS)
    assert recipe.total_budget == 24 * 40
    spent = sum(
        s.num_trials * s.num_seeds * int(s.spec["num_steps"]) for s in recipe.studies.values()
    )
    assert sum(recipe.cost.values()) == spent
    assert 0.9 * recipe.total_budget < spent <= recipe.total_budget
    assert recipe.num_steps == 40
    assert recipe.optimizer_name == "adam"
    assert set(recipe.point) >= {"learning_rate", "b1"}
    retrained = recipe.studies["retrain/retrain"]
    assert retrained.num_seeds == len(recipe.values) == 3
    trial = list(retrained.points["learning_rate"]).index(recipe.point["learning_rate"])
    curves = retrained.data["valid/error_rate"].values[trial]
    np.testing.assert_array_equal(recipe.values, curves.min(axis=1))
    assert recipe.value == recipe.values.mean()
    assert recipe.value < 0.2
    assert jax.tree.structure(recipe.params) == jax.tree.structure(tiny.mlp_init(KEY))


def test_the_second_half_of_round_2_is_searched_around_the_best_of_the_first(stored):
    recipe, _ = stored
    search, refined = recipe.studies["round_2/search"], recipe.studies["round_2/refined"]
    # Of nine trials one is the best of round 1.
    assert (search.num_trials, refined.num_trials) == (5, 4)
    wide = pbx.SearchSpace.from_dict(recipe.chapters[4].decision.evidence["space"])
    top = outcomes(search).order[:3]
    for name, line in wide.items():
        unit = np.asarray(search.space[name].to_unit(search.points[name]))[top]
        new = np.asarray(search.space[name].to_unit(refined.points[name]))
        # A tenth on either side, at least 0.15 in all, moved inside, ends of few digits.
        room = max(0.1, (0.15 - np.ptp(unit)) / 2) + 0.15
        assert unit.min() - room <= new.min()
        assert new.max() <= unit.max() + room
        assert line.low <= refined.space[name].low < refined.space[name].high
    # The candidates are the best of both halves.
    found = []
    for study in (search, refined):
        errors, losses = (study.data[f"valid/{n}"].values for n in ("error_rate", "loss"))
        for trial, rate in enumerate(study.points["learning_rate"]):
            least = np.nanmin(errors[trial])
            found.append((least, np.nanmin(losses[trial][errors[trial] == least]), rate))
    lowest = min(found)[0]
    # What validation cannot separate from the best is compared by its loss.
    within = lowest + 1.001 * search.resolution()
    ordered = sorted(found, key=lambda one: (max(one[0], lowest) if one[0] > within else 0, one[1]))
    best = [rate for *_, rate in ordered[:2]]
    np.testing.assert_array_equal(recipe.studies["retrain/retrain"].points["learning_rate"], best)


@pytest.mark.parametrize("maximize", [False, True])
def test_trials_of_both_halves_are_ranked_together(maximize):  # 44, 56
    def half(values):
        curves = np.float64(values)[:, None] * (-1.0 if maximize else 1.0)
        points = {"learning_rate": np.arange(len(values), dtype=np.float32)}
        return pbx.Study.from_arrays(
            points, {"score": curves}, [10], objective="score", maximize=maximize
        )

    studies = [half([3.0, np.nan, 1.0]), half([2.0, 1.0, 0.5])]
    found = [(studies.index(study), trial) for study, trial in tune._ranked(studies)]
    # NaN is nowhere, and of equals the earlier comes first.
    assert found == [(1, 2), (0, 2), (1, 1), (1, 0), (0, 0)]


def test_the_page_gives_no_mean_of_a_candidate_that_broke(stored):  # 44
    recipe, _ = stored
    last = recipe.chapters[-1]
    study = last.verdict.studies["retrain"]
    best = list(study.points["learning_rate"]).index(recipe.point["learning_rate"])
    broken = study.data["infeasible"].copy()
    broken[1 - best, 2] = True
    study = dataclasses.replace(study, data=study.data.assign(infeasible=broken))
    verdict = dataclasses.replace(last.verdict, studies={"retrain": study})
    rows = tuning._table(dataclasses.replace(last, verdict=verdict)).rows
    told = (recipe.values.mean(), recipe.values.min(), recipe.values.max())
    assert rows[best][-3:] == tuple(report.shown_number(value) for value in told)
    assert rows[1 - best][-3:] == ("infeasible",) * 3


def test_each_decision_is_a_finding_that_says_how_to_reverse_it(stored):
    recipe, _ = stored
    for chapter in recipe.chapters:
        assert isinstance(chapter.decision, Finding)
        assert chapter.decision in recipe.findings
        assert chapter.decision.evidence["override"] in tune.OVERRIDES
        assert chapter.decision.section
    assert len({f.message for f in recipe.findings}) == len(recipe.findings)


@pytest.mark.slow
def test_the_optimizer_is_the_one_that_was_trained(stored):
    recipe, _ = stored
    study = recipe.studies["retrain/retrain"]
    trial = list(study.points["learning_rate"]).index(recipe.point["learning_rate"])
    train = pbx.make_train(tiny.mlp(), lambda _: recipe.optimizer(), 40, recipe.eval_every)
    result = jax.jit(train)({}, pbx.trial_key(recipe.key, 1), tiny.mlp().data)
    np.testing.assert_allclose(
        result.metrics["valid/loss"], study.data["valid/loss"].values[trial, 1], rtol=1e-4
    )


def test_the_program_reaches_the_result(stored):
    recipe, directory = stored
    source = recipe.to_python("tiny_workloads:mlp")
    assert "pbx.adam(" in source
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(tiny.__file__)},
        check=False,
    )
    assert out.returncode == 0, out.stderr
    *each, last = [line.split() for line in out.stdout.splitlines()]
    assert {tuple(words[:2]) for words in each} == {("best", "valid/error_rate")}
    assert [float(words[2]) for words in each] == pytest.approx(recipe.values, abs=1e-6)
    assert float(last[1].rstrip(",")) == pytest.approx(recipe.value, abs=1e-6)
    assert float(last[-1]) == pytest.approx(recipe.spread, abs=1e-6)
    # What stands beside the report compiles too, though nobody told it where the workload is.
    kept = (directory / "recipe.py").read_text()
    compile(kept, "recipe.py", "exec")
    assert "# workload = your_workload\n" in kept


def test_the_same_call_is_answered_from_the_directory(stored, monkeypatch):
    recipe, directory = stored
    from playbook_optax.runner import execute

    monkeypatch.setattr(execute.Engine, "_train", None)  # Nothing is trained again.
    again = pbx.tune(tiny.mlp(), **BUDGET, directory=directory)
    same(recipe, again)
    assert again.report == directory / "report.html"


def test_a_killed_call_continues_bit_for_bit(stored, tmp_path, monkeypatch):
    recipe, _ = stored
    original = StudyRunner.run

    class Killed(BaseException):
        pass

    calls = []

    def killed(*args, **arguments):
        calls.append(arguments["directory"].name)
        if calls[-1] == "round_2_refined":
            raise Killed
        return original(*args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StudyRunner, "run", killed)
        with pytest.raises(Killed):
            pbx.tune(tiny.mlp(), **BUDGET, directory=tmp_path)
    assert calls == ["sweep_0", "sweep_1", "round_1", "round_2", "round_2_refined"]
    same(recipe, pbx.tune(tiny.mlp(), **BUDGET, directory=tmp_path))


def test_a_call_killed_in_the_second_widening_continues_bit_for_bit(tmp_path, monkeypatch):
    from playbook_optax.runner import execute

    starts_low(monkeypatch)
    call = {**BUDGET, "num_steps": 16}
    whole = pbx.tune(tiny.quadratic(), "sgd", **call)
    assert list(whole.studies)[:3] == [f"learning_rate/sweep_{i}" for i in range(3)]

    class Killed(BaseException):
        pass

    original, calls = execute.Engine._train, []

    def killed(*args, **arguments):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return original(*args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(execute.Engine, "_train", killed)
        with pytest.raises(Killed):
            pbx.tune(tiny.quadratic(), "sgd", **call, directory=tmp_path)
    assert sorted(p.name for p in (tmp_path / "learning_rate").iterdir())[-1] == "sweep_2"
    same(whole, tune.find_recipe(tiny.quadratic(), "sgd", **call, directory=tmp_path))


def test_the_report_names_every_decision(stored):
    recipe, directory = stored
    assert recipe.report == directory / "report.html"
    page = recipe.report.read_text()
    for chapter in recipe.chapters:
        assert chapter.decision.section.split(" using")[0] in page
    assert "pbx.adam(" in page
    assert f"{sum(recipe.cost.values()):,}" in page


def starts_low(monkeypatch):
    """Has the space of a call that gives none begin at rates that are too small."""
    low = pbx.SearchSpace({"learning_rate": pbx.Float(1e-5, 1e-3, scale="log")})
    monkeypatch.setattr(tune.search_spaces, "optimizer_search_space", lambda *_: low)


def test_a_sweep_moves_while_the_best_is_at_its_end(monkeypatch):
    starts_low(monkeypatch)
    recipe = pbx.tune(tiny.quadratic(), "sgd", **{**BUDGET, "num_trials": 48, "num_steps": 16})
    sweep = recipe.chapters[0]
    assert len(sweep.verdict.studies) > 1
    # Two decades beyond the end each time: the optimum lies near 2 / (1 + 0.1).
    assert sweep.decision.evidence["learning_rate"] > 3e-2
    assert recipe.point["learning_rate"] > 3e-2


def test_divergence_everywhere_is_no_crash():  # 43
    work = tiny.quadratic()
    broken = dataclasses.replace(work, loss=lambda p, s, b, k: (jnp.nan * jnp.sum(p["w"]), (s, {})))
    recipe = pbx.tune(broken, "sgd", **{**BUDGET, "num_trials": 8, "num_steps": 16})
    assert recipe.point is None
    assert recipe.findings[0].severity == "error"
    assert any("Lower the range" in finding.suggestion for finding in recipe.findings)
    assert np.isnan(recipe.value)
    for call in (recipe.optimizer, recipe.to_python, recipe.schedule, recipe.final_evaluate):
        with pytest.raises(NoFeasibleTrial, match="every trial was infeasible"):
            call()
    assert sum(recipe.cost.values()) <= recipe.total_budget


@pytest.mark.parametrize(
    "num_trials",
    [1, 3, 6],
)
def test_small_budgets_leave_chapters_out(num_trials):
    recipe = pbx.tune(
        tiny.quadratic(), "sgd", RATE, **{**BUDGET, "num_trials": num_trials, "num_steps": 16}
    )
    assert recipe.point is not None
    assert sum(recipe.cost.values()) <= num_trials * 16
    assert np.isfinite(recipe.value)
    if num_trials < 6:
        assert "unknown" in recipe.chapters[-1].decision.message
        with pytest.raises(ValueError, match="no weights"):
            recipe.final_evaluate()
    # Its program trains the seeds whose values it tells, also where nothing was trained again.
    told = run_program(recipe.to_python("tiny_workloads:quadratic"))
    assert told == pytest.approx(recipe.values, rel=1e-5)


def run_program(source, **names):
    """The best of each seed as a program says it, with whatever names it leaves to its reader."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "recipe", "exec"), names)
    return [float(value) for value in re.findall(r" (\S+) at step ", out.getvalue())]


def test_a_point_of_your_own_is_only_retrained():
    recipe = pbx.tune(
        tiny.quadratic(),
        "sgd",
        **{**BUDGET, "num_trials": 6, "num_steps": 16},
        overrides={"point": {"learning_rate": 0.5}, "max_norm": 1.0, "warmup_steps": 2},
    )
    assert list(recipe.cost) == ["retrain"]
    assert recipe.point == {"learning_rate": 0.5}
    source = recipe.to_python()
    assert "optax.chain(pbx.clip_by_global_norm(1.0), pbx.sgd(learning_rate=schedule))" in source
    assert "prepend_warmup(pbx.schedules.cosine_decay(0.5, 14), 2)" in source
    assert float(recipe.schedule()(1)) == pytest.approx(0.25)
    # Warm-up comes out of the run's steps: half of the decay at 2 + 14 / 2, all of it at the end.
    assert float(recipe.schedule()(9)) == pytest.approx(0.25)
    assert float(recipe.schedule()(16)) == pytest.approx(0.0, abs=1e-7)


def test_a_program_never_selects_what_is_not_finite():  # 44, 45
    base = tiny.quadratic()

    def evaluate(params, state, data):
        loss = base.evaluate(params, state, data)["valid/loss"]
        bad = jnp.where(loss > 2.0, jnp.nan, jnp.where(loss < 0.3, jnp.inf, -loss))
        return {'"score"\n\\': bad}

    work = dataclasses.replace(
        base, name='"""\n\\', evaluate=evaluate, objective='"score"\n\\', maximize=True
    )

    def make_optimizer(point):
        # An old transformation, which takes no extra arguments.
        return optax.GradientTransformation(
            lambda params: (),
            lambda updates, state, params=None: (
                jax.tree.map(lambda u: -0.5 * u / point["divisor"], updates),
                state,
            ),
        )

    recipe = pbx.tune(
        work,
        make_optimizer,
        pbx.SearchSpace({"divisor": pbx.Integer(1, 9)}),
        **{**BUDGET, "num_trials": 1, "num_steps": 16, "key": jax.random.key(0, impl="rbg")},
        overrides={"point": {"divisor": 2}},
    )
    assert recipe.point == {"divisor": 2}
    assert -2.0 <= recipe.values[0] <= -0.3
    source = recipe.to_python()
    assert "impl='rbg'" in source
    told = run_program(source, workload=work, make_optimizer=make_optimizer)
    assert told == pytest.approx(recipe.values, rel=1e-5)


def test_a_workload_of_the_point_with_an_optimizer_by_name():
    base = tiny.quadratic()

    def workload(point):
        def loss(params, state, batch, key):
            value, rest = base.loss(params, state, batch, key)
            return (1.0 + point["penalty"]) * value, rest

        return dataclasses.replace(base, loss=loss)

    space = pbx.SearchSpace({**RATE, "penalty": pbx.Float(0.0, 1.0)})
    point = {"learning_rate": 0.5, "penalty": 0.25}
    budget = {**BUDGET, "num_trials": 2, "num_steps": 16}
    recipe = pbx.tune(workload, "sgd", space, **budget, overrides={"point": point})
    source = recipe.to_python()
    assert "pbx.sgd(learning_rate=schedule)" in source
    told = run_program(source, workload=workload(recipe.point))
    assert told == pytest.approx(recipe.values, rel=1e-5)
    with pytest.raises(ValueError, match="lacks 'penalty'"):
        pbx.tune(workload, "sgd", space, **budget, overrides={"point": {"learning_rate": 0.5}})


def test_a_run_much_longer_than_the_budget_was_counted_in():
    budget = {**BUDGET, "num_trials": 12, "num_steps": 16, "key": jax.random.key(3)}
    recipe = pbx.tune(tiny.quadratic(), "sgd", **budget, overrides={"num_steps": 96})
    # The one trial of round 1 diverges: the best of the sweep is trained instead.
    assert recipe.cost["round_1"] == 48
    assert recipe.num_steps == 96
    assert recipe.value < 1e-3
    assert "the best of the sweep" in recipe.chapters[-1].decision.message
    assert sum(recipe.cost.values()) <= recipe.total_budget


def test_decisions_of_the_user_together(tmp_path):
    space = pbx.SearchSpace(
        {
            **RATE,
            "kind": pbx.Categorical(["plain", "scaled"]),
            "size": pbx.Categorical([0.5, 1, 2]),
            "count": pbx.Integer(1, 100, scale="log", include_zero=True),
        }
    )

    def make_optimizer(point):
        factor = 1.0 + 0.01 * point["kind"] + 0.01 * point["size"] + 0.001 * point["count"]
        return optax.chain(optax.scale(factor), optax.sgd(point["learning_rate"]))

    following = {"size": pbx.Categorical([0.25, 0.5]), "count": pbx.Integer(2, 5)}
    recipe = pbx.tune(
        tiny.quadratic(),
        make_optimizer,
        space,
        **{**BUDGET, "num_trials": 16, "num_steps": 16},
        directory=tmp_path,
        overrides={
            "learning_rate_range": (0.05, 0.5),
            "warmup_steps": 14,
            "next_space": pbx.SearchSpace(following),
        },
    )
    assert sum(recipe.cost.values()) <= recipe.total_budget
    first, second = recipe.studies["round_1/search"], recipe.studies["round_2/search"]
    assert first.space["learning_rate"] == pbx.Float(0.05, 0.5, scale="log")
    # As long as warm-up and a decay take.
    assert first.spec["num_steps"] == 16
    # Who gives the space of round 2 gets all of its new trials there.
    assert "round_2/refined" not in recipe.studies
    kept = max(1, second.num_trials // 5)
    fresh = {name: values[kept:] for name, values in second.points.items()}
    assert len(fresh["count"]) > 0
    assert set(fresh["count"].tolist()) <= {2, 3, 4, 5}
    assert set(fresh["size"].tolist()) <= {0.25, 0.5}
    # What it leaves out stays as in the best trial, and the range told holds every trial.
    assert set(fresh["kind"].tolist()) == {second.points["kind"][0]}
    for trial in range(second.num_trials):
        for name, values in second.points.items():
            second.space.label(name, values[trial])
    label = ["plain", "scaled"][recipe.point["kind"]]
    assert f">{label}<" in recipe.report.read_text()


def test_ranges_move_on_a_log_scale_and_hold_what_was_trained():
    rates = np.array([0.0, 0.1, 0.2], np.float32)
    curves = np.stack([np.full(3, 4.0), [1.0, 2.0, 3.0]], axis=1)
    study = pbx.Study.from_arrays(
        {"learning_rate": rates}, {"valid/loss": curves}, [0, 10], objective="valid/loss"
    )
    moved = tune._extended(pbx.Float(0.0, 0.2), study, 0.0)
    assert moved.scale == "log"
    assert moved.low == pytest.approx(1e-3)
    assert moved.high == pytest.approx(0.3)
    assert tune._moved(0.0, 0.0) is None
    wide = tune._wide_enough(pbx.Integer(2, 9, scale="log"), np.array([0, 5, 12], np.int32))
    assert wide == pbx.Integer(2, 12, scale="log", include_zero=True)
    choices = tune._wide_enough(pbx.Categorical([0.5, 1]), np.array([2.0, 0.5], np.float32))
    assert choices == pbx.Categorical([0.5, 1, 2.0])
    labels = pbx.Categorical(["a", "b"])
    assert tune._wide_enough(labels, np.array([1], np.int32)) is labels


def test_a_name_alone_does_not_make_a_workload_of_the_zoo(monkeypatch):
    from playbook_optax import zoo
    from playbook_optax.procedures import program

    def recipe(workload):
        return type("Recipe", (), {"workload": workload})

    named = dataclasses.replace(tiny.quadratic(), name="wine")
    assert program._in_zoo(recipe(named)) is None
    assert program._in_zoo(recipe(zoo.wine())) == "wine"
    # A prompt's last answer is no place to import from.
    monkeypatch.setattr("builtins._", named, raising=False)
    assert program._reference(named) is None


@pytest.mark.parametrize("where", ["os:system('x')", "a b:c", "nowhere", "a:b:c", "a:b\nimport os"])
def test_a_place_that_is_no_name_is_refused(where):
    made = tune.Recipe(
        workload=tiny.quadratic(),
        pipeline=tune.Pipeline(tiny.sgd, None),
        optimizer_name=None,
        point={"learning_rate": 0.5},
        num_steps=4,
        eval_every=1,
        objective="valid/loss",
        maximize=False,
        values=np.array([1.0]),
        chapters=(),
        total_budget=4,
        params=None,
        model_state=None,
        key=KEY,
    )
    with pytest.raises(ValueError, match="workload"):
        made.to_python(where)
    with pytest.raises(ValueError, match="make_optimizer"):
        made.to_python(make_optimizer=where)


def test_debugging_of_nans_is_refused_before_anything_is_written(tmp_path):  # 52
    with jax.debug_nans(True), pytest.raises(ValueError, match="jax_debug_nans"):
        pbx.tune(tiny.quadratic(), "sgd", RATE, **BUDGET, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unstable(monkeypatch):
    """Sweeps that see an instability."""
    seen = Finding("unstable_best", "warning", "It rises.", {}, "Identifying unstable workloads")
    original = tune.sweep_learning_rate

    def sweep(*args, **arguments):
        verdict = original(*args, **arguments)
        return dataclasses.replace(verdict, findings=(*verdict.findings, seen))

    monkeypatch.setattr(tune, "sweep_learning_rate", sweep)


def test_a_budget_too_small_for_the_chapter_on_instability_says_so(unstable):
    budget = {**BUDGET, "num_trials": 8, "num_steps": 16}
    poor = pbx.tune(tiny.quadratic(), "sgd", RATE, **budget)
    assert poor.cost["stability"] == 0
    (said,) = (f for f in poor.findings if f.code == "decided_stability")
    assert said.severity == "warning"
    assert "trials" in said.suggestion


def test_what_the_chapter_on_instability_says_is_trained(monkeypatch, unstable):
    asked = {}

    def stabilize(trainer, study, **arguments):
        asked.update(arguments)
        comparison = RemedyComparison(
            **dict.fromkeys(RemedyComparison._fields) | {"max_norm": 0.5, "warmup_steps": 2}
        )
        answer = Stabilization("warmup", 0.2, 2, None, 0.1, 0.3, comparison, {})
        return Verdict(answer, (), {}, 100)

    monkeypatch.setattr(tune, "stabilize", stabilize)
    rich = pbx.tune(tiny.quadratic(), "sgd", RATE, **{**BUDGET, "num_trials": 80, "num_steps": 16})
    assert asked["num_steps"] == 4
    assert inspect.signature(stability.stabilize).parameters.keys() >= asked.keys()
    assert rich.cost["stability"] == 100
    assert rich.pipeline.warmup_steps == 2
    assert "prepend_warmup" in rich.to_python()
    space = pbx.SearchSpace.from_dict(rich.chapters[3].decision.evidence["space"])
    assert space["learning_rate"].low == pytest.approx(0.02)
    assert float(rich.schedule()(1)) == pytest.approx(rich.point["learning_rate"] / 2)


def own_optimizer(point):
    return optax.lion(point["learning_rate"], weight_decay=point["decay"])


def own_schedule(point, num_steps):
    return pbx.schedules.linear_decay(point["learning_rate"], num_steps)


def test_an_optimizer_and_a_schedule_of_your_own():
    space = pbx.SearchSpace(
        {
            "learning_rate": pbx.Float(1e-4, 1e-1, scale="log"),
            "decay": pbx.Float(1e-5, 1e-1, scale="log"),
        }
    )
    recipe = pbx.tune(
        tiny.quadratic(),
        own_optimizer,
        space,
        own_schedule,
        **{**BUDGET, "num_trials": 8, "num_steps": 16},
        overrides={"learning_rate_range": (1e-3, 1e-1)},
    )
    assert recipe.optimizer_name is None
    assert set(recipe.point) == {"learning_rate", "decay"}
    # A linear decay keeps its length, and is held before it (P7).
    rate = recipe.point["learning_rate"]
    schedule = recipe.schedule()
    assert float(schedule(8)) == pytest.approx(rate, rel=1e-6)
    assert float(schedule(12)) == pytest.approx(rate / 2, rel=1e-5)
    source = recipe.to_python(make_optimizer="mine.optim:own_optimizer")
    assert "from mine.optim import own_optimizer" in source
    # The schedule that your function made is one of ours, with numbers that say so.
    assert re.search(r"schedule = pbx.schedules.linear_decay\(\S+, 8, hold_steps=8\)\n", source)
    compile(source, "recipe", "exec")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": {"learning_rates": (0, 1)}}, "did you mean 'learning_rate_range'"),
        ({"overrides": {"num_steps": 0}}, "num_steps"),
        ({"overrides": {"max_norm": -1.0}}, "max_norm"),
        ({"overrides": {"space": {"learning_rate": 1}}}, "SearchSpace"),
        ({"overrides": {"learning_rate_range": (1.0, 0.1)}}, "low"),
        ({"overrides": {"learning_rate_range": 0.1}}, "pair"),
        ({"overrides": ["point"]}, "overrides must be a dict"),
        ({"overrides": {"num_steps": 24 * 40 + 1}}, "more than the whole budget"),
        ({"overrides": {"warmup_steps": 40}}, "warmup_steps.* must be < 40"),
        ({"overrides": {"point": {"learning_rat": 0.1}}}, "did you mean 'learning_rate'"),
        ({"overrides": {"point": {"b1": 0.9}}}, "lacks 'learning_rate'"),
        ({"overrides": {"point": {"learning_rate": "0.1"}}}, "must be a number"),
        ({"overrides": {"space": pbx.SearchSpace({"b1": pbx.Float(0.1, 0.9)})}}, "lacks"),
        ({"overrides": {"next_space": pbx.SearchSpace({"b3": pbx.Float(0, 1)})}}, "did you mean"),
        ({"overrides": {"next_space": pbx.SearchSpace({"b1": pbx.Integer(0, 1)})}}, "of the kind"),
        ({"space": {"learning_rate": (0, 1)}}, "SearchSpace"),
        ({"space": pbx.SearchSpace({"b1": pbx.Float(0.1, 0.9)})}, "which adam needs"),
        ({"make_optimizer": optax.sgd(0.1), "space": RATE}, "function of the point"),
        ({"make_schedule": 0.1}, "function of the point"),
        ({"make_optimizer": ""}, "make_optimizer"),
        ({"num_trials": 0}, "num_trials"),
        ({"num_trials": 2.5}, "num_trials"),
        ({"num_steps": 0}, "num_steps"),
        ({"key": 0}, "key"),
        ({"make_optimizer": "adan"}, "did you mean 'adam'"),
        ({"make_optimizer": tiny.sgd}, "space is missing"),
        ({"space": pbx.SearchSpace({"lr": pbx.Float(0, 1)})}, "lr"),
        ({"num_trial": 3}, "did you mean 'num_trials'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):  # 4, 5, 7, 8
    with pytest.raises((ValueError, TypeError), match=message):
        pbx.tune(**{"workload": tiny.quadratic(), **BUDGET, "directory": tmp_path, **arguments})
    assert list(pathlib.Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 48}, "num_steps is 40 there and 48 here"),
        ({"num_trials": 25}, "num_trials is 24 there and 25 here"),
        ({"overrides": {"max_norm": 1.0}}, "overrides is {} there and {'max_norm': 1.0} here"),
        ({"overrides": {"space": RATE}}, "overrides is {} there"),
        ({"make_optimizer": "sgd"}, "optimizer is 'adam' there and 'sgd' here"),
        ({"key": jax.random.key(1)}, "key"),
    ],
)
def test_another_call_in_the_same_directory_is_refused(stored, change, message):  # 67
    _, directory = stored
    with pytest.raises((ValueError, storage.StorageError), match=message):
        pbx.tune(**{"workload": tiny.mlp(), **BUDGET, **change}, directory=directory)


def test_a_damaged_index_is_written_again(stored, tmp_path):  # 60
    recipe, directory = stored
    shutil.copytree(directory, tmp_path / "copy")
    index = tmp_path / "copy" / tune.INDEX
    raw = bytearray(index.read_bytes())
    raw[-5] ^= 1
    index.write_bytes(raw)
    same(recipe, tune.find_recipe(tiny.mlp(), **BUDGET, directory=tmp_path / "copy"))
    assert index.read_bytes() == (directory / tune.INDEX).read_bytes()


def test_finished_chapters_serve_a_call_that_decides_otherwise(stored, tmp_path):
    recipe, directory = stored
    for chapter in ("learning_rate", "round_1"):
        shutil.copytree(directory / chapter, tmp_path / chapter)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pbx")}
    given = {"next_space": pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 0.1, scale="log")})}
    other = tune.find_recipe(tiny.mlp(), **BUDGET, directory=tmp_path, overrides=given)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    digests = [tiny.digest(r.studies["round_1/search"]) for r in (recipe, other)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("folder", ["learning_rate", "learning_rate/sweep_0"])
def test_a_link_out_of_the_directory_is_refused(tmp_path, folder):
    outside, directory = tmp_path / "outside", tmp_path / "tune"
    outside.mkdir()
    (directory / folder).parent.mkdir(parents=True)
    (directory / folder).symlink_to(outside)
    with pytest.raises(storage.NotWritable, match="symbolic link"):
        pbx.tune(tiny.quadratic(), "sgd", **BUDGET, directory=directory)
    assert list(outside.iterdir()) == []


def test_a_recipe_survives_a_failed_drawing(stored, monkeypatch):
    recipe, directory = stored

    def broken(*args, **arguments):
        raise RuntimeError("no ink")

    monkeypatch.setattr(tuning, "write_recipe_report", broken)
    with pytest.warns(UserWarning, match="no report is written: .*no ink"):
        again = pbx.tune(tiny.mlp(), **BUDGET, directory=directory)
    same(recipe, again)
    assert again.report is None
    assert recipe == recipe
    assert recipe != again


def test_round_1_stays_in_the_range_that_was_given():
    space = pbx.SearchSpace({"learning_rate": pbx.Float(0.25, 4.0, scale="log")})
    tuner = tune._Tuner(
        tiny.quadratic((1.0,)), "sgd", space, None, 24, 40, KEY, None, {}, None, {"progress": False}
    )
    tuner._sweep()
    assert 0.25 < tuner._rate < 4.0
    line = tuner._first_space(10)["learning_rate"]
    assert (line.low, line.high) == pytest.approx((0.25, 4.0))


@pytest.mark.parametrize(
    ("space", "rate", "expected"),
    [
        # Left on neither side, not even where the best lies at an end.
        ((1e-3, 1.0), 0.3, (0.03, 1.0)),
        ((0.1, 1e3), 0.3, (0.1, 3.0)),
        ((1e-3, 0.3), 0.3, (0.03, 0.3)),
        (None, 0.3, (0.03, 3.0)),
    ],
)
def test_the_range_of_round_1_is_cut_to_the_one_given(space, rate, expected):
    given = space and pbx.SearchSpace({"learning_rate": pbx.Float(*space, scale="log")})
    tuner = tune._Tuner(
        tiny.quadratic(), "sgd", given, None, 24, 40, KEY, None, {}, None, {"progress": False}
    )
    tuner._rate = rate
    assert tuner._rate_range() == pytest.approx(expected)
    line = tuner._first_space(10)["learning_rate"]
    assert (line.low, line.high) == pytest.approx(expected)


@pytest.mark.slow
def test_killed_after_every_block_it_continues_bit_for_bit(tmp_path, monkeypatch, unstable):
    """Each call dies when it has stored one block and begins to store another file.

    The chapter on instability is real here.
    """
    call = {**BUDGET, "num_trials": 120, "num_steps": 16}
    whole = tune.find_recipe(tiny.quadratic(), "sgd", RATE, **call)
    assert all(whole.cost[name] for name in tune.CHAPTERS if name != "num_steps")

    class Killed(BaseException):
        pass

    original, blocks = storage._commit, []

    def killed(path, *args, **arguments):
        if len(blocks) > kills:
            raise Killed
        if path.suffix == ".pbx":
            blocks.append(path)
        return original(path, *args, **arguments)

    monkeypatch.setattr(storage, "_commit", killed)
    for kills in range(1000):  # noqa: B007
        with contextlib.suppress(Killed):
            last = tune.find_recipe(tiny.quadratic(), "sgd", RATE, **call, directory=tmp_path)
            break
    assert len(set(blocks)) == len(blocks) == kills + 1  # One each time, and none twice.
    stored = {path.relative_to(tmp_path).parts[0] for path in blocks}
    assert stored == {*tune.CHAPTERS, "round_2_refined"} - {"num_steps"}
    same(whole, last)


def test_the_users_own_error_passes_through(tmp_path):  # 22
    def loss(params, state, batch, key):
        raise KeyError("mine")

    work = dataclasses.replace(tiny.quadratic(), loss=loss)
    with pytest.raises(KeyError, match="mine"):
        pbx.tune(work, "sgd", **BUDGET, directory=tmp_path)


def through(function):
    return lambda value: pickle.loads(function(value))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through(pickle.dumps), through(cloudpickle.dumps)]
)
def test_a_recipe_travels_with_its_evidence(stored, copied):
    recipe, _ = stored
    other = copied(recipe)
    same(recipe, other)
    assert other.to_python() == recipe.to_python()
    np.testing.assert_array_equal(jax.random.key_data(other.key), jax.random.key_data(recipe.key))
    grads = jax.tree.map(np.ones_like, recipe.params)
    updates = [
        one.optimizer().update(grads, one.optimizer().init(one.params), one.params)[0]
        for one in (recipe, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_function_that_cannot_travel_says_so(stored):
    recipe, _ = stored
    lock = threading.Lock()
    pipeline = dataclasses.replace(recipe.pipeline, make_optimizer=lambda point: lock)
    other = pickle.loads(pickle.dumps(dataclasses.replace(recipe, pipeline=pipeline)))
    assert other.point == recipe.point
    with pytest.raises(ValueError, match=r"did not travel with the result.*lock"):
        other.optimizer()
