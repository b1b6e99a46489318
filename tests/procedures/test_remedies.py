"""compare_remedies: a fair table of remedies, and a recommendation that noise cannot make."""

import math

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax import plots
from playbook_optax.analysis.norms import NO_CLIPPING
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures import remedies
from playbook_optax.procedures.clipping import clipped_fractions
from playbook_optax.procedures.remedies import compare_remedies
from playbook_optax.procedures.scale import Scale, wobble

from .test_clipping import outliers

KEY = jax.random.key(0)
ARGUMENTS = {"key": KEY, "num_steps": 200, "eval_every": 10, "progress": False}
SPACE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-4, 0.1, scale="log")})
FIXED = ("warmup", "clipping", "warmup_and_clipping", "clipping_during_warmup")


@pytest.fixture(scope="module")
def rescued():
    """The remedies on regression with outliers."""
    return compare_remedies(
        outliers(),
        tiny_workloads.sgd,
        SPACE,
        num_trials=4,
        workloads={"no_outliers": outliers(0.0)},
        **ARGUMENTS,
    )


@pytest.fixture(scope="module")
def quadratic():
    """The remedies on a quadratic, where the limit is 2 / curvature."""
    return compare_remedies(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.25, 16.0, scale="log")}),
        num_trials=7,
        optimizers={},
        **{**ARGUMENTS, "num_steps": 100},
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_rows_are_in_the_playbooks_order(rescued):
    assert [row.remedy for row in rescued.answer.rows] == [
        "none",
        "warmup",
        "clipping",
        "adaptive_clipping",
        "warmup_and_clipping",
        "clipping_during_warmup",
        "warmup_and_adaptive_clipping",
        "optimizer/adam",
        "workload/no_outliers",
        "lower_learning_rate",
    ]


def test_clipping_rescues_from_rare_huge_gradients(rescued):
    answer = rescued.answer
    assert answer.recommended == "clipping"
    baseline, clipped = answer.row("none"), answer.row("clipping")
    assert clipped.best_value < 0.5 * baseline.best_value
    assert clipped.largest_stable_learning_rate > 9 * baseline.largest_stable_learning_rate
    # Outliers come after the warm-up too.
    warmed = answer.row("warmup")
    assert warmed.largest_stable_learning_rate == baseline.largest_stable_learning_rate
    # The workload without outliers is another one, and here the best of all.
    assert answer.row("workload/no_outliers").best_value <= clipped.best_value
    assert "remedy_recommended" in codes(rescued)


def test_on_a_quadratic_no_remedy_moves_anything(quadratic):
    answer = quadratic.answer
    assert answer.recommended is None
    assert "no_remedy_helps" in codes(quadratic)
    baseline, warmed = answer.row("none"), answer.row("warmup")
    # 0.25, 0.5, 1, 2, ...: the curvature is 1, so the limit is 2, where the sign only flips.
    assert baseline.largest_stable_learning_rate in (1.0, 2.0)
    assert warmed.largest_stable_learning_rate == baseline.largest_stable_learning_rate
    assert baseline.unstable[4:] == (True, True, True)
    assert answer.row("lower_learning_rate").learning_rates == (
        baseline.largest_stable_learning_rate,
    )


def test_where_nothing_is_unstable_nothing_is_tried():
    verdict = compare_remedies(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 1.0, scale="log")}),
        num_trials=3,
        **{**ARGUMENTS, "num_steps": 100},
    )
    assert verdict.answer.recommended is None
    assert [row.remedy for row in verdict.answer.rows] == ["none"]
    assert verdict.answer.rows[0].stable_to_end
    assert codes(verdict) == ["nothing_unstable"]
    assert verdict.cost == 3 * 100


def test_the_cost_is_what_was_trained_and_the_same_for_each(rescued, quadratic):
    sizes = {name: study.num_trials for name, study in rescued.studies.items()}
    assert sizes == {
        "none": 4,
        "warmup_and_fixed_clipping": 16,
        "adaptive_clipping": 8,
        "optimizer/adam": 4,
        "workload/no_outliers": 4,
    }
    assert rescued.cost == 36 * 200
    assert {study.spec["num_steps"] for study in rescued.studies.values()} == {200}
    assert quadratic.cost == 7 * 7 * 100
    rates = {row.learning_rates for row in quadratic.answer.rows[:-1]}
    assert len(rates) == 1


