"""Programs that outlive the call that made them: when they are shared, and when never."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import identity, programs
from playbook_optax.runner.run import StudyRunner

KEY = jax.random.key(0)
RATES = {"learning_rate": np.float32([0.1, 0.3])}
ARGUMENTS = {"num_steps": 6, "eval_every": 3, "key": KEY, "progress": False}


@pytest.fixture(autouse=True)
def nothing_kept():
    programs.forget()
    yield
    programs.forget()


@pytest.fixture
def counted(monkeypatch):
    """How many programs were traced and compiled: a dict of lists of names."""
    seen = {"traced": [], "compiled": []}
    trace, compiled = programs.Programs._trace, jax.stages.Lowered.compile

    def traced(self):
        seen["traced"].append("set")
        return trace(self)

    def compiling(self, *args, **kwargs):
        seen["compiled"].append("one")
        return compiled(self, *args, **kwargs)

    monkeypatch.setattr(programs.Programs, "_trace", traced)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiling)
    return seen


def values(study):
    return study.data["valid/loss"].values


def study(workload=None, make_optimizer=tiny.sgd, points=RATES, **arguments):
    workload = tiny.noisy_quadratic() if workload is None else workload
    return pbx.run_study(workload, make_optimizer, points, **{**ARGUMENTS, **arguments})


def test_the_same_call_neither_traces_nor_compiles_again(counted):
    workload = tiny.noisy_quadratic()
    first = study(workload)
    made = {name: len(what) for name, what in counted.items()}
    assert made["traced"] == 1
    again = study(workload)
    assert {name: len(what) for name, what in counted.items()} == made
    np.testing.assert_array_equal(values(first), values(again))


@pytest.mark.parametrize(
    "other",
    [
        {"num_steps": 11, "eval_every": 2},
        {"points": {"learning_rate": np.float32([0.2, 0.4, 0.5])}},
        {"points": tiny.SPACE, "num_trials": 3},
        {"num_seeds": 2},
        {"key": jax.random.key(7)},
        {"keep": "best"},
        {"keep": "final"},
        {"eval_every": 1},
    ],
    ids=str,
)
def test_numbers_are_data_of_one_program(counted, other):
    workload = tiny.noisy_quadratic()
    study(workload)
    made = {name: len(what) for name, what in counted.items()}
    shared = study(workload, **other)
    assert {name: len(what) for name, what in counted.items()} == made
    programs.forget()
    alone = study(workload, **other)
    np.testing.assert_array_equal(values(shared), values(alone))


def test_more_evaluations_than_there_is_room_for_are_another_program(counted):
    workload = tiny.noisy_quadratic()
    study(workload)
    long = study(workload, num_steps=40, eval_every=1)
    assert len(counted["traced"]) == 2
    assert values(long).shape == (2, 41)
    assert programs.room_for(41) == 128
    assert programs.room_for(5000) == 8192


def make(factor):
    return lambda point: pbx.sgd(factor * point["learning_rate"])


def test_equal_functions_made_anew_share_a_program(counted):
    workload = tiny.noisy_quadratic()
    first = study(workload, make(1.0))
    made = {name: len(what) for name, what in counted.items()}
    np.testing.assert_array_equal(values(first), values(study(workload, make(1.0))))
    assert {name: len(what) for name, what in counted.items()} == made


def test_functions_that_trace_alike_are_compiled_once(counted):
    workload = tiny.noisy_quadratic()
    study(workload, lambda point: pbx.sgd(point["learning_rate"]))
    compiled = len(counted["compiled"])
    study(workload, lambda p: pbx.sgd(p["learning_rate"]))
    assert len(counted["traced"]) == 2
    assert len(counted["compiled"]) == compiled


FACTOR = 1.0


def by_global(point):
    return pbx.sgd(FACTOR * point["learning_rate"])


class Settings:
    """A class of the user's, whose objects may change unseen."""

    factor = 1.0


def changed_ways():
    """Functions that change between two calls though they stay the same objects."""
    cell = {"factor": 1.0}
    held = Settings()
    module = types.ModuleType("settings_of_mine")
    module.factor = 1.0
    box = np.float32([1.0])
    loose = 1.0

    def by_variable(point):
        return pbx.sgd(loose * point["learning_rate"])

    def change_variable():
        nonlocal loose
        loose = 2.0

    return {
        "dict": (
            lambda point: pbx.sgd(cell["factor"] * point["learning_rate"]),
            lambda: cell.update(factor=2.0),
        ),
        "object": (
            lambda point: pbx.sgd(held.factor * point["learning_rate"]),
            lambda: setattr(held, "factor", 2.0),
        ),
        "module": (
            lambda point: pbx.sgd(module.factor * point["learning_rate"]),
            lambda: setattr(module, "factor", 2.0),
        ),
        "module by a string": (
            lambda point: pbx.sgd(vars(module)["factor"] * point["learning_rate"]),
            lambda: setattr(module, "factor", 2.0),
        ),
        "array": (
            lambda point: pbx.sgd(box[0] * point["learning_rate"]),
            lambda: box.__setitem__(0, 2.0),
        ),
        "variable": (by_variable, change_variable),
        "partial": (
            functools.partial(
                lambda point, held: pbx.sgd(held["factor"] * point["learning_rate"]), held=cell
            ),
            lambda: cell.update(factor=2.0),
        ),
    }


