"""Workloads on real data that come with the package, in Flax linen; the extra ``data``."""

from playbook_optax.zoo.blocks import ResidualBlock
from playbook_optax.zoo.digits import digits_mlp, digits_resmlp
from playbook_optax.zoo.entry import Entry, load, names

__all__ = ["Entry", "ResidualBlock", "digits_mlp", "digits_resmlp", "load", "names"]
