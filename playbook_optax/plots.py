"""Draws what the analysis measured; computes nothing itself. Needs the extra `plots`.

What is drawn into Axes that are given stays where it is. A new figure is one of Matplotlib's
current figures, for ``plt.show()``; in a notebook a function that returns a Figure has closed it,
because the notebook shows what a cell returns and would show it again: end the cell with the call,
or display the figure.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from playbook_optax import _checks
from playbook_optax.analysis.axes import (
    Axis,
    AxisPlot,
    axis,
    axis_plot_info,
    hyperparameters,
)
from playbook_optax.analysis.budgets import BudgetInfo
from playbook_optax.analysis.curves import EARLY, LATE, best_curves, compared_curves
from playbook_optax.analysis.instability import instability_curves
from playbook_optax.analysis.isolation import IsolationInfo
from playbook_optax.analysis.norms import norm_histogram, norm_trace
from playbook_optax.analysis.stability import stability_info
from playbook_optax.analysis.targets import StepsToTarget
from playbook_optax.analysis.training_length import BestStepInfo
from playbook_optax.procedures.gradient_noise import GradientNoise
from playbook_optax.procedures.remedies import RemedyComparison
from playbook_optax.records.study import Study

__all__ = [
    "plot_axes",
    "plot_axis",
    "plot_best_steps",
    "plot_budget",
    "plot_curves",
    "plot_curves_compared",
    "plot_gradient_noise",
    "plot_gradient_norms",
    "plot_instability",
    "plot_isolation",
    "plot_norm_trace",
    "plot_remedies",
    "plot_steps_to_target",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# Okabe and Ito's colours, told apart by every kind of colour vision; marks differ in shape too.
BLUE, VERMILLION, BLACK, GREY, ORANGE = "#0072B2", "#D55E00", "#000000", "#777777", "#E69F00"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Numbers beyond are drawn there: axes with their margins have to fit a float.
_SMALLEST, _LARGEST = 1e-100, 1e100
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# A histogram leaves out, in percent, what is so rare that it squeezes the rest into a part of the
# width, and a threshold that is so many times beyond its ends.
_RARE_SHARE, _CROWDED, _FAR = 2.5, 0.75, 30.0
# Two labels of so many letters stand side by side below two plots.
_LETTERS_OF_TWO = 70

T = TypeVar("T")


def _drawable(info: T) -> T:
    """What is drawn, with all its numbers inside of what Matplotlib can lay out."""
    shown: Any = info
    if isinstance(info, float) or (isinstance(info, np.ndarray) and info.dtype.kind == "f"):
        values = np.asarray(info, np.float64)
        within = np.sign(values) * np.clip(np.abs(values), _SMALLEST, _LARGEST)
        shown = np.where(np.isfinite(values) & (values != 0), within, values)
        shown = float(shown) if isinstance(info, float) else shown
    elif isinstance(info, tuple) and hasattr(info, "_asdict"):
        shown = shown._replace(**{n: _drawable(v) for n, v in shown._asdict().items()})
    elif isinstance(info, (tuple, list)):
        shown = type(info)(map(_drawable, info))
    elif isinstance(info, dict):
        # A point is read as text, in the legend.
        shown = {n: _drawable(v) if isinstance(v, np.ndarray) else v for n, v in info.items()}
    result: T = shown
    return result


def _pyplot() -> Any:
    return _checks.require("matplotlib.pyplot", "plots", "Plotting")


def _new_axes(ax: Any, width: float = 6.0, height: float = 4.0) -> Any:
    """The given axes, or new ones on their own figure."""
    if ax is None:
        _, ax = _pyplot().subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _returned(figure: Any) -> Any:
    """A new figure as it is returned, so that a notebook shows it once.

    A notebook shows what a cell returns, and then all figures that are still open.
    """
    pyplot = _pyplot()
    if pyplot.get_backend().rpartition(".")[2] in ("inline", "backend_inline"):
        pyplot.close(figure)
    return figure


def _spans_decades(values: np.ndarray) -> bool:
    """Whether positive values spread over a decade or more, so that a log axis serves better."""
    seen = values[np.isfinite(values)]
    return bool(len(seen) > 1 and seen.min() > 0 and seen.max() >= 10 * seen.min())


def _tick_formatter(reverse: bool = False) -> Any:
    """Plain numbers: 0.001 rather than 10 to the minus 3, and 0.999 on a 1 - x axis."""
    ticker = _checks.require("matplotlib.ticker", "plots", "Plotting")

    def label(x: float, _: Any) -> str:
        if reverse:
            digits = max(-math.floor(math.log10(x) + 1e-9), 0) if x > 0 else 0
            return f"{1 - x:.{digits}f}"
        if x == 0 or 1e-3 <= abs(x) < 1e5:
            return f"{x:g}"
        mantissa, exponent = f"{x:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"

    return ticker.FuncFormatter(label)


def _log_axis(which: Any, low: float, high: float, reverse: bool = False) -> None:
    """Ticks that are few and labelled: decades, and 2 and 5 between them on short axes."""
    ticker = _checks.require("matplotlib.ticker", "plots", "Plotting")
    decades = math.log10(high / low) if low > 0 else 9.0
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.5 else tuple(range(1, 10))
    which.set_major_locator(ticker.LogLocator(base=10, subs=subs, numticks=12))
    which.set_minor_locator(ticker.NullLocator())
    which.set_major_formatter(_tick_formatter(reverse))


def _metric_label(name: str, maximize: bool) -> str:
    return f"{name} ({'higher' if maximize else 'lower'} is better)"


def _set_x_axis(ax: Any, line: Axis, x: np.ndarray) -> None:
    """Scale, limits, ticks and label of the hyperparameter."""
    if line.kind == "categorical":
        ax.set_xticks(range(len(line.labels)), line.labels)
        ax.set_xlim(-0.5, len(line.labels) - 0.5)
        ax.set_xlabel(line.name)
        return
    if line.scale == "linear":
        low, high = min(line.low, x.min()), max(line.high, x.max())
        pad = 0.04 * ((high - low) or abs(high) or 1.0)
        ax.set_xlim(low - pad, high + pad)
        ax.set_xlabel(f"{line.name} (linear scale)")
        return
    reverse = line.scale == "reverse_log"
    if reverse:
        ends = np.asarray([1 - line.high, 1 - line.low])
    else:
        ends = np.asarray([line.start, line.high])
    low, high = min(ends[0], x.min()), max(ends[1], x.max())
    pad = (high / low) ** 0.04 if high > low else 1.5
    ax.set_xscale("log")
    ax.set_xlim(low / pad, high * pad)
    _log_axis(ax.xaxis, low, high, reverse)
    if reverse:
        ax.invert_xaxis()
        ax.set_xlabel(f"{line.name} (log scale in 1 − {line.name})")
    else:
        ax.set_xlabel(f"{line.name} (log scale)")
    if line.start != line.low:
        ticks = [t for t in ax.get_xticks() if 1.9 * line.start < t <= high]
        ax.set_xticks([line.start, *ticks], ["0", *(f"{t:g}" for t in ticks)])
        ax.set_xlabel(f"{line.name} (log scale, and 0)")


@_checks.named_arguments
def plot_axis(
    study: Study,
    name: str,
    ax: Any = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Any:
    """Draws the objective against one hyperparameter, one mark per trial.

    Infeasible trials are crosses in a band along the top, the best trial is a star, and the ends
    of the search space are dashed lines. Where trials fail beyond an edge more often than by chance
    (`stability_info`), the infeasible region beyond it is shaded. A reverse_log hyperparameter such
    as b1 is drawn on a log axis in 1 - x that runs backwards, so that x still grows to the right;
    its tick labels are the values of x themselves.

    Args:
      study: the study.
      name: a hyperparameter.
      ax: matplotlib Axes to draw into; new ones by default.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no such hyperparameter or metric.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.records.study import Study
      >>> study = Study.from_arrays(
      ...     {"learning_rate": np.array([0.01, 0.1, 1.0])},
      ...     {"valid/loss": np.array([[2.0, 1.0], [2.0, 0.5], [2.0, np.nan]])},
      ...     np.array([0, 10]), objective="valid/loss", infeasible=np.array([False, False, True]))
      >>> plot_axis(study, "learning_rate").get_xlabel()
      'learning_rate (log scale)'

    Source: "Identifying bad search space boundaries" and "How can optimization failures be
      debugged and mitigated?" (figure 7a).
    """
    info = _drawable(axis_plot_info(study, name, objective, maximize))
    line, out = info.axis, info.outcomes
    ax = _new_axes(ax)
    others = out.usable.copy()
    if out.best >= 0:
        others[out.best] = False
    ax.plot(
        info.x[others],
        out.value[others],
        "o",
        color=BLUE,
        markersize=6,
        alpha=0.75,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label="trial",
    )
    if out.best >= 0:
        ax.plot(
            info.x[out.best],
            out.value[out.best],
            "*",
            color=ORANGE,
            markersize=16,
            markeredgecolor=BLACK,
            markeredgewidth=0.8,
            label="best trial",
            zorder=4,
        )
    if _spans_decades(out.value):
        ax.set_yscale("log")
        seen = out.value[out.usable]
        _log_axis(ax.yaxis, float(seen.min()), float(seen.max()))
    if out.infeasible.any():
        _draw_infeasible(ax, info)
    _set_x_axis(ax, line, info.x)
    for row in _drawable(stability_info(study, objective, maximize)):
        if row.name == name and row.p_value <= row.limit:
            _shade_beyond(ax, line, row.edge, row.direction)
    if line.declared and line.kind != "categorical":
        ends = (
            (1 - line.low, 1 - line.high)
            if line.scale == "reverse_log"
            else (line.start, line.high)
        )
        for i, end in enumerate(ends):
            ax.axvline(
                end,
                color=GREY,
                linestyle=(0, (4, 3)),
                linewidth=1,
                zorder=1,
                label="search space" if i == 0 else "_nolegend_",
            )
    ax.set_ylabel(_metric_label(f"best {out.objective}", out.maximize))
    if ax.get_legend_handles_labels()[0]:
        _legend_above(ax, 3)
    return ax


def _shade_beyond(ax: Any, line: Axis, edge: float, direction: str) -> None:
    """Shades the infeasible region, from its edge to the border of the plot."""
    at = 1 - edge if line.scale == "reverse_log" else edge
    left, right = ax.get_xlim()
    ax.axvspan(
        at,
        right if direction == "high" else left,
        color=VERMILLION,
        alpha=0.1,
        lw=0,
        zorder=0,
        label="infeasible region",
    )
    ax.set_xlim(left, right)


def _draw_infeasible(ax: Any, info: AxisPlot) -> None:
    """Crosses in a shaded band along the top, above every feasible trial."""
    bad = info.outcomes.infeasible
    low, high = ax.get_ylim()
    if not info.outcomes.usable.any():
        ax.set_yticks([])
    elif not ax.get_autoscaley_on():
        pass  # an Axes that shares its y axis made the room already
    elif ax.get_yscale() == "log":
        ax.set_ylim(low, high * (high / low) ** 0.12)
    else:
        ax.set_ylim(low, high + 0.12 * (high - low))
    ax.fill_between([0, 1], 0.91, 1, transform=ax.transAxes, color=VERMILLION, alpha=0.1, lw=0)
    ax.plot(
        info.x[bad],
        np.full(bad.sum(), 0.955),
        "x",
        transform=ax.get_xaxis_transform(),
        color=VERMILLION,
        markersize=7,
        markeredgewidth=1.6,
        label=f"infeasible ({bad.sum()} of {len(bad)}, {info.infeasible_share:.0%})",
    )


@_checks.named_arguments
def plot_axes(study: Study, objective: str | None = None, maximize: bool | None = None) -> Any:
    """Draws one axis plot per hyperparameter that varies.

    Args:
      study: the study.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      A matplotlib Figure with one Axes per hyperparameter, at most three in a row.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no such metric, or no hyperparameter to draw.

    Source: "Identifying bad search space boundaries" (axis plots).
    """
    names = hyperparameters(study)
    names = [n for n in names if len(np.unique(axis(study, n).values)) > 1] or names
    if not names:
        raise ValueError("study has no hyperparameters to draw. Give from_arrays its points.")
    num_cols = 2 if len(names) == 4 else min(len(names), 3)
    num_rows = -(-len(names) // num_cols)
    figure, grid = _pyplot().subplots(
        num_rows,
        num_cols,
        figsize=(5.0 * num_cols, 3.8 * num_rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    cells = grid.ravel()
    for cell, name in zip(cells, names, strict=False):
        plot_axis(study, name, ax=cell, objective=objective, maximize=maximize)
    labels = [cell.get_legend_handles_labels() for cell in cells[: len(names)]]
    for i, cell in enumerate(cells):
        if i >= len(names):
            cell.remove()
            continue
        cell.get_legend().remove() if cell.get_legend() else None
        if i % num_cols:
            cell.set_ylabel("")
    unique = {
        text: mark for marks, texts in labels for mark, text in zip(marks, texts, strict=True)
    }
    ncols = 3 if num_cols == 1 else 5
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper left", ncols=ncols, frameon=False
    )
    return _returned(figure)


def _point_label(point: dict[str, Any]) -> str:
    shown = list(point.items())[:3]
    text = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown)
    return text + (", …" if len(point) > 3 else "")


@_checks.named_arguments
def plot_curves(
    study: Study,
    num_trials: int = 5,
    ax: Any = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Any:
    """Draws the training curves of the best trials: the objective, and the training loss below.

    Args:
      study: the study.
      num_trials: how many trials, at most.
      ax: matplotlib Axes to draw the objective into, alone; by default a new figure holds both.
      objective: a recorded metric; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The matplotlib Figure, or `ax` if it was given.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no such metric, or num_trials is not a positive integer.

    Source: "Examining the training curves".
    """
    info = _drawable(best_curves(study, num_trials, objective, maximize))
    names = list(info.metrics)[:1] if ax is not None else list(info.metrics)
    if ax is None:
        figure, grid = _pyplot().subplots(
            1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False, layout="constrained"
        )
        cells = list(grid[0])
    else:
        figure, cells = ax.figure, [ax]
    for cell, name in zip(cells, names, strict=True):
        _new_axes(cell)
        curves = info.metrics[name]
        for i, trial in enumerate(info.trials):
            colour = SERIES[i % len(SERIES)]
            cell.plot(
                info.step,
                curves[i],
                color=colour,
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.8 if i == 0 else 1.3,
                zorder=3 - i / 10,
                label=f"trial {trial}: {_point_label(info.points[i])}",
            )
            if name == info.objective:
                at = int(np.flatnonzero(info.step == info.best_steps[i])[0])
                cell.plot(
                    info.step[at],
                    curves[i][at],
                    "o",
                    color=colour,
                    markersize=6,
                    markeredgecolor=BLACK,
                    markeredgewidth=0.6,
                    zorder=5,
                    label="_nolegend_",
                )
        if curves.size and _spans_decades(curves):
            cell.set_yscale("log")
            _log_axis(cell.yaxis, float(np.nanmin(curves)), float(np.nanmax(curves)))
        cell.set_xlabel("step (optimizer updates)")
        better = info.maximize if name == info.objective else False
        cell.set_ylabel(_metric_label(name, better))
    marks, texts = cells[0].get_legend_handles_labels()
    if ax is not None:
        if marks:
            ax.legend(fontsize="small", frameon=False)
        return ax
    cells[0].set_title("dots: best step of each trial", fontsize="small", loc="left", color=GREY)
    if marks:
        figure.legend(
            marks,
            texts,
            loc="outside lower center",
            ncols=2 if len(marks) > 1 and max(map(len, texts)) <= _LETTERS_OF_TWO else 1,
            frameon=False,
            fontsize="small",
        )
    return _returned(figure)


@_checks.named_arguments
def plot_gradient_norms(
    study: Study, ax: Any = None, trials: Any = None, threshold: float | None = None
) -> Any:
    """Draws the histogram of unclipped gradient norms, with its 50th, 90th and 99th percentiles.

    The 90th percentile is the playbook's first choice of a clipping threshold. The threshold that
    the study recorded is drawn too, or the one that is given.

    Args:
      study: a study whose gradient norms were recorded.
      ax: matplotlib Axes to draw into; new ones by default.
      trials: indices of the trials to pool; all feasible ones by default.
      threshold: clipping threshold to draw; by default the one that the clippers ended with.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no norms were recorded, a trial does not exist, or threshold is not positive.

    Source: "How can optimization failures be debugged and mitigated?" (gradient clipping).
    """
    info = _drawable(norm_histogram(study, trials))
    limit = _threshold(threshold, info.threshold)
    ax = _new_axes(ax)
    filled = np.flatnonzero(info.counts)
    shares = 100 * info.counts / max(info.counts.sum(), 1)
    num = len(info.trials)
    ax.set_xlabel(
        f"global gradient norm before clipping ({num} trials pooled)"
        if num != 1
        else f"global gradient norm before clipping (trial {info.trials[0]})"
    )
    ax.set_ylabel("share of updates (%)")
    if not len(filled):
        ax.text(0.5, 0.5, "no updates recorded", transform=ax.transAxes, ha="center")
        return ax
    low, high = info.low.copy(), info.high.copy()
    inner = np.flatnonzero((low > 0) & np.isfinite(high))
    ratio = high[inner[0]] / low[inner[0]] if len(inner) else 2.0
    open_low, open_high = low <= 0, ~np.isfinite(high)
    low[open_low] = high[open_low] / ratio
    high[open_high] = low[open_high] * ratio
    ax.set_xscale("log")
    ax.bar(
        low[filled],
        shares[filled],
        width=(high - low)[filled],
        align="edge",
        color=BLUE,
        alpha=0.75,
        edgecolor="white",
        linewidth=0.4,
    )
    first, last = low[filled[0]], high[filled[-1]]
    # A few norms near 0, of runs that are at their optimum, would squeeze all others.
    most = low[filled[np.searchsorted(np.cumsum(shares[filled]), _RARE_SHARE, side="right")]]
    if np.log(last / most) < _CROWDED * np.log(last / first):
        ax.annotate(
            f"← {shares[low < most].sum():.2g}% below",
            (0.01, 0.94),
            xycoords="axes fraction",
            fontsize="small",
            color=GREY,
        )
        first = most
    ax.set_xlim(first / 1.2, last * 1.2)
    _log_axis(ax.xaxis, first, last)
    dashes = {50.0: ":", 90.0: "--", 99.0: "-"}
    for q, norm in info.percentiles.items():
        ax.axvline(
            norm,
            color=VERMILLION,
            linestyle=dashes[q],
            linewidth=1.5,
            label=f"{q:.0f}th percentile: {norm:.3g}",
        )
    if np.isfinite(limit):
        label = f"threshold: {limit:.3g}"
        if threshold is None and np.isfinite(info.share_clipped):
            label += f" ({info.share_clipped:.0%} clipped)"
        if first / _FAR < limit < last * _FAR:
            ax.axvline(limit, color=BLACK, linewidth=2.2, label=label)
            first, last = min(first, limit), max(last, limit)
            ax.set_xlim(first / 1.2, last * 1.2)
            _log_axis(ax.xaxis, first, last)
        else:
            side = "to the right" if limit > last else "to the left"
            ax.plot([], [], color=BLACK, linewidth=2.2, label=f"{label}, far {side}")
    _legend_above(ax, 2)
    return ax


def _threshold(given: float | None, recorded: float) -> float:
    """The clipping threshold to draw, NaN for none."""
    if given is None:
        return recorded
    _checks.check_number(
        "threshold", given, above=0.0, fix="Give the norm at which clipping began."
    )
    return float(given)


def _legend_above(ax: Any, ncols: int) -> None:
    """A legend above the axes, where it can cover no curve."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=ncols,
        frameon=False,
        fontsize="small",
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _log_if_wide(ax: Any, values: np.ndarray) -> None:
    """A log axis for positive values that spread over a decade or more."""
    if values.size and _spans_decades(values):
        seen = values[np.isfinite(values)]
        ax.set_yscale("log")
        _log_axis(ax.yaxis, float(seen.min()), float(seen.max()))


