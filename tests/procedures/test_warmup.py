"""Warm-up: where it helps, where nothing does, and the playbook's rules for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.procedures.warmup import default_warmup_steps, tune_warmup

KEY = jax.random.key(0)


def softening():
    """Sharp only at first: the curvature of w is 1 + s^2, and s decays with curvature 1.

    At s = 10 gradient descent is stable up to about 2 / 101; once s has gone, up to 2. The slow
    weight z tells a large rate from a small one in the value at the end.
    """

    def value(p):
        return 0.5 * (p["w"] ** 2 * (1 + p["s"] ** 2) + p["s"] ** 2 + 0.01 * p["z"] ** 2)

    return pbx.Workload(
        name="softening",
        init=lambda key: ({"w": jnp.float32(1), "s": jnp.float32(10), "z": jnp.float32(10)}, {}),
        loss=lambda p, s, b, k: (value(p), (s, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {"train/loss": value(p)},
        objective="train/loss",
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def finding(verdict, code):
    (found,) = (f for f in verdict.findings if f.code == code)
    return found


def trial_steps(verdict):
    return sum(s.num_trials * s.num_seeds * s.spec["num_steps"] for s in verdict.studies.values())


def tune(workload, make_optimizer=tiny_workloads.sgd, **arguments):
    return tune_warmup(workload, make_optimizer, key=KEY, **arguments)


@pytest.fixture(scope="module")
def helped():
    return tune(softening(), num_steps=1000)


def test_the_shortest_stable_warmup_is_found_and_prepended(helped):
    answer = helped.answer
    assert answer.warmup_steps == 100
    assert answer.num_steps == 1100
    limit = answer.unstable_base_learning_rate
    assert 0.01 < limit < 0.1
    assert answer.base_learning_rate == pytest.approx(10 * limit, rel=1e-5)
    rows = finding(helped, "warmup_sweep").evidence["rows"]
    stable = {(row["factor"], row["warmup_steps"]): not row["unstable"] for row in rows}
    assert stable[10.0, 100]
    assert not stable[10.0, 10]
    assert {factor for factor, _ in stable} == {2.0, 5.0, 10.0}


def test_it_is_compared_with_the_baseline_by_best_checkpoint(helped):
    answer = helped.answer
    baseline, warm = helped.studies["baseline"], helped.studies["with_warmup_100"]
    assert baseline.spec["num_steps"] == 1000
    assert warm.spec["num_steps"] == 1100
    assert answer.best_value == warm.best().value < answer.baseline_value == baseline.best().value
    assert (baseline.points["warmup_steps"] == 0).all()
    assert baseline.points["warmup_steps"].dtype == np.int32
    rates = baseline.points["base_learning_rate"]
    assert rates.max() <= np.float32(answer.unstable_base_learning_rate) < 101 * rates.min()
    assert finding(helped, "warmup_helps").evidence["objective"] == "train/loss"


def test_the_answer_is_what_the_users_own_schedule_reproduces(helped):
    answer = helped.answer
    schedule = pbx.schedules.prepend_warmup(
        pbx.schedules.linear_decay(answer.base_learning_rate, 1000), answer.warmup_steps
    )
    study = pbx.run_study(
        softening(),
        lambda point: pbx.sgd(schedule),
        {"unused": np.zeros(1, np.float32)},
        num_steps=answer.num_steps,
        eval_every=50,
        key=KEY,
    )
    assert study.best().value == pytest.approx(answer.best_value, rel=1e-3)


def test_a_long_warmup_says_that_the_run_may_have_to_grow(helped):
    grow = finding(helped, "max_train_steps_may_need_to_grow")
    assert "10% of the 1000 steps" in grow.message
    assert grow.evidence["share"] == pytest.approx(0.1)
    short = tune(
        softening(),
        num_steps=2500,
        warmup_steps=[100],
        unstable_learning_rate=helped.answer.unstable_base_learning_rate,
        num_trials=2,
    )
    assert short.answer.warmup_steps == 100
    assert "max_train_steps_may_need_to_grow" not in codes(short)


def test_the_cost_is_what_was_run(helped):
    assert helped.cost == trial_steps(helped)


def test_a_run_repeats_exactly():
    arguments = {"num_steps": 60, "unstable_learning_rate": 0.01, "num_trials": 2}
    one, two = (
        tune(tiny_workloads.quadratic(), tiny_workloads.momentum, num_seeds=2, **arguments)
        for _ in range(2)
    )
    assert "with_warmup_6" in one.studies
    assert one.answer == two.answer
    assert one.findings == two.findings
    assert one.cost == two.cost == trial_steps(one)
    for name, study in one.studies.items():
        assert study.data.identical(two.studies[name].data)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_no_warmup_helps_a_quadratic(beta):
    verdict = tune(
        tiny_workloads.quadratic(),
        lambda point: pbx.momentum(point["learning_rate"], beta),
        num_steps=500,
        factors=(10.0, 100.0),
        search_steps=200,
    )
    assert verdict.answer is None
    no_help = finding(verdict, "no_warmup_helps")
    assert no_help.severity == "warning"
    assert no_help.evidence["shortest_stable"] == {}
    assert verdict.cost == trial_steps(verdict)
    assert not any(name.startswith(("baseline", "with")) for name in verdict.studies)


def test_a_warmup_that_helps_less_than_asked_for_is_reported():
    """At a hundred times its limit the softened problem is unstable too, at 2 and 5 times not."""
    verdict = tune(
        softening(),
        num_steps=1000,
        factors=(200.0,),
        unstable_learning_rate=0.0199,
    )
    assert verdict.answer is None
    less = finding(verdict, "warmup_helps_less")
    assert less.evidence["shortest_stable"]["5"] <= 100
    assert "factors=(5,)" in less.suggestion


def test_a_warmup_without_profit_is_no_answer():
    """Stable at ten times a rate that was called unstable, but both reach the same floor."""
    quadratic = tiny_workloads.quadratic((1.0,))
    floored = dataclasses.replace(
        quadratic,
        evaluate=lambda p, s, d: {
            "valid/loss": jnp.maximum(quadratic.evaluate(p, s, d)["valid/loss"], 1e-3)
        },
    )
    verdict = tune(
        floored,
        num_steps=300,
        unstable_learning_rate=0.15,
        num_trials=3,
    )
    assert verdict.answer is None
    assert finding(verdict, "warmup_no_better").severity == "warning"


def test_every_trial_is_judged_on_its_own_length_only():
    """The batches turn bad at step 100: a warm-up of 10 is over by then, one of 60 is not."""
    workload = pbx.Workload(
        name="late",
        init=lambda key: ({"w": jnp.ones(2)}, {}),
        loss=lambda p, s, size, k: (0.5 * size * (p["w"] ** 2).sum(), (s, {})),
        batch=lambda data, key, step: jnp.where(step >= 100, 1e4, 1.0),
        evaluate=lambda p, s, d: {"train/loss": 0.5 * (p["w"] ** 2).sum()},
        objective="train/loss",
    )
    verdict = tune(workload, num_steps=600, unstable_learning_rate=0.05, num_trials=2)
    rows = finding(verdict, "warmup_sweep").evidence["rows"]
    assert verdict.studies["warmup_sweep"].data["infeasible"].values.all()
    assert [row["unstable"] for row in rows] == [row["warmup_steps"] == 60 for row in rows]


def test_an_unknown_limit_is_a_refusal():
    verdict = tune(
        tiny_workloads.quadratic(), tiny_workloads.bounded_sgd, num_steps=50, num_trials=2
    )
    assert verdict.answer is None
    assert "none_unstable" in codes(verdict)
    assert verdict.cost == trial_steps(verdict)


def test_a_study_gives_the_limit_and_the_rate_of_the_baseline():
    rates = np.geomspace(0.5, 4.0, 25).astype(np.float32)
    points = {"learning_rate": rates, "scale": np.full(25, 0.04, np.float32)}

    def optimizer(point):
        rate = point["learning_rate"]
        scale = point["scale"]
        return pbx.sgd((lambda count: scale * rate(count)) if callable(rate) else scale * rate)

    study = pbx.run_study(softening(), optimizer, points, num_steps=500, eval_every=25, key=KEY)
    verdict = tune_warmup(softening(), optimizer, study, key=KEY, num_steps=1000)
    baseline = verdict.studies["baseline"]
    assert baseline.points["base_learning_rate"].tolist() == [study.best().point["learning_rate"]]
    assert baseline.points["scale"].tolist() == [np.float32(0.04)]
    assert verdict.answer.unstable_base_learning_rate in rates
    ran = [s for name, s in verdict.studies.items() if not name.endswith("given")]
    assert verdict.cost == sum(s.num_trials * s.spec["num_steps"] for s in ran)


def test_the_users_functions_see_their_own_names_only():
    seen = set()

    def workload(point):
        seen.add(("workload", *sorted(point)))
        return softening()

    def schedule(point, num_steps):
        seen.add(("schedule", *sorted(point)))
        return pbx.schedules.cosine_decay(point["learning_rate"], num_steps)

    def optimizer(point):
        seen.add(("optimizer", *sorted(point), callable(point["learning_rate"])))
        return pbx.momentum(**point)

    verdict = tune_warmup(
        workload,
        optimizer,
        key=KEY,
        num_steps=200,
        unstable_learning_rate=0.01,
        make_schedule=schedule,
        point={"momentum": 0.0},
        num_trials=2,
    )
    assert "warmup_sweep" in verdict.studies
    assert seen == {
        ("workload", "learning_rate", "momentum"),
        ("schedule", "learning_rate", "momentum"),
        ("optimizer", "learning_rate", "momentum", True),
    }


@pytest.mark.parametrize(
    ("num_steps", "lengths"),
    [
        (10_000, [10, 100, 1000]),
        (15_000, [10, 100, 1000, 1500]),
        (600, [10, 60]),
        (100, [10]),
        (50, [5]),
        (5, [1]),
    ],
)
def test_the_default_lengths_are_orders_of_magnitude_up_to_a_tenth(num_steps, lengths):
    assert default_warmup_steps(num_steps) == lengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": [10, 100]}, r"warmup_steps\[1\] = 100 is not shorter than the run"),
        ({"warmup_steps": [10, 200]}, r"warmup_steps\[1\] = 200 is not shorter than the run"),
        ({"warmup_steps": [0]}, r"warmup_steps\[0\] must be >= 1"),
        ({"warmup_steps": []}, "warmup_steps is empty"),
        ({"factors": (1.0,)}, r"factors\[0\] must be > 1"),
        ({"factors": ()}, "factors is empty"),
        ({"unstable_learning_rate": -1.0}, "unstable_learning_rate must be > 0"),
        ({"point": {"warmup_steps": 5}}, "warmup_steps"),
        ({"warm_up_steps": [5]}, "did you mean 'warmup_steps'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tune(tiny_workloads.quadratic(), num_steps=100, **arguments)
