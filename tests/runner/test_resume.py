"""Blocks that are stopped in the middle continue where they were, to the last bit."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import checkpoints
from playbook_optax.runner import execute, programs, resume, signals
from playbook_optax.trials import host_data

STEPS = 64
ARGUMENTS = {
    "num_steps": STEPS,
    "eval_every": 8,
    "key": jax.random.key(0),
    "progress": False,
    "keep": "final",
}


class Killed(Exception):  # noqa: N818
    pass


@pytest.fixture(autouse=True)
def _short_calls(monkeypatch):
    # A call of the program after every 16 steps, so that a run of 64 is saved three times.
    monkeypatch.setattr(execute, "SECONDS_PER_CALL", 0.0)


def killed_after(monkeypatch, num_saves):
    """Makes the run die after so many saves, as after kill -9: nothing is cleaned up."""
    saves = itertools.count(1)
    original = resume.Keeper.between_calls

    def dies(self, *args):
        original(self, *args)
        if next(saves) == num_saves:
            raise Killed

    monkeypatch.setattr(resume.Keeper, "between_calls", dies)


def content(study):
    weights = [jax.tree.leaves(study.params(i)) for i in range(study.num_trials)]
    return (
        {
            str(name): np.asarray(values.values).tobytes()
            for name, values in study.data.data_vars.items()
            if name != "infeasible_reason"
        },
        [np.asarray(leaf).tobytes() for leaves in weights for leaf in leaves],
    )


def counted(workload, counts):
    """The workload, with a count of its updates."""

    def loss(params, state, batch, key):
        jax.debug.callback(lambda _: counts.append(0), jax.tree.leaves(params)[0])
        return workload.loss(params, state, batch, key)

    return pbx.Workload(**{**vars(workload), "loss": loss})


RATES = {"learning_rate": np.float32([0.1, 1e30, 0.02, 0.3])}


@pytest.mark.parametrize(
    ("width", "independent"),
    [
        (1, False),
        (2, False),
        (2, True),
    ],
)
def test_a_block_continues_where_it_was_saved(tmp_path, monkeypatch, width, independent):
    counts = []
    workload = counted(tiny.mlp(), counts)
    arguments = {**ARGUMENTS, "trials_per_block": width, "independent": independent}
    whole = pbx.run_study(workload, tiny.momentum, RATES, **arguments)
    jax.effects_barrier()
    in_all = len(counts)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            pbx.run_study(
                workload,
                tiny.momentum,
                RATES,
                **arguments,
                directory=tmp_path,
                checkpoint_seconds=0.0,
            )
    assert len(checkpoints.groups(tmp_path)) == 1
    jax.effects_barrier()
    counts.clear()
    resumed = pbx.run_study(workload, tiny.momentum, RATES, **arguments, directory=tmp_path)
    jax.effects_barrier()
    assert content(resumed) == content(whole)
    assert 0 < len(counts) <= in_all * 0.55
    assert checkpoints.groups(tmp_path) == []


def noisy(point):
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), tiny.momentum(point))


def schedule_free(point):
    return optax.contrib.schedule_free(optax.sgd(point["learning_rate"]), 0.1)


@pytest.mark.parametrize("make_optimizer", [noisy, schedule_free])
def test_states_with_keys_and_averages_are_saved(tmp_path, monkeypatch, make_optimizer):
    arguments = {**ARGUMENTS, "trials_per_block": 2}
    workload = tiny.noisy_quadratic()
    whole = pbx.run_study(workload, make_optimizer, RATES, **arguments)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            pbx.run_study(
                workload,
                make_optimizer,
                RATES,
                **arguments,
                directory=tmp_path,
                checkpoint_seconds=0.0,
            )
    assert len(checkpoints.groups(tmp_path)) == 1
    resumed = pbx.run_study(workload, make_optimizer, RATES, **arguments, directory=tmp_path)
    assert content(resumed) == content(whole)


def test_a_save_of_which_all_trials_have_broken_is_continued(tmp_path, monkeypatch):
    rates = {"learning_rate": np.float32([1e30, 1e30, 1e30])}
    arguments = {**ARGUMENTS, "trials_per_block": 2}
    whole = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, rates, **arguments)
    assert whole.data["infeasible"].all()
    where = {"directory": tmp_path, "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, rates, **arguments, **where)
    assert len(checkpoints.groups(tmp_path)) == 1
    resumed = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, rates, **arguments, **where)
    assert content(resumed) == content(whole)


@pytest.mark.parametrize("other", ["rates", "space", "key", "steps"])
def test_saves_without_their_study_are_not_continued_by_another(tmp_path, monkeypatch, other):  # 62
    arguments = {**ARGUMENTS, "trials_per_block": 2}
    where = {"directory": tmp_path, "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments, **where)
    assert len(checkpoints.groups(tmp_path)) == 1
    # The spec is lost, and no block was finished: nothing says what the saves are of.
    (tmp_path / "study.json").unlink()
    rates = RATES
    if other == "rates":
        rates = {"learning_rate": np.float32([0.01, 0.05, 0.2, 0.02])}
    elif other == "space":
        rates, arguments["num_trials"] = tiny.SPACE, 4
    elif other == "key":
        arguments["key"] = jax.random.key(1)
    else:
        arguments["num_steps"] = 2 * STEPS
    fresh = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, rates, **arguments)
    found = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, rates, **arguments, **where)
    assert content(found) == content(fresh)
    assert content(pbx.load_study(tmp_path)) == content(fresh)
    assert checkpoints.groups(tmp_path) == []


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_saves_cost_steps_and_no_bits(tmp_path, monkeypatch, damaged):
    arguments = {**ARGUMENTS, "trials_per_block": 2, "directory": tmp_path}
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            pbx.run_study(
                tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments, checkpoint_seconds=0.0
            )
    saves = sorted(tmp_path.glob("checkpoints/*/step-*"), reverse=True)
    assert [save.name for save in saves] == ["step-00000048", "step-00000032"]
    for save in saves[:damaged]:
        files = (path for path in save.rglob("*") if path.is_file())
        largest = max(files, key=lambda path: path.stat().st_size)
        raw = bytearray(largest.read_bytes())
        raw[len(raw) // 2] ^= 16
        largest.write_bytes(raw)
    resumed = pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments)
    whole = pbx.run_study(
        tiny.noisy_quadratic(), tiny.momentum, RATES, **{**arguments, "directory": None}
    )
    assert content(resumed) == content(whole)


class Counting:
    """An iterator of batches that knows where it stands, and ignores where to start."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next += 1
        return np.float32([self.next % 7])

    def get_state(self):
        return str(self.next).encode()

    def set_state(self, state):
        self.next = int(state)


