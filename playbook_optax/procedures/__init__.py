"""Floor 6: the playbook's procedures, each from a workload to a `Verdict`."""

from playbook_optax.procedures.learning_rate import sweep_learning_rate
from playbook_optax.procedures.verdict import Verdict

__all__ = ["Verdict", "sweep_learning_rate"]
