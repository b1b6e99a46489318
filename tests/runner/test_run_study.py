"""Studies: bits across companions, order, length and devices; storage and resumption; host data."""

import concurrent.futures
import dataclasses
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage
from playbook_optax.runner import plan
from playbook_optax.runner.run import StudyRunner

KEY = jax.random.key(0)
POOL = concurrent.futures.ThreadPoolExecutor(1)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the widths are those of a CPU")
SHORT = {"num_steps": 6, "eval_every": 3, "key": KEY, "progress": False}


def study_of(points, num_trials=None, workload=None, make_optimizer=tiny.momentum, **arguments):
    return pbx.run_study(
        workload or tiny.noisy_quadratic(),
        make_optimizer,
        points,
        num_trials=num_trials,
        **{**SHORT, **arguments},
    )


def bits(study, trial):
    """Everything recorded of one trial, as bytes by name."""
    one = study.data.isel(trial=trial)
    return {
        str(name): np.asarray(array.values).tobytes()
        for name, array in {**one.data_vars, **one.coords}.items()
        if name not in ("trial", "infeasible_reason")
    }


def rates(*values):
    return {"learning_rate": np.array(values, np.float32)}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_bits_depend_on_the_point_and_the_width_alone(width):
    a, b, c, d, wild = 0.1, 0.02, 0.3, 0.05, 1e30
    # Whose products round differently in another width.
    given = {"trials_per_block": width, "workload": tiny.mlp()}
    base = study_of(rates(a, b, c), **given)
    longer = study_of(rates(a, b, c, d, wild), **given)
    shuffled = study_of(rates(wild, c, a, d, b), **given)
    for trial, place in enumerate((2, 4, 1)):
        assert bits(base, trial) == bits(longer, trial) == bits(shuffled, place)
    assert bool(longer.data["infeasible"][4])
    alone = study_of(rates(b), **given)
    assert bits(alone, 0) == bits(base, 1)


def test_the_default_width_does_not_depend_on_the_number_of_trials():
    short, long = study_of(tiny.SPACE, 3), study_of(tiny.SPACE, 9)
    assert short.spec["trials_per_block"] == long.spec["trials_per_block"]
    assert all(bits(short, i) == bits(long, i) for i in range(3))


def test_extend_adds_points_and_keeps_bits():
    space_study = study_of(tiny.SPACE, 5, trials_per_block=2)
    longer = space_study.extend(4)
    whole = study_of(tiny.SPACE, 9, trials_per_block=2)
    assert longer.num_trials == 9
    assert all(bits(longer, i) == bits(whole, i) for i in range(9))
    assert longer.extend(1).num_trials == 10
    with pytest.raises(ValueError, match="num_trials"):
        space_study.extend(0)
    with pytest.raises(ValueError, match="cannot train"):
        study_of(rates(0.1)).extend(1)


def test_a_study_reproduces_train_alone():
    study = study_of(tiny.SPACE, 4, keep="final")
    workload = tiny.noisy_quadratic()
    train = jax.jit(pbx.make_train(workload, tiny.momentum, 6, 3, keep="final"))
    for i in range(4):
        alone = train(study.point(i), pbx.trial_key(KEY), workload.data)
        for name, curve in alone.metrics.items():
            np.testing.assert_allclose(
                study.data[name].values[i], curve, rtol=2e-5, atol=1e-6, err_msg=name
            )
        assert jax.tree.structure(study.params(i)) == jax.tree.structure(alone.params)


