"""Text of any origin: made fit for a terminal or a page, and quoted in a program.

What was read from a file may hold anything. It reaches people only through `printable`, and a
program only through `literal` and `identifier`.
"""

import keyword
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

NAME = 60
"""Letters of a name that are shown among others."""
PARAGRAPH = 4000
"""Letters of a message that are shown."""
UNBOUNDED = 2**62
"""For what is a file of its own, such as a page or a program."""

# Letters to Unicode, and yet nothing to see: fillers, joiners and selectors of variants.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f]")
_BLANK_TAGS = re.compile("[\U000e0100-\U000e01ef]")
# As deep as the files that lists come from.
_MAX_DEPTH = 64


def printable(value: Any, most: int = NAME, keep: str = "") -> str:
    r"""Text that commands no terminal, breaks no line and reorders or hides no letter.

    Control characters, line and paragraph separators of all kinds, controls of direction, letters
    without a width and halves of surrogate pairs become escapes as in Python.

    Args:
      value: text; anything else is made text first.
      most: how many letters are returned at most.
      keep: control characters that stay, such as ``"\n"`` of a program.

    Returns:
      The text; an ellipsis says that it was cut.

    Example:
      >>> printable("a\x1b[2Jb\u202e"), printable("abcdef", most=4)
      ('a\\x1b[2Jb\\u202e', 'abc…')
    """
    text = str(value)
    shown = text[: most + 1]
    if not _is_plain(shown):
        shown = "".join(c if c in keep or _is_plain(c) else _escape(c) for c in shown)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _is_plain(text: str) -> bool:
    return text.isprintable() and not _BLANK.search(text) and not _BLANK_TAGS.search(text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def literal(value: Any) -> str:
    r"""A value as source text of a program, if it is one that cannot be anything but data.

    Args:
      value: a string, integer, finite float, boolean, None or NumPy scalar of these, or a list or
        tuple of them. A NumPy float has the digits that its dtype needs.

    Returns:
      Text that `ast.literal_eval` reads as the value, in one line of printable letters.

    Raises:
      ValueError: it is anything else.

    Example:
      >>> literal("it's\n"), literal([True, None, 1e-3]), literal(np.float32(0.1))
      ('"it\'s\\n"', '[True, None, 0.001]', '0.1')
    """
    return _literal(value, _MAX_DEPTH)


def numeral(value: Any) -> str:
    """A number as source text, with as few digits as give it back.

    Args:
      value: a finite number or boolean, of Python, NumPy or JAX. One that float32 holds has the
        digits that float32 needs.

    Returns:
      Its text.

    Raises:
      ValueError: it is anything else.

    Example:
      >>> numeral(np.float64(0.1)), numeral(float(np.float32(0.1))), numeral(3)
      ('0.1', '0.1', '3')
    """
    array = np.asarray(value)
    number = array.item() if array.ndim == 0 else None
    if type(number) not in (bool, int, float):
        raise ValueError(
            f"{printable(repr(value))} is not written into a program: a number has to stand there."
        )
    if type(number) is float:
        with np.errstate(over="ignore"):
            short = np.float32(number)
        number = short if float(short) == number else number
    return literal(number)


def _literal(value: Any, depth: int) -> str:
    if isinstance(value, np.generic):
        if isinstance(value, np.floating) and np.isfinite(value):
            return str(value)
        value = value.item()
    kind = type(value)
    if value is None or kind is bool or kind is int or (kind is float and math.isfinite(value)):
        return repr(value)
    if kind is str:
        quoted = repr(value)
        return (
            quoted
            if _is_plain(quoted)
            else "".join(c if _is_plain(c) else _escape(c) for c in quoted)
        )
    if kind in (list, tuple) and depth > 0:
        parts = [_literal(item, depth - 1) for item in value]
        if kind is list:
            return f"[{', '.join(parts)}]"
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    raise ValueError(
        f"{printable(repr(value))} of type {printable(kind.__name__)} is not written into a "
        "program: only strings, finite numbers, booleans, None, and lists and tuples of them are."
    )


def identifier(name: Any, known: Iterable[str]) -> str:
    """A name as source text of a program, if it is one of ours.

    Args:
      name: what was given.
      known: the names that may stand in the program.

    Returns:
      The name.

    Raises:
      ValueError: it is none of them, or not a name to Python.

    Example:
      >>> identifier("adam", ["adam", "sgd"])
      'adam'
    """
    if type(name) is str and name in set(known) and is_dotted_name(name) and "." not in name:
        return name
    raise ValueError(
        f"{printable(repr(name))} is not written into a program as a name: it is none of "
        f"{printable(', '.join(sorted(known)), PARAGRAPH)}."
    )


def is_dotted_name(text: str) -> bool:
    """Whether text is names with dots between them, as a program imports them."""
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in text.split("."))