def grain_batches(start):
    dataset = grain.MapDataset.source(np.arange(40, dtype=np.float32)).shuffle(seed=3)
    return iter(dataset.repeat().batch(4).to_iter_dataset())


def skipping(start):
    return (np.float32([step % 5, 1.0]) for step in itertools.count(start))


@pytest.mark.parametrize(
    ("host_batches", "starts"),
    [
        (lambda start: Counting(), {0}),
        (grain_batches, {0}),
        (skipping, {0, 32}),
    ],
    ids=["state", "grain", "skip"],
)
def test_host_data_continue_at_the_right_batch(tmp_path, monkeypatch, host_batches, starts):
    asked = set()
    monkeypatch.setattr(execute, "MAX_CHUNK_STEPS", 16)

    def batches(start):
        asked.add(start)
        return host_batches(start)

    def loss(params, state, batch, key):
        return jnp.mean((params["w"].sum() - 0.1 * batch) ** 2), (state, {})

    workload = pbx.Workload(
        name="host",
        init=lambda key: ({"w": jnp.ones(2)}, {}),
        loss=loss,
        batch=None,
        host_batches=batches,
        evaluate=lambda params, state, data: {"valid/loss": jnp.sum(params["w"] ** 2)},
        objective="valid/loss",
        version="1",
    )
    points = {"learning_rate": np.float32([0.01, 0.05])}
    whole = pbx.run_study(workload, tiny.sgd, points, **ARGUMENTS)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            pbx.run_study(
                workload,
                tiny.sgd,
                points,
                **ARGUMENTS,
                directory=tmp_path,
                checkpoint_seconds=0.0,
            )
    asked.clear()
    resumed = pbx.run_study(workload, tiny.sgd, points, **ARGUMENTS, directory=tmp_path)
    assert content(resumed) == content(whole)
    assert asked == starts


