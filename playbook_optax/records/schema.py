"""What a stored study promises to whatever reads it, checked in one place when it is read.

A directory may be anybody's, with checksums that fit. Here the fields of ``study.json`` and the
arrays of each block are compared with what the rest of the package takes for granted: names,
dtypes, shapes and ranges. What a block declares is judged before a byte of its data is read.
"""

import itertools
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from playbook_optax import _feasibility
from playbook_optax._checks import MAX_STEPS
from playbook_optax.records import imported, storage, weights
from playbook_optax.search_space import SearchSpace

_MAX_SEED = 2**32 - 1
_KEY_WORDS = 16
_TREES = ("params", "model_state")
_KEPT = ("none", "best", "final")
# What of `run_study`'s question beside the points only its own specs answer.
_QUESTION = ("eval_every", "independent", "keep", "key", "dtypes")
_NEEDED_ARRAYS = ("trial", "seed", "infeasible", "infeasible_step", "infeasible_reason")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


# The spec ---------------------------------------------------------------------------------------


def _is_whole(value: Any, low: int, high: int = MAX_STEPS) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that an array holds.

    Args:
      value: from a file.

    Returns:
      True for a float and for an integer of 64 bits.
    """
    return type(value) is float or _is_whole(value, -(2**63), 2**63 - 1)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_list(value: Any, each: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(map(each, value))


def _is_dict(value: Any, each: Callable[[Any], bool]) -> bool:
    return type(value) is dict and all(map(each, value.values()))


def _is_rising(value: Any, each: Callable[[Any], bool], least: int) -> bool:
    return (
        _is_list(value, each)
        and len(value) >= least
        and all(one < two for one, two in itertools.pairwise(value))
    )


def _is_key(value: Any) -> bool:
    return (
        type(value) is dict
        and set(value) == {"impl", "data"}
        and (value["impl"] is None or _is_text(value["impl"]))
        and _is_list(value["data"], lambda word: _is_whole(word, 0, _MAX_SEED))
        and 0 < len(value["data"]) <= _KEY_WORDS
    )


def _is_table(value: Any) -> bool:
    return (
        _is_dict(value, lambda column: _is_list(column, _is_finite))
        and len(set(map(len, value.values()))) == 1
    )


def _is_member(value: Any) -> bool:
    return (
        type(value) is dict
        and set(value) == {"scientific", "label", "index"}
        and _is_text(value["scientific"])
        and _is_text(value["label"])
        and _is_whole(value["index"], 0)
    )


def _is_layout(value: Any) -> bool:
    return _is_dict(
        value,
        lambda entry: (
            type(entry) is list
            and len(entry) == 2
            and _is_dtype(entry[0])
            and _is_list(entry[1], lambda size: _is_whole(size, 0))
        ),
    )


def _is_dtype(value: Any) -> bool:
    try:
        return _is_text(value) and bool(storage.stored_dtype(value))
    except ValueError:
        return False


class _Field(NamedTuple):
    """One field of the spec.

    Attributes:
      fits: whether a value is one that writers write.
      told: what those are.
      needed: whether every spec has it.
      nullable: whether it may be None.
    """

    fits: Callable[[Any], bool]
    told: str
    needed: bool = False
    nullable: bool = False


def _optional(fits: Callable[[Any], bool], told: str) -> _Field:
    return _Field(fits, told, nullable=True)


_COUNT = "an integer from {} to 2**31 - 1"
_FIELDS = {
    "name": _Field(_is_text, "text"),
    "objective": _Field(_is_text, "text", needed=True),
    "maximize": _Field(lambda v: type(v) is bool, "true or false", needed=True),
    "resolution": _Field(
        lambda v: _is_dict(v, lambda one: is_number(one) and one > 0), "numbers above 0 by name"
    ),
    "num_trials": _Field(lambda v: _is_whole(v, 0), _COUNT.format(0), needed=True),
    "planned_trials": _Field(lambda v: _is_whole(v, 0), _COUNT.format(0)),
    "num_seeds": _Field(lambda v: _is_whole(v, 1), _COUNT.format(1), needed=True),
    "num_steps": _Field(lambda v: _is_whole(v, 0), _COUNT.format(0), needed=True),
    "eval_every": _optional(lambda v: _is_whole(v, 1), _COUNT.format(1)),
    "step": _Field(
        lambda v: _is_rising(v, lambda step: _is_whole(step, 0), 1),
        "a list of rising integers from 0 to 2**31 - 1, at least one",
        needed=True,
    ),
    "independent": _Field(lambda v: type(v) is bool, "true or false"),
    "keep": _Field(lambda v: _is_text(v) and v in _KEPT, f"one of {', '.join(_KEPT)}"),
    "trials_per_block": _Field(lambda v: _is_whole(v, 1), _COUNT.format(1), needed=True),
    "key": _optional(_is_key, "impl, a text or null, and data, a list of a few uint32"),
    "space": _optional(lambda v: type(v) is dict, "a search space"),
    "labels": _optional(
        lambda v: _is_dict(v, lambda labels: _is_list(labels, _is_text) and len(labels) > 0),
        "lists of texts by name, none of them empty",
    ),
    "points": _optional(_is_table, "lists of finite numbers by name, all of one length"),
    "dtypes": _Field(lambda v: _is_dict(v, _is_dtype), "dtypes by name"),
    "norm_edges": _optional(
        lambda v: _is_rising(v, is_number, 2), "a list of at least two rising numbers"
    ),
    "trees": _optional(
        lambda v: type(v) is dict and set(v) <= set(_TREES),
        f"descriptions of {' and '.join(_TREES)}",
    ),
    "fixed": _Field(
        lambda v: _is_dict(v, lambda one: type(one) is bool or is_number(one)), "numbers by name"
    ),
    "version": _optional(lambda v: _is_text(v) or is_number(v), "text or a number"),
    "versions": _Field(lambda v: _is_dict(v, _is_text), "texts by name"),
    "device_kind": _Field(_is_text, "text"),
    "data": _optional(_is_text, "text"),
    "program": _optional(_is_text, "text"),
    "code": _optional(_is_text, "text"),
    "contents": _Field(_is_text, "text"),
    "member": _Field(_is_member, "scientific and label, which are texts, and an index"),
    "x64": _Field(lambda v: type(v) is bool, "true or false"),
    "unchecked": _Field(lambda v: _is_dict(v, _is_text), "texts by name"),
    "source": _Field(_is_text, "text"),
    "trial_ids": _Field(
        lambda v: _is_list(v, lambda one: _is_text(one) or is_number(one)),
        "a list of texts and numbers",
    ),
    "arrays": _Field(_is_layout, "a dtype and the shape of one run by name"),
}


def check_spec(spec: Mapping[str, Any]) -> None:
    """Checks every field that this package writes; others are let be.

    Args:
      spec: from `storage.read_spec`.

    Raises:
      ValueError: a field is missing or holds what no writer writes; the message names it.
    """
    for name, field in _FIELDS.items():
        if name not in spec:
            if field.needed:
                raise ValueError(f"it lacks {name!r}")
            continue
        value = spec[name]
        if value is None and field.nullable:
            continue
        if not field.fits(value):
            raise ValueError(f"{name!r} must be {field.told}, got {_REPR.repr(value)}")
    if spec["step"][-1] > spec["num_steps"]:
        raise ValueError(
            f"'step' ends at {spec['step'][-1]}, after 'num_steps' = {spec['num_steps']}"
        )
    if spec.get("planned_trials", spec["num_trials"]) < spec["num_trials"]:
        raise ValueError("'planned_trials' is below 'num_trials'")
    for what, one_per_trial in (
        *((f"points[{n!r}]", values) for n, values in (spec.get("points") or {}).items()),
        ("trial_ids", spec.get("trial_ids")),
    ):
        if one_per_trial is not None and len(one_per_trial) < spec["num_trials"]:
            raise ValueError(
                f"{what} has {len(one_per_trial)} entries, 'num_trials' is {spec['num_trials']}"
            )
    for name in spec.get("points") or {}:
        if name not in spec.get("dtypes", {}):
            raise ValueError(f"'dtypes' lacks {_REPR.repr(name)}, which 'points' has")
    space = _space(spec)
    for name in spec.get("labels") or {}:
        if space is not None and name in space:
            raise ValueError(f"'labels' has {name!r}, whose choices 'space' tells")
    paths = _weight_names(spec)
    for name, (dtype, shape) in spec.get("arrays", {}).items():
        _check_array(spec, paths, name, storage.stored_dtype(dtype), tuple(shape))
    if "arrays" in spec:
        _check_names(spec, space, paths, spec["arrays"])


def _space(spec: Mapping[str, Any]) -> SearchSpace | None:
    if spec.get("space") is None:
        return None
    try:
        return SearchSpace.from_dict(spec["space"])
    except ValueError as error:
        raise ValueError(f"'space' is no search space: {error}") from error


def _weight_names(spec: Mapping[str, Any]) -> frozenset[str]:
    """The names of the arrays of weights that a block has."""
    found: list[str] = []
    for kind, description in (spec.get("trees") or {}).items():
        try:
            found += [f"{kind}/{path}" for path in weights.leaf_paths(description)]
        except ValueError as error:
            raise ValueError(f"'trees': {error}") from error
    return frozenset(found)


# Blocks -----------------------------------------------------------------------------------------


def _is_real(dtype: np.dtype) -> bool:
    # Names such as bfloat16 have kind "V" in NumPy but are floats all the same.
    return dtype.kind in "biuf" or "float" in dtype.name


def _is_integer(dtype: np.dtype) -> bool:
    return dtype.kind in "iu"


_SCALARS: dict[str, tuple[Callable[[np.dtype], bool], str]] = {
    "trial": (_is_integer, "integers"),
    "seed": (_is_integer, "integers"),
    "infeasible": (lambda dtype: dtype.kind == "b", "booleans"),
    "infeasible_step": (_is_integer, "integers"),
    "infeasible_reason": (_is_integer, "integers"),
    "best_value": (_is_real, "real numbers"),
    "best_step": (_is_integer, "integers"),
    "norms/last": (_is_real, "real numbers"),
    "norms/max": (_is_real, "real numbers"),
    "norms/threshold": (_is_real, "real numbers"),
    "norms/num_steps": (_is_integer, "integers"),
    "norms/num_clipped": (_is_integer, "integers"),
}


def _check_array(
    spec: Mapping[str, Any],
    paths: Collection[str],
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
) -> None:
    """Raises where an array is none that a block of this study has, in dtype or shape of a run."""
    if name.startswith(tuple(f"{kind}/" for kind in _TREES)):
        if name not in paths:
            raise ValueError(f"the array {name!r} is none of the weights that 'trees' describes")
        return
    wanted: tuple[int, ...] = ()
    fits, told = _SCALARS["best_value"]
    if name in _SCALARS:
        fits, told = _SCALARS[name]
    elif name.startswith("metrics/"):
        wanted = (len(spec["step"]),)
    elif name == "norms/counts":
        if spec.get("norm_edges") is None:
            raise ValueError("there is the array 'norms/counts', but 'norm_edges' is null")
        wanted, fits, told = (len(spec["norm_edges"]) - 1,), _is_integer, "integers"
    elif not name.startswith("point/"):
        raise ValueError(f"the array {_REPR.repr(name)} is none that a block has")
    if not fits(dtype):
        raise ValueError(f"the array {_REPR.repr(name)} must hold {told}, its dtype is {dtype}")
    if shape != wanted:
        raise ValueError(
            f"the array {_REPR.repr(name)} has the shape {_REPR.repr(shape)} per run, expected "
            f"{wanted}"
        )


def _check_names(
    spec: Mapping[str, Any],
    space: SearchSpace | None,
    paths: Collection[str],
    names: Collection[str],
) -> None:
    """Raises where an array that the rest needs is missing."""
    dtypes = spec.get("dtypes", {})
    needed = (
        *_NEEDED_ARRAYS,
        f"metrics/{spec['objective']}",
        *(f"point/{n}" for n in (*(space or ()), *(spec.get("labels") or ()), *dtypes)),
        *sorted(paths),
    )
    for name in needed:
        if name not in names:
            raise ValueError(f"the array {_REPR.repr(name)} is missing")


def layout_of(spec: Mapping[str, Any]) -> storage.CheckLayout:
    """What says whether declared arrays are those of a block of this study.

    Args:
      spec: a spec that `check_spec` let pass.

    Returns:
      A function of the declared arrays for `storage.read_block`; it raises `ValueError` and names
      the array that is missing, unknown, or of another dtype or shape.
    """
    space, paths = _space(spec), _weight_names(spec)
    told, dtypes = spec.get("arrays"), spec.get("dtypes", {})
    width = spec["trials_per_block"]
    most = -(-spec["num_trials"] // width) * width * spec["num_seeds"]
    # Our runner pads each block to its width. Records from elsewhere are one block as it came.
    exact = None if "source" in spec else width

    def check(declared: Sequence[storage.Declared]) -> None:
        names = {name for name, _, _ in declared}
        _check_names(spec, space, (*paths, *(told or ())), names)
        rows = next(shape[0] if shape else 0 for name, _, shape in declared if name == "trial")
        if rows < 1 or (rows > most if exact is None else rows != exact):
            raise ValueError(
                f"it declares {rows} runs, the study has blocks of "
                f"{exact if exact is not None else f'1 to {most}'}"
            )
        for name, dtype, shape in declared:
            if shape[:1] != (rows,):
                raise ValueError(
                    f"the array {_REPR.repr(name)} has the shape {_REPR.repr(shape)}, the others "
                    f"have {rows} runs"
                )
            _check_array(spec, paths, name, dtype, shape[1:])
            if told is not None and told.get(name) != [dtype.name, list(shape[1:])]:
                raise ValueError(
                    f"the array {_REPR.repr(name)} is {dtype} {_REPR.repr(list(shape[1:]))} per "
                    f"run, 'arrays' says {_REPR.repr(told.get(name))}"
                )
            point = name.removeprefix("point/")
            if name.startswith("point/") and dtypes.get(point, dtype.name) != dtype.name:
                raise ValueError(
                    f"the array {_REPR.repr(name)} is {dtype}, 'dtypes' says {dtypes[point]}"
                )

    return check


def check_values(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Checks the numbers in a block's arrays that others use as an index, a step or a place.

    Args:
      spec: a spec that `check_spec` let pass.
      arrays: of the layout that `layout_of` let pass.

    Raises:
      ValueError: a number is out of range; the message names the array.
    """
    steps = spec["num_steps"]
    ranges = {
        "trial": (0, MAX_STEPS),
        "seed": (0, spec["num_seeds"] - 1),
        "infeasible_step": (-1, steps),
        "infeasible_reason": (0, len(_feasibility.REASONS) - 1),
        "best_step": (-1, steps),
        "norms/num_steps": (0, MAX_STEPS),
        "norms/num_clipped": (0, MAX_STEPS),
        "norms/counts": (0, MAX_STEPS),
    }
    for name, (low, high) in ranges.items():
        array = arrays.get(name, np.empty(0))
        if array.size and not low <= array.min() <= array.max() <= high:
            raise ValueError(f"the array {name!r} has numbers that are not in {low} to {high}")
    space = _space(spec)
    labels = {**imported.labels_of(space), **(spec.get("labels") or {})}
    for name, array in arrays.items():
        if name.startswith("point/"):
            imported.check_points(f"the array {_REPR.repr(name)}", array)
            point = name.removeprefix("point/")
            if point in labels:
                imported.check_indices(f"the array {_REPR.repr(name)}", array, labels[point])
            if space is not None and point in space:
                imported.check_scale(f"the array {_REPR.repr(name)}", array, space[point])


