"""A lucky first batch is no instability, and an explosion at once is no luck."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import playbook_optax as pbx


def infeasible(first, later):
    """Whether a trial is, whose batches lose `first`, and then `later` give or take a third."""

    def loss(p, s, step, key):
        noise = 1 + jax.random.normal(jax.random.fold_in(jax.random.key(3), step)) / 3
        return jnp.where(step == 0, first, later * noise) + 0 * p["w"].sum(), (s, {})

    workload = pbx.Workload(
        name="luck",
        init=lambda key: ({"w": jnp.ones(2)}, {}),
        loss=loss,
        batch=lambda d, k, i: jnp.asarray(i),
        evaluate=lambda p, s, d: {"valid/error_rate": p["w"].sum()},
        objective="valid/error_rate",
    )
    study = pbx.run_study(
        workload,
        lambda point: pbx.sgd(point["learning_rate"]),
        {"learning_rate": np.float32([0.1])},
        num_steps=100,
        eval_every=10,
        key=jax.random.key(0),
    )
    return bool(study.data["infeasible"].values[0])


@pytest.mark.parametrize("first", [1.0, 0.3, 0.01])
def test_a_small_first_loss_by_chance_is_feasible(first):
    assert not infeasible(first, 1.0)


@pytest.mark.parametrize("later", [1e12, 1e25])
def test_an_explosion_before_the_second_evaluation_is_infeasible(later):
    assert infeasible(1.0, later)
