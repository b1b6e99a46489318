"""Whether the objective can tell trials apart: one validation example is the least it can say."""

import math
from typing import NamedTuple

import numpy as np

from playbook_optax import _checks, _shown
from playbook_optax._ties import tie_breakers, tied_with_best
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import Outcomes, metric_names, outcomes
from playbook_optax.records.study import Study

SECTION = "Extracting insight from experimental results"
_ROUNDING = 1e-6
"""A change that is this part of where a trial started is none: float32 holds seven digits."""
_MANY, _FEW_TRIALS = 0.5, 4
"""Ties are a warning where more than this share of so many trials are tied."""
_LEVEL = 0.95
_MOST_EXAMPLES = 2**53
"""Beyond it a float tells no neighbours apart; a file may claim any resolution."""


@_shown.short
class ResolutionInfo(NamedTuple):
    """What the objective of a study can tell.

    Attributes:
      objective: name of the metric.
      maximize: whether larger is better.
      resolution: what one example changes it by; 0 where that is not known.
      best: the best trial, ties settled; -1 where no trial has a value.
      value: its value, NaN where there is none.
      step: step of its checkpoint, -1 where there is none.
      num_usable: trials that have a value.
      tied: (tied,) trials within the resolution of the best value, the best first.
      breakers: metrics that decided between them.
      start: objective before the first update, the mean over usable trials; NaN if not recorded.
      gain: largest improvement of a trial on its own start; NaN if that was not recorded.
      moved: largest change of a trial from its own start, for better or worse; likewise.
      upper: what the value may be on as many other examples, with 95% confidence on one side, for
        a share of examples; NaN for anything else.
    """

    objective: str
    maximize: bool
    resolution: float
    best: int
    value: float
    step: int
    num_usable: int
    tied: np.ndarray
    breakers: tuple[str, ...]
    start: float
    gain: float
    moved: float
    upper: float

    @property
    def unmoved(self) -> float:
        """A change up to this is none."""
        rounding = _ROUNDING * abs(self.start) if np.isfinite(self.start) else 0.0
        return max(1.001 * self.resolution, rounding)

    @property
    def flat(self) -> bool:
        """Whether no trial ever left the place where it started."""
        return self.num_usable > 1 and self.moved <= self.unmoved

    @property
    def best_at_start(self) -> bool:
        """Whether nothing is better than the weights before training."""
        return self.gain <= self.unmoved


@_checks.named_arguments
def resolution_info(
    study: Study, objective: str | None = None, maximize: bool | None = None
) -> ResolutionInfo:
    """Says what the objective can tell: ties, a sweep without a slope, a best before training.

    What one example changes the objective by is in ``spec["resolution"]``, see `Workload`. Values
    within it of the best are tied with it; the loss of the same examples decides between them, then
    that of training, then the middle of their range.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The ResolutionInfo.

    Raises:
      ValueError: no such metric, or its direction has to be said.

    Example:
      >>> study = Study.from_arrays(
      ...     {"learning_rate": [0.01, 0.1, 1.0]},
      ...     {"valid/error_rate": [[0.5, 0.0], [0.5, 0.0], [0.5, 0.25]],
      ...      "valid/loss": [[0.7, 0.3], [0.7, 0.1], [0.7, 0.6]]}, [0, 10],
      ...     objective="valid/error_rate", resolution=0.25)
      >>> info = resolution_info(study)
      >>> info.best, info.tied.tolist(), round(info.upper, 2)
      (1, [1, 0, 2], 0.53)

    Source: "Extracting insight from experimental results".
    """
    out = outcomes(study, objective, maximize)
    loss = np.where(out.usable, out.loss, np.inf)
    usable = np.flatnonzero(out.usable)
    best = int(out.settled[0]) if len(usable) else -1
    start, gain, moved = np.nan, np.nan, np.nan
    if len(usable) and out.step[0] == 0 and np.isfinite(out.curve[usable, 0]).any():
        sign = -1.0 if out.maximize else 1.0
        starts = out.curve[usable, 0]
        start = float(np.nanmean(starts))
        gain = float(np.nanmax(sign * starts - loss[usable]))
        moved = float(np.nanmax(np.abs(out.curve[usable] - starts[:, None])))
    return ResolutionInfo(
        objective=out.objective,
        maximize=out.maximize,
        resolution=out.resolution,
        best=best,
        value=float(out.value[best]) if best >= 0 else np.nan,
        step=int(out.checkpoint_step[best]) if best >= 0 else -1,
        num_usable=len(usable),
        tied=out.settled[tied_with_best(loss, out.resolution)[out.settled]],
        breakers=tie_breakers(out.objective, metric_names(study)),
        start=start,
        gain=gain,
        moved=moved,
        upper=_upper(out.value[best], out) if best >= 0 else np.nan,
    )


