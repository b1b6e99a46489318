"""What a terminal is told before anything trains."""

import io
import sys

import jax
import numpy as np
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import programs
from playbook_optax.runner.progress import Progress, stage, telling


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress):
    programs.forget()
    pbx.run_study(
        tiny.quadratic(),
        tiny.sgd,
        {"learning_rate": np.float32([0.1])},
        num_steps=2,
        eval_every=1,
        key=jax.random.key(0),
        progress=progress,
    )


def test_stages_are_named_as_they_begin_with_the_time_they_took(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with telling(True, "mine\x1b[2J"):
        with stage("compiling"):
            assert terminal.getvalue() == "mine\\x1b[2J: compiling … "
        assert terminal.getvalue().endswith(" s\n")
    with stage("outside"):
        pass
    assert "outside" not in terminal.getvalue()


def test_a_study_tells_what_it_does_before_it_trains(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(progress=True)
    told = terminal.getvalue()
    assert told.index("quadratic: tracing … ") < told.index("quadratic: compiling … ")


def test_nobody_is_told_who_does_not_look(monkeypatch):
    silent, quiet = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    run(progress=True)
    monkeypatch.setattr(sys, "stderr", quiet)
    run(progress=False)
    assert silent.getvalue() == quiet.getvalue() == ""


def test_a_name_is_no_markup_of_the_progress_display(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(True, "[/red][link=x]\x1b[2Jname", 1, 10) as progress:
        progress.update(1, 1, 0)
    assert "[/red][link=x]\\x1b[2Jname" in terminal.getvalue()
