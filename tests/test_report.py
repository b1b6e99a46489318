"""The report: what is in it, in which order, and that nothing from a study becomes markup."""

import base64
import csv
import dataclasses
import errno
import functools
import hashlib
import html.parser
import os
import re
import stat
import sys
import types

import jax
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

from playbook_optax import chapters, report, tuning
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import stability
from playbook_optax.procedures import tune as parts
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.records import storage
from playbook_optax.records.study import Study, load_study, study_from_blocks
from playbook_optax.search_space import Categorical, Float, SearchSpace
from playbook_optax.trials.workload import Workload

EVIL = "<script>alert(1)</script>$\\frac{"


def make_study(name="valid/loss", parameter="learning_rate", infeasible=(False,) * 5 + (True,)):
    rates = np.geomspace(0.01, 1.0, 6)
    curve = np.array([[2.0, 1.0 + abs(i - 3) / 10, 1.2] for i in range(6)])
    curve[np.asarray(infeasible), 1:] = np.nan
    return Study.from_arrays(
        {parameter: rates},
        {name: curve, "train/loss": curve},
        np.array([0, 10, 20]),
        objective=name,
        infeasible=np.asarray(infeasible),
        name="a <b>study</b>",
    )


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    path = report.write_report(make_study(), directory, recipe="pbx.sgd(learning_rate=0.1)")
    return path, Page(path.read_text("utf-8"))


def test_page_is_self_contained(written):
    path, page = written
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    style = re.search("<style>(.*?)</style>", path.read_text("utf-8"), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert not page.all("script")
    assert not page.all("link")
    assert not any("style" in a or any(k[:2] == "on" for k in a) for _, a in page.elements)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    (saved,) = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    kind, _, content = saved.partition(",")
    assert kind == "data:text/x-python;base64"
    assert base64.b64decode(content) == b"pbx.sgd(learning_rate=0.1)"
    assert not re.search(r"https?://|url\(|@import", path.read_text("utf-8"))


def test_sections_come_in_order_and_links_reach_them(written):
    _, page = written
    sections = [s["id"] for s in page.all("section")]
    assert sections == ["recipe", "findings", "plots", "trials", "run"]
    links = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert links == ["main", *sections]
    assert page.all("main")[0]["id"] == "main"


def test_plots_have_alternative_text_and_lie_beside_the_page(written):
    path, page = written
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "axis_0.png",
        "curves.png",
        "report.html",
    ]
    assert (path.parent / "axis_0.png").read_bytes().startswith(b"\x89PNG")
    assert [len(image["alt"]) > 40 for image in page.all("img")] == [True, True]
    assert [i["width"] + i["height"] > "1" for i in page.all("img")] == [True, True]
    assert len(page.all("caption")) == len(page.all("table")) >= 3
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))


def test_verdict_recipe_and_table_tell_the_best_trial(written):
    _, page = written
    text = " ".join(" ".join(page.texts).split())
    assert "The best of 6 trials is trial 3: valid/loss = 1 at step 10." in text
    assert "Trials are numbered from 0, here and in all plots and findings" in text
    assert "pbx.sgd(learning_rate=0.1)" in text
    rows = [t.get("class") for t in page.all("tr") if t.get("class")]
    assert rows == ["best", "infeasible"]


def test_findings_are_sorted_by_severity(tmp_path):
    finding = [
        Finding(f"code_{severity}", severity, "Said.", {"n": 1}, "A section", "Do it.")
        for severity in ("info", "error", "warning")
    ]
    page = Page(report.write_report(make_study(), tmp_path, findings=finding).read_text("utf-8"))
    order = [a["class"].split()[-1] for a in page.all("article")]
    assert order == ["error", "warning", "info"]
    assert "Act on 1 error and 1 warning below" in " ".join(page.texts)


def verdict_of(page):
    (classes,) = [
        a["class"].split() for _, a in page.elements if a.get("class", "").startswith("verdict")
    ]
    return classes[1:]


@pytest.mark.parametrize("severity", ["error", "warning", "info"])
def test_the_verdict_has_the_colour_of_the_gravest_finding(tmp_path, severity):
    found = [Finding("c", s, "Said.", {}, "A section") for s in ("info", severity)]
    path = report.write_report(make_study(), tmp_path / "study", findings=found)
    assert verdict_of(Page(path.read_text("utf-8"))) == [severity]
    _, page = recipe_page(tmp_path / "recipe", severity=severity)
    assert verdict_of(page) == [severity]
    _, page = recipe_page(tmp_path / "none", severity=severity, recipe=None)
    assert verdict_of(page) == ["error"]


