"""How noisy the gradient is: its variance across batches, by batch size and by workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks, _shown, _tree
from playbook_optax.analysis.curves import BOUND_SECTION
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.study import Study
from playbook_optax.trials import train
from playbook_optax.trials.keys import check_key, init_key, trial_key
from playbook_optax.trials.stepper import MakeOptimizer, Stepper
from playbook_optax.trials.workload import Workload, WorkloadLike, resolve

BASE = "workload"
"""What the workload itself is called beside its variants."""
CERTAIN = 2.0
"""Standard errors beyond which a difference counts."""


class NoiseRow(NamedTuple):
    """The noise of the gradient at one batch size.

    Attributes:
      batch_size: training examples in the batch.
      variance: trace of the covariance of the batch's gradient: its mean squared distance from the
        gradient's mean, summed over all parameters.
      variance_error: standard error of that, over the repeats.
      num_groups: batches of that size in a repeat.
    """

    batch_size: int
    variance: float
    variance_error: float
    num_groups: int


@_shown.short
class VariantNoise(NamedTuple):
    """The noise of the gradient of one workload.

    Attributes:
      name: what the variant is called; the workload's own is first.
      batch_size: the workload's own.
      rows: by batch size, ascending, the workload's own first.
      trace: trace of the covariance of the gradient of one example: batch_size times the variance
        of the workload's own batches.
      trace_error: standard error.
      squared_norm: squared norm of the gradient's mean, without the part that noise adds to it.
      squared_norm_error: standard error.
      noise_scale: trace / squared_norm, the simple noise scale, in examples; NaN where the
        squared norm is not certain to be positive.
      noise_scale_error: standard error, by jackknife over the repeats.
      variance_ratio: the variance of its own batches in units of the workload's; 1 for that.
      variance_ratio_error: standard error; repeats share their batches, which cancels.
      num_batches: batches in a repeat.
    """

    name: str
    batch_size: int
    rows: tuple[NoiseRow, ...]
    trace: float
    trace_error: float
    squared_norm: float
    squared_norm_error: float
    noise_scale: float
    noise_scale_error: float
    variance_ratio: float
    variance_ratio_error: float
    num_batches: int


@_shown.short
class GradientNoise(NamedTuple):
    """The noise of the gradient of a workload and of its variants, at the same weights.

    Attributes:
      variants: the workload itself, then the variants.
      num_repeats: random orders of the batches that were measured.
      num_steps: updates that the weights were trained for here; 0 if they were given or initial.
    """

    variants: tuple[VariantNoise, ...]
    num_repeats: int
    num_steps: int


class _Weights(NamedTuple):
    """What `Stepper.gradient` reads of a trial's state."""

    point: Any
    key: chex.PRNGKey
    params: Any
    model_state: Any


class _Sums(NamedTuple):
    """Carry of the scan over the batches of one repeat; gradients relative to the first one."""

    total: Any  # their sum so far
    groups: tuple[Any, ...]  # sums of the group that is being filled, one for each group size
    squares: chex.Array  # (size,) sum over the full groups of the squared norm of their means
    mean_square: chex.Array  # (size,) squared norm of the mean over all full groups


