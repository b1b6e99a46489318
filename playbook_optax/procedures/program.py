"""A recipe as a program: a loop that anyone can read, with our transforms or with Optax alone.

Text of a workload, a space or a stored file stands in it as a literal of `_text.literal` or in a
comment; names are names of ours, or importable ones that a person gave or a module holds.
"""

import dataclasses
import os
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np

from playbook_optax import _checks, search_spaces
from playbook_optax._text import (
    UNBOUNDED,
    identifier,
    is_dotted_name,
    literal,
    numeral,
    printable,
)
from playbook_optax._ties import tie_breakers
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.procedures import in_optax
from playbook_optax.runner import identity
from playbook_optax.runner.plan import fingerprint_data
from playbook_optax.trials import keys
from playbook_optax.trials.workload import Workload, resolve, takes_key

if TYPE_CHECKING:
    from playbook_optax.procedures.tune import Pipeline, Recipe

OURS, OPTAX = "playbook_optax", "optax"
STYLES = (OURS, OPTAX)
# Importing the script that was started would run it again.
_MAIN = ("__main__", "__mp_main__")
_WIDTH = 99
# What the study of the answer may say that leaves none, and what any study may say of a choice.
_NO_ANSWER, _CHOICE = ("no_slope", "best_at_start"), "validation_cannot_separate"

_LOOP = """
key = jax.random.wrap_key_data(jnp.uint32({key}){impl})
data = jax.device_put(workload.data)
compared = {compared}
init, evaluate = jax.jit(workload.init), jax.jit(workload.evaluate)
gradient = jax.{grad}(workload.loss, has_aux=True)


@jax.jit
def update(state, key, step, {given}):
    params, model_state, opt_state = state
    {batch}
    loss_key = jax.random.fold_in(jax.random.fold_in(key, 2), step)
    {found} = gradient(params, model_state, batch, loss_key)
    updates, opt_state = optimizer.update(grads, opt_state, params{extra})
    return optax.apply_updates(params, updates), model_state, opt_state


def train(key):
    params, model_state = init(jax.random.fold_in(key, 0))
    state, best = (params, model_state, optimizer.init(params)), ([math.inf], 0, None)
{before}    for step in range(num_steps + 1):
        if step % eval_every == 0 or step == num_steps:
            metrics = evaluate(*state[:2], data{drawn})
            worth = [float(metrics[name]) for name in compared]
{sign}            if math.isfinite(worth[0]) and worth <= best[0]:
                best = (worth, step, state[:2])
        if step < num_steps:
            state = update(state, key, step, {passed})
    print(f"best {{workload.objective}} {{{minus}best[0][0]:.6g}} at step {{best[1]}}")
    return best


"""
_ONE_SEED = "_, _, best_params = train({trial_key})\n"
_SEEDS = """runs = [train({trial_key}) for seed in range(num_seeds)]
_, _, best_params = min(runs, key=lambda run: run[0])
values = [{minus}worth[0] for worth, _, _ in runs]
print(f"mean {{statistics.mean(values):.6g}}, standard deviation {{statistics.stdev(values):.6g}}")
"""


