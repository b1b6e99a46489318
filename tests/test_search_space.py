"""Search spaces: bounds, scales, exact integers, identity of points, faults, serialization."""

import copy
import json
import math
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from playbook_optax import samplers
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

KEY = jax.random.key(3)
SPACE = SearchSpace(
    {
        "learning_rate": Float(1e-5, 10.0, scale="log"),
        "b1": Float(0.5, 0.9999, scale="reverse_log"),
        "smoothing": Float(-0.1, 0.3),
        "warmup_steps": Integer(10, 10_000, scale="log", include_zero=True),
        "layers": Integer(-2, 5),
        "batch": Categorical([16, 64, 256]),
        "dropout": Categorical([0, 0.1, 0.5]),
        "decay": Categorical(["cosine", "linear", None, True]),
    }
)
# One length everywhere, so that every parameter compiles once.
UNIT = np.concatenate(
    [
        np.linspace(0, 1, 500),
        np.random.default_rng(0).random(495),
        [2**-24, 2**-40, 1e-30, 1 - 2**-24, 0.5],
    ]
).astype(np.float32)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))
        assert a[name].dtype == b[name].dtype


def reference(parameter, unit):
    """Float64 values of a Float at unit positions."""
    low, high, u = parameter.low, parameter.high, unit.astype(np.float64)
    if parameter.scale == "linear":
        return low + u * (high - low)
    if parameter.scale == "log":
        return np.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return 1 - np.exp(math.log(1 - low) + u * (math.log(1 - high) - math.log(1 - low)))


FLOATS = [
    Float(0.0, 1.0),
    Float(-0.3, 1.4),
    Float(-1e38, 1e38),
    Float(1.0, 1.0 + 2**-22),
    Float(1.2e-38, 3e-38),
    Float(1e-5, 10.0, scale="log"),
    Float(1.2e-38, 3.4e38, scale="log"),
    Float(0.1, 0.1000001, scale="log"),
    Float(0.9, 0.999, scale="reverse_log"),
    Float(0.0, 1 - 1e-9, scale="reverse_log"),
    Float(-1e6, 0.5, scale="reverse_log"),
]


@pytest.mark.parametrize("parameter", FLOATS, ids=repr)
def test_float_values_follow_the_scale_and_stay_inside(parameter):
    value = parameter.from_unit(UNIT)
    assert value.dtype == jnp.float32
    value = np.asarray(value).astype(np.float64)
    assert value.min() >= parameter.low
    assert value.max() <= parameter.high
    want = reference(parameter, UNIT)
    ulp = 2.0**-23
    if parameter.scale == "log":
        np.testing.assert_allclose(value, want, rtol=2 * ulp)
    elif parameter.scale == "linear":
        atol = 1.5 * ulp * max(abs(parameter.low), abs(parameter.high))
        np.testing.assert_allclose(value, want, rtol=0, atol=atol)
    else:
        # 1 - x has the accuracy of a log scale, and x the rounding of float32 near its size.
        spread = 2 * ulp * (1 - want) + ulp * np.abs(want)
        assert (np.abs(value - want) <= spread).all()
    order = np.argsort(UNIT)
    assert (np.diff(value[order]) >= 0).all()


@given(
    low=st.floats(-1e30, 1e30),
    width=st.floats(1e-3, 1e8),
    scale=st.sampled_from(["linear", "log", "reverse_log"]),
    unit=st.floats(0, 1, width=32),
)
def test_float_bounds_hold_for_any_range(low, width, scale, unit):
    if scale == "log":
        low = abs(low) + 1e-30
    high = low + width * max(1.0, abs(low))
    if scale == "reverse_log":
        low, high = 1 - (1e-9 + width * (1 + abs(low) / 1e30)), 1 - 1e-9
    value = float(Float(low, high, scale).from_unit(np.float32(unit)))
    assert low <= value <= high


def test_bounds_that_float32_cannot_hold_are_not_left():
    parameter = Float(0.1, 0.7)  # float32(0.1) > 0.1, but float32(0.7) < 0.7
    assert float(parameter.from_unit(0.0)) >= 0.1
    assert float(parameter.from_unit(1.0)) <= 0.7
    edge = Float(0.3, 0.9999999999, scale="reverse_log")  # the nearest float32 is 1
    assert float(edge.from_unit(1.0)) == 1 - 2**-24


