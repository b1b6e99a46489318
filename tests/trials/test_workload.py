"""Workloads from arrays and from Flax: their metrics, state, dropout, and test data."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny
from flax import nnx

import playbook_optax as pbx
from playbook_optax.trials import arrays, keys
from playbook_optax.trials.workload import takes_key

TRAIN, VALID = tiny.blobs()
KEY = jax.random.key(0)


def test_metrics_match_a_numpy_reference():
    workload = tiny.mlp(eval_batch_size=10, num_train_eval=20)
    params, state = workload.init(KEY)
    metrics = workload.evaluate(params, state, workload.data)
    for split, (x, y) in {"train": [a[:20] for a in TRAIN], "valid": VALID}.items():
        logits = np.asarray(tiny.mlp_apply(params, x), np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(
            metrics[f"{split}/loss"], -log_p[np.arange(len(y)), y].mean(), rtol=1e-5
        )
        np.testing.assert_allclose(
            metrics[f"{split}/error_rate"], (logits.argmax(axis=1) != y).mean(), rtol=1e-6
        )


def test_mse_takes_a_last_axis_of_one():
    x, y = TRAIN[0], TRAIN[0][:, 0] * 2
    workload = pbx.Workload.from_arrays(
        lambda key: jnp.ones((4, 1)),
        lambda w, x: x @ w,
        (x, y),
        (VALID[0], VALID[0][:, 0]),
        batch_size=8,
        loss="mse",
    )
    assert workload.objective == "valid/loss"
    metrics = workload.evaluate(*workload.init(KEY), workload.data)
    np.testing.assert_allclose(metrics["train/loss"], np.mean((x.sum(1) - y) ** 2), rtol=1e-5)


def test_test_data_are_only_for_the_final_call():
    workload = tiny.mlp(test=VALID)
    params, state = workload.init(KEY)
    assert set(workload.data) == {"train", "valid"}
    final = workload.final_evaluate(params, state)
    assert set(final) == {"test/loss", "test/error_rate"}
    with pytest.raises(ValueError, match="no test data"):
        tiny.mlp().final_evaluate(params, state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init", None, "init must be a function"),
        ("objective", "", "objective must name"),
        ("batch", None, "exactly one of batch"),
        ("maximize", 1, "maximize must be"),
        ("name", "", "name must be"),
    ],
)
def test_bad_workloads(field, value, message):
    good = {
        "name": "w",
        "init": lambda key: ({"w": jnp.ones(1)}, {}),
        "loss": lambda p, s, b, k: (p["w"][0], (s, {})),
        "batch": lambda d, k, i: (),
        "evaluate": lambda p, s, d: {"valid/loss": p["w"][0]},
        "objective": "valid/loss",
    }
    with pytest.raises(ValueError, match=message):
        pbx.Workload(**{**good, field: value})


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def flax_workload(module, **more):
    return pbx.Workload.from_flax(module, train=TRAIN, valid=VALID, batch_size=16, **more)


@pytest.mark.parametrize(
    "module",
    [
        LinenNet(),
        NnxNet,
        pytest.param(NnxNet(nnx.Rngs(0)), marks=pytest.mark.slow),
    ],
    ids=["linen", "class", "instance"],
)
def test_flax_batch_norm_and_dropout(module):
    workload = flax_workload(module)
    params, state = workload.init(KEY)
    batch = workload.batch(workload.data, KEY, 0)
    _, (new_state, _) = workload.loss(params, state, batch, KEY)
    old, new = jax.tree.leaves(state), jax.tree.leaves(new_state)
    assert old
    assert any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True))
    # Dropout: another key gives another loss, the same key the same; evaluation has none.
    losses = [float(workload.loss(params, state, batch, jax.random.key(k))[0]) for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    one = workload.evaluate(params, state, workload.data)
    two = workload.evaluate(params, state, workload.data)
    assert one["valid/loss"] == two["valid/loss"]
    # Evaluation uses the running statistics, so other statistics change it.
    other = workload.evaluate(params, new_state, workload.data)
    assert one["valid/loss"] != other["valid/loss"]
    train = jax.jit(pbx.make_train(workload, tiny.sgd, 30, 30, keep="final"))
    result = train({"learning_rate": 0.1}, KEY, workload.data)
    assert result.metrics["train/loss"][-1] < result.metrics["train/loss"][0]
    assert jax.tree.structure(result.params) == jax.tree.structure(params)


def layers(x, training):
    x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(nn.Dense(8)(x))
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not training)(x))


class ByInference(nn.Module):
    @nn.compact
    def __call__(self, x, inference=True):
        return layers(x, not inference)


class ByAttribute(nn.Module):
    is_train: bool = False

    @nn.compact
    def __call__(self, x):
        return layers(x, self.is_train)


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return layers(x, kwargs.get("warm", False))


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x, frozen=True):
        return layers(x, not frozen)


class NnxSwitch(NnxNet):
    def __call__(self, x, *, frozen=True):
        x = self.norm(self.hidden(x), use_running_average=frozen)
        return self.out(self.dropout(x, deterministic=frozen))


@pytest.mark.parametrize(
    ("module", "switch"),
    [
        (ByInference(), None),
        (ByAttribute(), None),
        (Hidden(), "warm"),
        (Frozen(), {"frozen": False}),
        (NnxSwitch, {"frozen": False}),
    ],
)
def test_a_switch_by_any_name_is_set_in_training(module, switch):
    workload = flax_workload(module, train_switch=switch)
    params, state = workload.init(KEY)
    batch = jax.tree.map(lambda leaf: leaf[:16], workload.data["train"])
    losses = [float(workload.loss(params, state, batch, jax.random.key(i))[0]) for i in (0, 1)]
    assert losses[0] != losses[1]  # Dropout draws.
    _, (moved, _) = workload.loss(params, state, batch, KEY)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state, moved)), strict=True))
    assert workload.evaluate(params, state, workload.data) == workload.evaluate(
        params, state, workload.data
    )


def test_dropout_or_batch_statistics_without_a_switch_are_refused():
    with pytest.raises(ValueError, match=r"Hidden has .*batch statistics.*train_switch='train'"):
        flax_workload(Hidden())
    with pytest.raises(ValueError, match="dropout would be off"):
        flax_workload(nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=True)]))
    with pytest.raises(ValueError, match=r"names 'inferense'.*did you mean"):
        flax_workload(ByInference(), train_switch="inferense")
    # Whoever says that there is none is believed.
    flax_workload(Hidden(), train_switch={})
    flax_workload(nn.Sequential([nn.Dense(2), nn.Dropout(0.0, deterministic=True)]))


def test_flax_seeds_differ_except_from_an_nnx_instance():
    def same(module):
        workload = flax_workload(module)
        one, two = (jax.tree.leaves(workload.init(jax.random.key(k))[0]) for k in (0, 1))
        return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))

    assert not same(LinenNet())
    assert not same(NnxNet)
    assert not same(lambda rngs: NnxNet(rngs))
    assert same(NnxNet(nnx.Rngs(0)))


def test_flax_linen_gradient_matches_flax_by_hand():
    module = nn.Dense(2)
    workload = flax_workload(module)
    params, state = workload.init(KEY)
    batch = workload.batch(workload.data, KEY, 3)
    grads = jax.grad(lambda p: workload.loss(p, state, batch, KEY)[0])(params)

    def by_hand(p):
        logits = module.apply({"params": p}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves(jax.grad(by_hand)(params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_not_a_flax_module():
    with pytest.raises(ValueError, match="give an instance"):
        flax_workload(LinenNet)
    with pytest.raises(ValueError, match=r"flax\.linen module"):
        flax_workload(3)


def batches():
    while True:
        yield np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("given", "version", "message"),
    [
        (batches(), "1", r"is an iterator itself \(generator\).*def host_batches\(start_step\)"),
        (iter([1]), "1", r"is an iterator itself \(list_iterator\)"),
        ([np.ones(2)], "1", r"must be a function host_batches\(start_step\).*got list.*def host"),
        (batches, "1", "must take one argument, the step of the first batch.*def host_batches"),
        (lambda start: batches(), None, "version must be given.*Give version='1'"),
    ],
)
def test_host_batches_that_cannot_be_read_again_say_what_to_give(given, version, message):
    base = {**vars(tiny.quadratic()), "batch": None}
    with pytest.raises(ValueError, match=message):
        pbx.Workload(**base | {"host_batches": given, "version": version})


def test_host_batches_that_make_no_iterator_say_what_they_made():
    base = {**vars(tiny.quadratic()), "batch": None, "version": "1"}
    for made, message in (([np.ones(2)], r"got list: return iter"), (3, "got int: yield batches")):
        work = pbx.Workload(**base | {"host_batches": lambda start, made=made: made})
        with pytest.raises(ValueError, match=message):
            pbx.run_study(work, tiny.sgd, tiny.LEARNING_RATES, num_steps=2, eval_every=1, key=KEY)


@pytest.mark.parametrize(
    ("evaluate", "takes"),
    [
        (lambda p, s, d: {}, False),
        (lambda p, s, d, rng: {}, True),
        (lambda p, s, d, key=None: {}, True),
        (lambda p, s, d, batch_size=3: {}, False),
        (lambda p, s, d, *rest: {}, False),
        (lambda p, s, d, *, key: {}, False),
        (functools.partial(lambda scale, p, s, d: {}, 2.0), False),
        (functools.partial(lambda scale, p, s, d, key: {}, 2.0), True),
        (max, False),
    ],
)
def test_an_evaluation_takes_a_key_by_its_fourth_argument(evaluate, takes):
    assert takes_key(evaluate) == takes


def noisy(takes):
    """A noise that is drawn at each evaluation, and the key's own number beside it."""

    def evaluate(params, state, data, key):
        noise = jax.random.normal(key)
        return {"valid/loss": 0.5 * jnp.sum(data * params["w"] ** 2), "valid/noise": noise}

    base = vars(tiny.quadratic())
    more = {"evaluate": evaluate, "evaluate_test": evaluate, "test_data": base["data"]}
    return pbx.Workload(**base | more) if takes else pbx.Workload(**base)


