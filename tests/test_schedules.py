"""Schedules against float64 formulas, at the edges, past 2**24 steps, vmapped, and golden."""

import json
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from playbook_optax import schedules

GOLDEN = pathlib.Path(__file__).parent / "golden" / "schedules.json"
BIG = 2**30

FACTORIES = {
    "constant": lambda value: schedules.constant(value),
    "linear_decay": schedules.linear_decay,
    "cosine_decay": schedules.cosine_decay,
    "polynomial_decay": schedules.polynomial_decay,
    "exponential_decay": schedules.exponential_decay,
    "inverse_sqrt_decay": schedules.inverse_sqrt_decay,
    "piecewise_constant": lambda low, mid, high, b0, b1: schedules.piecewise_constant(
        [high, mid, low], [b0, b1]
    ),
    "prepend_warmup": lambda warmup_steps, decay_steps: schedules.prepend_warmup(
        schedules.linear_decay(0.3, decay_steps, hold_steps=4, end_value=0.01), warmup_steps
    ),
    "extend_for_longer_run": lambda extra_steps: schedules.extend_for_longer_run(
        schedules.prepend_warmup(schedules.cosine_decay(0.3, 12), 5), extra_steps
    ),
}
ARGUMENTS = {
    "constant": {"value": 0.3},
    "linear_decay": {"init_value": 0.3, "decay_steps": 20, "hold_steps": 7, "end_value": 0.02},
    "cosine_decay": {"init_value": 0.3, "decay_steps": 20, "hold_steps": 7, "end_value": 0.02},
    "polynomial_decay": {
        "init_value": 0.3, "decay_steps": 20, "hold_steps": 7, "end_value": 0.02, "power": 2.5,
    },
    "exponential_decay": {
        "init_value": 0.3, "decay_steps": 9, "decay_rate": 0.4, "hold_steps": 7, "end_value": 0.02,
    },
    "inverse_sqrt_decay": {
        "init_value": 0.3, "decay_steps": 3, "hold_steps": 7, "end_value": 0.07,
    },
    "piecewise_constant": {"low": 0.01, "mid": 0.1, "high": 0.3, "b0": 5, "b1": 20},
    "prepend_warmup": {"warmup_steps": 6, "decay_steps": 15},
    "extend_for_longer_run": {"extra_steps": 8},
}  # fmt: skip
COUNTS = np.arange(-3, 60)


def exact(name, count, **a):
    """The definition, in Python floats (float64) and unbounded integers."""
    count = max(int(count), 0)
    if name == "constant":
        return a["value"]
    if name == "piecewise_constant":
        return a["high"] if count < a["b0"] else a["mid"] if count < a["b1"] else a["low"]
    if name == "prepend_warmup":
        inner = {"init_value": 0.3, "hold_steps": 4, "end_value": 0.01}
        inner["decay_steps"] = a["decay_steps"]
        if count < a["warmup_steps"]:
            return 0.3 * count / a["warmup_steps"]
        return exact("linear_decay", count - a["warmup_steps"], **inner)
    if name == "extend_for_longer_run":
        if count < 5:
            return 0.3 * count / 5
        inner = {"init_value": 0.3, "hold_steps": 0, "end_value": 0.0}
        return exact("cosine_decay", count - 5, decay_steps=12 + a["extra_steps"], **inner)
    first, last = a["init_value"], a["end_value"]
    elapsed = max(count - a["hold_steps"], 0)
    if name == "exponential_decay":
        return max(first * a["decay_rate"] ** (elapsed / a["decay_steps"]), last)
    if name == "inverse_sqrt_decay":
        return max(first / np.sqrt(1 + elapsed / a["decay_steps"]), last)
    remaining = 1 - min(elapsed / a["decay_steps"], 1)
    weight = {
        "linear_decay": lambda: remaining,
        "cosine_decay": lambda: (1 + np.cos(np.pi * (1 - remaining))) / 2,
        "polynomial_decay": lambda: remaining ** a["power"],
    }[name]()
    return last + (first - last) * weight


def reference(name, counts=COUNTS, **arguments):
    return np.array([exact(name, c, **arguments) for c in counts])