def test_numbers_that_devices_flush_to_zero_are_left_out():
    assert float(Float(1e-40, 1.0).from_unit(0.0)) == np.finfo(np.float32).tiny
    assert float(Float(-1.0, 1e-40).from_unit(1.0)) == 0.0
    with pytest.raises(ValueError, match="no float32 between"):
        Float(1e-40, 2e-40)


def test_unit_interval_is_the_identity():
    # Below 2**-48 a position counts as 0.
    want = np.where(UNIT < 2.0**-48, 0, UNIT)
    np.testing.assert_array_equal(np.asarray(Float(0, 1).from_unit(UNIT)), want)


@pytest.mark.parametrize(("low", "high"), [(1, 8), (-3, 3), (0, 2**31 - 1), (-(2**31), 2**31 - 2)])
def test_linear_integers_are_exact(low, high):
    got = Integer(low, high).from_unit(UNIT)
    assert got.dtype == jnp.int32
    want = []
    for u in UNIT:
        word = 2**32 - 1 if u == 1 else int(float(u) * 2**32)
        want.append(low + word * (high - low + 1) // 2**32)
    np.testing.assert_array_equal(np.asarray(got), np.array(want))


def test_linear_integers_have_equal_shares():
    points = SearchSpace({"n": Integer(1, 8)}).sample(KEY, 64)["n"]
    np.testing.assert_array_equal(np.bincount(np.asarray(points))[1:], 8)


@pytest.mark.parametrize("parameter", [Integer(1, 100, "log"), Integer(10, 2**31 - 1, "log")])
def test_log_integers_have_the_share_of_their_interval(parameter):
    got = np.asarray(parameter.from_unit(UNIT)).astype(np.int64)
    assert got.min() >= parameter.low
    assert got.max() <= parameter.high
    ends = np.log([parameter.low - 0.5, parameter.high + 0.5])
    real = np.exp(ends[0] + UNIT.astype(np.float64) * (ends[1] - ends[0]))
    # Where rounding is not a matter of the last float32 bits, the value is the nearest integer.
    clear = np.abs(real - np.floor(real) - 0.5) > 4e-7 * real
    assert clear.sum() > 400
    want = np.clip(np.floor(real + 0.5), parameter.low, parameter.high)
    np.testing.assert_allclose(got[clear], want[clear], rtol=3e-7)
    small = clear & (real < 2**20)
    np.testing.assert_array_equal(got[small], want[small])


def test_zero_in_front_has_the_share_of_a_doubling():
    parameter = Integer(10, 10_000, "log", include_zero=True)
    values = np.asarray(parameter.from_unit(UNIT))
    share = math.log(2) / math.log(2 * 10_000.5 / 9.5)
    np.testing.assert_array_equal(values == 0, share > UNIT)
    assert values[values > 0].min() == 10
    assert values.max() == 10_000


def test_categoricals():
    numbers, mixed, words = Categorical([4, 1, 2]), Categorical([0, 0.5]), Categorical(["a", "b"])
    assert numbers.from_unit(UNIT).dtype == jnp.int32
    assert mixed.from_unit(UNIT).dtype == jnp.float32
    assert words.from_unit(UNIT).dtype == jnp.int32
    expected = np.array([4, 1, 2])[np.minimum((UNIT.astype(np.float64) * 3).astype(int), 2)]
    np.testing.assert_array_equal(np.asarray(numbers.from_unit(UNIT)), expected)
    assert set(np.asarray(words.from_unit(UNIT)).tolist()) == {0, 1}
    assert (numbers.label(jnp.int32(1)), mixed.label(np.float32(0.5))) == ("1", "0.5")
    assert words.label(1) == "b"
    assert Categorical([True, False]).labels == ("True", "False")
    assert not Categorical([True, False]).numeric
    assert Categorical([True, False]).codes.tolist() == [1, 0]
    assert Categorical(["a", "b"]).codes.tolist() == [0, 1]
    assert Categorical([jax.nn.relu, jax.nn.tanh]).labels == ("relu", "tanh")
    assert Categorical([np.float32(0.25)]).from_unit(0.7) == 0.25
    with pytest.raises(ValueError, match="value = 3 is not a choice"):
        numbers.label(3)


@pytest.mark.parametrize("parameter", SPACE.values(), ids=SPACE.keys())
def test_to_unit_inverts_from_unit(parameter):
    value = parameter.from_unit(UNIT)
    back = np.asarray(parameter.to_unit(value))
    assert back.dtype == np.float32
    assert back.min() >= 0
    assert back.max() <= 1
    if isinstance(parameter, Float):
        # Near 1 float32 has steps of 2**-24, a 0.0006th of the smallest 1 - x here.
        atol = 1e-4 if parameter.scale == "reverse_log" else 2e-6
        np.testing.assert_allclose(back, UNIT, atol=atol)
    else:
        np.testing.assert_array_equal(np.asarray(parameter.from_unit(back)), np.asarray(value))


@pytest.mark.parametrize("parameter", FLOATS[1:], ids=repr)
def test_to_unit_of_any_float_range_maps_back(parameter):
    value = np.asarray(parameter.from_unit(UNIT)).astype(np.float64)
    again = np.asarray(parameter.from_unit(parameter.to_unit(value))).astype(np.float64)
    size = max(abs(parameter.low), abs(parameter.high))
    if parameter.scale == "linear":
        np.testing.assert_allclose(again, value, rtol=0, atol=4e-7 * size)
    elif parameter.scale == "log":
        np.testing.assert_allclose(again, value, rtol=4e-5)
    else:
        np.testing.assert_allclose(1 - again, 1 - value, rtol=4e-5, atol=2e-7)


def test_categorical_positions_are_centres():
    unit = Categorical([4, 1, 2]).to_unit(jnp.array([4, 1, 2]))
    np.testing.assert_allclose(np.asarray(unit), [1 / 6, 3 / 6, 5 / 6], rtol=1e-6)
    unit = Categorical(["x", "y"]).to_unit(jnp.array([0, 1]))
    np.testing.assert_allclose(np.asarray(unit), [0.25, 0.75])


@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
def test_points_depend_on_key_index_and_dimension_alone(sampler):
    whole = SPACE.sample(KEY, 130, sampler=sampler)
    for num, start in [(1, 0), (1, 57), (7, 3), (64, 66)]:
        part = SPACE.sample(KEY, num, start=start, sampler=sampler)
        same(part, {name: v[start : start + num] for name, v in whole.items()})
    shorter = SearchSpace(list(SPACE.items())[:3]).sample(KEY, 130, sampler=sampler)
    same(shorter, {name: whole[name] for name in shorter})


def test_jit_vmap_and_no_jit_give_the_same_bits():
    want = SPACE.sample(KEY, 130)
    same(jax.jit(lambda key, start: SPACE.sample(key, 130, start=start))(KEY, 0), want)
    used = jax.jit(lambda key: {n: v * 2 for n, v in SPACE.sample(key, 130).items()})(KEY)
    same(used, {n: v * 2 for n, v in want.items()})
    unit = samplers.halton(KEY, 130, len(SPACE))
    same({n: p.from_unit(unit[:, j]) for j, (n, p) in enumerate(SPACE.items())}, want)
    keys = jnp.stack([KEY, jax.random.key(4)])
    many = jax.vmap(lambda key: SPACE.sample(key, 130))(keys)
    same({n: v[0] for n, v in many.items()}, want)
    same({n: v[1] for n, v in many.items()}, SPACE.sample(keys[1], 130))
    same(jax.vmap(SPACE.from_unit)(unit), want)


def test_x64_gives_the_same_bits():
    want = SPACE.sample(KEY, 33)
    with jax.enable_x64(True):
        same(SPACE.sample(KEY, 33), want)


def test_sample_uses_the_key_and_the_sampler_as_they_are():
    space = SearchSpace({"a": Float(0, 1), "b": Float(0, 1)})
    points = space.sample(KEY, 9, start=4)
    unit = samplers.halton(KEY, 9, 2, start=4)
    np.testing.assert_array_equal(np.stack([points["a"], points["b"]], 1), np.asarray(unit))


def test_from_unit_keeps_leading_axes():
    unit = np.linspace(0, 1, 2 * 3 * len(SPACE)).reshape(2, 3, len(SPACE))
    points = SPACE.from_unit(unit)
    assert {v.shape for v in points.values()} == {(2, 3)}
    assert SPACE.to_unit(points).shape == unit.shape


def test_grid():
    space = SearchSpace(
        {
            "lr": Float(1e-4, 1e-1, scale="log"),
            "steps": Integer(1, 1000, "log", include_zero=True),
            "kind": Categorical(["a", "b"]),
        }
    )
    points = space.grid(4)
    assert {v.shape for v in points.values()} == {(4 * 4 * 2,)}
    np.testing.assert_allclose(np.unique(points["lr"]), [1e-4, 1e-3, 1e-2, 1e-1], rtol=1e-6)
    assert sorted(set(np.asarray(points["steps"]).tolist())) == [0, 1, 32, 1000]
    np.testing.assert_array_equal(np.asarray(points["kind"])[:4], [0, 1, 0, 1])
    assert space.grid({"lr": 1, "steps": 2})["lr"].shape == (4,)
    np.testing.assert_allclose(space["lr"].grid(1), [math.sqrt(1e-5)], rtol=1e-6)
    assert Integer(1, 3).grid(10).tolist() == [1, 2, 3]
    assert Float(0.1, 0.7).grid(3)[0] >= 0.1
    reverse = 1 - Float(0.9, 0.999, scale="reverse_log").grid(3).astype(np.float64)
    np.testing.assert_allclose(reverse, [1e-1, 1e-2, 1e-3], rtol=1e-4)
    with pytest.raises(ValueError, match=r"num_per_dimension: no parameter 'lrr'.*'lr'"):
        space.grid({"lrr": 3, "steps": 2})
    with pytest.raises(ValueError, match="no entry for 'steps'"):
        space.grid({"lr": 3})
    with pytest.raises(ValueError, match="num_per_dimension = 3 for a choice among 2"):
        space.grid({"lr": 3, "steps": 2, "kind": 3})
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_per_dimension must be"):
            space.grid(bad)
    with pytest.raises(ValueError, match=r"2\*\*31 points"):
        SearchSpace({str(i): Float(0, 1) for i in range(31)}).grid(2)


def test_space_is_an_ordered_immutable_mapping():
    assert len(SPACE) == 8
    assert list(SPACE) == list(SPACE.names)
    assert SPACE.names[0] == "learning_rate"
    assert "b1" in SPACE
    assert "b2" not in SPACE
    assert SPACE["b1"].scale == "reverse_log"
    swapped = SearchSpace(dict(reversed(list(SPACE.items()))))
    assert swapped != SPACE
    assert SearchSpace(list(SPACE.items())) == SPACE
    assert hash(SearchSpace(dict(SPACE))) == hash(SPACE)
    assert copy.deepcopy(SPACE) == SPACE
    assert pickle.loads(pickle.dumps(SPACE)) == SPACE
    with pytest.raises(KeyError, match="'lerning_rate': did you mean 'learning_rate'"):
        SPACE["lerning_rate"]
    with pytest.raises(AttributeError):
        SPACE.names = ()
    with pytest.raises(AttributeError):
        SPACE["b1"].low = 0.0
    assert Categorical([True]) != Categorical([1]) != Categorical([1.0])
    assert Float(0, 1) == Float(0.0, 1.0)
    assert SPACE.label("decay", 2) == "None"
    assert SPACE.label("layers", jnp.int32(3)) == "3"
    assert SPACE.label("learning_rate", np.float32(0.001)) == "0.001"


def test_dict_round_trip_is_strict_json():
    text = json.dumps(SPACE.to_dict(), allow_nan=False, sort_keys=True)
    again = SearchSpace.from_dict(json.loads(text))
    assert again == SPACE
    assert again.names == SPACE.names
    objects = SearchSpace({"activation": Categorical([jax.nn.relu, jax.nn.tanh])})
    labels = SearchSpace.from_dict(json.loads(json.dumps(objects.to_dict())))
    assert labels["activation"].labels == ("relu", "tanh")


GOOD = {"name": "a", "kind": "float", "low": 0.0, "high": 1.0, "scale": "linear"}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "data must be a dict"),
        ({}, "data lacks the key 'parameters'"),
        ({"parameter": []}, "unknown key 'parameter': did you mean 'parameters'"),
        ({"parameters": {}}, "must be a list"),
        ({"parameters": []}, "at least one parameter"),
        ({"parameters": [3]}, r"\[0\] must be a dict"),
        ({"parameters": [{"name": "a"}]}, "lacks 'kind'"),
        ({"parameters": [{**GOOD, "kind": "flaot"}]}, "'flaot' is unknown: did you mean 'float'"),
        ({"parameters": [{**GOOD, "kind": []}]}, "must be a string"),
        ({"parameters": [{**GOOD, "hihg": 2.0}]}, "unknown key 'hihg': did you mean 'high'"),
        ({"parameters": [{"name": "a", "kind": "float", "low": 0.0}]}, "lacks the key 'high'"),
        ({"parameters": [GOOD, GOOD]}, "the name 'a' is there twice"),
        ({"parameters": [{**GOOD, "name": 3}]}, "non-empty string, got 3"),
        ({"parameters": [{**GOOD, "low": "0"}]}, "low must be a number, got '0'"),
        (
            {"parameters": [{"name": "a", "kind": "categorical", "values": [[1]]}]},
            "must be a list of strings, numbers, booleans or null",
        ),
    ],
)
def test_from_dict_rejects_what_it_does_not_know(data, match):
    with pytest.raises(ValueError, match=match):
        SearchSpace.from_dict(data)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Float(1.0, 1.0), "low must be < high, got low = 1.0 and high = 1.0. Swap"),
        (lambda: Float(2, 1), "low must be < high"),
        (lambda: Integer(3, 3), "low must be < high"),
        (lambda: Float(0.0, 1.0, scale="log"), "low must be >= .*got 0.0. A log range starts"),
        (lambda: Float(-1.0, 1.0, scale="log"), "low must be >= .*got -1.0"),
        (lambda: Integer(0, 9, scale="log"), "low must be >= 1, got 0.*include_zero"),
        (lambda: Float(0.5, 1.0, scale="reverse_log"), "high must be < 1, got 1.0. A reverse_log"),
        (lambda: Float(math.nan, 1.0), "low must be finite, got nan"),
        (lambda: Float(0.0, math.inf), "high must be finite, got inf"),
        (lambda: Integer(0, math.inf), "high must be finite, got inf"),
        (lambda: Float(0.0, 1e39), "more than float32 can hold"),
        (lambda: Float(-3e38, 3e38), "more than float32 can hold"),
        (lambda: Float(1 + 1e-9, 1 + 2e-9), "no float32 between"),
        (lambda: Float(False, 1.0), "low must be a number, got False of type bool"),
        (lambda: Float(0.0, "1"), "high must be a number, got '1' of type str"),
        (lambda: Integer(0, True), "high must be a number, got True"),
        (lambda: Integer(0, 1.5), "high must be a whole number, got 1.5"),
        (lambda: Integer(0, 2**31), "high must fit into int32"),
        (lambda: Integer(-(2**31), 2**31 - 1), "span all of int32"),
        (lambda: Integer(0, 9, include_zero=True), "include_zero = True needs scale='log'"),
        (lambda: Integer(1, 9, "log", include_zero=1), "include_zero must be True or False"),
        (lambda: Float(0.0, 1.0, scale="lgo"), "scale = 'lgo' is unknown: did you mean 'log'"),
        (lambda: Integer(1, 9, "reverse_log"), "scale = 'reverse_log' is unknown"),
        (lambda: Float(lo=0.0, high=1.0), "no argument 'lo': did you mean 'low'"),
        (lambda: Integer(1, 2, include_zer=True), "did you mean 'include_zero'"),
        (lambda: Categorical([]), "at least one choice"),
        (lambda: Categorical("abc"), "must be a list of choices, got 'abc'"),
        (lambda: Categorical(3), "must be a list of choices, got 3"),
        (lambda: Categorical([1, 2, 1]), "got 1 twice"),
        (lambda: Categorical([0.1, 0.1 + 1e-12]), "twice"),
        (lambda: Categorical(["a", "a"]), "got a twice"),
        (lambda: Categorical([1.0, math.nan]), "values must be finite, got nan"),
        (lambda: Categorical([1, 2**40]), "fit into int32, got 1099511627776"),
        (lambda: Categorical([1.0, 1e39]), "fit into float32"),
        (lambda: SearchSpace({}), "at least one parameter"),
        (lambda: SearchSpace({"a": (0, 1)}), r"parameters\['a'\] must be a Float"),
        (lambda: SearchSpace({1: Float(0, 1)}), "non-empty string, got 1"),
        (lambda: SearchSpace({"": Float(0, 1)}), "non-empty string, got ''"),
        (lambda: SearchSpace("abc"), "parameters must be a dict"),
        (lambda: SearchSpace([("a", Float(0, 1)), ("a", Float(0, 2))]), "'a' is there twice"),
        (lambda: SPACE.sample(KEY, 0), "num_trials must be >= 1 .*got 0. Ask"),
        (lambda: SPACE.sample(KEY, -3), "num_trials must be >= 1 .*got -3"),
        (lambda: SPACE.sample(KEY, 8.0), "num_trials must be an integer, got 8.0"),
        (lambda: SPACE.sample(KEY, True), "num_trials must be an integer, got True"),
        (lambda: SPACE.sample(KEY, num_trial=3), "did you mean 'num_trials'"),
        (lambda: SPACE.sample(KEY, 4, start=-1), "start must be >= 0"),
        (lambda: SPACE.sample(KEY, 4, sampler="halton"), "sampler must be a function"),
        (
            lambda: SPACE.sample(KEY, 4, sampler=lambda key, n, d, start: np.zeros((n, 1))),
            r"must return shape \(4, 8\), got \(4, 1\)",
        ),
        (lambda: SPACE.from_unit(np.zeros((4, 3))), r"unit must have shape \(..., 8\)"),
        (lambda: SPACE.from_unit(np.full((4, 8), 1.5)), r"unit must lie in \[0, 1\], got"),
        (lambda: SPACE.from_unit(np.full((4, 8), np.nan)), r"unit must lie in \[0, 1\], got"),
        (lambda: SPACE.to_unit({"b1": 0.9}), "points lacks 'learning_rate'"),
        (lambda: SPACE.to_unit({**dict.fromkeys(SPACE, 0), "c": 0}), "no parameter 'c'"),
        (lambda: SPACE.to_unit({**dict.fromkeys(SPACE, 1), "b1": np.ones(2)}), "one shape"),
        (lambda: jax.jit(lambda x: Float(x, 2.0).low)(1.0), "low must be a concrete number"),
    ],
)
def test_faults_name_argument_value_and_fix(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


EDGES = np.array(
    [
        *(0, 1, 0.5, np.nextafter(np.float32(0), np.float32(1)), 1e-40, np.finfo(np.float32).tiny),
        *(1e-30, 2**-49, np.nextafter(np.float32(2**-48), np.float32(0)), 2**-48, 2**-33, 2**-32),
        *(2**-24, 0.1, 1 / 3, 1 - 2**-23, 1 - 2**-24),
    ],
    np.float32,
)


def same_bits(a, b):
    assert isinstance(a, jax.Array)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@st.composite
def parameters(draw):
    kind = draw(st.sampled_from(["linear", "log", "reverse_log", "integer", "log_integer", "list"]))
    if kind == "list":
        numbers = st.integers(-(2**31), 2**31 - 1) | st.floats(-1e30, 1e30)
        return Categorical(draw(st.lists(numbers, min_size=1, max_size=9, unique_by=np.float32)))
    if kind in ("integer", "log_integer"):
        low = draw(st.integers(1 if kind == "log_integer" else -(2**31), 2**31 - 3))
        high = draw(st.integers(low + 1, 2**31 - 2))
        if kind == "integer":
            return Integer(low, high)
        return Integer(low, high, "log", include_zero=draw(st.booleans()))
    lowest, highest = {
        "linear": (-1.7e38, 1.7e38),
        "log": (float(np.finfo(np.float32).tiny), 3.4e38),
        "reverse_log": (-1e30, 1 - 2**-24),
    }[kind]
    ends = st.floats(lowest, highest)
    low, high = sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True)))
    try:
        return Float(low, high, kind)
    except ValueError:  # No float32 is between them.
        hypothesis.reject()


