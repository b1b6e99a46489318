"""A recipe as a program: plain Optax and our transforms, and a loop that anyone can read.

Text of a workload, a space or a stored file stands in it as a literal of `_text.literal` or in a
comment; names are names of ours, or importable ones that a person gave or a module holds.
"""

import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from playbook_optax import _checks, search_spaces
from playbook_optax._text import identifier, is_dotted_name, literal, numeral, printable
from playbook_optax.runner.plan import fingerprint_data
from playbook_optax.trials.workload import Workload, resolve

if TYPE_CHECKING:
    from playbook_optax.procedures.tune import Recipe

# Nobody else can import from the script that was started.
_MAIN = ("__main__", "__mp_main__")

_TRAIN = """
key = pbx.trial_key(jax.random.wrap_key_data(jnp.uint32({key}){impl}))


@jax.jit
def update(params, model_state, opt_state, {given}, step):
    {batch}
    loss_key = jax.random.fold_in(jax.random.fold_in(key, 2), step)

    def loss(params):
        value, (new_state, _) = workload.loss(params, model_state, batch, loss_key)
        return value, new_state

    (value, new_state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(
        gradients, opt_state, params, value=value, grad=gradients
    )
    return optax.apply_updates(params, updates), new_state, opt_state


evaluate = jax.jit(workload.evaluate)
params, model_state = workload.init(jax.random.fold_in(key, 0))
opt_state = optimizer.init(params)
{before}best, best_params = None, None
for step in range(num_steps + 1):
    if step % eval_every == 0 or step == num_steps:
        value = float(evaluate(params, model_state, workload.data)[workload.objective])
        if math.isfinite(value) and (best is None or value {better} best[0]):
            best, best_params = (value, step), (params, model_state)
    if step < num_steps:
        params, model_state, opt_state = update(
            params, model_state, opt_state, {passed}, step
        )
print(f"best {{workload.objective}} {{best[0]:.6g}} at step {{best[1]}}")
"""


def program(
    recipe: "Recipe", point: dict[str, Any], workload: str | None, make_optimizer: str | None
) -> str:
    """The source of a recipe; arguments as in `Recipe.to_python`.

    Args:
      recipe: the recipe.
      point: its hyperparameters.
      workload: where the workload is, or None to look for it.
      make_optimizer: where the user's function is, or None to look for it.

    Returns:
      Python source.
    """
    imports = ["import math", "", "import jax", "import jax.numpy as jnp", "import optax", ""]
    imports += ["import playbook_optax as pbx"]
    lines, needed = _workload(recipe, point, workload)
    imports += needed
    schedule, optimizer, needed = _optimizer(recipe, point, make_optimizer)
    imports += needed
    key = np.asarray(jax.random.key_data(recipe.key)).tolist()
    kind = str(jax.random.key_impl(recipe.key))
    # What most keys are needs no word.
    impl = "" if kind == "threefry2x32" else f", impl={literal(kind)}"
    if resolve(recipe.workload, point).batch is None:
        fed = {
            "given": "batch",
            "batch": "batch = jax.tree.map(jnp.asarray, batch)",
            "passed": "next(batches)",
            "before": "batches = workload.host_batches(0)\n",
        }
    else:
        fed = {
            "given": "data",
            "batch": "batch = workload.batch(data, jax.random.fold_in(key, 1), step)",
            "passed": "workload.data",
            "before": "",
        }
    head = (
        f"# {_comment(recipe)}\n\n" + "\n".join(imports) + "\n\n" + "\n".join(lines) + "\n"
        f"{schedule}{optimizer}"
        f"num_steps, eval_every = {numeral(recipe.num_steps)}, {numeral(recipe.eval_every)}\n"
    )
    return head + _TRAIN.format(
        key=literal(key), impl=impl, better=">" if recipe.maximize else "<", **fed
    )


def _comment(recipe: "Recipe") -> str:
    """What stands above the program, in one line."""
    spread = f" (standard deviation {recipe.spread:.3g})" if len(recipe.values) > 1 else ""
    return (
        f"{printable(resolve(recipe.workload, recipe.point).name)}, tuned: "
        f"{printable(recipe.objective)} = {recipe.value:.4g}{spread} over {len(recipe.values)} "
        "seed(s), at the best checkpoint."
    )


def _items(point: dict[str, Any]) -> list[str]:
    return [f"{literal(name)}: {numeral(value)}" for name, value in point.items()]


def _point(point: dict[str, Any]) -> str:
    return "{" + ", ".join(_items(point)) + "}"


def _reference(value: Any) -> str | None:
    """``module:attribute`` of an object that an importable module holds."""
    name = getattr(value, "__qualname__", None)
    module = getattr(value, "__module__", None)
    if isinstance(name, str) and isinstance(module, str) and module not in _MAIN:
        held: Any = sys.modules.get(module)
        for part in name.split("."):
            held = getattr(held, part, None)
        if held is value and is_dotted_name(module) and is_dotted_name(name):
            return f"{module}:{name}"
    for module_name, loaded in list(sys.modules.items()):
        # A prompt keeps its last answer as `builtins._`, which another process lacks.
        if module_name in (*_MAIN, "builtins") or not _is_public(module_name):
            continue
        for attribute, held in list(getattr(loaded, "__dict__", {}).items()):
            if held is value and _is_public(attribute):
                return f"{module_name}:{attribute}"
    return None


def _is_public(text: str) -> bool:
    """Whether it is a dotted name that a program can import, none of it private."""
    return is_dotted_name(text) and not any(part[0] == "_" for part in text.split("."))


