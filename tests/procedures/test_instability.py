"""The limit of stable learning rates against closed forms, and the refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.analysis.instability import instability_info
from playbook_optax.procedures.instability import (
    find_unstable_learning_rate,
    probe_early_instability,
)

KEY = jax.random.key(0)
SPACE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-2, 1e2, scale="log")})


def momentum(point):
    return pbx.momentum(point["learning_rate"], point["beta"])


def nesterov(point):
    return pbx.nesterov(point["learning_rate"], point["beta"])


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def trial_steps(verdict, given=()):
    studies = [study for name, study in verdict.studies.items() if name not in given]
    return sum(s.num_trials * s.num_seeds * s.spec["num_steps"] for s in studies)


def check_limit(verdict, limit, ratio=1.1):
    assert 1 / ratio <= verdict.answer / limit <= ratio
    (found,) = (f for f in verdict.findings if f.code == "unstable_learning_rate")
    below = found.evidence["largest_stable_learning_rate"]
    assert below < verdict.answer <= below * ratio
    assert verdict.cost == trial_steps(verdict)


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 1e3])
def test_gradient_descent_breaks_at_two_over_the_curvature(curvature):
    workload = tiny_workloads.quadratic((curvature, 0.1 * curvature))
    verdict = find_unstable_learning_rate(workload, tiny_workloads.sgd, key=KEY, num_steps=200)
    check_limit(verdict, 2 / curvature)


@pytest.mark.parametrize(("curvature", "beta"), [(1e-3, 0.9), (1.0, 0.5), (1e3, 0.9)])
def test_momentum_breaks_at_its_closed_form(curvature, beta):
    workload = tiny_workloads.quadratic((curvature, 0.1 * curvature))
    verdict = find_unstable_learning_rate(
        workload, momentum, key=KEY, num_steps=200, point={"beta": beta}
    )
    check_limit(verdict, 2 * (1 + beta) / curvature)


def test_nesterov_breaks_at_its_closed_form():
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic((1.0, 0.1)), nesterov, key=KEY, num_steps=200, point={"beta": 0.9}
    )
    check_limit(verdict, 2 * (1 + 0.9) / (1 + 2 * 0.9))


def test_a_finer_ratio_is_reached():
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), tiny_workloads.sgd, key=KEY, num_steps=1000, ratio=1.01
    )
    check_limit(verdict, 2.0, ratio=1.01)


def test_the_range_is_widened_in_both_directions():
    for low, high in ((1e-3, 1e-2), (1e3, 1e4)):
        space = pbx.SearchSpace({"learning_rate": pbx.Float(low, high, scale="log")})
        verdict = find_unstable_learning_rate(
            tiny_workloads.quadratic(), tiny_workloads.sgd, space, key=KEY, num_steps=200
        )
        check_limit(verdict, 2.0)


def test_a_run_repeats_exactly():
    one, two = (
        find_unstable_learning_rate(
            tiny_workloads.mlp(), tiny_workloads.momentum, SPACE, key=KEY, num_steps=60, num_seeds=2
        )
        for _ in range(2)
    )
    assert one.answer == two.answer
    assert one.findings == two.findings
    assert one.cost == two.cost == trial_steps(one)
    for name, study in one.studies.items():
        assert study.data.identical(two.studies[name].data)


def noisy_least_squares(num_examples=512, batch_size=64, dim=8):
    """Inputs with unit covariance, so that the curvature is 1, and a noise floor of one half."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_examples, dim)).astype(np.float32)
    y = x @ np.ones(dim, np.float32) + rng.normal(size=num_examples).astype(np.float32)

    def value(w, x, y):
        return 0.5 * jnp.mean((x @ w - y) ** 2)

    def batch(data, key, step):
        chosen = jax.random.choice(jax.random.fold_in(key, step), num_examples, (batch_size,))
        return data["x"][chosen], data["y"][chosen]

    return pbx.Workload(
        name="noisy_least_squares",
        init=lambda key: ({"w": jnp.zeros(dim)}, {}),
        loss=lambda params, state, b, key: (value(params["w"], *b), (state, {})),
        batch=batch,
        evaluate=lambda params, state, data: {
            "train/loss": value(params["w"], data["x"], data["y"])
        },
        objective="train/loss",
        data={"x": x, "y": y},
    )


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("with_evaluation", [True, False])
def test_slow_and_noisy_trials_are_stable(with_evaluation, batch_size):
    """200 trials, each with batches of its own, from standstill to the noisiest stable rate."""
    workload = noisy_least_squares(batch_size=batch_size)
    if not with_evaluation:  # Only the losses of batches tell, the noisier case.
        value = workload.evaluate
        workload = dataclasses.replace(
            workload,
            evaluate=lambda p, s, d: {"valid/loss": value(p, s, d)["train/loss"]},
            objective="valid/loss",
        )
    rates = np.geomspace(1e-7, 0.3, 200).astype(np.float32)
    study = pbx.run_study(
        workload,
        tiny_workloads.sgd,
        {"learning_rate": rates},
        num_steps=200,
        eval_every=10,
        key=KEY,
        independent=True,
    )
    assert not instability_info(study).unstable.any()
    # A given study is the first bracket, and costs nothing.
    verdict = find_unstable_learning_rate(
        workload, tiny_workloads.sgd, study, key=KEY, num_steps=200, eval_every=10
    )
    assert 0.3 < verdict.answer < 2.2
    assert verdict.cost == trial_steps(verdict, given=["given"])


