"""Arithmetic of the results, and their table in the README."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.speed.worker import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
TITLES = {
    "mlp": "MLP 64-128-10, batch 128",
    "cnn": "CNN 3x3x16, 3x3x32, batch 32",
    "lm": "byte transformer, 4 layers of 32, batch 16 x 64",
    "tiny": "tiny MLP 64-16-10, batch 16",
}
ROWS = {
    "loop": "a jitted step, called for each trial and step",
    "scan": "a jitted scan for each trial",
    "recompile": "a step compiled for each trial",
    "optuna": "Optuna driving the scan",
    "torch": "PyTorch, eager",
    "torch_func": "PyTorch, `torch.func`",
    "study_ends": "a study evaluated only before and after",
}


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Times over the reference's, round by round."""
    return [a / b for a, b in zip(times, reference, strict=True)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"ratio": rounded(middle), "ratio_quartiles": [rounded(low), rounded(high)]}


def saving_share(ratio: float, fraction: float, lived: float) -> float:
    """The share that was saved of what diverged trials could have saved.

    Args:
      ratio: time with diverged trials over time without.
      fraction: of the trials, how many diverged.
      lived: the part of a run that a diverged trial trained before.

    Returns:
      1 if nothing was spent after the divergence, 0 if as much as ever.
    """
    return (1 - ratio) / (fraction * (1 - lived))


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = (_number(bound) for bound in found["ratio_quartiles"])
    middle = _number(found["ratio"])
    return middle if low == high else f"{middle} ({low}–{high})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _steady(results: dict[str, Any]) -> list[str]:
    """The main table: one section for each workload, one column for each number of trials."""
    cases = {tuple(k.split("/")[1:]): v for k, v in results.items() if k.startswith("steady/")}
    trials = sorted({int(number) for _, number in cases})
    heads = [f"{number} trial{'s' * (number > 1)}" for number in trials]
    lines = [_row(["time of … / time of a study", *heads]), _row(["---"] * (1 + len(trials)))]
    for name, title in TITLES.items():
        columns = [cases.get((name, str(number))) for number in trials]
        if not any(columns):
            continue
        lines.append(_row([f"**{title}**", *("" for _ in trials)]))
        for label, row in ROWS.items():
            found = [column and column["contenders"].get(label) for column in columns]
            if any(found):
                lines.append(_row([row, *(_cell(cell) for cell in found)]))
    return lines


def _roof(results: dict[str, Any], name: str) -> dict[str, float]:
    """Shares of the measured rates that the best study of a workload reaches."""
    device, costs = results.get("roofline/device"), results.get(f"roofline/{name}")
    times = [
        case["contenders"]["study_ends"]["microseconds"]
        for key, case in results.items()
        if key.startswith(f"steady/{name}/")
    ]
    if not (device and costs and times):
        return {}
    rate = 1e6 / min(times)
    return {
        "product": rate * costs["flops"] / device["flops_per_second"],
        "copy": rate * costs["least_bytes"] / device["bytes_per_second"],
    }


def _over_one(results: dict[str, Any], name: str) -> dict[str, float]:
    """What is meant by one trial, to the time of 512 trials side by side over its time."""
    most, one = (
        results.get(f"steady/{name}/{number}", {}).get("contenders", {}) for number in (512, 1)
    )
    if "study" not in most:
        return {}
    whole = 512 * most["study"]["microseconds"]
    rows = {"study": "a study of one trial", "scan": "a jitted scan of one trial"}
    return {row: whole / one[label]["microseconds"] for label, row in rows.items() if label in one}


def _more(results: dict[str, Any], platform: str) -> list[str]:
    """The second table: one column for each workload."""
    names = [n for n in TITLES if any(n in key.split("/")[1:] for key in results)]
    cells: dict[str, dict[str, str]] = {}

    def put(row: str, name: str, cell: str) -> None:
        cells.setdefault(row, {})[name] = cell

    for name in names:
        for one, ratio in _over_one(results, name).items() if platform != "cpu" else ():
            put(f"a study of 512 trials / {one}", name, _number(ratio))
        for number in (8, 64):
            if found := results.get(f"cold/{name}/{number}"):
                row = f"compiling included, {number} trials: a scan for each trial / a study"
                put(row, name, _cell(found))
        if found := results.get(f"features/{name}"):
            for label, text in (
                ("everything", "everything on"),
                ("ends", "evaluated before and after only"),
            ):
                row = f"a study, {text} / the bare scan on all devices"
                put(row, name, _cell(found["over_bare"][label]))
        for fraction, row in (results.get(f"diverged/{name}") or {"fractions": {}})[
            "fractions"
        ].items():
            share = f"{100 * row['share_of_ideal']:.0f}%"
            put(f"{100 * float(fraction):.0f}% of trials diverge: saved, of the ideal", name, share)
        if found := results.get(f"scaling/{name}"):
            for devices, row in found["devices"].items():
                if devices != "1":
                    put(f"trials per second, {devices} devices / 1", name, _cell(row["speedup"]))
        for kind, share in _roof(results, name).items():
            put(f"share of the measured {kind} rate", name, f"{100 * share:.2g}%")
        for key, found in results.items():
            if key.startswith(f"memory/{name}/"):
                row = f"peak memory of {found['num_trials']} trials, compiling included, MB"
                put(row, name, f"{found['bytes'] / 1e6:.0f}")
    if not cells:
        return []
    short = [TITLES[name].split(",")[0] for name in names]
    lines = [_row(["", *short]), _row(["---"] * (1 + len(names)))]
    return lines + [
        _row([row, *(found.get(name, "–") for name in names)]) for row, found in cells.items()
    ]


def _transforms(results: dict[str, Any]) -> list[str]:
    found = results.get("transforms")
    if not found:
        return []
    pairs = [f"{k} {_cell(v)}" for k, v in found.items() if isinstance(v, dict) and "ratio" in v]
    return [f"An update of ours / of Optax's namesake, ten layers: {', '.join(pairs)}."]


def markdown(stored: dict[str, Any]) -> str:
    """The tables of one file of results."""
    results = stored["results"]
    machine, versions = stored["machine"], stored["versions"]
    on = stored["device"] if stored["platform"] != "cpu" else machine["cpu"]
    dates = sorted({result["date"] for result in results.values()})
    named = [f"{name} {versions[name]}" for name in ("jax", "torch", "optuna") if name in versions]
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    title = f"**{on}, {machine['cores']} cores; {', '.join(named)}; {when}.**"
    if any(result["quick"] for result in results.values()):
        title += " *From a quick run, short and rough: to be replaced by a full one.*"
    if any(result["data"] != "digits" for result in results.values()):
        title += " Random numbers in place of the digits, of the same shapes."
    parts = [[title], _steady(results), _more(results, stored["platform"]), _transforms(results)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def block() -> str:
    """What stands between the markers of the README: the tables of all stored results."""
    files = sorted(RESULTS.glob("speed_*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text())) for path in files)


def splice(text: str, new: str) -> str:
    """A text with what stands between its markers replaced.

    Raises:
      ValueError: it does not have both markers once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text must hold {BEGIN} and {END} once each.")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def write_readme(path: pathlib.Path = README) -> str:
    """Puts the tables into the README; returns them."""
    new = block()
    path.write_text(splice(path.read_text(), new))
    return new
