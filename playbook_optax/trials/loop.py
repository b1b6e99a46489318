"""Steps and evaluations in their order: the loop of one trial, and of trials side by side."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from playbook_optax.trials.stepper import Lengths, TrialState

# A loop whose length is data asks the host before each of its steps if it is on an accelerator;
# loops of this fixed length do not, and their steps past the end change nothing.
ACCELERATOR_CHUNK = 8


def steps_per_chunk() -> int:
    """Steps that are taken together, the last ones perhaps in vain."""
    return 1 if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


def advance(
    update: Callable[[TrialState, chex.Array, chex.Array | None], TrialState],
    record: Callable[[TrialState, chex.Array], TrialState],
    state: TrialState,
    lengths: Lengths,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    stops_when_dead: bool = False,
) -> TrialState:
    """Does the updates start, ..., stop - 1 and the evaluations among them.

    Trip counts are data, so that every segment is the same program and gives the same bits.

    Args:
      update: ``update(state, step, active)``, of one trial or of many; `active` says whether the
        step is part of the run, None that it is.
      record: ``record(state, index)``: evaluation number `index`.
      state: of one trial, or of many with a leading axis.
      lengths: how long the run is.
      start: the first update; 0 also evaluates before it.
      stop: the update before which to stop.
      stops_when_dead: whether to leave the rest out once no trial is live: nothing of it would be
        recorded. Under vmap it would cost more than it saves.

    Returns:
      The state after `stop` updates, or where the last trial broke.
    """
    start, stop = jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)
    num_steps, eval_every = (jnp.asarray(length, jnp.int32) for length in lengths)
    stop = jnp.minimum(stop, num_steps)
    length = steps_per_chunk()

    def is_live(state: TrialState) -> chex.Array:
        return jnp.any(state.infeasible_step < 0)

    def steps(first: chex.Array, target: chex.Array, state: TrialState) -> TrialState:
        """The updates first, ..., target - 1."""
        if length == 1:

            def unfinished(carry: tuple[chex.Array, TrialState]) -> chex.Array:
                step, state = carry
                more = step < target
                # Asked at each step only where the answer is at hand.
                single = stops_when_dead and state.infeasible_step.size == 1
                return more & is_live(state) if single else more

            def one(carry: tuple[chex.Array, TrialState]) -> tuple[chex.Array, TrialState]:
                step, state = carry
                return step + 1, update(state, step, None)

            return jax.lax.while_loop(unfinished, one, (first, state))[1]

        def chunk(number: chex.Array, state: TrialState) -> TrialState:
            begin = first + number * length

            def masked(offset: chex.Array, state: TrialState) -> TrialState:
                return update(state, begin + offset, begin + offset < target)

            return jax.lax.fori_loop(0, length, masked, state)

        return jax.lax.fori_loop(0, (target - first + length - 1) // length, chunk, state)

    def period(carry: tuple[Any, Any, TrialState]) -> tuple[Any, Any, TrialState]:
        step, fresh, state = carry
        done = step // eval_every
        until_next = eval_every - (step - done * eval_every)
        # Before the first update there is an evaluation and nothing else.
        target = step + jnp.where(fresh, 0, jnp.minimum(until_next, stop - step))
        state = steps(step, target, state)
        state = state._replace(step=jnp.full_like(state.step, target))
        due = fresh | (target - done * eval_every == eval_every) | (target == num_steps)
        index = jnp.where(fresh, 0, done + 1)
        state = jax.lax.cond(due, lambda s: record(s, index), lambda s: s, state)
        return target, jnp.asarray(False), state

    def unfinished(carry: tuple[Any, Any, TrialState]) -> chex.Array:
        step, fresh, state = carry
        more = fresh | (step < stop)
        return more & is_live(state) if stops_when_dead else more

    return jax.lax.while_loop(unfinished, period, (start, start == 0, state))[2]
