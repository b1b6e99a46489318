"""What a user brings: a model, its loss, its data and its evaluation, as pure functions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks, _shown
from playbook_optax._direction import direction
from playbook_optax._ties import check_resolution
from playbook_optax.trials import arrays, host_data

Loss = Callable[[Any, Any], chex.Array]
Augment = Callable[[dict[str, chex.Array], chex.PRNGKey], dict[str, chex.Array]]
LOSSES = ("softmax", "mse")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training problem without its optimizer: everything but the hyperparameters.

    All functions are pure and traceable. Data reach them as arguments, never as closed-over
    constants, which would be copied into the program.

    Attributes:
      name: what people call it.
      init: ``init(key) -> (params, model_state)``; ``{}`` when the model carries no state.
      loss: ``loss(params, model_state, batch, key) -> (loss, (model_state, metrics))``: a scalar
        loss, the new state, and scalar metrics, recorded as their mean since the last evaluation
        under ``step/<name>``. The key is already folded with the step.
      batch: ``batch(data, key, step) -> batch``; one key for the whole run, and the 0-based step.
      evaluate: ``evaluate(params, model_state, data) -> {"valid/error_rate": scalar, ...}``; one
        that draws at random, such as the return of a policy, takes a key as well,
        ``evaluate(params, model_state, data, key)``. It is the same at all evaluations of a trial
        and for all trials of a seed, so that checkpoints and trials are compared on the same draws
        as they are on one validation set; another seed has another.
      objective: the metric that trials are compared by.
      data: pytree of arrays, shape (example, ...), handed to `batch` and `evaluate`.
      maximize: whether a larger objective is better; not if None, which a name such as "accuracy"
        refuses.
      training_loss: metric by which a trial's own loss is called high; ``train/loss`` if
        `evaluate` returns it, otherwise ``step/loss``, the mean over the last batches.
      host_batches: ``host_batches(start_step) -> Iterator`` of batches from the host, instead of
        `batch`; for `run_study` only. Each process of a job calls it for itself and reads only
        while it trains blocks of its own; a mesh's second axis cuts axis 0 of every leaf. Where
        its iterator stands is stored with a study, and given to its ``set_state`` when the study
        is continued: an iterator that unpickles there trusts whoever wrote the directory.
      version: names what cannot be fingerprinted, such as host data; part of a study's identity.
      evaluate_test: like `evaluate`, on `test_data`; called by nothing but `final_evaluate`.
      test_data: pytree of arrays that tuning never sees.
      resolution: what one example changes a metric by, metric to number: 1 / n for an error rate of
        n examples. A number is that of the objective; None where it is not known. What lies within
        it is a tie; see `Study.resolution`.

    Raises:
      ValueError: a function is missing, there is neither `batch` nor `host_batches`, or a
        resolution is not a number above 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="quadratic",
      ...     init=lambda key: (jax.random.normal(key, (3,)), {}),
      ...     loss=lambda params, state, batch, key: (jnp.sum(batch * params**2), (state, {})),
      ...     batch=lambda data, key, step: data,
      ...     evaluate=lambda params, state, data: {"valid/loss": jnp.sum(data * params**2)},
      ...     objective="valid/loss",
      ...     data=jnp.array([1.0, 2.0, 3.0]),
      ... )
      >>> workload.objective
      'valid/loss'

    Source: playbook, "Determining the number of steps for each training run".
    """

    name: str
    init: Callable[[chex.PRNGKey], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any, chex.PRNGKey], tuple[chex.Array, tuple[Any, Any]]]
    batch: Callable[[Any, chex.PRNGKey, chex.Array], Any] | None
    evaluate: Callable[..., dict[str, chex.Array]]
    objective: str
    data: Any = None
    maximize: bool = None  # type: ignore[assignment] # None asks, and then it is a bool.
    training_loss: str | None = None
    host_batches: Callable[[int], Iterator[Any]] | None = None
    version: str | None = None
    evaluate_test: Callable[..., dict[str, chex.Array]] | None = None
    test_data: Any = None
    resolution: Mapping[str, float] | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}.")
        for field in ("init", "loss", "evaluate"):
            if not callable(getattr(self, field)):
                raise ValueError(f"{field} must be a function, got {getattr(self, field)!r}.")
        if not isinstance(self.objective, str) or not self.objective:
            raise ValueError(f"objective must name a metric, got {self.objective!r}.")
        object.__setattr__(self, "maximize", direction("objective", self.objective, self.maximize))
        if (self.batch is None) == (self.host_batches is None):
            raise ValueError(
                "give exactly one of batch (from data on the device) and host_batches (an iterator "
                "on the host)."
            )
        if self.host_batches is not None:
            host_data.check_host_batches(self.host_batches, self.version)
        told = check_resolution(self.resolution, self.objective)
        object.__setattr__(self, "resolution", told)
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.data):
            if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "iufc":
                _checks.fitting(f"data{jax.tree_util.keystr(path)}", leaf)

    def __repr__(self) -> str:
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        unset = [name for name, default in fields.items() if getattr(self, name) is default]
        unset += [] if self.resolution else ["resolution"]
        return _shown.record("Workload", _shown.fields_of(self, unset))

    def final_evaluate(
        self, params: Any, model_state: Any, key: chex.PRNGKey | None = None
    ) -> dict[str, float]:
        """Evaluates on the test data, once, when all decisions are taken.

        Args:
          params: the weights, as `Study.params` or `TrialResult.params` give them.
          model_state: the model state that belongs to them.
          key: for an `evaluate_test` that takes one; ``jax.random.key(0)`` if None.

        Returns:
          Metrics by name.

        Raises:
          ValueError: the workload was built without test data.
        """
        if self.evaluate_test is None or self.test_data is None:
            raise ValueError(f"workload {self.name!r} has no test data; build it with test=(x, y).")
        keyed: tuple[chex.PRNGKey, ...] = ()
        if takes_key(self.evaluate_test):
            keyed = (jax.random.key(0) if key is None else key,)
        metrics = jax.jit(self.evaluate_test)(params, model_state, self.test_data, *keyed)
        return {name: float(value) for name, value in metrics.items()}

    @classmethod
    @_checks.named_arguments
    def from_arrays(
        cls,
        init: Callable[..., Any],
        apply: Callable[..., Any],
        train: tuple[Any, Any],
        valid: tuple[Any, Any],
        *,
        batch_size: int,
        loss: str | Loss = "softmax",
        name: str = "from_arrays",
        objective: str | None = None,
        maximize: bool | None = None,
        test: tuple[Any, Any] | None = None,
        eval_batch_size: int = 4096,
        num_train_eval: int | None = None,
        has_state: bool = False,
        metrics: Mapping[str, Loss] | None = None,
        augment: Augment | None = None,
    ) -> Workload:
        """Builds a workload from a model in two functions and arrays of examples.

        Each epoch visits the training examples in a new order, without replacement; a last partial
        batch is dropped, so an epoch has ``len(x) // batch_size`` steps. Metrics are ``train/loss``
        and ``valid/loss``, of a classification ``train/error_rate`` and ``valid/error_rate``, and
        those that you give. A loss of your own is of a classification where all y are integers
        from 0 on, the outputs have one more axis than y, of at least two classes, and no label
        lies beyond it.

        Args:
          init: ``init(key) -> params``; with `has_state`, ``-> (params, model_state)``.
          apply: ``apply(params, x) -> outputs``, x of shape (batch, ...); with `has_state`,
            ``apply(params, model_state, x, key, train) -> (outputs, model_state)`` where `train`
            is a Python bool and `key` is None when it is False.
          train: (x, y), arrays whose first axis is the example.
          valid: (x, y), likewise.
          batch_size: training examples in a batch.
          loss: ``"softmax"`` (outputs are logits, shape (batch, ..., class); y integer labels),
            ``"mse"`` (outputs and y of the same shape, a last axis of 1 aside), or a function
            ``(outputs, y) -> losses`` of shape (batch,).
          name: what people call the workload.
          objective: metric to compare trials by; ``valid/error_rate`` of a classification, else
            ``valid/loss``.
          maximize: whether a larger objective is better; not if None, which a name such as
            "accuracy" refuses.
          test: (x, y), never touched but by `final_evaluate`.
          eval_batch_size: examples evaluated at a time.
          num_train_eval: evaluate on that many of the first training examples; None means all.
          has_state: whether the model carries state, needs keys, or differs between training and
            evaluation.
          metrics: further metrics by name, functions ``(outputs, y) -> values`` of shape (batch,)
            whose means are recorded as ``train/<name>``, ``valid/<name>`` and ``test/<name>``; one
            called ``error_rate`` takes the place of ours.
          augment: ``augment(batch, key) -> batch``, pure and traceable, done to each training batch
            ``{"x": ..., "y": ...}`` and to nothing that is evaluated. The key is another one at
            each step, and the same for all trials of a seed.

        Returns:
          The workload.

        Raises:
          ValueError: arrays that are empty, not finite, of different lengths, out of 32-bit range,
            with labels that have no logit, or indices that the model cannot look up.

        Example:
          >>> import jax, numpy as np
          >>> import playbook_optax as pbx
          >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
          >>> y = (x[:, 0] > 0).astype(np.int32)
          >>> workload = pbx.Workload.from_arrays(
          ...     init=lambda key: {"w": 0.1 * jax.random.normal(key, (3, 2))},
          ...     apply=lambda params, x: x @ params["w"],
          ...     train=(x[:32], y[:32]), valid=(x[32:], y[32:]), batch_size=8,
          ... )
          >>> workload.objective
          'valid/error_rate'

        Source: playbook, "Determining the number of steps for each training run".
        """
        if has_state:
            full_init, full_apply = init, apply
        else:
            full_init = lambda key: (init(key), {})  # noqa: E731
            full_apply = lambda params, state, x, key, train: (apply(params, x), state)  # noqa: E731
        if not callable(loss):
            _checks.check_choice("loss", loss, LOSSES)
        labels = "class" if loss == "softmax" else "any"
        if augment is not None and not callable(augment):
            raise _checks.ArgumentTypeError(
                f"augment must be a function (batch, key) -> batch, got {augment!r}."
            )
        own = _check_metrics(metrics)
        batch_size = _checks.check_count("batch_size", batch_size)
        eval_batch_size = _checks.check_count("eval_batch_size", eval_batch_size)
        splits = {
            split: arrays.check_split(split, pair, labels=labels)
            for split, pair in (("train", train), ("valid", valid), ("test", test))
            if pair is not None or split != "test"
        }
        num_examples = len(splits["train"]["x"])
        if batch_size > num_examples:
            raise ValueError(
                f"batch_size = {batch_size} exceeds the {num_examples} training examples; choose "
                f"at most {num_examples}."
            )
        if num_train_eval is not None:
            num_train_eval = _checks.check_count("num_train_eval", num_train_eval)
        arrays.warn_shared_rows(splits["train"], splits["valid"])
        per_example = _per_example_loss(loss)
        classify = _check_model(
            full_init, full_apply, splits, per_example, loss, own, eval_batch_size
        )
        if augment is not None:
            _check_augment(augment, splits["train"], batch_size)

        def training_loss(params: Any, state: Any, batch: Any, key: chex.PRNGKey) -> Any:
            outputs, new_state = full_apply(params, state, batch["x"], key, True)
            return jnp.mean(per_example(outputs, batch["y"])), (new_state, {})

        def batch(data: Any, key: chex.PRNGKey, step: chex.Array) -> Any:
            rows = arrays.shuffled_rows(key, step, num_examples, batch_size)
            taken = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data["train"])
            return taken if augment is None else augment(taken, arrays.augment_key(key, step))

        def means(params: Any, state: Any, split: Any) -> dict[str, chex.Array]:
            def values(part: Any) -> dict[str, chex.Array]:
                outputs, _ = full_apply(params, state, part["x"], None, False)
                out = {"loss": per_example(outputs, part["y"])}
                if classify:
                    wrong = jnp.argmax(outputs, axis=-1) != part["y"]
                    out["error_rate"] = _mean_over_rest(wrong.astype(jnp.float32))
                return out | {name: metric(outputs, part["y"]) for name, metric in own.items()}

            return arrays.evaluate_in_batches(values, split, eval_batch_size)

        def evaluate(params: Any, state: Any, data: Any) -> dict[str, chex.Array]:
            subset = jax.tree.map(lambda leaf: leaf[:num_train_eval], data["train"])
            metrics = {f"train/{k}": v for k, v in means(params, state, subset).items()}
            return metrics | {
                f"valid/{k}": v for k, v in means(params, state, data["valid"]).items()
            }

        def evaluate_test(params: Any, state: Any, data: Any) -> dict[str, chex.Array]:
            return {f"test/{k}": v for k, v in means(params, state, data).items()}

        metric = objective or ("valid/error_rate" if classify else "valid/loss")
        labels_of = {"train": splits["train"]["y"][:num_train_eval], "valid": splits["valid"]["y"]}
        return cls(
            name=name,
            init=full_init,
            loss=training_loss,
            batch=batch,
            evaluate=evaluate,
            objective=metric,
            data={"train": splits["train"], "valid": splits["valid"]},
            maximize=direction("objective", metric, maximize),
            evaluate_test=evaluate_test if test is not None else None,
            test_data=splits.get("test"),
            resolution={f"{split}/error_rate": 1 / y.size for split, y in labels_of.items()}
            if classify
            else None,
        )

    @classmethod
    @_checks.named_arguments
    def from_flax(
        cls,
        module: Any,
        *,
        train: tuple[Any, Any],
        valid: tuple[Any, Any],
        batch_size: int,
        loss: str | Loss = "softmax",
        name: str | None = None,
        objective: str | None = None,
        maximize: bool | None = None,
        test: tuple[Any, Any] | None = None,
        eval_batch_size: int = 4096,
        num_train_eval: int | None = None,
        train_switch: str | Mapping[str, bool] | None = None,
        metrics: Mapping[str, Loss] | None = None,
        augment: Augment | None = None,
    ) -> Workload:
        """Builds a workload from a Flax module (linen or nnx) and arrays of examples.

        Batch statistics are carried in the model state; dropout gets a key in training and is off
        in evaluation. A module whose ``__call__`` has an argument ``train``, ``is_training``,
        ``deterministic``, ``inference`` or the like, or a linen module with such an attribute, is
        told which of the two it is in; a linen module with batch statistics or dropout and no such
        switch is refused, unless `train_switch` says what it is. Of nnx give the module's class or
        any function ``rngs -> nnx.Module``, so that seeds differ in their initialization; from an
        nnx instance every trial and seed starts with the instance's own weights.

        Args:
          module: a linen module, an nnx module class or factory, or an nnx module.
          train: (x, y), arrays whose first axis is the example.
          valid: (x, y), likewise.
          batch_size: training examples in a batch.
          loss: as in `from_arrays`.
          name: what people call the workload; the module's class name if None.
          objective: metric to compare trials by; ``valid/error_rate`` of a classification, else
            ``valid/loss``.
          maximize: whether a larger objective is better; not if None, which a name such as
            "accuracy" refuses.
          test: (x, y), never touched but by `final_evaluate`.
          eval_batch_size: examples evaluated at a time.
          num_train_eval: evaluate on that many of the first training examples; None means all.
          train_switch: the argument or attribute that is True in training; or name to value in
            training, such as ``{"frozen": False}``; ``{}`` if there is none. Looked for if None.
          metrics: as in `from_arrays`.
          augment: as in `from_arrays`.

        Returns:
          The workload.

        Raises:
          ValueError: as `from_arrays`, `module` is neither linen nor nnx, or it is not known what
            tells it that it trains.

        Example:
          >>> import flax.linen as nn, numpy as np
          >>> import playbook_optax as pbx
          >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
          >>> y = (x[:, 0] > 0).astype(np.int32)
          >>> workload = pbx.Workload.from_flax(
          ...     nn.Dense(2), train=(x[:32], y[:32]), valid=(x[32:], y[32:]), batch_size=8)
          >>> workload.name
          'Dense'

        Source: playbook, "Determining the number of steps for each training run".
        """
        from playbook_optax.trials import flax_models  # Importing flax takes a second.

        model_name, init, apply = flax_models.functions(module, train, train_switch)
        return cls.from_arrays(
            init,
            apply,
            train,
            valid,
            batch_size=batch_size,
            loss=loss,
            name=name or model_name,
            objective=objective,
            maximize=maximize,
            test=test,
            eval_batch_size=eval_batch_size,
            num_train_eval=num_train_eval,
            has_state=True,
            metrics=metrics,
            augment=augment,
        )


