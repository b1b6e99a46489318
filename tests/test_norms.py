"""Clipping and the norm record: closed forms, faults, and every way a state is carried."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from playbook_optax import _histogram
from playbook_optax.norms import (
    NormInfo,
    clip_by_global_norm,
    clip_by_percentile,
    clip_until,
    init_record,
    monitor_norms,
    norm_info,
    record_info,
    update_record,
)

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "none": None}
FACTORIES = {
    "clip": lambda **kw: clip_by_global_norm(2.0, **kw),
    "monitor": lambda **kw: monitor_norms(**kw),
    "percentile": lambda **kw: clip_by_percentile(50.0, min_steps=1, **kw),
    "until": lambda **kw: clip_until(2.0, 100, **kw),
}


def _gradients(num_steps, seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(scale * rng.normal(size=(num_steps, 2, 3)), dtype),
        "b": jnp.asarray(scale * rng.normal(size=(num_steps, 3)), dtype),
        "none": None,
    }


def _norms(gradients):
    parts = [np.asarray(g, np.float64) ** 2 for g in jax.tree.leaves(gradients)]
    return np.sqrt(sum(p.reshape(p.shape[0], -1).sum(1) for p in parts))


def _scan(tx, gradients, params=PARAMS):
    def body(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return jax.lax.scan(body, tx.init(params), gradients)


@jax.jit
def _clip(gradient, max_norm):
    tx = clip_by_global_norm(max_norm)
    updates, state = tx.update(gradient, tx.init(gradient))
    return updates, norm_info(state)


# Closed forms and the float64 reference.


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 2.5, 100.0])
def test_clip_equals_the_rule_in_float64(max_norm):
    gradients = _gradients(20)
    state, updates = _scan(clip_by_global_norm(max_norm), gradients)
    norms = _norms(gradients)
    factor = np.where(norms > max_norm, max_norm / norms, 1.0)
    for got, gradient in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        want = gradient * factor.reshape(-1, *[1] * (gradient.ndim - 1))
        np.testing.assert_allclose(got, want, rtol=4e-7)
    info = norm_info(state)
    np.testing.assert_allclose(info.last_norm, norms[-1], rtol=2e-7)
    np.testing.assert_allclose(info.max_norm, norms.max(), rtol=2e-7)
    assert int(info.num_steps) == 20
    assert int(info.num_clipped) == (norms > max_norm).sum()
    np.testing.assert_allclose(info.clipped_fraction, (norms > max_norm).mean(), rtol=1e-6)
    assert float(info.threshold) == np.float32(max_norm)
    np.testing.assert_array_equal(info.counts, np.histogram(norms, info.edges)[0])
    np.testing.assert_allclose(
        info.percentile(90), _histogram.percentile(np.asarray(info.counts), 90), rtol=1e-5
    )


def test_a_gradient_at_or_below_the_threshold_is_unchanged_bit_for_bit():
    gradient = jnp.array([3.0, 4.0])
    updates, info = _clip(gradient, 5.0)
    np.testing.assert_array_equal(updates, gradient)
    assert int(info.num_clipped) == 0


def test_monitor_changes_nothing_and_records():
    gradients = _gradients(7)
    state, updates = _scan(monitor_norms(), gradients)
    jax.tree.map(np.testing.assert_array_equal, updates, gradients)
    info = norm_info(state)
    np.testing.assert_allclose(info.last_norm, _norms(gradients)[-1], rtol=2e-7)
    assert (int(info.num_steps), int(info.num_clipped)) == (7, 0)
    assert np.isinf(info.threshold)


def test_info_before_the_first_step():
    info = norm_info(monitor_norms().init(PARAMS))
    assert float(info.clipped_fraction) == 0.0
    assert np.isnan(info.percentile(50))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(monitor_norms().init(PARAMS)))


# Faults 14, 26, 30, 47 to 51.


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-3, 1e-12])
@pytest.mark.parametrize("max_norm", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("count", [3, 4096])
def test_any_finite_gradient_is_clipped_right(size, max_norm, count):  # fault 48
    gradient = jnp.full(count, size, jnp.float32)
    updates, info = _clip(gradient, max_norm)
    norm = float(np.float32(size)) * np.sqrt(count)
    want = float(np.float32(size)) * min(1.0, max_norm / norm)
    np.testing.assert_allclose(updates, np.full(count, want), rtol=1e-6)
    assert int(info.num_nonfinite) == 0
    np.testing.assert_allclose(info.last_norm, min(norm, np.finfo(np.float32).max), rtol=1e-6)


def test_a_zero_gradient_stays_zero():  # fault 49
    updates, info = _clip(jnp.zeros(3), 1.0)
    np.testing.assert_array_equal(updates, np.zeros(3))
    assert (float(info.last_norm), int(info.num_clipped), int(info.counts[0])) == (0.0, 0, 1)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_bad_gradient_stays_visible_and_is_counted(bad, factory):  # fault 47
    tx = FACTORIES[factory]()
    gradient = {"a": jnp.array([bad, 100.0]), "b": jnp.array(7.0)}
    state = tx.init(gradient)
    _, state = tx.update({"a": jnp.array([3.0, 4.0]), "b": jnp.array(0.0)}, state)
    updates, state = tx.update(gradient, state)
    jax.tree.map(np.testing.assert_array_equal, updates, gradient)
    info = norm_info(state)
    assert not np.isfinite(info.last_norm)
    assert (int(info.num_nonfinite), int(info.num_steps), int(info.counts.sum())) == (1, 2, 1)
    assert int(info.num_clipped) == (factory in ("clip", "until"))
    np.testing.assert_allclose(info.max_norm, 5.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_under_a_traced_threshold(dtype):  # faults 50, 51
    gradients = _gradients(5, scale=30.0, dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    run = jax.jit(lambda max_norm: _scan(clip_by_global_norm(max_norm), gradients, params))
    state, updates = run(1.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(_norms(updates), 1.5, rtol=1e-2)
    np.testing.assert_allclose(norm_info(state).last_norm, _norms(gradients)[-1], rtol=1e-6)


def test_float16_squares_do_not_overflow():
    updates, info = _clip(jnp.full(4, 60000.0, jnp.float16), 4.0)
    np.testing.assert_array_equal(updates, np.full(4, 2.0, np.float16))
    np.testing.assert_allclose(info.last_norm, 2 * float(np.float16(60000.0)))


def test_mixed_dtypes_under_x64():
    with enable_x64(True):
        gradient = {"a": jnp.full(2, 1e200, jnp.float64), "b": jnp.ones(2, jnp.float32)}
        tx = clip_by_global_norm(1.0)
        state = tx.init(gradient)
        updates, after = tx.update(gradient, state)
        np.testing.assert_allclose(updates["a"], np.full(2, 0.5**0.5), rtol=1e-12)
        assert updates["b"].dtype == jnp.float32
        updates, _ = tx.update({"a": jnp.full(2, 3.0, jnp.float64), "b": jnp.ones(2)}, state)
        np.testing.assert_allclose(updates["b"], np.full(2, 20**-0.5), rtol=1e-6)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        assert np.isfinite(norm_info(after).last_norm)


@pytest.mark.parametrize(
    ("max_norm", "message"),
    [
        (0, r"max_norm must be > 0, got 0"),
        (-1.0, r"max_norm must be > 0, got -1.0"),
        (np.nan, r"max_norm must be finite, got nan"),
        (np.inf, r"max_norm must be finite, got inf"),
        ("1", r"max_norm must be a number, got '1'"),
        (True, r"max_norm must be a number, got True"),
        (np.ones(2), r"max_norm must be a scalar, got shape \(2,\)"),
    ],
)
def test_bad_thresholds(max_norm, message):  # faults 4, 14
    with pytest.raises(ValueError, match=message):
        clip_by_global_norm(max_norm)


@pytest.mark.parametrize("factory", FACTORIES)
def test_bad_leaves_names_and_arguments(factory):
    tx = FACTORIES[factory]()
    with pytest.raises(ValueError, match=r"params leaf 'n' has dtype int32.*Mask it"):
        tx.init({"n": jnp.arange(3)})
    state = tx.init(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"gradients leaf '\(root\)' has dtype int32"):
        tx.update(jnp.arange(3), state)
    with pytest.raises(ValueError, match=r"shape \(3, 1\) but params has \(3,\)"):
        tx.update(jnp.zeros((3, 1)), state, jnp.zeros(3))
    for name in ("", 3):
        with pytest.raises(ValueError, match=f"name must be a non-empty string, got {name!r}"):
            FACTORIES[factory](name=name)
    with pytest.raises(TypeError, match=r"no argument 'nam': did you mean 'name'"):
        FACTORIES[factory](nam="x")


# The protocol: jit, vmap, scan, cond, wrappers, one trace.


def test_vmap_over_max_norm_equals_a_loop_with_one_trace():
    traces = []
    gradients = _gradients(6)

    def run(max_norm):
        traces.append(None)
        return _scan(clip_by_global_norm(max_norm), gradients)

    max_norms = np.array([0.1, 1.0, 3.0, 50.0], np.float32)
    states, updates = jax.jit(jax.vmap(run))(max_norms)
    one = jax.jit(run)
    for i, max_norm in enumerate(max_norms):
        state, want = one(max_norm)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=3e-7), updates, want
        )
        np.testing.assert_array_equal(states.num_clipped[i], state.num_clipped)
        np.testing.assert_array_equal(states.norm_counts[i], state.norm_counts)
    assert len(traces) == 2
    info = norm_info(states)
    assert info.counts.shape == (4, 256)
    assert info.percentile(90).shape == info.clipped_fraction.shape == (4,)
    np.testing.assert_array_equal(info.threshold, max_norms)
    assert np.all(np.diff(info.num_clipped) <= 0)


@pytest.mark.parametrize("factory", FACTORIES)
def test_state_has_one_type_from_init_on(factory):
    tx = FACTORIES[factory]()
    state = tx.init(PARAMS)
    gradient = jax.tree.map(lambda g: g[0], _gradients(1))
    _, after = jax.jit(tx.update)(gradient, state)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
    chosen = jax.jit(lambda p: jax.lax.cond(p, lambda: after, lambda: state))(True)
    jax.tree.map(np.testing.assert_array_equal, chosen, after)


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.adam(1e-3)),
    "named_chain": lambda tx: optax.named_chain(("norm", tx), ("sgd", optax.sgd(0.1))),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {"w": True, "b": True, "none": True}), optax.sgd(0.1)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.sgd(learning_rate))
    )(0.1),
    "partition": lambda tx: optax.partition(
        {"all": tx, "rest": optax.sgd(0.1)}, {"w": "all", "b": "all", "none": "rest"}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_norm_info_finds_the_record_in_any_state(factory, wrapper):
    tx = WRAPPERS[wrapper](FACTORIES[factory](name="mine"))
    gradients = _gradients(4)
    state, updates = jax.jit(functools.partial(_scan, tx))(gradients)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    norms = _norms(gradients)
    for info in (norm_info(state), jax.jit(norm_info)(state), norm_info(state, "mine")):
        assert isinstance(info, NormInfo)
        assert info.name == "mine"
        assert int(info.num_steps) == 4
        np.testing.assert_allclose(info.last_norm, norms[-1], rtol=1e-6)
        np.testing.assert_allclose(info.max_norm, norms.max(), rtol=1e-6)


def test_masked_leaves_are_not_in_the_norm():
    tx = optax.masked(monitor_norms(), {"a": True, "n": False})
    params = {"a": jnp.zeros(2), "n": jnp.arange(3)}
    _, state = tx.update({"a": jnp.array([3.0, 4.0]), "n": jnp.arange(3)}, tx.init(params), params)
    assert float(norm_info(state).last_norm) == 5.0


def test_no_record_and_ambiguous_records_are_errors():
    with pytest.raises(ValueError, match=r"no record of gradient norms. Put monitor_norms\(\)"):
        norm_info(optax.adam(1e-3).init(PARAMS))
    two = optax.chain(monitor_norms(), clip_by_global_norm(1.0), optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match=r"2 records .* 'monitor_norms', 'clip_by_global_norm'"):
        norm_info(two)
    assert norm_info(two, name="clip_by_global_norm").name == "clip_by_global_norm"
    with pytest.raises(ValueError, match=r"name = 'other' is the name of 0 records"):
        norm_info(two, name="other")
    same = optax.chain(monitor_norms(), monitor_norms()).init(PARAMS)
    with pytest.raises(ValueError, match=r"name = 'monitor_norms' is the name of 2 records"):
        norm_info(same, name="monitor_norms")


def test_the_record_before_and_after_the_clip_differ():
    tx = optax.chain(
        monitor_norms("before"), clip_by_global_norm(1.0, name="clip"), monitor_norms("after")
    )
    state, _ = _scan(tx, _gradients(3, scale=10.0))
    np.testing.assert_allclose(norm_info(state, "after").max_norm, 1.0, rtol=1e-6)
    assert float(norm_info(state, "before").max_norm) > 1.0
    np.testing.assert_array_equal(
        norm_info(state, "before").counts, norm_info(state, "clip").counts
    )


def test_info_and_state_are_pytrees_that_serialize():
    state, _ = _scan(clip_by_global_norm(1.0), _gradients(3))
    doubled = jax.tree.map(lambda x: x + x, record_info(state))
    assert isinstance(doubled, NormInfo)
    assert int(doubled.num_steps) == 6
    serialization = pytest.importorskip("flax.serialization")
    raw = serialization.to_bytes(state)
    back = serialization.from_bytes(clip_by_global_norm(9.0).init(PARAMS), raw)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_optax_agrees_where_optax_is_right():
    gradients = _gradients(8)
    _, ours = _scan(clip_by_global_norm(2.0), gradients)
    _, theirs = _scan(optax.clip_by_global_norm(2.0), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=4e-7), ours, theirs)


# The record by itself, as the trial loop uses it.


@hypothesis.given(
    st.lists(
        st.floats(0, 2.0**126, width=32, allow_subnormal=False) | st.sampled_from([np.nan, np.inf]),
        min_size=5,
        max_size=5,
    ),
    st.floats(2**-20, 1e6, width=32),
)
def test_record_equals_its_definition(norms, threshold):
    record = init_record("gradient")
    for norm in norms:
        record = _update(record, norm, threshold)
    info = record_info(record)
    values = np.asarray(norms, np.float32)
    finite = values[np.isfinite(values)]
    np.testing.assert_equal(np.asarray(info.last_norm), values[-1])
    assert float(info.max_norm) == max(finite, default=0.0)
    assert int(info.num_steps) == 5
    assert int(info.num_nonfinite) == 5 - finite.size
    assert int(info.num_clipped) == (finite > np.float32(threshold)).sum()
    assert int(info.counts.sum()) == finite.size


_update = jax.jit(update_record)


def test_record_without_a_threshold_counts_no_clipping():
    info = record_info(update_record(update_record(init_record("x"), 3.0), 1.0))
    assert (int(info.num_clipped), float(info.last_norm), float(info.max_norm)) == (0, 1.0, 3.0)
    assert np.isinf(info.threshold)


@pytest.mark.parametrize("q", [-1, 100.5, np.nan])
def test_percentile_rejects_what_is_no_percentage(q):
    with pytest.raises(ValueError, match=r"q must be"):
        norm_info(monitor_norms().init(PARAMS)).percentile(q)


def test_clip_until_is_the_clipper_and_then_nothing():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    grads = {"a": jnp.array([3.0, 0.0, 4.0]), "b": jnp.array(12.0)}
    until, always = clip_until(1.0, 2), clip_by_global_norm(1.0)
    mine, theirs = until.init(params), always.init(params)
    for step in range(4):
        got, mine = until.update(grads, mine, params)
        want, theirs = always.update(grads, theirs, params)
        for one, other in zip(
            *map(jax.tree.leaves, (got, want if step < 2 else grads)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    info = norm_info(mine)
    assert (int(info.num_clipped), int(info.num_steps), float(info.threshold)) == (2, 4, 1.0)
    np.testing.assert_array_equal(info.counts, norm_info(theirs).counts)


def test_clip_until_is_data_and_a_legal_carry():
    def train(max_norm, num_steps):
        transform = optax.chain(clip_until(max_norm, num_steps), optax.sgd(1.0))

        def step(carry, _):
            params, state = carry
            updates, state = transform.update(jnp.full(4, 5.0), state, params)
            return (optax.apply_updates(params, updates), state), updates

        start = jnp.zeros(4)
        return jax.lax.scan(step, (start, transform.init(start)), length=4)[1]

    thresholds = jnp.array([1.0, 1.0, 3e38])
    steps = jnp.array([2, 2**31 - 1, 2**31 - 1], jnp.int32)
    norms = jnp.linalg.norm(jax.jit(jax.vmap(train))(thresholds, steps), axis=-1)
    want = [[1, 1, 10, 10], [1, 1, 1, 1], [10, 10, 10, 10]]
    np.testing.assert_allclose(norms, want, rtol=1e-6)


def test_clip_until_leaves_what_is_not_finite_visible():
    transform = clip_until(1.0, 5)
    updates, state = transform.update(jnp.array([jnp.inf, 1.0]), transform.init(jnp.zeros(2)))
    assert np.isinf(updates[0])
    assert int(state.num_nonfinite) == 1
