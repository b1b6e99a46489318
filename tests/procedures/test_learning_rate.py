"""The sweep: its answer, its refusals and its cost."""

import jax
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.procedures import sweep_learning_rate

KEY = jax.random.key(0)


def space(low, high):
    return pbx.SearchSpace({"learning_rate": pbx.Float(low, high, scale="log")})


def sweep(space_or_study, **arguments):
    return sweep_learning_rate(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        space_or_study,
        key=KEY,
        **{"num_trials": 9, "num_steps": 20, **arguments},
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_the_best_rate_of_a_quadratic_is_the_grid_point_with_the_smallest_loss():
    verdict = sweep(space(1e-2, 1e2))
    study = verdict.studies["learning_rate_sweep"]
    rates = study.points["learning_rate"]
    np.testing.assert_allclose(rates, np.geomspace(1e-2, 1e2, 9), rtol=1e-5)
    w = np.asarray(
        tiny_workloads.quadratic().init(jax.random.fold_in(pbx.trial_key(KEY), 0))[0]["w"]
    )
    curvature = np.array([1.0, 0.1])
    with np.errstate(over="ignore"):
        steps = np.arange(21)[:, None, None]
        path = w * (1 - rates[:, None] * curvature) ** steps
        loss = 0.5 * (curvature * path**2).sum(-1)
    assert verdict.answer == rates[np.argmin(np.where(rates < 2.0, loss.min(0), np.inf))]
    assert verdict.cost == 9 * 20
    np.testing.assert_array_equal(study.data["infeasible"].values, rates > 2.0)


def test_a_best_rate_at_an_end_is_a_refusal():
    for low, high, edge, wider in ((1e-4, 1e-2, "largest", 0.1), (1.1, 100.0, "smallest", 0.11)):
        verdict = sweep(space(low, high))
        assert verdict.answer is None
        (finding,) = (f for f in verdict.findings if f.code == "best_at_end_of_sweep")
        assert edge in finding.message
        assert f"{wider:.4g}" in finding.suggestion


def test_all_infeasible_is_a_refusal():
    verdict = sweep(space(10.0, 1e3))
    assert verdict.answer is None
    assert "all_infeasible" in codes(verdict)
    assert verdict.cost == 180


def test_a_study_is_judged_at_no_cost():
    first = sweep(space(1e-2, 1e2))
    again = sweep(first.studies["learning_rate_sweep"])
    assert again.answer == first.answer
    assert again.findings == first.findings
    assert again.cost == 0


def test_who_only_judges_needs_no_workload():
    finished = sweep(space(1e-2, 1e2)).studies["learning_rate_sweep"]
    judged = pbx.procedures.sweep_learning_rate(None, None, finished, key=None)
    assert (judged.answer, judged.cost) == (sweep(finished).answer, 0)
    with pytest.raises(ValueError, match="workload is None"):
        pbx.procedures.sweep_learning_rate(None, None, key=jax.random.key(0))


def test_a_sweep_repeats_exactly_and_counts_its_seeds():
    one, two = (sweep(space(1e-2, 1e2), num_seeds=2) for _ in range(2))
    assert one.cost == 2 * 9 * 20
    assert one.answer == two.answer
    names = "learning_rate_sweep"
    assert one.studies[names].data.identical(two.studies[names].data)


def test_a_schedule_reaches_the_optimizer():
    decayed = sweep(
        space(1e-2, 1e2),
        make_schedule=lambda point, num_steps: pbx.schedules.linear_decay(
            point["learning_rate"], num_steps
        ),
    )
    constant = sweep(space(1e-2, 1e2))
    study, other = (v.studies["learning_rate_sweep"] for v in (decayed, constant))
    assert study.best().value != other.best().value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trials": 1}, "num_trials must be >= 2"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"num_seed": 2}, "did you mean 'num_seeds'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(space(1e-2, 1e2), **arguments)


def test_a_space_of_something_else():
    with pytest.raises(ValueError, match="one dimension 'learning_rate'"):
        sweep(pbx.SearchSpace({"b1": pbx.Float(0.5, 0.9)}))
