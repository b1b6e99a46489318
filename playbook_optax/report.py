"""Finished studies as one page that a person reads. Needs the extra `report`."""

import base64
import dataclasses
import functools
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from playbook_optax import _checks, plots
from playbook_optax._text import UNBOUNDED, printable
from playbook_optax.analysis.axes import axis, hyperparameters
from playbook_optax.analysis.diagnose import diagnose
from playbook_optax.analysis.findings import Finding, by_severity
from playbook_optax.analysis.outcomes import outcomes
from playbook_optax.records import storage
from playbook_optax.records.study import Study

REPORT = "report.html"
_NUM_CURVES = 5
_DPI = 130
# On a phone a figure is three inches wide: what is drawn on less paper has larger letters there.
_NARROW = 0.8
_WIDE, _VERY_WIDE = 6.5, 8.0
_MAX_TRIALS = {"report": 1000, "recipe": 50}
# The names of the files that a page is written beside, and its own.
_FILES = re.compile(
    r"report\.html|recipe\.py|(axis|figure|decision_\d+|study_\d+)_\d+\.png|curves\.png|"
    r"gradient_norms\.png"
)
# More of a name than this makes no picture clearer.
_MAX_LETTERS, _MAX_LINES = 90, 3


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
        return _data_uri("image/png", self.png)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, so that a page keeps room for the picture."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


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
      next: what to try next, in a sentence; empty if there is nothing.
      cost: what it took to find out, as text; empty if it is not told.
    """

    title: str
    asked: str
    decided: str
    section: str
    findings: Sequence[Finding] = ()
    figures: Sequence[Figure] = ()
    table: Table | None = None
    next: str = ""
    cost: str = ""


def draw_figure(
    file: str, title: str, alt: str, draw: Callable[[], Any], wide: bool = False
) -> Figure:
    """Draws one figure of a report.

    Args:
      file: name of its file.
      title: heading above it.
      alt: what it shows.
      draw: makes the matplotlib Figure or Axes.
      wide: whether it may take the whole width of the page; one drawn up to 6.5 inches wide never
        does, one over eight always.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    matplotlib = _checks.require("matplotlib", "plots", "Plotting")
    pyplot = _checks.require("matplotlib.pyplot", "plots", "Plotting")
    agg = _checks.require("matplotlib.backends.backend_agg", "plots", "Plotting")
    picture = io.BytesIO()
    # A name is text: never a formula, which could be a bad one, nor TeX, which can run programs.
    names = {"text.parse_math": False, "text.usetex": False}
    no_layout = {"figure.autolayout": False, "figure.constrained_layout.use": False}
    with matplotlib.rc_context({**names, **no_layout}), warnings.catch_warnings():
        # The page has the text that a font lacks letters for, or a picture the room.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        drawn = draw()
        figure = getattr(drawn, "figure", None) or drawn
        try:
            _tame_texts(figure)
            width = figure.get_size_inches()[0]
            wide = bool(width > (_WIDE if wide else _VERY_WIDE))
            if not wide:
                figure.set_size_inches(_NARROW * figure.get_size_inches())
            # Laid out here, and then drawn without a layout: Matplotlib draws twice otherwise.
            agg.FigureCanvasAgg(figure)
            figure.set_dpi(_DPI)
            layout = figure.get_layout_engine()
            if layout is not None:
                layout.execute(figure)
                figure.set_layout_engine(None)
            # Tight: a legend that needs more room than the axes gets it.
            box = figure.get_tightbbox().padded(0.1)
            figure.savefig(picture, dpi=_DPI, format="png", bbox_inches=box)
        finally:
            pyplot.close(figure)
    return Figure(file, title, alt, picture.getvalue(), wide)


