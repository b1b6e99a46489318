"""What a recipe and its chapters show of themselves."""

from typing import Any, TypeAlias

from playbook_optax import _shown
from playbook_optax._text import printable
from playbook_optax.procedures.verdict import finding_rows, study_rows
from playbook_optax.records import summary
from playbook_optax.records.picture import picture_of
from playbook_optax.search_space import SearchSpace

# Both are of `tune`, which imports this.
Recipe: TypeAlias = Any
Chapter: TypeAlias = Any

_MOST_FINDINGS = 4


def chapter_repr(chapter: Chapter) -> str:
    """A chapter as the call that makes it."""
    fields = {"name": _shown.brief(chapter.name), "decision": _shown.brief(chapter.decision)}
    answer = _shown.brief(chapter.verdict.answer, 60)
    return _shown.record("Chapter", {**fields, "verdict": f"Verdict(answer={answer}, …)"})


def chapter_summary(chapter: Chapter) -> tuple[str, _shown.Rows]:
    """A chapter as a title and rows of text."""
    decision, verdict = chapter.decision, chapter.verdict
    return f"Chapter {chapter.name}: {decision.severity}", [
        ("decided", decision.message),
        *([("next", decision.suggestion)] if decision.suggestion else []),
        *finding_rows(verdict.findings, _MOST_FINDINGS),
        *study_rows(verdict.studies),
        ("cost", f"{verdict.cost:,} trial-steps"),
    ]


def chapter_html(chapter: Chapter) -> str:
    """A chapter as a table and a picture of its studies."""
    return _shown.as_html(*chapter_summary(chapter), picture_of(chapter.verdict.studies))


def recipe_repr(recipe: Recipe) -> str:
    """A recipe as the call that makes it, without what it is made of."""
    return _shown.record("Recipe", _shown.fields_of(recipe))


def recipe_summary(recipe: Recipe) -> tuple[str, _shown.Rows]:
    """A recipe as a title and rows of text: what to train, what came of it, and why."""
    name = getattr(recipe.workload, "name", "workload")
    rows = [("optimizer", recipe.optimizer_name or "your own")]
    if recipe.point is None:
        title = f"No recipe for {name}"
    else:
        title = f"Recipe for {name}: {recipe.objective} = {_reached(recipe)}"
        rows.append(("point", summary.point_text(recipe.point, _space(recipe))))
    remedies = recipe.pipeline
    steps = f"{recipe.num_steps:,}, evaluated every {recipe.eval_every:,}"
    if remedies.warmup_steps:
        steps += f"; {remedies.warmup_steps:,} of them warm-up"
    if remedies.max_norm is not None:
        steps += f"; gradients clipped at a norm of {_shown.number(remedies.max_norm)}"
    rows.append(("steps", steps))
    spent = sum(recipe.cost.values())
    rows.append(("cost", f"{spent:,} of {recipe.total_budget:,} trial-steps"))
    for chapter in recipe.chapters:
        grave = "" if chapter.decision.severity == "info" else f"{chapter.decision.severity}: "
        rows.append((chapter.name, grave + printable(chapter.decision.message, 200)))
    if recipe.report is not None:
        rows.append(("report", str(recipe.report)))
    return title, rows


def recipe_html(recipe: Recipe) -> str:
    """A recipe as a table and a picture of the last studies that led to it."""
    return _shown.as_html(*recipe_summary(recipe), picture_of(_last_studies(recipe)))


def _reached(recipe: Recipe) -> str:
    value = _shown.number(recipe.value)
    if len(recipe.values) < 2:
        return f"{value} (one seed)"
    return f"{value} ± {recipe.spread:.2g} over {len(recipe.values)} seeds"


def _last_studies(recipe: Recipe) -> dict[str, Any]:
    found = [chapter.verdict.studies for chapter in recipe.chapters if chapter.verdict.studies]
    return found[-1] if found else {}


def _space(recipe: Recipe) -> SearchSpace | None:
    """A space that says what the indices of choices mean, if a study knows it."""
    point: dict[str, Any] = recipe.point or {}
    for study in reversed(recipe.studies.values()):
        space = study.space
        if space is not None and set(point) <= set(space):
            return space
    return None
