"""Small studies for the tests of records, made without training."""

import json

import numpy as np

from playbook_optax.records import weights
from playbook_optax.search_space import Categorical, Float, SearchSpace

STEP = [0, 10, 20]
SPACE = SearchSpace(
    {"learning_rate": Float(1e-3, 1.0, scale="log"), "decay": Categorical(["cosine", "linear"])}
)


def a_tree(seed=0):
    """Weights as a workload may have them: nested, with None, tuples, f16, bf16 and no elements."""
    import ml_dtypes

    rng = np.random.default_rng(seed)
    return {
        "dense/0": {"kernel": rng.normal(size=(2, 3)).astype(np.float32), "bias": None},
        "scales": (rng.normal(size=2).astype(np.float16), [rng.normal(size=(0, 4))]),
        "low": rng.normal(size=3).astype(ml_dtypes.bfloat16),
    }


def a_spec(num_trials, num_seeds=1, trees=None):
    """A spec as the runner writes it."""
    return {
        "schema_version": 2,
        "name": "toy",
        "objective": "valid/loss",
        "maximize": False,
        "num_trials": num_trials,
        "num_seeds": num_seeds,
        "num_steps": 20,
        "eval_every": 10,
        "step": STEP,
        "keep": "none" if trees is None else "best",
        "space": SPACE.to_dict(),
        "trials_per_block": 3,
        "norm_edges": [0.0, 1.0, 2.0, 4.0],
        "trees": trees,
        "extra": {"jax": "0.10.2", "lowest": float("-inf")},
    }


def some_blocks(num_trials, num_seeds=1, width=3, kept=False):
    """Blocks of `width` runs in the order trial, seed; the last is padded with later trials."""
    runs = num_trials * num_seeds
    blocks = []
    for start in range(0, runs, width):
        run = np.arange(start, start + width)
        trial, seed = run // num_seeds, run % num_seeds
        curve = np.stack([9.0 + 0 * run, 1.0 + trial + 0.125 * seed, 1.5 + trial], axis=1)
        block = {
            "trial": trial.astype(np.int32),
            "seed": seed.astype(np.int32),
            "point/learning_rate": (0.5 ** (trial + 1)).astype(np.float32),
            "point/decay": (trial % 2).astype(np.int32),
            "metrics/train/loss": (curve / 2).astype(np.float32),
            "metrics/valid/loss": curve.astype(np.float32),
            "infeasible": np.zeros(width, bool),
            "infeasible_step": np.full(width, -1, np.int32),
            "infeasible_reason": np.zeros(width, np.int8),
            "best_value": curve.min(axis=1).astype(np.float32),
            "best_step": np.full(width, 10, np.int32),
            "norms/last": run.astype(np.float32),
            "norms/max": run.astype(np.float32) + 1,
            "norms/counts": np.tile(run[:, None], (1, 3)).astype(np.int32),
        }
        if kept:
            flat = [weights.flatten_tree(a_tree(int(r))) for r in run]
            for path in flat[0]:
                block[f"params/{path}"] = np.stack([f[path] for f in flat])
        blocks.append(block)
    return blocks


def kept_trees():
    """What the spec of a study with kept weights says about them."""
    return {"params": weights.describe_tree(a_tree()), "model_state": weights.describe_tree({})}


def same(one, other):
    """Whether two mappings of arrays agree in names, order, dtypes, shapes and bits."""
    return list(one) == list(other) and all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.shape(a) == np.shape(b)
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def variables(study):
    """Every array of a study's data."""
    return {str(name): values.values for name, values in study.data.variables.items()}


def strict_json(text):
    """Parses JSON as a strict parser of another language would."""

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)