@_checks.named_arguments
def plot_norm_trace(
    study: Any, trials: Any = None, threshold: float | None = None, ax: Any = None
) -> Any:
    """Draws the unclipped gradient norm against the step, and the training loss below it.

    Of a study, the line is the mean since the previous evaluation, and the shade above it reaches
    to the largest norm since then; of a replay, or of a study evaluated at every step, it is the
    norm of every step.

    Args:
      study: a study whose gradient norms were recorded, or what `Study.replay` returned.
      trials: indices of the trials; by default all if there are up to three, else the best one.
      threshold: clipping threshold to draw; by default the one that the clippers ended with.
      ax: matplotlib Axes to draw the norm into, alone; by default a new figure holds both.

    Returns:
      The matplotlib Figure, or `ax` if it was given.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no norms were recorded, a trial does not exist, or threshold is not positive.

    Example:
      >>> import numpy as np, xarray
      >>> replay = xarray.Dataset({"gradient_norm": ("step", [1.0, 9.0])}, {"step": [40, 41]})
      >>> plot_norm_trace(replay, threshold=2.0).axes[0].get_xlabel()
      'step (optimizer updates)'

    Source: "How can optimization failures be debugged and mitigated?" (gradient clipping).
    """
    info = _drawable(norm_trace(study, trials))
    limit = _threshold(threshold, info.threshold)
    cells = [ax]
    if ax is None:
        num = 1 if info.loss is None else 2
        figure, grid = _pyplot().subplots(
            num, 1, figsize=(7.0, 1.2 + 2.6 * num), squeeze=False, sharex=True, layout="constrained"
        )
        cells = list(grid[:, 0])
    top = _new_axes(cells[0])
    for i, trial in enumerate(info.trials):
        colour = SERIES[i % len(SERIES)]
        style: dict[str, Any] = {"color": colour, "linewidth": 1.3}
        if not info.every_step:
            top.fill_between(info.step, info.norms[i], info.peaks[i], color=colour, alpha=0.2, lw=0)
        label = f"trial {trial}" + ("" if info.every_step else " (mean; shaded up to the largest)")
        top.plot(info.step, info.norms[i], label=label, **style)
        if info.loss is not None and ax is None:
            cells[1].plot(info.step, info.loss[i], **style)
    if np.isfinite(limit):
        top.axhline(
            limit, color=BLACK, linestyle="--", linewidth=1.5, label=f"threshold: {limit:.3g}"
        )
    _log_if_wide(top, np.append(np.concatenate([info.norms.ravel(), info.peaks.ravel()]), limit))
    top.set_ylabel("gradient norm before clipping")
    _legend_above(top, 2)
    if ax is None and info.loss is not None:
        _new_axes(cells[1])
        _log_if_wide(cells[1], info.loss)
        cells[1].set_ylabel("loss of the batches")
    cells[-1].set_xlabel("step (optimizer updates)")
    return ax if ax is not None else _returned(figure)


