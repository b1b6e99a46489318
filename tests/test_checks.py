"""Errors for concrete values: every message names the argument, its value and what to do."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from playbook_optax import _checks


@pytest.mark.parametrize(
    "value", [0, 1, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), jnp.asarray(0.5), 10**30]
)
def test_check_number_accepts_numbers(value):
    _checks.check_number("x", value, at_least=0.0)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (True, {}, r"x must be a number, got True of type bool"),  # fault 4
        (np.True_, {}, r"x must be a number, got .*True.* of type bool"),
        ("1e-3", {}, r"x must be a number, got '1e-3' of type str"),
        (None, {}, r"x must be a number, got None of type NoneType"),
        ([1.0], {}, r"x must be a number, got \[1.0\] of type list"),
        (1j, {}, r"x must be a number, got 1j"),
        (np.array("a"), {}, r"x must be a number, got dtype <U1"),
        (np.array(1j), {}, r"x must be a real number, got dtype complex128"),
        (np.ones(3), {}, r"x must be a scalar, got shape \(3,\). Use jax.vmap"),
        (np.nan, {}, r"x must be finite, got nan"),  # fault 3
        (10**400, {}, r"x must be finite, got 10{400}"),
        (np.float32(-np.inf), {}, r"x must be finite, got -inf"),
        (-1, {"at_least": 0.0}, r"x must be >= 0, got -1"),
        (0.0, {"above": 0.0}, r"x must be > 0, got 0.0"),
        (1.5, {"at_most": 1.0}, r"x must be <= 1, got 1.5"),
        (jnp.asarray(1.0), {"at_least": 0.0, "below": 1.0}, r"x must be >= 0 and < 1, got 1.0"),
    ],
)
def test_check_number_names_argument_value_and_fix(value, bounds, message):
    with pytest.raises(ValueError, match=f"{message}.*Halve it.") as error:
        _checks.check_number("x", value, fix="Halve it.", **bounds)
    if "a number" in message:
        assert isinstance(error.value, TypeError)


def test_tracers_flow():
    def traced(value):
        assert _checks.is_traced(value)
        _checks.check_number("x", value, above=10.0)
        _checks.check_steps("n", value, at_least=10)
        _checks.check_eps("eps", value, np.float16)
        return value

    assert not _checks.is_traced(1.0)
    assert not _checks.is_traced(jnp.asarray(1.0))
    assert float(jax.jit(traced)(-1.0)) == -1.0
    with pytest.raises(ValueError, match=r"x must be a scalar, got shape \(2,\)"):
        jax.jit(lambda x: _checks.check_number("x", x))(jnp.ones(2))


@pytest.mark.parametrize("value", [0, 3, 4.0, np.int32(7), np.float32(8), 2**31 - 1])
def test_check_steps_accepts_whole_numbers(value):
    _checks.check_steps("warmup_steps", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"warmup_steps must be >= 0, got -1"),  # fault 9
        (1.5, r"warmup_steps must be a whole number of steps, got 1.5"),
        (2**31, r"warmup_steps must be below 2\*\*31.*got 2147483648"),  # fault 10
        (1e10, r"warmup_steps must be below 2\*\*31.*got 1e\+?10|got 10000000000.0"),
        (True, r"warmup_steps must be a number, got True"),
        (np.nan, r"warmup_steps must be finite, got nan"),
    ],
)
def test_check_steps_names_argument_and_value(value, message):
    with pytest.raises(ValueError, match=message):
        _checks.check_steps("warmup_steps", value)


def test_check_count_returns_an_int():
    got = _checks.check_count("num_trials", np.int64(5))
    assert type(got) is int
    assert got == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"num_trials must be >= 1 and < 2\*\*31, got 0. Use 8."),  # faults 7, 8
        (-3, r"num_trials must be >= 1 and < 2\*\*31, got -3"),
        (2**31, r"num_trials must be >= 1 and < 2\*\*31, got 2147483648"),
        (2.0, r"num_trials must be an integer, got 2.0 of type float. Use 8."),
        (True, r"num_trials must be an integer, got True of type bool"),
        ("3", r"num_trials must be an integer, got '3' of type str"),
    ],
)
def test_check_count_names_argument_value_and_fix(value, message):
    with pytest.raises(ValueError, match=message):
        _checks.check_count("num_trials", value, fix="Use 8.")


def test_check_eps():  # fault 13
    _checks.check_eps("eps", 1e-8, np.float32)
    with pytest.raises(ValueError, match=r"eps must be > 0, got 0.0"):
        _checks.check_eps("eps", 0.0, np.float32)
    with pytest.raises(ValueError, match=r"eps = 1e-08 is zero in float16.*at least 6.1e-05"):
        _checks.check_eps("eps", 1e-8, np.float16)
    with pytest.raises(ValueError, match=r"eps = 1e-300 is zero in float32"):
        _checks.check_eps("eps", 1e-300, np.float32)


def test_check_choice_names_the_nearest():
    _checks.check_choice("scale", "log", ["linear", "log"])
    with pytest.raises(ValueError, match=r"scale = 'lgo' is unknown: did you mean 'log'\?.*linear"):
        _checks.check_choice("scale", "lgo", iter(["linear", "log"]))


def test_nearest():
    assert _checks.nearest("b3", ["b1", "eps"]) == "did you mean 'b1'? Known names: b1, eps"
    assert _checks.nearest("zzz", ["b1"]) == "Known names: b1"
    assert _checks.nearest("x", []) == "Known names: none"


def test_named_arguments_hints_and_keeps_the_signature():  # fault 5
    @_checks.named_arguments
    def factory(learning_rate, momentum=0.9):
        """Text."""
        return learning_rate, momentum

    assert factory(1, momentum=2) == (1, 2)
    assert list(inspect.signature(factory).parameters) == ["learning_rate", "momentum"]
    assert factory.__doc__ == "Text."
    with pytest.raises(TypeError, match=r"no argument 'momentun': did you mean 'momentum'\?"):
        factory(1, momentun=2)

    class Thing:
        @_checks.named_arguments
        def __init__(self, low):
            self.low = low

    assert Thing(low=3).low == 3
    with pytest.raises(TypeError, match=r"Thing\(\) has no argument 'lo': did you mean 'low'"):
        Thing(lo=3)


def test_require_names_the_extra():
    assert _checks.require("math", "plots", "drawing") is __import__("math")
    with pytest.raises(ImportError, match=r"drawing needs not_there, .*'playbook-optax\[plots\]'"):
        _checks.require("not_there.deep", "plots", "drawing")
