"""The percentile clipper: its window against NumPy, its accuracy, faults, and merging."""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from playbook_optax import _histogram, learning_rate, norms
from playbook_optax.norms import (
    clip_by_global_norm,
    clip_by_percentile,
    init_record,
    merge,
    norm_info,
    record_info,
    update_record,
)

DIRECTION = np.array([0.6, -0.8], np.float32)
EMPTY = clip_by_percentile().init(jnp.zeros(2))


def _train(norms, percentile, min_steps):
    """The final state, and of every step the update's norm and the threshold it was clipped to."""
    tx = clip_by_percentile(percentile, min_steps=min_steps)

    def step(state, norm):
        updates, state = tx.update(norm * DIRECTION, state)
        return state, (updates[1] / DIRECTION[1], state.norm_record.clip_threshold)

    return jax.lax.scan(step, tx.init(jnp.zeros(2)), norms)


train = jax.jit(_train)
train_many = jax.jit(jax.vmap(_train, (0, None, None)))


def _norms(*shape, seed=0):
    return np.random.default_rng(seed).lognormal(0, 0.8, shape).astype(np.float32)


def _window(norms):
    """What the window holds after these norms: the row in progress and 7 full ones of 120."""
    kept = norms[np.isfinite(norms) & (norms > 0)]
    if not kept.size:
        return kept
    return kept[-((kept.size - 1) % 120 + 1 + 120 * min(7, (kept.size - 1) // 120)) :]


def _threshold(norms, percentile, min_steps):
    if (np.isfinite(norms) & (norms > 0)).sum() < min_steps:
        return 0.0
    return _histogram.percentile(_histogram_of(_window(norms)), percentile)


def _histogram_of(norms):
    edges = _histogram.edges().astype(np.float64)
    # The outermost bins hold what lies beyond them.
    return np.histogram(np.clip(norms, edges[0], np.nextafter(edges[-1], 0)), edges)[0]


# The window, its accuracy and its forgetting.


def test_thresholds_and_updates_equal_the_window_in_float64():
    norms = _norms(2500) * np.where(np.arange(2500) < 1300, 1, 10).astype(np.float32)
    # The one at 1085 comes when the row in progress is full: 1085 - 5 = 9 * 120.
    norms[[0, 5, 700, 701, 1085, 1900]] = [np.nan, np.inf, np.inf, np.nan, np.nan, np.inf]
    norms[[3, 50, 2000]] = [0.0, 1e30, 3e38]
    state, (clipped, thresholds) = train(norms, 77.7, 30)
    for i in [*range(40), *range(40, 2500, 7), 1086, 2499]:
        # Only norms of earlier steps count.
        np.testing.assert_allclose(thresholds[i], _threshold(norms[:i], 77.7, 30), rtol=1e-5)
    np.testing.assert_allclose(state.next_threshold, _threshold(norms, 77.7, 30), rtol=1e-5)
    limits = np.where(np.asarray(thresholds) > 0, thresholds, np.inf)
    over = np.isfinite(norms) & (norms > limits)
    np.testing.assert_allclose(clipped, np.where(over, limits, norms), rtol=1e-6)
    info = norm_info(state)
    assert int(info.num_clipped) == over.sum()
    assert (int(info.num_steps), int(info.num_nonfinite)) == (2500, 6)
    assert float(info.threshold) == thresholds[-1]
    # The norm of 0 is in the record, and not in the window.
    assert int(info.counts[0]) == 1
    np.testing.assert_array_equal(info.counts[1:], np.diff(state.counts_below))
    assert int(state.counts_below[0]) == 0


def test_one_step_is_clip_by_global_norm_at_the_threshold_known_before():
    state, _ = train(_norms(500), 75.0, 10)
    gradient = {"a": jnp.array([[3.0, -1.0]]), "b": jnp.array(2.0)}
    updates, _ = clip_by_percentile(75.0, min_steps=10).update(gradient, state)
    fixed = clip_by_global_norm(state.next_threshold)
    want, _ = fixed.update(gradient, fixed.init(gradient))
    jax.tree.map(np.testing.assert_array_equal, updates, want)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_the_threshold_is_right_for_nearly_every_seed_before_and_after_a_shift(factor):
    # 300 seeds; the shift meets every phase of the rows, the end is 1,000 norms later.
    shift = 1000 + np.arange(300) % 120
    norms = _norms(300, 2120)
    norms[np.arange(2120) >= shift[:, None]] *= factor
    for percentile in (50.0, 75.0, 90.0):
        _, (_, thresholds) = train_many(norms, percentile, 100)
        true = np.exp(0.8 * scipy.stats.norm.ppf(percentile / 100))
        for step, size in ((shift, 1.0), (shift + 1000, factor)):
            ratio = thresholds[np.arange(300), np.minimum(step, 2119)] / (size * true)
            assert np.mean(np.abs(ratio - 1) < 0.15) >= 0.99


def test_norms_older_than_960_leave_no_trace():
    old, new = _norms(2, 1120), _norms(1380, seed=1)
    old[1] *= 10
    runs = [train(np.concatenate([o, new]), 90.0, 100)[1][1] for o in old]
    same = np.asarray(runs[0]) == np.asarray(runs[1])
    assert same[1120 + 960 :].all()
    assert not same[200 : 1120 + 800].any()


@pytest.mark.parametrize("min_steps", [1, 7, 100])
def test_nothing_is_clipped_before_min_steps_finite_norms(min_steps):
    norms = np.full(2500, 1.0, np.float32)
    norms[2:5] = np.nan
    norms[[min_steps + 2, 1000]] = 5.0  # The first when min_steps - 1 norms were seen.
    if min_steps == 1:
        norms[:5], norms[3] = np.nan, 5.0
    state, (clipped, thresholds) = train(norms, 90.0, min_steps)
    first = int(np.argmax(np.cumsum(np.isfinite(norms)) >= min_steps)) + 1
    assert (np.asarray(thresholds) > 0).argmax() == first
    np.testing.assert_array_equal(clipped[:first], norms[:first])
    assert clipped[1000] == thresholds[1000] < 2.0
    assert int(norm_info(state).num_clipped) >= 1


# Faults 14, 47 to 51.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": 0}, r"percentile must be > 0 and <= 100, got 0"),
        ({"percentile": -5.0}, r"percentile must be > 0"),
        ({"percentile": 100.5}, r"percentile must be > 0 and <= 100, got 100.5"),
        ({"percentile": np.nan}, r"percentile must be finite, got nan"),
        ({"percentile": "90"}, r"percentile must be a number, got '90'"),
        ({"percentile": np.ones(2)}, r"percentile must be a scalar, got shape \(2,\)"),
        ({"min_steps": 0}, r"min_steps must be >= 1, got 0"),
        ({"min_steps": 2.5}, r"min_steps must be a whole number of steps, got 2.5"),
        ({"min_steps": 2**31}, r"min_steps must be below 2\*\*31"),
        ({"name": ""}, r"name must be a non-empty string"),
    ],
)
def test_bad_arguments(arguments, message):  # faults 4, 14
    with pytest.raises(ValueError, match=message):
        clip_by_percentile(**arguments)


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(TypeError, match=r"no argument 'percentil': did you mean 'percentile'"):
        clip_by_percentile(percentil=90.0)


@pytest.fixture(scope="module")
def warm():
    return train(_norms(500), 90.0, 10)[0]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_gradient_is_visible_counted_and_outside_the_window(warm, bad):  # fault 47
    gradient = jnp.array([bad, 100.0])
    updates, after = clip_by_percentile(90.0, min_steps=10).update(gradient, warm)
    np.testing.assert_array_equal(updates, gradient)
    info = norm_info(after)
    assert not np.isfinite(info.last_norm)
    assert (int(info.num_steps), int(info.num_nonfinite)) == (501, 1)
    for field in ("next_threshold", "counts_below", "row_starts", "row_index", "row_length"):
        np.testing.assert_array_equal(getattr(after, field), getattr(warm, field))


@pytest.mark.parametrize("size", [1e30, 3e38])
@pytest.mark.parametrize("count", [3, 4096])
def test_a_huge_finite_gradient_is_scaled_to_the_threshold(warm, size, count):  # fault 48
    updates, _ = clip_by_percentile().update(jnp.full(count, size, jnp.float32), warm)
    np.testing.assert_allclose(updates, float(warm.next_threshold) / np.sqrt(count), rtol=1e-6)


def test_zero_gradients_stay_zero():  # fault 49
    state, (clipped, thresholds) = train(np.zeros(2500, np.float32), 90.0, 10)
    np.testing.assert_array_equal(clipped, np.zeros(2500))
    np.testing.assert_array_equal(thresholds, np.zeros(2500))
    assert int(norm_info(state).num_clipped) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_is_clipped_to_the_threshold(warm, dtype):
    # Faults 50 and 51, with squares beyond float16.
    gradient = jnp.full(4, 60000.0, dtype)
    update = jax.jit(lambda p: clip_by_percentile(p, min_steps=10).update(gradient, warm))
    updates, after = update(75.0)
    assert updates.dtype == dtype
    np.testing.assert_allclose(updates.astype(jnp.float32), warm.next_threshold / 2, rtol=4e-3)
    np.testing.assert_allclose(after.norm_record.last_norm, 2 * float(gradient[0]), rtol=1e-6)


def test_float64_gradients_under_x64():
    with jax.enable_x64(True):
        tx = clip_by_percentile(90.0, min_steps=1)
        state = tx.init(jnp.zeros(2, jnp.float64))
        _, state = tx.update(jnp.array([0.6, 0.8], jnp.float64), state)
        updates, after = tx.update(jnp.array([0.0, 1e200], jnp.float64), state)
        np.testing.assert_allclose(updates, [0.0, float(state.next_threshold)], rtol=1e-12)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


# Properties.

some_norms = st.lists(st.floats(2**-20, 2**10, width=32), min_size=12, max_size=12)
thresholds_of = jax.jit(jax.vmap(lambda norms, q: _train(norms, q, 1)[0].next_threshold, (None, 0)))


@hypothesis.given(some_norms, st.lists(st.floats(0.5, 100.0), min_size=4, max_size=4))
def test_the_threshold_rises_with_the_percentile(norms, percentiles):
    percentiles = np.sort(np.asarray(percentiles, np.float32))
    assert np.all(np.diff(thresholds_of(np.asarray(norms, np.float32), percentiles)) >= 0)


@hypothesis.given(some_norms, st.integers(-10, 10), st.floats(1.0, 99.0))
def test_powers_of_two_scale_threshold_and_updates_alike(norms, power, percentile):
    norms = np.asarray(norms, np.float32)
    scale = np.float32(2.0**power)
    (a, (clipped, _)), (b, (scaled, _)) = (train(x, percentile, 3) for x in (norms, norms * scale))
    np.testing.assert_allclose(b.next_threshold, a.next_threshold * scale, rtol=1e-5)
    np.testing.assert_allclose(scaled, clipped * scale, rtol=1e-5)
    # Never scaled up, and never below the smaller of norm and threshold.
    assert np.all(np.asarray(clipped) <= norms * np.float32(1 + 1e-6))


# Traced, vmapped, sharded, stored.


def test_vmap_over_percentile_and_min_steps_equals_a_loop_with_one_trace():
    traces = []
    norms = _norms(300)

    def run(percentile, min_steps):
        traces.append(None)
        return _train(norms, percentile, min_steps)

    percentiles, steps = np.array([30.0, 90.0, 99.0], np.float32), np.array([1, 50, 200])
    states, (clipped, _) = jax.jit(jax.vmap(run))(percentiles, steps)
    one = jax.jit(run)
    for i in range(3):
        state, (want, _) = one(percentiles[i], steps[i])
        # The threshold is a power of two from -40 to 24: its last digits depend on the compiler.
        np.testing.assert_allclose(clipped[i], want, rtol=5e-6)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=5e-6), states, state
        )
    assert len(traces) == 2
    np.testing.assert_array_equal(norm_info(states).num_steps, [300, 300, 300])


