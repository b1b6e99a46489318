"""Whether the batch size matters when everything else is tuned for it.

The playbook says that the same validation error can be reached at any batch size, if the learning
rate and the rest are tuned for each and training is long enough. Here one model is tuned at each
batch size with as many trials of as many steps, and its best point is retrained with other seeds.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np

import playbook_optax as pbx
from playbook_optax import zoo

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"
FOUND = pathlib.Path(__file__).with_name("found_batch_size.md")
BATCH_SIZES = (8, 32, 128, 512)
NUM_TRIALS, NUM_STEPS, NUM_SEEDS = 32, 1000, 5


def _make_optimizer(point: Any) -> Any:
    return pbx.momentum(point["learning_rate"], point["momentum"])


def _make_schedule(point: Any, num_steps: int) -> Any:
    return pbx.schedules.cosine_decay(point["learning_rate"], num_steps)


def run() -> None:
    """Tunes at each batch size, retrains, and stores what came of it."""
    workloads = {str(size): zoo.digits_mlp(batch_size=size) for size in BATCH_SIZES}
    studies = pbx.run_studies(
        {label: {"workload": work} for label, work in workloads.items()},
        scientific="batch_size",
        make_optimizer=_make_optimizer,
        make_schedule=_make_schedule,
        space=pbx.optimizer_search_space("momentum", NUM_TRIALS),
        num_trials=NUM_TRIALS,
        num_steps=NUM_STEPS,
        eval_every=NUM_STEPS // 20,
        key=jax.random.key(0),
    )
    rows = []
    for label, work in workloads.items():
        best = studies[label].best()
        verdict = pbx.procedures.retrain(
            work,
            _make_optimizer,
            studies[label],
            key=jax.random.key(1),
            num_seeds=NUM_SEEDS,
            make_schedule=_make_schedule,
            keep="best",
        )
        (study,) = verdict.studies.values()
        tests = [
            work.final_evaluate(study.params(0, seed), study.model_state(0, seed))
            for seed in range(NUM_SEEDS)
        ]
        row = {
            "batch_size": int(label),
            "point": {name: float(value) for name, value in best.point.items()},
            "best_of_search": best.value,
            "valid": [float(value) for value in verdict.answer.values],
            "test": [metrics["test/error_rate"] for metrics in tests],
            "best_step": int(best.step),
        }
        print(row, flush=True)
        rows.append(row)
    stored = {"num_trials": NUM_TRIALS, "num_steps": NUM_STEPS, "rows": rows}
    (RESULTS / "batch_size.json").write_text(json.dumps(stored, indent=1) + "\n")


def page() -> str:
    """What was found, and the table of the stored results, as markdown."""
    stored = json.loads((RESULTS / "batch_size.json").read_text())
    lines = [
        FOUND.read_text(),
        "| batch size | learning rate | momentum | best of the search | retrained, valid | test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        cells = [
            str(row["batch_size"]),
            f"{row['point']['learning_rate']:.3g}",
            f"{row['point']['momentum']:.3g}",
            f"{row['best_of_search']:.4f}",
            f"{np.mean(row['valid']):.4f} ± {np.std(row['valid'], ddof=1):.4f}",
            f"{np.mean(row['test']):.4f} ± {np.std(row['test'], ddof=1):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    if "--page" not in sys.argv:
        pbx.use_cpu_cores()
        run()
    (RESULTS / "batch_size.md").write_text(page())
    print(page())
