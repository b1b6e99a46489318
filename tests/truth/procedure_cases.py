"""Worlds for the answers of the procedures: studies in closed form with noise, and their judges."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import signal

import playbook_optax as pbx
from playbook_optax.analysis.spreads import spread_info
from playbook_optax.procedures import (
    adopt,
    best_of_budget,
    change_batch_size,
    pick_num_steps,
    plan_next_round,
    refine_num_steps,
    sweep_learning_rate,
)
from playbook_optax.procedures.adopt import judge_choice
from playbook_optax.procedures.clipping import judge_thresholds
from playbook_optax.procedures.gradient_noise import _Measured, _Plan, judge_noise
from playbook_optax.procedures.instability import Limit, judge_probe
from playbook_optax.procedures.plateau import PlateauAnswer, judge_decisions
from playbook_optax.procedures.remedies import judge_remedies, remedy_rows
from playbook_optax.procedures.warmup import judge_sweep, judge_warmup
from tests.truth.table import Case

NO_QUESTION = {
    "round_lengths": "numbers from numbers: it reads no study",
    "stabilize": "calls the other procedures one after the other; its answer is compare_remedies'",
}
"""Procedures without a case, and why: they decide nothing from noisy curves."""

Rng = np.random.Generator
KEY = jax.random.key(0)
STEP = np.arange(0, 1001, 50)
RATES = np.geomspace(1e-4, 1.0, 9)


def decline(end: Any, start: float = 2.3, pace: float = 6.0, step: Any = STEP) -> np.ndarray:
    """Curves that fall from `start` to `end` (...): (..., eval)."""
    left = np.exp(-pace * np.asarray(step) / step[-1])
    end = np.asarray(end, float)[..., None]
    return end + (start - end) * left


def study_of(points: Any, step: Any = STEP, **metrics: np.ndarray) -> pbx.Study:
    """A study of ``valid/loss`` and what else is given, all feasible."""
    named = {name.replace("_", "/", 1): values for name, values in metrics.items()}
    count = len(next(iter(points.values())))
    shape = next(iter(named.values())).shape[:-1]
    objective = next(iter(named))
    assert shape[0] == count
    return pbx.Study.from_arrays(
        points, named, step, objective=objective, infeasible=np.zeros(shape, bool)
    )


# A learning rate --------------------------------------------------------------------------------


def valley(rng: Rng, best: float, noise: float) -> pbx.Study:
    """A sweep whose loss is a parabola in the decades of the rate."""
    end = 0.5 + 0.2 * np.log10(RATES / best) ** 2 + noise * rng.normal(size=len(RATES))
    return study_of({"learning_rate": RATES}, valid_loss=decline(end))


def swept(study: pbx.Study) -> float | None:
    answer: float | None = sweep_learning_rate(None, None, study, key=KEY).answer
    return answer


def finds_the_best_rate(rng: Rng) -> bool:
    best = 10 ** rng.uniform(-3, -1)
    answer = swept(valley(rng, best, 0.01))
    return answer is not None and abs(math.log10(answer / best)) < 0.5


def answers_beyond_the_sweep(edge: int, rng: Rng) -> bool:
    return swept(valley(rng, (3e-6, 30.0)[edge], 0.03)) is not None


def answers_where_all_diverge(rng: Rng) -> bool:
    curves = decline(rng.uniform(1, 3, len(RATES)))
    curves[:, 5:] = np.inf
    study = pbx.Study.from_arrays(
        {"learning_rate": RATES}, {"valid/loss": curves}, STEP, objective="valid/loss"
    )
    return swept(study) is not None


def answers_without_a_slope(rng: Rng) -> bool:
    """A validation set of 34 that no trial moves, while the training loss falls a little."""
    wrong = np.full((len(RATES), len(STEP)), rng.integers(5, 30) / 34)
    loss = decline(1.0 + 1e-7 * rng.random(len(RATES)), 1.00001)
    study = pbx.Study.from_arrays(
        {"learning_rate": RATES},
        {"valid/error_rate": wrong, "train/loss": loss},
        STEP,
        objective="valid/error_rate",
        resolution=1 / 34,
    )
    return swept(study) is not None


# Instability ------------------------------------------------------------------------------------


def descent(
    rng: Rng,
    rates: Any,
    max_norms: Any = math.inf,
    *,
    num_steps: int = 200,
    every: int = 10,
    outliers: float = 0.0,
    size: float = 1000.0,
    noise: float = 0.1,
    clean: bool = True,
) -> tuple[pbx.Study, np.ndarray]:
    """Gradient descent on half the square, of which a batch is a noisy and sometimes a huge one.

    Returns what `run_study` records of it, and the true loss before each step and at the end,
    (trial, step + 1). It is unstable from the learning rate 2 on.
    """
    rates = np.asarray(rates, float)[:, None]
    weights = np.ones((len(rates), 2))
    limits = np.broadcast_to(np.asarray(max_norms, float), (len(rates),))[:, None]
    true, losses, clipped = [], [], np.zeros(len(rates))
    for _ in range(num_steps):
        true.append(0.5 * (weights**2).sum(1))
        scale = size if rng.random() < outliers else 1.0
        off = weights - noise * rng.normal(size=2)
        losses.append(0.5 * scale * (off**2).sum(1))
        gradient = scale * off
        norm = np.sqrt((gradient**2).sum(1, keepdims=True))
        clipped += (norm > limits)[:, 0]
        weights = weights - rates * gradient * np.minimum(1, limits / np.maximum(norm, 1e-30))
        weights = np.clip(weights, -1e18, 1e18)
    true.append(0.5 * (weights**2).sum(1))
    expected, batches = np.stack(true, 1), np.stack(losses, 1)
    smooth = signal.lfilter([0.1], [1, -0.9], batches, zi=0.9 * batches[:, :1])[0]
    shape, none = (len(rates), -1, every), np.full((len(rates), 1), np.nan)
    metrics = {
        "step/loss": np.concatenate([none, batches.reshape(shape).mean(2)], 1),
        "step/peak_loss": np.concatenate([batches[:, :1], smooth.reshape(shape).max(2)], 1),
    }
    if clean:
        metrics = {"train/loss": expected[:, ::every], **metrics}
    study = pbx.Study.from_arrays(
        {"learning_rate": rates[:, 0], "max_norm": np.minimum(limits[:, 0], 1e37)},
        metrics,
        np.arange(0, num_steps + 1, every),
        objective="train/loss" if clean else "step/loss",
        infeasible=expected.max(1) > 1e30,
    )
    counts = {
        "norms/num_clipped": ("trial", clipped.astype(np.int32)),
        "norms/num_steps": ("trial", np.full(len(rates), num_steps, np.int32)),
    }
    return dataclasses.replace(study, data=study.data.assign(counts)), expected


def limit_of(rng: Rng, low: float, **arguments: Any) -> Limit:
    """What is known after a round of learning rates a tenth apart."""
    study, _ = descent(rng, low * 1.1 ** np.arange(4), num_steps=120, every=6, **arguments)
    return Limit(np.empty(0), np.empty(0, bool)).of(study)


def finds_the_limit(rng: Rng) -> bool:
    found = limit_of(rng, rng.uniform(1.6, 1.8))
    return found.within(1.11) and 2 / 1.22 < found.high < 2 * 1.22


def finds_a_limit(arguments: dict[str, Any], rng: Rng) -> bool:
    return limit_of(rng, **arguments).high is not None


def probe(rng: Rng, height: float) -> bool:
    """Two runs that are evaluated after each step; the loss of the second rises early."""
    step = np.arange(201)
    curves = np.stack([decline(0.1, pace=5.0, step=step), decline(0.1, pace=8.0, step=step)])
    curves[1, 12:30] += height
    batches = curves + 0.2 * rng.normal(size=curves.shape)
    batches[:, 0] = np.nan
    study = study_of(
        {"learning_rate": np.array([0.1, 0.2])}, step, train_loss=curves, step_loss=batches
    )
    return judge_probe(study, 2.0)[0]


# Clipping ---------------------------------------------------------------------------------------

PERCENTILES = (100.0, 99.0, 90.0, 10.0)
HUGE_BATCHES = {"outliers": 0.05, "size": 1000.0}


def threshold(
    rng: Rng, max_norms: Any, rate: float = 0.1, **arguments: Any
) -> tuple[float | None, np.ndarray, list[str]]:
    """The answer, the true loss of the trial that it is of, and the codes of the findings."""
    study, true = descent(rng, [rate] * 4, [math.inf, *max_norms], **arguments)
    evidence = {
        "learning_rate": rate,
        "stable_learning_rate": None,
        "stable_best_value": None,
    }
    answer, findings = judge_thresholds(study, PERCENTILES, evidence)
    chosen = 0 if answer is None else list(study.points["max_norm"]).index(answer)
    return answer, true[chosen], [finding.code for finding in findings]


def clips_so_that_it_is_stable(rng: Rng) -> bool:
    answer, true, _ = threshold(rng, (1000.0, 30.0, 1.0), **HUGE_BATCHES)
    return answer is not None and true.max() <= 2 * true[0]


def clips_where_it_explodes(rng: Rng) -> bool:
    """The true loss is ten times the initial one for a twentieth of training, or hundreds."""
    answer, true, _ = threshold(rng, (3000.0, 1000.0, 100.0), **HUGE_BATCHES)
    far = np.mean(true > 10 * true[0]) > 0.05 or true.max() > 100 * true[0]
    return answer is not None and bool(far)


def clips_a_stable_run(arguments: dict[str, Any], rng: Rng) -> bool:
    answer, _, _ = threshold(rng, (2.0, 1.0, 0.2), **arguments)
    return answer is not None


def finds_clipping_not_enough(rng: Rng) -> bool:
    """All thresholds are small, and all runs sit at the floor of their noise."""
    _, _, codes = threshold(rng, (2.0, 1.0, 0.2), **HUGE_BATCHES)
    return "clipping_is_not_enough" in codes


def sees_that_clipping_is_not_enough(rng: Rng) -> bool:
    """The rate itself is too high for any threshold."""
    _, _, codes = threshold(rng, (1e9, 1e8, 1e7), rate=2.5)
    return "clipping_is_not_enough" in codes


# Remedies and warm-up ---------------------------------------------------------------------------


def runs(
    rng: Rng, ends: Any, spread: float, num_seeds: int, start: float = 2.3, **points: Any
) -> pbx.Study:
    """Trials that end at `ends` (trial,), give or take a share that is another for each seed."""
    step = np.array([0, 250, 500, 1000])
    factor = np.exp(spread * rng.normal(size=(len(ends), num_seeds)))
    curves = decline(np.asarray(ends)[:, None] * factor, start, 40.0, step)
    if num_seeds == 1:
        curves = curves[:, 0]
    study = study_of(points, step, valid_loss=curves)
    never = ("trial", np.zeros(len(ends), np.int32))
    return dataclasses.replace(
        study, data=study.data.assign({f"norms/num_{what}": never for what in ("clipped", "steps")})
    )


def remedy(
    rng: Rng, best: float, gain: float, spread: float, num_seeds: int, start: float = 2.3
) -> str | None:
    """The recommendation among four rows, of which the third divides the best loss by `gain`."""
    rates = np.geomspace(1e-3, 1.0, 5)
    names = ["none", "warmup", "adaptive_clipping", "optimizer/adam"]
    valley = 1 + 0.5 * np.log10(rates / 0.03) ** 2
    ends = [best * valley / (gain if name == "adaptive_clipping" else 1.0) for name in names]
    study = runs(
        rng, np.concatenate(ends), spread, num_seeds, start, learning_rate=np.tile(rates, 4)
    )
    rows = remedy_rows(study, "all", dict.fromkeys(names, 0))
    chosen, _ = judge_remedies(study, list(rows.values()), 0.1)
    return None if chosen is None else chosen.remedy


def recommends(which: str | None, arguments: dict[str, Any], rng: Rng) -> bool:
    found = remedy(rng, **arguments)
    return found is not None if which is None else found == which


def recommends_for_one_example(rng: Rng) -> bool:
    """Of 40 examples each remedy has two wrong, some of them one."""
    rates, step = np.geomspace(1e-3, 1.0, 5), np.array([0, 250, 500, 1000])
    wrong = np.repeat(rng.integers(2, 8, 20)[:, None], 4, axis=1)
    wrong[:, 0], wrong[::5] = 36, 2
    wrong[rng.integers(5, 20), 1:] = 1
    study = pbx.Study.from_arrays(
        {"learning_rate": np.tile(rates, 4)},
        {"valid/error_rate": wrong / 40},
        step,
        objective="valid/error_rate",
        resolution=1 / 40,
    )
    never = ("trial", np.zeros(20, np.int32))
    study = dataclasses.replace(
        study, data=study.data.assign({f"norms/num_{what}": never for what in ("clipped", "steps")})
    )
    rows = remedy_rows(study, "all", dict.fromkeys("abcd", 0))
    return judge_remedies(study, list(rows.values()), 0.1)[0] is not None


def warms_up(best: float, gain: float, spread: float, num_seeds: int, rng: Rng) -> bool:
    """Whether a warm-up is answered with that divides the loss at its end by `gain`."""
    rates = np.geomspace(0.01, 1.0, 5)
    valley = 1 + 0.5 * np.log10(rates / 0.1) ** 2
    plain = runs(
        rng, best * valley, spread, num_seeds, base_learning_rate=rates, warmup_steps=[0] * 5
    )
    warm = runs(
        rng, [best / gain], spread, num_seeds, base_learning_rate=[10.0], warmup_steps=[100]
    )
    return judge_warmup(plain, [warm], 1000, 1.0)[0] is not None


def shortest_warmup(rng: Rng, needed: int) -> int | None:
    """The shortest stable one of 10, 30 and 100 steps; a shorter than `needed` rises at once."""
    step = np.arange(0, 301, 3)
    curves = np.stack([decline(0.1, step=step)] * 3)
    lengths = np.array([10, 30, 100])
    for i, length in enumerate(lengths):
        if length < needed:
            curves[i, length // 3 : length] += 3.0
    batches = curves + 0.1 * rng.normal(size=curves.shape)
    batches[:, 0] = np.nan
    study = study_of(
        {"warmup_steps": lengths, "base_learning_rate": [1.0] * 3},
        step,
        train_loss=curves,
        step_loss=batches,
    )
    rows = judge_sweep(study, [(int(length), 10.0) for length in lengths], None)
    return min((row.warmup_steps for row in rows if not row.unstable), default=None)


# Lengths ----------------------------------------------------------------------------------------


def fit_steps(rng: Rng, rates: np.ndarray, fastest: float, needed: float) -> int | None:
    """The steps for a perfect fit, which are `needed` at the rate `fastest` and more elsewhere."""
    step = np.arange(0, 1001, 10)
    steps = needed * (1 + np.log10(rates / fastest) ** 2) * rng.uniform(0.99, 1.01, len(rates))
    left = np.clip(1 - step / steps[:, None], 0, 1)
    error = np.ceil(500 * 0.9 * left) / 500
    study = study_of({"learning_rate": rates}, step, train_error_rate=error)
    answer: int | None = pick_num_steps(None, None, study, key=KEY).answer
    return answer


def picks_the_steps(rng: Rng) -> bool:
    answer = fit_steps(rng, RATES, 0.01, 300.0)
    return answer is not None and 297 <= answer <= 320


def picks_some_steps(fastest: float, needed: float, rng: Rng) -> bool:
    return fit_steps(rng, RATES, fastest, needed) is not None


def length(rng: Rng, shape: Callable[[np.ndarray], np.ndarray], noise: float) -> int | None:
    """The refined number of steps of trials whose curves have one shape; they had 1000."""
    time = STEP / STEP[-1]
    end = 0.3 * np.abs(np.log10(RATES[:, None] / 0.02))
    curves = (
        shape(time)
        + end * np.minimum(1, 4 * time)
        + noise * rng.normal(size=(len(RATES), len(time)))
    )
    answer: int | None = refine_num_steps(
        None, None, study_of({"learning_rate": RATES}, valid_loss=curves), key=KEY
    ).answer
    return answer


def falls_all_along(time: np.ndarray) -> np.ndarray:
    return 2.0 - 1.5 * time


def settles_at_once(time: np.ndarray) -> np.ndarray:
    return 0.5 + 1.5 * np.exp(-80 * time)


def settles_in_the_middle(time: np.ndarray) -> np.ndarray:
    return 0.5 + 1.5 * np.exp(-12 * time)


def refines(shape: Any, sign: int, rng: Rng) -> bool:
    """Whether the length becomes longer (1) or shorter (-1)."""
    answer = length(rng, shape, 0.005)
    return answer is not None and sign * (answer - 1000) > 0


# What next --------------------------------------------------------------------------------------

SPACE = pbx.SearchSpace(
    {
        "learning_rate": pbx.Float(1e-4, 1.0, scale="log"),
        "dropout": pbx.Float(0.0, 0.5),
    }
)


def next_range(rng: Rng, best: float, num_trials: int = 30) -> pbx.Float:
    """The next round's range of learning rates after a round whose loss is least at `best`."""
    points = {
        "learning_rate": 10 ** rng.uniform(-4, 0, num_trials),
        "dropout": rng.uniform(0, 0.5, num_trials),
    }
    off = np.log10(points["learning_rate"] / best)
    end = 0.5 + 0.3 * off**2 + 0.2 * points["dropout"] + 0.02 * rng.normal(size=num_trials)
    study = pbx.Study.from_arrays(
        points, {"valid/loss": decline(end)}, STEP, objective="valid/loss", space=SPACE
    )
    plan = plan_next_round(None, None, study, key=KEY, num_steps=5000).answer
    found: pbx.Float = plan.space["learning_rate"]
    return found


