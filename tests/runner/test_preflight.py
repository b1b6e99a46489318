"""What a study will take, said before it is spent."""

import importlib
import itertools
import types
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner import devices, plan, programs
from playbook_optax.runner.run import StudyRunner

preflight = importlib.import_module("playbook_optax.runner.preflight")

RATES = {"learning_rate": np.geomspace(1e-3, 0.3, 12).astype(np.float32)}


def codes(report):
    return [finding.code for finding in report.findings]


def test_a_study_that_can_run():
    report = pbx.preflight(
        tiny.noisy_quadratic(), tiny.momentum, RATES, num_steps=200, eval_every=50
    )
    assert report.ok
    assert (report.num_trials, report.num_steps, report.num_devices) == (12, 200, 1)
    study = pbx.run_study(
        tiny.noisy_quadratic(),
        tiny.momentum,
        RATES,
        num_steps=5,
        eval_every=5,
        key=jax.random.key(0),
        progress=False,
    )
    assert report.default_trials_per_block == study.spec["trials_per_block"] == 8
    # A study of a moment is not worth compiling another width.
    (own,) = report.timings
    assert own.trials_per_block == report.trials_per_block == 8
    assert 0 < own.seconds_per_step < 1
    assert 0 <= own.seconds_per_evaluation < 1
    assert 0 < own.compile_seconds < 600
    assert 0 < own.bytes_per_device < 2**30
    # Two blocks of eight; evaluations before the first step and after 50, 100, 150 and 200.
    training = 16 * (200 * own.seconds_per_step + 5 * own.seconds_per_evaluation)
    assert report.seconds == pytest.approx(own.compile_seconds + training)
    assert "12 trials of 200 steps" in str(report)
    assert set(codes(report)) <= {"idle_cores"}


@pytest.mark.parametrize("width", [1, 4])
def test_a_given_width_is_the_one_that_is_timed(width):
    space = pbx.preflight(
        tiny.noisy_quadratic(),
        tiny.momentum,
        tiny.SPACE,
        trials_per_block=width,
        eval_every=1,
        num_steps=3,
    )
    assert space.num_trials == 64
    assert [timing.trials_per_block for timing in space.timings] == [width]
    assert space.timings[0].seconds_per_evaluation == 0


def test_host_batches_are_timed_too():
    quadratic = tiny.quadratic()
    host = pbx.Workload(
        **{
            **vars(quadratic),
            "batch": None,
            "host_batches": lambda start: iter([quadratic.data] * 40),
            "version": "1",
        }
    )
    report = pbx.preflight(host, tiny.sgd, RATES, num_steps=40, eval_every=40, num_seeds=2)
    assert report.ok
    assert report.num_trials == 24


@pytest.mark.parametrize(
    ("make_optimizer", "told"),
    [
        (lambda p: optax.sgd(float(p["learning_rate"])), "traced value"),
        (lambda p: optax.sgd(0.1 if p["learning_rate"] > 0.1 else 0.2), "Python `if`"),
        (lambda p: optax.sgd(np.sqrt(p["learning_rate"])), "jnp"),
        (lambda p: optax.sgd(p["lr"]), "no hyperparameter 'lr'"),
        (lambda p: 3, "must return an optax.GradientTransformation"),
    ],
)
def test_what_cannot_be_traced_is_told_with_what_to_use_instead(make_optimizer, told):
    report = pbx.preflight(tiny.noisy_quadratic(), make_optimizer, RATES)
    assert not report.ok
    assert report.timings == ()
    assert codes(report) == ["cannot_trace"]
    assert told in report.findings[0].message
    assert "jnp" in report.findings[0].suggestion
    assert report.findings[0].message in " ".join(str(report).split())


def test_what_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda mesh: 1)
    report = pbx.preflight(tiny.noisy_quadratic(), tiny.momentum, RATES)
    assert not report.ok
    assert codes(report) == ["does_not_fit"]
    assert report.bytes_available == 1