def test_a_study_that_brackets_the_limit_costs_nothing():
    rates = np.geomspace(1.0, 4.0, 16).astype(np.float32)
    study = pbx.run_study(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        {"learning_rate": rates},
        num_steps=200,
        eval_every=10,
        key=KEY,
    )
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), tiny_workloads.sgd, study, key=KEY, num_steps=200
    )
    assert verdict.cost == 0
    assert list(verdict.studies) == ["given"]
    assert verdict.answer == rates[rates > 2.0].min()


def test_a_study_of_two_hyperparameters_counts_where_the_other_is_the_best_ones():
    points = {
        "learning_rate": np.array([0.3, 1e-4, 3.0, 5.0], np.float32),
        "beta": np.array([0.5, 0.9, 0.9, 0.5], np.float32),
    }
    study = pbx.run_study(
        tiny_workloads.quadratic(), momentum, points, num_steps=100, eval_every=5, key=KEY
    )
    assert study.best().point["beta"] == 0.5
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), momentum, study, key=KEY, num_steps=200
    )
    tried = verdict.findings[0].evidence["learning_rates"]
    assert min(tried) == np.float32(0.3)
    assert 1 / 1.1 <= verdict.answer / 3.0 <= 1.1


def test_none_unstable_is_a_refusal():
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), tiny_workloads.bounded_sgd, key=KEY, num_steps=20, num_trials=4
    )
    assert verdict.answer is None
    assert codes(verdict) == ["none_unstable"]
    assert verdict.cost == trial_steps(verdict)
    assert verdict.findings[0].evidence["high"] > 1e36


def test_all_unstable_is_a_refusal():
    quadratic = tiny_workloads.quadratic()
    broken = dataclasses.replace(
        quadratic, loss=lambda p, s, b, k: (jnp.nan * jnp.sum(p["w"]), (s, {}))
    )
    verdict = find_unstable_learning_rate(
        broken, tiny_workloads.sgd, key=KEY, num_steps=20, num_trials=4
    )
    assert verdict.answer is None
    assert codes(verdict) == ["all_unstable"]
    assert verdict.findings[0].evidence["low"] < 1e-36


def test_giving_up_is_a_refusal_with_the_bracket():
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), tiny_workloads.sgd, key=KEY, num_steps=200, max_rounds=1
    )
    assert verdict.answer is None
    (finding,) = verdict.findings
    assert finding.code == "bracket_too_wide"
    evidence = finding.evidence
    assert evidence["largest_stable_learning_rate"] < 2.0 < evidence["unstable_learning_rate"]


def test_an_unstable_island_is_the_cautious_answer():
    def island(point):
        rate = point["learning_rate"]
        return pbx.sgd(jnp.where((rate > 1e-3) & (rate < 3e-2), 100.0, rate))

    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), island, key=KEY, num_steps=200
    )
    assert 1.0 <= verdict.answer / 1e-3 <= 1.1
    assert codes(verdict) == ["stability_not_monotone", "unstable_learning_rate"]
    assert 0.03 < verdict.findings[0].evidence["largest_stable"] < 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio must be >= 1.001"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"num_trials": 0}, "num_trials must be >= 1"),
        ({"point": {"learning_rate": 0.1}}, "learning_rate"),
        ({"space_or_study": pbx.SearchSpace({"lr": pbx.Float(0.1, 1.0)})}, "learning_rate"),
        ({"trials": 3}, "did you mean 'num_trials'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        find_unstable_learning_rate(
            tiny_workloads.quadratic(), tiny_workloads.sgd, key=KEY, **arguments
        )


