"""Worlds for the findings of `diagnose` and the info tables beneath it.

Closed forms with noise of known size. Each study is small, and only the rule in question reads it,
so that a draw takes about a millisecond.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from playbook_optax import schedules
from playbook_optax.analysis.boundaries import boundary_findings, boundary_info
from playbook_optax.analysis.budgets import budget_findings, budget_info, default_min_gain
from playbook_optax.analysis.curves import curve_findings, curve_info
from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.feasibility import feasibility_findings, feasibility_info
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.generalization import (
    late_variance_findings,
    late_variance_info,
    overfitting_findings,
    overfitting_info,
)
from playbook_optax.analysis.importance import importance_findings, importance_info
from playbook_optax.analysis.instability import instability_findings, instability_info
from playbook_optax.analysis.isolation import isolation_findings, isolation_info
from playbook_optax.analysis.resolution import resolution_findings, resolution_info
from playbook_optax.analysis.schedule_shape import longer_schedule_findings
from playbook_optax.analysis.stability import stability_findings, stability_info
from playbook_optax.analysis.training_length import (
    checkpoint_findings,
    checkpoint_info,
    compare_lengths,
    length_findings,
    training_length_findings,
    training_length_info,
)
from playbook_optax.records.study import Study, study_from_blocks
from playbook_optax.search_space import Float, SearchSpace
from tests.truth.table import Case

Draw = Callable[[np.random.Generator], Any]
World = tuple[str, bool, Draw]


def found(code: str, findings: Iterable[Finding]) -> bool:
    """Whether there is a Finding of that code."""
    return code in [finding.code for finding in findings]


def cases(code: str, rule: Callable[[Any], Iterable[Finding]], *worlds: World) -> tuple[Case, ...]:
    """One case for each world: what it is like, whether the code is true of it, and its draw.

    Args:
      code: of a Finding.
      rule: `study -> findings`.
      *worlds: see above; a draw gives what the rule takes.
    """
    return tuple(
        Case(code, name, holds, lambda rng, draw=draw: found(code, rule(draw(rng))))
        for name, holds, draw in worlds
    )


def fact(code: str, name: str, holds: bool, findings: Callable[[], Iterable[Finding]]) -> Case:
    """A world without chance, which is looked at once."""

    @functools.cache
    def told() -> bool:
        return found(code, findings())

    return Case(code, name, holds, lambda _: told())


def plain(code: str, rule: Callable[[Any], Iterable[Finding]], *worlds: World) -> tuple[Case, ...]:
    """As `cases`, of worlds whose draws do not differ in what matters: one is looked at, once."""
    return tuple(
        fact(code, name, holds, lambda draw=draw: rule(draw(np.random.default_rng(0))))
        for name, holds, draw in worlds
    )


# Training length --------------------------------------------------------------------------------


def curves(
    rng: np.random.Generator,
    curve: np.ndarray,
    noise: float,
    num_trials: int = 20,
    num_steps: int = 1000,
    **more: Any,
) -> Study:
    """Trials that share a curve, up to where they end, each evaluation with noise."""
    offsets = 0.02 * curve[-1] * rng.random((num_trials, 1))
    values = curve + offsets + noise * rng.normal(size=(num_trials, len(curve)))
    step = np.round(num_steps * np.linspace(0, 1, len(curve))).astype(int)
    objective = more.pop("name", "valid/loss")
    metrics = {objective: values}
    if "rate" in more:
        metrics["learning_rate"] = np.broadcast_to(more.pop("rate"), values.shape)
    return Study.from_arrays(
        {"x": np.arange(num_trials)}, metrics, step, objective=objective, **more
    )


def time(num_evals: int) -> np.ndarray:
    """Shares of training at which it is evaluated."""
    return np.linspace(0, 1, num_evals + 1)


def cosine(t: np.ndarray) -> np.ndarray:
    """A cosine decay as a share of its peak."""
    return 0.5 + 0.5 * np.cos(np.pi * np.minimum(t, 1))


def regression(num_steps: int, floor: float = 0.02, num_evals: int = 40) -> np.ndarray:
    """The loss of least squares under a cosine decay, exactly: many directions, many rates."""
    curvature = np.arange(1, 65) ** -1.5
    travelled = np.concatenate([[0], np.cumsum(cosine(np.arange(num_steps) / num_steps))])
    left = np.exp(-2 * 0.5 * curvature[:, None] * travelled)
    loss = floor + np.mean(left * curvature[:, None] ** 0.2, axis=0)
    return np.asarray(loss[np.round(num_steps * time(num_evals)).astype(int)])


def told(code: str, study: Draw, **arguments: Any) -> Draw:
    """Whether the length of a study gets this verdict."""

    def draw(rng: np.random.Generator) -> bool:
        info = training_length_info(study(rng), **arguments)
        return code in [finding.code for finding in training_length_findings(info)]

    return draw


BOUND, NOT_BOUND, UNKNOWN = "compute_bound", "not_compute_bound", "compute_bound_unknown"
T = time(40)
TWO_PHASES = 1.9 * np.exp(-T / 0.02) + 0.4 * 2.0**-T
LENGTHS: tuple[tuple[str, str, Draw], ...] = (
    *(
        (
            NOT_BOUND,
            f"flat since a tenth of training, noise {noise:.1%} of the end",
            lambda rng, noise=noise: curves(rng, 0.2 + 2 * np.exp(-time(60) / 0.02), noise * 0.2),
        )
        for noise in (0.001, 0.01, 0.1)
    ),
    (
        NOT_BOUND,
        "an error rate that stays at one value, an example more or less",
        lambda rng: curves(
            rng,
            np.round(100 * (0.1 + 0.8 * np.exp(-T / 0.02))) / 100,
            0.0,
            resolution={"valid/loss": 0.01},
        ),
    ),
    (
        NOT_BOUND,
        "a recorded constant rate, and flat since a third of training",
        lambda rng: curves(rng, 0.2 + 2 * np.exp(-T / 0.05), 0.002, rate=1.0),
    ),
    *(
        (
            BOUND,
            f"two phases: 2.3, 0.2 at the end, 0.1 after twice the steps, noise {noise}",
            lambda rng, noise=noise: curves(rng, TWO_PHASES, noise),
        )
        for noise in (0.0005, 0.002, 0.005)
    ),
    *(
        (
            BOUND,
            f"a power of the step, twice the steps gain {1 - 2**-power:.0%}, noise {noise:.1%}",
            lambda rng, noise=noise, power=power: curves(rng, (T + 1e-3) ** -power, noise),
        )
        for power, noise in ((0.3, 0.01), (0.15, 0.005), (0.5, 0.02))
    ),
    *(
        (
            BOUND,
            f"least squares under a recorded cosine decay, {num_steps} steps",
            lambda rng, num_steps=num_steps: curves(
                rng,
                regression(num_steps),
                0.001 * regression(num_steps)[-1],
                num_steps=num_steps,
                rate=cosine(T),
            ),
        )
        for num_steps in (75, 150, 300)
    ),
    (
        UNKNOWN,
        "a noise floor that falls with the rate, which is recorded",
        lambda rng: curves(
            rng, 0.2 + 0.3 * cosine(T) + 2 * np.exp(-T / 0.02), 0.002, rate=cosine(T)
        ),
    ),
    (
        UNKNOWN,
        "a steady fall, and noise half as large as all of it",
        lambda rng: curves(rng, 2 - 0.3 * time(20), 0.15, num_trials=6),
    ),
)
# Of a decay that nobody recorded it can only be said that it is no saturation.
UNRECORDED = tuple(
    Case(
        NOT_BOUND,
        f"least squares under a cosine decay nobody recorded, {num_steps} steps",
        False,
        told(
            NOT_BOUND,
            lambda rng, num_steps=num_steps: curves(
                rng, regression(num_steps), 0.002 * regression(num_steps)[-1], num_steps=num_steps
            ),
        ),
    )
    for num_steps in (75, 150, 300)
)
LENGTH_CASES = (
    *(
        Case(code, world, code == truth, told(code, study))
        for truth, world, study in LENGTHS
        for code in (BOUND, NOT_BOUND, UNKNOWN)
        if code != UNKNOWN or truth == UNKNOWN
    ),
    *UNRECORDED,
    Case(
        UNKNOWN,
        "flat since a tenth of training, noise 1% of the end",
        False,
        told(UNKNOWN, lambda rng: curves(rng, 0.2 + 2 * np.exp(-time(60) / 0.02), 0.002)),
    ),
)


def lengths(rng: np.random.Generator, gain: float, noise: float, num_pairs: int) -> Any:
    """Studies of n and 2n steps with common points, whose results differ by a gain and by luck."""
    curve = regression(150)
    ends = 0.1 * rng.random((num_pairs, 1))

    def study(num_steps: int, lower: float) -> Study:
        luck = noise * rng.normal(size=(num_pairs, 1))
        return Study.from_arrays(
            {"x": np.arange(num_pairs)},
            {"valid/loss": curve - lower + ends + luck},
            np.round(num_steps * T).astype(int),
            objective="valid/loss",
        )

    return study(150, 0.0), study(300, gain)


def by_lengths(code: str, *arguments: Any) -> Draw:
    """Whether two lengths get this verdict."""

    def draw(rng: np.random.Generator) -> bool:
        shorter, longer = lengths(rng, *arguments)
        info = training_length_info(longer, shorter=shorter)
        return info.basis == "lengths" and found(code, training_length_findings(info))

    return draw


TWO_LENGTHS = (
    Case(
        BOUND,
        "twice the steps gain a quarter, luck a tenth of that, four points",
        True,
        by_lengths(BOUND, 0.05, 0.005, 4),
    ),
    Case(
        BOUND,
        "twice the steps gain nothing, some luck, four points",
        False,
        by_lengths(BOUND, 0.0, 0.005, 4),
    ),
    Case(
        NOT_BOUND,
        "twice the steps gain nothing, hardly any luck, six points",
        True,
        by_lengths(NOT_BOUND, 0.0, 0.001, 6),
    ),
    Case(
        NOT_BOUND,
        "twice the steps gain a quarter, luck as large, four points",
        False,
        by_lengths(NOT_BOUND, 0.05, 0.05, 4),
    ),
)


def seeds(rng: np.random.Generator, ends: tuple[float, float], deviation: float) -> Any:
    """The best points of n and of 2n steps, each with five seeds."""

    def study(num_steps: int, end: float) -> Study:
        curve = end + np.exp(-T / 0.05) + deviation * rng.normal(size=(1, 5, 1))
        values = curve + 0.1 * deviation * rng.normal(size=(1, 5, len(T)))
        return Study.from_arrays(
            {"x": [0.0]},
            {"valid/loss": values},
            (num_steps * T).astype(int),
            objective="valid/loss",
        )

    return study(1000, ends[0]), study(2000, ends[1])


WORSE = cases(
    "longer_was_worse",
    lambda pair: length_findings(compare_lengths(*pair)),
    ("worse by four deviations of a seed", True, lambda rng: seeds(rng, (0.2, 0.24), 0.01)),
    ("as good, and five seeds", False, lambda rng: seeds(rng, (0.2, 0.2), 0.01)),
    ("better by a deviation", False, lambda rng: seeds(rng, (0.2, 0.19), 0.01)),
)


def dips(rng: np.random.Generator, depth: float, width: float, noise: float, num: int) -> Study:
    """Curves that settle, with a dip of so many evaluations' width at a random step of each."""
    t = time(num)
    at = rng.uniform(0.3, 0.8, (6, 1))
    dip = depth * np.exp(-0.5 * ((t - at) * num / width) ** 2)
    values = 0.5 + np.exp(-t / 0.05) - dip + noise * rng.normal(size=dip.shape)
    return Study.from_arrays(
        {"x": np.arange(6)},
        {"valid/loss": values},
        np.arange(num + 1) * 10,
        objective="valid/loss",
    )