def test_adam_has_a_range_of_its_own(rescued):
    rates = np.array(rescued.answer.row("none").learning_rates)
    adam = np.array(rescued.answer.row("optimizer/adam").learning_rates)
    np.testing.assert_allclose(adam, rates / 10, rtol=1e-6)


def test_it_repeats_exactly(quadratic):
    again = compare_remedies(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.25, 16.0, scale="log")}),
        num_trials=7,
        optimizers={},
        **{**ARGUMENTS, "num_steps": 100},
    )
    # As text, because NaN is not equal to itself.
    assert repr(tuple(again.answer)) == repr(tuple(quadratic.answer))
    assert again.findings == quadratic.findings


def test_the_default_threshold_is_a_percentile_of_the_baselines_norms(rescued):
    study = rescued.studies["none"]
    norms = study.replay(study.best().trial)["gradient_norm"].values
    wanted = np.percentile(norms, 90)
    assert wanted / 2**0.25 <= rescued.answer.max_norm <= wanted * 2**0.25
    table = rescued.studies["warmup_and_fixed_clipping"].points["max_norm"]
    assert (table[:4] == np.float32(NO_CLIPPING)).all()
    np.testing.assert_allclose(table[4:], rescued.answer.max_norm, rtol=1e-6)


def test_shares_clipped_are_what_the_norms_say(rescued):
    study = rescued.studies["warmup_and_fixed_clipping"]
    fractions = clipped_fractions(study)
    clipped = rescued.answer.row("clipping")
    trial = 4 + clipped.learning_rates.index(clipped.best_learning_rate)
    norms = study.replay(trial)["gradient_norm"].values
    limit = study.point(trial)["max_norm"]
    assert clipped.clipped_fraction == fractions[trial] == np.mean(norms > limit)
    # Rows: warm-up, clipping, both, and clipping during the warm-up of 20 steps alone.
    trial = 12 + clipped.learning_rates.index(clipped.best_learning_rate)
    norms = study.replay(trial)["gradient_norm"].values
    assert study.data["norms/num_clipped"].values[trial] == np.sum(norms[:20] > limit)
    assert np.sum(norms[20:] > limit) > 0
    assert (fractions[:4] == 0).all()
    assert rescued.answer.row("none").clipped_fraction == 0


def test_the_baseline_is_the_users_own_sweep(rescued):
    row = rescued.answer.row("none")
    points = {"learning_rate": np.array(row.learning_rates, np.float32)}
    study = pbx.run_study(outliers(), tiny_workloads.sgd, points, **ARGUMENTS)
    loss = study.data["train/loss"].values
    np.testing.assert_allclose(rescued.studies["none"].data["train/loss"], loss, rtol=1e-4)


def test_warm_up_is_prepended_and_takes_its_steps_from_the_run():
    lengths = set()

    def make_schedule(point, num_steps):
        lengths.add(num_steps)
        return pbx.schedules.linear_decay(point["learning_rate"], num_steps)

    work = tiny_workloads.quadratic()
    arguments = {**ARGUMENTS, "num_steps": 50}
    verdict = compare_remedies(
        work,
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.5, 8.0, scale="log")}),
        num_trials=3,
        warmup_steps=10,
        max_norm=1.0,
        optimizers={},
        make_schedule=make_schedule,
        **arguments,
    )
    assert lengths == {50, 40}
    row = verdict.answer.row("warmup")
    assert (row.extra_steps, verdict.answer.row("none").extra_steps) == (10, 0)
    study = pbx.run_study(
        work,
        tiny_workloads.sgd,
        {"learning_rate": np.array(row.learning_rates, np.float32)},
        make_schedule=lambda point, num_steps: pbx.schedules.prepend_warmup(
            pbx.schedules.linear_decay(point["learning_rate"], 40), 10
        ),
        **arguments,
    )
    mine = verdict.studies["warmup_and_fixed_clipping"].data["valid/loss"][:3]
    np.testing.assert_allclose(mine, study.data["valid/loss"], rtol=1e-5)


def test_a_study_gives_its_range_and_its_best_hyperparameters():
    study = pbx.run_study(
        tiny_workloads.quadratic(),
        lambda point: pbx.momentum(**point),
        {
            "learning_rate": np.array([0.25, 1.0, 0.5], np.float32),
            "momentum": np.array([0.3, 0.9, 0.6], np.float32),
        },
        **{**ARGUMENTS, "num_steps": 50},
    )
    best = study.best().point
    verdict = compare_remedies(
        tiny_workloads.quadratic(),
        lambda point: pbx.momentum(**point),
        study,
        num_trials=3,
        **{**ARGUMENTS, "num_steps": 50},
    )
    points = verdict.studies["none"].points
    np.testing.assert_allclose(points["learning_rate"], [0.25, 0.5, 1.0])
    assert (points["momentum"] == best["momentum"]).all()