@hypothesis.settings(max_examples=150)
@given(
    parameter=parameters(),
    drawn=st.lists(st.floats(0, 1, width=32), min_size=15, max_size=15),
)
def test_numpy_and_jax_give_the_same_bits(parameter, drawn):
    unit = np.concatenate([EDGES, np.array(drawn, np.float32)])
    # Eagerly: the program of this range would be used once.
    same_bits(parameter.from_unit(unit), parameter.from_unit(jnp.asarray(unit)))
    same_bits(parameter.from_unit(float(unit[-1])), parameter.from_unit(jnp.asarray(unit[-1])))


ODD = [
    Float(0.0, 1e-36),
    Float(-1e-37, 1e12),
    Float(1e-37, 1e12),
    Float(-0.0, 1.0),
    Float(-1.0, -0.0),
    Float(0.0, 1e-40),
    Float(0.0, 1.5 + 2**-40),
    Float(1e38, 3.4028234e38),
]
INTEGERS = [Integer(-(2**31), 2**31 - 2), Integer(1, 2**31 - 1, "log"), Integer(1, 3, "log", True)]


@pytest.mark.parametrize("parameter", [*FLOATS, *ODD, *INTEGERS, *SPACE.values()], ids=repr)
def test_numpy_and_a_program_give_the_same_bits(parameter):
    unit = np.concatenate([EDGES, UNIT])
    same_bits(parameter.from_unit(unit), jax.jit(parameter.from_unit)(unit))


