"""The training of one trial: a stepper, and the pure function composed of it."""

import contextlib
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

from playbook_optax import _checks, _feasibility, _tree, norms, reducers
from playbook_optax.trials import layouts
from playbook_optax.trials.workload import Workload, WorkloadLike, resolve

Point = Mapping[str, Any]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
MakeSchedule = Callable[[Any, int], optax.Schedule]

KEEP = ("none", "best", "final")
STEP_LOSS = "step/loss"
# What is recorded of every step beside the loss's own metrics: means and maxima since the last
# evaluation, so that what happens between two evaluations is seen.
GRADIENT_NORM = "step/gradient_norm"
PEAK_GRADIENT_NORM = "step/peak_gradient_norm"
PEAK_LOSS = "step/peak_loss"

# Folds of the study's key: training and points never share a stream.
_TRAINING_STREAM, _POINT_STREAM = 0, 1
# Folds of a trial's key.
_INIT_STREAM, _BATCH_STREAM, _LOSS_STREAM = 0, 1, 2
# Weight of the past in the smoothed loss whose peak is watched for a rise: about ten steps, so
# that one unlucky batch is no rise.
_SMOOTHING = 0.9

# A loop whose length is data asks the host before each of its steps if it is on an accelerator;
# loops of this fixed length do not, and their steps past the end change nothing.
ACCELERATOR_CHUNK = 8


class TrialResult(NamedTuple):
    """What a finished trial gives back. Under vmap every array has a leading axis of trials.

    Attributes:
      metrics: by name, float arrays (eval,), NaN after `infeasible_step`. Beside those of the
        workload, over the steps since the previous evaluation: ``step/loss`` and
        ``step/gradient_norm``, means; ``step/peak_gradient_norm``, the largest; ``step/peak_loss``,
        the largest of the loss smoothed over about ten steps, which begins at step 0 with the loss
        of the first batch.
      step: number of updates done before each evaluation, int32 (eval,).
      best_value: retrospective best of the objective, float scalar, NaN if never finite.
      best_step: its step, int32 scalar, -1 if never finite.
      infeasible: bool scalar.
      infeasible_step: 0-based update whose loss or result was first bad, int32 scalar, -1 if none;
        for a high loss, the last update before the first evaluation that was high.
      infeasible_reason: int8 scalar, an index into ``pbx.INFEASIBLE_REASONS``.
      norms: `NormInfo` of the gradient before any clipping; threshold and number of clipped steps
        are those of the clipper in the optimizer's state, if there is one.
      params: the weights that `keep` asked for, or None.
      model_state: the model state that belongs to them, or None.
    """

    metrics: dict[str, chex.Array]
    step: chex.Array
    best_value: chex.Array
    best_step: chex.Array
    infeasible: chex.Array
    infeasible_step: chex.Array
    infeasible_reason: chex.Array
    norms: norms.NormInfo
    params: Any
    model_state: Any


class TrialState(NamedTuple):
    """State of a trial between two calls of the stepper: a legal loop carry."""

    step: chex.Array  # int32 (), updates done, frozen ones included
    point: Any  # hyperparameters
    key: chex.PRNGKey  # the trial's key
    params: Any
    model_state: Any
    opt_state: Any
    metrics: dict[str, chex.Array]  # (eval,) each
    sums: dict[str, chex.Array]  # sums of step metrics since the last evaluation
    num_summed: chex.Array  # int32 (), steps in `sums`
    first_loss: chex.Array  # float (), loss of update 0
    smooth_loss: chex.Array  # float (), exponentially smoothed loss
    peak: chex.Array  # float (), its peak since the last evaluation
    norm_peak: chex.Array  # float (), peak of the gradient norm since the last evaluation
    last_loss: chex.Array  # float (), loss of the last update, non-finite ones included
    norms: norms.NormRecordState
    best: Any  # state of reducers.best
    best_params: Any  # (params, model_state) at the best evaluation, None unless kept
    infeasible_step: chex.Array  # int32 (), -1 while alive
    infeasible_reason: chex.Array  # int8 ()


class Trial(NamedTuple):
    """A trial as a stepper of three pure functions; vmap and jit them as you like.

    Attributes:
      init: ``init(point, key, data) -> state``: initializes model and optimizer.
      advance: ``advance(state, data, start, stop) -> state``: does the updates start, ..., stop - 1
        and the evaluations among them, which for start = 0 include that before any update. Both
        are int32 scalars, traced or not; under vmap they must be shared by all trials
        (``in_axes=(0, None, None, None)``). Any cut of a run into segments gives the same bits.
      result: ``result(state) -> TrialResult``.
      num_steps: updates in the whole run.
      eval_steps: int32 NumPy array (eval,), updates done before each evaluation.
    """

    init: Callable[..., TrialState]
    advance: Callable[..., TrialState]
    result: Callable[[TrialState], TrialResult]
    num_steps: int
    eval_steps: np.ndarray


