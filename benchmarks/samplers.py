"""Halton points per second beside SciPy's, and the time of the first call.

Run: python -m benchmarks.samplers [--quick]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from scipy.stats import qmc

from playbook_optax import samplers


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def run(quick: bool = False) -> dict[str, Any]:
    """Measures ours and SciPy's in turns, so that a busy machine slows both.

    Args:
      quick: 1/10 of the points and fewer repeats.

    Returns:
      JSON-able: sizes, first-call seconds (compilation included), points per second of both (the
      median over the repeats) and the median of the paired ratios.
    """
    num_points, num_dims, repeats = (10**5, 16, 3) if quick else (10**6, 16, 5)
    key = jax.block_until_ready(jax.random.key(0))

    def ours() -> None:
        jax.block_until_ready(samplers.halton(key, num_points, num_dims))

    def scipys() -> None:
        qmc.Halton(num_dims, scramble=True, rng=0).random(num_points)

    def small() -> None:
        jax.block_until_ready(samplers.halton(key, 64, 3))

    first = _seconds(ours)
    pairs = [(_seconds(ours), _seconds(scipys)) for _ in range(repeats)]
    small_first = _seconds(small)
    small_later = min(_seconds(small) for _ in range(20))
    return {
        "device": jax.devices()[0].device_kind,
        "num_points": num_points,
        "num_dims": num_dims,
        "first_call_seconds": round(first, 3),
        "points_per_second": round(num_points / statistics.median(a for a, _ in pairs)),
        "scipy_points_per_second": round(num_points / statistics.median(b for _, b in pairs)),
        "ratio": round(statistics.median(b / a for a, b in pairs), 2),
        "small_first_call_seconds": round(small_first, 3),
        "small_call_seconds": round(small_later, 6),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    print(json.dumps(run(parser.parse_args().quick), indent=1))
