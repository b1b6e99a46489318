"""What a large study weighs: the figures that docs/scaling.md reckons with.

Bytes of files and messages, seconds of the file system, and how workers that share a directory
divide a study, simulated with the package's own rule. Printed and stored.
Run: python -m benchmarks.scaling [--directory PLACE_ON_THE_FILE_SYSTEM_TO_MEASURE]
"""

import argparse
import functools
import heapq
import json
import os
import pathlib
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import playbook_optax as pbx
from playbook_optax import zoo
from playbook_optax.records import checkpoints, storage
from playbook_optax.runner import execute, plan, processes, remote, workers
from playbook_optax.runner.run import StudyRunner

RESULTS = pathlib.Path(__file__).parent / "results"
WORKLOAD = "digits_resmlp"
# Sizes depend on the number of evaluations, not on the steps between them.
NUM_STEPS, NUM_EVALUATIONS = 20, 20
WIDTHS = (1, 8, 64)
NUM_TRIALS, NUM_HOSTS = 10_000, 100

# Process 1 takes blocks, and then small messages, that process 0 gives, through the coordination
# service of JAX.
EXCHANGE = """
import json, sys, time
import jax
index, port, num_bytes, count = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
import numpy as np
from playbook_optax.runner import processes
with processes.together() as group:
    arrays = {"x": np.zeros(num_bytes, np.uint8)}
    group.arrive()
    began = time.perf_counter()
    for number in range(count):
        group._send(number, arrays) if index == 0 else group._receive(number, 0)
    if index == 1:
        print(time.perf_counter() - began)
    group.arrive()
"""

# What a process holds that reads a stored study.
MEMORY = """
import re, sys
import playbook_optax as pbx
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
study = pbx.load_study(sys.argv[1])
print(peak() - before)
"""


@functools.cache
def runner_of(keep="none"):
    entry = zoo.load(WORKLOAD)
    return StudyRunner(
        pbx.Trainer(
            entry.workload,
            lambda point: pbx.momentum(**point),
            trials_per_block=1,
            progress=False,
        ),
        entry.space,
        num_steps=NUM_STEPS,
        eval_every=NUM_STEPS // NUM_EVALUATIONS,
        key=jax.random.key(0),
        keep=keep,
    )


def seconds(function, *args):
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def widened(arrays, width):
    """A block of one trial as one of many: all arrays have a leading axis of trials."""
    return {name: np.repeat(array, width, axis=0) for name, array in arrays.items()}


def of_files(place):
    """The bytes of files; a block of one trial, and the spec that belongs to it."""
    found = {}
    space = zoo.load(WORKLOAD).space
    for keep in ("best", "none"):
        runner_of(keep).run(space, num_trials=1, directory=place / keep)
        block = storage.read_block(place / keep, 0, owner=None)
        for width in WIDTHS:
            size = len(storage.block_to_bytes(0, widened(block, width)))
            found[f"bytes of a block of {width}, keep={keep}"] = size
    found["bytes of study.json, a space"] = (place / "none" / "study.json").stat().st_size
    sampled = space.sample(jax.random.key(0), NUM_TRIALS)
    table = storage.read_spec(place / "none") | {
        "num_trials": NUM_TRIALS,
        "space": None,
        "points": {name: np.asarray(values).tolist() for name, values in sampled.items()},
    }
    del table["schema_version"]
    storage.write_spec(place / "table", table)
    found[f"bytes of study.json, a table of {NUM_TRIALS} points"] = (
        (place / "table" / "study.json").stat().st_size
    )
    return found, block, storage.read_spec(place / "none")


def of_saves(place):
    """A save of one block in training; its numbers are noise, which no compression shortens."""
    runner, rng, found = runner_of(), np.random.default_rng(0), {}
    state = runner.engine(1, 1)._data_shapes()
    for width in WIDTHS:
        arrays = [
            rng.integers(0, 256, (width, *leaf.shape[1:], leaf.dtype.itemsize), np.uint8)
            .view(np.uint8 if leaf.dtype == bool else leaf.dtype)
            .reshape(width, *leaf.shape[1:])
            for leaf in jax.tree.leaves(state)
        ]
        saves = checkpoints.Checkpoints(place, f"saves-{width}")
        took = [seconds(saves.write, step, arrays, {}) for step in range(1, 6)]
        newest = max((place / "checkpoints" / f"saves-{width}").iterdir())
        files = [path for path in newest.rglob("*") if path.is_file()]
        found[f"bytes of the state of a block of {width}"] = sum(one.nbytes for one in arrays)
        found[f"bytes of a save of a block of {width}"] = sum(one.stat().st_size for one in files)
        found[f"files of a save of a block of {width}"] = len(files)
        found[f"seconds to save a block of {width} (median of 5)"] = statistics.median(took)
    return found