@pytest.mark.parametrize("independent", [False, True])
def test_evaluations_of_a_seed_are_on_the_same_draws(independent):
    points = {"learning_rate": np.array([0.1, 0.2, 0.3], np.float32)}
    asked = {"num_steps": 4, "eval_every": 2, "key": KEY, "num_seeds": 2, "progress": False}
    asked["independent"] = independent
    study = pbx.run_study(noisy(True), tiny.sgd, points, **asked)
    noise = study.data["valid/noise"].values
    assert noise.shape == (3, 2, 3)
    # The same at each evaluation; another one for each seed, and for each trial if they are apart.
    assert np.ptp(noise, axis=2).max() == 0
    assert len(np.unique(noise)) == (6 if independent else 2)
    # Nothing else changes, and `make_train` gives the same.
    plain = pbx.run_study(noisy(False), tiny.sgd, points, **asked)
    np.testing.assert_array_equal(study.data["valid/loss"], plain.data["valid/loss"])
    train = jax.jit(pbx.make_train(noisy(True), tiny.sgd, 4, 2))
    for trial, seed in ((0, 0), (2, 1)):
        key = pbx.trial_key(KEY, seed, trial if independent else None)
        alone = train(study.point(trial), key, noisy(True).data)
        np.testing.assert_array_equal(alone.metrics["valid/noise"], noise[trial, seed])


