import ast
import json
from pathlib import Path

import numpy as np
import pytest

import playbook_optax.analysis
from playbook_optax.analysis.diagnose import RULES, diagnose
from playbook_optax.analysis.findings import SEVERITIES
from playbook_optax.records.study import Study
from playbook_optax.search_space import Float, SearchSpace


def codes(found):
    return [f.code for f in found]


def sentences(text):
    return (
        text == ""
        or (text[0].isupper() and text.endswith("."))
        or text[0].isdigit()
        or (text.split()[0] in ("b1", "learning_rate"))
    )


def test_healthy_study_says_so(make_study):
    found = diagnose(make_study(1, num_trials=64, b1_effect=0.6))
    assert found[0].code == "healthy"
    assert (
        found[0].evidence["best_trial"] == make_study(1, num_trials=64, b1_effect=0.6).best().trial
    )
    assert all(f.severity == "info" for f in found)


def test_all_infeasible_is_one_error_with_a_lower_range():
    study = Study.from_arrays(
        {"learning_rate": np.logspace(0, 2, 6)},
        {"train/loss": np.array([[2.0, np.nan, np.nan]] * 6)},
        [0, 10, 20],
        objective="train/loss",
        space=SearchSpace({"learning_rate": Float(1.0, 100.0, scale="log")}),
    )
    (found,) = diagnose(study)
    assert (found.code, found.severity) == ("all_infeasible", "error")
    assert found.evidence["by_reason"] == {"nonfinite_loss": 6}
    assert "Lower the range of learning_rate: from [1, 100] to [0.01, 1]" in found.suggestion


def test_feasible_trials_without_a_value():
    study = Study.from_arrays(
        {"x": [1.0, 2.0]},
        {"loss": np.ones((2, 2)), "other": np.full((2, 2), np.nan)},
        [0, 10],
        objective="loss",
    )
    assert codes(diagnose(study, "other"))[0] == "no_finite_objective"


@pytest.mark.parametrize(
    ("num_bad", "code", "severity"),
    [(0, None, None), (1, "some_infeasible", "info"), (10, "many_infeasible", "warning")],
)
def test_share_of_infeasible_trials(num_bad, code, severity):
    x = np.arange(20.0)
    study = Study.from_arrays(
        {"x": x}, {"loss": np.ones((20, 2))}, [0, 10], objective="loss", infeasible=x < num_bad
    )
    found = [f for f in diagnose(study) if f.code.endswith("_infeasible") and "edge" not in f.code]
    assert [(f.code, f.severity) for f in found] == ([(code, severity)] if code else [])
    for finding in found:
        assert finding.evidence["share"] == num_bad / 20


def test_objective_after_the_fact_reaches_every_rule(make_study):
    study = make_study(2, optimum=1.3, drift=0.4)
    by_loss = diagnose(study)
    by_accuracy = diagnose(study, "valid/accuracy", maximize=True)
    assert codes(by_loss) == codes(by_accuracy)
    assert {"best_near_boundary", "still_improving"} <= set(codes(by_loss))
    backwards = diagnose(study, "valid/accuracy", maximize=False)
    assert codes(backwards) != codes(by_accuracy)
    for rule in RULES:
        rule.inform(study, "valid/accuracy", True)
        with pytest.raises(ValueError, match="was not recorded"):
            rule.inform(study, "valid/acc", True)


def test_findings_are_ordered_complete_and_storable(make_study):
    seen = set()
    for study in (
        make_study(0, optimum=1.3, fails_above=0.7),
        make_study(0, optimum=1.0, fails_above=0.4, drift=0.4),
        make_study(0, num_trials=6, num_evals=4),
        make_study(3, num_trials=64, settle=0.01, num_evals=41),
        make_study(0, space=None),
        make_study(0, optimum=1.3),
    ):
        found = diagnose(study)
        ranks = [SEVERITIES.index(f.severity) for f in found]
        assert ranks == sorted(ranks)
        for finding in found:
            json.dumps(finding.to_dict(), allow_nan=False)
            assert finding.section
            assert sentences(finding.message)
            assert sentences(finding.suggestion)
            seen.add(finding.code)
    assert {
        "best_near_boundary",
        "best_at_edge_of_infeasible",
        "many_infeasible",
        "still_improving",
        "saturated_early",
        "boundary_check_skipped",
        "curve_check_skipped",
        "importance_cannot_tell",
        "insensitive_hyperparameter",
        "healthy",
    } <= seen


