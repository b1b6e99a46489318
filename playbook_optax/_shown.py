"""What an object shows of itself: a few short lines for a terminal, a small table for a notebook.

Whatever it holds, no line is wider and no text longer than a screen: arrays are told by dtype and
shape, long texts are cut, and what commands a terminal or a page is escaped.
"""

import base64
import dataclasses
import html
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax._text import PARAGRAPH, printable

T = TypeVar("T")
Rows = Sequence[tuple[str, str]]

WIDTH, MOST_LINES = 96, 24
"""Letters of a line and lines of a text, at most."""
_ROW_LINES = 6
_VALUE, _STRING, _ITEMS, _SHORT_ARRAY, _DEPTH = 200, 40, 6, 4, 3


def number(value: Any) -> str:
    """A number as people read it: six significant digits at most.

    Args:
      value: a number.

    Returns:
      Its text.
    """
    return f"{float(value):.6g}"


def brief(value: Any, most: int = _VALUE) -> str:
    """A value in a few letters that look like the program that makes it.

    Args:
      value: anything; of large containers the first entries are told, of arrays the dtype and the
        shape, of objects the fields.
      most: letters, at most.

    Returns:
      One line that commands no terminal.

    Example:
      >>> brief({"rate": np.float32(0.1), "x": np.zeros((50, 2)), "names": list("abcdefgh")})
      "{'rate': 0.1, 'x': float64[50,2], 'names': ['a', 'b', 'c', 'd', 'e', 'f', 2 more]}"
    """
    return printable(_brief(value, _DEPTH), most)


def record(name: str, fields: Mapping[str, str]) -> str:
    """An object as the call that makes it, on one line or, if it is too long, a line each.

    Args:
      name: of its type.
      fields: name to text.

    Returns:
      At most 24 lines of at most 96 letters.

    Example:
      >>> record("Timing", {"width": "8", "seconds": "0.5"})
      'Timing(width=8, seconds=0.5)'
    """
    told = [f"{printable(field)}={printable(text, _VALUE)}" for field, text in fields.items()]
    short = f"{name}({', '.join(told)})"
    if len(short) <= WIDTH:
        return short
    lines = [f"    {printable(part, WIDTH - 5)}," for part in told[: MOST_LINES - 3]]
    more = [f"    {len(told) - len(lines)} more"] if len(told) > len(lines) else []
    return "\n".join([f"{name}(", *lines, *more, ")"])


def short(kind: type[T]) -> type[T]:
    """Makes a dataclass or named tuple show itself by `record`: fields, but no arrays.

    Args:
      kind: the class.

    Returns:
      The same class.

    Example:
      >>> from typing import NamedTuple
      >>> @short
      ... class Curve(NamedTuple):
      ...     step: np.ndarray
      ...     name: str
      >>> Curve(np.arange(1000), "loss")
      Curve(step=int64[1000], name='loss')
    """

    def told(self: Any) -> str:
        return record(kind.__name__, fields_of(self))

    kind.__repr__ = told  # type: ignore[method-assign]
    return kind


def fields_of(value: Any, but: Iterable[str] = ()) -> dict[str, str]:
    """The fields of a dataclass or named tuple in a few letters each.

    Args:
      value: the object.
      but: names that are left out.

    Returns:
      Name to text.
    """
    left_out = set(but)
    return {name: brief(getattr(value, name)) for name in _names(value) if name not in left_out}


def as_text(title: str, rows: Rows) -> str:
    """A title and rows below it, for a terminal.

    Args:
      title: the first line.
      rows: pairs of a name and a text.

    Returns:
      At most 24 lines of at most 96 letters.
    """
    for row_lines in range(_ROW_LINES, 0, -1):
        lines = _lines(title, rows, row_lines)
        if len(lines) <= MOST_LINES:
            return "\n".join(lines)
    more = len(lines) - MOST_LINES + 1
    return "\n".join([*lines[: MOST_LINES - 1], f"  … {more} more lines"])


def _lines(title: str, rows: Rows, row_lines: int) -> list[str]:
    """The lines of a text, so many of each row at most."""
    room = max((len(printable(name)) for name, _ in rows), default=0) + 4
    lines = textwrap.wrap(printable(title, 2 * WIDTH - 2), WIDTH, subsequent_indent="  ")
    for name, text in rows:
        lines += textwrap.wrap(
            printable(text, PARAGRAPH),
            WIDTH,
            initial_indent=f"  {printable(name)}".ljust(room),
            subsequent_indent=" " * room,
            break_on_hyphens=False,
            max_lines=row_lines,
            placeholder=" …",
        )
    return lines