def test_a_study_without_a_usable_trial_has_no_green_verdict(tmp_path):
    path = report.write_report(make_study(infeasible=(True,) * 6), tmp_path, findings=[])
    assert verdict_of(Page(path.read_text("utf-8"))) == ["error"]


def test_an_unknown_severity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="severity = 'bad' is unknown"):
        recipe_page(tmp_path, severity="bad")


def test_remarks_on_a_decision_are_folded_and_what_is_grave_is_not(tmp_path):
    found = [
        Finding(f"code_{i}", severity, f"Said {i}.", {}, "A section")
        for i, severity in enumerate(("info", "error", "info", "warning"))
    ]
    decision = make_decision(findings=found, figures=[])
    _, page = recipe_page(tmp_path, decisions=[decision], studies=[], budget=None)
    text = " ".join(" ".join(page.texts).split())
    told = ["Said 1.", "Said 3.", "2 further remarks", "Said 0.", "Said 2."]
    assert sorted(told, key=text.index) == told
    decision = make_decision(findings=found[:1], figures=[])
    _, page = recipe_page(tmp_path, decisions=[decision], studies=[], budget=None)
    assert "1 remark" in page.texts


def test_nothing_from_a_study_becomes_markup_or_a_file_name(tmp_path):
    finding = [Finding(EVIL, "info", EVIL, {EVIL: EVIL}, EVIL, EVIL)]
    study = make_study(EVIL, EVIL + "x")
    path = report.write_report(study, tmp_path, findings=finding, recipe=EVIL)
    text = path.read_text("utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "axis_0.png",
        "curves.png",
        "report.html",
    ]


def test_a_link_in_the_directory_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("report.html", "axis_0.png", "curves.png"):
        (folder / name).symlink_to(outside)
    report.write_report(make_study(), folder)
    assert outside.read_text() == "mine"
    assert not any(p.is_symlink() for p in folder.iterdir())


def test_a_study_without_a_usable_trial_has_no_recipe(tmp_path):
    study = make_study(infeasible=(True,) * 6)
    path = report.write_report(study, tmp_path, recipe="pbx.sgd(learning_rate=0.1)")
    text = path.read_text("utf-8")
    assert "None of the 6 trials is usable: 6 are infeasible." in text
    assert "pbx.sgd" not in text
    assert not (tmp_path / "curves.png").exists()


def test_categorical_choices_are_shown_by_their_labels():
    space = SearchSpace({"rate": Float(0.1, 1.0), "decay": Categorical(["cosine", "linear"])})
    study = Study.from_arrays(
        {"rate": np.array([0.25, 0.5]), "decay": np.array([1, 0])},
        {"valid/loss": np.array([[2.0, 1.0], [2.0, 0.5]])},
        np.array([0, 10]),
        objective="valid/loss",
        space=space,
    )
    assert report.shown_point(study, 0) == {"rate": "0.25", "decay": "linear"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(400, "400"), (0.0123456, "0.01235"), (2.0, "2"), (1e-7, "1e-07"), (float("inf"), "inf")],
)
def test_numbers_are_short(value, text):
    assert report.shown_number(value) == text


def make_decision(title="Learning rate", **fields):
    picture = report.draw_figure("figure_0.png", "A plot", "What it shows.", lambda: drawn())
    finding = Finding("seen", "info", "Seen this.", {"n": 1}, "Section of the finding")
    return report.Decision(
        **{
            "title": title,
            "asked": f"What about {title}?",
            "decided": f"Decided {title}.",
            "section": "Section of the playbook",
            "findings": [finding],
            "figures": [picture],
            "table": report.Table(("remedy", "best"), [("none", "0.5")]),
            "next": "Then try this.",
            "cost": "40 trial-steps",
            **fields,
        }
    )


def drawn():
    return pyplot.subplots()[1].figure


