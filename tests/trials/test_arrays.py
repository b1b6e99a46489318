"""Batches without replacement, streamed evaluation, and the data rows of the fault catalogue."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import plan
from playbook_optax.trials import arrays


@pytest.mark.slow
@hypothesis.given(
    num_examples=st.integers(1, 300), batch=st.integers(1, 64), seed=st.integers(0, 99)
)
@hypothesis.settings(max_examples=12)
def test_an_epoch_visits_each_row_once(num_examples, batch, seed):
    batch = min(batch, num_examples)
    batches = num_examples // batch
    key = jax.random.key(seed)
    rows = jax.jit(jax.vmap(lambda step: arrays.shuffled_rows(key, step, num_examples, batch)))(
        jnp.arange(2 * batches)
    )
    for epoch in (rows[:batches], rows[batches:]):
        flat = np.asarray(epoch).ravel()
        assert len(set(flat.tolist())) == len(flat) == batches * batch
        assert flat.min() >= 0
        assert flat.max() < num_examples


def test_epochs_and_keys_differ_and_rows_are_uniform():
    def first(seed, step):
        return arrays.shuffled_rows(jax.random.key(seed), step, 60, 10)

    rows = np.asarray(jax.vmap(lambda s: first(s, 0))(jnp.arange(3000)))
    assert not np.array_equal(first(0, 0), first(0, 6))
    assert not np.array_equal(first(0, 0), first(1, 0))
    # Each row stands in each place equally often: chi-square of 59 degrees of freedom.
    for place in (0, 5, 9):
        counts = np.bincount(rows[:, place], minlength=60)
        assert ((counts - 50) ** 2 / 50).sum() < 110  # p < 1e-4
    # Neighbours in the data do not stay neighbours.
    steps = np.diff(rows.astype(int), axis=1)
    assert (np.abs(steps) == 1).mean() < 3 * 2 / 60


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_evaluate_in_batches_is_the_mean(batch_size):
    data = {"x": np.arange(10.0, dtype=np.float32), "y": np.ones(10, np.float32)}
    got = pbx.evaluate_in_batches(lambda b: {"square": b["x"] ** 2, "y": b["y"]}, data, batch_size)
    np.testing.assert_allclose(got["square"], np.mean(np.arange(10.0) ** 2), rtol=1e-6)
    assert float(got["y"]) == 1.0


def test_padding_does_not_leak_nan():
    # The padded copies of the last example are infinite here, and must not count twice.
    data = np.array([1.0, 2.0, 3.0, 4.0, 0.0], np.float32)
    got = pbx.evaluate_in_batches(lambda b: jnp.where(b == 0, 5.0, 1.0), data, 4)
    assert float(got) == pytest.approx(9 / 5)


def test_evaluate_in_batches_errors():
    with pytest.raises(ValueError, match="one value per example"):
        pbx.evaluate_in_batches(lambda b: jnp.mean(b), np.ones(4, np.float32), 2)
    with pytest.raises(ValueError, match="first axis"):
        pbx.evaluate_in_batches(lambda b: b["x"], {"x": np.ones(4), "y": np.ones(3)}, 2)
    with pytest.raises(ValueError, match="batch_size"):
        pbx.evaluate_in_batches(lambda b: b, np.ones(4), 0)


(X, Y), VALID = tiny.blobs()


def build(train=(X, Y), valid=VALID, **arguments):
    return pbx.Workload.from_arrays(
        tiny.mlp_init, tiny.mlp_apply, train, valid, **{"batch_size": 16, **arguments}
    )


def put(array, row, value, dtype=None):
    changed = array.astype(dtype or array.dtype).copy()
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": (X, put(Y, 7, 2))}, r"label 2 \(first bad row 7\).*2 logits"),  # 31
        ({"valid": (VALID[0], put(VALID[1], 3, -1))}, r"label -1 \(first in row 3\)"),  # 32
        ({"train": (X, put(Y, 0, 2**40, np.int64))}, "outside int32"),  # 33
        ({"train": (put(X, 5, 1e300, np.float64), Y)}, r"train x\[5, .*1e\+300 does not"),  # 34
        ({"train": (put(X, 5, 1e-60, np.float64), Y)}, r"train x\[5, .*1e-60 does not fit float32"),
        ({"train": (put(X, 4, np.nan, ml_dtypes.bfloat16), Y)}, "1 of 96 rows.*row 4"),
        ({"train": (np.ma.masked_equal(X, X[3, 0]), Y)}, "train x is masked"),
        ({"train": (put(put(X, 4, np.nan), 9, np.inf), Y)}, "2 of 96 rows.*row 4"),  # 35
        ({"train": (X, Y[:-1])}, "96 examples but y has 95"),  # 37
        ({"batch_size": 97}, "batch_size = 97 exceeds the 96"),  # 38
        ({"valid": (VALID[0][:0], VALID[1][:0])}, "valid holds no example"),  # 40
        ({"train": X}, "pair"),
        ({"train": (X, Y.astype(np.float32))}, "integer class labels"),
        ({"batch_size": 0}, "batch_size"),
        ({"loss": "sofmax"}, "did you mean 'softmax'"),
        ({"test": (X[:2], put(Y[:2], 0, 5))}, "test y holds the label 5"),
        ({"loss": lambda outputs, y: jnp.mean(outputs)}, "one loss per example"),
        ({"loss": "mse"}, "broadcast"),  # (16, 2) against (16,)
    ],
)
def test_bad_data_raise_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_unknown_argument_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'batch_size'"):
        build(batchsize=3)


def test_shared_rows_warn():  # 41
    with pytest.warns(UserWarning, match="3 of 32 validation examples"):
        build(valid=(np.concatenate([X[:3], VALID[0][3:]]), VALID[1]))


def test_index_out_of_range_raises():  # 36
    tokens = np.arange(24, dtype=np.int32).reshape(12, 2) % 5
    labels = np.zeros(12, np.int32)

    def make(x):
        return pbx.Workload.from_arrays(
            lambda key: jax.random.normal(key, (5, 3)),
            lambda params, x: jnp.mean(params[x], axis=1),
            (x[:8], labels[:8]),
            (x[8:] + 0, labels[8:]),
            batch_size=4,
            eval_batch_size=4,
        )

    with pytest.warns(UserWarning, match="training set"):
        make(tokens)
    with (
        pytest.warns(UserWarning, match="training set"),
        pytest.raises(ValueError, match=r"rows 4 to 7.*index 5"),
    ):
        make(put(tokens, 6, 5))


def test_partial_batches_are_dropped():  # 39
    workload = build(train=(X[:50], Y[:50]))
    rows = [workload.batch({"train": {"x": np.arange(50)}}, jax.random.key(0), i) for i in range(3)]
    seen = np.concatenate([np.asarray(r["x"]) for r in rows])
    assert len(set(seen.tolist())) == 48


def test_int64_and_float64_become_the_device_dtypes():
    workload = build(train=(X.astype(np.float64), Y.astype(np.int64)))
    assert workload.data["train"]["x"].dtype == np.float32
    assert workload.data["train"]["y"].dtype == np.int32


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (2**31, np.int64, "2147483648 does not fit int32"),
        (2**32, np.uint64, "4294967296 does not fit uint32"),
        (1e300, np.float64, r"1e\+300 does not fit float32"),
        (1e-60, np.float64, "1e-60 does not fit float32"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(value, dtype, message):
    table = np.array([1, value, 2], dtype)
    with pytest.raises(ValueError, match=rf"points\['lr'\]\[1\] = {message}"):
        plan.make_points({"lr": table}, None, jax.random.key(0))
    with pytest.raises(ValueError, match=rf"data\['x'\]\[1\] = {message}"):
        dataclasses.replace(tiny.quadratic(), data={"x": table})
    with pytest.raises(ValueError, match=rf"fixed\['lr'\] = {message}"):
        plan.Columns({}, {}, {"lr": table[1]})
    with jax.enable_x64(True):
        assert plan.make_points({"lr": table}, None, jax.random.key(0))[1] == 3


def test_masked_points_are_refused():
    table = np.ma.masked_equal(np.array([1.0, 2.0]), 2.0)
    with pytest.raises(ValueError, match=r"points\['lr'\] is masked"):
        plan.make_points({"lr": table}, None, jax.random.key(0))
    with pytest.raises(ValueError, match="masked"):
        pbx.Study.from_arrays({"lr": table}, {"loss": [[1.0], [2.0]]}, [1], objective="loss")


def cross_entropy(outputs, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1)[:, 0]


def evaluated(workload):
    params, state = workload.init(jax.random.key(0))
    return workload.evaluate(params, state, workload.data)


def test_a_loss_of_ones_own_keeps_the_error_rate():
    own, ours = build(loss=cross_entropy), build()
    assert own.objective == ours.objective == "valid/error_rate"
    for name, value in evaluated(ours).items():
        np.testing.assert_allclose(evaluated(own)[name], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("train", "apply"),
    [
        # A label beyond the outputs, such as one that the loss leaves out or a count.
        ((X, put(Y, 3, 2)), tiny.mlp_apply),
        ((X, put(Y, 3, -1)), tiny.mlp_apply),
        ((X, Y.astype(np.float32)), tiny.mlp_apply),
        # One output, which is no choice.
        ((X, np.zeros_like(Y)), lambda params, x: tiny.mlp_apply(params, x)[:, :1]),
        ((X, Y), lambda params, x: tiny.mlp_apply(params, x)[:, 0]),
    ],
)
def test_what_is_no_classification_has_no_error_rate(train, apply):
    workload = pbx.Workload.from_arrays(
        tiny.mlp_init,
        apply,
        train,
        (VALID[0], np.minimum(VALID[1], train[1].max()).astype(train[1].dtype)),
        batch_size=16,
        loss=lambda outputs, y: jnp.square(outputs.reshape(len(y), -1)[:, 0] - y),
    )
    assert workload.objective == "valid/loss"
    assert set(evaluated(workload)) == {"train/loss", "valid/loss"}


def test_metrics_of_ones_own_are_means_over_examples():
    def is_right(outputs, y):
        return jnp.argmax(outputs, axis=-1) == y

    def twice_wrong(outputs, y):
        return 2.0 * (1 - is_right(outputs, y))

    workload = build(
        test=VALID,
        metrics={"accuracy": is_right, "error_rate": twice_wrong},
        objective="valid/accuracy",
        maximize=True,
        eval_batch_size=10,
    )
    got, plain = evaluated(workload), evaluated(build())
    for split in ("train", "valid"):
        wrong = float(plain[f"{split}/error_rate"])
        assert float(got[f"{split}/accuracy"]) == pytest.approx(1 - wrong)
        assert float(got[f"{split}/error_rate"]) == pytest.approx(2 * wrong)
    params, state = workload.init(jax.random.key(0))
    tested = workload.final_evaluate(params, state)
    assert tested["test/accuracy"] == pytest.approx(float(got["valid/accuracy"]))


def test_an_augmentation_is_done_to_training_batches_only():
    def shifted(batch, key):
        assert set(batch) == {"x", "y"}
        return {"x": batch["x"] + jax.random.normal(key, (1, 4)), "y": 1 - batch["y"]}

    workload, plain = build(augment=shifted), build()
    key = jax.random.key(3)
    shifts = []
    for step in (0, 1, 6):
        augmented = workload.batch(workload.data, key, step)
        batch = plain.batch(plain.data, key, step)
        np.testing.assert_array_equal(augmented["y"], 1 - batch["y"])
        shift = np.asarray(augmented["x"] - batch["x"])
        assert shift.std(axis=0).max() < 1e-6
        shifts.append(shift[0])
        again = workload.batch(workload.data, key, step)
        np.testing.assert_array_equal(augmented["x"], again["x"])
    assert np.ptp(shifts, axis=0).min() > 1e-3
    for name, value in evaluated(plain).items():
        assert float(evaluated(workload)[name]) == float(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": [1]}, "metrics must be a dict of functions"),
        ({"metrics": {"loss": cross_entropy}}, "which is the loss itself"),
        ({"metrics": {"valid/a": cross_entropy}}, "the part after the '/' alone"),
        ({"metrics": {"a": 1}}, r"metrics\['a'\] must be a function"),
        ({"metrics": {"a": lambda o, y: jnp.mean(o)}}, r"metrics\['a'\] must return one value per"),
        ({"augment": 1}, "augment must be a function"),
        ({"augment": lambda batch, key: batch["x"]}, "augment must return a batch"),
        ({"augment": lambda b, k: {**b, "x": b["x"][:3]}}, r"16 examples.*x has shape \(3, 4\)"),
    ],
)
def test_bad_metrics_and_augmentations_raise_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