@pytest.mark.parametrize("name", FACTORIES)
def test_equals_the_formula_in_float64(name):
    arguments = ARGUMENTS[name]
    got = FACTORIES[name](**arguments)(COUNTS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(name, **arguments), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_number_may_be_traced_and_is_traced_once(name):
    arguments = ARGUMENTS[name]
    traces = []

    @jax.jit
    def value(arguments, count):
        traces.append(1)
        return FACTORIES[name](**arguments)(count)

    plain = FACTORIES[name](**arguments)
    for count in (0, 3, 7, 19, 44):
        got = value(arguments, jnp.int32(count))
        np.testing.assert_allclose(got, plain(count), rtol=3e-7)
        assert got.shape == ()
    assert len(traces) == 1
    as_floats = {k: jnp.float32(v) for k, v in arguments.items()}
    np.testing.assert_allclose(value(as_floats, jnp.int32(9)), plain(9), rtol=3e-7)


@pytest.mark.parametrize(
    "name", [n for n in FACTORIES if n not in ("constant", "piecewise_constant")]
)
def test_vmap_over_arguments_equals_a_loop(name):
    many = {
        k: jnp.asarray(v) * (jnp.arange(1, 5) if isinstance(v, int) else jnp.linspace(0.5, 1.0, 4))
        for k, v in ARGUMENTS[name].items()
    }
    counts = jnp.arange(0, 60, 7)
    swept = jax.vmap(lambda a: FACTORIES[name](**a)(counts))(many)
    for i in range(4):
        one = FACTORIES[name](**{k: v[i] for k, v in many.items()})(counts)
        np.testing.assert_allclose(swept[i], one, rtol=3e-7)


def test_sweep_over_warmup_and_decay_steps_is_one_program():
    traces = []

    @jax.jit
    def curves(warmup_steps, decay_steps):
        traces.append(1)

        def one(warmup_steps, decay_steps):
            schedule = schedules.prepend_warmup(
                schedules.linear_decay(1.0, decay_steps), warmup_steps
            )
            return jax.vmap(schedule)(jnp.arange(40))

        return jax.vmap(one)(warmup_steps, decay_steps)

    warmup, decay = jnp.array([0, 1, 10, 30]), jnp.array([10, 0, 20, 100])
    got = curves(warmup, decay)
    curves(warmup + 1, decay)
    assert len(traces) == 1
    for row, w, d in zip(got, warmup, decay, strict=True):
        w, d = int(w), max(int(d), 1)
        want = [c / w if c < w else max(1 - (c - w) / d, 0) for c in range(40)]
        np.testing.assert_allclose(row, want, atol=1e-7)


def test_neighbouring_counts_past_2_to_the_24_are_told_apart():
    linear = schedules.linear_decay(1.0, decay_steps=4, hold_steps=BIG + 1)
    counts = BIG + 1 + np.arange(-1, 6)
    np.testing.assert_array_equal(linear(counts), [1, 1, 0.75, 0.5, 0.25, 0, 0])
    np.testing.assert_array_equal(
        schedules.prepend_warmup(linear, BIG)(BIG + counts[:2] - 1), [1, 1]
    )
    steps = schedules.piecewise_constant([1.0, 0.5, 0.0], [BIG + 1, BIG + 2])
    np.testing.assert_array_equal(steps(BIG + np.arange(4)), [1, 0.5, 0, 0])
    np.testing.assert_array_equal(
        jax.jit(lambda b: schedules.piecewise_constant([1.0, 0.0], [b])(b + jnp.arange(-1, 2)))(
            jnp.int32(BIG + 1)
        ),
        [1, 0, 0],
    )
    long = schedules.linear_decay(1.0, decay_steps=2**31 - 1)
    np.testing.assert_allclose(long(2**31 - 3), 2 / (2**31 - 1), rtol=1e-6)
    assert long(2**31 - 1) == 0
    assert long(2**40) == 0
    halving = schedules.exponential_decay(1.0, decay_steps=BIG // 2, decay_rate=0.5)
    assert halving(BIG) == 0.25


@pytest.mark.parametrize("name", ["linear_decay", "cosine_decay", "polynomial_decay",
                                  "inverse_sqrt_decay", "exponential_decay"])  # fmt: skip
@pytest.mark.parametrize("hold_steps", [0, 3])
@pytest.mark.parametrize("traced", [False, True])
def test_zero_decay_steps_starts_at_the_peak_and_then_drops(name, hold_steps, traced):
    extra = {"decay_rate": 0.5} if name == "exponential_decay" else {}

    def values(decay_steps):
        factory = getattr(schedules, name)
        schedule = factory(0.3, decay_steps, hold_steps=hold_steps, end_value=0.1, **extra)
        return schedule(jnp.arange(6))

    got = (jax.jit(values) if traced else values)(0)
    want = np.where(np.arange(6) <= hold_steps, 0.3, 0.1).astype(np.float32)
    np.testing.assert_array_equal(got, want)


def test_zero_warmup_steps_starts_at_the_peak():
    # optax.warmup_constant_schedule(0, 1, warmup_steps=0) is 0 for ever.
    assert schedules.prepend_warmup(schedules.constant(1.0), 0)(0) == 1.0
    assert jax.jit(lambda w: schedules.prepend_warmup(schedules.constant(1.0), w)(0))(0) == 1.0


def test_extension_follows_the_playbook():
    counts = np.arange(140)
    linear = schedules.linear_decay(0.3, 40, hold_steps=10, end_value=0.1)
    longer = schedules.extend_for_longer_run(linear, 50)
    np.testing.assert_array_equal(longer(counts[60:]), linear(counts[10:-50]))
    np.testing.assert_array_equal(longer(counts[:61]), np.full(61, 0.3, np.float32))
    polynomial = schedules.polynomial_decay(0.3, 40, power=2.0)
    np.testing.assert_array_equal(
        schedules.extend_for_longer_run(polynomial, 50)(counts[50:]), polynomial(counts[:-50])
    )
    cosine = schedules.extend_for_longer_run(schedules.cosine_decay(0.3, 40), 60)
    np.testing.assert_array_equal(cosine(counts), schedules.cosine_decay(0.3, 100)(counts))
    flat = schedules.extend_for_longer_run(schedules.constant(0.3), 60)
    np.testing.assert_array_equal(flat(counts), np.full(140, 0.3, np.float32))
    warm = schedules.prepend_warmup(linear, 7)
    np.testing.assert_array_equal(
        schedules.extend_for_longer_run(warm, 50)(counts),
        schedules.prepend_warmup(longer, 7)(counts),
    )
    traced = jax.jit(lambda extra: schedules.extend_for_longer_run(warm, extra)(counts))(50)
    np.testing.assert_allclose(traced, schedules.prepend_warmup(longer, 7)(counts), rtol=3e-7)
    huge = jax.jit(
        lambda e: schedules.extend_for_longer_run(schedules.linear_decay(1.0, 1, hold_steps=5), e)(
            2**31 - 2
        )
    )
    assert huge(2**31 - 1) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.exponential_decay(1.0, 1, 0.5),
        schedules.inverse_sqrt_decay(1.0, 1),
        schedules.piecewise_constant([1.0], []),
        schedules.prepend_warmup(lambda count: 1.0, 3),
        lambda count: 1.0,
    ],
)
def test_extension_without_a_rule_is_refused(schedule):
    with pytest.raises(ValueError, match="rule for constant, linear_decay"):
        schedules.extend_for_longer_run(schedule, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(-0.1), "value must be >= 0, got -0.1"),
        (lambda: schedules.constant(True), "value must be a number, got True"),
        (lambda: schedules.constant(float("nan")), "value must be finite"),
        (lambda: schedules.linear_decay("0.1", 3), "init_value must be a number"),
        (lambda: schedules.linear_decay(0.1, -3), "decay_steps must be >= 0, got -3"),
        (lambda: schedules.linear_decay(0.1, 2**31), "decay_steps must be below 2"),
        (lambda: schedules.linear_decay(0.1, 2.5), "decay_steps must be a whole number"),
        (lambda: schedules.linear_decay(0.1, 3, hold_steps=-1), "hold_steps must be >= 0"),
        (lambda: schedules.cosine_decay(0.1, 3, end_value=-1.0), "end_value must be >= 0"),
        (lambda: schedules.polynomial_decay(0.1, 3, power=0.0), "power must be > 0"),
        (lambda: schedules.exponential_decay(0.1, 3, 1.5), "decay_rate must be > 0 and <= 1"),
        (lambda: schedules.inverse_sqrt_decay(0.1, jnp.zeros(2)), "decay_steps must be a scalar"),
        (lambda: schedules.piecewise_constant([1.0], [3]), "1 values and 1 boundaries"),
        (lambda: schedules.piecewise_constant([1.0, 1, 1], [9, 3]), "boundaries must not decrease"),
        (lambda: schedules.piecewise_constant([1.0, -1], [9]), r"values\[1\] must be >= 0"),
        (lambda: schedules.piecewise_constant([1.0, 1], [-9]), r"boundaries\[0\] must be >= 0"),
        (lambda: schedules.piecewise_constant({0: 1.0}, []), "values must be a sequence"),
        (lambda: schedules.piecewise_constant(jnp.ones((1, 1)), []), "values must have one dim"),
        (lambda: schedules.prepend_warmup(0.1, 3), "schedule must be a function"),
        (lambda: schedules.prepend_warmup(schedules.constant(1.0), -1), "warmup_steps must be"),
        (lambda: schedules.extend_for_longer_run(schedules.constant(1.0), -1), "extra_steps must"),
    ],
)
def test_concrete_bad_values_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_argument_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'decay_steps'"):
        schedules.linear_decay(0.1, decay_step=3)