def test_seeds_and_independence():
    study = study_of(rates(0.1, 0.1), num_seeds=2, trials_per_block=1)
    loss = study.data["valid/loss"].values
    assert study.data["valid/loss"].dims == ("trial", "seed", "eval")
    np.testing.assert_array_equal(loss[0], loss[1])  # common random numbers
    assert not np.array_equal(loss[:, 0], loss[:, 1])
    own = study_of(rates(0.1, 0.1), independent=True, trials_per_block=1).data["valid/loss"].values
    assert not np.array_equal(own[0], own[1])
    single = study_of(rates(0.1), trials_per_block=1).data["valid/loss"].values
    np.testing.assert_array_equal(single[0], loss[0, 0])
    train = jax.jit(pbx.make_train(tiny.noisy_quadratic(), tiny.momentum, 6, 3))
    for key, curve in ((pbx.trial_key(KEY, 1), loss[0, 1]), (pbx.trial_key(KEY, 0, 1), own[1])):
        alone = train({"learning_rate": 0.1}, key, tiny.noisy_quadratic().data).metrics[
            "valid/loss"
        ]
        np.testing.assert_allclose(alone, curve, rtol=2e-5)


def test_the_record_has_the_promised_layout():
    study = study_of(tiny.SPACE, 4, workload=tiny.mlp())
    assert study.data["train/loss"].dims == ("trial", "eval")
    assert study.data["step"].values.tolist() == [0, 3, 6]
    assert study.data["infeasible"].dims == ("trial",)
    assert study.data["learning_rate"].dims == ("trial",)
    assert study.data["norms/counts"].values.sum() == 4 * 6
    assert study.best().point.keys() == {"learning_rate"}
    assert study.best("train/loss").objective == "train/loss"
    assert study.space == tiny.SPACE


def test_kept_weights_are_those_of_the_best_evaluation():
    workload = tiny.noisy_quadratic()
    study = study_of(tiny.SPACE, 3, keep="best", num_steps=20, eval_every=2)
    for i in range(3):
        metrics = workload.evaluate(study.params(i), study.model_state(i), workload.data)
        best = int(study.data["best_step"][i]) // 2
        np.testing.assert_allclose(
            metrics["valid/loss"], study.data["valid/loss"].values[i, best], rtol=1e-5
        )


def test_all_diverged_is_a_finding():  # 43
    study = study_of(rates(1e30, 1e32, 1e34))
    assert study.data["infeasible"].all()
    with pytest.raises(pbx.NoFeasibleTrial):
        study.best()
    findings = pbx.diagnose(study)
    assert findings[0].code == "all_infeasible"
    assert "lower" in (findings[0].message + findings[0].suggestion).lower()


def test_one_program_serves_every_call():
    traces = []

    def make_optimizer(point):
        traces.append(1)
        return tiny.momentum(point)

    study_of(tiny.SPACE, 2, make_optimizer=make_optimizer, trials_per_block=1)
    few = len(traces)
    study_of(tiny.SPACE, 40, make_optimizer=make_optimizer, trials_per_block=1)
    assert len(traces) == 2 * few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": {}}, "points must be"),
        ({"points": tiny.SPACE}, "num_trials must be given"),
        ({"points": tiny.SPACE, "num_trials": 0}, "num_trials"),
        ({"points": tiny.SPACE, "num_trials": 2.0}, "num_trials"),
        ({"points": rates(0.1), "num_trials": 3}, "points hold 1 trials"),
        ({"points": rates(0.1, np.nan)}, "not finite in trial 1"),
        ({"points": {**rates(0.1), "b": np.ones(2)}}, "different numbers of trials"),
        ({"points": {"learning_rate": ["a"]}}, "must hold numbers"),
        ({"points": {"learning_rate": 0.1}}, r"shape \(trial,\)"),
        ({"points": rates(0.1), "num_seeds": 0}, "num_seeds"),
        ({"points": rates(0.1), "independent": 1}, "independent"),
        ({"points": rates(0.1), "trials_per_block": 0}, "trials_per_block"),
        ({"points": rates(0.1), "trials_per_block": "time"}, "'time' is unknown.*'timed'"),
        ({"points": rates(0.1), "trials_per_block": "timed", "executor": POOL}, "workers"),
        ({"points": rates(0.1), "key": 3}, "key must be one random key"),
        ({"points": rates(0.1), "mesh": "cpu"}, "mesh"),
        ({"points": rates(-0.1)}, None),
    ],
)
def test_bad_arguments(arguments, message):
    if message is None:  # A traced value flows; nothing to raise.
        assert study_of(**arguments).num_trials == 1
        return
    with pytest.raises(ValueError, match=message):
        study_of(**arguments)


