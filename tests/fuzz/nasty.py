"""Random changes of JSON documents, of arrays and of files, as a stranger might make them."""

import contextlib
import hashlib
import json
import os
import re
import socket
import struct

import ml_dtypes
import numpy as np

from playbook_optax.records import storage

# Placeholders that `as_json` replaces: what Python's encoder does not write, or not so deep.
_DEEP = re.compile(r'"@deep-([0-9]+)@"')
_RAW = re.compile(r'"@raw-([^@]+)@"')

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 10**9, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1),
    *(10**30, 10**400, -(10**400), 0.5, -0.0, 1.0, 1e308, -1e308, 1e-45, 5e-324, 3.5e38),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", "x", "nan", "None", "step", "trial", "eval", "best_value", "valid/loss", "infeasible"),
    *(
        "\x1b[2J\x1b[31mred",
        "\N{RIGHT-TO-LEFT OVERRIDE}txt",
        "a\nb\r\tc",
        "\ud800",
        "\0",
        "e\u0301",
    ),
    *("=1+1", "@cmd", "../../etc/passwd", "</script><script>", "'; import os #", '"""', "{{7*7}}"),
    *("x" * 100, "ab " * 30_000, "\N{PILE OF POO}" * 50, "1e999", "params/x", "norms/counts"),
)
OTHERS = (
    *(None, True, False, [], {}, [[]], {"": 0}, [None], ["a", "b"], [1, 2, 3], {"a": {"b": []}}),
    *({"$float": "nan"}, {"$float": 1}, {"$mapping": {}}, {"$other": 1}, [0] * 1000, [True, 1]),
    *("@deep-60@", "@deep-70@", "@deep-100000@", "@raw-NaN@", "@raw-1e999@", "@raw-{}@"),
)


def as_json(document):
    """Text of a changed document, which may be no JSON any more."""
    text = json.dumps(document, allow_nan=True)
    text = _DEEP.sub(lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)
    return _RAW.sub(lambda m: m[1], text)


def anything(rng):
    return rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))