def test_a_space_maps_host_and_device_positions_alike():
    unit = np.random.default_rng(1).random((5, len(SPACE))).astype(np.float32)
    want = SPACE.from_unit(jnp.asarray(unit))
    same(SPACE.from_unit(unit), want)
    same(SPACE.from_unit(unit.tolist()), want)
    assert all(isinstance(values, jax.Array) for values in SPACE.from_unit(unit).values())


@pytest.fixture
def compilations():
    """The events of tracing, lowering and compiling since the fixture."""
    events = []

    def listen(event, _duration, **_):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("sampler", [samplers.halton, samplers.uniform])
def test_points_of_a_new_space_compile_nothing(sampler, compilations):
    key, raw, start = jax.random.key(9), jax.random.PRNGKey(9), jnp.int32(5)
    space = SearchSpace({f"{name} {sampler.__name__}": p for name, p in SPACE.items()})
    compilations.clear()
    points = space.sample(key, 77, sampler=sampler)
    later = space.sample(raw, 72, start=start, sampler=sampler)
    space.from_unit(np.zeros((3, len(space))))
    assert not compilations
    same(later, {name: values[5:] for name, values in points.items()})
    program = jax.jit(lambda key: space.sample(key, 77, sampler=sampler))
    same(program(key), points)
    assert "/jax/core/compile/backend_compile_duration" in compilations