def test_seeds_give_the_spread():
    verdict = compare_remedies(
        outliers(0.0),
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 0.1, scale="log")}),
        num_trials=2,
        num_seeds=2,
        **ARGUMENTS,
    )
    best = verdict.studies["none"].best()
    row = verdict.answer.rows[0]
    assert (row.best_value, row.best_step) == (best.value, best.step)
    assert row.spread == pytest.approx(best.spread)
    assert verdict.cost == 2 * 2 * 200


def test_findings_hold_the_table(rescued):
    finding = next(f for f in rescued.findings if f.code == "remedies_compared")
    rows = finding.evidence["rows"]
    assert [row["remedy"] for row in rows] == [row.remedy for row in rescued.answer.rows]
    assert rows[2]["best_value"] == rescued.answer.row("clipping").best_value
    with pytest.raises(ValueError, match="did you mean 'clipping'"):
        rescued.answer.row("cliping")


# The rule of the recommendation, on rows made by hand.


def row(remedy, value, seeds=(), rates=(0.1, 1.0), unstable=(False, True), wobble=math.nan):
    return remedies.RemedyRow(
        remedy, rates[0], False, math.nan, value, 1, rates[0], 0.0, 0, math.nan, rates,
        (value, math.nan), unstable, seed_values=tuple(value + seed for seed in seeds) or (value,),
        wobble=wobble,
    )  # fmt: skip


def scale(*values, start=math.nan, maximize=False, bound=0.0, resolution=0.0, margin=0.1, **rest):
    rows = [row(f"r{i}", value, **rest) for i, value in enumerate(values)]
    return remedies._Judge(
        tuple(rows), Scale(tuple(rows), start, margin, maximize, bound, resolution)
    )


def recommend(*values, **rest):
    held = scale(*values, **rest).recommended()
    return None if held is None else held.remedy


def test_an_earlier_remedy_is_kept_unless_a_later_one_is_clearly_better():
    assert recommend(1.0, 0.95, 0.99) is None
    assert recommend(1.0, 0.8, 0.75) == "r1"
    assert recommend(1.0, 0.8, 0.7) == "r2"
    assert recommend(1.0, 1.5, 0.8) == "r2"
    # Better than the baseline, but not than what is held.
    assert recommend(1.0, 0.5, 0.8) == "r1"


def test_larger_is_better_where_the_objective_says_so():
    assert recommend(0.5, 0.52, 0.4, maximize=True) is None
    assert recommend(0.5, 0.4, 0.7, maximize=True) == "r2"


def test_of_an_accuracy_counts_what_it_lacks():
    # From 4% wrong to 2%: not within a tenth of 0.96.
    assert recommend(0.96, 0.98, maximize=True) is None
    assert recommend(0.96, 0.98, maximize=True, bound=1.0) == "r1"
    assert recommend(0.96, 0.963, maximize=True, bound=1.0) is None


def test_the_spread_over_seeds_is_noise():
    # Both have the deviation 0.115 over four seeds, so 6 degrees of freedom, where Student's t
    # exceeds 2.447 once in forty times: 2.447 * 0.115 * sqrt(2 / 4) = 0.2.
    seeds = (-0.1, -0.1, 0.1, 0.1)
    assert recommend(1.0, 0.81, seeds=seeds, margin=0.0) is None
    assert recommend(1.0, 0.79, seeds=seeds, margin=0.0) == "r1"
    # Of seven remedies one is better by chance more often.
    assert recommend(1.0, *[1.0] * 6, 0.79, seeds=seeds, margin=0.0) is None


def test_values_that_span_decades_are_compared_by_their_quotient():
    # The audit's: 0.0008 against 0.0018, after a start at 2.3.
    assert recommend(0.0018, 0.0008, start=2.3) == "r1"
    assert recommend(0.0018, 0.0014, start=2.3) is None
    seeds = (-1e-4, 0.0, 1e-4)
    assert recommend(0.0018, 0.0014, start=2.3, seeds=seeds) == "r1"
    assert recommend(0.0018, 0.0017, start=2.3, seeds=seeds) is None
    # Without decades between them, a difference: a third less is more than a tenth.
    assert recommend(1.8, 1.4, start=2.3) == "r1"


