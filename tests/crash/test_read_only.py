"""Directories that really cannot be written: an error before anything is compiled or trained."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage
from playbook_optax.runner import programs
from tests.crash.test_full_disk import Disk

NOBODY = 65534
SCRIPT = """
import os
from playbook_optax.records import storage
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({nobody})
    os.setuid({nobody})
try:
    storage.{call}
except storage.NotWritable as error:
    print(error)
"""


def study_of(directory):
    return pbx.run_study(
        tiny.quadratic(),
        tiny.sgd,
        tiny.SPACE,
        num_trials=2,
        num_steps=2,
        eval_every=1,
        key=jax.random.key(0),
        progress=False,
        directory=directory,
    )


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = Disk(place, "1m")
    yield mounted
    mounted.remove()


def test_a_read_only_file_system_is_an_error_before_anything_is_compiled(disk, monkeypatch):  # 63
    directory = disk.place / "study"
    directory.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk.place)], check=True)
    monkeypatch.setattr(programs, "_compile", lambda *_: pytest.fail("something was compiled"))
    with pytest.raises(storage.NotWritable, match=r"Read-only file system.*choose a directory"):
        study_of(directory)
    with pytest.raises(storage.NotWritable, match="Read-only file system"):
        study_of(disk.place / "new")
    assert os.listdir(disk.place) == ["study"]


def test_a_study_on_a_read_only_file_system_is_read(disk):  # 63
    study = pbx.Study.from_arrays(
        {"learning_rate": [0.1]}, {"loss": [[2.0, 1.0]]}, [0, 1], objective="loss"
    )
    study.save(disk.place / "study")
    subprocess.run(["mount", "-o", "remount,ro", str(disk.place)], check=True)
    assert pbx.load_study(disk.place / "study").best().value == 1.0


@pytest.fixture
def open_folder():
    """A folder to which the way is open to all, as it is not to a `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


@pytest.mark.parametrize("call", ["check_writable({0!r})", "write_spec({0!r}, {{'name': 'toy'}})"])
def test_a_directory_of_somebody_else_is_an_error(open_folder, call):  # 63
    place = open_folder / "study"
    (place / "blocks").mkdir(parents=True)
    for folder in (place / "blocks", place):
        os.chmod(folder, 0o555)
    script = SCRIPT.format(nobody=NOBODY, call=call.format(str(place)))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    os.chmod(place, 0o755)
    if "in <module>" in done.stderr and "os.set" in done.stderr:
        pytest.skip(f"root may not become nobody here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "Permission denied; choose a directory that can be written" in done.stdout
    assert [path.name for path in place.rglob("*")] == ["blocks"]
