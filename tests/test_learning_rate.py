"""The learning rate's state, warm-up, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from playbook_optax import schedules
from playbook_optax.learning_rate import scale_by_learning_rate, scale_by_warmup
from playbook_optax.optimizers import adam

MAX = 2**31 - 1
PARAMS = {"a": jnp.zeros(3), "b": None, "c": jnp.zeros((0, 2)), "d": jnp.zeros(())}
GRADS = {"a": jnp.arange(3.0), "b": None, "c": jnp.zeros((0, 2)), "d": jnp.ones(())}


def test_number_and_schedule_have_the_same_state_and_show_what_was_used():
    number = scale_by_learning_rate(0.25)
    schedule = scale_by_learning_rate(schedules.linear_decay(0.5, 2))
    traced = jax.eval_shape(lambda lr: scale_by_learning_rate(lr).init(PARAMS), 0.25)
    specs = [jax.eval_shape(tx.init, PARAMS) for tx in (number, schedule)] + [traced]
    assert all(spec == specs[0] for spec in specs)
    assert (specs[0].step.dtype, specs[0].learning_rate.dtype) == (jnp.int32, jnp.float32)
    state = schedule.init(PARAMS)
    assert (int(state.step), float(state.learning_rate)) == (0, 0.5)
    for count, rate in enumerate([0.5, 0.25, 0.0, 0.0]):
        updates, state = schedule.update(GRADS, state)
        assert (int(state.step), float(state.learning_rate)) == (count + 1, rate)
        np.testing.assert_array_equal(updates["a"], -rate * np.arange(3))
        assert updates["b"] is None


def test_equals_optax():
    for rate in (0.3, schedules.cosine_decay(0.3, 5)):
        ours, theirs = scale_by_learning_rate(rate), optax.scale_by_learning_rate(rate)
        mine, other = ours.init(PARAMS), theirs.init(PARAMS)
        for _ in range(4):
            got, mine = ours.update(GRADS, mine)
            want, other = theirs.update(GRADS, other)
            np.testing.assert_array_equal(got["a"], want["a"])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_warmup_multiplies_update_c_by_its_share(warmup_steps, traced):
    def run(warmup_steps):
        tx = scale_by_warmup(warmup_steps)

        def step(state, _):
            update, state = tx.update(jnp.ones(()), state)
            return state, update

        return jax.lax.scan(step, tx.init(jnp.ones(())), length=7)

    state, factors = jax.jit(run)(warmup_steps) if traced else run(warmup_steps)
    want = [min(1.0, c / warmup_steps) if warmup_steps else 1.0 for c in range(7)]
    np.testing.assert_allclose(factors, want, rtol=1e-7)
    assert int(state.warmup_step) == 7


def test_warmup_counts_exactly_past_2_to_the_24():
    tx = scale_by_warmup(2**24 + 3)
    for c in (2**24 + 1, 2**24 + 2):
        state = tx.init(jnp.ones(()))._replace(warmup_step=jnp.int32(c))
        update, _ = tx.update(jnp.full((), 2.0**24), state)
        np.testing.assert_allclose(update, 2.0**24 * c / (2**24 + 3), rtol=2e-7)  # 3 roundings
    update, _ = tx.update(jnp.ones(()), state._replace(warmup_step=jnp.int32(2**24 + 3)))
    assert update == 1.0


def test_warmup_last_equals_a_prepended_schedule():
    """After Adam, scaling the update is scaling the rate."""
    warm = optax.chain(adam(0.1), scale_by_warmup(3))
    scheduled = adam(schedules.prepend_warmup(schedules.constant(0.1), 3))
    a, b = warm.init(PARAMS), scheduled.init(PARAMS)
    for _ in range(6):
        one, a = warm.update(GRADS, a)
        two, b = scheduled.update(GRADS, b)
        np.testing.assert_allclose(one["a"], two["a"], rtol=3e-7)


@pytest.mark.parametrize("tx", [scale_by_learning_rate(0.1), scale_by_warmup(3)])
def test_step_saturates(tx):
    state = jax.tree.map(
        lambda x: jnp.full_like(x, MAX) if x.dtype == jnp.int32 else x, tx.init(jnp.ones(()))
    )
    update, state = tx.update(jnp.ones(()), state)
    assert int(state[0]) == MAX
    assert jnp.isfinite(update)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", [scale_by_learning_rate, scale_by_warmup])
def test_low_precision_is_kept_and_rounded_once(make, dtype):
    gradient = jnp.array([1.0, 3.0, 7.0], dtype)
    value = jnp.float32(0.1) if make is scale_by_learning_rate else jnp.int32(7)

    @jax.jit
    def second(value):
        tx = make(value)
        _, state = tx.update(gradient, tx.init(gradient))
        return tx.update(gradient, state)[0]

    got = second(value)
    factor = np.float32(-0.1) if make is scale_by_learning_rate else np.float32(1) / np.float32(7)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, (np.array([1, 3, 7], np.float32) * factor).astype(dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_learning_rate(-0.1), "learning_rate must be >= 0, got -0.1"),
        (lambda: scale_by_learning_rate(float("inf")), "learning_rate must be finite"),
        (lambda: scale_by_learning_rate("0.1"), "learning_rate must be a number, got '0.1'"),
        (lambda: scale_by_learning_rate(True), "learning_rate must be a number"),
        (lambda: scale_by_learning_rate(jnp.ones(2)), "learning_rate must be a scalar"),
        (lambda: scale_by_warmup(-1), "warmup_steps must be >= 0, got -1"),
        (lambda: scale_by_warmup(2**31), "warmup_steps must be below 2"),
        (lambda: scale_by_warmup(1.5), "warmup_steps must be a whole number"),
        (lambda: scale_by_warmup(3).init({"n": jnp.arange(3)}), "'n' has dtype int32.*Mask"),
        (
            lambda: scale_by_warmup(3).update(jnp.arange(3), scale_by_warmup(3).init(jnp.ones(3))),
            "gradients leaf .* has dtype int32",
        ),
    ],
)
def test_concrete_bad_values_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
