"""What happens to a trial at a step and at an evaluation: pure functions of its state."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks, _tree, norms
from playbook_optax._ties import tie_breakers
from playbook_optax.trials import broadcasts, keys, layouts
from playbook_optax.trials.promises import check_init, check_same, describe, scalar, user_code
from playbook_optax.trials.workload import Workload, WorkloadLike, resolve, takes_key

Point = Mapping[str, Any]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
MakeSchedule = Callable[[Any, Any], optax.Schedule]

KEEP = ("none", "best", "final")
STEP_LOSS = "step/loss"
# What is recorded of every step beside the loss's own metrics: means and maxima since the last
# evaluation, so that what happens between two evaluations is seen.
GRADIENT_NORM = "step/gradient_norm"
PEAK_GRADIENT_NORM = "step/peak_gradient_norm"
PEAK_LOSS = "step/peak_loss"

# Weight of the past in the smoothed loss whose peak is watched for a rise: about ten steps, so
# that one unlucky batch is no rise.
_SMOOTHING = 0.9


class Lengths(NamedTuple):
    """How long a run is; data of a program, not constants of it.

    Attributes:
      num_steps: updates in the whole run, int32 scalar or a number.
      eval_every: updates between evaluations, at most `num_steps`, likewise.
    """

    num_steps: chex.Numeric
    eval_every: chex.Numeric


class Checkpoint(NamedTuple):
    """The best evaluation so far; of equal ones the metrics of `tie_breakers`, then the latest."""

    best_value: chex.Array  # float32 (), 0 before there is one
    best_step: chex.Array  # int32 (), -1 before there is one
    ties: tuple[chex.Array, ...]  # float32 (), one for each tie breaker

    @classmethod
    def none(cls, num_ties: int) -> "Checkpoint":
        """Before the first evaluation."""
        return cls(jnp.float32(0), jnp.int32(-1), (jnp.float32(jnp.inf),) * num_ties)

    def improves(self, other: "Checkpoint", maximize: bool) -> chex.Array:
        """Whether this one, with a later step, is to be kept instead of another."""
        value, least = self.best_value, other.best_value
        better = value > least if maximize else value < least
        settled = jnp.asarray(True)
        for mine, theirs in reversed(list(zip(self.ties, other.ties, strict=True))):
            settled = (mine < theirs) | ((mine == theirs) & settled)
        tied = (value == least) & settled
        return jnp.isfinite(value) & ((other.best_step < 0) | better | tied)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Table(Mapping[str, Any]):
    """Named numbers in one array, which compiles to one buffer where a dict makes one for each.

    Attributes:
      array: (..., name) or (..., name, eval), in the widest dtype of all.
      names: what stands in each row.
      dtypes: of each row.
      axis: of the names, counted from the end.
    """

    array: chex.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    dtypes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})

    @classmethod
    def full(
        cls, dtypes: Mapping[str, Any], fill: float, num_columns: int | None = None
    ) -> "Table":
        """A table of one number everywhere, (name,) or (name, column)."""
        names = tuple(sorted(dtypes))
        widest = functools.reduce(jnp.promote_types, dtypes.values())
        shape = (len(names),) if num_columns is None else (len(names), num_columns)
        told = tuple(str(jnp.dtype(dtypes[name])) for name in names)
        return cls(jnp.full(shape, fill, widest), names, told, -len(shape))

    def stacked(self, values: Mapping[str, chex.Array]) -> chex.Array:
        """One number for each name, (name,), in the table's dtype."""
        return jnp.stack([values[name].astype(self.array.dtype) for name in self.names])

    def __getitem__(self, name: str) -> Any:
        """The row of a name, (...) or (..., eval), in its own dtype."""
        row = self.names.index(name)
        where = (..., row) if self.axis == -1 else (..., row, slice(None))
        return self.array[where].astype(self.dtypes[row])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class TrialState(NamedTuple):
    """State of a trial between two calls of the stepper: a legal loop carry."""

    step: chex.Array  # int32 (), updates done, frozen ones included
    point: Any  # hyperparameters
    key: chex.PRNGKey  # the trial's key
    params: Any
    model_state: Any
    opt_state: Any
    metrics: Table  # (metric, eval)
    sums: Table  # (metric,): sums of step metrics since the last evaluation
    first_loss: chex.Array  # float (), loss of update 0
    smooth_loss: chex.Array  # float (), exponentially smoothed loss
    peak: chex.Array  # float (), its peak since the last evaluation
    norm_peak: chex.Array  # float (), peak of the gradient norm since the last evaluation
    last_loss: chex.Array  # float (), loss of the last update, non-finite ones included
    norms: norms.NormRecordState
    best: Checkpoint
    best_params: Any  # (params, model_state) at the best evaluation, None unless kept
    infeasible_step: chex.Array  # int32 (), -1 while alive