@_checks.named_arguments
def trial_key(key: chex.PRNGKey, seed: chex.Numeric = 0, trial: Any = None) -> chex.PRNGKey:
    """The key that `run_study` trains with.

    By default all trials of a seed share initialization and batches (common random numbers), which
    makes their comparison fairer and needs one gather of data for all.

    Args:
      key: the study's key.
      seed: which repetition, int scalar.
      trial: the trial's index for independent randomness, or None to share it.

    Returns:
      A key.

    Raises:
      ValueError: `key` is not a single random key.

    Example:
      >>> import jax
      >>> import playbook_optax as pbx
      >>> key = jax.random.key(0)
      >>> bool(pbx.trial_key(key) == pbx.trial_key(key, seed=1))
      False

    Source: playbook, "Where can I find an implementation of quasi-random search?" (a study is
    reproducible from its key).
    """
    check_key("key", key)
    folded = jax.random.fold_in(jax.random.fold_in(key, _TRAINING_STREAM), seed)
    return folded if trial is None else jax.random.fold_in(folded, trial)


def points_key(key: chex.PRNGKey) -> chex.PRNGKey:
    """The key that a study samples its points with: another fold than training."""
    check_key("key", key)
    return jax.random.fold_in(key, _POINT_STREAM)


def shared_batches(
    workload: WorkloadLike, point: Point, data: Any, key: chex.PRNGKey
) -> Callable[[Any, chex.PRNGKey, chex.Array], Any] | None:
    """A function that makes the batches of all trials with one key, if the point has no say.

    Args:
      workload: a workload fed from its data.
      point: one point.
      data: the workload's data.
      key: a trial's key.

    Returns:
      ``make_batch(data, key, step) -> batch``, with the trial's key; None where a batch depends on
      the point.
    """

    def make(point: Point, data: Any, key: chex.PRNGKey, step: chex.Array) -> Any:
        return _batch(resolve(workload, point), data, key, step, None, 0)

    closed = jax.make_jaxpr(make)(point, data, key, jnp.int32(0))
    names = set(closed.jaxpr.invars[: len(jax.tree.leaves(point))])
    reached = _tree.reached(closed.jaxpr, names)
    if any(var in reached for var in closed.jaxpr.outvars if not hasattr(var, "val")):
        return None
    return functools.partial(make, point)


def steps_per_chunk() -> int:
    """Steps that are taken together, the last ones perhaps in vain."""
    return 1 if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


def check_key(name: str, key: Any) -> None:
    """Raises unless `key` is one random key, typed or a raw uint32 pair."""
    is_array = isinstance(key, jax.Array)
    typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = is_array and key.dtype == jnp.uint32 and key.ndim == 1
    if not (typed and key.ndim == 0) and not raw:
        raise _checks.ArgumentTypeError(
            f"{name} must be one random key such as jax.random.key(0), got {key!r}."
        )


def evaluation_steps(num_steps: int, eval_every: int) -> np.ndarray:
    """Updates done before each evaluation: 0, each `eval_every`, `num_steps`; int32 (eval,)."""
    steps = np.arange(0, num_steps, eval_every, dtype=np.int64)
    return np.append(steps, num_steps).astype(np.int32)


