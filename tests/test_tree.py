"""Pytree helpers: the norm over the whole float range, selection, checks that name a path."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from playbook_optax import _tree

norm = jax.jit(_tree.global_norm)
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def _reference(tree):
    return math.sqrt(
        math.fsum(float(x) ** 2 for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf))
    )


def test_norm_of_a_known_tree():
    assert float(norm({"a": jnp.array([3.0]), "b": jnp.array([[0.0, 4.0]]), "c": None})) == 5.0


@pytest.mark.parametrize("exponent", [-55, -40, -20, 0, 20, 43, 44, 45, 60, 100, 120])
@pytest.mark.parametrize("size", [1, 7, 128, 1003])
def test_norm_over_the_range_of_float32(exponent, size):
    values = np.ldexp(np.random.default_rng(size).uniform(0.5, 1, size), exponent)
    values = values.astype(np.float32)
    np.testing.assert_allclose(norm(values), _reference(values), rtol=3e-7)


@hypothesis.given(
    hnp.arrays(
        np.float32,
        (5,),
        elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False),
    )
)
def test_norm_of_leaves_of_very_different_size(values):
    want = min(_reference(values), float(np.finfo(np.float32).max))
    hypothesis.assume(want == 0 or want > 1e-17)
    np.testing.assert_allclose(norm({"a": values[:2], "b": values[2:]}), want, rtol=3e-7)


def test_norm_of_many_elements_keeps_its_digits():
    values = np.random.default_rng(0).normal(size=2**18 + 5).astype(np.float32)
    want = np.linalg.norm(values.astype(np.float64))
    np.testing.assert_allclose(norm(values), want, rtol=3e-7)


@pytest.mark.parametrize("shape", [(127,), (128,), (129,), (8, 17), (3, 5, 7, 11), (1, 1, 2048)])
def test_no_element_is_left_out_of_the_norm(shape):
    # Powers of two of which every subset has its own sum would not fit: one element at a time.
    size = math.prod(shape)
    some = np.unique(np.linspace(0, size - 1, 40).astype(int))
    one = np.eye(size, dtype=np.float32)[some].reshape(-1, *shape)
    np.testing.assert_array_equal(jax.vmap(norm)(jnp.asarray(one)), np.ones(len(some)))


@pytest.mark.parametrize("bad", [None, np.nan])
def test_many_leaves_are_none_left_out(bad):
    rng = np.random.default_rng(5)
    sizes = [*range(1, 30), 5000]
    tree = [rng.normal(size=size).astype(np.float32) for size in sizes]
    tree.append(rng.normal(size=7).astype(np.float16))
    np.testing.assert_allclose(norm(tree), _reference(tree), rtol=3e-7)
    if bad is not None:
        for leaf in tree:
            kept, leaf[-1] = leaf[-1], bad
            assert not np.isfinite(norm(tree))
            assert not _tree.all_finite(tree)
            leaf[-1] = kept
    assert _tree.all_finite(tree)


def test_zero_empty_and_zero_size_trees_have_norm_zero():
    for tree in (jnp.zeros(300), {}, {"a": None}, jnp.zeros((0, 3))):
        assert float(norm(tree)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [3, 1000])
def test_a_bad_element_gives_a_norm_that_is_not_finite(bad, size):
    values = np.full(size, 1e30, np.float32)
    values[size // 2] = bad
    assert not np.isfinite(norm(values))


def test_a_norm_beyond_the_dtype_is_its_largest_number_and_the_pair_still_knows_it():
    values = jnp.full(10_000, 3e38)
    assert float(norm(values)) == float(np.finfo(np.float32).max)
    scaled, scale = _tree.scaled_global_norm(values)
    np.testing.assert_allclose(float(scaled) / float(scale), 3e40, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_norm_of_half_precision_is_float32(dtype):
    values = np.random.default_rng(1).uniform(100, 200, 5000).astype(dtype)
    got = norm(values)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, _reference(values), rtol=3e-7)


@pytest.mark.parametrize("size", [1e-100, 1.0, 1e300])
def test_norm_of_float64(size):
    with enable_x64(True):
        got = _tree.global_norm({"a": jnp.full(1000, size, jnp.float64), "b": jnp.zeros(3)})
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, size * math.sqrt(1000), rtol=1e-14)


def test_vmapped_norm_equals_a_loop():
    tree = {"a": jnp.asarray(np.random.default_rng(2).normal(size=(4, 37, 20)), jnp.float32)}
    scaled = {"a": tree["a"] * jnp.array([1e-10, 1.0, 1e20, 1e37])[:, None, None]}
    many = jax.jit(jax.vmap(_tree.global_norm))(scaled)
    one = [norm({"a": leaf}) for leaf in scaled["a"]]
    np.testing.assert_allclose(many, one, rtol=3e-7)


def test_norm_of_an_explicitly_sharded_leaf():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    leaf = jax.device_put(jnp.ones((32, 8)), sharding)
    np.testing.assert_allclose(norm(leaf), 16.0, rtol=1e-6)


def test_select_keeps_the_other_side_out():  # fault 46
    good = {"a": jnp.ones((2, 3)), "b": jnp.asarray(1, jnp.int32)}
    bad = {"a": jnp.full((2, 3), jnp.nan), "b": jnp.asarray(9, jnp.int32)}
    chosen = jax.jit(_tree.select)(jnp.asarray(True), good, bad)
    jax.tree.map(np.testing.assert_array_equal, chosen, good)
    assert np.isnan(_tree.select(jnp.asarray(False), good, bad)["a"]).all()
    both = jax.vmap(_tree.select, in_axes=(0, None, None))(jnp.array([True, False]), good, bad)
    np.testing.assert_array_equal(both["b"], [1, 9])


@pytest.mark.parametrize(
    ("tree", "want"),
    [
        ({"a": np.ones(2), "n": np.array([1])}, True),
        ({"a": np.ones(2), "b": np.array([1, np.nan])}, False),
        ({"a": np.array([-np.inf])}, False),
        ({"n": np.array([2**31 - 1])}, True),
        ({}, True),
    ],
)
def test_all_finite(tree, want):
    assert bool(_tree.all_finite(tree)) is want


def test_cast_like_and_moment_dtype():
    got = _tree.cast_like({"a": jnp.ones(2)}, {"a": jnp.zeros(2, jnp.bfloat16)})
    assert got["a"].dtype == jnp.bfloat16
    assert [jnp.dtype(_tree.moment_dtype(d)) for d in (jnp.bfloat16, np.float16, np.float32)] == [
        jnp.dtype(np.float32)
    ] * 3
    assert jnp.dtype(_tree.moment_dtype(np.float64)) == jnp.dtype(np.float64)


def test_path_name():
    ((path, _),) = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 1.0}]})
    assert _tree.path_name(path) == "layers/0/kernel"
    assert _tree.path_name(()) == "(root)"


def test_check_params_accepts_what_has_a_gradient():
    _tree.check_params({"a": jnp.ones(2), "b": None, "c": np.zeros((0, 3)), "d": 1.0})
    _tree.check_params({"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.arange(3), r"weights leaf 'net/n' has dtype int\d+.*Mask it \(optax.masked\)"),
        (np.array(True), r"weights leaf 'net/n' has dtype bool"),
        (np.ones(2, np.complex64), r"weights leaf 'net/n' has dtype complex64"),
        ("relu", r"weights leaf 'net/n' is not an array but 'relu' of type str"),
    ],
)
def test_check_params_names_the_leaf(leaf, message):  # faults 25, 26
    with pytest.raises(ValueError, match=message):
        _tree.check_params({"net": {"n": leaf}}, what="weights")


def test_check_matching_names_the_leaf():  # fault 30
    reference = {"a": jnp.zeros((3, 1)), "b": jnp.zeros(2)}
    _tree.check_matching(reference, reference, what="the moments")
    with pytest.raises(ValueError, match=r"leaf 'a' has shape \(3,\) but the moments has \(3, 1\)"):
        _tree.check_matching({"a": jnp.zeros(3), "b": jnp.zeros(2)}, reference, what="the moments")
    with pytest.raises(ValueError, match=r"only in the gradients \['c'\].* \['a', 'b'\]"):
        _tree.check_matching({"c": jnp.zeros(3)}, reference, what="the moments")
