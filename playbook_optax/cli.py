"""The command line, ``playbook-optax sweep | tune | stabilize | ...``; extra ``cli``."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TextIO

import jax
import numpy as np
import optax

import playbook_optax
from playbook_optax import _checks, _portable, chapters, optimizers, report
from playbook_optax._text import (
    PARAGRAPH,
    UNBOUNDED,
    identifier,
    is_dotted_name,
    literal,
    numeral,
    printable,
)
from playbook_optax.analysis.axes import hyperparameters
from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.findings import Finding
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.procedures import tuned
from playbook_optax.procedures.learning_rate import sweep_learning_rate
from playbook_optax.procedures.stability import Stabilization, stabilize
from playbook_optax.procedures.tune import INDEX, Recipe, find_recipe
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records.schema import check_trainable, read_spec
from playbook_optax.records.storage import (
    SPEC_NAME,
    NoStudy,
    StorageError,
    read_file,
    stored_dtype,
    write_file,
)
from playbook_optax.records.study import NoFeasibleTrial, Study, load_study
from playbook_optax.runner.devices import use_compilation_cache, use_cpu_cores
from playbook_optax.runner.run import StudyRunner, run_study
from playbook_optax.runner.trainer import Trainer
from playbook_optax.search_space import Float, SearchSpace
from playbook_optax.trials.workload import Workload, WorkloadLike
from playbook_optax.tuning import (
    PROGRAM,
    recipe_headline,
    write_recipe_page,
    write_recipe_report,
)

PROG = "playbook-optax"
_COMMAND_FILE = "command.json"
_MAX_COMMAND_BYTES = 1 << 16
# What `run` believes of a study that anybody may have written: more than anybody trains, and few
# enough to be listed.
_MAX_RUNS, _MAX_VALUES = 10**6, 2**28
# A small study may be smaller than its blocks, whose width the machine or a person chose.
_MAX_IDLE = 1024
_NUM_SHOWN = 5
_WIDTH, _CELL = 88, 100

OptimizerName = Literal[
    "sgd", "momentum", "nesterov", "rmsprop", "adam", "nadam", "adamw", "nadamw"
]


class _Range(NamedTuple):
    """Where to search for an optimizer's hyperparameters when nothing better is known."""

    low: float
    high: float
    beta: str | None


_RANGES: dict[str, _Range] = {
    "sgd": _Range(1e-3, 10.0, None),
    "momentum": _Range(1e-4, 1.0, "momentum"),
    "nesterov": _Range(1e-4, 1.0, "momentum"),
    "rmsprop": _Range(1e-5, 1e-1, "momentum"),
    "adam": _Range(1e-5, 1e-1, "b1"),
    "nadam": _Range(1e-5, 1e-1, "b1"),
    "adamw": _Range(1e-5, 1e-1, "b1"),
    "nadamw": _Range(1e-5, 1e-1, "b1"),
}
_BETA_LOW, _BETA_HIGH = 0.5, 0.99
_LEARNING_RATE = "learning_rate"


class UsageError(Exception):
    """What the person at the terminal can put right; told in one line."""


class _Loaded(NamedTuple):
    """A workload with what it is tuned by unless options say otherwise."""

    workload: WorkloadLike
    optimizer: str
    space: SearchSpace | None
    num_trials: int
    num_steps: int


class _Judged(NamedTuple):
    """A study with what is said about it."""

    study: Study
    findings: Sequence[Finding]
    recipe: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """The options of every command that trains."""

    workload: str
    """A name of `playbook-optax zoo`, or your own as package.module:attribute, where the attribute
    is a Workload or a function that returns one."""
    num_trials: int | None = None
    """Trials; 24 to sweep, 32 to search."""
    num_steps: int | None = None
    """Optimizer updates of each trial; 400."""
    eval_every: int | None = None
    """Updates between evaluations; a twentieth of the steps."""
    optimizer: OptimizerName | None = None
    """The optimizer; momentum for the zoo, adam for your own."""
    low: float | None = None
    """Smallest learning rate."""
    high: float | None = None
    """Largest learning rate."""
    seed: int = 0
    """The only source of randomness."""
    directory: Path | None = None
    """Where to write; runs/WORKLOAD/COMMAND. A study that is there already is continued."""
    trials_per_block: int | Literal["timed"] | None = None
    """Trials that one program trains side by side; chosen by the machine and the model's size."""

    def folder(self, command: str) -> Path:
        """The directory to write to."""
        if self.directory is not None:
            return self.directory
        return _default_folder(self.workload, command)

    def space(self, loaded: _Loaded, optimizer: str) -> SearchSpace:
        """Learning rate on a log scale, and momentum (b1 of Adam) searched as 1 - momentum."""
        default = _RANGES[optimizer]
        known: Mapping[str, Any] = {}
        if loaded.space is not None and optimizer == loaded.optimizer:
            known = loaded.space
        elif default.beta is None:
            known = {_LEARNING_RATE: Float(default.low, default.high, scale="log")}
        else:
            known = {
                _LEARNING_RATE: Float(default.low, default.high, scale="log"),
                default.beta: Float(_BETA_LOW, _BETA_HIGH, scale="reverse_log"),
            }
        rate = known[_LEARNING_RATE]
        return SearchSpace({**known, _LEARNING_RATE: _narrowed(rate, self.low, self.high)})


