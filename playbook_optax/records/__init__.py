"""Records: the Study that every analysis reads, and its files. Knows nothing of training."""

from playbook_optax.records.storage import (
    CorruptBlock,
    CorruptSpec,
    NewerFormat,
    NoStudy,
    NotReadable,
    NotWritable,
    StorageError,
)
from playbook_optax.records.study import (
    BestTrial,
    NoFeasibleTrial,
    Study,
    load_study,
    study_from_blocks,
)

__all__ = [
    "BestTrial",
    "CorruptBlock",
    "CorruptSpec",
    "NewerFormat",
    "NoFeasibleTrial",
    "NoStudy",
    "NotReadable",
    "NotWritable",
    "StorageError",
    "Study",
    "load_study",
    "study_from_blocks",
]
