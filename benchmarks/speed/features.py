"""What a study's features cost, what diverged trials still cost, more devices, and memory."""

import functools
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import playbook_optax as pbx
from benchmarks.speed import workloads
from benchmarks.speed.contenders import Study, plain_scan
from playbook_optax.runner.run import StudyRunner
from playbook_optax.trials import layouts

NUM_EVALS = 10
DIVERGES_AT = 0.01
P = jax.sharding.PartitionSpec


class Bare:
    """The same trials without any feature, written by hand: a loop over blocks on each device.

    Products and convolutions are in the layouts that a study gives them: what is left is features.

    Args:
      name: the workload.
      num_trials: trials; rounded up to full blocks on all devices.
      num_steps: steps of each.
      width: trials side by side in a block; 1 is no vmap at all.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, width: int) -> None:
        work = workloads.CASES[name].build()
        devices = jax.local_devices()
        num_trials = -(-num_trials // (width * len(devices))) * width * len(devices)
        mesh = jax.sharding.Mesh(np.asarray(devices), ("trials",))

        def local(rates: jax.Array, key: jax.Array, data: Any) -> Any:
            def plain(rate: jax.Array) -> Any:
                return plain_scan(work, num_steps, rate, key, data)

            train = layouts.fast_layouts(plain)
            if width == 1:
                return jax.lax.map(train, rates)
            return jax.lax.map(jax.vmap(train), rates.reshape(-1, width))

        specs = (P("trials"), P(), P())
        self._program = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("trials"), check_vma=False)
        )
        whole = jax.sharding.NamedSharding(mesh, P())
        rates = workloads.rates(name, num_trials)
        self._arguments = (
            jax.device_put(rates, jax.sharding.NamedSharding(mesh, P("trials"))),
            *jax.device_put((jax.random.key(0), work.data), whole),
        )
        self.trial_steps = num_trials * num_steps
        self.facts = {"num_trials": num_trials}
        self.train()

    def train(self) -> None:
        jax.block_until_ready(self._program(*self._arguments))


def _clipped(point: Any) -> Any:
    return optax.chain(pbx.clip_by_global_norm(1.0), workloads.make_optimizer(point))


VARIANTS: dict[str, dict[str, Any]] = {
    "ends": {"num_evals": 1},
    "evaluated": {"num_evals": NUM_EVALS},
    "best": {"num_evals": NUM_EVALS, "keep": "best"},
    "everything": {"num_evals": NUM_EVALS, "keep": "best", "make_optimizer": _clipped},
}
"""Each has the features of the one before it and one more; freezing and the record of norms are
in all of them."""


def variant(variant: str, name: str, num_trials: int, num_steps: int) -> Study:
    """A study with some of the features."""
    return Study(name, num_trials, num_steps, **VARIANTS[variant])


class Diverging:
    """A study in which some trials, scattered, stop being finite after 1% of their steps.

    Args:
      name: the workload.
      num_trials: trials of the study.
      num_steps: steps of each.
      fraction: of the trials, how many diverge.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, fraction: float) -> None:
        self.trial_steps = num_trials * num_steps
        diverges = np.zeros(num_trials, np.float32)
        diverges[: round(fraction * num_trials)] = 1.0
        self._points = {
            "learning_rate": workloads.rates(name, num_trials),
            "diverges": np.random.default_rng(0).permutation(diverges),
        }
        self._run = _diverging_study(name, num_steps)
        study = self._run(self._points)
        steps = study.data["infeasible_step"].values
        self.facts = {
            "fraction": float(diverges.mean()),
            "num_infeasible": int(np.sum(study.data["infeasible"].values)),
            "infeasible_step": int(steps.max()),
        }

    def train(self) -> None:
        self._run(self._points)


@functools.cache
def _diverging_study(name: str, num_steps: int) -> Callable[[dict[str, np.ndarray]], pbx.Study]:
    """One compiled program for every fraction."""
    start = max(1, round(DIVERGES_AT * num_steps))

    def make_optimizer(point: Any) -> Any:
        def schedule(count: Any) -> Any:
            # Infinite, because a network that normalizes stays finite at any finite rate.
            lost = (count >= start) & (point["diverges"] > 0)
            return jnp.where(lost, jnp.inf, point["learning_rate"])

        return pbx.momentum(schedule, workloads.MOMENTUM)

    like = {"learning_rate": np.ones(1, np.float32), "diverges": np.ones(1, np.float32)}
    return StudyRunner(
        pbx.Trainer(workloads.CASES[name].build(), make_optimizer, progress=False),
        like,
        num_steps=num_steps,
        eval_every=num_steps,
        key=jax.random.key(0),
    ).run


def on_devices(name: str, num_trials: int, num_steps: int, num_devices: int, width: int) -> Study:
    """A study over the first of the local devices."""
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()[:num_devices]), ("trials",))
    return Study(name, num_trials, num_steps, 1, mesh=mesh, trials_per_block=width)


def _peak_bytes() -> int:
    """The most memory that this process has had so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux begins with that of the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(name: str, num_trials: int) -> int:
    """Bytes that a study takes at most, compiling included; to be called in a fresh process.

    On a CPU it is what the process takes beyond its imports, on an accelerator what the device
    has given out.
    """
    before = _peak_bytes()
    Study(name, num_trials, num_steps=8, num_evals=1)
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _peak_bytes() - before
    return int(device.memory_stats()["peak_bytes_in_use"])
