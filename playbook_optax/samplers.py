"""Points in the unit cube: the randomized Halton sequence, and uniform random points.

A sampler is any function ``(key, num_points, num_dims, start=0) -> (num_points, num_dims)`` whose
coordinate j of point i depends on ``(key, i, j)`` alone. So a study can be extended, cut into
pieces or given another dimension, and the points that it already has stay the same, bit for bit.

How the Halton points are computed. A coordinate is the sum, over the digits of the index in a prime
base, of (permuted digit) x (weight of that digit). All sums are kept in 64-bit fixed point, in two
uint32 words, because integer addition gives the same bits in every order, program and device;
the only rounding is the last one, to the nearest float32. Consecutive indices share their upper
digits, so long runs add one row per ``base**k`` points to a table of the lower k digits.

So two paths give the same bits. Few points of a known key are computed in NumPy, because compiling
a program for them would take longer than all else in a small study; many points, and those of a
traced key or start, are compiled.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from playbook_optax._checks import (
    ArgumentTypeError,
    check_choice,
    check_count,
    is_traced,
    named_arguments,
)

__all__ = [
    "halton",
    "uniform",
]


def __dir__() -> list[str]:
    return sorted(__all__)


_MAX_INDEX = 2**31
_MAX_DIMS = 1000
# Digits are kept down to at least 2**-48: float32 shows all of them in any value above 2**-24.
_DIGIT_BITS = 48
_BELOW_ONE = np.float32(1 - 2**-24)
# Up to so many points are summed digit by digit, more from tables.
_FEW_POINTS = 512
# Up to so many coordinates, and Halton dimensions, are computed in NumPy.
_HOST_VALUES = 2**18
_HOST_DIMS = 256
# The generators whose fold_in hashes the last two words of a key with Threefry 2x32.
_THREEFRY = ("threefry2x32", "rbg")


@named_arguments
def halton(
    key: chex.PRNGKey,
    num_points: int,
    num_dims: int,
    start: chex.Numeric = 0,
    scramble: str = "owen",
) -> chex.Array:
    """Points of the randomized Halton sequence: quasi-random search as the playbook asks for it.

    Dimension j uses the j-th prime as its base. With ``scramble="owen"`` each digit of each
    dimension goes through its own uniform random permutation, leading zeros included (Owen 2017,
    "A randomized Halton algorithm in R"), which scrambles and shifts in one step.

    Point i, dimension j depends on ``(key, i, j)`` alone: a longer run, a later `start` or another
    dimension never changes it, not in one bit. Works eagerly, under `jax.jit` (`start` may be
    traced) and under `jax.vmap` over `key`.

    Source: "Where can I find an implementation of quasi-random search?" and
    https://arxiv.org/abs/1706.03200.

    Example:
      >>> import jax
      >>> from playbook_optax import samplers
      >>> points = samplers.halton(jax.random.key(0), num_points=8, num_dims=2)
      >>> later = samplers.halton(jax.random.key(0), num_points=4, num_dims=2, start=4)
      >>> bool((points[4:] == later).all())
      True
      >>> samplers.halton(jax.random.key(0), 4, 2, scramble="none")[:, 0].tolist()
      [0.0, 0.5, 0.25, 0.75]

    Args:
      key: a PRNG key, typed or raw, shape (); ignored by ``scramble="none"``.
      num_points: number of points, static.
      num_dims: number of dimensions, static, at most 1000.
      start: index of the first point; an integer, or a traced integer scalar.
      scramble: ``"owen"``, random permutations of the digits; ``"shift"``, a random number added to
        each digit modulo the base, independently for every dimension and digit; ``"none"``, the
        plain sequence, whose first point is the origin.

    Returns:
      float32 array, shape (num_points, num_dims), in [0, 1): the exact values (to 2**-50 for the
      first 50 dimensions), rounded to the nearest float32 and clamped below 1.

    Raises:
      ValueError: a count is not a positive integer, an index would reach 2**31, or `scramble` is
        unknown.
    """
    num_points = check_count("num_points", num_points)
    num_dims = _check_dims(num_dims)
    check_choice("scramble", scramble, ("owen", "shift", "none"))
    first = _check_start(start, num_points)
    plan = _plan(num_dims)
    few = num_points * num_dims <= _HOST_VALUES and num_dims <= _HOST_DIMS
    if few and not is_traced(first):
        if scramble == "none":
            return jax.device_put(_sum_on_host(plan.entry_value, first, plan, num_points))
        words = _known_words(key)
        if words is not None:
            digits = _permuted_on_host(words, plan, scramble)
            return jax.device_put(_sum_on_host(digits, first, plan, num_points))
    return _halton(key, first, plan, num_points=num_points, scramble=scramble)


@named_arguments
def uniform(
    key: chex.PRNGKey, num_points: int, num_dims: int, start: chex.Numeric = 0
) -> chex.Array:
    """Independent uniform random points, the playbook's fallback for quasi-random search.

    Point i, dimension j depends on ``(key, i, j)`` alone, as for `halton`.

    Source: "Where can I find an implementation of quasi-random search?".

    Example:
      >>> import jax
      >>> from playbook_optax import samplers
      >>> samplers.uniform(jax.random.key(0), num_points=8, num_dims=2).shape
      (8, 2)

    Args:
      key: a PRNG key, typed or raw, shape ().
      num_points: number of points, static.
      num_dims: number of dimensions, static, at most 1000.
      start: index of the first point; an integer, or a traced integer scalar.

    Returns:
      float32 array, shape (num_points, num_dims), multiples of 2**-24 in [0, 1).

    Raises:
      ValueError: a count is not a positive integer, or an index would reach 2**31.
    """
    num_points = check_count("num_points", num_points)
    num_dims = _check_dims(num_dims)
    first = _check_start(start, num_points)
    words = _known_words(key) if num_points * num_dims <= _HOST_VALUES else None
    if words is not None and not is_traced(first):
        dim_words = _fold_in(words, np.arange(num_dims, dtype=np.uint32))
        bits = _fold_in(dim_words, _indices(first, num_points)[:, None])[1]
        return jax.device_put((bits >> 8).astype(np.float32) * np.float32(2**-24))
    return _uniform(key, first, num_points=num_points, num_dims=num_dims)


def _check_dims(num_dims: Any) -> int:
    num_dims = check_count("num_dims", num_dims)
    if num_dims > _MAX_DIMS:
        raise ValueError(
            f"num_dims must be <= {_MAX_DIMS}, got {num_dims}. Search fewer hyperparameters at a "
            "time."
        )
    return num_dims


def _check_start(start: Any, num_points: int) -> Any:
    """The first index as a uint32 scalar of NumPy, or traced; checked as far as it is known."""
    fix = "Give the index of the first point as an integer."
    integer = isinstance(start, (int, np.integer)) and not isinstance(start, bool)
    if not integer:
        array = isinstance(start, (np.ndarray, jax.Array))
        if not array or not jnp.issubdtype(start.dtype, jnp.integer):
            raise ArgumentTypeError(
                f"start must be an integer, got {start!r} of type {type(start).__name__}. {fix}"
            )
        if np.shape(start) != ():
            raise ValueError(f"start must be a scalar, got shape {np.shape(start)}. {fix}")
    if is_traced(start):
        return start.astype(jnp.uint32)
    first = int(start)
    if not 0 <= first <= _MAX_INDEX - num_points:
        raise ValueError(
            f"start must be >= 0 and start + num_points <= 2**31, got start = {first} with "
            f"num_points = {num_points}. Use another key for more points."
        )
    return np.uint32(first)


class _Digits(NamedTuple):
    """Which table entries the digits of a list of numbers select, digit by digit."""

    base: np.ndarray  # (dim,) uint32
    first_entry: np.ndarray  # (digit, dim) int32; the last entry, a zero, where there is no digit


class _Plan(NamedTuple):
    """All that is known from the number of dimensions alone."""

    segment_dim: np.ndarray  # (segment,) int32; a segment is one digit of one dimension
    segment_digit: np.ndarray  # (segment,) int32
    segment_base: np.ndarray  # (segment,) uint32
    weight_high: np.ndarray  # (segment,) uint32; 2**64 / base**(digit + 1), rounded down
    weight_low: np.ndarray  # (segment,) uint32
    entry_segment: np.ndarray  # (entry,) int32; an entry is one value of one digit
    entry_value: np.ndarray  # (entry,) uint32
    all_digits: _Digits
    lower: _Digits  # the digits of `number % size`
    upper: _Digits  # the digits of `number // size`
    size: np.ndarray  # (dim,) uint32; base**k, at least a chunk
    table_start: np.ndarray  # (dim,) uint32; where a dimension's table of lower digits begins
    table_dim: np.ndarray  # (size + chunk of each dim, ...) int32
    table_number: np.ndarray  # likewise, uint32; 0 .. size - 1, then again from 0 for a chunk
    chunk: np.ndarray  # (chunk,) uint32; 0, 1, ...


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % p for p in found if p * p <= candidate):
            found.append(candidate)
        candidate += 1
    return found


@functools.lru_cache(maxsize=16)
def _plan(num_dims: int) -> _Plan:
    bases = _primes(num_dims)
    # Tables have at least a chunk of entries; short chunks keep them small for large bases.
    chunk = 512 if num_dims <= 31 else 128
    counts = [math.ceil(_DIGIT_BITS / math.log2(b)) for b in bases]
    lower = [max(1, math.ceil(math.log(chunk, b) - 1e-9)) for b in bases]
    segments = [(j, t) for j in range(num_dims) for t in range(counts[j])]
    sizes = np.array([bases[j] for j, _ in segments])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    entries = int(offsets[-1])
    first = np.full((max(counts) + max(lower), num_dims), entries, np.int32)
    for (j, t), at in zip(segments, offsets, strict=False):
        first[t, j] = at
    lower_first = np.full((max(lower), num_dims), entries, np.int32)
    upper_first = np.full((max(counts), num_dims), entries, np.int32)
    for j, k in enumerate(lower):
        lower_first[:k, j] = first[:k, j]
        upper_first[:, j] = first[k : k + max(counts), j]
    upper_count = max(c - k for c, k in zip(counts, lower, strict=True))
    weights = [2**64 // bases[j] ** (t + 1) for j, t in segments]
    table_size = np.array([b**k for b, k in zip(bases, lower, strict=True)], np.uint32)
    base = np.array(bases, np.uint32)
    lengths = table_size.astype(np.int64) + chunk
    return _Plan(
        segment_dim=np.array([j for j, _ in segments], np.int32),
        segment_digit=np.array([t for _, t in segments], np.int32),
        segment_base=sizes.astype(np.uint32),
        weight_high=np.array([w >> 32 for w in weights], np.uint32),
        weight_low=np.array([w & 0xFFFFFFFF for w in weights], np.uint32),
        entry_segment=np.repeat(np.arange(len(segments), dtype=np.int32), sizes),
        entry_value=(np.arange(entries) - np.repeat(offsets[:-1], sizes)).astype(np.uint32),
        all_digits=_Digits(base, first[: max(counts)]),
        lower=_Digits(base, lower_first),
        upper=_Digits(base, upper_first[:upper_count]),
        size=table_size,
        table_start=(np.cumsum(lengths) - lengths).astype(np.uint32),
        table_dim=np.repeat(np.arange(num_dims, dtype=np.int32), lengths),
        table_number=np.concatenate([np.arange(n + chunk) % n for n in table_size]).astype(
            np.uint32
        ),
        chunk=np.arange(chunk, dtype=np.uint32),
    )


@functools.partial(jax.jit, static_argnames=("num_points", "scramble"))
def _halton(
    key: chex.PRNGKey, first: chex.Array, plan: _Plan, *, num_points: int, scramble: str
) -> chex.Array:
    plan = jax.tree.map(jnp.asarray, plan)
    entries = _weigh(_permuted(key, plan, scramble), plan)
    num_dims, chunk = plan.size.shape[0], plan.chunk.shape[0]
    if num_points <= _FEW_POINTS:
        index = first + jnp.arange(num_points, dtype=jnp.uint32)
        number = jnp.repeat(index, num_dims)
        dims = jnp.tile(jnp.arange(num_dims), num_points)
        words = _sum_digits(number, dims, plan.all_digits, entries)
        return _to_float32(*words).reshape(num_points, num_dims)

    lower = _sum_digits(plan.table_number, plan.table_dim, plan.lower, entries)
    # Every table has at least a chunk of entries, so this many rows reach the last point.
    num_rows = (num_points - 1) // chunk + 3
    first_row = first // plan.size
    rows = jnp.expand_dims(first_row, 1) + jnp.arange(num_rows, dtype=jnp.uint32)[None]
    upper = _sum_digits(
        rows.reshape(-1), jnp.repeat(jnp.arange(num_dims), num_rows), plan.upper, entries
    )
    upper_high, upper_low = (word.reshape(num_dims, num_rows) for word in upper)

    def write_chunk(c: chex.Array, points: chex.Array) -> chex.Array:
        # The last chunk overlaps the one before it: the same indices give the same bits.
        begin = jnp.minimum(c * chunk, num_points - chunk)
        index = first + begin.astype(jnp.uint32)
        row = index // plan.size
        within = index - row * plan.size
        row = (row - first_row).astype(jnp.int32)
        at = (plan.table_start + within).astype(jnp.int32)
        next_row = plan.chunk[None] >= jnp.expand_dims(plan.size - within, 1)

        def table(word: chex.Array) -> chex.Array:
            return jax.vmap(lambda i: jax.lax.dynamic_slice(word, (i,), (chunk,)))(at)

        def rest(word: chex.Array) -> chex.Array:
            here = jnp.take_along_axis(word, row[:, None], axis=1)
            after = jnp.take_along_axis(word, row[:, None] + 1, axis=1)
            return jnp.where(next_row, after, here)

        words = _add((table(lower[0]), table(lower[1])), (rest(upper_high), rest(upper_low)))
        return jax.lax.dynamic_update_slice(points, _to_float32(*words).T, (begin, 0))

    points = jnp.zeros((num_points, num_dims), jnp.float32)
    return jax.lax.fori_loop(0, (num_points - 1) // chunk + 1, write_chunk, points)


def _permuted(key: chex.PRNGKey, plan: _Plan, scramble: str) -> chex.Array:
    """The digit that each entry's digit is replaced by: uint32, shape (entry,)."""
    if scramble == "none":
        return plan.entry_value
    fold = jax.vmap(jax.random.fold_in)
    dim_keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(plan.size.shape[0]))
    keys = fold(dim_keys[plan.segment_dim], plan.segment_digit)
    if scramble == "shift":
        shift = (_bits(keys) % plan.segment_base)[plan.entry_segment]
        return (plan.entry_value + shift) % plan.segment_base[plan.entry_segment]
    order = _bits(fold(keys[plan.entry_segment], plan.entry_value))
    # A stable sort of random words within each segment: a uniform permutation of its values.
    operands = [jnp.asarray(plan.entry_segment), order, jnp.asarray(plan.entry_value)]
    return jax.lax.sort(operands, num_keys=2)[2]