def test_evaluations_that_wobble_are_noise_of_one_seed():
    assert recommend(0.5, 0.4, start=2.3, wobble=0.01) == "r1"
    assert recommend(0.5, 0.4, start=2.3, wobble=0.06) is None
    assert recommend(0.02, 0.012, start=2.3, wobble=0.01) is None
    line = 9.0 - np.arange(4001.0)
    noise = np.random.default_rng(0).normal(size=4001)
    study = pbx.Study.from_arrays(
        {"x": [0.0, 1.0]}, {"loss": [line, noise]}, np.arange(4001), objective="loss"
    )
    assert wobble(outcomes(study), 0) == 0.0
    assert wobble(outcomes(study), 1) == pytest.approx(1.0, rel=0.1)
    short = pbx.Study.from_arrays({"x": [0.0]}, {"loss": [line[:4]]}, range(4), objective="loss")
    assert math.isnan(wobble(outcomes(short), 0))


def test_one_example_of_the_validation_set_is_no_difference():
    assert recommend(0.1, 0.08, resolution=0.02) is None
    assert recommend(0.1, 0.08, resolution=0.018) == "r1"


def test_a_value_that_is_practically_zero_is_not_improved_on():
    assert recommend(1e-12, 1e-20, start=5.0) is None


def test_anything_feasible_beats_a_baseline_that_is_not():
    assert recommend(math.nan, math.nan, 3.0) == "r2"
    assert recommend(math.nan, math.nan) is None


def test_the_largest_useful_rate_does_as_well_as_the_baseline():
    ruler = scale(1.0)
    made = row("r", 0.5, rates=(0.1, 0.2, 0.3, 0.4), unstable=(False, False, False, True))
    made = made._replace(values=(0.5, 1.05, 1.5, 0.5))
    assert ruler.with_useful_rate(made).largest_useful_learning_rate == 0.2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("warmup_steps", 200, "warmup_steps = 200 must be below num_steps = 200"),
        ("warmup_steps", 0, "warmup_steps must be >= 1"),
        ("max_norm", 0.0, "max_norm must be > 0"),
        ("percentile", 101.0, "percentile must be"),
        ("margin", -0.1, "margin must be >= 0"),
        ("num_trials", 1, "num_trials must be >= 2"),
        ("num_steps", 1, "num_steps must be >= 2"),
        ("point", {"warmup_steps": 3}, "warmup_steps"),
        ("optimizers", {"mine": 3}, "optimizers"),
        ("space_or_study", pbx.SearchSpace({"lr": pbx.Float(0.1, 1.0)}), "learning_rate"),
        ("key", 0, "key must be one random key"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(name, value, message):
    with pytest.raises(ValueError, match=message):
        compare_remedies(
            tiny_workloads.quadratic(), tiny_workloads.sgd, **{**ARGUMENTS, name: value}
        )


def test_architectures_are_compared_by_one_objective():
    other = tiny_workloads.mlp()
    with pytest.raises(ValueError, match=r"workloads\['mlp'\] has the objective"):
        compare_remedies(
            tiny_workloads.quadratic(),
            tiny_workloads.sgd,
            workloads={"mlp": other},
            **{**ARGUMENTS, "num_steps": 20},
        )


def test_the_plot_shows_every_swept_remedy(rescued):
    figure = plots.plot_remedies(rescued.answer)
    top, bottom = figure.axes
    swept = [row.remedy for row in rescued.answer.rows if len(row.learning_rates) > 1]
    labels = bottom.get_yticklabels()
    assert [label.get_text() for label in labels] == swept
    bold = [label.get_text() for label in labels if label.get_fontweight() == "bold"]
    assert bold == [rescued.answer.recommended]
    # The curve of each remedy is its table.
    curves = [line for line in top.get_lines() if len(line.get_xdata()) == 4]
    lines = [line for line in curves if line.get_marker() == "None"]
    assert len(lines) == len(swept)
    np.testing.assert_allclose(lines[2].get_ydata(), rescued.answer.row(swept[2]).values)
    # The largest stable rate of the baseline is where its mark stands.
    ends = [line.get_xdata()[0] for line in bottom.get_lines() if len(line.get_xdata()) == 1]
    assert ends[0] == rescued.answer.row("none").largest_stable_learning_rate
    plt.close(figure)
