"""The contenders in JAX: a study, and what people write instead.

All train the same trials: the workload's own batches and initialization from one key, momentum,
and a learning rate for each. None of the others evaluates, records or checks anything, except
Optuna's, which needs a value to be told.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import playbook_optax as pbx
from benchmarks.speed import workloads
from playbook_optax.runner.run import StudyRunner

State = tuple[Any, Any, Any, jax.Array]
"""params, model state, optimizer state, step."""


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def initial_state(work: Any, key: jax.Array) -> State:
    """A trial before its first step."""
    params, model_state = work.init(key)
    opt_state = optax.sgd(0.0, momentum=workloads.MOMENTUM).init(params)
    return params, model_state, opt_state, jnp.int32(0)


def plain_step(work: Any, rate: Any, state: State, key: jax.Array, data: Any) -> State:
    """One step and nothing else."""
    params, model_state, opt_state, number = state
    batch = work.batch(data, key, number)

    def loss(params: Any) -> Any:
        return work.loss(params, model_state, batch, jax.random.fold_in(key, number))

    gradients, (model_state, _) = jax.grad(loss, has_aux=True)(params)
    optimizer = optax.sgd(rate, momentum=workloads.MOMENTUM)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), model_state, opt_state, number + 1


def plain_scan(work: Any, num_steps: int, rate: Any, key: jax.Array, data: Any) -> Any:
    """The weights after a whole trial and nothing else."""

    def body(state: State, _: None) -> tuple[State, None]:
        return plain_step(work, rate, state, key, data), None

    return jax.lax.scan(body, initial_state(work, key), length=num_steps)[0][0]


class Study:
    """Ours: a study that is compiled already, of `num_trials` trials.

    Args:
      name: the workload.
      num_trials: trials of the study.
      num_steps: steps of each.
      num_evals: evaluations of each after the one before its first step.
      **options: `make_optimizer`, `keep`, and attributes of `Trainer`.
    """

    def __init__(
        self, name: str, num_trials: int, num_steps: int, num_evals: int = 4, **options: Any
    ) -> None:
        self.trial_steps = num_trials * num_steps
        self._points = {"learning_rate": workloads.rates(name, num_trials)}
        make_optimizer = options.pop("make_optimizer", workloads.make_optimizer)
        keep = options.pop("keep", "none")
        trainer = pbx.Trainer(
            workloads.CASES[name].build(), make_optimizer, progress=False, **options
        )
        self._runner = StudyRunner(
            trainer,
            self._points,
            num_steps=num_steps,
            eval_every=max(1, num_steps // num_evals),
            key=jax.random.key(0),
            keep=keep,
        )
        study = self._runner.run(self._points)
        self.facts = {
            "trials_per_block": int(study.spec["trials_per_block"]),
            "num_infeasible": int(np.sum(study.data["infeasible"].values)),
        }

    def train(self) -> None:
        self._runner.run(self._points)


class StepLoop:
    """The loop people write: one jitted step, called for each trial and step.

    Args:
      name: the workload.
      num_trials: trials.
      num_steps: steps of each.
      budget: seconds that a round may take; steps are left out for it.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        work = workloads.CASES[name].build()
        self._data, self._key = jax.device_put(work.data), jax.random.key(0)
        self._rates = [jnp.float32(rate) for rate in workloads.rates(name, num_trials)]
        self._init = jax.jit(functools.partial(initial_state, work))
        self._step = jax.jit(
            lambda state, rate, key, data: plain_step(work, rate, state, key, data),
            donate_argnums=0,
        )
        self.facts: dict[str, Any] = {}
        self._num_steps, self.trial_steps = num_steps, min(4, num_steps)
        self.train()
        self.trial_steps = min(20, num_trials * num_steps)
        each = seconds(self.train) / self.trial_steps
        self.trial_steps = min(num_trials * num_steps, max(20, int(budget / each)))

    def train(self) -> None:
        left = self.trial_steps
        for rate in self._rates:
            state = self._init(self._key)
            for _ in range(min(left, self._num_steps)):
                state = self._step(state, rate, self._key, self._data)
            jax.block_until_ready(state)
            left -= self._num_steps
            if left <= 0:
                return


