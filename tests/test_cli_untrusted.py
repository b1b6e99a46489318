"""The command line on directories from anybody: what is stored is looked at, nothing is trained.

What it makes of stored text, and of studies that are no studies, the fuzzer looks at.
"""

import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest

from playbook_optax import cli
from playbook_optax.records.study import Study
from playbook_optax.search_space import Float, SearchSpace

RATES = np.geomspace(0.01, 1.0, 12)
SPACE = SearchSpace({"learning_rate": Float(0.001, 10.0, scale="log")})
COMMAND = {"command": "search", "workload": "digits_mlp", "optimizer": "sgd"}


@pytest.fixture
def study(tmp_path):
    """A stored study with a best trial in the middle, as a command leaves it."""
    place = tmp_path / "study"
    ends = (np.log(RATES) + 2) ** 2
    curves = np.stack([np.full(12, 9.0), ends + 1.0, ends], axis=1)
    made = Study.from_arrays(
        {"learning_rate": RATES},
        {"valid/loss": curves},
        [0, 5, 10],
        objective="valid/loss",
        space=SPACE,
    )
    made.save(place)
    write_command(place)
    return place


def write_command(place, **changes):
    command = {**COMMAND, "space": SPACE.to_dict(), **changes}
    (place / "command.json").write_text(json.dumps(command))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What `search --prepare` leaves: all but the trials."""
    place = tmp_path_factory.mktemp("prepared") / "study"
    arguments = ["--num-trials", "2", "--num-steps", "2", "--directory", str(place), "--prepare"]
    assert cli.run(["search", "digits_mlp", "--optimizer", "sgd", *arguments]) == 0
    return place


def test_a_recipe_is_told_of_an_optimizer_of_ours_only(study, capsys):
    assert cli.run(["diagnose", str(study)]) == 0
    assert "optimizer = pbx.sgd(learning_rate=" in capsys.readouterr().out
    for optimizer in ("__import__", "scale_by_adam", ["sgd"], None):
        write_command(study, optimizer=optimizer)
        assert cli.run(["diagnose", str(study)]) == 0
        told = capsys.readouterr().out
        assert "Findings" in told
        assert "Recipe" not in told


def test_a_large_command_file_is_not_read(study, capsys):
    text = (study / "command.json").read_text()
    (study / "command.json").write_text(text + " " * 2**20)
    assert cli.run(["diagnose", str(study)]) == 0
    assert "Recipe" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_a_pipe_in_the_place_of_the_command_file_is_not_waited_for(study, capsys, command):
    (study / "command.json").unlink()
    os.mkfifo(study / "command.json")
    # Whoever opens the pipe after all gets an end of file, and the test an answer.
    release = threading.Timer(20.0, lambda: os.close(os.open(study / "command.json", os.O_RDWR)))
    release.start()
    try:
        assert cli.run([command, str(study)]) == 0
        assert release.is_alive()
    finally:
        release.cancel()
    assert "Recipe" not in capsys.readouterr().out


def test_text_that_commands_a_terminal_is_not_told(tmp_path, capsys):
    name = "valid/\x1b[2J\x07loss"
    made = Study.from_arrays(
        {"learning_rate": RATES}, {name: np.stack([RATES, RATES], axis=1)}, [0, 1], objective=name
    )
    made.save(tmp_path / "study")
    assert cli.run(["diagnose", str(tmp_path / "study")]) == 0
    told = capsys.readouterr().out
    assert "loss" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)
    missing = tmp_path / "a\x1b[31mb"
    assert cli.run(["diagnose", str(missing)]) == 2
    told = capsys.readouterr().err
    assert "holds no study" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


@pytest.fixture
def theirs(tmp_path, monkeypatch, prepared):
    """A module that must not be imported because a directory says so."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "theirs.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    shutil.copytree(prepared, tmp_path / "study")
    return tmp_path / "study"


def test_no_module_is_imported_because_a_directory_names_it(theirs, capsys):
    write_command(theirs, workload="theirs:workload")
    assert cli.run(["run", str(theirs)]) == 2
    assert "--workload theirs:workload" in capsys.readouterr().err
    assert "theirs" not in sys.modules
    assert cli.run(["run", str(theirs), "--workload", "os:path"]) == 2
    assert "not of 'os:path'" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["__import__", "scale_by_adam", 3, None])
def test_an_optimizer_that_is_none_of_ours_is_not_called(theirs, capsys, optimizer):
    write_command(theirs, optimizer=optimizer)
    assert cli.run(["run", str(theirs)]) == 2
    assert "names no workload and optimizer of ours" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a-b:c", "os.path/..:join", ":x", "..os:path"])
def test_what_is_no_name_of_a_module_is_not_imported(name):
    with pytest.raises(cli.UsageError, match="is no module name"):
        cli.load_workload(name)


def test_the_exit_status_of_an_interrupted_command_is_that_of_ctrl_c(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("use_cpu_cores", "use_compilation_cache"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["zoo"]) == 130  # 75
    assert "the same command continues" in capsys.readouterr().err
