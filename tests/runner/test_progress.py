"""What a person is told while studies run: lines everywhere, and a bar where one can move."""

import io
import os
import pty
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import programs, progress
from playbook_optax.runner.progress import Budget, Progress, say, stage, telling

HOSTILE = "[/red][link=x]\x1b[2J\nname"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def standard_error(monkeypatch):
    """Puts a stream in its place; pytest puts its own there after the fixtures."""

    def put(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def run(show, num_steps=2, **options):
    programs.forget()
    return pbx.run_study(
        tiny.quadratic(),
        tiny.sgd,
        {"learning_rate": np.float32([0.1])},
        num_steps=num_steps,
        eval_every=1,
        key=jax.random.key(0),
        progress=show,
        **options,
    )


# Lines --------------------------------------------------------------------------------------------


def test_stages_are_named_as_they_begin_with_the_time_they_took(standard_error):
    terminal = standard_error(Terminal())
    with telling(True, "mine\x1b[2J"):
        with stage("compiling"):
            assert terminal.getvalue() == "mine\\x1b[2J: compiling … "
        assert terminal.getvalue().endswith(" s\n")
    with stage("outside"):
        say("outside")
    assert "outside" not in terminal.getvalue()


def test_a_pipe_gets_each_stage_as_a_whole_line(standard_error, clock):
    pipe = standard_error(io.StringIO())
    with telling(True, "mine"), stage("compiling"):
        assert pipe.getvalue() == ""
        clock.now += 12.34
    assert pipe.getvalue() == "mine: compiling took 12.3 s\n"


def test_of_a_stage_that_fails_the_error_speaks(standard_error):
    pipe = standard_error(io.StringIO())
    with pytest.raises(ValueError, match="mine"), telling(True, "mine"), stage("tracing"):
        raise ValueError("mine")
    assert pipe.getvalue() == ""


def test_a_pipe_is_told_of_a_stage_that_is_long_in_coming(standard_error, monkeypatch):
    pipe = standard_error(io.StringIO())
    monkeypatch.setattr(progress, "LONG_STAGE_SECONDS", 0.0)
    with telling(True, "mine"), stage("compiling"):
        while not pipe.getvalue():
            pass  # Until the other thread has spoken.
    first, last = pipe.getvalue().splitlines()
    assert first == "mine: compiling goes on …"
    assert re.fullmatch(r"mine: compiling took [0-9.]+ s", last)


def test_a_study_tells_what_it_does_before_during_and_after(standard_error, tmp_path):
    pipe = standard_error(io.StringIO())
    run(True, directory=tmp_path)
    run(True, directory=tmp_path)
    told = [
        re.sub(r"[0-9.e-]+ s\b|[0-9,]+ steps/s", "#", line) for line in pipe.getvalue().split("\n")
    ]
    assert told == [
        "quadratic: tracing took #",
        "quadratic: compiling took #",
        "quadratic: training 1 trials x 2 steps took # (#)",
        "quadratic: tracing took #",
        "quadratic: 1 trials x 2 steps are stored already",
        "",
    ]


def test_nobody_is_told_who_does_not_want_it(standard_error):
    pipe = standard_error(io.StringIO())
    run(False)
    with telling(True, "mine"), telling(False, "mine"), stage("tracing"):
        say("anything")
        with Progress("x", 1, 1, 10, 10) as bar:
            bar.update(1, 1, 0)
    assert pipe.getvalue() == ""


def test_a_study_needs_no_standard_error(standard_error):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        standard_error(stream)
        assert run(True).num_trials == 1


def test_text_of_any_origin_is_one_line_that_commands_nothing(standard_error):
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        standard_error(stream)
        with telling(True, HOSTILE):
            say(f"decided {HOSTILE}\r\x9b")
            with Progress(HOSTILE, 1, 1, 10, 10) as bar:
                bar.update(1, 1, 0)
    first, second = pipe.getvalue().splitlines()
    shown = "[/red][link=x]\\x1b[2J\\nname"
    assert first == f"{shown}: decided {shown}\\r\\x9b"
    assert second.startswith(f"{shown}: training {shown} took ")
    assert f"{shown}: decided {shown}\\r\\x9b" in terminal.getvalue()
    assert "\x1b[2J\n" not in terminal.getvalue()


# How far a study is -------------------------------------------------------------------------------


def test_a_long_study_in_a_pipe_says_now_and_then_how_far_it_is(standard_error, clock):
    pipe = standard_error(io.StringIO())
    with telling(True, "mine", Budget("tune", 4000.0)), Progress("it", 4, 3, 100, 400) as bar:
        for _ in range(5):
            clock.now += 9.0
            bar.moved(20)  # of the 300 that are missing; 100 of the budget's are stored.
        bar.update(1, 2, 1)
        clock.now += 21.0
        bar.update(1, 2, 0)
    assert pipe.getvalue().splitlines() == [
        "mine: trained 20% of it in 27 s (2 steps/s); 2 min left; tune: at most about 29 min left",
        "mine: trained 67% of it in 66 s (3 steps/s); 33 s left; tune: at most about 20 min left; "
        "1 of 4 infeasible",
        "mine: training it took 66 s (5 steps/s); 1 of 4 infeasible; tune: at most about 13 min "
        "left",
    ]


def test_compiling_is_no_part_of_the_time_that_training_takes(standard_error, clock):
    pipe = standard_error(io.StringIO())
    budget = Budget("tune", 1000.0)
    with telling(True, "mine", budget):
        for _ in range(2):
            # A procedure inside has the budget of the one around it.
            with telling(True, "mine"), Progress("it", 1, 1, 100, 100) as bar:
                with stage("compiling"):
                    clock.now += 500.0
                clock.now += 5.0
                bar.update(1, 1, 0)
    assert (budget.spent, budget.trained, budget.seconds) == (200.0, 200.0, 10.0)
    assert pipe.getvalue().splitlines()[-1] == (
        "mine: training it took 5 s (20 steps/s); tune: at most about 40 s left"
    )


def test_what_a_save_holds_is_done_and_took_no_time(standard_error, clock):
    pipe = standard_error(io.StringIO())
    budget = Budget("tune", 200.0)
    with telling(True, "mine", budget), Progress("it", 1, 1, 100, 100) as bar:
        progress.resumed(50)
        clock.now += 25.0
        progress.moved(25)
        assert (budget.spent, budget.trained) == (75.0, 25.0)
        bar.update(1, 1, 0)
    told = pipe.getvalue().splitlines()
    assert told[0] == (
        "mine: trained 75% of it in 25 s (1 steps/s); 25 s left; tune: at most about 2 min left"
    )
    assert told[1].startswith("mine: training it took 25 s (2 steps/s)")


def test_a_study_that_stops_says_where(standard_error, clock):
    pipe = standard_error(io.StringIO())

    def stopped():
        with telling(True, "mine"), Progress("it", 2, 2, 50, 99) as bar:
            clock.now += 3.0
            bar.moved(40)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert pipe.getvalue() == "mine: training it stopped after 3 s, 40% done\n"


@pytest.mark.parametrize("directory", [False, True])
def test_each_call_of_a_program_moves_the_study(monkeypatch, tmp_path, directory):
    calls = []

    class Seen(Progress):
        def moved(self, num_steps):
            super().moved(num_steps)
            calls.append((num_steps, self._share))

    monkeypatch.setattr("playbook_optax.runner.run.Progress", Seen)
    run(True, num_steps=40, directory=tmp_path if directory else None)
    steps, shares = zip(*calls, strict=True)
    # One trial in a block of its own kind: the program is called for 16 steps, and more then.
    assert sum(steps) == 40 * (sum(steps) // 40)
    assert len(steps) > 1
    assert 0 < shares[0] < 1
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1.0


# Bars ---------------------------------------------------------------------------------------------

SLOW = """
import time
import jax, jax.numpy as jnp, numpy as np
import playbook_optax as pbx
from playbook_optax.runner import execute
execute.MAX_CHUNK_STEPS = 8

def batches(start):
    while True:
        time.sleep(0.05)
        yield np.zeros(1, np.float32)

workload = pbx.Workload(
    name="slow", init=lambda key: ({"w": jnp.ones(2)}, {}),
    loss=lambda p, s, b, k: ((p["w"] ** 2).sum() + b.sum(), (s, {})), batch=None,
    host_batches=batches, version="1", objective="valid/loss",
    evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()})
pbx.run_study(workload, lambda point: pbx.sgd(point["rate"]), {"rate": np.float32([0.1])},
              num_steps=32, eval_every=32, key=jax.random.key(0))
"""

SCRIPT = """
import sys
import jax, jax.numpy as jnp
import playbook_optax as pbx
workload = pbx.Workload(
    name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
    loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
    evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
pbx.tune(workload, "sgd", num_trials=24, num_steps=40, key=jax.random.key(0),
         progress="quiet" not in sys.argv)
"""


def test_a_script_tells_each_decision_of_tune_in_order_on_standard_error():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("square: ") and line.isprintable() for line in lines)
    assert "\r" not in done.stderr
    told = [line.removeprefix("square: ") for line in lines]
    chapters = ["learning_rate", "num_steps", "stability", "round_1", "round_2", "retrain"]
    decided = [line.split()[1] for line in told if line.startswith("decided ")]
    assert decided == [f"{name}:" for name in chapters]
    begun = [line for line in told if line.startswith("tune, ")]
    assert [line.split()[4] for line in begun] == [
        f"{name}," for name in ("learning_rate", "round_1", "round_2", "retrain")
    ]
    first = [line.split()[0] for line in told[:5]]
    assert first == ["tracing", "tune,", "compiling", "training", "decided"]
    assert "tune: at most about" in told[3]


def test_a_script_without_progress_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "quiet"], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


