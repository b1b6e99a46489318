"""Halton and uniform points: closed forms, exactness, identity of points, discrepancy, golden."""

import functools
import json
import pathlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from playbook_optax import samplers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "points.json"
KEY = jax.random.key(7)
SAMPLERS = {
    "owen": samplers.halton,
    "shift": lambda *a, **k: samplers.halton(*a, scramble="shift", **k),
    "none": lambda *a, **k: samplers.halton(*a, scramble="none", **k),
    "uniform": samplers.uniform,
}
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def radical_inverse(index, base):
    value, weight = Fraction(0), Fraction(1)
    while index:
        weight /= base
        index, digit = divmod(index, base)
        value += digit * weight
    return value


def nearest_float32_below_one(value):
    # Python's float(Fraction) is correctly rounded to 53 bits; ties at 24 bits cannot occur by
    # double rounding, because the values are odd-base fractions or have at most 31 bits.
    return min(np.float32(float(value)), np.float32(1 - 2**-24))


def keys(num):
    return jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(num))


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def compiled(sampler):
    """The sampler on its compiled path, which a traced start takes."""

    def sample(key, num_points, num_dims, start=0, **kwargs):
        run = jax.jit(lambda key, start: sampler(key, num_points, num_dims, start=start, **kwargs))
        return run(key, jnp.uint32(start))

    return sample


BOTH_PATHS = pytest.mark.parametrize(
    "halton", [samplers.halton, compiled(samplers.halton)], ids=["host", "compiled"]
)


@BOTH_PATHS
@pytest.mark.parametrize("num_points", [100, 3000])
def test_unscrambled_equals_scipy_to_the_bit(halton, num_points):
    ours = halton(KEY, num_points, 16, scramble="none")
    theirs = qmc.Halton(16, scramble=False).random(num_points)
    assert ours.dtype == jnp.float32
    same(ours, theirs.astype(np.float32))


@pytest.mark.parametrize("start", [0, 2**24 - 3, 2**30 - 1, 3**18 - 1, 5**13, 2**31 - 64])
def test_unscrambled_is_exact_for_every_index(start):
    points = np.asarray(samplers.halton(KEY, 64, 6, start=start, scramble="none"))
    for j, base in enumerate([2, 3, 5, 7, 11, 13]):
        want = [nearest_float32_below_one(radical_inverse(start + i, base)) for i in range(64)]
        same(points[:, j], np.array(want))


@BOTH_PATHS
def test_long_runs_are_exact_up_to_the_last_index(halton):
    start = 2**31 - 2000
    points = np.asarray(halton(KEY, 2000, 3, start=start, scramble="none"))
    for j, base in enumerate([2, 3, 5]):
        want = [nearest_float32_below_one(radical_inverse(start + i, base)) for i in range(2000)]
        same(points[:, j], np.array(want))


@pytest.mark.parametrize("scramble", ["owen", "shift"])
def test_every_digit_goes_through_one_permutation(scramble):
    # Digit t of point i is a function of digit t of i alone, and that function is a bijection.
    start, num = 2**20, 2000
    points = np.asarray(samplers.halton(KEY, num, 4, start=start, scramble=scramble), np.float64)
    first = np.asarray(samplers.halton(KEY, 343, 4, scramble=scramble), np.float64)
    for j, base in enumerate([2, 3, 5, 7]):
        for digit in range(3):
            seen = {}
            for index, x in [*enumerate(first[:, j]), *enumerate(points[:, j], start)]:
                into, out = index // base**digit % base, int(x * base ** (digit + 1)) % base
                assert seen.setdefault(into, out) == out
            assert sorted(seen) == sorted(seen.values()) == list(range(base))


def test_shift_adds_one_number_to_a_digit():
    x = np.asarray(samplers.halton(KEY, 7**2, 4, scramble="shift"), np.float64)[:, 3]
    for digit in range(2):
        index = np.arange(49) // 7**digit % 7
        out = (x * 7 ** (digit + 1)).astype(int) % 7
        assert len(set((out - index) % 7)) == 1


@pytest.mark.parametrize("scramble", ["owen", "shift", "none"])
@pytest.mark.parametrize("start", [0, 36])
def test_each_stratum_is_hit_once(scramble, start):
    points = np.asarray(samplers.halton(KEY, 3600, 3, start * 900, scramble=scramble), np.float64)
    for j, base in enumerate([2, 3, 5]):
        for k in range(1, 6):
            n = base**k
            if n > 3600 or (start * 900) % n:
                continue
            # Half a unit of float32 is given back, so that k/n rounded down stays in stratum k.
            strata = np.floor((points[:n, j] + 2**-25) * n)
            same(np.sort(strata), np.arange(n))