def keeps_the_best_rate(rng: Rng) -> bool:
    best = 10 ** rng.uniform(-3, -1)
    found = next_range(rng, best)
    return found.low <= best <= found.high


def narrows_the_range(rng: Rng) -> bool:
    found = next_range(rng, 10 ** rng.uniform(-2.5, -1.5))
    return math.log10(found.high / found.low) < 3


def grows_beyond(best: float, rng: Rng) -> bool:
    return next_range(rng, best).high > 1.0


def enough_trials(rng: Rng, loss: Callable[[Rng], np.ndarray]) -> int | None:
    """The smallest budget that would have been enough."""
    end = loss(rng)
    step = np.array([0, 10])
    study = study_of({"x": np.arange(len(end))}, step, valid_loss=decline(end, step=step))
    answer: int | None = best_of_budget(None, None, study, key=KEY).answer
    return answer


def a_third_is_good(rng: Rng) -> np.ndarray:
    return np.where(rng.random(100) < 0.35, 0.3 + 0.01 * rng.random(100), 1 + rng.random(100))


def one_is_good(rng: Rng) -> np.ndarray:
    loss = 2 + rng.random(100)
    loss[rng.integers(100)] = 0.3
    return loss


def few_are_enough(rng: Rng) -> bool:
    answer = enough_trials(rng, a_third_is_good)
    return answer is not None and answer <= 20


