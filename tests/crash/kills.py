"""Kills real runs at random moments: `python -m tests.crash.kills --kills 100 long`.

A worker trains a study in a process of its own. It is killed, and started again with the same call,
until enough kills have struck in training. After each of them everything that was stored before
must still be there, unchanged and readable; at last the study must have the bits of one that nobody
has interrupted.

Half of the kills strike at a random moment of training. The others strike while something is being
written: when a temporary file or folder is seen, and a few random milliseconds later. A few more
strike before training, in imports and compilation, and are counted apart.
"""

import argparse
import collections
import hashlib
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

from playbook_optax.records import checkpoints, storage

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
# Nothing that the worker does takes nearly as long: it hangs.
TIMEOUT = 300.0
# A random moment lies within this part of the time that an uninterrupted training takes, counted
# from where the worker begins to train: so that one study is struck many times before it is whole.
SPREAD = {"blocks": 0.05, "long": 0.1, "small": 0.5}
BEFORE_TRAINING, WHILE_WRITING, TWICE = 0.05, 0.5, 0.25
SECONDS_OF_A_WRITE = 0.02
SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.15, signal.SIGINT: 0.15}


class Worker:
    """A process that trains a study, and what it has told.

    Args:
      kind: a kind of the worker's.
      directory: the study directory.
      cache: a folder for compiled programs.
    """

    def __init__(self, kind, directory, cache):
        self.directory = directory
        self._log = directory.with_suffix(".log")
        self._told = []
        self._times = {}
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", str(WORKER), kind, str(directory)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        for line in self._process.stdout:
            self._times.setdefault(line.split()[0], time.monotonic())
            self._told.append(line)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()

    @property
    def ended(self):
        return self._process.poll() is not None

    def began(self, phase):
        """Whether it told that this phase has begun."""
        return phase in self._times

    @property
    def hash(self):
        """Of the study, or None if it is not whole."""
        return next((line.split()[1] for line in self._told if line.startswith("done")), None)

    @property
    def training_seconds(self):
        return self._times["done"] - self._times["training"]

    @property
    def errors(self):
        return self._log.read_text()

    def wait_until(self, condition, poll=0.005):
        """Waits until the condition holds or the process ends; true if the condition holds."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            if self.ended:
                return condition()
            assert time.monotonic() < end, f"hangs: {self._told} {self.errors[-3000:]}"
            time.sleep(poll)
        return True

    def send(self, number):
        self._process.send_signal(number)

    def end(self):
        """Waits for the end of the process, and returns its status."""
        status = self._process.wait(TIMEOUT)
        self._thread.join(TIMEOUT)
        return status


def temporary_names(directory):
    """What a writer has begun and not finished, or left behind."""
    folders = (directory, directory / "blocks", *directory.glob("checkpoints/*"))
    found = set()
    for folder in folders:
        try:
            found.update(name for name in os.listdir(folder) if name.startswith(".tmp"))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


class Stored:
    """What a study directory holds; everything in it must be readable.

    Args:
      directory: the study directory.

    Attributes:
      blocks: index of each finished block to the SHA-256 of its file.
      saves: name of each group to the step of its newest sound save and the blocks it is of.
      unfinished: names of temporary files and folders.
    """

    def __init__(self, directory):
        self.blocks = {}
        self.saves = {}
        for index in storage.finished_blocks(directory):
            owner = storage.owner_of(storage.read_spec(directory))
            storage.read_block(directory, index, owner)
            file = directory / "blocks" / f"block-{index:08d}.pbx"
            self.blocks[index] = hashlib.sha256(file.read_bytes()).hexdigest()
        if self.blocks or (directory / "study.json").exists():
            storage.read_spec(directory)
        for group in checkpoints.groups(directory):
            save = read_save(directory, group)
            if save is not None:
                step, _, meta = save
                self.saves[group] = step, set(meta["blocks"])
        self.unfinished = temporary_names(directory)

    def check_kept_by(self, later):
        """Raises AssertionError if something of this is lost or changed later."""
        for index, digest in self.blocks.items():
            assert later.blocks.get(index) == digest, f"block {index} was lost or changed"
        for group, (step, blocks) in self.saves.items():
            newest = later.saves.get(group, (-1, None))[0]
            finished = blocks <= set(later.blocks)
            assert finished or newest >= step, f"{group} fell back from step {step} to {newest}"


def shapes_of_save(directory, group):
    """Dtypes and shapes of what is saved of a group; None where no manifest is sound."""
    for manifest in sorted(directory.glob(f"checkpoints/{group}/step-*/manifest.json"))[::-1]:
        try:
            arrays = storage.read_document(manifest)["arrays"]
        except storage.StorageError:
            continue
        return [jax.ShapeDtypeStruct(shape, storage.stored_dtype(dtype)) for dtype, shape in arrays]
    return None


def read_save(directory, group):
    """The newest sound save of a group, read as a run that continues reads it; or None."""
    like = shapes_of_save(directory, group)
    owner = storage.owner_of(storage.read_spec(directory))
    return like and checkpoints.Checkpoints(directory, group, owner).read_newest(like)


class Harness:
    """Kills the runs of one kind of study.

    Args:
      kind: a kind of the worker's.
      place: an empty folder for study directories.
      cache: a folder for compiled programs.
      seed: of the random moments.
      tell: gets a line about each kill.

    Attributes:
      expected: the hash of an uninterrupted study.
      counts: of kills, by where they struck, by signal and by what they left.
    """

    def __init__(self, kind, place, cache, seed=0, tell=lambda line: None):
        self.kind = kind
        self.place = pathlib.Path(place)
        self.cache = cache
        self.tell = tell
        self.random = random.Random(f"{kind} {seed}")
        with Worker(kind, self.place / "whole", cache) as whole:
            assert whole.end() == 0, whole.errors[-3000:]
        self.expected = whole.hash
        self.seconds = whole.training_seconds
        self.num_blocks = len(Stored(self.place / "whole").blocks)
        self.counts = collections.Counter()

    def run(self, num_kills):
        """Kills until so many kills have struck in training, and lets the last study finish."""
        before, finished = None, False
        while not finished:
            directory = self.place / f"study-{self.counts['whole studies']}"
            number, twice = None, False
            with Worker(self.kind, directory, self.cache) as worker:
                if self.counts["in training"] < num_kills:
                    number, twice = self._strike(worker)
                status = worker.end()
            after = Stored(directory)
            if before is not None:
                before.check_kept_by(after)
            before = after
            if worker.hash is not None:
                self._check_whole(worker, after)
                before = None
                self.counts["whole studies"] += 1
                finished = self.counts["in training"] >= num_kills
            else:
                self._check_killed(worker, number, twice, status, after)

    def _strike(self, worker):
        """Sends a signal at a random moment; returns it, and whether it was sent twice."""
        kinds = list(SIGNALS)
        number = self.random.choices(kinds, SIGNALS.values())[0]
        moment, delay = self.random.random(), self.random.random()
        if moment < BEFORE_TRAINING:
            began = time.monotonic()
            # Imports and compilation take about as long as the training of some kinds.
            worker.wait_until(lambda: time.monotonic() > began + delay * self.seconds)
        elif worker.wait_until(lambda: worker.began("training")):
            if moment < BEFORE_TRAINING + WHILE_WRITING:
                self._wait_for_a_write(worker)
                # The file of a block is there for a millisecond, a save's folder for many.
                time.sleep(delay**4 * SECONDS_OF_A_WRITE)
            else:
                end = time.monotonic() + delay * SPREAD[self.kind] * self.seconds
                worker.wait_until(lambda: time.monotonic() > end, poll=0.001)
        worker.send(number)
        twice = number != signal.SIGKILL and self.random.random() < TWICE
        if twice:
            time.sleep(self.random.random() * SECONDS_OF_A_WRITE)
            worker.send(number)
        return number, twice

    def _wait_for_a_write(self, worker):
        """Waits until something is written, for the first time, the second or the third."""
        seen = temporary_names(worker.directory)
        wanted = len(seen) + self.random.randint(1, 3)

        def written():
            seen.update(temporary_names(worker.directory))
            return len(seen) >= wanted

        worker.wait_until(written, poll=0.0002)

    def _check_whole(self, worker, stored):
        assert worker.hash == self.expected, f"other bits: {worker.directory}"
        assert len(stored.blocks) == self.num_blocks
        assert not stored.saves
        assert not stored.unfinished

    def _check_killed(self, worker, number, twice, status, stored):
        usual, taken_over = -number, 128 + number if number == signal.SIGTERM else -number
        training = worker.began("training")
        # The runner takes SIGTERM over while it trains: not before, not while the result is
        # assembled, and not a second one that comes when the first has ended the study.
        handed_back = len(stored.blocks) == self.num_blocks or twice
        statuses = {taken_over} if training and not handed_back else {usual, taken_over}
        assert status in statuses, f"{status} after {number!r}: {worker.errors[-3000:]}"
        if not training:
            self.counts["before training"] += 1
            self.tell(f"{number.name} before training")
            return
        self.counts["in training"] += 1
        self.counts[f"in training by {number.name}"] += 1
        self.counts["in training by two signals"] += twice
        self.counts["left an unfinished write"] += bool(stored.unfinished)
        self.counts["left a save inside a block"] += bool(stored.saves)
        steps = [step for step, _ in stored.saves.values()]
        self.tell(
            f"{self.counts['in training']}. {number.name} in training: {len(stored.blocks)} blocks "
            f"of {self.num_blocks} are stored, saves at steps {steps}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(SPREAD))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        place = pathlib.Path(place)
        harness = Harness(arguments.kind, place, place / "cache", arguments.seed, print)
        try:
            harness.run(arguments.kills)
        finally:
            print(json.dumps({"kind": arguments.kind, **harness.counts}, indent=1))
    print("Nothing finished was lost, and the bits are those of an uninterrupted run.")


if __name__ == "__main__":
    main()
