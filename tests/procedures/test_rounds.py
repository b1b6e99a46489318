"""The next round: lengths, what is fixed, narrowed or widened, and the schedule carried over."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tiny_workloads

import playbook_optax as pbx
from playbook_optax import schedules
from playbook_optax.analysis.axes import axis, to_scale
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures import plan_next_round, round_lengths
from playbook_optax.procedures.controls import controlled
from playbook_optax.procedures.rounds import MIN_WIDTH, _narrowed, transfer_kind
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace

KEY = jax.random.key(0)
OTHERS = {
    "weight_decay": Float(1e-6, 1e-2, scale="log"),
    "b1": Float(0.5, 0.99, scale="reverse_log"),
    "warmup_steps": Integer(10, 1000, scale="log", include_zero=True),
    "decay_fraction": Float(0.1, 1.0),
    "schedule_end": Float(0.0, 0.1),
}


def made(space, optimum, num_trials=64, seed=0, failing=None):
    """A bowl around unit positions `optimum`; 100 steps of training."""
    space = SearchSpace(space)
    points = space.sample(jax.random.key(seed), num_trials)
    unit = {name: np.asarray(space[name].to_unit(values)) for name, values in points.items()}
    loss = 1.0 + sum((unit[name] - at) ** 2 for name, at in optimum.items())
    end = loss if failing is None else np.where(failing(unit), np.nan, loss)
    curve = np.stack([np.full(num_trials, 4.0), loss + 0.5, end], axis=1)
    return pbx.Study.from_arrays(
        {name: np.asarray(values) for name, values in points.items()},
        {"valid/loss": curve},
        [0, 50, 100],
        objective="valid/loss",
        space=space,
    )


RATE = {"learning_rate": Float(1e-4, 1.0, scale="log")}


def plan(study, **arguments):
    return plan_next_round(None, None, study, key=KEY, **arguments)


def linear(point, num_steps):
    return schedules.linear_decay(point["learning_rate"], num_steps)


def codes(verdict):
    return [finding.code for finding in verdict.findings]


def share(new, old):
    """Width of a range as a share of the old one, on its scale, and its two ends on it."""
    low, high = (float(old.to_unit(np.float32(end))) for end in (new.low, new.high))
    return high - low, low, high


def test_round_lengths():
    assert round_lengths(1000) == [100, 1000]
    assert round_lengths(1000, 1) == [1000]
    assert round_lengths(10_000, 3, first_fraction=0.01) == [100, 1000, 10_000]
    assert round_lengths(1, 3) == [1]
    with pytest.raises(ValueError, match="num_rounds must be 1 to 3, got 4"):
        round_lengths(1000, 4)
    with pytest.raises(ValueError, match="first_fraction must be > 0 and < 1"):
        round_lengths(1000, first_fraction=1.0)


@pytest.mark.parametrize(
    ("name", "kind", "confidence"),
    [
        ("learning_rate", "learning_rate", "might"),
        ("warmup_steps", "warmup", "very likely"),
        ("init_scale", "initialization", "very likely"),
        ("b1", "optimizer", "might"),
        ("eps", "optimizer", "might"),
        ("momentum", "optimizer", "might"),
        ("decay", "optimizer", "might"),
        ("weight_decay", "regularization", "might"),
        ("dropout_rate", "regularization", "might"),
        ("label_smoothing", "regularization", "might"),
        ("augmentation_strength", "augmentation", "might"),
        ("decay_steps", "schedule", "unlikely"),
        ("lr_schedule", "schedule", "unlikely"),
        ("width", "architecture", "likely"),
        ("zeta", "unknown", "might"),
    ],
)
def test_what_transfers_and_how_surely(name, kind, confidence):
    assert transfer_kind(name)[1:3] == (kind, confidence)


def test_kinds_override_names():
    assert transfer_kind("b1", {"b1": "schedule"}).confidence == "unlikely"
    with pytest.raises(ValueError, match=r"kinds\['b1'\] = 'optimiser' is unknown.*'optimizer'"):
        transfer_kind("b1", {"b1": "optimiser"})
    with pytest.raises(ValueError, match=r"kinds has 'learning_rat'.*'learning_rate'"):
        plan(made(RATE, {"learning_rate": 0.5}), kinds={"learning_rat": "optimizer"})


def test_the_whole_plan():
    space = {**RATE, **OTHERS}
    optimum = {"learning_rate": 0.6, "b1": 0.3, "warmup_steps": 0.5}
    study = made(space, optimum, num_trials=200)
    verdict = plan(study, production_steps=1000, make_schedule=linear)
    answer = verdict.answer
    assert (answer.num_steps, answer.num_trials, verdict.cost) == (1000, 20, 0)
    assert list(answer.fixed) == ["warmup_steps"]
    assert answer.fixed["warmup_steps"] == study.best().point["warmup_steps"]
    assert list(answer.space) == [n for n in space if n != "warmup_steps"]
    for name in ("decay_fraction", "schedule_end"):
        assert answer.space[name] == space[name], "what is unlikely to transfer keeps its range"
    for name in ("learning_rate", "b1"):
        width, low, high = share(answer.space[name], space[name])
        assert MIN_WIDTH * 0.95 <= width < 0.8
        assert low < optimum[name] < high
    rows = {row.name: row for row in answer.transfers}
    assert list(rows) == list(space)
    assert rows["warmup_steps"].confidence == "very likely"
    assert rows["schedule_end"].confidence == "unlikely"
    (finding,) = (f for f in verdict.findings if f.code == "next_round")
    assert finding.evidence["fixed"] == {"warmup_steps": int(answer.fixed["warmup_steps"])}


@pytest.mark.parametrize("optimum", [0.15, 0.5, 0.85])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "b1", "plain", "count"])
def test_a_range_is_narrowed_on_its_own_scale(name, optimum):
    space = {**RATE, **OTHERS, "plain": Float(-1.0, 3.0), "count": Integer(1, 500, scale="log")}
    study = made({name: space[name]}, {name: optimum})
    new = plan(study).answer.space[name]
    width, low, high = share(new, space[name])
    assert low < optimum < high
    assert 0.9 * MIN_WIDTH < width < 0.45
    assert (type(new), new.scale) == (type(space[name]), space[name].scale)
    assert new.low >= space[name].low
    assert new.high <= space[name].high


RANGES = {
    "linear": st.tuples(st.floats(-1e3, 1e3), st.floats(1e-2, 1e3)).map(
        lambda ends: Float(ends[0], ends[0] + ends[1])
    ),
    "log": st.tuples(st.floats(1e-8, 1e3), st.floats(1.05, 1e6)).map(
        lambda ends: Float(ends[0], ends[0] * ends[1], scale="log")
    ),
    "reverse_log": st.tuples(st.floats(1e-4, 0.5), st.floats(1.1, 1e3)).map(
        lambda ends: Float(1 - min(ends[0] * ends[1], 1.0), 1 - ends[0], scale="reverse_log")
    ),
    "integer": st.tuples(st.integers(-50, 50), st.integers(1, 1000)).map(
        lambda ends: Integer(ends[0], ends[0] + ends[1])
    ),
    "log integer": st.tuples(st.integers(1, 50), st.integers(1, 1000), st.booleans()).map(
        lambda ends: Integer(ends[0], ends[0] + ends[1], scale="log", include_zero=ends[2])
    ),
}


@pytest.mark.parametrize("kind", RANGES)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_any_range_keeps_its_good_trials_its_ends_and_its_width(kind, data):
    old = data.draw(RANGES[kind])
    unit = data.draw(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6))
    values = np.asarray(old.from_unit(np.asarray(unit, np.float32)))
    loss = np.arange(6.0)
    study = pbx.Study.from_arrays(
        {"x": values},
        {"valid/loss": np.stack([loss + 9, loss], axis=1)},
        [0, 10],
        objective="valid/loss",
        space=SearchSpace({"x": old}),
    )
    line, out = axis(study, "x"), outcomes(study)
    new = _narrowed(line, old, out, out.good(), MIN_WIDTH, None)
    good = values[out.good()]
    zero = getattr(new, "include_zero", False)
    assert ((good >= np.float32(new.low)) | ((good == 0) & zero)).all()
    assert (good <= np.float32(new.high)).all()
    assert old.low <= new.low < new.high <= old.high
    first, last = to_scale([line.start, old.high], line.scale)
    start = new.low / 2 if zero else new.low
    width = np.diff(to_scale([start, new.high], line.scale))[0] / (last - first)
    assert width >= MIN_WIDTH - 0.06


def test_never_narrower_than_told():
    study = made(RATE, {"learning_rate": 0.5}, num_trials=200)
    widths = [
        share(plan(study, min_width=w, num_best=1).answer.space["learning_rate"], *RATE.values())[0]
        for w in (0.1, 0.5, 1.0)
    ]
    np.testing.assert_allclose(widths, [0.2, 0.5, 1.0], atol=0.02)


@pytest.mark.parametrize(("optimum", "edge"), [(-0.1, "low"), (1.1, "high")])
def test_a_crowded_edge_is_moved_outwards(optimum, edge):
    study = made(RATE, {"learning_rate": optimum})
    verdict = plan(study)
    new = verdict.answer.space["learning_rate"]
    assert "best_near_boundary" in codes(verdict)
    if edge == "low":
        assert new.low < 1e-4
        assert new.high < 0.1
    else:
        assert new.high > 1.0
        assert new.low > 1e-3


def test_an_edge_of_stability_is_not_one_of_the_space():
    """The good trials lie at the edge, but half of those around them fail."""

    def failing(unit):
        at = unit["learning_rate"]
        return (at > 0.97) | ((at > 0.75) & (at < 0.92))

    verdict = plan(made(RATE, {"learning_rate": 0.95}, failing=failing))
    assert verdict.answer.space["learning_rate"].high == 1.0


def test_a_warmup_of_zero_stays_possible_only_near_it():
    space = {"steps": OTHERS["warmup_steps"]}
    near = plan(made(space, {"steps": 0.02})).answer.space["steps"]
    far = plan(made(space, {"steps": 0.7})).answer.space["steps"]
    assert near.include_zero
    assert not far.include_zero
    assert far.low > 10


def test_choices():
    numbers = SearchSpace({"batches": Categorical([1, 2, 4, 8]), "half": Categorical([1, 0.5, 2])})
    names = SearchSpace({"activation": Categorical(["relu", "gelu", "tanh"])})
    study = made({**numbers, **names}, {"batches": 0.9})
    new = plan(study, num_best=2).answer.space
    assert 8 in new["batches"].values
    assert len(new["batches"].values) < 4
    assert new["half"].from_unit(0.0).dtype == np.float32
    assert new["activation"] == names["activation"], "an index must keep its meaning"


def test_something_is_always_searched():
    study = made({"warmup_steps": Integer(0, 100)}, {"warmup_steps": 0.5})
    answer = plan(study).answer
    assert list(answer.space) == ["warmup_steps"]
    assert answer.fixed == {}


def test_with_fixed_and_a_schedule_of_all_hyperparameters():
    study = made({**RATE, "warmup_steps": Integer(10, 40)}, {"learning_rate": 0.5})

    def warmed(point, num_steps):
        warm = point["warmup_steps"]
        return schedules.prepend_warmup(
            schedules.linear_decay(point["learning_rate"], num_steps - warm), warm
        )

    answer = plan(study, num_steps=500, make_schedule=warmed).answer
    warm = int(answer.fixed["warmup_steps"])
    schedule = answer.make_schedule({"learning_rate": 1.0}, 500)
    counts = np.array([0, warm, 399 + warm, 450, 500])
    decay = 100 - warm
    want = np.clip(np.minimum(counts / warm, (500 - counts) / decay), 0, 1)
    np.testing.assert_allclose(schedule(counts), want, rtol=1e-5, atol=1e-6)
    whole = answer.with_fixed(lambda point: point)({"learning_rate": 1.0})
    assert whole == {"learning_rate": 1.0, "warmup_steps": warm}


def test_a_trainer_says_the_schedule_of_the_round_and_what_it_needs():
    study = made(RATE, {"learning_rate": 0.5})

    def ending(point, num_steps):
        return schedules.linear_decay(point["learning_rate"], num_steps, end_value=point["end"])

    trainer = pbx.Trainer(
        tiny_workloads.quadratic(), tiny_workloads.sgd, ending, fixed={"end": 0.0}
    )
    verdict = plan_next_round(trainer, study, key=KEY, num_steps=1000)
    want = plan(study, num_steps=1000, make_schedule=linear)
    assert verdict.answer.space == want.answer.space
    assert codes(verdict) == codes(want)
    point, counts = {"learning_rate": 0.3, "end": 0.1}, np.arange(0, 1001, 10)
    np.testing.assert_allclose(
        verdict.answer.make_schedule(point, 1000)(counts),
        schedules.linear_decay(0.3, 100, hold_steps=900, end_value=0.1)(counts),
        rtol=1e-6,
    )


@pytest.mark.parametrize("family", ["linear_decay", "cosine_decay"])
def test_schedules_are_carried_over_by_their_rules(family):
    """A linear decay keeps its length; a cosine keeps the base rate and is stretched."""
    study = made(RATE, {"learning_rate": 0.5})
    make = getattr(schedules, family)

    def old(point, num_steps):
        return make(point["learning_rate"], num_steps)

    verdict = plan(study, num_steps=1000, make_schedule=old)
    got = verdict.answer.make_schedule({"learning_rate": 0.3}, 1000)
    if family == "linear_decay":
        want = make(0.3, 100, hold_steps=900)
    else:
        want = make(0.3, 1000)
    counts = np.arange(0, 1001, 10)
    np.testing.assert_allclose(got(counts), want(counts), rtol=1e-6)
    assert "too_small_learning_rate" not in codes(verdict)


def test_the_pitfall_is_found_in_a_schedule_of_ones_own():
    study = made(RATE, {"learning_rate": 0.5})
    common = {"num_steps": 1000, "make_schedule": linear}
    wrong = plan(study, longer_schedule=linear, **common)
    (finding,) = (f for f in wrong.findings if f.code == "too_small_learning_rate")
    assert finding.severity == "warning"
    assert finding.evidence["excess_share"] == pytest.approx(0.2, abs=0.01)
    right = plan(
        study,
        longer_schedule=lambda p, n: schedules.linear_decay(p["learning_rate"], 100, n - 100),
        **common,
    )
    assert "too_small_learning_rate" not in codes(right)
    flat = plan(study, longer_schedule=lambda p, n: schedules.constant(0.1), **common)
    assert "constant_schedule" in codes(flat)


def test_a_schedule_without_a_rule_is_a_refusal():
    study = made(RATE, {"learning_rate": 0.5})

    def root(point, num_steps):
        return schedules.inverse_sqrt_decay(point["learning_rate"], 10)

    refused = plan(study, num_steps=1000, make_schedule=root)
    assert refused.answer is None
    assert codes(refused) == ["schedule_has_no_rule"]
    own = plan(study, num_steps=1000, make_schedule=root, longer_schedule=root)
    assert "too_small_learning_rate" in codes(own)
    assert own.answer.make_schedule is not None
    none = plan(study, num_steps=1000)
    assert none.answer.make_schedule is None
    assert "no_schedule_to_carry" in codes(none)
    # As `tune` asks: its trainer has the schedule inside, and it lengthens that itself.
    inside = controlled(pbx.Trainer(tiny_workloads.quadratic(), tiny_workloads.sgd))
    asked = plan_next_round(inside.replace(make_schedule=None), study, key=KEY, num_steps=1000)
    assert "no_schedule_to_carry" not in codes(asked)


def test_refusals_without_a_trial_or_a_longer_round():
    dead = made(RATE, {"learning_rate": 0.5}, failing=lambda u: u["learning_rate"] > -1)
    refused = plan(dead)
    assert refused.answer is None
    assert "all_infeasible" in codes(refused)
    done = plan(made(RATE, {"learning_rate": 0.5}), production_steps=100)
    assert done.answer is None
    assert codes(done) == ["last_round"]


def test_lengths_and_trials():
    study = made(RATE, {"learning_rate": 0.5})
    assert plan(study).answer.num_steps == 1000
    assert plan(study, growth=3).answer.num_steps == 300
    assert plan(study, production_steps=250).answer.num_steps == 250
    assert plan(study, num_steps=101).answer[:2] == (101, 64)
    assert plan(study, num_trials=7).answer.num_trials == 7
    with pytest.raises(ValueError, match="num_steps = 100 must be > 100"):
        plan(study, num_steps=100)
    for bad in ({"growth": 1.0}, {"min_width": 0.0}, {"num_trials": 0}, {"num_best": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            plan(study, **bad)
    with pytest.raises(TypeError, match="did you mean 'min_width'"):
        plan(study, min_widths=1)


def test_a_record_without_a_space_and_with_a_constant():
    rng = np.random.default_rng(0)
    rate = 10 ** rng.uniform(-4, 0, 40)
    loss = 1 + (np.log10(rate) + 2) ** 2
    study = pbx.Study.from_arrays(
        {"learning_rate": rate, "depth": np.full(40, 3), "heads": rng.integers(1, 9, 40)},
        {"valid/loss": np.stack([loss + 1, loss], axis=1)},
        [0, 10],
        objective="valid/loss",
    )
    answer = plan(study).answer
    assert answer.space["learning_rate"].scale == "log"
    assert answer.space["learning_rate"].low < 1e-2 < answer.space["learning_rate"].high
    assert isinstance(answer.space["heads"], Integer)
    assert answer.fixed == {"depth": 3}


def test_a_space_gets_its_first_round_and_the_plan_runs(tmp_path):
    space = SearchSpace({"learning_rate": Float(1e-2, 10.0, scale="log")})
    work = tiny_workloads.quadratic()
    arguments = {"key": KEY, "make_schedule": linear, "progress": False}
    verdict = plan_next_round(
        work,
        tiny_workloads.sgd,
        space,
        production_steps=80,
        growth=4,
        first_trials=12,
        directory=tmp_path,
        **arguments,
    )
    first, answer = verdict.studies["round"], verdict.answer
    assert verdict.cost == 12 * 20
    assert int(first.spec["num_steps"]) == 20
    assert pbx.load_study(tmp_path / "round").num_trials == 12
    again = plan_next_round(
        work, tiny_workloads.sgd, first, production_steps=80, growth=4, **arguments
    )
    assert again.cost == 0
    assert again.answer[:4] == answer[:4]
    trainer = pbx.Trainer(work, tiny_workloads.sgd, answer.make_schedule, fixed=answer.fixed)
    second = pbx.run_study(
        trainer,
        answer.space,
        num_trials=answer.num_trials,
        num_steps=answer.num_steps,
        eval_every=20,
        key=KEY,
    )
    assert second.best().value < first.best().value
    with pytest.raises(ValueError, match="num_steps or production_steps must be given"):
        plan_next_round(work, tiny_workloads.sgd, space, key=KEY)