def test_an_iterator_that_lost_its_methods_is_an_error():
    with pytest.raises(ValueError, match="without them"):
        host_data.batches_from(lambda start: iter(()), 5, {"state": 1})


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
import playbook_optax as pbx
pbx.use_cpu_cores({devices})
import tiny_workloads as tiny
from playbook_optax.runner import execute, resume
execute.SECONDS_PER_CALL = 0.0
if {die}:
    original = resume.Keeper.between_calls
    def dies(self, *args):
        original(self, *args)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    resume.Keeper.between_calls = dies
study = pbx.run_study(tiny.mlp(), tiny.momentum, tiny.SPACE, num_trials=6, num_steps=64,
                      eval_every=8, key=jax.random.key(0), trials_per_block=2, progress=False,
                      directory={directory!r}, checkpoint_seconds=0.0)
print(study.data["valid/loss"].values.tobytes().hex()[:4000])
"""


def run_script(directory, devices, die):
    script = SCRIPT.format(
        tests=os.path.dirname(tiny.__file__), directory=str(directory), devices=devices, die=die
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )


@pytest.mark.slow
def test_other_devices_continue_a_killed_run(tmp_path):  # 57, 83
    killed = run_script(tmp_path / "killed", 1, die=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(checkpoints.groups(tmp_path / "killed")) == 1
    resumed = run_script(tmp_path / "killed", 2, die=False)
    assert resumed.returncode == 0, resumed.stderr
    whole = run_script(tmp_path / "whole", 1, die=False)
    assert resumed.stdout == whole.stdout
    assert len(whole.stdout) > 100


TERMINATED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import jax
import playbook_optax as pbx
import tiny_workloads as tiny
from playbook_optax.runner import execute, resume
execute.SECONDS_PER_CALL = 0.0
original = resume.Keeper.between_calls
def signalled(self, blocks, step, *args):
    if step == 32:
        os.kill(os.getpid(), signal.SIGTERM)
    original(self, blocks, step, *args)
resume.Keeper.between_calls = signalled
pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, {{"learning_rate": jax.numpy.ones(2)}},
              num_steps=64, eval_every=8, key=jax.random.key(0), trials_per_block=2,
              progress=False, directory={directory!r})
print("not stopped")
"""


def test_a_terminated_process_has_its_own_exit_status_and_leaves_a_save(tmp_path):  # 76
    script = TERMINATED.format(tests=os.path.dirname(tiny.__file__), directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout == ""
    assert "SIGTERM: stops at the next safe moment" in done.stderr
    assert "the same call continues" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step-00000032"]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, SystemExit),
    ],
)
def test_a_signal_stops_after_saving(tmp_path, monkeypatch, capfd, number, error):  # 75, 76
    original = resume.Keeper.between_calls

    def signalled(self, blocks, step, *args):
        if step == 32:
            signal.raise_signal(number)
        original(self, blocks, step, *args)

    arguments = {**ARGUMENTS, "trials_per_block": 2}
    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "between_calls", signalled)
        with pytest.raises(error) as raised:
            pbx.run_study(
                tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments, directory=tmp_path
            )
    told = capfd.readouterr().err
    assert f"{number.name}: stops at the next safe moment" in told
    if error is SystemExit:
        assert raised.value.code == 143
        assert "the same call continues" in told
    else:
        assert "the same call continues" in str(raised.value)
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step-00000032"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = pbx.run_study(
        tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments, directory=tmp_path
    )
    assert content(resumed) == content(
        pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments)
    )


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.StudyTerminated)],
)
def test_a_second_signal_stops_at_once(capfd, number, error):
    def twice():
        with signals.stop_requests("Here.") as stop:
            # To this thread: a signal to the process may reach another, and Python only later.
            signal.raise_signal(number)
            assert stop.requested == number
            signal.raise_signal(number)
            pytest.fail("the second signal did not stop")

    with pytest.raises(error) as raised:
        twice()
    assert "Here." not in str(raised.value)
    capfd.readouterr()