def test_permutations_are_uniform_and_independent():
    first = jax.vmap(lambda k: samplers.halton(k, 3, 2))(keys(1200))
    digits = np.floor(np.asarray(first, np.float64)[:, :, 1] * 3).astype(int)
    orders, counts = np.unique(digits, axis=0, return_counts=True)
    assert len(orders) == 6
    # chi-square with 5 degrees of freedom: 20.5 has probability 0.001
    assert ((counts - 200) ** 2 / 200).sum() < 20.5
    # The first two digits of base 2, and those of base 2 and base 3, are independent fair coins.
    bits = np.floor(np.asarray(first, np.float64)[:, 0, 0] * 4).astype(int)
    counts = np.bincount(bits, minlength=4)
    assert ((counts - 300) ** 2 / 300).sum() < 16.3
    both = np.bincount((bits // 2) * 3 + digits[:, 0], minlength=6)
    assert ((both - 200) ** 2 / 200).sum() < 20.5


@ALL
def test_moments_and_range(sampler):
    points = np.asarray(sampler(KEY, 1500, 6), np.float64)
    assert points.min() >= 0
    assert points.max() < 1
    # Four standard errors of 1500 independent points; Halton is far inside.
    assert abs(points.mean(0) - 1 / 2).max() < 4 * (1 / 12 / 1500) ** 0.5
    assert abs((points**2).mean(0) - 1 / 3).max() < 4 * (4 / 45 / 1500) ** 0.5
    correlation = np.corrcoef(points.T) - np.eye(6)
    assert abs(correlation).max() < 4 / 1500**0.5


@ALL
def test_largest_values_stay_below_one(sampler):
    # Base 2, all ones: 1 - 2**-31 rounds to 1 in float32.
    assert float(jnp.max(sampler(KEY, 64, 3, start=2**31 - 64))) < 1
    last = samplers.halton(KEY, 1, 1, start=2**31 - 1, scramble="none")
    assert float(last[0, 0]) == 1 - 2**-24


@ALL
@given(data=st.data())
def test_point_depends_on_key_index_and_dimension_alone(sampler, data):
    whole = np.asarray(compiled(sampler)(KEY, 1500, 6))
    num = data.draw(st.sampled_from([1, 1400]))
    dims = data.draw(st.sampled_from([3, 6]))
    start = data.draw(st.integers(0, 1500 - num))
    same(sampler(KEY, num, dims, start=start), whole[start : start + num, :dims])


@ALL
def test_added_dimensions_change_nothing_whatever_the_table(sampler):
    # Above 31 dimensions the tables of a long run have another size.
    same(compiled(sampler)(KEY, 600, 33)[:, :6], compiled(sampler)(KEY, 1500, 6)[:600])


@pytest.mark.parametrize(
    ("sampler", "num_points"),
    [*((sampler, 64) for sampler in SAMPLERS.values()), (samplers.halton, 600)],
)
def test_jit_and_vmap_give_the_same_bits(sampler, num_points):
    want = sampler(KEY, num_points, 3, start=10)
    run = jax.jit(lambda key, start: sampler(key, num_points, 3, start=start))
    same(run(KEY, 10), want)
    same(run(KEY, jnp.int32(10)), want)
    many = jax.vmap(lambda key: sampler(key, num_points, 3, start=10))(keys(4))
    for i in range(4):
        same(many[i], sampler(keys(4)[i], num_points, 3, start=10))


@ALL
def test_one_trace_for_all_starts(sampler):
    traces = []

    @jax.jit
    def run(key, start):
        traces.append(start)
        return sampler(key, 64, 3, start=start)

    same(run(KEY, 0)[5:], run(KEY, 5)[:-5])
    assert len(traces) == 1


@ALL
@pytest.mark.parametrize(
    ("num_points", "num_dims"),
    [(64, 12), (1000, 12), (64, 100)],
)
def test_numpy_and_the_compiled_path_give_the_same_bits(sampler, num_points, num_dims):
    run = jax.jit(lambda key, start: sampler(key, num_points, num_dims, start=start))
    for key, start in [(KEY, 0), (KEY, 54321), (jax.random.key(2**32 - 1), 2**31 - num_points)]:
        want = run(key, start)
        for num in {1, 7, num_points}:
            for dims in {*range(1, 13), num_dims}:
                same(sampler(key, num, dims, start=start), want[:num, :dims])


@ALL
@given(words=st.tuples(*2 * [st.integers(0, 2**32 - 1)]), start=st.integers(0, 2**31 - 8))
def test_any_key_and_start_give_the_same_bits(sampler, words, start):
    key = jax.random.wrap_key_data(np.array(words, np.uint32), impl="threefry2x32")
    same(sampler(key, 8, 3, start=start), _any_key(sampler)(key, start))


@functools.cache
def _any_key(sampler):
    return jax.jit(lambda key, start: sampler(key, 8, 3, start=start))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
def test_another_generator_gives_the_same_bits(sampler, impl):
    key = jax.random.key(5, impl=impl)
    want = compiled(sampler)(key, 16, 2)
    same(sampler(key, 16, 2), want)
    with jax.default_prng_impl(impl):
        same(sampler(jax.random.key_data(key), 16, 2), want)


@pytest.mark.parametrize("partitionable", [False, True])
def test_points_do_not_depend_on_how_threefry_is_partitioned(partitionable):
    want = samplers.halton(KEY, 16, 2)
    with jax.threefry_partitionable(partitionable):
        same(samplers.halton(KEY, 16, 2), want)
        same(compiled(samplers.halton)(KEY, 16, 2), want)


@ALL
def test_a_known_key_inside_a_program_gives_the_same_bits(sampler):
    same(jax.jit(lambda scale: sampler(KEY, 64, 3) * scale)(1.0), sampler(KEY, 64, 3))


@pytest.mark.parametrize("num_dims", [256, 257])
def test_both_sides_of_the_largest_number_of_dimensions_computed_in_numpy(num_dims):
    points = np.asarray(samplers.halton(KEY, 8, num_dims))
    same(points[:, :12], samplers.halton(KEY, 8, 12))
    assert len(np.unique(points[:, 200:])) > 8 * 50


def test_no_key_is_needed_without_randomness():
    same(samplers.halton(None, 4, 2, scramble="none"), samplers.halton(KEY, 4, 2, scramble="none"))


@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
def test_several_keys_at_once_are_refused(sampler):
    with pytest.raises(ValueError, match="single key"):
        sampler(keys(3), 4, 2)


@ALL
def test_raw_keys_and_x64_give_the_same_bits(sampler):
    want = sampler(jax.random.key(3), 64, 3)
    same(sampler(jax.random.PRNGKey(3), 64, 3), want)
    with jax.enable_x64(True):
        wide = sampler(jax.random.key(3), 64, 3)
    assert wide.dtype == jnp.float32
    same(wide, want)


@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
def test_another_generator_keeps_keys_apart_under_vmap(sampler):
    base = jax.random.key(0, impl="rbg")
    several = jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.arange(3))
    many = jax.vmap(lambda key: sampler(key, 16, 2))(several)
    for i in range(3):
        same(many[i], sampler(several[i], 16, 2))
    assert len(np.unique(np.asarray(many))) > 60


def mean_discrepancies(dim, num, seeds):
    ours = jax.vmap(lambda key: samplers.halton(key, num, dim))(keys(seeds))
    ours = [qmc.discrepancy(x) for x in np.asarray(ours, np.float64)]
    theirs = [
        qmc.discrepancy(qmc.Halton(dim, scramble=True, rng=s).random(num)) for s in range(seeds)
    ]
    return np.mean(ours), np.mean(theirs)


@pytest.mark.parametrize(("dim", "num", "seeds"), [(2, 64, 400), (4, 64, 300), (16, 16, 300)])
def test_discrepancy_equals_owen_scrambling(dim, num, seeds):
    ours, theirs = mean_discrepancies(dim, num, seeds)
    assert ours == pytest.approx(theirs, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "seeds"), [(16, 2000), (64, 1500), (256, 600), (512, 300), (1024, 200)]
)
def test_discrepancy_equals_owen_scrambling_everywhere(num, seeds):
    for dim in (2, 4, 16):
        ours, theirs = mean_discrepancies(dim, num, seeds)
        assert ours == pytest.approx(theirs, rel=0.10), dim