def recipe_page(folder, **fields):
    path = report.write_recipe(
        **{
            "name": "digits",
            "headline": "Adam at 0.01.",
            "trust": "Five seeds agree.",
            "recipe": "optimizer = pbx.adam(0.01)",
            "facts": [("learning_rate", "0.01"), ("spread", "0.002")],
            "decisions": [make_decision(), make_decision("Steps", next="", cost="", table=None)],
            "studies": [("Round 1", make_study()), ("Round 2", make_study())],
            "directory": folder,
            "budget": [("sweep", 1000), ("round 1", 3000), ("free", 0)],
            **fields,
        }
    )
    return path, Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return recipe_page(tmp_path_factory.mktemp("recipe"))


def test_a_recipe_page_tells_verdict_recipe_decisions_cost_and_studies_in_order(whole):
    _, page = whole
    assert [s["id"] for s in page.all("section")] == [
        "recipe",
        "decisions",
        "decision-1",
        "decision-2",
        "budget",
        "studies",
        "study-1",
        "study-2",
    ]
    anchors = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"][1:] for a in page.all("a") if a["href"][0] == "#"} <= anchors
    text = " ".join(" ".join(page.texts).split())
    order = [
        "Adam at 0.01. Five seeds agree.",
        "learning_rate 0.01 spread 0.002",
        "optimizer = pbx.adam(0.01)",
        "Asked What about Learning rate?",
        "A plot",
        "Learning rate in numbers",
        "Seen this.",
        "Decided Decided Learning rate.",
        "Playbook “ Section of the playbook ”",
        "Try next Then try this.",
        "Cost 40 trial-steps",
        "Asked What about Steps?",
        "What it cost Trial-steps by chapter",
        "Total 4,000",
        "The best of 6 trials is trial 3",
    ]
    places = [text.rindex(part) if part.startswith("Cost") else text.find(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)
    assert text.count("Try next") == text.count("Cost 40") == 1


def test_the_budget_is_shares_of_the_whole_and_bars_of_the_largest(tmp_path):
    bare = {"decisions": [], "studies": []}
    _, page = recipe_page(tmp_path, **bare)
    text = " ".join(" ".join(page.texts).split())
    assert "sweep 1,000 25% round 1 3,000 75% free 0 0% Total 4,000" in text
    assert [bar["width"] for bar in page.all("rect")] == ["33.33", "100", "0"]
    _, page = recipe_page(tmp_path, **bare, budget=[("free", 0)])
    assert "free 0 – Total 0" in " ".join(" ".join(page.texts).split())
    with pytest.raises(ValueError, match=r"budget\['sweep'\] must be >= 0, got -1"):
        recipe_page(tmp_path, **bare, budget=[("sweep", -1)])


def test_pictures_of_several_decisions_and_studies_do_not_replace_one_another(whole):
    path, page = whole
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "decision_0_0.png",
        "decision_1_0.png",
        "report.html",
        "study_0_0.png",
        "study_0_1.png",
        "study_1_0.png",
        "study_1_1.png",
    ]
    assert len(page.all("img")) == 6


def test_the_same_question_is_drawn_once_and_another_one_anew():
    drew = []

    def draw(study, *arguments, **options):
        drew.append((study, *arguments, options))
        return drawn()

    pictures, study = report.Pictures(), make_study()
    first = pictures("One", "What it shows.", draw, study, "x", file="one.png", trials=5)
    assert pictures("Two", "Else.", draw, study, "x", trials=5) is first
    assert (first.file, first.title, first.alt) == ("one.png", "One", "What it shows.")
    others = [
        pictures("Three", "Else.", draw, study, "y", trials=5),
        pictures("Four", "Else.", draw, study, "x", trials=6),
        pictures("Five", "Else.", draw, make_study(), "x", trials=5),
    ]
    assert [figure.file for figure in others] == ["figure_1.png", "figure_2.png", "figure_3.png"]
    assert [asked[1:] for asked in drew] == [
        ("x", {"trials": 5}),
        ("y", {"trials": 5}),
        ("x", {"trials": 6}),
        ("x", {"trials": 5}),
    ]


