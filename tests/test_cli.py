"""The command line, in this process where JAX's devices do not matter, and once as a program."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import tracemalloc
import warnings

import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax import cli, zoo
from playbook_optax.records import storage
from playbook_optax.records.study import Study, load_study, study_from_blocks
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
    """The one line that a user error prints, after what was done until then."""
    assert cli.run(arguments) == 2
    *done, line = capsys.readouterr().err.strip().splitlines()
    assert all(" took " in one for one in done)
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
    # Told again from the directory alone: the same words, and what else was seen.
    sys.modules.pop("own_workloads")
    told = out[: out.index("\n\nRecipe ")]
    assert cli.run(["diagnose", str(place)]) == 0
    again = capsys.readouterr().out
    assert again.startswith(told)
    assert again.count("\n- learning_rate = ") == 1
    assert "\n- num_steps = 16\n" in again
    assert "\nFindings\n- " in again
    assert cli.run(["report", str(place), "--directory", str(folder / "page")]) == 0
    assert capsys.readouterr().out == f"{again}\nReport   {folder / 'page' / 'report.html'}\n"
    page = (folder / "page" / "report.html").read_text()
    assert "pbx.sgd(learning_rate=" in page
    assert (place / "recipe.py").read_text() == program
    assert "own_workloads" not in sys.modules


def test_a_tuning_that_is_not_finished_says_how_to_go_on(tmp_path, capsys):
    place = tmp_path / "tune"
    storage.write_document(place / "tune.json", {"num_trials": 6})
    for command in ("diagnose", "report"):
        said = complaint(capsys, command, str(place))
        assert "holds a tuning that is not finished: the same call of tune continues it" in said
        assert "none yet" in said
    (place / "round_1").mkdir()
    (place / "round_1" / "study.json").write_text("{}")
    assert "one by one: round_1." in complaint(capsys, "diagnose", str(place))
    # A damaged document is told as what it is.
    (place / "recipe.json").write_text("{}")
    assert "is not a valid recipe.json" in complaint(capsys, "diagnose", str(place))


def test_a_misspelled_command_gets_a_suggestion(capsys):  # 5
    said = complaint(capsys, "tnue", "digits_mlp")
    assert "there is no command 'tnue': did you mean 'tune'? Known names: sweep, tune" in said
    with pytest.raises(SystemExit):
        cli.run(["tune", "digits_mlp", "--nmu-trials", "3"])
    assert "--num-trials" in capsys.readouterr().err


def test_the_version_by_both_names_of_the_program(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"playbook-optax {pbx.__version__}\n"
    ran = subprocess.run(
        [sys.executable, "-m", "playbook_optax", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout, ran.stderr) == (f"playbook-optax {pbx.__version__}\n", "")


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


# A directory from somebody else ------------------------------------------------------------------

ESCAPES = "\x1b]0;title\x07\x1b[2J\r\u202e\u2028\ud800"


@pytest.fixture
def soon():
    """A call that waits for ever fails instead."""

    def ring(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def foreign_study(place, labels=None, name="study", objective="valid/loss"):
    """A study that is stored under its right checksum, with what somebody put into it."""
    study = Study.from_arrays(
        {"learning_rate": np.array([0.1, 0.2, 0.3]), **{name: [0, 1, 2] for name in labels or ()}},
        {objective: np.array([[2.0, 1.0], [2.0, 0.5], [2.0, 0.7]])},
        np.array([0, 10]),
        objective=objective,
        name=name,
    )
    if labels:
        study = study_from_blocks({**study.spec, "labels": labels}, study._blocks)
    study.save(place)
    optimizer = "momentum" if "momentum" in (labels or ()) else "sgd"
    command = {"command": "search", "workload": "digits_mlp", "optimizer": optimizer}
    command["space"] = SPACE
    (place / "command.json").write_text(json.dumps(command))
    return place


@pytest.mark.parametrize("parameter", ["learning_rate", "momentum"])
def test_code_in_a_stored_label_stands_in_no_recipe(tmp_path, capsys, parameter):
    code = "__import__('pathlib').Path('escaped').touch()"
    labels = {parameter: [code, f"{code}#", "0.1)\nimport os #"]}
    place = foreign_study(tmp_path / "study", labels)
    for command in ("report", "diagnose"):
        assert cli.run([command, str(place)]) == 0
        assert "Recipe" not in capsys.readouterr().out
    assert "download=" not in (place / "report.html").read_text()
    # The same study with numbers has one.
    place = foreign_study(tmp_path / "other")
    assert cli.run(["report", str(place)]) == 0
    assert "optimizer = pbx.sgd(learning_rate=0.2)" in capsys.readouterr().out
    assert "download=" in (place / "report.html").read_text()


def test_nothing_of_a_foreign_directory_commands_the_terminal(tmp_path, capsys):
    place = foreign_study(tmp_path / "study", None, ESCAPES, f"valid/{ESCAPES}")
    (place / "\x1b[2Jnews.png").write_bytes(b"")
    for command in ("report", "diagnose"):
        assert cli.run([command, str(place)]) == 0
        said = capsys.readouterr().out
        assert "\\x1b[2J\\r\\u202e" in "".join(said.split())
        assert all(line.isprintable() for line in said.split("\n"))
        # The objective is a comment of the recipe, and no more than that.
        (comment,) = [line for line in said.split("\n") if line.startswith("  num_steps = ")]
        assert comment.startswith("  num_steps = 10  # valid/\\x1b]0;title")
    (place / "command.json").write_text(
        json.dumps({"workload": f"a:{ESCAPES}", "optimizer": "sgd"})
    )
    spec = storage.read_spec(place)
    forge(place, {**spec, "num_trials": 4, "labels": {"learning_rate": [ESCAPES]}})
    for arguments in (["run", str(place)], ["report", f"{place}/{ESCAPES[:-1]}"]):
        assert complaint(capsys, *arguments).isprintable()


def forge(place, spec):
    """Puts another spec into a study's place, under its right checksum."""
    (place / "study.json").unlink()
    storage.write_spec(place, spec)