class ScanPerTrial:
    """One jitted scan for each trial, its learning rate an argument.

    Args are those of `StepLoop`; trials are left out for `budget`.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        work = workloads.CASES[name].build()
        self._data, self._key = jax.device_put(work.data), jax.random.key(0)
        self._rates = workloads.rates(name, num_trials)
        self.facts: dict[str, Any] = {}
        self.program = jax.jit(functools.partial(plain_scan, work, num_steps))
        self.one(self._rates[0])
        each = seconds(lambda: self.one(self._rates[0]))
        self.num_trials = max(1, min(num_trials, int(budget / each)))
        self.trial_steps = self.num_trials * num_steps

    def one(self, rate: Any) -> Any:
        """Trains one trial; its weights."""
        return jax.block_until_ready(self.program(jnp.float32(rate), self._key, self._data))

    def train(self) -> None:
        for rate in self._rates[: self.num_trials]:
            self.one(rate)


class Recompiling:
    """The loop with a learning rate that is a Python number, so that each trial compiles its step.

    One trial is trained; what compiling weighs depends on its number of steps.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        del budget
        self._work = workloads.CASES[name].build()
        self._data, self._key = jax.device_put(self._work.data), jax.random.key(0)
        self._init = jax.jit(functools.partial(initial_state, self._work))
        self._rate = float(workloads.rates(name, num_trials)[0])
        self.facts: dict[str, Any] = {}
        self._num_steps = self.trial_steps = num_steps
        jax.block_until_ready(self._init(self._key))

    def train(self) -> None:
        step = jax.jit(
            lambda state, key, data: plain_step(self._work, self._rate, state, key, data),
            donate_argnums=0,
        )
        state = self._init(self._key)
        for _ in range(self._num_steps):
            state = step(state, self._key, self._data)
        jax.block_until_ready(state)


class Optuna:
    """Optuna's random sampler, in memory, driving `ScanPerTrial`; each trial is evaluated once."""

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._scan = ScanPerTrial(name, num_trials, num_steps, budget)
        self._optuna = optuna
        self._range = workloads.CASES[name].rates
        work = workloads.CASES[name].build()
        data = jax.device_put(work.data)
        evaluate = jax.jit(lambda params: work.evaluate(params, {}, data)[work.objective])
        self._evaluate = evaluate
        self.facts: dict[str, Any] = {}
        self.trial_steps = self._scan.trial_steps
        self.train()

    def train(self) -> None:
        def objective(trial: Any) -> float:
            rate = trial.suggest_float("learning_rate", *self._range, log=True)
            return float(self._evaluate(self._scan.one(rate)))

        sampler = self._optuna.samplers.RandomSampler(seed=0)
        self._optuna.create_study(sampler=sampler).optimize(
            objective, n_trials=self._scan.num_trials
        )


def at_ends(name: str, num_trials: int, num_steps: int, budget: float) -> Study:
    """A study that is evaluated before its first and after its last step only."""
    del budget
    return Study(name, num_trials, num_steps, num_evals=1)


def by_default(name: str, num_trials: int, num_steps: int, budget: float) -> Study:
    """A study that is evaluated five times."""
    del budget
    return Study(name, num_trials, num_steps)


def cold(contender: str, name: str, num_trials: int, num_steps: int) -> float:
    """Seconds for a whole study, or scan for each trial, tracing and compiling included."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    work = workloads.CASES[name].build()
    values = workloads.rates(name, num_trials)
    key = jax.random.key(0)

    def study() -> None:
        points = {"learning_rate": values}
        StudyRunner(
            pbx.Trainer(work, workloads.make_optimizer, progress=False),
            points,
            num_steps=num_steps,
            eval_every=num_steps,
            key=key,
        ).run(points)

    def scan() -> None:
        data = jax.device_put(work.data)
        program = jax.jit(functools.partial(plain_scan, work, num_steps))
        for rate in values:
            jax.block_until_ready(program(jnp.float32(rate), key, data))

    return seconds({"study": study, "scan": scan}[contender])


def device() -> dict[str, Any]:
    """What JAX sees: platform, kind and number of devices."""
    first = jax.local_devices()[0]
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "devices": jax.local_device_count(),
    }
