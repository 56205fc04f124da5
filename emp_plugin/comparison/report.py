"""From the rows of a comparison (CSV) to table.md, time_to_accuracy.md and convergence.png; nothing else is needed."""
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)

from emp_plugin.comparison.plan import describe_length  # noqa: E402
from emp_plugin.errors import UserError  # noqa: E402
from emp_plugin.runs.folder import write_text  # noqa: E402

COLUMNS = ["dataset", "holdout", "method", "setting", "value", "seed", "schedule", "budget", "length", "epoch", "steps", "images", "patches",
           "train_seconds", "evaluation_seconds", "features", "view", "probe", "top1", "top5", "paper", "run", "error"]
HERE = Path(__file__).parent
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny ImageNet", "imagenet100": "ImageNet-100"}
# Okabe and Ito's colours, which the colour-blind can tell apart; a method has the same one everywhere
STYLES = {"emp": ("#D55E00", "o"), "emp_native": ("#E69F00", "D"), "simclr": ("#0072B2", "s"), "byol": ("#009E73", "^"), "vicreg": ("#CC79A7", "v"),
          "swav": ("#56B4E9", "P"), "ressl": ("#000000", "X")}
REFERENCE_STYLES = {"untrained": ("#777777", "--"), "raw pixels": ("#777777", ":")}
LABELS = {"emp": "EMP-SSL", "emp_native": "EMP-SSL, native patches", "simclr": "SimCLR", "byol": "BYOL", "vicreg": "VICReg", "swav": "SwAV",
          "ressl": "ReSSL"}


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
    texts = ["setting", "schedule", "paper", "error"]
    rows = pd.read_csv(results, dtype=dict.fromkeys(texts, str)).reindex(columns=COLUMNS)
    rows[texts] = rows[texts].fillna("")
    rows["label"] = [_label(row.method, row.setting, row.value) for row in rows.itertuples()]
    write_text(folder / "table.md", table(rows))
    write_text(folder / "time_to_accuracy.md", time_to_accuracy(rows, thresholds))
    if rows.setting.any():
        draw_ablation(rows, folder / "ablation.png")
    else:
        draw_convergence(rows, folder / "convergence.png")


# ------------------------------------------------------------------------------------------------------------- table.md


def table(rows: pd.DataFrame) -> str:
    """One table per length and schedule: this comparison's figures, and the paper's in columns of their own."""
    measured, references = _split(rows)
    cells = _cells(rows)
    lines = [f"# {_title(rows)}", "", "Top-1 accuracy in percent, last epoch" + _spread(rows)]
    for (budget, length, schedule), part in measured.groupby(["budget", "length", "schedule"], sort=True):
        lines += ["", f"## {describe_length(budget, length)}, schedule {schedule}", ""]
        header = ["method", "features", "epochs", "minutes", "patches seen"]
        for probe, view in cells:
            header += [f"{_probe(probe)}, {view}"] + (["paper"] if probe == "linear" else [])
        lines += [_line(header + ["seeds"]), _line(["---"] * 3 + ["---:"] * (len(header) - 2))]
        for source in (part, references):
            for (label, features), of_method in source[source.error == ""].groupby(["label", "features"], sort=False):
                lines.append(_line(_table_row(label, features, of_method, cells)))
        lines += [f"\n{row.label}, seed {row.seed}: failed: {row.error}" for row in part[part.error != ""].itertuples()]
    return "\n".join(lines + ["", _notes(measured)]) + "\n"


def _table_row(method: str, features: str, rows: pd.DataFrame, cells: list[tuple[str, str]]) -> list[str]:
    trained = rows.train_seconds.max() > 0
    line = [method, features, f"{rows.epoch.mean():.3g}" if trained else "",
            _mean(rows.groupby("seed").train_seconds.first() / 60, 1) if trained else "", f"{rows.patches.mean():,.0f}" if trained else ""]
    for probe, view in cells:
        cell = rows[(rows.probe == probe) & (rows.view == view)]
        line.append(_mean(cell.top1, 2))
        if probe == "linear":
            line.append(_paper_figure(cell.iloc[0]) if len(cell) else "")
    seeds = rows.seed.nunique()
    return line + [str(seeds) if seeds > 1 else f"1 (seed {rows.seed.iloc[0]})"]


def _paper_figure(row: pd.Series) -> str:
    """The paper's figure for the same method, epochs and probe: of EMP-SSL the embedding of a bag of patches, of the others the backbone's features
    of whole images; the reading of the epochs is the same, or one that the paper does not state."""
    emp = row.paper.startswith("EMP")
    if not row.paper or (row.features, row.view != "whole") != (("embedding", True) if emp else ("backbone", False)):
        return ""
    paper = pd.read_csv(HERE / "paper.csv")
    same = paper[(paper.dataset == row.dataset) & (paper.method == row.paper) & ((paper.epochs - row.epoch).abs() < 0.01)]
    for schedule, mark in ((row.schedule, ""), ("not stated", "\\*")):
        if len(found := same[same.schedule == schedule]):
            return f"{found.top1.iloc[0]:.1f}{mark}"
    return ""