def test_idle_cores_and_a_better_width_are_told(monkeypatch):
    monkeypatch.setattr(devices, "num_cores", lambda: 4)
    monkeypatch.setattr(plan, "CPU_FLOPS_PER_STEP", 0)
    programs.forget()  # What is known of the width already.
    speeds = {1: 20.0, 8: 1.0}
    monkeypatch.setattr(StudyRunner, "rehearse", lambda self, width, *_: (0.0, speeds[width]))
    report = pbx.preflight(tiny.quadratic(), tiny.sgd, RATES, num_steps=300, eval_every=300)
    assert (report.default_trials_per_block, report.trials_per_block) == (1, 8)
    one, eight = report.timings
    assert one.seconds == pytest.approx(one.compile_seconds + 12 * 300 * 20.0)
    assert report.seconds == eight.seconds == pytest.approx(eight.compile_seconds + 16 * 300 * 1.0)
    assert codes(report) == ["other_width_faster", "idle_cores"]
    evidence = {"ratio": one.seconds / eight.seconds, "trials_per_block": 8}
    assert report.findings[0].evidence == evidence
    assert report.findings[0].suggestion == "Give trials_per_block=8."
    assert "width    8 trial(s) to a block" in str(report)
    assert "slower   1 trial(s) to a block: about 72," in str(report)
    programs.forget()


positive = st.floats(0.001, 1000)


@hypothesis.given(
    measured=st.lists(st.tuples(positive, positive), min_size=1, max_size=5),
    likely=st.floats(0, 100),
    fits=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_what_is_spent_on_other_widths_is_bounded_and_the_fastest_is_named(measured, likely, fits):
    """Widths with their seconds to compile and to train; a fake clock goes on by the former."""
    clock = [0.0]
    table = [preflight.Timing(i, 0, 0, c, 0, c + t) for i, (c, t) in enumerate(measured)]
    spent_before = []

    def measure(width):
        spent_before.append(clock[0])
        clock[0] += table[width].compile_seconds
        return table[width] if fits[width] else None

    with mock.patch.object(preflight, "time", types.SimpleNamespace(monotonic=lambda: clock[0])):
        others = range(1, len(table))
        found = preflight.worth_trying(table[0], others, likely, measure)
    training = measured[0][1]
    # A share of the training, and one width.
    assert all(spent + likely <= preflight.SHARE * training for spent in spent_before)
    assert found == [table[width] for width in range(1, len(spent_before) + 1) if fits[width]]
    if likely > preflight.SHARE * training:
        assert spent_before == []
    best = preflight._fastest([table[0], *found])
    assert best.seconds == min(one.seconds for one in (table[0], *found))
    told = preflight._compared([table[0], *found])
    assert [f.evidence["trials_per_block"] for f in told] == [best.trials_per_block] * (
        best is not table[0]
    )


def test_compiling_counts_also_where_the_memory_asked_for_it(monkeypatch):
    """Whether a width fits is told by its compiled program."""
    programs.forget()
    monkeypatch.setattr(devices, "free_memory", lambda mesh: 2**40)
    seconds = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(preflight, "time", clock)
    compiled = []
    original = programs._compile

    def compile_late(*args):
        compiled.append(next(seconds))
        for _ in range(100):
            next(seconds)
        return original(*args)

    monkeypatch.setattr(programs, "_compile", compile_late)
    report = pbx.preflight(tiny.noisy_quadratic(), tiny.momentum, RATES, num_steps=20)
    assert len(compiled) == 1
    assert 100 < report.timings[0].compile_seconds < 110
    assert report.seconds > 100
    programs.forget()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"eval_every": 1.5}, "eval_every"),
        ({"key": 3}, "key must be one random key"),
        ({"num_trial": 3}, "num_trials"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pbx.preflight(tiny.noisy_quadratic(), tiny.momentum, RATES, **arguments)


def test_own_errors_are_told():
    def loss(params, state, batch, key):
        raise ZeroDivisionError

    workload = pbx.Workload(**{**vars(tiny.quadratic()), "loss": loss})
    report = pbx.preflight(workload, tiny.sgd, {"learning_rate": jnp.ones(2)})
    assert codes(report) == ["cannot_trace"]
    assert report.findings[0].message == "ZeroDivisionError"