def evaluation_steps(num_steps: int, eval_every: int) -> np.ndarray:
    """Updates done before each evaluation: 0, each `eval_every`, `num_steps`; int32 (eval,)."""
    steps = np.arange(0, num_steps, eval_every, dtype=np.int64)
    return np.append(steps, num_steps).astype(np.int32)


class Stepper:
    """What happens to a trial, one step or evaluation at a time.

    The user's functions are traced once for each set of shapes, however often they are asked for.

    Args:
      workload: as in `make_trial`, as are the others.
      make_optimizer: makes the optimizer of a point.
      make_schedule: makes its schedule, or None.
      keeps_best: whether the state holds the weights of the best evaluation.
    """

    def __init__(
        self,
        workload: WorkloadLike,
        make_optimizer: MakeOptimizer,
        make_schedule: MakeSchedule | None,
        keeps_best: bool,
    ) -> None:
        if not isinstance(workload, Workload) and not callable(workload):
            resolve(workload, None)
        if not callable(make_optimizer):
            raise _checks.ArgumentTypeError(
                "make_optimizer must be a function of the point that returns an Optax "
                f"transformation, got {make_optimizer!r}."
            )
        self.workload = workload
        self.make_optimizer = make_optimizer
        self.make_schedule = make_schedule
        self.keeps_best = keeps_best
        self._init = TracedOnce(workload, _init)
        self._batch = TracedOnce(workload, _batch)
        self.loss = TracedOnce(workload, _loss)
        self._evaluate = TracedOnce(workload, _evaluate)

    # What the user brings ----------------------------------------------------------------------

    def optimizer(self, point: Point, num_steps: chex.Numeric) -> Any:
        """The transformation at a point, in a run of so many steps."""
        if self.make_schedule is not None:
            with user_code("make_schedule", self.make_schedule, point):
                schedule = self.make_schedule(point, num_steps)
            point = {**point, "learning_rate": schedule}
        with user_code("make_optimizer", self.make_optimizer, point):
            transform = self.make_optimizer(point)
        if not isinstance(transform, optax.GradientTransformation):
            raise _checks.ArgumentTypeError(
                "make_optimizer must return an optax.GradientTransformation, got "
                f"{type(transform).__name__}."
            )
        return optax.with_extra_args_support(transform)

    def weights(self, point: Point, key: chex.PRNGKey) -> tuple[Any, Any]:
        """(params, model_state) before the first update, from a trial's `keys.init_key`."""
        weights: tuple[Any, Any] = self._init(resolve(self.workload, point), key)
        return weights

    def batch(
        self, point: Any, data: Any, key: chex.PRNGKey, step: chex.Array, batches: Any, first: Any
    ) -> Any:
        """The batch of a step: from the data with a trial's `keys.batch_key`, or of `batches`."""
        if batches is not None:
            return jax.tree.map(lambda leaf: leaf[step - first], batches)
        return self._batch(resolve(self.workload, point), data, key, step)

    def gradient(
        self, state: Any, data: Any, step: chex.Array, batches: Any, first: chex.Numeric
    ) -> tuple[Any, Any]:
        """The loss and its gradient at a trial's state, on the batch and with the key of a step.

        Args:
          state: the trial's state before the update: its point, key, params and model_state.
          data: the workload's data.
          step: the update, int32 scalar.
          batches: batches with a leading axis of steps, or None to make the batch here.
          first: the step of the first of `batches`.

        Returns:
          ((loss, (model_state, metrics)), gradient).
        """
        work = resolve(self.workload, state.point)
        key = keys.batch_key(state.key) if batches is None else None
        batch = self.batch(state.point, data, key, step, batches, first)
        loss_key = keys.loss_key(state.key, step)
        loss = functools.partial(self.loss, work)
        value_and_grad = layouts.fast_layouts(jax.value_and_grad(loss, has_aux=True))
        return value_and_grad(state.params, state.model_state, batch, loss_key)

    # A trial's life ----------------------------------------------------------------------------

    def begin(
        self,
        point: Point,
        key: chex.PRNGKey,
        data: Any,
        lengths: Lengths,
        num_evals: int,
        batches: Any = None,
        weights: Any = None,
    ) -> TrialState:
        """The state before the first update.

        Args:
          point: hyperparameters, name to scalar.
          key: the trial's key.
          data: the workload's data, or their shapes.
          lengths: how long the run is.
          num_evals: room for evaluations.
          batches: host batches with a leading axis of steps, for shapes; None where they are made
            from the data.
          weights: what `weights` gave, where trials share it.

        Returns:
          The state.
        """
        keys.check_key("key", key)
        work = resolve(self.workload, point)
        if weights is None:
            weights = self.weights(point, keys.init_key(key))
        params, model_state = weights
        transform = self.optimizer(point, lengths.num_steps)
        with user_code("optimizer.init"):
            opt_state = transform.init(params)
        opt_state = jax.tree.map(jnp.asarray, opt_state)
        batch = jax.eval_shape(
            lambda d, k, b: self.batch(point, d, k, jnp.int32(0), b, 0), data, key, batches
        )
        jaxpr, (_, (_, summed)) = self.loss.outline(work, params, model_state, batch, key)
        _warn_zero_gradient(work, jaxpr, params)
        broadcasts.warn_of_pairs(work.name, jaxpr, params, model_state, batch)
        evaluate = functools.partial(self._evaluate, work)
        evaluated = jax.eval_shape(evaluate, params, model_state, data, _evaluation_key(work, key))
        step_names = [*(f"step/{name}" for name in summed), GRADIENT_NORM]
        peaks = [PEAK_GRADIENT_NORM, PEAK_LOSS]
        clash = sorted({*step_names, *peaks} & set(evaluated))
        if clash:
            raise ValueError(f"evaluate returns {clash[0]!r}, the name of a metric of the loss.")
        _objective(work, evaluated)
        dtypes = {name: value.dtype for name, value in evaluated.items()}
        dtypes |= dict.fromkeys((*step_names, *peaks), jnp.dtype(jnp.float32))
        nan = jnp.float32(jnp.nan)
        return TrialState(
            step=jnp.int32(0),
            point=jax.tree.map(jnp.asarray, dict(point)),
            key=key,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            metrics=Table.full(dtypes, jnp.nan, num_evals),
            sums=Table.full(dict.fromkeys(step_names, jnp.float32), 0.0),
            first_loss=nan,
            smooth_loss=nan,
            peak=nan,
            norm_peak=nan,
            last_loss=nan,
            norms=norms.init_record("gradient"),
            best=Checkpoint.none(len(tie_breakers(work.objective, evaluated))),
            best_params=(params, model_state) if self.keeps_best else None,
            infeasible_step=jnp.int32(-1),
        )

    def update(
        self,
        state: TrialState,
        data: Any,
        lengths: Lengths,
        step: chex.Array,
        batches: Any,
        first: chex.Numeric,
        active: chex.Array | None = None,
    ) -> TrialState:
        """The state after one more update; the loop counts `step`.

        Args:
          state: the state.
          data: the workload's data.
          lengths: how long the run is.
          step: the update, int32 scalar.
          batches: batches with a leading axis of steps, or None.
          first: the step of the first of `batches`.
          active: whether the step is part of the run; None means that it is.

        Returns:
          The state. After the trial broke only sums and peaks go on, of which nothing is recorded.
        """
        (loss, (model_state, step_metrics)), grads = self.gradient(
            state, data, step, batches, first
        )
        transform = self.optimizer(state.point, lengths.num_steps)
        with user_code("optimizer.update"):
            updates, opt_state = transform.update(
                grads, state.opt_state, state.params, value=loss, grad=grads
            )
        _tree.check_matching(updates, state.params, what="params")
        params = optax.apply_updates(state.params, updates)
        check_same("the optimizer's state", state.opt_state, opt_state)

        def counted(new: chex.Array, old: chex.Array) -> chex.Array:
            return new if active is None else jnp.where(active, new, old)

        alive = state.infeasible_step < 0
        if active is not None:
            alive &= active
        good = alive & jnp.isfinite(loss) & _tree.all_finite(params)
        new = (params, model_state, opt_state)
        old = (state.params, state.model_state, state.opt_state)
        params, model_state, opt_state = _tree.select(good, new, old)
        seen = _saturate(loss)
        fading = _SMOOTHING * state.smooth_loss + (1 - _SMOOTHING) * seen
        smooth = jnp.where(step == 0, seen, fading)
        norm = _tree.global_norm(grads)
        record = norms.update_record(state.norms, norm)
        # Nothing is clipped here: what stays as it is need not be carried from step to step.
        record = record._replace(
            clip_threshold=state.norms.clip_threshold, num_clipped=state.norms.num_clipped
        )
        norm = _saturate(norm)
        summed = {f"step/{name}": value for name, value in step_metrics.items()}
        sums = state.sums.array + state.sums.stacked({**summed, GRADIENT_NORM: norm})
        return state._replace(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            sums=dataclasses.replace(state.sums, array=counted(sums, state.sums.array)),
            first_loss=jnp.where(step == 0, seen, state.first_loss),
            smooth_loss=counted(smooth, state.smooth_loss),
            peak=counted(jnp.fmax(state.peak, smooth), state.peak),
            norm_peak=counted(jnp.fmax(state.norm_peak, norm), state.norm_peak),
            last_loss=jnp.where(alive, seen, state.last_loss),
            norms=_tree.select(alive, record, state.norms),
            infeasible_step=jnp.where(alive & ~good, step, state.infeasible_step),
        )

    def record(
        self, state: TrialState, data: Any, lengths: Lengths, index: chex.Array
    ) -> TrialState:
        """The state after evaluation number `index`, at ``state.step`` updates."""
        work = resolve(self.workload, state.point)
        key = _evaluation_key(work, state.key)
        evaluated = self._evaluate(work, state.params, state.model_state, data, key)
        values = dict(evaluated)
        before = jnp.maximum(index - 1, 0) * lengths.eval_every
        num_summed = state.step - before
        means = state.sums.array / jnp.maximum(num_summed, 1).astype(jnp.float32)
        means = jnp.where(num_summed > 0, means, jnp.float32(jnp.nan))
        values |= dict(dataclasses.replace(state.sums, array=means))
        values |= {PEAK_GRADIENT_NORM: state.norm_peak, PEAK_LOSS: state.peak}
        alive = state.infeasible_step < 0
        row = jnp.where(alive, state.metrics.stacked(values), jnp.nan)
        value = jnp.where(alive, _objective(work, values), jnp.nan).astype(jnp.float32)
        ties = [values[name] for name in tie_breakers(work.objective, evaluated)]
        worth = [jnp.where(jnp.isnan(one), jnp.inf, one).astype(jnp.float32) for one in ties]
        here = Checkpoint(value, state.step, tuple(worth))
        improved = here.improves(state.best, work.maximize)
        best, best_params = _tree.select(improved, here, state.best), state.best_params
        if self.keeps_best:
            best_params = _tree.select(improved, (state.params, state.model_state), best_params)
        nan = jnp.float32(jnp.nan)
        return state._replace(
            metrics=dataclasses.replace(
                state.metrics, array=state.metrics.array.at[:, index].set(row)
            ),
            sums=dataclasses.replace(state.sums, array=jnp.zeros_like(state.sums.array)),
            peak=nan,
            norm_peak=nan,
            best=best,
            best_params=best_params,
        )