def _check_place(name: str, where: str | None) -> None:
    """Raises unless it is a ``module:attribute``: it becomes a line of the program."""
    if where is None:
        return
    parts = where.split(":") if isinstance(where, str) else []
    if len(parts) != 2 or not all(map(is_dotted_name, parts)):
        raise ValueError(
            f"{name} must be 'module:attribute', such as 'package.models:resnet', got {where!r}."
        )


def _in_zoo(recipe: "Recipe") -> str | None:
    """The workload's name in the zoo, if it is from there and not only called so."""
    from playbook_optax import zoo  # Importing flax takes a second.

    work = recipe.workload
    if not isinstance(work, Workload) or work.name not in zoo.names():
        return None
    try:
        other = zoo.load(work.name).workload
    except ImportError:
        return None
    key = jax.random.key(0)
    shapes = [str(jax.eval_shape(one.init, key)) for one in (work, other)]
    same = shapes[0] == shapes[1] and fingerprint_data(work.data) == fingerprint_data(other.data)
    return work.name if same else None


def _workload(
    recipe: "Recipe", point: dict[str, Any], where: str | None
) -> tuple[list[str], list[str]]:
    """Lines that make the name ``workload``, and the imports they need."""
    if where is None:
        where = _reference(recipe.workload) or _in_zoo(recipe)
    elif ":" in where:
        _check_place("workload", where)
    else:
        from playbook_optax import zoo

        _checks.check_choice("workload", where, zoo.names())
    if where is None:
        if isinstance(recipe.workload, Workload):
            return ["# The name `workload` is your Workload."], []
        return [f"# The name `workload` is your workload at {_point(point)}."], []
    if ":" not in where:
        return (
            [f"workload = zoo.load({literal(where)}).workload"],
            ["from playbook_optax import zoo"],
        )
    module, _, attribute = where.partition(":")
    first = attribute.split(".")[0]
    imports = [f"from {module} import {first}"]
    if isinstance(recipe.workload, Workload):
        same = attribute == "workload"
        called = "" if _is_workload(module, attribute) else "()"
        return ([] if same and not called else [f"workload = {attribute}{called}"]), imports
    return [f"workload = {attribute}({_point(point)})"], imports


def _is_workload(module: str, attribute: str) -> bool:
    """Whether a name is the workload itself, not a function that makes it."""
    held: Any = sys.modules.get(module)
    for part in attribute.split("."):
        held = getattr(held, part, None)
    return held is None or isinstance(held, Workload)


def _schedule(recipe: "Recipe", point: dict[str, Any], where: str | None) -> tuple[str, list[str]]:
    """An expression for the schedule, and the imports it needs; empty if there is none."""
    from playbook_optax.procedures import tune

    pipeline = recipe.pipeline
    if pipeline.make_schedule is None:
        return "", []
    steps = recipe.num_steps - pipeline.warmup_steps
    if pipeline.make_schedule is tune.cosine:
        rate = numeral(point[tune.LEARNING_RATE])
        imports: list[str] = []
        made = f"pbx.schedules.cosine_decay({rate}, {numeral(steps)})"
    else:
        name, imports = _imported(pipeline.make_schedule, where, "make_schedule")
        first = steps if pipeline.extended_from is None else min(pipeline.extended_from, steps)
        made = f"{name}({_point(point)}, {numeral(first)})"
        if first < steps:
            made = f"pbx.schedules.extend_for_longer_run({made}, {numeral(steps - first)})"
    if pipeline.warmup_steps:
        made = f"pbx.schedules.prepend_warmup({made}, {numeral(pipeline.warmup_steps)})"
    return made, imports


def _imported(function: Any, where: str | None, fallback: str) -> tuple[str, list[str]]:
    """The name of a function in the program, and the import that it needs."""
    _check_place(fallback, where)
    where = where or _reference(function)
    if where is None:
        return fallback, [f"# The name `{fallback}` is your own function."]
    module, _, attribute = where.partition(":")
    return attribute, [f"from {module} import {attribute.split('.')[0]}"]


def _optimizer(
    recipe: "Recipe", point: dict[str, Any], where: str | None
) -> tuple[str, str, list[str]]:
    """Lines for ``schedule`` and ``optimizer``, and the imports they need."""
    from playbook_optax.procedures import tune

    made, imports = _schedule(recipe, point, None)
    schedule = f"schedule = {made}\n" if made else ""
    rest = {name: value for name, value in point.items() if not made or name != "learning_rate"}
    if recipe.optimizer_name is not None:
        arguments = ["learning_rate=schedule"] if made else []
        # What else there is in a point is the workload's.
        name = identifier(recipe.optimizer_name, search_spaces.TABLE)
        taken = tune.optimizer_arguments(name)
        arguments += [
            f"{identifier(n, taken)}={numeral(value)}" for n, value in rest.items() if n in taken
        ]
        base = f"pbx.{name}({', '.join(arguments)})"
    else:
        name, more = _imported(recipe.pipeline.make_optimizer, where, "make_optimizer")
        imports = imports + [line for line in more if line not in imports]
        items = _items(rest)
        items += ["'learning_rate': schedule"] if made else []
        base = f"optax.with_extra_args_support({name}({{{', '.join(items)}}}))"
    if recipe.pipeline.max_norm is not None:
        clipper = f"pbx.clip_by_global_norm({numeral(recipe.pipeline.max_norm)})"
        base = f"optax.chain({clipper}, {base})"
    return schedule, f"optimizer = {base}\n", imports
