"""No recipe where validation cannot tell; what a user says of ranges and rates holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import tuning
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import rates, tune

KEY = jax.random.key(0)
BUDGET = {"num_trials": 24, "num_steps": 40, "key": KEY, "progress": False}


def decision(recipe, chapter):
    return next(c.decision for c in recipe.chapters if c.name == chapter)


def codes(recipe):
    return {finding.code: finding for finding in recipe.findings}


def steps_of_34(workload):
    """A workload judged by an error rate of 34 examples that falls with the loss, down to 0."""

    def evaluate(params, state, data):
        loss = workload.evaluate(params, state, data)["valid/loss"]
        return {"valid/error_rate": jnp.floor(jnp.minimum(loss, 0.6) * 34) / 34, "valid/loss": loss}

    return dataclasses.replace(
        workload, evaluate=evaluate, objective="valid/error_rate", resolution=1 / 34
    )


def test_a_flat_objective_is_never_a_recipe():
    flat = dataclasses.replace(
        tiny.quadratic(),
        evaluate=lambda p, s, d: {"valid/error_rate": 0.667 + 0 * p["w"][0]},
        objective="valid/error_rate",
        resolution=1 / 34,
    )
    recipe = pbx.tune(flat, "sgd", **BUDGET)
    assert recipe.point is None
    assert recipe.findings[0].severity == "error"
    assert "moved the objective" in decision(recipe, "retrain").message
    # A sweep that moves nothing is moved to larger rates, not to the smallest.
    ranges = [
        study.points["learning_rate"].min() for study in recipe.chapters[0].verdict.studies.values()
    ]
    assert ranges == sorted(ranges)
    assert len(ranges) > 1
    headline, _ = tuning.recipe_headline(recipe)
    assert "moved the objective" in headline
    assert sum(recipe.cost.values()) <= recipe.total_budget


@pytest.mark.parametrize("num_trials", [2, 24])
def test_a_best_before_training_is_never_a_recipe(num_trials):
    # Ascends: each step makes the evaluation worse.
    worse = dataclasses.replace(
        tiny.quadratic(), loss=lambda p, s, b, k: (-0.001 * jnp.sum(p["w"] ** 2), (s, {}))
    )
    recipe = pbx.tune(worse, "sgd", **{**BUDGET, "num_trials": num_trials})
    assert recipe.point is None
    last = decision(recipe, "retrain")
    assert last.severity == "error"
    assert "Training made nothing better" in last.message


def test_ties_at_a_perfect_score_are_told_and_decided_by_the_loss():
    recipe = pbx.tune(steps_of_34(tiny.quadratic()), "sgd", **BUDGET)
    assert recipe.value == 0.0
    assert recipe.resolution == pytest.approx(1 / 34)
    told = decision(recipe, "retrain").message
    assert "one example of 34 is 0.0294 of valid/error_rate" in told
    assert "0.0843" in told  # 1 - 0.05 ** (1 / 34)
    study = recipe.studies["retrain/retrain"]
    # All candidates are at 0; the checkpoint is the one of the lowest loss.
    errors, losses = (study.data[f"valid/{n}"].values for n in ("error_rate", "loss"))
    assert errors.min(axis=2).max() == 0.0
    trial = list(study.points["learning_rate"]).index(recipe.point["learning_rate"])
    work = steps_of_34(tiny.quadratic())
    kept = work.evaluate(recipe.params, recipe.model_state, work.data)["valid/loss"]
    np.testing.assert_allclose(kept, losses[trial].min(), rtol=1e-5)
    assert "validation_cannot_separate" in codes(recipe)


def test_the_middle_of_rates_that_nothing_tells_apart():
    errors = [[0.5, 0.5], [0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [0.5, 0.4]]
    study = pbx.Study.from_arrays(
        {"learning_rate": np.geomspace(1e-4, 1.0, 5)},
        {"valid/error_rate": errors},
        [0, 10],
        objective="valid/error_rate",
        resolution=0.02,
    )
    verdict = pbx.procedures.sweep_learning_rate(None, None, study, key=KEY)
    assert verdict.answer == pytest.approx(1e-2)
    assert "validation_cannot_separate" in {finding.code for finding in verdict.findings}


@pytest.mark.parametrize(("last", "answer"), [(0.0, 1e-2), (-0.03, None)])
def test_an_end_of_a_sweep_is_best_only_where_validation_says_so(last, answer):
    # The loss falls all the way to the end: more sure, and no better.
    errors = np.array([[0.5, 0.5], [0.5, 0.3], [0.5, 0.1], [0.5, 0.1 + last]])
    losses = [[0.7, 0.7], [0.7, 0.5], [0.7, 0.4], [0.7, 0.1]]
    study = pbx.Study.from_arrays(
        {"learning_rate": np.array([1e-4, 1e-3, 1e-2, 1e-1])},
        {"valid/error_rate": errors, "valid/loss": losses},
        [0, 10],
        objective="valid/error_rate",
        resolution=0.02,
    )
    verdict = pbx.procedures.sweep_learning_rate(None, None, study, key=KEY)
    assert verdict.answer == (answer and pytest.approx(answer))
    assert ("best_at_end_of_sweep" in {f.code for f in verdict.findings}) == (answer is None)


def test_a_space_is_a_bound_and_what_lies_beyond_is_proposed():
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-5, 1e-3, scale="log")})
    recipe = pbx.tune(tiny.quadratic(), "sgd", space, **BUDGET)
    for study in recipe.studies.values():
        rate = study.points["learning_rate"]
        assert np.float32(1e-5) <= rate.min()
        assert rate.max() <= np.float32(1e-3)
    assert len(recipe.chapters[0].verdict.studies) == 1
    finding = codes(recipe)["best_at_end_of_sweep"]
    assert "Give learning_rate=pbx.Float(1e-05, 0.01, scale='log')" in finding.suggestion


def test_rounds_do_not_leave_a_space_either():
    space = pbx.SearchSpace(
        {"learning_rate": pbx.Float(0.01, 0.5, scale="log"), "momentum": pbx.Float(0.0, 0.3)}
    )
    recipe = pbx.tune(tiny.quadratic(), "momentum", space, **BUDGET)
    for study in recipe.studies.values():
        for name, line in space.items():
            values = study.points.get(name)
            assert values is None or (
                line.low <= values.min() and values.max() <= np.float32(line.high)
            )


@pytest.mark.parametrize(
    ("proposed", "expected"),
    [
        (pbx.Float(0.1, 3.0), pbx.Float(0.1, 1.0)),
        (pbx.Float(0.2, 0.5), pbx.Float(0.2, 0.5)),
        (pbx.Float(2.0, 3.0), pbx.Float(0.0, 1.0)),  # outside altogether
    ],
)
def test_a_range_within_another(proposed, expected):
    bound = pbx.SearchSpace({"x": pbx.Float(0.0, 1.0)})
    assert rates.within(pbx.SearchSpace({"x": proposed}), bound)["x"] == expected
    assert rates.within(pbx.SearchSpace({"x": proposed}), None)["x"] == proposed
    counts = pbx.SearchSpace({"n": pbx.Integer(3, 90)})
    assert rates.within(counts, pbx.SearchSpace({"n": pbx.Integer(1, 9)}))["n"] == pbx.Integer(3, 9)


# Several learning rates ---------------------------------------------------------------------------

TWO = pbx.SearchSpace(
    {"lr_head": pbx.Float(1e-2, 1.0, scale="log"), "lr_body": pbx.Float(1e-3, 0.1, scale="log")}
)


def two_rates(point):
    return optax.multi_transform(
        {"head": pbx.sgd(point["lr_head"]), "body": pbx.sgd(point["lr_body"])},
        {"w": "head", "v": "body"},
    )


def two_parts():
    """Curvature 1 for w and 10 for v: one wants ten times the other's rate."""
    return pbx.Workload(
        name="two_parts",
        init=lambda key: ({"w": jnp.full(2, 3.0), "v": jnp.full(2, 2.0)}, {}),
        loss=lambda p, s, b, k: (0.5 * (p["w"] ** 2).sum() + 5 * (p["v"] ** 2).sum(), (s, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum() + (p["v"] ** 2).sum()},
        objective="valid/loss",
    )


@pytest.fixture(scope="module")
def two():
    return pbx.tune(two_parts(), two_rates, TWO, learning_rates=("lr_head", "lr_body"), **BUDGET)


def test_named_rates_are_swept_together_and_decay(two):
    sweep = two.studies["learning_rate/sweep_0"]
    assert list(sweep.points) == ["learning_rate"]
    factor = sweep.points["learning_rate"]
    assert (factor.min(), factor.max()) == pytest.approx((0.1, 10.0), rel=1e-4)
    assert {c.name for c in two.chapters} >= {"learning_rate", "stability", "round_1", "retrain"}
    assert set(two.point) == {"lr_head", "lr_body"}
    assert "lr_head" in decision(two, "learning_rate").message
    assert two.value < 1e-3
    schedule = two.schedule()
    assert float(schedule(0)) == pytest.approx(1.0)
    assert float(schedule(two.num_steps)) == pytest.approx(0.0, abs=1e-6)


def test_the_recipe_of_named_rates_trains_as_it_was_tuned(two):
    work, optimizer = two_parts(), two.optimizer()
    params, _ = work.init(KEY)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: work.loss(p, {}, (), None)[0])(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=two.num_steps)
        return work.evaluate(carry[0], {}, None)["valid/loss"]

    # Deterministic and the same for all seeds, so the values are those of a run by hand.
    np.testing.assert_allclose(float(run(params)), two.values[0], rtol=1e-2, atol=1e-9)