@_checks.named_arguments
def plot_instability(
    study: Study,
    num_trials: int = 6,
    ax: Any = None,
    objective: str | None = None,
    maximize: bool | None = None,
) -> Any:
    """Draws the training loss at lr*, just above it, and nearest 5 and 10 times it.

    Where a loss rose beyond noise (`find_rises`) its line is thick until it recovered, from the
    hollow circle on, with a triangle at the top; a cross ends a run that diverged. A faint line is
    the peak of the smoothed loss between evaluations.

    Args:
      study: the study.
      num_trials: how many trials, at most.
      ax: matplotlib Axes to draw into; new ones by default.
      objective: the metric by which lr* is the best; the study's own by default.
      maximize: whether larger is better; see `outcomes`.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no such metric, no training loss was recorded, or num_trials is not a positive
        integer.

    Source: "Identifying unstable workloads".
    """
    info = _drawable(instability_curves(study, num_trials, objective, maximize))
    ax = _new_axes(ax, 7.0, 4.4)
    for i, (trial, row) in enumerate(zip(info.trials, info.rows, strict=True)):
        colour = SERIES[i % len(SERIES)]
        label = f"trial {trial}"
        if info.info.learning_rate:
            times = "lr*" if trial == info.info.best_trial else f"{info.multiples[i]:.3g} lr*"
            label = f"{info.rates[i]:.3g} ({times})"
        seen = np.flatnonzero(np.isfinite(info.loss[i]))
        if row.unstable:
            label += f", {row.kind.replace('high_loss', 'high loss')}"
            label += "" if row.kind in ("diverged", "high_loss") else " rise"
        drawn = ax.plot(
            info.step[seen],
            info.loss[i][seen],
            color=colour,
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.5,
            label=label,
        )
        drawn[0].set_zorder(3)
        if info.peak is not None:
            ax.plot(info.step, info.peak[i], color=colour, linewidth=0.7, alpha=0.45)
        for rise in row.rises:
            over = rise.recovered_step if rise.recovered_step >= 0 else info.step[-1]
            part = seen[(info.step[seen] >= rise.start_step) & (info.step[seen] <= over)]
            ax.plot(info.step[part], info.loss[i][part], color=colour, linewidth=4, alpha=0.35)
            mark: dict[str, Any] = {"color": colour, "linestyle": "none", "zorder": 5}
            ax.plot(rise.start_step, rise.before, "o", markerfacecolor="white", **mark)
            ax.plot(rise.top_step, rise.top, "^", markeredgecolor=BLACK, **mark)
        if row.infeasible and len(seen):
            end = seen[-1]
            ax.plot(
                info.step[end],
                info.loss[i][end],
                "X",
                color=colour,
                markersize=9,
                markeredgecolor=BLACK,
                zorder=6,
            )
    _log_if_wide(ax, info.loss)
    ax.set_xlabel("step (optimizer updates)")
    ax.set_ylabel(_metric_label(info.info.loss, False))
    if info.trials:
        _legend_above(ax, 2)
        if info.info.learning_rate:
            ax.get_legend().set_title(info.info.learning_rate, prop={"size": "small"})
    return ax