#: A workload, or a function of the point that gives one.
WorkloadLike = Workload | Callable[[Any], Workload]


def resolve(workload: WorkloadLike, point: Any) -> Workload:
    """The workload at a point; a function of the point is called, which happens while tracing."""
    if isinstance(workload, Workload):
        return workload
    if not callable(workload):
        raise _checks.ArgumentTypeError(
            f"workload must be a pbx.Workload or a function of the point, got {workload!r}."
        )
    resolved = workload(point)
    if not isinstance(resolved, Workload):
        raise _checks.ArgumentTypeError(
            f"the workload function must return a pbx.Workload, got {resolved!r}."
        )
    return resolved


def takes_key(evaluate: Callable[..., Any]) -> bool:
    """Whether an evaluation takes a key after the data.

    Args:
      evaluate: ``evaluate(params, model_state, data)``, perhaps with a key.

    Returns:
      True if its fourth argument has no default, or is called ``key``.
    """
    try:
        parameters = list(inspect.signature(evaluate).parameters.values())
    except (TypeError, ValueError):
        return False
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_place) > 3 and (
        by_place[3].default is inspect.Parameter.empty or by_place[3].name == "key"
    )


def with_fixed(function: Callable[..., Any], fixed: Mapping[str, Any]) -> Callable[..., Any]:
    """A user's function of the point, given the hyperparameters that are the same in all trials."""
    return lambda point, *rest: function({**fixed, **point}, *rest)


