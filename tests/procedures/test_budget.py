"""How many trials: judged from a study at no cost, or from one that is run."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax import plots
from playbook_optax.analysis.budgets import budget_info
from playbook_optax.procedures import best_of_budget

KEY = jax.random.key(0)


def finished(num=64, maximize=False):
    x = (np.arange(num) + 0.5) / num
    value = (x - 0.3) ** 2
    value = -value if maximize else value
    return pbx.Study.from_arrays(
        {"x": x},
        {"loss": value[:, None]},
        [10],
        objective="loss",
        maximize=maximize,
        infeasible=x > 0.7,
    )


def test_a_study_is_judged_at_no_cost_and_the_same_in_both_directions():
    verdict = best_of_budget(None, None, finished(), key=KEY)
    assert verdict.cost == 0
    assert [f.code for f in verdict.findings] == ["enough_trials"]
    info = budget_info(finished())
    i = [row.budget for row in info.rows].index(verdict.answer)
    limit = 0.05 * (info.median_value - info.best_value)
    assert info.gain(i) <= limit < info.gain(i - 1)
    assert best_of_budget(None, None, finished(maximize=True), key=KEY).answer == verdict.answer
    assert best_of_budget(None, None, finished(), key=KEY, min_gain=1e-9).answer is None
    drawn = best_of_budget(None, None, finished(), key=KEY, num_bootstrap=2000)
    assert 0.5 < drawn.answer / verdict.answer < 2


def test_a_trainer_in_the_place_of_workload_and_optimizer():
    trainer = pbx.Trainer(tiny_workloads.quadratic(), tiny_workloads.sgd)
    verdict = best_of_budget(trainer, finished(), key=KEY)
    assert verdict.answer == best_of_budget(None, None, finished(), key=KEY).answer


def test_a_space_is_run_first():
    verdict = best_of_budget(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        tiny_workloads.SPACE,
        key=KEY,
        num_trials=32,
        num_steps=20,
        eval_every=10,
        budgets=[2, 4, 8, 16],
    )
    assert verdict.cost == 32 * 20
    study = verdict.studies["budget"]
    assert study.num_trials == 32
    assert verdict.findings[0].evidence["num_infeasible"] == int(study.data["infeasible"].sum()) > 5
    again = best_of_budget(None, None, study, key=KEY, budgets=[2, 4, 8, 16])
    assert (again.answer, again.findings) == (verdict.answer, verdict.findings)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        (tiny_workloads.SPACE, {}, "workload is None"),
        (tiny_workloads.SPACE, {"workload": tiny_workloads.quadratic()}, "make_optimizer is None"),
        (tiny_workloads.SPACE, {"workload": 1}, "workload must be a pbx.Workload"),
        ({"learning_rate": 1}, {}, "pbx.SearchSpace or a"),
        (finished(), {"min_gain": 0.0}, "min_gain must be > 0"),
        (finished(), {"key": 3}, "key"),
        (finished(), {"budget": 3}, "did you mean 'budgets'"),
    ],
)
def test_bad_arguments(given, arguments, message):
    arguments = {"workload": None, "make_optimizer": None, "key": KEY, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        best_of_budget(space_or_study=given, **arguments)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_plot_has_a_box_for_each_budget(maximize):
    info = budget_info(finished(maximize=maximize), budgets=[1, 4, 16])
    ax = plots.plot_budget(info)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "4", "16"]
    boxes = [p for p in ax.patches if p.get_width() == pytest.approx(0.6)]
    assert len(boxes) == 3
    for box, row in zip(boxes[1:], info.rows[1:], strict=True):
        ends = sorted([box.get_y(), box.get_y() + box.get_height()])
        np.testing.assert_allclose(ends, sorted([row.p25, row.p75]), atol=1e-12)
    assert boxes[0].get_linestyle() == "--"  # a quarter of the trials is infeasible
    assert [t.get_text() for t in ax.texts] == ["30%", "1%"]
    plt.close("all")


def test_nothing_to_draw_still_draws():
    study = pbx.Study.from_arrays(
        {"x": [1.0, 2.0]}, {"loss": [[1.0], [1.0]]}, [10], objective="loss", infeasible=[True, True]
    )
    assert plots.plot_budget(budget_info(study)).get_xlabel() == "number of trials"
    plt.close("all")
