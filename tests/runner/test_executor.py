"""Blocks trained by an executor's workers: threads, spawned processes, a Dask cluster."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage
from playbook_optax.runner import processes, remote
from playbook_optax.runner.run import StudyRunner

ARGUMENTS = {
    "num_steps": 40,
    "eval_every": 10,
    "key": jax.random.key(0),
    "progress": False,
    "trials_per_block": 2,
}


def study(workload=None, make_optimizer=tiny.momentum, points=tiny.SPACE, **arguments):
    arguments = {**ARGUMENTS, **arguments}
    if isinstance(points, pbx.SearchSpace):
        arguments.setdefault("num_trials", 9)
    return pbx.run_study(workload or tiny.noisy_quadratic(), make_optimizer, points, **arguments)


def assert_same(one, other):
    for name in one.data.data_vars:
        np.testing.assert_array_equal(one.data[name].values, other.data[name].values)


def test_threads_of_this_process(tmp_path):
    alone = study(tiny.mlp(), keep="best", num_seeds=2)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        shared = study(tiny.mlp(), keep="best", num_seeds=2, executor=executor, directory=tmp_path)
    assert_same(shared, alone)
    for one, other in zip(
        jax.tree.leaves(shared.params(3, seed=1)),
        jax.tree.leaves(alone.params(3, seed=1)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    # The driver stores what comes back: nothing is trained again.
    assert len(storage.finished_blocks(tmp_path)) == 10
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        again = study(tiny.mlp(), keep="best", num_seeds=2, executor=executor, directory=tmp_path)
        assert_same(again.extend(2), study(tiny.mlp(), keep="best", num_seeds=2, num_trials=11))


class Flaky(concurrent.futures.Executor):
    """Loses some tasks, as executors do whose workers are killed."""

    def __init__(self, lost):
        self.lost, self.count = lost, 0

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        self.count += 1
        if self.count in self.lost:
            future.set_exception(ConnectionError("the worker was killed"))
        else:
            future.set_result(function(*args))
        return future


def test_lost_tasks_are_sent_again():
    executor = Flaky({1, 2, 4})
    assert_same(study(executor=executor), study())
    assert executor.count > 5
    with pytest.raises(remote.ExecutorFailed, match=r"lost the blocks \[\d\] 3 times.*directory="):
        study(executor=Flaky(set(range(100))))


def test_workers_without_the_study_get_more_tasks_before_the_first_block_is_trained():
    with_payload = []

    class Many(Flaky):
        def submit(self, function, task, payload):
            with_payload.append(payload is not None)
            if payload is not None:
                return super().submit(function, task, payload)
            future = concurrent.futures.Future()
            future.set_result(remote.Answer(f"worker {len(with_payload)}"))
            return future

    study(tiny.quadratic(), tiny.sgd, num_trials=72, executor=Many(set()))
    first = remote.SPARE_TASKS
    assert with_payload[: first + 4] == [False] * first + [True, False, False, True]


def test_a_broken_executor_is_an_error_that_says_how_to_continue(tmp_path):
    class Broken(Flaky):
        def submit(self, function, *args):
            if self.count >= 2:
                raise concurrent.futures.BrokenExecutor("no worker is left")
            return super().submit(function, *args)

    with pytest.raises(remote.ExecutorFailed, match="the same call continues"):
        study(executor=Broken(set()), directory=tmp_path)
    assert_same(study(directory=tmp_path), study())


def test_the_users_own_errors_are_raised():
    quadratic = tiny.quadratic()

    def loss(params, state, batch, key):
        return quadratic.loss(params, state, batch, key)

    workload = pbx.Workload(**{**vars(quadratic), "loss": loss})
    executor = Flaky(set())

    class Fails(Flaky):
        def submit(self, function, task, payload):
            future = concurrent.futures.Future()
            future.set_result(remote.Answer("there", error=ZeroDivisionError("mine"), trace="..."))
            return future

    study(workload, tiny.sgd, executor=executor)
    with pytest.raises(ZeroDivisionError, match="mine"):
        study(workload, tiny.sgd, executor=Fails(set()))


def test_workers_that_compute_other_bits_are_told(monkeypatch):
    from playbook_optax.runner import agreement

    class Elsewhere(Flaky):
        def submit(self, function, *args):
            future = super().submit(function, *args)
            answer = future.result()
            future = concurrent.futures.Future()
            machine = {**agreement.machine(), "threads_per_device": 97}
            future.set_result(
                remote.Answer(answer.worker, machine, answer.num_devices, answer.blocks)
            )
            return future

    with pytest.warns(UserWarning, match="threads_per_device is .* close to, not bit-exact"):
        study(executor=Elsewhere(set()))


def test_spawned_processes():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        assert_same(study(executor=executor), study())
        # Lambdas travel too, where cloudpickle is installed; and another study is another program.
        other = study(
            tiny.quadratic(), lambda point: pbx.sgd(point["learning_rate"]), executor=executor
        )
    assert_same(other, study(tiny.quadratic(), tiny.sgd))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": 3}, "must be a concurrent.futures.Executor"),
        ({"executor": Flaky(set()), "worker": (0, 2)}, "executor"),
        ({"worker": (0, 2)}, "worker needs directory="),
        ({"worker": (2, 2)}, "i < n"),
        ({"worker": 2}, "must be a pair"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        study(**arguments)


def test_what_cannot_be_sent_is_named(monkeypatch):
    class Away(Flaky):
        def submit(self, function, task, payload):
            future = concurrent.futures.Future()
            future.set_result(remote.Answer("there"))
            return future

    lock = __import__("threading").Lock()

    def make_optimizer(point):
        with lock:
            return pbx.sgd(point["learning_rate"])

    with pytest.raises(ValueError, match=r"make_optimizer = .* cannot be sent"):
        study(make_optimizer=make_optimizer, executor=Away(set()))


DASK = """
import os, sys, time, signal, threading
sys.path.insert(0, {tests!r})
import jax, numpy as np

