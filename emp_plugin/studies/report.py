"""From the rows of a comparison (CSV) to its tables and plots; nothing else is needed. And the table of transfers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
from matplotlib.ticker import LogLocator  # noqa: E402

from emp_plugin.errors import UserError  # noqa: E402
from emp_plugin.studies.plan import describe_length  # noqa: E402
from emp_plugin.training.folder import write_text  # noqa: E402
from emp_plugin.training.pictures import save_figure  # noqa: E402

COLUMNS = [
    "dataset",
    "holdout",
    "fraction",
    "method",
    "setting",
    "value",
    "seed",
    "schedule",
    "budget",
    "length",
    "epoch",
    "steps",
    "images",
    "patches",
    "train_seconds",
    "evaluation_seconds",
    "inputs",
    "features",
    "view",
    "probe",
    "labels",
    "top1",
    "top5",
    "paper",
    "run",
    "error",
]
COURSE = "course"  # the schedule of a row in the course of a run: after ``epoch`` epochs of one of ``length``
HERE = Path(__file__).parent
PROBES = {
    "linear": "linear",
    "online linear": "online linear",
    "knn": "k-NN",
    "mlp": "MLP",
}  # in the order of the columns
NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny-imagenet": "Tiny ImageNet",
    "imagenet100": "ImageNet-100",
}
# Okabe and Ito's colours, and a dark red of Paul Tol's, which the colour-blind can tell apart; a method has the same one everywhere
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
LABELS = {
    "emp": "EMP-SSL",
    "emp_native": "EMP-SSL, native patches",
    "emp_crop_grey": "EMP-SSL, crop and grey alone",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "vicreg": "VICReg",
    "swav": "SwAV",
    "ressl": "ReSSL",
}


def write_report(results: Path, folder: Path, thresholds: list[float]) -> None:
    """Write table.md, time_to_accuracy.md and convergence.png into ``folder``; for the values of one setting ablation.png in its place.

    Args:
        results: CSV of :data:`COLUMNS`.
        folder: of the comparison.
        thresholds: top-1 accuracies in percent for time_to_accuracy.md.

    Raises:
        UserError: there is no such CSV.
    """
    if not results.is_file():
        raise UserError(f"{results} is not there: run the comparison without report_only first")
    texts = ["setting", "inputs", "schedule", "paper", "error"]
    rows = pd.read_csv(results, dtype=dict.fromkeys(texts, str)).reindex(columns=COLUMNS)
    rows[texts] = rows[texts].fillna("")
    rows["labels"] = rows["labels"].fillna(
        1.0
    )  # a failed run, or a CSV from before there were parts of the labels
    rows["label"] = [_label(row.method, row.setting, row.value) for row in rows.itertuples()]
    measured, references = _split(rows)
    for (view, inputs), alike in references.groupby(["view", "inputs"]):
        if (references.view == view).sum() > len(alike):
            methods = measured[(measured.view == view) & (measured.inputs == inputs)].label.unique()
            rows.loc[alike.index, "label"] += f", for {', '.join(methods)}"
    write_text(folder / "table.md", table(rows))
    write_text(folder / "time_to_accuracy.md", time_to_accuracy(rows, thresholds))
    if rows.setting.any():
        draw_ablation(rows, folder / "ablation.png")
    else:
        draw_convergence(rows, folder / "convergence.png")


# ------------------------------------------------------------------------------------------------------------- table.md


def table(rows: pd.DataFrame) -> str:
    """One table per length, schedule and part of the labels: this comparison's figures, and the paper's in columns of their own."""
    measured, references = _split(rows[rows.schedule != COURSE])
    lines = [f"# {_title(rows)}", "", "Top-1 accuracy in percent, last epoch" + _spread(rows)]
    groups = measured.groupby(["budget", "length", "schedule", "labels"])
    for (budget, length, schedule, labels), part in sorted(
        groups, key=lambda group: (*group[0][:3], -group[0][3])
    ):
        lines += [
            "",
            f"## {describe_length(budget, length)}, schedule {schedule}{_labels(labels)}",
            "",
        ]
        lines += _filled(_table_lines(part, references[references.labels == labels]), texts=2)
        lines += _not_evaluated(part)
        lines += [
            f"\n{row.label}, seed {row.seed}: failed: {row.error}"
            for row in part[part.error != ""].itertuples()
        ]
    return "\n".join(lines + ["", _notes(measured)]) + "\n"


def _table_lines(measured: pd.DataFrame, references: pd.DataFrame) -> list[list[str]]:
    """The header, and a line per label and features."""
    cells = _cells(measured)
    header = ["method", "features", "epochs", "minutes", "patches seen"]
    for probe, view in cells:
        header += [f"{PROBES[probe]}, {view}"] + (["paper"] if probe == "linear" else [])
    lines = [header + ["seeds"]]
    for source in (measured, references):
        for (label, features), of_label in source[source.error == ""].groupby(
            ["label", "features"], sort=False
        ):
            lines.append(_table_line(label, features, of_label, cells))
    return lines


def _table_line(
    label: str, features: str, rows: pd.DataFrame, cells: list[tuple[str, str]]
) -> list[str]:
    trained = rows.train_seconds.max() > 0
    line = [
        label,
        features,
        f"{rows.epoch.mean():.4g}" if trained else "",
        _minutes(rows.groupby("seed").train_seconds.first()) if trained else "",
        f"{rows.patches.mean():,.0f}" if trained else "",
    ]
    for probe, view in cells:
        cell = rows[(rows.probe == probe) & (rows.view == view)]
        line.append(_mean(cell.top1, 2))
        if probe == "linear":
            line.append(
                _paper_figure(cell.iloc[0]) if len(cell) and _papers_cell(cell.iloc[0]) else ""
            )
    seeds = rows.seed.nunique()
    return line + [str(seeds) if seeds > 1 else f"1 (seed {rows.seed.iloc[0]})"]


def _not_evaluated(measured: pd.DataFrame) -> list[str]:
    """What the paper has of these runs, where that was not evaluated: a line for each label."""
    lines = []
    for label, of_label in measured[(measured.paper != "") & (measured.labels == 1)].groupby(
        "label", sort=False
    ):
        row = of_label.iloc[0]
        evaluated = any(
            _papers_cell(other) for _, other in of_label[of_label.probe == "linear"].iterrows()
        )
        if not evaluated and (figure := _paper_figure(row)):
            lines.append(
                f"\n{label}: the paper has {figure}, of {' and '.join(_papers_features(row))}, not evaluated here."
            )
    return lines


def _paper_figure(row: pd.Series) -> str:
    """The paper's figure of the same method, linear probe and epochs, or ""; the reading of the epochs is the same, or one that the paper does not state."""
    same = paper_figures(row.dataset, row.paper)
    same = same[(same.epochs - row.epoch).abs() < 0.01]
    for schedule, mark in ((row.schedule, ""), ("not stated", "\\*")):
        if len(found := same[same.schedule == schedule]):
            return f"{found.top1.iloc[0]:.1f}{mark}"
    return ""


