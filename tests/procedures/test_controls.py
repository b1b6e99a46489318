"""Warm-up, clipping and decay as numbers: what they do, and that one program serves them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import schedules
from playbook_optax.procedures import controls
from playbook_optax.runner import programs
from playbook_optax.runner.run import StudyRunner

KEY = jax.random.key(0)
POINTS = {"learning_rate": np.float32([0.1, 0.4])}


def linear(point, num_steps):
    return schedules.linear_decay(point["learning_rate"], num_steps)


def needs_number(point, num_steps):
    return optax.linear_schedule(point["learning_rate"], 0.0, int(num_steps))


def train(trainer, num_steps=12, points=POINTS, names=None):
    runner = StudyRunner(trainer, points, num_steps=num_steps, eval_every=4, key=KEY, names=names)
    return runner.run(points).data["valid/loss"].values


def plain(make_schedule=None, make_optimizer=tiny.sgd, num_steps=12):
    trainer = pbx.Trainer(tiny.noisy_quadratic(), make_optimizer, make_schedule, progress=False)
    return train(trainer, num_steps)


def controlled(make_schedule=None, **arguments):
    trainer = pbx.Trainer(tiny.noisy_quadratic(), tiny.sgd, make_schedule, progress=False)
    return controls.controlled(trainer, **arguments)


def test_without_controls_training_is_the_users_own():
    trainer = controlled()
    np.testing.assert_allclose(train(trainer), plain(), rtol=1e-6)
    assert controls.controlled(trainer) is trainer
    scheduled = controlled(linear)
    np.testing.assert_allclose(train(scheduled), plain(linear), rtol=1e-6)
    constant = scheduled.with_fixed(controls.CONSTANT)
    np.testing.assert_allclose(train(constant), plain(), rtol=1e-6)


@pytest.mark.parametrize("make_schedule", [linear, needs_number])
def test_a_warm_up_comes_out_of_the_steps(make_schedule):
    trainer = controlled(make_schedule, lengths=(0, 3))

    def warmed(point, num_steps):
        return schedules.prepend_warmup(linear(point, num_steps - 3), 3)

    warm = trainer.with_fixed(controls.warmed_and_clipped(3, None))
    np.testing.assert_allclose(train(warm), plain(warmed), rtol=1e-5)
    np.testing.assert_allclose(train(trainer), plain(linear), rtol=1e-5)


def test_a_threshold_clips_and_one_that_no_norm_reaches_does_not():
    def clipped(point):
        return optax.chain(pbx.clip_by_global_norm(0.5), tiny.sgd(point))

    trainer = controlled().with_fixed(controls.warmed_and_clipped(0, 0.5))
    np.testing.assert_allclose(train(trainer), plain(make_optimizer=clipped), rtol=1e-6)
    assert not np.allclose(train(trainer), plain())


def test_a_longer_run_extends_the_schedule_by_the_playbooks_rule():
    trainer = controlled(linear).with_fixed({controls.EXTENDED_FROM: np.int32(8)})

    def extended(point, num_steps):
        return schedules.extend_for_longer_run(linear(point, 8), num_steps - 8)

    np.testing.assert_allclose(train(trainer), plain(extended), rtol=1e-6)
    np.testing.assert_allclose(train(trainer, 8), plain(linear, num_steps=8), rtol=1e-6)
    assert controls.extends(trainer)
    assert not controls.extends(controlled(needs_number))


def test_columns_of_a_study_are_controls_too():
    points = {**POINTS, "warmup_steps": np.int32([0, 3]), "max_norm": np.float32([1e30, 0.5])}
    seen = train(controlled(linear), points=points, names=controls.NAMES)
    np.testing.assert_allclose(seen[0], plain(linear)[0], rtol=1e-6)
    one = controlled(linear).with_fixed(controls.warmed_and_clipped(3, 0.5))
    np.testing.assert_allclose(seen[1], train(one)[1], rtol=1e-6)


def test_an_optimizer_without_a_rate_is_clipped_only():
    def make_optimizer(point):
        return pbx.sgd(0.1 * point["factor"])

    points = {"factor": np.float32([1.0, 4.0])}
    trainer = pbx.Trainer(tiny.noisy_quadratic(), make_optimizer, progress=False)
    seen = train(controls.controlled(trainer, points, has_rate=False), points=points)
    np.testing.assert_allclose(seen, plain(), rtol=1e-6)


def test_the_chapter_on_instability_has_two_programs():
    """One for all that is data, and one for the clipper at a percentile."""
    programs.forget()

    def loss(params, state, batch, key):
        return 0.5 * jnp.sum(batch * params["w"] ** 2) ** 1.2, (state, {})

    work = pbx.Workload(**{**vars(tiny.noisy_quadratic()), "loss": loss})
    verdict = pbx.procedures.stabilize(
        work,
        tiny.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 10.0, scale="log")}),
        key=KEY,
        num_steps=30,
        num_trials=6,
        optimizers={},
        progress=False,
    )
    assert list(verdict.answer.steps)[-1] == "remedies"
    assert len(programs._sets) == 2


@pytest.mark.parametrize("make_schedule", [None, linear])
def test_all_chapters_of_tune_have_one_program(make_schedule):
    programs.forget()
    recipe = pbx.tune(
        tiny.noisy_quadratic(),
        "momentum",
        make_schedule=make_schedule,
        num_trials=24,
        num_steps=40,
        key=KEY,
        progress=False,
    )
    assert {"learning_rate", "round_1", "round_2", "retrain"} <= {c.name for c in recipe.chapters}
    assert len(programs._sets) == 1


def test_tune_takes_a_trainer():
    trainer = pbx.Trainer(tiny.noisy_quadratic(), tiny.sgd, progress=False)
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0, scale="log")})
    one = pbx.tune(trainer, space=space, num_trials=6, num_steps=20, key=KEY)
    two = pbx.tune(
        tiny.noisy_quadratic(), tiny.sgd, space, num_trials=6, num_steps=20, key=KEY, progress=False
    )
    assert one.value == two.value
    with pytest.raises(TypeError, match="got a Trainer"):
        pbx.tune(trainer, space=space, num_trials=6, num_steps=20, key=KEY, progress=False)
    with pytest.raises(TypeError, match="did you mean 'overrides'"):
        pbx.tune(trainer, space=space, num_trials=6, num_steps=20, key=KEY, override={})
