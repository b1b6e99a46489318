"""Workloads on real data that come with the package, in Flax; most need the extra ``data``."""

from playbook_optax.zoo.blocks import Residual, ResidualBlock
from playbook_optax.zoo.digits import digits_cnn, digits_mlp, digits_recurrent, digits_resmlp
from playbook_optax.zoo.entry import Entry, load, names
from playbook_optax.zoo.tabular import breast_cancer, diabetes, wine
from playbook_optax.zoo.text import bytes_baselines, bytes_transformer

__all__ = [
    "Entry",
    "Residual",
    "ResidualBlock",
    "breast_cancer",
    "bytes_baselines",
    "bytes_transformer",
    "diabetes",
    "digits_cnn",
    "digits_mlp",
    "digits_recurrent",
    "digits_resmlp",
    "load",
    "names",
    "wine",
]


def __dir__() -> list[str]:
    return sorted(__all__)