def says_enough(rng: Rng) -> bool:
    return enough_trials(rng, one_is_good) is not None


# Seeds ------------------------------------------------------------------------------------------


def seeds(rng: Rng, mean: float, deviation: float, num_seeds: int = 5) -> Any:
    """The spread of a point over seeds."""
    end = mean + deviation * rng.normal(size=(1, num_seeds))
    return spread_info(study_of({"learning_rate": [0.1]}, valid_loss=decline(end)))


def adopts(gain: float, num_seeds: int, rng: Rng) -> bool:
    """Whether a candidate is adopted that is better by so many deviations of a run."""
    pair = (seeds(rng, 0.5 - 0.01 * shift, 0.01, num_seeds) for shift in (0.0, gain))
    return adopt(None, None, *pair).answer is True


def cannot_tell(gain: float, num_seeds: int, rng: Rng) -> bool:
    pair = (seeds(rng, 0.5 - 0.01 * shift, 0.01, num_seeds) for shift in (0.0, gain))
    return adopt(None, None, *pair).answer is None


def choice(code: str, lead: float, gap: float, rng: Rng) -> bool:
    """What retraining says of a best trial.

    Args:
      code: the finding asked for.
      lead: how far its value was better than its point's mean, in deviations of a run.
      gap: how far the means of the others lie above its own.
      rng: where the noise comes from.
    """
    spread = seeds(rng, 0.5, 0.01)
    best = 0.5 + 0.01 * (rng.normal() - lead)
    others = 0.5 + 0.01 * (gap + rng.normal(size=10))
    end = np.concatenate([[best], np.maximum(others, best)])
    study = study_of({"learning_rate": np.geomspace(0.1, 1, 11)}, valid_loss=decline(end))
    return code in [f.code for f in judge_choice(study, spread, study.best().value)]


