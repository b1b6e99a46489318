"""What is printed, and what a notebook shows: short whatever it holds, and never a command."""

import html.parser
import importlib
import inspect
import math
import pkgutil
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import _shown, analysis, procedures
from playbook_optax.procedures import tune
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.runner.preflight import Preflight, Timing

HOSTILE = "<script>alert('1')</script>\x1b[2J\u202e\ud800\r\n\"&"
LONG = "x" * 5000
NAN = float("nan")


def study(num_trials=1000, name=HOSTILE, value=None):
    values = np.geomspace(1e-3, 1e3, num_trials * 4).reshape(num_trials, 4)
    values = values if value is None else np.full_like(values, value)
    points = {f"{HOSTILE}{i}": np.linspace(0, 1, num_trials) for i in range(30)}
    points[LONG] = np.arange(num_trials)
    return pbx.Study.from_arrays(
        points, {f"{name}/loss": values}, np.arange(4) * 10, objective=f"{name}/loss", name=name
    )


def findings(count):
    return tuple(
        pbx.Finding(f"code_{i}", "warning", f"{HOSTILE} {LONG}", {"x": i}, HOSTILE, LONG)
        for i in range(count)
    )


def recipe(count=6):
    big = study()
    chapters = tuple(
        tune.Chapter(
            name, findings(1)[0], Verdict({"a": np.zeros((9, 9))}, findings(50), {LONG: big}, 7)
        )
        for name in tune.CHAPTERS[:count]
    )
    return tune.Recipe(
        workload=tiny.quadratic(),
        pipeline=tune.Pipeline(tiny.sgd, None, 5, 0.5),
        optimizer_name=None,
        point=dict.fromkeys(big.points, 0.1),
        num_steps=100,
        eval_every=5,
        objective=HOSTILE + LONG,
        maximize=False,
        values=np.linspace(0, 1, 1000),
        chapters=chapters,
        total_budget=10**9,
        params={"w": np.zeros((1000, 1000))},
        model_state={},
        key=jax.random.key(0),
    )


def norm_state(lead=()):
    state = pbx.clip_by_percentile(name=HOSTILE).init({"w": jnp.ones(3)})
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*lead, *leaf.shape)), state)


def workload():
    data = {f"{LONG}{i}": np.zeros((1000, 7), np.float32) for i in range(40)}
    return pbx.Workload(
        name=HOSTILE * 50,
        init=tiny.quadratic().init,
        loss=tiny.quadratic().loss,
        batch=lambda data, key, step: data,
        evaluate=tiny.quadratic().evaluate,
        objective=LONG,
        data=data,
        test_data=data,
        evaluate_test=optax.sgd,
    )


def preflight():
    timing = Timing(8, 1.0, 2.0, 3.0, 2**33, 5.0)
    return Preflight(8, 8, (timing,) * 100, 4, 2**36, 10**6, 10**9, 1e9, findings(60))