class TracedOnce:
    """``function(work, ...)`` of a workload, whose trace is kept for the next time.

    A workload that is a function of the point is another one for each trace, which has to be done
    again.

    Args:
      workload: the workload.
      function: takes it first.
    """

    def __init__(self, workload: WorkloadLike, function: Callable[..., Any]) -> None:
        self._function = function
        self._kept: Any = None
        # Only of the workload itself: its name and fields are part of the trace.
        if isinstance(workload, Workload):
            self._kept = jax.jit(functools.partial(function, workload), inline=True)

    def __call__(self, work: Workload, *args: Any) -> Any:
        """What the function returns."""
        return self._function(work, *args) if self._kept is None else self._kept(*args)

    def outline(self, work: Workload, *args: Any) -> tuple[Any, Any]:
        """The jaxpr, and the shapes of what is returned."""
        if self._kept is not None:
            traced = self._kept.trace(*args)
            return traced.jaxpr.jaxpr, traced.out_info
        bound = functools.partial(self._function, work)
        closed, shapes = jax.make_jaxpr(bound, return_shape=True)(*args)
        return closed.jaxpr, shapes


def shared_batches(
    stepper: Stepper, point: Point, data: Any, key: chex.PRNGKey
) -> Callable[[Any, chex.PRNGKey, chex.Array], Any] | None:
    """A function that makes the batches of all trials with one key, if the point has no say.

    Args:
      stepper: of a workload fed from its data.
      point: one point.
      data: the workload's data.
      key: a trial's `keys.batch_key`.

    Returns:
      ``make_batch(data, key, step) -> batch``, with such a key; None where a batch depends on the
      point.
    """

    def make(point: Point, data: Any, key: chex.PRNGKey, step: chex.Array) -> Any:
        return stepper.batch(point, data, key, step, None, 0)

    if depends_on_point(make, point, data, key, jnp.int32(0)):
        return None
    return functools.partial(make, point)