def test_unknown_arguments_suggest_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'num_trials'"):
        study_of(tiny.SPACE, num_trails=3)


def test_a_directory_is_continued(tmp_path, monkeypatch):
    first = study_of(tiny.SPACE, 3, trials_per_block=2, directory=tmp_path, keep="best")
    assert storage.finished_blocks(tmp_path) == [0, 1]
    longer = study_of(tiny.SPACE, 5, directory=tmp_path, keep="best")
    assert storage.finished_blocks(tmp_path) == [0, 1, 2]
    fresh = study_of(tiny.SPACE, 5, trials_per_block=2, keep="best")
    assert all(bits(longer, i) == bits(fresh, i) for i in range(5))
    assert all(bits(longer, i) == bits(first, i) for i in range(3))
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    os.rename(tmp_path, moved)
    loaded = pbx.load_study(moved)
    assert all(bits(loaded, i) == bits(fresh, i) for i in range(5))
    # A corrupt block is trained again, not read wrong.
    block = sorted((moved / "blocks").iterdir())[1]
    raw = bytearray(block.read_bytes())
    raw[len(raw) // 2] ^= 1
    block.write_bytes(raw)
    again = study_of(tiny.SPACE, 5, directory=moved, keep="best")
    assert all(bits(again, i) == bits(fresh, i) for i in range(5))
    assert all(bits(pbx.load_study(moved), i) == bits(fresh, i) for i in range(5))


def named(workload, name):
    return dataclasses.replace(workload, name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 7}, "num_steps is 6 there and 7 here"),
        ({"key": jax.random.key(1)}, "key is"),
        ({"keep": "final"}, "keep is"),
        ({"workload": named(tiny.quadratic(), "noisy")}, "the program differs"),
        ({"make_optimizer": tiny.sgd}, "the program differs"),
        ({"workload": named(tiny.noisy_quadratic(), "other")}, "name is 'noisy'"),
        ({"points": pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 1.0)})}, "space is"),
        ({"trials_per_block": 3}, "width decides bits"),
    ],
)
def test_another_study_is_refused(tmp_path, change, message):  # 67
    stored = tmp_path / "stored"
    study_of(tiny.SPACE, 1, trials_per_block=1, directory=stored)
    arguments = {"points": tiny.SPACE, "num_trials": 1, **change}
    with pytest.raises(ValueError, match=message):
        study_of(directory=stored, **arguments)
    assert pbx.load_study(stored).num_trials == 1


def test_other_data_are_another_study(tmp_path):
    study_of(tiny.SPACE, 1, directory=tmp_path)
    changed = tiny.noisy_quadratic()
    changed.data[0] += 1.0
    with pytest.raises(ValueError, match="data is"):
        study_of(tiny.SPACE, 1, workload=changed, directory=tmp_path)


def test_x64_toggled_on_resume_is_refused(tmp_path):  # 53
    study_of(tiny.SPACE, 2, workload=tiny.quadratic(), make_optimizer=tiny.sgd, directory=tmp_path)
    with jax.enable_x64(True), pytest.raises(ValueError, match="x64 is False there and True here"):
        study_of(
            tiny.SPACE, 2, workload=tiny.quadratic(), make_optimizer=tiny.sgd, directory=tmp_path
        )


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_debugging_flags_that_forbid_nan_are_explained(flag):  # 52
    jax.config.update(flag, True)
    try:
        with pytest.raises(ValueError, match=rf"{flag} is on.*replay shows the step"):
            study_of(tiny.SPACE, 2)
        report = pbx.preflight(tiny.noisy_quadratic(), tiny.momentum, tiny.SPACE)
    finally:
        jax.config.update(flag, False)
    assert not report.ok
    assert flag in report.findings[0].message


