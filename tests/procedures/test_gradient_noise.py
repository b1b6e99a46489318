"""The variance of the gradient: closed forms, unbiasedness, batch sizes, variants, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.procedures import gradient_noise
from playbook_optax.trials import keys

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + RNG.normal(size=24)
W = np.array([0.5, 0.0, 0.0])
# Gradient of (x w - y)**2 for each example, float64.
GRADIENTS = 2 * (X @ W - Y)[:, None] * X
MEAN = GRADIENTS.mean(axis=0)
SPREAD = float(((GRADIENTS - MEAN) ** 2).sum() / 24)  # around the gradient of these examples
SAMPLE_SPREAD = SPREAD * 24 / 23  # across examples, with N - 1


def regression(batch_size=4, replace=True):
    """Linear regression at fixed weights; examples with replacement, or in shuffled epochs."""
    shuffled = pbx.Workload.from_arrays(
        lambda key: {"w": jnp.asarray(W, jnp.float32)},
        lambda params, x: x @ params["w"],
        (X, Y),
        (X[:4] + 1, Y[:4]),
        batch_size=batch_size,
        loss="mse",
        name="regression",
    )

    def batch(data, key, step):
        rows = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, 24)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data["train"])

    return pbx.Workload(**{**vars(shuffled), "batch": batch}) if replace else shuffled


def measure(workload, **arguments):
    verdict = gradient_noise(workload, key=KEY, **arguments)
    return verdict, verdict.answer.variants[0]


def near(value, error, expected, errors=4.0):
    assert error < 0.1 * abs(expected) + 1e-12  # else it says little
    assert abs(value - expected) < errors * error


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_with_replacement_the_estimates_are_unbiased():
    _, noise = measure(regression(), num_batches=6, num_repeats=2000)
    near(noise.trace, noise.trace_error, SPREAD)
    near(noise.squared_norm, noise.squared_norm_error, float(MEAN @ MEAN))
    near(noise.noise_scale, noise.noise_scale_error, SPREAD / float(MEAN @ MEAN))


def test_without_replacement_they_are_those_of_new_examples():
    verdict, noise = measure(regression(replace=False), num_batches=32, num_repeats=2000)
    assert noise.num_batches == 6  # One epoch.
    near(noise.trace, noise.trace_error, SAMPLE_SPREAD)
    expected = float(MEAN @ MEAN) - SAMPLE_SPREAD / 24
    assert noise.squared_norm_error < 1e-2 * expected  # The mean of an epoch is always the same.
    assert abs(noise.squared_norm - expected) < 4 * noise.squared_norm_error
    assert codes(verdict) == ["gradient_noise"]


def test_the_variance_falls_as_one_over_the_batch_size():
    _, noise = measure(regression(batch_size=1), num_batches=24, num_repeats=2000)
    assert [row.batch_size for row in noise.rows] == [1, 2, 4, 8]
    assert [row.num_groups for row in noise.rows] == [24, 12, 6, 3]
    for row in noise.rows:
        near(row.variance, row.variance_error, SPREAD / row.batch_size)
    # Batches of four that are drawn as such have the variance of four averaged.
    _, built = measure(regression(batch_size=4), num_batches=6, num_repeats=2000)
    near(built.rows[0].variance, built.rows[0].variance_error, noise.rows[2].variance, errors=6)


def test_it_is_the_estimator_of_a_small_and_a_big_batch_on_the_very_gradients():
    """McCandlish et al., appendix A, in float64 from the gradients that a trial would see."""
    workload = regression()
    num, size, repeats = 6, 4, 3
    _, noise = measure(workload, num_batches=num, num_repeats=repeats)
    grads = np.empty((repeats, num, 3))
    for r in range(repeats):
        key = keys.batch_key(pbx.trial_key(KEY, r))
        for t in range(num):
            batch = workload.batch(workload.data, key, t)
            x, y = (np.asarray(batch[name], np.float64) for name in "xy")
            grads[r, t] = (2 * (x @ W - y)[:, None] * x).mean(axis=0)
    small = (grads**2).sum(-1).mean(axis=1)
    big = (grads.mean(axis=1) ** 2).sum(-1)
    trace = (small - big) / (1 / size - 1 / (num * size))
    norm = (num * size * big - size * small) / (num * size - size)
    np.testing.assert_allclose(noise.trace, trace.mean(), rtol=1e-5)
    np.testing.assert_allclose(noise.squared_norm, norm.mean(), rtol=1e-5)
    np.testing.assert_allclose(noise.noise_scale, trace.mean() / norm.mean(), rtol=1e-5)
    pairs = grads.reshape(repeats, num // 2, 2, 3).mean(axis=2)
    np.testing.assert_allclose(
        noise.rows[1].variance, pairs.var(axis=1, ddof=1).sum(-1).mean(), rtol=1e-5
    )


def noisy(deviation, mean=100.0, name="noisy"):
    """Gradient mean + deviation * n per batch, n standard normal from the loss's key."""

    def loss(params, state, batch, key):
        slope = mean + deviation * jax.random.normal(key, (50,))
        return jnp.sum(slope * params["w"]), (state, {})

    return pbx.Workload(
        name=name,
        init=lambda key: ({"w": jnp.zeros(50)}, {}),
        loss=loss,
        batch=lambda data, key, step: data,
        evaluate=lambda params, state, data: {"train/loss": jnp.sum(params["w"])},
        objective="train/loss",
        data=jnp.zeros((2, 1)),
    )


