"""One real study in a process of its own, which `kills` starts, kills and starts again.

`python tests/crash/worker.py KIND DIRECTORY` prints ``start`` once everything is imported,
``training`` when all is compiled and the first block is next, and ``done HASH`` when the study is
whole. HASH is the SHA-256 over every array of the study and every weight it kept.
"""

import hashlib
import signal
import sys

import jax
import numpy as np
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import resume

KINDS = {
    # Many small blocks, two to a call, of which some trials diverge.
    "blocks": {
        "num_trials": 8,
        "num_seeds": 64,
        "num_steps": 6000,
        "eval_every": 1000,
        "trials_per_block": 4,
    },
    # One block that takes long and is saved inside.
    "long": {
        "num_trials": 4,
        "num_steps": 400_000,
        "eval_every": 40_000,
        "trials_per_block": 4,
        "checkpoint_seconds": 0.1,
    },
    # A little of both, for the fast tests.
    "small": {
        "num_trials": 8,
        "num_steps": 20_000,
        "eval_every": 4000,
        "trials_per_block": 4,
        "checkpoint_seconds": 0.0,
    },
}


def run(kind, directory=None):
    """Runs a study of this kind; the same call continues it."""
    return pbx.run_study(
        # A run that continues must draw the same batches.
        tiny.noisy_quadratic(),
        tiny.momentum,
        tiny.SPACE,
        directory=directory,
        keep="best",
        progress=False,
        key=jax.random.key(3),
        **KINDS[kind],
    )


def study_hash(study):
    """SHA-256 over the names, dtypes, shapes and bytes of all arrays and kept weights."""
    digest = hashlib.sha256()

    def add(name, values):
        array = np.asarray(values)
        if array.dtype.kind not in "biufcV":
            array = array.astype("U64")
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())

    for name in sorted(map(str, study.data.variables)):
        add(name, study.data.variables[name].values)
    for trial in range(study.num_trials):
        for seed in range(study.num_seeds):
            for path, leaf in jax.tree_util.tree_leaves_with_path(study.params(trial, seed)):
                add(f"{trial}/{seed}{jax.tree_util.keystr(path)}", leaf)
    return digest.hexdigest()


def tell_when_training_begins():
    """The engine asks for what was saved when it has compiled, and before it trains."""
    groups = resume.Keeper.groups

    def told(self, missing):
        print("training", flush=True)
        return groups(self, missing)

    resume.Keeper.groups = told


def main():
    kind, directory = sys.argv[1:]
    # A parent in the background of a shell ignores Ctrl-C, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tell_when_training_begins()
    print("start", flush=True)
    study = run(kind, directory)
    print("done", study_hash(study), flush=True)


if __name__ == "__main__":
    main()