OBJECTS = {
    "verdict": lambda: Verdict(
        [np.zeros(9), LONG, HOSTILE],
        findings(60),
        {f"{HOSTILE}{i}": study(3) for i in range(40)},
        9,
    ),
    "refusal": lambda: Verdict(None, findings(1), {}, 0),
    "recipe": recipe,
    "chapter": lambda: recipe(1).chapters[0],
    "norms": lambda: pbx.norm_info(norm_state()),
    "norms of many": lambda: pbx.norm_info(norm_state((1000, 3))),
    "workload": workload,
    "studies": lambda: pbx.StudySet(
        {f"{HOSTILE}{i}": study(2) for i in range(100)}, HOSTILE, None, ("missing",) * 30
    ),
    "study": study,
    "study without numbers": lambda: study(5, value=NAN),
    "preflight": preflight,
}
IN_NOTEBOOKS = ("verdict", "refusal", "recipe", "chapter", "studies", "study", "preflight")


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_printed_fits_a_screen(name):
    shown = OBJECTS[name]()
    for text in (str(shown), repr(shown)):
        lines = text.split("\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 100
        assert all(line.isprintable() for line in lines)


class Page(html.parser.HTMLParser):
    """Its tags with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", IN_NOTEBOOKS)
def test_a_notebook_gets_a_small_table_that_runs_and_loads_nothing(name):
    page = Page(OBJECTS[name]()._repr_html_())
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {"div", "p", "strong", "table", "tr", "th", "td", "img"}
    assert sum(tag == "tr" for tag, _ in page.tags) <= 24
    assert len(page.text) < 24 * 1200
    assert page.text.isprintable()
    for _, attributes in page.tags:
        assert set(attributes) <= {"style", "scope", "alt", "src"}
        source = attributes.get("src", "data:image/png;base64,")
        assert re.fullmatch("data:image/png;base64,[A-Za-z0-9+/=]*", source)


@pytest.mark.parametrize("name", ["verdict", "recipe", "studies", "study", "chapter"])
def test_a_notebook_gets_one_picture_and_without_matplotlib_the_table_alone(name, monkeypatch):
    shown = OBJECTS[name]()
    with_picture = shown._repr_html_()
    assert with_picture.count("<img ") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    alone = shown._repr_html_()
    assert "<img" not in alone
    table = "<table>.*</table>"
    assert re.findall(table, alone) == re.findall(table, with_picture)
    assert len(re.findall(table, alone)) == 1


@pytest.mark.parametrize("value", [NAN, math.inf, 0.0, 1e300, -1e-300])
def test_a_picture_is_drawn_of_any_numbers_or_none(value):
    assert study(3, "a", value=value)._repr_html_().count("<img") == math.isfinite(value)


def test_a_picture_leaves_no_figure_open():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    pbx.StudySet({"a": study(3), "b": study(2)})._repr_html_()
    assert pyplot.get_fignums() == before


# Words --------------------------------------------------------------------------------------------


def test_a_verdict_says_answer_findings_studies_and_cost():
    seen = (pbx.Finding("healthy", "info", "All is well.", {}, "Section"),)
    small = pbx.Study.from_arrays(
        {"learning_rate": np.array([0.1])},
        {"loss": np.array([[2.0, 0.5]])},
        [0, 9],
        objective="loss",
    )
    verdict = Verdict({"rate": np.float32(0.1)}, seen, {"sweep": small}, 1234)
    assert repr(verdict) == (
        "Verdict(\n"
        "    answer={'rate': 0.1},\n"
        "    findings=['healthy'],\n"
        "    studies={'sweep': '1 trials x 9 steps'},\n"
        "    cost=1234,\n"
        ")"
    )
    assert str(verdict) == (
        "Verdict: {'rate': 0.1}\n"
        "  info   All is well. [healthy]\n"
        "  sweep  1 trials x 9 steps; best 0.5 at step 9, trial 0: learning_rate=0.1\n"
        "  cost   1,234 trial-steps"
    )
    assert str(Verdict(None, (), {}, 0)) == "Verdict: no answer\n  cost  0 trial-steps"


def test_a_recipe_says_what_to_train_and_why():
    decided = pbx.Finding("decided", "warning", "A rate of 0.1.", {}, "Section")
    made = recipe(0)
    chapter = tune.Chapter("learning_rate", decided, Verdict(0.1, (), {}, 40))
    point = {"point": {"rate": 0.1}, "objective": "loss", "values": np.array([1.0, 3.0])}
    shown = tune.dataclasses.replace(made, chapters=(chapter,), optimizer_name="adam", **point)
    assert str(shown) == (
        "Recipe for quadratic: loss = 2 ± 1.4 over 2 seeds\n"
        "  optimizer      adam\n"
        "  point          rate=0.1\n"
        "  steps          100, evaluated every 5; 5 of them warm-up; gradients clipped at a norm "
        "of 0.5\n"
        "  cost           40 of 1,000,000,000 trial-steps\n"
        "  learning_rate  warning: A rate of 0.1."
    )
    none = tune.dataclasses.replace(shown, point=None)
    assert str(none).startswith("No recipe for quadratic\n")
    assert "point={'rate': 0.1}" in repr(shown)
    assert "chapters" not in repr(shown)
    one = tune.dataclasses.replace(shown, values=np.array([1.0]))
    assert str(one).startswith("Recipe for quadratic: loss = 1 (one seed)\n")


def test_arrays_are_told_by_dtype_and_shape_and_short_ones_by_their_numbers():
    told = {
        "[1, 2.5]": np.array([1.0, 2.5]),
        "float32[5]": jnp.zeros(5),
        "float32[0,3]": jnp.zeros((0, 3)),
        "[]": np.array([]),
        "key<fry>[2]": jax.random.split(jax.random.key(0)),
        "bfloat16[1]": jnp.ones(1, jnp.bfloat16),
        "0.1": np.float32(0.1),
        "int32[7]": jax.ShapeDtypeStruct((7,), jnp.int32),
        "['a']": np.array(["a"]),
    }
    assert [_shown.brief(value) for value in told.values()] == list(told)
    seen = []
    jax.jit(lambda x: seen.append(_shown.brief({"x": x})))(jnp.zeros((2, 3)))
    assert seen == ["{'x': float32[2,3]}"]


def test_containers_are_told_by_their_first_entries():
    deep = [[[[[1]]]]]
    assert _shown.brief(deep) == "[[[[…]]]]"
    assert _shown.brief(list(range(9))) == "[0, 1, 2, 3, 4, 5, 3 more]"
    assert _shown.brief({i: i for i in range(8)}).endswith("5: 5, 2 more}")
    assert _shown.brief((1,)) == "(1)"
    assert _shown.brief({2}) == "{2}"
    assert _shown.brief(optax.EmptyState()) == "EmptyState()"
    assert _shown.brief(Timing(1, 2.0, 3.0, 4.0, 5, 6.0)).startswith("Timing(trials_per_block=1, ")
    assert _shown.brief(tiny.sgd) == "sgd"

    class Silent:
        def __repr__(self):
            raise RuntimeError

    assert _shown.brief(Silent()).endswith("Silent>")


def test_a_workload_prints_no_data():
    assert repr(tiny.quadratic()).splitlines()[-4:] == [
        "    objective='valid/loss',",
        "    data=[1, 0.1],",
        "    maximize=False,",
        ")",
    ]
    assert "…': float32[1000,7], 'xxx" in repr(workload())
    assert "test_data" not in repr(tiny.quadratic())


def test_many_rows_are_cut_before_any_is_left_out():
    rows = [(f"row {i}", "word " * 200) for i in range(11)]
    lines = _shown.as_text("title", rows).split("\n")
    assert len(lines) == 23
    assert all(sum(line.startswith(f"  row {i} ") for line in lines) == 1 for i in range(11))
    lines = _shown.as_text("title", rows * 10).split("\n")
    assert len(lines) == 24
    assert lines[-1] == "  … 88 more lines"


def outputs():
    """What analysis and procedures return, as far as it holds arrays or a row for each trial."""
    for package in (analysis, procedures):
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            for name, kind in vars(module).items():
                own = inspect.isclass(kind) and kind.__module__ == module.__name__
                if own and hasattr(kind, "_fields") and not name.startswith("_"):
                    told = " ".join(map(str, kind.__annotations__.values()))
                    if not name.endswith("Row") and re.search(r"ndarray|Row, \.\.\.", told):
                        yield pytest.param(kind, id=name)


@pytest.mark.parametrize("kind", list(outputs()))
def test_what_an_analysis_returns_prints_no_arrays(kind):
    shown = kind(*(np.arange(900) if i % 2 else (HOSTILE,) * 900 for i in range(len(kind._fields))))
    lines = repr(shown).split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith(f"{kind.__name__}(")