# Reading ----------------------------------------------------------------------------------------


def read_spec(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``study.json`` and checks it.

    Args:
      directory: the study directory.

    Returns:
      The spec.

    Raises:
      NoStudy, CorruptSpec, NewerFormat: as `storage.read_spec`; a spec that `check_spec` refuses is
        a CorruptSpec.
    """
    spec = storage.read_spec(directory)
    try:
        check_spec(spec)
    except ValueError as error:
        raise storage.CorruptSpec(
            f"{str(Path(directory) / 'study.json')!r} does not describe a study: {error}."
        ) from error
    return spec


def check_trainable(spec: Mapping[str, Any]) -> None:
    """Checks that a spec says all that `run_study` was asked; trials from elsewhere are a record.

    Args:
      spec: from `read_spec`.

    Raises:
      ValueError: it lacks something; the message names it.
    """
    for name in _QUESTION:
        if spec.get(name) is None:
            raise ValueError(f"it lacks {name!r}")
    if spec.get("space") is None and spec.get("points") is None:
        raise ValueError("it lacks 'space' or 'points'")


def block_reader(
    directory: str | os.PathLike[str], spec: Mapping[str, Any]
) -> Callable[[int], dict[str, np.ndarray]]:
    """What reads blocks of a study and checks them.

    Args:
      directory: the study directory.
      spec: from `read_spec`.

    Returns:
      A function of a block's index that returns its arrays. It raises as `storage.read_block`; a
      block that `layout_of` or `check_values` refuses is a CorruptBlock.
    """
    owner, check = storage.owner_of(spec), layout_of(spec)

    def read(index: int) -> dict[str, np.ndarray]:
        arrays = storage.read_block(directory, index, owner, check)
        try:
            check_values(spec, arrays)
        except ValueError as error:
            raise storage.CorruptBlock(
                f"block {index} in {os.fspath(directory)!r} is none of this study: {error}."
            ) from error
        return arrays

    return read
