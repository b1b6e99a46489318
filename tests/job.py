"""One process of a job, for tests/runner/test_processes.py: reads what to do from its argument."""

import json
import sys
import warnings

warnings.simplefilter("error")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tiny_workloads as tiny  # noqa: E402

import playbook_optax as pbx  # noqa: E402


def arguments_of(settings):
    """What `run_study` gets of the settings."""
    names = ("num_trials", "num_steps", "eval_every", "keep", "directory", "checkpoint_seconds")
    given = {name: settings[name] for name in names if name in settings}
    return {
        "num_trials": 9,
        "num_steps": 6,
        "eval_every": 3,
        "key": jax.random.key(0),
        "trials_per_block": 2,
        "progress": False,
        **given,
    }


def several(settings):
    """Some studies one after another: kept weights, extended, host-fed, on a mesh over the job."""
    arguments = arguments_of(settings)
    study = pbx.run_study(tiny.mlp(), tiny.momentum, tiny.SPACE, **arguments, keep="best")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("trials",))
    auto = {**arguments, "trials_per_block": None, "mesh": mesh}
    return [
        study,
        study.extend(3),
        pbx.run_study(tiny.host_fed(), tiny.sgd, tiny.SPACE, **arguments),
        pbx.run_study(tiny.quadratic(), tiny.sgd, tiny.SPACE, **auto),
    ]


def one(settings):
    """One study."""
    return [pbx.run_study(tiny.mlp(), tiny.momentum, tiny.SPACE, **arguments_of(settings))]


def broken(settings):
    """A study whose workload one process fails to make."""

    def make_optimizer(point):
        if jax.process_index() == 1:
            raise ZeroDivisionError("mine")
        return tiny.momentum(point)

    return [pbx.run_study(tiny.mlp(), make_optimizer, tiny.SPACE, **arguments_of(settings))]


def main(settings):
    """Joins the job, if there is one, and prints a digest of each study."""
    if settings["size"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{settings['port']}",
            settings["size"],
            settings["index"],
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=settings["heartbeat"],
            shutdown_timeout_seconds=10,
        )
    for study in globals()[settings["what"]](settings):
        print(tiny.digest(study), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