def depends_on_point(function: Callable[..., Any], point: Point, *args: Any) -> bool:
    """Whether a result of ``function(point, ...)`` depends on the point."""
    closed = jax.make_jaxpr(function)(point, *args)
    names = set(closed.jaxpr.invars[: len(jax.tree.leaves(point))])
    reached = _tree.reached(closed.jaxpr, names)
    return any(var in reached for var in closed.jaxpr.outvars if not hasattr(var, "val"))


def _saturate(value: chex.Array) -> chex.Array:
    """A scalar as the float32 of our records; what is finite stays finite."""
    largest = jnp.asarray(jnp.finfo(jnp.float32).max, value.dtype)
    finite = jnp.clip(value, -largest, largest)
    return jnp.where(jnp.isfinite(value), finite, value).astype(jnp.float32)


def _init(work: Workload, key: chex.PRNGKey) -> tuple[Any, Any]:
    """(params, model_state)."""
    with user_code("init", work.init):
        made = work.init(key)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(
            "init must return a pair (params, model_state), with {} for no state, got "
            f"{type(made).__name__}."
        )
    check_init(made[0])
    params, model_state = jax.tree.map(jnp.asarray, made)
    return params, model_state


def _batch(work: Workload, data: Any, key: chex.PRNGKey, step: chex.Array) -> Any:
    """The batch of a step, from the data."""
    if work.batch is None:
        raise ValueError(
            f"workload {work.name!r} is fed from the host (host_batches); only run_study trains it."
        )
    with user_code("batch", work.batch):
        return work.batch(data, key, step)


