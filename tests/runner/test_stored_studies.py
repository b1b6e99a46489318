"""What a stored study says to whoever continues it elsewhere, or reads it while it is written."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage
from playbook_optax.runner import execute, finished, plan
from playbook_optax.runner.run import StudyRunner

POINTS = {"learning_rate": np.float32([0.5, 0.25])}


def study_of(directory, points, workload=None, num_trials=None, make_optimizer=tiny.sgd, **more):
    arguments = {"num_steps": 6, "eval_every": 3, "key": jax.random.key(0), "trials_per_block": 2}
    return pbx.run_study(
        workload or tiny.quadratic(),
        make_optimizer,
        points,
        num_trials=num_trials,
        progress=False,
        directory=directory,
        **(arguments | more),
    )


def test_other_dtypes_are_refused_by_name(tmp_path):  # 69
    rates = np.float32([0.5, 0.25])
    study_of(tmp_path, {"learning_rate": rates})
    with pytest.raises(ValueError, match=r"dtypes is .*float32.* there and .*float16.* here"):
        study_of(tmp_path, {"learning_rate": rates.astype(np.float16)})
    quadratic = tiny.quadratic()
    half = pbx.Workload(
        **{**vars(quadratic), "init": lambda key: ({"w": quadratic.init(key)[0]["w"] * 1}, {})}
    )
    with pytest.raises(ValueError, match="the program differs"):
        study_of(tmp_path, {"learning_rate": rates}, half)
    other_data = pbx.Workload(**{**vars(quadratic), "data": quadratic.data.astype(np.float16)})
    with pytest.raises(ValueError, match="data is"):
        study_of(tmp_path, {"learning_rate": rates}, other_data)


def in_environment(monkeypatch, **changed):
    real = plan.environment()
    monkeypatch.setattr(plan, "environment", lambda: {**real, **changed})


ABACUS = {"device_kind": "abacus"}
OLD_JAX = {"versions": {"jax": "0.0.1"}}


@pytest.mark.parametrize(
    ("changed", "told"),
    [(ABACUS, "device_kind 'abacus', now "), (OLD_JAX, "'jax': '0.0.1'")],
)
def test_another_environment_warns_and_goes_on(tmp_path, monkeypatch, changed, told):  # 68
    with monkeypatch.context() as patch:
        in_environment(patch, **changed)
        study = study_of(tmp_path, POINTS)
    with pytest.warns(UserWarning, match=rf"{told}.*not bit-exact"):
        again = study_of(tmp_path, POINTS)
    np.testing.assert_array_equal(again.data["valid/loss"], study.data["valid/loss"])


def nesterov(point):
    return pbx.nesterov(point["learning_rate"])


def momentum(point):
    return pbx.momentum(point["learning_rate"])


def test_another_environment_hides_no_other_optimizer(tmp_path, monkeypatch):  # 67, 68
    with monkeypatch.context() as patch:
        in_environment(patch, **OLD_JAX)
        study = study_of(tmp_path, POINTS, make_optimizer=nesterov)
    with pytest.raises(ValueError, match=r"program differs.*accept_changed_program=True"):
        study_of(tmp_path, POINTS, make_optimizer=momentum)
    with pytest.raises(ValueError, match="eval_every is 3 there and 2 here"):
        study_of(tmp_path, POINTS, make_optimizer=nesterov, eval_every=2)
    with pytest.warns(UserWarning, match="another program"):
        again = study_of(tmp_path, POINTS, make_optimizer=momentum, accept_changed_program=True)
    np.testing.assert_array_equal(again.data["valid/loss"], study.data["valid/loss"])


def test_the_same_functions_traced_by_another_version_go_on(tmp_path, monkeypatch):  # 68
    with monkeypatch.context() as patch:
        in_environment(patch, **OLD_JAX)
        patch.setattr(plan, "fingerprint_program", lambda *args: "as JAX 0.0.1 prints it")
        study_of(tmp_path, POINTS)
    with pytest.warns(UserWarning, match="not bit-exact"):
        study_of(tmp_path, POINTS)


# Whose a file is ----------------------------------------------------------------------------------


def copy_block(source, target, index=0):
    name = f"blocks/block-{index:08d}.pbx"
    shutil.copy(source / name, target / name)


def test_a_block_of_another_study_is_trained_again(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    study = study_of(mine, tiny.SPACE, num_trials=2)
    study_of(other, tiny.SPACE, num_trials=2, key=jax.random.key(1))
    copy_block(other, mine)
    with pytest.raises(storage.ForeignBlock, match="another study"):
        pbx.load_study(mine)
    with pytest.warns(UserWarning, match=r"block-00000000.*another study.*trained again"):
        again = study_of(mine, tiny.SPACE, num_trials=2)
    assert again.data.identical(study.data)
    assert pbx.load_study(mine).data.identical(study.data)


def test_a_block_of_other_points_is_trained_again(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    study = study_of(mine, POINTS)
    study_of(other, {"learning_rate": np.float32([0.1, 0.2])})
    copy_block(other, mine)
    with pytest.warns(UserWarning, match=r"block 0 .* other trials or points"):
        again = study_of(mine, POINTS)
    assert again.data.identical(study.data)


def test_another_studys_spec_is_refused(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    study_of(mine, tiny.SPACE, num_trials=2)
    study_of(other, tiny.SPACE, num_trials=2, key=jax.random.key(1))
    shutil.copy(other / "study.json", mine / "study.json")
    with pytest.raises(ValueError, match="holds another study: key is"):
        study_of(mine, tiny.SPACE, num_trials=2)
    with pytest.raises(storage.ForeignBlock):
        pbx.load_study(mine)


# A study that grows -------------------------------------------------------------------------------


def test_the_shorter_of_two_extensions_takes_nothing_away(tmp_path):
    study = study_of(tmp_path, tiny.SPACE, num_trials=2)
    before = storage.read_spec(tmp_path)
    longer = study.extend(4)
    # Another process has read the directory before, and says 4 now.
    storage.extend_spec(tmp_path, {**before, "num_trials": 4})
    assert storage.read_spec(tmp_path)["num_trials"] == 6
    assert pbx.load_study(tmp_path).data.identical(longer.data)
    assert study_of(tmp_path, tiny.SPACE, num_trials=4).num_trials == 4
    assert pbx.load_study(tmp_path).num_trials == 6


def test_a_table_grows_in_the_middle_of_a_block(tmp_path):
    rates = np.float32([0.5, 0.25, 0.125, 0.3, 0.2])
    study_of(tmp_path, {"learning_rate": rates[:3]})
    grown = study_of(tmp_path, {"learning_rate": rates})
    whole = study_of(tmp_path / "whole", {"learning_rate": rates})
    assert grown.data.identical(whole.data)
    stored, expected = pbx.load_study(tmp_path), pbx.load_study(tmp_path / "whole")
    assert stored.data.identical(expected.data)
    with pytest.raises(ValueError, match="the points differ"):
        study_of(tmp_path, {"learning_rate": rates[::-1]})


def test_two_extensions_by_different_points_do_not_mix(tmp_path):
    rates = [0.5, 0.25, 0.125, 0.3]
    study_of(tmp_path, {"learning_rate": np.float32(rates[:2])})
    spec = storage.read_spec(tmp_path)
    mine = {**spec, "num_trials": 4, "points": {"learning_rate": rates}}
    theirs = {**spec, "num_trials": 3, "points": {"learning_rate": [0.5, 0.25, 0.75]}}
    storage.extend_spec(tmp_path, mine)
    with pytest.raises(storage.StorageError, match="by another process, with other points"):
        storage.extend_spec(tmp_path, theirs)
    assert storage.read_spec(tmp_path)["points"] == mine["points"]


def test_a_damaged_or_foreign_extension_is_refused_by_name(tmp_path):
    study_of(tmp_path, tiny.SPACE, num_trials=2).extend(2)
    (extension,) = tmp_path.glob("trials-*.json")
    whole = extension.read_bytes()
    extension.write_bytes(whole.replace(b"4", b"5", 1))
    with pytest.raises(storage.CorruptSpec, match=r"trials-00000004.*Remove it"):
        pbx.load_study(tmp_path)
    extension.write_bytes(whole)
    other = tmp_path / "other"
    study_of(other, tiny.SPACE, num_trials=2, key=jax.random.key(1)).extend(2)
    shutil.copy(other / extension.name, extension)
    with pytest.raises(storage.CorruptSpec, match=r"trials-00000004.*extends another study"):
        pbx.load_study(tmp_path)
    extension.unlink()
    assert study_of(tmp_path, tiny.SPACE, num_trials=4).num_trials == 4


def test_a_deleted_file_is_noticed(tmp_path):  # 62
    study = study_of(tmp_path, tiny.SPACE, num_trials=6)
    (tmp_path / "blocks" / "block-00000001.pbx").unlink()
    assert pbx.load_study(tmp_path).num_trials == 2
    again = study_of(tmp_path, tiny.SPACE, num_trials=6)
    np.testing.assert_array_equal(again.data["valid/loss"], study.data["valid/loss"])
    assert storage.finished_blocks(tmp_path) == [0, 1, 2]
    (tmp_path / "study.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in (
        lambda: pbx.load_study(tmp_path),
        lambda: study_of(tmp_path, tiny.SPACE, num_trials=6),
        lambda: study.save(tmp_path),
    ):
        with pytest.raises(
            storage.CorruptSpec, match=r"holds blocks, but its study.json is missin"
        ):
            call()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_function_that_raises_leaves_the_study_as_it_was(tmp_path):  # 22
    def raises(params, state, batch, key):
        raise ZeroDivisionError("mine")

    study = study_of(tmp_path, tiny.SPACE, num_trials=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = dataclasses.replace(tiny.quadratic(), loss=raises)
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        study_of(tmp_path, tiny.SPACE, broken, num_trials=6)
    assert raised.traceback[-1].name == "raises"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    np.testing.assert_array_equal(
        pbx.load_study(tmp_path).data["valid/loss"], study.data["valid/loss"]
    )


def test_a_reader_sees_a_consistent_prefix_at_every_moment(tmp_path, monkeypatch):  # 74
    seen = []

    def read_after(function):
        def wrapped(*args, **named):
            out = function(*args, **named)
            seen.append(pbx.load_study(tmp_path))
            return out

        return wrapped

    # Whatever is put in place, or found there: specs and blocks.
    monkeypatch.setattr(storage, "_place", read_after(storage._place))
    study_of(tmp_path, tiny.SPACE, num_trials=5)
    whole = study_of(tmp_path, tiny.SPACE, num_trials=7)
    assert [study.num_trials for study in seen] == [0, 2, 4, 5, 5, 6, 7]
    for study in seen[1:]:
        n = study.num_trials
        np.testing.assert_array_equal(study.data["valid/loss"], whole.data["valid/loss"].values[:n])


# What makes a study another one, each with another value.
IDENTITY = {
    "name": "other",
    "objective": "step/loss",
    "maximize": True,
    "num_steps": 7,
    "eval_every": 2,
    "num_seeds": 2,
    "independent": True,
    "keep": "best",
    "key": {"impl": "rbg", "data": [0, 1]},
    "space": None,
    "fixed": {"momentum": 0.5},
    "data": "0" * 64,
    "version": "two",
    "x64": True,
    "dtypes": {"learning_rate": "float16"},
    "program": "0" * 64,
    "trials_per_block": 3,
    "arrays": None,  # One more than there are.
    "member": {"scientific": "optimizer", "label": "adam", "index": 1},
}
# How far it has come, what follows from the others, and what may only change its bits.
OTHER = {"schema_version", "num_trials", "points", "step", "norm_edges", "trees"}
OTHER |= {"versions", "device_kind", "code"}


@pytest.fixture(scope="module")
def runner():
    trainer = pbx.Trainer(
        tiny.quadratic(),
        lambda point: pbx.momentum(point["learning_rate"], point["momentum"]),
        fixed={"momentum": 0.9},
        trials_per_block=2,
        progress=False,
    )
    arguments = {"num_steps": 6, "eval_every": 3, "key": jax.random.key(0)}
    return StudyRunner(trainer, tiny.SPACE, **arguments)


def test_every_entry_of_a_spec_is_of_the_study_or_known_not_to_be(tmp_path, runner):  # 67
    runner.prepare(tiny.SPACE, num_trials=2, directory=tmp_path)
    # A study of no set is no member of one.
    assert (set(IDENTITY) | OTHER) - {"member"} == set(storage.read_spec(tmp_path))


@pytest.mark.parametrize("part", IDENTITY)
def test_a_study_of_which_any_part_differs_is_refused_by_name(tmp_path, runner, part):  # 67
    runner.prepare(tiny.SPACE, num_trials=2, directory=tmp_path)
    stored = storage.read_spec(tmp_path)
    another = IDENTITY[part]
    if part == "arrays":
        another = stored[part] | {"metrics/more": stored[part]["metrics/valid/loss"]}
    stored[part] = another
    storage.write_spec(tmp_path, stored, replace=True)
    told = "the program differs" if part == "program" else f"{part} is "
    with pytest.raises(ValueError, match=f"holds another study.*{told}"):
        runner.run(tiny.SPACE, num_trials=2, directory=tmp_path)
    # Nothing was written or removed.
    assert storage.read_spec(tmp_path) == stored
    assert storage.finished_blocks(tmp_path) == []


def test_another_table_of_points_is_refused_and_a_longer_one_goes_on(tmp_path):  # 67
    study_of(tmp_path, {"learning_rate": np.float32([0.5, 0.25])})
    for others in ([0.5, 0.3], [0.3], [0.3, 0.25, 0.1]):
        with pytest.raises(ValueError, match="the points differ"):
            study_of(tmp_path, {"learning_rate": np.float32(others)})
    longer = study_of(tmp_path, {"learning_rate": np.float32([0.5, 0.25, 0.1])})
    assert longer.num_trials == 3
    # Whoever asks for less later, inside a block too, takes nothing back.
    assert study_of(tmp_path, {"learning_rate": np.float32([0.5])}).num_trials == 1
    assert storage.read_spec(tmp_path)["num_trials"] == 3
    np.testing.assert_array_equal(
        pbx.load_study(tmp_path).data["valid/loss"], longer.data["valid/loss"]
    )


def test_a_block_of_a_longer_table_that_came_meanwhile_stays(tmp_path, monkeypatch):  # 72
    longer = study_of(tmp_path, {"learning_rate": np.float32([0.5, 0.25])})
    # It was not there yet when this call looked.
    monkeypatch.setattr(finished.Store, "stored", lambda self: set())
    study_of(tmp_path, {"learning_rate": np.float32([0.5])})
    found = pbx.load_study(tmp_path)
    np.testing.assert_array_equal(found.data["valid/loss"], longer.data["valid/loss"])


def test_a_study_that_another_process_began_meanwhile_is_refused(tmp_path, runner, monkeypatch):
    # 72: it was not there at the first look.
    other = dataclasses.replace(runner._trainer, fixed={"momentum": 0.8})
    arguments = {"num_steps": 6, "eval_every": 3, "key": jax.random.key(0)}
    StudyRunner(other, tiny.SPACE, **arguments).prepare(
        tiny.SPACE, num_trials=2, directory=tmp_path
    )
    stored = storage.read_spec(tmp_path)
    real, looks = storage.read_spec, []

    def read_spec(directory):
        looks.append(directory)
        if len(looks) == 1:
            raise storage.NoStudy("not yet")
        return real(directory)

    monkeypatch.setattr(storage, "read_spec", read_spec)
    with pytest.raises(ValueError, match="fixed is "):
        runner.run(tiny.SPACE, num_trials=2, directory=tmp_path)
    assert real(tmp_path) == stored


def test_what_is_stored_is_not_trained_again(tmp_path, runner, monkeypatch):
    whole = runner.run(tiny.SPACE, num_trials=4, directory=tmp_path)
    monkeypatch.setattr(execute.Engine, "_train", lambda *_: pytest.fail("something was trained"))
    again = runner.run(tiny.SPACE, num_trials=4, directory=tmp_path)
    np.testing.assert_array_equal(again.data["valid/loss"], whole.data["valid/loss"])


def test_points_of_other_names_or_dtypes_than_the_program_has_are_refused(runner):
    for points in ({"learning_rate": np.int32([1])}, {"rate": np.float32([0.1])}):
        with pytest.raises(ValueError, match="but the program was made for"):
            runner.run(points)


def test_left_overs_of_dead_processes_are_removed_by_whoever_comes_next(tmp_path, runner):
    # 58, 71
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    name = f".tmp-{process.pid}-{'0' * 16}"
    save = tmp_path / "checkpoints" / "blocks-1" / name
    save.mkdir(parents=True)
    (tmp_path / "blocks").mkdir()
    files = [tmp_path / name, tmp_path / "blocks" / name, save / "file"]
    for path in files:
        path.write_bytes(b"torn")
    runner.prepare(tiny.SPACE, num_trials=2, directory=tmp_path)
    assert [path for path in (*files, save) if path.exists()] == []
