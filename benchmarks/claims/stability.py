"""Do warm-up and clipping help, during warm-up too, and does an adaptive threshold?

The playbook marks two questions as open: clipping during warm-up, and an adaptive clip threshold.
Each remedy is swept over the learning rate by itself, with the same rates, steps and seeds, on
networks that train unstably and on one that does not. Written to benchmarks/results/claims/.

Run: python -m benchmarks.claims [workload ...]; then python -m benchmarks.claims --page
"""

import dataclasses
import json
import math
import pathlib
import platform
import time

import jax
import numpy as np
from scipy import stats

import playbook_optax as pbx
from playbook_optax import zoo

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"
NUM_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload with the sweep that it gets."""

    title: str
    build: object
    low: float
    high: float
    num_steps: int
    num_trials: int = 10
    optimizer: str = "momentum"
    warmup_steps: int | None = None
    max_norm: float | None = None
    trained_below: float = 1.0  # Training loss, in nats, from which a run has learned something.


CASES = {
    "digits_mlp": Case("plain MLP on digits (the control)", zoo.digits_mlp, 1e-2, 30.0, 400),
    "digits_resmlp_post": Case(
        "12-block residual MLP on digits, Norm(x + f(x))",
        lambda: zoo.digits_resmlp("post"),
        1e-3,
        3.0,
        600,
    ),
    "digits_resmlp_none": Case(
        "12-block residual MLP on digits, x + f(x), no normalization",
        lambda: zoo.digits_resmlp("none"),
        3e-4,
        3.0,
        600,
    ),
    "digits_resmlp_none_8": Case(
        "8-block residual MLP on digits without normalization; warm-up 100 steps, clipping at 1",
        lambda: zoo.digits_resmlp("none", num_blocks=8),
        1e-3,
        10.0,
        600,
        num_trials=12,
        warmup_steps=100,
        max_norm=1.0,
    ),
    "bytes_transformer": Case(
        "post-norm byte transformer on the topics of pydoc, Norm(x + f(x))",
        zoo.bytes_transformer,
        3e-3,
        10.0,
        300,
        num_trials=8,
        # 4.7 bits per byte: what single bytes tell without their neighbours.
        trained_below=4.7 * math.log(2),
    ),
    "digits_recurrent": Case(
        "recurrent net on digits, a pixel at a time (sudden spikes in mid-training)",
        zoo.digits_recurrent,
        1e-3,
        0.3,
        1000,
        num_trials=8,
    ),
}


def make_optimizer(name):
    return lambda point: getattr(pbx, name)(point["learning_rate"])


def measure(name):
    """Runs one case; a dict that JSON holds."""
    case = CASES[name]
    workload = case.build()
    started = time.perf_counter()
    verdict = pbx.procedures.compare_remedies(
        workload,
        make_optimizer(case.optimizer),
        pbx.SearchSpace({"learning_rate": pbx.Float(case.low, case.high, scale="log")}),
        key=jax.random.key(0),
        num_steps=case.num_steps,
        num_trials=case.num_trials,
        num_seeds=NUM_SEEDS,
        warmup_steps=case.warmup_steps,
        max_norm=case.max_norm,
        optimizers={},
    )
    comparison = verdict.answer
    rows = []
    for row in comparison.rows:
        study = verdict.studies[row.study or "none"]
        table = study.data
        entry = row._asdict()
        if row.best_trial >= 0:
            at = (
                int(np.flatnonzero(table["step"].values == row.best_step)[0])
                if (row.best_step >= 0)
                else -1
            )
            seeds = table[study.objective].transpose("trial", "seed", "eval").values
            entry["best_value_per_seed"] = seeds[row.best_trial, :, at].tolist()
        rows.append(entry)
    raw = {}
    for label, study in verdict.studies.items():
        data = study.data
        raw[label] = {
            "points": {n: v.tolist() for n, v in study.points.items()},
            "best_value": data["best_value"].transpose("trial", "seed").values.tolist(),
            "infeasible_reason": data["infeasible_reason"].values.tolist(),
            "final_step_loss": data["step/loss"].values[..., -1].tolist(),
            "clipped_fraction": (
                data["norms/num_clipped"] / data["norms/num_steps"].clip(min=1)
            ).values.tolist(),
        }
    return strict(
        {
            "case": name,
            "title": case.title,
            "optimizer": case.optimizer,
            "num_steps": case.num_steps,
            "num_seeds": NUM_SEEDS,
            "objective": comparison.objective,
            "maximize": comparison.maximize,
            "warmup_steps": comparison.warmup_steps,
            "max_norm": comparison.max_norm,
            "recommended": comparison.recommended,
            "findings": [finding.to_dict() for finding in verdict.findings],
            "rows": rows,
            "raw": raw,
            "trial_steps": verdict.cost,
            "seconds": time.perf_counter() - started,
            "machine": platform.machine(),
            "device": jax.local_devices()[0].device_kind,
            "versions": {"jax": jax.__version__, "playbook_optax": pbx.__version__},
        }
    )


def strict(value):
    """The value with what JSON cannot hold as text."""
    if isinstance(value, dict):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def interval(values):
    """Mean and half the width of its 95% interval (Student's t over seeds)."""
    values = np.asarray([v for v in values if not isinstance(v, str)], float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def run(names):
    """Measures the cases and stores each as it is done."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        result = measure(name)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"{name}: {result['seconds']:.0f} s, recommended {result['recommended']}", flush=True)
        print(table(result), flush=True)


def largest_trained(result):
    """By remedy, the largest rate at which the mean loss of the last steps of all seeds is low."""
    limit = CASES[result["case"]].trained_below
    found, seen = {}, {}
    for row in result["rows"]:
        if row["remedy"] == "lower_learning_rate":
            continue
        # Remedies that share a program follow each other in its study.
        start = seen.get(row["study"], 0)
        seen[row["study"]] = stop = start + len(row["learning_rates"])
        losses = result["raw"][row["study"]]["final_step_loss"][start:stop]
        low = [all(not isinstance(v, str) and v < limit for v in seeds) for seeds in losses]
        rates = [r for r, ok in zip(row["learning_rates"], low, strict=True) if ok]
        found[row["remedy"]] = max(rates, default=math.nan)
    return found


def shown(value, digits=3):
    return "–" if isinstance(value, str) or math.isnan(value) else f"{value:.{digits}g}"


def table(result):
    """The table of a case, in Markdown."""
    trained = largest_trained(result)
    lines = [
        "| remedy | trains up to rate | times that of none | stable up to | "
        f"best {result['objective']} (mean over seeds ± 95%) | at rate | clipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["remedy"] not in trained:
            continue
        mean, half = interval(row.get("best_value_per_seed", []))
        value = "–" if math.isnan(mean) else f"{mean:.4g} ± {half:.2g}"
        rate = trained[row["remedy"]]
        lines.append(
            f"| {row['remedy']} | {shown(rate)} | {shown(rate / trained['none'], 2)} | "
            f"{'≥ ' * row['stable_to_end']}{shown(row['largest_stable_learning_rate'])} | {value} "
            f"| {shown(row['best_learning_rate'])} | "
            + (
                "–"
                if isinstance(row["clipped_fraction"], str)
                else f"{row['clipped_fraction']:.0%}"
            )
            + " |"
        )
    return "\n".join(lines)


def page():
    """What was found, and the tables of all stored results."""
    parts = [(pathlib.Path(__file__).parent / "found.md").read_text().rstrip()]
    for name in CASES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        parts.append(
            f"## {result['title']}\n\n`python -m benchmarks.claims {name}`: {result['num_steps']} "
            f"steps of {result['optimizer']}, {result['num_seeds']} seeds, warm-up of "
            f"{result['warmup_steps']} steps, clip threshold {shown(result['max_norm'])}; "
            f"{result['trial_steps']:,} trial-steps. Recommended: {result['recommended']}.\n\n"
            + table(result)
        )
    return "\n\n".join(parts) + "\n"


def write_page():
    (RESULTS / "README.md").write_text(page())
