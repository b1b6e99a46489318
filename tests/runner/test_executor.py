"""Blocks trained by an executor's workers: threads, spawned processes, a Dask cluster."""

import concurrent.futures
import dataclasses
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
from tests.crash import freeze

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


class Tampering(Flaky):
    """Changes what comes back."""

    def __init__(self, change):
        super().__init__(set())
        self._change = change

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(self._change(super().submit(function, *args).result()))
        return future


def with_arrays(change):
    """An answer whose blocks went through a function of a block's arrays."""
    return lambda answer: dataclasses.replace(
        answer, blocks=[(index, change(dict(arrays))) for index, arrays in answer.blocks]
    )


def with_array(name, change):
    return with_arrays(lambda arrays: arrays | {name: change(arrays[name])})


BAD_ANSWERS = {
    "another block": (
        lambda answer: dataclasses.replace(answer, blocks=[(7, answer.blocks[0][1])]),
        r"blocks \[7\] and was asked for \[0\]",
    ),
    "no block": (lambda answer: dataclasses.replace(answer, blocks=[]), "asked for"),
    "a block twice": (
        lambda answer: dataclasses.replace(answer, blocks=answer.blocks * 2),
        r"blocks \[0, 0\]",
    ),
    "no blocks at all": (lambda answer: dataclasses.replace(answer, blocks=3), "blocks of which"),
    "no machine": (lambda answer: dataclasses.replace(answer, machine=None), "machine"),
    "no device": (lambda answer: dataclasses.replace(answer, num_devices=0), "num_devices"),
    "no time": (lambda answer: dataclasses.replace(answer, seconds=float("nan")), "seconds"),
    "other trials": (with_array("trial", lambda rows: rows + 2), "'trial'"),
    "other seeds": (with_array("seed", lambda rows: rows + 1), "'seed'"),
    "another point": (
        with_array("point/learning_rate", lambda rows: np.nextafter(rows, np.float32(9))),
        "'point/learning_rate'",
    ),
    "another dtype": (with_array("best_value", lambda rows: rows.astype(float)), "'best_value'"),
    "too few rows": (with_array("infeasible", lambda rows: rows[:1]), "'infeasible'"),
    "too few evaluations": (with_array("metrics/valid/loss", lambda rows: rows[:, 1:]), "loss'"),
    "no array": (with_array("infeasible_step", lambda rows: rows.tolist()), "infeasible_step"),
    "one more": (with_arrays(lambda arrays: arrays | {"more": arrays["trial"]}), "'more'"),
    "one less": (
        with_arrays(lambda a: {name: a[name] for name in a if name != "norms/max"}),
        "'norms/max'",
    ),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_an_answer_that_was_not_asked_for_is_refused(tmp_path, case):
    change, message = BAD_ANSWERS[case]
    with pytest.raises(remote.ExecutorFailed, match=f"worker '.*{message}"):
        study(executor=Tampering(change), directory=tmp_path)
    # Nothing of it is stored: the same call finds nothing wrong, and trains.
    assert storage.finished_blocks(tmp_path) == []


def test_the_order_of_arrays_is_no_matter(tmp_path):
    executor = Tampering(with_arrays(lambda arrays: dict(reversed(arrays.items()))))
    assert_same(study(executor=executor, directory=tmp_path), study())
    assert_same(pbx.load_study(tmp_path), study())


NO_ANSWERS = {
    "None": (lambda answer: None, r"lost the blocks \[\d\] 3 times: .* NoneType"),
    "no answer": (lambda answer: 3, "came to int"),
    "no name": (lambda answer: remote.Answer(None), "came to Answer"),
    "no study": (lambda answer: remote.Answer("there"), "worker 'there' has not got the study"),
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_a_task_that_comes_to_nothing_is_not_sent_for_ever(case):
    change, message = NO_ANSWERS[case]
    executor = Tampering(change)
    with pytest.raises(remote.ExecutorFailed, match=message):
        study(executor=executor)
    assert executor.count <= 5 * (remote.ATTEMPTS + 1)  # Five blocks.


def test_a_signal_is_seen_before_the_next_task_is_sent(capfd):
    class Struck(Flaky):
        def submit(self, function, *args):
            future = super().submit(function, *args)
            if self.count == 3:
                signal.raise_signal(signal.SIGINT)
            return future

    executor = Struck(set())
    with pytest.raises(KeyboardInterrupt, match="Interrupted"):
        study(executor=executor)
    assert executor.count == 3
    capfd.readouterr()


class Silent(Flaky):
    """Never answers some tasks."""

    def __init__(self, silent):
        super().__init__(set())
        self._silent, self.kept = silent, []

    def submit(self, function, *args):
        answered = super().submit(function, *args)
        if self.count not in self._silent:
            return answered
        future = concurrent.futures.Future()
        self.kept.append((future, answered.result()))
        return future


def test_blocks_of_a_silent_worker_are_sent_to_others(monkeypatch):
    monkeypatch.setattr(remote, "_CHECK_SECONDS", 0.01)
    executor = Silent({2})
    warned = r"answered for 0 s; waiting for the blocks \[1\]\. They are sent again"
    with pytest.warns(UserWarning, match=warned):
        found = study(executor=executor, executor_timeout_seconds=0.05)
    assert_same(found, study())
    assert executor.count == 6


def test_a_late_answer_is_as_good_as_that_of_the_second_try(monkeypatch):
    monkeypatch.setattr(remote, "_CHECK_SECONDS", 0.01)

    class Later(Silent):
        def submit(self, function, *args):
            if self.count == 5:  # Sent again: now the first answers, the second never.
                first, result = self.kept.pop()
                first.set_result(result)
                self.count += 1
                return concurrent.futures.Future()
            return super().submit(function, *args)

    with pytest.warns(UserWarning, match="no worker"):
        found = study(executor=Later({5}), executor_timeout_seconds=0.05)
    assert_same(found, study())


def test_silence_for_ever_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "_CHECK_SECONDS", 0.01)
    executor = Silent(set(range(3, 99)))
    with (
        pytest.warns(UserWarning, match="no worker"),
        pytest.raises(remote.ExecutorFailed, match=r"answered for .* the same call continues"),
    ):
        study(executor=executor, directory=tmp_path, executor_timeout_seconds=0.05)
    assert len(storage.finished_blocks(tmp_path)) == 2
    assert_same(study(directory=tmp_path), study())


def test_how_long_silence_may_last():
    live, broken = {"infeasible": np.array([True, False])}, {"infeasible": np.array([True])}
    silence = remote._Silence(None)
    assert not silence.bounded
    # Broken trials stop early: their time says nothing of the others'.
    silence.learn(500.0, [(0, broken)])
    assert not silence.bounded
    assert silence.too_long(600.0)
    with pytest.warns(UserWarning, match=r"blocks \[0, 1, .*, 7\] and others\. None has finished"):
        silence.tell(list(range(30)))
    assert not silence.too_long(599.0)
    assert silence.too_long(1.0)
    silence.learn(7.0, [(0, live), (1, broken)])
    assert (silence.bounded, silence.limit) == (True, 600.0)
    silence.learn(1000.0, [(0, live)])
    silence.learn(10.0, [(0, live)])
    assert silence.limit == 10_000.0
    silence.broken()
    assert not silence.too_long(9999.0)
    assert silence.too_long(1.0)
    assert remote._Silence(3.0).limit == 3.0


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="nothing freezes a process here")
def test_a_frozen_worker_is_not_waited_for(tmp_path):  # 78, 79, 80
    context, marker = multiprocessing.get_context("spawn"), tmp_path / "freeze"
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        executor = freeze.Freezing(pool, marker)
        alone = study(num_trials=40)
        assert_same(study(num_trials=40, executor=executor), alone)
        marker.touch()
        try:
            with pytest.warns(UserWarning, match=r"waiting for the blocks \[\d+\]\. They are sent"):
                found = study(num_trials=40, executor=executor, executor_timeout_seconds=5.0)
        finally:
            executor.thaw()
    assert_same(found, alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": 3}, "must be a concurrent.futures.Executor"),
        ({"executor": Flaky(set()), "worker": (0, 2)}, "executor"),
        ({"worker": (0, 2)}, "worker needs directory="),
        ({"worker": (2, 2)}, "i < n"),
        ({"worker": 2}, "must be a pair"),
        ({"executor_timeout_seconds": 0}, "executor_timeout_seconds"),
        ({"executor_timeout_seconds": "long"}, "executor_timeout_seconds"),
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
