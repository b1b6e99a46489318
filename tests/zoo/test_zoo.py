"""The zoo: its data, its models' arithmetic, and its register."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax import zoo
from playbook_optax.zoo import blocks


def test_importing_starts_no_backend():
    code = (
        "from playbook_optax import zoo; from jax._src import xla_bridge; zoo.load('digits_mlp');"
        "assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_are_split_once_and_standardized_by_the_training_part():
    from sklearn.datasets import load_digits

    workload = zoo.digits_mlp()
    parts = (workload.data["train"], workload.data["valid"], workload.test_data)
    assert [len(part["x"]) for part in parts] == [1197, 300, 300]
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(workload.data))
    train = parts[0]["x"].astype(np.float64)
    np.testing.assert_allclose([train.mean(), train.std()], [0, 1], atol=1e-6)
    # Every image is in exactly one part: undo the standardization and compare as multisets.
    x, y = load_digits(return_X_y=True)
    scale = 16 / (train.max() - train.min())
    pixels = np.rint((np.concatenate([p["x"] for p in parts]) - train.min()) * scale)
    labels = np.concatenate([p["y"] for p in parts])
    ours = np.column_stack([pixels, labels])
    theirs = np.column_stack([x, y])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_only_the_final_evaluation_sees_test_data():
    workload = zoo.digits_mlp(width=4)
    params, state = workload.init(jax.random.key(0))
    assert set(workload.evaluate(params, state, workload.data)) == {
        "train/loss",
        "train/error_rate",
        "valid/loss",
        "valid/error_rate",
    }
    assert set(workload.data) == {"train", "valid"}
    assert set(workload.final_evaluate(params, state)) == {"test/loss", "test/error_rate"}


@pytest.mark.parametrize(
    ("name", "num_columns"), [("breast_cancer", 30), ("wine", 13), ("diabetes", 10)]
)
def test_tables_are_split_once_and_standardized_by_the_training_part(name, num_columns):
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    workload = getattr(zoo, name)()
    parts = (workload.data["train"], workload.data["valid"], workload.test_data)
    sizes = [len(part["x"]) for part in parts]
    assert sizes == [3 * len(x) // 5, 4 * len(x) // 5 - 3 * len(x) // 5, len(x) - 4 * len(x) // 5]
    train = parts[0]["x"].astype(np.float64)
    assert train.shape[1] == num_columns
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-5)
    # Each row is in exactly one part: standardizing keeps the order of each column's values.
    ours = np.concatenate([part["x"] for part in parts])
    targets = np.concatenate([part["y"] for part in parts])
    column = int(np.argmax([len(np.unique(c)) for c in x.T]))
    order, theirs = np.lexsort((targets, ours[:, column])), np.lexsort((y, x[:, column]))
    np.testing.assert_array_equal(
        np.argsort(np.argsort(targets[order], kind="stable")),
        np.argsort(np.argsort(y[theirs], kind="stable")),
    )
    params, state = workload.init(jax.random.key(0))
    metrics = workload.evaluate(params, state, workload.data)
    assert ("valid/error_rate" in metrics) == (name != "diabetes")
    if name == "diabetes":
        np.testing.assert_allclose(parts[0]["y"].std(), 1, rtol=1e-5)
    assert all(np.isfinite(value) for value in workload.final_evaluate(params, state).values())


@pytest.mark.parametrize("name", ["wine", "digits_mlp"])
def test_another_split_deals_the_same_rows_otherwise(name):
    build = getattr(zoo, name)
    first, again, other = build(), build(split_seed=0), build(split_seed=1)
    ours, theirs = (
        np.concatenate([w.data["train"]["y"], w.data["valid"]["y"], w.test_data["y"]])
        for w in (first, other)
    )
    assert sorted(ours) == sorted(theirs)
    assert (ours != theirs).any()
    np.testing.assert_array_equal(first.data["train"]["x"], again.data["train"]["x"])
    mean, deviation = other.data["train"]["x"].mean(), other.data["train"]["x"].std()
    np.testing.assert_allclose([mean, deviation], [0, 1], atol=1e-5)
    with pytest.raises(ValueError, match="split_seed"):
        build(split_seed=-1)


@pytest.mark.parametrize("norm", blocks.NORMS)
@pytest.mark.parametrize("rezero", [False, True])
def test_residual_block_is_its_formula(norm, rezero):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6)).astype(np.float32)
    block = blocks.ResidualBlock(norm=norm, rezero=rezero)
    params = block.init(jax.random.key(1), jnp.asarray(x))["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)

    def normalized(v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * params["norm"]["scale"] + params["norm"]["bias"]

    def dense(v, name):
        return v @ params[name]["kernel"].astype(np.float64) + params[name]["bias"]

    inner = normalized(x.astype(np.float64)) if norm == "pre" else x.astype(np.float64)
    branch = dense(np.maximum(dense(inner, "expand"), 0), "project")
    branch = branch * (params["branch_scale"] if rezero else 1.0)
    want = normalized(x + branch) if norm == "post" else x + branch
    assert ("norm" in params) == (norm != "none")
    got = block.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_resmlp_has_twelve_blocks_of_the_placement_that_was_asked_for():
    def block_leaves(**arguments):
        params, _ = zoo.digits_resmlp(width=4, **arguments).init(jax.random.key(0))
        return [set(params[name]) for name in params if name.startswith("block_")]

    assert block_leaves() == [{"expand", "project", "norm"}] * 12
    assert block_leaves(norm="none", num_blocks=2) == [{"expand", "project"}] * 2
    assert block_leaves(norm="none", rezero=True, num_blocks=1) == [
        {"expand", "project", "branch_scale"}
    ]


def test_cnn_sees_the_same_pixels_as_images():
    workload = zoo.digits_cnn(channels=(2, 3))
    x = workload.data["train"]["x"]
    assert x.shape == (1197, 8, 8, 1)
    np.testing.assert_array_equal(x.reshape(-1, 64), zoo.digits_mlp().data["train"]["x"])
    params, state = workload.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "Conv_0": {"kernel": (3, 3, 1, 2), "bias": (2,)},
        "Conv_1": {"kernel": (3, 3, 2, 3), "bias": (3,)},
        "Dense_0": {"kernel": (48, 10), "bias": (10,)},
    }
    assert set(workload.final_evaluate(params, state)) == {"test/loss", "test/error_rate"}


@pytest.mark.parametrize("pixels", [1, 8, 64])
def test_recurrent_net_reads_the_same_pixels_in_order(pixels):
    sequences = zoo.digits_recurrent(pixels_per_step=pixels, width=4)
    images = zoo.digits_mlp().data["train"]["x"]
    x = sequences.data["train"]["x"]
    assert x.shape == (1197, 64 // pixels, pixels)
    np.testing.assert_array_equal(x.reshape(images.shape), images)
    assert set(sequences.final_evaluate(*sequences.init(jax.random.key(0)))) == {
        "test/loss",
        "test/error_rate",
    }


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"norm = 'past' is unknown: did you mean 'post'"):
        zoo.digits_resmlp("past")
    with pytest.raises(ValueError, match="rezero must be True or False"):
        zoo.digits_resmlp(rezero=1)
    with pytest.raises(ValueError, match="num_blocks"):
        zoo.digits_resmlp(num_blocks=0)
    with pytest.raises(ValueError, match="pixels_per_step = 5 must divide the 64 pixels"):
        zoo.digits_recurrent(pixels_per_step=5)
    for name in ("width", "pixels_per_step", "batch_size"):
        with pytest.raises(ValueError, match=name):
            zoo.digits_recurrent(**{name: 0})
    for channels in ((), 16, (16, 0), ("16",)):
        with pytest.raises(ValueError, match="channels"):
            zoo.digits_cnn(channels=channels)
    with pytest.raises(ValueError, match="gain"):
        zoo.digits_recurrent(gain=0.0)
    with pytest.raises(TypeError, match="did you mean 'width'"):
        zoo.digits_mlp(widht=3)
    with pytest.raises(ValueError, match="did you mean 'digits_mlp'"):
        zoo.load("digit_mlp")


@pytest.mark.parametrize("name", zoo.names())
def test_every_entry_builds_and_has_an_optimizer_for_its_space(name):
    entry = zoo.load(name)
    assert entry.workload.name == name
    assert entry.space["learning_rate"].scale == "log"
    assert entry.space["momentum"].scale == "reverse_log"
    point = {n: values[0] for n, values in entry.space.sample(jax.random.key(0), 1).items()}
    params = {"w": jnp.ones(2)}
    optimizer = entry.make_optimizer(point)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -point["learning_rate"] * np.ones(2), rtol=1e-6)


@pytest.mark.slow
def test_resmlp_is_unstable_at_large_rates_and_learns_at_small_ones():
    rates = np.geomspace(1e-3, 1.0, 7).astype(np.float32)
    study = pbx.run_study(
        zoo.digits_resmlp(),
        lambda point: pbx.momentum(point["learning_rate"], 0.9),
        {"learning_rate": rates},
        num_steps=400,
        eval_every=20,
        key=jax.random.key(0),
    )
    assert study.data["infeasible"].values[-1]
    assert not study.data["infeasible"].values[:3].any()
    assert study.best().value <= 0.03
    assert study.best().point["learning_rate"] < 0.1