def test_an_unwritable_directory_stops_before_the_first_step(tmp_path):  # 63
    place = tmp_path / "file"
    place.write_text("not a directory")
    with pytest.raises(storage.NotWritable, match="file"):
        study_of(tiny.SPACE, 1, directory=place)


def test_a_bad_workload_writes_nothing(tmp_path):
    def raises(point):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        study_of(tiny.SPACE, 1, make_optimizer=raises, directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def host_workload(num_batches=None):
    """The quadratic again, its batches from a Python iterator."""
    device = tiny.quadratic()

    def batches(start):
        steps = itertools.count(start) if num_batches is None else range(start, num_batches)
        return (np.float32(1.0 + 0.1 * step) * device.data for step in steps)

    return pbx.Workload(
        **{**vars(device), "batch": None, "host_batches": batches, "version": "one"}
    )


@pytest.mark.parametrize(
    "num_steps",
    [5, 64, 150],
)
def test_host_batches_train_as_device_batches(num_steps):
    device = tiny.quadratic()
    device = pbx.Workload(
        **{**vars(device), "batch": lambda data, key, step: (1.0 + 0.1 * step) * data}
    )
    arguments = {"num_steps": num_steps, "eval_every": 4, "trials_per_block": 2}
    points = rates(0.001, 0.01, 0.03)
    host = study_of(points, workload=host_workload(), make_optimizer=tiny.sgd, **arguments)
    ours = study_of(points, workload=device, make_optimizer=tiny.sgd, **arguments)
    np.testing.assert_allclose(host.data["valid/loss"], ours.data["valid/loss"], rtol=1e-4)


def test_host_batches_that_end_are_an_error():
    with pytest.raises(ValueError, match=r"ended after 3 batches; the run needs num_steps = 6"):
        study_of(rates(0.1), workload=host_workload(3), make_optimizer=tiny.sgd)
    workload = host_workload()
    train = pbx.make_train(workload, tiny.sgd, 3, 3)
    with pytest.raises(ValueError, match="only run_study"):
        train({"learning_rate": 0.1}, KEY, workload.data)


DEVICES = """
import sys, dataclasses, hashlib, numpy as np, jax
sys.path.insert(0, {tests!r})
import playbook_optax as pbx
count = pbx.use_cpu_cores({devices})
import tiny_workloads as tiny
mlp = tiny.mlp()
def init(key):  # 28: the compiler forgets on which devices an empty leaf is.
    params, state = mlp.init(key)
    return {{"mlp": params, "empty": jax.numpy.zeros((0, 3))}}, state
of_mlp = lambda function: lambda params, *rest: function(params["mlp"], *rest)
workload = dataclasses.replace(
    mlp, init=init, loss=of_mlp(mlp.loss), evaluate=of_mlp(mlp.evaluate))
study = pbx.run_study(workload, tiny.momentum, tiny.SPACE, num_trials=5, num_steps=6,
                      eval_every=3, key=jax.random.key(0), trials_per_block={width}, keep="best")
digest = hashlib.sha256()
for name in sorted(map(str, study.data.data_vars)):
    if study.data[name].dtype.kind != "U" and study.data[name].dtype.kind != "O":
        digest.update(np.ascontiguousarray(study.data[name].values).tobytes())
for leaf in jax.tree.leaves(study.params(4)):
    digest.update(np.asarray(leaf).tobytes())
try:
    pbx.use_cpu_cores(count + 1)
except RuntimeError as error:
    print("late:", error)
print(len(jax.devices()), digest.hexdigest())
"""


def in_subprocess(devices, width):
    script = DEVICES.format(tests=os.path.dirname(tiny.__file__), devices=devices, width=width)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    late, last = out.stdout.strip().splitlines()
    assert late.startswith(f"late: use_cpu_cores({devices + 1})")
    return last.split()


def test_eight_forced_devices_and_padding_change_no_bit_of_the_count():  # 28, 82
    # More devices than cores may change bits of wide products; these are small.
    one = in_subprocess(1, 2)
    many = in_subprocess(8, 2)
    assert (one[0], many[0]) == ("1", "8")
    assert one[1] == many[1]


def test_progress_goes_to_standard_error_and_only_if_it_is_wanted(capfd):
    study_of(tiny.SPACE, 2, progress=False)
    assert capfd.readouterr() == ("", "")
    study_of(tiny.SPACE, 2, progress=True)
    out, told = capfd.readouterr()
    assert out == ""
    assert "noisy: training 2 trials x " in told.splitlines()[-1]


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("playbook_optax.runner.progress.BAR_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    study_of(rates(0.1, 1e30), progress=True, trials_per_block=1)
    shown = capsys.readouterr().err
    assert "noisy" in shown
    assert "2/2 blocks" in shown
    assert "1 of 2 infeasible" in shown
    assert "steps/s" in shown


def test_a_mesh_is_used():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("anything",))
    assert bits(study_of(rates(0.1), mesh=mesh), 0) == bits(study_of(rates(0.1)), 0)
    three = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("a", "b", "c"))
    with pytest.raises(ValueError, match="one axis"):
        study_of(rates(0.1), mesh=three)
    with pytest.raises(ValueError, match=r"must be a jax\.sharding\.Mesh"):
        study_of(rates(0.1), mesh=4)