@_checks.named_arguments
def make_trial(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    num_steps: int,
    eval_every: int,
    *,
    keep: str = "none",
    make_schedule: MakeSchedule | None = None,
) -> Trial:
    """Builds the stepper of one trial.

    A trial freezes, bit for bit, at the update whose loss or result is not finite. Evaluation is
    before the first update, every `eval_every` updates, and after the last. The gradient's norm is
    recorded at each step, and metrics of the loss as their mean since the last evaluation, under
    ``step/<name>`` (the loss itself as ``step/loss``).

    Half-precision parameters lose updates below about 1/256 (bfloat16) or 1/2048 (float16) of their
    size to rounding, whatever the optimizer: a warning says so. Keep float32 parameters and cast
    inside the model.

    Args:
      workload: a `Workload`, or a function of the point that gives one; names, objective,
        structure and shapes may not depend on the point.
      make_optimizer: ``make_optimizer(point)`` returns any Optax transformation; the values of the
        point are traced scalars.
      num_steps: updates in the whole run.
      eval_every: updates between evaluations; more than `num_steps` means only first and last.
      keep: which weights the result brings back: ``"none"``, ``"best"`` (at the retrospective best
        evaluation) or ``"final"``.
      make_schedule: ``make_schedule(point, num_steps)`` returns a schedule, which then reaches
        `make_optimizer` as ``point["learning_rate"]``.

    Returns:
      The stepper.

    Raises:
      ValueError: a bad argument; and, while tracing, a loss, a model or an optimizer that breaks
        its promise.

    Example:
      >>> import jax
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jax.numpy.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> trial = pbx.make_trial(workload, lambda p: pbx.sgd(p["learning_rate"]), 10, 5)
      >>> state = trial.init({"learning_rate": 0.1}, jax.random.key(0), None)
      >>> state = trial.advance(state, None, 0, 4)
      >>> state = trial.advance(state, None, 4, 10)
      >>> [round(float(v), 4) for v in trial.result(state).metrics["valid/loss"]]
      [2.0, 0.2147, 0.0231]

    Source: playbook, "Deciding how long to train when training is not compute-bound" and "How can
    optimization failures be debugged and mitigated?"
    """
    num_steps = _checks.check_count(
        "num_steps", num_steps, fix="A trial needs at least one update."
    )
    eval_every = _checks.check_count("eval_every", eval_every)
    _checks.check_choice("keep", keep, KEEP)
    for flag in ("jax_debug_nans", "jax_debug_infs"):
        if jax.config.values[flag]:
            raise ValueError(
                f"{flag} is on, which makes an error of what a trial records as data: that it "
                "diverged, and NaN for what was never measured. Turn it off, "
                f'jax.config.update("{flag}", False); Study.replay shows the step that broke.'
            )
    if not isinstance(workload, Workload) and not callable(workload):
        resolve(workload, None)
    if not callable(make_optimizer):
        raise _checks.ArgumentTypeError(
            "make_optimizer must be a function of the point that returns an Optax transformation, "
            f"got {make_optimizer!r}."
        )
    eval_every = min(eval_every, num_steps)
    eval_steps = evaluation_steps(num_steps, eval_every)
    num_evals = len(eval_steps)

    def optimizer(point: Point) -> optax.GradientTransformationExtraArgs:
        if make_schedule is not None:
            with _user_code("make_schedule", point):
                schedule = make_schedule(point, num_steps)
            point = {**point, "learning_rate": schedule}
        with _user_code("make_optimizer", point):
            transform = make_optimizer(point)
        if not isinstance(transform, optax.GradientTransformation):
            raise _checks.ArgumentTypeError(
                "make_optimizer must return an optax.GradientTransformation, got "
                f"{type(transform).__name__}."
            )
        return optax.with_extra_args_support(transform)

    def evaluate(work: Workload, params: Any, model_state: Any, data: Any) -> dict[str, Any]:
        with _user_code("evaluate"):
            metrics = layouts.fast_layouts(work.evaluate)(params, model_state, data)
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError(
                "evaluate must return a non-empty dict of scalar metrics, got "
                f"{type(metrics).__name__}."
            )
        return {str(name): _scalar(f"metric {name!r}", value) for name, value in metrics.items()}

    def objective_value(work: Workload, metrics: dict[str, chex.Array]) -> chex.Array:
        if work.objective not in metrics:
            raise ValueError(
                f"objective {work.objective!r} is not among the metrics: "
                f"{_checks.nearest(work.objective, metrics)}"
            )
        return metrics[work.objective]

    def init(point: Point, key: chex.PRNGKey, data: Any, batches: Any = None) -> TrialState:
        check_key("key", key)
        work = resolve(workload, point)
        with _user_code("init"):
            made = work.init(jax.random.fold_in(key, _INIT_STREAM))
        if not isinstance(made, tuple) or len(made) != 2:
            raise ValueError(
                "init must return a pair (params, model_state), with {} for no state, got "
                f"{type(made).__name__}."
            )
        params, model_state = made
        _check_init(params)
        params, model_state = jax.tree.map(jnp.asarray, (params, model_state))
        with _user_code("optimizer.init"):
            opt_state = optimizer(point).init(params)
        opt_state = jax.tree.map(jnp.asarray, opt_state)
        batch_shapes = jax.eval_shape(lambda: _batch(work, data, key, jnp.int32(0), batches, 0))
        _, shapes = jax.eval_shape(
            lambda p, s, b, k: _loss(work, p, s, b, k)[1], params, model_state, batch_shapes, key
        )
        _warn_zero_gradient(work, params, model_state, batch_shapes, key)
        names = [*(f"step/{name}" for name in shapes), GRADIENT_NORM]
        peaks = [PEAK_GRADIENT_NORM, PEAK_LOSS]
        evaluated = jax.eval_shape(lambda *a: evaluate(work, *a), params, model_state, data)
        clash = sorted({*names, *peaks} & set(evaluated))
        if clash:
            raise ValueError(f"evaluate returns {clash[0]!r}, the name of a metric of the loss.")
        objective_value(work, evaluated)
        dtypes = {name: value.dtype for name, value in evaluated.items()}
        dtypes |= dict.fromkeys((*names, *peaks), jnp.dtype(jnp.float32))
        metrics = {name: jnp.full((num_evals,), jnp.nan, dtype) for name, dtype in dtypes.items()}
        zero, nan = jnp.float32(0), jnp.float32(jnp.nan)
        return TrialState(
            step=jnp.int32(0),
            point=jax.tree.map(jnp.asarray, dict(point)),
            key=key,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            metrics=metrics,
            sums=dict.fromkeys(names, zero),
            num_summed=jnp.int32(0),
            first_loss=nan,
            smooth_loss=nan,
            peak=nan,
            norm_peak=nan,
            last_loss=nan,
            norms=norms.init_record("gradient"),
            best=reducers.best(maximize=work.maximize).init(),
            best_params=(params, model_state) if keep == "best" else None,
            infeasible_step=jnp.int32(-1),
            infeasible_reason=jnp.int8(0),
        )

    def update(
        state: TrialState,
        data: Any,
        step: chex.Array,
        batches: Any,
        first: chex.Numeric,
        active: chex.Array | None = None,
    ) -> TrialState:
        (loss, (model_state, step_metrics)), grads = gradient(
            workload, state, data, step, batches, first
        )
        transform = optimizer(state.point)
        with _user_code("optimizer.update"):
            updates, opt_state = transform.update(
                grads, state.opt_state, state.params, value=loss, grad=grads
            )
        _tree.check_matching(updates, state.params, what="params")
        params = optax.apply_updates(state.params, updates)
        _check_same("the optimizer's state", state.opt_state, opt_state)
        alive = state.infeasible_step < 0
        if active is not None:
            alive &= active
        loss_ok = jnp.isfinite(loss)
        good = alive & loss_ok & _tree.all_finite(params)
        reason = jnp.where(
            loss_ok,
            jnp.int8(_feasibility.NONFINITE_PARAMS),
            jnp.int8(_feasibility.NONFINITE_LOSS),
        )
        broke = alive & ~good
        new = (params, model_state, opt_state)
        old = (state.params, state.model_state, state.opt_state)
        params, model_state, opt_state = _tree.select(good, new, old)
        starting = jnp.isnan(state.smooth_loss)
        seen = _saturate(loss)
        smooth = jnp.where(starting, seen, _SMOOTHING * state.smooth_loss + (1 - _SMOOTHING) * seen)
        norm = _tree.global_norm(grads)
        record = norms.update_record(state.norms, norm)
        norm = _saturate(norm)
        summed = {**step_metrics, "gradient_norm": norm}
        return state._replace(
            step=step + 1 if active is None else jnp.where(active, step + 1, state.step),
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            sums={
                f"step/{name}": jnp.where(
                    good, state.sums[f"step/{name}"] + value, state.sums[f"step/{name}"]
                )
                for name, value in summed.items()
            },
            num_summed=state.num_summed + good.astype(jnp.int32),
            first_loss=jnp.where(starting & alive, seen, state.first_loss),
            smooth_loss=jnp.where(good, smooth, state.smooth_loss),
            peak=jnp.where(good, jnp.fmax(state.peak, smooth), state.peak),
            norm_peak=jnp.where(good, jnp.fmax(state.norm_peak, norm), state.norm_peak),
            last_loss=jnp.where(alive, seen, state.last_loss),
            norms=_tree.select(alive, record, state.norms),
            infeasible_step=jnp.where(broke, step, state.infeasible_step),
            infeasible_reason=jnp.where(broke, reason, state.infeasible_reason),
        )

    def record(state: TrialState, data: Any, index: chex.Array) -> TrialState:
        work = resolve(workload, state.point)
        values = evaluate(work, state.params, state.model_state, data)
        alive = state.infeasible_step < 0
        count = jnp.maximum(state.num_summed, 1).astype(jnp.float32)
        for name, total in state.sums.items():
            values[name] = jnp.where(state.num_summed > 0, total / count, jnp.float32(jnp.nan))
        values[PEAK_GRADIENT_NORM], values[PEAK_LOSS] = state.norm_peak, state.peak
        values = {
            name: jnp.where(alive, value, jnp.asarray(jnp.nan, value.dtype))
            for name, value in values.items()
        }
        reducer = reducers.best(maximize=work.maximize)
        best = reducer.update(state.best, objective_value(work, values), state.step)
        improved = reducer.compute(best).step != reducer.compute(state.best).step
        best_params = state.best_params
        if keep == "best":
            best_params = _tree.select(improved, (state.params, state.model_state), best_params)
        metrics = {
            name: buffer.at[index].set(values[name]) for name, buffer in state.metrics.items()
        }
        return state._replace(
            metrics=metrics,
            sums=jax.tree.map(jnp.zeros_like, state.sums),
            num_summed=jnp.int32(0),
            peak=jnp.float32(jnp.nan),
            norm_peak=jnp.float32(jnp.nan),
            best=best,
            best_params=best_params,
        )

    def advance(
        state: TrialState,
        data: Any,
        start: chex.Numeric,
        stop: chex.Numeric,
        batches: Any = None,
        first: chex.Numeric | None = None,
    ) -> TrialState:
        # The trip counts are data, so that every segment is the same program and the same bits.
        start, stop = jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)
        first = start if first is None else first
        stop = jnp.minimum(stop, num_steps)

        def period(carry: tuple[Any, Any, TrialState]) -> tuple[Any, Any, TrialState]:
            step, fresh, state = carry
            done = step // eval_every
            until_next = eval_every - (step - done * eval_every)
            # Before the first update there is an evaluation and nothing else.
            target = step + jnp.where(fresh, 0, jnp.minimum(until_next, stop - step))

            def one(step: chex.Array, state: TrialState, active: Any = None) -> TrialState:
                return update(state, data, step, batches, first, active)

            def chunk(number: chex.Array, state: TrialState) -> TrialState:
                begin = step + number * length

                def masked(offset: chex.Array, state: TrialState) -> TrialState:
                    return one(begin + offset, state, begin + offset < target)

                return jax.lax.fori_loop(0, length, masked, state)

            length = steps_per_chunk()
            if length == 1:
                state = jax.lax.fori_loop(step, target, one, state)
            else:
                num_chunks = (target - step + length - 1) // length
                state = jax.lax.fori_loop(0, num_chunks, chunk, state)
            due = fresh | (target - done * eval_every == eval_every) | (target == num_steps)
            index = jnp.where(fresh, 0, done + 1)
            state = jax.lax.cond(due, lambda s: record(s, data, index), lambda s: s, state)
            return target, jnp.asarray(False), state

        def unfinished(carry: tuple[Any, Any, TrialState]) -> chex.Array:
            step, fresh, _ = carry
            return fresh | (step < stop)

        return jax.lax.while_loop(unfinished, period, (start, start == 0, state))[2]

    def result(state: TrialState) -> TrialResult:
        work = resolve(workload, state.point)
        # Before any update the smoothed loss is that of the first batch, known only now.
        first = jnp.where(jnp.isfinite(state.first_loss), state.first_loss, jnp.nan)
        peaks = state.metrics[PEAK_LOSS].at[0].set(first)
        state = state._replace(metrics={**state.metrics, PEAK_LOSS: peaks})
        high, first_high = _judge(work, state, eval_steps)
        broke = state.infeasible_step >= 0
        before_high = jnp.asarray(eval_steps)[jnp.maximum(first_high, 0)] - 1
        best = reducers.best(maximize=work.maximize).compute(state.best)
        params, model_state = None, None
        if keep == "best":
            params, model_state = state.best_params
        elif keep == "final":
            params, model_state = state.params, state.model_state
        return TrialResult(
            metrics=state.metrics,
            step=jnp.asarray(eval_steps),
            best_value=best.value,
            best_step=best.step,
            infeasible=broke | high,
            infeasible_step=jnp.where(
                broke, state.infeasible_step, jnp.where(high, before_high, jnp.int32(-1))
            ),
            infeasible_reason=jnp.where(
                broke,
                state.infeasible_reason,
                jnp.where(high, jnp.int8(_feasibility.HIGH_LOSS), jnp.int8(0)),
            ),
            norms=_with_clipping(norms.record_info(state.norms), state.opt_state),
            params=params,
            model_state=model_state,
        )

    return Trial(init, advance, result, num_steps, eval_steps)


