"""The record of a study: labelled host arrays, whoever trained them.

Analysis reads this record and nothing else. Our runner assembles it from the blocks it trained,
`load_study` from the blocks on disk, `Study.from_arrays` from the user's own vmapped loop and
`Study.from_dataframe` from another tool's table.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from playbook_optax import _feasibility, _shown
from playbook_optax._checks import check_count, check_flag, named_arguments, nearest
from playbook_optax._direction import direction
from playbook_optax._text import printable
from playbook_optax._ties import best_evaluation, best_first, check_resolution, tie_breakers
from playbook_optax.records import schema, storage, summary, weights
from playbook_optax.records.imported import Imported, Table, labels_of
from playbook_optax.records.picture import picture_of
from playbook_optax.search_space import SearchSpace

if TYPE_CHECKING:
    import pandas
    import xarray

_POINT, _METRIC, _NORM = "point/", "metrics/", "norms/"
_OUTCOMES = ("infeasible", "infeasible_step", "infeasible_reason", "best_value", "best_step")
_NORMS = (
    "norms/last",
    "norms/max",
    "norms/num_steps",
    "norms/num_clipped",
    "norms/threshold",
    "norms/counts",
)
_DIMENSIONS = ("trial", "seed", "eval", "norm_bin")
_COORDINATES = (*_DIMENSIONS, "step", "norm_low", "norm_high")
_FINAL = "final/"
# What a spreadsheet takes for the beginning of a formula, in full width and after a break too.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")

# What trains: it holds programs and devices, and stays in its process.
_TRAINING = ("_extend", "_replay")

Block = Mapping[str, np.ndarray]


class NoFeasibleTrial(ValueError):  # noqa: N818
    """No trial of the study has a finite value of the objective and is feasible."""


class ReservedName(ValueError):  # noqa: N818
    """A hyperparameter or metric has a name that the record cannot give it."""


@dataclasses.dataclass(frozen=True)
class BestTrial:
    """The best trial of a study, with its best checkpoint chosen in retrospect.

    Attributes:
      trial: its index.
      point: its hyperparameters, name to scalar.
      value: the objective at `step`; with seeds the mean over them.
      step: updates made before that evaluation; the same for all seeds.
      objective: the metric by which it was chosen.
      maximize: whether larger was better.
      spread: standard deviation over seeds at `step` (n − 1 in the denominator); None for one seed.
      num_seeds: how many seeds the value is a mean of.
    """

    trial: int
    point: dict[str, Any]
    value: float
    step: int
    objective: str
    maximize: bool
    spread: float | None = None
    num_seeds: int = 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Study:
    """A finished (or partly finished) study, read-only.

    Made by `run_study`, `load_study`, `Study.from_arrays` or `Study.from_dataframe`. It can be
    copied and pickled; a copy from another process is a record, which cannot train.

    Attributes:
      data: `xarray.Dataset` of host arrays, dimensions (trial, eval), or (trial, seed, eval) with
        several seeds. Coordinates: ``trial``, ``step (eval,)`` in updates, every hyperparameter on
        ``trial``, ``norm_low`` and ``norm_high`` on ``norm_bin``. Variables: every metric under its
        own name, then ``infeasible``, ``infeasible_step`` (−1 if feasible), ``infeasible_reason``
        ("" if feasible), ``best_value``, ``best_step``, and where norms were recorded
        ``norms/last``, ``norms/max``, ``norms/num_steps`` and ``norms/counts``, and of the clipper
        in the optimizer ``norms/threshold`` (the last one; infinite without one) and
        ``norms/num_clipped``.
      spec: what the study is: objective, number of steps, space and so on; JSON values. In a study
        that is not finished ``num_trials`` counts the complete trials, and ``planned_trials`` says
        how many there will be. ``unchecked``, if there, maps what was not judged to the reason.

    Source: playbook, "Why use quasi-random search instead of more sophisticated black box
    optimization algorithms during the exploration phase of tuning?" (post hoc analysis of all
    trials, without running them again).
    """

    data: xarray.Dataset
    spec: Mapping[str, Any]
    _blocks: tuple[Block, ...] = ()
    _rows: np.ndarray | None = None
    _weights_like: Mapping[str, Any] | None = None
    _extend: Callable[[int], Study] | None = None
    _replay: Callable[..., xarray.Dataset] | None = None
    _directory: str | None = None

    @property
    def directory(self) -> str | None:
        """Where its blocks are stored; None if nowhere."""
        return self._directory

    def __getstate__(self) -> dict[str, Any]:
        """The record alone: a copy in another process cannot train."""
        state = {name: value for name, value in vars(self).items() if name not in _TRAINING}
        return {**state, "spec": dict(self.spec)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {**dict.fromkeys(_TRAINING), **state, "spec": MappingProxyType(state["spec"])}
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Study:
        spec = MappingProxyType(copy.deepcopy(dict(self.spec), memo))
        return dataclasses.replace(self, data=self.data.copy(deep=True), spec=spec)

    @property
    def num_trials(self) -> int:
        """Number of complete trials, infeasible ones included."""
        return int(self.data.sizes["trial"])

    @property
    def num_seeds(self) -> int:
        """Number of seeds that each trial was run with."""
        return int(self.spec["num_seeds"])

    @property
    def objective(self) -> str:
        """Name of the metric that the study optimized."""
        return str(self.spec["objective"])

    @property
    def maximize(self) -> bool:
        """Whether larger values of the objective are better."""
        return bool(self.spec["maximize"])

    @property
    def space(self) -> SearchSpace | None:
        """The search space that the points came from, or None if it is not known."""
        return _space(self.spec)

    @property
    def points(self) -> dict[str, np.ndarray]:
        """Every trial's hyperparameters: name to array, shape (trial,), as they were stored."""
        names = [name for name in self.data.coords if name not in _COORDINATES]
        return {str(name): self.data.coords[name].values for name in names}

    def point(self, trial: int) -> dict[str, Any]:
        """One trial's hyperparameters, in the dtypes in which they were trained.

        Args:
          trial: its index, 0 to num_trials − 1.

        Returns:
          Name to NumPy scalar; the index of its choice for a categorical that is not a number.

        Raises:
          IndexError: there is no such trial.
        """
        index = self._check_trial(trial)
        found = {name: values[index] for name, values in self.points.items()}
        return {
            n: np.str_(value) if isinstance(value, str) else value for n, value in found.items()
        }

    @named_arguments
    def params(self, trial: int, seed: int | None = None) -> Any:
        """The model weights that were kept for a trial.

        Args:
          trial: its index.
          seed: which seed's, needed when the study has several.

        Returns:
          A pytree of NumPy arrays: the workload's own types where they are known (`weights_like`),
          otherwise dictionaries, lists and tuples, other node types as dictionaries.

        Raises:
          ValueError: no weights were kept, or `seed` is missing or out of range.
          IndexError: there is no such trial.
        """
        return self._weights("params", trial, seed)

    @named_arguments
    def model_state(self, trial: int, seed: int | None = None) -> Any:
        """The model state (such as batch statistics) that belongs to `params`; same arguments.

        Args:
          trial: its index.
          seed: which seed's, needed when the study has several.

        Returns:
          A pytree of NumPy arrays, as `params`.

        Raises:
          ValueError: no weights were kept, or `seed` is missing or out of range.
          IndexError: there is no such trial.
        """
        return self._weights("model_state", trial, seed)

    @named_arguments
    def resolution(self, objective: str | None = None) -> float:
        """What one example changes a metric by: what lies within it, the study cannot tell apart.

        Args:
          objective: any recorded metric; the study's own by default.

        Returns:
          1 / n for an error rate over n examples, or what the workload said; 0 where nothing is
          known, and for losses, which no example changes by a fixed amount.

        Example:
          >>> study = Study.from_arrays(
          ...     {"learning_rate": [0.1, 1.0]}, {"valid/error_rate": [[0.5], [0.25]]}, [10],
          ...     objective="valid/error_rate", resolution=0.25)
          >>> study.resolution()
          0.25

        Source: playbook, "Extracting insight from experimental results".
        """
        name = self.objective if objective is None else objective
        return float(self.spec.get("resolution", {}).get(name, 0.0))

    @named_arguments
    def best(self, objective: str | None = None, maximize: bool | None = None) -> BestTrial:
        """The best feasible trial at its best evaluation, over the whole of training.

        A trial is feasible if all its seeds are. Values that are not finite are never selected.
        With seeds the mean over seeds at a common step is compared. Between equal values the loss
        of the same examples decides, then that of training, where they are recorded; after that the
        latest step within a trial, and the lowest index between trials.

        Args:
          objective: any recorded metric; the study's own by default.
          maximize: whether larger is better; by default the study's own direction for its own
            objective and False for any other. A metric whose name says that it should rise
            ("accuracy", "score") is not minimized unless `maximize=False` is spelled out.

        Returns:
          The BestTrial.

        Raises:
          NoFeasibleTrial: every trial is infeasible or has no finite value.
          ValueError: no such metric, or its direction has to be said.

        Example:
          >>> study = Study.from_arrays(
          ...     {"learning_rate": [0.1, 1.0]},
          ...     {"valid/loss": [[2.0, 1.0, 1.5], [2.0, float("nan"), float("nan")]]},
          ...     [0, 10, 20], objective="valid/loss")
          >>> best = study.best()
          >>> best.trial, best.value, best.step
          (0, 1.0, 10)

        Source: playbook, "Determining the number of steps for each training run" (retrospective
        checkpoint selection) and "Why use quasi-random search instead of more sophisticated black
        box optimization algorithms during the exploration phase of tuning?" (post hoc objectives).
        """
        known = _metric_names(self.data)
        if objective is None:
            objective = self.objective
        elif objective not in known:
            raise ValueError(
                f"objective = {objective!r} was not recorded: {nearest(objective, known)}"
            )
        if maximize is None:
            own = self.maximize if objective == self.objective else None
            maximize = direction("objective", objective, own)
        # An unfinished study without a complete trial has no metrics yet.
        if self.num_trials == 0:
            raise NoFeasibleTrial("The study has no complete trial yet.")
        values = self._with_seeds(objective).astype(np.float64)
        feasible = np.logical_not(self._with_seeds("infeasible").any(axis=1, keepdims=True))
        # inf − inf, or a sum that no float holds: not finite, hence never selected.
        with np.errstate(invalid="ignore", over="ignore"):
            mean = values.mean(axis=1)
        loss = np.where(np.isfinite(mean) & feasible, -mean if maximize else mean, np.inf)
        with np.errstate(invalid="ignore", over="ignore"):
            others = [
                self._with_seeds(name).astype(np.float64).mean(axis=1)
                for name in tie_breakers(objective, known)
            ]
        steps = best_evaluation(loss, others)
        rows = np.arange(len(loss))
        trial = int(best_first(loss[rows, steps], [other[rows, steps] for other in others])[0])
        index = int(steps[trial])
        if not np.isfinite(loss[trial, index]):
            raise NoFeasibleTrial(
                f"No trial has a finite {objective!r} and is feasible: {self._count_reasons()}. "
                "Lower the learning rate's range, or tame the instability (warm-up, clipping)."
            )
        spread = None
        if self.num_seeds > 1:
            with np.errstate(over="ignore"):
                spread = float(values[trial, :, index].std(ddof=1))
        return BestTrial(
            trial=trial,
            point=self.point(trial),
            value=float(mean[trial, index]),
            step=int(self.data["step"].values[index]),
            objective=objective,
            maximize=bool(maximize),
            spread=spread,
            num_seeds=self.num_seeds,
        )

    @named_arguments
    def extend(self, num_trials: int) -> Study:
        """Trains more trials: points i = n, n + 1, … of the same space, the old ones untouched.

        Args:
          num_trials: how many trials to add.

        Returns:
          The longer study.

        Raises:
          ValueError: `num_trials` is not positive, or this record cannot train.
        """
        total = self.num_trials + check_count("num_trials", num_trials)
        if self._extend is None:
            raise ValueError(
                "This study is a record and cannot train: call run_study with directory= of the "
                f"stored study, the same workload and num_trials={total}."
            )
        return self._extend(total)

    @named_arguments
    def replay(
        self,
        trial: int,
        from_step: int = 0,
        *,
        num_steps: int | None = None,
        seed: int | None = None,
        per_layer: bool = False,
    ) -> xarray.Dataset:
        """Trains one trial of the study again, bit for bit, and records every step.

        The steps before `from_step` are trained without a record, those from it on one at a time
        by the same program. What is evaluated on the way is compared with the study bit for bit.

        Args:
          trial: its index.
          from_step: the first update to record, 0-based.
          num_steps: how many updates to record, at most; to the end of the run if None.
          seed: which seed's run, needed when the study has several.
          per_layer: also record the norms of each layer, an array of the parameters; its
            gradient is computed once more for that, equal up to rounding.

        Returns:
          An `xarray.Dataset` with dimension ``step``, the 0-based index of the update, ending at
          the update at which the trial broke, if it did: ``loss`` of the batch, ``gradient_norm``
          before any clipping, ``update_norm`` of the change of the parameters (NaN for the update
          that broke, which is not applied), ``param_norm`` before the update; with `per_layer`
          also ``layer_gradient_norm``, ``layer_update_norm`` and ``layer_param_norm`` of dimension
          (step, layer). Attributes: ``trial``, ``seed``, ``infeasible_step``,
          ``infeasible_reason``, and ``bit_exact``: whether everything that the study recorded up
          to the last step of the replay came out the same to the last bit; otherwise there is a
          warning.

        Raises:
          ValueError: the steps are not in the run, `seed` is missing or out of range, or this
            record cannot train.
          IndexError: there is no such trial.

        Source: playbook, "How can optimization failures be debugged and mitigated?" (look at the
        training just when it becomes unstable).
        """
        index = self._check_trial(trial)
        if self._replay is None:
            raise ValueError(
                "This study is a record and cannot train: call run_study with directory= of the "
                "stored study and the same workload; what it returns can replay."
            )
        chosen = self._check_seed(seed)
        total = int(self.spec["num_steps"])
        first = check_count("from_step", from_step, at_least=0)
        if first >= total:
            raise ValueError(
                f"from_step = {first} is not in the run, whose updates are 0 to {total - 1}."
            )
        count = total - first if num_steps is None else check_count("num_steps", num_steps)
        check_flag("per_layer", per_layer)
        return self._replay(self, index, chosen, first, min(first + count, total), per_layer)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Stores the study; `load_study` returns it bit for bit, kept weights included.

        Args:
          directory: made when missing. Saving again into the study's own directory is legal.

        Raises:
          StorageError: the directory holds another study, or cannot be written.
        """
        storage.check_writable(directory)
        occupied = f"{os.fspath(directory)!r} holds another study: choose an empty directory."
        with contextlib.suppress(storage.NoStudy):
            storage.read_spec(directory)  # Blocks whose study.json was lost are not overwritten.
        mine = dict(self.spec)
        if not storage.write_spec(directory, mine):
            there = storage.read_spec(directory)
            if there["schema_version"] == 1:  # Begun before these were recorded.
                mine = {name: mine[name] for name in mine if name not in ("arrays", "member")}
            known = storage.study_identity(there) == storage.study_identity(mine)
            if not known or there["num_trials"] > self.num_trials:
                raise storage.StorageError(occupied)
            mine = there
        owner = storage.owner_of(mine)
        for index, block in enumerate(self._blocks):
            written = storage.write_block(directory, index, block, owner)
            if not written:
                stored = storage.read_block(directory, index, owner)
                if not _same_arrays(stored, block):
                    raise storage.StorageError(occupied)
        if mine["num_trials"] < self.num_trials:
            longer = {name: self.spec.get(name) for name in ("num_trials", "points")}
            storage.extend_spec(directory, {**mine, **longer})

    def to_dataframe(self) -> pandas.DataFrame:
        """A tidy table for people and other tools: one row per trial (and seed).

        Returns:
          A `pandas.DataFrame` with columns ``trial``, ``seed`` when there are several, every
          hyperparameter (a categorical's label), ``infeasible``, ``infeasible_step``,
          ``infeasible_reason``, ``best_value``, ``best_step`` and ``final/<metric>``, the value at
          the last evaluation.
        """
        import pandas

        seeds = self.num_seeds
        columns: dict[str, Any] = {"trial": np.repeat(np.arange(self.num_trials), seeds)}
        if seeds > 1:
            columns["seed"] = np.arange(self.num_trials * seeds) % seeds
        labels = labels_of(self.space)
        for name, values in self.points.items():
            if name in labels:
                values = np.asarray(labels[name], object)[values.astype(np.int64)]
            columns[name] = np.repeat(values, seeds)
        for name in _OUTCOMES:
            if name in self.data:
                columns[name] = self._with_seeds(name).reshape(-1)
        for name in _metric_names(self.data):
            columns[_FINAL + name] = self._with_seeds(name)[..., -1].reshape(-1)
        return pandas.DataFrame({name: _for_pandas(array) for name, array in columns.items()})

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dataframe` as CSV; text that a spreadsheet would run as a formula is quoted.

        Args:
          path: the file; replaced if it is there.
        """
        frame = self.to_dataframe().rename(columns=escape_cell)
        for name in frame.columns:
            if frame[name].dtype.kind not in "biuf":
                frame[name] = frame[name].map(escape_cell)
        # JSON can hold half a surrogate pair, which UTF-8 cannot.
        frame.to_csv(path, index=False, errors="backslashreplace")

    def to_netcdf(self, path: str | os.PathLike[str]) -> None:
        """Writes `data` as a netCDF file, for other tools that read labelled arrays.

        Names of metrics such as "valid/loss" are no names there: a variable is called
        ``valid_loss``, and its attribute ``long_name`` has the name. Numbers of 16 bits and fewer
        are written as float32. xarray writes netCDF 4 where netCDF4 or h5netcdf is installed, and
        netCDF 3 otherwise.

        Args:
          path: the file; replaced if it exists.

        Raises:
          NotWritable: the system refused.

        Example:
          >>> import tempfile, numpy as np
          >>> import playbook_optax as pbx
          >>> study = pbx.Study.from_arrays(
          ...     {"lr": np.array([0.1])}, {"valid/loss": np.ones((1, 1))}, [10],
          ...     objective="valid/loss")
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     study.to_netcdf(f"{folder}/study.nc")
          ...     data = pbx.Study.read_netcdf(f"{folder}/study.nc")
          >>> data["valid/loss"].values.tolist(), data["lr"].values.tolist()
          ([[1.0]], [0.1])

        Source: playbook, "Why use quasi-random search instead of more sophisticated black box
        optimization algorithms during the exploration phase of tuning?" (post hoc analysis).
        """
        data = self.data.copy()
        plain: dict[str, str] = {}
        for name in data.variables:
            wanted = re.sub(r"\W", "_", str(name), flags=re.ASCII)
            wanted = wanted if wanted[:1].isalpha() else f"_{wanted}"
            number = 2
            while wanted in plain.values():
                wanted, number = f"{wanted}_{number}", number + 1
            plain[str(name)] = wanted
            data[name].attrs["long_name"] = str(name)
            if data[name].dtype.kind not in "biufOU" or data[name].dtype == np.float16:
                kept = data[name].attrs
                data[name] = data[name].astype(np.float32).assign_attrs(kept)
        target = storage.root(path)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            data.rename({old: new for old, new in plain.items() if old != new}).to_netcdf(temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise storage.file_error(target, "write", error) from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def read_netcdf(path: str | os.PathLike[str]) -> xarray.Dataset:
        """Reads what `to_netcdf` wrote, with the names of the study.

        Args:
          path: the file.

        Returns:
          A dataset as `Study.data`.

        Raises:
          StorageError: it is no such file.
        """
        import xarray

        try:
            with xarray.open_dataset(storage.root(path)) as file:
                data = file.load()
        except (OSError, ValueError, TypeError) as error:
            raise storage.StorageError(f"{os.fspath(path)!r} is no netCDF file: {error}") from error
        names = {name: data[name].attrs.pop("long_name", name) for name in data.variables}
        return data.rename({old: new for old, new in names.items() if old != new})

    @staticmethod
    @named_arguments
    def from_arrays(
        points: Mapping[str, Any],
        metrics: Mapping[str, Any],
        step: Any,
        *,
        objective: str,
        maximize: bool | None = None,
        space: SearchSpace | None = None,
        infeasible: Any = None,
        name: str = "study",
        resolution: Mapping[str, float] | float | None = None,
    ) -> Study:
        """Makes a study of what the user's own loop recorded, for example ``jit(vmap(train))``.

        Where `infeasible` is not given it is decided, by the rule of our own trials. A trial is
        infeasible from the first evaluation after step 0 at which the objective or a metric with
        "loss" in its name is not finite (−inf counts as diverged), or where its "train/loss" is
        uncharacteristically high against its own value at step 0. Without "train/loss" from step 0
        on the second half is not judged, and ``spec["unchecked"]["high_loss"]`` says so. A metric
        of "step/" is a mean since the evaluation before, and may be NaN at the first.

        A run that ends early is not infeasible, and its best value counts: one of which every
        metric is NaN from the fourth evaluation on or a later one, with no loss back at its first
        value (of training: half-way back). That somebody stopped it, and it did not diverge, is a
        guess, and ``spec["unchecked"]["divergence"]`` says so; `infeasible` overrules it. Of what
        `make_train` returned it is not guessed: its trials end by diverging only.

        Args:
          points: hyperparameters, name to numbers of shape (trial,).
          metrics: name to numbers of shape (trial, eval), or (trial, seed, eval) with seeds.
          step: updates made before each evaluation, rising integers, shape (eval,); or, as a
            vmapped loop returns them, (trial, eval) with the same in all trials.
          objective: the metric to optimize.
          maximize: whether larger is better; not if None, which a name such as "accuracy" refuses.
          space: the space that the points came from, for the boundary checks.
          infeasible: booleans of shape (trial,), or (trial, seed), if it is known otherwise.
          name: what to call the study.
          resolution: what one example changes a metric by, as in `Workload`.

        Returns:
          The Study. ``infeasible_step`` is the step of the first bad evaluation.

        Raises:
          ValueError: a shape, a length, a name or a dtype does not fit; the message says which.

        Example:
          >>> import numpy as np
          >>> study = Study.from_arrays(
          ...     {"learning_rate": np.array([0.01, 0.1, 10.0], np.float32)},
          ...     {"train/loss": np.array([[2.0, 1.0], [2.0, 0.5], [2.0, 90.0]], np.float32)},
          ...     np.array([0, 100]), objective="train/loss")
          >>> study.data["infeasible_reason"].values.tolist()
          ['', '', 'high_loss']
        """
        arrays = Imported.checked(points, metrics, step, objective, space)
        maximize = direction("objective", objective, maximize)
        told = check_resolution(resolution, objective)
        extra = {"resolution": told} if told else {}
        spec, block = arrays.record(
            objective, maximize, space, infeasible, name, source="from_arrays", extra=extra
        )
        return study_from_blocks(spec, [block])

    @staticmethod
    @named_arguments
    def from_dataframe(
        frame: pandas.DataFrame,
        *,
        objective: str,
        parameters: Sequence[str] | Mapping[str, str] | None = None,
        metrics: Sequence[str] = (),
        maximize: bool | None = None,
        space: SearchSpace | None = None,
        trial: str | None = None,
        step: str | None = None,
        state: str | None = None,
        infeasible: str | None = None,
        num_steps: int | None = None,
        name: str = "study",
    ) -> Study:
        """Makes a study of another tool's table of trials.

        The table has one row per trial, or with `step` one row per trial and evaluation. What it
        does not tell is not judged: ``spec["unchecked"]`` maps "curves", "high_loss" and "boundary"
        to the reason, and `diagnose` reports them as skipped.

        A table of Optuna's ``study.trials_dataframe()`` is read by
        ``Study.from_dataframe(df, objective="value", parameters=["lr"], trial="number",
        state="state")``.

        Args:
          frame: a `pandas.DataFrame`.
          objective: the column to optimize.
          parameters: columns of hyperparameters, or a mapping from hyperparameter to column; by
            default the names in `space`. For a name without a column, ``params_<name>`` is read.
            Text becomes a label.
          metrics: further columns to record. Name the training loss "train/loss" to have it judged.
          maximize: as in `from_arrays`.
          space: the space that the trials came from, if it is known.
          trial: the column that tells trials apart, needed with `step`.
          step: the column of updates made before each evaluation. A row whose objective is empty
            counts as diverged: leave out rows that evaluate something else.
          state: a column of states as Optuna writes them: FAIL is infeasible, COMPLETE and PRUNED
            are not, RUNNING and WAITING are left out.
          infeasible: a column of booleans.
          num_steps: how many updates each trial made, where there is no `step`.
          name: what to call the study.

        Returns:
          The Study; trials in the order of their first row, ``spec["trial_ids"]`` their names.

        Raises:
          ValueError: a column is missing, or holds what it should not; the message names it.

        Example:
          >>> import pandas
          >>> table = pandas.DataFrame({
          ...     "number": [0, 1, 2], "value": [0.3, 0.1, float("nan")],
          ...     "params_lr": [0.01, 0.1, 9.0], "state": ["COMPLETE", "COMPLETE", "FAIL"]})
          >>> study = Study.from_dataframe(
          ...     table, objective="value", parameters=["lr"], trial="number", state="state")
          >>> study.best().trial, study.data["infeasible"].values.tolist()
          (1, [False, False, True])
        """
        table = Table(frame, objective, parameters, metrics, space, trial, step, state, infeasible)
        maximize = direction("objective", objective, maximize)
        spec, block = table.record(maximize, space, num_steps, name)
        return study_from_blocks(spec, [block])

    def __repr__(self) -> str:
        return _shown.as_text(*self._summary())

    def _repr_html_(self) -> str:
        return _shown.as_html(*self._summary(), picture_of({"": self}))

    def _summary(self) -> tuple[str, _shown.Rows]:
        """What ran, on what, and what it came to: a title and rows of text."""
        direction = "higher" if self.maximize else "lower"
        rows = [
            ("objective", f"{printable(self.objective)}, {direction} is better"),
            ("search", summary.ranges_text(self.points, self.space)),
            ("best", best_text(self)),
            ("infeasible", infeasible_text(self)),
            ("ran on", summary.environment_text(self.spec)),
            ("stored in", printable(self._directory or "", 200)),
        ]
        name = printable(self.spec.get("name", "study"))
        return f"Study {name}: {size_text(self)}", [(n, text) for n, text in rows if text]

    def _check_trial(self, trial: int) -> int:
        if isinstance(trial, bool) or not isinstance(trial, (int, np.integer)):
            raise IndexError(f"trial must be an integer, got {trial!r}.")
        if not 0 <= trial < self.num_trials:
            raise IndexError(f"trial = {trial} is not in 0 … {self.num_trials - 1}.")
        return int(trial)

    def _check_seed(self, seed: int | None) -> int:
        if seed is None and self.num_seeds > 1:
            raise ValueError(f"seed must be given, 0 to {self.num_seeds - 1}: each is a run.")
        if seed is not None and check_count("seed", seed, at_least=0) >= self.num_seeds:
            raise ValueError(f"seed must be < {self.num_seeds}, got {seed}.")
        return seed or 0

    def _with_seeds(self, name: str) -> np.ndarray:
        """A variable as (trial, seed, ...), also where there is one seed."""
        values = self.data[name].values
        return values if self.num_seeds > 1 else values[:, None]

    def _count_reasons(self) -> str:
        reasons = self._with_seeds("infeasible_reason")[self._with_seeds("infeasible")]
        counts = {str(r) or "unknown": int((reasons == r).sum()) for r in np.unique(reasons)}
        runs = "runs" if self.num_seeds > 1 else "trials"
        return (
            f"{len(reasons)} of {self.num_trials * self.num_seeds} {runs} are infeasible"
            + "".join(f", {count} for {reason}" for reason, count in counts.items())
        )

    def _weights(self, kind: str, trial: int, seed: int | None) -> Any:
        index = self._check_trial(trial)
        trees = self.spec.get("trees") or {}
        if self._rows is None or kind not in trees:
            raise ValueError(
                f"No {kind} were kept in this study (keep={self.spec.get('keep', 'none')!r}): run "
                'it with keep="best" or keep="final".'
            )
        block, row = self._rows[index * self.num_seeds + self._check_seed(seed)]
        prefix = f"{kind}/"
        arrays = {
            name.removeprefix(prefix): array[row]
            for name, array in self._blocks[block].items()
            if name.startswith(prefix)
        }
        if self._weights_like is not None:
            return weights.restore_like(self._weights_like[kind], arrays)
        return weights.rebuild_tree(trees[kind], arrays)


def size_text(study: Study) -> str:
    """How much ran, on one line.

    Args:
      study: the study.

    Returns:
      Trials, of those that are planned if it is not finished, times steps and seeds.
    """
    planned = study.spec.get("planned_trials")
    trials = f"{study.num_trials} of {planned}" if planned else f"{study.num_trials}"
    steps = study.data["step"].values
    length = f" x {steps[-1]} steps" if len(steps) else ""
    seeds = f" x {study.num_seeds} seeds" if study.num_seeds > 1 else ""
    return f"{trials} trials{length}{seeds}"


def best_text(study: Study) -> str:
    """The best trial, on one line.

    Args:
      study: the study.

    Returns:
      Value, spread over seeds, step, trial and point; or that there is none.
    """
    try:
        best = study.best()
    except NoFeasibleTrial:
        return "no feasible trial" if study.num_trials else "no complete trial yet"
    spread = "" if best.spread is None else f" ± {best.spread:.2g}"
    point = summary.point_text(best.point, study.space)
    return f"{_shown.number(best.value)}{spread} at step {best.step}, trial {best.trial}: {point}"


def infeasible_text(study: Study) -> str:
    """How much is infeasible, on one line.

    Args:
      study: the study.

    Returns:
      Trials, or runs where there are seeds, by reason; empty for a study without trials.
    """
    if not study.num_trials:
        return ""
    infeasible = study.data["infeasible"].values
    reasons = study.data["infeasible_reason"].values[infeasible]
    kinds, counts = np.unique(reasons, return_counts=True)
    unit = "runs" if study.num_seeds > 1 else "trials"
    told = ", ".join(f"{n} {kind or 'unknown'}" for kind, n in zip(kinds, counts, strict=True))
    return f"{infeasible.sum()} of {infeasible.size} {unit}: {told}" if told else "none"


def _for_pandas(array: np.ndarray) -> np.ndarray:
    """A column that pandas knows: float32 for bfloat16 and its like, which it holds exactly."""
    return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array


def escape_cell(value: Any) -> Any:
    """Puts an apostrophe before text that a spreadsheet would run as a formula.

    Args:
      value: a cell; only text is changed.

    Returns:
      The cell.

    Example:
      >>> escape_cell("=1+1"), escape_cell("adam"), escape_cell(-1.0)
      ("'=1+1", 'adam', -1.0)
    """
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def load_study(
    directory: str | os.PathLike[str], *, weights_like: Mapping[str, Any] | None = None
) -> Study:
    """Reads a stored study back, bit for bit; its directory may have moved since.

    A study that is still being written gives the trials that are complete so far.

    Args:
      directory: the study directory.
      weights_like: ``{"params": tree, "model_state": tree}`` of the workload's own types, for
        weights in types other than dictionaries, lists and tuples.

    Returns:
      The Study.

    Raises:
      NoStudy: there is no study.
      CorruptSpec, CorruptBlock: a file is damaged or holds what no study has; the message names
        the file and the field. Nothing is read silently wrong.
      NewerFormat: a newer version of this package wrote it.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import playbook_optax as pbx
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": np.array([0.1, 0.2])}, {"valid/loss": np.array([[1.0], [0.5]])},
      ...     np.array([10]), objective="valid/loss")
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     study.save(directory)
      ...     pbx.load_study(directory).best().trial
      1

    Source: playbook, "How many trials are needed to get good results with quasi-random search?" (a
    finished study is read again and again).
    """
    spec = schema.read_spec(directory)
    read = schema.block_reader(directory, spec)
    blocks = [read(index) for index in storage.finished_blocks(directory)]
    try:
        blocks = [block for block in blocks if _is_of_table(spec, block)]
        return study_from_blocks(spec, blocks, weights_like=weights_like, directory=directory)
    except ValueError as error:
        raise storage.StorageError(
            f"{os.fspath(Path(directory))!r} is not a consistent study: {error}"
        ) from error


def _is_of_table(spec: Mapping[str, Any], block: Block) -> bool:
    """Whether a block has the points of the spec's table; False of one to be trained again.

    Raises:
      ValueError: its points are neither those of the table nor the padding of a shorter one.
    """
    if spec.get("points") is None:
        return True
    rows = np.flatnonzero(block["trial"] < spec["num_trials"])
    arrays = {name: array[rows] for name, array in block.items()}
    expected = {
        f"{_POINT}{name}": np.asarray(values)[arrays["trial"]].astype(spec["dtypes"][name])
        for name, values in spec["points"].items()
    }
    wrong = storage.wrong_rows(arrays, expected)
    if wrong is not None and not wrong.any():
        return True
    if wrong is None or not storage.is_padding(wrong, arrays):
        raise ValueError("the points of a block are not those of study.json.")
    return False


def study_from_blocks(
    spec: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    weights_like: Mapping[str, Any] | None = None,
    extend: Callable[[int], Study] | None = None,
    replay: Callable[..., xarray.Dataset] | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Study:
    """Assembles a study from its finished blocks.

    A block is a flat mapping of host arrays with a leading axis of runs (a run is one trial with
    one seed): ``trial``, ``seed``, ``point/<name>``, ``metrics/<name> (run, eval)``,
    ``infeasible``, ``infeasible_step``, ``infeasible_reason`` (index into the reasons),
    ``best_value``, ``best_step``, ``norms/<name>`` with ``norms/counts (run, norm_bin)``
    and for kept weights ``params/<path>`` and ``model_state/<path>``.

    Args:
      spec: the study's spec. ``num_trials``, ``num_seeds``, ``step``, ``objective``, ``maximize``
        are needed; runs of a trial >= ``num_trials`` are padding and are left out.
      blocks: the finished ones, in the order of their index. Where some are missing, the complete
        trials before the first incomplete one are the study.
      weights_like: see `load_study`.
      extend: trains the study up to a number of trials; what `Study.extend` calls.
      replay: trains one trial again; what `Study.replay` calls.
      directory: where the blocks are stored, for people to read.

    Returns:
      The Study.

    Raises:
      ValueError: blocks and spec do not fit together, or a metric and a hyperparameter share
        a name.
    """
    plan = _check_spec(spec)
    num_seeds = plan["num_seeds"]
    blocks = tuple(dict(block) for block in blocks)
    _check_blocks(blocks)
    rows, num_trials = _complete_rows(blocks, plan["num_trials"], num_seeds)
    used = sorted({int(block) for block, _ in rows})
    blocks = tuple(blocks[index] for index in used)
    rows = np.stack([np.searchsorted(used, rows[:, 0]), rows[:, 1]], axis=1).astype(np.int64)
    if num_trials < plan["num_trials"]:
        plan = {**plan, "num_trials": num_trials, "planned_trials": plan["num_trials"]}
    else:
        plan.pop("planned_trials", None)
    if blocks:
        plan.setdefault("arrays", storage.describe_arrays(blocks[0]))
    data = _dataset(plan, _gather(blocks, rows))
    stored = None if directory is None else os.fsdecode(directory)
    return Study(data, MappingProxyType(plan), blocks, rows, weights_like, extend, replay, stored)


def _check_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    plan = copy.deepcopy(dict(spec))
    missing = [
        n for n in ("num_trials", "num_seeds", "step", "objective", "maximize") if n not in plan
    ]
    if missing:
        raise ValueError(f"spec lacks {', '.join(missing)}.")
    check_count("spec['num_trials']", plan["num_trials"], at_least=0)
    check_count("spec['num_seeds']", plan["num_seeds"])
    plan["step"] = [int(n) for n in plan["step"]]
    return plan


def _check_blocks(blocks: Sequence[Block]) -> None:
    for number, block in enumerate(blocks):
        for name in ("trial", "seed", "infeasible", "infeasible_step", "infeasible_reason"):
            if name not in block:
                raise ValueError(f"block {number} lacks the array {name!r}.")
        if list(block) != list(blocks[0]):
            odd = sorted(set(block) ^ set(blocks[0]))
            raise ValueError(
                f"block {number} has other arrays than block 0: {odd or 'their order'}."
            )
        runs = block["trial"].shape
        for name, array in block.items():
            first = blocks[0][name]
            if len(runs) != 1 or array.shape[:1] != runs:
                raise ValueError(
                    f"array {name!r} of block {number} has shape {array.shape}, expected "
                    f"{runs} first."
                )
            if array.dtype != first.dtype or array.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"array {name!r} is {array.dtype}{list(array.shape[1:])} in block {number} but "
                    f"{first.dtype}{list(first.shape[1:])} in block 0."
                )


def _complete_rows(
    blocks: Sequence[Block], num_trials: int, num_seeds: int
) -> tuple[np.ndarray, int]:
    """Where each run of the complete trials is, (run, [block, row]), and how many those are."""
    found = [np.empty((0, 3), np.int64)]
    for number, block in enumerate(blocks):
        trial, seed = block["trial"].astype(np.int64), block["seed"].astype(np.int64)
        row = np.flatnonzero((trial >= 0) & (trial < num_trials) & (seed >= 0) & (seed < num_seeds))
        run = trial[row] * num_seeds + seed[row]
        found.append(np.stack([run, np.full_like(run, number), row], axis=1))
    table = np.concatenate(found)
    # The first of two copies of a run counts; unique returns it.
    runs, first = np.unique(table[:, 0], return_index=True)
    gaps = np.flatnonzero(runs != np.arange(len(runs)))
    complete = (int(gaps[0]) if len(gaps) else len(runs)) // num_seeds
    return table[first[: complete * num_seeds], 1:], complete


def _gather(blocks: Sequence[Block], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Every array but the weights, in the order of trials and seeds, shape (run, ...)."""
    if not blocks:
        return {}
    starts = np.cumsum([0, *(len(block["trial"]) for block in blocks)])
    order = starts[rows[:, 0]] + rows[:, 1]
    names = [n for n in blocks[0] if not n.startswith(("params/", "model_state/"))]
    return {name: np.concatenate([block[name] for block in blocks])[order] for name in names}


def check_names(hyperparameters: Iterable[str], metrics: Iterable[str]) -> None:
    """Checks that names can stand beside each other, and beside the record's own, in a study.

    Args:
      hyperparameters: names of hyperparameters.
      metrics: names of metrics.

    Raises:
      ReservedName: the record itself uses a name, or a metric and a hyperparameter share one.
    """
    own, hyperparameters, metrics = (
        (*_COORDINATES, *_OUTCOMES, *_NORMS),
        [*hyperparameters],
        {*metrics},
    )
    for what, names in (("hyperparameter", hyperparameters), ("metric", metrics)):
        for name in names:
            if name in own:
                raise ReservedName(
                    f"the {what} name {name!r} is used by the record itself: rename it. So are "
                    f"{', '.join(other for other in own if other != name)}."
                )
    for name in hyperparameters:
        if name in metrics:
            raise ReservedName(
                f"{name!r} is both a metric and a hyperparameter: rename one of them."
            )


def _dataset(plan: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> xarray.Dataset:
    import xarray

    num_trials, num_seeds = plan["num_trials"], plan["num_seeds"]
    runs: tuple[str, ...] = ("trial", "seed") if num_seeds > 1 else ("trial",)
    sizes = (num_trials, num_seeds) if num_seeds > 1 else (num_trials,)

    def variable(array: np.ndarray, *more: str) -> tuple[tuple[str, ...], np.ndarray]:
        shaped = array.reshape(sizes + array.shape[1:])
        shaped.setflags(write=False)
        return (*runs, *more), shaped

    check_names(
        *(
            [name.removeprefix(kind) for name in arrays if name.startswith(kind)]
            for kind in (_POINT, _METRIC)
        )
    )
    num_evals = len(plan["step"])
    data_vars: dict[str, Any] = {}
    for name, array in arrays.items():
        if not name.startswith(_METRIC):
            continue
        metric = name.removeprefix(_METRIC)
        if array.shape[1:] != (num_evals,):
            raise ValueError(
                f"metric {metric!r} has shape {array.shape[1:]} per run, but there are {num_evals} "
                "evaluation steps."
            )
        data_vars[metric] = variable(array, "eval")
    if arrays and plan["objective"] not in data_vars:
        raise ValueError(
            f"objective = {plan['objective']!r} was not recorded: "
            f"{nearest(plan['objective'], data_vars)}"
        )
    coords: dict[str, Any] = {
        "trial": np.arange(num_trials),
        "step": ("eval", np.asarray(plan["step"], np.int32)),
    }
    if num_seeds > 1 and num_trials:
        coords["seed"] = np.arange(num_seeds)
    labels = plan.get("labels") or {}
    for name, array in arrays.items():
        if not name.startswith(_POINT):
            continue
        parameter = name.removeprefix(_POINT)
        values = array[::num_seeds]
        if parameter in labels:
            # Of objects: an array of text gives each element the room of the longest.
            values = np.asarray(labels[parameter], object)[values]
        values.setflags(write=False)
        coords[parameter] = ("trial", values)
    for name in _OUTCOMES:
        if name not in arrays:
            continue
        array = arrays[name]
        if name == "infeasible_reason":
            if array.size and not 0 <= array.min() <= array.max() < len(_feasibility.REASONS):
                raise ValueError(f"infeasible_reason has unknown codes: {np.unique(array)}.")
            array = np.asarray(_feasibility.REASONS)[array]
        data_vars[name] = variable(array)
    for name in _NORMS:
        if name in arrays:
            more = ("norm_bin",) if name == "norms/counts" else ()
            data_vars[name] = variable(arrays[name], *more)
    if "norms/counts" in arrays:
        low, high = _bin_edges(plan.get("norm_edges"), arrays["norms/counts"].shape[-1])
        coords["norm_low"], coords["norm_high"] = ("norm_bin", low), ("norm_bin", high)
    attributes = {"objective": plan["objective"], "maximize": int(plan["maximize"])}
    return xarray.Dataset(data_vars, coords, attributes)


def _bin_edges(edges: Any, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper end of each bin."""
    ends = np.asarray([] if edges is None else edges, np.float64)
    if ends.shape != (num_bins + 1,):
        raise ValueError(
            f"spec['norm_edges'] has {ends.size} edges, but {num_bins} bins have {num_bins + 1}."
        )
    return ends[:-1], ends[1:]


def _metric_names(data: xarray.Dataset) -> list[str]:
    return [str(name) for name, values in data.data_vars.items() if "eval" in values.dims]


def _space(spec: Mapping[str, Any]) -> SearchSpace | None:
    if spec.get("space") is None:
        return None
    return SearchSpace.from_dict(spec["space"])


def _same_arrays(one: Block, other: Block) -> bool:
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(one.values(), other.values(), strict=True)
    )