def _loss(
    work: Workload, params: Any, model_state: Any, batch: Any, key: chex.PRNGKey
) -> tuple[chex.Array, tuple[Any, dict[str, chex.Array]]]:
    """The loss in float32 or better, the new model state, and its metrics with the loss itself."""
    with user_code("loss", work.loss):
        out = work.loss(params, model_state, batch, key)
    promise = "loss must return (loss, (model_state, metrics))"
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"{promise}, got {describe(out)}.")
    loss, rest = out
    if not isinstance(rest, tuple) or len(rest) != 2 or not isinstance(rest[1], dict):
        raise ValueError(f"{promise} with a dict of metrics, got {describe(rest)} beside the loss.")
    new_state, metrics = rest
    loss = scalar("loss", loss, floating=True)
    check_same("the model state", model_state, new_state)
    for taken in (STEP_LOSS, GRADIENT_NORM, PEAK_GRADIENT_NORM, PEAK_LOSS):
        if taken.removeprefix("step/") in metrics:
            raise ValueError(
                f"the loss's metrics may not be called {taken.removeprefix('step/')!r}: it is "
                "recorded already."
            )
    values = {str(name): scalar(f"metric {name!r}", value) for name, value in metrics.items()}
    # Sums of step metrics are float32 whatever the loss is.
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    return loss, (new_state, {"loss": jax.lax.stop_gradient(loss).astype(jnp.float32), **values})


def _evaluation_key(work: Workload, trial_key: chex.PRNGKey) -> chex.PRNGKey | None:
    """The key of an evaluation that takes one, else None."""
    return keys.evaluation_key(trial_key) if takes_key(work.evaluate) else None


def _evaluate(
    work: Workload, params: Any, model_state: Any, data: Any, key: chex.PRNGKey | None
) -> dict[str, Any]:
    """The metrics of an evaluation, each a real scalar in float32 or better."""
    given = (params, model_state, data) if key is None else (params, model_state, data, key)
    with user_code("evaluate", work.evaluate):
        metrics = layouts.fast_layouts(work.evaluate)(*given)
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(
            "evaluate must return a non-empty dict of scalar metrics, got "
            f"{type(metrics).__name__}."
        )
    return {str(name): scalar(f"metric {name!r}", value) for name, value in metrics.items()}


def _objective(work: Workload, metrics: Mapping[str, chex.Array]) -> chex.Array:
    if work.objective not in metrics:
        raise ValueError(
            f"objective {work.objective!r} is not among the metrics: "
            f"{_checks.nearest(work.objective, metrics)}"
        )
    return metrics[work.objective]


def _warn_zero_gradient(work: Workload, jaxpr: Any, params: Any) -> None:
    """Warns when no path leads from the first inputs, the parameters, to the first output."""
    sources = set(jaxpr.invars[: len(jax.tree.leaves(params))])
    reached = _tree.reached(jaxpr, sources, ends=("stop_gradient",))
    loss = jaxpr.outvars[0]
    if hasattr(loss, "val") or loss not in reached:
        warnings.warn(
            f"the loss of workload {work.name!r} does not depend on the params: every gradient is "
            "zero and no trial can learn.",
            UserWarning,
            stacklevel=3,
        )
