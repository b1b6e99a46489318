"""Jobs of several processes on this machine: whole studies, and processes that die or freeze."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import job
import pytest
import tiny_workloads as tiny

from playbook_optax.records import storage

ROOT = pathlib.Path(job.__file__).parents[1]
HEARTBEAT = 4
# Noticed within the heartbeat; the rest is for two cores that eight processes share.
GRACE = 20


class Job:
    """The processes of a job."""

    def __init__(self, tmp_path, size, what="one", heartbeat=HEARTBEAT, each=(), **settings):
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        common = {"what": what, "size": size, "port": port, "heartbeat": heartbeat, **settings}
        self.logs = [tmp_path / f"{port}-{index}.log" for index in range(size)]
        self.processes = []
        for index in range(size):
            own = each[index] if each else {}
            with open(self.logs[index], "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            job.__file__,
                            json.dumps({**common, "index": index} | own),
                        ],
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                        text=True,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in self.processes:
            process.kill()
            process.communicate()

    def told(self, index):
        return self.logs[index].read_text()

    def digests(self):
        """What every process printed, once all have ended well."""
        out = [process.communicate(timeout=240)[0].split() for process in self.processes]
        for index, process in enumerate(self.processes):
            assert process.returncode == 0, self.told(index)[-3000:]
        assert all(one == out[0] for one in out)
        return out[0]

    def failures(self, timeout=120):
        """What every process said, once all have ended badly."""
        for process in self.processes:
            process.communicate(timeout=timeout)
            assert process.returncode not in (0, None)
        return [self.told(index) for index in range(len(self.processes))]

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.told(index)[-3000:]
            assert time.monotonic() < end
            time.sleep(0.01)


def alone(what="one", **settings):
    """The digests of one process, this one."""
    return [tiny.digest(study) for study in getattr(job, what)(settings)]


def test_two_processes_return_the_study_of_one(tmp_path):
    with Job(tmp_path, 2, "several") as two:
        assert two.digests() == alone("several")


@pytest.mark.slow
def test_four_processes_share_a_directory(tmp_path):  # 82: five blocks for four processes
    place = tmp_path / "study"
    with Job(tmp_path, 4, directory=str(place), keep="best", heartbeat=30) as four:
        assert four.digests() == alone(keep="best")
    assert storage.finished_blocks(place) == list(range(5))
    assert not list(place.glob(".tmp*"))


LONG = {"num_steps": 60_000, "eval_every": 20_000, "num_trials": 16, "checkpoint_seconds": 0.1}


@pytest.fixture(scope="module")
def long_digest():
    return alone(**{k: v for k, v in LONG.items() if k != "checkpoint_seconds"})


@pytest.mark.parametrize(
    ("size", "victim", "number"),
    [
        pytest.param(2, 1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(2, 0, signal.SIGKILL, marks=pytest.mark.slow),
        (2, 1, signal.SIGSTOP),
        pytest.param(4, 2, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(4, 0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_one_dies_or_freezes_and_all_exit(tmp_path, long_digest, size, victim, number):  # 78-80
    place = tmp_path / "study"
    with Job(tmp_path, size, directory=str(place), **LONG) as first:
        # Saves of blocks in training: everybody has compiled, nobody has finished.
        first.wait_for(lambda: list(place.glob("checkpoints/*/step-*")))
        first.processes[victim].send_signal(number)
        began = time.monotonic()
        others = [p for index, p in enumerate(first.processes) if index != victim]
        for process in others:
            process.wait(timeout=HEARTBEAT + GRACE)
            assert process.returncode not in (0, None)
        assert time.monotonic() - began < HEARTBEAT + GRACE
        if number == signal.SIGSTOP:  # It learns that it is out as soon as it wakes up.
            first.processes[victim].send_signal(signal.SIGCONT)
            assert first.processes[victim].wait(timeout=HEARTBEAT + GRACE) != 0
    # The same command resumes, on as many processes or on one.  83
    again = {1: 1, 0: 2}[victim % 2]
    with Job(tmp_path, again, directory=str(place), heartbeat=30, **LONG) as second:
        assert second.digests() == long_digest


def test_processes_that_differ_say_so_before_anything_is_written(tmp_path):  # 81
    place = str(tmp_path / "study")
    each = ({"num_steps": 6}, {"num_steps": 7})
    with Job(tmp_path, 2, each=each, directory=place) as differing:
        for told in differing.failures():
            assert "num_steps is 6 in process 0 and 7 in process 1" in told
    with pytest.raises(storage.NoStudy):
        storage.read_spec(place)


def test_a_directory_that_is_not_shared_is_an_error_at_the_start(tmp_path):  # 84
    each = ({"directory": str(tmp_path / "one")}, {"directory": str(tmp_path / "other")})
    with Job(tmp_path, 2, each=each) as blind:
        for told in blind.failures():
            assert "is not shared: process [1] of 2 does not see" in told
    assert not list(tmp_path.glob("*/study.json"))


def test_a_process_that_raises_ends_the_others(tmp_path):
    with Job(tmp_path, 2, "broken") as raising:
        told = raising.failures()
    assert "ZeroDivisionError: mine" in told[1]
    assert "process 1 of 2 failed: ZeroDivisionError: mine" in told[0]
