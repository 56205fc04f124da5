"""Tables of a study, and of transfers, in Markdown; rows are all they need."""

import pandas as pd

from emp_plugin.studies.paper import (
    in_papers_cell,
    is_fitted,
    paper_figure,
    paper_minutes,
    papers_cell,
)
from emp_plugin.studies.plan import describe_length
from emp_plugin.studies.rows import (
    COURSE,
    REFERENCES,
    Cell,
    cells,
    data_title,
    protocol_title,
    split_references,
)
from emp_plugin.studies.titles import dataset_title

NOTHING = "There are rows of the protocol quick alone, for figures.\n"
PAPERS_PROBES = ("linear", "published")  # those that a figure of the paper can stand beside

# --- table.md


def table(rows: pd.DataFrame) -> str:
    """A table per length, schedule and part of the labels.

    The paper's figures have columns of their own beside this study's.
    """
    rows = _published(rows)
    if rows.empty:
        return NOTHING
    rows = rows.assign(is_fitted=is_fitted(rows))
    measured, references = split_references(rows[rows.schedule != COURSE])
    lines = [f"# {data_title(rows)}", ""]
    lines.append(f"Top-1 accuracy in percent, last epoch, {protocol_title(rows)}{_seeds(rows)}")
    keys = ["budget", "length", "schedule", "labels"]
    # all labels come before parts of them
    measured = measured.sort_values(keys, ascending=[True, True, True, False])
    for (budget, length, schedule, labels), part in measured.groupby(keys, sort=False):
        heading = f"{describe_length(budget, length)}, schedule {schedule}{_labels(labels)}"
        same_labels = references[references.labels == labels]
        lines += ["", f"## {heading}", "", *_lines_of_length(part, same_labels)]
        lines += _not_evaluated(part)
        for row in part[part.error != ""].itertuples():
            lines.append(f"\n{row.title}, seed {row.seed}: failed: {row.error}")
    return "\n".join([*lines, "", _notes(measured)]) + "\n"


def _lines_of_length(measured: pd.DataFrame, references: pd.DataFrame) -> list[str]:
    columns = [cell for cell in cells(pd.concat([measured, references])) if len(cell.of(measured))]
    header = ["method", "features", "epochs", "minutes", "PFLOP", "patches seen"]
    # dense views of several scales; one scale is in the names of the columns
    scales = any(cell.scale is None for cell in columns)
    header += ["scale"] if scales else []
    for cell in columns:
        header += [str(cell), "paper"] if cell.probe in PAPERS_PROBES else [str(cell)]
    lines = [[*header, "seeds"]]
    for source in (measured, references):
        evaluated = source[source.error == ""]
        for (title, features), rows in evaluated.groupby(["title", "features"], sort=False):
            lines.append([title + _collapsed(rows), features, *_figures(rows, columns, scales)])
    return _markdown(lines, texts=2)


def _figures(rows: pd.DataFrame, columns: list[Cell], scales: bool) -> list[str]:
    """A line of the table, after the method and its features."""
    line = ["", "", "", ""]
    if rows.patches.max() > 0:
        minutes = _minutes(rows.groupby("seed").train_seconds.first())
        flops = f"{rows.flops.mean() / 1e15:.3g}"
        line = [f"{rows.epoch.mean():.4g}", minutes, flops, f"{rows.patches.mean():,.0f}"]
    if scales:
        line.append(_scale(rows))
    for cell in columns:
        found = cell.of(rows)
        line.append(_mean(found.top1, 2))
        if cell.probe in PAPERS_PROBES:
            papers = len(found) and in_papers_cell(found.iloc[0])
            line.append(paper_figure(found.iloc[0]) if papers else "")
    seeds = rows.seed.nunique()
    return [*line, str(seeds) if seeds > 1 else f"1 (seed {rows.seed.iloc[0]})"]


def _not_evaluated(measured: pd.DataFrame) -> list[str]:
    """What the paper has of these runs, where that was not evaluated: a line for each method."""
    lines = []
    of_paper = measured[(measured.paper != "") & (measured.labels == 1)]
    for title, rows in of_paper.groupby("title", sort=False):
        evaluated = any(in_papers_cell(row) for _, row in rows.iterrows())
        figure = paper_figure(rows.iloc[0])
        if figure and not evaluated:
            features, cell = papers_cell(rows.iloc[0])
            lines.append(f"\n{title}: the paper has {figure} ({features}, {cell}); not evaluated.")
    return lines