def test_the_last_index_of_all():
    space = SearchSpace({"a": Float(1e-4, 1.0, scale="log"), "b": Integer(1, 9)})
    last = space.sample(KEY, 2, start=2**31 - 2)
    np.testing.assert_array_equal(space.sample(KEY, 1, start=2**31 - 2)["a"], last["a"][:1])


@pytest.mark.parametrize("choices", [[True, False], [False, True]])
def test_booleans_are_numbers(choices):
    space = SearchSpace({"on": Categorical(choices)})
    values = np.asarray(space.sample(jax.random.key(0), 16)["on"])
    assert values.dtype == np.int32
    assert set(values.tolist()) == {0, 1}
    assert [space.label("on", code) for code in (0, 1)] == ["False", "True"]
    np.testing.assert_array_equal(space["on"].from_unit(space["on"].to_unit(values)), values)
    assert SearchSpace.from_dict(space.to_dict()) == space
    assert space.grid(2)["on"].tolist() == [int(choice) for choice in choices]


def test_booleans_that_were_stored_as_indices_keep_their_meaning():
    stored = [{"name": "on", "kind": "categorical", "values": [True, False]}]
    old = SearchSpace.from_dict({"parameters": stored})
    assert [old.label("on", index) for index in (0, 1)] == ["True", "False"]