@_checks.named_arguments
def make_train(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    num_steps: int,
    eval_every: int,
    *,
    keep: str = "none",
    make_schedule: MakeSchedule | None = None,
) -> Callable[[Any, chex.PRNGKey, Any], TrialResult]:
    """Builds ``train(point, key, data) -> TrialResult``, the whole run of one trial.

    The function is pure and never donates its arguments. A learning-rate sweep is your own line:
    ``jax.jit(jax.vmap(train, in_axes=(0, None, None)))(points, key, workload.data)``.

    Args:
      workload: as in `make_trial`.
      make_optimizer: as in `make_trial`.
      num_steps: updates in the whole run.
      eval_every: updates between evaluations.
      keep: ``"none"``, ``"best"`` or ``"final"``: which weights come back.
      make_schedule: as in `make_trial`.

    Returns:
      The function.

    Raises:
      ValueError: as `make_trial`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> train = pbx.make_train(workload, lambda p: pbx.sgd(p["learning_rate"]), 20, 10)
      >>> sweep = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
      >>> result = sweep({"learning_rate": jnp.array([0.1, 1.5])}, jax.random.key(0), None)
      >>> result.infeasible.tolist()
      [False, True]

    Source: playbook, "Deciding how long to train when training is not compute-bound".
    """
    trial = make_trial(
        workload, make_optimizer, num_steps, eval_every, keep=keep, make_schedule=make_schedule
    )

    def train(point: Any, key: chex.PRNGKey, data: Any) -> TrialResult:
        return trial.result(trial.advance(trial.init(point, key, data), data, 0, num_steps))

    return train


