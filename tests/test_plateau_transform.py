"""Reduction on a plateau: its decisions, their record, and the replay as a plain schedule."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax import learning_rate

NUM_VALUES = 40
DEFAULTS = {
    "factor": 0.5,
    "patience": 3,
    "rtol": 1e-4,
    "atol": 0.0,
    "cooldown": 0,
    "accumulation_size": 1,
    "min_scale": 0.0,
}


def scales(tx, values):
    """The scale that each update gets, and the last state."""

    def step(state, value):
        update, state = tx.update(jnp.ones(()), state, value=value)
        return state, update

    state, out = jax.lax.scan(step, tx.init(jnp.ones(())), values)
    return out, state


@functools.partial(jax.jit, static_argnames=("maximize", "max_reductions"))
def ours(h, values, maximize=False, max_reductions=32):
    return scales(
        pbx.reduce_on_plateau(**h, maximize=maximize, max_reductions=max_reductions), values
    )


@jax.jit
def replay(info):
    return info.schedule()(jnp.arange(NUM_VALUES))


def reference(values, h, maximize=False, max_reductions=32):
    """The rules as a plain loop: the scale of each update, and where it changed."""
    scale, best, bad, cooling, group, out, made = 1.0, None, 0, 0, [], [], []
    for step, value in enumerate(values):
        group.append(float(value))
        if len(group) == h["accumulation_size"]:
            mean, group = -np.mean(group) if maximize else np.mean(group), []
            limit = None if best is None else best - h["rtol"] * abs(best) - h["atol"]
            if np.isfinite(mean) and (limit is None or mean < limit):
                best, bad = mean, 0
            else:
                bad += 1
            if cooling:
                cooling, bad = cooling - 1, 0
            elif bad >= h["patience"]:
                bad, cooling = 0, h["cooldown"]
                smaller = max(scale * h["factor"], h["min_scale"])
                if smaller < scale and len(made) < max_reductions:
                    scale = smaller
                    made.append((step, scale))
        out.append(scale)
    return out, made


def check(values, h, **static):
    values = np.asarray(values, np.float32)
    seen, state = ours(jax.tree.map(jnp.asarray, h), values, **static)
    want, made = reference(values, h, **static)
    np.testing.assert_allclose(seen, want, rtol=1e-5)
    info = pbx.plateau_info(state)
    assert int(info.num_reductions) == len(made)
    assert info.steps[: len(made)].tolist() == [step for step, _ in made]
    assert (info.steps[len(made) :] == 2**31 - 1).all()
    np.testing.assert_array_equal(replay(info), seen)
    return info


# Multiples of 1/8, so that no comparison hangs on a rounding.
VALUES = st.lists(
    st.sampled_from([*np.arange(-16, 17) / 8, np.nan, np.inf, -np.inf]),
    min_size=NUM_VALUES,
    max_size=NUM_VALUES,
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    values=VALUES,
    patience=st.integers(1, 4),
    cooldown=st.integers(0, 3),
    accumulation_size=st.integers(1, 2),
    min_scale=st.sampled_from([0.0, 0.25, 1.0]),
    atol=st.sampled_from([0.0, 0.3]),
    rtol=st.sampled_from([1e-4, 0.3]),
    maximize=st.booleans(),
)
def test_decisions_are_those_of_a_plain_loop(values, maximize, **h):
    check(values, {**DEFAULTS, **h}, maximize=maximize)


@pytest.mark.parametrize(
    "changes",
    [{}, {"cooldown": 2}, {"accumulation_size": 3}, {"min_scale": 0.2}, {"atol": 0.1, "rtol": 0.0}],
)
def test_equals_optax_on_losses_above_zero(changes):
    h = {**DEFAULTS, **changes}
    rng = np.random.default_rng(0)
    values = jnp.asarray(2 * np.exp(-np.arange(NUM_VALUES) / 4) + rng.random(NUM_VALUES) + 0.1)
    values = values.astype(jnp.float32)
    want, state = jax.jit(lambda v: scales(optax.contrib.reduce_on_plateau(**h), v))(values)
    assert want[-1] < 1
    seen, mine = ours(h, values)
    np.testing.assert_array_equal(seen, want)
    assert mine.plateau_count == state.plateau_count
    assert mine.cooldown_count == state.cooldown_count
    np.testing.assert_allclose(mine.best_value, state.best_value, rtol=1e-6)


def test_a_value_below_zero_that_rises_is_no_improvement():
    """Optax takes each of these, which rise by 1e-5 of their size, for an improvement."""
    values = -10.0 + 1e-4 * np.arange(NUM_VALUES)
    h = {**DEFAULTS, "rtol": 1e-3}
    assert check(values, h).num_reductions == (NUM_VALUES - 1) // 3
    theirs, _ = scales(optax.contrib.reduce_on_plateau(**h), jnp.asarray(values, jnp.float32))
    assert theirs[-1] == 1


def test_values_that_are_not_finite_are_never_the_best():
    values = [np.nan, np.inf, -np.inf, 2.0, 1.0, *[1.0] * (NUM_VALUES - 5)]
    info = check(values, {**DEFAULTS, "patience": 4})
    assert (info.best_value, info.steps[0]) == (1.0, 8)
    empty, _ = ours(DEFAULTS, jnp.full((NUM_VALUES,), jnp.nan))
    assert empty[-1] < 1
    assert np.isnan(pbx.plateau_info(pbx.reduce_on_plateau().init({})).best_value)


def test_room_for_decisions_is_static_and_when_full_the_scale_stays():
    info = check(np.ones(NUM_VALUES), {**DEFAULTS, "patience": 1}, max_reductions=2)
    assert info.steps.tolist() == [1, 2]
    assert info.scales.tolist() == [0.5, 0.25]
    assert info.scale == 0.25


def test_the_minimal_scale_is_reached_once_and_recorded_once():
    info = check(np.ones(NUM_VALUES), {**DEFAULTS, "patience": 1, "min_scale": 0.3})
    np.testing.assert_allclose(info.scales[:2], [0.5, 0.3])
    assert info.num_reductions == 2


def test_without_a_value_nothing_happens_silently():
    tx = pbx.reduce_on_plateau()
    state = tx.init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"needs the value.*value=loss"):
        tx.update(jnp.ones(2), state)
    with pytest.raises(ValueError, match=r"real scalar, got shape \(2,\)"):
        tx.update(jnp.ones(2), state, value=jnp.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, "factor must be > 0 and < 1"),
        ({"factor": 0.0}, "factor must be > 0"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"patience": 1.5}, "patience must be a whole number"),
        ({"rtol": 2.0}, "rtol must be >= 0 and <= 1"),
        ({"rtol": 0.0}, "must not both be 0"),
        ({"atol": -1.0}, "atol must be >= 0"),
        ({"cooldown": -1}, "cooldown must be >= 0"),
        ({"accumulation_size": 0}, "accumulation_size must be >= 1"),
        ({"min_scale": 2.0}, "min_scale must be >= 0 and <= 1"),
        ({"max_reductions": 0}, "max_reductions must be >= 1"),
        ({"maximize": 1}, "maximize must be True or False"),
        ({"cool_down": 1}, "did you mean 'cooldown'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pbx.reduce_on_plateau(**arguments)


def test_a_state_is_found_wherever_it_is_and_only_there():
    tx = optax.chain(pbx.adam(0.1), pbx.reduce_on_plateau(patience=1, max_reductions=3))
    weights = jnp.ones(2)

    def run(values):
        state = tx.init(weights)
        for i in range(2):
            _, state = tx.update(weights, state, weights, value=values[i])
        return state

    states = jax.vmap(run)(jnp.array([[1.0, 2.0], [2.0, 1.0]]))
    info = pbx.plateau_info(states)
    assert info.num_reductions.tolist() == [1, 0]
    with pytest.raises(ValueError, match="trials of shape"):
        info.schedule()
    alone = pbx.plateau_info(jax.tree.map(lambda leaf: leaf[0], states))
    np.testing.assert_allclose(alone.schedule(2.0)(jnp.arange(3)), [2.0, 0.2, 0.2])
    traced = jax.jit(lambda v: pbx.plateau_info(run(v)).schedule()(jnp.arange(3)))
    np.testing.assert_array_equal(traced(jnp.array([1.0, 2.0])), alone.schedule()(jnp.arange(3)))
    for bad in (pbx.adam(0.1), optax.chain(tx, pbx.reduce_on_plateau())):
        with pytest.raises(ValueError, match="one is needed"):
            pbx.plateau_info(bad.init(weights))


@pytest.mark.parametrize("workload", ["quadratic", "mlp"])
def test_the_recorded_decisions_replay_the_run_bit_for_bit(workload):
    """In its own place with any factor, and as the learning rate with a power of two."""
    work = getattr(tiny_workloads, workload)()
    rate, key, room = 0.3, pbx.trial_key(jax.random.key(0)), 6

    def program(make_optimizer):
        trial = pbx.make_trial(work, make_optimizer, 60, 20)
        return jax.jit(lambda point, data: trial.advance(trial.init(point, key, data), data, 0, 60))

    def watched(point):
        watch = {"patience": 2, "rtol": 0.9, "accumulation_size": 2, "max_reductions": room}
        return optax.chain(pbx.momentum(rate, 0.5), pbx.reduce_on_plateau(point["factor"], **watch))

    def in_place(point):
        schedule = pbx.schedules.from_reductions(1.0, point["steps"], point["scales"])
        return optax.chain(pbx.momentum(rate, 0.5), optax.scale_by_schedule(schedule))

    def as_rate(point):
        schedule = pbx.schedules.from_reductions(rate, point["steps"], point["scales"])
        return pbx.momentum(schedule, 0.5)

    watched, in_place, as_rate = map(program, (watched, in_place, as_rate))
    for factor in (0.7, 0.5):
        first = watched({"factor": factor}, work.data)
        info = pbx.plateau_info(first.opt_state)
        assert info.num_reductions >= 2
        decisions = {"steps": info.steps, "scales": info.scales}
        again, plain = in_place(decisions, work.data), as_rate(decisions, work.data)
        for name, metric in first.metrics.items():
            np.testing.assert_array_equal(metric, again.metrics[name], err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
        if factor == 0.5:
            jax.tree.map(np.testing.assert_array_equal, first.params, plain.params)
        else:
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
            jax.tree.map(close, first.params, plain.params)


def test_a_run_study_passes_the_training_loss():
    def optimizer(point):
        return optax.chain(
            pbx.sgd(point["learning_rate"]), pbx.reduce_on_plateau(patience=2, rtol=0.9)
        )

    points = {"learning_rate": np.array([0.3], np.float32)}
    common = {"num_steps": 20, "eval_every": 10, "key": jax.random.key(0), "trials_per_block": 1}
    work = tiny_workloads.quadratic()
    with_plateau = pbx.run_study(work, optimizer, points, **common)
    without = pbx.run_study(work, tiny_workloads.sgd, points, **common)
    assert with_plateau.best().value > without.best().value


def test_float64_is_kept():
    with jax.enable_x64(True):
        tx = pbx.reduce_on_plateau(0.1, patience=1)
        state = tx.init(jnp.ones(2, jnp.float64))
        for value in (1.0, 1.0):
            updates, state = tx.update(jnp.ones(2, jnp.float64), state, value=value)
        np.testing.assert_array_equal(updates, 0.1)
        assert learning_rate.plateau_info(state).scale.dtype == jnp.float64


def test_from_reductions_is_checked():
    with pytest.raises(ValueError, match="got 2 scales and 1 steps"):
        pbx.schedules.from_reductions(1.0, [1], [0.5, 0.25])
    with pytest.raises(ValueError, match=r"steps\[0\] must be >= 0"):
        pbx.schedules.from_reductions(1.0, [-1], [0.5])
    with pytest.raises(ValueError, match=r"scales\[0\] must be >= 0"):
        pbx.schedules.from_reductions(1.0, [1], [-0.5])
    assert float(pbx.schedules.from_reductions(0.5, [], [])(7)) == 0.5