def test_a_plot_that_a_decision_shows_is_linked_from_its_study(tmp_path, monkeypatch):
    studies = [make_study(), make_study()]
    pictures = report.Pictures()
    shown = [*report.axis_figures(studies[0], pictures), *make_decision().figures]
    again = [*report.axis_figures(studies[0], pictures)]
    saved = []
    draw = report.draw_figure
    monkeypatch.setattr(report, "draw_figure", lambda *a: saved.append(a[0]) or draw(*a))
    path, page = recipe_page(
        tmp_path,
        decisions=[make_decision("Rate", figures=shown), make_decision("Steps", figures=again)],
        studies=list(zip(("Round 1", "Round 2"), studies, strict=True)),
        pictures=pictures,
    )
    assert [name for name in saved if name != "figure_0.png"] == [
        "curves.png",
        "axis_0.png",
        "curves.png",
    ]
    pngs = ["decision_0_0", "decision_0_1", "study_0_0", "study_1_0", "study_1_1"]
    assert sorted(p.stem for p in path.parent.glob("*.png")) == pngs
    assert len(page.all("img")) == 5
    text = " ".join(" ".join(page.texts).split())
    title = "valid/loss against learning_rate"
    assert text.count(title) == 4  # above both plots, and in both links to the first
    assert text.count(f"Plot shown above: {title} .") == 2
    assert [a["href"] for a in page.all("a")].count("#decision-1") == 4


def test_a_page_of_the_pipeline_shows_no_picture_twice(tmp_path):
    decision = Finding("decided", "info", "Decided.", {}, "A section")
    names = {parts.LEARNING_RATE_CHAPTER: "sweep_0", parts.ROUND_1: "search"}
    chapters = [
        parts.Chapter(chapter, decision, Verdict(None, (), {name: make_study()}, 60))
        for chapter, name in {**names, parts.RETRAIN: "retrain"}.items()
    ]
    recipe = parts.Recipe(
        workload=None,
        pipeline=parts.Pipeline(None, None),
        optimizer_name="sgd",
        point=None,
        num_steps=20,
        eval_every=10,
        objective="valid/loss",
        maximize=False,
        values=np.array([]),
        chapters=tuple(chapters),
        total_budget=180,
        params=None,
        model_state=None,
        key=None,
    )
    page = Page(tuning.write_recipe_report(recipe, tmp_path).read_text("utf-8"))
    kinds = [image["alt"].partition(":")[0] for image in page.all("img")]
    # The sweep's axis, the round's axis, curves and best steps, the retrained curves; then what
    # no decision showed: the sweep's curves, and the axis of what was retrained.
    assert kinds == [
        "Scatter plot",
        "Scatter plot",
        "Line plot",
        "Histogram",
        "Line plot",
        "Line plot",
        "Scatter plot",
    ]
    assert len(list(tmp_path.glob("*.png"))) == 7


def test_a_recipe_page_says_so_when_there_is_none_and_leaves_out_what_is_empty(tmp_path):
    _, page = recipe_page(tmp_path, recipe=None, decisions=[], studies=[], facts=[], budget=None)
    assert [s["id"] for s in page.all("section")] == ["recipe"]
    assert "There is none: the decisions say why." in " ".join(page.texts)
    assert not [a for a in page.all("a") if "download" in a]


def test_long_tables_of_trials_say_how_many_are_left_out(tmp_path):
    study = Study.from_arrays(
        {"learning_rate": np.geomspace(0.01, 1.0, 73)},
        {"valid/loss": np.linspace(1.0, 2.0, 73)[:, None] - np.array([[0.0, 0.5]])},
        np.array([0, 10]),
        objective="valid/loss",
    )
    _, page = recipe_page(tmp_path, studies=[("Round 1", study)], decisions=[], budget=None)
    text = " ".join(" ".join(page.texts).split())
    assert "The best 50 of 73 trials" in text
    assert "23 further trials are left out here" in text
    assert len(page.all("tr")) - 50 == len(Page(_no_trials(text_of(tmp_path))).all("tr"))
    path = report.write_report(study, tmp_path)
    text = path.read_text("utf-8")
    assert "All 73 trials, the best first" in text
    assert "left out" not in text


def text_of(folder):
    return (folder / "report.html").read_text("utf-8")


def _no_trials(text):
    """The page without the rows of its table of trials."""
    return re.sub('(?s)(<table class="trials">.*?<tbody>).*?</tbody>', r"\1</tbody>", text)