def _mean_over_rest(values: chex.Array) -> chex.Array:
    """One value per example: (batch, ...) -> (batch,)."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _per_example_loss(loss: str | Loss) -> Callable[[chex.Array, chex.Array], chex.Array]:
    """The loss as a function (outputs, y) -> (batch,) that never broadcasts silently."""
    if loss == "softmax":

        def per_example(outputs: chex.Array, y: chex.Array) -> chex.Array:
            if outputs.shape[:-1] != y.shape:
                raise ValueError(
                    f"logits of shape {outputs.shape} do not fit labels of shape {y.shape}: the "
                    "logits need one more axis, the classes, at the end."
                )
            return _mean_over_rest(optax.softmax_cross_entropy_with_integer_labels(outputs, y))

    elif loss == "mse":

        def per_example(outputs: chex.Array, y: chex.Array) -> chex.Array:
            if outputs.shape == (*y.shape, 1):
                outputs = outputs[..., 0]
            if outputs.shape != y.shape:
                raise ValueError(
                    f"outputs of shape {outputs.shape} do not fit targets of shape {y.shape}; JAX "
                    "would broadcast one against the other silently."
                )
            return _mean_over_rest(jnp.square(outputs - y))

    else:
        assert callable(loss)

        def per_example(outputs: chex.Array, y: chex.Array) -> chex.Array:
            losses = loss(outputs, y)
            if jnp.shape(losses) != y.shape[:1]:
                raise ValueError(
                    f"the loss function must return one loss per example, shape {y.shape[:1]}, got "
                    f"{jnp.shape(losses)}; leave the mean to the workload."
                )
            return losses

    return per_example


def _check_metrics(metrics: Mapping[str, Loss] | None) -> dict[str, Loss]:
    """The user's metrics by name."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise _checks.ArgumentTypeError(
            "metrics must be a dict of functions (outputs, y) -> values of shape (batch,) by name, "
            f"got {metrics!r}."
        )
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or not name or "/" in name or name == "loss":
            raise ValueError(
                f"metrics has the name {name!r}: give the part after the '/' alone, and not "
                "'loss', which is the loss itself."
            )
        if not callable(metric):
            raise _checks.ArgumentTypeError(
                f"metrics[{name!r}] must be a function (outputs, y) -> values, got {metric!r}."
            )
    return dict(metrics or {})


