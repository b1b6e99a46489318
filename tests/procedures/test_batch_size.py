"""What a new batch size asks for: ranges, steps, and no comparison without a study."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.procedures import change_batch_size
from playbook_optax.procedures.batch_size import PROBE_NORMS, _gradient_power
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

KEY = jax.random.key(0)
SPACE = SearchSpace(
    {
        "momentum": Float(0.5, 0.99, scale="reverse_log"),
        "weight_decay": Float(1e-5, 1e-2, scale="log"),
        "dropout": Float(0.0, 0.5),
        "learning_rate": Float(1e-3, 1.0, scale="log"),
        "layers": Integer(1, 4),
        "activation": Categorical(["relu", "gelu"]),
    }
)


def made(space=SPACE, num_trials=20, num_steps=600):
    """The best is trial 3, with a learning rate of 0.1."""
    rng = np.random.default_rng(0)
    points = {
        name: np.array(p.from_unit(jnp.asarray(rng.random(num_trials), jnp.float32)))
        for name, p in space.items()
    }
    points["learning_rate"][3] = 0.1
    loss = 1.0 + rng.random(num_trials)
    loss[3] = 0.5
    return pbx.Study.from_arrays(
        points,
        {"valid/loss": np.stack([loss + 2, loss], axis=1)},
        [0, num_steps],
        objective="valid/loss",
        space=space,
    )


def change(study, optimizer=tiny_workloads.sgd, **arguments):
    return change_batch_size(
        tiny_workloads.quadratic(),
        optimizer,
        study,
        key=KEY,
        **{"batch_size": 64, "new_batch_size": 1024, **arguments},
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_the_plan_for_a_larger_batch():
    study = made()
    verdict = change(study)
    plan, new = verdict.answer, verdict.answer.space
    assert (verdict.cost, plan.batch_size, plan.num_trials) == (0, 1024, 20)
    assert list(new) == list(SPACE)
    assert plan.retune == ("momentum", "weight_decay", "dropout", "learning_rate")
    # SGD: 0.1 and 16 times that, and a factor of 4 beyond either.
    assert new["learning_rate"] == Float(0.025, 6.4, scale="log")
    assert new["momentum"].low < 0.5
    assert 0.99 < new["momentum"].high < 1
    assert new["weight_decay"].low == 1e-5
    assert new["weight_decay"].high > 1e-2
    assert (new["dropout"].low, 0.5 < new["dropout"].high < 1) == (0.0, True)
    assert (new["layers"], new["activation"]) == (SPACE["layers"], SPACE["activation"])
    # 600 / 16 rounded up, and as many steps as before.
    assert (plan.num_steps, plan.num_steps_range) == (600, (38, 600))
    assert set(plan.reasons) == {*SPACE, "num_steps"}
    assert codes(verdict) == ["batch_size_not_for_validation", "rerun_study"]


def test_a_trainer_or_nothing_in_the_place_of_workload_and_optimizer():
    study, arguments = made(), {"key": KEY, "batch_size": 64, "new_batch_size": 1024}
    verdict = change_batch_size(
        pbx.Trainer(tiny_workloads.quadratic(), tiny_workloads.sgd), study, **arguments
    )
    assert verdict.answer == change(study).answer
    told = change_batch_size(None, None, study, rule="linear", **arguments)
    assert told.answer == verdict.answer
    with pytest.raises(ValueError, match="workload is None"):
        change_batch_size(None, None, study, **arguments)


def test_the_plan_for_a_smaller_batch():
    plan = change(made(), new_batch_size=16).answer
    assert plan.space["learning_rate"] == Float(0.00625, 0.4, scale="log")
    assert plan.space["weight_decay"].low < 1e-5
    assert plan.space["weight_decay"].high == 1e-2
    assert plan.space["dropout"] == SPACE["dropout"], "0 is as weak as it gets"
    assert (plan.num_steps, plan.num_steps_range) == (2400, (600, 2400))


@pytest.mark.parametrize(
    ("name", "make_optimizer", "power"),
    [
        ("sgd", tiny_workloads.sgd, 1.0),
        ("momentum", tiny_workloads.momentum, 1.0),
        (
            "clipped",
            lambda p: optax.chain(optax.clip_by_global_norm(1.0), tiny_workloads.sgd(p)),
            1,
        ),
        ("warmed up", lambda p: optax.chain(tiny_workloads.sgd(p), pbx.scale_by_warmup(50)), 1.0),
        ("adam", lambda p: pbx.adam(p["learning_rate"]), 0.5),
        ("adamw", lambda p: optax.adamw(p["learning_rate"], weight_decay=0.1), 0.5),
        ("lion", lambda p: optax.lion(p["learning_rate"]), 0.5),
        ("plateau", lambda p: optax.chain(tiny_workloads.sgd(p), pbx.reduce_on_plateau()), 1.0),
        ("none", lambda p: optax.set_to_zero(), 1.0),
    ],
)
def test_how_an_optimizer_scales_is_measured(name, make_optimizer, power):
    trainer = pbx.Trainer(tiny_workloads.quadratic(), make_optimizer)
    got = _gradient_power(trainer, {"learning_rate": np.float32(0.1)}, 100, KEY)
    assert got == power, name


def test_an_optimizer_in_between_and_a_scheduled_one():
    work, point = tiny_workloads.quadratic(), {"learning_rate": np.float32(0.1)}
    # With eps as large as the root of the second moment the update grows by 2 / (3 / 2).
    eps = PROBE_NORMS[0] / np.sqrt(2) * np.sqrt(1 - 0.999**100)
    trainer = pbx.Trainer(work, lambda p: pbx.adam(0.1, eps=p["eps"]), fixed={"eps": eps})
    between = _gradient_power(trainer, point, 100, KEY)
    assert between == pytest.approx(0.5 + 0.5 * np.log2(4 / 3), abs=0.006)
    trainer = pbx.Trainer(
        work,
        lambda p: optax.scale_by_schedule(p["learning_rate"]),
        lambda p, n: pbx.schedules.linear_decay(p["learning_rate"], n),
    )
    scheduled = _gradient_power(trainer, point, 100, KEY)
    assert scheduled == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("decay", "num_steps", "power"),
    # The mean square begins at 1: its part of decay**num_steps is small against the gradient's
    # square, 8e-4, after 200 updates at 0.9, and not after 200 at 0.999.
    [(0.9, 200, 0.5), (0.9, 3, 1.0), (0.999, 200, 1.0), (0.999, 20_000, 0.5)],
)
def test_an_average_that_begins_at_one_is_probed_until_it_has_forgotten(decay, num_steps, power):
    trainer = pbx.Trainer(
        tiny_workloads.quadratic(), lambda p: pbx.rmsprop(p["learning_rate"], decay=decay)
    )
    got = _gradient_power(trainer, {"learning_rate": np.float32(0.1)}, num_steps, KEY)
    assert got == pytest.approx(power, abs=0.02)


def test_updates_that_are_skipped_at_the_end_do_not_decide():
    trainer = pbx.Trainer(
        tiny_workloads.quadratic(),
        lambda p: optax.MultiSteps(pbx.adam(p["learning_rate"]), 7),
        lambda p, n: pbx.schedules.linear_decay(p["learning_rate"], n // 2),
    )
    assert _gradient_power(trainer, {"learning_rate": np.float32(0.1)}, 100, KEY) == 0.5


def test_adam_and_a_rule_by_hand():
    adam = change(made(), lambda p: pbx.adam(p["learning_rate"])).answer
    assert adam.space["learning_rate"] == Float(0.025, 1.6, scale="log")
    assert "square root" in adam.reasons["learning_rate"]
    told = change(made(), rule="sqrt", room=2.0).answer
    assert told.space["learning_rate"] == Float(0.05, 0.8, scale="log")
    assert "square root" in told.reasons["learning_rate"]
    assert "not an answer" in told.reasons["learning_rate"]


def test_the_old_best_and_the_scaled_one_are_inside_at_any_ratio():
    study = made()
    for new in (1, 7, 63, 65, 4096):
        plan = change(study, new_batch_size=new, rule="linear").answer
        low, high = plan.space["learning_rate"].low, plan.space["learning_rate"].high
        assert low < min(0.1, 0.1 * new / 64) / 3.9
        assert high > max(0.1, 0.1 * new / 64) * 3.9
        short, long = plan.num_steps_range
        assert short <= 600 <= long
        assert long == plan.num_steps


def test_what_was_not_searched_is_said():
    study = made(SearchSpace({"learning_rate": SPACE["learning_rate"]}))
    verdict = change(study, rule="linear")
    (finding,) = (f for f in verdict.findings if f.code == "not_searched_again")
    assert finding.evidence["missing"] == ["momentum (or b1, b2)", "regularization"]
    named = change(made(), rule="linear", kinds={"layers": "regularization"})
    assert "layers" in named.answer.retune


def test_a_constant_hyperparameter_stays_out():
    study = pbx.Study.from_arrays(
        {"learning_rate": [0.1, 0.2, 0.4], "momentum": [0.9, 0.9, 0.9]},
        {"valid/loss": [[3, 2], [3, 1], [3, 2]]},
        [0, 10],
        objective="valid/loss",
    )
    plan = change(study, rule="linear").answer
    assert list(plan.space) == ["learning_rate"]
    assert "Constant" in plan.reasons["momentum"]


def test_refusal_and_bad_arguments():
    dead = pbx.Study.from_arrays(
        {"learning_rate": [0.1]},
        {"valid/loss": [[1.0, float("nan")]]},
        [0, 1],
        objective="valid/loss",
    )
    refused = change(dead)
    assert refused.answer is None
    assert "all_infeasible" in codes(refused)
    study = made()
    for arguments, message in (
        ({"new_batch_size": 64}, "new_batch_size = 64 is the old one"),
        ({"new_batch_size": 0}, "new_batch_size must be >= 1"),
        ({"rule": "root"}, "rule = 'root' is unknown"),
        ({"room": 1.0}, "room must be > 1"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            change(study, **arguments)
    with pytest.raises(ValueError, match=r"no hyperparameter 'learning_rate'.*: lr"):
        change(pbx.Study.from_arrays({"lr": [0.1]}, {"loss": [[1.0]]}, [0], objective="loss"))


def test_a_space_gets_its_study():
    space = SearchSpace({"learning_rate": Float(1e-2, 1.0, scale="log")})
    verdict = change(space, num_trials=6, num_steps=20, progress=False)
    assert verdict.cost == 120
    assert verdict.studies["old_batch_size"].num_trials == 6
    best = verdict.studies["old_batch_size"].best().point["learning_rate"]
    assert verdict.answer.space["learning_rate"].low == pytest.approx(best / 4, rel=0.01)
