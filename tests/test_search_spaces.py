"""Budgets of hyperparameters: the playbook's table, and spaces that fit their optimizers."""

import inspect
import itertools

import jax
import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax.search_spaces import TABLE

ONE, TWO = ["learning_rate"], ["learning_rate", "b1"]
THREE, FOUR = [*TWO, "eps"], [*TWO, "eps", "b2"]


@pytest.mark.parametrize(
    ("num_trials", "names"),
    [
        (1, ONE),
        (9, ONE),
        (10, TWO),
        (24, TWO),
        (25, THREE),
        (26, THREE),
        (49, THREE),
        (50, FOUR),
        (51, FOUR),
        (10_000, FOUR),
    ],
)
def test_the_playbooks_table_at_its_edges(num_trials, names):
    space = pbx.adam_search_space(num_trials)
    assert list(space) == names
    assert list(pbx.optimizer_search_space("nadam", num_trials)) == names
    assert space["learning_rate"].scale == "log"
    assert {n: space[n].scale for n in space if n in ("b1", "b2")} == {
        n: "reverse_log" for n in space if n in ("b1", "b2")
    }
    if "eps" in space:
        assert space["eps"].scale == "log"


def test_substantially_more_is_an_argument():
    assert list(pbx.adam_search_space(30, many_trials=30)) == FOUR
    assert list(pbx.adam_search_space(99, many_trials=100)) == THREE
    assert list(pbx.adam_search_space(26, 26)) == FOUR
    with pytest.raises(
        ValueError, match=r'many_trials must be >= 26.*"substantially more than 25"'
    ):
        pbx.adam_search_space(30, many_trials=25)


def test_the_other_tables():
    def names(optimizer):
        return [list(pbx.optimizer_search_space(optimizer, n)) for n in (9, 10, 25, 50)]

    assert names("sgd") == [ONE] * 4
    assert names("momentum") == names("nesterov") == [ONE, *[["learning_rate", "momentum"]] * 3]
    assert names("rmsprop")[-1] == ["learning_rate", "momentum", "eps", "decay"]
    decayed = ["learning_rate", "b1", "weight_decay"]
    assert names("adamw") == names("nadamw") == [ONE, decayed, [*decayed, "eps"], names("adamw")[3]]
    assert names("adamw")[3] == [*decayed, "eps", "b2"]


@pytest.mark.parametrize("optimizer", TABLE)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(optimizer):
    spaces = [pbx.optimizer_search_space(optimizer, n) for n in (1, 10, 25, 50)]
    key = jax.random.key(3)
    for small, large in itertools.pairwise(spaces):
        assert list(large)[: len(small)] == list(small)
        ours, theirs = small.sample(key, 5), large.sample(key, 5)
        for name in small:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("optimizer", TABLE)
def test_every_point_is_a_legal_optimizer_whose_defaults_lie_in_the_ranges(optimizer):
    space = pbx.optimizer_search_space(optimizer, 50)
    make = getattr(pbx, optimizer)
    defaults = {n: p.default for n, p in inspect.signature(make).parameters.items()}
    assert set(space) <= set(defaults)
    for name, parameter in space.items():
        if name != "learning_rate":
            assert parameter.low <= defaults[name] <= parameter.high, name
    # Concrete corners: out of range they would raise.
    for end in ("low", "high"):
        make(**{name: getattr(parameter, end) for name, parameter in space.items()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pbx.adam_search_space(0), "num_trials must be >= 1"),
        (lambda: pbx.adam_search_space(True), "num_trials must be an integer"),
        (lambda: pbx.adam_search_space(10.0), "num_trials must be an integer"),
        (lambda: pbx.optimizer_search_space("adan", 5), "did you mean 'adam'"),
        (lambda: pbx.optimizer_search_space(pbx.adam, 5), "optimizer must be one of sgd"),
        (lambda: pbx.adam_search_space(5, many=3), "did you mean 'many_trials'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