@dataclasses.dataclass(frozen=True)
class NotStored:
    """Stands for a function of a recipe that was read from a file.

    Attributes:
      name: what it is called.
    """

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises."""
        raise ValueError(
            f"{self.name} is code, which is not stored: a recipe from a file only tells."
        )


def program(
    recipe: "Recipe",
    point: dict[str, Any],
    workload: str | None,
    make_optimizer: str | None,
    style: str,
) -> str:
    """The source of a recipe; arguments as in `Recipe.to_python`.

    Args:
      recipe: the recipe.
      point: its hyperparameters.
      workload: where the workload is, or None to look for it.
      make_optimizer: where the user's function is, or None to look for it.
      style: one of `STYLES`.

    Returns:
      Python source.

    Raises:
      ValueError: an unknown style, a place that cannot be imported, or Optax has no equal of a
        piece.
    """
    _checks.check_choice("style", style, STYLES)
    _check_place("make_optimizer", make_optimizer)
    ours = style == OURS
    work = resolve(recipe.workload, point)
    if not ours:
        in_optax.check_dtypes(jax.eval_shape(work.init, jax.random.key(0))[0])
    several = len(recipe.values) > 1
    head = _Head()
    _workload(head, recipe, point, workload)
    body = _optimizer(head, recipe, point, make_optimizer, ours)
    names, numbers = ["num_steps", "eval_every"], [recipe.num_steps, recipe.eval_every]
    if several:
        names, numbers = [*names, "num_seeds"], [*numbers, len(recipe.values)]
    body += [f"{', '.join(names)} = {', '.join(map(numeral, numbers))}"]
    standard = ["import math", *(["import statistics"] if several else [])]
    imports = ["import jax", "import jax.numpy as jnp", "import optax"]
    kind = str(jax.random.key_impl(recipe.key))
    seed = "seed" if several else "0"
    sign = "-" if recipe.maximize else ""
    slots = {
        "key": literal(np.asarray(jax.random.key_data(recipe.key)).tolist()),
        # What most keys are needs no word.
        "impl": "" if kind == "threefry2x32" else f", impl={literal(kind)}",
        "compared": _compared(recipe),
        "sign": "            worth[0] = -worth[0]\n" if sign else "",
        "minus": sign,
        "trial_key": f"pbx.trial_key(key, {seed})"
        if ours
        else f"jax.random.fold_in(jax.random.fold_in(key, 0), {seed})",
        "drawn": f", jax.random.fold_in(key, {keys.EVALUATION_STREAM})"
        if takes_key(work.evaluate)
        else "",
        **_fed(work),
        **_differentiated(recipe),
    }
    parts = [
        _comments(recipe),
        head.standard_imports(standard),
        [*imports, *(["", "import playbook_optax as pbx"] if ours else [])],
        head.own_imports(),
        ["jax.config.update('jax_enable_x64', True)"] if jax.config.read("jax_enable_x64") else [],
        *head.stubs,
        [*head.assigned, *body],
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part)
    return text + (_LOOP + (_SEEDS if several else _ONE_SEED)).format(**slots)


def _fed(work: Workload) -> dict[str, str]:
    """How batches reach the program."""
    if work.batch is None:
        return {
            "given": "batch",
            "batch": "batch = jax.tree.map(jnp.asarray, batch)",
            "passed": "next(batches)",
            "before": "    batches = workload.host_batches(0)\n",
        }
    return {
        "given": "data",
        "batch": "batch = workload.batch(data, jax.random.fold_in(key, 1), step)",
        "passed": "data",
        "before": "",
    }


def _differentiated(recipe: "Recipe") -> dict[str, str]:
    """How the program takes gradients; an optimizer of the user's may ask for the loss as well."""
    if recipe.optimizer_name is not None:
        return {"grad": "grad", "found": "grads, (model_state, _)", "extra": ""}
    return {
        "grad": "value_and_grad",
        "found": "(value, (model_state, _)), grads",
        "extra": ", value=value, grad=grads",
    }


def _compared(recipe: "Recipe") -> str:
    """The metrics that checkpoints are compared by: the others decide between equals."""
    recorded = {str(name) for study in recipe.studies.values() for name in study.data}
    others = map(literal, tie_breakers(recipe.objective, recorded))
    return f"[{', '.join(['workload.objective', *others])}]"


def _comments(recipe: "Recipe") -> list[str]:
    """What stands above the program: what it reaches, and what there is against it."""
    spread = f" (standard deviation {recipe.spread:.3g})" if len(recipe.values) > 1 else ""
    limit = recipe.told_limit()
    found = against(recipe)
    word = "not tuned" if found and found[0].severity == "error" else "tuned"
    title = (
        f"# {printable(resolve(recipe.workload, recipe.point).name)}, {word}: "
        f"{printable(recipe.objective)} = {recipe.value:.4g}{spread}",
        f"# over {len(recipe.values)} seed(s), at the best checkpoint of each.",
    )
    said = [*([limit] if limit else []), *(f"{f.severity}: {f.message}" for f in found)]
    return [*title, *(line for text in said for line in _comment(text))]


def against(recipe: "Recipe") -> list[Finding]:
    """What there is against a recipe, the gravest first: errors and warnings about its answer.

    Args:
      recipe: the recipe.

    Returns:
      Its decisions of these severities; what the last chapter that trained something says of an
      answer that may be none; and the last that was said of trials that are equal to validation.
    """
    chapters = recipe.chapters
    last = max((i for i, c in enumerate(chapters) if c.verdict.studies), default=len(chapters) - 1)
    seen: dict[str, Finding] = {}
    for i, chapter in enumerate(chapters):
        codes = (_CHOICE, *_NO_ANSWER) if i == last else (_CHOICE,)
        seen |= {f.code: f for f in chapter.verdict.findings if f.code in codes}
    found = [*(chapter.decision for chapter in chapters), *seen.values()]
    return by_severity(finding for finding in found if finding.severity != "info")


