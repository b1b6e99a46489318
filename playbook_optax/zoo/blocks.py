"""Model parts of the zoo, in Flax linen."""

import chex
from flax import linen as nn

NORMS = ("pre", "post", "none")
"""Where a residual block normalizes; see `ResidualBlock`."""


class ResidualBlock(nn.Module):
    """A residual MLP block: x plus a branch f, two dense layers with a ReLU in between.

    Placements of the layer normalization: ``"pre"`` is x + f(Norm(x)), inside the branch, which
    leaves a clean path from the loss to every block; ``"post"`` is Norm(x + f(x)), which is known
    to cause trouble in deep networks; ``"none"`` is x + f(x).

    Attributes:
      norm: ``"pre"``, ``"post"`` or ``"none"``.
      rezero: scale the branch by one parameter that starts at 0, so that the block starts as the
        identity (ReZero).
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
        branch = nn.LayerNorm(name="norm")(x) if self.norm == "pre" else x
        branch = nn.relu(nn.Dense(self.hidden or width, name="expand")(branch))
        branch = nn.Dense(width, name="project")(branch)
        if self.rezero:
            branch = self.param("branch_scale", nn.initializers.zeros, ()) * branch
        x = x + branch
        return nn.LayerNorm(name="norm")(x) if self.norm == "post" else x


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
