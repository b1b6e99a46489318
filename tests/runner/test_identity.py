"""What functions and values are made of: equal for what traces alike, different for the rest."""

import functools

import jax
import numpy as np
import pytest

from playbook_optax.runner import programs
from playbook_optax.runner.identity import NoIdentity, identity

ZEROS = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    "other",
    [ZEROS.astype(np.int32), ZEROS[None], ZEROS + 1, ZEROS.tolist(), np.zeros(3, np.float32)],
    ids=["dtype", "shape", "value", "list", "length"],
)
def test_arrays_are_told_apart(other):
    assert identity(ZEROS) == identity(ZEROS.copy())
    assert identity(ZEROS) != identity(other)


def added(number, keep=0, *, scale=1.0):
    return lambda x: scale * x + number + keep


def with_defaults(number, scale):
    return lambda x, number=number, *, scale=scale: scale * x + number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (with_defaults(1, 1), with_defaults(2, 1)),
        (with_defaults(1, 1), with_defaults(1, 2)),
        (added(1), added(1.0)),
        (added(1), added(2)),
        (added(1, scale=1.0), added(1, scale=2.0)),
        (functools.partial(added, 1), functools.partial(added, 2)),
        (functools.partial(added, 1), functools.partial(added, keep=1)),
        ({"a": 1}, {"a": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1,), [1]),
        (True, 1),
    ],
)
def test_what_is_made_otherwise_is_told_apart(one, other):
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)


def test_functions_made_anew_are_equal():
    assert identity(added(1)) == identity(added(1))


def test_what_may_change_unseen_has_none():
    class Counter:
        value = 0

    for one in (Counter(), [Counter()], lambda: Counter, np.array([Counter()])):
        if callable(one):
            assert identity(one) == identity(one)
            continue
        with pytest.raises(NoIdentity):
            identity(one)


def test_what_was_traced_under_other_settings_is_not_found_again():
    def outlined():
        return programs.outline((added,), ZEROS, lambda: programs.Outline(object(), 1))

    programs.forget()
    try:
        found = outlined()
        assert outlined() is found
        with jax.default_matmul_precision("float32"):
            assert outlined() is not found
        with jax.numpy_dtype_promotion("strict"):
            assert outlined() is not found
        assert outlined() is found
    finally:
        programs.forget()
