"""Fingerprints of data and programs: equal for what is equal, different for what is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax.runner import plan

DATA = {"x": np.arange(6, dtype=np.float32), "y": np.arange(6, dtype=np.int32)}


def test_data_are_told_apart_by_structure_dtype_shape_and_value():  # 67
    others = [
        {**DATA, "x": DATA["x"] + np.float32(1e-6)},
        {**DATA, "x": DATA["x"].view(np.int32)},
        {**DATA, "x": DATA["x"].reshape(2, 3)},
        {"x": DATA["x"], "z": DATA["y"]},
        [DATA["x"], DATA["y"]],
    ]
    found = [plan.fingerprint_data(data) for data in (DATA, *others)]
    assert len(set(found)) == len(found)
    assert plan.fingerprint_data({**DATA, "x": jnp.asarray(DATA["x"])}) == found[0]
    strided = np.stack([DATA["x"], DATA["x"]], axis=1)[:, 0]
    assert plan.fingerprint_data({**DATA, "x": strided}) == found[0]


def test_programs_are_told_apart_by_what_they_do_and_hold():  # 67
    def times(constant, x):
        return x * jnp.asarray(constant)

    ones = np.ones(3, np.float32)
    constants = [ones, ones + 1, ones.astype(np.int32), np.ones(1, np.float32)]
    functions = [*(functools.partial(times, one) for one in constants), lambda x: x + ones]
    found = [plan.fingerprint_program(function, ones) for function in functions]
    assert len(set(found)) == len(found)
    assert plan.fingerprint_program(functools.partial(times, ones.copy()), ones) == found[0]


def test_addresses_are_no_part_of_a_program():
    def called(x):
        # Another function at every trace.
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), np.float32), x)

    x = np.float32(1)
    one, other = (jax.make_jaxpr(lambda x: called(x))(x) for _ in range(2))
    assert id(one.eqns[0].params["callback"]) != id(other.eqns[0].params["callback"])
    held = plan.fingerprint_program(lambda x: called(x), x)
    assert plan.fingerprint_program(lambda x: called(x), x) == held
