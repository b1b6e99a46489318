"""The log-histogram: exact bins, exact counts, percentiles against NumPy's."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from playbook_optax import _histogram

EDGES = _histogram.edges()
percentile = jax.jit(_histogram.percentile)


@jax.jit
def count(values):
    return jax.lax.scan(
        lambda c, v: (_histogram.add(c, v), None), jnp.zeros(_histogram.NUM_BINS, jnp.int32), values
    )[0]


def test_edges_are_ascending_octaves():
    assert EDGES.dtype == np.float32
    assert EDGES.shape == (257,)
    np.testing.assert_array_equal(EDGES[::4], 2.0 ** np.arange(-40, 25))
    np.testing.assert_allclose(EDGES[1:] / EDGES[:-1], 2**0.25, rtol=3e-7)


def test_a_value_on_an_edge_falls_into_the_bin_above_it():
    np.testing.assert_array_equal(_histogram.bin_index(EDGES[:-1]), np.arange(256))
    below = np.nextafter(EDGES, np.float32(0))
    np.testing.assert_array_equal(_histogram.bin_index(below[1:]), np.arange(256))


@pytest.mark.parametrize(
    ("value", "index"),
    [(0.0, 0), (-1.0, 0), (1e-45, 0), (1e-20, 0), (1.0, 160), (2.0**24, 255), (3e38, 255)],
)
def test_values_outside_the_edges_go_to_the_outer_bins(value, index):
    assert int(_histogram.bin_index(value)) == index
    assert int(count(jnp.full(1, value))[index]) == 1


@hypothesis.given(st.floats(min_value=2.0**-40, max_value=2.0**24, exclude_max=True, width=32))
def test_bins_agree_with_a_search_among_the_edges(value):
    want = np.searchsorted(EDGES, np.float32(value), side="right") - 1
    assert int(_histogram.bin_index(value)) == want


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_in_no_bin(value):
    assert int(count(jnp.full(1, value)).sum()) == 0


def test_counts_equal_numpys_histogram():
    values = np.random.default_rng(0).lognormal(0, 3, 5000).astype(np.float32)
    counts = count(values)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.histogram(values, EDGES)[0])


@pytest.mark.parametrize("q", [1, 10, 50, 90, 99])
def test_percentiles_are_within_a_bin_of_numpys(q):
    values = np.random.default_rng(1).lognormal(0, 1, 5000).astype(np.float32)
    ratio = float(percentile(count(values), q)) / np.percentile(values, q)
    assert 2**-0.25 < ratio < 2**0.25
    # Log-linear interpolation does far better than the width of a bin where the data are dense.
    if 10 <= q <= 90:
        assert abs(np.log2(ratio)) < 0.05


def test_percentile_is_log_linear_inside_a_bin_and_skips_empty_ones():
    counts = np.zeros(256, np.int32)
    counts[100] = 1
    counts[200] = 3
    low, high = EDGES[200].astype(np.float64), EDGES[201].astype(np.float64)
    for q, want in [(0, EDGES[100]), (25, EDGES[101]), (62.5, np.sqrt(low * high)), (100, high)]:
        np.testing.assert_allclose(_histogram.percentile(counts, q), want, rtol=1e-6)
        np.testing.assert_allclose(percentile(counts, q), want, rtol=2e-6)


def test_host_and_device_agree_on_leading_axes_and_empty_histograms():
    counts = np.random.default_rng(2).integers(0, 3, (2, 3, 256)).astype(np.int32)
    counts[1, 2] = 0
    host = _histogram.percentile(counts, 90)
    device = percentile(jnp.asarray(counts), 90)
    assert isinstance(host, np.ndarray)
    assert host.shape == device.shape == (2, 3)
    assert np.isnan(host[1, 2])
    assert np.isnan(device[1, 2])
    np.testing.assert_allclose(device, host, rtol=1e-5)
    many = jax.vmap(jax.vmap(lambda c: _histogram.percentile(c, 90.0)))(jnp.asarray(counts))
    np.testing.assert_array_equal(many, device)


def test_q_may_be_vmapped_and_is_monotone():
    counts = count(np.random.default_rng(3).lognormal(0, 2, 500).astype(np.float32))
    values = jax.vmap(_histogram.percentile, (None, 0))(counts, jnp.linspace(0, 100, 101))
    assert bool(jnp.all(jnp.diff(values) >= 0))


def test_large_counts_stay_exact():
    counts = np.zeros(256, np.int32)
    counts[[10, 20]] = 2**30 - 1
    np.testing.assert_allclose(percentile(counts, 50), EDGES[11], rtol=1e-6)


@pytest.mark.parametrize("q", [-1, 101, np.nan])
def test_concrete_bad_q_is_an_error(q):
    with pytest.raises(ValueError, match=r"q must be"):
        _histogram.percentile(np.zeros(256, np.int32), q)


def test_wrong_number_of_bins_is_an_error():
    with pytest.raises(ValueError, match=r"256 bins on the last axis, got shape \(10,\)"):
        _histogram.percentile(np.zeros(10, np.int32), 50)