def gradient(
    workload: WorkloadLike,
    state: TrialState,
    data: Any,
    step: chex.Array,
    batches: Any,
    first: chex.Numeric,
) -> tuple[Any, Any]:
    """The loss and its gradient at a trial's state, on the batch and with the key of a step.

    Args:
      workload: the workload.
      state: the trial's state before the update.
      data: the workload's data.
      step: the update, int32 scalar.
      batches: batches with a leading axis of steps, or None to make the batch here.
      first: the step of the first of `batches`.

    Returns:
      ((loss, (model_state, metrics)), gradient).
    """
    work = resolve(workload, state.point)
    batch = _batch(work, data, state.key, step, batches, first)
    loss_key = jax.random.fold_in(jax.random.fold_in(state.key, _LOSS_STREAM), step)

    def loss(params: Any, model_state: Any, batch: Any, key: chex.PRNGKey) -> Any:
        return _loss(work, params, model_state, batch, key)

    value_and_grad = layouts.fast_layouts(jax.value_and_grad(loss, has_aux=True))
    return value_and_grad(state.params, state.model_state, batch, loss_key)


def _saturate(value: chex.Array) -> chex.Array:
    """A scalar as the float32 of our records; what is finite stays finite."""
    largest = jnp.asarray(jnp.finfo(jnp.float32).max, value.dtype)
    finite = jnp.clip(value, -largest, largest)
    return jnp.where(jnp.isfinite(value), finite, value).astype(jnp.float32)


