"""Whether a function is still what it was, without tracing it: what it is made of, by value.

Two functions with equal identities trace alike: the same code, closed-over values, defaults and
globals, functions among them looked into. What may change without a trace of it, such as an object
of a class that we do not know, has no identity, and whoever asks has to trace. Installed packages
are taken not to change within a process.
"""

import dataclasses
import enum
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Closed-over NumPy arrays up to this size are told apart by their bytes.
_MAX_HASHED_BYTES = 2**20
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), np.dtype, enum.Enum)
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parents[1])}
)


class NoIdentity(Exception):  # noqa: N818
    """Something may have changed unseen."""


class _Same:
    """An object that equals only itself, kept alive so that nothing else gets its address."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)

    def as_text(self) -> str:
        """By value or by name."""
        value = self._value
        if isinstance(value, jax.Array):
            numbers = jax.random.key_data(value) if _is_key(value) else value
            array = np.asarray(numbers)
            return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if isinstance(value, jax.sharding.Mesh):
            raise NoIdentity
        name = getattr(value, "__qualname__", getattr(value, "__name__", None))
        named = value if isinstance(name, str) else type(value)
        return f"{getattr(named, '__module__', '')}.{name or type(value).__qualname__}"


def identity(*values: Any, skip: Callable[[Any], tuple[str, ...]] = lambda value: ()) -> Hashable:
    """What values are made of.

    Args:
      *values: functions, and whatever they may close over.
      skip: names of the fields of a frozen dataclass that do not count.

    Returns:
      A hashable; equal ones mean equal traces.

    Raises:
      NoIdentity: something in them could change without a sign of it.
    """
    return _Looker(skip).all_of(values)


def digest(*values: Any, skip: Callable[[Any], tuple[str, ...]] = lambda value: ()) -> str | None:
    """What values are made of, as text that another process or version of a library finds again.

    Args:
      *values: as in `identity`.
      skip: as in `identity`.

    Returns:
      SHA-256 in hexadecimal; None if there is no identity.
    """
    try:
        made = _as_text(identity(*values, skip=skip))
    except NoIdentity:
        return None
    return hashlib.sha256(made.encode()).hexdigest()


def _as_text(part: Any) -> str:
    """A part of an identity, with names for what is known by its address."""
    if isinstance(part, tuple):
        return f"({','.join(map(_as_text, part))})"
    if isinstance(part, frozenset):
        return f"{{{','.join(sorted(map(_as_text, part)))}}}"
    if isinstance(part, types.CodeType):
        # Neither where the code stands nor what it is called.
        counts = (part.co_argcount, part.co_posonlyargcount, part.co_kwonlyargcount, part.co_flags)
        names = (part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars)
        return f"code{_as_text((part.co_code, part.co_consts, counts, names))}"
    if isinstance(part, _Same):
        return part.as_text()
    if isinstance(part, type):
        return f"{part.__module__}.{part.__qualname__}"
    if isinstance(part, enum.Enum):
        return f"{_as_text(type(part))}.{part.name}"
    return repr(part)


class _Looker:
    def __init__(self, skip: Callable[[Any], tuple[str, ...]]) -> None:
        self._skip = skip
        self._inside: list[Any] = []
        self._classes: list[type] = []

    def all_of(self, values: Any) -> tuple[Hashable, ...]:
        return tuple(self.of(value) for value in values)

    def of(self, value: Any) -> Hashable:
        if isinstance(value, _ATOMS):
            return type(value), value
        if any(value is other for other in self._inside):
            return "recursion", next(i for i, o in enumerate(self._inside) if value is o)
        if len(self._inside) > 100:
            raise NoIdentity
        self._inside.append(value)
        try:
            return self._composed(value)
        finally:
            self._inside.pop()

    def _composed(self, value: Any) -> Hashable:
        kind = type(value)
        if isinstance(value, (types.BuiltinFunctionType, jax.Array, jax.sharding.Mesh)):
            return _Same(value)
        if isinstance(value, types.ModuleType):
            return self._module(value, ())
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return kind, self.of(value.__self__), self.of(value.__func__)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return kind, self.all_of(parts)
        if isinstance(value, (np.ndarray, np.generic)) and value.nbytes <= _MAX_HASHED_BYTES:
            array = np.asarray(value)
            digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
            if array.dtype != object:
                return kind, str(array.dtype), array.shape, digest
        if isinstance(value, (tuple, list)):
            return kind, self.all_of(value)
        if isinstance(value, (dict, types.MappingProxyType)):
            return kind, self.all_of(value), self.all_of(value.values())
        if isinstance(value, (set, frozenset)):
            return kind, frozenset(self.all_of(value))
        if dataclasses.is_dataclass(value) and _is_frozen(kind):
            left_out = self._skip(value)
            names = [f.name for f in dataclasses.fields(value) if f.name not in left_out]
            values = self.all_of(getattr(value, name) for name in names)
            return self._class(kind), self.all_of(names), values
        if kind.__module__.partition(".")[0] in ("jax", "jaxlib") and callable(value):
            # Jitted functions and those with a rule of their own, which do not change.
            return _Same(value), self.of(getattr(value, "__wrapped__", None))
        library = kind.__module__ != "builtins" and _is_library_module(kind.__module__)
        if library and vars(kind).get("__slots__") is None and getattr(value, "__dict__", 0) == {}:
            return _Same(value)  # A mark that stands for itself.
        raise NoIdentity

    def _attribute(self, value: Any) -> Hashable:
        """An attribute of a class; what a library put there, such as a descriptor, stays."""
        try:
            return self.of(value)
        except NoIdentity:
            kind = type(value)
            plain = isinstance(value, (np.ndarray, dict, list, tuple, set, types.FunctionType))
            if plain or kind.__module__ == "builtins" or not _is_library_module(kind.__module__):
                raise
            return _Same(value)

    def _function(self, function: Any) -> Hashable:
        code = function.__code__
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # Not filled yet.
            raise NoIdentity from None
        names = sorted(_names(code))
        inside = tuple(self._named(value, names) for value in cells)
        given = self.all_of((function.__defaults__, function.__kwdefaults__))
        outside: tuple[Hashable, ...] = ()
        if not _is_library(code.co_filename):
            known = [name for name in names if name in function.__globals__]
            outside = tuple(
                (name, self._named(function.__globals__[name], names)) for name in known
            )
        return code, inside, given, outside

    def _named(self, value: Any, names: Sequence[str]) -> Hashable:
        """What a function with these names in it refers to."""
        if isinstance(value, types.ModuleType):
            return self._module(value, names)
        return self.of(value)

    def _module(self, module: types.ModuleType, names: Sequence[str]) -> Hashable:
        """A module, and of one of the user's what a function may take out of it."""
        if _is_library_module(module.__name__):
            return _Same(module)
        if not names:
            raise NoIdentity
        taken = [name for name in names if name in vars(module)]
        return _Same(module), tuple((n, self._named(vars(module)[n], names)) for n in taken)

    def _class(self, kind: type) -> Hashable:
        """A class; one of the user's with its functions and plain attributes."""
        mine = [one for one in kind.__mro__ if not _is_library_module(one.__module__)]
        if any(kind is other for other in self._classes):
            return _Same(kind)
        self._classes.append(kind)
        parts = []
        for one in mine:
            for name, value in vars(one).items():
                value = getattr(value, "__func__", getattr(value, "fget", value))
                # Of what Python itself puts there only functions decide what is done.
                if isinstance(value, types.FunctionType) or not name.startswith("__"):
                    parts.append((name, self._attribute(value)))
        return _Same(kind), tuple(parts)


def _names(code: types.CodeType) -> set[str]:
    """What code names, or may look up by a string."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    strings = [one for one in code.co_consts if isinstance(one, str)]
    return set(code.co_names).union(strings, *inner)


def _is_key(array: jax.Array) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or file.startswith("<frozen")


def _is_library_module(name: str) -> bool:
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root in ("builtins", "playbook_optax"):
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and _is_library(file)


def _is_frozen(kind: type) -> bool:
    if kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return True
    linen = sys.modules.get("flax.linen")
    return linen is not None and issubclass(kind, linen.Module)