def test_what_a_recipe_shows_is_what_runs(tmp_path):
    """Letters that reorder or hide others are escapes, in the page and in what it saves."""
    source = "a = 'x\u202e\u2066'\r\nb\x00 = 2  # ü\n"
    path, page = recipe_page(tmp_path, recipe=source, decisions=[], studies=[], budget=None)
    shown = "a = 'x\\u202e\\u2066'\nb\\x00 = 2  # ü\n"
    assert shown in "".join(page.texts)
    (saved,) = [a for a in page.all("a") if "download" in a]
    assert saved["download"] == "recipe.py"
    assert base64.b64decode(saved["href"].partition(",")[2]).decode() == shown
    assert "\u202e" not in path.read_text("utf-8")


@pytest.mark.parametrize(
    "name", ["\ud800half", "\x00zero", "two\nlines\nof\ntext", "漢字", "مرحبا\u202e", "W" * 3000]
)
def test_any_name_can_be_drawn_and_written(name, tmp_path):
    study = make_study(name + "/loss", name)
    path = report.write_report(study, tmp_path)
    wanted = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in f"{name}/loss")
    assert f"best {wanted}" in path.read_text("utf-8")
    width, height = (int(Page(text_of(tmp_path)).all("img")[0][k]) for k in ("width", "height"))
    assert 300 < width < 2000
    assert 300 < height < 2000


def test_labels_of_a_categorical_axis_are_cut_as_all_names_are():
    space = SearchSpace({"decay": Categorical(["a" * 500, "\ud800", "b"])})
    study = Study.from_arrays(
        {"decay": np.array([0, 1, 2])},
        {"valid/loss": np.array([[2.0, 1.0], [2.0, 0.5], [2.0, 0.7]])},
        np.array([0, 10]),
        objective="valid/loss",
        space=space,
    )
    seen = []
    draw = report.plots.plot_axis
    picture = report.draw_figure(
        "x.png", "t", "a", lambda: seen.append(draw(study, "decay")) or seen[0]
    )
    assert picture.size[0] < 3000
    labels = [tick.get_text() for tick in seen[0].get_xticklabels()]
    assert labels == ["a" * 19 + "…", "\\ud800", "b"]


def test_a_wide_drawing_is_a_wide_figure():
    def draw(width):
        return pyplot.subplots(figsize=(width, 3.0))[1]

    asked = [(6.0, True), (7.0, False), (7.0, True), (15.0, False)]
    figures = [report.draw_figure("x.png", "t", "a", lambda w=w: draw(w), x) for w, x in asked]
    assert [figure.wide for figure in figures] == [False, False, True, True]
    # Tight, so that the size is nearly, not exactly, the paper's; a narrow one has less of it.
    np.testing.assert_allclose([f.size[0] / 130 for f in figures], [4.8, 5.6, 7, 15], rtol=0.2)


def test_no_name_reaches_tex():
    """A matplotlibrc may turn TeX on, which reads files and can run programs."""
    seen = []
    with matplotlib.rc_context({"text.usetex": True}):
        report.draw_figure(
            "x.png", "t", "a", lambda: seen.append(matplotlib.rcParams["text.usetex"]) or drawn()
        )
    assert seen == [False]


WATCHED = []


@functools.cache
def watch():
    """Lists what Python is asked to do, in `WATCHED`, for as long as a list is there."""

    def hook(event, arguments):
        if WATCHED:
            WATCHED[0].append((event, arguments))

    sys.addaudithook(hook)