def _batch(
    work: Workload, data: Any, key: chex.PRNGKey, step: chex.Array, batches: Any, first: Any
) -> Any:
    """The batch of a step: from the data, or one of `batches`, which begin with step `first`."""
    if batches is not None:
        return jax.tree.map(lambda leaf: leaf[step - first], batches)
    if work.batch is None:
        raise ValueError(
            f"workload {work.name!r} is fed from the host (host_batches); only run_study trains it."
        )
    with _user_code("batch"):
        return work.batch(data, jax.random.fold_in(key, _BATCH_STREAM), step)


def _loss(
    work: Workload, params: Any, model_state: Any, batch: Any, key: chex.PRNGKey
) -> tuple[chex.Array, tuple[Any, dict[str, chex.Array]]]:
    """The loss in float32 or better, the new model state, and its metrics with the loss itself."""
    with _user_code("loss"):
        out = work.loss(params, model_state, batch, key)
    promise = "loss must return (loss, (model_state, metrics))"
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"{promise}, got {_describe(out)}.")
    loss, rest = out
    if not isinstance(rest, tuple) or len(rest) != 2 or not isinstance(rest[1], dict):
        raise ValueError(
            f"{promise} with a dict of metrics, got {_describe(rest)} beside the loss."
        )
    new_state, metrics = rest
    loss = _scalar("loss", loss, floating=True)
    _check_same("the model state", model_state, new_state)
    for taken in (STEP_LOSS, GRADIENT_NORM, PEAK_GRADIENT_NORM, PEAK_LOSS):
        if taken.removeprefix("step/") in metrics:
            raise ValueError(
                f"the loss's metrics may not be called {taken.removeprefix('step/')!r}: it is "
                "recorded already."
            )
    values = {str(name): _scalar(f"metric {name!r}", value) for name, value in metrics.items()}
    # Sums of step metrics are float32 whatever the loss is.
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    return loss, (new_state, {"loss": jax.lax.stop_gradient(loss).astype(jnp.float32), **values})


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if hasattr(value, "shape"):
        return f"an array of shape {value.shape}"
    return f"{type(value).__name__}"


