"""The rows: which processes each of them starts, and what is made of their seconds."""

import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed import suite
from benchmarks.speed.table import rounded
from benchmarks.speed.worker import ROOT

RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 3
LOOP_BUDGET = 60.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round of a row found.

    Attributes:
      value: the ratio, or the number that the row is about.
      seconds: of each side, on the CPU and on the wall.
      facts: what else is stored, JSON-able.
    """

    value: float
    seconds: dict[str, dict[str, float]]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      of: what the value is of: ``cpu`` or ``wall`` seconds of two sides, or ``count``.
      target: what the value should not be above, or not below.
      play: ``play(quick, number)`` plays a round; the side that begins alternates.
      at_least: the target is a lower bound.
      most_rounds: however many are asked for.
      quick: whether a quick run has it.
      needs: a library that it is left out without.
    """

    of: str
    target: float
    play: Callable[[bool, int], Round]
    at_least: bool = False
    most_rounds: int = 1000
    quick: bool = True
    needs: str | None = None

    def holds(self, value: float) -> bool:
        """Whether a value keeps the target."""
        return value >= self.target if self.at_least else value <= self.target


def child(function: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Calls a function of `sides` in a fresh process.

    Args:
      function: its name.
      **arguments: what it takes, JSON-able.

    Returns:
      What it returned, and the seconds of the whole process.

    Raises:
      RuntimeError: it failed.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "benchmarks.first_answer.sides"]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, function, json.dumps(arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{function}({arguments}) failed in its process:\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), {"cpu": cpu, "wall": wall}


def in_turns(number: int, *sides: Callable[[], Any]) -> list[Any]:
    """What the sides return, in their order; which is called first depends on the round."""
    turn = number % len(sides)
    order = [*range(turn, len(sides)), *range(turn)]
    found = {place: sides[place]() for place in order}
    return [found[place] for place in range(len(sides))]


def ratio(of: str, seconds: dict[str, dict[str, float]]) -> float:
    """The first side over the second."""
    above, below = seconds.values()
    return above[of] / below[of]


def _size(quick: bool) -> dict[str, int]:
    return {"num_trials": 4, "num_steps": 40} if quick else {"num_trials": 24, "num_steps": 200}


def _second_call(change: str) -> Callable[[bool, int], Round]:
    def play(quick: bool, number: int) -> Round:
        # So few trial-steps that training them weighs little beside compiling.
        small = _size(True) if quick else {"num_trials": 8, "num_steps": 60}
        found, _ = child("calls", change=change, **small)
        seconds = {name: found[name] for name in ("second", "first")}
        return Round(ratio("cpu", seconds), seconds)

    return play


def _over_scan(quick: bool, number: int) -> Round:
    names = ("first_study", "scan")
    sides = [lambda name=name: child(name, **_size(quick))[0] for name in names]
    seconds = dict(zip(("study", "scan"), in_turns(number, *sides), strict=True))
    return Round(ratio("cpu", seconds), seconds)


def _tuned(name: str, budget: dict[str, int], number: int) -> Round:
    labels = ("tune", "optuna")
    sides = [lambda label=label: child(label, name=name, **budget) for label in labels]
    found = dict(zip(labels, in_turns(number, *sides), strict=True))
    seconds = {label: cost for label, (_, cost) in found.items()}
    facts = {label: result for label, (result, _) in found.items()}
    return Round(ratio("cpu", seconds), seconds, {**budget, **facts})


def _tune(quick: bool, number: int) -> Round:
    return _tuned("digits_mlp", _size(quick), number)


def _tune_transformer(quick: bool, number: int) -> Round:
    from benchmarks.claims.tuning import default_budget

    name = "bytes_transformer"
    return _tuned(name, default_budget(name)._asdict(), number)


def _programs(quick: bool, number: int) -> Round:
    found, cost = child("tune", name="digits_mlp", **_size(quick))
    return Round(len(found["large"]), {"tune": cost}, found)


