"""Whether the batch size matters when everything else is tuned for it.

The playbook says that the same validation error can be reached at any batch size, if the learning
rate and the rest are tuned for each and training is long enough. Here one model is tuned at each
batch size with as many trials of as many steps. The best candidates are trained again with other
seeds, because the best single trial is a lucky one, and the best of them on average is evaluated on
test data. All of that from several seeds of the search.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np

import playbook_optax as pbx
from benchmarks.claims.stability import interval
from playbook_optax import zoo
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.analysis.spreads import best_by_seed
from playbook_optax.records.study import Study

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"
FOUND = pathlib.Path(__file__).with_name("found_batch_size.md")
BATCH_SIZES = (8, 32, 128, 512)
NUM_TRIALS, NUM_STEPS = 32, 1000
NUM_CANDIDATES, NUM_RUNS = 5, 5
SEEDS = (0, 1, 2)
# A decade above the usual range: large batches stand larger rates.
SPACE = pbx.SearchSpace(
    {
        **pbx.optimizer_search_space("momentum", NUM_TRIALS),
        "learning_rate": pbx.Float(1e-3, 10.0, scale="log"),
    }
)


def _make_optimizer(point: Any) -> Any:
    return pbx.momentum(point["learning_rate"], point["momentum"])


def _make_schedule(point: Any, num_steps: int) -> Any:
    return pbx.schedules.cosine_decay(point["learning_rate"], num_steps)


COMMON: dict[str, Any] = {
    "make_optimizer": _make_optimizer,
    "make_schedule": _make_schedule,
    "num_steps": NUM_STEPS,
    "eval_every": NUM_STEPS // 20,
    "progress": False,
}


def best_candidate(study: Study) -> tuple[int, np.ndarray]:
    """The trial that is best on average over all of its runs, and the error of each, (run,)."""
    values = [best_by_seed(study, trial) for trial in range(study.num_trials)]
    # NaN where a run broke, which is never the least.
    best = int(np.nanargmin([errors.mean() for errors in values]))
    return best, values[best]


def tuned(batch_size: int, seed: int) -> dict[str, Any]:
    """Tunes at one batch size, trains the best candidates again, and evaluates the best of them.

    Args:
      batch_size: examples in a batch.
      seed: of the search.

    Returns:
      JSON-able: the point, and the error of the search, of the runs, and of the runs on test data.
    """
    work, key = zoo.digits_mlp(batch_size=batch_size), jax.random.key(seed)
    search = pbx.run_study(
        work, points=SPACE, num_trials=NUM_TRIALS, key=jax.random.fold_in(key, 0), **COMMON
    )
    top = outcomes(search).order[:NUM_CANDIDATES]
    again = pbx.run_study(
        work,
        points={name: values[top] for name, values in search.points.items()},
        key=jax.random.fold_in(key, 1),
        num_seeds=NUM_RUNS,
        keep="best",
        **COMMON,
    )
    best, errors = best_candidate(again)
    tests = [
        work.final_evaluate(again.params(best, run), again.model_state(best, run))
        for run in range(NUM_RUNS)
    ]
    return {
        "batch_size": batch_size,
        "seed": seed,
        "point": {name: float(values[best]) for name, values in again.points.items()},
        "best_of_search": search.best().value,
        "valid": errors.tolist(),
        "test": [metrics["test/error_rate"] for metrics in tests],
    }


def run() -> None:
    """Tunes at each batch size from each seed, and stores what came of it."""
    rows = []
    for seed in SEEDS:
        for batch_size in BATCH_SIZES:
            rows.append(tuned(batch_size, seed))
            print(rows[-1], flush=True)
    stored = {"num_trials": NUM_TRIALS, "num_steps": NUM_STEPS, "rows": rows}
    (RESULTS / "batch_size.json").write_text(json.dumps(stored, indent=1) + "\n")


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def page() -> str:
    """What was found, and the table of the stored results, as markdown."""
    stored = json.loads((RESULTS / "batch_size.json").read_text())
    lines = [
        FOUND.read_text(),
        "| batch size | learning rate | momentum | best of the search | valid | test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in BATCH_SIZES:
        rows = [row for row in stored["rows"] if row["batch_size"] == size]
        cells = [str(size)]
        cells += [_shown([row["point"][name] for row in rows]) for name in SPACE]
        cells.append(_shown([row["best_of_search"] for row in rows]))
        for part in ("valid", "test"):
            mean, half = interval([float(np.mean(row[part])) for row in rows])
            cells.append(f"{mean:.4f} ± {half:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    if "--page" not in sys.argv:
        pbx.use_cpu_cores()
        run()
    (RESULTS / "batch_size.md").write_text(page())
    print(page())