def interval_holds(rng: Rng) -> bool:
    """Whether one more run lands where the interval of five says."""
    spread = seeds(rng, 0.5, 0.01)
    return bool(spread.low <= decline(0.5 + 0.01 * rng.normal())[-1] <= spread.high)


# Batches ----------------------------------------------------------------------------------------


def batch_range(power: float, rng: Rng) -> bool:
    """Whether the range at a batch of eight times the size holds the best rate there."""
    best = 10 ** rng.uniform(-3, -1)
    study = valley(rng, best, 0.01)
    verdict = change_batch_size(
        None, None, study, key=KEY, batch_size=32, new_batch_size=256, rule="linear"
    )
    found = verdict.answer.space["learning_rate"]
    return bool(found.low <= best * 8**power <= found.high)


def plans_without_a_best(rng: Rng) -> bool:
    curves = decline(rng.uniform(1, 3, len(RATES)))
    curves[:, 5:] = np.inf
    study = pbx.Study.from_arrays(
        {"learning_rate": RATES}, {"valid/loss": curves}, STEP, objective="valid/loss"
    )
    verdict = change_batch_size(
        None, None, study, key=KEY, batch_size=32, new_batch_size=256, rule="linear"
    )
    return verdict.answer is not None


def gradients(rng: Rng, strength: float, noise: float = 1.0) -> Any:
    """Moments of 16 repeats of 32 batches of 8; the mean gradient has the norm `strength`."""
    drawn = noise * rng.normal(size=(16, 32, 10)) + strength / math.sqrt(10)
    variance = drawn.var(axis=1, ddof=1).sum(1, keepdims=True)
    norm = (drawn.mean(1) ** 2).sum(1) - variance[:, 0] / 32
    return _Measured(_Plan(8, 32, (1,), False), variance, norm)