@_checks.named_arguments
def gradient_noise(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer | None = None,
    study_or_point: Study | Mapping[str, Any] | None = None,
    *,
    key: chex.PRNGKey,
    variants: Mapping[str, WorkloadLike] | None = None,
    num_batches: int = 32,
    num_repeats: int = 16,
    batch_sizes: Sequence[int] | None = None,
    num_steps: int = 0,
    params: Any = None,
    model_state: Any = None,
    batch_size: int | None = None,
    num_examples: int | None = None,
) -> Verdict:
    """Measures the variance of the gradient across batches, and the simple noise scale.

    Smaller batches, data augmentation and dropout raise the variance of the gradients, slow
    training down, and may raise the number of steps that it needs. `variants` compares them: give
    the same model with dropout, with augmentation, or with another batch size.

    At fixed weights, `num_batches` gradients are drawn in each of `num_repeats` random orders, in
    one compiled program. With V the sample variance of the gradients of a repeat (summed over the
    parameters) and g their mean, V is unbiased for the variance of one batch, and
    ``|g|**2 - V / num_batches`` for the squared norm of the mean gradient. These are the estimators
    of McCandlish et al. (2018) for a small batch of ``batch_size`` and a big one of
    ``num_batches * batch_size``. The simple noise scale is ``batch_size * V`` over that: the batch
    size at which noise and gradient are equally large.

    Other batch sizes are multiples of the workload's own: the mean of k batches is a batch of k
    times the size, unless the examples of a batch influence each other, as in batch normalization.
    A workload that was built with another batch size can be given as a variant.

    A workload that shuffles its data without replacement is read for one epoch at most (of
    `from_arrays` and its like the number of examples is known, otherwise say `num_examples`).
    Within an epoch of N examples the sample variance is unbiased for S / b, where S is the variance
    across examples (with N - 1) and b the batch size. That is the variance of b *new* examples;
    around the gradient of these N, that of a batch is smaller by the factor 1 - b / N. The squared
    norm is then that of the gradient over all possible examples, which is expected to be S / N less
    than over these N.

    Args:
      workload: a `Workload` with `batch`, or a function of the point that gives one.
      make_optimizer: ``make_optimizer(point)``; needed if `num_steps` is not 0.
      study_or_point: a study, whose best trial's kept weights are taken (with `num_steps`, only its
        point); or a point, for a workload that is a function of it or for `make_optimizer`.
      key: the only source of randomness.
      variants: name to workload, to be measured at the same weights.
      num_batches: batches in a repeat, at least 2, and no more than an epoch has.
      num_repeats: random orders, at least 2; memory grows with it.
      batch_sizes: multiples of the workload's own; it and its doubles, up to half of a repeat, if
        None.
      num_steps: updates to train before measuring, from the initial weights; 0 for none.
      params: the weights to measure at, for example those of a `TrialResult`; initial ones if
        neither these, nor a study, nor `num_steps` are given.
      model_state: the model state that belongs to `params`.
      batch_size: examples in a batch, if it is not the common first axis of what `batch` returns.
      num_examples: examples in an epoch, if sampling is without replacement.

    Returns:
      A `Verdict`: `answer` is a `GradientNoise`, or None where a gradient is not finite. Cost
      counts each gradient as one trial-step.

    Raises:
      ValueError: a bad argument, variants whose parameters differ from the workload's, a workload
        fed from the host, or a study that kept no weights.

    Example:
      Gradients of ``w * x`` have the variance of x: 2/3 for -1, 0 and 1.

      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="linear", init=lambda key: ({"w": jnp.ones(())}, {}),
      ...     loss=lambda p, s, x, k: (jnp.mean(p["w"] * x), (s, {})),
      ...     batch=lambda data, key, step: jax.random.choice(
      ...         jax.random.fold_in(key, step), data, (4,)),
      ...     evaluate=lambda p, s, data: {"train/loss": p["w"]}, objective="train/loss",
      ...     data=jnp.array([9.0, 10.0, 11.0]))
      >>> verdict = pbx.procedures.gradient_noise(workload, key=jax.random.key(0), num_repeats=99)
      >>> noise = verdict.answer.variants[0]
      >>> round(noise.trace, 1), round(noise.squared_norm), [r.batch_size for r in noise.rows]
      (0.7, 100, [4, 8, 16, 32, 64])

    Source: playbook, "Determining the number of steps for each training run" (methods that increase
    the variance of the gradients); the estimators are those of arXiv 1812.06162, appendix A.
    """
    check_key("key", key)
    num_batches = _checks.check_count("num_batches", num_batches, at_least=2)
    num_repeats = _checks.check_count("num_repeats", num_repeats, at_least=2)
    num_steps = _checks.check_count("num_steps", num_steps, at_least=0)
    if batch_size is not None:
        batch_size = _checks.check_count("batch_size", batch_size)
    if num_examples is not None:
        num_examples = _checks.check_count("num_examples", num_examples)
    named = {BASE: workload, **_check_variants(variants)}
    point: Any = {}
    studies: dict[str, Study] = {}
    if isinstance(study_or_point, Study):
        best = study_or_point.best()
        studies["given"], point = study_or_point, best.point
        if params is None and not num_steps:
            params, model_state = _kept(study_or_point, best.trial)
    elif study_or_point is not None:
        point = dict(study_or_point)
    works = {name: resolve(work, point) for name, work in named.items()}
    cost = 0
    first_key = init_key(trial_key(key))
    if num_steps:
        params, model_state = _trained(workload, make_optimizer, point, key, num_steps, params)
        cost += num_steps
    elif params is None:
        params, model_state = works[BASE].init(first_key)
    keys = jax.jit(jax.vmap(trial_key, in_axes=(None, 0)))(key, jnp.arange(num_repeats))
    measured: dict[str, _Measured] = {}
    for name, work in works.items():
        weights = _weights_for(name, work, first_key, params, model_state)
        plan = _plan(name, work, keys[0], batch_size, num_examples, num_batches, batch_sizes)
        moments = _measure(named[name], work, point, weights, keys, plan)
        cost += num_repeats * (plan.num_batches + 1)
        measured[name] = _Measured(plan, *moments)
    answer, findings = judge_noise(measured, {BASE: works[BASE].name}, num_steps)
    return Verdict(answer, tuple(by_severity(findings)), studies, cost)