CHECKPOINTS = cases(
    "checkpoints_too_sparse",
    lambda study: checkpoint_findings(checkpoint_info(study)),
    (
        "a dip as narrow as one evaluation, little noise",
        True,
        lambda rng: dips(rng, 0.3, 0.5, 0.003, 40),
    ),
    (
        "a dip as narrow as one evaluation, some noise",
        True,
        lambda rng: dips(rng, 0.3, 0.5, 0.01, 40),
    ),
    ("four evaluations", True, lambda rng: dips(rng, 0.0, 1.0, 0.01, 4)),
    ("noise on a plateau", False, lambda rng: dips(rng, 0.0, 1.0, 0.05, 40)),
    ("a valley as wide as ten evaluations", False, lambda rng: dips(rng, 0.3, 5.0, 0.01, 40)),
)

CURVES = (
    *cases(
        "still_improving",
        lambda study: curve_findings(curve_info(study)),
        *(
            (
                f"a power of the step, noise {noise:.1%}",
                True,
                lambda rng, noise=noise: curves(rng, (T + 1e-3) ** -0.5, noise),
            )
            for noise in (0.001, 0.01)
        ),
        (
            "two phases, the first of them ten times as high",
            True,
            lambda rng: curves(rng, 20 * np.exp(-T / 0.02) + 0.4 * 2.0**-T, 0.002),
        ),
        *(
            (
                f"flat since a tenth of training, noise {noise:.0%} of the end",
                False,
                lambda rng, noise=noise: curves(rng, 0.2 + 2 * np.exp(-T / 0.02), 0.2 * noise),
            )
            for noise in (0.01, 0.1, 0.5)
        ),
    ),
    *cases(
        "saturated_early",
        lambda study: curve_findings(curve_info(study)),
        *(
            (
                f"settled by a twentieth of training, noise {noise:.1%} of the end",
                True,
                lambda rng, noise=noise: curves(rng, 0.2 + 2 * np.exp(-T / 0.008), 0.2 * noise),
            )
            for noise in (0.002, 0.01, 0.05)
        ),
        ("two phases, little noise", False, lambda rng: curves(rng, TWO_PHASES, 0.002)),
        (
            "a slow decline in noise",
            False,
            lambda rng: curves(rng, 0.2 + 2 * np.exp(-T / 0.008) + 0.1 * (1 - T), 0.01),
        ),
        (
            "settled at half of training",
            False,
            lambda rng: curves(rng, 0.2 + 2 * np.maximum(0.5 - T, 0), 0.01),
        ),
    ),
    *plain(
        "curve_check_skipped",
        lambda study: curve_findings(curve_info(study)),
        ("five evaluations", True, lambda rng: curves(rng, 2 - time(5), 0.01)),
        ("forty evaluations", False, lambda rng: curves(rng, 2 - T, 0.01)),
    ),
)

