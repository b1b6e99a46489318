"""Model parts in Flax linen: residual connections for any branch, and the zoo's own models.

Where a residual connection normalizes decides how large a learning rate a deep model bears.
`Residual` puts any branch of your own model (attention, an MLP, a convolution) into a connection
of a chosen placement, so that the remedies of the playbook's last resort can be tried one by one:

    class Block(nn.Module):
        norm: str = "pre"
        rezero: bool = False

        @nn.compact
        def __call__(self, x, mask):
            attention = nn.MultiHeadDotProductAttention(num_heads=2)
            x = Residual(attention, self.norm, self.rezero)(x, mask=mask)
            return Residual(Feedforward(128), self.norm, self.rezero)(x)

The default is x + f(Norm(x)). The playbook first printed x + Norm(f(x)) and was corrected to it:
normalization belongs inside the residual, on the branch's input, because then every block reaches
the loss by a sum that nothing rescales. Norm(x + f(x)) puts a normalization on that path at every
block and is known to cause trouble in deep models; it is offered because a patient is needed to
test a cure on. With ``"pre"``, normalize once more after the last block: the stream itself is
never normalized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from playbook_optax import _checks

NORMS = ("pre", "post", "none")
"""Where a residual connection normalizes; see `Residual`."""


def _connect(
    module: Any, branch: Callable[[chex.Array], chex.Array], x: chex.Array, norm: Any
) -> chex.Array:
    """The residual connection of `module`, which has ``norm`` and ``rezero``, around `branch`."""
    _checks.check_choice("norm", module.norm, NORMS)
    _checks.check_flag("rezero", module.rezero)
    y = branch(norm(name="norm")(x) if module.norm == "pre" else x)
    if y.shape != x.shape:
        raise ValueError(
            f"the branch turned shape {x.shape} into {y.shape}, and a sum of the two is no "
            "residual connection; project x or the branch to one shape."
        )
    if module.rezero:
        y = module.param("branch_scale", nn.initializers.zeros, ()).astype(y.dtype) * y
    x = x + y
    result: chex.Array = norm(name="norm")(x) if module.norm == "post" else x
    return result


class Residual(nn.Module):
    """A residual connection around any branch f of your own, with the normalization placed.

    Placements: ``"pre"`` is x + f(Norm(x)), which leaves a clean path from the loss to every block;
    ``"post"`` is Norm(x + f(x)), which is known to cause trouble in deep networks; ``"none"`` is
    x + f(x). The module's docstring says why ``"pre"`` is the default.

    Attributes:
      branch: f, a linen module (attention, MLP, convolution) whose output has the shape of its
        input. Made inside a compact method, its parameters belong to the model that makes it;
        otherwise they are named ``branch``.
      norm: ``"pre"``, ``"post"`` or ``"none"``.
      rezero: multiply the branch by one parameter that starts at 0 (ReZero), so that x + s f(...)
        starts as the identity, whatever f is.
      make_norm: ``make_norm(name=...)`` gives the normalization: a class, such as the default
        `flax.linen.LayerNorm` or ``nn.RMSNorm``, or ``functools.partial(nn.GroupNorm, 4)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from playbook_optax.zoo.blocks import Residual
      >>> class Model(nn.Module):
      ...     norm: str = "pre"
      ...     rezero: bool = False
      ...
      ...     @nn.compact
      ...     def __call__(self, image):
      ...         x = nn.Conv(8, (3, 3))(image)
      ...         for _ in range(3):
      ...             x = Residual(nn.Conv(8, (3, 3)), self.norm, self.rezero)(x)
      ...         return nn.Dense(10)(x.mean((1, 2)))
      >>> model = Model(rezero=True)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))["params"]
      >>> float(params["Residual_0"]["branch_scale"])
      0.0

    Source: playbook, "How can optimization failures be debugged and mitigated?" (normalization
    inside the residual, residual branches initialized to 0).
    """

    branch: nn.Module
    norm: str = "pre"
    rezero: bool = False
    make_norm: Callable[..., nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, x: chex.Array, *args: Any, **kwargs: Any) -> chex.Array:
        """Applies the connection.

        Args:
          x: the residual stream, of any shape that the branch keeps.
          *args: handed to the branch after x.
          **kwargs: handed to the branch, such as ``mask=``.

        Returns:
          The new stream, of the shape of x.

        Raises:
          ValueError: an unknown placement, `rezero` that is no bool, or a branch that changes the
            shape.
        """
        branch: Any = self.branch
        return _connect(self, lambda v: branch(v, *args, **kwargs), x, self.make_norm)


class ResidualBlock(nn.Module):
    """A residual MLP block: `Residual` around two dense layers with a ReLU in between.

    Its parameters lie side by side: ``expand``, ``project``, ``norm`` and ``branch_scale``.

    Attributes:
      norm: as in `Residual`.
      rezero: as in `Residual`.
      hidden: units between the two layers; the width of the input if None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> block = ResidualBlock(norm="pre", rezero=True)
      >>> x = jnp.ones((2, 8))
      >>> params = block.init(jax.random.key(0), x)
      >>> bool((block.apply(params, x) == x).all())
      True

    Source: playbook, "How can optimization failures be debugged and mitigated?" (normalization
    inside the residual, residual branches initialized to 0).
    """

    norm: str = "pre"
    rezero: bool = False
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Applies the block to x, shape (..., width); same shape and dtype."""
        width = x.shape[-1]

        def branch(v: chex.Array) -> chex.Array:
            v = nn.relu(nn.Dense(self.hidden or width, name="expand")(v))
            return nn.Dense(width, name="project")(v)

        return _connect(self, branch, x, nn.LayerNorm)