def as_html(title: str, rows: Rows, picture: tuple[bytes, str] | None = None) -> str:
    """The same as a fragment of HTML in which everything is escaped.

    Args:
      title: above the table.
      rows: pairs of a name and a text.
      picture: bytes of a PNG and what it shows, if there is one.

    Returns:
      The fragment; it loads nothing and runs nothing.
    """
    cell = 'style="text-align: left; vertical-align: top"'
    shown = [*rows[: MOST_LINES - 1]]
    if len(rows) > len(shown):
        shown.append(("…", f"{len(rows) - len(shown)} more rows"))
    body = "".join(
        f'<tr><th scope="row" {cell}>{_escaped(name, 2 * WIDTH)}</th>'
        f"<td {cell}>{_escaped(text, 10 * WIDTH)}</td></tr>"
        for name, text in shown
    )
    head = f"<p><strong>{_escaped(title, 2 * WIDTH)}</strong></p>"
    return f"<div>{head}<table>{body}</table>{_image(picture)}</div>"


def _image(picture: tuple[bytes, str] | None) -> str:
    if picture is None:
        return ""
    data, told = picture
    source = base64.b64encode(data).decode("ascii")
    told = _escaped(told, 2 * WIDTH)
    return f'<p>{told}</p><img alt="{told}" src="data:image/png;base64,{source}">'


def _escaped(text: str, most: int) -> str:
    return html.escape(printable(text, most))


def _brief(value: Any, depth: int) -> str:
    if isinstance(value, str):
        most = _VALUE if depth == _DEPTH else _STRING
        return repr(value if len(value) <= most else f"{value[: most - 1]}…")
    if isinstance(value, bytes):
        return f"bytes[{len(value)}]"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset) or _has_fields(value):
        return _container(value, depth)
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    try:
        return repr(value).partition("\n")[0]
    except Exception:  # Anybody's object, which may be unable to.
        return f"<{type(value).__qualname__}>"


def _array(value: Any) -> str:
    shape, dtype = tuple(value.shape), value.dtype
    told = f"{dtype}[{','.join(map(str, shape))}]"
    if _checks.is_traced(value) or isinstance(value, jax.ShapeDtypeStruct):
        return told
    if np.prod(shape, dtype=object) > _SHORT_ARRAY or getattr(dtype, "kind", "V") not in "biufUS":
        return told
    array = np.asarray(value)
    if array.ndim == 0:
        return _brief(array.item(), 0)
    if array.ndim == 1:
        return f"[{', '.join(_brief(item, 0) for item in array.tolist())}]"
    return told


def _has_fields(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return dataclasses.is_dataclass(value) or (
        isinstance(value, tuple) and hasattr(value, "_fields")
    )


def _names(value: Any) -> tuple[str, ...]:
    """The fields of a dataclass that it shows, or of a named tuple."""
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value) if field.repr)
    fields: tuple[str, ...] = value._fields
    return fields


def _container(value: Any, depth: int) -> str:
    name, left, right = type(value).__qualname__, f"{type(value).__qualname__}(", ")"
    pairs: Iterable[tuple[str, Any]]
    if _has_fields(value):
        pairs = [(f"{field}=", getattr(value, field)) for field in _names(value)]
    elif isinstance(value, Mapping):
        left, right = ("{", "}") if type(value) is dict else (f"{name}({{", "})")
        first = itertools.islice(value, _ITEMS)
        pairs = [(f"{_brief(key, 0)}: ", value[key]) for key in first]
    else:
        left, right = "()" if isinstance(value, tuple) else "[]" if type(value) is list else "{}"
        pairs = [("", item) for item in itertools.islice(value, _ITEMS)]
    if depth == 0:
        return f"{left}…{right}"
    told = [f"{key}{_brief(item, depth - 1)}" for key, item in itertools.islice(pairs, _ITEMS)]
    size = len(list(pairs)) if left == f"{name}(" else len(value)
    more = [f"{size - len(told)} more"] if size > len(told) else []
    return f"{left}{', '.join([*told, *more])}{right}"