@pytest.mark.parametrize("way", changed_ways())
def test_a_changed_function_never_gets_the_old_program(way):
    make_optimizer, change = changed_ways()[way]
    workload = tiny.noisy_quadratic()
    before = study(workload, make_optimizer)
    change()
    after = study(workload, make_optimizer)
    doubled = study(workload, lambda point: pbx.sgd(2.0 * point["learning_rate"]))
    np.testing.assert_array_equal(values(after), values(doubled))
    assert not np.array_equal(values(before), values(after))


def test_a_changed_global_never_gets_the_old_program():
    workload = tiny.noisy_quadratic()
    before = study(workload, by_global)
    globals().update(FACTOR=2.0)
    try:
        after = study(workload, by_global)
    finally:
        globals().update(FACTOR=1.0)
    assert not np.array_equal(values(before), values(after))
    np.testing.assert_array_equal(values(study(workload, by_global)), values(before))


@pytest.mark.filterwarnings("ignore:nothing depends on the hyperparameter")
def test_programs_that_ignore_different_hyperparameters_are_not_mixed_up():
    """Their texts would be equal if what is not used were left out of them."""
    points = {"a": np.float32([0.1, 0.2]), "b": np.float32([0.3, 0.4])}
    workload = tiny.noisy_quadratic()
    by_a = study(workload, lambda point: pbx.sgd(point["a"]), points)
    by_b = study(workload, lambda point: pbx.sgd(point["b"]), points)
    assert not np.array_equal(values(by_a), values(by_b))
    swapped = {"a": points["b"], "b": points["a"]}
    np.testing.assert_array_equal(
        values(study(workload, lambda point: pbx.sgd(point["a"]), swapped)), values(by_b)
    )


def test_other_data_of_equal_shapes_share_a_program(counted):
    one = tiny.noisy_quadratic()
    other = dataclasses.replace(one, data=2 * one.data)
    first = study(one)
    made = len(counted["traced"])
    second = study(other)
    assert len(counted["traced"]) == made
    assert not np.array_equal(values(first), values(second))
    programs.forget()
    np.testing.assert_array_equal(values(study(other)), values(second))