@_checks.named_arguments
def plot_curves_compared(runs: Any, metric: str | None = None, ax: Any = None) -> Any:
    """Draws one metric of runs from several studies: before and after a remedy.

    Args:
      runs: label to (study, trial).
      metric: a metric that all of them recorded; by default ``step/loss``, else ``train/loss``,
        else the objective of the first.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no runs, a metric that a study did not record, or no such trial.

    Source: "Examining the training curves".
    """
    info = _drawable(compared_curves(runs, metric))
    ax = _new_axes(ax, 7.0, 4.2)
    lines = zip(info.labels, info.steps, info.curves, strict=True)
    for i, (label, step, curve) in enumerate(lines):
        style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linewidth": 1.6}
        seen = np.isfinite(curve)
        text = label if seen.all() or not seen.any() or seen[-1] else f"{label} (diverged)"
        ax.plot(step[seen], curve[seen], linestyle=DASHES[i % len(DASHES)], label=text, **style)
    _log_if_wide(ax, np.concatenate(info.curves))
    ax.set_xlabel("step (optimizer updates)")
    ax.set_ylabel(_metric_label(info.metric, info.maximize))
    _legend_above(ax, 1)
    return ax


@_checks.named_arguments
def plot_remedies(info: RemedyComparison, axes: Any = None) -> Any:
    """Draws what each remedy against instability did, and how far it lets the learning rate go.

    Above, the objective of each remedy against the learning rate: filled marks are stable trials,
    open ones unstable, and crosses in the band along the top are infeasible. Below, the largest
    stable learning rate of each: an arrow says that the whole sweep was stable, a cross that none
    of it was. The recommended remedy is bold.

    Args:
      info: the answer of `compare_remedies`.
      axes: two matplotlib Axes to draw into, one for each part; a new figure by default.

    Returns:
      The matplotlib Figure.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from playbook_optax.procedures.remedies import RemedyRow
      >>> row = RemedyRow("none", 0.1, False, 0.1, 0.5, 10, 0.1, 0.0, 0, 0.0,
      ...                 (0.1, 1.0), (0.5, 2.0), (False, True))
      >>> info = RemedyComparison(None, (row,), "valid/loss", False, 10, 1, 1, 1.0)
      >>> [ax.get_title(loc="left") for ax in plot_remedies(info).axes]
      ['', 'largest stable learning rate']

    Source: "How can optimization failures be debugged and mitigated?"
    """
    rows = [row for row in _drawable(info.rows) if len(row.learning_rates) > 1]
    is_new = axes is None
    if is_new:
        _, axes = _pyplot().subplots(
            2,
            1,
            figsize=(7.0, 5.2 + 0.28 * len(rows)),
            height_ratios=(3.0, 0.6 + 0.28 * len(rows)),
            sharex=True,
            layout="constrained",
        )
    top, bottom = (_new_axes(ax) for ax in axes)
    rates = np.concatenate([row.learning_rates for row in rows])
    values = np.concatenate([row.values for row in rows])
    marks = "osD^vP*Xhd"
    for i, row in enumerate(rows):
        x, y = np.asarray(row.learning_rates), np.asarray(row.values)
        unstable = np.asarray(row.unstable, bool)
        colour, mark = SERIES[i % len(SERIES)], marks[i % len(marks)]
        bold = row.remedy == info.recommended
        style = {"marker": mark, "linestyle": "none", "color": colour, "markersize": 6}
        top.plot(
            x, y, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=2.6 if bold else 1.2
        )
        top.plot(x[unstable], y[unstable], **style, markerfacecolor="white")
        top.plot(x[~unstable], y[~unstable], **style, label=row.remedy)
        bad = ~np.isfinite(y)
        # Each remedy has its own height in the band, so that no cross hides another.
        height = 0.985 - 0.09 * (i + 0.5) / len(rows)
        top.plot(
            x[bad],
            np.full(bad.sum(), height),
            "x",
            transform=top.get_xaxis_transform(),
            color=colour,
            markersize=5,
            markeredgewidth=1.4,
        )
        limit = row.largest_stable_learning_rate
        if np.isfinite(limit):
            bottom.plot(limit, i, marker=mark, color=colour, markersize=8)
            if row.stable_to_end:
                bottom.annotate(
                    "→",
                    (limit, i),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    color=colour,
                    fontweight="bold",
                )
            bottom.plot([x[0], limit], [i, i], color=colour, linewidth=1.2, zorder=1)
        else:
            bottom.plot(x[0], i, "x", color=colour, markersize=8, markeredgewidth=1.8)
    open_marks = [np.asarray(row.unstable) & np.isfinite(row.values) for row in rows]
    if np.concatenate(open_marks).any():
        shown = {"marker": "o", "linestyle": "none", "color": GREY, "markerfacecolor": "white"}
        top.plot([], [], **shown, label="unstable")
    if _spans_decades(values):
        top.set_yscale("log")
        seen = values[np.isfinite(values)]
        _log_axis(top.yaxis, float(seen.min()), float(seen.max()))
    if not np.isfinite(values).all():
        low, high = top.get_ylim()
        room = (high / low) ** 0.14 if top.get_yscale() == "log" else 0.14 * (high - low)
        top.set_ylim(low, high * room if top.get_yscale() == "log" else high + room)
        top.fill_between([0, 1], 0.89, 1, transform=top.transAxes, color=GREY, alpha=0.12, lw=0)
        top.text(0.01, 0.945, "infeasible", transform=top.transAxes, va="center", fontsize="small")
    for ax in (top, bottom):
        ax.set_xscale("log")
        ax.set_xlim(rates.min() / 1.3, rates.max() * 1.3)
        _log_axis(ax.xaxis, float(rates.min()), float(rates.max()))
    top.set_ylabel(_metric_label(f"best {info.objective}", info.maximize))
    top.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        frameon=False,
        fontsize="small",
        handletextpad=0.3,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    bottom.set_yticks(range(len(rows)), [row.remedy for row in rows])
    for label, row in zip(bottom.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.remedy == info.recommended else "normal")
    bottom.set_ylim(len(rows) - 0.5, -0.5)
    bottom.set_xlabel("learning_rate (log scale)")
    bottom.set_title("largest stable learning rate", fontsize="small", loc="left")
    return _returned(top.figure) if is_new else top.figure


