"""Figures of a study; rows are all they need. They show probes of the backbone's features."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from emp_plugin.studies.plan import describe_length
from emp_plugin.studies.rows import (
    COURSE,
    Cell,
    cells,
    data_title,
    protocol_title,
    split_references,
)
from emp_plugin.studies.titles import method_title
from emp_plugin.training.pictures import save_figure

# Okabe and Ito's colours, and a dark red of Paul Tol's, which the colour-blind can tell apart;
# a method has the same one everywhere
STYLES = {
    "emp": ("#D55E00", "o"),
    "emp_native": ("#E69F00", "D"),
    "simclr": ("#0072B2", "s"),
    "byol": ("#009E73", "^"),
    "vicreg": ("#CC79A7", "v"),
    "swav": ("#56B4E9", "P"),
    "ressl": ("#000000", "X"),
    "emp_crop_grey": ("#882255", "p"),
}
OTHER_STYLE = ("#777777", "*")  # of recipes that a user wrote
REFERENCE_STYLES = {"untrained": ("#777777", "--"), "raw pixels": ("#777777", ":")}


def draw_ablation(rows: pd.DataFrame, path: Path) -> None:
    """Accuracies against the values of the ablated setting, a column per length of training."""
    measured, references = _drawn(rows[rows.schedule != COURSE])
    if measured.empty:
        return
    setting = measured.setting.iloc[0].rpartition(".")[2]
    lengths = list(measured.groupby(["budget", "length", "schedule"]))
    figure, axes = _grid(cells(measured), len(lengths), width=4.8 * max(2, len(lengths)))
    for cell, line in axes.items():
        for axis, ((budget, length, schedule), of_length) in zip(line, lengths):
            part = cell.of(of_length)
            for method, curve in part.groupby("method", sort=False):
                points = curve.groupby("value").top1.agg(["mean", "std"]).reset_index()
                style = {"label": method_title(method), **_style(method)}
                _draw_curve(axis, points.value, points["mean"], points["std"], style)
            values = sorted(part.value.unique())
            if part.value.max() > 4 * part.value.min() > 0:
                axis.set_xscale("log")
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
            snapshot = ", snapshot" if schedule == "snapshot" else ""
            axis.set_xlabel(f"{setting} ({describe_length(budget, length)}{snapshot})")
    _finish(figure, axes, measured, references, path)


def draw_convergence(rows: pd.DataFrame, path: Path) -> None:
    """Accuracies against epochs and against minutes; points are evaluated runs or checkpoints.

    Rows of several machines, or without minutes, have FLOPs in place of minutes.
    """
    measured, references = _drawn(rows)
    if measured.empty:
        return
    measured = measured.assign(minutes=measured.train_seconds / 60, petaflops=measured.flops / 1e15)
    units = {"epoch": "epochs (passes through the training set)"}
    # minutes of several machines, or of runs side by side, cannot be compared
    if measured.machine.nunique() > 1 or measured.train_seconds.isna().any():
        units["petaflops"] = "PFLOP of training"
    else:
        units["minutes"] = "minutes of training (without evaluation)"
    figure, axes = _grid(cells(measured), len(units), width=9.6)
    for cell, line in axes.items():
        part = cell.of(measured)
        for axis, (quantity, unit) in zip(line, units.items()):
            for curve, style in _curves(part):
                points = curve.groupby("point").agg(
                    x=(quantity, "mean"), mean=("top1", "mean"), std=("top1", "std")
                )
                points = points.sort_values("x")
                _draw_curve(axis, points.x, points["mean"], points["std"], style)
            _scale(axis, part[quantity].min(), part[quantity].max())
            axis.set_xlabel(unit)
    _finish(figure, axes, measured, references, path)


def _drawn(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the figures show of the methods, and of the references."""
    return split_references(
        rows[
            (rows.error == "")
            & (rows.labels == 1)
            & rows.probe.isin(["linear", "published", "knn"])
            & rows.features.isin(["backbone", "pixels"])
        ]
    )


def _grid(lines: list[Cell], columns: int, width: float) -> tuple[Figure, dict[Cell, Any]]:
    """A figure, and its axes by cell."""
    figure = Figure(figsize=(width, 3.2 * len(lines) + 0.9), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, sharey="row")
    return figure, dict(zip(lines, axes))


