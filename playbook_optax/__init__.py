"""The Deep Learning Tuning Playbook as code for JAX and Optax.

``import playbook_optax as pbx`` gives every public name. Importing creates no array and starts no
backend.
"""

__version__ = "0.1.0"

import importlib
from typing import Any

from playbook_optax import procedures, reducers, samplers, schedules
from playbook_optax._feasibility import REASONS as INFEASIBLE_REASONS
from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.targets import steps_to_target
from playbook_optax.learning_rate import (
    PlateauInfo,
    plateau_info,
    reduce_on_plateau,
    scale_by_learning_rate,
    scale_by_warmup,
)
from playbook_optax.norms import (
    NormInfo,
    clip_by_global_norm,
    clip_by_percentile,
    clip_until,
    monitor_norms,
    norm_info,
)
from playbook_optax.optimizers import (
    adam,
    adamw,
    momentum,
    nadam,
    nadamw,
    nesterov,
    rmsprop,
    scale_by_adam,
    scale_by_momentum,
    scale_by_nadam,
    scale_by_nesterov,
    scale_by_rmsprop,
    sgd,
)
from playbook_optax.procedures.tune import Recipe
from playbook_optax.records.study import BestTrial, NoFeasibleTrial, Study, load_study
from playbook_optax.records.study_set import StudySet, load_study_set
from playbook_optax.runner.devices import use_compilation_cache, use_cpu_cores
from playbook_optax.runner.preflight import Preflight, preflight
from playbook_optax.runner.run import run_study
from playbook_optax.runner.studies import run_studies
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace
from playbook_optax.search_spaces import adam_search_space, optimizer_search_space
from playbook_optax.trials.arrays import evaluate_in_batches
from playbook_optax.trials.keys import trial_key
from playbook_optax.trials.train import Trial, TrialResult, make_train, make_trial
from playbook_optax.trials.workload import Workload
from playbook_optax.tuning import tune, write_recipe_report

__all__ = [
    "INFEASIBLE_REASONS",
    "BestTrial",
    "Categorical",
    "Finding",
    "Float",
    "Integer",
    "NoFeasibleTrial",
    "NormInfo",
    "PlateauInfo",
    "Preflight",
    "Recipe",
    "SearchSpace",
    "Study",
    "StudySet",
    "Trainer",
    "Trial",
    "TrialResult",
    "Workload",
    "adam",
    "adam_search_space",
    "adamw",
    "clip_by_global_norm",
    "clip_by_percentile",
    "clip_until",
    "diagnose",
    "evaluate_in_batches",
    "load_study",
    "load_study_set",
    "make_train",
    "make_trial",
    "momentum",
    "monitor_norms",
    "nadam",
    "nadamw",
    "nesterov",
    "norm_info",
    "optimizer_search_space",
    "plateau_info",
    "preflight",
    "procedures",
    "reduce_on_plateau",
    "reducers",
    "rmsprop",
    "run_studies",
    "run_study",
    "samplers",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_momentum",
    "scale_by_nadam",
    "scale_by_nesterov",
    "scale_by_rmsprop",
    "scale_by_warmup",
    "schedules",
    "sgd",
    "steps_to_target",
    "trial_key",
    "tune",
    "use_compilation_cache",
    "use_cpu_cores",
    "write_recipe_report",
]

# Imported when they are first asked for, and so by nobody who trains alone.
_LAZY = ("plots", "report", "zoo")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
