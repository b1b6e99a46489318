"""Runs the parts of the suite and stores each result as soon as it is there."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed import table, workloads
from benchmarks.speed.roofline import mlp_flops
from benchmarks.speed.worker import ROOT, Worker

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("roofline", "steady", "cold", "features", "diverged", "scaling", "memory", "transforms")
CONTENDERS = {
    "study": ("cores", "benchmarks.speed.contenders:by_default"),
    "study_ends": ("cores", "benchmarks.speed.contenders:at_ends"),
    "loop": ("default", "benchmarks.speed.contenders:StepLoop"),
    "scan": ("default", "benchmarks.speed.contenders:ScanPerTrial"),
    "recompile": ("default", "benchmarks.speed.contenders:Recompiling"),
    "optuna": ("default", "benchmarks.speed.contenders:Optuna"),
    "torch": ("torch", "benchmarks.speed.torch_models:Eager"),
    "torch_func": ("torch", "benchmarks.speed.torch_models:Vmapped"),
}
# Each compiles anew, which takes seconds: one round is enough.
ONCE = ("recompile",)
MLP_SIZES = {"mlp": (128, (64, 128, 10)), "tiny": (16, (64, 16, 10))}
SIZES = {"mlp": 64, "cnn": 16, "lm": 8, "tiny": 64}
# Of trials of which some diverge. Small steps are trained in blocks of 8: of 64 trials each of two
# devices has four blocks, and what half of them could save is lost in rounding up.
DIVERGED_SIZES = {**SIZES, "tiny": 512}
ACCELERATOR_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      names: workloads.
      trials: numbers of trials.
      contenders: contenders beside the study.
      parts: parts of the suite.
      quick: short and rough.
      seconds: how long the rounds of one case may take, three of them at least.
    """

    names: tuple[str, ...]
    trials: tuple[int, ...]
    contenders: tuple[str, ...]
    parts: tuple[str, ...]
    quick: bool
    seconds: float


def num_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def header(device: dict[str, Any]) -> dict[str, Any]:
    """Machine and versions: what results have in common that stand in one file."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "optax", "flax", "numpy", "playbook_optax", "torch", "optuna"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"machine": {"cpu": cpu, "cores": num_cores()}, **device, "versions": versions}


def commit() -> str:
    """The short hash of the tree's commit, with a + where files were changed since; or unknown."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


