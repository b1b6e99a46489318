"""How long to train: the first candidate with its refusals, and its refinement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.procedures import pick_num_steps, refine_num_steps
from playbook_optax.records.study import Study

KEY = jax.random.key(0)
CURVATURE = np.array([1.0, 0.2])
START = np.array([3.0, -2.0])
FITTED = 0.1


def threshold(**fields):
    """Gradient descent on a quadratic; a coordinate is an error until it is below 0.1."""
    made = pbx.Workload(
        name="threshold",
        init=lambda key: ({"w": jnp.asarray(START, jnp.float32)}, {}),
        loss=lambda params, state, batch, key: (
            0.5 * jnp.sum(batch * params["w"] ** 2),
            (state, {}),
        ),
        batch=lambda data, key, step: data,
        evaluate=lambda params, state, data: {
            "train/error_rate": jnp.mean((jnp.abs(params["w"]) >= FITTED).astype(jnp.float32)),
            "valid/loss": 0.5 * jnp.sum(data * params["w"] ** 2),
        },
        objective="valid/loss",
        data=np.asarray(CURVATURE, np.float32),
    )
    return dataclasses.replace(made, **fields)


def space(low, high):
    return pbx.SearchSpace({"learning_rate": pbx.Float(low, high, scale="log")})


def pick(space_or_study, workload=None, **arguments):
    return pick_num_steps(
        workload or threshold(),
        tiny.sgd,
        space_or_study,
        key=KEY,
        **{"num_steps": 64, "num_trials": 9, "eval_every": 1, "progress": False, **arguments},
    )


def steps_to_fit(rate, limit=65):
    """Float64: the first step at which both coordinates are below the threshold, -1 if never."""
    path = np.abs(START * (1 - rate * CURVATURE) ** np.arange(limit)[:, None])
    good = (path < FITTED).all(axis=1)
    return int(good.argmax()) if good.any() else -1


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def finding(verdict, code):
    (found,) = (f for f in verdict.findings if f.code == code)
    return found


@pytest.fixture(scope="module")
def picked():
    return pick(space(1e-2, 1e2))


def test_the_answer_is_the_closed_form_steps_of_the_fastest_trial(picked):
    study = picked.studies["sweep_64"]
    rates = study.points["learning_rate"].astype(np.float64)
    every = np.array([steps_to_fit(rate) for rate in rates])
    assert picked.answer == min(every[every > 0])
    assert isinstance(picked.answer, int)
    told = finding(picked, "num_steps_candidate")
    assert told.evidence["steps"] == every.tolist()
    assert rates[told.evidence["trial"]] == told.evidence["learning_rate"]
    assert "augmentation and regularization" in told.suggestion
    assert picked.cost == 9 * 64
    assert codes(picked) == ["num_steps_candidate"]


def test_a_study_is_judged_at_no_cost_and_its_own_length(picked):
    again = pick(picked.studies["sweep_64"])
    assert (again.answer, again.cost, again.findings) == (picked.answer, 0, picked.findings)
    assert list(again.studies) == ["given"]


def test_the_same_key_gives_the_same_verdict_and_so_does_a_trainer(picked):
    def follow(point):
        rate = point["learning_rate"]
        return pbx.sgd(rate(0) if callable(rate) else rate)

    # Whatever its schedule, the sweep is at constant rates.
    trainer = pbx.Trainer(
        threshold(), follow, lambda point, n: pbx.schedules.constant(0.0), progress=False
    )
    again = pick_num_steps(
        trainer, space(1e-2, 1e2), key=KEY, num_steps=64, num_trials=9, eval_every=1
    )
    assert again.studies["sweep_64"].data.identical(picked.studies["sweep_64"].data)
    assert again.findings == picked.findings


def test_sparse_evaluations_make_the_answer_late_and_say_so(picked):
    verdict = pick(space(1e-2, 1e2), eval_every=32)
    told = finding(verdict, "evaluations_too_sparse")
    assert verdict.answer == 32
    assert told.evidence["after"] < picked.answer <= verdict.answer
    # The default is fine enough only for answers beyond a fifth of the sweep.
    assert "Evaluate at least every 3 steps" in told.suggestion


def test_a_fastest_rate_at_an_end_is_a_refusal():
    for low, high, edge, wider in ((1e-2, 0.5, "largest", 5), (1.6, 160.0, "smallest", 0.16)):
        verdict = pick(space(low, high))
        assert verdict.answer is None
        told = finding(verdict, "best_at_end_of_sweep")
        assert edge in told.message
        assert f"{wider:.4g}" in told.suggestion


def sweep_of(steps, num_evals=11, rates=None, **metrics):
    """A synthetic sweep whose trials fit at the given evaluations, -1 for never."""
    error = np.ones((len(steps), num_evals))
    for row, at in zip(error, steps, strict=True):
        if at >= 0:
            row[at:] = 0.0
        row[1:at] = 0.5
    rates = np.geomspace(1e-3, 1.0, len(steps)) if rates is None else rates
    return Study.from_arrays(
        {"learning_rate": rates},
        {"train/error_rate": error, **metrics},
        10 * np.arange(num_evals),
        objective="train/error_rate",
        infeasible=np.zeros(len(steps), bool),
    )


def test_a_rate_at_an_end_that_is_as_fast_as_the_best_is_a_refusal():
    assert pick(sweep_of([-1, 7, 4, 5])).answer == 40
    assert pick(sweep_of([-1, 7, 4, 4])).answer is None
    assert pick(sweep_of([4, 4, 5, 6])).answer is None


def test_no_perfect_fit_is_a_refusal_and_doubling_finds_it():
    longer = pick(space(0.03, 3.0), num_steps=8, max_doublings=3)
    lengths = [int(name.removeprefix("sweep_")) for name in longer.studies]
    assert lengths == [8, 16]
    assert longer.cost == 9 * sum(lengths)
    short = pick(longer.studies["sweep_8"])
    assert short.answer is None
    assert "to 16 for example" in finding(short, "no_perfect_fit").suggestion
    rates = longer.studies[f"sweep_{lengths[-1]}"].points["learning_rate"].astype(np.float64)
    expected = min(n for n in map(steps_to_fit, rates) if n > 0)
    assert longer.answer == expected
    assert lengths[-2] < expected <= lengths[-1]


def test_rates_that_are_all_too_small_are_not_doubled():
    """The self-deception that the playbook warns of: a very large number of steps."""
    verdict = pick(space(1e-4, 1e-3), num_steps=4, max_doublings=5)
    assert verdict.answer is None
    assert list(verdict.studies) == ["sweep_4"]
    assert {"best_at_end_of_sweep", "no_perfect_fit"} <= set(codes(verdict))


def test_all_infeasible_and_no_finite_value():
    verdict = pick(space(100.0, 1e4), max_doublings=3)
    assert (verdict.answer, verdict.cost) == (None, 9 * 64)
    assert verdict.findings[0].code == "all_infeasible"
    study = Study.from_arrays(
        {"learning_rate": [0.1, 0.2, 0.3]},
        {"train/error_rate": np.full((3, 4), np.nan), "valid/loss": np.ones((3, 4))},
        [0, 1, 2, 3],
        objective="valid/loss",
    )
    verdict = pick(study)
    assert (verdict.answer, codes(verdict)) == (None, ["no_perfect_fit"])


def test_no_metric_in_which_a_fit_can_be_seen_costs_nothing():
    verdict = pick(space(1e-2, 1.0), tiny.quadratic())
    assert (verdict.answer, verdict.cost, verdict.studies) == (None, 0, {})
    told = finding(verdict, "no_perfect_fit_metric")
    assert "fit_value" in told.suggestion
    verdict = pick(space(1e-2, 1.0), tiny.quadratic(), fit_metric="valid/loss")
    assert codes(verdict) == ["no_perfect_fit_metric"]
    with pytest.raises(ValueError, match=r"fit_metric = 'valid/los' .* did you mean 'valid/loss'"):
        pick(space(1e-2, 1.0), tiny.quadratic(), fit_metric="valid/los")


def test_a_loss_with_a_value_given_and_an_accuracy():
    loss = np.tile(np.linspace(1, 0, 11), (4, 1)) ** np.array([1, 2, 4, 3])[:, None]
    study = sweep_of([-1] * 4, **{"train/loss": loss, "train/accuracy": 1 - loss})
    verdict = pick(study, fit_metric="train/loss", fit_value=0.05)
    assert verdict.answer == 10 * int((loss[2] <= 0.05).argmax())
    verdict = pick(study, fit_metric="train/accuracy", fit_value=0.95)
    assert verdict.answer == 10 * int((loss[2] <= 0.05).argmax())
    # All are perfect at the last evaluation, those at the ends as well.
    assert pick(study, fit_metric="train/accuracy").answer is None
    wrong = pick(study, fit_metric="train/accuracy", fit_value=0.0)
    assert (wrong.answer, codes(wrong)) == (None, ["fits_untrained"])


def test_all_seeds_must_fit():
    study = sweep_of([6, 4, 5])
    error = np.stack([study.data["train/error_rate"].values] * 2, axis=1)
    error[1, 1, :7] = 0.5
    twice = Study.from_arrays(
        {"learning_rate": study.points["learning_rate"]},
        {"train/error_rate": error},
        study.data["step"].values,
        objective="train/error_rate",
        infeasible=np.zeros((3, 2), bool),
    )
    # Of the middle rate the second seed fits at 70, later than the largest rate at 50.
    told = finding(pick(twice), "best_at_end_of_sweep")
    assert told.evidence["num_steps"] == 50


def test_regularization_that_can_be_seen_is_told():
    study = sweep_of([6, 4, 5])
    data = study.data.assign_coords(weight_decay=("trial", [0.0, 0.1, 0.0]))
    verdict = pick(dataclasses.replace(study, data=data))
    assert verdict.answer == 40
    assert finding(verdict, "regularization_on").evidence["hyperparameters"] == ["weight_decay"]

    def noisy(params, state, batch, key):
        keep = jax.random.bernoulli(key, 0.9, (2,))
        return 0.5 * jnp.sum(batch * keep * params["w"] ** 2), (state, {})

    verdict = pick(space(1e-2, 1e2), threshold(loss=noisy))
    assert "loss_is_random" in codes(verdict)
    assert verdict.answer is not None


def test_more_hyperparameters_and_bad_arguments():
    verdict = pick_num_steps(
        threshold(),
        lambda point: pbx.momentum(point["learning_rate"], point["momentum"]),
        space(1e-2, 1e2),
        key=KEY,
        num_steps=64,
        num_trials=9,
        eval_every=1,
        point={"momentum": 0.0},
    )
    assert verdict.answer == min(
        n for n in map(steps_to_fit, verdict.studies["sweep_64"].points["learning_rate"]) if n > 0
    )
    for arguments, message in (
        ({"num_trials": 2}, "num_trials must be >= 3"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"num_steps": 2**30, "max_doublings": 2}, "steps are int32"),
        ({"fit_value": float("nan")}, "fit_value must be finite"),
        ({"fit_metrics": "a"}, "did you mean 'fit_metric'"),
        ({"space_or_study": pbx.SearchSpace({"b1": pbx.Float(0.5, 0.9)})}, "the one dimension"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            pick(**{"space_or_study": space(1e-2, 1.0), **arguments})
    other = Study.from_arrays({"x": [1, 2]}, {"loss": np.ones((2, 3))}, [0, 1, 2], objective="loss")
    with pytest.raises(ValueError, match="no hyperparameter 'learning_rate'"):
        pick(other)


def test_a_workload_that_breaks_its_promise_says_so():
    for fields, message in (
        ({"loss": lambda p, s, b, k: jnp.sum(p["w"])}, r"loss must return \(loss,"),
        ({"evaluate": lambda p, s, d: jnp.sum(p["w"])}, "evaluate must return"),
    ):
        with pytest.raises(ValueError, match=message):
            pick(space(1e-2, 1.0), threshold(**fields))


def test_host_data_a_function_of_the_point_and_a_metric_of_the_loss():
    def loss(params, state, batch, key):
        error = jnp.mean((jnp.abs(params["w"]) >= FITTED).astype(jnp.float32))
        return 0.5 * jnp.sum(batch * params["w"] ** 2), (state, {"error_rate": error})

    verdict = pick(
        space(1e-2, 1e2), lambda point: threshold(loss=loss), fit_metric="step/error_rate"
    )
    study = verdict.studies["sweep_64"]
    # Recorded before each update, so that it is seen one step later.
    assert verdict.answer == 1 + min(
        n for n in map(steps_to_fit, study.points["learning_rate"]) if n > 0
    )
    fed = pick(space(1e-2, 1e2), tiny.host_fed(), fit_metric="valid/loss", fit_value=0.01)
    assert 0 < fed.answer < 64


def curves(curve, num_trials=4, **fields):
    values = np.asarray(curve)[None] + 0.01 * np.arange(num_trials)[:, None]
    step = np.linspace(0, 1000, values.shape[-1]).astype(int)
    return Study.from_arrays(
        {"learning_rate": np.geomspace(0.01, 0.1, num_trials)},
        {"valid/loss": values},
        step,
        objective="valid/loss",
        **fields,
    )


def refine(study, **arguments):
    return refine_num_steps(None, None, study, key=KEY, **arguments)


TIME = np.linspace(0, 1, 41)


def test_best_steps_in_the_first_tenth_ask_for_a_shorter_run():
    verdict = refine(curves(np.where(TIME < 0.06, 2.0, 1.0)))
    assert verdict.answer == 5 * 75
    assert verdict.findings[0].code == "saturated_early"
    assert finding(verdict, "best_steps").evidence["best_steps"] == [75] * 3


def test_a_shorter_run_is_never_longer_than_the_present_one():
    # Settled at step 100 of 1000, and never asked for more than 1000.
    assert refine(curves(np.where(TIME < 0.09, 2.0, 1.0))).answer == 500


def test_best_steps_in_the_last_quarter_ask_for_a_longer_run():
    verdict = refine(curves(2 - TIME))
    assert verdict.answer == 2000
    assert verdict.findings[0].code == "still_improving"
    assert "compute_bound" in codes(verdict)
    assert refine(curves(2 - TIME), growth=1.5).answer == 1500
    trainer = pbx.Trainer(threshold(), tiny.sgd)
    assert refine_num_steps(trainer, curves(2 - TIME), key=KEY).answer == 2000
    assert refine(curves(TIME), maximize=True).answer == 2000


def test_in_between_and_on_a_noisy_plateau_the_length_stays():
    verdict = refine(curves(np.where(TIME < 0.4, 2.0 - TIME, 1.0)))
    assert verdict.answer == 1000
    rng = np.random.default_rng(4)
    noisy = curves(np.where(TIME < 0.4, 2.0 - 2 * TIME, 1.0) + 0.02 * rng.normal(size=41))
    assert refine(noisy).answer == 1000
    late = np.where(TIME < 0.4, 2.0 - TIME, 1.0)
    late[39] = 0.999
    assert "gained no more than noise" in finding(refine(curves(late)), "best_steps").message


def test_what_cannot_be_judged_is_a_refusal():
    verdict = refine(curves((2 - TIME)[::10]))
    assert verdict.answer is None
    assert {"curve_check_skipped", "checkpoints_too_sparse"} <= set(codes(verdict))
    verdict = refine(curves(np.full(41, np.nan)))
    assert verdict.answer is None
    assert verdict.findings[0].code == "all_infeasible"
    coarse = refine(curves(np.where(np.arange(9) < 4, 2.0, 1.0)))
    assert coarse.answer == 1000
    assert "early_saturation_unseen" in codes(coarse)


def test_a_space_is_run_and_its_cost_counted():
    verdict = refine_num_steps(
        threshold(),
        tiny.sgd,
        space(0.01, 0.02),
        key=KEY,
        num_steps=40,
        num_trials=3,
        num_seeds=2,
    )
    assert verdict.cost == 3 * 2 * 40
    assert verdict.answer == 80  # At so small a rate it is improving all the time.
    assert verdict.studies["study"].num_seeds == 2
    with pytest.raises(ValueError, match="growth must be > 1"):
        refine(curves(2 - TIME), growth=1.0)


def test_schedules_of_the_trainer_and_a_shorter_study_are_read():
    cosine = 0.5 + 0.5 * np.cos(np.pi * TIME)
    floor = curves(0.2 + 0.3 * cosine + 2 * np.exp(-TIME / 0.02))
    trainer = pbx.Trainer(
        threshold(),
        tiny.sgd,
        make_schedule=lambda point, n: pbx.schedules.cosine_decay(point["learning_rate"], n),
    )
    verdict = refine_num_steps(trainer, floor, key=KEY)
    # It falls only because the rate does.
    assert (verdict.answer, "compute_bound_unknown" in codes(verdict)) == (1000, True)
    assert finding(verdict, "compute_bound_unknown").evidence["knows_rates"]
    progress = curves(0.2 + 0.3 * cosine + 0.3 * (TIME + 0.01) ** -0.3)
    assert refine_num_steps(trainer, progress, key=KEY).answer == 2000
    half = pbx.Study.from_arrays(
        floor.points,
        {"valid/loss": floor.data["valid/loss"].values + 0.1},
        floor.data["step"].values // 2,
        objective="valid/loss",
    )
    verdict = refine_num_steps(trainer, floor, key=KEY, shorter=half)
    assert (verdict.answer, "compute_bound" in codes(verdict)) == (2000, True)