def fill(kind, path):
    """Puts something else in the place of a file."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    elif kind == "large":
        with open(path, "wb") as file:
            file.truncate(10**11)
    else:
        path.write_text({"deep": "[" * 60000, "list": "[]", "empty": ""}[kind])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "kind", ["fifo", "device", "loop", "folder", "socket", "large", "deep", "list", "empty"]
)
def test_anything_in_the_place_of_a_file_is_refused_at_once(tmp_path, monkeypatch, capsys, kind):
    place = foreign_study(tmp_path / "study")
    monkeypatch.chdir(place)  # A socket's path is short.
    fill(kind, place / "command.json")
    said = complaint(capsys, "run", str(place))
    assert "command.json is missing or damaged" in said
    for command in ("report", "diagnose"):
        assert cli.run([command, str(place)]) == 0
        assert "Recipe" not in capsys.readouterr().out
    fill(kind, place / "study.json")
    for command in ("run", "report", "diagnose"):
        assert "study.json" in complaint(capsys, command, str(place))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder", "socket"])
def test_anything_in_the_place_of_a_block_is_refused_at_once(tmp_path, monkeypatch, capsys, kind):
    place = foreign_study(tmp_path / "study")
    monkeypatch.chdir(place / "blocks")
    fill(kind, place / "blocks" / "block-00000000.pbx")
    for command in ("report", "diagnose"):
        assert "block-00000000.pbx" in complaint(capsys, command, str(place))
    shutil.rmtree(place / "blocks")
    (place / "blocks").symlink_to("blocks")
    for command in ("report", "diagnose"):
        assert "blocks" in complaint(capsys, command, str(place))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A study of the zoo that is stored and not trained, without tracing it: (directory, spec)."""
    place = tmp_path_factory.mktemp("prepared") / "study"
    spec = {
        "name": "digits_mlp",
        "objective": "valid/error_rate",
        "maximize": False,
        "num_trials": 12,
        "num_seeds": 1,
        "num_steps": 20,
        "eval_every": 5,
        "step": [0, 5, 10, 15, 20],
        "trials_per_block": 8,
        "keep": "none",
        "independent": False,
        "space": SPACE,
        "points": None,
        "dtypes": {"learning_rate": "float32"},
        "key": {"impl": "threefry2x32", "data": [0, 0]},
    }
    storage.write_spec(place, spec)
    cli._write_command(
        place, "search", "digits_mlp", "momentum", SearchSpace({"learning_rate": Float(0.1, 1.0)})
    )
    return place, spec


def without(name):
    return lambda spec: spec.pop(name)