def _scalar(name: str, value: Any, *, floating: bool = False) -> chex.Array:
    """A real scalar in float32 or better, or an error that names what it was."""
    if not isinstance(value, (int, float, complex, np.number, np.ndarray, jax.Array)):
        raise _checks.ArgumentTypeError(
            f"{name} must be a real scalar array, got {type(value).__name__}."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {shape}; take its mean.")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, got dtype {dtype}; take its real part or modulus.")
    if floating and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got dtype {dtype}: it has no gradient.")
    return jnp.asarray(value).astype(jnp.promote_types(dtype, jnp.float32))


def _check_init(params: Any) -> None:
    if not jax.tree.leaves(params):
        raise ValueError(
            "init returned empty params: there is nothing to train. A Flax model has none until it "
            "is given an input."
        )
    _tree.check_params(params)
    narrow = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)} & {
        "bfloat16",
        "float16",
    }
    if narrow:
        warnings.warn(
            f"params are {', '.join(sorted(narrow))}: updates much smaller than a weight are lost "
            "to rounding. Keep float32 params and cast inside the model.",
            UserWarning,
            stacklevel=3,
        )


def _check_same(what: str, old: Any, new: Any) -> None:
    """Raises when a carried state changes its structure, a shape or a dtype."""
    before, before_tree = jax.tree_util.tree_flatten_with_path(old)
    after, after_tree = jax.tree_util.tree_flatten_with_path(new)
    if str(before_tree) != str(after_tree):
        raise ValueError(
            f"{what} changed its structure, from {before_tree} to {after_tree}; it must be the "
            "same before and after a step."
        )
    for (path, one), (_, other) in zip(before, after, strict=True):
        first = (jnp.shape(one), jnp.result_type(one))
        second = (jnp.shape(other), jnp.result_type(other))
        if first != second:
            raise ValueError(
                f"{what} changed at {_tree.path_name(path)!r} from shape {first[0]} and dtype "
                f"{first[1]} to {second[0]} and {second[1]}; it must be the same before and after "
                "a step. A traced float32 hyperparameter does this to low-precision parameters in "
                "several Optax optimizers; ours keep their dtypes."
            )


@contextlib.contextmanager
def _user_code(what: str, point: Any = None) -> Iterator[None]:
    """Lets the user's own errors through, and explains those of tracing and of unknown names."""
    try:
        yield
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"{what} gives a traced value to NumPy; use jnp (jax.numpy) instead of np there."
        ) from error
    except jax.errors.TracerBoolConversionError as error:
        raise ValueError(
            f"{what} uses a Python `if`, `while` or `bool` on a traced value, which has no value "
            "yet; use jnp.where or jax.lax.cond."
        ) from error
    except (jax.errors.TracerIntegerConversionError, jax.errors.ConcretizationTypeError) as error:
        raise ValueError(
            f"{what} needs the number behind a traced value, for a shape or an `int()`. Shapes and "
            "structure may not depend on the key or the point; a structural choice is another "
            "study."
        ) from error
    except KeyError as error:
        name = error.args[0] if error.args else None
        if point is not None and isinstance(name, str) and name not in point:
            raise KeyError(
                f"the point has no hyperparameter {name!r}: {_checks.nearest(name, point)}"
            ) from error
        raise


