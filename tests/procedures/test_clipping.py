"""choose_clip_threshold: a percentile of the norms on record, verified, or refused with reasons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax.procedures import clipping
from playbook_optax.procedures.clipping import choose_clip_threshold

KEY = jax.random.key(0)
# A bin of the histogram of norms is this wide.
BIN = 2**0.25


def thresholds_of(verdict):
    (finding,) = [f for f in verdict.findings if f.code == "clip_thresholds"]
    return finding.evidence


def chosen_row(verdict):
    return thresholds_of(verdict)["chosen"]


def outliers(strength=600.0):
    """Linear regression in which one step in 25 has a gradient that is far too large.

    The loss itself shows nothing: what is added to it is zero, but for its gradient. A fourth power
    makes far away places steep, so that whoever is thrown there diverges.
    """
    true = np.array([1.0, -2.0, 0.5], np.float32)

    def batch(data, key, step):
        x = jax.random.normal(jax.random.fold_in(key, step), (16, 3))
        noise = 0.3 * jax.random.normal(jax.random.fold_in(key, step + 10**6), (16,))
        return x, x @ data + noise, jnp.where(step % 25 == 4, strength, 0.0)

    def loss(params, state, batch, key):
        x, y, push = batch
        outlier = push * jnp.mean(x @ params["w"])
        far = jnp.sum((params["w"] - true) ** 2) ** 2
        value = 0.5 * jnp.mean((x @ params["w"] - y) ** 2) + 0.01 * far
        return value + outlier - jax.lax.stop_gradient(outlier), (state, {})

    return pbx.Workload(
        name="outliers",
        init=lambda key: ({"w": jnp.zeros(3)}, {}),
        loss=loss,
        batch=batch,
        evaluate=lambda params, state, data: {
            "train/loss": 0.5 * jnp.sum((params["w"] - data) ** 2) + 0.05
        },
        objective="train/loss",
        data=true,
    )


ARGUMENTS = {"key": KEY, "num_steps": 200, "eval_every": 10, "progress": False}
SPACE = pbx.SearchSpace({"learning_rate": pbx.Float(1e-5, 1.0, scale="log")})


@pytest.fixture(scope="module")
def swept():
    """A sweep, its threshold, and all that was trained for it."""
    return choose_clip_threshold(
        outliers(), tiny_workloads.sgd, SPACE, num_trials=6, learning_rate=0.1, **ARGUMENTS
    )


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def test_the_threshold_is_the_percentile_of_the_best_trial_of_the_sweep(swept):
    study = swept.studies["learning_rate_sweep"]
    best = study.best()
    norms = study.replay(best.trial)["gradient_norm"].values
    evidence = next(f for f in swept.findings if f.code == "clip_thresholds").evidence
    assert evidence["norms_of_trial"] == best.trial
    tried = evidence["thresholds"][1:]
    assert [row["percentile"] for row in tried] == [90.0, 75.0, 50.0, 25.0, 10.0, 5.0]
    for row in tried:
        wanted = np.percentile(norms, row["percentile"])
        assert wanted / BIN <= row["max_norm"] <= wanted * BIN
    assert evidence["stable_learning_rate"] == pytest.approx(float(best.point["learning_rate"]))
    assert evidence["stable_best_value"] == best.value


def test_clipping_rescues_the_wanted_learning_rate(swept):
    rows = next(f for f in swept.findings if f.code == "clip_thresholds").evidence["thresholds"]
    assert rows[0]["max_norm"] == "inf"
    assert rows[0]["unstable"]
    assert rows[0]["clipped_fraction"] == 0.0
    assert thresholds_of(swept)["learning_rate"] == 0.1
    assert chosen_row(swept)["clipped_fraction"] < clipping.AGGRESSIVE
    # Without clipping no learning rate learns; the loss starts at 2.7 and its floor is 0.05.
    assert chosen_row(swept)["best_value"] < 0.2
    assert chosen_row(swept)["best_value"] < 0.5 * swept.studies["learning_rate_sweep"].best().value
    first_stable = next(row for row in rows[1:] if not row["unstable"])
    assert first_stable["max_norm"] == swept.answer
    assert "lower_the_learning_rate" not in codes(swept)


def test_the_share_clipped_is_what_the_norms_say(swept):
    study = swept.studies["clip_thresholds"]
    rates = clipping.clipped_fractions(study)
    for trial in (1, study.num_trials - 1):
        norms = study.replay(trial)["gradient_norm"].values
        limit = study.point(trial)["max_norm"]
        assert rates[trial] == np.mean(norms[np.isfinite(norms)] > limit)
    chosen = int(np.argmin(np.abs(study.points["max_norm"] - swept.answer)))
    assert chosen_row(swept)["clipped_fraction"] == rates[chosen]
    assert rates[0] == 0.0


def test_it_repeats_exactly_and_counts_what_it_trained(swept):
    again = choose_clip_threshold(
        outliers(), tiny_workloads.sgd, SPACE, num_trials=6, learning_rate=0.1, **ARGUMENTS
    )
    assert again.answer == swept.answer
    assert again.findings == swept.findings
    trials = [study.num_trials for study in swept.studies.values()]
    assert trials == [6, 7]
    assert swept.cost == sum(trials) * 200


def test_a_given_study_is_read_and_not_trained_again(swept):
    study = swept.studies["learning_rate_sweep"]
    # The study's own max_norm is a hyperparameter like any other, and would be decided twice.
    with pytest.raises(ValueError, match="max_norm"):
        choose_clip_threshold(outliers(), tiny_workloads.sgd, study, **ARGUMENTS)
    given = pbx.run_study(
        outliers(),
        tiny_workloads.sgd,
        {"learning_rate": study.points["learning_rate"]},
        **ARGUMENTS,
    )
    verdict = choose_clip_threshold(
        outliers(), tiny_workloads.sgd, given, learning_rate=0.1, **ARGUMENTS
    )
    assert verdict.answer == pytest.approx(swept.answer, rel=1e-4)
    assert set(verdict.studies) == {"given", "clip_thresholds"}
    assert verdict.cost == 7 * 200


def test_the_wanted_rate_is_by_default_the_smallest_unstable_one_above_the_best():
    rates = np.array([0.5, 1.5, 2.5, 4.0], np.float32)
    study = pbx.run_study(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        {"learning_rate": rates},
        **{**ARGUMENTS, "num_steps": 40},
    )
    # A failure below the best rate is no reason to train there.
    infeasible = study.data["infeasible"].copy(data=[True, False, True, True])
    study = dataclasses.replace(study, data=study.data.assign(infeasible=infeasible))
    verdict = choose_clip_threshold(
        tiny_workloads.quadratic(), tiny_workloads.sgd, study, **{**ARGUMENTS, "num_steps": 40}
    )
    evidence = verdict.findings[-1].evidence
    assert evidence["learning_rate"] == 2.5
    assert evidence["stable_learning_rate"] == 1.5


def test_clipping_most_updates_is_called_a_lower_learning_rate():
    verdict = choose_clip_threshold(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        pbx.SearchSpace({"learning_rate": pbx.Float(0.25, 4.0, scale="log")}),
        num_trials=5,
        **{**ARGUMENTS, "num_steps": 40},
    )
    assert chosen_row(verdict)["clipped_fraction"] > 0.5
    finding = verdict.findings[0]
    assert (finding.code, finding.severity) == ("lower_the_learning_rate", "warning")
    best = verdict.studies["learning_rate_sweep"].best()
    assert finding.evidence["clipped_fraction"] == chosen_row(verdict)["clipped_fraction"]
    assert finding.evidence["learning_rate"] == thresholds_of(verdict)["learning_rate"]
    assert finding.evidence["proposed_learning_rate"] == float(best.point["learning_rate"])


def test_half_of_the_updates_is_not_yet_aggressive():
    assert clipping.AGGRESSIVE == 0.5
    finding = clipping.lower_instead(0.75, 0.2, None)
    assert "75%" in finding.message
    assert finding.evidence["proposed_learning_rate"] is None


def judged(curves, max_norms):
    """What is said of trials with these training losses, evaluated at the same steps."""
    step = np.arange(0, 201, 10)
    study = pbx.Study.from_arrays(
        {"learning_rate": [0.1] * len(curves), "max_norm": max_norms},
        {"train/loss": curves},
        step,
        objective="train/loss",
        infeasible=np.zeros(len(curves), bool),
    )
    counts = {
        f"norms/num_{what}": ("trial", np.full(len(curves), n))
        for what, n in (("clipped", 20), ("steps", 100))
    }
    study = dataclasses.replace(study, data=study.data.assign(counts))
    known = {"learning_rate": 0.1, "stable_learning_rate": None, "stable_best_value": None}
    return clipping.judge_thresholds(study, [100.0, 90.0, 50.0, 10.0], known)


def test_a_larger_threshold_that_is_stable_by_luck_is_not_chosen():
    calm = 0.1 + 2 * np.exp(-np.arange(21) / 3.0)
    broken = calm + np.where(np.arange(21) == 10, 9.0, 0.0)
    none = 1e38
    assert judged([broken, broken, calm, calm], [none, 3.0, 2.0, 1.0])[0] == 2.0
    assert judged([broken, calm, broken, calm], [none, 3.0, 2.0, 1.0])[0] == 1.0
    answer, findings = judged([broken, calm, calm, broken], [none, 3.0, 2.0, 1.0])
    assert (answer, findings[0].code) == (None, "clipping_is_not_enough")
    answer, findings = judged([calm, broken, calm, calm], [none, 3.0, 2.0, 1.0])
    assert (answer, findings[0].code) == (None, "no_instability")


def quadratic_run(**arguments):
    return choose_clip_threshold(
        tiny_workloads.quadratic(),
        tiny_workloads.sgd,
        **{**ARGUMENTS, "num_steps": 40, **arguments},
    )


def test_a_stable_rate_needs_no_clipping():
    verdict = quadratic_run(learning_rate=0.5)
    assert verdict.answer is None
    assert codes(verdict) == ["no_instability"]
    assert verdict.cost == 40


def test_a_sweep_without_instability_needs_no_clipping():
    low = pbx.SearchSpace({"learning_rate": pbx.Float(0.01, 1.0, scale="log")})
    verdict = quadratic_run(space_or_study=low, num_trials=3)
    assert verdict.answer is None
    assert codes(verdict) == ["no_instability"]
    assert verdict.cost == 3 * 40


def test_a_sweep_that_diverges_everywhere_has_no_threshold():
    high = pbx.SearchSpace({"learning_rate": pbx.Float(30.0, 300.0, scale="log")})
    verdict = quadratic_run(space_or_study=high, num_trials=3)
    assert verdict.answer is None
    assert codes(verdict) == ["all_infeasible"]


def test_a_rate_that_no_threshold_can_hold_is_refused():
    verdict = quadratic_run(learning_rate=1e6)
    assert verdict.answer is None
    assert codes(verdict) == ["clipping_is_not_enough"]
    assert all(row["unstable"] for row in verdict.findings[0].evidence["thresholds"])


def test_a_study_without_norms_has_no_threshold():
    study = pbx.Study.from_arrays(
        {"learning_rate": np.array([0.1, 1.0])},
        {"valid/loss": np.array([[2.0, 1.0], [2.0, 0.5]])},
        np.array([0, 40]),
        objective="valid/loss",
    )
    verdict = quadratic_run(space_or_study=study)
    assert verdict.answer is None
    assert codes(verdict) == ["no_norms_recorded"]
    assert verdict.cost == 0


def test_user_functions_see_only_their_own_hyperparameters():
    seen = set()

    def make_optimizer(point):
        seen.add(tuple(point))
        return pbx.momentum(**point)

    def make_schedule(point, num_steps):
        seen.add(tuple(point))
        return pbx.schedules.constant(point["learning_rate"])

    def workload(point):
        seen.add(tuple(sorted(point, reverse=True)))
        return tiny_workloads.quadratic()

    verdict = choose_clip_threshold(
        workload,
        make_optimizer,
        point={"momentum": 0.5, "learning_rate": 30.0},
        make_schedule=make_schedule,
        **{**ARGUMENTS, "num_steps": 40},
    )
    assert {frozenset(names) for names in seen} == {frozenset(("learning_rate", "momentum"))}
    assert verdict.studies["unclipped"].point(0)["momentum"] == 0.5


def test_studies_are_stored_each_in_its_folder(tmp_path):
    verdict = quadratic_run(learning_rate=2.5, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip_thresholds", "unclipped"]
    stored = pbx.load_study(tmp_path / "clip_thresholds")
    assert stored.data.equals(verdict.studies["clip_thresholds"].data)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("percentile", 0.0, "percentile must be > 0"),
        ("percentile", 100.0, "below|< 100"),
        ("learning_rate", -1.0, "learning_rate must be > 0"),
        ("num_steps", 0, "num_steps must be >= 1"),
        ("num_trials", 1, "num_trials must be >= 2"),
        ("num_seeds", 0, "num_seeds must be >= 1"),
        ("point", {"max_norm": 1.0}, "max_norm"),
        ("point", {"momentum": "0.9"}, "momentum"),
        ("space_or_study", pbx.SearchSpace({"lr": pbx.Float(0.1, 1.0)}), "learning_rate"),
        ("key", 0, "key must be one random key"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(name, value, message):
    with pytest.raises(ValueError, match=message):
        choose_clip_threshold(
            tiny_workloads.quadratic(), tiny_workloads.sgd, **{**ARGUMENTS, name: value}
        )


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(TypeError, match="percentile"):
        choose_clip_threshold(
            tiny_workloads.quadratic(), tiny_workloads.sgd, percentil=90.0, **ARGUMENTS
        )