def test_a_schedule_that_needs_the_number_has_a_program_for_each_length(counted):
    def make_schedule(point, num_steps):
        return lambda count: point["learning_rate"] * (1 - count / int(num_steps))

    def traced_schedule(point, num_steps):
        return lambda count: point["learning_rate"] * (1 - count / num_steps)

    workload = tiny.noisy_quadratic()
    space = {"make_schedule": make_schedule}
    own = study(workload, **space)
    np.testing.assert_allclose(
        values(own), values(study(workload, make_schedule=traced_schedule)), rtol=1e-6
    )
    tried = len(counted["traced"])
    longer = study(workload, **space, num_steps=12, eval_every=3)
    assert len(counted["traced"]) > tried
    np.testing.assert_allclose(
        values(longer),
        values(study(workload, make_schedule=traced_schedule, num_steps=12, eval_every=3)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("number", [int, lambda traced: traced])
def test_preflight_says_so_of_a_schedule_that_needs_the_number(monkeypatch, number):
    def make_schedule(point, num_steps):
        return lambda count: point["learning_rate"] * (1 - count / number(num_steps))

    monkeypatch.setattr(StudyRunner, "rehearse", lambda *_: (0.0, 1.0))
    arguments = {"num_steps": 6, "eval_every": 3, "make_schedule": make_schedule}
    report = pbx.preflight(tiny.noisy_quadratic(), tiny.sgd, RATES, trials_per_block=2, **arguments)
    told = "schedule_needs_a_number" in [finding.code for finding in report.findings]
    assert told == (number is int)


def test_the_users_functions_are_traced_once():
    counts = dict.fromkeys(("init", "loss", "batch", "evaluate"), 0)

    def counting(name, function):
        def counted(*args):
            counts[name] += 1
            return function(*args)

        return counted

    work = tiny.noisy_quadratic()
    study(
        dataclasses.replace(work, **{name: counting(name, getattr(work, name)) for name in counts})
    )
    # Once for shapes, checks and the width, once inside the program over the devices.
    assert max(counts.values()) <= 2, counts


def test_few_programs_are_kept_unless_a_trainer_holds_them(monkeypatch, counted):
    monkeypatch.setattr(programs, "MAX_SETS", 1)
    monkeypatch.setattr(programs, "MAX_COMPILED", 4)
    workload = tiny.noisy_quadratic()
    trainer = pbx.Trainer(workload, tiny.sgd, progress=False)
    arguments = {"num_steps": 6, "eval_every": 3, "key": KEY}
    pbx.run_study(trainer, RATES, **arguments)
    study(workload, tiny.momentum)
    assert len(programs._sets) == 1
    assert len(programs._compiled) <= 4
    traced = len(counted["traced"])
    pbx.run_study(trainer, RATES, **arguments)
    assert len(counted["traced"]) == traced
    study(workload, tiny.momentum)


def test_fixed_hyperparameters_are_data_and_no_points(counted, tmp_path):
    def make_optimizer(point):
        return pbx.momentum(point["learning_rate"], point["momentum"])

    workload = tiny.noisy_quadratic()
    both = study(workload, make_optimizer, {**RATES, "momentum": np.float32([0.9, 0.9])})
    traced = len(counted["traced"])
    fixed = study(workload, make_optimizer, fixed={"momentum": 0.9}, directory=tmp_path)
    assert len(counted["traced"]) == traced
    np.testing.assert_array_equal(values(both), values(fixed))
    assert list(fixed.points) == ["learning_rate"]
    assert fixed.spec["fixed"] == {"momentum": pytest.approx(0.9)}
    with pytest.raises(ValueError, match="fixed is"):
        study(workload, make_optimizer, fixed={"momentum": 0.5}, directory=tmp_path)
    replayed = fixed.replay(1)
    assert replayed.attrs["bit_exact"]


def test_a_trainer_says_once_what_and_how():
    trainer = pbx.Trainer(tiny.noisy_quadratic(), tiny.sgd, trials_per_block=2, progress=False)
    arguments = {"num_steps": 6, "eval_every": 3, "key": KEY}
    one = pbx.run_study(trainer, RATES, **arguments)
    assert one.spec["trials_per_block"] == 2
    two = study(trials_per_block=2)
    np.testing.assert_array_equal(values(one), values(two))
    with pytest.raises(TypeError, match=r"got a Trainer.*progress"):
        pbx.run_study(trainer, RATES, **arguments, progress=False)
    with pytest.raises(TypeError, match="did you mean 'trials_per_block'"):
        study(trials_per_blok=2)
    with pytest.raises(TypeError, match="needs make_optimizer"):
        pbx.run_study(tiny.noisy_quadratic(), points=RATES, **arguments)
    with pytest.raises(ValueError, match="fixed"):
        pbx.Trainer(tiny.noisy_quadratic(), tiny.sgd, fixed={"a": "b"})


# Identity ----------------------------------------------------------------------------------------


def test_identities_tell_values_apart():
    pairs = [(1, 1.0), (True, 1), ("a", b"a"), ((1,), [1]), ({"a": 1}, {"a": 2}), (None, 0)]
    pairs += [(np.float32([1]), np.float32([2])), (np.float32([1]), np.float64([1]))]
    pairs += [(make(1.0), make(2.0)), (jnp.sin, jnp.cos)]
    for one, other in pairs:
        assert identity.identity(one) != identity.identity(other), (one, other)
        assert identity.identity(one) == identity.identity(one), one


def test_what_may_change_unseen_has_no_identity():
    for value in (Settings(), object(), iter([1]), np.array([Settings()], object)):
        with pytest.raises(identity.NoIdentity):
            identity.identity(lambda value=value: value)


def test_a_changed_class_is_another(monkeypatch):
    def value():
        return Settings.factor

    before = identity.identity(value)
    assert identity.identity(value) == before
    monkeypatch.setattr(Settings, "factor", 3.0)
    assert identity.identity(value) != before


class Model(nn.Module):
    """A Flax model that reads a global."""

    width: int

    @nn.compact
    def __call__(self, x):
        return FACTOR * nn.Dense(self.width)(x)


def test_a_flax_module_is_its_fields_and_its_code():
    before = identity.identity(Model(3))
    assert identity.identity(Model(3)) == before
    assert identity.identity(Model(4)) != before
    globals().update(FACTOR=5.0)
    try:
        assert identity.identity(Model(3)) != before
    finally:
        globals().update(FACTOR=1.0)


def test_functions_that_call_each_other_have_an_identity():
    def one(n):
        return other(n - 1) if n else 0

    def other(n):
        return one(n - 1) if n else 1

    assert identity.identity(one) == identity.identity(one)
    assert identity.identity(one) != identity.identity(other)


def test_a_flax_workload_has_an_identity():
    # Without one every call traces, and a second study costs a tenth of the first and more.
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, inference=True):
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=inference)(x))

    x, y = np.zeros((8, 3), np.float32), np.zeros(8, np.int32)

    def made():
        return pbx.Workload.from_flax(Net(), train=(x, y), valid=(x, y), batch_size=4)

    with pytest.warns(UserWarning, match="also stand in the training set"):
        one, other = made(), made()
    assert programs.digest_of((one, tiny.sgd, None)) == programs.digest_of((other, tiny.sgd, None))
    assert programs.digest_of((one, tiny.sgd, None)) is not None