def _papers_features(row: pd.Series) -> tuple[str, str]:
    """The features and the view that the paper probes of a method."""
    return (
        ("embedding", "bag of 128 augmented")
        if row.paper.startswith("EMP")
        else ("backbone", "whole")
    )


def _papers_cell(row: pd.Series) -> bool:
    return row.paper != "" and row.labels == 1 and (row.features, row.view) == _papers_features(row)


def paper_figures(dataset: str, name: str) -> pd.DataFrame:
    """The rows of paper.csv of a method, as it is called there."""
    paper = pd.read_csv(HERE / "paper.csv")
    return paper[(paper.dataset == dataset) & (paper.method == name)]


def _notes(rows: pd.DataFrame) -> str:
    notes = [
        "Epochs are passes through the training set, of which each image gives all its views (patches); minutes are of training alone, without "
        "evaluation, on the machine of versions.json. Momentum networks' passes are not counted among the patches seen.",
        "Raw pixels and untrained: the images themselves, and the same backbone with the seed's initial weights, normalised and (for bags) cropped as "
        "the methods they are for have it; for all of them, if none is named.",
        "Paper: arXiv 2304.03977, tables 1 to 3; linear probe, for EMP-SSL on the embedding of a bag of 128 augmented patches. Empty, or without a "
        "column, where it has no such figure. \\* the paper does not say whether the schedule spanned these epochs.",
    ]
    if "online linear" in set(rows.probe):
        notes.append(
            "Online linear: solo-learn's classifier, trained along with the method on its views; linear: trained afterwards."
        )
    if "snapshot" in set(rows.schedule):
        notes.append(
            "Schedule fitted: the learning rate's schedule, and whatever else a recipe counts in epochs, spans the epochs of the row. Snapshot: the "
            "checkpoint after these epochs of the longest schedule."
        )
    return "\n\n".join(notes)


# --------------------------------------------------------------------------------------------------- time_to_accuracy.md