@pytest.mark.parametrize("width", [1, 2])
def test_trials_that_broke_cost_nothing(width):
    updates = []
    quadratic = tiny.quadratic()

    def loss(params, state, batch, key):
        jax.debug.callback(lambda _: updates.append(0), params)
        return quadratic.loss(params, state, batch, key)

    counted = pbx.Workload(**{**vars(quadratic), "loss": loss})
    points, steps = rates(0.01, 1e30, 0.02, 1e30, 1e30, 1e30, 1e30, 0.03), 320
    arguments = {"num_steps": steps, "eval_every": 80, "trials_per_block": width}
    study = study_of(points, workload=counted, make_optimizer=tiny.sgd, **arguments)
    jax.effects_barrier()
    assert study.data["infeasible"].values.tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
    # Three live trials; the broken ones up to the next look, after 16 steps. Under vmap a trial
    # that completes a block is trained along.
    live = 3 if width == 1 else 4
    assert len(updates) <= live * steps + 8 * 16
    assert len(updates) >= 3 * steps
    # What is packed with whom, and what broke, changes no bit.
    alone = study_of(rates(0.01, 0.02), workload=counted, make_optimizer=tiny.sgd, **arguments)
    assert bits(alone, 0) == bits(study, 0)
    assert bits(alone, 1) == bits(study, 2)


def test_blocks_of_a_call_are_spread_and_seeds_are_not_mixed():
    alone = [
        study_of(tiny.SPACE, 7, trials_per_block=2, num_seeds=3).data["valid/loss"].values
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*alone)
    one_seed = study_of(tiny.SPACE, 7, trials_per_block=2).data["valid/loss"].values
    np.testing.assert_array_equal(alone[0][:, 0], one_seed)


def test_batches_that_depend_on_the_point_are_made_by_the_trial():
    quadratic = tiny.quadratic()

    def scaled(point):
        def batch(data, key, step):
            return data * point["scale"]

        return pbx.Workload(**{**vars(quadratic), "batch": batch})

    points = {**rates(0.01, 0.01), "scale": np.float32([1.0, 3.0])}
    study = study_of(points, workload=scaled, make_optimizer=tiny.sgd, trials_per_block=2)
    plain = study_of(rates(0.01), workload=quadratic, make_optimizer=tiny.sgd, trials_per_block=2)
    assert bits(study, 0)["valid/loss"] == bits(plain, 0)["valid/loss"]
    assert bits(study, 1)["valid/loss"] != bits(plain, 0)["valid/loss"]