def test_rates_that_are_not_named_are_asked_for():
    recipe = pbx.tune(two_parts(), two_rates, TWO, **{**BUDGET, "num_trials": 6, "num_steps": 8})
    finding = decision(recipe, "learning_rate")
    assert finding.severity == "warning"
    assert "learning_rates=('lr_head', 'lr_body')" in finding.suggestion
    assert "no sweep" in finding.message


@pytest.mark.parametrize(
    ("named", "space", "match"),
    [
        (("lr_haed",), TWO, "did you mean 'lr_head'"),
        ((), TWO, "at least one"),
        ("lr_head", TWO, "names of hyperparameters"),
        (("lr_head",), pbx.SearchSpace({**TWO, "learning_rate": pbx.Float(0.1, 1.0)}), "beside"),
        (("lr",), pbx.SearchSpace({"lr": pbx.Float(0.0, 1.0)}), "above 0"),
        (("lr",), pbx.SearchSpace({"lr": pbx.Integer(1, 2)}), "must be a pbx.Float"),
    ],
)
def test_bad_names_of_rates(named, space, match):
    with pytest.raises((ValueError, TypeError), match=match):
        pbx.tune(two_parts(), two_rates, space, learning_rates=named, **BUDGET)


def test_an_optimizer_by_name_has_one_rate():
    with pytest.raises(ValueError, match="optimizer of your own"):
        pbx.tune(tiny.quadratic(), "adam", learning_rates=("b1",), **BUDGET)
    with pytest.raises(ValueError, match="ranges in the space"):
        pbx.tune(
            two_parts(),
            two_rates,
            TWO,
            learning_rates=("lr_head", "lr_body"),
            overrides={"learning_rate_range": (0.1, 1.0)},
            **BUDGET,
        )


