"""Verdicts are given where they are true and not where they are false."""

import ast
from pathlib import Path

import pytest

import playbook_optax
from tests.truth import cases, table
from tests.truth.__main__ import PAGE

FEW = 60
HOUSE = Path(playbook_optax.__file__).parent


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_few_draws_do_not_contradict_the_target(case):
    found = table.rate(case, FEW)
    assert table.meets(case, found, FEW, sigmas=2.5), found


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_thousand_draws_meet_the_target(case):
    found = table.rate(case, 1000)
    assert table.meets(case, found, 1000), found


def texts(node, tree):
    """What a string expression can be: a constant, either of two, or what a name was set to."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return texts(node.body, tree) | texts(node.orelse, tree)
    if isinstance(node, ast.JoinedStr):  # f"{name}_check_skipped": by what an import leaves open.
        (tail,) = [part.value for part in node.values if isinstance(part, ast.Constant)]
        return {name + tail for name in unchecked()}
    if isinstance(node, ast.Name):
        set_to = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Assign) and any(getattr(t, "id", "") == node.id for t in n.targets)
        ]
        return set().union(*(texts(value, tree) for value in set_to))
    raise AssertionError(f"line {node.lineno}: what code is this?")


def unchecked():
    """Names of the checks that an import may leave open, beside what a rule finds by itself."""
    tree = ast.parse((HOUSE / "records" / "imported.py").read_text())
    (judge,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "judge"]
    keys = [key for n in ast.walk(judge) if isinstance(n, ast.Dict) for key in n.keys if key]
    return {key.value for key in keys}


def codes_of_the_analysis():
    """Every code that a function of the analysis gives to a Finding."""
    codes = set()
    for path in sorted((HOUSE / "analysis").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "id", "") not in ("Finding", "finding"):
                continue
            named = [word.value for word in node.keywords if word.arg == "code"]
            (first, *_) = named or node.args
            # The shorthand of a module passes its own argument on.
            if not (
                isinstance(first, ast.Name) and first.id == "code" and is_argument(first, tree)
            ):
                codes |= texts(first, tree)
    return codes


def is_argument(node, tree):
    """Whether a node is an argument of the function around it: a shorthand passes it on."""
    return isinstance(node, ast.Name) and any(
        isinstance(n, ast.FunctionDef)
        and n.lineno <= node.lineno <= n.end_lineno
        and node.id in [a.arg for a in n.args.args]
        for n in ast.walk(tree)
    )


def test_every_code_of_the_analysis_has_worlds_of_both_kinds():
    codes = codes_of_the_analysis()
    assert {"overfitting", "isolation_best", "best_near_boundary", "compute_bound"} <= codes
    assert {"high_loss_check_skipped", "divergence_check_skipped"} <= codes
    for holds in (True, False):
        tried = {case.says for case in cases.CASES if case.holds is holds}
        assert codes <= tried, f"{sorted(codes - tried)} have no world where they are {holds}"


def test_names_are_different_and_all_stand_on_the_page():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    page = PAGE.read_text()
    told = page[page.index(table.BEGIN) : page.index(table.END)]
    for case in cases.CASES:
        assert f"| `{case.says}` | {case.world} |" in told, case.name


def test_a_page_keeps_what_stands_around_its_table():
    text = f"before {table.BEGIN} old {table.END} after"
    once = table.between(text, "new")
    assert once == f"before {table.BEGIN}\n\nnew\n{table.END} after"
    assert table.between(once, "new") == once