def _notes(rows: pd.DataFrame) -> str:
    machines = "; ".join(machine for machine in rows.machine.unique() if machine)
    notes = [
        "Epochs are passes through the training set, of which each image gives all its views "
        "(patches). Minutes are of training alone, without evaluation"
        f"{f', on: {machines}' if machines else ''}. PFLOP: 10^15 floating-point operations of "
        "training, of all views and networks, momentum networks too, which are not counted among "
        "the patches seen.",
        "Raw pixels and untrained: the images themselves, and the same backbone with the seed's "
        "initial weights, normalised, enlarged (dense) and cropped (bags) as the methods they are "
        "for have it; for all of them, if none is named.",
        "Paper: arXiv 2304.03977, tables 1 to 3. Its figures of EMP-SSL are of the published "
        "probe on the embedding of a bag of 128 augmented patches; of the others it says no more "
        "than linear probe. Empty, or without a column, where it has no such figure. "
        "\\* the paper does not say whether the schedule spanned these epochs. "
        "\\*\\* of the authors' README (tsb0601/EMP-SSL, 8fc3758); whether it is of one epoch or "
        "of two is not said.",
    ]
    if "dense" in set(rows["view"]):
        notes.append(
            "Dense: one pass over the image, enlarged so many times (scale) that a patch has the "
            "size that the network was trained on, and averaged over windows of that size."
        )
    if "online linear" in set(rows.probe):
        notes.append(
            "Online linear: solo-learn's classifier, trained along with the method on its views; "
            "linear: trained afterwards."
        )
    if "snapshot" in set(rows.schedule):
        notes.append(
            "Schedule fitted: the learning rate's schedule, and whatever else a recipe counts in "
            "epochs, spans the epochs of the row. Snapshot: the checkpoint after these epochs of "
            "the longest schedule."
        )
    if rows.collapsed.any():
        notes.append("Collapsed: the rank of the projections fell to a collapse in training.")
    return "\n\n".join(notes)


# --- time_to_accuracy.md


def time_to_accuracy(rows: pd.DataFrame, thresholds: list[float]) -> str:
    """Minutes of training after which each method is first seen at a threshold.

    Of the evaluated points at or above it, the one with the shortest training counts.

    Args:
        rows: of a study.
        thresholds: top-1 accuracies in percent.
    """
    rows = _published(rows)
    if rows.empty:
        return NOTHING
    measured, _ = split_references(rows)
    seeds = measured.groupby("title").seed.nunique()
    linear = measured.probe.isin(PAPERS_PROBES)
    timed = measured.train_seconds.notna()  # runs side by side have no minutes
    measured = measured[(measured.error == "") & (measured.labels == 1) & linear & timed]
    lines = [
        f"# Minutes of training to an accuracy: {data_title(rows)}",
        "",
        "Training minutes of the first evaluated point at or above the threshold, "
        f"{protocol_title(rows)}{_seeds(rows)} Only evaluated points count (`evaluate_every` "
        "sets how many), so that the true time may be shorter. The paper's minutes stand beside "
        "its own features, view and probe.",
    ]
    papers = paper_minutes(set(rows.dataset))
    for cell in cells(measured):
        lines += ["", f"## {cell}", ""]
        lines += _lines_of_times(measured, cell, thresholds, seeds, papers)
    return "\n".join(lines) + "\n"


def _lines_of_times(
    measured: pd.DataFrame,
    cell: Cell,
    thresholds: list[float],
    seeds: pd.Series,
    papers: pd.DataFrame,
) -> list[str]:
    header = ["method", "features"]
    for threshold in thresholds:
        known = threshold in set(papers.threshold)
        header += [f"{threshold:g} %", "paper, two A100"] if known else [f"{threshold:g} %"]
    lines = [[*header, "best seen, %"]]
    for (title, features), rows in cell.of(measured).groupby(["title", "features"], sort=False):
        at = "" if cell.scale else f", at {_scale(rows)}"
        line = [title + at + _collapsed(rows), features]
        for threshold in thresholds:
            line.append(_first_minutes(rows, threshold, seeds[title]))
            of_threshold = papers[papers.threshold == threshold]
            if len(of_threshold):
                same = of_threshold[of_threshold.method == rows.paper.iloc[0]]
                beside = len(same) and in_papers_cell(rows.iloc[0])
                line.append(str(same.minutes.iloc[0]) if beside else "")
        lines.append([*line, f"{rows.top1.max():.2f}"])
    return _markdown(lines, texts=2, empty_columns=True)