@pytest.mark.parametrize(("learning_rate", "unstable"), [(0.5, False), (1.2, True)])
def test_probe_sees_what_twice_the_best_rate_does(learning_rate, unstable):
    verdict = probe_early_instability(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        key=KEY,
        learning_rate=learning_rate,
        num_steps=50,
    )
    assert verdict.answer is unstable
    assert codes(verdict) == ["early_instability" if unstable else "no_early_instability"]
    assert verdict.cost == trial_steps(verdict) == 100
    study = verdict.studies["probe"]
    assert study.data["step"].values.tolist() == list(range(51))
    np.testing.assert_allclose(
        study.points["learning_rate"], [learning_rate, 2 * learning_rate], rtol=1e-6
    )


def catapult():
    """Two weights whose product is fitted: above its limit the loss rises, then settles.

    The curvature is the sum of the squares; the excursion shrinks it until the rate is stable.
    """

    def value(params):
        return 0.5 * (params["u"] * params["v"]) ** 2

    return pbx.Workload(
        name="catapult",
        init=lambda key: ({"u": jnp.float32(10.0), "v": jnp.float32(0.1)}, {}),
        loss=lambda p, s, b, k: (value(p), (s, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {"train/loss": value(p)},
        objective="train/loss",
    )


def test_probe_sees_an_early_rise_that_recovers():
    """The limit is 2 / (u^2 + v^2), about 0.02; up to twice that the loss comes back."""
    verdict = probe_early_instability(
        catapult(), tiny_workloads.sgd, key=KEY, learning_rate=0.015, num_steps=100
    )
    assert verdict.answer is True
    row = verdict.findings[0].evidence["at_probed_learning_rate"]
    assert row["kind"] == "early"
    assert 0 < row["recovered_step"] < 100
    assert not verdict.studies["probe"].data["infeasible"].values[0]


def test_probe_finds_the_best_rate_by_a_sweep_or_reads_it_from_a_study():
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-5, 1e1, scale="log")})
    swept = probe_early_instability(
        tiny_workloads.mlp(), tiny_workloads.momentum, space, key=KEY, num_steps=40, num_trials=8
    )
    assert swept.cost == trial_steps(swept) == 8 * 40 + 2 * 40
    study = swept.studies["learning_rate_sweep"]
    read = probe_early_instability(
        tiny_workloads.mlp(), tiny_workloads.momentum, study, key=KEY, num_steps=40
    )
    assert read.answer == swept.answer
    assert read.findings == swept.findings
    assert read.cost == 80


def test_probe_tells_of_a_best_rate_that_is_unstable_itself():
    verdict = probe_early_instability(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        key=KEY,
        learning_rate=2.5,
        num_steps=50,
    )
    assert verdict.answer is True
    assert codes(verdict) == ["early_instability", "unstable_at_best_learning_rate"]


def test_probe_refuses_without_a_best_rate():
    space = pbx.SearchSpace({"learning_rate": pbx.Float(10.0, 1e3, scale="log")})
    verdict = probe_early_instability(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        space,
        key=KEY,
        num_steps=50,
        num_trials=4,
    )
    assert verdict.answer is None
    assert "all_infeasible" in codes(verdict)
    assert verdict.cost == 200


def test_probe_checks_its_arguments():
    for arguments in ({"factor": 1.0}, {"learning_rate": -1.0}, {"num_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            probe_early_instability(
                tiny_workloads.quadratic(),
                tiny_workloads.sgd,
                key=KEY,
                **{"learning_rate": 0.1, **arguments},
            )


def test_the_answer_is_a_plain_float():
    verdict = find_unstable_learning_rate(
        tiny_workloads.quadratic(), tiny_workloads.sgd, SPACE, key=KEY, num_steps=200
    )
    assert type(verdict.answer) is float
    assert math.isfinite(verdict.answer)