# Generalization ---------------------------------------------------------------------------------


def wander(rng: np.random.Generator, shape: tuple[int, int], size: float, together: float) -> Any:
    """Noise whose neighbours go together: an autoregression of one step."""
    noise = size * rng.normal(size=shape)
    for i in range(1, shape[1]):
        noise[:, i] = together * noise[:, i - 1] + math.sqrt(1 - together**2) * noise[:, i]
    return noise


def validated(
    rng: np.random.Generator,
    curve: np.ndarray,
    size: float,
    together: float = 0.0,
    apart: float = 0.2,
    num_trials: int = 9,
) -> Study:
    """Trials with that validation loss, noise and a distance between them; training loss falls."""
    shape = (num_trials, len(curve))
    valid = curve + apart * rng.random((num_trials, 1)) + wander(rng, shape, size, together)
    train = 2.2 * np.exp(-time(len(curve) - 1) / 0.15) + 0.002 * rng.normal(size=shape)
    return Study.from_arrays(
        {"x": np.arange(num_trials)},
        {"valid/loss": valid, "train/loss": train},
        np.arange(len(curve)) * 25,
        objective="valid/loss",
    )


SETTLES = 0.2 + 2 * np.exp(-T / 0.08)
WORST = 1.09 - 0.15 * (1 - np.exp(-T / 0.02)) + 2.1 * T
GENERALIZATION = (
    *cases(
        "overfitting",
        lambda study: overfitting_findings(overfitting_info(study)),
        *(
            (
                f"best within the first fifth, then 1.09 to 3.04, noise {noise}",
                True,
                lambda rng, noise=noise: validated(rng, WORST, noise),
            )
            for noise in (0.01, 0.1)
        ),
        (
            "never better than before training, and three times as high at the end",
            True,
            lambda rng: validated(rng, 1.0 + 2 * T, 0.02),
        ),
        *(
            (
                f"a tenth of the improvement undone from 30% on, noise {noise}",
                True,
                lambda rng, noise=noise: validated(
                    rng, SETTLES + 0.3 * np.maximum(T - 0.3, 0), noise
                ),
            )
            for noise in (0.005, 0.03)
        ),
        *(
            (
                f"settled, noise {noise}, of which neighbours share {together:.0%}",
                False,
                lambda rng, noise=noise, together=together: validated(
                    rng, SETTLES, noise, together
                ),
            )
            for noise, together in ((0.01, 0.0), (0.05, 0.7), (0.05, 0.9))
        ),
        *(
            (
                f"never improves, noise 5%, of which neighbours share {together:.0%}",
                False,
                lambda rng, together=together: validated(rng, 1.0 + 0 * T, 0.05, together),
            )
            for together in (0.0, 0.7)
        ),
    ),
    *cases(
        "late_variance",
        lambda study: late_variance_findings(late_variance_info(study)),
        (
            "noise of twice the way from the best trial to the median one",
            True,
            lambda rng: validated(rng, SETTLES, 0.2, apart=0.2),
        ),
        ("noise as large as that way", True, lambda rng: validated(rng, SETTLES, 0.1, apart=0.2)),
        (
            "noise of a tenth of that way",
            False,
            lambda rng: validated(rng, SETTLES, 0.01, apart=0.2),
        ),
        (
            "trials that are alike, and noise that cannot be seen",
            False,
            lambda rng: validated(rng, SETTLES, 0.005, apart=0.0),
        ),
    ),
)