@on_cpu
def test_large_steps_train_one_after_another_and_small_ones_side_by_side():
    assert study_of(rates(0.1)).spec["trials_per_block"] > 1
    wide = pbx.Workload.from_arrays(
        lambda key: jax.random.normal(key, (4, 20000)) * 0.01,
        lambda w, x: (x @ w)[:, :2] + jnp.sum(x @ w, axis=1, keepdims=True) * 1e-6,
        *tiny.blobs(),
        batch_size=16,
    )
    assert study_of(rates(1e-3), workload=wide).spec["trials_per_block"] == 1


@on_cpu
def test_the_way_of_an_accelerator_trains_the_same(monkeypatch):
    points = {"learning_rate": np.float32([0.1, 1e30, 0.02])}
    arguments = {**SHORT, "num_steps": 21, "eval_every": 10, "trials_per_block": 2}
    usual = study_of(points, **arguments)
    # Steps in chunks of fixed length, batches gathered at once, sums and layouts as they come.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    other = study_of(points, **arguments)
    for name in ("valid/loss", "step/gradient_norm", "infeasible_step", "best_step"):
        np.testing.assert_allclose(other.data[name], usual.data[name], rtol=2e-5)


def test_flops_of_products_are_counted():
    def steps(w, x):
        looped = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=5)[0]
        return jax.lax.cond(looped[0, 0] > 0, lambda h: h @ w, lambda h: h, looped)

    closed = jax.make_jaxpr(jax.jit(steps))(jnp.ones((8, 8)), jnp.ones((3, 8)))
    assert plan.product_flops(closed.jaxpr) == 6 * 2 * 3 * 8 * 8

    def convolved(images, kernel):
        return jax.lax.conv(images, kernel, (1, 1), "VALID")

    closed = jax.make_jaxpr(convolved)(jnp.ones((2, 3, 6, 6)), jnp.ones((4, 3, 3, 3)))
    assert plan.product_flops(closed.jaxpr) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)


@on_cpu
@pytest.mark.parametrize(
    ("speeds", "fastest"),
    [({1: 1.0, 8: 3.0, 16: 2.0}, 1), ({1: 3.0, 8: 1.0, 16: 2.0}, 8), ({1: 2, 8: 2, 16: 1}, 16)],
)
def test_a_timed_width_is_the_fastest_and_stays_with_its_study(
    tmp_path, monkeypatch, speeds, fastest
):
    timed = []

    def rehearse(self, width, num_trials, points, seconds):
        timed.append(width)
        self.engine(width, 1)
        return 0.0, speeds[width]

    monkeypatch.setattr(StudyRunner, "rehearse", rehearse)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("trials",))
    arguments = {"workload": tiny.quadratic(), "make_optimizer": tiny.sgd, "mesh": mesh}
    study = study_of(
        tiny.SPACE, 16, **arguments, trials_per_block="timed", directory=tmp_path / "timed"
    )
    assert timed == [1, 8, 16]
    assert study.spec["trials_per_block"] == fastest
    given = study_of(tiny.SPACE, 16, **arguments, trials_per_block=fastest)
    assert bits(study, 3) == bits(given, 3)
    speeds[fastest] = 9.0
    again = study_of(
        tiny.SPACE, 20, **arguments, trials_per_block="timed", directory=tmp_path / "timed"
    )
    assert again.spec["trials_per_block"] == fastest
    assert timed == [1, 8, 16]


def test_widths_worth_timing():
    assert plan.widths_to_time(1, 512, 2) == [1, 8, 256]
    assert plan.widths_to_time(8, 5, 2) == [1, 3]
    assert plan.widths_to_time(64, 4000, 1) == [1, 64, 512]


