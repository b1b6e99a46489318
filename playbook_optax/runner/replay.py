"""One trial of a study trained again, every step recorded: what `Study.replay` calls."""

import warnings
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax import _feasibility, _tree
from playbook_optax.records.study import Study
from playbook_optax.runner.execute import Engine, Unit
from playbook_optax.runner.plan import Block, Points
from playbook_optax.trials.stepper import TrialState

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
      row: place of the trial in its block.
      per_layer: whether to record each array of the parameters.
    """

    def __init__(self, engine: Engine, row: int, per_layer: bool) -> None:
        self._engine, self._per_layer = engine, per_layer
        self._look = jax.jit(self._observe)
        self._take = jax.jit(lambda states: jax.tree.map(lambda leaf: leaf[row], states))

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
        unit = engine.begin_block(block, points)
        key = engine.trial_key(block, trial)
        table = engine.columns.of_program(points.rows(np.array([trial])))
        point = {name: values[0] for name, values in table.items()}
        own = {"key": key, "point": jax.tree.map(jnp.asarray, point)}
        looks: list[Any] = []
        before = None
        for step in range(stop):
            chunk = next(feed)
            if chunk is None and step < start:
                if step == 0:
                    unit = engine.advance_block(unit, block, 0, start, None)
                continue
            if step == start:
                before = self._of_trial(unit, own)
            unit = engine.advance_block(unit, block, step, step + 1, chunk)
            if step >= start:
                after = self._of_trial(unit, own)
                looks.append(self._look(before, after, engine.data, jnp.int32(step), chunk))
                before = after
            if step % _LOOK_EVERY == 0 and self._broken_at(unit) >= 0:
                break
        state = self._of_trial(unit, own)
        return self._dataset(study, block, trial, start, stop, state, jax.device_get(looks))

    def _of_trial(self, unit: Unit, own: dict[str, Any]) -> TrialState:
        state: TrialState = self._take(unit.states)._replace(**own)
        return state

    def _broken_at(self, unit: Unit) -> int:
        return int(self._take(unit.states).infeasible_step)

    def _observe(
        self, before: Any, after: Any, data: Any, step: chex.Array, chunk: Any
    ) -> dict[str, chex.Array]:
        change = jax.tree.map(lambda new, old: new - old, after.params, before.params)
        applied = (after.infeasible_step < 0) | (after.infeasible_step > step)
        trees = {"param_norm": before.params}
        if self._per_layer:
            grads = self._engine.programs.stepper.gradient(before, data, step, chunk, step)[1]
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
        state: TrialState,
        looks: list[dict[str, np.ndarray]],
    ) -> "xarray.Dataset":
        import xarray

        broken = int(state.infeasible_step)
        # Looked at only now and then: the steps after the break are frozen ones.
        num = len(looks) if broken < 0 else max(0, min(len(looks), broken + 1 - start))
        final = jax.device_get(state._replace(key=None))
        result = self._engine.result(state)
        exact = _same(study, result.metrics, trial, block.seed, stop)
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
            "infeasible_reason": _feasibility.REASONS[
                int(result.infeasible_reason) if broken >= 0 else 0
            ],
            "bit_exact": exact,
        }
        return xarray.Dataset(variables, coords, attributes)


def _norms(tree: Any) -> chex.Array:
    """The norm of each array of a tree, shape (layer,)."""
    return jnp.stack([_tree.global_norm(leaf) for leaf in jax.tree.leaves(tree)])


def _same(study: Study, metrics: Any, trial: int, seed: int, stop: int) -> bool:
    """Whether all that was evaluated until `stop` has the bits that the study holds."""
    seen = np.asarray(study.data["step"].values) <= stop
    where = {"trial": trial, **({"seed": seed} if study.num_seeds > 1 else {})}
    return all(
        np.asarray(values)[seen].tobytes() == study.data[name].isel(where).values[seen].tobytes()
        for name, values in metrics.items()
    )
