"""Retraining with other seeds, and adopting a change only beyond their spread."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.analysis.spreads import Spread
from playbook_optax.procedures import adopt, retrain
from playbook_optax.procedures.adopt import retrain_key

KEY = jax.random.key(0)
SEVERAL = {"num_seeds": 4, "num_steps": 20, "eval_every": 10}


def start(seed):
    """Where `quadratic` begins with some seed of `retrain`."""
    key = jax.random.fold_in(pbx.trial_key(retrain_key(KEY), seed), 0)
    return np.asarray(tiny_workloads.quadratic().init(key)[0]["w"], np.float64)


def train(point, **arguments):
    return retrain(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        point,
        key=KEY,
        **{**SEVERAL, **arguments},
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_the_spread_of_a_quadratic_is_that_of_its_starts():
    verdict = train({"learning_rate": 0.1})
    spread = verdict.answer
    curvature = np.array([1.0, 0.1])
    exact = [
        0.5 * (curvature * (start(s) * (1 - 0.1 * curvature) ** 20) ** 2).sum() for s in range(4)
    ]
    np.testing.assert_allclose(spread.values, exact, rtol=1e-5)
    assert spread.best_step == 20
    assert spread.value == pytest.approx(spread.mean)
    assert verdict.cost == 4 * 20
    assert codes(verdict) == ["retrained_spread"]
    assert verdict.studies["retrained"].num_seeds == 4
    assert spread.point == {"learning_rate": np.float32(0.1)}


def test_the_seeds_are_none_of_the_studys_and_repeat():
    study = pbx.run_study(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        {"learning_rate": np.array([0.1, 0.05], np.float32)},
        num_steps=20,
        eval_every=10,
        key=KEY,
        num_seeds=2,
    )
    verdict = train(study, num_steps=None, eval_every=None)
    assert verdict.answer.num_steps == 20
    assert verdict.answer.num_evals == 3
    first = study.data["valid/loss"].values[:, :, 0].ravel()
    second = verdict.studies["retrained"].data["valid/loss"].values[..., 0].ravel()
    assert not np.isin(first, second).any()
    assert verdict.answer == train({"learning_rate": np.float32(0.1)}).answer
    best = study.best()
    assert verdict.answer.point == best.point


def test_a_lucky_best_and_its_ties_are_told():
    """A study of one point, many times over, in which the best is nothing but luck."""
    workload = tiny_workloads.quadratic()
    verdict = train({"learning_rate": 0.1})
    spread = verdict.answer
    values = np.r_[spread.mean - 5 * spread.std, np.full(3, spread.mean - 4 * spread.std), 99.0]
    study = pbx.Study.from_arrays(
        {"learning_rate": np.full(5, 0.1, np.float32)},
        {"valid/loss": np.stack([values + 1, values, values], axis=1)},
        [0, 10, 20],
        objective="valid/loss",
        infeasible=np.zeros(5, bool),
    )
    again = retrain(workload, tiny_workloads.sgd, study, key=KEY, num_seeds=4)
    assert again.answer == spread
    assert codes(again) == ["best_was_lucky", "retrained_spread", "best_is_a_tie"]
    assert again.findings[2].evidence["trials"] == [0, 1, 2, 3]
    longer = retrain(workload, tiny_workloads.sgd, study, key=KEY, num_seeds=4, num_steps=40)
    assert codes(longer) == ["retrained_spread"]


def test_a_point_that_breaks_is_a_refusal():
    verdict = train({"learning_rate": 1e9})
    assert verdict.answer is None
    assert codes(verdict) == ["retraining_infeasible"]
    assert verdict.findings[0].severity == "error"
    judged = adopt(None, None, verdict, train({"learning_rate": 0.1}))
    assert judged.answer is None
    assert codes(judged) == ["nothing_to_compare"]
    assert adopt(None, None, train({"learning_rate": 0.1}), verdict).answer is False


def test_runs_are_stored_and_read_again(tmp_path):
    one = train({"learning_rate": 0.1}, directory=tmp_path, keep="best")
    two = train({"learning_rate": 0.1}, directory=tmp_path, keep="best")
    assert one.answer == two.answer
    stored = pbx.load_study(tmp_path)
    assert stored.data.identical(one.studies["retrained"].data)
    assert stored.params(0, seed=3)["w"].shape == (2,)


def test_points_are_retrained_with_the_same_seeds_and_compared(tmp_path):
    old, new = {"learning_rate": 0.01}, {"learning_rate": 0.5}
    verdict = adopt(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        old,
        new,
        key=KEY,
        directory=tmp_path,
        **SEVERAL,
    )
    assert verdict.answer is True
    assert verdict.cost == 2 * 4 * 20
    assert list(verdict.studies) == ["baseline", "candidate"]
    begun = [s.data["valid/loss"].values[..., 0] for s in verdict.studies.values()]
    np.testing.assert_array_equal(*begun)
    assert pbx.load_study(tmp_path / "candidate").num_trials == 1
    trainer = pbx.Trainer(tiny_workloads.quadratic(), tiny_workloads.sgd)
    spreads = tuple(retrain(trainer, p, key=KEY, **SEVERAL).answer for p in (old, new))
    assert adopt(trainer, old, new, key=KEY, **SEVERAL).findings == verdict.findings
    again = adopt(None, None, *spreads)
    assert (again.answer, again.cost, again.studies) == (True, 0, {})
    assert again.findings == verdict.findings
    assert adopt(None, None, *reversed(spreads)).answer is False
    assert adopt(None, None, *verdict.studies.values()).answer is True


def spread(values, **changes):
    values = np.asarray(values, np.float64)
    seen = values[~np.isnan(values)]
    made = Spread(
        seen.mean(), tuple(values), seen.mean(), seen.std(ddof=1), 0.0, 0.0, 10, {}, "loss", False,
        100, 11,
    )  # fmt: skip
    return made._replace(**changes)


NOISE = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("old", "new", "arguments", "answer", "code"),
    [
        (9 + NOISE, 5 + NOISE, {}, True, "adopt_candidate"),
        (9 + NOISE, 9 + NOISE, {}, False, "candidate_not_better"),
        (9 + NOISE, 9.5 + NOISE, {}, False, "candidate_not_better"),
        (9 + NOISE, 8.7 + NOISE, {}, False, "gain_within_trial_variance"),
        (9 + np.tile(NOISE, 8), 8.4 + np.tile(NOISE, 8), {}, False, "gain_too_small"),
        (
            9 + np.tile(NOISE, 8),
            8.4 + np.tile(NOISE, 8),
            {"min_gain": 0.0},
            True,
            "adopt_candidate",
        ),
        (9 + NOISE, 5 + NOISE, {"min_gain": 6}, False, "gain_too_small"),
        ([9.0, 9.1], [1.0, 1.1], {}, None, "too_few_seeds"),
        ([9.0, 9.1], [1.0, 1.1], {"level": 0.2}, True, "adopt_candidate"),
        (9 + NOISE, [1, 1, 1, 1, math.nan], {}, False, "candidate_less_stable"),
        ([9, math.nan, math.nan, 9, 8], 5 + NOISE, {}, True, "adopt_candidate"),
    ],
)
def test_decisions(old, new, arguments, answer, code):
    verdict = adopt(None, None, spread(old), spread(new), **arguments)
    assert codes(verdict) == [code]
    assert verdict.answer is answer
    rising = [spread(-np.asarray(v), maximize=True) for v in (old, new)]
    assert adopt(None, None, *rising, **arguments).answer is answer


def test_a_longer_candidate_is_said():
    verdict = adopt(None, None, spread(9 + NOISE), spread(5 + NOISE, num_steps=200))
    assert codes(verdict) == ["compared_at_different_lengths", "adopt_candidate"]


def test_what_does_nothing_is_seldom_adopted_and_what_helps_often():
    rng = np.random.default_rng(0)
    adopted = {0.0: 0, 3.0: 0}
    for gain in adopted:
        for _ in range(200):
            old, new = rng.normal(size=(2, 5))
            adopted[gain] += adopt(None, None, spread(old), spread(new - gain)).answer is True
    assert adopted[0.0] <= 17  # 10 are allowed at the level of 5%
    assert adopted[3.0] >= 190


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train({"learning_rate": 0.1}, num_seeds=1), "num_seeds must be >= 2.*no spread"),
        (lambda: train({"learning_rate": 0.1}, num_steps=None), "num_steps must be given"),
        (lambda: train({}), "pbx.Study or a point"),
        (lambda: train({"learning_rate": "big"}), "point\\['learning_rate'\\] must be a number"),
        (lambda: train({"learning_rate": 0.1}, num_seed=3), "did you mean 'num_seeds'"),
        (lambda: adopt(None, None, {"x": 1.0}, {"x": 2.0}), "baseline has to be retrained"),
        (
            lambda: adopt(None, None, spread(NOISE), spread(NOISE), level=1.0),
            "level must be > 0 and < 1",
        ),
        (
            lambda: adopt(None, None, pbx.procedures.Verdict(3, (), {}, 0), spread(NOISE)),
            "baseline is a verdict whose answer is no Spread",
        ),
        (lambda: adopt(None, None, spread(NOISE), spread(NOISE), min_gain=-1), "min_gain"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_integers_stay_integers():
    def optimizer(point):
        assert jnp.issubdtype(point["steps"].dtype, jnp.integer)
        return pbx.sgd(point["learning_rate"])

    verdict = retrain(
        tiny_workloads.quadratic(),
        optimizer,
        {"learning_rate": 0.1, "steps": 3},
        key=KEY,
        **{**SEVERAL, "num_seeds": 2},
    )
    assert verdict.answer.point["steps"].dtype == np.int32
