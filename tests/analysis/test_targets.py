"""Steps to a target: first evaluations, directions, seeds, and agreement with the reducer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import playbook_optax as pbx
from playbook_optax import reducers
from playbook_optax.records.study import Study


def study(curves, step=None, name="valid/error_rate", **kwargs):
    curves = np.asarray(curves)
    step = 100 * np.arange(curves.shape[-1]) if step is None else step
    points = {"learning_rate": np.arange(1.0, 1.0 + len(curves))}
    return Study.from_arrays(points, {name: curves}, step, objective=name, **kwargs)


def test_the_first_evaluation_counts_and_nothing_is_interpolated():
    info = pbx.steps_to_target(
        study([[0.9, 0.6, 0.4, 0.5], [0.9, 0.3, 0.9, 0.1], [0.9, 0.9, 0.9, 0.8], [0.2, 1, 1, 1]]),
        0.4,
    )
    assert info.steps.tolist() == [200, 100, -1, 0]
    assert info.after.tolist() == [100, 0, -1, -1]
    assert info.order.tolist() == [3, 1, 0]
    assert info.fastest == 3
    assert info.points["learning_rate"].tolist() == [1, 2, 3, 4]


def test_a_metric_that_should_rise():
    record = study([[0.1, 0.7, 0.9]], name="valid/accuracy", maximize=True)
    assert pbx.steps_to_target(record, 0.7).steps.tolist() == [100]
    record = study([[0.1, 0.7, 0.9]], name="accuracy", maximize=False)
    assert pbx.steps_to_target(record, 0.7, maximize=True).steps.tolist() == [100]


def test_an_infeasible_trial_has_its_step_but_is_never_the_fastest():
    info = pbx.steps_to_target(study([[1, 0.1, np.nan], [1, 0.5, 0.1]]), 0.1)
    assert info.steps.tolist() == [100, 200]
    assert info.infeasible.tolist() == [True, False]
    assert info.fastest == 1
    assert pbx.steps_to_target(study([[1.0, 0.5]]), 0.1).fastest == -1


def test_seeds_are_averaged_and_told_apart():
    info = pbx.steps_to_target(study([[[1.0, 0.0, 0.0, 0.0], [1.0, 0.6, 0.0, 0.0]]]), 0.0)
    assert info.steps.tolist() == [200]
    assert info.seed_steps.tolist() == [[100, 200]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=6, max_size=6),
    st.floats(-2, 2, width=32, allow_subnormal=False),
    st.booleans(),
)
def test_it_agrees_with_the_reducer(values, target, maximize):
    values = [*values[:5], target if values[5] > 0 else values[5]]  # The target itself, often.
    curve = np.asarray(values, np.float32)
    record = study(curve[None], maximize=maximize, infeasible=np.array([False]))
    steps = pbx.steps_to_target(record, target).steps
    assert steps[0] == reduced(maximize)(curve, target)


@functools.cache
def reduced(maximize):
    @jax.jit
    def run(curve, target):
        reducer = reducers.steps_to_target(target, maximize)

        def body(state, at):
            return reducer.update(state, curve[at], 100 * at), None

        return reducer.compute(jax.lax.scan(body, reducer.init(), jnp.arange(6))[0])

    return run


def test_bad_arguments():
    record = study([[1.0, 0.5]])
    with pytest.raises(ValueError, match="target must be finite"):
        pbx.steps_to_target(record, float("nan"))
    with pytest.raises(ValueError, match="valid/error_rate"):
        pbx.steps_to_target(record, 0.5, metric="valid/error_rat")
    with pytest.raises(TypeError, match="did you mean 'target'"):
        pbx.steps_to_target(record, taget=0.5)