def _known_words(key: chex.PRNGKey) -> tuple[np.ndarray, np.ndarray] | None:
    """The words that `_fold_in` hashes, shape (1,); None if they are traced or of no use to it."""
    if is_traced(key):
        return None
    # Not a part of the caller's program, where a known key has a traced `key_data`.
    with jax.ensure_compile_time_eval():
        if jax.random.key_impl(key) not in _THREEFRY:
            return None
        data = jax.device_get(jax.random.key_data(key))
    # The compiled path says what is wrong with several keys.
    return (data[-2:-1], data[-1:]) if data.ndim == 1 else None


def _fold_in(
    words: tuple[np.ndarray, np.ndarray], data: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`jax.random.fold_in` of keys and uint32 numbers whose shapes broadcast, in NumPy."""
    schedule = (*words, words[0] ^ words[1] ^ np.uint32(0x1BD11BDA))
    a, b = words[0], words[1] + data
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = a ^ (b << turn | b >> (32 - turn))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def _permuted_on_host(
    words: tuple[np.ndarray, np.ndarray], plan: _Plan, scramble: str
) -> np.ndarray:
    """As `_permuted`, in NumPy."""
    dims = _fold_in(words, np.arange(plan.size.shape[0], dtype=np.uint32))
    a, b = (word[plan.segment_dim] for word in dims)
    a, b = _fold_in((a, b), plan.segment_digit.astype(np.uint32))
    if scramble == "shift":
        shift = (b % plan.segment_base)[plan.entry_segment]
        return (plan.entry_value + shift) % plan.segment_base[plan.entry_segment]
    entry_words = a[plan.entry_segment], b[plan.entry_segment]
    order = _fold_in(entry_words, plan.entry_value)[1]
    segment = plan.entry_segment.astype(np.uint64)
    return plan.entry_value[np.argsort(segment << 32 | order, kind="stable")]


def _indices(first: np.uint32, num_points: int) -> np.ndarray:
    return first + np.arange(num_points, dtype=np.uint32)


def _sum_on_host(digits: np.ndarray, first: np.uint32, plan: _Plan, num_points: int) -> np.ndarray:
    """The points whose digits are replaced by `digits`, in NumPy, which has 64-bit integers."""
    weight = plan.weight_high.astype(np.uint64) << 32 | plan.weight_low
    entries = np.append(digits * weight[plan.entry_segment], np.uint64(0))
    base, first_entry = plan.all_digits
    rest = np.repeat(_indices(first, num_points)[:, None], len(base), axis=1)
    total = np.zeros(rest.shape, np.uint64)
    for entry in first_entry:
        rest, digit = np.divmod(rest, base)
        total += entries[entry + digit]
    return np.minimum(total.astype(np.float32) * np.float32(2**-64), _BELOW_ONE)


def _bits(keys: chex.PRNGKey) -> chex.Array:
    """One random uint32 per key, shape (n,).

    The key's own words are used, because under vmap some generators (rbg) do not give each key its
    own numbers, while `fold_in` always hashes.
    """
    return jax.random.key_data(keys)[..., -1]


def _weigh(digits: chex.Array, plan: _Plan) -> tuple[chex.Array, chex.Array]:
    """Each entry's digit times its weight in 64-bit fixed point, and a zero at the end."""
    high = plan.weight_high[plan.entry_segment]
    low = plan.weight_low[plan.entry_segment]
    # A digit has less than 16 bits, so its product with half a word fits into a word.
    carry = (digits * (low >> 16) + ((digits * (low & 0xFFFF)) >> 16)) >> 16
    zero = jnp.zeros((1,), jnp.uint32)
    return (
        jnp.concatenate([digits * high + carry, zero]),
        jnp.concatenate([digits * low, zero]),
    )


def _sum_digits(
    number: chex.Array, dims: chex.Array, digits: _Digits, entries: tuple[chex.Array, chex.Array]
) -> tuple[chex.Array, chex.Array]:
    """Sums the entries of all digits of each number; shapes (n,), two words in and out."""
    base = digits.base[dims]

    def add_digit(t: chex.Array, carry: Any) -> Any:
        rest, words = carry
        quotient = rest // base
        # Past its last digit a number is 0, so the sum stays at the zero entry.
        at = digits.first_entry[t][dims] + (rest - quotient * base).astype(jnp.int32)
        return quotient, _add(words, (entries[0][at], entries[1][at]))

    zero = jnp.zeros_like(number)
    count = digits.first_entry.shape[0]
    return jax.lax.fori_loop(0, count, add_digit, (number, (zero, zero)))[1]


def _add(
    a: tuple[chex.Array, chex.Array], b: tuple[chex.Array, chex.Array]
) -> tuple[chex.Array, chex.Array]:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]).astype(jnp.uint32), low