def test_the_state_survives_a_checkpoint_in_the_middle():
    serialization = pytest.importorskip("flax.serialization")
    tx, norms = clip_by_percentile(90.0, min_steps=10), _norms(300)
    update = jax.jit(tx.update)
    state = EMPTY
    for i, norm in enumerate(norms[:140]):
        if i == 130:
            raw = serialization.to_bytes(state)
            back = serialization.from_bytes(tx.init(jnp.zeros(2)), raw)
        _, state = update(norm * DIRECTION, state)
    for norm in norms[130:140]:
        _, back = update(norm * DIRECTION, back)
    jax.tree.map(np.testing.assert_array_equal, back, state)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.test_norms_percentile import _norms, train_many
assert len(jax.devices()) == 8
norms = _norms(8, 300)
mesh = Mesh(jax.devices(), ("trial",))
placed = jax.device_put(norms, NamedSharding(mesh, PartitionSpec("trial")))
got, want = train_many(placed, 90.0, 10), train_many(norms, 90.0, 10)
assert got[0].row_starts.sharding.spec[0] == "trial", got[0].row_starts.sharding
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
"""


def test_trials_sharded_over_eight_devices_equal_those_on_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environment)


# Merging.


def _canonical(state):
    return merge(state, EMPTY)


@pytest.mark.parametrize("steps", [5, 130, 1000, 1200])
def test_streams_side_by_side_merge_into_the_window_of_all(steps):
    norms = _norms(3, steps)
    states, _ = train_many(norms, 90.0, 10)
    a, b, c = (jax.tree.map(lambda x, i=i: x[i], states) for i in range(3))
    merged = merge(merge(a, b), c)
    jax.tree.map(np.testing.assert_array_equal, merged, merge(a, merge(b, c)))
    jax.tree.map(np.testing.assert_array_equal, merged, merge(c, merge(b, a)))
    window = np.concatenate([_window(row) for row in norms])
    counts = _histogram_of(window)
    held = merged.counts_below - merged.row_starts[(int(merged.row_index) + 1) % 8]
    np.testing.assert_array_equal(np.diff(held, prepend=0), counts)
    assert int(norm_info(merged).num_steps) == 3 * steps
    np.testing.assert_array_equal(norm_info(merged).max_norm, norms.max())
    # One more step: the threshold is that of all three streams.
    _, after = clip_by_percentile(77.7, min_steps=10).update(norms[0, 0] * DIRECTION, merged)
    if steps % 120:
        counts = _histogram_of(np.append(window, norms[0, 0]))
        np.testing.assert_allclose(
            after.next_threshold, _histogram.percentile(counts, 77.7), rtol=1e-5
        )


def test_an_empty_state_changes_nothing_and_leading_axes_stay():
    state, _ = train(_norms(1100), 90.0, 10)
    jax.tree.map(np.testing.assert_array_equal, _canonical(_canonical(state)), _canonical(state))
    tx = clip_by_percentile(90.0, min_steps=10)
    one, other = state, _canonical(state)
    update = jax.jit(tx.update)
    for norm in _norms(150, seed=2):
        _, one = update(norm * DIRECTION, one)
        _, other = update(norm * DIRECTION, other)
        assert float(one.next_threshold) == float(other.next_threshold)
    many, _ = train_many(_norms(3, 300), 90.0, 10)
    both = jax.jit(merge)(many, many)
    single = jax.tree.map(lambda x: x[1], many)
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.map(lambda x: x[1], both), merge(single, single)
    )


def test_records_merge_by_adding_counts_and_keep_nan_visible():
    a, b = init_record("x"), init_record("x")
    for norm in (1.0, 9.0):
        a = update_record(a, norm, 4.0)
    b = update_record(b, np.nan, 2.0)
    for info in (record_info(merge(a, b)), record_info(merge(b, a))):
        assert (int(info.num_steps), int(info.num_clipped), int(info.num_nonfinite)) == (3, 1, 1)
        assert (float(info.max_norm), float(info.threshold), int(info.counts.sum())) == (9, 4, 2)
        assert np.isnan(info.last_norm)


def test_states_that_do_not_belong_together_do_not_merge():
    with pytest.raises(ValueError, match=r"records of one name, got 'a' and 'b'"):
        merge(init_record("a"), init_record("b"))
    with pytest.raises(ValueError, match=r"two NormRecordState or two .* and PercentileClipState"):
        merge(init_record("clip_by_percentile"), EMPTY)
    with pytest.raises(ValueError, match=r"got tuple and tuple"):
        merge((), ())


# Gradients of zeros -------------------------------------------------------------------------------


def losses_with_gradients_every(nth, q=90.0, num_steps=2000):
    """w of a quadratic that every n-th step trains, the others giving exact zeros."""
    tx = optax.chain(norms.clip_by_percentile(q), optax.sgd(0.1))

    def step(carry, i):
        weights, state = carry
        grads = jnp.where(i % nth == 0, weights, 0.0)
        updates, state = tx.update(grads, state, weights)
        return (weights + updates, state), weights[0]

    start = (jnp.ones(4), tx.init(jnp.ones(4)))
    (weights, state), _ = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(num_steps)))()
    return float(weights[0]), norms.norm_info(state)


@pytest.mark.parametrize("nth", [1, 5, 10, 11, 20])
def test_zero_gradients_do_not_stop_training(nth):
    weight, info = losses_with_gradients_every(nth)
    # Every update is at least as large as the same share of w allows: w falls as without clipping,
    # or somewhat slower where its own norms shrink, and never stops.
    assert weight < 0.9 ** (0.5 * 2000 / nth)
    assert int(info.num_steps) == 2000
    assert int(info.counts.sum()) == 2000
    # The threshold is of the size of the gradients that there were.
    assert float(info.threshold) >= 0.1 * 2 * weight


def test_a_frozen_phase_costs_no_update():
    tx = norms.clip_by_percentile(90.0)
    grads = jnp.ones(4)

    def step(state, i):
        updates, state = tx.update(jnp.where(i < 900, 0.0, 1.0) * grads, state)
        return state, updates[0]

    _, updates = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(1500)))(tx.init(grads))
    # Within a bin of the histogram all norms are equal.
    assert (updates[900:] > 0.8).all()


def test_counters_of_norms_saturate():
    full = jnp.int32(2**31 - 1)
    record = norms.init_record("full")._replace(num_norms=full, num_clipped=full)
    record = record._replace(norm_counts=jnp.full(256, full), num_nonfinite=full)
    after = norms.update_record(record, 2.0, 1.0)
    for now in (after, norms.update_record(after, jnp.inf), norms.merge(record, record)):
        for name in ("num_norms", "num_clipped", "num_nonfinite", "norm_counts"):
            assert (getattr(now, name) == full).all()


def test_a_fraction_of_a_step_is_rounded_as_a_warm_up_is():
    @jax.jit
    def updates(num_steps):
        seen = []
        for tx in (norms.clip_until(1.0, num_steps), learning_rate.scale_by_warmup(num_steps)):
            state = tx.init(jnp.ones(1))
            for _ in range(6):
                update, state = tx.update(jnp.full(1, 5.0), state)
                seen.append(update[0])
        return jnp.stack(seen).reshape(2, 6)

    for value in (2.4, 2.5, 2.6, 3.5):
        clipped, warmed = updates(jnp.float32(value)) < 5.0
        assert clipped.sum() == warmed.sum() == round(value)