def main():
    import playbook_optax as pbx
    import tiny_workloads as tiny
    from distributed import Client, LocalCluster
    arguments = dict(num_trials=24, num_steps=600, eval_every=100, key=jax.random.key(0),
                     progress=False, trials_per_block=2)
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    client = Client(cluster)
    pids = {{address: info["pid"] for address, info in client.run(
        lambda: {{"pid": os.getpid()}}).items()}}
    from playbook_optax.records import storage
    def kill():
        while len(storage.finished_blocks({directory!r})) < 2:
            time.sleep(0.02)
        os.kill(sorted(pids.values())[0], signal.SIGKILL)
        print("killed", flush=True)
    thread = threading.Thread(target=kill)
    thread.start()
    study = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, tiny.SPACE, **arguments,
                          executor=client.get_executor(), directory={directory!r})
    thread.join()
    client.close(); cluster.close()
    alone = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, tiny.SPACE, **arguments)
    for name in alone.data.data_vars:
        np.testing.assert_array_equal(study.data[name].values, alone.data[name].values)
    print("same")

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_dask_cluster_whose_worker_is_killed(tmp_path):
    pytest.importorskip("distributed")
    tests = os.path.dirname(tiny.__file__)
    root = os.path.dirname(os.path.dirname(pbx.__file__))
    script = tmp_path / "driver.py"
    script.write_text(DASK.format(tests=tests, directory=str(tmp_path / "study")))
    out = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, tests]), "JAX_PLATFORMS": "cpu"},
        timeout=400,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.split() == ["killed", "same"]


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import jax
import playbook_optax as pbx
import tiny_workloads as tiny
study = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, tiny.SPACE, num_trials=40,
                      num_steps=3000, eval_every=500, key=jax.random.key(0), progress=False,
                      trials_per_block=2, directory={directory!r}, worker=({index}, 2))
print(study.data["valid/loss"].values.tobytes().hex())
"""


def start_worker(directory, index):
    tests = os.path.dirname(tiny.__file__)
    script = WORKER.format(tests=tests, directory=str(directory), index=index)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_a_worker_that_is_killed_leaves_its_blocks_to_the_other(tmp_path):  # 57, 72, 78
    workers = [start_worker(tmp_path, index) for index in (0, 1)]
    while not storage.finished_blocks(tmp_path) and workers[0].poll() is None:
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    _, told = workers[0].communicate()
    assert workers[0].returncode == -signal.SIGKILL, told
    shown, told = workers[1].communicate(timeout=300)
    assert workers[1].returncode == 0, told
    assert len(storage.finished_blocks(tmp_path)) == 20
    alone = study(num_trials=40, num_steps=3000, eval_every=500)
    assert shown.strip() == alone.data["valid/loss"].values.tobytes().hex()


@pytest.mark.parametrize("worker", [(0, 3), (2, 3)])
def test_one_worker_of_three_makes_the_study_whole(tmp_path, worker):
    found = study(directory=tmp_path, worker=worker)
    assert_same(found, study())
    assert len(storage.finished_blocks(tmp_path)) == 5
    # What another worker left damaged is trained again.
    path = sorted((tmp_path / "blocks").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-7])
    assert_same(study(directory=tmp_path, worker=worker), found)


def test_an_executor_inside_a_job_of_several_processes_is_refused(monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        trainer = pbx.Trainer(tiny.quadratic(), tiny.sgd, executor=pool)
        # Known inside the call only, which every process of the job makes together.
        monkeypatch.setattr(processes, "_active", object())
        with pytest.raises(ValueError, match="exclude each other"):
            StudyRunner(
                trainer,
                {"learning_rate": np.float32([0.1])},
                num_steps=2,
                eval_every=1,
                key=jax.random.key(0),
            )