def _comment(text: str) -> list[str]:
    """Text of any origin in lines of a comment."""
    shown = printable(text, UNBOUNDED)
    return textwrap.wrap(shown, _WIDTH, initial_indent="# ", subsequent_indent="# ")


class _Head:
    """What a program has to know before it begins, each once.

    Attributes:
      stubs: what the reader has to fill in, lines of each.
      assigned: lines that give names to what is imported.
    """

    def __init__(self) -> None:
        """Begins a program."""
        self._imports: dict[str, None] = {}
        self._folders: dict[str, None] = {}
        self.stubs: list[list[str]] = []
        self.assigned: list[str] = []

    def imported(self, where: str) -> str:
        """The name of a ``module:attribute`` in the program."""
        module, _, attribute = where.partition(":")
        self._imports[f"from {module} import {attribute.split('.')[0]}"] = None
        folder = _folder(module)
        if folder is not None:
            self._folders[folder] = None
        return attribute

    def zoo(self) -> None:
        """Imports the zoo."""
        self._imports["from playbook_optax import zoo"] = None

    def stub(self, name: str, reason: str, called: str = "") -> None:
        """Leaves two lines to the reader, without which the program says what it lacks.

        Args:
          name: what they are to define.
          reason: why nobody else can, in a sentence.
          called: what an attribute of a module is called with.
        """
        lines = [f"from your_module import your_{name}", f"{name} = your_{name}{called}"]
        shown = f"{name} = your_{name}{'(...)' if called else ''}"
        sentence = (
            f"This program does not know your {name}: fill in the two lines of it that are "
            f"'{lines[0]}' and '{shown}'."
        )
        pieces = textwrap.wrap(sentence, _WIDTH - 20, drop_whitespace=False)
        told = [*_comment(f"{reason} Fill in these two lines:"), *(f"# {line}" for line in lines)]
        told += [f"if {literal(name)} not in globals():", "    raise RuntimeError("]
        told += [f"        {literal(piece)}" for piece in pieces]
        self.stubs.append([*told, "    )"])

    def standard_imports(self, lines: list[str]) -> list[str]:
        """Imports of the standard library, with what finding the user's modules takes."""
        return [*lines, *(["import sys"] if self._folders else [])]

    def own_imports(self) -> list[str]:
        """Imports of what was tuned."""
        found = [f"sys.path.append({literal(folder)})" for folder in self._folders]
        return [*found, *self._imports]


def _folder(module: str) -> str | None:
    """Where Python finds a module that is not installed, unless any program finds it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(file, str):
        return None
    path = Path(os.path.abspath(file))
    depth = module.count(".") + (path.stem == "__init__")
    if len(path.parents) <= depth:
        return None
    root = path.parents[depth]
    installed = {Path(place).resolve() for place in sysconfig.get_paths().values()}
    searched = {Path(place or os.curdir).resolve() for place in sys.path}
    known = root.resolve() in searched - installed
    return str(root) if known else None


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


def _is_in_script(value: Any) -> bool:
    """Whether the script that was started, or the notebook, holds an object."""
    held = [vars(sys.modules[name]) for name in _MAIN if name in sys.modules]
    return any(value is other for names in held for other in list(names.values()))


def _reason(value: Any, name: str) -> str:
    """Why a program cannot import an object."""
    if _is_in_script(value):
        return (
            f"Your {name} is held by the script or notebook that tuned it, which would run again "
            "if it were imported; move it into a module of its own."
        )
    return f"No module holds your {name}."


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
    made = [identity.digest(w.init, w.loss, w.batch, w.evaluate) for w in (work, other)]
    same = made[0] is not None and made[0] == made[1]
    same = same and (work.objective, work.maximize) == (other.objective, other.maximize)
    return (
        work.name if same and fingerprint_data(work.data) == fingerprint_data(other.data) else None
    )


def _workload(head: _Head, recipe: "Recipe", point: dict[str, Any], where: str | None) -> None:
    """Makes the name ``workload``."""
    if where is None:
        where = _reference(recipe.workload) or _in_zoo(recipe)
    elif ":" in where:
        _check_place("workload", where)
    else:
        from playbook_optax import zoo

        _checks.check_choice("workload", where, zoo.names())
    of_point = not isinstance(recipe.workload, Workload)
    if where is None:
        called = f"({_point(point)})" if of_point else ""
        head.stub("workload", _reason(recipe.workload, "workload"), called)
    elif ":" not in where:
        head.zoo()
        head.assigned.append(f"workload = zoo.load({literal(where)}).workload")
    else:
        attribute = head.imported(where)
        called = f"({_point(point)})" if of_point else "" if _is_workload(where) else "()"
        if attribute != "workload" or called:
            head.assigned.append(f"workload = {attribute}{called}")


def _is_workload(where: str) -> bool:
    """Whether a name is the workload itself, not a function that makes it."""
    module, _, attribute = where.partition(":")
    held: Any = sys.modules.get(module)
    for part in attribute.split("."):
        held = getattr(held, part, None)
    return held is None or isinstance(held, Workload)


def _own(head: _Head, function: Any, where: str | None, name: str) -> str:
    """The name of a function of the user's in the program."""
    where = where or _reference(function)
    if where is not None:
        return head.imported(where)
    head.stub(name, _reason(function, name))
    return name