# Search space -----------------------------------------------------------------------------------

RATES = SearchSpace({"learning_rate": Float(1e-4, 1.0, scale="log")})
BOTH = SearchSpace({"learning_rate": Float(1e-4, 1.0, scale="log"), "b1": Float(0.5, 1.0)})


def bowl(
    rng: np.random.Generator,
    optimum: float,
    noise: float,
    num_trials: int = 24,
    fails_above: float = 2.0,
    fails: float = 0.0,
) -> Study:
    """Results with an optimum at a place in [0, 1] of the learning rate; another one does nothing.

    Trials fail above a place, or at random.
    """
    unit = rng.random(num_trials)
    loss = 0.2 + (unit - optimum) ** 2 + noise * rng.normal(size=num_trials)
    infeasible = (unit > fails_above) | (rng.random(num_trials) < fails)
    infeasible[0] = False
    return Study.from_arrays(
        {"learning_rate": 10 ** (4 * unit - 4), "b1": rng.uniform(0.5, 1.0, num_trials)},
        {"valid/loss": loss[:, None]},
        [100],
        objective="valid/loss",
        space=BOTH,
        infeasible=infeasible,
    )


def lucky(rng: np.random.Generator) -> Study:
    """A rate that does nothing, and whose best trial happens to lie at an edge."""
    unit, loss = rng.random(24), np.sort(rng.random(24))
    edge = rng.integers(2)
    unit[0] = 0.04 * rng.random() if edge else 1 - 0.04 * rng.random()
    unit[1:4] = rng.uniform(0.3, 0.7, 3)
    return Study.from_arrays(
        {"learning_rate": 10 ** (4 * unit - 4)},
        {"valid/loss": loss[:, None]},
        [100],
        objective="valid/loss",
        space=RATES,
    )


def on(name: str, findings: Iterable[Finding]) -> list[Finding]:
    """Those on one hyperparameter."""
    return [finding for finding in findings if finding.evidence.get("name") == name]


