"""The protocol that every transform obeys: one matrix, every transform in every setting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from playbook_optax import learning_rate, norms, optimizers, reducers, schedules


def watching(factory):
    """The factory with a default for the value that its transform watches: one that is flat."""

    def make(**h):
        tx = factory(**h)

        def update(updates, state, params=None, *, value=1.0, **extra_args):
            return tx.update(updates, state, params, value=value, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


RATE = {"learning_rate": 0.1}
PLATEAU = {"factor": 0.5, "patience": 2, "rtol": 1e-4, "atol": 1e-6, "cooldown": 1}
BETAS = {"b1": 0.9, "b2": 0.99, "eps": 1e-6}
TRANSFORMS = {
    "sgd": (optimizers.sgd, RATE),
    "momentum": (optimizers.momentum, {**RATE, "momentum": 0.8}),
    "nesterov": (optimizers.nesterov, {**RATE, "momentum": 0.8}),
    "rmsprop": (optimizers.rmsprop, {**RATE, "decay": 0.8, "momentum": 0.5, "eps": 1e-6}),
    "adam": (optimizers.adam, {**RATE, **BETAS}),
    "nadam": (optimizers.nadam, {**RATE, **BETAS}),
    "adamw": (optimizers.adamw, {**RATE, **BETAS, "weight_decay": 0.1}),
    "nadamw": (optimizers.nadamw, {**RATE, **BETAS, "weight_decay": 0.1}),
    "scale_by_momentum": (optimizers.scale_by_momentum, {"momentum": 0.8}),
    "scale_by_nesterov": (optimizers.scale_by_nesterov, {"momentum": 0.8}),
    "scale_by_rmsprop": (optimizers.scale_by_rmsprop, {"decay": 0.8, "eps": 1e-6}),
    "scale_by_adam": (optimizers.scale_by_adam, BETAS),
    "scale_by_nadam": (optimizers.scale_by_nadam, BETAS),
    "scale_by_learning_rate": (learning_rate.scale_by_learning_rate, RATE),
    "scale_by_warmup": (learning_rate.scale_by_warmup, {"warmup_steps": 3}),
    "reduce_on_plateau": (
        watching(learning_rate.reduce_on_plateau),
        {**PLATEAU, "accumulation_size": 1, "min_scale": 0.1},
    ),
    "clip_by_global_norm": (norms.clip_by_global_norm, {"max_norm": 0.5}),
    "clip_until": (norms.clip_until, {"max_norm": 0.5, "num_steps": 3}),
    "clip_by_percentile": (norms.clip_by_percentile, {"percentile": 60.0, "min_steps": 1}),
    "monitor_norms": (norms.monitor_norms, {}),
}
SCHEDULED = [name for name, (_, h) in TRANSFORMS.items() if "learning_rate" in h]
STEPS = 6
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def params(dtype=jnp.float32):
    return {
        "w": jnp.linspace(-1, 1, 6).reshape(2, 3).astype(dtype),
        "nothing": None,
        "empty": jnp.zeros((0, 3), dtype),
        "b": jnp.ones((), dtype),
    }


def gradient(weights, step):
    """Varies with the weights and the step."""
    return jax.tree.map(
        lambda p: (jnp.sin(3 * p.astype(jnp.float32) + step) + 0.3).astype(p.dtype), weights
    )


def make(name, **changes):
    factory, h = TRANSFORMS[name]
    return factory(**{**h, **changes})


def train(tx, weights, num_steps=STEPS):
    """Updates of a scan of `num_steps`, and the last carry."""

    def step(carry, i):
        weights, state = carry
        updates, state = tx.update(gradient(weights, i), state, weights)
        small = jax.tree.map(lambda u: u * 0.1, updates)
        return (optax.apply_updates(weights, small), state), updates

    return jax.lax.scan(step, (weights, tx.init(weights)), jnp.arange(num_steps))


def specs(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@every_transform
def test_is_an_optax_transformation_with_extra_arguments(name):
    tx = make(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    weights = params()
    tx.update(gradient(weights, 0), tx.init(weights), weights, value=1.0, anything="ignored")


@every_transform
def test_state_is_finite_fixed_and_uniquely_named(name):
    tx, weights = make(name), params()
    state = tx.init(weights)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()
    updates, after = tx.update(gradient(weights, 0), state, weights)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert specs(state) == specs(after)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    names = []

    def collect(node):
        if hasattr(node, "_fields"):
            names.extend(node._fields)
        if isinstance(node, tuple):
            for child in node:
                collect(child)

    collect(state)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SCHEDULED)
def test_number_tracer_and_schedule_have_the_same_state(name):
    weights = params()
    want = specs(make(name).init(weights))
    assert specs(make(name, learning_rate=schedules.constant(0.1)).init(weights)) == want
    assert specs(make(name, learning_rate=lambda count: 0.1).init(weights)) == want
    traced = jax.jit(lambda rate: make(name, learning_rate=rate).init(weights))(0.1)
    assert specs(traced) == want
    (_, state), _ = train(make(name, learning_rate=schedules.linear_decay(0.1, 10)), weights)
    assert int(optax.tree.get(state, "step")) == STEPS
    np.testing.assert_allclose(
        optax.tree.get(state, "learning_rate"), 0.1 * (1 - (STEPS - 1) / 10), rtol=1e-6
    )
    _, constant = train(make(name, learning_rate=schedules.constant(0.1)), weights)
    assert_close(constant, train(make(name), weights)[1])


@every_transform
def test_vmap_over_every_hyperparameter_equals_a_loop(name):
    factory, h = TRANSFORMS[name]
    factors = (0.5, 0.8, 1.0)
    many = {
        k: jnp.array([v, v + 1, 0]) if isinstance(v, int) else v * jnp.array(factors)
        for k, v in h.items()
    }
    weights = params()

    def updates(h):
        return train(factory(**h), weights)[1]

    swept = jax.jit(jax.vmap(updates, axis_size=3))(many)
    alone = jax.jit(updates)
    for i in range(3):
        one = alone({k: v[i] for k, v in many.items()})
        assert_close(jax.tree.map(lambda x, i=i: x[i], swept), one)


@every_transform
def test_python_numbers_equal_traced_ones_and_trace_once(name):
    factory, h = TRANSFORMS[name]
    weights, traces = params(), []

    @jax.jit
    def step(h, state, weights, i):
        traces.append(1)
        return factory(**h).update(gradient(weights, i), state, weights)

    h = {k: jnp.asarray(v) for k, v in h.items()}
    state = plain = make(name).init(weights)
    static = jax.jit(lambda s, i: make(name).update(gradient(weights, i), s, weights))
    for i in range(4):
        updates, state = step(h, state, weights, jnp.int32(i))
        want, plain = static(plain, jnp.int32(i))
        assert_close(updates, want)
    assert len(traces) == 1


@every_transform
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_with_traced_hyperparameters_in_a_scan(name, dtype):
    factory, h = TRANSFORMS[name]
    weights = params(dtype)
    h = {k: jnp.float32(v) for k, v in h.items()}
    (after, state), updates = jax.jit(lambda h: train(factory(**h), weights, 20))(h)
    for leaf in jax.tree.leaves((updates, after)):
        assert leaf.dtype == dtype
        assert np.isfinite(leaf.astype(np.float32)).all()
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    first = jax.tree.map(lambda u: u[1].astype(jnp.float32), updates)
    _, exact = train(make(name), params(), 2)
    slack = 2e-2 if dtype == jnp.bfloat16 else 3e-3
    assert_close(first, jax.tree.map(lambda u: u[1], exact), rtol=slack, atol=5 * slack)


@every_transform
def test_mixed_dtypes_keep_their_own(name):
    weights = {"half": jnp.ones(2, jnp.bfloat16), "full": jnp.ones(2)}
    (_, _), updates = train(make(name), weights)
    assert (updates["half"].dtype, updates["full"].dtype) == (jnp.bfloat16, jnp.float32)


@every_transform
def test_masked(name):
    weights = {"w": jnp.ones(2), "count": jnp.arange(2)}
    tx = optax.masked(make(name), {"w": True, "count": False})
    alone = make(name)
    grads = {"w": jnp.array([0.3, -2.0]), "count": jnp.array([7, 8])}
    updates, _ = tx.update(grads, tx.init(weights), weights)
    want, _ = alone.update({"w": grads["w"]}, alone.init({"w": weights["w"]}), {"w": weights["w"]})
    assert_close(updates["w"], want["w"])
    np.testing.assert_array_equal(updates["count"], grads["count"])
    everything_masked = optax.masked(make(name), {"w": False, "count": False})
    updates, _ = everything_masked.update(grads, everything_masked.init(weights), weights)
    np.testing.assert_array_equal(updates["w"], grads["w"])


@every_transform
def test_chain_partition_multi_steps_and_apply_if_finite(name):
    tx = make(name)
    wrapped = (
        tx,
        optax.chain(optax.identity(), tx, optax.identity()),
        optax.partition({"all": tx}, lambda tree: jax.tree.map(lambda _: "all", tree)),
        optax.apply_if_finite(tx, 3),
        optax.MultiSteps(tx, 1),
    )

    @jax.jit
    def step(many):
        return [
            tx.update(gradient(weights, i), state, weights)
            for tx, (weights, state, i) in zip(wrapped, many, strict=True)
        ]

    carried = [(params(), tx.init(params()), jnp.int32(0)) for tx in wrapped]
    for i in range(3):
        results = step(carried)
        carried = [(params(), state, jnp.int32(i + 1)) for _, state in results]
        for updates, _ in results[1:]:
            assert_close(updates, results[0][0])


@every_transform
def test_multi_steps_updates_with_the_mean_gradient(name):
    weights = {"w": jnp.ones(2)}
    accumulated, tx = optax.MultiSteps(make(name), 2), make(name)
    grads = [{"w": jnp.array([0.5, 2.0])}, {"w": jnp.array([1.5, -4.0])}]
    state = accumulated.init(weights)
    update = jax.jit(accumulated.update)
    first, state = update(grads[0], state, weights)
    np.testing.assert_array_equal(first["w"], 0)
    second, state = update(grads[1], state, weights)
    want, _ = tx.update({"w": jnp.array([1.0, -1.0])}, tx.init(weights), weights)
    assert_close(second, want)


@every_transform
def test_apply_if_finite_skips_a_bad_gradient(name):
    weights = {"w": jnp.ones(2)}
    tx = optax.apply_if_finite(make(name), 5)
    bad = {"w": jnp.array([jnp.nan, 1.0])}
    updates, state = jax.jit(tx.update)(bad, tx.init(weights), weights)
    np.testing.assert_array_equal(updates["w"], 0)
    assert int(state.total_notfinite) == 1
    for leaf in jax.tree.leaves(state.inner_state):
        assert np.isfinite(leaf).all()


@every_transform
def test_empty_tree_works(name):
    tx = make(name)
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@every_transform
def test_integer_leaf_is_an_error_that_says_mask_it(name):
    tx = make(name)
    weights, bad = {"w": jnp.ones(2)}, {"w": jnp.arange(2)}
    with pytest.raises(ValueError, match=r"'w' has dtype int32.*[Mm]ask"):
        tx.update(bad, tx.init(weights), weights)


@every_transform
def test_gradient_of_another_shape_is_an_error_with_its_path(name):
    tx = make(name)
    weights = {"layer": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"'layer/w' has shape \(3,\)"):
        tx.update({"layer": {"w": jnp.ones(3)}}, tx.init(weights), weights)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n.startswith("scale_by_")][:5])
def test_gradient_of_another_shape_than_the_state_is_an_error_without_params(name):
    tx = make(name)
    with pytest.raises(ValueError, match="the optimizer state"):
        tx.update(jnp.ones(3), tx.init(jnp.ones((2, 3))))


@pytest.mark.parametrize("name", ["adam", "nadam", "scale_by_adam"])
def test_the_count_saturates(name):
    tx, weights = make(name), jnp.ones(2)
    full = jnp.int32(2**31 - 1)
    state = optax.tree.set(tx.init(weights), count=full)
    updates, state = tx.update(weights, state, weights)
    assert int(optax.tree.get(state, "count")) == full
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("name", ["adam", "rmsprop", "momentum"])
def test_float64_stays_float64(name):
    with jax.enable_x64(True):
        weights = jnp.ones(2, jnp.float64)
        tx = make(name)
        updates, state = tx.update(weights, tx.init(weights), weights)
        assert updates.dtype == jnp.float64
        assert specs(state) == specs(tx.init(weights))
        _, mixed = tx.update(weights, tx.init(weights.astype(jnp.float32)))
        assert specs(mixed) == specs(tx.init(weights.astype(jnp.float32)))


# States that are donated --------------------------------------------------------------------------

WRAPPERS = {
    "alone": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, True),
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "twice": lambda tx: optax.chain(norms.clip_by_global_norm(1.0, name="other"), tx),
}


@every_transform
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_that_is_donated_is_nobody_elses(name, wrapper):
    factory, h = TRANSFORMS[name]
    given = {k: jnp.asarray(v) for k, v in h.items()}
    weights = jnp.ones(3)
    tx = WRAPPERS[wrapper](optax.with_extra_args_support(factory(**given)))

    def step(state, weights):
        updates, state = tx.update(jnp.ones(3), state, weights)
        return state, updates

    donating = jax.jit(step, donate_argnums=0)
    # What `update` returns outside of jit is given away as well as what `init` does.
    for state in (tx.init(weights), step(tx.init(weights), weights)[0]):
        for _ in range(3):
            state, _ = donating(state, weights)
        jax.block_until_ready(state)
    for value in (weights, *given.values()):
        assert not value.is_deleted()


# Switches of JAX ----------------------------------------------------------------------------------

SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": lambda: jax.disable_jit(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "checking_leaks": lambda: jax.checking_leaks(),
}


@every_transform
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_switches_for_debugging_change_nothing(name, switch, dtype):
    weights = {"w": jnp.linspace(-1, 1, 3).astype(dtype)}
    grads = {"w": jnp.linspace(-1, 2, 3).astype(dtype)}

    def run():
        tx = make(name)
        state, seen = tx.init(weights), []
        for _ in range(3):
            updates, state = tx.update(grads, state, weights)
            seen.append(updates["w"])
        return [np.asarray(u.astype(jnp.float32)) for u in seen]

    plain = run()
    with SWITCHES[switch]():
        switched = run()
    np.testing.assert_allclose(switched, plain, rtol=1e-6)


@every_transform
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits_are_updated_in_float32(name, dtype):
    weights = {"w": jnp.linspace(-1, 1, 3).astype(dtype)}
    grads = {"w": jnp.array([0.5, -0.25, 1.0]).astype(dtype)}
    tx, wide = make(name), make(name)
    state, full = tx.init(weights), jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    whole = wide.init(full)
    for _ in range(3):
        updates, state = tx.update(grads, state, weights)
        exact, whole = wide.update(
            jax.tree.map(lambda x: x.astype(jnp.float32), grads), whole, full
        )
        assert updates["w"].dtype == dtype
        np.testing.assert_array_equal(updates["w"], exact["w"].astype(dtype))
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)


SCHEDULES = {
    "constant": lambda value: schedules.constant(value),
    "linear_decay": lambda value: schedules.linear_decay(value, 10),
    "cosine_decay": lambda value: schedules.cosine_decay(value, 10),
    "polynomial_decay": lambda value: schedules.polynomial_decay(value, 10, 2),
    "exponential_decay": lambda value: schedules.exponential_decay(value, 10, 0.5),
    "inverse_sqrt_decay": lambda value: schedules.inverse_sqrt_decay(value, 10),
    "piecewise_constant": lambda value: schedules.piecewise_constant([value, value], [5]),
    "warm-up": lambda value: schedules.prepend_warmup(schedules.cosine_decay(value, 10), 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", [2, np.int32(2), np.float16(2), jnp.bfloat16(2), 2.0])
def test_schedules_under_switches_take_numbers_of_any_dtype(name, switch, value):
    expected = [float(SCHEDULES[name](2.0)(jnp.int32(count))) for count in (0, 3, 12)]
    with SWITCHES[switch]():
        found = [SCHEDULES[name](value)(jnp.int32(count)) for count in (0, 3, 12)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", [2, np.float16(2), jnp.bfloat16(2), 2.0])
def test_means_under_switches(switch, value):
    mean = reducers.mean()
    with SWITCHES[switch]():
        state = mean.update(mean.update(mean.init(), value, 0), value, 1)
        nothing = mean.compute(mean.init())
        both = mean.compute(mean.merge(state, state))
    assert np.isnan(nothing)
    assert float(both) == 2.0


def test_what_is_not_known_yet_is_nan_under_debug_nans():
    weights = jnp.ones(2)
    with jax.debug_nans(True):
        record = norms.norm_info(norms.monitor_norms().init(weights))
        assert np.isnan(record.percentile(90.0))
        state = learning_rate.reduce_on_plateau().init(weights)
        assert np.isnan(learning_rate.plateau_info(state).best_value)