class Pictures:
    """The figures of one page: each is drawn once, however many of its sections ask for it."""

    def __init__(self) -> None:
        """Begins a page."""
        self._drawn: dict[tuple[Any, ...], tuple[Figure, Any]] = {}

    def __call__(
        self,
        title: str,
        alt: str,
        draw: Callable[..., Any],
        *arguments: Any,
        file: str | None = None,
        wide: bool = False,
        **options: Any,
    ) -> Figure:
        """Draws a figure, unless the same function has drawn it with the same arguments.

        Args:
          title: heading above it.
          alt: what it shows.
          draw: makes the matplotlib Figure or Axes from `arguments` and `options`.
          *arguments: text and numbers are told apart by their values, everything else, such as a
            study, by which object it is.
          file: name of its file; a number by default, so that nothing stored decides on it.
          wide: as in `draw_figure`.
          **options: like `arguments`.

        Returns:
          The figure, the first one's title, file and width included.

        Raises:
          ImportError: matplotlib is not installed.
        """
        given = (*arguments, *options, *options.values())
        asked = (draw, *(x if isinstance(x, (str, int, float)) else id(x) for x in given))
        if asked not in self._drawn:
            name = file or f"figure_{len(self._drawn)}.png"
            made = functools.partial(draw, *arguments, **options)
            # What an id belongs to is held, lest another object gets the same.
            self._drawn[asked] = draw_figure(name, title, alt, made, wide), given
        return self._drawn[asked][0]


def _tame(text: str, most: int = _MAX_LETTERS) -> str:
    """At most three lines of `most` letters, all of them letters that a font can be asked for."""
    kept = [printable(line, most) for line in text.split("\n")]
    return "\n".join(kept if len(kept) <= _MAX_LINES else [*kept[: _MAX_LINES - 1], "…"])


def _tame_texts(figure: Any) -> None:
    """Cuts names in a picture, which may be of any length and hold letters that none can draw."""
    matplotlib = _checks.require("matplotlib", "plots", "Plotting")
    ticker = _checks.require("matplotlib.ticker", "plots", "Plotting")

    def tamed(formatter: Any, most: int) -> Any:
        return ticker.FuncFormatter(lambda x, position: _tame(formatter(x, position), most))

    for text in figure.findobj(matplotlib.text.Text):
        text.set_text(_tame(text.get_text()))
    for ax in figure.axes:
        for side in (ax.xaxis, ax.yaxis):
            # Only ticks at given places have names for labels; those below share the width.
            if isinstance(side.get_major_locator(), ticker.FixedLocator):
                most = max(60 // max(len(side.get_majorticklocs()), 1), 8)
                most = most if side is ax.xaxis else 40
                side.set_major_formatter(tamed(side.get_major_formatter(), most))


def check_folder(directory: str | os.PathLike[str]) -> Path:
    """Sees to it that a page can be written, before anything is drawn for it.

    Args:
      directory: where to write; made when missing.

    Returns:
      The path of the folder.

    Raises:
      NotWritable: it cannot be made or written in, or a folder has the name of one of the files.
      ValueError: it is empty or an address.
    """
    folder = storage.check_folder(storage.root(directory))
    try:
        places = list(folder.iterdir())
    except OSError as error:
        raise storage.file_error(folder, "list", error) from error
    for path in places:
        if _FILES.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            raise storage.NotWritable(
                f"cannot write {str(path)!r}: a folder has that name. Move it, or choose another "
                "directory."
            )
    return folder


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
        f"{shown_number(out.value[out.best])} at step {int(out.checkpoint_step[out.best])}."
    )
    if counts["error"] or counts["warning"]:
        parts = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
        return best, f"Act on {' and '.join(parts)} below before trusting it."
    return best, "No check found a problem with it."


def axis_figures(study: Study, pictures: Pictures, where: str = "") -> list[Figure]:
    """Draws the axis plots of a study.

    Args:
      study: the study, of at least one trial.
      pictures: those of the page.
      where: what is put behind the title of each, to tell it from those of another study.

    Returns:
      One figure per hyperparameter that varies.

    Raises:
      ImportError: matplotlib is not installed.
    """
    out = outcomes(study)
    names = [n for n in hyperparameters(study) if len(np.unique(axis(study, n).values)) > 1]
    return [
        pictures(
            f"{out.objective} against {name}{where}",
            f"Scatter plot: best {out.objective} of each of {out.num_trials} trials against "
            f"{name}; {int(out.infeasible.sum())} infeasible trials are crosses along the top."
            + (f" The best is at {shown_point(study, out.best)[name]}." if out.best >= 0 else ""),
            plots.plot_axis,
            study,
            name,
            file=f"axis_{i}.png",
        )
        for i, name in enumerate(names)
    ]