def _style(method: str) -> dict[str, Any]:
    colour, marker = STYLES.get(method, OTHER_STYLE)
    return {"color": colour, "marker": marker}


def _draw_curve(
    axis: Axes, x: pd.Series, mean: pd.Series, deviation: pd.Series, style: dict[str, Any]
) -> None:
    """A single seed has no deviation."""
    axis.errorbar(x, mean, deviation.fillna(0), linewidth=1.4, capsize=3, **style)


def _curves(rows: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """The rows and the style of each curve of a cell.

    A ``point`` of it is what seeds have in common: the end of runs of one length, or an epoch in
    their course.
    """
    ends, course = rows[rows.schedule != COURSE], rows[rows.schedule == COURSE]
    runs = course.groupby(["method", "budget", "length"], sort=False)
    for (method, budget, length), points in runs:
        same = rows.run.isin(points.run) & rows.protocol.isin(points.protocol)
        whole = rows[same].drop_duplicates(["run", "epoch"])
        label = f"{method_title(method)}, in the course of {describe_length(budget, length)}"
        if rows.protocol.nunique() > 1:
            label += f" ({', '.join(points.protocol.unique())})"
        style = {"label": label, "markersize": 3, "linestyle": "-", **_style(method)}
        yield whole.assign(point=whole.epoch), style
    several = ends.schedule.nunique() > 1
    for (method, schedule), points in ends.groupby(["method", "schedule"], sort=False):
        label = f"{method_title(method)}, {schedule}" if several else method_title(method)
        style = {"label": label, "markersize": 6, **_style(method)}
        if schedule == "snapshot":
            style |= {"linestyle": "-", "markerfacecolor": style["color"]}
        else:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
        yield points.assign(point=points.budget + points.length.astype(str)), style


def _scale(axis: Axes, least: float, most: float) -> None:
    """From 0, or logarithmic with few labels and without powers."""
    if not most > 20 * least > 0:
        axis.set_xlim(0, 1.05 * most)
        return
    axis.set_xscale("log")
    subs = (1, 2, 5) if math.log10(most / least) < 3 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")


def _finish(
    figure: Figure,
    axes: dict[Cell, Any],
    measured: pd.DataFrame,
    references: pd.DataFrame,
    path: Path,
) -> None:
    """Add what the figures have in common: the references as horizontal lines, titles, legend."""
    handles = {}
    for cell, line in axes.items():
        same = cell.of(references)
        for axis in line:
            for (name, _), reference in same.groupby(["method", "title"]):
                colour, style = REFERENCE_STYLES[name]
                height = reference.top1.mean()
                axis.axhline(height, color=colour, linestyle=style, linewidth=1.2, label=name)
            axis.grid(alpha=0.25)
            for handle, label in zip(*axis.get_legend_handles_labels()):
                handles[label] = handle
        _name_lines(line[-1], same[same.title != same.method])
        line[0].set_ylabel(f"top-1 accuracy (%)\n{cell.caption}")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, len(handles)),
        fontsize=8,
        frameon=False,
    )
    spread = f", seed {measured.seed.iloc[0]} only"
    if measured.seed.nunique() > 1:
        spread = ", mean and standard deviation over seeds"
    title = f"{data_title(measured)}: probes of the backbone's features"
    figure.suptitle(f"{title}, {protocol_title(measured)}{spread}", fontsize=10)
    save_figure(figure, path)


def _name_lines(axis: Axes, references: pd.DataFrame) -> None:
    """Say beside the lines which methods they are for; lines at one height share their text.

    Of two lines close to each other the upper one has its text above it, the lower one below.
    """
    lines: dict[float, list[str]] = {}
    for (method, title), height in references.groupby(["method", "title"]).top1.mean().items():
        lines.setdefault(round(height, 2), []).append(title.removeprefix(f"{method}, "))
    low, high = axis.get_ylim()
    near = 0.04 * (high - low)
    for height, texts in lines.items():
        above = any(height - near < other < height for other in lines)
        below = any(height < other < height + near for other in lines)
        place = "center" if above == below else "bottom" if above else "top"
        text, transform = ", ".join(dict.fromkeys(texts)), axis.get_yaxis_transform()
        axis.text(1.01, height, text, transform=transform, fontsize=6, va=place)