def noise_codes(*measured: Any) -> list[str]:
    named = dict(zip(("workload", "variant"), measured, strict=False))
    return [finding.code for finding in judge_noise(named, {}, 0)[1]]


def noise_scale_is_near(rng: Rng) -> bool:
    """The variance of a batch of 8 is 10 and the squared norm 4: the scale is 20."""
    answer, _ = judge_noise({"workload": gradients(rng, 2.0)}, {}, 0)
    return bool(20 / 1.25 < answer.variants[0].noise_scale < 20 * 1.25)


def says_of_noise(code: str, strength: float, factor: float | None, rng: Rng) -> bool:
    measured = [gradients(rng, strength)]
    if factor is not None:
        measured.append(gradients(rng, strength, math.sqrt(factor)))
    return code in noise_codes(*measured)


# A schedule that watches ------------------------------------------------------------------------


def reduced(rng: Rng, drop: float) -> bool:
    """Whether the reductions are said to have gained nothing; they lowered the loss by `drop`."""
    step = np.arange(0, 1001, 20)
    level = np.where(step <= 500, 0.5, 0.5 - drop)
    curve = level + 1.8 * np.exp(-step / 60) + 0.01 * rng.normal(size=len(step))
    driven = study_of({"learning_rate": [0.1]}, step, valid_loss=curve[None])
    best = int(curve.argmin())
    answer = PlateauAnswer((0.1, 0.01), (500,), {}, 1000, float(curve[best]), int(step[best]))
    found = judge_decisions(answer, driven, 5, 20)
    return "reductions_gained_nothing" in [finding.code for finding in found]