def _stored_schedule(pipeline: "Pipeline", steps: int, own: Callable[[int], str]) -> str:
    """A schedule of the user's that nobody can call here, as a call of their function."""
    since = pipeline.extended_from
    if since is None or steps <= since:
        made = own(steps)
    else:
        made = f"pbx.schedules.extend_for_longer_run({own(since)}, {numeral(steps - since)})"
    if not pipeline.warmup_steps:
        return made
    return f"pbx.schedules.prepend_warmup({made}, {numeral(pipeline.warmup_steps)})"


def _optimizer(
    head: _Head, recipe: "Recipe", point: dict[str, Any], where: str | None, ours: bool
) -> list[str]:
    """Lines for ``schedule`` and ``optimizer``."""
    from playbook_optax.procedures import tune

    lines, rest, pipeline = [], dict(point), recipe.pipeline
    rate = None
    if pipeline.make_schedule is not None:
        steps = recipe.num_steps - pipeline.warmup_steps

        def own(num_steps: int = steps) -> str:
            name = _own(head, pipeline.make_schedule, None, "make_schedule")
            with_factor = {tune.LEARNING_RATE: 1.0} if pipeline.learning_rates else {}
            return f"{name}({_point({**point, **with_factor})}, {numeral(num_steps)})"

        if isinstance(pipeline.make_schedule, NotStored):
            if not ours:
                raise in_optax.no_equal("a schedule of your own", "a stored recipe has no code")
            made = _stored_schedule(pipeline, steps, own)
        else:
            write = in_optax.our_schedule if ours else in_optax.optax_schedule
            made = write(pipeline.schedule(point, recipe.num_steps), own)
        lines.append(f"schedule = {made}")
        rate = "schedule"
        rest.pop(tune.LEARNING_RATE, None)
    said: list[str] = []
    if recipe.optimizer_name is None:
        scaled = pipeline.learning_rates
        items = _items({n: value for n, value in rest.items() if n not in scaled})
        items += [
            f"{literal(n)}: lambda count: {numeral(rest[n])} * schedule(count)" for n in scaled
        ]
        items += [f"'{tune.LEARNING_RATE}': {rate}"] if rate and not scaled else []
        name = _own(head, pipeline.users_optimizer, where, "make_optimizer")
        base = f"optax.with_extra_args_support({name}({{{', '.join(items)}}}))"
    else:
        # What else there is in a point is the workload's.
        name = identifier(recipe.optimizer_name, search_spaces.TABLE)
        defaults = tune.optimizer_arguments(name)
        given = {n: value for n, value in rest.items() if n in defaults}
        if ours:
            arguments = [f"{tune.LEARNING_RATE}={rate}"] if rate else []
            arguments += [f"{n}={numeral(value)}" for n, value in given.items()]
            base = f"pbx.{name}({', '.join(arguments)})"
        else:
            del defaults[tune.LEARNING_RATE]
            rate = rate or numeral(given.pop(tune.LEARNING_RATE))
            base, said = in_optax.optax_optimizer(name, rate, given, defaults)
    if pipeline.max_norm is not None:
        whose = "pbx" if ours else "optax"
        base = f"optax.chain({whose}.clip_by_global_norm({numeral(pipeline.max_norm)}), {base})"
    return [*lines, *(line for text in said for line in _comment(text)), f"optimizer = {base}"]