def _to_float32(high: chex.Array, low: chex.Array) -> chex.Array:
    """The nearest float32 to (high * 2**32 + low) / 2**64, clamped below 1."""
    shift = jax.lax.clz(high)
    # XLA defines a shift by a whole word as 0, which is what is right for 0 and for 32.
    top = jax.lax.shift_left(high, shift) | jax.lax.shift_right_logical(low, 32 - shift)
    dropped = jax.lax.shift_left(low, shift) != 0
    # One sticky bit below 32 leading ones is all that rounding to 24 bits needs to know.
    mantissa = (top | dropped.astype(jnp.uint32)).astype(jnp.float32)
    # 2**-(32 + shift), exactly: its exponent field.
    scale = jax.lax.bitcast_convert_type((127 - 32 - shift) << 23, jnp.float32)
    return jnp.minimum(mantissa * scale, _BELOW_ONE)


@functools.partial(jax.jit, static_argnames=("num_points", "num_dims"))
def _uniform(key: chex.PRNGKey, first: chex.Array, *, num_points: int, num_dims: int) -> chex.Array:
    def column(j: chex.Array) -> chex.Array:
        dim_key = jax.random.fold_in(key, j)
        return _bits(jax.vmap(lambda i: jax.random.fold_in(dim_key, i))(index))

    index = first + jnp.arange(num_points, dtype=jnp.uint32)
    words = jax.vmap(column, out_axes=1)(jnp.arange(num_dims))
    return (words >> 8).astype(jnp.float32) * np.float32(2**-24)