BOUNDARIES = (
    *cases(
        "best_near_boundary",
        lambda study: on("learning_rate", boundary_findings(boundary_info(study))),
        *(
            (
                f"the optimum lies {out:.0%} beyond the edge, noise {noise}",
                True,
                lambda rng, out=out, noise=noise: bowl(rng, 1 + out, noise),
            )
            for out, noise in ((0.0, 0.001), (0.2, 0.01), (0.2, 0.02))
        ),
        *(
            (
                f"the optimum lies in the middle, noise {noise}",
                False,
                lambda rng, noise=noise: bowl(rng, 0.5, noise),
            )
            for noise in (0.001, 0.02)
        ),
        ("the rate does nothing", False, lambda rng: bowl(rng, 0.5, 100.0)),
    ),
    *cases(
        "best_maybe_near_boundary",
        lambda study: on("learning_rate", boundary_findings(boundary_info(study))),
        ("the rate does nothing, and the best trial lies at an edge", True, lucky),
        ("the optimum lies in the middle", False, lambda rng: bowl(rng, 0.5, 0.005)),
        ("the optimum lies far beyond the edge", False, lambda rng: bowl(rng, 1.5, 0.001)),
    ),
    *cases(
        "best_at_edge_of_infeasible",
        lambda study: on("learning_rate", stability_findings(stability_info(study))),
        *(
            (
                f"better and better up to where trials fail, noise {noise}",
                True,
                lambda rng, noise=noise: bowl(rng, 0.7, noise, num_trials=32, fails_above=0.65),
            )
            for noise in (0.001, 0.005)
        ),
        (
            "trials fail far above the optimum",
            False,
            lambda rng: bowl(rng, 0.3, 0.005, num_trials=32, fails_above=0.75),
        ),
        (
            "a third of the trials fail at random",
            False,
            lambda rng: bowl(rng, 0.5, 0.005, num_trials=32, fails=0.33),
        ),
        (
            "the rate does nothing, and trials fail at random",
            False,
            lambda rng: bowl(rng, 0.5, 100.0, num_trials=32, fails=0.33),
        ),
    ),
)


def effects(rng: np.random.Generator, effect: float, num_trials: int, noise: float = 0.1) -> Study:
    """A rate that matters, and another hyperparameter with a linear effect on the loss."""
    unit = rng.random((num_trials, 2))
    loss = (unit[:, 0] - 0.5) ** 2 + effect * unit[:, 1] + noise * rng.normal(size=num_trials)
    return Study.from_arrays(
        {"learning_rate": 10 ** (4 * unit[:, 0] - 4), "b1": 0.5 + unit[:, 1] / 2},
        {"valid/loss": loss[:, None]},
        [100],
        objective="valid/loss",
        space=BOTH,
    )


def sweep(rng: np.random.Generator, curve: np.ndarray, noise: float) -> Study:
    """Results along a grid of learning rates; NaN has failed."""
    loss = curve + noise * rng.normal(size=len(curve))
    return Study.from_arrays(
        {"learning_rate": np.geomspace(1e-4, 1.0, len(curve))},
        {"valid/loss": loss[:, None]},
        [100],
        objective="valid/loss",
        space=RATES,
        infeasible=np.isnan(loss),
    )


CLIFF = np.array([2.3, 2.3, 2.28, 2.1, 1.5, 0.8, 0.5, 0.4, np.nan, np.nan])
IMPORTANCE = (
    *cases(
        "insensitive_hyperparameter",
        lambda study: on("b1", importance_findings(importance_info(study))),
        ("it does nothing, 80 trials", True, lambda rng: effects(rng, 0.0, 80)),
        ("it does nothing, 80 trials, much noise", True, lambda rng: effects(rng, 0.0, 80, 1.0)),
        (
            "a third of the variance is its, 40 trials",
            False,
            lambda rng: effects(rng, 0.5 * 6**0.5, 40, 0.5),
        ),
        ("it does nothing, and 16 trials cannot tell", False, lambda rng: effects(rng, 0.0, 16)),
    ),
    *cases(
        "importance_cannot_tell",
        lambda study: importance_findings(importance_info(study)),
        ("two hyperparameters and ten trials", True, lambda rng: effects(rng, 0.1, 10)),
        ("a sweep of one that does nothing", True, lambda rng: sweep(rng, np.ones(10), 0.1)),
        *(
            (
                f"a sweep with an optimum and a cliff, noise {noise}",
                False,
                lambda rng, noise=noise: sweep(rng, CLIFF, noise),
            )
            for noise in (0.001, 0.05)
        ),
        (
            "a sweep with an optimum in the middle, 8 trials",
            False,
            lambda rng: sweep(rng, np.abs(np.arange(8) - 3.4), 0.2),
        ),
        ("both matter much, 60 trials", False, lambda rng: effects(rng, 1.0, 60, 0.02)),
    ),
)

# Instability ------------------------------------------------------------------------------------


def trained(
    rng: np.random.Generator,
    noise: float,
    bump: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    hit: slice = slice(0, 0),
    breaks: slice = slice(0, 0),
) -> Study:
    """A sweep of five rates whose third is best: losses fall, bumps at some, others end NaN."""
    rates = 0.01 * 2.5 ** np.arange(5)
    train = 0.2 + 2.1 * np.exp(-T / 0.15) + noise * rng.normal(size=(5, len(T)))
    if bump is not None:
        at = rng.uniform(0.3, 0.6, (5, 1))[hit]
        train[hit] += bump(T, at)
    valid = train + 0.05 * np.abs(np.arange(5) - 2)[:, None]
    train[breaks, 12:] = np.nan
    valid[breaks, 12:] = np.nan
    failed = np.zeros(5, bool)
    failed[breaks] = True
    return Study.from_arrays(
        {"learning_rate": rates},
        {"valid/loss": valid, "train/loss": train},
        np.arange(len(T)) * 25,
        objective="valid/loss",
        infeasible=failed,
    )