def test_widths_are_really_timed():
    arguments = {"workload": tiny.quadratic(), "make_optimizer": tiny.sgd}
    study = study_of(tiny.SPACE, 4, **arguments, trials_per_block="timed")
    width = study.spec["trials_per_block"]
    assert width in plan.widths_to_time(8, 4, jax.local_device_count())
    given = study_of(tiny.SPACE, 4, **arguments, trials_per_block=width)
    assert bits(study, 3) == bits(given, 3)


def test_a_study_without_jit_is_refused():
    with jax.disable_jit(True), pytest.raises(ValueError, match=r"jax_disable_jit is on.*make_tr"):
        study_of(tiny.SPACE, 1, workload=tiny.quadratic(), make_optimizer=tiny.sgd)


def test_a_study_under_strict_promotion_is_the_same():
    arguments = {"workload": tiny.quadratic(), "make_optimizer": tiny.sgd}
    with jax.numpy_dtype_promotion("strict"):
        strict = study_of(tiny.SPACE, 2, **arguments)
    assert strict.data.identical(study_of(tiny.SPACE, 2, **arguments).data)


@pytest.mark.parametrize("keep", ["none", "best", "final"])
def test_a_random_key_in_the_model_state_is_kept(tmp_path, keep):
    quadratic = tiny.quadratic()
    workload = dataclasses.replace(
        quadratic, init=lambda key: (quadratic.init(key)[0], {"dropout": key})
    )
    arguments = {"workload": workload, "make_optimizer": tiny.sgd, "keep": keep}
    study = study_of(tiny.SPACE, 2, directory=tmp_path, **arguments)
    again = pbx.load_study(tmp_path)
    if keep != "none":
        stored = np.asarray(again.model_state(0)["dropout"])
        np.testing.assert_array_equal(stored, np.asarray(study.model_state(0)["dropout"]))
        assert stored.dtype == np.uint32
    assert study_of(tiny.SPACE, 2, directory=tmp_path, **arguments).data.identical(study.data)


@pytest.mark.parametrize(
    ("space", "metrics", "message"),
    [
        ({"seed": pbx.Float(0.1, 1.0)}, "valid/loss", "hyperparameter name 'seed' is used"),
        ({"step": pbx.Float(0.1, 1.0)}, "valid/loss", "hyperparameter name 'step' is used"),
        ({"infeasible": pbx.Float(0.1, 1.0)}, "valid/loss", "'infeasible' is used"),
        ({"learning_rate": pbx.Float(0.1, 1.0)}, "trial", "metric name 'trial' is used"),
        (
            {"learning_rate": pbx.Float(0.1, 1.0)},
            "learning_rate",
            "both a metric and a hyperparameter",
        ),
    ],
)
def test_names_of_the_record_are_refused_before_the_first_step(tmp_path, space, metrics, message):
    quadratic, steps = tiny.quadratic(), []

    def evaluate(params, state, data):
        return {metrics: quadratic.evaluate(params, state, data)["valid/loss"]}

    def loss(params, state, batch, key):
        jax.debug.callback(lambda: steps.append(0))
        return quadratic.loss(params, state, batch, key)

    workload = dataclasses.replace(quadratic, evaluate=evaluate, loss=loss, objective=metrics)
    space = pbx.SearchSpace(space)
    question = {"num_trials": 2, "num_steps": 6, "eval_every": 3, "key": jax.random.key(0)}

    def make_optimizer(point):
        return pbx.sgd(0.1)

    with pytest.raises(ValueError, match=message):
        pbx.run_study(workload, make_optimizer, space, directory=tmp_path / "study", **question)
    (finding,) = pbx.preflight(workload, make_optimizer, space, **question).findings
    assert finding.code == "reserved_name"
    assert re.search(message, finding.message)
    jax.effects_barrier()
    assert not steps
    assert not (tmp_path / "study").exists()