def golden_points():
    return {
        f"{name} n={num} d={dim} start={start}": [
            [float(x).hex() for x in row]
            for row in np.asarray(sampler(jax.random.key(0), num, dim, start=start), np.float64)
        ]
        for name, sampler in SAMPLERS.items()
        for num, dim, start in [(8, 4, 0), (8, 4, 2**31 - 8)]
    }


def test_points_are_those_of_the_golden_file():
    # To write it anew, on purpose: python -m tests.test_samplers --regenerate
    assert golden_points() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_points": 0}, "num_points must be >= 1 .* got 0"),
        ({"num_points": 2.0}, "num_points must be an integer, got 2.0"),
        ({"num_points": True}, "num_points must be an integer, got True"),
        ({"num_dims": 0}, "num_dims must be >= 1 .* got 0"),
        ({"num_dims": 1001}, "num_dims must be <= 1000, got 1001"),
        ({"start": -1}, "start must be >= 0 .* got start = -1"),
        ({"start": 2**31 - 3}, r"start \+ num_points <= 2\*\*31"),
        ({"start": 1.0}, "start must be an integer, got 1.0"),
        ({"start": True}, "start must be an integer, got True"),
        ({"start": np.arange(2)}, r"start must be a scalar, got shape \(2,\)"),
        ({"nm_points": 3}, "'nm_points': did you mean 'num_points'"),
    ],
)
def test_bad_arguments_say_what_to_do(sampler, arguments, match):
    good = {"num_points": 4, "num_dims": 2}
    with pytest.raises((ValueError, TypeError), match=match):
        sampler(KEY, **{**good, **arguments})


def test_unknown_scramble_names_the_nearest():
    with pytest.raises(ValueError, match="scramble = 'own' is unknown: did you mean 'owen'"):
        samplers.halton(KEY, 4, 2, scramble="own")


if __name__ == "__main__":
    import sys

    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python -m tests.test_samplers --regenerate")
    GOLDEN.write_text(json.dumps(golden_points(), indent=1) + "\n")
