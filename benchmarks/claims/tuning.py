"""Whether `tune` pays: its recipe beside what people do without it, on test data.

Each contender comes to an optimizer: `tune` with its whole budget; Adam at 1e-3, cosine decay;
the best trial of Optuna's default sampler over the same space with as many trial-steps; and the
learning-rate-free optimizers of Optax at their defaults. Each optimizer then trains the workload
from seeds that nobody tuned on, for as many steps, in the same loop; the checkpoint with the best
validation objective is evaluated on the test data, which is the only time they are read.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import playbook_optax as pbx
from benchmarks.claims.stability import interval
from playbook_optax import cli, zoo

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"
FOUND = pathlib.Path(__file__).with_name("found_tuning.md")
EVALS = 20


class Case(NamedTuple):
    """How a workload is judged.

    Attributes:
      metric: of the test data: the one that its objective validates.
      num_runs: final runs of each contender for each seed of the tuning.
      num_seeds: seeds of the tuning, unless others are asked for.
      splits: whether each seed of the tuning has its own split into training, validation and test
        data. With a single one of few rows, all seeds would share what is luck in it.
    """

    metric: str
    num_runs: int
    num_seeds: int
    splits: bool

    def load(self, name: str, seed: int) -> pbx.Workload:
        """The workload that a seed tunes."""
        if self.splits:
            work: pbx.Workload = getattr(zoo, name)(split_seed=seed)
            return work
        return zoo.load(name).workload


CASES = {
    "digits_mlp": Case("test/error_rate", 10, 8, True),
    "breast_cancer": Case("test/error_rate", 10, 8, True),
    "wine": Case("test/error_rate", 10, 8, True),
    "diabetes": Case("test/loss", 10, 8, True),
    "bytes_transformer": Case("test/bits_per_byte", 3, 3, False),
}
NAMES = {
    "tune": "`pbx.tune`",
    "adam": "Adam, 1e-3, cosine decay",
    "optuna": "Optuna (TPE), Adam with cosine decay, same space and trial-steps",
    "prodigy": "Prodigy",
    "dog": "DoG",
    "schedule_free": "schedule-free AdamW",
}


class Contender(NamedTuple):
    """What is trained in the end.

    Attributes:
      optimizer: the transformation.
      num_steps: of the final run.
      weights: ``weights(opt_state, params)``: what is evaluated.
      facts: JSON-able.
    """

    optimizer: optax.GradientTransformation
    num_steps: int
    weights: Callable[[Any, Any], Any]
    facts: dict[str, Any]


def _as_trained(opt_state: Any, params: Any) -> Any:
    del opt_state
    return params


def final_runs(
    work: pbx.Workload, contender: Contender, keys: Any
) -> tuple[list[float], list[Any]]:
    """Trains from each key; the best validation values and the weights that had them."""
    sign = -1.0 if work.maximize else 1.0
    steps, every = contender.num_steps, max(1, contender.num_steps // EVALS)
    bounds = sorted({*range(0, steps, every), steps})

    def step(carry: Any, number: Any, key: Any, data: Any) -> tuple[Any, None]:
        params, model_state, opt_state = carry
        batch = work.batch(data, jax.random.fold_in(key, 1), number)
        loss_key = jax.random.fold_in(jax.random.fold_in(key, 2), number)

        def loss(params: Any) -> Any:
            value, (new_state, _) = work.loss(params, model_state, batch, loss_key)
            return value, new_state

        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optax.with_extra_args_support(contender.optimizer).update(
            grads, opt_state, params, value=value
        )
        return (optax.apply_updates(params, updates), new_state, opt_state), None

    def judged(carry: Any, best: Any, data: Any) -> Any:
        params = contender.weights(carry[2], carry[0])
        value = sign * work.evaluate(params, carry[1], data)[work.objective]
        better = value < best[0]
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), (params, carry[1]), best[1])
        return jnp.where(better, value, best[0]), kept

    @jax.jit
    def segment(carry: Any, best: Any, start: Any, stop: Any, key: Any, data: Any) -> Any:
        carry = jax.lax.fori_loop(start, stop, lambda i, c: step(c, i, key, data)[0], carry)
        return carry, judged(carry, best, data)

    @jax.jit
    def begin(key: Any) -> Any:
        params, model_state = work.init(jax.random.fold_in(key, 0))
        carry = (params, model_state, contender.optimizer.init(params))
        return carry, (jnp.float32(jnp.inf), (params, model_state))

    data = jax.device_put(work.data)
    values, weights = [], []
    for key in keys:
        carry, best = begin(key)
        for start, stop in zip([0, *bounds[:-1]], bounds, strict=True):
            carry, best = segment(carry, best, jnp.int32(start), jnp.int32(stop), key, data)
        values.append(sign * float(best[0]))
        weights.append(best[1])
    return values, weights


class Budget(NamedTuple):
    """What `playbook-optax tune` spends if it is not told otherwise."""

    num_trials: int
    num_steps: int


def default_budget(name: str) -> Budget:
    """The default budget of a workload of the zoo."""
    loaded = cli.load_workload(name)
    return Budget(cli.default_num_trials(loaded), loaded.num_steps)


def _tuned(work: pbx.Workload, budget: Budget, seed: int) -> Contender:
    recipe = pbx.tune(work, **budget._asdict(), key=jax.random.key(seed))
    facts = {"point": recipe.point, "spent": sum(recipe.cost.values())}
    facts |= {"warmup_steps": recipe.pipeline.warmup_steps, "max_norm": recipe.pipeline.max_norm}
    return Contender(recipe.optimizer(), recipe.num_steps, _as_trained, facts)


def _adam(work: pbx.Workload, budget: Budget, seed: int) -> Contender:
    del work, seed
    steps = budget.num_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    return Contender(optimizer, steps, _as_trained, {"spent": steps})


def _optuna(work: pbx.Workload, budget: Budget, seed: int) -> Contender:
    import optuna

    steps, space = budget.num_steps, pbx.adam_search_space(budget.num_trials)

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def make_optimizer(point: Any) -> optax.GradientTransformation:
        schedule = pbx.schedules.cosine_decay(point["learning_rate"], steps)
        return pbx.adam(**{**point, "learning_rate": schedule})

    train = jax.jit(pbx.make_train(work, make_optimizer, steps, max(1, steps // EVALS)))
    data, key = jax.device_put(work.data), pbx.trial_key(jax.random.key(seed))

    def objective(trial: Any) -> float:
        point = {}
        for name, line in space.items():
            low, high = float(line.low), float(line.high)
            if line.scale == "reverse_log":
                point[name] = 1 - trial.suggest_float(name, 1 - high, 1 - low, log=True)
            else:
                point[name] = trial.suggest_float(name, low, high, log=line.scale == "log")
        trial.set_user_attr("point", point)
        result = train({name: jnp.float32(value) for name, value in point.items()}, key, data)
        value = float(result.best_value)
        if not np.isfinite(value):
            raise optuna.TrialPruned
        return value

    direction = "maximize" if work.maximize else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=budget.num_trials)
    point = study.best_trial.user_attrs["point"]
    facts = {"point": point, "spent": budget.num_trials * steps}
    return Contender(make_optimizer(point), steps, _as_trained, facts)


def _free(name: str) -> Callable[..., Contender]:
    def made(work: pbx.Workload, budget: Budget, seed: int) -> Contender:
        del work, seed
        weights = _as_trained
        if name == "schedule_free":
            optimizer = optax.contrib.schedule_free_adamw()
            weights = optax.contrib.schedule_free_eval_params
        else:
            optimizer = getattr(optax.contrib, name)()
        return Contender(optimizer, budget.num_steps, weights, {"spent": budget.num_steps})

    return made


MAKERS: dict[str, Callable[..., Contender]] = {
    "tune": _tuned,
    "adam": _adam,
    "optuna": _optuna,
    "prodigy": _free("prodigy"),
    "dog": _free("dog"),
    "schedule_free": _free("schedule_free"),
}


def run(names: list[str], seeds: Sequence[int] | None, labels: Sequence[str]) -> None:
    """Runs the cases and stores each seed as soon as it is there, beside those of other calls.

    Args:
      names: workloads.
      seeds: of the tuning itself, and of the split where there are several; what tunes nothing
        differs by its final runs and the split only. As many as the case says if None.
      labels: contenders; results of the others stay as they are stored.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        budget, case = default_budget(name), CASES[name]
        for seed in range(case.num_seeds) if seeds is None else seeds:
            work = case.load(name, seed)
            keys = [
                jax.random.fold_in(jax.random.key(10_000 + seed), number)
                for number in range(case.num_runs)
            ]
            found = {}
            for label in labels:
                begun = time.perf_counter()
                contender = MAKERS[label](work, budget, seed)
                values, weights = final_runs(work, contender, keys)
                tests = [work.final_evaluate(*pair)[case.metric] for pair in weights]
                found[label] = {**contender.facts, "valid": values, "test": tests}
                print(
                    f"{name} seed {seed} {label}: valid {statistics.mean(values):.4g}, "
                    f"test {statistics.mean(tests):.4g}, {time.perf_counter() - begun:.0f} s",
                    flush=True,
                )
                jax.clear_caches()
            path = RESULTS / f"tune_{name}.json"
            stored = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
            seen = stored["seeds"]
            seen[str(seed)] = seen.get(str(seed), {}) | found
            stored = {
                "workload": name,
                "metric": case.metric,
                **budget._asdict(),
                "seeds": dict(sorted(seen.items(), key=lambda item: int(item[0]))),
            }
            path.write_text(json.dumps(stored, indent=1) + "\n")


