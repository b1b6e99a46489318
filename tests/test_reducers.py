"""Reducers: closed forms, the laws of init, update and merge, and use in a scan under vmap."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from playbook_optax import _histogram, reducers

REDUCERS = {
    "best": reducers.best(),
    "best_maximize": reducers.best(maximize=True),
    "last": reducers.last(),
    "mean": reducers.mean(),
    "maximum": reducers.maximum(),
    "maximum_rise": reducers.maximum_rise(),
    "first_nonfinite_step": reducers.first_nonfinite_step(),
    "steps_to_target": reducers.steps_to_target(0.5),
    "steps_to_target_maximize": reducers.steps_to_target(2.0, maximize=True),
    "log_histogram": reducers.log_histogram(),
    "combined": reducers.combine({"a": reducers.best(), "b": reducers.mean()}),
}
LENGTH = 6
VALUES = hnp.arrays(
    np.float32,
    (LENGTH,),
    elements=st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 2.0, 3e30, -7.0])
    | st.floats(-1e3, 1e3, width=32)
    | st.sampled_from([np.nan, np.inf, -np.inf]),
)


def _value(name, value):
    return {"a": value, "b": value} if name == "combined" else value


def _scan(name):
    reducer = REDUCERS[name]

    def run(values, start=0):
        def body(state, xs):
            return reducer.update(state, _value(name, xs[0]), start + xs[1]), None

        return jax.lax.scan(body, reducer.init(), (values, jnp.arange(values.shape[0])))[0]

    return run


SCAN = {name: jax.jit(_scan(name)) for name in REDUCERS}
MERGE = {name: jax.jit(reducer.merge) for name, reducer in REDUCERS.items()}


def _result(name, values):
    return REDUCERS[name].compute(SCAN[name](np.asarray(values, np.float32)))


def _assert_same(name, got, want):
    if name in ("mean", "combined"):  # Sums in another order round differently.
        got, want = (REDUCERS[name].compute(x) for x in (got, want))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)
    else:
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", REDUCERS)
@hypothesis.given(values=VALUES)
def test_merge_is_associative_and_equals_one_scan(name, values):
    a, b, c = (SCAN[name](values[2 * i : 2 * i + 2], start=2 * i) for i in range(3))
    merge = MERGE[name]
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    _assert_same(name, left, right)
    _assert_same(name, left, SCAN[name](values, start=0))


@pytest.mark.parametrize("name", REDUCERS)
@hypothesis.given(values=VALUES)
def test_init_is_the_identity_of_merge(name, values):
    state, empty = SCAN[name](values), REDUCERS[name].init()
    jax.tree.map(np.testing.assert_array_equal, MERGE[name](empty, state), state)
    jax.tree.map(np.testing.assert_array_equal, MERGE[name](state, empty), state)


@pytest.mark.parametrize("name", REDUCERS)
def test_update_is_merge_with_one_value(name):
    reducer, state = REDUCERS[name], SCAN[name](np.array([1.0, 0.3], np.float32))
    one = reducer.update(reducer.init(), _value(name, 0.2), 2)
    jax.tree.map(
        np.testing.assert_array_equal,
        reducer.update(state, _value(name, 0.2), 2),
        reducer.merge(state, one),
    )


@pytest.mark.parametrize("name", REDUCERS)
def test_states_are_finite_from_init_and_keep_their_types(name):
    reducer = REDUCERS[name]
    state = reducer.init()
    after = reducer.update(state, _value(name, jnp.asarray(2, jnp.bfloat16)), 3)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.isfinite(x).all()
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        assert x.dtype in (jnp.float32, jnp.int32)


@pytest.mark.parametrize("name", REDUCERS)
def test_vmap_equals_a_loop(name):
    values = np.random.default_rng(0).lognormal(0, 1, (4, LENGTH)).astype(np.float32)
    values[1, 2], values[2, 0], values[3, :] = np.nan, -np.inf, np.inf
    many = jax.jit(jax.vmap(_scan(name)))(values)
    for i in range(4):
        one = SCAN[name](values[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), many, one)


@pytest.mark.parametrize(
    ("values", "maximize", "value", "step"),
    [
        ([3, 1, 2], False, 1, 1),
        ([3, 1, 2], True, 3, 0),
        ([np.nan, 2, np.nan], False, 2, 1),  # fault 44
        ([5, -np.inf, 4], False, 4, 2),  # fault 45
        ([5, np.inf, 6], True, 6, 2),
        ([1, 1, 1], False, 1, 0),  # fault 56
        ([2, 2], True, 2, 0),
        ([0, 3], False, 0, 0),
        ([-1, 0], True, 0, 1),
        ([np.nan, np.inf], False, np.nan, -1),  # fault 43
        ([], False, np.nan, -1),
    ],
)
def test_best(values, maximize, value, step):
    name = "best_maximize" if maximize else "best"
    result = _result(name, values)
    np.testing.assert_equal(float(result.value), float(value))
    assert int(result.step) == step


def test_last_shows_whatever_came_last():
    assert float(_result("last", [1.0, 3.0])) == 3.0
    assert np.isnan(_result("last", [1.0, np.nan]))
    assert np.isnan(_result("last", []))


def test_mean_of_many_values_is_as_good_as_of_two():
    values = np.random.default_rng(1).lognormal(3, 1, 100_000).astype(np.float32)
    want = values.astype(np.float64).mean()
    np.testing.assert_allclose(_result("mean", values), want, rtol=1.2e-7)
    plain = np.cumsum(values)[-1] / np.float32(values.size)  # One addition after another.
    assert abs(float(plain) - want) / want > 1.2e-7  # What the compensation is for.


@pytest.mark.parametrize(("bad", "want"), [(np.nan, np.nan), (np.inf, np.inf)])
def test_mean_shows_values_that_are_not_finite(bad, want):
    np.testing.assert_equal(float(_result("mean", [1.0, bad, 2.0])), want)
    assert np.isnan(_result("mean", []))


def test_maximum_is_the_largest_finite_value():
    assert float(_result("maximum", [-3.0, np.nan, np.inf, -5.0])) == -3.0
    assert np.isnan(_result("maximum", [np.nan]))


@hypothesis.given(VALUES)
def test_maximum_rise_equals_its_definition(values):
    finite = values[np.isfinite(values)]
    rises = [y - x for i, x in enumerate(finite) for y in finite[i:]]
    np.testing.assert_equal(
        float(_result("maximum_rise", values)), float(max(rises, default=np.nan))
    )


def test_steps():
    assert int(_result("first_nonfinite_step", [1, 2, np.inf, np.nan])) == 2
    assert int(_result("first_nonfinite_step", [1, 2])) == -1
    assert int(_result("steps_to_target", [1, -np.inf, 0.5, 0.1])) == 2
    assert int(_result("steps_to_target", [1, np.nan])) == -1
    assert int(_result("steps_to_target_maximize", [1, np.inf, 2])) == 2


def test_steps_are_exact_beyond_float32():
    step = 2**31 - 1
    state = REDUCERS["best"].update(REDUCERS["best"].init(), 1.0, step)
    assert int(REDUCERS["best"].compute(state).step) == step


def test_target_may_be_traced():
    def steps(target):
        reached = reducers.steps_to_target(target)
        state = reached.update(reached.init(), 1.0, 0)
        return reached.compute(reached.update(state, 0.3, 1))

    got = jax.jit(jax.vmap(steps))(jnp.array([2.0, 0.5, 0.1]))
    np.testing.assert_array_equal(got, [0, 1, -1])


def test_log_histogram():
    values = np.array([0.0, 1.0, 1e30, np.nan, np.inf, -np.inf], np.float32)
    result = _result("log_histogram", values)
    np.testing.assert_array_equal(np.flatnonzero(result.counts), [0, 160, 255])
    assert int(result.num_nonfinite) == 3
    np.testing.assert_array_equal(result.edges, _histogram.edges())
    np.testing.assert_allclose(result.percentile(50), _histogram.percentile(result.counts, 50))


def test_one_trace_serves_every_target():
    traces = []

    @jax.jit
    def steps(target, value):
        traces.append(None)
        reached = reducers.steps_to_target(target)
        return reached.compute(reached.update(reached.init(), value, 0))

    assert [int(steps(t, 1.0)) for t in (0.5, 1.0, 2.0)] == [-1, 0, 0]
    assert len(traces) == 1


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"target must be finite, got nan"):
        reducers.steps_to_target(np.nan)
    with pytest.raises(ValueError, match=r"target must be a number, got '0.1'"):
        reducers.steps_to_target("0.1")
    with pytest.raises(TypeError, match=r"no argument 'maximise': did you mean 'maximize'"):
        reducers.best(maximise=True)
    with pytest.raises(ValueError, match=r"value of a reducer's update .* shape \(2,\)"):
        REDUCERS["best"].update(REDUCERS["best"].init(), jnp.zeros(2), 0)
    with pytest.raises(ValueError, match=r"no metric 'b': .*Known names: a, c"):
        REDUCERS["combined"].update(REDUCERS["combined"].init(), {"a": 1.0, "c": 1.0}, 0)