def test_the_bar_moves_within_a_block_on_a_terminal():
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", SLOW], stderr=child, env=environment)
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # The other end is closed.
            break
        if not part:
            break
        seen += part
    os.close(parent)
    assert process.wait() == 0
    text = seen.decode()
    # One block of one trial: all of these are within it.
    assert {25, 50, 75} & {int(n) for n in re.findall(r"(\d+)% 0/1 blocks", text)}
    assert text.index("slow: tracing … ") < text.index("slow: compiling … ")
    assert text.index("slow: compiling … ") < text.index("slow: training 1 trials x 32 steps")


def test_a_terminal_without_rich_gets_lines(standard_error, monkeypatch):
    terminal = standard_error(Terminal())
    monkeypatch.setattr(progress, "_has_rich", lambda: False)
    with telling(True, "mine"), Progress("it", 1, 1, 10, 10) as bar:
        bar.update(1, 1, 0)
    assert terminal.getvalue().startswith("mine: training it took ")


def test_a_dumb_terminal_gets_lines(standard_error, monkeypatch):
    terminal = standard_error(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with telling(True, "mine"), Progress("it", 1, 1, 10, 10) as bar:
        bar.moved(5)
        bar.update(1, 1, 0)
    assert "\x1b" not in terminal.getvalue()
    assert terminal.getvalue().startswith("mine: training it took ")


def test_in_a_notebook_lines_and_a_bar_that_moves_are_shown_by_rich(
    standard_error, monkeypatch, clock
):
    ipython = pytest.importorskip("IPython")
    shown, drawn = [], []

    class Place:
        def update(self, data, raw):
            drawn.append(data)

    def display(data, raw=True, **options):
        (drawn if "display_id" in options else shown).append(data)
        return Place()

    monkeypatch.setattr(ipython.display, "display", display)
    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    standard_error(io.StringIO())
    with telling(True, "<b>"):
        say("decided [red]this[/red]: <script>")
        with Progress("it", 2, 2, 50, 100) as bar:
            for _ in range(3):
                clock.now += 1.0
                bar.moved(25)
            bar.moved(5)  # Too soon for another picture.
            bar.update(2, 2, 0)
    assert sys.stderr.getvalue() == ""
    assert [str(one.text) for one in shown] == [
        "<b>: decided [red]this[/red]: <script>\n",
        "<b>: training it took 3 s (33 steps/s)\n",
    ]
    assert "&lt;script&gt;" in shown[0].html
    assert "<script>" not in shown[0].html
    told = [re.findall(r"(\d+)%", picture["text/plain"]) for picture in drawn]
    assert told == [["0"], ["25"], ["50"], ["75"], []]
    assert drawn[1]["text/html"].startswith("<pre>")
    assert "&lt;b&gt;" in drawn[1]["text/html"]


def test_a_notebook_is_known_by_its_kernel(monkeypatch):
    assert not progress._is_notebook()

    class Shell:
        kernel = None

    class Module:
        @staticmethod
        def get_ipython():
            return Shell()

    monkeypatch.setitem(sys.modules, "IPython", Module())
    assert progress._is_notebook()
    monkeypatch.delattr(Shell, "kernel")
    assert not progress._is_notebook()


def test_a_set_of_studies_says_which_one_it_trains(standard_error):
    pipe = standard_error(io.StringIO())
    space = pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 0.1, scale="log")})
    pbx.run_studies(
        {"plain": {"make_optimizer": tiny.sgd}, "heavy": {"make_optimizer": tiny.momentum}},
        scientific="optimizer",
        workload=tiny.quadratic(),
        space=space,
        num_trials=2,
        num_steps=2,
        eval_every=1,
        key=jax.random.key(0),
    )
    told = pipe.getvalue().splitlines()
    begun = [told.index(f"optimizer: {what}") for what in ("plain, 1 of 2", "heavy, 2 of 2")]
    done = [i for i, line in enumerate(told) if line.startswith("quadratic: training 2 trials")]
    assert begun[0] < done[0] < begun[1] < done[1]


def test_a_chapter_of_procedures_says_what_each_step_found(standard_error):
    pipe = standard_error(io.StringIO())
    verdict = pbx.procedures.stabilize(
        tiny.quadratic(),
        tiny.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 0.1, scale="log")}),
        key=jax.random.key(0),
        num_trials=3,
        num_steps=8,
        optimizers={},
    )
    told = pipe.getvalue().splitlines()
    steps = list(verdict.answer.steps)
    begun = [told.index(f"quadratic: stabilize: {name}") for name in steps]
    found = [
        told.index(f"quadratic: decided {name}: {verdict.answer.steps[name].findings[0].message}")
        for name in steps
    ]
    order = [line for both in zip(begun, found, strict=True) for line in both]
    assert len(order) > 2
    assert order == sorted(order)
