"""Hyperparameters that nothing uses: found by the flow of values, refused before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import dependence, plan

KEY = jax.random.key(0)
RATES = np.array([0.1, 0.2], np.float32)
ASKED = {"num_steps": 2, "eval_every": 1, "key": KEY, "progress": False}


@jax.custom_jvp
def with_a_rule(a, b):
    return 2.0 * a


with_a_rule.defjvp(lambda given, tangents: (with_a_rule(*given), 2.0 * tangents[0]))


def looped(a, b, c):
    """The second carry is led on and decides nothing; the third decides when to stop."""
    start = (jnp.float32(0), a, b, c)
    end = jax.lax.while_loop(
        lambda s: s[0] < s[3], lambda s: (s[0] + 1, s[1] * 2, s[2] + s[1], s[3]), start
    )
    return end[1]


def led_on(a, b, c):
    """From one carry to the next, a round at a time."""
    end = jax.lax.fori_loop(0, 3, lambda i, s: (s[0], s[0], s[1]), (a, b, c))
    return end[2]


def scanned(a, b, c):
    (end, _), _ = jax.lax.scan(
        lambda s, x: ((s[0] + x[0] * a, s[1] + b), x[1]), (1.0, 2.0), (jnp.ones(3) * c, jnp.ones(3))
    )
    return end


def branched(a, b, c):
    return jax.lax.cond(a > 0, lambda b, c: b, lambda b, c: 1.0, b, c)


@pytest.mark.parametrize(
    ("function", "used"),
    [
        (lambda a, b, c: a + 0 * b, "ab"),
        (lambda a, b, c: (a, jnp.sin(b) is None, 3.0), "a"),
        (lambda a, b, c: 3.0, ""),
        (looped, "ac"),
        (led_on, "abc"),
        (scanned, "ac"),
        (branched, "ab"),
        (lambda a, b, c: with_a_rule(a, b), "a"),
        (lambda a, b, c: jax.jit(lambda d: d["a"])({"a": a, "b": b, "c": c}), "a"),
        (lambda a, b, c: jax.grad(lambda a: a**2 + jax.checkpoint(jnp.sin)(b))(a), "a"),
        (lambda a, b, c: jax.vmap(lambda a, b: a)(a[None], b[None])[0], "a"),
        (lambda a, b, c: jax.lax.stop_gradient(c), "c"),
    ],
)
def test_inputs_that_an_output_depends_on(function, used):
    def traced(values):
        return function(**values)

    values = {"a": jnp.float32(1), "b": jnp.float32(2), "c": jnp.float32(3)}
    jaxpr = jax.make_jaxpr(traced)(values).jaxpr
    found = dependence.used_inputs(jaxpr)
    assert "".join(name for name, one in zip("abc", found, strict=True) if one) == used


def decays(point):
    return pbx.adamw(point["learning_rate"], weight_decay=point.get("weight_decay", 0.1))


@pytest.mark.parametrize("width", [1, 4])
def test_a_misspelled_hyperparameter_is_refused_before_anything_is_written(tmp_path, width):
    space = pbx.SearchSpace(
        {
            "learning_rate": pbx.Float(1e-3, 1.0, scale="log"),
            "wieght_decay": pbx.Float(1e-3, 1.0, scale="log"),
        }
    )
    told = (
        "nothing depends on the hyperparameter 'wieght_decay'.*Did you mean 'weight_decay'.*"
        "Used are: 'learning_rate'"
    )
    for _ in range(2):  # The second time the program is found, not traced.
        with pytest.raises(ValueError, match=told):
            pbx.run_study(
                tiny.quadratic(),
                decays,
                space,
                num_trials=2,
                trials_per_block=width,
                directory=tmp_path / "study",
                **ASKED,
            )
    assert list(tmp_path.iterdir()) == []


def of_point(point):
    """Only the workload reads the curvature, only the start of training the scale."""
    work = tiny.quadratic()
    return pbx.Workload(
        **{
            **vars(work),
            "init": lambda key: ({"w": point["scale"] * jnp.ones(2)}, {}),
            "batch": lambda data, key, step: data * point["curvature"],
        }
    )


def test_what_any_of_the_functions_uses_is_used():
    points = {
        "learning_rate": RATES,
        "curvature": RATES,
        "scale": RATES,
        "end": np.array([0, 1], np.int32),
    }
    study = pbx.run_study(
        of_point,
        lambda point: pbx.sgd(dict(point)["learning_rate"]),
        points,
        make_schedule=lambda point, num_steps: pbx.schedules.linear_decay(
            point["learning_rate"], num_steps, end_value=point["end"] * 0.1
        ),
        **ASKED,
    )
    assert study.num_trials == 2


def test_a_column_of_a_table_is_warned_of_where_it_differs():
    note = {"learning_rate": RATES, "note": RATES}
    same = {"learning_rate": RATES, "note": np.zeros(2, np.float32)}
    assert pbx.run_study(tiny.quadratic(), tiny.sgd, same, **ASKED).num_trials == 2
    with pytest.warns(UserWarning, match="nothing depends on the hyperparameter 'note'"):
        study = pbx.run_study(tiny.quadratic(), tiny.sgd, note, **ASKED)
    np.testing.assert_array_equal(study.points["note"], RATES)


def test_fixed_hyperparameters_are_let_be():
    trainer = pbx.Trainer(tiny.quadratic(), tiny.sgd, fixed={"note": 3.0}, progress=False)
    asked = {name: value for name, value in ASKED.items() if name != "progress"}
    assert pbx.run_study(trainer, {"learning_rate": RATES}, **asked).num_trials == 2


def test_tune_refuses_it_before_its_first_study(tmp_path):
    space = pbx.SearchSpace(
        {
            "learning_rate": pbx.Float(1e-3, 1.0, scale="log"),
            "wieght_decay": pbx.Float(1e-3, 1.0, scale="log"),
        }
    )
    with pytest.raises(ValueError, match=r"hyperparameter 'wieght_decay'.*mean 'weight_decay'"):
        pbx.tune(
            tiny.quadratic(),
            decays,
            space,
            num_trials=12,
            num_steps=16,
            key=KEY,
            directory=tmp_path,
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []


def test_functions_without_an_identity_get_no_hint():
    points, _ = plan.make_points(pbx.SearchSpace({"wieght_decay": pbx.Float(0.0, 1.0)}), 1, KEY)
    with pytest.raises(ValueError, match=r"in vain\. Used are: none\. Correct the name"):
        dependence.check({"wieght_decay"}, points, ["wieght_decay"], (decays, object()))
