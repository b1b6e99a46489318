"""`faults.md`: every row of the acceptance catalogue names tests, and they exist."""

import ast
import pathlib
import re
import tokenize

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
# The catalogue leaves out two numbers.
ROWS = {str(number) for number in range(1, 85)} - {"73", "77"}
SECURITY = {f"S{number}" for number in range(1, 9)}

_ROW = re.compile(r"\| (\S+) \| (.+) \| (.+) \|")
_TEST = re.compile(r"`(tests/\S+\.py)::(\w+)`")
# `# 57, 60-62` or `# faults 78-80`, and perhaps a colon and words.
_CLAIM = re.compile(r"#\s*(?:faults?\s+)?(\d+(?:(?:-|,\s*)\d+)*)\s*(?::.*)?")


def table():
    """Row to what it says and its tests, (file, name)."""
    found = {}
    for line in (TESTS / "faults.md").read_text().splitlines():
        match = _ROW.fullmatch(line)
        if match and match[1] not in ("Row", "---"):
            assert match[1] not in found, f"row {match[1]} occurs twice"
            found[match[1]] = match[2], set(_TEST.findall(match[3]))
    return found


def rows_of(claim):
    """The rows that a comment names: "57, 60-62" are 57, 60, 61 and 62."""
    for part in claim.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        yield from map(str, range(int(first), int(last or first) + 1))


def functions_of(path):
    """Name, first and last line of each test of a file, decorators included."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield node.name, first, node.end_lineno


def claims(path):
    """Test and row for each comment that names a row, wherever it stands in the test."""
    functions = list(functions_of(path))
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            match = token.type == tokenize.COMMENT and _CLAIM.fullmatch(token.string)
            if match:
                for name, first, last in functions:
                    if first <= token.start[0] <= last:
                        yield from ((name, row) for row in rows_of(match[1]))


def test_every_row_of_the_catalogue_names_tests_that_exist():
    found = table()
    assert set(found) == ROWS | SECURITY
    assert [row for row, (_, tests) in found.items() if not tests] == []
    known = {}
    for row, (_, tests) in found.items():
        for file, name in tests:
            path = ROOT / file
            assert path.is_file(), f"row {row}: there is no {file}"
            if file not in known:
                known[file] = {test for test, _, _ in functions_of(path)}
            assert name in known[file], f"row {row}: {file} has no {name}"


def test_every_test_that_says_it_holds_a_row_is_in_that_row():
    found = table()
    missing = [
        f"| {row} | ... | `{path.relative_to(ROOT).as_posix()}::{name}` |"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name, row in claims(path)
        if (path.relative_to(ROOT).as_posix(), name) not in found.get(row, ("", set()))[1]
    ]
    assert missing == []


def test_claims_are_read_in_every_form(tmp_path):
    path = tmp_path / "test_toy.py"
    path.write_text(
        "@mark(\n    1,  # 5\n)\ndef test_one():  # faults 7, 60-62\n    x = 1  # 3 of them\n"
        "    y = 2  # 44: in words\n\n\ndef helper():  # 9\n    pass\n"
    )
    assert list(claims(path)) == [("test_one", row) for row in ("5", "7", "60", "61", "62", "44")]
