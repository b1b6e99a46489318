"""The command line, in this process where JAX's devices do not matter, and once as a program."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from playbook_optax import cli, zoo
from playbook_optax.records.study import load_study
from playbook_optax.search_space import Float, SearchSpace

MODULE = """
    import jax, jax.numpy as jnp
    import playbook_optax as pbx

    def _square(scale):
        return pbx.Workload(
            name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
            loss=lambda p, s, b, k: (scale * (p["w"] ** 2).sum(), (s, {})),
            batch=lambda d, k, i: (),
            evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")

    square = _square(1.0)

    def build():
        return square

    def of_point(point):
        return square

    def two(a, b):
        return square

    number = 3

    def _fail(p, s, b, k):
        raise ValueError("my own mistake")

    broken = pbx.Workload(
        name="broken", init=square.init, loss=_fail, batch=square.batch,
        evaluate=square.evaluate, objective="valid/loss")
    unscaled = pbx.Workload(
        name="unscaled", init=square.init, loss=lambda p, s, b, k: (p["w"], (s, {})),
        batch=square.batch, evaluate=square.evaluate, objective="valid/loss")
"""
SPACE = SearchSpace({"learning_rate": Float(0.1, 1.0)}).to_dict()
TINY = ["--num-trials", "12", "--num-steps", "20", "--eval-every", "5"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_workloads.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_workloads", raising=False)
    return tmp_path


def complaint(capsys, *arguments):
    """The one line that a user error prints."""
    assert cli.run(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("playbook-optax: error: ")
    return line


def test_zoo_lists_every_workload(capsys):
    assert cli.run(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(zoo.names())


def test_tune_writes_study_report_and_plots_then_continues_and_reports_again(folder, capsys):
    command = ["search", "own_workloads:square", "--optimizer", "momentum", *TINY]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    place = folder / "runs" / "own_workloads.square" / "search"
    names = {p.name for p in place.iterdir()}
    assert {"study.json", "report.html", "axis_0.png", "axis_1.png", "curves.png"} <= names
    study = load_study(place)
    best = study.best()
    assert set(best.point) == {"learning_rate", "momentum"}
    assert f"The best of 12 trials is trial {best.trial}" in said
    call = next(line for line in said.splitlines() if "pbx.momentum(" in line)
    arguments = dict(part.split("=") for part in call.split("(")[1].rstrip(")").split(", "))
    for name, value in best.point.items():
        assert np.float32(arguments[name]) == value  # The printed recipe is the trial, bit for bit.
    table = said[said.index("\ntrial ") + 1 :].splitlines()
    assert table[1].split()[0] == str(best.trial)

    blocks = {p: p.read_bytes() for p in (place / "blocks").iterdir()}
    assert cli.run([*command, "--num-trials", "14"]) == 0
    assert load_study(place).num_trials == 14
    assert all(p.read_bytes() == content for p, content in blocks.items())

    (place / "report.html").unlink()
    assert cli.run(["report", str(place)]) == 0
    assert "pbx.momentum(" in (place / "report.html").read_text()
    capsys.readouterr()
    assert cli.run(["diagnose", str(place)]) == 0
    assert "Findings" in capsys.readouterr().out


def test_sweep_is_a_grid_between_low_and_high_and_its_report_knows_the_range(folder, capsys):
    command = ["sweep", "own_workloads:build", "--optimizer", "sgd", *TINY]
    assert cli.run([*command, "--low", "0.001", "--high", "0.1", "--directory", "out"]) == 0
    told = capsys.readouterr().out
    study = load_study("out")
    np.testing.assert_allclose(study.points["learning_rate"], np.geomspace(1e-3, 0.1, 12), 1e-5)
    assert "high edge of [0.001, 0.1]" in " ".join(told.split())
    # The best rate is the largest of the sweep, so that it refuses to answer.
    assert "does not conclude" in " ".join(told.split())
    assert "Recipe" not in told
    assert cli.run(["diagnose", "out"]) == 0
    again = capsys.readouterr().out
    assert again.strip() == told[: told.index("\nReport ")].strip()


def test_stabilize_writes_its_page_and_tells_what_it_says(folder, capsys):
    command = ["stabilize", "own_workloads:square", "--optimizer", "sgd", "--directory", "out"]
    assert cli.run([*command, "--num-steps", "60", "--num-trials", "8", "--eval-every", "5"]) == 0
    told = capsys.readouterr().out
    assert "Findings" in told
    page = folder / told.rsplit("Report", 1)[1].strip()
    assert page.is_relative_to(folder / "out")
    assert "<svg" in page.read_text() or "<img" in page.read_text()
    # The sweep that it rests on is stored, and can be looked at again.
    stored = [p.parent for p in (folder / "out").rglob("study.json")]
    assert stored
    for place in stored:
        assert load_study(place).num_trials > 0


@pytest.mark.parametrize("attribute", ["square", "build", "of_point"])
def test_workloads_functions_and_functions_of_the_point_load(folder, attribute):
    loaded = cli.load_workload(f"own_workloads:{attribute}")
    assert callable(loaded.workload) == (attribute == "of_point")
    assert loaded.optimizer == "adam"


def test_tune_writes_a_recipe_that_runs_and_continues(folder, capsys):
    command = ["tune", "own_workloads:square", "--optimizer", "sgd", "--num-trials", "6"]
    command += ["--num-steps", "16", "--low", "0.01", "--high", "1", "--max-norm", "10"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    place = folder / "runs" / "own_workloads.square" / "tune"
    assert "Tuned: valid/loss" in out
    for chapter in ("learning_rate", "num_steps", "stability", "round_1", "retrain"):
        assert f"- {chapter}: " in out
    assert "clipped at a norm of 10" in out
    assert f"Report   {place.relative_to(folder) / 'report.html'}" in out
    # The program knows where the workload is, and prints what the report says.
    program = (place / "recipe.py").read_text()
    assert "from own_workloads import square" in program
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(place / "recipe.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("best valid/loss")
    before = (place / "report.html").read_bytes()
    assert cli.run(command) == 0
    assert capsys.readouterr().out == out
    assert (place / "report.html").read_bytes() == before
    assert "both --low and --high" in complaint(capsys, *command[:-4], "--low", "0.1")
    assert "did you mean 'square'" in complaint(capsys, "tune", "own_workloads:squrae")
    assert "no test data" in complaint(capsys, *command, "--test")


def test_a_reader_that_stops_early_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "playbook_optax.cli", "zoo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.wait() == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_user_errors_are_one_line(folder, capsys):
    assert "did you mean 'digits_mlp'" in complaint(capsys, "search", "digit_mlp")
    assert "did you mean 'own_workloads'" in complaint(capsys, "search", "own_workload:square")
    assert "did you mean 'square'" in complaint(capsys, "search", "own_workloads:squrae")
    assert "is int" in complaint(capsys, "search", "own_workloads:number")
    assert "is function" in complaint(capsys, "search", "own_workloads:two")
    assert "no module name" in complaint(capsys, "search", "own-workloads:square")
    own = "own_workloads:square"
    assert "num_trials must be >= 1" in complaint(capsys, "search", own, "--num-trials", "0")
    assert "num_steps must be >= 1" in complaint(capsys, "search", own, "--num-steps", "0")
    assert "seed must be >= 0" in complaint(capsys, "sweep", own, "--seed", "-1")
    assert "low" in complaint(capsys, "search", own, "--low", "1", "--high", "0.1")
    for end in ("--low", "--high"):
        assert "both --low and --high" in complaint(capsys, "tune", own, end, "0.1")
    assert "no momentum" in complaint(
        capsys, "search", own, "--optimizer", "sgd", "--b1-high", "0.9"
    )
    assert "scalar" in complaint(capsys, "search", "own_workloads:unscaled")
    assert "nowhere" in complaint(capsys, "report", "nowhere")
    assert not (folder / "runs").exists()
    assert not (folder / "nowhere").exists()


def test_another_study_in_the_directory_is_a_user_error(folder, capsys):
    command = ["search", "own_workloads:square", *TINY, "--directory", "out"]
    assert cli.run(command) == 0
    capsys.readouterr()
    assert "holds another study: key is" in complaint(capsys, *command, "--seed", "1")


def test_an_error_in_the_users_workload_is_raised_as_it_is(folder):
    with pytest.raises(ValueError, match="my own mistake"):
        cli.run(["search", "own_workloads:broken", *TINY])
    # Said by this package, but about a line of the user's, which only the traceback shows.
    (folder / "misuses.py").write_text("import playbook_optax as pbx\npbx.sgd(-1.0)\n")
    with pytest.raises(ValueError, match="learning_rate must be"):
        cli.run(["search", "misuses:workload"])
    (folder / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        cli.run(["search", "needs_more:workload"])


def test_bad_words_exit_with_two(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(["search", "digits_mlp", "--num-trials", "many"])
    assert caught.value.code == 2


@pytest.mark.parametrize(("module", "extra"), [("tyro", "cli"), ("jinja2", "report")])
def test_a_missing_extra_is_named(folder, capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"playbook-optax[{extra}]" in complaint(capsys, "search", "own_workloads:square")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 60000,
        json.dumps({"command": "search", "optimizer": "__import__", "space": SPACE}),
        json.dumps({"command": "search", "optimizer": ["sgd"], "space": SPACE}),
        "not json",
    ],
)
def test_a_strange_command_file_costs_the_recipe_only(folder, capsys, content):
    assert cli.run(["sweep", "own_workloads:square", *TINY, "--directory", "out"]) == 0
    (folder / "out" / "command.json").write_text(content)
    capsys.readouterr()
    assert cli.run(["report", "out"]) == 0
    assert "Recipe" not in capsys.readouterr().out


def test_control_characters_do_not_reach_the_terminal(capsys):
    cli._print_table(["a\x1b[31m"], [["b\x07"]])
    assert "\x1b" not in (said := capsys.readouterr().out)
    assert "\x07" not in said


def test_the_program_tunes_a_users_own_module(tmp_path):
    (tmp_path / "mymodule.py").write_text(textwrap.dedent(MODULE))
    code = "import sys; from playbook_optax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "search", "mymodule:square", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pbx.adam(learning_rate=" in done.stdout
    page = tmp_path / "runs" / "mymodule.square" / "search" / "report.html"
    assert page.is_file()
    failed = subprocess.run(
        [sys.executable, "-c", code, "search", "mymodule:broken"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert "my own mistake" in failed.stderr
    assert "mymodule.py" in failed.stderr


def test_a_prepared_study_is_trained_by_workers(folder, capsys):
    directory = folder / "study"
    command = ["search", "own_workloads:square", "--directory", str(directory), *TINY]
    assert cli.run([*command, "--prepare"]) == 0
    assert "--workload own_workloads:square --worker I --of N" in capsys.readouterr().out
    assert load_study(directory).num_trials == 0
    # A directory's own word is not enough to import somebody's code.
    assert cli.run(["run", str(directory)]) == 2
    assert "--workload own_workloads:square" in capsys.readouterr().err
    own = ["--workload", "own_workloads:square"]
    assert cli.run(["run", str(directory), "--workload", "own_workloads:build"]) == 2
    capsys.readouterr()
    for worker in ("1", "0"):
        assert cli.run(["run", str(directory), *own, "--worker", worker, "--of", "2"]) == 0
        assert "12 trials are stored" in capsys.readouterr().out
    there = load_study(directory).data["valid/loss"].values
    assert cli.run(["report", str(directory)]) == 0
    assert cli.run([*command[:2], "--directory", str(folder / "alone"), *TINY]) == 0
    np.testing.assert_array_equal(there, load_study(folder / "alone").data["valid/loss"].values)


def test_an_interrupted_study_is_trained_on(folder, capsys, monkeypatch):
    def interrupted(*args, **named):
        raise KeyboardInterrupt

    directory = folder / "study"
    with monkeypatch.context() as patch:
        patch.setattr(cli.StudyRunner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.run(["search", "own_workloads:square", "--directory", str(directory), *TINY])
    assert cli.run(["run", str(directory), "--workload", "own_workloads:square"]) == 0
    assert "12 trials are stored" in capsys.readouterr().out


def test_run_needs_what_tune_kept(folder, capsys):
    directory = folder / "study"
    command = ["search", "own_workloads:square", "--directory", str(directory), *TINY, "--prepare"]
    assert cli.run(command) == 0
    (directory / "command.json").write_text('{"workload": "digits_mlp", "optimizer": "__import__"}')
    assert cli.run(["run", str(directory)]) == 2
    assert "names no workload and optimizer of ours" in capsys.readouterr().err
    (directory / "command.json").unlink()
    assert cli.run(["run", str(directory)]) == 2
    assert "missing or damaged" in capsys.readouterr().err
    assert cli.run(["run", str(folder / "nothing")]) == 2
    assert cli.run(["run", str(directory), "--worker", "2", "--of", "2"]) == 2