def _near(rng, value):
    """Something like a value: what a check is most likely to let pass."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), float(value)))
    if isinstance(value, int):
        changes = (value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value))
        return rng.choice((*changes, bool(value)))
    if isinstance(value, float):
        if not np.isfinite(value):
            return 0.0
        changes = (value * 1e3, -value, value * 1e300, value * 1e-320, int(value), repr(value))
        return rng.choice(changes)
    if isinstance(value, str):
        return rng.choice(
            (value + "x", value[:-1], value.upper(), [value], value * 3, value + "\0")
        )
    if isinstance(value, list):
        changes = [value + value, value[:-1], value[1:], value[::-1], value[:1], [value]]
        changes += [dict(enumerate(map(str, value[:3]))), [*value, anything(rng)], value * 50]
        shuffled = list(value)
        rng.shuffle(shuffled)
        return rng.choice((*changes, shuffled))
    if isinstance(value, dict):
        names = list(value)
        keys = {rng.choice(TEXTS): value[n] for n in names[:1]}
        return rng.choice(
            (list(value.items()), names, {**value, **keys}, dict(list(value.items())[1:]))
        )
    return anything(rng)


def change(rng, document):
    """A copy of a document, changed in one place."""
    if not isinstance(document, (dict, list)) or not document:
        return _near(rng, document) if rng.random() < 0.5 else anything(rng)
    copy = dict(document) if isinstance(document, dict) else list(document)
    places = list(copy) if isinstance(copy, dict) else range(len(copy))
    place = rng.choice(places)
    value = copy[place]
    if isinstance(value, (dict, list)) and value and rng.random() < 0.6:
        copy[place] = change(rng, value)
        return copy
    what = rng.random()
    if what < 0.35:
        copy[place] = anything(rng)
    elif what < 0.7:
        copy[place] = _near(rng, value)
    elif what < 0.8:
        del copy[place]
    elif what < 0.88:
        other = rng.choice(places)
        copy[place], copy[other] = copy[other], copy[place]
    elif isinstance(copy, dict):
        name = rng.choice((*TEXTS, *places))
        copy[name] = copy[place] if what < 0.94 else anything(rng)
        if what < 0.91 and name != place:
            del copy[place]
    else:
        copy.insert(place, anything(rng))
    return copy


def write_document(rng, path, document):
    """Writes a changed document with a checksum that fits, as its writer would or by hand."""
    content = dict(document) if isinstance(document, dict) else {"content": document}
    if rng.random() < 0.5:
        try:
            storage.write_document(path, {n: v for n, v in content.items() if n != "sha256"})
            if not re.search(rb"@(raw|deep)-", path.read_bytes()):
                return
        except (ValueError, RecursionError):
            pass
    content.pop("sha256", None)
    content.setdefault("schema_version", 1)
    with contextlib.suppress(ValueError, RecursionError):
        content = storage._encode(content, "content")
    text = as_json(content)
    if rng.random() < 0.03:  # A key twice.
        text = text.replace('"schema_version"', '"schema_version": 1, "schema_version"', 1)
    rest = ('",\n ' + text.removeprefix("{")).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(rest).hexdigest().encode()
    path.write_bytes(b'{\n "sha256": "' + digest + rest)


# Arrays -------------------------------------------------------------------------------------------

DTYPES = (
    *("bool", "int8", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32"),
    *("float64", "complex64", ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e5m2),
)


def _filled(rng, array):
    """The array with a nasty number in some place, as far as its dtype holds it."""
    number = rng.choice(NUMBERS)
    with np.errstate(all="ignore"):
        if array.dtype.kind in "iu":
            ends = np.iinfo(array.dtype)
            wanted = 0 if isinstance(number, float) and not np.isfinite(number) else int(number)
            value = min(max(wanted, ends.min), ends.max)
        else:
            value = np.asarray(min(max(number, -1e308), 1e308) if number == number else number)
            value = np.asarray(value, np.float64).astype(array.dtype)
    array = array.copy()
    if rng.random() < 0.3 or not array.size:
        array[...] = value
    else:
        array.reshape(-1)[rng.randrange(array.size)] = value
    return array


def change_array(rng, array):
    """Another array than this one."""
    what = rng.randrange(8)
    with np.errstate(all="ignore"):
        if what == 0:
            numbers = array.astype(np.complex64) if array.dtype.kind == "c" else array
            return numbers.astype(np.float32).astype(rng.choice(DTYPES))
        if what == 1:
            return array.reshape(rng.choice(((-1,), (*array.shape, 1), (1, *array.shape))))
        if what == 2:
            return array[: rng.randrange(len(array) + 1)] if array.ndim else array[None]
        if what == 3:
            return np.repeat(array, rng.choice((2, 3)), axis=rng.randrange(max(array.ndim, 1)))
        if what == 4:
            return array[..., :-1] if array.ndim > 1 else array[::-1].copy()
    return _filled(rng, array)


def change_arrays(rng, arrays):
    """A copy of a block, changed in one place."""
    copy = dict(arrays)
    names = list(copy)
    name = rng.choice(names)
    what = rng.random()
    if what < 0.7:
        copy[name] = change_array(rng, copy[name])
    elif what < 0.78:
        del copy[name]
    elif what < 0.88:
        other = rng.choice(names)
        copy[name], copy[other] = copy[other], copy[name]
    elif what < 0.94:
        new = rng.choice(("", "point/", "metrics/", "params/", "norms/")) + rng.choice(TEXTS)
        copy[new] = copy[name]
        if rng.random() < 0.5 and new != name:
            del copy[name]
    else:  # All rows of all arrays alike.
        rows = rng.choice((0, 1, 2, -1))
        copy = {n: a[:rows] if a.ndim else a for n, a in copy.items()}
    return copy


def write_header(rng, path, change_header):
    """Rewrites a block's header, with a checksum that fits.

    Args:
      rng: random numbers.
      path: the block's file.
      change_header: header to header.
    """
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[8:16])
    data = whole[16 + length : -32]
    header = as_json(change_header(json.loads(whole[16 : 16 + length])))
    raw = header.encode("utf-8", "surrogatepass")
    declared = rng.choice((len(raw),) * 9 + (0, 2**40, 2**63, len(raw) + 1))
    content = b"PBXARRAY" + struct.pack("<Q", declared) + raw + data
    path.write_bytes(content + hashlib.sha256(content).digest())


def write_sparse(rng, path):
    """Rewrites a block's header so that it declares much, in a file that is as large and empty."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[8:16])
    header = json.loads(whole[16 : 16 + length])
    grown = rng.randrange(len(header["arrays"]))
    factor = rng.choice((10**3, 10**6, 10**8, 10**10))
    end = 0
    for number, entry in enumerate(header["arrays"]):
        if number == grown or rng.random() < 0.1:
            entry["shape"] = [*entry["shape"][:-1], (*entry["shape"], 1)[-1] * factor]
            entry["nbytes"] *= factor
        entry["offset"] = -(-end // 64) * 64
        end = entry["offset"] + entry["nbytes"]
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(b"PBXARRAY" + struct.pack("<Q", len(raw)) + raw)
        try:
            file.truncate(16 + len(raw) + end + 32)
        except OSError:  # Larger than the file system has it.
            file.truncate(2**40)


# Files --------------------------------------------------------------------------------------------


def break_file(rng, path):
    """Cuts a file, flips bits of it, or puts something else in its place."""
    what = rng.randrange(9)
    whole = path.read_bytes()
    if what == 0:
        path.write_bytes(whole[: rng.randrange(len(whole) + 1)])
        return
    if what == 1:
        flipped = bytearray(whole)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        return
    if what == 2:
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 100, 10_000))))
        return
    path.unlink()
    if what == 3:
        os.mkfifo(path)
    elif what == 4:
        here = os.getcwd()
        os.chdir(path.parent)  # The name of a socket is short.
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    elif what == 5:
        path.symlink_to(path.name)
    elif what == 6:
        path.mkdir()
    elif what == 7:
        path.symlink_to("/dev/zero")