def time_to_accuracy(rows: pd.DataFrame, thresholds: list[float]) -> str:
    """Minutes of training after which each method is first seen at a threshold: of the evaluated points the one with the shortest training."""
    measured, _ = _split(rows)
    seeds = measured.groupby("label").seed.nunique()
    measured = measured[
        (measured.error == "") & (measured.labels == 1) & (measured.probe == "linear")
    ]
    lines = [
        f"# Minutes of training to an accuracy: {_title(rows)}",
        "",
        "Linear probe: training minutes of the first evaluated point at or above the threshold"
        + _spread(rows)
        + " Only evaluated points count (`evaluate_every` sets how many), so that the true time may be shorter. The paper's minutes stand beside the "
        "features and the view that it probes.",
    ]
    paper = pd.read_csv(HERE / "paper_minutes.csv")
    paper = paper[paper.dataset.isin(set(rows.dataset))]
    for _, view in _cells(measured):
        header = ["method", "features"]
        for threshold in thresholds:
            header += [f"{threshold:g} %"] + (
                ["paper, two A100"] if threshold in set(paper.threshold) else []
            )
        lines += [
            "",
            f"## {view}",
            "",
            _line(header + ["best seen, %"]),
            _line(["---"] * 2 + ["---:"] * (len(header) - 1)),
        ]
        for (label, features), of_method in measured[measured.view == view].groupby(
            ["label", "features"], sort=False
        ):
            line = [label, features]
            for threshold in thresholds:
                line.append(_first_minutes(of_method, threshold, seeds[label]))
                if threshold in set(paper.threshold):
                    same = paper[
                        (paper.method == of_method.paper.iloc[0]) & (paper.threshold == threshold)
                    ]
                    line.append(
                        f"{same.minutes.iloc[0]}"
                        if len(same) and _papers_cell(of_method.iloc[0])
                        else ""
                    )
            lines.append(_line(line + [f"{of_method.top1.max():.2f}"]))
    return "\n".join(lines) + "\n"


def _first_minutes(rows: pd.DataFrame, threshold: float, seeds: int) -> str:
    first = rows[rows.top1 >= threshold].groupby("seed").train_seconds.min()
    if not len(first):
        return "not reached"
    return _minutes(first) + ("" if len(first) == seeds else f" ({len(first)} of {seeds} seeds)")


# ---------------------------------------------------------------------------------------- ablation.png, convergence.png


def draw_ablation(rows: pd.DataFrame, path: Path) -> None:
    """Linear probe and k-NN of the backbone's features against the values of the ablated setting; lengths of training are side by side."""
    measured, references = _drawn(rows[rows.schedule != COURSE])
    if measured.empty:
        return
    setting = measured.setting.iloc[0].rpartition(".")[2]
    lengths = list(measured.groupby(["budget", "length", "schedule"]))
    cells = _cells(measured)
    figure, axes = plt.subplots(
        len(cells),
        len(lengths),
        figsize=(4.8 * max(2, len(lengths)), 3.2 * len(cells) + 0.9),
        squeeze=False,
        layout="constrained",
        sharey="row",
    )
    for (probe, view), line in zip(cells, axes):
        for axis, ((budget, length, schedule), of_length) in zip(line, lengths):
            part = of_length[(of_length.probe == probe) & (of_length.view == view)]
            for method, curve in part.groupby("method", sort=False):
                colour, marker = STYLES.get(method, OTHER_STYLE)
                points = curve.groupby("value").top1.agg(["mean", "std"])
                axis.errorbar(
                    points.index,
                    points["mean"],
                    points["std"].fillna(0),
                    color=colour,
                    marker=marker,
                    linewidth=1.4,
                    capsize=3,
                    label=LABELS.get(method, method),
                )
            if part.value.max() > 4 * part.value.min() > 0:
                axis.set_xscale("log")
            axis.set_xticks(
                values := sorted(part.value.unique()), [f"{value:g}" for value in values]
            )
            axis.minorticks_off()
            axis.set_xlabel(
                f"{setting} ({describe_length(budget, length)}{', snapshot' if schedule == 'snapshot' else ''})"
            )
    _finish(figure, axes, cells, measured, references, path)


