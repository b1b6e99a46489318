"""What a call of `tune` came to, as a document beside its studies, for whoever looks later.

It holds numbers and text only: decisions, findings, the recipe's point, and which studies they rest
on. Functions are not stored, so that what is read back trains nothing.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from playbook_optax import _checks, _portable, search_spaces
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import stability, tune
from playbook_optax.procedures.clipping import LEARNING_RATE
from playbook_optax.procedures.program import NotStored
from playbook_optax.procedures.remedies import RemedyComparison
from playbook_optax.procedures.stability import Stabilization
from playbook_optax.procedures.tune import Chapter, Pipeline, Recipe
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.procedures.warmup import WarmupAnswer
from playbook_optax.records import schema, storage
from playbook_optax.records.study import Study, load_study
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import keys
from playbook_optax.trials.workload import Workload, resolve

DOCUMENT = "recipe.json"
_MAX_STUDIES, _MAX_PARTS = 64, 8
_PART = re.compile(r"[\w-][\w.-]*", re.ASCII)
# What each step of the chapter on instability answers.
_STEP_ANSWERS: dict[str, Any] = {
    stability.SWEEP: float | None,
    stability.LIMIT: float | None,
    stability.PROBE: bool | None,
    stability.WARMUP: WarmupAnswer | None,
    stability.CLIPPING: float | None,
    stability.REMEDIES: RemedyComparison | None,
}
_NUMBER = int | float


class _Stored(typing.NamedTuple):
    """The fields of the document, and what each holds."""

    name: str
    zoo: str | None
    from_host: bool
    optimizer: str | None
    schedule: str | None
    point: dict[str, _NUMBER] | None
    num_steps: int
    eval_every: int
    objective: str
    maximize: bool
    values: tuple[float, ...]
    total_budget: int
    pipeline: dict[str, Any]
    key: dict[str, Any]
    chapters: tuple[dict[str, Any], ...]


class _StoredChapter(typing.NamedTuple):
    """One chapter."""

    name: str
    decision: dict[str, Any]
    findings: tuple[dict[str, Any], ...]
    cost: int
    studies: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...] | None
    answer: dict[str, Any] | None


class _StoredStudy(typing.NamedTuple):
    """A study of a chapter."""

    name: str
    folder: str
    identity: str
    space: dict[str, Any] | None


class _StoredStep(typing.NamedTuple):
    """A step of the chapter on instability."""

    name: str
    findings: tuple[dict[str, Any], ...]
    cost: int
    studies: tuple[str, ...]
    answer: Any


class _StoredFinding(typing.NamedTuple):
    """A Finding."""

    code: str
    severity: str
    message: str
    evidence: dict[str, Any]
    section: str
    suggestion: str


class _StoredAnswer(typing.NamedTuple):
    """What the chapter on instability comes to, beside its steps."""

    recommended: str | None
    learning_rate: float
    warmup_steps: int
    max_norm: float | None
    best_value: float
    baseline_value: float


# Writing ----------------------------------------------------------------------------------------


def store(recipe: Recipe, directory: str | os.PathLike[str], zoo: str | None = None) -> Path:
    """Stores what a recipe rests on as ``recipe.json``, whole or not at all.

    Args:
      recipe: what `tune` returned, with its studies in `directory`.
      directory: that of the tuning.
      zoo: the workload's name in the zoo, if it is from there.

    Returns:
      The path of the document.

    Raises:
      NotWritable: the system refused.
    """
    folder = storage.root(directory)
    pipeline = recipe.pipeline
    schedule = pipeline.make_schedule
    point = recipe.point
    work = recipe.workload if point is None else resolve(recipe.workload, point)
    stored = _Stored(
        name=getattr(work, "name", "workload"),
        zoo=zoo,
        from_host=getattr(work, "host_batches", None) is not None,
        optimizer=recipe.optimizer_name,
        schedule=None if schedule is None else _SCHEDULES.get(schedule, "own"),
        point=point,
        num_steps=recipe.num_steps,
        eval_every=recipe.eval_every,
        objective=recipe.objective,
        maximize=recipe.maximize,
        values=tuple(recipe.values.tolist()),
        total_budget=recipe.total_budget,
        pipeline={name: getattr(pipeline, name) for name in _pipeline_hints()},
        key=keys.describe_key(recipe.key),
        chapters=tuple(_chapter(chapter, folder) for chapter in recipe.chapters),
    )
    path = folder / DOCUMENT
    storage.write_document(path, stored._asdict())
    return path


def _pipeline_hints() -> dict[str, Any]:
    """What of a pipeline is data, name to what it holds."""
    hints = typing.get_type_hints(Pipeline)
    return {name: hint for name, hint in hints.items() if name not in tune.FUNCTIONS}


_SCHEDULES: dict[Any, str] = {tune.cosine: "cosine"}


def _chapter(chapter: Chapter, folder: Path) -> dict[str, Any]:
    verdict, steps, answer = chapter.verdict, None, None
    if isinstance(verdict.answer, Stabilization):
        made = verdict.answer
        answer = {name: getattr(made, name) for name in _StoredAnswer._fields}
        steps = tuple(
            _StoredStep(
                name,
                _findings(step.findings),
                step.cost,
                tuple(step.studies),
                _plain(step.answer),
            )._asdict()
            for name, step in made.steps.items()
        )
    studies = [_study(name, study, folder) for name, study in verdict.studies.items()]
    return _StoredChapter(
        name=chapter.name,
        decision=chapter.decision.to_dict(),
        findings=_findings(verdict.findings),
        cost=verdict.cost,
        studies=tuple(studies),
        steps=steps,
        answer=answer,
    )._asdict()


def _findings(findings: tuple[Finding, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(finding.to_dict() for finding in findings)


def _plain(value: Any) -> Any:
    """A named tuple as a dict, and so on inside it."""
    if hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _study(name: str, study: Study, folder: Path) -> dict[str, Any]:
    assert study.directory is not None
    place = Path(os.path.relpath(storage.root(study.directory), folder)).as_posix()
    identity = storage.study_identity(storage.read_spec(study.directory))
    return _StoredStudy(name, place, identity, study.spec.get("space"))._asdict()


# Reading ----------------------------------------------------------------------------------------


def read(directory: str | os.PathLike[str]) -> tuple[Recipe, str | None]:
    """Reads back what `write` stored, with its studies; trusts nothing it reads.

    Args:
      directory: that of the tuning.

    Returns:
      The recipe, without weights and with functions that only say what they are not; and the
      workload's name in the zoo, if it is from there.

    Raises:
      NoStudy: nothing is stored.
      StorageError: the document or a study is damaged, or they do not belong together.
    """
    folder = storage.root(directory)
    path = folder / DOCUMENT
    document = storage.read_document(path)
    document.pop("schema_version", None)
    try:
        return _recipe(document, folder)
    except (ValueError, OverflowError) as error:
        raise storage.CorruptSpec(
            f"{str(path)!r} does not describe a tuning: {str(error).rstrip('.')}. The same call of "
            "tune writes it anew, and trains nothing again."
        ) from error


def _recipe(document: Mapping[str, Any], folder: Path) -> tuple[Recipe, str | None]:
    stored: _Stored = _typed(_Stored, document, "it")
    for name in ("num_steps", "eval_every", "total_budget"):
        _checks.check_count(name, getattr(stored, name))
    if stored.optimizer is not None:
        _checks.check_choice("optimizer", stored.optimizer, search_spaces.TABLE)
    if stored.schedule is not None:
        _checks.check_choice("schedule", stored.schedule, [*_SCHEDULES.values(), "own"])
    # A study that several chapters rest on is one study, and is drawn once.
    studies: dict[str, Study] = {}
    chapters = tuple(
        _read_chapter(_typed(_StoredChapter, one, f"chapters[{i}]"), folder, studies)
        for i, one in enumerate(stored.chapters)
    )
    names = [chapter.name for chapter in chapters]
    if not names or names != [name for name in tune.CHAPTERS if name in names]:
        raise ValueError(f"its chapters are {names}")
    recipe = Recipe(
        workload=_workload(stored),
        pipeline=_read_pipeline(stored),
        optimizer_name=stored.optimizer,
        point=stored.point,
        num_steps=stored.num_steps,
        eval_every=stored.eval_every,
        objective=stored.objective,
        maximize=stored.maximize,
        values=np.asarray(stored.values, np.float64),
        chapters=chapters,
        total_budget=stored.total_budget,
        params=None,
        model_state=None,
        key=_read_key(stored.key),
    )
    _check_point(recipe)
    return recipe, stored.zoo


def _read_pipeline(stored: _Stored) -> Pipeline:
    hints = _pipeline_hints()
    if set(stored.pipeline) != set(hints):
        raise ValueError(f"its pipeline has not the fields {', '.join(hints)}")
    told = {n: _typed(hint, stored.pipeline[n], f"it, {n}") for n, hint in hints.items()}
    _checks.check_count("warmup_steps", told["warmup_steps"], at_least=0)
    if told["max_norm"] is not None:
        _checks.check_number("max_norm", told["max_norm"], above=0.0)
    if told["extended_from"] is not None:
        _checks.check_count("extended_from", told["extended_from"])
    scheduled = told.get("learning_rates") or (LEARNING_RATE,)
    if stored.schedule is not None and stored.point is not None:
        for name in scheduled:
            if name not in stored.point:
                raise ValueError(f"it has a schedule, and its point lacks {name!r}")
    return Pipeline(NotStored("make_optimizer"), _read_schedule(stored.schedule), **told)


def _check_point(recipe: Recipe) -> None:
    """Raises unless the recipe is a trial of one of its studies."""
    point = recipe.point
    if point is None:
        return
    if not len(recipe.values):
        raise ValueError("it has a point and no value")
    numbers = {name: float(value) for name, value in point.items()}
    for study in recipe.studies.values():
        searched, fixed = study.points, study.spec.get("fixed", {})
        held = all(
            n in fixed and np.float32(fixed[n]) == np.float32(v)
            for n, v in numbers.items()
            if n not in searched
        )
        if set(searched) <= set(point) and held and study.objective == recipe.objective:
            same = [values.astype(np.float64) == numbers[n] for n, values in searched.items()]
            for trial in np.flatnonzero(np.all(same, axis=0)):
                curves = study.data[study.objective].values[trial].astype(np.float64)
                if np.isin(recipe.values, curves).all():
                    return
    raise ValueError("its point and its values are none of a trial of its studies")


def _read_chapter(stored: _StoredChapter, folder: Path, known: dict[str, Study]) -> Chapter:
    _checks.check_choice("a chapter", stored.name, tune.CHAPTERS)
    _checks.check_count("a cost", stored.cost, at_least=0)
    if len(stored.studies) > _MAX_STUDIES:
        raise ValueError(f"it has more than {_MAX_STUDIES} studies in a chapter")
    studies = {}
    for one in stored.studies:
        told: _StoredStudy = _typed(_StoredStudy, one, "a study")
        which = repr(told._replace(name=""))
        if which not in known:
            known[which] = _read_study(told, folder)
        studies[told.name] = known[which]
    answer = None
    if stored.answer is not None:
        if stored.name != tune.STABILITY or stored.steps is None:
            raise ValueError(f"the chapter {stored.name!r} has an answer")
        answer = _read_stability(stored, studies)
    verdict = Verdict(answer, _read_findings(stored.findings), studies, stored.cost)
    return Chapter(stored.name, _read_finding(stored.decision), verdict)


def _read_study(told: _StoredStudy, folder: Path) -> Study:
    parts = told.folder.split("/")
    if len(parts) > _MAX_PARTS or not all(map(_PART.fullmatch, parts)):
        raise ValueError(f"the folder {told.folder!r} is none inside it")
    place = folder.joinpath(*parts)
    study = load_study(place)
    if storage.study_identity(storage.read_spec(place)) != told.identity:
        raise ValueError(f"the study in {told.folder!r} is not the one that it tells of")
    if told.space is None:
        return study
    space = SearchSpace.from_dict(told.space)
    if set(space) != set(study.points):
        raise ValueError(f"the space of the study in {told.folder!r} has other names than it")
    spec = {**study.spec, "space": space.to_dict()}
    schema.check_values(spec, {f"point/{name}": values for name, values in study.points.items()})
    return dataclasses.replace(study, spec=spec)


def _read_stability(stored: _StoredChapter, studies: Mapping[str, Study]) -> Stabilization:
    steps: dict[str, Verdict] = {}
    for one in stored.steps or ():
        told: _StoredStep = _typed(_StoredStep, one, "a step")
        _checks.check_choice("a step", told.name, _STEP_ANSWERS)
        own = {}
        for name in told.studies:
            if f"{told.name}/{name}" not in studies:
                raise ValueError(f"the step {told.name!r} lacks its study {name!r}")
            own[name] = studies[f"{told.name}/{name}"]
        answer = _typed(_STEP_ANSWERS[told.name], told.answer, f"the answer of {told.name!r}")
        verdict = Verdict(answer, _read_findings(told.findings), own, told.cost)
        _check_step(told.name, verdict)
        steps[told.name] = verdict
    if list(steps) != [name for name in _STEP_ANSWERS if name in steps]:
        raise ValueError(f"the steps of {stored.name!r} are {list(steps)}")
    made: _StoredAnswer = _typed(_StoredAnswer, stored.answer, "the answer")
    last = steps.get(stability.REMEDIES)
    comparison = None if last is None else last.answer
    return Stabilization(**made._asdict(), comparison=comparison, steps=steps)


def _check_step(name: str, verdict: Verdict) -> None:
    """Raises where a step refers to a study or a trial that is not there."""
    studies = verdict.studies
    if name in (stability.SWEEP, stability.REMEDIES):
        for study in studies.values():
            if LEARNING_RATE not in study.points:
                raise ValueError(f"a study of the step {name!r} has no {LEARNING_RATE!r}")
    if name == stability.SWEEP and len(studies) != 1:
        raise ValueError("the sweep has not one study")
    of_norms = [study.num_trials for own, study in studies.items() if own != "clip_thresholds"]
    for finding in verdict.findings:
        trial = finding.evidence.get("norms_of_trial", 0)
        if of_norms and not (type(trial) is int and 0 <= trial < of_norms[0]):
            raise ValueError(f"a finding tells of the trial {trial!r}")
    if name != stability.REMEDIES:
        return
    if verdict.answer is None:
        raise ValueError("the comparison of remedies is missing")
    comparison: RemedyComparison = verdict.answer
    rows = comparison.rows
    for row in rows:
        if row.study not in verdict.studies:
            raise ValueError(f"the remedy {row.remedy!r} lacks its study {row.study!r}")
        if not -1 <= row.best_trial < verdict.studies[row.study].num_trials:
            raise ValueError(f"the remedy {row.remedy!r} has the best trial {row.best_trial}")
        if not len(row.learning_rates) == len(row.values) == len(row.unstable) > 0:
            raise ValueError(f"the sweep of the remedy {row.remedy!r} has columns of two lengths")
    comparison.row("none")
    if comparison.recommended is not None:
        chosen = comparison.row(comparison.recommended)
        if chosen.best_trial < 0 or not chosen.best_learning_rate > 0:
            raise ValueError(f"the remedy {chosen.remedy!r} is recommended without a trial")


def _read_findings(stored: tuple[dict[str, Any], ...]) -> tuple[Finding, ...]:
    return tuple(_read_finding(one) for one in stored)


def _read_finding(stored: Mapping[str, Any]) -> Finding:
    told: _StoredFinding = _typed(_StoredFinding, stored, "a finding")
    return Finding(**told._asdict())


def _read_key(stored: Mapping[str, Any]) -> Any:
    try:
        data = np.asarray(stored["data"], np.uint32)
        return _portable.receive_key(_portable.SentKey(stored["impl"], data))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"its key is none: {error}") from error


def _read_schedule(stored: str | None) -> Callable[..., Any] | None:
    if stored is None:
        return None
    ours = {name: schedule for schedule, name in _SCHEDULES.items()}
    return ours.get(stored) or NotStored("make_schedule")


def _workload(stored: _Stored) -> Workload:
    """What stands for the workload: its name, and what is compared."""
    fed: dict[str, Any] = {"batch": NotStored("batch")}
    if stored.from_host:
        fed = {"batch": None, "host_batches": NotStored("host_batches"), "version": "stored"}
    return Workload(
        name=stored.name,
        # Of no parameters: the workload of no zoo.
        init=lambda key: ({}, {}),
        loss=NotStored("loss"),
        evaluate=NotStored("evaluate"),
        objective=stored.objective,
        maximize=stored.maximize,
        **fed,
    )


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value from a file as what its annotation says; named tuples are stored as dicts.

    Raises:
      ValueError: it is something else; tells where.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in inner:
            return None
        kinds = [one for one in inner if one is not types.NoneType]
        return _typed(type(value) if type(value) in kinds else kinds[0], value, where)
    if hasattr(kind, "_fields"):
        if not isinstance(value, dict) or set(value) != set(kind._fields):
            raise ValueError(f"{where} has not the fields {', '.join(kind._fields)}")
        hints = typing.get_type_hints(kind)
        return kind(**{n: _typed(hints[n], one, f"{where}, {n}") for n, one in value.items()})
    if origin is tuple:
        if type(value) is not list:
            raise ValueError(f"{where} is no list")
        return tuple(_typed(inner[0], one, where) for one in value)
    if origin is dict:
        if type(value) is not dict:
            raise ValueError(f"{where} is no mapping")
        return {name: _typed(inner[1], one, where) for name, one in value.items()}
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) > 2**63):
        raise ValueError(f"{where} is no {kind.__name__}")
    return value
