"""The report: what is in it, in which order, and that nothing from a study becomes markup."""

import html.parser
import re

import numpy as np
import pytest

from playbook_optax import report
from playbook_optax.analysis.findings import Finding
from playbook_optax.records.study import Study
from playbook_optax.search_space import Categorical, Float, SearchSpace

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
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    assert not re.search(r"https?://|url\(|@import", path.read_text("utf-8"))


def test_sections_come_in_order_and_links_reach_them(written):
    _, page = written
    sections = [s["id"] for s in page.all("section")]
    assert sections == ["recipe", "findings", "plots", "trials", "run"]
    assert {a["href"][1:] for a in page.all("a")} == set(sections)


def test_plots_have_alternative_text_and_lie_beside_the_page(written):
    path, page = written
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "axis_0.png",
        "curves.png",
        "report.html",
    ]
    assert (path.parent / "axis_0.png").read_bytes().startswith(b"\x89PNG")
    assert [len(image["alt"]) > 40 for image in page.all("img")] == [True, True]
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))


def test_verdict_recipe_and_table_tell_the_best_trial(written):
    _, page = written
    text = " ".join(" ".join(page.texts).split())
    assert "The best of 6 trials is trial 3: valid/loss = 1 at step 10." in text
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