def test_others_handlers_and_threads_are_left_alone():
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with signals.stop_requests("Here."):
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, mine)
    seen = []

    def elsewhere():
        with signals.stop_requests("Here.") as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))
            stop.check()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, signal.default_int_handler)]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"x": np.ones((4, 3), np.float32)}, r"\['x'\] of batch 5 has shape \(4, 3\).*drop_last"),
        ({"x": np.ones((8, 3), np.int32)}, r"batch 5 has shape \(8, 3\) and dtype int32"),
        ({"x": np.ones((8, 3), np.float32), "y": 0}, "batch 5 has the structure"),
    ],
)
def test_a_batch_unlike_the_others_is_told_when_it_arrives(odd, message):
    good = {"x": np.ones((8, 3), np.float32)}
    like = {"x": jax.ShapeDtypeStruct((4, 8, 3), np.float32)}
    chunks = execute.prefetch(iter([good, good, odd, good]), 4, 2, first=3, like=like)
    next(chunks)
    with pytest.raises(ValueError, match=message):
        next(chunks)


COMPILING = """
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import jax, jax.numpy as jnp
import playbook_optax as pbx
import tiny_workloads as tiny
from playbook_optax.runner import programs

signal.signal(signal.SIGINT, signal.default_int_handler)
workload, options = tiny.quadratic(), programs._options
if {real}:
    def loss(params, state, batch, key):
        w = params["w"]
        for i in range(600):  # Takes XLA half a minute and more.
            w = jnp.sin(w[::-1] * (1.0 + i / 7)) + jnp.cumsum(w)
        return (w ** 2).sum(), (state, {{}})

    workload = pbx.Workload(**{{**vars(workload), "loss": loss}})

def compiles(name):
    os.write(1, b"compiling\\n")  # At once: several threads compile.
    if not {real}:
        # In C, as the compiler is: no handler of Python's runs in this thread.
        ctypes.CDLL(None).sleep(600)
    return options(name)

programs._options = compiles
try:
    pbx.run_study(workload, tiny.sgd, tiny.SPACE, num_trials=4, num_steps=4, eval_every=2,
                  key=jax.random.key(0), progress=False, directory={directory!r},
                  trials_per_block={width})
finally:
    print("left", flush=True)
"""


def signalled_while_compiling(directory, number, real, width, times=2):
    """The exit status of a run that is told to stop, twice where once is not enough."""
    tests = os.path.dirname(tiny.__file__)
    script = COMPILING.format(tests=tests, directory=str(directory), real=real, width=width)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    try:
        assert process.stdout.readline() == "compiling\n"
        if times == 2:
            process.send_signal(number)
            time.sleep(2.0)
            assert process.poll() is None  # It goes on compiling.
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (times == 2) == ("stops at the next safe moment" in err)
    assert "left" in out, err  # Perhaps another thread has begun to compile meanwhile.
    return process.returncode


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_second_signal_while_compiling_ends_the_process(tmp_path, number, status, real):  # 75, 76
    assert signalled_while_compiling(tmp_path, number, real, 2) == status
    # The study is begun, and the same call goes on.
    assert pbx.load_study(tmp_path).num_trials == 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_before_the_width_is_known_ends_the_process(tmp_path):  # 75
    assert signalled_while_compiling(tmp_path, signal.SIGINT, False, None, 1) == -signal.SIGINT


def test_what_runs_side_by_side_is_in_order_and_raises_what_was_raised():
    def square(number):
        if number < 0:
            raise ZeroDivisionError(number)
        return number**2

    assert programs.side_by_side(square, range(20), 3) == [i**2 for i in range(20)]
    with pytest.raises(ZeroDivisionError, match="-1"):
        programs.side_by_side(square, [1, -1, 2], 2)