def _upper(value: float, out: Outcomes) -> float:
    """The end of the Clopper-Pearson interval, where the objective is a share of n examples."""
    from scipy.special import betaincinv  # Takes a tenth of a second.

    wrong = 1 - value if out.maximize else value
    num = _num_examples(out.resolution)
    if num is None or not 0 <= wrong < 1:
        return float("nan")
    bound = float(betaincinv(wrong * num + 1, num - wrong * num, _LEVEL))
    return 1 - bound if out.maximize else bound


def _num_examples(resolution: float) -> float | None:
    """Of how many examples one makes that much; None where that is no number that is counted."""
    num = 1 / resolution if resolution else math.inf
    return num if 1 < num <= _MOST_EXAMPLES else None


def told_resolution(objective: str, resolution: float) -> str:
    """What one example is, in a sentence's part.

    Args:
      objective: name of the metric.
      resolution: what one example changes it by.

    Returns:
      Such as "one example of 34 is 0.0294 of valid/error_rate".
    """
    num = _num_examples(resolution)
    of = f" of {num:.0f}" if num is not None and abs(num - round(num)) < 1e-3 * num else ""
    return f"one example{of} is {resolution:.3g} of {objective}"


def resolution_findings(info: ResolutionInfo) -> list[Finding]:
    """What the numbers of `resolution_info` say.

    Args:
      info: the numbers.

    Returns:
      ``no_slope`` (error) where no trial differs from another or from its start,
      ``best_at_start`` (error) where training made nothing better, and
      ``validation_cannot_separate`` where trials are tied with the best.
    """
    evidence = {
        "objective": info.objective,
        "resolution": info.resolution,
        "best_trial": info.best,
        "value": info.value,
        "start": info.start,
    }
    if info.best < 0:
        return []
    if info.flat:
        least = "its rounding"
        if info.resolution:
            least = f"its resolution: {told_resolution(info.objective, info.resolution)}"
        return [
            Finding(
                "no_slope",
                "error",
                f"No trial moved the objective: {info.objective} was {info.start:.4g} before "
                f"training, and none of the {info.num_usable} feasible trials was ever further "
                f"from it than {info.moved:.2g}, which is within {least}. Nothing can be chosen "
                "from this.",
                {**evidence, "moved": info.moved},
                SECTION,
                "Search larger learning rates, train longer, or choose an objective that moves, "
                "such as the validation loss. Check that the loss depends on the parameters.",
            )
        ]
    if info.best_at_start:
        return [
            Finding(
                "best_at_start",
                "error",
                f"Training made nothing better: {info.objective} was {info.start:.4g} before the "
                f"first update, and {info.value:.4g} is the best of {info.num_usable} feasible "
                "trial(s) since.",
                {**evidence, "gain": info.gain},
                SECTION,
                "Search smaller learning rates, evaluate more often, and check the sign of the "
                "objective (maximize=).",
            )
        ]
    if info.resolution and len(info.tied) > 1:
        return [_tied(info, evidence)]
    return []


def _tied(info: ResolutionInfo, evidence: dict[str, object]) -> Finding:
    num, share = len(info.tied), len(info.tied) / info.num_usable
    chosen = f"trial {info.best} lies in the middle of their range"
    if info.breakers:
        chosen = (
            f"trial {info.best} comes first by its {info.breakers[0]}, from the middle of what is "
            "alike in that, too"
        )
    may = ""
    if np.isfinite(info.upper):
        may = (
            f" On as many other examples {info.objective} may be "
            f"{'down' if info.maximize else 'up'} to {info.upper:.3g} (95% confidence)."
        )
    return Finding(
        "validation_cannot_separate",
        "warning" if share > _MANY and info.num_usable >= _FEW_TRIALS else "info",
        f"Validation cannot separate the best {num} of {info.num_usable} feasible trials: "
        f"{told_resolution(info.objective, info.resolution)}, and they lie within it; "
        f"{chosen}.{may}",
        {**evidence, "tied": info.tied, "breakers": list(info.breakers), "upper": info.upper},
        SECTION,
        "Hold out more validation examples, or tune for the validation loss.",
    )