def written_paths(events):
    """The files that were opened for writing, made, moved or removed."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for event, arguments in events:
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & writing:
            yield os.fsdecode(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            yield from map(os.fsdecode, arguments[:2])
        elif event in ("os.mkdir", "os.remove", "os.chmod", "os.truncate", "os.rmdir"):
            yield os.fsdecode(arguments[0])


def test_a_page_from_an_untrusted_study_runs_nothing_and_writes_nowhere_else(tmp_path):
    names = ["../../escaped", "/tmp/escaped", "__import__('os').system('true')", "{{ 7 * 7 }}"]
    rates = np.geomspace(0.01, 1.0, 6)
    rows = np.array([[2.0, 1.0 + i / 10] for i in range(6)])
    study = Study.from_arrays(
        dict.fromkeys(names, rates),
        {"../escaped": rows, "x; touch escaped": rows},
        np.array([0, 10]),
        objective="../escaped",
        name=names[2],
    )
    study.save(tmp_path / "study")
    write = functools.partial(report.write_report, recipe=names[2])
    # What is imported and cached at first is not this page's doing.
    write(study, tmp_path / "first")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    watch()
    WATCHED.append([])
    try:
        write(load_study(tmp_path / "study"), tmp_path / "page")
    finally:
        events = WATCHED.pop()
    inside = [os.path.realpath(path) for path in written_paths(events)]
    page = str((tmp_path / "page").resolve())
    assert len(inside) > 8
    assert {path for path in inside if not f"{path}/".startswith(f"{page}/")} == set()
    started = ("subprocess", "os.system", "os.exec", "os.spawn", "os.posix", "socket", "pickle")
    assert [event for event, _ in events if event.startswith(started)] == []
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if not f"{p}/".startswith(page)}
    assert after == before
    text = text_of(tmp_path / "page")
    assert "{{ 7 * 7 }}" in text
    assert all(p.suffix in (".html", ".png") for p in (tmp_path / "page").iterdir())


@pytest.mark.parametrize("file", ["../escaped.png", "/tmp/escaped.png", "a/b.png"])
def test_a_picture_is_written_into_the_directory_or_not_at_all(file, tmp_path):
    picture = dataclasses.replace(make_decision().figures[0], file=file)
    folder = tmp_path / "page"
    with pytest.raises(ValueError, match="Give a name without a path"):
        report.write_chapter("n", "t", "h", "t", [make_decision(figures=[picture])], folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["page"]


# Where a page cannot be written -------------------------------------------------------------------


@pytest.fixture
def drawing_is_a_mistake(monkeypatch):
    def draw(*arguments, **options):
        raise AssertionError("it draws")

    monkeypatch.setattr(report, "draw_figure", draw)


def write_study(folder):
    return report.write_report(make_study(), folder)


def write_recipe(folder):
    return report.write_recipe(
        name="digits",
        headline="Adam at 0.01.",
        trust="Five seeds agree.",
        recipe="optimizer = pbx.adam(0.01)",
        facts=[],
        decisions=[],
        studies=[("Round 1", make_study())],
        directory=folder,
    )


def write_tuned(folder):
    decision = Finding("decided", "info", "Decided.", {}, "A section")
    verdict = Verdict(None, (), {"sweep_0": make_study()}, 60)
    recipe = parts.Recipe(
        workload=None,
        pipeline=parts.Pipeline(None, None),
        optimizer_name="sgd",
        point=None,
        num_steps=20,
        eval_every=10,
        objective="valid/loss",
        maximize=False,
        values=np.array([]),
        chapters=(parts.Chapter(parts.LEARNING_RATE_CHAPTER, decision, verdict),),
        total_budget=180,
        params=None,
        model_state=None,
        key=None,
    )
    return tuning.write_recipe_report(recipe, folder)


def tuned(*decided, seen=()):
    """A recipe of two seeds whose last chapter decided and saw such things."""
    work = Workload(
        name="square",
        init=lambda key: ({"w": np.ones(2, np.float32)}, {}),
        loss=lambda params, state, batch, key: ((params["w"] ** 2).sum(), (state, {})),
        batch=lambda data, key, step: (),
        evaluate=lambda params, state, data: {"valid/loss": (params["w"] ** 2).sum()},
        objective="valid/loss",
    )
    chapter = [
        parts.Chapter(parts.RETRAIN, decision, Verdict(None, tuple(seen), {}, 0))
        for decision in decided
    ]
    return parts.Recipe(
        workload=work,
        pipeline=parts.Pipeline(None, parts.cosine),
        optimizer_name="sgd",
        point={"learning_rate": 0.5},
        num_steps=20,
        eval_every=10,
        objective="valid/loss",
        maximize=False,
        values=np.array([0.25, 0.75]),
        chapters=tuple(chapter),
        total_budget=180,
        params=None,
        model_state=None,
        key=jax.random.key(0),
    )


def test_the_headline_and_its_colour_follow_what_there_is_against_the_recipe(tmp_path):
    fine = Finding("decided_retrain", "info", "Number 0 is best.", {}, "A section")
    few = dataclasses.replace(fine, severity="warning", message="One seed only.")
    none = Finding("no_slope", "error", "The sweep has no slope.", {}, "A section", "Widen it.")
    other = Finding("no_perfect_fit", "warning", "No trial fits.", {}, "A section")

    def told(name, recipe):
        page = Page(tuning.write_recipe_report(recipe, tmp_path / name).read_text("utf-8"))
        assert tuning.recipe_headline(recipe)[0] in page.texts
        return *tuning.recipe_headline(recipe), verdict_of(page)

    headline, trust, colour = told("fine", tuned(fine, seen=[other]))
    assert headline == "Tuned: valid/loss = 0.5 on average over 2 seeds."
    assert trust.startswith("Seeds that it was not tuned on gave 0.25 to 0.75, standard deviation")
    assert colour == ["info"]
    headline, trust, colour = told("few", tuned(few))
    assert headline.startswith("Tuned: ")
    assert "Before you trust it: One seed only. It took" in trust
    assert colour == ["warning"]
    headline, trust, colour = told("none", tuned(few, seen=[none]))
    assert headline == "Not tuned: The sweep has no slope."
    assert trust.startswith("Widen it. What was trained reached valid/loss = 0.5 on average over 2")
    assert colour == ["error"]
    said = (tmp_path / "none" / "recipe.py").read_text().splitlines()
    assert said[0].startswith("# square, not tuned: ")
    assert said[2:4] == ["# error: The sweep has no slope.", "# warning: One seed only."]


def test_a_trial_has_the_number_of_the_study_in_the_table_of_candidates():
    study = Study.from_arrays(
        {"learning_rate": [0.1, 0.2]},
        {"loss": [[[3.0, 1.0], [3.0, 2.0]], [[3.0, 2.0], [3.0, 3.0]]]},
        [0, 10],
        objective="loss",
    )
    decision = Finding("decided", "info", "Decided.", {}, "A section")
    verdict = Verdict(None, (), {"retrain": study}, 40)
    table = tuning._table(parts.Chapter(parts.RETRAIN, decision, verdict))
    assert table.header[0] == "trial"
    assert [row[0] for row in table.rows] == ["0", "1"]
    assert report.verdict(study, [])[0].startswith("The best of 2 trials is trial 0: ")


def write_stability(folder):
    sweep = Verdict(None, (), {"sweep": make_study()}, 60)
    answer = types.SimpleNamespace(steps={stability.SWEEP: sweep}, comparison=None)
    verdict = Verdict(answer, (), sweep.studies, 60)
    return chapters.write_stability_report(verdict, folder)


WRITERS = [write_study, write_recipe, write_tuned, write_stability]


@pytest.mark.usefixtures("drawing_is_a_mistake")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("where", ["page", "page/below"])
def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_drawn(tmp_path, write, where):
    (tmp_path / "page").write_text("mine")
    with pytest.raises(storage.NotWritable, match=re.escape(str(tmp_path / where))):
        write(tmp_path / where)
    assert (tmp_path / "page").read_text() == "mine"


@pytest.mark.usefixtures("drawing_is_a_mistake")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "name",
    [
        *("report.html", "recipe.py", "axis_0.png", "axis_12.png", "curves.png", "figure_0.png"),
        *("gradient_norms.png", "decision_1_0.png", "study_10_12.png"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_drawn(tmp_path, write, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(storage.NotWritable, match=re.escape(str(tmp_path / name))):
        write(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == [name, "mine"]


@pytest.mark.usefixtures("drawing_is_a_mistake")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_takes_no_file_is_told_before_anything_is_drawn(
    tmp_path, write, code, monkeypatch
):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(storage.NotWritable, match=re.escape(str(tmp_path))) as caught:
        write(tmp_path)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert ("the disk is full" if full else os.strerror(code)) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_that_a_page_does_not_have_are_free(tmp_path):
    for name in ("reports.html", "axis.png", "xcurves.png", "blocks", "curves.png.d"):
        (tmp_path / name).mkdir()
    assert report.check_folder(tmp_path) == tmp_path
    assert report.check_folder(tmp_path / "new" / "folder").is_dir()


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_disk_that_fills_up_on_the_way_leaves_whole_files(tmp_path, monkeypatch, call, num):
    """The first is the probe's, then come two pictures and the page."""
    before = write_study(tmp_path / "page")
    old = {path: path.read_bytes() for path in before.parent.iterdir()}
    pictures = iter(range(2))
    monkeypatch.setattr(
        report,
        "draw_figure",
        lambda file, *_: report.Figure(file, "t", "a", b"\x89PNG%016d" % next(pictures) * 20),
    )
    count = 0

    def until_full(function, *arguments, **options):
        nonlocal count
        path = arguments[0]
        ours = call == "fsync" or ".tmp-" in os.fspath(path)
        if ours and not (call == "fsync" and stat.S_ISDIR(os.fstat(path).st_mode)):
            count += 1
            if count > num - (call == "replace"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **options)

    if call == "open":
        monkeypatch.setattr(storage, "open", functools.partial(until_full, open), raising=False)
    else:
        monkeypatch.setattr(os, call, functools.partial(until_full, getattr(os, call)))
    with pytest.raises(storage.NotWritable, match="the disk is full") as caught:
        write_study(tmp_path / "page")
    monkeypatch.undo()
    assert str(tmp_path / "page" / ["axis_0.png", "curves.png", "report.html"][num - 1]) in str(
        caught.value
    )
    new = {path: path.read_bytes() for path in before.parent.iterdir()}
    assert set(new) == set(old)
    replaced = [path.name for path in old if new[path] != old[path]]
    assert sorted(replaced) == ["axis_0.png", "curves.png"][: num - 1]
    assert all(len(new[before.parent / name]) == 400 for name in replaced)