TABLE = {"space": None, "points": {"learning_rate": [0.1] * 12}}
FORGED = {
    "width": ({"trials_per_block": 10**9}, "trials_per_block = 1000000000 is far more"),
    "wider": ({"trials_per_block": 2048}, "trials_per_block = 2048 is far more than its 12 trials"),
    "width 0": ({"trials_per_block": 0}, "'trials_per_block' must be an integer from 1"),
    "width text": ({"trials_per_block": "8"}, "'trials_per_block' must be an integer from 1"),
    "width true": ({"trials_per_block": True}, "'trials_per_block' must be an integer from 1"),
    "trials": ({"num_trials": 10**9}, "it is too large"),
    "both": ({"num_trials": 10**9, "trials_per_block": 10**9}, "it is too large"),
    "trials of 64 bits": ({"num_trials": 2**40}, "'num_trials' must be an integer from 0"),
    "seeds": ({"num_seeds": 10**9}, "it is too large"),
    "steps": ({"num_steps": 2**31 - 1}, "it has 5 evaluations, where its steps make 429496731"),
    "evaluations": ({"num_steps": 2**31 - 1, "eval_every": 1}, "where its steps make 2147483648"),
    "no interval": ({"eval_every": 0}, "'eval_every' must be an integer from 1"),
    "many values": (
        {"num_trials": 10**5, "num_steps": 10**4, "eval_every": 1, "step": [*range(10**4 + 1)]},
        "it is too large",
    ),
    "step": ({"step": 5}, "'step' must be a list of rising integers"),
    "space": ({"space": [1]}, "'space' must be a search space"),
    "range": (
        {"space": {"learning_rate": {"kind": "float", "low": 1, "high": 0}}},
        "'space' is no",
    ),
    "key": ({"key": [0, 0]}, "'key' must be impl, a text or null"),
    "key of another kind": ({"key": {"impl": ESCAPES, "data": [0, 0]}}, "is not trained on"),
    "negative key": ({"key": {"impl": None, "data": [-1, 0]}}, "'key' must be impl"),
    "points": ({"space": None, "points": [1, 2]}, "'points' must be lists of"),
    "dtype": ({**TABLE, "dtypes": {"learning_rate": "U1000000000"}}, "'dtypes' must be dtypes by"),
    "no dtype": ({**TABLE, "dtypes": {}}, "'dtypes' lacks 'learning_rate', which"),
    "text": ({**TABLE, "points": {"learning_rate": ["x"]}}, "'points' must be lists of finite"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_size_is_refused_before_memory_is_taken(
    prepared, tmp_path, capsys, monkeypatch, case
):
    def trained(*args, **named):
        raise AssertionError("it trains")

    monkeypatch.setattr(cli, "run_study", trained)
    place, spec = prepared
    folder = tmp_path / "study"
    shutil.copytree(place, folder)
    with pytest.raises(AssertionError, match="it trains"):
        cli.run(["run", str(folder)])
    change, said = FORGED[case]
    forge(folder, {**spec, **change})
    tracemalloc.start()
    try:
        line = complaint(capsys, "run", str(folder))
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    assert said in line
    assert line.isprintable()


@pytest.mark.parametrize("name", ["num_trials", "num_steps", "step", "key", "space", "points"])
def test_a_study_that_lacks_something_is_refused(prepared, tmp_path, capsys, name):
    place, spec = prepared
    folder = tmp_path / "study"
    shutil.copytree(place, folder)
    spec = {**spec, "space": None} if name == "points" else spec
    forge(folder, {n: value for n, value in spec.items() if n != name})
    lacking = "'space' or 'points'" if name in ("space", "points") else f"'{name}'"
    assert f"it lacks {lacking}" in complaint(capsys, "run", str(folder))


@pytest.mark.parametrize(
    "name", ["own:x; rm -rf /", "own:$(id)", "a b:c", "own:x\n", ESCAPES, "", 3]
)
def test_a_stored_name_that_cannot_be_a_workload_is_no_hint(prepared, tmp_path, capsys, name):
    folder = tmp_path / "study"
    shutil.copytree(prepared[0], folder)
    (folder / "command.json").write_text(json.dumps({"workload": name, "optimizer": "sgd"}))
    assert "names no workload and optimizer of ours" in complaint(capsys, "run", str(folder))


def test_what_is_to_be_typed_again_is_one_word_of_a_shell(prepared, tmp_path, capsys):
    assert cli._word("runs/a b;c") == "'runs/a b;c'"
    assert cli._word("a\x1b'b") == "'a\\x1b'\"'\"'b'"
    folder = tmp_path / "study"
    shutil.copytree(prepared[0], folder)
    command = {"workload": "package.module:build", "optimizer": "sgd"}
    (folder / "command.json").write_text(json.dumps(command))
    assert complaint(capsys, "run", str(folder)).endswith("--workload package.module:build")


@pytest.mark.parametrize("where", ["file", "file/below", "study/blocks/block-00000000.pbx"])
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys, where):
    place = foreign_study(tmp_path / "study")
    (tmp_path / "file").write_text("mine")
    target = tmp_path / where
    said = complaint(capsys, "report", str(place), "--directory", str(target))
    assert "cannot" in said
    assert str(target) in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_warning_of_the_program_is_one_line(capsys, monkeypatch):
    def warns(arguments):
        warnings.warn(f"two\nlines {ESCAPES}", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "run", warns)
    monkeypatch.setattr(cli, "use_cpu_cores", lambda: None)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    with warnings.catch_warnings():  # Which puts back what shows warnings.
        warnings.simplefilter("always")
        assert cli.main([]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("playbook-optax: warning: two lines \\x1b]0;")
    assert line.isprintable()
