"""Residual connections, the transformer and the recurrent net, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from playbook_optax.zoo import blocks


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


class Scaled(nn.Module):
    """x times a constant and what the call hands on, so that a formula can be written down."""

    factor: float = 3.0

    @nn.compact
    def __call__(self, x, shift=0.0):
        return self.factor * x + self.param("bias", nn.initializers.ones, (1,) * x.ndim) + shift


@pytest.mark.parametrize("norm", blocks.NORMS)
@pytest.mark.parametrize("rezero", [False, True])
def test_residual_is_its_formula_around_any_branch(norm, rezero):
    x = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)
    module = blocks.Residual(Scaled(), norm, rezero)
    params = random_like(module.init(jax.random.key(0), jnp.asarray(x))["params"])
    want = x.astype(np.float64)

    def normalized(v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * params["norm"]["scale"] + params["norm"]["bias"]

    branch = 3.0 * (normalized(want) if norm == "pre" else want) + params["branch"]["bias"] + 0.5
    want = want + (params["branch_scale"] if rezero else 1.0) * branch
    want = normalized(want) if norm == "post" else want
    assert ("norm" in params, "branch_scale" in params) == (norm != "none", rezero)
    got = module.apply({"params": params}, jnp.asarray(x), shift=0.5)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "make_norm", [nn.RMSNorm, functools.partial(nn.GroupNorm, num_groups=2)], ids=["rms", "group"]
)
def test_residual_takes_the_normalization_that_it_is_given(make_norm):
    x = jax.random.normal(jax.random.key(1), (3, 4))
    module = blocks.Residual(Scaled(0.0), "post", make_norm=make_norm)
    params = module.init(jax.random.key(0), x)
    want = make_norm().apply({"params": params["params"]["norm"]}, x + 1.0)
    np.testing.assert_array_equal(module.apply(params, x), want)


def test_residual_starts_as_the_identity_with_rezero_and_keeps_the_dtype():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((2, 3), dtype)
        module = blocks.Residual(nn.Dense(3, dtype=dtype), "none", True)
        params = module.init(jax.random.key(0), x)
        y = module.apply(params, x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, x)


def test_residual_names_what_is_wrong():
    x = jnp.ones((2, 3))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"turned shape \(2, 3\) into \(2, 4\)"):
        blocks.Residual(nn.Dense(4)).init(key, x)
    with pytest.raises(ValueError, match="norm = 'prior' is unknown"):
        blocks.Residual(nn.Dense(3), "prior").init(key, x)
    with pytest.raises(ValueError, match="rezero must be True or False, got 1"):
        blocks.Residual(nn.Dense(3), "pre", 1).init(key, x)


def test_cnn_is_its_formula():
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 1)).astype(np.float32)
    module = blocks.CNN((3, 5), 7)
    params = random_like(module.init(jax.random.key(0), jnp.asarray(x))["params"])
    hidden = x.astype(np.float64)
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        padded = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
        output = np.zeros((*hidden.shape[:3], kernel.shape[-1])) + bias
        for row in range(4):
            for column in range(6):
                patch = padded[:, row : row + 3, column : column + 3]
                output[:, row, column] += np.tensordot(patch, kernel, 3)
        hidden = np.maximum(output, 0)
    pooled = hidden.reshape(2, 2, 2, 3, 2, 5).mean((2, 4))
    want = pooled.reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    got = module.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_attention_is_its_formula():
    batch, time, width, heads = 2, 4, 6, 2
    x = np.random.default_rng(1).normal(size=(batch, time, width)).astype(np.float32)
    module = blocks.CausalAttention(heads)
    params = random_like(module.init(jax.random.key(0), jnp.asarray(x))["params"])
    qkv = x.astype(np.float64) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    size = width // heads
    mixed = np.zeros((batch, time, width))
    for b in range(batch):
        for h in range(heads):
            q, k, v = (
                qkv[b, :, part * width + h * size : part * width + (h + 1) * size]
                for part in range(3)
            )
            for now in range(time):
                weights = np.exp(k[: now + 1] @ q[now] / np.sqrt(size))
                mixed[b, now, h * size : (h + 1) * size] = weights / weights.sum() @ v[: now + 1]
    want = mixed @ params["project"]["kernel"] + params["project"]["bias"]
    got = module.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", blocks.NORMS)
def test_transformer_sees_what_comes_before_and_nothing_after(norm):
    module = blocks.Transformer(2, 8, 2, context=6, num_tokens=11, norm=norm)
    tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, 11)
    params = module.init(jax.random.key(0), tokens)
    before = np.asarray(module.apply(params, tokens))
    for place in range(6):
        changed = tokens.at[0, place].add(1) % 11
        after = np.asarray(module.apply(params, changed))
        same = (after == before).all(axis=(0, 2))
        assert same[:place].all()
        # Itself, and everything that attends to it.
        assert not same[place:].any()
    # A shorter sequence is the beginning of a longer one.
    shorter = module.apply(params, tokens[:, :4])
    np.testing.assert_allclose(shorter, before[:, :4], rtol=1e-5, atol=1e-5)


def test_transformer_normalizes_the_stream_before_its_head_only_if_nothing_else_does():
    def names(norm):
        module = blocks.Transformer(1, 8, 2, context=4, num_tokens=5, norm=norm)
        return set(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])

    assert "norm" in names("pre")
    assert "norm" not in names("post") | names("none")


def test_recurrent_net_is_its_formula_and_starts_orthogonal():
    x = np.random.default_rng(1).normal(size=(3, 5, 2)).astype(np.float32)
    module = blocks.RecurrentClassifier(4, 3, gain=1.5)
    started = module.init(jax.random.key(0), jnp.asarray(x))["params"]
    u = np.asarray(started["recurrent"], np.float64)
    np.testing.assert_allclose(u.T @ u, 1.5**2 * np.eye(4), atol=1e-5)
    params = random_like(started)
    state = np.zeros((3, 4))
    for now in range(5):
        state = np.tanh(
            x[:, now].astype(np.float64) @ params["inputs"]["kernel"]
            + params["inputs"]["bias"]
            + state @ params["recurrent"]
        )
    want = state @ params["head"]["kernel"] + params["head"]["bias"]
    got = module.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