def test_pages_honour_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        path = write_study(tmp_path / "page")
        os.umask(0o027)
        other = recipe_page(tmp_path / "other", decisions=[], studies=[])[0]
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {
        "axis_0.png": 0o600,
        "curves.png": 0o600,
        "report.html": 0o600,
    }
    assert stat.S_IMODE(other.stat().st_mode) == 0o640


# What numbers and letters can be ------------------------------------------------------------------

EXTREMES = [1e308, 1.0, 5e-324, 1e-3], [-1e308, 1e308, 0.0, 1.0], [5e-324, 1e-323, 0.0, 2e-323]


@pytest.mark.parametrize("numbers", [*EXTREMES, [1e308, 1.1e308, 1.5e308, 1.7e308]])
@pytest.mark.parametrize("what", ["rates", "losses"])
def test_the_largest_and_smallest_numbers_are_drawn(tmp_path, numbers, what):
    rates = numbers if what == "rates" else [0.1, 0.2, 0.3, 0.4]
    last = np.array(numbers if what == "losses" else [1.0, 0.5, 0.7, np.nan])
    losses = np.stack([np.where(np.isfinite(last), last, 2.0), last], axis=1)
    study = Study.from_arrays(
        {"learning_rate": np.array(rates)},
        {"valid/loss": losses, "train/loss": losses},
        np.array([0, 10]),
        objective="valid/loss",
    )
    path = report.write_report(study, tmp_path)
    best = report.shown_number(study.best().value)
    assert f"valid/loss = {best} at step" in path.read_text("utf-8")
    assert (tmp_path / "axis_0.png").read_bytes().startswith(b"\x89PNG")