def _default_folder(workload: str, command: str) -> Path:
    return Path("runs") / re.sub(r"[^\w.-]", "_", workload.replace(":", ".")) / command


def _narrowed(parameter: Any, low: float | None, high: float | None) -> Float:
    return Float(
        parameter.low if low is None else low,
        parameter.high if high is None else high,
        scale=parameter.scale,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(_Training):
    """Sweep the learning rate on a grid and name the best, if the sweep can be trusted."""

    def run(self) -> int:
        """Trains, diagnoses, writes and tells."""
        loaded, optimizer, seed = _prepare(self)
        rate = self.space(loaded, optimizer)[_LEARNING_RATE]
        space = SearchSpace({_LEARNING_RATE: rate})
        folder = self.folder("sweep")
        verdict = sweep_learning_rate(
            loaded.workload,
            functools.partial(_make_optimizer, optimizer),
            space,
            key=jax.random.key(seed),
            num_trials=24 if self.num_trials is None else self.num_trials,
            num_steps=loaded.num_steps if self.num_steps is None else self.num_steps,
            eval_every=self.eval_every,
            trials_per_block=self.trials_per_block,
            directory=folder,
        )
        study = verdict.studies["learning_rate_sweep"]
        _write_command(folder, "sweep", self.workload, optimizer, space)
        return _finish(_judged_sweep(study, verdict, optimizer), folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(_Training):
    """Search learning rate and 1 - momentum (1 - b1) quasi-randomly; say what to use, what next."""

    b1_low: float | None = None
    """Smallest momentum, which is b1 of Adam."""
    b1_high: float | None = None
    """Largest momentum, which is b1 of Adam; below 1."""
    prepare: bool = False
    """Store what is to be trained and stop, for `playbook-optax run` to train in many processes."""

    def space(self, loaded: _Loaded, optimizer: str) -> SearchSpace:
        """As for every command, with the range of the momentum as given."""
        space, beta = super().space(loaded, optimizer), _RANGES[optimizer].beta
        if self.b1_low is None and self.b1_high is None:
            return space
        if beta is None:
            raise UsageError(f"--b1-low and --b1-high do not apply: {optimizer} has no momentum.")
        return SearchSpace({**space, beta: _narrowed(space[beta], self.b1_low, self.b1_high)})

    def run(self) -> int:
        """Trains, diagnoses, writes and tells."""
        loaded, optimizer, seed = _prepare(self)
        space = self.space(loaded, optimizer)
        folder = self.folder("search")
        num_steps = loaded.num_steps if self.num_steps is None else self.num_steps
        num_steps = _checks.check_count("num_steps", num_steps)
        trainer = Trainer(
            loaded.workload,
            functools.partial(_make_optimizer, optimizer),
            trials_per_block=self.trials_per_block,
        )
        runner = StudyRunner(
            trainer,
            space,
            num_steps=num_steps,
            eval_every=max(1, num_steps // 20) if self.eval_every is None else self.eval_every,
            key=jax.random.key(seed),
        )
        num_trials = loaded.num_trials if self.num_trials is None else self.num_trials
        # Before the first step: `run` continues a study that was interrupted here.
        runner.prepare(space, num_trials=num_trials, directory=folder)
        _write_command(folder, "search", self.workload, optimizer, space)
        if self.prepare:
            own = "" if _is_zoo(self.workload) else f" --workload {_word(self.workload)}"
            _print_line(
                f"Prepared. Train it with: {PROG} run {_word(folder)}{own} --worker I --of N"
            )
            return 0
        study = runner.run(space, num_trials=num_trials, directory=folder)
        return _finish(_judged(study, optimizer), folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune:
    """Tune by the whole playbook: a budget goes in, a recipe and its evidence come out."""

    workload: str
    """A name of `playbook-optax zoo`, or your own as package.module:attribute, where the attribute
    is a Workload or a function that returns one."""
    num_trials: int | None = None
    """The budget, in trials of NUM_STEPS steps; twice what `search` trains, 64."""
    num_steps: int | None = None
    """Optimizer updates of the final run; 400."""
    optimizer: OptimizerName = "adam"
    """The optimizer."""
    low: float | None = None
    """Smallest learning rate; with --high, instead of a sweep."""
    high: float | None = None
    """Largest learning rate; with --low, instead of a sweep."""
    warmup_steps: int | None = None
    """Steps of warm-up, instead of what the chapter on instability says."""
    max_norm: float | None = None
    """Clip threshold, instead of what the chapter on instability says."""
    seed: int = 0
    """The only source of randomness."""
    directory: Path | None = None
    """Where to write; runs/WORKLOAD/tune. What is there already is continued."""
    trials_per_block: int | Literal["timed"] | None = None
    """Trials that one program trains side by side; chosen by the machine and the model's size."""
    test: bool = False
    """At the end, evaluate the recipe on the workload's test data. Decide first, then look."""

    def run(self) -> int:
        """Tunes, writes and tells."""
        loaded, optimizer, seed = _prepare(self)
        if (self.low is None) != (self.high is None):
            raise UsageError("give both --low and --high, or neither.")
        work = loaded.workload
        if self.test and isinstance(work, Workload) and work.evaluate_test is None:
            raise UsageError(f"{self.workload} has no test data, so --test has nothing to read.")
        overrides: dict[str, Any] = {}
        if self.low is not None:
            overrides["learning_rate_range"] = (self.low, self.high)
        for name in ("warmup_steps", "max_norm"):
            if getattr(self, name) is not None:
                overrides[name] = getattr(self, name)
        folder = self.directory or _default_folder(self.workload, "tune")
        recipe = find_recipe(
            loaded.workload,
            optimizer,
            num_trials=default_num_trials(loaded) if self.num_trials is None else self.num_trials,
            num_steps=loaded.num_steps if self.num_steps is None else self.num_steps,
            key=jax.random.key(seed),
            directory=folder,
            overrides=overrides,
            trials_per_block=self.trials_per_block,
        )
        tuned.store(recipe, folder, self.workload if _is_zoo(self.workload) else None)
        page = write_recipe_report(recipe, folder, self.workload)
        _tell_recipe(recipe)
        if recipe.point is None:
            _print_places(Report=page)
            return 0
        if self.test:
            _print_heading("Test data, read once")
            for name, value in recipe.final_evaluate().items():
                _print_paragraph(f"{name} = {report.shown_number(value)}", "- ")
        _print_places(Recipe=folder / PROGRAM, Report=page)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stabilize(_Training):
    """See an instability, name it, cure it: sweep, probe, warm-up, clipping, all remedies."""

    num_seeds: int = 1
    """Repetitions of each trial."""
    variants: tuple[str, ...] = ()
    """Other workloads to compare as remedies of architecture, such as digits_resmlp_pre."""

    def run(self) -> int:
        """Trains, compares, writes and tells."""
        loaded, optimizer, seed = _prepare(self)
        rate = self.space(loaded, optimizer)[_LEARNING_RATE]
        folder = self.folder("stabilize")
        verdict = stabilize(
            loaded.workload,
            functools.partial(_make_optimizer, optimizer),
            SearchSpace({_LEARNING_RATE: rate}),
            key=jax.random.key(seed),
            num_steps=loaded.num_steps if self.num_steps is None else self.num_steps,
            num_trials=12 if self.num_trials is None else self.num_trials,
            num_seeds=self.num_seeds,
            eval_every=self.eval_every,
            workloads={name: load_workload(name).workload for name in self.variants},
            trials_per_block=self.trials_per_block,
            directory=folder,
        )
        recipe = None
        if verdict.answer is not None:
            recipe = stabilized_source(verdict.answer, optimizer)
        page = chapters.write_stability_report(verdict, folder, self.workload, recipe)
        for sentence in chapters.stability_headline(verdict):
            _print_paragraph(sentence)
        if verdict.answer is not None and verdict.answer.comparison is not None:
            table = chapters.remedy_table(verdict.answer.comparison)
            _print_line()
            _print_table(table.header, table.rows)
        _print_findings(verdict.findings)
        _print_recipe(recipe)
        _print_places(Report=page)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Train a stored study on, as one of several processes that share its directory."""

    study: Path
    """The directory of the study: one that `search --prepare` made, or that was interrupted."""
    worker: int = 0
    """Which worker this is, from 0."""
    of: int = 1
    """How many workers there are; each makes this call, with its own number."""
    workload: str | None = None
    """Your workload, package.module:attribute; a name of the zoo is taken from the directory."""

    def run(self) -> int:
        """Trains until the study is whole, by whomever."""
        spec = read_spec(self.study)
        name, optimizer = _stored_command(self.study)
        if self.workload is None and not _is_zoo(name):
            # What a directory names may be anybody's: only the person at the terminal imports it.
            raise UsageError(
                f"the study is of your own workload {name!r}: say so with --workload {_word(name)}"
            )
        if self.workload not in (None, name):
            raise UsageError(f"the study is of {name!r}, not of {self.workload!r}.")
        try:
            check_trainable(spec)
            _check_size(spec)
            points, key = _points_and_key(spec)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"the study in {str(self.study)!r} is not trained on: {reason}") from (
                error
            )
        study = run_study(
            load_workload(name).workload,
            functools.partial(_make_optimizer, optimizer),
            points,
            num_trials=spec["num_trials"] if spec["space"] is not None else None,
            num_steps=spec["num_steps"],
            eval_every=spec["eval_every"],
            num_seeds=spec["num_seeds"],
            independent=spec["independent"],
            keep=spec["keep"],
            key=key,
            worker=(self.worker, self.of),
            directory=self.study,
        )
        _print_line(
            f"{study.num_trials} trials are stored. See them with: {PROG} report "
            f"{_word(self.study)}"
        )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a stored study or tuning again; nothing stored is executed."""

    study: Path
    """The directory of the study, or that `tune` wrote."""
    directory: Path | None = None
    """Where to write; the study's own directory."""

    def run(self) -> int:
        """Reads, writes and tells."""
        folder = self.directory or self.study
        if not _is_tuning(self.study):
            return _finish(_stored(self.study), folder)
        recipe, zoo_name = _stored_tuning(self.study)
        # The program beside it may say more of the workload than is known here: it is let be.
        source = None if recipe.point is None else recipe.to_python(zoo_name)
        page = write_recipe_page(recipe, report.check_folder(folder), source)
        _tell_recipe(recipe)
        _tell_rest(recipe)
        _print_places(Report=page)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say what a stored study shows, and write nothing."""

    study: Path
    """The directory of the study, or that `tune` wrote."""

    def run(self) -> int:
        """Reads and tells."""
        if not _is_tuning(self.study):
            _tell(_stored(self.study))
            return 0
        recipe, _ = _stored_tuning(self.study)
        _tell_recipe(recipe)
        _tell_rest(recipe)
        return 0


@dataclasses.dataclass(frozen=True)
class Zoo:
    """List the workloads that come with the package."""

    def run(self) -> int:
        """Lists."""
        from playbook_optax import zoo  # Importing flax takes a second.

        rows = []
        for name in zoo.names():
            entry = zoo.load(name)
            budget = f"{entry.num_trials} x {entry.num_steps}"
            rows.append([name, entry.summary, entry.optimizer, budget])
        _print_table(["name", "what it is", "optimizer", "trials x steps"], rows)
        return 0


def _make_optimizer(optimizer: str, point: Mapping[str, Any]) -> optax.GradientTransformation:
    transform: optax.GradientTransformation = getattr(optimizers, optimizer)(**point)
    return transform


def _prepare(options: _Training | Tune) -> tuple[_Loaded, str, int]:
    """What a command needs before it trains; whatever is missing is said now, not at the end."""
    _checks.require("jinja2", "report", "The report")
    _checks.require("matplotlib.pyplot", "plots", "Plotting")
    seed = _checks.check_count("seed", options.seed, at_least=0)
    loaded = load_workload(options.workload)
    return loaded, options.optimizer or loaded.optimizer, seed


def load_workload(name: str) -> _Loaded:
    """Finds a workload by what was typed.

    Args:
      name: a zoo name or ``package.module:attribute``; the current directory is searched first.

    Returns:
      The workload and its defaults.

    Raises:
      UsageError: there is no such name, module or attribute, or it is no workload.
    """
    if ":" not in name:
        from playbook_optax import zoo  # Importing flax takes a second.

        try:
            entry = zoo.load(name)
        except ValueError as error:
            raise UsageError(f"{error}; or give your own as package.module:attribute.") from None
        return _Loaded(
            entry.workload, entry.optimizer, entry.space, entry.num_trials, entry.num_steps
        )
    module_name, _, attribute = name.partition(":")
    value: Any = _import(module_name)
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            known = _workload_names(value)
            raise UsageError(
                f"module {module_name!r} has no {attribute!r}: {_checks.nearest(attribute, known)}"
            ) from None
    return _Loaded(_as_workload(name, value), "adam", None, 32, 400)


def default_num_trials(loaded: _Loaded) -> int:
    """The budget of `tune` in trials: searching in two rounds and retraining, twice one study."""
    return 2 * loaded.num_trials


def _import(name: str) -> ModuleType:
    if not is_dotted_name(name):
        raise UsageError(f"{name!r} is no module name; write package.module:attribute.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the user's own module fails to find is told with its traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        here = [module.name for module in pkgutil.iter_modules([os.getcwd()])]
        raise UsageError(
            f"there is no module {error.name!r} here or installed: "
            f"{_checks.nearest(error.name, here)}"
        ) from None


def _workload_names(module: Any) -> list[str]:
    """Names in a module that could be meant: workloads, and functions defined there."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, Workload)
        or (inspect.isfunction(value) and value.__module__ == getattr(module, "__name__", None))
    ]


def _as_workload(name: str, value: Any) -> WorkloadLike:
    """A Workload, what a function without arguments returns, or a function of the point."""
    if callable(value):
        parameters = inspect.signature(value).parameters.values()
        needed = [
            p
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if len(needed) == 1:
            function: Callable[[Any], Workload] = value
            return function
        if not needed:
            value = value()
    if not isinstance(value, Workload):
        raise UsageError(
            f"{name!r} is {type(value).__name__}; it must be a playbook_optax.Workload, a function "
            "without arguments that returns one, or a function of the point."
        )
    return value


def _write_command(
    folder: Path, command: str, workload: str, optimizer: str, space: SearchSpace
) -> None:
    """Keeps beside the study what its record does not hold and a later `report` shows."""
    kept = {"command": command, "workload": workload, "optimizer": optimizer}
    text = json.dumps({**kept, "space": space.to_dict()}, indent=1)
    write_file(folder / _COMMAND_FILE, text.encode())


def _is_zoo(name: str) -> bool:
    return ":" not in name


def _command_beside(folder: Path) -> dict[str, Any]:
    """What a command kept beside its study; nothing where that is missing or damaged."""
    try:
        command = json.loads(read_file(folder / _COMMAND_FILE, _MAX_COMMAND_BYTES))
    except (FileNotFoundError, NotADirectoryError, StorageError, ValueError, RecursionError):
        return {}
    return command if isinstance(command, dict) else {}


def _stored_command(folder: Path) -> tuple[str, str]:
    """The workload's name and the optimizer's that a command kept beside its study."""
    command = _command_beside(folder)
    if not {"workload", "optimizer"} <= set(command):
        raise UsageError(
            f"{folder / _COMMAND_FILE} is missing or damaged: only a study of `{PROG} search` "
            "can be trained on from its directory alone."
        )
    name, optimizer = command["workload"], command["optimizer"]
    known = isinstance(optimizer, str) and optimizer in _RANGES
    if not known or not isinstance(name, str) or not all(map(is_dotted_name, name.split(":"))):
        raise UsageError(f"{folder / _COMMAND_FILE} names no workload and optimizer of ours.")
    return name, optimizer


def _check_size(spec: Mapping[str, Any]) -> None:
    """Raises before memory is taken for a study of a size that nobody trains."""
    counts = {
        name: _checks.check_count(name, spec[name])
        for name in ("num_trials", "num_seeds", "num_steps", "eval_every", "trials_per_block")
    }
    trials, width = counts["num_trials"], counts["trials_per_block"]
    runs = trials * counts["num_seeds"]
    evals = 1 - -counts["num_steps"] // counts["eval_every"]
    if len(spec["step"]) != evals:
        raise ValueError(f"it has {len(spec['step'])} evaluations, where its steps make {evals}.")
    if width > max(_MAX_IDLE, 2 * trials):
        raise ValueError(
            f"trials_per_block = {width} is far more than its {trials} trials; call run_study with "
            "this directory= yourself."
        )
    if runs > _MAX_RUNS or max(runs, width) * evals > _MAX_VALUES:
        raise ValueError(
            f"it is too large, {trials} trials x {counts['num_seeds']} seeds x {evals} evaluations "
            f"in blocks of {width}; call run_study with this directory= yourself."
        )


def _points_and_key(spec: Mapping[str, Any]) -> tuple[Any, jax.Array]:
    """What `run_study` was given once."""
    key = _portable.receive_key(_portable.SentKey(**spec["key"]))
    if spec["space"] is not None:
        return SearchSpace.from_dict(spec["space"]), key
    dtypes = {name: stored_dtype(spec["dtypes"][name]) for name in spec["points"]}
    return {name: np.asarray(v, dtypes[name]) for name, v in spec["points"].items()}, key


def _judged(study: Study, optimizer: str | None) -> _Judged:
    return _Judged(study, diagnose(study), recipe_source(study, optimizer))


def _judged_sweep(study: Study, verdict: Verdict, optimizer: str | None) -> _Judged:
    """A sweep that refuses to answer gives no recipe."""
    recipe = None if verdict.answer is None else recipe_source(study, optimizer)
    return _Judged(study, verdict.findings, recipe)


def _stored(folder: Path) -> _Judged:
    """Judges a stored study by the rules of the command that made it; trusts nothing it reads."""
    study = load_study(folder)
    command = _command_beside(folder)
    try:
        name, optimizer = command["command"], command["optimizer"]
        space = SearchSpace.from_dict(command["space"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return _judged(study, None)
    if not (isinstance(optimizer, str) and optimizer in _RANGES):
        optimizer = None
    if name != "sweep" or list(space) != [_LEARNING_RATE] or set(study.points) != set(space):
        return _judged(study, optimizer)
    if not study.num_trials:
        return _judged(study, optimizer)
    # The points of a grid are stored as a table, the range they cover beside it.
    study = dataclasses.replace(study, spec={**study.spec, "space": space.to_dict()})
    verdict = sweep_learning_rate(_never, _never, study, key=jax.random.key(0))
    return _judged_sweep(study, verdict, optimizer)


def _is_tuning(folder: Path) -> bool:
    """Whether a directory is one that `tune` wrote, and no study of its own."""
    has = {name: os.path.lexists(folder / name) for name in (SPEC_NAME, INDEX, tuned.DOCUMENT)}
    return not has[SPEC_NAME] and (has[INDEX] or has[tuned.DOCUMENT])


def _stored_tuning(folder: Path) -> tuple[Recipe, str | None]:
    """What `tune` came to in a directory, and its workload's name if that is of the zoo."""
    try:
        recipe, name = tuned.read(folder)
    except NoStudy:
        # Of a study that it tells of, not of itself.
        if os.path.lexists(folder / tuned.DOCUMENT):
            raise
        parts = sorted(
            path.parent.relative_to(folder).as_posix() for path in folder.rglob(SPEC_NAME)
        )
        raise UsageError(
            f"{str(folder)!r} holds a tuning that is not finished: the same call of tune continues "
            f"it. Its studies can be looked at one by one: {', '.join(parts) or 'none yet'}."
        ) from None
    if name is None:
        return recipe, None
    from playbook_optax import zoo  # Importing flax takes a second.

    return recipe, name if name in zoo.names() else None


def _never(point: Any) -> Any:
    raise AssertionError("A finished study is judged, not trained.")


def recipe_source(study: Study, optimizer: str | None) -> str | None:
    """The best trial as Python source.

    Args:
      study: the study.
      optimizer: name of an optimizer of this package; None if it is not known.

    Returns:
      The source; None without an optimizer, a usable trial, or points that the optimizer takes.
    """
    if optimizer is None:
        return None
    try:
        best = study.best()
    except NoFeasibleTrial:
        return None
    taken = inspect.signature(getattr(optimizers, identifier(optimizer, _RANGES))).parameters
    try:
        arguments = ", ".join(
            f"{identifier(name, taken)}={numeral(best.point[name])}"
            for name in hyperparameters(study)
        )
    except ValueError:  # Other names, labels or infinities: the study is somebody else's.
        return None
    value = report.shown_number(best.value)
    return (
        "import playbook_optax as pbx\n\n"
        f"optimizer = pbx.{optimizer}({arguments})\n"
        f"num_steps = {literal(int(study.data['step'].values[-1]))}  "
        f"# {printable(best.objective)} was best, {value}, at step {best.step}: keep checkpoints"
    )


def stabilized_source(answer: Stabilization, optimizer: str) -> str | None:
    """The recommended remedy as Python source.

    Args:
      answer: the answer of `pbx.procedures.stabilize`.
      optimizer: name of the optimizer that was stabilized.

    Returns:
      The source; None where the recommendation is another workload, which is not an optimizer.
    """
    remedy = answer.recommended or ""
    if remedy.startswith("workload/"):
        return None
    if remedy.startswith("optimizer/"):
        optimizer = remedy.removeprefix("optimizer/")
    schedule = f"pbx.schedules.constant({_short(answer.learning_rate)})"
    if answer.warmup_steps:
        schedule = f"pbx.schedules.prepend_warmup({schedule}, {literal(answer.warmup_steps)})"
    clipper = None
    if remedy == "clipping_during_warmup":
        clipper = f"pbx.clip_until({_short(answer.max_norm)}, {literal(answer.warmup_steps)})"
    elif answer.max_norm is not None:
        clipper = f"pbx.clip_by_global_norm({_short(answer.max_norm)})"
    elif "adaptive" in remedy:
        clipper = "pbx.clip_by_percentile(90.0)"
    base = f"pbx.{identifier(optimizer, _RANGES)}(schedule)"
    if clipper is None:
        return f"import playbook_optax as pbx\n\nschedule = {schedule}\noptimizer = {base}"
    return (
        "import optax\nimport playbook_optax as pbx\n\n"
        f"schedule = {schedule}\noptimizer = optax.chain({clipper}, {base})"
    )


def _short(value: Any) -> str:
    """A number as source, to six digits."""
    return numeral(float(f"{value:.6g}"))


def _finish(judged: _Judged, folder: Path) -> int:
    """Writes the report and tells what it says."""
    page = report.write_report(judged.study, folder, findings=judged.findings, recipe=judged.recipe)
    _tell(judged)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    _print_places(Report=page, Plots=f"{', '.join(pictures) or 'none'}, beside it")
    return 0


def _tell(judged: _Judged) -> None:
    """The best trials, the findings and the recipe, on the terminal."""
    study, findings, recipe = judged
    for sentence in report.verdict(study, findings):
        _print_paragraph(sentence)
    if study.num_trials:
        out = outcomes(study)
        best = [int(trial) for trial in out.order[:_NUM_SHOWN]]
        if best:
            _print_line()
            _print_table(
                ["trial", *report.shown_point(study, best[0]), out.objective, "at step"],
                [
                    [
                        str(trial),
                        *report.shown_point(study, trial).values(),
                        report.shown_number(out.value[trial]),
                        str(int(out.best_step[trial])),
                    ]
                    for trial in best
                ],
            )
    _print_findings(findings)
    _print_recipe(recipe)


def _tell_recipe(recipe: Recipe) -> None:
    """What a tuning came to and what was decided on the way, on the terminal."""
    for sentence in recipe_headline(recipe):
        _print_paragraph(sentence)
    _print_heading("Decisions")
    for chapter in recipe.chapters:
        _print_paragraph(f"{chapter.name}: {chapter.decision.message}", "- ")


def _tell_rest(recipe: Recipe) -> None:
    """What else was seen, and the recipe in numbers."""
    decisions = [chapter.decision for chapter in recipe.chapters]
    _print_findings([finding for finding in recipe.findings if finding not in decisions])
    if recipe.point is None:
        return
    _print_heading("Recipe")
    numbers = {**recipe.point, "num_steps": recipe.num_steps}
    for name, value in numbers.items():
        _print_paragraph(f"{name} = {report.shown_number(value)}", "- ")


def _print_findings(findings: Sequence[Finding]) -> None:
    _print_heading("Findings")
    for finding in findings:
        _print_paragraph(f"{finding.severity}: {finding.message} {finding.suggestion}", "- ")


def _print_recipe(source: str | None) -> None:
    if source is None:
        return
    _print_heading("Recipe")
    for line in source.split("\n"):
        _print_line(f"  {line}".rstrip(), most=UNBOUNDED)


def _print_places(**places: Any) -> None:
    """Where to look, a line each."""
    _print_line()
    for name, place in places.items():
        _print_line(f"{name:<9}{place}")


def _print_heading(text: str) -> None:
    _print_line()
    _print_line(text)


def _print_line(text: str = "", file: TextIO | None = None, most: int = PARAGRAPH) -> None:
    """All that this program prints is printed here, as one line fit for a terminal."""
    print(printable(text, most), file=file)


def _word(text: Any) -> str:
    """Text as one word of a shell, for what is to be typed again."""
    return shlex.quote(printable(text, PARAGRAPH))


def _print_paragraph(text: str, bullet: str = "") -> None:
    lines = textwrap.wrap(
        printable(text.strip(), PARAGRAPH),
        _WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
    for line in lines:
        _print_line(line)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: by rich on a terminal, aligned columns otherwise."""
    header = [printable(cell, _CELL) for cell in header]
    rows = [[printable(cell, _CELL) for cell in row] for row in rows]
    if sys.stdout.isatty():
        try:
            rich_table = _checks.require("rich.table", "cli", "The table")
            rich_text = _checks.require("rich.text", "cli", "The table")
            rich_console = _checks.require("rich.console", "cli", "The table")
        except ImportError:
            pass
        else:
            table = rich_table.Table(*map(rich_text.Text, header), box=None, pad_edge=False)
            for row in rows:
                table.add_row(*map(rich_text.Text, row))
            rich_console.Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
        _print_line(line.rstrip(), most=UNBOUNDED)


_COMMANDS = {
    "sweep": Sweep,
    "tune": Tune,
    "search": Search,
    "stabilize": Stabilize,
    "run": Run,
    "report": Report,
    "diagnose": Diagnose,
    "zoo": Zoo,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say, on the devices that JAX has.

    Args:
      arguments: the words after the program's name; those of this process if None.

    Returns:
      The exit code: 0, or 2 for what the person at the terminal can put right, which is told in
      one line on standard error. Errors inside the user's workload are raised as they are.

    Raises:
      SystemExit: words that cannot be parsed (code 2), or ``--help`` (code 0).
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--version"]:
        _print_line(f"{PROG} {playbook_optax.__version__}")
        return 0
    try:
        if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
            raise UsageError(
                f"there is no command {words[0]!r}: {_checks.nearest(words[0], _COMMANDS)}"
            )
        tyro = _checks.require("tyro", "cli", "The command line")
        command = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog=PROG,
            description="The Deep Learning Tuning Playbook, on your workload.",
            args=words,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        code: int = command.run()
        return code
    except UsageError as error:
        return _complain(error)
    except (ValueError, TypeError, ImportError, StorageError) as error:
        if not _told_by_us(error):
            raise
        return _complain(error)


def _complain(error: Exception) -> int:
    _print_line(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line, as `warnings.showwarning`."""
    _print_line(f"{PROG}: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _told_by_us(error: Exception) -> bool:
    """Whether an error is this package's word on its input, with no code of the user's involved."""
    files, traceback = [], error.__traceback__
    while traceback is not None:
        files.append(Path(traceback.tb_frame.f_code.co_filename))
        traceback = traceback.tb_next
    ours = Path(__file__).resolve().parent
    installed = [
        Path(jax.__file__).resolve().parents[1],
        *(Path(sysconfig.get_path(p)) for p in ("stdlib", "purelib", "platlib")),
    ]
    resolved = [file.resolve() for file in files if not str(file).startswith("<")]
    theirs = [
        file
        for file in resolved
        if not any(file.is_relative_to(place) for place in (ours, *installed))
    ]
    return not theirs and resolved[-1].is_relative_to(ours)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program ``playbook-optax``: makes each CPU core a device, keeps programs, then `run`.

    Args:
      arguments: the words after the program's name; those of this process if None.

    Returns:
      The exit code.
    """
    warnings.showwarning = _warn
    use_cpu_cores()
    use_compilation_cache()
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does; what is left goes nowhere, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # What a shell says of a program that SIGPIPE ended.
    except KeyboardInterrupt:
        _print_line(f"{PROG}: interrupted; the same command continues the study.", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