def curve_figures(study: Study, pictures: Pictures, where: str = "") -> list[Figure]:
    """Draws the training curves of the best trials of a study; arguments as `axis_figures`.

    Args:
      study: the study, of at least one trial.
      pictures: those of the page.
      where: what is put behind the title.

    Returns:
      One figure, or none where no trial is usable.

    Raises:
      ImportError: matplotlib is not installed.
    """
    out = outcomes(study)
    if out.best < 0:
        return []
    num = min(_NUM_CURVES, len(out.order))
    figure = pictures(
        f"Training curves of the best {num} trials{where}",
        f"Line plot: {out.objective} and the training loss of trials "
        f"{', '.join(str(t) for t in out.order[:num])} against the step.",
        plots.plot_curves,
        study,
        _NUM_CURVES,
        file="curves.png",
        wide=True,
    )
    return [figure]


def draw_plots(study: Study, pictures: Pictures | None = None) -> list[Figure]:
    """Draws the plots of a study.

    Args:
      study: the study.
      pictures: those of the page; what it has drawn is not drawn again.

    Returns:
      The figures: one axis plot per hyperparameter that varies, the training curves of the best
      five trials, and the histogram of gradient norms where they were recorded.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if not study.num_trials:
        return []
    pictures = pictures or Pictures()
    figures = [*axis_figures(study, pictures), *curve_figures(study, pictures)]
    if "norms/counts" in study.data and outcomes(study).best >= 0:
        figures.append(
            pictures(
                "Gradient norms before clipping",
                "Histogram: global gradient norm of every update of the feasible trials, with its "
                "50th, 90th and 99th percentiles.",
                plots.plot_gradient_norms,
                study,
                file="gradient_norms.png",
            )
        )
    return figures


def _trials(study: Study, most: int) -> dict[str, Any]:
    """A table of the trials as text, the best first, the infeasible last, `most` at most."""
    if not study.num_trials:
        return {"caption": "No trials", "header": ["trial"], "rows": [], "marks": [], "left_out": 0}
    out = outcomes(study)
    ranked = [int(t) for t in out.order]
    known = set(ranked)
    order = (ranked + [t for t in range(out.num_trials) if t not in known])[:most]
    bad_step = study.data["infeasible_step"].values.reshape(out.num_trials, -1).max(axis=1)
    rows, marks = [], []
    for trial in order:
        told = [shown_number(out.value[trial]), str(int(out.checkpoint_step[trial]))]
        rows.append(
            [
                str(trial),
                *shown_point(study, trial).values(),
                *(told if out.usable[trial] else ("–", "–")),
                f"{out.reason[trial]} at step {int(bad_step[trial])}"
                if out.infeasible[trial]
                else "feasible",
            ]
        )
        marks.append("infeasible" if out.infeasible[trial] else "best" if trial == out.best else "")
    left_out = out.num_trials - len(order)
    count = f"{len(order)} of {out.num_trials}" if left_out else str(out.num_trials)
    return {
        "caption": f"The best {count} trials"
        if left_out
        else f"All {count} trials, the best first",
        "header": ["trial", *hyperparameters(study), f"best {out.objective}", "at step", "outcome"],
        "rows": rows,
        "marks": marks,
        "left_out": left_out,
    }


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
      NotWritable: the directory or a file in it cannot be written.

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
    folder = check_folder(directory)
    found = by_severity(diagnose(study) if findings is None else findings)
    headline, trust = verdict(study, found)
    out = outcomes(study) if study.num_trials else None
    best: list[tuple[str, str]] = []
    if out is not None and out.best >= 0:
        best = [
            *shown_point(study, out.best).items(),
            ("steps", str(int(out.step[-1]))),
            (f"best {study.objective}", shown_number(out.value[out.best])),
            ("at step", str(int(out.checkpoint_step[out.best]))),
        ]
    return _write_page(
        folder,
        "report.html",
        draw_plots(study),
        name=str(study.spec.get("name", "study")),
        kind="Study report",
        headline=headline,
        trust=trust,
        contents=[
            ("recipe", "Recipe", ()),
            ("findings", "Findings", ()),
            ("plots", "Plots", ()),
            ("trials", "Trials", ()),
            ("run", "How it was run", ()),
        ],
        conclusive=bool(best),
        best=best,
        recipe=recipe if best else None,
        findings=_with_evidence(found),
        trials=_trials(study, _MAX_TRIALS["report"]),
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
      NotWritable: the directory or a file in it cannot be written.

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    links: list[tuple[str, str, Sequence[tuple[str, str]]]] = [
        (anchor, text, ()) for anchor, text in _decision_links(decisions)
    ]
    if recipe:
        links = [("recipe", "Recipe", ()), *links]
    if facts:
        links = [*links, ("run", "How it was run", ())]
    decided = [_shown_decision(decision) for decision in decisions]
    pictures = _place_figures([(f"decision-{i}", part) for i, part in enumerate(decided, 1)])
    return _write_page(
        check_folder(directory),
        "chapter.html",
        pictures,
        name=name,
        kind=title,
        headline=headline,
        trust=trust,
        contents=links,
        conclusive=True,
        recipe=recipe,
        decisions=decided,
        facts=list(facts),
    )


@_checks.named_arguments
def write_recipe(
    *,
    name: str,
    headline: str,
    trust: str,
    recipe: str | None,
    facts: Sequence[tuple[str, str]],
    decisions: Sequence[Decision],
    studies: Sequence[tuple[str, Study]],
    directory: str | os.PathLike[str],
    budget: Sequence[tuple[str, int]] | None = None,
    pictures: Pictures | None = None,
) -> Path:
    """Writes what tuning came to as ``report.html``, self-contained like `write_report`.

    Verdict and recipe come first, then every decision (what was asked, seen and decided, which
    section of the playbook says so, what to try next), then what each chapter cost, then the
    studies with findings, plots and their best 50 trials. A plot that a decision shows is not shown
    again with its study, which links to the decision instead.

    Args:
      name: of the workload.
      headline: what it comes to, in a sentence.
      trust: how far to trust it, in a sentence.
      recipe: Python source, shown as it is but for control characters, which become escapes; None
        if there is none.
      facts: what the recipe is, such as its point, steps, value and spread, as pairs of text.
      decisions: in the order in which they were taken.
      studies: pairs of title and study, in the order in which they ran.
      directory: where to write; made when missing. Earlier reports there are replaced.
      budget: pairs of chapter and trial-steps spent; not shown if None.
      pictures: what drew the figures of the decisions.

    Returns:
      The path of the page.

    Raises:
      ImportError: jinja2 or matplotlib is not installed (the extra ``report``).
      NotWritable: the directory or a file in it cannot be written.
      ValueError: negative trial-steps in `budget`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     write_recipe(
      ...         name="digits", headline="Adam at 0.01.", trust="Five seeds agree.",
      ...         recipe="optimizer = pbx.adam(0.01)", facts=[("learning_rate", "0.01")],
      ...         decisions=[], studies=[], directory=directory, budget=[("sweep", 4000)]).name
      'report.html'

    Source: playbook, "A scientific approach to improving model performance".
    """
    _checks.require("jinja2", "report", "The report")
    folder = check_folder(directory)
    costs = _shown_budget(budget) if budget else None
    decided = [_shown_decision(decision) for decision in decisions]
    pictures = pictures or Pictures()
    shown: list[dict[str, Any]] = []
    for title, study in studies:
        found = by_severity(diagnose(study))
        shown.append(
            {
                "title": title,
                "headline": " ".join(verdict(study, found)),
                "figures": draw_plots(study, pictures),
                "findings": _with_evidence(found),
                "trials": _trials(study, _MAX_TRIALS["recipe"]),
                "facts": _run_facts(study),
            }
        )
    sections = [
        (f"{label}-{i}", part)
        for label, parts in (("decision", decided), ("study", shown))
        for i, part in enumerate(parts, 1)
    ]
    _place_figures(sections)
    # One page has one folder of pictures: those of several sources must not share a name.
    for label, parts in (("decision", decided), ("study", shown)):
        for i, part in enumerate(parts):
            part["figures"] = [
                dataclasses.replace(figure, file=f"{label}_{i}_{j}.png")
                for j, figure in enumerate(part["figures"])
            ]
    links: list[tuple[str, str, Sequence[tuple[str, str]]]] = [("recipe", "Recipe", ())]
    if decided:
        links.append(("decisions", "Decisions", _decision_links(decisions)))
    if budget:
        links.append(("budget", "What it cost", ()))
    if shown:
        titles = [(f"study-{i}", title) for i, (title, _) in enumerate(studies, 1)]
        links.append(("studies", "Studies", titles))
    return _write_page(
        folder,
        "recipe.html",
        [figure for _, part in sections for figure in part["figures"]],
        name=name,
        kind="Tuned recipe",
        headline=headline,
        trust=trust,
        contents=links,
        conclusive=bool(recipe),
        recipe=recipe,
        facts=list(facts),
        decisions=decided,
        budget=costs,
        studies=shown,
    )


def _decision_links(decisions: Sequence[Decision]) -> list[tuple[str, str]]:
    return [(f"decision-{i}", f"{i}. {d.title}") for i, d in enumerate(decisions, 1)]


def _shown_decision(decision: Decision) -> dict[str, Any]:
    return {**vars(decision), "findings": _with_evidence(by_severity(decision.findings))}


def _place_figures(sections: Sequence[tuple[str, dict[str, Any]]]) -> list[Figure]:
    """Leaves each figure to the first section that has it, and to the others a link to that one.

    Args:
      sections: anchor of each section and what it shows, whose ``figures`` are replaced by those
        that are left, and which gets ``above``, anchors and titles of those that are not.

    Returns:
      All figures, each once.
    """
    places: dict[int, tuple[str, Figure]] = {}
    for anchor, part in sections:
        new = [figure for figure in part["figures"] if id(figure) not in places]
        part["above"] = [(places[id(f)][0], f.title) for f in part["figures"] if id(f) in places]
        part["figures"] = new
        places.update({id(figure): (anchor, figure) for figure in new})
    return [figure for _, figure in places.values()]


def _shown_budget(budget: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Rows of what each chapter cost, with bars as percentages of the most expensive one."""
    for chapter, steps in budget:
        fix = "Give the trial-steps that were spent."
        _checks.check_number(f"budget[{chapter!r}]", steps, at_least=0, fix=fix)
    total, most = (f(steps for _, steps in budget) for f in (sum, max))
    return {
        "rows": [
            {
                "chapter": chapter,
                "steps": f"{int(steps):,}",
                "share": f"{steps / total:.0%}" if total else "–",
                "width": f"{100 * steps / most:.4g}" if most else "0",
            }
            for chapter, steps in budget
        ],
        "total": f"{int(total):,}",
    }