def _jitted(name):
    extra = {"decay_rate": 0.25} if name == "exponential_decay" else {}

    def values(first, decay_steps, hold_steps, last, counts):
        factory = getattr(schedules, name)
        return factory(first, decay_steps, hold_steps=hold_steps, end_value=last, **extra)(counts)

    return jax.jit(values)


DECAYS = {n: _jitted(n) for n in ("linear_decay", "cosine_decay", "polynomial_decay",
                                  "inverse_sqrt_decay", "exponential_decay")}  # fmt: skip


@hypothesis.given(
    name=st.sampled_from(["linear_decay", "cosine_decay", "polynomial_decay",
                          "inverse_sqrt_decay", "exponential_decay"]),
    first=st.floats(2.0**-20, 8.0, width=32),
    ratio=st.floats(0.0, 1.0, width=32),
    decay_steps=st.integers(0, 2**31 - 1),
    hold_steps=st.integers(0, 2**31 - 1),
    counts=st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8),
)  # fmt: skip
def test_decays_fall_from_the_first_value_to_the_last(
    name, first, ratio, decay_steps, hold_steps, counts
):
    last = float(np.float32(first * ratio))
    arguments = (first, decay_steps, hold_steps, last)
    got = np.asarray(DECAYS[name](*arguments, np.array([0, *sorted(counts)], np.int32)))
    assert got[0] == np.float32(first)
    slack = 1e-6 * first
    assert (np.diff(got) <= slack).all()
    assert (got <= np.float32(first) + slack).all()
    assert (got >= np.float32(last) - slack).all()
    held = np.array([0, *sorted(counts)]) <= hold_steps
    assert (got[held] == np.float32(first)).all()


