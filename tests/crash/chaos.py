"""Kills, freezes and restarts workers of real studies: `python -m tests.crash.chaos --minutes 3`.

Two ways to train one study are struck in turn, each in a new directory every time: a Dask cluster,
whose workers a nanny starts again, and plain processes of the command line,
`playbook-optax run DIRECTORY --worker i --of n`, which are started again here. At random moments a
worker is killed, or frozen for a while (SIGSTOP, SIGCONT). Whatever happens, each study must get
whole, with the bits of one that nobody has disturbed.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage

ROOT = pathlib.Path(__file__).parents[2]
NUM_WORKERS = 3
# Seconds between two blows, and for which a worker is frozen.
BETWEEN, FROZEN = (0.5, 5.0), (0.2, 5.0)
# How likely a blow is which.
BLOWS = {"killed": 0.4, "frozen": 0.6}
TARGET = "tests.crash.chaos:workload"
# Nothing here takes nearly as long: it hangs.
TIMEOUT = 240.0
ARGUMENTS = {
    "num_trials": 48,
    "num_steps": 30_000,
    "eval_every": 6000,
    "trials_per_block": 2,
}


def workload():
    """What the processes of the command line import."""
    return tiny.noisy_quadratic()


def study(directory=None, **how):
    """The study that is struck."""
    return pbx.run_study(
        workload(),
        tiny.momentum,
        tiny.SPACE,
        key=jax.random.key(5),
        progress=False,
        directory=directory,
        **ARGUMENTS,
        **how,
    )


class Striker:
    """Strikes processes at random moments, in a thread, while it is entered.

    Args:
      processes: ``processes()`` gives the numbers of those that may be struck.
      seed: of the moments.
      counts: of what was done.
      tell: gets a line about each blow.
    """

    def __init__(self, processes, seed, counts, tell):
        self._processes, self._counts, self._tell = processes, counts, tell
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._over.set()
        self._thread.join()

    def _strike(self):
        while not self._over.wait(self._random.uniform(*BETWEEN)):
            alive = sorted(self._processes())
            if not alive:
                continue
            pid = self._random.choice(alive)
            (blow,) = self._random.choices(list(BLOWS), BLOWS.values())
            try:
                os.kill(pid, signal.SIGKILL if blow == "killed" else signal.SIGSTOP)
            except ProcessLookupError:  # It has ended meanwhile.
                continue
            seconds = 0.0
            if blow == "frozen":
                seconds = self._random.uniform(*FROZEN)
                self._over.wait(seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._counts[blow] += 1
            self._tell(f"process {pid} was {blow}" + (f" for {seconds:.1f} s" if seconds else ""))


class Cluster:
    """A Dask cluster on this machine, whose workers are started again when they die."""

    name = "Dask cluster"

    def __init__(self):
        import dask
        import distributed

        # A worker may die more often than Dask expects of any one task.
        dask.config.set({"distributed.scheduler.allowed-failures": 1000})
        self._cluster = distributed.LocalCluster(
            n_workers=NUM_WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=50
        )
        self._client = distributed.Client(self._cluster)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._client.close()
        self._cluster.close()

    def alone(self, directory):
        """The digest of the study that nobody disturbs."""
        del directory  # It is no matter where that is stored.
        return tiny.digest(study())

    def _pids(self):
        nannies = self._cluster.workers.values()
        return [nanny.pid for nanny in nannies if getattr(nanny, "pid", None)]

    def make(self, directory, seed, counts, tell):
        """Trains the study while workers are struck; its digest."""
        with Striker(self._pids, seed, counts, tell):
            return tiny.digest(
                study(
                    directory,
                    executor=self._client.get_executor(),
                    executor_timeout_seconds=20.0,
                )
            )


class CommandLine:
    """Processes `playbook-optax run` that share the directory, started again when they die."""

    name = "command line"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    @staticmethod
    def _call(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "playbook_optax.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            },
        )

    def _prepare(self, directory):
        process = self._call(
            *("search", TARGET, "--prepare", "--directory", str(directory)),
            *("--optimizer", "momentum", "--num-trials", str(ARGUMENTS["num_trials"])),
            *("--num-steps", str(ARGUMENTS["num_steps"])),
            *("--trials-per-block", str(ARGUMENTS["trials_per_block"])),
        )
        self._end(process)

    def _start(self, directory, index, number):
        return self._call(
            *("run", str(directory), "--workload", TARGET),
            *("--worker", str(index), "--of", str(number)),
        )

    @staticmethod
    def _end(process):
        shown, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, shown

    def alone(self, directory):
        """The digest of the study that nobody disturbs."""
        self._prepare(directory)
        self._end(self._start(directory, 0, 1))
        return tiny.digest(pbx.load_study(directory))

    def make(self, directory, seed, counts, tell):
        """Trains the study while workers are struck; its digest."""
        self._prepare(directory)
        end = time.monotonic() + TIMEOUT
        running = {i: self._start(directory, i, NUM_WORKERS) for i in range(NUM_WORKERS)}

        def pids():
            return [process.pid for process in list(running.values()) if process.poll() is None]

        try:
            with Striker(pids, seed, counts, tell):
                while running:
                    assert time.monotonic() < end, "the workers hang"
                    for index, process in list(running.items()):
                        if process.poll() == -signal.SIGKILL:
                            process.communicate()
                            counts["started again"] += 1
                            running[index] = self._start(directory, index, NUM_WORKERS)
                        elif process.poll() is not None:
                            self._end(running.pop(index))
                    time.sleep(0.05)
        finally:
            for process in running.values():
                process.kill()
                process.communicate()
        return tiny.digest(pbx.load_study(directory))


def strike(kind, place, minutes, seed=0, tell=lambda line: None):
    """Makes one study after another while workers are struck.

    Args:
      kind: `Cluster` or `CommandLine`.
      place: an empty folder.
      minutes: for how long; the study that is on its way is made whole.
      seed: of the moments.
      tell: gets a line about each blow and each study.

    Returns:
      Counts of what was done.

    Raises:
      AssertionError: a study had other bits, or did not get whole.
    """
    counts, place = collections.Counter(), pathlib.Path(place)
    blocks = ARGUMENTS["num_trials"] // ARGUMENTS["trials_per_block"]
    with kind() as workers:
        expected = workers.alone(place / "undisturbed")
        end = time.monotonic() + 60 * minutes
        while counts["studies"] == 0 or time.monotonic() < end:
            directory = place / f"study-{counts['studies']}"
            began = time.monotonic()
            digest = workers.make(directory, f"{seed} {counts['studies']}", counts, tell)
            assert digest == expected, f"other bits in {directory}"
            assert len(storage.finished_blocks(directory)) == blocks
            counts["studies"] += 1
            tell(f"study {counts['studies']} is whole after {time.monotonic() - began:.0f} s")
    return dict(counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for kind in (Cluster, CommandLine):
        with tempfile.TemporaryDirectory(prefix="chaos-") as place:
            print(f"{kind.name}:")
            found = strike(kind, place, arguments.minutes / 2, arguments.seed, print)
            print(json.dumps(found))
    print("Every study got whole, with the bits of one that nobody has disturbed.")


if __name__ == "__main__":
    main()
