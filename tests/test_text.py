"""Text of any origin commands no terminal and is no code, wherever it is stored."""

import ast
import contextlib
import inspect
import io
import tokenize
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import playbook_optax as pbx
from playbook_optax import _checks, _text, cli
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import tune
from playbook_optax.records.storage import CorruptSpec, NotWritable
from playbook_optax.records.study import study_from_blocks
from playbook_optax.records.study_set import StudySet

# Everything that str.splitlines breaks at, controls, directions, no width, half a pair, quotes.
NASTY = (
    "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\0\x07\x1b\x9b\t\u202a\u202e\u2066\u2069\u200b\u200e"
    "\u200f\u061c\u2060\ufeff\xad\u3164\u115f\u034f\ufe0f\U000e0101\ud800\udfff'\"\\#{}$()[];:=,`"
)
CODE = [
    "__import__('os').system('touch escaped')",
    "0.1)\nimport os\nos.system('true')\n(",
    "'''", '"""', "\\", "'", '"', "{x!r}", "%s", "#", "\\N{BULLET}", "lambda: 0", "None",
]  # fmt: skip
texts = st.one_of(
    st.text(st.sampled_from(NASTY + "abc0 é漢م")),
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Zs", "Cn", "Mn"])),
    st.sampled_from(CODE),
)
named = texts.filter(bool)

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    texts,
)
literals = st.recursive(
    plain, lambda inner: st.lists(inner) | st.lists(inner).map(tuple), max_leaves=8
)


def assert_fit_for_a_terminal(text):
    for letter in text:
        assert unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), ascii(letter)
    assert "\u3164" not in text


@given(texts, st.integers(1, 40))
def test_printable_text_is_one_short_line_without_commands(text, most):
    shown = _text.printable(text, most)
    assert len(shown) <= most
    assert_fit_for_a_terminal(shown)
    assert _text.printable(shown, most) == shown
    assert len(shown.splitlines()) <= 1


def test_printable_text_shows_what_it_replaces_and_keeps_what_people_write():
    assert _text.printable("lr 学習率 معدل é 🙂 α/β") == "lr 学習率 معدل é 🙂 α/β"
    for letter in NASTY[: NASTY.index("'")]:
        assert _text.printable(f"a{letter}b") == f"a{ascii(letter)[1:-1]}b"
    assert _text.printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"
    assert _text.printable(3.5) == "3.5"
    assert len(_text.printable("x" * 10**7)) == _text.NAME


@given(literals)
def test_a_literal_is_read_back_as_what_it_was(value):
    source = _text.literal(value)
    back = ast.literal_eval(source)
    assert back == value
    assert repr(back) == repr(value)
    assert_fit_for_a_terminal(source)


class Loud(str):
    """Text that writes what it likes where its repr is asked for."""

    __slots__ = ()

    def __repr__(self):
        return "__import__('os')"


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), np.float32("-inf"), 1j, np.complex64(1), b"x", {}, {1}, ...),
        *(object(), len, int, Loud("x"), [Loud("x")], ([{}],), np.zeros(2), nested(65)),
    ],
)
def test_anything_but_plain_data_is_no_literal(value):
    with pytest.raises(ValueError, match="is not written into a program"):
        _text.literal(value)


@pytest.mark.parametrize("value", ["0.1", Loud("1"), None, [1], 1j, float("nan"), np.array([1.0])])
def test_a_numeral_is_a_finite_number(value):
    with pytest.raises(ValueError, match="is not written into a program"):
        _text.numeral(value)


# XLA lets the processor flush subnormal numbers to 0.
finite = {"allow_nan": False, "allow_infinity": False, "allow_subnormal": False}


@given(st.floats(**finite), st.floats(**finite, width=32))
def test_a_numeral_gives_the_number_back(number, short):
    assert np.float32(_text.numeral(np.float32(short))) == np.float32(short)
    told = float(_text.numeral(number))
    assert told == number or np.float32(told) == np.float32(number)
    assert _text.numeral(jnp.float32(0.1)) == _text.numeral(np.float64(0.1)) == "0.1"
    assert _text.numeral(np.bool_(True)) == "True"
    assert _text.numeral(10**400) == "1" + "0" * 400


