"""Floor 6: the playbook's procedures, each from a workload to a `Verdict`."""

from playbook_optax.procedures.adopt import adopt, retrain
from playbook_optax.procedures.batch_size import BatchSizePlan, change_batch_size
from playbook_optax.procedures.budget import best_of_budget
from playbook_optax.procedures.clipping import choose_clip_threshold
from playbook_optax.procedures.gradient_noise import GradientNoise, gradient_noise
from playbook_optax.procedures.instability import (
    find_unstable_learning_rate,
    probe_early_instability,
)
from playbook_optax.procedures.learning_rate import sweep_learning_rate
from playbook_optax.procedures.num_steps import pick_num_steps, refine_num_steps
from playbook_optax.procedures.plateau import PlateauAnswer, plateau_schedule
from playbook_optax.procedures.remedies import RemedyComparison, RemedyRow, compare_remedies
from playbook_optax.procedures.rounds import (
    NextRound,
    TransferRow,
    plan_next_round,
    round_lengths,
)
from playbook_optax.procedures.stability import Stabilization, stabilize
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.procedures.warmup import WarmupAnswer, tune_warmup

__all__ = [
    "BatchSizePlan",
    "GradientNoise",
    "NextRound",
    "PlateauAnswer",
    "RemedyComparison",
    "RemedyRow",
    "Stabilization",
    "TransferRow",
    "Verdict",
    "WarmupAnswer",
    "adopt",
    "best_of_budget",
    "change_batch_size",
    "choose_clip_threshold",
    "compare_remedies",
    "find_unstable_learning_rate",
    "gradient_noise",
    "pick_num_steps",
    "plan_next_round",
    "plateau_schedule",
    "probe_early_instability",
    "refine_num_steps",
    "retrain",
    "round_lengths",
    "stabilize",
    "sweep_learning_rate",
    "tune_warmup",
]


def __dir__() -> list[str]:
    return sorted(__all__)