def test_what_was_not_judged_is_said_once():
    study = Study.from_arrays({"x": [1.0, 2.0]}, {"error": [[0.5], [0.4]]}, [10], objective="error")
    found = codes(diagnose(study))
    assert sorted(c for c in found if c.endswith("_skipped")) == [
        "boundary_check_skipped",
        "curve_check_skipped",
        "high_loss_check_skipped",
        "instability_check_skipped",
    ]
    healthy = diagnose(study)[0]
    assert "not checked: instability, boundary, curve, high_loss" in healthy.message


def test_seeds_use_their_mean(make_study):
    single = make_study(0, optimum=1.3)
    curve = single.data["valid/loss"].values
    shift = np.random.default_rng(0).normal(size=(32, 1, 1))
    seeds = np.concatenate([curve[:, None] + shift, curve[:, None] - shift], axis=1)
    study = Study.from_arrays(
        single.points,
        {"valid/loss": seeds},
        single.data["step"].values,
        objective="valid/loss",
        space=single.space,
    )
    assert codes(diagnose(study))[0] == "best_near_boundary"
    assert diagnose(study)[0].evidence["best_trial"] == single.best().trial


def test_nothing_to_diagnose_is_an_error_finding():
    from playbook_optax.records.study import study_from_blocks

    spec = {"num_trials": 4, "num_seeds": 1, "step": [0], "objective": "loss", "maximize": False}
    (found,) = diagnose(study_from_blocks(spec, []))
    assert (found.code, found.severity) == ("no_trials", "error")


def test_unknown_argument_names_the_nearest(make_study):
    with pytest.raises(TypeError, match="did you mean 'objective'"):
        diagnose(make_study(), objectiv="loss")


def test_analysis_never_imports_training():
    for path in Path(playbook_optax.analysis.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert not name.startswith(
                    tuple(f"playbook_optax.{floor}" for floor in ("trials", "runner", "procedures"))
                ), f"{path.name} imports {name}"


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_trials_that_ended_early_are_compared_by_what_they_have(num_seeds):
    time = np.linspace(0, 1, 41)
    rng = np.random.default_rng(0)
    rates = np.geomspace(1e-3, 1.0, 12)
    ends = 0.2 + 0.1 * (np.log10(rates) + 1.5) ** 2
    curve = ends[:, None, None] + 2 * np.exp(-time / 0.05) + 0 * np.ones((1, num_seeds, 1))
    curve = curve + 0.005 * rng.normal(size=curve.shape)
    train = 0.8 * curve
    for trial, length in enumerate([2, 5, 9, 12, 3, 12, 16, 20, 24, 28, 40]):
        curve[trial, :, length + 1 :] = np.nan
        train[trial, :, length + 1 :] = np.nan
    study = Study.from_arrays(
        {"learning_rate": rates},
        {"valid/loss": curve, "train/loss": train},
        (1000 * time).astype(int),
        objective="valid/loss",
        space=SearchSpace({"learning_rate": Float(1e-3, 1.0, scale="log")}),
    )
    assert not study.data["infeasible"].values.any()
    found = diagnose(study)
    assert "divergence_check_skipped" in codes(found)
    assert found[0].severity != "error"
    best = int(np.nanmin(curve.mean(axis=1), axis=1).argmin())
    assert study.best().trial == best
    for rule in RULES:
        rule.conclude(rule.inform(study, None, None))