@_checks.named_arguments
def plot_budget(info: BudgetInfo, ax: Any = None) -> Any:
    """Draws the best of n trials as a box for each budget.

    Boxes hold the middle half of the studies of that size, the line in them is the median, and the
    whiskers reach from the luckiest to the unluckiest 5%. Where a quarter or more find no feasible
    trial a box is dashed and ends beyond the worst value; the share that finds none stands above.

    Args:
      info: from `budget_info`.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from playbook_optax.analysis.budgets import budget_info
      >>> study = Study.from_arrays(
      ...     {"x": [0.0, 1.0]}, {"loss": [[3.0], [1.0]]}, [10], objective="loss")
      >>> plot_budget(budget_info(study)).get_xlabel()
      'number of trials'

    Source: "How many trials are needed to get good results with quasi-random search?" (figure 3).
    """
    info = _drawable(info)
    ax = _new_axes(ax, 7.0, 4.2)
    table = np.asarray([row[1:6] for row in info.rows])
    seen = table[np.isfinite(table)]
    if seen.size:
        worst = seen.min() if info.maximize else seen.max()
        best = seen.max() if info.maximize else seen.min()
        # What no study reaches is drawn a little beyond the worst that one does.
        beyond = worst + 0.05 * ((worst - best) or abs(worst) or 1.0)
        for x, row in enumerate(info.rows):
            p5, p25, p50, p75, p95 = (v if np.isfinite(v) else beyond for v in row[1:6])
            ax.plot([x, x], [p5, p95], color=BLUE, linewidth=1.1, zorder=2)
            ax.bar(
                x,
                p75 - p25,
                bottom=p25,
                width=0.6,
                facecolor="white",
                edgecolor=BLUE,
                linestyle="-" if np.isfinite(row.p75) else "--",
                zorder=3,
            )
            if np.isfinite(row.p50):
                ax.plot([x - 0.3, x + 0.3], [p50, p50], color=VERMILLION, linewidth=2, zorder=4)
            if row.nothing >= 0.005:
                text = f"{row.nothing:.0%}"
                middle = {"ha": "center", "va": "bottom" if not info.maximize else "top"}
                ax.annotate(
                    text,
                    (x, max(p95, beyond) if not info.maximize else min(p95, beyond)),
                    xytext=(0, -3 if info.maximize else 3),
                    textcoords="offset points",
                    fontsize="small",
                    color=GREY,
                    **middle,
                )
        if any(row.nothing >= 0.005 for row in info.rows):
            ax.set_title(
                "grey: share of studies without a feasible trial", fontsize="small", loc="left"
            )
        ax.axhline(info.best_value, color=GREY, linestyle=":", linewidth=1, label="best trial")
        ax.use_sticky_edges = False
        ax.margins(y=0.1)
    ax.set_xticks(range(len(info.rows)), [str(row.budget) for row in info.rows])
    ax.set_xlabel("number of trials")
    ax.set_ylabel(_metric_label(f"best {info.objective}", info.maximize))
    return ax


