"""A finished study as one page that a person reads: `write_report`. Needs the extra `report`."""

import base64
import dataclasses
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from playbook_optax import _checks, plots
from playbook_optax.analysis.axes import axis, hyperparameters
from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import Outcomes, outcomes
from playbook_optax.records.study import Study

REPORT = "report.html"
_NUM_CURVES = 5
_DPI = 130


@dataclasses.dataclass(frozen=True)
class Figure:
    """One plot of a report.

    Attributes:
      file: name of its file, which never depends on what the study holds.
      title: heading above it.
      alt: what it shows, for those who do not see it.
      png: the picture.
      wide: whether it takes the whole width of the page.
    """

    file: str
    title: str
    alt: str
    png: bytes
    wide: bool = False

    @property
    def data_uri(self) -> str:
        """The picture as a ``data:`` URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      header: names of the columns.
      rows: as many cells each; the first one names the row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision of a chapter: what was asked, seen and decided.

    Attributes:
      title: heading.
      asked: the question, in a sentence.
      decided: the answer, in a sentence.
      section: heading of the playbook's section that asks for it.
      findings: what was seen.
      figures: plots of it.
      table: numbers of it.
    """

    title: str
    asked: str
    decided: str
    section: str
    findings: Sequence[Finding] = ()
    figures: Sequence[Figure] = ()
    table: Table | None = None


def draw_figure(
    file: str, title: str, alt: str, draw: Callable[[], Any], wide: bool = False
) -> Figure:
    """Draws one figure of a report.

    Args:
      file: name of its file.
      title: heading above it.
      alt: what it shows.
      draw: makes the matplotlib Figure or Axes.
      wide: whether it takes the whole width of the page.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    matplotlib = _checks.require("matplotlib", "plots", "Plotting")
    pyplot = _checks.require("matplotlib.pyplot", "plots", "Plotting")
    picture = io.BytesIO()
    # A name is text, never a formula, which could be a bad one.
    with matplotlib.rc_context({"text.parse_math": False}):
        drawn = draw()
        figure = getattr(drawn, "figure", None) or drawn
        figure.savefig(picture, dpi=_DPI, format="png")
        pyplot.close(figure)
    return Figure(file, title, alt, picture.getvalue(), wide)


def shown_number(value: Any) -> str:
    """A number as people read it: four significant digits, plain where that is short."""
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e9 else f"{number:.4g}"


def shown_point(study: Study, trial: int) -> dict[str, str]:
    """A trial's hyperparameters as text, a categorical by its label.

    Args:
      study: the study.
      trial: its index.

    Returns:
      Name to text, in the order of the search space.
    """
    space = study.space
    texts = {}
    for name in hyperparameters(study):
        value = study.points[name][trial]
        if space is not None and name in space and not isinstance(value, str):
            value = space.label(name, value)
        try:
            texts[name] = shown_number(value)
        except ValueError:
            texts[name] = str(value)
    return texts


def verdict(study: Study, findings: Iterable[Finding]) -> tuple[str, str]:
    """What a study comes to, in two sentences.

    Args:
      study: the study.
      findings: what `diagnose` said of it.

    Returns:
      The best trial (or that there is none), and how far to trust it.
    """
    counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning")}
    if not study.num_trials:
        return "The study holds no complete trial.", "There is nothing to conclude yet."
    out = outcomes(study)
    if out.best < 0:
        return (
            f"None of the {out.num_trials} trials is usable: {int(out.infeasible.sum())} are "
            "infeasible.",
            "There is no recipe. The findings say what to change.",
        )
    best = (
        f"The best of {out.num_trials} trials is trial {out.best}: {out.objective} = "
        f"{shown_number(out.value[out.best])} at step {int(out.best_step[out.best])}."
    )
    if counts["error"] or counts["warning"]:
        parts = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
        return best, f"Act on {' and '.join(parts)} below before trusting it."
    return best, "No check found a problem with it."


def draw_plots(study: Study) -> list[Figure]:
    """Draws the plots of a study.

    Args:
      study: the study.

    Returns:
      The figures: one axis plot per hyperparameter that varies, the training curves of the best
      five trials, and the histogram of gradient norms where they were recorded.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if not study.num_trials:
        return []
    out, figures = outcomes(study), []

    def add(file: str, title: str, alt: str, draw: Callable[[], Any], wide: bool = False) -> None:
        figures.append(draw_figure(file, title, alt, draw, wide))

    names = [n for n in hyperparameters(study) if len(np.unique(axis(study, n).values)) > 1]
    for i, name in enumerate(names):
        add(
            f"axis_{i}.png",
            f"{out.objective} against {name}",
            f"Scatter plot: best {out.objective} of each of {out.num_trials} trials against "
            f"{name}; {int(out.infeasible.sum())} infeasible trials are crosses along the top."
            + (f" The best is at {shown_point(study, out.best)[name]}." if out.best >= 0 else ""),
            functools.partial(plots.plot_axis, study, name),
        )
    if out.best >= 0:
        num = min(_NUM_CURVES, len(out.order))
        add(
            "curves.png",
            f"Training curves of the best {num} trials",
            f"Line plot: {out.objective} and the training loss of trials "
            f"{', '.join(str(t) for t in out.order[:num])} against the step.",
            functools.partial(plots.plot_curves, study, _NUM_CURVES),
            wide=True,
        )
    if "norms/counts" in study.data and out.best >= 0:
        add(
            "gradient_norms.png",
            "Gradient norms before clipping",
            "Histogram: global gradient norm of every update of the feasible trials, with its "
            "50th, 90th and 99th percentiles.",
            functools.partial(plots.plot_gradient_norms, study),
        )
    return figures