def test_names_that_look_like_rates():
    names = ["lr", "lr_head", "body_learning_rate", "b1", "alright", "decay_rate", "head_lr"]
    assert rates.look_like_rates(names) == ("lr", "lr_head", "body_learning_rate", "head_lr")


# Decisions and recipe agree -----------------------------------------------------------------------


def test_a_shorter_final_run_is_told(monkeypatch):
    answer = 17

    def refined(*args, **kwargs):
        return tune.Verdict(answer, (), {}, 0)

    monkeypatch.setattr(tune, "refine_num_steps", refined)
    recipe = pbx.tune(tiny.quadratic(), "sgd", **BUDGET)
    assert recipe.num_steps == answer
    assert "at most all 40 steps" in decision(recipe, "num_steps").message
    assert "the final run has 17 and not 40" in decision(recipe, "round_2").message
    told = [c for c in recipe.chapters if "17 and not 40" in c.decision.message]
    assert len(told) == 1


def test_a_perfect_fit_is_spoken_of_only_where_training_data_are_judged():
    plain = pbx.tune(tiny.quadratic(), "sgd", **{**BUDGET, "num_trials": 12, "num_steps": 16})
    assert "fits the training data" not in decision(plain, "num_steps").message
    assert not any(
        "training data perfectly" in f.message for f in plain.findings if isinstance(f, Finding)
    )


def test_what_validation_can_tell_stands_on_the_page_and_in_the_program():
    recipe = pbx.tune(
        steps_of_34(tiny.quadratic()), "sgd", **{**BUDGET, "num_trials": 12, "num_steps": 16}
    )
    sentence = "one example of 34 is 0.0294 of valid/error_rate"
    assert sentence in tuning.recipe_headline(recipe)[1]
    comments = [line[2:] for line in recipe.to_python().splitlines() if line.startswith("# ")]
    assert sentence in " ".join(comments)
    assert recipe.told_limit().startswith("Validation cannot separate")


def test_the_program_of_named_rates_gives_its_values(two, tmp_path, monkeypatch):
    """Run in this process: the workload and the optimizer are handed over in two lines."""
    source = two.to_python()
    assert "'lr_head': lambda count: " in source
    namespace = {"workload": two_parts(), "make_optimizer": two_rates, "__name__": "recipe"}
    exec(source, namespace)
    np.testing.assert_allclose(namespace["values"], two.values, rtol=1e-5)


def test_a_program_draws_what_an_evaluation_with_a_key_drew():
    plain = tiny.quadratic()

    def evaluate(params, state, data, key):
        noise = 0.01 * jax.random.normal(key)
        return {"valid/loss": plain.evaluate(params, state, data)["valid/loss"] + noise}

    noisy = dataclasses.replace(plain, evaluate=evaluate)
    recipe = pbx.tune(noisy, "sgd", **{**BUDGET, "num_trials": 12, "num_steps": 16})
    namespace = {"workload": noisy, "__name__": "recipe"}
    exec(recipe.to_python(), namespace)
    np.testing.assert_allclose(namespace["values"], recipe.values, rtol=1e-5)


def test_what_a_trainer_fixes_is_part_of_the_recipe(tmp_path):
    trainer = pbx.Trainer(
        tiny.quadratic(),
        lambda point: pbx.momentum(point["learning_rate"], point["momentum"]),
        fixed={"momentum": 0.3},
        progress=False,
    )
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-2, 1.0, scale="log")})
    recipe = pbx.tune(
        trainer, None, space, num_trials=12, num_steps=16, key=KEY, directory=tmp_path
    )
    assert recipe.point["momentum"] == 0.3
    state = recipe.optimizer().init({"w": jnp.zeros(2)})
    assert jax.tree.leaves(state)
    assert "'momentum': 0.3" in recipe.to_python()
    from playbook_optax.procedures import tuned

    assert tuned.read(tmp_path)[0].point == recipe.point