@_checks.named_arguments
def plot_isolation(info: IsolationInfo, ax: Any = None) -> Any:
    """Draws the best trial for each value of a scientific hyperparameter.

    A dot is the best trial of a value, a star that of the best value, with a bar of one standard
    deviation over seeds where there are any. Where values differ in their number of trials, an
    open mark is what the best of the smallest number would be. Below each value stand its number
    of trials and the share that failed; a cross at the top is a value of which all failed.

    Args:
      info: from `isolation_info`.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from playbook_optax.analysis.isolation import isolation_info
      >>> study = Study.from_arrays(
      ...     {"width": [16, 64]}, {"loss": [[3.0], [1.5]]}, [10], objective="loss")
      >>> plot_isolation(isolation_info(study, "width")).get_xlabel()
      'width'

    Source: "Extracting insight from experimental results" (isolation plots).
    """
    ax = _new_axes(ax, 7.0, 4.2)
    labels = []
    unequal = len({row.num_trials for row in info.rows}) > 1
    for x, row in enumerate(info.rows):
        failed = f", {row.infeasible_share:.0%} failed" if row.num_infeasible else ""
        trials = "1 trial" if row.num_trials == 1 else f"{row.num_trials} trials"
        labels.append(f"{row.label}\n{trials}{failed}")
        if row.best_trial < 0:
            ax.plot(
                x,
                0.95,
                "x",
                transform=ax.get_xaxis_transform(),
                color=VERMILLION,
                markersize=8,
                markeredgewidth=1.8,
            )
            continue
        star = x == info.best
        if np.isfinite(row.spread):
            ax.errorbar(x, row.best_value, yerr=row.spread, color=BLUE, capsize=4, zorder=2)
        if unequal and np.isfinite(row.matched_value):
            ax.plot(
                x,
                row.matched_value,
                "D",
                color=GREY,
                markerfacecolor="white",
                markersize=7,
                zorder=2,
            )
        ax.plot(
            x,
            row.best_value,
            "*" if star else "o",
            color=ORANGE if star else BLUE,
            markeredgecolor=BLACK if star else BLUE,
            markersize=15 if star else 7,
            zorder=3,
        )
    if unequal:
        fewest = min(row.num_trials for row in info.rows)
        shown = {"marker": "D", "linestyle": "none", "color": GREY, "markerfacecolor": "white"}
        ax.plot([], [], **shown, label=f"best of {fewest}, at the median")
        _legend_above(ax, 1)
    ax.set_xticks(range(len(labels)), labels, fontsize="small")
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.margins(y=0.15)
    ax.set_xlabel(info.scientific)
    ax.set_ylabel(_metric_label(f"best {info.objective}", info.maximize))
    return ax