def test_small_noise_on_a_large_gradient_loses_no_digits():
    # Squares of the gradients, 5e5, are known to 0.03 in float32, the variance is 0.005.
    _, noise = measure(noisy(0.01), num_repeats=200)
    assert noise.rows[0].variance == pytest.approx(50 * 1e-4, rel=0.02)
    assert noise.squared_norm == pytest.approx(50 * 1e4, rel=1e-5)


def test_variants_are_compared_at_the_same_weights():
    verdict, base = measure(
        noisy(1.0, name="plain"),
        variants={"louder": noisy(2.0), "same": noisy(1.0, mean=50.0), "silent": noisy(0.0)},
        num_repeats=100,
    )
    assert base.name == "plain"
    assert (base.variance_ratio, base.variance_ratio_error) == (1.0, 0.0)
    _, louder, same, silent = verdict.answer.variants
    assert louder.variance_ratio == pytest.approx(4.0, rel=1e-3)  # The keys are shared.
    assert same.variance_ratio == pytest.approx(1.0, rel=1e-3)
    assert (silent.trace, silent.noise_scale, silent.variance_ratio) == (0.0, 0.0, 0.0)
    assert verdict.findings[0].code == "gradient_variance_raised"
    assert {"gradient_variance_lowered", "gradient_variance_unchanged"} <= set(codes(verdict))
    assert verdict.cost == 4 * 100 * 33
    back, _ = measure(noisy(0.0), variants={"louder": noisy(1.0)}, num_repeats=4)
    assert back.answer.variants[1].variance_ratio == np.inf
    assert codes(back)[0] == "gradient_variance_raised"


def test_another_batch_size_is_a_variant():
    verdict, _ = measure(
        regression(batch_size=2, replace=False),
        variants={"batch 6": regression(batch_size=6, replace=False)},
        num_repeats=1000,
    )
    other = verdict.answer.variants[1]
    assert (other.batch_size, other.num_batches) == (6, 4)
    near(other.variance_ratio, other.variance_ratio_error, 1 / 3)
    assert "in batches of 6 against 2" in [f.message for f in verdict.findings][-1]


def test_a_gradient_that_is_lost_in_noise_has_no_noise_scale():
    verdict, noise = measure(noisy(1.0, mean=0.0), num_repeats=40)
    assert np.isnan(noise.noise_scale)
    (finding,) = (f for f in verdict.findings if f.code == "gradient_lost_in_noise")
    assert finding.evidence["least_noise_scale"] > 100


def test_a_gradient_that_is_not_finite_is_a_refusal():
    verdict = gradient_noise(noisy(1.0), key=KEY, variants={"bad": noisy(np.inf)}, num_repeats=2)
    assert verdict.answer is None
    assert codes(verdict) == ["gradient_not_finite"]
    assert verdict.findings[0].evidence["variants"] == ["bad"]


