"""The plots of how long to train, by what is on their Axes."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax import plots
from playbook_optax.analysis.training_length import best_step_info
from playbook_optax.procedures.gradient_noise import GradientNoise, NoiseRow, VariantNoise


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def line(ax, label):
    (found,) = [x for x in ax.get_lines() if str(x.get_label()).startswith(label)]
    return found


def study(curves, infeasible=None, name="learning_rate"):
    curves = np.asarray(curves, np.float64)
    return pbx.Study.from_arrays(
        {name: np.geomspace(0.01, 1.0, len(curves))},
        {"train/error_rate": curves},
        100 * np.arange(curves.shape[1]),
        objective="train/error_rate",
        infeasible=infeasible,
    )


def test_best_steps_have_a_bar_for_every_bin_and_both_ends_shaded():
    curves = np.ones((12, 21))
    for i in range(12):
        curves[i, i + 1 :] = 0.5 - 0.01 * i
    info = best_step_info(study(curves))
    ax = plots.plot_best_steps(info)
    every, good = ax.containers
    np.testing.assert_array_equal([bar.get_height() for bar in every], info.counts)
    np.testing.assert_array_equal([bar.get_height() for bar in good], info.good_counts)
    assert [bar.get_x() for bar in every] == pytest.approx(info.edges[:-1])
    assert labels(ax) == ["far too long", "train longer?", "all 12 trials", "the 3 best"]
    assert "as a share of 2000 steps" in ax.get_xlabel()


def test_steps_to_target_marks_every_trial_once():
    curves = [[1, 0.5, 0.1, 0.1], [1, 0.1, 0.1, 0.1], [1, 0.1, np.nan, np.nan], [1, 1, 1, 1]]
    flags = np.array([False, False, True, False])
    info = pbx.steps_to_target(study(curves, flags), 0.1)
    ax = plots.plot_steps_to_target(info)
    rates = info.points["learning_rate"]
    np.testing.assert_allclose(line(ax, "trial").get_xdata(), rates[:2])
    np.testing.assert_allclose(line(ax, "trial").get_ydata(), [200, 100])
    np.testing.assert_allclose(line(ax, "infeasible later").get_xdata(), rates[2:3])
    np.testing.assert_allclose(line(ax, "fastest: 100 steps").get_xdata(), rates[1:2])
    crosses = line(ax, "never (1 of 4)")
    assert crosses.get_marker() == "x"
    assert crosses.get_ydata()[0] > 300  # Above the last step.
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "learning_rate (log scale)")
    assert ax.get_ylabel() == "steps to train/error_rate ≤ 0.1"
    (bars,) = ax.collections
    assert [list(path.vertices[:, 1]) for path in bars.get_paths()] == [
        [100, 200],
        [0, 100],
        [0, 100],
    ]


def test_steps_to_target_of_another_hyperparameter_and_of_none():
    info = pbx.steps_to_target(study([[1, 0], [1, 0]], name="b1"), 0.0)
    assert plots.plot_steps_to_target(info).get_xlabel() == "b1 (log scale)"
    assert plots.plot_steps_to_target(info._replace(points={})).get_xlabel() == "trial"
    words = info._replace(points={"act": np.array(["relu", "gelu"])})
    ax = plots.plot_steps_to_target(words)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["gelu", "relu"]
    with pytest.raises(ValueError, match="did you mean 'b1'"):
        plots.plot_steps_to_target(info, "b2")


def noise(name, trace, norm, scale):
    rows = tuple(NoiseRow(b, trace / b, 0.05 * trace / b, 32 // b) for b in (4, 8, 16))
    return VariantNoise(name, 4, rows, trace, 0.1, norm, 0.01, scale, 1.0, 1.0, 0.0, 8)


def test_gradient_noise_crosses_the_gradient_at_the_noise_scale():
    info = GradientNoise(
        (noise("plain", 8.0, 0.5, 16.0), noise("dropout", 20.0, 0.1, float("nan"))), 8, 0
    )
    ax = plots.plot_gradient_noise(info)
    assert labels(ax) == ["plain (noise scale 16)", "dropout (noise scale not measurable)"]
    (mark,) = [x for x in ax.get_lines() if x.get_marker() == "|" and len(x.get_xdata()) == 1]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (16.0, 0.5)
    slope = ax.get_lines()[0]
    np.testing.assert_allclose(slope.get_xdata() * slope.get_ydata(), 8.0)
    silent = noise("silent", 0.0, 1.0, 0.0)
    ax = plots.plot_gradient_noise(GradientNoise((silent,), 8, 0))
    assert ax.texts[0].get_text() == "no noise"