@_checks.named_arguments
def plot_best_steps(info: BestStepInfo, ax: Any = None) -> Any:
    """Draws the distribution of the steps that retrospective checkpoint selection finds.

    Solid bars are the good trials, outlined ones all trials that have a value. The shaded ends are
    the first tenth, where training was far too long if (almost) all good trials fall into it, and
    the last quarter, where longer training may be better.

    Args:
      info: from `best_step_info`.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from playbook_optax.analysis.training_length import best_step_info
      >>> study = Study.from_arrays(
      ...     {"x": np.arange(3)}, {"loss": np.tile(np.linspace(2, 1, 11), (3, 1))},
      ...     np.arange(0, 101, 10), objective="loss")
      >>> plot_best_steps(best_step_info(study)).get_ylabel()
      'trials'

    Source: "Deciding how long to train when training is not compute-bound".
    """
    ax = _new_axes(ax, 6.4, 3.6)
    centres, width = (info.edges[1:] + info.edges[:-1]) / 2, np.diff(info.edges)
    ax.bar(
        centres,
        info.counts,
        width,
        color="white",
        edgecolor=GREY,
        label=f"all {int(info.counts.sum())} trials",
    )
    ax.bar(
        centres,
        info.good_counts,
        0.8 * width,
        color=BLUE,
        label=f"the {int(info.good_counts.sum())} best",
    )
    ends = ((0.0, EARLY, VERMILLION, "far too long"), (LATE, 1.0, ORANGE, "train longer?"))
    for low, high, colour, text in ends:
        ax.axvspan(low, high, color=colour, alpha=0.18, zorder=0, linewidth=0, label=text)
    ax.margins(y=0.12)
    ticker = _checks.require("matplotlib.ticker", "plots", "Plotting")
    ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"step of the best {info.objective}, as a share of {info.num_steps} steps")
    ax.set_ylabel("trials")
    _legend_above(ax, 4)
    return ax