def spike(height: float, width: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A rise that is over after that share of training."""
    return lambda t, at: height * ((t >= at) & (t < at + width))


def tail(height: float, width: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A rise that dies away slowly."""
    return lambda t, at: np.where(t >= at, height * np.exp(-(t - at) / width), 0.0)


BELOW, BEST, ABOVE, FAR = slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)
INSTABILITY = (
    *cases(
        "unstable_above_best",
        lambda study: instability_findings(instability_info(study)),
        *(
            (
                f"a bump of {height:.0%} of the decline above lr*, noise {noise}",
                True,
                lambda rng, height=height, noise=noise: trained(
                    rng, noise, spike(2 * height, 0.1), ABOVE
                ),
            )
            for height, noise in ((0.3, 0.005), (0.5, 0.03))
        ),
        ("trials above lr* end NaN", True, lambda rng: trained(rng, 0.01, breaks=slice(3, 5))),
        *(
            (f"losses fall, noise {noise}", False, lambda rng, noise=noise: trained(rng, noise))
            for noise in (0.002, 0.02, 0.1)
        ),
        (
            "bumps below lr* only",
            False,
            lambda rng: trained(rng, 0.01, spike(1.0, 0.1), BELOW),
        ),
    ),
    *cases(
        "unstable_best",
        lambda study: instability_findings(instability_info(study)),
        (
            "a bump of half of the decline at lr*, a tenth of training",
            True,
            lambda rng: trained(rng, 0.01, spike(1.0, 0.1), BEST),
        ),
        *(
            (f"losses fall, noise {noise}", False, lambda rng, noise=noise: trained(rng, noise))
            for noise in (0.002, 0.02, 0.1)
        ),
        (
            "trials above lr* are unstable",
            False,
            lambda rng: trained(rng, 0.01, spike(1.0, 0.1), FAR),
        ),
    ),
    *cases(
        "slow_recovery",
        lambda study: instability_findings(instability_info(study)),
        (
            "a bump that takes a quarter of training to die away",
            True,
            lambda rng: trained(rng, 0.01, tail(1.0, 0.1), ABOVE),
        ),
        ("bumps of an instant", False, lambda rng: trained(rng, 0.01, spike(1.0, 0.024), ABOVE)),
        ("losses fall", False, lambda rng: trained(rng, 0.02)),
    ),
    *plain(
        "instability_check_skipped",
        lambda study: instability_findings(instability_info(study)),
        ("no training loss", True, lambda rng: bowl(rng, 0.5, 0.1, num_trials=4)),
        ("a training loss", False, lambda rng: trained(rng, 0.01)),
    ),
)

# Feasibility, and what the record says ----------------------------------------------------------


def outcomes_of(
    rng: np.random.Generator, fail: float = 0.0, silent: float = 0.0, num_trials: int = 20
) -> Study:
    """Trials of which exact shares fail or never have a value, in random order."""
    infeasible = np.arange(num_trials) < round(fail * num_trials)
    loss = rng.random((num_trials, 3))
    loss[num_trials - round(silent * num_trials) :] = np.nan
    order = rng.permutation(num_trials)
    return Study.from_arrays(
        {"learning_rate": 10 ** rng.uniform(-4, 0, num_trials)},
        {"valid/loss": loss[order]},
        [0, 10, 20],
        objective="valid/loss",
        infeasible=infeasible[order],
    )


def stopping(rng: np.random.Generator, diverging: bool) -> Study:
    """Runs that somebody stopped as their validation loss rose, or whose loss went up to NaN."""
    curve = 0.2 + 2 * np.exp(-T / 0.1) + 0.01 * rng.normal(size=(8, len(T)))
    for row in curve:
        end = rng.integers(8, 40)
        if diverging:
            growth = np.exp(np.arange(5) * rng.uniform(1.0, 2.0))
            row[end - 5 : end] = row[0] * growth
        row[end:] = np.nan
    return Study.from_arrays(
        {"x": np.arange(8)}, {"valid/loss": curve}, np.arange(len(T)), objective="valid/loss"
    )


def unjudged(study: Study) -> list[Finding]:
    """What the record says could not be judged, of two trials, so that it is soon said."""
    few = {name: values[:2] for name, values in study.points.items()}
    data = {n: study.data[n].values[:2] for n in study.data if "loss" in str(n)}
    return diagnose(
        Study.from_arrays(few, data, study.data["step"].values, objective=study.objective)
    )


