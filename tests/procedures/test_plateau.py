"""A schedule that follows the validation error: its decisions, and that it replays to the bit."""

import jax
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.procedures import plateau_schedule
from playbook_optax.procedures.plateau import _replayed

KEY = jax.random.key(0)


def drive(workload, make_optimizer, space_or_study=None, **arguments):
    return plateau_schedule(
        workload, make_optimizer, space_or_study, key=KEY, progress=False, **arguments
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def stand_still(point):
    """Makes one update and then stands still, so that no reduction can gain anything."""
    rate = point["learning_rate"]
    return pbx.sgd(lambda count: rate(count) * (count < 1))


def decisions(curve, steps, patience, rtol, cooldown=0, maximize=False):
    """The rule as a plain loop over the recorded curve; the last evaluation decides nothing."""
    best, bad, cooling, found = None, 0, 0, []
    for step, value in zip(steps[:-1], curve[:-1], strict=True):
        loss = -float(value) if maximize else float(value)
        if best is None or loss < best - rtol * abs(best):
            best, bad = loss, 0
        else:
            bad += 1
        if cooling:
            cooling, bad = cooling - 1, 0
        elif bad >= patience:
            bad, cooling = 0, cooldown
            found.append(int(step))
    return tuple(found)


def test_the_plain_schedule_gives_the_same_run_to_the_bit():
    def make_optimizer(point):
        return pbx.adam(point["learning_rate"], b1=point["b1"])

    work = tiny_workloads.mlp()
    verdict = drive(
        work,
        make_optimizer,
        point={"learning_rate": 0.3, "b1": 0.8},
        num_steps=90,
        eval_every=4,
        factor=0.3,
        patience=3,
        rtol=0.01,
        cooldown=1,
    )
    answer, driven = verdict.answer, verdict.studies["driven"]
    assert work.objective.startswith("valid/")
    assert len(answer.boundaries) >= 2
    curve, steps = driven.data[work.objective].values[0], driven.data["step"].values
    assert answer.boundaries == decisions(curve, steps, 3, 0.01, cooldown=1)
    np.testing.assert_allclose(answer.values, 0.3 * 0.3 ** np.arange(len(answer.values)), rtol=1e-6)
    assert (answer.best_value, answer.best_step) == (driven.best().value, driven.best().step)
    assert answer.point == {"b1": 0.8}
    assert verdict.cost == 2 * 90
    # By the procedure itself, and by the user's own call with the answer alone.
    assert codes(verdict)[-2:] == ["replay_agrees", "plateau_decisions"]
    # The error was as low before the first reduction as at any time after it.
    first = steps <= answer.boundaries[0]
    assert curve[first].min() == curve[~first].min()
    assert "reductions_gained_nothing" in codes(verdict)
    for name, values in verdict.studies["replay"].data.data_vars.items():
        if "eval" in values.dims:
            np.testing.assert_array_equal(values, driven.data[name], err_msg=str(name))


def test_the_objectives_direction_is_followed():
    plain = tiny_workloads.quadratic((1.0,))
    work = pbx.Workload(
        **{
            **vars(plain),
            "evaluate": lambda p, s, d: {"valid/score": 5.0 - 0.5 * (p["w"] ** 2).sum()},
            "objective": "valid/score",
            "maximize": True,
        }
    )
    arguments = {"num_steps": 24, "eval_every": 2, "patience": 2, "rtol": 0.01, "replay": False}
    verdict = drive(work, tiny_workloads.sgd, point={"learning_rate": 0.2}, **arguments)
    driven = verdict.studies["driven"]
    curve, steps = driven.data["valid/score"].values[0], driven.data["step"].values
    assert np.all(np.diff(curve) >= 0)
    want = decisions(curve, steps, 2, 0.01, maximize=True)
    assert verdict.answer.boundaries == want
    assert len(want) >= 1
    assert verdict.cost == 24
    assert list(verdict.studies) == ["driven"]
    # A score that always rises by more than that is no plateau.
    patient = drive(
        work, tiny_workloads.sgd, point={"learning_rate": 0.01}, **{**arguments, "rtol": 1e-4}
    )
    assert patient.answer.boundaries == ()
    assert "no_plateau" in codes(patient)
    assert float(patient.answer.schedule(10)) == np.float32(0.01)


def test_the_floor_and_the_room_for_reductions():
    arguments = {"point": {"learning_rate": 1e-6}, "num_steps": 20, "eval_every": 1}
    arguments |= {"patience": 1, "rtol": 0.5, "factor": 0.5, "replay": False}
    work = tiny_workloads.quadratic()
    floor = drive(work, tiny_workloads.sgd, min_scale=0.2, **arguments).answer
    np.testing.assert_allclose(floor.values, [1e-6, 5e-7, 2.5e-7, 2e-7], rtol=1e-6)
    nothing = drive(work, stand_still, **{**arguments, "point": {"learning_rate": 0.2}})
    assert "reductions_gained_nothing" in codes(nothing)
    assert nothing.answer.best_step == 20, (
        "all evaluations are equal, and of equals the last counts"
    )
    few = drive(work, tiny_workloads.sgd, max_reductions=2, **arguments).answer
    assert few.boundaries == (1, 2)


def test_a_space_or_a_study_gives_the_point(tmp_path):
    work = tiny_workloads.quadratic()
    space = pbx.SearchSpace({"learning_rate": pbx.Float(0.05, 1.5, scale="log")})
    arguments = {"num_steps": 20, "eval_every": 2, "patience": 2, "rtol": 0.9, "replay": False}
    first = drive(work, tiny_workloads.sgd, space, num_trials=5, directory=tmp_path, **arguments)
    search = first.studies["search"]
    assert first.cost == 5 * 20 + 20
    assert first.answer.values[0] == search.best().point["learning_rate"]
    assert pbx.load_study(tmp_path / "search").num_trials == 5
    again = drive(work, tiny_workloads.sgd, search, **arguments)
    assert again.cost == 20
    assert again.answer == first.answer


def test_a_trainer_in_the_place_of_workload_and_optimizer():
    # Part of the point may be fixed.
    trainer = pbx.Trainer(
        tiny_workloads.quadratic(),
        lambda point: pbx.momentum(point["learning_rate"], point["momentum"]),
        fixed={"momentum": 0.0},
    )
    arguments = {"num_steps": 8, "eval_every": 2, "patience": 2, "rtol": 0.9, "replay": False}
    verdict = plateau_schedule(trainer, key=KEY, point={"learning_rate": 0.2}, **arguments)
    driven, answer = verdict.studies["driven"], verdict.answer
    curve, steps = driven.data["valid/loss"].values[0], driven.data["step"].values
    assert answer.boundaries == decisions(curve, steps, 2, 0.9) != ()
    assert (answer.point, list(driven.points)) == ({}, ["learning_rate"])


def test_refusals():
    work = tiny_workloads.quadratic()
    arguments = {"num_steps": 20, "eval_every": 5}
    broken = drive(work, tiny_workloads.sgd, point={"learning_rate": 1e6}, **arguments)
    assert broken.answer is None
    assert codes(broken) == ["all_infeasible"]
    assert "replay" not in broken.studies
    nothing = pbx.Study.from_arrays(
        {"learning_rate": [0.1]}, {"valid/loss": [[1.0, float("nan")]]}, [0, 1],
        objective="valid/loss",
    )  # fmt: skip
    refused = drive(work, tiny_workloads.sgd, nothing, **arguments)
    assert (refused.answer, refused.cost) == (None, 0)
    assert "all_infeasible" in codes(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give point=, a space or a finished study"),
        ({"point": {"b1": 0.9}}, r"point must have 'learning_rate'.*got \['b1'\]"),
        ({"point": {"learning_rate": 0.1}, "factor": 1.0}, "factor must be > 0 and < 1"),
        ({"point": {"learning_rate": 0.1}, "patience": 0}, "patience must be >= 1"),
        ({"point": {"learning_rate": 0.1}, "num_steps": 0}, "num_steps must be >= 1"),
        ({"point": {"learning_rate": "0.1"}}, "must be a number"),
        ({"patient": 1}, "did you mean 'patience'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        drive(tiny_workloads.quadratic(), tiny_workloads.sgd, **arguments)


def test_host_data_are_refused():
    with pytest.raises(ValueError, match="only run_study trains it"):
        drive(
            tiny_workloads.host_fed(),
            tiny_workloads.sgd,
            point={"learning_rate": 0.1},
            num_steps=4,
        )


def test_a_replay_that_differs_is_said():
    one, two = (
        pbx.Study.from_arrays(
            {"learning_rate": [0.1]}, {"valid/loss": [[1.0, end]]}, [0, 1], objective="valid/loss"
        )
        for end in (0.5, 0.5000001)
    )
    assert _replayed(one, one).code == "replay_agrees"
    found = _replayed(one, two)
    assert (found.code, found.severity) == ("replay_differs", "warning")
    assert found.evidence["largest_differences"]["valid/loss"] == pytest.approx(1e-7, rel=0.5)