def _first_minutes(rows: pd.DataFrame, threshold: float, seeds: int) -> str:
    first = rows[rows.top1 >= threshold].groupby("seed").train_seconds.min()
    if first.empty:
        return "not reached"
    return _minutes(first) + ("" if len(first) == seeds else f" ({len(first)} of {seeds} seeds)")


# --- transfer.md


def transfer_table(rows: pd.DataFrame) -> str:
    """A table per dataset that was probed, and part of it: a line per checkpoint and features.

    Args:
        rows: of :func:`emp_plugin.studies.transfer.transfer`.
    """
    # runs of other settings, or checkpoints of one run
    twins = rows.groupby(["name", "trained_on", "seed"]).checkpoint.transform("nunique") > 1
    rows = rows.assign(name=rows["name"].mask(twins, rows["name"] + ", " + rows.checkpoint))
    lines = [
        "# Features probed on the dataset they were trained on, and on the other",
        "",
        "Top-1 accuracy in percent.",
    ]
    parts = rows.groupby(["dataset", "labels", "holdout", "fraction"], sort=False)
    for (_, labels, _, _), part in parts:
        columns = cells(part)
        body = [["model", "trained on", "seed", "features", "scale", *map(str, columns)]]
        scales = any(cell.scale is None for cell in columns)
        models = part.groupby(["checkpoint", "method", "features"], sort=False)
        for (_, method, features), of_model in models:
            run = of_model.iloc[0]
            about = [run["name"], dataset_title(run.trained_on), str(run.seed)]
            if method in REFERENCES:
                about = [method, "", ""]
            top1 = [_mean(cell.of(of_model).top1, 2) for cell in columns]
            body.append([*about, features, _scale(of_model) if scales else "", *top1])
        lines += ["", f"## {data_title(part)}{_labels(labels)}", "", *_markdown(body, texts=4)]
    return "\n".join(lines) + "\n"


# --- pieces


def _published(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that a table may hold."""
    return rows[rows.protocol != "quick"]


def _scale(rows: pd.DataFrame) -> str:
    """Of dense views."""
    scales = sorted(rows[rows["view"] == "dense"].scale.unique())
    return ", ".join(f"{scale:g}" for scale in scales)


def _collapsed(rows: pd.DataFrame) -> str:
    seeds, collapsed = rows.seed.nunique(), rows[rows.collapsed].seed.nunique()
    if not collapsed:
        return ""
    return ", collapsed" if collapsed == seeds else f", {collapsed} of {seeds} seeds collapsed"


def _labels(labels: float) -> str:
    return "" if labels == 1 else f", {100 * labels:g} % of the labels"


def _seeds(rows: pd.DataFrame) -> str:
    seeds = rows.seed.nunique()
    if seeds > 1:
        return f"; mean and standard deviation over {seeds} seeds."
    return f"; a single seed ({rows.seed.iloc[0]})."


def _mean(values: pd.Series, digits: int) -> str:
    """Mean and, of several values, the sample standard deviation."""
    if values.empty:
        return ""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def _minutes(seconds: pd.Series) -> str:
    """As :func:`_mean`, in minutes; a GPU's are parts of one. Nothing where there are none."""
    if seconds.isna().any():
        return ""
    return _mean(seconds / 60, 1 if seconds.mean() >= 60 else 2)


def _markdown(table: list[list[str]], texts: int, empty_columns: bool = False) -> list[str]:
    """The lines of a table.

    Args:
        table: cells by line; the first line is the header.
        texts: how many columns, from the left, hold no numbers.
        empty_columns: keep those, too, that have nothing below the header.
    """
    columns = [
        column
        for i, column in enumerate(zip(*table))
        if i < texts or empty_columns or any(column[1:])
    ]
    header, *lines = zip(*columns)
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *lines)]
