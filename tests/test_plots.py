"""Plots are tested by their tables and by what is on the Axes, never by their pixels."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from playbook_optax import plots
from playbook_optax.analysis.axes import axis_plot_info
from playbook_optax.analysis.norms import norm_histogram
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def study():
    lr = np.logspace(-3, 0, 8)
    curves = np.stack([np.full(8, 2.0), 1.0 / np.arange(1, 9)], axis=1)
    bad = lr > 0.2
    made = Study.from_arrays(
        {
            "learning_rate": lr,
            "b1": np.linspace(0.9, 0.99, 8),
            "warmup_steps": np.array([0, 10, 20, 50, 100, 100, 50, 0]),
            "act": np.arange(8) % 2,
            "fixed": np.ones(8),
        },
        {"valid/loss": curves, "train/loss": curves / 2},
        [0, 100],
        objective="valid/loss",
        space=SearchSpace(
            {
                "learning_rate": Float(1e-3, 1.0, scale="log"),
                "b1": Float(0.9, 0.99, scale="reverse_log"),
                "warmup_steps": Integer(10, 100, scale="log", include_zero=True),
                "act": Categorical(["relu", "gelu"]),
            }
        ),
        infeasible=bad,
    )
    counts = np.zeros((8, 4), np.int32)
    counts[:, 1] = 90
    counts[:, 2] = 10
    counts[bad, 3] = 1000
    data = made.data.assign({"norms/counts": (("trial", "norm_bin"), counts)})
    data = data.assign_coords(
        norm_low=("norm_bin", [0.0, 1.0, 10.0, 100.0]),
        norm_high=("norm_bin", [1.0, 10.0, 100.0, np.inf]),
    )
    return dataclasses.replace(made, data=data)


def line(ax, label):
    (found,) = [x for x in ax.get_lines() if str(x.get_label()).startswith(label)]
    return found


def test_axis_plot_marks_every_trial_once(study):
    ax = plots.plot_axis(study, "learning_rate")
    lr = study.points["learning_rate"]
    np.testing.assert_allclose(line(ax, "trial").get_xdata(), lr[:5])
    np.testing.assert_allclose(line(ax, "trial").get_ydata(), 1 / np.arange(1, 6))
    np.testing.assert_allclose(line(ax, "best trial").get_xdata(), lr[5:6])
    crosses = line(ax, "infeasible (2 of 8, 25%)")
    np.testing.assert_allclose(crosses.get_xdata(), lr[6:])
    assert crosses.get_marker() == "x"
    assert line(ax, "best trial").get_marker() == "*"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.get_xlabel() == "learning_rate (log scale)"
    assert ax.get_ylabel() == "best valid/loss (lower is better)"
    ends = [x.get_xdata()[0] for x in ax.get_lines() if x.get_linestyle() == "--"]
    np.testing.assert_allclose(ends, [1e-3, 1.0])


def test_infeasible_band_lies_above_every_feasible_trial(study):
    ax = plots.plot_axis(study, "learning_rate")
    low, high = ax.get_ylim()
    assert (1.0 - low) / (high - low) < 0.91


def test_axis_info_table(study):
    info = axis_plot_info(study, "b1")
    np.testing.assert_allclose(info.x, 1 - study.points["b1"])
    assert info.infeasible_share == 0.25
    assert info.outcomes.best == 5
    assert axis_plot_info(study, "warmup_steps").x.tolist() == [5, 10, 20, 50, 100, 100, 50, 5]


def test_reverse_log_axis_grows_to_the_right_and_its_ticks_are_the_values(study):
    ax = plots.plot_axis(study, "b1")
    ax.figure.canvas.draw()
    left, right = ax.get_xlim()
    assert left > right  # drawn in 1 - b1
    assert ax.get_xlabel() == "b1 (log scale in 1 − b1)"
    shown = [
        (1 - at, text.get_text())
        for at, text in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
        if right <= at <= left
    ]
    assert [text for _, text in shown] == ["0.99", "0.98", "0.95", "0.9"]
    for value, text in shown:
        assert value == pytest.approx(float(text))


def test_zero_of_a_log_range_and_choices_are_labelled(study):
    ax = plots.plot_axis(study, "warmup_steps")
    assert ax.get_xticklabels()[0].get_text() == "0"
    assert ax.get_xticks()[0] == 5
    ax = plots.plot_axis(study, "act")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["relu", "gelu"]


def test_values_over_decades_get_a_log_axis(study):
    data = study.data.copy(deep=True)
    data["valid/loss"] = data["valid/loss"] ** 3
    wide = dataclasses.replace(study, data=data)
    assert plots.plot_axis(wide, "learning_rate").get_yscale() == "log"


def test_plot_axes_draws_what_varies(study):
    figure = plots.plot_axes(study)
    labels = [ax.get_xlabel().split(" ")[0] for ax in figure.axes]
    assert labels == ["learning_rate", "b1", "warmup_steps", "act"]
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["trial", "best trial", "infeasible (2 of 8, 25%)", "search space"]


def test_all_infeasible_still_draws(study):
    data = study.data.assign(infeasible=("trial", np.ones(8, bool)))
    dead = dataclasses.replace(study, data=data)
    ax = plots.plot_axis(dead, "learning_rate")
    assert len(line(ax, "infeasible (8 of 8, 100%)").get_xdata()) == 8
    plots.plot_axes(dead).canvas.draw()
    plots.plot_curves(dead).canvas.draw()
    plots.plot_gradient_norms(dead).figure.canvas.draw()


def test_curves_of_the_best_five(study):
    figure = plots.plot_curves(study)
    objective, train = figure.axes
    assert (objective.get_ylabel(), train.get_ylabel()) == (
        "valid/loss (lower is better)",
        "train/loss (lower is better)",
    )
    assert objective.get_xlabel() == "step (optimizer updates)"
    drawn = [x for x in objective.get_lines() if len(x.get_xdata()) == 2]
    assert [str(x.get_label()).split(":")[0] for x in drawn] == [
        f"trial {i}" for i in (5, 4, 3, 2, 1)
    ]
    assert len({x.get_linestyle() + str(x.get_color()) for x in drawn}) == 5
    dots = [x for x in objective.get_lines() if len(x.get_xdata()) == 1]
    assert [d.get_xdata()[0] for d in dots] == [100] * 5
    _, ax = plt.subplots()
    assert plots.plot_curves(study, 2, ax=ax) is ax
    assert len(ax.get_lines()) == 4


def test_gradient_norms_pool_feasible_trials(study):
    info = norm_histogram(study)
    assert info.counts.tolist() == [0, 540, 60, 0]
    assert info.trials == (0, 1, 2, 3, 4, 5)
    assert info.percentiles[50.0] == pytest.approx(10 ** (5 / 9))
    assert info.percentiles[90.0] == pytest.approx(10)
    assert info.percentiles[99.0] == pytest.approx(10**1.9)
    ax = plots.plot_gradient_norms(study)
    assert ax.get_xscale() == "log"
    assert "6 trials pooled" in ax.get_xlabel()
    assert sum(p.get_height() for p in ax.patches) == pytest.approx(100)
    marks = {str(x.get_label()): x.get_xdata()[0] for x in ax.get_lines()}
    assert marks == {
        "50th percentile: 3.59": pytest.approx(10 ** (5 / 9)),
        "90th percentile: 10": pytest.approx(10),
        "99th percentile: 79.4": pytest.approx(10**1.9),
    }


def test_gradient_norms_of_chosen_trials_and_open_bins(study):
    info = norm_histogram(study, trials=[7])
    assert info.counts.tolist() == [0, 90, 10, 1000]
    assert info.percentiles[99.0] == 100  # an open bin says its lower edge
    with pytest.raises(ValueError, match="trials"):
        norm_histogram(study, trials=[8])
    bare = dataclasses.replace(study, data=study.data.drop_vars("norms/counts"))
    with pytest.raises(ValueError, match="were not recorded"):
        plots.plot_gradient_norms(bare)


def test_unknown_names(study):
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        plots.plot_axis(study, "learning_rat")
    with pytest.raises(TypeError, match="did you mean 'num_trials'"):
        plots.plot_curves(study, num_trial=3)


def test_missing_matplotlib_names_the_extra(study, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"playbook-optax\[plots\]"):
        plots.plot_axis(study, "b1")
