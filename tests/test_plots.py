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


def test_a_few_norms_near_zero_do_not_squeeze_the_histogram(study):
    edges = 10.0 ** np.arange(-8, 5)
    counts = np.zeros((8, 12), np.int32)
    counts[0, [0, 2]] = 1, 19
    counts[0, 8:11] = 480, 400, 100
    bare = study.data.drop_vars(["norms/counts", "norm_low", "norm_high"])
    data = bare.assign({"norms/counts": (("trial", "norm_bin"), counts)})
    data = data.assign_coords(norm_low=("norm_bin", edges[:-1]), norm_high=("norm_bin", edges[1:]))
    rare = dataclasses.replace(study, data=data)
    ax = plots.plot_gradient_norms(rare)
    # 2% lie below 1, which are told and not drawn.
    assert ax.get_xlim() == pytest.approx((1 / 1.2, 1200.0))
    assert [text.get_text() for text in ax.texts] == ["← 2% below"]
    # A threshold on the paper is drawn, and one that is far from it is told.
    near = plots.plot_gradient_norms(rare, threshold=0.5)
    assert near.get_xlim()[0] == pytest.approx(0.5 / 1.2)
    assert line(near, "threshold").get_label() == "threshold: 0.5"
    for threshold, side in ((1e6, "right"), (1e-3, "left")):
        far = plots.plot_gradient_norms(rare, threshold=threshold)
        assert far.get_xlim() == ax.get_xlim()
        assert line(far, "threshold").get_label().endswith(f", far to the {side}")
    # Were they more, they would belong to it.
    counts[0, 2] = 60
    data = data.assign({"norms/counts": (("trial", "norm_bin"), counts)})
    whole = plots.plot_gradient_norms(dataclasses.replace(study, data=data))
    assert whole.get_xlim()[0] == pytest.approx(1e-8 / 1.2)


def test_long_labels_of_curves_stand_below_each_other(study):
    def columns(shown):
        (legend,) = plots.plot_curves(shown).legends
        return legend._ncols

    assert columns(study) == 2
    long = study.data.rename(learning_rate="the_learning_rate_of_all_layers_but_the_last")
    spec = {name: value for name, value in study.spec.items() if name != "space"}
    assert columns(dataclasses.replace(study, data=long, spec=spec)) == 1


def test_unknown_names(study):
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        plots.plot_axis(study, "learning_rat")
    with pytest.raises(TypeError, match="did you mean 'num_trials'"):
        plots.plot_curves(study, num_trial=3)


def test_missing_matplotlib_names_the_extra(study, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"playbook-optax\[plots\]"):
        plots.plot_axis(study, "b1")


def declining(num_trials=4, num_evals=21, unstable=()):
    """Losses that fall from 2.3; those of `unstable` trials rise by 3 after the tenth evaluation.

    The norm of each trial is ten times its number plus one, its peak twice that.
    """
    step = np.arange(num_evals) * 10
    loss = np.tile(2.3 * np.exp(-step / 80), (num_trials, 1))
    for trial in unstable:
        loss[trial, 10:14] += 3.0
    norms = np.repeat(10.0 * np.arange(num_trials) + 1.0, num_evals).reshape(num_trials, -1)
    return Study.from_arrays(
        {"learning_rate": np.geomspace(0.01, 0.08, num_trials)},
        {
            "valid/loss": loss + np.linspace(0, 0.1, num_trials)[:, None],
            "step/loss": loss,
            "step/gradient_norm": norms,
            "step/peak_gradient_norm": 2 * norms,
        },
        step,
        objective="valid/loss",
        space=SearchSpace({"learning_rate": Float(0.01, 0.08, scale="log")}),
    )


def labels(ax):
    return [str(x.get_label()) for x in ax.get_lines() if not str(x.get_label()).startswith("_")]


def test_instability_shows_the_best_rate_and_those_above_with_their_rises():
    study = declining(unstable=(2, 3))
    ax = plots.plot_instability(study)
    assert ax.get_legend().get_title().get_text() == "learning_rate"
    shown = labels(ax)
    assert shown[0] == "0.01 (lr*)"
    assert any(text == "0.04 (4 lr*), mid rise" for text in shown)
    # The triangle stands on the top of the rise, the hollow circle on the value before it.
    (top,) = {(x.get_xdata()[0], x.get_ydata()[0]) for x in ax.get_lines() if x.get_marker() == "^"}
    loss = study.data["step/loss"].values
    assert top == (100, loss[2, 10])
    (before,) = {
        (x.get_xdata()[0], x.get_ydata()[0]) for x in ax.get_lines() if x.get_marker() == "o"
    }
    assert before[0] < 100
    quiet = plots.plot_instability(declining())
    assert not [x for x in quiet.get_lines() if x.get_marker() in ("^", "X")]
    assert len(labels(plots.plot_instability(study, 2))) == 2