def _long_mlp(quick: bool, number: int) -> Round:
    size = {"num_trials": 4, "num_steps": 100} if quick else {"num_trials": 64, "num_steps": 1500}
    looped, found = in_turns(
        number,
        lambda: child("loop", **size, budget=LOOP_BUDGET)[0],
        lambda: child("second_study", **size)[0],
    )
    timed = looped.pop("trials_timed")
    seconds = {"loop": looped, "study": found["second"]}
    facts = {**size, "trials_timed": timed, "first_study": found["first"]}
    return Round(ratio("wall", seconds), seconds, facts)


ROWS = {
    "again": Row("cpu", 0.05, _second_call("again")),
    **{
        name: Row("cpu", 0.15, _second_call(name))
        for name in (
            "other_num_steps",
            "other_num_trials",
            "other_num_seeds",
            "other_range",
            "equal_optimizer",
        )
    },
    "over_scan": Row("cpu", 1.3, _over_scan),
    "tune": Row("cpu", 1.5, _tune, needs="optuna"),
    "tune_transformer": Row(
        "cpu", 0.6, _tune_transformer, most_rounds=1, quick=False, needs="optuna"
    ),
    "programs": Row("count", 3, _programs, most_rounds=1),
    "long_mlp": Row("wall", 4.5, _long_mlp, at_least=True),
}


def available(quick: bool) -> tuple[str, ...]:
    """The rows of a run whose libraries are installed."""
    return tuple(
        name
        for name, row in ROWS.items()
        if (row.quick or not quick) and (not row.needs or importlib.util.find_spec(row.needs))
    )


def result(row: Row, rounds: Sequence[Round]) -> dict[str, Any]:
    """What is stored of a row: the median of its rounds, and the last round's facts."""
    values = [played.value for played in rounds]
    middle = statistics.median(values)
    return {
        "of": row.of,
        "target": f"{'>=' if row.at_least else '<='} {row.target:g}",
        "ratio": rounded(middle),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "holds": row.holds(middle),
        "num_rounds": len(rounds),
        "seconds": {
            side: {
                of: rounded(statistics.median(played.seconds[side][of] for played in rounds))
                for of in ("cpu", "wall")
            }
            for side in rounds[0].seconds
        },
        **rounds[-1].facts,
    }


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table, in the order of `ROWS`."""
    lines = ["| row | ratio | target | holds |", "| --- | --- | --- | --- |"]
    for name in (name for name in ROWS if name in results):
        found = results[name]
        low, middle, high = (f"{found[key]:.3g}" for key in ("min", "ratio", "max"))
        span = middle if low == high else f"{middle} ({low}–{high})"
        said = "yes" if found["holds"] else "no"
        lines.append(f"| {name} ({found['of']}) | {span} | {found['target']} | {said} |")
    return "\n".join(lines)


def run(
    names: Sequence[str], num_rounds: int, quick: bool = False, path: pathlib.Path | None = None
) -> dict[str, Any]:
    """Plays rows, prints each result and stores it as soon as it is there, beside other rows'.

    Args:
      names: of the rows.
      num_rounds: rounds of each, or as many as the row has at most.
      quick: short and rough.
      path: the file of results; None for the one named after the device.

    Returns:
      What this run found, by the rows' names.
    """
    device, _ = child("device")
    kind = device["device"].lower().replace(" ", "_")
    path = path or RESULTS / f"first_answer_{kind}.json"
    stored = {**suite.header(device), "results": {}}
    if path.exists():
        found = json.loads(path.read_text())
        if found | {"results": {}} == stored:
            stored = found
        else:
            print(f"{path} is of another machine or other versions: begun anew")
    results = {}
    for name in names:
        row = ROWS[name]
        rounds = [row.play(quick, number) for number in range(min(num_rounds, row.most_rounds))]
        results[name] = {
            **result(row, rounds),
            "quick": quick,
            "commit": suite.commit(),
            "date": datetime.date.today().isoformat(),
        }
        print(name, json.dumps(results[name]), flush=True)
        stored["results"][name] = results[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored, indent=1) + "\n")
    print(markdown(results))
    print(f"written to {path}")
    return results