def judge_noise(
    measured: Mapping[str, _Measured], names: Mapping[str, str], num_steps: int
) -> tuple[GradientNoise | None, list[Finding]]:
    """What the moments of the gradients say; draws none.

    Args:
      measured: moments by workload, the first of which is compared with.
      names: what a workload is called, where not as in `measured`.
      num_steps: updates before the measurement.

    Returns:
      The answer, or None where a gradient is not finite, and the findings.
    """
    broken = [n for n, m in measured.items() if not np.isfinite([*m.variance.flat, *m.norm]).all()]
    if broken:
        return None, [_not_finite(broken)]
    first = next(iter(measured.values()))
    told = tuple(
        _summary(names.get(name, name), m, first.variance[:, 0]) for name, m in measured.items()
    )
    answer = GradientNoise(told, len(first.norm), num_steps)
    return answer, _findings(answer, measured)


class _Plan(NamedTuple):
    """How a workload's batches are drawn: their size, their number, and how they are grouped."""

    batch_size: int
    num_batches: int
    group_sizes: tuple[int, ...]
    across_epochs: bool


class _Measured(NamedTuple):
    """Moments of the gradients of each repeat, float64: variance (repeat, size), norm (repeat,)."""

    plan: _Plan
    variance: np.ndarray
    norm: np.ndarray


def _check_variants(variants: Mapping[str, WorkloadLike] | None) -> dict[str, WorkloadLike]:
    if variants is None:
        return {}
    if not isinstance(variants, Mapping):
        raise _checks.ArgumentTypeError(
            f"variants must map a name to a workload, got {type(variants).__name__}; for example "
            'variants={"with dropout": other}.'
        )
    if BASE in variants:
        raise ValueError(f"variants may not be called {BASE!r}, which the workload itself is.")
    return dict(variants)


def _kept(study: Study, trial: int) -> tuple[Any, Any]:
    """The weights and the model state that a study kept of its best trial's first seed."""
    if study.spec.get("keep", "none") == "none":
        raise ValueError(
            "the study kept no weights to measure at: run it with keep='best', or give params=, or "
            "num_steps= and make_optimizer to train its best point here."
        )
    seed = 0 if study.num_seeds > 1 else None
    return study.params(trial, seed), study.model_state(trial, seed)