FEASIBILITY = tuple(
    case
    for code, true, false in (
        ("all_infeasible", {"fail": 1.0}, {"fail": 0.9}),
        ("many_infeasible", {"fail": 0.5}, {"fail": 0.4}),
        ("some_infeasible", {"fail": 0.1}, {}),
        ("no_finite_objective", {"fail": 0.5, "silent": 0.5}, {"fail": 0.5}),
        ("some_without_value", {"silent": 0.3}, {}),
    )
    for case in plain(
        code,
        lambda study: feasibility_findings(feasibility_info(study)),
        *(
            (
                " and ".join(f"{share:.0%} {name}" for name, share in world.items())
                or "all is well",
                holds,
                lambda rng, world=world: outcomes_of(rng, **world),
            )
            for holds, world in ((True, true), (False, false))
        ),
    )
)
RECORDS = (
    *cases(
        "divergence_check_skipped",
        unjudged,
        ("runs that somebody stopped", True, lambda rng: stopping(rng, False)),
        ("losses that rise until they are NaN", False, lambda rng: stopping(rng, True)),
        ("runs of full length", False, lambda rng: trained(rng, 0.01)),
    ),
    *plain(
        "high_loss_check_skipped",
        unjudged,
        ("no training loss", True, lambda rng: stopping(rng, False)),
        ("a training loss", False, lambda rng: curves(rng, 2 - T, 0.1, name="train/loss")),
    ),
    *plain(
        "boundary_check_skipped",
        lambda study: boundary_findings(boundary_info(study)),
        ("no search space", True, lambda rng: outcomes_of(rng)),
        ("a search space", False, lambda rng: bowl(rng, 0.5, 0.01)),
    ),
    fact(
        "no_trials",
        "a study that has just begun",
        True,
        lambda: diagnose(
            study_from_blocks(
                {
                    "num_trials": 4,
                    "num_seeds": 1,
                    "step": [0],
                    "objective": "loss",
                    "maximize": False,
                },
                [],
            )
        ),
    ),
    fact(
        "no_trials",
        "twenty trials",
        False,
        lambda: diagnose(outcomes_of(np.random.default_rng(0))),
    ),
)


def healthy(
    rng: np.random.Generator, optimum: float, rise: float = 0.0, noise: float = 0.002
) -> Study:
    """A search whose trials settle, at levels that depend on the rate."""
    unit = rng.random(16)
    level = 0.2 + (unit - optimum) ** 2 + 0.005 * rng.normal(size=16)
    shape = (16, len(T))
    fall = 2 * np.exp(-T / 0.05)
    valid = level[:, None] + fall + rise * T + noise * rng.normal(size=shape)
    train = 0.8 * level[:, None] + fall - 0.1 * T + noise * rng.normal(size=shape)
    return Study.from_arrays(
        {"learning_rate": 10 ** (4 * unit - 4)},
        {"valid/loss": valid, "train/loss": train},
        np.arange(len(T)) * 25,
        objective="valid/loss",
        space=RATES,
    )


HEALTHY = cases(
    "healthy",
    diagnose,
    ("trials settle, and the optimum lies inside", True, lambda rng: healthy(rng, 0.5)),
    ("the optimum lies beyond the edge", False, lambda rng: healthy(rng, 1.5)),
    ("trials overfit", False, lambda rng: healthy(rng, 0.5, rise=0.6)),
    (
        "noise as large as the differences between trials",
        False,
        lambda rng: healthy(rng, 0.5, noise=0.2),
    ),
)

# Numbers of trials and scientific hyperparameters -------------------------------------------------


def ranked(rng: np.random.Generator, loss: np.ndarray) -> Study:
    """Trials with these results, in random order."""
    return Study.from_arrays(
        {"x": np.arange(len(loss))},
        {"valid/loss": rng.permutation(loss)[:, None]},
        [10],
        objective="valid/loss",
    )


def plateau(rng: np.random.Generator) -> np.ndarray:
    """Results of which half are as good as the best."""
    return np.maximum(rng.random(64), 0.5)


def budget(study: Study) -> list[Finding]:
    """What is said of the number of trials."""
    info = budget_info(study)
    return budget_findings(info, *default_min_gain(info))


BUDGETS = (
    *cases(
        "enough_trials",
        budget,
        (
            "half of the space is as good as the best of it",
            True,
            lambda rng: ranked(rng, plateau(rng)),
        ),
        (
            "a power law: ever better, ever more rarely",
            False,
            lambda rng: ranked(rng, np.log(rng.random(64))),
        ),
    ),
    *cases(
        "more_trials_help",
        budget,
        (
            "a power law: ever better, ever more rarely",
            True,
            lambda rng: ranked(rng, np.log(rng.random(64))),
        ),
        (
            "half of the space is as good as the best of it",
            False,
            lambda rng: ranked(rng, plateau(rng)),
        ),
    ),
    *plain(
        "budget_cannot_tell",
        budget,
        ("one trial", True, lambda rng: ranked(rng, rng.random(1))),
        (
            "64 trials, and half of the space is as good as the best of it",
            False,
            lambda rng: ranked(rng, plateau(rng)),
        ),
    ),
)


def widths(
    rng: np.random.Generator,
    gain: float,
    noise: float,
    num_trials: tuple[int, int] = (10, 10),
    broken: bool = False,
) -> Study:
    """Two values of a scientific hyperparameter, each at its own nuisance points."""
    kind = np.repeat([16, 64], num_trials)
    unit = rng.random(len(kind))
    loss = 0.2 + (unit - 0.5) ** 2 - gain * (kind == 64) + noise * rng.normal(size=len(kind))
    return Study.from_arrays(
        {"width": kind, "learning_rate": 10 ** (4 * unit - 4)},
        {"valid/loss": loss[:, None]},
        [10],
        objective="valid/loss",
        infeasible=(kind == 64) if broken else np.zeros(len(kind), bool),
    )


def isolated(study: Study) -> list[Finding]:
    """What is said of the width."""
    return isolation_findings(isolation_info(study, "width"))


def nothing(rng: np.random.Generator) -> Study:
    """Every trial failed."""
    study = widths(rng, 0.0, 0.1)
    return Study.from_arrays(
        study.points,
        {"valid/loss": study.data["valid/loss"].values},
        [10],
        objective="valid/loss",
        infeasible=np.ones(study.num_trials, bool),
    )