def case(says: str, world: str, holds: bool, draw: Any, *arguments: Any) -> Case:
    """A case whose draw takes some arguments before the random numbers."""
    return Case(says, world, holds, functools.partial(draw, *arguments))


SMALL = {"best": 0.0018, "gain": 2.25}

CASES: tuple[Case, ...] = (
    # sweep_learning_rate
    case("sweep_learning_rate: the best rate", "a valley inside", True, finds_the_best_rate),
    case("sweep_learning_rate: a rate", "the best lies above", False, answers_beyond_the_sweep, 1),
    case("sweep_learning_rate: a rate", "the best lies below", False, answers_beyond_the_sweep, 0),
    case("sweep_learning_rate: a rate", "all diverge", False, answers_where_all_diverge),
    case("sweep_learning_rate: a rate", "no slope", False, answers_without_a_slope),
    # find_unstable_learning_rate
    case("find_unstable_learning_rate: the limit", "descent, limit at 2", True, finds_the_limit),
    case(
        "find_unstable_learning_rate: a limit",
        "descent at rates below 1",
        False,
        finds_a_limit,
        {"low": 0.5},
    ),
    case(
        "find_unstable_learning_rate: a limit",
        "noisy descent that begins near its floor",
        False,
        finds_a_limit,
        {"low": 0.1, "noise": 1.0},
    ),
    case(
        "find_unstable_learning_rate: a limit",
        "batch losses alone, rates below 1",
        False,
        finds_a_limit,
        {"low": 0.5, "clean": False},
    ),
    # probe_early_instability
    case("probe_early_instability: yes", "rises early and recovers", True, lambda r: probe(r, 3.0)),
    case("probe_early_instability: yes", "falls all along", False, lambda r: probe(r, 0.0)),
    # tune_warmup
    case(
        "tune_warmup: a warm-up",
        "it halves the loss, 3 seeds",
        True,
        warms_up,
        *(0.02, 2.0, 0.15, 3),
    ),
    case("tune_warmup: a warm-up", "it halves the loss, 1 seed", True, warms_up, 0.02, 2.0, 0.1, 1),
    case("tune_warmup: a warm-up", "it gains nothing, 3 seeds", False, warms_up, 0.02, 1, 0.15, 3),
    case("tune_warmup: a warm-up", "it gains nothing, 1 seed", False, warms_up, 0.02, 1, 0.1, 1),
    case(
        "tune_warmup: a warm-up",
        "nothing, 5 seeds, no decades",
        False,
        warms_up,
        *(0.6, 1.0, 0.05, 5),
    ),
    case(
        "tune_warmup: the shortest stable length",
        "30 of 10, 30, 100",
        True,
        lambda r: shortest_warmup(r, 30) == 30,
    ),
    case(
        "tune_warmup: a stable length",
        "all rise at once",
        False,
        lambda r: shortest_warmup(r, 1000) is not None,
    ),
    # choose_clip_threshold
    case(
        "choose_clip_threshold: one that keeps the true loss below twice the first",
        "a batch in 20 is 1000 times as large",
        True,
        clips_so_that_it_is_stable,
    ),
    case(
        "choose_clip_threshold: one with which the true loss explodes",
        "all thresholds are far too large",
        False,
        clips_where_it_explodes,
    ),
    case(
        "choose_clip_threshold: one",
        "stable without clipping",
        False,
        clips_a_stable_run,
        {"rate": 0.3},
    ),
    case(
        "choose_clip_threshold: one",
        "stable, noisy, begins near its floor",
        False,
        clips_a_stable_run,
        {"rate": 0.1, "noise": 0.5},
    ),
    case(
        "choose_clip_threshold: none is enough",
        "all thresholds keep it at its floor",
        False,
        finds_clipping_not_enough,
    ),
    case(
        "choose_clip_threshold: none is enough",
        "the rate is above the limit",
        True,
        sees_that_clipping_is_not_enough,
    ),
    # compare_remedies
    *(
        case(
            "compare_remedies: the one that helps",
            f"0.0008 against 0.0018, {seeds_of} seeds",
            True,
            recommends,
            "adaptive_clipping",
            {**SMALL, "spread": spread, "num_seeds": seeds_of},
        )
        for seeds_of, spread in ((1, 0.1), (3, 0.15), (5, 0.25))
    ),
    case(
        "compare_remedies: the one that helps",
        "a third less, no decades, 3 seeds",
        True,
        recommends,
        "adaptive_clipping",
        {"best": 0.6, "gain": 1.5, "spread": 0.05, "num_seeds": 3},
    ),
    *(
        case(
            "compare_remedies: one",
            f"none helps, the loss ends at {best}, {seeds_of} seeds",
            False,
            recommends,
            None,
            {"best": best, "gain": 1.0, "spread": spread, "num_seeds": seeds_of},
        )
        for best, seeds_of, spread in (
            (0.0018, 1, 0.1),
            (0.0018, 2, 0.2),
            (0.0018, 3, 0.3),
            (0.6, 1, 0.03),
            (0.6, 3, 0.05),
        )
    ),
    case(
        "compare_remedies: one",
        "one of 40 examples fewer is wrong",
        False,
        recommends_for_one_example,
    ),
    # pick_num_steps
    case("pick_num_steps: the steps", "the fastest fits at 300", True, picks_the_steps),
    case("pick_num_steps: steps", "the fastest lies beyond", False, picks_some_steps, 30.0, 100.0),
    case("pick_num_steps: steps", "none fits", False, picks_some_steps, 0.01, 3000.0),
    # refine_num_steps
    case("refine_num_steps: longer", "falls all along", True, refines, falls_all_along, 1),
    case("refine_num_steps: shorter", "settles in a twentieth", True, refines, settles_at_once, -1),
    case("refine_num_steps: shorter", "falls all along", False, refines, falls_all_along, -1),
    case("refine_num_steps: longer", "settles in a twentieth", False, refines, settles_at_once, 1),
    case(
        "refine_num_steps: longer",
        "settles in the middle",
        False,
        refines,
        settles_in_the_middle,
        1,
    ),
    # plan_next_round
    case("plan_next_round: a range with the best rate", "inside", True, keeps_the_best_rate),
    case("plan_next_round: a narrower range", "inside", True, narrows_the_range),
    case("plan_next_round: beyond the edge", "the best lies there", True, grows_beyond, 10.0),
    case("plan_next_round: beyond the edge", "the best is central", False, grows_beyond, 0.01),
    # best_of_budget
    case("best_of_budget: 20 are enough", "every third trial is good", True, few_are_enough),
    case("best_of_budget: enough", "one of a hundred is good", False, says_enough),
    # retrain
    case("retrain: an interval for the next run", "normal seeds", True, interval_holds),
    case("retrain: best_was_lucky", "8 deviations of luck", True, choice, "best_was_lucky", 8, 20),
    case("retrain: best_was_lucky", "no luck", False, choice, "best_was_lucky", 0, 20),
    case("retrain: best_is_a_tie", "all are alike", True, choice, "best_is_a_tie", 0, 0),
    case("retrain: best_is_a_tie", "far ahead", False, choice, "best_is_a_tie", 0, 30),
    # adopt
    case("adopt: the candidate", "better by 3 deviations, 5 seeds", True, adopts, 3.0, 5),
    # The permutation test is exact: of 70 ways it calls 3, 4.3%; with 5 seeds 12 of 252, 4.8%.
    case("adopt: the candidate", "no better, 4 seeds", False, adopts, 0.0, 4),
    case("adopt: the candidate", "worse, 5 seeds", False, adopts, -2.0, 5),
    case("adopt: cannot tell", "better, 2 seeds", True, cannot_tell, 9.0, 2),
    case("adopt: cannot tell", "better, 5 seeds", False, cannot_tell, 9.0, 5),
    # change_batch_size
    case("change_batch_size: a range with the best rate", "linear", True, batch_range, 1.0),
    case("change_batch_size: a range with the best rate", "square root", True, batch_range, 0.5),
    case("change_batch_size: a range with the best rate", "moves wildly", False, batch_range, 2.0),
    case("change_batch_size: a plan", "all diverge", False, plans_without_a_best),
    # gradient_noise
    case("gradient_noise: the scale within a quarter", "20 examples", True, noise_scale_is_near),
    *(
        case(f"gradient_noise: {code}", world, holds, says_of_noise, code, strength, factor)
        for code, world, holds, strength, factor in (
            ("gradient_lost_in_noise", "no gradient", True, 0.0, None),
            ("gradient_lost_in_noise", "a clear gradient", False, 2.0, None),
            ("gradient_variance_raised", "by half", True, 2.0, 1.5),
            ("gradient_variance_raised", "the same", False, 2.0, 1.0),
            ("gradient_variance_raised", "less", False, 2.0, 0.7),
            ("gradient_variance_lowered", "a third less", True, 2.0, 0.66),
            ("gradient_variance_lowered", "the same", False, 2.0, 1.0),
        )
    ),
    # plateau_schedule
    case(
        "plateau_schedule: reductions_gained_nothing",
        "the level stays",
        True,
        lambda r: reduced(r, 0.0),
    ),
    case(
        "plateau_schedule: reductions_gained_nothing",
        "the level falls by a tenth",
        False,
        lambda r: reduced(r, 0.05),
    ),
)