def _trained(
    workload: WorkloadLike, make_optimizer: Any, point: Any, key: Any, num_steps: int, params: Any
) -> tuple[Any, Any]:
    """The weights after training at the point."""
    if make_optimizer is None:
        raise ValueError(f"make_optimizer must be given to train for num_steps = {num_steps}.")
    if params is not None:
        raise ValueError("give num_steps or params, not both: training starts at initial weights.")
    run = train.make_train(workload, make_optimizer, num_steps, num_steps, keep="final")
    result = jax.jit(run)(point, trial_key(key), resolve(workload, point).data)
    return result.params, result.model_state


def _weights_for(
    name: str, work: Workload, init_key: chex.PRNGKey, params: Any, model_state: Any
) -> tuple[Any, Any]:
    """The common weights, and the model state if it fits, for another may need no state."""
    own = jax.eval_shape(work.init, init_key)
    described = jax.eval_shape(lambda p: p, params)

    def shapes(tree: Any) -> list[Any]:
        return [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

    if shapes(own[0]) != shapes(described):
        raise ValueError(
            f"{name!r} has other parameters than the weights that are measured at: "
            f"{jax.tree.map(lambda leaf: leaf.shape, own[0])} instead of "
            f"{jax.tree.map(lambda leaf: leaf.shape, described)}. Variants share the model."
        )
    if shapes(jax.eval_shape(lambda state: state, model_state)) != shapes(own[1]):
        model_state = work.init(init_key)[1]
    return params, model_state


def _plan(
    name: str,
    work: Workload,
    key: chex.PRNGKey,
    batch_size: int | None,
    num_examples: int | None,
    num_batches: int,
    batch_sizes: Sequence[int] | None,
) -> _Plan:
    if work.batch is None:
        raise ValueError(
            f"{name!r} is fed from the host (host_batches); give one with batch, whose batches can "
            "be drawn inside the program."
        )
    if batch_size is None:
        batch = jax.eval_shape(work.batch, work.data, key, jnp.int32(0))
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim}
        if len(lengths) != 1:
            raise ValueError(
                f"the batch size of {name!r} cannot be read off its batch, whose leaves have the "
                f"first axes {sorted(lengths)}; give batch_size."
            )
        (batch_size,) = lengths
    known = _num_examples(work) if num_examples is None else num_examples
    across = False
    if known is not None and num_batches * batch_size > known:
        across = known // batch_size < 2
        num_batches = num_batches if across else known // batch_size
    if batch_sizes is None:
        sizes = tuple(2**i for i in range(num_batches.bit_length()) if 2 * 2**i <= num_batches)
        return _Plan(batch_size, num_batches, sizes, across)
    for i, size in enumerate(batch_sizes):
        size = _checks.check_count(f"batch_sizes[{i}]", size)
        if size % batch_size or 2 * size > num_batches * batch_size:
            raise ValueError(
                f"batch_sizes[{i}] = {size} must be a multiple of {batch_size}, the batch size of "
                f"{name!r}, and at most {num_batches // 2 * batch_size}, half of its {num_batches} "
                "batches."
            )
    sizes = tuple(sorted({1, *(int(size) // batch_size for size in batch_sizes)}))
    return _Plan(batch_size, num_batches, sizes, across)


def _num_examples(work: Workload) -> int | None:
    """The training examples of a workload made by `from_arrays` and the like, if it is one."""
    if not isinstance(work.data, Mapping) or "train" not in work.data:
        return None
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(work.data["train"])}
    return int(next(iter(lengths))[0]) if len(lengths) == 1 and () not in lengths else None


def _measure(
    like: WorkloadLike,
    work: Workload,
    point: Any,
    weights: tuple[Any, Any],
    keys: chex.PRNGKey,
    plan: _Plan,
) -> tuple[np.ndarray, np.ndarray]:
    """Variance (repeat, size) and squared norm (repeat,) of the gradients, by one program."""
    sizes, num = plan.group_sizes, plan.num_batches
    ends = np.asarray([num // size * size for size in sizes])
    stepper = Stepper(like, lambda point: optax.identity(), None, False)

    def repeat(point: Any, params: Any, state: Any, key: chex.PRNGKey, data: Any) -> Any:
        at = _Weights(point, key, params, state)

        def gradient(step: chex.Array) -> Any:
            _, grad = stepper.gradient(at, data, step, None, 0)
            return jax.tree.map(lambda g: g.astype(_tree.moment_dtype(g.dtype)), grad)

        # Variances do not change if all gradients are shifted, and of shifted ones no digits are
        # lost where the noise is small against the gradient.
        origin = gradient(jnp.int32(0))

        def body(sums: _Sums, step: chex.Array) -> tuple[_Sums, None]:
            new = jax.tree.map(jnp.subtract, gradient(step), origin)
            total = jax.tree.map(jnp.add, sums.total, new)
            groups, squares = [], []
            for size, group in zip(sizes, sums.groups, strict=True):
                group = jax.tree.map(jnp.add, group, new)
                full = (step + 1) % size == 0
                square = _square(group) / size**2
                squares.append(jnp.where(full & (step < num // size * size), square, 0.0))
                zero = jax.tree.map(jnp.zeros_like, group)
                groups.append(_tree.select(full, zero, group))
            here = step + 1 == ends
            mean_square = jnp.where(here, _square(total) / ends**2, sums.mean_square)
            return _Sums(total, tuple(groups), sums.squares + jnp.stack(squares), mean_square), None

        zero = jax.tree.map(jnp.zeros_like, origin)
        none = jnp.zeros((len(sizes),), _square(origin).dtype)
        sums = _Sums(zero, (zero,) * len(sizes), none, none)
        sums, _ = jax.lax.scan(body, sums, jnp.arange(num, dtype=jnp.int32))
        mean = jax.tree.map(lambda first, total: first + total / num, origin, sums.total)
        count = num // np.asarray(sizes)
        variance = (sums.squares - count * sums.mean_square) / (count - 1)
        return variance, _square(mean)

    program = jax.jit(jax.vmap(repeat, in_axes=(None, None, None, 0, None)))
    numbers = {name: jnp.asarray(value) for name, value in point.items()}
    variance, square = jax.device_get(program(numbers, *weights, keys, work.data))
    variance = np.maximum(variance.astype(np.float64), 0.0)  # NaN stays.
    return variance, square.astype(np.float64) - variance[:, 0] / num


def _square(tree: Any) -> chex.Array:
    """The squared norm of a pytree, in float32 or better."""
    leaves = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(leaves))


def _mean(values: np.ndarray) -> tuple[float, float]:
    """A mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    """A quotient of means and its standard error by jackknife; NaN over zero."""
    num = len(top)
    if not bottom.mean():
        return (1.0, 0.0) if not top.mean() else (math.inf, math.nan)
    left = (top.sum() - top) / np.where(bottom.sum() == bottom, np.nan, bottom.sum() - bottom)
    error = math.sqrt((num - 1) / num * float(np.sum((left - left.mean()) ** 2)))
    return float(top.mean() / bottom.mean()), error


def _summary(name: str, measured: _Measured, base: np.ndarray) -> VariantNoise:
    plan, variance, norm = measured
    rows = tuple(
        NoiseRow(size * plan.batch_size, *_mean(variance[:, i]), plan.num_batches // size)
        for i, size in enumerate(plan.group_sizes)
    )
    squared, squared_error = _mean(norm)
    scale, scale_error = math.nan, math.nan
    if squared > CERTAIN * squared_error and squared > 0:
        scale, scale_error = _ratio(plan.batch_size * variance[:, 0], norm)
    return VariantNoise(
        name,
        plan.batch_size,
        rows,
        plan.batch_size * rows[0].variance,
        plan.batch_size * rows[0].variance_error,
        squared,
        squared_error,
        scale,
        scale_error,
        *_ratio(variance[:, 0], base),
        plan.num_batches,
    )


def _findings(info: GradientNoise, measured: Mapping[str, _Measured]) -> list[Finding]:
    base, *others = info.variants
    out = [_scale(noise) for noise in info.variants]
    out += [_compared(noise, base) for noise in others]
    across = [m.plan for m in measured.values() if m.plan.across_epochs]
    if across:
        out.append(
            Finding(
                "batches_across_epochs",
                "info",
                f"A batch of {across[0].batch_size} is more than half of an epoch, so that batches "
                "of different epochs were compared: the variance is that around the gradient of "
                "these examples.",
                {"batch_size": across[0].batch_size},
                BOUND_SECTION,
                "Measure at a smaller batch size to know the variance across new examples.",
            )
        )
    return out


def _scale(noise: VariantNoise) -> Finding:
    size = noise.batch_size
    evidence = {**noise._asdict(), "rows": [row._asdict() for row in noise.rows]}
    if math.isnan(noise.noise_scale):
        bound = noise.squared_norm + CERTAIN * noise.squared_norm_error
        least = noise.trace / bound if bound > 0 else math.inf
        return Finding(
            "gradient_lost_in_noise",
            "warning",
            f"{noise.name}: the gradient's mean cannot be told from zero, its noise can: the noise "
            f"scale is more than {least:.3g} examples, against batches of {size}.",
            {**evidence, "least_noise_scale": least},
            BOUND_SECTION,
            "Draw more batches (num_batches, num_repeats) to measure it, or measure earlier in "
            "training.",
        )
    share = noise.noise_scale / size
    if share > 2:
        advice = (
            "Noise dominates at this batch size: larger batches take fewer steps, almost in "
            f"proportion up to about {noise.noise_scale:.3g} examples."
        )
    elif share < 0.5:
        advice = "The gradient dominates at this batch size: larger batches save few steps."
    else:
        advice = "Noise and gradient are about equally large at this batch size."
    return Finding(
        "gradient_noise",
        "info",
        f"{noise.name}: across batches of {size} the gradient has the variance "
        f"{noise.rows[0].variance:.3g}, against a squared norm of its mean of "
        f"{noise.squared_norm:.3g}; the noise scale is {noise.noise_scale:.3g} (error "
        f"{noise.noise_scale_error:.1g}) examples.",
        evidence,
        BOUND_SECTION,
        advice,
    )


def _compared(noise: VariantNoise, base: VariantNoise) -> Finding:
    ratio, error = noise.variance_ratio, noise.variance_ratio_error
    raised = ratio == math.inf or ratio - 1 > CERTAIN * error
    lowered = 1 - ratio > CERTAIN * error
    code = "raised" if raised else "lowered" if lowered else "unchanged"
    told = {
        "raised": f"raises the variance of the gradient {ratio:.3g} times (error {error:.1g})",
        "lowered": f"lowers the variance of the gradient to {ratio:.3g} of it (error {error:.1g})",
        "unchanged": "leaves the variance of the gradient as it is, as far as can be seen "
        f"(ratio {ratio:.3g}, error {error:.1g})",
    }
    sizes = ""
    if noise.batch_size != base.batch_size:
        sizes = f", in batches of {noise.batch_size} against {base.batch_size}"
    return Finding(
        f"gradient_variance_{code}",
        "warning" if raised else "info",
        f"{noise.name} {told[code]}, compared with {base.name}{sizes}.",
        {"variant": noise.name, "ratio": ratio, "error": error, "baseline": base.name},
        BOUND_SECTION,
        "Noisier gradients slow training down: num_steps may have to grow." if raised else "",
    )


def _not_finite(names: list[str]) -> Finding:
    return Finding(
        "gradient_not_finite",
        "error",
        f"A gradient of {' and '.join(repr(name) for name in names)} is not finite, or its square "
        "is too large for float32.",
        {"variants": names},
        BOUND_SECTION,
        "Measure at weights where training is stable.",
    )
