"""Trials from elsewhere, the user's own loop or another tool's table, as one block of a study."""

import dataclasses
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from playbook_optax import _feasibility
from playbook_optax._checks import MAX_STEPS, ArgumentTypeError, check_count, nearest
from playbook_optax._ties import best_evaluation, tie_breakers
from playbook_optax.records import storage
from playbook_optax.search_space import Categorical, Parameter, SearchSpace

if TYPE_CHECKING:
    import pandas


def labels_of(space: SearchSpace | None) -> dict[str, tuple[str, ...]]:
    """The labels of the choices that points hold as an index.

    Args:
      space: the search space, or None.

    Returns:
      Hyperparameter to labels in the order of the numbers that points hold, for every categorical
      whose choices are not numbers.
    """
    return {
        name: ("False", "True") if parameter.boolean else parameter.labels
        for name, parameter in (space or {}).items()
        if isinstance(parameter, Categorical) and not parameter.numeric
    }


def check_points(what: str, values: np.ndarray) -> None:
    """Checks the values of a hyperparameter.

    Args:
      what: whose they are, the subject of a sentence.
      values: numbers (trial,).

    Raises:
      ValueError: one is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
    if len(bad):
        raise ValueError(
            f"{what} is not finite in {len(bad)} trials, the first {bad[0]}. A "
            "hyperparameter that only some trials have makes two studies."
        )


def check_indices(what: str, values: np.ndarray, labels: Sequence[str]) -> None:
    """Checks that values are indices of labels.

    Args:
      what: whose they are, the subject of a sentence.
      values: numbers (trial,).
      labels: what the indices mean.

    Raises:
      ValueError: they are no integers, or there is no such label.
    """
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must hold indices of choices, which are integers, not {values.dtype}."
        )
    bad = np.flatnonzero((values < 0) | (values >= len(labels)))
    if len(bad):
        raise ValueError(
            f"{what} is {values[bad[0]]} in trial {bad[0]}, but its choices are 0 to "
            f"{len(labels) - 1}."
        )


def check_scale(what: str, values: np.ndarray, parameter: Parameter) -> None:
    """Checks that values are numbers with a place on the scale of their range, inside it or not.

    Args:
      what: whose they are, the subject of a sentence.
      values: finite numbers (trial,).
      parameter: of the search space.

    Raises:
      ValueError: one has none.
    """
    if values.dtype.kind == "b":
        raise ValueError(f"{what} must hold numbers, not booleans, because its range does.")
    scale = getattr(parameter, "scale", "linear")
    numbers = values.astype(np.float64)
    # 0 is drawn where a log scale begins.
    bad = np.flatnonzero((numbers < 0) if scale == "log" else (numbers >= 1))
    if len(bad) and scale != "linear":
        raise ValueError(
            f"{what} is {values[bad[0]]} in trial {bad[0]}, which the scale {scale!r} of its range "
            "does not have."
        )


def _numbers(what: str, values: Any) -> np.ndarray:
    if np.ma.is_masked(values):
        raise ValueError(f"{what} is masked in places: drop those trials, or say what they are.")
    try:
        array = np.asarray(values)
    except ValueError as error:  # Lists of different lengths.
        raise ValueError(f"{what} must be an array of numbers: {error}.") from error
    # Names such as bfloat16 have kind "V" in NumPy but are floats all the same.
    if array.dtype.kind not in "biuf" and "float" not in array.dtype.name:
        raise ValueError(f"{what} must be an array of numbers, got dtype {array.dtype}.")
    return array


# Nobody stops a run that was evaluated but once since it began; many diverge there.
_MIN_SEEN = 3
# What nobody but our trials records.
_OURS = "step/peak_gradient_norm"
_OF_STEPS, _OF_TRAINING = "step/", ("step/", "train/")
_ENDED = (
    "{} runs end before the last step, with no loss on its way up, and were taken as stopped "
    "by somebody, not as diverged; infeasible= says otherwise"
)


def _is_loss(name: str) -> bool:
    return "loss" in name.rpartition("/")[2].lower()


def _returns(curve: np.ndarray, training: bool) -> np.ndarray:
    """Whether losses (..., eval) end half-way back to where they began, or higher.

    A validation loss has to be back where it began: below that overfitting raises it as well.
    """
    seen = np.isfinite(curve)
    known = seen.any(axis=-1)
    places = np.arange(curve.shape[-1])
    first = np.where(seen, places, curve.shape[-1]).min(axis=-1) * known
    last = np.where(seen, places, 0).max(axis=-1)
    finite = np.where(seen, curve, 0.0)
    begin, end = (np.take_along_axis(finite, i[..., None], -1)[..., 0] for i in (first, last))
    lowest = np.where(known, np.where(seen, curve, np.inf).min(axis=-1), 0.0)
    # In halves, which no sum of large numbers makes infinite.
    limit = lowest / 2 + begin / 2 if training else begin
    return np.asarray(known & (end > limit))


@dataclasses.dataclass(frozen=True)
class Imported:
    """Arrays of another loop, checked.

    Attributes:
      points: name to (trial,).
      metrics: name to (trial, seed, eval).
      step: (eval,) int32.
      present: (trial, eval) which evaluations a table has; None for all.
      failed: (trial,) which trials are known to have failed; None if that is not known.
    """

    points: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    step: np.ndarray
    present: np.ndarray | None = None
    failed: np.ndarray | None = None

    @classmethod
    def checked(
        cls,
        points: Mapping[str, Any],
        metrics: Mapping[str, Any],
        step: Any,
        objective: str,
        space: SearchSpace | None,
    ) -> "Imported":
        """Checks what the caller gave.

        Args:
          points: name to numbers (trial,).
          metrics: name to numbers (trial, eval) or (trial, seed, eval).
          step: rising integers (eval,), or the same ones for each trial (trial, eval).
          objective: the name of a metric.
          space: the search space, or None.

        Returns:
          The arrays.

        Raises:
          ValueError: the message names what does not fit.
        """
        for what, mapping in (("points", points), ("metrics", metrics)):
            if not isinstance(mapping, Mapping) or not mapping:
                raise ValueError(f"{what} must be a non-empty mapping of name to array.")
            for name in mapping:
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{what} has the name {name!r}; names are non-empty text.")
        if objective not in metrics:
            raise ValueError(
                f"objective = {objective!r} is not in metrics: {nearest(objective, metrics)}"
            )
        steps = _numbers("step", step)
        in_trials = steps.ndim == 2 and steps.shape[:1] == np.shape(metrics[objective])[:1]
        if in_trials and len(steps) and (steps == steps[:1]).all():
            steps = steps[0]  # As a vmapped loop returns it.
        if steps.ndim != 1 or not len(steps) or steps.dtype.kind not in "iu":
            raise ValueError(
                f"step must be rising integers of shape (eval,), got dtype {steps.dtype} and shape "
                f"{steps.shape}."
            )
        if steps[0] < 0 or steps[-1] >= 2**31 or np.any(steps[1:] <= steps[:-1]):
            raise ValueError("step must rise from >= 0 to < 2**31 without repetition.")
        checked_points = {name: _numbers(f"points[{name!r}]", v) for name, v in points.items()}
        first = next(iter(checked_points))
        shape = checked_points[first].shape
        for name, values in checked_points.items():
            if values.ndim != 1 or not len(values):
                raise ValueError(
                    f"points[{name!r}] must have shape (trial,) with at least one trial, got "
                    f"{values.shape}."
                )
            if values.shape != shape:
                raise ValueError(
                    f"points[{name!r}] has {len(values)} trials but points[{first!r}] has "
                    f"{shape[0]}."
                )
            check_points(f"points[{name!r}]", values)
        if space is not None:
            absent = [name for name in space if name not in checked_points]
            if absent:
                raise ValueError(f"points lacks {', '.join(absent)}, which space has.")
        for name, labels in labels_of(space).items():
            check_indices(f"points[{name!r}]", checked_points[name], labels)
        for name, parameter in (space or {}).items():
            check_scale(f"points[{name!r}]", checked_points[name], parameter)
        checked_metrics = {}
        leading: tuple[int, ...] | None = None
        for name, values in metrics.items():
            array = _numbers(f"metrics[{name!r}]", values)
            wanted = (shape[0], len(steps))
            if array.ndim not in (2, 3) or (array.shape[0], array.shape[-1]) != wanted:
                raise ValueError(
                    f"metrics[{name!r}] must have shape (trial, eval) = {wanted} or (trial, seed, "
                    f"eval), got {array.shape}."
                )
            if array.ndim == 2:
                array = array[:, None, :]
            if leading is not None and array.shape != leading:
                raise ValueError(
                    f"metrics[{name!r}] has {array.shape[1]} seeds, the metrics before it "
                    f"{leading[1]}."
                )
            if not array.shape[1]:
                raise ValueError(f"metrics[{name!r}] has no seed: its shape is {array.shape}.")
            leading = array.shape
            checked_metrics[name] = array
        return cls(checked_points, checked_metrics, steps.astype(np.int32))

    def judge(self, objective: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]:
        """Whether each run is infeasible, from which evaluation, why, and what was not judged."""
        shape = self.metrics[objective].shape
        bad = np.zeros(shape, bool)
        judged = [name for name in self.metrics if name == objective or _is_loss(name)]
        for name in judged:
            wrong = ~np.isfinite(self.metrics[name].astype(np.float64))
            if name.startswith(_OF_STEPS):  # A mean since the evaluation before, if there was one.
                wrong[..., 0] = False
            bad |= wrong
        if self.present is not None:
            bad &= self.present[:, None, :]
        if self.step[0] == 0 and len(self.step) > 1:
            # Of an untrained model a metric may overflow, and means over updates are of none.
            bad[..., 0] = False
        ended = self._ended_early(bad, judged)
        unchecked = {"divergence": _ENDED.format(int(ended.sum()))} if ended.any() else {}
        broken = np.asarray(bad.any(axis=-1))
        # Of a run that ended too: the caller may know that it diverged.
        reason = np.where(broken, _feasibility.NONFINITE_LOSS, 0)
        index = np.where(broken, bad.argmax(axis=-1), -1)
        infeasible = broken & ~ended
        if self.failed is not None:  # Known without a reason: none is made up.
            infeasible = infeasible | self.failed[:, None]
        unseen = ""
        if "train/loss" not in self.metrics:
            unseen = 'there is no metric "train/loss"'
        elif self.step[0] != 0:
            unseen = f'"train/loss" begins at step {self.step[0]}, not before training'
        if unseen:
            return infeasible, index, reason, {"high_loss": unseen, **unchecked}
        curves = self.metrics["train/loss"].astype(np.float64)
        curves = np.where(np.isfinite(curves), curves, np.nan)
        high, first_high = _feasibility.high_loss(curves)
        high = np.logical_and(high, ~infeasible)
        reason = np.where(high, _feasibility.HIGH_LOSS, reason)
        index = np.where(high, first_high, index)
        return np.logical_or(infeasible, high), index, reason, unchecked

    def _ended_early(self, bad: np.ndarray, judged: Sequence[str]) -> np.ndarray:
        """Which runs somebody stopped, as far as their curves tell: (trial, seed).

        From some evaluation on, the fourth or later, every metric is NaN; nothing is infinite; and
        no loss was on its way back up, as before a divergence it mostly is.
        """
        ended = np.asarray(bad.any(axis=-1))
        # A table leaves out the rows of a run that has ended, and our trials end by diverging only.
        if self.present is not None or _OURS in self.metrics:
            return np.zeros_like(ended)
        first = np.where(ended, bad.argmax(axis=-1), len(self.step))[..., None]
        after = np.arange(len(self.step)) >= first
        ended &= first[..., 0] >= _MIN_SEEN
        for name, values in self.metrics.items():
            curve = values.astype(np.float64)
            ended &= (np.isnan(curve) | ~after).all(axis=-1)
            if name not in judged:
                continue
            ended &= ~np.isinf(curve).any(axis=-1)
            if _is_loss(name):
                ended &= ~_returns(np.where(after, np.nan, curve), name.startswith(_OF_TRAINING))
        return ended

    def record(
        self,
        objective: str,
        maximize: bool,
        space: SearchSpace | None,
        infeasible: Any,
        name: str,
        *,
        source: str,
        extra: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Makes spec and block, deciding which trials are infeasible where it is not given.

        Args:
          objective: the name of a metric.
          maximize: whether larger is better.
          space: the search space, or None.
          infeasible: booleans (trial,) or (trial, seed), or None.
          name: what to call the study.
          source: which function made it.
          extra: more entries for the spec.

        Returns:
          Spec and block, as `study_from_blocks` takes them.

        Raises:
          ValueError: `infeasible` does not fit.
        """
        values = self.metrics[objective]
        num_trials, num_seeds, num_evals = values.shape
        judged, index, reason, unchecked = self.judge(objective)
        if infeasible is not None:
            given = np.asarray(infeasible)
            if given.dtype != np.bool_ or given.shape not in ((num_trials,), judged.shape):
                raise ValueError(
                    f"infeasible must be booleans of shape (trial,) = ({num_trials},) or (trial, "
                    f"seed), got dtype {given.dtype} and shape {given.shape}."
                )
            given = np.broadcast_to(given.reshape(num_trials, -1), judged.shape)
            judged = given
            unchecked = {"high_loss": "infeasible was given"}
        # Where the curves show no reason for what the caller knows, none is made up.
        reason, index = np.where(judged, reason, 0), np.where(judged, index, -1)
        if space is None:
            unchecked["boundary"] = "there is no search space"
        if num_evals == 1:
            unchecked["curves"] = "there is one evaluation per trial"
        ties = [self.metrics[other] for other in tie_breakers(objective, self.metrics)]
        best, best_index = _best_of_curves(values, maximize, ties)
        step = self.step
        block: dict[str, np.ndarray] = {
            "trial": np.repeat(np.arange(num_trials, dtype=np.int32), num_seeds),
            "seed": np.tile(np.arange(num_seeds, dtype=np.int32), num_trials),
            **{f"point/{n}": np.repeat(v, num_seeds) for n, v in self.points.items()},
            **{f"metrics/{n}": v.reshape(-1, num_evals) for n, v in self.metrics.items()},
            "infeasible": judged.reshape(-1),
            "infeasible_step": np.where(index >= 0, step[index], -1).astype(np.int32).reshape(-1),
            "infeasible_reason": reason.astype(np.int8).reshape(-1),
            "best_value": best.reshape(-1),
            "best_step": np.where(best_index >= 0, step[best_index], -1)
            .astype(np.int32)
            .reshape(-1),
        }
        gaps = np.unique(np.diff(step))
        spec = {
            "schema_version": storage.SCHEMA_VERSION,
            "name": name,
            "objective": objective,
            "maximize": bool(maximize),
            "num_trials": num_trials,
            "num_seeds": num_seeds,
            "num_steps": int(step[-1]),
            "eval_every": int(gaps[0]) if len(gaps) == 1 else None,
            "step": [int(n) for n in step],
            "keep": "none",
            "space": None if space is None else space.to_dict(),
            "trials_per_block": num_trials,
            "norm_edges": None,
            "source": source,
            "unchecked": unchecked,
            # Nothing else tells two tables of equal shapes apart.
            "contents": storage.digest_arrays(block),
            **extra,
        }
        return spec, block