@given(texts)
def test_an_identifier_is_one_of_ours(name):
    for known in ([], ["adam"], [name, "adam"]):
        if name in known and name.isidentifier() and name not in ("None", "lambda"):
            assert _text.identifier(name, known) == name
        else:
            with pytest.raises(ValueError, match="is not written into a program as a name"):
                _text.identifier(name, known)


def test_a_name_of_ours_that_python_cannot_read_is_none():
    for name in ("class", "a.b", "", "a b", Loud("adam"), 3):
        with pytest.raises(ValueError, match="as a name"):
            _text.identifier(name, [name, "adam"] if isinstance(name, str) else ["adam"])


# What is printed ---------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[2Jname\r\nerror: all is well\u202e\u2028\ud800"


def study_of(name, objective=None, parameter="learning_rate", labels=None):
    study = pbx.Study.from_arrays(
        {parameter: np.array([0, 1, 2])},
        {objective or "loss": np.array([[2.0, 1.0], [2.0, 0.5], [2.0, 0.7]])},
        np.array([0, 10]),
        objective=objective or "loss",
        name=name,
    )
    spec = dict(study.spec)
    if labels is not None:
        spec["labels"] = {parameter: list(labels)}
    return study_from_blocks(spec, study._blocks)


def test_findings_and_errors_of_a_file_are_fit_for_a_terminal():
    finding = Finding(HOSTILE, "info", HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, HOSTILE)
    told = [str(finding), repr(finding), finding.message, finding.suggestion, finding.section]
    told += [str(error(HOSTILE)) for error in (CorruptSpec, NotWritable)]
    told += [_checks.nearest(HOSTILE, [HOSTILE, "a"])]
    for text in told:
        assert_fit_for_a_terminal(text)
        assert "\\x1b[2Jname" in text
    assert finding.evidence == {HOSTILE: HOSTILE}
    assert len(Finding("c", "info", "x" * 10**6, {}, "s").message) == _text.PARAGRAPH
    assert len(str(CorruptSpec("x" * 10**6))) == _text.PARAGRAPH


@given(named, named, named)
@example(NASTY, NASTY, NASTY)
def test_diagnosis_and_print_of_any_names_are_fit_for_a_terminal(name, objective, parameter):
    study = study_of(name, f"m/{objective}", f"p/{parameter}")
    told = [*map(str, pbx.diagnose(study)), *map(repr, pbx.diagnose(study))]
    told += repr(study).split("\n")
    told += repr(StudySet({name[:200]: study}, objective[:200])).split("\n")
    for text in told:
        assert_fit_for_a_terminal(text)


def test_the_command_line_prints_in_one_place():
    calls = [
        (function.name, ast.unparse(call.func))
        for function in ast.walk(ast.parse(inspect.getsource(cli)))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).split(".")[-1] in ("print", "write")
    ]
    assert calls == [("_print_line", "print"), ("_print_table", "rich_console.Console().print")]


@given(texts)
@example(NASTY)
def test_every_way_to_print_of_the_command_line_is_fit_for_a_terminal(text):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        cli._print_line(text)
        cli._print_paragraph(text, "- ")
        cli._print_table([text], [[text]])
        cli._print_places(Plots=text)
        cli._print_recipe(f"x = 1  # {text}")
        cli._print_findings([Finding("code", "info", text or "-", {}, "section")])
        cli._complain(ValueError(text))
        cli._warn(UserWarning(text), UserWarning, "file.py", 1)
    for line in said.getvalue().split("\n"):
        assert_fit_for_a_terminal(line)


# What is written into a program ------------------------------------------------------------------


def strings(source):
    """The string literals of a program, in order, but for its own."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def skeleton(source):
    """All of a program but what its string literals say and how large its numbers are."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (str, int, float):
            node.value = type(node.value)()
    return ast.dump(tree)


def comments(source):
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in read if token.type == tokenize.COMMENT]


def assert_lines_are_lines(source):
    assert source.splitlines() == source.removesuffix("\n").split("\n")
    for line in source.split("\n"):
        assert_fit_for_a_terminal(line)