def test_norm_trace_draws_the_mean_the_peak_and_the_threshold():
    study = declining()
    figure = plots.plot_norm_trace(study, trials=[1, 3], threshold=5.0)
    norm, loss = figure.axes
    for drawn, want in zip(norm.get_lines()[:2], (11.0, 31.0), strict=True):
        np.testing.assert_allclose(drawn.get_ydata(), want)
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in norm.collections]
    assert tops == [22.0, 62.0]
    assert line(norm, "threshold: 5").get_ydata()[0] == 5.0
    np.testing.assert_allclose(loss.get_lines()[1].get_ydata(), study.data["step/loss"].values[3])
    assert loss.get_xlabel() == "step (optimizer updates)"
    _, ax = plt.subplots()
    assert plots.plot_norm_trace(study, ax=ax) is ax
    # More than three trials: the best one alone.
    assert labels(ax) == ["trial 0 (mean; shaded up to the largest)"]
    with pytest.raises(ValueError, match="threshold"):
        plots.plot_norm_trace(study, threshold=0.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
        plots.plot_norm_trace(study, trials=[4])
    bare = dataclasses.replace(study, data=study.data.drop_vars("step/gradient_norm"))
    with pytest.raises(ValueError, match="were not recorded"):
        plots.plot_norm_trace(bare)


def test_curves_compared_stop_where_a_run_diverged():
    before, after = declining(), declining(num_evals=11)
    loss = before.data["step/loss"].values.copy()
    loss[3, 15:] = np.nan
    data = before.data.assign({"step/loss": (before.data["step/loss"].dims, loss)})
    before = dataclasses.replace(before, data=data)
    ax = plots.plot_curves_compared({"without": (before, 3), "with warm-up": (after, 1)})
    assert labels(ax) == ["without (diverged)", "with warm-up"]
    assert [len(x.get_xdata()) for x in ax.get_lines()] == [15, 11]
    assert ax.get_ylabel() == "step/loss (lower is better)"
    with pytest.raises(ValueError, match="runs is empty"):
        plots.plot_curves_compared({})
    with pytest.raises(ValueError, match=r"trial 4 must lie in \[0, 4\)"):
        plots.plot_curves_compared({"a": (after, 4)})
    with pytest.raises(ValueError, match="did you mean 'step/loss'"):
        plots.plot_curves_compared({"a": (after, 0)}, "step/los")


def test_gradient_norms_show_the_recorded_threshold_and_what_it_clipped(study):
    def with_clippers(threshold):
        return dataclasses.replace(
            study,
            data=study.data.assign(
                {
                    "norms/threshold": ("trial", np.full(8, threshold)),
                    "norms/num_clipped": ("trial", np.full(8, 25)),
                    "norms/num_steps": ("trial", np.full(8, 100)),
                }
            ),
        )

    clipped = with_clippers(5.0)
    info = norm_histogram(clipped)
    assert (info.threshold, info.share_clipped) == (5.0, 0.25)
    ax = plots.plot_gradient_norms(clipped)
    assert line(ax, "threshold").get_xdata()[0] == 5.0
    assert line(ax, "threshold").get_label() == "threshold: 5 (25% clipped)"
    # One that is given is not the one that clipped.
    given = plots.plot_gradient_norms(clipped, threshold=200.0)
    assert line(given, "threshold").get_label() == "threshold: 200"
    assert given.get_xlim()[1] > 200
    # The largest float32 is how a program with clipping says "do not clip".
    for nothing in (np.inf, np.nan, float(np.finfo(np.float32).max)):
        unclipped = with_clippers(nothing)
        assert np.isnan(norm_histogram(unclipped).threshold)
        assert np.isnan(norm_histogram(unclipped).share_clipped)
        assert not [x for x in labels(plots.plot_gradient_norms(unclipped)) if "threshold" in x]


def test_axis_shades_the_infeasible_region_beyond_its_edge():
    lr = np.geomspace(1e-3, 1.0, 24)
    bad = lr > 0.05
    study = Study.from_arrays(
        {"learning_rate": lr},
        {"valid/loss": np.abs(np.log10(lr) + 2)[:, None] + np.zeros((24, 2))},
        [0, 10],
        objective="valid/loss",
        space=SearchSpace({"learning_rate": Float(1e-3, 1.0, scale="log")}),
        infeasible=bad,
    )
    ax = plots.plot_axis(study, "learning_rate")
    (shade,) = [p for p in ax.patches if p.get_label() == "infeasible region"]
    assert lr[~bad].max() <= shade.get_x() <= lr[bad].min()
    assert shade.get_x() + shade.get_width() == pytest.approx(ax.get_xlim()[1])
    # As many failures with no order to them have no edge.
    mixed = dataclasses.replace(
        study,
        data=study.data.assign(infeasible=("trial", np.arange(24) % 2 == 0)),
    )
    ax = plots.plot_axis(mixed, "learning_rate")
    assert not [p for p in ax.patches if p.get_label() == "infeasible region"]


@pytest.mark.parametrize("backend", ["inline", "module://matplotlib_inline.backend_inline"])
def test_a_figure_that_a_notebook_shows_by_itself_is_not_open_as_well(study, monkeypatch, backend):
    open_before = plt.get_fignums()
    monkeypatch.setattr(plt, "get_backend", lambda: backend)
    for figure in (plots.plot_axes(study), plots.plot_curves(study)):
        assert plt.get_fignums() == open_before
        assert len(figure.axes) >= 1
    axes = plots.plot_axis(study, "learning_rate")
    assert plt.get_fignums() == [*open_before, axes.figure.number]
    plt.close(axes.figure)
    monkeypatch.undo()
    figure = plots.plot_axes(study)
    assert figure.number in plt.get_fignums()
    plt.close(figure)