class MLP(nn.Module):
    """Dense layers with ReLU in between.

    Attributes:
      hidden: units of the hidden layers.
      num_outputs: units of the last layer.
    """

    hidden: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps x, shape (batch, feature), to outputs, shape (batch, num_outputs)."""
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_outputs)(x)


class CNN(nn.Module):
    """Convolutions with ReLU after each, an average over 2 x 2 pixels, and a dense layer.

    Attributes:
      channels: channels of the convolutions, each 3 x 3, with zeros around the image.
      num_outputs: units of the last layer.
    """

    channels: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps images x, shape (batch, height, width, channel), to (batch, num_outputs)."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_outputs)(x.reshape(len(x), -1))


class ResidualMLP(nn.Module):
    """A dense layer, residual blocks, and a dense layer.

    Attributes:
      num_blocks: residual blocks.
      width: units of the residual stream.
      num_outputs: units of the last layer.
      norm: as in `ResidualBlock`.
      rezero: as in `ResidualBlock`.
    """

    num_blocks: int
    width: int
    num_outputs: int
    norm: str = "pre"
    rezero: bool = False

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps x, shape (batch, feature), to outputs, shape (batch, num_outputs)."""
        x = nn.Dense(self.width, name="embed")(x)
        for i in range(self.num_blocks):
            x = ResidualBlock(norm=self.norm, rezero=self.rezero, name=f"block_{i}")(x)
        return nn.Dense(self.num_outputs, name="head")(x)


class Feedforward(nn.Module):
    """Two dense layers with a GELU in between, on the last axis.

    Attributes:
      hidden: units between the two layers.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps x, shape (..., width), to the same shape."""
        # Two axes make the matrix products, and above all their gradients, faster on CPU.
        flat = x.reshape(-1, x.shape[-1])
        flat = nn.gelu(nn.Dense(self.hidden, name="expand")(flat))
        return nn.Dense(x.shape[-1], name="project")(flat).reshape(x.shape)


class CausalAttention(nn.Module):
    """Self-attention in which a position attends to itself and to what comes before it.

    Attributes:
      num_heads: heads; divides the width.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps x, shape (batch, time, width), to the same shape."""
        batch, time, width = x.shape
        size = width // self.num_heads
        qkv = nn.Dense(3 * width, name="qkv")(x.reshape(-1, width))
        qkv = qkv.reshape(batch, time, 3, self.num_heads, size).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = jnp.einsum("bhqd,bhkd->bhqk", q * size**-0.5, k)
        seen = jnp.tril(jnp.ones((time, time), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(-1, width)
        return nn.Dense(width, name="project")(mixed).reshape(x.shape)


class Transformer(nn.Module):
    """A causal transformer over tokens, with learned positions.

    Attributes:
      num_layers: layers, each an attention and a feedforward branch.
      width: units of the residual stream.
      num_heads: heads of each attention; divides the width.
      context: the longest sequence.
      num_tokens: size of the vocabulary.
      norm: as in `Residual`; ``"pre"`` normalizes once more before the head.
      rezero: as in `Residual`.
    """

    num_layers: int
    width: int
    num_heads: int
    context: int
    num_tokens: int
    norm: str = "pre"
    rezero: bool = False

    @nn.compact
    def __call__(self, tokens: chex.Array) -> chex.Array:
        """Maps tokens, integers of shape (batch, time), to logits, (batch, time, num_tokens)."""
        time = tokens.shape[1]
        x = nn.Embed(self.num_tokens, self.width, name="embed")(tokens.astype(jnp.int32))
        positions = self.param(
            "positions", nn.initializers.normal(self.width**-0.5), (self.context, self.width)
        )
        x = x + positions[None, :time]
        for i in range(self.num_layers):
            attention = CausalAttention(self.num_heads, name=f"attention_{i}")
            feedforward = Feedforward(4 * self.width, name=f"feedforward_{i}")
            x = Residual(attention, self.norm, self.rezero, name=f"residual_attention_{i}")(x)
            x = Residual(feedforward, self.norm, self.rezero, name=f"residual_feedforward_{i}")(x)
        if self.norm == "pre":
            x = nn.LayerNorm(name="norm")(x)
        logits = nn.Dense(self.num_tokens, name="head")(x.reshape(-1, self.width))
        return logits.reshape(*tokens.shape, self.num_tokens)


class RecurrentClassifier(nn.Module):
    """A plain recurrent net, h <- tanh(W x + U h + b), and a dense layer on its last state.

    Attributes:
      width: units of the state.
      num_outputs: units of the last layer.
      gain: U starts as this many times an orthogonal matrix.
    """

    width: int
    num_outputs: int
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps sequences x, shape (batch, time, feature), to outputs, (batch, num_outputs)."""
        batch, time, features = x.shape
        # The inputs' part of all times is one product; only the state's part is sequential.
        inputs = nn.Dense(self.width, name="inputs")(x.reshape(-1, features))
        inputs = inputs.reshape(batch, time, self.width).transpose(1, 0, 2)
        recurrent = self.param(
            "recurrent", nn.initializers.orthogonal(self.gain), (self.width, self.width)
        )

        def step(state: chex.Array, inputs: chex.Array) -> tuple[chex.Array, None]:
            return jnp.tanh(inputs + state @ recurrent), None

        state, _ = jax.lax.scan(step, jnp.zeros_like(inputs[0]), inputs)
        return nn.Dense(self.num_outputs, name="head")(state)