@given(named, named)
@example(NASTY, NASTY)
def test_the_recipe_of_a_study_holds_no_code_of_its_names(name, objective):
    source = cli.recipe_source(study_of(name, f"m/{objective}"), "sgd")
    assert skeleton(source) == skeleton(cli.recipe_source(study_of("study"), "sgd"))
    assert strings(source) == []
    assert len(comments(source)) == 1
    assert_lines_are_lines(source)


@given(st.lists(texts, min_size=3, max_size=3, unique=True), named)
def test_labels_names_and_optimizers_of_a_file_are_no_recipe(labels, name):
    assert cli.recipe_source(study_of("s", labels=labels), "sgd") is None
    assert cli.recipe_source(study_of("s", parameter=f"p/{name}"), "sgd") is None
    with pytest.raises(ValueError, match="is not written into a program as a name"):
        cli.recipe_source(study_of("s"), f"{name}()")


def test_numbers_that_are_no_literals_are_no_recipe():
    study = study_of("s")
    for bad in (np.inf, np.nan):
        blocks = [{**b, "point/learning_rate": np.array([bad, bad, bad])} for b in study._blocks]
        assert cli.recipe_source(study_from_blocks(study.spec, blocks), "sgd") is None


def workload(name, objective):
    return pbx.Workload(
        name=name,
        init=lambda key: ({"w": jnp.ones(2)}, {}),
        loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {objective: (p["w"] ** 2).sum()},
        objective=objective,
    )


def recipe_of(name, objective, point, optimizer=None, **pipeline):
    work = workload(name, objective)
    return tune.Recipe(
        workload=(lambda point: work) if optimizer is None else work,
        pipeline=tune.Pipeline(
            lambda point: pbx.sgd(0.1),
            lambda point, num_steps: lambda count: 0.1,
            5,
            1.5,
            **pipeline,
        ),
        optimizer_name=optimizer,
        point=point,
        num_steps=20,
        eval_every=10,
        objective=objective,
        maximize=False,
        values=np.array([0.5, 0.25]),
        chapters=(),
        total_budget=100,
        params=None,
        model_state=None,
        key=jax.random.key(0),
    )


@given(named, named, named)
@example(NASTY, NASTY, NASTY)
def test_the_program_of_a_recipe_holds_no_code_of_its_names(name, objective, parameter):
    def source(name, objective, parameter):
        point = {"learning_rate": 0.1, f"p/{parameter}": np.float32(0.5)}
        return recipe_of(name, objective, point).to_python()

    made, usual = source(name, objective, parameter), source("digits", "valid/loss", "decay")
    assert skeleton(made) == skeleton(usual)
    renamed = [f"p/{parameter}" if text == "p/decay" else text for text in strings(usual)]
    assert strings(made) == renamed
    assert renamed.count(f"p/{parameter}") == 2
    assert len(comments(made)) == len(comments(usual))
    assert_lines_are_lines(made)


@given(named)
def test_the_program_of_one_of_our_optimizers_takes_what_that_takes(parameter):
    point = {"learning_rate": 0.1, "b1": 0.9, f"p/{parameter}": 0.5}
    made = recipe_of("w", "loss", point, "adam").to_python()
    assert "pbx.adam(learning_rate=schedule, b1=0.9)" in made
    assert strings(made).count(f"p/{parameter}") == 1
    with pytest.raises(ValueError, match="is not written into a program as a name"):
        recipe_of("w", "loss", point, f"adam{parameter}").to_python()


@pytest.mark.parametrize("value", ["__import__('os')", float("inf"), None, [1.0]])
def test_a_point_that_is_no_number_is_no_program(value):
    recipe = recipe_of("w", "loss", {"learning_rate": 0.1, "b1": value}, "adam")
    with pytest.raises(ValueError, match="is not written into a program"):
        recipe.to_python()


@pytest.mark.parametrize("where", ["class:x", "a:lambda", "a:b\n", "a:b;c", "a b:c", "a:b:c", ":"])
def test_a_place_that_python_cannot_import_is_refused(where):
    with pytest.raises(ValueError, match="must be 'module:attribute'"):
        recipe_of("w", "loss", {"learning_rate": 0.1}).to_python(workload=where)