def test_agrees_with_optax_where_optax_has_it():
    counts = jnp.arange(50)
    pairs = [
        (schedules.linear_decay(0.3, 20, 7, 0.02), optax.linear_schedule(0.3, 0.02, 20, 7)),
        (schedules.cosine_decay(0.3, 20), optax.cosine_decay_schedule(0.3, 20)),
        (
            schedules.polynomial_decay(0.3, 20, 7, 0.02, power=2.0),
            optax.polynomial_schedule(0.3, 0.02, 2.0, 20, 7),
        ),
        (
            schedules.exponential_decay(0.3, 9, 0.4, end_value=0.02),
            optax.exponential_decay(0.3, 9, 0.4, end_value=0.02),
        ),
        (
            schedules.piecewise_constant([0.3, 0.15], [11]),
            optax.piecewise_constant_schedule(0.3, {11: 0.5}),
        ),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours(counts), jax.vmap(theirs)(counts), rtol=1e-5, atol=1e-8)


def test_golden_values():
    counts = [0, 1, 4, 5, 6, 7, 8, 12, 20, 26, 27, 28, 59]
    got = {
        name: {
            "arguments": arguments,
            "counts": counts,
            "values": np.asarray(FACTORIES[name](**arguments)(np.array(counts)))
            .astype(float)
            .tolist(),
        }
        for name, arguments in ARGUMENTS.items()
    }
    if os.environ.get("PLAYBOOK_OPTAX_WRITE_GOLDEN") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(got, indent=1, allow_nan=False) + "\n")
    want = json.loads(GOLDEN.read_text())
    assert set(got) == set(want)
    for name in want:
        assert got[name]["arguments"] == want[name]["arguments"]
        np.testing.assert_allclose(
            got[name]["values"], want[name]["values"], rtol=1e-6, atol=1e-9, err_msg=name
        )
