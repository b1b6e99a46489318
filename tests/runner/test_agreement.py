"""Whether two processes train the same study: what is compared, and what a worker refuses."""

import concurrent.futures
import pickle

import jax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import _portable
from playbook_optax.runner import agreement, remote

SPEC = {"name": "toy", "num_steps": 4, "program": "a", "versions": {"jax": "1"}, "device_kind": "x"}


def test_every_difference_is_told_in_order():
    ours = {"name": "toy", "keep": "none", "only_here": 1}
    theirs = {"name": "other", "keep": "none", "only_there": 2}
    assert agreement.differences(theirs, ours, there="there") == [
        "name is 'other' there and 'toy' here",
        "only_here is None there and 1 here",
        "only_there is 2 there and None here",
    ]
    assert agreement.differences(ours, ours, there="there") == []


def test_progress_is_no_difference_unless_it_is_asked_for():
    ours, theirs = {**SPEC, "num_trials": 4}, {**SPEC, "num_trials": 9, "points": {"a": [1]}}
    assert agreement.differences(theirs, ours, there="there") == []
    told = agreement.differences(theirs, ours, there="there", ignore=())
    assert [part.partition(" ")[0] for part in told] == ["num_trials", "points"]


def test_threads_of_a_machine_are_divided_among_its_devices(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "12")
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert agreement.machine()["threads_per_device"] == 3
    monkeypatch.setattr(jax, "local_device_count", lambda: 16)
    assert agreement.machine()["threads_per_device"] == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert agreement.machine()["threads_per_device"] is None


def build(key, spec):
    return "train_blocks", spec


def unpacked(theirs, ours):
    """What a worker that makes `ours` does with the work of a driver that has `theirs`."""
    key = _portable.send_key(jax.random.key(0))
    return remote._unpack(pickle.dumps((build, {"spec": ours}, key, theirs)))


def test_a_worker_refuses_to_train_another_study():
    assert unpacked(SPEC, {**SPEC, "num_trials": 3}) == "train_blocks"
    with pytest.raises(ValueError, match=r"another study: num_steps is 4 in the driver and 5 in"):
        unpacked(SPEC, {**SPEC, "num_steps": 5})
    with pytest.raises(ValueError, match=r"another study: program is 'a'"):
        unpacked(SPEC, {**SPEC, "program": "b"})
    # Another version traces another program.
    assert unpacked(SPEC, {**SPEC, "program": "b", "device_kind": "y"}) == "train_blocks"


def test_a_task_that_is_always_lost_is_sent_so_often_and_no_more():  # 78
    class Losing(concurrent.futures.Executor):
        count = 0

        def submit(self, *_):
            self.count += 1
            future = concurrent.futures.Future()
            future.set_exception(ConnectionError("the worker was killed"))
            return future

    executor = Losing()
    with pytest.raises(remote.ExecutorFailed, match="the worker was killed"):
        pbx.run_study(
            tiny.quadratic(),
            tiny.sgd,
            tiny.SPACE,
            num_trials=2,
            num_steps=2,
            eval_every=1,
            key=jax.random.key(0),
            trials_per_block=2,
            executor=executor,
            progress=False,
        )
    assert executor.count == remote.ATTEMPTS