def _with_evidence(findings: Sequence[Finding]) -> list[tuple[Finding, list[tuple[str, str]]]]:
    return [
        (f, [(k, _shown(v)) for k, v in f.evidence.items() if not isinstance(v, dict) or v])
        for f in findings
    ]


def _write_page(folder: Path, template: str, pictures: Sequence[Figure], **values: Any) -> Path:
    """Renders a page, everything escaped, and writes it with its figures beside it."""
    jinja2 = _checks.require("jinja2", "report", "The report")
    loader = jinja2.PackageLoader("playbook_optax")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_fit_for_a_page,
    )
    # The policy names the only style that may apply, by its hash.
    style, _, _ = loader.get_source(environment, "style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # What is read is then what runs.
    recipe = values["recipe"] and _fit_for_a_page(values["recipe"].replace("\r\n", "\n"))
    page = environment.get_template(template).render(
        **{
            **values,
            "figures": pictures,
            "recipe": recipe,
            "recipe_uri": recipe and _data_uri("text/x-python", recipe.encode()),
            "style": jinja2.utils.markupsafe.Markup(style),
            "style_hash": f"sha256-{digest}",
        }
    )
    for figure in pictures:
        if Path(figure.file).name != figure.file:
            raise ValueError(
                f"file = {figure.file!r} of figure {figure.title!r} is not a name in the report's "
                "directory. Give a name without a path."
            )
        storage.write_file(folder / figure.file, figure.png)
    return storage.write_file(folder / REPORT, page.encode())


def _fit_for_a_page(value: Any) -> Any:
    """Text with an escape for each letter that hides or reorders others; markup stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return printable(value, UNBOUNDED, keep="\n\t")