def _trial_rows(study: Study, out: Outcomes) -> list[dict[str, Any]]:
    """Every trial as text, the best first, the infeasible last."""
    ranked = [int(t) for t in out.order]
    rest = [t for t in range(out.num_trials) if t not in set(ranked)]
    bad_step = study.data["infeasible_step"].values.reshape(out.num_trials, -1).max(axis=1)
    return [
        {
            "trial": trial,
            "point": list(shown_point(study, trial).values()),
            "value": shown_number(out.value[trial]) if out.usable[trial] else "–",
            "best_step": int(out.best_step[trial]) if out.usable[trial] else "–",
            "outcome": (
                f"{out.reason[trial]} at step {int(bad_step[trial])}"
                if out.infeasible[trial]
                else "feasible"
            ),
            "infeasible": bool(out.infeasible[trial]),
        }
        for trial in ranked + rest
    ]


def _run_facts(study: Study) -> list[tuple[str, str]]:
    """How the study was run, as far as its record says."""
    spec = study.spec
    facts = [
        ("Workload", spec.get("name")),
        ("Objective", f"{study.objective} ({'higher' if study.maximize else 'lower'} is better)"),
        ("Trials", study.num_trials),
        ("Planned trials", spec.get("planned_trials")),
        ("Seeds per trial", study.num_seeds),
        ("Steps per trial", spec.get("num_steps")),
        ("Steps between evaluations", spec.get("eval_every")),
        ("Trials per block (width)", spec.get("trials_per_block")),
        ("Own randomness per trial", spec.get("independent")),
        ("Key", spec.get("key")),
        ("Device kind", spec.get("device_kind")),
        ("Versions", spec.get("versions")),
        ("64-bit", spec.get("x64")),
    ]
    if study.space is not None:
        facts += [(f"Range of {name}", repr(study.space[name])) for name in study.space]
    return [(name, _shown(value)) for name, value in facts if value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@_checks.named_arguments
def write_report(
    study: Study,
    directory: str | os.PathLike[str],
    findings: Sequence[Finding] | None = None,
    recipe: str | None = None,
) -> Path:
    """Writes ``report.html``, one self-contained page, and its plots as PNG files beside it.

    The page holds verdict and recipe, the findings by severity, the plots, all trials, and how the
    study was run. It needs no network and runs no script, and everything that comes from the study
    is escaped, so a study of unknown origin is safe to report on.

    Args:
      study: the study, whoever produced it.
      directory: where to write; made when missing. Earlier reports there are replaced.
      findings: what to report; `diagnose(study)` if None.
      recipe: Python source that makes the best trial's optimizer, shown as it is.

    Returns:
      The path of the page.

    Raises:
      ImportError: jinja2 or matplotlib is not installed (the extra ``report``).

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import playbook_optax as pbx
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": np.array([0.01, 0.1, 1.0])},
      ...     {"valid/loss": np.array([[2.0, 1.0], [2.0, 0.5], [2.0, np.nan]])},
      ...     np.array([0, 10]), objective="valid/loss")
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     write_report(study, directory).name
      'report.html'

    Source: playbook, "Extracting insight from experimental results".
    """
    _checks.require("jinja2", "report", "The report")
    found = by_severity(diagnose(study) if findings is None else findings)
    headline, trust = verdict(study, found)
    out = outcomes(study) if study.num_trials else None
    best = None
    if out is not None and out.best >= 0:
        best = {
            "trial": out.best,
            "point": shown_point(study, out.best),
            "value": shown_number(out.value[out.best]),
            "step": int(out.best_step[out.best]),
            "num_steps": int(out.step[-1]),
        }
    figures = draw_plots(study)
    return _write_page(
        directory,
        "report.html",
        figures,
        name=str(study.spec.get("name", "study")),
        headline=headline,
        trust=trust,
        objective=study.objective,
        best=best,
        recipe=recipe if best else None,
        findings=_with_evidence(found),
        figures=figures,
        parameters=hyperparameters(study),
        rows=[] if out is None else _trial_rows(study, out),
        facts=_run_facts(study),
    )


@_checks.named_arguments
def write_chapter(
    name: str,
    title: str,
    headline: str,
    trust: str,
    decisions: Sequence[Decision],
    directory: str | os.PathLike[str],
    facts: Sequence[tuple[str, str]] = (),
    recipe: str | None = None,
) -> Path:
    """Writes a chapter of decisions as ``report.html``, self-contained like `write_report`.

    Args:
      name: of the workload.
      title: of the chapter.
      headline: what it comes to, in a sentence.
      trust: how far to trust it, in a sentence.
      decisions: in the order in which they were taken.
      directory: where to write; made when missing. Earlier reports there are replaced.
      facts: how it was run, as pairs of text.
      recipe: Python source, shown as it is.

    Returns:
      The path of the page.

    Raises:
      ImportError: jinja2 is not installed (the extra ``report``).

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    return _write_page(
        directory,
        "chapter.html",
        [figure for decision in decisions for figure in decision.figures],
        name=name,
        title=title,
        headline=headline,
        trust=trust,
        recipe=recipe,
        decisions=[
            {**vars(decision), "findings": _with_evidence(by_severity(decision.findings))}
            for decision in decisions
        ],
        facts=list(facts),
    )


def _with_evidence(findings: Sequence[Finding]) -> list[tuple[Finding, list[tuple[str, str]]]]:
    return [
        (f, [(k, _shown(v)) for k, v in f.evidence.items() if not isinstance(v, dict) or v])
        for f in findings
    ]


def _write_page(
    directory: str | os.PathLike[str], template: str, pictures: Sequence[Figure], **values: Any
) -> Path:
    """Renders a page, everything escaped, and writes it with its figures beside it."""
    jinja2 = _checks.require("jinja2", "report", "The report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("playbook_optax"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in pictures:
        write_file(folder / figure.file, figure.png)
    return write_file(folder / REPORT, page.encode())


def write_file(path: Path, content: bytes) -> Path:
    """Replaces a file as a whole; a link in its place is replaced, not followed out of there.

    Args:
      path: the file, in an existing directory.
      content: all of it.

    Returns:
      `path`.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
