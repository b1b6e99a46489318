"""What is trained: four workloads, the rates of their trials, and how long a trial is."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen as nn

import playbook_optax as pbx
from playbook_optax import zoo
from playbook_optax.zoo import blocks

MOMENTUM = 0.9
QUICK_TRIALS = (1, 8)
TRIALS = (1, 8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload of the suite.

    Attributes:
      title: what the table calls it.
      build: makes the workload.
      rates: the smallest and the largest learning rate; nothing diverges between them.
      cpu_steps: number of trials to steps of a trial, on a CPU, where large studies of large
        steps are cut short.
      steps: steps of a trial on an accelerator, whatever the number of trials.
      long_steps: steps of a trial where features are measured, each of them once in a tenth.
    """

    title: str
    build: Callable[[], pbx.Workload]
    rates: tuple[float, float]
    cpu_steps: dict[int, int]
    steps: int
    long_steps: int


def data_source() -> str:
    """Where the digits come from: scikit-learn, or random numbers of the same shapes."""
    return "digits" if importlib.util.find_spec("sklearn") else "synthetic"


def _digits(
    build: Callable[[], pbx.Workload], module: nn.Module, batch_size: int, shape: tuple[int, ...]
) -> pbx.Workload:
    """The zoo's workload, or one of the same shapes where scikit-learn is missing."""
    if data_source() == "digits":
        return build()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1497, *shape)).astype(np.float32)
    y = rng.integers(0, 10, 1497).astype(np.int32)
    return pbx.Workload.from_flax(
        module,
        train=(x[:1197], y[:1197]),
        valid=(x[1197:], y[1197:]),
        batch_size=batch_size,
        name="synthetic",
    )


def _bytes_transformer() -> pbx.Workload:
    """The zoo's, evaluated on 16 windows of each part instead of 128.

    A trial of it is so short here that evaluations as large as the zoo's would be most of it.
    """
    work = zoo.bytes_transformer()
    windows = {name: work.data[name][::8] for name in ("train_windows", "valid_windows")}
    return dataclasses.replace(work, data={**work.data, **windows})


CASES = {
    "mlp": Case(
        "MLP 64-128-10, batch 128",
        lambda: _digits(zoo.digits_mlp, blocks.MLP((128,), 10), 128, (64,)),
        (1e-3, 1e-1),
        {1: 4000, 8: 1000, 64: 400, 512: 200},
        1000,
        1000,
    ),
    "cnn": Case(
        "CNN 3x3x16, 3x3x32, batch 32",
        lambda: _digits(zoo.digits_cnn, blocks.CNN((16, 32), 10), 32, (8, 8, 1)),
        (1e-3, 3e-2),
        {1: 200, 8: 100, 64: 100, 512: 25},
        500,
        400,
    ),
    "lm": Case(
        "byte transformer, 4 layers of 32, batch 16 x 64",
        _bytes_transformer,
        (1e-3, 1e-2),
        {1: 256, 8: 64, 64: 32, 512: 8},
        256,
        128,
    ),
    "tiny": Case(
        "tiny MLP 64-16-10, batch 16",
        lambda: _digits(
            lambda: zoo.digits_mlp(width=16, batch_size=16), blocks.MLP((16,), 10), 16, (64,)
        ),
        (1e-3, 1e-1),
        {1: 10000, 8: 4000, 64: 2000, 512: 1000},
        4000,
        4000,
    ),
}


def num_steps(name: str, num_trials: int, on_cpu: bool, quick: bool) -> int:
    """Steps of each trial: as many as for the nearest number of trials in the table, or fewer."""
    case = CASES[name]
    nearest = min(case.cpu_steps, key=lambda known: abs(np.log(known / num_trials)))
    steps = case.cpu_steps[nearest] if on_cpu else case.steps
    return max(8, steps // 10) if quick else steps


def rates(name: str, num_trials: int) -> np.ndarray:
    """The learning rate of each trial, float32 (trial,)."""
    return np.geomspace(*CASES[name].rates, num_trials).astype(np.float32)


def make_optimizer(point: Any) -> Any:
    """The optimizer of every contender, by our name."""
    return pbx.momentum(point["learning_rate"], MOMENTUM)