def _warn_zero_gradient(
    work: Workload, params: Any, model_state: Any, batch: Any, key: chex.PRNGKey
) -> None:
    """Warns when no path leads from the parameters to the loss."""
    traced = jax.make_jaxpr(lambda p, s, b, k: _loss(work, p, s, b, k)[0])(
        params, model_state, batch, key
    ).jaxpr
    reached = _tree.reached(
        traced, set(traced.invars[: len(jax.tree.leaves(params))]), ends=("stop_gradient",)
    )
    if not any(v in reached for v in traced.outvars if not hasattr(v, "val")):
        warnings.warn(
            f"the loss of workload {work.name!r} does not depend on the params: every gradient is "
            "zero and no trial can learn.",
            UserWarning,
            stacklevel=3,
        )


def _with_clipping(info: norms.NormInfo, opt_state: Any) -> norms.NormInfo:
    """Adds the threshold and the count of the clipper in the optimizer's state, if there is one."""

    def is_record(node: Any) -> bool:
        return isinstance(node, norms.NormRecordState)

    records = [r for r in jax.tree.leaves(opt_state, is_leaf=is_record) if is_record(r)]
    if not records:
        return info
    clippers = [norms.record_info(record) for record in records]
    # A monitor among them never clips: its threshold is infinite and its count 0.
    return dataclasses.replace(
        info,
        threshold=functools.reduce(jnp.minimum, [one.threshold for one in clippers]),
        num_clipped=functools.reduce(jnp.maximum, [one.num_clipped for one in clippers]),
    )


def _judge(
    work: Workload, state: TrialState, eval_steps: np.ndarray
) -> tuple[chex.Array, chex.Array]:
    """Whether the trial's own loss is uncharacteristically high, and from which evaluation on."""
    name = work.training_loss or ("train/loss" if "train/loss" in state.metrics else STEP_LOSS)
    if name not in state.metrics:
        raise ValueError(
            f"training_loss {name!r} is not among the metrics: "
            f"{_checks.nearest(name, state.metrics)}"
        )
    curve = state.metrics[name]
    window_means = state.metrics[STEP_LOSS]
    # The first loss of a batch, and the peaks which begin with it, are as noisy as batches are.
    relative_noise = _feasibility.BATCH_DEVIATIONS * _batch_deviation(window_means[1:], eval_steps)
    # Of the size of the first losses: a single one may be small by chance, but not by any factor; a
    # loss that exploded before the second evaluation is no measure of noise.
    first = jnp.abs(state.first_loss)
    batch_noise = relative_noise * jnp.fmax(
        first, jnp.fmin(jnp.abs(window_means[1]), _feasibility.LARGEST_LUCK * first)
    )
    margin, noise = _feasibility.EVALUATION_MARGIN, jnp.float32(0)
    if name == STEP_LOSS:
        curve = curve.at[0].set(state.first_loss)
        margin, noise = _feasibility.BATCH_MARGIN, batch_noise
    # Peaks are in units of the training loss, the curve perhaps in others (a sum, a penalty). Where
    # they decide, the trial ended about where it began, so its last mean loss converts them.
    indices = jnp.arange(window_means.shape[0], dtype=jnp.int32)
    last = jnp.max(jnp.where(jnp.isfinite(window_means), indices, 0))
    reference = window_means[last]
    unit = jnp.maximum(jnp.abs(reference), jnp.finfo(jnp.float32).tiny)
    # At step 0 nothing has risen yet.
    rise = (state.metrics[PEAK_LOSS].at[0].set(jnp.nan) - reference) / unit
    scale = jnp.abs(curve[0])
    peaks = curve[0] + rise.astype(curve.dtype) * scale
    peak_noise = jnp.maximum(noise, (batch_noise / unit).astype(curve.dtype) * scale)
    return _feasibility.high_loss(curve, peaks, margin=margin, noise=noise, peak_noise=peak_noise)


def _batch_deviation(means: chex.Array, eval_steps: np.ndarray) -> chex.Array:
    """The relative standard deviation of a batch's loss, from how means of many jump to and fro.

    It is relative because a loss that explodes would be taken for noise of its own size.
    """
    if len(means) < 3:
        return jnp.float32(0)
    jumps = jnp.abs(means[2:] - 2 * means[1:-1] + means[:-2])
    sizes = (jnp.abs(means[2:]) + jnp.abs(means[1:-1]) + jnp.abs(means[:-2])) / 3
    relative = jumps / jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)
    # 0.6745: median of a normal's absolute value; 6: variance of the weights 1, -2, 1.
    deviation = (
        jnp.nanmedian(relative) / (0.6745 * 6**0.5) * float(np.diff(eval_steps).max()) ** 0.5
    )
    return jnp.where(jnp.isfinite(deviation), deviation, 0).astype(jnp.float32)
