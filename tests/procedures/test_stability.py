"""The chapter as one procedure, its page, and its command line's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import chapters, cli

from .test_clipping import outliers

KEY = jax.random.key(0)
SPACE = pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 30.0, scale="log")})
ALL_STEPS = ["sweep", "limit", "probe", "warmup", "clipping", "remedies"]


def run(workload, space=SPACE, **arguments):
    return pbx.procedures.stabilize(
        workload,
        tiny.sgd,
        space,
        key=KEY,
        **{"num_trials": 7, "num_steps": 40, "optimizers": {}, "progress": False, **arguments},
    )


@pytest.fixture(scope="module")
def quadratic():
    return run(tiny.quadratic((1.0, 1.0)))


def test_on_a_quadratic_nothing_helps(quadratic):
    answer = quadratic.answer
    assert list(answer.steps) == ALL_STEPS
    assert answer.recommended is None
    assert answer.steps["limit"].answer == pytest.approx(2.0, rel=0.1)
    assert answer.steps["warmup"].answer is None
    assert (answer.warmup_steps, answer.max_norm) == (0, None)
    assert answer.best_value == answer.baseline_value
    codes = {finding.code for finding in quadratic.findings}
    assert {"no_warmup_helps", "no_remedy_helps"} <= codes


def test_the_cost_is_that_of_every_study_that_was_run(quadratic):
    run_here = {n: s for n, s in quadratic.studies.items() if not n.endswith("/given")}
    assert len(run_here) < len(quadratic.studies)  # The sweep is handed on.
    assert quadratic.cost == sum(
        study.num_trials * study.num_seeds * int(study.spec["num_steps"])
        for study in run_here.values()
    )


def test_rare_huge_gradients_are_clipped_and_the_recipe_is_the_remedy():
    workload = outliers()
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")})
    verdict = run(workload, space, num_trials=8, num_steps=120, eval_every=6)
    answer = verdict.answer
    assert answer.recommended == "clipping"
    assert answer.best_value < answer.baseline_value
    made = {}
    exec(cli.stabilized_source(answer, "sgd"), made)
    train = pbx.make_train(workload, lambda point: made["optimizer"], 120, 6)
    result = train({}, pbx.trial_key(KEY), workload.data)
    # Six digits of the threshold and of the learning rate are printed.
    np.testing.assert_allclose(result.best_value, answer.best_value, rtol=1e-3)


def test_a_stable_workload_ends_after_the_search():
    """A constant loss, whose gradient is zero, never explodes."""
    workload = pbx.Workload(
        name="bounded",
        init=lambda key: ({"w": jnp.ones(2)}, {}),
        loss=lambda p, s, b, k: (jnp.sum(0 * p["w"]) + 1.0, (s, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {"train/loss": jnp.float32(1.0) + 0 * jnp.sum(p["w"])},
        objective="train/loss",
    )
    verdict = run(workload, num_trials=3)
    assert list(verdict.answer.steps) == ["sweep", "limit"]
    assert verdict.answer.recommended is None
    assert "nothing_to_stabilize" in {finding.code for finding in verdict.findings}


def test_all_infeasible_is_a_refusal():  # fault 43
    verdict = run(
        tiny.quadratic((1.0, 1.0)),
        pbx.SearchSpace({"learning_rate": pbx.Float(100.0, 1000.0, scale="log")}),
        num_trials=3,
    )
    assert verdict.answer is None
    assert verdict.findings[0].code == "all_infeasible"
    headline, cost = chapters.stability_headline(verdict)
    assert "lower the range" in headline
    assert f"{verdict.cost:,}" in cost


def test_the_page_tells_each_step(quadratic, tmp_path):
    path = chapters.write_stability_report(quadratic, tmp_path, "a <b>", "x = 1")
    text = path.read_text("utf-8")
    for heading in (
        "Learning rate sweep",
        "Unstable learning rate",
        "Early instability",
        "Learning rate warm-up",
        "Gradient clipping",
        "Remedies compared",
    ):
        assert heading in text
    assert "a &lt;b&gt;" in text
    assert "<script" not in text
    assert text.count("<img") == len(list(tmp_path.glob("*.png"))) >= 4
    assert "lower_learning_rate" in text