ISOLATION = (
    *cases(
        "isolation_best",
        isolated,
        ("better by a lot", True, lambda rng: widths(rng, 0.2, 0.01)),
        ("better by four deviations", True, lambda rng: widths(rng, 0.2, 0.05)),
        *(
            (f"alike, noise {noise}", False, lambda rng, noise=noise: widths(rng, 0.0, noise))
            for noise in (0.001, 0.05)
        ),
        ("alike, but three times the trials", False, lambda rng: widths(rng, 0.0, 0.05, (8, 24))),
    ),
    *cases(
        "isolation_cannot_tell",
        isolated,
        ("alike", True, lambda rng: widths(rng, 0.0, 0.05)),
        ("better by a lot", False, lambda rng: widths(rng, 0.3, 0.01)),
    ),
    *plain(
        "isolation_unequal",
        isolated,
        ("8 trials and 24", True, lambda rng: widths(rng, 0.0, 0.05, (8, 24))),
        ("10 trials each", False, lambda rng: widths(rng, 0.0, 0.05)),
    ),
    *plain(
        "isolation_value_infeasible",
        isolated,
        ("all trials of one value fail", True, lambda rng: widths(rng, 0.0, 0.05, broken=True)),
        ("none fails", False, lambda rng: widths(rng, 0.0, 0.05)),
    ),
    *plain(
        "isolation_nothing",
        isolated,
        ("every trial fails", True, nothing),
        ("all trials of one value fail", False, lambda rng: widths(rng, 0.0, 0.05, broken=True)),
    ),
)


def longer(schedule: Any) -> list[Finding]:
    """What is said of a schedule over 1000 steps after a linear decay over 100."""
    return longer_schedule_findings(schedules.linear_decay(1.0, 100), 100, schedule, 1000)


SCHEDULES = (
    fact(
        "too_small_learning_rate",
        "a linear decay stretched tenfold",
        True,
        lambda: longer(schedules.linear_decay(1.0, 1000)),
    ),
    fact(
        "too_small_learning_rate",
        "a linear decay put off by the extra steps",
        False,
        lambda: longer(schedules.linear_decay(1.0, 100, hold_steps=900)),
    ),
)

# What validation can tell -----------------------------------------------------------------------


def counted(rng: np.random.Generator, errors: np.ndarray, jitter: int = 0) -> Study:
    """Wrong ones (trial, eval) of 50 validation examples, a few more or less by chance."""
    wrong = errors + rng.integers(-jitter, jitter + 1, errors.shape)
    wrong[:, 0] = errors[:, 0]
    return Study.from_arrays(
        {"x": rng.permutation(len(errors))},
        {"valid/error_rate": np.clip(wrong, 0, 50) / 50},
        np.arange(errors.shape[1]) * 10,
        objective="valid/error_rate",
        resolution=0.02,
    )


def falling(ends: np.ndarray) -> np.ndarray:
    """Errors that fall from 40 of 50 to these ends."""
    return np.round(ends[:, None] + (40 - ends[:, None]) * np.exp(-time(12) / 0.1)).astype(int)


APART, ALIKE = np.arange(8) * 3 + 2, np.array([0, 0, 0, 1, 3, 5, 8, 9])
RESOLUTION = (
    *cases(
        "no_slope",
        lambda study: resolution_findings(resolution_info(study)),
        (
            "no trial gets more than one example more, or fewer, right",
            True,
            lambda rng: counted(rng, np.full((8, 13), 33), 1),
        ),
        ("errors fall", False, lambda rng: counted(rng, falling(APART), 1)),
        (
            "one trial of eight learns something",
            False,
            lambda rng: counted(rng, np.r_[falling(APART[:1]), np.full((7, 13), 40)], 1),
        ),
    ),
    *cases(
        "best_at_start",
        lambda study: resolution_findings(resolution_info(study)),
        (
            "errors rise from the first evaluation on",
            True,
            lambda rng: counted(rng, np.tile(10 + 2 * np.arange(13), (8, 1)), 1),
        ),
        ("errors fall", False, lambda rng: counted(rng, falling(APART), 1)),
        (
            "errors fall at first, and end higher than they were",
            False,
            lambda rng: counted(
                rng, np.tile(20 - 8 * (np.arange(13) == 3) + np.arange(13), (8, 1)), 1
            ),
        ),
    ),
    *cases(
        "validation_cannot_separate",
        lambda study: resolution_findings(resolution_info(study)),
        ("three of eight trials make no error", True, lambda rng: counted(rng, falling(ALIKE))),
        ("trials lie three examples apart", False, lambda rng: counted(rng, falling(APART))),
        ("losses, which every example changes", False, lambda rng: bowl(rng, 0.5, 0.01)),
    ),
)

CASES: tuple[Case, ...] = (
    *LENGTH_CASES,
    *TWO_LENGTHS,
    *WORSE,
    *CHECKPOINTS,
    *CURVES,
    *GENERALIZATION,
    *BOUNDARIES,
    *IMPORTANCE,
    *INSTABILITY,
    *FEASIBILITY,
    *RESOLUTION,
    *RECORDS,
    *HEALTHY,
    *BUDGETS,
    *ISOLATION,
    *SCHEDULES,
)
"""All cases of the truth table."""
