"""The rule for a high loss, on curves whose verdict is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from playbook_optax import _feasibility

NAN = np.nan


@pytest.mark.parametrize(
    ("curve", "peak", "expected"),
    [
        ([2.3, 1.0, 0.5], None, (False, -1)),
        ([2.3, 2.3, 2.3], None, (False, -1)),  # merely slow
        ([2.3, 2.31, 2.305], None, (False, -1)),  # slow, with evaluation noise
        ([2.3, 2.0, 2.4], None, (True, 2)),  # ended above
        ([2.3, 161.0, 80.0], None, (True, 1)),
        ([2.3, 2.29, 2.29], [NAN, 40.0, 2.3], (True, 1)),  # rose between evaluations, then dead
        ([2.3, 1.5, 0.9], [NAN, 40.0, 1.2], (False, -1)),  # rose and came back clearly below
        ([2.3, 1.0, 2.2], [NAN, 2.0, 2.2], (False, -1)),
        ([2.3, 0.5, NAN], None, (False, -1)),  # not finite is another reason
        ([NAN, 1.0, 3.0], None, (False, -1)),  # no first value to judge by
        ([-1.0, -2.0, -0.5], None, (True, 2)),  # negative losses are judged too
        ([-1.0, -1.5, -2.0], None, (False, -1)),
    ],
)
def test_high_loss(curve, peak, expected):
    for xp in (np, jnp):
        arrays = [None if a is None else xp.asarray(a, xp.float32) for a in (curve, peak)]
        high, first = _feasibility.high_loss(*arrays)
        assert (bool(high), int(first)) == expected


def test_batched_equals_single_and_traces():
    curves = np.array([[2.0, 1.0], [2.0, 3.0], [2.0, NAN]], np.float32)
    high, first = _feasibility.high_loss(curves)
    assert high.tolist() == [False, True, False]
    assert first.tolist() == [-1, 1, -1]
    jitted, _ = jax.jit(jax.vmap(_feasibility.high_loss))(curves)
    assert jitted.tolist() == high.tolist()


def test_margin_is_the_only_slack():
    above = 1.0 + 2 * _feasibility.EVALUATION_MARGIN
    assert _feasibility.high_loss(np.array([1.0, above]))[0]
    assert not _feasibility.high_loss(np.array([1.0, above]), margin=0.25)[0]