def draw_convergence(rows: pd.DataFrame, path: Path) -> None:
    """Linear probe and k-NN of the backbone's features against epochs and against minutes; points are evaluated runs or checkpoints."""
    measured, references = _drawn(rows)
    if measured.empty:
        return
    cells = _cells(measured)
    figure, axes = plt.subplots(
        len(cells),
        2,
        figsize=(9.6, 3.2 * len(cells) + 0.9),
        squeeze=False,
        layout="constrained",
        sharey="row",
    )
    for (probe, view), line in zip(cells, axes):
        part = measured[(measured.probe == probe) & (measured.view == view)].assign(
            minutes=measured.train_seconds / 60
        )
        for axis, (quantity, unit) in zip(
            line,
            (
                ("epoch", "epochs (passes through the training set)"),
                ("minutes", "minutes of training (without evaluation)"),
            ),
        ):
            for label, style, curve in _curves(part):
                points = (
                    curve.groupby("point")
                    .agg(x=(quantity, "mean"), y=("top1", "mean"), spread=("top1", "std"))
                    .sort_values("x")
                )
                axis.errorbar(
                    points.x,
                    points.y,
                    points.spread.fillna(0),
                    linewidth=1.4,
                    capsize=3,
                    label=label,
                    **style,
                )
            if part[quantity].max() > 20 * part[quantity].min() > 0:
                axis.set_xscale("log")
                decades = math.log10(part[quantity].max() / part[quantity].min())
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("")
            else:
                axis.set_xlim(0, 1.05 * part[quantity].max())
            axis.set_xlabel(unit)
    _finish(figure, axes, cells, measured, references, path)


