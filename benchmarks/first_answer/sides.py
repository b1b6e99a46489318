"""What is timed, each call in a process of its own: `python -m benchmarks.first_answer.sides`.

The arguments of the command are the name of a function of this module and its arguments as JSON;
what the function returns is the last line of standard output.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import playbook_optax as pbx
from playbook_optax import zoo

EVALS = 20
MOMENTUM = 0.9
# Nothing diverges between them.
RATES = (1e-3, 1e-1)
LARGE = 0.5


def device() -> dict[str, Any]:
    """What JAX sees: platform, kind and number of devices."""
    first = jax.local_devices()[0]
    kind, devices = first.device_kind, jax.local_device_count()
    return {"platform": first.platform, "device": kind, "devices": devices}


def spent(function: Callable[[], Any]) -> dict[str, float]:
    """The seconds of one call: of this process's threads on a core, and on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def _optimizer() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`make_optimizer` and `make_schedule`: other functions at each call, and the same programs."""

    def make_optimizer(point: Any) -> optax.GradientTransformation:
        return pbx.adam(**point)

    def make_schedule(point: Any, num_steps: Any) -> Any:
        return pbx.schedules.cosine_decay(point["learning_rate"], num_steps)

    return make_optimizer, make_schedule


def _study(num_trials: int, num_steps: int) -> dict[str, Any]:
    """The arguments of `run_study`: Adam's four hyperparameters, cosine decay, 20 evaluations."""
    make_optimizer, make_schedule = _optimizer()
    return {
        "workload": zoo.digits_mlp(),
        "make_optimizer": make_optimizer,
        "make_schedule": make_schedule,
        "points": pbx.adam_search_space(128),
        "num_trials": num_trials,
        "num_steps": num_steps,
        "eval_every": max(1, num_steps // EVALS),
        "key": jax.random.key(0),
        "progress": False,
    }


def _changed(change: str, study: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the second call."""
    if change == "again":
        return study
    if change == "other_num_steps":
        return study | {"num_steps": study["num_steps"] * 6 // 5}
    if change == "other_num_trials":
        return study | {"num_trials": study["num_trials"] * 5 // 4}
    if change == "other_num_seeds":
        return study | {"num_seeds": 2}
    if change == "other_range":
        rates = {"learning_rate": pbx.Float(1e-3, 1e-2, scale="log")}
        return study | {"points": pbx.SearchSpace({**study["points"], **rates})}
    if change == "equal_optimizer":
        return study | dict(zip(("make_optimizer", "make_schedule"), _optimizer(), strict=True))
    raise ValueError(f"change {change!r} is unknown")


def calls(change: str, num_trials: int, num_steps: int) -> dict[str, Any]:
    """A study, and one with something changed."""
    study = _study(num_trials, num_steps)
    other = _changed(change, study)
    return {
        "first": spent(lambda: pbx.run_study(**study)),
        "second": spent(lambda: pbx.run_study(**other)),
    }


def first_study(num_trials: int, num_steps: int) -> dict[str, float]:
    """The first study of a process."""
    study = _study(num_trials, num_steps)
    return spent(lambda: pbx.run_study(**study))


def trial(work: pbx.Workload, num_steps: int) -> Callable[..., Any]:
    """A trial as people write it: ``trial(point, key, data)``, to be jitted.

    Args:
      work: the workload.
      num_steps: steps of the trial.

    Returns:
      A function that returns the metrics at 21 steps, the first of them 0, and the mean training
      loss of each of the 20 periods in between.
    """
    bounds = np.rint(np.linspace(0, num_steps, EVALS + 1)).astype(np.int32)

    def train(point: dict[str, Any], key: Any, data: Any) -> tuple[dict[str, Any], Any]:
        moments = {name: value for name, value in point.items() if name != "learning_rate"}
        schedule = optax.cosine_decay_schedule(point["learning_rate"], num_steps)
        optimizer = optax.chain(
            optax.scale_by_adam(**moments), optax.scale_by_learning_rate(schedule)
        )

        def step(number: Any, carry: Any) -> Any:
            params, model_state, opt_state, total = carry
            batch = work.batch(data, key, number)

            def loss(params: Any) -> Any:
                return work.loss(params, model_state, batch, jax.random.fold_in(key, number))

            (value, (model_state, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), model_state, opt_state, total + value

        def period(carry: Any, ends: Any) -> Any:
            start, stop = ends
            *state, total = jax.lax.fori_loop(start, stop, step, (*carry, jnp.float32(0)))
            metrics = work.evaluate(state[0], state[1], data)
            return tuple(state), (metrics, total / (stop - start))

        params, model_state = work.init(key)
        before = work.evaluate(params, model_state, data)
        carry = (params, model_state, optimizer.init(params))
        _, (metrics, losses) = jax.lax.scan(period, carry, (bounds[:-1], bounds[1:]))
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, metrics)
        return joined, losses

    return train


def scan(num_trials: int, num_steps: int) -> dict[str, float]:
    """All trials of `first_study` side by side in one program, by hand."""
    work, key = zoo.digits_mlp(), jax.random.key(0)
    data = jax.device_put(work.data)
    points = jax.device_get(pbx.adam_search_space(128).sample(key, num_trials))

    def run() -> None:
        program = jax.jit(jax.vmap(trial(work, num_steps), in_axes=(0, None, None)))
        jax.tree.map(np.asarray, program(points, key, data))

    return spent(run)


def tune(name: str, num_trials: int, num_steps: int) -> dict[str, Any]:
    """`pbx.tune` without a directory; the seconds of its large compilations."""
    compiled: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    recipe = pbx.tune(
        zoo.load(name).workload,
        num_trials=num_trials,
        num_steps=num_steps,
        key=jax.random.key(0),
        progress=False,
    )
    return {
        "value": recipe.value,
        "num_compiled": len(compiled),
        "compile_seconds": sum(compiled),
        "large": sorted((seconds for seconds in compiled if seconds > LARGE), reverse=True),
    }


def optuna(name: str, num_trials: int, num_steps: int) -> dict[str, Any]:
    """Optuna's TPE over the space that `tune` would search, one jitted trial at a time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    work, key = zoo.load(name).workload, jax.random.key(0)
    data, space = jax.device_put(work.data), pbx.adam_search_space(num_trials)
    program = jax.jit(trial(work, num_steps))
    best = np.max if work.maximize else np.min

    def objective(trial: Any) -> float:
        point = {}
        for label, line in space.items():
            low, high = float(line.low), float(line.high)
            if line.scale == "reverse_log":
                point[label] = 1 - trial.suggest_float(label, 1 - high, 1 - low, log=True)
            else:
                point[label] = trial.suggest_float(label, low, high, log=line.scale == "log")
        point = {label: jnp.float32(value) for label, value in point.items()}
        value = float(best(program(point, key, data)[0][work.objective]))
        if not np.isfinite(value):
            raise optuna.TrialPruned
        return value

    direction = "maximize" if work.maximize else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=num_trials)
    return {"value": study.best_value}


def second_study(num_trials: int, num_steps: int) -> dict[str, Any]:
    """A long study of the learning rate after a shorter one over another range."""
    work, eval_every = zoo.digits_mlp(), max(1, num_steps // 4)

    def study(low: float, high: float, num_steps: int) -> dict[str, float]:
        space = pbx.SearchSpace({"learning_rate": pbx.Float(low, high, scale="log")})
        return spent(
            lambda: pbx.run_study(
                work,
                make_optimizer,
                space,
                num_trials=num_trials,
                num_steps=num_steps,
                eval_every=eval_every,
                key=jax.random.key(0),
                progress=False,
            )
        )

    def make_optimizer(point: Any) -> optax.GradientTransformation:
        return pbx.momentum(point["learning_rate"], MOMENTUM)

    first = study(RATES[0] / 10, RATES[1] / 10, 2 * eval_every)
    return {"first": first, "second": study(*RATES, num_steps)}


def loop(num_trials: int, num_steps: int, budget: float) -> dict[str, Any]:
    """The loop people write, which neither evaluates nor records.

    Args:
      num_trials: trials.
      num_steps: steps of each.
      budget: wall seconds after which no further trial begins; what is left out is added from the
        mean of the trials that ran, compiling apart.
    """
    work, key = zoo.digits_mlp(), jax.random.key(0)
    data = jax.device_put(work.data)

    @jax.jit
    def step(params: Any, model_state: Any, opt_state: Any, rate: Any, number: Any) -> Any:
        batch = work.batch(data, key, number)

        def loss(params: Any) -> Any:
            return work.loss(params, model_state, batch, jax.random.fold_in(key, number))

        grads, (model_state, _) = jax.grad(loss, has_aux=True)(params)
        optimizer = optax.sgd(rate, momentum=MOMENTUM)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    init = jax.jit(work.init)

    def train(rate: Any, num_steps: int) -> None:
        rate, (params, model_state) = jnp.float32(rate), init(key)
        opt_state = optax.sgd(0.0, momentum=MOMENTUM).init(params)
        for number in range(num_steps):
            params, model_state, opt_state = step(params, model_state, opt_state, rate, number)
        jax.block_until_ready(params)

    compiling = spent(lambda: train(RATES[0], 1))
    each: list[dict[str, float]] = []
    for rate in np.geomspace(*RATES, num_trials):
        if sum(cost["wall"] for cost in each) > budget:
            break
        each.append(spent(lambda rate=rate: train(rate, num_steps)))
    scale = num_trials / len(each)
    total = {of: compiling[of] + scale * sum(cost[of] for cost in each) for of in compiling}
    return {**total, "trials_timed": len(each)}


if __name__ == "__main__":
    pbx.use_cpu_cores()
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