def test_no_letter_of_a_study_reorders_or_hides_others_on_the_page(tmp_path):
    name = "loss\u202e\u2066\u200b\x1b[2J\ud800\u2028\u061c"
    study = make_study(f"valid/{name}", f"rate{name}")
    study = dataclasses.replace(study, spec={**study.spec, "name": name, "device_kind": name})
    finding = [Finding("code", "info", name, {name: [name]}, name, name)]
    text = report.write_report(study, tmp_path, findings=finding).read_text("utf-8")
    assert all(c.isprintable() or c in "\n\t" for c in text)
    shown = "loss\\u202e\\u2066\\u200b\\x1b[2J\\ud800\\u2028\\u061c"
    (headline,) = re.findall('<p class="headline">(.*)</p>', text)
    assert headline == f"The best of 6 trials is trial 3: valid/{shown} = 1 at step 10."
    assert f"<title>{shown}: Study report</title>" in text


def test_a_table_of_any_letters_is_written_and_runs_no_formula(tmp_path):
    labels = ["\ud800", "=1+1", "\n=1+1", "＝1+1", "é\u202e", "-"]
    study = make_study(parameter="=decay", infeasible=(False,) * 6)
    spec = {**study.spec, "labels": {"=decay": labels}}
    blocks = [{**block, "point/=decay": np.arange(6)} for block in study._blocks]
    study_from_blocks(spec, blocks).to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1] == "'=decay"
    shown = ["\\ud800", "'=1+1", "'\n=1+1", "'＝1+1", "é\u202e", "'-"]
    assert [row[1] for row in rows] == shown