def _drawn(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the plots show of the methods, and of the references."""
    return _split(
        rows[
            (rows.error == "")
            & (rows.labels == 1)
            & rows.probe.isin(["linear", "knn"])
            & rows.features.isin(["backbone", "pixels"])
        ]
    )


def _finish(
    figure: plt.Figure,
    axes: Any,
    cells: list[tuple[str, str]],
    measured: pd.DataFrame,
    references: pd.DataFrame,
    path: Path,
) -> None:
    """Add what the plots have in common, with a row of ``axes`` per cell: the references as horizontal lines, grid, labels, legend and title."""
    for (probe, view), line in zip(cells, axes):
        same = references[(references.probe == probe) & (references.view == view)]
        for axis in line:
            for (name, label), reference in same.groupby(["method", "label"]):
                colour, style = REFERENCE_STYLES[name]
                axis.axhline(
                    reference.top1.mean(), color=colour, linestyle=style, linewidth=1.2, label=name
                )
            axis.grid(alpha=0.25)
        _name_lines(line[-1], same[same.label != same.method])
        line[0].set_ylabel(
            f"top-1 accuracy (%)\n{PROBES[probe]}, {'whole images' if view == 'whole' else f'{view} patches'}"
        )
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, len(handles)),
        fontsize=8,
        frameon=False,
    )
    spread = (
        ", mean and standard deviation over seeds"
        if measured.seed.nunique() > 1
        else f", seed {measured.seed.iloc[0]} only"
    )
    figure.suptitle(f"{_title(measured)}: probes of the backbone's features{spread}", fontsize=10)
    save_figure(figure, path)


def _name_lines(axis: plt.Axes, references: pd.DataFrame) -> None:
    """Beside the lines, which methods they are for; of two close to each other the upper one has its text above it and the lower one below."""
    heights = references.groupby(["method", "label"]).top1.mean()
    near = 0.04 * (axis.get_ylim()[1] - axis.get_ylim()[0])
    for (name, label), height in heights.items():
        side = ((heights > height - near) & (heights < height)).any() - int(
            ((heights < height + near) & (heights > height)).any()
        )
        axis.text(
            1.01,
            height,
            label.removeprefix(f"{name}, "),
            transform=axis.get_yaxis_transform(),
            fontsize=6,
            va=("center", "bottom", "top")[side],
        )


def _curves(rows: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], pd.DataFrame]]:
    """(label, style, rows) of each line, a ``point`` of it being what seeds have in common: the end of runs of one length, or an epoch in their course."""
    ends, course = rows[rows.schedule != COURSE], rows[rows.schedule == COURSE]
    for (method, budget, length), points in course.groupby(
        ["method", "budget", "length"], sort=False
    ):
        colour, marker = STYLES.get(method, OTHER_STYLE)
        whole = rows[rows.run.isin(points.run)].drop_duplicates(["run", "epoch"])
        label = f"{LABELS.get(method, method)}, in the course of {describe_length(budget, length)}"
        yield (
            label,
            {"color": colour, "marker": marker, "markersize": 3, "linestyle": "-"},
            whole.assign(point=whole.epoch),
        )
    for (method, schedule), points in ends.groupby(["method", "schedule"], sort=False):
        colour, marker = STYLES.get(method, OTHER_STYLE)
        style = (
            {"linestyle": "-", "markerfacecolor": colour}
            if schedule == "snapshot"
            else {"linestyle": "--", "markerfacecolor": "white"}
        )
        label = LABELS.get(method, method) + (
            f", {schedule}" if ends.schedule.nunique() > 1 else ""
        )
        yield (
            label,
            {"color": colour, "marker": marker, "markersize": 6} | style,
            points.assign(point=points.budget + points.length.astype(str)),
        )


# ----------------------------------------------------------------------------------------------------------- transfer.md


def transfer_table(rows: pd.DataFrame) -> str:
    """One table per dataset that was probed, as far as it was: a line per checkpoint and features, with what it was trained on.

    Args:
        rows: of :func:`emp_plugin.studies.transfer.transfer`.
    """
    twins = (
        rows.groupby(["name", "trained_on", "seed"]).checkpoint.transform("nunique") > 1
    )  # runs of other settings, or steps of one
    rows = rows.assign(name=rows["name"].mask(twins, rows["name"] + ", " + rows.checkpoint))
    lines = [
        "# Features probed on the dataset they were trained on, and on the other",
        "",
        "Top-1 accuracy in percent.",
    ]
    for (_, labels, _, _), part in rows.groupby(
        ["dataset", "labels", "holdout", "fraction"], sort=False
    ):
        cells = _cells(part)
        table = [
            [
                "model",
                "trained on",
                "seed",
                "features",
                *(f"{PROBES[probe]}, {view}" for probe, view in cells),
            ]
        ]
        for (_, model, features), of_model in part.groupby(
            ["checkpoint", "model", "features"], sort=False
        ):
            run = of_model.iloc[0]
            about = (
                [model, "", ""]
                if model in REFERENCE_STYLES
                else [run["name"], NAMES.get(run.trained_on, run.trained_on), str(run.seed)]
            )
            top1 = of_model.set_index(["probe", "view"]).top1
            table.append(
                [
                    *about,
                    features,
                    *(f"{top1[cell]:.2f}" if cell in top1.index else "" for cell in cells),
                ]
            )
        lines += ["", f"## {_title(part)}{_labels(labels)}", "", *_filled(table, texts=4)]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------- pieces


def _label(method: str, setting: str, value: float) -> str:
    """What a row is of: "EMP-SSL", or in an ablation "EMP-SSL, num_patches 5"."""
    return LABELS.get(method, method) + (
        f", {setting.rpartition('.')[2]} {value:g}" if setting else ""
    )


def _split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of methods, rows of the references)."""
    reference = rows.method.isin(REFERENCE_STYLES)
    return rows[~reference], rows[reference]


def _cells(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(probe, view) in the order of the columns."""
    there = set(rows[["probe", "view"]].dropna().itertuples(index=False, name=None))
    return sorted(
        there, key=lambda cell: (list(PROBES).index(cell[0]), cell[1] != "whole", cell[1])
    )


def _labels(labels: float) -> str:
    return "" if labels == 1 else f", {100 * labels:g} % of the labels"


def _title(rows: pd.DataFrame) -> str:
    name = NAMES.get(rows.dataset.iloc[0], rows.dataset.iloc[0])
    holdout, fractions = rows.holdout.max(), rows.fraction.fillna(-1).unique()
    if len(fractions) == 1 and 0 < fractions[0] < 1:
        name += f", {100 * fractions[0]:g} % of the training images"
    return name + (f", held-out {100 * holdout:g} % of the training set" if holdout else "")


def _spread(rows: pd.DataFrame) -> str:
    seeds = rows.seed.nunique()
    return (
        f"; mean and standard deviation over {seeds} seeds."
        if seeds > 1
        else f"; a single seed ({rows.seed.iloc[0]})."
    )


def _mean(values: pd.Series, digits: int) -> str:
    """Mean and, of several values, the sample standard deviation."""
    if not len(values):
        return ""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def _minutes(seconds: pd.Series) -> str:
    """As :func:`_mean`, in minutes; a GPU's are parts of one."""
    return _mean(seconds / 60, 1 if seconds.mean() >= 60 else 2)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _filled(table: list[list[str]], texts: int) -> list[str]:
    """A table in Markdown, without the columns that are empty below its header (the first line); the first ``texts`` columns are left-aligned."""
    header, *lines = (
        [line[i] for i, column in enumerate(zip(*table)) if i < texts or any(column[1:])]
        for line in table
    )
    return [
        _line(header),
        _line(["---"] * texts + ["---:"] * (len(header) - texts)),
        *map(_line, lines),
    ]
