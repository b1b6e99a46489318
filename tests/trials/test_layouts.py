"""Products and convolutions rewritten for the CPU: the same values, and none of the slow forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from playbook_optax.trials import layouts

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="rewritten on a CPU only")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def primitives(function, *args):
    """(name, params) of every operation, those of inner jaxprs included."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.append((equation.primitive.name, equation.params))
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
            ):
                if hasattr(value, "jaxpr"):
                    walk(value.jaxpr)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def contractions(function, *args):
    return [
        params["dimension_numbers"][0]
        for name, params in primitives(function, *args)
        if name == "dot_general"
    ]


def agree(function, *args):
    plain, fast = jax.jit(function)(*args), jax.jit(layouts.fast_layouts(function))(*args)
    assert jax.tree.structure(plain) == jax.tree.structure(fast)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("left", "right"), [(10, 96), (96, 10), (64, 96), (1, 3), (70, 64)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_products_over_the_first_axis_are_turned_round(left, right, batch):
    axes = tuple(range(len(batch)))
    numbers = (((len(batch),), (len(batch),)), (axes, axes))

    def product(a, b):
        return lax.dot_general(a, b, numbers)

    a, b = normal(*batch, 32, left), normal(*batch, 32, right, seed=1)
    agree(product, a, b)
    slow = bool(batch) or right > left or min(left, right) < layouts.NARROW
    expected = ((len(batch) + 1,), (len(batch),)) if slow else ((0,), (0,))
    assert contractions(layouts.fast_layouts(product), a, b) == [expected]


def test_other_products_are_left_alone():
    for numbers in ((((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (1,)), ((), ()))):
        function = functools.partial(lax.dot_general, dimension_numbers=numbers)
        a, b = normal(8, 8), normal(8, 8, seed=1)
        agree(function, a, b)
        assert contractions(layouts.fast_layouts(function), a, b) == [numbers[0]]


@pytest.mark.parametrize("spec", ["NHWC", "NCHW", "HWCN"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"window_strides": (2, 1), "padding": "VALID"},
        {"rhs_dilation": (1, 2), "lhs_dilation": (2, 1), "padding": ((1, 1), (2, 2))},
        {"rhs_dilation": (2, 1), "window_strides": (1, 2), "padding": ((2, 1), (-1, 2))},
        {"feature_group_count": 2},
    ],
)
def test_convolutions_and_their_gradients(spec, arguments):
    arguments = {"window_strides": (1, 1), "padding": "SAME", **arguments}
    kernel_spec = "HWIO" if spec == "NHWC" else "OIHW"
    groups = arguments.get("feature_group_count", 1)
    sizes = {"N": 3, "H": 6, "W": 5, "C": 4, "O": 6, "I": 4 // groups}
    x = normal(*(sizes[axis] for axis in spec))
    kernel = normal(*({**sizes, "H": 3, "W": 3}[axis] for axis in kernel_spec), seed=1)

    def loss(x, kernel):
        out = lax.conv_general_dilated(
            x, kernel, dimension_numbers=(spec, kernel_spec, spec), **arguments
        )
        return jnp.sum(jnp.sin(out))

    function = jax.value_and_grad(loss, (0, 1))
    agree(function, x, kernel)
    specs = {
        (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        for name, params in primitives(layouts.fast_layouts(function), x, kernel)
        if name == "conv_general_dilated"
        for numbers in (params["dimension_numbers"],)
    }
    assert specs == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


@pytest.mark.parametrize(
    ("shape", "kernel", "is_product"),
    [
        ((2, 6, 5, 1), (3, 3, 1, 7), True),
        ((2, 6, 5, 4), (3, 3, 4, 7), True),
        ((2, 6, 5, 5), (3, 3, 5, 7), False),
        ((1, 12, 12, 2), (9, 9, 2, 3), False),  # A large kernel.
        ((8, 256, 256, 3), (3, 3, 3, 2), False),  # Large patches.
    ],
)
def test_few_channels_make_a_product(shape, kernel, is_product):
    def function(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, weights = normal(*shape), normal(*kernel, seed=1)
    names = [name for name, _ in primitives(layouts.fast_layouts(function), x, weights)]
    assert ("dot_general" in names) == is_product
    assert ("conv_general_dilated" in names) != is_product
    if is_product:
        agree(function, x, weights)


def test_a_convolution_in_one_dimension():
    def loss(x, kernel):
        return jnp.sum(lax.conv(x, kernel, (1,), "SAME") ** 2)

    agree(jax.grad(loss, (0, 1)), normal(2, 3, 7), normal(4, 3, 3, seed=1))


def slow_product(a, b):
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


@jax.custom_jvp
def with_own_rule(a, b):
    return slow_product(a, b)


with_own_rule.defjvp(lambda primals, tangents: (with_own_rule(*primals), slow_product(*tangents)))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: lax.scan(
            lambda c, x: (c + slow_product(a, x), c.sum()), jnp.ones((9, 5)), b[None]
        ),
        lambda a, b: lax.fori_loop(0, 3, lambda i, c: c + slow_product(a, b), jnp.ones((9, 5))),
        lambda a, b: lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, slow_product(a, b)), (0, jnp.ones((9, 5)))
        ),
        lambda a, b: lax.cond(a[0, 0] > 0, slow_product, lambda a, b: -slow_product(a, b), a, b),
        jax.jit(slow_product),
        with_own_rule,
        jax.checkpoint(slow_product),
    ],
    ids=["scan", "fori", "while", "cond", "jit", "custom_jvp", "checkpoint"],
)
def test_what_is_inside_is_rewritten_too(function, request):
    a, b = normal(8, 9), normal(8, 5, seed=1)
    agree(function, a, b)
    if "checkpoint" in request.node.name:
        return
    found = contractions(layouts.fast_layouts(function), a, b)
    assert found
    assert set(found) == {((1,), (0,))}


@pytest.mark.slow
def test_models_under_vmap_keys_and_constants():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=False):
            x = nn.Conv(6, (3, 3))(x)
            x = nn.Dropout(0.5)(x, deterministic=deterministic)
            x = x.reshape(x.shape[0], -1, 6)
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            return nn.Dense(3)(x.mean(axis=1))

    model, x = Model(), normal(4, 4, 4, 1)
    rates = jnp.asarray([0.1, 0.2])
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def loss(params, rate, key):
        return jnp.sum(rate * model.apply(params, x, rngs={"dropout": key}) ** 2)

    function = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, None))
    agree(function, params, rates, jax.random.key(2))
    inner = jax.vmap(layouts.fast_layouts(jax.value_and_grad(loss)), in_axes=(None, 0, None))
    plain, fast = (jax.jit(one)(params, rates, jax.random.key(2)) for one in (function, inner))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_other_backends_are_left_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert layouts.fast_layouts(slow_product) is slow_product


def test_results_can_be_differentiated_again():
    def loss(w):
        inner = layouts.fast_layouts(jax.grad(lambda w: jnp.sum((normal(8, 3) @ w) ** 3)))
        return jnp.sum(inner(w) ** 2)

    w = normal(3, 2, seed=3)
    direction = normal(3, 2, seed=4)
    slope = jnp.vdot(jax.grad(loss)(w), direction)
    numeric = (loss(w + 1e-2 * direction) - loss(w - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(slope, numeric, rtol=2e-2)
