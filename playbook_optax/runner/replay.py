"""One trial of a study trained again, every step recorded: what `Study.replay` calls."""

import warnings
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _feasibility, _tree
from playbook_optax.records.study import Study
from playbook_optax.runner.execute import Engine
from playbook_optax.runner.plan import Block, Points
from playbook_optax.trials import train
from playbook_optax.trials.workload import WorkloadLike

if TYPE_CHECKING:
    import xarray

# Steps between two looks at whether the trial broke; in between nothing waits for the device.
_LOOK_EVERY = 64


class Replayer:
    """Replays one run of a study.

    A program that also records would be another program, with other bits. So the study's own
    stepper does one step at a time, on the whole block of the trial, and a second program looks at
    the states before and after.

    Args:
      engine: trained the study.
      workload: what it trained.
      row: place of the trial in its block.
      per_layer: whether to record each array of the parameters.
    """

    def __init__(self, engine: Engine, workload: WorkloadLike, row: int, per_layer: bool) -> None:
        self._engine, self._workload, self._row = engine, workload, row
        self._per_layer = per_layer
        self._look = jax.jit(self._observe)

    def run(
        self,
        study: Study,
        block: Block,
        points: Points,
        trial: int,
        start: int,
        stop: int,
    ) -> "xarray.Dataset":
        """Trains to `stop` and records from `start` on.

        Args:
          study: the study, to compare with.
          block: the block of the trial, with its seed.
          points: where its points come from.
          trial: the trial's index.
          start: the first update to record.
          stop: the update before which to stop.

        Returns:
          What `Study.replay` documents.
        """
        engine = self._engine
        feed = engine.feed(stop)
        state = engine.init_block(block, points, next(feed))
        looks: list[Any] = []
        for step in range(stop):
            chunk = next(feed)
            if chunk is None and step < start:
                if step == 0:
                    state = engine.advance_block(state, 0, start, None)
                continue
            after = engine.advance_block(state, step, step + 1, chunk)
            if step >= start:
                looks.append(self._look(state, after, engine.data, jnp.int32(step), chunk))
            state = after
            if step % _LOOK_EVERY == 0 and self._broken_at(state) >= 0:
                break
        return self._dataset(study, block, trial, start, stop, state, jax.device_get(looks))

    def _of_trial(self, state: train.TrialState) -> train.TrialState:
        return train.TrialState(
            *(
                value if axis is None else jax.tree.map(lambda leaf: leaf[self._row], value)
                for value, axis in zip(state, self._engine.state_axes, strict=True)
            )
        )

    def _broken_at(self, state: train.TrialState) -> int:
        return int(state.infeasible_step[self._row])

    def _observe(
        self, before: Any, after: Any, data: Any, step: chex.Array, chunk: Any
    ) -> dict[str, chex.Array]:
        before, after = self._of_trial(before), self._of_trial(after)
        change = jax.tree.map(lambda new, old: new - old, after.params, before.params)
        applied = (after.infeasible_step < 0) | (after.infeasible_step > step)
        trees = {"param_norm": before.params}
        if self._per_layer:
            grads = train.gradient(self._workload, before, data, step, chunk, step)[1]
            trees["gradient_norm"] = grads
        seen = {
            "loss": after.last_loss,
            "gradient_norm": after.norms.last_norm,
            "update_norm": jnp.where(applied, _tree.global_norm(change), jnp.nan),
            "param_norm": _tree.global_norm(before.params),
        }
        if self._per_layer:
            layers = {name: _norms(tree) for name, tree in trees.items()}
            layers["update_norm"] = jnp.where(applied, _norms(change), jnp.nan)
            seen |= {f"layer_{name}": values for name, values in layers.items()}
        return seen

    def _dataset(
        self,
        study: Study,
        block: Block,
        trial: int,
        start: int,
        stop: int,
        state: train.TrialState,
        looks: list[dict[str, np.ndarray]],
    ) -> "xarray.Dataset":
        import xarray

        broken = self._broken_at(state)
        # Looked at only now and then: the steps after the break are frozen ones.
        num = len(looks) if broken < 0 else max(0, min(len(looks), broken + 1 - start))
        final = jax.device_get(self._of_trial(state))
        exact = _same(study, final, trial, block.seed, stop)
        if not exact:
            warnings.warn(
                "The replay is close to the study, not equal to it bit for bit: another JAX "
                "version, device or number of threads, or a workload that is not a pure function.",
                UserWarning,
                stacklevel=4,
            )
        looks = looks[:num]
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {"step": np.arange(start, start + num)}
        names = ("loss", "gradient_norm", "update_norm", "param_norm")
        for name in names:
            values = np.array([look[name] for look in looks])
            variables[name] = ("step", values.reshape(num))
        if self._per_layer:
            paths = jax.tree_util.tree_leaves_with_path(final.params)
            coords["layer"] = [_tree.path_name(path) for path, _ in paths]
            for name in names[1:]:
                values = np.array([look[f"layer_{name}"] for look in looks])
                variables[f"layer_{name}"] = (("step", "layer"), values.reshape(num, len(paths)))
        attributes = {
            "trial": trial,
            "seed": block.seed,
            "infeasible_step": broken,
            "infeasible_reason": _feasibility.REASONS[int(final.infeasible_reason)],
            "bit_exact": exact,
        }
        return xarray.Dataset(variables, coords, attributes)


def _norms(tree: Any) -> chex.Array:
    """The norm of each array of a tree, shape (layer,)."""
    return jnp.stack([_tree.global_norm(leaf) for leaf in jax.tree.leaves(tree)])


def _same(study: Study, final: train.TrialState, trial: int, seed: int, stop: int) -> bool:
    """Whether all that was evaluated until `stop` has the bits that the study holds."""
    seen = np.asarray(study.data["step"].values) <= stop
    where = {"trial": trial, **({"seed": seed} if study.num_seeds > 1 else {})}
    return all(
        np.asarray(values)[seen].tobytes() == study.data[name].isel(where).values[seen].tobytes()
        for name, values in final.metrics.items()
    )