def test_a_batch_of_more_than_half_an_epoch_is_compared_across_epochs():
    verdict, noise = measure(
        regression(batch_size=16, replace=False), num_batches=4, num_repeats=1000
    )
    assert "batches_across_epochs" in codes(verdict)
    # Around the gradient of these 24 examples: the finite population correction.
    near(noise.rows[0].variance, noise.rows[0].variance_error, SAMPLE_SPREAD / 16 * (1 - 16 / 24))


def test_where_it_is_measured():
    workload = regression(replace=False)
    arguments = {"num_batches": 4, "num_repeats": 3}
    _, initial = measure(workload, **arguments)
    _, same = measure(workload, params={"w": jnp.asarray(W, jnp.float32)}, **arguments)
    assert same == initial
    point = {"learning_rate": np.float32(0.05)}
    trained, after = measure(
        workload, make_optimizer=tiny.sgd, study_or_point=point, num_steps=40, **arguments
    )
    assert after.squared_norm < 0.1 * initial.squared_norm
    assert trained.cost == 40 + 3 * 5
    study = pbx.run_study(
        workload,
        tiny.sgd,
        {"learning_rate": np.array([0.05], np.float32)},
        num_steps=40,
        eval_every=40,
        key=KEY,
        keep="final",
        progress=False,
    )
    given, kept = measure(workload, study_or_point=study, **arguments)
    assert kept.squared_norm == pytest.approx(after.squared_norm, rel=1e-3)
    assert given.studies["given"] is study


def test_a_workload_that_is_a_function_of_the_point():
    made, noise = measure(
        lambda point: noisy(point["deviation"]), study_or_point={"deviation": 2.0}, num_repeats=50
    )
    assert noise.trace == pytest.approx(2 * 50 * 4, rel=0.05)  # Two examples in a batch.
    assert made.findings[0].evidence["batch_size"] == 2


def test_model_state_and_dropout():
    class Net(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(2)(nn.Dropout(self.rate, deterministic=not train)(x))

    train_set, valid = tiny.blobs()
    plain, dropped = (
        pbx.Workload.from_flax(Net(rate), train=train_set, valid=valid, batch_size=16)
        for rate in (0.0, 0.5)
    )
    verdict, _ = measure(plain, variants={"dropout": dropped}, num_repeats=8)
    dropout = verdict.answer.variants[1]
    assert dropout.variance_ratio > 1 + 2 * dropout.variance_ratio_error
    assert "gradient_variance_raised" in codes(verdict)


def test_it_repeats_exactly():
    one, two = (gradient_noise(noisy(1.0), key=KEY, num_repeats=3) for _ in range(2))
    assert one.answer == two.answer
    assert one.answer != gradient_noise(noisy(1.0), key=jax.random.key(1), num_repeats=3).answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batches": 1}, "num_batches must be >= 2"),
        ({"num_repeats": 1}, "num_repeats must be >= 2"),
        ({"batch_sizes": [6]}, "must be a multiple of 4"),
        ({"batch_sizes": [16]}, "at most 12, half of its 6"),
        ({"num_steps": 3}, "make_optimizer must be given"),
        ({"variants": {"workload": None}}, "may not be called 'workload'"),
        ({"variants": [1]}, "variants must map a name"),
        ({"variants": {"other": tiny.mlp()}}, "'other' has other parameters"),
        ({"variants": {"host": tiny.host_fed()}}, "other parameters"),
        ({"workload": tiny.host_fed()}, "fed from the host"),
        ({"num_batch": 3}, "did you mean 'num_batches'"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"workload": regression(replace=False), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        gradient_noise(key=KEY, **arguments)


def test_a_study_without_weights_and_a_batch_without_a_size():
    study = pbx.Study.from_arrays({"a": [1]}, {"loss": np.ones((1, 2))}, [0, 1], objective="loss")
    with pytest.raises(ValueError, match="kept no weights"):
        gradient_noise(regression(), None, study, key=KEY)
    odd = pbx.Workload(**{**vars(noisy(1.0)), "batch": lambda d, k, i: (jnp.ones(2), jnp.ones(3))})
    with pytest.raises(ValueError, match=r"first axes \[2, 3\]; give batch_size"):
        gradient_noise(odd, key=KEY)
    assert measure(odd, batch_size=5, num_repeats=2)[1].rows[1].batch_size == 10