def _notes(rows: pd.DataFrame) -> str:
    notes = ["Epochs are passes through the training set, of which each image gives all its views (patches); minutes are of training alone, without "
             "evaluation, on the machine of versions.json. Momentum networks' passes are not counted among the patches seen.",
             "Raw pixels and untrained: the images themselves, and the same backbone with the seed's initial weights; its bag has the patches of the "
             "first method.",
             "Paper: arXiv 2304.03977, tables 1 to 3; linear probe, for EMP-SSL on the bag of 128 augmented patches. Empty where it has no such "
             "figure. \\* the paper does not say whether the schedule spanned these epochs."]
    if "snapshot" in set(rows.schedule):
        notes.append("Schedule fitted: the learning rate's schedule, and whatever else a recipe counts in epochs, spans the epochs of the row. Snapshot: the "
                     "checkpoint after these epochs of the longest schedule.")
    return "\n\n".join(notes)


# --------------------------------------------------------------------------------------------------- time_to_accuracy.md


def time_to_accuracy(rows: pd.DataFrame, thresholds: list[float]) -> str:
    """Minutes of training after which each method is first seen at a threshold: of the evaluated points the one with the shortest training."""
    measured, _ = _split(rows)
    measured = measured[measured.error == ""]
    lines = [f"# Minutes of training to an accuracy: {_title(rows)}", "",
             "Linear probe, backbone's features: training minutes of the first evaluated point at or above the threshold" + _spread(rows)
             + " Only evaluated points count, so that the true time may be shorter."]
    paper = pd.read_csv(HERE / "paper_minutes.csv")
    paper = paper[paper.dataset.isin(set(rows.dataset))]
    for view in _views(measured):
        part = measured[(measured.probe == "linear") & (measured.features == "backbone") & (measured.view == view)]
        header = ["method"]
        for threshold in thresholds:
            header += [f"{threshold:g} %"] + (["paper, two A100"] if threshold in set(paper.threshold) else [])
        lines += ["", f"## {view}", "", _line(header + ["best seen, %"]), _line(["---"] + ["---:"] * len(header))]
        for label, of_method in part.groupby("label", sort=False):
            line = [label]
            for threshold in thresholds:
                line.append(_first_minutes(of_method, threshold))
                if threshold in set(paper.threshold):
                    same = paper[(paper.method == of_method.paper.iloc[0]) & (paper.threshold == threshold)]
                    line.append(f"{same.minutes.iloc[0]}" if len(same) else "")
            lines.append(_line(line + [f"{of_method.top1.max():.2f}"]))
    return "\n".join(lines) + "\n"


def _first_minutes(rows: pd.DataFrame, threshold: float) -> str:
    first = rows[rows.top1 >= threshold].groupby("seed").train_seconds.min() / 60
    seeds = rows.seed.nunique()
    if not len(first):
        return "not reached"
    return _mean(first, 1) + ("" if len(first) == seeds else f" ({len(first)} of {seeds} seeds)")


# ---------------------------------------------------------------------------------------------------------- ablation.png