def _best_of_curves(
    values: np.ndarray, maximize: bool, ties: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Each run's best finite value and its evaluation; NaN and −1 where there is none."""
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    loss = np.where(finite, -numbers if maximize else numbers, np.inf)
    index = best_evaluation(loss, ties)
    exists = finite.any(axis=-1)
    best = np.take_along_axis(numbers, index[..., None], axis=-1)[..., 0]
    dtype = values.dtype if values.dtype.kind == "f" else np.float32
    return np.where(exists, best, np.nan).astype(dtype), np.where(exists, index, -1)


class Table:
    """Another tool's table, turned into arrays."""

    def __init__(
        self,
        frame: "pandas.DataFrame",
        objective: str,
        parameters: Sequence[str] | Mapping[str, str] | None,
        metrics: Sequence[str],
        space: SearchSpace | None,
        trial: str | None,
        step: str | None,
        state: str | None,
        infeasible: str | None,
    ):
        if step is not None and trial is None:
            raise ValueError(
                "trial must name the column that tells trials apart, because step= is."
            )
        if isinstance(metrics, str) or not isinstance(metrics, Sequence):
            raise ArgumentTypeError(f"metrics must be a list of columns, got {metrics!r}.")
        self.frame, self.objective, self.metrics = frame, objective, [objective]
        self.metrics += [name for name in metrics if name != objective]
        self.trial, self.step = trial, step
        self.columns = self._parameter_columns(parameters, space)
        for what, name in (
            ("trial", trial),
            ("step", step),
            ("state", state),
            ("infeasible", infeasible),
        ):
            if name is not None:
                self._require(what, name)
        for name in self.metrics:
            self._require("objective" if name == objective else "metrics", name)
        rows, failed = self._rows(state, infeasible)
        self.rows, self.failed = rows, failed
        if not len(rows):
            raise ValueError("frame has no finished trial.")
        self.ids, self.index = self._trials()

    def _require(self, what: str, column: Any) -> None:
        if not isinstance(column, Hashable):
            raise ArgumentTypeError(f"{what} must be the name of a column, got {column!r}.")
        found = int((self.frame.columns == column).sum())
        if not found:
            raise ValueError(
                f"{what} = {column!r} is not a column of frame: "
                f"{nearest(column, self.frame.columns)}"
            )
        if found > 1:
            raise ValueError(f"{what} = {column!r} is {found} columns of frame. Rename them.")

    def _parameter_columns(
        self, parameters: Sequence[str] | Mapping[str, str] | None, space: SearchSpace | None
    ) -> dict[str, str]:
        if isinstance(parameters, Mapping):
            columns = dict(parameters)
        elif parameters is not None or space is not None:
            if isinstance(parameters, str) or not isinstance(parameters, Sequence | None):
                raise ArgumentTypeError(f"parameters must be a list of names, got {parameters!r}.")
            names = list(parameters if parameters is not None else space)  # type: ignore[arg-type]
            for name in names:
                if not isinstance(name, str):
                    raise ArgumentTypeError(f"parameters must be text, got {name!r}.")
            known = set(self.frame.columns)
            columns = {
                n: f"params_{n}" if n not in known and f"params_{n}" in known else n for n in names
            }
        else:
            raise ValueError("parameters must name the columns of hyperparameters, or give space=.")
        if not columns:
            raise ValueError("parameters is empty: name at least one hyperparameter.")
        for column in columns.values():
            self._require("parameters", column)
        return columns

    def _rows(self, state: str | None, infeasible: str | None) -> tuple[np.ndarray, Any]:
        """Which rows belong to finished trials, and whether each is known to have failed."""
        keep = np.ones(len(self.frame), bool)
        failed = None
        if state is not None:
            # An enum prints as TrialState.COMPLETE.
            states = [str(s).rpartition(".")[2].upper() for s in self.frame[state]]
            known = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
            unknown = sorted(set(states) - set(known))
            if unknown:
                raise ValueError(
                    f"state = {state!r} holds {unknown}; known states: {', '.join(known)}. Use "
                    "infeasible= with a column of booleans instead."
                )
            keep = np.asarray([s not in ("RUNNING", "WAITING") for s in states], bool)
            failed = np.asarray([s == "FAIL" for s in states], bool)
        if infeasible is not None:
            flags = self.frame[infeasible].to_numpy()
            if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
                raise ValueError(f"infeasible = {infeasible!r} must be a column of booleans.")
            failed = flags.astype(bool) | (False if failed is None else failed)
        rows = np.flatnonzero(keep)
        return rows, None if failed is None else failed[rows]

    def _trials(self) -> tuple[list[Any], np.ndarray]:
        """The names of the trials in the order of their first row, and each row's trial."""
        if self.trial is None:
            return list(range(len(self.rows))), np.arange(len(self.rows))
        names = self.frame[self.trial].to_numpy()[self.rows]
        for row, name in zip(self.rows, names, strict=True):
            if not isinstance(name, Hashable) or _is_missing(name):
                raise ValueError(
                    f"trial = {self.trial!r} tells nothing in row {row}: {name!r}. Every row needs "
                    "the number or the name of its trial."
                )
        ids = list(dict.fromkeys(names.tolist()))
        if self.step is None and len(ids) < len(names):
            raise ValueError(
                f"trial = {self.trial!r} has the same trial in several rows: name the column of "
                "steps with step=, or leave one row per trial."
            )
        places = {name: place for place, name in enumerate(ids)}
        return ids, np.asarray([places[name] for name in names.tolist()])

    def _column(self, name: str) -> np.ndarray:
        return self.frame[name].to_numpy()[self.rows]

    def _parameter(self, name: str, column: str, parameter: Parameter | None) -> Any:
        """One hyperparameter by trial, constant within each; text as the index of its label."""
        cells = [None if _is_missing(cell) else cell for cell in self._column(column)]
        for row, cell in zip(self.rows, cells, strict=True):
            if cell is not None and not _is_plain(cell):
                raise ValueError(
                    f"parameters: column {column!r} holds {cell!r} in row {row}; a hyperparameter "
                    "is a number or text."
                )
        choice = isinstance(parameter, Categorical) and not parameter.numeric
        numbers = None if choice else [_number(cell) for cell in cells]
        if (
            parameter is None
            and numbers is not None
            and any(
                number is None and cell is not None
                for number, cell in zip(numbers, cells, strict=True)
            )
        ):
            numbers = None
        values = cells if numbers is None else numbers
        for row, cell, value in zip(self.rows, cells, values, strict=True):
            if cell is not None and value is None:
                raise ValueError(
                    f"parameters: column {column!r} holds {cell!r} in row {row}, and {name!r} is a "
                    "number in space."
                )
        first = np.unique(self.index, return_index=True)[1]
        by_trial = [values[row] for row in first]
        for row, value in enumerate(values):
            if value != by_trial[self.index[row]]:
                raise ValueError(
                    f"parameters: column {column!r} changes within trial "
                    f"{self.ids[self.index[row]]!r}; a hyperparameter is constant in a trial."
                )
        labels = parameter.labels if isinstance(parameter, Categorical) and choice else None
        if None in by_trial and "None" not in (labels or ()):
            raise ValueError(
                f"parameters: column {column!r} is empty for some trials. A hyperparameter that "
                "only some trials have makes two studies."
            )
        if numbers is not None:
            whole = all(isinstance(value, int) for value in by_trial)
            return np.asarray(by_trial, np.int64 if whole else np.float64), None
        texts = [str(value) for value in by_trial]
        known = sorted(set(texts)) if labels is None else list(labels)
        strange = sorted(set(texts) - set(known))
        if strange:
            raise ValueError(
                f"parameters: {name!r} is {strange[0]!r} in frame, which space has not."
            )
        index = np.asarray([known.index(text) for text in texts], np.int32)
        if isinstance(parameter, Categorical):
            return parameter.codes[index], None
        return index, known

    def record(
        self, maximize: bool, space: SearchSpace | None, num_steps: int | None, name: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Makes spec and block.

        Args:
          maximize: whether larger is better.
          space: the search space, or None.
          num_steps: updates of every trial, or None.
          name: what to call the study.

        Returns:
          Spec and block, as `study_from_blocks` takes them.

        Raises:
          ValueError: a column holds what it should not.
        """
        if num_steps is not None:
            check_count("num_steps", num_steps)
            if self.step is not None:
                raise ValueError("num_steps is read from the step column: leave one of them out.")
        points, labels = {}, {}
        for parameter, column in self.columns.items():
            known = None if space is None else space.get(parameter)
            points[parameter], found = self._parameter(parameter, column, known)
            if found is not None:
                labels[parameter] = found
        if self.step is None:
            steps, place = np.asarray([num_steps or 0], np.int64), np.zeros(len(self.rows), int)
        else:
            raw = _numbers(f"the column {self.step!r}", self._column(self.step)).astype(np.float64)
            if not np.all((raw >= 0) & (raw <= MAX_STEPS) & (raw == np.floor(raw))):
                raise ValueError(
                    f"step = {self.step!r} must be a column of whole numbers from 0 to 2**31 - 1."
                )
            steps, place = np.unique(raw.astype(np.int64), return_inverse=True)
        shape = (len(self.ids), len(steps))
        present = np.zeros(shape, bool)
        present[self.index, place] = True
        if present.sum() < len(self.rows):
            raise ValueError(
                f"frame has two rows for one trial and step: {self.trial!r} and {self.step!r} must "
                "tell every row apart."
            )
        curves = {}
        for metric in self.metrics:
            cells: Any = self._column(metric)
            if cells.dtype.kind == "O":
                cells = [np.nan if _is_missing(v) else v for v in cells]
            values = _numbers(f"the column {metric!r}", cells)
            values = values if values.dtype.kind == "f" else values.astype(np.float64)
            curves[metric] = np.full(shape, np.nan, values.dtype)
            curves[metric][self.index, place] = values
        checked = Imported.checked(points, curves, steps, self.objective, space)
        failed = None
        if self.failed is not None:
            failed = np.zeros(len(self.ids), bool)
            np.logical_or.at(failed, self.index, self.failed)
        arrays = dataclasses.replace(checked, present=present, failed=failed)
        extra = {
            "trial_ids": [i if type(i) is int and abs(i) < 2**63 else str(i) for i in self.ids],
            "labels": labels,
        }
        return arrays.record(
            self.objective,
            maximize,
            space,
            None,
            name,
            source="from_dataframe",
            extra=extra,
        )


def _number(cell: Any) -> int | float | None:
    """A cell as a number, of text too; None where it is none, or missing."""
    if isinstance(cell, (bool, np.bool_)) or cell is None:
        return None
    if isinstance(cell, (int, np.integer)):
        return _bounded(int(cell))
    if isinstance(cell, str) and "_" in cell:  # Python reads "1_000", which no table means.
        return None
    for kind in (int, float) if isinstance(cell, str) else (float,):
        try:
            return _bounded(kind(cell))
        except (ValueError, TypeError, OverflowError):
            continue
    return None


def _bounded(number: float) -> int | float:
    """A number that int64 or float64 holds; infinite, and refused as such, where neither does."""
    if isinstance(number, int) and abs(number) >= 2**63:
        return float(number) if abs(number) <= sys.float_info.max else np.inf
    return number


def _is_plain(value: Any) -> bool:
    """Whether a cell holds one number or text, or nothing."""
    return isinstance(value, (str, int, float, np.generic)) or _is_missing(value)


def _is_missing(value: Any) -> bool:
    import pandas

    return pandas.isna(value) is True  # Of a list it is an array.