def of_directory(directory, width, block, spec):
    """Writing, listing and reading a study of many trials, all its blocks copies of one."""
    count = -(-NUM_TRIALS // width)
    changed = {"num_trials": NUM_TRIALS, "trials_per_block": width}
    storage.write_spec(directory, {**spec, **changed})
    owner = storage.owner_of(storage.read_spec(directory))
    arrays, writing = widened(block, width), []
    for index in range(count):
        arrays["trial"] = np.arange(index * width, (index + 1) * width, dtype=np.int32)
        writing.append(seconds(storage.write_block, directory, index, arrays, owner))
    blocks = f"{count} blocks of {width}"
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(directory)], capture_output=True, text=True, check=True
    )
    return {
        f"seconds to write one block of {width} (median)": statistics.median(writing),
        f"seconds to list {blocks} (median of 9)": statistics.median(
            seconds(storage.finished_blocks, directory) for _ in range(9)
        ),
        f"seconds to read and check {blocks}": seconds(
            lambda: [storage.read_block(directory, index, owner) for index in range(count)]
        ),
        f"seconds of load_study, {blocks}": seconds(pbx.load_study, directory),
        f"bytes that load_study adds to a process, {blocks}": int(out.stdout),
    }


def of_messages(spec):
    """What is sent to a worker, and what processes of a job tell each other."""
    runner, width = runner_of(), 8
    space, block = zoo.load(WORKLOAD).space, plan.blocks_of(8, 1, width)[0]
    points, _ = plan.make_points(space, 8, jax.random.key(0))
    sent = {name: values[None] for name, values in points.rows(block.trials).items()}
    task = remote.Task("0" * 64, (block,), sent, "0" * 16)
    payload = remote.pack(print, runner._recipe, jax.random.key(0), {})
    missing = list(range(NUM_TRIALS // width))
    return {
        "bytes of a task": len(pickle.dumps(task)),
        "bytes of a workload sent": len(payload),
        "bytes of its data": sum(leaf.nbytes for leaf in jax.tree.leaves(runner._work.data)),
        "bytes of a spec told to a job": len(json.dumps({"spec": spec, "threads": 1})),
        f"bytes of a list of {len(missing)} missing blocks": len(json.dumps(missing)),
        "bytes of a part in the exchange": processes._PART_BYTES,
    }


def of_exchange(num_bytes, count):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE, *map(str, (index, port, num_bytes, count))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    out = [process.communicate()[0] for process in both]
    return {f"seconds to exchange {count} blocks of {num_bytes} bytes": float(out[1])}


def shared_out(width, spread, num_dead):
    """How workers that share a directory divide a study; times in blocks of an average worker.

    Args:
      width: trials of a block; all blocks take equally long.
      spread: standard deviation of the logarithm of the workers' speeds.
      num_dead: workers that never come; as many others do the work.

    Returns:
      When the last block is stored, and when it could be if nobody trained a block for nothing.
    """
    num_blocks = -(-NUM_TRIALS // width)
    speed = np.exp(np.random.default_rng(0).normal(0.0, spread, NUM_HOSTS))
    missing = plan.blocks_of(num_blocks, 1, 1)
    limit = execute.blocks_per_device(width, num_blocks, 1)
    done, training = set(), {}
    free = list(range(num_dead, NUM_HOSTS))
    events, now = [], 0.0
    while len(done) < num_blocks:
        for worker in free:
            chunk = workers.next_blocks(missing, done, (worker, NUM_HOSTS), limit)
            if chunk:
                training[worker] = (now, {block.index for block in chunk})
                heapq.heappush(events, (now + len(chunk) / speed[worker], worker, now))
        now, worker, began = heapq.heappop(events)
        free = []
        if worker not in training or training[worker][0] != began:
            continue  # It gave up before.
        done |= training[worker][1]
        for other, (_, wanted) in list(training.items()):
            if wanted <= done:
                del training[other]
                free.append(other)
    return now, num_blocks / speed[num_dead:].sum()


def of_workers():
    found = {}
    for width in WIDTHS:
        for spread in (0.0, 0.1, 0.3):
            for num_dead in (0, 10):
                end, ideal = shared_out(width, spread, num_dead)
                case = f"blocks of {width}, speeds spread by {spread}, {num_dead} workers dead"
                found[f"time / ideal time: {case}"] = end / ideal
    return found


def rounded(value):
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to measure; the temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        found, block, spec = of_files(place)
        found |= of_saves(place) | of_messages(spec)
        for width in WIDTHS:
            found |= of_directory(place / f"many-{width}", width, block, spec)
        found |= of_exchange(1_000, 1_000) | of_exchange(100_000, 100) | of_exchange(64 * 2**20, 1)
        found |= of_workers()
    found = {name: rounded(value) for name, value in found.items()}
    found |= {"versions": plan.environment()["versions"], "cores": os.cpu_count()}
    text = json.dumps(found, indent=1)
    path = RESULTS / f"scaling_{jax.local_devices()[0].device_kind.lower().replace(' ', '_')}.json"
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