class Suite:
    """The suite with its workers, which start when they are needed; a context.

    Args:
      options: what to run.
      path: the file of results; None for the one named after the device.
    """

    def __init__(self, options: Options, path: pathlib.Path | None = None) -> None:
        self._options = options
        self._stack = contextlib.ExitStack()
        self._workers: dict[str, Worker] = {}
        device = self._worker("cores").call("benchmarks.speed.contenders:device")
        self._on_cpu, self._devices = device["platform"] == "cpu", device["devices"]
        kind = device["device"].lower().replace(" ", "_")
        self.path = path or RESULTS / f"speed_{kind}.json"
        self._stored = {**header(device), "results": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found | {"results": {}} == self._stored:
                self._stored = found
            else:
                print(f"{self.path} is of another machine or other versions: begun anew")
        common = {"quick": options.quick, "commit": commit(), "data": workloads.data_source()}
        self._provenance = common

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Runs all parts."""
        for part in self._options.parts:
            for key, result in getattr(self, f"_{part}")():
                today = datetime.date.today().isoformat()
                self._stored["results"][key] = {**result, "date": today, **self._provenance}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self._stored, indent=1) + "\n")
                print(key, json.dumps(result), flush=True)

    def _worker(self, place: str) -> Worker:
        if place not in self._workers:
            # PyTorch's process builds workloads for their data only.
            made = {
                "cores": lambda: Worker(devices=num_cores()),
                "default": Worker,
                "torch": lambda: Worker(environment={"JAX_PLATFORMS": "cpu"}),
            }[place]()
            self._workers[place] = self._stack.enter_context(made)
            if place == "torch":
                made.call("benchmarks.speed.torch_models:setup", num_threads=num_cores())
        return self._workers[place]

    def _fresh(self, devices: int) -> Worker:
        return Worker(devices=devices)

    def _steps(self, name: str, num_trials: int) -> int:
        return workloads.num_steps(name, num_trials, self._on_cpu, self._options.quick)

    def _long_steps(self, name: str) -> int:
        steps = workloads.CASES[name].long_steps
        return max(20, steps // 10) if self._options.quick else steps

    def _size(self, name: str) -> int:
        return SIZES[name] if self._on_cpu else ACCELERATOR_SIZE

    def _diverged_size(self, name: str) -> int:
        return DIVERGED_SIZES[name] if self._on_cpu else ACCELERATOR_SIZE

    def _rounds(self, entrants: dict[str, Worker]) -> dict[str, list[float]]:
        """Microseconds per trial-step of each entrant, round by round; the first place rotates."""
        most, least, limit = (2, 2, 0.0) if self._options.quick else (9, 3, self._options.seconds)
        found: dict[str, list[float]] = {label: [] for label in entrants}
        start = time.perf_counter()
        for number in range(most):
            if number >= least and time.perf_counter() - start > limit:
                break
            labels = list(entrants)
            turn = number % len(labels)
            for label in labels[turn:] + labels[:turn]:
                if label in ONCE and number:
                    found[label].append(found[label][0])
                    continue
                found[label].append(
                    entrants[label].call("benchmarks.speed.arena:measure", label=label)
                )
        for worker in set(entrants.values()):
            worker.call("benchmarks.speed.arena:forget")
        return found

    def _steady(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Per trial-step, compiled already: each contender over a study."""
        budget = 0.2 if self._options.quick else 1.0
        for name in self._options.names:
            for num_trials in self._options.trials:
                steps = self._steps(name, num_trials)
                arguments = {
                    "name": name,
                    "num_trials": num_trials,
                    "num_steps": steps,
                    "budget": budget,
                }
                entrants, facts = {}, {}
                for label in ("study", "study_ends", *self._options.contenders):
                    place, maker = CONTENDERS[label]
                    entrants[label] = self._worker(place)
                    facts[label] = self._prepare(entrants[label], label, maker, arguments)
                times = self._rounds(entrants)
                yield (
                    f"steady/{name}/{num_trials}",
                    {
                        "num_trials": num_trials,
                        "num_steps": steps,
                        "num_rounds": len(times["study"]),
                        "contenders": {
                            label: {
                                **facts[label],
                                "microseconds": table.rounded(table.median(times[label])),
                                **table.summary(table.ratios(times[label], times["study"])),
                            }
                            for label in entrants
                        },
                    },
                )

    def _prepare(
        self, worker: Worker, label: str, maker: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        facts: dict[str, Any] = worker.call(
            "benchmarks.speed.arena:prepare", label=label, maker=maker, arguments=arguments
        )
        return facts

    def _cold(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Tracing and compiling included, short trials: a scan for each trial over a study."""
        function = "benchmarks.speed.contenders:cold"
        for name in self._options.names:
            for num_trials in (8,) if self._options.quick else (8, 64):
                # As long as trials of the larger number, so that compiling weighs what it may.
                arguments = {
                    "name": name,
                    "num_trials": num_trials,
                    "num_steps": self._steps(name, 64),
                }
                times: dict[str, list[float]] = {"study": [], "scan": []}
                for number in range(1 if self._options.quick else 3):
                    order = ("study", "scan") if number % 2 == 0 else ("scan", "study")
                    for contender in order:
                        place, _ = CONTENDERS[contender]
                        times[contender].append(
                            self._worker(place).call(function, contender=contender, **arguments)
                        )
                yield (
                    f"cold/{name}/{num_trials}",
                    {
                        **{k: v for k, v in arguments.items() if k != "name"},
                        "seconds": {k: table.rounded(table.median(v)) for k, v in times.items()},
                        **table.summary(table.ratios(times["scan"], times["study"])),
                    },
                )

    def _features(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Evaluation, best weights, clipping: a study over the same scan without any of it."""
        worker = self._worker("cores")
        for name in self._options.names:
            arguments = {
                "name": name,
                "num_trials": self._size(name),
                "num_steps": self._long_steps(name),
            }
            maker = "benchmarks.speed.features:variant"
            labels = ("everything", "best", "evaluated", "ends")
            facts = {
                label: self._prepare(worker, label, maker, {"variant": label, **arguments})
                for label in labels
            }
            width = facts["everything"]["trials_per_block"]
            bare = {**arguments, "width": width}
            self._prepare(worker, "bare", "benchmarks.speed.features:Bare", bare)
            times = self._rounds(dict.fromkeys(("bare", *labels), worker))
            yield (
                f"features/{name}",
                {
                    **{k: v for k, v in arguments.items() if k != "name"},
                    "trials_per_block": width,
                    "bare_microseconds": table.rounded(table.median(times["bare"])),
                    "over_bare": {
                        label: table.summary(table.ratios(times[label], times["bare"]))
                        for label in labels
                    },
                },
            )

    def _diverged(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """A study in which trials diverge early over one in which none does."""
        worker = self._worker("cores")
        for name in self._options.names:
            steps = self._long_steps(name)
            facts = {}
            for fraction in (0.0, 0.5, 0.9):
                arguments = {
                    "name": name,
                    "num_trials": self._diverged_size(name),
                    "num_steps": steps,
                    "fraction": fraction,
                }
                maker = "benchmarks.speed.features:Diverging"
                facts[str(fraction)] = self._prepare(worker, str(fraction), maker, arguments)
            times = self._rounds(dict.fromkeys(facts, worker))
            rows = {}
            for label in ("0.5", "0.9"):
                values = table.ratios(times[label], times["0.0"])
                lived = (facts[label]["infeasible_step"] + 1) / steps
                savings = [table.saving_share(v, facts[label]["fraction"], lived) for v in values]
                rows[label] = {
                    **facts[label],
                    **table.summary(values),
                    "share_of_ideal": table.rounded(table.median(savings)),
                }
            yield (
                f"diverged/{name}",
                {"num_trials": self._diverged_size(name), "num_steps": steps, "fractions": rows},
            )

    def _scaling(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Trials per second of one program over more and more devices."""
        if self._on_cpu:
            counts = sorted({1, self._devices, 8})
        else:
            counts = [n for n in (1, 2, 4, 8) if n <= self._devices]
        with contextlib.ExitStack() as stack:
            shared = self._worker("cores")
            workers = {
                n: stack.enter_context(self._fresh(n)) if self._on_cpu else shared for n in counts
            }
            for name in self._options.names:
                num_trials = self._size(name)
                steps = self._steps(name, 64)
                arguments = {"name": name, "num_trials": num_trials, "num_steps": steps}
                maker = "benchmarks.speed.contenders:at_ends"
                facts = self._prepare(shared, "width", maker, {**arguments, "budget": 0.0})
                width = facts["trials_per_block"]
                for n, worker in workers.items():
                    over = {**arguments, "num_devices": n, "width": width}
                    self._prepare(worker, str(n), "benchmarks.speed.features:on_devices", over)
                times = self._rounds({str(n): worker for n, worker in workers.items()})
                shared.call("benchmarks.speed.arena:forget")
                yield (
                    f"scaling/{name}",
                    {
                        "num_trials": num_trials,
                        "num_steps": steps,
                        "trials_per_block": width,
                        "devices": {
                            label: {
                                "trials_per_second": table.rounded(
                                    1e6 / steps / table.median(values)
                                ),
                                "speedup": table.summary(table.ratios(times["1"], values)),
                            }
                            for label, values in times.items()
                        },
                    },
                )

    def _memory(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Peak memory of a study, each in a process of its own."""
        for name in self._options.names:
            for num_trials in self._options.trials:
                with self._fresh(num_cores()) as worker:
                    peak = worker.call(
                        "benchmarks.speed.features:peak_memory", name=name, num_trials=num_trials
                    )
                yield f"memory/{name}/{num_trials}", {"num_trials": num_trials, "bytes": peak}

    def _roofline(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The device's rates, and what a step asks for."""
        function = "benchmarks.speed.roofline:device_rates"
        rates = [self._worker(place).call(function) for place in ("default", "cores")]
        yield "roofline/device", {k: max(rate[k] for rate in rates) for k in rates[0]}
        for name in self._options.names:
            worker = self._worker("default")
            costs = worker.call("benchmarks.speed.roofline:step_costs", name=name)
            if name in MLP_SIZES:
                costs["flops_by_hand"] = mlp_flops(*MLP_SIZES[name])
            yield f"roofline/{name}", costs

    def _transforms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Our updates over Optax's."""
        found = self._worker("cores").call("benchmarks.transforms:run", quick=self._options.quick)
        yield "transforms", found


def available() -> tuple[str, ...]:
    """The contenders beside the study whose libraries are installed."""
    needs = {"optuna": "optuna", "torch": "torch", "torch_func": "torch"}
    return tuple(
        label
        for label in CONTENDERS
        if not label.startswith("study")
        and (label not in needs or importlib.util.find_spec(needs[label]))
    )