def _check_augment(augment: Augment, train: dict[str, np.ndarray], batch_size: int) -> None:
    """Raises unless an augmentation gives a batch of as many examples."""
    batch = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in train.items()}
    made = jax.eval_shape(augment, batch, jax.eval_shape(lambda: jax.random.key(0)))
    if not isinstance(made, dict) or set(made) != {"x", "y"}:
        raise ValueError(
            f"augment must return a batch {{'x': ..., 'y': ...}} as it was given, got {made!r}."
        )
    for name, leaf in made.items():
        if jnp.shape(leaf)[:1] != (batch_size,):
            raise ValueError(
                f"augment must leave the first axis, {batch_size} examples, as it is: {name} has "
                f"shape {jnp.shape(leaf)}."
            )


def _check_model(
    init: Callable[..., Any],
    apply: Callable[..., Any],
    splits: dict[str, dict[str, np.ndarray]],
    per_example: Callable[[chex.Array, chex.Array], chex.Array],
    loss: str | Loss,
    metrics: dict[str, Loss],
    eval_batch_size: int,
) -> bool:
    """Checks labels and indices against the model, without training anything.

    Returns:
      Whether outputs are logits of the classes y.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    small = {
        k: jax.ShapeDtypeStruct((2, *v.shape[1:]), v.dtype) for k, v in splits["train"].items()
    }

    def forward(key: chex.PRNGKey, x: chex.Array) -> chex.Array:
        outputs, _ = apply(*init(key), x, None, False)
        return outputs

    outputs = jax.eval_shape(forward, key, small["x"])
    if not hasattr(outputs, "shape"):
        return loss == "softmax"
    jax.eval_shape(per_example, outputs, small["y"])
    for name, metric in metrics.items():
        values = jax.eval_shape(metric, outputs, small["y"])
        if jnp.shape(values) != (2,):
            raise ValueError(
                f"metrics[{name!r}] must return one value per example, shape (2,) for a batch of "
                f"2, got {jnp.shape(values)}; leave the mean to the workload."
            )
    classify = loss == "softmax" or (callable(loss) and _are_logits(outputs, splits))
    for name, split in splits.items():
        if loss == "softmax":
            arrays.check_labels_below(name, split["y"], outputs.shape[-1])
        if np.issubdtype(split["x"].dtype, np.integer):
            arrays.check_indices(
                name,
                lambda x: forward(jax.random.key(0), x),
                split["x"],
                min(eval_batch_size, len(split["x"])),
            )
    return classify


def _are_logits(outputs: Any, splits: dict[str, dict[str, np.ndarray]]) -> bool:
    """Whether outputs have an axis of classes beyond those of y, all of which are such a class."""
    labels = [split["y"] for split in splits.values()]
    num_classes = outputs.shape[-1] if outputs.ndim == labels[0].ndim + 1 else 0
    return (
        num_classes > 1
        and outputs.shape[1:-1] == labels[0].shape[1:]
        and all(np.issubdtype(y.dtype, np.integer) for y in labels)
        and all(y.min() >= 0 and y.max() < num_classes for y in labels)
    )