def compared(stored: dict[str, Any], label: str) -> dict[str, float]:
    """A contender's test values beside those of `tune`, tuning seed by tuning seed.

    Args:
      stored: one file of results.
      label: the contender.

    Returns:
      mean: of its test values; difference: its mean minus tune's; error: half of the 95% interval
      of that difference over tuning seeds, whose final runs have the same keys; NaN for one seed.
    """
    ours, theirs = (
        np.array([found[name]["test"] for found in stored["seeds"].values()])
        for name in ("tune", label)
    )
    difference, error = interval((theirs - ours).mean(axis=1).tolist())
    return {"mean": float(theirs.mean()), "difference": difference, "error": error}


def page() -> str:
    """What was found, and the table of all stored results, as markdown."""
    lines = [
        FOUND.read_text(),
        "| test metric (tuning seeds); in brackets what it is worse by than `pbx.tune`, "
        f"± 95% | {' | '.join(NAMES.values())} |",
        "| --- |" + " --- |" * len(NAMES),
    ]
    for name in CASES:
        path = RESULTS / f"tune_{name}.json"
        if not path.exists():
            continue
        stored = json.loads(path.read_text())
        cells = []
        for label in NAMES:
            row = compared(stored, label)
            cell = f"{row['mean']:.4g}"
            if label != "tune":
                cell += f" ({0.0 if abs(row['difference']) < 1e-6 else row['difference']:+.2g}"
                cell += ")" if np.isnan(row["error"]) else f" ± {row['error']:.2g})"
            cells.append(cell)
        metric, count = stored["metric"].removeprefix("test/"), len(stored["seeds"])
        lines.append(f"| {name}, {metric} ({count}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", help="0, 1, ... if not given")
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--page", action="store_true", help="only write the page of what is stored")
    given = parser.parse_args()
    if not given.page:
        pbx.use_cpu_cores()
        pbx.use_compilation_cache()
        run(given.names, given.seeds, given.only)
    (RESULTS / "tuning.md").write_text(page())
    print(page())
