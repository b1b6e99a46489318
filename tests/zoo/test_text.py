"""The byte-level workload: its split, its windows, its baselines and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax import zoo
from playbook_optax.zoo import text

SMALL = {"num_layers": 1, "width": 8, "context": 16, "batch_size": 4}


def parts():
    return text._text()[0]


def test_parts_are_cut_in_order_and_no_paragraph_is_in_two_of_them():
    train, valid, test = parts()
    whole = len(train) + len(valid) + len(test)
    assert abs(len(train) / whole - 0.8) < 1e-3
    assert abs(len(valid) / whole - 0.1) < 1e-3
    paragraphs = []
    for part in (train, valid, test):
        found = part.tobytes().decode("utf-8", "ignore").split("\n\n")
        # The cut goes through the first and the last one.
        paragraphs.append({" ".join(p.split()) for p in found[1:-1]})
        assert len(paragraphs[-1]) == len(found) - 2
    assert not paragraphs[0] & paragraphs[1]
    assert not (paragraphs[0] | paragraphs[1]) & paragraphs[2]
    assert min(map(len, paragraphs)) > 100


def test_parts_are_read_only():
    for part in parts():
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1


def test_windows_are_evenly_spaced_pieces_of_their_part():
    part = np.arange(250, dtype=np.uint8)
    windows = text._eval_windows(part, 24)
    assert windows.shape == (10, 25)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 249
    np.testing.assert_array_equal(np.diff(windows.astype(int), axis=1), 1)
    assert np.ptp(np.diff(windows[:, 0].astype(int))) <= 1
    assert text._eval_windows(parts()[1], 64).shape == (128, 65)


def test_baselines_are_what_they_say():
    found = zoo.bytes_baselines()
    train, valid, _ = parts()
    counts = np.array([(train == byte).sum() + 1 for byte in range(256)])
    unigram = np.mean([-np.log2(counts[byte] / counts.sum()) for byte in valid])
    np.testing.assert_allclose(found["unigram"], unigram, rtol=1e-12)
    # Each knows more than the one before it.
    order = ["lzma_after_train", "zlib_after_train", "zlib", "unigram", "uniform"]
    values = [found[name] for name in order]
    assert values == sorted(values)
    assert found["lzma_after_train"] < found["lzma"] < found["zlib"]
    assert set(found) == {*order, "lzma"}


def test_metrics_are_mean_cross_entropies_in_nats_and_bits():
    workload = zoo.bytes_transformer(**SMALL)
    params, state = workload.init(jax.random.key(0))
    # All logits alike: every byte costs 8 bits, whatever the text.
    params = jax.tree.map(jnp.zeros_like, params)
    metrics = workload.evaluate(params, state, workload.data)
    np.testing.assert_allclose(metrics["train/loss"], 8 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/bits_per_byte"], 8.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["valid/bits_per_byte"], 8.0, rtol=1e-5)
    test = workload.final_evaluate(params, state)
    assert set(test) == {"test/bits_per_byte"}
    np.testing.assert_allclose(test["test/bits_per_byte"], 8.0, rtol=1e-5)
    # A head that knows the frequencies of bytes and nothing else reaches what they tell.
    train = parts()[0]
    counts = np.bincount(train, minlength=256) + 1.0
    logs = np.log(counts / counts.sum())
    params["head"]["bias"] = jnp.asarray(logs, jnp.float32)
    metrics = workload.evaluate(params, state, workload.data)
    want = -logs[workload.data["valid_windows"][:, 1:]].mean() / np.log(2)
    np.testing.assert_allclose(metrics["valid/bits_per_byte"], want, rtol=1e-5)


def test_a_batch_is_windows_of_the_training_part_at_places_that_change():
    workload = zoo.bytes_transformer(**SMALL)
    train = parts()[0].tobytes()
    key = jax.random.key(0)
    batches = [np.asarray(workload.batch(workload.data, key, step)) for step in (0, 1, 1)]
    for batch in batches:
        assert batch.shape == (4, 17)
        assert batch.dtype == np.uint8
        assert all(window.tobytes() in train for window in batch)
    np.testing.assert_array_equal(batches[1], batches[2])
    assert (batches[0] != batches[1]).any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="norm = 'past' is unknown: did you mean 'post'"):
        zoo.bytes_transformer("past")
    with pytest.raises(ValueError, match="rezero must be True or False, got 'yes'"):
        zoo.bytes_transformer(rezero="yes")
    with pytest.raises(ValueError, match="width = 10 must be a multiple of num_heads = 4"):
        zoo.bytes_transformer(width=10, num_heads=4)
    with pytest.raises(ValueError, match="must be shorter than the validation part"):
        zoo.bytes_transformer(context=10**8)
    for name in ("num_layers", "width", "num_heads", "context", "batch_size"):
        with pytest.raises(ValueError, match=name):
            zoo.bytes_transformer(**{name: 0})


@pytest.mark.slow
def test_a_small_transformer_learns_more_than_single_bytes_tell():
    study = pbx.run_study(
        zoo.bytes_transformer("pre", **{**SMALL, "width": 16}),
        lambda point: pbx.adam(point["learning_rate"]),
        {"learning_rate": np.array([1e-2], np.float32)},
        num_steps=300,
        eval_every=100,
        key=jax.random.key(0),
    )
    assert study.best().value < zoo.bytes_baselines()["unigram"] - 0.3