def draw_ablation(rows: pd.DataFrame, path: Path) -> None:
    """Linear probe and k-NN of the backbone's features against the values of the ablated setting; lengths of training are side by side."""
    measured, references = _split(rows[(rows.error == "") & rows.features.isin(["backbone", "pixels"])])
    there = set(zip(measured.probe, measured.view))
    cells = [(probe, view) for probe in ("linear", "knn") for view in _views(measured) if (probe, view) in there]
    if not cells:
        return
    setting = measured.setting.iloc[0].rpartition(".")[2]
    lengths = list(measured.groupby(["budget", "length", "schedule"]))
    figure, axes = plt.subplots(len(cells), len(lengths), figsize=(4.8 * max(2, len(lengths)), 2.8 * len(cells) + 0.9), squeeze=False, layout="constrained",
                                sharey="row")
    for (probe, view), line in zip(cells, axes):
        for axis, ((budget, length, schedule), of_length) in zip(line, lengths):
            part = of_length[(of_length.probe == probe) & (of_length.view == view)]
            for method, curve in part.groupby("method", sort=False):
                colour, marker = STYLES.get(method, ("#777777", "*"))
                points = curve.groupby("value").top1.agg(["mean", "std"])
                axis.errorbar(points.index, points["mean"], points["std"].fillna(0), color=colour, marker=marker, linewidth=1.4, capsize=3,
                              label=LABELS.get(method, method))
            for name, reference in references[(references.probe == probe) & (references.view == view)].groupby("method"):
                colour, style = REFERENCE_STYLES[name]
                axis.axhline(reference.top1.mean(), color=colour, linestyle=style, linewidth=1.2, label=name)
            if part.value.max() > 4 * part.value.min() > 0:
                axis.set_xscale("log")
            axis.set_xticks(values := sorted(part.value.unique()), [f"{value:g}" for value in values])
            axis.minorticks_off()
            axis.set_xlabel(f"{setting} ({describe_length(budget, length)}{', snapshot' if schedule == 'snapshot' else ''})")
            axis.grid(alpha=0.25)
        line[0].set_ylabel(f"{_probe(probe)}, top-1 accuracy (%)\n{_view_name(view)}")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=8, frameon=False)
    spread = ", mean and standard deviation over seeds" if measured.seed.nunique() > 1 else f", seed {measured.seed.iloc[0]} only"
    figure.suptitle(f"{_title(measured)}: backbone's features{spread}", fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------------- convergence.png


def draw_convergence(rows: pd.DataFrame, path: Path) -> None:
    """Linear probe of the backbone's features against epochs and against minutes; points are evaluated runs or checkpoints."""
    measured, references = _split(rows)
    keep = lambda frame: frame[(frame.error == "") & (frame.probe == "linear") & frame.features.isin(["backbone", "pixels"])]  # noqa: E731
    measured, references = keep(measured), keep(references)
    views = _views(measured)
    if not views:
        return
    figure, axes = plt.subplots(len(views), 2, figsize=(9.6, 3.2 * len(views) + 0.9), squeeze=False, layout="constrained", sharey="row")
    several = measured.schedule.nunique() > 1
    for view, line in zip(views, axes):
        for axis, (quantity, unit) in zip(line, (("epoch", "epochs (passes through the training set)"), ("minutes", "minutes of training (without evaluation)"))):
            part = measured[measured.view == view].assign(minutes=measured.train_seconds / 60)
            for (method, schedule), curve in part.groupby(["method", "schedule"], sort=False):
                colour, marker = STYLES.get(method, ("#777777", "*"))
                points = curve.groupby("length").agg(x=(quantity, "mean"), y=("top1", "mean"), spread=("top1", "std")).sort_values("x")
                label = LABELS.get(method, method) + (f", {schedule}" if several else "")
                axis.errorbar(points.x, points.y, points.spread.fillna(0), color=colour, marker=marker, markersize=6, linewidth=1.4, capsize=3, label=label,
                              linestyle="-" if schedule == "snapshot" else "--", markerfacecolor=colour if schedule == "snapshot" else "white")
            for name, reference in references[references.view.isin([view, "whole"] if view == "whole" else [view])].groupby("method"):
                colour, style = REFERENCE_STYLES[name]
                axis.axhline(reference.top1.mean(), color=colour, linestyle=style, linewidth=1.2, label=name)
            if part[quantity].max() > 20 * part[quantity].min() > 0:
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter("{x:g}")
            else:
                axis.set_xlim(left=0)
            axis.set_xlabel(unit)
            axis.grid(alpha=0.25)
        line[0].set_ylabel(f"top-1 accuracy (%)\n{_view_name(view)}")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=8, frameon=False)
    spread = ", mean and standard deviation over seeds" if measured.seed.nunique() > 1 else f", seed {measured.seed.iloc[0]} only"
    figure.suptitle(f"{_title(rows)}: linear probe of the backbone's features{spread}", fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------------- pieces


def _label(method: str, setting: str, value: float) -> str:
    """What a row is of: "EMP-SSL", or in an ablation "EMP-SSL, num_patches 5"."""
    return LABELS.get(method, method) + (f", {setting.rpartition('.')[2]} {value:g}" if setting else "")


def _split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of methods, rows of the references)."""
    reference = rows.method.isin(REFERENCE_STYLES)
    return rows[~reference], rows[reference]


def _cells(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(probe, view) in the order of the columns."""
    there = {(row.probe, row.view) for row in rows[rows.error == ""].itertuples()}
    return sorted(there, key=lambda cell: (cell[0] != "linear", cell[1] != "whole", cell[1]))


def _views(rows: pd.DataFrame) -> list[str]:
    return sorted(rows.view.dropna().unique(), key=lambda view: (view != "whole", view))


def _view_name(view: str) -> str:
    return "whole images" if view == "whole" else f"{view} patches"


def _probe(probe: str) -> str:
    return {"knn": "k-NN"}.get(probe, probe)


def _title(rows: pd.DataFrame) -> str:
    name = NAMES.get(rows.dataset.iloc[0], rows.dataset.iloc[0])
    holdout = rows.holdout.max()
    return name + (f", held-out {100 * holdout:g} % of the training set" if holdout else "")


def _spread(rows: pd.DataFrame) -> str:
    seeds = rows.seed.nunique()
    return f"; mean and standard deviation over {seeds} seeds." if seeds > 1 else f"; a single seed ({rows.seed.iloc[0]})."


def _mean(values: pd.Series, digits: int) -> str:
    """Mean and, of several values, the sample standard deviation."""
    if not len(values):
        return ""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