@_checks.named_arguments
def plot_steps_to_target(info: StepsToTarget, name: str | None = None, ax: Any = None) -> Any:
    """Draws how many steps each trial needed to reach a target, against a hyperparameter.

    A bar below each mark reaches to the evaluation before, at which the target was not reached yet.
    Crosses in the band along the top never reached it; those of infeasible trials are red. The
    fastest feasible trial is a star.

    Args:
      info: from `steps_to_target`.
      name: a hyperparameter; the learning rate, or else the first, by default.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no such hyperparameter.

    Source: "Determining the number of steps for each training run".
    """
    if name is None:
        name = "learning_rate" if "learning_rate" in info.points else next(iter(info.points), None)
    elif name not in info.points:
        raise ValueError(
            f"name = {name!r} is not a hyperparameter: {_checks.nearest(name, info.points)}"
        )
    ax = _new_axes(ax)
    num = len(info.steps)
    values = np.arange(num) if name is None else np.asarray(info.points[name])
    words = values.dtype.kind not in "iuf"
    kinds, places = np.unique(values, return_inverse=True)
    x = places if words else values.astype(np.float64)
    reached = info.steps >= 0
    good = reached & ~info.infeasible
    before = np.maximum(info.after, 0)
    ax.vlines(x[reached], before[reached], info.steps[reached], color=GREY, linewidth=1.2, zorder=1)
    for shown, colour, text in (
        (good, BLUE, "trial"),
        (reached & info.infeasible, VERMILLION, "infeasible later"),
    ):
        if shown.any():
            ax.plot(x[shown], info.steps[shown], "o", color=colour, markersize=6, label=text)
    fastest = info.fastest
    if fastest >= 0:
        ax.plot(
            x[fastest],
            info.steps[fastest],
            "*",
            color=ORANGE,
            markeredgecolor=BLACK,
            markersize=16,
            zorder=4,
            label=f"fastest: {info.steps[fastest]} steps",
        )
    top = int(info.step[-1]) if len(info.step) else 1
    ax.set_ylim(0, 1.12 * max(top, 1))
    if not reached.all():
        ax.axhspan(1.03 * top, 1.12 * top, color=GREY, alpha=0.12, linewidth=0)
        for shown, colour, text in (
            (~reached & ~info.infeasible, GREY, "never"),
            (~reached & info.infeasible, VERMILLION, "infeasible"),
        ):
            if shown.any():
                ax.plot(
                    x[shown],
                    np.full(shown.sum(), 1.075 * top),
                    "x",
                    color=colour,
                    markersize=7,
                    markeredgewidth=1.6,
                    label=f"{text} ({shown.sum()} of {num})",
                )
    ax.set_xlabel("trial" if name is None else name)
    if words:
        ax.set_xticks(range(len(kinds)), kinds)
    elif _spans_decades(x) and name is not None:
        ax.set_xscale("log")
        _log_axis(ax.xaxis, float(x.min()), float(x.max()))
        ax.set_xlabel(f"{name} (log scale)")
    ax.set_ylabel(f"steps to {info.metric} {'≥' if info.maximize else '≤'} {info.target:g}")
    _legend_above(ax, 3)
    return ax


@_checks.named_arguments
def plot_gradient_noise(info: GradientNoise, ax: Any = None) -> Any:
    """Draws the variance of the gradient against the batch size, for each variant of a workload.

    Marks are measured, with bars of two standard errors; the line through them is the variance of
    one example divided by the batch size. The fainter line is the squared norm of the gradient's
    mean: where the two cross, at the mark, is the noise scale.

    Args:
      info: the answer of `gradient_noise`.
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from playbook_optax.procedures.gradient_noise import NoiseRow, VariantNoise
      >>> rows = (NoiseRow(4, 2.0, 0.1, 8), NoiseRow(8, 1.0, 0.1, 4))
      >>> noise = VariantNoise("plain", 4, rows, 8.0, 0.4, 0.5, 0.1, 16.0, 2.0, 1.0, 0.0, 8)
      >>> plot_gradient_noise(GradientNoise((noise,), 2, 0)).get_xlabel()
      'batch size (examples, log scale)'

    Source: "Determining the number of steps for each training run".
    """
    ax = _new_axes(ax)
    noises = [noise for noise in info.variants if noise.trace > 0]
    sizes: list[float] = [row.batch_size for noise in noises for row in noise.rows]
    sizes += [noise.noise_scale for noise in noises if noise.noise_scale > 0]
    if not noises:
        ax.text(0.5, 0.5, "no noise", transform=ax.transAxes, ha="center")
    for i, noise in enumerate(noises):
        colour, dash = SERIES[i % len(SERIES)], DASHES[i % len(DASHES)]
        line = np.array([min(sizes), max(sizes)], np.float64)
        known = noise.noise_scale > 0
        scale = f"noise scale {noise.noise_scale:.3g}" if known else "noise scale not measurable"
        ax.plot(line, noise.trace / line, color=colour, linestyle=dash, linewidth=1.2)
        ax.errorbar(
            [row.batch_size for row in noise.rows],
            [row.variance for row in noise.rows],
            yerr=[min(2 * row.variance_error, 0.9 * row.variance) for row in noise.rows],
            fmt="osD^vP*Xhd"[i % 10],
            color=colour,
            markersize=6,
            capsize=3,
            label=f"{noise.name} ({scale})",
        )
        if known:
            ax.axhline(
                noise.squared_norm, color=colour, linestyle=dash, linewidth=0.8, alpha=0.5, zorder=1
            )
            ax.plot(
                noise.noise_scale,
                noise.squared_norm,
                "|",
                color=colour,
                markersize=16,
                markeredgewidth=2,
            )
    if noises:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(_tick_formatter())
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        _log_axis(ax.yaxis, low, high)
    ax.set_xlabel("batch size (examples, log scale)")
    ax.set_ylabel("variance of the gradient")
    if noises:
        _legend_above(ax, 1)
    return ax