def test_the_key_of_an_evaluation_is_its_own():
    trained = pbx.make_train(noisy(True), tiny.sgd, 1, 1)({"learning_rate": 0.1}, KEY, np.ones(2))
    own = float(trained.metrics["valid/noise"][0])
    assert own == float(jax.random.normal(keys.evaluation_key(KEY)))
    others = [keys.init_key(KEY), keys.batch_key(KEY), *(keys.loss_key(KEY, i) for i in range(3))]
    assert own not in [float(jax.random.normal(key)) for key in (KEY, *others)]


def test_a_flax_module_takes_metrics_and_an_augmentation():
    workload = pbx.Workload.from_flax(
        nn.Dense(2),
        train=TRAIN,
        valid=VALID,
        batch_size=8,
        metrics={"accuracy": lambda outputs, y: jnp.argmax(outputs, axis=-1) == y},
        augment=lambda batch, key: {**batch, "x": -batch["x"]},
    )
    params, state = workload.init(KEY)
    got = workload.evaluate(params, state, workload.data)
    assert float(got["valid/accuracy"]) == pytest.approx(1 - float(got["valid/error_rate"]))
    rows = arrays.shuffled_rows(KEY, 2, len(TRAIN[0]), 8)
    np.testing.assert_array_equal(workload.batch(workload.data, KEY, 2)["x"], -TRAIN[0][rows])


def test_test_data_are_drawn_on_with_a_key():
    params, state = noisy(True).init(KEY)
    told = noisy(True).final_evaluate(params, state)
    assert told["valid/noise"] == float(jax.random.normal(jax.random.key(0)))
    other = noisy(True).final_evaluate(params, state, jax.random.key(1))
    assert other["valid/noise"] == float(jax.random.normal(jax.random.key(1)))
