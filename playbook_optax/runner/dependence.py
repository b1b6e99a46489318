"""Which hyperparameters a traced program depends on, so that none is searched in vain."""

import difflib
import types
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax

from playbook_optax.runner import identity
from playbook_optax.runner.plan import Points
from playbook_optax.trials.workload import Workload


def used_inputs(jaxpr: Any, outputs: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs of a jaxpr some output depends on.

    Args:
      jaxpr: a jaxpr; inner ones of calls, loops and branches are looked into, and an operation that
        is none of these depends on all that it takes.
      outputs: which outputs count; all if None.

    Returns:
      One bool for each input.
    """
    counted = [True] * len(jaxpr.outvars) if outputs is None else outputs
    # A literal has a value and no identity.
    live = {
        var
        for var, counts in zip(jaxpr.outvars, counted, strict=True)
        if counts and not hasattr(var, "val")
    }
    for equation in reversed(jaxpr.eqns):
        used = [var in live for var in equation.outvars]
        if any(used) or equation.effects:
            taken = zip(equation.invars, _used_by(equation, used), strict=True)
            live.update(var for var, counts in taken if counts and not hasattr(var, "val"))
    return [var in live for var in jaxpr.invars]


def _used_by(equation: Any, outputs: list[bool]) -> list[bool]:
    """Which of an equation's inputs the outputs that are used depend on."""
    params, name = equation.params, equation.primitive.name
    if name == "while":
        in_cond, in_body = params["cond_nconsts"], params["body_nconsts"]
        # Whether it goes on decides every output.
        cond = used_inputs(_bare(params["cond_jaxpr"]))
        carry, consts = _loop(
            _bare(params["body_jaxpr"]), in_body, _either(outputs, cond[in_cond:]), len(outputs)
        )
        return [*cond[:in_cond], *consts, *carry]
    if name == "scan":
        first, num = params["num_consts"], params["num_carry"]
        carry, rest = _loop(_bare(params["jaxpr"]), first, outputs, num)
        return [*rest[:first], *carry, *rest[first:]]
    if name == "cond":
        ways = [used_inputs(_bare(branch), outputs) for branch in params["branches"]]
        return [True, *map(any, zip(*ways, strict=True))]
    for inner in ("jaxpr", "call_jaxpr"):
        body = _bare(params.get(inner))
        fits = hasattr(body, "eqns") and len(body.invars) == len(equation.invars)
        if fits and len(body.outvars) == len(outputs):
            return used_inputs(body, outputs)
    return [True] * len(equation.invars)


def _loop(
    body: Any, num_consts: int, outputs: Sequence[bool], num_carry: int
) -> tuple[list[bool], list[bool]]:
    """(of the carry, of the other inputs) which are used, in a loop repeated at will."""
    carry, others = list(outputs[:num_carry]), list(outputs[num_carry:])
    end = num_consts + num_carry
    while True:
        used = used_inputs(body, [*carry, *others])
        more = _either(carry, used[num_consts:end])
        if more == carry:
            return carry, [*used[:num_consts], *used[end:]]
        carry = more


def _either(one: Sequence[bool], other: Sequence[bool]) -> list[bool]:
    return [a or b for a, b in zip(one, other, strict=True)]


def _bare(jaxpr: Any) -> Any:
    """A jaxpr without the constants that it may be closed over."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def unused_names(traced: Any, arguments: Sequence[Any], names: Iterable[str]) -> frozenset[str]:
    """Hyperparameters that a traced program does not depend on.

    Args:
      traced: a ``jax.stages.Traced`` that leaves no argument out.
      arguments: what it was traced with; hyperparameters stand in a dict ``"points"`` by name.
      names: of the hyperparameters.

    Returns:
      Those whose value reaches no output.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(arguments)]
    used = used_inputs(traced.jaxpr.jaxpr)
    reached = {
        path[-1].key
        for path, counts in zip(paths, used, strict=True)
        if counts and "points" in [getattr(entry, "key", None) for entry in path[:-1]]
    }
    return frozenset(names) - reached


def check(
    unused: Collection[str], points: Points, names: Collection[str], functions: tuple[Any, ...]
) -> None:
    """Raises where a study searches what its program does not depend on.

    Args:
      unused: names that the program does not depend on.
      points: of the study.
      names: its hyperparameters, but those that a procedure calls otherwise in the program.
      functions: the user's: workload, make_optimizer, make_schedule.

    Raises:
      ValueError: one of a search space is not used; names it, and the nearest name that the
        functions look up. Of a table, which may carry columns for other ends, a column whose values
        differ is warned of.
    """
    for name in names:
        if name not in unused:
            continue
        table = points.table
        if table is not None and (table[name] == table[name][0]).all():
            continue
        words = set(_words(functions)) - set(names)
        close = difflib.get_close_matches(name, sorted(words), n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]!r}, which stands in your functions?" if close else ""
        used = ", ".join(map(repr, (one for one in names if one not in unused))) or "none"
        told = (
            f"nothing depends on the hyperparameter {name!r}: neither the workload nor the "
            f"optimizer nor the schedule uses its value, and it is searched in vain.{hint} "
            f"Used are: {used}. Correct the name, use it, or leave it out."
        )
        if table is None:
            raise ValueError(told)
        warnings.warn(told, UserWarning, stacklevel=4)


def _words(functions: tuple[Any, ...]) -> Iterator[str]:
    """The texts that functions of the point may look up by."""
    try:
        of_point = [one for one in functions if not isinstance(one, Workload)]
        parts: list[Any] = [identity.identity(of_point)]
    except identity.NoIdentity:
        return
    while parts:
        part = parts.pop()
        if isinstance(part, (tuple, frozenset)):
            parts += part
        elif isinstance(part, types.CodeType):
            yield from (one for one in part.co_consts if isinstance(one, str))
            parts += [one for one in part.co_consts if isinstance(one, types.CodeType)]
