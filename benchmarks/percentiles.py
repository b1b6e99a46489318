"""How well and how fast `clip_by_percentile` follows the percentile of the norms.

Lognormal norms (sigma 0.8) that grow or shrink tenfold, many seeds at once, for the library's
window (a histogram of the last 841 to 960 norms) and for the other good candidate, the exact
percentile of the last 128 norms, kept sorted. Run: python benchmarks/percentiles.py [--quick]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from playbook_optax.norms import clip_by_percentile

SIGMA = 0.8
BEFORE, AFTER = 1000, 1000
EARLY = (50, 100, 200)
PERCENTILES = (50.0, 75.0, 90.0)
TOLERANCE = 0.15
SORTED_LENGTH = 128


def histogram_thresholds(norms, percentile):
    """The threshold after each norm: float32, shape (steps,)."""
    tx = clip_by_percentile(percentile, min_steps=1)

    def step(state, norm):
        _, state = tx.update(norm, state)
        return state, state.next_threshold

    return jax.lax.scan(step, tx.init(jnp.zeros(())), norms)[1]


def sorted_thresholds(norms, percentile):
    """The same for the exact percentile of the last 128 norms; early on, of all so far."""
    places = jnp.arange(SORTED_LENGTH)

    def step(carry, norm):
        ordered, recent, count = carry
        slot = count % SORTED_LENGTH
        # The oldest leaves its place (an empty one, infinity, early on), then the new one comes in.
        gone = jnp.argmax(ordered == recent[slot])
        ordered = jnp.where(places >= gone, jnp.append(ordered[1:], jnp.inf), ordered)
        rank = jnp.sum(ordered < norm)
        shifted = jnp.append(ordered[:1], ordered[:-1])
        ordered = jnp.where(places < rank, ordered, jnp.where(places == rank, norm, shifted))
        count += 1
        place = (jnp.minimum(count, SORTED_LENGTH) - 1) * percentile / 100
        low = ordered[jnp.floor(place).astype(jnp.int32)]
        high = ordered[jnp.ceil(place).astype(jnp.int32)]
        threshold = low + (high - low) * (place - jnp.floor(place))
        return (ordered, recent.at[slot].set(norm), count), threshold

    empty = jnp.full(SORTED_LENGTH, jnp.inf)
    return jax.lax.scan(step, (empty, empty, jnp.int32(0)), norms)[1]


METHODS = {"window of 841 to 960": histogram_thresholds, "sorted 128": sorted_thresholds}


def norms_of(num_seeds, factor):
    """Norms, shape (seeds, steps), times `factor` from step BEFORE + seed % 120 on; and that step.

    The shift meets every phase of the window's rows.
    """
    steps = BEFORE + 120 + AFTER
    log_norms = SIGMA * np.random.default_rng(0).normal(size=(num_seeds, steps))
    shift = BEFORE + np.arange(num_seeds) % 120
    shifted = np.arange(steps) >= shift[:, None]
    return np.exp(log_norms + np.log(factor) * shifted).astype(np.float32), shift


def run(num_seeds: int = 1000) -> list[dict]:
    """One row of figures per method, percentile and direction of the shift."""
    rows = []
    for name, method in METHODS.items():
        function = jax.jit(jax.vmap(method, (0, None)))
        for factor in (10.0, 0.1):
            norms, shift = norms_of(num_seeds, factor)
            jax.block_until_ready(function(norms, PERCENTILES[0]))
            for percentile in PERCENTILES:
                start = time.perf_counter()
                thresholds = np.asarray(function(norms, percentile), np.float64)
                seconds = time.perf_counter() - start
                true = np.exp(SIGMA * scipy.stats.norm.ppf(percentile / 100))
                seeds = np.arange(num_seeds)
                before = thresholds[seeds, shift - 1] / true
                # Column k: the threshold after k + 1 norms of the new size.
                since = thresholds[seeds[:, None], shift[:, None] + np.arange(AFTER)]
                since /= factor * true
                far = np.abs(np.median(since, axis=0) - 1) > TOLERANCE
                row = {"method": name, "factor": factor, "percentile": percentile}
                row["within_before"] = np.mean(np.abs(before - 1) < TOLERANCE)
                row["within_after"] = np.mean(np.abs(since[:, -1] - 1) < TOLERANCE)
                row["log_rmse"] = np.sqrt(np.mean(np.log(since[:, -1]) ** 2))
                row["lag"] = int(np.flatnonzero(far).max(initial=-1)) + 1
                for count in EARLY:
                    early = thresholds[:, count - 1] / true
                    row[f"early_{count}"] = np.mean(np.abs(early - 1) < TOLERANCE)
                    row[f"third_{count}"] = np.mean(np.abs(np.log(early)) < np.log(4 / 3))
                row["nanoseconds"] = seconds / norms.size * 1e9
                rows.append(row)
    return rows


def main() -> None:
    print("within: share of seeds whose threshold is within 15% of the true percentile, before and")
    print(f"{AFTER} steps after the shift; lag: steps until the median threshold is; early: share")
    print("after so many norms, within 15% / within a third; ns: per norm and seed.")
    for row in run(200 if "--quick" in sys.argv else 1000):
        early = "  ".join(f"{n}: {row[f'early_{n}']:.2f}/{row[f'third_{n}']:.2f}" for n in EARLY)
        print(
            f"{row['method']:>20}  x{row['factor']:<4g} {row['percentile']:3g}th  within "
            f"{row['within_before']:.3f} {row['within_after']:.3f}  log-RMSE "
            f"{row['log_rmse']:.3f}  lag {row['lag']:4d}  early {early}  "
            f"{row['nanoseconds']:.0f} ns",
            flush=True,
        )


if __name__ == "__main__":
    main()
